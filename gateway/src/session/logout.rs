//! Logout tokens: an issuer says whom it has logged out (OpenID Connect Back-Channel Logout 1.0).

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Mutex;

use sealgate_policy::{Denial, Issuer, LogoutFault, LogoutRule, TokenFault};
use serde_json::Value;

use super::jwks::KeySet;
use super::revocation::{Revocation, Target};
use super::token::{Unverified, media_type};
use crate::lock::lock;

/// The member of `events` that makes a token one (§2.4).
const EVENT: &str = "http://schemas.openid.net/event/backchannel-logout";

/// Tokens remembered against replay. No more are taken, so that none is forgotten that could come again.
const MAX_SEEN: usize = 64 * 1024;

/// A logout token that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogoutToken {
    issuer: String,
    /// `jti`.
    pub id: String,
    /// `kid` of the key that verified it, if the key has one.
    pub key_id: Option<std::sync::Arc<str>>,
    /// `iat`.
    pub issued_at: u64,
    /// Unix seconds from which it counts no more.
    pub until: u64,
    /// `sub`.
    pub subject: Option<String>,
    /// `sid`.
    pub session: Option<String>,
}

impl LogoutToken {
    /// What it ends, to be remembered until `until` (unix seconds): the session, or where it names none, all of the
    /// subject's that had begun when it was made. By the issuer's clock, as the dates of its other tokens: who logs in anew
    /// after it is let in, however late the token comes.
    pub fn revocation(&self, until: u64) -> Option<Revocation<'_>> {
        let issuer = self.issuer.as_str();
        let (target, issued_before) = match (&self.session, &self.subject) {
            (Some(session), _) => (Target::Session { issuer, session }, u64::MAX),
            // Dates are whole seconds: a token of the same one may be older.
            (None, Some(subject)) => (Target::Subject { issuer, subject }, self.issued_at.saturating_add(1)),
            (None, None) => return None,
        };
        Some(Revocation { target, issued_before, until })
    }

    /// The key that signed it, if it has a name.
    pub fn key(&self) -> Option<Target<'_>> {
        self.key_id.as_deref().map(|key_id| Target::Key { issuer: &self.issuer, key_id })
    }
}

/// The one `logout_token` of a form (§2.5). Other fields are left alone, as they may be there.
///
/// # Errors
/// [`LogoutFault::Form`].
pub fn logout_token(form: &[u8]) -> Result<Cow<'_, str>, LogoutFault> {
    let mut tokens = form_urlencoded::parse(form).filter(|(name, _)| name == "logout_token");
    match (tokens.next(), tokens.next()) {
        (Some((_, token)), None) => Ok(token),
        _ => Err(LogoutFault::Form),
    }
}

/// Verifies header, signature and claims at `now` (unix seconds), as §2.6 says; whether it was seen before is for
/// [`LogoutTokens`] to say.
pub(super) fn verify(
    token: Unverified<'_>,
    issuer: &Issuer,
    rule: &LogoutRule,
    keys: &KeySet,
    now: u64,
) -> Result<LogoutToken, LogoutFault> {
    let fault = LogoutFault::Token;
    let algorithm = token.verify_header(issuer, |kind| match kind.map(media_type) {
        Some(kind) if kind.eq_ignore_ascii_case("logout+jwt") => true,
        // §2.4: issuers of before the type was registered. No access token of an issuer may pass for one: those have a type of
        // their own, and no event.
        Some(kind) => !rule.strict_type && kind.eq_ignore_ascii_case("jwt"),
        None => !rule.strict_type,
    });
    let key_id = token.verify_signature(algorithm.map_err(fault)?, keys).map_err(fault)?;

    if token.issuer() != Some(&issuer.issuer) {
        return Err(fault(TokenFault::Issuer));
    }
    // OpenID Connect Core §3.1.3.7: ours must be among them, and none that we do not know.
    let audience = token.strings("aud").map_err(fault)?.unwrap_or_default();
    if audience.is_empty() || !audience.iter().all(|it| rule.audience.contains(it)) {
        return Err(fault(TokenFault::Audience));
    }
    let date = |name| token.date(name).map_err(fault);
    let claims = fault(TokenFault::Claims);
    let (issued_at, expires_at) = (date("iat")?.ok_or(claims)?, date("exp")?.ok_or(claims)?);
    let (skew, max_age) = (issuer.skew.as_secs(), rule.max_age.as_secs());
    let until = expires_at.min(issued_at.saturating_add(max_age)).saturating_add(skew);
    if now >= until {
        return Err(fault(TokenFault::Expired));
    }
    if [Some(issued_at), date("nbf")?].into_iter().flatten().any(|date| date > now.saturating_add(skew)) {
        return Err(fault(TokenFault::NotYetValid));
    }
    if issued_at > expires_at {
        return Err(claims);
    }
    let events = token.claims().get("events").and_then(Value::as_object);
    if !events.and_then(|events| events.get(EVENT)).is_some_and(Value::is_object) {
        return Err(LogoutFault::Event);
    }
    // §2.4: so that nobody can pass an ID token off as one, nor one as an ID token.
    if token.claims().contains_key("nonce") {
        return Err(LogoutFault::Nonce);
    }
    let id = |name| token.id(name).map_err(fault);
    let (subject, session) = (id("sub")?, id("sid")?);
    if subject.is_none() && session.is_none() {
        return Err(LogoutFault::Nobody);
    }
    Ok(LogoutToken {
        issuer: issuer.issuer.clone(),
        id: id("jti")?.ok_or(claims)?,
        key_id,
        issued_at,
        until,
        subject,
        session,
    })
}

/// The tokens that came, so that none counts twice. Shared by all cores, older than any snapshot.
#[derive(Default)]
pub struct LogoutTokens {
    hashers: [RandomState; 2],
    seen: Mutex<HashMap<u128, u64>>,
}

impl LogoutTokens {
    /// Takes a token, once.
    ///
    /// # Errors
    /// [`LogoutFault::Replayed`]; [`Denial::LogoutFailed`] where no more can be remembered.
    pub fn take(&self, token: &LogoutToken, now: u64) -> Result<(), Denial> {
        let key = self.key(token);
        let mut seen = lock(&self.seen);
        if seen.get(&key).is_some_and(|until| now < *until) {
            return Err(Denial::LogoutInvalid(LogoutFault::Replayed));
        }
        if seen.len() >= MAX_SEEN {
            seen.retain(|_, until| now < *until);
        }
        if seen.len() >= MAX_SEEN {
            return Err(Denial::LogoutFailed);
        }
        seen.insert(key, token.until);
        Ok(())
    }

    /// Forgets a token that was taken, and of which nothing came: its issuer may try again.
    pub fn give_back(&self, token: &LogoutToken) {
        lock(&self.seen).remove(&self.key(token));
    }

    /// Clears away what no longer could be replayed. Meant to be called every minute or so.
    pub fn forget_expired(&self, now: u64) {
        lock(&self.seen).retain(|_, until| now < *until);
    }

    fn key(&self, token: &LogoutToken) -> u128 {
        let [low, high] = self.hashers.each_ref().map(|it| it.hash_one((&token.issuer, &token.id)));
        u128::from(high) << 64 | u128::from(low)
    }
}

impl fmt::Debug for LogoutTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogoutTokens").field("seen", &lock(&self.seen).len()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::minting::{ISSUER, Mint, NOW, issuer, jwks};
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::time::Duration;

    fn rule() -> LogoutRule {
        LogoutRule {
            issuer: "example".into(),
            audience: vec!["client".to_owned(), "other-client".to_owned()],
            max_age: Duration::from_secs(60),
            strict_type: false,
        }
    }

    fn claims() -> Value {
        json!({
            "iss": ISSUER, "aud": "client", "iat": NOW, "exp": NOW + 120, "jti": "l-1", "sub": "alice", "sid": "s-1",
            "events": { EVENT: {} },
        })
    }

    fn judged(
        header: &Value,
        claims: &Value,
        rule: &LogoutRule,
        now: u64,
    ) -> Result<LogoutToken, LogoutFault> {
        let mint = Mint::es256("k1");
        let token = mint.token_of(&header.to_string(), &claims.to_string());
        let keys = KeySet::parse(jwks(&[&mint]).as_bytes()).unwrap();
        verify(Unverified::parse(&token).unwrap(), &issuer(""), rule, &keys, now)
    }

    fn header(kind: Value) -> Value {
        json!({ "alg": "ES256", "kid": "k1", "typ": kind })
    }

    #[test]
    fn a_token_ends_the_session_that_it_names_or_all_that_the_subject_had() {
        let token = judged(&header("logout+jwt".into()), &claims(), &rule(), NOW).unwrap();
        let expected = Target::Session { issuer: ISSUER, session: "s-1" };
        let revocation = token.revocation(NOW + 9).unwrap();
        assert_eq!(
            (revocation.target, revocation.issued_before, revocation.until),
            (expected, u64::MAX, NOW + 9)
        );
        assert_eq!(token.key(), Some(Target::Key { issuer: ISSUER, key_id: "k1" }));
        let mut of_subject = claims();
        of_subject.as_object_mut().unwrap().remove("sid");
        let token = judged(&header("logout+jwt".into()), &of_subject, &rule(), NOW + 50).unwrap();
        let revocation = token.revocation(NOW + 9).unwrap();
        let expected = Target::Subject { issuer: ISSUER, subject: "alice" };
        assert_eq!((revocation.target, revocation.issued_before), (expected, NOW + 1));
    }

    #[test]
    fn types_are_as_strict_as_the_rule() {
        let strict = LogoutRule { strict_type: true, ..rule() };
        for (kind, loose) in [
            ("logout+jwt", true),
            ("LOGOUT+JWT", true),
            ("application/logout+jwt", true),
            ("JWT", true),
            ("at+jwt", false),
            ("", false),
        ] {
            let outcome = judged(&header(kind.into()), &claims(), &rule(), NOW).map(drop);
            assert_eq!(outcome.is_ok(), loose, "{kind}");
            let outcome = judged(&header(kind.into()), &claims(), &strict, NOW).map(drop);
            assert_eq!(outcome.is_ok(), kind.to_ascii_lowercase().ends_with("logout+jwt"), "{kind}");
        }
        let untyped = json!({ "alg": "ES256", "kid": "k1" });
        assert!(judged(&untyped, &claims(), &rule(), NOW).is_ok());
        assert_eq!(judged(&untyped, &claims(), &strict, NOW), Err(LogoutFault::Token(TokenFault::Type)));
    }

    #[test]
    fn counts_until_it_is_too_old_or_expires() {
        let typed = header("logout+jwt".into());
        let expired = Err(LogoutFault::Token(TokenFault::Expired));
        assert!(judged(&typed, &claims(), &rule(), NOW + 59).is_ok());
        assert_eq!(judged(&typed, &claims(), &rule(), NOW + 60), expired);
        let mut short = claims();
        short["exp"] = (NOW + 10).into();
        assert_eq!(judged(&typed, &short, &rule(), NOW + 9).unwrap().until, NOW + 10);
        assert_eq!(judged(&typed, &short, &rule(), NOW + 10), expired);
        let early = judged(&typed, &claims(), &rule(), NOW - 1);
        assert_eq!(early, Err(LogoutFault::Token(TokenFault::NotYetValid)));
    }

    #[test]
    fn none_counts_twice_and_memory_is_bounded() {
        let tokens = LogoutTokens::default();
        let mut token = judged(&header("JWT".into()), &claims(), &rule(), NOW).unwrap();
        assert_eq!(tokens.take(&token, NOW), Ok(()));
        assert_eq!(tokens.take(&token, NOW), Err(Denial::LogoutInvalid(LogoutFault::Replayed)));
        tokens.give_back(&token);
        assert_eq!(tokens.take(&token, NOW), Ok(()));
        for number in 1..MAX_SEEN {
            token.id = number.to_string();
            assert_eq!(tokens.take(&token, NOW), Ok(()));
        }
        token.id = "one more".to_owned();
        assert_eq!(tokens.take(&token, NOW), Err(Denial::LogoutFailed));
        assert_eq!(tokens.take(&token, token.until), Ok(()));
        assert_eq!(lock(&tokens.seen).len(), 1);
    }

    #[test]
    fn a_form_holds_one_token() {
        assert_eq!(logout_token(b"logout_token=a.b.c").as_deref(), Ok("a.b.c"));
        assert_eq!(logout_token(b"x=1&logout%5Ftoken=a%2Eb.c&y").as_deref(), Ok("a.b.c"));
        for form in ["", "logout_token", "Logout_Token=a", "logout_token=a&logout_token=a", "logout_token =a"]
        {
            let found = logout_token(form.as_bytes());
            assert!(found == Err(LogoutFault::Form) || found.as_deref() == Ok(""), "{form}");
        }
    }

    proptest! {
        #[test]
        fn any_form_is_answered(form in any::<Vec<u8>>()) {
            if let Ok(token) = logout_token(&form) {
                let _ = Unverified::parse(&token);
            }
        }
    }
}
