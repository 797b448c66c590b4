//! Links between real endpoints on loopback.

mod support;

use std::time::Duration;

use migshm_protocol::limits::MAX_REMOTE;
use migshm_transport::pki;
use migshm_transport::{Endpoint, Identity, Link, LinkError, Peer};

use support::{LOOPBACK, accept_all, attempt, cluster, endpoint, node, number, pair};

/// The ends of a link between the nodes `a` and `b`.
async fn linked_nodes() -> (Link, Link) {
    let pki = cluster(&["a", "b"]);
    let a = endpoint(pki.path(), &node("a"));
    let b = endpoint(pki.path(), &node("b"));
    pair(&a, &b, &node("b")).await
}

#[tokio::test]
async fn frames_arrive_whole_and_in_order_both_ways() {
    let (mut at_a, mut at_b) = linked_nodes().await;
    assert_eq!(at_a.peer, node("b"));
    assert_eq!(at_b.peer, node("a"));

    let sizes = [0, 1, 1_000, 4_096, 70_000, MAX_REMOTE - 16, 3];
    for (number, size) in sizes.into_iter().enumerate() {
        at_a.sender.send(&number, &vec![number as u8; size]);
        at_b.sender.send_with(&number, size, |frame| {
            frame.resize(frame.len() + size, number as u8);
        });
    }
    for link in [&mut at_a, &mut at_b] {
        for (number, size) in sizes.into_iter().enumerate() {
            let frame = link.receiver.next().await.unwrap();
            let (got, raw) = frame.decode::<usize>().unwrap();
            assert_eq!(got, number);
            assert_eq!(raw, vec![number as u8; size]);
        }
    }
}

/// A burst leaves as one buffer that the kernel cuts into datagrams; one above the kernel's bound
/// would vanish without an error, and its resent datagrams with it.
#[tokio::test]
async fn no_datagram_of_a_burst_is_lost_on_loopback() {
    const PAGES: u64 = 40;
    let (mut at_a, mut at_b) = linked_nodes().await;
    let page = [7; 4096];
    for _ in 0..100 {
        for number in 0..PAGES {
            at_a.sender.send(&number, &page);
            at_b.sender.send(&number, &page);
        }
        for expected in 0..PAGES {
            assert_eq!(number(&mut at_a).await, expected);
            assert_eq!(number(&mut at_b).await, expected);
        }
    }
    // The first datagram of a connection is not counted where it arrives.
    let lost = || {
        let (a, b) = (at_a.sender.datagrams(), at_b.sender.datagrams());
        (a.sent - b.received - 1) + (b.sent - a.received)
    };
    let all_arrived = async {
        while lost() > 0 {
            tokio::task::yield_now().await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(10), all_arrived).await;
    assert!(waited.is_ok(), "{} datagrams are lost", lost());
}

#[tokio::test]
async fn frames_beyond_the_send_window_wait_and_arrive() {
    let (at_a, mut at_b) = linked_nodes().await;
    let raw = vec![7; 128 << 10];
    for number in 0..320u64 {
        at_a.sender.send(&number, &raw);
    }
    let finish = at_a.sender.finish();
    let receive = async {
        for expected in 0..320 {
            assert_eq!(number(&mut at_b).await, expected);
        }
        assert_eq!(at_b.receiver.next().await.unwrap_err(), LinkError::Ended);
    };
    tokio::join!(finish, receive);
}

#[tokio::test]
async fn frames_that_arrived_together_need_no_second_wakeup() {
    let (at_a, mut at_b) = linked_nodes().await;
    assert!(at_b.receiver.try_next().unwrap().is_none());
    for number in 1..=3u64 {
        at_a.sender.send(&number, &[]);
    }
    assert_eq!(number(&mut at_b).await, 1);
    for expected in 2..=3u64 {
        let frame = at_b
            .receiver
            .try_next()
            .unwrap()
            .expect("sent in one packet");
        assert_eq!(frame.decode::<u64>().unwrap().0, expected);
    }
}

#[tokio::test]
async fn a_close_tells_the_peer_why() {
    let pki = cluster(&["a"]);
    let (a, coordinator) = (
        endpoint(pki.path(), &node("a")),
        endpoint(pki.path(), &Peer::Coordinator),
    );
    let (mut at_a, mut at_coordinator) = pair(&a, &coordinator, &Peer::Coordinator).await;
    at_coordinator.sender.close("going down");
    let error = at_a.receiver.next().await.unwrap_err();
    assert_eq!(error.to_string(), "the peer closed the link: going down");
    assert_eq!(at_a.sender.lost().await, error);
    assert_eq!(
        at_coordinator.receiver.next().await.unwrap_err(),
        LinkError::ClosedHere
    );
}

#[tokio::test]
async fn a_frame_above_the_limit_loses_the_link() {
    let (at_a, mut at_b) = linked_nodes().await;
    at_a.sender.send(&1u64, &vec![0; MAX_REMOTE]);
    let error = at_b.receiver.next().await.unwrap_err().to_string();
    assert!(
        error.starts_with("the peer closed the link: message of 262145 bytes exceeds"),
        "{error}"
    );

    let (at_a, mut at_b) = linked_nodes().await;
    let (mut hostile, mut answers) = at_a.into_stream();
    hostile.write_all(&u32::MAX.to_le_bytes()).await.unwrap();
    let error = at_b.receiver.next().await.unwrap_err().to_string();
    assert!(
        error.starts_with("the peer violates the protocol: message of 4294967295 bytes"),
        "{error}"
    );
    assert!(answers.read_chunk(1, true).await.is_err());
}

#[tokio::test]
async fn another_clusters_certificate_is_refused_by_both_sides() {
    let (ours, theirs) = (cluster(&["a"]), cluster(&["b"]));
    let coordinator = endpoint(ours.path(), &Peer::Coordinator);
    let address = coordinator.local_address().unwrap();
    let serve = tokio::spawn(async move {
        coordinator
            .accept()
            .await
            .unwrap()
            .link()
            .await
            .unwrap_err()
    });
    let error = attempt(
        &endpoint(theirs.path(), &node("b")),
        address,
        &Peer::Coordinator,
    )
    .await;
    assert_eq!(
        error.to_string(),
        "the peer's certificate is refused: it comes from another cluster's authority"
    );
    assert_eq!(
        serve.await.unwrap().to_string(),
        "the peer refuses this side's certificate: it comes from another cluster's authority"
    );
}

#[tokio::test]
async fn nobody_is_taken_for_another_who_is_linked_to() {
    let pki = cluster(&["a", "b"]);
    let a = endpoint(pki.path(), &node("a"));
    for (server, poses, has) in [
        (node("b"), Peer::Coordinator, "b.node.migshm"),
        (node("b"), node("c"), "b.node.migshm"),
        (Peer::Coordinator, node("b"), "coordinator.migshm"),
    ] {
        let server = endpoint(pki.path(), &server);
        accept_all(&server);
        let error = attempt(&a, server.local_address().unwrap(), &poses).await;
        let error = error.to_string();
        assert!(
            error.starts_with("the peer's certificate is refused"),
            "{error}"
        );
        assert!(error.contains(has), "{error}");
    }
}

/// Whatever it says itself; see also the coordinator's and the cluster's tests.
#[tokio::test]
async fn a_server_knows_its_client_by_the_certificate() {
    let pki = cluster(&["a", "b"]);
    let b = endpoint(pki.path(), &node("b"));
    for client in [node("a"), node("b"), Peer::Coordinator] {
        let (_at_client, at_b) = pair(&endpoint(pki.path(), &client), &b, &node("b")).await;
        assert_eq!(at_b.peer, client);
    }
}

#[tokio::test]
async fn a_certificate_that_expires_while_in_use_makes_no_new_links() {
    let pki = cluster(&["a"]);
    pki::issue(pki.path(), &node("brief"), Duration::from_secs(1)).unwrap();
    let brief = endpoint(pki.path(), &node("brief"));
    let coordinator = endpoint(pki.path(), &Peer::Coordinator);
    let address = coordinator.local_address().unwrap();
    tokio::spawn(async move {
        coordinator
            .accept()
            .await
            .unwrap()
            .link()
            .await
            .unwrap_err()
    });
    tokio::time::sleep(Duration::from_millis(2_100)).await;
    let error = attempt(&brief, address, &Peer::Coordinator).await;
    assert_eq!(
        error.to_string(),
        "the peer refuses this side's certificate: it has expired, or the hosts' clocks differ"
    );
}

#[tokio::test]
async fn garbage_and_plaintext_do_not_disturb_a_server() {
    let pki = cluster(&["a"]);
    let (a, coordinator) = (
        endpoint(pki.path(), &node("a")),
        endpoint(pki.path(), &Peer::Coordinator),
    );
    let stranger = std::net::UdpSocket::bind(LOOPBACK).unwrap();
    let address = coordinator.local_address().unwrap();
    for length in [0, 1, 20, 1_200, 1_472] {
        stranger.send_to(&vec![0xc3; length], address).unwrap();
        stranger.send_to(&vec![b'A'; length], address).unwrap();
    }
    let (at_a, mut at_coordinator) = pair(&a, &coordinator, &Peer::Coordinator).await;
    at_a.sender.send(&1u64, &[]);
    assert_eq!(number(&mut at_coordinator).await, 1);
}

#[tokio::test]
async fn a_link_without_a_peer_ends_in_silence() {
    let pki = cluster(&["a"]);
    let nobody = std::net::UdpSocket::bind(LOOPBACK).unwrap();
    let a = endpoint(pki.path(), &node("a"));
    let error = attempt(&a, nobody.local_addr().unwrap(), &Peer::Coordinator).await;
    assert_eq!(error.to_string(), "the peer does not answer");
}

#[tokio::test]
async fn a_peer_that_was_started_again_says_that_it_does_not_know_the_link() {
    let pki = cluster(&["a"]);
    let a = endpoint(pki.path(), &node("a"));
    let (tell, address) = tokio::sync::oneshot::channel();
    let path = pki.path().to_owned();
    let former = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let both = runtime.block_on(async {
            let coordinator = endpoint(&path, &Peer::Coordinator);
            tell.send(coordinator.local_address().unwrap()).unwrap();
            let link = coordinator.accept().await.unwrap().link().await.unwrap();
            (coordinator, link)
        });
        // Without the runtime it cannot say goodbye.
        drop(runtime);
        drop(both);
    });
    let address = address.await.unwrap();
    let mut link = a.connect(address, &Peer::Coordinator).await.unwrap();
    link.sender.send(&0u64, &[]);
    tokio::task::spawn_blocking(|| former.join().unwrap())
        .await
        .unwrap();

    let identity = Identity::load(pki.path(), &Peer::Coordinator).unwrap();
    let _again = Endpoint::bind(address, &identity).unwrap();
    link.sender.send(&0u64, &[]);
    let error = link.receiver.next().await.unwrap_err();
    assert_eq!(error, LinkError::Restarted);
}
