//! Node daemons, friendly and not, on links to a coordinator.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use migshm_coordinator::{Core, server};
use migshm_protocol::call::{Answer, Call, Caller};
use migshm_protocol::control::{FromCoordinator, ToCoordinator};
use migshm_protocol::{NodeId, ProcessId, VERSION, Version};
use migshm_transport::pki::{self, DEFAULT_VALIDITY};
use migshm_transport::{Endpoint, Identity, Link, LinkError, Peer};
use tempfile::TempDir;

const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const MEMORY: u64 = 1 << 30;

/// A coordinator that serves in the background.
struct Cluster {
    pki: TempDir,
    address: SocketAddr,
}

impl Cluster {
    fn start(nodes: &[&str]) -> Cluster {
        let pki = tempfile::tempdir().unwrap();
        pki::create_authority(pki.path()).unwrap();
        pki::issue(pki.path(), &Peer::Coordinator, DEFAULT_VALIDITY).unwrap();
        for name in nodes {
            pki::issue(pki.path(), &Peer::node(name).unwrap(), DEFAULT_VALIDITY).unwrap();
        }
        let identity = Identity::load(pki.path(), &Peer::Coordinator).unwrap();
        let endpoint = Endpoint::bind(LOOPBACK, &identity).unwrap();
        let address = endpoint.local_address().unwrap();
        tokio::spawn(server::serve(endpoint, Core::new()));
        Cluster { pki, address }
    }

    async fn connect(&self, peer: &Peer) -> Link {
        let identity = Identity::load(self.pki.path(), peer).unwrap();
        let endpoint = Endpoint::bind(LOOPBACK, &identity).unwrap();
        endpoint
            .connect(self.address, &Peer::Coordinator)
            .await
            .unwrap()
    }

    /// A link that has said `Join`.
    async fn apply(&self, name: &str, version: Version) -> Link {
        let link = self.connect(&Peer::node(name).unwrap()).await;
        link.sender.send(&join(name, version), &[]);
        link
    }

    /// A link that has been welcomed and has heard of its first members.
    async fn member(&self, name: &str) -> (Link, NodeId, u64) {
        let mut link = self.apply(name, VERSION).await;
        let FromCoordinator::Welcome { node, epoch } = hear(&mut link).await else {
            panic!("not welcomed");
        };
        assert!(members(&mut link).await.contains(&name.to_owned()));
        (link, node, epoch)
    }
}

fn join(name: &str, version: Version) -> ToCoordinator {
    ToCoordinator::Join {
        version,
        name: name.to_owned(),
        address: LOOPBACK,
        memory: MEMORY,
    }
}

async fn hear(link: &mut Link) -> FromCoordinator {
    link.receiver.next().await.unwrap().decode().unwrap().0
}

async fn members(link: &mut Link) -> Vec<String> {
    match hear(link).await {
        FromCoordinator::Members { members, .. } => members.into_iter().map(|m| m.name).collect(),
        other => panic!("{other:?} instead of the members"),
    }
}

async fn newcomer(link: &mut Link) -> String {
    match hear(link).await {
        FromCoordinator::Joined { member } => member.name,
        other => panic!("{other:?} instead of a member"),
    }
}

async fn refusal(link: &mut Link) -> String {
    match hear(link).await {
        FromCoordinator::Refused { reason } => reason,
        other => panic!("{other:?} instead of a refusal"),
    }
}

fn semget() -> ToCoordinator {
    let caller = Caller {
        process: ProcessId(1),
        pid: 1,
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        capabilities: 0,
        memlock: None,
    };
    ToCoordinator::Call {
        id: 1,
        caller,
        call: Call::SemGet {
            key: 7,
            count: 1,
            flags: 0o1666,
        },
    }
}

#[tokio::test]
async fn members_hear_of_each_other_and_their_calls_are_answered() {
    let cluster = Cluster::start(&["a", "b"]);
    let (mut a, ..) = cluster.member("a").await;
    let (mut b, node, _) = cluster.member("b").await;
    assert_eq!(newcomer(&mut a).await, "b");

    let mut ids = Vec::new();
    for link in [&mut a, &mut b] {
        link.sender.send(&semget(), &[]);
        match hear(link).await {
            FromCoordinator::Answer {
                id: 1,
                outcome: Ok(Answer::Value(id)),
                ..
            } => ids.push(id),
            other => panic!("{other:?} instead of an answer"),
        }
    }
    assert_eq!(ids[0], ids[1]);

    drop(b);
    let left = hear(&mut a).await;
    assert!(matches!(left, FromCoordinator::Left { node: of, .. } if of == node));
}

#[tokio::test]
async fn another_major_version_is_refused_with_both_versions() {
    let cluster = Cluster::start(&["a"]);
    let mut link = cluster.apply("a", Version { major: 9, minor: 1 }).await;
    let reason = refusal(&mut link).await;
    assert_eq!(
        reason,
        format!("the coordinator speaks version {VERSION}, the node 9.1")
    );
    assert_eq!(link.receiver.next().await.unwrap_err(), LinkError::Ended);
}

#[tokio::test]
async fn a_node_joins_under_its_certificates_name_only() {
    let cluster = Cluster::start(&["a", "b"]);
    let mut link = cluster.connect(&Peer::node("a").unwrap()).await;
    link.sender.send(&join("b", VERSION), &[]);
    assert_eq!(
        refusal(&mut link).await,
        "the certificate is that of node a, not of node b"
    );
    let mut link = cluster.connect(&Peer::Coordinator).await;
    link.sender.send(&join("a", VERSION), &[]);
    assert!(
        refusal(&mut link)
            .await
            .starts_with("the certificate is that of the coordinator")
    );
}

#[tokio::test]
async fn a_restarted_node_takes_the_place_of_its_former_link_at_once() {
    let cluster = Cluster::start(&["a"]);
    let (mut old, node, epoch) = cluster.member("a").await;
    let (_new, again, later) = cluster.member("a").await;
    assert_eq!(again, node);
    assert!(later > epoch);
    let error = old.receiver.next().await.unwrap_err().to_string();
    assert!(
        error.ends_with("another link of the node took its place"),
        "{error}"
    );
}

#[tokio::test]
async fn garbage_ends_its_own_link_only() {
    let cluster = Cluster::start(&["a", "b"]);
    let (mut a, ..) = cluster.member("a").await;
    let (mut b, node, _) = cluster.member("b").await;
    assert_eq!(newcomer(&mut a).await, "b");

    b.sender.send(&u64::MAX, &[0xff; 100]);
    let error = b.receiver.next().await.unwrap_err().to_string();
    assert!(
        error.starts_with("the peer closed the link: malformed message"),
        "{error}"
    );
    let left = hear(&mut a).await;
    assert!(matches!(left, FromCoordinator::Left { node: of, .. } if of == node));

    let mut hasty = cluster.connect(&Peer::node("b").unwrap()).await;
    hasty.sender.send(&semget(), &[]);
    let error = hasty.receiver.next().await.unwrap_err().to_string();
    assert_eq!(
        error,
        "the peer closed the link: the first message must be a Join"
    );

    a.sender.send(&semget(), &[]);
    assert!(matches!(hear(&mut a).await, FromCoordinator::Answer { .. }));
}
