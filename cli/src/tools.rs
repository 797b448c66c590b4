//! `migshm status`, `upgrade`, `ipcs`, `ipcrm`: what a cluster holds, through the local daemon.
//!
//! The tools are clients like any program: the daemon answers them with what their user may see
//! and do.

mod users;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};
use migshm_protocol::call::{
    Answer, Call, Consistency, Errno, MsgCommand, MsgStatus, SemCommand, SemStatus, ShmCommand,
    ShmStatus, StatBy,
};
use migshm_protocol::limits::MAX_LOCAL;
use migshm_protocol::local::{FromNode, LOCAL_VERSION, SOCKET, ToNode};
use migshm_protocol::{NodeId, codec};
use serde_json::{Value, json};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::config;
use users::Names;

/// `shm_perm.mode` bits that `shmctl(2)` documents.
const SHM_DEST: u32 = 0o1000;
const SHM_LOCKED: u32 = 0o2000;
const PERMISSIONS: u32 = 0o777;

/// Which daemon a tool asks.
#[derive(Debug, clap::Args)]
pub struct Daemon {
    /// Where the daemon's socket is [default: as for programs].
    #[arg(long, value_name = "DIR", env = "MIGSHM_RUNTIME_DIR")]
    runtime_dir: Option<PathBuf>,
}

/// Show what the local node daemon knows: members, memory, counters.
#[derive(Debug, clap::Args)]
pub struct StatusArgs {
    #[command(flatten)]
    daemon: Daemon,
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// Have the program that is in the place of the local node daemon's now take over from it; its programs go on.
#[derive(Debug, clap::Args)]
pub struct UpgradeArgs {
    #[command(flatten)]
    daemon: Daemon,
}

/// List the cluster's message queues, shared memory segments and semaphore sets, like ipcs(1).
#[derive(Debug, clap::Args)]
pub struct IpcsArgs {
    #[command(flatten)]
    daemon: Daemon,
    /// As JSON.
    #[arg(long)]
    json: bool,
    /// Message queues.
    #[arg(short = 'q', long = "queues")]
    queues: bool,
    /// Shared memory segments.
    #[arg(short = 'm', long = "shmems")]
    shmems: bool,
    /// Semaphore sets.
    #[arg(short = 's', long = "semaphores")]
    semaphores: bool,
    /// Instead: what each user has created of all, as quotas count it.
    #[arg(short = 'u', long = "users", conflicts_with_all = ["queues", "shmems", "semaphores"])]
    users: bool,
}

/// Remove message queues, segments and semaphore sets from the cluster, like ipcrm(1).
#[derive(Debug, clap::Args)]
#[command(arg_required_else_help = true)]
pub struct IpcrmArgs {
    #[command(flatten)]
    daemon: Daemon,
    /// Remove the segment with this id.
    #[arg(short = 'm', long, value_name = "ID")]
    shmem_id: Vec<i32>,
    /// Remove the segment with this key.
    #[arg(short = 'M', long, value_name = "KEY", value_parser = parse_key)]
    shmem_key: Vec<i32>,
    /// Remove the semaphore set with this id.
    #[arg(short = 's', long, value_name = "ID")]
    semaphore_id: Vec<i32>,
    /// Remove the semaphore set with this key.
    #[arg(short = 'S', long, value_name = "KEY", value_parser = parse_key)]
    semaphore_key: Vec<i32>,
    /// Remove the message queue with this id.
    #[arg(short = 'q', long, value_name = "ID")]
    queue_id: Vec<i32>,
    /// Remove the message queue with this key.
    #[arg(short = 'Q', long, value_name = "KEY", value_parser = parse_key)]
    queue_key: Vec<i32>,
}

/// A connection to a node daemon.
pub struct Client {
    socket: Socket,
    buffer: Vec<u8>,
    requests: u64,
}

impl Client {
    /// Connects and greets.
    pub fn connect(daemon: &Daemon) -> anyhow::Result<Client> {
        let directory = daemon
            .runtime_dir
            .clone()
            .unwrap_or_else(config::used_runtime_dir);
        let path = directory.join(SOCKET);
        let socket = Socket::new(Domain::UNIX, Type::from(libc::SOCK_SEQPACKET), None)?;
        SockAddr::unix(&path)
            .and_then(|address| socket.connect(&address))
            .with_context(|| {
                format!(
                    "no node daemon at {}; start a program with `migshm run`, or `migshm node`",
                    path.display()
                )
            })?;
        let mut client = Client {
            socket,
            buffer: vec![0; MAX_LOCAL],
            requests: 0,
        };
        match client
            .exchange(&ToNode::Hello {
                version: LOCAL_VERSION,
                forked_from: 0,
                anchor: 0,
            })?
            .0
        {
            FromNode::Welcome { .. } => Ok(client),
            FromNode::Refused { errno } => {
                bail!("the node daemon refuses this program: {}", describe(errno))
            }
            other => bail!("the node daemon answers {other:?}"),
        }
    }

    fn exchange(&mut self, message: &ToNode) -> anyhow::Result<(FromNode, &[u8])> {
        let length = codec::encode_into(message, &mut self.buffer)?;
        self.socket.write_all(&self.buffer[..length])?;
        match self.socket.read(&mut self.buffer)? {
            0 => bail!("the node daemon has closed the connection"),
            length => Ok(codec::decode(&self.buffer[..length])?),
        }
    }

    /// The answer to a request made by `message` from the request's number.
    fn request(
        &mut self,
        message: impl FnOnce(u64) -> ToNode,
    ) -> anyhow::Result<(Result<Answer, Errno>, &[u8])> {
        self.requests += 1;
        let number = self.requests;
        match self.exchange(&message(number))? {
            (FromNode::Answer { id, outcome }, raw) if id == number => Ok((outcome, raw)),
            (other, _) => bail!("the node daemon answers {other:?}"),
        }
    }

    fn call(&mut self, call: Call) -> anyhow::Result<Result<Answer, Errno>> {
        Ok(self.request(|id| ToNode::Call { id, call })?.0)
    }

    /// The outcome of a call, with what follows it.
    pub fn call_with_raw(&mut self, call: Call) -> anyhow::Result<(Result<Answer, Errno>, &[u8])> {
        self.request(|id| ToNode::Call { id, call })
    }

    fn status(&mut self) -> anyhow::Result<Value> {
        let (outcome, raw) = self.request(|id| ToNode::Status { id })?;
        outcome.map_err(|errno| anyhow!(describe(errno)))?;
        serde_json::from_slice(raw).context("the node daemon's status is not JSON")
    }

    /// The names of the cluster's nodes.
    pub fn nodes(&mut self) -> anyhow::Result<BTreeMap<NodeId, String>> {
        let status = self.status()?;
        let members = status["members"].as_array().into_iter().flatten();
        let member = |m: &Value| {
            let node = u16::try_from(m["node"].as_u64()?).ok()?;
            Some((NodeId(node), m["name"].as_str()?.to_owned()))
        };
        Ok(members.filter_map(member).collect())
    }

    fn shm(&mut self, id: i32, command: ShmCommand) -> anyhow::Result<Result<Answer, Errno>> {
        self.call(Call::ShmCtl { id, command })
    }

    fn sem(&mut self, id: i32, command: SemCommand) -> anyhow::Result<Result<Answer, Errno>> {
        self.call(Call::SemCtl { id, command })
    }

    fn msg(&mut self, id: i32, command: MsgCommand) -> anyhow::Result<Result<Answer, Errno>> {
        self.call(Call::MsgCtl { id, command })
    }

    /// All segments.
    pub fn segments(&mut self) -> anyhow::Result<Vec<ShmStatus>> {
        let highest = match self.shm(0, ShmCommand::Usage)? {
            Ok(Answer::ShmUsage(usage)) => usage.highest,
            other => bail!("SHM_INFO answered {other:?}"),
        };
        let mut segments = Vec::new();
        for index in 0..=highest {
            if let Ok(Answer::Segment(status)) = self.shm(index, ShmCommand::Stat(StatBy::Any))? {
                segments.push(status);
            }
        }
        Ok(segments)
    }

    fn sets(&mut self) -> anyhow::Result<Vec<SemStatus>> {
        let highest = match self.sem(0, SemCommand::Usage)? {
            Ok(Answer::SemLimits(limits)) => limits.highest,
            other => bail!("SEM_INFO answered {other:?}"),
        };
        let mut sets = Vec::new();
        for index in 0..=highest {
            if let Ok(Answer::Set(status)) = self.sem(index, SemCommand::Stat(StatBy::Any))? {
                sets.push(status);
            }
        }
        Ok(sets)
    }

    fn queues(&mut self) -> anyhow::Result<Vec<MsgStatus>> {
        let highest = match self.msg(0, MsgCommand::Usage)? {
            Ok(Answer::MsgLimits(limits)) => limits.highest,
            other => bail!("MSG_INFO answered {other:?}"),
        };
        let mut queues = Vec::new();
        for index in 0..=highest {
            if let Ok(Answer::Queue(status)) = self.msg(index, MsgCommand::Stat(StatBy::Any))? {
                queues.push(status);
            }
        }
        Ok(queues)
    }
}

/// Returns when another daemon serves in the place of the one that was asked.
pub fn upgrade(args: UpgradeArgs) -> anyhow::Result<ExitCode> {
    let mut client = Client::connect(&args.daemon)?;
    let (outcome, _) = client.request(|id| ToNode::Upgrade { id })?;
    outcome.map_err(|errno| anyhow!("it cannot be replaced: {}", describe(errno)))?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the daemon's own account.
pub fn status(args: StatusArgs) -> anyhow::Result<ExitCode> {
    let status = Client::connect(&args.daemon)?.status()?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&status)?);
    } else {
        print_indented(&status, 0);
    }
    Ok(ExitCode::SUCCESS)
}

fn print_indented(value: &Value, depth: usize) {
    let indent = "  ".repeat(depth);
    let Value::Object(fields) = value else {
        return println!("{indent}{}", plain(value));
    };
    for (name, value) in fields {
        match value {
            Value::Object(_) => {
                println!("{indent}{name}:");
                print_indented(value, depth + 1);
            }
            Value::Array(items) if items.iter().any(Value::is_object) => {
                println!("{indent}{name}:");
                for item in items.iter().filter_map(Value::as_object) {
                    let fields: Vec<String> = item
                        .iter()
                        .map(|(name, value)| format!("{name}={}", plain(value)))
                        .collect();
                    println!("{indent}  {}", fields.join(" "));
                }
            }
            value => println!("{indent}{name}: {}", plain(value)),
        }
    }
}

/// A value without quotation marks.
fn plain(value: &Value) -> String {
    value
        .as_str()
        .map_or_else(|| value.to_string(), str::to_owned)
}

/// Prints the objects, in the tables of util-linux.
pub fn ipcs(args: IpcsArgs) -> anyhow::Result<ExitCode> {
    let mut client = Client::connect(&args.daemon)?;
    if args.users {
        return users::show(&mut client, args.json);
    }
    let all = !(args.queues || args.shmems || args.semaphores);
    let queues = (all || args.queues).then(|| client.queues()).transpose()?;
    let segments = (all || args.shmems)
        .then(|| client.segments())
        .transpose()?;
    let sets = (all || args.semaphores)
        .then(|| client.sets())
        .transpose()?;
    if args.json {
        let queues: Option<Vec<Value>> = queues.map(|list| list.iter().map(queue_json).collect());
        let segments: Option<Vec<Value>> =
            segments.map(|list| list.iter().map(segment_json).collect());
        let sets: Option<Vec<Value>> = sets.map(|list| list.iter().map(set_json).collect());
        let mut tables = serde_json::Map::new();
        tables.extend(queues.map(|list| ("messages".to_owned(), list.into())));
        tables.extend(segments.map(|list| ("sharedmemory".to_owned(), list.into())));
        tables.extend(sets.map(|list| ("semaphores".to_owned(), list.into())));
        println!("{}", serde_json::to_string_pretty(&tables)?);
        return Ok(ExitCode::SUCCESS);
    }
    let names = Names::load();
    if let Some(queues) = queues {
        println!("\n------ Message Queues --------");
        println!(
            "{:<10} {:<10} {:<10} {:<10} {:<12} {:<12}",
            "key", "msqid", "owner", "perms", "used-bytes", "messages"
        );
        for q in queues {
            println!(
                "0x{:08x} {:<10} {:<10.10} {:<10o} {:<12} {:<12}",
                q.perm.key,
                q.id,
                names.name(q.perm.uid),
                q.perm.mode & PERMISSIONS,
                q.cbytes,
                q.qnum
            );
        }
    }
    if let Some(segments) = segments {
        println!("\n------ Shared Memory Segments --------");
        println!(
            "{:<10} {:<10} {:<10} {:<10} {:<10} {:<10} {:<12} {:<12}",
            "key", "shmid", "owner", "perms", "bytes", "nattch", "consistency", "status"
        );
        for s in segments {
            let dest = if s.perm.mode & SHM_DEST != 0 {
                "dest"
            } else {
                ""
            };
            let locked = if s.perm.mode & SHM_LOCKED != 0 {
                "locked"
            } else {
                ""
            };
            println!(
                "0x{:08x} {:<10} {:<10.10} {:<10o} {:<10} {:<10} {:<12} {dest:<6} {locked:<6}",
                s.perm.key,
                s.id,
                names.name(s.perm.uid),
                s.perm.mode & PERMISSIONS,
                s.size,
                s.nattch,
                s.consistency.name()
            );
        }
    }
    if let Some(sets) = sets {
        println!("\n------ Semaphore Arrays --------");
        println!(
            "{:<10} {:<10} {:<10} {:<10} {:<10}",
            "key", "semid", "owner", "perms", "nsems"
        );
        for s in sets {
            println!(
                "0x{:08x} {:<10} {:<10.10} {:<10o} {:<10}",
                s.perm.key,
                s.id,
                names.name(s.perm.uid),
                s.perm.mode & PERMISSIONS,
                s.nsems
            );
        }
    }
    println!();
    Ok(ExitCode::SUCCESS)
}

/// When what was written is at a second node.
const fn durability(consistency: Consistency) -> &'static str {
    match consistency {
        Consistency::Durable => "release",
        Consistency::Sequential | Consistency::Release => "none",
    }
}

fn segment_json(s: &ShmStatus) -> Value {
    json!({
        "key": format!("0x{:08x}", s.perm.key), "shmid": s.id,
        "uid": s.perm.uid, "gid": s.perm.gid, "cuid": s.perm.cuid, "cgid": s.perm.cgid,
        "perms": format!("{:o}", s.perm.mode & PERMISSIONS),
        "dest": s.perm.mode & SHM_DEST != 0, "locked": s.perm.mode & SHM_LOCKED != 0,
        "bytes": s.size, "consistency": s.consistency.name(), "durability": durability(s.consistency), "nattch": s.nattch, "cpid": s.cpid, "lpid": s.lpid,
        "atime": s.atime, "dtime": s.dtime, "ctime": s.ctime,
    })
}

fn set_json(s: &SemStatus) -> Value {
    json!({
        "key": format!("0x{:08x}", s.perm.key), "semid": s.id,
        "uid": s.perm.uid, "gid": s.perm.gid, "cuid": s.perm.cuid, "cgid": s.perm.cgid,
        "perms": format!("{:o}", s.perm.mode & PERMISSIONS),
        "nsems": s.nsems, "otime": s.otime, "ctime": s.ctime,
    })
}

fn queue_json(q: &MsgStatus) -> Value {
    json!({
        "key": format!("0x{:08x}", q.perm.key), "msqid": q.id,
        "uid": q.perm.uid, "gid": q.perm.gid, "cuid": q.perm.cuid, "cgid": q.perm.cgid,
        "perms": format!("{:o}", q.perm.mode & PERMISSIONS),
        "usedbytes": q.cbytes, "msgs": q.qnum, "qbytes": q.qbytes,
        "lspid": q.lspid, "lrpid": q.lrpid,
        "stime": q.stime, "rtime": q.rtime, "ctime": q.ctime,
    })
}

/// Removes what is named, as far as it can be; fails if anything could not.
pub fn ipcrm(args: IpcrmArgs) -> anyhow::Result<ExitCode> {
    let mut client = Client::connect(&args.daemon)?;
    let mut failed = false;
    let mut note = |what: &str, name: String, outcome: Result<Answer, Errno>| match outcome {
        Ok(_) => {}
        Err(errno) => {
            failed = true;
            eprintln!("migshm: {what} {name}: {}", describe(errno));
        }
    };
    for id in args.shmem_id {
        note(
            "segment",
            id.to_string(),
            client.shm(id, ShmCommand::Remove)?,
        );
    }
    for key in args.shmem_key {
        let removed = match client.call(Call::ShmGet {
            key,
            size: 0,
            flags: 0,
            consistency: None,
        })? {
            Ok(Answer::Value(id)) => client.shm(id, ShmCommand::Remove)?,
            other => other,
        };
        note("segment with key", format!("{key:#x}"), removed);
    }
    for id in args.semaphore_id {
        note(
            "semaphore set",
            id.to_string(),
            client.sem(id, SemCommand::Remove)?,
        );
    }
    for key in args.semaphore_key {
        let removed = match client.call(Call::SemGet {
            key,
            count: 0,
            flags: 0,
        })? {
            Ok(Answer::Value(id)) => client.sem(id, SemCommand::Remove)?,
            other => other,
        };
        note("semaphore set with key", format!("{key:#x}"), removed);
    }
    for id in args.queue_id {
        note(
            "message queue",
            id.to_string(),
            client.msg(id, MsgCommand::Remove)?,
        );
    }
    for key in args.queue_key {
        let removed = match client.call(Call::MsgGet { key, flags: 0 })? {
            Ok(Answer::Value(id)) => client.msg(id, MsgCommand::Remove)?,
            other => other,
        };
        note("message queue with key", format!("{key:#x}"), removed);
    }
    Ok(if failed {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

/// A key in decimal, octal (leading 0) or hexadecimal (0x), as `strtoul` reads it. IPC_PRIVATE
/// names nothing.
fn parse_key(text: &str) -> Result<i32, String> {
    let number = match (text.strip_prefix("0x"), text.strip_prefix('0')) {
        (Some(digits), _) => u32::from_str_radix(digits, 16),
        (None, Some(digits)) if !digits.is_empty() => u32::from_str_radix(digits, 8),
        _ => text.parse(),
    };
    match number {
        Ok(0) => Err("IPC_PRIVATE is no object's key".to_owned()),
        Ok(number) => Ok(number.cast_signed()),
        Err(error) => Err(error.to_string()),
    }
}

/// What an errno means, of an object.
pub fn describe(errno: Errno) -> String {
    match errno {
        Errno::EIDRM | Errno::EINVAL | Errno::ENOENT => "does not exist".to_owned(),
        Errno::EPERM | Errno::EACCES => "permission denied".to_owned(),
        Errno(number) => io::Error::from_raw_os_error(number).to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_in_three_bases() {
        assert_eq!(parse_key("0xffffffff"), Ok(-1));
        assert_eq!(parse_key("017"), Ok(15));
        assert_eq!(parse_key("42"), Ok(42));
        for bad in ["0", "0x", "08", "x", "4294967296", ""] {
            assert!(parse_key(bad).is_err(), "{bad}");
        }
    }
}
