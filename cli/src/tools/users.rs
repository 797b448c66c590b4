//! Users: their names, and what they have created.

use std::collections::BTreeMap;
use std::process::ExitCode;

use migshm_protocol::ids::PAGE_SIZE;
use serde_json::{Value, json};

use super::Client;

/// What a user has created that exists.
#[derive(Default)]
struct Usage {
    segments: u64,
    bytes: u64,
    sets: u64,
    semaphores: u64,
    queues: u64,
}

/// Prints what each user has created.
pub fn show(client: &mut Client, as_json: bool) -> anyhow::Result<ExitCode> {
    let mut users: BTreeMap<u32, Usage> = BTreeMap::new();
    for segment in client.segments()? {
        let usage = users.entry(segment.perm.cuid).or_default();
        usage.segments += 1;
        usage.bytes += segment.size.next_multiple_of(PAGE_SIZE as u64);
    }
    for set in client.sets()? {
        let usage = users.entry(set.perm.cuid).or_default();
        usage.sets += 1;
        usage.semaphores += set.nsems;
    }
    for queue in client.queues()? {
        users.entry(queue.perm.cuid).or_default().queues += 1;
    }
    if as_json {
        let users: Vec<Value> = users
            .iter()
            .map(|(uid, u)| {
                json!({
                    "uid": uid, "segments": u.segments, "bytes": u.bytes,
                    "sets": u.sets, "semaphores": u.semaphores, "queues": u.queues,
                })
            })
            .collect();
        println!(
            "{}",
            serde_json::to_string_pretty(&json!({ "users": users }))?
        );
        return Ok(ExitCode::SUCCESS);
    }
    let names = Names::load();
    println!("\n------ Users --------");
    println!(
        "{:<10} {:<10} {:<16} {:<10} {:<10} {:<10}",
        "creator", "segments", "bytes", "sets", "semaphores", "queues"
    );
    for (uid, u) in users {
        println!(
            "{:<10.10} {:<10} {:<16} {:<10} {:<10} {:<10}",
            names.name(uid),
            u.segments,
            u.bytes,
            u.sets,
            u.semaphores,
            u.queues
        );
    }
    println!();
    Ok(ExitCode::SUCCESS)
}

/// Names of users, from `/etc/passwd`.
pub struct Names(Vec<(u32, String)>);

impl Names {
    /// Those that there are.
    pub fn load() -> Names {
        let text = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let users = text.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?.to_owned();
            Some((fields.nth(1)?.parse().ok()?, name))
        });
        Names(users.collect())
    }

    /// The name of a user, or his number.
    pub fn name(&self, uid: u32) -> String {
        let known = self.0.iter().find(|(id, _)| *id == uid);
        known.map_or_else(|| uid.to_string(), |(_, name)| name.clone())
    }
}
