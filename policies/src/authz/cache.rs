//! Answers of Cedar, remembered per core.

use std::cell::RefCell;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;

use crate::authz::Sample;
use crate::authz::inspect::{Fact, Facts};
use crate::identity::Identity;

/// Entries in one set.
const WAYS: usize = 8;

/// A core's memory of decisions that no table has.
///
/// Bounded: eight places for each hash, the one longest unused goes first. An answer counts for the very identity that it
/// was given for (so for one token, and no longer than the gateway keeps it), under the policy that gave it, and for the
/// same values of every fact that this policy looks at: a change of any of them is another question.
pub struct DecisionCache(RefCell<Memory>);

struct Memory {
    entries: Box<[Option<Entry>]>,
    hash: RandomState,
    clock: u32,
    /// The question at hand.
    key: Vec<u8>,
}

struct Entry {
    serial: u64,
    identity: Arc<Identity>,
    key: Box<[u8]>,
    allowed: bool,
    used: u32,
}

impl DecisionCache {
    /// An empty cache for `capacity` decisions, rounded up to a multiple of eight.
    pub fn new(capacity: usize) -> Self {
        let places = capacity.div_ceil(WAYS).max(1) * WAYS;
        let entries = std::iter::repeat_with(|| None).take(places).collect();
        Self(RefCell::new(Memory { entries, hash: RandomState::new(), clock: 0, key: Vec::new() }))
    }

    /// The remembered answer, or a new one. A remembered one takes no memory.
    pub(super) fn decide(
        &self,
        serial: u64,
        identity: &Arc<Identity>,
        touched: &Facts,
        sample: &Sample<'_>,
        decide: impl FnOnce() -> bool,
    ) -> bool {
        // INVARIANT: `decide` asks Cedar and knows nothing of this cache.
        let Ok(mut memory) = self.0.try_borrow_mut() else { return decide() };
        let Memory { entries, hash, clock, key } = &mut *memory;
        encode(key, touched, sample);
        *clock = clock.wrapping_add(1);
        let now = *clock;
        let sets = entries.len() / WAYS;
        let hashed = hash.hash_one((serial, Arc::as_ptr(identity) as usize, &**key));
        let set = usize::try_from(hashed % u64::try_from(sets).unwrap_or(1)).unwrap_or_default() * WAYS;
        let Some(set) = entries.get_mut(set..set + WAYS) else { return decide() };
        // An identity that an entry holds is alive: no other can stand where it stands.
        let same = |entry: &Entry| {
            entry.serial == serial && Arc::ptr_eq(&entry.identity, identity) && *entry.key == **key
        };
        if let Some(entry) = set.iter_mut().flatten().find(|entry| same(entry)) {
            entry.used = now;
            return entry.allowed;
        }
        let allowed = decide();
        let worth =
            |place: &Option<Entry>| place.as_ref().map(|entry| u32::MAX - now.wrapping_sub(entry.used));
        if let Some(place) = set.iter_mut().min_by_key(|place| worth(place)) {
            let (identity, key) = (Arc::clone(identity), key.as_slice().into());
            *place = Some(Entry { serial, identity, key, allowed, used: now });
        }
        allowed
    }
}

impl fmt::Debug for DecisionCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DecisionCache(..)")
    }
}

/// The facts that the policies look at and the identity does not hold, each of fixed length or with its length before it.
fn encode(key: &mut Vec<u8>, touched: &Facts, sample: &Sample<'_>) {
    key.clear();
    let mut text = |value: Option<&str>| {
        let length = value.map_or(u32::MAX, |value| u32::try_from(value.len()).unwrap_or(u32::MAX - 1));
        key.extend(length.to_le_bytes());
        key.extend(value.unwrap_or_default().as_bytes());
    };
    // Always: whatever a policy may make of them, they are what is asked about.
    text(Some(&sample.resource.id));
    text(sample.resource.department.as_deref());
    text(sample.resource.owner.as_deref());
    for fact in touched.iter() {
        match fact {
            Fact::Roles
            | Fact::Subject
            | Fact::Issuer
            | Fact::Department
            | Fact::Acr
            | Fact::Amr
            | Fact::Resource
            | Fact::ResourceDepartment
            | Fact::ResourceOwner => {}
            Fact::LoginAge => key.extend(sample.login_age.unwrap_or(-1).to_le_bytes()),
            Fact::TokenAge => key.extend(sample.token_age.unwrap_or(-1).to_le_bytes()),
            Fact::Now => key.extend(sample.now.to_le_bytes()),
            Fact::Hour => key.push(sample.hour()),
            Fact::Weekday => key.push(sample.weekday()),
            Fact::TlsVersion => key.push(sample.tls.tls13.into()),
            Fact::ClientCertificate => key.push(sample.tls.client_certificate.into()),
            Fact::Address => match sample.address {
                IpAddr::V4(address) => {
                    key.push(4);
                    key.extend(address.octets());
                }
                IpAddr::V6(address) => {
                    key.push(6);
                    key.extend(address.octets());
                }
            },
        }
    }
}
