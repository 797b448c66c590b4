//! Certificates as files: what works, and what is said about what does not.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use migshm_transport::pki::{self, DEFAULT_VALIDITY};
use migshm_transport::{Identity, Peer};
use rcgen::{CertificateParams, DistinguishedName, DnType, Issuer, KeyPair, SanType};
use tempfile::TempDir;
use time::OffsetDateTime;

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
        .map(|(peer, valid)| (peer.file_stem(), valid.is_ok()))
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
    let directory = pki.path().display();
    assert!(
        error.contains(&format!(
            "n1.pem does not exist; issue it where ca.key is with `migshm pki node --dir {directory} --name n1`"
        )),
        "{error}"
    );
    let error = load_error(pki.path(), &Peer::Coordinator);
    assert!(
        error.contains(&format!(
            "coordinator.pem does not exist; issue it where ca.key is with `migshm pki coordinator --dir {directory}`"
        )),
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
    let remedy = format!("migshm pki renew --dir {} n1`)", pki.path().display());
    assert!(
        error.contains("n1.pem expired on 2") && error.ends_with(&remedy),
        "{error}"
    );
    assert!(pki::list(pki.path()).unwrap()[0].1.is_err());
    pki::renew(pki.path(), &node("n1"), DEFAULT_VALIDITY).unwrap();
    Identity::load(pki.path(), &node("n1")).unwrap();
}

#[test]
fn a_certificate_that_is_not_valid_yet_is_refused() {
    let pki = cluster();
    craft(pki.path(), "n1", |params| {
        params.not_before = OffsetDateTime::now_utc() + Duration::from_secs(100 * 24 * 3600);
    });
    let error = load_error(pki.path(), &node("n1"));
    assert!(
        error.contains("n1.pem is not valid before 2")
            && error.ends_with("check this host's clock"),
        "{error}"
    );
}

#[test]
fn a_certificate_of_two_names_is_nobodys() {
    let pki = cluster();
    craft(pki.path(), "n1", |params| {
        let coordinator = "coordinator.migshm".try_into().unwrap();
        params.subject_alt_names.push(SanType::DnsName(coordinator));
    });
    let error = load_error(pki.path(), &node("n1"));
    assert!(
        error.contains("n1.pem does not belong to node n1"),
        "{error}"
    );
}

/// A certificate and key of node `name` that are not as they are issued.
fn craft(pki: &Path, name: &str, change: impl FnOnce(&mut CertificateParams)) {
    let authority_key = fs::read_to_string(pki.join("ca.key")).unwrap();
    let mut authority = CertificateParams::default();
    authority.distinguished_name = DistinguishedName::new();
    authority
        .distinguished_name
        .push(DnType::CommonName, "migshm cluster authority");
    let issuer = Issuer::new(authority, KeyPair::from_pem(&authority_key).unwrap());
    let mut params = CertificateParams::new([format!("{name}.node.migshm")]).unwrap();
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    fs::write(pki.join(format!("{name}.pem")), certificate.pem()).unwrap();
    let path = pki.join(format!("{name}.key"));
    fs::write(&path, key.serialize_pem()).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn a_renewed_certificate_has_another_key_and_takes_the_place_of_the_former() {
    let pki = cluster();
    let error = pki::renew(pki.path(), &node("n1"), DEFAULT_VALIDITY).unwrap_err();
    assert!(
        error.to_string().contains("n1.pem does not exist"),
        "{error}"
    );
    pki::issue(pki.path(), &node("n1"), DEFAULT_VALIDITY).unwrap();
    let files = || ["n1.pem", "n1.key"].map(|name| fs::read(pki.path().join(name)).unwrap());
    let before = files();
    // What an interrupted renewal leaves is in nobody's way.
    fs::write(pki.path().join("n1.key.new"), "half").unwrap();
    pki::renew(pki.path(), &node("n1"), DEFAULT_VALIDITY).unwrap();
    Identity::load(pki.path(), &node("n1")).unwrap();
    let after = files();
    assert_ne!(before[0], after[0]);
    assert_ne!(before[1], after[1]);
    let key = fs::metadata(pki.path().join("n1.key")).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o600);
    assert!(!pki.path().join("n1.key.new").exists());
}

#[test]
fn an_authority_retires_once_nothing_needs_it() {
    let pki = cluster();
    for name in ["n1", "n2"] {
        pki::issue(pki.path(), &node(name), DEFAULT_VALIDITY).unwrap();
    }
    let current = || -> Vec<bool> {
        let listed = pki::list(pki.path()).unwrap();
        listed
            .into_iter()
            .map(|(_, valid)| valid.unwrap().current)
            .collect()
    };
    assert_eq!(current(), [true, true]);
    pki::rotate_authority(pki.path()).unwrap();
    assert_eq!(current(), [false, false]);
    for name in ["n1", "n2"] {
        Identity::load(pki.path(), &node(name)).unwrap();
    }
    pki::renew(pki.path(), &node("n1"), DEFAULT_VALIDITY).unwrap();
    assert_eq!(current(), [true, false]);
    let error = pki::retire_authorities(pki.path()).unwrap_err().to_string();
    assert!(
        error.contains("n2.pem was issued by an authority that is to retire"),
        "{error}"
    );
    pki::renew(pki.path(), &node("n2"), DEFAULT_VALIDITY).unwrap();
    let former = fs::read(pki.path().join("ca.pem")).unwrap();
    assert_eq!(pki::retire_authorities(pki.path()).unwrap(), 1);
    let left = fs::read(pki.path().join("ca.pem")).unwrap();
    assert!(left.len() < former.len());
    assert_eq!(current(), [true, true]);
    pki::issue(pki.path(), &node("n3"), DEFAULT_VALIDITY).unwrap();
    Identity::load(pki.path(), &node("n3")).unwrap();
    assert_eq!(pki::retire_authorities(pki.path()).unwrap(), 0);
}

#[test]
fn a_revoked_certificate_is_refused_until_it_is_issued_anew() {
    let pki = cluster();
    for name in ["n1", "n2"] {
        pki::issue(pki.path(), &node(name), DEFAULT_VALIDITY).unwrap();
    }
    for _ in 0..2 {
        pki::revoke(pki.path(), &node("n1")).unwrap();
    }
    let error = load_error(pki.path(), &node("n1"));
    assert!(
        error.contains("n1.pem has been revoked; issue it anew"),
        "{error}"
    );
    Identity::load(pki.path(), &node("n2")).unwrap();
    pki::renew(pki.path(), &node("n1"), DEFAULT_VALIDITY).unwrap();
    Identity::load(pki.path(), &node("n1")).unwrap();

    let revoked = pki.path().join("revoked");
    let text = fs::read_to_string(&revoked).unwrap();
    assert_eq!(text.lines().count(), 1);
    assert!(text.contains(" # node n1, 20"), "{text}");
    // What is meant by these nobody knows.
    for bad in ["n1", "abc", "+1", "00 11", "0x12"] {
        fs::write(&revoked, format!("# a remark\n\n{bad}\n")).unwrap();
        let error = load_error(pki.path(), &node("n2"));
        assert!(
            error.contains("revoked does not hold a serial number in every line: line 3"),
            "{error}"
        );
    }
}

#[test]
fn a_directory_that_everybody_can_write_to_is_refused() {
    let pki = cluster();
    pki::issue(pki.path(), &node("n1"), DEFAULT_VALIDITY).unwrap();
    let mode = |mode| fs::set_permissions(pki.path(), fs::Permissions::from_mode(mode)).unwrap();
    mode(0o777);
    let errors = [
        load_error(pki.path(), &node("n1")),
        pki::issue(pki.path(), &node("n2"), DEFAULT_VALIDITY)
            .unwrap_err()
            .to_string(),
        pki::create_authority(pki.path()).unwrap_err().to_string(),
    ];
    for error in errors {
        assert!(error.starts_with("everybody can put files into"), "{error}");
    }
    mode(0o755);
    Identity::load(pki.path(), &node("n1")).unwrap();
    let key = pki.path().join("ca.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    let error = pki::issue(pki.path(), &node("n2"), DEFAULT_VALIDITY).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("ca.key can be read by everybody"),
        "{error}"
    );
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
