//! The decisions, and the proofs they leave.
//!
//! Two steps without I/O: `judge` turns facts into demands or a [`Denial`]; the gateway gathers evidence (rates
//! taken, nothing revoked); [`settle`] and [`settle_message`] alone mint the permit. No permit has a public
//! constructor, so what was not judged cannot be forwarded.
//!
//! In shadow mode a would-be denial becomes a note on the permit ([`RequestPermit::shadowed`]). Enforced even then:
//! what protects the gateway itself (malformed requests, sizes) and what ended a session (revocation).

use std::borrow::Cow;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, Method, header};
use serde_json::{Map, Value};
use zeroize::Zeroizing;

use crate::access::{self, Access, Resource};
use crate::authz::{Decision, DecisionCache, Found, Places, Sample, TlsFacts};
use crate::certificate::ClientCertificate;
use crate::ciphertext::Conversation;
use crate::denial::{Denial, FormFault, JsonFault, TokenFault};
use crate::identity::{Binding, Identity};
use crate::json::{self, Judged, Schema};
use crate::multipart::{self, FormJudge};
use crate::path;
use crate::policy::{
    ConcurrencyIndex, Mode, OnLoss, PenaltyIndex, Policy, RateFacts, RateIndex, Sender, UpstreamIndex,
};
use crate::routes::CanonicalPath;
use crate::rule::{
    Authentication, BodyRule, CiphertextRule, Compression, MaxOpen, MessageRule, OnRefusal, RateList,
    RenewRule, Rule, StepUp, TunnelLimits, TunnelRule,
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
    /// Whether a list or a block refuses this address.
    pub refused: bool,
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
    /// What is known of its TLS connection.
    pub tls: TlsFacts,
    /// The connection's client certificate, if it has one that TLS has verified.
    pub certificate: Option<&'a ClientCertificate>,
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
    asked: Asked,
    /// What the sender has proved to hold; nothing, until he was asked.
    proven: Option<Binding>,
}

/// Proof that a request was judged. Made by [`settle`] only.
#[derive(Debug)]
pub struct RequestPermit {
    subject: Subject,
    asked: Asked,
}

/// Proof that a WebSocket may be opened. Made by [`RequestPermit::into_tunnel`] only.
#[derive(Debug)]
pub struct TunnelPermit {
    // INVARIANT: `subject.rule.tunnel` is there; `into_tunnel` saw to it.
    subject: Subject,
    socket: u64,
}

/// Proof that a body matches its rule. Made by [`RequestPermit::judge_body`] only.
#[derive(Debug)]
pub struct BodyPermit {
    shadowed: Option<Denial>,
    account: Option<String>,
}

/// What every step after the match carries along.
#[derive(Debug)]
struct Subject {
    rule: Arc<Rule>,
    path: CanonicalPath,
    address: IpAddr,
    tls: TlsFacts,
    identity: Option<Arc<Identity>>,
    shadowed: Option<Denial>,
}

/// What it takes to ask the Cedar policies about a request, and no open socket carries along.
#[derive(Debug)]
struct Asked {
    /// The query, where it takes it to tell what a request is about.
    query: Option<Box<str>>,
    /// Unix seconds; nothing, until [`RequestDemands::prove`] was called.
    at: Option<u64>,
    /// What parts of a form are parted by.
    boundary: Option<Box<str>>,
    /// The denial for not saying why.
    unreasoned: Option<Denial>,
}

/// What the gateway found out by doing: rates taken, revocations looked up.
#[derive(Debug)]
pub struct Evidence {
    /// Whether all demanded rates had room.
    pub rates: Result<(), RateExceeded>,
    /// Whether token, session or subject is revoked.
    pub revoked: bool,
    /// What the policy wants while revocations of other gateways cannot be known; `None` while they can.
    pub lost: Option<OnLoss>,
}

/// The first rate without room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateExceeded {
    /// Which rate.
    pub rate: RateIndex,
    /// When one more would be let through.
    pub retry_after: Duration,
    /// Nobody could say whether it has room, and its rule would rather refuse then ([`OnRateError::Deny`]).
    ///
    /// [`OnRateError::Deny`]: crate::OnRateError::Deny
    pub unknown: bool,
}

impl Policy {
    /// Judges a connection before anything is spent on it.
    ///
    /// # Errors
    /// [`Denial::AddressRefused`], [`Denial::TooManyConnections`]: close it without an answer.
    pub fn permit_connection(&self, facts: &ConnectionFacts) -> Result<ConnectionPermit, Denial> {
        let limits = &self.connections;
        if facts.refused {
            return Err(Denial::AddressRefused);
        }
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
            if query.len() > path::MAX_QUERY {
                return Err(Denial::UriTooLong);
            }
            path::check_query(query)?;
        }
        let (rule, path) = self.routes.find(facts.host, facts.method, facts.path, facts.websocket)?;
        Ok(RouteMatch { rule: Arc::clone(rule), path })
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

    pub(crate) fn into_parts(self) -> (Arc<Rule>, CanonicalPath) {
        (self.rule, self.path)
    }

    /// What is to be recorded of the request, if its rule has it recorded: known before it is judged, so that refusals say it too.
    /// Where the resource stands in the body, [`RequestPermit::accessed`] knows it.
    pub fn access(&self, facts: &RequestFacts<'_>) -> Option<Access> {
        let audit = self.rule.audit.as_ref()?;
        let places = Places { path: self.path.as_str(), query: facts.query, document: None };
        let resource =
            self.rule.authorization.as_ref().and_then(|decision| {
                Some(Resource::of(&decision.resource, &decision.resource.find(places)?))
            });
        let reason = audit.reason(facts.headers).map(str::to_owned);
        // It is ASCII.
        let path = self.path.as_str();
        let path = path.get(..access::MAX_PATH.min(path.len())).unwrap_or_default();
        Some(Access {
            action: self.rule.action.clone(),
            message: None,
            path: Some(path.into()),
            resource,
            reason,
        })
    }

    /// Judges the head of a request. `facts` are those that were matched.
    ///
    /// # Errors
    /// The first [`Denial`] in this order: sizes, client certificate, token, roles, protocol, origin, content type, query.
    pub fn judge(
        self,
        facts: &RequestFacts<'_>,
        identity: Option<Arc<Identity>>,
    ) -> Result<RequestDemands, Denial> {
        let Self { rule, path } = self;
        judge_sizes(&rule, facts)?;
        // A rule that asks for no token vouches for none upstream.
        let identity = identity.filter(|_| rule.authentication == Authentication::Required);
        let judged = judge_head(&rule, facts, identity.as_deref()).and_then(|()| form_boundary(&rule, facts));
        let (shadowed, boundary) = match judged {
            Ok(boundary) => (None, boundary),
            Err(denial) if rule.mode == Mode::Shadow => (Some(denial), None),
            Err(denial) => return Err(denial),
        };
        let asks_query = rule.authorization.as_ref().is_some_and(|decision| decision.resource.needs_query());
        let unreasoned = rule.audit.as_ref().and_then(|audit| audit.check(audit.reason(facts.headers)).err());
        let query = facts.query.filter(|_| asks_query).map(Into::into);
        let asked = Asked { query, at: None, boundary, unreasoned };
        let subject = Subject { rule, path, address: facts.peer, tls: facts.tls, identity, shadowed };
        Ok(RequestDemands { subject, asked, proven: None })
    }
}

/// Limits that protect the gateway itself, enforced in shadow mode too.
fn judge_sizes(rule: &Rule, facts: &RequestFacts<'_>) -> Result<(), Denial> {
    let limit = rule.body.max_bytes;
    let too_long = facts.content_length.is_some_and(|length| length > limit);
    if too_long || (facts.has_body && limit == 0) {
        return Err(Denial::BodyTooLarge { limit });
    }
    let query_limit = rule.query.as_ref().map_or(path::MAX_QUERY, |query| query.max_bytes);
    if facts.query.is_some_and(|query| query.len() > query_limit) {
        return Err(Denial::UriTooLong);
    }
    Ok(())
}

fn judge_head(rule: &Rule, facts: &RequestFacts<'_>, identity: Option<&Identity>) -> Result<(), Denial> {
    if let Some(certificate) = &rule.certificate {
        certificate.check(facts.certificate)?;
    }
    if rule.authentication == Authentication::Required {
        let identity = identity.ok_or(Denial::TokenMissing)?;
        if !rule.roles.is_empty() && !rule.roles.iter().any(|role| identity.roles.contains(role)) {
            return Err(Denial::RoleMissing);
        }
        // Not only where the role is named: the upstream is told of it everywhere.
        rule.role_rules.iter().try_for_each(|role| role.check(identity))?;
    }
    if let Some(tunnel) = &rule.tunnel {
        if facts.method == Method::CONNECT && !tunnel.http2 {
            return Err(Denial::ProtocolNotOffered);
        }
        tunnel.origins.check(facts.headers, facts.host)?;
        if tunnel.subprotocol_required && !offers_one_of(&tunnel.subprotocols, facts.headers) {
            return Err(Denial::SubprotocolNotAllowed);
        }
    }
    if facts.has_body {
        rule.content_types.check(facts.headers, rule.body.buffered || rule.form.is_some())?;
        rule.content_codings.check(facts.headers)?;
    } else if rule.form.is_some() {
        return Err(FormFault::End.into());
    } else if rule.body.buffered {
        // Without a body there would be nothing to hold against the schema.
        return Err(Denial::Json { fault: JsonFault::End, at: 0, pointer: String::new() });
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

/// The boundary of a form, where the rule wants one.
fn form_boundary(rule: &Rule, facts: &RequestFacts<'_>) -> Result<Option<Box<str>>, Denial> {
    if rule.form.is_none() {
        return Ok(None);
    }
    // INVARIANT: there is one; `judge_head` saw to it.
    let content_type = facts.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let boundary = multipart::boundary(content_type.ok_or(FormFault::Boundary)?)?;
    Ok(Some(boundary.into()))
}

/// Whether the client offers a subprotocol that the rule allows (RFC 6455 §4.1: names are compared exactly).
fn offers_one_of(allowed: &[String], headers: &HeaderMap) -> bool {
    let lists = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|list| list.to_str().ok());
    let mut offered = lists.flat_map(|list| list.split(',')).map(|name| name.trim_matches([' ', '\t']));
    offered.any(|name| allowed.iter().any(|known| known == name))
}

/// Holds a query against its schema: an object of strings, or of arrays of strings where a name stands twice.
fn judge_query(schema: &Schema, query: &str) -> Result<(), Denial> {
    let decode =
        |text: &str| path::form_decoded(text).ok_or(Denial::Malformed { detail: "the query is not UTF-8" });
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
    schema.check_value(&Value::Object(object)).map_err(|pointer| Denial::Schema { pointer })
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

    /// Limits of what is under way, under which it counts.
    pub fn concurrency(&self) -> &[ConcurrencyIndex] {
        &self.subject.rule.concurrency
    }

    /// What to take them for. `headers` are the request's.
    pub fn rate_facts<'a>(&'a self, headers: &'a HeaderMap) -> RateFacts<'a> {
        RateFacts { headers: Some(headers), ..self.subject.rate_facts(None) }
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

    /// Takes note of what the sender has proved to hold, and asks at `now` (unix seconds) whether the Cedar policies permit
    /// it, unless it takes the body to tell, and whether his login is strong and fresh enough.
    ///
    /// # Errors
    /// As [`settle`] for a binding, [`Denial::NotPermitted`], [`Denial::ResourceMissing`] and [`Denial::StepUpNeeded`];
    /// before any rate is taken.
    pub fn prove(mut self, proven: Binding, now: u64, decisions: &DecisionCache) -> Result<Self, Denial> {
        self.subject.check_binding(&proven)?;
        self.asked.at = Some(now);
        let rule = &self.subject.rule;
        if let Some(decision) = rule.authorization.as_ref().filter(|it| !it.resource.needs_body()) {
            let note = noted(rule.mode, self.subject.authorize(decision, &self.asked, None, now, decisions))?;
            self.subject.shadowed = self.subject.shadowed.take().or(note);
        }
        let rule = &self.subject.rule;
        if let (Some(step_up), Some(identity)) = (&rule.step_up, &self.subject.identity) {
            let note = noted(rule.mode, step_up.check(identity, now))?;
            self.subject.shadowed = self.subject.shadowed.take().or(note);
        }
        self.proven = Some(proven);
        Ok(self)
    }
}

impl Subject {
    /// A bound token counts from its holder only, in shadow mode too: elsewhere it is a stolen one.
    fn check_binding(&self, proven: &Binding) -> Result<(), Denial> {
        let Some(identity) = &self.identity else { return Ok(()) };
        let Binding { key, certificate } = identity.binding;
        let unbound = match self.rule.sender {
            Sender::Any => false,
            Sender::Dpop => key.is_none(),
            Sender::Mtls => certificate.is_none(),
        };
        if unbound {
            return Err(Denial::TokenInvalid(TokenFault::Unbound));
        }
        if key.is_some() && key != proven.key {
            return Err(Denial::ProofMissing);
        }
        if certificate.is_some() && certificate != proven.certificate {
            return Err(Denial::CertificateMissing);
        }
        Ok(())
    }

    /// Asks the Cedar policies; `document` is the body, where the resource stands in it.
    fn authorize(
        &self,
        decision: &Decision,
        asked: &Asked,
        document: Option<Judged<'_>>,
        now: u64,
        decisions: &DecisionCache,
    ) -> Result<(), Denial> {
        let places = Places { path: self.path.as_str(), query: asked.query.as_deref(), document };
        let found = decision.resource.find(places).ok_or(Denial::ResourceMissing)?;
        self.authorize_found(decision, &found, now, decisions)
    }

    fn authorize_found(
        &self,
        decision: &Decision,
        found: &Found<'_>,
        now: u64,
        decisions: &DecisionCache,
    ) -> Result<(), Denial> {
        let identity = self.identity.as_ref().ok_or(Denial::TokenMissing)?;
        let sample = Sample::of(identity, self.address, self.tls, now, found);
        if decision.allows(&sample, identity, decisions) { Ok(()) } else { Err(Denial::NotPermitted) }
    }

    fn rate_facts<'a>(&'a self, message_type: Option<&'a str>) -> RateFacts<'a> {
        let identity = self.identity.as_deref();
        RateFacts {
            address: self.address,
            issuer: identity.map(|identity| &*identity.issuer),
            subject: identity.map(|identity| identity.subject.as_str()),
            session: identity.and_then(|identity| identity.session.as_deref()),
            device: identity.and_then(|identity| identity.device.as_deref()),
            headers: None,
            cost: self.rule.cost,
            route: &self.rule.name,
            message_type,
            socket: None,
        }
    }
}

/// Mints the permit for a request if the evidence agrees.
///
/// # Errors
/// [`Denial::ProofMissing`], [`Denial::CertificateMissing`] and [`Denial::TokenInvalid`] for a token that is not bound as it
/// must be, or whose sender did not prove to hold what it is bound to; [`Denial::NotPermitted`] and [`Denial::StepUpNeeded`]
/// where [`RequestDemands::prove`] was not asked; [`Denial::Revoked`]; [`Denial::ContactLost`]; [`Denial::RateExceeded`] unless rate or rule only counts;
/// [`Denial::ReasonMissing`].
pub fn settle(demands: RequestDemands, evidence: Evidence) -> Result<RequestPermit, Denial> {
    let RequestDemands { mut subject, mut asked, proven } = demands;
    subject.check_binding(&proven.unwrap_or_default())?;
    if subject.rule.authorization.is_some() && asked.at.is_none() {
        return Err(Denial::NotPermitted);
    }
    if let (Some(step_up), None) = (&subject.rule.step_up, proven) {
        return Err(step_up.denial());
    }
    let rule = &subject.rule;
    let privileged = rule.step_up.is_some()
        || !rule.roles.is_empty()
        || rule.authorization.as_ref().is_some_and(Decision::is_privileged);
    let note = weigh(&evidence, &subject, privileged, &rule.rates)?;
    // Last: who may not do it anyway is not asked why he would.
    let reasoned = asked.unreasoned.take().map_or(Ok(()), Err);
    let note = note.or(noted(rule.mode, reasoned)?);
    subject.shadowed = subject.shadowed.or(note);
    Ok(RequestPermit { subject, asked })
}

/// `privileged` is what wants more than a token.
fn weigh(
    evidence: &Evidence,
    subject: &Subject,
    privileged: bool,
    rates: &RateList,
) -> Result<Option<Denial>, Denial> {
    if evidence.revoked {
        return Err(Denial::Revoked);
    }
    // As a revocation, whatever the mode: it stands for those that cannot be heard.
    let refuses = match evidence.lost {
        None | Some(OnLoss::Warn) => false,
        Some(OnLoss::NoNewPrivileged) => privileged,
        Some(OnLoss::FailClosed) => subject.identity.is_some(),
    };
    if refuses {
        return Err(Denial::ContactLost);
    }
    let mode = subject.rule.mode;
    let Err(RateExceeded { rate, retry_after, unknown }) = evidence.rates else {
        return Ok(None);
    };
    let mode = if rates.is_shadow(rate) { Mode::Shadow } else { mode };
    noted(
        mode,
        Err(if unknown { Denial::LimitUnavailable } else { Denial::RateExceeded { rate, retry_after } }),
    )
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

    /// Under which the upstream's answer counts.
    pub fn penalties(&self) -> &[PenaltyIndex] {
        &self.subject.rule.penalties
    }

    /// Limit to count while the body flows, and whether it must be held and judged first.
    pub fn body(&self) -> &BodyRule {
        &self.subject.rule.body
    }

    /// What would have been refused, were rule or rate not in shadow mode.
    pub fn shadowed(&self) -> Option<&Denial> {
        self.subject.shadowed.as_ref()
    }

    /// Judges a whole body, and where it takes the body to tell what a request is about, whether that is permitted.
    ///
    /// # Errors
    /// [`Denial::BodyTooLarge`], [`Denial::Form`], [`Denial::Json`], [`Denial::PlaintextRefused`], [`Denial::Schema`],
    /// [`Denial::ResourceMissing`], [`Denial::NotPermitted`].
    pub fn judge_body(&self, body: &[u8], decisions: &DecisionCache) -> Result<BodyPermit, Denial> {
        let rule = &self.subject.rule;
        let limit = rule.body.max_bytes;
        if u64::try_from(body.len()).map_or(true, |length| length > limit) {
            return Err(Denial::BodyTooLarge { limit });
        }
        if let Some(mut form) = self.form_judge() {
            let judged = form.take(body).and_then(|()| form.finish());
            return Ok(BodyPermit { shadowed: noted(rule.mode, judged)?, account: None });
        }
        let (ciphertext, schema) = (rule.body_ciphertext.as_ref(), rule.body_schema.as_ref());
        let mut account = None;
        let judged = match &rule.body_json {
            None => Ok(()),
            // INVARIANT: a resource that stands in the body comes with a body that is looked into; `compile` sees to it.
            Some(limits) => json::scan(body, limits).map_err(Denial::from).and_then(|body| {
                account =
                    rule.body_account.as_ref().and_then(|tokens| body.string(tokens)).map(Cow::into_owned);
                judge_content(ciphertext, schema, body)?;
                match rule.authorization.as_ref().filter(|it| it.resource.needs_body()) {
                    Some(decision) => {
                        let now = self.asked.at.ok_or(Denial::NotPermitted)?;
                        self.subject.authorize(decision, &self.asked, Some(body), now, decisions)
                    }
                    None => Ok(()),
                }
            }),
        };
        Ok(BodyPermit { shadowed: noted(rule.mode, judged)?, account })
    }

    /// What a request is about that is to be recorded, where it takes the body to tell.
    pub fn accessed(&self, body: &[u8]) -> Option<Resource> {
        let rule = &self.subject.rule;
        rule.audit.as_ref()?;
        let resource = &rule.authorization.as_ref().filter(|it| it.resource.needs_body())?.resource;
        let document = json::scan(body, rule.body_json.as_ref()?).ok()?;
        let places = Places {
            path: self.subject.path.as_str(),
            query: self.asked.query.as_deref(),
            document: Some(document),
        };
        Some(Resource::of(resource, &resource.find(places)?))
    }

    /// What judges the body while it flows, where the rule wants a form; `None` otherwise. A form that is not held goes upstream
    /// only as far as it agreed.
    pub fn form_judge(&self) -> Option<FormJudge> {
        let form = self.subject.rule.form.as_ref()?;
        Some(FormJudge::new(Arc::clone(form), self.asked.boundary.as_deref()?))
    }

    /// Permission to open the WebSocket; `None` if the rule is a route.
    pub fn into_tunnel(self) -> Option<TunnelPermit> {
        self.subject.rule.tunnel.as_ref()?;
        Some(TunnelPermit { subject: self.subject, socket: 0 })
    }
}

/// Holds a JSON document against what its rule says of encryption and structure.
fn judge_content(
    ciphertext: Option<&CiphertextRule>,
    schema: Option<&Schema>,
    text: Judged<'_>,
) -> Result<(), Denial> {
    if let Some(CiphertextRule { rule, covers_schema }) = ciphertext
        && rule.judge(&text.value()?)? == Conversation::Encrypted
        && *covers_schema
    {
        return Ok(());
    }
    schema.map_or(Ok(()), |schema| schema.check(text).map_err(|pointer| Denial::Schema { pointer }))
}

impl BodyPermit {
    /// The account that the body is a login for, where the rule says where it stands.
    pub fn into_account(self) -> Option<String> {
        self.account
    }

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
    /// Whether the login is strong and fresh enough; nothing, until that was asked.
    stepped_up: Option<Result<(), Denial>>,
    /// Whether the Cedar policies permit it; nothing, until that was asked.
    authorized: Option<Result<(), Denial>>,
    /// What the message is about, where the policies are still to be asked.
    resource: Option<Found<'static>>,
    /// The new token, if the message brings one to renew the old: then it is for the gateway alone.
    renewal: Option<NewToken>,
}

/// A client's wish to go on under another token, made by [`settle_renewal`] only. Nobody has looked at the token yet.
pub struct Renewal {
    token: NewToken,
    shadowed: Option<Denial>,
}

impl Renewal {
    /// The new token; empty where the message had none.
    pub fn token(&self) -> &str {
        &self.token.0
    }

    /// What would have been refused, were rule or rate not in shadow mode.
    pub fn shadowed(&self) -> Option<&Denial> {
        self.shadowed.as_ref()
    }
}

/// Never shows the token.
impl std::fmt::Debug for Renewal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Renewal(..)")
    }
}

/// A token that nobody has looked at; erased when it goes.
struct NewToken(Zeroizing<String>);

impl std::fmt::Debug for NewToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NewToken(..)")
    }
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
    /// Names the socket, for rates that count by it: the same over all permits of one socket, and no other's.
    #[must_use]
    pub fn of_socket(self, socket: u64) -> Self {
        Self { socket, ..self }
    }

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

    /// What becomes of a client's offer of permessage-deflate.
    pub fn compression(&self) -> Compression {
        self.tunnel().map_or(Compression::Off, |tunnel| tunnel.compression)
    }

    /// How the client may renew its token; `None` if it may not.
    pub fn renew(&self) -> Option<&RenewRule> {
        self.tunnel()?.renew.as_ref()
    }

    /// How many sockets of this rule may be open; `None` for any number.
    pub fn max_open(&self) -> Option<&MaxOpen> {
        self.tunnel()?.max_open.as_ref()
    }

    /// Whether messages of this direction are looked into; if not, they need no unmasking to be judged.
    pub fn inspects(&self, direction: Direction) -> bool {
        self.tunnel().is_none_or(|tunnel| tunnel.table(direction).is_some())
    }

    fn tunnel(&self) -> Option<&TunnelRule> {
        self.subject.rule.tunnel.as_ref()
    }

    /// Judges one whole message. Does not allocate where the direction is not inspected.
    ///
    /// A message that renews the token becomes demands too, but never a permit: see [`MessageDemands::is_renewal`].
    ///
    /// # Errors
    /// [`Refusal`] with [`Denial::MessageTooBig`], [`Denial::MessageKind`], [`Denial::Json`],
    /// [`Denial::UnknownMessageType`], [`Denial::PlaintextRefused`], [`Denial::Schema`], [`Denial::ResourceMissing`] or
    /// [`Denial::NotPermitted`].
    pub fn judge_message(&self, message: &Message<'_>) -> Result<MessageDemands<'_>, Refusal> {
        self.judge_watched(message, &mut None)
    }

    /// [`TunnelPermit::judge_message`], which says in `access` what is to be recorded of the message, refused or not, if its type is
    /// recorded.
    ///
    /// # Errors
    /// As there, and [`Denial::ReasonMissing`].
    pub fn judge_watched(
        &self,
        message: &Message<'_>,
        access: &mut Option<Access>,
    ) -> Result<MessageDemands<'_>, Refusal> {
        let close = |denial| Refusal { denial, action: OnRefusal::Close };
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
            rates: if from_client { &tunnel.message_rates } else { RateList::NONE },
            message: None,
            activity: from_client && tunnel.activity,
            shadowed: None,
            renewal: None,
            stepped_up: None,
            authorized: None,
            resource: None,
        };
        match demands.look_into(tunnel, message, access) {
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
    fn look_into(
        &mut self,
        tunnel: &'t TunnelRule,
        message: &Message<'_>,
        access: &mut Option<Access>,
    ) -> Result<(), Refusal> {
        let allowed = match message.kind {
            MessageKind::Text => tunnel.kinds.text,
            MessageKind::Binary => tunnel.kinds.binary,
        };
        if !allowed {
            return Err(Refusal { denial: Denial::MessageKind, action: OnRefusal::Close });
        }
        let Some(table) = tunnel.table(message.direction) else {
            return Ok(());
        };
        let unknown = |denial| Refusal { denial, action: table.on_unknown };
        let text = json::scan(message.payload, &table.json).map_err(|fault| unknown(fault.into()))?;
        let name = text.string(&table.pointer);
        let name = name.as_deref();
        if let (Some(name), Some(renew), Direction::ToUpstream) = (name, &tunnel.renew, message.direction)
            && *name == *renew.name
        {
            let token = text.string(&renew.pointer).unwrap_or_default();
            self.renewal = Some(NewToken(Zeroizing::new(token.into_owned())));
            // Nobody is there because a client keeps its token fresh (row S-1).
            self.activity = false;
            return Ok(());
        }
        let rule =
            name.and_then(|name| table.types.get(name)).ok_or_else(|| unknown(Denial::UnknownMessageType))?;
        self.message = Some(rule);
        self.rates = &rule.rates;
        self.activity = rule.activity;
        let refused = |denial| Refusal { denial, action: rule.on_refusal };
        *access = self.access(rule, text);
        if let Some(limits) = &rule.json {
            json::scan(message.payload, limits).map_err(|fault| refused(fault.into()))?;
        }
        judge_content(rule.ciphertext.as_ref(), rule.schema.as_ref(), text)
            .and_then(|()| self.authorize(rule.authorization.as_ref(), text))
            .and_then(|()| {
                let reason = access.as_ref().and_then(|access| access.reason.as_deref());
                rule.audit.as_ref().map_or(Ok(()), |audit| audit.check(reason))
            })
            .map_err(refused)
    }

    fn access(&self, rule: &MessageRule, text: Judged<'_>) -> Option<Access> {
        let audit = rule.audit.as_ref()?;
        let places = Places { path: self.tunnel.subject.path.as_str(), query: None, document: Some(text) };
        let resource = rule
            .authorization
            .as_ref()
            .and_then(|decision| Some(Resource::of(&decision.resource, &decision.resource.find(places)?)));
        let reason = audit.reason.as_ref().and_then(|reason| text.string(&reason.place));
        let reason = reason.as_deref().and_then(access::reason).map(str::to_owned);
        let (action, message) = (rule.action.clone(), Some(Arc::clone(&rule.name)));
        Some(Access { action, message, path: None, resource, reason })
    }

    /// Asks the Cedar policies where the answer can be looked up and does not depend on the time.
    fn authorize(&mut self, decision: Option<&Decision>, message: Judged<'_>) -> Result<(), Denial> {
        let Some(decision) = decision else { return Ok(()) };
        let subject = &self.tunnel.subject;
        let places = Places { path: subject.path.as_str(), query: None, document: Some(message) };
        let found = decision.resource.find(places).ok_or(Denial::ResourceMissing)?;
        if decision.needs_time() || !decision.is_tabulated() {
            self.resource = Some(found.into_owned());
            return Ok(());
        }
        let identity = subject.identity.as_deref().ok_or(Denial::TokenMissing)?;
        let sample = Sample::of(identity, subject.address, subject.tls, 0, &found);
        if decision.look_up(&sample) != Some(true) {
            return Err(Denial::NotPermitted);
        }
        self.authorized = Some(Ok(()));
        Ok(())
    }

    /// Whether the message renews the token: then [`settle_renewal`] is asked, and [`settle_message`] mints no permit.
    pub fn is_renewal(&self) -> bool {
        self.renewal.is_some()
    }

    /// Rates to take, all or none, enforced ones first.
    pub fn rates(&self) -> &[RateIndex] {
        &self.rates.all
    }

    /// What to take them for.
    pub fn rate_facts(&self) -> RateFacts<'_> {
        let socket = Some(self.tunnel.socket);
        let cost = self.message.map_or(NonZeroU32::MIN, |message| message.cost);
        RateFacts { socket, cost, ..self.tunnel.subject.rate_facts(self.message_type()) }
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

    /// Whether it depends on the time, or takes more than a look-up, to judge the message: then [`MessageDemands::at`] must
    /// be called.
    pub fn needs_moment(&self) -> bool {
        self.step_up().is_some() || self.resource.is_some()
    }

    /// Asks at `now` (unix seconds) whether the Cedar policies permit it, and whether the login is strong and fresh enough.
    pub fn at(mut self, now: u64, decisions: &DecisionCache) -> Self {
        let subject = &self.tunnel.subject;
        if let (Some(found), Some(decision)) = (&self.resource, self.decision()) {
            self.authorized = Some(subject.authorize_found(decision, found, now, decisions));
        }
        let identity = self.tunnel.subject.identity.as_deref();
        if let (Some(step_up), Some(identity)) = (self.step_up(), identity) {
            self.stepped_up = Some(step_up.check(identity, now));
        }
        self
    }

    fn decision(&self) -> Option<&'t Decision> {
        self.message.and_then(|message| message.authorization.as_ref())
    }

    fn step_up(&self) -> Option<&'t StepUp> {
        self.message.and_then(|message| message.step_up.as_ref())
    }
}

/// Mints the permit for a message if the evidence agrees.
///
/// # Errors
/// [`Refusal`] with [`Denial::Revoked`] (always closes), [`Denial::NotPermitted`], [`Denial::StepUpNeeded`],
/// [`Denial::ContactLost`] or [`Denial::RateExceeded`];
/// [`Denial::Internal`] for a renewal.
pub fn settle_message(mut demands: MessageDemands<'_>, evidence: Evidence) -> Result<MessagePermit, Refusal> {
    // INVARIANT: a renewal carries a token, and no token goes upstream.
    if demands.is_renewal() {
        return Err(Refusal { denial: Denial::Internal, action: OnRefusal::Close });
    }
    let mode = demands.tunnel.subject.rule.mode;
    let action = demands.message.map_or(OnRefusal::Close, |message| message.on_refusal);
    // Whoever forgot to ask is refused.
    if demands.decision().is_some() {
        let asked = demands.authorized.take().unwrap_or(Err(Denial::NotPermitted));
        let note = noted(mode, asked).map_err(|denial| Refusal { denial, action })?;
        demands.shadowed = demands.shadowed.or(note);
    }
    if let Some(step_up) = demands.step_up() {
        let asked = demands.stepped_up.take().unwrap_or_else(|| Err(step_up.denial()));
        let note = noted(mode, asked).map_err(|denial| Refusal { denial, action })?;
        demands.shadowed = demands.shadowed.or(note);
    }
    let privileged = demands.step_up().is_some() || demands.decision().is_some_and(Decision::is_privileged);
    match weigh(&evidence, &demands.tunnel.subject, privileged, demands.rates) {
        Ok(note) => Ok(MessagePermit { activity: demands.activity, shadowed: demands.shadowed.or(note) }),
        Err(Denial::Revoked) => Err(Refusal { denial: Denial::Revoked, action: OnRefusal::Close }),
        Err(denial) => Err(Refusal { denial, action }),
    }
}

/// Lets the gateway look at a new token if the evidence agrees.
///
/// # Errors
/// [`Refusal`] with [`Denial::RateExceeded`]; [`Denial::Internal`] for a message that renews nothing.
pub fn settle_renewal(demands: MessageDemands<'_>, evidence: Evidence) -> Result<Renewal, Refusal> {
    let (Some(token), Some(rule)) = (demands.renewal, demands.tunnel.renew()) else {
        return Err(Refusal { denial: Denial::Internal, action: OnRefusal::Close });
    };
    match weigh(&evidence, &demands.tunnel.subject, false, demands.rates) {
        Ok(shadowed) => Ok(Renewal { token, shadowed }),
        Err(denial) => Err(Refusal { denial, action: rule.on_refusal }),
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::Ipv4Addr;

    use http::{HeaderName, HeaderValue, StatusCode};

    use super::*;
    use crate::bundle::Bundle;
    use crate::identity::IdentityParts;

    const POLICY: &str = r#"
version = 1
[connections]
max_total = 3
max_per_address = 2
[[issuer]]
name = "i"
issuer = "https://i.example"
audience = ["a"]
algorithms = ["ES256"]
jwks = "file:jwks.json"
[[upstream]]
name = "first"
endpoints = ["unix:/first"]
[[upstream]]
name = "second"
endpoints = ["unix:/second"]
[[rate]]
name = "shadow"
per = ["address"]
quota = 1
period = "1s"
mode = "shadow"
[[rate]]
name = "enforced"
per = ["subject"]
quota = 1
period = "1s"

[[route]]
name = "any-item"
path = "/items/{id}"
methods = ["GET", "DELETE"]
upstream = "first"
rates = ["shadow", "enforced"]
[[route]]
name = "special-item"
path = "/items/special"
methods = ["GET"]
upstream = "first"
[[route]]
name = "tree"
path = "/items/**"
methods = ["GET"]
upstream = "first"
auth = "none"
[[route]]
name = "host-item"
host = "a.example"
path = "/items/{id}"
methods = ["GET"]
upstream = "second"
auth = "none"
[[route]]
name = "wild-item"
host = "*.example"
path = "/items/{id}"
methods = ["GET"]
upstream = "second"
auth = "none"
[[route]]
name = "deep"
path = "/deep/{a}/x"
methods = ["GET"]
upstream = "first"
auth = "none"
[[route]]
name = "deep-literal"
path = "/deep/b/y"
methods = ["GET"]
upstream = "first"
auth = "none"
[[route]]
name = "checked"
path = "/checked"
methods = ["POST"]
upstream = "first"
roles = ["user"]
body = { max_bytes = "64B", schema = "schemas/a.json" }
[[route]]
name = "shadowed"
path = "/shadowed"
methods = ["POST"]
upstream = "first"
roles = ["user"]
rates = ["enforced"]
body = { max_bytes = "64B", schema = "schemas/a.json" }
mode = "shadow"
[[route]]
name = "search"
path = "/search"
methods = ["GET"]
upstream = "first"
auth = "none"
query = { max_bytes = "40B", schema = "schemas/query.json" }
[[route]]
name = "bound"
path = "/bound"
methods = ["GET"]
upstream = "first"
sender = "dpop"
[[websocket]]
name = "socket"
path = "/socket"
upstream = "second"
origins = ["https://a.example"]
subprotocols = ["v1", "v2"]
max_message = "100B"
message_rates = ["shadow"]
unknown = "answer"
[[websocket.message]]
type = "say"
direction = "to-upstream"
schema = "schemas/say.json"
action = "message.send"
rates = ["enforced"]
activity = true
on_refusal = "answer"
[[websocket.message]]
type = "beat"
direction = "both"
[[websocket]]
name = "blind"
path = "/blind"
upstream = "second"
auth = "none"
message_rates = ["shadow"]
max_message = "100B"
compression = "terminate"
max_inflate_ratio = 7
[[websocket]]
name = "checked-too"
path = "/checked"
upstream = "second"
auth = "none"
[[websocket]]
name = "shadow-socket"
path = "/shadow-socket"
upstream = "second"
auth = "none"
mode = "shadow"
[[websocket.message]]
type = "say"
direction = "to-upstream"
"#;

    fn policy() -> Policy {
        policy_of(POLICY)
    }

    fn policy_of(text: &str) -> Policy {
        let schemas = [
            ("schemas/a.json", r#"{"properties":{"a":{"type":"integer"}},"additionalProperties":false}"#),
            (
                "schemas/say.json",
                r#"{"properties":{"text":{"type":"string","maxLength":5}},"required":["text"]}"#,
            ),
            (
                "schemas/query.json",
                r#"{"properties":{"q":{"type":"string"},"tag":{"type":["string","array"],"maxItems":2}},"required":["q"],"additionalProperties":false}"#,
            ),
        ];
        let files = schemas.into_iter().chain([("policy.toml", text)]);
        let files = files.map(|(name, text)| (name.to_owned(), text.as_bytes().to_owned())).collect();
        let bundle = Bundle { root: "/b".into(), files };
        Policy::compile(&bundle, &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"))
    }

    /// A request, to be told only what matters.
    struct Ask {
        method: Method,
        host: &'static str,
        path: String,
        query: Option<String>,
        headers: HeaderMap,
        websocket: bool,
        body: Option<&'static str>,
        roles: Option<&'static [&'static str]>,
    }

    fn ask(method: Method, path: &str) -> Ask {
        Ask {
            method,
            host: "other.test",
            path: path.to_owned(),
            query: None,
            headers: HeaderMap::new(),
            websocket: false,
            body: None,
            roles: None,
        }
    }

    fn get(path: &str) -> Ask {
        ask(Method::GET, path)
    }

    fn socket(path: &str) -> Ask {
        Ask { websocket: true, ..get(path).header("sec-websocket-protocol", "v0, v2") }
    }

    impl Ask {
        fn host(self, host: &'static str) -> Self {
            Self { host, ..self }
        }

        fn query(self, query: &str) -> Self {
            Self { query: Some(query.to_owned()), ..self }
        }

        fn roles(self, roles: &'static [&'static str]) -> Self {
            Self { roles: Some(roles), ..self }
        }

        fn header(mut self, name: &'static str, value: &'static str) -> Self {
            self.headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
            self
        }

        fn body(self, body: &'static str) -> Self {
            Self { body: Some(body), ..self.header("content-type", "application/json") }
        }

        fn judge(&self, policy: &Policy) -> Result<RequestDemands, Denial> {
            let facts = RequestFacts {
                certificate: None,
                peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
                host: self.host,
                method: &self.method,
                path: &self.path,
                query: self.query.as_deref(),
                headers: &self.headers,
                websocket: self.websocket,
                content_length: self.body.map(|body| body.len() as u64),
                has_body: self.body.is_some(),
                tls: TlsFacts::default(),
            };
            let identity = self.roles.map(|roles| {
                Arc::new(Identity::new(IdentityParts {
                    issuer: "https://i.example".into(),
                    subject: "alice".into(),
                    session: Some("s1".into()),
                    roles: roles.iter().map(|role| (*role).to_owned()).collect(),
                    ..IdentityParts::default()
                }))
            });
            policy.match_request(&facts)?.judge(&facts, identity)
        }

        fn rule(&self, policy: &Policy) -> Result<Arc<str>, Denial> {
            self.judge(policy).map(|demands| Arc::clone(&demands.rule().name))
        }

        fn permit(&self, policy: &Policy) -> RequestPermit {
            settle(self.judge(policy).unwrap(), nothing_against_it()).unwrap()
        }
    }

    fn nothing_against_it() -> Evidence {
        Evidence { rates: Ok(()), revoked: false, lost: None }
    }

    fn exceeded(rate: usize) -> Evidence {
        let rates =
            Err(RateExceeded { rate: RateIndex(rate), retry_after: Duration::from_secs(2), unknown: false });
        Evidence { rates, revoked: false, lost: None }
    }

    const REVOKED: Evidence = Evidence { rates: Ok(()), revoked: true, lost: None };

    #[test]
    fn a_bound_token_counts_from_its_holder_only_in_shadow_mode_too() {
        let policy = policy();
        let (key, certificate) = (Some([1; 32]), Some([2; 32]));
        let none = Binding::default();
        let settled = |ask: &Ask, binding: Binding, proven: Option<Binding>| {
            let mut demands = ask.judge(&policy).unwrap();
            Arc::make_mut(demands.subject.identity.as_mut().unwrap()).binding = binding;
            let demands = match proven {
                Some(proven) => demands.prove(proven, 0, &DecisionCache::new(8))?,
                // Forgotten is refused.
                None => demands,
            };
            settle(demands, nothing_against_it()).map(drop)
        };
        let shadowed = ask(Method::POST, "/shadowed").roles(&["user"]).body("{}");
        for ask in [get("/items/7").roles(&["user"]), shadowed] {
            let by_key = Binding { key, certificate: None };
            let by_certificate = Binding { key: None, certificate };
            let both = Binding { key, certificate };
            assert_eq!(settled(&ask, none, Some(none)), Ok(()));
            assert_eq!(settled(&ask, none, None), Ok(()));
            for binding in [by_key, by_certificate, both] {
                assert_eq!(settled(&ask, binding, Some(both)), Ok(()));
                assert!(settled(&ask, binding, Some(none)).is_err() && settled(&ask, binding, None).is_err());
            }
            let other = Binding { key: certificate, certificate: key };
            assert_eq!(settled(&ask, by_key, Some(other)), Err(Denial::ProofMissing));
            assert_eq!(settled(&ask, by_certificate, Some(other)), Err(Denial::CertificateMissing));
            assert_eq!(settled(&ask, both, Some(by_key)), Err(Denial::CertificateMissing));
        }
        let bound = get("/bound").roles(&["user"]);
        let by_key = Binding { key, certificate: None };
        assert_eq!(settled(&bound, by_key, Some(by_key)), Ok(()));
        assert_eq!(settled(&bound, none, Some(none)), Err(Denial::TokenInvalid(TokenFault::Unbound)));
    }

    #[test]
    fn whoever_forgets_to_ask_for_a_stronger_login_is_refused() {
        let text = "version = 1\n[[issuer]]\nname = \"i\"\nissuer = \"https://i.example\"\naudience = [\"a\"]\n\
                    algorithms = [\"ES256\"]\njwks = \"https://i.example/jwks\"\n[[upstream]]\nname = \"u\"\n\
                    endpoints = [\"unix:/u\"]\n[[websocket]]\nname = \"w\"\npath = \"/w\"\nupstream = \"u\"\n\
                    step_up = { amr = [\"otp\"] }\n[[websocket.message]]\ntype = \"m\"\ndirection = \"to-upstream\"\n\
                    step_up = { max_age = \"60s\" }\n";
        let files = [("policy.toml".to_owned(), text.as_bytes().to_owned())].into();
        let policy = Policy::compile(&Bundle { root: "/b".into(), files }, &BTreeMap::new()).unwrap();
        let demands = || {
            let mut demands = socket("/w").roles(&[]).judge(&policy).unwrap();
            let identity = Arc::make_mut(demands.subject.identity.as_mut().unwrap());
            (identity.amr, identity.auth_time) = (vec!["otp".to_owned()], Some(1000));
            demands
        };
        let reason = |outcome: Result<RequestPermit, Denial>| outcome.map(drop).map_err(|it| it.reason());
        assert_eq!(reason(settle(demands(), nothing_against_it())), Err("step-up-needed"));
        let asked = demands().prove(Binding::default(), 2000, &DecisionCache::new(8)).unwrap();
        let tunnel = settle(asked, nothing_against_it()).unwrap().into_tunnel().unwrap();
        let message = Message {
            direction: Direction::ToUpstream,
            kind: MessageKind::Text,
            payload: br#"{"type":"m"}"#,
        };
        let judge = || tunnel.judge_message(&message).unwrap();
        let outcome = |demands| {
            settle_message(demands, nothing_against_it()).map(drop).map_err(|it| it.denial.close_code())
        };
        assert!(judge().needs_moment());
        assert_eq!(outcome(judge()), Err(4412));
        assert_eq!(outcome(judge().at(1061, &DecisionCache::new(8))), Err(4412));
        assert_eq!(outcome(judge().at(1060, &DecisionCache::new(8))), Ok(()));
    }

    #[test]
    fn connections_are_counted() {
        let policy = policy();
        let permit = |open_total, open_from_address| {
            let peer = IpAddr::V4(Ipv4Addr::LOCALHOST);
            policy
                .permit_connection(&ConnectionFacts { peer, open_total, open_from_address, refused: false })
                .map(|p| p.peer())
        };
        assert!(permit(2, 1).is_ok());
        assert_eq!(permit(3, 0), Err(Denial::TooManyConnections));
        assert_eq!(permit(2, 2), Err(Denial::TooManyConnections));
    }

    #[test]
    fn the_most_specific_rule_decides() {
        let policy = policy();
        let rule = |ask: Ask| ask.roles(&["user"]).rule(&policy).map(|name| name.to_string());
        assert_eq!(rule(get("/items/7")).as_deref(), Ok("any-item"));
        assert_eq!(rule(get("/items/special")).as_deref(), Ok("special-item"));
        assert_eq!(rule(get("/items/7/8")).as_deref(), Ok("tree"));
        assert_eq!(rule(get("/items/")).as_deref(), Ok("tree"));
        assert_eq!(rule(get("/items")), Err(Denial::NoRoute));
        assert_eq!(rule(get("/items/7").host("a.example")).as_deref(), Ok("host-item"));
        assert_eq!(rule(get("/items/7").host("b.example")).as_deref(), Ok("wild-item"));
        assert_eq!(rule(get("/items/7").host("c.b.example")).as_deref(), Ok("any-item"), "one label only");
        assert_eq!(rule(get("/items/7").host("example")).as_deref(), Ok("any-item"));
        // The router takes back a literal that leads nowhere.
        assert_eq!(rule(get("/deep/b/x")).as_deref(), Ok("deep"));
        assert_eq!(rule(get("/deep/b/y")).as_deref(), Ok("deep-literal"));
        // A host's own rules without the method leave it to the general ones.
        assert_eq!(rule(ask(Method::DELETE, "/items/7").host("a.example")).as_deref(), Ok("any-item"));
        assert_eq!(rule(ask(Method::HEAD, "/items/special")).as_deref(), Ok("special-item"));
        assert_eq!(rule(get("/%69tems/special")).as_deref(), Ok("special-item"));
    }

    #[test]
    fn what_is_not_there_is_refused_by_its_own_name() {
        let policy = policy();
        let rule = |ask: Ask| ask.rule(&policy).unwrap_err();
        assert_eq!(
            rule(ask(Method::POST, "/items/7")),
            Denial::MethodNotAllowed { allow: "DELETE, GET, HEAD".into() }
        );
        assert_eq!(rule(ask(Method::PUT, "/checked")), Denial::MethodNotAllowed { allow: "POST".into() });
        assert_eq!(rule(get("/checked")), Denial::UpgradeRequired);
        assert_eq!(rule(get("/socket")), Denial::UpgradeRequired);
        assert_eq!(rule(socket("/search")), Denial::NoWebsocket);
        assert_eq!(rule(socket("/none")), Denial::NoRoute);
        let post = Ask { method: Method::POST, ..socket("/socket") };
        assert_eq!(rule(post), Denial::MethodNotAllowed { allow: "GET".into() });
        assert!(matches!(rule(get("/items/../checked")), Denial::Malformed { .. }));
        assert!(matches!(rule(get("/search").query("q=%zz")), Denial::Malformed { .. }));
        assert_eq!(rule(get("/search").query(&"q".repeat(path::MAX_QUERY + 1))), Denial::UriTooLong);
    }

    #[test]
    fn an_unknown_host_is_misdirected() {
        let toml = "version = 1\n[[upstream]]\nname = \"u\"\nendpoints = [\"unix:/u\"]\n[[route]]\nname = \"r\"\nhost = \"a.example\"\npath = \"/\"\nmethods = [\"GET\"]\nupstream = \"u\"\nauth = \"none\"\n";
        let files = [("policy.toml".to_owned(), toml.as_bytes().to_owned())].into();
        let policy = Policy::compile(&Bundle { root: "/b".into(), files }, &BTreeMap::new()).unwrap();
        assert!(get("/").host("a.example").rule(&policy).is_ok());
        assert_eq!(get("/").host("b.example").rule(&policy), Err(Denial::Misdirected));
        assert_eq!(Denial::Misdirected.status(), StatusCode::MISDIRECTED_REQUEST);
    }

    #[test]
    fn tokens_and_roles() {
        let policy = policy();
        let post = || ask(Method::POST, "/checked").body("{}");
        assert_eq!(post().rule(&policy), Err(Denial::TokenMissing));
        assert_eq!(post().roles(&[]).rule(&policy), Err(Denial::RoleMissing));
        assert_eq!(post().roles(&["users"]).rule(&policy), Err(Denial::RoleMissing));
        assert!(post().roles(&["x", "user"]).rule(&policy).is_ok());
        // Nobody vouches for a token that no rule asked for.
        let open = get("/items/7/8").roles(&["user"]).judge(&policy).unwrap();
        assert!(open.identity().is_none() && open.rate_facts(&HeaderMap::new()).subject.is_none());
    }

    #[test]
    fn bodies() {
        let policy = policy();
        let post = |body| ask(Method::POST, "/checked").roles(&["user"]).body(body);
        let permit = post("{}").permit(&policy);
        assert_eq!(*permit.body(), BodyRule { max_bytes: 64, buffered: true });
        assert!(
            permit
                .judge_body(b"{\"a\":1}", &DecisionCache::new(8))
                .is_ok_and(|permit| permit.shadowed().is_none())
        );
        let schema = |pointer: &str| Denial::Schema { pointer: pointer.into() };
        assert_eq!(permit.judge_body(b"{\"a\":\"x\"}", &DecisionCache::new(8)).unwrap_err(), schema("/a"));
        assert_eq!(permit.judge_body(b"{\"b\":1}", &DecisionCache::new(8)).unwrap_err(), schema(""));
        assert_eq!(permit.judge_body(b"{", &DecisionCache::new(8)).unwrap_err().reason(), "not-json");
        assert_eq!(permit.judge_body(b"", &DecisionCache::new(8)).unwrap_err().reason(), "not-json");
        assert_eq!(
            permit.judge_body(&[b' '; 65], &DecisionCache::new(8)).unwrap_err(),
            Denial::BodyTooLarge { limit: 64 }
        );
        // Declared too long, missing, or brought where none is taken.
        let long = post("{                                                                }");
        assert_eq!(long.rule(&policy), Err(Denial::BodyTooLarge { limit: 64 }));
        let none = ask(Method::POST, "/checked").roles(&["user"]);
        assert_eq!(none.rule(&policy).unwrap_err().reason(), "not-json");
        let unasked = ask(Method::DELETE, "/items/7").roles(&["user"]).body("{}");
        assert_eq!(unasked.rule(&policy), Err(Denial::BodyTooLarge { limit: 0 }));
    }

    #[test]
    fn queries() {
        let policy = policy();
        let search = |query: &str| get("/search").query(query).rule(&policy).map(|_| ());
        assert_eq!(search("q=a+b%20c"), Ok(()));
        assert_eq!(search("q=1&tag=a&tag=b"), Ok(()));
        let schema = |pointer: &str| Err(Denial::Schema { pointer: pointer.into() });
        assert_eq!(search("q=1&tag=a&tag=b&tag=c"), schema("/tag"));
        assert_eq!(search("q=1&q=2"), schema("/q"), "twice is an array");
        assert_eq!(search("x=1&q=1"), schema(""));
        assert_eq!(search(""), schema(""));
        assert_eq!(
            get("/search").rule(&policy).map(|_| ()),
            schema(""),
            "required, and there is no query at all"
        );
        assert_eq!(search("q=%ff"), Err(Denial::Malformed { detail: "the query is not UTF-8" }));
        assert_eq!(search(&"q=".repeat(21)), Err(Denial::UriTooLong));
        let none = get("/items/7/8").query("a=1");
        assert_eq!(none.rule(&policy), Err(Denial::QueryNotAllowed));
        assert!(get("/items/7/8").query("").rule(&policy).is_ok());
    }

    #[test]
    fn what_goes_on_is_what_was_judged() {
        let policy = policy();
        let permit = get("/items/%7Ea%2cb").roles(&[]).permit(&policy);
        assert_eq!(permit.path(), "/items/~a%2Cb");
        assert_eq!(permit.upstream(), UpstreamIndex(0));
        assert_eq!(permit.identity().map(|identity| identity.subject.as_str()), Some("alice"));
        assert!(permit.into_tunnel().is_none());
        assert_eq!(get("/%69tems/special").roles(&[]).permit(&policy).path(), "/items/special");
    }

    #[test]
    fn evidence_decides_and_enforced_rates_come_first() {
        let policy = policy();
        let demands = || get("/items/7").roles(&[]).judge(&policy).unwrap();
        assert_eq!(demands().rates(), [RateIndex(1), RateIndex(0)]);
        let facts = demands();
        let headers = HeaderMap::new();
        let facts = facts.rate_facts(&headers);
        assert_eq!((facts.subject, facts.session, facts.route), (Some("alice"), Some("s1"), "any-item"));
        assert!(settle(demands(), nothing_against_it()).is_ok());
        let denial = settle(demands(), exceeded(1)).unwrap_err();
        assert_eq!((denial.reason(), denial.retry_after()), ("rate-exceeded", Some(2)));
        let permit = settle(demands(), exceeded(0)).unwrap();
        assert_eq!(permit.shadowed().map(Denial::reason), Some("rate-exceeded"));
        assert!(settle(demands(), exceeded(9)).is_err(), "an unknown rate enforces");
        let unknown = |rate| {
            let rates = exceeded(rate).rates.map_err(|exceeded| RateExceeded { unknown: true, ..exceeded });
            Evidence { rates, ..nothing_against_it() }
        };
        assert_eq!(settle(demands(), unknown(1)).unwrap_err(), Denial::LimitUnavailable);
        assert!(settle(demands(), unknown(0)).is_ok(), "a rate in shadow mode refuses nothing");
        assert_eq!(settle(demands(), REVOKED).unwrap_err(), Denial::Revoked);
    }

    #[test]
    fn shadow_mode_lets_pass_and_says_so() {
        let policy = policy();
        let ask = || ask(Method::POST, "/shadowed").body("{}");
        let shadowed = |ask: &Ask| ask.permit(&policy).shadowed().map(Denial::reason);
        assert_eq!(shadowed(&ask().roles(&["user"])), None);
        assert_eq!(shadowed(&ask().roles(&[])), Some("role-missing"));
        assert_eq!(shadowed(&ask()), Some("token-missing"));
        assert_eq!(shadowed(&ask().roles(&["user"]).query("a=1")), Some("query-not-allowed"));
        let demands = ask().roles(&["user"]).judge(&policy).unwrap();
        let permit = settle(demands, exceeded(1)).unwrap();
        assert_eq!(permit.shadowed().map(Denial::reason), Some("rate-exceeded"));
        let body = permit.judge_body(b"no", &DecisionCache::new(8)).unwrap();
        assert_eq!(body.shadowed().map(Denial::reason), Some("not-json"));
        // Sizes and revocation are enforced all the same.
        assert!(permit.judge_body(&[b' '; 65], &DecisionCache::new(8)).is_err());
        let demands = ask().roles(&["user"]).judge(&policy).unwrap();
        assert_eq!(settle(demands, REVOKED).unwrap_err(), Denial::Revoked);
    }

    #[test]
    fn opening_a_websocket() {
        let policy = policy();
        let open = || socket("/socket").roles(&[]);
        assert!(open().rule(&policy).is_ok());
        assert_eq!(socket("/socket").rule(&policy), Err(Denial::TokenMissing));
        assert!(open().header("origin", "https://a.example").rule(&policy).is_ok());
        assert_eq!(open().header("origin", "https://b.example").rule(&policy), Err(Denial::OriginNotAllowed));
        let silent = Ask { websocket: true, ..get("/socket").roles(&[]) };
        assert_eq!(silent.rule(&policy), Err(Denial::SubprotocolNotAllowed));
        let connect = Ask { method: Method::CONNECT, ..open() };
        assert!(connect.rule(&policy).is_ok(), "RFC 8441");
        let tunnel = open().permit(&policy).into_tunnel().unwrap();
        assert_eq!(
            (tunnel.subprotocols(), tunnel.subprotocol_required()),
            (&["v1".into(), "v2".into()][..], true)
        );
        assert_eq!((tunnel.upstream(), tunnel.path()), (UpstreamIndex(1), "/socket"));
        assert_eq!(tunnel.limits().max_message, 100);
        assert_eq!((tunnel.compression(), tunnel.limits().max_inflate_ratio), (Compression::Off, 100));
        assert!(tunnel.inspects(Direction::ToUpstream) && tunnel.inspects(Direction::ToClient));
        // The path's route is another rule.
        assert_eq!(socket("/checked").rule(&policy).as_deref(), Ok("checked-too"));
    }

    fn text(direction: Direction, payload: &[u8]) -> Message<'_> {
        Message { direction, kind: MessageKind::Text, payload }
    }

    #[test]
    fn a_renewal_never_becomes_a_permit_in_any_mode() {
        for mode in ["enforce", "shadow"] {
            let renewable = format!(
                "name = \"socket\"\nmode = \"{mode}\"\nrenew = {{ type = \"renew\", token_pointer = \"/auth/token\" }}"
            );
            let policy = policy_of(&POLICY.replacen("name = \"socket\"", &renewable, 1));
            let tunnel = socket("/socket").roles(&[]).permit(&policy).into_tunnel().unwrap();
            let judged = |direction, payload: &'static [u8]| tunnel.judge_message(&text(direction, payload));
            let tokens = [
                (&br#"{"type":"renew","auth":{"token":"a.b.c"}}"#[..], "a.b.c"),
                (br#"{"auth":{"token":"a.b.c"},"type":"re\u006eew","more":1}"#, "a.b.c"),
                (br#"{"type":"renew","token":"a.b.c"}"#, ""),
                (br#"{"type":"renew","auth":{"token":["a.b.c"]}}"#, ""),
                (br#"{"type":"renew","auth":"a.b.c"}"#, ""),
            ];
            for (payload, token) in tokens {
                let demands = || judged(Direction::ToUpstream, payload).unwrap();
                assert!(demands().is_renewal() && !demands().activity());
                assert_eq!(demands().rates(), [RateIndex(0)], "message_rates count");
                let refusal = settle_message(demands(), nothing_against_it()).unwrap_err();
                assert_eq!((refusal.denial, refusal.action), (Denial::Internal, OnRefusal::Close));
                let renewal = settle_renewal(demands(), nothing_against_it()).unwrap();
                assert_eq!((renewal.token(), format!("{renewal:?}").as_str()), (token, "Renewal(..)"));
                assert!(!format!("{:?}", demands()).contains("a.b.c"), "a token is printed");
            }
            // What is no renewal is none, and one from the upstream means nothing.
            let say = judged(Direction::ToUpstream, br#"{"type":"say","text":"hi"}"#).unwrap();
            assert!(!say.is_renewal());
            assert_eq!(settle_renewal(say, nothing_against_it()).unwrap_err().denial, Denial::Internal);
            let down = judged(Direction::ToClient, br#"{"type":"renew","auth":{"token":"t"}}"#);
            assert!(
                down.is_err() == (mode == "enforce")
                    && down.is_ok_and(|it| !it.is_renewal()) == (mode == "shadow")
            );
        }
        let policy = policy();
        let tunnel = socket("/socket").roles(&[]).permit(&policy).into_tunnel().unwrap();
        let refusal = tunnel.judge_message(&text(Direction::ToUpstream, br#"{"type":"renew"}"#)).unwrap_err();
        assert_eq!(refusal.denial, Denial::UnknownMessageType);
    }

    #[test]
    fn messages_are_judged_by_type_and_direction() {
        let policy = policy();
        let tunnel = socket("/socket").roles(&[]).permit(&policy).into_tunnel().unwrap();
        let up = |payload: &'static [u8]| tunnel.judge_message(&text(Direction::ToUpstream, payload));
        let down = |payload: &'static [u8]| tunnel.judge_message(&text(Direction::ToClient, payload));

        let say = up(br#"{"type":"say","text":"hi"}"#).unwrap();
        assert_eq!(
            (say.message_type(), say.action(), say.activity()),
            (Some("say"), Some("message.send"), true)
        );
        assert_eq!(say.rates(), [RateIndex(1), RateIndex(0)]);
        assert_eq!(say.rate_facts().message_type, Some("say"));
        let permit = settle_message(say, nothing_against_it()).unwrap();
        assert!(permit.activity() && permit.shadowed().is_none());

        let beat = up(br#"{"type":"beat"}"#).unwrap();
        assert_eq!((beat.rates(), beat.activity()), (&[RateIndex(0)][..], false));
        assert!(down(br#"{"type":"beat"}"#).unwrap().rates().is_empty(), "message_rates are the client's");

        let refusal = |judged: Result<MessageDemands<'_>, Refusal>| {
            judged.map(|_| ()).map_err(|refusal| (refusal.denial.reason(), refusal.action)).unwrap_err()
        };
        assert_eq!(refusal(up(br#"{"type":"say","text":"longer"}"#)), ("schema", OnRefusal::Answer));
        assert_eq!(
            refusal(down(br#"{"type":"say","text":"hi"}"#)),
            ("unknown-message-type", OnRefusal::Answer)
        );
        assert_eq!(refusal(up(br#"{"type":5}"#)), ("unknown-message-type", OnRefusal::Answer));
        assert_eq!(refusal(up(br#"["say"]"#)), ("unknown-message-type", OnRefusal::Answer));
        assert_eq!(refusal(up(b"say")), ("not-json", OnRefusal::Answer));
        assert_eq!(refusal(up(&[b' '; 101])), ("message-too-big", OnRefusal::Close));
        let binary = Message { kind: MessageKind::Binary, ..text(Direction::ToUpstream, b"{}") };
        assert_eq!(refusal(tunnel.judge_message(&binary)), ("message-kind", OnRefusal::Close));
    }

    #[test]
    fn evidence_decides_on_messages() {
        let policy = policy();
        let tunnel = socket("/socket").roles(&[]).permit(&policy).into_tunnel().unwrap();
        let payload: &[u8] = br#"{"type":"say","text":"hi"}"#;
        let settle = |evidence| {
            let demands = tunnel.judge_message(&text(Direction::ToUpstream, payload)).unwrap();
            settle_message(demands, evidence)
        };
        let refusal = settle(exceeded(1)).unwrap_err();
        assert_eq!((refusal.denial.close_code(), refusal.action), (4429, OnRefusal::Answer));
        let permit = settle(exceeded(0)).unwrap();
        assert_eq!(permit.shadowed().map(Denial::reason), Some("rate-exceeded"));
        let refusal = settle(REVOKED).unwrap_err();
        assert_eq!((refusal.denial.close_code(), refusal.action), (4410, OnRefusal::Close));
    }

    const ENCRYPTED: &str = r#"
version = 1
[[upstream]]
name = "u"
endpoints = ["unix:/u"]
[[ciphertext]]
name = "sealed"
pointer = "/to"
prefix = "e2e:"
readable = ["open:"]
envelope = "schemas/sealed.json"
payload = ["/sealed"]
[[route]]
name = "send"
path = "/send"
methods = ["POST"]
upstream = "u"
auth = "none"
body = { max_bytes = "1KiB", ciphertext = "sealed" }
[[websocket]]
name = "stream"
path = "/stream"
upstream = "u"
auth = "none"
http2 = false
[[websocket.message]]
type = "send"
direction = "both"
ciphertext = "sealed"
schema = "schemas/open.json"
on_refusal = "answer"
"#;

    #[test]
    fn an_encrypted_conversation_takes_ciphertext_only() {
        let schemas = [
            (
                "schemas/sealed.json",
                r#"{"properties":{"type":true,"to":true,"id":{"type":"integer"},"sealed":true},"additionalProperties":false}"#,
            ),
            ("schemas/open.json", r#"{"properties":{"text":{"type":"string"}}}"#),
            ("policy.toml", ENCRYPTED),
        ];
        let files = schemas.map(|(name, text)| (name.to_owned(), text.as_bytes().to_owned())).into();
        let policy = Policy::compile(&Bundle { root: "/b".into(), files }, &BTreeMap::new());
        let policy = policy.unwrap_or_else(|errors| panic!("{errors}"));
        let permit = |ask: Ask| settle(ask.judge(&policy).unwrap(), nothing_against_it()).unwrap();
        let send = permit(ask(Method::POST, "/send").body("{}"));
        let tunnel = permit(socket("/stream")).into_tunnel().unwrap();
        assert!(send.body().buffered);
        for (message, refused) in [
            (r#"{"type":"send","to":"e2e:1","sealed":"AwogQUJDREVGR0hJSktMTU5PUFFSU1RV"}"#, None),
            (r#"{"type":"send","to":"open:1","text":"hello"}"#, None),
            (r#"{"type":"send","to":"e2e:1","text":"hello"}"#, Some(Denial::PlaintextRefused)),
            (r#"{"type":"send","to":"e2e:1","sealed":"hello"}"#, Some(Denial::PlaintextRefused)),
            (
                r#"{"type":"send","to":"e2e:1","sealed":"AwogQUJDREVGR0hJSktMTU5PUFFSU1RV","text":"x"}"#,
                Some(Denial::PlaintextRefused),
            ),
            (
                r#"{"type":"send","to":"e2e:1","id":"1","sealed":"AwogQUJDREVGR0hJSktMTU5PUFFSU1RV"}"#,
                Some(Denial::Schema { pointer: "/id".into() }),
            ),
            (r#"{"type":"send","text":"hello"}"#, Some(Denial::PlaintextRefused)),
            (r#"{"type":"send","to":["open:1"],"text":"hello"}"#, Some(Denial::PlaintextRefused)),
            (r#"{"type":"send","to":"other:1","text":"hello"}"#, Some(Denial::PlaintextRefused)),
        ] {
            assert_eq!(
                send.judge_body(message.as_bytes(), &DecisionCache::new(8)).err(),
                refused,
                "{message}"
            );
            for direction in [Direction::ToUpstream, Direction::ToClient] {
                let judged = tunnel.judge_message(&text(direction, message.as_bytes()));
                let refused = refused.clone().map(|denial| Refusal { denial, action: OnRefusal::Answer });
                assert_eq!(judged.err(), refused, "{message}");
            }
        }
        // What may be readable still has a schema of its own.
        let odd = br#"{"type":"send","to":"open:1","text":7}"#;
        let refusal = tunnel.judge_message(&text(Direction::ToUpstream, odd)).unwrap_err();
        assert_eq!(refusal.denial, Denial::Schema { pointer: "/text".into() });
        let odd = send.judge_body(b"not JSON", &DecisionCache::new(8)).unwrap_err();
        assert_eq!(odd.reason(), "not-json");
    }

    #[test]
    fn a_websocket_is_opened_over_http_2_where_its_rule_says_so() {
        let extended_connect = || Ask { method: Method::CONNECT, ..socket("/stream") };
        let without_files = ENCRYPTED
            .replace("envelope = \"schemas/sealed.json\"\n", "")
            .replace("schemas/open.json", "schemas/say.json");
        let policy = policy_of(&without_files);
        assert!(!policy.http2_websockets());
        assert_eq!(extended_connect().judge(&policy).err(), Some(Denial::ProtocolNotOffered));
        assert!(socket("/stream").judge(&policy).is_ok());
        let policy = policy_of(&without_files.replace("http2 = false", "http2 = true"));
        assert!(policy.http2_websockets());
        assert!(extended_connect().judge(&policy).is_ok());
        assert!(policy_of(&without_files.replace("http2 = false", "")).http2_websockets(), "the default");
    }

    #[test]
    fn a_blind_tunnel_counts_but_does_not_look() {
        let policy = policy();
        let blind = Ask { websocket: true, ..get("/blind") };
        let tunnel = blind.permit(&policy).into_tunnel().unwrap();
        assert!(!tunnel.inspects(Direction::ToUpstream) && !tunnel.inspects(Direction::ToClient));
        assert_eq!((tunnel.compression(), tunnel.limits().max_inflate_ratio), (Compression::Terminate, 7));
        let demands = tunnel.judge_message(&text(Direction::ToUpstream, b"anything")).unwrap();
        assert_eq!((demands.rates(), demands.activity()), (&[RateIndex(0)][..], true));
        let down = Message { kind: MessageKind::Binary, ..text(Direction::ToClient, b"\xff") };
        let demands = tunnel.judge_message(&down).unwrap();
        assert!(demands.rates().is_empty() && !demands.activity());
        assert!(tunnel.judge_message(&text(Direction::ToClient, &[b' '; 101])).is_err());
    }

    #[test]
    fn a_shadow_socket_lets_pass_and_says_so() {
        let policy = policy();
        let shadow =
            Ask { websocket: true, ..get("/shadow-socket").header("origin", "https://elsewhere.example") };
        let tunnel = shadow.permit(&policy).into_tunnel().unwrap();
        assert_eq!(tunnel.shadowed(), Some(&Denial::OriginNotAllowed));
        let demands = tunnel.judge_message(&text(Direction::ToUpstream, b"not json")).unwrap();
        let permit = settle_message(demands, nothing_against_it()).unwrap();
        assert_eq!(permit.shadowed().map(Denial::reason), Some("not-json"));
        assert!(tunnel.judge_message(&text(Direction::ToUpstream, &[b' '; 70_000])).is_err(), "sizes hold");
    }
}
