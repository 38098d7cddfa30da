//! Mutual TLS for listeners that are not a unix socket: only the gateway's certificate gets in.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, anyhow};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::verify_server_name;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};
use tokio_rustls::TlsAcceptor;

use crate::options::Options;

/// # Errors
/// If one of the four options is missing, or its file is not what it should be. There is no way to leave the client
/// certificate out: without it anyone could claim any identity.
pub(crate) fn acceptor(options: &Options) -> anyhow::Result<TlsAcceptor> {
    let chain = certificates(needed(&options.cert, "--cert")?)?;
    let key = needed(&options.key, "--key")?;
    let key =
        PrivateKeyDer::from_pem_file(key).with_context(|| format!("no private key in {}", key.display()))?;
    let name = options.client_name.clone().context("tls: listeners need --client-name")?;
    let name = ServerName::try_from(name).context("--client-name is not a DNS name")?;

    let provider = provider();
    let mut roots = RootCertStore::empty();
    for authority in certificates(needed(&options.client_ca, "--client-ca")?)? {
        roots.add(authority).context("--client-ca holds a certificate that is no authority")?;
    }
    let inner = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone()).build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(Arc::new(OnlyTheGateway { inner, name }))
        .with_single_cert(chain, key)
        .context("--cert and --key do not fit")?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

pub(crate) fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    sealgate_keys::provider(&sealgate_keys::ProviderChoice::default())
}

pub(crate) fn certificates(path: &Path) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let file = || path.display().to_string();
    let chain = CertificateDer::pem_file_iter(path).with_context(|| format!("cannot read {}", file()))?;
    let chain = chain.collect::<Result<Vec<_>, _>>().with_context(|| format!("{} is not PEM", file()))?;
    if chain.is_empty() { Err(anyhow!("no certificate in {}", file())) } else { Ok(chain) }
}

fn needed<'o>(option: &'o Option<PathBuf>, name: &str) -> anyhow::Result<&'o Path> {
    option.as_deref().with_context(|| format!("tls: listeners need {name}"))
}

/// A good certificate of the right authority is not enough: the name in it must be the gateway's.
#[derive(Debug)]
struct OnlyTheGateway {
    inner: Arc<dyn ClientCertVerifier>,
    name: ServerName<'static>,
}

impl ClientCertVerifier for OnlyTheGateway {
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.inner.verify_client_cert(end_entity, intermediates, now)?;
        verify_server_name(&ParsedCertificate::try_from(end_entity)?, &self.name)
            .map_err(|_| Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))?;
        Ok(verified)
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.inner.root_hint_subjects()
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}
