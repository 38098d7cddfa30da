//! Certificates, as clients that we did not write see them, and their rotation while clients connect.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::version::{TLS12, TLS13};
use rustls::{HandshakeKind, NamedGroup, SupportedProtocolVersion};
use sealgate_keys::ProviderChoice;
use sealgate_tests::{ALL_VERSIONS, Bundle, DEADLINE, Gateway, Pki, Wire, client_config, until};

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

/// Of the groups that a client offers, the one that the policy wants most: without more ado if its key came along, and asked for
/// (HelloRetryRequest) if not.
#[test]
fn the_policys_order_of_groups_counts_whatever_the_clients() {
    use NamedGroup::{X25519, X25519MLKEM768, secp256r1, secp384r1};
    let bundle = Bundle::new(RULES_WITHOUT_CLIENTS);
    let gateway = Gateway::run(&bundle);
    let agreed = |offered: &[NamedGroup], version: &'static SupportedProtocolVersion| {
        let choice = ProviderChoice { groups: offered.to_vec(), tls13_only: false };
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(bundle.pki.ca()).unwrap()).unwrap();
        let config = rustls::ClientConfig::builder_with_provider(sealgate_keys::provider(&choice))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut wire = Wire::with(gateway.address(), &Arc::new(config), "localhost");
        wire.handshake().ok()?;
        wire.send("GET /open HTTP/1.1\r\nHost: localhost\r\n\r\n");
        assert_eq!(wire.response().expect("an answer").status, 200);
        let asked_again = wire.tls().handshake_kind() == Some(HandshakeKind::FullWithHelloRetryRequest);
        Some((wire.tls().negotiated_key_exchange_group()?.name(), asked_again))
    };
    // OpenSSL sends a key for the first group only. Of a second hello it says no word, but there is one message more.
    let openssl = |groups: &str| {
        let mut openssl = Command::new("openssl");
        let address = gateway.address().to_string();
        openssl.args(["s_client", "-connect", &address, "-servername", "localhost", "-tls1_3", "-msg"]);
        let said = run(openssl.args(["-groups", groups]), b"", false);
        let key = said.lines().find_map(|line| line.strip_prefix("Server Temp Key: "));
        let key = key.and_then(|line| line.split(", ").find(|word| *word != "ECDH")).unwrap_or("none");
        (key.to_owned(), said.matches(">>> TLS 1.3, Handshake [length").count(), said)
    };
    for (offered, outcome) in [
        ([X25519MLKEM768, X25519].as_slice(), (X25519MLKEM768, false)),
        (&[X25519, X25519MLKEM768], (X25519MLKEM768, true)),
        (&[secp384r1, X25519], (X25519, true)),
        (&[secp384r1, secp256r1], (secp256r1, true)),
        (&[secp256r1], (secp256r1, false)),
        (&[secp384r1], (secp384r1, false)),
        (&[X25519MLKEM768], (X25519MLKEM768, false)),
    ] {
        assert_eq!(agreed(offered, &TLS13), Some(outcome), "{offered:?}");
    }
    for (offered, outcome) in [
        ([secp384r1, X25519].as_slice(), Some(X25519)),
        (&[secp384r1, secp256r1], Some(secp256r1)),
        (&[X25519MLKEM768, secp384r1], Some(secp384r1)),
        (&[X25519MLKEM768], None),
    ] {
        assert_eq!(agreed(offered, &TLS12), outcome.map(|group| (group, false)), "TLS 1.2 {offered:?}");
    }
    let (key, once, said) = openssl("X25519:P-384");
    assert_eq!(key, "X25519", "{said}");
    let (key, twice, said) = openssl("P-384:X25519");
    assert_eq!((key.as_str(), twice), ("X25519", once + 1), "{said}");

    bundle.write(&format!(
        "[tls]\ngroups = [\"P-384\", \"X25519MLKEM768\", \"X25519\"]\n{RULES_WITHOUT_CLIENTS}"
    ));
    let (fine, said) = gateway.reload();
    assert!(fine, "{said}");
    assert_eq!(agreed(&[X25519MLKEM768, secp384r1], &TLS13), Some((secp384r1, true)));
    assert_eq!(agreed(&[X25519, X25519MLKEM768], &TLS13), Some((X25519MLKEM768, true)));
    assert_eq!(agreed(&[X25519, secp384r1], &TLS12), Some((secp384r1, false)));
    assert_eq!(agreed(&[secp256r1], &TLS13), None);
    let (key, twice, said) = openssl("X25519:P-384");
    assert_eq!((key.as_str(), twice), ("secp384r1", once + 1), "{said}");
}

/// OpenSSL 3.5, as it comes with Python's `cryptography`, offers the hybrid first by itself. Debian's OpenSSL (and curl, Python and
/// Node with it), GnuTLS and NSS are too old for it: they get X25519.
#[test]
fn openssl_agrees_on_the_post_quantum_hybrid() {
    let bundle = Bundle::new(RULES_WITHOUT_CLIENTS);
    let gateway = Gateway::run(&bundle);
    let clients = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
    for (version, agreed) in [("1.3", "TLSv1.3 X25519MLKEM768"), ("1.2", "TLSv1.2 x25519")] {
        let mut python = Command::new(clients.join("venv/bin/python3"));
        python.arg(clients.join("openssl_groups.py")).arg(gateway.port().to_string());
        let said = run(python.arg(gateway.ca()).arg(version), b"", false);
        assert!(said.contains(agreed), "{said}");
    }
    let mut gnutls = Command::new("gnutls-cli");
    gnutls.args(["--sni-hostname", "localhost", "--verify-hostname", "localhost"]);
    gnutls.arg("--x509cafile").arg(gateway.ca()).args(["--port", &gateway.port().to_string(), "127.0.0.1"]);
    let said = run(&mut gnutls, b"", false);
    assert!(said.contains("(TLS1.3-X.509)-(ECDHE-X25519)"), "{said}");
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

/// A client: connects with the certificate that stands at that place; gives the status, none if it was refused, and whether it resumed.
type Connect<'a> = Box<dyn FnMut(usize) -> (Option<u16>, bool) + Send + 'a>;

/// Certificate and key, by each of two authorities.
type Identities = [(PathBuf, PathBuf); 2];

/// rustls, with a certificate or without; what `keeps` tickets resumes.
fn rustls_client<'a>(
    gateway: &Gateway,
    shown: Option<&'a Identities>,
    version: &'static SupportedProtocolVersion,
    keeps: bool,
) -> Connect<'a> {
    let (ca, address) = (gateway.ca().to_owned(), gateway.address());
    let fresh = move |place: usize| {
        let identity = shown.map(|all| (all[place].0.as_path(), all[place].1.as_path()));
        Arc::new(client_config(&ca, &["http/1.1"], identity, &[version]))
    };
    let kept = [fresh(0), fresh(1)];
    let path = if shown.is_some() { "/certified" } else { "/open" };
    Box::new(move |place| {
        let config = if keeps { kept[place].clone() } else { fresh(place) };
        let mut wire = Wire::with(address, &config, "localhost");
        wire.send(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"));
        let status = wire.response().map(|reply| reply.status);
        (status, wire.tls().handshake_kind() == Some(HandshakeKind::Resumed))
    })
}

/// OpenSSL, by Python; resumes what it can.
fn python_client<'a>(gateway: &Gateway, shown: &'a Identities, version: &'a str) -> Connect<'a> {
    let clients = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
    let mut command = Command::new("python3");
    command.arg(clients.join("tls.py")).arg(gateway.port().to_string()).arg(gateway.ca()).arg("/certified");
    let mut child = Ended(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap());
    let mut output = BufReader::new(child.0.stdout.take().unwrap());
    Box::new(move |place| {
        let (certificate, key) = &shown[place];
        writeln!(child.0.stdin.as_ref().unwrap(), "{version} {} {}", certificate.display(), key.display())
            .unwrap();
        let mut said = String::new();
        output.read_line(&mut said).unwrap();
        let (status, kind) = said.trim().split_once(' ').unwrap();
        (status.parse().ok(), kind == "resumed")
    })
}

/// A child that does not outlive its test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// curl, over HTTP/2: a full handshake each time.
fn curl_client<'a>(gateway: &'a Gateway, shown: &'a Identities) -> Connect<'a> {
    Box::new(move |place| {
        let (certificate, key) = &shown[place];
        let curl =
            gateway.curl("/certified").args(["--cert"]).args([certificate]).args(["--key"]).args([key]);
        (Some(curl.send().status), false)
    })
}

/// Has those who wait for it end, also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Row K-4. The server's certificate, revocation lists and authorities change while clients connect, with and without tickets, with
/// and without certificates of their own, which go over from the one authority to the other as in practice: first both are trusted,
/// then all clients have new certificates, then the old authority is gone. Nobody of them notices. And in the midst of that, whoever is
/// revoked, or has still a certificate of the old authority, gets in neither by a handshake nor by a ticket.
#[test]
fn k4_certificates_authorities_and_lists_rotate_under_load_without_one_failure() {
    let bundle = Bundle::new("");
    let authorities = ["clients", "other"].map(|name| Pki::new(&bundle.state().join(name)));
    let issue = |who: &str| authorities.each_ref().map(|pki| pki.issue(who, &["client.test"]));
    let pair = |who: &str| {
        authorities.each_ref().map(|pki| (pki.path(&format!("{who}.pem")), pki.path(&format!("{who}.key"))))
    };
    let (_, serials) = (issue("alice"), issue("mallory"));
    let (alice, mallory) = (pair("alice"), pair("mallory"));
    let list = |revoked: bool| {
        for (pki, serial) in authorities.iter().zip(&serials) {
            let serials: &[&str] = if revoked { &[serial] } else { &[] };
            pki.revoke("list.pem", serials, 3600);
        }
    };
    let trust = |trusted: &[usize]| {
        let pems = trusted.iter().map(|place| std::fs::read_to_string(authorities[*place].ca()).unwrap());
        let fresh = bundle.state().join("trusted.fresh");
        std::fs::write(&fresh, pems.collect::<String>()).unwrap();
        std::fs::rename(fresh, bundle.state().join("trusted.pem")).unwrap();
    };
    list(false);
    trust(&[0]);
    let one = r#""file:${state}/clients/list.pem""#;
    let rules = RULES.replace("clients/ca.pem", "trusted.pem");
    bundle.write(&rules.replace(one, &format!("{one}, {}", one.replace("clients", "other"))));
    let gateway = Gateway::run(&bundle);
    let reload = || {
        let (fine, said) = gateway.reload();
        assert!(fine, "{said}");
    };

    let clients: [(&str, Connect<'_>); 8] = [
        ("rustls, TLS 1.3, tickets", rustls_client(&gateway, Some(&alice), &TLS13, true)),
        ("rustls, TLS 1.3", rustls_client(&gateway, Some(&alice), &TLS13, false)),
        ("rustls, TLS 1.2", rustls_client(&gateway, Some(&alice), &TLS12, true)),
        ("rustls, TLS 1.3, tickets, nameless", rustls_client(&gateway, None, &TLS13, true)),
        ("rustls, TLS 1.2, nameless", rustls_client(&gateway, None, &TLS12, true)),
        ("OpenSSL, TLS 1.3, tickets", python_client(&gateway, &alice, "1.3")),
        ("OpenSSL, TLS 1.2", python_client(&gateway, &alice, "1.2")),
        ("curl, HTTP/2", curl_client(&gateway, &alice)),
    ];
    let mut probes: [(bool, Connect<'_>); 4] = [
        (true, rustls_client(&gateway, Some(&mallory), &TLS13, true)),
        (false, rustls_client(&gateway, Some(&mallory), &TLS12, true)),
        (true, python_client(&gateway, &mallory, "1.3")),
        (false, python_client(&gateway, &mallory, "1.2")),
    ];
    let stop = AtomicBool::new(false);
    let authority = AtomicUsize::new(0);
    // Whose certificate each is about to show.
    let shows = [const { AtomicUsize::new(0) }; 8];
    let (full, resumed) = ([const { AtomicUsize::new(0) }; 8], [const { AtomicUsize::new(0) }; 8]);
    let names = clients.each_ref().map(|(name, _)| *name);
    let mut refusals = 0.0;
    std::thread::scope(|scope| {
        for (at, (name, mut connect)) in clients.into_iter().enumerate() {
            let (stop, authority, shows, full, resumed) = (&stop, &authority, &shows, &full, &resumed);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let place = authority.load(Ordering::SeqCst);
                    shows[at].store(place, Ordering::SeqCst);
                    let (status, has_resumed) = connect(place);
                    assert_eq!(status, Some(200), "{name}");
                    let count = if has_resumed { resumed } else { full };
                    count[at].fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let stop = Stop(&stop);
        for round in 0..3 {
            let (old, new) = (round % 2, 1 - round % 2);
            bundle.pki.issue("server", &["localhost", "127.0.0.1"]);
            reload();
            get_in(&mut probes, old);
            list(true);
            reload();
            refusals += are_refused(&mut probes, old);
            list(false);
            reload();
            get_in(&mut probes, old);
            trust(&[old, new]);
            reload();
            authority.store(new, Ordering::SeqCst);
            let all = || shows.iter().all(|shows| shows.load(Ordering::SeqCst) == new).then_some(());
            until("all show their new certificates", DEADLINE, all);
            trust(&[new]);
            reload();
            refusals += are_refused(&mut probes, old);
        }
        let count = |at: usize| full[at].load(Ordering::Relaxed) + resumed[at].load(Ordering::Relaxed);
        until("all have connected often", DEADLINE, || (0..8).all(|at| count(at) >= 20).then_some(()));
        drop(stop);
    });
    let count = |counts: &[AtomicUsize; 8]| counts.each_ref().map(|count| count.load(Ordering::Relaxed));
    let (full, resumed) = (count(&full), count(&resumed));
    for (at, name) in names.iter().enumerate() {
        println!("{name}: {} full, {} resumed", full[at], resumed[at]);
        assert_eq!(resumed[at] > 5, name.contains("tickets"), "{name}: {}", resumed[at]);
        assert!(full[at] >= 3, "{name}: {}", full[at]);
    }
    let metrics = gateway.metrics();
    let refused =
        metrics.sum("sealgate_tls_handshake_failures_total", &[("reason", "client-certificate-refused")]);
    assert_eq!((refused, metrics.sum("sealgate_tls_handshake_failures_total", &[])), (refusals, refusals));
}

/// By a full handshake first, whatever they had before; then by a ticket, if they have any.
fn get_in(probes: &mut [(bool, Connect<'_>)], place: usize) {
    for (has_tickets, connect) in probes {
        assert_eq!(connect(place), (Some(200), false));
        assert_eq!(connect(place), (Some(200), *has_tickets));
    }
}

/// Gives how many were.
fn are_refused(probes: &mut [(bool, Connect<'_>)], place: usize) -> f64 {
    let count = probes.len() as f64;
    for (_, connect) in probes {
        assert_eq!(connect(place).0, None);
    }
    count
}
