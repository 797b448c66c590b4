//! What the daemon waits for: one task each, all on the daemon's thread. A task never holds the
//! node across a wait.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use migshm_protocol::codec::CodecError;
use migshm_protocol::control::Member;
use migshm_protocol::page::{PeerHello, PeerMessage};
use migshm_protocol::polling::Polling;
use migshm_protocol::{NodeId, VERSION};
use migshm_transport::{Endpoint, FrameReceiver, FrameSender, Incoming, Link, LinkError, Peer};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::{AbortHandle, spawn_local};

use crate::daemon::{ConnectionId, Node, Shared};
use crate::exits::Exits;
use crate::local::Socket;
use crate::memory::SpaceId;
use crate::pages::now;
use crate::uffd::Uffd;

/// How often address spaces that the kernel does not report the end of are looked at.
const PROBE_INTERVAL: Duration = Duration::from_millis(50);
/// How often the lease on delegated semaphore sets is extended.
const LEASE_INTERVAL: Duration = Duration::from_millis(500);
/// For how long the daemon stays awake for the next message of a process that has just called, if
/// such have come of late: what a wake-up of a processor would take.
const POLLED: Duration = Duration::from_micros(20);
/// Messages of one process after which others have a turn.
const FAIR_SHARE: u64 = 16;
/// Between attempts to reach a member that does not answer.
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);

/// Whether an error on a nonblocking descriptor means "later".
fn is_later(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

/// Tells when a descriptor is readable. (Were it also asked when it is writable, every packet that
/// a process reads would wake the daemon.)
///
/// # Errors
/// Those of `epoll_ctl(2)`.
pub fn watch<T: OwnsDescriptor>(descriptor: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: an `OwnsDescriptor` keeps one descriptor open, and the same, for as long as it lives.
    unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) }
        .map_err(io::Error::from)
}

/// What owns one descriptor from its making to its end.
pub trait OwnsDescriptor: AsRawFd {}
impl OwnsDescriptor for OwnedFd {}
impl OwnsDescriptor for Socket {}
impl OwnsDescriptor for Rc<Exits> {}
impl OwnsDescriptor for Rc<Uffd> {}

/// Accepts local processes, for ever.
pub async fn accept_local(node: Shared, listener: Rc<AsyncFd<Socket>>) -> io::Result<()> {
    loop {
        // One at a time: a crowd that connects and leaves must not keep the others waiting.
        tokio::task::yield_now().await;
        let mut ready = listener.readable().await?;
        match listener.get_ref().accept() {
            Ok(socket) => {
                let id = ConnectionId(node.borrow_mut().next_id());
                let user = socket.user()?;
                if !node.borrow().has_room_for(user) {
                    tracing::warn!(user, "refused a connection: few descriptors are left");
                    continue;
                }
                let Ok(socket) = watch(socket).map(Rc::new) else {
                    tracing::error!("cannot watch a connection");
                    continue;
                };
                let task = serve(&node, id, &socket);
                node.borrow_mut().on_connect(id, user, socket, task);
            }
            Err(error) if is_later(&error) => ready.clear_ready(),
            Err(error) => {
                // Out of descriptors, say: those who wait are served when some are free again.
                tracing::error!(%error, "cannot accept a process");
                tokio::time::sleep(RECONNECT_PAUSE).await;
            }
        }
    }
}

/// Serves a connection until it ends.
pub fn serve(node: &Shared, id: ConnectionId, socket: &Rc<AsyncFd<Socket>>) -> AbortHandle {
    spawn_local(serve_connection(Rc::clone(node), id, Rc::clone(socket))).abort_handle()
}

async fn serve_connection(node: Shared, id: ConnectionId, socket: Rc<AsyncFd<Socket>>) {
    // Whether it is worth while to stay awake for the process's next message.
    let mut polling = Polling::default();
    let mut has_called = false;
    for turn in 1u64.. {
        if turn.is_multiple_of(FAIR_SHARE) {
            tokio::task::yield_now().await;
        }
        let Ok(mut ready) = socket.readable().await else {
            break;
        };
        let result = node.borrow_mut().on_readable(id);
        match result {
            Ok(()) => has_called = true,
            Err(error) if is_later(&error) => {
                ready.clear_ready();
                if std::mem::take(&mut has_called) && polling.is_due() {
                    polling.note(poll_readable(&socket).await);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => {
                tracing::debug!(%error, "closing a process's connection");
                break;
            }
        }
    }
    node.borrow_mut().on_disconnect(id);
}

/// Looks for a message for a while without sleeping; whether one came. Everything else goes on.
async fn poll_readable(socket: &AsyncFd<Socket>) -> bool {
    let start = Instant::now();
    let mut readable = pin!(socket.readable());
    loop {
        let is_readable = poll_fn(|cx| Poll::Ready(readable.as_mut().poll(cx).is_ready())).await;
        if is_readable || start.elapsed() > POLLED {
            return is_readable;
        }
        tokio::task::yield_now().await;
    }
}

/// Watches an address space's userfaultfd, if it has one.
pub fn watch_space(node: &Node, space: SpaceId) -> Option<AbortHandle> {
    let uffd = node.memory.spaces.uffd(space)?;
    let node = Weak::clone(&node.this);
    let task = spawn_local(async move {
        let watched =
            watch(uffd).inspect_err(|error| tracing::error!(%error, "cannot watch a userfaultfd"));
        let Ok(watched) = watched else { return };
        while let Ok(mut ready) = watched.readable().await {
            // Cleared first: an event that comes while these are read makes it ready again.
            ready.clear_ready();
            let Some(node) = node.upgrade() else { return };
            let mut node = node.borrow_mut();
            node.memory.spaces.collect(space);
            node.settle();
        }
    });
    Some(task.abort_handle())
}

/// Keeps the daemon from sleeping while news is expected, for ever.
pub async fn look_for_news(node: Shared) {
    let begun = Rc::clone(&node.borrow().spin.begun);
    loop {
        begun.notified().await;
        while node.borrow_mut().spin.is_worthwhile(now()) {
            // All descriptors are looked at before this task has its next turn.
            tokio::task::yield_now().await;
        }
    }
}

/// Notices the ends of processes, for ever.
pub async fn watch_exits(node: Shared) -> io::Result<()> {
    let exits = watch(Rc::clone(&node.borrow().exits))?;
    loop {
        // Cleared first: an end that comes while these are handled makes it ready again.
        exits.readable().await?.clear_ready();
        node.borrow_mut().reap();
    }
}

/// Looks after address spaces whose end nothing reports, for ever.
pub async fn probe(node: Shared) {
    let appeared = Rc::clone(&node.borrow().quiet_space);
    loop {
        if !node.borrow().has_quiet_spaces() {
            appeared.notified().await;
        }
        tokio::time::sleep(PROBE_INTERVAL).await;
        node.borrow_mut().probe();
    }
}

/// Extends the lease on pages and delegated semaphore sets while there is a coordinator, for ever.
pub async fn keep_lease(node: Shared) {
    let delegated = Rc::clone(&node.borrow().delegated);
    loop {
        if !node.borrow_mut().extend_lease() {
            delegated.notified().await;
        }
        tokio::time::sleep(LEASE_INTERVAL).await;
    }
}

/// A timer with the kernel's resolution (tokio's has a millisecond).
pub struct Timer(AsyncFd<OwnedFd>);

impl Timer {
    /// A timer that is not set.
    ///
    /// # Errors
    /// Those of `timerfd_create(2)`.
    pub fn new() -> io::Result<Timer> {
        // SAFETY: plain integers; returns a new descriptor or -1.
        let fd: RawFd = unsafe {
            libc::timerfd_create(
                libc::CLOCK_MONOTONIC,
                libc::TFD_NONBLOCK | libc::TFD_CLOEXEC,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is a descriptor that nothing else owns.
        Ok(Timer(watch(unsafe { OwnedFd::from_raw_fd(fd) })?))
    }

    /// Sets it to a time on the monotonic clock, in nanoseconds.
    pub fn set(&self, time: u64) {
        const SECOND: u64 = 1_000_000_000;
        let zero = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // A time of zero would switch it off.
        let time = time.max(1);
        let value = libc::timespec {
            tv_sec: (time / SECOND).cast_signed(),
            tv_nsec: (time % SECOND).cast_signed(),
        };
        let spec = libc::itimerspec {
            it_interval: zero,
            it_value: value,
        };
        // SAFETY: a live itimerspec; no old value is asked for.
        unsafe {
            libc::timerfd_settime(
                self.0.as_raw_fd(),
                libc::TFD_TIMER_ABSTIME,
                &raw const spec,
                std::ptr::null_mut(),
            );
        };
    }

    async fn expired(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            let mut count = 0u64;
            // SAFETY: the buffer has the eight bytes that a timerfd gives.
            let got = unsafe {
                libc::read(
                    self.0.as_raw_fd(),
                    (&raw mut count).cast(),
                    size_of::<u64>(),
                )
            };
            if got > 0 {
                return Ok(());
            }
            ready.clear_ready();
        }
    }
}

/// Tells the node the time whenever it wants to know, for ever.
pub async fn keep_time(node: Shared, timer: Rc<Timer>) -> io::Result<()> {
    loop {
        timer.expired().await?;
        node.borrow_mut().on_timeout();
    }
}

/// Accepts other nodes, for ever.
pub async fn accept_peers(node: Shared, endpoint: Endpoint) {
    while let Some(incoming) = endpoint.accept().await {
        // Counted at once: who has been accepted must not be turned away.
        let Some(counted) = Counted::new(&node) else {
            return;
        };
        spawn_local(accept_peer(counted, incoming));
    }
}

async fn accept_peer(counted: Counted, incoming: Incoming) {
    let address = incoming.address();
    match incoming.link().await {
        Ok(link) => {
            hear_peer(&counted.0, link).await;
        }
        Err(error) => tracing::warn!(%address, %error, "refused a link"),
    }
}

/// Links to a member, and again if that fails.
pub fn connect_peer(node: &Node, member: Member) {
    let Some(endpoint) = node.endpoint.clone() else {
        return;
    };
    let node = Weak::clone(&node.this);
    spawn_local(async move {
        let Ok(expected) = Peer::node(&member.name) else {
            return;
        };
        loop {
            let Some(node) = node.upgrade() else { return };
            if !node.borrow().members.contains(&member) {
                return;
            }
            let Some(counted) = Counted::new(&node) else {
                return;
            };
            match endpoint.connect(member.address, &expected).await {
                Ok(link) => {
                    if hear_peer(&node, link).await == Parting::Ended {
                        continue;
                    }
                }
                Err(error) => {
                    let mut node = node.borrow_mut();
                    // It may have come back meanwhile, elsewhere: that it can be reached another task tries.
                    if !node.members.contains(&member) {
                        return;
                    }
                    tracing::warn!(peer = member.name, %error, "cannot reach a member");
                    node.on_unreachable(member.node);
                }
            }
            drop(counted);
            tokio::time::sleep(RECONNECT_PAUSE).await;
        }
    });
}

/// A link, or an attempt to make one, for as long as it lives.
struct Counted(Shared);

impl Counted {
    /// Nothing if no link is to be made.
    fn new(node: &Shared) -> Option<Counted> {
        let mut counting = node.borrow_mut();
        if counting.is_leaving {
            return None;
        }
        counting.links += 1;
        Some(Counted(Rc::clone(node)))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut node = self.0.borrow_mut();
        node.links -= 1;
        node.unlinked.notify_waiters();
    }
}

/// How a link has come to its end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Parting {
    /// Both sides have what was sent; another daemon takes the place of one.
    Ended,
    /// What was sent may be lost.
    Lost,
}

/// Greets the node at the other end and hands its messages on, until the link is no more.
async fn hear_peer(node: &Shared, link: Link) -> Parting {
    let Link {
        peer,
        sender,
        mut receiver,
        ..
    } = link;
    let hello = {
        let node = node.borrow();
        PeerHello {
            version: VERSION,
            node: node.id,
            epoch: node.epoch,
        }
    };
    sender.send(&hello, &[]);
    let from = match greet(node, &peer, &mut receiver).await {
        Ok(from) => from,
        Err(error) => {
            tracing::warn!(?peer, %error, "refused a node");
            sender.close(&error.to_string());
            return Parting::Lost;
        }
    };
    let linked = node.borrow_mut().on_link(from, sender.clone());
    let Some(number) = linked else {
        return Parting::Lost;
    };
    let error = loop {
        let frame = match receiver.next().await {
            Ok(frame) => frame,
            // What this side closes it has a reason for, which was said.
            Err(error @ LinkError::ClosedHere) => break error,
            Err(LinkError::Ended) => {
                node.borrow_mut().on_link_ended(from, number);
                return Parting::Ended;
            }
            Err(error) => {
                tracing::error!(peer = %from, %error, "the link to a node broke");
                break error;
            }
        };
        match frame.split::<PeerMessage>() {
            Ok((message, raw)) => {
                let mut node = node.borrow_mut();
                if !node.is_linked(from, number) {
                    // Its membership has ended, or it has linked anew.
                    sender.close("outdated");
                    return Parting::Lost;
                }
                node.on_peer(from, message, raw);
            }
            Err(error) => {
                tracing::error!(peer = %from, %error, "a node sent garbage");
                sender.close("malformed message");
                break LinkError::ClosedHere;
            }
        }
    };
    node.borrow_mut().on_link_lost(from, number, &error);
    Parting::Lost
}

/// Ends a direction of a link; what was sent on it arrives.
pub fn end_link(link: FrameSender) {
    spawn_local(async move { link.finish().await });
}

/// Reads the other node's greeting; returns its slot once the coordinator has named it a member.
async fn greet(
    node: &Shared,
    peer: &Peer,
    receiver: &mut FrameReceiver,
) -> Result<NodeId, Refusal> {
    let Peer::Node(name) = peer else {
        return Err(Refusal::NotANode);
    };
    let frame = receiver.next().await?;
    let (hello, _) = frame.decode::<PeerHello>()?;
    if !VERSION.accepts(hello.version) {
        return Err(Refusal::Version(hello.version));
    }
    let members_changed = Rc::clone(&node.borrow().members_changed);
    loop {
        let changed = members_changed.notified();
        {
            let node = node.borrow();
            let mut members = node.members.iter();
            if let Some(member) = members.find(|m| m.name == *name && m.epoch >= hello.epoch) {
                let same = member.node == hello.node && member.epoch == hello.epoch;
                return if same {
                    Ok(member.node)
                } else {
                    Err(Refusal::Outdated)
                };
            }
        }
        // The coordinator's word and the node's link race each other.
        changed.await;
    }
}

/// Why a node was not accepted.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("only nodes have pages")]
    NotANode,
    #[error("protocol version {0} is not {VERSION}")]
    Version(migshm_protocol::Version),
    #[error("its membership has ended")]
    Outdated,
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Codec(#[from] CodecError),
}
