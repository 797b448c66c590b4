//! The files of a directory of certificates: where they are, what of them is believed, and how they
//! are written.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::PkiError;

/// Of a key: its owner's only.
const KEY_MODE: u32 = 0o600;
/// Of what everybody may know.
const PUBLIC_MODE: u32 = 0o644;

pub(super) fn certificate_path(directory: &Path, stem: &str) -> PathBuf {
    directory.join(format!("{stem}.pem"))
}

pub(super) fn key_path(directory: &Path, stem: &str) -> PathBuf {
    directory.join(format!("{stem}.key"))
}

pub(super) fn io_error(path: &Path) -> impl FnOnce(io::Error) -> PkiError {
    |cause| PkiError::Io {
        path: path.to_owned(),
        cause,
    }
}

/// Refuses a directory in which everybody could replace what is trusted.
pub(super) fn check_directory(path: &Path) -> Result<(), PkiError> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.permissions().mode() & 0o002 != 0 => Err(PkiError::Open {
            path: path.to_owned(),
        }),
        // Of one that is not there, the missing file says more.
        _ => Ok(()),
    }
}

pub(super) fn read(path: &Path, remedy: impl FnOnce() -> String) -> Result<Vec<u8>, PkiError> {
    fs::read(path).map_err(|cause| match cause.kind() {
        io::ErrorKind::NotFound => PkiError::Missing {
            path: path.to_owned(),
            remedy: remedy(),
        },
        _ => PkiError::Io {
            path: path.to_owned(),
            cause,
        },
    })
}

/// The certificates in a file, one at least.
pub(super) fn read_certificates(
    path: &Path,
    remedy: impl FnOnce() -> String,
) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let malformed = |reason: String| PkiError::Malformed {
        path: path.to_owned(),
        expected: "certificate in PEM",
        reason,
    };
    let certificates = CertificateDer::pem_slice_iter(&read(path, remedy)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| malformed(error.to_string()))?;
    if certificates.is_empty() {
        return Err(malformed("there is none".to_owned()));
    }
    Ok(certificates)
}

/// The text of a private key that not everybody can read.
pub(super) fn read_key_pem(
    path: &Path,
    remedy: impl FnOnce() -> String,
) -> Result<Vec<u8>, PkiError> {
    let pem = read(path, remedy)?;
    let mode = fs::metadata(path)
        .map_err(io_error(path))?
        .permissions()
        .mode();
    if mode & 0o007 != 0 {
        return Err(PkiError::Exposed {
            path: path.to_owned(),
        });
    }
    Ok(pem)
}

pub(super) fn read_key(
    path: &Path,
    remedy: impl FnOnce() -> String,
) -> Result<PrivateKeyDer<'static>, PkiError> {
    let pem = read_key_pem(path, remedy)?;
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| malformed_key(path, error.to_string()))
}

pub(super) fn malformed_key(path: &Path, reason: String) -> PkiError {
    PkiError::Malformed {
        path: path.to_owned(),
        expected: "private key in PEM",
        reason,
    }
}

/// Writes a key and its certificate; refuses if either exists.
pub(super) fn write_pair(
    directory: &Path,
    stem: &str,
    certificate: &str,
    key: &str,
) -> Result<(), PkiError> {
    let certificate_path = certificate_path(directory, stem);
    if certificate_path.exists() {
        return Err(PkiError::Exists {
            path: certificate_path,
        });
    }
    write_new(&key_path(directory, stem), key, KEY_MODE)?;
    write_new(&certificate_path, certificate, PUBLIC_MODE)
}

/// Writes a key and its certificate in the place of others, both of which are on the disk before
/// either takes its place.
pub(super) fn replace_pair(
    directory: &Path,
    stem: &str,
    certificate: &str,
    key: &str,
) -> Result<(), PkiError> {
    let key = Replacement::write(key_path(directory, stem), key, KEY_MODE)?;
    let certificate =
        Replacement::write(certificate_path(directory, stem), certificate, PUBLIC_MODE)?;
    key.take_place()?;
    certificate.take_place()
}

/// Writes what everybody may know, in the place of what was there.
pub(super) fn replace(path: PathBuf, contents: &str) -> Result<(), PkiError> {
    Replacement::write(path, contents, PUBLIC_MODE)?.take_place()
}

/// A file that is to take another's place.
struct Replacement {
    written: PathBuf,
    path: PathBuf,
}

impl Replacement {
    fn write(path: PathBuf, contents: &str, mode: u32) -> Result<Replacement, PkiError> {
        let mut written = path.clone().into_os_string();
        written.push(".new");
        let written = PathBuf::from(written);
        // What an attempt that was interrupted has left.
        match fs::remove_file(&written) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                return Err(PkiError::Io {
                    path: written,
                    cause,
                });
            }
            _ => {}
        }
        write_new(&written, contents, mode)?;
        Ok(Replacement { written, path })
    }

    fn take_place(self) -> Result<(), PkiError> {
        fs::rename(self.written, &self.path).map_err(io_error(&self.path))
    }
}

fn write_new(path: &Path, contents: &str, mode: u32) -> Result<(), PkiError> {
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| {
            file.write_all(contents.as_bytes())?;
            file.sync_all()
        });
    written.map_err(|cause| match cause.kind() {
        io::ErrorKind::AlreadyExists => PkiError::Exists {
            path: path.to_owned(),
        },
        _ => PkiError::Io {
            path: path.to_owned(),
            cause,
        },
    })
}
