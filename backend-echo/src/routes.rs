//! Which path does what.

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::caller::{self, Caller};
use crate::problem::Problem;
use crate::server::{Backend, Open, unix_seconds};
use crate::wire::Name;
use crate::{echo, login, messages, stream};

/// Longest JSON body of the message API: 64 ciphertexts of 96 KiB, in base64.
const MAX_JSON: usize = 9 * 1024 * 1024;
/// Longest body of a login.
const MAX_LOGIN: usize = 4 * 1024;

/// Answers one request; a refusal becomes a problem document.
pub(crate) async fn answer(
    backend: &Arc<Backend>,
    open: Open,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    match route(backend, open, request).await {
        Ok(response) => response,
        Err(problem) => {
            tracing::debug!(status = problem.status.as_u16(), reason = problem.slug, detail = %problem.detail, "refused");
            problem.into_response()
        }
    }
}

async fn route(
    backend: &Arc<Backend>,
    open: Open,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Problem> {
    let path = request.uri().path();
    // First, and without taking the path apart: the benchmarks measure the gateway, not us.
    if path == "/v1/echo" || path == "/v1/echo-checked" {
        return echo::answer(backend, open, request).await;
    }
    let now = unix_seconds(SystemTime::now());
    let path = path.to_owned();
    let steps: Vec<&str> = path.split('/').skip(1).collect();
    match (request.method(), steps.as_slice()) {
        (&Method::GET, ["healthz"]) => {
            backend.store.ping().await.map_err(|error| Problem::internal(&error))?;
            Ok(json_response(StatusCode::OK, &json!({ "status": "ok" })))
        }
        (&Method::GET, [".well-known", "jwks.json"]) => Ok(jwks(backend)),
        (&Method::GET, ["v1", "whoami"]) => Ok(json_response(StatusCode::OK, &whoami(&request)?)),

        (&Method::POST, ["v1", "dev", "login"]) if backend.development => {
            let wanted = json_body(request, MAX_LOGIN).await?;
            Ok(json_response(StatusCode::OK, &login::login(backend, wanted, now).await?))
        }

        (&Method::PUT, ["v1", "devices", device, "keys"]) => {
            let (own, device) = (messages::sender(backend, request.headers(), now).await?, name(device)?);
            let upload = json_body(request, MAX_JSON).await?;
            Ok(json_response(
                StatusCode::OK,
                &messages::put_keys(backend, &own, &device, &upload, now).await?,
            ))
        }
        (&Method::GET, ["v1", "users", user, "devices"]) => {
            Caller::of(request.headers())?.may_message()?;
            Ok(json_response(StatusCode::OK, &messages::devices(backend, name(user)?).await?))
        }
        (&Method::POST, ["v1", "users", user, "devices", device, "claim"]) => {
            Caller::of(request.headers())?.may_message()?;
            Ok(json_response(StatusCode::OK, &messages::claim(backend, name(user)?, name(device)?).await?))
        }
        (&Method::POST, ["v1", "messages"]) => {
            let own = messages::sender(backend, request.headers(), now).await?;
            let envelope = json_body(request, MAX_JSON).await?;
            Ok(json_response(StatusCode::OK, &messages::send(backend, own, envelope, now).await?))
        }
        (&Method::GET, ["v1", "stream"]) => stream::upgrade(backend, open, request, now).await,

        (_, ["healthz"] | [".well-known", "jwks.json"] | ["v1", "whoami" | "stream"]) => {
            Err(Problem::method("GET"))
        }
        (_, ["v1", "users", _, "devices"]) => Err(Problem::method("GET")),
        (_, ["v1", "devices", _, "keys"]) => Err(Problem::method("PUT")),
        (_, ["v1", "users", _, "devices", _, "claim"] | ["v1", "messages"]) => Err(Problem::method("POST")),
        (_, ["v1", "dev", "login"]) if backend.development => Err(Problem::method("POST")),
        _ => Err(Problem::no_route()),
    }
}

fn jwks(backend: &Backend) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::copy_from_slice(backend.tokens.jwks())));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/jwk-set+json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("max-age=60"));
    response
}

/// The request as it came from the gateway, so that a test can see what was stripped, set and passed on.
fn whoami(request: &Request<Incoming>) -> Result<Value, Problem> {
    let caller = Caller::of(request.headers())?;
    let secret = [header::AUTHORIZATION, header::COOKIE, header::PROXY_AUTHORIZATION];
    let headers: Vec<_> = request
        .headers()
        .iter()
        .map(|(name, value)| {
            // That it was there is enough; nobody needs it reflected.
            let value = if secret.contains(name) {
                "(hidden)".into()
            } else {
                String::from_utf8_lossy(value.as_bytes())
            };
            json!([name.as_str(), value])
        })
        .collect();
    Ok(json!({
        "subject": caller.user,
        "session": caller.session,
        "roles": caller.roles,
        "method": request.method().as_str(),
        "path": request.uri().path(),
        "query": request.uri().query(),
        "headers": headers,
        "identity_headers": [caller::SUBJECT.as_str(), caller::SESSION.as_str(), caller::ROLES.as_str()],
    }))
}

/// A whole body, of `limit` bytes at most.
pub(crate) async fn body(request: Request<Incoming>, limit: usize) -> Result<Bytes, Problem> {
    let body = request.into_body();
    // Refused before a byte of it is read, if it says so itself.
    if body.size_hint().lower() > limit as u64 {
        return Err(Problem::too_large(limit));
    }
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(Problem::too_large(limit)),
        Err(_) => Err(Problem::malformed("the body broke off")),
    }
}

async fn json_body<T: DeserializeOwned>(request: Request<Incoming>, limit: usize) -> Result<T, Problem> {
    let kind =
        request.headers().get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(Problem::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "content-type",
            "the body must be application/json",
        ));
    }
    let body = body(request, limit).await?;
    serde_json::from_slice(&body).map_err(|error| match error.classify() {
        serde_json::error::Category::Data => Problem::shape(error.to_string()),
        _ => Problem::malformed(format!("the body is not JSON: {error}")),
    })
}

fn name(step: &str) -> Result<Name, Problem> {
    step.parse().map_err(|error: crate::wire::NameError| Problem::malformed(error.to_string()))
}

pub(crate) fn json_response(status: StatusCode, value: &impl Serialize) -> Response<Full<Bytes>> {
    let body = match serde_json::to_vec(value) {
        Ok(body) => body,
        Err(error) => return Problem::internal(&error).into_response(),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // Tokens, keys and messages: nothing that a cache should hold (RFC 6750 §5.3).
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
