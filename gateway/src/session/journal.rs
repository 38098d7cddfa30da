//! Revocations on disk, so that a restart of the gateway forgives nobody.
//!
//! A log in the state folder (0600): appended to and synced before a revocation counts as kept, by a thread of its own, which
//! takes all that came meanwhile in one go; rewritten when most of it is out of date. What was being appended when the machine
//! stopped may be torn, and nobody was told that it was kept. Damage anywhere else is a fault: what stood there is not known.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, BufWriter, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ring::digest::{SHA256, digest};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::record::{MAX_RECORD_BYTES, OwnedRevocation, decode, encode};
use super::revocation::Revocation;
use crate::lock::lock;

const FILE: &str = "revocations.log";

/// What the first line begins with; the number of lines that were written together with it follows.
const MAGIC: &str = "sealgate-revocations 1 ";

/// Longest line: a record, and the numbers before it.
const MAX_LINE_BYTES: usize = MAX_RECORD_BYTES + 128;

/// Lines that may be out of date before it is worth while to write all anew.
const SLACK: u64 = 4096;

/// Sources of events whose place is kept.
const MAX_PLACES: usize = 64;

/// Between attempts on a disk that failed.
const RETRY: Duration = Duration::from_secs(1);

/// Why the journal cannot be used. The gateway does not start then.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum JournalError {
    /// Bytes that were once kept are not what they were.
    #[error(
        "{}:{line}: damaged: what was revoked there would count again; bring the file back from a copy, or move it away to \
         start without all that it held",
        path.display()
    )]
    Damaged { path: PathBuf, line: u64 },
    /// Another program's file, or a later version's.
    #[error("{}: no log of revocations that this version can read", path.display())]
    Version { path: PathBuf },
    /// The lock is held.
    #[error("{}: another gateway keeps its revocations there; each needs a state folder of its own", path.display())]
    InUse { path: PathBuf },
    /// The file system refuses.
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

/// How far events of a source were followed: everything up to `number` of its log is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Names the log: numbers of another mean something else.
    pub log: String,
    /// Number of the last event that was taken in.
    pub number: u64,
}

/// What stood in the journal, without what has expired.
#[derive(Debug, Default)]
pub struct Kept {
    /// Records (see [`decode`]) and when each may be forgotten.
    pub revocations: HashMap<Arc<str>, u64>,
    /// Places by the name of their source.
    pub places: HashMap<Arc<str>, Place>,
    /// Whether the last lines were torn, and dropped.
    pub torn: bool,
}

impl Kept {
    /// The revocations themselves.
    pub fn iter(&self, now: u64) -> impl Iterator<Item = OwnedRevocation> {
        self.revocations.iter().filter_map(move |(record, until)| decode(record.as_bytes(), *until, now))
    }
}

/// Up to which entry the journal must be on disk for something to be kept; nothing if it cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark(Option<u64>);

impl Mark {
    /// Whether it can be.
    #[must_use]
    pub fn is_possible(self) -> bool {
        self.0.is_some()
    }
}

/// The face of it.
pub struct Journal {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    progress: watch::Sender<Progress>,
}

#[derive(Default)]
struct State {
    capacity: usize,
    live: HashMap<Arc<str>, u64>,
    places: HashMap<Arc<str>, Place>,
    /// Bodies of lines that are to be appended.
    pending: Vec<String>,
    /// Entries that were ever asked for.
    asked: u64,
    closed: bool,
}

/// Entries that are on disk, and those up to which the last attempt failed.
#[derive(Debug, Clone, Copy, Default)]
struct Progress {
    kept: u64,
    failed: u64,
}

impl Journal {
    /// Opens the journal in the folder `state`, and gives what it holds at `now` (unix seconds). It is written anew at once:
    /// a folder that cannot be written is found here.
    ///
    /// # Errors
    /// See [`JournalError`].
    pub fn open(state: &Path, capacity: usize, now: u64) -> Result<(Self, Kept), JournalError> {
        let path = state.join(FILE);
        let fault = |error| JournalError::Io { path: path.clone(), error };
        let lock_path = path.with_extension("lock");
        let guard = private().append(true).create(true).open(&lock_path).map_err(fault)?;
        flock(&guard, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| JournalError::InUse { path: lock_path })?;
        let kept = match File::open(&path) {
            Ok(file) => read(BufReader::new(file), now).map_err(|error| error.at(&path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Kept::default(),
            Err(error) => return Err(fault(error)),
        };
        if kept.torn {
            tracing::warn!(
                path = %path.display(),
                "the last revocations before the gateway stopped were not written whole; nobody was told that they were"
            );
        }
        let mut writer = Writer { path: path.clone(), file: None, lines: 0, _lock: guard };
        writer.rewrite(&kept.revocations, &kept.places).map_err(fault)?;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                capacity,
                live: kept.revocations.clone(),
                places: kept.places.clone(),
                ..State::default()
            }),
            wake: Condvar::new(),
            progress: watch::Sender::new(Progress::default()),
        });
        let with = shared.clone();
        let thread = std::thread::Builder::new().name("sealgate-journal".to_owned());
        let thread = thread.spawn(move || with.write_for_ever(writer)).map_err(fault)?;
        Ok((Self { shared, thread: Mutex::new(Some(thread)) }, kept))
    }

    /// Has a revocation written. Never waits; see [`kept`](Self::kept).
    pub fn keep(&self, revocation: &Revocation<'_>) -> Mark {
        let record = encode(revocation);
        let state = &mut *lock(&self.shared.state);
        let full = state.live.len() >= state.capacity;
        match state.live.get_mut(record.as_str()) {
            Some(until) if *until >= revocation.until => return Mark(Some(state.asked)),
            Some(until) => *until = revocation.until,
            None if full || record.len() > MAX_RECORD_BYTES => return Mark(None),
            None => drop(state.live.insert(record.as_str().into(), revocation.until)),
        }
        self.post(state, format!("r {} {record}", revocation.until))
    }

    /// Has a source's place written, behind all revocations that were given before it.
    pub fn keep_place(&self, source: &str, place: &Place) -> Mark {
        let mut state = lock(&self.shared.state);
        let known = state.places.get(source);
        if known == Some(place) {
            return Mark(Some(state.asked));
        }
        if known.is_none() && state.places.len() >= MAX_PLACES {
            return Mark(None);
        }
        state.places.insert(source.into(), place.clone());
        self.post(&mut state, place_body(source, place))
    }

    /// Only these sources are followed: places of others are forgotten. What they revoked stays.
    pub fn retain_places(&self, wanted: impl Fn(&str) -> bool) {
        lock(&self.shared.state).places.retain(|source, _| wanted(source));
    }

    fn post(&self, state: &mut State, body: String) -> Mark {
        state.pending.push(body);
        state.asked += 1;
        self.shared.wake.notify_one();
        Mark(Some(state.asked))
    }

    /// How far the events of a source were followed.
    pub fn place(&self, source: &str) -> Option<Place> {
        lock(&self.shared.state).places.get(source).cloned()
    }

    /// Waits until everything up to `mark` is on disk, at most `patience`, and says whether it is.
    pub async fn kept(&self, mark: Mark, patience: Duration) -> bool {
        let Mark(Some(mark)) = mark else { return false };
        let mut progress = self.shared.progress.subscribe();
        let done = progress.wait_for(|now| now.kept >= mark || now.failed >= mark);
        matches!(tokio::time::timeout(patience, done).await, Ok(Ok(now)) if now.kept >= mark)
    }

    /// Entries that are not on disk yet.
    pub fn waiting(&self) -> u64 {
        lock(&self.shared.state).asked.saturating_sub(self.shared.progress.borrow().kept)
    }

    /// Forgets what has expired at `now`. Meant to be called every minute or so.
    pub fn forget_expired(&self, now: u64) {
        lock(&self.shared.state).live.retain(|_, until| now < *until);
    }

    /// Writes what is left, and ends.
    pub fn close(&self) {
        lock(&self.shared.state).closed = true;
        self.shared.wake.notify_one();
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.close();
    }
}

impl fmt::Debug for Journal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Journal").field("waiting", &self.waiting()).finish_non_exhaustive()
    }
}

impl Shared {
    fn write_for_ever(&self, mut writer: Writer) {
        // After a fault nobody knows what the file holds: all is written anew then.
        let mut sick: Option<Instant> = None;
        loop {
            let mut state = lock(&self.state);
            loop {
                let rest = sick.map_or(Duration::ZERO, |tried| RETRY.saturating_sub(tried.elapsed()));
                if state.closed || (rest.is_zero() && (sick.is_some() || !state.pending.is_empty())) {
                    break;
                }
                // Without a fault there is nothing to wake up for but a notification.
                let patience = if sick.is_some() { rest } else { Duration::from_secs(3600) };
                state = self.wake.wait_timeout(state, patience).unwrap_or_else(PoisonError::into_inner).0;
            }
            let (asked, closed) = (state.asked, state.closed);
            let pending = std::mem::take(&mut state.pending);
            let live = state.live.len() as u64 * 2 + state.places.len() as u64 + SLACK;
            let all = (sick.is_some() || writer.lines + pending.len() as u64 > live)
                .then(|| (state.live.clone(), state.places.clone()));
            drop(state);
            let outcome = match &all {
                Some((live, places)) => writer.rewrite(live, places),
                None if pending.is_empty() => Ok(()),
                None => writer.append(&pending),
            };
            match outcome {
                Ok(()) => {
                    if sick.take().is_some() {
                        tracing::info!(path = %writer.path.display(), "revocations are on disk again");
                    }
                    self.progress.send_modify(|progress| progress.kept = asked);
                }
                Err(error) => {
                    if sick.is_none() {
                        tracing::error!(
                            path = %writer.path.display(),
                            %error,
                            "revocations cannot be written: they hold, and would be forgotten in a restart; trying again"
                        );
                    }
                    sick = Some(Instant::now());
                    self.progress.send_modify(|progress| progress.failed = asked);
                }
            }
            if closed {
                return;
            }
        }
    }
}

struct Writer {
    path: PathBuf,
    file: Option<File>,
    /// Lines of the file, the first apart; the number of the next.
    lines: u64,
    _lock: File,
}

impl Writer {
    fn append(&mut self, bodies: &[String]) -> io::Result<()> {
        let file = self.file.as_mut().ok_or(io::ErrorKind::NotFound)?;
        let mut text = String::new();
        for (number, body) in (self.lines..).zip(bodies) {
            write_line(&mut text, number, self.lines, body);
        }
        file.write_all(text.as_bytes())?;
        file.sync_data()?;
        self.lines += bodies.len() as u64;
        Ok(())
    }

    /// Puts a new file in the place of the old one, whole or not at all.
    fn rewrite(
        &mut self,
        revocations: &HashMap<Arc<str>, u64>,
        places: &HashMap<Arc<str>, Place>,
    ) -> io::Result<()> {
        self.file = None;
        let fresh = self.path.with_extension("log.new");
        let file = private().write(true).create(true).truncate(true).open(&fresh)?;
        let mut out = BufWriter::new(file);
        let count = (revocations.len() + places.len()) as u64;
        writeln!(out, "{MAGIC}{count}")?;
        let revocations = revocations.iter().map(|(record, until)| format!("r {until} {record}"));
        let places = places.iter().map(|(source, place)| place_body(source, place));
        let mut text = String::new();
        for (number, body) in (0..).zip(revocations.chain(places)) {
            text.clear();
            write_line(&mut text, number, number, &body);
            out.write_all(text.as_bytes())?;
        }
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        fs::rename(&fresh, &self.path)?;
        // The name must be on disk as well.
        File::open(self.path.parent().unwrap_or(Path::new(".")))?.sync_all()?;
        self.file = Some(file);
        self.lines = count;
        Ok(())
    }
}

fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600);
    options
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlaceOf<T> {
    source: T,
    place: Place,
}

fn place_body(source: &str, place: &Place) -> String {
    // INVARIANT: strings and numbers under names that are strings always serialize.
    let text = serde_json::to_string(&PlaceOf { source, place: place.clone() }).unwrap_or_default();
    format!("p {text}")
}

/// A line: a checksum, its number, the number of the first line that was written together with it, and what it says.
fn write_line(text: &mut String, number: u64, batch: u64, body: &str) {
    let rest = format!("{number} {batch} {body}");
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{:016x} {rest}", sum(rest.as_bytes()));
}

/// Against accidents, not against who may write there.
fn sum(bytes: &[u8]) -> u64 {
    let digest = digest(&SHA256, bytes);
    digest.as_ref().iter().take(8).fold(0, |sum, byte| (sum << 8) | u64::from(*byte))
}

/// Why a log cannot be read.
#[derive(Debug)]
enum Unreadable {
    Damaged(u64),
    Version,
    Io(io::Error),
}

impl Unreadable {
    fn at(self, path: &Path) -> JournalError {
        let path = path.to_owned();
        match self {
            Self::Damaged(line) => JournalError::Damaged { path, line },
            Self::Version => JournalError::Version { path },
            Self::Io(error) => JournalError::Io { path, error },
        }
    }
}

/// What a log holds at `now`; `None` if it is no log, or damaged. For the fuzz target.
pub fn read_journal(bytes: &[u8], now: u64) -> Option<Kept> {
    read(bytes, now).ok()
}

fn read(mut input: impl BufRead, now: u64) -> Result<Kept, Unreadable> {
    let mut line = Vec::new();
    next_line(&mut input, &mut line).map_err(Unreadable::Io)?;
    let count: u64 = std::str::from_utf8(&line)
        .ok()
        .and_then(|line| line.strip_suffix('\n')?.strip_prefix(MAGIC)?.parse().ok())
        .ok_or(Unreadable::Version)?;
    let mut kept = Kept::default();
    // The number of the first line that is missing, and where it should be.
    let (mut next, mut torn_at) = (0, None);
    for at in 2.. {
        if !next_line(&mut input, &mut line).map_err(Unreadable::Io)? {
            break;
        }
        // Where a page of zeroes hides the end of a line, the next one begins behind it.
        let read = parse(&line).or_else(|| parse(line.rsplit(|byte| *byte == 0).next()?));
        let follows = read.as_ref().is_some_and(|read| read.number == next && torn_at.is_none());
        if follows {
            next += 1;
        } else {
            let torn_at = *torn_at.get_or_insert(at);
            // What was written in one go may have come to the disk in any order. What was synced before has to be there, and
            // has been if anything was written after it.
            if next < count || read.as_ref().is_some_and(|read| read.batch > next) {
                return Err(Unreadable::Damaged(torn_at));
            }
        }
        match read.map(|read| read.body) {
            Some(Body::Revocation(record, until)) if now < until => {
                let known = kept.revocations.entry(record.into()).or_insert(until);
                *known = until.max(*known);
            }
            Some(Body::Place(of)) => drop(kept.places.insert(of.source.into(), of.place)),
            Some(Body::Revocation(..)) | None => {}
        }
    }
    if next < count {
        return Err(Unreadable::Damaged(torn_at.unwrap_or(next + 2)));
    }
    kept.torn = torn_at.is_some();
    Ok(kept)
}

/// Whether there was one. A longer one than any of ours comes in pieces, none of which is one of ours.
fn next_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    input.take(MAX_LINE_BYTES as u64).read_until(b'\n', line)?;
    Ok(!line.is_empty())
}

struct Line<'a> {
    number: u64,
    batch: u64,
    body: Body<'a>,
}

enum Body<'a> {
    Revocation(&'a str, u64),
    Place(PlaceOf<String>),
}

fn parse(line: &[u8]) -> Option<Line<'_>> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\n')?;
    let (checksum, rest) = line.split_once(' ')?;
    if checksum.len() != 16 || u64::from_str_radix(checksum, 16).ok()? != sum(rest.as_bytes()) {
        return None;
    }
    let mut parts = rest.splitn(4, ' ');
    let (number, batch) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let body = match (parts.next()?, parts.next()?) {
        ("r", rest) => {
            let (until, record) = rest.split_once(' ')?;
            let until = until.parse().ok()?;
            decode(record.as_bytes(), until, 0)?;
            Body::Revocation(record, until)
        }
        ("p", text) => Body::Place(serde_json::from_str(text).ok()?),
        _ => return None,
    };
    Some(Line { number, batch, body })
}

#[cfg(test)]
mod tests {
    use super::super::{Revocations, Target};
    use super::*;
    use proptest::prelude::*;
    use sealgate_policy::{Identity, IdentityParts};
    use std::os::unix::fs::PermissionsExt;

    const NOW: u64 = 1_000_000;
    const PATIENCE: Duration = Duration::from_secs(60);

    fn session(name: &str, until: u64) -> Revocation<'_> {
        Revocation { target: Target::Session { issuer: "i", session: name }, issued_before: u64::MAX, until }
    }

    fn open(folder: &Path) -> (Journal, Kept) {
        Journal::open(folder, 100, NOW).unwrap()
    }

    fn names(kept: &Kept) -> Vec<String> {
        let mut names: Vec<_> = kept
            .iter(NOW)
            .map(|it| match it.target {
                super::super::OwnedTarget::Session { session, .. } => session,
                other => panic!("{other:?}"),
            })
            .collect();
        names.sort();
        names
    }

    async fn kept(journal: &Journal, revocation: &Revocation<'_>) -> bool {
        journal.kept(journal.keep(revocation), PATIENCE).await
    }

    #[tokio::test]
    async fn what_was_kept_is_there_after_a_restart_and_what_expired_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (journal, before) = open(folder.path());
        assert!(before.revocations.is_empty() && !before.torn);
        for (name, until) in [("a", NOW + 10), ("b", NOW), ("c", NOW + 5), ("c", NOW + 20), ("a", NOW + 10)] {
            assert!(kept(&journal, &session(name, until)).await, "{name}");
        }
        let place = Place { log: "l".into(), number: 7 };
        journal.keep_place("source", &place);
        // As it is left by kill -9: nothing is said to it.
        let path = folder.path().join(FILE);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        assert!(matches!(Journal::open(folder.path(), 100, NOW), Err(JournalError::InUse { .. })));
        drop(journal);
        let (journal, after) = open(folder.path());
        assert_eq!(names(&after), ["a", "c"]);
        assert_eq!(journal.place("source"), Some(place.clone()));
        journal.retain_places(|source| source == "source");
        assert_eq!(journal.place("source"), Some(place));
        journal.retain_places(|source| source == "other");
        assert_eq!(journal.place("source"), None);
        assert_eq!(after.iter(NOW).map(|it| it.until).max(), Some(NOW + 20));
        // Written anew without the one that had expired.
        assert_eq!(fs::read_to_string(&path).unwrap().lines().count(), 4);
    }

    #[tokio::test]
    async fn a_torn_end_is_dropped_and_damage_before_it_is_a_fault() {
        let folder = tempfile::tempdir().unwrap();
        let (journal, _) = open(folder.path());
        for name in ["a", "b", "c"] {
            assert!(kept(&journal, &session(name, NOW + 10)).await);
        }
        drop(journal);
        let path = folder.path().join(FILE);
        let whole = fs::read(&path).unwrap();
        let lines: Vec<_> = whole.split_inclusive(|byte| *byte == b'\n').collect();
        let last = lines[3].len();
        for end in whole.len() - last..whole.len() {
            let kept = read(&whole[..end], NOW).unwrap();
            assert_eq!((names(&kept), kept.torn), (vec!["a".into(), "b".into()], end > whole.len() - last));
        }
        // A page of zeroes, as some file systems leave it.
        let zeroes = [&whole[..], &[0; 4096]].concat();
        assert!(read(&*zeroes, NOW).unwrap().torn);
        for (at, line) in [(1, 2), (2, 3)] {
            let mut damaged: Vec<_> = lines.iter().map(|line| line.to_vec()).collect();
            damaged[at][30] ^= 1;
            assert!(
                matches!(read(&*damaged.concat(), NOW), Err(Unreadable::Damaged(found)) if found == line)
            );
            damaged.remove(at);
            assert!(
                matches!(read(&*damaged.concat(), NOW), Err(Unreadable::Damaged(found)) if found == line)
            );
        }
        fs::write(&path, [lines[0], lines[2], lines[3]].concat()).unwrap();
        let error = Journal::open(folder.path(), 100, NOW).unwrap_err().to_string();
        assert!(error.contains("revocations.log:2: damaged"), "{error}");
        for foreign in ["", "sealgate-revocations 2 0\n", "sealgate-revocations 1 x\n", "\0\0\0"] {
            fs::write(&path, foreign).unwrap();
            assert!(matches!(Journal::open(folder.path(), 100, NOW), Err(JournalError::Version { .. })));
        }
        // Nothing may be missing of what was written with the first line.
        let mut text = format!("{MAGIC}2\n");
        write_line(&mut text, 0, 0, "r 2000000 {\"kind\":\"issuer\",\"issuer\":\"i\"}");
        assert!(matches!(read(text.as_bytes(), NOW), Err(Unreadable::Damaged(3))));
    }

    #[test]
    fn lines_written_in_one_go_may_be_torn_in_any_order() {
        let bodies = ["a", "b", "c"].map(|name| format!("r {} {}", NOW + 9, encode(&session(name, 0))));
        let mut lines: Vec<_> = (0..3)
            .map(|number| {
                let mut text = String::new();
                write_line(&mut text, number, 0, &bodies[number as usize]);
                text
            })
            .collect();
        let head = format!("{MAGIC}0\n");
        lines[1] = "\0".repeat(lines[1].len());
        let torn = read(format!("{head}{}", lines.concat()).as_bytes(), NOW).unwrap();
        assert!(torn.torn);
        assert_eq!(names(&torn), ["a", "c"]);
        // Had the first three been synced, a later line would show it.
        let mut later = String::new();
        write_line(&mut later, 3, 3, &bodies[0]);
        let damaged = format!("{head}{}{later}", lines.concat());
        assert!(matches!(read(damaged.as_bytes(), NOW), Err(Unreadable::Damaged(3))));
    }

    #[tokio::test]
    async fn a_disk_that_fails_is_told_of_and_written_whole_when_it_works_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE);
        let shared = Arc::new(Shared {
            state: Mutex::new(State { capacity: 2, ..State::default() }),
            wake: Condvar::new(),
            progress: watch::Sender::default(),
        });
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let lock = File::open(folder.path()).unwrap();
        let writer = Writer { path: path.clone(), file: Some(full), lines: 0, _lock: lock };
        // In the way of the new file.
        fs::create_dir(path.with_extension("log.new")).unwrap();
        let with = shared.clone();
        let thread = std::thread::spawn(move || with.write_for_ever(writer));
        let journal = Journal { shared, thread: Mutex::new(Some(thread)) };
        assert!(!kept(&journal, &session("a", NOW + 10)).await);
        assert_eq!(journal.waiting(), 1);
        fs::remove_dir(path.with_extension("log.new")).unwrap();
        assert!(kept(&journal, &session("b", NOW + 10)).await);
        assert_eq!(journal.waiting(), 0);
        assert!(!kept(&journal, &session("c", NOW + 10)).await, "there is room for two");
        drop(journal);
        assert_eq!(names(&read(&*fs::read(&path).unwrap(), NOW).unwrap()), ["a", "b"]);
    }

    #[tokio::test]
    async fn does_not_grow_beyond_what_holds() {
        let folder = tempfile::tempdir().unwrap();
        let (journal, _) = open(folder.path());
        for round in 0..10 * SLACK {
            journal.keep(&session("a", NOW + round));
            if round % 100 == 0 {
                assert!(journal.kept(journal.keep(&session("a", NOW + round)), PATIENCE).await);
            }
        }
        drop(journal);
        let lines = fs::read_to_string(folder.path().join(FILE)).unwrap().lines().count() as u64;
        assert!(lines < 3 * SLACK, "{lines}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Revoking, time passing, housekeeping and restarts in any order: the table and the journal hold what a list of all that
        /// was ever revoked says, no less and no more.
        #[test]
        fn no_order_of_things_loses_or_resurrects(
            steps in prop::collection::vec((0u8..6, 0u8..4, 0u64..30), 0..40),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let folder = tempfile::tempdir().unwrap();
            let mut now = NOW;
            let (mut journal, _) = Journal::open(folder.path(), 100, now).unwrap();
            let mut table = Revocations::new(100);
            let mut all: Vec<(String, u64)> = Vec::new();
            for (step, name, span) in steps {
                match step {
                    0..=2 => {
                        let name = name.to_string();
                        let revocation = session(&name, now + span);
                        table.revoke(&revocation, now).unwrap();
                        let mark = journal.keep(&revocation);
                        prop_assert!(runtime.block_on(journal.kept(mark, PATIENCE)));
                        all.push((name.clone(), now + span));
                    }
                    3 => now += span / 3,
                    4 => {
                        table.forget_expired(now);
                        journal.forget_expired(now);
                    }
                    _ => {
                        drop(journal);
                        let (opened, kept) = Journal::open(folder.path(), 100, now).unwrap();
                        journal = opened;
                        table = Revocations::new(100);
                        for revocation in kept.iter(now) {
                            table.revoke(&revocation.borrowed(), now).unwrap();
                        }
                    }
                }
                for name in 0..4 {
                    let name = name.to_string();
                    let expected = all.iter().any(|(of, until)| *of == name && now < *until);
                    let who = Identity::new(IdentityParts {
                        issuer: "i".into(),
                        session: Some(name),
                        ..IdentityParts::default()
                    });
                    prop_assert_eq!(table.is_revoked(&who, now), expected);
                }
            }
        }
    }
}
