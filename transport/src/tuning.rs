//! The numbers that fit QUIC to a LAN, with their units and reasons.
//!
//! quinn's defaults assume the internet: 333 ms of initial round trip, 25 ms of ACK delay,
//! datagrams of at most 1452 bytes. `cargo run --release -p migshm-transport --example echo`
//! measures what they do here.

use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{
    AckFrequencyConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;

/// Assumed round trip before the first measurement. It only times retransmissions of the
/// handshake, three of these later at first and then backing off; a LAN's own 0.2 ms would
/// retransmit while the peer still computes its signature.
const INITIAL_RTT: Duration = Duration::from_millis(1);

/// The longest a receiver waits before it acknowledges. A lost last packet is resent after about
/// a round trip and this, so QUIC's 25 ms is long; but timers shorter than the kernel's tick cost
/// a reprogramming of the clock at every sleep: 1 ms adds a quarter to a round trip on a virtual
/// machine, 10 ms nothing.
const MAX_ACK_DELAY: Duration = Duration::from_millis(10);

/// How often an idle connection shows that it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// Silence after which the peer is lost: others must notice a dead node within 3 s.
const IDLE_TIMEOUT_MS: u32 = 3_000;

/// What the sender may have in flight and what the receiver buffers, in bytes: more than a
/// 100 Gbit/s link carries in 1 ms, so flow control never stalls a bulk transfer.
const WINDOW: u32 = 32 << 20;

/// Congestion window at the start, in bytes: a LAN need not be probed for 64 pages, and the
/// first fault after a join should not wait for slow start.
const INITIAL_WINDOW: u64 = 256 << 10;

/// Datagrams that quinn gives to the kernel in one buffer, for it to cut (`MAX_TRANSMIT_SEGMENTS`
/// in quinn's `connection.rs`; not exported).
const BATCH: u16 = 10;

/// Bytes of a batch that the loopback device takes as it is, and the receiver gets as it is: with all
/// headers less than 64 KiB (`gso_max_size`). The kernel cuts a larger one in software, and the
/// receiver takes ten datagrams one by one. It refuses one above 65 507 bytes, which quinn takes
/// for a lost MTU probe.
const MAX_BATCH: u16 = 65_400;

/// Largest datagram that is tried, in bytes, where the path's MTU allows it (loopback, jumbo
/// frames). Discovery finds what the path carries. A page and its headers in one datagram arrive
/// several microseconds sooner than in three.
const MAX_DATAGRAM: u16 = MAX_BATCH / BATCH;

/// Kernel buffers of the socket, in bytes: a burst of grants from many nodes must not be lost
/// while the daemon handles a fault.
const SOCKET_BUFFER: libc::c_int = 8 << 20;

/// For both sides of every connection.
pub(crate) fn transport() -> Arc<TransportConfig> {
    let mut acks = AckFrequencyConfig::default();
    acks.max_ack_delay(Some(MAX_ACK_DELAY));
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_DATAGRAM);
    let mut cubic = CubicConfig::default();
    cubic.initial_window(INITIAL_WINDOW);

    let mut config = TransportConfig::default();
    config
        .initial_rtt(INITIAL_RTT)
        .ack_frequency_config(Some(acks))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT_MS))))
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .stream_receive_window(VarInt::from_u32(WINDOW))
        .receive_window(VarInt::from_u32(WINDOW))
        .send_window(u64::from(WINDOW))
        .mtu_discovery_config(Some(mtu))
        .congestion_controller_factory(Arc::new(cubic));
    Arc::new(config)
}

/// For the socket that all connections of an endpoint share.
///
/// A daemon that is started again must be able to tell the peers of the former one that their links are
/// gone (QUIC's stateless reset); they would wait for the idle timeout otherwise. So what that takes is
/// made from what outlives the daemon, its `secret`.
pub(crate) fn endpoint(secret: &[u8]) -> EndpointConfig {
    let secret = hmac::Key::new(hmac::HMAC_SHA256, secret);
    let reset_key = hmac::sign(&secret, b"migshm: stateless resets");
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, reset_key.as_ref());
    let own_ids = hmac::sign(&secret, b"migshm: connection ids");
    let (own_ids, _) = own_ids.as_ref().split_first_chunk().expect("32 bytes");
    let own_ids = u64::from_le_bytes(*own_ids);

    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(own_ids)));
    config
        .max_udp_payload_size(MAX_DATAGRAM)
        .expect("within QUIC's bounds");
    config
}

/// Enlarges the socket's buffers, beyond the system's limit if privileged, else up to it.
pub(crate) fn enlarge_buffers(socket: &UdpSocket) {
    let plain = socket2::SockRef::from(socket);
    if !force_buffer(socket, libc::SO_RCVBUFFORCE) {
        let _ = plain.set_recv_buffer_size(SOCKET_BUFFER as usize);
    }
    if !force_buffer(socket, libc::SO_SNDBUFFORCE) {
        let _ = plain.set_send_buffer_size(SOCKET_BUFFER as usize);
    }
}

fn force_buffer(socket: &UdpSocket, option: libc::c_int) -> bool {
    let size = SOCKET_BUFFER;
    // SAFETY: the descriptor is open, and the option's value is an int that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const size).cast(),
            size_of_val(&size) as libc::socklen_t,
        )
    };
    result == 0
}
