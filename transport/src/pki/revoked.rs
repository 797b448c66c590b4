//! Certificates that count no longer: their serial numbers, in the file `revoked`.
//!
//! One in each line, in hexadecimal; what follows a `#` is for people. A line that is not understood
//! makes the whole file useless: to ignore it would be to trust a certificate that somebody meant to
//! name.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;

use super::PkiError;
use super::files::{self, replace};

/// What nobody trusts any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Revoked(BTreeSet<Vec<u8>>);

impl Revoked {
    /// What a directory says; nothing is revoked where there is no file.
    pub(super) fn load(directory: &Path) -> Result<Revoked, PkiError> {
        let path = path(directory);
        let text = read(&path)?;
        let numbers = text.lines().enumerate().filter_map(|(at, line)| {
            let number = line.split('#').next().unwrap_or_default().trim();
            let malformed = || PkiError::Malformed {
                path: path.clone(),
                expected: "serial number in every line",
                reason: format!("line {}: {number:?}", at + 1),
            };
            (!number.is_empty()).then(|| parse(number).ok_or_else(malformed))
        });
        numbers.collect::<Result<_, _>>().map(Revoked)
    }

    /// Whether a certificate counts no longer.
    pub(crate) fn holds(&self, certificate: &CertificateDer<'_>) -> bool {
        self.holds_number(&serial(certificate))
    }

    /// Whether the certificate with this serial number counts no longer.
    pub(crate) fn holds_number(&self, serial: &[u8]) -> bool {
        self.0.contains(serial)
    }
}

/// Adds a certificate to the file, with a word about it.
pub(super) fn add(
    directory: &Path,
    certificate: &CertificateDer<'_>,
    about: &str,
) -> Result<(), PkiError> {
    if Revoked::load(directory)?.holds(certificate) {
        return Ok(());
    }
    let path = path(directory);
    let mut text = read(&path)?;
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    for byte in serial(certificate) {
        let _ = write!(text, "{byte:02x}");
    }
    let _ = writeln!(text, " # {about}");
    replace(path, &text)
}

/// A certificate's number, which no other of its authority has; empty if it is no certificate.
pub(crate) fn serial(certificate: &CertificateDer<'_>) -> Vec<u8> {
    webpki::EndEntityCert::try_from(certificate)
        .map(|certificate| without_zeros(certificate.serial()).to_vec())
        .unwrap_or_default()
}

fn path(directory: &Path) -> PathBuf {
    directory.join("revoked")
}

fn read(path: &Path) -> Result<String, PkiError> {
    let bytes = match files::read(path, String::new) {
        Err(PkiError::Missing { .. }) => Vec::new(),
        bytes => bytes?,
    };
    String::from_utf8(bytes).map_err(|error| PkiError::Io {
        path: path.to_owned(),
        cause: io::Error::new(io::ErrorKind::InvalidData, error),
    })
}

fn parse(number: &str) -> Option<Vec<u8>> {
    let (pairs, []) = number.as_bytes().as_chunks::<2>() else {
        return None;
    };
    let byte = |pair: &[u8; 2]| {
        let text = std::str::from_utf8(pair).ok()?;
        // `from_str_radix` would take a sign.
        let digits = pair.iter().all(u8::is_ascii_hexdigit);
        u8::from_str_radix(text, 16).ok().filter(|_| digits)
    };
    let bytes = pairs.iter().map(byte).collect::<Option<Vec<u8>>>()?;
    Some(without_zeros(&bytes).to_vec())
}

/// The same number, whichever way it was written.
fn without_zeros(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|&&byte| byte == 0).count();
    &number[zeros..]
}
