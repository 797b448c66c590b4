//! State directories: what is stored in them, and what is refused.

use std::fs;
use std::path::Path;

use migshm_coordinator::replica::{Input, Record, Replica};
use migshm_coordinator::store::{Contents, Directory, Durability};
use proptest::prelude::*;

const FILE: &str = "coordinator.redb";
const JOURNAL: &str = "coordinator.journal";
/// Bytes of a journal before its commits.
const HEADER: usize = 56;

fn open(path: &Path) -> Result<(Directory, Replica), String> {
    Directory::open(path, Durability::Process).map_err(|error| error.to_string())
}

fn join(number: usize) -> Record {
    let input = Input::Join {
        name: format!("node{number}"),
        address: "[::1]:1".parse().unwrap(),
        memory: 1 << 30,
    };
    Record { now: 1, input }
}

/// Has so many nodes join, each stored by itself, with a snapshot in between.
fn grow(directory: &mut Directory, replica: &mut Replica, nodes: std::ops::Range<usize>) {
    for number in nodes {
        let record = join(number);
        assert!(replica.apply(&record, &[]).unwrap());
        let contents = match number {
            3 => Contents::Snapshot(replica.snapshot()),
            _ => Contents::Records(vec![record.encode(&[])]),
        };
        directory.commit(&contents).unwrap();
    }
}

#[test]
fn what_is_stored_is_there_again() {
    let path = tempfile::tempdir().unwrap();
    for durability in [Durability::Process, Durability::Power] {
        let path = path.path().join(format!("{durability:?}"));
        let (mut directory, mut replica) = Directory::open(&path, durability).unwrap();
        for first in [0, 2, 4, 6] {
            grow(&mut directory, &mut replica, first..first + 2);
            drop(directory);
            let again;
            (directory, again) = Directory::open(&path, durability).unwrap();
            assert_eq!(again.snapshot(), replica.snapshot());
            assert_eq!(again.members().count(), first + 2);
        }
    }
}

#[test]
fn two_directories_are_two_clusters() {
    let paths = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [one, other] = paths.each_ref().map(|path| open(path.path()).unwrap().1);
    assert_ne!(one.cluster(), other.cluster());
}

#[test]
fn one_coordinator_uses_a_directory() {
    let path = tempfile::tempdir().unwrap();
    let _used = open(path.path()).unwrap();
    let error = open(path.path()).err().unwrap();
    assert!(
        error.ends_with("is in use by another coordinator"),
        "{error}"
    );
}

#[test]
fn what_is_somebody_elses_is_refused_and_left_alone() {
    let path = tempfile::tempdir().unwrap();
    fs::write(path.path().join("thesis.tex"), "much work").unwrap();
    let error = open(path.path()).err().unwrap();
    assert!(error.contains("it contains \"thesis.tex\""), "{error}");
    assert_eq!(fs::read_dir(path.path()).unwrap().count(), 1);

    let path = tempfile::tempdir().unwrap();
    let file = path.path().join(FILE);
    fs::write(&file, "not a database").unwrap();
    let error = open(path.path()).err().unwrap();
    assert!(error.contains("is not the state directory"), "{error}");
    assert_eq!(fs::read(&file).unwrap(), b"not a database");

    let file_in_place = path.path().join("file");
    fs::write(&file_in_place, "").unwrap();
    let error = open(&file_in_place).err().unwrap();
    assert!(error.contains("cannot use state directory"), "{error}");
}

#[test]
fn a_database_of_another_program_or_version_is_refused() {
    let path = tempfile::tempdir().unwrap();
    let format = redb::TableDefinition::<&str, &str>::new("format");
    let write = |value: Option<&str>| {
        let database = redb::Database::create(path.path().join(FILE)).unwrap();
        let transaction = database.begin_write().unwrap();
        if let Some(value) = value {
            let mut table = transaction.open_table(format).unwrap();
            table.insert("migshm coordinator", value).unwrap();
        }
        transaction.commit().unwrap();
    };
    write(None);
    let error = open(path.path()).err().unwrap();
    assert!(error.contains("is not the state directory"), "{error}");
    write(Some("0"));
    let error = open(path.path()).err().unwrap();
    assert!(
        error.contains("is of format 0, this coordinator's is 2"),
        "{error}"
    );
}

#[test]
fn a_directory_that_was_not_made_to_the_end_is_made_anew() {
    let path = tempfile::tempdir().unwrap();
    fs::write(path.path().join("coordinator.redb.new"), "half").unwrap();
    assert_eq!(open(path.path()).unwrap().1.members().count(), 0);
}

/// A state of so many joins, and the directory's journal after each.
fn grown(path: &Path, nodes: usize) -> (Replica, Vec<Vec<u8>>) {
    let (mut directory, mut replica) = open(path).unwrap();
    let mut journals = Vec::new();
    for number in 0..nodes {
        grow(&mut directory, &mut replica, number..number + 1);
        journals.push(fs::read(path.join(JOURNAL)).unwrap());
    }
    (replica, journals)
}

#[test]
fn a_commit_that_was_written_in_part_was_none() {
    let path = tempfile::tempdir().unwrap();
    let (_, journals) = grown(path.path(), 3);
    let [before, after] = [&journals[1], &journals[2]];
    for written in before.len()..=after.len() {
        let mut journal = before.clone();
        journal.extend(&after[before.len()..written]);
        fs::write(path.path().join(JOURNAL), journal).unwrap();
        let (mut directory, mut replica) = open(path.path()).unwrap();
        let nodes = 2 + usize::from(written == after.len());
        assert_eq!(replica.members().count(), nodes);
        // What is stored next takes its place.
        grow(&mut directory, &mut replica, 4..5);
        drop(directory);
        assert_eq!(open(path.path()).unwrap().1.members().count(), nodes + 1);
    }
}

#[test]
fn what_was_stored_before_a_snapshot_counts_no_more() {
    let path = tempfile::tempdir().unwrap();
    let (replica, journals) = grown(path.path(), 4);
    // The journal was not begun anew yet.
    fs::write(path.path().join(JOURNAL), &journals[2]).unwrap();
    let (mut directory, mut recovered) = open(path.path()).unwrap();
    assert_eq!(recovered.snapshot(), replica.snapshot());
    grow(&mut directory, &mut recovered, 4..5);
    drop(directory);
    assert_eq!(open(path.path()).unwrap().1.members().count(), 5);
}

#[test]
fn a_journal_that_does_not_fit_is_refused() {
    let path = tempfile::tempdir().unwrap();
    drop(open(path.path()).unwrap());
    let early = fs::read(path.path().join(FILE)).unwrap();
    let (replica, journals) = grown(path.path(), 5);
    let [journal, file] = [JOURNAL, FILE].map(|file| path.path().join(file));
    let refuse = || {
        let error = open(path.path()).err().unwrap();
        assert!(error.contains("its journal is incomplete"), "{error}");
    };
    // The snapshot's first commit was confirmed.
    fs::write(
        &journal,
        [&journals[4][..HEADER], &journals[3][HEADER..]].concat(),
    )
    .unwrap();
    refuse();
    fs::remove_file(&journal).unwrap();
    refuse();
    fs::write(&journal, &journals[4]).unwrap();
    let late = fs::read(&file).unwrap();
    fs::write(&file, early).unwrap();
    refuse();
    fs::write(&file, late).unwrap();
    assert_eq!(open(path.path()).unwrap().1.snapshot(), replica.snapshot());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    #[test]
    fn damage_is_found_or_does_no_harm(at in any::<prop::sample::Index>(), bits in 1..=255u8, cut in any::<bool>(), journal in any::<bool>()) {
        let path = tempfile::tempdir().unwrap();
        let (mut directory, mut replica) = open(path.path()).unwrap();
        grow(&mut directory, &mut replica, 0..8);
        drop(directory);
        let file = path.path().join(if journal { JOURNAL } else { FILE });
        let mut contents = fs::read(&file).unwrap();
        // Where anything is.
        let used: Vec<usize> = (0..contents.len()).filter(|at| contents[*at] != 0).collect();
        let at = used[at.index(used.len())];
        if cut {
            contents.truncate(at);
        } else {
            contents[at] ^= bits;
        }
        fs::write(&file, &contents).unwrap();
        match open(path.path()) {
            Ok((_, recovered)) => prop_assert_eq!(recovered.snapshot(), replica.snapshot()),
            Err(error) => prop_assert!(error.contains("damaged") || error.contains("is not the state"), "{}", error),
        }
    }
}
