//! Several gateways and one Redis: what one revokes ends on all, whatever happens to Redis meanwhile, and nothing waits for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};
use sealgate_tests::{Bundle, DEADLINE, Gateway, Holder, Redis, Reply, Signal, Wire, until};
use serde_json::json;

const RULES: &str = r#"
[connections]
max_per_address = 5000

[[websocket]]
name = "chat"
path = "/ws/{room}"
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

[shared]
"#;

/// Longer than a request may ever wait for Redis here, with room for a busy machine; far below what would be a stall.
const AT_ONCE: Duration = Duration::from_secs(2);

fn bundle(redis: &Redis, more: &str) -> Bundle {
    bundle_of(&[redis], more)
}

fn bundle_of(servers: &[&Redis], more: &str) -> Bundle {
    let urls: Vec<_> = servers.iter().map(|redis| redis.url()).collect();
    Bundle::new(&format!("{RULES}redis = {urls:?}\ncontact_timeout = \"2s\"\n{more}\n"))
}

fn run(bundle: &Bundle, name: &str) -> Gateway {
    Gateway::run_beside(bundle, name, true, |_| {})
}

fn three(bundle: &Bundle) -> [Gateway; 3] {
    ["a", "b", "c"].map(|name| run(bundle, name))
}

/// A token of a session, issued a minute ago.
fn token(bundle: &Bundle, session: &str) -> String {
    let issued = sealgate_tests::now() - 60;
    bundle.issuer.with("alice", json!({ "sid": session, "jti": session, "iat": issued, "nbf": issued }))
}

fn ask(gateway: &Gateway, path: &str, token: &str) -> Reply {
    let begin = Instant::now();
    let reply = gateway.curl(path).token(token).send();
    assert!(begin.elapsed() < AT_ONCE, "{path} took {:?}", begin.elapsed());
    reply
}

#[track_caller]
fn until_refused(gateway: &Gateway, token: &str) {
    until("the revocation arrives", DEADLINE, || (ask(gateway, "/api", token).status == 401).then_some(()));
}

#[track_caller]
fn revoke(gateway: &Gateway, session: &str) {
    let begin = Instant::now();
    let (fine, answer) = gateway.sessions(&["revoke", "--session", session]);
    assert!(fine && answer["entered"] == true, "{answer}");
    assert!(begin.elapsed() < AT_ONCE, "revoking took {:?}", begin.elapsed());
}

/// Requests and messages without a pause, one after the other, until it is told to end.
struct Traffic {
    end: Arc<AtomicBool>,
    talking: JoinHandle<Vec<Duration>>,
}

impl Traffic {
    fn start(gateway: &Gateway, token: &str) -> Traffic {
        let mut socket = gateway.open("/ws/a", token);
        let mut wire = gateway.wire();
        let host = gateway.authority();
        let request = format!("GET /api HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n\r\n");
        let end = Arc::new(AtomicBool::new(false));
        let ended = end.clone();
        let talking = std::thread::spawn(move || {
            let mut times = Vec::new();
            while !ended.load(Ordering::Relaxed) {
                let begin = Instant::now();
                wire.send(&request);
                assert_eq!(wire.response().expect("an answer").status, 200);
                socket.assert_echoes();
                times.push(begin.elapsed());
                std::thread::sleep(Duration::from_millis(5));
            }
            times
        });
        Traffic { end, talking }
    }

    /// Ends it. All was answered, and nothing waited.
    fn end(self) {
        self.end.store(true, Ordering::Relaxed);
        let mut times = self.talking.join().expect("every request and message was answered");
        times.sort();
        let (p99, slowest) = (times[times.len() * 99 / 100], times[times.len() - 1]);
        eprintln!("{} requests with a message each: p99 {p99:?}, slowest {slowest:?}", times.len());
        assert!(times.len() >= 20 && slowest < AT_ONCE);
    }
}

fn metric(gateway: &Gateway, name: &str) -> f64 {
    gateway.metrics().sum(name, &[])
}

fn until_connected(gateway: &Gateway, connected: bool) {
    until("the connection to Redis is noticed", DEADLINE, || {
        (metric(gateway, "sealgate_shared_connected") == f64::from(u8::from(connected))).then_some(())
    });
}

#[test]
fn a_revocation_on_one_gateway_ends_the_session_on_all_and_touches_no_other() {
    let redis = Redis::start();
    let bundle = bundle(&redis, "");
    let gateways = three(&bundle);
    let (alice, other) = (token(&bundle, "s1"), token(&bundle, "s2"));
    let mut revoked: Vec<_> = gateways.iter().map(|gateway| gateway.open("/ws/a", &alice)).collect();
    let mut others: Vec<_> = gateways.iter().map(|gateway| gateway.open("/ws/a", &other)).collect();

    let begin = Instant::now();
    revoke(&gateways[0], "s1");
    revoked.iter_mut().for_each(|wire| assert_eq!(wire.close_code(), 4410));
    eprintln!("closed on three gateways after {:?}", begin.elapsed());
    others.iter_mut().for_each(Wire::assert_echoes);
    for gateway in &gateways {
        assert_eq!(ask(gateway, "/api", &alice).status, 401);
        assert_eq!(ask(gateway, "/api", &other).status, 200);
        assert_eq!(metric(gateway, "sealgate_shared_connected"), 1.0);
        assert_eq!(metric(gateway, "sealgate_shared_refused_records_total"), 0.0);
    }
    assert_eq!(metric(&gateways[1], "sealgate_shared_lag_seconds_count"), 1.0);
    assert_eq!(metric(&gateways[0], "sealgate_shared_lag_seconds_count"), 0.0, "its own is no news");
    // One that comes later knows it before it is ready.
    let late = run(&bundle, "late");
    assert_eq!(ask(&late, "/api", &alice).status, 401);
    assert_eq!(ask(&late, "/api", &other).status, 200);
}

#[test]
fn a_redis_that_is_gone_stalls_nothing_and_an_empty_one_is_told_all() {
    let mut redis = Redis::start();
    let bundle = bundle(&redis, "");
    let [a, b, c] = three(&bundle);
    let [before, during, other] = ["s1", "s2", "s3"].map(|session| token(&bundle, session));
    revoke(&a, "s1");
    until_refused(&b, &before);
    until_refused(&c, &before);
    let mut sockets = [a.open("/ws/a", &during), b.open("/ws/a", &during), c.open("/ws/a", &during)];
    let mut untouched = b.open("/ws/a", &other);
    let traffic = Traffic::start(&c, &other);

    redis.end();
    until_connected(&b, false);
    revoke(&a, "s2");
    assert_eq!(sockets[0].close_code(), 4410);
    assert_eq!(ask(&a, "/api", &during).status, 401);
    // The others cannot know, and go on, as the policy says.
    assert_eq!(ask(&b, "/api", &during).status, 200);
    assert_eq!(ask(&b, "/api", &before).status, 401);
    sockets[1].assert_echoes();

    redis.run();
    for socket in &mut sockets[1..] {
        assert_eq!(socket.close_code(), 4410);
    }
    untouched.assert_echoes();
    for gateway in [&a, &b, &c] {
        until_refused(gateway, &during);
        assert_eq!(ask(gateway, "/api", &before).status, 401);
        assert_eq!(ask(gateway, "/api", &other).status, 200);
    }
    traffic.end();
    // What was revoked before Redis lost everything is there again.
    let late = run(&bundle, "late");
    assert_eq!(ask(&late, "/api", &before).status, 401);
    assert_eq!(ask(&late, "/api", &during).status, 401);
    assert_eq!(ask(&late, "/api", &other).status, 200);
}

#[test]
fn a_redis_that_stands_still_stalls_nothing_and_is_caught_up_with() {
    let redis = Redis::start();
    let bundle = bundle(&redis, "");
    let [a, b, _c] = three(&bundle);
    let [during, other] = ["s1", "s2"].map(|session| token(&bundle, session));
    let mut socket = b.open("/ws/a", &during);
    let traffic = [&a, &b].map(|gateway| Traffic::start(gateway, &other));
    redis.signal(Signal::STOP);
    revoke(&a, "s1");
    assert_eq!(ask(&a, "/api", &during).status, 401);
    until_connected(&b, false);
    until("contact counts as lost", DEADLINE, || {
        (metric(&b, "sealgate_shared_contact_lost") == 1.0).then_some(())
    });
    for path in ["/api", "/admin", "/open"] {
        assert_eq!(ask(&b, path, &other).status, 200, "on_loss is warn");
    }
    socket.assert_echoes();
    redis.signal(Signal::CONT);
    assert_eq!(socket.close_code(), 4410);
    until_refused(&b, &during);
    assert_eq!(ask(&b, "/api", &other).status, 200);
    until_connected(&b, true);
    until("contact is back", DEADLINE, || (metric(&b, "sealgate_shared_contact_lost") == 0.0).then_some(()));
    traffic.into_iter().for_each(Traffic::end);
}

#[test]
fn a_redis_that_comes_back_with_its_data_goes_on() {
    let mut redis = Redis::with(&["--save", "", "--appendonly", "yes", "--appendfsync", "always"], &[]);
    let bundle = bundle(&redis, "");
    let [a, b, c] = three(&bundle);
    let [one, two, three] = ["s1", "s2", "s3"].map(|session| token(&bundle, session));
    revoke(&a, "s1");
    until_refused(&b, &one);
    let traffic = [&a, &b, &c].map(|gateway| Traffic::start(gateway, &three));
    redis.end();
    redis.run();
    revoke(&c, "s2");
    for gateway in [&a, &b, &c] {
        until_refused(gateway, &two);
        assert_eq!(ask(gateway, "/api", &one).status, 401);
        assert_eq!(ask(gateway, "/api", &three).status, 200);
    }
    traffic.into_iter().for_each(Traffic::end);
    // Nobody wrote again what was there.
    assert_eq!(redis.ask(&["XLEN", "{sealgate}:revocations"]).trim(), "2");
    assert_eq!(redis.ask(&["ZCARD", "{sealgate}:revoked"]).trim(), "2");
}

#[test]
fn lost_and_rewritten_news_are_noticed_while_connected() {
    let redis = Redis::start();
    let bundle = bundle(&redis, "");
    let [a, b, c] = three(&bundle);
    let tokens: Vec<_> = (0..5).map(|number| token(&bundle, &format!("s{number}"))).collect();
    // While one stands still, news pass that it will never read.
    b.signal(Signal::STOP);
    for number in 0..4 {
        revoke(&a, &format!("s{number}"));
    }
    until_refused(&c, &tokens[3]);
    redis.ask(&["XDEL", "{sealgate}:revocations", "2-0", "3-0"]);
    b.signal(Signal::CONT);
    for token in &tokens[..4] {
        until_refused(&b, token);
    }
    let gaps = |gateway: &Gateway, cause| {
        gateway.metrics().sum("sealgate_shared_comparisons_total", &[("cause", cause)])
    };
    assert!(gaps(&b, "gap") >= 1.0);
    assert_eq!(gaps(&c, "gap"), 0.0);

    // All is erased under their feet: the log counts from 1 again, and the live set is written anew.
    redis.ask(&["FLUSHALL"]);
    for gateway in [&a, &b, &c] {
        until("the erasure is noticed", DEADLINE, || (gaps(gateway, "rewritten") >= 1.0).then_some(()));
    }
    revoke(&b, "s4");
    for gateway in [&a, &c] {
        until_refused(gateway, &tokens[4]);
    }
    let late = run(&bundle, "late");
    for token in &tokens {
        assert_eq!(ask(&late, "/api", token).status, 401);
    }
    // Somebody else's writing ends nobody's session, and is told.
    redis.ask(&["ZADD", "{sealgate}:revoked", "9999999999", "{\"kind\":\"everybody\"}"]);
    let later = run(&bundle, "later");
    assert_eq!(metric(&later, "sealgate_shared_refused_records_total"), 1.0);
    assert_eq!(ask(&later, "/api", &token(&bundle, "another")).status, 200);
}

#[test]
fn without_contact_the_policy_says_what_goes_on() {
    for (on_loss, api, admin) in [("fail-closed", 503, 503), ("no-new-privileged", 200, 503)] {
        let mut redis = Redis::start();
        let bundle = bundle(&redis, &format!("on_loss = \"{on_loss}\""));
        let gateway = run(&bundle, "a");
        let token = token(&bundle, "s1");
        let mut socket = gateway.open("/ws/a", &token);
        assert_eq!(
            (ask(&gateway, "/api", &token).status, ask(&gateway, "/admin", &token).status),
            (200, 200)
        );
        redis.end();
        until("contact is lost", DEADLINE, || (ask(&gateway, "/admin", &token).status == 503).then_some(()));
        assert_eq!(ask(&gateway, "/api", &token).status, api, "{on_loss}");
        let refused = ask(&gateway, "/admin", &token);
        assert_eq!(refused.status, admin, "{on_loss}");
        assert!(refused.problem(503).ends_with(":contact-lost"), "{refused:?}");
        assert!(refused.header("retry-after").is_some(), "{refused:?}");
        // What wants no token is nobody's session.
        assert_eq!(gateway.curl("/open").send().status, 200, "{on_loss}");
        if on_loss == "fail-closed" {
            assert_eq!(socket.close_code(), 1013);
            let mut refused = gateway.wire();
            assert_eq!(refused.upgrade("/ws/a", &format!("Authorization: Bearer {token}\r\n")).status, 503);
        } else {
            socket.assert_echoes();
        }
        assert_eq!(gateway.admin("/readyz").status, if on_loss == "fail-closed" { 503 } else { 200 });
        redis.run();
        until("contact is back", DEADLINE, || (ask(&gateway, "/admin", &token).status == 200).then_some(()));
        assert_eq!(gateway.admin("/readyz").status, 200);
        drop(gateway.open("/ws/a", &token));
    }
}

#[test]
fn a_gateway_that_never_heard_the_others_is_not_ready() {
    let mut redis = Redis::start();
    let bundle = bundle(&redis, "on_loss = \"fail-closed\"");
    let token = token(&bundle, "s1");
    redis.end();
    let gateway = Gateway::run_beside(&bundle, "a", false, |_| {});
    assert_eq!(gateway.admin("/readyz").status, 503);
    assert_eq!(ask(&gateway, "/api", &token).status, 503);
    redis.run();
    until("it is ready", DEADLINE, || (gateway.admin("/readyz").status == 200).then_some(()));
    assert_eq!(ask(&gateway, "/api", &token).status, 200);
}

#[test]
fn redis_is_trusted_by_its_certificate_and_trusts_by_password() {
    // Its key pair is the gateways' own: the names fit.
    let pki_of = Bundle::new("");
    let certs = pki_of.state().join("certs");
    let path = |name: &str| certs.join(name).to_str().expect("UTF-8").to_owned();
    let (ca, chain, key) = (path("ca.pem"), path("server.pem"), path("server.key"));
    let redis = Redis::with(
        &[
            "--save",
            "",
            "--port",
            "0",
            "--tls-port",
            "PORT",
            "--tls-cert-file",
            &chain,
            "--tls-key-file",
            &key,
            "--tls-ca-cert-file",
            &ca,
            "--tls-auth-clients",
            "no",
            "--requirepass",
            "s3cret-of-redis",
        ],
        &["--tls", "--cacert", &ca, "-a", "s3cret-of-redis"],
    );
    let cases = [
        ("right", ca.as_str(), "s3cret-of-redis", true),
        ("wrong-password", ca.as_str(), "wr0ng-secret", false),
        // Signed by an authority that this policy does not name.
        ("wrong-ca", "other", "s3cret-of-redis", false),
    ];
    for (name, trusted, password, fine) in cases {
        let bundle = Bundle::new(RULES);
        let trusted = if trusted == "other" {
            bundle.state().join("certs/ca.pem").to_str().expect("UTF-8").to_owned()
        } else {
            trusted.to_owned()
        };
        bundle.write(&format!(
            "{RULES}redis = [\"rediss://127.0.0.1:{}\"]\nca = \"file:{trusted}\"\npassword = \"env:REDIS_PASSWORD\"\n\
             contact_timeout = \"2s\"\n",
            redis.port()
        ));
        let mut gateway = Gateway::run_beside(&bundle, name, true, |command| {
            command.env("REDIS_PASSWORD", password);
        });
        assert_eq!(metric(&gateway, "sealgate_shared_connected") == 1.0, fine, "{name}");
        let said = gateway.process().stderr() + &gateway.process().stdout();
        assert!(fine || said.contains("no connection to other gateways"), "{name}: {said}");
        assert!(!said.contains(password), "{name}");
    }
}

/// A GET of `https://localhost/api` with a bound token and this proof: gateways behind a balancer have one name.
fn prove(gateway: &Gateway, token: &str, proof: &str) -> Reply {
    let mut wire = gateway.wire();
    let begin = Instant::now();
    wire.send(format!(
        "GET /api HTTP/1.1\r\nHost: localhost\r\nAuthorization: DPoP {token}\r\nDPoP: {proof}\r\nConnection: close\r\n\r\n"
    ));
    let reply = wire.response().expect("an answer");
    assert!(begin.elapsed() < AT_ONCE, "it took {:?}", begin.elapsed());
    reply
}

fn make(holder: &Holder, token: &str) -> String {
    holder.proof(&Holder::claims("https://localhost/api", "GET", token))
}

#[track_caller]
fn assert_replayed(reply: &Reply) {
    assert!(reply.problem(401).ends_with(":proof-invalid"), "{reply:?}");
}

#[test]
fn a_proof_counts_once_over_all_gateways_and_the_policy_says_what_counts_without_redis() {
    for (on_loss, without) in [("local", 200), ("deny", 503)] {
        let mut redis = Redis::start();
        let bundle = bundle(&redis, &format!("dpop_on_loss = \"{on_loss}\""));
        let gateways = three(&bundle);
        let holder = Holder::new();
        let token = holder.token(&bundle.issuer);
        let bearer = bundle.issuer.token("bob");
        let ask_all = |proof: &str| gateways.each_ref().map(|it| prove(it, &token, proof));

        let until_asked = |what| {
            until(what, DEADLINE, || {
                let [first, second, third] = ask_all(&make(&holder, &token));
                let fine = (first.status, second.status, third.status) == (200, 401, 401);
                if fine {
                    assert_replayed(&second);
                    assert_replayed(&third);
                }
                fine.then_some(())
            });
        };
        until_asked("all gateways ask Redis");
        // Of many at once, one.
        let proof = make(&holder, &token);
        let statuses: Vec<_> = std::thread::scope(|scope| {
            let ask = |at: usize| prove(&gateways[at % 3], &token, &proof).status;
            let asking: Vec<_> = (0..9).map(|at| scope.spawn(move || ask(at))).collect();
            asking.into_iter().map(|it| it.join().expect("an answer")).collect()
        });
        assert_eq!(statuses.iter().filter(|status| **status == 200).count(), 1, "{statuses:?}");
        assert_eq!(statuses.iter().filter(|status| **status == 401).count(), 8, "{statuses:?}");
        // Who is not bound asks nobody.
        assert_eq!(ask(&gateways[0], "/api", &bearer).status, 200);

        for away in ["paused", "killed"] {
            let before = make(&holder, &token);
            assert_eq!(prove(&gateways[0], &token, &before).status, 200);
            if away == "paused" {
                redis.signal(Signal::STOP)
            } else {
                redis.kill()
            }
            for gateway in &gateways {
                let proof = make(&holder, &token);
                let reply = prove(gateway, &token, &proof);
                assert_eq!(reply.status, without, "{on_loss}, {away}: {reply:?}");
                assert!(without == 200 || reply.problem(503).ends_with(":contact-lost"), "{reply:?}");
                // Each remembers its own all the same.
                assert_replayed(&prove(gateway, &token, &proof));
                assert_eq!(ask(gateway, "/api", &bearer).status, 200);
            }
            assert_replayed(&prove(&gateways[0], &token, &before));
            if away == "paused" {
                redis.signal(Signal::CONT)
            } else {
                redis.run()
            }
            until_asked("all gateways ask Redis again");
        }
    }
}

#[test]
fn gateways_follow_a_master_that_hands_over() {
    let first = Redis::with(&["--save", "", "--repl-diskless-sync-delay", "0"], &[]);
    let second = Redis::replica_of(&first);
    let sentinel = Redis::sentinel_of(&first);
    let bundle = bundle_of(&[&sentinel], "mode = \"sentinel\"\nservice = \"chat\"");
    let [a, b] = ["a", "b"].map(|name| run(&bundle, name));
    let tokens: Vec<_> = (0..3).map(|number| token(&bundle, &format!("s{number}"))).collect();
    let mut sockets: Vec<_> = tokens.iter().map(|token| b.open("/ws/a", token)).collect();
    revoke(&a, "s0");
    assert_eq!(sockets[0].close_code(), 4410);
    assert_eq!(sentinel.ask(&["SENTINEL", "FAILOVER", "chat"]).trim(), "OK");
    until("the replica is master", DEADLINE, || second.ask(&["ROLE"]).contains("master").then_some(()));
    // The old master lives on, and so do connections to it for a while.
    revoke(&a, "s1");
    assert_eq!(sockets[1].close_code(), 4410);
    sockets[2].assert_echoes();
    until("both stand in the new master", DEADLINE, || {
        (second.ask(&["ZCARD", "{sealgate}:revoked"]).trim() == "2").then_some(())
    });
}

#[test]
fn gateways_follow_the_master_that_sentinels_choose() {
    let mut first = Redis::with(&["--save", "", "--repl-diskless-sync-delay", "0"], &[]);
    let second = Redis::replica_of(&first);
    let sentinel = Redis::sentinel_of(&first);
    // One sentinel says nothing, and one is not there.
    let silent = Redis::start();
    silent.signal(Signal::STOP);
    let mut gone = Redis::start();
    gone.kill();
    let servers = [&gone, &silent, &sentinel];
    let bundle = bundle_of(&servers, "mode = \"sentinel\"\nservice = \"chat\"");
    let [a, b] = ["a", "b"].map(|name| run(&bundle, name));
    let tokens: Vec<_> = (0..4).map(|number| token(&bundle, &format!("s{number}"))).collect();
    let mut sockets: Vec<_> = tokens.iter().map(|token| b.open("/ws/a", token)).collect();
    let traffic = [&a, &b].map(|gateway| Traffic::start(gateway, &tokens[3]));
    revoke(&a, "s0");
    assert_eq!(sockets[0].close_code(), 4410);

    // A master that dies: what is revoked before there is another is not lost.
    first.kill();
    revoke(&a, "s1");
    assert_eq!(ask(&a, "/api", &tokens[1]).status, 401);
    assert_eq!(ask(&b, "/api", &tokens[0]).status, 401);
    assert_eq!(sockets[1].close_code(), 4410);
    assert!(second.ask(&["ROLE"]).contains("master"));
    // It comes back, empty, and changes nothing.
    first.run();
    revoke(&b, "s2");
    until_refused(&a, &tokens[2]);
    assert_eq!(sockets[2].close_code(), 4410);
    sockets[3].assert_echoes();
    traffic.into_iter().for_each(Traffic::end);
    let late = run(&bundle, "late");
    for token in &tokens[..3] {
        assert_eq!(ask(&late, "/api", token).status, 401);
    }
    assert_eq!(ask(&late, "/api", &tokens[3]).status, 200);
    until("the live set is whole", DEADLINE, || {
        (second.ask(&["ZCARD", "{sealgate}:revoked"]).trim() == "3").then_some(())
    });
}

#[test]
fn gateways_agree_through_a_redis_cluster_and_a_node_that_fails_loses_nothing() {
    let [mut owner, replica, other, third] = Redis::cluster("{sealgate}:revocations");
    let bundle = bundle_of(&[&owner, &other, &third], "mode = \"cluster\"");
    let [a, b] = ["a", "b"].map(|name| run(&bundle, name));
    let tokens: Vec<_> = (0..5).map(|number| token(&bundle, &format!("s{number}"))).collect();
    let mut sockets: Vec<_> = tokens.iter().map(|token| b.open("/ws/a", token)).collect();
    let traffic = [&a, &b].map(|gateway| Traffic::start(gateway, &tokens[4]));
    revoke(&a, "s0");
    assert_eq!(sockets[0].close_code(), 4410);
    let holder = Holder::new();
    let bound = holder.token(&bundle.issuer);
    // Their names lie on different nodes.
    let proofs_count_once = || {
        for _ in 0..12 {
            let proof = make(&holder, &bound);
            assert_eq!(prove(&a, &bound, &proof).status, 200);
            assert_replayed(&prove(&b, &bound, &proof));
        }
    };
    until("both ask Redis", DEADLINE, || {
        let proof = make(&holder, &bound);
        let both = [&a, &b].map(|gateway| prove(gateway, &bound, &proof).status);
        (both == [200, 401]).then_some(())
    });
    proofs_count_once();
    for node in [&owner, &other, &third] {
        assert_ne!(node.ask(&["DBSIZE"]).trim(), "0");
    }

    // A node that has nothing to do with revocations stands still: they go on.
    other.signal(Signal::STOP);
    revoke(&a, "s1");
    assert_eq!(sockets[1].close_code(), 4410);
    other.signal(Signal::CONT);

    until("the cluster is whole", DEADLINE, || {
        owner.ask(&["CLUSTER", "INFO"]).contains("cluster_state:ok").then_some(())
    });
    owner.kill();
    revoke(&a, "s2");
    assert_eq!(ask(&a, "/api", &tokens[2]).status, 401);
    assert_eq!(sockets[2].close_code(), 4410);
    assert!(replica.ask(&["ROLE"]).contains("master"));
    revoke(&b, "s3");
    until_refused(&a, &tokens[3]);
    assert_eq!(sockets[3].close_code(), 4410);
    sockets[4].assert_echoes();
    traffic.into_iter().for_each(Traffic::end);
    until("both ask the new node", DEADLINE, || {
        let asked = (0..12).all(|_| {
            let proof = make(&holder, &bound);
            [&a, &b].map(|gateway| prove(gateway, &bound, &proof).status) == [200, 401]
        });
        asked.then_some(())
    });
    assert_eq!(replica.ask(&["ZCARD", "{sealgate}:revoked"]).trim(), "4");
    let late = run(&bundle, "late");
    for token in &tokens[..4] {
        assert_eq!(ask(&late, "/api", token).status, 401);
    }
    assert_eq!(ask(&late, "/api", &tokens[4]).status, 200);
}

#[test]
fn logging_out_everywhere_cuts_three_thousand_sockets_on_three_gateways() {
    const SOCKETS: usize = 1000;
    let hard = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, rustix::process::Rlimit { current: hard, maximum: hard })
        .expect("open files");
    let redis = Redis::start();
    let bundle = bundle(&redis, "");
    let gateways = three(&bundle);
    let (alice, bob) = (token(&bundle, "s1"), bundle.issuer.token("bob"));
    let mut untouched = gateways.each_ref().map(|gateway| gateway.open("/ws/a", &bob));
    let mut sockets: Vec<Wire> = std::thread::scope(|scope| {
        let open_all =
            |gateway: &Gateway| (0..SOCKETS).map(|_| gateway.open("/ws/a", &alice)).collect::<Vec<_>>();
        let opening: Vec<_> = gateways.iter().map(|gateway| scope.spawn(move || open_all(gateway))).collect();
        opening.into_iter().flat_map(|it| it.join().expect("they open")).collect()
    });
    assert_eq!(sockets.len(), 3 * SOCKETS);

    let begin = Instant::now();
    let (fine, answer) = gateways[1].sessions(&["revoke", "--subject", "alice"]);
    assert!(fine && answer["sockets"] == SOCKETS, "its own: {answer}");
    sockets.iter_mut().for_each(|socket| assert_eq!(socket.close_code(), 4410));
    let took = begin.elapsed();
    eprintln!("{} sockets read their close within {took:?}", sockets.len());
    assert!(took < Duration::from_secs(5), "{took:?}");
    untouched.iter_mut().for_each(Wire::assert_echoes);
    for gateway in &gateways {
        assert_eq!(ask(gateway, "/api", &alice).status, 401);
        assert_eq!(ask(gateway, "/api", &bob).status, 200);
    }
}
