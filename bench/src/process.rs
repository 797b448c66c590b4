//! Worker processes: this program again, in another environment.
//!
//! A worker reads tasks from standard input, one JSON value in a line, and answers each in a line
//! with its samples or why it failed. It lives for a whole run, so rounds of two workers can
//! alternate without start-up in between, and ends with its standard input.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Samples in nanoseconds for one operation, or an error's text.
pub type Answer = Result<Vec<f64>, String>;

/// A worker, as seen by whoever started it.
pub struct Worker {
    name: String,
    child: Child,
    tasks: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts `command`, which ends up as one of this program's worker subcommands.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(name: impl Into<String>, command: &mut Command) -> Result<Worker> {
        let name = name.into();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name}: {command:?}"))?;
        let tasks = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().expect("piped"));
        Ok(Worker {
            name,
            child,
            tasks,
            answers,
        })
    }

    /// Gives it a task and waits for the samples.
    ///
    /// # Errors
    /// The task fails, or the worker has ended.
    pub fn ask<T: Serialize>(&mut self, task: &T) -> Result<Vec<f64>> {
        self.give(task)?;
        self.answer()
    }

    /// Gives it a task.
    ///
    /// # Errors
    /// The worker has ended.
    pub fn give<T: Serialize>(&mut self, task: &T) -> Result<()> {
        let line = serde_json::to_string(task).expect("a task is plain data");
        let tasks = self.tasks.as_mut().expect("open while the worker lives");
        writeln!(tasks, "{line}").with_context(|| format!("{} has ended", self.name))
    }

    /// Waits for the samples of a task.
    ///
    /// # Errors
    /// As [`Worker::ask`].
    pub fn answer(&mut self) -> Result<Vec<f64>> {
        let answer: Answer = self.line()?;
        answer.map_err(|error| anyhow::anyhow!("{}: {error}", self.name))
    }

    /// A line that the worker says of its own accord.
    ///
    /// # Errors
    /// It has ended, or says something else.
    pub fn line<T: DeserializeOwned>(&mut self) -> Result<T> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("{} has ended", self.name);
        }
        serde_json::from_str(&line).with_context(|| format!("{} said {line:?}", self.name))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.tasks = None;
        // After an error it may wait for another worker for ever. It holds nothing that is worth
        // an orderly end, and there is nobody to tell.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The worker's side: performs tasks until there are no more.
///
/// # Errors
/// Standard input or output break.
pub fn serve<T: DeserializeOwned>(mut perform: impl FnMut(T) -> Result<Vec<f64>>) -> Result<()> {
    for line in std::io::stdin().lines() {
        let task = serde_json::from_str(&line?)?;
        say(&perform(task).map_err(|error| format!("{error:#}")))?;
    }
    Ok(())
}

/// Says one line.
///
/// # Errors
/// Standard output breaks.
pub fn say<T: Serialize>(value: &T) -> Result<()> {
    let mut output = std::io::stdout().lock();
    serde_json::to_writer(&mut output, value)?;
    writeln!(output)?;
    Ok(output.flush()?)
}
