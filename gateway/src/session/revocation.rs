//! What no longer counts, although it was signed and has not expired.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher, RandomState};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};

use sealgate_policy::Identity;

const SHARDS: usize = 16;

/// Whose tokens or sockets are meant. Ids count within their issuer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target<'a> {
    /// One token (`jti`).
    Token {
        /// `iss`.
        issuer: &'a str,
        /// `jti`.
        token_id: &'a str,
    },
    /// One session (`sid`).
    Session {
        /// `iss`.
        issuer: &'a str,
        /// The session's id.
        session: &'a str,
    },
    /// All of one subject's.
    Subject {
        /// `iss`.
        issuer: &'a str,
        /// `sub`.
        subject: &'a str,
    },
    /// Everyone's of one issuer.
    Issuer {
        /// `iss`.
        issuer: &'a str,
    },
    /// Everyone's whose token was signed with one of an issuer's keys.
    Key {
        /// `iss`.
        issuer: &'a str,
        /// `kid`.
        key_id: &'a str,
    },
}

impl<'a> Target<'a> {
    /// Everything by which an identity can be meant: its token, session, subject, issuer and key, as far as it
    /// has them.
    pub fn all_of(identity: &'a Identity) -> [Option<Self>; 5] {
        let issuer = &*identity.issuer;
        [
            identity.token_id.as_deref().map(|token_id| Target::Token { issuer, token_id }),
            identity.session.as_deref().map(|session| Target::Session { issuer, session }),
            Some(Target::Subject { issuer, subject: &identity.subject }),
            Some(Target::Issuer { issuer }),
            identity.key_id.as_deref().map(|key_id| Target::Key { issuer, key_id }),
        ]
    }

    /// Whose ids are meant.
    pub fn issuer(&self) -> &'a str {
        match self {
            Target::Token { issuer, .. }
            | Target::Session { issuer, .. }
            | Target::Subject { issuer, .. }
            | Target::Issuer { issuer }
            | Target::Key { issuer, .. } => issuer,
        }
    }

    /// Whether the identity is meant.
    pub fn means(&self, identity: &Identity) -> bool {
        Target::all_of(identity).iter().flatten().any(|target| target == self)
    }

    pub(super) fn hash_name<H: Hasher>(&self, state: &mut H) {
        match self {
            Target::Token { issuer, token_id } => (0u8, issuer, token_id).hash(state),
            Target::Session { issuer, session } => (1u8, issuer, session).hash(state),
            Target::Subject { issuer, subject } => (2u8, issuer, subject).hash(state),
            Target::Issuer { issuer } => (3u8, issuer).hash(state),
            Target::Key { issuer, key_id } => (4u8, issuer, key_id).hash(state),
        }
    }
}

/// A [`Target`] that owns its words, to be sent or stored.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "see the fields of `Target`")]
pub enum OwnedTarget {
    /// As [`Target::Token`].
    Token { issuer: String, token_id: String },
    /// As [`Target::Session`].
    Session { issuer: String, session: String },
    /// As [`Target::Subject`].
    Subject { issuer: String, subject: String },
    /// As [`Target::Issuer`].
    Issuer { issuer: String },
    /// As [`Target::Key`].
    Key { issuer: String, key_id: String },
}

impl OwnedTarget {
    /// The same, borrowed.
    pub fn borrowed(&self) -> Target<'_> {
        match self {
            Self::Token { issuer, token_id } => Target::Token { issuer, token_id },
            Self::Session { issuer, session } => Target::Session { issuer, session },
            Self::Subject { issuer, subject } => Target::Subject { issuer, subject },
            Self::Issuer { issuer } => Target::Issuer { issuer },
            Self::Key { issuer, key_id } => Target::Key { issuer, key_id },
        }
    }
}

impl From<Target<'_>> for OwnedTarget {
    fn from(target: Target<'_>) -> Self {
        let owned = str::to_owned;
        match target {
            Target::Token { issuer, token_id } => {
                Self::Token { issuer: owned(issuer), token_id: owned(token_id) }
            }
            Target::Session { issuer, session } => {
                Self::Session { issuer: owned(issuer), session: owned(session) }
            }
            Target::Subject { issuer, subject } => {
                Self::Subject { issuer: owned(issuer), subject: owned(subject) }
            }
            Target::Issuer { issuer } => Self::Issuer { issuer: owned(issuer) },
            Target::Key { issuer, key_id } => Self::Key { issuer: owned(issuer), key_id: owned(key_id) },
        }
    }
}

/// One revocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Revocation<'a> {
    /// What is revoked.
    pub target: Target<'a>,
    /// Unix seconds. Tokens issued before count no more, and neither do those that do not say when they were issued;
    /// [`u64::MAX`] for all of them, now and later, as is meant by a token, a session or a key.
    pub issued_before: u64,
    /// Unix seconds from which the revocation may be forgotten, because every token that it concerns has expired.
    pub until: u64,
}

impl Revocation<'_> {
    /// Whether this revocation alone, for as long as it holds, ends what the identity's token opened.
    pub fn ends(&self, identity: &Identity) -> bool {
        self.target.means(identity) && identity.issued_at.unwrap_or(0) < self.issued_before
    }
}

/// All revocations hold as many entries as they may. Fail closed, and raise an alarm: one was not entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room for another revocation")]
pub struct RevocationsFull;

/// The revocations that hold, shared by all cores and older than any snapshot.
///
/// Entries stand under a 128-bit keyed hash of what they revoke, 48 bytes each.
pub struct Revocations {
    capacity: usize,
    hashers: [RandomState; 2],
    entries: AtomicUsize,
    version: AtomicU64,
    shards: [RwLock<Shard>; SHARDS],
}

type Shard = HashMap<u128, Entry, BuildHasherDefault<Low>>;

#[derive(Clone, Copy)]
struct Entry {
    issued_before: u64,
    until: u64,
}

impl Revocations {
    /// No revocations, and room for `capacity`.
    pub fn new(capacity: usize) -> Self {
        Revocations {
            capacity,
            hashers: [RandomState::new(), RandomState::new()],
            entries: AtomicUsize::new(0),
            version: AtomicU64::new(0),
            shards: Default::default(),
        }
    }

    /// Enters a revocation at `now` (unix seconds). Two of the same target become the wider of both.
    ///
    /// Looking at open sockets comes after; see [`Registry`](super::Registry).
    ///
    /// # Errors
    /// [`RevocationsFull`], once the expired ones have been cleared away.
    pub fn revoke(&self, revocation: &Revocation<'_>, now: u64) -> Result<(), RevocationsFull> {
        let key = self.key(&revocation.target);
        if self.len() >= self.capacity {
            self.forget_expired(now);
        }
        let mut shard = write(self.shard(key));
        if !shard.contains_key(&key) && self.entries.fetch_add(1, Ordering::AcqRel) >= self.capacity {
            self.entries.fetch_sub(1, Ordering::AcqRel);
            return Err(RevocationsFull);
        }
        let entry = shard.entry(key).or_insert(Entry { issued_before: 0, until: 0 });
        entry.issued_before = entry.issued_before.max(revocation.issued_before);
        entry.until = entry.until.max(revocation.until);
        drop(shard);
        self.version.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Whether a verified identity is revoked at `now` (unix seconds).
    pub fn is_revoked(&self, identity: &Identity, now: u64) -> bool {
        // Most gateways have none at all most of the time.
        if self.entries.load(Ordering::Acquire) == 0 {
            return false;
        }
        let issued_at = identity.issued_at.unwrap_or(0);
        Target::all_of(identity).iter().flatten().any(|target| self.holds(target, issued_at, now))
    }

    /// Whether all is revoked at `now` that the target means and that was issued then.
    pub fn holds(&self, target: &Target<'_>, issued_at: u64, now: u64) -> bool {
        let key = self.key(target);
        let entry = read(self.shard(key)).get(&key).copied();
        entry.is_some_and(|entry| issued_at < entry.issued_before && now < entry.until)
    }

    /// Clears away what has expired at `now`. Meant to be called every minute or so.
    pub fn forget_expired(&self, now: u64) {
        for shard in &self.shards {
            let mut shard = write(shard);
            let before = shard.len();
            shard.retain(|_, entry| now < entry.until);
            self.entries.fetch_sub(before - shard.len(), Ordering::AcqRel);
        }
    }

    /// Changes with every revocation.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// Entries, expired ones included that have not been cleared away.
    pub fn len(&self) -> usize {
        self.entries.load(Ordering::Acquire)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn key(&self, target: &Target<'_>) -> u128 {
        let [low, high] = &self.hashers;
        let half = |hasher: &RandomState| {
            let mut state = hasher.build_hasher();
            target.hash_name(&mut state);
            u128::from(state.finish())
        };
        (half(high) << 64) | half(low)
    }

    fn shard(&self, key: u128) -> &RwLock<Shard> {
        let [first, ..] = &self.shards;
        self.shards.get((key >> 124) as usize).unwrap_or(first)
    }
}

/// The lower half of a key that is a keyed hash already; hashing it again would cost more than the look-up.
#[derive(Default)]
pub(super) struct Low(u64);

impl Hasher for Low {
    fn write(&mut self, bytes: &[u8]) {
        // Keys come by `write_u128`. Anything else would still be hashed, if badly.
        self.0 = bytes.iter().fold(self.0, |sum, byte| sum.rotate_left(8) ^ u64::from(*byte));
    }

    fn write_u128(&mut self, key: u128) {
        self.0 = key as u64;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

impl fmt::Debug for Revocations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Revocations").field("entries", &self.len()).finish_non_exhaustive()
    }
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sealgate_policy::IdentityParts;

    const ISSUER: &str = "https://id.example";
    const NOW: u64 = 1_000_000;

    fn identity(subject: &str, session: &str, token: &str, issued_at: Option<u64>) -> Identity {
        Identity::new(IdentityParts {
            issuer: ISSUER.into(),
            subject: subject.to_owned(),
            session: Some(session.to_owned()),
            token_id: Some(token.to_owned()),
            key_id: Some("k".into()),
            issued_at,
            ..IdentityParts::default()
        })
    }

    fn whole(target: Target<'_>) -> Revocation<'_> {
        Revocation { target, issued_before: u64::MAX, until: NOW + 100 }
    }

    #[test]
    fn revokes_what_is_meant_and_nothing_else() {
        let revocations = Revocations::new(10);
        let mine = identity("alice", "s1", "t1", Some(NOW - 10));
        let other = identity("bob", "s2", "t2", Some(NOW - 10));
        for target in Target::all_of(&mine).into_iter().flatten() {
            let revocations = Revocations::new(10);
            assert!(!revocations.is_revoked(&mine, NOW));
            revocations.revoke(&whole(target), NOW).unwrap();
            assert!(revocations.is_revoked(&mine, NOW), "{target:?}");
            let of_all = matches!(target, Target::Issuer { .. } | Target::Key { .. });
            assert_eq!(revocations.is_revoked(&other, NOW), of_all, "{target:?}");
        }
        revocations
            .revoke(&whole(Target::Session { issuer: "https://other.example", session: "s1" }), NOW)
            .unwrap();
        revocations.revoke(&whole(Target::Session { issuer: ISSUER, session: "t1" }), NOW).unwrap();
        revocations.revoke(&whole(Target::Key { issuer: ISSUER, key_id: "other" }), NOW).unwrap();
        assert!(!revocations.is_revoked(&mine, NOW));
        assert_eq!(revocations.version(), 3);
    }

    #[test]
    fn nothing_issued_before_counts() {
        let revocations = Revocations::new(10);
        let target = Target::Subject { issuer: ISSUER, subject: "alice" };
        revocations.revoke(&Revocation { target, issued_before: NOW, until: NOW + 100 }, NOW).unwrap();
        assert!(revocations.is_revoked(&identity("alice", "s", "t", Some(NOW - 1)), NOW));
        assert!(revocations.is_revoked(&identity("alice", "s", "t", None), NOW));
        assert!(!revocations.is_revoked(&identity("alice", "s", "t", Some(NOW)), NOW));
        // An earlier bound does not weaken a later one.
        revocations.revoke(&Revocation { target, issued_before: 0, until: 0 }, NOW).unwrap();
        assert!(revocations.is_revoked(&identity("alice", "s", "t", Some(NOW - 1)), NOW));
    }

    #[test]
    fn expires_and_is_bounded() {
        let revocations = Revocations::new(2);
        let (one, two, three) = ("t1", "t2", "t3");
        let token = |token_id| whole(Target::Token { issuer: ISSUER, token_id });
        revocations.revoke(&token(one), NOW).unwrap();
        revocations.revoke(&token(two), NOW).unwrap();
        revocations.revoke(&token(two), NOW).unwrap();
        assert_eq!(revocations.revoke(&token(three), NOW), Err(RevocationsFull));
        assert!(!revocations.is_revoked(&identity("a", "s", one, None), NOW + 100));
        revocations.revoke(&token(three), NOW + 100).unwrap();
        assert_eq!(revocations.len(), 1);
    }

    proptest! {
        #[test]
        fn agrees_with_a_list_of_events(
            events in prop::collection::vec((0u8..5, 0u8..3, 0u64..50, 0u64..50), 0..40),
            issued_at in 0u64..50,
            now in 0u64..50,
        ) {
            let revocations = Revocations::new(1000);
            let who = identity("0", "1", "2", Some(issued_at));
            let mut widest = HashMap::new();
            for (kind, name, issued_before, until) in events {
                let text = name.to_string();
                let target = match kind {
                    0 => Target::Token { issuer: ISSUER, token_id: &text },
                    1 => Target::Session { issuer: ISSUER, session: &text },
                    3 => Target::Issuer { issuer: ISSUER },
                    4 => Target::Key { issuer: ISSUER, key_id: if name == 0 { "k" } else { &text } },
                    _ => Target::Subject { issuer: ISSUER, subject: &text },
                };
                let revocation = Revocation { target, issued_before, until };
                let is_meant = [(0, 2), (1, 1), (2, 0), (4, 0)].contains(&(kind, name)) || kind == 3;
                prop_assert_eq!(revocation.ends(&who), is_meant && issued_at < issued_before);
                let owned = OwnedTarget::from(target);
                prop_assert_eq!(owned.borrowed(), target);
                revocations.revoke(&revocation, 0).unwrap();
                let (before, end) = widest.entry((kind, if kind == 3 { 0 } else { name })).or_insert((0, 0));
                (*before, *end) = ((*before).max(issued_before), (*end).max(until));
            }
            let expected = [(0, 2), (1, 1), (2, 0), (3, 0), (4, 0)].iter().filter_map(|key| widest.get(key))
                .any(|&(before, until)| issued_at < before && now < until);
            prop_assert_eq!(revocations.is_revoked(&who, now), expected);
            revocations.forget_expired(now);
            prop_assert_eq!(revocations.is_revoked(&who, now), expected);
        }
    }
}
