//! One record for each request, tunnel and change of policy, as structured events.
//!
//! The shape follows OCSF's vocabulary (activity, status, actor, source). Peer text is never written
//! here: routes, reasons and codes are from closed sets, identities from verified tokens.

use std::{net::SocketAddr, time::Duration};

use http::{Method, StatusCode};
use sealgate_policy::{AuditPolicy, AuditRequests, Identity};

use crate::{
    edge::{Client, TlsFacts},
    http::RequestId,
    websocket::relay::TunnelEnd,
};

/// What is recorded of one request.
pub struct RequestRecord<'a> {
    /// Its id, as the client and the backend saw it.
    pub id: RequestId,
    /// Where it came from.
    pub peer: SocketAddr,
    /// How it came.
    pub tls: TlsFacts,
    /// The certificate that it came with.
    pub client: Option<&'a Client>,
    /// Its method.
    pub method: &'a Method,
    /// The rule that took it on, if any did.
    pub route: Option<&'a str>,
    /// Who asked, if a token told.
    pub identity: Option<&'a Identity>,
    /// The answer's status.
    pub status: StatusCode,
    /// Why it was refused, if it was.
    pub denial: Option<&'static str>,
    /// Body bytes of the answer.
    pub bytes: u64,
    /// From the request's head to the answer's last byte.
    pub elapsed: Duration,
}

/// Records a request, if the policy wants it.
pub fn request(policy: &AuditPolicy, record: &RequestRecord<'_>) {
    let wanted = match policy.requests {
        AuditRequests::All => true,
        AuditRequests::Refused => record.denial.is_some(),
        AuditRequests::None => false,
    };
    if !wanted {
        return;
    }
    tracing::info!(
        target: "sealgate::audit",
        activity = "http-request",
        request = %record.id,
        peer = %record.peer,
        tls = record.tls.version,
        http2 = record.tls.http2,
        method = %record.method,
        route = record.route,
        subject = record.identity.map(|identity| identity.subject.as_str()),
        session = record.identity.and_then(|identity| identity.session.as_deref()),
        client = record.client.map(Client::thumbprint_text),
        client_subject = record.client.map(|client| client.certificate.subject.as_str()),
        client_serial = record.client.map(|client| client.certificate.serial.as_str()),
        status = record.status.as_u16(),
        denial = record.denial,
        bytes = record.bytes,
        seconds = record.elapsed.as_secs_f64(),
    );
}

/// What is recorded of one WebSocket.
pub struct TunnelRecord<'a> {
    /// Where it came from.
    pub peer: SocketAddr,
    /// The rule that it was opened under.
    pub route: &'a str,
    /// Whose it was.
    pub identity: Option<&'a Identity>,
    /// The certificate that it came with.
    pub client: Option<&'a Client>,
    /// Who ended it.
    pub by: &'static str,
    /// How it went.
    pub end: &'a TunnelEnd,
}

/// Records the end of a WebSocket.
pub fn tunnel(record: &TunnelRecord<'_>) {
    let end = record.end;
    tracing::info!(
        target: "sealgate::audit",
        activity = "websocket-closed",
        peer = %record.peer,
        route = record.route,
        subject = record.identity.map(|identity| identity.subject.as_str()),
        session = record.identity.and_then(|identity| identity.session.as_deref()),
        client = record.client.map(Client::thumbprint_text),
        client_subject = record.client.map(|client| client.certificate.subject.as_str()),
        client_serial = record.client.map(|client| client.certificate.serial.as_str()),
        code = end.code,
        by = record.by,
        denial = end.denial.as_ref().map(sealgate_policy::Denial::reason),
        messages_to_upstream = end.to_upstream.messages,
        bytes_to_upstream = end.to_upstream.bytes,
        messages_to_client = end.to_client.messages,
        bytes_to_client = end.to_client.bytes,
        refused = end.refused,
    );
}
