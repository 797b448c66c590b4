//! Valid input for each target: every kind of message.

use migshm_protocol::accesses::{Counts, Part, Request, Seen, Traffic, User};
use migshm_protocol::call::{
    Answer, Call, Caller, Errno, MsgCommand, NewPerm, SemBuf, SemCommand, SetMemory, ShmCommand,
    StatBy,
};
use migshm_protocol::codec;
use migshm_protocol::control::{Debt, FromCoordinator, Member, Placement, SetState, ToCoordinator};
use migshm_protocol::local::{FromNode, LOCAL_VERSION, ToNode};
use migshm_protocol::page::{
    Access, Contents, DirectoryEntry, Holding, PageMessage, PageRun, PeerHello, PeerMessage,
};
use migshm_protocol::release::{ReleaseMessage, Sent};
use migshm_protocol::session::Header;
use migshm_protocol::{Extent, NodeId, Page, ProcessId, SegmentId, VERSION};
use serde::Serialize;

use super::machines::{ME, PAGE_BYTES, SEGMENT, ToCore, ToEngine};
use migshm_coherence::release::Diff;

const CREATE: i32 = 0o1666;
const PAGE: Page = Page {
    segment: SEGMENT,
    index: 1,
};
const EXTENT: Extent = Extent {
    segment: SEGMENT,
    index: 0,
};

pub(super) fn local() -> Vec<Vec<u8>> {
    let (id, address, length) = (3, 1 << 40, 1 << 20);
    let mut messages = vec![
        ToNode::Hello {
            version: LOCAL_VERSION,
            forked_from: 0,
            anchor: u64::MAX,
        },
        ToNode::Anchor { id, address },
        ToNode::Cancel {
            id,
            errno: Errno::EINTR,
        },
        ToNode::Mapped {
            id: Some(id),
            attach: 1,
            address,
        },
        ToNode::Detach { id, address },
        ToNode::Unmapped { attach: 1 },
        ToNode::Unmapping {
            id,
            address,
            length,
        },
        ToNode::Remapped { id },
        ToNode::Permitting {
            id,
            address,
            length,
        },
        ToNode::Status { id },
        ToNode::Upgrade { id },
    ];
    messages.extend(
        calls()
            .into_iter()
            .map(|(call, _)| ToNode::Call { id, call }),
    );
    let answers = [
        FromNode::Welcome {
            node: NodeId(3),
            track: true,
        },
        FromNode::Refused {
            errno: Errno::ENOSYS,
        },
        FromNode::Answer {
            id,
            outcome: Ok(Answer::Value(7)),
        },
        FromNode::Answer {
            id,
            outcome: Err(Errno::EIDRM),
        },
        FromNode::Permitted { id, until: address },
        FromNode::Detaching {
            id,
            attach: 1,
            pieces: [(0, 0); 16],
        },
    ];
    let operations = SemBuf {
        num: 0,
        op: -1,
        flags: 0,
    };
    let messages = messages.iter().map(|m| encoded(m, &operations.to_bytes()));
    messages
        .chain(answers.iter().map(|a| encoded(a, &[])))
        .collect()
}

pub(super) fn control() -> Vec<Vec<u8>> {
    let member = Member {
        node: NodeId(1),
        name: "node1".to_owned(),
        address: "[::1]:7412".parse().expect("an address"),
        epoch: 5,
        memory: 1 << 34,
    };
    let join = ToCoordinator::Join {
        version: VERSION,
        name: "node1".to_owned(),
        address: member.address,
        memory: member.memory,
    };
    let resume = ToCoordinator::Resume {
        version: VERSION,
        cluster: 77,
        node: NodeId(1),
        epoch: 5,
    };
    let answers = [
        FromCoordinator::Welcome {
            cluster: 77,
            node: NodeId(1),
            epoch: 5,
        },
        FromCoordinator::Resumed,
        FromCoordinator::Refused {
            reason: "full".to_owned(),
        },
        FromCoordinator::Members {
            view: 1,
            members: vec![member.clone(); 2],
        },
        FromCoordinator::Joined { member },
        FromCoordinator::Left {
            node: NodeId(1),
            view: 2,
        },
        FromCoordinator::Answer {
            id: 1,
            outcome: Ok(Answer::Value(3)),
            placement: Some(Placement::Shared {
                default_home: Some(NodeId(0)),
            }),
        },
        FromCoordinator::Share { segment: SEGMENT },
        FromCoordinator::HomeIs {
            orphaned: false,
            extent: EXTENT,
            home: Some(NodeId(1)),
        },
        FromCoordinator::MoveHome {
            extent: EXTENT,
            to: NodeId(2),
        },
        FromCoordinator::Changed {
            segment: SEGMENT,
            pages: vec![(0, 2), (7, 1)],
        },
        FromCoordinator::Delegated {
            id: 1,
            set: 0,
            number: 1,
            access: 1,
            state: set_state(),
        },
        FromCoordinator::Recall { set: 0, number: 1 },
        FromCoordinator::SetRemoved { set: 0 },
        FromCoordinator::Present { number: 1 },
        FromCoordinator::Account {
            number: 1,
            segment: SEGMENT,
            from: 0,
            requests: true,
        },
        FromCoordinator::Destroyed { segment: SEGMENT },
    ];
    let part = Part {
        time: 1 << 60,
        users: vec![User {
            user: 1,
            pid: 77,
            command: "app".to_owned(),
            attached: true,
            since: 1,
            ended: None,
        }],
        traffic: vec![Traffic {
            user: 1,
            extent: 0,
            peer: 2,
            counts: Counts::default(),
            received: Seen::default(),
            sent: Seen::default(),
        }],
        requests: vec![Request {
            time: 1,
            page: 3,
            node: NodeId(2),
            access: Access::Write,
        }],
        forgotten: 0,
        next: Some(1),
    };
    let messages = session().into_iter().map(|(_, _, message, _)| message);
    let header = Header {
        number: 1,
        received: 2,
    };
    let messages = messages.chain([join, resume]);
    let messages = messages.map(|message| encoded(&(header, message), &[]));
    let answers = answers.iter().map(|answer| encoded(&(header, answer), &[]));
    messages
        .chain(answers)
        .chain([encoded(&part, &[])])
        .collect()
}

pub(super) fn peer() -> Vec<Vec<u8>> {
    let hello = PeerHello {
        version: VERSION,
        node: NodeId(2),
        epoch: 9,
    };
    let messages = page_messages().into_iter();
    messages
        .map(|(_, message, data)| encoded(&message, &data))
        .chain([encoded(&hello, &[])])
        .collect()
}

pub(super) fn coordinator() -> Vec<Vec<u8>> {
    let steps: Vec<Vec<u8>> = session().iter().map(|step| encoded(step, &[])).collect();
    let backwards = steps.iter().rev().flatten().copied().collect();
    vec![steps.concat(), backwards]
}

pub(super) fn pages() -> Vec<Vec<u8>> {
    let steps = page_messages();
    let steps: Vec<Vec<u8>> = steps.iter().map(|step| encoded(step, &[])).collect();
    let mut samples = vec![steps.concat()];
    samples.extend(steps);
    samples
}

pub(super) fn diffs() -> Vec<Vec<u8>> {
    let twin = [0; PAGE_BYTES];
    let mut now = twin;
    let mut samples = Vec::new();
    for at in [0, 1, 7, 8, 15, 40, 63] {
        now[at] = 0xff;
        let diff = Diff::between(&twin, &now).expect("they differ");
        samples.push(diff.as_bytes().to_vec());
    }
    samples.push(
        Diff::between(&twin, &[7; PAGE_BYTES])
            .expect("they differ")
            .as_bytes()
            .to_vec(),
    );
    samples
}

fn encoded<T: Serialize>(value: &T, raw: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    codec::encode(value, raw, &mut bytes).expect("it can be encoded");
    bytes
}

fn set_state() -> SetState {
    SetState {
        values: vec![1, 0],
        pids: vec![10, 10],
        otime: 1000,
        debts: vec![Debt {
            process: ProcessId(1),
            pid: 10,
            num: 0,
            owed: 1,
        }],
    }
}

/// Every call, with the bytes beside it, on the first objects that there are.
fn calls() -> Vec<(Call, Vec<u8>)> {
    let id = 0;
    let perm = NewPerm {
        uid: 0,
        gid: 0,
        mode: 0o666,
    };
    let operations = |op: i16, flags: i16| {
        let operation = SemBuf { num: 0, op, flags };
        operation.to_bytes().to_vec()
    };
    let message = [&1i64.to_le_bytes()[..], b"text"].concat();
    let semop = |memory| Call::SemOp { id, memory };
    let send = Call::MsgSend { id, flags: 0 };
    let receive = Call::MsgReceive {
        id,
        size: 100,
        mtype: 1,
        flags: 0,
    };
    let plain = |call| (call, Vec::new());
    let mut calls = vec![
        plain(Call::ShmGet {
            key: 1,
            size: 1 << 20,
            flags: CREATE,
            consistency: None,
        }),
        plain(Call::ShmAttach { id, flags: 0 }),
        plain(Call::SemGet {
            key: 1,
            count: 2,
            flags: CREATE,
        }),
        (semop(SetMemory::Wanted), operations(1, 0x1000)),
        (semop(SetMemory::Mapped), operations(-1, 0x1000)),
        (semop(SetMemory::Unusable), operations(-1, 0)),
        plain(Call::MsgGet {
            key: 1,
            flags: CREATE,
        }),
        (send, message),
        plain(receive),
        plain(receive),
        plain(Call::Accesses {
            id,
            node: NodeId(1),
            from: 0,
            requests: true,
        }),
    ];
    let shm = [
        ShmCommand::Stat(StatBy::Id),
        ShmCommand::Set(perm),
        ShmCommand::Lock(true),
        ShmCommand::Limits,
        ShmCommand::Usage,
        ShmCommand::Remove,
    ];
    calls.extend(shm.map(|command| plain(Call::ShmCtl { id, command })));
    let sem = [
        SemCommand::Stat(StatBy::Any),
        SemCommand::Set(perm),
        SemCommand::GetAll,
        SemCommand::GetVal(0),
        SemCommand::SetVal(1, 5),
        SemCommand::GetPid(0),
        SemCommand::GetNcnt(0),
        SemCommand::GetZcnt(0),
        SemCommand::Remove,
    ];
    calls.extend(sem.map(|command| plain(Call::SemCtl { id, command })));
    let all = Call::SemCtl {
        id,
        command: SemCommand::SetAll,
    };
    calls.push((all, vec![1, 0, 2, 0]));
    let msg = [
        MsgCommand::Stat(StatBy::Index),
        MsgCommand::Set { perm, qbytes: 100 },
        MsgCommand::Remove,
    ];
    calls.extend(msg.map(|command| plain(Call::MsgCtl { id, command })));
    calls
}

/// Two nodes make all calls one after the other, and say all else that there is to say.
fn session() -> Vec<ToCore> {
    // The first segment of all.
    let segment = SegmentId(0);
    let extent = Extent { segment, index: 0 };
    let process = ProcessId(1);
    let (pid, count) = (10, 1);
    let pages = vec![(0, 1)];
    let mut steps: Vec<ToCore> = Vec::new();
    let mut id = 0;
    for (call, raw) in calls() {
        for node in 0..2 {
            id += 1;
            let caller = Caller {
                process,
                pid,
                uid: 0,
                gid: 0,
                groups: vec![0],
                capabilities: u64::MAX,
                memlock: None,
            };
            let message = ToCoordinator::Call { id, caller, call };
            steps.push((node, 1000, message, raw.clone()));
        }
    }
    let others = [
        ToCoordinator::Cancel {
            id: 12,
            errno: Errno::EAGAIN,
        },
        ToCoordinator::Sharing { segment },
        ToCoordinator::Inherited {
            segment,
            count,
            pid,
        },
        ToCoordinator::FindSegment { segment },
        ToCoordinator::FindHome { extent },
        ToCoordinator::ProposeHome {
            extent,
            to: NodeId(1),
        },
        ToCoordinator::HomeMoved { extent },
        ToCoordinator::Wrote { segment, pages },
        ToCoordinator::Returned {
            set: 0,
            number: 1,
            state: set_state(),
        },
        ToCoordinator::Query { number: 1 },
        ToCoordinator::Account { number: 1 },
        ToCoordinator::Detached {
            id: 900,
            segment,
            count,
            pid,
        },
        ToCoordinator::Unattached { segment },
        ToCoordinator::Flushed { view: 1 },
        ToCoordinator::Unreachable {
            node: NodeId(1),
            epoch: 1,
        },
        ToCoordinator::Confirm { id: 901 },
        ToCoordinator::Exited { process, pid },
    ];
    // Before the objects are removed, and after.
    let middle = steps.len() / 2;
    let others = others.map(|message| (1, 1001, message, Vec::new()));
    steps.splice(middle..middle, others.clone());
    steps.extend(others);
    steps
}

/// Everything that nodes say to node 1.
fn page_messages() -> Vec<ToEngine> {
    let page = PAGE;
    let (access, requester) = (Access::Write, NodeId(2));
    let entries = vec![DirectoryEntry {
        page: 0,
        owner: Some(NodeId(2)),
        sharers: [NodeId(2), NodeId(3)].into_iter().collect(),
    }];
    let sequential = [
        PageMessage::Request {
            page,
            access,
            requester,
            has_copy: false,
            prefetch: false,
        },
        PageMessage::Forward {
            page,
            access,
            requester,
            acks: 1,
            pushed: false,
            prefetch: true,
        },
        PageMessage::Decline { page, requester },
        PageMessage::Invalidate { page, requester },
        PageMessage::Grant {
            page,
            access,
            acks: 0,
            contents: Contents::Bytes,
            home: ME,
            confirm: true,
            pushed: true,
        },
        PageMessage::Push {
            page,
            access,
            to: requester,
        },
        PageMessage::Relinquish {
            page,
            sharer: requester,
        },
        PageMessage::InvalidateAck { page },
        PageMessage::Done { page },
        PageMessage::WriteBack {
            page,
            owner: requester,
        },
        PageMessage::WriteBackAck {
            page,
            accepted: true,
        },
        PageMessage::Survey { extent: EXTENT },
        PageMessage::Holdings {
            extent: EXTENT,
            pages: vec![Holding {
                first: 0,
                count: 2,
                access: Access::Read,
            }],
        },
        PageMessage::Lost { page },
        PageMessage::Fence { extent: EXTENT },
        PageMessage::FenceAck { extent: EXTENT },
        PageMessage::HomeTransfer {
            extent: EXTENT,
            entries,
        },
    ];
    let run = |message| PeerMessage::Sequential(PageRun { pages: 1, message });
    let (segment, number) = (SEGMENT, 1);
    let release = [
        ReleaseMessage::Fetch {
            segment,
            requester,
            number,
            write: false,
            pages: vec![0, 1],
        },
        ReleaseMessage::Copies {
            segment,
            number,
            pages: vec![(0, Sent::Bytes), (1, Sent::Zeros)],
        },
        ReleaseMessage::Diffs {
            segment,
            number,
            pages: vec![(0, 3)],
        },
        ReleaseMessage::Merged {
            segment,
            number,
            shared: vec![0],
            offered: vec![1],
        },
        ReleaseMessage::Returned {
            page,
            zeros: false,
            copies: [ME, requester].into_iter().collect(),
        },
        ReleaseMessage::Taken {
            segment,
            number,
            taken: vec![0],
            refused: vec![1],
        },
        ReleaseMessage::Recall {
            segment,
            pages: vec![0],
        },
        ReleaseMessage::Lost {
            segment,
            pages: vec![(0, 1)],
        },
    ];
    let messages = sequential.map(run).into_iter();
    let messages = messages.chain(release.map(PeerMessage::Release));
    let data = [vec![1, 1, 9], vec![9; PAGE_BYTES]];
    messages
        .zip(data.iter().cycle())
        .map(|(message, data)| (2, message, data.clone()))
        .collect()
}
