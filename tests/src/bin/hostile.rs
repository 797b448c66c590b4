//! `hostile SOCKET PART ...`: speaks to a node daemon as no honest program does, and prints what came
//! of it. See `tests/hostile.rs`.

use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::exit;

use migshm_protocol::call::{
    Answer, Call, Errno, NewPerm, Outcome, SemCommand, SetMemory, ShmCommand, StatBy,
};
use migshm_protocol::codec;
use migshm_protocol::local::{FromNode, LOCAL_VERSION, ToNode};
use migshm_tests::decoders;

/// Room for any packet.
const PACKET: usize = 256 * 1024;
/// Descriptors that the kernel lets travel with a packet (`SCM_MAX_FD`).
const FLOOD: usize = 253;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, socket, part, rest @ ..] = &arguments[..] else {
        exit(2)
    };
    let number = |at: usize| rest[at].parse::<i32>().expect("a number");
    match part.as_str() {
        "forge" => forge(socket, number(0), number(1), number(2)),
        "order" => order(socket),
        "descriptors" => descriptors(socket),
        "deaf" => deaf(socket),
        "crowd" => crowd(socket, number(0)),
        "anchors" => anchors(socket, number(0)),
        "inherit" => inherit(socket, number(0)),
        "lend" => lend(socket, number(0), &rest[1]),
        "storm" => storm(socket, number(0)),
        "vanish" => vanish(socket),
        "memory" => memory(socket, number(0), number(1), &[number(2), number(3)]),
        "vandal" => vandal(socket, number(0)),
        "greed" => greed(socket),
        _ => exit(2),
    }
    println!("done");
}

/// Everything that names what belongs to others: the process `victim`, its segment and its set.
fn forge(socket: &str, victim: i32, segment: i32, set: i32) {
    let mut client = Client::greeting(socket, victim, 1);
    if let Some(device) = client.device.take() {
        anchor(&mut client, &device);
        client.device = Some(device);
    }
    let perm = NewPerm {
        uid: 65534,
        gid: 65534,
        mode: 0o777,
    };
    let calls = [
        Call::ShmAttach {
            id: segment,
            flags: 0,
        },
        Call::ShmAttach {
            id: segment,
            flags: 0o10000,
        },
        Call::ShmCtl {
            id: segment,
            command: ShmCommand::Stat(StatBy::Id),
        },
        Call::ShmCtl {
            id: segment,
            command: ShmCommand::Set(perm),
        },
        Call::ShmCtl {
            id: segment,
            command: ShmCommand::Remove,
        },
        Call::SemCtl {
            id: set,
            command: SemCommand::SetVal(0, 1),
        },
        Call::SemCtl {
            id: set,
            command: SemCommand::Remove,
        },
        Call::SemOp {
            id: set,
            memory: SetMemory::Wanted,
        },
    ];
    for call in calls {
        // One operation: semaphore 0, plus 1.
        let outcome = client.call(call, &[0, 0, 1, 0, 0, 0]);
        assert!(
            matches!(outcome, Err(Errno::EACCES | Errno::EPERM)),
            "{call:?}: {outcome:?}"
        );
    }
    // Numbers that make no sense.
    for number in [i32::MIN, -1, i32::MAX] {
        for call in [
            Call::ShmAttach {
                id: number,
                flags: number,
            },
            Call::ShmGet {
                key: 0,
                size: u64::MAX,
                flags: number,
                consistency: None,
            },
            Call::SemGet {
                key: 0,
                count: number,
                flags: 0,
            },
            Call::SemCtl {
                id: number,
                command: SemCommand::GetVal(number),
            },
            Call::MsgReceive {
                id: number,
                size: u64::MAX,
                mtype: i64::MIN,
                flags: number,
            },
            Call::MsgSend {
                id: number,
                flags: number,
            },
        ] {
            let outcome = client.call(call, &[0xff; 4096]);
            assert!(outcome.is_err(), "{call:?}: {outcome:?}");
        }
    }
    for attach in 0..300 {
        client.send(&ToNode::Unmapped { attach }, &[], &[]).ok();
        for address in [0, 1, 4096, u64::MAX, 1 << 63] {
            let id = (attach % 2 == 0).then_some(0);
            let mapped = ToNode::Mapped {
                id,
                attach,
                address,
            };
            client.send(&mapped, &[], &[]).ok();
        }
    }
    for id in 0..2000 {
        for errno in [Errno::EINTR, Errno(-1), Errno(0), Errno(i32::MAX)] {
            client.send(&ToNode::Cancel { id, errno }, &[], &[]).ok();
        }
    }
    for address in [0, 1, 4096, 1 << 46, u64::MAX, u64::MAX - 4095] {
        let detached = client.ask(&|id| ToNode::Detach { id, address }, &[], &[]);
        assert_eq!(detached, Err(Errno::EINVAL));
        for length in [0, 1, 4096, u64::MAX, u64::MAX - 4095] {
            client
                .ask(
                    &|id| ToNode::Unmapping {
                        id,
                        address,
                        length,
                    },
                    &[],
                    &[],
                )
                .expect("it is told only");
        }
    }
    // What is no userfaultfd of a process, at addresses that nothing is at.
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe(ends.as_mut_ptr()) }, 0);
    let files = [
        File::open("/dev/null").expect("there is one"),
        File::open("/proc/self/maps").expect("our own"),
        // SAFETY: a new descriptor that nothing else owns.
        unsafe { File::from_raw_fd(ends[0]) },
    ];
    let mut garbage: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    garbage.extend(client.device.as_ref().map(AsRawFd::as_raw_fd));
    garbage.push(client.socket.as_raw_fd());
    for address in [0, 1, 4096, u64::MAX] {
        let anchor = |id| ToNode::Anchor { id, address };
        assert!(client.ask(&anchor, &[], &[]).is_err());
        for &descriptor in &garbage {
            assert!(client.ask(&anchor, &[], &[descriptor]).is_err());
        }
        if let Some(device) = &client.device {
            let own = userfaultfd(device);
            assert!(client.ask(&anchor, &[], &[own.as_raw_fd()]).is_err());
        }
    }
    // Still served.
    assert!(client.ask(&|id| ToNode::Status { id }, &[], &[]).is_ok());
}

/// What a connection ends with.
fn order(socket: &str) {
    let hello = |version| ToNode::Hello {
        version,
        forked_from: 0,
        anchor: 0,
    };
    let twice: [&[&[u8]]; 5] = [
        &[
            &packet(&hello(LOCAL_VERSION), &[]),
            &packet(&hello(LOCAL_VERSION), &[]),
        ],
        &[&packet(&hello(LOCAL_VERSION + 1), &[])],
        &[&packet(&ToNode::Status { id: 1 }, &[])],
        &[&packet(
            &ToNode::Mapped {
                id: Some(1),
                attach: 1,
                address: 0,
            },
            &[],
        )],
        &[&packet(&hello(LOCAL_VERSION), &[]), &[0xff; 64]],
    ];
    for packets in twice {
        let mut client = Client::connect(socket);
        for bytes in packets {
            client.send_bytes(bytes, &[]).ok();
        }
        client.expect_end();
    }
    // Longer than any packet may be.
    let mut client = Client::greeting(socket, 0, 0);
    client.send_bytes(&vec![0; 140_000], &[]).ok();
    client.expect_end();
    // A call while another waits.
    let mut client = Client::greeting(socket, 0, 0);
    let set = client.call(
        Call::SemGet {
            key: 0,
            count: 1,
            flags: 0o600,
        },
        &[],
    );
    let Ok(Answer::Value(id)) = set else {
        panic!("{set:?}")
    };
    let down = ToNode::Call {
        id: 70,
        call: Call::SemOp {
            id,
            memory: SetMemory::Wanted,
        },
    };
    for _ in 0..2 {
        client.send(&down, &[0, 0, 0xff, 0xff, 0, 0], &[]).ok();
    }
    client.expect_end();
}

/// Descriptors with every packet.
fn descriptors(socket: &str) {
    let null = File::open("/dev/null").expect("there is one");
    let flood = vec![null.as_raw_fd(); FLOOD];
    let mut client = Client::greeting(socket, 0, 0);
    for _ in 0..200 {
        client
            .ask(&|id| ToNode::Status { id }, &[], &flood)
            .expect("it is answered");
    }
}

/// Asks and never reads, until the daemon has had enough.
fn deaf(socket: &str) {
    let mut client = Client::greeting(socket, 0, 0);
    let error = loop {
        if let Err(error) = client.send(&ToNode::Status { id: 1 }, &[], &[]) {
            break error;
        }
    };
    assert_eq!(error.raw_os_error(), Some(libc::EPIPE), "{error}");
}

/// Connects as often as it is let, says how often that was, and keeps the connections until it is told
/// to end.
fn crowd(socket: &str, attempts: i32) {
    let mut clients = Vec::new();
    for _ in 0..attempts {
        let mut client = Client::connect(socket);
        if client.greet(0, 0).is_err() {
            break;
        }
        clients.push(client);
    }
    println!("{}", clients.len());
    io::stdin().read_line(&mut String::new()).ok();
}

/// Anchors its address space again and again.
fn anchors(socket: &str, times: i32) {
    let mut client = Client::greeting(socket, 0, 0);
    let Some(device) = client.device.take() else {
        return;
    };
    for _ in 0..times {
        anchor(&mut client, &device);
    }
    println!("anchored");
    io::stdin().read_line(&mut String::new()).ok();
}

/// Anchors this address space, as honest programs do.
fn anchor(client: &mut Client, device: &OwnedFd) {
    // SAFETY: a new private page.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    let address = page as u64;
    let own = userfaultfd(device);
    client
        .ask(
            &|id| ToNode::Anchor { id, address },
            &[],
            &[own.as_raw_fd()],
        )
        .expect("it is one");
}

/// Root, whose child becomes another user and uses what it inherited.
fn inherit(socket: &str, segment: i32) {
    let stat = Call::ShmCtl {
        id: segment,
        command: ShmCommand::Stat(StatBy::Id),
    };
    let mut client = Client::greeting(socket, 0, 0);
    client.call(stat, &[]).expect("root may");
    in_child(|| {
        // SAFETY: plain integers.
        assert_eq!(unsafe { libc::setresuid(65534, 65534, 65534) }, 0);
        client
            .send(&ToNode::Call { id: 99, call: stat }, &[], &[])
            .ok();
        client.expect_end();
    });
}

/// Makes a call, and executes a program that has more privileges than this user before the daemon has
/// heard of it: the test keeps it from that. A child waits for the answer.
fn lend(socket: &str, segment: i32, program: &str) {
    let mut client = Client::greeting(socket, 0, 0);
    println!("greeted");
    io::stdin().read_line(&mut String::new()).ok();
    let id = 99;
    let call = Call::ShmCtl {
        id: segment,
        command: ShmCommand::Stat(StatBy::Id),
    };
    let parent = std::process::id();
    // SAFETY: this process has one thread.
    if unsafe { libc::fork() } != 0 {
        client
            .send(&ToNode::Call { id, call }, &[], &[])
            .expect("it can be sent");
        let program = std::ffi::CString::new(program).expect("a path");
        let arguments = [program.as_ptr(), c"100".as_ptr(), std::ptr::null()];
        // SAFETY: C strings, and a null at the end.
        unsafe { libc::execv(program.as_ptr(), arguments.as_ptr()) };
        panic!("{}", io::Error::last_os_error());
    }
    let is_capable = || {
        let status = fs::read_to_string(format!("/proc/{parent}/status")).expect("it lives");
        let mut lines = status.lines();
        let line = lines.find_map(|line| line.strip_prefix("CapEff:\t"));
        let bits = u64::from_str_radix(line.expect("there is one"), 16).expect("hexadecimal");
        bits & 1 << 15 != 0
    };
    while !is_capable() {
        std::thread::yield_now();
    }
    println!("lent");
    let (answer, _) = client.receive().expect("it is answered");
    // SAFETY: plain integers.
    unsafe { libc::kill(parent.cast_signed(), libc::SIGKILL) };
    let outcome = Err(Errno::EACCES);
    assert_eq!(answer, FromNode::Answer { id, outcome });
}

/// Sends packets of every kind in any order, half of them damaged, on as many connections one after the other as are
/// cut off.
fn storm(socket: &str, seed: i32) {
    const PACKETS: u64 = 20_000;
    let samples = decoders::samples("local");
    let first = u64::from(seed.unsigned_abs()) << 32;
    let mut client = Client::greeting(socket, 0, 0);
    for seed in first..first + PACKETS {
        let bytes = match seed % 2 {
            0 => samples[seed as usize / 2 % samples.len()].clone(),
            _ => decoders::mutate(&samples, seed),
        };
        // The answers are not looked at, but read: who does not read is cut off.
        if client.send_bytes(&bytes, &[]).is_err() || !client.drain() {
            client = Client::greeting(socket, 0, 0);
        }
    }
}

/// Ends connections at every moment: before a greeting, with nothing said, with half a packet, in the midst of a call that
/// waits, with an answer unread.
fn vanish(socket: &str) {
    let hello = ToNode::Hello {
        version: LOCAL_VERSION,
        forked_from: 0,
        anchor: 0,
    };
    let hello = packet(&hello, &[]);
    for _ in 0..100 {
        drop(Client::connect(socket));
        for bytes in [&hello[..], &hello[..1], &[]] {
            Client::connect(socket).send_bytes(bytes, &[]).ok();
        }
        let mut client = Client::greeting(socket, 0, 0);
        let private = Call::SemGet {
            key: 0,
            count: 1,
            flags: 0o600,
        };
        let Ok(Answer::Value(id)) = client.call(private, &[]) else {
            panic!("no set")
        };
        let call = Call::SemOp {
            id,
            memory: SetMemory::Unusable,
        };
        let wait = ToNode::Call { id: 70, call };
        client.send(&wait, &[0, 0, 0xff, 0xff, 0, 0], &[]).ok();
        drop(client);
        let mut client = Client::greeting(socket, 0, 0);
        client.send(&ToNode::Status { id: 1 }, &[], &[]).ok();
        drop(client);
        let mut client = Client::greeting(socket, 0, 0);
        let command = SemCommand::Remove;
        client
            .call(Call::SemCtl { id, command }, &[])
            .expect("it is ours");
    }
}

/// What the descriptors of segments allow, one that this user may write and one that he may read;
/// and those that other processes have.
fn memory(socket: &str, writable: i32, readable: i32, others: &[i32]) {
    let mut client = Client::greeting(socket, 0, 0);
    if let Some(device) = client.device.take() {
        anchor(&mut client, &device);
    }
    let own = client.attach(writable, 0);
    let length = own.metadata().expect("a file").len();
    let denied = |result: libc::c_int, wanted: &[libc::c_int]| {
        let errno = io::Error::last_os_error().raw_os_error().unwrap_or(0);
        assert!(result < 0 && wanted.contains(&errno), "{result}, {errno}");
    };
    let resized = [
        0,
        1,
        4096,
        length.cast_signed() - 1,
        length.cast_signed() + 1,
        1 << 30,
    ];
    for new in resized {
        // SAFETY: plain integers.
        denied(
            unsafe { libc::ftruncate(own.as_raw_fd(), new) },
            &[libc::EPERM],
        );
    }
    let (fd, end) = (own.as_raw_fd(), length.cast_signed());
    // SAFETY: plain integers, live buffers.
    unsafe {
        denied(libc::fallocate(fd, 0, end, 4096), &[libc::EPERM]);
        for seals in [
            libc::F_SEAL_WRITE,
            libc::F_SEAL_FUTURE_WRITE,
            libc::F_SEAL_SHRINK,
        ] {
            denied(libc::fcntl(fd, libc::F_ADD_SEALS, seals), &[libc::EPERM]);
        }
        let beyond = libc::pwrite(fd, c"x".as_ptr().cast(), 1, end);
        denied(beyond as libc::c_int, &[libc::EPERM]);
        denied(libc::fchmod(fd, 0o777), &[libc::EPERM]);
        denied(libc::fchown(fd, 65534, 65534), &[libc::EPERM]);
    }
    // It is root's, for root: nobody who is handed the one kind makes the other of it.
    let again = File::options()
        .read(true)
        .write(true)
        .open(format!("/proc/self/fd/{fd}"));
    assert_eq!(
        again.expect_err("denied").raw_os_error(),
        Some(libc::EACCES)
    );
    assert!(client.attach_outcome(readable, 0).0.is_err());
    const SHM_RDONLY: i32 = 0o10000;
    let read = client.attach(readable, SHM_RDONLY);
    let path = format!("/proc/self/fd/{}", read.as_raw_fd());
    let again = File::options().read(true).write(true).open(path);
    assert_eq!(
        again.expect_err("denied").raw_os_error(),
        Some(libc::EACCES)
    );
    // SAFETY: plain integers, live buffers; nothing is mapped.
    unsafe {
        let fd = read.as_raw_fd();
        denied(libc::ftruncate(fd, 0), &[libc::EPERM, libc::EINVAL]);
        if libc::fcntl(fd, libc::F_GETFL) & libc::O_ACCMODE == libc::O_RDONLY {
            let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            denied(libc::fallocate(fd, hole, 0, 4096), &[libc::EBADF]);
            let written = libc::pwrite(fd, c"x".as_ptr().cast(), 1, 0);
            denied(written as libc::c_int, &[libc::EBADF]);
            let both = libc::PROT_READ | libc::PROT_WRITE;
            let mapped = libc::mmap(std::ptr::null_mut(), 4096, both, libc::MAP_SHARED, fd, 0);
            assert_eq!(mapped, libc::MAP_FAILED);
        }
    }
    // Those of others, and what they map.
    for &pid in others {
        assert!(fs::read_dir(format!("/proc/{pid}/fd")).is_err());
        assert!(fs::read_dir(format!("/proc/{pid}/map_files")).is_err());
        assert!(File::open(format!("/proc/{pid}/mem")).is_err());
        // SAFETY: plain integers.
        unsafe {
            let pidfd = libc::syscall(libc::SYS_pidfd_open, pid, 0) as libc::c_int;
            assert!(pidfd >= 0);
            for fd in 0..64 {
                let got = libc::syscall(libc::SYS_pidfd_getfd, pidfd, fd, 0);
                denied(got as libc::c_int, &[libc::EPERM]);
            }
        }
    }
}

/// Spoils a segment by all means that its descriptor gives, until it is told to end.
fn vandal(socket: &str, segment: i32) {
    let mut client = Client::greeting(socket, 0, 0);
    if let Some(device) = client.device.take() {
        anchor(&mut client, &device);
    }
    let file = client.attach(segment, 0);
    let length = file.metadata().expect("a file").len().cast_signed();
    println!("attached");
    let mut input = libc::pollfd {
        fd: 0,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut offset = 0;
    // SAFETY: one live pollfd.
    while unsafe { libc::poll(&raw mut input, 1, 0) } == 0 {
        offset = (offset + 4096) % length;
        // SAFETY: plain integers and live buffers; nothing is mapped here.
        unsafe {
            let fd = file.as_raw_fd();
            libc::pwrite(fd, c"vandal".as_ptr().cast(), 6, offset);
            let hole = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            libc::fallocate(fd, hole, (offset + length / 2) % length, 4096);
            libc::fallocate(fd, 0, (offset + length / 4) % length, 4096);
        }
    }
}

/// Creates segments, sets and queues until there are no more, says how many, and keeps them until it is
/// told to end.
fn greed(socket: &str) {
    let mut client = Client::greeting(socket, 0, 0);
    let (key, flags) = (0, 0o600);
    let calls = [
        Call::ShmGet {
            key,
            size: 1,
            flags,
            consistency: None,
        },
        Call::SemGet {
            key,
            count: 1,
            flags,
        },
        Call::MsgGet { key, flags },
    ];
    let counts = calls.map(|call| {
        let mut count = 0;
        loop {
            match client.call(call, &[]) {
                Ok(_) => count += 1,
                Err(errno) => {
                    assert_eq!(errno, Errno::ENOSPC);
                    return count.to_string();
                }
            }
        }
    });
    println!("{}", counts.join(" "));
    io::stdin().read_line(&mut String::new()).ok();
}

/// Runs a part in a child that must succeed.
fn in_child(part: impl FnOnce()) {
    // SAFETY: this process has one thread.
    let child = unsafe { libc::fork() };
    if child == 0 {
        part();
        exit(0);
    }
    let mut status = 0;
    // SAFETY: a live integer.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!(status, 0, "the child has failed");
}

struct Client {
    socket: OwnedFd,
    device: Option<OwnedFd>,
    last_id: u64,
}

impl Client {
    fn connect(path: &str) -> Client {
        // SAFETY: plain data, zero is a valid value.
        let mut address: libc::sockaddr_un = unsafe { mem::zeroed() };
        address.sun_family = 1;
        for (to, from) in address.sun_path.iter_mut().zip(path.bytes()) {
            *to = from.cast_signed();
        }
        // SAFETY: plain integers, a live address.
        let socket = unsafe {
            let socket = libc::socket(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0);
            let size = libc::socklen_t::try_from(size_of_val(&address)).expect("small");
            assert_eq!(
                libc::connect(socket, (&raw const address).cast(), size),
                0,
                "{}",
                io::Error::last_os_error()
            );
            OwnedFd::from_raw_fd(socket)
        };
        Client {
            socket,
            device: None,
            last_id: 0,
        }
    }

    fn greeting(path: &str, forked_from: i32, anchor: u64) -> Client {
        let mut client = Client::connect(path);
        client.greet(forked_from, anchor).expect("it is welcome");
        client
    }

    fn greet(&mut self, forked_from: i32, anchor: u64) -> io::Result<()> {
        let hello = ToNode::Hello {
            version: LOCAL_VERSION,
            forked_from,
            anchor,
        };
        self.send(&hello, &[], &[])?;
        let (_, device) = self.receive()?;
        self.device = device;
        Ok(())
    }

    fn call(&mut self, call: Call, raw: &[u8]) -> Outcome {
        self.ask(&|id| ToNode::Call { id, call }, raw, &[])
    }

    /// What an attach gives; it is never mapped.
    fn attach_outcome(&mut self, id: i32, flags: i32) -> (Outcome, Option<OwnedFd>) {
        let call = Call::ShmAttach { id, flags };
        self.ask_for(&|id| ToNode::Call { id, call }, &[], &[])
    }

    /// The descriptor of a segment.
    fn attach(&mut self, id: i32, flags: i32) -> File {
        let (outcome, descriptor) = self.attach_outcome(id, flags);
        outcome.expect("this user may");
        descriptor.expect("it comes with the answer").into()
    }

    fn ask(&mut self, message: &dyn Fn(u64) -> ToNode, raw: &[u8], with: &[RawFd]) -> Outcome {
        self.ask_for(message, raw, with).0
    }

    /// The answer, and the descriptor that came with it.
    fn ask_for(
        &mut self,
        message: &dyn Fn(u64) -> ToNode,
        raw: &[u8],
        with: &[RawFd],
    ) -> (Outcome, Option<OwnedFd>) {
        self.last_id += 1;
        // Far from those of the forged ones.
        let wanted = self.last_id << 32;
        self.send(&message(wanted), raw, with).expect("it is heard");
        loop {
            match self.receive().expect("it is answered") {
                (FromNode::Answer { id, outcome }, descriptor) if id == wanted => {
                    return (outcome, descriptor);
                }
                (FromNode::Answer { .. }, _) => {}
                (other, _) => panic!("{other:?}"),
            }
        }
    }

    fn send(&mut self, message: &ToNode, raw: &[u8], with: &[RawFd]) -> io::Result<()> {
        self.send_bytes(&packet(message, raw), with)
    }

    fn send_bytes(&mut self, bytes: &[u8], with: &[RawFd]) -> io::Result<()> {
        let mut iov = libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        let mut control = [0u64; 256];
        // SAFETY: plain data; the header refers to live buffers, and the macros stay inside them.
        let sent = unsafe {
            let mut header: libc::msghdr = mem::zeroed();
            header.msg_iov = &raw mut iov;
            header.msg_iovlen = 1;
            if !with.is_empty() {
                let size = u32::try_from(size_of_val(with)).expect("small");
                header.msg_control = control.as_mut_ptr().cast();
                header.msg_controllen = libc::CMSG_SPACE(size) as usize;
                let message = libc::CMSG_FIRSTHDR(&raw const header);
                (*message).cmsg_level = libc::SOL_SOCKET;
                (*message).cmsg_type = libc::SCM_RIGHTS;
                (*message).cmsg_len = libc::CMSG_LEN(size) as usize;
                let data = libc::CMSG_DATA(message).cast::<RawFd>();
                std::ptr::copy_nonoverlapping(with.as_ptr(), data, with.len());
            }
            libc::sendmsg(
                self.socket.as_raw_fd(),
                &raw const header,
                libc::MSG_NOSIGNAL,
            )
        };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<(FromNode, Option<OwnedFd>)> {
        let mut bytes = vec![0; PACKET];
        let mut iov = libc::iovec {
            iov_base: bytes.as_mut_ptr().cast(),
            iov_len: bytes.len(),
        };
        let mut control = [0u64; 8];
        // SAFETY: plain data; the header refers to live buffers, and the macros stay inside them.
        let (got, descriptor) = unsafe {
            let mut header: libc::msghdr = mem::zeroed();
            header.msg_iov = &raw mut iov;
            header.msg_iovlen = 1;
            header.msg_control = control.as_mut_ptr().cast();
            header.msg_controllen = size_of_val(&control);
            let got = libc::recvmsg(self.socket.as_raw_fd(), &raw mut header, 0);
            let message = libc::CMSG_FIRSTHDR(&raw const header);
            let descriptor = (got > 0 && !message.is_null()).then(|| {
                let data = libc::CMSG_DATA(message).cast::<RawFd>();
                OwnedFd::from_raw_fd(data.read_unaligned())
            });
            (got, descriptor)
        };
        match usize::try_from(got) {
            Err(_) => Err(io::Error::last_os_error()),
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                let (message, _) = codec::decode(&bytes[..length]).expect("a message");
                Ok((message, descriptor))
            }
        }
    }

    /// Reads what is there, without looking at it; whether the connection stands.
    fn drain(&mut self) -> bool {
        let mut bytes = [0u8; 4096];
        loop {
            // SAFETY: a live buffer and its length.
            let got = unsafe {
                let socket = self.socket.as_raw_fd();
                let flags = libc::MSG_DONTWAIT;
                libc::recv(socket, bytes.as_mut_ptr().cast(), bytes.len(), flags)
            };
            match got {
                0 => return false,
                1.. => {}
                _ => return io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock,
            }
        }
    }

    /// Reads until the daemon has ended the connection.
    fn expect_end(&mut self) {
        while let Ok((message, _)) = self.receive() {
            assert!(
                !matches!(message, FromNode::Answer { outcome: Ok(_), .. }),
                "{message:?}"
            );
        }
    }
}

fn packet(message: &ToNode, raw: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    codec::encode(message, raw, &mut bytes).expect("it can be encoded");
    bytes
}

/// A userfaultfd of this address space.
fn userfaultfd(device: &OwnedFd) -> OwnedFd {
    const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xAA00;
    // SAFETY: the request takes its flags by value and gives a new descriptor.
    unsafe {
        let new = libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_NONBLOCK);
        assert!(new >= 0, "{}", io::Error::last_os_error());
        OwnedFd::from_raw_fd(new)
    }
}
