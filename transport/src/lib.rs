//! Links between daemons: framed messages over QUIC, with mutual TLS on every one of them.
//!
//! A cluster has one certificate authority of its own ([`pki`]). A certificate says what its
//! holder is, the coordinator or a node of some name ([`Peer`]), as a DNS name that TLS itself
//! verifies; there is no way to talk without one. An [`Endpoint`] is one UDP socket, client and
//! server at once. A [`Link`] is one QUIC connection with one bidirectional stream, which its
//! opener opens by sending first; its halves are a [`FrameSender`] and a [`FrameReceiver`].
//!
//! # Latency
//!
//! A page fault on another node waits for two messages on these links, so what counts is the
//! time between [`FrameSender::send`] and the receiver's task running:
//!
//! - `send` encodes into the buffer that QUIC packets are cut from and hands it to the
//!   connection's driver at once: no task, channel or copy of ours in between. Frames sent
//!   before the driver's turn share packets.
//! - A received frame is a slice of the datagram it arrived in, unless it spans several. All
//!   frames that are there are handed out without another wake-up.
//! - `tuning` holds the numbers that fit QUIC to a LAN.
//!
//! Everything here may live on a single-threaded runtime or a multi-threaded one.

mod carrier;
mod endpoint;
mod link;
mod peer;
pub mod pki;
mod renewal;
mod scheduling;
mod tuning;

pub use carrier::Carrier;
pub use endpoint::{Endpoint, EndpointError, Incoming};
pub use link::{Datagrams, Frame, FrameReceiver, FrameSender, Link, LinkError};
pub use peer::{BadName, Peer};
pub use pki::{Identity, PkiError};
pub use renewal::follow;
pub use scheduling::run_early;
