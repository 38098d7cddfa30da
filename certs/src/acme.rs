//! Keys and certificates of ACME (RFC 8555): requests for a certificate, and those that prove control of a name (RFC 8737).

use std::sync::Arc;

use rcgen::{CertificateParams, CustomExtension, DistinguishedName, IsCa, KeyPair};
use rustls::ServerConfig;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::{TLS12, TLS13};
use zeroize::Zeroizing;

/// The protocol by which ACME servers validate names over TLS (RFC 8737 §6.2).
pub const ACME_TLS: &[u8] = b"acme-tls/1";

/// A request for a certificate, and the key that it is for.
pub struct CertificateRequest {
    /// The request (RFC 2986), DER.
    pub der: Vec<u8>,
    /// The key, PKCS#8 in PEM: ECDSA P-256, fresh.
    pub key_pem: Zeroizing<String>,
}

/// Why nothing could be made.
#[derive(Debug, thiserror::Error)]
pub enum AcmeKeyError {
    /// A name is no DNS name, or the system gave no random bytes.
    #[error("cannot make a key or certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// TLS did not take it.
    #[error("cannot use a certificate: {0}")]
    Tls(#[from] rustls::Error),
}

/// Asks for a certificate for `names`, with a key of its own.
///
/// # Errors
/// See [`AcmeKeyError`].
pub fn certificate_request(names: &[String]) -> Result<CertificateRequest, AcmeKeyError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = DistinguishedName::new();
    let der = params.serialize_request(&key)?.der().to_vec();
    Ok(CertificateRequest { der, key_pem: Zeroizing::new(key.serialize_pem()) })
}

/// TLS that shows an ACME server that `name` is ours, and is good for nothing else (RFC 8737 §3). `digest` is SHA-256 over the key
/// authorization.
///
/// # Errors
/// See [`AcmeKeyError`].
pub fn validation_config(
    name: &str,
    digest: &[u8; 32],
    provider: Arc<CryptoProvider>,
) -> Result<Arc<ServerConfig>, AcmeKeyError> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new([name.to_owned()])?;
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.custom_extensions = vec![CustomExtension::new_acme_identifier(digest)];
    let certificate = params.self_signed(&key)?;
    let der = Zeroizing::new(key.serialize_der());
    let signing = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(der.to_vec()));
    let signing = provider.key_provider.load_private_key(signing)?;
    let certified = CertifiedKey::new(vec![certificate.der().clone()], signing);
    let resolver: Arc<dyn ResolvesServerCert> = Arc::new(SingleCertAndKey::from(certified));
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13, &TLS12])?
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![ACME_TLS.to_vec()];
    // One handshake, and nothing is to be resumed.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use x509_parser::prelude::{FromDer, X509Certificate, X509CertificationRequest};

    use super::*;
    use crate::testing::any_provider;

    #[test]
    fn a_request_is_for_all_its_names_and_for_a_key_of_its_own() {
        let names = ["chat.example".to_owned(), "www.chat.example".to_owned()];
        let request = certificate_request(&names).unwrap();
        let (_, parsed) = X509CertificationRequest::from_der(&request.der).unwrap();
        let text = format!("{:?}", parsed.requested_extensions().unwrap().collect::<Vec<_>>());
        assert!(text.contains("\"chat.example\"") && text.contains("\"www.chat.example\""), "{text}");
        let again = certificate_request(&names).unwrap();
        assert_ne!(*request.key_pem, *again.key_pem);
        assert!(certificate_request(&["k\u{f6}ln.example".to_owned()]).is_err());
    }

    /// RFC 8737 §3: one name, and the digest as an octet string in a critical extension.
    #[test]
    fn what_validates_a_name_says_the_digest_critically() {
        let digest = [7; 32];
        let config = validation_config("chat.example", &digest, any_provider()).unwrap();
        assert_eq!(config.alpn_protocols, [ACME_TLS]);
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(["chat.example".to_owned()]).unwrap();
        params.custom_extensions = vec![CustomExtension::new_acme_identifier(&digest)];
        let certificate = params.self_signed(&key).unwrap();
        let (_, parsed) = X509Certificate::from_der(certificate.der()).unwrap();
        let extension =
            parsed.extensions().iter().find(|it| it.oid.to_id_string() == "1.3.6.1.5.5.7.1.31").unwrap();
        assert!(extension.critical);
        assert_eq!(extension.value, [&[4, 32][..], &digest].concat());
    }
}
