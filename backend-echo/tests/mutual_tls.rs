//! Over TCP, only the gateway's certificate gets in: right authority and right name.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test that meets the unexpected has failed"
)]

mod common;

use std::path::Path;
use std::sync::Arc;

use backend_echo::{Listen, Options, serve};
use common::{DEADLINE, until};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    fn issue(&self, folder: &Path, name: &str) {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(folder.join(format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    }
}

/// The status of `/healthz`, or why there is none.
async fn ask(port: u16, authority: &Authority, client: Option<(&Path, &str)>) -> Result<u16, String> {
    let provider = sealgate_keys::provider(&sealgate_keys::ProviderChoice::default());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(authority.issuer.der().clone()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match client {
        None => config.with_no_client_auth(),
        Some((folder, name)) => {
            let chain = CertificateDer::from_pem_file(folder.join(format!("{name}.pem"))).unwrap();
            let key = PrivateKeyDer::from_pem_file(folder.join(format!("{name}.key"))).unwrap();
            config.with_client_auth_cert(vec![chain], key).unwrap()
        }
    };
    let stream = TcpStream::connect(("127.0.0.1", port)).await.map_err(|e| e.to_string())?;
    let name = "backend.internal".try_into().unwrap();
    let stream =
        TlsConnector::from(Arc::new(config)).connect(name, stream).await.map_err(|e| e.to_string())?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    tokio::spawn(connection);
    let request =
        http::Request::get("/healthz").header("host", "b").body(Empty::<bytes::Bytes>::new()).unwrap();
    let response = sender.send_request(request).await.map_err(|e| format!("{e:?}"))?;
    let status = response.status().as_u16();
    response.into_body().collect().await.map_err(|e| e.to_string())?;
    Ok(status)
}

#[tokio::test]
async fn only_the_gateways_certificate_gets_in() {
    let folder = tempfile::tempdir().unwrap();
    let files = folder.path();
    let (ours, theirs) = (Authority::new(), Authority::new());
    for name in ["backend.internal", "gateway.internal", "intern.internal"] {
        ours.issue(files, name);
    }
    let strange = files.join("strange");
    std::fs::create_dir(&strange).unwrap();
    theirs.issue(&strange, "gateway.internal");
    std::fs::write(files.join("ca.pem"), ours.issuer.pem()).unwrap();

    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let options = Options {
        listen: vec![Listen::Tls(([127, 0, 0, 1], port).into())],
        cert: Some(files.join("backend.internal.pem")),
        key: Some(files.join("backend.internal.key")),
        client_ca: Some(files.join("ca.pem")),
        client_name: Some("gateway.internal".to_owned()),
        ..Options::development(&files.join("state"))
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(serve(options.clone(), async { drop(stopped.await) }));
    until("it listens", async || TcpStream::connect(("127.0.0.1", port)).await.is_ok()).await;

    assert_eq!(ask(port, &ours, Some((files, "gateway.internal"))).await, Ok(200));
    assert!(ask(port, &ours, None).await.is_err(), "no certificate");
    assert!(ask(port, &ours, Some((files, "intern.internal"))).await.is_err(), "another name");
    assert!(ask(port, &ours, Some((&strange, "gateway.internal"))).await.is_err(), "another authority");
    stop.send(()).unwrap();
    tokio::time::timeout(DEADLINE, serving).await.unwrap().unwrap().unwrap();

    // Half a configuration is none.
    for incomplete in [
        Options { cert: None, ..options.clone() },
        Options { key: None, ..options.clone() },
        Options { client_ca: None, ..options.clone() },
        Options { client_name: None, ..options.clone() },
        Options { client_name: Some("not a name".to_owned()), ..options.clone() },
        Options { client_ca: Some(files.join("gateway.internal.key")), ..options },
    ] {
        let error = tokio::time::timeout(DEADLINE, serve(incomplete, std::future::pending())).await.unwrap();
        assert!(error.is_err());
    }
}
