//! `/metrics`, `/healthz` and `/readyz`, read-only.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{net::TcpListener, sync::Semaphore};

use sealgate_policy::OnLoss;

use crate::{acme::Wanted, clock, edge::Gateway, shared::Standing};

/// Scrapers at a time; a scrape is short.
const MAX_CONNECTIONS: usize = 64;

/// Longest wait for a request's head, and longest idle connection.
const PATIENCE: Duration = Duration::from_secs(30);

/// Answers scrapers for ever.
pub(super) async fn serve(listener: TcpListener, gateway: Arc<Gateway>) {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(place) = room.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "metrics listener");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let gateway = gateway.clone();
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(|request| {
                let response = answer(&gateway, &request);
                async move { Ok::<_, Infallible>(response) }
            });
            let serving = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(PATIENCE)
                .serve_connection(TokioIo::new(stream), service);
            if let Err(error) = serving.await {
                tracing::debug!(%error, "metrics connection");
            }
        });
    }
}

fn answer(gateway: &Gateway, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned());
        response.headers_mut().insert(header::ALLOW, http::HeaderValue::from_static("GET, HEAD"));
        return response;
    }
    match request.uri().path() {
        "/metrics" => metrics(gateway),
        "/healthz" => text(StatusCode::OK, "alive\n".to_owned()),
        "/readyz" => ready(gateway),
        _ => text(StatusCode::NOT_FOUND, "/metrics /healthz /readyz\n".to_owned()),
    }
}

fn metrics(gateway: &Gateway) -> Response<Full<Bytes>> {
    let snapshot = gateway.current.load();
    let (live, remembered) = gateway.count_sessions();
    gateway.metrics().sessions(live, remembered);
    let ages = snapshot.verifier.key_ages(Instant::now());
    gateway.metrics().endpoints(&snapshot.upstreams, Instant::now());
    let load = &gateway.load;
    gateway.metrics().load(load.in_flight(), load.level(snapshot.policy.overload()));
    gateway.metrics().addresses_blocked(gateway.blocks.len());
    gateway.metrics().rates_overflowed(gateway.outliving.rates.overflowed());
    match gateway.metrics().render(gateway.connections.total(), ages) {
        Ok(metrics) => {
            let mut response = text(StatusCode::OK, metrics);
            response.headers_mut().insert(
                header::CONTENT_TYPE,
                http::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8"),
            );
            response
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// Ready is who can judge and has somewhere to send: not draining, in touch with other gateways and sources of revocations as far as
/// the policy wants it, and each upstream with an endpoint. A certificate that has expired, soon will, or is not issued yet, is told and no
/// reason to go: all gateways would go at once, and an authority could reach none.
fn ready(gateway: &Gateway) -> Response<Full<Bytes>> {
    if gateway.draining() {
        return text(StatusCode::SERVICE_UNAVAILABLE, "draining\n".to_owned());
    }
    let snapshot = gateway.current.load();
    match (gateway.shared.standing(), gateway.lost(&snapshot.policy)) {
        (Standing::Waiting, _) => {
            return text(
                StatusCode::SERVICE_UNAVAILABLE,
                "revocations of other gateways not read yet\n".to_owned(),
            );
        }
        (_, Some(OnLoss::FailClosed)) => {
            return text(
                StatusCode::SERVICE_UNAVAILABLE,
                "no contact with other gateways or a source of revocations\n".to_owned(),
            );
        }
        _ => {}
    }
    let without: Vec<_> = snapshot
        .upstreams
        .iter()
        .filter(|upstream| upstream.members().healthy() == 0)
        .map(|u| &*u.name)
        .collect();
    if without.is_empty() {
        let now = clock::unix_now();
        let alarms = snapshot.certificates.iter().filter_map(|row| row.alarm(now));
        let awaited = snapshot.acme.iter().filter_map(Wanted::alarm);
        let said: Vec<_> = std::iter::once("ready".to_owned()).chain(alarms).chain(awaited).collect();
        text(StatusCode::OK, said.join("\n") + "\n")
    } else {
        text(StatusCode::SERVICE_UNAVAILABLE, format!("no healthy endpoint: {}\n", without.join(", ")))
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, http::HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
