//! Random bytes, from the operating system's generator alone (`getrandom(2)` through ring).

use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

/// The system's random generator, or the cryptographic library, failed.
///
/// Nothing was made or sealed. There is no weaker fallback: try again, or stop.
#[derive(Debug, thiserror::Error)]
#[error("the system's random generator or the cryptographic library failed")]
pub struct CryptoError;

impl From<ring::error::Unspecified> for CryptoError {
    fn from(_: ring::error::Unspecified) -> Self {
        Self
    }
}

impl From<aws_lc_rs::error::Unspecified> for CryptoError {
    fn from(_: aws_lc_rs::error::Unspecified) -> Self {
        Self
    }
}

/// `N` fresh random bytes, erased when dropped.
pub(crate) fn bytes<const N: usize>() -> Result<Zeroizing<[u8; N]>, CryptoError> {
    let mut bytes = Zeroizing::new([0; N]);
    SystemRandom::new().fill(bytes.as_mut_slice())?;
    Ok(bytes)
}
