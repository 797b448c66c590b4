//! Sessions: an exhaustive search (stateright) of what a node and a coordinator that stores its state can
//! come to, with links lost and the coordinator ended at every moment.

use std::collections::VecDeque;

use bytes::Bytes;
use migshm_protocol::codec::{self, FRAME_HEADER};
use migshm_protocol::session::{Cursor, Header, Mark, Session, Violation, opening};
use stateright::{Checker, Model, Property};

/// What opens a link, both ways.
const OPENING: u8 = 255;
/// The coordinator's own messages, which it would not send again the same if it came to that.
const TICK: u8 = 100;
/// Its answer to a message, less that.
const ANSWER: u8 = 50;

/// How the protocol is broken, to see the search find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutation {
    /// The coordinator's messages are sent before they are stored.
    ShowsWhatIsNotStored,
    /// It says that it has what it has not stored.
    ClaimsWhatIsNotStored,
    /// A new link begins with what is sent after.
    SendsNothingAgain,
    /// Messages that have been before are handled again.
    TakesTwice,
}

#[derive(Clone, Copy, Debug)]
struct Search {
    messages: u8,
    ticks: u8,
    losses: u8,
    crashes: u8,
    mutation: Option<Mutation>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    node: Side,
    coordinator: Side,
    /// The coordinator, as it would be started again.
    stored: Side,
    link: Option<Link>,
    losses: u8,
    crashes: u8,
    violated: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Side {
    session: Session,
    sent: Vec<u8>,
    taken: Vec<u8>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Link {
    up: VecDeque<Bytes>,
    down: VecDeque<Bytes>,
    /// How far each side is, once the other has said what it has.
    node: Option<Cursor>,
    coordinator: Option<Cursor>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Send,
    Tick,
    Up,
    Down,
    Store,
    Lose,
    Connect,
    Crash,
}

impl Side {
    fn send(&mut self, content: u8) {
        self.session.send(&content, &[]).expect("it fits");
        self.sent.push(content);
    }

    fn mark(&self) -> Mark {
        self.session.mark()
    }
}

fn parse(frame: &Bytes) -> (Header, u8) {
    let (header, rest) = codec::decode::<Header>(&frame[FRAME_HEADER..]).expect("a header");
    (header, codec::decode(rest).expect("a message").0)
}

impl State {
    /// What the coordinator shows of itself.
    fn shown(&self, search: &Search) -> Mark {
        let stored = self.stored.mark();
        let all = self.coordinator.mark();
        match search.mutation {
            Some(Mutation::ShowsWhatIsNotStored) => all,
            Some(Mutation::ClaimsWhatIsNotStored) => Mark {
                sent: stored.sent,
                ..all
            },
            _ => stored,
        }
    }

    fn flush(&mut self, search: &Search) {
        let mark = self.shown(search);
        let Some(link) = &mut self.link else { return };
        if let Some(cursor) = &mut link.node {
            let session = &self.node.session;
            cursor.advance(session, session.mark(), |frame| link.up.push_back(frame));
        }
        if let Some(cursor) = &mut link.coordinator {
            let push = |frame| link.down.push_back(frame);
            cursor.advance(&self.coordinator.session, mark, push);
        }
    }

    fn resume(session: &mut Session, received: u64, search: &Search) -> Result<Cursor, Violation> {
        let cursor = session.resume(received)?;
        Ok(match search.mutation {
            Some(Mutation::SendsNothingAgain) => {
                let mut at_end = cursor;
                at_end.advance(session, session.mark(), drop);
                at_end
            }
            _ => cursor,
        })
    }

    /// A frame arrives at the coordinator.
    fn up(&mut self, search: &Search, frame: &Bytes) -> Result<(), Violation> {
        let (header, content) = parse(frame);
        let claimed = self.shown(search).received;
        let Side { session, taken, .. } = &mut self.coordinator;
        if content == OPENING {
            let cursor = Self::resume(session, header.received, search)?;
            let link = self.link.as_mut().expect("it came on it");
            link.coordinator = Some(cursor);
            link.down
                .push_back(opening(&OPENING, claimed).expect("it fits"));
        } else if session.receive(header)? || search.mutation == Some(Mutation::TakesTwice) {
            taken.push(content);
            self.coordinator.send(content + ANSWER);
        }
        Ok(())
    }

    /// A frame arrives at the node.
    fn down(&mut self, search: &Search, frame: &Bytes) -> Result<(), Violation> {
        let (header, content) = parse(frame);
        let Side { session, taken, .. } = &mut self.node;
        if content == OPENING {
            let cursor = Self::resume(session, header.received, search)?;
            self.link.as_mut().expect("it came on it").node = Some(cursor);
        } else if session.receive(header)? {
            taken.push(content);
        }
        Ok(())
    }
}

const NODE_SEES_WHAT_STANDS: &str =
    "the node has taken the first messages of the coordinator, once and in order";
const COORDINATOR_TOO: &str =
    "the coordinator has taken the first messages of the node, once and in order";
const NO_VIOLATION: &str = "no side sees the other break the rules";
const NOTHING_IS_LOST: &str = "where nothing is under way, all is taken";
const ALL_WORKS: &str = "all is taken in the end, after losses and crashes";

fn is_idle(link: &Link) -> bool {
    link.node.is_some() && link.coordinator.is_some() && link.up.is_empty() && link.down.is_empty()
}

impl Model for Search {
    type State = State;
    type Action = Step;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            node: Side::default(),
            coordinator: Side::default(),
            stored: Side::default(),
            link: None,
            losses: self.losses,
            crashes: self.crashes,
            violated: false,
        }]
    }

    fn actions(&self, state: &State, steps: &mut Vec<Step>) {
        if state.violated {
            return;
        }
        if state.node.sent.len() < self.messages.into() {
            steps.push(Step::Send);
        }
        let ticks = state
            .coordinator
            .sent
            .iter()
            .filter(|c| **c >= TICK)
            .count();
        if ticks < self.ticks.into() {
            steps.push(Step::Tick);
        }
        match &state.link {
            None => steps.push(Step::Connect),
            Some(link) => {
                steps.extend((!link.up.is_empty()).then_some(Step::Up));
                steps.extend((!link.down.is_empty()).then_some(Step::Down));
                steps.extend((state.losses > 0).then_some(Step::Lose));
            }
        }
        if state.stored != state.coordinator {
            steps.push(Step::Store);
        }
        steps.extend((state.crashes > 0).then_some(Step::Crash));
    }

    fn next_state(&self, state: &State, step: Step) -> Option<State> {
        let mut next = state.clone();
        let mut result = Ok(());
        match step {
            Step::Send => next.node.send(state.node.sent.len() as u8),
            // What it says depends on when it is said, as what calls do depends on their order.
            Step::Tick => next
                .coordinator
                .send(TICK + state.coordinator.sent.len() as u8),
            Step::Up => {
                let frame = next.link.as_mut()?.up.pop_front()?;
                result = next.up(self, &frame);
            }
            Step::Down => {
                let frame = next.link.as_mut()?.down.pop_front()?;
                result = next.down(self, &frame);
            }
            Step::Store => next.stored = next.coordinator.clone(),
            Step::Lose => {
                next.link = None;
                next.losses -= 1;
            }
            Step::Connect => {
                let mut link = Link::default();
                let received = next.node.mark().received;
                link.up
                    .push_back(opening(&OPENING, received).expect("it fits"));
                next.link = Some(link);
            }
            Step::Crash => {
                next.coordinator = next.stored.clone();
                next.link = None;
                next.crashes -= 1;
            }
        }
        next.violated = result.is_err();
        next.flush(self);
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn all_is_taken(s: &State) -> bool {
            s.node.taken == s.coordinator.sent && s.coordinator.taken == s.node.sent
        }
        vec![
            Property::always(NODE_SEES_WHAT_STANDS, |_, s: &State| {
                s.coordinator.sent.starts_with(&s.node.taken)
            }),
            Property::always(COORDINATOR_TOO, |_, s: &State| {
                s.node.sent.starts_with(&s.coordinator.taken)
            }),
            Property::always(NO_VIOLATION, |_, s: &State| !s.violated),
            Property::always(NOTHING_IS_LOST, |_, s: &State| {
                let is_quiet = s.link.as_ref().is_some_and(is_idle) && s.stored == s.coordinator;
                !is_quiet || all_is_taken(s)
            }),
            Property::sometimes(ALL_WORKS, |search: &Search, s: &State| {
                let spent = s.losses == 0 && s.crashes == 0;
                spent && s.node.sent.len() == usize::from(search.messages) && all_is_taken(s)
            }),
        ]
    }
}

fn search() -> Search {
    Search {
        messages: 2,
        ticks: 1,
        losses: 1,
        crashes: 1,
        mutation: None,
    }
}

#[test]
fn every_message_is_taken_once_and_in_order_whatever_is_lost() {
    for (losses, crashes) in [(2, 1), (1, 2)] {
        let search = Search {
            messages: 3,
            losses,
            crashes,
            ..search()
        };
        let checker = search.checker().spawn_bfs().join();
        println!(
            "{losses} losses, {crashes} crashes: {} states",
            checker.unique_state_count()
        );
        checker.assert_properties();
    }
}

#[test]
fn the_search_finds_what_is_broken() {
    for (mutation, properties) in [
        (
            Mutation::ShowsWhatIsNotStored,
            [NODE_SEES_WHAT_STANDS, NO_VIOLATION],
        ),
        (
            Mutation::ClaimsWhatIsNotStored,
            [NO_VIOLATION, NO_VIOLATION],
        ),
        (Mutation::SendsNothingAgain, [NOTHING_IS_LOST, NO_VIOLATION]),
        (Mutation::TakesTwice, [COORDINATOR_TOO, COORDINATOR_TOO]),
    ] {
        let broken = Search {
            mutation: Some(mutation),
            ..search()
        };
        let checker = broken.checker().spawn_bfs().join();
        for property in properties {
            assert!(
                checker.discovery(property).is_some(),
                "{mutation:?}: {property}"
            );
        }
    }
}

#[test]
fn a_side_that_says_nothing_says_at_times_what_it_has() {
    let (mut talker, mut listener) = (Session::default(), Session::default());
    let mut cursor = listener.resume(0).expect("a new session");
    for number in 1..=1000 {
        talker.send(&number, &[]).expect("it fits");
        let header = Header {
            number,
            received: 0,
        };
        assert_eq!(listener.receive(header), Ok(true));
        cursor.advance(&listener, listener.mark(), |frame| {
            let (header, _) = codec::decode::<Header>(&frame[FRAME_HEADER..]).expect("a header");
            assert_eq!(talker.receive(header), Ok(false));
        });
        assert!(talker.kept() < 100);
    }
}

#[test]
fn nobody_is_believed_to_have_what_was_not_sent() {
    let mut session = Session::default();
    session.send(&1u8, &[]).expect("it fits");
    let claim = |received| Header {
        number: 0,
        received,
    };
    assert!(session.receive(claim(2)).is_err());
    assert_eq!(session.receive(claim(1)), Ok(false));
    assert!(session.resume(0).is_err(), "it is kept no longer");
    assert_eq!(session.receive(claim(0)), Ok(false), "an old claim");
    let skipped = Header {
        number: 2,
        received: 0,
    };
    assert_eq!(
        session.receive(skipped),
        Err(Violation::Gap {
            number: 2,
            after: 0
        })
    );
}
