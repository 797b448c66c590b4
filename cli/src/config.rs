//! The configuration file, and the defaults that a machine determines.
//!
//! The file changes defaults and nothing else: its values become the default values of the
//! command line's options, so the command line and the environment override them, and `--help`
//! shows what is in force.
//!
//! ```toml
//! pki = "/etc/migshm/pki"          # for every subcommand that has the option
//! [node]                           # for `migshm node`
//! coordinator = "head:7411"
//! memory = "16G"
//! ```

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use clap::Command;
use migshm_coordinator::Quotas;
use toml::{Table, Value};

/// Environment variable with the file's path.
pub const VARIABLE: &str = "MIGSHM_CONFIG";
/// The file that is read if it exists, unless another one is named.
pub const DEFAULT_PATH: &str = "/etc/migshm/migshm.toml";

/// What may be set for each subcommand.
const OPTIONS: [(&str, &[&str]); 5] = [
    (
        "coordinator",
        &[
            "listen",
            "pki",
            "release-keys",
            "durable-keys",
            "quota",
            "state-dir",
            "state-outlives",
        ],
    ),
    (
        "node",
        &[
            "coordinator",
            "patience",
            "runtime-dir",
            "name",
            "listen",
            "memory",
            "pki",
        ],
    ),
    ("status", &["runtime-dir"]),
    ("ipcs", &["runtime-dir"]),
    ("ipcrm", &["runtime-dir"]),
];
/// What may be set once for all subcommands that have it.
const COMMON: [&str; 2] = ["pki", "runtime-dir"];

/// Makes the configuration file's values the defaults of `command`.
///
/// # Errors
/// A named file that cannot be read; any file with something in it that is not an option.
pub fn apply(command: Command, args: impl Iterator<Item = OsString>) -> anyhow::Result<Command> {
    let named = named_path(args)
        .or_else(|| std::env::var_os(VARIABLE))
        .map(PathBuf::from);
    let path = named.as_deref().unwrap_or(Path::new(DEFAULT_PATH));
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => {
            return Ok(command);
        }
        Err(error) => {
            return Err(error).with_context(|| format!("configuration file {}", path.display()));
        }
    };
    defaults(command, &text).with_context(|| format!("configuration file {}", path.display()))
}

/// The argument of `--config`, which has to be known before the others are parsed.
fn named_path(args: impl Iterator<Item = OsString>) -> Option<OsString> {
    let mut args = args.skip(1).take_while(|arg| arg != "--");
    while let Some(arg) = args.next() {
        if arg == "--config" {
            return args.next();
        }
        if let Some(path) = arg.to_str().and_then(|arg| arg.strip_prefix("--config=")) {
            return Some(path.into());
        }
    }
    None
}

pub(crate) fn defaults(mut command: Command, text: &str) -> anyhow::Result<Command> {
    let file: Table = text.parse()?;
    for (key, value) in &file {
        match (value, OPTIONS.iter().find(|(name, _)| name == key)) {
            (Value::Table(table), Some((subcommand, options))) => {
                for (key, value) in table {
                    if !options.contains(&key.as_str()) {
                        bail!(
                            "[{subcommand}] has no option {key}; it has {}",
                            options.join(", ")
                        );
                    }
                    let value = scalar(key, value)?;
                    command = with_default(command, subcommand, key, value);
                }
            }
            (value, _) if COMMON.contains(&key.as_str()) => {
                let value = scalar(key, value)?;
                for (subcommand, options) in OPTIONS {
                    let overridden = file
                        .get(subcommand)
                        .and_then(|table| table.get(key))
                        .is_some();
                    if options.contains(&key.as_str()) && !overridden {
                        command = with_default(command, subcommand, key, value.clone());
                    }
                }
            }
            _ => bail!(
                "there is no {key}; use {} or a table of a subcommand",
                COMMON.join(", ")
            ),
        }
    }
    Ok(command)
}

fn with_default(command: Command, subcommand: &str, option: &str, value: String) -> Command {
    command.mut_subcommand(subcommand, |subcommand| {
        subcommand.mut_arg(option.replace('-', "_"), |arg| arg.default_value(value))
    })
}

fn scalar(key: &str, value: &Value) -> anyhow::Result<String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(number.to_string()),
        _ => bail!("{key} must be a string or a number"),
    }
}

/// A number of bytes, as people write it: `512M`, `16G`; powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Size, String> {
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let shift = match text[digits.len()..].trim_end_matches("iB") {
            "" => 0,
            "K" | "k" => 10,
            "M" => 20,
            "G" => 30,
            "T" => 40,
            unit => return Err(format!("unknown unit {unit:?}; use K, M, G or T")),
        };
        let number: u64 = digits.parse().map_err(|_| "not a number".to_owned())?;
        number
            .checked_mul(1 << shift)
            .map(Size)
            .ok_or_else(|| "too large".to_owned())
    }
}

/// Quotas of users, as people write them: `segments=100,bytes=4G`. What is not named has its default;
/// `none` means no quota.
pub fn quotas(text: &str) -> Result<Quotas, String> {
    const NAMES: &str = "segments, bytes, sets, semaphores, queues";
    let mut quotas = Quotas::default();
    for part in text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
    {
        let (name, value) = part
            .split_once('=')
            .ok_or_else(|| format!("{part:?} is no quota, like segments=100"))?;
        let most = match value.trim() {
            "none" => u64::MAX,
            value => {
                Size::from_str(value)
                    .map_err(|error| format!("{part:?}: {error}"))?
                    .0
            }
        };
        match name.trim() {
            "segments" => quotas.segments = most,
            "bytes" => quotas.bytes = Some(most),
            "sets" => quotas.sets = most,
            "semaphores" => quotas.semaphores = most,
            "queues" => quotas.queues = most,
            name => return Err(format!("there is no quota of {name:?}, but of {NAMES}")),
        }
    }
    Ok(quotas)
}

/// This machine's name as a node: the host name's first label, in lower case.
pub fn node_name() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let label: String = host
        .trim()
        .chars()
        .take_while(|&c| c != '.')
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '-'
            }
        })
        .collect();
    let label = label.trim_matches('-');
    if label.is_empty() {
        "node".to_owned()
    } else {
        label.to_owned()
    }
}

/// Where a daemon of this user keeps its socket.
pub fn own_runtime_dir() -> PathBuf {
    // SAFETY: no preconditions.
    let user = unsafe { libc::geteuid() };
    if user == 0 {
        return PathBuf::from(SYSTEM_RUNTIME_DIR);
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(base) => Path::new(&base).join("migshm"),
        None => PathBuf::from(format!("/tmp/migshm-{user}")),
    }
}

/// The machine's daemon if there is one, else this user's: what a program would use.
pub fn used_runtime_dir() -> PathBuf {
    let system = Path::new(SYSTEM_RUNTIME_DIR);
    if system.join(migshm_protocol::local::SOCKET).exists() {
        system.to_owned()
    } else {
        own_runtime_dir()
    }
}

const SYSTEM_RUNTIME_DIR: &str = "/run/migshm";

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Arg;

    fn command() -> Command {
        let node = Command::new("node")
            .args(["coordinator", "runtime_dir", "memory", "pki"].map(|id| Arg::new(id).long(id)));
        let coordinator = Command::new("coordinator").arg(Arg::new("pki").long("pki"));
        let tools = ["status", "ipcs", "ipcrm"]
            .map(|name| Command::new(name).arg(Arg::new("runtime_dir").long("runtime_dir")));
        Command::new("migshm")
            .subcommands([node, coordinator])
            .subcommands(tools)
    }

    fn value(file: &str, args: &[&str], option: &str) -> Option<String> {
        let matches = defaults(command(), file).unwrap().get_matches_from(args);
        matches
            .subcommand()
            .unwrap()
            .1
            .get_one::<String>(option)
            .cloned()
    }

    #[test]
    fn the_file_changes_defaults_and_the_command_line_overrides_them() {
        let file = "pki = '/all'\n[node]\nmemory = 17\npki = '/node'";
        assert_eq!(value(file, &["migshm", "node"], "memory").unwrap(), "17");
        assert_eq!(
            value(file, &["migshm", "node", "--memory", "9"], "memory").unwrap(),
            "9"
        );
        assert_eq!(value(file, &["migshm", "node"], "pki").unwrap(), "/node");
        assert_eq!(
            value(file, &["migshm", "coordinator"], "pki").unwrap(),
            "/all"
        );
        assert_eq!(value("", &["migshm", "node"], "pki"), None);
    }

    #[test]
    fn what_the_file_cannot_mean_is_refused_by_name() {
        for (file, complaint) in [
            ("colour = 'red'", "there is no colour"),
            ("[node]\nlistne = 'x'", "[node] has no option listne"),
            (
                "[node]\nmemory = [1]",
                "memory must be a string or a number",
            ),
            ("[lab]\nnodes = 1", "there is no lab"),
        ] {
            let error = defaults(command(), file).unwrap_err().to_string();
            assert!(error.contains(complaint), "{error}");
        }
    }

    #[test]
    fn the_programs_own_arguments_name_no_configuration() {
        let args = |list: &[&str]| {
            named_path(list.iter().map(Into::into)).map(|p| p.into_string().unwrap())
        };
        assert_eq!(
            args(&["migshm", "--config", "a", "run", "--", "x"]).unwrap(),
            "a"
        );
        assert_eq!(args(&["migshm", "--config=b", "node"]).unwrap(), "b");
        assert_eq!(args(&["migshm", "run", "--", "x", "--config", "c"]), None);
    }

    #[test]
    fn quotas_are_named() {
        assert_eq!(quotas(""), Ok(Quotas::default()));
        let some = quotas("segments=2K, bytes=4G,queues=none").unwrap();
        let expected = Quotas {
            segments: 2048,
            bytes: Some(4 << 30),
            queues: u64::MAX,
            ..Quotas::default()
        };
        assert_eq!(some, expected);
        for bad in [
            "segments",
            "segments=",
            "segments=-1",
            "pages=1",
            "bytes=none of it",
        ] {
            assert!(quotas(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!("0".parse(), Ok(Size(0)));
        assert_eq!("4096".parse(), Ok(Size(4096)));
        assert_eq!("64k".parse(), Ok(Size(64 << 10)));
        assert_eq!("16GiB".parse(), Ok(Size(16 << 30)));
        for bad in ["", "G", "1X", "-1", "99999999T", "1.5G"] {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
    }
}
