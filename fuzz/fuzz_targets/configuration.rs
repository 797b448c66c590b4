#![no_main]

// The command is a program, not a library.
#[path = "../../cli/src/config.rs"]
#[allow(dead_code)]
mod config;

use clap::{Arg, Command};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let options = [
        "coordinator",
        "runtime_dir",
        "name",
        "listen",
        "memory",
        "pki",
        "release_keys",
        "durable_keys",
    ];
    let with_options = |name| Command::new(name).args(options.map(|id| Arg::new(id).long(id)));
    let names = ["coordinator", "node", "status", "ipcs", "ipcrm"];
    let command = Command::new("migshm").subcommands(names.map(with_options));
    let _ = config::defaults(command, text);
    let _ = text.parse::<config::Size>();
});
