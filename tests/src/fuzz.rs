//! What must hold for any bytes that a peer, an upstream or an operator may send.
//!
//! Each function here is a fuzz target (tests/fuzz/) and is run over the committed corpus by an ordinary test
//! (tests/corpus.rs). It panics when something does not hold.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version, header};
use http_body_util::BodyExt;
use ring::digest::{SHA256, digest};
use rustls::server::{Accepted, Acceptor, ResolvesServerCert};
use rustls::{CipherSuite, SignatureScheme};
use sealgate::edge::guard::{FrameGuard, GuardFault, RequestGuard};
use sealgate::edge::proxy::read_header;
use sealgate::events::read_lines;
use sealgate::session::{
    self, Asked, DPOP, KeyFetcher, Proofs, Tickets, TokenCache, Verifier, bearer, decode, encode,
    logout_token, read_journal,
};
use sealgate::tls::{Hello, HelloReader};
use sealgate::upstream::http1::{Read, read_answer};
use sealgate::websocket::deflate::{Agreed, InflateError, Inflater, RATIO_FLOOR};
use sealgate::websocket::frame::Sender;
use sealgate::websocket::handshake::{
    BEARER_PREFIX, Expected, MAX_SUBPROTOCOLS, Offer, accept_for, offered_subprotocols, read_response,
};
use sealgate::websocket::message::{Assembler, Forward, Scratch, Step, WireFault};
use sealgate_keys::{CertificateEntry, CertificateStore, ClientTrust, GROUPS, ProviderChoice, ServerConfigs};
use sealgate_policy::{
    Binding, Bundle, DecisionCache, Denial, Evidence, Identity, IdentityParts, LogoutRule, MessageKind,
    Policy, ProofFault, RequestFacts, RequestPermit, TunnelLimits, settle,
};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::TokenIssuer;
use crate::tokens::now;

/// A fuzz target: its name, which is that of its corpus folder, and what must hold.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: [Target; 24] = [
    ("websocket_frames", websocket_frames),
    ("inflate", inflate),
    ("extension_offer", extension_offer),
    ("upstream_response", upstream_response),
    ("upstream_answer", upstream_answer),
    ("token", token),
    ("proof", proof),
    ("ticket", ticket),
    ("request_target", request_target),
    ("policy_document", policy_document),
    ("opening", opening),
    ("ciphertext", ciphertext),
    ("revocation_record", revocation_record),
    ("journal", journal),
    ("access", access),
    ("logout", logout),
    ("event_lines", event_lines),
    ("json", json),
    ("form", form),
    ("request_guard", request_guard),
    ("frame_guard", frame_guard),
    ("client_hello", client_hello),
    ("certificate_choice", certificate_choice),
    ("proxy_header", proxy_header),
];

const LIMITS: TunnelLimits = TunnelLimits {
    max_frame: 300,
    max_message: 700,
    max_fragments: 4,
    max_inflate_ratio: 3,
    control_per_second: 10,
    idle: None,
    ping_interval: Duration::from_secs(30),
    pong_timeout: Duration::from_secs(20),
    write_timeout: Duration::from_secs(20),
    buffer: 1024,
};

/// What an assembler made of a stream of bytes.
#[derive(Debug, PartialEq, Eq, Default)]
struct Reading {
    messages: Vec<(MessageKind, Vec<u8>)>,
    controls: Vec<Vec<u8>>,
    forwarded: usize,
    fault: Option<WireFault>,
}

/// The first byte says who sends, whether messages are judged and whether they may be compressed; the rest is the
/// wire.
///
/// A stream means the same however it is cut; messages keep their limits and text is UTF-8; what goes on is no more
/// than what came, unless it was inflated.
pub fn websocket_frames(data: &[u8]) {
    let Some((options, wire)) = data.split_first() else {
        return;
    };
    let sender = if options & 1 == 0 { Sender::Client } else { Sender::Server };
    let judged = options & 2 == 0;
    let deflate = options & 4 != 0;
    let now = Instant::now();
    let whole = read_frames(sender, deflate, judged, wire, wire.len().max(1), now);
    let bytewise = read_frames(sender, deflate, judged, wire, 1, now);
    // A fault may show before its frame is complete, never a message that the other reading does not have.
    assert_eq!(whole, bytewise, "the stream was cut differently");
    for (kind, payload) in &whole.messages {
        assert!(payload.len() <= LIMITS.max_message as usize);
        assert!(*kind == MessageKind::Binary || std::str::from_utf8(payload).is_ok());
    }
    assert!(whole.controls.iter().all(|payload| payload.len() <= 125));
    assert!(whole.forwarded <= wire.len());
}

fn read_frames(
    sender: Sender,
    deflate: bool,
    judged: bool,
    wire: &[u8],
    cut: usize,
    now: Instant,
) -> Reading {
    let mut reading = Reading::default();
    let mut assembler = Assembler::new(sender, deflate);
    let mut scratch = Scratch::default();
    // Payload so far of a message that goes on frame by frame.
    let mut passing = 0;
    let mut start = 0;
    let mut end = 0;
    loop {
        let step = match assembler.next(&wire[start..end], judged, &LIMITS, now, &mut scratch) {
            Ok(step) => step,
            Err(fault) => {
                reading.fault = Some(fault);
                return reading;
            }
        };
        let len = match step {
            Step::Partial if end == wire.len() => return reading,
            Step::Partial => {
                end = (end + cut).min(wire.len());
                continue;
            }
            Step::Control { len, payload, .. } => {
                reading.controls.push(payload.to_vec());
                len
            }
            Step::Held { len } => len,
            Step::Frame { len, first, payload, .. } => {
                passing = payload.len() + if first { 0 } else { passing };
                assert!(passing <= LIMITS.max_message as usize && payload.len() <= LIMITS.max_frame as usize);
                reading.forwarded += len;
                len
            }
            Step::Message { len, kind, payload, forward } => {
                reading.messages.push((kind, payload.to_vec()));
                let held = assembler.take_held();
                match forward {
                    Forward::InPlace => reading.forwarded += len,
                    Forward::Held => reading.forwarded += held.len(),
                    Forward::Anew => assert!(deflate && held.is_empty()),
                }
                len
            }
        };
        assert!(len > 0 && start + len <= end, "more taken than there was");
        start += len;
    }
}

/// The payload of a compressed message.
///
/// It inflates within its bounds, the same each time, and to what another inflater makes of it.
pub fn inflate(data: &[u8]) {
    let limits = TunnelLimits { max_message: 100_000, max_inflate_ratio: 20, ..LIMITS };
    let mut inflater = Inflater::default();
    let ours = inflater.inflate(data, &limits).map(<[u8]>::to_vec);
    assert_eq!(ours, inflater.inflate(data, &limits).map(<[u8]>::to_vec), "the second time differs");

    let mut theirs = Vec::with_capacity(100_001);
    let mut other = flate2::Decompress::new(false);
    // What its sender left out, and a last block: so theirs ends as well, if the message stops where a block does.
    let whole = [data, &[0, 0, 0xFF, 0xFF, 1, 0, 0, 0xFF, 0xFF]].concat();
    let status = other.decompress_vec(&whole, &mut theirs, flate2::FlushDecompress::Sync);
    let has_ended = matches!(status, Ok(flate2::Status::StreamEnd));
    // At a last block amid the message theirs ends, and ours goes on.
    let is_cut = has_ended && other.total_in() < whole.len() as u64;
    match ours {
        Ok(ours) => {
            assert!(ours.len() <= 100_000 && ours.len() <= RATIO_FLOOR.max(data.len() * 20));
            assert!(has_ended && ours.starts_with(&theirs), "another inflater disagrees");
            assert!(is_cut || ours == theirs, "another inflater finds more");
        }
        Err(InflateError::TooLarge { .. }) => assert!(is_cut || theirs.len() > 100_000),
        Err(InflateError::Ratio { .. }) => assert!(is_cut || theirs.len() > RATIO_FLOOR.max(data.len() * 20)),
        Err(InflateError::Malformed) => assert!(is_cut || !has_ended, "another inflater takes it"),
    }
}

/// `Sec-WebSocket-Extensions` of a client, a line for each field.
///
/// What we agree on was offered, and our answer has no more than RFC 7692 allows.
pub fn extension_offer(data: &[u8]) {
    let mut headers = HeaderMap::new();
    for line in data.split(|byte| *byte == b'\n') {
        let Ok(value) = HeaderValue::from_bytes(line) else { return };
        headers.append(http::header::SEC_WEBSOCKET_EXTENSIONS, value);
    }
    let Ok(Some(agreed)) = Agreed::accept(&headers) else { return };
    let offered = String::from_utf8_lossy(data).to_ascii_lowercase();
    assert!(offered.contains("permessage-deflate"), "agreed on what was not offered");
    let answer = agreed.answer();
    let answer = answer.to_str().expect("plain ASCII");
    let parameters: Vec<&str> = answer.split("; ").collect();
    assert_eq!(
        parameters[..3],
        ["permessage-deflate", "server_no_context_takeover", "client_no_context_takeover"]
    );
    match parameters[3..] {
        [] => {}
        [window] => {
            assert!(offered.contains("server_max_window_bits"), "a window that was not asked for");
            let bits = window.strip_prefix("server_max_window_bits=").and_then(|bits| bits.parse().ok());
            assert!(bits.is_some_and(|bits: u8| (8..=15).contains(&bits)), "{answer}");
        }
        _ => panic!("{answer}"),
    }
}

/// An upstream's answer to a request.
///
/// What is taken for an answer has its head within the bytes and its body's end at one place, however the bytes come in;
/// fewer bytes are never another answer.
pub fn upstream_answer(data: &[u8]) {
    let read = |bytes: &[u8]| match read_answer(bytes, &Method::GET) {
        Ok(Read::Answer(len, answer)) => Some((len, answer)),
        Ok(Read::Partial | Read::Interim(_)) | Err(_) => None,
    };
    let Some((len, mut whole)) = read(data) else { return };
    let (head, rest) = data.split_at_checked(len).expect("the head lies within the bytes");
    assert!(head.ends_with(b"\r\n\r\n") && head.starts_with(b"HTTP/1."));
    assert!((0..len).all(|cut| read(&data[..cut]).is_none()), "an answer before its head was whole");
    let (_, mut pieces) = read(head).expect("the head alone is an answer");
    assert_eq!(
        (pieces.status, &pieces.fields, pieces.reusable),
        (whole.status, &whole.fields, whole.reusable)
    );
    let at_once = whole.body.take(rest);
    let (mut content, mut taken) = (Vec::new(), 0);
    for byte in rest {
        match pieces.body.take(&[*byte]) {
            Ok((part, len)) => {
                content.extend_from_slice(&part);
                taken += len;
            }
            Err(error) => return assert_eq!(at_once, Err(error), "byte by byte it is another answer"),
        }
    }
    let (all, len) = at_once.expect("byte by byte it was fine");
    assert_eq!((all.as_ref(), len), (content.as_slice(), taken));
    assert_eq!(whole.body.is_ended(), pieces.body.is_ended());
}

/// An upstream's answer to our upgrade.
///
/// What is taken for agreement says 101 and has the accept key; the head's length lies within the bytes; a longer
/// reading of the same bytes does not change what was decided.
pub fn upstream_response(data: &[u8]) {
    let expect = Expected {
        accept: accept_for(b"dGhlIHNhbXBsZSBub25jZQ=="),
        subprotocols: vec!["im.v1.json".to_owned()],
    };
    let Ok(Some((len, subprotocol))) = read_response(data, &expect) else {
        return;
    };
    let head = data.get(..len).expect("the head lies within the bytes");
    assert!(head.ends_with(b"\r\n\r\n") && head.starts_with(b"HTTP/1.1 101"));
    let text = String::from_utf8_lossy(head).into_owned();
    assert!(text.contains(&expect.accept), "agreed without the accept key");
    assert!(!text.to_ascii_lowercase().contains("sec-websocket-extensions"), "agreed on an extension");
    assert!(subprotocol.is_none_or(|name| name == "im.v1.json"));
    // The bytes behind the head are frames, not more head.
    assert!(matches!(read_response(head, &expect), Ok(Some((again, _))) if again == len));
    for cut in 0..len {
        assert!(
            !matches!(read_response(&data[..cut], &expect), Ok(Some(_))),
            "agreed after {cut} of {len} bytes"
        );
    }
}

struct Judge {
    verifier: Verifier,
    issuer: TokenIssuer,
}

static JUDGE: LazyLock<Judge> = LazyLock::new(|| {
    let issuer = TokenIssuer::new("key-1");
    let folder = tempfile::tempdir().expect("a folder");
    let keys = folder.path().join("jwks.json");
    std::fs::write(&keys, issuer.jwks().to_string()).expect("a key set");
    let text = format!(
        "version = 1\n[[issuer]]\nname = \"tests\"\nissuer = \"https://issuer.test\"\naudience = [\"sealgate\"]\n\
         algorithms = [\"ES256\"]\nskew = \"0s\"\njwks = \"file:{}\"\n",
        keys.display()
    );
    let policy = compile(text.as_bytes()).expect("a policy");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let fetcher = KeyFetcher::system();
    let verifier = runtime.block_on(Verifier::build(policy.issuers(), None, &fetcher)).expect("a verifier");
    // Keys are refreshed on the runtime: it outlives the verifier.
    std::mem::forget(runtime);
    Judge { verifier, issuer }
});

/// A token, as it comes (first byte 0), or as header and claims parted by a NUL, which are signed by the right key.
///
/// What is accepted has the pinned algorithm, issuer and audience, and is in its time.
pub fn token(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    let judge = &*JUDGE;
    let token = if *kind == 0 {
        String::from_utf8_lossy(rest).into_owned()
    } else {
        let (header, claims) = rest.split_at(rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len()));
        judge.issuer.sign_bytes(header, claims.get(1..).unwrap_or_default())
    };
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_bytes(format!("Bearer {token}").as_bytes()) {
        headers.insert(http::header::AUTHORIZATION, value);
    }
    let Ok(Some(found)) = bearer(&headers, false) else {
        return;
    };
    let cache = TokenCache::new(8).expect("random numbers");
    let now = now();
    let Ok(identity) = judge.verifier.verify(found.as_str(), now, &cache) else {
        return;
    };

    let mut parts = found.as_str().split('.');
    let mut part = || -> Value {
        let bytes = URL_SAFE_NO_PAD.decode(parts.next().expect("three parts")).expect("base64url");
        serde_json::from_slice(&bytes).expect("JSON")
    };
    let (header, claims) = (part(), part());
    assert_eq!(header["alg"], "ES256");
    assert!(header["typ"].as_str().is_some_and(|kind| kind.to_ascii_lowercase().ends_with("at+jwt")));
    assert_eq!(claims["iss"], "https://issuer.test");
    assert!(
        claims["aud"] == "sealgate"
            || claims["aud"].as_array().is_some_and(|list| list.contains(&"sealgate".into()))
    );
    assert!(claims["exp"].as_f64().is_some_and(|exp| exp > now as f64 - 1.0));
    assert!(claims["nbf"].is_null() || claims["nbf"].as_f64().is_some_and(|nbf| nbf < now as f64 + 1.0));
    assert_eq!(claims["sub"], identity.subject.as_str());
    assert!(identity.expires_at > now);
    // Whatever it held, it became headers that can be sent.
    assert!(identity.upstream_headers.iter().all(|(name, _)| name.as_str().starts_with("x-sealgate-")));
    let again = judge.verifier.verify(found.as_str(), now, &cache).expect("the cache agrees");
    assert_eq!(again.subject, identity.subject);
}

static HOLDER: LazyLock<TokenIssuer> = LazyLock::new(|| TokenIssuer::new("holder"));

/// A proof of possession, as it comes (first byte 0), or as header and claims parted by a NUL, which are signed by the
/// right key. Where both are JSON objects they get, with first byte 2, that key and the token's hash.
///
/// What is accepted was made for this request and this token, lately; and it is not accepted twice.
pub fn proof(data: &[u8]) {
    const TOKEN: &str = "a.b.c";
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    let mut jwk = HOLDER.jwk();
    jwk.as_object_mut().expect("an object").retain(|name, _| !["kid", "use", "alg"].contains(&name.as_str()));
    let hash = URL_SAFE_NO_PAD.encode(digest(&SHA256, TOKEN.as_bytes()));
    let proof = if *kind == 0 {
        String::from_utf8_lossy(rest).into_owned()
    } else {
        let (header, claims) = rest.split_at(rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len()));
        let claims = claims.get(1..).unwrap_or_default();
        let added = |text: &[u8], name: &str, value: Value| {
            let object = serde_json::from_slice::<Value>(text).ok().filter(|it| *kind == 2 && it.is_object());
            object.map_or_else(
                || text.to_vec(),
                |mut object| {
                    object[name] = value;
                    object.to_string().into_bytes()
                },
            )
        };
        HOLDER.sign_bytes(&added(header, "jwk", jwk.clone()), &added(claims, "ath", hash.clone().into()))
    };
    let mut headers = HeaderMap::new();
    if let Ok(value) = HeaderValue::from_str(&proof) {
        headers.insert(DPOP, value);
    }
    let Ok(Some(found)) = sealgate::session::proof(&headers) else {
        return;
    };
    let (method, now) = (Method::GET, 1_800_000_000);
    let asked = Asked {
        method: &method,
        authority: "chat.example",
        path: "/v1/mine",
        websocket: false,
        token: TOKEN,
    };
    let text = format!(r#"{{"crv":"P-256","kty":"EC","x":{},"y":{}}}"#, jwk["x"], jwk["y"]);
    let key = digest(&SHA256, text.as_bytes()).as_ref().try_into().ok();
    let binding = Binding { key, certificate: None };
    let identity = Identity::new(IdentityParts { binding, ..IdentityParts::default() });
    let policy = ANYWHERE.dpop();
    let proofs = Proofs::new().expect("random numbers");
    if proofs.check(found, &asked, &identity, policy, now).is_err() {
        assert!(proofs.is_empty(), "what is refused takes no room");
        return;
    }
    let mut parts = found.split('.').map(|part| URL_SAFE_NO_PAD.decode(part).expect("base64url"));
    let mut part = || -> Value { serde_json::from_slice(&parts.next().expect("three parts")).expect("JSON") };
    let (header, claims) = (part(), part());
    assert_eq!(
        (&header["alg"], &claims["htm"], &claims["ath"]),
        (&"ES256".into(), &"GET".into(), &hash.into())
    );
    let url = claims["htu"].as_str().expect("a URL").to_ascii_lowercase();
    assert!(url.starts_with("https://chat.example"), "{url}");
    let age = now as f64 - claims["iat"].as_f64().expect("a time");
    assert!((-31.0..91.0).contains(&age), "{age} s old");
    assert!(claims["jti"].as_str().is_some_and(|id| !id.is_empty()));
    let again = proofs.check(found, &asked, &identity, policy, now);
    assert_eq!(again, Err(Denial::ProofInvalid(ProofFault::Replayed)));
}

/// The fields of an upgrade, one a line, in which `TICKET` stands for one that was made for a page of `https://chat.example`.
///
/// A ticket counts where it is a subprotocol and the one origin is that page, and not twice, however it was tried.
pub fn ticket(data: &[u8]) {
    const NOW: u64 = 1_800_000_000;
    const PAGE: &str = "https://chat.example";
    let parts =
        IdentityParts { subject: "alice".to_owned(), expires_at: NOW + 60, ..IdentityParts::default() };
    let identity = Arc::new(Identity::new(parts));
    let tickets = Tickets::default();
    let page = HeaderMap::from_iter([(header::ORIGIN, HeaderValue::from_static(PAGE))]);
    let made = tickets.issue(&identity, &page, Duration::from_secs(30), NOW).expect("a ticket");
    let text = String::from_utf8_lossy(data).replace("TICKET", made.as_str());
    let mut headers = HeaderMap::new();
    for line in text.split('\n') {
        let Some((name, value)) = line.split_once(':') else { continue };
        let name = HeaderName::from_bytes(name.as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(value.trim_ascii().as_bytes())) {
            let _ = headers.try_append(name, value);
        }
    }
    let Ok(Some(found)) = session::ticket(&headers) else {
        return;
    };
    let redeemed = tickets.redeem(found, &headers, NOW + 29);
    assert_eq!(tickets.is_empty(), found == made.as_str(), "used if it was tried, and untouched by another");
    if redeemed.is_ok() {
        assert_eq!(found, made.as_str());
        let origins: Vec<_> = headers.get_all(header::ORIGIN).iter().collect();
        assert_eq!(origins, [PAGE]);
        let offered = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter();
        assert!(offered.filter_map(|it| it.to_str().ok()).any(|it| it.contains(made.as_str())));
    }
    assert!(tickets.redeem(found, &headers, NOW + 29).is_err(), "it counted twice");
}

static ANYWHERE: LazyLock<Policy> = LazyLock::new(|| {
    let text = "version = 1\n[[upstream]]\nname = \"backend\"\nendpoints = [\"unix:/backend.sock\"]\n\
                [[route]]\nname = \"all\"\npath = \"/**\"\nmethods = [\"GET\"]\nupstream = \"backend\"\nauth = \"none\"\n\
                query = {}\n";
    compile(text.as_bytes()).expect("a policy")
});

/// A path, and behind the first `?` a query.
///
/// A path that is let pass has one reading: no dots to resolve, nothing left to decode that matters, and judging it
/// once more changes nothing.
pub fn request_target(data: &[u8]) {
    let Ok(target) = std::str::from_utf8(data) else {
        return;
    };
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (path, Some(query)),
        None => (target, None),
    };
    let Some(permit) = permit(path, query) else { return };
    let path = permit.path();
    assert!(path.starts_with('/') && !path.contains("//"), "{path}");
    assert!(path.bytes().all(|byte| byte.is_ascii_graphic() && !b"\\\"<>^`{|}#?".contains(&byte)), "{path}");
    assert!(path.split('/').all(|segment| !matches!(segment.split(';').next(), Some("." | ".."))), "{path}");
    for (at, _) in path.match_indices('%') {
        let code = path.get(at + 1..at + 3).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        let code = code.unwrap_or_else(|| panic!("half an encoding: {path}"));
        let matters =
            code < 0x20 || code == 0x7f || b"/\\%.~-_".contains(&code) || code.is_ascii_alphanumeric();
        assert!(!matters, "{path}");
    }
    let again = self::permit(path, query).expect("what was let pass is let pass again");
    assert_eq!(again.path(), path);
}

fn permit(path: &str, query: Option<&str>) -> Option<RequestPermit> {
    let facts = RequestFacts {
        certificate: None,
        peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
        host: "localhost",
        method: &Method::GET,
        path,
        query,
        headers: &HeaderMap::new(),
        websocket: false,
        content_length: None,
        has_body: false,
        tls: sealgate_policy::TlsFacts::default(),
    };
    let demands = ANYWHERE.match_request(&facts).ok()?.judge(&facts, None).ok()?;
    settle(demands, Evidence { rates: Ok(()), revoked: false, lost: None }).ok()
}

/// A `policy.toml`.
///
/// It loads, or every error names a place that is in the file.
pub fn policy_document(data: &[u8]) {
    let Err(errors) = compile(data) else { return };
    assert!(!errors.0.is_empty(), "refused without a reason");
    let lines = data.split(|byte| *byte == b'\n').count() as u32;
    for error in &errors.0 {
        assert!((1..=lines).contains(&error.line), "line {} of {lines}: {error}", error.line);
        assert!(
            error.column >= 1 && error.column as usize <= data.len() + 1,
            "column {}: {error}",
            error.column
        );
        assert!(!error.message.is_empty());
    }
    let _ = errors.to_string();
}

fn compile(text: &[u8]) -> Result<Policy, sealgate_policy::PolicyErrors> {
    let files = BTreeMap::from([("policy.toml".to_owned(), text.to_vec())]);
    let variables = BTreeMap::from([("state".to_owned(), "/state".to_owned())]);
    Policy::compile(&Bundle { root: PathBuf::from("/"), files }, &variables)
}

/// A client's opening of a WebSocket: with an even first byte an upgrade, with an odd one an extended CONNECT (RFC 8441);
/// behind it the fields, one a line.
///
/// What is agreed to says everything once that it has to say, and no token is taken for a subprotocol.
pub fn opening(data: &[u8]) {
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    let mut headers = HeaderMap::new();
    for line in rest.split(|byte| *byte == b'\n') {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let (name, value) = (HeaderName::from_bytes(&line[..colon]), line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(value)) {
            let _ = headers.try_append(name, value);
        }
    }
    let http2 = kind % 2 == 1;
    let (method, version) =
        if http2 { (Method::CONNECT, Version::HTTP_2) } else { (Method::GET, Version::HTTP_11) };
    let Ok(offer) = Offer::read(&method, version, &headers) else { return };
    let once = |name: HeaderName| -> &HeaderValue {
        let mut values = headers.get_all(&name).iter();
        let value = values.next().unwrap_or_else(|| panic!("{name} is not there"));
        assert!(values.next().is_none(), "{name} is there twice");
        value
    };
    assert_eq!(once(header::SEC_WEBSOCKET_VERSION), "13");
    assert!(!headers.contains_key(header::TRANSFER_ENCODING));
    assert!(headers.get_all(header::CONTENT_LENGTH).iter().all(|length| length == "0"));
    let answer: HeaderMap = offer.answer(None).collect();
    if http2 {
        assert_eq!((offer.status(), answer.len()), (StatusCode::OK, 0));
    } else {
        assert_eq!(offer.status(), StatusCode::SWITCHING_PROTOCOLS);
        assert!(once(header::UPGRADE).as_bytes().eq_ignore_ascii_case(b"websocket"));
        let key = once(header::SEC_WEBSOCKET_KEY).as_bytes();
        assert_eq!(STANDARD.decode(key).expect("base64").len(), 16);
        assert_eq!(answer[header::SEC_WEBSOCKET_ACCEPT], accept_for(key));
    }
    let names = offered_subprotocols(&headers).expect("they were read before");
    assert!(names.len() <= MAX_SUBPROTOCOLS && names.iter().all(|name| !name.starts_with(BEARER_PREFIX)));
}

static OWN: LazyLock<Policy> = LazyLock::new(|| {
    let toml = "version = 1\n[[issuer]]\nname = \"i\"\nissuer = \"https://i.example\"\naudience = [\"a\"]\n\
                algorithms = [\"ES256\"]\njwks = \"file:/jwks.json\"\n\
                [[upstream]]\nname = \"backend\"\nendpoints = [\"unix:/backend.sock\"]\n\
                [[route]]\nname = \"page\"\npath = \"/u/{user}\"\nmethods = [\"GET\"]\nupstream = \"backend\"\n\
                action = \"read\"\nquery = {}\n\
                resource = { type = \"Page\", owner = \"path:user\", department = \"query:dept\" }\n\
                [[route]]\nname = \"post\"\npath = \"/b\"\nmethods = [\"POST\"]\nupstream = \"backend\"\n\
                action = \"read\"\nbody = { max_bytes = \"1MiB\", schema = \"schemas/any.json\" }\n\
                resource = { type = \"Page\", owner = \"body:/user\", department = \"body:/in/0\" }\n";
    let schema = "entity Role; entity Page { owner: User, department: String };\n\
                  entity User in [Role] { issuer: String, department?: String, acr?: String, amr: Set<String>,\n\
                  login_age?: Long };\n\
                  action \"read\" appliesTo { principal: User, resource: Page, context: { address: ipaddr,\n\
                  tls_version: String, client_certificate: Bool, token_age?: Long, now: datetime, hour: Long,\n\
                  weekday: Long } };\n";
    let cedar = "@id(\"own\") permit (principal, action, resource) when { resource.owner == principal &&\n\
                 principal has department && principal.department == resource.department };\n";
    let files = [
        ("policy.toml", toml),
        ("authz.cedar", cedar),
        ("authz.cedarschema", schema),
        ("schemas/any.json", "true"),
    ];
    let files = files.map(|(name, text)| (name.to_owned(), text.as_bytes().to_owned())).into();
    let bundle = Bundle { root: PathBuf::from("/"), files };
    Policy::compile(&bundle, &BTreeMap::new()).unwrap_or_else(|errors| panic!("{errors}"))
});

/// A path, a query and a body, a line each but the last.
///
/// What is permitted to somebody about his own is about his own by another reading too: the one name in the path, the one
/// parameter of that name in the query, the fields of the body.
pub fn access(data: &[u8]) {
    let mut parts = data.splitn(3, |byte| *byte == b'\n');
    let (path, query, body) = (parts.next(), parts.next(), parts.next().unwrap_or_default());
    let (Some(Ok(path)), Some(Ok(query))) = (path.map(std::str::from_utf8), query.map(std::str::from_utf8))
    else {
        return;
    };
    let alice = IdentityParts {
        subject: "alice".into(),
        department: Some("sales".into()),
        ..IdentityParts::default()
    };
    let alice = std::sync::Arc::new(Identity::new(alice));
    let decisions = DecisionCache::new(8);
    let judge = |method: &Method, path: &str, query, headers: &HeaderMap, has_body| {
        let facts = RequestFacts {
            certificate: None,
            peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
            host: "localhost",
            method,
            path,
            query,
            headers,
            websocket: false,
            content_length: None,
            has_body,
            tls: sealgate_policy::TlsFacts::default(),
        };
        let demands = OWN.match_request(&facts)?.judge(&facts, Some(alice.clone()))?;
        let demands = demands.prove(Binding::default(), 0, &decisions)?;
        settle(demands, Evidence { rates: Ok(()), revoked: false, lost: None })
    };
    if let Ok(permit) = judge(&Method::GET, path, Some(query), &HeaderMap::new(), false) {
        // What goes upstream, decoded by hand.
        let name = percent_decoded(permit.path().strip_prefix("/u/").expect("the one route"));
        assert_eq!(name.as_deref(), Some("alice"), "{}", permit.path());
        let pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
        let decoded = |text: &str| percent_decoded(&text.replace('+', " "));
        let named: Vec<_> = pairs.filter(|(key, _)| decoded(key).as_deref() == Some("dept")).collect();
        assert!(matches!(named[..], [(_, value)] if decoded(value).as_deref() == Some("sales")), "{query}");
    }
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let permit = judge(&Method::POST, "/b", None, &headers, true).expect("the body decides");
    if permit.judge_body(body, &decisions).is_ok() {
        let body: Value = serde_json::from_slice(body).expect("JSON");
        let at = |pointer: &str| body.pointer(pointer).and_then(Value::as_str);
        assert_eq!((at("/user"), at("/in/0")), (Some("alice"), Some("sales")));
    }
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('%') {
        bytes.extend(before.bytes());
        bytes.push(u8::from_str_radix(after.get(..2)?, 16).ok()?);
        rest = &after[2..];
    }
    bytes.extend(rest.bytes());
    String::from_utf8(bytes).ok()
}

static SEALED: LazyLock<Policy> = LazyLock::new(|| {
    let text = "version = 1\n[[upstream]]\nname = \"backend\"\nendpoints = [\"unix:/backend.sock\"]\n\
                [[ciphertext]]\nname = \"sealed\"\npointer = \"/to\"\nprefix = \"e2e:\"\nreadable = [\"open:\"]\n\
                payload = [\"/parts/*/sealed\"]\nplaintext = [\"/text\", \"/parts/*/text\"]\n\
                [[route]]\nname = \"send\"\npath = \"/\"\nmethods = [\"POST\"]\nupstream = \"backend\"\nauth = \"none\"\n\
                body = { max_bytes = \"1MiB\", ciphertext = \"sealed\" }\n";
    compile(text.as_bytes()).expect("a policy")
});

/// A message to a conversation that may be end-to-end encrypted.
///
/// What passes names its conversation; in an encrypted one it holds ciphertext, which is not text, and no plaintext.
pub fn ciphertext(data: &[u8]) {
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let facts = RequestFacts {
        certificate: None,
        peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
        host: "localhost",
        method: &Method::POST,
        path: "/",
        query: None,
        headers: &headers,
        websocket: false,
        content_length: None,
        has_body: true,
        tls: sealgate_policy::TlsFacts::default(),
    };
    let matched = SEALED.match_request(&facts).expect("the one route");
    let demands = matched.judge(&facts, None).expect("a head without fault");
    let permit = settle(demands, Evidence { rates: Ok(()), revoked: false, lost: None }).expect("a permit");
    if permit.judge_body(data, &sealgate_policy::DecisionCache::new(8)).is_err() {
        return;
    }
    let message: Value = serde_json::from_slice(data).expect("JSON");
    let to = message["to"].as_str().expect("a conversation");
    if to.starts_with("open:") {
        return;
    }
    assert!(to.starts_with("e2e:"), "{to}");
    assert!(message.get("text").is_none());
    let parts = message["parts"].as_array().expect("parts");
    assert!(!parts.is_empty());
    for part in parts {
        assert!(part.get("text").is_none());
        let sealed = part["sealed"].as_str().expect("ciphertext").trim_end_matches('=');
        let bytes =
            STANDARD_NO_PAD.decode(sealed).or_else(|_| URL_SAFE_NO_PAD.decode(sealed)).expect("base64");
        assert!(bytes.len() >= 16, "{sealed}");
        let text = std::str::from_utf8(&bytes);
        assert!(
            !text.is_ok_and(|text| text.chars().all(|c| !c.is_control())),
            "{text:?} passes for ciphertext"
        );
    }
}

/// A record of a revocation as it may stand in Redis. What is read holds for no longer than any may, and written again it is read as
/// the same.
pub fn revocation_record(data: &[u8]) {
    const NOW: u64 = 1_800_000_000;
    let Some(read) = decode(data, u64::MAX, NOW) else { return };
    assert!(read.until <= NOW + 400 * 86_400, "{read:?}");
    let written = encode(&read.borrowed());
    assert_eq!(decode(written.as_bytes(), read.until, NOW), Some(read));
}

/// The log of revocations on disk. What is read of it holds, and what any beginning of it holds is not lost by what follows, unless
/// the whole is refused.
pub fn journal(data: &[u8]) {
    const NOW: u64 = 1_800_000_000;
    let Some(kept) = read_journal(data, NOW) else { return };
    assert!(kept.iter(NOW).all(|it| it.until > NOW && it.until <= NOW + 400 * 86_400));
    assert_eq!(kept.iter(NOW).count(), kept.revocations.len(), "what was read is a revocation");
    let Some(end) = data.iter().rposition(|byte| *byte == b'\n') else { return };
    if let Some(before) = read_journal(&data[..end], NOW) {
        assert!(before.revocations.iter().all(|(record, until)| kept.revocations.get(record) >= Some(until)));
    }
}

/// A back-channel logout: the form as it comes (first byte 0), or header and claims parted by a NUL, which are signed by the right key.
/// Claims that are a JSON object get, with first byte 2, the times of now.
///
/// What is accepted is a logout token for us, of now, that names somebody; and it ends just that.
pub fn logout(data: &[u8]) {
    const EVENT: &str = "http://schemas.openid.net/event/backchannel-logout";
    let Some((kind, rest)) = data.split_first() else {
        return;
    };
    let (judge, now) = (&*JUDGE, now());
    let form = if *kind == 0 {
        rest.to_vec()
    } else {
        let (header, claims) = rest.split_at(rest.iter().position(|byte| *byte == 0).unwrap_or(rest.len()));
        let mut claims = claims.get(1..).unwrap_or_default().to_vec();
        if let (2, Ok(Value::Object(mut read))) = (*kind, serde_json::from_slice(&claims)) {
            read.insert("iat".to_owned(), now.into());
            read.insert("exp".to_owned(), (now + 60).into());
            claims = Value::Object(read).to_string().into_bytes();
        }
        format!("logout_token={}", judge.issuer.sign_bytes(header, &claims)).into_bytes()
    };
    let Ok(token) = logout_token(&form) else { return };
    let rule = LogoutRule {
        issuer: "tests".into(),
        audience: vec!["sealgate".to_owned()],
        max_age: Duration::from_secs(300),
        strict_type: false,
    };
    let Ok(accepted) = judge.verifier.verify_logout(&token, &rule, now) else { return };
    let claims = token.split('.').nth(1).expect("three parts");
    let claims = URL_SAFE_NO_PAD.decode(claims).expect("base64url");
    let claims: Value = serde_json::from_slice(&claims).expect("JSON");
    assert_eq!(claims["iss"], "https://issuer.test");
    assert!(claims["events"][EVENT].is_object() && claims.get("nonce").is_none());
    assert_eq!(claims["jti"], accepted.id.as_str());
    assert!(accepted.issued_at <= now + 300 && accepted.until > now);
    let revocation = accepted.revocation(now + 9).expect("it names somebody");
    assert_eq!(revocation.issued_before == u64::MAX, claims.get("sid").is_some());
}

/// The answer of a source of revocations, as events after number 4 of the log `a`, and as a snapshot.
///
/// It is read as the same however it is cut on its way; each event is one step and none is passed over; what is entered holds
/// no longer than any may.
pub fn event_lines(data: &[u8]) {
    const NOW: u64 = 1_800_000_000;
    let read = read_lines(data, usize::MAX, 4, NOW);
    for cut in [1, 7] {
        assert_eq!(read, read_lines(data, cut, 4, NOW), "{cut} at a time");
    }
    assert_eq!(read.number, 4 + read.steps);
    assert!(read.events.len() as u64 <= read.steps);
    let entered = read.events.iter().chain(&read.entries.0);
    assert!(entered.into_iter().all(|it| it.until > NOW && it.until <= NOW + 400 * 86_400));
}

static FORM: LazyLock<Policy> = LazyLock::new(|| {
    let text = "version = 1\n[[upstream]]\nname = \"backend\"\nendpoints = [\"unix:/backend.sock\"]\n\
                [[route]]\nname = \"form\"\npath = \"/\"\nmethods = [\"POST\"]\nupstream = \"backend\"\nauth = \"none\"\n\
                [route.body]\nmax_bytes = \"1MiB\"\n[route.body.form]\nmax_parts = 4\npart = [\n\
                { name = \"note\", max = 3, max_bytes = \"64B\" },\n\
                { name = \"meta\", max_bytes = \"64B\", types = [\"application/json\"] },\n\
                { name = \"file\", max = 3, file = true, max_bytes = \"1KiB\", \
                types = [\"image/png\", \"text/plain\", \"application/octet-stream\"] }]\n";
    compile(text.as_bytes()).expect("a policy")
});

/// The first line is the request's Content-Type, the rest a form.
///
/// It is judged the same however it is cut. The boundary stands in it as often as there are delimiters, each a line of its
/// own; nothing stands before the first and behind the last; there are no more parts, and no larger ones, than the rule allows.
pub fn form(data: &[u8]) {
    let Some(end) = data.iter().position(|byte| *byte == b'\n') else { return };
    let (kind, body) = (&data[..end], &data[end + 1..]);
    let Ok(kind) = HeaderValue::from_bytes(kind) else { return };
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, kind.clone());
    let facts = RequestFacts {
        certificate: None,
        peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
        host: "localhost",
        method: &Method::POST,
        path: "/",
        query: None,
        headers: &headers,
        websocket: false,
        content_length: None,
        has_body: true,
        tls: sealgate_policy::TlsFacts::default(),
    };
    let matched = FORM.match_request(&facts).expect("the one route");
    let Ok(demands) = matched.judge(&facts, None) else { return };
    let permit = settle(demands, Evidence { rates: Ok(()), revoked: false, lost: None }).expect("a permit");
    let read = |size: usize| {
        let mut judge = permit.form_judge().expect("a form");
        body.chunks(size).try_for_each(|piece| judge.take(piece))?;
        judge.finish()?;
        Ok::<_, Denial>(judge.parts() as usize)
    };
    let whole = read(body.len().max(1));
    for size in [1, 2, 7] {
        // Of several faults another one may be found first.
        assert_eq!(whole.as_ref().ok(), read(size).as_ref().ok(), "{size} at a time");
    }
    assert_eq!(whole.is_ok(), permit.judge_body(body, &DecisionCache::new(8)).is_ok());
    let Ok(parts) = whole else { return };
    let kind = kind.to_str().expect("it was read").to_ascii_lowercase();
    let at = kind.find("boundary=").expect("a boundary") + "boundary=".len();
    let raw = &headers[header::CONTENT_TYPE].to_str().expect("it was read")[at..];
    let boundary = match raw.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next(),
        None => raw.split([';', ' ', '\t']).next(),
    };
    let boundary = format!("--{}", boundary.expect("a boundary"));
    let count = |needle: &[u8]| body.windows(needle.len()).filter(|part| *part == needle).count();
    assert_eq!(count(boundary.as_bytes()), parts + 1);
    assert_eq!(count(format!("\r\n{boundary}\r\n").as_bytes()), parts.saturating_sub(1));
    assert!(body.starts_with(boundary.as_bytes()));
    let last = format!("{boundary}--");
    assert!(body.strip_suffix(b"\r\n").unwrap_or(body).ends_with(last.as_bytes()));
    assert!(parts <= 4 && body.len() <= parts * (1024 + 1024 + 80) + 80);
}

static JSON: LazyLock<Policy> = LazyLock::new(|| {
    let route = |name: &str, rest: &str| {
        format!(
            "[[route]]\nname = \"{name}\"\npath = \"/{name}\"\nmethods = [\"POST\"]\nupstream = \"backend\"\n\
             auth = \"none\"\nbody = {{ max_bytes = \"1MiB\", {rest} }}\n"
        )
    };
    let text = "version = 1\n[[upstream]]\nname = \"backend\"\nendpoints = [\"unix:/backend.sock\"]\n"
        .to_owned()
        + &route("plain", "json = { max_depth = 127, max_digits = 10000, max_key = \"64KiB\" }")
        + &route(
            "small",
            "json = { max_depth = 3, max_values = 9, max_members = 3, max_items = 3, max_string = \"9B\" }",
        )
        + &route(
            "schema",
            "json = { max_depth = 127, max_digits = 10000, max_key = \"64KiB\" }, schema = \"schemas/s.json\"",
        );
    let schema = r#"{ "type": "object", "required": ["type"], "additionalProperties": false, "properties": {
        "type": { "enum": ["a", "b"] }, "text": { "type": "string", "minLength": 1, "maxLength": 4 },
        "list": { "type": "array", "maxItems": 2, "items": { "type": "integer", "minimum": 0 } } } }"#;
    let files = [("policy.toml", &*text), ("schemas/s.json", schema)];
    let files = files.map(|(name, text)| (name.to_owned(), text.as_bytes().to_owned())).into();
    Policy::compile(&Bundle { root: PathBuf::from("/"), files }, &BTreeMap::new())
        .unwrap_or_else(|errors| panic!("{errors}"))
});

/// A body.
///
/// What passes is JSON to another reader too, with no key twice and within its bounds; what does not is no JSON to
/// that reader, or is refused for what only we refuse. What passes a schema has its form.
pub fn json(data: &[u8]) {
    let judge = |path| {
        let mut headers = HeaderMap::new();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let facts = RequestFacts {
            certificate: None,
            peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
            host: "localhost",
            method: &Method::POST,
            path,
            query: None,
            headers: &headers,
            websocket: false,
            content_length: None,
            has_body: true,
            tls: sealgate_policy::TlsFacts::default(),
        };
        let demands = JSON.match_request(&facts)?.judge(&facts, None)?;
        let permit = settle(demands, Evidence { rates: Ok(()), revoked: false, lost: None })?;
        permit.judge_body(data, &DecisionCache::new(8)).map(drop)
    };
    let read = serde_json::from_slice::<Keyed>(data);
    match judge("/plain").map_err(|denial| denial.reason()) {
        Ok(()) => assert!(read.is_ok(), "{read:?}"),
        Err("not-json") => assert!(read.is_err(), "{read:?}"),
        Err("json-duplicate-key") => assert!(read.is_err()),
        // Counts, and lengths that stand before a fault of another kind.
        Err(reason) => assert!(reason.starts_with("json-"), "{reason}"),
    }
    if judge("/small").is_ok() {
        let Keyed { depth, values } = read.expect("what is small enough is JSON");
        assert!(depth <= 3 && values <= 9, "{depth} deep, {values} values");
    }
    if judge("/schema").is_ok() {
        let value: Value = serde_json::from_slice(data).expect("JSON");
        let known = |name: &String| ["type", "text", "list"].contains(&name.as_str());
        assert!(value.as_object().is_some_and(|object| object.keys().all(known)), "{value}");
        assert!(value["type"] == "a" || value["type"] == "b", "{value}");
        let length = value.get("text").map_or(1, |text| text.as_str().expect("a text").chars().count());
        assert!((1..=4).contains(&length), "{value}");
        let list = value.get("list").map(|list| list.as_array().expect("a list"));
        let whole = |item: &Value| item.as_f64().is_some_and(|it| it >= 0.0 && it.fract() == 0.0);
        assert!(list.is_none_or(|list| list.len() <= 2 && list.iter().all(whole)), "{value}");
    }
}

/// What serde reads of a JSON text in which no key stands twice.
#[derive(Debug, Default)]
struct Keyed {
    depth: usize,
    values: usize,
}

impl<'de> serde::Deserialize<'de> for Keyed {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(KeyedVisitor)
    }
}

struct KeyedVisitor;

impl KeyedVisitor {
    fn around(inner: impl Iterator<Item = Keyed>) -> Keyed {
        let all = inner.fold(Keyed::default(), |sum, one| Keyed {
            depth: sum.depth.max(one.depth),
            values: sum.values + one.values,
        });
        Keyed { depth: all.depth + 1, values: all.values + 1 }
    }
}

impl<'de> serde::de::Visitor<'de> for KeyedVisitor {
    type Value = Keyed;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }
    fn visit_unit<E: serde::de::Error>(self) -> Result<Keyed, E> {
        Ok(Keyed { depth: 0, values: 1 })
    }
    fn visit_bool<E: serde::de::Error>(self, _: bool) -> Result<Keyed, E> {
        self.visit_unit()
    }
    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<Keyed, E> {
        self.visit_unit()
    }
    fn visit_u64<E: serde::de::Error>(self, _: u64) -> Result<Keyed, E> {
        self.visit_unit()
    }
    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<Keyed, E> {
        self.visit_unit()
    }
    fn visit_str<E: serde::de::Error>(self, _: &str) -> Result<Keyed, E> {
        self.visit_unit()
    }
    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut items: A) -> Result<Keyed, A::Error> {
        let mut inner = Vec::new();
        while let Some(item) = items.next_element::<Keyed>()? {
            inner.push(item);
        }
        Ok(Self::around(inner.into_iter()))
    }
    fn visit_map<A: serde::de::MapAccess<'de>>(self, mut members: A) -> Result<Keyed, A::Error> {
        let mut inner = BTreeMap::new();
        while let Some((key, value)) = members.next_entry::<String, Keyed>()? {
            if inner.insert(key, value).is_some() {
                return Err(serde::de::Error::custom("a key stands twice"));
            }
        }
        Ok(Self::around(inner.into_values()))
    }
}

const HEAD_BYTES: u32 = 2048;
const HEAD_FIELDS: u32 = 20;

/// What a client sends over HTTP/1.1.
///
/// The guard passes the same however it is cut; and hyper reads of what it passes as many requests, of the same methods and
/// targets, with the same bodies, as a plain reading by the book finds.
pub fn request_guard(data: &[u8]) {
    let (whole, fault) = guarded(data, data.len().max(1));
    for cut in [1, 7, 64] {
        assert_eq!(guarded(data, cut), (whole.clone(), fault), "cut by {cut}");
    }
    assert!(data.starts_with(&whole));
    let ours = by_the_book(&whole);
    let theirs = by_hyper(&whole);
    assert_eq!(ours, theirs, "hyper reads something else");
}

fn guarded(data: &[u8], cut: usize) -> (Vec<u8>, Option<GuardFault>) {
    let mut guard = RequestGuard::new(HEAD_BYTES, HEAD_FIELDS);
    let mut passed = 0;
    let mut end = 0;
    while end < data.len() {
        end = (end + cut).min(data.len());
        let judged = guard.judge(&data[passed..end]);
        passed += judged.pass;
        if judged.fault.is_some() {
            return (data[..passed].to_vec(), judged.fault);
        }
    }
    (data[..passed].to_vec(), None)
}

/// A request: its method, target and body, and whether that came to its end.
type Request = (String, String, Vec<u8>, bool);

/// Reads what the guard has passed, trusting it: lines, one length, chunks.
fn by_the_book(mut wire: &[u8]) -> Vec<Request> {
    let mut requests = Vec::new();
    while let Some(rest) = wire.strip_prefix(b"\r\n") {
        wire = rest;
    }
    while !wire.is_empty() {
        let end = wire.windows(4).position(|four| four == b"\r\n\r\n").expect("heads pass as a whole") + 4;
        let head = String::from_utf8_lossy(&wire[..end]).into_owned();
        wire = &wire[end..];
        let mut words = head.split_whitespace();
        let (method, target) = (words.next().expect("a method").to_owned(), words.next().expect("a target"));
        // What is no URI for hyper, it refuses.
        let Ok(target) = target.parse::<Uri>().map(|uri| uri.to_string()) else { return requests };
        let field = |name: &str| {
            head.lines().skip(1).filter_map(|line| line.split_once(':')).find_map(|(have, value)| {
                have.eq_ignore_ascii_case(name).then(|| value.trim_matches([' ', '\t']).to_owned())
            })
        };
        let mut body = Vec::new();
        let mut ended = true;
        if field("transfer-encoding").is_some() {
            loop {
                let Some(end) = wire.windows(2).position(|two| two == b"\r\n") else {
                    ended = false;
                    break;
                };
                let line = std::str::from_utf8(&wire[..end]).expect("ASCII");
                let size = line.split(';').next().expect("a size");
                let size = usize::from_str_radix(size, 16).expect("hexadecimal");
                wire = &wire[end + 2..];
                if size == 0 {
                    // Trailers, up to an empty line.
                    loop {
                        let Some(end) = wire.windows(2).position(|two| two == b"\r\n") else {
                            ended = false;
                            break;
                        };
                        wire = &wire[end + 2..];
                        if end == 0 {
                            break;
                        }
                    }
                    break;
                }
                let have = size.min(wire.len());
                body.extend_from_slice(&wire[..have]);
                wire = &wire[have..];
                if have < size || wire.len() < 2 {
                    ended = false;
                    break;
                }
                wire = &wire[2..];
            }
        } else if let Some(length) = field("content-length") {
            let length: u64 = length.parse().expect("a length");
            let have = usize::try_from(length).unwrap_or(usize::MAX).min(wire.len());
            body.extend_from_slice(&wire[..have]);
            ended = have as u64 == length;
            wire = &wire[have..];
        }
        // What hyper ends the connection after.
        let says = |wanted: &str| {
            head.lines().skip(1).filter_map(|line| line.split_once(':')).any(|(name, value)| {
                name.eq_ignore_ascii_case("connection")
                    && value.is_ascii()
                    && value.split(',').any(|option| option.trim().eq_ignore_ascii_case(wanted))
            })
        };
        let http10 = head.lines().next().is_some_and(|line| line.ends_with("HTTP/1.0"));
        requests.push((method, target, body, ended));
        if !ended || says("close") || http10 && !says("keep-alive") {
            break;
        }
        while let Some(rest) = wire.strip_prefix(b"\r\n") {
            wire = rest;
        }
    }
    requests
}

/// What hyper's server makes of it.
fn by_hyper(wire: &[u8]) -> Vec<Request> {
    let seen: Rc<RefCell<Vec<Request>>> = Rc::default();
    let service = {
        let seen = seen.clone();
        hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
            let seen = seen.clone();
            async move {
                let (method, target) = (request.method().to_string(), request.uri().to_string());
                let at = seen.borrow().len();
                seen.borrow_mut().push((method, target, Vec::new(), false));
                let mut body = request.into_body();
                loop {
                    match body.frame().await {
                        Some(Ok(frame)) => {
                            if let Ok(data) = frame.into_data() {
                                seen.borrow_mut()[at].2.extend_from_slice(&data);
                            }
                        }
                        Some(Err(error)) => return Err(error),
                        None => break,
                    }
                }
                seen.borrow_mut()[at].3 = true;
                Ok(http::Response::new(http_body_util::Empty::<bytes::Bytes>::new()))
            }
        })
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        let (ours, theirs) = tokio::io::duplex(1 << 20);
        let (mut read, mut write) = tokio::io::split(ours);
        let serving = hyper::server::conn::http1::Builder::new()
            .half_close(true)
            .header_read_timeout(None)
            .max_headers(HEAD_FIELDS as usize)
            .serve_connection(hyper_util::rt::TokioIo::new(theirs), service);
        let feeding = async {
            let _ = write.write_all(wire).await;
            let _ = write.shutdown().await;
            let _ = read.read_to_end(&mut Vec::new()).await;
        };
        let _ = tokio::join!(serving, feeding);
    });
    seen.take()
}

/// What a client sends over HTTP/2. A stream of frames means the same however it is cut.
pub fn frame_guard(data: &[u8]) {
    let now = Instant::now();
    let judged = |cut: usize| {
        let mut guard = FrameGuard::default();
        let fault = data.chunks(cut).find_map(|piece| guard.judge(piece, now).err());
        (fault, fault.is_none() && guard.is_amid())
    };
    let whole = judged(data.len().max(1));
    for cut in [1, 5, 9, 64] {
        assert_eq!(judged(cut), whole, "cut by {cut}");
    }
}

/// What came of bytes that should be a ClientHello.
#[derive(Debug, PartialEq, Eq)]
enum HelloReading {
    Hello(Hello),
    Refused,
    More,
}

/// What a client says first.
///
/// However it is cut, it comes to the same; what is none gets one alert or nothing; the certificate that is chosen is the one for the
/// name, with a signature that the client understands; and the suite and the group are those that the policy wants most.
pub fn client_hello(data: &[u8]) {
    let whole = read_hello(data, data.len().max(1));
    // In pieces that are many, but not so many that it takes for ever.
    assert_eq!(whole, read_hello(data, data.len() / 512 + 1), "it was cut differently");
    let HelloReading::Hello(hello) = whole else { return };
    assert!(hello.name.as_ref().is_none_or(|name| *name == name.to_ascii_lowercase()));
    chosen_as_it_should_be(data, hello.name.as_deref());
    agreed_on_as_it_should_be(data, &hello);
}

fn read_hello(data: &[u8], step: usize) -> HelloReading {
    let mut reader = HelloReader::default();
    let mut end = 0;
    while end < data.len() {
        end = data.len().min(end + step);
        match reader.read(&data[..end]) {
            Ok(Some(hello)) => return HelloReading::Hello(hello),
            Ok(None) => {}
            Err(refused) => {
                let alert = refused.alert;
                assert!(matches!(alert[..], [] | [21, 3, _, 0, 2, 1 | 2, _]), "{alert:?}");
                return HelloReading::Refused;
            }
        }
    }
    HelloReading::More
}

/// Names, and whether the key is RSA, of the certificates that are chosen from: in the order of the store's entries.
const CERTIFICATES: [(&[&str], bool); 4] = [
    (&["chat.example", "other.example"], false),
    (&["chat.example"], true),
    (&["*.chat.example"], false),
    // The default.
    (&[], true),
];

/// The store, and the certificates as they go over the wire.
static STORE: LazyLock<(Arc<CertificateStore>, Vec<Vec<u8>>)> = LazyLock::new(|| {
    let mut leaves = Vec::new();
    let entries = CERTIFICATES.map(|(names, rsa)| {
        let key = if rsa {
            rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048)
        } else {
            rcgen::KeyPair::generate()
        };
        let key = key.expect("a key");
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let certificate = rcgen::CertificateParams::new(names.clone()).expect("names");
        let certificate = certificate.self_signed(&key).expect("a certificate");
        leaves.push(certificate.der().to_vec());
        let key_pem = key.serialize_pem().into_bytes().into();
        CertificateEntry { names, chain_pem: certificate.pem().into_bytes(), key_pem }
    });
    let provider = sealgate_keys::provider(&ProviderChoice::default());
    let store = CertificateStore::build(entries.into(), &provider, std::time::SystemTime::now());
    (Arc::new(store.expect("a store")), leaves)
});

static CONFIGS: LazyLock<ServerConfigs> = LazyLock::new(|| {
    let provider = sealgate_keys::provider(&ProviderChoice::default());
    let configs = ServerConfigs::new(&provider, |provider| {
        let versions = rustls::ALL_VERSIONS;
        sealgate_keys::server_config(
            STORE.0.clone(),
            provider,
            versions,
            None,
            &[b"h2"],
            &ClientTrust::none(),
        )
    });
    configs.expect("configurations")
});

fn accepted(mut hello: &[u8]) -> Accepted {
    let mut acceptor = Acceptor::default();
    loop {
        acceptor.read_tls(&mut hello).expect("it was read before");
        if let Some(accepted) = acceptor.accept().unwrap_or_else(|_| panic!("it was read before")) {
            return accepted;
        }
    }
}

/// What rustls makes of it: in TLS 1.3 it answers at once, or asks for the key that it wants.
fn agreed_on_as_it_should_be(data: &[u8], hello: &Hello) {
    let accepted = accepted(data);
    let said = accepted.client_hello();
    let offered = said.named_groups().unwrap_or_default().to_vec();
    let suites: Vec<_> = said.cipher_suites().to_vec();
    let config = CONFIGS.of(&hello.groups, hello.wants_chacha);
    let mut wire = Vec::new();
    let connection = match accepted.into_connection(config) {
        Ok(mut connection) => {
            while connection.wants_write() {
                connection.write_tls(&mut wire).expect("room");
            }
            connection
        }
        Err(_) => return,
    };
    if connection.protocol_version() != Some(rustls::ProtocolVersion::TLSv1_3) {
        return;
    }
    let suite = connection.negotiated_cipher_suite().expect("a suite").suite();
    if hello.wants_chacha && suites.contains(&CipherSuite::TLS13_CHACHA20_POLY1305_SHA256) {
        assert_eq!(suite, CipherSuite::TLS13_CHACHA20_POLY1305_SHA256);
    }
    let wanted = GROUPS.iter().find(|group| offered.contains(group)).expect("a group");
    let asks_again = wire.get(11..43) == Some(&HELLO_RETRY_REQUEST);
    let agreed = connection.negotiated_key_exchange_group().map(|group| group.name());
    assert!(asks_again || agreed == Some(*wanted), "{agreed:?} instead of {wanted:?} of {offered:?}");
    if asks_again {
        let asked = wanted_in_retry(&wire).expect("a group");
        assert_eq!(asked, u16::from(*wanted), "another was asked for");
    }
}

/// The random number of a ServerHello that is none (RFC 8446 §4.1.3).
const HELLO_RETRY_REQUEST: [u8; 32] = [
    0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2,
    0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
];

/// The group that a HelloRetryRequest asks for.
fn wanted_in_retry(wire: &[u8]) -> Option<u16> {
    let session = usize::from(*wire.get(43)?);
    let mut rest = wire.get(44 + session + 5..)?;
    loop {
        let [kind @ .., a, b] = *rest.first_chunk::<4>()?;
        let body = rest.get(4..4 + usize::from(u16::from_be_bytes([a, b])))?;
        if kind == [0, 51] {
            return Some(u16::from_be_bytes(*body.first_chunk()?));
        }
        rest = rest.get(4 + body.len()..)?;
    }
}

/// Against a second, slower way to choose.
fn chosen_as_it_should_be(hello: &[u8], name: Option<&str>) {
    let (store, leaves) = &*STORE;
    let accepted = accepted(hello);
    let schemes = accepted.client_hello().signature_schemes().to_vec();
    let chosen = store.resolve(accepted.client_hello());
    let chosen = chosen.map(|key| leaves.iter().position(|leaf| *leaf == *key.cert[0]).expect("one of ours"));

    let with = |wanted: &str| (0..4).filter(|at| CERTIFICATES[*at].0.contains(&wanted)).collect::<Vec<_>>();
    let mut candidates = name.map(with).unwrap_or_default();
    if candidates.is_empty()
        && let Some((_, parent)) = name.and_then(|name| name.split_once('.'))
    {
        candidates = with(&format!("*.{parent}"));
    }
    if candidates.is_empty() {
        candidates = vec![3];
    }
    use SignatureScheme::{
        ECDSA_NISTP256_SHA256, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384, RSA_PKCS1_SHA512, RSA_PSS_SHA256,
        RSA_PSS_SHA384, RSA_PSS_SHA512,
    };
    let understood = |at: &usize| {
        schemes.iter().any(|scheme| match scheme {
            ECDSA_NISTP256_SHA256 => !CERTIFICATES[*at].1,
            RSA_PKCS1_SHA256 | RSA_PKCS1_SHA384 | RSA_PKCS1_SHA512 | RSA_PSS_SHA256 | RSA_PSS_SHA384
            | RSA_PSS_SHA512 => CERTIFICATES[*at].1,
            _ => false,
        })
    };
    assert_eq!(chosen, candidates.into_iter().find(understood), "{name:?} with {schemes:?}");
}

/// A name and signatures, in a ClientHello made of them: the first byte says how many signatures there are (2 bytes each), the rest
/// is the name.
///
/// As [`client_hello`], which rarely gets so far by itself.
pub fn certificate_choice(data: &[u8]) {
    let Some((count, rest)) = data.split_first() else { return };
    let (schemes, name) = rest.split_at((usize::from(*count) * 2).min(rest.len() & !1));
    let sized = |bytes: &[u8]| [&(bytes.len() as u16).to_be_bytes(), bytes].concat();
    let extension = |kind: u16, body: &[u8]| [&kind.to_be_bytes()[..], &sized(body)].concat();
    let name = [&[0][..], &sized(&name[..name.len().min(300)])].concat();
    let extensions = [
        extension(0, &sized(&name)),
        extension(10, &[0, 2, 0, 29]),
        extension(13, &sized(schemes)),
        extension(23, &[]),
    ];
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.push(0);
    body.extend(sized(&[0xc0, 0x2b, 0xc0, 0x2f]));
    body.extend([1, 0]);
    body.extend(sized(&extensions.concat()));
    let length = (body.len() as u32).to_be_bytes();
    let message = [&[1], &length[1..], &body].concat();
    client_hello(&[&[22, 3, 1][..], &sized(&message)].concat());
}

/// What a load balancer says of its client: read the same however it comes, and never beyond its end.
pub fn proxy_header(data: &[u8]) {
    let whole = read_header(data);
    for end in 0..data.len().min(300) {
        match read_header(&data[..end]) {
            Ok(None) => {}
            early => assert_eq!(early, whole, "what followed changed it"),
        }
    }
    if let Ok(Some((length, _))) = whole {
        assert!(length <= data.len());
        assert_eq!(read_header(&data[..length]), whole);
        assert_eq!(read_header(&data[..length - 1]), Ok(None), "it had ended before");
    }
}
