//! Where an issuer tells whom it has logged out (OpenID Connect Back-Channel Logout 1.0).

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use hyper::body::Incoming;
use sealgate_policy::{Denial, LogoutFault, LogoutRule, RequestPermit, TokenFault};

use super::{
    body::{BodyLimits, ResponseBody},
    exchange::Exchange,
    forward,
    walk::{Answer, Door, KEY_PATIENCE},
};
use crate::{
    clock,
    session::{LogoutFailure, LogoutToken, logout_token},
};

/// Ends what a logout token names, and answers once that holds, on disk too (§2.7, §2.8).
pub async fn receive(
    door: Door,
    permit: &RequestPermit,
    rule: &LogoutRule,
    request: Box<Request<Incoming>>,
    mut exchange: Box<Exchange>,
) -> Answer {
    if let Err(denial) = log_out(&door, permit, rule, request, &exchange).await {
        return Err((denial, exchange));
    }
    exchange.answered(StatusCode::OK);
    let id = exchange.id;
    let mut response = Response::new(ResponseBody::held(Bytes::new(), None, exchange));
    let fields = response.headers_mut();
    fields.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    door.snapshot.answers.add(fields, id);
    Ok(response)
}

async fn log_out(
    door: &Door,
    permit: &RequestPermit,
    rule: &LogoutRule,
    request: Box<Request<Incoming>>,
    exchange: &Exchange,
) -> Result<(), Denial> {
    let (gateway, snapshot) = (&door.core.gateway, &door.snapshot);
    let limits = BodyLimits::of(snapshot.policy.connections(), permit.body().max_bytes);
    let (parts, body) = request.into_parts();
    let form = forward::gather(body, limits).await?;
    if !is_form(&parts.headers) {
        return Err(Denial::LogoutInvalid(LogoutFault::Form));
    }
    let token = logout_token(&form).map_err(Denial::LogoutInvalid)?;
    let now = clock::unix_now();
    let token = match snapshot.verifier.verify_logout(&token, rule, now) {
        // The issuer may have a new key.
        Err(LogoutFailure::KeysUnavailable | LogoutFailure::Fault(LogoutFault::Token(TokenFault::Key)))
            if Box::pin(snapshot.verifier.refreshed(&token, KEY_PATIENCE)).await =>
        {
            snapshot.verifier.verify_logout(&token, rule, clock::unix_now())
        }
        outcome => outcome,
    }
    .map_err(|failure| match failure {
        LogoutFailure::Fault(fault) => Denial::LogoutInvalid(fault),
        LogoutFailure::KeysUnavailable => Denial::LogoutFailed,
    })?;
    // Who has a leaked key could log everybody out.
    if token.key().is_some_and(|key| gateway.revocations.holds(&key, token.issued_at, now)) {
        return Err(Denial::LogoutInvalid(LogoutFault::Token(TokenFault::Key)));
    }
    gateway.logout_tokens.take(&token, now)?;
    let outcome = end(door, &token, rule, now, exchange).await;
    if outcome.is_err() {
        gateway.logout_tokens.give_back(&token);
    }
    outcome
}

async fn end(
    door: &Door,
    token: &LogoutToken,
    rule: &LogoutRule,
    now: u64,
    exchange: &Exchange,
) -> Result<(), Denial> {
    let until = now.saturating_add(door.snapshot.policy.session().lifetime.as_secs());
    let revocation = token.revocation(until).ok_or(Denial::LogoutInvalid(LogoutFault::Nobody))?;
    let report = door.core.gateway.revoke(&revocation).await;
    tracing::info!(
        target: "sealgate::audit",
        activity = "back-channel-logout",
        request = %exchange.id,
        issuer = &*rule.issuer,
        subject = token.subject,
        session = token.session,
        sockets = report.sockets,
        entered = report.entered,
        kept = report.kept,
    );
    // Said to be done only when it is: the issuer tries again.
    if report.entered && report.kept { Ok(()) } else { Err(Denial::LogoutFailed) }
}

/// §2.5: the token comes in a form.
fn is_form(fields: &HeaderMap) -> bool {
    let mut kinds = fields.get_all(header::CONTENT_TYPE).iter();
    let (Some(kind), None) = (kinds.next(), kinds.next()) else { return false };
    let kind = kind.to_str().unwrap_or_default();
    let kind = kind.split_once(';').map_or(kind, |(kind, _)| kind).trim();
    kind.eq_ignore_ascii_case("application/x-www-form-urlencoded")
        && !fields.contains_key(header::CONTENT_ENCODING)
}
