//! Every open socket can be reached: revoked, renewed, replaced, ended and drained, and no other is touched.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sealgate_tests::{Bundle, Client, DEADLINE, Driver, Gateway, Open, Signal, until};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::{self, Message, client::IntoClientRequest};

const RULES: &str = r#"
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
"#;

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs()
}

/// A token that was issued a minute ago.
fn token(bundle: &Bundle, subject: &str, session: &str, id: &str) -> String {
    let issued = now() - 60;
    bundle.issuer.with(subject, json!({ "sid": session, "jti": id, "iat": issued, "nbf": issued }))
}

/// Revokes, and says how many sockets were closed.
#[track_caller]
fn revoke(gateway: &Gateway, arguments: &[&str]) -> u64 {
    let (fine, answer) = gateway.sessions(&[&["revoke"], arguments].concat());
    assert!(fine && answer["entered"] == true && answer["complete"] == true, "{answer}");
    answer["sockets"].as_u64().expect("a count")
}

#[test]
fn a_revocation_closes_the_sockets_that_are_meant_and_no_others() {
    for client in Client::ALL {
        let bundle = Bundle::new(RULES);
        let gateway = Gateway::run(&bundle);
        let url = gateway.ws("/ws/a");
        let mut driver = Driver::start(client, gateway.ca());
        let tokens = [
            ("a1", token(&bundle, "alice", "s1", "t1")),
            ("a1 too", token(&bundle, "alice", "s1", "t2")),
            ("a2", token(&bundle, "alice", "s2", "t3")),
            ("b", token(&bundle, "bob", "s3", "t4")),
            ("b too", token(&bundle, "bob", "s3", "t5")),
        ];
        for (id, token) in &tokens {
            driver.open(id, &url, &Open::token(token));
        }
        let still_open = |driver: &mut Driver, ids: &[&str]| {
            for id in ids {
                driver.echo(id, "still here");
            }
        };

        assert_eq!(revoke(&gateway, &["--token-id", "t1"]), 1, "{client:?}");
        let reason = driver.expect_close("a1", 4410);
        assert!(reason.starts_with("revoked: "), "{client:?}: {reason}");
        still_open(&mut driver, &["a1 too", "a2", "b", "b too"]);
        // The token counts for nothing else either; the session's other one does.
        driver.refused("again", &url, &Open::token(&tokens[0].1), 401);
        gateway.curl("/api").token(&tokens[0].1).send().problem(401);
        assert_eq!(gateway.curl("/api").token(&tokens[1].1).send().status, 200, "{client:?}");

        assert_eq!(revoke(&gateway, &["--session", "s1", "--issuer", "tests"]), 1, "{client:?}");
        driver.expect_close("a1 too", 4410);
        still_open(&mut driver, &["a2", "b", "b too"]);
        let later = bundle.issuer.with("alice", json!({ "sid": "s1" }));
        driver.refused("later", &url, &Open::token(&later), 401);

        let subject = ["--subject", "alice", "--issuer", "https://issuer.test", "--ttl", "1h"];
        assert_eq!(revoke(&gateway, &subject), 1, "{client:?}");
        driver.expect_close("a2", 4410);
        still_open(&mut driver, &["b", "b too"]);
        assert_eq!(revoke(&gateway, &["--subject", "nobody"]), 0, "{client:?}");

        assert_eq!(revoke(&gateway, &["--all-of-issuer"]), 2, "{client:?}");
        driver.expect_close("b", 4410);
        driver.expect_close("b too", 4410);
    }
}

#[test]
fn a_subject_that_was_revoked_may_log_in_anew() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let old = token(&bundle, "alice", "s1", "t1");
    assert_eq!(revoke(&gateway, &["--subject", "alice"]), 0);
    gateway.curl("/api").token(&old).send().problem(401);
    // Issued after the second in which the revocation came; the gateway allows for such a difference of clocks.
    let issued = now() + 2;
    let new = bundle.issuer.with("alice", json!({ "sid": "s2", "iat": issued, "nbf": issued }));
    assert_eq!(gateway.curl("/api").token(&new).send().status, 200);
}

#[test]
fn a_revocation_that_names_nothing_we_know_is_refused() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    for (arguments, why) in [
        (vec!["--subject", "alice", "--issuer", "other"], "no such issuer; the policy has: tests"),
        (vec!["--subject", ""], "expected an id of 1 to 256 bytes"),
        (vec!["--session", "s1", "--ttl", "401d"], "ttl: expected 1 to 34560000 seconds"),
    ] {
        let (fine, answer) = gateway.sessions(&[&["revoke"], &arguments[..]].concat());
        let message = answer["message"].as_str().unwrap_or_default();
        assert!(!fine && message.contains(why), "{arguments:?}: {answer}");
    }
    for usage in [&["revoke"][..], &["revoke", "--subject", "a", "--session", "b"]] {
        let (fine, answer) = gateway.sessions(usage);
        assert!(!fine && answer.to_string().contains("Usage"), "{answer}");
    }
}

#[test]
fn open_sockets_are_listed_by_session_and_never_with_their_tokens() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let mut driver = Driver::start(Client::Python, gateway.ca());
    let before = now();
    for (id, subject, session) in
        [("1", "alice", "s1"), ("2", "alice", "s1"), ("3", "alice", "s2"), ("4", "bob", "s3")]
    {
        driver.open(id, &gateway.ws("/ws/a"), &Open::token(&token(&bundle, subject, session, "t")));
    }
    let rows = |arguments: &[&str]| {
        let (fine, answer) = gateway.sessions(&[&["list"], arguments].concat());
        assert!(fine && answer["complete"] == true, "{answer}");
        answer
    };
    let all = rows(&[]);
    assert!(!all.to_string().contains("eyJ"), "a token is shown: {all}");
    let expected = [("alice", "s1", 2), ("alice", "s2", 1), ("bob", "s3", 1)];
    for (row, (subject, session, sockets)) in all["sessions"].as_array().expect("rows").iter().zip(expected) {
        let of = json!({ "issuer": "https://issuer.test", "subject": subject, "session": session });
        assert_eq!((&row["of"], &row["sockets"], &row["routes"]), (&of, &json!(sockets), &json!(["chat"])));
        assert!(row["opened_at"].as_u64().is_some_and(|at| (before..=now()).contains(&at)), "{row}");
    }
    assert_eq!((all["sessions"].as_array().map(Vec::len), &all["next"]), (Some(3), &Value::Null));
    assert_eq!(
        rows(&["--subject", "bob", "--issuer", "tests"])["sessions"].as_array().map(Vec::len),
        Some(1)
    );
    assert_eq!(rows(&["--limit", "2"])["next"]["session"], "s2");
    revoke(&gateway, &["--session", "s1"]);
    for id in ["1", "2"] {
        driver.expect_close(id, 4410);
    }
    until("they are gone from the list", DEADLINE, || {
        (rows(&["--subject", "alice"])["sessions"].as_array().map(Vec::len) == Some(1)).then_some(())
    });
}

// ---- Renewal inside the socket.

const RENEWABLE: &str = r#"
[[websocket]]
name = "chat"
path = "/ws/{room}"
upstream = "backend"
roles = ["user"]
origins = ["*"]
renew = { type = "auth.renew", token_pointer = "/token", min_interval = "100ms" }
[[websocket.message]]
type = "say"
direction = "both"
"#;

const SAY: &str = r#"{"type":"say"}"#;

/// Has the socket go on under another token, and returns what the gateway answers.
fn renew(driver: &mut Driver, id: &str, token: &str) -> Value {
    driver.text(id, &json!({ "type": "auth.renew", "token": token }).to_string());
    let event = driver.next(id);
    serde_json::from_str(event["data"].as_str().unwrap_or_default()).unwrap_or(event)
}

#[test]
fn a_socket_outlives_its_first_token_when_the_client_renews_it() {
    for client in Client::ALL {
        let bundle = Bundle::new(RENEWABLE);
        let gateway = Gateway::run(&bundle);
        let mut driver = Driver::start(client, gateway.ca());
        // A client takes its time to start.
        driver.open("first", &gateway.ws("/ws/a"), &Open::token(&bundle.issuer.token("bob")));
        let expires = now() + 4;
        let short = bundle.issuer.with("alice", json!({ "jti": "short", "exp": expires }));
        for id in ["renewed", "forgotten"] {
            driver.open(id, &gateway.ws("/ws/a"), &Open::token(&short));
        }
        let later = now() + 1000;
        let long = bundle.issuer.with("alice", json!({ "jti": "long", "exp": later }));
        let answer = renew(&mut driver, "renewed", &long);
        assert_eq!(answer, json!({ "type": "auth.renew.ok", "expires_at": later }), "{client:?}");
        driver.echo("renewed", SAY);
        let reason = driver.expect_close("forgotten", 4401);
        assert!(reason.starts_with("token-expired: ") && now() >= expires, "{client:?}: {reason}");
        driver.echo("renewed", SAY);
        // The upstream saw nothing of it.
        let frames = bundle.upstream.frames();
        let data: Vec<_> =
            frames.iter().filter(|frame| frame.opcode < 8).map(|frame| &frame.payload[..]).collect();
        assert_eq!(data, [SAY.as_bytes(), SAY.as_bytes()], "{client:?}");
        // It is found by its new token, and by the old one no more.
        assert_eq!(revoke(&gateway, &["--token-id", "short"]), 0, "{client:?}");
        driver.echo("renewed", SAY);
        assert_eq!(revoke(&gateway, &["--token-id", "long"]), 1, "{client:?}");
        driver.expect_close("renewed", 4410);
    }
}

#[test]
fn only_a_good_token_of_the_same_session_and_rights_renews() {
    for client in Client::ALL {
        let bundle = Bundle::new(RENEWABLE);
        let gateway = Gateway::run(&bundle);
        let mut driver = Driver::start(client, gateway.ca());
        let with = |changes: Value| bundle.issuer.with("alice", changes);
        // Not acceptable: answered, and the old token goes on.
        driver.open("kept", &gateway.ws("/ws/a"), &Open::token(&bundle.issuer.token("alice")));
        let forged = sealgate_tests::TokenIssuer::new("key-1").token("alice");
        for bad in [
            "",
            "no token",
            &forged,
            &with(json!({ "exp": 1, "iat": 0, "nbf": 0 })),
            &with(json!({ "aud": "other" })),
        ] {
            let answer = renew(&mut driver, "kept", bad);
            assert_eq!(answer["type"], "error", "{client:?}: {answer}");
            let reason = answer["reason"].as_str().unwrap_or_default();
            assert!(["token-invalid", "token-expired"].contains(&reason), "{client:?}: {answer}");
            driver.echo("kept", SAY);
            // Longer than min_interval.
            std::thread::sleep(Duration::from_millis(110));
        }
        revoke(&gateway, &["--token-id", "gone"]);
        for (name, token, code, reason) in [
            ("session", with(json!({ "sid": "another" })), 4403, "renewal-mismatch"),
            (
                "subject",
                bundle.issuer.with("bob", json!({ "sid": "session-of-alice" })),
                4403,
                "renewal-mismatch",
            ),
            ("roles", with(json!({ "roles": ["user", "auditor"] })), 1012, "rights-changed"),
            ("fewer roles", with(json!({ "roles": [] })), 1012, "rights-changed"),
            ("acr", with(json!({ "acr": "mfa" })), 1012, "rights-changed"),
            ("revoked", with(json!({ "jti": "gone" })), 4410, "revoked"),
        ] {
            driver.open(name, &gateway.ws("/ws/a"), &Open::token(&bundle.issuer.token("alice")));
            driver.text(name, &json!({ "type": "auth.renew", "token": token }).to_string());
            let said = driver.expect_close(name, code);
            assert!(said.starts_with(reason), "{client:?}: {name}: {said}");
        }
        driver.echo("kept", SAY);
    }
}

#[test]
fn a_renewal_waits_for_a_key_that_is_not_known_yet() {
    let bundle = Bundle::new(RENEWABLE);
    let gateway = Gateway::run(&bundle);
    let mut driver = Driver::start(Client::Python, gateway.ca());
    driver.open("a", &gateway.ws("/ws/a"), &Open::token(&bundle.issuer.token("alice")));
    let next = sealgate_tests::TokenIssuer::new("key-2");
    let mut keys = bundle.issuer.jwks();
    keys["keys"].as_array_mut().expect("keys").push(next.jwks()["keys"][0].clone());
    std::fs::write(bundle.state().join("jwks.json"), keys.to_string()).expect("a key set");
    let answer = until("the key is known", DEADLINE, || {
        let answer = renew(&mut driver, "a", &next.token("alice"));
        (answer["type"] == "auth.renew.ok").then_some(answer)
    });
    assert!(answer["expires_at"].as_u64() > Some(now()), "{answer}");
    driver.echo("a", SAY);
}

/// A socket of Rust's `tungstenite`, driven from here.
struct Rusty(tungstenite::WebSocket<rustls::StreamOwned<rustls::ClientConnection, std::net::TcpStream>>);

impl Rusty {
    fn open(gateway: &Gateway, path: &str, token: &str) -> Rusty {
        let mut request = gateway.ws(path).into_client_request().expect("a request");
        let bearer = format!("Bearer {token}").parse().expect("a header");
        request.headers_mut().insert("authorization", bearer);
        let (socket, _) = tungstenite::client(request, gateway.wire().into_stream()).expect("an open socket");
        Rusty(socket)
    }

    fn ask(&mut self, text: &str) -> String {
        self.0.send(Message::text(text)).expect("it takes a message");
        self.0.read().expect("an answer").into_text().expect("text").to_string()
    }

    #[track_caller]
    fn expect_close(&mut self, code: u16) -> String {
        let Ok(Message::Close(Some(frame))) = self.0.read() else { panic!("no close frame came") };
        assert_eq!(u16::from(frame.code), code, "{frame}");
        // Answered in order, and then the connection ends.
        while self.0.read().is_ok() {}
        frame.reason.to_string()
    }
}

#[test]
fn a_third_client_is_renewed_revoked_reloaded_and_drained_too() {
    let gone = RULES.replace("name = \"chat\"", "name = \"gone\"").replace("/ws/{room}", "/ws/b/{room}");
    let gone = gone.split("[[route]]").next().expect("the socket").to_owned();
    let bundle = Bundle::new(&format!("{RENEWABLE}{gone}"));
    let mut gateway = Gateway::run(&bundle);
    let with = |id: &str, exp: u64| bundle.issuer.with("alice", json!({ "jti": id, "exp": exp }));
    let open = |gateway: &Gateway, path: &str, id: &str| Rusty::open(gateway, path, &with(id, now() + 100));

    let mut renewed = open(&gateway, "/ws/a", "t1");
    let later = now() + 1000;
    let message = json!({ "type": "auth.renew", "token": with("t2", later) }).to_string();
    let answer: Value = serde_json::from_str(&renewed.ask(&message)).expect("JSON");
    assert_eq!(answer, json!({ "type": "auth.renew.ok", "expires_at": later }));
    assert_eq!(renewed.ask(SAY), SAY);

    let (mut kept, mut cut) = (open(&gateway, "/ws/a", "t3"), open(&gateway, "/ws/b/c", "t4"));
    assert_eq!(revoke(&gateway, &["--token-id", "t2"]), 1);
    assert!(renewed.expect_close(4410).starts_with("revoked: "));
    bundle.write(RENEWABLE);
    assert!(gateway.reload().0);
    assert!(cut.expect_close(1008).starts_with("policy-changed: "));
    assert_eq!(kept.ask(SAY), SAY);
    gateway.signal(Signal::TERM);
    assert!(kept.expect_close(1012).starts_with("restarting: "));
    assert!(gateway.wait(DEADLINE).success());
}

// ---- How long, and how many.

#[test]
fn a_session_ends_after_its_lifetime_and_renewal_does_not_extend_it() {
    let rules = format!(
        "[session]\nidle = \"1m\"\nlifetime = \"1m\"\n{RENEWABLE}\n[[route]]\nname = \"api\"\npath = \"/api\"\nmethods = [\"GET\"]\nupstream = \"backend\"\n"
    );
    for client in Client::ALL {
        let bundle = Bundle::new(&rules);
        let gateway = Gateway::run(&bundle);
        let mut driver = Driver::start(client, gateway.ca());
        // A client takes its time to start.
        driver.open("first", &gateway.ws("/ws/a"), &Open::token(&bundle.issuer.token("bob")));
        // A session that began 54 seconds ago, and an hour's token.
        let began = now() - 54;
        let token = bundle.issuer.with("alice", json!({ "auth_time": began }));
        driver.open("by login", &gateway.ws("/ws/a"), &Open::token(&token));
        let undated = bundle.issuer.with("alice", json!({ "iat": began, "nbf": began }));
        driver.open("by issue", &gateway.ws("/ws/a"), &Open::token(&undated));
        assert_eq!(gateway.curl("/api").token(&token).send().status, 200, "{client:?}");
        let fresh = bundle.issuer.with("alice", json!({ "auth_time": now() }));
        for id in ["by login", "by issue"] {
            let answer = renew(&mut driver, id, &fresh);
            assert_eq!(answer, json!({ "type": "auth.renew.ok", "expires_at": began + 60 }), "{client:?}");
        }
        for id in ["by login", "by issue"] {
            let reason = driver.expect_close(id, 4401);
            assert!(reason.starts_with("session-ended: "), "{client:?}: {reason}");
        }
        assert!(now() >= began + 60, "{client:?}");
        assert!(gateway.curl("/api").token(&token).send().problem(401).contains("session-ended"));
        driver.refused("again", &gateway.ws("/ws/a"), &Open::token(&token), 401);
        driver.open("anew", &gateway.ws("/ws/a"), &Open::token(&fresh));
    }
}

fn limited(keys: &str) -> String {
    format!(
        "[[websocket]]\nname = \"chat\"\npath = \"/ws/{{room}}\"\nupstream = \"backend\"\norigins = [\"*\"]\n\
         inspect = \"none\"\nmax_open = {{ {keys} }}\n"
    )
}

#[test]
fn no_more_sockets_are_open_than_the_rule_allows_over_all_cores() {
    for client in Client::ALL {
        let bundle = Bundle::new(&limited("session = 3"));
        let gateway = Gateway::run(&bundle);
        let url = gateway.ws("/ws/a");
        let mut driver = Driver::start(client, gateway.ca());
        let (mine, other) = (bundle.issuer.token("alice"), bundle.issuer.token("bob"));
        // All at once: whichever cores they meet, three get in.
        let ids: Vec<String> = (0..12).map(|number| format!("s{number}")).collect();
        ids.iter().for_each(|id| driver.begin(id, &url, &Open::token(&mine)));
        let events: Vec<_> = ids.iter().map(|id| driver.next(id)).collect();
        let open: Vec<_> = ids.iter().zip(&events).filter(|(_, event)| event["event"] == "open").collect();
        assert_eq!(open.len(), 3, "{client:?}: {events:?}");
        let refused = events.iter().find(|event| event["event"] == "refused").expect("nine were refused");
        assert_eq!(refused["status"], 429, "{refused}");
        assert!(refused["body"].as_str().is_some_and(|body| body.contains("too-many-sockets")), "{refused}");
        assert!(refused["headers"].to_string().contains("retry-after"), "{refused}");
        assert_eq!(bundle.upstream.count("/ws/a"), 3, "{client:?}: a refused socket reached the upstream");
        driver.open("other", &url, &Open::token(&other));
        for (id, _) in &open {
            driver.echo(id, "mine");
        }
        // A place that is free again is given again.
        driver.close(open[0].0, 1000, "");
        driver.expect_close(open[0].0, 1000);
        until("the place is free", DEADLINE, || {
            let event = driver.attempt("next", &url, &Open::token(&mine));
            (event["event"] == "open").then_some(())
        });
    }
}

#[test]
fn the_oldest_socket_makes_room_for_a_new_one() {
    for client in Client::ALL {
        let bundle = Bundle::new(&limited("subject = 2, at_limit = \"replace-oldest\""));
        let gateway = Gateway::run(&bundle);
        let url = gateway.ws("/ws/a");
        let mut driver = Driver::start(client, gateway.ca());
        let token = bundle.issuer.token("alice");
        let other = bundle.issuer.token("bob");
        driver.open("other", &url, &Open::token(&other));
        let ids: Vec<String> = (0..10).map(|number| format!("s{number}")).collect();
        for (place, id) in ids.iter().enumerate() {
            driver.open(id, &url, &Open::token(&token));
            if place >= 2 {
                let reason = driver.expect_close(&ids[place - 2], 4409);
                assert!(reason.starts_with("session-replaced: "), "{client:?}: {reason}");
            }
        }
        // One that cannot be opened takes nobody's place.
        driver.refused("refused", &gateway.ws("/ws/refuse"), &Open::token(&token), 502);
        for id in ["s8", "s9", "other"] {
            driver.echo(id, "still here");
        }
    }
}

#[test]
fn an_address_has_its_limit_too_and_a_shadow_rule_only_counts() {
    let bundle = Bundle::new(&limited("address = 1, session = 9, at_limit = \"replace-oldest\""));
    let gateway = Gateway::run(&bundle);
    let mut driver = Driver::start(Client::Node, gateway.ca());
    driver.open("a", &gateway.ws("/ws/a"), &Open::token(&bundle.issuer.token("alice")));
    driver.refused("b", &gateway.ws("/ws/a"), &Open::token(&bundle.issuer.token("bob")), 429);
    driver.echo("a", "still here");

    let bundle = Bundle::new(&format!("{}mode = \"shadow\"\n", limited("address = 1")));
    let gateway = Gateway::run(&bundle);
    let mut driver = Driver::start(Client::Node, gateway.ca());
    for id in ["a", "b"] {
        driver.open(id, &gateway.ws("/ws/a"), &Open::token(&bundle.issuer.token("alice")));
        driver.echo(id, "hello");
    }
    let counted = gateway.metrics().sum("sealgate_shadow_denials_total", &[("reason", "too-many-sockets")]);
    assert_eq!(counted, 1.0);
}

// ---- The gateway's own end, and the upstream's.

#[test]
fn draining_tells_sockets_one_after_the_other_to_connect_again() {
    let bundle = Bundle::new(&format!("[connections]\ndrain_jitter = \"3s\"\n{RULES}"));
    let mut gateway = Gateway::run(&bundle);
    let token = bundle.issuer.token("alice");
    let mut drivers = Client::ALL.map(|client| Driver::start(client, gateway.ca()));
    let ids: Vec<String> = (0..12).map(|number| number.to_string()).collect();
    for driver in &mut drivers {
        ids.iter().for_each(|id| drop(driver.open(id, &gateway.ws("/ws/a"), &Open::token(&token))));
    }
    let start = Instant::now();
    gateway.signal(Signal::TERM);
    // Each client hears in its own thread, so that one's times do not hide the other's.
    let times: Vec<f64> = std::thread::scope(|scope| {
        let threads = drivers.each_mut().map(|driver| {
            let ids = &ids;
            scope.spawn(move || {
                let mut open: Vec<&String> = ids.iter().collect();
                let mut times = Vec::new();
                while !open.is_empty() {
                    assert!(start.elapsed() < DEADLINE, "{} are still open", open.len());
                    open.retain(|id| {
                        let Some(event) = driver.next_within(id, Duration::from_millis(5)) else {
                            return true;
                        };
                        assert_eq!(
                            (&event["event"], &event["code"]),
                            (&json!("close"), &json!(1012)),
                            "{event}"
                        );
                        let reason = event["reason"].as_str().unwrap_or_default();
                        assert!(
                            reason.starts_with("restarting: ") && reason.ends_with("connect again"),
                            "{reason}"
                        );
                        times.push(start.elapsed().as_secs_f64());
                        false
                    });
                }
                times
            })
        });
        threads.into_iter().flat_map(|thread| thread.join().expect("a client's thread")).collect()
    });
    // 24 at even chances over 3 s: all within half a second of each other has a chance below 10^-15.
    let (first, last) =
        times.iter().fold((f64::MAX, 0.0_f64), |(low, high), at| (low.min(*at), high.max(*at)));
    assert!(last - first > 0.5, "{times:?}");
    assert!(gateway.wait(DEADLINE).success());
}

#[test]
fn without_jitter_all_are_told_at_once() {
    let bundle = Bundle::new(&format!("[connections]\ndrain_jitter = \"0s\"\n{RULES}"));
    let mut gateway = Gateway::run(&bundle);
    let mut driver = Driver::start(Client::Python, gateway.ca());
    let token = bundle.issuer.token("alice");
    for id in ["a", "b", "c"] {
        driver.open(id, &gateway.ws("/ws/a"), &Open::token(&token));
    }
    gateway.signal(Signal::TERM);
    for id in ["a", "b", "c"] {
        driver.expect_close(id, 1012);
    }
    assert!(gateway.wait(DEADLINE).success());
}

#[test]
fn a_socket_that_drains_can_still_be_revoked() {
    let bundle = Bundle::new(&format!("[connections]\ndrain_jitter = \"30s\"\n{RULES}"));
    let gateway = Gateway::run(&bundle);
    let mut driver = Driver::start(Client::Python, gateway.ca());
    // Of so many, some are told late.
    let ids: Vec<String> = (0..20).map(|number| number.to_string()).collect();
    let token = token(&bundle, "alice", "s1", "t1");
    ids.iter().for_each(|id| drop(driver.open(id, &gateway.ws("/ws/a"), &Open::token(&token))));
    gateway.signal(Signal::TERM);
    assert!(revoke(&gateway, &["--subject", "alice"]) > 0);
    let closed: Vec<_> = ids.iter().map(|id| driver.next(id)["code"].as_u64()).collect();
    assert!(closed.contains(&Some(4410)), "{closed:?}");
    assert!(closed.iter().all(|code| [Some(4410), Some(1012)].contains(code)), "{closed:?}");
}

#[test]
fn a_reload_closes_what_is_no_longer_allowed_at_once_and_keeps_the_rest() {
    let other = RULES.replace("name = \"chat\"", "name = \"other\"").replace("/ws/{room}", "/ws/b/{room}");
    let other = other.split("[[route]]").next().expect("the socket").to_owned();
    for client in Client::ALL {
        let bundle = Bundle::new(&format!("{RULES}{other}"));
        let gateway = Gateway::run(&bundle);
        let mut driver = Driver::start(client, gateway.ca());
        let token = bundle.issuer.token("alice");
        driver.open("kept", &gateway.ws("/ws/a"), &Open::token(&token));
        driver.open("gone", &gateway.ws("/ws/b/c"), &Open::token(&token));
        // The first goes on under another name: its metrics follow.
        bundle.write(&RULES.replace("name = \"chat\"", "name = \"talk\""));
        assert!(gateway.reload().0);
        let reason = driver.expect_close("gone", 1008);
        assert!(reason.starts_with("policy-changed: "), "{client:?}: {reason}");
        driver.echo("kept", "still here");
        until("the socket counts for the new rule", DEADLINE, || {
            let metrics = gateway.metrics();
            let open = |route| metrics.sum("sealgate_websocket_open", &[("route", route)]);
            (open("talk") == 1.0 && open("chat") == 0.0 && open("other") == 0.0).then_some(())
        });
    }
}

#[test]
fn an_upstream_that_goes_away_is_a_reason_to_come_back() {
    for client in Client::ALL {
        let bundle = Bundle::new(RULES);
        let gateway = Gateway::run(&bundle);
        let mut driver = Driver::start(client, gateway.ca());
        let token = bundle.issuer.token("alice");
        driver.open("a", &gateway.ws("/ws/a"), &Open::token(&token));
        driver.echo("a", "hello");
        bundle.upstream.stop();
        let reason = driver.expect_close("a", 1013);
        assert!(
            reason.starts_with("upstream-unavailable: ") && reason.ends_with("try again"),
            "{client:?}: {reason}"
        );
        let refused = driver.attempt("b", &gateway.ws("/ws/a"), &Open::token(&token));
        assert!([json!(502), json!(503)].contains(&refused["status"]), "{client:?}: {refused}");
        assert!(refused["headers"].to_string().contains("retry-after"), "{client:?}: {refused}");
        assert!(
            refused["body"].as_str().is_some_and(|body| body.contains("upstream-unavailable")),
            "{refused}"
        );
    }
}
