//! Rates of messages: one allowance for a session or a subject, however many sockets it opens and wherever they land.

use std::thread;

use sealgate_tests::{Bundle, Client, Driver, Frame, Gateway, Open, Wire, frame};
use serde_json::{Value, json};

const QUOTA: usize = 100;
const SOCKETS: usize = 16;
const MESSAGES: usize = 20;

const RULES: &str = r#"
[[rate]]
name = "per-session"
per = ["session"]
quota = 100
period = "1d"

[[rate]]
name = "per-subject"
per = ["subject"]
quota = 100
period = "1d"

[[rate]]
name = "per-socket"
per = ["socket"]
quota = 15
period = "1d"

[[websocket]]
name = "by-socket"
path = "/ws/socket"
upstream = "backend"
origins = ["*"]
[[websocket.message]]
type = "say"
direction = "to-upstream"
rates = ["per-socket"]
on_refusal = "answer"

[[websocket]]
name = "by-session"
path = "/ws/session"
upstream = "backend"
origins = ["*"]
[[websocket.message]]
type = "say"
direction = "to-upstream"
rates = ["per-session"]
on_refusal = "answer"

[[websocket]]
name = "by-subject"
path = "/ws/subject"
upstream = "backend"
origins = ["*"]
[[websocket.message]]
type = "say"
direction = "to-upstream"
rates = ["per-subject"]
on_refusal = "answer"
[[websocket.message]]
type = "free"
direction = "to-upstream"
"#;

const SAY: &str = r#"{"type":"say"}"#;

fn json(frame: &Frame) -> Value {
    serde_json::from_slice(&frame.payload).unwrap_or_else(|error| panic!("{error}: {frame:?}"))
}

/// Sends from all sockets at once; how many messages came back, and how many were answered with a refusal.
fn race(gateway: &Gateway, path: &str, tokens: &[String]) -> (usize, usize) {
    // Sixteen connections over two cores.
    let sockets: Vec<Wire> = tokens.iter().map(|token| gateway.open(path, token)).collect();
    let racers: Vec<_> = sockets
        .into_iter()
        .map(|mut wire| {
            thread::spawn(move || {
                let (mut passed, mut refused) = (0, 0);
                for n in 0..MESSAGES {
                    wire.send(frame(0x81, json!({ "type": "say", "n": n }).to_string().as_bytes()));
                }
                for _ in 0..MESSAGES {
                    let message = json(&wire.message().expect("an echo or an answer"));
                    match message["type"].as_str() {
                        Some("say") => passed += 1,
                        Some("error") => {
                            assert_eq!(message["reason"], "rate-exceeded", "{message}");
                            assert!(message["retry_after"].as_u64() > Some(0), "{message}");
                            refused += 1;
                        }
                        _ => panic!("{message}"),
                    }
                }
                (passed, refused)
            })
        })
        .collect();
    let outcomes = racers.into_iter().map(|racer| racer.join().expect("a racer"));
    outcomes.fold((0, 0), |(passed, refused), (p, r)| (passed + p, refused + r))
}

#[test]
fn all_sockets_of_a_session_or_subject_share_its_allowance() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let said = || bundle.upstream.frames().iter().filter(|frame| frame.opcode == 1).count();
    let one_session = vec![bundle.issuer.token("alice"); SOCKETS];
    assert_eq!(race(&gateway, "/ws/session", &one_session), (QUOTA, SOCKETS * MESSAGES - QUOTA));
    assert_eq!(said(), QUOTA, "what was refused reached the upstream");

    // Many sessions of one subject: each has its own by session, all together one by subject.
    let sessions: Vec<String> = (0..SOCKETS)
        .map(|n| {
            bundle.issuer.with("bob", json!({ "sid": format!("session {n}"), "jti": format!("token {n}") }))
        })
        .collect();
    assert_eq!(race(&gateway, "/ws/session", &sessions), (SOCKETS * MESSAGES, 0));
    assert_eq!(race(&gateway, "/ws/subject", &sessions), (QUOTA, SOCKETS * MESSAGES - QUOTA));
    // Another subject has an allowance of its own.
    let other = vec![bundle.issuer.token("carol")];
    assert_eq!(race(&gateway, "/ws/subject", &other), (MESSAGES, 0));
    // By socket, each has its own, whoever opened it.
    assert_eq!(race(&gateway, "/ws/socket", &one_session), (15 * SOCKETS, (MESSAGES - 15) * SOCKETS));
}

#[test]
fn a_reload_gives_a_socket_no_new_allowance() {
    let bundle = Bundle::new(&RULES.replace("quota = 15", "quota = 2"));
    let gateway = Gateway::run(&bundle);
    let mut driver = Driver::start(Client::ALL[0], gateway.ca());
    driver.open("a", &gateway.ws("/ws/socket"), &Open::token(&bundle.issuer.token("alice")));
    driver.echo("a", SAY);
    bundle.write(&format!("{}\n# another text\n", RULES.replace("quota = 15", "quota = 2")));
    assert!(gateway.reload().0);
    driver.echo("a", SAY);
    driver.text("a", SAY);
    assert!(driver.next("a")["data"].as_str().is_some_and(|told| told.contains("rate-exceeded")));
}

#[test]
fn an_answered_refusal_leaves_the_socket_open_for_what_has_room() {
    let bundle = Bundle::new(&RULES.replace("quota = 100", "quota = 2"));
    let gateway = Gateway::run(&bundle);
    for client in Client::ALL {
        let mut driver = Driver::start(client, gateway.ca());
        let token = bundle.issuer.token(&format!("{client:?}"));
        // Over HTTP/2 both sockets share a connection, and an allowance all the same.
        for id in ["a", "b"] {
            driver.open(id, &gateway.ws("/ws/subject"), &Open::token(&token));
            driver.echo(id, r#"{"type":"say"}"#);
        }
        for id in ["a", "b"] {
            driver.text(id, r#"{"type":"say"}"#);
            let told = driver.next(id);
            let answer: Value =
                serde_json::from_str(told["data"].as_str().unwrap_or_default()).expect("JSON");
            assert_eq!((&answer["type"], &answer["reason"]), (&json!("error"), &json!("rate-exceeded")));
            driver.echo(id, r#"{"type":"free"}"#);
        }
    }
}

#[test]
fn requests_and_messages_take_what_they_cost_by_device_and_header() {
    let bundle = Bundle::new(
        r#"
[[rate]]
name = "per-device"
per = ["device"]
quota = 6
period = "1d"

[[rate]]
name = "per-key"
per = ["header"]
header = "x-api-key"
quota = 2
period = "1d"

[[route]]
name = "dear"
path = "/dear"
methods = ["GET"]
upstream = "backend"
rates = ["per-device"]
cost = 3

[[route]]
name = "keyed"
path = "/keyed"
methods = ["GET"]
upstream = "backend"
auth = "none"
rates = ["per-key"]

[[websocket]]
name = "chat"
path = "/ws"
upstream = "backend"
origins = ["*"]
[[websocket.message]]
type = "say"
direction = "to-upstream"
rates = ["per-device"]
cost = 2
on_refusal = "answer"
"#,
    );
    let gateway = Gateway::run(&bundle);
    let on = |device: &str| bundle.issuer.with("alice", json!({ "device_id": device, "jti": device }));
    let (phone, desk) = (on("phone"), on("desk"));
    let dear = |token: &str| gateway.curl("/dear").token(token).send();
    let reply = dear(&phone);
    assert_eq!((reply.status, reply.header("ratelimit")), (200, Some("\"per-device\";r=3;t=43200")));
    // The same allowance by socket: one message of two, and the next finds only one left.
    let mut wire = gateway.open("/ws", &phone);
    wire.send(frame(0x81, SAY.as_bytes()));
    assert_eq!(json(&wire.message().expect("an echo"))["type"], "say");
    wire.send(frame(0x81, SAY.as_bytes()));
    assert_eq!(json(&wire.message().expect("an answer"))["reason"], "rate-exceeded");
    let refused = dear(&phone);
    assert_eq!(
        (refused.status, refused.header("ratelimit-policy")),
        (429, Some("\"per-device\";q=6;w=86400"))
    );
    assert!(refused.header("retry-after").is_some());
    assert_eq!((dear(&desk).status, dear(&desk).status, dear(&desk).status), (200, 200, 429));

    let keyed = |key: &str| gateway.curl("/keyed").header(&format!("X-Api-Key: {key}")).send().status;
    assert_eq!([keyed("a"), keyed("a"), keyed("a"), keyed("b")], [200, 200, 429, 200]);
    let decisions = |rate: &str, outcome: &str| {
        gateway.metrics().sum("sealgate_rate_decisions_total", &[("rate", rate), ("outcome", outcome)])
    };
    assert_eq!((decisions("per-key", "allowed"), decisions("per-key", "refused")), (3.0, 1.0));
    assert_eq!((decisions("per-device", "allowed"), decisions("per-device", "refused")), (4.0, 3.0));
}
