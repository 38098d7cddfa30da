//! Verdicts: tests that stand in a bundle, written for a reviewer to read.
//!
//! ```toml
//! # tests/stream.toml
//! [[test]]
//! name = "a page from elsewhere may not connect"
//! request = { path = "/v1/stream", origin = "https://evil.example" }
//! identity = { subject = "alice", roles = ["user"] }
//! expect = { deny = "origin-not-allowed", status = 403 }
//! ```
//!
//! A file may also hold one test without `[[test]]`; its name is then the file's.
//!
//! [`explain`] answers the same questions, and says what decided.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::authz::{DecisionCache, Evaluated, Places, Sample, TlsFacts};
use crate::bundle::Bundle;
use crate::denial::Denial;
use crate::identity::{Binding, Identity, IdentityParts};
use crate::json;
use crate::permit::{
    Direction, Evidence, Message, MessageKind, Refusal, RequestFacts, settle, settle_message, settle_renewal,
};
use crate::policy::Policy;
use crate::rule::OnRefusal;

/// When tests happen that do not say when, in unix seconds: Thursday, 1 January 2026, noon.
const NOW: u64 = 1_767_268_800;

/// How one test went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TestOutcome {
    /// File within the bundle.
    pub file: String,
    /// The test's name.
    pub name: String,
    /// What was expected and what came instead; `None` if the verdict held.
    pub failure: Option<String>,
}

impl TestOutcome {
    /// Whether the verdict held.
    pub fn passed(&self) -> bool {
        self.failure.is_none()
    }
}

/// Runs every test below `tests/`, in the order of files. Rates are taken to have room, nothing to be revoked.
///
/// A file that does not parse is a failed test.
pub fn run_tests(policy: &Policy, bundle: &Bundle) -> Vec<TestOutcome> {
    let mut outcomes = Vec::new();
    for (file, bytes) in &bundle.files {
        let Some(stem) = file.strip_prefix("tests/").and_then(|name| name.strip_suffix(".toml")) else {
            continue;
        };
        let outcome = |name: String, failure| TestOutcome { file: file.clone(), name, failure };
        match parse(bytes) {
            Err(error) => outcomes.push(outcome(stem.to_owned(), Some(error))),
            Ok(tests) => outcomes.extend(tests.into_iter().map(|test| {
                let name = test.name.clone().unwrap_or_else(|| stem.to_owned());
                outcome(name, run(policy, &test).err())
            })),
        }
    }
    outcomes
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Test {
    name: Option<String>,
    request: Request,
    identity: Option<Who>,
    message: Option<Sent>,
    expect: Option<Expected>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tests {
    test: Vec<Test>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    /// Default GET; with a body POST.
    method: Option<String>,
    path: String,
    query: Option<String>,
    /// Default `localhost`.
    host: Option<String>,
    /// Default 192.0.2.1.
    peer: Option<IpAddr>,
    origin: Option<String>,
    /// Subprotocols offered, as the header lists them.
    subprotocol: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    /// A string as it is, anything else as JSON; `application/json` unless `headers` say otherwise.
    body: Option<Value>,
    /// Default: whether the path is a WebSocket only and no method is given.
    websocket: Option<bool>,
    /// When, such as 2026-01-05T20:00:00Z.
    time: Option<toml::value::Datetime>,
    /// "1.2" or "1.3", the default.
    tls: Option<TlsVersion>,
    /// Whether the connection has a verified client certificate; default false.
    #[serde(default)]
    client_certificate: bool,
}

#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
enum TlsVersion {
    #[serde(rename = "1.2")]
    Tls12,
    #[serde(rename = "1.3")]
    Tls13,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Who {
    subject: String,
    session: Option<String>,
    #[serde(default)]
    roles: Vec<String>,
    department: Option<String>,
    /// Authentication context class.
    acr: Option<String>,
    /// Authentication methods.
    #[serde(default)]
    amr: Vec<String>,
    /// Seconds since the login; without it the token does not say.
    auth_age: Option<u64>,
    /// Seconds since the token was issued; without it the token does not say.
    token_age: Option<u64>,
    /// Whether the token is bound to a key, which the request proves to hold; default false.
    #[serde(default)]
    bound: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Sent {
    /// Default from the client.
    #[serde(default)]
    direction: Way,
    /// Text as it is.
    text: Option<String>,
    /// Text that is this value as JSON.
    json: Option<Value>,
    /// Binary, these bytes.
    binary: Option<Vec<u8>>,
}

impl Sent {
    fn direction(&self) -> Direction {
        match self.direction {
            Way::ToUpstream => Direction::ToUpstream,
            Way::ToClient => Direction::ToClient,
        }
    }

    fn payload(&self) -> (MessageKind, Vec<u8>) {
        match (&self.text, &self.json, &self.binary) {
            (_, _, Some(bytes)) => (MessageKind::Binary, bytes.clone()),
            (_, Some(value), None) => (MessageKind::Text, value.to_string().into_bytes()),
            (text, None, None) => (MessageKind::Text, text.clone().unwrap_or_default().into_bytes()),
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
enum Way {
    #[default]
    ToUpstream,
    ToClient,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    /// Name of the rule that allows it.
    allow: Option<String>,
    /// Reason of the denial.
    deny: Option<String>,
    status: Option<u16>,
    close: Option<u16>,
    /// JSON pointer to the field that does not match its schema, or to where JSON is refused.
    pointer: Option<String>,
    /// Whether the socket stays open and the client is answered.
    answer: Option<bool>,
    /// Reason that shadow mode noted.
    shadowed: Option<String>,
}

fn parse(bytes: &[u8]) -> Result<Vec<Test>, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "not UTF-8".to_owned())?;
    let table: toml::Table = toml::from_str(text).map_err(|error| error.to_string())?;
    // From the text, not from the table: only so errors show the line.
    if table.contains_key("test") {
        toml::from_str::<Tests>(text).map(|tests| tests.test).map_err(|error| error.to_string())
    } else {
        toml::from_str::<Test>(text).map(|test| vec![test]).map_err(|error| error.to_string())
    }
}

/// What came of it.
#[derive(Debug)]
enum Verdict {
    Allowed { rule: Arc<str>, shadowed: Option<Denial> },
    Refused(Refusal),
}

fn run(policy: &Policy, test: &Test) -> Result<(), String> {
    let verdict = Asked::of(policy, test)?.verdict(policy);
    let expected = test.expect.as_ref().ok_or("expect is missing")?;
    match (&verdict, expected.allow.as_deref(), expected.deny.as_deref()) {
        (_, None, None) | (_, Some(_), Some(_)) => Err("expect wants either `allow` or `deny`".to_owned()),
        (Verdict::Allowed { rule, shadowed }, Some(wanted), None) => {
            differs("rule", Some(wanted), Some(&**rule))?;
            differs("shadowed", expected.shadowed.as_deref(), shadowed.as_ref().map(Denial::reason))
        }
        (Verdict::Refused(refusal), None, Some(wanted)) => {
            let denial = &refusal.denial;
            differs("reason", Some(wanted), Some(denial.reason()))?;
            let number = |number: u16| number.to_string();
            let (status, close) = (number(denial.status().as_u16()), number(denial.close_code()));
            if let Some(wanted) = expected.status {
                differs("status", Some(&number(wanted)), Some(&status))?;
            }
            if let Some(wanted) = expected.close {
                differs("close code", Some(&number(wanted)), Some(&close))?;
            }
            if let Some(wanted) = &expected.pointer {
                let found = match denial {
                    Denial::Schema { pointer } | Denial::Json { pointer, .. } => Some(pointer.as_str()),
                    _ => None,
                };
                differs("pointer", Some(wanted), found)?;
            }
            let answered = refusal.action == OnRefusal::Answer;
            match expected.answer {
                Some(wanted) if wanted != answered => {
                    Err(format!("expected answer = {wanted}, found {answered}"))
                }
                _ => Ok(()),
            }
        }
        (Verdict::Allowed { rule, .. }, None, Some(wanted)) => {
            Err(format!("expected a denial `{wanted}`, but `{rule}` allows it"))
        }
        (Verdict::Refused(refusal), Some(wanted), None) => {
            Err(format!("expected `{wanted}` to allow it, but it is refused: {}", refusal.denial))
        }
    }
}

fn differs(what: &str, expected: Option<&str>, found: Option<&str>) -> Result<(), String> {
    if expected == found {
        return Ok(());
    }
    Err(format!("expected {what} `{}`, found `{}`", expected.unwrap_or("none"), found.unwrap_or("none")))
}

/// A test's question, as the gateway would know it.
struct Asked<'t> {
    test: &'t Test,
    method: Method,
    headers: HeaderMap,
    body: Option<String>,
    websocket: bool,
    identity: Option<Arc<Identity>>,
    now: u64,
    decisions: DecisionCache,
}

impl<'t> Asked<'t> {
    /// # Errors
    /// The test itself makes no sense.
    fn of(policy: &Policy, test: &'t Test) -> Result<Self, String> {
        let request = &test.request;
        let mut headers = HeaderMap::new();
        for (name, value) in &request.headers {
            let name: HeaderName = name.parse().map_err(|_| format!("`{name}` is no header name"))?;
            headers.append(name, header_value(value)?);
        }
        if let Some(origin) = &request.origin {
            headers.append(header::ORIGIN, header_value(origin)?);
        }
        if let Some(subprotocol) = &request.subprotocol {
            headers.append(header::SEC_WEBSOCKET_PROTOCOL, header_value(subprotocol)?);
        }
        let body = request.body.as_ref().map(|body| match body {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        });
        if body.is_some() && !headers.contains_key(header::CONTENT_TYPE) {
            headers.append(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        let default = if body.is_some() { Method::POST } else { Method::GET };
        let method = match &request.method {
            Some(method) => method.parse().map_err(|_| format!("`{method}` is no method"))?,
            None => default,
        };
        let now = request.time.map_or(Ok(NOW), unix_seconds)?;
        let before = |age: Option<u64>| age.map(|age| now.saturating_sub(age));
        let identity = test.identity.as_ref().map(|who| {
            Arc::new(Identity::new(IdentityParts {
                issuer: "test".into(),
                subject: who.subject.clone(),
                session: who.session.clone(),
                roles: who.roles.clone(),
                department: who.department.clone(),
                expires_at: u64::MAX,
                acr: who.acr.clone(),
                amr: who.amr.clone(),
                auth_time: before(who.auth_age),
                issued_at: before(who.token_age),
                binding: Binding { key: who.bound.then_some([0; 32]), certificate: None },
                ..IdentityParts::default()
            }))
        });
        let decisions = DecisionCache::new(1);
        let websocket = request.websocket.unwrap_or(false);
        let mut asked = Self { test, method, headers, body, websocket, identity, now, decisions };
        if request.websocket.is_none() && request.method.is_none() {
            asked.websocket = matches!(policy.match_request(&asked.facts()), Err(Denial::UpgradeRequired));
        }
        Ok(asked)
    }

    fn facts(&self) -> RequestFacts<'_> {
        let request = &self.test.request;
        RequestFacts {
            certificate: None,
            peer: request.peer.unwrap_or(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))),
            host: request.host.as_deref().unwrap_or("localhost"),
            method: &self.method,
            path: &request.path,
            query: request.query.as_deref(),
            headers: &self.headers,
            websocket: self.websocket,
            content_length: self.body.as_ref().map(|body| u64::try_from(body.len()).unwrap_or(u64::MAX)),
            has_body: self.body.is_some(),
            tls: TlsFacts {
                tls13: request.tls != Some(TlsVersion::Tls12),
                client_certificate: request.client_certificate,
            },
        }
    }

    fn verdict(&self, policy: &Policy) -> Verdict {
        self.walk(policy, self.test.message.as_ref()).unwrap_or_else(Verdict::Refused)
    }

    /// The walk that the gateway makes, without the gateway.
    fn walk(&self, policy: &Policy, message: Option<&Sent>) -> Result<Verdict, Refusal> {
        let close = |denial| Refusal { denial, action: OnRefusal::Close };
        let room = || Evidence { rates: Ok(()), revoked: false, lost: None };
        let identity = self.identity.clone();
        let proven = identity.as_deref().map_or_else(Binding::default, |identity| identity.binding);
        let facts = self.facts();
        let demands = policy
            .match_request(&facts)
            .and_then(|matched| matched.judge(&facts, identity))
            .and_then(|demands| demands.prove(proven, self.now, &self.decisions))
            .map_err(close)?;
        let permit = settle(demands, room()).map_err(close)?;
        let rule = Arc::clone(&permit.rule().name);
        let mut shadowed = permit.shadowed().cloned();
        if let Some(body) = &self.body {
            let body = permit.judge_body(body.as_bytes(), &self.decisions).map_err(close)?;
            shadowed = shadowed.or_else(|| body.shadowed().cloned());
        }
        if let Some(sent) = message {
            let no_tunnel = || close(Denial::NoWebsocket);
            let tunnel = permit.into_tunnel().ok_or_else(no_tunnel)?;
            let (kind, payload) = sent.payload();
            let demands =
                tunnel.judge_message(&Message { direction: sent.direction(), kind, payload: &payload })?;
            let of_message = match demands.is_renewal() {
                true => settle_renewal(demands, room())?.shadowed().cloned(),
                false => settle_message(demands.at(self.now, &self.decisions), room())?.shadowed().cloned(),
            };
            shadowed = shadowed.or(of_message);
        }
        Ok(Verdict::Allowed { rule, shadowed })
    }

    /// What the Cedar policies say, of the message if the socket may be opened, otherwise of the request.
    fn authorization(&self, policy: &Policy) -> Option<Authorization> {
        let facts = self.facts();
        let (rule, path) = policy.match_request(&facts).ok()?.into_parts();
        let opened = self.test.message.as_ref().filter(|_| self.walk(policy, None).is_ok());
        let payload;
        let (decision, document) = match opened {
            Some(sent) => {
                payload = sent.payload().1;
                let table = rule.tunnel.as_ref()?.table(sent.direction())?;
                let text = json::scan(&payload, &table.json).ok()?;
                let name = text.string(&table.pointer)?;
                (table.types.get(&*name)?.authorization.as_ref()?, Some(text))
            }
            None => {
                let body = self.body.as_ref().zip(rule.body_json.as_ref());
                let body = body.and_then(|(body, limits)| json::scan(body.as_bytes(), limits).ok());
                (rule.authorization.as_ref()?, body)
            }
        };
        let identity = self.identity.as_deref()?;
        let places = Places { path: path.as_str(), query: facts.query, document };
        let found = decision.resource.find(places);
        let evaluated = match &found {
            Some(found) => decision.evaluate(&Sample::of(identity, facts.peer, facts.tls, self.now, found)),
            None => Evaluated { allowed: false, policies: Vec::new(), errors: Vec::new() },
        };
        let text = |text: Option<&std::borrow::Cow<'_, str>>| text.map(ToString::to_string);
        Some(Authorization {
            action: decision.action_name.to_string(),
            resource_type: decision.resource.kind.to_string(),
            resource: found.as_ref().map(|found| found.id.to_string()),
            department: text(found.as_ref().and_then(|found| found.department.as_ref())),
            owner: text(found.as_ref().and_then(|found| found.owner.as_ref())),
            allowed: evaluated.allowed,
            policies: evaluated.policies.iter().map(|id| decision.policy(id)).collect(),
            errors: evaluated.errors,
            tabulated: decision.is_tabulated(),
            evaluated_because: decision.obstacle().map(str::to_owned),
            facts: decision.facts().into_iter().map(str::to_owned).collect(),
        })
    }
}

/// A date and time of TOML, in UTC, as unix seconds.
fn unix_seconds(datetime: toml::value::Datetime) -> Result<u64, String> {
    let bad =
        || format!("`{datetime}` is no date and time in UTC from 1970 on, such as 2026-01-05T20:00:00Z");
    let (Some(date), Some(time), Some(toml::value::Offset::Z)) =
        (datetime.date, datetime.time, datetime.offset)
    else {
        return Err(bad());
    };
    // Days before the date, counted from March, in which leap days come last.
    let (year, month) = match date.month {
        1 | 2 => (u64::from(date.year).checked_sub(1).ok_or_else(bad)?, u64::from(date.month) + 9),
        month => (u64::from(date.year), u64::from(month).saturating_sub(3)),
    };
    let days = 365 * year + year / 4 - year / 100 + year / 400 + (153 * month + 2) / 5 + u64::from(date.day);
    // From 1 March 0000 to 1 January 1970, and the first of a month is its day 1.
    let days = days.checked_sub(719_469).ok_or_else(bad)?;
    let seconds = u64::from(time.second.unwrap_or(0));
    Ok(days * 86_400 + u64::from(time.hour) * 3_600 + u64::from(time.minute) * 60 + seconds)
}

/// A question to a policy: a test without expectations, or with some that do not matter.
pub struct Question(Test);

impl Question {
    /// From the keys of a test, as JSON.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(question: Value) -> Result<Self, String> {
        serde_json::from_value(question).map(Self).map_err(|error| error.to_string())
    }

    /// The tests of a file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn of_tests(file: &[u8]) -> Result<Vec<Self>, String> {
        Ok(parse(file)?.into_iter().map(Self).collect())
    }

    /// The test's name.
    pub fn name(&self) -> Option<&str> {
        self.0.name.as_deref()
    }
}

/// What a policy answers to a [`Question`], and what decided.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// Whether it is allowed.
    pub allowed: bool,
    /// The rule that covers it; `None` if none does.
    pub rule: Option<String>,
    /// Reason of the denial.
    pub reason: Option<&'static str>,
    /// Status, and close code of an open WebSocket.
    pub status: Option<u16>,
    /// See `status`.
    pub close: Option<u16>,
    /// What the client is told.
    pub detail: Option<String>,
    /// Reason that shadow mode noted.
    pub shadowed: Option<&'static str>,
    /// What decided, for people.
    pub decided_by: String,
    /// What the Cedar policies say; `None` where they are not asked.
    pub authorization: Option<Authorization>,
}

/// What the Cedar policies say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Authorization {
    /// The action.
    pub action: String,
    /// Type of the resource.
    pub resource_type: String,
    /// Its id; `None` if it, or something of it, was not found.
    pub resource: Option<String>,
    /// Its department.
    pub department: Option<String>,
    /// Whose it is.
    pub owner: Option<String>,
    /// Whether they permit it.
    pub allowed: bool,
    /// The policies that decided: those that permit, or those that forbid; none if nothing permits.
    pub policies: Vec<DecidingPolicy>,
    /// What went wrong in policies: then it is denied.
    pub errors: Vec<String>,
    /// Whether the gateway looks the answer up.
    pub tabulated: bool,
    /// Why not.
    pub evaluated_because: Option<String>,
    /// What the policies for this action look at.
    pub facts: Vec<String>,
}

/// A Cedar policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DecidingPolicy {
    /// Its `@id`.
    pub id: String,
    /// `permit` or `forbid`.
    pub effect: &'static str,
    /// Its `@reason`.
    pub reason: Option<String>,
    /// File in the bundle.
    pub file: String,
    /// Line.
    pub line: u32,
}

/// Judges as the gateway would, with room in all rates and nothing revoked, and says what decided.
///
/// # Errors
/// The question makes no sense.
pub fn explain(policy: &Policy, question: &Question) -> Result<Explanation, String> {
    let asked = Asked::of(policy, &question.0)?;
    let authorization = asked.authorization(policy);
    let rule = policy.match_request(&asked.facts()).ok().map(|matched| matched.rule().name.to_string());
    let names = |what: &Authorization| {
        let named: Vec<_> =
            what.policies.iter().map(|it| format!("`{}` ({}:{})", it.id, it.file, it.line)).collect();
        named.join(", ")
    };
    let of_rule = || rule.as_ref().map_or_else(|| "no rule".to_owned(), |rule| format!("rule `{rule}`"));
    Ok(match asked.verdict(policy) {
        Verdict::Allowed { shadowed, .. } => Explanation {
            allowed: true,
            reason: None,
            status: None,
            close: None,
            detail: None,
            shadowed: shadowed.as_ref().map(Denial::reason),
            decided_by: match authorization.as_ref().filter(|it| it.allowed) {
                Some(what) => format!("policy {}", names(what)),
                None => of_rule(),
            },
            rule,
            authorization,
        },
        Verdict::Refused(refusal) => {
            let denial = refusal.denial;
            let decided_by = match (&denial, &authorization) {
                (Denial::NotPermitted, Some(what)) if !what.errors.is_empty() => {
                    format!("an error in a policy: {}", what.errors.join("; "))
                }
                (Denial::NotPermitted, Some(what)) if what.policies.is_empty() => {
                    format!("no policy permits `{}`", what.action)
                }
                (Denial::NotPermitted, Some(what)) => format!("policy {}", names(what)),
                _ => of_rule(),
            };
            Explanation {
                allowed: false,
                rule,
                reason: Some(denial.reason()),
                status: Some(denial.status().as_u16()),
                close: Some(denial.close_code()),
                detail: Some(denial.detail().into_owned()),
                shadowed: None,
                decided_by,
                authorization,
            }
        }
    })
}

fn header_value(text: &str) -> Result<HeaderValue, String> {
    HeaderValue::from_str(text).map_err(|_| format!("`{text}` is no header value"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failures(tests: &str) -> Vec<Option<String>> {
        let mut bundle = Bundle::shipped("enterprise").unwrap();
        bundle.files.retain(|name, _| !name.starts_with("tests/"));
        bundle.files.insert("tests/x.toml".into(), tests.into());
        let policy = Policy::compile(&bundle, &[("state".into(), "/s".into())].into()).unwrap();
        run_tests(&policy, &bundle).into_iter().map(|outcome| outcome.failure).collect()
    }

    #[test]
    fn a_verdict_that_does_not_hold_is_told() {
        for (test, failure) in [
            ("request = { path = \"/healthz\" }\nexpect = { allow = \"health\" }", None),
            (
                "request = { path = \"/healthz\" }\nexpect = { allow = \"jwks\" }",
                Some("expected rule `jwks`, found `health`"),
            ),
            (
                "request = { path = \"/healthz\" }\nexpect = { deny = \"no-route\" }",
                Some("`health` allows it"),
            ),
            ("request = { path = \"/x\" }\nexpect = { allow = \"health\" }", Some("it is refused: no-route")),
            (
                "request = { path = \"/x\" }\nexpect = { deny = \"no-route\", status = 403 }",
                Some("expected status `403`, found `404`"),
            ),
            ("request = { path = \"/x\" }\nexpect = { deny = \"no-route\", close = 1 }", Some("close code")),
            ("request = { path = \"/x\" }\nexpect = { }", Some("either `allow` or `deny`")),
            (
                "request = { path = \"/x\" }\nexpect = { deny = \"no-route\", stauts = 404 }",
                Some("unknown field `stauts`"),
            ),
            (
                "request = { path = \"/x\", method = \"A B\" }\nexpect = { allow = \"x\" }",
                Some("`A B` is no method"),
            ),
            ("request = 1", Some("line 1")),
            ("]", Some("line 1")),
        ] {
            let found = failures(test);
            match (found.as_slice(), failure) {
                ([None], None) => {}
                ([Some(found)], Some(part)) if found.contains(part) => {}
                _ => panic!("{test}: expected {failure:?}, found {found:?}"),
            }
        }
    }
}
