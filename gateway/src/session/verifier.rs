//! From a token to an identity, by the snapshot's issuers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sealgate_policy::{Denial, Identity, Issuer, JwksSource, TokenFault};

use super::cache::{Generation, TokenCache};
use super::jwks::{JwksError, KeyFetcher, KeySource};
use super::token::Unverified;

/// Why a token does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenFailure {
    /// The token is at fault: 401.
    Fault(TokenFault),
    /// No keys of its issuer could be had so far; the client is not to be logged out for that: 503.
    KeysUnavailable,
}

impl From<TokenFailure> for Denial {
    fn from(failure: TokenFailure) -> Self {
        match failure {
            TokenFailure::Fault(fault) => Denial::TokenInvalid(fault),
            TokenFailure::KeysUnavailable => Denial::TokenKeysUnavailable,
        }
    }
}

/// An issuer's key file that a snapshot cannot do without.
#[derive(Debug, thiserror::Error)]
#[error("issuer `{issuer}`: keys in {path}: {error}")]
pub struct KeySourceError {
    /// Name of the issuer in the policy.
    pub issuer: Arc<str>,
    /// The file.
    pub path: String,
    /// What is wrong with it.
    pub error: JwksError,
}

/// The issuers of one policy and their keys. Part of the snapshot; shared by all cores.
#[derive(Debug)]
pub struct Verifier {
    number: u64,
    max_token_bytes: usize,
    issuers: Box<[Trusted]>,
}

#[derive(Debug)]
struct Trusted {
    issuer: Issuer,
    keys: Arc<KeySource>,
}

impl Verifier {
    /// Prepares the issuers of a policy. Keys whose source is unchanged since `previous` are carried over.
    ///
    /// Files are read now. A URL's keys are waited for at most five seconds if they are new; an issuer that does not
    /// answer yet is no fault of the policy, its tokens get [`TokenFailure::KeysUnavailable`] until it does. Keys are
    /// kept up to date on the current tokio runtime, which must live as long as the verifier.
    ///
    /// # Errors
    /// Every key file that cannot be used.
    pub async fn build(
        issuers: &[Issuer],
        previous: Option<&Verifier>,
        fetcher: &Arc<KeyFetcher>,
    ) -> Result<Self, Vec<KeySourceError>> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        // All new sources start to read before the first is waited for.
        let trusted: Vec<Trusted> = issuers.iter().map(|issuer| Trusted::new(issuer, previous, fetcher)).collect();
        let mut errors = Vec::new();
        for Trusted { issuer, keys } in &trusted {
            match &issuer.jwks {
                JwksSource::Url(_) => keys.started().await,
                JwksSource::File(path) => {
                    if let Err(error) = keys.read(fetcher).await {
                        let path = path.display().to_string();
                        errors.push(KeySourceError { issuer: Arc::clone(&issuer.name), path, error });
                    }
                }
            }
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(Verifier {
            number: NUMBER.fetch_add(1, Ordering::Relaxed),
            max_token_bytes: issuers.iter().map(|issuer| issuer.max_token_bytes as usize).max().unwrap_or(0),
            issuers: trusted.into(),
        })
    }

    /// The identity that a token proves at `now` (unix seconds). Neither waits nor locks; a token that the cache
    /// knows costs one keyed hash.
    ///
    /// A token that names an unknown key has the keys read again in the background, at a bounded rate; see
    /// [`refreshed`](Self::refreshed).
    ///
    /// # Errors
    /// [`TokenFailure`]: answer as its `Denial` says.
    pub fn verify(&self, token: &str, now: u64, cache: &TokenCache) -> Result<Arc<Identity>, TokenFailure> {
        if token.len() > self.max_token_bytes {
            return Err(TokenFailure::Fault(TokenFault::TooLarge));
        }
        // Before the keys are read: if they change meanwhile, the entry is born stale.
        let generation = self.generation();
        let key = cache.key(token);
        if let Some(identity) = cache.find(key, generation, now) {
            return Ok(identity);
        }
        let (identity, until) = self.verify_anew(token, now)?;
        let identity = Arc::new(identity);
        cache.keep(key, generation, until, now, &identity);
        Ok(identity)
    }

    /// Waits until the token's issuer has been asked for its keys anew, at most `patience`, and says whether it was:
    /// then [`verify`](Self::verify) may be tried once more.
    ///
    /// For a token that failed with [`TokenFault::Key`] or [`TokenFailure::KeysUnavailable`], so that a client whose
    /// issuer has just changed keys is not turned away. Waits for nothing if the keys were read in the last five
    /// seconds, or if the issuer is not ours.
    pub async fn refreshed(&self, token: &str, patience: Duration) -> bool {
        if token.len() > self.max_token_bytes {
            return false;
        }
        let keys = Unverified::parse(token).ok().and_then(|token| Some(&self.trusted(token.issuer()?)?.keys));
        let Some(keys) = keys else { return false };
        keys.attempted(patience).await
    }

    /// For each issuer by its name in the policy: how long ago its keys were last read (nothing if never), and how
    /// often reading failed. For metrics.
    pub fn key_ages(&self, now: Instant) -> impl Iterator<Item = (&Arc<str>, Option<Duration>, u64)> {
        self.issuers.iter().map(move |it| (&it.issuer.name, it.keys.age(now), it.keys.failures()))
    }

    fn verify_anew(&self, token: &str, now: u64) -> Result<(Identity, u64), TokenFailure> {
        let fault = TokenFailure::Fault;
        let unverified = Unverified::parse(token).map_err(fault)?;
        let trusted = unverified.issuer().and_then(|name| self.trusted(name)).ok_or(fault(TokenFault::Issuer))?;
        if token.len() > trusted.issuer.max_token_bytes as usize {
            return Err(fault(TokenFault::TooLarge));
        }
        let Some(keys) = trusted.keys.keys() else {
            trusted.keys.want();
            return Err(TokenFailure::KeysUnavailable);
        };
        match unverified.verify(&trusted.issuer, &keys, now) {
            Ok(identity) => {
                let until = identity.expires_at.saturating_add(trusted.issuer.skew.as_secs());
                Ok((identity, until))
            }
            Err(TokenFault::Key) => {
                trusted.keys.want();
                Err(fault(TokenFault::Key))
            }
            Err(other) => Err(fault(other)),
        }
    }

    fn trusted(&self, issuer: &str) -> Option<&Trusted> {
        self.issuers.iter().find(|it| it.issuer.issuer == issuer)
    }

    /// Changes with the policy and with any issuer's keys, and never comes back.
    fn generation(&self) -> Generation {
        let keys = self.issuers.iter().map(|it| it.keys.generation()).sum();
        Generation { verifier: self.number, keys }
    }
}

impl Trusted {
    fn new(issuer: &Issuer, previous: Option<&Verifier>, fetcher: &Arc<KeyFetcher>) -> Self {
        let known = previous.and_then(|it| it.issuers.iter().find(|it| it.keys.is(&issuer.jwks, issuer.refresh)));
        let keys = known.map_or_else(
            || Arc::new(KeySource::start(issuer.jwks.clone(), issuer.refresh, Arc::clone(fetcher))),
            |known| Arc::clone(&known.keys),
        );
        Trusted { issuer: issuer.clone(), keys }
    }
}
