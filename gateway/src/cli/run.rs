//! `sealgate run`: bind, load, serve, drain.

use std::{
    net::{SocketAddr, TcpListener},
    path::PathBuf,
    sync::{Arc, Mutex},
};

use anyhow::Context as _;
use async_trait::async_trait;
use pingora_core::server::{
    RunArgs as PingoraRunArgs, Server, ShutdownSignal, ShutdownSignalWatch, configuration::ServerConf,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{oneshot, watch},
};

use super::{FINE, RunArgs};
use crate::{
    admin::{AdminService, Parts, control},
    clock,
    edge::{EdgeService, Gateway, Inboxes, Listeners, listener},
    events::Sources,
    limits::{Blocks, ConnectionLimits, InFlight, Load, PenaltyStore, RateClock, RateStore, SocketLimits},
    lock::lock,
    metrics::Metrics,
    reload::{Outliving, PolicySource, Reloader},
    session::{Journal, KeyFetcher, LogoutTokens, Proofs, Revocations, Sessions, Tickets},
    shared::Shared,
    upstream::EndpointIds,
};

/// Keys of rates that the process has room for, of strangers and as many of users: 24 bytes each.
const RATE_CELLS: usize = 1 << 20;

/// Revoked sessions, subjects and tokens that are remembered until their tokens have expired.
const REVOCATIONS: usize = 1 << 20;

/// What a running gateway can tell about itself.
pub struct Running {
    /// Where TLS is served; port 0 was filled in.
    pub addresses: Vec<SocketAddr>,
    /// Where metrics are.
    pub metrics: SocketAddr,
    /// The control socket.
    pub control: PathBuf,
}

/// Runs a gateway until a signal ends it. `ready` hears when connections are taken.
///
/// # Errors
///
/// It could not start: a faulty policy, an address in use, a state folder that is not ours.
pub fn run(args: &RunArgs, ready: impl FnOnce(&Running)) -> anyhow::Result<u8> {
    sealgate_keys::private_dir(&args.policy.state)?;
    let cores = match args.cores {
        Some(cores) => usize::from(cores),
        None => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
    };
    raise_descriptor_limit();
    let outliving = Arc::new(Outliving {
        rates: RateStore::new(RATE_CELLS),
        penalties: PenaltyStore::new(),
        in_flight: InFlight::new(),
        metrics: Metrics::new()?,
        endpoints: EndpointIds::default(),
        tickets: sealgate_keys::TicketKeys::new()?,
        acme: Arc::default(),
        clock: RateClock::default(),
        keys: KeyFetcher::system(),
        changes: watch::Sender::new(1),
    });
    // Lives as long as the gateway: issuers' keys are refreshed on it.
    let background = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    // The policy first: its errors are what an operator most often has to see.
    let reloader = background
        .block_on(Reloader::first(PolicySource::from(&args.policy), outliving.clone()))
        .map_err(|error| anyhow::anyhow!("the policy was not taken\n{error}"))?;

    let mut sockets: Vec<Listeners> = (0..cores).map(|_| Listeners::default()).collect();
    let mut addresses = Vec::new();
    for address in &args.listen {
        let bound = listener::bind(*address, cores)?;
        addresses.extend(bound.first().map(TcpListener::local_addr).transpose()?);
        for (core, socket) in sockets.iter_mut().zip(bound) {
            core.tls.push(socket);
        }
    }
    for address in &args.http {
        for (core, socket) in sockets.iter_mut().zip(listener::bind(*address, cores)?) {
            core.plain.push(socket);
        }
    }
    let scrape = TcpListener::bind(args.metrics).with_context(|| {
        format!(
            "cannot listen on {} for metrics (choose another: --metrics; --metrics-port for `dev`)",
            args.metrics
        )
    })?;
    scrape.set_nonblocking(true)?;
    let control_path = args.control.clone().unwrap_or_else(|| args.policy.state.join("control.sock"));
    let control =
        control::bind(&control_path).with_context(|| format!("control socket {}", control_path.display()))?;
    let running = Running { addresses, metrics: scrape.local_addr()?, control: control_path.clone() };

    // Before anybody can connect: what was revoked before a restart stays so.
    let now = clock::unix_now();
    let (journal, kept) = Journal::open(&args.policy.state, REVOCATIONS, now)?;
    let revocations = Revocations::new(REVOCATIONS);
    let shared = Arc::new(Shared::new(&reloader.current().load().policy).map_err(no_random)?);
    for revocation in kept.iter(now) {
        let revocation = revocation.borrowed();
        revocations.revoke(&revocation, now).context("revocations of before the restart")?;
        shared.publish(&revocation);
    }
    tracing::info!(revocations = revocations.len(), "revocations of before are in force");
    drop(kept);

    let sources = Sources::new(&reloader.current().load().policy);
    let (ways_in, inboxes) = Inboxes::new(cores);
    let gateway = Arc::new(Gateway {
        current: reloader.current(),
        connections: ConnectionLimits::new(),
        sockets: SocketLimits::new(),
        blocks: Blocks::default(),
        load: Load::new(),
        revocations,
        journal,
        sessions: Sessions::new(),
        shared,
        sources: Arc::new(sources),
        cores: ways_in,
        tickets: Tickets::default(),
        logout_tokens: LogoutTokens::default(),
        proofs: Proofs::new().map_err(no_random)?,
        outliving,
        https_port: args.https_port,
        stop: watch::Sender::new(false),
    });
    let (drained, has_drained) = oneshot::channel();
    let bundle = PolicySource::from(&args.policy).bundle;
    let mut server = Server::new_with_opt_and_conf(None, server_conf());
    server.bootstrap();
    server.add_service(EdgeService::new(gateway.clone(), sockets, inboxes, drained));
    server.add_service(AdminService::new(gateway.clone(), Parts { reloader, bundle, scrape, control }));
    // Sockets are bound: whoever connects from here on is served.
    ready(&running);
    tracing::info!(addresses = ?running.addresses, plain = ?args.http, metrics = %running.metrics, cores, "serving");
    server.run(PingoraRunArgs {
        shutdown_signal: Box::new(Shutdown {
            gateway: gateway.clone(),
            has_drained: Mutex::new(Some(has_drained)),
        }),
    });
    gateway.journal.close();
    // The socket of a gateway that is gone would only mislead.
    let _ = std::fs::remove_file(&control_path);
    tracing::info!("ended");
    Ok(FINE)
}

fn no_random(_: ring::error::Unspecified) -> anyhow::Error {
    anyhow::anyhow!("the system gives no random bytes")
}

/// Pingora sleeps a fixed grace period even when idle. So we drain ourselves, and then ask it for the
/// fast way out.
struct Shutdown {
    gateway: Arc<Gateway>,
    has_drained: Mutex<Option<oneshot::Receiver<()>>>,
}

#[async_trait]
impl ShutdownSignalWatch for Shutdown {
    async fn recv(&self) -> ShutdownSignal {
        let (Ok(mut terminate), Ok(mut interrupt)) =
            (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
        else {
            tracing::error!("signals cannot be received; ending");
            return ShutdownSignal::FastShutdown;
        };
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("draining; a second signal ends at once");
        self.gateway.stop.send_replace(true);
        let has_drained = lock(&self.has_drained).take();
        if let Some(has_drained) = has_drained {
            tokio::select! {
                _ = has_drained => {}
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        }
        ShutdownSignal::FastShutdown
    }
}

fn server_conf() -> ServerConf {
    ServerConf {
        threads: 1,
        work_stealing: false,
        grace_period_seconds: Some(0),
        graceful_shutdown_timeout_seconds: Some(0),
        ..ServerConf::default()
    }
}

/// Each WebSocket takes two descriptors, and the soft limit is often 1,024.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
}
