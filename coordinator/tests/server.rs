//! Node daemons, friendly and not, on links to a coordinator.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use migshm_coordinator::replica::Replica;
use migshm_coordinator::store::{Directory, Durability, Store};
use migshm_coordinator::{Settings, server};
use migshm_protocol::call::{Answer, Call, Caller};
use migshm_protocol::control::{FromCoordinator, ToCoordinator};
use migshm_protocol::session::{Cursor, Header, Session, opening};
use migshm_protocol::{NodeId, ProcessId, VERSION, Version, codec};
use migshm_transport::pki::{self, DEFAULT_VALIDITY};
use migshm_transport::{Carrier, Endpoint, FrameReceiver, Identity, Link, LinkError, Peer};
use tempfile::TempDir;
use tokio::task::JoinHandle;

const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const MEMORY: u64 = 1 << 30;

/// A coordinator that serves in the background.
struct Cluster {
    pki: TempDir,
    address: SocketAddr,
    state: Option<TempDir>,
    serving: JoinHandle<()>,
}

/// A node's link, and its side of the session.
struct Node {
    session: Session,
    carrier: Carrier,
    receiver: FrameReceiver,
    cluster: u64,
    slot: NodeId,
    epoch: u64,
}

impl Cluster {
    async fn start(nodes: &[&str]) -> Cluster {
        Cluster::with(nodes, None).await
    }

    /// With its state in a directory.
    async fn stored(nodes: &[&str]) -> Cluster {
        Cluster::with(nodes, Some(tempfile::tempdir().unwrap())).await
    }

    async fn with(nodes: &[&str], state: Option<TempDir>) -> Cluster {
        let pki = tempfile::tempdir().unwrap();
        pki::create_authority(pki.path()).unwrap();
        pki::issue(pki.path(), &Peer::Coordinator, DEFAULT_VALIDITY).unwrap();
        for name in nodes {
            pki::issue(pki.path(), &Peer::node(name).unwrap(), DEFAULT_VALIDITY).unwrap();
        }
        let mut cluster = Cluster {
            pki,
            address: LOOPBACK,
            state,
            serving: tokio::spawn(async {}),
        };
        cluster.serve();
        cluster
    }

    fn serve(&mut self) {
        let identity = Identity::load(self.pki.path(), &Peer::Coordinator).unwrap();
        let endpoint = Endpoint::bind(self.address, &identity).unwrap();
        self.address = endpoint.local_address().unwrap();
        let (replica, store) = match &self.state {
            None => (Replica::of_new_cluster(), None),
            Some(state) => {
                let (directory, replica) =
                    Directory::open(state.path(), Durability::Process).unwrap();
                (replica, Some(Store::Directory(directory)))
            }
        };
        self.serving = tokio::spawn(async move {
            server::serve(endpoint, replica, Settings::default(), store)
                .await
                .unwrap();
        });
    }

    /// Ends the coordinator as it goes, and starts another on the same state. (At another address, as
    /// tasks of the former still have the socket.)
    async fn restart(&mut self) {
        self.serving.abort();
        let _ = (&mut self.serving).await;
        self.address = LOOPBACK;
        self.serve();
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
        link.sender
            .send_frame(opening(&join(name, version), 0).unwrap());
        link
    }

    /// A node that has been welcomed and has heard of its first members.
    async fn member(&self, name: &str) -> Node {
        let link = self.apply(name, VERSION).await;
        let mut node = Node {
            session: Session::default(),
            carrier: Carrier::new(link.sender, Cursor::default()),
            receiver: link.receiver,
            cluster: 0,
            slot: NodeId(0),
            epoch: 0,
        };
        match node.hear().await {
            FromCoordinator::Welcome {
                cluster,
                node: slot,
                epoch,
            } => (node.cluster, node.slot, node.epoch) = (cluster, slot, epoch),
            other => panic!("{other:?} instead of a welcome"),
        }
        assert!(node.members().await.contains(&name.to_owned()));
        node
    }

    /// The node goes on with its session on another link; gives why it may not.
    async fn resume(&self, node: &mut Node, name: &str) -> Result<(), String> {
        let mut link = self.connect(&Peer::node(name).unwrap()).await;
        let resume = ToCoordinator::Resume {
            version: VERSION,
            cluster: node.cluster,
            node: node.slot,
            epoch: node.epoch,
        };
        let received = node.session.mark().received;
        link.sender.send_frame(opening(&resume, received).unwrap());
        match hear(&mut link).await {
            (header, FromCoordinator::Resumed) => {
                let cursor = node.session.resume(header.received).unwrap();
                node.carrier = Carrier::new(link.sender, cursor);
                node.receiver = link.receiver;
                node.advance();
                Ok(())
            }
            (_, FromCoordinator::Refused { reason }) => Err(reason),
            (_, other) => panic!("{other:?} instead of a refusal"),
        }
    }
}

impl Node {
    fn say(&mut self, message: &ToCoordinator) {
        self.session.send(message, &[]).unwrap();
        self.advance();
    }

    fn advance(&mut self) {
        self.carrier.advance(&self.session, self.session.mark());
    }

    async fn hear(&mut self) -> FromCoordinator {
        loop {
            let frame = self.receiver.next().await.unwrap();
            let (header, rest) = frame.decode::<Header>().unwrap();
            if self.session.receive(header).unwrap() {
                return codec::decode(rest).unwrap().0;
            }
        }
    }

    async fn members(&mut self) -> Vec<String> {
        match self.hear().await {
            FromCoordinator::Members { members, .. } => {
                members.into_iter().map(|m| m.name).collect()
            }
            other => panic!("{other:?} instead of the members"),
        }
    }

    async fn newcomer(&mut self) -> String {
        match self.hear().await {
            FromCoordinator::Joined { member } => member.name,
            other => panic!("{other:?} instead of a member"),
        }
    }

    async fn answer(&mut self) -> i32 {
        match self.hear().await {
            FromCoordinator::Answer {
                outcome: Ok(Answer::Value(value)),
                ..
            } => value,
            other => panic!("{other:?} instead of an answer"),
        }
    }

    async fn loss(&mut self) -> String {
        self.receiver.next().await.unwrap_err().to_string()
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

async fn hear(link: &mut Link) -> (Header, FromCoordinator) {
    let frame = link.receiver.next().await.unwrap();
    let (header, rest) = frame.decode::<Header>().unwrap();
    (header, codec::decode(rest).unwrap().0)
}

async fn refusal(link: &mut Link) -> String {
    match hear(link).await {
        (_, FromCoordinator::Refused { reason }) => reason,
        (_, other) => panic!("{other:?} instead of a refusal"),
    }
}

fn caller() -> Caller {
    Caller {
        process: ProcessId(1),
        pid: 1,
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        capabilities: 0,
        memlock: None,
    }
}

/// A call that makes a set, each a new one.
fn semget(id: u64) -> ToCoordinator {
    let call = Call::SemGet {
        key: 0,
        count: 1,
        flags: 0o1666,
    };
    let caller = caller();
    ToCoordinator::Call { id, caller, call }
}

#[tokio::test]
async fn members_hear_of_each_other_and_their_calls_are_answered() {
    let cluster = Cluster::start(&["a", "b"]).await;
    let mut a = cluster.member("a").await;
    let mut b = cluster.member("b").await;
    assert_eq!(a.newcomer().await, "b");

    let mut ids = Vec::new();
    for node in [&mut a, &mut b] {
        node.say(&semget(1));
        ids.push(node.answer().await);
    }
    assert_ne!(ids[0], ids[1]);

    let slot = b.slot;
    b.carrier.sender().finish().await;
    assert!(matches!(a.hear().await, FromCoordinator::Left { node, .. } if node == slot));
}

#[tokio::test]
async fn another_major_version_is_refused_with_both_versions() {
    let cluster = Cluster::start(&["a"]).await;
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
    let cluster = Cluster::start(&["a", "b"]).await;
    for (peer, name, whose) in [
        (Peer::node("a").unwrap(), "b", "node a, not of node b"),
        (Peer::Coordinator, "a", "the coordinator"),
    ] {
        let mut link = cluster.connect(&peer).await;
        link.sender
            .send_frame(opening(&join(name, VERSION), 0).unwrap());
        let expected = format!("the certificate is that of {whose}");
        assert!(refusal(&mut link).await.starts_with(&expected));
    }
}

#[tokio::test]
async fn who_may_not_join_as_a_member_does_not_disturb_it() {
    let cluster = Cluster::start(&["a", "b"]).await;
    let mut b = cluster.member("b").await;
    let mut impostor = cluster.connect(&Peer::node("a").unwrap()).await;
    let join = opening(&join("b", VERSION), 0).unwrap();
    impostor.sender.send_frame(join);
    refusal(&mut impostor).await;
    let mut other_version = cluster.apply("b", Version { major: 9, minor: 1 }).await;
    refusal(&mut other_version).await;

    b.say(&semget(1));
    b.answer().await;
}

#[tokio::test]
async fn a_restarted_node_takes_the_place_of_its_former_link_at_once() {
    let cluster = Cluster::start(&["a"]).await;
    let mut old = cluster.member("a").await;
    let new = cluster.member("a").await;
    assert_eq!(new.slot, old.slot);
    assert!(new.epoch > old.epoch);
    let error = old.loss().await;
    assert!(
        error.ends_with("another link of the node took its place"),
        "{error}"
    );
    let refused = cluster.resume(&mut old, "a").await;
    assert_eq!(refused, Err("its membership has ended".to_owned()));
}

#[tokio::test]
async fn garbage_ends_its_own_link_only() {
    let cluster = Cluster::start(&["a", "b"]).await;
    let mut a = cluster.member("a").await;
    let mut b = cluster.member("b").await;
    assert_eq!(a.newcomer().await, "b");

    b.carrier.sender().send(&u64::MAX, &[0xff; 100]);
    let error = b.loss().await;
    assert!(
        error.starts_with("the peer closed the link: malformed message"),
        "{error}"
    );
    let slot = b.slot;
    assert!(matches!(a.hear().await, FromCoordinator::Left { node, .. } if node == slot));
    assert!(cluster.resume(&mut b, "b").await.is_err());

    let mut hasty = cluster.connect(&Peer::node("b").unwrap()).await;
    hasty.sender.send_frame(opening(&semget(1), 0).unwrap());
    assert_eq!(
        refusal(&mut hasty).await,
        "the first message must be a Join or a Resume"
    );

    a.say(&semget(1));
    a.answer().await;
}

#[tokio::test]
async fn a_node_goes_on_where_it_was_on_another_link() {
    let cluster = Cluster::start(&["a"]).await;
    let mut a = cluster.member("a").await;
    a.say(&semget(1));
    // The answer comes, if it does, on a link that nobody listens to any more.
    cluster.resume(&mut a, "a").await.unwrap();
    a.say(&semget(2));
    assert_eq!([a.answer().await, a.answer().await], [0, 1]);
}

#[tokio::test]
async fn a_node_goes_on_with_a_coordinator_that_was_started_again() {
    let mut cluster = Cluster::stored(&["a", "b"]).await;
    let mut a = cluster.member("a").await;
    let mut b = cluster.member("b").await;
    assert_eq!(a.newcomer().await, "b");
    // So a node's answers are the numbers of the sets that there were.
    let mut expected = 0;
    for round in 0..10 {
        for (node, name) in [(&mut a, "a"), (&mut b, "b")] {
            cluster.resume(node, name).await.unwrap();
            // One that is answered, and two of which only chance knows how far they come.
            node.say(&semget(10 * round + 1));
            assert_eq!(node.answer().await, expected);
            node.say(&semget(10 * round + 2));
            node.say(&semget(10 * round + 3));
            cluster.restart().await;
            cluster.resume(node, name).await.unwrap();
            assert_eq!(node.answer().await, expected + 1);
            assert_eq!(node.answer().await, expected + 2);
            expected += 3;
        }
    }
}

#[tokio::test]
async fn a_coordinator_that_lost_its_state_knows_no_node() {
    let mut cluster = Cluster::start(&["a"]).await;
    let mut a = cluster.member("a").await;
    cluster.restart().await;
    let newcomer = cluster.member("a").await;
    assert_eq!((newcomer.slot, newcomer.epoch), (a.slot, a.epoch));
    let refused = cluster.resume(&mut a, "a").await;
    assert_eq!(refused, Err("its membership has ended".to_owned()));
}
