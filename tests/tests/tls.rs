//! TLS: only what the requirement table allows can be agreed on, as openssl sees it.

use std::io::Write;
use std::process::{Command, Stdio};

use sealgate_tests::{Bundle, DEADLINE, Gateway, Process, Wire, free_port, until};

const RULES: &str = r#"
[[route]]
name = "open"
path = "/open"
methods = ["GET"]
upstream = "backend"
auth = "none"
"#;

/// What `openssl s_client` agreed on.
#[derive(Debug)]
struct Handshake {
    protocol: String,
    cipher: String,
    said: String,
}

/// One handshake; `Err` holds what openssl said about its failure.
fn handshake(port: u16, arguments: &[&str]) -> Result<Handshake, String> {
    let output = Command::new("openssl")
        .args(["s_client", "-connect", &format!("127.0.0.1:{port}"), "-servername", "localhost"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("openssl runs");
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let agreed =
        said.lines().find_map(|line| line.trim().strip_prefix("New, ").or(line.strip_prefix("Reused, ")));
    let agreed =
        agreed.and_then(|text| text.split_once(", Cipher is ")).filter(|(_, cipher)| *cipher != "(NONE)");
    match agreed {
        // In TLS 1.3 a refusal may come after the suite was agreed on.
        Some((protocol, cipher)) if !said.contains("SSL alert number") => {
            Ok(Handshake { protocol: protocol.to_owned(), cipher: cipher.to_owned(), said: said.clone() })
        }
        _ => Err(said),
    }
}

/// A server that agrees to everything, to show that this openssl can speak what the gateway must refuse.
fn lenient_server(bundle: &Bundle) -> (Process, u16) {
    let port = free_port();
    let mut command = Command::new("openssl");
    command.args([
        "s_server",
        "-quiet",
        "-accept",
        &format!("127.0.0.1:{port}"),
        "-cipher",
        "ALL:@SECLEVEL=0",
    ]);
    command.arg("-cert").arg(bundle.pki.path("server.pem")).arg("-key").arg(bundle.pki.path("server.key"));
    let rsa = bundle.folder().join("rsa.pem");
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-subj",
            "/CN=localhost",
            "-days",
            "2",
            "-keyout",
        ])
        .arg(&rsa)
        .arg("-out")
        .arg(bundle.folder().join("rsa.crt"))
        .output()
        .expect("openssl runs");
    assert!(made.status.success(), "{made:?}");
    command.arg("-dcert").arg(bundle.folder().join("rsa.crt")).arg("-dkey").arg(rsa);
    let process = Process::start(&mut command, bundle.folder(), "s_server");
    until("openssl listens", DEADLINE, || std::net::TcpStream::connect(("127.0.0.1", port)).ok());
    (process, port)
}

#[test]
fn t2_only_tls_1_2_and_1_3_with_forward_secret_aead() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let (_server, lenient) = lenient_server(&bundle);

    for (version, name) in [("-tls1", "TLSv1.0"), ("-tls1_1", "TLSv1.1")] {
        let arguments = [version, "-cipher", "ALL:@SECLEVEL=0"];
        let control =
            handshake(lenient, &arguments).unwrap_or_else(|said| panic!("{name} is not testable: {said}"));
        assert!(control.said.contains("Protocol  : TLSv1"), "{control:?}");
        let said = handshake(gateway.port(), &arguments).expect_err(name);
        assert!(said.contains("alert"), "{name}: no alert: {said}");
    }

    // Every suite that this openssl knows, one by one.
    let list = Command::new("openssl")
        .args(["ciphers", "-tls1_2", "ALL:COMPLEMENTOFALL:@SECLEVEL=0"])
        .output()
        .unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let suites: Vec<&str> = list.trim().split(':').filter(|suite| !suite.starts_with("TLS_")).collect();
    assert!(suites.len() > 80 && suites.contains(&"AES256-SHA"), "{suites:?}");
    let mut agreed = Vec::new();
    for suite in &suites {
        let cipher = format!("{suite}:@SECLEVEL=0");
        if let Ok(handshake) = handshake(gateway.port(), &["-tls1_2", "-cipher", &cipher]) {
            assert_eq!(handshake.protocol, "TLSv1.2", "{handshake:?}");
            agreed.push(*suite);
        }
    }
    // The certificate is ECDSA: the RSA-authenticated suites of the same strength do not come up.
    agreed.sort_unstable();
    assert_eq!(
        agreed,
        ["ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-ECDSA-CHACHA20-POLY1305"]
    );
    for refused in ["AES256-SHA", "AES128-GCM-SHA256", "ECDHE-ECDSA-AES256-SHA384", "ECDHE-RSA-AES128-SHA"] {
        assert!(suites.contains(&refused), "{refused} was not tried");
    }
    let rsa = handshake(lenient, &["-tls1_2", "-cipher", "AES256-SHA:@SECLEVEL=0"]);
    assert!(rsa.is_ok_and(|handshake| handshake.cipher == "AES256-SHA"), "RSA key exchange is not testable");

    for suite in ["TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"] {
        let handshake = handshake(gateway.port(), &["-tls1_3", "-ciphersuites", suite]).expect(suite);
        assert_eq!((handshake.protocol.as_str(), handshake.cipher.as_str()), ("TLSv1.3", suite));
    }
    let ccm = handshake(gateway.port(), &["-tls1_3", "-ciphersuites", "TLS_AES_128_CCM_SHA256"]);
    assert!(ccm.is_err(), "{ccm:?}");
    assert_eq!(gateway.curl("/open").send().status, 200);
}

#[test]
fn t2_a_bundle_can_ask_for_tls_1_3_alone_and_for_nothing_weaker() {
    let bundle = Bundle::new(&format!("[tls]\nversions = [\"1.3\"]\n{RULES}"));
    let gateway = Gateway::run(&bundle);
    assert!(handshake(gateway.port(), &["-tls1_2"]).is_err());
    assert!(handshake(gateway.port(), &["-tls1_3"]).is_ok());
    for weaker in [r#"versions = ["1.1", "1.2"]"#, r#"groups = ["x448"]"#, r#"ciphers = ["AES256-SHA"]"#] {
        bundle.write(&format!("[tls]\n{weaker}\n{RULES}"));
        let (reloaded, said) = gateway.reload();
        assert!(!reloaded && said.contains("policy.toml:"), "{weaker}: {said}");
    }
    assert!(handshake(gateway.port(), &["-tls1_2"]).is_err());
}

#[test]
fn alpn_agrees_on_h2_and_http_1_1_and_on_nothing_else() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    for (offer, expected) in [("h2,http/1.1", "h2"), ("http/1.1", "http/1.1"), ("http/1.1,h2", "h2")] {
        let handshake = handshake(gateway.port(), &["-alpn", offer]).expect(offer);
        assert!(
            handshake.said.contains(&format!("ALPN protocol: {expected}")),
            "{offer}: {}",
            handshake.said
        );
    }
    // RFC 7301 §3.2: no protocol in common is a fatal alert, not a guess.
    let stranger = handshake(gateway.port(), &["-alpn", "spdy/3"]);
    assert!(stranger.as_ref().is_err_and(|said| said.contains("no application protocol")), "{stranger:?}");
    // Without ALPN it is HTTP/1.1.
    let mut wire = Wire::connect(gateway.address(), gateway.ca(), &[]);
    assert_eq!(wire.alpn(), None);
    wire.send("GET /open HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(wire.response().expect("an answer").status, 200);
}

#[test]
fn certificates_are_chosen_by_server_name() {
    let bundle = Bundle::new("");
    let serial = bundle.pki.issue("chat", &["chat.example.test", "*.rooms.example.test"]);
    let default = bundle.pki.issue("server", &["localhost", "127.0.0.1"]);
    bundle.write(&format!(
        "[[certificate]]\nnames = [\"chat.example.test\", \"*.rooms.example.test\"]\n\
         chain = \"file:${{state}}/certs/chat.pem\"\nkey = \"file:${{state}}/certs/chat.key\"\n{RULES}"
    ));
    let gateway = Gateway::run(&bundle);
    for (name, expected) in [
        ("chat.example.test", &serial),
        ("CHAT.example.test", &serial),
        ("one.rooms.example.test", &serial),
        ("localhost", &default),
        ("two.one.rooms.example.test", &default),
    ] {
        assert_eq!(gateway.served_serial(name), *expected, "{name}");
    }
    // A key of another certificate is named before it is swapped in.
    std::fs::copy(bundle.pki.path("server.key"), bundle.pki.path("chat.key")).unwrap();
    let (reloaded, said) = gateway.reload();
    assert!(!reloaded && said.contains("chat"), "{said}");
    assert_eq!(gateway.served_serial("chat.example.test"), serial);
}

#[test]
fn renegotiation_compression_and_early_data_are_not_offered() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let old = handshake(gateway.port(), &["-tls1_2"]).expect("TLS 1.2");
    assert!(old.said.contains("Compression: NONE"), "{}", old.said);
    let session = bundle.folder().join("session.pem");
    let session = session.to_str().unwrap();
    // In TLS 1.3 tickets come after the handshake: the request makes the client read on until one has come.
    let mut client = Command::new("openssl")
        .args(["s_client", "-connect", &format!("127.0.0.1:{}", gateway.port()), "-tls1_3", "-ign_eof"])
        .args(["-servername", "localhost", "-sess_out", session])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("openssl runs");
    let request = b"GET /open HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    client.stdin.as_mut().unwrap().write_all(request).unwrap();
    let said = String::from_utf8_lossy(&client.wait_with_output().unwrap().stdout).into_owned();
    assert!(said.contains("HTTP/1.1 200"), "{said}");
    assert!(said.contains("Max Early Data: 0"), "{said}");
    let again = handshake(gateway.port(), &["-tls1_3", "-sess_in", session]).expect("a second handshake");
    assert!(again.said.contains("Reused, TLSv1.3"), "a ticket resumes: {}", again.said);
}
