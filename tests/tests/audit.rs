//! What is recorded of uses that are watched, and that they have to say why (rows P-3, P-4, D-1, L-1).

use sealgate_tests::{Bundle, DEADLINE, Gateway, frame, until};
use serde_json::{Value, json};

/// More that is watched, beside what the bundle has: what stands in a body, and messages.
const OVERLAY: &str = r#"
[[route]]
name = "members-by-body"
path = "/by-body"
methods = ["POST"]
upstream = "backend"
action = "members.read"
resource = { type = "Department", id = "body:/department", department = "body:/department" }
body = { max_bytes = "1KiB", json = {} }
audit = true

[[websocket]]
name = "desk"
path = "/ws/desk"
upstream = "backend"
action = "members.read"
resource = { type = "Department", id = "is:sales", department = "is:sales" }
audit = true

[[websocket.message]]
type = "rooms.history"
direction = "to-upstream"
action = "rooms.history"
resource = { type = "Department", id = "message:/department", department = "message:/department" }
reason = "/why"
on_refusal = "answer"

[[websocket.message]]
type = "rooms.history"
direction = "to-client"

[[websocket.message]]
type = "rooms.read"
direction = "both"
action = "rooms.read"
resource = { type = "Department", id = "message:/department", department = "message:/department" }
on_refusal = "answer"
"#;

const WHY: &str = "complaint 4711: \"Zimmer 3\" – 投诉";

struct Desk {
    bundle: Bundle,
    gateway: Gateway,
}

impl Desk {
    fn new(name: &str, overlay: &str) -> Desk {
        let bundle = Bundle::shipped(name);
        bundle.write_file("policy.d/watched.toml", overlay);
        let gateway = Gateway::run(&bundle);
        Desk { bundle, gateway }
    }

    fn token(&self, subject: &str, roles: &[&str]) -> String {
        let claims = json!({ "roles": roles, "dept": "sales", "amr": ["pwd", "otp"], "auth_time": sealgate_tests::now() });
        self.bundle.issuer.with(subject, claims)
    }

    /// All records of that activity, in order.
    fn records(&mut self, activity: &str) -> Vec<Value> {
        let log = self.gateway.process().stderr();
        let records = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        records.filter(|it| it["target"] == "sealgate::audit" && it["activity"] == activity).collect()
    }

    /// The records that came since there were `before`, once there are as many as that.
    fn fresh(&mut self, activity: &str, before: usize, count: usize) -> Vec<Value> {
        until("the records are written", DEADLINE, || {
            (self.records(activity).len() >= before + count).then_some(())
        });
        let all = self.records(activity);
        assert_eq!(all.len(), before + count, "{all:#?}");
        all[before..].to_vec()
    }
}

/// What of a record is asked for, in order.
fn facts<const N: usize>(record: &Value, names: [&str; N]) -> [Value; N] {
    names.map(|name| record[name].clone())
}

const WHO_AND_WHAT: [&str; 8] = [
    "subject",
    "roles",
    "action",
    "resource_type",
    "resource",
    "resource_department",
    "denial",
    "access_reason",
];

#[test]
fn p3_each_use_of_what_is_watched_is_recorded_allowed_or_refused() {
    let mut desk = Desk::new("enterprise", OVERLAY);
    let dora = desk.token("dora", &["department-admin"]);
    let root = desk.token("root", &["system-admin"]);
    let user = desk.token("alice", &["user"]);
    let history = |department: &str| format!("/v1/departments/{department}/rooms/r-1/history");
    let why = format!("X-Access-Reason: {WHY}");

    // Only who may do it is asked why, and nothing goes upstream without.
    let before = desk.records("http-request").len();
    let reply = desk.gateway.curl(&history("sales")).token(&dora).send();
    assert_eq!(reply.problem(403), "urn:sealgate:problem:reason-missing");
    assert!(
        reply.json()["detail"].as_str().is_some_and(|detail| detail.contains("X-Access-Reason")),
        "{reply:?}"
    );
    for bad in ["X-Access-Reason:  ".to_owned(), format!("X-Access-Reason: {}", "x".repeat(513))] {
        let reply = desk.gateway.curl(&history("sales")).token(&dora).header(&bad).send();
        assert_eq!(reply.problem(403), "urn:sealgate:problem:reason-missing", "{bad}");
    }
    let twice = desk
        .gateway
        .curl(&history("sales"))
        .token(&dora)
        .header(&why)
        .header("X-Access-Reason: other")
        .send();
    assert_eq!(twice.problem(403), "urn:sealgate:problem:reason-missing");
    assert_eq!(desk.bundle.upstream.count("/v1"), 0);
    let allowed = desk.gateway.curl(&history("sales")).token(&dora).header(&why).send();
    assert_eq!(allowed.status, 200, "{allowed:?}");
    let allowed = desk.gateway.curl(&history("sales")).http1().token(&dora).header(&why).send();
    assert_eq!(allowed.status, 200, "{allowed:?}");
    let other = desk.gateway.curl(&history("legal")).token(&dora).header(&why).send();
    assert_eq!(other.problem(403), "urn:sealgate:problem:not-permitted");
    assert_eq!(
        desk.gateway.curl(&history("legal")).send().problem(401),
        "urn:sealgate:problem:token-missing"
    );

    let records = desk.fresh("http-request", before, 8);
    let of = |record: &Value| facts(record, WHO_AND_WHAT);
    let row = |denial: Value, resource: &str, reason: Value| {
        let (kind, role) = ("Department", "department-admin");
        [
            json!("dora"),
            json!(role),
            json!("rooms.history"),
            json!(kind),
            json!(resource),
            json!(resource),
            denial,
            reason,
        ]
    };
    assert_eq!(of(&records[0]), row(json!("reason-missing"), "sales", Value::Null));
    for record in &records[1..4] {
        assert_eq!(of(record), row(json!("reason-missing"), "sales", Value::Null));
    }
    for record in &records[4..6] {
        assert_eq!(of(record), row(Value::Null, "sales", json!(WHY)), "word for word");
        assert_eq!(
            facts(record, ["status", "route", "method"]),
            [json!(200), json!("rooms-history"), json!("GET")]
        );
    }
    assert_eq!(of(&records[6]), row(json!("not-permitted"), "legal", json!(WHY)));
    assert_eq!(
        facts(&records[7], ["subject", "resource", "denial"]),
        [Value::Null, json!("legal"), json!("token-missing")]
    );
    // It is the backend's to keep, too.
    let seen = desk.bundle.upstream.seen();
    let seen = seen.iter().rfind(|seen| seen.target.starts_with("/v1")).expect("a request");
    assert_eq!(seen.header("x-access-reason"), Some(WHY));

    // Watched without a reason: allowed and refused; what is not watched, only if it is refused.
    let before = desk.records("http-request").len();
    assert_eq!(desk.gateway.curl("/v1/departments/sales/members").token(&dora).send().status, 200);
    assert_eq!(desk.gateway.curl("/v1/admin/configuration").token(&root).send().status, 200);
    assert_eq!(desk.gateway.curl("/v1/users/alice/history").token(&user).send().status, 200);
    assert_eq!(desk.gateway.curl("/v1/users/alice/history").token(&root).send().status, 403);
    for (department, status) in [("sales", 200), ("legal", 403)] {
        let body = json!({ "department": department }).to_string();
        assert_eq!(desk.gateway.curl("/by-body").token(&dora).json(&body).send().status, status);
    }
    let records = desk.fresh("http-request", before, 5);
    let names = ["subject", "route", "action", "resource", "denial"];
    let expected = [
        [json!("dora"), json!("members"), json!("members.read"), json!("sales"), Value::Null],
        [
            json!("root"),
            json!("configuration"),
            json!("configuration.read"),
            json!("configuration"),
            Value::Null,
        ],
        // Row P-4. Nothing more is recorded of it than of any refusal.
        [json!("root"), json!("history"), Value::Null, Value::Null, json!("not-permitted")],
        [json!("dora"), json!("members-by-body"), json!("members.read"), json!("sales"), Value::Null],
        [
            json!("dora"),
            json!("members-by-body"),
            json!("members.read"),
            json!("legal"),
            json!("not-permitted"),
        ],
    ];
    for (record, expected) in records.iter().zip(expected) {
        assert_eq!(facts(record, names), expected);
    }

    // Whatever [audit] says.
    let policy = std::fs::read_to_string(desk.bundle.policy().join("policy.toml")).expect("the policy");
    desk.bundle.write_file("policy.toml", &policy.replace("requests = \"refused\"", "requests = \"none\""));
    let (loaded, said) = desk.gateway.reload();
    assert!(loaded, "{said}");
    let before = desk.records("http-request").len();
    assert_eq!(desk.gateway.curl("/v1/users/alice/history").token(&root).send().status, 403);
    assert_eq!(desk.gateway.curl("/v1/departments/sales/members").token(&dora).send().status, 200);
    assert_eq!(desk.fresh("http-request", before, 1)[0]["route"], "members");
}

#[test]
fn p3_messages_that_are_watched_say_why_and_are_recorded() {
    let mut desk = Desk::new("enterprise", OVERLAY);
    let dora = desk.token("dora", &["department-admin"]);
    let before = desk.records("http-request").len();
    let mut wire = desk.gateway.open("/ws/desk", &dora);
    let opened = &desk.fresh("http-request", before, 1)[0];
    assert_eq!(
        facts(opened, ["route", "status", "action", "resource"]),
        [json!("desk"), json!(101), json!("members.read"), json!("sales")]
    );
    let mut say = |message: Value| {
        let text = message.to_string();
        wire.send(frame(0x81, text.as_bytes()));
        let back = wire.message().expect("an answer");
        match back.payload == text.as_bytes() {
            true => "echo".to_owned(),
            false => {
                let answer: Value = serde_json::from_slice(&back.payload).expect("JSON");
                answer["reason"].as_str().expect("a reason").to_owned()
            }
        }
    };
    let asks = |department: &str, why: Value| json!({ "type": "rooms.history", "department": department, "why": why });
    let said = [
        say(asks("sales", json!(WHY))),
        say(asks("sales", Value::Null)),
        say(asks("sales", json!(7))),
        say(asks("sales", json!(" "))),
        say(asks("sales", json!("two\nlines"))),
        say(asks("sales", json!("x".repeat(513)))),
        say(json!({ "type": "rooms.history", "department": "sales" })),
        say(asks("legal", json!(WHY))),
        say(asks("legal", Value::Null)),
        // Not watched.
        say(json!({ "type": "rooms.read", "department": "sales" })),
        say(json!({ "type": "rooms.read", "department": "legal" })),
    ];
    let missing = "reason-missing";
    assert_eq!(
        said,
        [
            "echo",
            missing,
            missing,
            missing,
            missing,
            missing,
            missing,
            "not-permitted",
            "not-permitted",
            "echo",
            "not-permitted"
        ]
    );
    let records = desk.fresh("websocket-message", 0, 9);
    let names = ["subject", "route", "message", "action", "resource", "denial", "access_reason"];
    let row = |resource: &str, denial: Value, reason: Value| {
        let of = [json!("dora"), json!("desk"), json!("rooms.history"), json!("rooms.history")];
        let [subject, route, message, action] = of;
        [subject, route, message, action, json!(resource), denial, reason]
    };
    assert_eq!(facts(&records[0], names), row("sales", Value::Null, json!(WHY)));
    for record in &records[1..7] {
        assert_eq!(facts(record, names), row("sales", json!(missing), Value::Null));
    }
    assert_eq!(facts(&records[7], names), row("legal", json!("not-permitted"), json!(WHY)));
    assert_eq!(facts(&records[8], names), row("legal", json!("not-permitted"), Value::Null));
    let sent = desk.bundle.upstream.frames().iter().filter(|frame| frame.opcode == 1).count();
    assert_eq!(sent, 2, "a message that was refused reached the backend");
}

/// Row D-1: where patients or clients are concerned, what changes something says why, too.
#[test]
fn d1_regulated_changes_and_what_was_said_want_a_reason() {
    let desk = Desk::new("regulated", "");
    let [dora, root, carol] = [("dora", "department-admin"), ("root", "system-admin"), ("carol", "auditor")]
        .map(|(subject, role)| desk.token(subject, &[role]));
    let account = r#"{ "roles": ["user"], "department": "sales" }"#;
    for (token, method, path, body) in [
        (&dora, "GET", "/v1/departments/sales/rooms/r-1/history", ""),
        (&dora, "PUT", "/v1/departments/sales/members/bob", ""),
        (&dora, "DELETE", "/v1/departments/sales/rooms/r-1", ""),
        (&root, "PATCH", "/v1/admin/configuration", r#"{ "session.idle": 900 }"#),
        (&root, "PUT", "/v1/admin/accounts/bob", account),
        (&root, "DELETE", "/v1/admin/accounts/bob", ""),
        (&carol, "GET", "/v1/audit/records", ""),
        (&carol, "GET", "/v1/audit/operations", ""),
    ] {
        let asks = || {
            let curl = desk.gateway.curl(path).method(method).token(token);
            if body.is_empty() { curl } else { curl.json(body) }
        };
        assert_eq!(asks().send().problem(403), "urn:sealgate:problem:reason-missing", "{method} {path}");
        assert_eq!(asks().header("X-Access-Reason: ticket 1").send().status, 200, "{method} {path}");
    }
    // To look who is there wants none, and to end a session is urgent.
    assert_eq!(desk.gateway.curl("/v1/departments/sales/members").token(&dora).send().status, 200);
    assert_eq!(desk.gateway.curl("/v1/admin/sessions/s-1").method("DELETE").token(&root).send().status, 200);
}

/// A disk that is full costs the log, and that is told; it costs nobody an answer.
#[test]
fn l1_a_log_that_cannot_be_written_is_counted_and_costs_no_answer() {
    let bundle = Bundle::shipped("regulated");
    // Where the gateway's stderr goes; every write to it fails with ENOSPC.
    std::os::unix::fs::symlink("/dev/full", bundle.folder().join("sealgate.err")).expect("a link");
    let desk = Desk { gateway: Gateway::run(&bundle), bundle };
    let alice = desk.token("alice", &["user"]);
    for _ in 0..20 {
        assert_eq!(desk.gateway.curl("/v1/users/alice/history").token(&alice).send().status, 200);
        assert_eq!(desk.gateway.curl("/v1/users/bob/history").token(&alice).send().status, 403);
    }
    let lost = || desk.gateway.metrics().sum("sealgate_log_lines_lost_total", &[]);
    until("40 records are lost", DEADLINE, || (lost() >= 40.0).then_some(()));
}
