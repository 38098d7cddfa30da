//! The TLS configuration of a listener.

use std::sync::Arc;

use rustls::compress::CompressionCache;
use rustls::crypto::CryptoProvider;
use rustls::server::NoServerSessionStorage;
use rustls::{ServerConfig, SupportedProtocolVersion};

use crate::{CertificateStore, TicketKeys};

/// Tickets after a full TLS 1.3 handshake: two, so that a browser's second connection resumes as well.
const TICKETS_PER_HANDSHAKE: usize = 2;

/// The TLS configuration of a listener, without client certificates.
///
/// - **0-RTT is off**: early data can be replayed (RFC 8446 §8).
/// - **TLS 1.3 resumes** by stateless tickets if `tickets` are given, always with a fresh key exchange.
/// - **TLS 1.2 never resumes.** A ticket key shared by its sessions would undo their forward secrecy. A store of
///   sessions by id would keep their master secrets in memory long after the connections, would have to be
///   shared by all cores, and could be filled by strangers. The few clients left on 1.2 pay a full handshake instead.
/// - **Nothing is cached per connection**, so that an idle one stays small.
///
/// `versions` is any of [`rustls::version::TLS12`] and [`rustls::version::TLS13`]; older ones do not exist in rustls.
/// One configuration serves both, because only then does a TLS 1.2 answer carry the downgrade sentinel (RFC 8446 §4.1.3).
/// `alpn` lists protocols, the most wanted first; a client that shares none is refused (RFC 7301 §3.2).
///
/// # Errors
/// `provider` has no suite or no key exchange group for one of `versions`.
pub fn server_config(
    store: Arc<CertificateStore>,
    provider: Arc<CryptoProvider>,
    versions: &[&'static SupportedProtocolVersion],
    tickets: Option<Arc<TicketKeys>>,
    alpn: &[&[u8]],
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)?
        .with_no_client_auth()
        .with_cert_resolver(store);
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.max_early_data_size = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    if let Some(tickets) = tickets {
        config.ticketer = tickets;
        config.send_tls13_tickets = TICKETS_PER_HANDSHAKE;
        // Lets a client ask for fewer (RFC 9149), never for more.
        config.max_tls13_tickets = TICKETS_PER_HANDSHAKE;
    }
    config.cert_compression_cache = Arc::new(CompressionCache::Disabled);
    Ok(config)
}
