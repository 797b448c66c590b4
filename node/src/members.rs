//! The other nodes: who is a member, the links to them, and what they say, in its order.
//!
//! A member that leaves takes with it what only it had. The coherence engine makes a new start among
//! those that are left (see `coherence`): it has to know which messages of theirs were sent before
//! they knew. So `Flush` stands in line with all other messages of a link, and nothing passes it,
//! also where messages have to wait here until the coordinator has said what their segment is.

use bytes::Bytes;
use migshm_coherence::release::Input as ReleaseInput;
use migshm_coherence::{Input, PageSet};
use migshm_protocol::control::{Member, ToCoordinator};
use migshm_protocol::ids::EXTENT_PAGES;
use migshm_protocol::page::{PageMessage, PageRun, PeerMessage};
use migshm_protocol::{Extent, NodeId};
use migshm_transport::{FrameSender, LinkError};

use crate::daemon::{Node, Peer};
use crate::tasks;

impl Node {
    /// A node is a member: the one with the lower slot opens the link.
    pub(crate) fn on_joined(&mut self, member: Member) {
        let at = self.members.partition_point(|m| m.node < member.node);
        self.members.insert(at, member.clone());
        self.members_changed.notify_waiters();
        if member.node == self.id {
            return;
        }
        let view = self.engine.view();
        let mut peer = Peer::default();
        peer.backlog
            .push((PeerMessage::Flush { view }, Bytes::new()));
        self.peers.insert(member.node, peer);
        if member.node > self.id {
            tasks::connect_peer(self, member);
        }
    }

    /// A node is a member no longer: this view begins.
    pub(crate) fn on_left(&mut self, node: NodeId, view: u64) {
        tracing::warn!(%node, view, "a member is gone");
        self.members.retain(|member| member.node != node);
        if let Some(Peer {
            link: Some(link), ..
        }) = self.peers.remove(&node)
        {
            link.close("its membership has ended");
        }
        self.behind.remove(&node);
        for messages in self.unknown.values_mut() {
            messages.retain(|(from, ..)| *from != node);
        }
        self.drive_release(ReleaseInput::Left { node });
        let members = self.members.iter().map(|member| member.node);
        let (number, members) = (view, members.collect());
        self.drive(Input::View { number, members });
        self.members_changed.notify_waiters();
    }

    /// A link to a member stands: what waited for it goes out.
    ///
    /// Returns the link's number, for [`Node::on_link_lost`]; `None` if the node is no member.
    pub(crate) fn on_link(&mut self, peer: NodeId, link: FrameSender) -> Option<u64> {
        let number = self.next_id();
        let entry = self.peers.get_mut(&peer)?;
        // What was on its way on an earlier link is lost.
        let is_next = entry.number != 0;
        for (message, bytes) in entry.backlog.drain(..) {
            link.send(&message, &bytes);
        }
        entry.link = Some(link);
        entry.number = number;
        if is_next {
            self.on_unreachable(peer);
        }
        if self.is_leaving {
            self.end_link(peer);
        }
        Some(number)
    }

    /// Ends all links, once what was sent on them has arrived.
    pub(crate) fn end_links(&mut self) {
        let peers: Vec<NodeId> = self.peers.keys().copied().collect();
        peers.into_iter().for_each(|peer| self.end_link(peer));
    }

    fn end_link(&mut self, peer: NodeId) {
        if let Some(link) = self.peers.get_mut(&peer).and_then(|p| p.link.take()) {
            tasks::end_link(link);
        }
    }

    /// A member has said all that it will say on a link, as another daemon takes its place: so will this
    /// one, and nothing is lost with the link.
    pub(crate) fn on_link_ended(&mut self, peer: NodeId, number: u64) {
        if !self.is_linked(peer, number) {
            return;
        }
        self.end_link(peer);
        if let Some(entry) = self.peers.get_mut(&peer) {
            entry.number = 0;
        }
    }

    /// Links to the members with a higher slot.
    pub(crate) fn link_up(&mut self) {
        self.is_leaving = false;
        let above = self.members.iter().filter(|member| member.node > self.id);
        above.for_each(|member| tasks::connect_peer(self, member.clone()));
    }

    /// Whether messages of a link count.
    pub(crate) fn is_linked(&self, peer: NodeId, number: u64) -> bool {
        self.peers.get(&peer).is_some_and(|p| p.number == number)
    }

    /// A link to a member is gone, and maybe what was on its way; perhaps after the next one stood.
    pub(crate) fn on_link_lost(&mut self, peer: NodeId, number: u64, error: &LinkError) {
        let Some(entry) = self.peers.get_mut(&peer).filter(|p| p.number == number) else {
            return;
        };
        entry.link = None;
        // One that was closed may be that of a node that has ended, which the coordinator will say.
        if matches!(error, LinkError::Silent) {
            self.on_unreachable(peer);
        }
    }

    /// A member cannot be reached: the coordinator has to decide who stays.
    pub(crate) fn on_unreachable(&mut self, node: NodeId) {
        if let Some(member) = self.members.iter().find(|member| member.node == node) {
            let epoch = member.epoch;
            self.tell(ToCoordinator::Unreachable { node, epoch }, &[]);
            self.settle();
        }
    }

    /// Sends a message to another node, or has it wait for a link.
    pub(crate) fn send_peer(&mut self, to: NodeId, message: PeerMessage, raw: Bytes) {
        let Some(peer) = self.peers.get_mut(&to) else {
            return;
        };
        match &peer.link {
            Some(link) => link.send(&message, &raw),
            None => peer.backlog.push((message, raw)),
        }
    }

    /// A message of another node.
    pub(crate) fn on_peer(&mut self, from: NodeId, message: PeerMessage, raw: Bytes) {
        match self.behind.get_mut(&from) {
            Some(waiting) => waiting.push((message, raw)),
            None => self.on_message(from, message, raw),
        }
        self.settle();
    }

    fn on_message(&mut self, from: NodeId, message: PeerMessage, raw: Bytes) {
        let Some(segment) = message.segment() else {
            return self.on_flush(from, message);
        };
        if let PeerMessage::Sequential(run) = &message {
            self.note_arrival(run);
        }
        // Of a segment that is not known here nothing is held, and that can be said at once.
        let is_survey = matches!(
            message,
            PeerMessage::Sequential(PageRun {
                message: PageMessage::Survey { .. },
                ..
            })
        );
        if self.memory.is_tracked(segment) || is_survey {
            let waiting = self.memory.waiting();
            self.deliver(from, message, raw);
            self.expect(waiting);
        } else {
            // This node may have been made a home of a segment that nobody here has attached.
            let held = self.unknown.entry(segment).or_default();
            held.push((from, message, raw));
            if held.len() == 1 {
                self.tell(ToCoordinator::FindSegment { segment }, &[]);
            }
        }
    }

    fn on_flush(&mut self, from: NodeId, message: PeerMessage) {
        let mut waiting = self.unknown.values().flatten();
        if waiting.any(|(sender, ..)| *sender == from) {
            self.behind.insert(from, vec![(message, Bytes::new())]);
        } else if let PeerMessage::Flush { view } = message {
            self.drive(Input::Flush { from, view });
        }
    }

    /// Messages about a segment wait no longer: nor does what came after them.
    pub(crate) fn catch_up(&mut self) {
        let nodes: Vec<NodeId> = self.behind.keys().copied().collect();
        for from in nodes {
            for (message, raw) in self.behind.remove(&from).unwrap_or_default() {
                match self.behind.get_mut(&from) {
                    Some(waiting) => waiting.push((message, raw)),
                    None => self.on_message(from, message, raw),
                }
            }
        }
    }
}

/// Logs that pages are lost, in runs.
pub fn log_loss(extent: Extent, pages: &PageSet) {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for index in (0..EXTENT_PAGES).filter(|&index| pages.contains(index)) {
        let page = extent.first_page() + index;
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == page => *last = page,
            _ => runs.push((page, page)),
        }
    }
    for (first, last) in runs {
        tracing::error!(
            segment = extent.segment.0,
            first,
            last,
            "pages died with a node: SIGBUS for who touches them"
        );
    }
}
