//! A coordinator's state in etcd: simulated, where answers are lost and requests late; and in a real one.

mod real;
mod simulation;
