//! Tokens that were verified already, remembered per core.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::error::Unspecified;
use ring::rand::{SecureRandom, SystemRandom};
use sealgate_policy::Identity;
use zeroize::Zeroizing;

/// Entries in one set.
const WAYS: usize = 8;

/// Under which verifier and keys an entry was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Generation {
    pub(super) verifier: u64,
    pub(super) keys: u64,
}

/// A core's memory of verified tokens.
///
/// Bounded: sixteen places for each hash, of which the one longest unused goes first. They are in two sets that two halves
/// of the hash choose: with one choice a cache that is half full forgets one token in twenty. Only tokens that verified
/// get in, so that nobody without good tokens can push others out. An entry counts until its token expires and only under the
/// generation that verified it, so a change of policy or of keys needs no flush to be one.
///
/// Holds no token: entries are found by a 128-bit hash under a random key of the cache's own.
pub struct TokenCache {
    hash: LessSafeKey,
    sets: usize,
    clock: Cell<u32>,
    entries: RefCell<Box<[Option<Entry>]>>,
}

#[derive(Clone)]
struct Entry {
    key: TokenKey,
    generation: Generation,
    /// Unix seconds at which it no longer counts.
    until: u64,
    /// The cache's clock when it was last found.
    used: u32,
    identity: Arc<Identity>,
}

/// Stands for a token; nothing if it could not be hashed, and then nothing is found or kept.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct TokenKey(Option<u128>);

impl TokenCache {
    /// An empty cache for `capacity` tokens, rounded up to a multiple of eight.
    ///
    /// # Errors
    /// The system has no random numbers to give.
    pub fn new(capacity: usize) -> Result<Self, Unspecified> {
        let mut secret = Zeroizing::new([0; 32]);
        SystemRandom::new().fill(&mut *secret)?;
        let sets = capacity.div_ceil(WAYS).max(1);
        Ok(TokenCache {
            hash: LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &*secret)?),
            sets,
            clock: Cell::new(0),
            entries: RefCell::new(vec![None; sets * WAYS].into()),
        })
    }

    /// The token's keyed hash: a GMAC (NIST SP 800-38D) of all its bytes, since AES in hardware is several times
    /// faster here than any hash of that width.
    ///
    /// One nonce serves for all. That would betray the key to who sees tags, but none leaves this cache; without
    /// them, two tokens of 64 KiB collide with a probability below 2^-115, whoever chose them.
    pub(super) fn key(&self, token: &str) -> TokenKey {
        let nonce = Nonce::assume_unique_for_key([0; NONCE_LEN]);
        let tag = self.hash.seal_in_place_separate_tag(nonce, Aad::from(token.as_bytes()), &mut []);
        TokenKey(tag.ok().and_then(|tag| tag.as_ref().try_into().ok()).map(u128::from_ne_bytes))
    }

    /// Who the token stands for, if that is known and still holds at `now` (unix seconds).
    pub(super) fn find(&self, key: TokenKey, generation: Generation, now: u64) -> Option<Arc<Identity>> {
        let mut entries = self.entries.borrow_mut();
        let is_it = |entry: &&mut Entry| entry.key == key;
        for set in self.sets(key)? {
            let Some(entry) = entries.get_mut(set)?.iter_mut().flatten().find(is_it) else { continue };
            if entry.generation != generation || now >= entry.until {
                return None;
            }
            entry.used = self.tick();
            return Some(Arc::clone(&entry.identity));
        }
        None
    }

    /// Remembers who the token stands for.
    pub(super) fn keep(
        &self,
        key: TokenKey,
        generation: Generation,
        until: u64,
        now: u64,
        identity: &Arc<Identity>,
    ) {
        let used = self.tick();
        let mut entries = self.entries.borrow_mut();
        let Some(sets) = self.sets(key) else { return };
        // The token's own place, or the one least worth keeping: empty, stale, longest unused.
        let worth = |place: usize| {
            Some(match entries.get(place)? {
                Some(entry) if entry.key == key => (0, 0),
                // Sets fill from their beginning: the emptier one is chosen.
                None => (1, (place % WAYS) as u32),
                Some(entry) if entry.generation != generation || now >= entry.until => (2, 0),
                Some(entry) => (3, u32::MAX - used.wrapping_sub(entry.used)),
            })
        };
        let place = sets.into_iter().flatten().min_by_key(|&place| worth(place));
        if let Some(place) = place.and_then(|place| entries.get_mut(place)) {
            *place = Some(Entry { key, generation, until, used, identity: Arc::clone(identity) });
        }
    }

    fn sets(&self, TokenKey(key): TokenKey) -> Option<[Range<usize>; 2]> {
        // The upper half of the product of a hash and a count is an even choice below that count.
        let set = |half: u64| {
            let start = ((u128::from(half) * self.sets as u128) >> 64) as usize * WAYS;
            start..start + WAYS
        };
        key.map(|key| [set(key as u64), set((key >> 64) as u64)])
    }

    fn tick(&self) -> u32 {
        let next = self.clock.get().wrapping_add(1);
        self.clock.set(next);
        next
    }
}

impl fmt::Debug for TokenCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenCache").field("capacity", &(self.sets * WAYS)).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sealgate_policy::IdentityParts;

    const NOW: u64 = 1_000;
    const GENERATION: Generation = Generation { verifier: 1, keys: 1 };

    fn identity(subject: &str) -> Arc<Identity> {
        Arc::new(Identity::new(IdentityParts { subject: subject.to_owned(), ..IdentityParts::default() }))
    }

    fn keep(cache: &TokenCache, token: &str, until: u64) {
        cache.keep(cache.key(token), GENERATION, until, NOW, &identity(token));
    }

    fn find(cache: &TokenCache, token: &str, generation: Generation, now: u64) -> Option<String> {
        cache.find(cache.key(token), generation, now).map(|identity| identity.subject.clone())
    }

    #[test]
    fn finds_what_was_kept_until_it_expires() {
        let cache = TokenCache::new(64).unwrap();
        keep(&cache, "token", NOW + 10);
        assert_eq!(find(&cache, "token", GENERATION, NOW + 9).as_deref(), Some("token"));
        assert_eq!(find(&cache, "token", GENERATION, NOW + 10), None);
        assert_eq!(find(&cache, "tokem", GENERATION, NOW), None);
        assert_eq!(find(&cache, "token.", GENERATION, NOW), None);
        assert_eq!(find(&cache, "", GENERATION, NOW), None);
    }

    #[test]
    fn another_policy_or_other_keys_know_nothing_of_it() {
        let cache = TokenCache::new(64).unwrap();
        keep(&cache, "token", NOW + 10);
        assert_eq!(find(&cache, "token", Generation { verifier: 2, keys: 1 }, NOW), None);
        assert_eq!(find(&cache, "token", Generation { verifier: 1, keys: 2 }, NOW), None);
    }

    #[test]
    fn the_longest_unused_goes_first() {
        let cache = TokenCache::new(1).unwrap();
        let tokens: Vec<String> = (0..9).map(|number| format!("token {number}")).collect();
        for token in &tokens[..8] {
            keep(&cache, token, NOW + 10);
        }
        assert!(find(&cache, &tokens[0], GENERATION, NOW).is_some());
        keep(&cache, &tokens[8], NOW + 10);
        let missing: Vec<_> =
            tokens.iter().filter(|token| find(&cache, token, GENERATION, NOW).is_none()).collect();
        assert_eq!(missing, [&tokens[1]]);
    }

    #[test]
    fn a_cache_that_is_half_full_forgets_nothing() {
        let cache = TokenCache::new(4_000).unwrap();
        let tokens: Vec<String> = (0..2_000).map(|number| format!("token {number}")).collect();
        tokens.iter().for_each(|token| keep(&cache, token, NOW + 10));
        let lost = tokens.iter().filter(|token| find(&cache, token, GENERATION, NOW).is_none()).count();
        assert_eq!(lost, 0);
    }

    #[test]
    fn expired_entries_go_before_live_ones() {
        let cache = TokenCache::new(8).unwrap();
        for number in 0..7 {
            keep(&cache, &number.to_string(), NOW + 10);
        }
        keep(&cache, "expired", NOW);
        keep(&cache, "new", NOW + 10);
        assert!((0..7).all(|number| find(&cache, &number.to_string(), GENERATION, NOW).is_some()));
    }

    #[test]
    fn two_caches_hash_differently() {
        let (one, other) = (TokenCache::new(1).unwrap(), TokenCache::new(1).unwrap());
        assert!(one.key("token") == one.key("token"));
        assert!(one.key("token") != other.key("token"));
    }

    proptest! {
        #[test]
        fn never_takes_one_token_for_another(steps in prop::collection::vec((any::<bool>(), 0u8..40, 0u64..20), 0..200)) {
            let cache = TokenCache::new(16).unwrap();
            let mut kept = std::collections::HashMap::new();
            for (keeps, token, time) in steps {
                let token = token.to_string();
                if keeps {
                    keep(&cache, &token, NOW + time);
                    kept.insert(token, NOW + time);
                } else if let Some(subject) = find(&cache, &token, GENERATION, NOW + time) {
                    prop_assert_eq!(&subject, &token);
                    prop_assert!(NOW + time < kept[&token]);
                }
            }
        }
    }
}
