//! The decisions, and the proofs they leave.
//!
//! Two steps without I/O: `judge` turns facts into demands or a [`Denial`]; the gateway gathers evidence (rates
//! taken, nothing revoked); [`settle`] and [`settle_message`] alone mint the permit. No permit has a public
//! constructor, so what was not judged cannot be forwarded.
//!
//! In shadow mode a would-be denial becomes a note on the permit ([`RequestPermit::shadowed`]). Enforced even then:
//! what protects the gateway itself (malformed requests, sizes) and what ended a session (revocation).

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Method, header};
use serde_json::{Map, Value};

use crate::denial::Denial;
use crate::identity::Identity;
use crate::json::{self, Schema};
use crate::matcher::{self, CanonicalPath};
use crate::policy::{Mode, Policy, RateFacts, RateIndex, UpstreamIndex};
use crate::rule::{
    Authentication, BodyRule, MessageRule, OnRefusal, RateList, Rule, TunnelLimits, TunnelRule,
};

/// What is known of a connection when it is accepted; counts are without it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionFacts {
    /// The peer's address.
    pub peer: IpAddr,
    /// Connections open in all.
    pub open_total: u32,
    /// Connections open from this address.
    pub open_from_address: u32,
}

/// Proof that [`Policy::permit_connection`] agreed.
#[derive(Debug)]
pub struct ConnectionPermit {
    peer: IpAddr,
}

impl ConnectionPermit {
    /// Whose connection it is.
    pub fn peer(&self) -> IpAddr {
        self.peer
    }
}

/// What is known of a request when its head has arrived.
#[derive(Debug, Clone, Copy)]
pub struct RequestFacts<'a> {
    /// The client's address.
    pub peer: IpAddr,
    /// Host asked for: lower case, without port.
    pub host: &'a str,
    /// Method.
    pub method: &'a Method,
    /// Path as received.
    pub path: &'a str,
    /// Query as received, without `?`.
    pub query: Option<&'a str>,
    /// All fields, before any is stripped.
    pub headers: &'a HeaderMap,
    /// Whether it asks for a WebSocket (RFC 6455 upgrade or RFC 8441 extended CONNECT).
    pub websocket: bool,
    /// Declared length.
    pub content_length: Option<u64>,
    /// Whether a body follows.
    pub has_body: bool,
}

/// The rule that covers a request, not yet judged by it.
#[derive(Debug)]
pub struct RouteMatch {
    rule: Arc<Rule>,
    path: CanonicalPath,
}

/// A request that the rule agrees with, if the evidence does.
#[derive(Debug)]
pub struct RequestDemands {
    subject: Subject,
}

/// Proof that a request was judged. Made by [`settle`] only.
#[derive(Debug)]
pub struct RequestPermit {
    subject: Subject,
}

/// Proof that a WebSocket may be opened. Made by [`RequestPermit::into_tunnel`] only.
#[derive(Debug)]
pub struct TunnelPermit {
    // INVARIANT: `subject.rule.tunnel` is there; `into_tunnel` saw to it.
    subject: Subject,
}

/// Proof that a body matches its rule. Made by [`RequestPermit::judge_body`] only.
#[derive(Debug)]
pub struct BodyPermit {
    shadowed: Option<Denial>,
}

/// What every step after the match carries along.
#[derive(Debug)]
struct Subject {
    rule: Arc<Rule>,
    path: CanonicalPath,
    address: IpAddr,
    identity: Option<Arc<Identity>>,
    shadowed: Option<Denial>,
}

/// What the gateway found out by doing: rates taken, revocations looked up.
#[derive(Debug)]
pub struct Evidence {
    /// Whether all demanded rates had room.
    pub rates: Result<(), RateExceeded>,
    /// Whether token, session or subject is revoked.
    pub revoked: bool,
}

/// The first rate without room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateExceeded {
    /// Which rate.
    pub rate: RateIndex,
    /// When one more would be let through.
    pub retry_after: Duration,
}

impl Policy {
    /// Judges a connection before anything is spent on it.
    ///
    /// # Errors
    /// [`Denial::TooManyConnections`]: close it without an answer.
    pub fn permit_connection(&self, facts: &ConnectionFacts) -> Result<ConnectionPermit, Denial> {
        let limits = &self.connections;
        if facts.open_total >= limits.max_total || facts.open_from_address >= limits.max_per_address {
            return Err(Denial::TooManyConnections);
        }
        Ok(ConnectionPermit { peer: facts.peer })
    }

    /// Finds the one rule for a request, by host, canonical path and method.
    ///
    /// # Errors
    /// [`Denial::Malformed`] and [`Denial::UriTooLong`] for path and query, [`Denial::Misdirected`] for a host no
    /// rule names, [`Denial::NoRoute`], [`Denial::MethodNotAllowed`], [`Denial::UpgradeRequired`],
    /// [`Denial::NoWebsocket`].
    pub fn match_request(&self, facts: &RequestFacts<'_>) -> Result<RouteMatch, Denial> {
        if let Some(query) = facts.query {
            if query.len() > matcher::MAX_QUERY {
                return Err(Denial::UriTooLong);
            }
            matcher::check_query(query)?;
        }
        let (rule, path) = self
            .routes
            .find(facts.host, facts.method, facts.path, facts.websocket)?;
        Ok(RouteMatch {
            rule: Arc::clone(rule),
            path,
        })
    }
}

impl RouteMatch {
    /// Whether a token must be verified before [`RouteMatch::judge`].
    pub fn authentication(&self) -> Authentication {
        self.rule.authentication
    }

    /// The rule.
    pub fn rule(&self) -> &Arc<Rule> {
        &self.rule
    }

    /// Judges the head of a request. `facts` are those that were matched.
    ///
    /// # Errors
    /// The first [`Denial`] in this order: sizes, token, roles, origin, content type, query.
    pub fn judge(
        self,
        facts: &RequestFacts<'_>,
        identity: Option<Arc<Identity>>,
    ) -> Result<RequestDemands, Denial> {
        let Self { rule, path } = self;
        judge_sizes(&rule, facts)?;
        // A rule that asks for no token vouches for none upstream.
        let identity = identity.filter(|_| rule.authentication == Authentication::Required);
        let shadowed = noted(rule.mode, judge_head(&rule, facts, identity.as_deref()))?;
        Ok(RequestDemands {
            subject: Subject {
                rule,
                path,
                address: facts.peer,
                identity,
                shadowed,
            },
        })
    }
}

/// Limits that protect the gateway itself, enforced in shadow mode too.
fn judge_sizes(rule: &Rule, facts: &RequestFacts<'_>) -> Result<(), Denial> {
    let limit = rule.body.max_bytes;
    let too_long = facts.content_length.is_some_and(|length| length > limit);
    if too_long || (facts.has_body && limit == 0) {
        return Err(Denial::BodyTooLarge { limit });
    }
    let query_limit = rule
        .query
        .as_ref()
        .map_or(matcher::MAX_QUERY, |query| query.max_bytes);
    if facts.query.is_some_and(|query| query.len() > query_limit) {
        return Err(Denial::UriTooLong);
    }
    Ok(())
}

fn judge_head(rule: &Rule, facts: &RequestFacts<'_>, identity: Option<&Identity>) -> Result<(), Denial> {
    if rule.authentication == Authentication::Required {
        let identity = identity.ok_or(Denial::TokenMissing)?;
        if !rule.roles.is_empty() && !rule.roles.iter().any(|role| identity.roles.contains(role)) {
            return Err(Denial::RoleMissing);
        }
    }
    if let Some(tunnel) = &rule.tunnel {
        tunnel.origins.check(facts.headers, facts.host)?;
        if tunnel.subprotocol_required && !offers_one_of(&tunnel.subprotocols, facts.headers) {
            return Err(Denial::SubprotocolNotAllowed);
        }
    }
    if facts.has_body {
        rule.content_types.check(facts.headers, rule.body.buffered)?;
    } else if rule.body.buffered {
        // Without a body there would be nothing to hold against the schema.
        return Err(Denial::NotJson);
    }
    match (&rule.query, facts.query) {
        (None, Some(query)) if !query.is_empty() => Err(Denial::QueryNotAllowed),
        (Some(query_rule), query) => match &query_rule.schema {
            Some(schema) => judge_query(schema, query.unwrap_or_default()),
            None => Ok(()),
        },
        (None, _) => Ok(()),
    }
}

/// Whether the client offers a subprotocol that the rule allows (RFC 6455 §4.1: names are compared exactly).
fn offers_one_of(allowed: &[String], headers: &HeaderMap) -> bool {
    let lists = headers
        .get_all(header::SEC_WEBSOCKET_PROTOCOL)
        .iter()
        .filter_map(|list| list.to_str().ok());
    let mut offered = lists
        .flat_map(|list| list.split(','))
        .map(|name| name.trim_matches([' ', '\t']));
    offered.any(|name| allowed.iter().any(|known| known == name))
}

/// Holds a query against its schema: an object of strings, or of arrays of strings where a name stands twice.
fn judge_query(schema: &Schema, query: &str) -> Result<(), Denial> {
    let decode = |text: &str| {
        form_decoded(text).ok_or(Denial::Malformed {
            detail: "the query is not UTF-8",
        })
    };
    let mut object = Map::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = Value::String(decode(value)?);
        match object.entry(decode(name)?) {
            serde_json::map::Entry::Vacant(entry) => drop(entry.insert(value)),
            serde_json::map::Entry::Occupied(mut entry) => match entry.get_mut() {
                Value::Array(values) => values.push(value),
                first => *first = Value::Array(vec![first.take(), value]),
            },
        }
    }
    schema
        .check(&Value::Object(object))
        .map_err(|pointer| Denial::Schema { pointer })
}

/// Decodes `application/x-www-form-urlencoded`; `None` if the result is not UTF-8.
fn form_decoded(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'+' => b' ',
            b'%' => matcher::hex_byte(bytes.next()?, bytes.next()?)?,
            _ => byte,
        });
    }
    String::from_utf8(out).ok()
}

/// Turns a denial into a note where the rule only counts.
fn noted(mode: Mode, judged: Result<(), Denial>) -> Result<Option<Denial>, Denial> {
    match (judged, mode) {
        (Ok(()), _) => Ok(None),
        (Err(denial), Mode::Shadow) => Ok(Some(denial)),
        (Err(denial), Mode::Enforce) => Err(denial),
    }
}

impl RequestDemands {
    /// Rates to take, all or none, enforced ones first.
    pub fn rates(&self) -> &[RateIndex] {
        &self.subject.rule.rates.all
    }

    /// What to take them for.
    pub fn rate_facts(&self) -> RateFacts<'_> {
        self.subject.rate_facts(None)
    }

    /// What the request does, by the rule's word.
    pub fn action(&self) -> Option<&str> {
        self.subject.rule.action.as_deref()
    }

    /// The rule.
    pub fn rule(&self) -> &Arc<Rule> {
        &self.subject.rule
    }

    /// Who asks.
    pub fn identity(&self) -> Option<&Arc<Identity>> {
        self.subject.identity.as_ref()
    }
}

impl Subject {
    fn rate_facts<'a>(&'a self, message_type: Option<&'a str>) -> RateFacts<'a> {
        let identity = self.identity.as_deref();
        RateFacts {
            address: self.address,
            issuer: identity.map(|identity| &*identity.issuer),
            subject: identity.map(|identity| identity.subject.as_str()),
            session: identity.and_then(|identity| identity.session.as_deref()),
            route: &self.rule.name,
            message_type,
        }
    }
}

/// Mints the permit for a request if the evidence agrees.
///
/// # Errors
/// [`Denial::Revoked`]; [`Denial::RateExceeded`] unless rate or rule only counts.
pub fn settle(demands: RequestDemands, evidence: Evidence) -> Result<RequestPermit, Denial> {
    let RequestDemands { mut subject } = demands;
    let note = weigh(&evidence, subject.rule.mode, &subject.rule.rates)?;
    subject.shadowed = subject.shadowed.or(note);
    Ok(RequestPermit { subject })
}

fn weigh(evidence: &Evidence, mode: Mode, rates: &RateList) -> Result<Option<Denial>, Denial> {
    if evidence.revoked {
        return Err(Denial::Revoked);
    }
    let Err(RateExceeded { rate, retry_after }) = evidence.rates else {
        return Ok(None);
    };
    let mode = if rates.is_shadow(rate) { Mode::Shadow } else { mode };
    noted(mode, Err(Denial::RateExceeded { rate, retry_after }))
}

impl RequestPermit {
    /// The rule that agreed.
    pub fn rule(&self) -> &Arc<Rule> {
        &self.subject.rule
    }

    /// Where the request goes.
    pub fn upstream(&self) -> UpstreamIndex {
        self.subject.rule.upstream
    }

    /// Who asks; `None` where the rule wants no token.
    pub fn identity(&self) -> Option<&Arc<Identity>> {
        self.subject.identity.as_ref()
    }

    /// The client's address.
    pub fn address(&self) -> IpAddr {
        self.subject.address
    }

    /// The path to forward, in the form that was judged.
    pub fn path(&self) -> &str {
        self.subject.path.as_str()
    }

    /// Limit to count while the body flows, and whether it must be held and judged first.
    pub fn body(&self) -> &BodyRule {
        &self.subject.rule.body
    }

    /// What would have been refused, were rule or rate not in shadow mode.
    pub fn shadowed(&self) -> Option<&Denial> {
        self.subject.shadowed.as_ref()
    }

    /// Judges a whole body.
    ///
    /// # Errors
    /// [`Denial::BodyTooLarge`], [`Denial::NotJson`], [`Denial::Schema`].
    pub fn judge_body(&self, body: &[u8]) -> Result<BodyPermit, Denial> {
        let rule = &self.subject.rule;
        let limit = rule.body.max_bytes;
        if u64::try_from(body.len()).map_or(true, |length| length > limit) {
            return Err(Denial::BodyTooLarge { limit });
        }
        let judged = match &rule.body_schema {
            None => Ok(()),
            Some(schema) => json::parse(body)
                .map_err(|_| Denial::NotJson)
                .and_then(|value| schema.check(&value).map_err(|pointer| Denial::Schema { pointer })),
        };
        Ok(BodyPermit {
            shadowed: noted(rule.mode, judged)?,
        })
    }

    /// Permission to open the WebSocket; `None` if the rule is a route.
    pub fn into_tunnel(self) -> Option<TunnelPermit> {
        self.subject.rule.tunnel.as_ref()?;
        Some(TunnelPermit {
            subject: self.subject,
        })
    }
}

impl BodyPermit {
    /// What would have been refused, were the rule not in shadow mode.
    pub fn shadowed(&self) -> Option<&Denial> {
        self.shadowed.as_ref()
    }
}

/// Which way a message goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the client.
    ToUpstream,
    /// From the upstream.
    ToClient,
}

/// Kind of a message (RFC 6455 §5.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MessageKind {
    /// Text; the caller has checked that it is UTF-8.
    Text,
    /// Binary.
    Binary,
}

/// One whole, unmasked message.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// Which way it goes.
    pub direction: Direction,
    /// Text or binary.
    pub kind: MessageKind,
    /// Payload over all fragments.
    pub payload: &'a [u8],
}

/// A message that the rule agrees with, if the evidence does.
#[derive(Debug)]
pub struct MessageDemands<'t> {
    tunnel: &'t TunnelPermit,
    rates: &'t RateList,
    message: Option<&'t MessageRule>,
    activity: bool,
    shadowed: Option<Denial>,
}

/// Proof that a message was judged. Made by [`settle_message`] only.
#[derive(Debug)]
pub struct MessagePermit {
    activity: bool,
    shadowed: Option<Denial>,
}

/// A refused message, and what becomes of the socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Why.
    pub denial: Denial,
    /// Close, or drop the message and answer.
    pub action: OnRefusal,
}

impl TunnelPermit {
    /// The rule that agreed.
    pub fn rule(&self) -> &Arc<Rule> {
        &self.subject.rule
    }

    /// Where the socket goes.
    pub fn upstream(&self) -> UpstreamIndex {
        self.subject.rule.upstream
    }

    /// Whose socket it is; `None` where the rule wants no token.
    pub fn identity(&self) -> Option<&Arc<Identity>> {
        self.subject.identity.as_ref()
    }

    /// The client's address.
    pub fn address(&self) -> IpAddr {
        self.subject.address
    }

    /// The path to forward, in the form that was judged.
    pub fn path(&self) -> &str {
        self.subject.path.as_str()
    }

    /// What would have been refused, were rule or rate not in shadow mode.
    pub fn shadowed(&self) -> Option<&Denial> {
        self.subject.shadowed.as_ref()
    }

    /// Frame, message and time limits.
    pub fn limits(&self) -> &TunnelLimits {
        static NOTHING: TunnelLimits = TunnelLimits::NOTHING;
        self.tunnel().map_or(&NOTHING, |tunnel| &tunnel.limits)
    }

    /// Subprotocols of which one must be agreed on; empty: none is spoken and none is offered upstream.
    pub fn subprotocols(&self) -> &[String] {
        self.tunnel().map_or(&[], |tunnel| &tunnel.subprotocols)
    }

    /// Whether a client must offer one of [`TunnelPermit::subprotocols`].
    pub fn subprotocol_required(&self) -> bool {
        self.tunnel().is_none_or(|tunnel| tunnel.subprotocol_required)
    }

    /// Whether messages of this direction are looked into; if not, they need no unmasking to be judged.
    pub fn inspects(&self, direction: Direction) -> bool {
        self.tunnel()
            .is_none_or(|tunnel| tunnel.table(direction).is_some())
    }

    fn tunnel(&self) -> Option<&TunnelRule> {
        self.subject.rule.tunnel.as_ref()
    }

    /// Judges one whole message. Does not allocate where the direction is not inspected.
    ///
    /// # Errors
    /// [`Refusal`] with [`Denial::MessageTooBig`], [`Denial::MessageKind`], [`Denial::NotJson`],
    /// [`Denial::UnknownMessageType`] or [`Denial::Schema`].
    pub fn judge_message(&self, message: &Message<'_>) -> Result<MessageDemands<'_>, Refusal> {
        let close = |denial| Refusal {
            denial,
            action: OnRefusal::Close,
        };
        let Some(tunnel) = self.tunnel() else {
            return Err(close(Denial::Internal));
        };
        let limit = tunnel.limits.max_message;
        if u32::try_from(message.payload.len()).map_or(true, |length| length > limit) {
            return Err(close(Denial::MessageTooBig { limit }));
        }
        let from_client = message.direction == Direction::ToUpstream;
        let mut demands = MessageDemands {
            tunnel: self,
            rates: if from_client {
                &tunnel.message_rates
            } else {
                RateList::NONE
            },
            message: None,
            activity: from_client && tunnel.activity,
            shadowed: None,
        };
        match demands.look_into(tunnel, message) {
            Ok(()) => Ok(demands),
            Err(refusal) if self.subject.rule.mode == Mode::Shadow => {
                demands.shadowed = Some(refusal.denial);
                Ok(demands)
            }
            Err(refusal) => Err(refusal),
        }
    }
}

impl<'t> MessageDemands<'t> {
    fn look_into(&mut self, tunnel: &'t TunnelRule, message: &Message<'_>) -> Result<(), Refusal> {
        let allowed = match message.kind {
            MessageKind::Text => tunnel.kinds.text,
            MessageKind::Binary => tunnel.kinds.binary,
        };
        if !allowed {
            return Err(Refusal {
                denial: Denial::MessageKind,
                action: OnRefusal::Close,
            });
        }
        let Some(table) = tunnel.table(message.direction) else {
            return Ok(());
        };
        let unknown = |denial| Refusal {
            denial,
            action: table.on_unknown,
        };
        let value = json::parse(message.payload).map_err(|_| unknown(Denial::NotJson))?;
        let rule = json::lookup(&value, &table.pointer)
            .and_then(Value::as_str)
            .and_then(|name| table.types.get(name))
            .ok_or_else(|| unknown(Denial::UnknownMessageType))?;
        self.message = Some(rule);
        self.rates = &rule.rates;
        self.activity = rule.activity;
        match &rule.schema {
            None => Ok(()),
            Some(schema) => schema.check(&value).map_err(|pointer| Refusal {
                denial: Denial::Schema { pointer },
                action: rule.on_refusal,
            }),
        }
    }

    /// Rates to take, all or none, enforced ones first.
    pub fn rates(&self) -> &[RateIndex] {
        &self.rates.all
    }

    /// What to take them for.
    pub fn rate_facts(&self) -> RateFacts<'_> {
        self.tunnel.subject.rate_facts(self.message_type())
    }

    /// The type, as the policy names it; `None` where the message was not looked into.
    pub fn message_type(&self) -> Option<&str> {
        self.message.map(|message| &*message.name)
    }

    /// What the message does, by the policy's word.
    pub fn action(&self) -> Option<&str> {
        self.message.and_then(|message| message.action.as_deref())
    }

    /// Whether the message is the user's activity (row S-1).
    pub fn activity(&self) -> bool {
        self.activity
    }
}

/// Mints the permit for a message if the evidence agrees.
///
/// # Errors
/// [`Refusal`] with [`Denial::Revoked`] (always closes) or [`Denial::RateExceeded`].
pub fn settle_message(demands: MessageDemands<'_>, evidence: Evidence) -> Result<MessagePermit, Refusal> {
    match weigh(&evidence, demands.tunnel.subject.rule.mode, demands.rates) {
        Ok(note) => Ok(MessagePermit {
            activity: demands.activity,
            shadowed: demands.shadowed.or(note),
        }),
        Err(Denial::Revoked) => Err(Refusal {
            denial: Denial::Revoked,
            action: OnRefusal::Close,
        }),
        Err(denial) => {
            let action = demands
                .message
                .map_or(OnRefusal::Close, |message| message.on_refusal);
            Err(Refusal { denial, action })
        }
    }
}

impl MessagePermit {
    /// Whether the message is the user's activity (row S-1).
    pub fn activity(&self) -> bool {
        self.activity
    }

    /// What would have been refused, were rule or rate not in shadow mode.
    pub fn shadowed(&self) -> Option<&Denial> {
        self.shadowed.as_ref()
    }
}
