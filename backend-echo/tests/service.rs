//! Listening, health, login, echo, and what the gateway's identity headers do.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that meets the unexpected has failed"
)]

mod common;

use std::os::unix::fs::PermissionsExt;

use backend_echo::{Options, demo_token, serve};
use bytes::Bytes;
use common::{Backend, DEADLINE, Identity, Socket};
use futures_util::{SinkExt, StreamExt};
use http::{Request, StatusCode};
use http_body_util::Full;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;

fn mode(path: &std::path::Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[tokio::test]
async fn everything_in_the_state_folder_is_private() {
    let backend = Backend::start().await;
    assert_eq!(backend.get("/healthz", None).await.json(), json!({ "status": "ok" }));
    let state = backend.state();
    assert_eq!(mode(&state), 0o700);
    assert_eq!(mode(&backend.socket()), 0o600);
    assert_eq!(mode(&state.join("backend")), 0o700);
    for name in ["store.sqlite", "store.sqlite-wal", "store.sqlite-shm", "token-signing.key"] {
        assert_eq!(mode(&state.join("backend").join(name)), 0o600, "{name}");
    }
}

#[tokio::test]
async fn a_stop_leaves_no_socket_and_a_second_start_keeps_keys_and_sessions() {
    let mut backend = Backend::start().await;
    let keys = backend.get("/.well-known/jwks.json", None).await.json();
    let alice = backend.log_in("alice", "phone").await;
    backend.stop().await;
    assert!(!backend.socket().exists());

    backend.start_with(|_| ()).await;
    let reply = backend.get("/.well-known/jwks.json", None).await;
    assert_eq!(reply.headers["content-type"], "application/jwk-set+json");
    assert_eq!(reply.json(), keys);
    let file: Value =
        serde_json::from_slice(&std::fs::read(backend.state().join("jwks.json")).unwrap()).unwrap();
    assert_eq!(file, keys, "the gateway reads the same keys");
    let (stream, refused) = (Some(&alice), Some("im.v1.json"));
    assert!(
        backend.socket_to("/v1/stream", stream, refused).await.is_ok(),
        "the session outlived the restart"
    );
}

#[tokio::test]
async fn a_stop_says_goodbye_to_open_sockets() {
    let mut backend = Backend::start().await;
    let mut socket = backend.socket_to("/v1/echo", None, None).await.unwrap();
    let (closed, ()) = tokio::join!(socket.closed(), backend.stop());
    assert_eq!(closed.0, 1001);
}

#[tokio::test]
async fn a_socket_of_the_dead_is_replaced_and_one_of_the_living_is_not() {
    let backend = Backend::start().await;
    let second =
        Options { state: backend.folder.path().join("other"), ..Options::development(&backend.state()) };
    let second = Options { listen: vec![backend_echo::Listen::Unix(backend.socket())], ..second };
    let error = serve(second.clone(), async {}).await.unwrap_err();
    assert!(format!("{error:#}").contains("already serves"), "{error:#}");
    assert_eq!(backend.get("/healthz", None).await.status, StatusCode::OK);

    let dead = backend.folder.path().join("dead.sock");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    let third = Options { listen: vec![backend_echo::Listen::Unix(dead.clone())], ..second.clone() };
    serve(third, async {}).await.unwrap();

    std::fs::write(&dead, "somebody's file").unwrap();
    let fourth = Options { listen: vec![backend_echo::Listen::Unix(dead.clone())], ..second };
    assert!(serve(fourth, async {}).await.is_err());
    assert!(dead.exists());
}

#[tokio::test]
async fn demo_users_get_tokens_and_nobody_else() {
    let backend = Backend::start().await;
    let token = demo_token(&backend.socket(), "alice", "demo").await.unwrap();
    assert_eq!(Identity::of(&token).roles, "user");
    assert_eq!(backend.log_in("carol", "desk").await.roles, "auditor");
    assert!(demo_token(&backend.socket(), "mallory", "demo").await.is_err());

    let login = async |body: Value| backend.post("/v1/dev/login", None, &body).await;
    let short = login(json!({ "user": "bob", "device": "phone", "lifetime": 2 })).await.json();
    assert_eq!((&short["token_type"], &short["expires_in"]), (&json!("Bearer"), &json!(2)));
    for (body, refusal) in [
        (json!({ "user": "mallory", "device": "phone" }), (403, "unknown-user")),
        (json!({ "user": "alice" }), (422, "schema")),
        (json!({ "user": "alice", "device": "Phone!" }), (422, "schema")),
        (json!({ "user": "alice", "device": "phone", "lifetime": 3601 }), (422, "schema")),
        (json!({ "user": "alice", "device": "phone", "lifetime": 0 }), (422, "schema")),
        (json!({ "user": "alice", "device": "phone", "roles": ["admin"] }), (422, "schema")),
    ] {
        let reply = login(body.clone()).await;
        assert_eq!(reply.refusal(), (refusal.0, refusal.1.to_owned()), "{body}");
    }
}

#[tokio::test]
async fn without_the_development_flag_there_is_no_login() {
    let mut backend = Backend::start().await;
    backend.stop().await;
    backend.start_with(|options| options.development = false).await;
    let reply = backend.post("/v1/dev/login", None, &json!({ "user": "alice", "device": "phone" })).await;
    assert_eq!(reply.refusal(), (404, "no-route".to_owned()));
}

#[tokio::test]
async fn echo_gives_back_bodies_up_to_its_limit() {
    let backend = Backend::start().await;
    for path in ["/v1/echo", "/v1/echo-checked"] {
        let post = async |body: Bytes| {
            let request = Request::post(path).header("content-type", "text/x-test");
            backend.ask(request.body(Full::new(body)).unwrap()).await
        };
        let reply = post(Bytes::from_static(b"\x00hello\xff")).await;
        assert_eq!((reply.status, reply.body.as_ref()), (StatusCode::OK, b"\x00hello\xff".as_slice()));
        assert_eq!(reply.headers["content-type"], "text/x-test");
        assert_eq!(post(vec![7; 1 << 20].into()).await.body.len(), 1 << 20);
        assert_eq!(post(vec![7; (1 << 20) + 1].into()).await.refusal().0, 413);
    }
    assert_eq!(backend.get("/v1/echo", None).await.headers["content-type"], "application/json");
    assert_eq!(backend.get("/v1/echo?bytes=1000", None).await.body.len(), 1000);
    assert_eq!(backend.get("/v1/echo?bytes=1048577", None).await.refusal().0, 400);
    assert_eq!(backend.get("/v1/echo?bytes=-1", None).await.refusal().0, 400);
    let reply = backend.send("DELETE", "/v1/echo", None, &json!(null)).await;
    assert_eq!(reply.refusal().0, 405);
    assert_eq!(reply.headers["allow"], "GET, POST");
}

#[tokio::test]
async fn echo_gives_back_messages_in_order() {
    let backend = Backend::start().await;
    let echo = backend.socket_to("/v1/echo", None, Some("chat, echo.v1")).await.unwrap();
    assert_eq!(echo.chosen.as_deref(), Some("echo.v1"));
    let mut messages: Vec<_> = (0..500)
        .map(|number: usize| {
            let text = format!("{number} {}", "ü".repeat(number * 7));
            if number.is_multiple_of(2) { Message::text(text) } else { Message::binary(text) }
        })
        .collect();
    messages.push(Message::Ping(Bytes::from_static(b"?")));

    // At the same time: one that only writes would wait for ever, as the echo does not hoard what is not read.
    let (mut write, mut read) = echo.socket.split();
    let sending = async {
        for message in &messages {
            write.feed(message.clone()).await.unwrap();
        }
        write.flush().await.unwrap();
    };
    let receiving = async {
        let mut heard = Vec::new();
        while heard.len() < messages.len() {
            heard.push(read.next().await.unwrap().unwrap());
        }
        heard
    };
    let both = async { tokio::join!(sending, receiving).1 };
    let mut heard = tokio::time::timeout(DEADLINE, both).await.expect("all come back");
    // A pong may overtake what came before its ping (RFC 6455 §5.5.3 only says: as soon as is practical).
    let pong = heard.iter().position(|message| *message == Message::Pong(Bytes::from_static(b"?"))).unwrap();
    heard.remove(pong);
    messages.pop();
    assert!(heard == messages);
    let mut echo = Socket { socket: write.reunite(read).unwrap(), ..echo };
    echo.say(&json!("still open")).await;
    assert_eq!(echo.hear().await, "still open");
    echo.close().await;
    assert!(backend.socket_to("/v1/echo", None, None).await.unwrap().chosen.is_none());
}

#[tokio::test]
async fn echo_closes_on_what_is_no_websocket_message() {
    use tokio::io::AsyncWriteExt;
    let backend = Backend::start().await;
    // Text that is not UTF-8, and a frame without a mask (RFC 6455 §5.1, §8.1).
    for (frame, code) in [(&[0x81, 0x81, 0, 0, 0, 0, 0xff][..], 1007), (&[0x81, 0x01, b'x'], 1002)] {
        let mut echo = backend.socket_to("/v1/echo", None, None).await.unwrap();
        echo.socket.get_mut().write_all(frame).await.unwrap();
        assert_eq!(echo.closed().await.0, code);
    }
}

#[tokio::test]
async fn whoami_shows_what_the_gateway_says_and_hides_secrets() {
    let backend = Backend::start().await;
    let identity = Identity { user: "alice".into(), session: "s1".into(), roles: "user,auditor".into() };
    let mut request = Request::get("/v1/whoami?x=1").header("authorization", "Bearer secret");
    for (name, value) in identity.headers() {
        request = request.header(name, value);
    }
    let reply =
        backend.ask(request.header("x-forwarded-for", "192.0.2.1").body(Full::default()).unwrap()).await;
    let seen = reply.json();
    assert_eq!((&seen["subject"], &seen["session"]), (&json!("alice"), &json!("s1")));
    assert_eq!(seen["roles"], json!(["user", "auditor"]));
    assert_eq!(seen["query"], "x=1");
    assert!(seen["headers"].as_array().unwrap().contains(&json!(["x-forwarded-for", "192.0.2.1"])));
    assert!(!reply.text().contains("secret"));
    assert_eq!(backend.get("/v1/whoami", None).await.refusal(), (401, "token-missing".to_owned()));
}

#[tokio::test]
async fn unknown_paths_and_methods_are_told_apart() {
    let backend = Backend::start().await;
    assert_eq!(backend.get("/nothing", None).await.refusal(), (404, "no-route".to_owned()));
    for (method, path, allow) in [
        ("POST", "/healthz", "GET"),
        ("GET", "/v1/dev/login", "POST"),
        ("POST", "/v1/devices/phone/keys", "PUT"),
        ("GET", "/v1/messages", "POST"),
        ("GET", "/v1/users/bob/devices/phone/claim", "POST"),
    ] {
        let reply = backend.send(method, path, None, &json!({})).await;
        assert_eq!(reply.refusal().0, 405, "{method} {path}");
        assert_eq!(reply.headers["allow"], allow, "{method} {path}");
    }
}
