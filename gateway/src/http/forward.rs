//! From a permit to a backend's answer.

use std::{
    cell::{Cell, OnceCell},
    rc::Rc,
    time::Instant,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, header};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use sealgate_policy::{AnswerRule, DecisionCache, Denial, Mode, Passes, RequestPermit};

use super::{
    body::{BodyLimits, Fate, RequestBody, ResponseBody},
    exchange::Exchange,
    headers::{self, Trusted},
    refusal,
    walk::{Answer, Door},
};
use crate::{
    edge::Core,
    limits::{Attempts, RateStanding},
    reload::Snapshot,
    upstream::{
        ConnectError, Key, Tries,
        http1::{Head, Http1Error},
        pool::SendError,
    },
};

/// Forwards what `permit` allows, and answers with what the backend says.
pub async fn forward(
    door: Door,
    permit: RequestPermit,
    standing: Option<RateStanding>,
    request: Box<Request<Incoming>>,
    mut exchange: Box<Exchange>,
) -> Answer {
    let Door { core, connection, snapshot, target } = door;
    let Some(upstream) = snapshot.upstreams.of(permit.upstream()) else {
        return Err((Denial::UpstreamUnavailable, exchange));
    };
    let identity = permit.identity().cloned();
    let subject = identity.as_ref().map(|identity| identity.subject.as_str());
    let (mut parts, incoming) = request.into_parts();
    let limits = BodyLimits::of(snapshot.policy.connections(), permit.body().max_bytes);
    // If its framing is at fault, the guard has said how.
    let of_body = |fate| match (fate, connection.condemned()) {
        (Fate::Broken, Some(denial)) => Some(denial.clone()),
        _ => denial_of(fate, limits.max_bytes),
    };
    let Taken { mut body, fate, verdict, account } =
        match take_body(incoming, &permit, limits, &core.decisions, &mut exchange).await {
            Ok(taken) => taken,
            Err(BodyFault::Denied(denial)) => return Err((denial, exchange)),
            Err(BodyFault::Broken(fate)) => {
                return Err((of_body(fate).unwrap_or(Denial::Internal), exchange));
            }
        };
    let members = upstream.members();
    let mut tries = Tries::begin(upstream, members, Key { subject, client: connection.peer.ip() });
    let mut chosen = match tries.first() {
        Ok(chosen) => chosen,
        Err(none) => return Err((none.into(), exchange)),
    };
    let attempts = match begin_attempts(&permit, &snapshot, account.as_deref(), &core) {
        Ok(attempts) => attempts,
        Err(denial) => return Err((denial, exchange)),
    };
    headers::remove_nominated(&mut parts.headers);
    let trusted = Trusted {
        identity: identity.as_deref(),
        origin: &connection.origin,
        target: &target,
        id: exchange.id,
        span: core.random() as u64,
        certificate: connection.vouched(&snapshot),
    };
    let head = Head {
        method: &parts.method,
        path: permit.path(),
        query: parts.uri.query(),
        // HTTP/2 carried it as `:authority`.
        host: &target.authority,
        fields: &|put| {
            for (name, value) in &parts.headers {
                if !headers::ends_here(name, identity.is_some()) {
                    put(name, value);
                }
            }
            trusted.each(put);
        },
    };
    let answered = loop {
        let unanswered = match core.pool.send(upstream, chosen, &head, body).await {
            Ok(answered) => break Ok(answered),
            Err(unanswered) => unanswered,
        };
        match tries.next(*unanswered, head.method) {
            Ok(next) => (chosen, body) = next,
            Err(error) => break Err(error),
        }
    };
    let mut answered = match answered {
        Ok(answered) => answered,
        Err(error) => {
            if let Some(attempts) = attempts {
                attempts.unanswered(Instant::now());
            }
            // The client's body may be what broke the exchange.
            let denial = fate.as_deref().and_then(|fate| of_body(fate.get()));
            let denial = denial.or_else(|| refused(verdict.as_ref(), &permit));
            let denial = denial.unwrap_or_else(|| denial_for(&error));
            if denial.status().is_server_error() {
                upstream.counters.unanswered.inc();
                tracing::warn!(upstream = %upstream.name, %error, "no answer from the backend");
            }
            return Err((denial, exchange));
        }
    };
    tries.answered();
    exchange.answered(answered.status);
    if let Some(block) = attempts.and_then(|attempts| attempts.answered(answered.status, Instant::now())) {
        core.gateway.penalize(permit.address(), block);
    }
    // A form in shadow mode went on whatever it was.
    if let Some(denial) = verdict.as_ref().and_then(|verdict| verdict.get()) {
        core.gateway.metrics().shadow_denied(denial.reason());
    }
    if let Some(rule) = permit.rule().answer() {
        match rule.judge(answered.status, &answered.fields, !answered.body.is_ended()) {
            Ok(Passes::Whole) => answered.fields = let_out(rule, answered.fields),
            Ok(Passes::Status) => {
                let retry_after = answered.fields.remove(header::RETRY_AFTER);
                return Ok(refusal::fault(answered.status, retry_after, &snapshot, exchange));
            }
            Err(denial) if permit.rule().mode == Mode::Enforce => return Err((denial, exchange)),
            Err(denial) => core.gateway.metrics().shadow_denied(denial.reason()),
        }
    }
    let id = exchange.id;
    let mut response = Response::new(ResponseBody::streamed(answered.body, exchange));
    *response.status_mut() = answered.status;
    let fields = response.headers_mut();
    *fields = answered.fields;
    snapshot.answers.strip(fields);
    snapshot.answers.add(fields, id);
    if let Some(standing) = standing {
        snapshot.rates.write_standing(&standing, fields);
    }
    Ok(response)
}

/// Of the fields of an answer those that a rule lets out.
fn let_out(rule: &AnswerRule, fields: HeaderMap) -> HeaderMap {
    let mut name = None;
    let mut left = HeaderMap::with_capacity(fields.len());
    // The name stands at the first of several values only.
    for (next, value) in fields {
        name = next.or(name);
        if let Some(name) = name.as_ref().filter(|name| rule.lets_out(name)) {
            left.append(name.clone(), value);
        }
    }
    left
}

/// Why a form was refused on its way, if it was.
fn refused(verdict: Option<&Rc<OnceCell<Denial>>>, permit: &RequestPermit) -> Option<Denial> {
    verdict.and_then(|verdict| verdict.get()).filter(|_| permit.rule().mode == Mode::Enforce).cloned()
}

/// Begins what the upstream's answer decides: whether somebody failed.
fn begin_attempts(
    permit: &RequestPermit,
    snapshot: &Snapshot,
    account: Option<&str>,
    core: &Core,
) -> Result<Option<Attempts>, Denial> {
    if permit.penalties().is_empty() {
        return Ok(None);
    }
    match snapshot.penalties.begin(permit.penalties(), permit.address(), account, Instant::now()) {
        Ok(attempts) => Ok(Some(attempts)),
        Err(retry_after) => {
            let denial = Denial::TooManyFailures { retry_after };
            if permit.rule().mode == Mode::Enforce {
                return Err(denial);
            }
            core.gateway.metrics().shadow_denied(denial.reason());
            Ok(None)
        }
    }
}

/// Why a body does not go upstream.
enum BodyFault {
    Denied(Denial),
    Broken(Fate),
}

/// A body as it may go upstream.
struct Taken {
    body: RequestBody,
    /// How it fares, where it flows.
    fate: Option<Rc<Cell<Fate>>>,
    /// Why it was refused on its way, where it is judged there.
    verdict: Option<Rc<OnceCell<Denial>>>,
    /// The account that it names.
    account: Option<String>,
}

impl Taken {
    fn held(body: RequestBody, account: Option<String>) -> Self {
        Self { body, fate: None, verdict: None, account }
    }
}

/// Judged whole if the rule has it held; otherwise counted on its way, and judged there if it is a form.
async fn take_body(
    incoming: Incoming,
    permit: &RequestPermit,
    limits: BodyLimits,
    decisions: &DecisionCache,
    exchange: &mut Exchange,
) -> Result<Taken, BodyFault> {
    let buffered = permit.body().buffered;
    if incoming.is_end_stream() && !buffered {
        return Ok(Taken::held(RequestBody::Empty, None));
    }
    // An HTTP/2 stream that announces nothing and goes on would be a whole request before it has ended.
    let is_nothing = incoming.size_hint().exact() == Some(0);
    let (mut body, fate) = RequestBody::streamed(incoming, limits);
    let judge = permit.form_judge().filter(|_| !buffered);
    if !buffered && !is_nothing {
        let verdict = judge.map(|judge| body.judge(judge, permit.rule().mode));
        return Ok(Taken { body, fate: Some(fate), verdict, account: None });
    }
    let bytes = body.collect();
    let bytes = Box::pin(bytes).await.map_err(|error| BodyFault::Broken(error.fate()))?.to_bytes();
    if !buffered && judge.is_none() {
        return Ok(Taken::held(RequestBody::Empty, None));
    }
    exchange.accessed(permit.accessed(&bytes));
    let account = permit.judge_body(&bytes, decisions).map_err(BodyFault::Denied)?.into_account();
    Ok(Taken::held(RequestBody::Held(Some(bytes)), account))
}

/// A body as a whole, within `limits`.
pub(super) async fn gather(incoming: Incoming, limits: BodyLimits) -> Result<Bytes, Denial> {
    let (body, _) = RequestBody::streamed(incoming, limits);
    let gathered = Box::pin(body.collect()).await;
    let gathered =
        gathered.map_err(|error| denial_of(error.fate(), limits.max_bytes).unwrap_or(Denial::Internal))?;
    Ok(gathered.to_bytes())
}

/// What is wrong with the client's body; nothing, perhaps.
fn denial_of(fate: Fate, max_bytes: u64) -> Option<Denial> {
    match fate {
        Fate::TooLarge => Some(Denial::BodyTooLarge { limit: max_bytes }),
        Fate::TooSlow => Some(Denial::TooSlow),
        Fate::Broken => Some(Denial::Malformed { detail: "the body broke off" }),
        // The judge has said why.
        Fate::Refused | Fate::Flowing | Fate::Complete => None,
    }
}

fn denial_for(error: &SendError) -> Denial {
    match error {
        SendError::Connect(ConnectError::TimedOut) | SendError::TimedOut => Denial::UpstreamTimeout,
        SendError::Http(Http1Error::Request) => Denial::Malformed { detail: "the target is not valid" },
        // What became of the body was said above; if nothing was, the client is not to blame.
        SendError::Connect(ConnectError::Io(_))
        | SendError::Io(_)
        | SendError::Http(_)
        | SendError::Body(_) => Denial::UpstreamUnavailable,
    }
}
