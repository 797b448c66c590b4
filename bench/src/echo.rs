//! The reference for everything that crosses nodes: a bare quinn stream between two processes,
//! with the runtime, the QUIC tuning, the TLS and the scheduling class of the node daemons.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use migshm_transport::{Endpoint, Identity, Link, Peer, pki};
use quinn::{RecvStream, SendStream};
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use crate::process;

/// Any free port of this machine.
const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// A request begins with its own length and that of its response.
const HEADER: usize = 16;
/// Bytes that the server writes at once.
const CHUNK: usize = 1 << 20;

/// Requests and responses to be exchanged, one after the other; a sample for each.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Exchange {
    /// Bytes of a request, at least 16.
    pub request: usize,
    /// Bytes of a response.
    pub response: usize,
    /// How many, without those that warm the connection up.
    pub times: usize,
}

/// Makes the certificates of both sides.
///
/// # Errors
/// Those of [`pki`].
pub fn prepare(directory: &Path) -> Result<()> {
    pki::create_authority(directory)?;
    for peer in [Peer::Coordinator, client_name()] {
        pki::issue(directory, &peer, pki::DEFAULT_VALIDITY)?;
    }
    Ok(())
}

/// Says its address, then serves one client after the other.
///
/// # Errors
/// The endpoint cannot be made.
pub fn server(directory: &Path) -> Result<()> {
    runtime()?.block_on(async {
        let endpoint = Endpoint::bind(LOOPBACK, &Identity::load(directory, &Peer::Coordinator)?)?;
        process::say(&endpoint.local_address()?)?;
        while let Some(incoming) = endpoint.accept().await {
            let mut link = incoming.link().await?;
            link.receiver.next().await?;
            link.sender.send(&(), &[]);
            let (send, receive) = link.into_stream();
            // A client that is done drops its connection.
            let _ = respond(send, receive).await;
        }
        Ok(())
    })
}

/// A worker that performs [`Exchange`]s with the server at `address`.
///
/// # Errors
/// The endpoint cannot be made.
pub fn client(directory: &Path, address: SocketAddr) -> Result<()> {
    let runtime = runtime()?;
    let identity = Identity::load(directory, &client_name())?;
    let endpoint = runtime.block_on(async { Endpoint::bind(LOOPBACK, &identity) })?;
    process::serve(|exchange: Exchange| {
        runtime.block_on(async {
            let mut link = endpoint.connect(address, &Peer::Coordinator).await?;
            link.sender.send(&(), &[]);
            link.receiver.next().await?;
            request(link, exchange).await
        })
    })
}

async fn request(link: Link, exchange: Exchange) -> Result<Vec<f64>> {
    ensure!(
        exchange.request >= HEADER,
        "a request is shorter than its header"
    );
    let (mut send, mut receive) = link.into_stream();
    let mut request = vec![0; exchange.request];
    request[..8].copy_from_slice(&exchange.request.to_le_bytes());
    request[8..HEADER].copy_from_slice(&exchange.response.to_le_bytes());
    let warm_up = (exchange.times / 10).max(1);
    let mut samples = Vec::with_capacity(warm_up + exchange.times);
    for _ in 0..warm_up + exchange.times {
        let start = Instant::now();
        send.write_all(&request).await?;
        let mut missing = exchange.response;
        while missing > 0 {
            missing -= receive
                .read_chunk(missing, true)
                .await?
                .context("the server ended")?
                .bytes
                .len();
        }
        samples.push(start.elapsed().as_secs_f64() * 1e9);
    }
    Ok(samples.split_off(warm_up))
}

async fn respond(mut send: SendStream, mut receive: RecvStream) -> Result<()> {
    let chunk = vec![1; CHUNK];
    let mut header = [0; HEADER];
    let mut rest = Vec::new();
    loop {
        receive.read_exact(&mut header).await?;
        let (request, response) = header.split_at(8);
        let length = usize::from_le_bytes(request.try_into()?);
        rest.resize(length - HEADER, 0);
        receive.read_exact(&mut rest).await?;
        let mut missing = usize::from_le_bytes(response.try_into()?);
        while missing > 0 {
            let next = missing.min(CHUNK);
            send.write_all(&chunk[..next]).await?;
            missing -= next;
        }
    }
}

fn client_name() -> Peer {
    Peer::node("bench").expect("a node name")
}

/// The daemons' runtime, in their scheduling class.
fn runtime() -> Result<Runtime> {
    migshm_transport::run_early();
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}
