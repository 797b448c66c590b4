//! The coordinator's network side: links from node daemons in, messages to them out.
//!
//! Each link has a task; all of them share one [`Replica`] under a lock that is never held while
//! waiting, so that everything happens in one order, and a call is answered by the task that
//! received it, without a hand-over.
//!
//! A membership is a session, which outlives links: one is opened by `Join`, the next by `Resume`. It
//! ends when the node says so, breaks the rules, joins anew, or is silent for too long. A node's
//! certificate says which node it is, so a second link of a node is that node after a restart: it takes
//! the place of the first one, which may not have been noticed lost yet. What a node sends can end its
//! own membership and nothing else.
//!
//! What follows from what happens is sent by one task, for all that was there to be handled. With a
//! [`Store`] that stores it before, together with all that has come while the last commit was made.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use migshm_protocol::codec;
use migshm_protocol::control::{FromCoordinator, ToCoordinator};
use migshm_protocol::session::{Cursor, Header, MAX_BACKLOG, Mark, opening};
use migshm_protocol::{NodeId, VERSION, Version};
use migshm_transport::{
    Carrier, Endpoint, FrameReceiver, FrameSender, Incoming, Link, LinkError, Peer,
};
use rustc_hash::FxHashMap;
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::JoinSet;

use crate::Settings;
use crate::replica::{self, Input, Record, Rejected, Replica};
use crate::store::{Contents, Store, StoreError};

/// How long a node may take to open its link, and to take note of a refusal.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(3);
/// For how long after a node has said something its processes may use shared pages, and operate on
/// semaphore sets that are delegated to it (2.5 s), and what it may take to stop them.
const LEASE: Duration = Duration::from_secs(3);
/// How long a node has to come back whose link was lost, but not to silence.
const RETURN: Duration = Duration::from_secs(1);
/// How long all nodes have to come back to a coordinator that was away: they notice that after 3 s of
/// silence, and then try every second.
const GRACE: Duration = Duration::from_secs(10);
/// How often this process looks whether it was held up itself.
const HEARTBEAT: Duration = Duration::from_millis(250);
/// For longer than this it was away.
const HELD_UP: Duration = Duration::from_secs(1);
/// Bytes of records that are stored before a snapshot takes their place: so many, or twice as many as
/// the last snapshot has.
const SNAPSHOT_AFTER: usize = 4 << 20;

/// Serves nodes on `endpoint` until it is closed, going on with what `replica` was; `settings` are for
/// what is made from now on. Needs a tokio runtime; a single-threaded one is the fastest.
///
/// # Errors
/// The state cannot be stored. Nothing was said that is not.
pub async fn serve(
    endpoint: Endpoint,
    replica: Replica,
    settings: Settings,
    store: Option<Store>,
) -> Result<(), StoreError> {
    let server = Arc::new(Server {
        state: Mutex::new(State::new(replica, store.is_some())),
        changed: Notify::new(),
    });
    server.configure(settings);
    let returning: Vec<Membership> = server.lock().memberships();
    for membership in returning {
        tokio::spawn(Arc::clone(&server).await_return(membership, 0));
    }
    let watch = Arc::clone(&server);
    // A task of its own: before the outermost one has its turn, the runtime looks at all descriptors.
    let mut keeper = JoinSet::new();
    keeper.spawn(Arc::clone(&server).keep(store));
    tokio::select! {
        () = accept(&endpoint, &server) => Ok(()),
        () = watch.watch_itself() => unreachable!("for ever"),
        failed = keeper.join_next() => {
            Err(failed.expect("one task").expect("a store does not panic"))
        }
    }
}

async fn accept(endpoint: &Endpoint, server: &Arc<Server>) {
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(Arc::clone(server).attend(incoming));
    }
}

/// Tells whoever comes to `endpoint`, until it is closed, that this coordinator does not lead, and who does.
pub async fn stand_by(endpoint: &Endpoint, leader: &watch::Receiver<Option<String>>) {
    while let Some(incoming) = endpoint.accept().await {
        let leader = leader.clone();
        tokio::spawn(async move {
            if let Ok(link) = incoming.link().await {
                let leader = leader.borrow().clone();
                let reason = leader.map_or("nobody leads".to_owned(), |l| format!("{l} leads"));
                link.sender.stand_by(&reason);
            }
        });
    }
}

struct Server {
    state: Mutex<State>,
    /// There is something to store, or to say.
    changed: Notify,
}

struct State {
    replica: Replica,
    /// By slot.
    members: FxHashMap<NodeId, Member>,
    /// Records that are not stored; `None` if none ever are.
    records: Option<Vec<Vec<u8>>>,
    /// Who is told when all that has happened so far is stored.
    confirm: Vec<oneshot::Sender<()>>,
    /// Bytes of records that were stored since the last snapshot, and after which the next is due.
    logged: usize,
    snapshot_after: usize,
    /// Links that have carried sessions.
    links: u64,
    /// When this process last had its turn, and until when nodes need not have come back as it was away.
    awake: Instant,
    lenient_until: Instant,
}

struct Member {
    name: String,
    epoch: u64,
    link: Option<Carrier>,
    /// Of the link, or the last one; 0 before the first.
    number: u64,
    /// How far its session is stored.
    stored: Mark,
    /// When it last said something.
    heard: Instant,
    /// It may not come back.
    leaves: bool,
}

/// How a link is opened.
struct Opening {
    message: ToCoordinator,
    /// Number of the last message of a session that the node has.
    received: u64,
}

/// The epoch tells it from another membership in the same slot.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Membership {
    node: NodeId,
    epoch: u64,
}

/// What is stored at once, and what may be said then.
struct Batch {
    contents: Contents,
    marks: Vec<(Membership, Mark)>,
    confirmed: Vec<oneshot::Sender<()>>,
}

/// How a link ended.
enum Ending {
    /// The node is gone, or has no place here.
    Final(String),
    /// It may come back, unless it has said that it will not ([`LinkError::Ended`]).
    Lost(LinkError),
}

impl Server {
    fn configure(&self, settings: Settings) {
        let mut state = self.lock();
        if *state.replica.settings() != settings {
            let configured = state.apply(Input::Configure { settings }, &[]);
            configured.expect("any settings will do");
            self.changed.notify_one();
        }
    }

    /// The life of one link.
    async fn attend(self: Arc<Self>, incoming: Incoming) {
        let address = incoming.address();
        let mut link = match incoming.link().await {
            Ok(link) => link,
            Err(error) => return tracing::warn!(%address, %error, "peer turned away"),
        };
        let first = tokio::time::timeout(HANDSHAKE_TIMEOUT, first_frame(&mut link.receiver)).await;
        let Opening { message, received } =
            match first.unwrap_or_else(|_| Err("it does not join".to_owned())) {
                Ok(opening) => opening,
                Err(reason) => {
                    tracing::warn!(%address, peer = %link.peer, reason, "link closed");
                    return link.sender.close(&reason);
                }
            };
        let begun = match message {
            ToCoordinator::Join {
                version,
                name,
                address,
                memory,
            } => self.join(version, name, address, memory, &link).await,
            ToCoordinator::Resume {
                version,
                cluster,
                node,
                epoch,
            } => {
                let membership = Membership { node, epoch };
                self.resume(version, cluster, membership, received, &link)
                    .await
            }
            _ => Err("the first message must be a Join or a Resume".to_owned()),
        };
        let name = link.peer.file_stem();
        match begun {
            Ok((membership, number)) => {
                let Membership { node, epoch } = membership;
                match self.listen(membership, number, &mut link.receiver).await {
                    Ending::Final(reason) => {
                        tracing::info!(%node, name, %address, epoch, reason, "has to leave");
                        link.sender.close(&reason);
                        self.part(membership, number, Ending::Final(reason)).await;
                    }
                    Ending::Lost(error) => {
                        tracing::info!(%node, name, %address, epoch, %error, "link lost");
                        self.part(membership, number, Ending::Lost(error)).await;
                    }
                }
            }
            Err(reason) => {
                tracing::warn!(%address, peer = %link.peer, reason, "refused");
                // It is final, so what it follows from must be stored.
                if let Err(ends) = self.confirm().await {
                    return link.sender.close(&ends);
                }
                if let Ok(refusal) = opening(&FromCoordinator::Refused { reason }, 0) {
                    link.sender.send_frame(refusal);
                }
                let _ = tokio::time::timeout(HANDSHAKE_TIMEOUT, link.sender.finish()).await;
            }
        }
    }

    /// A node becomes a member; gives the membership and the link's number.
    async fn join(
        &self,
        version: Version,
        name: String,
        address: SocketAddr,
        memory: u64,
        link: &Link,
    ) -> Result<(Membership, u64), String> {
        check_version(version)?;
        if link.peer != Peer::Node(name.clone()) {
            return Err(format!(
                "the certificate is that of {}, not of node {name}",
                link.peer
            ));
        }
        self.outlast(&name).await;
        let mut state = self.lock();
        state.supersede(&name);
        let join = Input::Join {
            name: name.clone(),
            address,
            memory,
        };
        state.apply(join, &[]).map_err(|error| error.to_string())?;
        let mut memberships = state.memberships().into_iter();
        let membership = memberships
            .find(|m| state.name(*m) == Some(&name))
            .expect("it has just joined");
        let Membership { node, epoch } = membership;
        let member = Member {
            name,
            epoch,
            link: None,
            number: 0,
            stored: Mark::default(),
            heard: Instant::now(),
            leaves: false,
        };
        state.members.insert(node, member);
        let number = state.connect(node, &link.sender, Cursor::default());
        tracing::info!(%node, name = link.peer.file_stem(), %address, epoch, "joined");
        self.changed.notify_one();
        Ok((membership, number))
    }

    /// A member comes back on another link.
    async fn resume(
        &self,
        version: Version,
        cluster: u64,
        membership: Membership,
        received: u64,
        link: &Link,
    ) -> Result<(Membership, u64), String> {
        check_version(version)?;
        // Another coordinator may have taken the session over, and know more of it.
        self.confirm().await?;
        let mut state = self.lock();
        let Membership { node, epoch } = membership;
        let is_own = |name: &String| link.peer == Peer::Node(name.clone());
        if state.replica.cluster() != cluster || !state.name(membership).is_some_and(is_own) {
            return Err(ENDED.to_owned());
        }
        let stored = match state.members.get(&node) {
            Some(member) if !member.leaves => member.stored,
            _ => return Err(ENDED.to_owned()),
        };
        let session = state.replica.session(node).ok_or(ENDED)?;
        let cursor = session
            .resume(received)
            .map_err(|error| error.to_string())?;
        let resumed = opening(&FromCoordinator::Resumed, stored.received);
        link.sender
            .send_frame(resumed.map_err(|error| error.to_string())?);
        let number = state.connect(node, &link.sender, cursor);
        tracing::info!(%node, name = link.peer.file_stem(), epoch, "came back");
        state.say(node, stored);
        Ok((membership, number))
    }

    /// Feeds a member's messages to the core until the link is lost.
    async fn listen(
        &self,
        membership: Membership,
        number: u64,
        receiver: &mut FrameReceiver,
    ) -> Ending {
        loop {
            let frame = match receiver.next().await {
                Ok(frame) => frame,
                Err(error @ LinkError::Violation(_)) => {
                    return Ending::Final(error.to_string());
                }
                Err(error) => return Ending::Lost(error),
            };
            let mut state = self.lock();
            if !state.is_current(membership, number) {
                return Ending::Final(TAKEN.to_owned());
            }
            let node = membership.node;
            if let Err(error) = state.apply(Input::Frame { node }, frame.bytes()) {
                return Ending::Final(error.to_string());
            }
            if let Some(member) = state.members.get_mut(&node) {
                member.heard = Instant::now();
            }
            self.changed.notify_one();
            if state.is_beyond_bounds(node) {
                return Ending::Final("it does not say what it has received".to_owned());
            }
            state.part_condemned();
        }
    }

    /// A link has ended; its node leaves with it, unless it comes back where it may.
    async fn part(&self, membership: Membership, number: u64, ending: Ending) {
        let since = Instant::now();
        let mut confirmed = false;
        loop {
            let until = match self.lock().leaves_at(membership, number, since, &ending) {
                Some(time) => time,
                None => return,
            };
            if until > Instant::now() {
                tokio::time::sleep_until(until.into()).await;
            } else if confirmed {
                break;
            } else if self.confirm().await.is_err() {
                return;
            } else {
                // It may have waited for that too.
                confirmed = true;
            }
        }
        let mut state = self.lock();
        if state.is_current(membership, number) {
            state.expel(membership.node);
            self.changed.notify_one();
        }
    }

    /// A member that a coordinator before this one had.
    async fn await_return(self: Arc<Self>, membership: Membership, number: u64) {
        self.part(membership, number, Ending::Lost(LinkError::Silent))
            .await;
    }

    /// Ends the link of the member with this name, if there is one, and waits until its processes
    /// no longer operate on semaphore sets that are delegated to it: they may live on without it.
    async fn outlast(&self, name: &str) {
        let lease_ends = self.lock().end_link(name);
        if let Some(time) = lease_ends {
            tokio::time::sleep_until(time.into()).await;
        }
    }

    /// Notes when this process was away, for ever.
    async fn watch_itself(&self) {
        loop {
            self.lock().note_awake();
            tokio::time::sleep(HEARTBEAT).await;
        }
    }

    /// Stores what happens, and has it said then, until that fails.
    async fn keep(self: Arc<Self>, mut store: Option<Store>) -> StoreError {
        loop {
            self.changed.notified().await;
            let Some(batch) = self.lock().take_batch() else {
                continue;
            };
            let begun = Instant::now();
            if let Some(used) = store {
                store = match used.commit(batch.contents).await {
                    Ok(store) => Some(store),
                    Err(error) => return error,
                };
            }
            let mut state = self.lock();
            if begun.elapsed() > HELD_UP {
                tracing::warn!(took = ?begun.elapsed(), "storing was held up; waiting for nodes");
                state.lenient_until = Instant::now() + GRACE;
            }
            state.note_stored(batch.marks);
            drop(state);
            for confirmed in batch.confirmed {
                // Whoever waited may be gone.
                let _ = confirmed.send(());
            }
        }
    }

    /// Waits until all that has happened is stored, so that this coordinator is still the one that decides.
    async fn confirm(&self) -> Result<(), String> {
        let confirmed = {
            let mut state = self.lock();
            if state.records.is_none() {
                return Ok(());
            }
            let (confirm, confirmed) = oneshot::channel();
            state.confirm.push(confirm);
            confirmed
        };
        self.changed.notify_one();
        confirmed.await.map_err(|_| ENDS.to_owned())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in the core leaves it in no known state: nobody may go on with it.
        self.state.lock().expect("the core is intact")
    }
}

impl State {
    /// What goes on with what `replica` was.
    fn new(replica: Replica, is_stored: bool) -> State {
        let now = Instant::now();
        let member = |member: &replica::Member| Member {
            name: member.name.clone(),
            epoch: member.epoch,
            link: None,
            number: 0,
            stored: member.session.mark(),
            heard: now,
            leaves: false,
        };
        let members = replica.members().map(|(node, m)| (node, member(m)));
        let members: FxHashMap<_, _> = members.collect();
        State {
            lenient_until: if members.is_empty() { now } else { now + GRACE },
            members,
            replica,
            records: is_stored.then(Vec::new),
            confirm: Vec::new(),
            logged: 0,
            snapshot_after: SNAPSHOT_AFTER,
            links: 0,
            awake: now,
        }
    }

    /// Something happens.
    fn apply(&mut self, input: Input, frame: &[u8]) -> Result<(), Rejected> {
        let now = now();
        let record = Record { now, input };
        if self.replica.apply(&record, frame)?
            && let Some(records) = &mut self.records
        {
            records.push(record.encode(frame));
        }
        Ok(())
    }

    /// What is to be stored, and what may be said when it is.
    fn take_batch(&mut self) -> Option<Batch> {
        let records = self.records.as_mut().map(std::mem::take);
        let mut news: Vec<NodeId> = self.replica.news().collect();
        news.sort_unstable();
        news.dedup();
        let mark = |node| {
            let member = self.replica.member(node)?;
            let epoch = member.epoch;
            Some((Membership { node, epoch }, member.session.mark()))
        };
        let marks: Vec<_> = news.into_iter().filter_map(mark).collect();
        let records = records.unwrap_or_default();
        let confirmed = std::mem::take(&mut self.confirm);
        if records.is_empty() && marks.is_empty() && confirmed.is_empty() {
            return None;
        }
        self.logged += records.iter().map(Vec::len).sum::<usize>();
        let contents = if self.logged < self.snapshot_after {
            Contents::Records(records)
        } else {
            let snapshot = self.replica.snapshot();
            self.logged = 0;
            self.snapshot_after = SNAPSHOT_AFTER.max(2 * snapshot.len());
            Contents::Snapshot(snapshot)
        };
        Some(Batch {
            contents,
            marks,
            confirmed,
        })
    }

    /// So far all is stored: it may be said.
    fn note_stored(&mut self, marks: Vec<(Membership, Mark)>) {
        for (Membership { node, epoch }, mark) in marks {
            if let Some(member) = self.members.get_mut(&node)
                && member.epoch == epoch
            {
                member.stored = mark;
                self.say(node, mark);
            }
        }
    }

    /// Sends a member what it has not been sent up to a mark.
    fn say(&mut self, node: NodeId, mark: Mark) {
        if let (Some(link), Some(member)) = (
            self.members.get_mut(&node).and_then(|m| m.link.as_mut()),
            self.replica.member(node),
        ) {
            link.advance(&member.session, mark);
        }
    }

    /// A link carries a member's session from now on, in place of the one before; gives its number.
    fn connect(&mut self, node: NodeId, sender: &FrameSender, cursor: Cursor) -> u64 {
        self.links += 1;
        if let Some(member) = self.members.get_mut(&node) {
            if let Some(former) = member.link.replace(Carrier::new(sender.clone(), cursor)) {
                former.sender().close(TAKEN);
            }
            member.number = self.links;
            member.heard = Instant::now();
        }
        self.links
    }

    fn memberships(&self) -> Vec<Membership> {
        let epoch = |(node, m): (NodeId, &replica::Member)| Membership {
            node,
            epoch: m.epoch,
        };
        self.replica.members().map(epoch).collect()
    }

    /// The name of a member, if it is one.
    fn name(&self, Membership { node, epoch }: Membership) -> Option<&String> {
        let member = self.replica.member(node)?;
        (member.epoch == epoch).then_some(&member.name)
    }

    fn is_current(&self, Membership { node, epoch }: Membership, number: u64) -> bool {
        let member = self.members.get(&node);
        member.is_some_and(|member| (member.epoch, member.number) == (epoch, number))
    }

    /// Whether a member has more kept for it than it may.
    fn is_beyond_bounds(&self, node: NodeId) -> bool {
        let member = self.replica.member(node);
        member.is_some_and(|member| member.session.backlog() > MAX_BACKLOG)
    }

    /// When a member whose link ended at `since` is one no longer; `None` if it has another link by
    /// now, or has left.
    fn leaves_at(
        &mut self,
        membership: Membership,
        number: u64,
        since: Instant,
        ending: &Ending,
    ) -> Option<Instant> {
        if !self.is_current(membership, number) {
            return None;
        }
        self.note_awake();
        let node = membership.node;
        let member = self.members.get_mut(&node)?;
        member.link = None;
        member.leaves |= matches!(ending, Ending::Final(_) | Ending::Lost(LinkError::Ended));
        let until = match ending {
            // It said that it has nothing more to say.
            Ending::Lost(LinkError::Ended) if self.replica.delegated_to(node).is_empty() => {
                return Some(since);
            }
            Ending::Final(_) | Ending::Lost(LinkError::Ended) => since,
            // It has had its time.
            Ending::Lost(LinkError::Silent) => since.max(self.lenient_until),
            Ending::Lost(_) => (since + RETURN).max(self.lenient_until),
        };
        // It may be well, and the others must not go on while its processes do.
        Some(until.max(member.heard + LEASE))
    }

    /// This process has its turn. If it has not had it for long, others may think that it is gone.
    fn note_awake(&mut self) {
        let now = Instant::now();
        let away = now - self.awake;
        if away > HELD_UP {
            tracing::warn!(?away, "this coordinator was held up; waiting for its nodes");
            self.lenient_until = now + GRACE;
        }
        self.awake = now;
    }

    fn named(&self, name: &str) -> Option<NodeId> {
        let mut members = self.members.iter();
        let found = members.find(|(_, member)| member.name == name);
        found.map(|(node, _)| *node)
    }

    /// Ends the link of a member that has come back as another. If semaphore sets are delegated to
    /// it, gives the time until which its processes may operate on them.
    fn end_link(&mut self, name: &str) -> Option<Instant> {
        let node = self.named(name)?;
        let member = self.members.get_mut(&node)?;
        if let Some(link) = member.link.take() {
            link.sender().close(TAKEN);
        }
        let delegated = !self.replica.delegated_to(node).is_empty();
        delegated.then(|| member.heard + LEASE)
    }

    /// Ends the links of members that have to go; their memberships end with them.
    fn part_condemned(&mut self) {
        let silence = |node: NodeId| {
            let member = self.members.get(&node);
            let silence = member.map_or(Duration::ZERO, |member| member.heard.elapsed());
            u64::try_from(silence.as_millis()).unwrap_or(u64::MAX)
        };
        let condemned = self.replica.condemned(silence);
        if let Some(member) = condemned.and_then(|node| self.members.get_mut(&node)) {
            member.leaves = true;
            if let Some(link) = &member.link {
                link.sender().close("another member cannot reach it");
            }
        }
    }

    /// Ends the membership of a node that has come back as another.
    fn supersede(&mut self, name: &str) {
        if let Some(node) = self.named(name) {
            self.expel(node);
        }
    }

    fn expel(&mut self, node: NodeId) {
        if let Some(Member { name, link, .. }) = self.members.remove(&node) {
            tracing::info!(%node, name, "left");
            if let Some(link) = link {
                link.sender().close(ENDED);
            }
        }
        for set in self.replica.delegated_to(node) {
            tracing::warn!(%node, set, "the node has left with a semaphore set that was delegated to it: what its processes did to the set since is lost");
        }
        if let Err(error) = self.apply(Input::Leave { node }, &[]) {
            tracing::error!(%node, %error, "a member cannot leave");
        }
    }
}

const ENDED: &str = "its membership has ended";
const ENDS: &str = "the coordinator ends";
const TAKEN: &str = "another link of the node took its place";

fn check_version(version: Version) -> Result<(), String> {
    match VERSION.accepts(version) {
        true => Ok(()),
        false => Err(format!(
            "the coordinator speaks version {VERSION}, the node {version}"
        )),
    }
}

/// A link's first message.
async fn first_frame(receiver: &mut FrameReceiver) -> Result<Opening, String> {
    let frame = receiver.next().await.map_err(|error| error.to_string())?;
    let (Header { received, .. }, rest) = frame.decode().map_err(|error| error.to_string())?;
    let (message, _) = codec::decode(rest).map_err(|error| error.to_string())?;
    Ok(Opening { message, received })
}

/// Seconds since the epoch.
fn now() -> i64 {
    let elapsed = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(elapsed.as_secs()).unwrap_or(i64::MAX)
}
