//! From a token to an identity, by the snapshot's issuers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sealgate_policy::{Denial, Identity, Issuer, JwksSource, LogoutFault, LogoutRule, TokenFault};

use super::cache::{Generation, TokenCache};
use super::jwks::{JwksError, KeyFetcher, KeySource};
use super::logout::{self, LogoutToken};
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

/// Why a logout token does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogoutFailure {
    /// The token is at fault.
    Fault(LogoutFault),
    /// No keys of its issuer could be had so far.
    KeysUnavailable,
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
        let trusted: Vec<Trusted> =
            issuers.iter().map(|issuer| Trusted::new(issuer, previous, fetcher)).collect();
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

    /// What a logout token that came by `rule` proves at `now` (unix seconds); as [`verify`](Self::verify), but that nothing
    /// is remembered.
    ///
    /// # Errors
    /// [`LogoutFailure`].
    pub fn verify_logout(
        &self,
        token: &str,
        rule: &LogoutRule,
        now: u64,
    ) -> Result<LogoutToken, LogoutFailure> {
        let fault = |fault| LogoutFailure::Fault(LogoutFault::Token(fault));
        let trusted = self.issuers.iter().find(|it| it.issuer.name == rule.issuer);
        let trusted = trusted.ok_or(fault(TokenFault::Issuer))?;
        if token.len() > trusted.issuer.max_token_bytes as usize {
            return Err(fault(TokenFault::TooLarge));
        }
        let unverified = Unverified::parse(token).map_err(fault)?;
        let Some(keys) = trusted.keys.keys() else {
            trusted.keys.want();
            return Err(LogoutFailure::KeysUnavailable);
        };
        logout::verify(unverified, &trusted.issuer, rule, &keys, now).map_err(|outcome| {
            if outcome == LogoutFault::Token(TokenFault::Key) {
                trusted.keys.want();
            }
            LogoutFailure::Fault(outcome)
        })
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
        let trusted =
            unverified.issuer().and_then(|name| self.trusted(name)).ok_or(fault(TokenFault::Issuer))?;
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
        let known =
            previous.and_then(|it| it.issuers.iter().find(|it| it.keys.is(&issuer.jwks, issuer.refresh)));
        let keys = known.map_or_else(
            || Arc::new(KeySource::start(issuer.jwks.clone(), issuer.refresh, Arc::clone(fetcher))),
            |known| Arc::clone(&known.keys),
        );
        Trusted { issuer: issuer.clone(), keys }
    }
}

#[cfg(test)]
mod tests {
    use super::super::minting::{ISSUER, Mint, NOW, claims, issuer, jwks, with};
    use super::*;
    use std::path::{Path, PathBuf};
    use tempfile::TempDir;
    use tokio::time;

    const KEY_UNKNOWN: TokenFailure = TokenFailure::Fault(TokenFault::Key);

    struct Setting {
        _dir: TempDir,
        file: PathBuf,
        fetcher: Arc<KeyFetcher>,
        cache: TokenCache,
    }

    impl Setting {
        fn new(keys: &[&Mint]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("jwks.json");
            std::fs::write(&file, jwks(keys)).unwrap();
            Setting { _dir: dir, file, fetcher: KeyFetcher::system(), cache: TokenCache::new(64).unwrap() }
        }

        fn issuer(&self) -> Issuer {
            issuer(&self.file)
        }

        async fn verifier(&self) -> Verifier {
            self.build(&[self.issuer()], None).await.unwrap()
        }

        async fn build(
            &self,
            issuers: &[Issuer],
            previous: Option<&Verifier>,
        ) -> Result<Verifier, Vec<KeySourceError>> {
            Verifier::build(issuers, previous, &self.fetcher).await
        }

        fn subject(&self, verifier: &Verifier, token: &str) -> Result<String, TokenFailure> {
            verifier.verify(token, NOW, &self.cache).map(|identity| identity.subject.clone())
        }

        fn replace(&self, keys: &[&Mint]) {
            std::fs::write(&self.file, jwks(keys)).unwrap();
        }
    }

    fn alice() -> Result<String, TokenFailure> {
        Ok("alice".to_owned())
    }

    #[tokio::test]
    async fn verifies_and_remembers_until_the_token_expires() {
        let mint = Mint::es256("k1");
        let setting = Setting::new(&[&mint]);
        let verifier = setting.verifier().await;
        let token = mint.token(&claims());
        let first = verifier.verify(&token, NOW, &setting.cache).unwrap();
        let second = verifier.verify(&token, NOW + 299, &setting.cache).unwrap();
        assert!(Arc::ptr_eq(&first, &second), "the second comes from the cache");
        let expired = TokenFailure::Fault(TokenFault::Expired);
        assert_eq!(verifier.verify(&token, NOW + 300, &setting.cache).unwrap_err(), expired);
    }

    #[tokio::test]
    async fn a_refused_token_is_not_remembered() {
        let mint = Mint::es256("k1");
        let setting = Setting::new(&[&mint]);
        let verifier = setting.verifier().await;
        let early = mint.token(&with("nbf", Some((NOW + 10).into())));
        assert_eq!(setting.subject(&verifier, &early), Err(TokenFailure::Fault(TokenFault::NotYetValid)));
        assert!(verifier.verify(&early, NOW + 10, &setting.cache).is_ok());
    }

    #[tokio::test]
    async fn issuers_are_judged_by_their_own_rules_and_keys() {
        let (one, two) = (Mint::es256("k"), Mint::eddsa("k"));
        let setting = Setting::new(&[&one]);
        let other_file = setting.file.with_extension("other");
        std::fs::write(&other_file, jwks(&[&two])).unwrap();
        let other = Issuer {
            name: "other".into(),
            issuer: "https://other.example".to_owned(),
            algorithms: vec![sealgate_policy::Algorithm::EdDSA],
            max_token_bytes: 700,
            ..issuer(&other_file)
        };
        let verifier = setting.build(&[setting.issuer(), other], None).await.unwrap();
        let of_other = |mint: &Mint| mint.token(&with("iss", Some("https://other.example".into())));
        assert_eq!(setting.subject(&verifier, &one.token(&claims())), alice());
        assert_eq!(setting.subject(&verifier, &of_other(&two)), alice());
        let fault = |fault| Err(TokenFailure::Fault(fault));
        assert_eq!(setting.subject(&verifier, &of_other(&one)), fault(TokenFault::Algorithm));
        assert_eq!(setting.subject(&verifier, &two.token(&claims())), fault(TokenFault::Algorithm));
        let stranger = one.token(&with("iss", Some("https://evil.example".into())));
        assert_eq!(setting.subject(&verifier, &stranger), fault(TokenFault::Issuer));

        let mut long = with("iss", Some("https://other.example".into()));
        long["x"] = "x".repeat(700).into();
        assert_eq!(setting.subject(&verifier, &two.token(&long)), fault(TokenFault::TooLarge));
        long["iss"] = ISSUER.into();
        assert_eq!(setting.subject(&verifier, &one.token(&long)), alice());
        assert_eq!(setting.subject(&verifier, &"a".repeat(8193)), fault(TokenFault::TooLarge));
        assert_eq!(setting.subject(&verifier, "a.b.c"), fault(TokenFault::Malformed));
    }

    #[tokio::test]
    async fn another_policy_asks_anew() {
        let mint = Mint::es256("k1");
        let setting = Setting::new(&[&mint]);
        let before = setting.verifier().await;
        let token = mint.token(&claims());
        assert_eq!(setting.subject(&before, &token), alice());
        let stricter = Issuer { audience: vec!["elsewhere".to_owned()], ..setting.issuer() };
        let after = setting.build(&[stricter], Some(&before)).await.unwrap();
        assert_eq!(setting.subject(&after, &token), Err(TokenFailure::Fault(TokenFault::Audience)));
        // And whoever still works under the old one is answered by the old one.
        assert_eq!(setting.subject(&before, &token), alice());
    }

    #[tokio::test]
    async fn a_reload_carries_keys_over_and_reads_files_anew() {
        let (old, new) = (Mint::es256("old"), Mint::es256("new"));
        let setting = Setting::new(&[&old]);
        let before = setting.verifier().await;
        setting.replace(&[&new]);
        let after = setting.build(&[setting.issuer()], Some(&before)).await.unwrap();
        assert!(Arc::ptr_eq(&before.issuers[0].keys, &after.issuers[0].keys));
        assert_eq!(setting.subject(&after, &new.token(&claims())), alice());
        assert_eq!(setting.subject(&after, &old.token(&claims())), Err(KEY_UNKNOWN));
    }

    #[tokio::test]
    async fn a_key_file_that_cannot_be_used_is_reported_and_changes_nothing() {
        let mint = Mint::es256("k1");
        let setting = Setting::new(&[&mint]);
        let before = setting.verifier().await;
        let broken = ["not json", r#"{"keys":[]}"#];
        for text in broken {
            std::fs::write(&setting.file, text).unwrap();
            let missing = Issuer { name: "missing".into(), ..issuer(Path::new("/nowhere/jwks.json")) };
            let errors = setting.build(&[setting.issuer(), missing], Some(&before)).await.unwrap_err();
            assert_eq!(errors.len(), 2, "all of them at once");
            assert!(
                errors[1]
                    .to_string()
                    .starts_with("issuer `missing`: keys in /nowhere/jwks.json: cannot be read")
            );
            assert_eq!(setting.subject(&before, &mint.token(&claims())), alice());
        }
    }

    #[tokio::test]
    async fn a_withdrawn_key_counts_no_more_even_for_remembered_tokens() {
        let (old, new) = (Mint::es256("old"), Mint::es256("new"));
        let setting = Setting::new(&[&old]);
        let verifier = setting.verifier().await;
        let token = old.token(&claims());
        assert_eq!(setting.subject(&verifier, &token), alice());
        setting.replace(&[&new]);
        assert!(verifier.refreshed(&token, Duration::from_secs(60)).await);
        assert_eq!(setting.subject(&verifier, &token), Err(KEY_UNKNOWN));
        assert_eq!(setting.subject(&verifier, &new.token(&claims())), alice());
    }

    #[tokio::test]
    async fn an_unknown_key_is_looked_for() {
        let (old, new) = (Mint::es256("old"), Mint::es256("new"));
        let setting = Setting::new(&[&old]);
        let verifier = setting.verifier().await;
        setting.replace(&[&old, &new]);
        let token = new.token(&claims());
        assert_eq!(setting.subject(&verifier, &token), Err(KEY_UNKNOWN));
        assert!(verifier.refreshed(&token, Duration::from_secs(60)).await);
        assert_eq!(setting.subject(&verifier, &token), alice());
        assert!(!verifier.refreshed("no token", Duration::from_secs(60)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn keys_are_read_again_in_time_and_kept_when_they_cannot_be() {
        let (old, new) = (Mint::es256("old"), Mint::es256("new"));
        let setting = Setting::new(&[&old]);
        let verifier = setting.verifier().await;
        let state = |verifier: &Verifier| {
            let now = time::Instant::now().into_std();
            verifier
                .key_ages(now)
                .map(|(_, age, failures)| (age.unwrap().as_secs(), failures))
                .next()
                .unwrap()
        };
        setting.replace(&[&new]);
        time::sleep(Duration::from_secs(299)).await;
        assert_eq!((setting.subject(&verifier, &old.token(&claims())), state(&verifier).0), (alice(), 299));
        time::sleep(Duration::from_secs(2)).await;
        assert_eq!(setting.subject(&verifier, &new.token(&claims())), alice());
        assert_eq!(setting.subject(&verifier, &old.token(&claims())), Err(KEY_UNKNOWN));

        std::fs::remove_file(&setting.file).unwrap();
        time::sleep(Duration::from_secs(3600)).await;
        let (age, failures) = state(&verifier);
        assert!(age >= 3600 && failures > 10, "{age} s, {failures} failures");
        assert_eq!(setting.subject(&verifier, &new.token(&claims())), alice(), "the last good keys stay");
        setting.replace(&[&new]);
        time::sleep(Duration::from_secs(301)).await;
        assert!(state(&verifier).0 <= 300);
    }

    #[tokio::test(start_paused = true)]
    async fn unknown_keys_cause_no_storm() {
        let mint = Mint::es256("k1");
        let setting = Setting::new(&[&mint]);
        let verifier = setting.verifier().await;
        // From now on every attempt is a failure that is counted.
        std::fs::remove_file(&setting.file).unwrap();
        let unknown = Mint::es256("k2").token(&claims());
        for _ in 0..600 {
            assert_eq!(setting.subject(&verifier, &unknown), Err(KEY_UNKNOWN));
            time::sleep(Duration::from_millis(100)).await;
        }
        let failures = verifier.key_ages(Instant::now()).map(|(_, _, failures)| failures).next().unwrap();
        assert!((10..=13).contains(&failures), "{failures} attempts in a minute");
        assert_eq!(setting.subject(&verifier, &mint.token(&claims())), alice());
    }

    #[tokio::test]
    async fn an_issuer_that_cannot_be_reached_is_no_fault_of_the_token() {
        let mint = Mint::es256("k1");
        let setting = Setting::new(&[&mint]);
        // A port that nothing listens on: bound, and let go of.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let jwks = JwksSource::Url(format!("http://127.0.0.1:{port}/jwks.json"));
        let verifier = setting.build(&[Issuer { jwks, ..setting.issuer() }], None).await.unwrap();
        let token = mint.token(&claims());
        assert_eq!(setting.subject(&verifier, &token), Err(TokenFailure::KeysUnavailable));
        assert_eq!(Denial::from(TokenFailure::KeysUnavailable).status(), 503);
        assert_eq!(Denial::from(TokenFailure::Fault(TokenFault::Key)).status(), 401);
        let ages: Vec<_> =
            verifier.key_ages(Instant::now()).map(|(_, age, failures)| (age, failures)).collect();
        assert_eq!(ages, [(None, 1)]);
    }
}
