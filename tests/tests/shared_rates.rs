//! Rates that gateways share through Redis: held over all of them, and no request waits for a Redis that is slow, stands still or is
//! gone beyond the deadline (row A-1).

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use sealgate_tests::{Bundle, DEADLINE, Gateway, Redis, Signal, Wire, frame, until};
use serde_json::{Value, json};

const RULES: &str = r#"
[[rate]]
name = "requests"
per = ["subject"]
quota = 300
period = "1d"
scope = "shared"

[[rate]]
name = "messages"
per = ["subject"]
quota = 1000
period = "1d"
scope = "shared"

[[rate]]
name = "few-allow"
per = ["subject"]
quota = 4
period = "1d"
scope = "shared"
on_error = "allow"

[[rate]]
name = "few-deny"
per = ["subject"]
quota = 4
period = "1d"
scope = "shared"
on_error = "deny"

[[rate]]
name = "few-local"
per = ["subject"]
quota = 4
period = "1d"
scope = "shared"
on_error = "local"

[[rate]]
name = "own"
per = ["subject"]
quota = 2
period = "1d"

[[rate]]
name = "renewed"
per = ["subject"]
quota = 20
period = "1s"
burst = 5
scope = "shared"

[[route]]
name = "api"
path = "/api"
methods = ["GET"]
upstream = "backend"
rates = ["requests"]

[[route]]
name = "allow"
path = "/allow"
methods = ["GET"]
upstream = "backend"
rates = ["few-allow"]

[[route]]
name = "deny"
path = "/deny"
methods = ["GET"]
upstream = "backend"
rates = ["few-deny"]

[[route]]
name = "local"
path = "/local"
methods = ["GET"]
upstream = "backend"
rates = ["few-local"]

[[route]]
name = "both"
path = "/both"
methods = ["GET"]
upstream = "backend"
rates = ["few-local", "own"]

[[route]]
name = "renewed"
path = "/renewed"
methods = ["GET"]
upstream = "backend"
rates = ["renewed"]

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
[[websocket.message]]
type = "say"
direction = "to-upstream"
rates = ["messages"]
on_refusal = "answer"
[[websocket.message]]
type = "few"
direction = "to-upstream"
rates = ["few-deny"]
on_refusal = "answer"
[[websocket.message]]
type = "free"
direction = "to-upstream"

[shared]
contact_timeout = "2s"
"#;

/// `shared.deadline`.
const PATIENCE: Duration = Duration::from_millis(300);

/// Where every answer has to come, however crowded the machine.
const PATIENT: Duration = Duration::from_secs(2);

/// What a crowded machine may add to it.
const ROOM: Duration = Duration::from_millis(1500);

fn bundle(redis: &Redis, deadline: Duration) -> Bundle {
    let deadline = deadline.as_millis();
    Bundle::new(&format!("{RULES}deadline = \"{deadline}ms\"\nredis = [\"{}\"]\n", redis.url()))
}

fn three(bundle: &Bundle) -> [Gateway; 3] {
    ["a", "b", "c"].map(|name| Gateway::run_beside(bundle, name, true, |_| {}))
}

/// One connection that asks again and again.
struct Asking {
    wire: Wire,
    token: String,
}

impl Asking {
    fn new(gateway: &Gateway, token: &str) -> Asking {
        Asking { wire: gateway.wire(), token: token.to_owned() }
    }

    fn ask(&mut self, path: &str) -> u16 {
        let token = &self.token;
        self.wire
            .send(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n"));
        self.wire.response().expect("an answer").status
    }

    fn asks(&mut self, path: &str, times: usize) -> Vec<u16> {
        (0..times).map(|_| self.ask(path)).collect()
    }
}

fn told(wire: &mut Wire) -> Value {
    let frame = wire.message().expect("a message");
    serde_json::from_slice(&frame.payload).unwrap_or_else(|error| panic!("{error}: {frame:?}"))
}

fn unanswered(gateway: &Gateway, rate: &str) -> f64 {
    gateway.metrics().sum("sealgate_rate_decisions_total", &[("rate", rate), ("outcome", "unanswered")])
}

fn until_trusted(gateway: &Gateway, token: &str) {
    // Counted over all gateways again: nothing goes unanswered.
    let mut asking = Asking::new(gateway, token);
    until("Redis is asked again", DEADLINE, || {
        let before = unanswered(gateway, "renewed");
        asking.ask("/renewed");
        (unanswered(gateway, "renewed") == before).then_some(())
    });
}

#[test]
fn a_shared_rate_of_requests_holds_exactly_over_three_gateways() {
    let redis = Redis::start();
    let bundle = bundle(&redis, PATIENT);
    let gateways = three(&bundle);
    let token = bundle.issuer.token("alice");
    let racers: Vec<_> = gateways
        .iter()
        .flat_map(|gateway| [gateway, gateway])
        .map(|gateway| {
            let mut asking = Asking::new(gateway, &token);
            thread::spawn(move || asking.asks("/api", 100))
        })
        .collect();
    let all: Vec<u16> = racers.into_iter().flat_map(|racer| racer.join().expect("a racer")).collect();
    let passed = all.iter().filter(|status| **status == 200).count();
    let refused = all.iter().filter(|status| **status == 429).count();
    // A day's worth: less than one comes back during the test.
    assert_eq!((passed, refused), (300, 300));

    // Another subject is not concerned; and what is left is told by whichever gateway.
    let other = bundle.issuer.token("bob");
    for (number, gateway) in gateways.iter().enumerate() {
        let reply = gateway.curl("/api").token(&other).send();
        let standing = format!("\"requests\";r={};", 299 - number);
        assert!(reply.header("ratelimit").is_some_and(|it| it.starts_with(&standing)), "{reply:?}");
    }
    // A gateway that has heard of a rate that is used up need not ask again. (Nothing but rates is read by GET.)
    let calls = || {
        let stats = redis.ask(&["INFO", "commandstats"]);
        let line = stats.lines().find(|line| line.starts_with("cmdstat_get:")).unwrap_or_default().to_owned();
        line.split(['=', ',']).nth(1).and_then(|calls| calls.parse::<u64>().ok()).expect("a count")
    };
    let before = calls();
    assert_eq!(Asking::new(&gateways[0], &token).asks("/api", 20), [429; 20]);
    assert_eq!(calls(), before);
    // What was refused here costs nothing there: both rates or none.
    let carol = bundle.issuer.token("carol");
    assert_eq!(Asking::new(&gateways[0], &carol).asks("/both", 4), [200, 200, 429, 429]);
    assert_eq!(Asking::new(&gateways[1], &carol).asks("/local", 4), [200, 200, 429, 429]);
}

#[test]
fn a_shared_rate_of_messages_holds_within_one_percent_over_three_gateways() {
    const QUOTA: usize = 1000;
    let redis = Redis::start();
    let bundle = bundle(&redis, PATIENT);
    let gateways = three(&bundle);
    let token = bundle.issuer.token("alice");
    let racers: Vec<_> = gateways
        .iter()
        .flat_map(|gateway| [gateway, gateway])
        .map(|gateway| {
            let mut wire = gateway.open("/ws", &token);
            thread::spawn(move || {
                for n in 0..300 {
                    wire.send(frame(0x81, json!({ "type": "say", "n": n }).to_string().as_bytes()));
                }
                (0..300).filter(|_| told(&mut wire)["type"] == "say").count()
            })
        })
        .collect();
    let passed: usize = racers.into_iter().map(|racer| racer.join().expect("a racer")).sum();
    eprintln!("{passed} of {QUOTA} passed");
    assert!((QUOTA..=QUOTA + QUOTA / 100).contains(&passed), "{passed}");
    // What was too much is owed: the rate is no less used up for those who come later.
    let mut late = gateways[0].open("/ws", &token);
    let mut all = passed;
    loop {
        late.send(frame(0x81, br#"{"type":"say"}"#));
        if told(&mut late)["reason"] == "rate-exceeded" {
            break;
        }
        all += 1;
        assert!(all <= QUOTA + QUOTA / 100, "{passed}, and {all} with those who came later");
    }
}

#[test]
fn a_redis_that_stands_still_costs_one_deadline_and_rules_say_what_goes_on() {
    let redis = Redis::start();
    let bundle = bundle(&redis, PATIENCE);
    let [a, b, _c] = three(&bundle);
    let token = bundle.issuer.token("alice");
    let (mut asking, mut beside) = (Asking::new(&a, &token), Asking::new(&a, &token));
    let mut socket = a.open("/ws", &token);
    assert_eq!([asking.ask("/allow"), asking.ask("/deny"), asking.ask("/local")], [200; 3]);

    redis.signal(Signal::STOP);
    // Whoever asks first finds out; those who come after it do not wait.
    let began = Instant::now();
    assert_eq!(beside.ask("/free"), 200);
    let first = asking.ask("/deny");
    assert!(began.elapsed() < PATIENCE + ROOM, "{:?}", began.elapsed());
    assert_eq!(first, 503);
    let began = Instant::now();
    assert_eq!(asking.asks("/allow", 6), [200; 6], "on_error is allow");
    assert_eq!(asking.asks("/deny", 6), [503; 6], "on_error is deny");
    // It had one before, and this gateway goes on counting from there.
    assert_eq!(asking.asks("/local", 5), [200, 200, 200, 429, 429], "on_error is local");
    assert!(began.elapsed() < PATIENCE * 2 + ROOM, "17 requests took {:?}", began.elapsed());
    assert!(unanswered(&a, "few-deny") >= 7.0);
    // A socket is no slower, and refuses only what its rule says.
    socket.send(frame(0x81, br#"{"type":"few"}"#));
    let refused = told(&mut socket);
    assert_eq!((&refused["reason"], &refused["retry_after"]), (&json!("limit-unavailable"), &json!(1)));
    socket.send(frame(0x81, br#"{"type":"free"}"#));
    assert_eq!(told(&mut socket)["type"], "free");
    let problem = a.curl("/deny").token(&token).send();
    assert_eq!(problem.problem(503), "urn:sealgate:problem:limit-unavailable");
    assert!(problem.header("retry-after").is_some());

    redis.signal(Signal::CONT);
    until_trusted(&a, &bundle.issuer.token("somebody"));
    until_trusted(&b, &bundle.issuer.token("anybody"));
    // One was taken, and Redis may have heard of the one that was not waited for; the others never came to it.
    assert_eq!(Asking::new(&b, &token).asks("/deny", 2), [200; 2]);
    assert_eq!(asking.asks("/deny", 2)[1], 429);
}

#[test]
fn a_redis_that_is_killed_comes_back_empty_and_one_that_is_slow_is_not_waited_for() {
    let mut redis = Redis::start();
    let bundle = bundle(&redis, PATIENCE);
    let [a, b, _c] = three(&bundle);
    let token = bundle.issuer.token("alice");
    let mut asking = Asking::new(&a, &token);
    assert_eq!(asking.asks("/local", 4), [200; 4]);
    redis.end();
    let began = Instant::now();
    assert_eq!(asking.asks("/local", 3), [429; 3], "what is used up stays used up");
    assert_eq!(asking.asks("/allow", 6), [200; 6]);
    assert_eq!(asking.ask("/deny"), 503);
    assert!(began.elapsed() < PATIENCE + ROOM, "{:?}", began.elapsed());
    redis.run();
    until_trusted(&a, &bundle.issuer.token("somebody"));
    until_trusted(&b, &bundle.issuer.token("anybody"));
    // It has lost what it knew, and this gateway has not.
    assert_eq!(asking.ask("/local"), 429);
    assert_eq!(Asking::new(&b, &token).asks("/local", 5), [200, 200, 200, 200, 429]);

    // Slower than the deadline: at most one of these requests waits for it.
    assert_eq!(redis.ask(&["CLIENT", "PAUSE", "3000", "ALL"]).trim(), "OK");
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    for _ in 0..10 {
        let one = Instant::now();
        assert_eq!(asking.ask("/allow"), 200);
        slowest = slowest.max(one.elapsed());
    }
    assert!(
        slowest < PATIENCE + ROOM && began.elapsed() < PATIENCE + ROOM,
        "{slowest:?} {:?}",
        began.elapsed()
    );
    until_trusted(&a, &bundle.issuer.token("somebody"));
}

/// Stands before a Redis and hands its answers on later, each by as much; a clock's worth of what a far or busy one is like.
struct Delay {
    port: u16,
    millis: Arc<AtomicU64>,
}

impl Delay {
    fn before(redis: &Redis) -> Delay {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let millis = Arc::new(AtomicU64::new(0));
        let (target, delay) = (redis.port(), Arc::clone(&millis));
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else { continue };
                let (mut asks, mut asked) =
                    (client.try_clone().expect("a handle"), server.try_clone().expect("a handle"));
                thread::spawn(move || {
                    let _ = std::io::copy(&mut asks, &mut asked);
                    let _ = asked.shutdown(Shutdown::Both);
                });
                let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
                let (mut server, mut client) = (server, client);
                let delay = Arc::clone(&delay);
                thread::spawn(move || {
                    let mut buffer = [0; 64 * 1024];
                    while let Ok(count @ 1..) = server.read(&mut buffer) {
                        let due = Instant::now() + Duration::from_millis(delay.load(Ordering::Relaxed));
                        let _ = sender.send((due, buffer[..count].to_vec()));
                    }
                });
                thread::spawn(move || {
                    for (due, bytes) in receiver {
                        thread::sleep(due.saturating_duration_since(Instant::now()));
                        if client.write_all(&bytes).is_err() {
                            break;
                        }
                    }
                    let _ = client.shutdown(Shutdown::Both);
                });
            }
        });
        Delay { port, millis }
    }

    fn set(&self, delay: Duration) {
        self.millis.store(delay.as_millis() as u64, Ordering::Relaxed);
    }
}

/// How long each of these requests took; sorted.
fn timed(asking: &mut Asking, path: &str, times: usize, status: u16) -> Vec<Duration> {
    let mut took: Vec<_> = (0..times)
        .map(|_| {
            let began = Instant::now();
            assert_eq!(asking.ask(path), status, "{path}");
            began.elapsed()
        })
        .collect();
    took.sort();
    took
}

#[test]
fn a_redis_that_is_slow_is_waited_for_within_the_deadline_and_not_beyond() {
    let redis = Redis::start();
    let delay = Delay::before(&redis);
    let rules = format!(
        "{RULES}deadline = \"{}ms\"\nredis = [\"redis://127.0.0.1:{}\"]\n",
        PATIENCE.as_millis(),
        delay.port
    );
    // Contact is told by answers too, and these come late.
    let bundle = Bundle::new(&rules.replace("contact_timeout = \"2s\"", "contact_timeout = \"20s\""));
    let [a, b, _c] = three(&bundle);
    let [alice, bob] = ["alice", "bob"].map(|subject| bundle.issuer.token(subject));
    let (mut asking, mut beside) = (Asking::new(&a, &alice), Asking::new(&a, &alice));
    asking.ask("/free");

    // Slow, and within the deadline: the count is as exact as ever, and only those that ask wait.
    delay.set(PATIENCE / 6);
    let took = timed(&mut asking, "/deny", 4, 200);
    assert!(took[0] >= PATIENCE / 6, "{took:?}");
    assert_eq!(Asking::new(&b, &alice).ask("/deny"), 429);
    assert_eq!(unanswered(&a, "few-deny") + unanswered(&b, "few-deny"), 0.0);
    let free = timed(&mut beside, "/free", 50, 200);
    eprintln!("answers after {:?}: asked {took:?}; beside, the median is {:?}", PATIENCE / 6, free[25]);
    assert!(free[25] < PATIENCE / 6, "{free:?}");

    // Slower than the deadline, for each of what rules may say. One request waits for it, to find out.
    delay.set(PATIENCE * 4);
    let mut asking = Asking::new(&a, &bob);
    let began = Instant::now();
    let mut all = timed(&mut asking, "/deny", 30, 503);
    all.extend(timed(&mut asking, "/allow", 30, 200));
    all.extend(timed(&mut asking, "/local", 4, 200));
    all.extend(timed(&mut asking, "/local", 26, 429));
    let spent = began.elapsed();
    all.sort();
    let free = timed(&mut beside, "/free", 50, 200);
    eprintln!(
        "answers after {:?}: 90 requests took {spent:?}, the slowest {:?}, the median {:?}; beside {:?}",
        PATIENCE * 4,
        all[89],
        all[45],
        free[25]
    );
    assert!(all[89] < PATIENCE + ROOM, "{all:?}");
    // A probe now and then is no request's to wait for.
    let waited = all.iter().filter(|took| **took >= PATIENCE).count();
    assert!(waited <= 1 + (spent.as_millis() / (PATIENCE * 4).as_millis()) as usize, "{waited} of {all:?}");
    assert!(all[45] < PATIENCE / 3, "{all:?}");

    delay.set(Duration::ZERO);
    until_trusted(&a, &bundle.issuer.token("somebody"));
}
