//! This node's membership of a cluster: how it begins, and how it goes on when the link to the
//! coordinator is lost.
//!
//! A coordinator that does not answer may come back, or its link may. Until then what is to be said to it
//! is kept, and the processes whose calls it has to answer wait; everything that needs no coordinator goes
//! on: pages, and for the time of the lease semaphore sets that are delegated to this node. The membership
//! ends when the coordinator says so, or when patience does.
//!
//! Where there are several coordinators all of them are asked at once: those that do not lead say so, those that
//! are gone say nothing.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::pin::Pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use migshm_protocol::codec::{self, CodecError};
use migshm_protocol::control::{FromCoordinator, ToCoordinator};
use migshm_protocol::session::{Cursor, Header, MAX_BACKLOG, Session, Violation, opening};
use migshm_protocol::{NodeId, VERSION};
use migshm_transport::{
    Carrier, Endpoint, Frame, FrameReceiver, FrameSender, Identity, LinkError, Peer,
};
use serde::{Deserialize, Serialize};

use crate::daemon::{Coordinator, Shared};
use crate::{Config, Error};

/// How long an attempt to reach the coordinator may take.
const ATTEMPT: Duration = Duration::from_secs(1);
/// How long coordinators may take to agree on who leads when a node joins.
const ELECTION: Duration = Duration::from_secs(20);
/// Between two of them.
const PAUSE: Duration = Duration::from_millis(100);

/// The node's side of the session with the coordinator.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Remote {
    session: Session,
    #[serde(skip)]
    link: Option<Carrier>,
}

/// What joining a cluster gives.
pub struct Joined {
    /// The node's slot.
    pub node: NodeId,
    /// Number of its membership.
    pub epoch: u64,
    /// To be kept.
    pub membership: Membership,
    /// To the coordinator.
    pub link: Remote,
    /// From the coordinator.
    pub receiver: FrameReceiver,
}

/// A membership, and what it takes to reach the coordinator again.
pub struct Membership {
    endpoint: Endpoint,
    patience: Option<Duration>,
    terms: Terms,
}

/// What a daemon needs to go on with the membership of the one before it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Terms {
    coordinators: Vec<SocketAddr>,
    /// Where the node's endpoint is bound.
    own: SocketAddr,
    /// Opens a link that goes on.
    resume: ToCoordinator,
}

/// Why something cannot be said to the coordinator, now or ever.
#[derive(Debug, thiserror::Error)]
pub enum Unsayable {
    /// Too much waits for a coordinator that cannot be reached.
    #[error("{MAX_BACKLOG} bytes wait for it, and more cannot be kept")]
    Full,
    /// The message fits no frame.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// Why a link carries the session no longer.
#[derive(Debug, thiserror::Error)]
enum Interrupted {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error("it sent garbage: {0}")]
    Garbage(#[from] CodecError),
    #[error("it breaks the rules: {0}")]
    Violation(#[from] Violation),
    #[error("it does not take this node back")]
    NotResumed,
}

/// Becomes a member of the coordinator's cluster.
///
/// # Errors
/// [`Error`]: the coordinator cannot be reached, or refuses.
pub async fn join(config: &Config, coordinator: &str, budget: u64) -> Result<Joined, Error> {
    let endpoint = bind(config, config.listen)?;
    let coordinators = resolve(coordinator, config.listen).await?;
    let unreachable = |cause| Error::Unreachable {
        coordinator: coordinator.to_owned(),
        cause,
    };
    let refused = |reason| Error::Refused {
        coordinator: coordinator.to_owned(),
        reason,
    };
    let own = SocketAddr::new(
        reachable_ip(config.listen, coordinators[0])?,
        endpoint.local_address()?.port(),
    );
    let join = ToCoordinator::Join {
        version: VERSION,
        name: config.name.clone(),
        address: own,
        memory: budget,
    };
    let join = opening(&join, 0).map_err(|error| refused(error.to_string()))?;
    let since = Instant::now();
    let (sender, receiver, frame) = loop {
        match open(&endpoint, &coordinators, &join).await {
            Ok(opened) => break opened,
            Err(LinkError::StandsBy(reason)) if since.elapsed() < ELECTION => {
                tracing::debug!(reason, "no coordinator leads");
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => return Err(unreachable(error)),
        }
    };
    let (header, message) = parse(&frame).map_err(|error| refused(error.to_string()))?;
    match message {
        FromCoordinator::Welcome {
            cluster,
            node,
            epoch,
        } => {
            let mut session = Session::default();
            session
                .receive(header)
                .map_err(|error| refused(error.to_string()))?;
            let resume = ToCoordinator::Resume {
                version: VERSION,
                cluster,
                node,
                epoch,
            };
            Ok(Joined {
                node,
                epoch,
                membership: Membership {
                    patience: config.patience,
                    terms: Terms {
                        coordinators,
                        own: endpoint.local_address()?,
                        resume,
                    },
                    endpoint,
                },
                link: Remote {
                    session,
                    link: Some(Carrier::new(sender, Cursor::default())),
                },
                receiver,
            })
        }
        FromCoordinator::Refused { reason } => Err(refused(reason)),
        _ => Err(refused("it answers something else".to_owned())),
    }
}

/// The socket for all links of a node.
fn bind(config: &Config, address: SocketAddr) -> Result<Endpoint, Error> {
    let pki = config.pki.as_ref().ok_or(Error::NoPki)?;
    let identity = Identity::load(pki, &Peer::node(&config.name)?)?;
    let endpoint = Endpoint::bind(address, &identity)?;
    tokio::task::spawn_local(migshm_transport::follow(endpoint.clone(), pki.clone())?);
    Ok(endpoint)
}

impl Membership {
    /// Goes on with the membership of the daemon before this one.
    ///
    /// # Errors
    /// [`Error`]: the endpoint cannot be made.
    pub fn resumed(config: &Config, terms: Terms) -> Result<Membership, Error> {
        Ok(Membership {
            endpoint: bind(config, terms.own)?,
            patience: config.patience,
            terms,
        })
    }

    /// What the next daemon needs.
    #[must_use]
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// The socket for all links of this node.
    #[must_use]
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Hands the coordinator's messages to the node, and finds it again when the link is lost, or there is
    /// none, until the membership ends.
    pub async fn keep(self, node: Shared, mut link: Option<FrameReceiver>) {
        let name = node.borrow().name.clone();
        let reason = loop {
            if let Some(receiver) = &mut link {
                let error = match hear(&node, receiver).await {
                    Interrupted::Link(error) => error,
                    misbehaviour => break misbehaviour.to_string(),
                };
                if !interrupt(&node) {
                    return;
                }
                tracing::warn!(node = name, %error, "the link to the coordinator is lost; calls wait");
            }
            match self.find(&node).await {
                Ok(found) => link = Some(found),
                Err(reason) => break reason,
            }
            tracing::info!(node = name, "the coordinator is back");
            // Programs may have to wait for this answer.
            node.borrow_mut().extend_lease();
        };
        let mut node = node.borrow_mut();
        if let Coordinator::Remote(_) = node.coordinator {
            node.on_coordinator_lost(&reason);
            node.settle();
        }
    }

    /// Tries to reach the coordinator until it takes this node back; gives the reason if that is never.
    async fn find(&self, node: &Shared) -> Result<FrameReceiver, String> {
        let since = Instant::now();
        loop {
            match tokio::time::timeout(ATTEMPT, self.resume(node)).await {
                Ok(Ok(Resumed::Receiver(receiver))) => return Ok(receiver),
                Ok(Ok(Resumed::Refused(reason))) => return Err(reason),
                Ok(Err(error)) => tracing::debug!(%error, "the coordinator cannot be reached"),
                Err(_) => tracing::debug!("the coordinator does not answer"),
            }
            if self.patience.is_some_and(|limit| since.elapsed() > limit) {
                return Err(format!("it was away for {} s", since.elapsed().as_secs()));
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Goes on with the session on another link.
    async fn resume(&self, node: &Shared) -> Result<Resumed, Interrupted> {
        let received = match &node.borrow().coordinator {
            Coordinator::Remote(remote) => remote.session.mark().received,
            Coordinator::Embedded(_) | Coordinator::Lost => {
                return Ok(Resumed::Refused("it was given up".to_owned()));
            }
        };
        let resume = opening(&self.terms.resume, received)?;
        let (sender, receiver, frame) =
            open(&self.endpoint, &self.terms.coordinators, &resume).await?;
        let (header, message) = parse(&frame)?;
        match message {
            FromCoordinator::Resumed => {}
            FromCoordinator::Refused { reason } => return Ok(Resumed::Refused(reason)),
            _ => return Err(Interrupted::NotResumed),
        }
        if let Coordinator::Remote(remote) = &mut node.borrow_mut().coordinator {
            let cursor = match remote.session.resume(header.received) {
                Ok(cursor) => cursor,
                // It has lost what it had, or made it up: there is no way back.
                Err(violation) => return Ok(Resumed::Refused(violation.to_string())),
            };
            remote.link = Some(Carrier::new(sender, cursor));
            remote.advance();
        }
        Ok(Resumed::Receiver(receiver))
    }
}

/// What came of an attempt to go on.
enum Resumed {
    Receiver(FrameReceiver),
    /// There is nothing to go on with.
    Refused(String),
}

impl Remote {
    /// Says something, once and in order, as soon as the coordinator can be reached.
    ///
    /// # Errors
    /// [`Unsayable`].
    pub fn say(&mut self, message: &impl Serialize, raw: &[u8]) -> Result<(), Unsayable> {
        self.session.send(message, raw)?;
        if self.session.backlog() > MAX_BACKLOG {
            return Err(Unsayable::Full);
        }
        self.advance();
        Ok(())
    }

    /// The link to the coordinator, if there is one.
    #[must_use]
    pub fn link(&self) -> Option<&FrameSender> {
        Some(self.link.as_ref()?.sender())
    }

    fn advance(&mut self) {
        if let Some(link) = &mut self.link {
            link.advance(&self.session, self.session.mark());
        }
    }
}

impl Coordinator {
    /// Whether what it is asked is answered soon.
    pub(crate) fn is_reachable(&self) -> bool {
        match self {
            Coordinator::Embedded(_) => true,
            Coordinator::Remote(remote) => remote.link.is_some(),
            Coordinator::Lost => false,
        }
    }
}

/// Opens a link to the coordinator that leads, and gives its answer. All are asked at once.
async fn open(
    endpoint: &Endpoint,
    coordinators: &[SocketAddr],
    opening: &Bytes,
) -> Result<(FrameSender, FrameReceiver, Frame), LinkError> {
    let ask = |address: &SocketAddr| {
        let address = *address;
        async move {
            let link = endpoint.connect(address, &Peer::Coordinator).await?;
            let (sender, mut receiver) = (link.sender, link.receiver);
            sender.send_frame(opening.clone());
            let frame = receiver.next().await?;
            Ok((sender, receiver, frame))
        }
    };
    let mut asked: Vec<_> = coordinators.iter().map(|a| Box::pin(ask(a))).collect();
    let mut failed = None;
    poll_fn(|context| {
        let mut index = 0;
        while index < asked.len() {
            match Pin::new(&mut asked[index]).poll(context) {
                Poll::Ready(Ok(opened)) => return Poll::Ready(Ok(opened)),
                Poll::Ready(Err(error)) => {
                    drop(asked.swap_remove(index));
                    // Where one stands by, another is going to lead.
                    if !matches!(failed, Some(LinkError::StandsBy(_))) {
                        failed = Some(error);
                    }
                }
                Poll::Pending => index += 1,
            }
        }
        match asked.is_empty() {
            true => Poll::Ready(Err(failed.take().expect("there is a coordinator"))),
            false => Poll::Pending,
        }
    })
    .await
}

/// The addresses of coordinators, `HOST:PORT,...`: those that are known.
async fn resolve(coordinators: &str, listen: SocketAddr) -> Result<Vec<SocketAddr>, Error> {
    let (mut found, mut failed) = (Vec::new(), None);
    for coordinator in coordinators.split(',') {
        let resolved = tokio::net::lookup_host(coordinator).await;
        let address = resolved.and_then(|mut addresses| {
            let fits = addresses.find(|a| a.is_ipv4() == listen.is_ipv4());
            fits.ok_or_else(|| {
                let reason = "no address of the listener's family";
                io::Error::new(io::ErrorKind::NotFound, reason)
            })
        });
        match address {
            Ok(address) => found.push(address),
            Err(cause) => {
                tracing::warn!(coordinator, %cause, "cannot resolve a coordinator");
                let coordinator = coordinator.to_owned();
                failed = Some(Error::Resolve { coordinator, cause });
            }
        }
    }
    match failed {
        Some(error) if found.is_empty() => Err(error),
        _ => Ok(found),
    }
}

/// Hands messages to the node until the link is lost; returns why.
async fn hear(node: &Shared, receiver: &mut FrameReceiver) -> Interrupted {
    loop {
        let heard = match receiver.next().await {
            Ok(frame) => take(node, &frame),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = heard {
            return error;
        }
    }
}

fn take(node: &Shared, frame: &Frame) -> Result<(), Interrupted> {
    let mut node = node.borrow_mut();
    let Coordinator::Remote(remote) = &mut node.coordinator else {
        return Ok(());
    };
    let (header, rest) = frame.decode::<Header>()?;
    if !remote.session.receive(header)? {
        return Ok(());
    }
    let (message, raw) = codec::decode(rest)?;
    node.inbox.push_back((message, raw.to_vec()));
    node.settle();
    // It may have heard nothing for long.
    if let Coordinator::Remote(remote) = &mut node.coordinator {
        remote.advance();
    }
    Ok(())
}

/// Gives up the link; false if the membership has ended.
fn interrupt(node: &Shared) -> bool {
    match &mut node.borrow_mut().coordinator {
        Coordinator::Remote(remote) => {
            remote.link = None;
            true
        }
        Coordinator::Embedded(_) | Coordinator::Lost => false,
    }
}

fn parse(frame: &Frame) -> Result<(Header, FromCoordinator), CodecError> {
    let (header, rest) = frame.decode::<Header>()?;
    let (message, _) = codec::decode(rest)?;
    Ok((header, message))
}

/// The address under which others reach this host, as seen on the way to the coordinator.
fn reachable_ip(listen: SocketAddr, coordinator: SocketAddr) -> io::Result<IpAddr> {
    if !listen.ip().is_unspecified() {
        return Ok(listen.ip());
    }
    let probe = UdpSocket::bind(SocketAddr::new(listen.ip(), 0))?;
    probe.connect(coordinator)?;
    Ok(probe.local_addr()?.ip())
}
