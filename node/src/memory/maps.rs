//! What a process really maps, by the kernel's word: `/proc/PID/maps`.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

use super::PAGE;
use super::file::{FileId, MEMFD_NAME};

/// A mapping of a memfd of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Of which.
    pub file: FileId,
    /// Of its first byte.
    pub address: u64,
    /// The address behind its last byte.
    pub end: u64,
    /// Index in the file of its first page.
    pub first_page: u64,
}

/// What the process with this `/proc` directory maps, lowest address first.
///
/// # Errors
/// Those of reading its `maps`; `NotFound` if it has no memory any more.
pub fn mapped(process: &File) -> io::Result<Vec<Run>> {
    let path = format!("/proc/self/fd/{}/maps", process.as_raw_fd());
    let read = || {
        let maps = fs::read(&path)?;
        if maps.is_empty() {
            return Err(io::Error::from(io::ErrorKind::NotFound));
        }
        Ok(parse(&String::from_utf8_lossy(&maps)))
    };
    // The file is not made at one moment: a mapping that is moved meanwhile may be missed.
    let mut last = read()?;
    loop {
        let next = read()?;
        if next == last {
            return Ok(last);
        }
        last = next;
    }
}

fn parse(maps: &str) -> Vec<Run> {
    maps.lines().filter_map(parse_line).collect()
}

/// `START-END PERMISSIONS OFFSET MAJOR:MINOR INODE PATH`; all but the inode hexadecimal.
fn parse_line(line: &str) -> Option<Run> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let offset = fields.nth(1)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let inode = fields.next()?.parse().ok()?;
    let name = fields.next()?.strip_prefix("/memfd:")?;
    if name.as_bytes() != MEMFD_NAME.to_bytes() {
        return None;
    }
    let hex = |digits| u64::from_str_radix(digits, 16).ok();
    let device = |digits| u32::from_str_radix(digits, 16).ok();
    Some(Run {
        file: FileId {
            device: (device(major)?, device(minor)?),
            inode,
        },
        address: hex(start)?,
        end: hex(end)?,
        first_page: hex(offset)? / PAGE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_memfds_of_ours_are_found() {
        let maps = "\
55e0c0a00000-55e0c0a21000 r--p 00000000 fe:01 1234                       /usr/bin/app
7f0000000000-7f0000003000 rw-s 00001000 00:01 77                         /memfd:migshm (deleted)
7f0000003000-7f0000004000 ---p 00000000 00:00 0
7f0000004000-7f0000005000 rw-s 00000000 00:01 78                         /memfd:other (deleted)
7ffd0000f000-7ffd00010000 rw-p 00000000 00:00 0                          [stack]
";
        let run = Run {
            file: FileId {
                device: (0, 1),
                inode: 77,
            },
            address: 0x7f00_0000_0000,
            end: 0x7f00_0000_3000,
            first_page: 1,
        };
        assert_eq!(parse(maps), [run]);
    }
}
