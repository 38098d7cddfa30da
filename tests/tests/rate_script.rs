//! The script that takes from shared rates, in a real Redis, against a model that only adds up (row A-1): costs, bursts, several rates
//! together, a clock that jumps either way, and keys that expire.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use sealgate::shared::{AskKind, RateAsk, rate_command};
use sealgate_tests::{DEADLINE, Redis, until};

/// A connection that speaks RESP as far as this needs it.
struct Talk(BufReader<TcpStream>);

impl Talk {
    fn to(redis: &Redis) -> Talk {
        let socket = TcpStream::connect(("127.0.0.1", redis.port())).expect("Redis listens");
        socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        socket.set_nodelay(true).expect("no delay");
        Talk(BufReader::new(socket))
    }

    fn say(&mut self, bytes: &[u8]) -> Vec<i64> {
        self.0.get_mut().write_all(bytes).expect("Redis listens");
        let mut numbers = Vec::new();
        self.read(&mut numbers);
        numbers
    }

    fn read(&mut self, numbers: &mut Vec<i64>) {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("an answer");
        let (kind, rest) = line.trim_end().split_at(1);
        match kind {
            ":" => numbers.push(rest.parse().expect("a number")),
            "*" => (0..rest.parse().expect("a count")).for_each(|_: usize| self.read(numbers)),
            "$" => {
                let length: usize = rest.parse().expect("a length");
                let mut bytes = vec![0; length + 2];
                self.0.read_exact(&mut bytes).expect("as many bytes");
            }
            "+" => {}
            _ => panic!("Redis said {line}"),
        }
    }

    fn command(&mut self, words: &[&str]) -> Vec<i64> {
        let mut bytes = format!("*{}\r\n", words.len());
        for word in words {
            bytes += &format!("${}\r\n{word}\r\n", word.len());
        }
        self.say(bytes.as_bytes())
    }
}

/// What the model keeps of a key: what had to be replenished when it was last taken from, in microseconds.
#[derive(Clone, Copy)]
struct Debt {
    amount: f64,
    at: f64,
}

/// The rates of a test, by their keys.
#[derive(Default)]
struct Model(HashMap<String, Debt>);

impl Model {
    /// What Redis should say of one request's rates at `now`, and which keys it should have written.
    fn take(&mut self, asks: &[RateAsk], now: f64) -> (Vec<i64>, Vec<(String, f64)>) {
        let stands: Vec<(f64, f64)> = asks
            .iter()
            .map(|ask| {
                let known = self.0.get(&ask.key).map_or(0.0, |debt| debt.amount - (now - debt.at));
                // A clock that was set back makes nobody wait longer than two bursts.
                let debt = known.clamp(0.0, 2.0 * ask.reach);
                (debt, (debt + ask.interval * f64::from(ask.cost) - ask.reach).max(0.0))
            })
            .collect();
        let all =
            asks.iter().zip(&stands).all(|(ask, (_, wait))| ask.kind != AskKind::Enforced || *wait == 0.0);
        let (mut answers, mut written) = (Vec::new(), Vec::new());
        for (ask, &(mut debt, wait)) in asks.iter().zip(&stands) {
            if ask.kind == AskKind::Owed || (all && wait == 0.0) {
                debt += ask.interval * f64::from(ask.cost);
                self.0.insert(ask.key.clone(), Debt { amount: debt, at: now });
                written.push((ask.key.clone(), debt));
            }
            answers.extend([debt.ceil() as i64, wait.ceil() as i64]);
        }
        (answers, written)
    }
}

/// One rate in a request: which key, by which of two policies, at what cost, of which kind.
type Step = (Vec<Vec<(u8, bool, u32, u8)>>, i64);

fn asks(group: &[(u8, bool, u32, u8)], rates: [(f64, u32); 2]) -> Vec<RateAsk> {
    let mut asks: Vec<RateAsk> = Vec::new();
    for &(key, after_reload, cost, kind) in group {
        let key = format!("rate-{key}");
        // A rule names a rate once.
        if asks.iter().any(|ask| ask.key == key) {
            continue;
        }
        let (interval, burst) = rates[usize::from(after_reload)];
        let kind = [AskKind::Enforced, AskKind::Enforced, AskKind::Shadow, AskKind::Owed][usize::from(kind)];
        asks.push(RateAsk { key, interval, reach: interval * f64::from(burst), cost, kind });
    }
    asks
}

#[test]
fn a1_the_script_does_what_a_model_does_that_only_adds_up() {
    /// Instead of the server's: two keys that the test sets.
    const CLOCK: &str = "redis.call('MGET', 'clock:seconds', 'clock:micros')";
    static CASES: AtomicUsize = AtomicUsize::new(0);
    static REFUSED: AtomicUsize = AtomicUsize::new(0);
    static TAKEN: AtomicUsize = AtomicUsize::new(0);
    let redis = Redis::start();
    let talk = std::sync::Mutex::new(Talk::to(&redis));
    // Quarters of a microsecond are exact in doubles, and from ten seconds on no key expires while a case runs.
    let rate =
        (40_000_000u64..4_000_000_000, 1u32..6).prop_map(|(quarters, burst)| (quarters as f64 / 4.0, burst));
    let one = (0u8..3, any::<bool>(), 1u32..6, 0u8..4);
    let group = prop::collection::vec(one, 1..4);
    // In thousandths of the first rate's interval: mostly a little forwards, at times far, or backwards.
    let elapsed =
        prop_oneof![6 => 0i64..1500, 1 => 1500i64..20_000, 1 => -2000i64..0, 1 => -40_000i64..-2000];
    let steps = prop::collection::vec((prop::collection::vec(group, 1..4), elapsed), 1..40);
    let cases = (rate.clone(), rate, steps);
    let mut runner = TestRunner::new(Config { cases: 128, failure_persistence: None, ..Config::default() });
    let outcome = runner.run(&cases, |(first, second, steps): (_, _, Vec<Step>)| {
        let mut talk = talk.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let prefix = format!("case-{}", CASES.fetch_add(1, Ordering::Relaxed));
        let mut model = Model::default();
        let mut now = 1_900_000_000_000_000i64;
        for (groups, thousandths) in steps {
            now += (first.0 / 1000.0) as i64 * thousandths;
            let (seconds, micros) = ((now / 1_000_000).to_string(), (now % 1_000_000).to_string());
            talk.command(&["MSET", "clock:seconds", &seconds, "clock:micros", &micros]);
            let groups: Vec<_> = groups.iter().map(|group| asks(group, [first, second])).collect();
            let answers = talk.say(&rate_command(&prefix, &groups, Some(CLOCK)));
            let mut expected = Vec::new();
            let mut written = HashMap::new();
            for group in &groups {
                let (answers, keys) = model.take(group, now as f64);
                REFUSED.fetch_add(
                    answers.iter().skip(1).step_by(2).filter(|wait| **wait > 0).count(),
                    Ordering::Relaxed,
                );
                TAKEN.fetch_add(keys.len(), Ordering::Relaxed);
                expected.extend(answers);
                written.extend(keys);
            }
            prop_assert_eq!(answers, expected, "{:?} at {}", groups, now);
            // A key lives until it is wholly replenished: no shorter, or it would forgive, and no longer.
            for (key, debt) in written {
                let left = talk.command(&["PTTL", &format!("{{{prefix}}}:rate:{key}")])[0];
                let until = (debt / 1000.0).ceil() as i64 + 1;
                prop_assert!((until - 5_000..=until).contains(&left), "{} ms left, of {}", left, until);
            }
        }
        Ok(())
    });
    outcome.unwrap_or_else(|error| panic!("{error}"));
    let (taken, refused) = (TAKEN.load(Ordering::Relaxed), REFUSED.load(Ordering::Relaxed));
    eprintln!("{taken} taken, {refused} had to wait");
    assert!(taken > 1000 && refused > 1000, "{taken} taken, {refused} had to wait: a model of nothing");
}

fn ask(cost: u32) -> Vec<Vec<RateAsk>> {
    // Five at once, one each 40 ms.
    let (interval, reach) = (40_000.0, 200_000.0);
    vec![vec![RateAsk { key: "api".into(), interval, reach, cost, kind: AskKind::Enforced }]]
}

/// By Redis' own clock, as gateways ask.
#[test]
fn a1_a_key_expires_when_it_is_replenished_and_not_before() {
    let redis = Redis::start();
    let mut talk = Talk::to(&redis);
    let mut take = |cost| {
        let answer = talk.say(&rate_command("t", &ask(cost), None));
        (Duration::from_micros(answer[0] as u64), Duration::from_micros(answer[1] as u64))
    };
    let began = Instant::now();
    let (ahead, wait) = take(4);
    assert_eq!((ahead, wait), (Duration::from_millis(160), Duration::ZERO));
    assert_eq!(take(1).1, Duration::ZERO);
    // What is too much is told how long it has to wait; whoever waits as long gets it.
    let (_, wait) = take(2);
    assert!(wait > Duration::ZERO && wait <= Duration::from_millis(80), "{wait:?}");
    std::thread::sleep(wait + Duration::from_millis(1));
    assert_eq!(take(2).1, Duration::ZERO);
    // Dearer than the whole burst: never.
    assert!(take(6).1 > Duration::ZERO);
    let exists = || redis.ask(&["EXISTS", "{t}:rate:api"]).trim() == "1";
    until("the key is gone", DEADLINE, || (!exists()).then_some(()));
    // Seven were taken, of 40 ms each: before that it must be there.
    assert!(began.elapsed() >= Duration::from_millis(7 * 40), "forgiven after {:?}", began.elapsed());
    assert_eq!(take(5), (Duration::from_millis(200), Duration::ZERO));
    assert!(take(1).1 > Duration::ZERO);
}
