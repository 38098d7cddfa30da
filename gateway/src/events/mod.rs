//! Sources of revocations that the gateway follows over HTTP: `[[revocation_source]]`.
//!
//! The protocol stands in ARCHITECTURE.md ("A source of revocations"), exactly enough to write the sending side by. An event that is
//! missing, a log of another name or a shorter one lead to the snapshot. Nothing is ever taken back by one: what was revoked stays so
//! until its time is over. Contact is when everything up to the source's last event is known here, and nothing less.

mod follow;
mod line;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http::HeaderValue;
use ring::digest::{Context, SHA256};
use sealgate_policy::{OnLoss, Policy, RevocationSource, Source};
use zeroize::Zeroizing;

pub use self::follow::follow;
pub use self::line::{LinesRead, read_lines};
use crate::lock::lock;

/// Longest bearer token.
const MAX_TOKEN_BYTES: usize = 4096;

/// A source as a snapshot has it. Prints no secret.
pub struct EventSource {
    /// What the policy says of it.
    pub policy: RevocationSource,
    /// Under which name the journal keeps the place in its log. Another one for other issuers: what it revoked for those that it was not
    /// trusted with stands in the snapshot alone.
    place: Arc<str>,
    token: Option<Zeroizing<Vec<u8>>>,
}

impl EventSource {
    /// Reads its token.
    ///
    /// # Errors
    /// What is wrong with it, without the token.
    pub fn read(
        policy: &RevocationSource,
        read: impl FnOnce(&Source) -> Result<Zeroizing<Vec<u8>>, String>,
    ) -> Result<Self, String> {
        let fault = |reason| format!("revocation_source.{}.token: {reason}", policy.name);
        let token = policy.token.as_ref().map(read).transpose().map_err(fault)?;
        let token = token.map(|token| Zeroizing::new(token.trim_ascii().to_vec()));
        if token.as_ref().is_some_and(|token| !is_bearer_token(token)) {
            return Err(fault(format!(
                "expected one bearer token (RFC 6750 §2.1), 1 to {MAX_TOKEN_BYTES} characters"
            )));
        }
        Ok(Self { place: place(&policy.name, &policy.issuers), policy: policy.clone(), token })
    }

    /// How it is asked.
    fn authorization(&self) -> Option<HeaderValue> {
        let value = Zeroizing::new([&b"Bearer "[..], self.token.as_ref()?].concat());
        let mut value = HeaderValue::from_bytes(&value).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

fn is_bearer_token(token: &[u8]) -> bool {
    let body = token.iter().rposition(|byte| *byte != b'=').map_or(0, |last| last + 1);
    let fits = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._~+/".contains(byte);
    body > 0 && token.len() <= MAX_TOKEN_BYTES && token.iter().take(body).all(fits)
}

fn place(name: &str, issuers: &[String]) -> Arc<str> {
    let mut issuers: Vec<&str> = issuers.iter().map(String::as_str).collect();
    issuers.sort_unstable();
    let mut digest = Context::new(&SHA256);
    for issuer in issuers {
        digest.update(issuer.as_bytes());
        digest.update(b"\0");
    }
    let digest = digest.finish();
    let digits: String = digest.as_ref().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    format!("{name}/{digits}").into()
}

impl fmt::Debug for EventSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventSource").field("policy", &self.policy).finish_non_exhaustive()
    }
}

/// How it stands with the sources. Older than any snapshot.
pub struct Sources {
    /// 0, or one more than the strictest of what is wanted of those without contact.
    level: AtomicU8,
    states: Mutex<HashMap<Arc<str>, State>>,
}

struct State {
    on_loss: OnLoss,
    heard: Instant,
    lost: bool,
}

const LEVELS: [OnLoss; 3] = [OnLoss::Warn, OnLoss::NoNewPrivileged, OnLoss::FailClosed];

impl Sources {
    /// Of a process whose first policy is this: none of its sources was heard yet, and that counts as lost contact.
    #[must_use]
    pub fn new(policy: &Policy) -> Self {
        let sources = Self { level: AtomicU8::new(0), states: Mutex::default() };
        for source in policy.revocation_sources() {
            sources.begin(&source.name, source.on_loss, true, Instant::now());
        }
        sources
    }

    /// What is wanted while a source cannot be heard; nothing while all are.
    pub fn lost(&self) -> Option<OnLoss> {
        LEVELS.get(usize::from(self.level.load(Ordering::Acquire)).checked_sub(1)?).copied()
    }

    /// A source is followed from now on. One that is known already stays as it is.
    fn begin(&self, name: &Arc<str>, on_loss: OnLoss, lost: bool, now: Instant) {
        self.change(|states| {
            let fresh = State { on_loss, heard: now, lost };
            states.entry(name.clone()).or_insert(fresh).on_loss = on_loss;
        });
    }

    /// Only these are followed.
    fn retain(&self, wanted: impl Fn(&str) -> bool) {
        self.change(|states| states.retain(|name, _| wanted(name)));
    }

    /// It was heard, and everything is known; says whether contact had been lost.
    fn hear(&self, name: &str, now: Instant) -> bool {
        self.change(|states| {
            let Some(state) = states.get_mut(name) else { return false };
            state.heard = now;
            std::mem::replace(&mut state.lost, false)
        })
    }

    /// Whether it was not heard for `patience`, and was so before this call.
    fn silent(&self, name: &str, patience: Duration, now: Instant) -> (bool, bool) {
        self.change(|states| {
            let Some(state) = states.get_mut(name) else { return (false, false) };
            let before = state.lost;
            state.lost |= now.saturating_duration_since(state.heard) > patience;
            (state.lost, before)
        })
    }

    fn change<T>(&self, change: impl FnOnce(&mut HashMap<Arc<str>, State>) -> T) -> T {
        let mut states = lock(&self.states);
        let outcome = change(&mut states);
        let strictest = states.values().filter(|state| state.lost).map(|state| state.on_loss).max();
        let level = strictest.and_then(|on_loss| LEVELS.iter().position(|level| *level == on_loss));
        self.level.store(level.map_or(0, |level| level as u8 + 1), Ordering::Release);
        outcome
    }
}

impl fmt::Debug for Sources {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sources").field("lost", &self.lost()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(token: Option<&str>, issuers: &[&str]) -> Result<EventSource, String> {
        let policy = RevocationSource {
            name: "accounts".into(),
            upstream: "accounts".into(),
            path: "/r".to_owned(),
            issuers: issuers.iter().map(|issuer| (*issuer).to_owned()).collect(),
            token: token.map(|_| Source::Env("TOKEN".into())),
            contact_timeout: Duration::from_secs(4),
            on_loss: OnLoss::Warn,
        };
        EventSource::read(&policy, |_| Ok(Zeroizing::new(token.unwrap_or_default().as_bytes().to_vec())))
    }

    #[test]
    fn tokens_are_checked_and_never_printed() {
        let good = source(Some("s3cret.TOKEN-~+/_==\n"), &[]).unwrap();
        assert_eq!(good.authorization().unwrap(), "Bearer s3cret.TOKEN-~+/_==");
        let printed = format!("{good:?} {:?}", good.authorization());
        assert!(!printed.contains("s3cret"), "{printed}");
        assert!(source(None, &[]).unwrap().authorization().is_none());
        let longest = "a".repeat(MAX_TOKEN_BYTES);
        assert!(source(Some(&longest), &[]).is_ok());
        for bad in ["", "\n", "==", "two words", "s3cret\nsecond", "ümlaut", "a=b", &format!("{longest}a")] {
            let error = source(Some(bad), &[]).unwrap_err();
            assert!(error.starts_with("revocation_source.accounts.token: expected one bearer"), "{error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn who_is_trusted_with_another_issuer_is_read_from_its_snapshot() {
        let place = |issuers: &[&str]| source(None, issuers).unwrap().place;
        assert_eq!(place(&["a", "b"]), place(&["b", "a"]));
        assert!(place(&["a"]).starts_with("accounts/"));
        assert_ne!(place(&["a"]), place(&["a", "b"]));
        assert_ne!(place(&["a", "b"]), place(&["ab"]));
    }

    #[test]
    fn the_strictest_of_those_that_are_lost_decides() {
        let sources = Sources { level: AtomicU8::new(0), states: Mutex::default() };
        let (begin, patience) = (Instant::now(), Duration::from_secs(4));
        let at = |seconds| begin + Duration::from_secs(seconds);
        let (first, second) = (Arc::from("first"), Arc::from("second"));
        assert_eq!(sources.lost(), None);
        sources.begin(&first, OnLoss::FailClosed, true, begin);
        assert_eq!(sources.lost(), Some(OnLoss::FailClosed), "not heard yet");
        assert!(sources.hear("first", at(1)) && !sources.hear("first", at(1)));
        assert_eq!(sources.lost(), None);
        // One that is new has as long as one that fell silent.
        sources.begin(&second, OnLoss::NoNewPrivileged, false, at(1));
        assert_eq!(sources.silent("second", patience, at(5)), (false, false));
        assert_eq!(sources.silent("second", patience, at(6)), (true, false));
        assert_eq!(sources.silent("second", patience, at(6)), (true, true));
        assert_eq!(sources.lost(), Some(OnLoss::NoNewPrivileged));
        assert_eq!(sources.silent("first", patience, at(6)), (true, false));
        assert_eq!(sources.lost(), Some(OnLoss::FailClosed));
        // Another policy is milder.
        sources.begin(&first, OnLoss::Warn, false, at(6));
        assert_eq!(sources.lost(), Some(OnLoss::NoNewPrivileged), "and forgives nobody");
        sources.retain(|name| name == "first");
        assert_eq!(sources.lost(), Some(OnLoss::Warn));
        assert!(sources.hear("first", at(9)) && !sources.hear("second", at(9)));
        assert_eq!((sources.lost(), sources.silent("second", patience, at(99))), (None, (false, false)));
    }
}
