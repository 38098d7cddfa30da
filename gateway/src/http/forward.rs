//! From a permit to a backend's answer.

use std::{cell::Cell, rc::Rc, time::Instant};

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use sealgate_policy::{DecisionCache, Denial, Mode, RequestPermit};

use super::{
    body::{Fate, RequestBody, ResponseBody},
    exchange::Exchange,
    headers,
    walk::{Answer, Door},
};
use crate::{
    edge::Core,
    limits::{Attempts, RateStanding},
    reload::Snapshot,
    upstream::{
        ConnectError,
        http1::{Head, Http1Error},
        pool::SendError,
    },
};

/// Forwards what `permit` allows, and answers with what the backend says.
pub async fn forward(
    door: Door,
    permit: RequestPermit,
    standing: Option<RateStanding>,
    request: Request<Incoming>,
    mut exchange: Exchange,
) -> Answer {
    let Door { core, connection, snapshot, target } = door;
    let Some(upstream) = snapshot.upstreams.of(permit.upstream()) else {
        return Err((Denial::UpstreamUnavailable, exchange));
    };
    let identity = permit.identity().cloned();
    let subject = identity.as_ref().map(|identity| identity.subject.as_str());
    let Some(endpoint) = upstream.select(subject, connection.peer.ip()) else {
        return Err((Denial::UpstreamUnavailable, exchange));
    };

    let (mut parts, incoming) = request.into_parts();
    let body_timeout = snapshot.policy.connections().body_timeout;
    let (body, fate, account) = match take_body(incoming, &permit, body_timeout, &core.decisions).await {
        Ok(body) => body,
        Err(denial) => return Err((denial, exchange)),
    };
    let attempts = match begin_attempts(&permit, &snapshot, account.as_deref(), &core) {
        Ok(attempts) => attempts,
        Err(denial) => return Err((denial, exchange)),
    };
    headers::strip_request(&mut parts.headers, identity.is_some());
    headers::add_trusted(
        &mut parts.headers,
        identity.as_deref(),
        &connection.origin,
        &target,
        exchange.id,
        core.random() as u64,
    );
    headers::add_certificate(&mut parts.headers, connection.vouched(&snapshot));
    let head = Head {
        method: &parts.method,
        path: permit.path(),
        query: parts.uri.query(),
        // HTTP/2 carried it as `:authority`.
        host: &target.authority,
        fields: &parts.headers,
    };
    let answered = match core.pool.send(upstream, endpoint, &head, body).await {
        Ok(answered) => answered,
        Err(error) => {
            if let Some(attempts) = attempts {
                attempts.unanswered(Instant::now());
            }
            let denial = denial_for(&error, fate.as_deref(), permit.body().max_bytes);
            if denial.status().is_server_error() {
                core.gateway.metrics().upstream_failed(&upstream.name);
                tracing::warn!(upstream = %upstream.name, %error, "no answer from the backend");
            }
            return Err((denial, exchange));
        }
    };
    exchange.answered(answered.status);
    if let Some(block) = attempts.and_then(|attempts| attempts.answered(answered.status, Instant::now())) {
        core.gateway.penalize(permit.address(), block);
    }
    let id = exchange.id;
    let mut response = Response::new(ResponseBody::streamed(answered.body, exchange));
    *response.status_mut() = answered.status;
    let fields = response.headers_mut();
    *fields = answered.fields;
    headers::strip_response(fields);
    headers::add_security(fields, snapshot.hsts.as_ref(), id);
    if let Some(standing) = standing {
        snapshot.rates.write_standing(&standing, fields);
    }
    Ok(response)
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

/// The body as it may go upstream, and the account that it names: judged whole if the rule has a schema, otherwise counted on its way.
async fn take_body(
    incoming: Incoming,
    permit: &RequestPermit,
    patience: std::time::Duration,
    decisions: &DecisionCache,
) -> Result<(RequestBody, Option<Rc<Cell<Fate>>>, Option<String>), Denial> {
    let rule = permit.body();
    if !rule.buffered {
        if incoming.is_end_stream() {
            return Ok((RequestBody::Empty, None, None));
        }
        let (body, fate) = RequestBody::streamed(incoming, rule.max_bytes, patience);
        return Ok((body, Some(fate), None));
    }
    let bytes = gather(incoming, rule.max_bytes, patience).await?;
    let account = permit.judge_body(&bytes, decisions)?.into_account();
    Ok((RequestBody::Held(Some(bytes)), None, account))
}

/// A body as a whole, `max_bytes` of it at most, within `patience`.
pub(super) async fn gather(
    incoming: Incoming,
    max_bytes: u64,
    patience: std::time::Duration,
) -> Result<Bytes, Denial> {
    let limit = usize::try_from(max_bytes).unwrap_or(usize::MAX);
    let gathered = Box::pin(tokio::time::timeout(patience, Limited::new(incoming, limit).collect()))
        .await
        .map_err(|_| Denial::TooSlow)?
        .map_err(|error| match error.downcast_ref::<LengthLimitError>() {
            Some(_) => Denial::BodyTooLarge { limit: max_bytes },
            None => Denial::Malformed { detail: "the body broke off" },
        })?;
    Ok(gathered.to_bytes())
}

fn denial_for(error: &SendError, fate: Option<&Cell<Fate>>, max_bytes: u64) -> Denial {
    // The client's body may be what broke the exchange.
    match fate.map(Cell::get) {
        Some(Fate::TooLarge) => return Denial::BodyTooLarge { limit: max_bytes },
        Some(Fate::TooSlow) => return Denial::TooSlow,
        Some(Fate::Broken) => return Denial::Malformed { detail: "the body broke off" },
        Some(Fate::Flowing | Fate::Complete) | None => {}
    }
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
