//! One core: a thread, a single-threaded runtime, its own sockets, caches and pools.

use std::{
    cell::{Cell, RefCell},
    collections::{BTreeMap, HashMap},
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, Weak},
    time::Duration,
};

use arc_swap::{ArcSwap, Cache};
use ring::error::Unspecified;
use sealgate_policy::DecisionCache;
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::LocalOptions,
    sync::Notify,
};

use super::{
    Client, Connection, Gateway, Inbox, Listeners, accept,
    inbox::{Mail, Notice},
    plain,
    proxy::{self, Source},
};
use crate::{
    http::{Sockets, contact_lost, displace, drain, end_sessions, list, rejudge, revoke, sweep},
    reload::Snapshot,
    session::{Revocation, TokenCache},
    upstream::pool::Pool,
    websocket::relay::Orders,
};

/// Tokens that a core remembers as verified.
const TOKEN_CACHE_ENTRIES: usize = 16 * 1024;

/// Decisions on access that a core remembers.
const DECISION_CACHE_ENTRIES: usize = 4 * 1024;

/// WebSockets that a core holds at most.
const MAX_SOCKETS: u32 = 1 << 20;

/// Certificates that are looked at in one go: each may cost a few signatures.
const CERTIFIED_SLICE: usize = 16;

/// How long accepting rests when the process has no descriptor left.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);

/// What belongs to one core. Lives in an `Rc`, never leaves its thread.
pub struct Core {
    /// What all cores share.
    pub gateway: Arc<Gateway>,
    /// Counts the cores from 0: the place of its inbox.
    pub index: usize,
    /// Tokens verified here.
    pub tokens: TokenCache,
    /// Decisions on access that no table has.
    pub decisions: Rc<DecisionCache>,
    /// Connections to backends.
    pub pool: Rc<Pool>,
    /// Live WebSockets of this core.
    pub sockets: Sockets,
    /// Those of them that count against a limit, by the id of their guard.
    pub counted: RefCell<HashMap<u64, Rc<Orders>>>,
    /// Wakes everything that has to end when the gateway drains.
    pub drain: Rc<Notify>,
    draining: Cell<bool>,
    snapshot: RefCell<Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>>,
    random: RefCell<fastrand::Rng>,
    /// Connections whose clients have shown a certificate: by a number of their own.
    certified: RefCell<BTreeMap<u64, Weak<Connection>>>,
    next_certified: Cell<u64>,
    open: Rc<Cell<usize>>,
    rejudge: Notify,
}

impl Core {
    fn new(gateway: Arc<Gateway>, index: usize) -> Result<Self, Unspecified> {
        let snapshot = RefCell::new(Cache::new(gateway.current.clone()));
        Ok(Self {
            gateway,
            index,
            tokens: TokenCache::new(TOKEN_CACHE_ENTRIES)?,
            decisions: Rc::new(DecisionCache::new(DECISION_CACHE_ENTRIES)),
            pool: Rc::default(),
            sockets: Sockets::new(MAX_SOCKETS),
            counted: RefCell::default(),
            drain: Rc::default(),
            draining: Cell::new(false),
            snapshot,
            random: RefCell::new(fastrand::Rng::new()),
            certified: RefCell::default(),
            next_certified: Cell::new(0),
            open: Rc::default(),
            rejudge: Notify::new(),
        })
    }

    /// The policy of this moment. A unit of work takes it once and keeps it to its end.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.borrow_mut().load().clone()
    }

    /// Bits for ids that must not repeat but need not be secret.
    #[must_use]
    pub fn random(&self) -> u128 {
        self.random.borrow_mut().u128(..)
    }

    /// Whether the gateway is on its way out.
    #[must_use]
    pub fn draining(&self) -> bool {
        self.draining.get()
    }

    /// Has all open sockets judged by the policy in force, after what runs now.
    pub fn rejudge_soon(&self) {
        self.rejudge.notify_one();
    }

    /// Keeps a connection within reach, for as long as the guard lives, to hold its certificate against another policy.
    pub fn certify(self: &Rc<Self>, connection: &Arc<Connection>) -> CertifiedGuard {
        let number = self.next_certified.get();
        self.next_certified.set(number + 1);
        self.certified.borrow_mut().insert(number, Arc::downgrade(connection));
        CertifiedGuard(self.clone(), number)
    }

    /// Ends connections whose client certificates the policy in force does not take any more; in slices, so that nothing waits.
    async fn recheck_certificates(&self) {
        let snapshot = self.snapshot();
        let mut next = Some(0);
        while let Some(from) = next {
            let slice: Vec<_> = {
                let certified = self.certified.borrow();
                certified.range(from..).take(CERTIFIED_SLICE).map(|(at, it)| (*at, it.clone())).collect()
            };
            next = slice.last().map(|(at, _)| at + 1);
            for connection in slice.iter().filter_map(|(_, connection)| connection.upgrade()) {
                if !connection.is_still_good(&snapshot) {
                    tracing::info!(
                        target: "sealgate::audit",
                        activity = "client-certificate-withdrawn",
                        peer = %connection.peer,
                        client = connection.client.as_ref().map(Client::thumbprint_text),
                    );
                    connection.ending.notify_one();
                }
            }
            tokio::task::yield_now().await;
        }
    }

    /// Counts a connection or tunnel as open until the guard drops.
    pub fn count_open(&self) -> OpenGuard {
        self.open.set(self.open.get() + 1);
        OpenGuard(self.open.clone())
    }
}

/// One connection within reach of its core.
pub struct CertifiedGuard(Rc<Core>, u64);

impl Drop for CertifiedGuard {
    fn drop(&mut self) {
        self.0.certified.borrow_mut().remove(&self.1);
    }
}

/// One open connection of a core.
pub struct OpenGuard(Rc<Cell<usize>>);

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// Runs a core on the calling thread until the gateway has drained.
///
/// # Errors
///
/// The runtime or a listener could not be set up.
pub fn run(gateway: Arc<Gateway>, index: usize, listeners: Listeners, inbox: Inbox) -> std::io::Result<()> {
    let core =
        Core::new(gateway, index).map_err(|_| std::io::Error::other("the system gives no random bytes"))?;
    // Not a `LocalSet`: that one wakes the runtime through an eventfd for every task that I/O wakes.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(async move {
        let tls = listeners.tls.into_iter().map(|listener| (Scheme::Https, listener));
        let plain = listeners.plain.into_iter().map(|listener| (Scheme::Http, listener));
        let listeners = tls
            .chain(plain)
            .map(|(scheme, listener)| TcpListener::from_std(listener).map(|listener| (scheme, listener)))
            .collect::<Result<Vec<_>, _>>()?;
        let core = Rc::new(core);
        // Beside everything else, and to the very end: a socket that drains can still be revoked.
        tokio::task::spawn_local(read_inbox(core.clone(), inbox));
        drive(core, listeners).await;
        Ok(())
    })
}

/// What is spoken on a listener.
#[derive(Clone, Copy)]
enum Scheme {
    Https,
    Http,
}

async fn drive(core: Rc<Core>, listeners: Vec<(Scheme, TcpListener)>) {
    let mut stop = core.gateway.stop.subscribe();
    let accepting: Vec<_> = listeners
        .into_iter()
        .map(|(scheme, listener)| tokio::task::spawn_local(accept_loop(core.clone(), scheme, listener)))
        .collect();
    tokio::select! {
        // A sender that is gone means the same as `true`.
        _ = stop.wait_for(|stop| *stop) => {}
        () = follow_policy(&core) => {}
    }
    for task in &accepting {
        task.abort();
    }
    for task in accepting {
        let _ = task.await;
    }
    core.draining.set(true);
    core.drain.notify_waiters();
    let snapshot = core.snapshot();
    let limits = snapshot.policy.connections();
    let ending = async {
        drain(&core, limits.drain_jitter).await;
        while core.open.get() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let _ = tokio::time::timeout(limits.drain_timeout, ending).await;
    if core.open.get() > 0 {
        tracing::warn!(connections = core.open.get(), "the drain deadline passed; closing what is left");
    }
}

/// Has open sockets judged anew whenever the policy changes.
async fn follow_policy(core: &Core) {
    let mut changes = core.gateway.outliving.changes.subscribe();
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = core.rejudge.notified() => {}
        }
        // Sockets first: they are told why.
        rejudge(core).await;
        core.recheck_certificates().await;
    }
}

/// Does what the rest of the gateway tells this core.
async fn read_inbox(core: Rc<Core>, mut inbox: Inbox) {
    while let Some(mail) = inbox.next().await {
        match mail {
            Mail::Notice(Notice::Revoked { target, issued_before, closed }) => {
                let revocation = Revocation { target: target.borrowed(), issued_before, until: u64::MAX };
                // Has room for every core; nobody may be left to hear it.
                let _ = closed.try_send(revoke(&core, &revocation));
            }
            Mail::Notice(Notice::List { query, found }) => {
                let core = core.clone();
                // Slice by slice, and nothing waits behind it.
                tokio::task::spawn_local(async move {
                    let _ = found.try_send(list(&core, &query).await);
                });
            }
            Mail::Notice(Notice::Displaced(id)) => displace(&core, id),
            Mail::Notice(Notice::Ended { sessions, end }) => end_sessions(&core, &sessions, end),
            Mail::Notice(Notice::ContactLost) => contact_lost(&core).await,
            Mail::Missed => {
                sweep(&core).await;
                contact_lost(&core).await;
            }
        }
    }
}

async fn accept_loop(core: Rc<Core>, scheme: Scheme, listener: TcpListener) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => receive(&core, scheme, stream, peer),
            Err(error) if transient(&error) => {}
            Err(error) => {
                core.gateway.metrics().accept_failed();
                tracing::warn!(%error, "cannot accept; resting");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

fn receive(core: &Rc<Core>, scheme: Scheme, stream: TcpStream, peer: SocketAddr) {
    let peer = canonical(peer);
    let snapshot = core.snapshot();
    if snapshot.policy.connections().is_proxy(peer.ip()) {
        tokio::task::spawn_local(receive_from_proxy(core.clone(), snapshot, scheme, stream, peer));
    } else {
        admit(core, snapshot, scheme, stream, peer);
    }
}

/// An IPv4 client is one client, whichever socket it came through.
fn canonical(peer: SocketAddr) -> SocketAddr {
    SocketAddr::new(peer.ip().to_canonical(), peer.port())
}

/// Learns from a load balancer whom a connection is from.
async fn receive_from_proxy(
    core: Rc<Core>,
    snapshot: Arc<Snapshot>,
    scheme: Scheme,
    mut stream: TcpStream,
    proxy: SocketAddr,
) {
    let _open = core.count_open();
    let refuse = |reason| core.gateway.metrics().connection_refused(reason);
    let counted = match accept::permit_proxy(&core, &snapshot, proxy) {
        Ok(counted) => counted,
        Err(denial) => return refuse(denial.reason()),
    };
    let limit = snapshot.policy.connections().handshake_timeout;
    let taken = tokio::select! {
        taken = tokio::time::timeout(limit, proxy::take_header(&mut stream)) => taken,
        () = core.drain.notified() => return,
    };
    let peer = match taken {
        Ok(Ok(Source::Client(client))) => canonical(client),
        Ok(Ok(Source::Itself)) => proxy,
        Ok(Err(error)) => {
            tracing::warn!(%proxy, %error, "no PROXY header");
            return refuse("no-proxy-header");
        }
        Err(_) => {
            tracing::warn!(%proxy, "no PROXY header in time");
            return refuse("no-proxy-header");
        }
    };
    drop(counted);
    admit(&core, snapshot, scheme, stream, peer);
}

fn admit(core: &Rc<Core>, snapshot: Arc<Snapshot>, scheme: Scheme, stream: TcpStream, peer: SocketAddr) {
    match accept::permit(core, &snapshot, peer) {
        Ok((permit, counted)) => match scheme {
            Scheme::Https => {
                tokio::task::spawn_local(accept::serve(
                    core.clone(),
                    snapshot,
                    stream,
                    peer,
                    permit,
                    counted,
                ));
            }
            Scheme::Http => {
                tokio::task::spawn_local(plain::serve(core.clone(), snapshot, stream, permit, counted));
            }
        },
        // Dropping the socket closes it: before TLS there is no better answer.
        Err(denial) => core.gateway.metrics().connection_refused(denial.reason()),
    }
}

/// The connection failed before it was accepted; the next one may be fine.
fn transient(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted | WouldBlock)
}
