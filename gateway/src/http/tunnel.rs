//! From a permit to an open WebSocket, and what may happen to it while it is open.

use std::{
    cell::{Cell, RefCell},
    io,
    pin::Pin,
    rc::{Rc, Weak},
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header, request};
use hyper::{body::Incoming, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use sealgate_policy::{
    Binding, Compression, Denial, Evidence, Identity, Mode, OnLoss, RateExceeded, RateFacts, RateIndex,
    Renewal, RequestFacts, RequestPermit, SessionId, TunnelPermit, settle,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{
    body::ResponseBody,
    exchange::Exchange,
    headers::{self, Trusted},
    walk::{Answer, Door, verified},
};
use crate::{
    audit, clock,
    edge::{Connection, Core, EdgeStream},
    events::Sources,
    limits::{Rates, Settling, SocketFacts, SocketGuard},
    reload::Snapshot,
    session::{Listing, Registration, Registry, Revocation, Rows, Session, SessionEnd, SessionQuery},
    shared::Shared,
    upstream::{Chosen, ConnectError, Key, Tries, Underway, UpstreamStream},
    websocket::{
        deflate::Agreed,
        handshake::{Offer, Switched, UpstreamError, UpstreamRequest},
        relay::{EndedBy, Order, Orders, RateTaker, Renewer, Terms, Tunnel, TunnelEnd},
    },
};

/// Sockets that are looked at in one go, before messages get their turn again.
const SLICE: u32 = 128;

/// Live WebSockets of a core.
pub type Sockets = Registry<OpenSocket>;

/// How the rest of the gateway reaches one open WebSocket.
pub struct OpenSocket {
    orders: Rc<Orders>,
    opening: Opening,
    /// When the session began, unix seconds: the earliest that any of its tokens here has said.
    began: Cell<u64>,
    /// Whose clock its messages move.
    session: RefCell<Option<Arc<Session>>>,
    /// Name of the rule that it is under.
    route: RefCell<Arc<str>>,
}

/// What the upgrade was judged by, kept to judge it anew when the policy changes.
struct Opening {
    connection: Arc<Connection>,
    /// GET, or CONNECT over HTTP/2.
    method: Method,
    host: Box<str>,
    path_and_query: Box<str>,
    origin: Option<HeaderValue>,
    subprotocols: Option<HeaderValue>,
    /// Unix seconds.
    opened_at: u64,
    /// Names it, over all policies that it lives through.
    socket: u64,
}

/// Opens the WebSocket that `permit` allows: connects upstream, registers, checks revocation, and only
/// then answers 101, or 200 over HTTP/2.
pub async fn open(
    door: Door,
    permit: RequestPermit,
    session: Option<Arc<Session>>,
    request: Box<Request<Incoming>>,
    mut exchange: Box<Exchange>,
) -> Answer {
    match try_open(&door, permit, session, request, &exchange).await {
        Ok((status, fields)) => {
            exchange.answered(status);
            let mut response = Response::new(ResponseBody::held(bytes::Bytes::new(), None, exchange));
            *response.status_mut() = status;
            *response.headers_mut() = fields;
            Ok(response)
        }
        Err(denial) => Err((denial, exchange)),
    }
}

async fn try_open(
    door: &Door,
    permit: RequestPermit,
    session: Option<Arc<Session>>,
    mut request: Box<Request<Incoming>>,
    exchange: &Exchange,
) -> Result<(StatusCode, HeaderMap), Denial> {
    let Door { core, connection, snapshot, target } = door;
    let offer = Offer::read(request.method(), request.version(), request.headers())?;
    let opening = Opening::of(connection, &target.host, &request, core.random() as u64);
    let permit = permit.into_tunnel().ok_or(Denial::NoWebsocket)?.of_socket(opening.socket);
    let deflate = match permit.compression() {
        Compression::Off => None,
        Compression::Terminate => Agreed::accept(request.headers())?,
    };
    let counted = count(door, &permit)?;
    let upgrade = hyper::upgrade::on(&mut *request);
    let (parts, _) = request.into_parts();
    let (upstream, switched, underway) = connect(door, &permit, &offer, parts, exchange).await?;

    // INVARIANT: registered first, revocation checked second, answered third: a revocation that comes
    // between finds the socket, one that came before is seen here.
    let orders = Orders::new();
    let identity = permit.identity().cloned();
    let began = identity.as_deref().and_then(Identity::began).unwrap_or(opening.opened_at);
    let socket = OpenSocket {
        orders: orders.clone(),
        opening,
        began: Cell::new(began),
        session: RefCell::new(session.clone()),
        route: RefCell::new(permit.rule().name.clone()),
    };
    let registration =
        core.sockets.register(identity.clone(), socket).map(Rc::new).map_err(|_| Denial::Overloaded)?;
    if identity.as_deref().is_some_and(|it| core.gateway.revocations.is_revoked(it, clock::unix_now())) {
        return Err(Denial::Revoked);
    }
    if let Some(end) = session.as_deref().and_then(Session::ended) {
        return Err(end.denial());
    }
    if identity.is_some() && core.gateway.lost(&snapshot.policy) == Some(OnLoss::FailClosed) {
        return Err(Denial::ContactLost);
    }
    if core.draining() {
        // Those that were open have been told already.
        return Err(Denial::Restarting);
    }
    let counted = counted.map(|guard| CountedSocket::settle(core, guard, &orders)).transpose()?;
    if core.snapshot().generation != snapshot.generation {
        // The policy changed while the upstream answered; the new one may not agree.
        core.rejudge_soon();
    }

    let mut fields: HeaderMap = offer.answer(switched.subprotocol.as_ref()).collect();
    fields.extend(deflate.map(|agreed| (header::SEC_WEBSOCKET_EXTENSIONS, agreed.answer())));
    snapshot.answers.add(&mut fields, exchange.id);
    let record = TunnelRecord { core: core.clone(), connection: connection.clone(), registration };
    let rates = snapshot_rates(core, snapshot);
    let terms = terms(core, snapshot, &rates, permit, began, session, connection);
    // Over HTTP/2 the connection goes on, and must not be taken for idle.
    let busy = connection.tls.http2.then(|| connection.busy());
    let (open, place) = (core.count_open(), exchange.take_place());
    tokio::task::spawn_local(async move {
        let (_counted, _open, _busy, _place, _underway) = (counted, open, busy, place, underway);
        match upgrade.await {
            Ok(upgraded) => record.run(upgraded, upstream, switched, deflate, terms, orders).await,
            Err(error) => tracing::debug!(%error, "the client left during the upgrade"),
        }
    });
    Ok((offer.status(), fields))
}

/// Counts the socket where the rule limits how many may be open; before anything is spent on it upstream.
fn count(door: &Door, permit: &TunnelPermit) -> Result<Option<SocketGuard>, Denial> {
    let Some(limits) = permit.max_open() else { return Ok(None) };
    let identity = permit.identity().map(Arc::as_ref);
    let facts = SocketFacts {
        rule: &permit.rule().name,
        subject: identity.map(|identity| (&*identity.issuer, identity.subject.as_str())),
        session: identity.and_then(|identity| identity.session.as_deref()),
        address: permit.address(),
        core: door.core.index,
    };
    let gateway = &door.core.gateway;
    match gateway.sockets.open(limits, &facts) {
        Ok(guard) => Ok(Some(guard)),
        Err(_) if permit.rule().mode == Mode::Shadow => {
            gateway.metrics().shadow_denied(Denial::TooManySockets.reason());
            Ok(None)
        }
        Err(_) => Err(Denial::TooManySockets),
    }
}

/// An open socket that counts against a limit, within reach of those that take its place.
struct CountedSocket {
    core: Rc<Core>,
    guard: SocketGuard,
}

impl CountedSocket {
    /// Takes the place, and closes those that had it.
    fn settle(core: &Rc<Core>, guard: SocketGuard, orders: &Rc<Orders>) -> Result<Self, Denial> {
        // INVARIANT: within reach first: from the moment it is settled, another core may displace it.
        core.counted.borrow_mut().insert(guard.id(), orders.clone());
        let counted = Self { core: core.clone(), guard };
        for displaced in counted.guard.settle().map_err(|_| Denial::TooManySockets)? {
            core.gateway.displace(displaced);
        }
        Ok(counted)
    }
}

impl Drop for CountedSocket {
    fn drop(&mut self) {
        self.core.counted.borrow_mut().remove(&self.guard.id());
    }
}

/// Connects to the upstream and agrees on a WebSocket with it.
async fn connect(
    door: &Door,
    permit: &TunnelPermit,
    offer: &Offer,
    mut parts: request::Parts,
    exchange: &Exchange,
) -> Result<(UpstreamStream, Switched, Underway), Denial> {
    let Door { core, connection, snapshot, target } = door;
    let upstream = snapshot.upstreams.of(permit.upstream()).ok_or(Denial::Internal)?;
    let identity = permit.identity().map(Arc::as_ref);
    let subject = identity.map(|identity| identity.subject.as_str());
    let members = upstream.members();
    let mut tries = Tries::begin(upstream, members, Key { subject, client: connection.peer.ip() });
    let mut chosen = tries.first()?;
    let subprotocols = offer.subprotocols(permit.subprotocols(), permit.subprotocol_required())?;

    headers::strip_request(&mut parts.headers, identity.is_some());
    parts.headers.remove(header::HOST);
    let trusted = Trusted {
        identity,
        origin: &connection.origin,
        target,
        id: exchange.id,
        span: core.random() as u64,
        certificate: connection.vouched(snapshot),
    };
    trusted.each(&mut |name, value| {
        parts.headers.insert(name, value.clone());
    });
    let path_and_query = match parts.uri.query() {
        Some(query) => format!("{}?{query}", permit.path()),
        None => permit.path().to_owned(),
    };
    let failed = |error: &dyn std::fmt::Display| {
        upstream.counters.unanswered.inc();
        tracing::warn!(upstream = %upstream.name, %error, "no WebSocket to the backend");
    };
    let authority = target.authority.to_str().unwrap_or_default();
    let request = UpstreamRequest::new(&path_and_query, authority, &parts.headers, &subprotocols)
        .inspect_err(|error| failed(error))
        .map_err(|_| Denial::Internal)?;
    let mut stream = loop {
        let error = match upstream.connect(chosen.endpoint).await {
            Ok(stream) => break stream,
            Err(error) => error,
        };
        if !error.is_ours() {
            chosen.underway.failed();
        }
        // Nothing was sent yet. After that a WebSocket is not asked for again: it may have been opened.
        chosen =
            tries.connect_next(error).inspect_err(|error| failed(error)).map_err(|error| match error {
                ConnectError::TimedOut => Denial::UpstreamTimeout,
                ConnectError::Io(_) => Denial::UpstreamUnavailable,
            })?;
    };
    let Chosen { mut underway, .. } = chosen;
    let switched = tokio::time::timeout(upstream.response_timeout, request.exchange(&mut stream)).await;
    match switched {
        Ok(Ok(switched)) => {
            tries.answered();
            underway.ended();
            Ok((stream, switched, underway))
        }
        Ok(Err(error)) => {
            failed(&error);
            match error {
                UpstreamError::Status(status) => underway.answered(status),
                UpstreamError::Io(_) | UpstreamError::NotHttp | UpstreamError::NotAgreed(_) => {
                    underway.failed()
                }
                UpstreamError::Request | UpstreamError::Random => {}
            }
            Err(Denial::UpstreamUnavailable)
        }
        Err(_) => {
            failed(&"no answer within the time allowed");
            underway.failed();
            Err(Denial::UpstreamTimeout)
        }
    }
}

/// The account of one open WebSocket.
struct TunnelRecord {
    core: Rc<Core>,
    connection: Arc<Connection>,
    /// The socket is registered for as long as its account is open.
    registration: Rc<Registration<OpenSocket>>,
}

impl TunnelRecord {
    async fn run(
        self,
        upgraded: Upgraded,
        upstream: UpstreamStream,
        switched: Switched,
        deflate: Option<Agreed>,
        terms: Terms,
        orders: Rc<Orders>,
    ) {
        let rule = terms.permit.rule().clone();
        let identity = terms.permit.identity().cloned();
        let renewer: Rc<dyn Renewer> = Rc::new(SocketRenewer {
            core: self.core.clone(),
            registration: Rc::downgrade(&self.registration),
        });
        // On HTTP/1.1 the stream is our own: hyper and its buffers go. Over HTTP/2 it is one of several.
        let end = match upgraded.downcast::<TokioIo<EdgeStream>>() {
            Ok(parts) => {
                let tunnel = Tunnel {
                    downstream: parts.io.into_inner().upgraded(),
                    upstream,
                    downstream_early: parts.read_buf,
                    upstream_early: switched.early,
                    deflate,
                    terms,
                    renewer,
                    orders,
                };
                tunnel.run().await
            }
            Err(upgraded) => {
                let tunnel = Tunnel {
                    downstream: SharedStream(TokioIo::new(upgraded)),
                    upstream,
                    downstream_early: bytes::Bytes::new(),
                    upstream_early: switched.early,
                    deflate,
                    terms,
                    renewer,
                    orders,
                };
                tunnel.run().await
            }
        };
        self.core.gateway.metrics().closed(end.code, by(&end));
        audit::tunnel(&audit::TunnelRecord {
            peer: self.connection.peer,
            route: &rule.name,
            identity: identity.as_deref(),
            client: self.connection.client.as_ref(),
            by: by(&end),
            end: &end,
        });
    }
}

/// One stream of an HTTP/2 connection.
///
/// hyper takes whatever is written at once into a box, and up to four boxes before it waits for the client's window:
/// short writes bound what a client that reads nothing can pin.
struct SharedStream(TokioIo<Upgraded>);

/// Most bytes given to hyper at once: a DATA frame of the usual size.
const SHARED_WRITE: usize = 16 * 1024;

impl AsyncRead for SharedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for SharedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let most = buf.len().min(SHARED_WRITE);
        Pin::new(&mut self.0).poll_write(cx, buf.get(..most).unwrap_or_default())
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

fn by(end: &TunnelEnd) -> &'static str {
    match end.by {
        EndedBy::Client => "client",
        EndedBy::Upstream => "upstream",
        EndedBy::Gateway => "gateway",
    }
}

/// The rates of one snapshot. Their cells are the process's.
struct SnapshotRates {
    rates: Arc<Rates>,
    shared: Arc<Shared>,
    sources: Arc<Sources>,
    /// What the snapshot's policy wants while contact with other gateways is lost.
    on_loss: Option<OnLoss>,
}

impl RateTaker for SnapshotRates {
    fn take(&self, wanted: &[RateIndex], facts: &RateFacts<'_>) -> Result<Option<Settling>, RateExceeded> {
        self.rates.take_owed(&self.shared, wanted, facts)
    }

    fn lost(&self) -> Option<OnLoss> {
        self.on_loss.filter(|_| self.shared.is_lost()).max(self.sources.lost())
    }
}

fn snapshot_rates(core: &Core, snapshot: &Snapshot) -> Rc<dyn RateTaker> {
    Rc::new(SnapshotRates {
        rates: snapshot.rates.clone(),
        shared: core.gateway.shared.clone(),
        sources: core.gateway.sources.clone(),
        on_loss: snapshot.policy.shared().map(|shared| shared.on_loss),
    })
}

/// What a socket of a session that began at `began` is judged by from now on.
fn terms(
    core: &Core,
    snapshot: &Snapshot,
    rates: &Rc<dyn RateTaker>,
    permit: TunnelPermit,
    began: u64,
    session: Option<Arc<Session>>,
    connection: &Connection,
) -> Terms {
    // No socket outlives the certificate that it came with.
    let certified = connection.client.as_ref().map(|client| client.certificate.expires_at);
    let session_ends = permit.identity().map(|_| snapshot.policy.session().ends_at(began));
    Terms {
        rates: rates.clone(),
        decisions: core.decisions.clone(),
        metrics: snapshot.metrics.of(Some(permit.rule())).tunnel.clone(),
        session_ends: session_ends.into_iter().chain(certified).min(),
        session,
        clock: (tokio::time::Instant::now(), SystemTime::now()),
        permit,
    }
}

/// Judges new tokens for one open socket.
struct SocketRenewer {
    core: Rc<Core>,
    /// Not kept alive by a renewal that is under way when the socket ends.
    registration: Weak<Registration<OpenSocket>>,
}

impl Renewer for SocketRenewer {
    fn renew(&self, renewal: Renewal) {
        let (core, registration) = (self.core.clone(), self.registration.clone());
        tokio::task::spawn_local(async move {
            let outcome = judge_renewal(&core, &registration, renewal).await;
            if let Some(registration) = registration.upgrade() {
                registration.with(|socket, _| socket.orders.give(Order::Renewal(outcome)));
            }
        });
    }
}

async fn judge_renewal(
    core: &Core,
    registration: &Weak<Registration<OpenSocket>>,
    renewal: Renewal,
) -> Result<Box<Terms>, Denial> {
    let snapshot = core.snapshot();
    let new = verified(core, &snapshot, renewal.token(), clock::unix_now()).await?;
    drop(renewal);
    // Of the same session, or it would be refused below: then it begins none. No activity: clients renew by themselves.
    registration
        .upgrade()
        .and_then(|registration| registration.with(|_, old| old.map(|old| old.renewed_by(&new))))
        .flatten()
        .ok_or(Denial::Internal)??;
    let session = core.gateway.session(&snapshot.policy, &new, clock::unix_now()).await?;
    // From here on nothing waits, so nothing comes between.
    let registration = registration.upgrade().ok_or(Denial::Internal)?;
    let judge = |socket: &OpenSocket, old: Option<&Arc<Identity>>| -> Result<Terms, Denial> {
        old.ok_or(Denial::Internal)?.renewed_by(&new)?;
        socket.began.set(socket.began.get().min(new.began().unwrap_or(u64::MAX)));
        let permit =
            socket.opening.judge(core, &snapshot, Some(new.clone())).map_err(|_| Denial::PolicyChanged)?;
        *socket.session.borrow_mut() = Some(session.clone());
        let rates = snapshot_rates(core, &snapshot);
        let (session, connection) = (Some(session.clone()), &socket.opening.connection);
        Ok(terms(core, &snapshot, &rates, permit, socket.began.get(), session, connection))
    };
    let terms = registration.with(judge).ok_or(Denial::Internal)??;
    // INVARIANT: found by the new token first, its revocation looked up second, as at the opening.
    registration.identify(new.clone());
    if let Some(end) = session.ended() {
        return Err(end.denial());
    }
    if core.gateway.revocations.is_revoked(&new, clock::unix_now()) {
        return Err(Denial::Revoked);
    }
    if core.snapshot().generation != snapshot.generation {
        core.rejudge_soon();
    }
    Ok(Box::new(terms))
}

impl Opening {
    fn of<B>(connection: &Arc<Connection>, host: &str, request: &Request<B>, socket: u64) -> Self {
        // Copies: a value that hyper read keeps all of the read buffer alive, as long as the socket is open.
        let one = |name| HeaderValue::from_bytes(request.headers().get(name)?.as_bytes()).ok();
        Self {
            connection: connection.clone(),
            method: request.method().clone(),
            host: host.into(),
            path_and_query: request.uri().path_and_query().map_or("/", |it| it.as_str()).into(),
            origin: one(header::ORIGIN),
            subprotocols: one(header::SEC_WEBSOCKET_PROTOCOL),
            opened_at: clock::unix_now(),
            socket,
        }
    }

    /// Judges the upgrade by another policy. It is not charged again for what it took from rates.
    fn judge(
        &self,
        core: &Core,
        snapshot: &Snapshot,
        identity: Option<Arc<Identity>>,
    ) -> Result<TunnelPermit, Denial> {
        let fields = [(header::ORIGIN, &self.origin), (header::SEC_WEBSOCKET_PROTOCOL, &self.subprotocols)];
        let headers: HeaderMap =
            fields.into_iter().filter_map(|(name, value)| Some((name, value.clone()?))).collect();
        let (path, query) = match self.path_and_query.split_once('?') {
            Some((path, query)) => (path, Some(query)),
            None => (&*self.path_and_query, None),
        };
        let facts = RequestFacts {
            peer: self.connection.peer.ip(),
            host: &self.host,
            method: &self.method,
            path,
            query,
            headers: &headers,
            websocket: true,
            content_length: None,
            has_body: false,
            tls: self.connection.tls_facts(),
            certificate: self.connection.client.as_ref().map(|client| &client.certificate),
        };
        self.connection.admits(snapshot, &self.host, clock::unix_now())?;
        // That its key is the sender's was proved when the socket was opened, and then its login had to be fresh. The certificate is
        // there to be looked at.
        let key = identity.as_deref().and_then(|identity| identity.binding.key);
        let proven = Binding { key, certificate: self.connection.thumbprint() };
        let demands = snapshot.policy.match_request(&facts)?.judge(&facts, identity)?;
        let demands = demands.prove(proven, self.opened_at, &core.decisions)?;
        let permit = settle(demands, Evidence { rates: Ok(()), revoked: false, lost: None })?;
        Ok(permit.into_tunnel().ok_or(Denial::PolicyChanged)?.of_socket(self.socket))
    }
}

/// Looks at all open sockets of a core, in slices, so that no message waits.
async fn in_slices(core: &Core, mut look: impl FnMut(&OpenSocket, Option<&Arc<Identity>>)) {
    let mut next = Some(0);
    while let Some(from) = next {
        next = core.sockets.slice(from, SLICE, &mut look);
        tokio::task::yield_now().await;
    }
}

/// Judges all open sockets of a core by the policy in force now.
pub async fn rejudge(core: &Core) {
    let snapshot = core.snapshot();
    let rates = snapshot_rates(core, &snapshot);
    in_slices(core, |socket, identity| {
        socket.orders.give(match socket.opening.judge(core, &snapshot, identity.cloned()) {
            Ok(permit) => {
                *socket.route.borrow_mut() = permit.rule().name.clone();
                let session = socket.session.borrow().clone();
                let (began, connection) = (socket.began.get(), &socket.opening.connection);
                let terms = terms(core, &snapshot, &rates, permit, began, session, connection);
                Order::Policy(Box::new(terms))
            }
            Err(denial) => {
                tracing::debug!(reason = denial.reason(), "an open socket is no longer allowed");
                Order::Close(Denial::PolicyChanged)
            }
        });
    })
    .await;
}

/// Closes the open sockets of a core that the revocation ends; says how many there were.
pub fn revoke(core: &Core, revocation: &Revocation<'_>) -> usize {
    let mut closed = 0;
    core.sockets.for_each(&revocation.target, |socket, identity| {
        if revocation.ends(identity) {
            socket.orders.give(Order::Close(Denial::Revoked));
            closed += 1;
        }
    });
    closed
}

/// The open sockets of a core that are asked for, by session.
pub async fn list(core: &Core, query: &SessionQuery) -> Rows {
    let mut listing = Listing::new(query);
    in_slices(core, |socket, identity| {
        listing.add(identity.map(Arc::as_ref), socket.opening.opened_at, &socket.route.borrow());
    })
    .await;
    listing.into_rows()
}

/// Closes the socket of a core whose place a newer one took.
pub fn displace(core: &Core, id: u64) {
    if let Some(orders) = core.counted.borrow().get(&id) {
        orders.give(Order::Close(Denial::SessionReplaced));
    }
}

/// Closes the open sockets of a core whose sessions have ended.
pub fn end_sessions(core: &Core, sessions: &[SessionId], end: SessionEnd) {
    for session in sessions {
        core.sockets.for_each_of(*session, |socket| socket.orders.give(Order::Close(end.denial())));
    }
}

/// Holds all open sockets of a core against the revocations, the ends of sessions, and the limits of open sockets.
pub async fn sweep(core: &Core) {
    for (id, orders) in &*core.counted.borrow() {
        if !core.gateway.sockets.holds(*id) {
            orders.give(Order::Close(Denial::SessionReplaced));
        }
    }
    let now = clock::unix_now();
    in_slices(core, |socket, identity| {
        if identity.is_some_and(|identity| core.gateway.revocations.is_revoked(identity, now)) {
            socket.orders.give(Order::Close(Denial::Revoked));
        } else if let Some(end) = socket.session.borrow().as_deref().and_then(Session::ended) {
            socket.orders.give(Order::Close(end.denial()));
        }
    })
    .await;
}

/// Closes the open sockets of a core that belong to sessions, where the policy wants that while contact with other gateways or a
/// source of revocations is lost. They may have been revoked.
pub async fn contact_lost(core: &Core) {
    let snapshot = core.snapshot();
    in_slices(core, |socket, identity| {
        // It may be back by now.
        if identity.is_some() && core.gateway.lost(&snapshot.policy) == Some(OnLoss::FailClosed) {
            socket.orders.give(Order::Close(Denial::ContactLost));
        }
    })
    .await;
}

/// Tells all open sockets of a core to close, because the gateway goes down: at even chances over the time `jitter`, so that
/// their clients do not come back all at once.
pub async fn drain(core: &Core, jitter: Duration) {
    let mut all = Vec::with_capacity(core.sockets.len());
    in_slices(core, |socket, _| {
        // 32 bits are fine enough for a time that people choose.
        let share = f64::from(core.random() as u32) / f64::from(u32::MAX);
        all.push((jitter.mul_f64(share), socket.orders.clone()));
    })
    .await;
    all.sort_unstable_by_key(|(delay, _)| *delay);
    let start = tokio::time::Instant::now();
    for (told, (delay, orders)) in all.into_iter().enumerate() {
        // One that is gone by itself is not waited for.
        if Rc::strong_count(&orders) == 1 {
            continue;
        }
        if !delay.is_zero() {
            tokio::time::sleep_until(start + delay).await;
        } else if told as u32 % SLICE == SLICE - 1 {
            tokio::task::yield_now().await;
        }
        orders.give(Order::Close(Denial::Restarting));
    }
}
