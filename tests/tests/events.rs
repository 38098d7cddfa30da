//! A source of revocations that the gateway follows: a real HTTP server that speaks the documented protocol (gateway/src/events/mod.rs), and
//! one that does not.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sealgate_tests::{Bundle, DEADLINE, Gateway, Signal, Wire, frame, now, until};
use serde_json::{Value, json};

/// How it behaves.
#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Well,
    /// Lines that are no JSON.
    Malformed,
    /// A line without end.
    Endless,
    /// Accepts, and says nothing.
    Hang,
    Status(u16),
    /// A snapshot that breaks off.
    CutOff,
}

struct State {
    log: String,
    last: u64,
    kept: BTreeMap<u64, Value>,
    live: Vec<Value>,
    mode: Mode,
    asked: Vec<String>,
}

/// The source. Its threads end with the test.
struct Source {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Source {
    fn start() -> Source {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let state = Arc::new(Mutex::new(State {
            log: "first".into(),
            last: 0,
            kept: BTreeMap::new(),
            live: Vec::new(),
            mode: Mode::Well,
            asked: Vec::new(),
        }));
        let shared = state.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = shared.clone();
                // Whoever hangs up ends it.
                std::thread::spawn(move || drop(answer(stream, &state)));
            }
        });
        Source { address, state }
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().expect("no test has panicked here"))
    }

    fn mode(&self, mode: Mode) {
        self.with(|state| state.mode = mode);
    }

    /// Revokes; `told`: as an event, which is otherwise lost.
    fn revoke(&self, revoke: Value, told: bool) {
        self.with(|state| {
            let until = now() + 3600;
            state.last += 1;
            let at = now() * 1000;
            if told {
                let event =
                    json!({ "type": "event", "number": state.last, "at": at, "until": until, "revoke": revoke });
                state.kept.insert(state.last, event);
            }
            state.live.push(json!({ "type": "entry", "until": until, "revoke": revoke }));
        });
    }

    fn session(&self, session: &str, told: bool) {
        self.revoke(json!({ "kind": "session", "issuer": "https://issuer.test", "id": session }), told);
    }

    fn asked(&self, what: &str) -> usize {
        self.with(|state| state.asked.iter().filter(|line| line.contains(what)).count())
    }
}

fn answer(mut stream: TcpStream, state: &Mutex<State>) -> std::io::Result<()> {
    let mut head = BufReader::new(stream.try_clone()?).lines();
    let request = head.next().unwrap_or(Ok(String::new()))?;
    let mut token = String::new();
    for line in head {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if let Some(value) = line.strip_prefix("authorization: ") {
            token = value.to_owned();
        }
    }
    let mode = {
        let mut state = state.lock().expect("a lock");
        state.asked.push(format!("{request} {token}"));
        state.mode
    };
    match mode {
        Mode::Hang => {
            std::thread::sleep(Duration::from_secs(60));
            return Ok(());
        }
        Mode::Status(status) => return write!(stream, "HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n"),
        _ => {}
    }
    write!(stream, "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nConnection: close\r\n\r\n")?;
    match mode {
        Mode::Malformed => return writeln!(stream, "<html>not found</html>"),
        Mode::Endless => loop {
            stream.write_all(&[b'a'; 4096])?;
        },
        _ => {}
    }
    let here = |state: &State| json!({ "type": "here", "log": state.log, "last": state.last });
    if request.contains("snapshot=1") {
        let lines = {
            let state = state.lock().expect("a lock");
            let end = json!({ "type": "end", "count": state.live.len() });
            let lines = [here(&state)].into_iter().chain(state.live.iter().cloned());
            lines.chain((mode != Mode::CutOff).then_some(end)).collect::<Vec<_>>()
        };
        return lines.iter().try_for_each(|line| writeln!(stream, "{line}"));
    }
    let parameter = |name: &str| -> u64 {
        let value = request.split(['?', '&', ' ']).find_map(|part| part.strip_prefix(&format!("{name}=")));
        value.and_then(|value| value.parse().ok()).expect("a number")
    };
    let (mut after, wait) = (parameter("after"), Duration::from_secs(parameter("wait")));
    let log = state.lock().expect("a lock").log.clone();
    let first = here(&state.lock().expect("a lock"));
    writeln!(stream, "{first}")?;
    let began = Instant::now();
    loop {
        let (news, place, same) = {
            let state = state.lock().expect("a lock");
            let news: Vec<_> =
                state.kept.range(after + 1..).map(|(number, line)| (*number, line.clone())).collect();
            (news, here(&state), state.log == log && state.mode == mode)
        };
        for (number, line) in &news {
            writeln!(stream, "{line}")?;
            after = *number;
        }
        // It says where it is as soon as anything has changed, and at the latest before it ends.
        if !news.is_empty() || place["last"].as_u64() > Some(after) || began.elapsed() > wait / 2 || !same {
            return writeln!(stream, "{place}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn rules(source: &Source, more: &str) -> String {
    format!(
        r#"
[[upstream]]
name = "accounts"
endpoints = ["tcp:{}"]

[[revocation_source]]
name = "accounts"
upstream = "accounts"
path = "/v1/revocations"
contact_timeout = "4s"
{more}

[[websocket]]
name = "chat"
path = "/ws/{{room}}"
upstream = "backend"
origins = ["*"]
inspect = "none"

[[route]]
name = "api"
path = "/api"
methods = ["GET"]
upstream = "backend"

[[route]]
name = "admin"
path = "/admin"
methods = ["GET"]
upstream = "backend"
roles = ["user"]

[[route]]
name = "open"
path = "/open"
methods = ["GET"]
upstream = "backend"
auth = "none"
"#,
        source.address
    )
}

fn token(bundle: &Bundle, session: &str) -> String {
    let issued = now() - 60;
    bundle.issuer.with(session, json!({ "sid": session, "jti": session, "iat": issued, "nbf": issued }))
}

fn open(gateway: &Gateway, token: &str) -> Wire {
    let mut wire = gateway.wire();
    let reply = wire.upgrade("/ws/a", &format!("Authorization: Bearer {token}\r\n"));
    assert_eq!(reply.status, 101, "{reply:?}");
    wire
}

#[track_caller]
fn assert_open(wire: &mut Wire) {
    wire.send(frame(0x81, b"still here"));
    assert_eq!(wire.message().expect("the echo").payload, b"still here");
}

#[track_caller]
fn assert_closed(wire: &mut Wire, code: u16) {
    assert_eq!(wire.message().expect("a close frame").close().0, code);
}

fn status(gateway: &Gateway, path: &str, token: &str) -> u16 {
    gateway.curl(path).token(token).send().status
}

#[track_caller]
fn until_status(gateway: &Gateway, path: &str, token: &str, expected: u16) {
    until("the status changes", DEADLINE, || (status(gateway, path, token) == expected).then_some(()));
}

fn metric(gateway: &Gateway, name: &str) -> f64 {
    gateway.metrics().sum(name, &[])
}

#[track_caller]
fn until_contact(gateway: &Gateway) {
    until("contact", DEADLINE, || {
        let lost = metric(gateway, "sealgate_revocation_source_contact_lost");
        let heard = metric(gateway, "sealgate_revocation_source_last_contact_timestamp_seconds");
        (lost == 0.0 && heard > 0.0).then_some(())
    });
}

#[test]
fn events_end_sessions_gaps_are_repaired_and_a_restart_goes_on_from_its_place() {
    let source = Source::start();
    source.session("before", true);
    let bundle = Bundle::new(&rules(&source, "token = \"env:SOURCE_TOKEN\"\n"));
    let run = || Gateway::run_with(&bundle, |command| drop(command.env("SOURCE_TOKEN", "s3cret")));
    let mut gateway = run();
    let tokens = ["before", "told", "lost", "anew", "away", "good"].map(|session| token(&bundle, session));
    let [before, told, lost, anew, away, good] = &tokens;
    // What was revoked before it came stands in the snapshot.
    until_status(&gateway, "/api", before, 401);
    assert!(source.asked("Bearer s3cret") > 0);

    let mut sockets = [told, lost, anew].map(|token| open(&gateway, token));
    let mut of_good = open(&gateway, good);
    source.session("told", true);
    assert_closed(&mut sockets[0], 4410);
    assert_eq!(status(&gateway, "/api", told), 401);
    assert_eq!(source.asked("snapshot=1"), 1);
    assert!(metric(&gateway, "sealgate_revocation_source_lag_seconds_count") >= 1.0);

    source.session("lost", false);
    assert_closed(&mut sockets[1], 4410);
    assert_eq!(gateway.metrics().sum("sealgate_revocation_source_snapshots_total", &[("cause", "gap")]), 1.0);

    // Set up anew: another log, that counts from 0.
    source.with(|state| {
        (state.log, state.last) = ("second".into(), 0);
        state.kept.clear();
    });
    source.session("anew", true);
    assert_closed(&mut sockets[2], 4410);
    assert!(
        gateway.metrics().sum("sealgate_revocation_source_snapshots_total", &[("cause", "rewritten")]) >= 1.0
    );

    // Whom it may not speak for, it does not end.
    source.revoke(json!({ "kind": "session", "issuer": "https://other.test", "id": "good" }), true);
    until("it is refused", DEADLINE, || {
        (metric(&gateway, "sealgate_revocation_source_refused_total") >= 1.0).then_some(())
    });
    assert_open(&mut of_good);

    // While it is away: the place is known, and events are all that is read.
    until("the place is on disk", DEADLINE, || {
        let log = std::fs::read_to_string(bundle.state().join("revocations.log")).expect("the log");
        log.contains(r#""place":{"log":"second","number":2}"#).then_some(())
    });
    gateway.signal(Signal::KILL);
    gateway.wait(DEADLINE);
    drop(gateway);
    let snapshots = source.asked("snapshot=1");
    source.session("away", true);
    let gateway = run();
    for token in [before, told, lost, anew] {
        assert_eq!(status(&gateway, "/api", token), 401);
    }
    until_status(&gateway, "/api", away, 401);
    assert_eq!(status(&gateway, "/api", good), 200);
    assert_eq!(source.asked("snapshot=1"), snapshots);
    assert!(source.asked("log=second&after=2") > 0);
}

#[test]
fn a_source_that_misbehaves_costs_nothing_but_itself_and_is_heard_again() {
    let source = Source::start();
    let bundle = Bundle::new(&rules(&source, ""));
    let gateway = Gateway::run(&bundle);
    until_contact(&gateway);
    let good = token(&bundle, "good");
    let mut socket = open(&gateway, &good);
    for (number, mode) in
        [Mode::Malformed, Mode::Endless, Mode::Status(503), Mode::Hang, Mode::CutOff].into_iter().enumerate()
    {
        let session = format!("s{number}");
        let (revoked, before) = (token(&bundle, &session), source.with(|state| state.asked.len()));
        source.mode(mode);
        until("it is asked so", DEADLINE, || {
            (source.with(|state| state.asked.len()) > before + 1).then_some(())
        });
        // Lost as an event: only the snapshot has it.
        source.session(&session, mode == Mode::Hang);
        assert_eq!(status(&gateway, "/api", &good), 200);
        if mode == Mode::CutOff {
            // What the part of a snapshot held counts; but the snapshot is asked for until it is whole.
            until_status(&gateway, "/api", &revoked, 401);
        }
        source.mode(Mode::Well);
        until_status(&gateway, "/api", &revoked, 401);
    }
    // Its log does not reach back.
    let snapshots = source.asked("snapshot=1");
    source.mode(Mode::Status(410));
    until("the snapshot is asked for", DEADLINE, || (source.asked("snapshot=1") > snapshots).then_some(()));
    source.mode(Mode::Well);
    until_contact(&gateway);
    assert_open(&mut socket);
    assert!(metric(&gateway, "sealgate_revocation_source_refused_total") >= 2.0);
}

#[test]
fn without_contact_the_policy_decides() {
    let source = Source::start();
    let bundle = Bundle::new(&rules(&source, "on_loss = \"no-new-privileged\"\n"));
    let gateway = Gateway::run(&bundle);
    let good = token(&bundle, "good");
    until_status(&gateway, "/admin", &good, 200);
    let mut socket = open(&gateway, &good);
    source.mode(Mode::Hang);
    until_status(&gateway, "/admin", &good, 503);
    assert_eq!(status(&gateway, "/api", &good), 200);
    assert_open(&mut socket);
    source.mode(Mode::Well);
    until_status(&gateway, "/admin", &good, 200);

    // Stricter from now on, from one moment to the next.
    bundle.write(&rules(&source, "on_loss = \"fail-closed\"\n"));
    assert!(gateway.reload().0);
    assert_eq!(status(&gateway, "/api", &good), 200);
    source.mode(Mode::Status(500));
    assert_closed(&mut socket, 1013);
    assert_eq!(status(&gateway, "/api", &good), 503);
    assert_eq!(gateway.curl("/open").send().status, 200);
    assert_eq!(gateway.admin("/readyz").status, 503);
    source.mode(Mode::Well);
    until_status(&gateway, "/api", &good, 200);

    // And none is followed any more.
    source.mode(Mode::Hang);
    bundle.write(&rules(&source, "").replace("[[revocation_source]]\nname = \"accounts\"\nupstream = \"accounts\"\npath = \"/v1/revocations\"\ncontact_timeout = \"4s\"\n", ""));
    assert!(gateway.reload().0);
    assert_eq!(status(&gateway, "/api", &good), 200);
    assert!(!gateway.admin("/metrics").body.contains("sealgate_revocation_source_contact_lost{"));
}

#[test]
fn a_gateway_that_has_heard_nothing_yet_counts_as_one_without_contact() {
    let source = Source::start();
    source.mode(Mode::Hang);
    let bundle = Bundle::new(&rules(&source, "on_loss = \"fail-closed\"\n"));
    let gateway = Gateway::run_beside(&bundle, "waiting", false, |_| {});
    let good = token(&bundle, "good");
    assert_eq!(status(&gateway, "/api", &good), 503);
    source.mode(Mode::Well);
    until_status(&gateway, "/api", &good, 200);
}
