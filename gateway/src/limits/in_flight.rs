//! How many requests, or open WebSockets, of a key are under way at the same time.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard};

use prometheus::IntCounter;
use sealgate_policy::{Concurrency, ConcurrencyIndex, Mode, RateFacts};

use super::rates::KeyShape;
use crate::lock::lock;

const SHARDS: usize = 16;

/// What is under way, over all cores. Older than any snapshot. Each entry belongs to something that is under way, so there are no
/// more of them than of those.
pub struct InFlight {
    hasher: RandomState,
    shards: [Mutex<HashMap<u64, u32>>; SHARDS],
}

/// A policy's limits of it. Part of the snapshot.
#[derive(Debug)]
pub struct ConcurrencyLimits {
    store: Arc<InFlight>,
    limits: Box<[Limit]>,
}

#[derive(Debug)]
struct Limit {
    shape: KeyShape,
    most: u32,
    mode: Mode,
    counters: Option<ConcurrencyCounters>,
}

/// What a limit did: its metric's children.
#[derive(Clone, Debug)]
pub struct ConcurrencyCounters {
    /// What it let begin.
    pub allowed: IntCounter,
    /// What it refused.
    pub refused: IntCounter,
    /// What it would have refused, were it not in shadow mode.
    pub shadowed: IntCounter,
}

/// A place under each limit; given back on drop.
#[must_use = "the place is given back when this is dropped"]
pub struct Place {
    store: Arc<InFlight>,
    keys: Vec<u64>,
}

/// As much of it is under way as the policy allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many at once")]
pub struct TooManyAtOnce;

impl InFlight {
    /// Nothing is under way. Made once per process.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self { hasher: RandomState::new(), shards: std::array::from_fn(|_| Mutex::default()) })
    }

    /// Keys with something under way.
    pub fn len(&self) -> usize {
        self.shards.iter().map(|shard| lock(shard).len()).sum()
    }

    /// Whether nothing is under way that is counted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn shard(&self, key: u64) -> MutexGuard<'_, HashMap<u64, u32>> {
        let [first, ..] = &self.shards;
        lock(self.shards.get((key >> 60) as usize).unwrap_or(first))
    }
}

impl ConcurrencyLimits {
    /// Prepares `limits`, whose indices are their places in the slice.
    pub fn build(
        limits: &[Concurrency],
        store: &Arc<InFlight>,
        counters: impl Fn(&str) -> Option<ConcurrencyCounters>,
    ) -> Self {
        let limit = |limit: &Concurrency| Limit {
            shape: KeyShape {
                name: store.hasher.hash_one(("concurrency", &*limit.name)),
                per: limit.per.clone().into(),
                header: limit.header.clone(),
                ipv6_prefix: limit.ipv6_prefix,
            },
            most: limit.limit,
            mode: limit.mode,
            counters: counters(&limit.name),
        };
        Self { limits: limits.iter().map(limit).collect(), store: Arc::clone(store) }
    }

    /// Takes a place under each of the limits.
    ///
    /// # Errors
    /// [`TooManyAtOnce`], and then none is taken; a limit in shadow mode refuses nothing.
    pub fn enter(&self, wanted: &[ConcurrencyIndex], facts: &RateFacts<'_>) -> Result<Place, TooManyAtOnce> {
        let mut place = Place { store: Arc::clone(&self.store), keys: Vec::with_capacity(wanted.len()) };
        for limit in wanted.iter().filter_map(|index| self.limits.get(index.0)) {
            let key = self.store.hasher.hash_one(limit.shape.key(facts));
            let mut shard = self.store.shard(key);
            let count = shard.entry(key).or_insert(0);
            let full = *count >= limit.most;
            let refused = full && limit.mode == Mode::Enforce;
            if !refused {
                *count = count.saturating_add(1);
                place.keys.push(key);
            }
            drop(shard);
            if let Some(counters) = &limit.counters {
                match (full, refused) {
                    (false, _) => counters.allowed.inc(),
                    (true, true) => counters.refused.inc(),
                    (true, false) => counters.shadowed.inc(),
                }
            }
            if refused {
                return Err(TooManyAtOnce);
            }
        }
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for key in &self.keys {
            if let Entry::Occupied(mut entry) = self.store.shard(*key).entry(*key) {
                if *entry.get() <= 1 {
                    entry.remove();
                } else {
                    *entry.get_mut() -= 1;
                }
            }
        }
    }
}

impl fmt::Debug for InFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InFlight").field("keys", &self.len()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("limits", &self.keys.len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZeroU32;

    use proptest::prelude::*;
    use sealgate_policy::RateKey;

    fn limit(name: &str, per: RateKey, most: u32) -> Concurrency {
        Concurrency {
            name: name.into(),
            per: vec![per],
            header: None,
            ipv6_prefix: 64,
            limit: most,
            mode: Mode::Enforce,
        }
    }

    fn of<'a>(subject: &'a str, last: u8) -> RateFacts<'a> {
        RateFacts {
            address: [192, 0, 2, last].into(),
            issuer: Some("i"),
            subject: Some(subject),
            session: None,
            device: None,
            headers: None,
            cost: NonZeroU32::MIN,
            route: "r",
            message_type: None,
            socket: None,
        }
    }

    const BOTH: &[ConcurrencyIndex] = &[ConcurrencyIndex(0), ConcurrencyIndex(1)];

    #[test]
    fn a_place_is_free_when_what_had_it_ends() {
        let store = InFlight::new();
        let limits = [limit("subject", RateKey::Subject, 2), limit("address", RateKey::Address, 3)];
        let limits = ConcurrencyLimits::build(&limits, &store, |_| None);
        let enter = |subject, last| limits.enter(BOTH, &of(subject, last));
        let (one, two) = (enter("alice", 1).unwrap(), enter("alice", 2).unwrap());
        assert_eq!(enter("alice", 3).unwrap_err(), TooManyAtOnce);
        let others: Vec<_> = (0..2).map(|_| enter("bob", 1).unwrap()).collect();
        // The address is full; what was taken of the subject is given back.
        assert!(enter("carol", 1).is_err());
        let carol: Vec<_> = (0..2).map(|_| enter("carol", 4).unwrap()).collect();
        drop(one);
        let again = enter("alice", 3).unwrap();
        drop((two, others, carol, again));
        assert!(store.is_empty());
    }

    #[test]
    fn in_shadow_mode_it_only_counts() {
        let store = InFlight::new();
        let shadow = Concurrency { mode: Mode::Shadow, ..limit("subject", RateKey::Subject, 1) };
        let limits = ConcurrencyLimits::build(&[shadow], &store, |_| None);
        let all: Vec<_> = (0..9).map(|_| limits.enter(&BOTH[..1], &of("alice", 1)).unwrap()).collect();
        drop(all);
        assert!(store.is_empty());
    }

    #[test]
    fn threads_that_enter_at_once_do_not_slip_through() {
        let store = InFlight::new();
        let limits = ConcurrencyLimits::build(&[limit("subject", RateKey::Subject, 7)], &store, |_| None);
        let held: Vec<_> = std::thread::scope(|scope| {
            let enter =
                || (0..50).filter_map(|_| limits.enter(&BOTH[..1], &of("alice", 1)).ok()).collect::<Vec<_>>();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(enter)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(held.len(), 7);
    }

    proptest! {
        #[test]
        fn agrees_with_a_count(steps in prop::collection::vec((any::<bool>(), 0u8..3, 0u8..3), 0..80)) {
            let store = InFlight::new();
            let limits = [limit("subject", RateKey::Subject, 2), limit("address", RateKey::Address, 3)];
            let limits = ConcurrencyLimits::build(&limits, &store, |_| None);
            let mut held: Vec<(u8, u8, Place)> = Vec::new();
            for (begins, subject, address) in steps {
                if begins {
                    let of_subject = held.iter().filter(|it| it.0 == subject).count();
                    let of_address = held.iter().filter(|it| it.1 == address).count();
                    let entered = limits.enter(BOTH, &of(&subject.to_string(), address));
                    prop_assert_eq!(entered.is_ok(), of_subject < 2 && of_address < 3);
                    held.extend(entered.ok().map(|place| (subject, address, place)));
                } else if !held.is_empty() {
                    drop(held.swap_remove(usize::from(subject) % held.len()));
                }
            }
            held.clear();
            prop_assert!(store.is_empty());
        }
    }
}
