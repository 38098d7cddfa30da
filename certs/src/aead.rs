//! AES-256-GCM (NIST SP 800-38D) by ring, with a key that is erased when dropped.

use std::hint::black_box;

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, MAX_TAG_LEN, NONCE_LEN, Nonce, UnboundKey};
use zeroize::Zeroizing;

use crate::random::{self, CryptoError};

/// Bytes of an AES-256 key.
pub(crate) const KEY_LEN: usize = 32;

/// Bytes that [`AeadKey::seal`] adds to the plaintext: nonce in front, tag behind.
pub(crate) const OVERHEAD: usize = NONCE_LEN + MAX_TAG_LEN;

/// An expanded AES-256-GCM key. ring's own is not erased when dropped; this one is.
///
/// Boxed, so that moving its owner leaves no copy of the key schedule behind.
pub(crate) struct AeadKey(Box<LessSafeKey>);

impl AeadKey {
    pub(crate) fn new(key: &[u8; KEY_LEN]) -> Result<Self, CryptoError> {
        Ok(Self(Box::new(expand(key)?)))
    }

    /// Nonce, ciphertext and tag of the parts of `plaintext` put together, under a fresh random nonce.
    ///
    /// Random 96-bit nonces are safe for 2³² calls with one key (SP 800-38D §8.3); callers keep to that.
    pub(crate) fn seal(&self, associated: &[u8], plaintext: &[&[u8]]) -> Result<Vec<u8>, CryptoError> {
        let nonce = random::bytes::<NONCE_LEN>()?;
        let length: usize = plaintext.iter().map(|part| part.len()).sum();
        let mut sealed = Vec::with_capacity(length + OVERHEAD);
        sealed.extend_from_slice(nonce.as_slice());
        for part in plaintext {
            sealed.extend_from_slice(part);
        }
        let (_, in_out) = sealed.split_at_mut(NONCE_LEN);
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let tag = self.0.seal_in_place_separate_tag(nonce, Aad::from(associated), in_out)?;
        sealed.extend_from_slice(tag.as_ref());
        Ok(sealed)
    }

    /// The plaintext of what [`seal`](Self::seal) returned; `None` if any bit of it, or of `associated`, differs.
    pub(crate) fn open(&self, associated: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let (nonce, ciphertext) = sealed.split_first_chunk()?;
        let mut in_out = Zeroizing::new(ciphertext.to_vec());
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let length = self.0.open_in_place(nonce, Aad::from(associated), &mut in_out).ok()?.len();
        in_out.truncate(length);
        Some(in_out)
    }

    /// Overwrites the key schedule, in its place, with that of a key that everybody knows.
    fn erase(&mut self) {
        if let Ok(blank) = expand(&[0; KEY_LEN]) {
            *self.0 = blank;
            // Keeps the compiler from dropping the write as one that nobody reads.
            black_box(&self.0);
        }
    }
}

impl Drop for AeadKey {
    fn drop(&mut self) {
        self.erase();
    }
}

fn expand(key: &[u8; KEY_LEN]) -> Result<LessSafeKey, CryptoError> {
    Ok(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> AeadKey {
        AeadKey::new(&[7; KEY_LEN]).unwrap()
    }

    #[test]
    fn opens_what_it_sealed_and_nothing_that_differs() {
        let sealed = key().seal(b"row 1", &[b"hello ", b"world"]).unwrap();
        assert_eq!(sealed.len(), 11 + OVERHEAD);
        assert_eq!(key().open(b"row 1", &sealed).unwrap().as_slice(), b"hello world");

        assert!(key().open(b"row 2", &sealed).is_none());
        assert!(AeadKey::new(&[8; KEY_LEN]).unwrap().open(b"row 1", &sealed).is_none());
        for at in 0..sealed.len() {
            let mut altered = sealed.clone();
            altered[at] ^= 1;
            assert!(key().open(b"row 1", &altered).is_none(), "byte {at}");
            assert!(key().open(b"row 1", &sealed[..at]).is_none(), "cut at {at}");
        }
    }

    #[test]
    fn equal_plaintexts_seal_differently() {
        assert_ne!(key().seal(b"", &[b"x"]).unwrap(), key().seal(b"", &[b"x"]).unwrap());
    }

    #[test]
    fn an_erased_key_opens_nothing() {
        let mut key = key();
        let sealed = key.seal(b"", &[b"x"]).unwrap();
        key.erase();
        assert!(key.open(b"", &sealed).is_none());
    }
}
