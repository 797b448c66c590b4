//! Limits of the System V objects, with Linux's default values (`proc_sys_kernel(5)`), and of
//! messages.

/// Segments, semaphore sets and message queues that can exist at once, each (`IPCMNI`): ids keep
/// their index in the low 15 bits.
pub const IPCMNI: i32 = 32768;
/// Segments (`shmmni`).
pub const SHMMNI: u64 = 4096;
/// Largest segment in bytes (`shmmax`: `ULONG_MAX - 2^24`).
pub const SHMMAX: u64 = u64::MAX - (1 << 24);
/// Pages of all segments (`shmall`: `ULONG_MAX - 2^24`).
pub const SHMALL: u64 = u64::MAX - (1 << 24);
/// Semaphore sets (`SEMMNI`).
pub const SEMMNI: i32 = 32000;
/// Semaphores of a set (`SEMMSL`).
pub const SEMMSL: i32 = 32000;
/// All semaphores (`SEMMNS`).
pub const SEMMNS: i32 = SEMMNI * SEMMSL;
/// Operations of one `semop` (`SEMOPM`).
pub const SEMOPM: usize = 500;
/// Largest value of a semaphore (`SEMVMX`), and of its adjustment on exit (`SEMAEM`).
pub const SEMVMX: i32 = 32767;
/// Message queues (`msgmni`).
pub const MSGMNI: i32 = 32000;
/// Bytes of a message's text (`msgmax`).
pub const MSGMAX: usize = 8192;
/// Bytes that a new queue holds, and that it may be made to hold without privileges (`msgmnb`).
pub const MSGMNB: u64 = 16384;

/// Largest message on a unix socket, raw bytes included: a `SETALL` of [`SEMMSL`] values.
pub const MAX_LOCAL: usize = 128 * 1024;
/// Largest message on a QUIC stream, raw bytes included.
pub const MAX_REMOTE: usize = 256 * 1024;
