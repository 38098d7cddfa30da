//! The way to the backends: which endpoint, and a connection to it.
//!
//! [`Upstreams`] belongs to a snapshot: endpoints with resolved addresses and compiled client configurations. What is known
//! of an endpoint (`standing`) outlives it. Connections belong to a core ([`pool::Pool`]) and outlive snapshots too, so
//! that a reload keeps them warm.

mod balance;
mod budget;
mod circuit;
mod connect;
pub mod http1;
pub mod pool;
mod standing;
mod tries;

use std::{
    collections::HashMap,
    fmt,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use rustls::{ClientConfig, pki_types::ServerName};
use sealgate_policy::{self as policy, UpstreamIndex};

use crate::{
    lock::lock,
    metrics::{Metrics, UpstreamCounters},
};

use balance::Rules;
pub use balance::{Chosen, Key, Members, NoEndpoint, Tried};
use budget::Budget;
pub use connect::{ConnectError, UpstreamStream};
use standing::Standing;
pub use standing::Underway;
pub use tries::Tries;

/// All upstreams of one snapshot, in the order of the policy.
pub struct Upstreams {
    upstreams: Box<[Upstream]>,
}

/// One named group of endpoints that answer for each other.
pub struct Upstream {
    /// The policy's name for it; a metric label.
    pub name: Arc<str>,
    members: Arc<Members>,
    /// Longest wait for a connection, TLS included.
    pub connect_timeout: Duration,
    /// Longest wait, for each try, while an endpoint takes nothing more of a request, and then for the head of its response.
    pub response_timeout: Duration,
    /// How long an unused connection is kept.
    pub idle_timeout: Duration,
    /// Most unused connections that a core keeps for each endpoint.
    pub max_idle: usize,
    /// Other endpoints that a request is tried on.
    retries: u32,
    /// In percent of the requests.
    retry_budget: u32,
    budget: Arc<Budget>,
    /// What became of its requests.
    pub counters: UpstreamCounters,
}

/// One address of an upstream, and how to speak to it.
pub struct Endpoint {
    id: EndpointId,
    address: Address,
    tls: Option<EndpointTls>,
    /// The `Host` field for requests that have none of their own to keep.
    pub authority: http::HeaderValue,
}

#[derive(Clone)]
struct EndpointTls {
    config: Arc<ClientConfig>,
    server_name: ServerName<'static>,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// Reads the bytes behind a source that the policy names.
pub type ReadSource<'a> = dyn Fn(&policy::Source) -> Result<Vec<u8>, String> + Sync + 'a;

/// What makes two endpoints the same one for a connection pool: address and TLS material.
///
/// Dense, so that a pool is a vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointId(usize);

/// Gives equal endpoints equal ids over all reloads of a process.
#[derive(Default)]
pub struct EndpointIds(Mutex<HashMap<String, usize>>);

/// A reason why the upstreams of a policy cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// A name without an address, now.
    #[error("upstream `{upstream}`: `{host}` has no address: {reason}")]
    Resolve {
        /// The policy's name of the upstream.
        upstream: Arc<str>,
        /// The host name that was looked up.
        host: String,
        /// What the resolver said.
        reason: String,
    },
    /// Certificates or keys that cannot be used, or endpoints that cannot be balanced.
    #[error("upstream `{upstream}`: {reason}")]
    Setup {
        /// The policy's name of the upstream.
        upstream: Arc<str>,
        /// What is wrong with it.
        reason: String,
    },
}

impl Upstreams {
    /// Resolves names and compiles client configurations. What `previous` knows of endpoints that stay is kept, so that a reload sends
    /// nothing to one that is known to be down.
    ///
    /// # Errors
    ///
    /// All that is wrong, not only the first.
    pub async fn build(
        upstreams: &[policy::Upstream],
        previous: Option<&Self>,
        ids: &EndpointIds,
        metrics: &Metrics,
        read: &ReadSource<'_>,
    ) -> Result<Self, Vec<UpstreamError>> {
        let mut built = Vec::with_capacity(upstreams.len());
        let mut errors = Vec::new();
        for upstream in upstreams {
            let known = previous.and_then(|it| it.iter().find(|known| known.name == upstream.name));
            match Upstream::build(upstream, known, ids, metrics, read).await {
                Ok(upstream) => built.push(upstream),
                Err(error) => errors.push(error),
            }
        }
        if errors.is_empty() { Ok(Self { upstreams: built.into() }) } else { Err(errors) }
    }

    /// The upstream that a permit names.
    #[must_use]
    pub fn of(&self, index: UpstreamIndex) -> Option<&Upstream> {
        self.upstreams.get(index.0)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Upstream> {
        self.upstreams.iter()
    }
}

impl Upstream {
    async fn build(
        upstream: &policy::Upstream,
        known: Option<&Self>,
        ids: &EndpointIds,
        metrics: &Metrics,
        read: &ReadSource<'_>,
    ) -> Result<Self, UpstreamError> {
        let fault = |reason| UpstreamError::Setup { upstream: upstream.name.clone(), reason };
        let tls = match &upstream.tls {
            Some(tls) => Some(connect::client_tls(tls, read).map_err(fault)?),
            None => None,
        };
        let mut endpoints = Vec::new();
        for endpoint in &upstream.endpoints {
            match endpoint {
                policy::Endpoint::Unix(path) => {
                    endpoints.push((Address::Unix(path.clone()), "localhost".to_owned()))
                }
                policy::Endpoint::Tcp { host, port } => {
                    let resolve_error = |reason: String| UpstreamError::Resolve {
                        upstream: upstream.name.clone(),
                        host: host.clone(),
                        reason,
                    };
                    let found = tokio::net::lookup_host((host.as_str(), *port))
                        .await
                        .map_err(|error| resolve_error(error.to_string()))?;
                    let before = endpoints.len();
                    endpoints.extend(found.map(|address| (Address::Tcp(address), format!("{host}:{port}"))));
                    if endpoints.len() == before {
                        return Err(resolve_error("the resolver knows none".to_owned()));
                    }
                }
            }
        }
        let endpoints = endpoints
            .into_iter()
            .map(|(address, authority)| Endpoint {
                id: ids.of(&address, tls.as_ref().map(|(_, fingerprint)| fingerprint.as_str())),
                address,
                tls: tls.as_ref().map(|(tls, _)| tls.clone()),
                authority: http::HeaderValue::try_from(authority)
                    .unwrap_or_else(|_| http::HeaderValue::from_static("localhost")),
            })
            .collect();
        let rules = Rules {
            balance: upstream.balance,
            health: upstream.health.clone(),
            breaker: upstream.breaker,
            tls: tls.is_some(),
        };
        let counters = metrics.upstream(&upstream.name);
        let breaker = upstream.breaker;
        let members = Members::new(endpoints, rules, known.map(|known| &*known.members), |endpoint| {
            let (name, openings) = (upstream.name.clone(), counters.openings.clone());
            Standing::new(name, endpoint.address.clone(), breaker, openings)
        });
        Ok(Self {
            name: upstream.name.clone(),
            members: Arc::new(members),
            connect_timeout: upstream.connect_timeout,
            response_timeout: upstream.response_timeout,
            idle_timeout: upstream.idle_timeout,
            max_idle: upstream.max_idle as usize,
            retries: upstream.retries,
            retry_budget: upstream.retry_budget,
            budget: known.map_or_else(|| Arc::new(Budget::new(Instant::now())), |known| known.budget.clone()),
            counters,
        })
    }

    /// Its endpoints of this moment.
    #[must_use]
    pub fn members(&self) -> &Arc<Members> {
        &self.members
    }
}

impl EndpointIds {
    fn of(&self, address: &Address, tls_fingerprint: Option<&str>) -> EndpointId {
        let key = format!("{address:?} {tls_fingerprint:?}");
        let mut ids = lock(&self.0);
        let next = ids.len();
        EndpointId(*ids.entry(key).or_insert(next))
    }
}
