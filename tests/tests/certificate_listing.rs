//! What an operator is told of certificates: in time, in one place, and before they are swapped in.

use std::time::SystemTime;

use sealgate_tests::{Bundle, Gateway, sealgate};
use serde_json::Value;

const RULES: &str = r#"
[[route]]
name = "open"
host = ["localhost", "chat.test", "*.rooms.test", "elsewhere.test"]
path = "/open"
methods = ["GET"]
upstream = "backend"
auth = "none"

[[certificate]]
names = ["chat.test", "*.rooms.test"]
chain = "file:${state}/certs/chat.pem"
key = "file:${state}/certs/chat.key"
"#;

/// Ends half a day and half an hour before `days` are over: no day and no hour ends while the test runs.
fn issue(bundle: &Bundle, name: &str, hosts: &[&str], days: i64) -> String {
    let key = rcgen::KeyPair::generate().unwrap();
    bundle.pki.issue_with(name, hosts, key, |params| {
        let day = std::time::Duration::from_secs(24 * 60 * 60);
        let far = day * days.unsigned_abs() as u32;
        let end = if days < 0 { SystemTime::now() - far } else { SystemTime::now() + far - day * 25 / 48 };
        (params.not_before, params.not_after) = ((end - day * 90).into(), end.into());
    })
}

#[test]
fn k4_expiry_is_told_by_command_probe_and_metric() {
    let bundle = Bundle::new("");
    let serial = issue(&bundle, "chat", &["chat.test", "*.rooms.test"], 3);
    bundle.write(RULES);
    let gateway = Gateway::run(&bundle);
    let state = bundle.state();
    let online = sealgate(&[&"certs", &"list", &"--json", &"--control", &gateway.control()]);
    let policy = bundle.policy();
    let offline = sealgate(&[&"certs", &"list", &"--json", &"--policy", &policy, &"--state", &state]);
    for output in [&online, &offline] {
        assert!(output.status.success(), "{output:?}");
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        let rows = answer["certificates"].as_array().unwrap();
        assert_eq!(rows.len(), 2, "{answer}");
        assert_eq!(rows[0]["names"], "default");
        assert_eq!(rows[1]["names"], "chat.test, *.rooms.test");
        assert_eq!(rows[1]["serial"].as_str().unwrap().to_uppercase(), serial);
        assert_eq!(rows[1]["key"], "ECDSA");
    }
    let table = sealgate(&[&"certs", &"list", &"--control", &gateway.control()]);
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(table.contains("chat.test, *.rooms.test  ECDSA  2 days left, renew it"), "{table}");

    let ready = gateway.admin("/readyz");
    assert_eq!(ready.status, 200);
    assert!(
        ready.body.starts_with("ready\n") && ready.body.contains("chat.test, *.rooms.test expires in 59 h"),
        "{ready:?}"
    );
    let end = gateway.metrics().sum(
        "sealgate_certificate_expiry_timestamp_seconds",
        &[("name", "chat.test, *.rooms.test"), ("key", "ECDSA")],
    );
    let now = sealgate_tests::now() as f64;
    assert!((now + 2.4 * 86_400.0..now + 2.6 * 86_400.0).contains(&end), "{end}");

    // A host of a rule without a certificate is a warning, an expired certificate an error.
    let check = sealgate(&[&"check", &"--policy", &policy, &"--state", &state]);
    let said = String::from_utf8_lossy(&check.stderr).into_owned();
    assert!(check.status.success() && said.contains("`elsewhere.test`"), "{said}");
    assert!(
        !said.contains("`chat.test`") && !said.contains("`*.rooms.test`") && !said.contains("`localhost`"),
        "{said}"
    );
    issue(&bundle, "chat", &["chat.test", "*.rooms.test"], -1);
    let (fine, said) = gateway.reload();
    assert!(!fine && said.contains("expired on") && said.contains("chat.pem"), "{said}");
    assert_eq!(gateway.served_serial("chat.test"), serial, "the one before stays");
    let offline = sealgate(&[&"certs", &"list", &"--policy", &policy, &"--state", &state]);
    assert!(!offline.status.success() && String::from_utf8_lossy(&offline.stderr).contains("expired on"));
}

#[test]
fn an_unknown_name_gets_the_default_or_its_alert() {
    let bundle = Bundle::new("");
    issue(&bundle, "chat", &["chat.test", "*.rooms.test"], 30);
    bundle.write(RULES);
    let gateway = Gateway::run(&bundle);
    let ask = |name: &str| {
        let mut command = std::process::Command::new("openssl");
        command.args(["s_client", "-connect", &gateway.address().to_string()]);
        match name {
            "" => command.arg("-noservername"),
            name => command.args(["-servername", name]),
        };
        let output = command.stdin(std::process::Stdio::null()).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    };
    let served = |said: &str| said.contains("BEGIN CERTIFICATE");
    assert!(served(&ask("unknown.test")) && served(&ask("")));
    bundle.write(&format!("[tls]\nunknown_name = \"refuse\"\n{RULES}"));
    let (fine, said) = gateway.reload();
    assert!(fine, "{said}");
    for known in ["chat.test", "one.rooms.test", ""] {
        assert!(served(&ask(known)), "{known}");
    }
    for unknown in ["unknown.test", "two.one.rooms.test", "localhost"] {
        let said = ask(unknown);
        assert!(!served(&said) && said.contains("unrecognized name"), "{unknown}: {said}");
    }
}

/// Each with its reason and its file, all at once, before anything is swapped in; a rule's host that no certificate has is a warning.
#[test]
fn certificates_that_would_not_do_are_named_before_they_are_swapped_in() {
    let bundle = Bundle::new("");
    let serial = issue(&bundle, "chat", &["chat.test", "*.rooms.test"], 30);
    bundle.write(RULES);
    let gateway = Gateway::run(&bundle);

    let own = |name: &str| {
        format!(
            "[[certificate]]\nnames = [\"{name}.test\"]\nchain = \"file:${{state}}/certs/{name}.pem\"\n\
             key = \"file:${{state}}/certs/{name}.key\"\n"
        )
    };
    issue(&bundle, "mismatched", &["mismatched.test"], 30);
    std::fs::copy(bundle.pki.path("server.key"), bundle.pki.path("mismatched.key")).unwrap();
    issue(&bundle, "expired", &["expired.test"], -1);
    issue(&bundle, "early", &["early.test"], 200);
    issue(&bundle, "nameless", &["other.test"], 30);
    let all = ["mismatched", "expired", "early", "nameless"];
    let clients = "[tls.client]\nmode = \"request\"\nca = \"file:${state}/clients.pem\"\n\
                   [[tls.client.override]]\nnames = [\"chat.test\"]\nmode = \"require\"\n";
    bundle.write(&format!("{clients}{}{RULES}", all.map(own).concat()));
    let once = |said: &str| said.matches("tls.client.ca").count() == 1;
    let (fine, said) = gateway.reload();
    assert!(!fine && once(&said) && said.contains("No such file"), "{said}");
    std::fs::write(bundle.state().join("clients.pem"), "no certificate").unwrap();
    let (fine, said) = gateway.reload();
    assert!(!fine && once(&said), "{said}");
    for (name, reason) in all.into_iter().zip([
        "does not match the first certificate",
        "expired on",
        "is not valid before",
        "does not cover nameless.test; it covers other.test",
    ]) {
        let line = said.lines().find(|line| line.contains(&format!("certificate for {name}.test")));
        let line = line.unwrap_or_else(|| panic!("{name}: {said}"));
        assert!(line.contains(reason) && line.contains(&format!("{name}.pem")), "{line}");
    }
    assert_eq!(gateway.served_serial("chat.test"), serial, "the one before stays");

    // A renewed one that lacks what a rule has for its host: told of with the reload that brings it.
    issue(&bundle, "chat", &["chat.test"], 30);
    bundle.write(&RULES.replace("names = [\"chat.test\", \"*.rooms.test\"]", "names = [\"chat.test\"]"));
    let (fine, said) = gateway.reload();
    assert!(fine && said.contains("no certificate is for `*.rooms.test`"), "{said}");
}
