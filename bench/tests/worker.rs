//! A worker on the kernel's own System V IPC. Needs root, for a private IPC namespace.

use std::io::Write;
use std::process::{Command, Stdio};

/// Gives a worker tasks; returns what it answers, one line for each.
fn answers(tasks: &[&str]) -> Vec<String> {
    let mut worker = Command::new(env!("CARGO_BIN_EXE_migshm-bench"))
        .arg("native-worker")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program starts");
    let mut input = worker.stdin.take().expect("piped");
    for task in tasks {
        writeln!(input, "{task}").expect("the worker reads");
    }
    drop(input);
    let output = worker.wait_with_output().expect("the worker ends");
    assert!(output.status.success());
    String::from_utf8(output.stdout)
        .expect("text")
        .lines()
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_task_works_on_the_kernel() {
    let tasks = [
        r#"{"AttachCycle":{"times":3}}"#,
        r#"{"FirstTouch":{"pages":16}}"#,
        r#"{"StreamRead":{"pages":16,"passes":2}}"#,
        r#"{"StreamWrite":{"pages":16,"passes":2}}"#,
        r#"{"RandomAccess":{"pages":16}}"#,
        r#"{"Semop":{"times":4,"undo":true}}"#,
        r#"{"PingPong":{"times":20,"one_core":false}}"#,
        r#"{"PingPong":{"times":20,"one_core":true}}"#,
        r#"{"Fork":{"times":2}}"#,
        r#"{"Map":{"key":1,"pages":16}}"#,
        r#"{"Fill":{"stamp":7}}"#,
        r#"{"Touch":{"stamp":7,"write":false}}"#,
        r#"{"Scan":{"stamp":7}}"#,
        r#"{"Touch":{"stamp":7,"write":true}}"#,
        r#"{"Unmap":{"remove":true}}"#,
    ];
    let answers = answers(&tasks);
    assert_eq!(answers.len(), tasks.len());
    for (task, answer) in tasks.iter().zip(answers) {
        assert!(answer.starts_with(r#"{"Ok":["#), "{task}: {answer}");
    }
}

#[test]
fn data_that_nobody_wrote_is_an_error() {
    let map = r#"{"Map":{"key":1,"pages":2}}"#;
    let fill = r#"{"Fill":{"stamp":7}}"#;
    for read in [
        r#"{"Scan":{"stamp":8}}"#,
        r#"{"Touch":{"stamp":8,"write":false}}"#,
    ] {
        let answers = answers(&[map, fill, read]);
        assert!(
            answers[2].contains("wrong data read"),
            "{read}: {}",
            answers[2]
        );
    }
}
