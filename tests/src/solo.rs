//! One machine: programs under `LD_PRELOAD`, and nothing else configured.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::{built, command, library, processes_with, program};

/// A machine of its own, as far as programs can tell: a runtime directory that no other test
/// uses. What still runs when it is dropped is killed.
#[derive(Debug)]
pub struct Solo {
    folder: TempDir,
    library: PathBuf,
}

impl Default for Solo {
    fn default() -> Solo {
        Solo::new()
    }
}

impl Solo {
    /// With the library and the daemon of the build.
    ///
    /// # Panics
    /// If they are missing.
    #[must_use]
    pub fn new() -> Solo {
        let folder = TempDir::new().expect("a temporary directory");
        Solo {
            folder,
            library: library(),
        }
    }

    /// With copies of library and daemon that any user can reach, whatever the build's folder
    /// permits, in a folder that any user may write to.
    ///
    /// # Panics
    /// If they are missing.
    #[must_use]
    pub fn for_all_users() -> Solo {
        let mut solo = Solo::new();
        let mode = fs::Permissions::from_mode(0o1777);
        fs::set_permissions(solo.folder.path(), mode).expect("it is ours");
        solo.install(&built("target/release/migshm"));
        solo.library = solo.install(&library());
        solo
    }

    /// Copies a program into this machine's folder.
    ///
    /// # Panics
    /// If it cannot be copied.
    pub fn install(&self, file: &Path) -> PathBuf {
        let copy = self.folder.path().join(file.file_name().expect("a file"));
        // In a process of its own: a file that this one has open for writing while another thread
        // forks is busy for exec.
        let status = Command::new("cp").args([file, &copy]).status();
        assert!(status.expect("cp").success(), "it can be copied");
        copy
    }

    /// The runtime directory; it exists once a daemon was started.
    #[must_use]
    pub fn runtime_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// A file in this machine's folder.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Any command, whose program and descendants are preloaded.
    #[must_use]
    pub fn preloaded(&self, name: impl AsRef<OsStr>) -> Command {
        let mut command = command(name);
        command
            .env("LD_PRELOAD", &self.library)
            .env("MIGSHM_RUNTIME_DIR", self.runtime_dir());
        command
    }

    /// A [`program`], preloaded.
    #[must_use]
    pub fn program(&self, name: &str) -> Command {
        self.preloaded(program(name))
    }

    /// Pids of this machine's daemons.
    #[must_use]
    pub fn daemons(&self) -> Vec<i32> {
        let mut pids = self.processes();
        pids.retain(|pid| {
            let executable = fs::read_link(format!("/proc/{pid}/exe"));
            executable.is_ok_and(|path| path.file_name() == Some("migshm".as_ref()))
        });
        pids
    }

    fn processes(&self) -> Vec<i32> {
        processes_with("MIGSHM_RUNTIME_DIR", &self.runtime_dir())
    }
}

impl Drop for Solo {
    fn drop(&mut self) {
        for pid in self.processes() {
            // SAFETY: plain integers.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        if std::thread::panicking() {
            let log = self.runtime_dir().join("node.log");
            eprintln!("{}", fs::read_to_string(log).unwrap_or_default());
        }
    }
}
