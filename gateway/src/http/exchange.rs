//! One request and its answer: counted and recorded once, when the answer's last byte is gone.

use std::{cell::Cell, rc::Rc, sync::Arc, time::Instant};

use http::{HeaderValue, StatusCode};
use sealgate_policy::{Access, Denial, Identity, Resource, Rule};

use crate::{
    audit,
    edge::{Connection, Core},
    limits::{Place, Work},
    reload::Snapshot,
};

/// The account of one request. Its drop is the end of the request, however that came about.
pub struct Exchange {
    core: Rc<Core>,
    connection: Arc<Connection>,
    snapshot: Arc<Snapshot>,
    /// Names the request in the answer, upstream, and in the audit record.
    pub id: RequestId,
    began: Instant,
    method: http::Method,
    rule: Option<Arc<Rule>>,
    identity: Option<Arc<Identity>>,
    status: StatusCode,
    denial: Option<&'static str>,
    /// What the rule wants recorded; in a box, as few do.
    access: Option<Box<Access>>,
    bytes: u64,
    _work: Work,
    /// Where only so many may be under way.
    place: Cell<Option<Place>>,
}

/// 128 bits in hexadecimal: the request's id and, at the boundary, a new trace id (W3C Trace Context).
#[derive(Clone, Copy)]
pub struct RequestId([u8; 32]);

impl RequestId {
    /// An id from a generator that need not be secret, only unrepeated.
    #[must_use]
    pub fn new(random: u128) -> Self {
        let mut digits = [0; 32];
        // All zeroes is no valid trace id.
        write_hex(&random.max(1).to_be_bytes(), &mut digits);
        Self(digits)
    }

    /// The `traceparent` of a trace that begins here, not sampled by our say.
    #[must_use]
    pub fn traceparent(self, span: u64) -> HeaderValue {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        let [_, _, _, rest @ ..] = &mut text;
        let (trace, rest) = rest.split_at_mut(32);
        trace.copy_from_slice(&self.0);
        write_hex(&span.max(1).to_be_bytes(), rest.get_mut(1..17).unwrap_or_default());
        HeaderValue::from_bytes(&text).unwrap_or(NO_ID)
    }

    /// As a header value.
    #[must_use]
    pub fn header(self) -> HeaderValue {
        HeaderValue::from_bytes(&self.0).unwrap_or(NO_ID)
    }
}

/// For a value that cannot be had: hexadecimal digits always can.
const NO_ID: HeaderValue = HeaderValue::from_static("0");

fn write_hex(bytes: &[u8], digits: &mut [u8]) {
    let digit = |nibble: u8| if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 };
    for (byte, pair) in bytes.iter().zip(digits.as_chunks_mut().0) {
        *pair = [digit(byte >> 4), digit(byte & 0xf)];
    }
}

impl std::fmt::Display for RequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(str::from_utf8(&self.0).unwrap_or("0"))
    }
}

impl Exchange {
    /// Starts the account; in a box, since it goes through many hands.
    #[must_use]
    pub fn begin(
        core: Rc<Core>,
        connection: Arc<Connection>,
        snapshot: Arc<Snapshot>,
        method: http::Method,
    ) -> Box<Self> {
        let began = Instant::now();
        connection.clock.request_begins(began);
        let id = RequestId::new(core.random());
        let work = core.gateway.load.begin();
        Box::new(Self {
            core,
            connection,
            snapshot,
            id,
            began,
            method,
            rule: None,
            identity: None,
            status: StatusCode::INTERNAL_SERVER_ERROR,
            denial: None,
            access: None,
            bytes: 0,
            _work: work,
            place: Cell::new(None),
        })
    }

    /// A rule took the request on.
    pub fn matched(&mut self, rule: Arc<Rule>) {
        self.rule = Some(rule);
    }

    /// A token told who asks.
    pub fn identified(&mut self, identity: Arc<Identity>) {
        self.identity = Some(identity);
    }

    /// The rule wants this recorded.
    pub fn watched(&mut self, access: Access) {
        self.access = Some(Box::new(access));
    }

    /// What a request is about that is recorded is known from its body.
    pub fn accessed(&mut self, resource: Option<Resource>) {
        if let (Some(access), Some(resource)) = (&mut self.access, resource) {
            access.resource = Some(resource);
        }
    }

    /// The request has a place among those that may be under way.
    pub fn placed(&mut self, place: Place) {
        self.place.set(Some(place));
    }

    /// Takes the place over, for a WebSocket that goes on after its request.
    pub fn take_place(&self) -> Option<Place> {
        self.place.take()
    }

    /// The request was refused.
    pub fn refused(&mut self, denial: &Denial) {
        self.denial = Some(denial.reason());
    }

    /// The answer's head is known.
    pub fn answered(&mut self, status: StatusCode) {
        self.status = status;
    }

    /// Bytes of the answer's body that went out.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it is a stream of HTTP/2.
    #[must_use]
    pub fn over_http2(&self) -> bool {
        self.connection.tls.http2
    }

    /// Whether only the head of an answer is asked for.
    #[must_use]
    pub fn is_head(&self) -> bool {
        self.method == http::Method::HEAD
    }

    /// Whether the answer is the connection's last.
    #[must_use]
    pub fn is_last(&self) -> bool {
        self.connection.condemned().is_some()
    }

    /// `bytes` of the answer's body went out.
    pub fn sent(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let now = Instant::now();
        self.connection.clock.request_ended(now);
        let elapsed = now.saturating_duration_since(self.began);
        self.snapshot.metrics.of(self.rule.as_deref()).request(self.status, elapsed);
        if let Some(reason) = self.denial {
            self.core.gateway.metrics().denied(reason);
        }
        audit::request(
            self.snapshot.policy.audit(),
            &audit::RequestRecord {
                id: self.id,
                peer: self.connection.peer,
                tls: self.connection.tls,
                client: self.connection.client.as_ref(),
                method: &self.method,
                route: self.rule.as_deref().map(|rule| &*rule.name),
                identity: self.identity.as_deref(),
                status: self.status,
                denial: self.denial,
                access: self.access.as_deref(),
                bytes: self.bytes,
                elapsed,
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_prints_the_same_in_header_and_text() {
        let id = RequestId::new(0x0123_4567_89ab_cdef_0000_0000_0000_00ff);
        assert_eq!(id.header().to_str().unwrap(), id.to_string());
        assert_eq!(id.to_string(), "0123456789abcdef00000000000000ff");
    }

    #[test]
    fn the_traceparent_has_trace_and_span() {
        let id = RequestId::new(0xabc << 64 | 0xdef);
        assert_eq!(id.traceparent(0x12_3456), "00-0000000000000abc0000000000000def-0000000000123456-00");
    }

    #[test]
    fn the_traceparent_is_never_all_zeroes() {
        assert_eq!(
            RequestId::new(0).traceparent(0),
            "00-00000000000000000000000000000001-0000000000000001-00"
        );
    }
}
