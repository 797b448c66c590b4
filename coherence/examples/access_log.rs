//! What the access log costs on the way of a fault: nanoseconds for all that is counted of one, at
//! the node that faults and at the home that gives the page.

use std::hint::black_box;
use std::time::Instant;

use migshm_coherence::AccessLog;
use migshm_protocol::page::Access;
use migshm_protocol::{NodeId, Page, SegmentId};

const FAULTS: u32 = 2_000_000;

fn main() {
    println!(
        "{:<34} {:>10} {:>10}",
        "ns for each fault", "requester", "home"
    );
    for (pattern, pages, users) in [
        ("one page, one process", 1u32, 1),
        ("128 MiB in order, one process", 32_768, 1),
        ("128 MiB in order, 16 processes", 32_768, 16),
        ("8 GiB in strides, 16 processes", 2_097_152, 16),
    ] {
        let stride = if pages > 1_000_000 { 521 } else { 1 };
        let touches = (0..FAULTS).map(|n| {
            let index = (u64::from(n) * stride % u64::from(pages)) as u32;
            let segment = SegmentId(1);
            (n % users + 1, Page { segment, index })
        });
        let mut log = AccessLog::new(NodeId(0));
        let mut requester = 0;
        let mut home = 0;
        for timed in [false, true] {
            let start = Instant::now();
            for (user, page) in touches.clone() {
                if log.fault(user, page, Access::Read) {
                    log.introduce(0, user, 1, String::new());
                }
                log.received(page, NodeId(1), 4096);
            }
            requester = start.elapsed().as_nanos() / u128::from(FAULTS);
            let start = Instant::now();
            for (n, (_, page)) in touches.clone().enumerate() {
                log.requested(n as u64, page, NodeId(1), Access::Read);
                log.sent(page, NodeId(1), 4096);
            }
            home = start.elapsed().as_nanos() / u128::from(FAULTS);
            black_box((&log, timed));
        }
        println!("{pattern:<34} {requester:>10} {home:>10}");
    }
}
