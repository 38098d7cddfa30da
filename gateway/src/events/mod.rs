//! Sources of revocations that the gateway follows over HTTP: `[[revocation_source]]`.
//!
//! # The protocol
//!
//! A source has a *log* of revocations, numbered from 1 without gaps, and can say at any time what holds (a *snapshot*). It answers `GET
//! PATH` with 200 and lines of JSON (`application/x-ndjson`), at most 8,704 bytes each:
//!
//! | line | meaning |
//! |---|---|
//! | `{"type":"here","log":L,"last":N}` | the log's name and the number of its last event: the first line of every answer, and again after everything up to N was said |
//! | `{"type":"event","number":N,"at":MS,"until":S,"revoke":R}` | an event: made at MS (Unix milliseconds; may be left out), to be remembered until S (Unix seconds) |
//! | `{"type":"entry","until":S,"revoke":R}` | one of what holds |
//! | `{"type":"end","count":N}` | the end of a snapshot of N entries |
//!
//! R is `{"kind":K,"issuer":ISS,"id":ID,"before":S}`: K is `session`, `subject`, `token`, `key` or `issuer` (without `id`); with `before`
//! only what was issued before S (Unix seconds) is meant.
//!
//! `GET PATH?log=L&after=N&wait=S` asks for events after N. The source answers `here` at once, then what there is, and then either goes on
//! with events as they come, saying `here` at least every S seconds; or ends the answer when there were events or S seconds have
//! passed: it is asked again. 410 says that its log does not reach back so far. `GET PATH?snapshot=1` asks for what holds: `here` (taken
//! before the entries are read, so that nothing falls between), entries, `end`.
//!
//! # What is made of it
//!
//! An event that is missing, a log of another name or a shorter one lead to the snapshot. Nothing is ever taken back by one: what was revoked
//! stays so until its time is over. Contact is when everything up to `last` is known, and nothing less.

mod follow;
mod line;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::HeaderValue;
use sealgate_policy::{OnLoss, Policy, RevocationSource, Source};
use zeroize::Zeroizing;

pub use self::follow::follow;
pub use self::line::{LinesRead, read_lines};
use crate::lock::lock;

/// A source as a snapshot has it.
#[derive(PartialEq, Eq)]
pub struct EventSource {
    /// What the policy says of it.
    pub policy: RevocationSource,
    authorization: Option<HeaderValue>,
}

impl EventSource {
    /// Reads its token.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(
        policy: &RevocationSource,
        read: impl FnOnce(&Source) -> Result<Zeroizing<Vec<u8>>, String>,
    ) -> Result<Self, String> {
        let fault = |reason| format!("revocation_source `{}`: token: {reason}", policy.name);
        let token = policy.token.as_ref().map(read).transpose().map_err(fault)?;
        let authorization = token.map(|token| {
            let value = Zeroizing::new([&b"Bearer "[..], token.trim_ascii()].concat());
            let mut value = HeaderValue::from_bytes(&value).ok().filter(|_| !token.trim_ascii().is_empty())?;
            value.set_sensitive(true);
            Some(value)
        });
        let authorization = match authorization {
            Some(None) => return Err(fault("not what a header can hold".to_owned())),
            Some(value) => value,
            None => None,
        };
        Ok(Self { policy: policy.clone(), authorization })
    }
}

impl fmt::Debug for EventSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventSource").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// How it stands with the sources. Older than any snapshot.
pub struct Sources {
    /// 0, or one more than the strictest of what is wanted of those without contact.
    level: AtomicU8,
    states: Mutex<HashMap<Arc<str>, State>>,
}

struct State {
    on_loss: OnLoss,
    heard: Instant,
    lost: bool,
}

const LEVELS: [OnLoss; 3] = [OnLoss::Warn, OnLoss::NoNewPrivileged, OnLoss::FailClosed];

impl Sources {
    /// Of a process whose first policy is this: none of its sources was heard yet, and that counts as lost contact.
    #[must_use]
    pub fn new(policy: &Policy) -> Self {
        let sources = Self { level: AtomicU8::new(0), states: Mutex::default() };
        for source in policy.revocation_sources() {
            sources.begin(&source.name, source.on_loss, true);
        }
        sources
    }

    /// What is wanted while a source cannot be heard; nothing while all are.
    pub fn lost(&self) -> Option<OnLoss> {
        LEVELS.get(usize::from(self.level.load(Ordering::Acquire)).checked_sub(1)?).copied()
    }

    /// A source is followed from now on. One that is known already stays as it is.
    fn begin(&self, name: &Arc<str>, on_loss: OnLoss, lost: bool) {
        self.change(|states| {
            let fresh = State { on_loss, heard: Instant::now(), lost };
            states.entry(name.clone()).or_insert(fresh).on_loss = on_loss;
        });
    }

    /// Only these are followed.
    fn retain(&self, wanted: impl Fn(&str) -> bool) {
        self.change(|states| states.retain(|name, _| wanted(name)));
    }

    /// It was heard, and everything is known; says whether contact had been lost.
    fn hear(&self, name: &str) -> bool {
        self.change(|states| {
            let Some(state) = states.get_mut(name) else { return false };
            state.heard = Instant::now();
            std::mem::replace(&mut state.lost, false)
        })
    }

    /// Whether it was not heard for `patience`, and was so before this call.
    fn silent(&self, name: &str, patience: Duration) -> (bool, bool) {
        self.change(|states| {
            let Some(state) = states.get_mut(name) else { return (false, false) };
            let before = state.lost;
            state.lost |= state.heard.elapsed() > patience;
            (state.lost, before)
        })
    }

    fn change<T>(&self, change: impl FnOnce(&mut HashMap<Arc<str>, State>) -> T) -> T {
        let mut states = lock(&self.states);
        let outcome = change(&mut states);
        let strictest = states.values().filter(|state| state.lost).map(|state| state.on_loss).max();
        let level = strictest.and_then(|on_loss| LEVELS.iter().position(|level| *level == on_loss));
        self.level.store(level.map_or(0, |level| level as u8 + 1), Ordering::Release);
        outcome
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").field("lost", &self.lost()).finish_non_exhaustive()
    }
}
