//! How many connections are open, in all and from one address.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::AddressKey;
use crate::lock::lock;

const SHARDS: usize = 16;

/// Counters of open connections, shared by all cores and older than any snapshot.
///
/// Counting is apart from judging: a connection is counted first, and the guard tells what was open before it, for
/// `Policy::permit_connection` to compare with its limits; a refused connection drops its guard. So the map holds at
/// most one entry per open socket, and two cores that accept at once cannot both slip under a limit.
#[derive(Debug, Default)]
pub struct ConnectionLimits {
    total: AtomicU32,
    by_address: [Mutex<HashMap<AddressKey, u32>>; SHARDS],
}

impl ConnectionLimits {
    /// Counters at zero; made once per process.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Counts one more connection from `peer`, until the guard is dropped.
    pub fn open(self: &Arc<Self>, peer: IpAddr) -> ConnectionGuard {
        let address = AddressKey::from(peer);
        let others_in_total = self.total.fetch_add(1, Ordering::Relaxed);
        let mut shard = self.shard(address);
        let count = shard.entry(address).or_insert(0);
        let others_from_address = *count;
        *count = count.saturating_add(1);
        drop(shard);
        ConnectionGuard { limits: Arc::clone(self), address, others_in_total, others_from_address }
    }

    /// Connections that are open now.
    pub fn total(&self) -> u32 {
        self.total.load(Ordering::Relaxed)
    }

    /// Addresses (IPv6: /64 networks) with at least one open connection.
    pub fn addresses(&self) -> usize {
        self.by_address.iter().map(|shard| lock(shard).len()).sum()
    }

    fn close(&self, address: AddressKey) {
        self.total.fetch_sub(1, Ordering::Relaxed);
        if let Entry::Occupied(mut entry) = self.shard(address).entry(address) {
            if *entry.get() <= 1 {
                entry.remove();
            } else {
                *entry.get_mut() -= 1;
            }
        }
    }

    fn shard(&self, AddressKey(bits): AddressKey) -> MutexGuard<'_, HashMap<AddressKey, u32>> {
        // Neighbours in the address space spread over the shards; the map inside hashes with a random key.
        let index = (bits.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 60) as usize;
        let [first, ..] = &self.by_address;
        lock(self.by_address.get(index).unwrap_or(first))
    }
}

/// One open connection, for as long as it lives.
#[derive(Debug)]
pub struct ConnectionGuard {
    limits: Arc<ConnectionLimits>,
    address: AddressKey,
    others_in_total: u32,
    others_from_address: u32,
}

impl ConnectionGuard {
    /// Connections that were open when this one came, without it.
    pub fn others_in_total(&self) -> u32 {
        self.others_in_total
    }

    /// Connections from the same address (IPv6: /64 network) that were open when this one came, without it.
    pub fn others_from_address(&self) -> u32 {
        self.others_from_address
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        self.limits.close(self.address);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_until_the_guard_is_dropped() {
        let limits = ConnectionLimits::new();
        let (here, there) = ("192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let first = limits.open(here);
        let second = limits.open(here);
        let third = limits.open(there);
        assert_eq!((first.others_in_total(), first.others_from_address()), (0, 0));
        assert_eq!((second.others_in_total(), second.others_from_address()), (1, 1));
        assert_eq!((third.others_in_total(), third.others_from_address()), (2, 0));
        drop(first);
        assert_eq!(limits.open(here).others_from_address(), 1);
        drop((second, third));
        assert_eq!((limits.total(), limits.addresses()), (0, 0));
    }

    #[test]
    fn one_ipv6_subscriber_is_one_address() {
        let limits = ConnectionLimits::new();
        let _first = limits.open("2001:db8::1".parse().unwrap());
        assert_eq!(limits.open("2001:db8::2".parse().unwrap()).others_from_address(), 1);
        assert_eq!(limits.open("2001:db8:0:1::1".parse().unwrap()).others_from_address(), 0);
    }

    #[test]
    fn concurrent_connections_never_see_the_same_count() {
        let limits = ConnectionLimits::new();
        let peer = "192.0.2.1".parse().unwrap();
        let mut seen: Vec<u32> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| (0..100).map(|_| limits.open(peer)).collect::<Vec<_>>()))
                .collect();
            let guards: Vec<_> = threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
            guards.iter().map(ConnectionGuard::others_from_address).collect()
        });
        seen.sort_unstable();
        assert_eq!(seen, (0..800).collect::<Vec<_>>());
        assert_eq!((limits.total(), limits.addresses()), (0, 0));
    }
}
