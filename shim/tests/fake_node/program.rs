//! The fake daemon as a program, in the place of `migshm` for tests of the automatic start:
//! `fake-node node --autostart --runtime-dir DIR --ready-fd 3`.
//!
//! Each start adds a line to `starts` in the runtime directory, made of what a daemon must not
//! have inherited. With `FAKE_NODE_FAILS` set it says so and ends. It serves until `stop` appears.

use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::path::Path;
use std::time::Duration;

#[path = "mod.rs"]
mod fake_node;

use fake_node::{FakeNode, Script};

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, node, autostart, runtime_dir, dir, ready_fd, fd] = &arguments[..] else {
        panic!("{arguments:?}")
    };
    assert_eq!(
        [node, autostart, runtime_dir, ready_fd],
        ["node", "--autostart", "--runtime-dir", "--ready-fd"]
    );
    assert_eq!(fd, "3");
    // SAFETY: our parent gave us this descriptor.
    let mut ready = unsafe { File::from_raw_fd(3) };
    let dir = Path::new(dir);

    let mut starts = File::options()
        .create(true)
        .append(true)
        .open(dir.join("starts"))
        .expect("starts");
    writeln!(starts, "{}", inheritance()).expect("starts");
    if std::env::var_os("FAKE_NODE_FAILS").is_some() {
        write!(ready, "told to\nfail\n").expect("ready pipe");
        return;
    }
    let _node = FakeNode::start(dir, Script::default());
    ready.write_all(b"+").expect("ready pipe");
    drop(ready);
    while !dir.join("stop").exists() {
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// "clean", or what is not.
fn inheritance() -> String {
    let mut found = Vec::new();
    if std::env::var_os("LD_PRELOAD").is_some() {
        found.push("LD_PRELOAD".to_owned());
    }
    // SAFETY: no preconditions; a null mask is only read from.
    unsafe {
        if libc::getsid(0) != libc::getpid() {
            found.push("session".to_owned());
        }
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_BLOCK, std::ptr::null(), &raw mut mask);
        if (1..=64).any(|signal| libc::sigismember(&raw const mask, signal) == 1) {
            found.push("signal mask".to_owned());
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGUSR1, std::ptr::null(), &raw mut action);
        if action.sa_sigaction != libc::SIG_DFL {
            found.push("signal disposition".to_owned());
        }
    }
    for entry in std::fs::read_dir("/proc/self/fd").expect("/proc").flatten() {
        let target = entry.path().read_link().unwrap_or_default();
        let number: i32 = entry.file_name().to_string_lossy().parse().unwrap_or(-1);
        let expected = match number {
            0 | 1 => target == Path::new("/dev/null"),
            2 => target.ends_with("node.log"),
            3 => target.to_string_lossy().starts_with("pipe:"),
            _ => {
                target.to_string_lossy().contains("/starts")
                    || target.to_string_lossy().contains("/proc/")
            }
        };
        if !expected {
            found.push(format!("{number}={target:?}"));
        }
    }
    if found.is_empty() {
        "clean".to_owned()
    } else {
        found.join(", ")
    }
}
