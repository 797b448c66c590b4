//! One UDP socket that connects and accepts, and its TLS.
//!
//! There is nothing to negotiate between daemons of one release: TLS 1.3, one key exchange, one
//! cipher (and another for processors without AES). The ALPN carries the protocol's major
//! version, so that a peer of another one is refused before it can send anything. Sessions are
//! not resumed: each link checks certificates and their validity anew.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
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

use crate::link::{Link, LinkError};
use crate::peer::Peer;
use crate::pki::Identity;
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
pub struct Endpoint(quinn::Endpoint);

impl Endpoint {
    /// Binds `address`, UDP; port 0 picks a free one. Needs a tokio runtime.
    ///
    /// # Errors
    /// The address is not free or not this host's; the identity does not work.
    pub fn bind(address: SocketAddr, identity: &Identity) -> Result<Endpoint, EndpointError> {
        let unbound = |cause| EndpointError::Bind { address, cause };
        let unusable = |cause| EndpointError::Identity {
            peer: identity.peer().clone(),
            cause,
        };
        let server = server_config(identity, &alpn()).map_err(unusable)?;
        let client = client_config(identity, &alpn()).map_err(unusable)?;
        let socket = UdpSocket::bind(address).map_err(unbound)?;
        tuning::enlarge_buffers(&socket);
        let runtime = Arc::new(quinn::TokioRuntime);
        let config = tuning::endpoint(identity.key.secret_der());
        let mut endpoint =
            quinn::Endpoint::new(config, Some(server), socket, runtime).map_err(unbound)?;
        endpoint.set_default_client_config(client);
        Ok(Endpoint(endpoint))
    }

    /// The address that was bound.
    ///
    /// # Errors
    /// Those of `getsockname(2)`.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// Links to the peer at `address`, which must prove that it is `expected`. The link exists
    /// for the peer once this side has sent its first frame. That the peer refuses this side's
    /// certificate shows at the first receive.
    ///
    /// # Errors
    /// The peer does not answer within the idle timeout, or is not the expected one.
    pub async fn connect(&self, address: SocketAddr, expected: &Peer) -> Result<Link, LinkError> {
        let connecting = self
            .0
            .connect(address, &expected.dns_name())
            .map_err(|error| LinkError::Failed(format!("cannot connect to {address}: {error}")))?;
        let connection = connecting.await?;
        let stream = connection.open_bi().await?;
        Ok(Link::new(expected.clone(), connection, stream))
    }

    /// The next peer that wants a link; `None` once the endpoint is closed.
    pub async fn accept(&self) -> Option<Incoming> {
        self.0.accept().await.map(Incoming)
    }

    /// Closes all links with a reason and waits until the peers know.
    pub async fn close(&self, reason: &str) {
        self.0.close(VarInt::from_u32(0), reason.as_bytes());
        self.0.wait_idle().await;
    }
}

/// A peer that has asked for a link and has proved nothing yet.
pub struct Incoming(quinn::Incoming);

impl Incoming {
    /// Where it says it is.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.0.remote_address()
    }

    /// Lets it prove who it is; the link exists when its first frame has begun to arrive. Run it
    /// beside the loop that accepts, for the peer may take its time.
    ///
    /// # Errors
    /// The peer has no certificate of this cluster, another version, or sends nothing.
    pub async fn link(self) -> Result<Link, LinkError> {
        let opening = async {
            let connection = self.0.accept()?.await?;
            let peer = certified_peer(&connection).ok_or_else(|| {
                LinkError::PeerUntrusted("it names no node and no coordinator".to_owned())
            });
            let peer = peer.inspect_err(|error| {
                connection.close(VarInt::from_u32(1), error.to_string().as_bytes())
            })?;
            let stream = connection.accept_bi().await?;
            Ok(Link::new(peer, connection, stream))
        };
        tokio::time::timeout(OPENING_TIMEOUT, opening)
            .await
            .unwrap_or(Err(LinkError::Silent))
    }
}

/// The identity that TLS has verified.
fn certified_peer(connection: &quinn::Connection) -> Option<Peer> {
    let chain = connection
        .peer_identity()?
        .downcast::<Vec<CertificateDer<'static>>>()
        .ok()?;
    Peer::of_certificate(chain.first()?)
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
    roots.add(identity.authority.clone())?;
    Ok(Arc::new(roots))
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
