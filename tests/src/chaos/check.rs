//! What must hold of a history, whatever was done to its clients.
//!
//! | | |
//! |---|---|
//! | registers | each linearizable |
//! | counters | additions come one after the other: each finds what those before it added, in an order that respects time |
//! | bank | every audit finds the sum of all deposits |
//! | ring, messages | nothing is taken twice, or without having been put, or sooner than what was put before it; nothing is lost, except to a client that died while it took something; nobody finds a queue empty in which something waits |
//!
//! An operation that failed has had no effect. One that never returned, as its client died, has
//! taken effect or has not.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;

use super::history::{Kind, Operation};
use super::linearizable;

/// Operations shown around one that is wrong.
const SHOWN: usize = 12;

/// Judges a history whose last client has looked at all that was left; returns what is wrong, each with the operations
/// that show it.
#[must_use]
pub fn check(history: &[Operation]) -> Vec<String> {
    let of = |kinds: &[Kind]| -> Vec<Operation> {
        let all = history.iter();
        all.filter(|o| kinds.contains(&o.kind)).copied().collect()
    };
    let mut wrong = Vec::new();
    for (register, operations) in by_object(&of(&[Kind::Read, Kind::Write, Kind::Swap])) {
        if let Err(violation) = linearizable::check(&operations) {
            let at = violation.operation;
            let mut text = format!("register {register} is not linearizable: it contained ");
            let values = violation.values.iter().map(|value| format!("{value:#x}"));
            text += &values.collect::<Vec<_>>().join(" or ");
            wrong.push(text + " when this ended\n" + &around(&operations, &at));
        }
    }
    for (counter, operations) in by_object(&of(&[Kind::Add])) {
        let found = count(operations).err();
        wrong.extend(found.map(|text| format!("counter {counter}: {text}")));
    }
    for audit in of(&[Kind::Audit]) {
        if audit.returned.is_some() && audit.result != audit.argument {
            let sum = audit.result;
            wrong.push(format!("the bank's sum became {sum}\n{audit}"));
        }
    }
    // A pop notes what it is about to take.
    let ring =
        |pop: &Operation, push: &Operation| pop.returned.is_some() || pop.argument == push.argument;
    let messages = |receive: &Operation, send: &Operation| match receive.argument {
        0 => true,
        wanted @ 1.. => i64::from(send.object) == wanted,
        highest => i64::from(send.object) <= -highest,
    };
    for (name, put, take, may_take) in [
        ("ring", Kind::Push, Kind::Pop, &ring as MayTake),
        ("messages", Kind::Send, Kind::Receive, &messages),
    ] {
        let found = queue(&of(&[put]), &of(&[take]), may_take);
        wrong.extend(found.into_iter().map(|text| format!("{name}: {text}")));
    }
    wrong
}

fn by_object(operations: &[Operation]) -> BTreeMap<u32, Vec<Operation>> {
    let mut objects = BTreeMap::<_, Vec<_>>::new();
    for operation in operations {
        let object = objects.entry(operation.object).or_default();
        object.push(*operation);
    }
    objects
}

/// The operations on an object that overlap one, and some that were before it.
fn around(operations: &[Operation], at: &Operation) -> String {
    let mut before: Vec<&Operation> = operations.iter().collect();
    let end = at.returned.unwrap_or(u64::MAX);
    before.retain(|other| other.invoked <= end && *other != at);
    before.sort_unstable_by_key(|other| other.returned.unwrap_or(u64::MAX));
    let first_concurrent = before.partition_point(|other| other.precedes(at));
    let mut text = String::new();
    for operation in &before[first_concurrent.saturating_sub(SHOWN)..] {
        let _ = writeln!(text, "  {operation}");
    }
    text + &format!("> {at}")
}

/// Additions of 1, and of 0 to look.
fn count(mut additions: Vec<Operation>) -> Result<(), String> {
    let unknown = additions.iter().filter(|o| o.returned.is_none()).count();
    additions.retain(|addition| addition.returned.is_some());
    // One that adds nothing comes before that which finds the same.
    additions
        .sort_unstable_by_key(|addition| (addition.result, addition.argument, addition.invoked));
    let (mut expected, mut skipped) = (0, 0);
    let mut latest: Option<Operation> = None;
    for addition in additions {
        if addition.result < expected {
            let other = latest.map_or(String::new(), |other| format!("\n{other}"));
            return Err(format!("an addition is lost\n{addition}{other}"));
        }
        skipped += addition.result - expected;
        expected = addition.result + addition.argument;
        match latest {
            Some(latest) if addition.precedes(&latest) => {
                return Err(format!("it was less later\n{addition}\n{latest}"));
            }
            Some(latest) if latest.invoked >= addition.invoked => {}
            _ => latest = Some(addition),
        }
    }
    if skipped > unknown as i64 {
        return Err(format!(
            "{skipped} additions of nobody, where {unknown} did not return"
        ));
    }
    Ok(())
}

/// Whether a take may take what a put has put.
type MayTake<'a> = &'a dyn Fn(&Operation, &Operation) -> bool;

/// What is put into a queue and taken out of it; what was put under one number (the type of a
/// message) is taken in that order.
fn queue(puts: &[Operation], takes: &[Operation], may_take: MayTake<'_>) -> Vec<String> {
    let mut wrong = Vec::new();
    let put: HashMap<i64, &Operation> = puts.iter().map(|put| (put.argument, put)).collect();
    let mut taken = HashMap::<i64, &Operation>::new();
    for take in takes.iter().filter(|take| take.succeeded()) {
        match put.get(&take.result) {
            None => wrong.push(format!("taken and never put\n{take}")),
            Some(put) if put.returned.is_some() && !put.succeeded() => {
                wrong.push(format!("taken though it was not put\n{put}\n{take}"));
            }
            Some(put) if take.precedes(put) => {
                wrong.push(format!("taken before it was put\n{put}\n{take}"));
            }
            Some(_) => {}
        }
        if let Some(other) = taken.insert(take.result, take) {
            wrong.push(format!("taken twice\n{other}\n{take}"));
        }
    }
    let acknowledged = puts.iter().filter(|put| put.succeeded());
    let (kept, missing): (Vec<&Operation>, Vec<&Operation>) =
        acknowledged.partition(|put| taken.contains_key(&put.argument));
    let unknown: Vec<&Operation> = takes.iter().filter(|o| o.returned.is_none()).collect();
    let lost = unmatched(&missing, &unknown, may_take);
    wrong.extend(lost.into_iter().map(|put| format!("lost\n{put}")));
    for first in &kept {
        for second in kept.iter().filter(|put| put.object == first.object) {
            let (one, other) = (taken[&first.argument], taken[&second.argument]);
            if first.precedes(second) && other.precedes(one) {
                let text = format!("out of order\n{first}\n{second}\n{other}\n{one}");
                wrong.push(text);
            }
        }
    }
    for empty in takes.iter().filter(|take| found_nothing(take)) {
        let waited = |put: &&&Operation| {
            put.precedes(empty) && empty.precedes(taken[&put.argument]) && may_take(empty, put)
        };
        if let Some(put) = kept.iter().find(waited) {
            wrong.push(format!("found empty, which it was not\n{put}\n{empty}"));
        }
    }
    wrong
}

fn found_nothing(take: &Operation) -> bool {
    let errno = i32::try_from(-take.result).unwrap_or(0);
    take.returned.is_some() && [libc::EAGAIN, libc::ENOMSG].contains(&errno)
}

/// The puts that are left over when as many as possible are each put down to a take of its own.
fn unmatched<'a>(
    puts: &[&'a Operation],
    takes: &[&Operation],
    may_take: MayTake<'_>,
) -> Vec<&'a Operation> {
    /// Finds a take for a put, moving others to other takes if need be (Kuhn's algorithm).
    fn place(
        put: usize,
        may: &[Vec<usize>],
        held: &mut [Option<usize>],
        tried: &mut [bool],
    ) -> bool {
        may[put].iter().any(|&take| {
            if std::mem::replace(&mut tried[take], true) {
                return false;
            }
            let is_free = held[take].is_none_or(|other| place(other, may, held, tried));
            if is_free {
                held[take] = Some(put);
            }
            is_free
        })
    }
    let may = |put: &&Operation| -> Vec<usize> {
        let candidates = takes.iter().enumerate();
        let candidates = candidates.filter(|(_, take)| may_take(take, put));
        candidates.map(|(index, _)| index).collect()
    };
    let may: Vec<Vec<usize>> = puts.iter().map(may).collect();
    let mut held = vec![None; takes.len()];
    let mut left = Vec::new();
    for (index, put) in puts.iter().enumerate() {
        if !place(index, &may, &mut held, &mut vec![false; takes.len()]) {
            left.push(*put);
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An operation from `invoked` to `returned`, which is 0 for one that never returned.
    fn operation(
        kind: Kind,
        (invoked, returned): (u64, u64),
        argument: i64,
        result: i64,
    ) -> Operation {
        Operation {
            client: 1,
            invoked,
            returned: (returned != 0).then_some(returned),
            kind,
            object: u32::from(kind == Kind::Send || kind == Kind::Receive),
            argument,
            expected: 0,
            result,
        }
    }

    #[track_caller]
    fn expect(history: &[Operation], complaints: &[&str]) {
        let wrong = check(history);
        assert_eq!(wrong.len(), complaints.len(), "{wrong:#?}");
        for (text, complaint) in wrong.iter().zip(complaints) {
            assert!(text.contains(complaint), "{text}");
        }
    }

    #[test]
    fn additions_are_neither_lost_nor_late_nor_invented() {
        let add = |times, result| operation(Kind::Add, times, 1, result);
        let look = |times, result| operation(Kind::Add, times, 0, result);
        expect(&[add((1, 9), 1), add((2, 8), 0), look((10, 11), 2)], &[]);
        expect(&[add((1, 2), 0), add((3, 4), 0)], &["an addition is lost"]);
        expect(&[add((1, 2), 1), add((3, 4), 0)], &["less later"]);
        expect(&[add((1, 2), 0), look((3, 4), 0)], &["less later"]);
        expect(&[add((1, 2), 0), look((3, 4), 2)], &["additions of nobody"]);
        expect(&[add((1, 2), 0), add((1, 0), 0), look((3, 4), 2)], &[]);
        expect(&[add((1, 2), 0), add((1, 0), 0), look((3, 4), 1)], &[]);
    }

    #[test]
    fn the_sum_of_the_bank_is_that_of_the_deposits() {
        let audit = |sum| operation(Kind::Audit, (1, 2), 100, sum);
        expect(&[audit(100)], &[]);
        expect(&[audit(99)], &["sum became 99"]);
    }

    #[test]
    fn a_queue_neither_loses_nor_doubles_nor_overtakes() {
        let push = |times, value| operation(Kind::Push, times, value, 0);
        let pop = |times, value| operation(Kind::Pop, times, 0, value);
        let pushes = [push((1, 2), 7), push((3, 4), 8)];
        let with = |takes: &[Operation]| [&pushes[..], takes].concat();
        expect(&with(&[pop((5, 6), 7), pop((7, 8), 8)]), &[]);
        expect(&with(&[pop((5, 8), 8), pop((6, 9), 7)]), &[]);
        expect(&with(&[pop((5, 6), 7)]), &["lost"]);
        expect(&with(&[pop((5, 6), 8), pop((7, 8), 7)]), &["out of order"]);
        let twice = [pop((5, 6), 7), pop((7, 8), 8), pop((9, 10), 8)];
        expect(&with(&twice), &["taken twice"]);
        let odd = [pop((5, 6), 7), pop((7, 8), 8), pop((9, 10), 9)];
        expect(&with(&odd), &["never put"]);
        let early = [pop((1, 2), 7), pop((1, 2), 8)];
        expect(&with(&early), &["before it was put"]);
        let empty = operation(Kind::Pop, (5, 6), 0, -i64::from(libc::EAGAIN));
        let late = [empty, pop((7, 8), 7), pop((9, 10), 8)];
        expect(&with(&late), &["found empty"]);
    }

    #[test]
    fn who_dies_while_taking_may_have_taken_what_it_noted() {
        let push = |value| operation(Kind::Push, (1, 2), value, 0);
        let dying = |value| operation(Kind::Pop, (5, 0), value, 0);
        expect(&[push(7), dying(7)], &[]);
        expect(&[push(7), dying(8)], &["lost"]);
        expect(&[push(7), push(8), dying(7), dying(7)], &["lost"]);
        let pop = operation(Kind::Pop, (6, 7), 0, 7);
        expect(&[push(7), dying(7), pop], &[]);
    }

    #[test]
    fn who_dies_while_receiving_may_have_taken_a_message_of_the_type() {
        let send = operation(Kind::Send, (1, 2), 7, 0);
        let dying = |wanted| operation(Kind::Receive, (5, 0), wanted, 0);
        for wanted in [0, 1, -1, -2] {
            expect(&[send, dying(wanted)], &[]);
        }
        expect(&[send, dying(2)], &["lost"]);
        let refused = operation(Kind::Send, (1, 2), 7, -i64::from(libc::EINTR));
        let receive = operation(Kind::Receive, (3, 4), 0, 7);
        expect(&[refused, receive], &["though it was not put"]);
        expect(&[operation(Kind::Send, (1, 0), 7, 0), receive], &[]);
        expect(&[operation(Kind::Send, (1, 0), 7, 0)], &[]);
    }
}
