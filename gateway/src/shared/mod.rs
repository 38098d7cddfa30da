//! What several gateways agree on, through Redis: revocations, which proofs of possession came already, and rates that they share.
//!
//! Beside the cores: [`follow`] runs on the runtime of the private listeners, on connections of its own. A revocation is entered where it was
//! made, at once; then it waits in the outbox until Redis has it. Others hear of it as news of a log without gaps; who finds a gap, or
//! comes back from being away, reads the live set and writes what is missing there. So a Redis that lost its data gets it back.
//!
//! Where a request asks Redis itself ([`Shared::take_once`], [`Shared::ask_rates`]), it is one round trip with a deadline, and after
//! one that was missed nobody asks again until Redis has answered a probe.

mod activity;
mod follow;
mod rates;
mod record;
mod servers;
mod tickets;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use redis::Value;
use ring::rand::{SecureRandom as _, SystemRandom};
use sealgate_policy::{OnLoss, Policy};
use tokio::sync::{Notify, mpsc};

pub use self::activity::{Began, Beginning, Board, Change, Cursor, Settled, Together};
pub use self::follow::follow;
pub use self::rates::{AskKind, RateAnswer, RateAnswers, RateAsk, rate_command};
use self::record::Keys;
use self::servers::Connection;
pub use self::servers::{Fault, Servers};
use self::tickets::TicketBoard;
use crate::lock::lock;
use crate::session::{Revocation, encode};

/// Revocations that wait to be published. More are published by comparing all of them, which loses nothing either.
const MAX_OUTBOX: usize = 64 * 1024;

/// Revocations known by name, to be written to a Redis that lost them.
const MAX_KNOWN: usize = 1 << 20;

/// How this gateway stands with the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Standing {
    /// It is alone, and wants it so.
    Alone,
    /// It has just started, and does not know yet what the others revoked.
    Waiting,
    /// It hears them.
    Together,
    /// It has not heard them for longer than the policy lets pass.
    Lost,
}

/// The face of it all. Older than any snapshot.
pub struct Shared {
    /// Names this process in the log.
    origin: String,
    standing: AtomicU8,
    known: Mutex<Known>,
    outbox: Mutex<VecDeque<(Arc<str>, u64)>>,
    overflown: AtomicBool,
    posted: Notify,
    link: ArcSwapOption<Link>,
    heard: Mutex<Option<Instant>>,
}

/// Whether a name was taken for the first time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// Yes, over all gateways.
    First,
    /// No: it was taken already.
    Again,
    /// Nobody could say in time.
    Unknown,
    /// This gateway is alone; there is nobody to ask.
    Alone,
}

/// Revocations by the text of their record.
#[derive(Default)]
struct Known {
    records: HashMap<Arc<str>, Seen>,
    round: u32,
}

struct Seen {
    until: u64,
    /// When the live set was last read, and held it.
    round: u32,
}

/// The way of requests to Redis.
struct Link {
    connection: Connection,
    keys: Keys,
    board: Board,
    tickets: TicketBoard,
    deadline: Duration,
    /// An answer was late: nobody asks until a probe was answered.
    suspect: AtomicBool,
    /// The key that it was late with.
    late: Mutex<String>,
    probe: Notify,
    /// Where requests ask about rates, to be asked together.
    rates: mpsc::Sender<rates::Asked>,
}

impl Link {
    /// Nobody asks until whoever has `key` answers a probe.
    fn was_late(&self, fault: &Fault, key: &str) {
        if !self.suspect.swap(true, Ordering::AcqRel) {
            tracing::warn!(%fault, "Redis did not answer a request in time");
            key.clone_into(&mut lock(&self.late));
            self.probe.notify_one();
        }
    }
}

impl Shared {
    /// Of a process whose first policy does or does not name servers.
    ///
    /// # Errors
    /// The system has no random numbers to give.
    pub fn new(policy: &Policy) -> Result<Self, ring::error::Unspecified> {
        let mut name = [0; 16];
        SystemRandom::new().fill(&mut name)?;
        let standing = if policy.shared().is_some() { Standing::Waiting } else { Standing::Alone };
        Ok(Self {
            origin: name.iter().map(|byte| format!("{byte:02x}")).collect(),
            standing: AtomicU8::new(standing as u8),
            known: Mutex::default(),
            outbox: Mutex::default(),
            overflown: AtomicBool::new(false),
            posted: Notify::new(),
            link: ArcSwapOption::empty(),
            heard: Mutex::new(None),
        })
    }

    /// How this gateway stands with the others.
    pub fn standing(&self) -> Standing {
        let standing = self.standing.load(Ordering::Acquire);
        [Standing::Alone, Standing::Waiting, Standing::Together]
            .into_iter()
            .find(|it| *it as u8 == standing)
            .unwrap_or(Standing::Lost)
    }

    /// What `policy` wants, if what others revoked cannot be known now.
    pub fn lost(&self, policy: &Policy) -> Option<OnLoss> {
        policy.shared().map(|shared| shared.on_loss).filter(|_| self.is_lost())
    }

    /// Whether what others revoked cannot be known now.
    pub fn is_lost(&self) -> bool {
        matches!(self.standing(), Standing::Waiting | Standing::Lost)
    }

    /// Lets the others know of a revocation, as soon as they can be reached. Never waits.
    pub fn publish(&self, revocation: &Revocation<'_>) {
        if self.standing() == Standing::Alone {
            return;
        }
        let record: Arc<str> = encode(revocation).into();
        if !lock(&self.known).learn(&record, revocation.until, None) {
            tracing::error!("a revocation cannot be kept for a Redis that loses it: too many");
        }
        let mut outbox = lock(&self.outbox);
        if outbox.len() < MAX_OUTBOX {
            outbox.push_back((record, revocation.until));
        } else {
            self.overflown.store(true, Ordering::Release);
        }
        drop(outbox);
        self.posted.notify_one();
    }

    /// Takes a name that only the first may have, over all gateways, for `ttl`. Waits for one round trip, for the policy's
    /// deadline at most.
    pub async fn take_once(&self, name: &str, ttl: Duration) -> Taken {
        if self.standing() == Standing::Alone {
            return Taken::Alone;
        }
        let Some(link) = self.trusted_link() else { return Taken::Unknown };
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX).max(1);
        match link.connection.ask(&link.keys.take_once(name, ttl_ms), link.deadline).await {
            Ok(Value::Okay) => Taken::First,
            Ok(Value::Nil) => Taken::Again,
            Ok(_) => Taken::Unknown,
            Err(error) => {
                link.was_late(&error, &link.keys.once(name));
                Taken::Unknown
            }
        }
    }

    /// Whether rates can be asked about now.
    pub fn knows_rates(&self) -> bool {
        self.trusted_link().is_some()
    }

    /// Takes from rates of all gateways, in one round trip for this request and others. Never waits; the answer can be waited for.
    /// Nothing if nobody can be asked now.
    pub fn ask_rates(&self, asks: Vec<RateAsk>) -> Option<RateAnswers> {
        RateAnswers::ask(self.trusted_link()?, asks)
    }

    /// The way to Redis, if it answered in time of late.
    fn trusted_link(&self) -> Option<Arc<Link>> {
        self.link.load_full().filter(|link| !link.suspect.load(Ordering::Acquire))
    }

    /// Clears away what has expired at `now`. Meant to be called every minute or so.
    pub fn forget_expired(&self, now: u64) {
        lock(&self.known).records.retain(|_, seen| now < seen.until);
    }

    fn stand(&self, standing: Standing) -> Standing {
        let before = self.standing();
        self.standing.store(standing as u8, Ordering::Release);
        before
    }

    fn hear(&self) {
        *lock(&self.heard) = Some(Instant::now());
    }
}

impl Known {
    /// Whether there was room. `round` is given by who read it in the live set.
    fn learn(&mut self, record: &Arc<str>, until: u64, round: Option<u32>) -> bool {
        if let Some(seen) = self.records.get_mut(record) {
            // Longer than the live set has it: that is missing there.
            if until > seen.until {
                seen.round = 0;
            }
            if until >= seen.until {
                seen.round = round.unwrap_or(seen.round);
            }
            seen.until = seen.until.max(until);
            return true;
        }
        if self.records.len() >= MAX_KNOWN {
            return false;
        }
        self.records.insert(record.clone(), Seen { until, round: round.unwrap_or(0) });
        true
    }

    /// What the live set did not hold when it was read in `round`.
    fn missing(&self, round: u32, now: u64) -> Vec<(Arc<str>, u64)> {
        let missing = self.records.iter().filter(|(_, seen)| seen.round != round && now < seen.until);
        missing.map(|(record, seen)| (record.clone(), seen.until)).collect()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("standing", &self.standing()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_live_set_lost_is_found_missing() {
        let mut known = Known::default();
        let [one, two, three]: [Arc<str>; 3] = ["1".into(), "2".into(), "3".into()];
        assert!(known.learn(&one, 100, None));
        known.round += 1;
        assert!(known.learn(&two, 100, Some(known.round)));
        assert!(known.learn(&three, 100, Some(known.round)));
        assert_eq!(known.missing(known.round, 0), [(one.clone(), 100)]);
        // Known for longer than Redis has it.
        assert!(known.learn(&three, 200, None));
        known.learn(&three, 100, Some(known.round));
        let mut missing = known.missing(known.round, 0);
        missing.sort();
        assert_eq!(missing, [(one.clone(), 100), (three.clone(), 200)]);
        // The next time it is read, Redis is empty.
        known.round += 1;
        assert_eq!(known.missing(known.round, 0).len(), 3);
        assert_eq!(known.missing(known.round, 100), [(three, 200)]);
    }
}
