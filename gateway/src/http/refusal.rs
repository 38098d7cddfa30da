//! A refusal as an answer: a problem document (RFC 9457) and the fields that go with its status.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use hyper::body::Incoming;
use sealgate_policy::{Denial, TokenFault};
use serde_json::json;

use super::{body::ResponseBody, exchange::Exchange};
use crate::reload::Snapshot;

/// The answer to a refused request, of whose body `unread` is left.
pub fn response(
    denial: &Denial,
    snapshot: &Snapshot,
    unread: Option<Incoming>,
    mut exchange: Box<Exchange>,
) -> Response<ResponseBody> {
    let status = denial.status();
    exchange.refused(denial);
    exchange.answered(status);
    let error = logout_error(denial);
    let kind = if error.is_some() { "application/json" } else { PROBLEM };
    let mut fields = own_fields(kind, snapshot, &exchange);
    add_particulars(&mut fields, denial, snapshot);
    if !exchange.over_http2() && (exchange.is_last() || ends_connection(denial)) {
        // Whoever cannot be understood once is not to be understood in what follows.
        fields.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    let mut problem = json!({
        "type": format!("urn:sealgate:problem:{}", denial.reason()),
        "title": denial.title(),
        "status": status.as_u16(),
        "detail": denial.detail(),
        "instance": format!("urn:sealgate:request:{}", exchange.id),
    });
    if let (Denial::Schema { pointer } | Denial::Json { pointer, .. }, Some(problem)) =
        (denial, problem.as_object_mut())
    {
        problem.insert("pointer".to_owned(), json!(pointer));
    }
    let body = Bytes::from(error.unwrap_or(problem).to_string());
    let mut response = Response::new(ResponseBody::held(body, unread, exchange));
    *response.status_mut() = status;
    *response.headers_mut() = fields;
    response
}

/// The answer where an upstream told of a fault of its own, and its words are to stay here.
pub fn fault(
    status: StatusCode,
    retry_after: Option<HeaderValue>,
    snapshot: &Snapshot,
    mut exchange: Box<Exchange>,
) -> Response<ResponseBody> {
    exchange.answered(status);
    let mut fields = own_fields(PROBLEM, snapshot, &exchange);
    if let Some(retry_after) = retry_after {
        fields.insert(header::RETRY_AFTER, retry_after);
    }
    let problem = json!({
        "type": "urn:sealgate:problem:upstream-fault",
        "title": "Fault of the service",
        "status": status.as_u16(),
        "detail": "the service could not do what was asked",
        "instance": format!("urn:sealgate:request:{}", exchange.id),
    });
    let body = Bytes::from(problem.to_string());
    let mut response = Response::new(ResponseBody::held(body, None, exchange));
    *response.status_mut() = status;
    *response.headers_mut() = fields;
    response
}

const PROBLEM: &str = "application/problem+json";

/// Fields of every answer that is ours.
fn own_fields(kind: &'static str, snapshot: &Snapshot, exchange: &Exchange) -> HeaderMap {
    let mut fields = HeaderMap::new();
    fields.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    fields.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    snapshot.answers.add(&mut fields, exchange.id);
    fields
}

/// OpenID Connect Back-Channel Logout 1.0 §2.8 has a shape of its own, that of RFC 6749 §5.2.
fn logout_error(denial: &Denial) -> Option<serde_json::Value> {
    let error = match denial {
        Denial::LogoutInvalid(_) => "invalid_request",
        Denial::LogoutFailed => "temporarily_unavailable",
        _ => return None,
    };
    Some(json!({ "error": error, "error_description": denial.detail() }))
}

/// Whether nothing more is read of a connection over which a request came that was refused like this.
fn ends_connection(denial: &Denial) -> bool {
    matches!(
        denial,
        Denial::Malformed { .. }
            | Denial::UriTooLong
            | Denial::HeadersTooLarge
            | Denial::UnknownTransferCoding
            | Denial::VersionNotSupported
            | Denial::TooSlow
    )
}

/// The fields that RFC 6750, RFC 9110 and the rate limit draft ask for.
fn add_particulars(fields: &mut HeaderMap, denial: &Denial, snapshot: &Snapshot) {
    match denial {
        Denial::TokenMissing => {
            // RFC 6750 §3.1: no error code for a request that brought no token.
            fields.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer realm=\"sealgate\""));
            if snapshot.policy.dpop().demanded {
                add_dpop_challenge(fields, None, snapshot);
            }
        }
        Denial::TokenInvalid(fault) => {
            fields.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge(*fault)));
            if snapshot.policy.dpop().demanded {
                add_dpop_challenge(fields, Some("invalid_token"), snapshot);
            }
        }
        Denial::StepUpNeeded { challenge } => {
            // RFC 9470 §3.
            let separator = if challenge.is_empty() { "" } else { ", " };
            let challenge = format!(
                "Bearer realm=\"sealgate\", error=\"insufficient_user_authentication\", \
                 error_description=\"a stronger or fresher login is needed\"{separator}{challenge}"
            );
            if let Ok(challenge) = HeaderValue::from_str(&challenge) {
                fields.insert(header::WWW_AUTHENTICATE, challenge);
            }
        }
        Denial::ProofMissing => add_dpop_challenge(fields, Some("invalid_token"), snapshot),
        Denial::ProofInvalid(_) => add_dpop_challenge(fields, Some("invalid_dpop_proof"), snapshot),
        Denial::ProofNonce { nonce } => {
            add_dpop_challenge(fields, Some("use_dpop_nonce"), snapshot);
            if let Ok(nonce) = HeaderValue::from_str(nonce) {
                fields.insert(HeaderName::from_static("dpop-nonce"), nonce);
            }
        }
        // No token would help.
        Denial::ClientCertificateMissing | Denial::ClientCertificateNotAllowed => {}
        Denial::MethodNotAllowed { allow } => {
            if let Ok(allow) = HeaderValue::from_str(allow) {
                fields.insert(header::ALLOW, allow);
            }
        }
        // RFC 9110 §15.5.16: what would be taken instead.
        Denial::ContentType { accept } | Denial::ContentCoding { accept } => {
            let name = if matches!(denial, Denial::ContentType { .. }) {
                header::ACCEPT
            } else {
                header::ACCEPT_ENCODING
            };
            if let Ok(accept) = HeaderValue::from_str(accept) {
                fields.insert(name, accept);
            }
        }
        Denial::RateExceeded { rate, retry_after } => {
            snapshot.rates.write_refusal(*rate, *retry_after, fields);
        }
        Denial::UpstreamUnavailable
        | Denial::UpstreamTimeout
        | Denial::UpstreamCircuitOpen { .. }
        | Denial::TooManySockets => {
            if let Some(seconds) = denial.retry_after() {
                fields.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
        }
        other => match other.status() {
            StatusCode::SERVICE_UNAVAILABLE => {
                fields.insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
            }
            StatusCode::TOO_MANY_REQUESTS => {
                fields.insert(header::RETRY_AFTER, HeaderValue::from(other.retry_after().unwrap_or(1)));
            }
            // RFC 9110 §15.5.2: every 401 carries a challenge.
            StatusCode::UNAUTHORIZED => {
                fields.insert(
                    header::WWW_AUTHENTICATE,
                    HeaderValue::from_static("Bearer realm=\"sealgate\", error=\"invalid_token\""),
                );
            }
            StatusCode::FORBIDDEN => {
                fields.insert(
                    header::WWW_AUTHENTICATE,
                    HeaderValue::from_static("Bearer realm=\"sealgate\", error=\"insufficient_scope\""),
                );
            }
            StatusCode::UPGRADE_REQUIRED => {
                fields.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
                fields.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
                fields.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
            }
            _ => {}
        },
    }
}

/// RFC 9449 §7.1: by which algorithms a key may prove itself.
fn add_dpop_challenge(fields: &mut HeaderMap, error: Option<&str>, snapshot: &Snapshot) {
    let algorithms = &snapshot.policy.dpop().algorithm_names;
    let error = error.map(|error| format!(", error=\"{error}\"")).unwrap_or_default();
    let challenge = format!("DPoP realm=\"sealgate\"{error}, algs=\"{algorithms}\"");
    if let Ok(challenge) = HeaderValue::from_str(&challenge) {
        fields.append(header::WWW_AUTHENTICATE, challenge);
    }
}

/// Tells an honest client whether to fetch a new token; an attacker learns no more than that.
fn challenge(fault: TokenFault) -> &'static str {
    match fault {
        TokenFault::Expired => {
            "Bearer realm=\"sealgate\", error=\"invalid_token\", error_description=\"the token expired\""
        }
        // RFC 6750 §3.1: the request is at fault, not a token.
        TokenFault::Twice => "Bearer realm=\"sealgate\", error=\"invalid_request\"",
        _ => "Bearer realm=\"sealgate\", error=\"invalid_token\"",
    }
}
