//! The cluster's certificates, as files in one directory.
//!
//! | file | what | who needs it |
//! |---|---|---|
//! | `ca.pem`, `ca.key` | the certificate authority | `ca.pem` everybody; `ca.key` whoever issues |
//! | `coordinator.pem`, `coordinator.key` | the coordinator | its host |
//! | `NAME.pem`, `NAME.key` | node NAME | its host |
//!
//! Keys are readable by their owner only and nothing is ever overwritten. What [`Identity::load`]
//! returns has been checked: the certificate comes from this authority, is valid now, names the
//! peer it was loaded for, and its key fits. Every error names the file and what to do about it.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use time::OffsetDateTime;

use crate::peer::{AUTHORITY, Peer};

/// How long an authority is valid: ten years.
const AUTHORITY_VALIDITY: Duration = Duration::from_secs(3650 * 24 * 3600);
/// How long a certificate is valid unless told otherwise: two years.
pub const DEFAULT_VALIDITY: Duration = Duration::from_secs(730 * 24 * 3600);
/// Certificates are valid from this long before their making, for hosts whose clocks are behind.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);
/// The authority's name. It is what ties certificates to `ca.pem` before any signature is
/// checked, so it is part of the format.
const AUTHORITY_NAME: &str = "migshm cluster authority";

/// Why certificates cannot be made or used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum PkiError {
    /// A file is not there.
    #[error("{} does not exist; {remedy}", path.display())]
    Missing { path: PathBuf, remedy: String },
    /// A file cannot be read or written.
    #[error("{}: {cause}", path.display())]
    Io { path: PathBuf, cause: io::Error },
    /// A file would be overwritten.
    #[error("{} exists and is never overwritten; remove it if it is no longer needed", path.display())]
    Exists { path: PathBuf },
    /// Others than its owner's group can read a key.
    #[error("{} can be read by everybody; chmod 600 it, or issue a new one if it may have leaked", path.display())]
    Exposed { path: PathBuf },
    /// A file does not contain what its name says.
    #[error("{} does not hold a {expected} in PEM: {reason}", path.display())]
    Malformed {
        path: PathBuf,
        expected: &'static str,
        reason: String,
    },
    /// A certificate was issued by another authority.
    #[error("{} was not issued by {}; copy the ca.pem of the cluster that issued it, or issue it anew", path.display(), authority.display())]
    OtherAuthority { path: PathBuf, authority: PathBuf },
    /// A certificate's time is over.
    #[error("{} expired on {day}; issue it anew", path.display())]
    Expired { path: PathBuf, day: String },
    /// A certificate's time has not begun.
    #[error("{} is not valid before {day}; check this host's clock", path.display())]
    NotYetValid { path: PathBuf, day: String },
    /// A certificate was issued for something else.
    #[error("{} does not belong to {expected}; issue the certificate of {expected}", path.display())]
    OtherPeer { path: PathBuf, expected: Peer },
    /// A key is another certificate's.
    #[error("{} is not the key of {}; restore the pair, or remove both and issue them anew", key.display(), certificate.display())]
    OtherKey { key: PathBuf, certificate: PathBuf },
    /// The certificate library refuses.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// What a daemon proves itself with, and what it trusts.
#[derive(Debug)]
pub struct Identity {
    pub(crate) peer: Peer,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) authority: CertificateDer<'static>,
    expires: SystemTime,
}

impl Identity {
    /// Loads the certificate and the key of `peer`, and the authority's certificate.
    ///
    /// # Errors
    /// Any [`PkiError`] that keeps them from working.
    pub fn load(directory: &Path, peer: &Peer) -> Result<Identity, PkiError> {
        let certificate = Certificate::load(directory, peer)?;
        let key_path = key_path(directory, peer.file_stem());
        let key = read_key(&key_path, peer)?;
        let identity = Identity {
            peer: peer.clone(),
            certificate: certificate.der,
            key,
            authority: certificate.authority,
            expires: certificate.expires,
        };
        if !crate::endpoint::key_fits(&identity) {
            return Err(PkiError::OtherKey {
                key: key_path,
                certificate: certificate_path(directory, peer.file_stem()),
            });
        }
        Ok(identity)
    }

    /// Whose identity this is.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Until when it is valid.
    #[must_use]
    pub fn expires(&self) -> SystemTime {
        self.expires
    }
}

/// Creates the cluster's authority, `ca.pem` and `ca.key`, and the directory if need be.
///
/// # Errors
/// [`PkiError::Exists`], [`PkiError::Io`].
pub fn create_authority(directory: &Path) -> Result<(), PkiError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(io_error(directory))?;
    let key = KeyPair::generate()?;
    let certificate = authority_params(AUTHORITY_VALIDITY).self_signed(&key)?;
    write_pair(directory, AUTHORITY, &certificate.pem(), &key)
}

/// Issues the certificate and the key of `peer`, valid from now for `validity`
/// ([`DEFAULT_VALIDITY`] if in doubt).
///
/// # Errors
/// [`PkiError::Exists`] before anything is written; whatever is wrong with the authority.
pub fn issue(directory: &Path, peer: &Peer, validity: Duration) -> Result<(), PkiError> {
    let authority_key_path = key_path(directory, AUTHORITY);
    let authority_key = read_pem(&authority_key_path, || no_authority(directory))?;
    let authority_key = std::str::from_utf8(&authority_key)
        .map_err(|e| e.to_string())
        .and_then(|pem| KeyPair::from_pem(pem).map_err(|e| e.to_string()))
        .map_err(|reason| PkiError::Malformed {
            path: authority_key_path.clone(),
            expected: "private key",
            reason,
        })?;
    let issuer = Issuer::new(authority_params(AUTHORITY_VALIDITY), authority_key);

    let mut params = CertificateParams::new(vec![peer.dns_name()])?;
    params.distinguished_name = common_name(peer.file_stem());
    (params.not_before, params.not_after) = lifetime(validity);
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // A node is a client to the coordinator and to older nodes, and a server to younger ones.
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, &issuer)?;

    let authority = read_certificate(&certificate_path(directory, AUTHORITY), || {
        no_authority(directory)
    })?;
    if verify(certificate.der(), &authority, UnixTime::now()).is_err() {
        return Err(PkiError::OtherKey {
            key: authority_key_path,
            certificate: certificate_path(directory, AUTHORITY),
        });
    }
    write_pair(directory, peer.file_stem(), &certificate.pem(), &key)
}

/// Whose certificates a directory holds, in the order of their names, each with the end of its
/// validity or what is wrong with it.
///
/// # Errors
/// [`PkiError::Io`] if the directory cannot be read.
#[allow(clippy::type_complexity)]
pub fn list(directory: &Path) -> Result<Vec<(Peer, Result<SystemTime, PkiError>)>, PkiError> {
    let mut peers = Vec::new();
    for entry in fs::read_dir(directory).map_err(io_error(directory))? {
        let name = entry.map_err(io_error(directory))?.file_name();
        let Some(stem) = name.to_str().and_then(|n| n.strip_suffix(".pem")) else {
            continue;
        };
        let peer = if stem == Peer::Coordinator.file_stem() {
            Some(Peer::Coordinator)
        } else {
            Peer::node(stem).ok()
        };
        peers.extend(peer);
    }
    peers.sort_by(|a, b| a.file_stem().cmp(b.file_stem()));
    Ok(peers
        .into_iter()
        .map(|peer| {
            let expires =
                Certificate::load(directory, &peer).map(|certificate| certificate.expires);
            (peer, expires)
        })
        .collect())
}

/// A certificate that was checked against its authority.
struct Certificate {
    der: CertificateDer<'static>,
    authority: CertificateDer<'static>,
    expires: SystemTime,
}

impl Certificate {
    fn load(directory: &Path, peer: &Peer) -> Result<Certificate, PkiError> {
        let authority_path = certificate_path(directory, AUTHORITY);
        let authority = read_certificate(&authority_path, || no_authority(directory))?;
        let path = certificate_path(directory, peer.file_stem());
        let der = read_certificate(&path, || not_issued(peer))?;
        let expires = verify(&der, &authority, UnixTime::now()).map_err(|error| match error {
            webpki::Error::CertExpired { not_after, .. } => PkiError::Expired {
                path: path.clone(),
                day: day(not_after),
            },
            webpki::Error::CertNotValidYet { not_before, .. } => PkiError::NotYetValid {
                path: path.clone(),
                day: day(not_before),
            },
            webpki::Error::BadDer => PkiError::Malformed {
                path: path.clone(),
                expected: "certificate",
                reason: error.to_string(),
            },
            _ => PkiError::OtherAuthority {
                path: path.clone(),
                authority: authority_path.clone(),
            },
        })?;
        if Peer::of_certificate(&der).as_ref() != Some(peer) {
            return Err(PkiError::OtherPeer {
                path,
                expected: peer.clone(),
            });
        }
        Ok(Certificate {
            der,
            authority,
            expires,
        })
    }
}

/// Checks a certificate as a peer would; returns the end of its validity.
fn verify(
    certificate: &CertificateDer<'_>,
    authority: &CertificateDer<'_>,
    now: UnixTime,
) -> Result<SystemTime, webpki::Error> {
    let anchor = webpki::anchor_from_trusted_cert(authority)?;
    let certificate = webpki::EndEntityCert::try_from(certificate)?;
    let check = |now| {
        certificate
            .verify_for_usage(
                rustls::crypto::ring::default_provider()
                    .signature_verification_algorithms
                    .all,
                std::slice::from_ref(&anchor),
                &[],
                now,
                webpki::KeyUsage::server_auth(),
                None,
                None,
            )
            .map(|_| ())
    };
    check(now)?;
    // `webpki` tells when a validity ends only when it has ended.
    let end_of_time = UnixTime::since_unix_epoch(Duration::from_secs(u64::MAX));
    match check(end_of_time) {
        Err(webpki::Error::CertExpired { not_after, .. }) => {
            Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(not_after.as_secs()))
        }
        Err(other) => Err(other),
        Ok(()) => unreachable!("no certificate is valid for ever"),
    }
}

fn authority_params(validity: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(AUTHORITY_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = lifetime(validity);
    params
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

fn lifetime(validity: Duration) -> (OffsetDateTime, OffsetDateTime) {
    let now = SystemTime::now();
    (
        OffsetDateTime::from(now - CLOCK_SKEW),
        OffsetDateTime::from(now + validity),
    )
}

fn day(time: UnixTime) -> String {
    OffsetDateTime::from(SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs()))
        .date()
        .to_string()
}

fn certificate_path(directory: &Path, stem: &str) -> PathBuf {
    directory.join(format!("{stem}.pem"))
}

fn key_path(directory: &Path, stem: &str) -> PathBuf {
    directory.join(format!("{stem}.key"))
}

fn no_authority(directory: &Path) -> String {
    format!(
        "create the authority with `migshm pki init --dir {}`, or copy it here",
        directory.display()
    )
}

fn not_issued(peer: &Peer) -> String {
    match peer {
        Peer::Coordinator => "issue it with `migshm pki coordinator`, or copy it here".to_owned(),
        Peer::Node(name) => {
            format!("issue it with `migshm pki node --name {name}`, or copy it here")
        }
    }
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> PkiError + '_ {
    |cause| PkiError::Io {
        path: path.to_owned(),
        cause,
    }
}

fn read_pem(path: &Path, remedy: impl FnOnce() -> String) -> Result<Vec<u8>, PkiError> {
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

fn read_certificate(
    path: &Path,
    remedy: impl FnOnce() -> String,
) -> Result<CertificateDer<'static>, PkiError> {
    CertificateDer::from_pem_slice(&read_pem(path, remedy)?).map_err(|error| PkiError::Malformed {
        path: path.to_owned(),
        expected: "certificate",
        reason: error.to_string(),
    })
}

fn read_key(path: &Path, peer: &Peer) -> Result<PrivateKeyDer<'static>, PkiError> {
    let pem = read_pem(path, || not_issued(peer))?;
    let mode = fs::metadata(path)
        .map_err(io_error(path))?
        .permissions()
        .mode();
    if mode & 0o007 != 0 {
        return Err(PkiError::Exposed {
            path: path.to_owned(),
        });
    }
    PrivateKeyDer::from_pem_slice(&pem).map_err(|error| PkiError::Malformed {
        path: path.to_owned(),
        expected: "private key",
        reason: error.to_string(),
    })
}

/// Writes the key, then the certificate; refuses if either exists.
fn write_pair(
    directory: &Path,
    stem: &str,
    certificate: &str,
    key: &KeyPair,
) -> Result<(), PkiError> {
    let certificate_path = certificate_path(directory, stem);
    if certificate_path.exists() {
        return Err(PkiError::Exists {
            path: certificate_path,
        });
    }
    write_new(key_path(directory, stem), &key.serialize_pem(), 0o600)?;
    write_new(certificate_path, certificate, 0o644)
}

fn write_new(path: PathBuf, contents: &str, mode: u32) -> Result<(), PkiError> {
    let written = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&path)
        .and_then(|mut file| file.write_all(contents.as_bytes()));
    written.map_err(|cause| match cause.kind() {
        io::ErrorKind::AlreadyExists => PkiError::Exists { path },
        _ => PkiError::Io { path, cause },
    })
}
