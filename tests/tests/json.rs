//! JSON that readers disagree about, or that is built to cost its reader: each document as a body and as a WebSocket
//! message, each with the answer it must get. What is refused reaches nobody; what is valid goes on byte for byte.
//!
//! The families and most of the documents are those of the JSONTestSuite (Nicolas Seriot, "Parsing JSON is a
//! Minefield"): what it calls `n_` is refused, `y_` passes, and of what it leaves open (`i_`) the stricter reading holds.

use std::collections::BTreeSet;
use std::sync::Arc;

use rustls::ClientConfig;
use sealgate_tests::{ALL_VERSIONS, Bundle, DEADLINE, Gateway, Wire, client_config, frame, until};

/// A websocket's bounds are those of the route and what a document is wrapped in there.
const RULES: &str = r#"
[[route]]
name = "doc"
path = "/doc"
methods = ["POST"]
upstream = "backend"
auth = "none"

[route.body]
max_bytes = "64KiB"

[route.body.json]
max_depth = 16
max_values = 200
max_members = 20
max_items = 50
max_key = "32B"
max_string = "256B"
max_digits = 20
max_exponent = 30

[[websocket]]
name = "docs"
path = "/ws/echo"
upstream = "backend"
auth = "none"
max_message = "128KiB"
max_frame = "128KiB"

[websocket.json]
max_depth = 17
max_values = 202
max_members = 20
max_items = 50
max_key = "32B"
max_string = "256B"
max_digits = 20
max_exponent = 30

[[websocket.message]]
type = "doc"
direction = "both"
"#;

/// Not JSON (RFC 8259).
const NOT_JSON: &[&[u8]] = &[
    // Arrays.
    b"[1 true]",
    b"[a\xe5]",
    b"[\"\": 1]",
    b"[\"\"],",
    b"[,1]",
    b"[1,,2]",
    b"[\"x\",,]",
    b"[\"x\"]]",
    b"[\"\",]",
    b"[\"x\"",
    b"[x",
    b"[3[4]]",
    b"[\xff]",
    b"[1:2]",
    b"[,]",
    b"[-]",
    b"[   , \"\"]",
    b"[\"a\",\n4\n,1,",
    b"[1,]",
    b"[1,,]",
    b"[\"\x0ba\"\x0c]",
    b"[*]",
    b"[\"\"",
    b"[1,",
    b"[1,\n1\n,1",
    b"[{}",
    b"[fals]",
    b"[nul]",
    b"[tru]",
    b"[1;2]",
    b"[1}",
    b"[[]",
    b"[]]",
    b"[1]2",
    // Numbers.
    b"123\0",
    b"[++1234]",
    b"[+1]",
    b"[+Inf]",
    b"[-01]",
    b"[-1.0.]",
    b"[-2.]",
    b"[-NaN]",
    b"[.-1]",
    b"[.2e-3]",
    b"[0.1.2]",
    b"[0.3e+]",
    b"[0.3e]",
    b"[0.e1]",
    b"[0E+]",
    b"[0E]",
    b"[0e+]",
    b"[0e]",
    b"[1 000.0]",
    b"[1.0e+]",
    b"[1.0e-]",
    b"[1.0e]",
    b"[1eE2]",
    b"[2.e+3]",
    b"[2.e-3]",
    b"[2.e3]",
    b"[9.e+]",
    b"[Inf]",
    b"[NaN]",
    b"[\xef\xbc\x91]",
    b"[1+2]",
    b"[0x1]",
    b"[0x42]",
    b"[Infinity]",
    b"[0e+-1]",
    b"[-123.123foo]",
    b"[123\xe5]",
    b"[1e1\xe5]",
    b"[0\xe5]",
    b"[-Infinity]",
    b"[-foo]",
    b"[- 1]",
    b"[-012]",
    b"[-.123]",
    b"[-1x]",
    b"[1ea]",
    b"[1e\xe5]",
    b"[1.]",
    b"[.123]",
    b"[1.2a-3]",
    b"[1.8011670033376514H-308]",
    b"[012]",
    b"00",
    b"[1_000]",
    b"[1e]",
    b"[1n]",
    b"[0b1]",
    b"[0o7]",
    b"-",
    b"[--1]",
    b"[1f]",
    // Objects.
    b"[\"x\", truth]",
    b"{[: \"x\"}\n",
    b"{\"x\", null}",
    b"{\"x\"::\"b\"}",
    b"{\xf0\x9f\x87\xa8\xf0\x9f\x87\xad}",
    b"{\"a\":\"a\" 123}",
    b"{key: 'value'}",
    b"{\"\xb9\":\"0\",}",
    b"{\"a\" b}",
    b"{:\"b\"}",
    b"{\"a\" \"b\"}",
    b"{\"a\":",
    b"{\"a\"",
    b"{1:1}",
    b"{9999E9999:1}",
    b"{null:null,null:null}",
    b"{\"id\":0,,,,,}",
    b"{'a':0}",
    b"{\"id\":0,}",
    b"{\"a\":\"b\"}/**/",
    b"{\"a\":\"b\"}/**//",
    b"{\"a\":\"b\"}//",
    b"{\"a\":\"b\"}/",
    b"{\"a\":\"b\",,\"c\":\"d\"}",
    b"{a: \"b\"}",
    b"{\"a\":\"a",
    b"{ \"foo\" : \"bar\", \"a\" }",
    b"{\"a\":\"b\"}#",
    b"{,\"a\":1}",
    b"{\"a\":1 \"b\":2}",
    b"{\"a\":1;\"b\":2}",
    b"{\"a\"=1}",
    b"{\"a\":}",
    b"{\"a\":1]",
    b"{true:1}",
    b"{\"__proto__\":{}",
    // Strings.
    br#"["\uD800\"]"#,
    br#"["\uD800\u"]"#,
    br#"["\uD800\u1"]"#,
    br#"["\uD800\u1x"]"#,
    "[é]".as_bytes(),
    b"[\"\\\0\"]",
    br#"["\x00"]"#,
    br#"["\\\"]"#,
    b"[\"\\\t\"]",
    "[\"\\🌀\"]".as_bytes(),
    br#"["\"]"#,
    br#"["\u00A"]"#,
    br#"["\uD834\uDd"]"#,
    br#"["\uD800\uD800\x"]"#,
    b"[\"\\u\xe5\"]",
    br#"["\a"]"#,
    br#"["\uqqqq"]"#,
    b"[\"\\\xe5\"]",
    br#"[\u0020"asd"]"#,
    br"[\n]",
    b"\"",
    b"['single quote']",
    b"abc",
    br#"["\"#,
    b"[\"a\0a\"]",
    b"[\"new\nline\"]",
    b"[\"\t\"]",
    br#""\UA66D""#,
    b"\"\"x",
    b"[\"\x1f\"]",
    b"[\"\x01\"]",
    b"[\"\r\"]",
    br#"["\'"]"#,
    br#"["\0"]"#,
    br#"["\u{41}"]"#,
    b"`a`",
    br#"["\ u0041"]"#,
    br#"["\u-041"]"#,
    br#"["\u+041"]"#,
    // Structure.
    b"",
    b" ",
    b"\n\t",
    "[\u{2060}]".as_bytes(),
    b"\xef\xbb\xbf",
    b"<.>",
    b"[<null>]",
    b"[1]x",
    b"[1]]",
    b"[\"asd]",
    "aå".as_bytes(),
    b"[True]",
    b"1]",
    b"{\"x\": true,",
    b"[][]",
    b"]",
    b"\xef\xbb{}",
    b"\xe5",
    b"[",
    b"[\0]",
    b"2@",
    b"{}}",
    b"{\"\":",
    b"{\"a\":/*comment*/\"b\"}",
    b"{\"a\": true} \"x\"",
    b"['",
    b"[,",
    b"[{",
    b"[\"a",
    b"{",
    b"{]",
    b"{,",
    b"{[",
    b"{\"a",
    b"{'a'",
    br#"["\{["\{["\{["\{"#,
    b"\xe9",
    b"*",
    b"{\"a\":\"b\"}#{}",
    br#"[\u000A""]"#,
    b"[1",
    b"[ false, nul",
    b"[ true, fals",
    b"[ false, tru",
    b"{\"asd\":\"asd\"",
    "å".as_bytes(),
    b"[\x0c]",
    b"\xef\xbb\xbf[]",
    b"\xef\xbb\xbf{}",
    b"\0",
    b"[1]\0",
    b"\x1e{}",
    b"{}{}",
    b"nullnull",
    b"null true",
    b"TRUE",
    b"undefined",
    "\u{a0}1".as_bytes(),
    "\u{2028}1".as_bytes(),
    b"//\n1",
    b"#\n1",
    b")]}',\n{}",
    b"while(1);{}",
    b"<?xml version=\"1.0\"?>",
    b"a=1&b=2",
    b"\x80",
    b"callback({})",
    // UTF-8 and halves of surrogate pairs (`i_`).
    br#"{"\uDFAA":0}"#,
    br#"["\uDADA"]"#,
    br#"["\uD888\u1234"]"#,
    b"\xff\xfe[\0\"\0\xe9\0\"\0]\0",
    b"[\"\xe6\x97\xa5\xd1\x88\xfa\"]",
    b"[\"\xed\xa0\x80\"]",
    br#"["\uD800\n"]"#,
    br#"["\uDd1ea"]"#,
    br#"["\uD800\uD800\n"]"#,
    br#"["\ud800"]"#,
    br#"["\ud800abc"]"#,
    b"[\"\xff\"]",
    br#"["\uDd1e\uD834"]"#,
    b"[\"\xe9\"]",
    br#"["\uDFAA"]"#,
    b"[\"\x81\"]",
    b"[\"\xf4\xbf\xbf\xbf\"]",
    b"[\"\xc0\xaf\"]",
    b"[\"\xfc\x83\xbf\xbf\xbf\xbf\"]",
    b"[\"\xfc\x80\x80\x80\x80\x80\"]",
    b"[\"\xe0\xff\"]",
    b"\0[\0\"\0\xe9\0\"\0]",
    b"[\0\"\0\xe9\0\"\0]\0",
    b"{\"\xff\":1}",
    b"[\"\xed\xb0\x80\"]",
    b"[\"\xc1\xbf\"]",
    b"[\"\xf5\x80\x80\x80\"]",
    b"[\"\xe2\x82\"]",
    b"[\"\xf0\x82\x82\xac\"]",
];

/// What is valid JSON and has one reading.
const VALID: &[&str] = &[
    "[[]   ]",
    "[\"\"]",
    "[]",
    "[\"a\"]",
    "[false]",
    "[null, 1, \"1\", {}]",
    "[null]",
    "[1\n]",
    " [1]",
    "[1,null,null,null,2]",
    "[2] ",
    "[123e3]",
    "[0e+1]",
    "[0e1]",
    "[ 4]",
    "[-0.0000000000000000001]",
    "[20e1]",
    "[-0]",
    "[-123]",
    "[-1]",
    "[-0.0]",
    "[1E22]",
    "[1E-2]",
    "[1E+2]",
    "[123e4]",
    "[123.456e3]",
    "[1e-2]",
    "[1e+2]",
    "[123]",
    "[123.456789]",
    "[0.5]",
    "[12345678901234567890]",
    "[18446744073709551616]",
    "[1e30]",
    "[-1e-30]",
    r#"{"asd":"sdf", "dfg":"fgh"}"#,
    r#"{"asd":"sdf"}"#,
    "{}",
    r#"{"":0}"#,
    r#"{"foo\u0000bar": 42}"#,
    r#"{ "min": -1.0e+28, "max": 1.0e+28 }"#,
    r#"{"x":[{"id": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}], "id": "x"}"#,
    r#"{"a":[]}"#,
    r#"{"title":"\u041f\u043e\u043b\u0442\u043e\u0440\u0430"}"#,
    "{\n\"a\": \"b\"\n}",
    r#"["\u0060\u012a\u12AB"]"#,
    r#"["\uD801\udc37"]"#,
    r#"["\ud83d\ude39\ud83d\udc8d"]"#,
    r#"["\"\\\/\b\f\n\r\t"]"#,
    r#"["\\u0000"]"#,
    r#"["\""]"#,
    r#"["a/*b*/c/*d//e"]"#,
    r#"["\\a"]"#,
    r#"["\\n"]"#,
    r#"["\u0012"]"#,
    r#"["\uFFFF"]"#,
    r#"["\uDBFF\uDFFF"]"#,
    r#"["new\u00A0line"]"#,
    "[\"\u{10ffff}\"]",
    "[\"\u{ffff}\"]",
    r#"["\u0000"]"#,
    r#"["\u002c"]"#,
    "[\"π\"]",
    "[\"\u{1bfff}\"]",
    "[\"asd \"]",
    "\" \"",
    r#"["\uD834\uDd1e"]"#,
    r#"["\u0821"]"#,
    r#"["\u0123"]"#,
    "[\"\u{2028}\"]",
    "[\"\u{2029}\"]",
    r#"["\u0061\u30af\u30EA\u30b9"]"#,
    "[\"new\u{7f}line\"]",
    "[\"⍂㈴⍂\"]",
    r#"["\u005C"]"#,
    r#"["\u0022"]"#,
    r#"["\uA66D"]"#,
    r#"["\uDBFF\uDFFE"]"#,
    r#"["\u200B"]"#,
    r#"["\u2064"]"#,
    r#"["\uFDD0"]"#,
    r#"["\uFFFE"]"#,
    "[\"€𝄞\"]",
    "[\"a\u{7f}a\"]",
    "false",
    "42",
    "-0.1",
    "null",
    "\"asd\"",
    "true",
    "\"\"",
    "[\"a\"]\n",
    "[true]",
    " [] ",
    "\t\r\n 1",
    r#"{"a":1,"A":2}"#,
    r#"{"a":{"a":{"a":1}}}"#,
    r#"[{"a":1},{"a":1}]"#,
    r#"{"é":1,"e\u0301":2}"#,
    r#"{"__proto__":{"admin":true},"constructor":1}"#,
    r#"["]",  "}", "{", "["]"#,
    r#"{"a b":"c\\"}"#,
];

/// What a document is refused with: as a body, and as a message.
#[derive(Clone, Copy)]
struct Refusal {
    reason: &'static str,
    status: u16,
}

struct Document {
    bytes: Vec<u8>,
    /// `None` if it passes.
    refusal: Option<Refusal>,
}

fn documents() -> Vec<Document> {
    let mut all = Vec::new();
    let mut add = |refusal: Option<(&'static str, u16)>, bytes: Vec<u8>| {
        let refusal = refusal.map(|(reason, status)| Refusal { reason, status });
        all.push(Document { bytes, refusal });
    };
    NOT_JSON.iter().for_each(|bytes| add(Some(("not-json", 400)), bytes.to_vec()));
    VALID.iter().for_each(|text| add(None, text.as_bytes().to_vec()));

    // A key that stands twice: next to each other, far apart, deep, in disguise, among many.
    let many = |count: usize| (0..count).map(|n| format!("\"k{n}\":{n},")).collect::<String>();
    for text in [
        r#"{"a":"b","a":"b"}"#.to_owned(),
        r#"{"a":"b","a":"c"}"#.to_owned(),
        r#"{"":1,"":2}"#.to_owned(),
        r#"{"a":1,"b":{"a":1},"a":[]}"#.to_owned(),
        r#"[[{"x":1},{"x":{"y":1,"y":1}}]]"#.to_owned(),
        r#"{"role":"user","\u0072ole":"administrator"}"#.to_owned(),
        r#"{"\u00e9":1,"é":2}"#.to_owned(),
        r#"{"a\/b":1,"a/b":2}"#.to_owned(),
        r#"{"\ud83d\ude39":1,"😹":2}"#.to_owned(),
        r#"{"a\n":1,"a\u000a":2}"#.to_owned(),
        r#"{"\"":1,"\u0022":2}"#.to_owned(),
        format!("{{{}\"k0\":1}}", many(19)),
        format!("{{{}\"k18\":1}}", many(19)),
        format!("{{{}\"\\u006b9\":1}}", many(19)),
        format!("{{{}\"k3\":1}}", many(8)),
    ] {
        add(Some(("json-duplicate-key", 400)), text.into_bytes());
    }
    add(None, format!("{{{}\"k19\":1}}", many(19)).into_bytes());

    // Bounds: the last that passes, the first that does not, and what is far beyond.
    let nested =
        |open: &str, close: &str, depth: usize| (open.repeat(depth) + &close.repeat(depth)).into_bytes();
    let deep = Some(("json-too-deep", 422));
    add(None, nested("[", "]", 16));
    for depth in [17, 18, 127, 128, 500, 20_000] {
        add(deep, nested("[", "]", depth));
        add(deep, "[".repeat(depth).into_bytes());
    }
    for depth in [17, 100, 1000] {
        add(deep, format!("{}1{}", "{\"a\":".repeat(depth), "}".repeat(depth)).into_bytes());
        add(deep, format!("{}1{}", "[{\"a\":".repeat(depth), "}]".repeat(depth)).into_bytes());
    }
    add(None, format!("{}1{}", "{\"a\":".repeat(16), "}".repeat(16)).into_bytes());
    add(None, format!("{}1{}", "[{\"a\":".repeat(8), "}]".repeat(8)).into_bytes());

    let list = |count: usize, item: &str| format!("[{}]", vec![item; count].join(","));
    let too_many = Some(("json-too-many", 422));
    add(None, list(50, "1").into_bytes());
    for count in [51, 52, 1000, 10_000] {
        add(too_many, list(count, "1").into_bytes());
    }
    let four = |last: usize| {
        // 4 lists and the list of them, and what is in them.
        let lists = [50, 50, 50, last].map(|count| list(count, "0"));
        format!("[{}]", lists.join(",")).into_bytes()
    };
    add(None, four(45));
    add(too_many, four(46));
    add(too_many, list(50, &list(50, "{}")).into_bytes());
    for count in [21, 22, 500] {
        add(too_many, format!("{{{}\"z\":1}}", many(count - 1)).into_bytes());
    }

    let too_long = Some(("json-too-long", 422));
    add(None, format!("[\"{}\"]", "x".repeat(256)).into_bytes());
    add(None, format!("[\"{}\"]", "é".repeat(128)).into_bytes());
    add(None, format!("{{\"{}\":1}}", "k".repeat(32)).into_bytes());
    for count in [257, 300, 60_000] {
        add(too_long, format!("[\"{}\"]", "x".repeat(count)).into_bytes());
    }
    add(too_long, format!("[\"{}\"]", "é".repeat(129)).into_bytes());
    add(too_long, format!("[\"{}\"]", "\\u0041".repeat(43)).into_bytes());
    for count in [33, 34, 5000] {
        add(too_long, format!("{{\"{}\":1}}", "k".repeat(count)).into_bytes());
    }

    let number = Some(("json-number", 422));
    add(None, format!("[{}]", "9".repeat(20)).into_bytes());
    add(None, format!("[0.{}]", "3".repeat(19)).into_bytes());
    for text in [
        format!("[{}]", "9".repeat(21)),
        format!("[-{}]", "1".repeat(30)),
        format!("[0.{}]", "3".repeat(20)),
        format!("[{}]", "9".repeat(50_000)),
        format!("[{}e1]", "1".repeat(21)),
        "[1e31]".to_owned(),
        "[1E+31]".to_owned(),
        "[1e-31]".to_owned(),
        "[1e309]".to_owned(),
        "[-1e+9999]".to_owned(),
        "[1.5e+9999]".to_owned(),
        "[-123123e100000]".to_owned(),
        "[123e-10000000]".to_owned(),
        "[123.456e-789]".to_owned(),
        format!("[0.4e00{}]", "6".repeat(100)),
        format!("[1e{}]", "9".repeat(1000)),
        "[-123123123123123123123123123123]".to_owned(),
        "[100000000000000000000]".to_owned(),
        "1e1000".to_owned(),
    ] {
        add(number, text.into_bytes());
    }
    all
}

fn wrapped(document: &[u8]) -> Vec<u8> {
    [b"{\"type\":\"doc\",\"value\":", document, b"}"].concat()
}

#[test]
fn a2_json_that_readers_disagree_about_is_refused_and_what_is_valid_passes_unchanged() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    let documents = documents();
    let distinct: BTreeSet<_> = documents.iter().map(|document| &document.bytes).collect();
    let passing = documents.iter().filter(|document| document.refusal.is_none()).count();
    let refused = documents.len() - passing;
    assert_eq!(distinct.len(), documents.len(), "documents stand twice");
    assert!(refused >= 250 && passing >= 80, "{refused} refused, {passing} that pass");

    let tls = Arc::new(client_config(gateway.ca(), &["http/1.1"], None, ALL_VERSIONS));
    let mut faults = Vec::new();
    let mut open = upgraded(&gateway, &tls);
    for Document { bytes, refusal } in &documents {
        let shown: String = String::from_utf8_lossy(bytes).chars().take(40).collect();
        let mut fault = |way: &str, what: String| faults.push(format!("{shown:?} {way}: {what}"));

        let before = bundle.upstream.seen().len();
        let mut wire = Wire::with(gateway.address(), &tls, "localhost");
        let head =
            "POST /doc HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: ";
        wire.send([head.as_bytes(), bytes.len().to_string().as_bytes(), b"\r\n\r\n", bytes].concat());
        let reply = wire.response().expect("an answer");
        let reached = bundle.upstream.seen().len() - before;
        match refusal {
            None => {
                let body = bundle.upstream.last().body;
                if (reply.status, reached, &body) != (200, 1, bytes) {
                    fault("as a body", format!("{} {}, the backend saw {body:?}", reply.status, reply.body));
                }
            }
            Some(refusal) => {
                let kind = reply.problem(refusal.status);
                if !kind.ends_with(refusal.reason) || reached > 0 {
                    fault("as a body", format!("{kind}, {reached} reached the backend"));
                }
            }
        }

        let Some(refusal) = refusal else {
            let message = wrapped(bytes);
            open.send(frame(0x81, &message));
            let echoed = open.message().expect("an echo");
            if echoed.opcode == 8 {
                fault("as a message", format!("{:?}", echoed.close()));
                open = upgraded(&gateway, &tls);
                continue;
            }
            let seen = bundle.upstream.frames().pop().expect("a frame");
            if echoed.payload != message || seen.payload != message || seen.opcode != 1 {
                fault("as a message", format!("echoed {echoed:?}"));
            }
            continue;
        };
        // Inside a message whose type is known, for which the bounds are made; and as it is.
        let bounded = !matches!(refusal.reason, "not-json" | "json-duplicate-key");
        for message in [wrapped(bytes), bytes.clone()].into_iter().take(if bounded { 1 } else { 2 }) {
            if refusal.reason == "not-json" && serde_json::from_slice::<serde_json::Value>(&message).is_ok() {
                // Two halves that only together are JSON.
                continue;
            }
            let before = messages(&bundle);
            let mut wire = upgraded(&gateway, &tls);
            wire.send(frame(0x81, &message));
            let (code, reason) = wire.message().expect("a close frame").close();
            let expected = if std::str::from_utf8(&message).is_err() { "not-utf8" } else { refusal.reason };
            if (code, reason.split(':').next()) != (1007, Some(expected)) {
                fault("as a message", format!("{code} {reason}"));
            }
            // The tunnel ends when both have closed: what went to the upstream has gone by then.
            wire.send(frame(0x88, &1000_u16.to_be_bytes()));
            assert!(wire.ended());
            if messages(&bundle) > before {
                fault("as a message", "the backend saw it".to_owned());
            }
        }
    }
    assert!(faults.is_empty(), "{} faults:\n{}", faults.len(), faults.join("\n"));
    // Nobody else noticed.
    let message = wrapped(b"\"still here\"");
    open.send(frame(0x81, &message));
    assert_eq!(open.message().expect("an echo").payload, message);
    // Each refused socket was closed in order towards the backend too.
    let closed = || bundle.upstream.frames().iter().filter(|frame| frame.opcode == 8).count();
    until("the backend is told", DEADLINE, || (closed() >= refused).then_some(()));
}

/// A refusal shows where, not what: a pointer of the peer's own keys, cut and printable.
#[test]
fn a_refusal_points_at_the_place() {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    for (body, status, detail) in [
        (r#"{"a":{"b":1,"b":2}}"#, 400, "/a/b: stands twice"),
        (r#"{"a":[1,2,}"#, 400, "not JSON at byte 10"),
        (r#"{"a":[1e99]}"#, 422, "/a/0: number of too large an exponent"),
        (r#"{"a":["#, 400, "the JSON text ends too soon"),
        ("[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]", 422, "/0/0/0/0/0/0/0/0/0/0/0/0/0/0/0/0: too deep"),
    ] {
        let reply = gateway.curl("/doc").json(body).send();
        assert_eq!(reply.status, status, "{reply:?}");
        assert_eq!(reply.json()["detail"], detail, "{body}");
    }
    assert_eq!(bundle.upstream.count("/doc"), 0);
}

fn messages(bundle: &Bundle) -> usize {
    bundle.upstream.frames().iter().filter(|frame| frame.opcode < 8).count()
}

fn upgraded(gateway: &Gateway, tls: &Arc<ClientConfig>) -> Wire {
    let mut wire = Wire::with(gateway.address(), tls, "localhost");
    let reply = wire.upgrade("/ws/echo", "");
    assert_eq!(reply.status, 101, "{reply:?}");
    wire
}
