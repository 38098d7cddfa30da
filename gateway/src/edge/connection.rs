//! What is known of one downstream connection, and the clock that bounds its silences.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http::Method;
use sealgate_policy::{ConnectionPermit, ConnectionPolicy, Denial};
use tokio::sync::Notify;

use super::clients::Client;
use crate::{http::Origin, limits::ConnectionGuard, lock::lock, reload::Snapshot};

/// What hyper reads in the place of a request that is refused. No client's request is taken for it: only a connection
/// that was condemned answers it, and that answers nothing else.
pub(super) const STAND_IN: &[u8] = b"- * HTTP/1.1\r\n\r\n";

/// The method of [`STAND_IN`].
const STAND_IN_METHOD: &str = "-";

/// A judged connection. Shared by its stream, its requests and its tunnel, all on one core; atomic
/// only because an upgraded stream has to be `Send`.
pub struct Connection {
    /// Who is there.
    pub peer: SocketAddr,
    /// The same, for backends.
    pub origin: Origin,
    /// What the TLS handshake agreed on.
    pub tls: TlsFacts,
    /// Idle, reading a head, or at work.
    pub clock: Clock,
    /// The certificate that the client has shown.
    pub client: Option<Client>,
    /// What the client asked for and where; which decides what certificate it needs.
    asked: Asked,
    /// Generation of the snapshot that last found the client's certificate, or its lack, good.
    checked: AtomicU64,
    /// Fingerprint of the trust that it was good under.
    good_under: Mutex<[u8; 32]>,
    /// Told when the connection has to end, whatever it is doing.
    pub ending: Notify,
    condemned: OnceLock<Denial>,
    refused_upgrade: AtomicBool,
    cut: AtomicBool,
    _permit: ConnectionPermit,
    _counted: ConnectionGuard,
}

/// What a client asked for, and where it came to.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The name it asked for (SNI), lower case; kept only where the policy asks certificates by name.
    pub name: Option<Box<str>>,
    /// The listener's port.
    pub port: u16,
}

/// What the TLS handshake agreed on.
#[derive(Clone, Copy, Debug)]
pub struct TlsFacts {
    /// `TLSv1.2` or `TLSv1.3`.
    pub version: &'static str,
    /// Whether ALPN chose HTTP/2.
    pub http2: bool,
}

impl Connection {
    /// A connection that was permitted, counted, and has finished its handshake.
    #[must_use]
    pub fn new(
        peer: SocketAddr,
        tls: TlsFacts,
        (asked, client): (Asked, Option<Client>),
        snapshot: &Snapshot,
        permit: ConnectionPermit,
        counted: ConnectionGuard,
    ) -> Self {
        let zone = snapshot.tls.of(asked.name.as_deref(), asked.port);
        Self {
            peer,
            origin: Origin::of(peer.ip()),
            tls,
            clock: Clock::new(tls.http2),
            condemned: OnceLock::new(),
            refused_upgrade: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            client,
            checked: AtomicU64::new(snapshot.generation),
            good_under: Mutex::new(zone.map_or([0; 32], |zone| *zone.trust.fingerprint())),
            asked,
            ending: Notify::new(),
            _permit: permit,
            _counted: counted,
        }
    }

    /// What policies are told of the handshake.
    pub fn tls_facts(&self) -> sealgate_policy::TlsFacts {
        sealgate_policy::TlsFacts {
            tls13: self.tls.version == "TLSv1.3",
            client_certificate: self.client.is_some(),
        }
    }

    /// Whether the connection may carry a request for `host` at `now` (unix seconds): its client's certificate, or its lack, is
    /// good under the policy of this moment, and what is asked of clients of `host` was asked of it.
    ///
    /// # Errors
    /// [`Denial::Misdirected`]: on a connection of its own the client will be asked for what is needed (RFC 9110 §15.5.20).
    pub fn admits(&self, snapshot: &Snapshot, host: &str, now: u64) -> Result<(), Denial> {
        if self.client.as_ref().is_some_and(|client| client.certificate.expires_at < now)
            || !self.is_still_good(snapshot)
        {
            self.ending.notify_one();
            return Err(Denial::Misdirected);
        }
        if snapshot.tls.only_one() {
            return Ok(());
        }
        let Asked { name, port } = &self.asked;
        let own = snapshot.tls.of(name.as_deref(), *port).map_err(|_| Denial::Internal)?;
        let needed = snapshot.tls.of(Some(host), *port).map_err(|_| Denial::Internal)?;
        if own.trust.fingerprint() == needed.trust.fingerprint() { Ok(()) } else { Err(Denial::Misdirected) }
    }

    /// Whether the client's certificate, or its lack, is good under this policy. Looked at anew where what is asked has changed.
    pub fn is_still_good(&self, snapshot: &Snapshot) -> bool {
        if self.checked.load(Relaxed) == snapshot.generation {
            return true;
        }
        let Ok(zone) = snapshot.tls.of(self.asked.name.as_deref(), self.asked.port) else { return false };
        let mut good_under = lock(&self.good_under);
        let good = *good_under == *zone.trust.fingerprint()
            || match &self.client {
                Some(client) => client.is_good(zone),
                None => zone.trust.check(&[], std::time::SystemTime::now()).is_ok(),
            };
        if good {
            *good_under = *zone.trust.fingerprint();
            self.checked.store(snapshot.generation, Relaxed);
        }
        good
    }

    /// The client's certificate, and what upstreams are told of it.
    #[must_use]
    pub fn vouched(&self, snapshot: &Snapshot) -> Option<(&Client, sealgate_policy::ForwardCertificate)> {
        let client = self.client.as_ref()?;
        let zone = snapshot.tls.of(self.asked.name.as_deref(), self.asked.port).ok()?;
        Some((client, zone.forward))
    }

    /// SHA-256 thumbprint of the client's certificate (RFC 8705 §3.1).
    #[must_use]
    pub fn thumbprint(&self) -> Option<[u8; 32]> {
        self.client.as_ref().map(|client| client.certificate.thumbprint)
    }

    /// Keeps the connection from being idle: a WebSocket over HTTP/2 goes on after its request was answered.
    #[must_use]
    pub fn busy(self: &Arc<Self>) -> Busy {
        self.clock.request_begins(Instant::now());
        Busy(self.clone())
    }

    /// Ends it: what its client sends is not listened to any more, and `denial` is the last answer. The first one counts.
    pub fn condemn(&self, denial: Denial) {
        let _ = self.condemned.set(denial);
    }

    /// Why it ends.
    #[must_use]
    pub fn condemned(&self) -> Option<&Denial> {
        self.condemned.get()
    }

    /// The refusal to answer a request by, if it stands in the place of one that was refused before it was read.
    #[must_use]
    pub fn stands_in(&self, method: &Method) -> Option<&Denial> {
        if method.as_str() == STAND_IN_METHOD { self.condemned() } else { None }
    }

    /// A request to upgrade was answered, and not by 101: its stream reads requests again.
    pub fn upgrade_refused(&self) {
        self.refused_upgrade.store(true, Relaxed);
    }

    /// Whether that has happened since it was last asked.
    pub(super) fn take_refused_upgrade(&self) -> bool {
        self.refused_upgrade.swap(false, Relaxed)
    }

    /// Its client had its time. What was not sent yet never will be.
    pub(super) fn cut(&self) {
        self.cut.store(true, Relaxed);
    }

    pub(super) fn is_cut(&self) -> bool {
        self.cut.load(Relaxed)
    }
}

/// While it lives, its connection is at work.
pub struct Busy(Arc<Connection>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.clock.request_ended(Instant::now());
    }
}

/// Tells how long a connection has been waiting, and for what.
///
/// hyper's own `header_read_timeout` also runs while a connection idles, so we keep the time: the
/// stream reports what it reads and writes, the service reports requests.
pub struct Clock {
    born: Instant,
    /// Phase in the top two bits, milliseconds since `born` at which it began in the rest.
    state: AtomicU64,
    /// When the connection was last at work, in milliseconds since `born`.
    idle_since: AtomicU64,
    requests: AtomicU32,
    /// Whether a head is being read, also while requests are at work.
    reading: AtomicBool,
    /// Since when the client takes nothing, in milliseconds since `born`; [`NEVER`] if it does.
    stalled: AtomicU64,
}

const IDLE: u64 = 0;
const HEAD: u64 = 1;
const BUSY: u64 = 2;
const PHASE_SHIFT: u32 = 62;
const NEVER: u64 = u64::MAX;

impl Clock {
    /// Over HTTP/2 a client speaks at once (RFC 9113 §3.4); over HTTP/1.1 browsers open connections ahead.
    fn new(speaks_at_once: bool) -> Self {
        let phase = if speaks_at_once { HEAD } else { IDLE };
        Self {
            born: Instant::now(),
            state: AtomicU64::new(phase << PHASE_SHIFT),
            idle_since: AtomicU64::new(0),
            requests: AtomicU32::new(0),
            reading: AtomicBool::new(false),
            stalled: AtomicU64::new(NEVER),
        }
    }

    /// The stream read something, and is amid a head (over HTTP/2 a frame or header block) now, or not.
    pub fn reading(&self, amid: bool) {
        self.reading.store(amid, Relaxed);
        match (self.phase(), amid) {
            (IDLE, true) => self.enter(HEAD, self.now()),
            // What else came does not prolong idleness.
            (HEAD, false) => self.enter(IDLE, self.idle_since.load(Relaxed)),
            _ => {}
        }
    }

    /// The service was handed a request.
    pub fn request_begins(&self, now: Instant) {
        self.requests.fetch_add(1, Relaxed);
        self.enter(BUSY, self.millis(now));
    }

    /// The last byte of a response went out, or the exchange broke.
    pub fn request_ended(&self, now: Instant) {
        if self.requests.fetch_sub(1, Relaxed) == 1 {
            let now = self.millis(now);
            self.idle_since.store(now, Relaxed);
            self.enter(if self.reading.load(Relaxed) { HEAD } else { IDLE }, now);
        }
    }

    /// The client takes nothing.
    pub fn stalls(&self) {
        self.stalled.store(self.now(), Relaxed);
    }

    /// The client took what there was.
    pub fn writes(&self) {
        self.stalled.store(NEVER, Relaxed);
    }

    /// When the client has taken nothing for too long; `None` while it does.
    #[must_use]
    pub fn write_deadline(&self, limits: &ConnectionPolicy) -> Option<Instant> {
        match self.stalled.load(Relaxed) {
            NEVER => None,
            since => Some(self.born + Duration::from_millis(since) + limits.write_timeout),
        }
    }

    /// When the present silence has lasted too long; `None` while requests are at work, which have
    /// deadlines of their own.
    #[must_use]
    pub fn deadline(&self, limits: &ConnectionPolicy) -> Option<Instant> {
        let state = self.state.load(Relaxed);
        let since = self.born + Duration::from_millis(state & ((1 << PHASE_SHIFT) - 1));
        match state >> PHASE_SHIFT {
            IDLE => Some(since + limits.idle_timeout),
            HEAD => Some(since + limits.header_timeout),
            _ => None,
        }
    }

    /// Whether it is a head that is waited for.
    #[must_use]
    pub fn is_reading(&self) -> bool {
        self.phase() == HEAD
    }

    fn phase(&self) -> u64 {
        self.state.load(Relaxed) >> PHASE_SHIFT
    }

    fn now(&self) -> u64 {
        self.millis(Instant::now())
    }

    fn millis(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.born).as_millis()).unwrap_or(0)
    }

    fn enter(&self, phase: u64, since: u64) {
        self.state.store(phase << PHASE_SHIFT | since, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_is_idle_then_reads_a_head_then_works() {
        let clock = Clock::new(false);
        assert_eq!(clock.phase(), IDLE);
        clock.reading(true);
        clock.reading(true);
        assert_eq!(clock.phase(), HEAD);
        clock.request_begins(Instant::now());
        assert_eq!(clock.phase(), BUSY);
        clock.reading(false);
        assert_eq!(clock.phase(), BUSY, "a body's bytes are no head");
        clock.request_ended(Instant::now());
        assert_eq!(clock.phase(), IDLE);
    }

    #[test]
    fn a_connection_with_two_streams_is_busy_until_both_ended() {
        let clock = Clock::new(true);
        assert_eq!(clock.phase(), HEAD, "the preface is waited for");
        clock.request_begins(Instant::now());
        clock.request_begins(Instant::now());
        clock.request_ended(Instant::now());
        assert_eq!(clock.phase(), BUSY);
        clock.request_ended(Instant::now());
        assert_eq!(clock.phase(), IDLE);
    }

    #[test]
    fn a_head_that_was_begun_while_requests_were_at_work_is_waited_for_afterwards() {
        let clock = Clock::new(false);
        clock.request_begins(Instant::now());
        clock.reading(true);
        clock.request_ended(Instant::now());
        assert_eq!(clock.phase(), HEAD);
    }

    #[test]
    fn what_is_no_request_does_not_prolong_idleness() {
        let clock = Clock::new(true);
        clock.request_begins(Instant::now());
        clock.request_ended(Instant::now());
        let idle = clock.state.load(Relaxed);
        clock.reading(true);
        clock.reading(false);
        assert_eq!(clock.state.load(Relaxed), idle);
    }
}
