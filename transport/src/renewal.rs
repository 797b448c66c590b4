//! Certificates that change while a daemon runs.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use tokio::signal::unix::{SignalKind, signal};

use crate::endpoint::Endpoint;
use crate::pki::Identity;

/// How often the files are looked at if nobody asks for it.
const INTERVAL: Duration = Duration::from_secs(3600);
/// How long before its end the log warns of it.
const NOTICE: Duration = Duration::from_secs(30 * 24 * 3600);

/// Has an endpoint use what a directory holds: whenever this process gets SIGHUP, which does not end
/// it from now on, and every hour. Runs for ever. What does not work is logged, and changes nothing.
///
/// # Errors
/// Those of `sigaction(2)`.
pub fn follow(
    endpoint: Endpoint,
    directory: PathBuf,
) -> io::Result<impl Future<Output = Infallible>> {
    let mut hangup = signal(SignalKind::hangup())?;
    let mut look = tokio::time::interval(INTERVAL);
    Ok(async move {
        loop {
            let asked = tokio::select! {
                _ = hangup.recv() => true,
                _ = look.tick() => false,
            };
            renew(&endpoint, &directory, asked);
        }
    })
}

fn renew(endpoint: &Endpoint, directory: &std::path::Path, asked: bool) {
    let peer = endpoint.peer();
    let identity = match Identity::load(directory, peer) {
        Ok(identity) => identity,
        Err(error) => {
            return tracing::error!(%peer, %error, "the certificates stay as they were");
        }
    };
    if let Err(error) = endpoint.renew(&identity) {
        return tracing::error!(%peer, %error, "the certificates stay as they were");
    }
    let expires = OffsetDateTime::from(identity.expires()).date();
    if identity.expires() < SystemTime::now() + NOTICE {
        tracing::warn!(%peer, %expires, "this daemon's certificate expires soon: `migshm pki renew`");
    } else if asked {
        tracing::info!(%peer, %expires, "certificates renewed");
    }
}
