//! The homes of extents go where they are used, and that pays. And what the access log tells of it.

use migshm_tests::{Lab, Process, eventually, is_root_for, migshm, run};
use serde_json::Value;

/// An extent.
const EXTENT: u64 = 2 << 20;
const PAGES: u64 = 512;

fn process(lab: &Lab, node: usize, bytes: u64) -> Process {
    let mut process = lab.start(node, "sysv");
    process.obey(&format!("segment 1 {bytes}"));
    process
}

/// Extents at home at a node.
fn homes(lab: &Lab, node: usize) -> u64 {
    lab.status(node)["homes"].as_u64().expect("a number")
}

fn counter(lab: &Lab, node: usize, name: &str) -> u64 {
    let status = lab.status(node);
    status["coherence"][name].as_u64().expect("a number")
}

/// Requests that all nodes' homes have served.
fn requests(lab: &Lab, nodes: usize) -> u64 {
    (1..=nodes).map(|node| counter(lab, node, "requests")).sum()
}

/// `migshm links` on node 1.
fn links(lab: &Lab, options: &[&str]) -> Value {
    let mut command = lab.inside(migshm_tests::built("target/release/migshm"));
    run(command.args(["links", "--json"]).args(options))
        .succeeded()
        .json()
}

#[test]
fn the_home_of_an_extent_follows_its_only_user() {
    let lab = Lab::new(2);
    let mut first = process(&lab, 1, 2 * EXTENT);
    first.obey("fill 1");
    let mut second = process(&lab, 2, 2 * EXTENT);
    second.obey("part 0 512");
    second.obey("fill 2");
    eventually("the home moves", || homes(&lab, 2) == 1);
    assert_eq!(counter(&lab, 1, "home_moves"), 1);
    // From now on faults of node 2 are served there: all of what it has is its own.
    let served = counter(&lab, 1, "requests");
    second.obey("part 0 512");
    for value in 3..10 {
        second.obey(&format!("fill {value}"));
        second.obey(&format!("check {value}"));
    }
    assert_eq!(counter(&lab, 1, "requests"), served);
    // What node 1 wants of it, it asks for there, and gets in two hops.
    let before = counter(&lab, 2, "requests");
    // (Too few for a stream.)
    first.obey("part 0 5");
    first.obey("check 9");
    assert_eq!(counter(&lab, 2, "requests"), before + 5);
    assert_eq!(homes(&lab, 2), 1);
    second.obey("remove");
}

#[test]
fn a_page_that_nobody_has_touched_costs_its_home_no_message() {
    let lab = Lab::new(2);
    // Node 1 uses the first 64 pages, then node 2 goes through the whole extent.
    let mut first = process(&lab, 1, EXTENT);
    first.obey("part 0 64");
    first.obey("fill 1");
    let mut second = process(&lab, 2, EXTENT);
    second.obey("part 0 64");
    second.obey("fill 2");
    eventually("the home moves", || homes(&lab, 2) == 1);
    let served = counter(&lab, 1, "requests");
    let received = || lab.status(2)["counters"]["pages_received"].clone();
    let before = received();
    second.obey("part 64 512");
    second.obey("fill 3");
    assert_eq!(counter(&lab, 1, "requests"), served);
    assert_eq!(received(), before);
    second.obey("remove");
}

#[test]
fn a_segment_that_is_used_in_blocks_has_its_directory_with_the_users() {
    const NODES: usize = 3;
    const BLOCKS: u64 = 6;
    let lab = Lab::new(NODES);
    let mut first = process(&lab, 1, BLOCKS * EXTENT);
    first.obey("fill 1");
    let mut users: Vec<Process> = vec![first];
    for node in 2..=NODES {
        users.push(process(&lab, node, BLOCKS * EXTENT));
    }
    // Blocks of one user each, in turn. Node 1's are there, and it does not fault on them.
    for block in 0..BLOCKS {
        let user = &mut users[block as usize % NODES];
        user.obey(&format!("part {} {}", block * PAGES, (block + 1) * PAGES));
        user.obey("fill 2");
    }
    for node in 2..=NODES {
        eventually("each block's home is with its user", || {
            homes(&lab, node) == BLOCKS / NODES as u64
        });
    }
    // Extents are opened at their first request; node 1's own have not been asked for.
    assert_eq!(
        counter(&lab, 1, "home_moves"),
        BLOCKS - BLOCKS / NODES as u64
    );

    // A boundary that a neighbour reads is asked for where it was written.
    let before = requests(&lab, NODES);
    let served = counter(&lab, 2, "requests");
    users[2].obey(&format!("part {PAGES} {}", PAGES + 1));
    users[2].obey("check 2");
    assert_eq!(counter(&lab, 2, "requests"), served + 1);
    assert_eq!(requests(&lab, NODES), before + 1);
    for node in 1..=NODES {
        let status = lab.status(node);
        assert_eq!(status["coherence"]["protocol_errors"], 0, "{status}");
    }
    users[0].obey("remove");
}

#[test]
fn what_is_evicted_stays_readable_while_its_home_moves() {
    let lab = Lab::with(3, &["--memory", "16M"]);
    let bytes = 8 * EXTENT;
    let mut users: Vec<Process> = (1..=3).map(|node| process(&lab, node, bytes)).collect();
    for value in 1..7 {
        users[value % 3].obey(&format!("fill {value}"));
        users[(value + 1) % 3].obey(&format!("check {value}"));
    }
    let sum = |name| (1..=3).map(|node| counter(&lab, node, name)).sum::<u64>();
    assert!(sum("write_backs") + sum("evictions") > 0);
    assert!(sum("home_moves") > 0);
    assert_eq!(sum("protocol_errors"), 0);
    // What nodes have promised is what homes need, wherever they are now.
    eventually("each extent has one home", || {
        (1..=3).map(|node| homes(&lab, node)).sum::<u64>() == 8
    });
    users[0].obey("remove");
}

#[test]
fn processes_that_take_turns_are_strongly_linked_and_others_weakly() {
    let lab = Lab::new(2);
    // Two pairs, each of which has a page of one segment, and a bystander.
    let mut users: Vec<Process> = Vec::new();
    for (node, part) in [(1, 0), (2, 0), (1, 1), (2, 1), (2, 2)] {
        let mut user = process(&lab, node, EXTENT);
        user.obey(&format!("part {part} {}", part + 1));
        users.push(user);
    }
    for value in 0..300 {
        users[value % 2].obey(&format!("fill {value}"));
    }
    for pair in [2, 3] {
        users[pair].obey("fill 7");
    }
    users[4].obey("fill 1");
    // What has ended is still told of.
    users.remove(4).kill();

    let found = links(&lab, &["--strong", "0.01"]);
    let segment = &found["segments"][0];
    let processes = segment["processes"].as_array().expect("a list");
    let pids: Vec<i64> = users.iter().map(|user| i64::from(user.pid())).collect();
    let user = |end: &Value| -> Option<usize> {
        let is_it = |p: &&Value| p["node"] == end["node"] && p["user"] == end["user"];
        let process = processes.iter().find(is_it)?;
        pids.iter().position(|pid| process["pid"] == *pid)
    };
    let links = segment["links"].as_array().expect("a list");
    let link = |a: usize, b: usize| {
        let ends = |l: &&Value| {
            let found = [user(&l["a"]), user(&l["b"])];
            found == [Some(a), Some(b)] || found == [Some(b), Some(a)]
        };
        links.iter().find(ends).expect("every pair has one")
    };
    let turns = link(0, 1);
    assert_eq!(turns["link"], "strong", "{turns}");
    let pages = |l: &Value| l["pages_to_a"].as_f64().unwrap() + l["pages_to_b"].as_f64().unwrap();
    assert!((297.0..=300.0).contains(&pages(turns)), "{turns}");
    assert_eq!(link(2, 3)["link"], "weak");
    for (a, b) in [(0, 3), (1, 2)] {
        assert_eq!(
            (&link(a, b)["link"], pages(link(a, b))),
            (&"weak".into(), 0.0)
        );
    }
    for (a, b) in [(0, 2), (1, 3)] {
        assert_eq!(link(a, b)["link"], "local");
    }
    assert_eq!(processes.len(), 5);
    let ended = processes.iter().filter(|p| !p["ended"].is_null());
    assert_eq!(ended.count(), 1);
    assert!(processes.iter().all(|p| p["command"] == "sysv"));
    users[0].obey("remove");
}

#[test]
fn who_may_not_read_a_segment_learns_nothing_of_it() {
    if !is_root_for("becoming another user") {
        return;
    }
    let lab = Lab::new(2);
    let mut users = [process(&lab, 1, EXTENT), process(&lab, 2, EXTENT)];
    users[0].obey("fill 1");
    users[1].obey("check 1");
    let as_nobody = || {
        let mut command = lab.inside("setpriv");
        command.args([
            "--reuid",
            "65001",
            "--regid",
            "65001",
            "--clear-groups",
            "--",
        ]);
        command.arg(migshm_tests::built("target/release/migshm"));
        run(command.args(["links", "--json"])).succeeded().json()
    };
    assert_eq!(
        links(&lab, &[])["segments"][0]["links"]
            .as_array()
            .map(Vec::len),
        Some(1)
    );
    assert_eq!(as_nobody()["segments"], Value::Array(Vec::new()));
    users[0].obey("mode 0644");
    assert_eq!(
        as_nobody()["segments"][0]["links"].as_array().map(Vec::len),
        Some(1)
    );
    users[0].obey("remove");
}

#[test]
fn a_saved_log_shows_the_same_links_and_can_be_replayed() {
    let lab = Lab::new(3);
    let mut users: Vec<Process> = (1..=3).map(|node| process(&lab, node, EXTENT)).collect();
    users[0].obey("fill 0");
    for value in 1..20 {
        users[value % 2 + 1].obey("part 0 64");
        users[value % 2 + 1].obey(&format!("fill {value}"));
    }
    let file = lab.directory().join("accesses");
    let file = file.to_str().expect("a plain path");
    let mut save = lab.inside(migshm_tests::built("target/release/migshm"));
    run(save.args(["links", "--save", file])).succeeded();
    users[0].obey("remove");
    users.clear();

    let loaded = links(&lab, &["--load", file]);
    let processes = loaded["segments"][0]["processes"].as_array().unwrap();
    assert_eq!(processes.len(), 3);
    let policies = [
        "--policy", "stay", "--policy", "lead,16", "--policy", "follow",
    ];
    let costs = links(&lab, &[&["--replay", file][..], &policies].concat());
    let cost = |policy: usize, name: &str| costs[policy]["cost"][name].as_u64().unwrap();
    // How many there are depends on what is prefetched.
    assert!(cost(0, "requests") >= 511, "{costs}");
    assert_eq!(cost(0, "moves"), 0);
    assert!(cost(1, "moves") >= 1);
    assert!(cost(1, "messages") < cost(0, "messages"), "{costs}");
    assert!(cost(2, "moves") >= cost(1, "moves"));
    let dot = run(lab
        .inside(migshm_tests::built("target/release/migshm"))
        .args(["links", "--dot", "--load", file]))
    .succeeded()
    .stdout;
    assert_eq!(dot.matches("subgraph").count(), 3, "{dot}");
    assert_eq!(dot.matches(" -- ").count(), 3, "{dot}");

    std::fs::write(
        file,
        "{\"file\":{\"format\":\"migshm accesses\",\"version\":9}}\n",
    )
    .unwrap();
    let refused = run(migshm().args(["links", "--load", file]));
    assert!(
        !refused.status.success() && refused.stderr.contains("version 9"),
        "{refused:?}"
    );
}
