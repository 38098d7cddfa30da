//! The session clock of two gateways over a real Redis, by a clock of the test's own: held against a simple model.

use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use sealgate::session::{Look, SessionEnd, Sessions};
use sealgate::shared::{Began, Beginning, Board, Change, Cursor, Servers, Settled};
use sealgate_policy::{
    AtLimit, Bundle, Identity, IdentityParts, Policy, SessionId, SessionLimit, SessionPolicy,
};
use sealgate_tests::Redis;

const IDLE: u64 = 100;
const START: u64 = 1_000_000;
const TOLD: &str = "{sealgate}:sessions:told";
const PATIENCE: Duration = Duration::from_secs(10);

fn rules() -> SessionPolicy {
    SessionPolicy {
        idle: Duration::from_secs(IDLE),
        lifetime: Duration::from_secs(100_000),
        skew: Duration::ZERO,
        max_sessions: 1_000,
        limits: Vec::new(),
    }
}

fn identity(case: u64, session: usize, issued_at: u64) -> Identity {
    Identity::new(IdentityParts {
        issuer: "https://id.example".into(),
        subject: format!("alice-{case}"),
        session: Some(format!("{case}-{session}")),
        auth_time: Some(START),
        issued_at: Some(issued_at),
        ..IdentityParts::default()
    })
}

fn beginning<'a>(who: &Identity, now: u64, limit: Option<&'a SessionLimit>) -> Beginning<'a> {
    Beginning {
        id: who.session_id,
        subject: SessionId::of_subject(&who.issuer, &who.subject),
        start: Sessions::start_of(who, &rules(), now),
        idle: IDLE,
        lifetime: 100_000,
        now,
        counts: limit.is_some(),
        limit,
    }
}

async fn board(redis: &Redis) -> Board {
    let text = format!("version = 1\n[shared]\nredis = [\"{}\"]\n", redis.url());
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::write(folder.path().join("policy.toml"), text).expect("a policy");
    let bundle = Bundle::read(Path::new(folder.path())).expect("a bundle");
    let policy = Policy::compile(&bundle, &std::collections::BTreeMap::new()).expect("it compiles");
    let servers = Servers::read(policy.shared().expect("[shared]"), |_| Err("no secret".to_owned()));
    Board::connect(&servers.expect("servers")).await.expect("Redis")
}

/// As if gateways had told what they saw without a break, and went on so: the dates of these tests are not Redis' time.
fn told(redis: &Redis) {
    redis.ask(&["HSET", TOLD, "told", "9999999999999"]);
}

/// Whether a request is let in by one of the gateways, which asks the other's Redis where it has to.
async fn enter(sessions: &Sessions, board: &Board, who: &Identity, now: u64, active: bool) -> bool {
    let session = match sessions.look(who, IDLE, now) {
        Look::Live(session) => session,
        Look::Ended(_) => return false,
        Look::SeemsIdle(session) => {
            let asked = [(session.id(), session.active_at())].into_iter();
            match board.settle(asked, IDLE, now, PATIENCE).await.expect("an answer")[..] {
                [Settled::Active(at)] => session.saw(at),
                [Settled::Ended(end)] => {
                    sessions.end(&session, end);
                    return false;
                }
                _ => panic!("one was asked about"),
            }
            session
        }
        Look::Unknown => match board.begin(&beginning(who, now, None), PATIENCE).await.expect("an answer") {
            Began::Live { active, replaced } => {
                assert!(replaced.is_empty());
                sessions.begin(who, &rules(), IDLE, active, None, now).expect("room").session
            }
            Began::Ended(_) | Began::Old => return false,
            Began::Full | Began::Unsure => panic!("there is no limit, and nobody was silent"),
        },
    };
    if active {
        session.touch(now);
        let change = Change { id: session.id(), active: session.active_at(), ended: None, counts: None };
        board.tell(&[change], 100_000, PATIENCE).await.expect("an answer");
    }
    true
}

#[test]
fn two_gateways_agree_with_a_simple_model() {
    let redis = Redis::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let board = runtime.block_on(board(&redis));
    told(&redis);
    let cases = std::cell::Cell::new(0);
    let steps = prop::collection::vec((0u8..7, 0usize..2, 0usize..3, 0u64..60), 0..80);
    TestRunner::new(Config { cases: 100, failure_persistence: None, ..Config::default() })
        .run(&steps, |steps| {
            cases.set(cases.get() + 1);
            runtime.block_on(async {
                let mut gateways = [Sessions::new(), Sessions::new()];
                let mut model: [Option<(u64, bool)>; 3] = [None; 3];
                let (mut issued, mut now) = ([START; 3], START);
                for (action, gateway, which, time) in steps {
                    match action {
                        0 => now += time,
                        1 => issued[which] = now,
                        // It restarts, and knows nothing any more.
                        2 => gateways[gateway] = Sessions::new(),
                        3 => {
                            let due = gateways[gateway].due(IDLE, now);
                            let asked = due.iter().map(|it| (it.id(), it.active_at()));
                            let settled = board.settle(asked, IDLE, now, PATIENCE).await.expect("answers");
                            for (session, settled) in due.iter().zip(settled) {
                                match settled {
                                    Settled::Ended(end) => drop(gateways[gateway].end(session, end)),
                                    Settled::Unsure => panic!("nobody was silent"),
                                    Settled::Active(at) => {
                                        session.saw(at);
                                        gateways[gateway].look_again(session.clone(), at + IDLE);
                                    }
                                }
                            }
                        }
                        _ => {
                            let (last, ended) = model[which].unwrap_or((issued[which], false));
                            let expected = !ended && now < last + IDLE;
                            let active = action > 4;
                            let who = identity(cases.get(), which, issued[which]);
                            let entered = enter(&gateways[gateway], &board, &who, now, active).await;
                            prop_assert_eq!(entered, expected, "session {} at {}", which, now);
                            if expected || model[which].is_some() {
                                model[which] = Some((if expected && active { now } else { last }, !expected));
                            }
                        }
                    }
                }
                Ok(())
            })
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn limits_hold_over_gateways_and_ends_are_read_by_all() {
    let redis = Redis::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let board = board(&redis).await;
        told(&redis);
        let limit = |at_limit| SessionLimit { role: None, max: 2, at_limit };
        let (replaces, rejects) = (limit(AtLimit::ReplaceOldest), limit(AtLimit::Reject));
        let begin = async |session: usize, now: u64, limit: &SessionLimit| {
            let who = identity(1, session, now);
            board.begin(&beginning(&who, now, Some(limit)), PATIENCE).await.expect("an answer")
        };
        let id = |session| identity(1, session, 0).session_id;
        let live = |active: u64, replaced: &[usize]| Began::Live {
            active,
            replaced: replaced.iter().map(|session| id(*session)).collect(),
        };
        assert_eq!(begin(1, START, &rejects).await, live(START, &[]));
        assert_eq!(begin(2, START, &rejects).await, live(START, &[]));
        assert_eq!(begin(3, START, &rejects).await, Began::Full);
        assert_eq!(begin(1, START + 1, &rejects).await, live(START, &[]), "it is one of them");
        assert_eq!(begin(3, START + 50, &replaces).await, live(START + 50, &[1]));
        assert_eq!(begin(1, START + 50, &replaces).await, Began::Ended(SessionEnd::Replaced));
        // The second is idle by now, and makes room by itself.
        assert_eq!(begin(4, START + IDLE, &rejects).await, live(START + IDLE, &[]));
        let asked = [(id(2), START)].into_iter();
        let settled = board.settle(asked, IDLE, START + IDLE, PATIENCE).await.expect("an answer");
        assert_eq!(settled, [Settled::Ended(SessionEnd::Idle)]);
        assert_eq!(begin(2, START + IDLE, &rejects).await, Began::Ended(SessionEnd::Idle));
        let mut cursor = Cursor::default();
        let (ended, more) = board.ended(&mut cursor, 0, PATIENCE).await.expect("an answer");
        assert_eq!((ended, more), (vec![(id(2), SessionEnd::Idle), (id(1), SessionEnd::Replaced)], false));
        // What one gateway let in while Redis was gone counts, once it is told.
        let subject = SessionId::of_subject("https://id.example", "alice-1");
        let offline =
            Change { id: id(9), active: START + 120, ended: None, counts: Some((subject, START + 120)) };
        let ended = Change { id: id(8), active: 0, ended: Some(SessionEnd::Replaced), counts: None };
        let told = board.tell(&[offline, ended], 100_000, PATIENCE).await.expect("an answer");
        assert_eq!(told, [Settled::Active(START + 120), Settled::Ended(SessionEnd::Replaced)]);
        assert_eq!(begin(5, START + 120, &rejects).await, Began::Full);
        assert_eq!(begin(8, START + 120, &rejects).await, Began::Ended(SessionEnd::Replaced));
    });
}

#[test]
fn nobody_is_idle_for_a_redis_that_was_not_told() {
    let redis = Redis::start();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let board = board(&redis).await;
        let who = identity(1, 1, START);
        let begin = async |now| board.begin(&beginning(&who, now, None), PATIENCE).await.expect("an answer");
        let settle = async |now| {
            let asked = [(who.session_id, START)].into_iter();
            board.settle(asked, IDLE, now, PATIENCE).await.expect("an answer")
        };
        let live = Began::Live { active: START, replaced: Vec::new() };
        assert_eq!(begin(START).await, live, "it begins all the same");
        // Redis stood still for long: these are the questions that waited in it.
        redis.ask(&["HSET", TOLD, "told", "1"]);
        assert_eq!(begin(START + IDLE).await, Began::Unsure);
        assert_eq!(settle(START + IDLE).await, [Settled::Unsure]);
        assert_eq!(settle(START + IDLE - 1).await, [Settled::Active(START)]);
        // One gateway has told all that it saw. Others may need longer.
        board.ended(&mut Cursor::default(), 0, PATIENCE).await.expect("an answer");
        told(&redis);
        assert_eq!(settle(START + IDLE).await, [Settled::Unsure]);
        let until = redis.ask(&["HGET", TOLD, "unsure"]);
        assert!(until.trim().parse::<u64>().is_ok_and(|until| until > 1_700_000_000_000), "{until}");
        redis.ask(&["HSET", TOLD, "unsure", "1"]);
        assert_eq!(settle(START + IDLE).await, [Settled::Ended(SessionEnd::Idle)]);
        assert_eq!(begin(START + IDLE).await, Began::Ended(SessionEnd::Idle));
    });
}
