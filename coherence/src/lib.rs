//! The coherence protocol of `sequential` segments, as a pure state machine.
//!
//! Each node has one [`Engine`]: events in ([`Input`]), effects out ([`Action`]).
#![forbid(unsafe_code)]

mod engine;
mod sets;

pub use engine::{Action, Body, Config, Counters, Engine, Fill, Input, Memory, Time};
pub use sets::{NodeSet, PageSet};
