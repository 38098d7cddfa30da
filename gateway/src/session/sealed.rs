//! A ticket as it stands where other gateways find it: sealed under a key that only the ticket itself gives.
//!
//! What is sealed is the token that the ticket was made of, so that whoever redeems it verifies that token anew. Who can read the
//! store has names (hashes of tickets) and ciphertext, and opens nothing with them; who can write there makes no identity, since
//! he has no issuer's key. He can delete a ticket, or, of a token bound to a key that he stole without the key, make a ticket as if
//! the key had been proved: so the store must be writable by gateways only.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, Salt};
use zeroize::Zeroizing;

/// What a ticket stands for.
pub struct Content {
    /// The token that it was made of. Must reach no log.
    pub token: Zeroizing<String>,
    /// The page that it was made for.
    pub origin: Box<[u8]>,
    /// Unix seconds at which it no longer counts.
    pub until: u64,
}

/// Seals what a ticket stands for; nothing if it could not be.
#[must_use]
pub fn seal(ticket: &str, token: &str, origin: &[u8], until: u64) -> Option<Vec<u8>> {
    let length = u16::try_from(origin.len()).ok()?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(10 + origin.len() + token.len() + 16));
    bytes.extend_from_slice(&until.to_be_bytes());
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(origin);
    bytes.extend_from_slice(token.as_bytes());
    let tag = key(ticket)?.seal_in_place_separate_tag(nonce(), Aad::empty(), &mut bytes).ok()?;
    // INVARIANT: ciphertext by now.
    let mut sealed = bytes.to_vec();
    sealed.extend_from_slice(tag.as_ref());
    Some(sealed)
}

/// Opens what [`seal`] made with the same ticket; nothing for anything else.
#[must_use]
pub fn open(ticket: &str, sealed: Vec<u8>) -> Option<Content> {
    let mut bytes = Zeroizing::new(sealed);
    let plain = key(ticket)?.open_in_place(nonce(), Aad::empty(), &mut bytes).ok()?;
    let (until, rest) = plain.split_first_chunk::<8>()?;
    let (length, rest) = rest.split_first_chunk::<2>()?;
    let (origin, token) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
    let token = Zeroizing::new(std::str::from_utf8(token).ok()?.to_owned());
    Some(Content { token, origin: origin.into(), until: u64::from_be_bytes(*until) })
}

/// Each ticket is 256 random bits, and gives a key that seals once.
fn key(ticket: &str) -> Option<LessSafeKey> {
    let salt = Salt::new(HKDF_SHA256, b"sealgate websocket ticket");
    let secret = salt.extract(ticket.as_bytes());
    let okm = secret.expand(&[b"content, AES-256-GCM"], &AES_256_GCM).ok()?;
    Some(LessSafeKey::new(UnboundKey::from(okm)))
}

fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn only_its_own_ticket_opens_it(
            ticket in "[A-Za-z0-9_-]{43}", other in "[A-Za-z0-9_-]{43}", token in "\\PC{0,200}",
            origin in prop::collection::vec(any::<u8>(), 0..60), until in any::<u64>(),
            flip in any::<prop::sample::Index>(), bit in 0u8..8, noise in prop::collection::vec(any::<u8>(), 0..80),
        ) {
            let sealed = seal(&ticket, &token, &origin, until).unwrap();
            let content = open(&ticket, sealed.clone()).unwrap();
            prop_assert_eq!((content.token.as_str(), &*content.origin, content.until), (&*token, &*origin, until));
            prop_assert!(other == ticket || open(&other, sealed.clone()).is_none());
            let mut altered = sealed.clone();
            let place = flip.index(altered.len());
            altered[place] ^= 1 << bit;
            prop_assert!(open(&ticket, altered).is_none());
            prop_assert!(open(&ticket, sealed[..place].to_vec()).is_none());
            prop_assert!(open(&ticket, noise).is_none());
            let hidden = token.len() < 8 || !sealed.windows(token.len()).any(|part| part == token.as_bytes());
            prop_assert!(hidden);
        }
    }
}
