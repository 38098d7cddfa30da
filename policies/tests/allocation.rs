//! Judging a message in a tunnel that is not looked into takes no memory: it happens for every message.

#![expect(unsafe_code, reason = "`GlobalAlloc` is an unsafe trait; this one counts and passes on")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use http::header::SEC_WEBSOCKET_PROTOCOL;
use http::{HeaderMap, HeaderValue, Method};
use sealgate_policy::{
    Binding, Bundle, DecisionCache, Direction, Evidence, Identity, IdentityParts, Message, MessageKind,
    Policy, RequestFacts, settle, settle_message,
};

struct Counting;

thread_local! {
    static TAKEN: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: passes every call on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Fails only while a thread ends.
        let _ = TAKEN.try_with(|taken| taken.set(taken.get() + 1));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn taken(work: impl FnOnce()) -> usize {
    let before = TAKEN.get();
    work();
    TAKEN.get() - before
}

#[test]
fn a_blind_tunnel_takes_no_memory_per_message_and_a_literal_path_none_per_request() {
    let mut bundle = Bundle::shipped("enterprise").unwrap();
    bundle.files.extend(Bundle::shipped("development").unwrap().files);
    let policy = Policy::compile(&bundle, &[("state".to_owned(), "/state".to_owned())].into()).unwrap();
    let headers = HeaderMap::new();
    let mut facts = RequestFacts {
        certificate: None,
        peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
        host: "localhost",
        method: &Method::GET,
        path: "/v1/echo",
        query: None,
        headers: &headers,
        websocket: false,
        content_length: None,
        has_body: false,
        tls: sealgate_policy::TlsFacts::default(),
    };
    let roles = vec!["clerk".to_owned(), "user".to_owned()];
    let identity = Arc::new(Identity::new(IdentityParts { roles, ..IdentityParts::default() }));
    let decisions = DecisionCache::new(8);
    let room = || Evidence { rates: Ok(()), revoked: false, lost: None };

    let judge = |facts: &RequestFacts<'_>| {
        let demands = policy.match_request(facts).unwrap().judge(facts, Some(Arc::clone(&identity))).unwrap();
        let demands = demands.prove(Binding::default(), 1, &decisions).unwrap();
        settle(demands, room()).unwrap()
    };
    // Where the table of access is asked too, which knows roles.
    assert_eq!(taken(|| drop(judge(&facts))), 0);
    facts.path = "/v1/stream";
    facts.websocket = true;
    let stream = HeaderMap::from_iter([(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("im.v1.json"))]);
    facts.headers = &stream;
    assert_eq!(taken(|| drop(judge(&facts))), 0);
    facts.path = "/v1/echo";
    facts.headers = &headers;

    facts.websocket = true;
    let tunnel = judge(&facts).into_tunnel().unwrap();
    for direction in [Direction::ToUpstream, Direction::ToClient] {
        let message = Message { direction, kind: MessageKind::Text, payload: b"{\"type\":\"anything\"}" };
        let judged = || drop(settle_message(tunnel.judge_message(&message).unwrap(), room()).unwrap());
        assert_eq!(taken(judged), 0, "{direction:?}");
    }
}
