//! What ACME servers are answered while they validate names: over plain HTTP (RFC 8555 §8.3) and over TLS (RFC 8737).

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustls::ServerConfig;

use crate::lock::lock;

/// Where challenges are asked for (RFC 8555 §8.3).
pub const CHALLENGE_PATH: &str = "/.well-known/acme-challenge/";

/// Challenges that are open at a time, at most. A certificate has as many as it has names.
const MAX_OPEN: usize = 512;

/// Open challenges. Shared by all cores; older than any snapshot.
#[derive(Default)]
pub struct Challenges {
    /// How many of `by_name` there are: the one thing that an ordinary handshake asks.
    over_tls: AtomicUsize,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    /// Key authorizations by their token.
    by_token: HashMap<String, String>,
    by_name: HashMap<String, Arc<ServerConfig>>,
}

/// An answer to one challenge.
pub enum Response {
    /// Over plain HTTP.
    Http {
        /// What is asked for.
        token: String,
        /// What is answered.
        key_authorization: String,
    },
    /// Over TLS.
    Tls {
        /// The name asked for, lower case.
        name: String,
        /// What shows that it is ours.
        config: Arc<ServerConfig>,
    },
}

impl Challenges {
    /// Answers a challenge for as long as the guard lives; `None` if too many are open.
    pub fn open(self: &Arc<Self>, response: Response) -> Option<OpenChallenge> {
        let mut open = lock(&self.open);
        if open.by_token.len() + open.by_name.len() >= MAX_OPEN {
            return None;
        }
        let key = match response {
            Response::Http { token, key_authorization } => {
                open.by_token.insert(token.clone(), key_authorization);
                Key::Token(token)
            }
            Response::Tls { name, config } => {
                open.by_name.insert(name.clone(), config);
                Key::Name(name)
            }
        };
        self.over_tls.store(open.by_name.len(), Ordering::Release);
        Some(OpenChallenge { challenges: self.clone(), key })
    }

    /// Whether a ClientHello may be that of an ACME server. Cheap.
    #[must_use]
    pub fn any_over_tls(&self) -> bool {
        self.over_tls.load(Ordering::Acquire) > 0
    }

    /// What validates `name` (lower case) over TLS.
    #[must_use]
    pub fn over_tls(&self, name: &str) -> Option<Arc<ServerConfig>> {
        lock(&self.open).by_name.get(name).cloned()
    }

    /// What is answered at `path` over plain HTTP.
    #[must_use]
    pub fn over_http(&self, path: &str) -> Option<String> {
        let token = path.strip_prefix(CHALLENGE_PATH)?;
        lock(&self.open).by_token.get(token).cloned()
    }
}

impl fmt::Debug for Challenges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Challenges(..)")
    }
}

enum Key {
    Token(String),
    Name(String),
}

/// One open challenge.
pub struct OpenChallenge {
    challenges: Arc<Challenges>,
    key: Key,
}

impl Drop for OpenChallenge {
    fn drop(&mut self) {
        let mut open = lock(&self.challenges.open);
        match &self.key {
            Key::Token(token) => drop(open.by_token.remove(token)),
            Key::Name(name) => drop(open.by_name.remove(name)),
        }
        self.challenges.over_tls.store(open.by_name.len(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn http(token: &str) -> Response {
        Response::Http { token: token.to_owned(), key_authorization: format!("{token}.thumb") }
    }

    fn tls(name: &str) -> Response {
        let provider = sealgate_keys::provider(&sealgate_keys::ProviderChoice::default());
        let config = sealgate_keys::validation_config(name, &[7; 32], provider).unwrap();
        Response::Tls { name: name.to_owned(), config }
    }

    #[test]
    fn a_challenge_is_answered_while_its_guard_lives() {
        let challenges = Arc::new(Challenges::default());
        assert!(!challenges.any_over_tls());
        let over_http = challenges.open(http("abc")).unwrap();
        assert!(!challenges.any_over_tls());
        let over_tls = challenges.open(tls("chat.example")).unwrap();
        assert!(challenges.any_over_tls());
        let asked = |path: &str| challenges.over_http(path);
        assert_eq!(asked("/.well-known/acme-challenge/abc").as_deref(), Some("abc.thumb"));
        for other in ["/.well-known/acme-challenge/", "/.well-known/acme-challenge/ABC", "/abc", "abc", ""] {
            assert_eq!(asked(other), None, "{other}");
        }
        assert!(challenges.over_tls("chat.example").is_some() && challenges.over_tls("other").is_none());
        drop(over_http);
        assert_eq!(asked("/.well-known/acme-challenge/abc"), None);
        drop(over_tls);
        assert!(!challenges.any_over_tls() && challenges.over_tls("chat.example").is_none());
    }

    #[test]
    fn no_more_are_open_than_there_is_room_for() {
        let challenges = Arc::new(Challenges::default());
        let mut open: Vec<_> =
            (0..MAX_OPEN).filter_map(|at| challenges.open(http(&at.to_string()))).collect();
        assert_eq!(open.len(), MAX_OPEN);
        assert!(challenges.open(http("more")).is_none());
        open.pop();
        assert!(challenges.open(http("more")).is_some());
    }
}
