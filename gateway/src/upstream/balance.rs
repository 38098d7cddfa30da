//! Pingora's balancers behind one face.

use std::{collections::BTreeSet, path::Path, time::Duration};

use http::Extensions;
use pingora_core::protocols::l4::socket::SocketAddr;
use pingora_load_balancing::{
    Backend, Backends, LoadBalancer,
    discovery::Static,
    health_check::{HealthCheck, HttpHealthCheck, TcpHealthCheck},
    selection::{RoundRobin, consistent::KetamaHashing},
};
use sealgate_policy::{Balance, Health};

use super::Address;

/// Upper bound of the search for a healthy endpoint.
const MAX_STEPS: usize = 256;

/// Chooses among the endpoints of one upstream, passing over the unhealthy.
pub struct Balancer {
    by: By,
    plan: Plan,
}

/// All that a balancer is made from. Under an equal plan a reload keeps the balancer, and with it what is known
/// of each endpoint's health.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) addresses: Vec<Address>,
    pub(super) balance: Balance,
    pub(super) health: Option<Health>,
    pub(super) tls: bool,
}

enum By {
    Turn(LoadBalancer<RoundRobin>),
    Key(LoadBalancer<KetamaHashing>),
}

impl Balancer {
    pub(super) async fn build(plan: Plan) -> Result<Self, String> {
        let members: BTreeSet<Backend> = plan.addresses.iter().filter_map(backend).collect();
        // Pingora's ring has no place for unix sockets; with a single endpoint there is no need of one.
        let only_one = members.len() == 1;
        let mut backends = Backends::new(Static::new(members));
        if let Some(health) = &plan.health {
            backends.set_health_check(check(health, plan.tls));
        }
        let by = match plan.balance {
            Balance::ConsistentHash if !only_one => By::Key(LoadBalancer::from_backends(backends)),
            Balance::ConsistentHash | Balance::RoundRobin => By::Turn(LoadBalancer::from_backends(backends)),
        };
        // Fills the selector. The members are static, so this neither waits nor fails.
        match &by {
            By::Turn(balancer) => balancer.update().await,
            By::Key(balancer) => balancer.update().await,
        }
        .map_err(|error| error.to_string())?;
        Ok(Self { by, plan })
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// How often [`Self::check_health`] is due; `None` where the policy asks for no checks.
    #[must_use]
    pub fn health_interval(&self) -> Option<Duration> {
        self.plan.health.as_ref().map(|health| health.interval)
    }

    /// Probes every member once, all at the same time.
    pub async fn check_health(&self) {
        self.backends().run_health_check(true).await;
    }

    /// How many endpoints would be chosen now; without health checks, all.
    #[must_use]
    pub fn healthy(&self) -> usize {
        let backends = self.backends();
        backends.get_backend().iter().filter(|backend| backends.ready(backend)).count()
    }

    fn backends(&self) -> &Backends {
        match &self.by {
            By::Turn(balancer) => balancer.backends(),
            By::Key(balancer) => balancer.backends(),
        }
    }

    pub(super) fn select(&self, key: &[u8]) -> Option<SocketAddr> {
        let backend = match &self.by {
            By::Turn(balancer) => balancer.select(key, MAX_STEPS),
            By::Key(balancer) => balancer.select(key, MAX_STEPS),
        };
        Some(backend?.addr)
    }
}

/// Whether Pingora's address is the endpoint's.
pub(super) fn same(address: &Address, chosen: &SocketAddr) -> bool {
    match (address, chosen) {
        (Address::Tcp(address), SocketAddr::Inet(chosen)) => address == chosen,
        (Address::Unix(path), SocketAddr::Unix(chosen)) => chosen.as_pathname() == Some(Path::new(path)),
        _ => false,
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
fn check(health: &Health, tls: bool) -> Box<dyn HealthCheck + Send + Sync> {
    if tls {
        let mut check = TcpHealthCheck::new();
        check.consecutive_success = health.healthy as usize;
        check.consecutive_failure = health.unhealthy as usize;
        check.peer_template.options.connection_timeout = Some(health.timeout);
        return check;
    }
    let mut check = HttpHealthCheck::<()>::new("localhost", false);
    check.consecutive_success = health.healthy as usize;
    check.consecutive_failure = health.unhealthy as usize;
    // A kept connection would prove only that it is kept.
    check.reuse_connection = false;
    if let Ok(uri) = health.path.parse() {
        check.req.set_uri(uri);
    }
    check.peer_template.options.connection_timeout = Some(health.timeout);
    check.peer_template.options.read_timeout = Some(health.timeout);
    check.peer_template.options.write_timeout = Some(health.timeout);
    Box::new(check)
}
