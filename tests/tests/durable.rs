//! Durable segments: what was released outlives any node.

use std::fs;
use std::process::{Child, Stdio};

use migshm_tests::random::{Random, number, seed};
use migshm_tests::{Lab, Process, eventually, run};

const NODES: usize = 3;
/// As in `c-tests/chaos/ledger.c`.
const PAGES: i64 = 12;

/// A process that keeps its ledger on a node.
struct Writer {
    node: usize,
    rank: i64,
    child: Child,
}

struct Ledger {
    lab: Lab,
    writers: Vec<Writer>,
    /// How many writers there have been.
    ranks: i64,
}

impl Ledger {
    fn new() -> Ledger {
        let lab = Lab::new(NODES);
        let mut create = lab.on(1, "ledger");
        run(create.arg("create").env("MIGSHM_DURABILITY", "release")).succeeded();
        let mut ledger = Ledger {
            lab,
            writers: Vec::new(),
            ranks: 0,
        };
        (1..=NODES).for_each(|node| ledger.start(node));
        ledger
    }

    fn start(&mut self, node: usize) {
        self.ranks += 1;
        let rank = self.ranks;
        let mut command = self.lab.on(node, "ledger");
        command
            .arg("work")
            .arg(self.log(rank))
            .arg(rank.to_string());
        let child = command.stdin(Stdio::null()).spawn();
        let child = child.expect("migshm can be executed");
        self.writers.push(Writer { node, rank, child });
    }

    fn log(&self, rank: i64) -> std::path::PathBuf {
        self.lab.directory().join(format!("ledger{rank}"))
    }

    /// The last step that a writer has released, as far as it knows.
    fn released(&self, rank: i64) -> i64 {
        let bytes = fs::read(self.log(rank)).unwrap_or_default();
        bytes.try_into().map_or(0, i64::from_ne_bytes)
    }

    /// Waits until all writers have gone on for some rounds.
    fn go_on(&mut self) {
        let now: Vec<i64> = self.writers.iter().map(|w| self.released(w.rank)).collect();
        eventually("the writers go on", || {
            for writer in &mut self.writers {
                let ended = writer.child.try_wait().expect("it is a child");
                assert_eq!(ended, None, "writer {} has ended", writer.rank);
            }
            let now = self.writers.iter().zip(&now);
            now.into_iter()
                .all(|(writer, before)| self.released(writer.rank) > before + 2 * PAGES)
        });
    }

    fn crash(&mut self, node: usize) {
        self.lab.labctl(&["crash", &format!("node{node}")]);
        for mut writer in self.writers.extract_if(.., |writer| writer.node == node) {
            writer.child.kill().expect("it is a child");
            writer.child.wait().expect("it is a child");
        }
    }

    /// What is in the ledger against what was released before.
    fn check(&self, node: usize) {
        let released: Vec<i64> = (1..=self.ranks).map(|rank| self.released(rank)).collect();
        let shown = run(self.lab.on(node, "ledger").arg("show")).succeeded();
        let mut found = vec![vec![0; released.len() + 1]; PAGES as usize];
        for line in shown.stdout.lines() {
            let numbers: Vec<i64> = line
                .split(' ')
                .map(|n| n.parse().expect("a number"))
                .collect();
            found[numbers[0] as usize][numbers[1] as usize] = numbers[2];
        }
        for page in 0..PAGES {
            let mut steps = 0;
            for (rank, &last) in (1..).zip(&released) {
                // The last step up to `last` that was on this page.
                let step = last - (last + 4 * rank - page).rem_euclid(PAGES);
                let has = found[page as usize][rank as usize];
                assert!(
                    has >= step,
                    "page {page} has {has} of writer {rank}, which had released {step}"
                );
                let first = (page - 4 * rank - 1).rem_euclid(PAGES) + 1;
                steps += if step >= first {
                    (step - first) / PAGES + 1
                } else {
                    0
                };
            }
            let counted = found[page as usize][0];
            assert!(
                counted >= steps,
                "page {page} counts {counted} of {steps} steps"
            );
        }
    }
}

/// MIGSHM_DEATHS nodes die, 3 if that is not set, of seed MIGSHM_SEED, a new one if that is not set.
#[test]
fn no_released_write_is_missing_whichever_nodes_die() {
    let deaths = number("MIGSHM_DEATHS").unwrap_or(3);
    let mut random = Random(seed("MIGSHM_SEED"));
    let mut ledger = Ledger::new();
    for death in 0..deaths {
        ledger.go_on();
        let victim = 1 + random.below(NODES as u64) as usize;
        println!("death {}: node{victim}", death + 1);
        ledger.crash(victim);
        ledger.go_on();
        ledger.check(1 + victim % NODES);
        ledger.lab.labctl(&["start", &format!("node{victim}")]);
        ledger.start(victim);
    }
    ledger.go_on();
    ledger.check(1);
}

#[test]
fn what_was_released_before_a_node_died_is_read_by_who_comes_later() {
    for victim in 1..=2 {
        let lab = Lab::new(2);
        let mut processes: Vec<Process> = (1..=2)
            .map(|node| {
                let mut process =
                    Process::start(lab.on(node, "sysv").env("MIGSHM_DURABILITY", "release"));
                process.obey("segment 1 65536");
                process.obey("queue 1");
                process
            })
            .collect();
        processes[victim - 1].obey("fill 7");
        processes[victim - 1].obey("send 1");
        lab.labctl(&["crash", &format!("node{victim}")]);
        let survivor = &mut processes[2 - victim];
        assert_eq!(survivor.ask("receive 1"), "1");
        survivor.obey("check 7");
        // It has no second node, and goes on; one that joins has its copy.
        survivor.obey("fill 8");
        survivor.obey("send 1");
        lab.labctl(&["start", &format!("node{victim}")]);
        let mut again = lab.start(victim, "sysv");
        again.obey("segment 1 65536");
        again.obey("queue 1");
        assert_eq!(again.ask("receive 1"), "1");
        again.obey("check 8");
        let sent = || lab.status(3 - victim)["release"]["replicated_bytes"].as_u64();
        eventually("the new node is sent all that there is", || {
            sent() > Some(0)
        });
        survivor.obey("fill 9");
        survivor.obey("send 1");
        lab.labctl(&["crash", &format!("node{}", 3 - victim)]);
        assert_eq!(again.ask("receive 1"), "1");
        again.obey("check 9");
    }
}
