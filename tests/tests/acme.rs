//! ACME against a real server, Debian's pebble: certificates are got, kept, renewed and served; and plain HTTP, which is sent on.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::rand::{SecureRandom, SystemRandom};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use sealgate_tests::{
    ALL_VERSIONS, Bundle, Curl, DEADLINE, Gateway, Process, Wire, client_config, curl, free_port, sealgate,
    until,
};

const RULES: &str = r#"
[[route]]
name = "open"
path = "/open"
methods = ["GET"]
upstream = "backend"
auth = "none"
"#;

const NAMES: [&str; 2] = ["chat.test", "www.chat.test"];

/// A bundle whose first certificate is for localhost, and whose second is an authority's at `port`.
fn bundle(port: u16, more: &str) -> Bundle {
    let bundle = Bundle::new("");
    bundle.write(&format!(
        r#"
[[certificate]]
names = ["chat.test", "www.chat.test"]
acme = "pebble"

[[acme]]
name = "pebble"
directory = "https://localhost:{port}/dir"
contact = ["mailto:operators@chat.test"]
terms_agreed = true
ca = "file:${{state}}/certs/ca.pem"
{more}
{RULES}"#
    ));
    bundle
}

/// A gateway that answers plain HTTP as well, at the port that is given too.
fn start(bundle: &Bundle) -> (Gateway, u16) {
    let port = free_port();
    let gateway = Gateway::run_with(bundle, |command| {
        command.args(["--http", &format!("127.0.0.1:{port}")]);
    });
    (gateway, port)
}

/// Let's Encrypt's server for tests, and a name server for which every name is this machine.
struct Pebble {
    _server: Process,
    _names: Process,
    management: u16,
    ca: PathBuf,
}

/// What a pebble does otherwise than by default.
#[derive(Default)]
struct Settings {
    /// Wants accounts bound to this key, by the name `kid-1`.
    external: Option<String>,
    /// Seconds that its certificates are good for.
    validity: Option<u64>,
}

impl Pebble {
    fn start(bundle: &Bundle, port: u16, http: u16, tls: u16) -> Pebble {
        Pebble::start_with(bundle, port, http, tls, Settings::default())
    }

    /// Validates at these ports; refuses good nonces now and then, as servers may (RFC 8555 §6.5).
    fn start_with(bundle: &Bundle, port: u16, http: u16, tls: u16, settings: Settings) -> Pebble {
        let folder = bundle.folder();
        bundle.pki.issue("pebble", &["localhost", "127.0.0.1"]);
        let (names, control, management) = (free_port(), free_port(), free_port());
        let mut command = Command::new("pebble-challtestsrv");
        command.args(["-defaultIPv4", "127.0.0.1", "-defaultIPv6", ""]);
        command.args(["-http01", "", "-https01", "", "-tlsalpn01", ""]);
        command.args([
            "-dns01",
            &format!("127.0.0.1:{names}"),
            "-management",
            &format!("127.0.0.1:{control}"),
        ]);
        let names_process = Process::start(&mut command, folder, "pebble-names");
        let mut config = json!({ "pebble": {
            "listenAddress": format!("127.0.0.1:{port}"),
            "managementListenAddress": format!("127.0.0.1:{management}"),
            "certificate": bundle.pki.path("pebble.pem"),
            "privateKey": bundle.pki.path("pebble.key"),
            "httpPort": http,
            "tlsPort": tls,
            "ocspResponderURL": "",
            "externalAccountBindingRequired": settings.external.is_some(),
        }});
        if let Some(key) = settings.external {
            config["pebble"]["externalAccountMACKeys"] = json!({ "kid-1": key });
        }
        if let Some(seconds) = settings.validity {
            config["pebble"]["certificateValidityPeriod"] = seconds.into();
        }
        let path = folder.join("pebble.json");
        std::fs::write(&path, config.to_string()).expect("a configuration");
        let mut command = Command::new("pebble");
        command.arg("-config").arg(path).args(["-strict", "-dnsserver", &format!("127.0.0.1:{names}")]);
        command.env("PEBBLE_VA_NOSLEEP", "1").env("PEBBLE_WFE_NONCEREJECT", "10");
        // Every name is validated anew.
        command.env("PEBBLE_AUTHZREUSE", "0");
        let server = Process::start(&mut command, folder, "pebble");
        let pebble = Pebble { _server: server, _names: names_process, management, ca: bundle.pki.ca() };
        until("pebble answers", DEADLINE, || pebble.get("/roots/0"));
        pebble
    }

    /// The authority that its certificates end at.
    fn root(&self, folder: &Path) -> PathBuf {
        let path = folder.join("pebble-root.pem");
        std::fs::write(&path, self.get("/roots/0").expect("its root")).expect("a file");
        path
    }

    fn get(&self, path: &str) -> Option<String> {
        let url = format!("https://localhost:{}{path}", self.management);
        curl(&url, &self.ca)
            .http1()
            .try_send()
            .ok()
            .filter(|reply| reply.status == 200)
            .map(|reply| reply.body)
    }
}

/// A request for a host of the authority's certificates, which are verified by `root`.
fn ask(gateway: &Gateway, host: &str, root: &Path) -> Curl {
    let url = format!("https://{host}:{}/open", gateway.port());
    curl(&url, root).args(["--resolve", &format!("{host}:{}:127.0.0.1", gateway.port())])
}

fn renew(gateway: &Gateway) -> (bool, String) {
    let output = sealgate(&[&"certs", &"renew", &"--control", &gateway.control()]);
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (output.status.success(), said)
}

fn orders(gateway: &Gateway, outcome: &str) -> f64 {
    gateway.metrics().sum("sealgate_acme_orders_total", &[("authority", "pebble"), ("outcome", outcome)])
}

/// Files below `folder` with the bits of their modes.
fn files(folder: &Path) -> Vec<(PathBuf, u32)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
        let mode = entry.metadata().expect("facts").permissions().mode() & 0o777;
        found.push((entry.path(), mode));
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        }
    }
    found
}

/// From a gateway without a certificate for a name, over failures, to one that has it, renews it under load and keeps it over restarts.
fn obtained_renewed_and_kept(challenge: &str, external: bool) {
    let port = free_port();
    let bundled = "external_account = { id = \"kid-1\", key = \"file:${state}/external.key\" }";
    let bundled = if external { bundled } else { "" };
    let bundle = bundle(port, &format!("challenges = [\"{challenge}\"]\n{bundled}"));
    let external = external.then(|| {
        let mut key = [0_u8; 32];
        SecureRandom::fill(&SystemRandom::new(), &mut key).expect("random bytes");
        let key = URL_SAFE_NO_PAD.encode(key);
        std::fs::write(bundle.state().join("external.key"), format!("{key}\n")).expect("a key");
        key
    });
    let (gateway, http) = start(&bundle);
    // Nobody answers at the authority's: the name is refused, others are served, and it is said why.
    until("an attempt has failed", DEADLINE, || (orders(&gateway, "failed") >= 1.0).then_some(()));
    assert_eq!(gateway.served_serial("chat.test"), "", "no certificate, and no other one instead");
    assert_eq!(gateway.curl("/open").send().status, 200);
    assert_eq!(gateway.metrics().sum("sealgate_acme_certificates_missing", &[]), 1.0);
    let ready = gateway.admin("/readyz");
    assert_eq!(ready.status, 200, "{ready:?}");
    assert!(ready.body.contains("no certificate for chat.test, www.chat.test yet"), "{ready:?}");

    let settings = Settings { external, ..Settings::default() };
    let pebble = Pebble::start_with(&bundle, port, http, gateway.port(), settings);
    let root = pebble.root(bundle.folder());
    let (asked, said) = renew(&gateway);
    assert!(asked, "{said}");
    let first = until("it is served", DEADLINE, || {
        Some(gateway.served_serial("chat.test")).filter(|serial| !serial.is_empty())
    });
    for name in NAMES {
        assert_eq!(ask(&gateway, name, &root).send().status, 200, "{name}");
    }
    assert_eq!(gateway.curl("/open").send().status, 200);
    assert_eq!(gateway.metrics().sum("sealgate_acme_certificates_missing", &[]), 0.0);
    assert_eq!(orders(&gateway, "issued"), 1.0);
    let listed = sealgate(&[&"certs", &"list", &"--control", &gateway.control()]);
    assert!(String::from_utf8_lossy(&listed.stdout).contains("chat.test, www.chat.test"), "{listed:?}");

    // Row K-6: what is kept is closed to others.
    let kept = files(&bundle.state().join("acme"));
    let named = |end: &str| kept.iter().filter(|(path, _)| path.to_string_lossy().ends_with(end)).count();
    assert_eq!((named("account.json"), named(".pem"), kept.len()), (1, 1, 3), "{kept:?}");
    for (path, mode) in &kept {
        assert_eq!(*mode, if path.is_dir() { 0o700 } else { 0o600 }, "{}", path.display());
    }
    let account = kept.iter().find(|(path, _)| path.ends_with("account.json")).expect("an account").0.clone();
    let account_before = std::fs::read(&account).expect("the account");

    // Renewed while clients connect: none of them fails.
    let stop = AtomicBool::new(false);
    let count = AtomicUsize::new(0);
    let second = std::thread::scope(|scope| {
        for keeps in [true, false] {
            let (stop, count, root, address) = (&stop, &count, &root, gateway.address());
            scope.spawn(move || {
                let fresh = || Arc::new(client_config(root, &["http/1.1"], None, ALL_VERSIONS));
                let kept = fresh();
                while !stop.load(Ordering::Relaxed) {
                    let config = if keeps { kept.clone() } else { fresh() };
                    let mut wire = Wire::with(address, &config, "chat.test");
                    wire.send("GET /open HTTP/1.1\r\nHost: chat.test\r\nConnection: close\r\n\r\n");
                    let reply = wire.response().unwrap_or_else(|| panic!("no answer: {:?}", wire.fault()));
                    assert_eq!(reply.status, 200, "{reply:?}");
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let (asked, said) = renew(&gateway);
        assert!(asked, "{said}");
        let second = until("another one is served", DEADLINE, || {
            Some(gateway.served_serial("chat.test")).filter(|serial| *serial != first && !serial.is_empty())
        });
        stop.store(true, Ordering::Relaxed);
        second
    });
    assert!(count.into_inner() > 10);
    assert_eq!(std::fs::read(&account).expect("the account"), account_before, "one account for all");

    // No secret is said, and after a restart, without the authority, all is as it was.
    drop(pebble);
    let mut gateway = gateway;
    let said = gateway.process().stderr();
    assert!(!said.contains("PRIVATE KEY") && !said.contains("key_pkcs8"), "{said}");
    assert!(said.contains("certificate-issued"), "{said}");
    drop(gateway);
    let (gateway, _) = start(&bundle);
    assert_eq!(gateway.served_serial("chat.test"), second);
    assert_eq!(ask(&gateway, "www.chat.test", &root).send().status, 200);
    assert_eq!(orders(&gateway, "issued") + orders(&gateway, "failed"), 0.0, "it is not asked for anew");
}

#[test]
fn certificates_are_got_and_renewed_by_http_01() {
    obtained_renewed_and_kept("http-01", false);
}

/// With an account of an authority that binds it to another one (RFC 8555 §7.3.4).
#[test]
fn certificates_are_got_and_renewed_by_tls_alpn_01() {
    obtained_renewed_and_kept("tls-alpn-01", true);
}

/// What cannot be validated is not had: what the authority says of it is logged, and another way is tried next.
#[test]
fn what_cannot_be_validated_is_said_and_another_way_is_tried() {
    let port = free_port();
    let bundle = bundle(port, "challenges = [\"http-01\", \"tls-alpn-01\"]");
    // No listener for plain HTTP: the first way leads nowhere.
    let mut gateway = Gateway::run(&bundle);
    until("an attempt has failed", DEADLINE, || (orders(&gateway, "failed") >= 1.0).then_some(()));
    let pebble = Pebble::start(&bundle, port, free_port(), gateway.port());
    // Attempts take turns: the second begins with TLS.
    let root = pebble.root(bundle.folder());
    renew(&gateway);
    until("it is served", DEADLINE, || {
        Some(gateway.served_serial("chat.test")).filter(|serial| !serial.is_empty())
    });
    assert_eq!(ask(&gateway, "chat.test", &root).send().status, 200);
    // And the third with HTTP, which fails: the certificate stays.
    let before = gateway.served_serial("chat.test");
    let failed = orders(&gateway, "failed");
    renew(&gateway);
    until("an attempt has failed", DEADLINE, || (orders(&gateway, "failed") > failed).then_some(()));
    assert_eq!(gateway.served_serial("chat.test"), before);
    let said = gateway.process().stderr();
    assert!(said.contains("urn:ietf:params:acme:error:connection"), "{said}");
    assert_eq!(ask(&gateway, "chat.test", &root).send().status, 200);
}

/// RFC 8737 §3: the protocol of validations is there for validations only.
#[test]
fn nobody_else_gets_the_protocol_of_validations() {
    let bundle = bundle(free_port(), "");
    let (gateway, _) = start(&bundle);
    for name in ["localhost", "chat.test", "elsewhere.test"] {
        let output = Command::new("openssl")
            .args(["s_client", "-connect", &gateway.address().to_string(), "-servername", name])
            .args(["-alpn", "acme-tls/1"])
            .stdin(Stdio::null())
            .output()
            .expect("openssl runs");
        let said = String::from_utf8_lossy(&output.stderr);
        let expected = if name == "chat.test" { "unrecognized name" } else { "no application protocol" };
        assert!(said.contains(expected), "{name}: {said}");
    }
}

/// What is awaited is no error of the policy, and is told of; and a gateway that starts again does not ask again at once.
#[test]
fn awaited_certificates_are_told_of_and_a_restart_does_not_ask_at_once() {
    let bundle = bundle(free_port(), "");
    let (gateway, _) = start(&bundle);
    until("an attempt has failed", DEADLINE, || (orders(&gateway, "failed") >= 1.0).then_some(()));
    drop(gateway);
    let output = sealgate(&[&"check", &"--policy", &bundle.policy(), &"--state", &bundle.state()]);
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(
        output.status.success() && said.contains("chat.test") && said.contains("not issued yet"),
        "{said}"
    );

    let (gateway, _) = start(&bundle);
    let (asked, said) = renew(&gateway);
    assert!(asked, "{said}");
    until("an attempt has failed", DEADLINE, || (orders(&gateway, "failed") >= 1.0).then_some(()));
    // One that was asked for, and none by itself.
    assert_eq!(orders(&gateway, "failed"), 1.0);
}

/// Row T-1: `http://` is sent on with 308, `ws://` is refused, and nothing is served.
#[test]
fn t1_plain_http_is_sent_on_and_plain_websockets_are_refused() {
    let bundle = Bundle::new(RULES);
    let port = free_port();
    let gateway = Gateway::run_with(&bundle, |command| {
        command.args(["--http", &format!("127.0.0.1:{port}"), "--https-port", "9443"]);
    });
    let plain = |path: &str| curl(&format!("http://localhost:{port}{path}"), gateway.ca());
    for method in ["GET", "HEAD", "POST", "DELETE"] {
        let asked = plain("/open?a=1");
        let asked = if method == "HEAD" { asked.args(["--head"]) } else { asked.method(method) };
        let reply = asked.send();
        assert_eq!(reply.status, 308, "{method}: {reply:?}");
        assert_eq!(reply.header("location"), Some("https://localhost:9443/open?a=1"));
        // Browsers would not take it over plain HTTP, and should not (RFC 6797 §7.2).
        assert_eq!(reply.header("strict-transport-security"), None);
    }
    let upgrade = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"];
    let asked = upgrade.iter().fold(plain("/open"), |asked, line| asked.header(line));
    let refused = asked.header("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==").send();
    assert_eq!(refused.problem(403), "urn:sealgate:problem:plain-http");
    let elsewhere = plain("/open").header("Host: elsewhere.test").send();
    assert_eq!(elsewhere.problem(421), "urn:sealgate:problem:misdirected");
    let unknown = plain("/.well-known/acme-challenge/abc").send();
    assert_eq!(unknown.status, 308);
    assert_eq!(bundle.upstream.seen().len(), 0);
    let metrics = gateway.metrics();
    assert_eq!(metrics.sum("sealgate_plain_requests_total", &[("outcome", "redirected")]), 5.0);
    assert_eq!(metrics.sum("sealgate_plain_requests_total", &[("outcome", "refused")]), 2.0);
}

/// What is no HTTP, silent, slow or endless ends in time, and others are answered meanwhile.
#[test]
fn plain_http_bears_what_is_no_http() {
    let bundle = Bundle::new(&format!("[connections]\nheader_timeout = \"1s\"\n{RULES}"));
    let (gateway, port) = start(&bundle);
    let open = |bytes: &[u8]| {
        let mut socket = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        let _ = socket.write_all(bytes);
        socket
    };
    let begun = Instant::now();
    let long = [b"GET /".as_slice(), &[b'a'; 70_000]].concat();
    let mut waiting: Vec<_> =
        [b"".as_slice(), b"GET / HT", b"\x16\x03\x01\x02\x00\x01", b"junk\r\n\r\n", &long]
            .into_iter()
            .map(open)
            .collect();
    let reply = curl(&format!("http://localhost:{port}/open"), gateway.ca()).send();
    assert_eq!(reply.status, 308);
    for socket in &mut waiting {
        let mut said = Vec::new();
        let _ = socket.read_to_end(&mut said);
        assert!(said.is_empty() || said.starts_with(b"HTTP/1.1 4"), "{}", String::from_utf8_lossy(&said));
    }
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    // One request for each connection.
    let mut twice = open(&b"GET /a HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(2));
    let mut said = String::new();
    twice.read_to_string(&mut said).expect("an answer");
    assert_eq!(said.matches("HTTP/1.1 308").count(), 1, "{said}");
}

/// Renewal information (ARI, RFC 9773), which Debian's pebble does not have: stands before one, adds it to the directory and to orders,
/// and passes all else on.
struct Advisor {
    /// What certificates it was asked about.
    asked: Mutex<Vec<String>>,
    /// What orders said that they replace.
    replaced: Mutex<Vec<String>>,
}

impl Advisor {
    /// Advises to renew at once, whatever the certificate.
    fn start(bundle: &Bundle, pebble: u16) -> (Arc<Advisor>, u16) {
        let chain =
            vec![CertificateDer::from_pem_file(bundle.pki.path("pebble.pem")).expect("a certificate")];
        let key = PrivateKeyDer::from_pem_file(bundle.pki.path("pebble.key")).expect("a key");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .expect("a server");
        let (config, ca) = (Arc::new(config), bundle.pki.ca());
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let advisor = Arc::new(Advisor { asked: Mutex::default(), replaced: Mutex::default() });
        let ours = advisor.clone();
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let (config, ca, advisor) = (config.clone(), ca.clone(), ours.clone());
                std::thread::spawn(move || {
                    let connection = ServerConnection::new(config).expect("a connection");
                    let mut stream = StreamOwned::new(connection, socket);
                    if let Some(answer) = advisor.answer(&mut stream, &ca, pebble, port) {
                        let _ = stream.write_all(&answer);
                        stream.conn.send_close_notify();
                        let _ = stream.flush();
                    }
                });
            }
        });
        (advisor, port)
    }

    fn answer(&self, client: &mut impl Read, ca: &Path, pebble: u16, port: u16) -> Option<Vec<u8>> {
        let (head, body) = read_http(client)?;
        let target = head.split(' ').nth(1)?.to_owned();
        if let Some(certificate) = target.strip_prefix("/advice/") {
            self.asked.lock().unwrap().push(certificate.to_owned());
            let window = json!({ "suggestedWindow": { "start": "2020-01-01T00:00:00Z", "end": "2020-01-02T00:00:00Z" } });
            return Some(http_answer("HTTP/1.1 200 OK\r\nRetry-After: 21600", &window));
        }
        let config = Arc::new(client_config(ca, &["http/1.1"], None, ALL_VERSIONS));
        let mut server = Wire::with(([127, 0, 0, 1], pebble).into(), &config, "localhost").into_stream();
        let head_to = head.replacen("\r\n", "\r\nConnection: close\r\n", 1);
        server.write_all(&[head_to.as_bytes(), &body].concat()).ok()?;
        let mut answer = Vec::new();
        let _ = server.read_to_end(&mut answer);
        let replaced = (target == "/order-plz").then(|| said_to_replace(&body)).flatten();
        if target != "/dir" && replaced.is_none() {
            return Some(answer);
        }
        let end = answer.windows(4).position(|four| four == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&answer[..end]).into_owned();
        let mut value: Value = serde_json::from_slice(&answer[end + 4..]).ok()?;
        if target == "/dir" {
            value["renewalInfo"] = format!("https://localhost:{port}/advice").into();
        }
        if let Some(replaced) = replaced.filter(|_| head.starts_with("HTTP/1.1 201")) {
            self.replaced.lock().unwrap().push(replaced.clone());
            value["replaces"] = replaced.into();
        }
        let kept = head.split("\r\n").filter(|line| !line.to_ascii_lowercase().starts_with("content-length"));
        Some(http_answer(&kept.collect::<Vec<_>>().join("\r\n"), &value))
    }
}

fn http_answer(head: &str, body: &Value) -> Vec<u8> {
    let body = body.to_string();
    format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// Head and body of one request.
fn read_http(stream: &mut impl Read) -> Option<(String, Vec<u8>)> {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8_lossy(&bytes[..end + 4]).into_owned();
            let length = head.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
            });
            if bytes.len() >= end + 4 + length.unwrap_or(0) {
                return Some((head, bytes.split_off(end + 4)));
            }
        }
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return None,
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
        }
    }
}

/// `replaces` of a new order, which is signed (RFC 7515).
fn said_to_replace(body: &[u8]) -> Option<String> {
    let signed: Value = serde_json::from_slice(body).ok()?;
    let payload = URL_SAFE_NO_PAD.decode(signed["payload"].as_str()?).ok()?;
    let order: Value = serde_json::from_slice(&payload).ok()?;
    order["replaces"].as_str().map(str::to_owned)
}

/// RFC 9773: the authority's advice is asked for and followed, and it is told which certificate the new one replaces. An authority that
/// always says "now" is not asked without end.
#[test]
fn the_authoritys_advice_on_renewal_is_followed() {
    let (port, http) = (free_port(), free_port());
    let bundle = Bundle::new(RULES);
    bundle.pki.issue("pebble", &["localhost", "127.0.0.1"]);
    let (advisor, advised) = Advisor::start(&bundle, port);
    bundle.write(&format!(
        "[[certificate]]\nnames = [\"chat.test\"]\nacme = \"pebble\"\n[[acme]]\nname = \"pebble\"\n\
         directory = \"https://localhost:{advised}/dir\"\nterms_agreed = true\n\
         ca = \"file:${{state}}/certs/ca.pem\"\nchallenges = [\"http-01\"]\n{RULES}"
    ));
    let settings = Settings { validity: Some(400), ..Settings::default() };
    let _pebble = Pebble::start_with(&bundle, port, http, free_port(), settings);
    let gateway = Gateway::run_with(&bundle, |command| {
        command.args(["--http", &format!("127.0.0.1:{http}")]);
    });
    let first = until("it is served", DEADLINE, || {
        Some(gateway.served_serial("chat.test")).filter(|serial| !serial.is_empty())
    });
    until("it is replaced", DEADLINE, || {
        Some(gateway.served_serial("chat.test")).filter(|serial| *serial != first && !serial.is_empty())
    });
    let (asked, replaced) = (advisor.asked.lock().unwrap().clone(), advisor.replaced.lock().unwrap().clone());
    assert!(!asked.is_empty() && asked.first() == replaced.first(), "{asked:?}, {replaced:?}");
    // RFC 9773 §4.1: the second part is the serial number.
    let serial = replaced[0].split_once('.').expect("two parts").1;
    let serial = URL_SAFE_NO_PAD.decode(serial).expect("base64url");
    let digits: String = serial.iter().map(|byte| format!("{byte:02X}")).collect();
    assert_eq!(digits.trim_start_matches('0'), first.trim_start_matches('0'));
    // A hundredth of their time is between two.
    assert!(orders(&gateway, "issued") <= 6.0 && orders(&gateway, "failed") == 0.0);
}
