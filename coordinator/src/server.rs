//! The coordinator's network side: links from node daemons in, messages to them out.
//!
//! Each link has a task; all of them share one [`Core`] under a lock that is never held while
//! waiting, so that everything happens in one order, and a call is answered by the task that
//! received it, without a hand-over.
//!
//! A link carries one membership: its first message is `Join`, its loss is the node's leave. A
//! node's certificate says which node it is, so a second link of a node is that node after a
//! restart: it takes the place of the first one, which may not have been noticed lost yet. What
//! a node sends can end its own link and nothing else.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use migshm_protocol::control::{FromCoordinator, ToCoordinator};
use migshm_protocol::{NodeId, VERSION, Version};
use migshm_transport::{Endpoint, FrameReceiver, FrameSender, Incoming, Link, Peer};
use rustc_hash::FxHashMap;

use crate::{Core, Output};

/// How long a node may take to say `Join`, and to take note of a refusal.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);

/// Serves nodes on `endpoint` until it is closed. Needs a tokio runtime; a single-threaded one
/// is the fastest.
pub async fn serve(endpoint: Endpoint, core: Core) {
    let server = Arc::new(Server(Mutex::new(State {
        core,
        links: FxHashMap::default(),
        out: Vec::new(),
    })));
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(Arc::clone(&server).attend(incoming));
    }
}

/// For how long after a node has said something its processes may operate on semaphore sets that
/// are delegated to it, and a little more.
const LEASE: Duration = Duration::from_millis(2_600);

struct Server(Mutex<State>);

struct State {
    core: Core,
    /// Members by slot.
    links: FxHashMap<NodeId, Member>,
    /// Kept for its allocation.
    out: Vec<Output>,
}

struct Member {
    name: String,
    epoch: u64,
    sender: FrameSender,
    /// When it last said something.
    heard: Instant,
}

/// What a `Join` asks for.
struct Application {
    version: Version,
    name: String,
    address: SocketAddr,
    memory: u64,
}

/// What a `Join` gives. The epoch tells it from another membership in the same slot.
#[derive(Clone, Copy)]
struct Membership {
    node: NodeId,
    epoch: u64,
}

impl Server {
    /// The life of one link.
    async fn attend(self: Arc<Self>, incoming: Incoming) {
        let address = incoming.address();
        let mut link = match incoming.link().await {
            Ok(link) => link,
            Err(error) => return tracing::warn!(%address, %error, "peer turned away"),
        };
        let application =
            tokio::time::timeout(HANDSHAKE_TIMEOUT, application(&mut link.receiver)).await;
        let application = match application.unwrap_or_else(|_| Err("it does not join".to_owned())) {
            Ok(application) => application,
            Err(reason) => {
                tracing::warn!(%address, peer = %link.peer, reason, "link closed");
                return link.sender.close(&reason);
            }
        };
        self.outlast(&application.name).await;
        match self.join(application, &link) {
            Ok(membership) => {
                let name = link.peer.file_stem();
                tracing::info!(node = %membership.node, name, %address, epoch = membership.epoch, "joined");
                let reason = self.listen(membership, &mut link.receiver).await;
                tracing::info!(node = %membership.node, name, %address, epoch = membership.epoch, reason, "left");
                link.sender.close(&reason);
                if self.lock().is_current(membership) {
                    self.outlast(link.peer.file_stem()).await;
                }
                self.leave(membership);
            }
            Err(reason) => {
                tracing::warn!(%address, peer = %link.peer, reason, "refused");
                link.sender.send(&FromCoordinator::Refused { reason }, &[]);
                let _ = tokio::time::timeout(HANDSHAKE_TIMEOUT, link.sender.finish()).await;
            }
        }
    }

    fn join(&self, application: Application, link: &Link) -> Result<Membership, String> {
        let Application {
            version,
            name,
            address,
            memory,
        } = application;
        if !VERSION.accepts(version) {
            return Err(format!(
                "the coordinator speaks version {VERSION}, the node {version}"
            ));
        }
        if link.peer != Peer::Node(name.clone()) {
            return Err(format!(
                "the certificate is that of {}, not of node {name}",
                link.peer
            ));
        }
        let mut state = self.lock();
        state.supersede(&name);
        let State { core, links, out } = &mut *state;
        let (node, epoch) = core
            .join(name.clone(), address, memory, out)
            .map_err(|e| e.to_string())?;
        link.sender
            .send(&FromCoordinator::Welcome { node, epoch }, &[]);
        links.insert(
            node,
            Member {
                name,
                epoch,
                sender: link.sender.clone(),
                heard: Instant::now(),
            },
        );
        state.flush();
        Ok(Membership { node, epoch })
    }

    /// Feeds a member's messages to the core until the link is lost; returns why.
    async fn listen(&self, membership: Membership, receiver: &mut FrameReceiver) -> String {
        loop {
            let frame = match receiver.next().await {
                Ok(frame) => frame,
                Err(error) => return error.to_string(),
            };
            let (message, raw) = match frame.decode() {
                Ok(decoded) => decoded,
                Err(error) => return error.to_string(),
            };
            let mut state = self.lock();
            if !state.is_current(membership) {
                return "another link of the node took its place".to_owned();
            }
            let State { core, out, links } = &mut *state;
            if let Some(member) = links.get_mut(&membership.node) {
                member.heard = Instant::now();
            }
            core.handle(now(), membership.node, message, raw, out);
            state.flush();
            state.part_condemned();
        }
    }

    /// Ends the link of the member with this name, if there is one, and waits until its processes
    /// no longer operate on semaphore sets that are delegated to it: they may live on without it.
    async fn outlast(&self, name: &str) {
        let lease_ends = self.lock().end_link(name);
        if let Some(time) = lease_ends {
            tokio::time::sleep_until(time.into()).await;
        }
    }

    fn leave(&self, membership: Membership) {
        let mut state = self.lock();
        if state.is_current(membership) {
            state.expel(membership.node);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in the core leaves it in no known state: nobody may go on with it.
        self.0.lock().expect("the core is intact")
    }
}

impl State {
    fn is_current(&self, Membership { node, epoch }: Membership) -> bool {
        self.links
            .get(&node)
            .is_some_and(|member| member.epoch == epoch)
    }

    fn named(&self, name: &str) -> Option<(NodeId, &Member)> {
        let mut members = self.links.iter();
        let found = members.find(|(_, member)| member.name == name);
        found.map(|(node, member)| (*node, member))
    }

    /// Ends the link of a member that is gone or has come back. If semaphore sets are delegated to
    /// it, gives the time until which its processes may operate on them.
    fn end_link(&mut self, name: &str) -> Option<Instant> {
        let (node, member) = self.named(name)?;
        member
            .sender
            .close("another link of the node took its place");
        let delegated = !self.core.delegated_to(node).is_empty();
        delegated.then(|| member.heard + LEASE)
    }

    /// Ends the links of members that have to go; their memberships end with them.
    fn part_condemned(&self) {
        let silence = |node: NodeId| {
            let member = self.links.get(&node);
            let silence = member.map_or(Duration::ZERO, |member| member.heard.elapsed());
            u64::try_from(silence.as_millis()).unwrap_or(u64::MAX)
        };
        if let Some(member) = self
            .core
            .condemned(silence)
            .and_then(|node| self.links.get(&node))
        {
            member.sender.close("another member cannot reach it");
        }
    }

    /// Ends the membership of a node that has come back.
    fn supersede(&mut self, name: &str) {
        if let Some((node, _)) = self.named(name) {
            self.expel(node);
        }
    }

    fn expel(&mut self, node: NodeId) {
        self.links.remove(&node);
        for set in self.core.delegated_to(node) {
            tracing::warn!(%node, set, "the node has left with a semaphore set that was delegated to it: what its processes did to the set since is lost");
        }
        self.core.leave(now(), node, &mut self.out);
        self.flush();
    }

    /// Sends what the core has to say.
    fn flush(&mut self) {
        for Output { to, message, raw } in self.out.drain(..) {
            if let Some(member) = self.links.get(&to) {
                member.sender.send(&message, &raw);
            }
        }
    }
}

/// A link's first message, which has to be `Join`.
async fn application(receiver: &mut FrameReceiver) -> Result<Application, String> {
    let frame = receiver.next().await.map_err(|error| error.to_string())?;
    match frame.decode() {
        Ok((
            ToCoordinator::Join {
                version,
                name,
                address,
                memory,
            },
            _,
        )) => Ok(Application {
            version,
            name,
            address,
            memory,
        }),
        Ok(_) => Err("the first message must be a Join".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Seconds since the epoch.
fn now() -> i64 {
    let elapsed = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(elapsed.as_secs()).unwrap_or(i64::MAX)
}
