//! The engine in clusters whose every message is delivered by hand.

mod cluster;
mod hostile;
mod model;
mod simulation;
