//! Answers a request for a ticket: the one thing that the gateway says of its own.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use hyper::body::Incoming;
use sealgate_policy::{Denial, RequestPermit, TicketRule};
use serde_json::json;

use super::{body::ResponseBody, exchange::Exchange, walk::Door};
use crate::{
    clock,
    session::{self, TicketText},
    shared::Together,
};

/// Makes a ticket for whom `permit` names and the page whose fields these are.
pub async fn issue(
    door: &Door,
    permit: &RequestPermit,
    rule: TicketRule,
    fields: &HeaderMap,
) -> Result<TicketText, Denial> {
    let identity = permit.identity().ok_or(Denial::TokenMissing)?;
    let (gateway, policy) = (&door.core.gateway, &door.snapshot.policy);
    let now = clock::unix_now();
    let text = gateway.tickets.issue(identity, fields, rule.ttl, now)?;
    let Some(shared) = policy.shared() else { return Ok(text) };
    let token = session::bearer(fields, false).map_err(Denial::TokenInvalid)?.ok_or(Denial::TokenMissing)?;
    let page = session::origin(fields).ok_or(Denial::OriginNotAllowed)?.as_bytes();
    let until = now.saturating_add(rule.ttl.as_secs());
    let sealed = session::seal(text.as_str(), token.as_str(), page, until).ok_or(Denial::Internal)?;
    let name = session::ticket_name(text.as_str()).ok_or(Denial::Internal)?;
    // INVARIANT: before others can have it: from then on this gateway asks before it takes it.
    gateway.tickets.share(&text);
    match gateway.shared.offer_ticket(&name, &sealed, rule.ttl).await {
        Together::Answer(()) | Together::Alone => Ok(text),
        Together::Unknown if shared.tickets_fail_closed => {
            drop(gateway.tickets.take(text.as_str()));
            Err(Denial::ContactLost)
        }
        // Redis may have it all the same: it is asked before the ticket is taken, if it answers by then.
        Together::Unknown => Ok(text),
    }
}

/// Hands it out; what is left of the request is thrown away.
pub fn answer(
    door: &Door,
    ticket: &TicketText,
    rule: TicketRule,
    unread: Incoming,
    mut exchange: Box<Exchange>,
) -> Response<ResponseBody> {
    exchange.answered(StatusCode::OK);
    let id = exchange.id;
    let body = json!({ "ticket": ticket.as_str(), "expires_in": rule.ttl.as_secs() }).to_string();
    let mut response = Response::new(ResponseBody::held(Bytes::from(body), Some(unread), exchange));
    let fields = response.headers_mut();
    fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    fields.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    door.snapshot.answers.add(fields, id);
    response
}
