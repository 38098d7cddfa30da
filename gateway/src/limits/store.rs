//! The cells behind every rate: a fixed amount of memory, whatever peers do.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use governor::nanos::Nanos;
use governor::state::StateStore;

use crate::lock::lock;

/// Locks that the cells are spread over. Two cores rarely meet at one of 64.
const SHARDS: usize = 64;

/// Cells in one group. 8 × 16 bytes are two cache lines.
const WAYS: usize = 8;

/// A key and its theoretical arrival time in nanoseconds since the store's epoch; key 0 was never used.
///
/// An array and not a struct, so that a new table is zeroed memory from the system, and a page of it costs nothing
/// before it is used.
type Cell = [u64; 2];

/// One rate's cell in each shard for keys that found the shard full.
pub(super) type Overflow = [Mutex<u64>; SHARDS];

/// The state of all rates, for all keys, of all policies that this process has had.
///
/// Made once per process and shared by every core; each reload's [`Rates`](super::Rates) go on with the same cells.
///
/// Memory is taken once, by `capacity`, and never grows. A key has two groups of eight cells to live in and goes to
/// the emptier one, so that a table filled to its capacity still finds a place for practically every key. A cell
/// whose limit is fully replenished says no more than no cell at all, so it is free to be reused. A new key that
/// finds only unreplenished cells shares one overflow cell with others in its position: it may be refused too early,
/// but nobody gets a fresh limit by filling the table, and nobody who has a cell loses it.
///
/// Half of the shards are for keys that hold something of a verified token: strangers, who can have as many addresses as
/// they like, take no room from users.
pub struct RateStore {
    epoch: Instant,
    hasher: RandomState,
    groups_per_shard: usize,
    shards: [Mutex<Vec<Cell>>; SHARDS],
    overflow: Mutex<HashMap<u64, Arc<Overflow>>>,
    overflowed: AtomicU64,
}

impl RateStore {
    /// A store for about `capacity` keys of strangers over all rates, and as many of users, at 24 bytes each, with one epoch for
    /// its whole life.
    pub fn new(capacity: usize) -> Arc<Self> {
        // Half as many cells again as keys: with two groups to choose from, hardly any key overflows at that filling.
        let cells = capacity.saturating_add(capacity / 2).max(1);
        let groups_per_shard = cells.div_ceil(SHARDS / 2 * WAYS);
        let shard = || Mutex::new(vec![[0u64; 2]; groups_per_shard.saturating_mul(WAYS)]);
        Arc::new(RateStore {
            epoch: Instant::now(),
            hasher: RandomState::new(),
            groups_per_shard,
            shards: std::array::from_fn(|_| shard()),
            overflow: Mutex::default(),
            overflowed: AtomicU64::new(0),
        })
    }

    /// Takes that shared an overflow cell because their shard was full, since the start.
    ///
    /// More than none means that the capacity is too small, or that somebody floods with many addresses.
    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    /// Cells that are in use at `now`: those not fully replenished. Reads all of them; meant for a scrape.
    pub fn in_use(&self, now: Instant) -> usize {
        let now = self.since_epoch(now);
        self.shards
            .iter()
            .map(|shard| lock(shard).iter().filter(|[key, tat]| *key != 0 && *tat > now).count())
            .sum()
    }

    /// Nanoseconds since the store's epoch, which all its cells are told in; 0 for anything earlier.
    pub(super) fn since_epoch(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_nanos()).unwrap_or(u64::MAX)
    }

    /// A hash that a peer cannot predict, so that nobody can aim at another's cell.
    pub(super) fn hash(&self, value: impl Hash) -> u64 {
        self.hasher.hash_one(value)
    }

    /// A cell's key: that hash, with the half of the table in its first bit.
    pub(super) fn key(&self, value: impl Hash, of_identity: bool) -> u64 {
        (self.hash(value) >> 1) | (u64::from(of_identity) << 63)
    }

    /// The overflow cells of the rate with that hash: the same ones for as long as anyone knows the rate.
    pub(super) fn overflow_of(&self, rate: u64, now: Instant) -> Arc<Overflow> {
        let now = self.since_epoch(now);
        let mut overflow = lock(&self.overflow);
        overflow
            .retain(|_, cells| Arc::strong_count(cells) > 1 || cells.iter().any(|cell| *lock(cell) > now));
        let cells = overflow.entry(rate).or_insert_with(|| Arc::new(std::array::from_fn(|_| Mutex::new(0))));
        Arc::clone(cells)
    }

    /// Where a key may live: its shard, and the first cells of its two groups.
    fn place(&self, key: u64) -> (usize, usize, usize) {
        // Disjoint parts of the key: bits 63..58, 31..0 and 57..26 (of which the upper ones decide).
        let shard = (key >> 58) as usize % SHARDS;
        let groups = self.groups_per_shard as u64;
        let group = |part: u64| (((part & 0xffff_ffff) * groups) >> 32) as usize * WAYS;
        (shard, group(key), group(key >> 26))
    }
}

impl fmt::Debug for RateStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cells = self.groups_per_shard * WAYS * SHARDS;
        f.debug_struct("RateStore")
            .field("cells", &cells)
            .field("overflowed", &self.overflowed())
            .finish_non_exhaustive()
    }
}

/// The store as one rate sees it at one moment: what governor works on.
pub(super) struct Cells<'a> {
    pub(super) store: &'a RateStore,
    pub(super) overflow: &'a Overflow,
    /// The moment, in nanoseconds since the store's epoch. Cells at or before it are fully replenished.
    pub(super) now: u64,
    /// How far ahead of `now` a cell can be under this rate when all its burst is used.
    ///
    /// A reload can have made the rate more generous since the cell was written; then the cell is worth an empty
    /// bucket of today's rate, not a wait by yesterday's.
    pub(super) reach: u64,
    /// Whether to decide only, and leave the cell as it is.
    pub(super) peek: bool,
}

impl StateStore for Cells<'_> {
    type Key = u64;

    fn measure_and_replace<T, F, E>(&self, key: &u64, decide: F) -> Result<T, E>
    where
        F: Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    {
        let key = (*key).max(1);
        let (shard_index, first, second) = self.store.place(key);
        let mut shard = lock(at(&self.store.shards, shard_index));
        if let Some([owner, tat]) = self.find(&mut shard, key, first, second) {
            // A free cell counts from 0, which is as good as never used.
            let mut known = if *owner == key { *tat } else { 0 };
            let outcome = self.decide(&mut known, decide);
            if known > 0 {
                (*owner, *tat) = (key, known);
            }
            return outcome;
        }
        drop(shard);
        if !self.peek {
            self.store.overflowed.fetch_add(1, Ordering::Relaxed);
        }
        let mut tat = lock(at(self.overflow, shard_index));
        self.decide(&mut tat, decide)
    }
}

impl Cells<'_> {
    /// Moves a key's own time to `tat`, if that is later: more was used elsewhere. A key that shares a cell has none of its own.
    pub(super) fn raise(&self, key: u64, tat: u64) {
        let key = key.max(1);
        let (shard_index, first, second) = self.store.place(key);
        let mut shard = lock(at(&self.store.shards, shard_index));
        if let Some([owner, known]) = self.find(&mut shard, key, first, second) {
            let before = if *owner == key { *known } else { 0 };
            (*owner, *known) = (key, before.max(tat));
        }
    }

    /// The key's own cell, or else a free one in the emptier of its groups, or nothing when both are full.
    fn find<'c>(&self, shard: &'c mut [Cell], key: u64, first: usize, second: usize) -> Option<&'c mut Cell> {
        let (mut found, mut most_free) = (None, 0);
        for start in [first, second] {
            let (mut free, mut count) = (None, 0);
            for (index, cell) in shard.iter().enumerate().skip(start).take(WAYS) {
                if cell[0] == key {
                    return shard.get_mut(index);
                }
                if cell[1] <= self.now {
                    free = Some(index);
                    count += 1;
                }
            }
            if count > most_free {
                (found, most_free) = (free, count);
            }
        }
        shard.get_mut(found?)
    }

    fn decide<T, E>(
        &self,
        tat: &mut u64,
        decide: impl Fn(Option<Nanos>) -> Result<(T, Nanos), E>,
    ) -> Result<T, E> {
        // Kept even if it then refuses: or every refusal would start the wait anew.
        *tat = (*tat).min(self.now.saturating_add(self.reach));
        let (outcome, next) = decide(Some(Nanos::new(*tat)))?;
        if !self.peek {
            *tat = next.as_u64();
        }
        Ok(outcome)
    }
}

/// The item of that index; `place` keeps indices below `SHARDS`.
fn at<T>(items: &[T; SHARDS], index: usize) -> &T {
    let [first, ..] = items;
    items.get(index).unwrap_or(first)
}
