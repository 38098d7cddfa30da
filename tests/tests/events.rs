//! Sources of revocations that the gateway follows (`[[revocation_source]]`): a real server that speaks the documented protocol
//! (ARCHITECTURE.md, "A source of revocations"), and one that does not.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use sealgate_tests::{Bundle, DEADLINE, Gateway, Pki, Signal, Wire, now, sealgate, until};
use serde_json::{Value, json};

/// How it behaves.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Well,
    /// Lines that are no JSON.
    Malformed,
    /// A line without end.
    Endless,
    /// Blank lines without end, and nothing else.
    Blank,
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
    /// Whoever does not bring it gets 401.
    token: Option<String>,
    asked: Vec<String>,
}

/// The source. Its threads end with the test.
struct Source {
    endpoint: String,
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

impl Source {
    fn tcp() -> Source {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("tcp:{}", listener.local_addr().expect("its address"));
        Source::serve(endpoint, move || {
            listener.accept().map(|(stream, _)| -> Box<dyn Stream> { Box::new(stream) })
        })
    }

    fn unix(path: &Path) -> Source {
        let listener = UnixListener::bind(path).expect("a unix socket");
        let endpoint = format!("unix:{}", path.display());
        Source::serve(endpoint, move || {
            listener.accept().map(|(stream, _)| -> Box<dyn Stream> { Box::new(stream) })
        })
    }

    /// With the certificate `source.pem` of `pki`; takes clients whose certificates `pki` signed.
    fn mutual_tls(pki: &Pki) -> Source {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(pki.ca()).expect("an authority")).expect("a root");
        let clients = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
        let chain = CertificateDer::from_pem_file(pki.path("source.pem")).expect("a certificate");
        let key = PrivateKeyDer::from_pem_file(pki.path("source.key")).expect("a key");
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_client_cert_verifier(clients.build().expect("a verifier"))
            .with_single_cert(vec![chain], key)
            .expect("a server");
        let (listener, config) = (TcpListener::bind("127.0.0.1:0").expect("a port"), Arc::new(config));
        let endpoint = format!("tls:{}", listener.local_addr().expect("its address"));
        Source::serve(endpoint, move || {
            let (stream, _) = listener.accept()?;
            let connection = ServerConnection::new(config.clone()).expect("a session");
            Ok(Box::new(StreamOwned::new(connection, stream)) as Box<dyn Stream>)
        })
    }

    fn serve(
        endpoint: String,
        accept: impl Fn() -> std::io::Result<Box<dyn Stream>> + Send + 'static,
    ) -> Source {
        let state = State {
            log: "first".into(),
            last: 0,
            kept: BTreeMap::new(),
            live: Vec::new(),
            mode: Mode::Well,
            token: None,
            asked: Vec::new(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        let inner = shared.clone();
        std::thread::spawn(move || {
            while let Ok(stream) = accept() {
                let shared = inner.clone();
                // Whoever hangs up ends it.
                std::thread::spawn(move || drop(shared.answer(stream)));
            }
        });
        Source { endpoint, shared }
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let outcome = change(&mut self.shared.lock());
        self.shared.changed.notify_all();
        outcome
    }

    fn mode(&self, mode: Mode) {
        self.with(|state| state.mode = mode);
    }

    /// Revokes; `told`: as an event, which is otherwise lost.
    fn revoke(&self, revoke: Value, told: bool) {
        self.with(|state| {
            let until = now() + 3600;
            state.last += 1;
            if told {
                let event = json!({
                    "type": "event", "number": state.last, "at": now() * 1000, "until": until, "revoke": revoke,
                });
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

impl State {
    fn here(&self) -> Value {
        json!({ "type": "here", "log": self.log, "last": self.last })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no test has panicked here")
    }

    /// Waits for the state to be otherwise, for so long at most.
    fn wait_while(&self, patience: Duration, condition: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let waited = self.changed.wait_timeout_while(self.lock(), patience, |state| condition(state));
        waited.expect("no test has panicked here").0
    }

    fn answer(&self, mut stream: Box<dyn Stream>) -> std::io::Result<()> {
        let mut head = BufReader::new(&mut stream).lines();
        let request = head.next().unwrap_or(Ok(String::new()))?;
        let mut token = None;
        for line in head {
            let line = line?;
            if line.is_empty() {
                break;
            }
            token = token.or(line.strip_prefix("authorization: Bearer ").map(str::to_owned));
        }
        let (mode, refused) = {
            let mut state = self.lock();
            state.asked.push(request.clone());
            (state.mode, state.token.is_some() && state.token != token)
        };
        match mode {
            Mode::Hang => {
                drop(self.wait_while(Duration::from_secs(60), |state| state.mode == Mode::Hang));
                return Ok(());
            }
            _ if refused => return write!(stream, "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"),
            Mode::Status(status) => {
                return write!(stream, "HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n");
            }
            _ => {}
        }
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\nConnection: close\r\n\r\n")?;
        match mode {
            Mode::Malformed => return writeln!(stream, "<html>not found</html>"),
            Mode::Endless => loop {
                stream.write_all(&[b'a'; 4096])?;
            },
            Mode::Blank => loop {
                stream.write_all(b"\n")?;
                stream.flush()?;
                drop(self.wait_while(Duration::from_millis(50), |state| state.mode == Mode::Blank));
            },
            _ => {}
        }
        if request.contains("snapshot=1") {
            let lines = {
                let state = self.lock();
                let end = json!({ "type": "end", "count": state.live.len() });
                let lines = [state.here()].into_iter().chain(state.live.iter().cloned());
                lines.chain((mode != Mode::CutOff).then_some(end)).collect::<Vec<_>>()
            };
            let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
            stream.write_all(text.as_bytes())?;
            return stream.flush();
        }
        let parameter = |name: &str| -> u64 {
            let value =
                request.split(['?', '&', ' ']).find_map(|part| part.strip_prefix(&format!("{name}=")));
            value.and_then(|value| value.parse().ok()).expect("a number")
        };
        let (mut after, wait) = (parameter("after"), Duration::from_secs(parameter("wait")));
        let (log, first) = {
            let state = self.lock();
            (state.log.clone(), state.here())
        };
        writeln!(stream, "{first}")?;
        stream.flush()?;
        // One answer goes on for several waits, saying where it is at least once in each.
        let end = Instant::now() + wait * 3;
        loop {
            let (news, place, same) = {
                let same = |state: &State| state.log == log && state.mode == mode;
                let quiet = |state: &State| same(state) && state.last <= after;
                let state = self.wait_while(wait / 2, quiet);
                let news: Vec<_> =
                    state.kept.range(after + 1..).map(|(number, line)| (*number, line.clone())).collect();
                (news, state.here(), same(&state))
            };
            for (number, line) in &news {
                writeln!(stream, "{line}")?;
                after = *number;
            }
            after = after.max(place["last"].as_u64().unwrap_or_default());
            writeln!(stream, "{place}")?;
            stream.flush()?;
            if !same || Instant::now() >= end {
                return Ok(());
            }
        }
    }
}

/// Rules that everybody may use whom the policy lets, and the source as it is followed.
fn rules(followed: &str) -> String {
    format!(
        r#"
{followed}

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
"#
    )
}

/// A source by that name, with more said of it and of the upstream that it is reached by.
fn followed(name: &str, source: &Source, more: &str, tls: &str) -> String {
    format!(
        "[[upstream]]\nname = \"{name}\"\nendpoints = [\"{}\"]\n{tls}\n\n\
         [[revocation_source]]\nname = \"{name}\"\nupstream = \"{name}\"\npath = \"/v1/revocations\"\n\
         contact_timeout = \"4s\"\n{more}\n",
        source.endpoint
    )
}

fn token(bundle: &Bundle, session: &str) -> String {
    let issued = now() - 60;
    bundle.issuer.with(session, json!({ "sid": session, "jti": session, "iat": issued, "nbf": issued }))
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

fn snapshots(gateway: &Gateway, cause: &str) -> f64 {
    gateway.metrics().sum("sealgate_revocation_source_snapshots_total", &[("cause", cause)])
}

#[track_caller]
fn until_contact(gateway: &Gateway) {
    until("contact", DEADLINE, || {
        let lost = metric(gateway, "sealgate_revocation_source_contact_lost");
        let heard = metric(gateway, "sealgate_revocation_source_last_contact_timestamp_seconds");
        (lost == 0.0 && heard > 0.0).then_some(())
    });
}

#[track_caller]
fn until_lost(gateway: &Gateway) {
    until("contact is lost", DEADLINE, || {
        (metric(gateway, "sealgate_revocation_source_contact_lost") == 1.0).then_some(())
    });
}

#[test]
fn events_end_sessions_gaps_are_repaired_and_a_restart_goes_on_from_its_place() {
    let folder = tempfile::tempdir().expect("a folder");
    let source = Source::unix(&folder.path().join("accounts.sock"));
    source.session("before", true);
    let bundle = Bundle::new(&rules(&followed("accounts", &source, "", "")));
    let mut gateway = Gateway::run(&bundle);
    let tokens = ["before", "told", "lost", "anew", "away", "good"].map(|session| token(&bundle, session));
    let [before, told, lost, anew, away, good] = &tokens;
    // What was revoked before it came stands in the snapshot.
    until_status(&gateway, "/api", before, 401);
    assert_eq!(snapshots(&gateway, "first"), 1.0);

    let mut sockets = [told, lost, anew].map(|token| gateway.open("/ws/a", token));
    let mut of_good = gateway.open("/ws/a", good);
    source.session("told", true);
    assert_eq!(sockets[0].close_code(), 4410);
    assert_eq!(gateway.curl("/api").token(told).send().problem(401).rsplit(':').next(), Some("revoked"));
    assert_eq!(source.asked("snapshot=1"), 1);
    until("it is counted", DEADLINE, || {
        (metric(&gateway, "sealgate_revocation_source_lag_seconds_count") >= 1.0).then_some(())
    });
    assert!(metric(&gateway, "sealgate_revocation_source_events_total") >= 1.0);
    assert_eq!(metric(&gateway, "sealgate_revocation_source_connected"), 1.0);

    source.session("lost", false);
    assert_eq!(sockets[1].close_code(), 4410);
    until("it is counted", DEADLINE, || (snapshots(&gateway, "gap") == 1.0).then_some(()));

    // Set up anew: another log, that counts from 0.
    source.with(|state| {
        (state.log, state.last) = ("second".into(), 0);
        state.kept.clear();
    });
    source.session("anew", true);
    assert_eq!(sockets[2].close_code(), 4410);
    until("it is counted", DEADLINE, || (snapshots(&gateway, "rewritten") >= 1.0).then_some(()));

    // Whom it may not speak for, it does not end.
    source.revoke(json!({ "kind": "session", "issuer": "https://other.test", "id": "good" }), true);
    until("it is refused", DEADLINE, || {
        (metric(&gateway, "sealgate_revocation_source_refused_total") >= 1.0).then_some(())
    });
    of_good.assert_echoes();

    // While it is away: the place is known, and events are all that is read.
    until("the place is on disk", DEADLINE, || {
        let log = std::fs::read_to_string(bundle.state().join("revocations.log")).expect("the log");
        log.contains(r#""place":{"log":"second","number":2}"#).then_some(())
    });
    gateway.signal(Signal::KILL);
    gateway.wait(DEADLINE);
    drop(gateway);
    let copies = source.asked("snapshot=1");
    source.session("away", true);
    let gateway = Gateway::run(&bundle);
    for token in [before, told, lost, anew] {
        assert_eq!(status(&gateway, "/api", token), 401);
    }
    until_status(&gateway, "/api", away, 401);
    assert_eq!(status(&gateway, "/api", good), 200);
    assert_eq!(source.asked("snapshot=1"), copies);
    assert!(source.asked("log=second&after=2") > 0);
}

#[test]
fn each_kind_of_event_ends_what_it_names_and_nothing_else() {
    let source = Source::tcp();
    let bundle = Bundle::new(&rules(&followed("accounts", &source, "", "")));
    let gateway = Gateway::run(&bundle);
    until_contact(&gateway);
    let names = ["session", "subject", "token", "fresh", "other"];
    let tokens = names.map(|name| token(&bundle, name));
    let mut sockets = tokens.each_ref().map(|token| gateway.open("/ws/a", token));
    for (index, kind) in ["session", "subject", "token"].iter().enumerate() {
        source.revoke(json!({ "kind": kind, "issuer": "https://issuer.test", "id": kind }), true);
        assert_eq!(sockets[index].close_code(), 4410);
        assert_eq!(status(&gateway, "/api", &tokens[index]), 401);
        assert_eq!(status(&gateway, "/api", &tokens[4]), 200);
    }
    // Issued before: a login afterwards counts.
    source.revoke(
        json!({ "kind": "subject", "issuer": "https://issuer.test", "id": "fresh", "before": now() - 30 }),
        true,
    );
    assert_eq!(sockets[3].close_code(), 4410);
    assert_eq!(status(&gateway, "/api", &bundle.issuer.token("fresh")), 200);
    source.revoke(json!({ "kind": "key", "issuer": "https://issuer.test", "id": "another-key" }), true);
    source.revoke(json!({ "kind": "issuer", "issuer": "https://issuer.test", "before": now() - 3600 }), true);
    until("they were heard", DEADLINE, || {
        (metric(&gateway, "sealgate_revocation_source_events_total") == 6.0).then_some(())
    });
    sockets[4].assert_echoes();
    source.revoke(json!({ "kind": "issuer", "issuer": "https://issuer.test", "before": now() - 30 }), true);
    assert_eq!(sockets[4].close_code(), 4410);
    let mut socket = gateway.open("/ws/a", &bundle.issuer.token("later"));
    source.revoke(json!({ "kind": "key", "issuer": "https://issuer.test", "id": bundle.issuer.kid() }), true);
    assert_eq!(socket.close_code(), 4410);
    assert_eq!(status(&gateway, "/api", &bundle.issuer.token("later")), 401);
    assert_eq!(source.asked("snapshot=1"), 1);
}

#[test]
fn a_source_that_misbehaves_costs_nothing_but_itself_and_is_heard_again() {
    let source = Source::tcp();
    let bundle = Bundle::new(&rules(&followed("accounts", &source, "", "")));
    let mut gateway = Gateway::run(&bundle);
    until_contact(&gateway);
    let good = token(&bundle, "good");
    let mut socket = gateway.open("/ws/a", &good);
    let memory = gateway.process().watch_memory();
    let modes = [Mode::Malformed, Mode::Endless, Mode::Blank, Mode::Status(503), Mode::Hang, Mode::CutOff];
    for (number, mode) in modes.into_iter().enumerate() {
        let session = format!("s{number}");
        let (revoked, before) = (token(&bundle, &session), source.with(|state| state.asked.len()));
        source.mode(mode);
        until("it is asked so", DEADLINE, || {
            (source.with(|state| state.asked.len()) > before + 1).then_some(())
        });
        // Lost as an event: only the snapshot has it.
        source.session(&session, mode == Mode::Hang);
        assert_eq!(status(&gateway, "/api", &good), 200, "{mode:?}");
        if mode == Mode::CutOff {
            // What the part of a snapshot held counts; but the snapshot is asked for until it is whole.
            until_status(&gateway, "/api", &revoked, 401);
        }
        source.mode(Mode::Well);
        until_status(&gateway, "/api", &revoked, 401);
    }
    assert!(memory.grown() < 32 << 20, "{} bytes", memory.grown());
    // Its log does not reach back.
    let copies = source.asked("snapshot=1");
    source.mode(Mode::Status(410));
    until("the snapshot is asked for", DEADLINE, || (source.asked("snapshot=1") > copies).then_some(()));
    source.mode(Mode::Well);
    until_contact(&gateway);
    socket.assert_echoes();
    assert!(metric(&gateway, "sealgate_revocation_source_refused_total") >= 2.0);
    // One whose log is another one each time it is asked is not copied without end.
    let (copies, began) = (source.asked("snapshot=1"), Instant::now());
    for round in 0..20 {
        let asked = source.with(|state| state.asked.len());
        source.with(|state| state.log = format!("other-{round}"));
        until("it is asked", DEADLINE, || (source.with(|state| state.asked.len()) > asked).then_some(()));
    }
    let copies = (source.asked("snapshot=1") - copies) as f64;
    assert!(copies <= 2.0 + began.elapsed().as_secs_f64() / 0.5, "{copies} in {:?}", began.elapsed());
}

#[test]
fn a_large_snapshot_is_read_whole() {
    let source = Source::tcp();
    for number in 0..20_000 {
        source.session(&format!("s{number}"), false);
    }
    let bundle = Bundle::new(&rules(&followed("accounts", &source, "", "")));
    let gateway = Gateway::run(&bundle);
    until_contact(&gateway);
    for number in [0, 9_999, 19_999] {
        assert_eq!(status(&gateway, "/api", &token(&bundle, &format!("s{number}"))), 401);
    }
    assert_eq!(status(&gateway, "/api", &token(&bundle, "s20000")), 200);
    assert_eq!(source.asked("snapshot=1"), 1);
}

#[test]
fn without_contact_a_policy_that_warns_goes_on() {
    let source = Source::tcp();
    let bundle = Bundle::new(&rules(&followed("accounts", &source, "on_loss = \"warn\"", "")));
    let mut gateway = Gateway::run(&bundle);
    until_contact(&gateway);
    let (good, leaver) = (token(&bundle, "good"), token(&bundle, "leaver"));
    let mut sockets = [&good, &leaver].map(|token| gateway.open("/ws/a", token));
    source.mode(Mode::Hang);
    until_lost(&gateway);
    source.session("leaver", true);
    for path in ["/api", "/admin", "/open"] {
        assert_eq!(status(&gateway, path, &leaver), 200, "{path}");
    }
    gateway.open("/ws/a", &good).assert_echoes();
    sockets.iter_mut().for_each(Wire::assert_echoes);
    assert_eq!(gateway.admin("/readyz").status, 200);
    assert!(gateway.process().stderr().contains("contact with a source of revocations is lost"));
    // It is back, and what it revoked meanwhile ends.
    source.mode(Mode::Well);
    assert_eq!(sockets[1].close_code(), 4410);
    assert_eq!(status(&gateway, "/api", &leaver), 401);
    until_contact(&gateway);
    sockets[0].assert_echoes();
}

#[test]
fn without_contact_a_policy_may_refuse_privileged_work_or_fail_closed() {
    let source = Source::tcp();
    let bundle = Bundle::new(&rules(&followed("accounts", &source, "on_loss = \"no-new-privileged\"", "")));
    let gateway = Gateway::run(&bundle);
    let good = token(&bundle, "good");
    until_status(&gateway, "/admin", &good, 200);
    let mut socket = gateway.open("/ws/a", &good);
    source.mode(Mode::Hang);
    until_status(&gateway, "/admin", &good, 503);
    let problem = gateway.curl("/admin").token(&good).send().problem(503);
    assert_eq!(problem.rsplit(':').next(), Some("contact-lost"));
    assert_eq!(status(&gateway, "/api", &good), 200);
    socket.assert_echoes();
    gateway.open("/ws/a", &good).assert_echoes();
    assert_eq!(gateway.admin("/readyz").status, 200);
    source.mode(Mode::Well);
    until_status(&gateway, "/admin", &good, 200);

    // Stricter from now on, from one moment to the next.
    bundle.write(&rules(&followed("accounts", &source, "on_loss = \"fail-closed\"", "")));
    assert!(gateway.reload().0);
    assert_eq!(status(&gateway, "/api", &good), 200);
    source.mode(Mode::Status(500));
    assert_eq!(socket.close_code(), 1013);
    let problem = gateway.curl("/api").token(&good).send().problem(503);
    assert_eq!(problem.rsplit(':').next(), Some("contact-lost"));
    let refused = gateway.wire().upgrade("/ws/a", &format!("Authorization: Bearer {good}\r\n"));
    assert_eq!(refused.status, 503);
    assert_eq!(gateway.curl("/open").send().status, 200);
    assert_eq!(gateway.admin("/readyz").status, 503);
    source.mode(Mode::Well);
    until_status(&gateway, "/api", &good, 200);
    assert_eq!(gateway.admin("/readyz").status, 200);
    gateway.open("/ws/a", &good).assert_echoes();

    // What is lost already counts by the policy in force: a stricter one ends what is open.
    bundle.write(&rules(&followed("accounts", &source, "on_loss = \"warn\"", "")));
    assert!(gateway.reload().0);
    let mut socket = gateway.open("/ws/a", &good);
    source.mode(Mode::Hang);
    until_lost(&gateway);
    socket.assert_echoes();
    bundle.write(&rules(&followed("accounts", &source, "on_loss = \"fail-closed\"", "")));
    assert!(gateway.reload().0);
    assert_eq!(socket.close_code(), 1013);
    // And when none is followed any more, nothing is lost.
    bundle.write(&rules(""));
    assert!(gateway.reload().0);
    until_status(&gateway, "/api", &good, 200);
    assert!(!gateway.admin("/metrics").body.contains("sealgate_revocation_source_contact_lost{"));
}

#[test]
fn a_gateway_that_has_heard_nothing_yet_counts_as_one_without_contact() {
    let source = Source::tcp();
    source.mode(Mode::Hang);
    let bundle = Bundle::new(&rules(&followed("accounts", &source, "on_loss = \"fail-closed\"", "")));
    let gateway = Gateway::run_beside(&bundle, "waiting", false, |_| {});
    let good = token(&bundle, "good");
    assert_eq!(status(&gateway, "/api", &good), 503);
    assert_eq!(gateway.admin("/readyz").status, 503);
    source.mode(Mode::Well);
    until_status(&gateway, "/api", &good, 200);
    assert_eq!(gateway.admin("/readyz").status, 200);
}

#[test]
fn a_reload_adds_changes_and_removes_sources_and_forgives_nobody() {
    let (first, second) = (Source::tcp(), Source::tcp());
    first.session("by-first", true);
    second.session("by-second", true);
    let other = json!({ "kind": "session", "issuer": "https://other.test", "id": "good" });
    let bundle = Bundle::new(&rules(""));
    let gateway = Gateway::run(&bundle);
    let [by_first, by_second, later, good] =
        ["by-first", "by-second", "later", "good"].map(|session| token(&bundle, session));
    assert_eq!(status(&gateway, "/api", &by_first), 200);
    let mut socket = gateway.open("/ws/a", &by_first);

    // Added.
    let one = followed("first", &first, "", "");
    bundle.write(&rules(&one));
    assert!(gateway.reload().0);
    assert_eq!(socket.close_code(), 4410);
    let both = format!("{one}{}", followed("second", &second, "", ""));
    bundle.write(&rules(&both));
    assert!(gateway.reload().0);
    until_status(&gateway, "/api", &by_second, 401);
    assert_eq!(status(&gateway, "/api", &by_first), 401);
    // The one that did not change goes on from its place.
    assert_eq!(first.asked("snapshot=1"), 1);

    // Trusted with another issuer: what it was not believed before is read now.
    first.revoke(other, true);
    until("it is refused", DEADLINE, || {
        (metric(&gateway, "sealgate_revocation_source_refused_total") >= 1.0).then_some(())
    });
    let issuer = "[[issuer]]\nname = \"other\"\nissuer = \"https://other.test\"\naudience = [\"sealgate\"]\n\
                  algorithms = [\"ES256\"]\njwks = \"file:${state}/jwks.json\"\n";
    let of_other = bundle.issuer.with("good", json!({ "iss": "https://other.test", "sid": "good" }));
    bundle.write(&rules(&format!("{issuer}{both}")));
    assert!(gateway.reload().0);
    until_status(&gateway, "/api", &of_other, 401);
    assert_eq!(status(&gateway, "/api", &good), 200);
    assert_eq!(first.asked("snapshot=1"), 2);

    // Moved: the same name leads elsewhere.
    second.session("later", true);
    bundle.write(&rules(&followed("first", &second, "", "")));
    assert!(gateway.reload().0);
    until_status(&gateway, "/api", &later, 401);

    // Removed: nothing that was revoked comes back, now or after a restart.
    bundle.write(&rules(""));
    assert!(gateway.reload().0);
    let gone = |gateway: &Gateway| {
        for token in [&by_first, &by_second, &later] {
            assert_eq!(status(gateway, "/api", token), 401);
        }
        assert_eq!(status(gateway, "/api", &good), 200);
    };
    gone(&gateway);
    let asked = second.with(|state| state.asked.len());
    let mut gateway = gateway;
    gateway.signal(Signal::TERM);
    gateway.wait(DEADLINE);
    drop(gateway);
    gone(&Gateway::run(&bundle));
    assert_eq!(second.with(|state| state.asked.len()), asked, "nobody asks any more");
}

#[test]
fn both_sides_prove_who_they_are_and_secrets_are_not_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let pki = Pki::new(&folder.path().join("pki"));
    pki.issue("source", &["accounts.internal"]);
    pki.issue("gateway", &["gateway.internal"]);
    let stranger = Pki::new(&folder.path().join("stranger"));
    stranger.issue("gateway", &["gateway.internal"]);
    let source = Source::mutual_tls(&pki);
    source.with(|state| state.token = Some("s3cret-token".to_owned()));
    let secret = folder.path().join("token");
    std::fs::write(&secret, "s3cret-token\n").expect("a token");
    let tls = |ca: &Pki, client: &Pki, name: &str| {
        format!(
            "tls = {{ ca = \"file:{}\", server_name = \"{name}\", client_certificate = \"file:{}\", \
             client_key = \"file:{}\" }}",
            ca.ca().display(),
            client.path("gateway.pem").display(),
            client.path("gateway.key").display()
        )
    };
    let with = |tls: &str| {
        let more = format!("on_loss = \"fail-closed\"\ntoken = \"file:{}\"", secret.display());
        rules(&followed("accounts", &source, &more, tls))
    };
    let right = with(&tls(&pki, &pki, "accounts.internal"));
    let bundle = Bundle::new(&right);
    let mut gateway = Gateway::run(&bundle);
    let good = token(&bundle, "good");
    assert_eq!(status(&gateway, "/api", &good), 200);
    let mut socket = gateway.open("/ws/a", &token(&bundle, "leaver"));
    source.session("leaver", true);
    assert_eq!(socket.close_code(), 4410);
    for (what, wrong) in [
        ("another client's certificate", with(&tls(&pki, &stranger, "accounts.internal"))),
        ("an authority that did not sign the source", with(&tls(&stranger, &pki, "accounts.internal"))),
        ("a name that the source does not have", with(&tls(&pki, &pki, "other.internal"))),
        ("no token", right.replace(&format!("token = \"file:{}\"", secret.display()), "")),
    ] {
        let mut socket = gateway.open("/ws/a", &good);
        bundle.write(&wrong);
        assert!(gateway.reload().0, "{what}");
        assert_eq!(socket.close_code(), 1013);
        assert_eq!(status(&gateway, "/api", &good), 503, "{what}");
        bundle.write(&right);
        assert!(gateway.reload().0, "{what}");
        until_status(&gateway, "/api", &good, 200);
    }
    // The token is replaced: the file is watched.
    source.with(|state| state.token = Some("n3xt-token".to_owned()));
    let generation = metric(&gateway, "sealgate_policy_generation");
    let fresh = folder.path().join("fresh");
    std::fs::write(&fresh, "n3xt-token").expect("a token");
    std::fs::rename(&fresh, &secret).expect("a rename");
    until("the change is seen", DEADLINE, || {
        (metric(&gateway, "sealgate_policy_generation") > generation).then_some(())
    });
    let mut socket = gateway.open("/ws/a", &token(&bundle, "second"));
    source.session("second", true);
    assert_eq!(socket.close_code(), 4410);
    // One that is none, and none at all, change nothing, and are not repeated.
    for text in ["s3cret token", ""] {
        std::fs::write(&secret, text).expect("a token");
        let (reloaded, said) = gateway.reload();
        assert!(
            !reloaded && said.contains("revocation_source.accounts.token: expected one bearer"),
            "{said}"
        );
        assert!(!said.contains("s3cret"), "{said}");
    }
    std::fs::write(&secret, "n3xt-token").expect("a token");
    let shown = sealgate(&[&"check", &"--policy", &gateway.policy(), &"--state", &bundle.state()]);
    for text in [
        gateway.process().stderr(),
        gateway.process().stdout(),
        gateway.admin("/metrics").body,
        format!("{shown:?}"),
    ] {
        assert!(!text.contains("s3cret-token") && !text.contains("n3xt-token"), "{text}");
    }
}
