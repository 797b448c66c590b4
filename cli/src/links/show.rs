//! Links as a table, as JSON, as a picture.

use std::collections::BTreeMap;
use std::fmt::Write;

use migshm_coherence::links::{ProcessKey, Strength, links, totals};
use migshm_protocol::NodeId;
use migshm_protocol::accesses::{Counts, User};
use serde_json::{Value, json};

use super::snapshot::{Segment, Snapshot};

/// Width of the thickest line of a picture, in points; the thinnest has 1.
const THICKEST: f64 = 4.0;

/// Tables: of each segment, its processes and their links.
pub fn table(snapshot: &Snapshot, strong: f64) -> String {
    let mut out = String::new();
    for segment in &snapshot.segments {
        let id = segment.status;
        let _ = writeln!(
            out,
            "segment {}, key 0x{:08x}, {} bytes",
            id.shmid, id.key, id.bytes
        );
        let _ = writeln!(
            out,
            "  {:<32} {:>9} {:>9} {:>9} {:>9}  ",
            "process", "reads", "writes", "pages in", "out"
        );
        for (key, user, counts) in processes(segment) {
            let Counts {
                reads,
                writes,
                received,
                sent,
                ..
            } = counts;
            let state = match (user.ended, user.attached) {
                (Some(_), _) => "ended",
                (None, false) => "detached",
                (None, true) => "",
            };
            let name = name(snapshot, key, user);
            let _ = writeln!(
                out,
                "  {name:<32} {reads:>9} {writes:>9} {received:>9} {sent:>9}  {state}"
            );
        }
        let links = links(&segment.accounts, strong);
        if !links.is_empty() {
            let _ = writeln!(
                out,
                "  {:<6} {:>9} {:>9} {:>9}  between",
                "link", "again/s", "there", "back"
            );
        }
        let names = names(snapshot, segment);
        for link in links {
            let figures = match link.strength {
                Strength::Local => format!("{:>9} {:>9} {:>9}", "", "", ""),
                _ => format!("{:>9.1} {:>9.0} {:>9.0}", link.rate, link.to_b, link.to_a),
            };
            let _ = writeln!(
                out,
                "  {:<6} {figures}  {} and {}",
                word(link.strength),
                names[&link.a],
                names[&link.b]
            );
        }
        if segment.forgotten > 0 {
            let _ = writeln!(
                out,
                "  the nodes had no room for {} events, of this or other segments",
                segment.forgotten
            );
        }
    }
    out
}

/// All that the table says, and more.
pub fn json(snapshot: &Snapshot, strong: f64) -> Value {
    let process = |key: ProcessKey| json!({ "node": snapshot.node(key.0), "user": key.1 });
    let segments: Vec<Value> = snapshot
        .segments
        .iter()
        .map(|segment| {
            let processes: Vec<Value> = processes(segment)
                .map(|((node, _), user, counts)| {
                    json!({
                        "node": snapshot.node(node), "user": user.user, "pid": user.pid,
                        "command": user.command, "attached": user.attached,
                        "since": user.since, "ended": user.ended,
                        "reads": counts.reads, "writes": counts.writes,
                        "pages_received": counts.received, "bytes_received": counts.bytes_received,
                        "pages_sent": counts.sent, "bytes_sent": counts.bytes_sent,
                    })
                })
                .collect();
            let links: Vec<Value> = links(&segment.accounts, strong)
                .iter()
                .map(|link| {
                    json!({
                        "a": process(link.a), "b": process(link.b),
                        "link": word(link.strength), "rate": link.rate,
                        "pages_to_a": link.to_a, "pages_to_b": link.to_b,
                        "again": link.again, "bytes": link.bytes, "seconds": link.seconds,
                    })
                })
                .collect();
            json!({
                "shmid": segment.status.shmid,
                "key": format!("0x{:08x}", segment.status.key),
                "bytes": segment.status.bytes,
                "forgotten": segment.forgotten,
                "processes": processes,
                "links": links,
            })
        })
        .collect();
    json!({ "strong": strong, "segments": segments })
}

/// A graph for Graphviz: processes, boxed by node, and their links, all segments together: the
/// thicker the higher the rate. A strong link is solid, and its tooltip says through which segments; weak
/// ones are dashed, those within a node dotted.
pub fn dot(snapshot: &Snapshot, strong: f64) -> String {
    let mut out = String::from(
        "graph links {\n  layout=fdp; overlap=false; splines=true; K=2.2;\n  \
         node [shape=box, style=\"rounded,filled\", fillcolor=white, fontname=\"sans-serif\", fontsize=11];\n  \
         edge [fontname=\"sans-serif\", fontsize=9];\n",
    );
    let mut members: BTreeMap<NodeId, BTreeMap<u32, &User>> = BTreeMap::new();
    for segment in &snapshot.segments {
        for ((node, number), user, _) in processes(segment) {
            members.entry(node).or_default().insert(number, user);
        }
    }
    for (node, users) in &members {
        let name = quoted(&snapshot.node(*node));
        let _ = writeln!(
            out,
            "  subgraph cluster_{} {{\n    label={name}; fontname=\"sans-serif\"; style=filled; color=\"#e8eef5\";",
            node.0
        );
        for (number, user) in users {
            let label = quoted(&format!("{}\n{}", user.command, user.pid));
            let _ = writeln!(out, "    {} [label={label}];", vertex((*node, *number)));
        }
        out.push_str("  }\n");
    }
    let edges = edges(snapshot, strong);
    let highest = edges.values().map(|edge| edge.rate).fold(0.0, f64::max);
    for ((a, b), edge) in &edges {
        let width = 1.0 + (THICKEST - 1.0) * edge.rate.ln_1p() / highest.ln_1p().max(1.0);
        let style = match edge.strength {
            Strength::Strong => "style=solid, color=\"#c0392b\"",
            Strength::Weak => "style=dashed, color=\"#8fb3d1\"",
            Strength::Local => "style=dotted, color=\"#888888\"",
        };
        let label = match edge.strength {
            Strength::Strong => format!("{:.0}/s", edge.rate),
            _ => String::new(),
        };
        let _ = writeln!(
            out,
            "  {} -- {} [penwidth={width:.1}, label={}, tooltip={}, {style}];",
            vertex(*a),
            vertex(*b),
            quoted(&label),
            quoted(&edge.segments.join(", "))
        );
    }
    out.push_str("}\n");
    out
}

/// The links of two processes.
struct Edge {
    rate: f64,
    strength: Strength,
    /// Those that they are strongly linked through.
    segments: Vec<String>,
}

fn edges(snapshot: &Snapshot, strong: f64) -> BTreeMap<(ProcessKey, ProcessKey), Edge> {
    let mut edges = BTreeMap::new();
    for segment in &snapshot.segments {
        for link in links(&segment.accounts, strong) {
            let edge = edges.entry((link.a, link.b)).or_insert(Edge {
                rate: 0.0,
                strength: link.strength,
                segments: Vec::new(),
            });
            edge.rate += link.rate;
            if link.strength == Strength::Strong {
                edge.strength = Strength::Strong;
                edge.segments
                    .push(format!("segment {}", segment.status.shmid));
            }
        }
    }
    edges
}

impl Snapshot {
    /// A node's name.
    fn node(&self, node: NodeId) -> String {
        let name = self.nodes.get(&node).cloned();
        name.unwrap_or_else(|| node.to_string())
    }
}

/// The processes of a segment, and what they did to it.
fn processes(segment: &Segment) -> impl Iterator<Item = (ProcessKey, &User, Counts)> {
    segment.accounts.iter().flat_map(|(node, account)| {
        let totals = totals(account, *node);
        account.users.iter().map(move |user| {
            let counts = totals.get(&user.user).copied().unwrap_or_default();
            ((*node, user.user), user, counts)
        })
    })
}

fn names(snapshot: &Snapshot, segment: &Segment) -> BTreeMap<ProcessKey, String> {
    processes(segment)
        .map(|(key, user, _)| (key, name(snapshot, key, user)))
        .collect()
}

fn name(snapshot: &Snapshot, (node, _): ProcessKey, user: &User) -> String {
    format!(
        "{}:{} {}",
        snapshot.node(node),
        user.pid,
        printable(&user.command)
    )
}

/// A process chooses the name of its command itself.
fn printable(text: &str) -> String {
    let plain = |c: char| if c.is_control() { '?' } else { c };
    text.chars().map(plain).collect()
}

fn word(strength: Strength) -> &'static str {
    match strength {
        Strength::Strong => "strong",
        Strength::Weak => "weak",
        Strength::Local => "local",
    }
}

fn vertex((node, user): ProcessKey) -> String {
    format!("p{}_{user}", node.0)
}

/// A string of the DOT language.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c if c.is_control() => out.push('?'),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}
