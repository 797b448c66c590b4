//! Whether the history of a register is linearizable: whether each operation can be given one moment
//! between its beginning and its end, such that in the order of these moments every read returns
//! what was written last.
//!
//! The search is that of Wing and Gong, breadth first over the ends of operations, and lazily as
//! Lowe's ("Testing for linearizability", 2017): an operation is given its moment no sooner than one
//! that ends needs it. A configuration is the value together with the set of open operations that
//! have had their moment; the set of all configurations that the past permits is kept. It is empty
//! as soon as there is no explanation, and the end at which that happens is the counterexample.
//!
//! Linearizability is local (Herlihy and Wing, 1990): registers are judged one by one.

use std::collections::HashSet;

use super::history::{Kind, Operation};

/// What a register contains before anybody writes to it.
const INITIAL: i64 = 0;
/// Operations that may be open at once: bits of a configuration.
const OPEN: usize = 64;

/// An end of an operation for which there is no explanation.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation {
    /// The operation.
    pub operation: Operation,
    /// What the register may have contained when all before it had ended.
    pub values: Vec<i64>,
}

/// A state that explains all ends so far: the value, and which open operations made it.
type Configuration = (i64, u64);

/// Judges the operations on one register, in any order. Every value is written by one operation at
/// most, and not the initial one.
///
/// # Errors
/// The first end that cannot be explained.
///
/// # Panics
/// If more than 64 operations are open at once.
pub fn check(operations: &[Operation]) -> Result<(), Box<Violation>> {
    let operations = with_ends(operations);
    let mut events: Vec<(u64, bool, usize)> = Vec::with_capacity(2 * operations.len());
    for (index, (operation, end)) in operations.iter().enumerate() {
        // At the same moment beginnings come first: such operations overlap.
        events.push((operation.invoked, false, index));
        events.push((*end, true, index));
    }
    events.sort_unstable();
    let mut open: [Option<Operation>; OPEN] = [None; OPEN];
    let mut slots = vec![usize::MAX; operations.len()];
    let mut configurations: HashSet<Configuration> = [(INITIAL, 0)].into();
    for (_, ends, index) in events {
        let operation = operations[index].0;
        if !ends {
            let slot = open.iter().position(Option::is_none);
            slots[index] = slot.expect("few clients");
            open[slots[index]] = Some(operation);
            continue;
        }
        let slot = slots[index];
        let explained = explain(&configurations, &open, slot);
        if explained.is_empty() {
            let mut values: Vec<i64> = configurations.iter().map(|(value, _)| *value).collect();
            values.sort_unstable();
            values.dedup();
            return Err(Box::new(Violation { operation, values }));
        }
        configurations = explained;
        open[slot] = None;
    }
    Ok(())
}

/// The operations that matter, with their ends. Of those that have none, one whose value somebody has seen had taken
/// effect when that one ended; whether others did makes no difference to anybody.
fn with_ends(operations: &[Operation]) -> Vec<(Operation, u64)> {
    let mut seen = std::collections::HashMap::new();
    for operation in operations {
        if let (Kind::Read | Kind::Swap, Some(end)) = (operation.kind, operation.returned) {
            let first: &mut u64 = seen.entry(operation.result).or_insert(end);
            *first = end.min(*first);
        }
    }
    let end = |operation: &Operation| match operation.kind {
        Kind::Write | Kind::Swap if operation.returned.is_none() => {
            let end = seen.get(&operation.argument)?;
            Some(operation.invoked.max(*end))
        }
        _ => operation.returned,
    };
    let ended = operations.iter();
    ended.filter_map(|o| Some((*o, end(o)?))).collect()
}

/// The configurations in which the operation in `slot`, which ends, has had its moment, last of those
/// that need one for it. It is open no longer in them.
fn explain(
    configurations: &HashSet<Configuration>,
    open: &[Option<Operation>; OPEN],
    slot: usize,
) -> HashSet<Configuration> {
    let own = 1 << slot;
    let mut explained = HashSet::new();
    let mut reached = configurations.clone();
    let mut frontier: Vec<Configuration> = reached.iter().copied().collect();
    while let Some((value, done)) = frontier.pop() {
        if done & own != 0 {
            explained.insert((value, done & !own));
            continue;
        }
        for (bit, operation) in open.iter().enumerate() {
            let Some(operation) = operation else { continue };
            if done & 1 << bit != 0 {
                continue;
            }
            if let Some(value) = apply(value, operation) {
                let next = (value, done | 1 << bit);
                if reached.insert(next) {
                    frontier.push(next);
                }
            }
        }
    }
    explained
}

/// The value after an operation; `None` if it cannot be what took place.
fn apply(value: i64, operation: &Operation) -> Option<i64> {
    let Operation {
        argument,
        expected,
        result,
        ..
    } = *operation;
    let is_open = operation.returned.is_none();
    match operation.kind {
        Kind::Write => Some(argument),
        Kind::Swap if is_open => (value == expected).then_some(argument),
        _ if value != result => None,
        Kind::Swap if value == expected => Some(argument),
        _ => Some(value),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(kind: Kind, invoked: u64, returned: u64) -> Operation {
        Operation {
            client: 0,
            invoked,
            returned: (returned != 0).then_some(returned),
            kind,
            object: 0,
            argument: 0,
            expected: 0,
            result: 0,
        }
    }

    fn read(result: i64, invoked: u64, returned: u64) -> Operation {
        let operation = operation(Kind::Read, invoked, returned);
        Operation {
            result,
            ..operation
        }
    }

    /// One that does not return if `returned` is 0.
    fn write(argument: i64, invoked: u64, returned: u64) -> Operation {
        let operation = operation(Kind::Write, invoked, returned);
        Operation {
            argument,
            ..operation
        }
    }

    fn swap((expected, argument): (i64, i64), result: i64, from: u64, to: u64) -> Operation {
        Operation {
            argument,
            expected,
            result,
            ..operation(Kind::Swap, from, to)
        }
    }

    #[test]
    fn what_overlaps_may_take_place_in_any_order() {
        for seen in [0, 1, 2] {
            let history = [write(1, 10, 50), write(2, 10, 50), read(seen, 20, 40)];
            assert_eq!(check(&history), Ok(()));
        }
        let history = [
            write(1, 10, 50),
            write(2, 10, 50),
            read(2, 12, 14),
            read(1, 15, 17),
        ];
        assert_eq!(check(&history), Ok(()));
    }

    #[test]
    fn a_stale_read_has_no_explanation() {
        let stale = read(1, 30, 40);
        let violation = check(&[write(1, 1, 5), write(2, 10, 20), stale]).unwrap_err();
        assert_eq!(violation.operation, stale);
        assert_eq!(violation.values, [2]);
    }

    #[test]
    fn zeros_after_a_write_have_no_explanation() {
        assert!(check(&[write(1, 1, 5), read(0, 6, 7)]).is_err());
    }

    #[test]
    fn readers_agree_on_the_order_of_writes() {
        let writes = [write(1, 10, 100), write(2, 10, 100)];
        let reads = [
            read(1, 20, 25),
            read(2, 30, 35),
            read(2, 22, 26),
            read(1, 40, 45),
        ];
        assert_eq!(check(&[&writes[..], &reads[..2]].concat()), Ok(()));
        assert!(check(&[&writes[..], &reads[..]].concat()).is_err());
    }

    #[test]
    fn a_value_does_not_come_back() {
        let history = [write(1, 1, 50), read(1, 10, 15), read(0, 20, 25)];
        assert!(check(&history).is_err());
    }

    #[test]
    fn a_write_that_never_returned_takes_effect_late_or_never_but_once() {
        let lost = write(9, 10, 0);
        assert_eq!(check(&[lost, read(0, 20, 30)]), Ok(()));
        assert_eq!(check(&[lost, read(0, 20, 30), read(9, 40, 50)]), Ok(()));
        assert!(check(&[lost, read(9, 20, 30), read(0, 40, 50)]).is_err());
        let history = [
            lost,
            read(9, 20, 30),
            write(1, 40, 50),
            read(1, 60, 70),
            read(9, 80, 90),
        ];
        assert!(check(&history).is_err());
    }

    #[test]
    fn one_of_two_swaps_fails() {
        let won = swap((0, 1), 0, 10, 20);
        let lost = swap((0, 2), 1, 10, 20);
        assert_eq!(check(&[won, lost, read(1, 30, 40)]), Ok(()));
        assert!(check(&[won, swap((0, 2), 0, 10, 20)]).is_err());
        let unknown = swap((0, 2), 0, 10, 0);
        assert_eq!(check(&[unknown, read(0, 15, 18), read(2, 30, 40)]), Ok(()));
        assert!(check(&[unknown, won, read(2, 30, 40)]).is_err());
    }

    /// Every short history, against the definition: some order of the operations that respects
    /// which ended before which began explains all.
    #[test]
    fn the_search_agrees_with_the_definition() {
        let mut state = 1u64;
        let mut below = |bound: u64| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % bound
        };
        let mut verdicts = [0; 2];
        for _ in 0..20_000 {
            let history: Vec<Operation> = (1..=5)
                .map(|value| {
                    let from = 1 + below(12);
                    let to = from + 1 + below(8);
                    let seen = below(4).cast_signed();
                    match below(5) {
                        0 | 1 => read(seen, from, to),
                        2 | 3 => write(value, from, if below(4) == 0 { 0 } else { to }),
                        _ => swap((below(4).cast_signed(), value), seen, from, to),
                    }
                })
                .collect();
            let expected = is_linearizable(INITIAL, &history);
            verdicts[usize::from(expected)] += 1;
            assert_eq!(check(&history).is_ok(), expected, "{history:?}");
        }
        assert!(verdicts.iter().all(|&count| count > 1_000), "{verdicts:?}");
    }

    fn is_linearizable(value: i64, left: &[Operation]) -> bool {
        let mut choices = (0..left.len()).filter(|&next| {
            let others = left.iter();
            others.clone().all(|other| !other.precedes(&left[next]))
        });
        left.iter().all(|operation| operation.returned.is_none())
            || choices.any(|next| {
                let mut rest = left.to_vec();
                let operation = rest.remove(next);
                apply(value, &operation).is_some_and(|value| is_linearizable(value, &rest))
            })
    }
}
