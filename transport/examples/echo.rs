//! Round trips through a link and through a bare quinn stream with the same configuration, in
//! turns within one run, between two single-threaded runtimes on loopback; then bulk throughput.
//!
//! `cargo run --release -p migshm-transport --example echo`

use std::convert::Infallible;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::mpsc;
use std::time::Instant;

use migshm_transport::{Endpoint, Identity, Link, Peer, pki};
use serde::{Deserialize, Serialize};

/// Round trips of one turn, of which the first tenth warms up and is not counted.
const ROUNDS: usize = 4_000;
/// Turns of each kind, alternating, so that both see the same noise.
const TURNS: usize = 6;
const PAGE: usize = 4096;
/// The bulk transfer: 1 GiB, asked for in batches of 4 MiB, of which two are on their way.
const BATCHES: usize = 256;
const BATCH_PAGES: usize = 1024;
const LOOPBACK: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Bytes there and back, on the wire in both cases.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Shape {
    request: usize,
    response: usize,
}

const SHAPES: [Shape; 2] = [
    Shape {
        request: 64,
        response: 64,
    },
    Shape {
        request: 16,
        response: 16 + PAGE,
    },
];

/// First frame of every link: what the server is to do.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Job {
    Link(Shape),
    Stream(Shape),
    Bulk,
}

fn main() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let pki = directory.path();
    pki::create_authority(pki).expect("an authority");
    for peer in [Peer::Coordinator, bench()] {
        pki::issue(pki, &peer, pki::DEFAULT_VALIDITY).expect("a certificate");
    }
    let server = start_server(pki);
    runtime().block_on(async {
        let identity = Identity::load(pki, &bench()).expect("an identity");
        let endpoint = Endpoint::bind(LOOPBACK, &identity).expect("an endpoint");
        for shape in SHAPES {
            let (mut link, mut stream) = (Vec::new(), Vec::new());
            for _ in 0..TURNS {
                link.extend(through_link(&endpoint, server, shape).await);
                stream.extend(through_stream(&endpoint, server, shape).await);
            }
            let (link, stream) = (Quantiles::of(link), Quantiles::of(stream));
            println!("{shape}  link    {link}");
            println!("{shape}  stream  {stream}");
            println!("{shape}  ratio of medians {:.3}", link.p50 / stream.p50);
        }
        bulk(&endpoint, server).await;
    });
}

fn bench() -> Peer {
    Peer::node("bench").expect("a node name")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
}

/// A server in a thread and runtime of its own.
fn start_server(pki: &Path) -> SocketAddr {
    let identity = Identity::load(pki, &Peer::Coordinator).expect("an identity");
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        runtime().block_on(async {
            let endpoint = Endpoint::bind(LOOPBACK, &identity).expect("an endpoint");
            tell.send(endpoint.local_address().expect("an address"))
                .expect("a listener");
            while let Some(incoming) = endpoint.accept().await {
                tokio::spawn(async move {
                    // A client that is done drops its link.
                    let _ = serve(incoming.link().await.expect("a link")).await;
                });
            }
        });
    });
    told.recv().expect("a server")
}

async fn serve(mut link: Link) -> Option<Infallible> {
    let first = link.receiver.next().await.ok()?;
    match first.decode().expect("a job").0 {
        Job::Link(shape) => {
            link.sender.send(&(), &[]);
            loop {
                link.receiver.next().await.ok()?;
                answer(&link, shape.response);
            }
        }
        Job::Stream(shape) => {
            link.sender.send(&(), &[]);
            let (mut send, mut receive) = link.into_stream();
            let response = vec![1; shape.response];
            let mut request = vec![0; shape.request];
            loop {
                receive.read_exact(&mut request).await.ok()?;
                send.write_all(&response).await.ok()?;
            }
        }
        Job::Bulk => loop {
            link.receiver.next().await.ok()?;
            for _ in 0..BATCH_PAGES {
                answer(&link, PAGE);
            }
        },
    }
}

/// Sends a frame of `size` bytes, header included, filled in place as a page would be.
fn answer(link: &Link, size: usize) {
    link.sender
        .send_with(&(), size - 4, |frame| frame.resize(size, 1));
}

async fn open(endpoint: &Endpoint, server: SocketAddr, job: Job) -> Link {
    let link = endpoint
        .connect(server, &Peer::Coordinator)
        .await
        .expect("a link");
    link.sender.send(&job, &[]);
    link
}

async fn through_link(endpoint: &Endpoint, server: SocketAddr, shape: Shape) -> Vec<f64> {
    let mut link = open(endpoint, server, Job::Link(shape)).await;
    link.receiver.next().await.expect("a go");
    let request = vec![1; shape.request - 4];
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        link.sender.send(&(), &request);
        let frame = link.receiver.next().await.expect("an answer");
        times.push(start.elapsed().as_secs_f64() * 1e6);
        assert_eq!(frame.bytes().len(), shape.response - 4);
    }
    times.split_off(ROUNDS / 10)
}

async fn through_stream(endpoint: &Endpoint, server: SocketAddr, shape: Shape) -> Vec<f64> {
    let mut link = open(endpoint, server, Job::Stream(shape)).await;
    link.receiver.next().await.expect("a go");
    let (mut send, mut receive) = link.into_stream();
    let request = vec![1; shape.request];
    let mut response = vec![0; shape.response];
    let mut times = Vec::with_capacity(ROUNDS);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        send.write_all(&request).await.expect("a write");
        receive.read_exact(&mut response).await.expect("an answer");
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    times.split_off(ROUNDS / 10)
}

async fn bulk(endpoint: &Endpoint, server: SocketAddr) {
    let mut link = open(endpoint, server, Job::Bulk).await;
    link.sender.send(&(), &[]);
    let start = Instant::now();
    for _ in 0..BATCHES {
        link.sender.send(&(), &[]);
        for _ in 0..BATCH_PAGES {
            link.receiver.next().await.expect("a page");
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    let bits = (BATCHES * BATCH_PAGES * PAGE * 8) as f64;
    println!("bulk, 4 KiB frames: {:.2} Gbit/s", bits / seconds / 1e9);
}

/// Microseconds.
struct Quantiles {
    p50: f64,
    p90: f64,
    p99: f64,
}

impl Quantiles {
    fn of(mut times: Vec<f64>) -> Quantiles {
        times.sort_by(f64::total_cmp);
        let at = |percent: usize| times[times.len() * percent / 100];
        Quantiles {
            p50: at(50),
            p90: at(90),
            p99: at(99),
        }
    }
}

impl fmt::Display for Quantiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "p50 {:6.1} us  p90 {:6.1} us  p99 {:6.1} us",
            self.p50, self.p90, self.p99
        )
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:3} B -> {:4} B", self.request, self.response)
    }
}
