//! Random changes to valid input, such as find what a decoder takes for granted.

use crate::random::Random;

/// Numbers at which something changes, in the first byte of the codec's integers or as they are.
const TURNING_POINTS: [u8; 10] = [0, 1, 2, 127, 128, 250, 251, 252, 253, 255];
/// Changes to one input at most.
const CHANGES: u64 = 8;
/// Longest input, in bytes.
const LONGEST: usize = 64 << 10;

/// One of the samples, changed in a few places. The seed says which and how.
///
/// # Panics
/// If there are no samples.
#[must_use]
pub fn mutate(samples: &[Vec<u8>], seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let random = &mut random;
    let mut bytes = samples[random.index(samples.len())].clone();
    for _ in 0..=random.below(CHANGES) {
        change(&mut bytes, samples, random);
    }
    bytes.truncate(LONGEST);
    bytes
}

fn change(bytes: &mut Vec<u8>, samples: &[Vec<u8>], random: &mut Random) {
    let at = random.index(bytes.len() + 1);
    let until = at + random.index(bytes.len() - at + 1).min(random.index(64) + 1);
    let byte = random.below(256) as u8;
    let turning_point = TURNING_POINTS[random.index(TURNING_POINTS.len())];
    match random.below(9) {
        0 => bytes.truncate(at),
        1 => drop(bytes.drain(at..until)),
        2 => bytes.insert(at, byte),
        3 => bytes.insert(at, turning_point),
        4 => {
            // A part twice.
            let part = bytes[at..until].to_vec();
            bytes.splice(at..at, part);
        }
        5 => {
            // The head of one, the tail of another.
            let other = &samples[random.index(samples.len())];
            let from = random.index(other.len() + 1);
            bytes.truncate(at);
            bytes.extend_from_slice(&other[from..]);
        }
        kind if at < bytes.len() => match kind {
            6 => bytes[at] ^= 1 << random.below(8),
            7 => bytes[at] = turning_point,
            _ => bytes[at] = byte,
        },
        _ => bytes.push(byte),
    }
}
