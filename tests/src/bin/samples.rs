//! `samples FOLDER`: valid input for every target of `fuzz/`, as files that it can begin with.

use std::path::Path;
use std::{env, fs, io};

use migshm_tests::decoders::TARGETS;

fn main() -> io::Result<()> {
    let folder = env::args_os().nth(1).expect("usage: samples FOLDER");
    for target in &TARGETS {
        let folder = Path::new(&folder).join(target.name);
        fs::create_dir_all(&folder)?;
        for (number, sample) in (target.samples)().iter().enumerate() {
            fs::write(folder.join(format!("sample{number}")), sample)?;
        }
    }
    Ok(())
}
