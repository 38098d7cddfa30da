//! The session clock over all gateways, through Redis: who was active when, who has ended, how many sessions a subject has.
//!
//! Three sorted sets, and one for each subject whose sessions are limited, all in one slot of a cluster: the last *activity* of
//! sessions, those that ended because they were *idle*, those that were *replaced* (by when, in Redis' own time). What decides is
//! done by scripts, so that two gateways cannot both let the last session in, or one end what the other has just seen.
//!
//! Activity is told once a second, for all sessions at once, and nothing waits for that. A session is asked about when a gateway
//! first sees it, and before it is ended for idleness.
//!
//! While Redis stands still, what gateways see is not told, and questions wait in it; they are answered when it goes on, before
//! anybody could tell. So it also keeps when it was last *told* anything, and ends nobody for idleness while that is too long ago,
//! nor for a while after: it is not *sure*.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use redis::{Cmd, Value, cmd};
use sealgate_policy::{AtLimit, SessionId, SessionLimit};

use super::servers::{Connection, Fault, Servers};
use super::{Link, Shared, Standing};
use crate::clock;
use crate::edge::Gateway;
use crate::session::{Session, SessionEnd};

/// Between two times that activity is told.
const FLUSH: Duration = Duration::from_secs(1);

/// Sessions in one command.
const BATCH: usize = 500;

/// Ends read in one answer, for each reason.
const PAGE: usize = 10_000;

/// Keys of each script, before those of subjects.
const FIXED: usize = 4;

/// Ends are kept for so long: no session lasts longer.
const KEEP_MS: u64 = 400 * 86_400 * 1_000;

/// Before each script. After `SILENCE` ms without being told anything Redis is not sure who was active, nor for `GRACE` ms from when
/// it is told again: longer than the longest pause between attempts to connect, and the round after it.
const SURE: &str = r"
local SILENCE, GRACE = 3000, 6000
local time = redis.call('TIME')
local ms = time[1] * 1000 + math.floor(time[2] / 1000)
local told, unsure = unpack(redis.call('HMGET', KEYS[4], 'told', 'unsure'))
local silent = not told or ms - told > SILENCE
local sure = not silent and not (unsure and ms < tonumber(unsure))
";

const BEGIN: &str = r"
local id, start, idle, now = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local max, rejects, counts = tonumber(ARGV[5]), ARGV[6] == '1', ARGV[7] == '1'
if redis.call('ZSCORE', KEYS[2], id) then return {'idle'} end
if redis.call('ZSCORE', KEYS[3], id) then return {'replaced'} end
local active = tonumber(redis.call('ZSCORE', KEYS[1], id) or nil)
if active then
  if active + idle > now then return {'live', string.format('%.0f', active)} end
  if not sure then return {'unsure'} end
  redis.call('ZADD', KEYS[2], 'NX', ms, id)
  return {'idle'}
end
if start + idle <= now then return {'old'} end
local answer = {'live', string.format('%.0f', start)}
if counts then
  local open = {}
  for _, other in ipairs(redis.call('ZRANGE', KEYS[5], 0, -1)) do
    local seen = tonumber(redis.call('ZSCORE', KEYS[1], other) or nil)
    if not seen or (sure and seen + idle <= now) or redis.call('ZSCORE', KEYS[2], other) or redis.call('ZSCORE', KEYS[3], other) then
      redis.call('ZREM', KEYS[5], other)
    else
      open[#open + 1] = other
    end
  end
  if max > 0 and #open >= max then
    if rejects then return {'full'} end
    for at = 1, #open - max + 1 do
      redis.call('ZADD', KEYS[3], 'NX', ms, open[at])
      redis.call('ZREM', KEYS[5], open[at])
      answer[#answer + 1] = open[at]
    end
  end
  redis.call('ZADD', KEYS[5], ms, id)
  redis.call('EXPIRE', KEYS[5], ARGV[8])
end
redis.call('ZADD', KEYS[1], start, id)
return answer
";

const SETTLE: &str = r"
local idle, now = tonumber(ARGV[1]), tonumber(ARGV[2])
local answers = {}
for at = 3, #ARGV, 2 do
  local id = ARGV[at]
  if redis.call('ZSCORE', KEYS[2], id) then
    answers[#answers + 1] = 'idle'
  elseif redis.call('ZSCORE', KEYS[3], id) then
    answers[#answers + 1] = 'replaced'
  else
    local active = math.max(tonumber(redis.call('ZSCORE', KEYS[1], id) or nil) or 0, tonumber(ARGV[at + 1]))
    if active + idle > now then
      answers[#answers + 1] = string.format('%.0f', active)
    elseif sure then
      redis.call('ZADD', KEYS[2], 'NX', ms, id)
      answers[#answers + 1] = 'idle'
    else
      answers[#answers + 1] = 'unsure'
    end
  end
end
return answers
";

const FLUSHED: &str = r"
local answers = {}
for at = 2, #ARGV, 5 do
  local id, active, state, subject, since = ARGV[at], ARGV[at + 1], ARGV[at + 2], tonumber(ARGV[at + 3]), ARGV[at + 4]
  if state == 'idle' then
    redis.call('ZADD', KEYS[2], 'NX', ms, id)
    answers[#answers + 1] = 'idle'
  elseif state == 'replaced' then
    redis.call('ZADD', KEYS[3], 'NX', ms, id)
    answers[#answers + 1] = 'replaced'
  elseif redis.call('ZSCORE', KEYS[2], id) then
    answers[#answers + 1] = 'idle'
  elseif redis.call('ZSCORE', KEYS[3], id) then
    answers[#answers + 1] = 'replaced'
  else
    redis.call('ZADD', KEYS[1], 'GT', active, id)
    if subject > 0 then
      redis.call('ZADD', KEYS[subject], 'NX', since, id)
      redis.call('EXPIRE', KEYS[subject], ARGV[1])
    end
    answers[#answers + 1] = active
  end
end
return answers
";

/// Comes after all was told.
const ENDED: &str = r"
local answer = {string.format('%.0f', ms)}
if silent then redis.call('HSET', KEYS[4], 'unsure', ms + GRACE) end
redis.call('HSET', KEYS[4], 'told', ms)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', ARGV[4])
for set = 2, 3 do
  redis.call('ZREMRANGEBYSCORE', KEYS[set], '-inf', ms - ARGV[3])
  answer[set] = redis.call('ZRANGEBYSCORE', KEYS[set], ARGV[set - 1], '+inf', 'WITHSCORES', 'LIMIT', 0, ARGV[5])
end
return answer
";

/// A session that a gateway sees for the first time.
#[derive(Debug, Clone, Copy)]
pub struct Beginning<'a> {
    /// Its name.
    pub id: SessionId,
    /// Its subject's.
    pub subject: SessionId,
    /// Last activity that its token proves, unix seconds.
    pub start: u64,
    /// Seconds without activity that end it.
    pub idle: u64,
    /// Longest life of a session, in seconds.
    pub lifetime: u64,
    /// Unix seconds.
    pub now: u64,
    /// Whether it counts.
    pub counts: bool,
    /// The limit that it must keep.
    pub limit: Option<&'a SessionLimit>,
}

/// What all gateways know of a session that begins on one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Began {
    /// It runs, was last active at `active`, and takes the place of others.
    Live {
        /// Unix seconds.
        active: u64,
        /// They have ended.
        replaced: Vec<SessionId>,
    },
    /// It has ended.
    Ended(SessionEnd),
    /// Nobody has seen it, and its token is too old for it to begin now.
    Old,
    /// As many of its subject run as may.
    Full,
    /// It seems to be idle, but others may not have told yet.
    Unsure,
}

/// What all gateways together say of a session that seems idle on one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// It has ended, if only now.
    Ended(SessionEnd),
    /// It was active at that time, unix seconds.
    Active(u64),
    /// Nobody told of activity, but perhaps could not.
    Unsure,
}

/// An answer of all gateways.
#[derive(Debug)]
pub enum Together<T> {
    /// There is one.
    Answer(T),
    /// Nobody could say in time.
    Unknown,
    /// This gateway is alone.
    Alone,
}

/// One change that the others are told of.
#[derive(Debug, Clone, Copy)]
pub struct Change {
    /// The session.
    pub id: SessionId,
    /// Last activity, unix seconds.
    pub active: u64,
    /// Whether it has ended.
    pub ended: Option<SessionEnd>,
    /// Its subject, and when it began, if it has to be counted.
    pub counts: Option<(SessionId, u64)>,
}

impl Change {
    fn of(session: &Session) -> Self {
        let counts = session.tell_that_it_counts().then(|| (session.subject(), session.since()));
        Self { id: session.id(), active: session.active_at(), ended: session.ended(), counts }
    }
}

/// Sessions as they stand in Redis.
#[derive(Clone)]
pub struct Board {
    connection: Connection,
    prefix: Arc<str>,
}

/// How far the ends of sessions were read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cursor {
    idle: u64,
    replaced: u64,
}

impl Board {
    pub(super) fn new(connection: Connection, prefix: Arc<str>) -> Self {
        Self { connection, prefix }
    }

    /// Over a connection of its own.
    ///
    /// # Errors
    /// Redis cannot be reached.
    pub async fn connect(servers: &Servers) -> Result<Self, Fault> {
        Ok(Self::new(servers.connect(servers.patience(), 0).await?, servers.policy().key_prefix.clone()))
    }

    fn script(&self, script: &str, subjects: &[SessionId]) -> Cmd {
        let mut command = cmd("EVAL");
        command.arg(format!("{SURE}{script}")).arg(FIXED + subjects.len());
        for name in ["active", "idle", "replaced", "told"] {
            command.arg(format!("{{{}}}:sessions:{name}", self.prefix));
        }
        for subject in subjects {
            command.arg(format!("{{{}}}:sessions:of:{subject}", self.prefix));
        }
        command
    }

    /// Begins a session over all gateways, or tells what it is.
    ///
    /// # Errors
    /// No answer within `patience`, or a strange one.
    pub async fn begin(&self, it: &Beginning<'_>, patience: Duration) -> Result<Began, Fault> {
        let mut command = self.script(BEGIN, &[it.subject]);
        command.arg(it.id.to_string()).arg(it.start).arg(it.idle).arg(it.now);
        command.arg(it.limit.map_or(0, |limit| limit.max));
        command.arg(u8::from(it.limit.is_some_and(|limit| limit.at_limit == AtLimit::Reject)));
        command.arg(u8::from(it.counts)).arg(it.lifetime);
        let answer = texts(self.connection.ask(&command, patience).await?);
        began(answer.as_deref().unwrap_or_default()).ok_or(Fault::Answer("begin"))
    }

    /// Ends those of `sessions` (with their last activity here) that were active nowhere. An answer for each, in order.
    ///
    /// # Errors
    /// No answer within `patience`, or a strange one.
    pub async fn settle(
        &self,
        sessions: impl Iterator<Item = (SessionId, u64)>,
        idle: u64,
        now: u64,
        patience: Duration,
    ) -> Result<Vec<Settled>, Fault> {
        let mut command = self.script(SETTLE, &[]);
        command.arg(idle).arg(now);
        for (id, active) in sessions {
            command.arg(id.to_string()).arg(active);
        }
        settled(self.connection.ask(&command, patience).await?)
    }

    /// Tells what changed here, and hears what became of those elsewhere. An answer for each, in order.
    ///
    /// # Errors
    /// No answer within `patience`, or a strange one.
    pub async fn tell(
        &self,
        changes: &[Change],
        lifetime: u64,
        patience: Duration,
    ) -> Result<Vec<Settled>, Fault> {
        let subjects: Vec<_> = changes.iter().filter_map(|change| Some(change.counts?.0)).collect();
        let mut command = self.script(FLUSHED, &subjects);
        command.arg(lifetime);
        let mut place = FIXED;
        for change in changes {
            place += usize::from(change.counts.is_some());
            let state = match change.ended {
                None => "live",
                Some(SessionEnd::Idle) => "idle",
                Some(SessionEnd::Replaced) => "replaced",
            };
            // Scores of a subject's sessions are milliseconds.
            let since = change.counts.map_or(0, |(_, since)| since.saturating_mul(1_000));
            let subject = if change.counts.is_some() { place } else { 0 };
            command.arg(change.id.to_string()).arg(change.active).arg(state).arg(subject).arg(since);
        }
        settled(self.connection.ask(&command, patience).await?)
    }

    /// Sessions that ended since `cursor`, which moves on; whether there are more. Some come twice.
    ///
    /// # Errors
    /// No answer within `patience`, or a strange one.
    pub async fn ended(
        &self,
        cursor: &mut Cursor,
        oldest: u64,
        patience: Duration,
    ) -> Result<(Vec<(SessionId, SessionEnd)>, bool), Fault> {
        let mut command = self.script(ENDED, &[]);
        command.arg(cursor.idle).arg(cursor.replaced).arg(KEEP_MS).arg(oldest).arg(PAGE);
        let answer = self.connection.ask(&command, patience).await?;
        ends(answer, cursor).ok_or(Fault::Answer("ended"))
    }
}

fn texts(answer: Value) -> Option<Vec<String>> {
    let Value::Array(values) = answer else { return None };
    values.into_iter().map(text).collect()
}

fn text(value: Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => String::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        Value::Int(number) => Some(number.to_string()),
        _ => None,
    }
}

fn id(text: &str) -> Option<SessionId> {
    (text.len() == 32).then(|| u128::from_str_radix(text, 16).ok().map(SessionId))?
}

fn end(word: &str) -> Option<SessionEnd> {
    match word {
        "idle" => Some(SessionEnd::Idle),
        "replaced" => Some(SessionEnd::Replaced),
        _ => None,
    }
}

fn began(answer: &[String]) -> Option<Began> {
    match answer {
        [word] => match word.as_str() {
            "old" => Some(Began::Old),
            "full" => Some(Began::Full),
            "unsure" => Some(Began::Unsure),
            word => end(word).map(Began::Ended),
        },
        [word, active, replaced @ ..] if word == "live" => Some(Began::Live {
            active: active.parse().ok()?,
            replaced: replaced.iter().map(|text| id(text)).collect::<Option<_>>()?,
        }),
        _ => None,
    }
}

fn settled(answer: Value) -> Result<Vec<Settled>, Fault> {
    let one = |word: String| match word.as_str() {
        "unsure" => Some(Settled::Unsure),
        word => end(word).map(Settled::Ended).or_else(|| word.parse().ok().map(Settled::Active)),
    };
    let answers = texts(answer).and_then(|words| words.into_iter().map(one).collect());
    answers.ok_or(Fault::Answer("sessions"))
}

fn ends(answer: Value, cursor: &mut Cursor) -> Option<(Vec<(SessionId, SessionEnd)>, bool)> {
    let Value::Array(parts) = answer else { return None };
    let [now, idle, replaced] = <[Value; 3]>::try_from(parts).ok()?;
    let now: u64 = text(now)?.parse().ok()?;
    let (mut all, mut more) = (Vec::new(), false);
    for (list, at, end) in
        [(idle, &mut cursor.idle, SessionEnd::Idle), (replaced, &mut cursor.replaced, SessionEnd::Replaced)]
    {
        let list = texts(list)?;
        let (pairs, []) = list.as_chunks::<2>() else { return None };
        for [member, _] in pairs {
            all.push((id(member)?, end));
        }
        let last = pairs.last().map(|[_, score]| score.parse::<f64>()).transpose().ok()?;
        *at = match last {
            // So many at one moment that they fill a page: on, or they would be read for ever.
            Some(last) if pairs.len() >= PAGE => {
                more = true;
                (last as u64).max(at.saturating_add(1))
            }
            // Redis' time may have been stepped back a little.
            _ => now.saturating_sub(2_000),
        };
    }
    Some((all, more))
}

impl Shared {
    /// Asks Redis within the policy's deadline, unless it was late and has not answered a probe since. `key` is what is asked about,
    /// or another one of the same node.
    pub(super) async fn in_time<T>(
        &self,
        key: impl FnOnce(&Link) -> String,
        ask: impl AsyncFnOnce(&Link) -> Result<T, Fault>,
    ) -> Together<T> {
        if self.standing() == Standing::Alone {
            return Together::Alone;
        }
        let Some(link) = self.link.load_full() else { return Together::Unknown };
        if link.suspect.load(Ordering::Acquire) {
            return Together::Unknown;
        }
        match ask(&link).await {
            Ok(answer) => Together::Answer(answer),
            Err(error) => {
                link.was_late(&error, &key(&link));
                Together::Unknown
            }
        }
    }

    /// Begins a session over all gateways. Waits for one round trip, for the policy's deadline at most.
    pub async fn begin_session(&self, beginning: &Beginning<'_>) -> Together<Began> {
        self.in_time(in_the_slot, async |link| link.board.begin(beginning, link.deadline).await).await
    }

    /// Asks about sessions that seem idle here, as [`begin_session`](Self::begin_session); an answer for each.
    pub async fn settle_sessions(
        &self,
        sessions: &[Arc<Session>],
        idle: u64,
        now: u64,
    ) -> Together<Vec<Settled>> {
        let asked = sessions.iter().map(|session| (session.id(), session.active_at()));
        self.in_time(in_the_slot, async |link| link.board.settle(asked, idle, now, link.deadline).await).await
    }
}

/// All of a prefix but names lies in one slot.
fn in_the_slot(link: &Link) -> String {
    link.keys.rate("")
}

/// Tells the others of activity, and hears which sessions ended, until Redis fails.
pub(super) async fn follow(
    gateway: &Gateway,
    servers: &Servers,
    connection: &Connection,
) -> Result<Infallible, Fault> {
    let board = Board::new(connection.clone(), servers.policy().key_prefix.clone());
    let patience = servers.patience();
    gateway.sessions.note_for_others(true);
    // What Redis lost while nobody was connected is told anew.
    gateway.sessions.note_all();
    let mut cursor = Cursor::default();
    let mut due = tokio::time::interval(FLUSH);
    due.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        let lifetime = gateway.current.load().policy.session().lifetime.as_secs();
        let mut batch = gateway.sessions.touched();
        loop {
            let sessions = batch.next(BATCH);
            if sessions.is_empty() {
                break;
            }
            let changes: Vec<_> = sessions.iter().map(|session| Change::of(session)).collect();
            let answers = board.tell(&changes, lifetime, patience).await?;
            for ((session, change), answer) in sessions.iter().zip(&changes).zip(answers) {
                if change.counts.is_some() {
                    session.told();
                }
                if let Settled::Ended(end) = answer {
                    gateway.end_sessions(std::slice::from_ref(session), end);
                }
            }
            let count = sessions.len();
            batch.sent(count);
        }
        let oldest = clock::unix_now().saturating_sub(lifetime);
        loop {
            let (ended, more) = board.ended(&mut cursor, oldest, patience).await?;
            for (id, end) in ended {
                if let Some(session) = gateway.sessions.find(id) {
                    gateway.end_sessions(&[session], end);
                }
            }
            if !more {
                break;
            }
        }
    }
}
