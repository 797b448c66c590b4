//! The cluster's certificates, as files in one directory.
//!
//! | file | what | who needs it |
//! |---|---|---|
//! | `ca.pem` | the authorities that are trusted: the one that issues, then former ones | everybody |
//! | `ca.key` | the key of the one that issues | whoever issues |
//! | `coordinator.pem`, `coordinator.key` | the coordinator | its host |
//! | `NAME.pem`, `NAME.key` | node NAME | its host |
//! | `revoked` | serial numbers of certificates that count no longer, if there are any | everybody |
//!
//! Keys are readable by their owner only, and only what is asked to replaces anything. What
//! [`Identity::load`] returns has been checked: the certificate comes from one of these
//! authorities, is valid now, is not revoked, names the peer it was loaded for, and its key fits.
//! Every error names the file and what to do about it.
//!
//! An authority is replaced in three steps, between which the hosts get the new files: it is joined
//! by its successor ([`rotate_authority`]), all certificates are issued anew ([`renew`]), and the
//! former authority is trusted no longer ([`retire_authorities`]). At every moment all hosts trust
//! the certificates of all others.

mod authority;
mod files;
mod revoked;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use time::OffsetDateTime;

pub use authority::{create_authority, issue, renew, retire_authorities, revoke, rotate_authority};

use crate::peer::{AUTHORITY, Peer};
use files::{certificate_path, check_directory, io_error, key_path, read_certificates, read_key};
pub(crate) use revoked::{Revoked, serial};

/// How long a certificate is valid unless told otherwise: two years.
pub const DEFAULT_VALIDITY: Duration = Duration::from_secs(730 * 24 * 3600);

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
    /// Others than its owner's group can replace certificates and keys.
    #[error("everybody can put files into {}; chmod 700 it, and look at what is in it", path.display())]
    Open { path: PathBuf },
    /// A file does not contain what its name says.
    #[error("{} does not hold a {expected}: {reason}", path.display())]
    Malformed {
        path: PathBuf,
        expected: &'static str,
        reason: String,
    },
    /// A certificate was issued by another authority.
    #[error("{} was not issued by {}; copy the ca.pem of the cluster that issued it, or issue it anew ({})", path.display(), authority.display(), renewal(path))]
    OtherAuthority { path: PathBuf, authority: PathBuf },
    /// A certificate's time is over.
    #[error("{} expired on {day}; issue it anew ({})", path.display(), renewal(path))]
    Expired { path: PathBuf, day: String },
    /// A certificate's time has not begun.
    #[error("{} is not valid before {day}; check this host's clock", path.display())]
    NotYetValid { path: PathBuf, day: String },
    /// A certificate counts no longer.
    #[error("{} has been revoked; issue it anew ({})", path.display(), renewal(path))]
    Revoked { path: PathBuf },
    /// A certificate was issued for something else.
    #[error("{} does not belong to {expected}; issue the certificate of {expected}", path.display())]
    OtherPeer { path: PathBuf, expected: Peer },
    /// A key is another certificate's.
    #[error("{} is not the key of {}; restore the pair, or remove both and issue them anew", key.display(), certificate.display())]
    OtherKey { key: PathBuf, certificate: PathBuf },
    /// A certificate depends on an authority that is to go.
    #[error("{} was issued by an authority that is to retire; issue it anew first ({})", path.display(), renewal(path))]
    InUse { path: PathBuf },
    /// The certificate library refuses.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
}

/// The command that issues a certificate anew.
fn renewal(certificate: &Path) -> String {
    let directory = certificate.parent().unwrap_or(Path::new("."));
    let name = certificate.file_stem().unwrap_or_default();
    format!(
        "where ca.key is, `migshm pki renew --dir {} {}`",
        directory.display(),
        name.display()
    )
}

/// What a daemon proves itself with, and what it trusts.
#[derive(Debug)]
pub struct Identity {
    pub(crate) peer: Peer,
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
    pub(crate) authorities: Vec<CertificateDer<'static>>,
    pub(crate) revoked: Revoked,
    expires: SystemTime,
}

impl Identity {
    /// Loads the certificate and the key of `peer`, and whom it trusts.
    ///
    /// # Errors
    /// Any [`PkiError`] that keeps them from working.
    pub fn load(directory: &Path, peer: &Peer) -> Result<Identity, PkiError> {
        check_directory(directory)?;
        let authorities = load_authorities(directory)?;
        let revoked = Revoked::load(directory)?;
        let certificate = Certificate::load(directory, peer, &authorities, &revoked)?;
        let key_path = key_path(directory, peer.file_stem());
        let key = read_key(&key_path, || not_issued(directory, peer))?;
        let identity = Identity {
            peer: peer.clone(),
            certificate: certificate.der,
            key,
            authorities,
            revoked,
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

/// A certificate that works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Valid {
    /// The end of its validity.
    pub until: SystemTime,
    /// Whether the authority that issues now has issued it, and not a former one.
    pub current: bool,
}

/// Whose certificates a directory holds, in the order of their names, and what is wrong with each
/// that does not work.
///
/// # Errors
/// Any [`PkiError`] about the directory, the authorities, or what is revoked.
#[allow(clippy::type_complexity)]
pub fn list(directory: &Path) -> Result<Vec<(Peer, Result<Valid, PkiError>)>, PkiError> {
    let authorities = load_authorities(directory)?;
    let revoked = Revoked::load(directory)?;
    let peers = certified(directory)?.into_iter();
    Ok(peers
        .map(|peer| {
            let certificate = Certificate::load(directory, &peer, &authorities, &revoked);
            let valid = certificate.map(|certificate| Valid {
                until: certificate.expires,
                current: certificate.authority == 0,
            });
            (peer, valid)
        })
        .collect())
}

/// Who has a certificate in a directory, in the order of their names.
///
/// # Errors
/// [`PkiError::Io`] if the directory cannot be read.
pub fn certified(directory: &Path) -> Result<Vec<Peer>, PkiError> {
    let mut peers = Vec::new();
    for entry in fs::read_dir(directory).map_err(io_error(directory))? {
        let name = entry.map_err(io_error(directory))?.file_name();
        let stem = name.to_str().and_then(|name| name.strip_suffix(".pem"));
        peers.extend(stem.and_then(|stem| Peer::of_file_stem(stem).ok()));
    }
    peers.sort_by(|a, b| a.file_stem().cmp(b.file_stem()));
    Ok(peers)
}

/// A certificate that was checked against its authority.
struct Certificate {
    der: CertificateDer<'static>,
    /// Which of the authorities has issued it.
    authority: usize,
    expires: SystemTime,
}

impl Certificate {
    fn load(
        directory: &Path,
        peer: &Peer,
        authorities: &[CertificateDer<'static>],
        revoked: &Revoked,
    ) -> Result<Certificate, PkiError> {
        let path = certificate_path(directory, peer.file_stem());
        let [der, ..] = &read_certificates(&path, || not_issued(directory, peer))?[..] else {
            unreachable!("there is one at least");
        };
        let (authority, expires) =
            verify(der, authorities, UnixTime::now()).map_err(|error| match error {
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
                    expected: "certificate in PEM",
                    reason: error.to_string(),
                },
                _ => PkiError::OtherAuthority {
                    path: path.clone(),
                    authority: certificate_path(directory, AUTHORITY),
                },
            })?;
        if Peer::of_certificate(der).as_ref() != Some(peer) {
            return Err(PkiError::OtherPeer {
                path,
                expected: peer.clone(),
            });
        }
        if revoked.holds(der) {
            return Err(PkiError::Revoked { path });
        }
        Ok(Certificate {
            der: der.clone(),
            authority,
            expires,
        })
    }
}

/// Checks a certificate as a peer would; returns which authority has issued it, and the end of its
/// validity.
fn verify(
    certificate: &CertificateDer<'_>,
    authorities: &[CertificateDer<'_>],
    now: UnixTime,
) -> Result<(usize, SystemTime), webpki::Error> {
    let certificate = webpki::EndEntityCert::try_from(certificate)?;
    let check = |authority: &CertificateDer<'_>, now| {
        let anchor = webpki::anchor_from_trusted_cert(authority)?;
        certificate
            .verify_for_usage(
                rustls::crypto::ring::default_provider()
                    .signature_verification_algorithms
                    .all,
                &[anchor],
                &[],
                now,
                webpki::KeyUsage::server_auth(),
                None,
                None,
            )
            .map(|_| ())
    };
    let mut problem = webpki::Error::UnknownIssuer;
    for (index, authority) in authorities.iter().enumerate() {
        match check(authority, now) {
            Ok(()) => {
                // `webpki` tells when a validity ends only when it has ended.
                let end_of_time = UnixTime::since_unix_epoch(Duration::from_secs(u64::MAX));
                return match check(authority, end_of_time) {
                    Err(webpki::Error::CertExpired { not_after, .. }) => {
                        let end = Duration::from_secs(not_after.as_secs());
                        Ok((index, SystemTime::UNIX_EPOCH + end))
                    }
                    Err(other) => Err(other),
                    Ok(()) => unreachable!("no certificate is valid for ever"),
                };
            }
            Err(error) => problem = error,
        }
    }
    Err(problem)
}

/// The authorities that are trusted; the first is the one that issues.
fn load_authorities(directory: &Path) -> Result<Vec<CertificateDer<'static>>, PkiError> {
    let path = certificate_path(directory, AUTHORITY);
    read_certificates(&path, || no_authority(directory))
}

fn day(time: UnixTime) -> String {
    OffsetDateTime::from(SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs()))
        .date()
        .to_string()
}

fn no_authority(directory: &Path) -> String {
    format!(
        "create the authority with `migshm pki init --dir {}`, or copy it here",
        directory.display()
    )
}

fn not_issued(directory: &Path, peer: &Peer) -> String {
    let directory = directory.display();
    match peer {
        Peer::Coordinator => format!(
            "issue it where ca.key is with `migshm pki coordinator --dir {directory}`, or copy it here"
        ),
        Peer::Node(name) => format!(
            "issue it where ca.key is with `migshm pki node --dir {directory} --name {name}`, or copy it here"
        ),
    }
}
