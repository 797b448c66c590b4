//! The side that issues: the authority, its certificates, their end.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::pki_types::{CertificateDer, UnixTime};
use time::OffsetDateTime;

use super::files::{
    certificate_path, check_directory, io_error, key_path, malformed_key, read, read_certificates,
    read_key_pem, replace, replace_pair, write_pair,
};
use super::{PkiError, load_authorities, no_authority, not_issued, revoked, verify};
use crate::peer::{AUTHORITY, Peer};

/// How long an authority is valid: ten years.
const AUTHORITY_VALIDITY: Duration = Duration::from_secs(3650 * 24 * 3600);
/// Certificates are valid from this long before their making, for hosts whose clocks are behind.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);
/// The authority's name. It is what ties certificates to `ca.pem` before any signature is
/// checked, so it is part of the format.
const AUTHORITY_NAME: &str = "migshm cluster authority";

/// Creates the cluster's authority, `ca.pem` and `ca.key`, and the directory if need be.
///
/// # Errors
/// [`PkiError::Exists`], [`PkiError::Open`], [`PkiError::Io`].
pub fn create_authority(directory: &Path) -> Result<(), PkiError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(io_error(directory))?;
    check_directory(directory)?;
    let (certificate, key) = new_authority()?;
    write_pair(directory, AUTHORITY, &certificate, &key)
}

/// Issues the certificate and the key of `peer`, valid from now for `validity`
/// ([`DEFAULT_VALIDITY`](super::DEFAULT_VALIDITY) if in doubt).
///
/// # Errors
/// [`PkiError::Exists`] before anything is written; whatever is wrong with the authority.
pub fn issue(directory: &Path, peer: &Peer, validity: Duration) -> Result<(), PkiError> {
    let (certificate, key) = make(directory, peer, validity)?;
    write_pair(directory, peer.file_stem(), &certificate, &key)
}

/// Issues `peer` another certificate and another key, in the place of those that are there. Those
/// count for as long as they are valid, unless they are revoked.
///
/// # Errors
/// [`PkiError::Missing`] if there are none; whatever is wrong with the authority.
pub fn renew(directory: &Path, peer: &Peer, validity: Duration) -> Result<(), PkiError> {
    let path = certificate_path(directory, peer.file_stem());
    read(&path, || not_issued(directory, peer))?;
    let (certificate, key) = make(directory, peer, validity)?;
    replace_pair(directory, peer.file_stem(), &certificate, &key)
}

/// Has another authority issue from now on. The former ones are trusted as before; their keys are
/// needed no more, and that of the last one is overwritten.
///
/// # Errors
/// Whatever is wrong with the present authority.
pub fn rotate_authority(directory: &Path) -> Result<(), PkiError> {
    load_issuer(directory)?;
    let path = certificate_path(directory, AUTHORITY);
    let former = read(&path, || no_authority(directory))?;
    let (certificate, key) = new_authority()?;
    let trusted = certificate + &String::from_utf8_lossy(&former);
    replace_pair(directory, AUTHORITY, &trusted, &key)
}

/// Ends the trust in all authorities but the one that issues. How many were trusted besides.
///
/// # Errors
/// [`PkiError::InUse`] if a certificate in the directory needs one of them; whatever is wrong with
/// the present authority.
pub fn retire_authorities(directory: &Path) -> Result<usize, PkiError> {
    let (_, authorities) = load_issuer(directory)?;
    for peer in super::certified(directory)? {
        let path = certificate_path(directory, peer.file_stem());
        let certificates = read_certificates(&path, || not_issued(directory, &peer))?;
        if verify(&certificates[0], &authorities, UnixTime::now()).is_ok_and(|(by, _)| by > 0) {
            return Err(PkiError::InUse { path });
        }
    }
    let path = certificate_path(directory, AUTHORITY);
    let text = read(&path, || no_authority(directory))?;
    let text = String::from_utf8_lossy(&text);
    const END: &str = "-----END CERTIFICATE-----";
    let first = text.split_inclusive(END).next().unwrap_or_default();
    replace(path, &format!("{}\n", first.trim()))?;
    Ok(authorities.len() - 1)
}

/// Adds the certificate of `peer` that is there to those that count no longer.
///
/// # Errors
/// [`PkiError::Missing`] if there is none; whatever is wrong with it or with the file `revoked`.
pub fn revoke(directory: &Path, peer: &Peer) -> Result<(), PkiError> {
    let path = certificate_path(directory, peer.file_stem());
    let certificates = read_certificates(&path, || not_issued(directory, peer))?;
    let day = OffsetDateTime::from(SystemTime::now()).date();
    revoked::add(directory, &certificates[0], &format!("{peer}, {day}"))
}

/// A certificate and its key, in PEM.
fn make(directory: &Path, peer: &Peer, validity: Duration) -> Result<(String, String), PkiError> {
    let (issuer, _) = load_issuer(directory)?;
    let key = KeyPair::generate()?;
    let certificate = params(peer, validity)?.signed_by(&key, &issuer)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

fn params(peer: &Peer, validity: Duration) -> Result<CertificateParams, PkiError> {
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
    Ok(params)
}

/// The authority that issues, after a trial, and all that are trusted.
#[allow(clippy::type_complexity)]
fn load_issuer(
    directory: &Path,
) -> Result<(Issuer<'static, KeyPair>, Vec<CertificateDer<'static>>), PkiError> {
    check_directory(directory)?;
    let path = key_path(directory, AUTHORITY);
    let key = read_key_pem(&path, || no_authority(directory))?;
    let key = std::str::from_utf8(&key)
        .map_err(|e| e.to_string())
        .and_then(|pem| KeyPair::from_pem(pem).map_err(|e| e.to_string()))
        .map_err(|reason| malformed_key(&path, reason))?;
    let issuer = Issuer::new(authority_params(), key);
    let authorities = load_authorities(directory)?;
    let trial =
        params(&Peer::Coordinator, CLOCK_SKEW)?.signed_by(&KeyPair::generate()?, &issuer)?;
    if verify(trial.der(), &authorities[..1], UnixTime::now()).is_err() {
        return Err(PkiError::OtherKey {
            key: path,
            certificate: certificate_path(directory, AUTHORITY),
        });
    }
    Ok((issuer, authorities))
}

/// An authority's certificate and key, in PEM.
fn new_authority() -> Result<(String, String), PkiError> {
    let key = KeyPair::generate()?;
    let certificate = authority_params().self_signed(&key)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

fn authority_params() -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = common_name(AUTHORITY_NAME);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = lifetime(AUTHORITY_VALIDITY);
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
