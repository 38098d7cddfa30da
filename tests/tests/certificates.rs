//! Certificates, as clients that we did not write see them, and their rotation while clients connect.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustls::crypto::aws_lc_rs::kx_group;
use rustls::{HandshakeKind, NamedGroup};
use sealgate_tests::{ALL_VERSIONS, Bundle, Gateway, Pki, Wire, client_config};

const RULES: &str = r#"
[tls.client]
mode = "request"
ca = "file:${state}/clients/ca.pem"
crls = ["file:${state}/clients/list.pem"]

[[route]]
name = "open"
path = "/open"
methods = ["GET"]
upstream = "backend"
auth = "none"

[[route]]
name = "certified"
path = "/certified"
methods = ["GET"]
upstream = "backend"
auth = "none"
client_certificate = "required"
"#;

const RULES_WITHOUT_CLIENTS: &str = r#"
[[route]]
name = "open"
path = "/open"
methods = ["GET"]
upstream = "backend"
auth = "none"
"#;

fn start(rules: &str) -> (Bundle, Pki, Gateway) {
    let bundle = Bundle::new("");
    let clients = Pki::new(&bundle.state().join("clients"));
    clients.issue("alice", &["alice.test"]);
    clients.revoke("list.pem", &[], 3600);
    bundle.write(&format!("{rules}{RULES}"));
    let gateway = Gateway::run(&bundle);
    (bundle, clients, gateway)
}

/// Runs a client to its end, with `input` for it to send; gives what it said.
fn run(command: &mut Command, input: &[u8], holds: bool) -> String {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), input).unwrap();
    if holds {
        // GnuTLS ends the connection with its input, answered or not.
        let (mut said, mut faults) = (String::new(), String::new());
        std::io::Read::read_to_string(child.stdout.as_mut().unwrap(), &mut said).unwrap();
        std::io::Read::read_to_string(child.stderr.as_mut().unwrap(), &mut faults).unwrap();
        child.wait().unwrap();
        return said + &faults;
    }
    let output = child.wait_with_output().unwrap();
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

const REQUEST: &[u8] = b"GET /certified HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";

/// OpenSSL (curl), GnuTLS, Python's ssl and rustls, in both versions, with a client certificate and without.
#[test]
fn t2_clients_of_other_makes_connect_and_show_their_certificates() {
    let (bundle, clients, gateway) = start("");
    let (certificate, key) = (clients.path("alice.pem"), clients.path("alice.key"));
    for version in ["1.2", "1.3"] {
        for (shown, status) in [(true, 200), (false, 403)] {
            let tls = format!("--tlsv{version}");
            let mut curl = gateway.curl("/certified").args([&*tls, "--tls-max", version]);
            if shown {
                curl = curl.args(["--cert"]).args([&certificate]).args(["--key"]).args([&key]);
            }
            assert_eq!(curl.send().status, status, "curl {version}");

            let priority = format!("NORMAL:-VERS-ALL:+VERS-TLS{version}");
            let mut gnutls = Command::new("gnutls-cli");
            gnutls.args(["--priority", &priority, "--sni-hostname", "localhost"]);
            gnutls.args(["--verify-hostname", "localhost", "--port", &gateway.port().to_string()]);
            gnutls.arg("--x509cafile").arg(gateway.ca());
            if shown {
                gnutls.arg("--x509certfile").arg(&certificate).arg("--x509keyfile").arg(&key);
            }
            let said = run(gnutls.arg("127.0.0.1"), REQUEST, true);
            assert!(said.contains(&format!("HTTP/1.1 {status}")), "GnuTLS {version}: {said}");

            let mut python = Command::new("python3");
            python.args(["-c", PYTHON, &gateway.port().to_string(), version]).arg(gateway.ca());
            if shown {
                python.arg(&certificate).arg(&key);
            }
            let said = run(&mut python, REQUEST, false);
            assert!(said.contains(&format!("TLSv{version}")), "Python {version}: {said}");
            assert!(said.contains(&format!("HTTP/1.1 {status}")), "Python {version}: {said}");

            let versions = ALL_VERSIONS
                .iter()
                .filter(|it| format!("{:?}", it.version).ends_with(&version.replace('.', "_")));
            let versions: Vec<_> = versions.copied().collect();
            assert_eq!(versions.len(), 1);
            let identity = shown.then_some((&*certificate, &*key));
            let config = Arc::new(client_config(&bundle.pki.ca(), &["http/1.1"], identity, &versions));
            let mut wire = Wire::with(gateway.address(), &config, "localhost");
            wire.send(REQUEST);
            assert_eq!(wire.response().expect("an answer").status, status, "rustls {version}");
        }
    }
}

const PYTHON: &str = r#"
import socket, ssl, sys
port, version, ca, *identity = sys.argv[1:]
tls = ssl.create_default_context(cafile=ca)
tls.minimum_version = tls.maximum_version = getattr(ssl.TLSVersion, "TLSv1_" + version[2:])
if identity:
    tls.load_cert_chain(*identity)
request = sys.stdin.buffer.read()
with tls.wrap_socket(socket.create_connection(("127.0.0.1", int(port))), server_hostname="localhost") as stream:
    print(stream.version())
    stream.sendall(request)
    while data := stream.recv(65536):
        print(data.decode())
"#;

/// NSS, which Firefox has: both versions, with a client certificate and without.
#[test]
fn t2_nss_connects_and_shows_its_certificate() {
    let (bundle, clients, gateway) = start("");
    // It shows a certificate unasked, if it has one: so there is another database without.
    let database = |name: &str| format!("sql:{}", bundle.folder().join(name).display());
    let nss = |program: &str, folder: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).args(["-d", folder]).output();
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}: run ./test once"));
        assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    };
    let (with, without) = (database("with"), database("without"));
    let ca = gateway.ca().display().to_string();
    for folder in [&with, &without] {
        std::fs::create_dir(&folder["sql:".len()..]).unwrap();
        nss("certutil", folder, &["-N", "--empty-password"]);
        nss("certutil", folder, &["-A", "-n", "authority", "-t", "C,,", "-i", &ca]);
    }
    let bundled = bundle.folder().join("alice.p12");
    let made = Command::new("openssl")
        .args(["pkcs12", "-export", "-passout", "pass:", "-name", "alice", "-out"])
        .arg(&bundled)
        .arg("-in")
        .arg(clients.path("alice.pem"))
        .arg("-inkey")
        .arg(clients.path("alice.key"))
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    nss("pk12util", &with, &["-i", &bundled.display().to_string(), "-W", ""]);
    let request = bundle.folder().join("request");
    std::fs::write(&request, REQUEST).unwrap();
    for (version, name) in [("tls1.2", "SSL version 3.3"), ("tls1.3", "SSL version 3.4")] {
        for (shown, status) in [(true, 200), (false, 403)] {
            let mut client = Command::new("tstclnt");
            let folder = if shown { &with } else { &without };
            client.args(["-h", "localhost", "-4", "-p", &gateway.port().to_string(), "-d", folder]);
            // From a file: at the end of its standard input it turns in circles.
            client.args(["-V", &format!("{version}:{version}"), "-G", "-v", "-A"]).arg(&request);
            if shown {
                client.args(["-n", "alice"]);
            }
            let said = run(&mut client, b"", false);
            assert!(said.contains(&format!("HTTP/1.1 {status}")), "NSS {version}: {said}");
            assert!(said.contains(name), "NSS {version}: {said}");
        }
    }
}

/// Chromium offers the hybrid and gets it; with TLS 1.2 alone it gets X25519.
#[test]
fn t2_chromium_agrees_on_the_post_quantum_hybrid() {
    let bundle = Bundle::new(RULES_WITHOUT_CLIENTS);
    bundle.upstream.publish("/open", "<!doctype html><title>A page</title>");
    let gateway = Gateway::run(&bundle);
    let chromium = |flags: &[&str]| {
        let clients = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
        let mut command = Command::new(clients.join("venv/bin/python3"));
        command.arg(clients.join("browser_tls.py")).arg(gateway.url("/open"));
        let output = command.arg(bundle.pki.path("server.pem")).args(flags).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let modern = chromium(&[]);
    assert_eq!(modern["status"], 200, "{modern}");
    assert_eq!(modern["protocol"], "TLS 1.3", "{modern}");
    assert_eq!(modern["keyExchangeGroup"], "X25519MLKEM768", "{modern}");
    assert_eq!(modern["http"], "h2", "{modern}");
    let older = chromium(&["--ssl-version-max=tls1.2"]);
    assert_eq!(older["status"], 200, "{older}");
    assert_eq!(older["protocol"], "TLS 1.2", "{older}");
    assert_eq!(older["keyExchangeGroup"], "X25519", "{older}");
}

/// Of the groups that the policy allows, rustls takes the one that the client wants most.
#[test]
fn the_post_quantum_hybrid_is_negotiated_by_those_that_offer_it() {
    let (bundle, _clients, gateway) = start("");
    for (offered, agreed) in [
        (vec![kx_group::X25519MLKEM768, kx_group::X25519], NamedGroup::X25519MLKEM768),
        (vec![kx_group::X25519, kx_group::X25519MLKEM768], NamedGroup::X25519),
        (vec![kx_group::SECP384R1, kx_group::X25519], NamedGroup::secp384r1),
        (vec![kx_group::SECP256R1], NamedGroup::secp256r1),
        (vec![kx_group::X25519MLKEM768], NamedGroup::X25519MLKEM768),
    ] {
        let provider = rustls::crypto::CryptoProvider {
            kx_groups: offered.clone(),
            ..rustls::crypto::aws_lc_rs::default_provider()
        };
        let mut roots = rustls::RootCertStore::empty();
        let ca = rustls::pki_types::pem::PemObject::from_pem_file(bundle.pki.ca()).unwrap();
        roots.add(ca).unwrap();
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut wire = Wire::with(gateway.address(), &Arc::new(config), "localhost");
        wire.handshake().unwrap();
        assert_eq!(wire.tls().negotiated_key_exchange_group().unwrap().name(), agreed, "{offered:?}");
    }
}

#[test]
fn ecdsa_and_rsa_stand_side_by_side_and_the_client_chooses_by_what_it_understands() {
    let (bundle, _clients, gateway) = start("");
    let rsa = rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
    bundle.pki.issue_with("rsa", &["localhost", "127.0.0.1"], rsa, |_| {});
    bundle.write(&format!(
        "[[certificate]]\nchain = \"file:${{state}}/certs/rsa.pem\"\nkey = \"file:${{state}}/certs/rsa.key\"\n{RULES}"
    ));
    let (fine, said) = gateway.reload();
    assert!(fine, "{said}");
    let signature = |version: &str, schemes: &str| {
        let mut openssl = Command::new("openssl");
        openssl.args([
            "s_client",
            "-connect",
            &gateway.address().to_string(),
            "-servername",
            "localhost",
            version,
        ]);
        let said = run(openssl.args(["-sigalgs", schemes]), b"", false);
        let line = said.lines().find_map(|line| line.strip_prefix("Peer signature type: "));
        line.unwrap_or("none").to_owned()
    };
    for version in ["-tls1_2", "-tls1_3"] {
        assert_eq!(signature(version, "ECDSA+SHA256:RSA-PSS+SHA256"), "ECDSA");
        assert_eq!(signature(version, "RSA-PSS+SHA256:ECDSA+SHA256"), "ECDSA", "the cheaper first");
        assert_eq!(signature(version, "RSA-PSS+SHA256"), "RSA-PSS");
        assert_eq!(signature(version, "ed25519"), "none");
        let mut openssl = Command::new("openssl");
        openssl.args([
            "s_client",
            "-connect",
            &gateway.address().to_string(),
            version,
            "-sigalgs",
            "ed25519",
        ]);
        let said = run(&mut openssl, b"", false);
        assert!(said.contains("alert handshake failure"), "{said}");
    }
}

/// Row K-4. Ticket keys change every second, and with every reload the lifetime too, while clients connect: nobody notices, and those
/// with tickets go on resuming.
#[test]
fn k4_ticket_keys_rotate_under_load_without_one_failure() {
    let lifetime = |seconds: u32| format!("[tls]\nticket_lifetime = \"{seconds}s\"\n{RULES_WITHOUT_CLIENTS}");
    let bundle = Bundle::new(&lifetime(1));
    let gateway = Gateway::run(&bundle);
    let stop = AtomicBool::new(false);
    let (full, resumed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for keeps in [true, true, false] {
            let (stop, full, resumed) = (&stop, &full, &resumed);
            let (ca, address) = (bundle.pki.ca(), gateway.address());
            scope.spawn(move || {
                let fresh = || Arc::new(client_config(&ca, &["http/1.1"], None, ALL_VERSIONS));
                let kept = fresh();
                while !stop.load(Ordering::Relaxed) {
                    let config = if keeps { kept.clone() } else { fresh() };
                    let mut wire = Wire::with(address, &config, "localhost");
                    wire.send("GET /open HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
                    let reply = wire.response().unwrap_or_else(|| panic!("no answer: {:?}", wire.fault()));
                    assert_eq!(reply.status, 200, "{reply:?}");
                    let count = match wire.tls().handshake_kind() {
                        Some(HandshakeKind::Resumed) => resumed,
                        _ => full,
                    };
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let begin = Instant::now();
        let mut rounds = 0;
        while begin.elapsed() < Duration::from_secs(6) || rounds < 4 {
            rounds += 1;
            bundle.write(&lifetime(1 + rounds % 2));
            let (fine, said) = gateway.reload();
            assert!(fine, "{said}");
            std::thread::sleep(Duration::from_millis(500));
        }
        stop.store(true, Ordering::Relaxed);
    });
    let (full, resumed) = (full.into_inner(), resumed.into_inner());
    println!("{full} full and {resumed} resumed handshakes");
    assert!(full > 20 && resumed > 20, "{full} full, {resumed} resumed");
    assert_eq!(gateway.metrics().sum("sealgate_tls_handshake_failures_total", &[]), 0.0);
}

/// Row K-4. Certificate, authorities and lists change again and again while clients connect, with and without tickets, with and
/// without certificates of their own: nobody notices.
#[test]
fn k4_certificates_authorities_and_lists_rotate_under_load_without_one_failure() {
    let (bundle, clients, gateway) = start("");
    let other = Pki::new(&bundle.state().join("other"));
    let (certificate, key) = (clients.path("alice.pem"), clients.path("alice.key"));
    let stop = AtomicBool::new(false);
    let (full, resumed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let ours = std::fs::read_to_string(clients.ca()).unwrap();
    let both = ours.clone() + &std::fs::read_to_string(other.ca()).unwrap();
    std::thread::scope(|scope| {
        for (shown, keeps) in [(true, true), (true, false), (false, true), (false, false)] {
            let (stop, full, resumed) = (&stop, &full, &resumed);
            let (ca, address) = (bundle.pki.ca(), gateway.address());
            let (certificate, key) = (&certificate, &key);
            scope.spawn(move || {
                let fresh = || {
                    let identity = shown.then_some((&**certificate, &**key));
                    Arc::new(client_config(&ca, &["http/1.1"], identity, ALL_VERSIONS))
                };
                let kept = fresh();
                let path = if shown { "/certified" } else { "/open" };
                while !stop.load(Ordering::Relaxed) {
                    let config = if keeps { kept.clone() } else { fresh() };
                    let mut wire = Wire::with(address, &config, "localhost");
                    wire.send(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"));
                    let reply = wire.response().unwrap_or_else(|| panic!("no answer: {:?}", wire.fault()));
                    assert_eq!(reply.status, 200, "{reply:?}");
                    let count = match wire.tls().handshake_kind() {
                        Some(HandshakeKind::Resumed) => resumed,
                        _ => full,
                    };
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let begin = Instant::now();
        let mut rounds = 0;
        while begin.elapsed() < Duration::from_secs(4) || rounds < 6 {
            match rounds % 3 {
                0 => drop(bundle.pki.issue("server", &["localhost", "127.0.0.1"])),
                1 => clients.revoke("list.pem", &[["0A", "0B"][rounds / 3 % 2]], 3600),
                _ => {
                    let pem = if rounds / 3 % 2 == 0 { &both } else { &ours };
                    let fresh = clients.path("ca.fresh");
                    std::fs::write(&fresh, pem).unwrap();
                    std::fs::rename(fresh, clients.path("ca.pem")).unwrap();
                }
            }
            let (fine, said) = gateway.reload();
            assert!(fine, "{said}");
            rounds += 1;
        }
        stop.store(true, Ordering::Relaxed);
    });
    let (full, resumed) = (full.into_inner(), resumed.into_inner());
    println!("{full} full and {resumed} resumed handshakes");
    assert!(full > 20 && resumed > 20, "{full} full, {resumed} resumed");
    let metrics = gateway.metrics();
    assert_eq!(metrics.sum("sealgate_tls_handshake_failures_total", &[]), 0.0);
}
