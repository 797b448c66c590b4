//! Requests to an etcd cluster, of which any member may be away.
//!
//! A request that is not answered is made again, of the next member: it may have been done, and whoever makes
//! it must be able to tell ([`TxnRequest`]s compare what they change).

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use http::uri::PathAndQuery;
use prost::Message;
use tonic::client::Grpc;
use tonic::metadata::MetadataValue;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use super::Error;
use super::wire::{
    CompactionRequest, Done, Lease, LeaseGrantRequest, LeaseKeepAliveRequest, LeaseRevokeRequest,
    RangeRequest, RangeResponse, StatusRequest, StatusResponse, TxnRequest, TxnResponse,
};

/// How long a member may take to answer.
const ATTEMPT: Duration = Duration::from_millis(1_500);
/// Between two attempts.
const PAUSE: Duration = Duration::from_millis(30);
/// Where etcd listens, unless told otherwise.
const PORT: u16 = 2379;
const SCHEME: &str = "etcd://";
/// The prefix of all keys, unless told otherwise.
const PREFIX: &str = "migshm";

/// Where an etcd cluster is, and below which prefix a coordinator's state is there:
/// `etcd://HOST[:PORT],...[/PREFIX]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// `HOST:PORT` of each member.
    pub members: Vec<String>,
    /// Without slashes at its ends.
    pub prefix: String,
}

/// With what a coordinator proves to etcd who it is, and knows it: PEM.
#[derive(Clone)]
pub struct Tls {
    /// Certificates of the authority of etcd's own.
    pub authority: Vec<u8>,
    /// The coordinator's certificate, which etcd trusts, and its key.
    pub identity: Option<(Vec<u8>, Vec<u8>)>,
}

/// An etcd cluster. Needs a tokio runtime, and lives no longer.
pub struct Client {
    members: Vec<(String, Channel)>,
    /// The member that answered last.
    current: AtomicUsize,
}

impl Client {
    /// Connects when it is first asked something.
    ///
    /// # Errors
    /// [`Error::Unusable`]: an address or a certificate is none, or etcd is elsewhere and there is no TLS.
    pub fn new(location: &Location, tls: Option<&Tls>) -> Result<Client, Error> {
        let open = |member: &String| {
            if tls.is_none() && !is_loopback(member) {
                return Err(Error::Unusable(format!(
                    "etcd at {member} is on another host: that needs TLS, --etcd-ca"
                )));
            }
            let unusable = |error: tonic::transport::Error| {
                Error::Unusable(format!("etcd at {member}: {}", chain(&error)))
            };
            let scheme = if tls.is_some() { "https" } else { "http" };
            let mut endpoint =
                Endpoint::from_shared(format!("{scheme}://{member}")).map_err(unusable)?;
            if let Some(tls) = tls {
                endpoint = endpoint.tls_config(tls.config()).map_err(unusable)?;
            }
            let channel = endpoint.connect_timeout(ATTEMPT).connect_lazy();
            Ok((member.clone(), channel))
        };
        Ok(Client {
            members: location
                .members
                .iter()
                .map(open)
                .collect::<Result<_, _>>()?,
            current: AtomicUsize::new(0),
        })
    }

    /// Reads keys, as they are now.
    pub async fn range(
        &self,
        request: &RangeRequest,
        until: Option<Instant>,
    ) -> Result<RangeResponse, Error> {
        self.ask("/etcdserverpb.KV/Range", request, until).await
    }

    /// Compares, and reads or changes.
    pub async fn transact(
        &self,
        request: &TxnRequest,
        until: Option<Instant>,
    ) -> Result<TxnResponse, Error> {
        self.ask("/etcdserverpb.KV/Txn", request, until).await
    }

    /// Forgets what keys were before a revision.
    pub async fn compact(&self, revision: i64) -> Result<Done, Error> {
        let request = CompactionRequest { revision };
        self.ask("/etcdserverpb.KV/Compact", &request, None).await
    }

    /// Makes a lease of so many seconds.
    pub async fn grant(&self, ttl: i64) -> Result<Lease, Error> {
        let request = LeaseGrantRequest { ttl };
        self.ask("/etcdserverpb.Lease/LeaseGrant", &request, None)
            .await
    }

    /// Has a lease last as long as at first, from now on. (The call is a stream of such requests; this is one of one.)
    pub async fn keep_alive(&self, id: i64) -> Result<Lease, Error> {
        let request = LeaseKeepAliveRequest { id };
        self.ask("/etcdserverpb.Lease/LeaseKeepAlive", &request, None)
            .await
    }

    /// Ends a lease, and what is bound to it.
    pub async fn revoke(&self, id: i64) -> Result<Done, Error> {
        let request = LeaseRevokeRequest { id };
        self.ask("/etcdserverpb.Lease/LeaseRevoke", &request, None)
            .await
    }

    /// The members that say that they lead etcd: one, or none while they elect.
    pub async fn leaders(&self) -> Vec<&str> {
        let mut leaders = Vec::new();
        for (address, channel) in &self.members {
            let asked = attempt(
                "/etcdserverpb.Maintenance/Status",
                &StatusRequest {},
                channel,
            );
            let Ok(StatusResponse { header, leader }) = asked.await else {
                continue;
            };
            if header.is_some_and(|header| header.member_id == leader) {
                leaders.push(address.as_str());
            }
        }
        leaders
    }

    /// Asks one member after the other until one answers, or until then.
    async fn ask<Q, A>(
        &self,
        method: &'static str,
        request: &Q,
        until: Option<Instant>,
    ) -> Result<A, Error>
    where
        Q: Message + Clone + 'static,
        A: Message + Default + 'static,
    {
        loop {
            let current = self.current.load(Ordering::Relaxed);
            let (address, channel) = &self.members[current];
            let status = match attempt(method, request, channel).await {
                Ok(answer) => return Ok(answer),
                Err(status) => status,
            };
            // Nothing else is looked for that way.
            if status.code() == Code::NotFound {
                return Err(Error::Lapsed);
            }
            if !is_transient(&status) {
                return Err(Error::Refused(chain(&status)));
            }
            tracing::debug!(member = address, method, %status, "etcd's member cannot be used");
            if until.is_some_and(|until| until <= Instant::now()) {
                return Err(Error::Unreachable {
                    members: self.to_string(),
                    cause: chain(&status),
                });
            }
            let next = (current + 1) % self.members.len();
            self.current.store(next, Ordering::Relaxed);
            tokio::time::sleep(PAUSE).await;
        }
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let addresses = self.members.iter().map(|(address, _)| address.as_str());
        f.write_str(&addresses.collect::<Vec<_>>().join(", "))
    }
}

impl Tls {
    fn config(&self) -> ClientTlsConfig {
        let authority = Certificate::from_pem(&self.authority);
        let config = ClientTlsConfig::new().ca_certificate(authority);
        match &self.identity {
            Some((certificate, key)) => config.identity(Identity::from_pem(certificate, key)),
            None => config,
        }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

impl FromStr for Location {
    type Err = String;

    fn from_str(text: &str) -> Result<Location, String> {
        let rest = text
            .strip_prefix(SCHEME)
            .ok_or("it is etcd://HOST[:PORT],...[/PREFIX]")?;
        let (members, prefix) = rest.split_once('/').unwrap_or((rest, PREFIX));
        if members.contains('@') {
            return Err("no user and password: a certificate, --etcd-cert".to_owned());
        }
        let members: Vec<String> = members.split(',').map(with_port).collect();
        if members.iter().any(|member| member.starts_with(':')) {
            return Err("a member of etcd has no name".to_owned());
        }
        let prefix = prefix.trim_matches('/');
        if prefix.is_empty() || prefix.contains(char::is_whitespace) {
            return Err("the prefix is no name".to_owned());
        }
        Ok(Location {
            members,
            prefix: prefix.to_owned(),
        })
    }
}

fn with_port(member: &str) -> String {
    if member.contains(':') && !member.ends_with(']') {
        member.to_owned()
    } else {
        format!("{member}:{PORT}")
    }
}

fn is_loopback(member: &str) -> bool {
    let host = member.rsplit_once(':').map_or(member, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
}

async fn attempt<Q, A>(method: &'static str, request: &Q, member: &Channel) -> Result<A, Status>
where
    Q: Message + Clone + 'static,
    A: Message + Default + 'static,
{
    // A state may be larger than what is usual.
    let mut grpc = Grpc::new(member.clone()).max_decoding_message_size(usize::MAX);
    let mut request = Request::new(request.clone());
    // A member without a leader is to say so, not to wait for one.
    let metadata = request.metadata_mut();
    metadata.insert("hasleader", MetadataValue::from_static("true"));
    let asked = async {
        let ready = grpc.ready().await;
        ready.map_err(|error| Status::unavailable(chain(&error)))?;
        let codec = ProstCodec::default();
        grpc.unary(request, PathAndQuery::from_static(method), codec)
            .await
    };
    match tokio::time::timeout(ATTEMPT, asked).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(Status::deadline_exceeded("it does not answer")),
    }
}

/// Whether it may be otherwise a moment later, or at another member.
fn is_transient(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable
        | Code::DeadlineExceeded
        | Code::Cancelled
        | Code::Unknown
        | Code::Internal
        | Code::Aborted => true,
        Code::ResourceExhausted => !status.message().contains("space exceeded"),
        _ => false,
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(": {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(text: &str) -> Vec<String> {
        text.parse::<Location>().unwrap().members
    }

    #[test]
    fn a_location_names_members_and_a_prefix() {
        assert_eq!(
            members("etcd://a,b:1,[::1]"),
            ["a:2379", "b:1", "[::1]:2379"]
        );
        let prefix = |text: &str| text.parse::<Location>().unwrap().prefix;
        assert_eq!(prefix("etcd://a"), "migshm");
        assert_eq!(prefix("etcd://a/clusters/one/"), "clusters/one");
    }

    #[test]
    fn what_is_no_location_is_refused_and_secrets_are_not_repeated() {
        for bad in ["a:1", "http://a", "etcd://", "etcd://a,,b", "etcd://a/ "] {
            assert!(bad.parse::<Location>().is_err(), "{bad}");
        }
        let refused = "etcd://root:secret@a".parse::<Location>().unwrap_err();
        assert!(!refused.contains("secret"), "{refused}");
    }

    #[tokio::test]
    async fn another_host_needs_tls() {
        let location = "etcd://127.0.0.1,10.0.0.1".parse().unwrap();
        let refused = Client::new(&location, None).err().unwrap().to_string();
        assert!(refused.contains("needs TLS"), "{refused}");
        let here = "etcd://127.0.0.1,[::1]:1,localhost".parse().unwrap();
        assert!(Client::new(&here, None).is_ok());
    }
}
