//! Answers a request for a ticket: the one thing that the gateway says of its own.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use hyper::body::Incoming;
use sealgate_policy::{Denial, RequestPermit, TicketRule};
use serde_json::json;

use super::{body::ResponseBody, exchange::Exchange, headers, walk::Door};
use crate::{clock, session::TicketText};

/// Makes a ticket for whom `permit` names and the page whose fields these are.
pub fn issue(
    door: &Door,
    permit: &RequestPermit,
    rule: TicketRule,
    fields: &HeaderMap,
) -> Result<TicketText, Denial> {
    let identity = permit.identity().ok_or(Denial::TokenMissing)?;
    door.core.gateway.tickets.issue(identity, fields, rule.ttl, clock::unix_now())
}

/// Hands it out; what is left of the request is thrown away.
pub fn answer(
    door: &Door,
    ticket: &TicketText,
    rule: TicketRule,
    unread: Incoming,
    mut exchange: Exchange,
) -> Response<ResponseBody> {
    exchange.answered(StatusCode::OK);
    let id = exchange.id;
    let body = json!({ "ticket": ticket.as_str(), "expires_in": rule.ttl.as_secs() }).to_string();
    let mut response = Response::new(ResponseBody::held(Bytes::from(body), Some(unread), exchange));
    let fields = response.headers_mut();
    fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    fields.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers::add_security(fields, door.snapshot.hsts.as_ref(), id);
    response
}
