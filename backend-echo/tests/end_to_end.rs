//! Two people, the real client on both sides, the real backend between them, which sees ciphertext only (E-1).

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that meets the unexpected has failed"
)]

mod common;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use backend_echo::wire::DeviceAddress;
use common::{Backend, DEADLINE, Identity, found, until};
use http::{HeaderValue, Request, Response, StatusCode};
use http_body_util::BodyExt;
use http_body_util::combinators::BoxBody;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::{TcpListener, UnixStream};
use tokio::process::{Child, ChildStdout, Command};
use tokio_rustls::TlsAcceptor;

/// Stands where the gateway stands: TLS in front, and the bearer's identity in headers behind. It judges nothing: that
/// is the gateway's part, and tested with the gateway.
async fn edge(backend: &Backend) -> PathBuf {
    let state = backend.state();
    let files = sealgate_keys::dev::DevAuthority::open_or_create(&state.join("certs"), &[]).unwrap();
    let chain = CertificateDer::from_pem_file(&files.chain).unwrap();
    let key = PrivateKeyDer::from_pem_file(&files.key).unwrap();
    let provider = sealgate_keys::provider(&sealgate_keys::ProviderChoice::default());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![chain], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("https://{}", listener.local_addr().unwrap());
    let socket = backend.socket();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (acceptor, socket) = (acceptor.clone(), socket.clone());
            tokio::spawn(async move {
                let stream = acceptor.accept(stream).await.unwrap();
                let service = service_fn(move |request| forward(socket.clone(), request));
                let http = hyper::server::conn::http1::Builder::new();
                let _ = http.serve_connection(TokioIo::new(stream), service).with_upgrades().await;
            });
        }
    });
    let dev = state.join("dev.json");
    std::fs::write(&dev, json!({ "url": url, "ca": files.ca, "policy": "and more" }).to_string()).unwrap();
    dev
}

async fn forward(
    socket: PathBuf,
    mut request: Request<Incoming>,
) -> Result<Response<BoxBody<bytes::Bytes, hyper::Error>>, hyper::Error> {
    if let Some(token) = request.headers_mut().remove("authorization") {
        let token = token.to_str().unwrap().strip_prefix("Bearer ").unwrap().to_owned();
        for (name, value) in Identity::of(&token).headers() {
            request.headers_mut().insert(name, HeaderValue::from_str(&value).unwrap());
        }
    }
    let Ok(stream) = UnixStream::connect(socket).await else {
        let mut away = Response::new(BoxBody::default());
        *away.status_mut() = StatusCode::BAD_GATEWAY;
        return Ok(away);
    };
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection.with_upgrades());
    let client = hyper::upgrade::on(&mut request);
    let mut response = sender.send_request(request).await?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let backend = hyper::upgrade::on(&mut response);
        tokio::spawn(async move {
            let (client, backend) = tokio::try_join!(client, backend).unwrap();
            let _ =
                tokio::io::copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(backend)).await;
        });
    }
    Ok(response.map(BodyExt::boxed))
}

fn im(dev: &Path, user: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_im"));
    command.arg("--dev").arg(dev).args(["--user", user]).kill_on_drop(true);
    command
}

/// What it printed, if it ended well; what it complained of otherwise.
async fn run(mut command: Command) -> Result<String, String> {
    let output = tokio::time::timeout(DEADLINE, command.output()).await.expect("it ends").unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

async fn send(dev: &Path, from: &str, to: &str, text: &str) -> Result<String, String> {
    let mut command = im(dev, from);
    command.args(["send", to, text]);
    run(command).await
}

async fn listen(dev: &Path, user: &str, count: &str) -> Result<String, String> {
    let mut command = im(dev, user);
    command.args(["listen", "--count", count, "--timeout", "20"]);
    run(command).await
}

struct Listener {
    lines: Lines<BufReader<ChildStdout>>,
    _process: Child,
}

impl Listener {
    fn start(mut command: Command) -> Self {
        let mut process = command.arg("listen").stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { lines, _process: process }
    }

    async fn line(&mut self) -> String {
        let line = tokio::time::timeout(DEADLINE, self.lines.next_line()).await;
        line.expect("a line comes").unwrap().expect("it still runs")
    }
}

#[tokio::test]
async fn e1_a_conversation_is_readable_at_its_ends_only() {
    let backend = Backend::start().await;
    let dev = edge(&backend).await;
    let canary = "canary: the plans are under the old oak";

    let error = send(&dev, "alice", "bob", canary).await.unwrap_err();
    assert!(error.contains("bob has no device yet"), "{error}");
    let mut register = im(&dev, "bob");
    register.arg("register");
    assert!(run(register).await.unwrap().contains("50 one-time keys"));

    // Stored while bob is away; it is in the database, and unreadable there.
    assert_eq!(send(&dev, "alice", "bob", canary).await.unwrap(), "sent to bob (1 device)\n");
    assert!(found(&backend.state().join("backend"), b"e2e:alice:bob"), "the row is there");
    assert!(!found(&backend.state(), canary.as_bytes()));
    assert!(!found(&backend.state(), b"old oak"));
    assert_eq!(listen(&dev, "bob", "1").await.unwrap(), format!("alice: {canary}\n"));

    // Live, both ways, in order; bob listens and sends at the same time.
    let mut bob = Listener::start(im(&dev, "bob"));
    send(&dev, "alice", "bob", "are you there?").await.unwrap();
    assert_eq!(bob.line().await, "alice: are you there?");
    let mut alice = Listener::start(im(&dev, "alice"));
    for number in 0..3 {
        send(&dev, "bob", "alice", &format!("yes {number}")).await.unwrap();
        assert_eq!(alice.line().await, format!("bob: yes {number}"));
        send(&dev, "alice", "bob", &format!("good {number}")).await.unwrap();
        assert_eq!(bob.line().await, format!("alice: good {number}"));
    }
    for secret in [canary, "are you there?", "yes 0", "good 2"] {
        assert!(!found(&backend.state(), secret.as_bytes()), "{secret}");
    }
}

#[tokio::test]
async fn e2_every_device_of_a_user_gets_the_message() {
    let backend = Backend::start().await;
    let dev = edge(&backend).await;
    for device in ["phone", "tablet"] {
        let mut command = im(&dev, "bob");
        command.args(["--device", device, "register"]);
        run(command).await.unwrap();
    }
    assert_eq!(send(&dev, "alice", "bob", "twice").await.unwrap(), "sent to bob (2 devices)\n");
    for device in ["phone", "tablet"] {
        let mut command = im(&dev, "bob");
        command.args(["--device", device, "listen", "--count", "1", "--timeout", "20"]);
        assert_eq!(run(command).await.unwrap(), "alice: twice\n");
    }
}

#[tokio::test]
async fn a_listener_outlives_the_backend() {
    let mut backend = Backend::start().await;
    let dev = edge(&backend).await;
    let mut bob = Listener::start(im(&dev, "bob"));
    until("bob is there", async || send(&dev, "alice", "bob", "one").await.is_ok()).await;
    assert_eq!(bob.line().await, "alice: one");
    backend.stop().await;
    backend.start_with(|_| ()).await;
    send(&dev, "alice", "bob", "two").await.unwrap();
    assert_eq!(bob.line().await, "alice: two");
}

#[tokio::test]
async fn a_message_that_did_not_get_through_goes_out_with_the_next() {
    let mut backend = Backend::start().await;
    let dev = edge(&backend).await;
    let mut register = im(&dev, "bob");
    register.arg("register");
    run(register).await.unwrap();
    send(&dev, "alice", "bob", "one").await.unwrap();
    backend.stop().await;
    assert!(send(&dev, "alice", "bob", "lost before it was encrypted").await.is_err());
    backend.start_with(|_| ()).await;
    send(&dev, "alice", "bob", "two").await.unwrap();
    assert_eq!(listen(&dev, "bob", "2").await.unwrap(), "alice: one\nalice: two\n");
}

#[tokio::test]
async fn im_says_what_is_wrong() {
    let backend = Backend::start().await;
    let dev = edge(&backend).await;
    let error = send(&dev, "mallory", "bob", "hello").await.unwrap_err();
    assert!(error.contains("demo users only") && error.contains("unknown-user"), "{error}");
    let error = send(&dev, "alice", "alice", "hello").await.unwrap_err();
    assert!(error.contains("someone else"), "{error}");
    let error = send(&dev, "alice", "bob", &"x".repeat(20_000)).await.unwrap_err();
    assert!(error.contains("16384"), "{error}");
    let error = send(Path::new("/nonexistent/dev.json"), "alice", "bob", "hello").await.unwrap_err();
    assert!(error.contains("sealgate dev"), "{error}");
    let mut command = im(&dev, "bob");
    command.args(["listen", "--count", "1", "--timeout", "1"]);
    assert!(run(command).await.unwrap_err().contains("fewer than 1"));

    // A gateway that another authority vouches for is not talked to.
    let other = tempfile::tempdir().unwrap();
    let files = sealgate_keys::dev::DevAuthority::open_or_create(&other.path().join("certs"), &[]).unwrap();
    let url: serde_json::Value = serde_json::from_slice(&std::fs::read(&dev).unwrap()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_im"));
    command.args(["--url", url["url"].as_str().unwrap(), "--ca"]).arg(&files.ca);
    command.arg("--state").arg(other.path().join("im")).args(["--user", "alice", "register"]);
    let error = run(command).await.unwrap_err();
    assert!(error.contains("certificate"), "{error}");
}

#[tokio::test]
async fn a_device_keeps_its_name_and_its_files_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let backend = Backend::start().await;
    let dev = edge(&backend).await;
    let name = async || {
        let mut register = im(&dev, "bob");
        register.arg("register");
        run(register).await.unwrap().split(' ').next().unwrap().to_owned()
    };
    let first = name().await;
    assert!(first.starts_with("bob/im-"), "{first}");
    assert_eq!(first, name().await);
    let folder = backend.state().join("im/bob");
    assert_eq!(std::fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
    let address = DeviceAddress { user: "bob".parse().unwrap(), device: first[4..].parse().unwrap() };
    assert_eq!(address.to_string(), first);
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
    }
}
