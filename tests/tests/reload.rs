//! Reload: the next request and the next message are judged by the new rules, nothing that is allowed is lost.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use sealgate_tests::{Bundle, Client, DEADLINE, Driver, Gateway, Open, Signal, sealgate, until};
use serde_json::{Value, json};

/// `refused` is a path that the rules leave out.
fn rules(text_length: u32) -> String {
    format!(
        r#"
[connections]
max_per_address = 4096

[[route]]
name = "mine"
path = "/mine"
methods = ["GET"]
upstream = "backend"
auth = "required"

[[route]]
name = "body"
path = "/body"
methods = ["POST"]
upstream = "backend"
auth = "none"
body = {{ max_bytes = "{text_length}B" }}

[[websocket]]
name = "checked"
path = "/ws-checked"
upstream = "backend"
auth = "required"
origins = ["*"]
inspect = "json"
type_pointer = "/type"

[[websocket.message]]
type = "say"
direction = "both"
schema = "schemas/say.json"
"#
    )
}

fn say_schema(length: u32) -> String {
    json!({
        "type": "object", "required": ["type", "text"], "additionalProperties": false,
        "properties": { "type": { "const": "say" }, "text": { "type": "string", "maxLength": length } },
    })
    .to_string()
}

fn say(text: &str) -> String {
    json!({ "type": "say", "text": text }).to_string()
}

fn start() -> (Bundle, Gateway) {
    let bundle = Bundle::new("");
    bundle.write_file("schemas/say.json", &say_schema(20));
    bundle.write(&rules(20));
    let gateway = Gateway::run(&bundle);
    (bundle, gateway)
}

fn generation(gateway: &Gateway) -> f64 {
    gateway.metrics().sum("sealgate_policy_generation", &[])
}

#[track_caller]
fn reload(gateway: &Gateway) -> String {
    let (reloaded, said) = gateway.reload();
    assert!(reloaded, "{said}");
    said
}

/// Python's httpx, asking without a pause over HTTP/1.1 and HTTP/2 until told to stop.
struct Load {
    child: Child,
}

impl Load {
    fn start(gateway: &Gateway, path: &str, token: &str) -> Load {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
        let mut child = Command::new(folder.join("venv/bin/python3"))
            .arg(folder.join("load.py"))
            .args([gateway.ca().as_os_str(), gateway.url(path).as_ref(), token.as_ref()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python runs; ./test installs the clients");
        // It says when the first answers have come.
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().expect("piped")).read_line(&mut line).expect("a line");
        assert_eq!(line.trim(), "running");
        Load { child }
    }

    /// `{"ok": n, "failed": [...]}`.
    fn stop(mut self) -> Value {
        self.child.stdin.take().expect("piped").write_all(b"stop\n").expect("it listens");
        let output = self.child.wait_with_output().expect("it ends");
        serde_json::from_slice(&output.stdout).expect("a report")
    }
}

#[test]
fn two_hundred_sockets_and_constant_requests_go_on_through_reloads() {
    let (bundle, gateway) = start();
    let token = bundle.issuer.token("alice");
    let url = gateway.ws("/ws-checked");
    let mut driver = Driver::start(Client::Python, gateway.ca());
    let ids: Vec<String> = (0..200).map(|n| n.to_string()).collect();
    for id in &ids {
        driver.begin(id, &url, &Open::token(&token));
    }
    for id in &ids {
        let event = driver.next(id);
        assert_eq!(event["event"], "open", "{event}");
    }
    let load = Load::start(&gateway, "/mine", &token);

    for round in 0_u32..5 {
        // Even rounds narrow the rules, odd ones widen them.
        let (limit, text) = if round % 2 == 0 { (10, "short") } else { (20, "somewhat longer") };
        bundle.write_file("schemas/say.json", &say_schema(limit));
        bundle.write(&rules(limit));
        reload(&gateway);
        // The very next request and message.
        let body = gateway.curl("/body").body("text/plain", "somewhat longer").send();
        assert_eq!(body.status, if limit == 10 { 413 } else { 200 }, "round {round}: {body:?}");
        for id in &ids {
            driver.text(id, &say(text));
        }
        for id in &ids {
            driver.expect_text(id, &say(text));
        }
    }
    // The narrow rule holds now: what was let pass a round before is refused on one socket, the others stay.
    driver.text("7", &say("somewhat longer"));
    let reason = driver.expect_close("7", 1007);
    assert!(reason.starts_with("schema"), "{reason}");
    for id in ids.iter().filter(|id| *id != "7") {
        driver.text(id, &say("short"));
    }
    for id in ids.iter().filter(|id| *id != "7") {
        driver.expect_text(id, &say("short"));
    }
    let report = load.stop();
    assert_eq!(report["failed"], json!([]), "{report}");
    assert!(report["ok"].as_u64().is_some_and(|count| count > 100), "{report}");
    assert_eq!(gateway.metrics().sum("sealgate_websocket_open", &[("route", "checked")]), 199.0);
}

#[test]
fn a_broken_bundle_changes_nothing_and_every_error_is_named() {
    let (bundle, gateway) = start();
    let token = bundle.issuer.token("alice");
    let before = generation(&gateway);
    let mut driver = Driver::start(Client::Node, gateway.ca());
    driver.open("a", &gateway.ws("/ws-checked"), &Open::token(&token));

    let broken = format!(
        "{}{}",
        rules(10),
        r#"
[[route]]
name = "mine"
path = "/other"
methods = ["GET"]
upstream = "nowhere"
auth = "sometimes"
colour = "red"

[[rate]]
name = "r"
per = ["subject"]
quota = -1
period = "5x"
"#
    );
    bundle.write(&broken);
    let whole = format!("{}{broken}", Bundle::BASE);
    let line =
        |text: &str| 1 + whole.lines().position(|line| line.starts_with(text)).expect("the line is there");
    let (reloaded, said) = gateway.reload();
    assert!(!reloaded, "{said}");
    for key in ["auth = \"sometimes\"", "colour =", "quota = -1", "period = \"5x\""] {
        let place = format!("policy.toml:{}:", line(key));
        assert!(said.contains(&place), "{key} is not reported at {place}\n{said}");
    }
    // `sealgate check` says the same without a gateway, and exits with 1.
    let check = sealgate(&[&"check", &"--policy", &bundle.policy(), &"--state", &bundle.state()]);
    let told =
        format!("{}{}", String::from_utf8_lossy(&check.stdout), String::from_utf8_lossy(&check.stderr));
    assert_eq!(check.status.code(), Some(1), "{told}");
    assert!(
        told.contains(&format!("policy.toml:{}:", line("colour ="))) && told.contains("colour"),
        "{told}"
    );

    let metrics = gateway.metrics();
    assert_eq!(metrics.sum("sealgate_policy_last_reload_successful", &[]), 0.0);
    assert!(metrics.sum("sealgate_policy_reloads_total", &[("result", "failure")]) >= 1.0);
    assert_eq!(generation(&gateway), before);
    // The old rules still stand: 15 bytes pass, an open socket goes on, what was refused still is.
    assert_eq!(gateway.curl("/body").body("text/plain", "somewhat longer").send().status, 200);
    driver.echo("a", &say("somewhat longer"));
    assert_eq!(gateway.curl("/other").token(&token).send().status, 404);
    assert_eq!(gateway.curl("/mine").send().status, 401);

    // Other ways to be broken: not TOML at all, a schema that is none, a missing file.
    for (name, text, expected) in [
        ("policy.toml", "version = [", "policy.toml:1:"),
        ("schemas/say.json", r#"{"type": "nonsense"}"#, "say.json"),
        ("schemas/say.json", "{", "say.json"),
    ] {
        bundle.write_file("schemas/say.json", &say_schema(20));
        bundle.write(&rules(10));
        bundle.write_file(name, text);
        let (reloaded, said) = gateway.reload();
        assert!(!reloaded && said.contains(expected), "{name}: {said}");
    }
    fs::remove_file(bundle.policy().join("schemas/say.json")).unwrap();
    let (reloaded, said) = gateway.reload();
    assert!(!reloaded && said.contains("say.json"), "{said}");

    bundle.write_file("schemas/say.json", &say_schema(20));
    bundle.write(&rules(10));
    reload(&gateway);
    let metrics = gateway.metrics();
    assert_eq!(metrics.sum("sealgate_policy_last_reload_successful", &[]), 1.0);
    assert!(generation(&gateway) > before);
    gateway.curl("/body").body("text/plain", "somewhat longer").send().problem(413);
    driver.echo("a", &say("somewhat longer"));
}

#[test]
fn sealgate_check_passes_a_good_bundle() {
    let bundle = Bundle::new("");
    bundle.write_file("schemas/say.json", &say_schema(20));
    bundle.write(&rules(20));
    let state = bundle.state();
    let check = sealgate(&[&"check", &"--policy", &bundle.policy(), &"--state", &state]);
    assert_eq!(check.status.code(), Some(0), "{check:?}");
    let json = sealgate(&[&"check", &"--policy", &bundle.policy(), &"--state", &state, &"--json"]);
    assert!(serde_json::from_slice::<Value>(&json.stdout).is_ok(), "{json:?}");
    // A usage error is something else than a refused configuration.
    let usage = sealgate(&[&"check", &"--nonsense"]);
    assert_eq!(usage.status.code(), Some(2), "{usage:?}");
    // And `run` does not start with a broken one.
    bundle.write("colour = 1");
    let run = sealgate(&[
        &"run",
        &"--policy",
        &bundle.policy(),
        &"--state",
        &bundle.state(),
        &"--listen",
        &"127.0.0.1:0",
    ]);
    assert_eq!(run.status.code(), Some(1), "{run:?}");
    assert!(String::from_utf8_lossy(&run.stderr).contains("colour"), "{run:?}");
}

/// Waits until `/body` takes at most `limit` bytes, 10 or 20.
fn wait_for_limit(gateway: &Gateway, limit: u32, how: &str) {
    until(how, DEADLINE, || {
        let status = gateway.curl("/body").body("text/plain", "somewhat longer").send().status;
        (status == if limit == 10 { 413 } else { 200 }).then_some(())
    });
}

#[test]
fn sighup_and_every_way_to_replace_a_file_reload() {
    let (bundle, gateway) = start();
    let policy = bundle.policy().join("policy.toml");
    let text = |limit: u32| format!("{}{}", Bundle::BASE, rules(limit));
    wait_for_limit(&gateway, 20, "the beginning");

    // An editor that renames a new file over the old one.
    let fresh = bundle.policy().join(".policy.toml.swp");
    fs::write(&fresh, text(10)).unwrap();
    fs::rename(&fresh, &policy).unwrap();
    wait_for_limit(&gateway, 10, "rename over the file");
    // One that writes in place.
    fs::write(&policy, text(20)).unwrap();
    wait_for_limit(&gateway, 20, "write in place");
    // One that moves the old file away and writes a new one.
    fs::rename(&policy, bundle.policy().join("policy.toml~")).unwrap();
    fs::write(&policy, text(10)).unwrap();
    wait_for_limit(&gateway, 10, "backup and write anew");
    // A file in a folder of the bundle.
    fs::write(&policy, text(20)).unwrap();
    wait_for_limit(&gateway, 20, "write in place again");
    let before = generation(&gateway);
    bundle.write_file("schemas/say.json", &say_schema(30));
    until("a schema's change", DEADLINE, || (generation(&gateway) > before).then_some(()));

    // SIGHUP: the process lives and has read what there is.
    gateway.signal(Signal::HUP);
    wait_for_limit(&gateway, 20, "alive after SIGHUP");
    // A broken file noticed by watching shows in the metrics without anybody asking, and mending it as well.
    bundle.write("colour = 1");
    let state = |gateway: &Gateway| gateway.metrics().sum("sealgate_policy_last_reload_successful", &[]);
    until("the failure shows", DEADLINE, || (state(&gateway) == 0.0).then_some(()));
    wait_for_limit(&gateway, 20, "the old rules stand");
    bundle.write(&rules(10));
    wait_for_limit(&gateway, 10, "mended");
    until("the success shows", DEADLINE, || (state(&gateway) == 1.0).then_some(()));
}

#[test]
fn sighup_alone_reloads_when_watching_sees_nothing() {
    // A certificate outside the bundle may be replaced without any file of the bundle changing.
    let (bundle, gateway) = start();
    let serial = bundle.pki.issue("server", &["localhost", "127.0.0.1"]);
    gateway.signal(Signal::HUP);
    until("the new certificate is served", DEADLINE, || {
        (gateway.served_serial("localhost") == serial).then_some(())
    });
}

#[test]
fn a_kubernetes_volume_that_swaps_its_symlink_reloads() {
    let bundle = Bundle::new("");
    // As the kubelet lays a ConfigMap out: names link into ..data, which links to a dated folder.
    let root = bundle.policy();
    fs::remove_file(root.join("policy.toml")).unwrap();
    let version = |name: &str, limit: u32| {
        let folder = root.join(name);
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("policy.toml"), format!("{}{}", Bundle::BASE, rules(limit))).unwrap();
        fs::write(folder.join("say.json"), say_schema(limit)).unwrap();
    };
    version("..2026_01_01_00_00_00.1", 20);
    symlink("..2026_01_01_00_00_00.1", root.join("..data")).unwrap();
    symlink("..data/policy.toml", root.join("policy.toml")).unwrap();
    fs::create_dir(root.join("schemas")).unwrap();
    symlink("../..data/say.json", root.join("schemas/say.json")).unwrap();
    let gateway = Gateway::run(&bundle);
    let mut driver = Driver::start(Client::Python, gateway.ca());
    driver.open("a", &gateway.ws("/ws-checked"), &Open::token(&bundle.issuer.token("alice")));
    driver.echo("a", &say("somewhat longer"));
    wait_for_limit(&gateway, 20, "the first version");

    version("..2026_01_01_00_01_00.2", 10);
    symlink("..2026_01_01_00_01_00.2", root.join("..data_tmp")).unwrap();
    fs::rename(root.join("..data_tmp"), root.join("..data")).unwrap();
    fs::remove_dir_all(root.join("..2026_01_01_00_00_00.1")).unwrap();
    wait_for_limit(&gateway, 10, "the second version");
    driver.text("a", &say("somewhat longer"));
    driver.expect_close("a", 1007);
}

#[test]
fn new_certificates_and_keys_come_with_a_reload() {
    let (bundle, gateway) = start();
    let token = bundle.issuer.token("alice");
    let mut driver = Driver::start(Client::Node, gateway.ca());
    driver.open("a", &gateway.ws("/ws-checked"), &Open::token(&token));
    let first = gateway.served_serial("localhost");
    let second = bundle.pki.issue("server", &["localhost", "127.0.0.1"]);
    assert_ne!(first, second);
    reload(&gateway);
    assert_eq!(gateway.served_serial("localhost"), second);
    driver.echo("a", &say("hello"));

    // Keys of the issuer: the new one is good, the old one no longer.
    let rotated = sealgate_tests::TokenIssuer::new("key-2");
    fs::write(bundle.state().join("jwks.json"), rotated.jwks().to_string()).unwrap();
    reload(&gateway);
    assert_eq!(gateway.curl("/mine").token(&rotated.token("alice")).send().status, 200);
    gateway.curl("/mine").token(&token).send().problem(401);

    // A key that does not fit, or none at all, is refused, and the old certificate stays.
    fs::write(bundle.pki.path("server.key"), "no key").unwrap();
    let (reloaded, said) = gateway.reload();
    assert!(!reloaded && said.contains("server.key"), "{said}");
    assert_eq!(gateway.served_serial("localhost"), second);
}
