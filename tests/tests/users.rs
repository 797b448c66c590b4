//! What one user may do with another's objects: what the kernel allows, and nothing else.

use std::fs;
use std::process::Command;

use migshm_tests::{Solo, assert_prints_as_on_the_kernel, is_root_for, program, run};

/// Whether the kernel is as a new one is: without huge pages.
fn has_no_huge_pages() -> bool {
    [
        "nr_hugepages",
        "nr_overcommit_hugepages",
        "hugetlb_shm_group",
    ]
    .iter()
    .all(|name| {
        let value = fs::read_to_string(format!("/proc/sys/vm/{name}"));
        value.is_ok_and(|value| value.trim() == "0")
    })
}

#[test]
fn users_groups_and_capabilities_count_as_on_the_kernel() {
    if !is_root_for("becoming other users") {
        return;
    }
    let solo = Solo::for_all_users();
    let users = solo.install(&program("users"));
    let printed = |mut command: Command| {
        if has_no_huge_pages() {
            command.arg("huge");
        }
        run(&mut command).succeeded().stdout
    };
    let mut native = migshm_tests::command("unshare");
    native.arg("--ipc").arg(&users).env_remove("LD_PRELOAD");
    let (native, ours) = (printed(native), printed(solo.preloaded(&users)));
    assert_prints_as_on_the_kernel("users", &native, &ours);
}
