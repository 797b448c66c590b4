//! Messages to bytes and back: the only module that knows the encoding (bincode).
//!
//! A message is a serde value in bincode's standard configuration; raw bytes may follow it, and
//! the decoder hands back whatever is left. On a packet socket the packet is the frame; on a
//! stream a frame is a little-endian `u32` length and that many bytes.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::limits::MAX_REMOTE;

/// Bytes of a frame's length.
pub const FRAME_HEADER: usize = 4;

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The bytes do not encode a value of the expected type.
    #[error("malformed message: {0}")]
    Malformed(#[from] bincode::error::DecodeError),
    /// A frame announces more than [`MAX_REMOTE`] bytes.
    #[error("message of {0} bytes exceeds the limit of {MAX_REMOTE}")]
    TooLarge(usize),
    /// The value does not fit the buffer, or cannot be encoded.
    #[error("cannot encode message: {0}")]
    Unencodable(#[from] bincode::error::EncodeError),
}

/// Encoded values may not claim more than this, so that a decoder's allocations are bounded.
fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MAX_REMOTE>()
}

/// Encodes `message` into the start of `buffer`, without allocating; returns its length.
///
/// # Errors
/// [`CodecError::Unencodable`] if the buffer is too small.
pub fn encode_into<T: Serialize>(message: &T, buffer: &mut [u8]) -> Result<usize, CodecError> {
    Ok(bincode::serde::encode_into_slice(
        message,
        buffer,
        config(),
    )?)
}

/// Appends `message` and then `raw` to `buffer` (no frame).
///
/// # Errors
/// [`CodecError::Unencodable`], which the types of this crate never cause.
pub fn encode<T: Serialize>(
    message: &T,
    raw: &[u8],
    buffer: &mut Vec<u8>,
) -> Result<(), CodecError> {
    bincode::serde::encode_into_std_write(message, buffer, config())?;
    buffer.extend_from_slice(raw);
    Ok(())
}

/// Decodes a message; returns it with the raw bytes that follow it.
///
/// # Errors
/// [`CodecError::Malformed`].
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, &[u8]), CodecError> {
    let (message, used) = bincode::serde::decode_from_slice(bytes, config())?;
    Ok((message, &bytes[used..]))
}

/// Encodes what is to be stored: it may be of any size.
///
/// # Errors
/// [`CodecError::Unencodable`], which the types of this project never cause.
pub fn encode_stored<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    Ok(bincode::serde::encode_to_vec(
        value,
        bincode::config::standard(),
    )?)
}

/// Decodes what [`encode_stored`] gave, which is trusted not to claim more than there is memory for.
///
/// # Errors
/// [`CodecError::Malformed`], also if anything follows.
pub fn decode_stored<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let config = bincode::config::standard();
    let (value, used) = bincode::serde::decode_from_slice(bytes, config)?;
    if used != bytes.len() {
        let rest = bytes.len() - used;
        let excess = format!("{rest} bytes too many");
        return Err(bincode::error::DecodeError::OtherString(excess).into());
    }
    Ok(value)
}

/// Appends a frame with `message` and `raw` to `buffer`.
///
/// # Errors
/// [`CodecError::TooLarge`] if the frame would exceed [`MAX_REMOTE`].
pub fn encode_frame<T: Serialize>(
    message: &T,
    raw: &[u8],
    buffer: &mut Vec<u8>,
) -> Result<(), CodecError> {
    let start = buffer.len();
    buffer.extend_from_slice(&[0; FRAME_HEADER]);
    encode(message, raw, buffer)?;
    seal_frame(&mut buffer[start..]).inspect_err(|_| buffer.truncate(start))
}

/// Writes the length of a frame, whose raw bytes may have been appended since it was encoded,
/// into its header.
///
/// # Errors
/// [`CodecError::TooLarge`] if it exceeds [`MAX_REMOTE`].
///
/// # Panics
/// If `frame` is shorter than a header.
pub fn seal_frame(frame: &mut [u8]) -> Result<(), CodecError> {
    let (header, body) = frame.split_first_chunk_mut().expect("a frame has a header");
    if body.len() > MAX_REMOTE {
        return Err(CodecError::TooLarge(body.len()));
    }
    *header = u32::try_from(body.len())
        .expect("MAX_REMOTE fits")
        .to_le_bytes();
    Ok(())
}

/// Length of the frame body that `header` announces.
///
/// # Errors
/// [`CodecError::TooLarge`].
pub fn frame_length(header: [u8; FRAME_HEADER]) -> Result<usize, CodecError> {
    let length = u32::from_le_bytes(header) as usize;
    if length > MAX_REMOTE {
        Err(CodecError::TooLarge(length))
    } else {
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::{Call, SemBuf, SetMemory};
    use crate::local::ToNode;
    use proptest::prelude::*;

    #[test]
    fn raw_bytes_follow_the_message() {
        let ops = SemBuf {
            num: 1,
            op: -1,
            flags: 0,
        }
        .to_bytes();
        let message = ToNode::Call {
            id: 7,
            call: Call::SemOp {
                id: 3,
                memory: SetMemory::Wanted,
            },
        };
        let mut buffer = Vec::new();
        encode(&message, &ops, &mut buffer).unwrap();
        let (back, raw) = decode::<ToNode>(&buffer).unwrap();
        assert_eq!(back, message);
        assert_eq!(raw, ops);
    }

    #[test]
    fn a_frame_above_the_limit_is_refused() {
        let raw = vec![0; MAX_REMOTE];
        let mut buffer = vec![1, 2, 3];
        assert!(matches!(
            encode_frame(&1u64, &raw, &mut buffer),
            Err(CodecError::TooLarge(_))
        ));
        assert_eq!(buffer, [1, 2, 3]);
        assert!(matches!(
            frame_length(u32::MAX.to_le_bytes()),
            Err(CodecError::TooLarge(_))
        ));
    }

    proptest! {
        #[test]
        fn garbage_never_panics_the_decoder(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<ToNode>(&bytes);
            let _ = decode::<crate::local::FromNode>(&bytes);
            let _ = decode::<crate::control::ToCoordinator>(&bytes);
            let _ = decode::<crate::control::FromCoordinator>(&bytes);
            let _ = decode::<crate::page::PageRun>(&bytes);
        }
    }
}
