//! Whether a program will load `libmigshm.so`, as far as its file tells.
//!
//! The dynamic loader takes `LD_PRELOAD` only for dynamically linked programs of its own
//! architecture, and ignores it in secure-execution mode (`ld.so(8)`). It ignores silently; the
//! program would then use the kernel's own IPC. So everything that can be told from the file is
//! checked before the program is started.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Interpreters of interpreters that Linux follows (`BINPRM_MAX_RECURSION`).
const MAX_SCRIPTS: usize = 5;
/// Bytes of a script's first line that Linux reads.
const SCRIPT_LINE: usize = 256;
/// Larger program header tables are not worth reading.
const MAX_PROGRAM_HEADERS: u16 = 512;

const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const EM_AARCH64: u16 = 183;
const PT_INTERP: u32 = 3;
const S_ISUID: u32 = 0o4000;
const S_ISGID: u32 = 0o2000;

/// Why a program cannot run with the library.
#[derive(Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// There is no such program: what shells report as 127.
    NotFound(OsString),
    /// It cannot be executed, or not with the library: what shells report as 126.
    Unusable(PathBuf, Reason),
}

/// What is in the way.
#[derive(Debug, PartialEq, Eq)]
pub enum Reason {
    NotExecutable,
    Unreadable(io::ErrorKind),
    NoFormat,
    Static,
    OtherClass,
    OtherMachine(u16),
    OtherLibc(PathBuf),
    SetId,
    Capabilities,
    InterpreterMissing(PathBuf),
    TooManyScripts,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Obstacle::NotFound(name) if name.as_bytes().contains(&b'/') => {
                write!(f, "{}: no such file", name.display())
            }
            Obstacle::NotFound(name) => write!(f, "{}: command not found", name.display()),
            Obstacle::Unusable(path, reason) => write!(f, "{}: {reason}", path.display()),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::NotExecutable => f.write_str("permission denied; it is not an executable file"),
            Reason::Unreadable(kind) => write!(f, "cannot be read, so cannot be checked: {kind}"),
            Reason::NoFormat => f.write_str("is neither an ELF program nor a script that begins with #!; name its interpreter"),
            Reason::Static => f.write_str("is statically linked, so no library can be preloaded; link it dynamically"),
            Reason::OtherClass => f.write_str("is a 32-bit program, libmigshm.so has 64 bits; build it for 64 bits"),
            Reason::OtherMachine(EM_386) => Reason::OtherClass.fmt(f),
            Reason::OtherMachine(EM_AARCH64) => f.write_str("is built for AArch64, libmigshm.so for x86-64; build it for x86-64"),
            Reason::OtherMachine(machine) => write!(f, "is built for another processor (ELF machine {machine}), libmigshm.so for x86-64; build it for x86-64"),
            Reason::OtherLibc(loader) => write!(f, "uses another C library than glibc (its loader is {}); build it for glibc", loader.display()),
            Reason::SetId => f.write_str("is set-user-ID or set-group-ID, so the loader ignores preloads; run it as its owner, or use a copy without the bit"),
            Reason::Capabilities => f.write_str("has file capabilities, so the loader ignores preloads; use a copy without them (setcap -r)"),
            Reason::InterpreterMissing(path) => write!(f, "needs the interpreter {}, which does not exist", path.display()),
            Reason::TooManyScripts => f.write_str("is a script of a script of a script; name its interpreter"),
        }
    }
}

/// Finds `program` as a shell would, and checks it and its interpreters.
///
/// # Errors
/// What keeps it from running with the library.
pub fn check(program: &OsStr, path: Option<&OsStr>) -> Result<PathBuf, Obstacle> {
    let found = find(program, path)?;
    let mut file = found.clone();
    for _ in 0..MAX_SCRIPTS {
        match inspect(&file) {
            Ok(None) => return Ok(found),
            Ok(Some(interpreter)) if interpreter.exists() => file = interpreter,
            Ok(Some(interpreter)) => {
                return Err(Obstacle::Unusable(
                    file,
                    Reason::InterpreterMissing(interpreter),
                ));
            }
            Err(reason) => return Err(Obstacle::Unusable(file, reason)),
        }
    }
    Err(Obstacle::Unusable(found, Reason::TooManyScripts))
}

/// As `execvp(3)` does.
fn find(program: &OsStr, path: Option<&OsStr>) -> Result<PathBuf, Obstacle> {
    let is_executable = |path: &Path| {
        path.metadata()
            .is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
    };
    let mut candidates: Vec<PathBuf> = Vec::new();
    if program.as_bytes().contains(&b'/') {
        candidates.push(program.into());
    } else {
        let path = path.unwrap_or(OsStr::new("/bin:/usr/bin"));
        candidates.extend(std::env::split_paths(path).map(|directory| directory.join(program)));
    }
    if let Some(found) = candidates.iter().find(|path| is_executable(path)) {
        return Ok(found.clone());
    }
    match candidates.into_iter().find(|path| path.exists()) {
        Some(path) => Err(Obstacle::Unusable(path, Reason::NotExecutable)),
        None => Err(Obstacle::NotFound(program.to_owned())),
    }
}

/// Checks one file; `Some` is the interpreter of a script, to be checked next.
fn inspect(path: &Path) -> Result<Option<PathBuf>, Reason> {
    let unreadable = |error: io::Error| Reason::Unreadable(error.kind());
    let mut file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    let mut start = Vec::with_capacity(SCRIPT_LINE);
    file.by_ref()
        .take(SCRIPT_LINE as u64)
        .read_to_end(&mut start)
        .map_err(unreadable)?;
    if let Some(line) = start.strip_prefix(b"#!") {
        return interpreter(line).map(Some).ok_or(Reason::NoFormat);
    }
    is_secure(path, &metadata)?;
    let header = Header::parse(&start)?;
    let loader = loader(&file, &header)
        .map_err(unreadable)?
        .ok_or(Reason::Static)?;
    let name = loader.file_name().unwrap_or_default().as_bytes();
    if name.starts_with(b"ld-linux") {
        Ok(None)
    } else {
        Err(Reason::OtherLibc(loader))
    }
}

/// The interpreter in a script's first line.
fn interpreter(line: &[u8]) -> Option<PathBuf> {
    let line = line.split(|&b| b == b'\n').next()?;
    let word = line
        .split(|b| b.is_ascii_whitespace())
        .find(|word| !word.is_empty())?;
    Some(PathBuf::from(OsStr::from_bytes(word)))
}

/// Whether executing the file changes ids or adds capabilities, which puts the loader into
/// secure-execution mode.
fn is_secure(path: &Path, metadata: &Metadata) -> Result<(), Reason> {
    // SAFETY: no preconditions.
    let (user, group) = unsafe { (libc::geteuid(), libc::getegid()) };
    let mode = metadata.mode();
    let changes_user = mode & S_ISUID != 0 && metadata.uid() != user;
    // Set-group-ID without execution for the group means something else (mandatory locking).
    let changes_group = mode & S_ISGID != 0 && mode & 0o010 != 0 && metadata.gid() != group;
    if changes_user || changes_group {
        return Err(Reason::SetId);
    }
    // Root has all capabilities already.
    if user != 0 && has_capabilities(path) {
        return Err(Reason::Capabilities);
    }
    Ok(())
}

fn has_capabilities(path: &Path) -> bool {
    let Ok(path) = std::ffi::CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: both strings end with NUL; with size 0 nothing is written.
    let size = unsafe {
        libc::getxattr(
            path.as_ptr(),
            c"security.capability".as_ptr(),
            std::ptr::null_mut(),
            0,
        )
    };
    size > 0
}

/// What matters of an ELF header.
#[derive(Debug)]
struct Header {
    table: u64,
    entry_size: u16,
    entries: u16,
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Header, Reason> {
        if !bytes.starts_with(b"\x7fELF") || bytes.len() < 64 {
            return Err(Reason::NoFormat);
        }
        let (class, data) = (bytes[4], bytes[5]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if class == 1 {
            return Err(Reason::OtherClass);
        }
        if data != 1 {
            return Err(Reason::OtherMachine(half(18).swap_bytes()));
        }
        if half(18) != EM_X86_64 {
            return Err(Reason::OtherMachine(half(18)));
        }
        if !matches!(half(16), ET_EXEC | ET_DYN) {
            return Err(Reason::NoFormat);
        }
        let table = u64::from_le_bytes(bytes[32..40].try_into().expect("eight bytes"));
        Ok(Header {
            table,
            entry_size: half(54),
            entries: half(56).min(MAX_PROGRAM_HEADERS),
        })
    }
}

/// The loader that `PT_INTERP` names; `None` in a static program.
fn loader(file: &File, header: &Header) -> io::Result<Option<PathBuf>> {
    for index in 0..u64::from(header.entries) {
        let mut entry = [0; 56];
        file.read_exact_at(
            &mut entry,
            header.table + index * u64::from(header.entry_size),
        )?;
        let word =
            |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().expect("eight bytes"));
        if u32::from_le_bytes(entry[..4].try_into().expect("four bytes")) == PT_INTERP {
            let mut name = vec![0; usize::try_from(word(32)).unwrap_or(0).min(SCRIPT_LINE)];
            file.read_exact_at(&mut name, word(8))?;
            name.truncate(name.iter().position(|&b| b == 0).unwrap_or(name.len()));
            return Ok(Some(PathBuf::from(OsString::from_vec(name))));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// An ELF file with one program header, and the loader's name if there is one.
    fn elf(class: u8, machine: u16, loader: Option<&str>) -> Vec<u8> {
        let mut bytes = vec![0; 64 + 56];
        bytes[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, 1]);
        bytes[16..18].copy_from_slice(&ET_DYN.to_le_bytes());
        bytes[18..20].copy_from_slice(&machine.to_le_bytes());
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&1u16.to_le_bytes());
        if let Some(loader) = loader {
            let end = bytes.len() as u64;
            bytes[64..68].copy_from_slice(&PT_INTERP.to_le_bytes());
            bytes[72..80].copy_from_slice(&end.to_le_bytes());
            bytes[96..104].copy_from_slice(&(loader.len() as u64 + 1).to_le_bytes());
            bytes.extend_from_slice(loader.as_bytes());
            bytes.push(0);
        }
        bytes
    }

    fn verdict(contents: &[u8], mode: u32) -> Result<(), Reason> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        fs::write(&path, contents).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        match check(path.as_os_str(), None) {
            Ok(found) => {
                assert_eq!(found, path);
                Ok(())
            }
            Err(Obstacle::Unusable(_, reason)) => Err(reason),
            Err(Obstacle::NotFound(name)) => panic!("{name:?} not found"),
        }
    }

    #[test]
    fn a_dynamic_glibc_program_of_this_architecture_is_accepted() {
        assert_eq!(
            verdict(
                &elf(2, EM_X86_64, Some("/lib64/ld-linux-x86-64.so.2")),
                0o755
            ),
            Ok(())
        );
        let shell = check(OsStr::new("sh"), Some(OsStr::new("/nowhere:/bin"))).unwrap();
        assert_eq!(shell, Path::new("/bin/sh"));
    }

    #[test]
    fn what_cannot_be_preloaded_is_refused_with_the_reason() {
        let glibc = Some("/lib64/ld-linux-x86-64.so.2");
        assert_eq!(
            verdict(&elf(2, EM_X86_64, None), 0o755),
            Err(Reason::Static)
        );
        assert_eq!(
            verdict(&elf(1, EM_386, glibc), 0o755),
            Err(Reason::OtherClass)
        );
        assert_eq!(
            verdict(&elf(2, EM_AARCH64, glibc), 0o755),
            Err(Reason::OtherMachine(EM_AARCH64))
        );
        let musl = "/lib/ld-musl-x86_64.so.1";
        assert_eq!(
            verdict(&elf(2, EM_X86_64, Some(musl)), 0o755),
            Err(Reason::OtherLibc(musl.into()))
        );
        assert_eq!(verdict(b"plain text", 0o755), Err(Reason::NoFormat));
        assert_eq!(verdict(b"", 0o755), Err(Reason::NoFormat));
        assert_eq!(verdict(b"#!/bin/sh\n", 0o644), Err(Reason::NotExecutable));
    }

    #[test]
    fn truncated_headers_are_refused_without_a_panic() {
        let whole = elf(2, EM_X86_64, Some("/lib64/ld-linux-x86-64.so.2"));
        for length in 0..whole.len() {
            assert!(verdict(&whole[..length], 0o755).is_err(), "{length}");
        }
    }

    #[test]
    fn a_set_user_id_program_of_another_user_is_refused() {
        let glibc = elf(2, EM_X86_64, Some("/lib64/ld-linux-x86-64.so.2"));
        // One's own changes nothing.
        assert_eq!(verdict(&glibc, 0o4755), Ok(()));
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        fs::write(&path, &glibc).unwrap();
        if std::os::unix::fs::chown(&path, Some(12345), None).is_ok() {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
            assert_eq!(
                check(path.as_os_str(), None),
                Err(Obstacle::Unusable(path, Reason::SetId))
            );
        }
    }

    #[test]
    fn a_scripts_interpreter_is_what_counts() {
        assert_eq!(verdict(b"#! /bin/sh -e\necho", 0o755), Ok(()));
        assert_eq!(
            verdict(b"#!/no/such/shell\n", 0o755),
            Err(Reason::InterpreterMissing("/no/such/shell".into()))
        );
        assert_eq!(verdict(b"#!\n", 0o755), Err(Reason::NoFormat));
    }

    #[test]
    fn an_unknown_program_is_not_found() {
        let name = OsStr::new("no-such-program");
        assert_eq!(
            check(name, Some(OsStr::new("/bin"))),
            Err(Obstacle::NotFound(name.to_owned()))
        );
    }
}
