//! Every key and certificate that sealgate holds: where it comes from, how it is stored, chosen,
//! rotated and erased.
//!
//! | what | where |
//! |---|---|
//! | which cryptography TLS may use, and from which library | [`provider()`], [`ProviderChoice`] |
//! | server certificates, chosen by SNI and signature scheme | [`CertificateStore`] |
//! | the TLS configuration made of them | [`server_config`] |
//! | session tickets, TLS 1.3 only | [`TicketKeys`] |
//! | a development authority and its certificates | [`dev::DevAuthority`] |
//! | token signing, ES256 | [`SigningKey`] |
//! | sealing of data at rest, AES-256-GCM | [`DataKey`] |
//! | files that nobody else may read | [`private_dir`], [`write_private`], [`read_private`] |
//!
//! Secrets are erased when they are dropped, and print as `Name(..)`.

mod aead;
mod data;
pub mod dev;
mod files;
mod provider;
mod random;
mod server;
mod signing;
mod store;
#[cfg(test)]
mod testing;
mod tickets;

pub use data::{DataKey, DataKeyError, UnsealError};
pub use files::{FileError, private_dir, read_private, write_private};
pub use provider::{ProviderChoice, install_default_provider, provider};
pub use random::CryptoError;
pub use server::server_config;
pub use signing::{SigningKey, SigningKeyError};
pub use store::{CertificateEntry, CertificateError, CertificateFault, CertificateStore};
pub use tickets::TicketKeys;
