//! Leaders that store, one after the other, in an etcd whose answers are lost and whose requests come late and
//! repeatedly, also those of leaders that are none any more. Whatever was acknowledged is there, once, in order.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::super::log::{Commit, Head, Keys};
use super::super::wire::{
    Compare, Expected, KeyValue, PutRequest, RangeRequest, RangeResponse, Request, Response,
    ResponseHeader, ResponseOp, TxnRequest, TxnResponse,
};
use super::super::{Error, one};
use crate::store::Contents;

/// So small that most of what is stored takes several transactions.
const CHUNK: usize = 16;
const FORMAT: &str = "numbers";

/// What etcd promises.
#[derive(Default)]
struct Etcd {
    revision: i64,
    keys: BTreeMap<Vec<u8>, KeyValue>,
}

impl Etcd {
    fn range(&self, range: &RangeRequest) -> Vec<KeyValue> {
        if range.range_end.is_empty() {
            return self.keys.get(&range.key).cloned().into_iter().collect();
        }
        let range = self.keys.range(range.key.clone()..range.range_end.clone());
        range.map(|(_, kv)| kv.clone()).collect()
    }

    fn is_so(&self, compare: &Compare) -> bool {
        let found = self.keys.get(&compare.key);
        match compare.expected.as_ref().unwrap() {
            Expected::CreateRevision(expected) => {
                found.map_or(0, |kv| kv.create_revision) == *expected
            }
            Expected::Value(expected) => found.is_some_and(|kv| kv.value == *expected),
        }
    }

    fn transact(&mut self, txn: &TxnRequest) -> TxnResponse {
        let succeeded = txn.compare.iter().all(|compare| self.is_so(compare));
        let done = if succeeded {
            &txn.success
        } else {
            &txn.failure
        };
        self.revision += 1;
        let mut responses = Vec::new();
        for op in done {
            match op.request.as_ref().unwrap() {
                Request::Range(range) => responses.push(ResponseOp {
                    response: Some(Response::Range(RangeResponse {
                        kvs: self.range(range),
                        more: false,
                    })),
                }),
                Request::Put(put) => self.put(put),
                Request::DeleteRange(delete) => {
                    let all = delete.key.clone()..delete.range_end.clone();
                    self.keys.retain(|key, _| !all.contains(key));
                }
            }
        }
        TxnResponse {
            header: Some(ResponseHeader {
                member_id: 0,
                revision: self.revision,
            }),
            succeeded,
            responses,
        }
    }

    fn put(&mut self, put: &PutRequest) {
        let revision = self.revision;
        let kv = self.keys.entry(put.key.clone()).or_default();
        if kv.create_revision == 0 {
            kv.create_revision = revision;
        }
        (kv.key, kv.value) = (put.key.clone(), put.value.clone());
    }

    /// The numbers that are stored, and the head.
    fn load(&self, keys: &Keys) -> (Vec<u8>, Option<Head>) {
        let Some(head) = self.range(&one(&keys.head())).pop() else {
            return (Vec::new(), None);
        };
        let head = Head::parse(&head.value).unwrap();
        let [snapshot, log] = [keys.snapshot(head), keys.log(head)].map(|r| self.range(&r));
        let stored = keys.assemble(head, &snapshot, &log).unwrap();
        let numbers = stored.snapshot.into_iter();
        let numbers = numbers.chain(stored.records.into_iter().flatten());
        (numbers.collect(), Some(head))
    }
}

struct Leader {
    term: i64,
    head: Option<Head>,
    /// All that it has been told and has stored.
    numbers: Vec<u8>,
    /// What it is storing: the transactions that are left, and what it would be then.
    commit: Option<(Vec<TxnRequest>, Head, Vec<u8>)>,
}

#[derive(Clone, Debug)]
enum Step {
    /// The one that leads ends, or is thought to have.
    Elect,
    /// A leader, of now or before, stores so many numbers, or all.
    Store {
        leader: prop::sample::Index,
        more: Option<usize>,
    },
    /// Its next request is done; it hears of that or not.
    Ask {
        leader: prop::sample::Index,
        heard: bool,
    },
    /// A request of the past is done again.
    Again(prop::sample::Index),
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        1 => Just(Step::Elect),
        4 => (index(), prop::option::weighted(0.8, 1..60_usize)).prop_map(|(leader, more)| Step::Store { leader, more }),
        12 => (index(), any::<bool>()).prop_map(|(leader, heard)| Step::Ask { leader, heard }),
        4 => index().prop_map(Step::Again),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(2_000) })]

    #[test]
    fn what_was_acknowledged_is_there_once(steps in prop::collection::vec(step(), 1..120)) {
        let mut keys = Keys::new("cluster");
        keys.chunk = CHUNK;
        let mut etcd = Etcd::default();
        let mut leaders: Vec<Leader> = Vec::new();
        let mut asked: Vec<TxnRequest> = Vec::new();
        let mut acknowledged = Vec::new();
        let mut next = 0_u8;
        for step in steps {
            match step {
                Step::Elect => {
                    etcd.keys.remove(&keys.leader());
                    let put = PutRequest { key: keys.leader(), value: b"it".to_vec(), lease: 0 };
                    let won = etcd.transact(&TxnRequest::new().if_created(&keys.leader(), 0).put(put));
                    prop_assert!(won.succeeded);
                    let (numbers, head) = etcd.load(&keys);
                    leaders.push(Leader { term: etcd.revision, head, numbers, commit: None });
                }
                Step::Store { leader, more } if !leaders.is_empty() => {
                    // Most often the one that leads.
                    let index = leaders.len() - 1 - leader.index(leaders.len()) / 3;
                    let leader = &mut leaders[index];
                    if leader.commit.is_some() {
                        continue;
                    }
                    let mut then = leader.numbers.clone();
                    let contents = match more {
                        Some(more) if leader.head.is_some() => {
                            let new: Vec<u8> = (0..more).map(|_| { next = next.wrapping_add(1); next }).collect();
                            then.extend(&new);
                            Contents::Records(new.chunks(7).map(<[u8]>::to_vec).collect())
                        }
                        _ => Contents::Snapshot(then.clone()),
                    };
                    let Commit { mut ahead, last, head } = keys.commit(leader.term, leader.head, FORMAT, &contents);
                    ahead.push(last);
                    ahead.reverse();
                    leader.commit = Some((ahead, head, then));
                }
                Step::Ask { leader, heard } if !leaders.is_empty() => {
                    let index = leaders.len() - 1 - leader.index(leaders.len()) / 3;
                    let leader = &mut leaders[index];
                    let Some((left, head, then)) = &mut leader.commit else { continue };
                    let txn = left.last().unwrap().clone();
                    asked.push(txn.clone());
                    let answer = etcd.transact(&txn);
                    if !heard {
                        continue;
                    }
                    match keys.outcome(leader.term, leader.head, *head, answer) {
                        Ok(_) => {
                            left.pop();
                            if left.is_empty() {
                                (leader.head, leader.numbers) = (Some(*head), then.clone());
                                acknowledged.clone_from(then);
                                leader.commit = None;
                            }
                        }
                        Err(Error::Deposed) => {
                            prop_assert!(index + 1 < leaders.len(), "the one that leads is told that it does not");
                            leaders.remove(index);
                        }
                        Err(error) => prop_assert!(false, "{}", error),
                    }
                }
                Step::Again(which) if !asked.is_empty() => {
                    etcd.transact(&asked[which.index(asked.len())].clone());
                }
                _ => {}
            }
            let (numbers, _) = etcd.load(&keys);
            // The last may be stored, and its answer under way.
            prop_assert!(numbers.starts_with(&acknowledged), "{:?} of {:?}", numbers, acknowledged);
            let mut once = numbers.clone();
            once.dedup();
            prop_assert_eq!(once, numbers);
        }
    }
}
