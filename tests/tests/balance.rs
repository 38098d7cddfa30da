//! Several endpoints behind one name: in turn or by subject, and never one that is known to be down.

use std::collections::{BTreeMap, BTreeSet};

use sealgate_tests::{Bundle, DEADLINE, Gateway, Upstream, until};

/// A route and a WebSocket in front of `endpoints`, which `more` says how to balance.
fn rules(endpoints: &[Upstream], more: &str) -> String {
    let endpoints: Vec<String> = endpoints.iter().map(|it| format!("\"{}\"", it.endpoint())).collect();
    format!(
        "[[upstream]]\nname = \"pool\"\nendpoints = [{}]\n{more}\n\n\
         [[route]]\nname = \"anyone\"\npath = \"/anyone\"\nmethods = [\"GET\"]\nupstream = \"pool\"\nauth = \"none\"\n\n\
         [[route]]\nname = \"mine\"\npath = \"/mine\"\nmethods = [\"GET\"]\nupstream = \"pool\"\n\n\
         [[websocket]]\nname = \"socket\"\npath = \"/ws/echo\"\nupstream = \"pool\"\n",
        endpoints.join(", ")
    )
}

const BY_SUBJECT: &str = "balance = \"consistent-hash\"";
const CHECKED: &str =
    "health = { path = \"/healthz\", interval = \"100ms\", timeout = \"100ms\", unhealthy = 2 }";

fn three() -> [Upstream; 3] {
    [Upstream::tcp(), Upstream::tcp(), Upstream::tcp()]
}

/// Which endpoint has seen one more request at `target` than `before`.
fn one_more(endpoints: &[Upstream], target: &str, before: &[usize]) -> usize {
    let after = counts(endpoints, target);
    let hit: Vec<usize> = (0..endpoints.len()).filter(|&at| after[at] != before[at]).collect();
    assert_eq!(hit.len(), 1, "one request reached {hit:?}");
    assert_eq!(after[hit[0]], before[hit[0]] + 1);
    hit[0]
}

fn counts(endpoints: &[Upstream], target: &str) -> Vec<usize> {
    endpoints.iter().map(|endpoint| endpoint.count(target)).collect()
}

fn healthy(gateway: &Gateway) -> f64 {
    gateway.metrics().sum("sealgate_upstream_healthy_endpoints", &[("upstream", "pool")])
}

fn wait_healthy(gateway: &Gateway, count: f64) {
    until("the health checks agree", DEADLINE, || (healthy(gateway) == count).then_some(()));
}

/// Where each subject's request and WebSocket go; they must agree, every time.
fn places(
    bundle: &Bundle,
    gateway: &Gateway,
    endpoints: &[Upstream],
    subjects: usize,
) -> BTreeMap<usize, usize> {
    (0..subjects)
        .map(|subject| {
            let token = bundle.issuer.token(&format!("user-{subject}"));
            let ask = || {
                let before = counts(endpoints, "/mine");
                assert_eq!(gateway.curl("/mine").token(&token).send().status, 200);
                one_more(endpoints, "/mine", &before)
            };
            let place = ask();
            assert_eq!(ask(), place, "user-{subject} went elsewhere the second time");
            let before = counts(endpoints, "/ws/");
            let mut wire = gateway.wire();
            assert_eq!(wire.upgrade("/ws/echo", &format!("Authorization: Bearer {token}\r\n")).status, 101);
            assert_eq!(one_more(endpoints, "/ws/", &before), place, "the socket of user-{subject}");
            (subject, place)
        })
        .collect()
}

#[test]
fn in_turn_each_endpoint_gets_its_share() {
    let endpoints = three();
    let bundle = Bundle::new(&rules(&endpoints, ""));
    let gateway = Gateway::run(&bundle);
    for _ in 0..12 {
        assert_eq!(gateway.curl("/anyone").send().status, 200);
    }
    assert_eq!(counts(&endpoints, "/anyone"), [4, 4, 4]);
}

#[test]
fn a_subject_stays_with_its_endpoint_over_http_and_websockets() {
    let endpoints = three();
    let bundle = Bundle::new(&rules(&endpoints, BY_SUBJECT));
    let gateway = Gateway::run(&bundle);
    let places = places(&bundle, &gateway, &endpoints, 16);
    let used: BTreeSet<usize> = places.values().copied().collect();
    assert_eq!(used.len(), 3, "16 subjects use all endpoints: {places:?}");

    // Without a subject it is the client's address: one client, one endpoint.
    for _ in 0..6 {
        assert_eq!(gateway.curl("/anyone").send().status, 200);
    }
    let mut shares = counts(&endpoints, "/anyone");
    shares.sort_unstable();
    assert_eq!(shares, [0, 0, 6]);
}

#[test]
fn when_an_endpoint_falls_only_its_subjects_move_and_they_come_back_with_it() {
    let mut endpoints = three();
    let bundle = Bundle::new(&rules(&endpoints, &format!("{BY_SUBJECT}\n{CHECKED}")));
    let gateway = Gateway::run(&bundle);
    wait_healthy(&gateway, 3.0);
    let at_first = places(&bundle, &gateway, &endpoints, 16);

    let address = endpoints[1].address();
    endpoints[1].stop();
    wait_healthy(&gateway, 2.0);
    let without = places(&bundle, &gateway, &endpoints, 16);
    for (subject, place) in &at_first {
        match place {
            1 => assert_ne!(without[subject], 1, "user-{subject} was sent to the fallen endpoint"),
            _ => assert_eq!(without[subject], *place, "user-{subject} was moved without need"),
        }
    }

    endpoints[1] = Upstream::tcp_at(address);
    wait_healthy(&gateway, 3.0);
    assert_eq!(places(&bundle, &gateway, &endpoints, 16), at_first);
}

#[test]
fn an_endpoint_that_answers_badly_is_passed_over_and_a_reload_does_not_forget_it() {
    let endpoints = three();
    let bundle = Bundle::new(&rules(&endpoints, CHECKED));
    let gateway = Gateway::run(&bundle);
    wait_healthy(&gateway, 3.0);

    endpoints[0].answer("/healthz", 500);
    wait_healthy(&gateway, 2.0);
    let ask = |times: usize| {
        let before = counts(&endpoints, "/anyone");
        for _ in 0..times {
            assert_eq!(gateway.curl("/anyone").send().status, 200);
        }
        let after = counts(&endpoints, "/anyone");
        after.iter().zip(before).map(|(after, before)| after - before).collect::<Vec<_>>()
    };
    assert_eq!(ask(6), [0, 3, 3]);
    bundle.write(&format!("{}\n# another text\n", rules(&endpoints, CHECKED)));
    let (reloaded, said) = gateway.reload();
    assert!(reloaded, "{said}");
    assert_eq!(ask(6), [0, 3, 3], "right after the reload");

    // Nobody left: an answer that says so, and recovery without a hand's turn.
    endpoints[1].answer("/healthz", 500);
    endpoints[2].answer("/healthz", 500);
    wait_healthy(&gateway, 0.0);
    let reply = gateway.curl("/anyone").send();
    assert_eq!(reply.status, 502, "{reply:?}");
    assert_eq!(reply.json()["type"], "urn:sealgate:problem:upstream-unavailable");
    endpoints[2].answer("/healthz", 200);
    wait_healthy(&gateway, 1.0);
    assert_eq!(ask(3), [0, 0, 3]);
}

#[test]
fn endpoints_behind_tls_are_balanced_and_checked() {
    let folder = tempfile::tempdir().unwrap();
    let pki = sealgate_tests::Pki::new(folder.path());
    pki.issue("backend", &["backend.internal"]);
    let endpoints = [Upstream::tls(&pki, "backend"), Upstream::tls(&pki, "backend")];
    let addresses: Vec<String> = endpoints.iter().map(|it| format!("\"tls:{}\"", it.address())).collect();
    let rules = rules(
        &[],
        &format!(
            "tls = {{ ca = \"file:{}\", server_name = \"backend.internal\" }}\n{CHECKED}",
            pki.ca().display()
        ),
    )
    .replace("endpoints = []", &format!("endpoints = [{}]", addresses.join(", ")));
    let bundle = Bundle::new(&rules);
    let gateway = Gateway::run(&bundle);
    wait_healthy(&gateway, 2.0);
    for _ in 0..6 {
        assert_eq!(gateway.curl("/anyone").send().status, 200);
    }
    assert_eq!(counts(&endpoints, "/anyone"), [3, 3]);
    endpoints[0].stop();
    wait_healthy(&gateway, 1.0);
    for _ in 0..4 {
        assert_eq!(gateway.curl("/anyone").send().status, 200);
    }
    assert_eq!(endpoints[1].count("/anyone"), 7);
}
