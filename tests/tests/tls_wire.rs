//! TLS as bytes: what is old, weak or malformed gets its alert at once, and nothing hangs. What the standards allow passes.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls::SupportedProtocolVersion;
use rustls::version::{TLS12, TLS13};
use sealgate_tests::{Bundle, DEADLINE, Gateway, Wire, client_config, until};

const RULES: &str = r#"
[[route]]
name = "open"
path = "/open"
methods = ["GET"]
upstream = "backend"
auth = "none"
"#;

fn start(more: &str) -> (Bundle, Gateway) {
    let bundle = Bundle::new(&format!("{more}{RULES}"));
    let gateway = Gateway::run(&bundle);
    (bundle, gateway)
}

/// As above, but clients are told apart by the name that they ask for: their ClientHello is read before TLS begins.
fn start_by_name(more: &str) -> (Bundle, Gateway) {
    let bundle = Bundle::new("");
    bundle.pki.issue("named", &["localhost"]);
    bundle.write(&format!(
        "[tls]\nunknown_name = \"refuse\"\n[[certificate]]\nnames = [\"localhost\"]\n\
         chain = \"file:${{state}}/certs/named.pem\"\nkey = \"file:${{state}}/certs/named.key\"\n{more}{RULES}"
    ));
    let gateway = Gateway::run(&bundle);
    (bundle, gateway)
}

// Alerts (RFC 8446 §6).
const UNEXPECTED_MESSAGE: u8 = 10;
const HANDSHAKE_FAILURE: u8 = 40;
const ILLEGAL_PARAMETER: u8 = 47;
const DECODE_ERROR: u8 = 50;
const PROTOCOL_VERSION: u8 = 70;
const INAPPROPRIATE_FALLBACK: u8 = 86;
const NO_APPLICATION_PROTOCOL: u8 = 120;

// Extensions.
const SERVER_NAME: u16 = 0;
const GROUPS: u16 = 10;
const POINT_FORMATS: u16 = 11;
const SIGNATURES: u16 = 13;
const HEARTBEAT: u16 = 15;
const ALPN: u16 = 16;
const EXTENDED_MASTER_SECRET: u16 = 23;
const TICKET: u16 = 35;
const PRE_SHARED_KEY: u16 = 41;
const EARLY_DATA: u16 = 42;
const VERSIONS: u16 = 43;
const PSK_MODES: u16 = 45;
const KEY_SHARE: u16 = 51;
const RENEGOTIATION: u16 = 0xff01;

/// All that can be agreed on.
const SUITES_12: [u16; 6] = [0xc02b, 0xc02c, 0xcca9, 0xc02f, 0xc030, 0xcca8];
const SUITES_13: [u16; 3] = [0x1301, 0x1302, 0x1303];
const ALL_GROUPS: [u16; 4] = [0x11ec, 29, 23, 24];

/// A ClientHello (RFC 5246 §7.4.1.2, RFC 8446 §4.1.2), whatever is in it.
#[derive(Clone)]
struct Hello {
    version: u16,
    session: Vec<u8>,
    suites: Vec<u16>,
    compressions: Vec<u8>,
    extensions: Vec<(u16, Vec<u8>)>,
}

impl Hello {
    /// As a decent client of TLS 1.2 says it.
    fn tls12() -> Hello {
        Hello {
            version: 0x0303,
            session: Vec::new(),
            suites: SUITES_12.to_vec(),
            compressions: vec![0],
            extensions: vec![
                (SERVER_NAME, name(b"localhost")),
                (GROUPS, list16(&[29, 23])),
                (POINT_FORMATS, vec![1, 0]),
                (SIGNATURES, list16(&[0x0403, 0x0804, 0x0401])),
                (EXTENDED_MASTER_SECRET, Vec::new()),
                (RENEGOTIATION, vec![0]),
            ],
        }
    }

    fn tls13() -> Hello {
        Hello { session: vec![7; 32], suites: SUITES_13.to_vec(), ..Hello::tls12() }
            .with(VERSIONS, vec![2, 3, 4])
            .with(KEY_SHARE, share(29, &POINT))
            .with(PSK_MODES, vec![1, 1])
    }

    fn version(mut self, version: u16) -> Hello {
        self.version = version;
        self
    }

    fn suites(mut self, suites: &[u16]) -> Hello {
        self.suites = suites.to_vec();
        self
    }

    fn compressions(mut self, compressions: &[u8]) -> Hello {
        self.compressions = compressions.to_vec();
        self
    }

    fn with(mut self, kind: u16, body: Vec<u8>) -> Hello {
        match self.extensions.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, before)) => *before = body,
            None => self.extensions.push((kind, body)),
        }
        self
    }

    fn twice(mut self, kind: u16, body: Vec<u8>) -> Hello {
        self.extensions.push((kind, body));
        self
    }

    fn without(mut self, kind: u16) -> Hello {
        self.extensions.retain(|(known, _)| *known != kind);
        self
    }

    fn body(&self) -> Vec<u8> {
        let mut body = self.version.to_be_bytes().to_vec();
        body.extend([0x5a; 32]);
        body.push(self.session.len() as u8);
        body.extend(&self.session);
        body.extend(list16(&self.suites));
        body.push(self.compressions.len() as u8);
        body.extend(&self.compressions);
        let extensions: Vec<u8> = self
            .extensions
            .iter()
            .flat_map(|(kind, body)| [&kind.to_be_bytes(), vec16(body).as_slice()].concat())
            .collect();
        body.extend(vec16(&extensions));
        body
    }

    fn message(&self) -> Vec<u8> {
        message(1, &self.body())
    }

    /// In as many records as it needs.
    fn wire(&self) -> Vec<u8> {
        self.message().chunks(16_000).flat_map(|piece| record(22, piece)).collect()
    }
}

/// A point of Curve25519: its base.
const POINT: [u8; 32] = {
    let mut point = [0; 32];
    point[0] = 9;
    point
};

/// The base of P-256 (FIPS 186-4 §D.1.2.3).
const P256_BASE: [u8; 64] = [
    0x6b, 0x17, 0xd1, 0xf2, 0xe1, 0x2c, 0x42, 0x47, 0xf8, 0xbc, 0xe6, 0xe5, 0x63, 0xa4, 0x40, 0xf2, 0x77,
    0x03, 0x7d, 0x81, 0x2d, 0xeb, 0x33, 0xa0, 0xf4, 0xa1, 0x39, 0x45, 0xd8, 0x98, 0xc2, 0x96, 0x4f, 0xe3,
    0x42, 0xe2, 0xfe, 0x1a, 0x7f, 0x9b, 0x8e, 0xe7, 0xeb, 0x4a, 0x7c, 0x0f, 0x9e, 0x16, 0x2b, 0xce, 0x33,
    0x57, 0x6b, 0x31, 0x5e, 0xce, 0xcb, 0xb6, 0x40, 0x68, 0x37, 0xbf, 0x51, 0xf5,
];

fn vec16(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u16).to_be_bytes(), bytes].concat()
}

fn list16(values: &[u16]) -> Vec<u8> {
    vec16(&values.iter().flat_map(|value| value.to_be_bytes()).collect::<Vec<u8>>())
}

fn name(name: &[u8]) -> Vec<u8> {
    vec16(&[&[0], vec16(name).as_slice()].concat())
}

fn share(group: u16, key: &[u8]) -> Vec<u8> {
    vec16(&[&group.to_be_bytes(), vec16(key).as_slice()].concat())
}

fn message(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = (body.len() as u32).to_be_bytes();
    [&[kind], &length[1..], body].concat()
}

fn record(kind: u8, payload: &[u8]) -> Vec<u8> {
    [&[kind, 3, 1], vec16(payload).as_slice()].concat()
}

/// What came of the first words.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    /// A fatal alert, and the end behind it.
    Alert(u8),
    /// A ServerHello.
    Hello(ServerHello),
    /// The end, and nothing before it.
    End,
}

#[derive(Debug, PartialEq, Eq)]
struct ServerHello {
    /// The one that counts, be it in an extension.
    version: u16,
    random: [u8; 32],
    suite: u16,
    compression: u8,
    extensions: Vec<u16>,
    /// That of its key, or of the key that it asks for.
    group: Option<u16>,
}

struct Raw {
    socket: TcpStream,
}

impl Raw {
    fn connect(gateway: &Gateway) -> Raw {
        let socket = TcpStream::connect(gateway.address()).expect("a connection");
        socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        socket.set_nodelay(true).expect("no delay");
        Raw { socket }
    }

    fn send(&mut self, bytes: &[u8]) {
        // A peer that has ended it is what is looked for.
        let _ = self.socket.write_all(bytes);
    }

    fn answer(&mut self) -> Answer {
        let Some((kind, payload)) = self.record() else { return Answer::End };
        match (kind, payload.as_slice()) {
            (21, [2, alert]) => {
                assert!(self.record().is_none(), "something comes behind a fatal alert");
                Answer::Alert(*alert)
            }
            (22, [2, _, _, _, hello @ ..]) => Answer::Hello(read_hello(hello)),
            _ => panic!("a record of kind {kind}: {payload:02x?}"),
        }
    }

    /// The change of cipher is for middleboxes (RFC 8446 §D.4).
    fn answer_behind_change_of_cipher(&mut self) -> Answer {
        assert_eq!(self.record(), Some((20, vec![1])));
        self.answer()
    }

    fn record(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut header = [0; 5];
        self.read(&mut header)?;
        let mut payload = vec![0; u16::from_be_bytes([header[3], header[4]]).into()];
        self.read(&mut payload)?;
        Some((header[0], payload))
    }

    fn read(&mut self, into: &mut [u8]) -> Option<()> {
        match self.socket.read_exact(into) {
            Ok(()) => Some(()),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!("silence for {DEADLINE:?}")
            }
            Err(_) => None,
        }
    }
}

fn read_hello(hello: &[u8]) -> ServerHello {
    let session = usize::from(hello[34]);
    let rest = &hello[35 + session..];
    let mut version = u16::from_be_bytes([hello[0], hello[1]]);
    let (mut extensions, mut group) = (Vec::new(), None);
    let mut left = &rest[5..];
    while let [a, b, c, d, after @ ..] = left {
        let (body, after) = after.split_at(u16::from_be_bytes([*c, *d]).into());
        let kind = u16::from_be_bytes([*a, *b]);
        if kind == VERSIONS {
            version = u16::from_be_bytes([body[0], body[1]]);
        }
        if kind == KEY_SHARE {
            group = Some(u16::from_be_bytes([body[0], body[1]]));
        }
        extensions.push(kind);
        left = after;
        // Messages may follow in the same record.
        let total = usize::from(u16::from_be_bytes([rest[3], rest[4]]));
        if rest.len() - 5 - left.len() >= total {
            break;
        }
    }
    let suite = u16::from_be_bytes([rest[0], rest[1]]);
    let random = hello[2..34].try_into().unwrap();
    ServerHello { version, random, suite, compression: rest[2], extensions, group }
}

fn ask(gateway: &Gateway, bytes: &[u8]) -> Answer {
    let mut raw = Raw::connect(gateway);
    raw.send(bytes);
    raw.answer()
}

#[track_caller]
fn accepted(gateway: &Gateway, what: &str, bytes: &[u8]) -> ServerHello {
    match ask(gateway, bytes) {
        Answer::Hello(hello) => hello,
        other => panic!("{what}: {other:?}"),
    }
}

/// Each case with its alert; all that were answered otherwise.
fn check(gateway: &Gateway, cases: &[(&str, Vec<u8>, u8)]) {
    let mut faults = Vec::new();
    for (what, bytes, alert) in cases {
        let answer = ask(gateway, bytes);
        if answer != Answer::Alert(*alert) {
            faults.push(format!("{what}: {answer:?} instead of alert {alert}"));
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
    assert_eq!(gateway.curl("/open").send().status, 200);
}

#[test]
fn t2_old_versions_weak_suites_and_weak_groups_get_their_alert() {
    let (_bundle, gateway) = start("");
    let only = |suite: u16| Hello::tls12().suites(&[suite]).wire();
    let ssl2 = [
        [0x80, 0x2e, 1, 0, 2, 0, 0x15, 0, 0, 0, 0x10].as_slice(),
        [1, 0, 0x80].repeat(7).as_slice(),
        [7; 16].as_slice(),
    ]
    .concat();
    let mut cases = vec![
        ("SSL 2", ssl2, DECODE_ERROR),
        ("SSL 3", Hello::tls12().version(0x0300).wire(), PROTOCOL_VERSION),
        ("TLS 1.0", Hello::tls12().version(0x0301).wire(), PROTOCOL_VERSION),
        ("TLS 1.1", Hello::tls12().version(0x0302).wire(), PROTOCOL_VERSION),
        (
            "TLS 1.1 and 1.0 in the extension",
            Hello::tls13().with(VERSIONS, vec![4, 3, 2, 3, 1]).wire(),
            PROTOCOL_VERSION,
        ),
        ("a draft of TLS 1.3", Hello::tls13().with(VERSIONS, vec![2, 0x7f, 0x1c]).wire(), PROTOCOL_VERSION),
        (
            "an unknown version only",
            Hello::tls13().with(VERSIONS, vec![2, 0x0a, 0x0a]).wire(),
            PROTOCOL_VERSION,
        ),
        (
            "TLS 1.2 without signature algorithms",
            Hello::tls12().without(SIGNATURES).wire(),
            HANDSHAKE_FAILURE,
        ),
        (
            "SHA-1 only, TLS 1.2",
            Hello::tls12().with(SIGNATURES, list16(&[0x0203, 0x0201, 0x0202])).wire(),
            HANDSHAKE_FAILURE,
        ),
        (
            "SHA-1 only, TLS 1.3",
            Hello::tls13().with(SIGNATURES, list16(&[0x0203, 0x0201, 0x0202])).wire(),
            HANDSHAKE_FAILURE,
        ),
        (
            "PKCS #1 signatures only, TLS 1.3",
            Hello::tls13().with(SIGNATURES, list16(&[0x0401, 0x0501])).wire(),
            HANDSHAKE_FAILURE,
        ),
        ("TLS 1.3 with suites of TLS 1.2 only", Hello::tls13().suites(&SUITES_12).wire(), HANDSHAKE_FAILURE),
    ];
    for (what, suite) in [
        ("static RSA, AES-128-CBC", 0x002f),
        ("static RSA, AES-256-CBC", 0x0035),
        ("static RSA, AES-128-GCM", 0x009c),
        ("static RSA, AES-256-GCM", 0x009d),
        ("static ECDH, AES-128-GCM", 0xc02d),
        ("DHE, AES-128-CBC", 0x0033),
        ("DHE, AES-128-GCM", 0x009e),
        ("DHE, ChaCha20", 0xccaa),
        ("ECDHE, AES-128-CBC", 0xc009),
        ("ECDHE, AES-256-CBC with SHA-384", 0xc024),
        ("static RSA, 3DES", 0x000a),
        ("ECDHE, 3DES", 0xc008),
        ("static RSA, RC4 with MD5", 0x0004),
        ("static RSA, RC4", 0x0005),
        ("ECDHE, RC4", 0xc007),
        ("static RSA, DES", 0x0009),
        ("export, RC4", 0x0003),
        ("export, DES", 0x0008),
        ("no encryption", 0x0002),
        ("ECDHE, no encryption", 0xc006),
        ("anonymous DH", 0x0034),
        ("anonymous ECDH", 0xc018),
        ("IDEA", 0x0007),
        ("SEED", 0x0096),
        ("Camellia", 0x0041),
        ("ARIA", 0xc048),
        ("a key shared ahead", 0x00a8),
        ("SRP", 0xc01d),
        ("Kerberos", 0x001e),
        ("GOST", 0x0081),
        ("ECDHE, AES-128-CCM", 0xc0ac),
        ("ECDHE, AES-128-CCM-8", 0xc0ae),
    ] {
        cases.push((what, only(suite), HANDSHAKE_FAILURE));
    }
    // And whatever other numbers there are, 8,000 at a time; but for 0x5600, which is no suite (RFC 7507).
    let others = |known: &[u16]| {
        (0..=u16::MAX).filter(|number| *number != 0x5600 && !known.contains(number)).collect::<Vec<_>>()
    };
    for suites in others(&SUITES_12).chunks(8000) {
        cases.push(("any other suite, TLS 1.2", Hello::tls12().suites(suites).wire(), HANDSHAKE_FAILURE));
    }
    for suites in others(&SUITES_13).chunks(8000) {
        cases.push(("any other suite, TLS 1.3", Hello::tls13().suites(suites).wire(), HANDSHAKE_FAILURE));
    }
    for groups in others(&ALL_GROUPS).chunks(8000) {
        cases.push((
            "any other group, TLS 1.2",
            Hello::tls12().with(GROUPS, list16(groups)).wire(),
            HANDSHAKE_FAILURE,
        ));
        let hello = Hello::tls13().with(GROUPS, list16(groups)).with(KEY_SHARE, share(groups[0], &[4; 65]));
        cases.push(("any other group, TLS 1.3", hello.wire(), HANDSHAKE_FAILURE));
    }
    check(&gateway, &cases);
    assert!(gateway.metrics().sum("sealgate_tls_handshake_failures_total", &[]) >= cases.len() as f64);

    // The controls: each of them by itself is agreed on.
    for suite in &SUITES_12[..3] {
        let hello = accepted(&gateway, "TLS 1.2", &only(*suite));
        assert_eq!((hello.version, hello.suite, hello.compression), (0x0303, *suite, 0));
        assert!(
            hello.extensions.contains(&EXTENDED_MASTER_SECRET) && hello.extensions.contains(&RENEGOTIATION)
        );
        // RFC 8446 §4.1.3: a client that could have had TLS 1.3 sees that somebody took it away.
        assert_eq!(&hello.random[24..], b"DOWNGRD\x01");
    }
    for suite in SUITES_13 {
        let hello = accepted(&gateway, "TLS 1.3", &Hello::tls13().suites(&[suite]).wire());
        assert_eq!((hello.version, hello.suite, hello.compression), (0x0304, suite, 0));
    }
}

#[test]
fn what_is_offered_and_not_wanted_is_not_agreed_on() {
    let (_bundle, gateway) = start("");
    let plenty = |hello: Hello| {
        hello
            .with(HEARTBEAT, vec![1])
            .with(TICKET, Vec::new())
            // Truncated HMAC, maximum fragment length, next protocol, encrypt-then-MAC, record size limit, unknown.
            .with(4, Vec::new())
            .with(1, vec![1])
            .with(0x3374, Vec::new())
            .with(22, Vec::new())
            .with(28, vec![0x40, 0])
            .with(0x2a2a, vec![1, 2, 3])
    };
    let hello = accepted(&gateway, "TLS 1.2", &plenty(Hello::tls12()).compressions(&[1, 64, 0]).wire());
    assert_eq!(hello.compression, 0);
    let fine = [SERVER_NAME, POINT_FORMATS, EXTENDED_MASTER_SECRET, TICKET, RENEGOTIATION];
    assert!(hello.extensions.iter().all(|kind| fine.contains(kind)), "{:?}", hello.extensions);
    let hello = accepted(&gateway, "TLS 1.3", &plenty(Hello::tls13()).wire());
    assert_eq!(hello.extensions.iter().find(|kind| ![VERSIONS, KEY_SHARE].contains(kind)), None);
    // A key from nowhere, with early data: a full handshake.
    let identity = [vec16(b"nobody's ticket").as_slice(), &[0; 4]].concat();
    let binder = [[32].as_slice(), [1; 32].as_slice()].concat();
    let hello = Hello::tls13()
        .with(EARLY_DATA, Vec::new())
        .with(PRE_SHARED_KEY, [vec16(&identity), vec16(&binder)].concat());
    let hello = accepted(&gateway, "a key from nowhere", &hello.wire());
    assert!(!hello.extensions.contains(&PRE_SHARED_KEY));
    // RFC 7627 §5.3: without the extended master secret a server may go on. What that secret guards (resumption and renegotiation of
    // TLS 1.2) is not there.
    let hello = accepted(&gateway, "TLS 1.2", &Hello::tls12().without(EXTENDED_MASTER_SECRET).wire());
    assert!(!hello.extensions.contains(&EXTENDED_MASTER_SECRET) && !hello.extensions.contains(&TICKET));
    // A client of both versions gets the better one; GREASE (RFC 8701) and unknown numbers are passed over.
    let both = [&SUITES_12[..], &[0x0a0a, 0x00ff, 0x5600], &SUITES_13].concat();
    let hello = Hello::tls13().suites(&both).with(VERSIONS, vec![6, 0x2a, 0x2a, 3, 3, 3, 4]);
    assert_eq!(accepted(&gateway, "both versions", &hello.wire()).version, 0x0304);
}

/// The random number of a ServerHello that is none, but asks for another hello (RFC 8446 §4.1.3).
const HELLO_RETRY_REQUEST: [u8; 32] = [
    0xcf, 0x21, 0xad, 0x74, 0xe5, 0x9a, 0x61, 0x11, 0xbe, 0x1d, 0x8c, 0x02, 0x1e, 0x65, 0xb8, 0x91, 0xc2,
    0xa2, 0x11, 0x16, 0x7a, 0xbb, 0x8c, 0x5e, 0x07, 0x9e, 0x09, 0xe2, 0xc8, 0xa8, 0x33, 0x9c,
];

/// RFC 8446 §4.1.4: who has not sent a key for the group that is wanted most is asked for it, once, and gets its alert if it sends
/// anything else.
#[test]
fn t2_the_key_that_is_wanted_is_asked_for_once() {
    let (_bundle, gateway) = start("");
    let (_other_bundle, by_name) = start_by_name("");
    for gateway in [&gateway, &by_name] {
        let p256 = [[4].as_slice(), &P256_BASE].concat();
        let first = Hello::tls13().with(GROUPS, list16(&[23, 29])).with(KEY_SHARE, share(23, &p256));
        let asked = || {
            let mut raw = Raw::connect(gateway);
            raw.send(&first.wire());
            let Answer::Hello(hello) = raw.answer() else { panic!("no hello") };
            assert_eq!((hello.random, hello.group), (HELLO_RETRY_REQUEST, Some(29)), "X25519 is wanted");
            raw
        };
        for (what, second, alert) in [
            ("the same again", first.clone(), ILLEGAL_PARAMETER),
            ("no key", first.clone().without(KEY_SHARE), HANDSHAKE_FAILURE),
            ("none again", first.clone().with(KEY_SHARE, vec16(&[])), ILLEGAL_PARAMETER),
        ] {
            let mut raw = asked();
            raw.send(&second.wire());
            assert_eq!(raw.answer_behind_change_of_cipher(), Answer::Alert(alert), "{what}");
        }
        let mut raw = asked();
        raw.send(&first.clone().with(KEY_SHARE, share(29, &POINT)).wire());
        let Answer::Hello(hello) = raw.answer_behind_change_of_cipher() else { panic!("no hello") };
        assert_eq!((hello.version, hello.group), (0x0304, Some(29)));
        assert_ne!(hello.random, HELLO_RETRY_REQUEST);

        // Nobody who has sent it is asked: with others too, in whatever order.
        let both = [share(23, &p256)[2..].to_vec(), share(29, &POINT)[2..].to_vec()].concat();
        let hello = accepted(gateway, "both", &first.clone().with(KEY_SHARE, vec16(&both)).wire());
        assert_eq!((hello.version, hello.group), (0x0304, Some(29)));
        assert_ne!(hello.random, HELLO_RETRY_REQUEST);
    }
}

#[test]
fn hellos_that_are_malformed_get_their_alert() {
    let (_bundle, gateway) = start("");
    malformed(&gateway);
    let (_bundle, gateway) = start_by_name("");
    malformed(&gateway);
}

fn malformed(gateway: &Gateway) {
    let raw_body = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut body = Hello::tls12().body();
        change(&mut body);
        record(22, &message(1, &body))
    };
    let names = |body: Vec<u8>| Hello::tls12().with(SERVER_NAME, body).wire();
    let shares = |body: Vec<u8>| Hello::tls13().with(KEY_SHARE, body).wire();
    // Another group in common would be asked for instead of looking at this share (RFC 8446 §4.1.4).
    let p256 =
        |point: &[u8]| Hello::tls13().with(GROUPS, list16(&[23])).with(KEY_SHARE, share(23, point)).wire();
    let two_names = vec16(&[&[0], vec16(b"localhost").as_slice(), &[0], &vec16(b"other.test")].concat());
    let two_shares =
        [29_u16, 29].map(|group| [&group.to_be_bytes(), vec16(&POINT).as_slice()].concat()).concat();
    let both = [Hello::tls12().message(), Hello::tls12().message()].concat();
    check(
        gateway,
        &[
            ("DEFLATE and nothing else", Hello::tls12().compressions(&[1]).wire(), ILLEGAL_PARAMETER),
            ("compression in TLS 1.3", Hello::tls13().compressions(&[1, 0]).wire(), ILLEGAL_PARAMETER),
            ("no compression methods", Hello::tls12().compressions(&[]).wire(), DECODE_ERROR),
            ("no suites", Hello::tls12().suites(&[]).wire(), DECODE_ERROR),
            (
                "compressed points only",
                Hello::tls12().with(POINT_FORMATS, vec![1, 1]).wire(),
                ILLEGAL_PARAMETER,
            ),
            ("an empty name", names(name(b"")), DECODE_ERROR),
            ("a name with NUL", names(name(b"localhost\0.test")), ILLEGAL_PARAMETER),
            ("a name with a blank", names(name(b"local host")), ILLEGAL_PARAMETER),
            ("a name of 300 characters", names(name(&[b'a'; 300])), ILLEGAL_PARAMETER),
            ("two names", names(two_names), DECODE_ERROR),
            ("no list of names", names(vec![0]), DECODE_ERROR),
            ("a name twice", Hello::tls12().twice(SERVER_NAME, name(b"localhost")).wire(), ILLEGAL_PARAMETER),
            (
                "an unknown extension twice",
                Hello::tls12().twice(0x1234, vec![]).twice(0x1234, vec![]).wire(),
                ILLEGAL_PARAMETER,
            ),
            (
                "a protocol that is not ours",
                Hello::tls12().with(ALPN, vec16(b"\x06spdy/3")).wire(),
                NO_APPLICATION_PROTOCOL,
            ),
            ("an empty list of protocols", Hello::tls12().with(ALPN, vec![0, 0]).wire(), DECODE_ERROR),
            ("an empty protocol", Hello::tls12().with(ALPN, vec16(&[0])).wire(), DECODE_ERROR),
            ("no key share", Hello::tls13().without(KEY_SHARE).wire(), HANDSHAKE_FAILURE),
            ("X25519: nought", shares(share(29, &[0; 32])), ILLEGAL_PARAMETER),
            ("X25519: 31 bytes", shares(share(29, &[9; 31])), ILLEGAL_PARAMETER),
            (
                "P-256: not on the curve",
                p256(&[[4].as_slice(), [1; 64].as_slice()].concat()),
                ILLEGAL_PARAMETER,
            ),
            ("P-256: compressed", p256(&[[2].as_slice(), [1; 32].as_slice()].concat()), ILLEGAL_PARAMETER),
            ("a share twice", shares(vec16(&two_shares)), ILLEGAL_PARAMETER),
            (
                "a key shared ahead that is not the last extension",
                Hello::tls13()
                    .without(PSK_MODES)
                    .with(
                        PRE_SHARED_KEY,
                        [
                            vec16(&[0, 1, 7, 0, 0, 0, 0]),
                            vec16(&[[32].as_slice(), [1; 32].as_slice()].concat()),
                        ]
                        .concat(),
                    )
                    .with(PSK_MODES, vec![1, 1])
                    .wire(),
                ILLEGAL_PARAMETER,
            ),
            // RFC 7507 §3; with TLS 1.3 offered beside, it is passed over.
            (
                "a fallback from TLS 1.3",
                Hello::tls12().suites(&[0xc02b, 0xc02f, 0x5600]).wire(),
                INAPPROPRIATE_FALLBACK,
            ),
            ("no body", record(22, &message(1, &[])), DECODE_ERROR),
            (
                "a session id of 33 bytes",
                Hello { session: vec![7; 33], ..Hello::tls12() }.wire(),
                DECODE_ERROR,
            ),
            ("bytes behind the extensions", raw_body(&|body| body.push(0)), DECODE_ERROR),
            ("extensions that are cut off", raw_body(&|body| body.truncate(body.len() - 1)), DECODE_ERROR),
            ("half a suite", raw_body(&|body| body[36] -= 1), DECODE_ERROR),
            ("two hellos at once", record(22, &both), UNEXPECTED_MESSAGE),
            ("a ServerHello", record(22, &message(2, &Hello::tls12().body())), DECODE_ERROR),
            ("Finished", record(22, &message(20, &[0; 12])), UNEXPECTED_MESSAGE),
            (
                "another record between the parts of a hello",
                [record(22, &Hello::tls12().message()[..40]), record(21, &[1, 90])].concat(),
                UNEXPECTED_MESSAGE,
            ),
            ("a message of 16 MiB", record(22, &[1, 0xff, 0xff, 0xff, 3, 3]), DECODE_ERROR),
            ("an empty record", record(22, &[]), DECODE_ERROR),
            ("data before the handshake", record(23, b"GET / HTTP/1.1\r\n\r\n"), UNEXPECTED_MESSAGE),
            ("a change of cipher first", record(20, &[1]), UNEXPECTED_MESSAGE),
            ("a heartbeat first (CVE-2014-0160)", record(24, &[1, 0x40, 0, 7]), DECODE_ERROR),
            ("a record of an unknown kind", record(99, &[0; 8]), DECODE_ERROR),
            ("a record of another version", [&[22, 9, 9, 0, 1], [0].as_slice()].concat(), DECODE_ERROR),
            (
                "a record longer than any may be",
                [&[22, 3, 1, 0x48, 1], [1; 64].as_slice()].concat(),
                DECODE_ERROR,
            ),
            ("HTTP without TLS", b"GET /open HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec(), DECODE_ERROR),
            ("another protocol", b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), DECODE_ERROR),
        ],
    );
    let of_no_level = ask(gateway, &record(21, &[9, 0]));
    assert!(matches!(of_no_level, Answer::Alert(UNEXPECTED_MESSAGE | ILLEGAL_PARAMETER)), "{of_no_level:?}");
    // A goodbye is no hello; it ends, at once.
    let goodbye = ask(gateway, &record(21, &[2, HANDSHAKE_FAILURE]));
    assert!(matches!(goodbye, Answer::End | Answer::Alert(UNEXPECTED_MESSAGE)), "{goodbye:?}");
    assert!(matches!(ask(gateway, &record(21, &[1, 90]).repeat(50)), Answer::End | Answer::Alert(_)));
}

/// A ClientHello may be long (RFC 8446 §4.1.2: extensions of up to 64 KiB), and early data that nobody wants is passed over (§4.2.10).
#[test]
fn long_hellos_are_hellos_and_early_data_is_passed_over() {
    let (_bundle, gateway) = start("");
    let (_other_bundle, by_name) = start_by_name("");
    for gateway in [&gateway, &by_name] {
        for size in [10_000, 16_100, 40_000, 60_000] {
            let long = |hello: Hello| hello.with(0x2a2a, vec![7; size]).wire();
            assert_eq!(accepted(gateway, "TLS 1.2", &long(Hello::tls12())).version, 0x0303);
            assert_eq!(accepted(gateway, "TLS 1.3", &long(Hello::tls13())).version, 0x0304);
        }
        // Longer than TLS here bounds a message, and so many records that none of them can be wanted.
        let mut endless = Raw::connect(gateway);
        endless.send(&record(22, &[1, 1, 0x10, 0, 3, 3]));
        assert_eq!(endless.answer(), Answer::Alert(DECODE_ERROR));

        let identity = [vec16(b"nobody's ticket").as_slice(), &[0; 4]].concat();
        let binder = [[32].as_slice(), [1; 32].as_slice()].concat();
        let hello = Hello::tls13()
            .with(EARLY_DATA, Vec::new())
            .with(PRE_SHARED_KEY, [vec16(&identity), vec16(&binder)].concat());
        let mut raw = Raw::connect(gateway);
        raw.send(&[hello.wire(), record(23, &[0x5a; 200])].concat());
        assert!(matches!(raw.answer(), Answer::Hello(_)));
        // It waits for the rest of the handshake: no alert, and no end.
        raw.socket.set_read_timeout(Some(Duration::from_millis(300))).expect("a timeout");
        let mut rest = [0; 4096];
        loop {
            match raw.socket.read(&mut rest) {
                Ok(0) => panic!("it ended"),
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn a_hello_in_pieces_is_a_hello_and_half_of_one_is_ended() {
    let deadline = "[connections]\nhandshake_timeout = \"2s\"\n";
    let (_bundle, gateway) = start(deadline);
    in_pieces(&gateway);
    let (_bundle, gateway) = start_by_name(deadline);
    in_pieces(&gateway);
}

fn in_pieces(gateway: &Gateway) {
    for hello in [Hello::tls12(), Hello::tls13()] {
        // A byte in each record, then a byte in each packet.
        let records: Vec<u8> = hello.message().iter().flat_map(|byte| record(22, &[*byte])).collect();
        accepted(gateway, "a byte in each record", &records);
        let mut raw = Raw::connect(gateway);
        for byte in hello.wire() {
            raw.send(&[byte]);
        }
        assert!(matches!(raw.answer(), Answer::Hello(_)));
    }
    let wire = Hello::tls13().wire();
    // Cut off: it ends at once.
    for end in [0, 1, 4, 5, 6, 9, 40, wire.len() - 1] {
        let begun = Instant::now();
        let mut raw = Raw::connect(gateway);
        raw.send(&wire[..end]);
        raw.socket.shutdown(Shutdown::Write).expect("half of it");
        assert!(matches!(raw.answer(), Answer::End | Answer::Alert(_)), "{end} bytes");
        assert!(begun.elapsed() < Duration::from_millis(1900), "{end} bytes: {:?}", begun.elapsed());
    }
    // Silent, or as slow as can be: it ends when its time is over, and meanwhile others are served.
    let begun = Instant::now();
    let mut silent: Vec<Raw> = [0, 1, 5, 40, wire.len() - 1, wire.len()]
        .map(|end| {
            let mut raw = Raw::connect(gateway);
            raw.send(&wire[..end]);
            raw
        })
        .into();
    let mut slow = Raw::connect(gateway);
    for byte in &wire[..8] {
        slow.send(&[*byte]);
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(gateway.curl("/open").send().status, 200);
    silent.push(slow);
    for mut raw in silent {
        while raw.record().is_some() {}
    }
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    // Counted a moment after they were closed.
    let counted = || {
        let sum = gateway.metrics().sum("sealgate_tls_handshake_failures_total", &[("reason", "timeout")]);
        (sum >= 7.0).then_some(())
    };
    until("all are counted", DEADLINE, counted);
}

/// What is done to a record on its way.
type Change<'a> = &'a dyn Fn(&mut Vec<u8>);

/// Ciphertext that was changed, cut or made up ends the connection; no byte of it is a request.
#[test]
fn records_that_were_tampered_with_end_the_connection() {
    let (bundle, gateway) = start("");
    let request = b"GET /open HTTP/1.1\r\nHost: localhost\r\n\r\n";
    let versions: [&[&SupportedProtocolVersion]; 2] = [&[&TLS12], &[&TLS13]];
    for version in versions {
        let config = Arc::new(client_config(&bundle.pki.ca(), &["http/1.1"], None, version));
        let tampered: [(&str, Change<'_>, &str); 5] = [
            ("a bit of the tag", &|record| *record.last_mut().unwrap() ^= 1, "BadRecordMac"),
            ("a bit of the text", &|record| record[20] ^= 0x80, "BadRecordMac"),
            (
                "a byte less",
                &|record| {
                    record.pop();
                    let length = (record.len() - 5) as u16;
                    record[3..5].copy_from_slice(&length.to_be_bytes());
                },
                "BadRecordMac",
            ),
            ("twice", &|record| record.extend_from_within(..), "BadRecordMac"),
            (
                "longer than any may be",
                &|record| record.splice(.., [23, 3, 3, 0xff, 0xff]).for_each(drop),
                "DecodeError",
            ),
        ];
        for (what, change, alert) in tampered {
            let before = bundle.upstream.seen().len();
            let mut wire = Wire::with(gateway.address(), &config, "localhost");
            wire.handshake().expect("a handshake");
            let mut stream = wire.into_stream();
            stream.conn.writer().write_all(request).expect("room");
            let mut record = Vec::new();
            stream.conn.write_tls(&mut record).expect("a record");
            change(&mut record);
            let _ = stream.sock.write_all(&record);
            let mut answer = Vec::new();
            let error = stream.read_to_end(&mut answer).expect_err(what);
            assert!(error.to_string().contains(alert), "{what}: {error}");
            // The first of two equal records is in order: whether it is answered depends on what comes in one piece.
            let most = usize::from(what == "twice");
            assert!(bundle.upstream.seen().len() - before <= most, "{what}");
        }
    }
    assert_eq!(gateway.curl("/open").send().status, 200);
}

/// CVE-2009-3555, CVE-2011-1473: a client that asks for another handshake is told that there is none.
#[test]
fn nobody_renegotiates() {
    let (_bundle, gateway) = start("");
    let mut client = Command::new("openssl")
        .args(["s_client", "-connect", &gateway.address().to_string(), "-tls1_2", "-servername", "localhost"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("openssl runs");
    // `R` is its command for it, once it reads commands: behind the handshake.
    let mut input = client.stdin.take().expect("piped");
    let mut said = String::new();
    let mut output = client.stdout.take().expect("piped");
    let mut buffer = [0; 4096];
    while !said.contains("Verify return code") {
        let count = output.read(&mut buffer).expect("it speaks");
        assert!(count > 0, "{said}");
        said.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    input.write_all(b"R\n").expect("it listens");
    output.read_to_string(&mut said).expect("it ends");
    let mut faults = String::new();
    client.stderr.take().expect("piped").read_to_string(&mut faults).expect("it ends");
    client.wait().expect("it ends");
    assert!(faults.contains("RENEGOTIATING") || said.contains("RENEGOTIATING"), "{said}{faults}");
    assert!(faults.contains("no renegotiation"), "{said}{faults}");
    assert_eq!(gateway.curl("/open").send().status, 200);
}
