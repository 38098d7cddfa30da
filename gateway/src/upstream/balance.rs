//! Which endpoint: in turn, by key or by load, passing over those that are not fit.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use http::Extensions;
use pingora_core::protocols::l4::socket::SocketAddr;
use pingora_load_balancing::{
    Backend,
    health_check::{HealthCheck, HttpHealthCheck, TcpHealthCheck},
    selection::{BackendIter as _, BackendSelection as _, consistent::KetamaHashing},
};
use sealgate_policy::{Balance, Breaker, Health};
use tokio::task::JoinSet;

use super::{
    Address, Endpoint,
    standing::{Standing, Underway},
};

/// Upper bound of the walk along the ring; an endpoint stands there many times.
const MAX_STEPS: usize = 1024;

/// The endpoints of one upstream at one time, and what is known of each.
pub struct Members {
    members: Box<[Member]>,
    by: By,
    /// Whose turn it is.
    turn: AtomicUsize,
    rules: Rules,
    probe: Option<Probe>,
}

struct Member {
    endpoint: Endpoint,
    standing: Arc<Standing>,
}

/// What the policy wants of the choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Rules {
    pub(super) balance: Balance,
    pub(super) health: Option<Health>,
    pub(super) breaker: Option<Breaker>,
    pub(super) tls: bool,
}

enum By {
    Turn,
    Load,
    Key(Arc<KetamaHashing>),
}

type Probe = Arc<dyn HealthCheck + Send + Sync>;

/// The endpoint for one request or WebSocket, which is under way there for as long as its guard lives.
pub struct Chosen<'a> {
    /// Where to.
    pub endpoint: &'a Endpoint,
    /// The guard.
    pub underway: Underway,
}

/// Why there is no endpoint to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoEndpoint {
    /// None is healthy, or none is left that was not tried.
    Unavailable,
    /// All that are healthy are left alone for having failed.
    CircuitOpen {
        /// Until the first of them is tried again.
        retry_after: Duration,
    },
}

/// Endpoints that a request was sent to in vain.
#[derive(Default)]
pub struct Tried {
    at: [u32; MAX_TRIED],
    count: usize,
}

/// One more than there can be retries.
const MAX_TRIED: usize = 6;

impl Tried {
    fn add(&mut self, index: usize) {
        if let Some(free) = self.at.get_mut(self.count) {
            *free = index as u32;
            self.count += 1;
        }
    }

    fn has(&self, index: usize) -> bool {
        self.at.iter().take(self.count).any(|tried| *tried as usize == index)
    }
}

/// By whom an endpoint is chosen under consistent hashing.
#[derive(Clone, Copy)]
pub struct Key<'a> {
    /// The identity's subject.
    pub subject: Option<&'a str>,
    /// Where there is none: the client's address.
    pub client: IpAddr,
}

impl Members {
    /// The endpoints of an upstream, in the order of their addresses, so that the order in which names are resolved means nothing. What is
    /// known of those that were there before is kept.
    pub(super) fn new(
        mut endpoints: Vec<Endpoint>,
        rules: Rules,
        before: Option<&Self>,
        standing: impl Fn(&Endpoint) -> Standing,
    ) -> Self {
        endpoints.sort_by(|a, b| a.address.cmp(&b.address));
        // Two names of one host would take its turn twice.
        endpoints.dedup_by(|a, b| a.address == b.address);
        let members: Box<[_]> = endpoints
            .into_iter()
            .map(|endpoint| {
                let known = before.and_then(|before| Some((&before.rules, before.find(&endpoint.address)?)));
                let standing = match known {
                    Some((old, member)) if old.health == rules.health && old.breaker == rules.breaker => {
                        member.standing.clone()
                    }
                    Some((_, member)) => Arc::new(member.standing.under(rules.breaker)),
                    None => Arc::new(standing(&endpoint)),
                };
                Member { endpoint, standing }
            })
            .collect();
        let by = match rules.balance {
            _ if members.len() == 1 => By::Turn,
            Balance::RoundRobin => By::Turn,
            Balance::LeastConnections => By::Load,
            Balance::ConsistentHash => {
                let ring: BTreeSet<_> =
                    members.iter().filter_map(|it| backend(&it.endpoint.address)).collect();
                By::Key(Arc::new(KetamaHashing::build(&ring)))
            }
        };
        let probe = rules.health.as_ref().map(|health| check(health, rules.tls));
        Self { members, by, turn: AtomicUsize::new(0), rules, probe }
    }

    /// The endpoint for one request or WebSocket: not one that was tried already, which the chosen one counts as from now on.
    ///
    /// # Errors
    /// [`NoEndpoint`].
    pub fn choose(&self, key: Key<'_>, tried: &mut Tried) -> Result<Chosen<'_>, NoEndpoint> {
        if let [only] = &*self.members
            && self.rules.health.is_none()
            && self.rules.breaker.is_none()
        {
            // Nothing to choose, and nothing that would be counted for a choice.
            return match tried.has(0) {
                true => Err(NoEndpoint::Unavailable),
                false => {
                    tried.add(0);
                    Ok(Chosen { endpoint: &only.endpoint, underway: Underway::default() })
                }
            };
        }
        let now = Instant::now();
        let chosen = match &self.by {
            By::Turn => self.in_turn(tried, now),
            By::Load => self.by_load(tried, now),
            By::Key(ring) => self.by_key(ring, key, tried, now),
        };
        let Some((index, chosen)) = chosen else { return Err(self.why_none(tried, now)) };
        tried.add(index);
        Ok(chosen)
    }

    /// Whether there would be another endpoint to try at all.
    #[must_use]
    pub fn is_single(&self) -> bool {
        self.members.len() == 1
    }

    fn in_turn(&self, tried: &Tried, now: Instant) -> Option<(usize, Chosen<'_>)> {
        // Who is passed over takes a turn too, or its neighbour would have two. Twice around, since other cores turn as well.
        let around = self.members.len() * 2;
        let turns = (0..around).map(|_| self.turn.fetch_add(1, Relaxed));
        turns.chain(0..self.members.len()).find_map(|at| self.admit(at % self.members.len(), tried, now))
    }

    fn by_load(&self, tried: &Tried, now: Instant) -> Option<(usize, Chosen<'_>)> {
        let count = self.members.len();
        // Another core may take the last trial of a half-open one in between.
        for _ in 0..count {
            let start = self.turn.load(Relaxed);
            let mut least: Option<(usize, usize)> = None;
            for index in (0..count).map(|step| (start + step) % count) {
                let Some(Member { standing, .. }) = self.members.get(index) else { continue };
                let load = standing.load();
                if least.is_none_or(|(_, least)| load < least)
                    && !tried.has(index)
                    && standing.is_available(now)
                {
                    least = Some((index, load));
                }
            }
            let (index, _) = least?;
            if let Some(chosen) = self.admit(index, tried, now) {
                // Among equals the one behind it is next.
                self.turn.store((index + 1) % count, Relaxed);
                return Some(chosen);
            }
        }
        None
    }

    fn by_key(
        &self,
        ring: &Arc<KetamaHashing>,
        key: Key<'_>,
        tried: &Tried,
        now: Instant,
    ) -> Option<(usize, Chosen<'_>)> {
        let mut walk = match (key.subject, key.client) {
            (Some(subject), _) => ring.iter(subject.as_bytes()),
            (None, IpAddr::V4(address)) => ring.iter(&address.octets()),
            (None, IpAddr::V6(address)) => ring.iter(&address.octets()),
        };
        for _ in 0..MAX_STEPS {
            let on_ring = &walk.next()?.addr;
            let index = self.members.iter().position(|it| it.endpoint.address.is(on_ring));
            if let Some(chosen) = index.and_then(|index| self.admit(index, tried, now)) {
                return Some(chosen);
            }
        }
        None
    }

    fn admit(&self, index: usize, tried: &Tried, now: Instant) -> Option<(usize, Chosen<'_>)> {
        let Member { endpoint, standing } = self.members.get(index)?;
        if tried.has(index) || !standing.is_healthy() {
            return None;
        }
        let counted = matches!(self.by, By::Load) || self.rules.breaker.is_some();
        let underway = if counted { standing.admit(now)? } else { Underway::default() };
        Some((index, Chosen { endpoint, underway }))
    }

    fn why_none(&self, tried: &Tried, now: Instant) -> NoEndpoint {
        let fit = || {
            self.members
                .iter()
                .enumerate()
                .filter(|(index, it)| !tried.has(*index) && it.standing.is_healthy())
        };
        if fit().next().is_none() {
            return NoEndpoint::Unavailable;
        }
        // One that is being tried has its verdict soon.
        let until = fit().map(|(_, it)| it.standing.open_until().unwrap_or(now)).min().unwrap_or(now);
        NoEndpoint::CircuitOpen { retry_after: until.saturating_duration_since(now) }
    }

    fn find(&self, address: &Address) -> Option<&Member> {
        self.members.iter().find(|member| member.endpoint.address == *address)
    }

    /// How often [`Self::check_health`] is due; `None` where the policy asks for no checks.
    #[must_use]
    pub fn health_interval(&self) -> Option<Duration> {
        self.rules.health.as_ref().map(|health| health.interval)
    }

    /// Probes every member once, all at the same time. One round ends before the next begins.
    pub async fn check_health(&self) {
        let (Some(probe), Some(health)) = (&self.probe, &self.rules.health) else { return };
        let mut probes = JoinSet::new();
        for member in &self.members {
            let Some(backend) = backend(&member.endpoint.address) else { continue };
            let (probe, standing) = (probe.clone(), member.standing.clone());
            probes.spawn(async move { (probe.check(&backend).await.is_ok(), standing) });
        }
        while let Some(outcome) = probes.join_next().await {
            if let Ok((fit, standing)) = outcome {
                standing.checked(fit, health);
            }
        }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.members.len()
    }

    /// How many endpoints the health checks found fit; without checks, all.
    #[must_use]
    pub fn healthy(&self) -> usize {
        self.members.iter().filter(|member| member.standing.is_healthy()).count()
    }

    /// How many of them a request could be sent to now.
    #[must_use]
    pub fn available(&self, now: Instant) -> usize {
        self.members.iter().filter(|member| member.standing.is_available(now)).count()
    }

    /// How many have an open breaker, or one that is being tried.
    #[must_use]
    pub fn broken(&self) -> usize {
        self.members.iter().filter(|member| !member.standing.is_closed()).count()
    }
}

impl Address {
    fn is(&self, pingora: &SocketAddr) -> bool {
        match (self, pingora) {
            (Self::Tcp(address), SocketAddr::Inet(it)) => address == it,
            (Self::Unix(path), SocketAddr::Unix(it)) => it.as_pathname() == Some(path),
            (Self::Tcp(_) | Self::Unix(_), _) => false,
        }
    }
}

fn backend(address: &Address) -> Option<Backend> {
    let addr = match address {
        Address::Tcp(address) => SocketAddr::Inet(*address),
        Address::Unix(path) => SocketAddr::Unix(std::os::unix::net::SocketAddr::from_pathname(path).ok()?),
    };
    Some(Backend { addr, weight: 1, ext: Extensions::new() })
}

/// An upstream with TLS is probed by connecting, since Pingora's prober cannot be given its CA; any
/// other one by the request that the policy names.
fn check(health: &Health, tls: bool) -> Probe {
    if tls {
        let mut check = TcpHealthCheck::new();
        check.peer_template.options.connection_timeout = Some(health.timeout);
        return Arc::from(check as Box<dyn HealthCheck + Send + Sync>);
    }
    let mut check = HttpHealthCheck::<()>::new("localhost", false);
    // A kept connection would prove only that it is kept.
    check.reuse_connection = false;
    if let Ok(uri) = health.path.parse() {
        check.req.set_uri(uri);
    }
    check.peer_template.options.connection_timeout = Some(health.timeout);
    check.peer_template.options.read_timeout = Some(health.timeout);
    check.peer_template.options.write_timeout = Some(health.timeout);
    Arc::new(check)
}
