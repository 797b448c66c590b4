//! Where a coordinator's state outlives it: etcd ([`crate::etcd`]), or a directory with an embedded
//! database (redb) and a journal, which is here.
//!
//! The database has a snapshot of the state, the journal what has happened since. A commit to either is all or
//! nothing: a coordinator that is killed at any moment leaves the state as it was before or after it. Unless
//! [`Durability::Power`] is asked for, commits go to the kernel and not to the disk: they survive the
//! coordinator, however it ends, but not the machine.
//!
//! Snapshots are numbered, and a journal says which one it follows. One that follows a snapshot before the last
//! was to be begun anew when the coordinator ended.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{self, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use migshm_protocol::VERSION;
use redb::backends::FileBackend;
use redb::{
    Builder, Database, DatabaseError, ReadableDatabase, ReadableTable, StorageBackend,
    TableDefinition, TableError,
};

use crate::etcd::{self, Log};
use crate::journal::{Journal, Recovered};
use crate::replica::{Replica, Stored};

/// Where what happens to a coordinator is stored.
pub enum Store {
    /// A directory of this host.
    Directory(Directory),
    /// An etcd cluster.
    Etcd(Box<Log>),
}

/// What is stored at once.
#[derive(Debug)]
pub enum Contents {
    /// What has happened since.
    Records(Vec<Vec<u8>>),
    /// All of the state, in place of what is stored.
    Snapshot(Vec<u8>),
}

impl Store {
    /// Stores all or nothing. It is stored when this is done.
    ///
    /// # Errors
    /// [`StoreError`]: there is no way to go on.
    pub async fn commit(self, contents: Contents) -> Result<Store, StoreError> {
        match self {
            Store::Directory(mut directory) => {
                let is_slow = directory.journal.durability() == Durability::Power;
                let commit = move || {
                    directory.commit(&contents)?;
                    Ok(Store::Directory(directory))
                };
                match is_slow {
                    true => tokio::task::spawn_blocking(commit)
                        .await
                        .expect("a store does not panic"),
                    false => commit(),
                }
            }
            Store::Etcd(mut log) => {
                log.commit(&contents).await?;
                Ok(Store::Etcd(log))
            }
        }
    }
}

/// What commits survive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// The end of the coordinator's process.
    #[default]
    Process,
    /// The end of the machine too: every commit waits for the disk.
    Power,
}

impl FromStr for Durability {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Durability, &'static str> {
        match text {
            "process" => Ok(Durability::Process),
            "power" => Ok(Durability::Power),
            _ => Err("it is `process` or `power`"),
        }
    }
}

/// The state cannot be stored, or there is none that can be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory cannot be made or read.
    #[error("cannot use state directory {path}: {cause}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// There is something else in it.
    #[error(
        "{path} is not the state directory of a coordinator: it contains {found:?}; name an empty or a new one"
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// What is in it.
        found: String,
    },
    /// Another coordinator uses it.
    #[error("state directory {path} is in use by another coordinator")]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// Of another version.
    #[error(
        "the state in {path} is of format {found}, this coordinator's is {expected}; it is left as it is"
    )]
    Version {
        /// The directory.
        path: PathBuf,
        /// What it says.
        found: String,
        /// What is understood.
        expected: String,
    },
    /// Damaged.
    #[error(
        "the state in {path} is damaged: {reason}; it is left as it is (to begin anew without it, name another directory)"
    )]
    Damaged {
        /// The directory.
        path: PathBuf,
        /// How that shows.
        reason: String,
    },
    /// Writing failed.
    #[error("cannot store the coordinator's state: {0}")]
    Failed(String),
    /// etcd cannot be used, or no longer.
    #[error(transparent)]
    Etcd(#[from] etcd::Error),
}

/// The database's file in the directory.
const FILE: &str = "coordinator.redb";
/// Its file while it is made.
const NEW_FILE: &str = "coordinator.redb.new";
const JOURNAL: &str = "coordinator.journal";
/// Bytes of the database that are kept in memory.
const CACHE: usize = 16 << 20;

/// What the database is: name and version.
const FORMAT: TableDefinition<&str, &str> = TableDefinition::new("format");
const FORMAT_KEY: &str = "migshm coordinator";
/// One, by its number.
const SNAPSHOT: TableDefinition<u64, &[u8]> = TableDefinition::new("snapshot");

/// A snapshot after its number.
type Numbered = (u64, Vec<u8>);

/// A state directory.
pub struct Directory {
    database: Database,
    journal: Journal,
    /// Of the snapshot.
    number: u64,
}

impl Directory {
    /// Opens the state in a directory, which is made if it does not exist, for a coordinator to go on with.
    ///
    /// # Errors
    /// [`StoreError`]: what is there is left to whoever can mend it.
    pub fn open(path: &Path, durability: Durability) -> Result<(Directory, Replica), StoreError> {
        let in_directory = |cause| StoreError::Directory {
            path: path.to_owned(),
            cause,
        };
        fs::create_dir_all(path).map_err(in_directory)?;
        let file = path.join(FILE);
        if !file.try_exists().map_err(in_directory)? {
            check_empty(path)?;
            // Under another name until it is complete, as this may end at any moment.
            let new = path.join(NEW_FILE);
            create(path, &new, durability)?;
            fs::rename(&new, &file).map_err(in_directory)?;
            sync(path).map_err(in_directory)?;
        }
        let (database, snapshot) = existing(path, &file, durability)?;
        let file = path.join(JOURNAL);
        let Some((number, snapshot)) = snapshot else {
            let journal = Journal::create(&file, durability, 0).map_err(in_directory)?;
            sync(path).map_err(in_directory)?;
            let mut directory = Directory {
                database,
                journal,
                number: 0,
            };
            let replica = Replica::of_new_cluster();
            directory.commit(&Contents::Snapshot(replica.snapshot()))?;
            return Ok((directory, replica));
        };
        let contents = match fs::read(&file) {
            Ok(bytes) => Recovered::parse(&bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(in_directory(error)),
        };
        let Some(contents) = contents.filter(|found| found.generation <= number) else {
            return Err(damaged(path, &"its journal is incomplete"));
        };
        let mut journal = Journal::open(&file, durability, &contents).map_err(in_directory)?;
        let mut records = contents.records;
        if contents.generation < number {
            journal.restart(number).map_err(in_directory)?;
            records.clear();
        }
        let replica = Replica::recover(&Stored { snapshot, records });
        let directory = Directory {
            database,
            journal,
            number,
        };
        match replica {
            Ok(replica) => Ok((directory, replica)),
            Err(error) => Err(damaged(path, &error)),
        }
    }

    /// Stores all or nothing.
    ///
    /// # Errors
    /// [`StoreError::Failed`]: it may not be used any more.
    pub fn commit(&mut self, contents: &Contents) -> Result<(), StoreError> {
        match contents {
            Contents::Records(records) => self.journal.append(records).map_err(failed),
            Contents::Snapshot(snapshot) => {
                let number = self.number + 1;
                self.store(number, snapshot).map_err(failed)?;
                self.number = number;
                self.journal.restart(number).map_err(failed)
            }
        }
    }

    fn store(&mut self, number: u64, snapshot: &[u8]) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let mut table = transaction.open_table(SNAPSHOT)?;
            table.remove(self.number)?;
            table.insert(number, snapshot)?;
        }
        transaction.commit()?;
        Ok(())
    }
}

/// A file to which a commit is as durable as asked for.
#[derive(Debug)]
struct Backend {
    file: FileBackend,
    durability: Durability,
}

impl Backend {
    /// Locks the file.
    fn new(file: File, durability: Durability) -> Result<Backend, DatabaseError> {
        let file = FileBackend::new(file)?;
        Ok(Backend { file, durability })
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        match self.durability {
            Durability::Process => Ok(()),
            Durability::Power => self.file.sync_data(),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.file.write(offset, data)
    }

    fn close(&self) -> io::Result<()> {
        self.file.close()
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE);
    builder
}

/// Makes an empty database.
fn create(path: &Path, file: &Path, durability: Durability) -> Result<(), StoreError> {
    let options = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(file);
    let made = options.map_err(redb::Error::from).and_then(|open| {
        let database = builder().create_with_backend(Backend::new(open, durability)?)?;
        let transaction = database.begin_write()?;
        transaction
            .open_table(FORMAT)?
            .insert(FORMAT_KEY, version().as_str())?;
        transaction.commit()?;
        Ok(())
    });
    made.map_err(|error| StoreError::Directory {
        path: path.to_owned(),
        cause: io::Error::other(error),
    })
}

/// Has a directory's entries on the disk.
fn sync(path: &Path) -> io::Result<()> {
    File::open(path).and_then(|directory| directory.sync_all())
}

/// A directory without state must be empty: what is in it is somebody else's.
fn check_empty(path: &Path) -> Result<(), StoreError> {
    let in_directory = |cause| StoreError::Directory {
        path: path.to_owned(),
        cause,
    };
    for entry in fs::read_dir(path).map_err(in_directory)? {
        let found = entry.map_err(in_directory)?.file_name();
        if found != NEW_FILE {
            return Err(StoreError::Foreign {
                path: path.to_owned(),
                found: found.to_string_lossy().into_owned(),
            });
        }
    }
    Ok(())
}

/// Opens a database and reads all of it: a snapshot and its number, if there is one.
fn existing(
    path: &Path,
    file: &Path,
    durability: Durability,
) -> Result<(Database, Option<Numbered>), StoreError> {
    let foreign = || StoreError::Foreign {
        path: path.to_owned(),
        found: FILE.to_owned(),
    };
    let in_directory = |cause| StoreError::Directory {
        path: path.to_owned(),
        cause,
    };
    let mut open = File::options()
        .read(true)
        .write(true)
        .open(file)
        .map_err(in_directory)?;
    let mut magic = [0; MAGIC.len()];
    if open.read_exact(&mut magic).is_err() || magic != MAGIC {
        return Err(foreign());
    }
    let read = || -> Result<_, redb::Error> {
        let mut database = builder().create_with_backend(Backend::new(open, durability)?)?;
        database.check_integrity()?;
        let transaction = database.begin_read()?;
        let format = match transaction.open_table(FORMAT) {
            Ok(table) => table.get(FORMAT_KEY)?.map(|found| found.value().to_owned()),
            Err(TableError::TableDoesNotExist(_)) => None,
            Err(error) => return Err(error.into()),
        };
        if format.as_ref() != Some(&version()) {
            return Ok((database, format, None));
        }
        let snapshot = match transaction.open_table(SNAPSHOT) {
            Ok(table) => {
                let last = table.last()?;
                last.map(|(number, found)| (number.value(), found.value().to_owned()))
            }
            Err(TableError::TableDoesNotExist(_)) => None,
            Err(error) => return Err(error.into()),
        };
        drop(transaction);
        Ok((database, format, snapshot))
    };
    // The database's code takes some damage for its own fault.
    let read = catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| {
        let reason = panic.downcast_ref::<&str>().copied();
        let reason = reason.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        Err(redb::Error::Corrupted(
            reason.unwrap_or("no reason given").to_owned(),
        ))
    });
    let (database, format, snapshot) = read.map_err(|error| match error {
        redb::Error::DatabaseAlreadyOpen => StoreError::InUse {
            path: path.to_owned(),
        },
        redb::Error::Io(cause) if cause.raw_os_error().is_some() => in_directory(cause),
        error => damaged(path, &error),
    })?;
    match format {
        None => Err(foreign()),
        Some(found) if found != version() => Err(StoreError::Version {
            path: path.to_owned(),
            found,
            expected: version(),
        }),
        Some(_) => Ok((database, snapshot)),
    }
}

/// What is stored is not the state of a coordinator.
fn damaged(path: &Path, reason: &dyn Display) -> StoreError {
    StoreError::Damaged {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

fn failed(error: impl Display) -> StoreError {
    StoreError::Failed(error.to_string())
}

/// Of what is stored: messages are, as they are on the wire.
pub(crate) fn version() -> String {
    format!("2, with messages of version {}", VERSION.major)
}

/// A redb database's first bytes.
const MAGIC: [u8; 9] = *b"redb\x1a\n\xa9\r\n";
