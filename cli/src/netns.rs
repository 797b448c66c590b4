//! Network namespaces of a laboratory cluster: one for each host, and one with the bridge that
//! joins them, so that the machine's own network is not touched.
//!
//! ```text
//!  ID-lan:  bridge ─┬─ port "coordinator" ══ eth0 10.199.0.1  :ID-coordinator
//!                   ├─ port "node1"       ══ eth0 10.199.0.2  :ID-node1
//!                   └─ ...
//! ```
//!
//! Cutting a host's link takes its port down. ID is the name of the lab's directory.

use std::fs::File;
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

/// Where `ip netns` keeps namespaces.
const DIRECTORY: &str = "/run/netns";
/// The namespace with the bridge.
const LAN: &str = "lan";

/// The namespaces of a lab.
#[derive(Debug)]
pub struct Network {
    id: String,
}

impl Network {
    /// Makes and joins the namespaces of `hosts`, which get the addresses of [`address`].
    pub fn create(lab: &Path, hosts: &[String]) -> anyhow::Result<Network> {
        let id = id(lab);
        let lan = format!("{id}-{LAN}");
        let mut script = format!("netns add {lan}\n");
        for host in hosts {
            script += &format!("netns add {id}-{host}\n");
        }
        ip(&[], &script)?;
        let mut script = "link add bridge type bridge\nlink set bridge up\n".to_owned();
        for host in hosts {
            script += &format!(
                "link add {host} type veth peer name eth0 netns {id}-{host}\nlink set {host} master bridge up\n"
            );
        }
        ip(&["-n", &lan], &script)?;
        for (index, host) in hosts.iter().enumerate() {
            let address = address(index);
            let script =
                format!("link set lo up\naddr add {address}/16 dev eth0\nlink set eth0 up\n");
            ip(&["-n", &format!("{id}-{host}")], &script)?;
        }
        Ok(Network { id })
    }

    /// Takes a host's link down, or up again.
    pub fn set_link(&self, host: &str, up: bool) -> anyhow::Result<()> {
        let state = if up { "up" } else { "down" };
        ip(
            &["-n", &format!("{}-{LAN}", self.id)],
            &format!("link set {host} {state}\n"),
        )
    }
}

/// Address of the host with this index.
pub fn address(index: usize) -> Ipv4Addr {
    let number = u16::try_from(index + 1).expect("a lab is small");
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, 199, high, low)
}

/// The namespace of a lab's host; it exists only if the lab has a network.
pub fn path(lab: &Path, host: &str) -> PathBuf {
    Path::new(DIRECTORY).join(format!("{}-{host}", id(lab)))
}

/// Moves this thread into a namespace. Only makes system calls.
pub fn enter(path: &Path) -> io::Result<()> {
    enter_file(&File::open(path)?)
}

/// [`enter`], for a child between fork and exec.
pub fn enter_file(namespace: &File) -> io::Result<()> {
    // SAFETY: plain integers.
    match unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Removes all namespaces of a lab; what is left of a failed creation too.
pub fn remove(lab: &Path) {
    let prefix = format!("{}-", id(lab));
    let names = std::fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    for name in names.filter_map(|entry| entry.file_name().into_string().ok()) {
        if name.starts_with(&prefix)
            && let Err(error) = ip(&[], &format!("netns delete {name}\n"))
        {
            eprintln!("migshm: {error:#}");
        }
    }
}

fn id(lab: &Path) -> String {
    lab.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// Runs `ip` on a batch of commands.
fn ip(options: &[&str], script: &str) -> anyhow::Result<()> {
    let mut child = Command::new("ip")
        .args(options)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run ip; --netns needs iproute2")?;
    // If it has ended already, its status says why.
    let _ = child
        .stdin
        .take()
        .expect("piped")
        .write_all(script.as_bytes());
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!(
            "ip {}: {}",
            options.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
