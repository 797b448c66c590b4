//! Processes under test: run to their end, or told what to do line by line.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::Value;

/// Longest time a command may take: a hang is a failure with a message. The programs of `c-tests`
/// end themselves sooner, after 120 s.
pub const LIMIT: Duration = Duration::from_secs(150);

/// How a command ended, and what it said.
#[derive(Debug)]
pub struct Outcome {
    command: String,
    /// Its exit status.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Outcome {
    /// Expects exit status 0.
    ///
    /// # Panics
    /// If it is another.
    #[track_caller]
    pub fn succeeded(self) -> Outcome {
        self.exited(0)
    }

    /// Expects this exit status.
    ///
    /// # Panics
    /// If it is another, with all that the command said.
    #[track_caller]
    pub fn exited(self, code: i32) -> Outcome {
        assert_eq!(self.status.code(), Some(code), "{self}");
        self
    }

    /// Expects that the command has said this on standard error.
    ///
    /// # Panics
    /// If it has not, with all that it said.
    #[track_caller]
    pub fn complained(self, of: &str) -> Outcome {
        assert!(self.stderr.contains(of), "no {of:?} in: {self}");
        self
    }

    /// Its standard output as JSON.
    ///
    /// # Panics
    /// If it is none.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self}"))
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Outcome {
            command,
            status,
            stdout,
            stderr,
        } = self;
        write!(
            f,
            "{command}\nended with {status}\n-- stdout\n{stdout}\n-- stderr\n{stderr}"
        )
    }
}

/// Runs a command to its end; kills it and its process group when [`LIMIT`] is over.
///
/// # Panics
/// If it cannot be executed.
#[track_caller]
pub fn run(command: &mut Command) -> Outcome {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let group = i32::try_from(child.id()).expect("pids are positive ints");
    let (ended, end) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if end.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            // SAFETY: plain integers.
            unsafe { libc::kill(-group, libc::SIGKILL) };
        }
    });
    let output = child.wait_with_output().expect("it is a child");
    drop(ended);
    watchdog.join().expect("it does not panic");
    Outcome {
        command: format!("{command:?}"),
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// A running program that answers lines with lines, as `tests/programs/sysv.c` does; killed when
/// dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Process {
    /// Starts a command.
    ///
    /// # Panics
    /// If it cannot be executed.
    #[track_caller]
    pub fn start(command: &mut Command) -> Process {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Process {
            input: child.stdin.take().expect("piped"),
            output: BufReader::new(child.stdout.take().expect("piped")),
            child,
        }
    }

    /// Sends a line, and does not wait for the answer.
    ///
    /// # Panics
    /// If the program is gone.
    #[track_caller]
    pub fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").expect("the program lives");
    }

    /// The answer to the oldest line that has none.
    ///
    /// # Panics
    /// If the program is gone.
    #[track_caller]
    pub fn answer(&mut self) -> String {
        let mut line = String::new();
        let read = self.output.read_line(&mut line);
        assert!(
            read.is_ok_and(|length| length > 0),
            "the program ended: {:?}",
            self.child.try_wait()
        );
        line.trim_end().to_owned()
    }

    /// Whether there is an answer, which [`Process::answer`] gives at once.
    #[must_use]
    pub fn has_answered(&self) -> bool {
        let mut output = libc::pollfd {
            fd: self.output.get_ref().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one live entry; does not wait.
        let ready = unsafe { libc::poll(&raw mut output, 1, 0) };
        !self.output.buffer().is_empty() || ready == 1
    }

    /// Sends a line; returns the answer.
    #[track_caller]
    pub fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.answer()
    }

    /// Sends a line that is to be answered with `ok`.
    ///
    /// # Panics
    /// If the answer is another.
    #[track_caller]
    pub fn obey(&mut self, line: &str) {
        assert_eq!(self.ask(line), "ok", "{line}");
    }

    /// Waits for the program's own end.
    ///
    /// # Panics
    /// If it does not end in a generous time.
    #[track_caller]
    pub fn end(mut self) -> ExitStatus {
        let mut status = None;
        crate::eventually("the program ends", || {
            status = self.child.try_wait().expect("it is a child");
            status.is_some()
        });
        status.expect("it has ended")
    }

    /// Whether the program has ended.
    ///
    /// # Panics
    /// Never: it is a child.
    #[must_use]
    pub fn has_ended(&mut self) -> bool {
        let status = self.child.try_wait().expect("it is a child");
        status.is_some()
    }

    /// Its pid.
    ///
    /// # Panics
    /// Never: pids are positive ints.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("pids are positive ints")
    }

    /// Ends the program with SIGKILL.
    pub fn kill(self) {}
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
