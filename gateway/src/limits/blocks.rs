//! Addresses that may not connect for a time: by an operator's word, or by a penalty.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::AddressKey;
use crate::lock::lock;

/// Addresses that can be blocked at a time. One more is not, rather than another one let in.
const MAX_BLOCKS: usize = 100_000;

/// Of these, room that penalties leave for the operator.
const FOR_OPERATOR: usize = 10_000;

/// Blocks that are shown.
const MAX_SHOWN: usize = 1_000;

/// Addresses that are blocked for a time. Older than any snapshot; not kept over a restart.
#[derive(Debug, Default)]
pub struct Blocks {
    count: AtomicUsize,
    blocked: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    blocks: HashMap<AddressKey, Block>,
    /// When a full table was last looked through for what has ended, in unix seconds: once a second will do.
    swept: u64,
}

/// One address that is blocked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// IPv4 address, or an address of the IPv6 /64.
    pub address: IpAddr,
    /// Unix seconds.
    pub until: u64,
    /// Name of the penalty; none for an operator.
    pub penalty: Option<Arc<str>>,
}

/// As many addresses are blocked as can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_BLOCKS} addresses are blocked already")]
pub struct TooManyBlocks;

impl Blocks {
    /// Blocks an address until `block.until`, or longer if it is blocked for longer. `now` is in unix seconds.
    ///
    /// # Errors
    /// [`TooManyBlocks`].
    pub fn block(&self, block: Block, now: u64) -> Result<(), TooManyBlocks> {
        let mut table = lock(&self.blocked);
        let Table { blocks: blocked, swept } = &mut *table;
        let room = if block.penalty.is_some() { MAX_BLOCKS - FOR_OPERATOR } else { MAX_BLOCKS };
        let key = AddressKey::from(block.address);
        if blocked.len() >= room && !blocked.contains_key(&key) {
            if std::mem::replace(swept, now) != now {
                blocked.retain(|_, block| now < block.until);
            }
            if blocked.len() >= room {
                return Err(TooManyBlocks);
            }
        }
        let known = blocked.entry(key).or_insert_with(|| block.clone());
        if known.until < block.until {
            *known = block;
        }
        self.count.store(blocked.len(), Ordering::Release);
        Ok(())
    }

    /// Lets an address in again; whether it was blocked.
    pub fn unblock(&self, address: IpAddr) -> bool {
        let blocked = &mut lock(&self.blocked).blocks;
        let was = blocked.remove(&AddressKey::from(address)).is_some();
        self.count.store(blocked.len(), Ordering::Release);
        was
    }

    /// Whether an address is blocked at `now` (unix seconds).
    pub fn is_blocked(&self, address: IpAddr, now: u64) -> bool {
        // Where nothing is blocked, nothing is locked.
        self.count.load(Ordering::Acquire) > 0
            && lock(&self.blocked)
                .blocks
                .get(&AddressKey::from(address))
                .is_some_and(|block| now < block.until)
    }

    /// What is blocked at `now`, those first that end first; and how many that are, of which the first are shown.
    pub fn list(&self, now: u64) -> (Vec<Block>, usize) {
        let mut all: Vec<_> =
            lock(&self.blocked).blocks.values().filter(|block| now < block.until).cloned().collect();
        all.sort_unstable_by_key(|block| (block.until, block.address));
        let count = all.len();
        all.truncate(MAX_SHOWN);
        (all, count)
    }

    /// Clears away what has ended at `now`. Meant to be called every minute or so.
    pub fn forget_expired(&self, now: u64) {
        let blocked = &mut lock(&self.blocked).blocks;
        blocked.retain(|_, block| now < block.until);
        self.count.store(blocked.len(), Ordering::Release);
    }

    /// Entries, ended ones included until they are cleared away.
    pub fn len(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Whether nothing is blocked.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(address: &str, until: u64, penalty: Option<&str>) -> Block {
        Block { address: address.parse().unwrap(), until, penalty: penalty.map(Into::into) }
    }

    #[test]
    fn a_block_ends_in_time_or_by_word() {
        let blocks = Blocks::default();
        let is_blocked = |address: &str, now| blocks.is_blocked(address.parse().unwrap(), now);
        assert!(!is_blocked("192.0.2.1", 0));
        blocks.block(block("192.0.2.1", 100, Some("logins")), 0).unwrap();
        blocks.block(block("2001:db8::1", 200, None), 0).unwrap();
        assert!(
            is_blocked("192.0.2.1", 99)
                && is_blocked("::ffff:192.0.2.1", 99)
                && !is_blocked("192.0.2.1", 100)
        );
        assert!(!is_blocked("192.0.2.2", 0));
        assert!(is_blocked("2001:db8::2", 0) && !is_blocked("2001:db8:0:1::1", 0));
        // A shorter one does not make it shorter.
        blocks.block(block("192.0.2.1", 50, None), 0).unwrap();
        assert_eq!(
            blocks.list(0).0,
            [block("192.0.2.1", 100, Some("logins")), block("2001:db8::1", 200, None)]
        );
        assert!(
            blocks.unblock("192.0.2.1".parse().unwrap()) && !blocks.unblock("192.0.2.1".parse().unwrap())
        );
        assert!(!is_blocked("192.0.2.1", 0));
        assert_eq!(blocks.list(200), (vec![], 0));
        blocks.forget_expired(200);
        assert!(blocks.is_empty());
    }

    #[test]
    fn penalties_leave_room_for_the_operator_and_nobody_is_let_in_for_another() {
        let blocks = Blocks::default();
        let of =
            |number: u32| Block { address: IpAddr::V4(number.into()), until: 100, penalty: Some("p".into()) };
        let entered = (0..200_000).filter(|number| blocks.block(of(*number), 0).is_ok()).count();
        assert_eq!(entered, MAX_BLOCKS - FOR_OPERATOR);
        assert!(blocks.is_blocked(IpAddr::V4(0.into()), 0));
        blocks.block(block("192.0.2.1", 100, None), 0).unwrap();
        assert!(blocks.is_blocked("192.0.2.1".parse().unwrap(), 0));
        // What has ended makes room.
        blocks.block(Block { until: 300, ..of(1 << 30) }, 200).unwrap();
        assert_eq!(blocks.len(), 1);
    }
}
