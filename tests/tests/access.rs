//! Who may do what, over sockets: the bundles' matrices of roles and actions as requests and as messages, sweeps over other
//! people's and departments' ids, and what a change of rights does to open sockets.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use sealgate_tests::{Bundle, Gateway, Reply, Wire, frame, now, sealgate};
use serde::Deserialize;
use serde_json::{Value, json};

/// How soon a change of rights must have reached an open socket, once the command that made it has returned.
const AT_ONCE: Duration = Duration::from_secs(2);

const REASON: &str = "X-Access-Reason: the matrix";

/// A shipped bundle before a recording upstream, and more ways to do the same: a WebSocket that carries every action as a message of
/// that type, and routes whose resource stands in the query or in the body.
fn shipped(name: &str) -> Bundle {
    let bundle = Bundle::shipped(name);
    let mut actions: BTreeMap<String, &str> = BTreeMap::new();
    for row in matrix(name).row {
        let resource = match &row.message {
            Some(message) if message.contains_key("user") => {
                "resource = { type = \"History\", id = \"message:/user\", owner = \"message:/user\" }"
            }
            Some(_) => {
                "resource = { type = \"Department\", id = \"message:/department\", department = \"message:/department\" }"
            }
            None => "",
        };
        if let Some(action) = row.action {
            actions.insert(action, resource);
        }
    }
    let mut overlay =
        "[[websocket]]\nname = \"every-action\"\npath = \"/ws/every\"\nupstream = \"backend\"\n\
                       action = \"every.open\"\nrenew = { type = \"renew\", min_interval = \"100ms\" }\n"
            .to_owned();
    for (action, resource) in &actions {
        for (kind, refusal) in [(action.clone(), "answer"), (format!("{action}!"), "close")] {
            overlay += &format!(
                "[[websocket.message]]\ntype = \"{kind}\"\ndirection = \"to-upstream\"\naction = \"{action}\"\n\
                 on_refusal = \"{refusal}\"\n{resource}\n"
            );
            overlay += &format!("[[websocket.message]]\ntype = \"{kind}\"\ndirection = \"to-client\"\n");
        }
    }
    for (action, kind, owner, key) in [
        ("history.read", "History", "owner", "user"),
        ("members.read", "Department", "department", "department"),
    ] {
        if !actions.contains_key(action) {
            continue;
        }
        for (way, method, more) in [
            ("query", "GET", "query = {}"),
            ("body", "POST", "body = { max_bytes = \"1KiB\", schema = \"schemas/any.json\" }"),
        ] {
            let place = if way == "body" { format!("body:/{key}") } else { format!("query:{key}") };
            overlay += &format!(
                "[[route]]\nname = \"{key}-by-{way}\"\npath = \"/{way}/{action}\"\nmethods = [\"{method}\"]\n\
                 upstream = \"backend\"\naction = \"{action}\"\n{more}\n\
                 resource = {{ type = \"{kind}\", id = \"{place}\", {owner} = \"{place}\" }}\n"
            );
        }
    }
    bundle.write_file("schemas/any.json", r#"{ "type": "object" }"#);
    bundle.write_file("policy.d/every.toml", &overlay);
    bundle.write_file(
        "policy.d/every.cedarschema",
        "action \"every.open\" appliesTo { principal: User, resource: Route, context: Circumstances };\n",
    );
    bundle.write_file(
        "policy.d/every.cedar",
        "@id(\"every\") permit (principal, action == Action::\"every.open\", resource);\n",
    );
    bundle
}

fn enterprise() -> Bundle {
    shipped("enterprise")
}

/// What stands in `tests/matrix`: who may do what in a bundle.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Matrix {
    who: Vec<Who>,
    row: Vec<Row>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    /// None where there is no such action, nor route.
    action: Option<String>,
    request: Option<String>,
    websocket: Option<String>,
    subprotocol: Option<String>,
    body: Option<String>,
    message: Option<BTreeMap<String, String>>,
    allow: BTreeSet<String>,
    refused: Option<String>,
    /// Why it differs from the enterprise bundle's.
    why: Option<String>,
}

impl Row {
    fn title(&self) -> &str {
        self.request.as_deref().or(self.websocket.as_deref()).expect("a request, or a websocket")
    }

    /// Where `message` stands for what the row is about, by who asks.
    fn said_by(&self, who: &Who) -> Option<Value> {
        let mut message = json!({ "type": self.action.as_ref()? });
        for (field, value) in self.message.iter().flatten() {
            let value = match (field.as_str(), value.as_str()) {
                ("department", "{own}") => "sales".to_owned(),
                ("department", "{other}") => "legal".to_owned(),
                (_, value) => who.fill(value),
            };
            message[field.as_str()] = value.into();
        }
        Some(message)
    }
}

fn matrix(bundle: &str) -> Matrix {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("matrix/{bundle}.toml"));
    let text = fs::read_to_string(path).expect("the matrix");
    let matrix: Matrix = toml::from_str(&text).expect("the matrix is TOML of its form");
    let known: BTreeSet<_> = matrix.who.iter().map(|who| who.name.clone()).collect();
    for row in &matrix.row {
        assert!(row.allow.is_subset(&known), "{}: {:?} of {known:?}", row.title(), row.allow);
    }
    matrix
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Who {
    name: String,
    subject: String,
    roles: Vec<String>,
    /// Seconds since the login, where the token says it.
    login_age: Option<u64>,
    /// Why nothing is open to them, where that is not that no policy permits it.
    refused: Option<String>,
}

impl Who {
    /// Of the enterprise bundle's.
    fn named(name: &str) -> Who {
        matrix("enterprise").who.into_iter().find(|who| who.name == name).expect("one of that name")
    }

    fn token(&self, bundle: &Bundle) -> String {
        let login = self.login_age.map(|age| now() - age);
        let changes =
            json!({ "roles": self.roles, "dept": "sales", "amr": ["pwd", "otp"], "auth_time": login });
        bundle.issuer.with(&self.subject, changes)
    }

    /// Their own, and somebody else's.
    fn fill(&self, text: &str) -> String {
        let of_user = text.contains("/users/") || !text.contains('/');
        let (own, other) = if of_user { (self.subject.as_str(), "bob") } else { ("sales", "legal") };
        text.replace("{own}", own).replace("{other}", other)
    }
}

/// The requirement is a second; what it took is said, and a crowded machine gets a little more.
#[track_caller]
fn at_once(what: &str, since: Instant) {
    let took = since.elapsed();
    eprintln!("{took:?}: {what}");
    assert!(took < AT_ONCE, "{took:?}: {what}");
}

fn reload(gateway: &Gateway) {
    let (loaded, said) = gateway.reload();
    assert!(loaded, "{said}");
}

#[track_caller]
fn refused(reply: &Reply, status: u16, reason: &str, what: &str) {
    assert_eq!(reply.status, status, "{what}: {reply:?}");
    assert_eq!(reply.problem(status), format!("urn:sealgate:problem:{reason}"), "{what}");
}

fn bearer(token: &str) -> String {
    format!("Authorization: Bearer {token}\r\n")
}

/// What comes back: the echo, an answer with a reason, or a close.
#[derive(Debug, PartialEq)]
enum Back {
    Echo,
    Answer(String),
    Close(u16, String),
}

fn say(wire: &mut Wire, message: &Value) -> Back {
    let text = message.to_string();
    wire.send(frame(0x81, text.as_bytes()));
    let back = wire.message().expect("something comes back");
    if back.opcode == 8 {
        let (code, said) = back.close();
        return Back::Close(
            code,
            said.split(' ').next().unwrap_or_default().trim_end_matches(':').to_owned(),
        );
    }
    if back.payload == text.as_bytes() {
        return Back::Echo;
    }
    let answer: Value = serde_json::from_slice(&back.payload).expect("an answer is JSON");
    Back::Answer(answer["reason"].as_str().expect("a reason").to_owned())
}

#[test]
fn p1_every_role_may_do_what_the_matrix_says_and_nothing_else() {
    requests("enterprise", 40, 122);
}

#[test]
fn p1_regulated_every_role_may_do_what_the_matrix_says_and_nothing_else() {
    requests("regulated", 27, 189);
}

#[test]
fn p1_consumer_users_may_do_what_the_matrix_says_and_nobody_else_anything() {
    requests("consumer", 7, 209);
}

/// Runs the matrix as requests; so many cells are allowed, and refused.
fn requests(name: &str, wanted_allowed: usize, wanted_refused: usize) {
    let bundle = shipped(name);
    let gateway = Gateway::run(&bundle);
    let own_origin = format!("Origin: {}", gateway.url("").trim_end_matches('/'));
    let Matrix { who, row: rows } = matrix(name);
    let (mut allowed, mut denied) = (0, 0);
    for row in &rows {
        for who in &who {
            let token = who.token(&bundle);
            let what = format!("{} as {}", row.title(), who.name);
            let before = bundle.upstream.count("/v1");
            // A ticket is for a page, and an asker of the gateway itself.
            let of_gateway = row.action.as_deref() == Some("ticket.issue");
            let reply = match (&row.request, &row.websocket) {
                (Some(request), None) => {
                    let (method, path) = request.split_once(' ').expect("method and path");
                    // Some is asked for with a reason only: `tests/tests/audit.rs`.
                    let curl =
                        gateway.curl(&who.fill(path)).http1().method(method).token(&token).header(REASON);
                    let curl = if of_gateway { curl.header(&own_origin) } else { curl };
                    match &row.body {
                        Some(body) => curl.json(body).send(),
                        None => curl.send(),
                    }
                }
                (None, Some(path)) => {
                    let offer =
                        row.subprotocol.as_ref().map(|it| format!("Sec-WebSocket-Protocol: {it}\r\n"));
                    let fields = format!(
                        "{}{}Origin: https://localhost\r\n",
                        bearer(&token),
                        offer.unwrap_or_default()
                    );
                    gateway.wire().upgrade(path, &fields)
                }
                _ => panic!("{what}: a request, or a websocket"),
            };
            let reached = bundle.upstream.count("/v1") - before;
            if row.allow.contains(&who.name) {
                allowed += 1;
                // The upstream opens no WebSocket there, but was asked to.
                assert_eq!(reached, usize::from(!of_gateway), "{what}: {reply:?}");
                let status = if row.websocket.is_some() { 502..503 } else { 200..300 };
                assert!(status.contains(&reply.status), "{what}: {reply:?}");
            } else {
                denied += 1;
                let reason = row.refused.as_ref().or(who.refused.as_ref()).map_or("not-permitted", |it| it);
                let status = if reason == "no-route" { 404 } else { 403 };
                refused(&reply, status, reason, &what);
                assert_eq!(reached, 0, "{what}");
            }
        }
    }
    eprintln!("{name}: {allowed} cells allowed, {denied} refused");
    assert_eq!((allowed, denied), (wanted_allowed, wanted_refused));
}

#[test]
fn p1_messages_are_judged_by_the_same_matrix() {
    messages("enterprise");
}

#[test]
fn p1_regulated_messages_are_judged_by_the_same_matrix() {
    messages("regulated");
}

#[test]
fn p1_consumer_messages_are_judged_by_the_same_matrix() {
    messages("consumer");
}

fn messages(name: &str) {
    let bundle = shipped(name);
    let gateway = Gateway::run(&bundle);
    let Matrix { who, row: rows } = matrix(name);
    let (mut allowed, mut denied) = (0, 0);
    for who in &who {
        let token = who.token(&bundle);
        let mut wire = gateway.wire();
        let opened = wire.upgrade("/ws/every", &bearer(&token));
        if opened.status != 101 {
            // Whom the bundle wants nowhere does not get so far.
            let reason = who.refused.as_deref().unwrap_or("not-permitted");
            refused(&opened, 403, reason, &who.name);
            assert!(rows.iter().all(|row| !row.allow.contains(&who.name)), "{} may do something", who.name);
            denied += 1;
            continue;
        }
        for row in &rows {
            let Some(mut message) = row.said_by(who) else { continue };
            let what = format!("{message} from {}", who.name);
            if row.allow.contains(&who.name) {
                allowed += 1;
                assert_eq!(say(&mut wire, &message), Back::Echo, "{what}");
                continue;
            }
            denied += 1;
            // Answered where the rule says so, and the socket stays open; closed with 4403 where it does not.
            assert_eq!(say(&mut wire, &message), Back::Answer("not-permitted".into()), "{what}");
            message["type"] = format!("{}!", message["type"].as_str().expect("text")).into();
            let mut closed = gateway.open("/ws/every", &token);
            assert_eq!(say(&mut closed, &message), Back::Close(4403, "not-permitted".into()), "{what}");
        }
    }
    eprintln!("{name}: {allowed} messages allowed, {denied} refused");
    assert!(allowed >= 7 && denied >= 12, "{allowed} allowed, {denied} refused");
    let sent = bundle.upstream.frames();
    let legal = sent.iter().filter(|it| String::from_utf8_lossy(&it.payload).contains("legal")).count();
    assert_eq!(legal, 0, "the backend saw a message about another department");
}

/// Row N-1: bundles differ where their kind of business must.
#[test]
fn n1_a_matrix_says_why_where_it_differs_from_the_enterprise_one_and_nowhere_else() {
    let enterprise = matrix("enterprise");
    let by_roles: BTreeMap<_, _> = enterprise.who.iter().map(|who| (&who.roles, &who.name)).collect();
    for name in ["regulated", "consumer"] {
        let other = matrix(name);
        let titles =
            |matrix: &Matrix| matrix.row.iter().map(|row| row.title().to_owned()).collect::<Vec<_>>();
        assert_eq!(titles(&other), titles(&enterprise), "{name} has the same rows");
        let mut differing = 0;
        for (row, model) in other.row.iter().zip(&enterprise.row) {
            let differs = other.who.iter().any(|who| {
                by_roles.get(&who.roles).is_some_and(|counterpart| {
                    row.allow.contains(&who.name) != model.allow.contains(*counterpart)
                })
            });
            differing += usize::from(differs);
            assert_eq!(row.why.is_some(), differs, "{name}: {}", row.title());
        }
        assert!(differing >= 10, "{name}: {differing}");
    }
}

/// A request over a connection that stays open.
fn ask(wire: &mut Wire, method: &str, path: &str, token: &str, body: &str) -> u16 {
    let content = match body {
        "" => String::new(),
        body => format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len()),
    };
    wire.send(format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{}{content}\r\n{body}", bearer(token)));
    wire.response().expect("an answer").status
}

/// Everybody asks for what is everybody's, wherever the id can stand: only one's own is to be had.
fn sweep(name: &str, kinds: &[(&str, &str, &str)]) {
    const PEOPLE: usize = 8;
    let bundle = shipped(name);
    let gateway = Gateway::run(&bundle);
    let mut wire = gateway.wire();
    for &(action, key, role) in kinds {
        let id = |number: usize| format!("{key}-{number}");
        for asker in 0..PEOPLE {
            let subject = format!("user-{asker}");
            // A department's administrator has logged in just now, as the regulated bundle wants it.
            let claims = json!({
                "roles": [role], "dept": format!("department-{asker}"), "amr": ["otp"], "auth_time": now(),
                "sid": format!("{role}-{asker}"), "jti": format!("{role}-{asker}"),
            });
            let token = bundle.issuer.with(&subject, claims);
            let mut socket = gateway.open("/ws/every", &token);
            for asked in 0..PEOPLE {
                let id = id(asked);
                let path = match key {
                    "user" => format!("/v1/users/{id}/history"),
                    _ => format!("/v1/departments/{id}/members"),
                };
                let object = json!({ key: id }).to_string();
                let statuses = [
                    ask(&mut wire, "GET", &path, &token, ""),
                    ask(&mut wire, "GET", &format!("/query/{action}?{key}={id}"), &token, ""),
                    ask(&mut wire, "POST", &format!("/body/{action}"), &token, &object),
                ];
                let said = say(&mut socket, &json!({ "type": action, key: id }));
                let what = format!("{action} of {id} by {subject}");
                if asker == asked {
                    assert_eq!((statuses, said), ([200; 3], Back::Echo), "{what}");
                } else {
                    let expected = ([403; 3], Back::Answer("not-permitted".into()));
                    assert_eq!((statuses, said), expected, "{what}");
                }
            }
        }
    }
    // As many as are somebody's own, and nothing else, reached the backend.
    let seen = bundle.upstream.seen();
    let about =
        |seen: &&sealgate_tests::Seen| !seen.target.starts_with("/healthz") && seen.target != "/ws/every";
    assert_eq!(seen.iter().filter(about).count(), 3 * PEOPLE * kinds.len());
    let sent = bundle.upstream.frames().iter().filter(|it| it.opcode == 1).count();
    assert_eq!(sent, PEOPLE * kinds.len());
}

const HISTORY: (&str, &str, &str) = ("history.read", "user", "user");
const MEMBERS: (&str, &str, &str) = ("members.read", "department", "department-admin");

#[test]
fn p6_everybody_has_his_own_by_path_query_body_and_message_and_nobody_elses() {
    sweep("enterprise", &[HISTORY, MEMBERS]);
}

#[test]
fn p6_regulated_everybody_has_his_own_and_nobody_elses() {
    sweep("regulated", &[HISTORY, MEMBERS]);
}

#[test]
fn p6_consumer_everybody_has_his_own_and_nobody_elses() {
    sweep("consumer", &[HISTORY]);
}

#[test]
fn p6_no_spelling_of_another_id_reaches_the_backend() {
    let bundle = enterprise();
    let gateway = Gateway::run(&bundle);
    let token = Who::named("employee").token(&bundle);
    let mut ids: Vec<String> = (0..40).map(|number| format!("user-{number}")).collect();
    for spelling in [
        "Erin",
        "ERIN",
        "erin.",
        "erin%20",
        "%20erin",
        "erin%09",
        "erin%00",
        "erin;x",
        "erin,bob",
        "erin%2Fbob",
        "bob%2F..%2Ferin",
        "erin@x",
        "%D0%B5rin",
        "erin%CC%81",
        "%EF%BD%85rin",
        "0",
        "*",
        "%2A",
        "null",
        "me",
        "self",
        "%65rin%31",
        "%2565rin",
    ] {
        ids.push(spelling.to_owned());
    }
    let get = |path: &str| gateway.curl(path).http1().args(["--path-as-is"]).token(&token).send();
    for id in &ids {
        for path in [format!("/v1/users/{id}/history"), format!("/v1/departments/{id}/members")] {
            let reply = get(&path);
            assert!([400, 403, 404].contains(&reply.status), "{path}: {reply:?}");
        }
    }
    for path in
        ["/v1/users/erin/../bob/history", "/v1/users/erin/../../users/bob/history", "/v1/users//history"]
    {
        assert!([400, 404].contains(&get(path).status), "{path}");
    }
    assert_eq!(bundle.upstream.count("/v1"), 0, "{:?}", bundle.upstream.seen());
    // One's own in another spelling is one's own, and goes on in the one form that was judged.
    for path in ["/v1/users/erin/history", "/v1/users/%65rin/history", "/v1/departments/s%61les/members"] {
        assert_eq!(get(path).status, 200, "{path}");
    }
    let seen: Vec<_> =
        bundle.upstream.seen().into_iter().map(|it| it.target).filter(|it| it.starts_with("/v1")).collect();
    assert_eq!(seen, ["/v1/users/erin/history", "/v1/users/erin/history", "/v1/departments/sales/members"]);

    let mut wire = gateway.open("/ws/every", &token);
    for user in [json!("bob"), json!("Erin"), json!("erin "), json!("erin\u{0}"), json!("\u{435}rin")] {
        let message = json!({ "type": "history.read", "user": user });
        assert_eq!(say(&mut wire, &message), Back::Answer("not-permitted".into()), "{message}");
    }
    // What cannot be found is a denial of its own.
    for message in [
        json!({ "type": "history.read" }),
        json!({ "type": "history.read", "user": ["erin"] }),
        json!({ "type": "history.read", "user": "" }),
        json!({ "type": "history.read", "user": "e".repeat(257) }),
        json!({ "type": "history.read", "user": { "erin": true } }),
    ] {
        assert_eq!(say(&mut wire, &message), Back::Answer("resource-missing".into()), "{message}");
    }
    // Two readers may disagree which of the two counts.
    wire.send(frame(0x81, br#"{"type":"history.read","user":"erin","user":"bob"}"#));
    let back = wire.message().expect("a close");
    let messages = bundle.upstream.frames().iter().filter(|frame| frame.opcode != 8).count();
    assert_eq!((back.opcode, messages), (8, 0));
}

#[test]
fn p4_roles_that_nobody_may_have_together_open_nothing() {
    let bundle = enterprise();
    let gateway = Gateway::run(&bundle);
    for roles in [
        json!(["user", "system-admin"]),
        json!(["system-admin", "department-admin"]),
        json!(["auditor", "user"]),
        json!(["auditor", "system-admin"]),
    ] {
        let token = bundle.issuer.with("root", json!({ "roles": roles, "dept": "sales", "amr": ["otp"] }));
        for path in [
            "/v1/users/superuser/history",
            "/v1/admin/configuration",
            "/v1/audit/records",
            "/v1/users/bob/devices",
        ] {
            refused(&gateway.curl(path).http1().token(&token).send(), 403, "roles-conflict", path);
        }
        let reply = gateway.wire().upgrade("/ws/every", &bearer(&token));
        refused(&reply, 403, "roles-conflict", "/ws/every");
    }
    assert_eq!(bundle.upstream.count("/v1"), 0);
}

#[test]
fn p6_a_change_of_rights_reaches_open_sockets_at_once() {
    let bundle = enterprise();
    let gateway = Gateway::run(&bundle);
    let employee = Who::named("employee");
    let token = employee.token(&bundle);
    let message = json!({ "type": "members.read", "department": "sales" });
    let closing = json!({ "type": "members.read!", "department": "sales" });
    let mut asks = gateway.open("/ws/every", &token);
    let mut demoted = gateway.open("/ws/every", &token);
    let mut left = gateway.open("/ws/every", &token);
    let mut auditor = gateway.open("/ws/every", &Who::named("auditor").token(&bundle));
    for wire in [&mut asks, &mut demoted, &mut left] {
        assert_eq!(say(wire, &message), Back::Echo);
    }

    // A token with fewer rights takes the socket with it: only a new one can tell the backend.
    let fewer =
        bundle.issuer.with(&employee.subject, json!({ "roles": ["user"], "dept": "sales", "amr": ["otp"] }));
    let start = Instant::now();
    let back = say(&mut demoted, &json!({ "type": "renew", "token": fewer }));
    assert_eq!(back, Back::Close(1012, "rights-changed".into()));
    at_once("a token with fewer rights closes its socket", start);

    // Other policies: the next message of an open socket is judged by them.
    let cedar = bundle.policy().join("authz.cedar");
    let before = fs::read_to_string(&cedar).expect("the policies");
    let without = "\n@id(\"frozen\") @reason(\"members are not to be seen\")\n\
                   forbid (principal, action == Action::\"members.read\", resource);\n";
    bundle.write_file("authz.cedar", &format!("{before}{without}"));
    reload(&gateway);
    let start = Instant::now();
    while say(&mut asks, &message) == Back::Echo {
        assert!(start.elapsed() < AT_ONCE, "still judged by the old policies");
    }
    at_once("a message is judged by other policies", start);
    assert_eq!(say(&mut asks, &message), Back::Answer("not-permitted".into()));
    assert_eq!(say(&mut asks, &closing), Back::Close(4403, "not-permitted".into()));
    // What was allowed and still is goes on in the same socket.
    assert_eq!(say(&mut left, &json!({ "type": "rooms.read", "department": "sales" })), Back::Echo);
    assert_eq!(say(&mut auditor, &json!({ "type": "audit.read" })), Back::Echo);

    // Policies that do not load change nothing.
    bundle.write_file("authz.cedar", "@id(\"x\") permit (principal, action, resourse);\n");
    let (loaded, said) = gateway.reload();
    assert!(!loaded && said.contains("authz.cedar:1:"), "{said}");
    assert_eq!(say(&mut auditor, &json!({ "type": "audit.read" })), Back::Echo);

    // A socket whose opening is no longer permitted closes by itself, also one that says nothing.
    let user = Who::named("user").token(&bundle);
    let mut idle: Vec<_> = (0..100).map(|_| gateway.open("/ws/every", &user)).collect();
    bundle.write_file("authz.cedar", &before);
    bundle.write_file(
        "policy.d/every.cedar",
        "@id(\"every\") permit (principal in Role::\"auditor\", action == Action::\"every.open\", resource);\n",
    );
    reload(&gateway);
    let start = Instant::now();
    for wire in idle.iter_mut().chain([&mut left]) {
        let back = wire.message().expect("a close");
        assert_eq!((back.opcode, back.close().0), (8, 1008), "{back:?}");
    }
    at_once("the last of 101 sockets is closed that may no longer be open", start);
    assert_eq!(say(&mut auditor, &json!({ "type": "audit.read" })), Back::Echo);

    // Whoever leaves is cut.
    let start = Instant::now();
    assert!(gateway.sessions(&["revoke", "--subject", "carol"]).0);
    let back = auditor.message().expect("a close");
    assert_eq!((back.opcode, back.close().0), (8, 4410), "{back:?}");
    let took = start.elapsed();
    eprintln!("{took:?}: who leaves is cut, with the start of the command for it");
    assert!(took < AT_ONCE + Duration::from_secs(3), "{took:?}");
}

/// Decisions that no table has: by the address, by the hour, by a body, by a query; and a rule in shadow mode.
const EVALUATED: &str = r#"
[[route]]
name = "room"
path = "/rooms"
methods = ["POST"]
upstream = "backend"
action = "room.write"
resource = { type = "Room", id = "body:/room" }
body = { max_bytes = "1KiB", schema = "schemas/room.json" }
[[route]]
name = "find"
path = "/find"
methods = ["GET"]
upstream = "backend"
action = "room.write"
resource = { type = "Room", id = "query:room" }
query = {}
[[route]]
name = "trial"
path = "/trial"
methods = ["GET"]
upstream = "backend"
action = "trial"
mode = "shadow"
[[route]]
name = "errs"
path = "/errs"
methods = ["GET"]
upstream = "backend"
action = "errs"
"#;

#[test]
fn what_no_table_has_is_evaluated_and_what_errs_is_refused() {
    let bundle = Bundle::new("");
    bundle.write_file("schemas/room.json", r#"{ "type": "object" }"#);
    bundle.write_file(
        "authz.cedarschema",
        "entity Role; entity Room; entity Route;\n\
         entity User in [Role] { issuer: String, department?: String, acr?: String, amr: Set<String>, login_age?: Long };\n\
         type C = { address: ipaddr, tls_version: String, client_certificate: Bool, token_age?: Long, now: datetime,\n\
         hour: Long, weekday: Long };\n\
         action \"room.write\" appliesTo { principal: User, resource: Room, context: C };\n\
         action \"trial\", \"errs\" appliesTo { principal: User, resource: Route, context: C };\n",
    );
    bundle.write_file(
        "authz.cedar",
        "@id(\"room\") permit (principal, action == Action::\"room.write\", resource == Room::\"mine\")\n\
         when { context.address.isLoopback() && context.tls_version == \"1.3\" };\n\
         @id(\"all\") permit (principal, action == Action::\"errs\", resource);\n\
         @id(\"overflow\") forbid (principal == User::\"mallory\", action == Action::\"errs\", resource)\n\
         when { 9223372036854775807 + context.weekday > 0 && context.client_certificate };\n",
    );
    bundle.write(EVALUATED);
    let gateway = Gateway::run(&bundle);
    let alice = bundle.issuer.token("alice");
    let post = |body: &str| gateway.curl("/rooms").http1().token(&alice).json(body).send();
    let get = |path: &str, token: &str| gateway.curl(path).http1().token(token).send();
    for _ in 0..3 {
        assert_eq!(post(r#"{"room":"mine"}"#).status, 200);
        refused(&post(r#"{"room":"yours"}"#), 403, "not-permitted", "a body");
        assert_eq!(get("/find?room=mine&x=1", &alice).status, 200);
        refused(&get("/find?room=yours", &alice), 403, "not-permitted", "a query");
    }
    for body in [r#"{}"#, r#"{"room":7}"#, r#"{"room":["mine"]}"#, r#"{"Room":"mine"}"#] {
        refused(&post(body), 422, "resource-missing", body);
    }
    for path in ["/find", "/find?room=mine&room=yours", "/find?room=", "/find?rooms=mine"] {
        refused(&get(path, &alice), 422, "resource-missing", path);
    }
    let old = gateway.curl("/find?room=mine").http1().args(["--tls-max", "1.2"]).token(&alice).send();
    refused(&old, 403, "not-permitted", "TLS 1.2");
    assert_eq!(get("/errs", &alice).status, 200);
    refused(&get("/errs", &bundle.issuer.token("mallory")), 403, "not-permitted", "an overflow");
    assert_eq!(get("/trial", &alice).status, 200);
    let shadowed = gateway.metrics().sum("sealgate_shadow_denials_total", &[("reason", "not-permitted")]);
    assert_eq!(shadowed, 1.0);
}

#[test]
fn explain_names_what_decided() {
    let bundle = enterprise();
    let explain = |args: &[&str]| {
        let (policy, state) = (bundle.policy(), bundle.state());
        let mut all: Vec<&dyn AsRef<std::ffi::OsStr>> =
            vec![&"policy", &"explain", &"--policy", &policy, &"--state", &state];
        all.extend(args.iter().map(|arg| arg as &dyn AsRef<std::ffi::OsStr>));
        let output = sealgate(&all);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        (output.status.code(), text)
    };
    let dora = ["--subject", "dora", "--role", "department-admin", "--amr", "otp", "--department", "sales"];
    let ask = |more: &[&str]| explain(&[&dora[..], more].concat());
    let (code, text) = ask(&["/v1/departments/sales/members"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.starts_with("allowed\n  decided by  policy `own-department` (authz.cedar:"), "{text}");
    let (code, text) = ask(&["/v1/departments/legal/members", "--json"]);
    assert_eq!(code, Some(1), "{text}");
    let answer: Value = serde_json::from_str::<Value>(&text).expect("JSON")["answer"].take();
    assert_eq!(
        (&answer["reason"], &answer["rule"]),
        (&json!("not-permitted"), &json!("members")),
        "{answer}"
    );
    assert_eq!(answer["decided_by"], "no policy permits `members.read`");
    let authorization = &answer["authorization"];
    assert_eq!((&authorization["department"], &authorization["tabulated"]), (&json!("legal"), &json!(true)));

    let (code, text) =
        explain(&["--subject", "root", "--role", "system-admin", "--amr", "otp", "/v1/users/bob/devices"]);
    assert_eq!(code, Some(1));
    assert!(
        text.contains("decided by  policy `no-chats-for-system-admins`") && text.contains("forbid"),
        "{text}"
    );
    let message = r#"{"type":"members.read","department":"sales"}"#;
    let (code, text) = ask(&["/ws/every", "--message", message]);
    assert!(code == Some(0) && text.contains("own-department"), "{text}");
    let (code, text) = explain(&["/v1/users/bob/devices"]);
    assert!(
        code == Some(1) && text.contains("token-missing") && text.contains("rule `devices-list`"),
        "{text}"
    );
    let (code, text) = explain(&["/nowhere"]);
    assert!(code == Some(1) && text.contains("decided by  no rule"), "{text}");

    let verdicts =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies/bundles/enterprise/tests/access.toml");
    let verdicts = verdicts.to_str().expect("UTF-8");
    let (code, text) = explain(&["--test", verdicts, "--name", "nobody reads another's"]);
    assert!(code == Some(1) && text.contains("no policy permits `history.read`"), "{text}");
}
