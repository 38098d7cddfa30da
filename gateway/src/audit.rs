//! One record for each request, tunnel and change of policy, as structured events.
//!
//! The shape follows OCSF's vocabulary (activity, status, actor, source). Routes, denials and codes are from closed sets, identities
//! from verified tokens. Peer text stands only in what a policy wants recorded (`audit` and `reason` of a rule): by which path,
//! about which resource and why, bounded (`sealgate_policy::Access`); the log escapes it.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use http::{Method, StatusCode};
use sealgate_policy::{Access, AuditPolicy, AuditRequests, Denial, Identity};

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
    /// What its rule wants recorded.
    pub access: Option<&'a Access>,
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
    if !wanted && record.access.is_none() {
        return;
    }
    let access = AccessFields::of(record.access, record.identity);
    tracing::info!(
        target: "sealgate::audit",
        activity = "http-request",
        request = %record.id,
        peer = %record.peer,
        tls = record.tls.version,
        http2 = record.tls.http2,
        method = %record.method,
        path = record.access.and_then(|access| access.path.as_deref()),
        route = record.route,
        subject = record.identity.map(|identity| identity.subject.as_str()),
        session = record.identity.and_then(|identity| identity.session.as_deref()),
        roles = access.roles,
        client = record.client.map(Client::thumbprint_text),
        client_subject = record.client.map(|client| client.certificate.subject.as_str()),
        client_serial = record.client.map(|client| client.certificate.serial.as_str()),
        action = access.action,
        resource_type = access.kind,
        resource = access.id,
        resource_department = access.department,
        resource_owner = access.owner,
        access_reason = access.reason,
        status = record.status.as_u16(),
        denial = record.denial,
        bytes = record.bytes,
        seconds = record.elapsed.as_secs_f64(),
    );
}

/// What is recorded of one message of a type that is recorded.
pub struct MessageRecord<'a> {
    /// Where it came from.
    pub address: IpAddr,
    /// The rule that its WebSocket was opened under.
    pub route: &'a str,
    /// Whose WebSocket it is.
    pub identity: Option<&'a Identity>,
    /// What its type wants recorded.
    pub access: &'a Access,
    /// Why it was refused, if it was.
    pub denial: Option<&'a Denial>,
}

/// Records a message.
pub fn message(record: &MessageRecord<'_>) {
    let access = AccessFields::of(Some(record.access), record.identity);
    tracing::info!(
        target: "sealgate::audit",
        activity = "websocket-message",
        address = %record.address,
        route = record.route,
        message = record.access.message.as_deref(),
        subject = record.identity.map(|identity| identity.subject.as_str()),
        session = record.identity.and_then(|identity| identity.session.as_deref()),
        roles = access.roles,
        action = access.action,
        resource_type = access.kind,
        resource = access.id,
        resource_department = access.department,
        resource_owner = access.owner,
        access_reason = access.reason,
        denial = record.denial.map(Denial::reason),
    );
}

/// An access as fields of a record; all empty without one.
#[derive(Default)]
struct AccessFields<'a> {
    roles: Option<String>,
    action: Option<&'a str>,
    kind: Option<&'a str>,
    id: Option<&'a str>,
    department: Option<&'a str>,
    owner: Option<&'a str>,
    reason: Option<&'a str>,
}

impl<'a> AccessFields<'a> {
    fn of(access: Option<&'a Access>, identity: Option<&Identity>) -> Self {
        let Some(access) = access else { return Self::default() };
        let resource = access.resource.as_ref();
        Self {
            roles: identity.map(|identity| identity.roles.join(" ")),
            action: access.action.as_deref(),
            kind: resource.map(|it| it.kind.as_str()),
            id: resource.map(|it| it.id.as_str()),
            department: resource.and_then(|it| it.department.as_deref()),
            owner: resource.and_then(|it| it.owner.as_deref()),
            reason: access.reason.as_deref(),
        }
    }
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
