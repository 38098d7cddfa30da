//! Plain HTTP: sent on to HTTPS, and never served (row T-1). ACME servers validate names here (RFC 8555 §8.3).

use std::{convert::Infallible, rc::Rc, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header, uri::Authority};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use sealgate_policy::{ConnectionPermit, Denial};
use serde_json::json;
use tokio::net::TcpStream;

use super::Core;
use crate::{acme::Challenges, http::RequestId, limits::ConnectionGuard, reload::Snapshot};

/// Serves one connection: one request, one answer, and the end.
pub(super) async fn serve(
    core: Rc<Core>,
    snapshot: Arc<Snapshot>,
    stream: TcpStream,
    _permit: ConnectionPermit,
    _counted: ConnectionGuard,
) {
    let _open = core.count_open();
    let limits = snapshot.policy.connections().clone();
    let service = service_fn(|request: Request<Incoming>| {
        let answer =
            answer(&request, &*snapshot, &core.gateway.outliving.acme.challenges, core.gateway.https_port);
        core.gateway.metrics().plain_request(answer.outcome());
        let response = answer.response(RequestId::new(core.random()));
        async move { Ok::<_, Infallible>(response) }
    });
    let serving = http1::Builder::new()
        .keep_alive(false)
        .half_close(false)
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_headers(limits.max_headers as usize)
        .max_buf_size(limits.max_header_bytes.max(8 * 1024) as usize)
        .serve_connection(TokioIo::new(stream), service);
    // Nothing here takes long. Who sends a body is not listened to.
    let all = limits.header_timeout + limits.write_timeout;
    tokio::select! {
        outcome = tokio::time::timeout(all, serving) => match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(%error, "plain connection ended"),
            Err(_) => tracing::debug!("a plain connection took too long"),
        },
        () = core.drain.notified() => {}
    }
}

/// What a request over plain HTTP is answered.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// Where it is served.
    Redirect(HeaderValue),
    /// An ACME server's question: the key authorization.
    Validation(String),
    Refused(Denial),
}

/// What of a snapshot decides.
trait Hosts {
    /// Whether HTTPS is served for the host.
    fn serves(&self, host: &str) -> bool;
}

impl Hosts for Snapshot {
    fn serves(&self, host: &str) -> bool {
        self.tls.serves(host)
    }
}

fn answer<B>(request: &Request<B>, hosts: &impl Hosts, challenges: &Challenges, https_port: u16) -> Answer {
    let path = request.uri().path();
    if matches!(*request.method(), Method::GET | Method::HEAD)
        && let Some(key_authorization) = challenges.over_http(path)
    {
        return Answer::Validation(key_authorization);
    }
    let Some(host) = host(request.uri(), request.headers()) else {
        return Answer::Refused(Denial::Malformed { detail: "expected one host" });
    };
    // Only to where this gateway is: whoever is sent elsewhere would be sent by us.
    if !hosts.serves(host.trim_matches(['[', ']'])) {
        return Answer::Refused(Denial::Misdirected);
    }
    // A browser would not follow, and its first message would be lost.
    if request.headers().contains_key(header::UPGRADE) || *request.method() == Method::CONNECT {
        return Answer::Refused(Denial::PlainHttp);
    }
    let port = if https_port == 443 { String::new() } else { format!(":{https_port}") };
    let target = request.uri().path_and_query().map_or("/", |target| target.as_str());
    let location = format!("https://{host}{port}{target}");
    match HeaderValue::try_from(location) {
        Ok(location) if target.starts_with('/') => Answer::Redirect(location),
        _ => Answer::Refused(Denial::Malformed { detail: "expected a path" }),
    }
}

/// The host that is asked for, lower case, without port; `None` if there is not exactly one (RFC 9112 §3.2).
fn host(uri: &Uri, headers: &HeaderMap) -> Option<String> {
    let mut fields = headers.get_all(header::HOST).iter();
    let (Some(field), None) = (fields.next(), fields.next()) else { return None };
    let field: Authority = field.to_str().ok()?.parse().ok()?;
    // In the absolute form the target counts (RFC 9112 §3.2.2), and has to say the same.
    if uri.authority().is_some_and(|target| !target.as_str().eq_ignore_ascii_case(field.as_str())) {
        return None;
    }
    if field.as_str().contains('@') || field.host().is_empty() {
        return None;
    }
    Some(field.host().to_ascii_lowercase())
}

impl Answer {
    fn outcome(&self) -> &'static str {
        match self {
            Self::Redirect(_) => "redirected",
            Self::Validation(_) => "validated",
            Self::Refused(_) => "refused",
        }
    }

    fn response(self, id: RequestId) -> Response<Full<Bytes>> {
        let mut response = Response::new(Full::default());
        match self {
            Self::Redirect(location) => {
                // 308 keeps the method (RFC 9110 §15.4.9).
                *response.status_mut() = StatusCode::PERMANENT_REDIRECT;
                response.headers_mut().insert(header::LOCATION, location);
            }
            Self::Validation(key_authorization) => {
                let kind = HeaderValue::from_static("application/octet-stream");
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
                *response.body_mut() = Full::from(key_authorization);
            }
            Self::Refused(denial) => {
                *response.status_mut() = denial.status();
                let kind = HeaderValue::from_static("application/problem+json");
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
                let problem = json!({
                    "type": format!("urn:sealgate:problem:{}", denial.reason()),
                    "title": denial.title(),
                    "status": denial.status().as_u16(),
                    "detail": denial.detail(),
                    "instance": format!("urn:sealgate:request:{id}"),
                });
                *response.body_mut() = Full::from(problem.to_string());
            }
        }
        let fields = response.headers_mut();
        fields.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        fields.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        fields.insert(header::HeaderName::from_static("x-request-id"), id.header());
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::acme::Response as Challenge;

    struct Chat;

    impl Hosts for Chat {
        fn serves(&self, host: &str) -> bool {
            ["chat.example", "::1"].contains(&host)
        }
    }

    fn request(method: &str, target: &str, fields: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().method(method).uri(target);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    fn asked(method: &str, target: &str, fields: &[(&str, &str)], port: u16) -> Answer {
        answer(&request(method, target, fields), &Chat, &Challenges::default(), port)
    }

    fn to(location: &str) -> Answer {
        Answer::Redirect(HeaderValue::from_str(location).unwrap())
    }

    #[test]
    fn whoever_asks_for_a_host_that_is_here_is_sent_to_https() {
        let host = [("host", "Chat.Example")];
        assert_eq!(asked("GET", "/a?b=c", &host, 443), to("https://chat.example/a?b=c"));
        assert_eq!(asked("POST", "/", &host, 8443), to("https://chat.example:8443/"));
        assert_eq!(asked("GET", "/", &[("host", "chat.example:80")], 443), to("https://chat.example/"));
        assert_eq!(asked("GET", "/", &[("host", "[::1]:80")], 443), to("https://[::1]/"));
        let absolute = asked("GET", "http://chat.example/x", &host, 443);
        assert_eq!(absolute, to("https://chat.example/x"));
        // Two slashes name no other host behind ours.
        assert_eq!(asked("GET", "//evil.example/", &host, 443), to("https://chat.example//evil.example/"));
    }

    #[test]
    fn others_are_sent_nowhere() {
        let malformed = |fields: &[(&str, &str)]| {
            matches!(asked("GET", "/", fields, 443), Answer::Refused(Denial::Malformed { .. }))
        };
        assert!(malformed(&[]) && malformed(&[("host", "chat.example"), ("host", "chat.example")]));
        assert!(malformed(&[("host", "a@chat.example")]) && malformed(&[("host", "chat example")]));
        assert!(malformed(&[("host", "")]) && malformed(&[("host", "chat.example/x")]));
        let other = asked("GET", "/", &[("host", "evil.example")], 443);
        assert_eq!(other, Answer::Refused(Denial::Misdirected));
        let host = ("host", "chat.example");
        let mixed = asked("GET", "http://evil.example/", &[host], 443);
        assert!(matches!(mixed, Answer::Refused(Denial::Malformed { .. })));
        let star = asked("OPTIONS", "*", &[host], 443);
        assert!(matches!(star, Answer::Refused(Denial::Malformed { .. })), "{star:?}");
        let socket = asked("GET", "/ws", &[host, ("upgrade", "websocket")], 443);
        assert_eq!(socket, Answer::Refused(Denial::PlainHttp));
    }

    #[test]
    fn an_open_challenge_is_answered_whatever_the_host() {
        let challenges = Arc::new(Challenges::default());
        let path = "/.well-known/acme-challenge/abc";
        let ask =
            |method| answer(&request(method, path, &[("host", "chat.example")]), &Chat, &challenges, 443);
        assert_eq!(ask("GET"), to("https://chat.example/.well-known/acme-challenge/abc"));
        let response = Challenge::Http { token: "abc".to_owned(), key_authorization: "abc.thumb".to_owned() };
        let _open = challenges.open(response).unwrap();
        assert_eq!(ask("GET"), Answer::Validation("abc.thumb".to_owned()));
        assert!(matches!(ask("POST"), Answer::Redirect(_)));
    }
}
