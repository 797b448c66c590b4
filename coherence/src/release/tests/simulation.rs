//! Random runs of larger clusters with random programs, to their end.
