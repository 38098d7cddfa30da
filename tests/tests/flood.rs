//! A flood from many addresses and by many subjects: memory stays within what is stated, nobody's limit is reset by it, and whoever
//! has a session is served meanwhile (rows A-1, N-2).
//!
//! Over sockets there are fewer than the 100,000 that are promised, as a debug build's handshakes take their time; the limiter itself
//! gets all of them in `gateway/src/limits/rates.rs` (`a_flood_neither_grows_the_table_nor_touches_who_is_known`).

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use sealgate_tests::{ALL_VERSIONS, Bundle, Gateway, Wire, client_config, frame};

/// Subjects that ask, each with a token of its own.
const SUBJECTS: usize = 10_000;

/// Addresses that ask, each over a connection of its own.
const ADDRESSES: usize = 1_500;

/// What each may ask a day.
const QUOTA: usize = 20;

/// Keys of rates that the process takes memory for, of strangers and of users (ARCHITECTURE.md), and bytes for each.
const RATE_TABLE: u64 = 2 * (1 << 20) * 24;

/// What a session and a token that was seen may cost, in bytes.
const SESSION: u64 = 2 * 1024;

/// Whatever else a process needs that has much to do: stacks, buffers, what the allocator keeps.
const ROOM: u64 = 48 * 1024 * 1024;

const RULES: &str = r#"
[[rate]]
name = "per-subject"
per = ["subject"]
quota = 20
period = "1d"

[[rate]]
name = "per-address"
per = ["address"]
quota = 20
period = "1d"

[[route]]
name = "mine"
path = "/mine"
methods = ["GET"]
upstream = "backend"
rates = ["per-subject"]

[[route]]
name = "open"
path = "/open"
methods = ["GET"]
upstream = "backend"
auth = "none"
rates = ["per-address"]

[[route]]
name = "free"
path = "/free"
methods = ["GET"]
upstream = "backend"

[[websocket]]
name = "chat"
path = "/ws"
upstream = "backend"
origins = ["*"]
inspect = "none"
"#;

fn request(path: &str, token: Option<&str>) -> String {
    let token = token.map(|it| format!("Authorization: Bearer {it}\r\n")).unwrap_or_default();
    format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n{token}\r\n")
}

/// Statuses of as many requests as are sent at once.
fn asks(wire: &mut Wire, requests: &[String]) -> Vec<u16> {
    wire.send(requests.concat());
    requests.iter().map(|_| wire.response().expect("an answer").status).collect()
}

#[test]
fn a1_a_flood_of_subjects_and_addresses_resets_nobodys_limit_and_keeps_nobody_waiting() {
    let bundle = Bundle::new(RULES);
    let mut gateway = Gateway::run(&bundle);
    let (address, config) =
        (gateway.address(), Arc::new(client_config(gateway.ca(), &["http/1.1"], None, ALL_VERSIONS)));
    let from = |source: Ipv4Addr| Wire::from(source, address, &config, "localhost");
    let [honest, greedy] = ["honest", "greedy"].map(|subject| bundle.issuer.token(subject));
    let mine = |token: &str| gateway.curl("/mine").http1().token(token).send();

    // Some have a budget left, and some have used theirs up, before the flood comes.
    for left in (15..QUOTA).rev() {
        let reply = mine(&honest);
        let standing = format!("\"per-subject\";r={left};");
        assert!(reply.header("ratelimit").is_some_and(|it| it.starts_with(&standing)), "{left}: {reply:?}");
    }
    let mut wire = gateway.wire();
    let all = asks(&mut wire, &vec![request("/mine", Some(&greedy)); QUOTA + 5]);
    assert_eq!(all.iter().filter(|status| **status == 200).count(), QUOTA);
    let (good_address, bad_address) = (Ipv4Addr::new(127, 9, 0, 1), Ipv4Addr::new(127, 9, 0, 2));
    assert_eq!(asks(&mut from(good_address), &vec![request("/open", None); 5]), [200; 5]);
    let all = asks(&mut from(bad_address), &vec![request("/open", None); QUOTA + 5]);
    assert_eq!(all.iter().filter(|status| **status == 200).count(), QUOTA);

    let mut socket = gateway.open("/ws", &honest);
    let mut idle = gateway.wire();
    assert_eq!(asks(&mut idle, &[request("/free", Some(&honest))]), [200]);
    let quiet = served(&mut idle, &honest, |round| round < 100);

    let memory = gateway.process().watch_memory();
    let began = Instant::now();
    let (subjects, addresses) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let over = AtomicBool::new(false);
    let (gateway, bundle, config) = (&gateway, &bundle, &config);
    let busy = thread::scope(|scope| {
        let legitimate = scope.spawn(|| {
            let took = served(&mut idle, &honest, |_| !over.load(Ordering::Relaxed));
            // An open socket goes on as well.
            socket.send(frame(0x81, b"still here"));
            assert_eq!(socket.message().expect("the echo").payload, b"still here");
            took
        });
        let floods: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut wire = gateway.wire();
                    loop {
                        let first = subjects.fetch_add(16, Ordering::Relaxed);
                        if first >= SUBJECTS {
                            return;
                        }
                        let tokens =
                            (first..first + 16).map(|number| bundle.issuer.token(&format!("flood-{number}")));
                        let requests: Vec<_> = tokens.map(|token| request("/mine", Some(&token))).collect();
                        assert_eq!(asks(&mut wire, &requests), [200; 16]);
                    }
                })
            })
            .chain((0..2).map(|_| {
                scope.spawn(|| {
                    loop {
                        let number = addresses.fetch_add(1, Ordering::Relaxed);
                        if number >= ADDRESSES {
                            return;
                        }
                        let source = Ipv4Addr::new(127, 1, (number >> 8) as u8, number as u8);
                        let status = asks(
                            &mut Wire::from(source, address, config, "localhost"),
                            &[request("/open", None)],
                        );
                        assert_eq!(status, [200]);
                    }
                })
            }))
            .collect();
        for flood in floods {
            flood.join().expect("the flood ends");
        }
        over.store(true, Ordering::Relaxed);
        legitimate.join().expect("whoever has a session is served")
    });
    let lasted = began.elapsed();
    let grown = memory.grown();
    let stated = RATE_TABLE + SESSION * SUBJECTS as u64 + ROOM;
    eprintln!(
        "{SUBJECTS} subjects and {ADDRESSES} addresses in {lasted:?}: {} KiB more memory, of {} KiB; a session's {} requests took \
         {:?} in the median and {:?} at the 99th percentile, before {:?} and {:?}",
        grown / 1024,
        stated / 1024,
        busy.len(),
        busy[busy.len() / 2],
        busy[busy.len() * 99 / 100],
        quiet[quiet.len() / 2],
        quiet[quiet.len() * 99 / 100],
    );
    assert!(grown < stated, "{grown} of {stated}");
    assert!(busy.len() > 20 && busy[busy.len() - 1] < Duration::from_secs(5), "{:?}", busy.last());

    // Who had a budget has the rest of it, and who had none has none.
    let reply = gateway.curl("/mine").http1().token(&honest).send();
    assert!(reply.header("ratelimit").is_some_and(|it| it.starts_with("\"per-subject\";r=14;")), "{reply:?}");
    let all = asks(&mut gateway.wire(), &vec![request("/mine", Some(&honest)); QUOTA]);
    assert_eq!(all.iter().filter(|status| **status == 200).count(), 14);
    assert_eq!(asks(&mut gateway.wire(), &[request("/mine", Some(&greedy))]), [429]);
    let all = asks(&mut from(good_address), &vec![request("/open", None); QUOTA]);
    assert_eq!(all.iter().filter(|status| **status == 200).count(), QUOTA - 5);
    assert_eq!(asks(&mut from(bad_address), &[request("/open", None)]), [429]);
    assert_eq!(gateway.metrics().sum("sealgate_rate_overflows_total", &[]), 0.0);
}

/// How long the requests of somebody took who has a session and nothing else to do; sorted.
fn served(wire: &mut Wire, token: &str, goes_on: impl Fn(usize) -> bool) -> Vec<Duration> {
    let request = [request("/free", Some(token))];
    let mut took = Vec::new();
    while goes_on(took.len()) {
        let began = Instant::now();
        assert_eq!(asks(wire, &request), [200]);
        took.push(began.elapsed());
        thread::sleep(Duration::from_millis(5));
    }
    took.sort();
    took
}
