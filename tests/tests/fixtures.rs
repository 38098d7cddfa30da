//! The fixtures themselves: a test that passes because its client is deaf shows nothing.

use sealgate_tests::{Client, Driver, Metrics, Open, Pki, Upstream};

#[test]
fn clients_and_upstream_understand_each_other_without_a_gateway() {
    let folder = tempfile::tempdir().unwrap();
    let pki = Pki::new(folder.path());
    let upstream = Upstream::tcp();
    let address = upstream.endpoint().replace("tcp:", "");
    for client in Client::HTTP1 {
        let mut driver = Driver::start(client, &pki.ca());
        let url = |variant: &str| format!("ws://{address}/ws/{variant}");
        driver.open("a", &url("a"), &Open::token("t").origin("https://o.test").subprotocol("one"));
        let seen = upstream.last();
        assert_eq!(seen.header("authorization"), Some("Bearer t"), "{client:?}");
        assert_eq!(seen.header("origin"), Some("https://o.test"), "{client:?}");
        assert_eq!(seen.header("sec-websocket-extensions"), None, "{client:?}");
        driver.echo("a", "hello");
        driver.fragments("a", &["a", "b"]);
        // The upstream echoes frames, not messages; the client puts them together again.
        driver.expect_text("a", "ab");
        driver.binary("a", &[1, 2]);
        assert_eq!(driver.next("a")["data"], "AQI=", "{client:?}");
        driver.ping("a");
        assert_eq!(driver.next("a")["event"], "pong", "{client:?}");
        driver.close("a", 4000, "done");
        assert_eq!(driver.expect_close("a", 4000), "done", "{client:?}");

        driver.refused("refuse", &url("refuse"), &Open::bare(), 403);
        assert_eq!(driver.attempt("accept", &url("accept"), &Open::bare())["event"], "failed", "{client:?}");
        assert_eq!(
            driver.attempt("deflate", &url("deflate"), &Open::bare())["event"],
            "failed",
            "{client:?}"
        );
        for variant in ["masked", "latin", "gone"] {
            driver.open(variant, &url(variant), &Open::bare());
            driver.text(variant, "hello");
            driver.expect_close(variant, 1006);
        }
        driver.attempt("offer", &url("a"), &Open::bare().compression());
        assert!(upstream.last().header("sec-websocket-extensions").is_some(), "{client:?}");
    }
}

#[test]
fn metrics_are_read_as_they_are_written() {
    let metrics = Metrics::parse(
        "# HELP a_total Of \"a\".\n# TYPE a_total counter\na_total{x=\"1\",y=\"q\\\"}\"} 2\na_total 3.5 17\n",
    );
    assert_eq!(metrics.sum("a_total", &[]), 5.5);
    assert_eq!(metrics.sum("a_total", &[("y", "q\"}")]), 2.0);
    assert!(std::panic::catch_unwind(|| Metrics::parse("a{ 1")).is_err());
}
