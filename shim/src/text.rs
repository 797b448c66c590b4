//! Strings of a fixed capacity: paths and messages without `malloc`.

use std::ffi::CStr;
use std::fmt;

/// Up to `N - 1` bytes and a NUL. What does not fit is cut off, and remembered as cut off.
#[derive(Clone, Copy)]
pub struct Text<const N: usize> {
    bytes: [u8; N],
    length: usize,
    truncated: bool,
}

impl<const N: usize> Text<N> {
    pub const fn new() -> Self {
        Text {
            bytes: [0; N],
            length: 0,
            truncated: false,
        }
    }

    /// Appends; a NUL byte ends what is appended.
    pub fn push(&mut self, bytes: &[u8]) {
        let bytes = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
        let fits = bytes.len().min(N - 1 - self.length);
        self.bytes[self.length..][..fits].copy_from_slice(&bytes[..fits]);
        self.length += fits;
        self.truncated |= fits < bytes.len();
    }

    /// Builder form of [`Text::push`].
    pub fn with(mut self, bytes: &[u8]) -> Self {
        self.push(bytes);
        self
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    pub fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.bytes).expect("the last byte is never written")
    }

    /// Whether something did not fit.
    pub fn is_truncated(&self) -> bool {
        self.truncated
    }
}

impl<const N: usize> fmt::Write for Text<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text.as_bytes());
        Ok(())
    }
}

impl<const N: usize> fmt::Display for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.as_bytes().utf8_chunks() {
            f.write_str(chunk.valid())?;
            if !chunk.invalid().is_empty() {
                f.write_str("?")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_cut_off_and_remembered() {
        let text = Text::<4>::new().with(b"ab");
        assert_eq!(text.as_c_str(), c"ab");
        assert!(!text.is_truncated());
        let text = text.with(b"cd");
        assert_eq!(text.as_bytes(), b"abc");
        assert!(text.is_truncated());
    }
}
