//! What was written to a page: the bytes in which it differs from its twin.
//!
//! A diff never contains a byte that was not written, not even where all of the page is shorter:
//! another node may have written that byte, and would have it undone. So the format names single
//! bytes, and is short both for a counter and for every other word of a page:
//!
//! ```text
//! one bit for each word (8 bytes) of the page: whether it was written to
//! for each such word:  one bit for each of its bytes,  then those bytes
//! ```

use serde::{Deserialize, Serialize};

const WORD: usize = size_of::<u64>();

/// The bytes of a page that were written, and where they are.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Diff(Vec<u8>);

impl Diff {
    /// What makes `now` of `twin`; `None` if they are the same. Their length is one, and whole
    /// words.
    ///
    /// # Panics
    /// If it is not.
    #[must_use]
    pub fn between(twin: &[u8], now: &[u8]) -> Option<Diff> {
        assert!(twin.len() == now.len() && twin.len().is_multiple_of(WORD));
        if twin == now {
            return None;
        }
        let mut diff = Vec::with_capacity(2 * twin.len());
        diff.resize(bitmap_length(twin.len()), 0);
        let words = twin.chunks_exact(WORD).zip(now.chunks_exact(WORD));
        for (index, (old, new)) in words.enumerate() {
            if old == new {
                continue;
            }
            diff[index / 8] |= 1 << (index % 8);
            let mask = (0..WORD).fold(0, |mask, byte| {
                mask | u8::from(old[byte] != new[byte]) << byte
            });
            diff.push(mask);
            match mask {
                0xff => diff.extend_from_slice(new),
                0x0f => diff.extend_from_slice(&new[..WORD / 2]),
                0xf0 => diff.extend_from_slice(&new[WORD / 2..]),
                _ => diff.extend(
                    (0..WORD)
                        .filter(|byte| mask & 1 << byte != 0)
                        .map(|at| new[at]),
                ),
            }
        }
        Some(Diff(diff))
    }

    /// A diff of a page of `length` bytes that came from elsewhere; `None` if it is malformed.
    #[must_use]
    pub fn parse(bytes: &[u8], length: usize) -> Option<Diff> {
        let words = length / WORD;
        let (bitmap, mut rest) = bytes.split_at_checked(bitmap_length(length))?;
        for (at, bits) in bitmap.iter().enumerate() {
            if at * 8 + 8 - bits.leading_zeros() as usize > words {
                return None;
            }
            for _ in 0..bits.count_ones() {
                let (mask, following) = rest.split_first()?;
                rest = following.get(mask.count_ones() as usize..)?;
            }
        }
        rest.is_empty().then(|| Diff(bytes.to_vec()))
    }

    /// As it travels.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Gives each run of written bytes inside a word: offset in the page, and the bytes.
    pub fn for_each_run(&self, length: usize, mut write: impl FnMut(usize, &[u8])) {
        let (bitmap, mut rest) = self.0.split_at(bitmap_length(length));
        for index in (0..length / WORD).filter(|index| bitmap[index / 8] & 1 << (index % 8) != 0) {
            let (mask, bytes) = rest.split_at(1);
            let mut mask = mask[0];
            rest = bytes;
            let mut offset = index * WORD;
            while mask != 0 {
                let skip = mask.trailing_zeros();
                mask >>= skip;
                offset += skip as usize;
                let run = mask.trailing_ones() as usize;
                let (run_bytes, following) = rest.split_at(run);
                write(offset, run_bytes);
                rest = following;
                offset += run;
                mask = mask.checked_shr(run as u32).unwrap_or(0);
            }
        }
    }

    /// Puts the bytes into a page.
    pub fn apply(&self, page: &mut [u8]) {
        self.for_each_run(page.len(), |offset, bytes| {
            page[offset..offset + bytes.len()].copy_from_slice(bytes);
        });
    }
}

/// Bytes that say which words of a page were written to.
fn bitmap_length(length: usize) -> usize {
    (length / WORD).div_ceil(8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::Random;

    #[test]
    fn a_diff_has_what_was_written_and_nothing_else() {
        let random = &mut Random(1);
        for length in [8, 64, 72, 4096] {
            for _ in 0..200 {
                let twin: Vec<u8> = (0..length).map(|_| random.below(256) as u8).collect();
                let mut now = twin.clone();
                let density = 1 + random.below(20);
                for byte in &mut now {
                    if random.below(density) == 0 {
                        *byte = byte.wrapping_add(1 + random.below(255) as u8);
                    }
                }
                let Some(diff) = Diff::between(&twin, &now) else {
                    assert_eq!(twin, now);
                    continue;
                };
                let mut other: Vec<u8> = twin.iter().map(|byte| byte.wrapping_add(1)).collect();
                let before = other.clone();
                let received = Diff::parse(diff.as_bytes(), length).expect("well-formed");
                received.apply(&mut other);
                for at in 0..length {
                    let written = twin[at] != now[at];
                    assert_eq!(other[at], if written { now[at] } else { before[at] });
                }
            }
        }
    }

    #[test]
    fn pages_that_are_the_same_have_no_diff() {
        assert_eq!(Diff::between(&[7; 4096], &[7; 4096]), None);
    }

    #[test]
    fn alternate_words_are_shorter_than_the_page() {
        let now: Vec<u8> = (0..4096).map(|at| u8::from(at / 4 % 2 == 0)).collect();
        let diff = Diff::between(&[0; 4096], &now).expect("they differ");
        assert!(diff.as_bytes().len() < 2700);
    }

    #[test]
    fn malformed_diffs_are_refused() {
        let now: Vec<u8> = (0..4096).map(|at| u8::from(at % 3 == 0)).collect();
        let diff = Diff::between(&[0; 4096], &now).expect("they differ");
        let bytes = diff.as_bytes();
        assert_eq!(Diff::parse(&bytes[..bytes.len() - 1], 4096), None);
        assert_eq!(Diff::parse(&[bytes, &[0]].concat(), 4096), None);
        assert_eq!(Diff::parse(&[], 4096), None);
        assert_eq!(
            Diff::parse(&[0b10, 1, 1], 8),
            None,
            "of a word past the end"
        );
        let random = &mut Random(2);
        for _ in 0..20_000 {
            let garbage: Vec<u8> = (0..random.below(40))
                .map(|_| random.below(256) as u8)
                .collect();
            if let Some(diff) = Diff::parse(&garbage, 64) {
                diff.apply(&mut [0; 64]);
            }
        }
    }
}
