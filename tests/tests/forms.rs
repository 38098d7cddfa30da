//! Bodies: forms with files (tests/attacks/multipart.toml), content codings, and what backends may answer.

use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls::ClientConfig;
use sealgate_tests::{ALL_VERSIONS, Bundle, DEADLINE, Gateway, Reply, Wire, client_config, until};
use serde::Deserialize;
use serde_json::{Value, json};

const FORM: &str = r#"
max_parts = 6
max_head = "600B"
part = [
  { name = "note", max_bytes = "64B", max = 2 },
  { name = "meta", max_bytes = "256B", types = ["application/json"], schema = "schemas/meta.json" },
  { name = "avatar", file = true, max_bytes = "1KiB", types = ["image/png", "image/jpeg"] },
  { name = "clip", file = true, max_bytes = "1KiB", types = ["audio/webm"] },
  { name = "paper", file = true, max_bytes = "1KiB", types = ["application/pdf", "text/plain"], extensions = ["pdf", "txt", "md"] },
  { name = "blob", file = true, max_bytes = "4KiB", types = ["application/octet-stream"] },
]
"#;

fn bundle() -> Bundle {
    let route = |name: &str, form: &str, more: &str| {
        format!(
            "[[route]]\nname = \"{name}\"\npath = \"/{name}\"\nmethods = [\"POST\"]\nupstream = \"backend\"\n\
             auth = \"none\"\n{more}[route.body]\nmax_bytes = \"16MiB\"\n{form}\n"
        )
    };
    let form = |more: &str, parts: &str| format!("[route.body.form]\n{more}\n{parts}");
    let large = "part = [{ name = \"blob\", file = true, types = [\"application/octet-stream\"], max_bytes = \"15MiB\" }]";
    let needed =
        "part = [{ name = \"note\", min = 1, max_bytes = \"9B\" }, { name = \"more\", max_bytes = \"9B\" }]";
    let text = route("held", &form("", FORM), "")
        + &route("flow", &form("hold = false", FORM), "")
        + &route("large", &form("hold = false", large), "")
        + &route("needed", &form("hold = false", needed), "")
        + &route("noted", &form("hold = false", needed), "mode = \"shadow\"\n")
        + &route("zipped", "content_codings = [\"gzip\", \"zstd\"]", "")
        + &route("plain", "", "")
        + &route("json", "json = {}", "");
    let bundle = Bundle::new("");
    let schema = r#"{ "type": "object", "additionalProperties": false, "properties": { "title": { "type": "string" } } }"#;
    bundle.write_file("schemas/meta.json", schema);
    bundle.write(&text);
    bundle
}

#[derive(Deserialize)]
struct List {
    group: Vec<Group>,
}

#[derive(Deserialize)]
struct Group {
    expect: String,
    about: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    #[serde(rename = "type", default = "usual_type")]
    kind: String,
    body: String,
    expect: Option<String>,
}

fn usual_type() -> String {
    "multipart/form-data; boundary=b0undary".to_owned()
}

const PNG: &[u8] = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR\0\0\0\x01\0\0\0\x01\x08\x06\0\0\0\x1f\x15\xc4\x89";
const WEBM: &[u8] =
    b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\xf7\x81\x01\x42\xf2\x81\x04\x42\xf3\x81\x08\x42\x82\x84webm";
const NOTE: &[u8] = b"--b0undary\r\nContent-Disposition: form-data; name=\"note\"\r\n\r\nhello\r\n";

/// Puts in what stands between `<` and `>`.
fn filled(text: &str) -> Vec<u8> {
    let (mut filled, mut rest) = (Vec::new(), text);
    while let Some((before, after)) = rest.split_once('<') {
        let (word, after) = after.split_once('>').unwrap_or_else(|| panic!("no `>` in {text}"));
        filled.extend(before.bytes());
        match (word, word.strip_prefix('x'), word.rsplit_once('*')) {
            ("note", ..) => filled.extend(NOTE),
            ("end", ..) => filled.extend(b"--b0undary--\r\n"),
            ("png", ..) => filled.extend(PNG),
            ("webm", ..) => filled.extend(WEBM),
            ("lt", ..) => filled.push(b'<'),
            (_, _, Some((part, count))) => {
                filled.extend(part.repeat(count.parse().expect("a count")).bytes())
            }
            (_, Some(digits), None) => filled.push(u8::from_str_radix(digits, 16).expect("a byte")),
            _ => panic!("<{word}> in {text}?"),
        }
        rest = after;
    }
    filled.extend(rest.bytes());
    filled
}

/// All cases: what they are, their type and body, and what they must get.
fn cases() -> Vec<(String, String, Vec<u8>, String)> {
    let list: List = toml::from_str(include_str!("../attacks/multipart.toml")).expect("a list");
    let cases = list.group.into_iter().flat_map(|Group { expect, about, cases }| {
        cases.into_iter().map(move |case| {
            let kind = String::from_utf8(filled(&case.kind)).expect("text");
            let expect = case.expect.unwrap_or_else(|| expect.clone());
            (format!("{about}: {}", case.name), kind, filled(&case.body), expect)
        })
    });
    cases.collect()
}

struct Client<'a> {
    gateway: &'a Gateway,
    config: Arc<ClientConfig>,
}

impl<'a> Client<'a> {
    fn new(gateway: &'a Gateway) -> Self {
        let config = client_config(gateway.ca(), &["http/1.1"], None, ALL_VERSIONS);
        Self { gateway, config: Arc::new(config) }
    }

    fn head(path: &str, kind: &str) -> String {
        format!("POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\n")
    }

    fn wire(&self) -> Wire {
        Wire::with(self.gateway.address(), &self.config, "localhost")
    }

    fn whole(&self, path: &str, kind: &str, body: &[u8]) -> Reply {
        let head = format!("{}Content-Length: {}\r\n\r\n", Self::head(path, kind), body.len());
        let mut wire = self.wire();
        wire.send([head.as_bytes(), body].concat());
        wire.response().expect("an answer")
    }

    fn bytewise(&self, path: &str, kind: &str, body: &[u8]) -> Reply {
        let mut text = format!("{}Transfer-Encoding: chunked\r\n\r\n", Self::head(path, kind)).into_bytes();
        for byte in body {
            text.extend([b"1\r\n".as_slice(), &[*byte], b"\r\n"].concat());
        }
        text.extend(b"0\r\n\r\n");
        let mut wire = self.wire();
        wire.send(text);
        wire.response().expect("an answer")
    }
}

fn reason(reply: &Reply) -> String {
    match reply.status {
        200 => "200".to_owned(),
        status => format!("{status} {}", reply.problem(status).trim_start_matches("urn:sealgate:problem:")),
    }
}

#[test]
fn n6_forms_that_readers_disagree_about_reach_nobody_and_honest_ones_do() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    let client = Client::new(&gateway);
    let cases = cases();
    let refused = cases.iter().filter(|(.., expect)| expect != "200").count();
    assert!(refused >= 140 && cases.len() - refused >= 25, "{refused} of {}", cases.len());
    let file = bundle.state().join("body");
    let mut wrong = Vec::new();
    for (about, kind, body, expect) in &cases {
        for path in ["/held", "/flow"] {
            let before = bundle.upstream.count(path);
            let mut replies = vec![client.whole(path, kind, body), client.bytewise(path, kind, body)];
            // HTTP/2 by another client.
            std::fs::write(&file, body).expect("a file");
            let data = format!("@{}", file.display());
            let curl = gateway.curl(path).args(["--http2", "--data-binary", &data]);
            replies.push(curl.header(&format!("Content-Type: {kind}")).send());
            wrong.extend(
                replies
                    .iter()
                    .map(reason)
                    .filter(|got| got != expect)
                    .map(|got| format!("{about} {path}: {got} instead of {expect}")),
            );
            let passed = if expect == "200" { replies.len() } else { 0 };
            assert_eq!(bundle.upstream.count(path), before + passed, "{about} {path}\n{wrong:?}");
            if passed > 0 {
                let seen = bundle.upstream.seen();
                for arrived in seen.iter().rev().take(passed) {
                    assert_eq!(arrived.body, *body, "{about} {path}: another body arrived");
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Name of the field, name of the file, content.
type Part = (String, Option<String>, Vec<u8>);

/// The same in JSON, the content in base64.
type TextPart = (String, Option<String>, String);

/// As the crate `multer` reads it.
async fn read_by_multer(boundary: &str, body: &[u8]) -> Result<Vec<Part>, multer::Error> {
    let bytes = bytes::Bytes::copy_from_slice(body);
    let stream = futures_util::stream::iter([Ok::<_, std::io::Error>(bytes)]);
    let mut form = multer::Multipart::new(stream, boundary);
    let mut parts = Vec::new();
    while let Some(field) = form.next_field().await? {
        let name = field.name().unwrap_or_default().to_owned();
        let file = field.file_name().map(str::to_owned);
        parts.push((name, file, field.bytes().await?.to_vec()));
    }
    Ok(parts)
}

/// As Node reads it (undici); `None` for each that it refuses.
fn read_by_node(forms: &[(String, Vec<u8>)]) -> Vec<Option<Vec<Part>>> {
    const SCRIPT: &str = r#"
const forms = JSON.parse(require("fs").readFileSync(0, "utf8"));
(async () => {
  const all = [];
  for (const [type, body] of forms) {
    try {
      const form = await new Response(Buffer.from(body, "base64"), { headers: { "content-type": type } }).formData();
      const parts = [];
      for (const [name, value] of form) {
        const bytes = typeof value === "string" ? Buffer.from(value) : Buffer.from(await value.arrayBuffer());
        parts.push([name, typeof value === "string" ? null : value.name, bytes.toString("base64")]);
      }
      all.push(parts);
    } catch { all.push(null); }
  }
  console.log(JSON.stringify(all));
})();
"#;
    let told: Vec<_> = forms.iter().map(|(kind, body)| json!([kind, STANDARD.encode(body)])).collect();
    let mut node = Command::new("node")
        .args(["-e", SCRIPT])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("node runs");
    let mut input = node.stdin.take().expect("piped");
    input.write_all(Value::from(told).to_string().as_bytes()).expect("node listens");
    drop(input);
    let output = node.wait_with_output().expect("node ends");
    let read: Vec<Option<Vec<TextPart>>> = serde_json::from_slice(&output.stdout).expect("what node read");
    let decoded = |(name, file, content): TextPart| (name, file, STANDARD.decode(content).expect("base64"));
    read.into_iter().map(|parts| parts.map(|parts| parts.into_iter().map(decoded).collect())).collect()
}

#[test]
fn n6_what_passes_is_the_same_to_readers_that_we_did_not_write() {
    let passing: Vec<_> = cases().into_iter().filter(|(.., expect)| expect == "200").collect();
    let forms: Vec<_> = passing.iter().map(|(_, kind, body, _)| (kind.clone(), body.clone())).collect();
    let by_node = read_by_node(&forms);
    assert_eq!(by_node.len(), forms.len());
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let (mut read_by_both, mut read_by_none) = (0, 0);
    for ((about, kind, body, _), by_node) in passing.iter().zip(by_node) {
        let by_multer = multer::parse_boundary(kind)
            .and_then(|boundary| runtime.block_on(read_by_multer(&boundary, body)));
        match (by_multer, by_node) {
            (Ok(one), Some(other)) => {
                // How a file's name is decoded is each reader's own affair; that both see one is not.
                let bare = |parts: &[Part]| -> Vec<_> {
                    parts
                        .iter()
                        .map(|(name, file, content)| (name.clone(), file.is_some(), content.clone()))
                        .collect()
                };
                assert_eq!(bare(&one), bare(&other), "{about}");
                read_by_both += 1;
            }
            // Who refuses is not misled.
            (Err(_), None) => read_by_none += 1,
            _ => {}
        }
    }
    assert!(read_by_both >= passing.len() * 3 / 4, "{read_by_both} of {}", passing.len());
    assert!(read_by_none <= 1, "{read_by_none}");
}

#[test]
fn a_form_that_flows_is_cut_and_one_that_is_held_is_seen_by_nobody() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    let client = Client::new(&gateway);
    // Ten megabytes go through, and are judged on the way; whoever lies at the very end gets nothing done.
    let file = |end: &str| {
        let mut body = b"--b0undary\r\nContent-Disposition: form-data; name=\"blob\"; filename=\"a\"\r\n\
            Content-Type: application/octet-stream\r\n\r\n"
            .to_vec();
        body.resize(10 * 1024 * 1024, b'-');
        body.extend(end.as_bytes());
        body
    };
    let good = file("\r\n--b0undary--\r\n");
    assert_eq!(client.whole("/large", &usual_type(), &good).status, 200);
    assert!(bundle.upstream.last().body == good, "another body arrived");
    let connections = bundle.upstream.connections();
    for end in ["\r\n--b0undary--\r\nx", "\r\n--b0undary", "\n--b0undary--\r\n", "\r\n--b0undary\r\n\r\n"] {
        let bad = file(end);
        assert_eq!(reason(&client.whole("/large", &usual_type(), &bad)), "400 not-a-form", "{end:?}");
    }
    assert_eq!(bundle.upstream.count("/large"), 1, "what was refused became a whole request");
    // It was cut on its way: the backend was connected to, and each connection was given up.
    assert!(bundle.upstream.connections() > connections);
    // A held form is no reason to connect.
    let before = bundle.upstream.connections();
    assert_eq!(reason(&client.whole("/held", &usual_type(), b"x")), "400 not-a-form");
    assert_eq!(bundle.upstream.connections(), before);
}

#[test]
fn parts_that_have_to_be_there_are_missed_and_shadow_mode_only_counts() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    let client = Client::new(&gateway);
    let more =
        b"--b0undary\r\nContent-Disposition: form-data; name=\"more\"\r\n\r\nhello\r\n--b0undary--\r\n";
    let both = [NOTE, more].concat();
    assert_eq!(client.whole("/needed", &usual_type(), &both).status, 200);
    let reply = client.whole("/needed", &usual_type(), more);
    assert_eq!(reason(&reply), "422 form-parts");
    assert_eq!(reply.json()["detail"], "`note`: the part is missing");
    // Nothing at all is no form either.
    assert_eq!(reason(&client.whole("/needed", &usual_type(), b"")), "400 not-a-form");
    assert_eq!(bundle.upstream.count("/needed"), 1);

    let shadowed = || gateway.metrics().sum("sealgate_shadow_denials_total", &[("reason", "form-parts")]);
    assert_eq!(client.whole("/noted", &usual_type(), more).status, 200);
    assert_eq!(bundle.upstream.last().body, more);
    until("it is counted", DEADLINE, || (shadowed() == 1.0).then_some(()));
    assert_eq!(client.whole("/noted", &usual_type(), &both).status, 200);
    assert_eq!(shadowed(), 1.0);
}

#[test]
fn content_codings_pass_where_they_are_listed_and_nowhere_else() {
    let bundle = bundle();
    let gateway = Gateway::run(&bundle);
    let send = |path: &str, codings: &[&str]| {
        let mut curl = gateway.curl(path).body("application/json", "{}");
        for coding in codings {
            curl = curl.header(&format!("Content-Encoding: {coding}"));
        }
        curl.send()
    };
    for (path, codings) in [
        ("/zipped", &[][..]),
        ("/zipped", &["gzip"]),
        ("/zipped", &["ZSTD"]),
        ("/zipped", &["identity"]),
        ("/plain", &[]),
        ("/plain", &["identity"]),
        ("/json", &["identity"]),
    ] {
        assert_eq!(send(path, codings).status, 200, "{path} {codings:?}");
    }
    let seen = bundle.upstream.seen().len();
    for (path, codings, accept) in [
        ("/zipped", &["br"][..], "gzip, zstd, identity"),
        ("/zipped", &["gzip, gzip"], "gzip, zstd, identity"),
        ("/zipped", &["gzip", "zstd"], "gzip, zstd, identity"),
        ("/plain", &["gzip"], "identity"),
        ("/json", &["gzip"], "identity"),
        ("/held", &["gzip"], "identity"),
    ] {
        let kind = if path == "/held" { usual_type() } else { "application/json".to_owned() };
        let mut curl = gateway.curl(path).body(&kind, "{}");
        for coding in codings {
            curl = curl.header(&format!("Content-Encoding: {coding}"));
        }
        let reply = curl.send();
        assert_eq!(reason(&reply), "415 content-coding", "{path} {codings:?}");
        assert_eq!(reply.header("accept-encoding"), Some(accept), "{path} {codings:?}");
    }
    let reply = gateway.curl("/json").body("text/plain", "{}").send();
    assert_eq!(
        (reason(&reply).as_str(), reply.header("accept")),
        ("415 content-type", Some("application/json"))
    );
    assert_eq!(bundle.upstream.seen().len(), seen, "what was refused reached the backend");
}

#[test]
fn of_answers_only_what_a_rule_lets_out_goes_out() {
    let bundle = Bundle::new(
        r#"
[answers]
errors = "replace"
content_types = ["application/json", "application/problem+json"]

[[route]]
name = "strict"
path = "/strict/**"
methods = ["GET"]
upstream = "backend"
auth = "none"
answer = { headers = ["X-Total-Count"] }

[[route]]
name = "open"
path = "/open/**"
methods = ["GET"]
upstream = "backend"
auth = "none"
answer = { errors = "pass", content_types = ["application/json", "text/html"] }

[[route]]
name = "noted"
path = "/noted/**"
methods = ["GET"]
upstream = "backend"
auth = "none"
mode = "shadow"
"#,
    );
    let gateway = Gateway::run(&bundle);
    const TRACE: &str = "java.lang.NullPointerException at com.example.Secret.java:42";
    let says = |path: &str, status: &str, fields: &str, body: &str| {
        let length = body.len();
        bundle.upstream.say(
            path,
            &[&format!("HTTP/1.1 {status}\r\n{fields}Content-Length: {length}\r\n\r\n{body}")],
            false,
        );
    };
    for path in ["/strict", "/open", "/noted"] {
        says(
            &format!("{path}/good"),
            "200 OK",
            "Content-Type: application/json; charset=utf-8\r\nETag: \"1\"\r\nX-Total-Count: 1\r\nX-Total-Count: 2\r\n\
             Set-Cookie: a=b\r\nX-Debug: on\r\n",
            "{}",
        );
        says(&format!("{path}/fault"), "500 Oops", "Content-Type: text/html\r\nX-Debug: on\r\n", TRACE);
        says(
            &format!("{path}/busy"),
            "503 Busy",
            "Content-Type: application/json\r\nRetry-After: 7\r\n",
            TRACE,
        );
        says(&format!("{path}/page"), "200 OK", "Content-Type: text/html\r\n", "<html>");
        says(&format!("{path}/untyped"), "200 OK", "", TRACE);
        says(&format!("{path}/missing"), "404 No", "Content-Type: application/problem+json\r\n", "{}");
        says(&format!("{path}/nothing"), "204 No Content", "", "");
    }
    let get = |path: &str| gateway.curl(path).send();
    let reply = get("/strict/good");
    assert_eq!((reply.status, reply.body.as_str(), reply.header("etag")), (200, "{}", Some("\"1\"")));
    let counts: Vec<_> = reply.headers.iter().filter(|(name, _)| name == "x-total-count").collect();
    assert_eq!(counts.len(), 2, "{reply:?}");
    for hidden in ["set-cookie", "x-debug"] {
        assert_eq!(reply.header(hidden), None, "{reply:?}");
    }
    for (path, status) in [("/strict/fault", 500), ("/strict/busy", 503)] {
        let reply = get(path);
        assert_eq!(reply.problem(status), "urn:sealgate:problem:upstream-fault");
        assert!(!reply.body.contains("java") && reply.header("x-debug").is_none(), "{reply:?}");
    }
    assert_eq!(get("/strict/busy").header("retry-after"), Some("7"));
    for path in ["/strict/page", "/strict/untyped"] {
        let reply = get(path);
        assert_eq!(reply.problem(502), "urn:sealgate:problem:answer-not-allowed", "{path}");
        assert!(!reply.body.contains("html"), "{reply:?}");
    }
    assert_eq!(get("/strict/missing").status, 404);
    assert_eq!(get("/strict/nothing").status, 204);

    // A route that says otherwise.
    let reply = get("/open/fault");
    assert_eq!((reply.status, reply.body.as_str(), reply.header("x-debug")), (500, TRACE, Some("on")));
    assert_eq!(get("/open/page").body, "<html>");
    assert_eq!(get("/open/good").header("set-cookie"), Some("a=b"));
    assert_eq!(get("/open/untyped").problem(502), "urn:sealgate:problem:answer-not-allowed");

    // Faults are not judged but hidden, in shadow mode too; what would be refused is counted.
    assert_eq!(get("/noted/page").body, "<html>");
    let shadowed =
        gateway.metrics().sum("sealgate_shadow_denials_total", &[("reason", "answer-not-allowed")]);
    assert_eq!(shadowed, 1.0);
    assert_eq!(get("/noted/fault").problem(500), "urn:sealgate:problem:upstream-fault");
}
