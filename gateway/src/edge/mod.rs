//! The edge: from a listening socket to HTTP requests.
//!
//! A connection walks [`listener`] → `core` (accept loop) → `accept` (permit, TLS, HTTP) →
//! [`crate::http`]. Pingora's `Server` holds the whole as a service; each core is a thread with a
//! single-threaded runtime of its own.

mod accept;
mod connection;
mod core;
pub mod guard;
pub mod listener;
mod stream;

use std::{net::TcpListener, sync::Arc};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use pingora_core::{
    server::{ListenFds, ShutdownWatch},
    services::{ServiceReadyNotifier, ServiceWithDependents},
};
use tokio::sync::{oneshot, watch};

pub use self::{
    connection::{Clock, Connection, TlsFacts},
    core::Core,
    stream::EdgeStream,
};
use crate::{
    limits::ConnectionLimits,
    metrics::Metrics,
    reload::{Outliving, Snapshot},
    session::Revocations,
};

/// What all cores share, and what outlives a reload.
pub struct Gateway {
    /// The policy in force.
    pub current: Arc<ArcSwap<Snapshot>>,
    /// Open connections, in total and by address.
    pub connections: Arc<ConnectionLimits>,
    /// Sessions, subjects and tokens that ended before their time.
    pub revocations: Revocations,
    /// What no reload touches: rate cells, counters, ticket keys.
    pub outliving: Arc<Outliving>,
    /// Turns true when the gateway is to end: no new connections, old ones finish.
    pub stop: watch::Sender<bool>,
}

impl Gateway {
    /// What Prometheus scrapes.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.outliving.metrics
    }

    /// Whether the gateway is on its way out.
    #[must_use]
    pub fn draining(&self) -> bool {
        *self.stop.borrow()
    }
}

/// The cores, as Pingora sees them.
pub struct EdgeService {
    gateway: Arc<Gateway>,
    /// For each core, its sockets.
    sockets: Vec<Vec<TcpListener>>,
    drained: Option<oneshot::Sender<()>>,
}

impl EdgeService {
    /// Cores that serve `sockets` (a list for each core) until the gateway stops; `drained` hears when
    /// nothing is left.
    #[must_use]
    pub fn new(gateway: Arc<Gateway>, sockets: Vec<Vec<TcpListener>>, drained: oneshot::Sender<()>) -> Self {
        Self { gateway, sockets, drained: Some(drained) }
    }
}

#[async_trait]
impl ServiceWithDependents for EdgeService {
    async fn start_service(
        &mut self,
        _fds: Option<ListenFds>,
        _shutdown: ShutdownWatch,
        _listeners_per_fd: usize,
        ready: ServiceReadyNotifier,
    ) {
        let mut ended = Vec::new();
        for (index, sockets) in self.sockets.drain(..).enumerate() {
            let (end, has_ended) = oneshot::channel();
            let gateway = self.gateway.clone();
            let spawned =
                std::thread::Builder::new().name(format!("sealgate-core-{index}")).spawn(move || {
                    if let Err(error) = core::run(gateway, sockets) {
                        tracing::error!(%error, "a core could not start");
                    }
                    let _ = end.send(());
                });
            match spawned {
                Ok(_) => ended.push(has_ended),
                Err(error) => tracing::error!(%error, "a core's thread could not start"),
            }
        }
        ready.notify_ready();
        for core in ended {
            let _ = core.await;
        }
        if let Some(drained) = self.drained.take() {
            let _ = drained.send(());
        }
    }

    fn name(&self) -> &'static str {
        "edge"
    }

    fn threads(&self) -> Option<usize> {
        Some(1)
    }
}
