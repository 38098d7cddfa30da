//! The rates of one policy, ready to be asked.

use std::cell::Cell;
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::num::NonZeroU32;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use governor::clock::Clock;
use governor::middleware::{StateInformationMiddleware, StateSnapshot};
use governor::nanos::Nanos;
use governor::{Quota, RateLimiter};
use http::HeaderValue;
use http::header::{HeaderMap, HeaderName, RETRY_AFTER};
use prometheus::IntCounter;
use ring::digest;
use sealgate_policy::{Mode, OnRateError, Rate, RateExceeded, RateFacts, RateIndex, RateKey};

use super::store::{Cells, Overflow};
use super::{AddressKey, RateStore};
use crate::shared::{AskKind, RateAnswer, RateAsk, Shared};

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// Longest wait that a rate can stand for. governor counts nanoseconds in 64 bits and overflows beyond 584 years.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Ends when it is known, or cannot be known, how rates stand that other gateways take from too. It ends soon.
pub type Settling = Pin<Box<dyn Future<Output = ()>>>;

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
    shape: KeyShape,
    /// Whether its keys hold something of a verified token.
    of_identity: bool,
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
    counters: Option<RateCounters>,
    shared: Option<SharedLimit>,
}

/// The part of a rate that counts over all gateways.
#[derive(Debug)]
struct SharedLimit {
    name: Box<str>,
    /// In microseconds.
    interval: f64,
    on_error: OnRateError,
}

/// What became of what was asked of a rate: its metric's children.
#[derive(Clone, Debug)]
pub struct RateCounters {
    /// Requests and messages that it let through.
    pub allowed: IntCounter,
    /// Those that it refused.
    pub refused: IntCounter,
    /// Those that it would have refused, were it not in shadow mode.
    pub shadowed: IntCounter,
    /// Those about which Redis did not answer, of a shared rate.
    pub unanswered: IntCounter,
}

/// What one request takes from shared rates, and the cells that are to hear of it.
struct SharedPart {
    asks: Vec<RateAsk>,
    cells: Vec<(RateIndex, u64)>,
}

impl Rates {
    /// Prepares `rates`, whose [`RateIndex`]es are their places in the slice.
    pub fn build(rates: &[Rate], store: &Arc<RateStore>, clock: RateClock) -> Self {
        let now = clock.now();
        let limits = rates.iter().map(|rate| Limit::new(rate, store, now)).collect();
        Rates { store: Arc::clone(store), clock, limits }
    }

    /// The same, counting what becomes of what is asked; `counters` gives a rate's by its name.
    #[must_use]
    pub fn counted(mut self, rates: &[Rate], counters: impl Fn(&str) -> RateCounters) -> Self {
        for (limit, rate) in self.limits.iter_mut().zip(rates) {
            limit.counters = Some(counters(&rate.name));
        }
        self
    }

    /// Takes one from each of the rates, at the clock's time; see [`take_at`](Self::take_at).
    ///
    /// # Errors
    /// As there.
    pub fn take(
        &self,
        wanted: &[RateIndex],
        facts: &RateFacts<'_>,
    ) -> Result<Option<RateStanding>, RateExceeded> {
        self.take_at(wanted, facts, self.clock.now())
    }

    /// Takes `facts.cost` from each of the rates, or says which is used up.
    ///
    /// With several rates all are looked at before any is taken from, so what one refuses costs nothing of the
    /// others (but for a race between cores, which can only err against the caller); the refusal with the longest
    /// wait is reported, so that a client which heeds it is not refused again by the next.
    ///
    /// A rate in shadow mode never hides an enforced one's refusal; it is reported only when nothing else refuses,
    /// after the enforced rates have been taken from.
    ///
    /// A key made of a subject or session that the facts lack is the address instead, and a rate index that the
    /// policy does not have is used up for ever. Gives the standing of the tightest enforced rate, or nothing if
    /// there was none. Allocates nothing.
    ///
    /// # Errors
    /// [`RateExceeded`]: refuse with 429 or 4429, unless that rate's mode is shadow.
    pub fn take_at(
        &self,
        wanted: &[RateIndex],
        facts: &RateFacts<'_>,
        now: Instant,
    ) -> Result<Option<RateStanding>, RateExceeded> {
        let outcome = self.try_take(wanted, facts, self.store.since_epoch(now));
        self.count(wanted, &outcome);
        outcome
    }

    fn try_take(
        &self,
        wanted: &[RateIndex],
        facts: &RateFacts<'_>,
        now: u64,
    ) -> Result<Option<RateStanding>, RateExceeded> {
        if let [_, _, ..] = wanted {
            self.peek(wanted, facts, now)?;
        }
        let mut tightest: Option<RateStanding> = None;
        let mut shadowed = None;
        for &rate in wanted {
            match self.check(rate, facts, now, false) {
                Ok((limit, snapshot)) if limit.enforced => {
                    let standing = RateStanding::of(rate, limit, &snapshot);
                    tightest = Some(tightest.map_or(standing, |known| known.tighter(standing)));
                }
                Ok(_) => {}
                Err(exceeded) if self.enforced(rate) => return Err(exceeded),
                Err(exceeded) => shadowed = Some(exceeded),
            }
        }
        shadowed.map_or(Ok(tightest), Err)
    }

    /// Whether any of the rates counts over all gateways: then [`Rates::take_shared`] or [`Rates::take_owed`] has to be asked.
    pub fn shares(&self, wanted: &[RateIndex]) -> bool {
        wanted.iter().any(|&rate| self.shared(rate).is_some())
    }

    /// [`Rates::take`] where some of the rates count over all gateways. Waits for one round trip to Redis, within the policy's deadline;
    /// for none where this gateway knows of no room, or Redis was late just now.
    ///
    /// # Errors
    /// As [`Rates::take`]; and unknown, where a rate would rather refuse while Redis does not answer.
    pub async fn take_shared(
        &self,
        shared: &Shared,
        wanted: &[RateIndex],
        facts: &RateFacts<'_>,
    ) -> Result<Option<RateStanding>, RateExceeded> {
        let outcome = self.try_take_shared(shared, wanted, facts).await;
        self.count(wanted, &outcome);
        outcome
    }

    async fn try_take_shared(
        &self,
        shared: &Shared,
        wanted: &[RateIndex],
        facts: &RateFacts<'_>,
    ) -> Result<Option<RateStanding>, RateExceeded> {
        // What is used up here is used up everywhere.
        self.peek(wanted, facts, self.now())?;
        let part = self.part(wanted, facts, AskKind::Enforced);
        let answers = match shared.ask_rates(part.asks) {
            Some(answers) => answers.wait().await,
            None => None,
        };
        let Some(answers) = answers else { return self.take_unanswered(wanted, facts) };
        self.learn(&part.cells, &answers);
        let stood = || part.cells.iter().map(|(rate, _)| *rate).zip(&answers);
        let (refused, shadowed): (Vec<_>, Vec<_>) = stood()
            .filter(|(_, answer)| !answer.wait.is_zero())
            .map(|(rate, answer)| exceeded(rate, answer.wait))
            .partition(|exceeded| self.enforced(exceeded.rate));
        if let Some(refused) = refused.into_iter().max_by_key(|exceeded| exceeded.retry_after) {
            return Err(refused);
        }
        let local: Vec<_> = wanted.iter().copied().filter(|&rate| self.shared(rate).is_none()).collect();
        let tightest = self.try_take(&local, facts, self.now())?;
        if let Some(shadowed) = shadowed.into_iter().next() {
            return Err(shadowed);
        }
        let standings = stood().filter(|(rate, _)| self.enforced(*rate)).filter_map(|(rate, answer)| {
            Some(RateStanding::ahead(rate, self.limits.get(rate.0)?, answer.ahead))
        });
        Ok(tightest.into_iter().chain(standings).reduce(RateStanding::tighter))
    }

    /// [`Rates::take`] for what cannot wait. It is judged by what this gateway knows, and told to Redis if it passes; the future ends
    /// when Redis has answered, or the policy's deadline has passed. What was too much, because others took at the same time, is
    /// owed: it is waited for by what follows.
    ///
    /// # Errors
    /// As [`Rates::take_shared`].
    pub fn take_owed(
        self: &Arc<Self>,
        shared: &Shared,
        wanted: &[RateIndex],
        facts: &RateFacts<'_>,
    ) -> Result<Option<Settling>, RateExceeded> {
        if !self.shares(wanted) {
            return self.take(wanted, facts).map(|_| None);
        }
        if !shared.knows_rates() {
            let outcome = self.take_unanswered(wanted, facts);
            self.count(wanted, &outcome);
            return outcome.map(|_| None);
        }
        match self.take(wanted, facts) {
            Err(exceeded) if self.enforced(exceeded.rate) => return Err(exceeded),
            // In shadow mode: nothing keeps it from passing.
            Ok(_) | Err(_) => {}
        }
        let SharedPart { asks, cells } = self.part(wanted, facts, AskKind::Owed);
        let rates = Arc::clone(self);
        Ok(shared.ask_rates(asks).map(|answers| -> Settling {
            Box::pin(async move {
                if let Some(answers) = answers.wait().await {
                    rates.learn(&cells, &answers);
                }
            })
        }))
    }

    /// What each rule wants where nobody can say how its rate stands.
    fn take_unanswered(
        &self,
        wanted: &[RateIndex],
        facts: &RateFacts<'_>,
    ) -> Result<Option<RateStanding>, RateExceeded> {
        let mut counted = Vec::with_capacity(wanted.len());
        for &rate in wanted {
            let on_error = self.shared(rate).map(|shared| shared.on_error);
            let counters = self.limits.get(rate.0).and_then(|limit| limit.counters.as_ref());
            if let (Some(_), Some(counters)) = (on_error, counters) {
                counters.unanswered.inc();
            }
            match on_error {
                Some(OnRateError::Deny) if self.enforced(rate) => {
                    return Err(RateExceeded { unknown: true, ..exceeded(rate, Duration::from_secs(1)) });
                }
                Some(OnRateError::Allow | OnRateError::Deny) => {}
                Some(OnRateError::Local) | None => counted.push(rate),
            }
        }
        self.try_take(&counted, facts, self.now())
    }

    fn shared(&self, RateIndex(index): RateIndex) -> Option<&SharedLimit> {
        self.limits.get(index)?.shared.as_ref()
    }

    fn part(&self, wanted: &[RateIndex], facts: &RateFacts<'_>, enforced: AskKind) -> SharedPart {
        let mut part = SharedPart { asks: Vec::new(), cells: Vec::new() };
        for &rate in wanted {
            let Some(limit) = self.limits.get(rate.0) else { continue };
            let Some(shared) = &limit.shared else { continue };
            let key = limit.shape.key(facts);
            part.cells.push((rate, self.store.key(&key, limit.of_identity)));
            part.asks.push(RateAsk {
                key: format!("{}:{}", shared.name, key.digest()),
                interval: shared.interval,
                reach: shared.interval * f64::from(limit.quota.burst_size().get()),
                cost: facts.cost.get(),
                kind: if limit.enforced { enforced } else { AskKind::Shadow },
            });
        }
        part
    }

    /// Writes into this gateway's cells how rates stand over all.
    fn learn(&self, cells: &[(RateIndex, u64)], answers: &[RateAnswer]) {
        let now = self.now();
        for ((rate, key), answer) in cells.iter().zip(answers) {
            if let Some(limit) = self.limits.get(rate.0) {
                let cells = Cells {
                    store: &self.store,
                    overflow: &limit.overflow,
                    now,
                    reach: limit.reach,
                    peek: false,
                };
                cells.raise(*key, now.saturating_add(nanos(answer.ahead)));
            }
        }
    }

    fn now(&self) -> u64 {
        self.store.since_epoch(self.clock.now())
    }

    fn count(&self, wanted: &[RateIndex], outcome: &Result<Option<RateStanding>, RateExceeded>) {
        let counters = |rate: RateIndex| self.limits.get(rate.0).and_then(|limit| limit.counters.as_ref());
        match outcome {
            Ok(_) => {
                for counters in wanted.iter().filter_map(|&rate| counters(rate)) {
                    counters.allowed.inc();
                }
            }
            Err(exceeded) => match counters(exceeded.rate) {
                Some(counters) if self.enforced(exceeded.rate) => counters.refused.inc(),
                Some(counters) => counters.shadowed.inc(),
                None => {}
            },
        }
    }

    /// Writes `RateLimit` and `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-10) for a request that was
    /// let through.
    pub fn write_standing(&self, standing: &RateStanding, headers: &mut HeaderMap) {
        self.write(standing.rate, standing.remaining, standing.reset, headers);
    }

    /// Writes `RateLimit`, `RateLimit-Policy` and `Retry-After` for a request that was refused.
    pub fn write_refusal(&self, rate: RateIndex, retry_after: Duration, headers: &mut HeaderMap) {
        self.write(rate, 0, retry_after, headers);
        headers.insert(RETRY_AFTER, HeaderValue::from(retry_after_seconds(retry_after)));
    }

    fn write(&self, RateIndex(index): RateIndex, remaining: u32, reset: Duration, headers: &mut HeaderMap) {
        let Some(limit) = self.limits.get(index) else {
            return;
        };
        headers.insert(RATE_LIMIT_POLICY, limit.policy_header.clone());
        let mut text = String::with_capacity(limit.quoted_name.len() + 32);
        let seconds = whole_seconds(reset);
        let written = write!(text, "{};r={remaining};t={seconds}", limit.quoted_name);
        if let (Ok(()), Ok(value)) = (written, HeaderValue::try_from(text)) {
            headers.insert(RATE_LIMIT, value);
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
        let limit = self.limits.get(rate.0).ok_or(exceeded(rate, LONGEST))?;
        let key = self.store.key(limit.shape.key(facts), limit.of_identity);
        // What a shared rate's messages owe goes beyond its burst.
        let reach = if limit.shared.is_some() { limit.reach.saturating_mul(2) } else { limit.reach };
        let cells = Cells { store: &self.store, overflow: &limit.overflow, now, reach, peek };
        // governor takes the time at which a limiter is made for the zero of its cells. Ours have one zero for all
        // snapshots, so the limiter is made at that zero, and only then the time set. It is three words on the stack.
        let limiter =
            RateLimiter::<_, _, _, StateInformationMiddleware>::new(limit.quota, cells, Moment::default());
        limiter.clock().0.set(now);
        match limiter.check_key_n(&key, facts.cost) {
            Ok(Ok(snapshot)) => Ok((limit, snapshot)),
            Ok(Err(not_until)) => Err(exceeded(rate, not_until.wait_time_from(Nanos::new(now)))),
            // INVARIANT: a policy whose cost exceeds a burst does not compile.
            Err(_) => Err(exceeded(rate, LONGEST)),
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
            shape: KeyShape {
                name,
                per: rate.per.clone().into(),
                header: rate.header.clone(),
                ipv6_prefix: rate.ipv6_prefix,
            },
            of_identity: rate.per.iter().any(|key| key.is_of_identity()),
            quota,
            reach: nanos(interval).saturating_mul(burst.get().into()),
            enforced: matches!(rate.mode, Mode::Enforce),
            overflow: store.overflow_of(name, now),
            policy_header: policy_header(&quoted_name, rate.quota, rate.period),
            quoted_name,
            allowed: rate.quota.get(),
            counters: None,
            shared: rate.shared.map(|on_error| SharedLimit {
                name: (*rate.name).into(),
                interval: rate.period.as_secs_f64() * 1e6 / f64::from(rate.quota.get()),
                on_error,
            }),
        }
    }
}

/// How a rate stands after a request was let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateStanding {
    /// The rate.
    pub rate: RateIndex,
    /// Its quota per period.
    pub limit: u32,
    /// Requests that could follow at once.
    pub remaining: u32,
    /// Until the whole burst is there again if nothing more is taken; up to one interval too long.
    pub reset: Duration,
}

fn exceeded(rate: RateIndex, retry_after: Duration) -> RateExceeded {
    RateExceeded { rate, retry_after, unknown: false }
}

impl RateStanding {
    /// Of a rate that is so far ahead.
    fn ahead(rate: RateIndex, limit: &Limit, ahead: Duration) -> Self {
        let left = limit.reach.saturating_sub(nanos(ahead));
        let remaining = left / nanos(limit.quota.replenish_interval()).max(1);
        let remaining = u32::try_from(remaining).unwrap_or(u32::MAX);
        RateStanding { rate, limit: limit.allowed, remaining, reset: ahead }
    }

    fn of(rate: RateIndex, limit: &Limit, snapshot: &StateSnapshot) -> Self {
        let remaining = snapshot.remaining_burst_capacity();
        let used = limit.quota.burst_size().get().saturating_sub(remaining);
        let reset = limit.quota.replenish_interval().saturating_mul(used);
        RateStanding { rate, limit: limit.allowed, remaining, reset }
    }

    /// The one that leaves less; of two that leave the same, the one that takes longer to recover.
    fn tighter(self, other: Self) -> Self {
        let tightness = |it: &Self| (it.remaining, std::cmp::Reverse(it.reset));
        std::cmp::min_by_key(self, other, tightness)
    }
}

/// A wait as `Retry-After` has it (RFC 9110 §10.2.3): whole seconds, rounded up, and never 0.
pub fn retry_after_seconds(wait: Duration) -> u64 {
    whole_seconds(wait).max(1)
}

/// What is counted apart.
#[derive(Debug)]
pub(super) struct KeyShape {
    /// Stands for the limit's name in every key.
    pub(super) name: u64,
    pub(super) per: Box<[RateKey]>,
    pub(super) header: Option<HeaderName>,
    pub(super) ipv6_prefix: u8,
}

impl KeyShape {
    pub(super) fn key<'a>(&'a self, facts: &'a RateFacts<'a>) -> Key<'a> {
        Key { shape: self, facts }
    }
}

/// What a cell's key is the hash of.
pub(super) struct Key<'a> {
    shape: &'a KeyShape,
    facts: &'a RateFacts<'a>,
}

impl Hash for Key<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.shape.name);
        self.parts(&mut |tag, bytes| {
            state.write_u8(tag);
            state.write_usize(bytes.len());
            state.write(bytes);
        });
    }
}

impl Key<'_> {
    /// The same on all gateways: half of a SHA-256, in hexadecimal.
    fn digest(&self) -> String {
        let mut context = digest::Context::new(&digest::SHA256);
        self.parts(&mut |tag, bytes| {
            context.update(&[tag]);
            context.update(&u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_be_bytes());
            context.update(bytes);
        });
        let digest = context.finish();
        digest.as_ref().iter().take(16).fold(String::with_capacity(32), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    }

    /// Everything that makes the key, with a tag before each value, so that a subject never meets an address or session of the same
    /// text.
    fn parts(&self, add: &mut impl FnMut(u8, &[u8])) {
        let facts = self.facts;
        for part in &*self.shape.per {
            let known = match part {
                RateKey::Address => false,
                RateKey::Subject => add_named(1, facts.issuer, facts.subject, add),
                RateKey::Session => add_named(2, facts.issuer, facts.session, add),
                RateKey::Route => add_some(3, Some(facts.route), add),
                RateKey::MessageType => {
                    add(4, facts.message_type.unwrap_or_default().as_bytes());
                    true
                }
                RateKey::Socket => {
                    add(5, &facts.socket.unwrap_or_default().to_be_bytes());
                    true
                }
                RateKey::Device => {
                    facts.device.is_some() && {
                        add(6, facts.subject.unwrap_or_default().as_bytes());
                        add_named(6, facts.issuer, facts.device, add)
                    }
                }
                RateKey::Issuer => add_some(7, facts.issuer, add),
                RateKey::Header => self.add_header(add),
            };
            if !known {
                let AddressKey(address) = AddressKey::of(facts.address, self.shape.ipv6_prefix);
                add(0, &address.to_be_bytes());
            }
        }
    }

    /// All values of the header, in order; `false` where it did not come.
    fn add_header(&self, add: &mut impl FnMut(u8, &[u8])) -> bool {
        let (Some(headers), Some(name)) = (self.facts.headers, &self.shape.header) else { return false };
        let mut came = false;
        for value in headers.get_all(name) {
            add(8, value.as_bytes());
            came = true;
        }
        came
    }
}

/// Adds what is there; says whether it was.
fn add_some(tag: u8, value: Option<&str>, add: &mut impl FnMut(u8, &[u8])) -> bool {
    if let Some(value) = value {
        add(tag, value.as_bytes());
    }
    value.is_some()
}

/// Adds what an issuer named so.
fn add_named(tag: u8, issuer: Option<&str>, name: Option<&str>, add: &mut impl FnMut(u8, &[u8])) -> bool {
    name.is_some() && {
        add(tag, issuer.unwrap_or_default().as_bytes());
        add_some(tag, name, add)
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
    HeaderValue::try_from(format!("{quoted_name};q={scaled};w={window}"))
        .unwrap_or(HeaderValue::from_static(""))
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
    duration.as_secs().saturating_add(u64::from(duration.subsec_nanos() > 0))
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use std::net::IpAddr;

    fn rate(name: &str, per: &[RateKey], quota: u32, period: Duration, burst: u32) -> Rate {
        Rate {
            name: name.into(),
            per: per.to_vec(),
            header: per.contains(&RateKey::Header).then(|| HeaderName::from_static("x-api-key")),
            ipv6_prefix: 64,
            quota: quota.try_into().unwrap(),
            period,
            burst: burst.try_into().unwrap(),
            shared: None,
            mode: Mode::Enforce,
        }
    }

    fn per_address(quota: u32, seconds: u64, burst: u32) -> Rate {
        rate("api", &[RateKey::Address], quota, Duration::from_secs(seconds), burst)
    }

    fn facts<'a>() -> RateFacts<'a> {
        RateFacts {
            address: "192.0.2.1".parse().unwrap(),
            issuer: None,
            subject: None,
            session: None,
            device: None,
            headers: None,
            cost: NonZeroU32::MIN,
            route: "echo",
            message_type: None,
            socket: None,
        }
    }

    fn from(address: &str) -> RateFacts<'static> {
        RateFacts { address: address.parse().unwrap(), ..facts() }
    }

    fn subject<'a>(issuer: &'a str, subject: &'a str) -> RateFacts<'a> {
        RateFacts { issuer: Some(issuer), subject: Some(subject), ..facts() }
    }

    struct Setting {
        store: Arc<RateStore>,
        clock: RateClock,
    }

    impl Setting {
        fn new(capacity: usize) -> Self {
            let store = RateStore::new(capacity);
            let clock = RateClock::standing(Instant::now());
            Setting { store, clock }
        }

        fn build(&self, rates: &[Rate]) -> Rates {
            Rates::build(rates, &self.store, self.clock.clone())
        }
    }

    const FIRST: &[RateIndex] = &[RateIndex(0)];
    const BOTH: &[RateIndex] = &[RateIndex(0), RateIndex(1)];

    fn taken(rates: &Rates, wanted: &[RateIndex], facts: &RateFacts<'_>) -> usize {
        (0..10_000).take_while(|_| rates.take(wanted, facts).is_ok()).count()
    }

    #[test]
    fn lets_the_burst_through_and_then_one_an_interval() {
        let setting = Setting::new(100);
        let rates = setting.build(&[per_address(60, 60, 3)]);
        assert_eq!(taken(&rates, FIRST, &facts()), 3);
        let refused = rates.take(FIRST, &facts()).unwrap_err();
        assert_eq!(refused, exceeded(RateIndex(0), Duration::from_secs(1)));
        setting.clock.advance(Duration::from_millis(999));
        assert_eq!(rates.take(FIRST, &facts()).unwrap_err().retry_after, Duration::from_millis(1));
        setting.clock.advance(Duration::from_millis(1));
        assert_eq!(taken(&rates, FIRST, &facts()), 1);
        setting.clock.advance(Duration::from_secs(3600));
        assert_eq!(taken(&rates, FIRST, &facts()), 3);
    }

    #[test]
    fn counts_apart_what_the_policy_says() {
        let setting = Setting::new(1000);
        let minute = Duration::from_secs(60);
        let rates = setting.build(&[
            rate("address", &[RateKey::Address], 60, minute, 2),
            rate("subject", &[RateKey::Subject], 60, minute, 2),
            rate("session", &[RateKey::Session], 60, minute, 2),
            rate("route", &[RateKey::Address, RateKey::Route], 60, minute, 2),
            rate("type", &[RateKey::Subject, RateKey::MessageType], 60, minute, 2),
            rate("socket", &[RateKey::Socket], 60, minute, 2),
        ]);
        let [address, of_subject, session, route, kind, socket] =
            [0, 1, 2, 3, 4, 5].map(|index| [RateIndex(index)]);

        assert_eq!(taken(&rates, &address, &from("192.0.2.1")), 2);
        assert_eq!(taken(&rates, &address, &from("192.0.2.2")), 2);
        assert_eq!(taken(&rates, &address, &from("2001:db8::1")), 2);
        assert_eq!(taken(&rates, &address, &from("2001:db8::2")), 0);
        assert_eq!(taken(&rates, &address, &from("2001:db8:0:1::1")), 2);

        assert_eq!(taken(&rates, &of_subject, &subject("i", "alice")), 2);
        let elsewhere = RateFacts { address: "192.0.2.9".parse().unwrap(), ..subject("i", "alice") };
        assert_eq!(taken(&rates, &of_subject, &elsewhere), 0);
        assert_eq!(taken(&rates, &of_subject, &subject("i", "bob")), 2);
        assert_eq!(taken(&rates, &of_subject, &subject("j", "alice")), 2);

        let session_of = |session| RateFacts { session: Some(session), ..subject("i", "alice") };
        assert_eq!(taken(&rates, &session, &session_of("s1")), 2);
        assert_eq!(taken(&rates, &session, &session_of("s2")), 2);

        assert_eq!(taken(&rates, &route, &facts()), 2);
        assert_eq!(taken(&rates, &route, &RateFacts { route: "other", ..facts() }), 2);

        let typed = |kind| RateFacts { message_type: Some(kind), ..subject("i", "alice") };
        assert_eq!(taken(&rates, &kind, &typed("text")), 2);
        assert_eq!(taken(&rates, &kind, &typed("typing")), 2);
        assert_eq!(taken(&rates, &kind, &subject("i", "alice")), 2);

        let in_socket = |socket| RateFacts { socket: Some(socket), ..subject("i", "alice") };
        assert_eq!(taken(&rates, &socket, &in_socket(1)), 2);
        assert_eq!(taken(&rates, &socket, &in_socket(2)), 2);
        assert_eq!(taken(&rates, &socket, &RateFacts { route: "other", ..in_socket(2) }), 0);
    }

    #[test]
    fn counts_apart_devices_issuers_and_headers() {
        let setting = Setting::new(1000);
        let minute = Duration::from_secs(60);
        let rates = setting.build(&[
            rate("device", &[RateKey::Device], 60, minute, 2),
            rate("issuer", &[RateKey::Issuer], 60, minute, 2),
            rate("header", &[RateKey::Header], 60, minute, 2),
            Rate { ipv6_prefix: 48, ..rate("wide", &[RateKey::Address], 60, minute, 2) },
        ]);
        let [device, issuer, header, wide] = [0, 1, 2, 3].map(|index| [RateIndex(index)]);

        let on = |device| RateFacts { device: Some(device), ..subject("i", "alice") };
        assert_eq!(taken(&rates, &device, &on("phone")), 2);
        assert_eq!(taken(&rates, &device, &on("desk")), 2);
        assert_eq!(taken(&rates, &device, &RateFacts { device: Some("phone"), ..subject("i", "bob") }), 2);
        // Without one, by address.
        assert_eq!(taken(&rates, &device, &subject("i", "carol")), 2);
        assert_eq!(taken(&rates, &device, &subject("i", "dave")), 0);

        assert_eq!(taken(&rates, &issuer, &subject("i", "alice")), 2);
        assert_eq!(taken(&rates, &issuer, &subject("i", "bob")), 0);
        assert_eq!(taken(&rates, &issuer, &subject("j", "bob")), 2);

        let with = |values: &[&'static str]| -> HeaderMap {
            let name = HeaderName::from_static("x-api-key");
            values.iter().map(|value| (name.clone(), HeaderValue::from_static(value))).collect()
        };
        let takes = |headers: &HeaderMap, address| {
            taken(&rates, &header, &RateFacts { headers: Some(headers), ..from(address) })
        };
        assert_eq!(takes(&with(&["a"]), "192.0.2.1"), 2);
        assert_eq!(takes(&with(&["a"]), "192.0.2.2"), 0);
        assert_eq!(takes(&with(&["b"]), "192.0.2.2"), 2);
        assert_eq!(takes(&with(&["a", "b"]), "192.0.2.2"), 2);
        assert_eq!(takes(&with(&[]), "192.0.2.1"), 2);
        assert_eq!(taken(&rates, &header, &from("192.0.2.1")), 0, "no fields are as good as no such field");

        assert_eq!(taken(&rates, &wide, &from("2001:db8:0:1::1")), 2);
        assert_eq!(taken(&rates, &wide, &from("2001:db8:0:2::1")), 0);
        assert_eq!(taken(&rates, &wide, &from("2001:db8:1:2::1")), 2);
    }

    #[test]
    fn what_costs_more_takes_more() {
        let setting = Setting::new(100);
        let rates = setting.build(&[per_address(60, 60, 10)]);
        let costs = |cost: u32| RateFacts { cost: NonZeroU32::new(cost).unwrap(), ..facts() };
        let standing = rates.take(FIRST, &costs(4)).unwrap().unwrap();
        assert_eq!(standing.remaining, 6);
        assert!(rates.take(FIRST, &costs(6)).is_ok());
        // Nothing is left; a dear one waits longer than a cheap one.
        assert_eq!(rates.take(FIRST, &costs(4)).unwrap_err().retry_after, Duration::from_secs(4));
        assert_eq!(rates.take(FIRST, &costs(1)).unwrap_err().retry_after, Duration::from_secs(1));
        setting.clock.advance(Duration::from_secs(4));
        assert!(rates.take(FIRST, &costs(4)).is_ok());
        assert!(rates.take(FIRST, &costs(1)).is_err());
        // Dearer than the rate ever has: refused for ever, not let through.
        assert_eq!(rates.take(FIRST, &costs(11)).unwrap_err().retry_after, LONGEST);
    }

    /// Row A-1: a flood from 100,000 addresses, and another by 100,000 subjects, while others go on.
    #[test]
    fn a_flood_neither_grows_the_table_nor_touches_who_is_known() {
        let setting = Setting::new(1 << 20);
        let hour = Duration::from_secs(3600);
        let rates = setting.build(&[
            rate("address", &[RateKey::Address], 10, hour, 10),
            rate("subject", &[RateKey::Subject], 10, hour, 10),
        ]);
        let (by_address, by_subject) = ([RateIndex(0)], [RateIndex(1)]);
        let honest: Vec<String> = (0..100).map(|number| format!("honest {number}")).collect();
        for subject in &honest {
            assert!((0..5).all(|_| rates.take(&by_subject, &self::subject("i", subject)).is_ok()));
        }
        let memory = format!("{:?}", setting.store);
        for number in 0..100_000u32 {
            let address =
                RateFacts { address: IpAddr::from((number ^ 0x0a00_0000).to_be_bytes()), ..facts() };
            let name = format!("flood {number}");
            for _ in 0..2 {
                assert!(rates.take(&by_address, &address).is_ok());
                assert!(rates.take(&by_subject, &self::subject("i", &name)).is_ok());
            }
        }
        // As many cells as before, none of them shared: 24 bytes for each key of the capacity.
        assert_eq!(format!("{:?}", setting.store), memory);
        assert_eq!(setting.store.overflowed(), 0);
        for subject in &honest {
            assert_eq!(taken(&rates, &by_subject, &self::subject("i", subject)), 5, "neither more nor less");
        }
        // A table that strangers fill many times over has room for users all the same.
        let small = Setting::new(4096);
        let rates = small.build(&[
            rate("address", &[RateKey::Address], 1, hour, 1),
            rate("subject", &[RateKey::Subject], 10, hour, 10),
        ]);
        for number in 0..100_000u32 {
            let _ = rates
                .take(&by_address, &RateFacts { address: IpAddr::from(number.to_be_bytes()), ..facts() });
        }
        assert!(small.store.overflowed() > 80_000);
        for subject in &honest {
            assert_eq!(taken(&rates, &by_subject, &self::subject("i", subject)), 10);
        }
    }

    #[test]
    fn who_has_no_subject_or_session_counts_by_address() {
        let setting = Setting::new(100);
        let rates = setting.build(&[
            rate("subject", &[RateKey::Subject], 60, Duration::from_secs(60), 2),
            rate("session", &[RateKey::Session], 60, Duration::from_secs(60), 2),
        ]);
        for wanted in [[RateIndex(0)], [RateIndex(1)]] {
            assert_eq!(taken(&rates, &wanted, &from("192.0.2.1")), 2);
            assert_eq!(taken(&rates, &wanted, &from("192.0.2.2")), 2);
        }
        // An address as a subject's name is not that address.
        assert_eq!(taken(&rates, FIRST, &subject("", "192.0.2.1")), 2);
    }

    #[test]
    fn a_reload_forgives_nobody() {
        let setting = Setting::new(100);
        let policy = [per_address(60, 60, 5)];
        assert_eq!(taken(&setting.build(&policy), FIRST, &facts()), 5);
        setting.clock.advance(Duration::from_secs(1));
        assert_eq!(taken(&setting.build(&policy), FIRST, &facts()), 1);
        // Nor does another place in the file.
        let moved = setting
            .build(&[rate("new", &[RateKey::Address], 1, Duration::from_secs(1), 1), policy[0].clone()]);
        assert_eq!(taken(&moved, &[RateIndex(1)], &facts()), 0);
    }

    #[test]
    fn a_laxer_rate_holds_at_once_for_those_who_used_the_stricter_one_up() {
        let setting = Setting::new(100);
        let strict = setting.build(&[per_address(1, 86_400, 100)]);
        assert_eq!(taken(&strict, FIRST, &facts()), 100);
        let lax = setting.build(&[per_address(10, 1, 10)]);
        assert_eq!(lax.take(FIRST, &facts()).unwrap_err().retry_after, Duration::from_millis(100));
        setting.clock.advance(Duration::from_secs(1));
        assert_eq!(taken(&lax, FIRST, &facts()), 10);
    }

    #[test]
    fn what_one_rate_refuses_costs_nothing_of_the_others() {
        let setting = Setting::new(100);
        let rates = setting.build(&[
            rate("wide", &[RateKey::Address], 100, Duration::from_secs(100), 10),
            rate("narrow", &[RateKey::Address], 1, Duration::from_secs(60), 2),
        ]);
        assert_eq!(taken(&rates, BOTH, &facts()), 2);
        for _ in 0..50 {
            assert_eq!(rates.take(BOTH, &facts()).unwrap_err().rate, RateIndex(1));
        }
        assert_eq!(taken(&rates, FIRST, &facts()), 8);
        // Both are used up now: the longer wait is the one that helps.
        assert_eq!(rates.take(BOTH, &facts()).unwrap_err().retry_after, Duration::from_secs(60));
    }

    #[test]
    fn a_rate_in_shadow_refuses_only_where_nothing_else_does() {
        let setting = Setting::new(100);
        let shadow =
            Rate { mode: Mode::Shadow, ..rate("shadow", &[RateKey::Address], 1, Duration::from_secs(60), 1) };
        let enforced = rate("enforced", &[RateKey::Address], 1, Duration::from_secs(1), 3);
        for policy in [[shadow.clone(), enforced.clone()], [enforced, shadow]] {
            let setting = Setting { clock: setting.clock.clone(), store: RateStore::new(100) };
            let rates = setting.build(&policy);
            let refused = |rates: &Rates| rates.take(BOTH, &facts()).unwrap_err().rate.0;
            let shadow = policy.iter().position(|rate| rate.mode == Mode::Shadow).unwrap();
            assert!(rates.take(BOTH, &facts()).is_ok());
            assert_eq!(refused(&rates), shadow);
            assert_eq!(refused(&rates), shadow);
            assert_eq!(refused(&rates), 1 - shadow);
        }
    }

    #[test]
    fn a_full_table_gives_nobody_a_fresh_limit() {
        let setting = Setting::new(64);
        let rates = setting.build(&[per_address(1, 3600, 2)]);
        let address = |number: u32| RateFacts { address: IpAddr::from(number.to_be_bytes()), ..facts() };
        assert_eq!(taken(&rates, FIRST, &address(0)), 2);
        let let_through: usize = (1..20_000).map(|number| taken(&rates, FIRST, &address(number))).sum();
        // Two for each cell and for each of the overflow cells, however many addresses come.
        let cells = 64 * 8;
        assert!(let_through <= (cells + 64) * 2, "{let_through}");
        assert!(setting.store.overflowed() > 0);
        assert!(setting.store.in_use(setting.clock.now()) <= cells);
        // Who was there first is neither forgiven nor displaced.
        assert_eq!(taken(&rates, FIRST, &address(0)), 0);
        // And once cells are replenished, there is room again.
        setting.clock.advance(Duration::from_secs(7200));
        assert_eq!(setting.store.in_use(setting.clock.now()), 0);
        assert_eq!(taken(&rates, FIRST, &address(30_000)), 2);
    }

    #[test]
    fn a_table_filled_to_its_capacity_hardly_overflows() {
        let capacity = 50_000;
        let setting = Setting::new(capacity);
        let rates = setting.build(&[per_address(1, 3600, 1)]);
        for number in 0..capacity as u32 {
            assert!(
                rates
                    .take(FIRST, &RateFacts { address: IpAddr::from(number.to_be_bytes()), ..facts() })
                    .is_ok()
            );
        }
        assert!(setting.store.overflowed() < 10, "{}", setting.store.overflowed());
    }

    #[test]
    fn threads_together_never_exceed_the_quota() {
        let setting = Setting::new(1000);
        let rates = setting.build(&[
            per_address(1, 3600, 500),
            rate("all", &[RateKey::Route], 1, Duration::from_secs(3600), 700),
        ]);
        let passed: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8u8)
                .map(|number| {
                    let rates = &rates;
                    let facts = from(if number % 2 == 0 { "192.0.2.1" } else { "192.0.2.2" });
                    scope.spawn(move || (0..400).filter(|_| rates.take(BOTH, &facts).is_ok()).count())
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        // A race can cost a caller one that it should have had, but never gives one away.
        assert!((650..=700).contains(&passed), "{passed}");
        let one = setting.build(&[rate("one", &[RateKey::Address], 1, Duration::from_secs(3600), 500)]);
        let passed: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| (0..400).filter(|_| one.take(FIRST, &facts()).is_ok()).count()))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(passed, 500);
    }

    #[test]
    fn headers_say_how_it_stands() {
        let setting = Setting::new(100);
        let rates = setting.build(&[
            rate("api-per-address", &[RateKey::Address], 600, Duration::from_secs(60), 60),
            rate("odd \"name\"", &[RateKey::Address], 3, Duration::from_millis(1500), 1),
        ]);
        let mut headers = HeaderMap::new();
        let standing = rates.take(FIRST, &facts()).unwrap().unwrap();
        assert_eq!((standing.limit, standing.remaining), (600, 59));
        rates.write_standing(&standing, &mut headers);
        assert_eq!(headers["ratelimit-policy"], "\"api-per-address\";q=600;w=60");
        assert_eq!(headers["ratelimit"], "\"api-per-address\";r=59;t=1");
        assert!(!headers.contains_key("retry-after"));

        let second = [RateIndex(1)];
        assert!(rates.take(&second, &facts()).is_ok());
        let refused = rates.take(&second, &facts()).unwrap_err();
        rates.write_refusal(refused.rate, refused.retry_after, &mut headers);
        assert_eq!(headers["ratelimit-policy"], "\"odd \\\"name\\\"\";q=4;w=2");
        assert_eq!(headers["ratelimit"], "\"odd \\\"name\\\"\";r=0;t=1");
        assert_eq!(headers["retry-after"], "1");
    }

    #[test]
    fn the_tightest_rate_is_the_one_told() {
        let setting = Setting::new(100);
        let rates = setting.build(&[
            rate("wide", &[RateKey::Address], 100, Duration::from_secs(100), 10),
            rate("narrow", &[RateKey::Address], 1, Duration::from_secs(60), 2),
        ]);
        assert_eq!(rates.take(BOTH, &facts()).unwrap().unwrap().rate, RateIndex(1));
        assert_eq!(rates.take(&[], &facts()), Ok(None));
    }

    #[test]
    fn retry_after_rounds_up() {
        let seconds = |millis| retry_after_seconds(Duration::from_millis(millis));
        assert_eq!([0, 1, 999, 1000, 1001].map(seconds), [1, 1, 1, 1, 2]);
    }

    #[test]
    fn extreme_numbers_do_not_overflow() {
        let setting = Setting::new(100);
        let year = Duration::from_secs(366 * 86_400);
        let rates = setting.build(&[
            rate("slow", &[RateKey::Address], 1, year, u32::MAX),
            rate("fast", &[RateKey::Address], u32::MAX, Duration::from_millis(1), u32::MAX),
            rate("endless", &[RateKey::Address], 1, Duration::MAX, u32::MAX),
        ]);
        for index in 0..3 {
            for _ in 0..1000 {
                let _ = rates.take(&[RateIndex(index)], &facts());
            }
        }
        assert!(rates.take(&[RateIndex(3)], &facts()).is_err());
    }

    proptest! {
        /// Against a model that keeps, for each key, the times at which it let something through, and adds up.
        #[test]
        fn agrees_with_a_token_bucket(
            quota in 1u32..20,
            burst in 1u32..10,
            steps in prop::collection::vec((0u64..400, 0u8..3), 1..200),
        ) {
            let setting = Setting::new(100);
            // An interval in whole milliseconds, so that the model can count in them.
            let interval = 1000 / u64::from(quota);
            let period = Duration::from_millis(interval * u64::from(quota));
            let rates = setting.build(&[rate("api", &[RateKey::Address], quota, period, burst)]);
            // Tokens in thousandths of an interval's worth: (amount, when).
            let full = u64::from(burst) * interval;
            let mut buckets: HashMap<u8, (u64, u64)> = HashMap::new();
            let mut now = 0;
            for (wait, key) in steps {
                setting.clock.advance(Duration::from_millis(wait));
                now += wait;
                let (amount, since) = buckets.entry(key).or_insert((full, now));
                *amount = (*amount + (now - *since)).min(full);
                *since = now;
                let outcome = rates.take(FIRST, &from(&format!("192.0.2.{key}")));
                if *amount >= interval {
                    *amount -= interval;
                    let standing = outcome.unwrap().unwrap();
                    prop_assert_eq!(u64::from(standing.remaining), *amount / interval);
                } else {
                    let wait = Duration::from_millis(interval - *amount);
                    prop_assert_eq!(outcome.unwrap_err().retry_after, wait);
                }
            }
        }
    }
}
