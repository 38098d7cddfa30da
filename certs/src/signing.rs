//! Signing of tokens: ES256 (RFC 7518 §3.4).

use std::fmt;
use std::path::Path;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use serde_json::{Value, json};

use crate::files::{FileError, read_private, write_private};
use crate::random::CryptoError;

/// Bytes of a P-256 coordinate, and of each half of a signature.
const COORDINATE_LEN: usize = 32;

/// A P-256 key that signs tokens, named by its RFC 7638 thumbprint.
pub struct SigningKey {
    pair: EcdsaKeyPair,
    x: String,
    y: String,
    kid: String,
}

/// A signing key cannot be made, read or stored.
#[derive(Debug, thiserror::Error)]
pub enum SigningKeyError {
    /// The key could not be made.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not a P-256 private key in PKCS#8 DER. Deliberately without detail.
    #[error("{0} is not a P-256 private key in PKCS#8")]
    Unreadable(String),
}

impl SigningKey {
    /// A fresh key.
    pub fn generate() -> Result<Self, CryptoError> {
        Self::from_pair(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING)?)
    }

    /// Reads what [`save`](Self::save) wrote. The file must be closed to other users.
    pub fn load(path: &Path) -> Result<Self, SigningKeyError> {
        let pkcs8 = read_private(path)?;
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &pkcs8)
            .map_err(|_| SigningKeyError::Unreadable(path.display().to_string()))?;
        Ok(Self::from_pair(pair)?)
    }

    /// Writes the key as PKCS#8 in DER, mode 0600.
    pub fn save(&self, path: &Path) -> Result<(), SigningKeyError> {
        let pkcs8 = self.pair.to_pkcs8v1().map_err(CryptoError::from)?;
        Ok(write_private(path, pkcs8.as_ref())?)
    }

    /// Reads the key at `path`; makes and saves one if there is no file.
    pub fn load_or_generate(path: &Path) -> Result<Self, SigningKeyError> {
        if path.exists() {
            return Self::load(path);
        }
        let key = Self::generate()?;
        key.save(path)?;
        Ok(key)
    }

    /// The signature of `message` as JWS wants it: r and s, 32 bytes each, big-endian (RFC 7518 §3.4).
    pub fn sign(&self, message: &[u8]) -> Result<[u8; 64], CryptoError> {
        let signature = self.pair.sign(&SystemRandom::new(), message)?;
        signature.as_ref().try_into().map_err(|_| CryptoError)
    }

    /// The key's name in token headers and JWKS: its RFC 7638 thumbprint with SHA-256, in base64url.
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// The public half as a JWK (RFC 7517), for a JWKS.
    pub fn public_jwk(&self) -> Value {
        json!({
            "kty": "EC", "crv": "P-256", "x": self.x, "y": self.y,
            "kid": self.kid, "alg": "ES256", "use": "sig",
        })
    }

    fn from_pair(pair: EcdsaKeyPair) -> Result<Self, CryptoError> {
        // SEC1 §2.3.3: 4 for `uncompressed`, then both coordinates.
        let Some((4, point)) = pair.public_key().as_ref().split_first() else {
            return Err(CryptoError);
        };
        let (x, y) = point.split_at_checked(COORDINATE_LEN).ok_or(CryptoError)?;
        let (x, y) = (URL_SAFE_NO_PAD.encode(x), URL_SAFE_NO_PAD.encode(y));
        let kid = thumbprint(&x, &y);
        Ok(Self { pair, x, y, kid })
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey(kid {}, ..)", self.kid)
    }
}

/// RFC 7638 §3: the required members alone, in the order of their names, without spaces.
fn thumbprint(x: &str, y: &str) -> String {
    let canonical = format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#);
    URL_SAFE_NO_PAD.encode(digest(&SHA256, canonical.as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use ring::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};

    use super::*;

    /// The point of a JWK as another library wants it.
    fn point(jwk: &Value) -> Vec<u8> {
        let coordinate = |name: &str| URL_SAFE_NO_PAD.decode(jwk[name].as_str().unwrap()).unwrap();
        [vec![4], coordinate("x"), coordinate("y")].concat()
    }

    #[test]
    fn another_library_verifies_the_signature_with_the_jwk() {
        let key = SigningKey::generate().unwrap();
        let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point(&key.public_jwk()));
        let signature = key.sign(b"header.claims").unwrap();
        assert!(public.verify(b"header.claims", &signature).is_ok());
        assert!(public.verify(b"header.claimz", &signature).is_err());
        let stranger = SigningKey::generate().unwrap().sign(b"header.claims").unwrap();
        assert!(public.verify(b"header.claims", &stranger).is_err());
    }

    #[test]
    fn the_thumbprint_is_that_of_rfc_7638() {
        // The key of RFC 7517 §A.1; its thumbprint computed with Python's hashlib.
        let x = "MKBCTNIcKUSDii11ySs3526iDZ8AiTo7Tu6KPAqv7D4";
        let y = "4Etl6SRW2YiLUrN5vfvVHuhp7x8PxltmWWlbbM4IFyM";
        assert_eq!(thumbprint(x, y), "cn-I_WNMClehiVp51i_0VpOENW1upEerA8sEam5hn-s");
    }

    #[test]
    fn the_jwk_is_public_and_complete() {
        let key = SigningKey::generate().unwrap();
        let jwk = key.public_jwk();
        let mut members: Vec<_> = jwk.as_object().unwrap().keys().map(String::as_str).collect();
        members.sort_unstable();
        assert_eq!(members, ["alg", "crv", "kid", "kty", "use", "x", "y"], "no private `d`");
        assert_eq!(jwk["kid"], key.kid());
        assert_eq!(point(&jwk).len(), 65);
    }

    #[test]
    fn survives_saving_in_a_file_of_mode_0600() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("signing.key");
        let key = SigningKey::load_or_generate(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        let again = SigningKey::load_or_generate(&path).unwrap();
        assert_eq!(key.kid(), again.kid());
        let public = UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point(&key.public_jwk()));
        assert!(public.verify(b"x", &again.sign(b"x").unwrap()).is_ok());
    }

    #[test]
    fn a_file_open_to_others_or_with_something_else_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("signing.key");
        SigningKey::generate().unwrap().save(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        let refused = SigningKey::load_or_generate(&path);
        assert!(matches!(refused, Err(SigningKeyError::File(FileError::OpenToOthers { .. }))));

        write_private(&path, b"hunter2").unwrap();
        let refused = SigningKey::load_or_generate(&path).unwrap_err();
        assert!(!refused.to_string().contains("hunter2"));
        assert!(matches!(refused, SigningKeyError::Unreadable(_)), "and it is not overwritten");
        assert_eq!(fs::read(&path).unwrap(), b"hunter2");
        assert!(SigningKey::load(&folder.path().join("absent")).is_err());
    }

    #[test]
    fn prints_its_name_only_k_3() {
        let key = SigningKey::generate().unwrap();
        assert_eq!(format!("{key:?}"), format!("SigningKey(kid {}, ..)", key.kid()));
    }
}
