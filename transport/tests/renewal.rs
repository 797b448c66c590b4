//! Certificates, authorities and what is revoked change while links stand.

mod support;

use std::path::Path;

use migshm_transport::pki::{self, DEFAULT_VALIDITY};
use migshm_transport::{Endpoint, Identity, Link, LinkError, Peer};

use support::{accept_all, attempt, cluster, copy, endpoint, node, number, pair};

fn renew(endpoint: &Endpoint, directory: &Path) {
    let identity = Identity::load(directory, endpoint.peer()).unwrap();
    endpoint.renew(&identity).unwrap();
}

/// Both directions of a link work.
async fn assert_stands(at_a: &mut Link, at_b: &mut Link) {
    at_a.sender.send(&7u64, &[]);
    assert_eq!(number(at_b).await, 7);
    at_b.sender.send(&8u64, &[]);
    assert_eq!(number(at_a).await, 8);
}

/// Each host has a directory of its own, as in life, and gets new files at another time.
#[tokio::test]
async fn an_authority_is_replaced_while_links_stand_and_new_ones_are_made() {
    let head = cluster(&["a", "b"]);
    let hosts = [Peer::Coordinator, node("a"), node("b")];
    let directories = hosts.each_ref().map(|_| tempfile::tempdir().unwrap());
    let bring = |names: &[&str]| {
        for directory in &directories {
            copy(head.path(), directory.path(), names);
        }
    };
    bring(&["ca.pem"]);
    for (host, directory) in hosts.iter().zip(&directories) {
        let name = host.file_stem();
        copy(
            head.path(),
            directory.path(),
            &[&format!("{name}.pem"), &format!("{name}.key")],
        );
    }
    let endpoints: Vec<Endpoint> = hosts
        .iter()
        .zip(&directories)
        .map(|(host, directory)| endpoint(directory.path(), host))
        .collect();
    let [coordinator, a, b] = &endpoints[..] else {
        unreachable!()
    };
    let mut standing = vec![
        pair(a, coordinator, &Peer::Coordinator).await,
        pair(b, a, &node("a")).await,
    ];
    // After every step every pair of hosts can make a link, whichever has the new files.
    let check = async |standing: &mut Vec<(Link, Link)>| {
        for (from, to) in [(a, coordinator), (b, coordinator), (a, b), (b, a)] {
            let (mut at_a, mut at_b) = pair(from, to, to.peer()).await;
            assert_stands(&mut at_a, &mut at_b).await;
        }
        for (at_a, at_b) in standing {
            assert_stands(at_a, at_b).await;
        }
    };
    pki::rotate_authority(head.path()).unwrap();
    bring(&["ca.pem"]);
    for host in 0..hosts.len() {
        renew(&endpoints[host], directories[host].path());
        check(&mut standing).await;
    }
    for host in 0..hosts.len() {
        pki::renew(head.path(), &hosts[host], DEFAULT_VALIDITY).unwrap();
        let name = hosts[host].file_stem();
        copy(
            head.path(),
            directories[host].path(),
            &[&format!("{name}.pem"), &format!("{name}.key")],
        );
        renew(&endpoints[host], directories[host].path());
        check(&mut standing).await;
    }
    assert_eq!(pki::retire_authorities(head.path()).unwrap(), 1);
    bring(&["ca.pem"]);
    for host in 0..hosts.len() {
        renew(&endpoints[host], directories[host].path());
        check(&mut standing).await;
    }
}

#[tokio::test]
async fn a_retired_authoritys_certificates_make_no_new_links() {
    let pki = cluster(&["a", "b"]);
    let former = tempfile::tempdir().unwrap();
    copy(pki.path(), former.path(), &["ca.pem", "b.pem", "b.key"]);
    pki::rotate_authority(pki.path()).unwrap();
    copy(pki.path(), former.path(), &["ca.pem"]);
    for name in ["a", "b"] {
        pki::renew(pki.path(), &node(name), DEFAULT_VALIDITY).unwrap();
    }
    let a = endpoint(pki.path(), &node("a"));
    let b = endpoint(former.path(), &node("b"));
    drop(pair(&b, &a, &node("a")).await);
    drop(pair(&a, &b, &node("b")).await);

    pki::renew(pki.path(), &Peer::Coordinator, DEFAULT_VALIDITY).unwrap();
    pki::retire_authorities(pki.path()).unwrap();
    renew(&a, pki.path());
    accept_all(&a);
    accept_all(&b);
    let error = attempt(&b, a.local_address().unwrap(), &node("a")).await;
    assert_eq!(
        error.to_string(),
        "the peer refuses this side's certificate: it comes from another cluster's authority"
    );
    let error = attempt(&a, b.local_address().unwrap(), &node("b")).await;
    assert_eq!(
        error.to_string(),
        "the peer's certificate is refused: it comes from another cluster's authority"
    );
}

#[tokio::test]
async fn a_revoked_certificate_loses_its_links_and_gets_no_new_ones() {
    let pki = cluster(&["a", "b", "c"]);
    let [a, b, c] = ["a", "b", "c"].map(|name| endpoint(pki.path(), &node(name)));
    let (mut a_to_b, mut b_from_a) = pair(&a, &b, &node("b")).await;
    let (mut b_to_a, mut a_from_b) = pair(&b, &a, &node("a")).await;
    let (mut at_a, mut at_c) = pair(&c, &a, &node("a")).await;

    pki::revoke(pki.path(), &node("b")).unwrap();
    renew(&a, pki.path());
    let told = "the peer closed the link: this side's certificate is refused: it has been revoked";
    for link in [&mut b_from_a, &mut b_to_a] {
        let error = link.receiver.next().await.unwrap_err();
        assert_eq!(error.to_string(), told);
    }
    for link in [&mut a_to_b, &mut a_from_b] {
        let error = link.receiver.next().await.unwrap_err();
        assert_eq!(error, LinkError::ClosedHere);
    }
    assert_stands(&mut at_a, &mut at_c).await;

    accept_all(&b);
    let refused = "the peer's certificate is refused: it has been revoked";
    let error = attempt(&a, b.local_address().unwrap(), &node("b")).await;
    assert_eq!(error.to_string(), refused);
    let accepting = a.clone();
    let accepted = tokio::spawn(async move { accepting.accept().await.unwrap().link().await });
    let error = attempt(&b, a.local_address().unwrap(), &node("a")).await;
    assert_eq!(error.to_string(), told);
    let error = accepted.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), refused);

    // It is the certificate that is revoked, not the node.
    pki::renew(pki.path(), &node("b"), DEFAULT_VALIDITY).unwrap();
    renew(&b, pki.path());
    let (mut at_b, mut at_a) = pair(&b, &a, &node("a")).await;
    assert_stands(&mut at_b, &mut at_a).await;
}
