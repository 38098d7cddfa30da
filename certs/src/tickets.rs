//! Stateless session tickets, for TLS 1.3 alone.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::pki_types::UnixTime;
use rustls::server::ProducesTickets;
use rustls::time_provider::{DefaultTimeProvider, TimeProvider};

use crate::aead::{AeadKey, KEY_LEN};
use crate::random::{self, CryptoError};

/// How long a key seals before the next one takes over, unless [`TicketKeys::set_period`] says otherwise.
const PERIOD: Duration = Duration::from_secs(6 * 60 * 60);

/// Longest ticket lifetime that TLS 1.3 allows (RFC 8446 §4.6.1).
const MAX_LIFETIME: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Bytes in front of a ticket that name its key (RFC 5077 §4). Random, so they tell nothing.
const NAME_LEN: usize = 16;

/// Tickets that one key may seal: the bound for random nonces (NIST SP 800-38D §8.3).
const MAX_TICKETS_PER_KEY: u64 = 1 << 32;

/// The keys that seal session tickets, and the rule that TLS 1.2 gets none.
///
/// A TLS 1.3 ticket holds a secret that is good for resuming only, together with a fresh key exchange (RFC 8446
/// §2.2), so whoever steals a ticket key opens no recorded traffic. A TLS 1.2 ticket holds the session's master
/// secret: one stolen key would open every recorded connection. rustls has one ticketer for both, hence the check in
/// [`ProducesTickets::encrypt`], which sees what it is about to seal. A TLS 1.2 client gets an empty ticket,
/// which tells it that there is nothing to resume (RFC 5077 §3.3).
///
/// Keys rotate by the clock: the current one seals, it and its predecessor open. A ticket lives for one rotation
/// period, by the time of issue sealed inside it, so its key is of no use after two and is erased then, by the next
/// handshake or by [`rotate`](Self::rotate). Keys are made here, never stored, and start anew with the process.
pub struct TicketKeys {
    /// Seconds.
    period: AtomicU64,
    clock: Arc<dyn TimeProvider>,
    keys: RwLock<Keys>,
}

#[derive(Clone)]
struct Keys {
    current: Arc<TicketKey>,
    previous: Option<Arc<TicketKey>>,
}

struct TicketKey {
    name: [u8; NAME_LEN],
    key: AeadKey,
    /// When it began to seal.
    since: UnixTime,
    sealed: AtomicU64,
}

impl TicketKeys {
    /// Keys that rotate every 6 hours by the system's clock.
    pub fn new() -> Result<Arc<Self>, CryptoError> {
        Self::with_clock(PERIOD, Arc::new(DefaultTimeProvider))
    }

    /// Keys that rotate every `period`, 1 second to 7 days (clamped), by `clock`.
    pub fn with_clock(period: Duration, clock: Arc<dyn TimeProvider>) -> Result<Arc<Self>, CryptoError> {
        let now = clock.current_time().ok_or(CryptoError)?;
        let first = TicketKey::generate(now)?;
        let keys = Self {
            period: AtomicU64::new(0),
            clock,
            keys: RwLock::new(Keys { current: Arc::new(first), previous: None }),
        };
        keys.set_period(period);
        Ok(Arc::new(keys))
    }

    /// Has keys rotate every `period`, 1 second to 7 days (clamped), and tickets live as long, from now on: those that are older than a
    /// shorter one do not open any more.
    pub fn set_period(&self, period: Duration) {
        let period = period.clamp(Duration::from_secs(1), MAX_LIFETIME);
        self.period.store(period.as_secs(), Ordering::Relaxed);
    }

    fn period(&self) -> Duration {
        Duration::from_secs(self.period.load(Ordering::Relaxed))
    }

    /// Does what is due: makes the next key, erases the one that opens nothing any more.
    ///
    /// Every handshake does so too. A timer that calls this bounds how long keys stay in memory when there are none.
    ///
    /// # Errors
    /// No new key could be made. No tickets are issued then; handshakes go on.
    pub fn rotate(&self) -> Result<(), CryptoError> {
        let now = self.clock.current_time().ok_or(CryptoError)?;
        self.keys_at(now).map(drop)
    }

    fn keys_at(&self, now: UnixTime) -> Result<Keys, CryptoError> {
        let period = self.period();
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner).clone();
        if !keys.current.is_spent(now, period) && !keys.has_useless(now, period) {
            return Ok(keys);
        }
        drop(keys);
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        // Another core may have been quicker.
        if keys.current.is_spent(now, period) {
            let next = Arc::new(TicketKey::generate(now)?);
            keys.previous = Some(std::mem::replace(&mut keys.current, next));
        }
        if keys.has_useless(now, period) {
            keys.previous = None;
        }
        Ok(keys.clone())
    }
}

/// Ticket keys for one TLS setting: tickets sealed for another do not open.
struct BoundTickets {
    keys: Arc<TicketKeys>,
    setting: [u8; 32],
}

impl ProducesTickets for BoundTickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        self.keys.lifetime()
    }

    fn encrypt(&self, state: &[u8]) -> Option<Vec<u8>> {
        self.keys.encrypt(&self.setting, state)
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        self.keys.decrypt(&self.setting, ticket)
    }
}

impl fmt::Debug for BoundTickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BoundTickets(..)")
    }
}

impl TicketKeys {
    /// What seals and opens tickets for one TLS setting, named by `setting`: that of client certificates, so that no
    /// resumption skips a change of it.
    pub(crate) fn bound_to(self: Arc<Self>, setting: [u8; 32]) -> Arc<dyn ProducesTickets> {
        Arc::new(BoundTickets { keys: self, setting })
    }

    /// Seconds that clients may keep a ticket: one rotation period.
    fn lifetime(&self) -> u32 {
        u32::try_from(self.period().as_secs()).unwrap_or(u32::MAX)
    }

    /// The ticket for a session's state, unless it is one of TLS 1.2.
    fn encrypt(&self, setting: &[u8; 32], state: &[u8]) -> Option<Vec<u8>> {
        if !is_tls13(state) {
            return None;
        }
        let now = self.clock.current_time()?;
        let key = self.keys_at(now).ok()?.current;
        if key.sealed.fetch_add(1, Ordering::Relaxed) >= MAX_TICKETS_PER_KEY {
            return None; // the next key will be due within the period
        }
        let sealed =
            key.key.seal(&associated(&key.name, setting), &[&now.as_secs().to_be_bytes(), state]).ok()?;
        Some([key.name.as_slice(), &sealed].concat())
    }

    /// The state in a ticket that we issued within the last period; `None` leads to a full handshake.
    fn decrypt(&self, setting: &[u8; 32], ticket: &[u8]) -> Option<Vec<u8>> {
        let now = self.clock.current_time()?;
        let (name, sealed) = ticket.split_first_chunk::<NAME_LEN>()?;
        let Keys { current, previous } = self.keys_at(now).ok()?;
        // Names are public, so an ordinary comparison serves.
        let key = [Some(current), previous].into_iter().flatten().find(|key| key.name == *name)?;
        let opened = key.key.open(&associated(name, setting), sealed)?;
        let (issued, state) = opened.split_first_chunk()?;
        // From the future too: a clock that was set back must not make tickets live longer.
        let age = now.as_secs().checked_sub(u64::from_be_bytes(*issued))?;
        (age <= self.period().as_secs() && is_tls13(state)).then(|| state.to_vec())
    }
}

impl fmt::Debug for TicketKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketKeys(..)")
    }
}

impl Keys {
    /// Whether the previous key is past the lifetime of the last ticket it can have sealed.
    fn has_useless(&self, now: UnixTime, period: Duration) -> bool {
        self.previous.as_ref().is_some_and(|previous| age(previous.since, now) > period * 2)
    }
}

impl TicketKey {
    fn generate(now: UnixTime) -> Result<Self, CryptoError> {
        let name = random::bytes::<NAME_LEN>()?;
        let secret = random::bytes::<KEY_LEN>()?;
        Ok(Self { name: *name, key: AeadKey::new(&secret)?, since: now, sealed: AtomicU64::new(0) })
    }

    fn is_spent(&self, now: UnixTime, period: Duration) -> bool {
        age(self.since, now) >= period
    }
}

/// What a ticket is bound to beside its contents.
fn associated(name: &[u8; NAME_LEN], setting: &[u8; 32]) -> [u8; NAME_LEN + 32] {
    let mut bytes = [0; NAME_LEN + 32];
    let (front, back) = bytes.split_at_mut(NAME_LEN);
    front.copy_from_slice(name);
    back.copy_from_slice(setting);
    bytes
}

/// Time from `since` to `now`; none if the clock went back.
fn age(since: UnixTime, now: UnixTime) -> Duration {
    Duration::from_secs(now.as_secs().saturating_sub(since.as_secs()))
}

/// Whether rustls asks to seal, or would resume, a TLS 1.3 session.
///
/// rustls 0.23 encodes its session state as: 0, or 1 and the SNI with its length in one byte; the protocol version;
/// the cipher suite; the secret; … (`ServerSessionValue` in its `msgs/persist.rs`). That form is rustls's own affair,
/// so only what is surely TLS 1.3 passes, by version and by suite; should the form change, tickets end, and the tests
/// below say so.
fn is_tls13(state: &[u8]) -> bool {
    let after_sni = match state {
        [0, rest @ ..] => Some(rest),
        [1, length, rest @ ..] => rest.get(usize::from(*length)..),
        _ => None,
    };
    // TLS 1.3; TLS_AES_128_GCM_SHA256, TLS_AES_256_GCM_SHA384, TLS_CHACHA20_POLY1305_SHA256.
    matches!(after_sni, Some([0x03, 0x04, 0x13, 0x01..=0x03, ..]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Clock;

    const PERIOD: u64 = 3600;
    const SETTING: &[u8; 32] = &[7; 32];

    /// The beginnings of session states as rustls encodes them.
    const TLS13: &[u8] = b"\x00\x03\x04\x13\x02\x20secret";
    const TLS13_WITH_SNI: &[u8] = b"\x01\x04chat\x03\x04\x13\x01\x20secret";
    const TLS12: &[u8] = b"\x00\x03\x03\xc0\x2b\x20secret";
    const TLS12_WITH_SNI: &[u8] = b"\x01\x04chat\x03\x03\xc0\x2b\x20secret";

    fn keys() -> (Arc<Clock>, Arc<TicketKeys>) {
        let clock = Clock::new();
        let keys = TicketKeys::with_clock(Duration::from_secs(PERIOD), clock.clone()).unwrap();
        (clock, keys)
    }

    fn has_previous(keys: &TicketKeys) -> bool {
        keys.keys.read().unwrap().previous.is_some()
    }

    #[test]
    fn seals_tls_1_3_alone() {
        let (_, keys) = keys();
        for state in [TLS13, TLS13_WITH_SNI] {
            let ticket = keys.encrypt(SETTING, state).unwrap();
            assert!(!ticket.windows(6).any(|window| window == b"secret"));
            assert_eq!(keys.decrypt(SETTING, &ticket).unwrap(), state);
        }
        for state in [TLS12, TLS12_WITH_SNI] {
            assert!(keys.encrypt(SETTING, state).is_none());
        }
    }

    #[test]
    fn what_it_does_not_understand_gets_no_ticket() {
        let (_, keys) = keys();
        // Cut, a third kind of SNI, an SNI that hides the version, TLS 1.3 with a suite of TLS 1.2.
        let unknown: [&[u8]; 6] = [
            b"",
            b"\x00\x03\x04\x13",
            b"\x02\x03\x04\x13\x01",
            b"\x01\xff\x03\x04\x13\x01",
            b"\x01\x04\x03\x04\x13\x01\x03\x03\xc0\x2b",
            b"\x00\x03\x04\xc0\x2b",
        ];
        for state in unknown {
            assert!(keys.encrypt(SETTING, state).is_none(), "{state:x?}");
        }
    }

    #[test]
    fn a_tls_1_2_state_would_not_open_even_if_it_were_sealed() {
        let (clock, keys) = keys();
        let now = clock.current_time().unwrap();
        let key = keys.keys_at(now).unwrap().current;
        let seal = |state| {
            let sealed = key
                .key
                .seal(&associated(&key.name, SETTING), &[&now.as_secs().to_be_bytes(), state])
                .unwrap();
            [key.name.as_slice(), &sealed].concat()
        };
        assert!(keys.decrypt(SETTING, &seal(TLS13)).is_some());
        assert!(keys.decrypt(SETTING, &seal(TLS12)).is_none());
    }

    #[test]
    fn altered_cut_and_foreign_tickets_do_not_open() {
        let (_, keys) = keys();
        let ticket = keys.encrypt(SETTING, TLS13).unwrap();
        for at in 0..ticket.len() {
            let mut altered = ticket.clone();
            altered[at] ^= 1;
            assert!(keys.decrypt(SETTING, &altered).is_none(), "byte {at}");
            assert!(keys.decrypt(SETTING, &ticket[..at]).is_none(), "cut at {at}");
        }
        assert!(TicketKeys::new().unwrap().decrypt(SETTING, &ticket).is_none());
        assert!(keys.decrypt(&[8; 32], &ticket).is_none(), "of another setting");
    }

    #[test]
    fn a_ticket_lives_for_one_period_over_a_rotation() {
        let (clock, keys) = keys();
        clock.advance(PERIOD - 1);
        let ticket = keys.encrypt(SETTING, TLS13).unwrap();
        clock.advance(1);
        let next = keys.encrypt(SETTING, TLS13).unwrap();
        assert_ne!(ticket[..NAME_LEN], next[..NAME_LEN], "rotated");
        clock.advance(PERIOD - 1);
        assert!(keys.decrypt(SETTING, &ticket).is_some(), "{} s old", PERIOD);
        clock.advance(1);
        assert!(keys.decrypt(SETTING, &ticket).is_none(), "{} s old", PERIOD + 1);
        assert!(keys.decrypt(SETTING, &next).is_some());
    }

    #[test]
    fn another_period_holds_at_once() {
        let (clock, keys) = keys();
        let ticket = keys.encrypt(SETTING, TLS13).unwrap();
        clock.advance(100);
        keys.set_period(Duration::from_secs(99));
        assert!(keys.decrypt(SETTING, &ticket).is_none(), "older than tickets may be now");
        assert_eq!(keys.lifetime(), 99);
        let ticket = keys.encrypt(SETTING, TLS13).unwrap();
        keys.set_period(Duration::from_secs(2 * PERIOD));
        clock.advance(PERIOD + 1);
        assert!(keys.decrypt(SETTING, &ticket).is_some());
    }

    #[test]
    fn a_useless_key_is_erased_without_a_handshake() {
        let (clock, keys) = keys();
        clock.advance(PERIOD);
        keys.rotate().unwrap();
        assert!(has_previous(&keys));
        clock.advance(2 * PERIOD + 1);
        keys.rotate().unwrap();
        assert!(!has_previous(&keys), "both were too old");
    }

    #[test]
    fn a_clock_set_back_makes_no_ticket_live_longer() {
        let (clock, keys) = keys();
        clock.advance(100);
        let ticket = keys.encrypt(SETTING, TLS13).unwrap();
        clock.set_back(50);
        assert!(keys.decrypt(SETTING, &ticket).is_none());
        assert!(keys.decrypt(SETTING, &keys.encrypt(SETTING, TLS13).unwrap()).is_some());
        clock.advance(50);
        assert!(keys.decrypt(SETTING, &ticket).is_some());
    }

    #[test]
    fn a_key_seals_no_more_than_its_nonces_allow() {
        let (clock, keys) = keys();
        let current = keys.keys.read().unwrap().current.clone();
        current.sealed.store(MAX_TICKETS_PER_KEY - 1, Ordering::Relaxed);
        assert!(keys.encrypt(SETTING, TLS13).is_some());
        assert!(keys.encrypt(SETTING, TLS13).is_none());
        clock.advance(PERIOD);
        assert!(keys.encrypt(SETTING, TLS13).is_some());
    }

    #[test]
    fn the_lifetime_is_clamped_to_what_tls_allows() {
        let lifetime =
            |seconds| TicketKeys::with_clock(Duration::from_secs(seconds), Clock::new()).unwrap().lifetime();
        assert_eq!(lifetime(0), 1);
        assert_eq!(lifetime(PERIOD), 3600);
        assert_eq!(lifetime(u64::MAX), 604_800);
    }

    #[test]
    fn rotation_from_many_threads_makes_one_key() {
        let (clock, keys) = keys();
        clock.advance(PERIOD);
        let names: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| keys.encrypt(SETTING, TLS13).unwrap()[..NAME_LEN].to_vec()))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(names.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn prints_nothing_k_3() {
        assert_eq!(format!("{:?}", keys().1), "TicketKeys(..)");
    }
}
