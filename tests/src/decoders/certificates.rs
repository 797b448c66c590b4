//! The files of a daemon's certificates.

use std::cell::OnceCell;
use std::fs;

use migshm_transport::pki::{self, DEFAULT_VALIDITY};
use migshm_transport::{Identity, Peer};
use tempfile::TempDir;

/// The files that a node's identity consists of.
const FILES: [&str; 3] = ["ca.pem", "n.pem", "n.key"];

thread_local! {
    static PKI: OnceCell<Pki> = const { OnceCell::new() };
}

/// A folder with the certificates of a cluster that has one node.
struct Pki {
    folder: TempDir,
    files: Vec<Vec<u8>>,
}

impl Pki {
    fn new() -> Pki {
        let folder = tempfile::tempdir().expect("/tmp can be written");
        pki::create_authority(folder.path()).expect("it is empty");
        let peer = Peer::node("n").expect("a name");
        pki::issue(folder.path(), &peer, DEFAULT_VALIDITY).expect("there is an authority");
        let read = |name| fs::read(folder.path().join(name)).expect("it was written");
        let files = FILES.map(read).into();
        Pki { folder, files }
    }
}

/// The first byte says which file has the others as its contents.
pub(super) fn certificates(bytes: &[u8]) {
    let Some((&file, contents)) = bytes.split_first() else {
        return;
    };
    PKI.with(|pki| {
        let pki = pki.get_or_init(Pki::new);
        let file = usize::from(file) % FILES.len();
        let path = pki.folder.path().join(FILES[file]);
        fs::write(&path, contents).expect("it is ours");
        let peer = Peer::node("n").expect("a name");
        if let Ok(identity) = Identity::load(pki.folder.path(), &peer) {
            assert_eq!(identity.peer(), &peer);
        }
        match pki::list(pki.folder.path()) {
            Ok(list) => {
                for (_, certificate) in list {
                    let _ = certificate.map_err(|error| error.to_string());
                }
            }
            // The authority is what was damaged.
            Err(error) => drop(error.to_string()),
        }
        fs::write(&path, &pki.files[file]).expect("it is ours");
    });
}

pub(super) fn samples() -> Vec<Vec<u8>> {
    let with_number = |(number, contents): (u8, &Vec<u8>)| [&[number], &contents[..]].concat();
    PKI.with(|pki| {
        let pki = pki.get_or_init(Pki::new);
        (0..).zip(&pki.files).map(with_number).collect()
    })
}
