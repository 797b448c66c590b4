//! Runs: actions that do the same to one page after the other, to be executed as one.
//!
//! A system call or a frame costs about the same for one page as for many. The engine knows single
//! pages only; what it wants done for several events is brought into an order in which actions that
//! continue each other stand together.

use migshm_protocol::Page;
use migshm_protocol::page::{PageMessage, Subject};

use crate::engine::{Action, Body};

/// Brings actions that continue each other together.
///
/// An action moves forward only past actions about other pages, and a message only past what is no
/// message about a whole extent. So for each page everything happens in the order that the engine
/// gave, and what the engine relies on across pages (a fence) stays where it is.
pub fn gather<D>(actions: &mut [Action<D>]) {
    // What a single fault has done is in order.
    if actions.len() < 4 {
        return;
    }
    let mut runs: Vec<Run> = Vec::new();
    // Of each action, its run.
    let mut keys: Vec<usize> = Vec::with_capacity(actions.len());
    let mut moved = false;
    for at in 0..actions.len() {
        let joined = joinable(actions, &runs, at);
        moved |= joined.is_some_and(|run| run + 1 < runs.len());
        match joined {
            Some(run) => runs[run].last = at,
            None => runs.push(Run::of(&actions[at], at)),
        }
        keys.push(joined.unwrap_or(runs.len() - 1));
    }
    if moved {
        let mut order: Vec<usize> = (0..actions.len()).collect();
        order.sort_by_key(|&at| keys[at]);
        permute(actions, order);
    }
}

/// How many of the first actions are one run; 0 only if there are none.
#[must_use]
pub fn first_run<D>(actions: &[Action<D>]) -> usize {
    let mut pairs = actions.windows(2);
    let continued = pairs.position(|pair| !continues(&pair[0], &pair[1]));
    continued.map_or(actions.len(), |last| last + 1)
}

/// How many runs back an action may join one.
const REACH: usize = 8;

struct Run {
    first: Option<Page>,
    /// Place of its last action.
    last: usize,
}

impl Run {
    fn of<D>(action: &Action<D>, at: usize) -> Self {
        Self {
            first: page(action),
            last: at,
        }
    }

    /// Whether it is about a page, or about no single page.
    fn concerns<D>(&self, actions: &[Action<D>], other: Page) -> bool {
        let (Some(first), Some(last)) = (self.first, page(&actions[self.last])) else {
            return true;
        };
        first.segment == other.segment && (first.index..=last.index).contains(&other.index)
    }
}

/// The run that the action at a place may join.
fn joinable<D>(actions: &[Action<D>], runs: &[Run], at: usize) -> Option<usize> {
    let page = page(&actions[at])?;
    for (run, behind) in runs.iter().enumerate().rev().take(REACH) {
        if continues(&actions[behind.last], &actions[at]) {
            return Some(run);
        }
        if behind.concerns(actions, page) {
            return None;
        }
    }
    None
}

/// Whether an action does to a page what another does to the page before it.
fn continues<D>(before: &Action<D>, after: &Action<D>) -> bool {
    let (Some(first), Some(second)) = (page(before), page(after)) else {
        return false;
    };
    if first.segment != second.segment || first.index.checked_add(1) != Some(second.index) {
        return false;
    }
    match (before, after) {
        (
            Action::Send {
                to: a,
                message: m,
                body: b,
            },
            Action::Send {
                to: c,
                message: n,
                body: d,
            },
        ) => a == c && same_kind(m, n) && same_body(b, d) && m.about(second) == *n,
        (
            Action::Install {
                access: a,
                contents: b,
                ..
            },
            Action::Install {
                access: c,
                contents: d,
                ..
            },
        ) => a == c && std::mem::discriminant(b) == std::mem::discriminant(d),
        (Action::Protect { .. }, Action::Protect { .. })
        | (Action::Drop { .. }, Action::Drop { .. }) => true,
        _ => false,
    }
}

fn same_kind(a: &PageMessage, b: &PageMessage) -> bool {
    std::mem::discriminant(a) == std::mem::discriminant(b)
}

/// Whether two bodies can follow a message together: relayed contents lie wherever they came from.
fn same_body<D>(a: &Body<D>, b: &Body<D>) -> bool {
    matches!(
        (a, b),
        (Body::None, Body::None) | (Body::Page(_), Body::Page(_))
    )
}

fn page<D>(action: &Action<D>) -> Option<Page> {
    match action {
        Action::Send { message, .. } => match message.subject() {
            Subject::Page(page) => Some(page),
            Subject::Extent(_) => None,
        },
        Action::Install { page, .. }
        | Action::Protect { page }
        | Action::Drop { page }
        | Action::Fail { page } => Some(*page),
        Action::FindHome { .. }
        | Action::BecameHome { .. }
        | Action::Flush { .. }
        | Action::Flushed { .. }
        | Action::Lost { .. } => None,
    }
}

/// Puts what is at `order[n]` at `n`.
fn permute<T>(items: &mut [T], mut order: Vec<usize>) {
    for start in 0..items.len() {
        let mut at = start;
        while order[at] != start {
            let from = order[at];
            items.swap(at, from);
            order[at] = at;
            at = from;
        }
        order[at] = at;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Fill;
    use migshm_protocol::page::{Access, Contents};
    use migshm_protocol::{Extent, NodeId, SegmentId};

    const SEGMENT: SegmentId = SegmentId(1);

    fn at(index: u32) -> Page {
        Page {
            segment: SEGMENT,
            index,
        }
    }

    fn grant(to: u16, index: u32) -> Action<u8> {
        Action::Send {
            to: NodeId(to),
            message: PageMessage::Grant {
                page: at(index),
                access: Access::Read,
                acks: 0,
                contents: Contents::Bytes,
                home: NodeId(0),
                confirm: false,
                pushed: false,
            },
            body: Body::Page(at(index)),
        }
    }

    fn runs(actions: &[Action<u8>]) -> Vec<usize> {
        let mut rest = actions;
        let mut lengths = Vec::new();
        while !rest.is_empty() {
            let length = first_run(rest);
            lengths.push(length);
            rest = &rest[length..];
        }
        lengths
    }

    #[test]
    fn what_is_given_away_page_by_page_leaves_as_one_run() {
        let give = |index| {
            [
                Action::Protect { page: at(index) },
                grant(1, index),
                Action::Drop { page: at(index) },
            ]
        };
        let mut actions: Vec<_> = (3..7).flat_map(give).collect();
        gather(&mut actions);
        assert_eq!(runs(&actions), [4, 4, 4]);
        assert!(matches!(actions[0], Action::Protect { page } if page == at(3)));
    }

    #[test]
    fn nothing_passes_what_concerns_its_page_or_a_whole_extent() {
        let extent = Extent {
            segment: SEGMENT,
            index: 0,
        };
        let fence = Action::Send {
            to: NodeId(1),
            message: PageMessage::Fence { extent },
            body: Body::None,
        };
        let actions = vec![
            Action::Drop { page: at(1) },
            grant(1, 2),
            Action::Drop { page: at(2) },
            grant(1, 8),
            fence,
            grant(1, 9),
        ];
        let mut gathered = actions.clone();
        gather(&mut gathered);
        assert_eq!(gathered, actions);
    }

    #[test]
    fn each_page_sees_its_actions_in_their_order_whatever_they_are() {
        let mut random = 1_u64;
        let mut below = |bound: u64| {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (random >> 33) % bound
        };
        for _ in 0..2_000 {
            let mut any = |_| {
                let page = at(below(6) as u32);
                match below(4) {
                    0 => Action::Protect { page },
                    1 => Action::Drop { page },
                    2 => grant(below(2) as u16, page.index),
                    _ => Action::Install {
                        page,
                        access: Access::Read,
                        contents: Fill::Zeros,
                    },
                }
            };
            let actions: Vec<Action<u8>> = (0..20).map(&mut any).collect();
            let mut gathered = actions.clone();
            gather(&mut gathered);
            for index in 0..6 {
                let about = |actions: &[Action<u8>]| -> Vec<Action<u8>> {
                    let mut actions = actions.to_vec();
                    actions.retain(|action| page(action) == Some(at(index)));
                    actions
                };
                assert_eq!(about(&gathered), about(&actions));
            }
        }
    }
}
