//! Where and when figures were measured.

use std::fmt;
use std::fs;
use std::thread::available_parallelism;

use anyhow::Result;
use serde::Serialize;
use time::OffsetDateTime;

/// What has to be known to compare figures with others.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Of migshm.
    pub version: String,
    /// Day and minute, in UTC.
    pub date: String,
    /// Model of the processor.
    pub processor: String,
    /// Processors that this process may use.
    pub cores: usize,
    /// Bytes.
    pub memory: u64,
    /// Release of the Linux kernel.
    pub kernel: String,
}

impl Machine {
    /// This one, now.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn this() -> Result<Machine> {
        let now = OffsetDateTime::now_utc();
        let memory = field("/proc/meminfo", "MemTotal")?;
        let kibibytes: u64 = memory.trim_end_matches(" kB").parse()?;
        Ok(Machine {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            date: format!("{} {:02}:{:02}", now.date(), now.hour(), now.minute()),
            processor: field("/proc/cpuinfo", "model name")?,
            cores: available_parallelism()?.get(),
            memory: kibibytes << 10,
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
        })
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gibibytes = self.memory as f64 / f64::from(1 << 30);
        write!(
            f,
            "migshm {}, {} UTC; {}, {} cores, {gibibytes:.0} GiB, Linux {}",
            self.version, self.date, self.processor, self.cores, self.kernel
        )
    }
}

/// The value of the first line `NAME: VALUE` of a file; empty if there is none.
fn field(path: &str, name: &str) -> Result<String> {
    let text = fs::read_to_string(path)?;
    let value = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map_or("", |(_, value)| value.trim());
    Ok(value.to_owned())
}
