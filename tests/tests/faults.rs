//! Faults and floods over real sockets: peers that vanish, stop, trickle, flood and lie, on both sides of the gateway.
//!
//! During each the gateway's memory is watched, and a client that did nothing wrong is served; after each the right code
//! was said, and what had been accepted before is at the upstream, in order.

use std::time::{Duration, Instant};

use sealgate_tests::{Bundle, Gateway, Wire, frame, until};

/// More than anything here may take, on a machine that is busy with other tests.
const SOON: Duration = Duration::from_secs(30);

/// How much the gateway may grow under attack.
const MEMORY: u64 = 64 << 20;

const RULES: &str = r#"
[connections]
max_per_address = 1000

[[websocket]]
name = "plain"
path = "/ws/{variant}"
upstream = "backend"
auth = "none"
inspect = "none"
max_frame = "64KiB"
max_message = "64KiB"
max_fragments = 16
message_rates = ["messages"]
TIMES

[[websocket]]
name = "deflate"
path = "/ws-deflate"
upstream = "backend"
auth = "none"
inspect = "none"
max_frame = "64KiB"
max_message = "64KiB"
max_fragments = 16
compression = "terminate"

[[upstream]]
name = "impatient"
endpoints = ["unix:${state}/backend.sock"]
response_timeout = "1s"

[[websocket]]
name = "no-handshake"
path = "/{what}/socket"
upstream = "impatient"
auth = "none"
inspect = "none"

[[rate]]
name = "messages"
per = ["address"]
quota = 100000
period = "1s"
burst = 100000
"#;

/// Long silences, so that nothing but the fault at hand ends a socket; the second is for watched silences.
const PATIENT: &str = "write_timeout = \"2s\"";
const WATCHFUL: &str = "ping_interval = \"1s\"\npong_timeout = \"1s\"\nwrite_timeout = \"2s\"";

fn start(times: &str) -> (Bundle, Gateway) {
    let bundle = Bundle::new(&RULES.replace("TIMES", times));
    let gateway = Gateway::run(&bundle);
    // What is allocated once is not the attack's doing.
    serve(&gateway);
    (bundle, gateway)
}

fn open(gateway: &Gateway, variant: &str) -> Wire {
    let mut wire = gateway.wire();
    let reply = wire.upgrade(&format!("/ws/{variant}"), "");
    assert_eq!(reply.status, 101, "{reply:?}");
    wire
}

/// A fresh client that behaves is served, now.
#[track_caller]
fn serve(gateway: &Gateway) {
    let begin = Instant::now();
    let mut wire = open(gateway, "a");
    wire.send(frame(0x81, b"fresh"));
    assert_eq!(wire.message().expect("the echo").payload, b"fresh");
    assert!(begin.elapsed() < Duration::from_secs(5), "a fresh client waited {:?}", begin.elapsed());
    wire.send(frame(0x88, &1000_u16.to_be_bytes()));
    assert_eq!(wire.message().expect("the close").close().0, 1000);
}

/// Runs an attack on a gateway, which may not grow by it.
fn withstand(gateway: &mut Gateway, what: &str, attack: impl FnOnce(&Gateway)) {
    let watch = gateway.process().watch_memory();
    attack(gateway);
    let grown = watch.grown();
    eprintln!("{what}: at most {} KiB more than idle", grown >> 10);
    assert!(grown < MEMORY, "{what}: {} KiB more than idle", grown >> 10);
}

/// Reads to the close frame: code and reason.
#[track_caller]
fn closed(wire: &mut Wire, what: &str) -> (u16, String) {
    loop {
        let frame = wire.message().unwrap_or_else(|| panic!("{what}: ended without a close frame"));
        if frame.opcode == 8 {
            return frame.close();
        }
    }
}

/// What the upstream has of the messages that begin with `mark`, in order.
fn arrived(bundle: &Bundle, mark: &str) -> Vec<String> {
    let frames = bundle.upstream.frames();
    let data = frames.iter().filter(|frame| frame.opcode == 1);
    data.map(|frame| String::from_utf8_lossy(&frame.payload).into_owned())
        .filter(|text| text.starts_with(mark))
        .collect()
}

/// Waits until the last socket is gone on both sides.
fn settle(gateway: &Gateway) {
    until("no socket is open", SOON, || {
        (gateway.metrics().sum("sealgate_websocket_open", &[]) == 0.0).then_some(())
    });
}

/// How many messages the gateway says it let pass to the upstream.
fn accepted(gateway: &Gateway) -> usize {
    let metrics = gateway.metrics();
    metrics.sum("sealgate_websocket_messages_total", &[("direction", "to-upstream")]) as usize
}

#[test]
fn a_client_that_vanishes_takes_nothing_with_it_that_was_accepted() {
    let (bundle, mut gateway) = start(PATIENT);
    let mut closes = bundle.upstream.frames().iter().filter(|frame| frame.opcode == 8).count();
    for (mark, in_order) in [("reset", false), ("half-close", true)] {
        let before = accepted(&gateway);
        let served = arrived(&bundle, "fresh").len();
        withstand(&mut gateway, mark, |gateway| {
            let mut wire = open(gateway, "mute");
            let all: Vec<u8> =
                (0..500).flat_map(|n| frame(0x81, format!("{mark} {n:03}").as_bytes())).collect();
            wire.send(all);
            if in_order {
                wire.half_close();
            } else {
                until("the first has arrived", SOON, || (!arrived(&bundle, mark).is_empty()).then_some(()));
                wire.reset();
            }
            serve(gateway);
            settle(gateway);
        });
        let sent: Vec<String> = (0..500).map(|n| format!("{mark} {n:03}")).collect();
        let fresh = arrived(&bundle, "fresh").len() - served;
        let have = until("what was accepted arrives", SOON, || {
            let have = arrived(&bundle, mark);
            (have.len() + fresh == accepted(&gateway) - before).then_some(have)
        });
        assert_eq!(have, sent[..have.len()], "{mark}: in order");
        // A reset throws away what was not read yet; an end in order does not.
        assert!(!have.is_empty() && (!in_order || have.len() == 500), "{mark}: {} of 500", have.len());
        let told: Vec<_> = until("the upstream is told", SOON, || {
            let frames = bundle.upstream.frames();
            let told: Vec<_> =
                frames.iter().filter(|frame| frame.opcode == 8).skip(closes).cloned().collect();
            (told.len() == 2).then_some(told)
        });
        closes += told.len();
        assert!(told.iter().any(|frame| frame.close() == (1001, "client-gone".to_owned())), "{told:?}");
    }
}

#[test]
fn a_silent_peer_on_either_side_is_found_by_pings() {
    let (bundle, mut gateway) = start(WATCHFUL);
    withstand(&mut gateway, "silence", |gateway| {
        // The client answers no ping.
        let mut wire = open(gateway, "a");
        wire.send(frame(0x81, b"last words"));
        let (code, reason) = closed(&mut wire, "a silent client");
        assert_eq!((code, reason.as_str()), (1001, "pong-timeout"));
        assert!(wire.ended());
        assert_eq!(arrived(&bundle, "last words").len(), 1);
        // The upstream answers none; the client does.
        let mut wire = open(gateway, "mute");
        let close = loop {
            let frame = wire.frame().expect("pings until the end");
            match frame.opcode {
                9 => wire.send(sealgate_tests::frame(0x8a, &frame.payload)),
                8 => break frame.close(),
                _ => panic!("{frame:?}"),
            }
        };
        assert_eq!(close.0, 1013, "{close:?}");
        assert!(close.1.starts_with("upstream-timeout"), "{close:?}");
        serve(gateway);
        settle(gateway);
    });
}

#[test]
fn one_byte_at_a_time_passes_both_ways() {
    let (bundle, mut gateway) = start(PATIENT);
    withstand(&mut gateway, "one byte at a time", |gateway| {
        let mut wire = gateway.wire();
        let head = "GET /ws/bytes HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        // Every byte is a TLS record of its own, and from the upstream a write of its own.
        head.bytes().for_each(|byte| wire.send([byte]));
        assert_eq!(wire.response().expect("an answer").status, 101);
        let long = "ünï ".repeat(60);
        let fragments = [frame(0x01, b"fr"), frame(0x89, b"ping"), frame(0x00, b"ag"), frame(0x80, b"ment")];
        for (bytes, expected) in [
            (frame(0x81, b"slow"), "slow"),
            (frame(0x81, long.as_bytes()), &long),
            (fragments.concat(), "fragment"),
            (frame(0x81, b""), ""),
        ] {
            bytes.iter().for_each(|byte| wire.send([*byte]));
            let mut payload = Vec::new();
            loop {
                let frame = wire.message().expect("the echo");
                payload.extend_from_slice(&frame.payload);
                if frame.fin {
                    break;
                }
            }
            assert_eq!(String::from_utf8_lossy(&payload), expected);
        }
        serve(gateway);
        frame(0x88, &1000_u16.to_be_bytes()).iter().for_each(|byte| wire.send([*byte]));
        assert_eq!(closed(&mut wire, "slowly").0, 1000);
        assert_eq!(arrived(&bundle, "slow").len(), 1);
    });
}

#[test]
fn a_peer_that_stops_reading_is_held_for_within_bounds_and_then_let_go() {
    let (bundle, mut gateway) = start(PATIENT);
    // Clients that do not read what the upstream pours out.
    withstand(&mut gateway, "clients that stop reading", |gateway| {
        let mut stuck: Vec<Wire> = (0..20).map(|_| open(gateway, "flood")).collect();
        for wire in &mut stuck {
            wire.send(frame(0x81, b"pour"));
        }
        serve(gateway);
        settle(gateway);
        let closes = gateway.metrics().sum("sealgate_websocket_closes_total", &[("by", "gateway")]);
        assert_eq!(closes, 20.0);
        assert_eq!(arrived(&bundle, "pour").len(), 20);
    });
    // Upstreams that do not read what clients send.
    withstand(&mut gateway, "an upstream that stops reading", |gateway| {
        let stuck: Vec<_> = (0..20)
            .map(|_| {
                let mut wire = open(gateway, "stall");
                std::thread::spawn(move || {
                    let message = frame(0x82, &[0; 32 * 1024]);
                    // 16 MiB: more than the sockets between take.
                    (0..512).for_each(|_| wire.send(&message));
                    closed(&mut wire, "an upstream that stops")
                })
            })
            .collect();
        serve(gateway);
        for client in stuck {
            let (code, reason) = client.join().expect("a close");
            assert_eq!(code, 1013, "{reason}");
            assert!(reason.starts_with("upstream-timeout"), "{reason}");
        }
        serve(gateway);
        settle(gateway);
    });
}

#[test]
fn floods_end_with_their_own_code() {
    let (bundle, mut gateway) = start(PATIENT);
    let huge = |opcode: u8, length: u64| {
        [&[opcode, 0xff][..], &length.to_be_bytes(), &[1, 2, 3, 4], &[0; 1000]].concat()
    };
    let fragments = |payload: &[u8]| {
        let mut bytes = frame(0x01, payload);
        (0..1000).for_each(|_| bytes.extend(frame(0x00, payload)));
        bytes
    };
    let floods: Vec<(&str, u16, Vec<u8>)> = vec![
        ("pings", 4429, frame(0x89, b"").repeat(10_000)),
        ("large pings", 4429, frame(0x89, &[7; 125]).repeat(10_000)),
        ("pongs", 4429, frame(0x8a, b"").repeat(10_000)),
        ("empty fragments", 1009, fragments(b"")),
        ("tiny fragments", 1009, fragments(b"x")),
        ("2^40 bytes announced", 1009, huge(0x82, 1 << 40)),
        ("64 KiB and one announced", 1009, huge(0x82, (64 << 10) + 1)),
        ("2^63 bytes announced", 1002, huge(0x82, 1 << 63)),
        ("an endless control frame", 1002, huge(0x89, 1 << 20)),
    ];
    for (what, code, bytes) in floods {
        withstand(&mut gateway, what, |gateway| {
            let mut attackers: Vec<Wire> = (0..10).map(|_| open(gateway, "a")).collect();
            for wire in &mut attackers {
                wire.send(frame(0x81, what.as_bytes()));
                wire.send(&bytes);
            }
            serve(gateway);
            for wire in &mut attackers {
                let (have, reason) = closed(wire, what);
                assert_eq!(have, code, "{what}: {reason}");
            }
            drop(attackers);
            settle(gateway);
        });
        assert_eq!(arrived(&bundle, what).len(), 10, "{what}: what came before is delivered");
    }
}

/// A message of so many zeroes, compressed.
fn bomb(length: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(length / 900 + 1024);
    let mut deflate = flate2::Compress::new(flate2::Compression::best(), false);
    deflate.compress_vec(&vec![0; length], &mut out, flate2::FlushCompress::Sync).expect("it compresses");
    out.strip_suffix(&[0, 0, 0xff, 0xff]).expect("a flushed block").to_vec()
}

#[test]
fn inflate_bombs_do_not_go_off() {
    let (bundle, mut gateway) = start(PATIENT);
    // 56 MiB in one frame that is within its limit, and the same over fragments.
    let whole = bomb(56 << 20);
    let fragments: Vec<u8> = {
        let (first, last) =
            (whole.chunks(8 << 10).next().expect("a first"), whole.len().div_ceil(8 << 10) - 1);
        let rest = whole.chunks(8 << 10).enumerate().skip(1);
        let frames = rest.flat_map(|(n, part)| frame(if n == last { 0x80 } else { 0x00 }, part));
        frame(0x42, first).into_iter().chain(frames).collect()
    };
    assert!(whole.len() <= 64 << 10, "{}", whole.len());
    for (what, bytes) in [("whole", frame(0xc2, &whole)), ("fragments", fragments)] {
        withstand(&mut gateway, what, |gateway| {
            let mut attackers: Vec<Wire> = (0..50)
                .map(|_| {
                    let mut wire = gateway.wire();
                    let reply =
                        wire.upgrade("/ws-deflate", "Sec-WebSocket-Extensions: permessage-deflate\r\n");
                    let agreed = reply.header("sec-websocket-extensions").unwrap_or_default();
                    assert!(reply.status == 101 && agreed.contains("permessage-deflate"), "{reply:?}");
                    wire
                })
                .collect();
            for wire in &mut attackers {
                wire.send(frame(0x81, what.as_bytes()));
                wire.send(&bytes);
            }
            serve(gateway);
            for wire in &mut attackers {
                let (code, reason) = closed(wire, what);
                assert_eq!(code, 1009, "{what}: {reason}");
            }
            drop(attackers);
            settle(gateway);
        });
        assert_eq!(arrived(&bundle, what).len(), 50, "{what}: what came before is delivered");
    }
    let largest = bundle.upstream.frames().iter().map(|frame| frame.payload.len()).max();
    assert!(largest < Some(100), "a bomb went on to the upstream: {largest:?}");
}

#[test]
fn whole_messages_without_end_are_a_matter_of_rates() {
    let bundle = Bundle::new(&RULES.replace("TIMES", PATIENT).replace("100000", "500"));
    let mut gateway = Gateway::run(&bundle);
    serve(&gateway);
    withstand(&mut gateway, "empty messages", |gateway| {
        let mut wire = open(gateway, "mute");
        wire.send(frame(0x81, b"").repeat(50_000));
        let (code, reason) = closed(&mut wire, "empty messages");
        assert_eq!(code, 4429, "{reason}");
        drop(wire);
        settle(gateway);
    });
}

#[test]
fn an_upstream_that_dies_stalls_or_raves_is_told_to_the_client() {
    let (bundle, mut gateway) = start(PATIENT);
    withstand(&mut gateway, "rubbish", |gateway| {
        let mut wire = open(gateway, "rubbish");
        wire.send(frame(0x81, b"rave"));
        let (code, reason) = closed(&mut wire, "rubbish");
        assert_eq!(code, 1011, "{reason}");
        serve(gateway);
        assert_eq!(arrived(&bundle, "rave").len(), 1);
    });
    withstand(&mut gateway, "no handshake from the upstream", |gateway| {
        let reply = gateway.wire().upgrade("/garbage/socket", "");
        reply.problem(502);
        let begin = Instant::now();
        let reply = gateway.wire().upgrade("/hold/socket", "");
        reply.problem(504);
        assert!(begin.elapsed() >= Duration::from_secs(1), "{:?}", begin.elapsed());
        serve(gateway);
    });
    withstand(&mut gateway, "an upstream that is killed", |gateway| {
        let mut sockets: Vec<Wire> = (0..20).map(|_| open(gateway, "a")).collect();
        for (n, wire) in sockets.iter_mut().enumerate() {
            for m in 0..20 {
                wire.send(frame(0x81, format!("kill {n:02} {m:02}").as_bytes()));
            }
        }
        // All of the first socket, and whatever of the others.
        for m in 0..20 {
            let echo = sockets[0].message().expect("an echo");
            assert_eq!(echo.payload, format!("kill 00 {m:02}").as_bytes());
        }
        bundle.upstream.stop();
        for (n, wire) in sockets.iter_mut().enumerate() {
            let mut echoes = 0;
            let (code, reason) = loop {
                let frame = wire.message().expect("a close frame");
                if frame.opcode == 8 {
                    break frame.close();
                }
                echoes += 1;
            };
            assert_eq!(code, 1013, "{reason}");
            assert!(reason.starts_with("upstream-unavailable"), "{reason}");
            let have = arrived(&bundle, &format!("kill {n:02}"));
            let sent: Vec<String> = (0..20).map(|m| format!("kill {n:02} {m:02}")).collect();
            assert_eq!(have, sent[..have.len()]);
            assert!(echoes <= have.len());
        }
        let reply = gateway.wire().upgrade("/ws/a", "");
        assert!(matches!(reply.status, 502 | 503), "{reply:?}");
        drop(sockets);
        settle(gateway);
    });
}
