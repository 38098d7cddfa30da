//! Who fails again and again waits longer and longer (row I-4); addresses that lists, operators and penalties refuse.

use std::process::Command;

use sealgate_tests::{Bundle, Curl, DEADLINE, Gateway, Reply, sealgate, until};
use serde_json::{Value, json};

const RULES: &str = r#"
[[penalty]]
name = "logins-per-account"
per = ["account"]
routes = ["login", "held"]
after = 3
block = "2s"

[[penalty]]
name = "logins-per-address"
per = ["address"]
routes = ["login"]
after = 8
block = "1h"

[[penalty]]
name = "tokens"
per = ["address"]
tokens = true
after = 3
block = "1h"
refuse = "connections"

[[route]]
name = "login"
path = "/login"
methods = ["POST"]
upstream = "backend"
auth = "none"
body = { max_bytes = "1KiB", account = "/user" }

[[route]]
name = "held"
path = "/hold/login"
methods = ["POST"]
upstream = "backend"
auth = "none"
body = { max_bytes = "1KiB", account = "/user" }

[[route]]
name = "open"
path = "/open"
methods = ["GET"]
upstream = "backend"
auth = "none"

[[route]]
name = "api"
path = "/api"
methods = ["GET"]
upstream = "backend"
"#;

/// A request from one of the addresses of the loopback.
fn from(gateway: &Gateway, last: u8, path: &str) -> Curl {
    gateway.curl(path).args(["--interface", &format!("127.0.0.{last}")])
}

fn login(gateway: &Gateway, last: u8, user: &str) -> Reply {
    from(gateway, last, "/login").json(&json!({ "user": user, "password": "…" }).to_string()).send()
}

fn run(gateway: &Gateway, arguments: &[&str]) -> (bool, Value) {
    let mut all: Vec<&dyn AsRef<std::ffi::OsStr>> = Vec::new();
    for argument in arguments {
        all.push(argument);
    }
    let control = gateway.control();
    all.extend([&"--json" as &dyn AsRef<std::ffi::OsStr>, &"--control", &control]);
    let output = sealgate(&all);
    (output.status.success(), serde_json::from_slice(&output.stdout).unwrap_or_default())
}

/// A connection that is closed before TLS.
#[track_caller]
fn assert_shut(gateway: &Gateway, last: u8) {
    let error = from(gateway, last, "/open").try_send().expect_err("it is let in");
    assert!(error.contains("curl exit 35") || error.contains("curl exit 56"), "{error}");
}

#[test]
fn wrong_passwords_make_the_account_wait_and_a_right_one_forgives_it() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    bundle.upstream.answer("/login", 401);
    // From wherever they are tried.
    assert_eq!([1, 2].map(|last| login(&gateway, last, "alice").status), [401, 401]);
    bundle.upstream.answer("/login", 200);
    assert_eq!(login(&gateway, 3, "alice").status, 200);
    bundle.upstream.answer("/login", 401);
    assert_eq!([1, 2, 3].map(|last| login(&gateway, last, "Alice").status), [401; 3]);
    let asked = bundle.upstream.count("/login");
    let refused = login(&gateway, 4, " alice");
    assert_eq!(refused.problem(429), "urn:sealgate:problem:too-many-failures");
    let wait: u64 = refused.header("retry-after").and_then(|it| it.parse().ok()).expect("seconds");
    assert!((1..=2).contains(&wait), "{wait}");
    assert_eq!(bundle.upstream.count("/login"), asked, "the upstream was asked");
    // Another account is not concerned, and neither is what is no login.
    assert_eq!(login(&gateway, 1, "bob").status, 401);
    assert_eq!(from(&gateway, 1, "/open").send().status, 200);
    // The wait ends, and a right password then ends it all.
    bundle.upstream.answer("/login", 200);
    until("the wait is over", DEADLINE, || (login(&gateway, 5, "alice").status == 200).then_some(()));
    assert_eq!(login(&gateway, 5, "alice").status, 200);
    let events = |penalty: &str, event: &str| {
        gateway.metrics().sum("sealgate_penalty_events_total", &[("penalty", penalty), ("event", event)])
    };
    assert_eq!(events("logins-per-account", "failure"), 6.0);
    assert_eq!(events("logins-per-account", "block"), 1.0);
    assert!(events("logins-per-account", "refusal") >= 1.0);
}

#[test]
fn an_address_that_tries_many_accounts_waits_and_no_success_forgives_it() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    for number in 0..8 {
        bundle.upstream.answer("/login", 200);
        assert_eq!(login(&gateway, 2, "mallory").status, 200);
        bundle.upstream.answer("/login", 401);
        assert_eq!(login(&gateway, 2, &format!("user {number}")).status, 401);
    }
    assert_eq!(login(&gateway, 2, "user 8").status, 429);
    assert_eq!(login(&gateway, 3, "user 8").status, 401);
    // Nor does a reload.
    bundle.write(&format!("{RULES}\n# another text\n"));
    assert!(gateway.reload().0);
    assert_eq!(login(&gateway, 2, "user 9").status, 429);
}

#[test]
fn parallel_guesses_never_exceed_the_bound() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    bundle.upstream.answer("/hold/login", 401);
    let body = json!({ "user": "alice", "password": "…" }).to_string();
    let guesses: Vec<_> =
        (0..20u8).map(|n| from(&gateway, n % 5 + 1, "/hold/login").json(&body).start()).collect();
    bundle.upstream.wait_held(3);
    let mut statuses = Vec::new();
    // Those beyond the third are refused while the three are still under way.
    let mut guesses = guesses.into_iter();
    until("seventeen were refused", DEADLINE, || {
        let metrics = gateway.metrics();
        (metrics.sum("sealgate_denials_total", &[("reason", "too-many-failures")]) >= 17.0).then_some(())
    });
    bundle.upstream.release();
    for guess in guesses.by_ref() {
        statuses.push(Curl::finish(guess).expect("an answer").status);
    }
    statuses.sort_unstable();
    assert_eq!(statuses, [vec![401; 3], vec![429; 17]].concat());
    assert_eq!(bundle.upstream.count("/hold/login"), 3);
}

#[test]
fn who_tries_out_tokens_is_shut_out_and_let_in_again_by_the_operator() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let good = bundle.issuer.token("alice");
    let forged = format!("{}x", &good[..good.len() - 4]);
    let old = bundle.issuer.with("alice", json!({ "exp": sealgate_tests::now() - 3600 }));
    // A token that is only old is no guess, and neither is none.
    for _ in 0..5 {
        assert_eq!(from(&gateway, 2, "/api").token(&old).send().status, 401);
        assert_eq!(from(&gateway, 2, "/api").send().status, 401);
    }
    assert_eq!(
        (0..3).map(|_| from(&gateway, 2, "/api").token(&forged).send().status).collect::<Vec<_>>(),
        [401; 3]
    );
    assert_shut(&gateway, 2);
    assert_eq!(from(&gateway, 3, "/api").token(&good).send().status, 200);
    assert!(
        gateway.metrics().sum("sealgate_connections_refused_total", &[("reason", "address-refused")]) >= 1.0
    );
    assert_eq!(gateway.metrics().sum("sealgate_blocked_addresses", &[]), 1.0);

    let (fine, answer) = run(&gateway, &["blocks"]);
    assert!(fine && answer["count"] == 1, "{answer}");
    assert_eq!(
        (&answer["blocks"][0]["address"], &answer["blocks"][0]["penalty"]),
        (&json!("127.0.0.2"), &json!("tokens"))
    );
    assert_eq!(run(&gateway, &["unblock", "127.0.0.2"]).1["was_blocked"], true);
    // Connections are let in again; tokens from there are not looked at until the wait is over.
    assert_eq!(from(&gateway, 2, "/open").send().status, 200);
    assert_eq!(
        from(&gateway, 2, "/api").token(&good).send().problem(429),
        "urn:sealgate:problem:too-many-failures"
    );
}

#[test]
fn lists_and_blocks_decide_who_connects_and_change_while_it_runs() {
    let bundle = Bundle::new("");
    let list = |name: &str, text: &str| {
        let path = bundle.folder().join(name);
        std::fs::write(path.with_extension("new"), text).expect("a file");
        std::fs::rename(path.with_extension("new"), &path).expect("a rename");
        path.display().to_string()
    };
    let (deny, allow) =
        (list("deny", "127.0.0.0/29 # and others\n"), list("allow", "127.0.0.1\n127.0.0.3\n"));
    bundle.write(&format!("{RULES}\n[lists]\ndeny = [\"file:{deny}\"]\nallow = [\"file:{allow}\"]\n"));
    let gateway = Gateway::run(&bundle);
    assert_shut(&gateway, 2);
    assert_eq!([1, 3, 9].map(|last| from(&gateway, last, "/open").send().status), [200; 3]);

    // An operator's block ends by itself; one of an allowed address has no effect, and says so.
    let (fine, answer) = run(&gateway, &["block", "127.0.0.9", "--for", "2s"]);
    assert!(fine && answer["allowed"] == false, "{answer}");
    assert_shut(&gateway, 9);
    until("the block ends", DEADLINE, || from(&gateway, 9, "/open").try_send().ok());
    let (fine, answer) = run(&gateway, &["block", "127.0.0.3"]);
    assert!(!fine && answer["allowed"] == true, "{answer}");
    assert_eq!(from(&gateway, 3, "/open").send().status, 200);

    // A connection that is open already gets no more answers once its address is listed.
    let mut wire = gateway.wire();
    let mut ask = || {
        wire.send("GET /open HTTP/1.1\r\nHost: localhost\r\n\r\n");
        wire.response().expect("an answer").status
    };
    assert_eq!(ask(), 200);
    list("allow", "127.0.0.3\n");
    until("the list is read", DEADLINE, || (ask() == 403).then_some(()));
    assert_shut(&gateway, 1);
    // A list with a fault changes nothing, and says where it is.
    list("allow", "127.0.0.1\n127.0.0.3/8\n");
    let (fine, said) = gateway.reload();
    assert!(!fine && said.contains("allow:2: the prefix begins at 127.0.0.0"), "{said}");
    assert_shut(&gateway, 1);
    list("allow", "127.0.0.1\n");
    until("the list is read", DEADLINE, || from(&gateway, 1, "/open").try_send().ok());
}

#[test]
fn a_policy_with_faulty_lists_or_penalties_does_not_pass_the_check() {
    let bundle = Bundle::new("");
    bundle.write(&format!("{RULES}\n[lists]\ndeny = [\"file:none-such\"]\n"));
    let mut command = Command::new(sealgate_tests::binary("sealgate"));
    command.arg("check").arg("--policy").arg(bundle.policy()).arg("--state").arg(bundle.state());
    let output = command.output().expect("sealgate runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("lists: ") && said.contains("none-such"), "{said}");
}
