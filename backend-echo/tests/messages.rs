//! The message API: keys, claims, queues, the stream; what is allowed and what is refused.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that meets the unexpected has failed"
)]

mod common;

use std::collections::HashSet;

use backend_echo::wire::MessageId;
use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use common::{Backend, Identity, Socket, found};
use http::StatusCode;
use serde_json::{Value, json};

const STREAM: Option<&str> = Some("im.v1.json");

fn key(number: usize) -> Value {
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    json!(STANDARD_NO_PAD.encode(bytes))
}

fn prekey(number: usize) -> Value {
    json!({ "id": format!("k{number}"), "key": key(number), "signature": STANDARD_NO_PAD.encode([1; 64]) })
}

fn upload(identity: usize, keys: std::ops::Range<usize>) -> Value {
    json!({
        "identity": { "curve25519": key(identity), "ed25519": key(identity + 1), "signature": STANDARD_NO_PAD.encode([2; 64]) },
        "one_time_keys": keys.map(prekey).collect::<Vec<_>>(),
    })
}

fn envelope(to: &[(&str, &str)]) -> Value {
    let recipients: Vec<_> = to
        .iter()
        .map(|(user, device)| json!({ "user": user, "device": device, "type": 0, "ciphertext": "c2VjcmV0" }))
        .collect();
    json!({ "id": MessageId::now(), "conversation": "e2e:alice:bob", "recipients": recipients })
}

async fn put(backend: &Backend, who: &Identity, device: &str, body: &Value) -> common::Reply {
    backend.send("PUT", &format!("/v1/devices/{device}/keys"), Some(who), body).await
}

/// Logged in, with keys uploaded.
async fn device(backend: &Backend, user: &str, device: &str) -> Identity {
    let identity = backend.log_in(user, device).await;
    let reply = put(backend, &identity, device, &upload(900, 0..2)).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text());
    identity
}

async fn stream(backend: &Backend, who: &Identity) -> Socket {
    backend.socket_to("/v1/stream", Some(who), STREAM).await.unwrap()
}

#[tokio::test]
async fn a_device_uploads_its_own_keys_within_bounds() {
    let backend = Backend::start().await;
    let alice = backend.log_in("alice", "phone").await;
    let count = put(&backend, &alice, "phone", &upload(900, 0..3)).await.json();
    assert_eq!(count, json!({ "one_time_keys": 3, "fallback_used": false }));
    // The same upload again, its answer having got lost, changes nothing.
    assert_eq!(put(&backend, &alice, "phone", &upload(900, 0..3)).await.json()["one_time_keys"], 3);

    for (device, body, refusal) in [
        ("tablet", upload(900, 0..1), (403, "other-device")),
        ("phone", upload(901, 3..4), (409, "other-identity")),
        ("phone", upload(900, 3..257), (409, "too-many-keys")),
        ("phone", upload(900, 3..260), (409, "too-many-keys")),
        ("phone", json!({ "identity": 1 }), (422, "schema")),
        ("Phone", upload(900, 0..1), (400, "malformed")),
    ] {
        assert_eq!(put(&backend, &alice, device, &body).await.refusal(), (refusal.0, refusal.1.to_owned()));
    }
    let mut other_key = upload(900, 0..1);
    other_key["one_time_keys"][0]["key"] = key(77);
    assert_eq!(put(&backend, &alice, "phone", &other_key).await.refusal(), (409, "key-id-taken".to_owned()));
    // What was refused left nothing behind.
    assert_eq!(put(&backend, &alice, "phone", &upload(900, 3..256)).await.json()["one_time_keys"], 256);
}

#[tokio::test]
async fn a_user_has_six_devices_at_most_and_anyone_sees_them() {
    let backend = Backend::start().await;
    for number in 0..6 {
        device(&backend, "alice", &format!("d{number}")).await;
    }
    let seventh = backend.log_in("alice", "d6").await;
    assert_eq!(
        put(&backend, &seventh, "d6", &upload(900, 0..1)).await.refusal(),
        (409, "too-many-devices".to_owned())
    );

    let bob = backend.log_in("bob", "phone").await;
    let list = backend.get("/v1/users/alice/devices", Some(&bob)).await.json();
    assert_eq!(list["devices"].as_array().unwrap().len(), 6);
    assert_eq!(list["devices"][0]["device"], "d0");
    assert_eq!(list["devices"][0]["identity"], upload(900, 0..0)["identity"]);
    assert_eq!(backend.get("/v1/users/nobody/devices", Some(&bob)).await.json()["devices"], json!([]));
}

#[tokio::test]
async fn only_a_device_that_logged_in_here_may_message() {
    let backend = Backend::start().await;
    let alice = device(&backend, "alice", "phone").await;
    let bob = device(&backend, "bob", "phone").await;
    let carol = backend.log_in("carol", "desk").await;
    let stolen = Identity { session: bob.session.clone(), ..alice.clone() };
    let unknown = Identity { session: "made-up".to_owned(), ..alice.clone() };
    for (who, refusal) in [
        (None, (401, "token-missing")),
        (Some(&carol), (403, "role-missing")),
        (Some(&stolen), (403, "unknown-session")),
        (Some(&unknown), (403, "unknown-session")),
    ] {
        let refusal = (refusal.0, refusal.1.to_owned());
        let reply = backend.post("/v1/messages", who, &envelope(&[("bob", "phone")])).await;
        assert_eq!(reply.refusal(), refusal);
        let reply = backend.send("PUT", "/v1/devices/phone/keys", who, &upload(900, 0..1)).await;
        assert_eq!(reply.refusal(), refusal);
        let socket = backend.socket_to("/v1/stream", who, STREAM).await;
        assert_eq!(socket.err().unwrap().as_u16(), refusal.0);
    }
    for path in ["/v1/users/bob/devices/phone/claim", "/v1/users/bob/devices"] {
        let method = if path.ends_with("claim") { "POST" } else { "GET" };
        let reply = backend.send(method, path, Some(&carol), &json!(null)).await;
        assert_eq!(reply.refusal(), (403, "role-missing".to_owned()));
    }
    assert_eq!(
        backend.socket_to("/v1/stream", Some(&alice), None).await.err(),
        Some(StatusCode::BAD_REQUEST)
    );
    assert!(backend.socket_to("/v1/stream", Some(&alice), STREAM).await.is_ok());
}

#[tokio::test]
async fn a_session_ends_with_its_token() {
    let backend = Backend::start().await;
    let login = json!({ "user": "alice", "device": "phone", "lifetime": 1 });
    let token = backend.post("/v1/dev/login", None, &login).await.json();
    let alice = Identity::of(token["access_token"].as_str().unwrap());
    common::until("the session is over", async || {
        put(&backend, &alice, "phone", &upload(900, 0..1)).await.status == StatusCode::FORBIDDEN
    })
    .await;
}

#[tokio::test]
async fn sixty_four_claims_of_fifty_keys_get_fifty_different_ones_and_the_fallback() {
    let backend = Backend::start().await;
    let alice = backend.log_in("alice", "phone").await;
    let bob = backend.log_in("bob", "phone").await;
    let mut keys = upload(900, 0..50);
    keys["fallback_key"] = prekey(800);
    put(&backend, &bob, "phone", &keys).await;

    let path = "/v1/users/bob/devices/phone/claim";
    let claim = async || backend.post(path, Some(&alice), &json!(null)).await.json();
    let first = claim().await;
    assert_eq!((&first["prekey"], &first["fallback"]), (&prekey(0), &json!(false)), "the oldest first");

    let mut claims = futures_util::future::join_all((1..64).map(|_| claim())).await;
    claims.push(first);
    let (fallback, one_time): (Vec<_>, Vec<_>) =
        claims.into_iter().partition(|claimed| claimed["fallback"] == true);
    let different: HashSet<_> = one_time.iter().map(|claimed| claimed["prekey"]["id"].to_string()).collect();
    assert_eq!((one_time.len(), different.len(), fallback.len()), (50, 50, 14));
    assert!(fallback.iter().all(|claimed| claimed["prekey"] == prekey(800)));

    let mut stream = stream(&backend, &bob).await;
    let ready = stream.hear().await;
    assert_eq!(ready["keys"], json!({ "one_time_keys": 0, "fallback_used": true }));
    let mut fresh = upload(900, 50..50);
    fresh["fallback_key"] = prekey(801);
    assert_eq!(put(&backend, &bob, "phone", &fresh).await.json()["fallback_used"], false);

    let none = backend.post("/v1/users/bob/devices/none/claim", Some(&alice), &json!(null)).await;
    assert_eq!(none.refusal(), (404, "no-prekey".to_owned()));
}

#[tokio::test]
async fn messages_wait_in_order_and_come_again_until_acknowledged() {
    let mut backend = Backend::start().await;
    let (alice, bob) = (device(&backend, "alice", "phone").await, device(&backend, "bob", "phone").await);
    let sent: Vec<_> = (0..3).map(|_| envelope(&[("bob", "phone")])).collect();
    for envelope in &sent {
        let reply = backend.post("/v1/messages", Some(&alice), envelope).await;
        assert_eq!(reply.json(), json!({ "id": envelope["id"], "duplicate": false }));
        let again = backend.post("/v1/messages", Some(&alice), envelope).await;
        assert_eq!(again.json(), json!({ "id": envelope["id"], "duplicate": true }));
    }

    let mut socket = stream(&backend, &bob).await;
    assert_eq!(socket.chosen.as_deref(), STREAM);
    let ready = socket.hear().await;
    assert_eq!(
        (&ready["type"], &ready["device"], &ready["queued"]),
        (&json!("ready"), &json!("phone"), &json!(3))
    );
    for (seq, envelope) in (1..).zip(&sent) {
        let mut message = socket.hear().await;
        assert!(message.as_object_mut().unwrap().remove("received_at").is_some());
        assert_eq!(
            message,
            json!({
                "type": "message", "seq": seq, "id": envelope["id"], "conversation": "e2e:alice:bob",
                "sender": { "user": "alice", "device": "phone" }, "olm_type": 0, "ciphertext": "c2VjcmV0",
            })
        );
    }
    socket.say(&json!({ "type": "ack", "seq": 2 })).await;
    socket.close().await;
    backend.stop().await;
    backend.start_with(|_| ()).await;

    let mut socket = stream(&backend, &bob).await;
    assert_eq!(socket.hear().await["queued"], 1);
    assert_eq!(socket.hear().await["id"], sent[2]["id"], "stored before it was accepted");
    socket.say(&json!({ "type": "ack", "seq": 3 })).await;
    socket.close().await;
    // Once acknowledged, it is gone, and its id is still known.
    assert!(
        backend.post("/v1/messages", Some(&alice), &sent[2]).await.json()["duplicate"].as_bool().unwrap()
    );
    let mut socket = stream(&backend, &bob).await;
    assert_eq!(socket.hear().await["queued"], 0);
    // The numbers go on.
    backend.post("/v1/messages", Some(&alice), &envelope(&[("bob", "phone")])).await;
    assert_eq!(socket.hear().await["seq"], 4);
}

#[tokio::test]
async fn a_stream_sends_too_and_delivers_at_once() {
    let backend = Backend::start().await;
    let (alice, bob) = (device(&backend, "alice", "phone").await, device(&backend, "bob", "phone").await);
    let (mut from, mut to) = (stream(&backend, &alice).await, stream(&backend, &bob).await);
    assert_eq!(
        (from.hear().await["type"].as_str(), to.hear().await["type"].as_str()),
        (Some("ready"), Some("ready"))
    );

    let message = envelope(&[("bob", "phone")]);
    from.say(&json!({ "type": "send", "envelope": message })).await;
    assert_eq!(from.hear().await, json!({ "type": "accepted", "id": message["id"], "duplicate": false }));
    assert_eq!(to.hear().await["id"], message["id"]);

    let message = envelope(&[("bob", "lost")]);
    from.say(&json!({ "type": "send", "envelope": message })).await;
    let refused = from.hear().await;
    assert_eq!((&refused["type"], &refused["id"]), (&json!("refused"), &message["id"]));
    assert_eq!(refused["reason"], "unknown-devices");
}

#[tokio::test]
async fn a_stream_ends_with_the_right_code() {
    let backend = Backend::start().await;
    let bob = device(&backend, "bob", "phone").await;
    for (message, closed) in [
        (json!({ "type": "ack", "seq": 1 }), (1008, "ack-ahead")),
        (json!({ "type": "ack" }), (1007, "schema")),
        (json!({ "type": "ack", "seq": 0, "more": 1 }), (1007, "schema")),
        (json!({ "type": "unheard-of" }), (1007, "schema")),
        (json!("not even an object"), (1007, "schema")),
    ] {
        let mut socket = stream(&backend, &bob).await;
        socket.say(&message).await;
        assert_eq!(socket.closed().await, (closed.0, closed.1.to_owned()), "{message}");
    }
    let mut old = stream(&backend, &bob).await;
    old.hear().await;
    let _new = stream(&backend, &bob).await;
    assert_eq!(old.closed().await, (4409, "replaced".to_owned()));
}

#[tokio::test]
async fn an_envelope_reaches_all_of_its_recipients_or_none() {
    let backend = Backend::start().await;
    let alice = device(&backend, "alice", "phone").await;
    let (phone, tablet) = (device(&backend, "bob", "phone").await, device(&backend, "bob", "tablet").await);
    let send = async |body: &Value| backend.post("/v1/messages", Some(&alice), body).await;

    let mut unknown = envelope(&[("bob", "phone"), ("bob", "lost"), ("nobody", "x")]);
    let reply = send(&unknown).await;
    assert_eq!(reply.refusal(), (409, "unknown-devices".to_owned()));
    let lost = json!([{ "user": "bob", "device": "lost" }, { "user": "nobody", "device": "x" }]);
    assert_eq!(reply.json()["unknown"], lost);
    // The same id may be tried again, since nothing was stored.
    unknown["recipients"].as_array_mut().unwrap().truncate(1);
    assert_eq!(send(&unknown).await.json()["duplicate"], false);

    let both = envelope(&[("bob", "phone"), ("bob", "tablet")]);
    assert_eq!(send(&both).await.status, StatusCode::OK);
    for (who, seq) in [(&phone, 2), (&tablet, 1)] {
        let mut socket = stream(&backend, who).await;
        assert_eq!(socket.hear().await["queued"], seq);
        let mut last = socket.hear().await;
        while last["seq"] != seq {
            last = socket.hear().await;
        }
        assert_eq!(last["id"], both["id"]);
    }

    let many: Vec<_> = (0..65).map(|number| format!("d{number}")).collect();
    let many: Vec<_> = many.iter().map(|device| ("bob", device.as_str())).collect();
    for (body, refusal) in [
        (envelope(&[]), (422, "schema")),
        (envelope(&many), (422, "schema")),
        (envelope(&[("bob", "phone"), ("bob", "phone")]), (422, "schema")),
        (envelope(&[("alice", "phone")]), (422, "schema")),
        (json!({ "id": "1" }), (422, "schema")),
    ] {
        assert_eq!(send(&body).await.refusal(), (refusal.0, refusal.1.to_owned()));
    }
    let stranger = backend.log_in("alice", "laptop").await;
    let reply = backend.post("/v1/messages", Some(&stranger), &envelope(&[("bob", "phone")])).await;
    assert_eq!(reply.refusal(), (409, "unregistered".to_owned()));
}

#[tokio::test]
async fn a_full_queue_fails_the_sender_and_loses_nothing() {
    let backend = Backend::start().await;
    let (alice, bob) = (device(&backend, "alice", "phone").await, device(&backend, "bob", "phone").await);
    let mut from = stream(&backend, &alice).await;
    from.hear().await;
    for _ in 0..10 {
        for _ in 0..100 {
            from.say(&json!({ "type": "send", "envelope": envelope(&[("bob", "phone")]) })).await;
        }
        for _ in 0..100 {
            assert_eq!(from.hear().await["type"], "accepted");
        }
    }
    let over = envelope(&[("bob", "phone")]);
    let reply = backend.post("/v1/messages", Some(&alice), &over).await;
    assert_eq!(reply.refusal(), (409, "queue-full".to_owned()));

    // All thousand come, though no more than a window of them before an acknowledgement.
    let mut to = stream(&backend, &bob).await;
    assert_eq!(to.hear().await["queued"], 1000);
    for seq in 1..=1000 {
        assert_eq!(to.hear().await["seq"], seq);
        if seq % 100 == 0 {
            to.say(&json!({ "type": "ack", "seq": seq })).await;
        }
    }
    to.close().await;
    assert_eq!(backend.post("/v1/messages", Some(&alice), &over).await.status, StatusCode::OK);
}

#[tokio::test]
async fn bodies_are_json_and_bounded() {
    let backend = Backend::start().await;
    let alice = device(&backend, "alice", "phone").await;
    let post = async |kind: &str, body: String| {
        let mut request = http::Request::post("/v1/messages").header("content-type", kind);
        for (name, value) in alice.headers() {
            request = request.header(name, value);
        }
        backend.ask(request.body(body.into()).unwrap()).await.refusal()
    };
    assert_eq!(post("text/plain", "{}".to_owned()).await, (415, "content-type".to_owned()));
    assert_eq!(post("application/json", "{".to_owned()).await, (400, "malformed".to_owned()));
    assert_eq!(post("application/json; charset=utf-8", "[]".to_owned()).await.0, 422);
    assert_eq!(post("application/json", " ".repeat(10 << 20)).await, (413, "body-too-large".to_owned()));
    let huge = STANDARD_NO_PAD.encode(vec![0; 96 * 1024 + 1]);
    let mut big = envelope(&[("bob", "phone")]);
    big["recipients"][0]["ciphertext"] = json!(huge);
    assert_eq!(post("application/json", big.to_string()).await, (422, "schema".to_owned()));
}

#[tokio::test]
async fn what_was_delivered_is_wiped() {
    let mut backend = Backend::start().await;
    let (alice, bob) = (device(&backend, "alice", "phone").await, device(&backend, "bob", "phone").await);
    let mut message = envelope(&[("bob", "phone")]);
    message["recipients"][0]["ciphertext"] = json!(STANDARD_NO_PAD.encode("a ciphertext to look for"));
    backend.post("/v1/messages", Some(&alice), &message).await;
    let mut socket = stream(&backend, &bob).await;
    socket.hear().await;
    socket.hear().await;
    assert!(found(&backend.state(), b"a ciphertext to look for"));
    socket.say(&json!({ "type": "ack", "seq": 1 })).await;
    socket.close().await;
    // A stop folds the log into the database.
    backend.stop().await;
    assert!(!found(&backend.state(), b"a ciphertext to look for"));
}
