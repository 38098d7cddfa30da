//! What the tests of several modules share: an authority, a clock, and TLS handshakes in memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519,
    PKCS_RSA_SHA256, SignatureAlgorithm,
};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::SigningKey;
use rustls::time_provider::TimeProvider;
use rustls::{
    ClientConfig, ClientConnection, Error, HandshakeKind, ProtocolVersion, RootCertStore, ServerConfig,
    ServerConnection, SupportedProtocolVersion,
};
use zeroize::Zeroizing;

use crate::{CertificateEntry, ProviderChoice, provider};

pub(crate) const ECDSA: &SignatureAlgorithm = &PKCS_ECDSA_P256_SHA256;
pub(crate) const RSA: &SignatureAlgorithm = &PKCS_RSA_SHA256;
pub(crate) const ED25519: &SignatureAlgorithm = &PKCS_ED25519;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// An authority without constraints, and its clock-free certificates.
pub(crate) struct Authority {
    pub(crate) certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "test authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap().der().clone();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// A certificate for `names`, valid for a day on both sides of now.
    pub(crate) fn entry(&self, names: &[&str], kind: &'static SignatureAlgorithm) -> CertificateEntry {
        let now = SystemTime::now();
        self.entry_valid(names, kind, now - DAY, now + DAY)
    }

    pub(crate) fn entry_valid(
        &self,
        names: &[&str],
        kind: &'static SignatureAlgorithm,
        from: SystemTime,
        to: SystemTime,
    ) -> CertificateEntry {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names.clone()).unwrap();
        params.not_before = from.into();
        params.not_after = to.into();
        let key = KeyPair::generate_for(kind).unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        CertificateEntry {
            names,
            chain_pem: certificate.pem().into_bytes(),
            key_pem: Zeroizing::new(key.serialize_pem().into_bytes()),
        }
    }

    pub(crate) fn pem(&self) -> String {
        let body = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, &self.certificate);
        format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
    }

    /// A client's certificate for one DNS name, which is its common name too, and its key.
    pub(crate) fn client_pair(&self, name: &str) -> (CertificateDer<'static>, Arc<dyn SigningKey>) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let der = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        (certificate.der().clone(), any_provider().key_provider.load_private_key(der).unwrap())
    }

    pub(crate) fn client_leaf(&self, name: &str) -> CertificateDer<'static> {
        self.client_pair(name).0
    }

    /// A revocation list, DER, good from `now` for two days.
    pub(crate) fn revoke(&self, revoked: &[&CertificateDer<'_>], now: SystemTime) -> Vec<u8> {
        let serial = |der: &&CertificateDer<'_>| {
            let (_, parsed) = x509_parser::parse_x509_certificate(der).unwrap();
            rcgen::SerialNumber::from_slice(parsed.raw_serial())
        };
        let revoked = revoked.iter().map(serial).map(|serial_number| rcgen::RevokedCertParams {
            serial_number,
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        });
        let params = rcgen::CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + 2 * DAY).into(),
            crl_number: rcgen::SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: rcgen::KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().der().to_vec()
    }

    /// A client that trusts this authority and offers what `provider` has.
    pub(crate) fn client(
        &self,
        provider: Arc<CryptoProvider>,
        versions: &[&'static SupportedProtocolVersion],
    ) -> ClientConfig {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth()
    }
}

pub(crate) fn any_provider() -> Arc<CryptoProvider> {
    provider(&ProviderChoice::default())
}

/// A clock that stands still until told otherwise.
#[derive(Debug)]
pub(crate) struct Clock(AtomicU64);

impl Clock {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(1_800_000_000)))
    }

    pub(crate) fn advance(&self, seconds: u64) {
        self.0.fetch_add(seconds, Ordering::Relaxed);
    }

    pub(crate) fn set_back(&self, seconds: u64) {
        self.0.fetch_sub(seconds, Ordering::Relaxed);
    }
}

impl TimeProvider for Clock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_secs(self.0.load(Ordering::Relaxed))))
    }
}

pub(crate) fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

/// Both ends after a handshake in memory, and what the server said.
#[derive(Debug)]
pub(crate) struct Handshake {
    pub(crate) client: ClientConnection,
    pub(crate) server: ServerConnection,
    /// The server's bytes up to the end of the handshake, as on the wire.
    pub(crate) from_server: Vec<u8>,
}

impl Handshake {
    pub(crate) fn kind(&self) -> HandshakeKind {
        let kind = self.server.handshake_kind().unwrap();
        assert_eq!(self.client.handshake_kind(), Some(kind));
        kind
    }

    pub(crate) fn resumed(&self) -> bool {
        self.kind() == HandshakeKind::Resumed
    }

    pub(crate) fn version(&self) -> ProtocolVersion {
        self.server.protocol_version().unwrap()
    }

    /// The server's certificate, as the client got it.
    pub(crate) fn certificate(&self) -> &CertificateDer<'static> {
        &self.client.peer_certificates().unwrap()[0]
    }
}

/// A handshake for `name`, until neither side has anything to say; the first error of either side.
pub(crate) fn handshake(
    client: &Arc<ClientConfig>,
    server: &Arc<ServerConfig>,
    name: &str,
) -> Result<Handshake, Error> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(Arc::clone(client), name)?;
    let mut server = ServerConnection::new(Arc::clone(server))?;
    let mut from_server = Vec::new();
    while client.wants_write() || server.wants_write() {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut bytes = bytes.as_slice();
        while !bytes.is_empty() {
            server.read_tls(&mut bytes).unwrap();
            server.process_new_packets()?;
        }
        let mut bytes = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        from_server.extend_from_slice(&bytes);
        let mut bytes = bytes.as_slice();
        while !bytes.is_empty() {
            client.read_tls(&mut bytes).unwrap();
            client.process_new_packets()?;
        }
    }
    assert!(!client.is_handshaking() && !server.is_handshaking());
    Ok(Handshake { client, server, from_server })
}
