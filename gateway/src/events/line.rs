//! The lines of a source, and what each means to who follows it. No I/O: bytes in, steps out.

use std::ops::ControlFlow;

use memchr::memchr;
use serde::Deserialize;

use crate::session::{MAX_TTL, OwnedRevocation, Place, Record};

/// Longest line: a record as long as any, and what stands around it.
pub(super) const MAX_LINE_BYTES: usize = 8192 + 512;

/// Longest name of a log.
const MAX_LOG_BYTES: usize = 128;

/// Most entries of a snapshot: as many as can be remembered.
const MAX_ENTRIES: u64 = 1 << 20;

/// Most bytes of a snapshot's lines.
const MAX_SNAPSHOT_BYTES: usize = 256 * 1024 * 1024;

/// One line.
#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub(super) enum Line {
    /// Where the source is: the first line of every answer, and whenever there is nothing else to say.
    Here {
        /// Names the log. Another name: its numbers began anew.
        log: String,
        /// Number of its last event; 0 for none.
        last: u64,
    },
    /// The next event of the log.
    Event {
        /// Counts from 1 without gaps.
        number: u64,
        /// When it was made, unix milliseconds.
        #[serde(default)]
        at: Option<u64>,
        /// Unix seconds from which it may be forgotten.
        until: u64,
        revoke: Record<String>,
    },
    /// One of all that holds (a snapshot only).
    Entry { until: u64, revoke: Record<String> },
    /// The end of a snapshot, so that one that was cut off is not taken for whole.
    End {
        /// Entries there were.
        count: u64,
    },
}

/// What a source said that it must not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    #[error("a line that is none of the protocol's")]
    Malformed,
    #[error("a line that must not come here")]
    OutOfPlace,
    #[error("a snapshot with more or fewer entries than it says")]
    Count,
    #[error("a snapshot of more than can be remembered")]
    TooLarge,
    #[error("the answer ended within a line, or without its end")]
    CutOff,
}

/// Why all is read anew.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Because {
    /// Nothing of it is known yet.
    First,
    /// Events are missing.
    Gap,
    /// It is another log than the one that was read, or a shorter one.
    Rewritten,
}

impl Because {
    /// As a metric label.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Gap => "gap",
            Self::Rewritten => "rewritten",
        }
    }
}

/// Cuts what comes into lines, however it was cut on its way.
#[derive(Debug, Default)]
pub(super) struct Lines {
    /// The beginning of a line whose end has not come yet.
    rest: Vec<u8>,
}

impl Lines {
    /// Shows each line that ends in `data` to `each`, until it breaks. Blank ones are passed over.
    pub(super) fn take<T, E: From<Fault>>(
        &mut self,
        data: &[u8],
        mut each: impl FnMut(&[u8]) -> Result<ControlFlow<T>, E>,
    ) -> Result<ControlFlow<T>, E> {
        let mut data = data;
        while let Some((line, after)) = memchr(b'\n', data).and_then(|end| data.split_at_checked(end)) {
            data = after.get(1..).unwrap_or_default();
            let outcome = if self.rest.is_empty() {
                show(line, &mut each)
            } else {
                self.keep(line)?;
                let outcome = show(&self.rest, &mut each);
                self.rest.clear();
                outcome
            };
            if let ControlFlow::Break(outcome) = outcome? {
                return Ok(ControlFlow::Break(outcome));
            }
        }
        self.keep(data)?;
        Ok(ControlFlow::Continue(()))
    }

    /// Bounded before it is kept.
    fn keep(&mut self, part: &[u8]) -> Result<(), Fault> {
        if self.rest.len() + part.len() > MAX_LINE_BYTES {
            return Err(Fault::Malformed);
        }
        self.rest.extend_from_slice(part);
        Ok(())
    }

    /// Nothing more comes.
    pub(super) fn end(&self) -> Result<(), Fault> {
        if self.rest.is_empty() { Ok(()) } else { Err(Fault::CutOff) }
    }
}

fn show<T, E>(
    line: &[u8],
    mut each: impl FnMut(&[u8]) -> Result<ControlFlow<T>, E>,
) -> Result<ControlFlow<T>, E> {
    if line.trim_ascii().is_empty() { Ok(ControlFlow::Continue(())) } else { each(line) }
}

/// What a line of the log means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Everything is known.
    UpToDate,
    /// Events follow, or this one was known.
    Nothing,
    /// The place has moved on by this event.
    Enter {
        /// Nothing for one that nobody of ours could mean any more.
        revocation: Option<OwnedRevocation>,
        /// Unix milliseconds.
        at: Option<u64>,
    },
    /// Read the snapshot.
    Repair(Because),
}

/// Reads the log from a place on.
#[derive(Debug)]
pub(super) struct Reading<'a> {
    place: &'a mut Place,
    begun: bool,
}

impl<'a> Reading<'a> {
    pub(super) fn from(place: &'a mut Place) -> Self {
        Self { place, begun: false }
    }

    pub(super) fn place(&self) -> &Place {
        self.place
    }

    /// The event that was taken last did not come in after all: it is asked for again.
    pub(super) fn undo(&mut self) {
        self.place.number = self.place.number.saturating_sub(1);
    }

    pub(super) fn take(&mut self, line: &[u8], now: u64) -> Result<Step, Fault> {
        match parse(line)? {
            Line::Here { log, last } => {
                let first = !std::mem::replace(&mut self.begun, true);
                Ok(if log != self.place.log || last < self.place.number {
                    Step::Repair(Because::Rewritten)
                } else if last == self.place.number {
                    Step::UpToDate
                } else if first {
                    Step::Nothing
                } else {
                    // All that was made before this line stands before it.
                    Step::Repair(Because::Gap)
                })
            }
            Line::Event { number, at, until, revoke } if self.begun => {
                if number <= self.place.number {
                    return Ok(Step::Nothing);
                }
                if number != self.place.number + 1 {
                    return Ok(Step::Repair(Because::Gap));
                }
                let revocation = revocation(revoke, until, now)?;
                self.place.number = number;
                Ok(Step::Enter { revocation, at })
            }
            Line::Event { .. } | Line::Entry { .. } | Line::End { .. } => Err(Fault::OutOfPlace),
        }
    }
}

/// What a line of a snapshot means.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Copied {
    /// Go on.
    Nothing,
    /// One that holds.
    Enter(OwnedRevocation),
    /// That was all; the log goes on from here.
    Whole(Place),
}

/// Reads a snapshot.
#[derive(Debug, Default)]
pub(super) struct Copying {
    here: Option<Place>,
    count: u64,
    bytes: usize,
}

impl Copying {
    pub(super) fn take(&mut self, line: &[u8], now: u64) -> Result<Copied, Fault> {
        self.bytes += line.len();
        if self.bytes > MAX_SNAPSHOT_BYTES || self.count > MAX_ENTRIES {
            return Err(Fault::TooLarge);
        }
        match (parse(line)?, &self.here) {
            (Line::Here { log, last }, None) => {
                self.here = Some(Place { log, number: last });
                Ok(Copied::Nothing)
            }
            // So that the connection is seen to live.
            (Line::Here { .. }, Some(_)) => Ok(Copied::Nothing),
            (Line::Entry { until, revoke }, Some(_)) => {
                self.count += 1;
                Ok(revocation(revoke, until, now)?.map_or(Copied::Nothing, Copied::Enter))
            }
            (Line::End { count }, Some(here)) if count == self.count => Ok(Copied::Whole(here.clone())),
            (Line::End { .. }, Some(_)) => Err(Fault::Count),
            (Line::Event { .. } | Line::Entry { .. } | Line::End { .. }, _) => Err(Fault::OutOfPlace),
        }
    }
}

fn parse(line: &[u8]) -> Result<Line, Fault> {
    if line.len() > MAX_LINE_BYTES {
        return Err(Fault::Malformed);
    }
    let line: Line = serde_json::from_slice(line).map_err(|_| Fault::Malformed)?;
    match &line {
        Line::Here { log, .. } if log.is_empty() || log.len() > MAX_LOG_BYTES => Err(Fault::Malformed),
        _ => Ok(line),
    }
}

/// Nothing for one that has expired.
fn revocation(record: Record<String>, until: u64, now: u64) -> Result<Option<OwnedRevocation>, Fault> {
    let revocation = record.revocation(until.min(now.saturating_add(MAX_TTL))).ok_or(Fault::Malformed)?;
    Ok(Some(revocation).filter(|it| now < it.until))
}

/// What an answer was read as; for the fuzz target.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct LinesRead {
    /// Events that moved the place.
    pub steps: u64,
    /// Where the place is then.
    pub number: u64,
    /// Whether everything was known at some line.
    pub up_to_date: bool,
    /// What would be entered of events.
    pub events: Vec<OwnedRevocation>,
    /// What would be entered of a snapshot, and whether it was whole.
    pub entries: (Vec<OwnedRevocation>, bool),
}

/// Reads `bytes`, coming `cut` at a time, at `now`, as lines of the log `a` after number `after`, and as a snapshot; each as far as
/// they go.
pub fn read_lines(bytes: &[u8], cut: usize, after: u64, now: u64) -> LinesRead {
    let mut read = LinesRead::default();
    let mut place = Place { log: "a".to_owned(), number: after };
    let (mut lines, mut reading) = (Lines::default(), Reading::from(&mut place));
    for data in bytes.chunks(cut.max(1)) {
        let taken = lines.take(data, |line| {
            match reading.take(line, now)? {
                Step::Enter { revocation, .. } => {
                    read.steps += 1;
                    read.events.extend(revocation);
                }
                Step::UpToDate => read.up_to_date = true,
                Step::Nothing => {}
                Step::Repair(_) => return Ok(ControlFlow::Break(())),
            }
            Ok::<_, Fault>(ControlFlow::Continue(()))
        });
        if !matches!(taken, Ok(ControlFlow::Continue(()))) {
            break;
        }
    }
    read.number = place.number;
    let (mut lines, mut copying) = (Lines::default(), Copying::default());
    for data in bytes.chunks(cut.max(1)) {
        let taken = lines.take(data, |line| {
            match copying.take(line, now)? {
                Copied::Enter(revocation) => read.entries.0.push(revocation),
                Copied::Nothing => {}
                Copied::Whole(_) => return Ok(ControlFlow::Break(())),
            }
            Ok::<_, Fault>(ControlFlow::Continue(()))
        });
        read.entries.1 = matches!(taken, Ok(ControlFlow::Break(())));
        if !matches!(taken, Ok(ControlFlow::Continue(()))) {
            break;
        }
    }
    read
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::{Journal, Revocations, Target};
    use proptest::prelude::*;
    use sealgate_policy::{Identity, IdentityParts};
    use std::collections::BTreeMap;

    const NOW: u64 = 1_000_000;

    fn at(number: u64) -> Place {
        Place { log: "a".into(), number }
    }

    fn here(log: &str, last: u64) -> String {
        format!(r#"{{"type":"here","log":"{log}","last":{last}}}"#)
    }

    fn record(session: &str) -> String {
        format!(r#"{{"kind":"session","issuer":"i","id":"{session}"}}"#)
    }

    fn event(number: u64, session: &str, until: u64) -> String {
        format!(r#"{{"type":"event","number":{number},"at":5,"until":{until},"revoke":{}}}"#, record(session))
    }

    fn entry(session: &str, until: u64) -> String {
        format!(r#"{{"type":"entry","until":{until},"revoke":{}}}"#, record(session))
    }

    fn read(place: &mut Place, lines: &[String]) -> Result<Step, Fault> {
        let mut reading = Reading::from(place);
        let mut last = Err(Fault::OutOfPlace);
        for line in lines {
            last = reading.take(line.as_bytes(), NOW);
        }
        last
    }

    #[test]
    fn the_log_is_read_step_by_step_and_gaps_are_seen() {
        let mut place = at(3);
        let entered = read(&mut place, &[here("a", 4), event(3, "s", NOW + 9), event(4, "s", NOW + 9)]);
        assert!(matches!(entered, Ok(Step::Enter { revocation: Some(_), at: Some(5) })));
        assert_eq!(place, at(4));
        assert_eq!(read(&mut place, &[here("a", 4)]), Ok(Step::UpToDate));
        assert_eq!(read(&mut place, &[here("a", 9)]), Ok(Step::Nothing), "they follow");
        for (lines, because) in [
            (vec![here("a", 9), event(6, "s", NOW + 9)], Because::Gap),
            (vec![here("a", 5), here("a", 5)], Because::Gap),
            (vec![here("a", 3)], Because::Rewritten),
            (vec![here("b", 4)], Because::Rewritten),
            (vec![here("a", 4), here("b", 4)], Because::Rewritten),
        ] {
            assert_eq!(read(&mut place, &lines), Ok(Step::Repair(because)), "{lines:?}");
        }
        assert_eq!(place, at(4));
        // One that has expired is a step too.
        let expired = read(&mut place, &[here("a", 5), event(5, "s", NOW)]);
        assert_eq!((expired, place), (Ok(Step::Enter { revocation: None, at: Some(5) }), at(5)));
    }

    #[test]
    fn what_is_not_the_protocol_moves_nothing() {
        let mut place = at(4);
        for line in [
            String::new(),
            "{}".into(),
            "[]".into(),
            r#"{"type":"other"}"#.into(),
            r#"{"type":"here","log":"","last":4}"#.into(),
            r#"{"type":"here","log":"a","last":-1}"#.into(),
            format!(r#"{{"type":"here","log":"{}","last":4}}"#, "a".repeat(MAX_LOG_BYTES + 1)),
            r#"{"type":"event","number":5,"until":2000000,"revoke":{"kind":"other","issuer":"i"}}"#.into(),
            r#"{"type":"event","number":5,"until":2000000,"revoke":{"kind":"session","issuer":"i"}}"#.into(),
            r#"{"type":"event","number":5,"revoke":{"kind":"issuer","issuer":"i"}}"#.into(),
            event(5, "s", NOW + 9).replace("\"number\":5", "\"number\":5,\"number\":5"),
            event(5, "s", NOW + 9).replace("\"number\":5", "\"number\":5.0"),
            event(5, "s", NOW + 9).replace("\"number\":5", "\"number\":\"5\""),
            event(5, "s", NOW + 9).replace("\"at\":5", "\"at\":5,\"more\":1"),
            event(5, "s", NOW + 9).replace("\"id\":", "\"sub\":\"u\",\"id\":"),
            format!("{} {}", event(5, "s", NOW + 9), event(6, "s", NOW + 9)),
            event(5, &"s".repeat(MAX_LINE_BYTES), NOW + 9),
        ] {
            assert_eq!(read(&mut place, &[here("a", 5), line.clone()]), Err(Fault::Malformed), "{line}");
        }
        for lines in [vec![event(5, "s", NOW + 9)], vec![here("a", 5), entry("s", NOW + 9)]] {
            assert_eq!(read(&mut place, &lines), Err(Fault::OutOfPlace));
        }
        assert_eq!(place, at(4));
    }

    #[test]
    fn an_event_that_found_no_room_is_asked_for_again() {
        let mut place = at(4);
        let mut reading = Reading::from(&mut place);
        reading.take(here("a", 6).as_bytes(), NOW).unwrap();
        reading.take(event(5, "s", NOW + 9).as_bytes(), NOW).unwrap();
        reading.take(event(6, "t", NOW + 9).as_bytes(), NOW).unwrap();
        reading.undo();
        assert_eq!(place, at(5));
        let again = read(&mut place, &[here("a", 6), event(6, "t", NOW + 9)]);
        assert!(matches!(again, Ok(Step::Enter { revocation: Some(_), .. })));
    }

    #[test]
    fn lines_and_snapshots_are_bounded() {
        let mut lines = Lines::default();
        let mut take =
            |data: &[u8]| lines.take(data, |line| Ok::<_, Fault>(ControlFlow::<usize>::Break(line.len())));
        assert_eq!(take(&vec![b'a'; MAX_LINE_BYTES]), Ok(ControlFlow::Continue(())));
        assert_eq!(take(b""), Ok(ControlFlow::Continue(())));
        assert_eq!(take(b"\n"), Ok(ControlFlow::Break(MAX_LINE_BYTES)));
        assert_eq!(take(&vec![b'a'; MAX_LINE_BYTES + 1]), Err(Fault::Malformed));
        // One that comes whole is not longer either: see `parse`.
        assert_eq!(lines.end(), Ok(()));
        let mut copying = Copying { count: MAX_ENTRIES, ..Copying::default() };
        copying.take(here("a", 7).as_bytes(), NOW).unwrap();
        assert!(copying.take(entry("s", NOW + 9).as_bytes(), NOW).is_ok());
        assert_eq!(copying.take(entry("s", NOW + 9).as_bytes(), NOW), Err(Fault::TooLarge));
        let mut copying = Copying { bytes: MAX_SNAPSHOT_BYTES, ..Copying::default() };
        assert_eq!(copying.take(here("a", 7).as_bytes(), NOW), Err(Fault::TooLarge));
    }

    #[test]
    fn a_snapshot_counts_only_when_it_is_whole() {
        let copy = |lines: &[String]| {
            let mut copying = Copying::default();
            lines.iter().map(|line| copying.take(line.as_bytes(), NOW)).collect::<Vec<_>>()
        };
        let end = |count| format!(r#"{{"type":"end","count":{count}}}"#);
        let lines = [here("a", 7), entry("s", NOW + 9), here("a", 8), entry("t", NOW), end(2)];
        let steps = copy(&lines);
        assert!(matches!(&steps[1], Ok(Copied::Enter(it)) if it.until == NOW + 9));
        assert_eq!(steps[2..], [Ok(Copied::Nothing), Ok(Copied::Nothing), Ok(Copied::Whole(at(7)))]);
        assert_eq!(copy(&[here("a", 7), entry("s", NOW + 9), end(2)])[2], Err(Fault::Count));
        assert_eq!(copy(&[entry("s", NOW + 9)]), [Err(Fault::OutOfPlace)]);
        assert_eq!(copy(&[end(0)]), [Err(Fault::OutOfPlace)]);
        assert_eq!(copy(&[here("a", 7), event(8, "s", NOW + 9)])[1], Err(Fault::OutOfPlace));
    }

    /// A source as the protocol has it.
    struct Source {
        log: u64,
        last: u64,
        kept: BTreeMap<u64, (String, u64)>,
        live: BTreeMap<String, u64>,
    }

    impl Source {
        fn events(&self, after: &Place) -> Vec<String> {
            let head = here(&self.log.to_string(), self.last);
            let events = self.kept.range(after.number + 1..);
            let events = events.map(|(number, (session, until))| event(*number, session, *until));
            [head.clone()].into_iter().chain(events).chain([head]).collect()
        }

        fn snapshot(&self) -> Vec<String> {
            let entries = self.live.iter().map(|(session, until)| entry(session, *until));
            let end = format!(r#"{{"type":"end","count":{}}}"#, self.live.len());
            [here(&self.log.to_string(), self.last)].into_iter().chain(entries).chain([end]).collect()
        }
    }

    /// A gateway that follows it; nothing when what it heard was cut off.
    fn follow(source: &Source, journal: &Journal, table: &Revocations, now: u64, cut: usize) -> Option<()> {
        let enter = |revocation: &OwnedRevocation| {
            table.revoke(&revocation.borrowed(), now).unwrap();
            journal.keep(&revocation.borrowed());
        };
        let mut place = journal.place("s");
        loop {
            let Some(known) = &mut place else {
                let mut copying = Copying::default();
                for line in source.snapshot().iter().take(cut) {
                    match copying.take(line.as_bytes(), now).unwrap() {
                        Copied::Nothing => {}
                        Copied::Enter(revocation) => enter(&revocation),
                        Copied::Whole(here) => {
                            journal.keep_place("s", &here);
                            place = Some(here);
                        }
                    }
                }
                place.as_ref()?;
                continue;
            };
            let lines = source.events(known);
            let mut reading = Reading::from(known);
            let mut repair = false;
            for line in lines.iter().take(cut) {
                match reading.take(line.as_bytes(), now).unwrap() {
                    Step::UpToDate => return Some(()),
                    Step::Nothing => {}
                    Step::Enter { revocation, .. } => {
                        revocation.iter().for_each(enter);
                        journal.keep_place("s", reading.place);
                    }
                    Step::Repair(_) => {
                        repair = true;
                        break;
                    }
                }
            }
            if !repair {
                return None;
            }
            place = None;
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// However an answer is cut on its way, it is read as the same, and never past what it should not have said.
        #[test]
        fn it_is_the_same_however_it_comes(
            parts in prop::collection::vec((0u8..8, 0u64..9), 0..20),
            cut in 1usize..80,
        ) {
            let mut text = String::new();
            for (kind, number) in &parts {
                text += &match kind {
                    0..=1 => here("a", *number),
                    2..=3 => event(*number, "s", NOW + number),
                    4 => entry("s", NOW + number),
                    5 => format!(r#"{{"type":"end","count":{number}}}"#),
                    6 => " ".to_owned(),
                    _ => here("b", *number),
                };
                text += if *number == 8 { "\r\n" } else { "\n" };
            }
            let whole = read_lines(text.as_bytes(), usize::MAX, 3, NOW);
            prop_assert_eq!(&whole, &read_lines(text.as_bytes(), cut, 3, NOW));
            prop_assert_eq!(whole.number, 3 + whole.steps);
            prop_assert!(whole.events.iter().chain(&whole.entries.0).all(|it| it.until > NOW));
        }

        /// Whatever happens between: once all was heard, exactly that is refused which the source holds, or held when it was heard.
        #[test]
        fn no_order_of_things_loses_or_resurrects(
            steps in prop::collection::vec((0u8..9, 0u8..5, 0u64..40), 1..50),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let mut now = NOW;
            let mut source = Source { log: 0, last: 0, kept: BTreeMap::new(), live: BTreeMap::new() };
            let (mut journal, _) = Journal::open(folder.path(), 1000, now).unwrap();
            let mut table = Revocations::new(1000);
            let mut ever: BTreeMap<String, u64> = BTreeMap::new();
            for (step, name, span) in steps.into_iter().chain([(8, 0, 0)]) {
                match step {
                    0..=2 => {
                        let (name, until) = (name.to_string(), now + span);
                        source.last += 1;
                        source.kept.insert(source.last, (name.clone(), until));
                        for known in [&mut source.live, &mut ever] {
                            let held = known.entry(name.clone()).or_insert(until);
                            *held = until.max(*held);
                        }
                    }
                    3 => now += span / 4,
                    // It forgets the beginning of its log, or one event in the middle.
                    4 => source.kept = source.kept.split_off(&(source.last.saturating_sub(span / 8))),
                    5 => drop(source.kept.remove(&(source.last.saturating_sub(u64::from(name))))),
                    // It was set up anew, and counts from 0.
                    6 => (source.log, source.last, source.kept) = (source.log + 1, 0, BTreeMap::new()),
                    7 => {
                        drop(journal);
                        let (opened, kept) = Journal::open(folder.path(), 1000, now).unwrap();
                        journal = opened;
                        table = Revocations::new(1000);
                        kept.iter(now).for_each(|it| table.revoke(&it.borrowed(), now).unwrap());
                    }
                    _ => {
                        let cut = if span == 0 { usize::MAX } else { span as usize };
                        let whole = follow(&source, &journal, &table, now, cut).is_some();
                        prop_assert!(whole || cut != usize::MAX);
                        source.live.retain(|_, until| now < *until);
                        for name in 0..5 {
                            let name = name.to_string();
                            let who = Identity::new(IdentityParts {
                                issuer: "i".into(),
                                session: Some(name.clone()),
                                ..IdentityParts::default()
                            });
                            let refused = table.is_revoked(&who, now);
                            let held = ever.get(&name).is_some_and(|until| now < *until);
                            prop_assert!(held || !refused, "nothing else is refused");
                            prop_assert!(refused || !held || !whole, "nothing is lost");
                            let target = Target::Session { issuer: "i", session: &name };
                            prop_assert_eq!(table.holds(&target, 0, now), refused);
                        }
                    }
                }
            }
        }
    }
}
