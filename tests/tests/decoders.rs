//! Every decoder, and what stands behind it, on valid input and on hundreds of thousands of mutations of it.
//! `scripts/fuzz` runs the same targets guided by coverage.

use std::fs;

use migshm_tests::decoders::{TARGETS, mutate, target};
use migshm_tests::{migshm, run};

/// Mutated files that the command is given: each is a process.
const FILES: u64 = 150;
/// What a Rust program exits with when it panics.
const PANICKED: i32 = 101;

/// Reads the samples and their mutations.
fn torment(name: &str) {
    let target = target(name);
    let samples = (target.samples)();
    samples.iter().for_each(|sample| (target.run)(sample));
    (target.run)(&[]);
    for seed in 0..target.rounds as u64 {
        (target.run)(&mutate(&samples, seed));
    }
}

#[test]
fn packets_between_a_process_and_its_daemon() {
    torment("local");
}

#[test]
fn frames_between_nodes_and_coordinator() {
    torment("control");
}

#[test]
fn frames_between_nodes() {
    torment("peer");
}

#[test]
fn messages_to_the_coordinator_in_any_order() {
    torment("coordinator");
}

#[test]
fn messages_about_pages_in_any_order() {
    torment("pages");
}

#[test]
fn diffs() {
    torment("diffs");
}

#[test]
fn files_of_certificates() {
    torment("certificates");
}

/// The command says what is wrong with a file, or takes it.
fn torment_command(sample: String, arguments: &[&str]) {
    let folder = tempfile::tempdir().expect("/tmp can be written");
    let file = folder.path().join("input");
    let samples = [sample.into_bytes()];
    for seed in 0..FILES {
        fs::write(&file, mutate(&samples, seed)).expect("it is ours");
        let mut command = migshm();
        command.args(arguments.iter().map(|&a| {
            if a == "FILE" {
                file.as_os_str()
            } else {
                a.as_ref()
            }
        }));
        let outcome = run(&mut command);
        let code = outcome.status.code();
        assert!(
            code.is_some_and(|code| code != PANICKED),
            "seed {seed}: {outcome}"
        );
    }
}

#[test]
fn configuration_files() {
    let sample = "pki = '/pki'\n[node]\ncoordinator = 'head:7411'\nmemory = '16G'\n[status]\nruntime-dir = '/nowhere'\n";
    torment_command(sample.to_owned(), &["--config", "FILE", "status"]);
}

#[test]
fn files_of_access_logs() {
    let bits = format!("[{}]", ["0"; 8].join(","));
    let seen = format!(r#"{{"once":{bits},"again":{bits}}}"#);
    let counts =
        r#"{"reads":3,"writes":1,"received":4,"bytes_received":9,"sent":1,"bytes_sent":2}"#;
    let sample = [
        r#"{"file":{"format":"migshm accesses","version":1}}"#.to_owned(),
        r#"{"node":{"node":0,"name":"node1"}}"#.to_owned(),
        r#"{"node":{"node":1,"name":"node2"}}"#.to_owned(),
        r#"{"segment":{"shmid":0,"key":17,"bytes":8192}}"#.to_owned(),
        r#"{"account":{"node":0,"time":9000000000,"forgotten":0}}"#.to_owned(),
        r#"{"user":{"user":1,"pid":10,"command":"app","attached":true,"since":1,"ended":null}}"#.to_owned(),
        format!(r#"{{"traffic":{{"user":1,"extent":0,"peer":1,"counts":{counts},"received":{seen},"sent":{seen}}}}}"#),
        r#"{"request":{"time":5,"page":1,"node":1,"access":"Write"}}"#.to_owned(),
    ]
    .join("\n");
    let folder = tempfile::tempdir().expect("/tmp can be written");
    let file = folder.path().join("sample");
    fs::write(&file, &sample).expect("it is ours");
    run(migshm().args(["links", "--load"]).arg(&file)).succeeded();
    torment_command(sample.clone(), &["links", "--load", "FILE"]);
    torment_command(sample, &["links", "--replay", "FILE", "--json"]);
}

#[test]
fn every_target_is_fuzzed() {
    let folder = migshm_tests::built("fuzz/fuzz_targets");
    for name in TARGETS.iter().map(|target| target.name) {
        assert!(folder.join(format!("{name}.rs")).exists(), "{name}");
    }
}
