//! With Debian's etcd-server, one member for each test.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType};
use tokio::sync::watch;

use super::super::log::Keys;
use super::super::wire::{DeleteRangeRequest, PutRequest, TxnRequest};
use super::super::{Candidate, Client, Error, Location, Log, Term, Tls, leaders};
use crate::replica::{Input, Record, Replica};
use crate::store::Contents;

/// How long etcd may take to start.
const PATIENCE: Duration = Duration::from_secs(20);

/// A cluster of one member; ends with this.
struct Etcd {
    member: Child,
    directory: tempfile::TempDir,
    address: String,
}

impl Etcd {
    async fn start() -> Etcd {
        Etcd::with(tempfile::tempdir().unwrap(), &[], None).await
    }

    /// With further options, and the TLS that it takes then to reach it.
    async fn with(directory: tempfile::TempDir, options: &[&str], tls: Option<&Tls>) -> Etcd {
        let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [address, peer] = listeners.map(|l| l.local_addr().unwrap().to_string());
        let scheme = if tls.is_some() { "https" } else { "http" };
        let [url, peer] = [format!("{scheme}://{address}"), format!("http://{peer}")];
        let log = fs::File::create(directory.path().join("log")).unwrap();
        let member = Command::new("etcd")
            .args([
                "--name",
                "only",
                "--initial-cluster",
                &format!("only={peer}"),
            ])
            .args([
                "--listen-client-urls",
                &url,
                "--advertise-client-urls",
                &url,
            ])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--logger", "zap", "--data-dir"])
            .arg(directory.path().join("data"))
            .args(options)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("etcd is installed (Debian: etcd-server)");
        let etcd = Etcd {
            member,
            directory,
            address,
        };
        let since = Instant::now();
        while let Err(error) = leaders(&etcd.location(), tls).await {
            let log = fs::read_to_string(etcd.directory.path().join("log")).unwrap();
            assert!(since.elapsed() < PATIENCE, "{error}\n{log}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        etcd
    }

    fn location(&self) -> Location {
        format!("etcd://{}/cluster", self.address).parse().unwrap()
    }

    async fn candidate(&self) -> Result<Candidate, Error> {
        Candidate::open(&self.location(), None, "here".to_owned()).await
    }

    /// What somebody else does.
    async fn meddle(&self, txn: &TxnRequest) {
        let client = Client::new(&self.location(), None).unwrap();
        assert!(client.transact(txn, None).await.unwrap().succeeded);
    }

    async fn put(&self, key: &[u8], value: &str) {
        let put = PutRequest {
            key: key.to_owned(),
            value: value.into(),
            lease: 0,
        };
        self.meddle(&TxnRequest::new().put(put)).await;
    }

    async fn delete(&self, key: &[u8]) {
        let delete = DeleteRangeRequest {
            key: key.to_owned(),
            range_end: Vec::new(),
        };
        self.meddle(&TxnRequest::new().delete(delete)).await;
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.member.kill().unwrap();
        self.member.wait().unwrap();
    }
}

async fn lead(candidate: &Candidate) -> (Term<'_>, Result<(Replica, Log), Error>) {
    let term = candidate.lead(&watch::Sender::new(None)).await.unwrap();
    let loaded = term.load().await;
    (term, loaded)
}

fn join(number: usize) -> Record {
    let input = Input::Join {
        name: format!("node{number}"),
        address: "[::1]:1".parse().unwrap(),
        memory: 1 << 30,
    };
    Record { now: 1, input }
}

/// Has nodes join, all stored at once.
async fn grow(log: &mut Log, replica: &mut Replica, nodes: std::ops::Range<usize>) {
    let mut records = Vec::new();
    for record in nodes.map(join) {
        assert!(replica.apply(&record, &[]).unwrap());
        records.push(record.encode(&[]));
    }
    log.commit(&Contents::Records(records)).await.unwrap();
}

#[tokio::test]
async fn what_is_stored_is_there_for_the_next_leader() {
    let etcd = Etcd::start().await;
    let candidate = etcd.candidate().await.unwrap();
    let (mut term, loaded) = lead(&candidate).await;
    let (mut replica, mut log) = loaded.unwrap();
    for first in [0, 2, 4, 6] {
        // Some in chunks, some not.
        log.keys.chunk = [16, 1 << 20][first / 2 % 2];
        grow(&mut log, &mut replica, first..first + 2).await;
        if first == 4 {
            let snapshot = Contents::Snapshot(replica.snapshot());
            log.commit(&snapshot).await.unwrap();
            log.commit(&snapshot).await.unwrap();
        }
        term.resign().await;
        let loaded;
        (term, loaded) = lead(&candidate).await;
        let again;
        (again, log) = loaded.unwrap();
        assert_eq!(again.snapshot(), replica.snapshot());
    }
}

#[tokio::test]
async fn what_fits_no_request_is_stored_too() {
    let etcd = Etcd::start().await;
    let candidate = etcd.candidate().await.unwrap();
    let (term, loaded) = lead(&candidate).await;
    let (_, mut log) = loaded.unwrap();
    let large = vec![7; 5 << 20];
    log.commit(&Contents::Snapshot(large.clone()))
        .await
        .unwrap();
    log.commit(&Contents::Records(vec![large.clone()]))
        .await
        .unwrap();
    let head = log.head.unwrap();
    let [snapshot, stream] = [log.keys.snapshot(head), log.keys.log(head)];
    let snapshot = candidate.read(snapshot).await.unwrap();
    let stream = candidate.read(stream).await.unwrap();
    let stored = log.keys.assemble(head, &snapshot, &stream).unwrap();
    assert!(stored.snapshot == large && stored.records == [large]);
    term.resign().await;
}

#[tokio::test]
async fn who_leads_no_longer_stores_nothing() {
    let etcd = Etcd::start().await;
    let candidate = etcd.candidate().await.unwrap();
    let (_former, loaded) = lead(&candidate).await;
    let (mut replica, mut log) = loaded.unwrap();
    grow(&mut log, &mut replica, 0..1).await;
    // As if its lease had ended: without its knowing.
    etcd.delete(&Keys::new("cluster").leader()).await;
    let (_next, loaded) = lead(&candidate).await;
    assert_eq!(loaded.unwrap().0.members().count(), 1);
    for contents in [
        Contents::Records(vec![join(1).encode(&[])]),
        Contents::Records(Vec::new()),
        Contents::Snapshot(replica.snapshot()),
    ] {
        let refused = log.commit(&contents).await;
        assert!(matches!(refused, Err(Error::Deposed)), "{refused:?}");
    }
}

#[tokio::test]
async fn one_that_waits_leads_when_the_lease_has_ended() {
    let etcd = Etcd::start().await;
    let candidate = etcd.candidate().await.unwrap();
    let (former, _) = lead(&candidate).await;
    let known = watch::Sender::new(None);
    // The lease is not kept.
    let since = Instant::now();
    let next = candidate.lead(&known).await.unwrap();
    assert!(Instant::now() > former.ends, "two led for a moment");
    assert!(since.elapsed() < Duration::from_secs(12));
    assert!(next.revision > former.revision);
    former.keep().await;
}

#[tokio::test]
async fn a_lease_that_has_ended_is_told_from_a_refusal() {
    let etcd = Etcd::start().await;
    let client = Client::new(&etcd.location(), None).unwrap();
    let lease = client.grant(5).await.unwrap().id;
    client.revoke(lease).await.unwrap();
    assert!(matches!(client.revoke(lease).await, Err(Error::Lapsed)));
    assert_eq!(client.keep_alive(lease).await.unwrap().ttl, 0);
    let put = PutRequest {
        key: b"cluster/leader".to_vec(),
        value: Vec::new(),
        lease,
    };
    let txn = TxnRequest::new().put(put);
    assert!(matches!(
        client.transact(&txn, None).await,
        Err(Error::Lapsed)
    ));
}

#[tokio::test]
async fn what_is_somebody_elses_is_refused() {
    let etcd = Etcd::start().await;
    let refused = async || etcd.candidate().await.err().unwrap().to_string();
    etcd.put(b"cluster/thesis", "much work").await;
    let error = refused().await;
    assert!(error.contains("there is \"cluster/thesis\""), "{error}");
    etcd.delete(b"cluster/thesis").await;
    etcd.put(b"clusters/other", "not below it").await;
    etcd.candidate().await.unwrap();
    etcd.put(b"cluster/format", "0").await;
    let error = refused().await;
    assert!(error.contains("is of format \"0\""), "{error}");
}

#[tokio::test]
async fn damage_is_found() {
    let etcd = Etcd::start().await;
    let candidate = etcd.candidate().await.unwrap();
    let (mut term, loaded) = lead(&candidate).await;
    let (mut replica, mut log) = loaded.unwrap();
    grow(&mut log, &mut replica, 0..3).await;
    let damages = [
        ("cluster/log/0000000000000001/0000000000000000", "garbage"),
        (
            "cluster/snapshot/0000000000000001/0000000000000000",
            "garbage",
        ),
        ("cluster/head", "1 2 1"),
        ("cluster/head", "much"),
    ];
    for (key, value) in damages {
        term.resign().await;
        etcd.put(key.as_bytes(), value).await;
        let loaded;
        (term, loaded) = lead(&candidate).await;
        let error = loaded.err().unwrap().to_string();
        assert!(error.contains("below cluster/ is damaged"), "{error}");
    }
}

/// An authority, and what etcd and a coordinator need of it, as PEM files in a directory.
fn certificates(directory: &Path) -> Tls {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    fs::write(directory.join("ca"), authority.pem()).unwrap();
    let issue = || {
        let mut params = CertificateParams::default();
        let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
        params.subject_alt_names = vec![SanType::IpAddress(loopback)];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &authority).unwrap();
        (certificate.pem(), key.serialize_pem())
    };
    let (certificate, key) = issue();
    fs::write(directory.join("cert"), certificate).unwrap();
    fs::write(directory.join("key"), key).unwrap();
    let (certificate, key) = issue();
    Tls {
        authority: authority.pem().into(),
        identity: Some((certificate.into(), key.into())),
    }
}

#[tokio::test]
async fn tls_proves_both_sides() {
    let directory = tempfile::tempdir().unwrap();
    let tls = certificates(directory.path());
    let file = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (ca, cert, key) = (file("ca"), file("cert"), file("key"));
    let options = ["--client-cert-auth", "--trusted-ca-file", &ca];
    let options = [&options[..], &["--cert-file", &cert, "--key-file", &key]].concat();
    let etcd = Etcd::with(directory, &options, Some(&tls)).await;
    let candidate = Candidate::open(&etcd.location(), Some(&tls), "here".to_owned()).await;
    let candidate = candidate.unwrap();
    lead(&candidate).await.1.unwrap();

    let other = tempfile::tempdir().unwrap();
    let stranger = certificates(other.path());
    let nobody = Tls {
        identity: None,
        ..tls.clone()
    };
    for refused in [None, Some(&stranger), Some(&nobody)] {
        assert!(leaders(&etcd.location(), refused).await.is_err());
    }
    let shown = format!("{tls:?}");
    assert!(!shown.contains("PRIVATE") && shown.len() < 20, "{shown}");
}
