//! Who a daemon trusts: certificates that change while programs run, and peers that are not who they
//! say.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use migshm_protocol::page::PeerHello;
use migshm_protocol::{NodeId, VERSION};
use migshm_tests::{Lab, Process, built, eventually, run};
use migshm_transport::{Endpoint, Identity, Peer};

fn certificates(lab: &Lab) -> PathBuf {
    lab.directory().join("pki")
}

fn pki(lab: &Lab, arguments: &[&str]) {
    let mut command = lab.inside(built("target/release/migshm"));
    command.arg("pki").args(arguments);
    run(command.env("MIGSHM_PKI", certificates(lab))).succeeded();
}

fn lines_of_log(lab: &Lab, host: &str, what: &str) -> usize {
    let log =
        fs::read_to_string(lab.directory().join(format!("{host}.log"))).expect("there is one");
    log.matches(what).count()
}

/// Has all daemons look at their certificates, and waits until they have; expects them to say `what`.
fn reload(lab: &Lab, hosts: &[&str], what: &str) {
    for host in hosts {
        let before = lines_of_log(lab, host, what);
        // SAFETY: plain integers.
        assert_eq!(unsafe { libc::kill(lab.pid(host), libc::SIGHUP) }, 0);
        eventually(what, || lines_of_log(lab, host, what) > before);
    }
}

#[test]
fn certificates_and_authority_change_while_programs_run() {
    const HOSTS: [&str; 4] = ["coordinator", "node1", "node2", "node3"];
    let lab = Lab::new(3);
    let mut programs: [Process; 2] = [lab.start(1, "sysv"), lab.start(2, "sysv")];
    for program in &mut programs {
        program.obey("segment 1 65536");
        program.obey("semaphore 1");
    }
    let mut round = 0;
    let mut work = || {
        round += 1;
        let (from, to) = (round % 2, (round + 1) % 2);
        programs[to].tell("change -1");
        programs[from].obey(&format!("fill {round}"));
        programs[from].obey("change 1");
        assert_eq!(programs[to].answer(), "ok");
        programs[to].obey(&format!("check {round}"));
    };
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Programs that come and go all the while.
            while !is_done.load(Ordering::Relaxed) {
                lab.spread("litmus", 2, &["--rounds", "64"]);
            }
        });
        let mut step = |arguments: &[&str]| {
            pki(&lab, arguments);
            reload(&lab, &HOSTS, "certificates renewed");
            work();
            // The links of a daemon that is new are new.
            lab.labctl(&["kill", "node3"]);
            lab.labctl(&["start", "node3"]);
            work();
        };
        let steps = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            step(&["renew"]);
            step(&["rotate-ca"]);
            step(&["renew", "node3"]);
            step(&["renew"]);
            step(&["retire-ca"]);
        }));
        is_done.store(true, Ordering::Relaxed);
        if let Err(panic) = steps {
            std::panic::resume_unwind(panic);
        }
    });
    for host in ["node1", "node2"] {
        assert_eq!(lines_of_log(&lab, host, "lost the coordinator"), 0);
    }
}

#[test]
fn a_daemon_keeps_what_works_if_its_new_certificates_do_not() {
    let lab = Lab::new(2);
    let certificate = certificates(&lab).join("node1.pem");
    let good = fs::read(&certificate).expect("it is there");
    fs::write(&certificate, "garbage").expect("root may");
    reload(&lab, &["node1"], "the certificates stay as they were");
    let mut program = lab.start(1, "sysv");
    program.obey("segment 1 4096");
    fs::write(&certificate, good).expect("root may");
    reload(&lab, &["node1"], "certificates renewed");
    program.obey("detach");
}

#[test]
fn a_revoked_node_is_no_member_any_longer() {
    let lab = Lab::new(3);
    pki(&lab, &["revoke", "node3"]);
    for host in ["coordinator", "node1", "node2"] {
        reload(&lab, &[host], "certificates renewed");
    }
    let members = || lab.status(1)["members"].as_array().map_or(0, Vec::len);
    eventually("node3 has left", || members() == 2);
    eventually("it knows why", || {
        lines_of_log(&lab, "node3", "it has been revoked") > 0
    });
    lab.labctl(&["kill", "node3"]);
    pki(&lab, &["renew", "node3"]);
    lab.labctl(&["start", "node3"]);
    eventually("node3 is back", || members() == 3);
}

/// What a node answers to a peer that shows this certificate, and says that it is this node.
async fn greeted(lab: &Lab, certificate: &Peer, hello: PeerHello, address: SocketAddr) -> String {
    let identity = Identity::load(&certificates(lab), certificate).expect("it works");
    let local = SocketAddr::from(([127, 0, 0, 1], 0));
    let endpoint = Endpoint::bind(local, &identity).expect("it works");
    let peer = Peer::node("node1").expect("a name");
    let mut link = endpoint.connect(address, &peer).await.expect("a link");
    link.sender.send(&hello, &[]);
    loop {
        if let Err(error) = link.receiver.next().await {
            return error.to_string();
        }
    }
}

#[test]
fn a_node_talks_to_no_peer_that_is_another_than_its_certificate_says() {
    let lab = Lab::new(3);
    let status = lab.status(1);
    let member = |name: &str| {
        let members = status["members"].as_array().expect("a list");
        let found = members.iter().find(|member| member["name"] == name);
        found.expect("a member").clone()
    };
    let slot = |name: &str| {
        let slot = member(name)["node"].as_u64().expect("a number");
        NodeId(u16::try_from(slot).expect("a slot"))
    };
    let address = member("node1")["address"].as_str().expect("one").parse();
    let address: SocketAddr = address.expect("an address");
    let hello = |node| PeerHello {
        version: VERSION,
        node,
        // Later than all that there are.
        epoch: 3,
    };
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().expect("a runtime");
    let node3 = Peer::node("node3").expect("a name");
    for (certificate, claims, reason) in [
        (Peer::Coordinator, slot("node2"), "only nodes have pages"),
        (node3.clone(), slot("node2"), "its membership has ended"),
        (node3, slot("node1"), "its membership has ended"),
    ] {
        let answer = runtime.block_on(greeted(&lab, &certificate, hello(claims), address));
        assert_eq!(answer, format!("the peer closed the link: {reason}"));
    }
    let mut program = lab.start(1, "sysv");
    program.obey("segment 1 4096");
    let mut other = lab.start(2, "sysv");
    other.obey("segment 1 4096");
    program.obey("fill 3");
    other.obey("check 3");
}
