//! The rates of one policy, ready to be asked.

use std::cell::Cell;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use governor::clock::Clock;
use governor::middleware::{StateInformationMiddleware, StateSnapshot};
use governor::nanos::Nanos;
use governor::{Quota, RateLimiter};
use http::HeaderValue;
use http::header::{HeaderMap, HeaderName, RETRY_AFTER};
use sealgate_policy::{Mode, Rate, RateExceeded, RateFacts, RateIndex, RateKey};

use super::store::{Cells, Overflow};
use super::{AddressKey, RateStore};

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// Longest wait that a rate can stand for. governor counts nanoseconds in 64 bits and overflows beyond 584 years.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// What a rate reads the time from: the system's monotonic clock, or one that a test moves.
#[derive(Clone, Debug, Default)]
pub struct RateClock(Option<Arc<Moved>>);

#[derive(Debug)]
struct Moved {
    start: Instant,
    nanos: AtomicU64,
}

impl RateClock {
    /// A clock that stands at `start` until it is moved.
    pub fn standing(start: Instant) -> Self {
        RateClock(Some(Arc::new(Moved { start, nanos: AtomicU64::new(0) })))
    }

    /// Moves a standing clock, and all its clones, forward. The system's clock takes no notice.
    pub fn advance(&self, by: Duration) {
        if let Some(moved) = &self.0 {
            moved.nanos.fetch_add(nanos(by), Ordering::Relaxed);
        }
    }

    /// The time.
    pub fn now(&self) -> Instant {
        match &self.0 {
            None => Instant::now(),
            Some(moved) => moved.start + Duration::from_nanos(moved.nanos.load(Ordering::Relaxed)),
        }
    }
}

/// A policy's rates over the process's [`RateStore`].
///
/// Part of the snapshot. A rate of the same name in the next policy goes on with the same cells, whatever became of
/// its numbers: stricter or laxer holds at once, for what was used before too.
#[derive(Debug)]
pub struct Rates {
    store: Arc<RateStore>,
    clock: RateClock,
    limits: Box<[Limit]>,
}

/// One rate, prepared.
#[derive(Debug)]
struct Limit {
    /// Stands for the rate's name in every key.
    name: u64,
    per: Box<[RateKey]>,
    quota: Quota,
    /// How far ahead a cell is when all its burst is used: burst × interval, in nanoseconds.
    reach: u64,
    enforced: bool,
    overflow: Arc<Overflow>,
    /// `"name"` as a structured field string (RFC 9651 §3.3.3).
    quoted_name: Box<str>,
    /// `"name";q=600;w=60`.
    policy_header: HeaderValue,
    /// The policy's quota, for the standing.
    allowed: u32,
}

impl Rates {
    /// Prepares `rates`, whose [`RateIndex`]es are their places in the slice.
    pub fn build(rates: &[Rate], store: &Arc<RateStore>, clock: RateClock) -> Self {
        let now = clock.now();
        let limits = rates.iter().map(|rate| Limit::new(rate, store, now)).collect();
        Rates { store: Arc::clone(store), clock, limits }
    }

    /// Takes one from each of the rates, at the clock's time; see [`take_at`](Self::take_at).
    pub fn take(&self, wanted: &[RateIndex], facts: &RateFacts<'_>) -> Result<RateStanding, RateExceeded> {
        self.take_at(wanted, facts, self.clock.now())
    }

    /// Takes one from each of the rates, or says which is used up.
    ///
    /// With several rates all are looked at before any is taken from, so what one refuses costs nothing of the
    /// others (but for a race between cores, which can only err against the caller); the refusal with the longest
    /// wait is reported, so that a client which heeds it is not refused again by the next.
    ///
    /// A rate in shadow mode never hides an enforced one's refusal; it is reported only when nothing else refuses,
    /// after the enforced rates have been taken from.
    ///
    /// A key made of a subject or session that the facts lack is the address instead, and a rate index that the
    /// policy does not have is used up for ever.
    ///
    /// # Errors
    /// [`RateExceeded`]: refuse with 429 or 4429, unless that rate's mode is shadow.
    pub fn take_at(
        &self,
        wanted: &[RateIndex],
        facts: &RateFacts<'_>,
        now: Instant,
    ) -> Result<RateStanding, RateExceeded> {
        let now = self.store.since_epoch(now);
        if let [_, _, ..] = wanted {
            self.peek(wanted, facts, now)?;
        }
        let mut standing = RateStanding::default();
        let mut shadowed = None;
        for &rate in wanted {
            match self.check(rate, facts, now, false) {
                Ok((limit, snapshot)) if limit.enforced => standing.tighten(rate, limit, &snapshot),
                Ok(_) => {}
                Err(exceeded) if self.enforced(rate) => return Err(exceeded),
                Err(exceeded) => shadowed = Some(exceeded),
            }
        }
        shadowed.map_or(Ok(standing), Err)
    }

    /// Writes `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-10) for a request that was
    /// let through. Nothing where no enforced rate applied.
    pub fn write_standing(&self, standing: &RateStanding, headers: &mut HeaderMap) {
        let Some(tightest) = &standing.tightest else { return };
        self.write(tightest.rate, tightest.remaining, tightest.reset, headers);
    }

    /// Writes `RateLimit`, `RateLimit-Policy` and `Retry-After` for a request that `Denial::RateExceeded` refused.
    pub fn write_refusal(&self, rate: RateIndex, retry_after: Duration, headers: &mut HeaderMap) {
        self.write(rate, 0, retry_after, headers);
        headers.insert(RETRY_AFTER, HeaderValue::from(retry_after_seconds(retry_after)));
    }

    fn write(&self, RateIndex(index): RateIndex, remaining: u32, reset: Duration, headers: &mut HeaderMap) {
        let Some(limit) = self.limits.get(index) else { return };
        headers.insert(RATE_LIMIT_POLICY, limit.policy_header.clone());
        let mut text = String::with_capacity(limit.quoted_name.len() + 32);
        let seconds = whole_seconds(reset);
        if write!(text, "{};r={remaining};t={seconds}", limit.quoted_name).is_ok() {
            headers.extend(HeaderValue::try_from(text).ok().map(|value| (RATE_LIMIT, value)));
        }
    }

    /// Refuses if an enforced one of the rates would, and then with the longest wait of all that would.
    fn peek(&self, wanted: &[RateIndex], facts: &RateFacts<'_>, now: u64) -> Result<(), RateExceeded> {
        let enforced = wanted.iter().filter(|&&rate| self.enforced(rate));
        let refusals = enforced.filter_map(|&rate| self.check(rate, facts, now, true).err());
        refusals.max_by_key(|exceeded| exceeded.retry_after).map_or(Ok(()), Err)
    }

    fn enforced(&self, RateIndex(index): RateIndex) -> bool {
        self.limits.get(index).is_none_or(|limit| limit.enforced)
    }

    fn check(
        &self,
        rate: RateIndex,
        facts: &RateFacts<'_>,
        now: u64,
        peek: bool,
    ) -> Result<(&Limit, StateSnapshot), RateExceeded> {
        // INVARIANT: the policy that made the index made these limits. Fail closed all the same.
        let limit = self.limits.get(rate.0).ok_or(RateExceeded { rate, retry_after: LONGEST })?;
        let key = self.store.hash(Key { limit, facts });
        let cells = Cells { store: &self.store, overflow: &limit.overflow, now, reach: limit.reach, peek };
        // governor takes the time at which a limiter is made for the zero of its cells. Ours have one zero for all
        // snapshots, so the limiter is made at that zero, and only then the time set. It is three words on the stack.
        let limiter = RateLimiter::<_, _, _, StateInformationMiddleware>::new(limit.quota, cells, Moment::default());
        limiter.clock().0.set(now);
        match limiter.check_key(&key) {
            Ok(snapshot) => Ok((limit, snapshot)),
            Err(not_until) => {
                Err(RateExceeded { rate, retry_after: not_until.wait_time_from(Nanos::new(now)) })
            }
        }
    }
}

impl Limit {
    fn new(rate: &Rate, store: &RateStore, now: Instant) -> Self {
        let interval = (rate.period.min(LONGEST) / rate.quota.get()).max(Duration::from_nanos(1));
        let most = u32::try_from(nanos(LONGEST) / nanos(interval)).unwrap_or(u32::MAX);
        let burst = NonZeroU32::new(rate.burst.get().min(most)).unwrap_or(NonZeroU32::MIN);
        let quota = Quota::with_period(interval)
            .unwrap_or_else(|| Quota::per_second(NonZeroU32::MIN))
            .allow_burst(burst);
        let name = store.hash(("rate", &*rate.name));
        let quoted_name = quoted(&rate.name);
        Limit {
            name,
            per: rate.per.clone().into(),
            quota,
            reach: nanos(interval).saturating_mul(burst.get().into()),
            enforced: matches!(rate.mode, Mode::Enforce),
            overflow: store.overflow_of(name, now),
            policy_header: policy_header(&quoted_name, rate.quota, rate.period),
            quoted_name,
            allowed: rate.quota.get(),
        }
    }
}

/// How a rate stands after a request was let through: by its tightest enforced rate.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RateStanding {
    tightest: Option<Tightest>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Tightest {
    rate: RateIndex,
    limit: u32,
    remaining: u32,
    reset: Duration,
}

impl RateStanding {
    /// The tightest of the rates taken from; nothing where no enforced rate applied.
    pub fn rate(&self) -> Option<RateIndex> {
        self.tightest.as_ref().map(|tightest| tightest.rate)
    }

    /// That rate's quota per period.
    pub fn limit(&self) -> Option<u32> {
        self.tightest.as_ref().map(|tightest| tightest.limit)
    }

    /// Requests that could follow at once.
    pub fn remaining(&self) -> Option<u32> {
        self.tightest.as_ref().map(|tightest| tightest.remaining)
    }

    /// Until the whole burst is there again, if nothing more is taken; at most one interval too long.
    pub fn reset(&self) -> Option<Duration> {
        self.tightest.as_ref().map(|tightest| tightest.reset)
    }

    fn tighten(&mut self, rate: RateIndex, limit: &Limit, snapshot: &StateSnapshot) {
        let remaining = snapshot.remaining_burst_capacity();
        let used = limit.quota.burst_size().get().saturating_sub(remaining);
        let reset = limit.quota.replenish_interval().saturating_mul(used);
        let tighter = |known: &Tightest| (remaining, known.reset) < (known.remaining, reset);
        if self.tightest.as_ref().is_none_or(tighter) {
            self.tightest = Some(Tightest { rate, limit: limit.allowed, remaining, reset });
        }
    }
}

/// A wait as `Retry-After` has it (RFC 9110 §10.2.3): whole seconds, rounded up, and never 0.
pub fn retry_after_seconds(wait: Duration) -> u64 {
    whole_seconds(wait).max(1)
}

/// What a cell's key is the hash of.
struct Key<'a> {
    limit: &'a Limit,
    facts: &'a RateFacts<'a>,
}

impl Hash for Key<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let facts = self.facts;
        state.write_u64(self.limit.name);
        for part in &*self.limit.per {
            // A tag before each value, so that a subject never meets an address or session of the same text.
            match (part, facts.subject, facts.session) {
                (RateKey::Subject, Some(subject), _) => (1u8, facts.issuer, subject).hash(state),
                (RateKey::Session, _, Some(session)) => (2u8, facts.issuer, session).hash(state),
                (RateKey::Address, ..) | (RateKey::Subject, None, _) | (RateKey::Session, _, None) => {
                    (0u8, AddressKey::from(facts.address)).hash(state);
                }
                (RateKey::Route, ..) => (3u8, facts.route).hash(state),
                (RateKey::MessageType, ..) => (4u8, facts.message_type).hash(state),
            }
        }
    }
}

/// One moment as governor's clock, in nanoseconds since the store's epoch; at first the epoch itself.
#[derive(Default)]
struct Moment(Cell<u64>);

impl Clock for Moment {
    type Instant = Nanos;

    fn now(&self) -> Nanos {
        Nanos::new(self.0.get())
    }
}

fn policy_header(quoted_name: &str, quota: NonZeroU32, period: Duration) -> HeaderValue {
    // The draft knows whole seconds only; a period that is none is stated for the next longer window that is.
    let window = whole_seconds(period).max(1);
    let scaled = Duration::from_secs(window).as_nanos() * u128::from(quota.get()) / period.as_nanos().max(1);
    HeaderValue::try_from(format!("{quoted_name};q={scaled};w={window}")).unwrap_or(HeaderValue::from_static(""))
}

/// A structured field string holds visible ASCII and blanks; a rate named otherwise shows `_` in their place.
fn quoted(name: &str) -> Box<str> {
    let plain = |c: char| if c == ' ' || c.is_ascii_graphic() { c } else { '_' };
    let mut text = String::from('"');
    for c in name.chars().map(plain) {
        if matches!(c, '"' | '\\') {
            text.push('\\');
        }
        text.push(c);
    }
    text.push('"');
    text.into()
}

fn whole_seconds(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
