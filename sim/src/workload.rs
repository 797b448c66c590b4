//! What the programs do: one process on each node.

use clap::ValueEnum;
use migshm_coherence::Time;
use migshm_protocol::call::SemBuf;
use migshm_protocol::page::Access;

/// Something that a process does.
#[derive(Clone, Debug)]
pub enum Step {
    /// Touches a page of the segment.
    Touch(u32, Access),
    /// `semop` with one operation on the only set.
    Operate(SemBuf),
    /// Computes for that many nanoseconds.
    Compute(Time),
    /// An operation of the workload is complete.
    Count,
}

/// The programs of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Each node writes pages of its own, twice; the homes are with the segment's first user.
    Private,
    /// The same in a segment that does not fit its first user: homes are given out at the first
    /// touch.
    Spread,
    /// One node writes pages that all others then read.
    Consumers,
    /// All nodes in turns change a page under a lock.
    Migratory,
    /// All nodes read a page, then one of them writes it.
    Storm,
    /// All nodes meet, with semaphores of one set, as System V programs do it.
    Barrier,
    /// Each node writes its pages and then reads its neighbours' next ones, between barriers.
    Stencil,
    /// The same in a segment that does not fit its first user.
    StencilSpread,
    /// Groups of eight nodes write to different words of the same page.
    FalseSharing,
}

/// Pages that each node has for itself.
const PRIVATE_PAGES: u32 = 64;
/// Pages that one node writes and all others read.
const CONSUMED_PAGES: u32 = 64;
/// Pages of each node in the stencil.
const STENCIL_PAGES: u32 = 8;
/// Nodes that write to the same page.
const GROUP: usize = 8;
/// Between two writes to a page that is shared falsely.
const THINKING: Time = 20_000;

/// The semaphores of the only set: the lock, how many have come to a barrier, how many may leave
/// an even and an odd one.
const LOCK: u16 = 0;
const ARRIVED: u16 = 1;
const LEAVE: [u16; 2] = [2, 3];
/// How many there are.
pub const SEMAPHORES: i32 = 4;

type Program = Box<dyn Iterator<Item = Step>>;

impl Workload {
    /// All of them.
    #[must_use]
    pub fn all() -> &'static [Workload] {
        Self::value_variants()
    }

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> String {
        self.to_possible_value()
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// What [`Step::Count`] counts.
    #[must_use]
    pub fn unit(self) -> &'static str {
        match self {
            Self::Private | Self::Spread => "first touch",
            Self::Consumers => "page read",
            Self::Migratory => "hand-over",
            Self::Storm => "round of n",
            Self::Barrier => "barrier of n",
            Self::Stencil | Self::StencilSpread => "node's iteration",
            Self::FalseSharing => "write",
        }
    }

    /// Whether all nodes together do one operation after the other.
    #[must_use]
    pub fn is_serial(self) -> bool {
        matches!(self, Self::Migratory | Self::Storm | Self::Barrier)
    }

    /// Whether the homes of extents are given out at the first touch, rather than be with the
    /// segment's first user.
    #[must_use]
    pub fn has_spread_homes(self) -> bool {
        matches!(self, Self::Spread | Self::StencilSpread)
    }

    /// Pages of the segment.
    #[must_use]
    pub fn pages(self, nodes: usize) -> u32 {
        let nodes = nodes as u32;
        match self {
            Self::Private | Self::Spread => PRIVATE_PAGES * nodes,
            Self::Consumers => CONSUMED_PAGES,
            Self::Migratory | Self::Storm | Self::Barrier => 1,
            Self::Stencil | Self::StencilSpread => STENCIL_PAGES * nodes,
            Self::FalseSharing => nodes.div_ceil(GROUP as u32),
        }
    }

    /// What the process of a node does.
    #[must_use]
    pub fn program(self, node: usize, nodes: usize) -> Program {
        match self {
            Self::Private | Self::Spread => private(node as u32),
            Self::Consumers => consumers(node, nodes),
            Self::Migratory => {
                let turn = [
                    operate(LOCK, -1),
                    read(0),
                    write(0),
                    operate(LOCK, 1),
                    Step::Count,
                ];
                rounds(16, move |_| turn.clone())
            }
            Self::Storm => rounds(4, move |round| {
                let writer = (round * 7 + 1) % nodes == node;
                let before = std::iter::once(read(0)).chain(barrier(2 * round, node, nodes));
                let after = barrier(2 * round + 1, node, nodes);
                let writes = [write(0), Step::Count].into_iter().filter(move |_| writer);
                before.chain(writes).chain(after)
            }),
            Self::Barrier => rounds(8, move |round| {
                let count = (node == 0).then_some(Step::Count);
                barrier(round, node, nodes).chain(count)
            }),
            Self::Stencil | Self::StencilSpread => {
                rounds(12, move |round| stencil(round, node, nodes))
            }
            Self::FalseSharing => {
                let page = (node / GROUP) as u32;
                rounds(32, move |_| {
                    [write(page), Step::Count, Step::Compute(THINKING)]
                })
            }
        }
    }
}

/// What makes the lock free.
#[must_use]
pub fn unlock() -> SemBuf {
    semaphore(LOCK, 1)
}

fn rounds<I>(count: usize, round: impl Fn(usize) -> I + 'static) -> Program
where
    I: IntoIterator<Item = Step> + 'static,
    I::IntoIter: 'static,
{
    Box::new((0..count).flat_map(round))
}

fn private(node: u32) -> Program {
    let pages = node * PRIVATE_PAGES..(node + 1) * PRIVATE_PAGES;
    let first = pages.clone().flat_map(|page| [write(page), Step::Count]);
    Box::new(first.chain(pages.map(write)))
}

fn consumers(node: usize, nodes: usize) -> Program {
    rounds(2, move |round| {
        let touches = (0..CONSUMED_PAGES).flat_map(move |page| match node {
            0 => vec![write(page)],
            _ => vec![read(page), Step::Count],
        });
        let (first, second) = match node {
            0 => (Some(touches), None),
            _ => (None, Some(touches)),
        };
        let first = first.into_iter().flatten();
        let second = second.into_iter().flatten();
        first
            .chain(barrier(2 * round, node, nodes))
            .chain(second)
            .chain(barrier(2 * round + 1, node, nodes))
    })
}

fn stencil(round: usize, node: usize, nodes: usize) -> impl Iterator<Item = Step> {
    let own = node as u32 * STENCIL_PAGES..(node as u32 + 1) * STENCIL_PAGES;
    let left = node
        .checked_sub(1)
        .map(|left| left as u32 * STENCIL_PAGES + STENCIL_PAGES - 1);
    let right = (node + 1 < nodes).then_some((node as u32 + 1) * STENCIL_PAGES);
    own.map(write)
        .chain(barrier(2 * round, node, nodes))
        .chain(left.into_iter().chain(right).map(read))
        .chain(barrier(2 * round + 1, node, nodes))
        .chain([Step::Count])
}

/// The first node waits for all others and then lets them go.
fn barrier(number: usize, node: usize, nodes: usize) -> impl Iterator<Item = Step> {
    let others = (nodes - 1) as i16;
    let leave = LEAVE[number % 2];
    let steps = match node {
        0 => [operate(ARRIVED, -others), operate(leave, others)],
        _ => [operate(ARRIVED, 1), operate(leave, -1)],
    };
    steps.into_iter()
}

fn read(page: u32) -> Step {
    Step::Touch(page, Access::Read)
}

fn write(page: u32) -> Step {
    Step::Touch(page, Access::Write)
}

fn operate(num: u16, op: i16) -> Step {
    Step::Operate(semaphore(num, op))
}

fn semaphore(num: u16, op: i16) -> SemBuf {
    SemBuf { num, op, flags: 0 }
}
