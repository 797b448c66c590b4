//! The coherence protocol of `sequential` segments, as a pure state machine.
//!
//! Each node has one [`Engine`]. Events go in ([`Input`]: a local page fault, a message of
//! another node, the end of a timer), what is to be done comes out ([`Action`]: send, install,
//! protect, drop). There is no I/O, no clock and no thread in here, so a test can put a whole
//! cluster into one value and try every order of events.
//!
//! # The promise
//!
//! Sequential consistency: at any moment a page has one writer or many readers, and whatever
//! can be read is what was written last. Nothing is lost by an eviction. Every fault is served,
//! as long as messages arrive.
//!
//! The transport has to keep its promise too: messages between two nodes arrive in the order
//! they were sent, none twice, none never. Messages of different pairs of nodes may overtake
//! each other at will.
//!
//! # Roles
//!
//! The *home* of an extent (2 MiB) keeps its *directory*: who has which page. All transactions
//! of a page go through the home, one at a time. A page that somebody has touched has one
//! *owner*, the node that answers for its contents: it sends them to whoever needs them, and
//! has to write them back before it may drop the page. Other *sharers* have readable copies and
//! drop them as they like. Any node is all of these at once, for different pages.
//!
//! # States of a page
//!
//! At a node (a MOSI protocol; "protect" and "drop" act on all processes of the node):
//!
//! | state | processes may | local fault | `Forward` read | `Forward` write | `Invalidate` | evict |
//! |---|---|---|---|---|---|---|
//! | Invalid | nothing | `Request` | - | - | ack | - |
//! | Shared | read | write: `Request`, copy kept | - | - | drop, ack | drop → Invalid |
//! | Owned | read | write: `Request`, copy kept | send | send, drop → Invalid | drop, ack | `WriteBack` → Evicting |
//! | Exclusive | write | - | protect, send → Owned | protect, send, drop → Invalid | - | protect, `WriteBack` → Evicting |
//! | Evicting | read | waits for `WriteBackAck` | send | send, drop → Evicted | drop, ack → Evicted | - |
//! | Evicted | nothing | waits for `WriteBackAck` | - | - | ack | - |
//!
//! A Shared copy that its owner will want gone is dropped with a `Relinquish` and leaves Evicted.
//! "-" is what cannot happen; a message for which it stands is counted as a protocol error and
//! has no effect. `Grant` leads to Exclusive or Shared; `WriteBackAck` leads from Evicting or
//! Evicted to Invalid.
//!
//! At the home: *untouched*, or an owner and sharers (no sharers: the owner has it exclusively;
//! otherwise the owner is one of them). The directory may list a sharer that has dropped its
//! copy, never fail to list one that has a copy. The entry says how things will be when the
//! transaction under way has ended; as long as there is one the page is *busy* and whatever
//! comes for it queues.
//!
//! # Transactions
//!
//! R requests, H is the home, O the owner, S and T are sharers.
//!
//! A first touch, read or write: R gets the page for writing.
//!
//! ```text
//! R ──Request──────────▶ H    untouched → owner R
//! R ◀─Grant write,zeros─ H
//! ```
//!
//! A read. The grant comes straight from the owner:
//!
//! ```text
//! R ──Request read─────▶ H    busy
//!                        H ──Forward read──▶ O    protect: Exclusive → Owned
//! R ◀─────────────Grant read, bytes───────── O
//! R ──Done─────────────▶ H    owner O, sharers O R
//! ```
//!
//! A write to a page that O owns and S and T have copies of. R waits for the grant and for as
//! many acknowledgements as the grant says; they may come first:
//!
//! ```text
//! R ──Request write────▶ H    busy
//!                        H ──Invalidate──────────────▶ S, T   drop
//!                        H ──Forward write, 2 acks──▶ O       drop
//! R ◀───────Grant write, 2 acks, bytes────── O
//! R ◀───────InvalidateAck─────────────────── S, T
//! R ──Done─────────────▶ H    owner R
//! ```
//!
//! If R has a copy and is still in the directory, no bytes travel: O is invalidated as S and T
//! are, and the grant (`Yours`) comes from H. If an `Invalidate` for another writer got in
//! between, R is no longer in the directory and the bytes travel. Where H is the owner it sends
//! the grant itself; if then nobody else takes part, there is no `Done`, as anything that H
//! sends R later arrives after the grant.
//!
//! A push. O gives a page away that nobody has asked for, as T will want it next (a lock that travels
//! takes what it guards along). Only where nothing else is to be done for it: the page is not busy, O has
//! the only copy (for writing) or is the owner (for reading), T has none; else nothing happens:
//!
//! ```text
//! O ──Push─────────────▶ H    busy
//!                        H ──Forward write──▶ O    drop
//! T ◀────────────Grant write, bytes───────── O
//! T ──Done─────────────▶ H    owner T
//! ```
//!
//! T may have evicted the page before, and the write-back, or the answer to it, may still be under way. So
//! a home always waits for `Done`, answers a write-back of T's that comes meanwhile with `accepted:
//! false`, and T takes the page after that answer. A request that T has sent meanwhile is answered as one of a
//! node that has the page.
//!
//! A write-back. O may read its copy until the answer is there, so it remains in the directory
//! as a sharer:
//!
//! ```text
//! O ──WriteBack, bytes─▶ H    if O is the owner: install, owner H, sharers H O ...
//! O ◀─WriteBackAck────── H    O drops the page
//! ```
//!
//! If a transaction took the page from O before the write-back had its turn, O has served it
//! from the copy it still had, and the answer is `accepted: false`. O requests the page again
//! only after the answer, so a write-back can never be taken for a later one.
//!
//! A sharer that is about to be invalidated gives its copy up before the owner asks. If the home is the owner and
//! nobody else has a copy then, it may write at once; another owner has one hop less to wait for. As after a write-back,
//! S asks for the page again only after the answer, so a `Relinquish` can never be taken for a later one:
//!
//! ```text
//! S ──Relinquish───────▶ H    sharers without S; alone, H: Owned → Exclusive
//! S ◀─WriteBackAck────── H
//! ```
//!
//! A move of the home from H to N. The fence makes sure that every grant of H's has arrived,
//! lest one be overtaken by what N says about the page:
//!
//! ```text
//!                        H    starts nothing new, waits until no page is busy
//!                        H ──Fence────────▶ every owner and sharer
//!                        H ◀─FenceAck────── each of them
//!                        H ──HomeTransfer─▶ N    tells the coordinator
//! R ──Request──────────▶ H ──Request (R)──▶ N    queued ones and later ones alike
//! R ◀─────Grant, home N──────────────────── N
//! ```
//!
//! H keeps its pages as any owner does. What a node believes about a home is never forgotten and
//! only ever replaced by a later home, so relaying comes to an end. A write-back that comes
//! back to its own sender, because the home has followed it there, just ends the eviction; the
//! home does not move on before.
//!
//! A prefetch is a request that nobody waits for yet. Whoever would have to put it off declines:
//!
//! ```text
//! R ──Request, prefetch─▶ H    busy, moving, own copy held, or a third node's copy in the way:
//! R ◀─Decline──────────── H
//!                         H ──Forward, prefetch─▶ O    held:
//!                         H ◀─Decline──────────── O
//! R ◀─Decline──────────── H    the directory says again what it said before
//! ```
//!
//! There is one answer to each request, a grant or a decline, so a thread that has begun to wait
//! meanwhile knows when to ask in earnest.
//!
//! # Deaths
//!
//! When a node dies the others finish no transaction; they agree on what they have been sent, and homes,
//! old and new, ask all survivors what they hold. (`engine/recovery.rs` has the protocol, and why that is
//! enough.) A page that nobody holds is lost, and never zeros: whoever asks for it is told so. A node that
//! was taken for dead wrongly has its messages refused from then on, and must keep its processes from its
//! pages before the others go on; that is the daemon's part.
//!
//! # Holds
//!
//! A page that was granted stays for a minimum time before it is given away, and longer, up to a
//! bound, if no local thread has used it by then: so each grant makes some thread progress.
//! `Forward`, `Invalidate` and what the home would do with its own copy are put off until then
//! ([`Engine::next_timeout`]). A hold ends by time alone, so it cannot add a deadlock; pages being
//! written back are not held.
//!
//! # Costs
//!
//! A message costs O(1) and two table look-ups; a write to a page with many sharers, a message
//! to each. A page takes 8 bytes at a node and 4 more at its home, in arrays that are made when an
//! extent is first used, and each group of more than two sharers that pages of an extent have, up
//! to 168 bytes at its home ([`Engine::footprint`]). Only pages that are waited for, busy or held
//! against somebody's wish are in maps.
//!
//! # Caveats
//!
//! - A node must know a segment ([`Engine::add_segment`]) before it is sent messages about it,
//!   also where it is only a home. Messages about unknown segments have no effect.
//! - A page whose home died and that no survivor holds is lost, also if nobody had touched it: only the
//!   home knew. So is a page that was on its way from the node that died.
//! - Peers are authenticated members of the cluster. A message that no correct peer sends has no
//!   effect and is counted, but a peer that lies plausibly (an acknowledgement for a copy that it
//!   keeps) is believed.
//!
//! # Evidence
//!
//! `cargo test --release -p migshm-coherence -- --nocapture` runs random clusters of up to 8
//! nodes, shows that each invariant finds the protocols broken on purpose that it is there to
//! find, and searches small clusters exhaustively (in half a minute):
//!
//! | nodes | pages | reads | writes | evictions | home moves | states |
//! |---|---|---|---|---|---|---|
//! | 2 | 1 | any number | any | any | any | 11 229 (with holds 18 105) |
//! | 3 | 1 | any number | any | any | 0 | 37 423 (with holds 62 827) |
//! | 3 | 1 | any number | any | any | 1 | 902 147 |
//! | 3 | 1 | 1 | 2 | 2 | 2 | 604 328 |
//! | 2 | 1 | any number | any | any | any, and 3 pushes | 368 715 (with holds 541 437) |
//! | 3 | 1 | 2 | 2 | 2 | 0, and 1 push | 382 869 |
//! | 3 | 1 | 1 | 2 | 1 | 1, and 1 push | 548 758 |
//! | 3 | 2 | 2 | 2 | 1 | 0 | 242 661 |
//! | 3 | 2 | 2 | 1 | 1 | 1 | 375 167 |
//! | 3 | 2 | 2 | 2 | 1 | 1 | 5 471 509, with `--ignored` |
//!
//!
//! and with deaths of nodes, at any moment:
//!
//! | nodes | pages | reads | writes | evictions | home moves | deaths | states |
//! |---|---|---|---|---|---|---|---|
//! | 3 | 1 | 1 | 2 | 1 | 0 | 1 | 115 062 |
//! | the same, the dead one going on to answer | | | | | | | 494 045 |
//! | the same, the home assigned at the first touch | | | | | | | 197 321 |
//! | 3 | 1 | 1 | 1 | 0 | 1 | 1 | 51 964 |
//! | 3 | 1 | 1 | 1 | 0 | 0 | 2 | 13 509 |
//!
//! Reads and writes are faults here; what a thread does with a page that it has is never
//! limited. Three nodes with any number of moves are beyond an exhaustive search; the random
//! runs cover them.
#![forbid(unsafe_code)]

mod access_log;
mod carry;
mod engine;
pub mod links;
mod policy;
mod prefetch;
pub mod release;
pub mod replay;
mod runs;
mod sets;

pub use access_log::AccessLog;
pub use carry::{Carry, Lock, Push};
pub use engine::{Action, Body, Config, Counters, Engine, Fill, Footprint, Input, Memory, Time};
pub use policy::{HomePolicy, Policy};
pub use prefetch::{Ask, Prefetcher, Touch};
pub use runs::{first_run, gather};
pub use sets::PageSet;
