//! Clusters of endpoints on loopback.
#![allow(dead_code, reason = "each test file uses its part")]

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;

use migshm_transport::pki::{self, DEFAULT_VALIDITY};
use migshm_transport::{Endpoint, Identity, Link, LinkError, Peer};
use tempfile::TempDir;

pub const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A cluster's certificates: the coordinator's and those of `nodes`.
pub fn cluster(nodes: &[&str]) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    pki::create_authority(directory.path()).unwrap();
    pki::issue(directory.path(), &Peer::Coordinator, DEFAULT_VALIDITY).unwrap();
    for name in nodes {
        pki::issue(directory.path(), &node(name), DEFAULT_VALIDITY).unwrap();
    }
    directory
}

pub fn node(name: &str) -> Peer {
    Peer::node(name).unwrap()
}

pub fn endpoint(pki: &Path, peer: &Peer) -> Endpoint {
    Endpoint::bind(LOOPBACK, &Identity::load(pki, peer).unwrap()).unwrap()
}

/// Both ends of a link; the first frame, the number 0, has been received.
pub async fn pair(client: &Endpoint, server: &Endpoint, server_peer: &Peer) -> (Link, Link) {
    let connect = async {
        let link = client
            .connect(server.local_address().unwrap(), server_peer)
            .await
            .unwrap();
        link.sender.send(&0u64, &[]);
        link
    };
    let accept = async {
        let mut link = server.accept().await.unwrap().link().await.unwrap();
        assert_eq!(number(&mut link).await, 0);
        link
    };
    tokio::join!(connect, accept)
}

pub async fn number(link: &mut Link) -> u64 {
    link.receiver.next().await.unwrap().decode().unwrap().0
}

/// What comes of connecting, sending, and waiting for an answer.
pub async fn attempt(client: &Endpoint, address: SocketAddr, expected: &Peer) -> LinkError {
    match client.connect(address, expected).await {
        Ok(mut link) => {
            link.sender.send(&0u64, &[]);
            link.receiver
                .next()
                .await
                .expect_err("the peer must refuse")
        }
        Err(error) => error,
    }
}

/// Lets everybody in who may come, and keeps nobody.
pub fn accept_all(endpoint: &Endpoint) {
    let endpoint = endpoint.clone();
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            tokio::spawn(incoming.link());
        }
    });
}

/// Brings files from one host to another.
pub fn copy(from: &Path, to: &Path, names: &[&str]) {
    for name in names {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
}
