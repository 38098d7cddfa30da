//! How often, and how many at once.
//!
//! Rates are governor's GCRA over cells that we keep ourselves ([`RateStore`]): bounded, sharded, and outside the
//! snapshot, so that a reload forgives nobody. [`Rates`] is the snapshot's side of it: what the policy says, ready
//! to be asked. [`ConnectionLimits`] and [`SocketLimits`] count what is open, [`ConcurrencyLimits`] what is under way, which no
//! reload touches either; [`Load`] tells when it is too much. [`Penalties`] make those wait who fail again and again, [`Lists`] and [`Blocks`] refuse addresses.

mod blocks;
mod connections;
mod in_flight;
mod lists;
mod load;
mod penalties;
mod rates;
mod sockets;
mod store;

pub use blocks::{Block, Blocks, TooManyBlocks};
pub use connections::{ConnectionGuard, ConnectionLimits};
pub use in_flight::{ConcurrencyCounters, ConcurrencyLimits, InFlight, Place, TooManyAtOnce};
pub use lists::{Listed, Lists, ListsBuilder};
pub use load::{LOOK, Load, LoadLevel, Work};
pub use penalties::{Attempts, Penalties, PenaltyCounters, PenaltyStore};
pub use rates::{RateClock, RateCounters, RateStanding, Rates, Settling, retry_after_seconds};
pub use sockets::{Displaced, Replaced, SocketFacts, SocketGuard, SocketLimits, TooManySockets};
pub use store::RateStore;

use std::net::IpAddr;

/// What counts as one address when something is counted per address.
///
/// IPv4 whole. IPv6 by its /64 or shorter, because that much belongs to a single subscriber (RFC 6177) who can use any address
/// in it. IPv4 in IPv6 (RFC 4291 §2.5.5.2) is the IPv4 address that it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AddressKey(u64);

impl AddressKey {
    /// The key of an address of which, for IPv6, only the first `prefix` bits count; 64 at most.
    pub fn of(address: IpAddr, prefix: u8) -> Self {
        match address.to_canonical() {
            // ::/16 is no one's network, so an IPv4 address never meets an IPv6 prefix here.
            IpAddr::V4(v4) => AddressKey(u64::from(v4.to_bits())),
            IpAddr::V6(v6) => {
                let left_out = 64 - u32::from(prefix.min(64));
                AddressKey(((v6.to_bits() >> 64) as u64) & u64::MAX.checked_shl(left_out).unwrap_or(0))
            }
        }
    }
}

impl From<IpAddr> for AddressKey {
    fn from(address: IpAddr) -> Self {
        AddressKey::of(address, 64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(address: &str) -> AddressKey {
        AddressKey::from(address.parse::<IpAddr>().unwrap())
    }

    #[test]
    fn ipv4_counts_whole_and_ipv6_by_its_64() {
        assert_ne!(key("192.0.2.1"), key("192.0.2.2"));
        assert_eq!(key("2001:db8:0:1::1"), key("2001:db8:0:1:ffff:ffff:ffff:ffff"));
        assert_ne!(key("2001:db8:0:1::1"), key("2001:db8:0:2::1"));
        assert_eq!(key("::ffff:192.0.2.1"), key("192.0.2.1"));
        let by_48 = |address: &str| AddressKey::of(address.parse().unwrap(), 48);
        assert_eq!(by_48("2001:db8:0:1::1"), by_48("2001:db8:0:ffff::1"));
        assert_ne!(by_48("2001:db8:0:1::1"), by_48("2001:db8:1:1::1"));
        assert_ne!(by_48("192.0.2.1"), by_48("192.0.2.2"));
    }
}
