//! The live sockets of one core, by whom they belong to.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::rc::Rc;
use std::sync::Arc;

use sealgate_policy::{Identity, SessionId};

use super::revocation::Target;

/// A core's open sockets, each with what reaches it (`S`: a sender of orders to its relay).
///
/// Finding the sockets of a session, subject or token costs the logarithm of how many there are, and so do coming and
/// going, however many sockets one subject holds. Cloning gives another handle on the same registry.
pub struct Registry<S> {
    inner: Rc<RefCell<Inner<S>>>,
}

struct Inner<S> {
    capacity: usize,
    hasher: RandomState,
    places: Vec<Option<Socket<S>>>,
    free: Vec<u32>,
    /// (hash of a session, subject, token id, issuer or key; place).
    index: BTreeSet<(u64, u32)>,
    open: usize,
}

struct Socket<S> {
    identity: Option<Arc<Identity>>,
    sender: S,
}

/// The registry holds as many sockets as it may; the new one is to be refused (1013).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room for another socket")]
pub struct RegistryFull;

impl<S> Registry<S> {
    /// An empty registry for at most `capacity` sockets.
    pub fn new(capacity: u32) -> Self {
        let inner = Inner {
            capacity: capacity as usize,
            hasher: RandomState::new(),
            places: Vec::new(),
            free: Vec::new(),
            index: BTreeSet::new(),
            open: 0,
        };
        Registry { inner: Rc::new(RefCell::new(inner)) }
    }

    /// Enters a socket until the registration is dropped. Enter first, check revocation second, answer 101 third;
    /// then no revocation falls between.
    ///
    /// # Errors
    /// [`RegistryFull`].
    pub fn register(
        &self,
        identity: Option<Arc<Identity>>,
        sender: S,
    ) -> Result<Registration<S>, RegistryFull> {
        let place = self.inner.borrow_mut().enter(identity, sender)?;
        Ok(Registration { registry: self.clone(), place })
    }

    /// Shows each socket that the target means to `each`.
    ///
    /// `each` only sends: it must not register, nor drop a registration.
    pub fn for_each(&self, target: &Target<'_>, mut each: impl FnMut(&S, &Identity)) {
        let inner = self.inner.borrow();
        let key = inner.key(target);
        let places = inner.index.range((key, 0)..=(key, u32::MAX)).map(|&(_, place)| place);
        let sockets = places.filter_map(|place| inner.places.get(place as usize)?.as_ref());
        for Socket { identity, sender } in sockets {
            // Hashes may meet; identities do not.
            if let Some(identity) = identity.as_deref().filter(|identity| target.means(identity)) {
                each(sender, identity);
            }
        }
    }

    /// Shows each socket of a session to `each`, which only sends.
    pub fn for_each_of(&self, session: SessionId, mut each: impl FnMut(&S)) {
        let inner = self.inner.borrow();
        let key = inner.session_key(session);
        let places = inner.index.range((key, 0)..=(key, u32::MAX)).map(|&(_, place)| place);
        let sockets = places.filter_map(|place| inner.places.get(place as usize)?.as_ref());
        for Socket { identity, sender } in sockets {
            if identity.as_deref().is_some_and(|identity| identity.session_id == session) {
                each(sender);
            }
        }
    }

    /// Shows a slice of all sockets to `each`: the occupied ones of `places` places from `from` on. Gives where to go
    /// on; nothing at the end. Judging thousands of sockets anew goes slice by slice, so that no message waits behind
    /// it; a socket that comes between slices was judged by the new policy already.
    pub fn slice(
        &self,
        from: u32,
        places: u32,
        mut each: impl FnMut(&S, Option<&Arc<Identity>>),
    ) -> Option<u32> {
        let inner = self.inner.borrow();
        let slice = inner.places.iter().skip(from as usize).take(places as usize);
        slice.flatten().for_each(|socket| each(&socket.sender, socket.identity.as_ref()));
        let next = from.saturating_add(places.max(1));
        ((next as usize) < inner.places.len()).then_some(next)
    }

    /// Sockets that are open.
    pub fn len(&self) -> usize {
        self.inner.borrow().open
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<S> Inner<S> {
    fn enter(&mut self, identity: Option<Arc<Identity>>, sender: S) -> Result<u32, RegistryFull> {
        if self.open >= self.capacity {
            return Err(RegistryFull);
        }
        let place = match self.free.pop() {
            Some(place) => place,
            None => {
                self.places.push(None);
                u32::try_from(self.places.len() - 1).map_err(|_| RegistryFull)?
            }
        };
        for key in self.keys(identity.as_deref()).into_iter().flatten() {
            self.index.insert((key, place));
        }
        if let Some(empty) = self.places.get_mut(place as usize) {
            *empty = Some(Socket { identity, sender });
        }
        self.open += 1;
        Ok(place)
    }

    fn identify(&mut self, place: u32, identity: Arc<Identity>) {
        let keys = self.keys(Some(&identity));
        let socket = self.places.get_mut(place as usize).and_then(Option::as_mut);
        let Some(old) = socket.map(|socket| socket.identity.replace(identity)) else { return };
        for key in self.keys(old.as_deref()).into_iter().flatten() {
            self.index.remove(&(key, place));
        }
        for key in keys.into_iter().flatten() {
            self.index.insert((key, place));
        }
    }

    fn leave(&mut self, place: u32) -> Option<Socket<S>> {
        let socket = self.places.get_mut(place as usize)?.take()?;
        for key in self.keys(socket.identity.as_deref()).into_iter().flatten() {
            self.index.remove(&(key, place));
        }
        self.free.push(place);
        self.open -= 1;
        Some(socket)
    }

    fn keys(&self, identity: Option<&Identity>) -> [Option<u64>; 6] {
        identity.map_or([None; 6], |identity| {
            let [first, second, third, fourth, fifth] =
                Target::all_of(identity).map(|it| it.map(|target| self.key(&target)));
            [first, second, third, fourth, fifth, Some(self.session_key(identity.session_id))]
        })
    }

    fn session_key(&self, session: SessionId) -> u64 {
        self.hasher.hash_one(session)
    }

    fn key(&self, target: &Target<'_>) -> u64 {
        struct Key<'a>(&'a Target<'a>);
        impl Hash for Key<'_> {
            fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
                self.0.hash_name(state);
            }
        }
        self.hasher.hash_one(Key(target))
    }
}

impl<S> Clone for Registry<S> {
    fn clone(&self) -> Self {
        Registry { inner: Rc::clone(&self.inner) }
    }
}

impl<S> fmt::Debug for Registry<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("open", &self.len()).finish_non_exhaustive()
    }
}

/// One socket's entry; it leaves the registry when this is dropped.
#[must_use = "the socket leaves the registry when this is dropped"]
pub struct Registration<S> {
    registry: Registry<S>,
    place: u32,
}

impl<S> Registration<S> {
    /// Shows the socket, and whose it is. `show` only looks or sends: it must not touch the registry.
    pub fn with<T>(&self, show: impl FnOnce(&S, Option<&Arc<Identity>>) -> T) -> Option<T> {
        let inner = self.registry.inner.borrow();
        let socket = inner.places.get(self.place as usize)?.as_ref()?;
        Some(show(&socket.sender, socket.identity.as_ref()))
    }

    /// The socket goes on under another identity: it is found by that one from now on. Ask for revocations afterwards.
    pub fn identify(&self, identity: Arc<Identity>) {
        self.registry.inner.borrow_mut().identify(self.place, identity);
    }
}

impl<S> Drop for Registration<S> {
    fn drop(&mut self) {
        let socket = self.registry.inner.borrow_mut().leave(self.place);
        // The sender goes after the borrow has ended: what it does when dropped is not ours.
        drop(socket);
    }
}

impl<S> fmt::Debug for Registration<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration").field("place", &self.place).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sealgate_policy::IdentityParts;

    fn identity(subject: &str, session: Option<&str>, token: Option<&str>) -> Option<Arc<Identity>> {
        Some(Arc::new(Identity::new(IdentityParts {
            issuer: "https://id.example".into(),
            subject: subject.to_owned(),
            session: session.map(str::to_owned),
            token_id: token.map(str::to_owned),
            ..IdentityParts::default()
        })))
    }

    fn reached(registry: &Registry<u32>, target: Target<'_>) -> Vec<u32> {
        let mut reached = Vec::new();
        registry.for_each(&target, |sender, identity| {
            assert!(target.means(identity));
            reached.push(*sender);
        });
        reached.sort_unstable();
        reached
    }

    const ISSUER: &str = "https://id.example";

    #[test]
    fn finds_sockets_by_session_subject_and_token() {
        let registry = Registry::new(10);
        let first = registry.register(identity("alice", Some("s1"), Some("t1")), 1).unwrap();
        let _second = registry.register(identity("alice", Some("s2"), Some("t2")), 2).unwrap();
        let _third = registry.register(identity("bob", Some("s3"), None), 3).unwrap();
        let _nobody = registry.register(None, 4).unwrap();
        let by_subject = || Target::Subject { issuer: ISSUER, subject: "alice" };
        assert_eq!(reached(&registry, by_subject()), [1, 2]);
        assert_eq!(reached(&registry, Target::Session { issuer: ISSUER, session: "s2" }), [2]);
        assert_eq!(reached(&registry, Target::Token { issuer: ISSUER, token_id: "t1" }), [1]);
        assert_eq!(reached(&registry, Target::Token { issuer: ISSUER, token_id: "s1" }), [0u32; 0]);
        assert_eq!(
            reached(&registry, Target::Subject { issuer: "https://other.example", subject: "alice" }),
            [0u32; 0]
        );
        assert_eq!(reached(&registry, Target::Issuer { issuer: ISSUER }), [1, 2, 3]);
        drop(first);
        assert_eq!(reached(&registry, by_subject()), [2]);
        assert_eq!(registry.len(), 3);
    }

    #[test]
    fn finds_the_sockets_of_a_session_with_or_without_an_id() {
        let registry = Registry::new(10);
        let who = [identity("alice", Some("s1"), Some("t1")), identity("alice", None, Some("t2"))];
        let _first = registry.register(who[0].clone(), 1).unwrap();
        let _second = registry.register(who[1].clone(), 2).unwrap();
        let third = registry.register(who[0].clone(), 3).unwrap();
        let of = |who: &Option<Arc<Identity>>| {
            let mut reached = Vec::new();
            registry.for_each_of(who.as_ref().unwrap().session_id, |sender| reached.push(*sender));
            reached
        };
        assert_eq!((of(&who[0]), of(&who[1])), (vec![1, 3], vec![2]));
        drop(third);
        assert_eq!(of(&who[0]), [1]);
    }

    #[test]
    fn a_socket_is_found_by_its_newest_identity_only() {
        let registry = Registry::new(10);
        let socket = registry.register(identity("alice", Some("s1"), Some("t1")), 1).unwrap();
        let _other = registry.register(identity("alice", Some("s1"), Some("t1")), 2).unwrap();
        socket.identify(identity("alice", Some("s1"), Some("t2")).unwrap());
        let token = |token_id| Target::Token { issuer: ISSUER, token_id };
        assert_eq!(reached(&registry, token("t1")), [2]);
        assert_eq!(reached(&registry, token("t2")), [1]);
        assert_eq!(reached(&registry, Target::Session { issuer: ISSUER, session: "s1" }), [1, 2]);
        let id = socket.with(|_, identity| identity.and_then(|it| it.token_id.clone())).flatten();
        assert_eq!(id.as_deref(), Some("t2"));
        drop(socket);
        assert_eq!(reached(&registry, token("t2")), [0u32; 0]);
    }

    #[test]
    fn is_bounded_and_reuses_places() {
        let registry = Registry::new(2);
        let first = registry.register(None, 1).unwrap();
        let _second = registry.register(None, 2).unwrap();
        assert_eq!(registry.register(None, 3).unwrap_err(), RegistryFull);
        drop(first);
        let _third = registry.register(None, 3).unwrap();
        assert_eq!(registry.len(), 2);
        assert_eq!(registry.inner.borrow().places.len(), 2);
    }

    #[test]
    fn slices_cover_every_socket_once() {
        let registry = Registry::new(100);
        let mut guards: Vec<_> = (0..25).map(|number| registry.register(None, number).unwrap()).collect();
        drop(guards.remove(7));
        let (mut seen, mut from) = (Vec::new(), Some(0));
        while let Some(place) = from {
            from = registry.slice(place, 10, |sender, _| seen.push(*sender));
        }
        assert_eq!(seen, (0..25).filter(|number| *number != 7).collect::<Vec<_>>());
    }

    proptest! {
        #[test]
        fn agrees_with_a_list(steps in prop::collection::vec((0u8..4, 0u8..4, 0u8..4, any::<prop::sample::Index>()), 0..100)) {
            let registry = Registry::new(1000);
            let mut list = Vec::new();
            for (number, (action, subject, session, which)) in steps.into_iter().enumerate() {
                if action == 0 && !list.is_empty() {
                    drop(list.swap_remove(which.index(list.len())));
                } else {
                    let (subject, session) = (subject.to_string(), session.to_string());
                    let who = identity(&subject, Some(&session), None);
                    list.push((registry.register(who, number as u32).unwrap(), subject, session, number as u32));
                }
                for name in ["0", "1", "2", "3"] {
                    let mut expected: Vec<u32> =
                        list.iter().filter(|entry| entry.1 == name).map(|entry| entry.3).collect();
                    expected.sort_unstable();
                    prop_assert_eq!(reached(&registry, Target::Subject { issuer: ISSUER, subject: name }), expected);
                    let mut expected: Vec<u32> =
                        list.iter().filter(|entry| entry.2 == name).map(|entry| entry.3).collect();
                    expected.sort_unstable();
                    prop_assert_eq!(reached(&registry, Target::Session { issuer: ISSUER, session: name }), expected);
                }
            }
            drop(list);
            prop_assert!(registry.is_empty() && registry.inner.borrow().index.is_empty());
        }
    }
}
