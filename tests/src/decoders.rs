//! Everything that reads bytes from outside the process, as functions of these bytes: for `fuzz/`, and
//! for tests that mutate valid input.
//!
//! Each [`Target`] takes any bytes. It panics if something is wrong: a decoder that panics, a value that
//! is another when it is encoded and decoded again, a state machine that addresses a node that cannot
//! exist. The targets that feed state machines read a sequence of steps, each an encoded value, as
//! far as the bytes make sense.

mod certificates;
mod machines;
mod mutation;
mod valid;

use std::fmt::Debug;

use migshm_protocol::accesses::Part;
use migshm_protocol::codec::{self, FRAME_HEADER};
use migshm_protocol::control::{FromCoordinator, ToCoordinator};
use migshm_protocol::local::{FromNode, ToNode};
use migshm_protocol::page::{PageRun, PeerHello, PeerMessage};
use migshm_protocol::session::Header;
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use mutation::mutate;

/// A decoder, or what stands behind one.
pub struct Target {
    /// The name of its file in `fuzz/fuzz_targets`.
    pub name: &'static str,
    /// Reads bytes.
    pub run: fn(&[u8]),
    /// Bytes that make sense, to begin with.
    pub samples: fn() -> Vec<Vec<u8>>,
    /// Reads of mutated samples in the tests: as many as take a second or so.
    pub rounds: usize,
}

/// All of them.
pub static TARGETS: [Target; 7] = [
    Target {
        name: "local",
        run: local,
        samples: valid::local,
        rounds: 200_000,
    },
    Target {
        name: "control",
        run: control,
        samples: valid::control,
        rounds: 200_000,
    },
    Target {
        name: "peer",
        run: peer,
        samples: valid::peer,
        rounds: 200_000,
    },
    Target {
        name: "coordinator",
        run: machines::coordinator,
        samples: valid::coordinator,
        rounds: 20_000,
    },
    Target {
        name: "pages",
        run: machines::pages,
        samples: valid::pages,
        rounds: 50_000,
    },
    Target {
        name: "diffs",
        run: machines::diffs,
        samples: valid::diffs,
        rounds: 200_000,
    },
    Target {
        name: "certificates",
        run: certificates::certificates,
        samples: certificates::samples,
        rounds: 3_000,
    },
];

/// Has the target of this name read bytes.
///
/// # Panics
/// If there is none, or it has found something.
pub fn run(name: &str, bytes: &[u8]) {
    (target(name).run)(bytes);
}

/// Bytes that make sense to the target of this name.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn samples(name: &str) -> Vec<Vec<u8>> {
    (target(name).samples)()
}

/// The target of this name.
///
/// # Panics
/// If there is none.
#[must_use]
pub fn target(name: &str) -> &'static Target {
    let target = TARGETS.iter().find(|target| target.name == name);
    target.expect("a target")
}

/// A packet on the socket between a process and its daemon, in either direction.
fn local(bytes: &[u8]) {
    decode::<ToNode>(bytes);
    decode::<FromNode>(bytes);
}

/// A frame between a node and the coordinator, in either direction, and what tools are sent beside
/// an answer.
fn control(bytes: &[u8]) {
    decode::<(Header, ToCoordinator)>(bytes);
    decode::<(Header, FromCoordinator)>(bytes);
    decode::<Part>(bytes);
    if let Some(header) = bytes.first_chunk::<FRAME_HEADER>() {
        let _ = codec::frame_length(*header);
    }
}

/// A frame between two nodes.
fn peer(bytes: &[u8]) {
    decode::<PeerHello>(bytes);
    if let Some(PeerMessage::Sequential(run)) = decode::<PeerMessage>(bytes) {
        let PageRun { pages, .. } = run;
        if let Some(messages) = run.messages() {
            assert_eq!(messages.count(), usize::from(pages));
        }
    }
}

/// Decodes a value; what is encoded again is the same value.
fn decode<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) -> Option<T> {
    let (value, rest) = codec::decode::<T>(bytes).ok()?;
    assert!(rest.len() < bytes.len() || bytes.is_empty());
    let mut again = Vec::new();
    codec::encode(&value, &[], &mut again).expect("what was decoded can be encoded");
    let (same, rest) = codec::decode::<T>(&again).expect("what was encoded can be decoded");
    assert!(rest.is_empty());
    assert_eq!(same, value);
    Some(value)
}
