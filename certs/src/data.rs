//! Sealing of data at rest: AES-256-GCM with a key of its own for every record (requirement D-2).

use std::fmt;
use std::path::Path;

use ring::hkdf::{HKDF_SHA256, KeyType, Salt};
use zeroize::Zeroizing;

use crate::aead::{AeadKey, KEY_LEN};
use crate::files::{FileError, read_private, write_private};
use crate::random::{self, CryptoError};

/// The form of sealed data, its first byte.
const VERSION: u8 = 1;
const KEY_ID_LEN: usize = 8;
const SALT_LEN: usize = 16;

/// A 256-bit key that seals data at rest.
///
/// Each record gets a key of its own by HKDF-SHA256 (RFC 5869) with a random salt, so one `DataKey` may seal any
/// number of records. Sealed data is: version (1 byte), key id (8), salt (16), nonce (12), ciphertext, tag (16).
/// Associated data ties it to its place: give table, column, row and class, and a sealed value that was moved
/// elsewhere does not open.
pub struct DataKey {
    secret: Zeroizing<[u8; KEY_LEN]>,
    id: [u8; KEY_ID_LEN],
}

/// A data key cannot be made, read or stored.
#[derive(Debug, thiserror::Error)]
pub enum DataKeyError {
    /// The key could not be made.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The file does not hold exactly 32 bytes.
    #[error("a data key has {KEY_LEN} bytes, not {0}")]
    Length(usize),
}

/// Sealed data does not open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnsealError {
    /// Too short, or of a version that this program does not know.
    #[error("not sealed data, or of a later version")]
    Malformed,
    /// Sealed with another key: find that one by its id.
    #[error("sealed with another key")]
    OtherKey,
    /// Altered, or sealed for another place (other associated data).
    #[error("altered, or sealed for another place")]
    Altered,
}

impl DataKey {
    /// A fresh key.
    pub fn generate() -> Result<Self, CryptoError> {
        Self::from_secret(random::bytes()?)
    }

    /// A key kept elsewhere: exactly 32 bytes.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DataKeyError> {
        let secret: [u8; KEY_LEN] = bytes.try_into().map_err(|_| DataKeyError::Length(bytes.len()))?;
        Ok(Self::from_secret(Zeroizing::new(secret))?)
    }

    /// Reads what [`save`](Self::save) wrote. The file must be closed to other users.
    pub fn load(path: &Path) -> Result<Self, DataKeyError> {
        Self::from_bytes(&read_private(path)?)
    }

    /// Writes the key's 32 bytes, mode 0600.
    pub fn save(&self, path: &Path) -> Result<(), DataKeyError> {
        Ok(write_private(path, self.secret.as_slice())?)
    }

    /// Reads the key at `path`; makes and saves one if there is no file.
    pub fn load_or_generate(path: &Path) -> Result<Self, DataKeyError> {
        if path.exists() {
            return Self::load(path);
        }
        let key = Self::generate()?;
        key.save(path)?;
        Ok(key)
    }

    /// Names the key, and tells nothing about it: 8 bytes derived from it.
    pub fn id(&self) -> [u8; 8] {
        self.id
    }

    /// Seals `plaintext` for the place that `associated` describes.
    pub fn seal(&self, associated: &[u8], plaintext: &[u8]) -> Result<Vec<u8>, CryptoError> {
        let salt = random::bytes::<SALT_LEN>()?;
        let head = [&[VERSION], self.id.as_slice(), salt.as_slice()].concat();
        let sealed = self.record_key(&salt)?.seal(&bound(&head, associated), &[plaintext])?;
        Ok([head, sealed].concat())
    }

    /// The plaintext of `sealed`, erased when dropped.
    pub fn unseal(&self, associated: &[u8], sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, UnsealError> {
        let head_len = 1 + KEY_ID_LEN + SALT_LEN;
        let (head, ciphertext) = sealed.split_at_checked(head_len).ok_or(UnsealError::Malformed)?;
        let Some((&VERSION, rest)) = head.split_first() else {
            return Err(UnsealError::Malformed);
        };
        let (id, salt) = rest.split_first_chunk::<KEY_ID_LEN>().ok_or(UnsealError::Malformed)?;
        if *id != self.id {
            return Err(UnsealError::OtherKey);
        }
        let salt = salt.try_into().map_err(|_| UnsealError::Malformed)?;
        let key = self.record_key(salt).map_err(|_| UnsealError::Altered)?;
        key.open(&bound(head, associated), ciphertext).ok_or(UnsealError::Altered)
    }

    fn record_key(&self, salt: &[u8; SALT_LEN]) -> Result<AeadKey, CryptoError> {
        AeadKey::new(&*derive::<KEY_LEN>(&self.secret, salt, b"sealgate data record v1")?)
    }

    fn from_secret(secret: Zeroizing<[u8; KEY_LEN]>) -> Result<Self, CryptoError> {
        let id = *derive::<KEY_ID_LEN>(&secret, &[], b"sealgate data key id v1")?;
        Ok(Self { secret, id })
    }
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(..)")
    }
}

/// The head is authenticated too, and has a fixed length, so the border between both parts is clear.
fn bound(head: &[u8], associated: &[u8]) -> Vec<u8> {
    [head, associated].concat()
}

/// HKDF-SHA256 (RFC 5869).
fn derive<const N: usize>(
    secret: &[u8; KEY_LEN],
    salt: &[u8],
    info: &[u8],
) -> Result<Zeroizing<[u8; N]>, CryptoError> {
    struct Length(usize);
    impl KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let mut output = Zeroizing::new([0; N]);
    Salt::new(HKDF_SHA256, salt).extract(secret).expand(&[info], Length(N))?.fill(output.as_mut_slice())?;
    Ok(output)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const PLACE: &[u8] = b"users/email/17";

    #[test]
    fn opens_in_its_place_only_d_2() {
        let key = DataKey::generate().unwrap();
        let sealed = key.seal(PLACE, b"canary").unwrap();
        assert!(!sealed.windows(6).any(|window| window == b"canary"));
        assert_eq!(key.unseal(PLACE, &sealed).unwrap().as_slice(), b"canary");
        assert_eq!(key.unseal(b"users/email/18", &sealed), Err(UnsealError::Altered));
        let empty = key.seal(b"", b"").unwrap();
        assert!(key.unseal(b"", &empty).unwrap().is_empty());
    }

    #[test]
    fn any_altered_byte_is_noticed() {
        let key = DataKey::generate().unwrap();
        let sealed = key.seal(PLACE, b"canary").unwrap();
        for at in 0..sealed.len() {
            let mut altered = sealed.clone();
            altered[at] ^= 1;
            let expected = match at {
                0 => UnsealError::Malformed,
                1..=8 => UnsealError::OtherKey,
                _ => UnsealError::Altered,
            };
            assert_eq!(key.unseal(PLACE, &altered), Err(expected), "byte {at}");
            assert!(key.unseal(PLACE, &sealed[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn another_key_is_told_from_altered_data() {
        let (key, other) = (DataKey::generate().unwrap(), DataKey::generate().unwrap());
        assert_ne!(key.id(), other.id());
        let sealed = key.seal(PLACE, b"canary").unwrap();
        assert_eq!(sealed[1..9], key.id());
        assert_eq!(other.unseal(PLACE, &sealed), Err(UnsealError::OtherKey));
    }

    #[test]
    fn equal_records_seal_differently() {
        let key = DataKey::generate().unwrap();
        assert_ne!(key.seal(PLACE, b"x").unwrap()[9..], key.seal(PLACE, b"x").unwrap()[9..]);
    }

    #[test]
    fn the_form_of_sealed_data_does_not_change() {
        // Sealed by Python's `cryptography`, following the description above, with the key 00 01 … 1f.
        let key = DataKey::from_bytes(&(0..32).collect::<Vec<u8>>()).unwrap();
        let sealed = hex(concat!(
            "01ccb30384f1150323404142434445464748494a4b4c4d4e4f808182838485868788898a8b",
            "f44426c78e8ea9a3d3a28567a90524f170d64c04e82d",
        ));
        assert_eq!(key.unseal(PLACE, &sealed).unwrap().as_slice(), b"canary");
    }

    #[test]
    fn survives_saving_in_a_file_of_mode_0600() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data.key");
        let key = DataKey::load_or_generate(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
        let sealed = key.seal(PLACE, b"canary").unwrap();
        let again = DataKey::load_or_generate(&path).unwrap();
        assert_eq!(again.unseal(PLACE, &sealed).unwrap().as_slice(), b"canary");

        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let refused = DataKey::load_or_generate(&path);
        assert!(matches!(refused, Err(DataKeyError::File(FileError::OpenToOthers { .. }))));
    }

    #[test]
    fn short_and_long_keys_are_refused_k_1() {
        for length in [0, 16, 31, 33, 64] {
            let refused = DataKey::from_bytes(&vec![1; length]);
            assert!(matches!(refused, Err(DataKeyError::Length(found)) if found == length));
        }
        assert!(DataKey::from_bytes(&[1; 32]).is_ok());
    }

    #[test]
    fn prints_nothing_k_3() {
        assert_eq!(format!("{:?}", DataKey::generate().unwrap()), "DataKey(..)");
    }

    fn hex(digits: &str) -> Vec<u8> {
        let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
        (0..digits.len()).step_by(2).map(byte).collect()
    }
}
