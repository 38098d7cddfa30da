//! SIGTERM: what runs is finished, sockets are told, and nothing waits for nothing.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use sealgate_tests::{Bundle, Client, Curl, DEADLINE, Driver, Gateway, Open, Signal, until};

const RULES: &str = r#"
[[route]]
name = "held"
path = "/{what}/request"
methods = ["GET"]
upstream = "backend"
auth = "none"

[[websocket]]
name = "plain"
path = "/ws/{variant}"
upstream = "backend"
auth = "required"
origins = ["*"]
inspect = "none"
"#;

#[test]
fn a_drain_finishes_requests_and_tells_sockets() {
    let bundle = Bundle::new(RULES);
    let mut gateway = Gateway::run(&bundle);
    let token = bundle.issuer.token("alice");
    let mut drivers = Client::ALL.map(|client| Driver::start(client, gateway.ca()));
    for driver in &mut drivers {
        driver.open("a", &gateway.ws("/ws/a"), &Open::token(&token));
        driver.echo("a", "hello");
    }
    let running = ["--http1.1", "--http2"].map(|http| gateway.curl("/hold/request").args([http]).start());
    bundle.upstream.wait_held(2);
    gateway.signal(Signal::TERM);

    for driver in &mut drivers {
        let event = driver.next("a");
        assert_eq!(event["event"], "close", "{event}");
        assert!(matches!(event["code"].as_u64(), Some(1001 | 1012)), "{event}");
    }
    until("nothing new is accepted", DEADLINE, || {
        TcpStream::connect(gateway.address()).is_err().then_some(())
    });
    assert!(gateway.process().ended().is_none(), "two requests still run");
    bundle.upstream.release();
    for request in running {
        let reply = Curl::finish(request).expect("a request that ran is answered");
        assert_eq!(reply.status, 200, "{reply:?}");
    }
    let status = gateway.wait(DEADLINE);
    assert_eq!(status.code(), Some(0), "{}", gateway.process().stderr());
    let frames = bundle.upstream.frames();
    assert_eq!(
        frames.iter().filter(|frame| frame.opcode == 8).count(),
        Client::ALL.len(),
        "the upstream is told too: {frames:?}"
    );
}

#[test]
fn an_idle_gateway_ends_at_once() {
    let bundle = Bundle::new(RULES);
    let mut gateway = Gateway::run(&bundle);
    // Connections that are kept alive but idle hold nothing up.
    let mut wire = gateway.wire();
    wire.send("GET /fine/request HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!(wire.response().expect("an answer").status, 200);
    let start = Instant::now();
    gateway.signal(Signal::TERM);
    let status = gateway.wait(DEADLINE);
    assert_eq!(status.code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert!(wire.ended());
    assert!(!gateway.control().exists(), "the control socket is left behind");
}

#[test]
fn the_deadline_of_a_drain_holds() {
    let bundle = Bundle::new(&format!("{RULES}\n[connections]\ndrain_timeout = \"1s\"\n"));
    let mut gateway = Gateway::run(&bundle);
    let running = gateway.curl("/hold/request").start();
    bundle.upstream.wait_held(1);
    let start = Instant::now();
    gateway.signal(Signal::TERM);
    gateway.wait(DEADLINE);
    let elapsed = start.elapsed();
    assert!((Duration::from_millis(900)..Duration::from_secs(8)).contains(&elapsed), "{elapsed:?}");
    bundle.upstream.release();
    let cut = Curl::finish(running);
    assert!(!cut.as_ref().is_ok_and(|reply| reply.status == 200), "{cut:?}");
}
