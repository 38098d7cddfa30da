//! The session clock: which sessions there are, when each was last active, and which have ended.
//!
//! One table for all cores, older than any snapshot. A warm request costs one look-up under a read lock of one of 64 shards;
//! activity is an atomic that sockets and requests hold through an [`Arc`]. All times are unix seconds, and arguments.
//!
//! What begins a session's clock is the later of `auth_time` and `iat` of the first token that is seen of it, not the sight: so
//! neither a restart nor another gateway makes an old token young. From then on only declared activity moves it. A session that
//! was idle for too long has ended, and is remembered as such until its tokens are gone: no new token revives it.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::BuildHasherDefault;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use sealgate_policy::{AtLimit, Denial, Identity, SessionId, SessionLimit, SessionPolicy};

use super::revocation::Low;
use crate::lock::lock;

const SHARDS: usize = 64;

/// Sessions remembered of one subject: a login costs an attacker with one account nothing.
const MAX_PER_SUBJECT: usize = 1_000;

/// A session that some gateway has seen.
pub struct Session {
    id: SessionId,
    subject: SessionId,
    /// Last declared activity.
    active: AtomicU64,
    /// 0, or a [`SessionEnd`].
    end: AtomicU8,
    /// When its tokens are gone.
    keep_until: AtomicU64,
    /// When it was first seen, of all gateways if they could be asked.
    since: u64,
    /// Whether it counts against `[[session.limit]]`.
    counts: bool,
    /// Whether other gateways have been told that it counts.
    told: AtomicBool,
    /// Whether it waits to be told to other gateways.
    waits: AtomicBool,
    touched: Arc<Touched>,
}

/// Why a session ended before its lifetime did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SessionEnd {
    /// No declared activity for too long.
    Idle = 1,
    /// A newer session took its place.
    Replaced = 2,
}

impl SessionEnd {
    /// What its requests and sockets are told.
    #[must_use]
    pub fn denial(self) -> Denial {
        match self {
            Self::Idle => Denial::SessionIdle,
            Self::Replaced => Denial::SessionReplaced,
        }
    }
}

impl Session {
    /// Its name.
    #[must_use]
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// Its subject's name.
    #[must_use]
    pub fn subject(&self) -> SessionId {
        self.subject
    }

    /// Last activity that is known here, unix seconds.
    #[must_use]
    pub fn active_at(&self) -> u64 {
        self.active.load(Ordering::Relaxed)
    }

    /// When it began, unix seconds.
    #[must_use]
    pub fn since(&self) -> u64 {
        self.since
    }

    /// Whether it has ended, and why.
    #[must_use]
    pub fn ended(&self) -> Option<SessionEnd> {
        let end = self.end.load(Ordering::Acquire);
        [SessionEnd::Idle, SessionEnd::Replaced].into_iter().find(|it| *it as u8 == end)
    }

    /// The user did something. Costs a load for all but the first time within a second.
    pub fn touch(self: &Arc<Self>, now: u64) {
        if self.active.load(Ordering::Relaxed) < now && self.active.fetch_max(now, Ordering::Relaxed) < now {
            self.touched.note(self);
        }
    }

    /// Another gateway saw activity.
    pub fn saw(&self, at: u64) {
        self.active.fetch_max(at, Ordering::Relaxed);
    }

    /// Whether others have to be told that it counts against limits; asked once.
    pub(crate) fn tell_that_it_counts(&self) -> bool {
        self.counts && !self.told.load(Ordering::Acquire)
    }

    /// They were.
    pub(crate) fn told(&self) {
        self.told.store(true, Ordering::Release);
    }

    fn seems_idle(&self, idle: u64, now: u64) -> bool {
        self.active_at().saturating_add(idle) <= now
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("id", &self.id)
            .field("active", &self.active_at())
            .field("ended", &self.ended())
            .finish_non_exhaustive()
    }
}

/// What is known here of an identity's session.
#[derive(Debug)]
pub enum Look {
    /// It runs.
    Live(Arc<Session>),
    /// It had no activity here for too long. If nobody else saw any either, it is to be ended.
    SeemsIdle(Arc<Session>),
    /// It has ended.
    Ended(SessionEnd),
    /// Nothing: see [`Sessions::begin`].
    Unknown,
}

/// A session that has begun.
#[derive(Debug)]
pub struct Begun {
    /// The session.
    pub session: Arc<Session>,
    /// Those that had to make room for it: they have ended, and their sockets must be closed.
    pub replaced: Vec<Arc<Session>>,
}

/// All sessions that are remembered.
pub struct Sessions {
    shards: [RwLock<Shard>; SHARDS],
    /// Sessions of each subject in the order in which they began.
    subjects: [Mutex<Subjects>; SHARDS],
    remembered: AtomicUsize,
    agenda: Mutex<Agenda>,
    touched: Arc<Touched>,
}

type Shard = HashMap<u128, Arc<Session>, BuildHasherDefault<Low>>;

type Subjects = HashMap<u128, Vec<Arc<Session>>, BuildHasherDefault<Low>>;

/// When sessions have to be looked at next. Each live one stands in it once, no later than it can become idle: activity only
/// moves that away, which is seen when its time has come.
#[derive(Default)]
struct Agenda {
    idle: u64,
    at: BTreeMap<u64, Vec<Arc<Session>>>,
}

/// Sessions whose activity other gateways have not been told of. Empty for a gateway that is alone.
struct Touched {
    wanted: AtomicBool,
    queues: [Mutex<Vec<Arc<Session>>>; SHARDS],
}

impl Touched {
    fn note(&self, session: &Arc<Session>) {
        if self.wanted.load(Ordering::Relaxed) && !session.waits.swap(true, Ordering::AcqRel) {
            lock(at(&self.queues, session.id)).push(session.clone());
        }
    }
}

impl Sessions {
    /// No sessions.
    #[must_use]
    pub fn new() -> Self {
        Self {
            shards: std::array::from_fn(|_| RwLock::default()),
            subjects: std::array::from_fn(|_| Mutex::default()),
            remembered: AtomicUsize::new(0),
            agenda: Mutex::default(),
            touched: Arc::new(Touched {
                wanted: AtomicBool::new(false),
                queues: std::array::from_fn(|_| Mutex::default()),
            }),
        }
    }

    /// The session with that name.
    #[must_use]
    pub fn find(&self, id: SessionId) -> Option<Arc<Session>> {
        read(at(&self.shards, id)).get(&id.0).cloned()
    }

    /// What is known of an identity's session at `now`, where `idle` seconds end one.
    #[must_use]
    pub fn look(&self, identity: &Identity, idle: u64, now: u64) -> Look {
        let Some(session) = self.find(identity.session_id) else { return Look::Unknown };
        if identity.began().is_none() {
            // Nothing else tells how long there may be tokens of it.
            session.keep_until.fetch_max(identity.expires_at, Ordering::Relaxed);
        }
        match session.ended() {
            Some(end) => Look::Ended(end),
            None if session.seems_idle(idle, now) => Look::SeemsIdle(session),
            None => Look::Live(session),
        }
    }

    /// What a token itself proves of its session's last activity: the login, or that the issuer gave it out.
    #[must_use]
    pub fn start_of(identity: &Identity, rules: &SessionPolicy, now: u64) -> u64 {
        let dates = identity.auth_time.max(identity.issued_at);
        dates.map_or(now, |date| date.saturating_add(rules.skew.as_secs()).min(now))
    }

    /// Begins the session of an identity that was last active at `active`, where `limit` is to be kept here; none where other
    /// gateways keep it together. A session that is known already is left as it is.
    ///
    /// Two that begin at once do not slip under a limit.
    ///
    /// # Errors
    /// [`Denial::TooManySessions`] where a limit rejects; [`Denial::Overloaded`] if as many are remembered as may be: none is
    /// forgotten for a new one.
    pub fn begin(
        &self,
        identity: &Identity,
        rules: &SessionPolicy,
        idle: u64,
        active: u64,
        limit: Option<&SessionLimit>,
        now: u64,
    ) -> Result<Begun, Denial> {
        let id = identity.session_id;
        let subject = SessionId::of_subject(&identity.issuer, &identity.subject);
        let mut subjects = lock(at(&self.subjects, subject));
        // INVARIANT: whoever begins a session of the subject holds this lock.
        if let Some(session) = self.find(id) {
            return Ok(Begun { session, replaced: Vec::new() });
        }
        let mut none = Vec::new();
        let known = subjects.get_mut(&subject.0).unwrap_or(&mut none);
        if known.len() >= MAX_PER_SUBJECT {
            known.retain(|session| now < session.keep_until.load(Ordering::Relaxed));
            if known.len() >= MAX_PER_SUBJECT {
                return Err(Denial::TooManySessions);
            }
        }
        let mut running: Vec<_> = match limit {
            Some(_) => known
                .iter()
                .filter(|it| it.counts && it.ended().is_none() && !it.seems_idle(idle, now))
                .cloned()
                .collect(),
            None => Vec::new(),
        };
        if let Some(SessionLimit { max, at_limit, .. }) = limit {
            let room = (*max as usize).saturating_sub(1);
            match at_limit {
                AtLimit::Reject if running.len() > room => return Err(Denial::TooManySessions),
                AtLimit::Reject => running.clear(),
                AtLimit::ReplaceOldest => running.truncate(running.len().saturating_sub(room)),
            }
        }
        if self.remembered.fetch_add(1, Ordering::AcqRel) >= rules.max_sessions as usize {
            self.remembered.fetch_sub(1, Ordering::AcqRel);
            return Err(Denial::Overloaded);
        }
        running.retain(|session| self.end(session, SessionEnd::Replaced));
        let session = Arc::new(Session {
            id,
            subject,
            active: AtomicU64::new(active),
            end: AtomicU8::new(0),
            keep_until: AtomicU64::new(
                identity.began().map_or(identity.expires_at, |began| rules.ends_at(began)),
            ),
            since: now,
            counts: !rules.limits.is_empty() && identity.names_session(),
            told: AtomicBool::new(false),
            waits: AtomicBool::new(false),
            touched: self.touched.clone(),
        });
        subjects.entry(subject.0).or_default().push(session.clone());
        write(at(&self.shards, id)).insert(id.0, session.clone());
        drop(subjects);
        self.look_again(session.clone(), active.saturating_add(idle));
        self.touched.note(&session);
        Ok(Begun { session, replaced: running })
    }

    /// Ends a session; whether it had not ended before.
    pub fn end(&self, session: &Arc<Session>, end: SessionEnd) -> bool {
        let first = session.end.compare_exchange(0, end as u8, Ordering::AcqRel, Ordering::Acquire).is_ok();
        if first {
            self.touched.note(session);
        }
        first
    }

    /// Sessions that had no activity here for `idle` seconds until `now`. Each is given once; one that is not ended has to be put
    /// back by [`look_again`](Self::look_again).
    #[must_use]
    pub fn due(&self, idle: u64, now: u64) -> Vec<Arc<Session>> {
        let mut agenda = lock(&self.agenda);
        let due = if agenda.idle == idle {
            let later = agenda.at.split_off(&now.saturating_add(1));
            std::mem::replace(&mut agenda.at, later)
        } else {
            // The policy changed: every date may be wrong.
            agenda.idle = idle;
            std::mem::take(&mut agenda.at)
        };
        let mut idle_ones = Vec::new();
        for session in due.into_values().flatten() {
            let gone = session.keep_until.load(Ordering::Relaxed) <= now;
            match session.active_at().saturating_add(idle) {
                _ if gone || session.ended().is_some() => {}
                next if next > now => agenda.at.entry(next).or_default().push(session),
                _ => idle_ones.push(session),
            }
        }
        idle_ones
    }

    /// Has a session that is not in [`due`](Self::due) any more looked at again then.
    pub fn look_again(&self, session: Arc<Session>, then: u64) {
        lock(&self.agenda).at.entry(then).or_default().push(session);
    }

    /// Clears away what has no tokens any more at `now`. Meant to be called every minute or so.
    pub fn forget_expired(&self, now: u64) {
        let gone = |session: &Session| session.keep_until.load(Ordering::Relaxed) <= now;
        for subjects in &self.subjects {
            lock(subjects).retain(|_, sessions| {
                sessions.retain(|session| !gone(session));
                !sessions.is_empty()
            });
        }
        for shard in &self.shards {
            let mut shard = write(shard);
            let before = shard.len();
            shard.retain(|_, session| !gone(session));
            self.remembered.fetch_sub(before - shard.len(), Ordering::AcqRel);
        }
    }

    /// Sessions that are remembered, ended ones too.
    #[must_use]
    pub fn remembered(&self) -> usize {
        self.remembered.load(Ordering::Acquire)
    }

    /// Sessions that run. Reads all; meant for a scrape.
    #[must_use]
    pub fn live(&self, idle: u64, now: u64) -> usize {
        let runs = |session: &&Arc<Session>| {
            session.ended().is_none()
                && !session.seems_idle(idle, now)
                && now < session.keep_until.load(Ordering::Relaxed)
        };
        self.shards.iter().map(|shard| read(shard).values().filter(runs).count()).sum()
    }

    /// Has activity noted for other gateways from now on, or not any more.
    pub(crate) fn note_for_others(&self, wanted: bool) {
        self.touched.wanted.store(wanted, Ordering::Release);
        if !wanted {
            drop(self.touched());
        }
    }

    /// Has everything told to other gateways: they may have forgotten it.
    pub(crate) fn note_all(&self) {
        for shard in &self.shards {
            let sessions: Vec<_> = read(shard).values().cloned().collect();
            for session in sessions {
                session.told.store(false, Ordering::Release);
                self.touched.note(&session);
            }
        }
    }

    /// What other gateways have not been told of; it is noted anew unless it was [`Batch::sent`].
    pub(crate) fn touched(&self) -> Batch {
        let sessions: Vec<_> =
            self.touched.queues.iter().flat_map(|queue| std::mem::take(&mut *lock(queue))).collect();
        for session in &sessions {
            // INVARIANT: before its date is read: what comes now notes it anew.
            session.waits.store(false, Ordering::Release);
        }
        Batch { sessions, sent: 0, touched: self.touched.clone() }
    }
}

impl Default for Sessions {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions").field("remembered", &self.remembered()).finish_non_exhaustive()
    }
}

/// Sessions to be told to other gateways.
pub(crate) struct Batch {
    sessions: Vec<Arc<Session>>,
    sent: usize,
    touched: Arc<Touched>,
}

impl Batch {
    /// The next `most`.
    pub(crate) fn next(&self, most: usize) -> &[Arc<Session>] {
        let rest = self.sessions.get(self.sent..).unwrap_or_default();
        rest.get(..most).unwrap_or(rest)
    }

    /// So many of them were told.
    pub(crate) fn sent(&mut self, count: usize) {
        self.sent += count;
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        for session in self.sessions.iter().skip(self.sent) {
            self.touched.note(session);
        }
    }
}

fn at<T>(shards: &[T; SHARDS], SessionId(id): SessionId) -> &T {
    let [first, ..] = shards;
    // Ids are digests: any bits of theirs are even.
    shards.get((id >> 122) as usize).unwrap_or(first)
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sealgate_policy::IdentityParts;
    use std::time::Duration;

    const IDLE: u64 = 100;
    const START: u64 = 1_000_000;

    fn rules(max_sessions: u32, limits: &[(u32, AtLimit)]) -> SessionPolicy {
        let limit = |&(max, at_limit): &(u32, AtLimit)| SessionLimit { role: None, max, at_limit };
        SessionPolicy {
            idle: Duration::from_secs(IDLE),
            lifetime: Duration::from_secs(10_000),
            skew: Duration::ZERO,
            max_sessions,
            limits: limits.iter().map(limit).collect(),
        }
    }

    fn identity(subject: &str, session: &str, auth_time: u64, issued_at: u64) -> Identity {
        Identity::new(IdentityParts {
            issuer: "https://id.example".into(),
            subject: subject.to_owned(),
            session: Some(session.to_owned()),
            auth_time: Some(auth_time),
            issued_at: Some(issued_at),
            expires_at: issued_at + 300,
            ..IdentityParts::default()
        })
    }

    /// Whether a request is let in, as a gateway that is alone does it.
    fn enter(
        sessions: &Sessions,
        rules: &SessionPolicy,
        identity: &Identity,
        now: u64,
    ) -> Result<Arc<Session>, Denial> {
        match sessions.look(identity, IDLE, now) {
            Look::Live(session) => Ok(session),
            Look::Ended(end) => Err(end.denial()),
            Look::SeemsIdle(session) => {
                sessions.end(&session, SessionEnd::Idle);
                Err(Denial::SessionIdle)
            }
            Look::Unknown => {
                let start = Sessions::start_of(identity, rules, now);
                if start + IDLE <= now {
                    return Err(Denial::SessionIdle);
                }
                let limit = rules.limit_of(identity);
                sessions.begin(identity, rules, IDLE, start, limit, now).map(|begun| begun.session)
            }
        }
    }

    #[test]
    fn a_session_is_looked_at_when_it_may_be_idle_and_not_before() {
        let (sessions, rules) = (Sessions::new(), rules(10, &[]));
        let first = enter(&sessions, &rules, &identity("alice", "s1", START, START), START).unwrap();
        let second = enter(&sessions, &rules, &identity("alice", "s2", START, START), START).unwrap();
        assert!(sessions.due(IDLE, START + IDLE - 1).is_empty());
        first.touch(START + 60);
        let due = sessions.due(IDLE, START + IDLE);
        assert_eq!(due.iter().map(|it| it.id()).collect::<Vec<_>>(), [second.id()]);
        assert!(sessions.due(IDLE, START + IDLE).is_empty(), "each is given once");
        sessions.look_again(second.clone(), START + IDLE + 5);
        assert_eq!(sessions.due(IDLE, START + IDLE + 5).len(), 1);
        assert_eq!(sessions.due(IDLE, START + 60 + IDLE).len(), 1);
        // Another idle time of the policy counts for those that are known.
        let third =
            enter(&sessions, &rules, &identity("alice", "s3", START, START + 200), START + 200).unwrap();
        assert!(sessions.due(IDLE, START + 210).is_empty());
        assert_eq!(sessions.due(10, START + 210).first().map(|it| it.id()), Some(third.id()));
        assert!(sessions.end(&third, SessionEnd::Replaced) && !sessions.end(&third, SessionEnd::Idle));
        assert_eq!(third.ended(), Some(SessionEnd::Replaced));
    }

    #[test]
    fn a_full_table_forgets_nobody() {
        let (sessions, rules) = (Sessions::new(), rules(3, &[]));
        let enter = |subject: &str, session: &str, now| {
            enter(&sessions, &rules, &identity(subject, session, now, now), now).map(drop)
        };
        for session in ["s1", "s2", "s3"] {
            enter("alice", session, START).unwrap();
        }
        assert_eq!(enter("mallory", "m", START), Err(Denial::Overloaded));
        assert_eq!(enter("alice", "s1", START + IDLE), Err(Denial::SessionIdle));
        sessions.forget_expired(START + 9_999);
        assert_eq!(
            enter("mallory", "m", START + 9_999),
            Err(Denial::Overloaded),
            "ended ones are remembered"
        );
        sessions.forget_expired(START + 10_000);
        assert_eq!((sessions.remembered(), sessions.live(IDLE, START + 10_000)), (0, 0));
        assert_eq!(enter("mallory", "m", START + 10_000), Ok(()));
    }

    #[test]
    fn one_subject_cannot_fill_the_table() {
        let (sessions, rules) = (Sessions::new(), rules(10_000, &[]));
        let enter = |subject: &str, number: usize| {
            enter(&sessions, &rules, &identity(subject, &format!("{subject}{number}"), START, START), START)
                .map(drop)
        };
        for number in 0..MAX_PER_SUBJECT {
            enter("mallory", number).unwrap();
        }
        assert_eq!(enter("mallory", MAX_PER_SUBJECT), Err(Denial::TooManySessions));
        assert_eq!(enter("alice", 0), Ok(()));
        assert_eq!(enter("mallory", 0), Ok(()), "those that are known go on");
    }

    #[test]
    fn the_oldest_that_runs_makes_room() {
        let (sessions, rules) = (Sessions::new(), rules(100, &[(2, AtLimit::ReplaceOldest)]));
        let who = |session: &str| identity("alice", session, START, START);
        let begin = |session: &str, now| {
            let limit = rules.limit_of(&who(session));
            sessions.begin(&who(session), &rules, IDLE, now, limit, now).unwrap()
        };
        let first = begin("s1", START).session;
        let second = begin("s2", START).session;
        first.touch(START + 90);
        // The second is idle, and needs not be replaced.
        assert!(begin("s3", START + IDLE).replaced.is_empty());
        let replaced = begin("s4", START + IDLE).replaced;
        assert_eq!(replaced.iter().map(|it| it.id()).collect::<Vec<_>>(), [first.id()]);
        assert_eq!((first.ended(), second.ended()), (Some(SessionEnd::Replaced), None));
        assert_eq!(enter(&sessions, &rules, &who("s1"), START + IDLE).unwrap_err(), Denial::SessionReplaced);
        // One that is known already replaces nobody.
        assert!(begin("s3", START + IDLE).replaced.is_empty());
    }

    #[test]
    fn threads_that_begin_at_once_do_not_slip_under_a_limit() {
        let (sessions, rules) = (Sessions::new(), rules(1_000, &[(5, AtLimit::Reject)]));
        let entered: usize = std::thread::scope(|scope| {
            let thread = |thread: usize| {
                let (sessions, rules) = (&sessions, &rules);
                scope.spawn(move || {
                    let who =
                        (0..20).map(|number| identity("alice", &format!("{thread}-{number}"), START, START));
                    who.filter(|who| enter(sessions, rules, who, START).is_ok()).count()
                })
            };
            let threads: Vec<_> = (0..4).map(thread).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(entered, 5);
    }

    #[test]
    fn what_others_were_not_told_is_told_again() {
        let (sessions, rules) = (Sessions::new(), rules(100, &[(9, AtLimit::Reject)]));
        let first = enter(&sessions, &rules, &identity("alice", "s1", START, START), START).unwrap();
        assert!(sessions.touched().next(10).is_empty(), "nobody wants to know");
        sessions.note_for_others(true);
        sessions.note_all();
        drop(sessions.touched());
        let mut batch = sessions.touched();
        assert_eq!(batch.next(10).len(), 1, "it was not sent");
        assert!(first.tell_that_it_counts());
        first.told();
        batch.sent(1);
        drop(batch);
        assert!(sessions.touched().next(10).is_empty() && !first.tell_that_it_counts());
        first.touch(START);
        assert!(sessions.touched().next(10).is_empty(), "nothing new");
        first.touch(START + 1);
        first.touch(START + 2);
        let mut batch = sessions.touched();
        assert_eq!(batch.next(10).len(), 1);
        batch.sent(1);
        sessions.end(&first, SessionEnd::Idle);
        assert_eq!(sessions.touched().next(10).len(), 1);
        sessions.note_for_others(false);
        assert!(sessions.touched().next(10).is_empty());
    }

    proptest! {
        #[test]
        fn agrees_with_a_simple_model(
            steps in prop::collection::vec((0u8..5, 0usize..3, 0u64..60), 0..120),
        ) {
            let (sessions, rules) = (Sessions::new(), rules(1_000, &[]));
            let names = ["s1", "s2", "s3"];
            // Last activity, and whether it ended; nothing of what has not begun.
            let mut model: [Option<(u64, bool)>; 3] = [None; 3];
            let mut issued = [START; 3];
            let mut now = START;
            for (action, which, time) in steps {
                match action {
                    0 => now += time,
                    // A renewed token: no activity.
                    1 => issued[which] = now,
                    2 => for session in sessions.due(IDLE, now) {
                        sessions.end(&session, SessionEnd::Idle);
                    },
                    _ => {
                        let (last, ended) = model[which].unwrap_or((issued[which], false));
                        let expected = !ended && now < last + IDLE;
                        let active = action == 3;
                        let who = identity("alice", names[which], START, issued[which]);
                        let entered = enter(&sessions, &rules, &who, now);
                        prop_assert_eq!(entered.is_ok(), expected);
                        if expected || model[which].is_some() {
                            model[which] = Some((if expected && active { now } else { last }, !expected));
                        }
                        if let (Ok(session), true) = (entered, active) {
                            session.touch(now);
                        }
                    }
                }
                let live = model.iter().flatten().filter(|(last, ended)| !ended && now < last + IDLE).count();
                prop_assert_eq!(sessions.live(IDLE, now), live);
            }
        }
    }
}
