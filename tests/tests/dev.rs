//! `sealgate dev`: one command starts everything, keeps its state, and leaves nothing behind.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sealgate_tests::{DEADLINE, Gateway, Process, Reply, Signal, binary, sealgate, until};

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).expect("a folder").flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("it exists").permissions().mode() & 0o7777
}

fn is_running(id: u32) -> bool {
    // A zombie has ended; only nobody has asked yet.
    fs::read_to_string(format!("/proc/{id}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

#[test]
fn k6_dev_tells_where_everything_is_and_keeps_keys_private() {
    let mut gateway = Gateway::dev();
    let facts = gateway.facts().clone();
    for name in ["url", "ws_url", "ca", "token", "metrics_url", "control", "policy"] {
        assert!(facts[name].is_string(), "{name}: {facts}");
    }
    let state = gateway.policy().parent().expect("the state folder").to_owned();
    assert_eq!(mode(&state), 0o700);
    assert_eq!(mode(gateway.control()), 0o600);
    assert_eq!(mode(&state.join("dev.json")), 0o600, "it holds a token");
    let private = ["PRIVATE", "KEY"].join(" ");
    let mut keys = 0;
    for path in files(&state) {
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        let contents = fs::read(&path).unwrap_or_default();
        let is_key = String::from_utf8_lossy(&contents).contains(&private)
            || name.ends_with("key")
            || name.ends_with(".p8")
            || name.contains(".db")
            || name.contains("sqlite");
        if is_key {
            assert_eq!(mode(&path), 0o600, "{}", path.display());
            keys += 1;
        }
        assert_eq!(mode(&path) & 0o022, 0, "{} can be written by others", path.display());
    }
    assert!(keys >= 3, "the server's key, the authority's, the signing key: {keys}");

    // What a person is told to try does what it says.
    let told = gateway.process().stdout();
    let lines: Vec<&str> = told.lines().map(str::trim).filter(|line| line.starts_with("curl ")).collect();
    let statuses: Vec<u16> =
        lines.iter().filter(|line| line.contains("https://")).map(|line| shell(line).status).collect();
    assert_eq!(statuses, [200, 401], "{told}");
    assert!(told.contains("policy.toml") && told.contains("im") && told.contains("/metrics"), "{told}");

    // Both names, and IPv6 where the machine has it.
    for host in ["localhost", "127.0.0.1"] {
        let url = format!("https://{host}:{}/healthz", gateway.port());
        assert_eq!(sealgate_tests::curl(&url, gateway.ca()).send().status, 200, "{host}");
    }
    if TcpListener::bind("[::1]:0").is_ok() {
        let url = format!("https://[::1]:{}/healthz", gateway.port());
        assert_eq!(sealgate_tests::curl(&url, gateway.ca()).send().status, 200);
    }

    // Editing the policy takes effect.
    let path = "/v1/added-by-the-tests";
    assert!(gateway.curl(path).send().problem(404).ends_with("no-route"));
    let rule = "[[route]]\nname = \"added\"\npath = \"/v1/added-by-the-tests\"\nmethods = [\"GET\"]\n\
                upstream = \"backend\"\nauth = \"required\"\naction = \"echo\"\n";
    fs::write(gateway.policy().join("policy.d/tests.toml"), rule).unwrap();
    until("the rule holds", DEADLINE, || (gateway.curl(path).send().status == 401).then_some(()));
}

/// Runs a printed curl line, with `--include`, as a person would.
fn shell(line: &str) -> Reply {
    let script = line.replacen("curl ", "curl --silent --show-error --include ", 1);
    let output = Command::new("sh").args(["-c", &script]).output().expect("sh runs");
    assert!(output.status.success(), "{script}: {output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    let status = text.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
    Reply { status, version: String::new(), headers: Vec::new(), body: text.into_owned() }
}

#[test]
fn a_second_start_reuses_the_state() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let first = Gateway::dev_in(&state);
    let token = first.token();
    let authority = fs::read(first.ca()).unwrap();
    let policy = first.policy().join("policy.toml");
    let edited = format!("{}\n# edited\n", fs::read_to_string(&policy).unwrap());
    fs::write(&policy, &edited).unwrap();
    // A second one on the same state is refused while the first runs, and does not harm it.
    let mut second = Process::start(&mut Gateway::dev_command(&state, 0), folder.path(), "second");
    assert_eq!(second.wait(DEADLINE).code(), Some(1));
    assert!(second.stderr().contains("state"), "{}", second.stderr());
    assert_eq!(first.curl("/v1/echo").token(&token).send().status, 200);
    drop(first);

    let again = Gateway::dev_in(&state);
    assert_eq!(fs::read(again.ca()).unwrap(), authority);
    assert_eq!(fs::read_to_string(&policy).unwrap(), edited);
    assert_eq!(again.curl("/v1/echo").token(&token).send().status, 200, "the signing key is the same");
}

#[test]
fn a_port_in_use_is_a_clear_error() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut process =
        Process::start(&mut Gateway::dev_command(&folder.path().join("state"), port), folder.path(), "dev");
    let status = process.wait(DEADLINE);
    let said = process.stderr();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains(&port.to_string()) && said.contains("in use"), "{said}");
    assert!(!said.contains("panicked") && !said.contains("Os {"), "{said}");
    assert!(process.descendants().is_empty());
}

#[test]
fn ctrl_c_ends_everything_and_so_does_a_sudden_death() {
    for signal in [Signal::INT, Signal::TERM, Signal::KILL] {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let mut gateway = Gateway::dev_in(&state);
        let children = gateway.process().descendants();
        assert!(!children.is_empty(), "the backend is a process of its own");
        gateway.signal(signal);
        let status = gateway.wait(DEADLINE);
        until("no child is left", DEADLINE, || children.iter().all(|id| !is_running(*id)).then_some(()));
        if signal != Signal::KILL {
            assert_eq!(status.code(), Some(0), "{signal:?}: {}", gateway.process().stderr());
            assert!(!state.join("dev.json").exists(), "{signal:?}: dev.json says that something runs");
        }
        // Whatever way it ended, the next start works.
        let again = Gateway::dev_in(&state);
        assert_eq!(again.curl("/healthz").send().status, 200, "{signal:?}");
    }
}

#[test]
fn e1_a_message_from_alice_reaches_bob_and_the_backend_stores_ciphertext() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let gateway = Gateway::dev_in(&state);
    let canary = "canary: the plans are under the old oak";
    let im = |user: &str| {
        let mut command = Command::new(binary("im"));
        command.arg("--dev").arg(state.join("dev.json")).args(["--user", user]);
        command
    };
    let mut listen = im("bob");
    let bob = Process::start(listen.arg("listen"), folder.path(), "bob");
    // Bob's keys must be there before Alice can write to him: she is told so until they are.
    until("bob can be written to", DEADLINE, || {
        let alice = im("alice").args(["send", "bob", "are you there?"]).output().expect("im runs");
        alice.status.success().then_some(())
    });
    let sent = im("alice").args(["send", "bob", canary]).output().expect("im runs");
    assert!(sent.status.success(), "{sent:?}");
    until("bob reads it", DEADLINE, || bob.stdout().contains(canary).then_some(()));
    assert!(bob.stdout().contains("alice"), "{}", bob.stdout());

    // Nobody reads with bob's name but not his keys: the row is ciphertext, in the database and beside it.
    let rows: Vec<PathBuf> =
        files(&state.join("backend")).into_iter().filter(|path| holds_rows(path)).collect();
    assert!(!rows.is_empty(), "no database in {:?}", files(&state));
    let mut bytes = 0;
    for path in &rows {
        let contents = fs::read(path).unwrap();
        bytes += contents.len();
        assert!(!contains(&contents, canary.as_bytes()), "the plaintext is in {}", path.display());
        assert!(!contains(&contents, b"the old oak"), "a part of the plaintext is in {}", path.display());
    }
    assert!(bytes > 4096, "the database is empty");
    // The search works: what the backend may know, it holds in clear.
    assert!(
        rows.iter().any(|path| contains(&fs::read(path).unwrap(), b"alice")),
        "alice is nowhere in {rows:?}"
    );
    drop(gateway);
    let log = fs::read(folder.path().join("sealgate.err")).unwrap();
    assert!(!contains(&log, canary.as_bytes()), "the plaintext is in the log");
}

fn holds_rows(path: &Path) -> bool {
    let name = path.file_name().expect("a name").to_string_lossy().into_owned();
    name.contains(".db") || name.contains("sqlite")
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

#[test]
fn the_first_answer_comes_soon_after_the_start() {
    let start = std::time::Instant::now();
    let gateway = Gateway::dev();
    assert_eq!(gateway.curl("/healthz").send().status, 200);
    // A deadline with room: debug build, busy machine.
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

#[test]
fn n1_each_shipped_bundle_loads_and_keeps_its_verdicts() {
    let gateway = Gateway::dev();
    let state = gateway.policy().parent().expect("the state folder").to_owned();
    let jwks = format!("jwks=file:{}", state.join("backend/jwks.json").display());
    let bundles = Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies/bundles");
    for name in ["enterprise", "consumer", "regulated"] {
        let bundle = bundles.join(name);
        for command in [&["check"][..], &["policy", "test"]] {
            let mut arguments: Vec<&dyn AsRef<std::ffi::OsStr>> = Vec::new();
            command.iter().for_each(|word| arguments.push(word));
            let policy: [&dyn AsRef<std::ffi::OsStr>; 6] =
                [&"--policy", &bundle, &"--state", &state, &"--define", &jwks];
            arguments.extend(policy);
            let output = sealgate(&arguments);
            assert_eq!(output.status.code(), Some(0), "{name} {command:?}: {output:?}");
        }
    }
    // What dev wrote out is such a bundle too, and `status` tells that it is in force.
    let check = sealgate(&[
        &"check",
        &"--policy",
        &gateway.policy(),
        &"--state",
        &state,
        &"--define",
        &jwks,
        &"--json",
    ]);
    assert_eq!(check.status.code(), Some(0), "{check:?}");
    let status = sealgate(&[&"status", &"--control", &gateway.control(), &"--json"]);
    assert_eq!(status.status.code(), Some(0), "{status:?}");
    assert!(serde_json::from_slice::<serde_json::Value>(&status.stdout).is_ok(), "{status:?}");
}

#[test]
fn commands_without_a_gateway_say_so() {
    let nowhere = Path::new("/nonexistent/control.sock");
    for command in ["reload", "status"] {
        let output = sealgate(&[&command, &"--control", &nowhere]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("/nonexistent/control.sock") && !said.contains("panicked"), "{said}");
    }
    let version = sealgate(&[&"version", &"--json"]);
    let version: serde_json::Value = serde_json::from_slice(&version.stdout).expect("JSON");
    assert!(version["version"].is_string(), "{version}");
}

#[test]
fn the_checked_echo_and_the_login_hold_to_their_schemas() {
    let gateway = Gateway::dev();
    let token = gateway.token();
    let checked = |body: &str| gateway.curl("/v1/echo-checked").token(&token).json(body).send();
    let passed = checked(r#"{"id":"1","text":"hello"}"#);
    assert_eq!((passed.status, passed.json()["text"].as_str()), (200, Some("hello")), "{passed:?}");
    let refused = checked(r#"{"nonsense":true}"#);
    refused.problem(422);
    checked("{").problem(400);
    gateway.curl("/v1/echo-checked").json("{}").send().problem(401);
    gateway.curl("/v1/echo-checked").token(&token).body("text/plain", "{}").send().problem(415);
    let login = |body: &str| gateway.curl("/v1/dev/login").json(body).send();
    assert_eq!(login(r#"{"user":"bob","device":"tests"}"#).status, 200);
    assert_eq!(login(r#"{"user":"mallory","device":"tests"}"#).status, 403);
    login(r#"{"user":["bob"],"device":"tests"}"#).problem(422);
    let keys = gateway.curl("/.well-known/jwks.json").send();
    assert_eq!(keys.status, 200, "{keys:?}");
    assert!(keys.json()["keys"].as_array().is_some_and(|keys| !keys.is_empty()), "{keys:?}");
    assert!(!keys.body.contains("\"d\""), "a private key is published");
}
