//! The edge: from a listening socket to HTTP requests.
//!
//! A connection walks [`listener`] → `core` (accept loop) → `accept` (permit, TLS, HTTP) →
//! [`crate::http`]. Pingora's `Server` holds the whole as a service; each core is a thread with a
//! single-threaded runtime of its own.

mod accept;
mod clients;
mod connection;
mod core;
pub mod guard;
mod inbox;
pub mod listener;
mod plain;
pub mod proxy;
mod sessions;
mod stream;

use std::{
    net::{IpAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use async_trait::async_trait;
use pingora_core::{
    server::{ListenFds, ShutdownWatch},
    services::{ServiceReadyNotifier, ServiceWithDependents},
};
use sealgate_policy::{OnLoss, Policy};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};

use self::inbox::Notice;
pub use self::{
    clients::{Client, NoZone, Zone, Zones},
    connection::{Clock, Connection, TlsFacts},
    core::Core,
    inbox::{Inbox, Inboxes},
    stream::EdgeStream,
};
use crate::{
    clock,
    events::Sources,
    limits::{Block, Blocks, ConnectionLimits, Displaced, Listed, Load, SocketLimits},
    metrics::Metrics,
    reload::{Outliving, Snapshot},
    session::{
        Journal, Listing, LogoutTokens, Mark, Proofs, Revocation, Revocations, SessionPage, SessionQuery,
        Sessions, Tickets,
    },
    shared::Shared,
};

/// How long an order to all cores waits for their answers. It is obeyed by a slower core too, only later.
const CORE_PATIENCE: Duration = Duration::from_secs(2);

/// How long a revocation waits for the disk. It holds meanwhile, and is written by a slower disk too, only later.
const DISK_PATIENCE: Duration = Duration::from_secs(5);

/// What all cores share, and what outlives a reload.
pub struct Gateway {
    /// The policy in force.
    pub current: Arc<ArcSwap<Snapshot>>,
    /// Open connections, in total and by address.
    pub connections: Arc<ConnectionLimits>,
    /// Open WebSockets of rules that limit them, by session, subject and address.
    pub sockets: Arc<SocketLimits>,
    /// Addresses that may not connect for a time.
    pub blocks: Blocks,
    /// How much is to be done.
    pub load: Arc<Load>,
    /// Sessions, subjects and tokens that ended before their time.
    pub revocations: Revocations,
    /// The same on disk.
    pub journal: Journal,
    /// The clock of each session.
    pub sessions: Sessions,
    /// What other gateways know.
    pub shared: Arc<Shared>,
    /// How it stands with services that say what is revoked.
    pub sources: Arc<Sources>,
    /// How the cores are reached.
    pub cores: Inboxes,
    /// Proofs of possession that came, so that none counts twice.
    pub proofs: Proofs,
    /// Logout tokens that came, so that none counts twice.
    pub logout_tokens: LogoutTokens,
    /// Tickets for WebSockets that were not used yet.
    pub tickets: Tickets,
    /// What no reload touches: rate cells, counters, ticket keys.
    pub outliving: Arc<Outliving>,
    /// The port of HTTPS that plain HTTP is sent to.
    pub https_port: u16,
    /// Turns true when the gateway is to end: no new connections, old ones finish.
    pub stop: watch::Sender<bool>,
}

impl Gateway {
    /// What Prometheus scrapes.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.outliving.metrics
    }

    /// Whether a list of the policy or a block refuses the address, at `now` (unix seconds).
    pub fn refuses(&self, snapshot: &Snapshot, address: IpAddr, now: u64) -> bool {
        match snapshot.lists.of(address) {
            Listed::Denied => true,
            Listed::Allowed => false,
            Listed::Nowhere => snapshot.policy.lists().denies_others || self.blocks.is_blocked(address, now),
        }
    }

    /// Blocks an address by a penalty's word.
    pub fn penalize(&self, address: IpAddr, (penalty, block): (Arc<str>, Duration)) {
        let now = clock::unix_now();
        let until = now.saturating_add(block.as_secs().max(1));
        let block = Block { address, until, penalty: Some(penalty) };
        if let Err(error) = self.blocks.block(block, now) {
            tracing::warn!(%error, "an address that a penalty blocks is not");
        }
    }

    /// Ends what the revocation means: enters it, so that no such token counts any more, then closes the open sockets
    /// (4410) on every core, and no others; lets other gateways know; and waits until it is on disk. The one way for all sources of revocations but those
    /// gateways.
    ///
    /// A full table of revocations is an alarm, and no reason to leave sockets open: see [`RevokeReport::entered`].
    pub async fn revoke(&self, revocation: &Revocation<'_>) -> RevokeReport {
        let Applied { entered, mark, mut answers } = self.apply(revocation);
        self.shared.publish(revocation);
        let (mut sockets, mut answered) = (0, 0);
        let counting = async {
            // Ends when every core has answered: then all senders are gone.
            while let Some(count) = answers.recv().await {
                sockets += count;
                answered += 1;
            }
        };
        let (_, kept) = tokio::join!(
            tokio::time::timeout(CORE_PATIENCE, counting),
            self.journal.kept(mark, DISK_PATIENCE)
        );
        RevokeReport { sockets, entered, complete: answered == self.cores.len(), kept }
    }

    /// What a revocation does to this gateway, wherever it was made. Waits for nobody.
    pub(crate) fn apply(&self, revocation: &Revocation<'_>) -> Applied {
        // INVARIANT: entered first, looked for second: a socket that opens meanwhile is registered before it checks.
        let (entered, mark) = self.enter(revocation);
        let (closed, answers) = mpsc::channel(self.cores.len().max(1));
        self.cores.tell_all(&Notice::Revoked {
            target: Arc::new(revocation.target.into()),
            issued_before: revocation.issued_before,
            closed,
        });
        Applied { entered, mark, answers }
    }

    /// Enters a revocation for requests and sockets to come, and has it written; who enters many has open ones looked at when all are
    /// ([`Inboxes::sweep_all`]).
    pub(crate) fn enter(&self, revocation: &Revocation<'_>) -> (bool, Mark) {
        let entered = self.revocations.revoke(revocation, clock::unix_now());
        if let Err(error) = entered {
            tracing::error!(%error, "a revocation closes open sockets only; new ones are not refused");
        }
        (entered.is_ok(), self.journal.keep(revocation))
    }

    /// The open sockets of all cores, by session; one page of them.
    pub async fn sessions(&self, query: SessionQuery) -> SessionPage {
        let query = Arc::new(query);
        let (found, mut answers) = mpsc::channel(self.cores.len().max(1));
        self.cores.tell_all(&Notice::List { query: query.clone(), found });
        let (mut listing, mut answered) = (Listing::new(&query), 0);
        let merging = async {
            while let Some(rows) = answers.recv().await {
                listing.merge(rows);
                answered += 1;
            }
        };
        let _ = tokio::time::timeout(CORE_PATIENCE, merging).await;
        listing.into_page(answered == self.cores.len())
    }

    /// Has a socket closed (4409) whose place a newer one took, whichever core it is on.
    pub fn displace(&self, socket: Displaced) {
        self.cores.tell(socket.core, Notice::Displaced(socket.id));
    }

    /// The strictest of what is wanted while revocations that were made elsewhere cannot be known; nothing while they can.
    #[must_use]
    pub fn lost(&self, policy: &Policy) -> Option<OnLoss> {
        self.shared.lost(policy).max(self.sources.lost())
    }

    /// Whether the gateway is on its way out.
    #[must_use]
    pub fn draining(&self) -> bool {
        *self.stop.borrow()
    }
}

/// A revocation that cores were told of.
pub(crate) struct Applied {
    entered: bool,
    mark: Mark,
    /// How many sockets each core told to close.
    answers: mpsc::Receiver<usize>,
}

impl Applied {
    /// Whether it holds for requests and sockets to come, and will after a restart as soon as the disk has it.
    pub(crate) fn is_remembered(&self) -> bool {
        self.entered && self.mark.is_possible()
    }
}

/// What came of a revocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[must_use = "a revocation may not have been entered"]
pub struct RevokeReport {
    /// Open sockets that were told to close.
    pub sockets: usize,
    /// Whether the revocation holds for requests and sockets to come; `false` if there was no room to remember it.
    pub entered: bool,
    /// Whether all cores have answered in time. One that has not still closes its sockets, uncounted.
    pub complete: bool,
    /// Whether it is on disk, and so holds after a restart.
    pub kept: bool,
}

/// The sockets that a core accepts from.
#[derive(Debug, Default)]
pub struct Listeners {
    /// TLS.
    pub tls: Vec<TcpListener>,
    /// Plain HTTP.
    pub plain: Vec<TcpListener>,
}

/// The cores, as Pingora sees them.
pub struct EdgeService {
    gateway: Arc<Gateway>,
    inboxes: Vec<Inbox>,
    /// For each core, its sockets.
    sockets: Vec<Listeners>,
    drained: Option<oneshot::Sender<()>>,
}

impl EdgeService {
    /// Cores that serve `sockets` (those of each core) and read `inboxes` (one each) until the gateway stops;
    /// `drained` hears when nothing is left.
    #[must_use]
    pub fn new(
        gateway: Arc<Gateway>,
        sockets: Vec<Listeners>,
        inboxes: Vec<Inbox>,
        drained: oneshot::Sender<()>,
    ) -> Self {
        Self { gateway, inboxes, sockets, drained: Some(drained) }
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
        let cores = self.sockets.drain(..).zip(self.inboxes.drain(..));
        for (index, (sockets, inbox)) in cores.enumerate() {
            let (end, has_ended) = oneshot::channel();
            let gateway = self.gateway.clone();
            let spawned =
                std::thread::Builder::new().name(format!("sealgate-core-{index}")).spawn(move || {
                    if let Err(error) = core::run(gateway, index, sockets, inbox) {
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
