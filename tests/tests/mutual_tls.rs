//! Client certificates: asked for by name and port, verified with revocation lists, wanted by rules, told upstream, and what tokens
//! are bound to (RFC 8705). A change of what is good reaches sessions to be resumed, and connections and sockets that are open.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, HandshakeKind};
use sealgate_tests::{
    ALL_VERSIONS, Bundle, Client, DEADLINE, Driver, Gateway, Open, Pki, Reply, Wire, client_config, frame,
    until,
};
use serde_json::json;

const CLIENT: &str = r#"
[tls.client]
mode = "request"
ca = "file:${state}/clients/ca.pem"
crls = ["file:${state}/clients/list.pem"]
"#;

const RULES: &str = r#"
[[route]]
name = "mine"
path = "/mine"
methods = ["GET"]
upstream = "backend"

[[route]]
name = "bound"
path = "/bound"
methods = ["GET"]
upstream = "backend"
sender = "mtls"

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

[[route]]
name = "bots"
path = "/bots"
methods = ["GET"]
upstream = "backend"
auth = "none"
client_certificate = "required"
client_names = ["dns:*.bots.test", "subject:CN=chief"]

[[route]]
name = "held"
path = "/hold/{id}"
methods = ["GET"]
upstream = "backend"
auth = "none"

[[route]]
name = "ticket"
path = "/ticket"
methods = ["POST"]
ticket = {}

[[websocket]]
name = "socket"
path = "/ws/{room}"
upstream = "backend"
origins = ["*"]
renew = { type = "auth.renew", token_pointer = "/token", min_interval = "100ms" }
[[websocket.message]]
type = "say"
direction = "both"
"#;

const SAY: &str = r#"{"type":"say"}"#;

/// A bundle, and the authority of its clients.
struct Setting {
    bundle: Bundle,
    clients: Pki,
    alice: String,
}

impl Setting {
    fn new(policy: &str) -> Setting {
        let bundle = Bundle::new("");
        let clients = Pki::new(&bundle.state().join("clients"));
        let alice = clients.issue("alice", &["alice.bots.test"]);
        clients.issue("bob", &["bob.test"]);
        clients.issue("chief", &["chief.test"]);
        clients.revoke("list.pem", &[], 3600);
        bundle.write(policy);
        Setting { bundle, clients, alice }
    }

    fn pair(&self, name: &str) -> (PathBuf, PathBuf) {
        (self.clients.path(&format!("{name}.pem")), self.clients.path(&format!("{name}.key")))
    }

    /// A client with that certificate; none for "".
    fn config(&self, name: &str, alpn: &str) -> Arc<ClientConfig> {
        let (certificate, key) = self.pair(name);
        let identity = (!name.is_empty()).then_some((&*certificate, &*key));
        Arc::new(client_config(&self.bundle.pki.ca(), &[alpn], identity, ALL_VERSIONS))
    }

    fn wire(&self, gateway: &Gateway, name: &str) -> Wire {
        Wire::with(gateway.address(), &self.config(name, "http/1.1"), "localhost")
    }

    /// A token for alice that is bound to that certificate.
    fn token(&self, name: &str) -> String {
        let claims = json!({ "cnf": { "x5t#S256": self.clients.thumbprint(name) } });
        self.bundle.issuer.with("alice", claims)
    }
}

fn get(wire: &mut Wire, path: &str, fields: &[String]) -> Option<Reply> {
    let lines: String = fields.iter().map(|field| format!("{field}\r\n")).collect();
    wire.send(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n"));
    wire.response()
}

fn bearer(token: &str) -> Vec<String> {
    vec![format!("Authorization: Bearer {token}")]
}

#[track_caller]
fn refused(reply: &Reply, status: u16, reason: &str) {
    assert_eq!(reply.problem(status), format!("urn:sealgate:problem:{reason}"));
    if status == 401 {
        let challenge = reply.header("www-authenticate").unwrap_or_default();
        assert!(
            challenge.starts_with("Bearer ") && challenge.contains("error=\"invalid_token\""),
            "{challenge}"
        );
    }
}

#[test]
fn a3_a_token_of_a_certificate_counts_on_its_connection_only() {
    let setting = Setting::new(&format!("{CLIENT}{RULES}"));
    let gateway = Gateway::run(&setting.bundle);
    let token = setting.token("alice");
    let plain = setting.bundle.issuer.token("alice");

    let mut alice = setting.wire(&gateway, "alice");
    for path in ["/mine", "/bound"] {
        assert_eq!(get(&mut alice, path, &bearer(&token)).unwrap().status, 200, "{path}");
    }
    assert_eq!(get(&mut alice, "/mine", &bearer(&plain)).unwrap().status, 200, "not bound, and need not be");
    let upgrade = setting.wire(&gateway, "alice").upgrade("/ws/a", &format!("{}\r\n", bearer(&token)[0]));
    assert_eq!(upgrade.status, 101);
    let (certificate, key) = setting.pair("alice");
    let curl = || {
        gateway.curl("/bound").args(["--http2", "--cert"]).args([&certificate]).args(["--key"]).args([&key])
    };
    let reply = curl().token(&token).send();
    assert_eq!((reply.status, reply.version.as_str()), (200, "HTTP/2"));
    let seen = setting.bundle.upstream.seen().len();

    // The same token, by whoever has not the key: over HTTP, over an upgrade, in the subprotocol list, over HTTP/2.
    for thief in ["", "bob"] {
        for path in ["/mine", "/bound"] {
            let reply = get(&mut setting.wire(&gateway, thief), path, &bearer(&token)).unwrap();
            refused(&reply, 401, "certificate-missing");
        }
        for field in [bearer(&token).remove(0), format!("Sec-WebSocket-Protocol: sealgate.bearer.{token}")] {
            let reply = setting.wire(&gateway, thief).upgrade("/ws/a", &format!("{field}\r\n"));
            refused(&reply, 401, "certificate-missing");
        }
        let (certificate, key) = setting.pair(thief);
        let identity = (!thief.is_empty()).then_some((&*certificate, &*key));
        let mut driver = Driver::start_as(Client::Http2, gateway.ca(), identity);
        assert_eq!(driver.request("get", &gateway.url("/bound"), &token)["status"], 401);
        let told = driver.refused(
            "socket",
            &gateway.ws("/ws/a"),
            &Open::token(&token).origin("https://a.test"),
            401,
        );
        assert!(told.to_string().contains("certificate-missing"), "{told}");
    }
    // Confirmations that do not name this certificate, each for the holder of alice's.
    let print = setting.clients.thumbprint("alice");
    let flipped = format!("{}{}", if print.starts_with('A') { 'B' } else { 'A' }, &print[1..]);
    let with = |cnf: serde_json::Value| setting.bundle.issuer.with("alice", json!({ "cnf": cnf }));
    let cases = [
        (
            "of another certificate",
            with(json!({ "x5t#S256": setting.clients.thumbprint("bob") })),
            "certificate-missing",
        ),
        ("one bit off", with(json!({ "x5t#S256": flipped })), "certificate-missing"),
        ("padded", with(json!({ "x5t#S256": format!("{print}=") })), "token-invalid"),
        ("short", with(json!({ "x5t#S256": &print[..42] })), "token-invalid"),
        ("standard base64", with(json!({ "x5t#S256": format!("+/{}", &print[2..]) })), "token-invalid"),
        ("hexadecimal", with(json!({ "x5t#S256": "ab".repeat(32) })), "token-invalid"),
        ("a number", with(json!({ "x5t#S256": 1 })), "token-invalid"),
        ("a list", with(json!({ "x5t#S256": [print] })), "token-invalid"),
        ("null", with(json!({ "x5t#S256": null })), "token-invalid"),
        ("SHA-1", with(json!({ "x5t": print })), "token-invalid"),
        ("empty cnf", with(json!({})), "token-invalid"),
        ("cnf a text", with(json!(print)), "token-invalid"),
        ("a key too, without its proof", with(json!({ "x5t#S256": print, "jkt": print })), "proof-missing"),
    ];
    for (name, token, reason) in &cases {
        let reply = get(&mut setting.wire(&gateway, "alice"), "/mine", &bearer(token)).unwrap();
        assert_eq!(reply.problem(401), format!("urn:sealgate:problem:{reason}"), "{name}");
        let reply = setting.wire(&gateway, "alice").upgrade("/ws/a", &format!("{}\r\n", bearer(token)[0]));
        assert_eq!(reply.problem(401), format!("urn:sealgate:problem:{reason}"), "{name}");
    }
    let reply = get(&mut setting.wire(&gateway, "alice"), "/bound", &bearer(&plain)).unwrap();
    refused(&reply, 401, "token-invalid");
    assert_eq!(setting.bundle.upstream.seen().len(), seen, "the backend sees nothing of that");
}

#[test]
fn a3_an_issuer_may_demand_tokens_of_certificates() {
    let setting = Setting::new("");
    let base = Bundle::BASE.replacen("[[issuer]]\n", "[[issuer]]\nsender = \"mtls\"\n", 1);
    setting.bundle.write_file("policy.toml", &format!("{base}{CLIENT}{RULES}"));
    let gateway = Gateway::run(&setting.bundle);
    let mut alice = setting.wire(&gateway, "alice");
    refused(
        &get(&mut alice, "/mine", &bearer(&setting.bundle.issuer.token("alice"))).unwrap(),
        401,
        "token-invalid",
    );
    assert_eq!(get(&mut alice, "/mine", &bearer(&setting.token("alice"))).unwrap().status, 200);
    refused(&get(&mut alice, "/mine", &bearer(&setting.token("bob"))).unwrap(), 401, "certificate-missing");
}

#[test]
fn a3_a_socket_goes_on_under_a_token_of_the_same_certificate_only() {
    let setting = Setting::new(&format!("{CLIENT}{RULES}"));
    let gateway = Gateway::run(&setting.bundle);
    let say = |token: &str| json!({ "type": "auth.renew", "token": token }).to_string();
    for (new, outcome) in [("alice", None), ("bob", Some(4403))] {
        let mut wire = setting.wire(&gateway, "alice");
        let reply = wire.upgrade("/ws/a", &format!("{}\r\n", bearer(&setting.token("alice"))[0]));
        assert_eq!(reply.status, 101, "{reply:?}");
        wire.send(frame(0x81, say(&setting.token(new)).as_bytes()));
        let answer = wire.message().expect("an answer");
        match outcome {
            None => assert!(String::from_utf8_lossy(&answer.payload).contains("auth.renew.ok"), "{answer:?}"),
            Some(code) => assert_eq!(answer.close().0, code),
        }
    }
}

/// Over HTTP/2 too, where the socket is one stream of its connection.
#[test]
fn a3_tickets_and_sockets_over_http2_belong_to_the_certificate() {
    let setting = Setting::new(&format!("{CLIENT}{RULES}"));
    let gateway = Gateway::run(&setting.bundle);
    let token = setting.token("alice");
    let (certificate, key) = setting.pair("alice");
    let mut driver = Driver::start_as(Client::Http2, gateway.ca(), Some((&certificate, &key)));
    driver.open("a", &gateway.ws("/ws/a"), &Open::token(&token).origin("https://a.test"));
    driver.echo("a", SAY);
    driver.text("a", &json!({ "type": "auth.renew", "token": setting.token("bob") }).to_string());
    driver.expect_close("a", 4403);

    let ticket = |wire: &mut Wire| {
        wire.send(format!(
            "POST /ticket HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nOrigin: https://a.test\r\n{}\r\n\r\n",
            bearer(&token)[0]
        ));
        let reply = wire.response().expect("a ticket");
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.json()["ticket"].as_str().expect("a ticket").to_owned()
    };
    let open = |name: &str, ticket: &str| {
        let fields =
            format!("Origin: https://a.test\r\nSec-WebSocket-Protocol: sealgate.ticket.{ticket}\r\n");
        setting.wire(&gateway, name).upgrade("/ws/a", &fields)
    };
    let mut alice = setting.wire(&gateway, "alice");
    let good = ticket(&mut alice);
    assert_eq!(open("alice", &good).status, 101);
    for thief in ["bob", ""] {
        let stolen = ticket(&mut alice);
        refused(&open(thief, &stolen), 401, "certificate-missing");
    }
}

#[test]
fn a_rule_may_want_a_certificate_and_a_name_in_it() {
    let setting = Setting::new(&format!("{CLIENT}{RULES}"));
    let gateway = Gateway::run(&setting.bundle);
    for (name, open, certified, bots) in [
        ("", 200, Err("client-certificate-missing"), Err("client-certificate-missing")),
        ("alice", 200, Ok(()), Ok(())),
        ("bob", 200, Ok(()), Err("client-certificate-not-allowed")),
        ("chief", 200, Ok(()), Ok(())),
    ] {
        let mut wire = setting.wire(&gateway, name);
        assert_eq!(get(&mut wire, "/open", &[]).unwrap().status, open);
        for (path, expected) in [("/certified", certified), ("/bots", bots)] {
            let reply = get(&mut wire, path, &[]).unwrap();
            match expected {
                Ok(()) => assert_eq!(reply.status, 200, "{name} {path}"),
                Err(reason) => refused(&reply, 403, reason),
            }
        }
    }
}

#[test]
fn upstreams_are_told_of_the_certificate_and_of_no_forged_one() {
    let setting = Setting::new(&format!("{CLIENT}{RULES}"));
    let gateway = Gateway::run(&setting.bundle);
    let forged = || {
        [
            "Client-Cert: :AAAA:",
            "Client-Cert-Chain: :AAAA:",
            "X-Sealgate-Client-Thumbprint: x",
            "Client_Cert: :AAAA:",
        ]
        .map(str::to_owned)
    };
    get(&mut setting.wire(&gateway, ""), "/open", &forged()).unwrap();
    let seen = setting.bundle.upstream.last();
    let told = seen.headers.iter().filter(|(name, _)| name.contains("client"));
    assert_eq!(told.count(), 0, "{seen:?}");

    get(&mut setting.wire(&gateway, "alice"), "/open", &forged()).unwrap();
    let seen = setting.bundle.upstream.last();
    let der = CertificateDer::from_pem_file(setting.pair("alice").0).unwrap();
    assert_eq!(seen.header("client-cert"), Some(&*format!(":{}:", STANDARD.encode(&der))));
    assert_eq!(seen.header("client-cert-chain"), None);
    assert_eq!(seen.header("x-sealgate-client-thumbprint"), Some(&*setting.clients.thumbprint("alice")));
    let reply = setting
        .wire(&gateway, "alice")
        .upgrade("/ws/a", &format!("{}\r\n", bearer(&setting.token("alice"))[0]));
    assert_eq!(reply.status, 101);
    assert!(setting.bundle.upstream.last().header("client-cert").is_some());

    setting.bundle.write(&format!("{}{RULES}", CLIENT.replace("mode =", "forward = \"none\"\nmode =")));
    let (fine, said) = gateway.reload();
    assert!(fine, "{said}");
    get(&mut setting.wire(&gateway, "alice"), "/certified", &[]).unwrap();
    assert_eq!(setting.bundle.upstream.last().header("client-cert"), None);
}

/// What the handshake itself refuses, in both versions of TLS, and the alert that goes with it.
#[test]
fn certificates_that_are_not_good_make_no_connection() {
    let setting = Setting::new(&format!("{CLIENT}{RULES}"));
    let stranger = Pki::new(&setting.bundle.folder().join("stranger"));
    stranger.issue("alice", &["alice.bots.test"]);
    let gateway = Gateway::run(&setting.bundle);
    let ca = setting.bundle.pki.ca();
    let attempt = |identity: Option<(&PathBuf, &PathBuf)>, version| {
        let identity = identity.map(|(certificate, key)| (certificate.as_path(), key.as_path()));
        let config = Arc::new(client_config(&ca, &["http/1.1"], identity, &[version]));
        let mut wire = Wire::with(gateway.address(), &config, "localhost");
        match wire.handshake() {
            Err(error) => Err(error.to_string()),
            Ok(()) => {
                wire.send("GET /open HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
                match wire.response() {
                    Some(reply) => Ok(reply.status),
                    None => Err(wire.fault().unwrap_or_default()),
                }
            }
        }
    };
    let (alice, foreign) = (setting.pair("alice"), (stranger.path("alice.pem"), stranger.path("alice.key")));
    let own = || Some((&alice.0, &alice.1));
    let reload = || {
        let (fine, said) = gateway.reload();
        assert!(fine, "{said}");
        said
    };
    for version in ALL_VERSIONS {
        assert_eq!(attempt(None, version), Ok(200));
        assert_eq!(attempt(own(), version), Ok(200));
        let said = attempt(Some((&foreign.0, &foreign.1)), version).unwrap_err();
        assert!(said.contains("UnknownCA"), "{said}");
    }
    // A key that is not the certificate's is no business of ours: no honest client sends it.
    setting.clients.revoke("list.pem", &[&setting.alice], 3600);
    reload();
    for version in ALL_VERSIONS {
        let said = attempt(own(), version).unwrap_err();
        assert!(said.contains("CertificateRevoked"), "{said}");
        assert_eq!(attempt(None, version), Ok(200));
    }
    // A list past its time covers nobody, whatever is in it.
    setting.clients.revoke("list.pem", &[], -10);
    reload();
    for version in ALL_VERSIONS {
        assert!(attempt(own(), version).is_err());
        assert_eq!(attempt(None, version), Ok(200));
    }
    setting.clients.revoke("list.pem", &[], 3600);
    reload();
    assert_eq!(attempt(own(), ALL_VERSIONS[0]), Ok(200));
    // A list that is gone, or no list, is an error of the policy: the one before stays.
    for broken in [None, Some("junk")] {
        match broken {
            None => std::fs::remove_file(setting.clients.path("list.pem")).unwrap(),
            Some(text) => std::fs::write(setting.clients.path("list.pem"), text).unwrap(),
        }
        let (fine, said) = gateway.reload();
        assert!(!fine && said.contains("tls.client.crls") && said.contains("list.pem"), "{said}");
        assert_eq!(attempt(own(), ALL_VERSIONS[0]), Ok(200));
    }
    setting.clients.revoke("list.pem", &[], 3600);
    setting.bundle.write(&format!("{}{RULES}", CLIENT.replace("request", "require")));
    reload();
    for version in ALL_VERSIONS {
        assert!(attempt(None, version).is_err());
        assert_eq!(attempt(own(), version), Ok(200));
    }
    let metrics = gateway.metrics();
    for reason in ["client-certificate-missing", "client-certificate-refused"] {
        let count = metrics.sum("sealgate_tls_handshake_failures_total", &[("reason", reason)]);
        assert!(count >= 2.0, "{reason}: {count}");
    }
}

/// Row K-4: no resumption skips a change of what is good.
#[test]
fn k4_a_resumed_session_never_skips_a_changed_client_certificate_policy() {
    let policy = |client: &str| format!("{client}{RULES}");
    let setting = Setting::new(&policy(CLIENT));
    let other = Pki::new(&setting.bundle.state().join("other"));
    let gateway = Gateway::run(&setting.bundle);
    let config = setting.config("alice", "http/1.1");
    let connect = || {
        let mut wire = Wire::with(gateway.address(), &config, "localhost");
        let reply = get(&mut wire, "/certified", &[]);
        (reply.map(|reply| reply.status), wire.tls().handshake_kind())
    };
    let reload = || {
        let (fine, said) = gateway.reload();
        assert!(fine, "{said}");
    };
    let (full, resumed) = (Some(HandshakeKind::Full), Some(HandshakeKind::Resumed));
    assert_eq!(connect(), (Some(200), full));
    assert_eq!(connect(), (Some(200), resumed));
    reload();
    assert_eq!(connect(), (Some(200), resumed), "nothing has changed");

    // Another list that still has it good, another mode, another authority beside it: a full handshake each time.
    setting.clients.revoke("list.pem", &["0A"], 3600);
    reload();
    assert_eq!(connect(), (Some(200), full));
    assert_eq!(connect(), (Some(200), resumed));
    setting.bundle.write(&policy(&CLIENT.replace("request", "require")));
    reload();
    assert_eq!(connect(), (Some(200), full));
    assert_eq!(connect(), (Some(200), resumed));
    let ours = std::fs::read_to_string(setting.clients.ca()).unwrap();
    let both = ours.clone() + &std::fs::read_to_string(other.ca()).unwrap();
    std::fs::write(setting.clients.path("ca.pem"), both).unwrap();
    reload();
    assert_eq!(connect(), (Some(200), full));
    assert_eq!(connect(), (Some(200), resumed));

    // And what is not good any more gets in by no ticket.
    setting.clients.revoke("list.pem", &[&setting.alice], 3600);
    reload();
    assert_eq!(connect().0, None);
    setting.clients.revoke("list.pem", &[], 3600);
    reload();
    assert_eq!(connect().0, Some(200));
    assert_eq!(connect(), (Some(200), resumed));
    std::fs::copy(other.ca(), setting.clients.path("ca.pem")).unwrap();
    setting.bundle.write(&policy(&CLIENT.replace("crls =", "# crls =")));
    reload();
    assert_eq!(connect().0, None);
}

/// Time passes too: a certificate that has ended since gets in by no ticket, though the ticket has not ended.
#[test]
fn k4_a_resumed_session_does_not_outlive_its_certificate() {
    let setting = Setting::new(&format!("{CLIENT}{RULES}"));
    // Certificates tell whole seconds.
    let end = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(sealgate_tests::now() + 5);
    let key = rcgen::KeyPair::generate().unwrap();
    setting.clients.issue_with("brief", &["brief.test"], key, |params| params.not_after = end.into());
    let gateway = Gateway::run(&setting.bundle);
    let config = setting.config("brief", "http/1.1");
    let connect = || {
        let mut wire = Wire::with(gateway.address(), &config, "localhost");
        let status = get(&mut wire, "/certified", &[]).map(|reply| reply.status);
        (status, wire.tls().handshake_kind())
    };
    assert_eq!(connect(), (Some(200), Some(HandshakeKind::Full)));
    let mut resumed = 0;
    until("it has ended", DEADLINE, || {
        let outcome = connect();
        resumed += usize::from(outcome == (Some(200), Some(HandshakeKind::Resumed)));
        (outcome.0.is_none()).then_some(())
    });
    assert!(resumed > 0 && std::time::SystemTime::now() >= end, "{resumed} resumed");
    assert_eq!(connect().0, None);
    assert_eq!(
        get(&mut setting.wire(&gateway, "alice"), "/certified", &[]).unwrap().status,
        200,
        "others get in"
    );
}

#[test]
fn what_is_open_under_a_revoked_certificate_is_closed() {
    let setting = Setting::new(&format!("{CLIENT}{RULES}"));
    setting.bundle.write(&format!("{CLIENT}{RULES}"));
    let gateway = Gateway::run(&setting.bundle);
    let socket = |name: &str| {
        let mut wire = setting.wire(&gateway, name);
        let token = setting.bundle.issuer.token("alice");
        assert_eq!(wire.upgrade("/ws/a", &format!("{}\r\n", bearer(&token)[0])).status, 101);
        wire
    };
    let idle = |name: &str| {
        let mut wire = setting.wire(&gateway, name);
        assert_eq!(get(&mut wire, "/open", &[]).unwrap().status, 200);
        wire
    };
    let (certificate, key) = setting.pair("alice");
    let mut driver = Driver::start_as(Client::Http2, gateway.ca(), Some((&certificate, &key)));
    let open = Open::token(&setting.bundle.issuer.token("alice")).origin("https://a.test");
    driver.open("h2", &gateway.ws("/ws/a"), &open);
    let (mut revoked, mut kept) = (socket("alice"), [socket("bob"), socket("")]);
    let (mut idle_revoked, mut idle_kept) = (idle("alice"), [idle("bob"), idle("")]);
    let mut busy = setting.wire(&gateway, "alice");
    busy.send("GET /hold/a HTTP/1.1\r\nHost: localhost\r\n\r\n");

    setting.clients.revoke("list.pem", &[&setting.alice], 3600);
    let (fine, said) = gateway.reload();
    assert!(fine, "{said}");
    assert_eq!(revoked.message().expect("a close").close().0, 1008);
    driver.expect_close("h2", 1008);
    assert!(idle_revoked.ended());
    assert!(busy.ended(), "in the middle of a request");
    for wire in &mut kept {
        wire.send(frame(0x81, SAY.as_bytes()));
        assert_eq!(wire.message().expect("an echo").payload, SAY.as_bytes());
    }
    for wire in &mut idle_kept {
        assert_eq!(get(wire, "/open", &[]).unwrap().status, 200);
    }
}

/// By the name that a client asks for, and by the port that it comes to.
#[test]
fn names_and_ports_ask_for_certificates_of_their_own() {
    let spare = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = spare.local_addr().unwrap().port();
    drop(spare);
    let overrides = format!(
        r#"
[[tls.client.override]]
names = ["admin.test", "*.bots.test"]
mode = "require"

[[tls.client.override]]
ports = [{port}]
mode = "require"

[[tls.client.override]]
names = ["public.test"]
mode = "none"
"#
    );
    let setting = Setting::new(&format!("{CLIENT}{overrides}{RULES}"));
    let names = ["localhost", "127.0.0.1", "admin.test", "a.bots.test", "public.test"];
    setting.bundle.pki.issue("server", &names);
    let gateway = Gateway::run_with(&setting.bundle, |command| {
        command.arg("--listen").arg(format!("127.0.0.1:{port}"));
    });
    let ask = |name: &str, who: &str, host: &str, port: u16| {
        let mut wire = Wire::with(([127, 0, 0, 1], port).into(), &setting.config(who, "http/1.1"), name);
        wire.send(format!("GET /open HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        wire.response().map(|reply| reply.status)
    };
    let first = gateway.port();
    for name in ["admin.test", "a.bots.test"] {
        assert_eq!(ask(name, "", name, first), None, "{name}");
        assert_eq!(ask(name, "alice", name, first), Some(200), "{name}");
    }
    for name in ["localhost", "public.test"] {
        assert_eq!(ask(name, "", name, first), Some(200));
        assert_eq!(ask(name, "alice", name, first), Some(200));
    }
    assert_eq!(ask("localhost", "", "localhost", port), None);
    assert_eq!(ask("localhost", "alice", "localhost", port), Some(200));

    // A connection that was made for one name cannot be used for another that asks otherwise (HTTP/2 coalescing).
    for (name, who, host) in [
        ("localhost", "", "admin.test"),
        ("localhost", "alice", "admin.test"),
        ("public.test", "", "a.bots.test"),
        ("public.test", "", "localhost"),
        ("admin.test", "alice", "localhost"),
    ] {
        assert_eq!(ask(name, who, host, first), Some(421), "{name} as {who:?} for {host}");
    }
    assert_eq!(ask("admin.test", "alice", "a.bots.test", first), Some(200), "what was asked is the same");
    let connect_to = format!("admin.test:{first}:localhost:{first}");
    let reply = gateway.curl("/open").args(["--connect-to", &connect_to]).header("Host: admin.test").send();
    assert_eq!((reply.status, reply.version.as_str()), (421, "HTTP/2"));
    // A ClientHello that is no such thing gets its alert, and one that never ends is not waited for.
    let mut raw = std::net::TcpStream::connect(gateway.address()).unwrap();
    std::io::Write::write_all(&mut raw, b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\xff").unwrap();
    raw.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut answer = Vec::new();
    std::io::Read::read_to_end(&mut raw, &mut answer).unwrap();
    assert_eq!(answer.first(), Some(&21), "an alert: {answer:x?}");
    let mut raw = std::net::TcpStream::connect(gateway.address()).unwrap();
    // A handshake message of 16 MiB in records of one byte.
    let mut flood = b"\x16\x03\x01\x00\x04\x01\xff\xff\xff".to_vec();
    flood.extend(b"\x16\x03\x01\x00\x01\x00".repeat(20_000));
    let _ = std::io::Write::write_all(&mut raw, &flood);
    raw.set_read_timeout(Some(DEADLINE)).unwrap();
    let ended = std::io::Read::read_to_end(&mut raw, &mut answer);
    assert!(!matches!(&ended, Err(error) if error.kind() == std::io::ErrorKind::WouldBlock), "{ended:?}");
    until("it serves on", DEADLINE, || (ask("localhost", "", "localhost", first) == Some(200)).then_some(()));
}

#[test]
fn a_policy_that_wants_certificates_nobody_is_asked_for_is_an_error() {
    let setting = Setting::new(&format!("{CLIENT}{RULES}"));
    let gateway = Gateway::run(&setting.bundle);
    for (client, part) in [
        ("", "no client is asked for one"),
        ("[tls.client]\nmode = \"require\"\n", "expected a ca"),
        ("[tls.client]\nmode = \"always\"\n", "tls.client.mode"),
        ("[tls.client]\nmode = \"require\"\nca = \"file:${state}/clients/none.pem\"\n", "tls.client.ca"),
        ("[tls.client]\nmode = \"require\"\nca = \"file:${state}/clients/alice.key\"\n", "tls.client.ca"),
    ] {
        setting.bundle.write(&format!("{client}{RULES}"));
        let (fine, said) = gateway.reload();
        assert!(!fine && said.contains(part), "{client}: {said}");
    }
    assert_eq!(get(&mut setting.wire(&gateway, "alice"), "/certified", &[]).unwrap().status, 200);
}
