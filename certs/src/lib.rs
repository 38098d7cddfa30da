//! Every key and certificate that sealgate holds: where it comes from, how it is stored, chosen,
//! rotated and erased.
//!
//! | what | where |
//! |---|---|
//! | which cryptography TLS may use, and from which library | [`provider()`], [`ProviderChoice`] |
//! | server certificates, chosen by SNI and signature scheme | [`CertificateStore`] |
//! | the TLS configuration made of them | [`server_config`] |
//! | which client certificates are good | [`ClientTrust`] |
//! | session tickets, TLS 1.3 only | [`TicketKeys`] |
//! | a development authority and its certificates | [`dev::DevAuthority`] |
//! | token signing, ES256 | [`SigningKey`] |
//! | sealing of data at rest, AES-256-GCM | [`DataKey`] |
//! | files that nobody else may read | [`private_dir`], [`write_private`], [`read_private`] |
//!
//! Secrets are erased when they are dropped, and print as `Name(..)`.
//!
//! ```
//! use std::{fs, sync::Arc, time::SystemTime};
//! use sealgate_keys::{CertificateEntry, CertificateStore, ClientTrust, ProviderChoice, TicketKeys};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let state = tempfile::tempdir()?;
//! let files = sealgate_keys::dev::DevAuthority::open_or_create(&state.path().join("certs"), &["chat.test"])?;
//! let entry = CertificateEntry {
//!     names: vec!["localhost".into(), "chat.test".into()],
//!     chain_pem: fs::read(files.chain)?,
//!     key_pem: sealgate_keys::read_private(&files.key)?,
//! };
//! let provider = sealgate_keys::provider(&ProviderChoice::default());
//! let store = CertificateStore::build(vec![entry], &provider, SystemTime::now())
//!     .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))?;
//! let versions = [&rustls::version::TLS13, &rustls::version::TLS12];
//! let tickets = Some(TicketKeys::new()?);
//! let config =
//!     sealgate_keys::server_config(Arc::new(store), provider, &versions, tickets, &[b"h2"], &ClientTrust::none())?;
//! assert_eq!(config.max_early_data_size, 0);
//! # Ok(())
//! # }
//! ```

mod acme;
mod aead;
mod client;
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

pub use acme::{ACME_TLS, AcmeKeyError, CertificateRequest, certificate_request, validation_config};
pub use client::{ClientDemand, ClientFacts, ClientTrust, ClientTrustError};
pub use data::{DataKey, DataKeyError, UnsealError};
pub use files::{FileError, private_dir, read_private, write_private};
pub use provider::{GROUPS, ProviderChoice, chacha_first, install_default_provider, is_chacha, provider};
pub use random::CryptoError;
pub use server::{ServerConfigs, server_config};
pub use signing::{SigningKey, SigningKeyError};
pub use store::{CertificateEntry, CertificateError, CertificateFault, CertificateInfo, CertificateStore};
pub use tickets::TicketKeys;
