//! The private listeners: metrics and health for scrapers, and the control socket for the operator.

pub mod control;
mod scrape;

use std::{
    collections::{HashMap, HashSet},
    net::TcpListener,
    os::unix::net::UnixListener,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use pingora_core::{
    server::{ListenFds, ShutdownWatch},
    services::{ServiceReadyNotifier, ServiceWithDependents},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
};

use crate::{
    acme, clock,
    edge::Gateway,
    events,
    limits::LOOK,
    reload::{Cause, Reloader, Request, watch_files},
    shared,
};

/// How often what has run out is thrown away.
const HOUSEKEEPING: Duration = Duration::from_secs(60);

/// Everything beside the cores: reloading, probes, control, health checks.
pub struct AdminService {
    gateway: Arc<Gateway>,
    parts: Option<Parts>,
}

/// What the service takes over when it starts.
pub struct Parts {
    /// Answers all requests to reload.
    pub reloader: Reloader,
    /// The bundle's folder, to be watched.
    pub bundle: PathBuf,
    /// Where metrics are scraped.
    pub scrape: TcpListener,
    /// Where the operator's commands come in.
    pub control: UnixListener,
}

impl AdminService {
    /// A service over sockets that are bound already.
    #[must_use]
    pub fn new(gateway: Arc<Gateway>, parts: Parts) -> Self {
        Self { gateway, parts: Some(parts) }
    }

    async fn run(&self, parts: Parts) -> std::io::Result<()> {
        let Parts { reloader, bundle, scrape, control } = parts;
        let (requests, inbox) = mpsc::channel(16);
        let scrape = tokio::net::TcpListener::from_std(scrape)?;
        let control = tokio::net::UnixListener::from_std(control)?;
        let hangup = signal(SignalKind::hangup())?;
        tokio::join!(
            reloader.run(inbox),
            watch_files(bundle, self.gateway.current.clone(), requests.clone()),
            acme::follow(self.gateway.clone(), requests.clone()),
            reload_on(hangup, requests.clone()),
            control::serve(control, self.gateway.clone(), requests),
            scrape::serve(scrape, self.gateway.clone()),
            check_upstreams(&self.gateway),
            keep_house(&self.gateway),
            watch_memory(&self.gateway),
            self.gateway.keep_sessions(),
            shared::follow(&self.gateway),
            events::follow(self.gateway.clone()),
        );
        Ok(())
    }
}

#[async_trait]
impl ServiceWithDependents for AdminService {
    async fn start_service(
        &mut self,
        _fds: Option<ListenFds>,
        mut shutdown: ShutdownWatch,
        _listeners_per_fd: usize,
        ready: ServiceReadyNotifier,
    ) {
        ready.notify_ready();
        let Some(parts) = self.parts.take() else { return };
        tokio::select! {
            outcome = self.run(parts) => if let Err(error) = outcome {
                tracing::error!(%error, "the private listeners ended");
            },
            _ = shutdown.changed() => {}
        }
    }

    fn name(&self) -> &'static str {
        "admin"
    }

    fn threads(&self) -> Option<usize> {
        Some(1)
    }
}

async fn reload_on(mut hangup: tokio::signal::unix::Signal, requests: mpsc::Sender<Request>) {
    while hangup.recv().await.is_some() {
        if requests.send(Request { cause: Cause::Signal, reply: None }).await.is_err() {
            return;
        }
    }
}

/// Probes the endpoints of each upstream that asks for it, at its own interval: one that is slow to answer keeps
/// no other waiting.
async fn check_upstreams(gateway: &Gateway) {
    let mut due: HashMap<Arc<str>, Instant> = HashMap::new();
    let mut running = JoinSet::new();
    let mut probed = HashSet::new();
    loop {
        let snapshot = gateway.current.load_full();
        let now = Instant::now();
        let mut next = now + Duration::from_secs(1);
        for upstream in snapshot.upstreams.iter() {
            let members = upstream.members();
            let Some(interval) = members.health_interval() else { continue };
            let at = due.entry(upstream.name.clone()).or_insert(now);
            if *at <= now && probed.insert(upstream.name.clone()) {
                *at = now + interval;
                let (name, members) = (upstream.name.clone(), members.clone());
                running.spawn(async move {
                    members.check_health().await;
                    name
                });
            }
            if *at > now {
                next = next.min(*at);
            }
        }
        due.retain(|name, _| snapshot.upstreams.iter().any(|upstream| upstream.name == *name));
        tokio::select! {
            () = tokio::time::sleep_until(next.into()) => {}
            Some(Ok(name)) = running.join_next() => {
                probed.remove(&name);
            }
        }
    }
}

/// Looks at memory where the policy limits it.
async fn watch_memory(gateway: &Gateway) {
    let mut due = tokio::time::interval(LOOK);
    loop {
        due.tick().await;
        gateway.load.look(gateway.current.load().policy.overload());
    }
}

/// Erases ticket keys that are due, handshakes or not, and forgets revocations whose tokens have expired.
async fn keep_house(gateway: &Gateway) {
    let mut due = tokio::time::interval(HOUSEKEEPING);
    loop {
        due.tick().await;
        gateway.revocations.forget_expired(clock::unix_now());
        gateway.journal.forget_expired(clock::unix_now());
        gateway.proofs.forget_expired(clock::unix_now());
        gateway.blocks.forget_expired(clock::unix_now());
        gateway.outliving.penalties.forget_expired(Instant::now());
        gateway.tickets.forget_expired(clock::unix_now());
        gateway.sessions.forget_expired(clock::unix_now());
        gateway.logout_tokens.forget_expired(clock::unix_now());
        gateway.shared.forget_expired(clock::unix_now());
        if let Err(error) = gateway.outliving.tickets.rotate() {
            tracing::error!(%error, "ticket keys could not be replaced; no tickets are given until they can");
        }
    }
}
