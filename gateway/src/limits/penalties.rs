//! Growing waits for who fails again and again: wrong passwords, tokens that do not count (row I-4).

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::StatusCode;
use prometheus::IntCounter;
use sealgate_policy::{Mode, Penalty, PenaltyIndex};

use super::AddressKey;
use crate::lock::lock;

const SHARDS: usize = 16;

/// Keys with failures, or with attempts under way, in one shard: some 64 bytes each. Who comes to a full one shares a record with
/// others, so nobody is forgotten to make room.
const MAX_RECORDS: usize = 16 * 1024;

/// How often a full shard is looked through for what is forgiven by now.
const SWEEP: Duration = Duration::from_secs(1);

/// Failures of all penalties, for all keys. Older than any snapshot: a reload forgives nobody.
pub struct PenaltyStore {
    hasher: RandomState,
    shards: [Mutex<Shard>; SHARDS],
}

#[derive(Default)]
struct Shard {
    records: HashMap<u64, Record>,
    /// Shared by who finds no room, by penalty.
    overflow: HashMap<u64, Record>,
    swept: Option<Instant>,
}

#[derive(Clone, Copy, Default)]
struct Record {
    failures: u32,
    /// Attempts whose outcome is not known yet.
    in_flight: u32,
    blocked_until: Option<Instant>,
    forgotten_at: Option<Instant>,
    /// Until when failures of an address were forgiven one by one.
    eased_at: Option<Instant>,
}

/// A policy's penalties, ready to be asked. Part of the snapshot.
pub struct Penalties {
    store: Arc<PenaltyStore>,
    penalties: Box<[Prepared]>,
    judges_tokens: bool,
}

struct Prepared {
    policy: Penalty,
    /// Stands for the name.
    name: u64,
    counters: Option<PenaltyCounters>,
}

/// What a penalty did: its metric's children.
#[derive(Clone, Debug)]
pub struct PenaltyCounters {
    /// Failures that counted.
    pub failures: IntCounter,
    /// Blocks that began, or were made longer.
    pub blocks: IntCounter,
    /// Attempts that were refused because of one.
    pub refusals: IntCounter,
}

/// Attempts of one request, under each penalty of its route. One that is dropped without an answer counts as failed: who
/// leaves before the answer does not guess for nothing.
#[must_use = "an attempt without an answer counts as a failure"]
pub struct Attempts {
    attempts: Vec<Attempt>,
}

struct Attempt {
    store: Arc<PenaltyStore>,
    policy: Penalty,
    counters: Option<PenaltyCounters>,
    key: u64,
    name: u64,
    ended: bool,
}

/// How an attempt ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Failure,
    Success,
    /// Nothing is known of it: the upstream could not be asked, or answered something else.
    Neither,
}

impl PenaltyStore {
    /// Nobody has failed. Made once per process.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self { hasher: RandomState::new(), shards: std::array::from_fn(|_| Mutex::default()) })
    }

    /// Clears away what is forgiven at `now`. Meant to be called every minute or so.
    pub fn forget_expired(&self, now: Instant) {
        for shard in &self.shards {
            lock(shard).sweep(now);
        }
    }

    /// Keys that have failed, or are at it.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).records.len()).sum()
    }

    /// Whether nobody has failed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn with<T>(
        &self,
        policy: &Penalty,
        (key, name): (u64, u64),
        now: Instant,
        work: impl FnOnce(&mut Record) -> T,
    ) -> T {
        let [first, ..] = &self.shards;
        let mut shard = lock(self.shards.get((key >> 60) as usize).unwrap_or(first));
        let shard = &mut *shard;
        if !shard.records.contains_key(&key) && shard.records.len() >= MAX_RECORDS {
            let due = shard.swept.is_none_or(|at| now.saturating_duration_since(at) >= SWEEP);
            if due {
                shard.sweep(now);
            }
        }
        let full = shard.records.len() >= MAX_RECORDS && !shard.records.contains_key(&key);
        let (records, key) = if full { (&mut shard.overflow, name) } else { (&mut shard.records, key) };
        let record = records.entry(key).or_default();
        record.forgive(now);
        record.ease(policy, now);
        let result = work(record);
        if record.is_clean() {
            records.remove(&key);
        }
        result
    }
}

impl Shard {
    fn sweep(&mut self, now: Instant) {
        self.swept = Some(now);
        for records in [&mut self.records, &mut self.overflow] {
            records.retain(|_, record| {
                record.forgive(now);
                !record.is_clean()
            });
        }
    }
}

impl Record {
    fn forgive(&mut self, now: Instant) {
        if self.forgotten_at.is_some_and(|at| now >= at) {
            *self = Record { in_flight: self.in_flight, ..Record::default() };
        }
    }

    /// Behind an address there may be many people: what they fail now and then must not add up for ever.
    fn ease(&mut self, policy: &Penalty, now: Instant) {
        let (false, Some(eased_at), false) = (policy.per_account, self.eased_at, self.failures == 0) else {
            return;
        };
        let step = (policy.window / policy.after.max(1)).max(Duration::from_millis(1));
        let steps = now.saturating_duration_since(eased_at).as_nanos() / step.as_nanos();
        let steps = u32::try_from(steps).unwrap_or(u32::MAX);
        self.failures = self.failures.saturating_sub(steps);
        self.eased_at = Some(eased_at + step.saturating_mul(steps));
    }

    fn is_clean(&self) -> bool {
        self.failures == 0 && self.in_flight == 0
    }

    /// How long one more attempt has to wait; none if it may be made now.
    ///
    /// Attempts under way count as if they had failed: parallel guesses are no more than those one after the other.
    fn wait(&self, policy: &Penalty, now: Instant) -> Option<Duration> {
        let blocked = self.blocked_until.map(|until| until.saturating_duration_since(now));
        if let Some(blocked) = blocked.filter(|blocked| !blocked.is_zero()) {
            return Some(blocked);
        }
        let room = policy.after.saturating_sub(self.failures).max(1);
        (self.in_flight >= room).then_some(Duration::from_secs(1))
    }

    /// Gives how long it is blocked for this one.
    fn fail(&mut self, policy: &Penalty, now: Instant) -> Option<Duration> {
        self.failures = self.failures.saturating_add(1);
        let block = (self.failures >= policy.after).then(|| {
            let doubled = 1u32.checked_shl(self.failures - policy.after).unwrap_or(u32::MAX);
            policy.block.saturating_mul(doubled).min(policy.max_block)
        });
        self.blocked_until = block.map(|block| now + block).max(self.blocked_until);
        let open_from = self.blocked_until.unwrap_or(now).max(now);
        self.forgotten_at = Some(open_from + policy.window);
        self.eased_at = match block {
            None => self.eased_at.or(Some(now)),
            Some(_) => Some(open_from),
        };
        block
    }
}

impl Penalties {
    /// Prepares `penalties`, whose indices are their places in the slice.
    pub fn build(
        penalties: &[Penalty],
        store: &Arc<PenaltyStore>,
        counters: impl Fn(&str) -> Option<PenaltyCounters>,
    ) -> Self {
        let prepared = penalties.iter().map(|policy| Prepared {
            name: store.hasher.hash_one(("penalty", &*policy.name)),
            counters: counters(&policy.name),
            policy: policy.clone(),
        });
        Self {
            penalties: prepared.collect(),
            judges_tokens: penalties.iter().any(|penalty| penalty.tokens),
            store: Arc::clone(store),
        }
    }

    /// Begins an attempt from `address` to log in as `account`, under each of the penalties.
    ///
    /// # Errors
    /// How long it has to wait; then nothing was begun.
    pub fn begin(
        &self,
        wanted: &[PenaltyIndex],
        address: IpAddr,
        account: Option<&str>,
        now: Instant,
    ) -> Result<Attempts, Duration> {
        let mut begun = Attempts { attempts: Vec::with_capacity(wanted.len()) };
        for prepared in wanted.iter().filter_map(|index| self.penalties.get(index.0)) {
            let Prepared { policy, name, counters } = prepared;
            let key = self.key(prepared, address, account);
            let waits = self.store.with(policy, (key, *name), now, |record| {
                let wait = record.wait(policy, now).filter(|_| policy.mode == Mode::Enforce);
                if wait.is_none() {
                    record.in_flight = record.in_flight.saturating_add(1);
                }
                wait
            });
            if let Some(wait) = waits {
                prepared.count(|counters| &counters.refusals);
                begun.end(|_| Outcome::Neither, now);
                return Err(wait);
            }
            begun.attempts.push(Attempt {
                store: Arc::clone(&self.store),
                policy: policy.clone(),
                counters: counters.clone(),
                key,
                name: *name,
                ended: false,
            });
        }
        Ok(begun)
    }

    /// Whether any of them counts tokens.
    pub fn judges_tokens(&self) -> bool {
        self.judges_tokens
    }

    /// How long who comes from `address` has to wait for the gateway to look at a token; none if it may.
    pub fn token_wait(&self, address: IpAddr, now: Instant) -> Option<Duration> {
        let of_tokens =
            self.penalties.iter().filter(|it| it.policy.tokens && it.policy.mode == Mode::Enforce);
        let waits = of_tokens.filter_map(|prepared| {
            let key = self.key(prepared, address, None);
            let wait = self
                .store
                .with(&prepared.policy, (key, prepared.name), now, |it| it.wait(&prepared.policy, now))?;
            prepared.count(|counters| &counters.refusals);
            Some(wait)
        });
        waits.max()
    }

    /// A token from `address` did not count. Gives how long new connections from there are to be refused, where a rule wants that.
    pub fn token_failed(&self, address: IpAddr, now: Instant) -> Option<(Arc<str>, Duration)> {
        let mut refused = None;
        for prepared in self.penalties.iter().filter(|it| it.policy.tokens) {
            let key = self.key(prepared, address, None);
            let policy = &prepared.policy;
            let block = self.store.with(policy, (key, prepared.name), now, |record| record.fail(policy, now));
            prepared.count(|counters| &counters.failures);
            if let Some(block) = block {
                prepared.count(|counters| &counters.blocks);
                refused = refused.max(prepared.policy.connection_block(block));
            }
        }
        refused
    }

    fn key(&self, prepared: &Prepared, address: IpAddr, account: Option<&str>) -> u64 {
        let policy = &prepared.policy;
        // People and clients write names in one way or another; a name that did not come is as good as an empty one.
        let account =
            policy.per_account.then(|| account.map(|it| it.trim().to_lowercase()).unwrap_or_default());
        let address = policy.per_address.then(|| AddressKey::of(address, policy.ipv6_prefix));
        self.store.hasher.hash_one((prepared.name, address, account))
    }
}

impl Prepared {
    fn count(&self, which: impl Fn(&PenaltyCounters) -> &IntCounter) {
        if let Some(counters) = &self.counters {
            which(counters).inc();
        }
    }
}

impl Attempts {
    /// The upstream answered. Gives how long new connections from the address are to be refused, where a rule wants that, and
    /// the rule's name.
    pub fn answered(mut self, status: StatusCode, now: Instant) -> Option<(Arc<str>, Duration)> {
        self.end(
            |policy| match status {
                status if policy.statuses.contains(&status.as_u16()) => Outcome::Failure,
                status if status.is_success() => Outcome::Success,
                _ => Outcome::Neither,
            },
            now,
        )
    }

    /// The upstream could not be asked.
    pub fn unanswered(mut self, now: Instant) {
        self.end(|_| Outcome::Neither, now);
    }

    fn end(&mut self, outcome: impl Fn(&Penalty) -> Outcome, now: Instant) -> Option<(Arc<str>, Duration)> {
        let blocks = self.attempts.iter_mut().filter_map(|attempt| {
            let outcome = outcome(&attempt.policy);
            let block = attempt.end(outcome, now)?;
            attempt.policy.connection_block(block)
        });
        blocks.max()
    }
}

impl Attempt {
    fn end(&mut self, outcome: Outcome, now: Instant) -> Option<Duration> {
        if std::mem::replace(&mut self.ended, true) {
            return None;
        }
        let policy = &self.policy;
        let block = self.store.with(policy, (self.key, self.name), now, |record| {
            record.in_flight = record.in_flight.saturating_sub(1);
            match outcome {
                Outcome::Failure => record.fail(policy, now),
                // The account's own failures only: or an attacker would log in as himself now and then.
                Outcome::Success if policy.per_account => {
                    *record = Record { in_flight: record.in_flight, ..Record::default() };
                    None
                }
                Outcome::Success | Outcome::Neither => None,
            }
        });
        if let (Outcome::Failure, Some(counters)) = (outcome, &self.counters) {
            counters.failures.inc();
            if block.is_some() {
                counters.blocks.inc();
            }
        }
        block
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.end(Outcome::Failure, Instant::now());
    }
}

impl fmt::Debug for PenaltyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PenaltyStore").field("records", &self.len()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Attempts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attempts").field("attempts", &self.attempts.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn penalty(name: &str, per_address: bool, per_account: bool, after: u32) -> Penalty {
        Penalty {
            name: name.into(),
            per_address,
            per_account,
            statuses: vec![401],
            tokens: per_address && !per_account,
            after,
            window: SECOND * 900,
            block: SECOND * 30,
            max_block: SECOND * 100,
            refuses_connections: false,
            ipv6_prefix: 64,
            mode: Mode::Enforce,
        }
    }

    fn built(penalties: &[Penalty]) -> (Penalties, Instant) {
        (Penalties::build(penalties, &PenaltyStore::new(), |_| None), Instant::now())
    }

    fn address(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    const FIRST: &[PenaltyIndex] = &[PenaltyIndex(0)];
    const BOTH: &[PenaltyIndex] = &[PenaltyIndex(0), PenaltyIndex(1)];

    fn attempt(
        all: &Penalties,
        wanted: &[PenaltyIndex],
        from: u8,
        account: &str,
        status: u16,
        now: Instant,
    ) -> bool {
        match all.begin(wanted, address(from), Some(account), now) {
            Ok(attempts) => {
                let _ = attempts.answered(StatusCode::from_u16(status).unwrap(), now);
                true
            }
            Err(_) => false,
        }
    }

    #[test]
    fn waits_grow_up_to_a_cap_and_are_forgotten() {
        let (all, start) = built(&[penalty("account", false, true, 3)]);
        let fails = |at| attempt(&all, FIRST, 1, "alice", 401, start + SECOND * at);
        assert!(fails(0) && fails(1) && fails(2));
        // 30 s, 60 s, and 100 s from then on.
        assert!(!fails(3) && !fails(31) && fails(32));
        assert!(!fails(91) && fails(92));
        assert!(!fails(191) && fails(192));
        assert!(!fails(291) && fails(292));
        // Others are not concerned, and how the name is written is no matter.
        assert!(attempt(&all, FIRST, 1, "bob", 401, start + SECOND * 293));
        assert!(!attempt(&all, FIRST, 2, " ALICE", 401, start + SECOND * 293));
        // Forgotten after the window that follows the last block.
        let later = 392 + 900;
        assert!(fails(later) && fails(later) && fails(later) && !fails(later));
    }

    #[test]
    fn success_forgives_the_account_and_never_an_address() {
        let (all, now) = built(&[penalty("account", false, true, 3), penalty("address", true, false, 4)]);
        let attempt = |account: &str, status| attempt(&all, BOTH, 1, account, status, now);
        assert!(attempt("alice", 401) && attempt("alice", 401) && attempt("alice", 200));
        assert!(attempt("alice", 401) && attempt("mallory", 200));
        // The fourth failure of the address.
        assert!(attempt("alice", 401));
        assert!(!attempt("mallory", 200));
        assert!(super::tests::attempt(&all, BOTH, 2, "mallory", 200, now));
        // What is no answer about a password counts for nothing.
        assert!((0..50).all(|_| super::tests::attempt(&all, BOTH, 3, "carol", 503, now)));
    }

    #[test]
    fn parallel_guesses_are_no_more_than_those_one_after_the_other() {
        let (all, now) = built(&[penalty("account", false, true, 5)]);
        let begin = || all.begin(FIRST, address(1), Some("alice"), now);
        let under_way: Vec<_> = std::iter::from_fn(|| begin().ok()).take(100).collect();
        assert_eq!(under_way.len(), 5);
        assert_eq!(begin().unwrap_err(), SECOND);
        // Who leaves before the answer has guessed all the same.
        drop(under_way);
        assert!(begin().is_err());
        assert_eq!(all.store.len(), 1);
        // After a block there is one at a time.
        let (all, _) = built(&[penalty("account", false, true, 1)]);
        assert!(self::attempt(&all, FIRST, 1, "alice", 401, now));
        let now = now + SECOND * 31;
        let one = all.begin(FIRST, address(1), Some("alice"), now).unwrap();
        assert!(all.begin(FIRST, address(1), Some("alice"), now).is_err());
        one.unanswered(now);
        assert!(self::attempt(&all, FIRST, 1, "alice", 200, now));
        assert!(all.store.is_empty(), "who is let in leaves nothing behind");
    }

    #[test]
    fn refused_tokens_count_by_address() {
        let (all, now) = built(&[penalty("tokens", true, false, 2)]);
        assert_eq!(all.token_wait(address(1), now), None);
        assert_eq!(all.token_failed(address(1), now), None);
        assert_eq!(all.token_wait(address(1), now), None);
        assert_eq!(all.token_failed(address(1), now), None);
        assert_eq!(all.token_wait(address(1), now), Some(SECOND * 30));
        assert_eq!(all.token_wait(address(2), now), None);
        let (all, now) = built(&[Penalty { refuses_connections: true, ..penalty("ban", true, false, 1) }]);
        assert_eq!(all.token_failed(address(1), now), Some(("ban".into(), SECOND * 30)));
    }

    #[test]
    fn what_many_people_of_one_address_fail_now_and_then_does_not_add_up() {
        let (all, start) = built(&[penalty("address", true, false, 90)]);
        // One in 11 seconds, for hours; 90 in 15 minutes are one in 10.
        assert!((0..2000).all(|number| attempt(&all, FIRST, 1, "", 401, start + SECOND * 11 * number)));
        // Two in a second are too many soon.
        let later = start + SECOND * 50_000;
        assert!(!(0..200).all(|number| attempt(&all, FIRST, 1, "", 401, later + SECOND / 2 * number)));
    }

    #[test]
    fn in_shadow_mode_nobody_waits() {
        let (all, now) = built(&[Penalty { mode: Mode::Shadow, ..penalty("account", true, true, 1) }]);
        assert!((0..10).all(|_| attempt(&all, FIRST, 1, "alice", 401, now)));
    }

    #[test]
    fn a_flood_of_accounts_is_bounded_and_forgets_nobody() {
        let (all, now) = built(&[penalty("account", false, true, 3)]);
        assert!((0..3).all(|_| attempt(&all, FIRST, 1, "alice", 401, now)));
        for number in 0..400_000 {
            let _ = attempt(&all, FIRST, 1, &number.to_string(), 401, now);
        }
        assert!(all.store.len() <= MAX_RECORDS * SHARDS);
        assert!(!attempt(&all, FIRST, 1, "alice", 200, now), "she has not been forgotten");
        // All is forgiven in time, and there is room again.
        let later = now + SECOND * 2000;
        assert!(attempt(&all, FIRST, 1, "zoe", 401, later));
        all.store.forget_expired(later);
        assert_eq!(all.store.len(), 1);
    }

    proptest! {
        /// Against a model that keeps the failures of one account by their times.
        #[test]
        fn agrees_with_a_list_of_failures(after in 1u32..5, steps in prop::collection::vec((0u32..200, 0u8..4), 1..80)) {
            let (all, start) = built(&[penalty("account", false, true, after)]);
            let (mut failures, mut blocked_until, mut forgotten_at) = (0u32, 0u32, 0u32);
            let mut now = 0u32;
            for (wait, what) in steps {
                now += wait;
                if failures > 0 && now >= forgotten_at {
                    (failures, blocked_until) = (0, 0);
                }
                let status = [401, 401, 200, 503][usize::from(what)];
                let let_through = attempt(&all, FIRST, 1, "alice", status, start + SECOND * now);
                prop_assert_eq!(let_through, now >= blocked_until);
                if let_through && status == 401 {
                    failures += 1;
                    if failures >= after {
                        blocked_until = now + (30u32 << (failures - after).min(8)).min(100);
                    }
                    forgotten_at = blocked_until.max(now) + 900;
                } else if let_through && status == 200 {
                    (failures, blocked_until) = (0, 0);
                }
            }
        }
    }
}
