//! Other processes, as `/proc` shows them.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Name of the preload library's file.
pub const LIBRARY: &str = "libmigshm.so";

/// Pids of the processes that were started with this environment variable, as far as this user
/// may see them.
pub fn with_variable(name: &str, value: &Path) -> Vec<i32> {
    let wanted = [name.as_bytes(), b"=", value.as_os_str().as_bytes()].concat();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|&b| b == 0)
                .any(|variable| variable == wanted)
        })
        .collect()
}

/// Whether the process has the preload library mapped.
pub fn has_library(pid: i32) -> bool {
    let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    maps.split(|&b| b == b'\n')
        .any(|line| Path::new(OsStr::from_bytes(line)).file_name() == Some(OsStr::new(LIBRARY)))
}

/// Sends a signal; a process that is gone is no error.
pub fn signal(pid: i32, signal: libc::c_int) {
    // SAFETY: plain integers.
    unsafe { libc::kill(pid, signal) };
}
