//! The request walk: facts, token, judgement, and only then the way to a backend.

use std::{
    convert::Infallible,
    future::poll_fn,
    rc::Rc,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use http::{Request, Response, StatusCode, header};
use hyper::body::{Body as _, Incoming};
use sealgate_policy::{
    Authentication, Binding, Denial, Evidence, Identity, Mode, ProofFault, RequestFacts, RequestPermit,
    RouteMatch, TokenFault, settle,
};

use super::{
    body::ResponseBody, exchange::Exchange, forward, logout, refusal, target::Target, ticket, tunnel,
};
use crate::{
    clock,
    edge::{Connection, Core},
    limits::{LoadLevel, RateStanding},
    reload::Snapshot,
    session::{self, Asked, Scheme, Session, Token, TokenFailure},
    shared::{Taken, Together},
};

/// How long a request waits for its issuer's new keys.
pub(super) const KEY_PATIENCE: Duration = Duration::from_secs(2);

/// Answers one request. Never fails: a refusal is an answer, and so is a fault.
///
/// hyper moves this future for every request, and the steps below hand on what they are given: what is large is in a box.
///
/// # Errors
///
/// None; the type is what hyper asks for.
pub async fn serve(
    core: Rc<Core>,
    connection: Arc<Connection>,
    request: Box<Request<Incoming>>,
) -> Result<Response<ResponseBody>, Infallible> {
    let snapshot = core.snapshot();
    let exchange =
        Exchange::begin(core.clone(), connection.clone(), snapshot.clone(), request.method().clone());
    if let Some(denial) = connection.stands_in(request.method()) {
        return Ok(refusal::response(denial, &snapshot, None, exchange));
    }
    let may_upgrade = !connection.tls.http2 && request.headers().contains_key(header::UPGRADE);
    let response = answer(core, &connection, &snapshot, request, exchange).await;
    if may_upgrade && response.status() != StatusCode::SWITCHING_PROTOCOLS {
        connection.upgrade_refused();
        // What came behind it is held by the stream, which is looked at only when it is asked.
        poll_fn(|cx| {
            cx.waker().wake_by_ref();
            Poll::Ready(())
        })
        .await;
    }
    Ok(response)
}

async fn answer(
    core: Rc<Core>,
    connection: &Arc<Connection>,
    snapshot: &Arc<Snapshot>,
    request: Box<Request<Incoming>>,
    mut exchange: Box<Exchange>,
) -> Response<ResponseBody> {
    let admitted = match admit(&core, connection, snapshot, &request, &mut exchange).await {
        Ok(admitted) => admitted,
        Err(denial) => {
            let address = connection.peer.ip();
            if denial.is_guess()
                && let Some(block) = snapshot.penalties.token_failed(address, Instant::now())
            {
                core.gateway.penalize(address, block);
            }
            return refusal::response(&denial, snapshot, Some(request.into_body()), exchange);
        }
    };
    let door =
        Door { core, connection: connection.clone(), snapshot: snapshot.clone(), target: admitted.target };
    let answer = if let Some(rule) = admitted.permit.rule().ticket {
        match Box::pin(ticket::issue(&door, &admitted.permit, rule, request.headers())).await {
            Ok(ticket) => Ok(ticket::answer(&door, &ticket, rule, request.into_body(), exchange)),
            Err(denial) => Err((denial, exchange)),
        }
    } else if let Some(rule) = admitted.permit.rule().logout.as_ref() {
        Box::pin(logout::receive(door, &admitted.permit, rule, request, exchange)).await
    } else if door.target.websocket {
        // In a box: hyper moves this future for every request, and few become a WebSocket.
        Box::pin(tunnel::open(door, admitted.permit, admitted.session, request, exchange)).await
    } else {
        forward::forward(door, admitted.permit, admitted.standing, request, exchange).await
    };
    answer.unwrap_or_else(|(denial, exchange)| refusal::response(&denial, snapshot, None, exchange))
}

/// What the steps behind the judgement need.
pub struct Door {
    pub core: Rc<Core>,
    pub connection: Arc<Connection>,
    pub snapshot: Arc<Snapshot>,
    pub target: Target,
}

/// A step's answer; or a denial, with the account of the request to close.
pub type Answer = Result<Response<ResponseBody>, (Denial, Box<Exchange>)>;

struct Admitted {
    permit: RequestPermit,
    standing: Option<RateStanding>,
    /// Whose clock runs; none where the rule wants no token.
    session: Option<Arc<Session>>,
    target: Target,
}

async fn admit(
    core: &Rc<Core>,
    connection: &Connection,
    snapshot: &Snapshot,
    request: &Request<Incoming>,
    exchange: &mut Exchange,
) -> Result<Admitted, Denial> {
    let target = Target::read(request)?;
    // Read once: a request is judged at one moment.
    let now = clock::unix_now();
    connection.admits(snapshot, &target.host, now)?;
    let facts = RequestFacts {
        peer: connection.peer.ip(),
        host: &target.host,
        method: request.method(),
        path: request.uri().path(),
        query: request.uri().query(),
        headers: request.headers(),
        websocket: target.websocket,
        content_length: target.content_length,
        has_body: !request.body().is_end_stream(),
        tls: connection.tls_facts(),
        certificate: connection.client.as_ref().map(|client| &client.certificate),
    };
    if core.gateway.refuses(snapshot, facts.peer, now) {
        return Err(Denial::AddressRefused);
    }
    let matched = snapshot.policy.match_request(&facts)?;
    exchange.matched(matched.rule().clone());
    if let Some(access) = matched.access(&facts) {
        exchange.watched(access);
    }
    if snapshot.penalties.judges_tokens()
        && matched.authentication() == Authentication::Required
        && let Some(retry_after) = snapshot.penalties.token_wait(facts.peer, Instant::now())
    {
        return Err(Denial::TooManyFailures { retry_after });
    }
    if !matched.rule().is_exempt_from_shedding() {
        // Whoever has a session comes before strangers.
        let is_too_much = match core.gateway.load.level(snapshot.policy.overload()) {
            LoadLevel::Normal => false,
            LoadLevel::High => matched.authentication() == Authentication::None,
            LoadLevel::Full => true,
        };
        if is_too_much {
            return Err(Denial::Overloaded);
        }
    }
    let (identity, key) = match identify(core, snapshot, &matched, &facts, now).await? {
        Some((token, identity)) => {
            exchange.identified(identity.clone());
            let key = match token {
                Some(token) => prove(core, snapshot, &target, &facts, token, &identity, now).await?,
                // It was proved when the ticket was made.
                None => identity.binding.key,
            };
            (Some(identity), key)
        }
        None => (None, None),
    };
    let proven = Binding { key, certificate: connection.thumbprint() };
    // Before rates are taken: they are the owner's, and a stolen token must not use them up.
    let demands = matched.judge(&facts, identity.clone())?.prove(proven, now, &core.decisions)?;
    let rate_facts = demands.rate_facts(request.headers());
    if !demands.concurrency().is_empty() {
        match snapshot.concurrency.enter(demands.concurrency(), &rate_facts) {
            Ok(place) => exchange.placed(place),
            Err(_) if demands.rule().mode == Mode::Shadow => {
                core.gateway.metrics().shadow_denied(Denial::TooManyAtOnce.reason());
            }
            Err(_) => return Err(Denial::TooManyAtOnce),
        }
    }
    let taken = if snapshot.rates.shares(demands.rates()) {
        // In a box, as above: most rates are this gateway's own.
        Box::pin(snapshot.rates.take_shared(&core.gateway.shared, demands.rates(), &rate_facts)).await
    } else {
        snapshot.rates.take(demands.rates(), &rate_facts)
    };
    let revoked =
        identity.as_deref().is_some_and(|identity| core.gateway.revocations.is_revoked(identity, now));
    let lost = core.gateway.lost(&snapshot.policy);
    let (standing, rates) = match taken {
        Ok(standing) => (standing, Ok(())),
        Err(exceeded) => (None, Err(exceeded)),
    };
    let permit = settle(demands, Evidence { rates, revoked, lost })?;
    if let Some(denial) = permit.shadowed() {
        core.gateway.metrics().shadow_denied(denial.reason());
    }
    // Last: what is refused for another reason begins no session, and is nobody's activity.
    let session = match permit.identity() {
        None => None,
        Some(identity) => Some(core.gateway.session(&snapshot.policy, identity, now).await?),
    };
    if permit.rule().activity
        && let Some(session) = &session
    {
        session.touch(now);
    }
    Ok(Admitted { permit, standing, session, target })
}

/// Who asks, where the rule wants to know, and by which token; none for a ticket.
async fn identify<'a>(
    core: &Rc<Core>,
    snapshot: &Snapshot,
    matched: &RouteMatch,
    facts: &RequestFacts<'a>,
    now: u64,
) -> Result<Option<(Option<Token<'a>>, Arc<Identity>)>, Denial> {
    if matched.authentication() == Authentication::None {
        return Ok(None);
    }
    let token = session::bearer(facts.headers, facts.websocket).map_err(Denial::TokenInvalid)?;
    let ticket = if facts.websocket { session::ticket(facts.headers) } else { Ok(None) };
    let token = match (token, ticket.map_err(Denial::TokenInvalid)?) {
        (Some(token), None) => token,
        (None, Some(ticket)) => {
            return Box::pin(redeem(core, snapshot, ticket, facts, now)).await.map(|it| Some((None, it)));
        }
        (Some(_), Some(_)) => return Err(Denial::TokenInvalid(TokenFault::Twice)),
        (None, None) => return Err(Denial::TokenMissing),
    };
    let identity = verified(core, snapshot, token.as_str(), now).await?;
    Ok(Some((Some(token), identity)))
}

/// Who stands behind a token that counts at `now` (unix seconds), in a session that still runs.
pub async fn verified(
    core: &Core,
    snapshot: &Snapshot,
    token: &str,
    now: u64,
) -> Result<Arc<Identity>, Denial> {
    let verify = |now| snapshot.verifier.verify(token, now, &core.tokens);
    let identity = match verify(now) {
        // The issuer may have a new key; a client with a good token must not be sent to log in again.
        Err(TokenFailure::Fault(TokenFault::Key) | TokenFailure::KeysUnavailable)
            if Box::pin(snapshot.verifier.refreshed(token, KEY_PATIENCE)).await =>
        {
            verify(clock::unix_now())?
        }
        outcome => outcome?,
    };
    snapshot.policy.session().permit_session(&identity, now)?;
    Ok(identity)
}

/// Whose ticket it is, over all gateways. It counts no longer than the issuer of the token that it was made of.
async fn redeem(
    core: &Core,
    snapshot: &Snapshot,
    text: &str,
    facts: &RequestFacts<'_>,
    now: u64,
) -> Result<Arc<Identity>, Denial> {
    let invalid = Denial::TokenInvalid(TokenFault::Ticket);
    let gateway = &core.gateway;
    let name = session::ticket_name(text).ok_or(invalid.clone())?;
    let mine = gateway.tickets.take(text);
    let identity = match (mine, snapshot.policy.shared()) {
        (Some(ticket), Some(shared)) if ticket.is_shared() => match gateway.shared.take_ticket(&name).await {
            Together::Answer(Some(_)) | Together::Alone => ticket.redeem(facts.headers, now)?,
            // Another gateway took it.
            Together::Answer(None) => return Err(invalid),
            Together::Unknown if shared.tickets_fail_closed => return Err(Denial::ContactLost),
            Together::Unknown => ticket.redeem(facts.headers, now)?,
        },
        (Some(ticket), _) => ticket.redeem(facts.headers, now)?,
        (None, None) => return Err(invalid),
        (None, Some(_)) => match gateway.shared.take_ticket(&name).await {
            Together::Answer(Some(sealed)) => {
                let content = session::open_sealed(text, sealed).ok_or(invalid)?;
                session::fits(&content.origin, content.until, facts.headers, now)?;
                // Its sender proved to hold what it is bound to where the ticket was made.
                return verified(core, snapshot, &content.token, now).await;
            }
            Together::Answer(None) | Together::Alone => return Err(invalid),
            Together::Unknown => return Err(Denial::ContactLost),
        },
    };
    let known = snapshot.policy.issuers().iter().any(|issuer| issuer.issuer == *identity.issuer);
    if !known {
        return Err(Denial::TokenInvalid(TokenFault::Issuer));
    }
    snapshot.policy.session().permit_session(&identity, now)?;
    Ok(identity)
}

/// The key that the sender of a token proves to hold.
async fn prove(
    core: &Core,
    snapshot: &Snapshot,
    target: &Target,
    facts: &RequestFacts<'_>,
    token: Token<'_>,
    identity: &Identity,
    now: u64,
) -> Result<Option<[u8; 32]>, Denial> {
    if token.scheme() == Scheme::Bearer {
        return Ok(None);
    }
    let key = identity.binding.key.ok_or(Denial::TokenInvalid(TokenFault::Unbound))?;
    let proof = session::proof(facts.headers).map_err(Denial::ProofInvalid)?.ok_or(Denial::ProofMissing)?;
    let asked = Asked {
        method: facts.method,
        authority: target.authority.to_str().unwrap_or_default(),
        path: facts.path,
        websocket: facts.websocket,
        token: token.as_str(),
    };
    let accepted = core.gateway.proofs.check(proof, &asked, identity, snapshot.policy.dpop(), now)?;
    if let Some(shared) = snapshot.policy.shared() {
        // In a box: few policies name other gateways, and this future is moved for every request.
        match Box::pin(core.gateway.shared.take_once(&accepted.name(), accepted.ttl)).await {
            Taken::First | Taken::Alone => {}
            Taken::Again => return Err(Denial::ProofInvalid(ProofFault::Replayed)),
            Taken::Unknown if shared.dpop_fails_closed => return Err(Denial::ContactLost),
            Taken::Unknown => {}
        }
    }
    Ok(Some(key))
}
