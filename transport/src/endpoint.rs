//! One UDP socket that connects and accepts, and its TLS.
//!
//! There is nothing to negotiate between daemons of one release: TLS 1.3, one key exchange, one
//! cipher (and another for processors without AES). The ALPN carries the protocol's major
//! version, so that a peer of another one is refused before it can send anything. Sessions are
//! not resumed: each link checks certificates and their validity anew.
//!
//! An endpoint's own certificate and what it trusts can be exchanged while it is in use
//! ([`Endpoint::renew`]). That decides about new links; those that stand stay, but for those to
//! peers whose certificates have been revoked.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, ServerConfig, VarInt};
use rustls::RootCertStore;
use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::CertificateDer;
use rustls::server::WebPkiClientVerifier;
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;

use crate::link::{Link, LinkError, VIOLATION};
use crate::peer::Peer;
use crate::pki::{Identity, Revoked, serial};
use crate::tuning;

/// How long an accepted peer may take to prove itself and to send its first frame.
const OPENING_TIMEOUT: Duration = Duration::from_secs(3);

/// Why an endpoint cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// The address cannot be bound.
    #[error("cannot listen on {address}: {cause}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why not.
        cause: io::Error,
    },
    /// TLS refuses the identity.
    #[error("cannot use the certificate of {peer}: {cause}")]
    Identity {
        /// Whose.
        peer: Peer,
        /// Why not.
        cause: rustls::Error,
    },
}

/// A socket for all links of a daemon. Clones share it.
#[derive(Clone, Debug)]
pub struct Endpoint(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    peer: Peer,
    socket: quinn::Endpoint,
    trust: Mutex<Trust>,
}

/// What may change while links stand.
#[derive(Debug)]
struct Trust {
    /// For links from here; quinn keeps the one for links to here.
    client: ClientConfig,
    revoked: Revoked,
    /// Those that stand, each with the number of the peer's certificate, and some that are lost.
    links: Vec<(Vec<u8>, Weak<quinn::Connection>)>,
}

impl Endpoint {
    /// Binds `address`, UDP; port 0 picks a free one. Needs a tokio runtime.
    ///
    /// # Errors
    /// The address is not free or not this host's; the identity does not work.
    pub fn bind(address: SocketAddr, identity: &Identity) -> Result<Endpoint, EndpointError> {
        let unbound = |cause| EndpointError::Bind { address, cause };
        let (client, server) = configs(identity)?;
        let socket = UdpSocket::bind(address).map_err(unbound)?;
        tuning::enlarge_buffers(&socket);
        let runtime = Arc::new(quinn::TokioRuntime);
        let config = tuning::endpoint(identity.key.secret_der());
        let socket =
            quinn::Endpoint::new(config, Some(server), socket, runtime).map_err(unbound)?;
        Ok(Endpoint(Arc::new(Shared {
            peer: identity.peer().clone(),
            socket,
            trust: Mutex::new(Trust {
                client,
                revoked: identity.revoked.clone(),
                links: Vec::new(),
            }),
        })))
    }

    /// Whose endpoint it is.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.0.peer
    }

    /// Uses another certificate, and what comes with it, from now on. Closes the links to peers
    /// whose certificates it revokes; all others stay.
    ///
    /// # Errors
    /// [`EndpointError::Identity`]; then nothing has changed.
    pub fn renew(&self, identity: &Identity) -> Result<(), EndpointError> {
        let (client, server) = configs(identity)?;
        self.0.socket.set_server_config(Some(server));
        let mut trust = self.0.trust();
        trust.client = client;
        trust.revoked = identity.revoked.clone();
        for (serial, link) in &trust.links {
            if trust.revoked.holds_number(serial)
                && let Some(link) = link.upgrade()
            {
                link.close(VIOLATION, refusal(REVOKED).as_bytes());
            }
        }
        Ok(())
    }

    /// The address that was bound.
    ///
    /// # Errors
    /// Those of `getsockname(2)`.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.0.socket.local_addr()
    }

    /// Links to the peer at `address`, which must prove that it is `expected`. The link exists
    /// for the peer once this side has sent its first frame. That the peer refuses this side's
    /// certificate shows at the first receive.
    ///
    /// # Errors
    /// The peer does not answer within the idle timeout, or is not the expected one.
    pub async fn connect(&self, address: SocketAddr, expected: &Peer) -> Result<Link, LinkError> {
        let client = self.0.trust().client.clone();
        let connecting = self
            .0
            .socket
            .connect_with(client, address, &expected.dns_name())
            .map_err(|error| LinkError::Failed(format!("cannot connect to {address}: {error}")))?;
        let connection = Arc::new(connecting.await?);
        let peer = self.0.admit(&connection)?;
        let stream = connection.open_bi().await?;
        Ok(Link::new(peer, connection, stream))
    }

    /// The next peer that wants a link; `None` once the endpoint is closed.
    pub async fn accept(&self) -> Option<Incoming> {
        let incoming = self.0.socket.accept().await?;
        Some(Incoming {
            incoming,
            endpoint: Arc::clone(&self.0),
        })
    }

    /// Closes all links with a reason and waits until the peers know.
    pub async fn close(&self, reason: &str) {
        self.0.socket.close(VarInt::from_u32(0), reason.as_bytes());
        self.0.socket.wait_idle().await;
    }
}

impl Shared {
    fn trust(&self) -> MutexGuard<'_, Trust> {
        self.trust.lock().expect("no code panics under this lock")
    }

    /// Who is at the other end, whose certificate TLS trusts; unless that has been revoked.
    fn admit(&self, connection: &Arc<quinn::Connection>) -> Result<Peer, LinkError> {
        let admitted = self.admissible(connection);
        if let Err(reason) = &admitted {
            connection.close(VIOLATION, refusal(reason).as_bytes());
        }
        admitted.map_err(|reason| LinkError::PeerUntrusted(reason.to_owned()))
    }

    fn admissible(&self, connection: &Arc<quinn::Connection>) -> Result<Peer, &'static str> {
        let certificate = certificate(connection).ok_or("there is none")?;
        let peer =
            Peer::of_certificate(&certificate).ok_or("it names no node and no coordinator")?;
        let serial = serial(&certificate);
        let mut trust = self.trust();
        if trust.revoked.holds_number(&serial) {
            return Err(REVOKED);
        }
        trust.links.retain(|(_, link)| link.strong_count() > 0);
        trust.links.push((serial, Arc::downgrade(connection)));
        Ok(peer)
    }
}

const REVOKED: &str = "it has been revoked";

/// What a peer is told that is refused.
fn refusal(reason: &str) -> String {
    format!("this side's certificate is refused: {reason}")
}

/// A peer that has asked for a link and has proved nothing yet.
pub struct Incoming {
    incoming: quinn::Incoming,
    endpoint: Arc<Shared>,
}

impl Incoming {
    /// Where it says it is.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.incoming.remote_address()
    }

    /// Lets it prove who it is; the link exists when its first frame has begun to arrive. Run it
    /// beside the loop that accepts, for the peer may take its time.
    ///
    /// # Errors
    /// The peer has no certificate of this cluster, another version, or sends nothing.
    pub async fn link(self) -> Result<Link, LinkError> {
        let opening = async {
            let connection = Arc::new(self.incoming.accept()?.await?);
            let peer = self.endpoint.admit(&connection)?;
            let stream = connection.accept_bi().await?;
            Ok(Link::new(peer, connection, stream))
        };
        tokio::time::timeout(OPENING_TIMEOUT, opening)
            .await
            .unwrap_or(Err(LinkError::Silent))
    }
}

/// The peer's certificate, which TLS has verified.
fn certificate(connection: &quinn::Connection) -> Option<CertificateDer<'static>> {
    let chain = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    chain.into_iter().next()
}

/// Whether the key of an identity is that of its certificate.
pub(crate) fn key_fits(identity: &Identity) -> bool {
    CertifiedKey::from_der(
        vec![identity.certificate.clone()],
        identity.key.clone_key(),
        &provider(),
    )
    .is_ok()
}

fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        kx_groups: vec![ring::kx_group::X25519],
        ..ring::default_provider()
    }
}

fn alpn() -> Vec<u8> {
    format!("migshm/{}", migshm_protocol::VERSION.major).into_bytes()
}

fn roots(identity: &Identity) -> Result<Arc<RootCertStore>, rustls::Error> {
    let mut roots = RootCertStore::empty();
    for authority in &identity.authorities {
        roots.add(authority.clone())?;
    }
    Ok(Arc::new(roots))
}

fn configs(identity: &Identity) -> Result<(ClientConfig, ServerConfig), EndpointError> {
    let unusable = |cause| EndpointError::Identity {
        peer: identity.peer().clone(),
        cause,
    };
    Ok((
        client_config(identity, &alpn()).map_err(unusable)?,
        server_config(identity, &alpn()).map_err(unusable)?,
    ))
}

fn client_config(identity: &Identity, alpn: &[u8]) -> Result<ClientConfig, rustls::Error> {
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&TLS13])?
        .with_root_certificates(roots(identity)?)
        .with_client_auth_cert(vec![identity.certificate.clone()], identity.key.clone_key())?;
    tls.alpn_protocols = vec![alpn.to_vec()];
    tls.resumption = Resumption::disabled();
    let quic =
        QuicClientConfig::try_from(tls).expect("QUIC's initial cipher is among the provider's");
    let mut config = ClientConfig::new(Arc::new(quic));
    config.transport_config(tuning::transport());
    Ok(config)
}

fn server_config(identity: &Identity, alpn: &[u8]) -> Result<ServerConfig, rustls::Error> {
    let provider = Arc::new(provider());
    let verifier =
        WebPkiClientVerifier::builder_with_provider(roots(identity)?, Arc::clone(&provider))
            .build()
            .expect("there is a root and no revocation list");
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![identity.certificate.clone()], identity.key.clone_key())?;
    tls.alpn_protocols = vec![alpn.to_vec()];
    tls.send_tls13_tickets = 0;
    let quic =
        QuicServerConfig::try_from(tls).expect("QUIC's initial cipher is among the provider's");
    let mut config = ServerConfig::with_crypto(Arc::new(quic));
    config.transport_config(tuning::transport());
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki;

    #[tokio::test]
    async fn what_speaks_another_protocol_is_refused_before_it_can_say_anything() {
        let directory = tempfile::tempdir().unwrap();
        pki::create_authority(directory.path()).unwrap();
        let peer = Peer::Coordinator;
        pki::issue(directory.path(), &peer, pki::DEFAULT_VALIDITY).unwrap();
        let identity = Identity::load(directory.path(), &peer).unwrap();
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let endpoint = Endpoint::bind(address, &identity).unwrap();
        let server = endpoint.clone();
        tokio::spawn(async move {
            while let Some(incoming) = server.accept().await {
                assert_eq!(incoming.link().await.unwrap_err(), LinkError::OtherVersion);
            }
        });
        for other in ["migshm/999", "migshm", "h3"] {
            let client = client_config(&identity, other.as_bytes()).unwrap();
            let foreign = quinn::Endpoint::client(address).unwrap();
            let local = endpoint.local_address().unwrap();
            let connecting = foreign.connect_with(client, local, &peer.dns_name());
            let error = connecting.unwrap().await.unwrap_err();
            assert_eq!(LinkError::from(error), LinkError::OtherVersion, "{other}");
        }
    }
}
