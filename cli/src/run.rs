//! `migshm run`: a program under the preload.
//!
//! The program replaces this process, so its pid, signals, terminal and exit status are its own.
//! That the library is in force is checked twice: before, from the file ([`elf`]); and after, by
//! a watcher, which the library's constructor tells through a pipe.
//!
//! ```text
//!  migshm run ──fork──▶ (exits at once) ──fork──▶ watcher ◀─ '+' ─┐ pipe, MIGSHM_VERIFY_FD
//!      └──exec──▶ program ── ld.so ── libmigshm.so's constructor ─┘
//! ```
//!
//! The watcher is no child of the program, whose `wait` must not see it. If no word comes and the
//! library is not mapped, it kills the program, which would use the kernel's own IPC.

use std::ffi::OsString;
use std::fs;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

use crate::elf::{self, Obstacle};
use crate::{netns, processes};

/// How long the loader may take to reach constructors before the watcher looks for itself, in
/// milliseconds.
const VERIFY_TIMEOUT: libc::c_int = 2_000;
/// What shells return for a program that cannot be executed, and for one that is not there.
const CANNOT_EXECUTE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Run a program with cluster-wide System V IPC.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Inside `migshm lab`: the node that the program belongs to [default: that of the environment].
    #[arg(long, value_name = "NODE")]
    on: Option<String>,
    /// The program and its arguments.
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "PROGRAM"
    )]
    program: Vec<OsString>,
}

/// Replaces this process by the program; returns only if that cannot be.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let library = library()?;
    let (name, arguments) = args.program.split_first().expect("clap requires a program");
    let path = match elf::check(name, std::env::var_os("PATH").as_deref()) {
        Ok(path) => path,
        Err(obstacle) => {
            eprintln!("migshm: {obstacle}");
            return Ok(ExitCode::from(match obstacle {
                Obstacle::NotFound(_) => NOT_FOUND,
                Obstacle::Unusable(..) => CANNOT_EXECUTE,
            }));
        }
    };
    let mut command = Command::new(&path);
    command
        .arg0(name)
        .args(arguments)
        .env("LD_PRELOAD", preload(&library)?);
    if let Some(node) = &args.on {
        command.env("MIGSHM_RUNTIME_DIR", enter_node(node)?);
    }
    let mut word = watch().context("cannot watch over the program")?;
    command.env("MIGSHM_VERIFY_FD", word.as_raw_fd().to_string());
    let error = command.exec();
    // There will be no program; the watcher may go.
    let _ = word.write_all(b"+");
    eprintln!("migshm: {}: {error}", path.display());
    Ok(ExitCode::from(CANNOT_EXECUTE))
}

/// The preload library: beside this program, or in `../lib`.
pub fn library() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("cannot tell where this program is")?;
    let directory = program.parent().unwrap_or(Path::new("/"));
    let candidates = [
        directory.join(processes::LIBRARY),
        directory.join("../lib").join(processes::LIBRARY),
    ];
    match candidates.iter().find_map(|path| path.canonicalize().ok()) {
        Some(path) => Ok(path),
        None => bail!(
            "{} does not exist; install it beside {}",
            candidates[0].display(),
            program.display()
        ),
    }
}

/// The library before whatever is preloaded already.
fn preload(library: &Path) -> anyhow::Result<OsString> {
    if library
        .as_os_str()
        .as_bytes()
        .iter()
        .any(|b| matches!(b, b':' | b' '))
    {
        bail!(
            "the loader cannot preload {}: the path has a ':' or a space; install it elsewhere",
            library.display()
        );
    }
    let mut list = library.as_os_str().to_owned();
    if let Some(others) = std::env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        list.push(":");
        list.push(others);
    }
    Ok(list)
}

/// Makes this process one of a lab's node; returns the node's runtime directory.
fn enter_node(node: &str) -> anyhow::Result<PathBuf> {
    let Some(lab) = std::env::var_os("MIGSHM_LAB").map(PathBuf::from) else {
        bail!(
            "--on works inside `migshm lab` only; elsewhere a program belongs to the node of its machine"
        );
    };
    let directory = lab.join(node);
    if !directory.is_dir() {
        bail!("the lab has no node {node}");
    }
    let namespace = netns::path(&lab, node);
    if namespace.exists() {
        netns::enter(&namespace).with_context(|| format!("cannot enter the network of {node}"))?;
    }
    Ok(directory)
}

/// Starts the watcher over this process. What is returned stays open across exec.
fn watch() -> io::Result<PipeWriter> {
    let (reader, writer) = io::pipe()?;
    let program = i32::try_from(std::process::id()).expect("pids are positive ints");
    // SAFETY: this process has one thread, so its children may do what it may.
    match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        0 => {
            drop(writer);
            // SAFETY: as above.
            if unsafe { libc::fork() } == 0 {
                attend(reader, program);
            }
            // SAFETY: nothing of the parent's is to be run down here.
            unsafe { libc::_exit(0) };
        }
        intermediate => {
            // SAFETY: waits for a child of ours; its status does not matter.
            unsafe { libc::waitpid(intermediate, std::ptr::null_mut(), 0) };
        }
    }
    // SAFETY: clears close-on-exec of a descriptor we own.
    if unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETFD, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(writer)
}

/// Waits for the library's word, and ends the program if it is not to be expected.
fn attend(mut reader: PipeReader, program: i32) {
    let own = fs::read_link("/proc/self/exe").ok();
    let mut word = [0];
    let told = loop {
        if is_readable(&reader) {
            break matches!(reader.read(&mut word), Ok(1));
        }
        let executed = fs::read_link(format!("/proc/{program}/exe")).ok() != own;
        if executed {
            break false;
        }
    };
    if !told && !processes::has_library(program) {
        eprintln!(
            "migshm: the program runs without {}, which the loader ignored; it is stopped",
            processes::LIBRARY
        );
        processes::signal(program, libc::SIGKILL);
    }
}

/// Waits until there is a word, or the end of the pipe, for [`VERIFY_TIMEOUT`] at most.
fn is_readable(reader: &PipeReader) -> bool {
    let mut poll = libc::pollfd {
        fd: reader.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one live pollfd.
    unsafe { libc::poll(&raw mut poll, 1, VERIFY_TIMEOUT) != 0 }
}
