//! Certificates as files: what works, and what is said about what does not.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use migshm_transport::pki::{self, DEFAULT_VALIDITY};
use migshm_transport::{Identity, Peer};
use tempfile::TempDir;

fn cluster() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    pki::create_authority(directory.path()).unwrap();
    directory
}

fn node(name: &str) -> Peer {
    Peer::node(name).unwrap()
}

fn load_error(directory: &Path, peer: &Peer) -> String {
    Identity::load(directory, peer).unwrap_err().to_string()
}

#[test]
fn an_issued_certificate_loads_and_only_its_owner_can_read_the_keys() {
    let pki = cluster();
    for peer in [Peer::Coordinator, node("n1")] {
        pki::issue(pki.path(), &peer, DEFAULT_VALIDITY).unwrap();
        let identity = Identity::load(pki.path(), &peer).unwrap();
        assert_eq!(*identity.peer(), peer);
        assert!(
            identity.expires() > SystemTime::now() + DEFAULT_VALIDITY - Duration::from_secs(60)
        );
    }
    for key in ["ca.key", "coordinator.key", "n1.key"] {
        let mode = fs::metadata(pki.path().join(key))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{key}");
    }
    let listed = pki::list(pki.path()).unwrap();
    let peers: Vec<_> = listed
        .iter()
        .map(|(peer, expires)| (peer.file_stem(), expires.is_ok()))
        .collect();
    assert_eq!(peers, [("coordinator", true), ("n1", true)]);
}

#[test]
fn nothing_is_overwritten() {
    let pki = cluster();
    pki::issue(pki.path(), &node("n1"), DEFAULT_VALIDITY).unwrap();
    let before = fs::read(pki.path().join("n1.key")).unwrap();
    let error = pki::issue(pki.path(), &node("n1"), DEFAULT_VALIDITY)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("n1.pem exists and is never overwritten"),
        "{error}"
    );
    assert_eq!(fs::read(pki.path().join("n1.key")).unwrap(), before);
    let error = pki::create_authority(pki.path()).unwrap_err().to_string();
    assert!(error.contains("ca.pem exists"), "{error}");
    fs::remove_file(pki.path().join("ca.pem")).unwrap();
    let error = pki::create_authority(pki.path()).unwrap_err().to_string();
    assert!(error.contains("ca.key exists"), "{error}");
}

#[test]
fn what_is_missing_is_named_with_its_remedy() {
    let empty = tempfile::tempdir().unwrap();
    let error = load_error(empty.path(), &node("n1"));
    assert!(
        error.contains("ca.pem does not exist; create the authority with `migshm pki init"),
        "{error}"
    );
    let pki = cluster();
    let error = load_error(pki.path(), &node("n1"));
    assert!(
        error.contains("n1.pem does not exist; issue it with `migshm pki node --name n1`"),
        "{error}"
    );
    let error = load_error(pki.path(), &Peer::Coordinator);
    assert!(
        error.contains("coordinator.pem does not exist; issue it with `migshm pki coordinator`"),
        "{error}"
    );
    pki::issue(pki.path(), &node("n1"), DEFAULT_VALIDITY).unwrap();
    fs::remove_file(pki.path().join("n1.key")).unwrap();
    let error = load_error(pki.path(), &node("n1"));
    assert!(error.contains("n1.key does not exist"), "{error}");
    fs::remove_file(pki.path().join("ca.key")).unwrap();
    let error = pki::issue(pki.path(), &node("n2"), DEFAULT_VALIDITY)
        .unwrap_err()
        .to_string();
    assert!(error.contains("ca.key does not exist"), "{error}");
}

#[test]
fn a_certificate_of_another_authority_is_refused() {
    let (pki, other) = (cluster(), cluster());
    pki::issue(pki.path(), &node("n1"), DEFAULT_VALIDITY).unwrap();
    fs::copy(other.path().join("ca.pem"), pki.path().join("ca.pem")).unwrap();
    let error = load_error(pki.path(), &node("n1"));
    assert!(
        error.contains("n1.pem was not issued by") && error.contains("ca.pem"),
        "{error}"
    );
    let error = pki::issue(pki.path(), &node("n2"), DEFAULT_VALIDITY)
        .unwrap_err()
        .to_string();
    assert!(error.contains("ca.key is not the key of"), "{error}");
}

#[test]
fn an_expired_certificate_is_refused() {
    let pki = cluster();
    pki::issue(pki.path(), &node("n1"), Duration::ZERO).unwrap();
    std::thread::sleep(Duration::from_millis(1_100));
    let error = load_error(pki.path(), &node("n1"));
    assert!(
        error.contains("n1.pem expired on 2") && error.ends_with("issue it anew"),
        "{error}"
    );
    assert!(pki::list(pki.path()).unwrap()[0].1.is_err());
}

#[test]
fn the_key_of_another_certificate_is_refused() {
    let pki = cluster();
    pki::issue(pki.path(), &node("n1"), DEFAULT_VALIDITY).unwrap();
    pki::issue(pki.path(), &node("n2"), DEFAULT_VALIDITY).unwrap();
    fs::copy(pki.path().join("n2.key"), pki.path().join("n1.key")).unwrap();
    let error = load_error(pki.path(), &node("n1"));
    assert!(error.contains("n1.key is not the key of"), "{error}");
}

#[test]
fn a_renamed_certificate_is_refused() {
    let pki = cluster();
    pki::issue(pki.path(), &node("n1"), DEFAULT_VALIDITY).unwrap();
    for ending in ["pem", "key"] {
        fs::rename(
            pki.path().join(format!("n1.{ending}")),
            pki.path().join(format!("coordinator.{ending}")),
        )
        .unwrap();
    }
    let error = load_error(pki.path(), &Peer::Coordinator);
    assert!(
        error.contains("coordinator.pem does not belong to the coordinator"),
        "{error}"
    );
}

#[test]
fn what_is_not_a_certificate_or_key_is_refused() {
    let pki = cluster();
    pki::issue(pki.path(), &node("n1"), DEFAULT_VALIDITY).unwrap();
    let key = pki.path().join("n1.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(load_error(pki.path(), &node("n1")).contains("n1.key can be read by everybody"));
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
    Identity::load(pki.path(), &node("n1")).unwrap();
    fs::write(&key, "garbage").unwrap();
    assert!(
        load_error(pki.path(), &node("n1")).contains("n1.key does not hold a private key in PEM")
    );
    fs::write(pki.path().join("n1.pem"), "garbage").unwrap();
    assert!(
        load_error(pki.path(), &node("n1")).contains("n1.pem does not hold a certificate in PEM")
    );
}
