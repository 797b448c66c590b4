//! Who is at the end of a link, and how a certificate says so.
//!
//! A certificate carries exactly one subject alternative name: `coordinator.migshm`, or
//! `NAME.node.migshm`. A client asks TLS for the name it expects; a server reads it. So a node's
//! certificate can neither act as coordinator nor as another node.

use std::fmt;

use rustls::pki_types::CertificateDer;

/// Longest name of a node in bytes: that of a DNS label.
const MAX_NAME: usize = 63;
const COORDINATOR: &str = "coordinator";
const COORDINATOR_DNS: &str = "coordinator.migshm";
const NODE_SUFFIX: &str = ".node.migshm";
/// File name of the authority's certificate and key, without their endings.
pub(crate) const AUTHORITY: &str = "ca";

/// The holder of a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Peer {
    /// The cluster's coordinator.
    Coordinator,
    /// The node of this name; [`Peer::node`] makes one.
    Node(String),
}

/// A string that cannot be a node's name.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a node name: use 1 to {MAX_NAME} of a-z, 0-9 and '-', not starting or ending with '-', other than \"{AUTHORITY}\" and \"{COORDINATOR}\""
)]
pub struct BadName(String);

impl Peer {
    /// A node.
    ///
    /// # Errors
    /// [`BadName`] unless `name` is a lower-case DNS label (as a certificate needs) and names no
    /// other certificate's file.
    pub fn node(name: &str) -> Result<Peer, BadName> {
        let letters = name
            .bytes()
            .all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
        let ends = !name.starts_with('-') && !name.ends_with('-');
        let length = (1..=MAX_NAME).contains(&name.len());
        let free = name != AUTHORITY && name != COORDINATOR;
        if letters && ends && length && free {
            Ok(Peer::Node(name.to_owned()))
        } else {
            Err(BadName(name.to_owned()))
        }
    }

    /// The holder whose files are called this.
    ///
    /// # Errors
    /// [`BadName`] as of [`Peer::node`].
    pub fn of_file_stem(stem: &str) -> Result<Peer, BadName> {
        if stem == COORDINATOR {
            Ok(Peer::Coordinator)
        } else {
            Peer::node(stem)
        }
    }

    /// File name of the certificate and the key, without their endings.
    #[must_use]
    pub fn file_stem(&self) -> &str {
        match self {
            Peer::Coordinator => COORDINATOR,
            Peer::Node(name) => name,
        }
    }

    /// The name in the certificate, which a client asks TLS for.
    pub(crate) fn dns_name(&self) -> String {
        match self {
            Peer::Coordinator => COORDINATOR_DNS.to_owned(),
            Peer::Node(name) => format!("{name}{NODE_SUFFIX}"),
        }
    }

    /// Whose certificate this is; `None` if it is not one of this cluster's.
    pub(crate) fn of_certificate(certificate: &CertificateDer<'_>) -> Option<Peer> {
        let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
        let mut names = certificate.valid_dns_names();
        let (name, None) = (names.next()?, names.next()) else {
            return None;
        };
        match name.strip_suffix(NODE_SUFFIX) {
            Some(node) => Peer::node(node).ok(),
            None => (name == COORDINATOR_DNS).then_some(Peer::Coordinator),
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Coordinator => f.write_str("the coordinator"),
            Peer::Node(name) => write!(f, "node {name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_name_is_a_lower_case_label_that_names_no_other_file() {
        for good in ["n", "node1", "rack-3-7", &"a".repeat(MAX_NAME)] {
            assert!(Peer::node(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "Node",
            "a.b",
            "a/b",
            "-a",
            "a-",
            "..",
            "ca",
            "coordinator",
            &"a".repeat(MAX_NAME + 1),
        ] {
            assert!(Peer::node(bad).is_err(), "{bad}");
        }
    }
}
