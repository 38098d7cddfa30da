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

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::bundle::Bundle;
use crate::denial::Denial;
use crate::identity::{Binding, Identity, IdentityParts};
use crate::permit::{
    Direction, Evidence, Message, MessageKind, Refusal, RequestFacts, settle, settle_message, settle_renewal,
};
use crate::policy::Policy;
use crate::rule::OnRefusal;

/// When all tests happen, in unix seconds.
const NOW: u64 = 1 << 40;

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
    expect: Expected,
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
    /// JSON pointer to the field that does not match its schema.
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
    let verdict = judge(policy, test)?;
    let expected = &test.expect;
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
                let found =
                    if let Denial::Schema { pointer } = denial { Some(pointer.as_str()) } else { None };
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

/// The walk that the gateway makes, without the gateway.
///
/// # Errors
/// The test itself makes no sense.
fn judge(policy: &Policy, test: &Test) -> Result<Verdict, String> {
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
    let length = body.as_ref().map(|body| u64::try_from(body.len()).unwrap_or(u64::MAX));
    let mut facts = RequestFacts {
        peer: request.peer.unwrap_or(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1))),
        host: request.host.as_deref().unwrap_or("localhost"),
        method: &method,
        path: &request.path,
        query: request.query.as_deref(),
        headers: &headers,
        websocket: request.websocket.unwrap_or(false),
        content_length: length,
        has_body: body.is_some(),
    };
    if request.websocket.is_none() && request.method.is_none() {
        facts.websocket = matches!(policy.match_request(&facts), Err(Denial::UpgradeRequired));
    }
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
            auth_time: who.auth_age.map(|age| NOW.saturating_sub(age)),
            binding: Binding { key: who.bound.then_some([0; 32]), certificate: None },
            ..IdentityParts::default()
        }))
    });
    Ok(walk(policy, &facts, identity, body.as_deref(), test.message.as_ref())
        .unwrap_or_else(Verdict::Refused))
}

fn walk(
    policy: &Policy,
    facts: &RequestFacts<'_>,
    identity: Option<Arc<Identity>>,
    body: Option<&str>,
    message: Option<&Sent>,
) -> Result<Verdict, Refusal> {
    let close = |denial| Refusal { denial, action: OnRefusal::Close };
    let room = || Evidence { rates: Ok(()), revoked: false, lost: None };
    let proven = identity.as_deref().map_or_else(Binding::default, |identity| identity.binding);
    let demands = policy
        .match_request(facts)
        .and_then(|matched| matched.judge(facts, identity))
        .and_then(|demands| demands.prove(proven, NOW))
        .map_err(close)?;
    let permit = settle(demands, room()).map_err(close)?;
    let rule = Arc::clone(&permit.rule().name);
    let mut shadowed = permit.shadowed().cloned();
    if let Some(body) = body {
        let body = permit.judge_body(body.as_bytes()).map_err(close)?;
        shadowed = shadowed.or_else(|| body.shadowed().cloned());
    }
    if let Some(sent) = message {
        let no_tunnel = || close(Denial::NoWebsocket);
        let tunnel = permit.into_tunnel().ok_or_else(no_tunnel)?;
        let (kind, payload) = sent.payload();
        let direction = match sent.direction {
            Way::ToUpstream => Direction::ToUpstream,
            Way::ToClient => Direction::ToClient,
        };
        let demands = tunnel.judge_message(&Message { direction, kind, payload: &payload })?;
        let of_message = match demands.is_renewal() {
            true => settle_renewal(demands, room())?.shadowed().cloned(),
            false => settle_message(demands.at(NOW), room())?.shadowed().cloned(),
        };
        shadowed = shadowed.or(of_message);
    }
    Ok(Verdict::Allowed { rule, shadowed })
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
