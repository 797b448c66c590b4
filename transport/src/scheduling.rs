//! When a daemon gets a processor.

/// Asks the kernel to run this thread before programs that compute, as they wait for it, for a page or a
/// semaphore: a real-time class (whose share of the processor the kernel bounds, `sched_rt_runtime_us`)
/// where that is permitted, else the best nice value that is; gives its name. Threads that it starts are
/// not of it. The median of a remote fault hardly changes; its tail under load does, by a factor of ten or more.
pub fn run_early() -> &'static str {
    let parameter = libc::sched_param { sched_priority: 1 };
    // SAFETY: a live parameter structure; 0 is this thread.
    if unsafe {
        libc::sched_setscheduler(
            0,
            libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK,
            &raw const parameter,
        )
    } == 0
    {
        return "SCHED_FIFO";
    }
    for nice in [-19, -10, -5] {
        // SAFETY: plain integers.
        if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) } == 0 {
            return "raised nice value";
        }
    }
    "default"
}
