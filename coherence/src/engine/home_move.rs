//! The move of an extent's directory to another home.
//!
//! The home stops starting transactions and waits for the end of those under way; then nothing
//! but its own last messages can still be on its way to somebody. The fence waits for these to
//! arrive, and the directory leaves. What came meanwhile, and what will come, is passed on.

use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

use migshm_protocol::page::{DirectoryEntry, PageMessage};
use migshm_protocol::{Extent, NodeId};

use super::directory::Directory;
use super::home::Work;
use super::{Action, Body, Context, Engine, Home, Known, NodeSet, first_page, is_node};

/// An extent on its way to another home.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Move<D> {
    pub(super) to: NodeId,
    /// Who has yet to acknowledge the fence; `None` while transactions are under way.
    pub(super) fence: Option<NodeSet>,
    /// For the new home.
    pub(super) queue: VecDeque<Work<D>>,
}

impl<D> Engine<D> {
    pub(super) fn move_home(&mut self, cx: &mut Context<'_, D>, extent: Extent, to: NodeId) {
        if to == self.me || !is_node(to) || !matches!(self.knows(first_page(extent)), Known::Yes) {
            return;
        }
        let is_settled = self.view.is_flushed() && !self.rebuilds.contains_key(&extent);
        if !is_settled || !self.view.is_member(to) {
            return;
        }
        match &mut self.extent_mut(extent).directory {
            Some(directory) if !directory.moving => directory.moving = true,
            _ => return,
        }
        self.moves.insert(
            extent,
            Move {
                to,
                fence: None,
                queue: VecDeque::new(),
            },
        );
        self.fence(cx, extent);
    }

    /// Once no transaction is under way, makes sure that every grant has arrived: what the next
    /// home says about a page must not overtake it.
    ///
    /// Also waits for write-backs of this node's own that left before it became the home, and
    /// come back to it: at the next home, one could be mistaken for a later one.
    pub(super) fn fence(&mut self, cx: &mut Context<'_, D>, extent: Extent) {
        let me = self.me;
        if !matches!(self.moves.get(&extent), Some(Move { fence: None, .. })) {
            return;
        }
        let state = self.extent_mut(extent);
        let Some(directory) = &state.directory else {
            return;
        };
        let lines = &mut state.lines.iter();
        if directory.busy() > 0 || lines.any(|line| line.state.is_written_back()) {
            return;
        }
        let mut fenced = NodeSet::default();
        for (page, _) in directory.touched() {
            fenced.insert_all(&directory.holders(page));
        }
        fenced.remove(me);
        for node in fenced {
            cx.send(node, PageMessage::Fence { extent }, Body::None);
        }
        if let Some(moving) = self.moves.get_mut(&extent) {
            moving.fence = Some(fenced);
        }
        self.transfer(cx, extent);
    }

    pub(super) fn fence_acked(&mut self, cx: &mut Context<'_, D>, extent: Extent, from: NodeId) {
        match self.moves.get_mut(&extent) {
            Some(Move {
                fence: Some(nodes), ..
            }) if nodes.contains(from) => {
                nodes.remove(from);
                self.transfer(cx, extent);
            }
            _ => self.protocol_error(),
        }
    }

    /// Hands the directory over once the fence is complete.
    fn transfer(&mut self, cx: &mut Context<'_, D>, extent: Extent) {
        if !self
            .moves
            .get(&extent)
            .is_some_and(|m| m.fence.is_some_and(|nodes| nodes.is_empty()))
        {
            return;
        }
        let Some(Move { to, queue, .. }) = self.moves.remove(&extent) else {
            return;
        };
        let state = self.extent_mut(extent);
        let Some(directory) = state.directory.take() else {
            return;
        };
        state.home = Home::At(to);
        state.was_home = true;
        let lost = directory.lost().map(|page| DirectoryEntry {
            page: page as u16,
            owner: None,
            sharers: NodeSet::default(),
        });
        let entries = directory.touched().map(|(page, owner)| DirectoryEntry {
            page: page as u16,
            owner: Some(owner),
            sharers: match directory.is_exclusive(page) {
                true => NodeSet::default(),
                false => directory.holders(page),
            },
        });
        let entries = entries.chain(lost).collect();
        cx.send(
            to,
            PageMessage::HomeTransfer { extent, entries },
            Body::None,
        );
        self.counters.home_moves += 1;
        for work in queue {
            self.relay(cx, to, work);
        }
    }

    pub(super) fn home_transferred(
        &mut self,
        cx: &mut Context<'_, D>,
        extent: Extent,
        entries: &[DirectoryEntry],
    ) {
        let state = self.extent_mut(extent);
        let pages = state.lines.len();
        if state.directory.is_some() || entries.iter().any(|e| usize::from(e.page) >= pages) {
            return self.protocol_error();
        }
        let mut directory = Directory::untouched(pages);
        for entry in entries {
            let page = usize::from(entry.page);
            match entry.owner {
                Some(owner) => directory.place(page, owner, &entry.sharers),
                None => directory.lose(page),
            }
        }
        state.directory = Some(directory);
        cx.out.push(Action::BecameHome { extent });
    }
}
