//! A link: frames in order both ways, over one QUIC stream.
//!
//! Sending never waits. A frame is encoded into a buffer of its own, which becomes part of
//! QUIC's send queue as it is; the connection's driver cuts packets from it at its next turn.
//! Only what exceeds the send window goes to a backlog, and only then a task exists, which moves
//! the backlog on as the window opens. Invariant: the task exists exactly while the backlog is
//! not empty, so frames cannot overtake each other.
//!
//! A link is lost as a whole: what was sent may or may not have arrived, the receiver reports
//! why once, and sending becomes a no-op. A peer whose bytes are not frames, or who stops
//! reading, loses the link.

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Bytes, BytesMut};
use migshm_protocol::codec::{self, CodecError, FRAME_HEADER};
use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, VarInt};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::peer::Peer;

/// Room for an encoded message without raw bytes; more is allocated where it is needed.
const MESSAGE_ROOM: usize = 128;
/// Bytes that may wait for a peer that does not read, beyond QUIC's own send window.
const MAX_BACKLOG: usize = 256 << 20;

/// Application error codes of QUIC's CONNECTION_CLOSE.
const CLOSED: VarInt = VarInt::from_u32(0);
pub(crate) const VIOLATION: VarInt = VarInt::from_u32(1);
const STANDS_BY: VarInt = VarInt::from_u32(2);

/// A connection to a peer that TLS has identified.
#[derive(Debug)]
pub struct Link {
    /// Who is at the other end.
    pub peer: Peer,
    /// Where it is.
    pub address: SocketAddr,
    /// To the peer.
    pub sender: FrameSender,
    /// From the peer.
    pub receiver: FrameReceiver,
}

/// What a link has moved, in UDP datagrams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagrams {
    /// Given to the kernel.
    pub sent: u64,
    /// Received.
    pub received: u64,
}

/// Why a link could not be made, or was lost.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// Nothing was heard from the peer for the idle timeout.
    #[error("the peer does not answer")]
    Silent,
    /// The peer's process was replaced by one that does not know the link.
    #[error("the peer has restarted")]
    Restarted,
    /// The peer's major version is another.
    #[error(
        "the peer speaks another protocol version than {}",
        migshm_protocol::VERSION
    )]
    OtherVersion,
    /// This side does not trust the peer's certificate, or it is not the expected peer's.
    #[error("the peer's certificate is refused: {0}")]
    PeerUntrusted(String),
    /// The peer does not trust this side's certificate.
    #[error("the peer refuses this side's certificate: {0}")]
    Untrusted(&'static str),
    /// The peer closed the link, with a reason for a person.
    #[error("the peer closed the link: {0}")]
    Closed(String),
    /// The peer is a coordinator that does not lead; it says who does.
    #[error("it stands by: {0}")]
    StandsBy(String),
    /// This side closed the link.
    #[error("the link was closed on this side")]
    ClosedHere,
    /// The peer has sent everything it ever will.
    #[error("the peer ended the link")]
    Ended,
    /// The peer sent what is not a frame.
    #[error("the peer violates the protocol: {0}")]
    Violation(String),
    /// No connection can be attempted, or QUIC failed.
    #[error("{0}")]
    Failed(String),
}

impl From<ConnectionError> for LinkError {
    fn from(error: ConnectionError) -> Self {
        match error {
            ConnectionError::TimedOut => LinkError::Silent,
            ConnectionError::Reset => LinkError::Restarted,
            ConnectionError::VersionMismatch => LinkError::OtherVersion,
            ConnectionError::LocallyClosed => LinkError::ClosedHere,
            ConnectionError::ApplicationClosed(close) => {
                let reason = match close.reason.is_empty() {
                    true => "no reason given".into(),
                    false => String::from_utf8_lossy(&close.reason),
                };
                match close.error_code {
                    STANDS_BY => LinkError::StandsBy(reason.into_owned()),
                    _ => LinkError::Closed(reason.into_owned()),
                }
            }
            ConnectionError::ConnectionClosed(close) => match tls_alert(close.error_code) {
                Some(ALERT_NO_APPLICATION_PROTOCOL) => LinkError::OtherVersion,
                Some(alert) => LinkError::Untrusted(alert_meaning(alert)),
                None => LinkError::Failed(close.to_string()),
            },
            ConnectionError::TransportError(error) => match tls_alert(error.code) {
                Some(ALERT_NO_APPLICATION_PROTOCOL) => LinkError::OtherVersion,
                Some(ALERT_DECRYPT_ERROR | ALERT_UNKNOWN_CA) => {
                    LinkError::PeerUntrusted("it comes from another cluster's authority".to_owned())
                }
                Some(_) => LinkError::PeerUntrusted(error.reason),
                None => LinkError::Failed(error.to_string()),
            },
            ConnectionError::CidsExhausted => LinkError::Failed(error.to_string()),
        }
    }
}

impl Link {
    /// A link over the one stream of `connection`.
    pub(crate) fn new(
        peer: Peer,
        connection: Arc<Connection>,
        (stream, incoming): (SendStream, RecvStream),
    ) -> Link {
        let out = Out {
            stream,
            backlog: VecDeque::new(),
            backlog_bytes: 0,
            finishing: false,
        };
        Link {
            peer,
            address: connection.remote_address(),
            receiver: FrameReceiver {
                connection: Arc::clone(&connection),
                stream: incoming,
                chunk: Bytes::new(),
                partial: BytesMut::new(),
            },
            sender: FrameSender(Arc::new(Shared {
                connection,
                out: Mutex::new(out),
            })),
        }
    }

    /// The bare stream under the frames, to measure what they cost. What has arrived and was not
    /// received is lost.
    ///
    /// # Panics
    /// If the sender has clones.
    #[doc(hidden)]
    #[must_use]
    pub fn into_stream(self) -> (SendStream, RecvStream) {
        let shared = Arc::into_inner(self.sender.0).expect("the sender has no clones");
        let out = shared
            .out
            .into_inner()
            .expect("no code panics under this lock");
        (out.stream, self.receiver.stream)
    }
}

/// The sending half; clones send on the same link.
#[derive(Clone)]
pub struct FrameSender(Arc<Shared>);

impl FrameSender {
    /// Sends a message with raw bytes after it, without waiting and without a task switch.
    ///
    /// On a lost link this does nothing; the receiver tells. A frame above
    /// [`migshm_protocol::limits::MAX_REMOTE`] closes the link.
    pub fn send<T: Serialize>(&self, message: &T, raw: &[u8]) {
        let mut frame = Vec::with_capacity(MESSAGE_ROOM + raw.len());
        match codec::encode_frame(message, raw, &mut frame) {
            Ok(()) => self.send_frame(frame.into()),
            Err(error) => self.unsendable(&error),
        }
    }

    /// Sends a frame that is encoded already, like [`FrameSender::send`].
    pub fn send_frame(&self, frame: Bytes) {
        let mut out = self.0.out();
        let idle = out.backlog.is_empty();
        out.backlog_bytes += frame.len();
        out.backlog.push_back(frame);
        if !idle {
            if out.backlog_bytes > MAX_BACKLOG {
                out.clear();
                self.0
                    .connection
                    .close(VIOLATION, b"the peer does not keep up");
            }
            return;
        }
        let mut no_wakeup = Context::from_waker(Waker::noop());
        if out.poll_drain(&mut no_wakeup).is_pending() {
            let shared = Arc::clone(&self.0);
            tokio::spawn(async move { poll_fn(|cx| shared.out().poll_drain(cx)).await });
        }
    }

    /// Like [`FrameSender::send`], but `append` appends the raw bytes, for which there is room.
    pub fn send_with<T: Serialize>(
        &self,
        message: &T,
        room: usize,
        append: impl FnOnce(&mut Vec<u8>),
    ) {
        let mut frame = Vec::with_capacity(MESSAGE_ROOM + room);
        let encoded = codec::encode_frame(message, &[], &mut frame);
        append(&mut frame);
        match encoded.and_then(|()| codec::seal_frame(&mut frame)) {
            Ok(()) => self.send_frame(frame.into()),
            Err(error) => self.unsendable(&error),
        }
    }

    /// Closes the link both ways at once, with a reason for the peer's log. What was sent last
    /// may not arrive.
    pub fn close(&self, reason: &str) {
        self.0.connection.close(CLOSED, reason.as_bytes());
    }

    /// Closes the link, for the peer to try another coordinator.
    pub fn stand_by(&self, reason: &str) {
        self.0.connection.close(STANDS_BY, reason.as_bytes());
    }

    /// Ends this direction; resolves when the peer has received everything, or the link is lost.
    pub async fn finish(&self) {
        let stopped = {
            let mut out = self.0.out();
            out.finishing = true;
            if out.backlog.is_empty() {
                out.end();
            }
            out.stream.stopped()
        };
        let _ = stopped.await;
    }

    /// Resolves when the link is lost, with the reason.
    pub async fn lost(&self) -> LinkError {
        self.0.connection.closed().await.into()
    }

    /// Datagrams that this side has given to the kernel and that it has received.
    #[must_use]
    pub fn datagrams(&self) -> Datagrams {
        let statistics = self.0.connection.stats();
        Datagrams {
            sent: statistics.udp_tx.datagrams,
            received: statistics.udp_rx.datagrams,
        }
    }

    /// The smoothed round trip.
    #[must_use]
    pub fn round_trip(&self) -> std::time::Duration {
        self.0.connection.rtt()
    }

    fn unsendable(&self, error: &CodecError) {
        tracing::error!(%error, peer = %self.0.connection.remote_address(), "closing a link on a frame that cannot be sent");
        self.0
            .connection
            .close(VIOLATION, error.to_string().as_bytes());
    }
}

impl fmt::Debug for FrameSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrameSender({})", self.0.connection.remote_address())
    }
}

struct Shared {
    connection: Arc<Connection>,
    out: Mutex<Out>,
}

impl Shared {
    fn out(&self) -> MutexGuard<'_, Out> {
        self.out.lock().expect("no code panics under this lock")
    }
}

struct Out {
    stream: SendStream,
    /// Frames, the first perhaps in part, that QUIC has not taken.
    backlog: VecDeque<Bytes>,
    backlog_bytes: usize,
    /// Whether the stream ends after the backlog.
    finishing: bool,
}

impl Out {
    /// Moves the backlog into QUIC's send queue; ready when it is empty or the link is lost.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.backlog.is_empty() {
            let chunks = self.backlog.make_contiguous();
            let write = pin!(self.stream.write_chunks(chunks)).poll(cx);
            match ready!(write) {
                Ok(written) => {
                    self.backlog.drain(..written.chunks);
                    self.backlog_bytes -= written.bytes;
                }
                // Each way the link is lost or ended; the receiver tells.
                Err(_) => self.clear(),
            }
        }
        if self.finishing {
            self.end();
        }
        Poll::Ready(())
    }

    fn clear(&mut self) {
        self.backlog.clear();
        self.backlog_bytes = 0;
    }

    fn end(&mut self) {
        // An error means that the stream has ended already.
        let _ = self.stream.finish();
    }
}

/// A message as it arrived.
#[derive(Clone, Debug)]
pub struct Frame(Bytes);

impl Frame {
    /// The message and the raw bytes after it.
    ///
    /// # Errors
    /// [`CodecError::Malformed`]; the peer then deserves a [`FrameSender::close`].
    pub fn decode<T: DeserializeOwned>(&self) -> Result<(T, &[u8]), CodecError> {
        codec::decode(&self.0)
    }

    /// Like [`Frame::decode`], with the raw bytes as they are in the frame: not copied.
    ///
    /// # Errors
    /// Those of [`Frame::decode`].
    pub fn split<T: DeserializeOwned>(self) -> Result<(T, Bytes), CodecError> {
        let (message, raw) = self.decode()?;
        let raw = self.0.slice_ref(raw);
        Ok((message, raw))
    }

    /// Message and raw bytes, undecoded.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The receiving half.
pub struct FrameReceiver {
    connection: Arc<Connection>,
    stream: RecvStream,
    /// What has arrived in order and was not handed out.
    chunk: Bytes,
    /// The beginning of a frame whose rest is not in `chunk`; `chunk` is empty or its rest.
    partial: BytesMut,
}

impl FrameReceiver {
    /// The next frame. Cancel-safe: a dropped future loses nothing.
    ///
    /// # Errors
    /// The link is lost, or the peer violates the protocol, which loses it.
    pub async fn next(&mut self) -> Result<Frame, LinkError> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// The next frame if it has arrived; does not wait.
    ///
    /// # Errors
    /// Those of [`FrameReceiver::next`].
    pub fn try_next(&mut self) -> Result<Option<Frame>, LinkError> {
        match self.poll_next(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(frame) => frame.map(Some),
            Poll::Pending => Ok(None),
        }
    }

    /// [`FrameReceiver::next`], for a caller that polls several sources in one task.
    ///
    /// # Errors
    /// Those of [`FrameReceiver::next`].
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Frame, LinkError>> {
        loop {
            match self.take_frame() {
                Ok(Some(frame)) => return Poll::Ready(Ok(frame)),
                Ok(None) => {}
                Err(error) => {
                    let reason = error.to_string();
                    self.connection.close(VIOLATION, reason.as_bytes());
                    return Poll::Ready(Err(LinkError::Violation(reason)));
                }
            }
            let read = pin!(self.stream.read_chunk(usize::MAX, true));
            match ready!(read.poll(cx)) {
                Ok(Some(chunk)) => self.chunk = chunk.bytes,
                Ok(None) | Err(ReadError::Reset(_) | ReadError::ClosedStream) => {
                    return Poll::Ready(Err(LinkError::Ended));
                }
                Err(ReadError::ConnectionLost(error)) => return Poll::Ready(Err(error.into())),
                Err(error @ (ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected)) => {
                    unreachable!("reads are ordered and there is no 0-RTT: {error}")
                }
            }
        }
    }

    /// The next frame in what has arrived; `None` leaves `chunk` empty.
    fn take_frame(&mut self) -> Result<Option<Frame>, CodecError> {
        if self.partial.is_empty()
            && let Some(&header) = self.chunk.first_chunk()
        {
            let length = FRAME_HEADER + codec::frame_length(header)?;
            if self.chunk.len() >= length {
                return Ok(Some(Frame(
                    self.chunk.split_to(length).slice(FRAME_HEADER..),
                )));
            }
        }
        self.gather(FRAME_HEADER);
        let Some(&header) = self.partial.first_chunk() else {
            return Ok(None);
        };
        let length = FRAME_HEADER + codec::frame_length(header)?;
        self.gather(length);
        if self.partial.len() < length {
            return Ok(None);
        }
        Ok(Some(Frame(
            self.partial.split().freeze().slice(FRAME_HEADER..),
        )))
    }

    /// Moves bytes from `chunk` to `partial`, up to `length` there.
    fn gather(&mut self, length: usize) {
        let wanted = length.saturating_sub(self.partial.len());
        self.partial.reserve(wanted);
        let available = self.chunk.split_to(wanted.min(self.chunk.len()));
        self.partial.extend_from_slice(&available);
    }
}

impl fmt::Debug for FrameReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FrameReceiver({})", self.connection.remote_address())
    }
}

// TLS alerts (RFC 8446, 6). All authorities of migshm have the same name, so that one takes a
// certificate of another for its own with a bad signature.
const ALERT_CERTIFICATE_EXPIRED: u8 = 45;
const ALERT_UNKNOWN_CA: u8 = 48;
const ALERT_DECRYPT_ERROR: u8 = 51;
const ALERT_CERTIFICATE_REQUIRED: u8 = 116;
const ALERT_NO_APPLICATION_PROTOCOL: u8 = 120;

/// The TLS alert in a QUIC error code (RFC 9001, 4.8).
fn tls_alert(code: quinn::TransportErrorCode) -> Option<u8> {
    u64::from(code)
        .checked_sub(0x100)
        .and_then(|alert| u8::try_from(alert).ok())
}

/// Why the peer refuses this side's certificate.
fn alert_meaning(alert: u8) -> &'static str {
    match alert {
        // Also for one that is not valid yet.
        ALERT_CERTIFICATE_EXPIRED => "it has expired, or the hosts' clocks differ",
        ALERT_UNKNOWN_CA | ALERT_DECRYPT_ERROR => "it comes from another cluster's authority",
        ALERT_CERTIFICATE_REQUIRED => "there is none",
        _ => "it is not valid",
    }
}
