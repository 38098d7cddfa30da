//! What backends answer, and what of it a client gets to see: an answer that can be read in two ways is none, and nothing of
//! one answer is ever taken for another.

use sealgate_tests::{Bundle, Gateway};

const RULES: &str = r#"
[[upstream]]
name = "impatient"
endpoints = ["unix:${state}/backend.sock"]
response_timeout = "1s"

[[route]]
name = "anything"
path = "/a/**"
methods = ["GET", "HEAD"]
upstream = "impatient"
auth = "none"

[[route]]
name = "anything-sent"
path = "/a/**"
methods = ["POST", "PUT"]
upstream = "impatient"
auth = "none"
body = { max_bytes = "16MiB" }
"#;

fn start() -> (Bundle, Gateway) {
    let bundle = Bundle::new(RULES);
    let gateway = Gateway::run(&bundle);
    (bundle, gateway)
}

/// Requests get answers of their own: no connection was kept that should not have been. Several, because each core has
/// its own pool.
fn is_in_order(gateway: &Gateway, bundle: &Bundle) {
    for _ in 0..4 {
        let before = bundle.upstream.count("/a/next");
        let reply = gateway.curl("/a/next").send();
        assert_eq!((reply.status, &reply.json()["target"]), (200, &"/a/next".into()));
        assert_eq!(bundle.upstream.count("/a/next"), before + 1, "asked once");
    }
}

#[test]
fn well_formed_answers_pass_however_they_are_framed() {
    let (bundle, gateway) = start();
    let long = "x".repeat(300_000);
    let long_chunk = format!("{:x}\r\n{long}\r\n", long.len());
    let cases: &[(&str, &[&str], bool, u16, &str)] = &[
        ("length", &["HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"], false, 200, "abc"),
        (
            "in-pieces",
            &["HTTP/1.1 20", "0 OK\r\nContent-Le", "ngth: 3\r\n\r", "\na", "bc"],
            false,
            200,
            "abc",
        ),
        (
            "chunks",
            &[
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n",
                "2;x\r\nbc\r\n0\r\n",
                "A: b\r\n\r\n",
            ],
            false,
            200,
            "abc",
        ),
        (
            "long",
            &["HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", &long_chunk, "0\r\n\r\n"],
            false,
            200,
            &long,
        ),
        ("until-close", &["HTTP/1.1 200 OK\r\n\r\na", "bc"], true, 200, "abc"),
        ("old", &["HTTP/1.0 200 OK\r\n\r\nabc"], true, 200, "abc"),
        (
            "closes",
            &["HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nabc"],
            true,
            200,
            "abc",
        ),
        ("cut-afterwards", &["HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"], true, 200, "abc"),
        ("nothing", &["HTTP/1.1 204 No Content\r\n\r\n"], false, 204, ""),
        (
            "hints",
            &[
                "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
                "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na",
            ],
            false,
            200,
            "a",
        ),
    ];
    for (name, pieces, cut, status, body) in cases {
        bundle.upstream.say(&format!("/a/{name}"), pieces, *cut);
        for _ in 0..2 {
            let reply = gateway.curl(&format!("/a/{name}")).send();
            assert_eq!((reply.status, reply.body.as_str()), (*status, *body), "{name}");
        }
        is_in_order(&gateway, &bundle);
    }
}

#[test]
fn answers_that_can_be_read_in_two_ways_are_none() {
    let (bundle, gateway) = start();
    let long_field = format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "a".repeat(100_000));
    let many_fields = format!("HTTP/1.1 200 OK\r\n{}\r\n", "X: a\r\n".repeat(1000));
    let hints = "HTTP/1.1 103 Early Hints\r\n\r\n".repeat(1000);
    let cases: &[(&str, &[&str])] = &[
        (
            "length-and-chunks",
            &["HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"],
        ),
        ("two-lengths", &["HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"]),
        ("odd-length", &["HTTP/1.1 200 OK\r\nContent-Length: 0x3\r\n\r\nabc"]),
        ("odd-coding", &["HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"]),
        ("bare-line-feed", &["HTTP/1.1 200 OK\nContent-Length: 3\n\nabc"]),
        ("folded", &["HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 0\r\n\r\n"]),
        (
            "switches",
            &["HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"],
        ),
        ("endless-field", &[&long_field]),
        ("endless-fields", &[&many_fields]),
        ("endless-hints", &[&hints]),
        ("malformed-chunk", &["HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n"]),
        ("no-http", &["SSH-2.0-OpenSSH_9.2\r\n"]),
        ("nothing-at-all", &[""]),
    ];
    for (name, pieces) in cases {
        bundle.upstream.say(&format!("/a/{name}"), pieces, true);
        let reply = gateway.curl(&format!("/a/{name}")).send();
        assert_eq!(reply.problem(502), "urn:sealgate:problem:upstream-unavailable", "{name}");
        is_in_order(&gateway, &bundle);
    }
    bundle.upstream.say("/a/silence", &["HTTP/1.1 200 OK\r\n"], false);
    assert_eq!(gateway.curl("/a/silence").send().problem(504), "urn:sealgate:problem:upstream-timeout");
    is_in_order(&gateway, &bundle);
}

#[test]
fn an_answer_that_breaks_off_is_not_taken_for_a_whole_one() {
    let (bundle, gateway) = start();
    for (name, pieces) in [
        ("short", &["HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\nabc"][..]),
        ("no-last-chunk", &["HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n"]),
        (
            "broken-chunk",
            &["HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "3\r\nabcd\r\n0\r\n\r\n"],
        ),
    ] {
        bundle.upstream.say(&format!("/a/{name}"), pieces, true);
        for version in ["--http1.1", "--http2"] {
            let outcome = gateway.curl(&format!("/a/{name}")).args([version]).try_send();
            assert!(outcome.is_err() || outcome.is_ok_and(|reply| reply.status == 502), "{name} {version}");
        }
        is_in_order(&gateway, &bundle);
    }
}

#[test]
fn bytes_behind_an_answer_are_not_the_next_one() {
    let (bundle, gateway) = start();
    let poison = "HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\npoisoned";
    let whole = format!("HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na{poison}");
    let chunked = format!("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n{poison}");
    let unasked = format!("HTTP/1.1 204 No Content\r\n\r\n{poison}");
    for (name, pieces, body) in [
        ("behind-length", &[whole.as_str()][..], "a"),
        ("behind-chunks", &[chunked.as_str()], "a"),
        ("behind-nothing", &[unasked.as_str()], ""),
        ("later", &["HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na", poison], "a"),
    ] {
        bundle.upstream.say(&format!("/a/{name}"), pieces, false);
        let reply = gateway.curl(&format!("/a/{name}")).send();
        assert_eq!(reply.body, body, "{name}");
        is_in_order(&gateway, &bundle);
    }
}

#[test]
fn a_head_request_has_no_body_and_its_connection_goes_on() {
    let (bundle, gateway) = start();
    bundle.upstream.say("/a/head", &["HTTP/1.1 200 OK\r\nContent-Length: 30\r\n\r\n"], false);
    let reply = gateway.curl("/a/head").args(["--head"]).send();
    assert_eq!((reply.status, reply.header("content-length")), (200, Some("30")));
    is_in_order(&gateway, &bundle);
    // Nor has a refused one.
    for version in ["--http1.1", "--http2"] {
        let reply = gateway.curl("/nowhere").args(["--head", version]).send();
        assert_eq!((reply.status, &*reply.body), (404, ""), "{version}");
        is_in_order(&gateway, &bundle);
    }
}

#[test]
fn bodies_go_upstream_whole_and_once() {
    let (bundle, gateway) = start();
    let body = "0123456789abcdef".repeat(200_000);
    let file = bundle.state().join("body");
    std::fs::write(&file, &body).expect("a file to send");
    let data = format!("@{}", file.display());
    for more in [&["--http1.1"][..], &["--http1.1", "-H", "Transfer-Encoding: chunked"], &["--http2"]] {
        let before = bundle.upstream.count("/a/body");
        let reply = gateway.curl("/a/body").method("PUT").args(["--data-binary", &data]).args(more).send();
        assert_eq!(reply.status, 200, "{more:?}");
        assert_eq!(bundle.upstream.last().body.len(), body.len(), "{more:?}");
        assert!(bundle.upstream.last().body == body.as_bytes(), "{more:?}: another body arrived");
        assert_eq!(bundle.upstream.count("/a/body"), before + 1, "{more:?}");
        is_in_order(&gateway, &bundle);
    }
}

#[test]
fn a_request_that_was_taken_is_not_sent_twice_unless_it_may_be() {
    let (bundle, gateway) = start();
    // The connection is kept, and cut as soon as it is used again.
    for (method, times) in [("POST", 1), ("GET", 2)] {
        is_in_order(&gateway, &bundle);
        bundle.upstream.say(&format!("/a/cut-{method}"), &[], true);
        let reply = gateway.curl(&format!("/a/cut-{method}")).method(method).send();
        assert_eq!(reply.problem(502), "urn:sealgate:problem:upstream-unavailable", "{method}");
        assert_eq!(bundle.upstream.count(&format!("/a/cut-{method}")), times, "{method}");
    }
}
