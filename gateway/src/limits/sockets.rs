//! How many WebSockets of a session, a subject or an address are open, over all cores.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use sealgate_policy::{AtLimit, MaxOpen};

use super::AddressKey;
use crate::lock::lock;

/// Counts of open sockets, shared by all cores and older than any snapshot.
///
/// A socket is counted before it is judged, and one at a time: two that open at once cannot both slip under a limit.
/// One lock for all, because an opening costs a hundred times what is done under it. There are as many entries as sockets
/// of rules with a limit.
pub struct SocketLimits {
    hashers: [RandomState; 2],
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    next: u64,
    groups: HashMap<u128, Group>,
    sockets: HashMap<u64, Socket>,
}

/// The sockets that count together.
#[derive(Default)]
struct Group {
    /// The open ones; ids grow, so the first is the oldest.
    open: BTreeSet<u64>,
    /// Those that are being opened.
    opening: u32,
}

struct Socket {
    core: usize,
    is_open: bool,
    limits: MaxOpen,
    groups: Groups,
}

#[derive(Clone, Copy)]
struct Groups {
    session: Option<u128>,
    subject: Option<u128>,
    address: Option<u128>,
}

/// Whose socket it is, and where.
#[derive(Debug, Clone, Copy)]
pub struct SocketFacts<'a> {
    /// Name of the rule: each counts apart.
    pub rule: &'a str,
    /// Issuer and subject, where the socket is somebody's.
    pub subject: Option<(&'a str, &'a str)>,
    /// The session; a subject without sessions has only one.
    pub session: Option<&'a str>,
    /// The client's address.
    pub address: IpAddr,
    /// Index of the core that holds the socket.
    pub core: usize,
}

/// As many sockets are open as the rule allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many sockets are open")]
pub struct TooManySockets;

/// While the socket was opened, newer ones took all places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("newer sockets took its place")]
pub struct Replaced;

/// A socket that has to make room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Displaced {
    /// Index of its core.
    pub core: usize,
    /// As [`SocketGuard::id`].
    pub id: u64,
}

/// One counted socket; uncounted on drop.
#[must_use = "the socket is uncounted when this is dropped"]
pub struct SocketGuard {
    limits: Arc<SocketLimits>,
    id: u64,
}

impl SocketLimits {
    /// Nothing is open. Made once per process.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self { hashers: [RandomState::new(), RandomState::new()], counts: Mutex::default() })
    }

    /// Counts a socket that is about to be opened.
    ///
    /// # Errors
    /// [`TooManySockets`], where a limit rejects. One that replaces lets the socket come, until [`SocketGuard::settle`].
    pub fn open(
        self: &Arc<Self>,
        limits: &MaxOpen,
        facts: &SocketFacts<'_>,
    ) -> Result<SocketGuard, TooManySockets> {
        let groups = self.groups(limits, facts);
        let mut counts = self.lock();
        let is_full = |group: Option<u128>, limit: Option<u32>| {
            let group = group.and_then(|key| counts.groups.get(&key));
            group.zip(limit).is_some_and(|(group, limit)| group.len() >= limit as usize)
        };
        let rejects = limits.at_limit == AtLimit::Reject;
        if is_full(groups.address, limits.address)
            || rejects && is_full(groups.session, limits.session)
            || rejects && is_full(groups.subject, limits.subject)
        {
            return Err(TooManySockets);
        }
        let id = counts.next;
        counts.next += 1;
        for key in groups.each() {
            counts.groups.entry(key).or_default().opening += 1;
        }
        counts.sockets.insert(id, Socket { core: facts.core, is_open: false, limits: *limits, groups });
        Ok(SocketGuard { limits: Arc::clone(self), id })
    }

    /// Whether the socket still has its place: it was not displaced.
    #[must_use]
    pub fn holds(&self, id: u64) -> bool {
        self.lock().sockets.contains_key(&id)
    }

    fn groups(&self, limits: &MaxOpen, facts: &SocketFacts<'_>) -> Groups {
        let SocketFacts { rule, subject, session, address, .. } = *facts;
        let of_session = limits.session.and(subject);
        Groups {
            session: of_session.map(|subject| self.key(&(0u8, rule, subject, session))),
            subject: limits.subject.and(subject).map(|subject| self.key(&(1u8, rule, subject))),
            address: limits.address.map(|_| self.key(&(2u8, rule, AddressKey::from(address)))),
        }
    }

    /// 128 bits of a keyed hash: nobody makes two names meet.
    fn key(&self, name: &impl Hash) -> u128 {
        let [low, high] = &self.hashers;
        let half = |hasher: &RandomState| u128::from(hasher.hash_one(name));
        (half(high) << 64) | half(low)
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        lock(&self.counts)
    }
}

impl Group {
    fn len(&self) -> usize {
        self.open.len() + self.opening as usize
    }
}

impl Groups {
    fn each(self) -> impl Iterator<Item = u128> {
        [self.session, self.subject, self.address].into_iter().flatten()
    }
}

impl Counts {
    fn leave(&mut self, id: u64) -> Option<Socket> {
        let socket = self.sockets.remove(&id)?;
        for key in socket.groups.each() {
            let Some(group) = self.groups.get_mut(&key) else { continue };
            match socket.is_open {
                true => drop(group.open.remove(&id)),
                false => group.opening = group.opening.saturating_sub(1),
            }
            if group.len() == 0 {
                self.groups.remove(&key);
            }
        }
        Some(socket)
    }
}

impl SocketGuard {
    /// Names the socket; grows with every socket of the process.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Says that the socket is open now. Gives those whose places it takes: they are uncounted already, and must be closed.
    ///
    /// # Errors
    /// [`Replaced`]: newer ones were faster, and this one must not be opened.
    pub fn settle(&self) -> Result<Vec<Displaced>, Replaced> {
        let mut counts = self.limits.lock();
        let counts = &mut *counts;
        let Some(socket) = counts.sockets.get_mut(&self.id) else { return Err(Replaced) };
        let (limits, groups) = (socket.limits, socket.groups);
        let replaces = limits.at_limit == AtLimit::ReplaceOldest;
        let limited = [(groups.session, limits.session), (groups.subject, limits.subject)]
            .into_iter()
            .filter_map(|(group, limit)| Some((group?, limit? as usize)));
        // Before anybody is displaced: whether all places are taken by newer ones.
        let is_late = |(key, limit): (u128, usize)| {
            let newer = counts.groups.get(&key).into_iter().flat_map(|group| group.open.range(self.id..));
            newer.take(limit).count() == limit
        };
        if replaces && limited.clone().any(is_late) {
            counts.leave(self.id);
            return Err(Replaced);
        }
        socket.is_open = true;
        for key in groups.each() {
            if let Some(group) = counts.groups.get_mut(&key) {
                group.opening = group.opening.saturating_sub(1);
                group.open.insert(self.id);
            }
        }
        let mut displaced = Vec::new();
        for (key, limit) in limited.filter(|_| replaces) {
            let oldest = |counts: &Counts| {
                let open = &counts.groups.get(&key)?.open;
                (open.len() > limit).then(|| open.first().copied())?
            };
            while let Some(id) = oldest(counts) {
                let socket = counts.leave(id);
                displaced.extend(socket.map(|socket| Displaced { core: socket.core, id }));
            }
        }
        Ok(displaced)
    }
}

impl Drop for SocketGuard {
    fn drop(&mut self) {
        self.limits.lock().leave(self.id);
    }
}

impl fmt::Debug for SocketLimits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketLimits").field("sockets", &self.lock().sockets.len()).finish_non_exhaustive()
    }
}

impl fmt::Debug for SocketGuard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SocketGuard").field("id", &self.id).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::Ipv4Addr;

    fn limits(session: u32, subject: u32, address: u32, at_limit: AtLimit) -> MaxOpen {
        let some = |limit| (limit > 0).then_some(limit);
        MaxOpen { session: some(session), subject: some(subject), address: some(address), at_limit }
    }

    fn of<'a>(subject: &'a str, session: &'a str, address: u8) -> SocketFacts<'a> {
        SocketFacts {
            rule: "chat",
            subject: Some(("https://id.example", subject)),
            session: Some(session),
            address: IpAddr::V4(Ipv4Addr::new(192, 0, 2, address)),
            core: usize::from(address),
        }
    }

    fn is_empty(limits: &SocketLimits) -> bool {
        let counts = limits.lock();
        counts.sockets.is_empty() && counts.groups.is_empty()
    }

    #[test]
    fn a_limit_rejects_until_a_place_is_free() {
        let all = SocketLimits::new();
        let two_each = limits(2, 3, 0, AtLimit::Reject);
        let first = all.open(&two_each, &of("alice", "s1", 1)).unwrap();
        let second = all.open(&two_each, &of("alice", "s1", 2)).unwrap();
        // One that is still being opened counts as well.
        assert_eq!(first.settle(), Ok(vec![]));
        assert_eq!(all.open(&two_each, &of("alice", "s1", 3)).unwrap_err(), TooManySockets);
        let third = all.open(&two_each, &of("alice", "s2", 3)).unwrap();
        assert_eq!(all.open(&two_each, &of("alice", "s3", 3)).unwrap_err(), TooManySockets);
        // Others are not concerned: another subject, another rule.
        let other = all.open(&two_each, &of("bob", "s1", 1)).unwrap();
        let elsewhere = all.open(&two_each, &SocketFacts { rule: "files", ..of("alice", "s1", 1) }).unwrap();
        drop(first);
        let again = all.open(&two_each, &of("alice", "s1", 1)).unwrap();
        drop((second, third, other, elsewhere, again));
        assert!(is_empty(&all));
    }

    #[test]
    fn an_address_is_rejected_whatever_the_rule_says_of_its_own() {
        let all = SocketLimits::new();
        let rule = limits(9, 0, 1, AtLimit::ReplaceOldest);
        let one = all.open(&rule, &of("alice", "s1", 1)).unwrap();
        assert_eq!(one.settle(), Ok(vec![]));
        assert_eq!(all.open(&rule, &of("bob", "s2", 1)).unwrap_err(), TooManySockets);
        let nobody = SocketFacts { subject: None, session: None, ..of("", "", 2) };
        let two = all.open(&rule, &nobody).unwrap();
        assert!(all.open(&rule, &nobody).is_err());
        drop((one, two));
        assert!(is_empty(&all));
    }

    #[test]
    fn the_oldest_makes_room_when_the_new_one_is_open_and_not_before() {
        let all = SocketLimits::new();
        let one = limits(1, 0, 0, AtLimit::ReplaceOldest);
        let oldest = all.open(&one, &of("alice", "s1", 1)).unwrap();
        assert_eq!(oldest.settle(), Ok(vec![]));
        // It does not come to be: nobody had to go.
        drop(all.open(&one, &of("alice", "s1", 2)).unwrap());
        assert!(all.holds(oldest.id()));
        let slow = all.open(&one, &of("alice", "s1", 3)).unwrap();
        let fast = all.open(&one, &of("alice", "s1", 4)).unwrap();
        assert_eq!(fast.settle(), Ok(vec![Displaced { core: 1, id: oldest.id() }]));
        assert!(!all.holds(oldest.id()) && all.holds(fast.id()));
        assert_eq!(slow.settle(), Err(Replaced));
        assert!(all.holds(fast.id()));
        drop((oldest, slow, fast));
        assert!(is_empty(&all));
    }

    #[test]
    fn one_socket_makes_room_for_session_and_subject() {
        let all = SocketLimits::new();
        let rule = limits(1, 2, 0, AtLimit::ReplaceOldest);
        let sockets: Vec<_> = [("s1", 1), ("s2", 2)]
            .map(|(session, core)| all.open(&rule, &of("alice", session, core)).unwrap())
            .into();
        assert!(sockets.iter().all(|socket| socket.settle() == Ok(vec![])));
        let next = all.open(&rule, &of("alice", "s2", 3)).unwrap();
        // The session's oldest went; so the subject's need not.
        assert_eq!(next.settle(), Ok(vec![Displaced { core: 2, id: sockets[1].id() }]));
        assert!(all.holds(sockets[0].id()));
    }

    #[test]
    fn a_socket_that_comes_too_late_displaces_nobody() {
        let all = SocketLimits::new();
        let rule = limits(1, 2, 0, AtLimit::ReplaceOldest);
        let open = |session| all.open(&rule, &of("alice", session, 1)).unwrap();
        let old = open("s1");
        assert_eq!(old.settle(), Ok(vec![]));
        let late = open("s1");
        let (one, two) = (open("s2"), open("s3"));
        assert_eq!(one.settle(), Ok(vec![]));
        // The third of the subject: its oldest goes.
        assert_eq!(two.settle(), Ok(vec![Displaced { core: 1, id: old.id() }]));
        assert_eq!(late.settle(), Err(Replaced));
        assert!(all.holds(one.id()) && all.holds(two.id()));
    }

    #[test]
    fn threads_that_open_at_once_do_not_slip_through() {
        let all = SocketLimits::new();
        let five = limits(5, 0, 0, AtLimit::Reject);
        let opened: Vec<_> = std::thread::scope(|scope| {
            let thread = || {
                let mut mine: Vec<_> = (0..20).map(|_| all.open(&five, &of("alice", "s1", 1))).collect();
                mine.retain(Result::is_ok);
                mine
            };
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(thread)).collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(opened.len(), 5);
        drop(opened);
        assert!(is_empty(&all));
    }

    proptest! {
        #[test]
        fn limits_hold_and_nothing_is_left(
            steps in prop::collection::vec((0u8..4, 0u8..2, 0u8..3, any::<prop::sample::Index>()), 0..60),
            (session, subject, address, replace) in (0u32..3, 0u32..4, 0u32..5, any::<bool>()),
        ) {
            let all = SocketLimits::new();
            let at_limit = if replace { AtLimit::ReplaceOldest } else { AtLimit::Reject };
            let rule = limits(session, subject, address, at_limit);
            let mut guards: Vec<(SocketGuard, u8, u8, bool)> = Vec::new();
            for (action, who, which, index) in steps {
                match action {
                    0 | 1 => {
                        let (subject, session) = (who.to_string(), which.to_string());
                        if let Ok(guard) = all.open(&rule, &of(&subject, &session, which)) {
                            guards.push((guard, who, which, false));
                        }
                    }
                    2 if !guards.is_empty() => {
                        let place = index.index(guards.len());
                        let outcome = (!guards[place].3).then(|| guards[place].0.settle());
                        guards[place].3 = true;
                        for Displaced { id, .. } in outcome.into_iter().flat_map(Result::unwrap_or_default) {
                            prop_assert!(!all.holds(id));
                        }
                    }
                    3 if !guards.is_empty() => drop(guards.swap_remove(index.index(guards.len()))),
                    _ => {}
                }
                let open: Vec<_> =
                    guards.iter().filter(|guard| guard.3 && all.holds(guard.0.id())).collect();
                for (_, who, which, _) in &open {
                    let of_session = open.iter().filter(|it| (it.1, it.2) == (*who, *which)).count();
                    let of_subject = open.iter().filter(|it| it.1 == *who).count();
                    let of_address = open.iter().filter(|it| it.2 == *which).count();
                    prop_assert!(session == 0 || of_session <= session as usize);
                    prop_assert!(subject == 0 || of_subject <= subject as usize);
                    prop_assert!(address == 0 || of_address <= address as usize);
                }
            }
            drop(guards);
            prop_assert!(is_empty(&all));
        }
    }
}
