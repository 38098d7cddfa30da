//! One-use tickets that open a WebSocket: for browsers, which can send a token by `fetch` but not with an upgrade.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::header::{HeaderMap, HeaderValue, ORIGIN};
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};
use sealgate_policy::{Denial, Identity, TokenFault};
use zeroize::Zeroizing;

use super::bearer;
use crate::lock::lock;

/// What an entry of `Sec-WebSocket-Protocol` begins with when it carries a ticket. Never echoed, never forwarded.
pub const TICKET_PREFIX: &str = "sealgate.ticket.";

/// Bytes of a ticket, all of them random.
const TICKET_BYTES: usize = 32;

/// Tickets open at once: in all, and of one subject. More are refused rather than others forgotten.
const MAX_TICKETS: usize = 100_000;
const MAX_PER_SUBJECT: usize = 100;

/// A ticket's text, to be handed out once. Does not print.
pub struct TicketText(Zeroizing<String>);

impl TicketText {
    /// The text itself. Must reach no log.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for TicketText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TicketText(..)")
    }
}

/// Open tickets. Shared by all cores, so that each counts once, whichever core it comes to; older than any snapshot.
///
/// They stand under the hash of their text: who reads this memory cannot open a socket with it.
#[derive(Default)]
pub struct Tickets {
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    tickets: HashMap<[u8; 32], Ticket>,
    of_subject: HashMap<(Arc<str>, String), usize>,
}

/// An open ticket, taken to be redeemed: nobody else has it any more.
pub struct Ticket {
    identity: Arc<Identity>,
    /// A copy: the field's own bytes keep all of the buffer that hyper read it into.
    origin: Box<[u8]>,
    /// Unix seconds at which it no longer counts.
    until: u64,
    /// Whether other gateways can redeem it too, so that they have to be asked.
    shared: bool,
}

/// The ticket of an upgrade, as it came.
///
/// # Errors
/// [`TokenFault::Twice`] for two.
pub fn ticket(headers: &HeaderMap) -> Result<Option<&str>, TokenFault> {
    bearer::subprotocol(headers, TICKET_PREFIX)
}

impl Tickets {
    /// Makes a ticket for the session of a verified identity, for the page whose request this is.
    ///
    /// # Errors
    /// [`Denial::OriginNotAllowed`] for a request without exactly one `Origin`, which no browser's `POST` is;
    /// [`Denial::TooManyTickets`]; [`Denial::Internal`] if the system has no random numbers to give.
    pub fn issue(
        &self,
        identity: &Arc<Identity>,
        headers: &HeaderMap,
        ttl: Duration,
        now: u64,
    ) -> Result<TicketText, Denial> {
        let origin = origin(headers).ok_or(Denial::OriginNotAllowed)?.as_bytes().into();
        let mut bytes = Zeroizing::new([0; TICKET_BYTES]);
        SystemRandom::new().fill(&mut *bytes).map_err(|_| Denial::Internal)?;
        let text = TicketText(Zeroizing::new(URL_SAFE_NO_PAD.encode(bytes.as_slice())));
        let key = key(text.as_str()).ok_or(Denial::Internal)?;
        let owner = (Arc::clone(&identity.issuer), identity.subject.clone());
        let mut open = lock(&self.open);
        if open.tickets.len() >= MAX_TICKETS
            || open.of_subject.get(&owner).is_some_and(|it| *it >= MAX_PER_SUBJECT)
        {
            open.forget_expired(now);
        }
        let of_owner = open.of_subject.get(&owner).copied().unwrap_or(0);
        if open.tickets.len() >= MAX_TICKETS || of_owner >= MAX_PER_SUBJECT {
            return Err(Denial::TooManyTickets);
        }
        let until = now.saturating_add(ttl.as_secs());
        open.tickets.insert(key, Ticket { identity: Arc::clone(identity), origin, until, shared: false });
        open.of_subject.insert(owner, of_owner + 1);
        Ok(text)
    }

    /// Other gateways can redeem the ticket from now on.
    pub fn share(&self, text: &TicketText) {
        let Some(key) = key(text.as_str()) else { return };
        if let Some(ticket) = lock(&self.open).tickets.get_mut(&key) {
            ticket.shared = true;
        }
    }

    /// Takes a ticket of this gateway: from now on it is used, whatever comes of it.
    pub fn take(&self, text: &str) -> Option<Ticket> {
        key(text).and_then(|key| lock(&self.open).take(&key))
    }

    /// Whose session a ticket opens a WebSocket for. However that ends, the ticket is used: one that was stolen and tried
    /// from elsewhere is worth nothing to anybody.
    ///
    /// # Errors
    /// [`Denial::TokenInvalid`]: unknown, used, too old, from another page, or the token that it was made of has expired.
    pub fn redeem(&self, text: &str, headers: &HeaderMap, now: u64) -> Result<Arc<Identity>, Denial> {
        let invalid = Denial::TokenInvalid(TokenFault::Ticket);
        self.take(text).ok_or(invalid)?.redeem(headers, now)
    }

    /// Clears away what is too old. Meant to be called every minute or so.
    pub fn forget_expired(&self, now: u64) {
        lock(&self.open).forget_expired(now);
    }

    /// Tickets that are open.
    pub fn len(&self) -> usize {
        lock(&self.open).tickets.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Ticket {
    /// Whether other gateways can redeem it too.
    #[must_use]
    pub fn is_shared(&self) -> bool {
        self.shared
    }

    /// Whose session it opens a WebSocket for.
    ///
    /// # Errors
    /// As [`Tickets::redeem`].
    pub fn redeem(self, headers: &HeaderMap, now: u64) -> Result<Arc<Identity>, Denial> {
        fits(&self.origin, self.until, headers, now)?;
        if now >= self.identity.expires_at {
            return Err(Denial::TokenInvalid(TokenFault::Expired));
        }
        Ok(self.identity)
    }
}

impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket(..)")
    }
}

/// Whether a ticket still counts, and for the page whose fields these are.
///
/// # Errors
/// [`Denial::TokenInvalid`].
pub fn fits(page: &[u8], until: u64, headers: &HeaderMap, now: u64) -> Result<(), Denial> {
    let same = origin(headers).is_some_and(|origin| origin.as_bytes() == page);
    if now < until && same { Ok(()) } else { Err(Denial::TokenInvalid(TokenFault::Ticket)) }
}

/// By what other gateways find a ticket, which does not tell the ticket; nothing for what can be none.
#[must_use]
pub fn ticket_name(text: &str) -> Option<String> {
    key(text).map(|key| key.iter().map(|byte| format!("{byte:02x}")).collect())
}

impl Open {
    fn take(&mut self, key: &[u8; 32]) -> Option<Ticket> {
        let ticket = self.tickets.remove(key)?;
        self.count_down(&ticket.identity);
        Some(ticket)
    }

    fn forget_expired(&mut self, now: u64) {
        let expired: Vec<_> = self.tickets.extract_if(|_, ticket| now >= ticket.until).collect();
        expired.iter().for_each(|(_, ticket)| self.count_down(&ticket.identity));
    }

    fn count_down(&mut self, identity: &Identity) {
        let owner = (Arc::clone(&identity.issuer), identity.subject.clone());
        if let Some(count) = self.of_subject.get_mut(&owner) {
            *count -= 1;
            if *count == 0 {
                self.of_subject.remove(&owner);
            }
        }
    }
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tickets").field("open", &self.len()).finish_non_exhaustive()
    }
}

/// The one page that a request comes from, if it says so.
pub fn origin(headers: &HeaderMap) -> Option<&HeaderValue> {
    let mut origins = headers.get_all(ORIGIN).iter();
    // "null" is every page that hides where it is from.
    let only = origins.next().filter(|origin| *origin != "null" && !origin.is_empty());
    only.filter(|_| origins.next().is_none())
}

/// Tickets have one length, so that nothing longer is hashed.
fn key(text: &str) -> Option<[u8; 32]> {
    (text.len() == TICKET_BYTES.div_ceil(3) * 4 - 1)
        .then(|| digest(&SHA256, text.as_bytes()).as_ref().try_into().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::header::SEC_WEBSOCKET_PROTOCOL;
    use proptest::prelude::*;
    use sealgate_policy::IdentityParts;

    const NOW: u64 = 1_000;
    const TTL: Duration = Duration::from_secs(30);
    const INVALID: Denial = Denial::TokenInvalid(TokenFault::Ticket);

    fn identity(subject: &str, expires_at: u64) -> Arc<Identity> {
        let subject = subject.to_owned();
        Arc::new(Identity::new(IdentityParts { subject, expires_at, ..IdentityParts::default() }))
    }

    fn page(origins: &[&'static str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for origin in origins {
            headers.append(ORIGIN, HeaderValue::from_static(origin));
        }
        headers
    }

    #[test]
    fn a_ticket_counts_once_soon_and_for_its_page() {
        let (tickets, here) = (Tickets::default(), page(&["https://chat.example"]));
        let issue = || tickets.issue(&identity("alice", NOW + 300), &here, TTL, NOW).unwrap();
        let redeemed = |text: &TicketText, headers: &HeaderMap, now| {
            tickets.redeem(text.as_str(), headers, now).map(|identity| identity.subject.clone())
        };
        let one = issue();
        assert_eq!(redeemed(&one, &here, NOW + 29).as_deref(), Ok("alice"));
        assert_eq!(redeemed(&one, &here, NOW), Err(INVALID), "used");
        assert_eq!(redeemed(&issue(), &here, NOW + 30), Err(INVALID), "too old");
        for other in
            [&["https://evil.example"][..], &[], &["null"], &["https://chat.example", "https://chat.example"]]
        {
            let stolen = issue();
            assert_eq!(redeemed(&stolen, &page(other), NOW), Err(INVALID), "{other:?}");
            assert_eq!(redeemed(&stolen, &here, NOW), Err(INVALID), "and then it is used");
        }
        assert!(tickets.is_empty());
        let short = tickets.issue(&identity("alice", NOW + 10), &here, TTL, NOW).unwrap();
        assert_eq!(redeemed(&short, &here, NOW + 10), Err(Denial::TokenInvalid(TokenFault::Expired)));
        assert_eq!(format!("{:?}", issue()), "TicketText(..)");
    }

    #[test]
    fn only_pages_get_one() {
        let tickets = Tickets::default();
        for origins in [&[][..], &["null"], &[""], &["https://a.example", "https://a.example"]] {
            let outcome = tickets.issue(&identity("alice", NOW + 300), &page(origins), TTL, NOW);
            assert_eq!(outcome.map(drop), Err(Denial::OriginNotAllowed), "{origins:?}");
        }
    }

    #[test]
    fn nobody_can_open_too_many() {
        let (tickets, here) = (Tickets::default(), page(&["https://chat.example"]));
        let issue = |who: &str, now| tickets.issue(&identity(who, NOW + 300), &here, TTL, now);
        let first = issue("mallory", NOW).unwrap();
        for _ in 1..MAX_PER_SUBJECT {
            issue("mallory", NOW).unwrap();
        }
        assert_eq!(issue("mallory", NOW).map(drop), Err(Denial::TooManyTickets));
        assert!(issue("alice", NOW).is_ok(), "that is mallory's own matter");
        tickets.redeem(first.as_str(), &here, NOW).unwrap();
        assert!(issue("mallory", NOW).is_ok());
        assert!(issue("mallory", NOW + 30).is_ok(), "those that are too old are gone");
        assert_eq!(tickets.len(), 1);
    }

    #[test]
    fn finds_the_ticket_among_subprotocols() {
        let mut headers = HeaderMap::new();
        assert_eq!(ticket(&headers), Ok(None));
        headers.append(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("im.v1, sealgate.ticket.abc"));
        assert_eq!(ticket(&headers), Ok(Some("abc")));
        headers.append(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("sealgate.ticket.abc"));
        assert_eq!(ticket(&headers), Err(TokenFault::Twice));
    }

    proptest! {
        #[test]
        fn any_text_is_answered(text in "\\PC*", field in any::<Vec<u8>>()) {
            let tickets = Tickets::default();
            let mut headers = page(&["https://chat.example"]);
            tickets.issue(&identity("alice", NOW + 300), &headers, TTL, NOW).unwrap();
            prop_assert_eq!(tickets.redeem(&text, &headers, NOW).map(drop), Err(INVALID));
            headers.extend(HeaderValue::from_bytes(&field).ok().map(|value| (SEC_WEBSOCKET_PROTOCOL, value)));
            if let Ok(Some(found)) = ticket(&headers) {
                prop_assert_eq!(tickets.redeem(found, &headers, NOW).map(drop), Err(INVALID));
            }
            prop_assert_eq!(tickets.len(), 1);
        }
    }
}
