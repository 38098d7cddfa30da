//! Backends that die, pause, crawl and lie: what a client notices of it, and how often a backend is asked.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::time::{Duration, Instant};

use sealgate_tests::{Bundle, Curl, DEADLINE, Gateway, Upstream, Wire, until};

/// Routes and a WebSocket in front of `endpoints`, about which `more` says the rest.
fn rules_at(endpoints: &[String], more: &str) -> String {
    let endpoints: Vec<String> = endpoints.iter().map(|it| format!("\"{it}\"")).collect();
    format!(
        "[[upstream]]\nname = \"pool\"\nendpoints = [{}]\n{more}\n\n\
         [[route]]\nname = \"any\"\npath = \"/**\"\nmethods = [\"GET\", \"HEAD\"]\n\
         upstream = \"pool\"\nauth = \"none\"\n\n\
         [[route]]\nname = \"sent\"\npath = \"/**\"\nmethods = [\"POST\", \"PUT\", \"DELETE\"]\n\
         upstream = \"pool\"\nauth = \"none\"\nbody = {{ max_bytes = \"8MiB\" }}\n\n\
         [[route]]\nname = \"held\"\npath = \"/held\"\nmethods = [\"POST\", \"PUT\"]\nupstream = \"pool\"\nauth = \"none\"\n\
         body = {{ max_bytes = \"1KiB\", content_types = [\"application/json\"], schema = \"schemas/any.json\" }}\n\n\
         [[route]]\nname = \"mine\"\npath = \"/mine\"\nmethods = [\"GET\"]\nupstream = \"pool\"\n\n\
         [[websocket]]\nname = \"socket\"\npath = \"/ws/{{variant}}\"\nupstream = \"pool\"\nauth = \"none\"\ninspect = \"none\"\n",
        endpoints.join(", ")
    )
}

fn rules(endpoints: &[Upstream], more: &str) -> String {
    rules_at(&endpoints.iter().map(Upstream::endpoint).collect::<Vec<_>>(), more)
}

fn run(rules: &str) -> (Bundle, Gateway) {
    let bundle = Bundle::new("");
    bundle.write_file("schemas/any.json", "{}");
    bundle.write(rules);
    let gateway = Gateway::run(&bundle);
    (bundle, gateway)
}

fn start(endpoints: &[Upstream], more: &str) -> (Bundle, Gateway) {
    run(&rules(endpoints, more))
}

fn three() -> [Upstream; 3] {
    [Upstream::tcp(), Upstream::tcp(), Upstream::tcp()]
}

fn counts(endpoints: &[Upstream], target: &str) -> Vec<usize> {
    endpoints.iter().map(|endpoint| endpoint.count(target)).collect()
}

fn total(endpoints: &[Upstream], target: &str) -> usize {
    counts(endpoints, target).iter().sum()
}

fn retries(gateway: &Gateway, outcome: &str) -> f64 {
    gateway.metrics().sum("sealgate_upstream_retries_total", &[("upstream", "pool"), ("outcome", outcome)])
}

fn gauge(gateway: &Gateway, name: &str) -> f64 {
    gateway.metrics().sum(&format!("sealgate_upstream_{name}"), &[("upstream", "pool")])
}

fn post(gateway: &Gateway, path: &str) -> Curl {
    gateway.curl(path).body("text/plain", "once")
}

/// An endpoint that the system connects to, and that never says anything: as a process that is stopped.
fn paused() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let endpoint = format!("tcp:{}", listener.local_addr().expect("its address"));
    (listener, endpoint)
}

#[test]
fn the_least_busy_endpoint_is_chosen_over_all_cores_and_reloads() {
    let endpoints = three();
    let least = "balance = \"least-connections\"";
    let (bundle, gateway) = start(&endpoints, least);
    // Among equals in turn.
    for _ in 0..6 {
        assert_eq!(gateway.curl("/equal").send().status, 200);
    }
    assert_eq!(counts(&endpoints, "/equal"), [2, 2, 2]);

    // Sockets count, whichever core they are on.
    let mut sockets: Vec<Wire> = (0..12)
        .map(|_| {
            let mut wire = gateway.wire();
            assert_eq!(wire.upgrade("/ws/echo", "").status, 101);
            wire
        })
        .collect();
    assert_eq!(counts(&endpoints, "/ws/"), [4, 4, 4]);

    // Requests under way count: three held ones, one at each; and then one endpoint is let go.
    let held: Vec<_> = (0..3).map(|_| gateway.curl("/hold/on").start()).collect();
    endpoints.iter().for_each(|endpoint| endpoint.wait_held(1));
    endpoints[1].release();
    until("the released one is answered", DEADLINE, || {
        let before = counts(&endpoints, "/free");
        assert_eq!(gateway.curl("/free").send().status, 200);
        (counts(&endpoints, "/free")[1] > before[1]).then_some(())
    });
    let ask = |path: &str| {
        for _ in 0..6 {
            assert_eq!(gateway.curl(path).send().status, 200);
        }
        counts(&endpoints, path)
    };
    assert_eq!(ask("/least"), [0, 6, 0]);

    // A reload forgets nothing of it, whether it changes the upstream or not.
    bundle.write(&format!("{}\n# another text\n", rules(&endpoints, least)));
    assert!(gateway.reload().0);
    assert_eq!(ask("/after"), [0, 6, 0]);
    bundle.write(&rules(&endpoints, &format!("{least}\nbreaker = {{}}")));
    assert!(gateway.reload().0);
    assert_eq!(ask("/under-a-breaker"), [0, 6, 0]);

    // What has ended counts no more.
    endpoints.iter().for_each(Upstream::release);
    for child in held {
        assert_eq!(Curl::finish(child).unwrap().status, 200);
    }
    sockets.drain(..).for_each(Wire::reset);
    until("all are equal again", DEADLINE, || {
        let before = counts(&endpoints, "/again");
        (0..3).for_each(|_| assert_eq!(gateway.curl("/again").send().status, 200));
        let after = counts(&endpoints, "/again");
        (0..3).all(|at| after[at] == before[at] + 1).then_some(())
    });
}

#[test]
fn a_dead_endpoint_costs_no_request_not_even_a_post() {
    let endpoints = three();
    let (_bundle, gateway) = start(&endpoints, "");
    endpoints[1].stop();
    for number in 0..9 {
        assert_eq!(gateway.curl(&format!("/get/{number}")).send().status, 200);
        // Nothing was sent where there was no connection.
        assert_eq!(post(&gateway, &format!("/post/{number}")).send().status, 200);
        let mut wire = gateway.wire();
        assert_eq!(wire.upgrade("/ws/echo", "").status, 101);
        wire.assert_echoes();
    }
    for number in 0..9 {
        assert_eq!(total(&endpoints, &format!("/post/{number}")), 1);
    }
    let answered = retries(&gateway, "answered");
    assert!((9.0..=14.0).contains(&answered), "each round one went there first: {answered}");
    assert_eq!(retries(&gateway, "failed"), 0.0);

    // Without retries the fault is the client's to see.
    let (_bundle, gateway) = start(&endpoints, "retries = 0");
    let statuses: Vec<u16> = (0..3).map(|_| gateway.curl("/get").send().status).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 502).count(), 1, "{statuses:?}");
}

#[test]
fn a_paused_endpoint_costs_time_and_no_request_that_may_be_sent_twice() {
    let (_listener, silent) = paused();
    let others = [Upstream::tcp(), Upstream::tcp()];
    let all = [silent, others[0].endpoint(), others[1].endpoint()];
    let (_bundle, gateway) = run(&rules_at(
        &all,
        "response_timeout = \"300ms\"\nretries = 2\nbreaker = { failures = 2, open_for = \"1h\" }",
    ));
    // Once around: the silent one is met by a POST, which is not sent again.
    let statuses: Vec<u16> =
        (0..3).map(|number| post(&gateway, &format!("/post/{number}")).send().status).collect();
    assert_eq!(statuses.iter().filter(|status| **status == 504).count(), 1, "{statuses:?}");
    for (number, status) in statuses.iter().enumerate() {
        let seen = total(&others, &format!("/post/{number}"));
        assert_eq!(seen, usize::from(*status == 200), "a POST that timed out was sent elsewhere");
    }
    assert_eq!(gauge(&gateway, "open_circuits"), 0.0);
    for _ in 0..3 {
        assert_eq!(gateway.curl("/get").send().status, 200);
    }
    assert_eq!(retries(&gateway, "answered"), 1.0);
    // That was the second time: now it is left alone, and nobody waits for it.
    assert_eq!(gauge(&gateway, "open_circuits"), 1.0);
    assert_eq!(gauge(&gateway, "available_endpoints"), 2.0);
    assert_eq!(gauge(&gateway, "endpoints"), 3.0);
    for _ in 0..9 {
        assert_eq!(gateway.curl("/get").send().status, 200);
        assert_eq!(post(&gateway, "/later").send().status, 200);
    }
    assert_eq!(retries(&gateway, "answered"), 1.0);
}

#[test]
fn an_endpoint_that_lies_about_its_head_is_not_believed_and_another_one_is_asked() {
    let endpoints = three();
    let (_bundle, gateway) = start(&endpoints, "response_timeout = \"1s\"");
    // Three requests and their retries are at most six turns of three.
    let had_its_turn = |path: &str| {
        let count = endpoints[0].count(path);
        assert!((1..=2).contains(&count), "{path}: the liar was asked {count} times");
        count
    };
    let mut lied = 0;
    for (path, lie) in [
        ("/closes", ""),
        ("/half", "HTTP/1.1 200 OK\r\nContent-Le"),
        ("/rubbish", "\0\x01 no HTTP \r\n\r\n"),
        ("/lengths", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
        ("/both", "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
        (
            "/switches",
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        ),
        ("/bare", "HTTP/1.1 200 OK\nContent-Length: 2\n\nok"),
        ("/chunks", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
    ] {
        endpoints[0].script(path, lie, false);
        for _ in 0..3 {
            let reply = gateway.curl(path).send();
            assert_eq!(reply.status, 200, "{path}: {reply:?}");
        }
        lied += had_its_turn(path);
    }
    for (path, again) in [("/fields", "X: y\r\n"), ("/interim", "\r\nHTTP/1.1 103 Early Hints\r\n")] {
        endpoints[0].endless(path, "HTTP/1.1 103 Early Hints\r\n", again);
        for _ in 0..3 {
            assert_eq!(gateway.curl(path).send().status, 200, "{path}");
        }
        lied += had_its_turn(path);
    }
    assert_eq!(retries(&gateway, "answered"), lied as f64);
    assert_eq!(retries(&gateway, "failed"), 0.0);
}

#[test]
fn what_was_begun_to_be_forwarded_is_not_asked_for_again_and_counts_against_the_endpoint() {
    let endpoints = [Upstream::tcp(), Upstream::tcp()];
    let (_bundle, gateway) = start(&endpoints, "breaker = { failures = 2, open_for = \"1h\" }");
    let cut = "HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\nthe beginning";
    // More than is read at once, so that the fault comes behind what is on its way to the client.
    let chunk = format!(
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n186a0\r\n{}\r\nzz\r\n",
        "a".repeat(100_000)
    );
    endpoints[0].script("/cut", cut, false);
    endpoints[0].script("/chunk", chunk, false);
    for path in ["/cut", "/chunk"] {
        let outcomes = [gateway.curl(path).try_send(), gateway.curl(path).try_send()];
        let broken = outcomes.iter().filter(|outcome| outcome.is_err()).count();
        assert_eq!(broken, 1, "{path}: {outcomes:?}");
        assert_eq!(counts(&endpoints, path), [1, 1], "{path}");
    }
    assert_eq!(gauge(&gateway, "open_circuits"), 1.0);
    assert_eq!(retries(&gateway, "answered") + retries(&gateway, "failed"), 0.0);
    (0..4).for_each(|_| assert_eq!(gateway.curl("/cut").send().status, 200));
    assert_eq!(counts(&endpoints, "/cut"), [1, 5]);
}

#[test]
fn a_breaker_opens_is_tried_and_closes() {
    let endpoints = [Upstream::tcp()];
    let breaker = "breaker = { failures = 3, open_for = \"2s\", trials = 1 }";
    let (bundle, gateway) = start(&endpoints, breaker);
    // Not in a row: nothing happens.
    for _ in 0..3 {
        gateway.curl("/drop/a").send().problem(502);
        gateway.curl("/drop/a").send().problem(502);
        assert_eq!(gateway.curl("/fine").send().status, 200);
    }
    let opened_after = Instant::now();
    for _ in 0..3 {
        gateway.curl("/drop/b").send().problem(502);
    }
    let refused = gateway.curl("/fine").send();
    assert!(opened_after.elapsed() < Duration::from_secs(2), "the machine is too slow for this test");
    assert!(matches!(refused.header("retry-after"), Some("1" | "2")), "{refused:?}");
    assert_eq!(refused.problem(503), "urn:sealgate:problem:upstream-circuit-open");
    assert_eq!(gauge(&gateway, "circuit_openings_total"), 1.0);
    assert_eq!((gauge(&gateway, "open_circuits"), gauge(&gateway, "available_endpoints")), (1.0, 0.0));
    // WebSockets too, and after a reload as before.
    let refused = gateway.wire().upgrade("/ws/echo", "");
    assert_eq!((refused.status, endpoints[0].count("/ws")), (503, 0));
    bundle.write(&format!("{}\n# another text\n", rules(&endpoints, breaker)));
    assert!(gateway.reload().0);
    gateway.curl("/fine").send().problem(503);
    assert_eq!(endpoints[0].count("/fine"), 3);

    // One tries it; while it does, others are refused.
    let trial = until("it is tried", DEADLINE, || {
        let mut child = gateway.curl("/hold/trial").start();
        until("it is refused or held", DEADLINE, || {
            let ended = child.try_wait().unwrap().is_some();
            (ended || endpoints[0].count("/hold") == 1).then_some(())
        });
        (endpoints[0].count("/hold") == 1).then_some(child)
    });
    gateway.curl("/fine").send().problem(503);
    endpoints[0].release();
    assert_eq!(Curl::finish(trial).unwrap().status, 200);
    assert_eq!(gateway.curl("/fine").send().status, 200);
    assert_eq!((gauge(&gateway, "open_circuits"), gauge(&gateway, "available_endpoints")), (0.0, 1.0));

    // A trial that fails opens it again at once; a WebSocket may be the one that closes it, and does not keep it half open.
    for _ in 0..3 {
        gateway.curl("/drop/c").send().problem(502);
    }
    let ask = |path: &str| gateway.curl(path).send().status;
    until("it is tried in vain", DEADLINE, || (ask("/drop/d") == 502).then_some(()));
    assert_eq!(ask("/fine"), 503);
    assert_eq!(gauge(&gateway, "circuit_openings_total"), 3.0);
    let mut socket = until("a socket opens", DEADLINE, || {
        let mut wire = gateway.wire();
        (wire.upgrade("/ws/echo", "").status == 101).then_some(wire)
    });
    assert_eq!(ask("/fine"), 200);
    socket.assert_echoes();
}

#[test]
fn statuses_of_a_fault_count_only_where_the_policy_says_so() {
    let endpoints = [Upstream::tcp(), Upstream::tcp()];
    for path in ["/status/503", "/status/502", "/status/504"] {
        endpoints[0].answer(path, path[8..].parse().unwrap());
        endpoints[1].answer(path, 200);
    }
    endpoints[0].answer("/status/500", 500);
    for (says, open) in [("", 0.0), (", server_errors = true", 1.0)] {
        let breaker = format!("breaker = {{ failures = 3, open_for = \"1h\"{says} }}");
        let (_bundle, gateway) = start(&endpoints, &breaker);
        for path in ["/status/500", "/status/500", "/status/503", "/status/502", "/status/504"] {
            (0..2).for_each(|_| drop(gateway.curl(path).send()));
        }
        assert_eq!(gauge(&gateway, "open_circuits"), open, "{says}");
    }
}

#[test]
fn nothing_that_is_not_idempotent_reaches_two_backends_and_what_is_does() {
    let endpoints = three();
    let (_bundle, gateway) = start(&endpoints, "retries = 5");
    // Each closes without an answer: one that may be sent again reaches all, any other one only the first.
    let held = |method: &str| {
        let mut curl = gateway.curl("/held").json("{}");
        endpoints.iter().for_each(|endpoint| endpoint.script("/held", "", false));
        curl = curl.method(method);
        curl
    };
    let mut seen = 0;
    for (request, path, reached) in [
        (gateway.curl("/drop/get"), "/drop/get", 3),
        (gateway.curl("/drop/head").args(["--head"]), "/drop/head", 3),
        (gateway.curl("/drop/delete").method("DELETE"), "/drop/delete", 3),
        // Of a body that flows nothing is kept.
        (gateway.curl("/drop/put").body("text/plain", "x").method("PUT"), "/drop/put", 1),
        (post(&gateway, "/drop/post"), "/drop/post", 1),
        (gateway.curl("/drop/empty").method("POST"), "/drop/empty", 1),
        (held("PUT"), "/held", 3),
        (held("POST"), "/held", 1),
    ] {
        let before = total(&endpoints, path);
        assert_eq!(request.send().status, 502, "{path}");
        assert_eq!(total(&endpoints, path) - before, reached, "{path}");
        seen += reached - 1;
    }
    assert_eq!(retries(&gateway, "failed"), seen as f64);
    // Over kept connections the same.
    for path in ["/drop/post", "/held"] {
        (0..6).for_each(|_| assert_eq!(gateway.curl("/fine").send().status, 200));
        let before = total(&endpoints, path);
        let request = if path == "/held" { held("POST") } else { post(&gateway, path) };
        assert_eq!(request.send().status, 502);
        assert_eq!(total(&endpoints, path) - before, 1, "{path}");
    }
}

#[test]
fn retries_do_not_multiply_an_outage() {
    let endpoints = three();
    let (_bundle, gateway) = start(&endpoints, "retries = 5\nretry_budget = 20");
    let began = Instant::now();
    const REQUESTS: usize = 200;
    let mut wire = gateway.wire();
    for _ in 0..REQUESTS {
        wire.send("GET /drop/all HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(wire.response().expect("an answer").status, 502);
    }
    let windows = 1 + began.elapsed().as_secs() as usize / 10;
    let sent = total(&endpoints, "/drop/all") - REQUESTS;
    assert!(sent <= 10 * windows + REQUESTS / 5, "{sent} retries for {REQUESTS} requests");
    assert!(sent >= REQUESTS / 5, "{sent} retries for {REQUESTS} requests");
    assert_eq!(retries(&gateway, "failed"), sent as f64);
    assert!(retries(&gateway, "refused") > 0.0);
    // A budget of nothing leaves the few that are always allowed.
    let (_bundle, gateway) = start(&endpoints, "retries = 5\nretry_budget = 0");
    let before = total(&endpoints, "/drop/none");
    let mut wire = gateway.wire();
    let began = Instant::now();
    for _ in 0..50 {
        wire.send("GET /drop/none HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(wire.response().expect("an answer").status, 502);
    }
    let windows = 1 + began.elapsed().as_secs() as usize / 10;
    assert!(total(&endpoints, "/drop/none") - before - 50 <= 10 * windows);
}

#[test]
fn a_breaker_moves_only_the_subjects_of_the_endpoint_that_failed() {
    let endpoints = three();
    let (bundle, gateway) =
        start(&endpoints, "balance = \"consistent-hash\"\nbreaker = { failures = 1, open_for = \"1h\" }");
    let places = || -> BTreeMap<usize, usize> {
        (0..24)
            .map(|subject| {
                let token = bundle.issuer.token(&format!("user-{subject}"));
                let before = counts(&endpoints, "/mine");
                assert_eq!(gateway.curl("/mine").token(&token).send().status, 200);
                let after = counts(&endpoints, "/mine");
                (subject, (0..3).find(|&at| after[at] > before[at]).expect("somebody answered"))
            })
            .collect()
    };
    let at_first = places();
    assert!((0..3).all(|at| at_first.values().any(|place| *place == at)), "{at_first:?}");
    endpoints[2].stop();
    for _ in 0..2 {
        let now = places();
        for (subject, place) in &at_first {
            match place {
                2 => assert_ne!(now[subject], 2),
                _ => assert_eq!(now[subject], *place, "user-{subject} was moved without need"),
            }
        }
    }
    // One request found out.
    assert_eq!(retries(&gateway, "answered"), 1.0);
}

#[test]
fn the_time_for_an_answer_begins_when_the_request_has_been_sent() {
    let endpoints = [Upstream::tcp()];
    let (_bundle, gateway) = start(&endpoints, "response_timeout = \"1s\"");
    let mut wire = gateway.wire();
    wire.send("POST /slowly HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n\r\n");
    // The client's slowness is not the backend's.
    for _ in 0..8 {
        std::thread::sleep(Duration::from_millis(300));
        wire.send("x");
    }
    assert_eq!(wire.response().expect("an answer").status, 200);
    wire.send("POST /hold/it HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n");
    std::thread::sleep(Duration::from_millis(600));
    wire.send("x");
    let began = Instant::now();
    assert_eq!(wire.response().expect("an answer").status, 504);
    assert!(began.elapsed() > Duration::from_millis(900), "{:?}", began.elapsed());
    // And one that takes nothing of a long request is not waited for either.
    let (_listener, silent) = paused();
    let (_bundle, gateway) = run(&rules_at(&[silent], "response_timeout = \"1s\""));
    let long = "x".repeat(8 << 20);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), long).unwrap();
    let long = gateway.curl("/long").body("text/plain", &format!("@{}", file.path().display()));
    assert_eq!(long.args(["--http1.1"]).send().status, 504);
}
