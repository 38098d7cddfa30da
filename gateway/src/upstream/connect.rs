//! Opening a connection to an endpoint: unix socket, TCP or TLS.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use ring::digest;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use sealgate_policy as policy;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
};

use super::{Address, Endpoint, EndpointTls, ReadSource, Upstream};
use crate::tls::ClientStream;

/// A connection to a backend.
pub enum UpstreamStream {
    /// On the same machine, guarded by file permissions.
    Unix(UnixStream),
    /// Plain TCP.
    Tcp(TcpStream),
    /// TLS, the server's certificate verified.
    Tls(ClientStream<TcpStream>),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The upstream's `connect_timeout` passed.
    #[error("no connection within the time allowed")]
    TimedOut,
    /// The system or TLS said no.
    #[error("no connection: {0}")]
    Io(#[from] io::Error),
}

impl ConnectError {
    /// Whether this machine is at fault, and not the endpoint: it has no descriptor or port left.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        use rustix::io::Errno;
        let ours = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ADDRNOTAVAIL];
        match self {
            Self::TimedOut => false,
            Self::Io(error) => Errno::from_io_error(error).is_some_and(|errno| ours.contains(&errno)),
        }
    }
}

impl Upstream {
    /// Connects to `endpoint` within the upstream's `connect_timeout`.
    ///
    /// # Errors
    ///
    /// Refused, unreachable, untrusted or too slow; another endpoint may do better.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<UpstreamStream, ConnectError> {
        tokio::time::timeout(self.connect_timeout, endpoint.open())
            .await
            .map_err(|_| ConnectError::TimedOut)?
            .map_err(ConnectError::Io)
    }
}

impl Endpoint {
    async fn open(&self) -> io::Result<UpstreamStream> {
        let tcp = match &self.address {
            Address::Unix(path) => return Ok(UpstreamStream::Unix(UnixStream::connect(path).await?)),
            Address::Tcp(address) => TcpStream::connect(address).await?,
        };
        tcp.set_nodelay(true)?;
        match &self.tls {
            None => Ok(UpstreamStream::Tcp(tcp)),
            Some(tls) => {
                let stream = ClientStream::connect(tls.config.clone(), tls.server_name.clone(), tcp).await?;
                Ok(UpstreamStream::Tls(stream))
            }
        }
    }
}

/// The client configuration of an upstream, and a fingerprint of what went into it.
pub(super) fn client_tls(
    tls: &policy::UpstreamTls,
    read: &ReadSource<'_>,
) -> Result<(EndpointTls, String), String> {
    let mut material = digest::Context::new(&digest::SHA256);
    material.update(tls.server_name.as_bytes());
    let mut roots = RootCertStore::empty();
    match &tls.ca {
        Some(ca) => {
            let pem = read(ca)?;
            material.update(&pem);
            for certificate in CertificateDer::pem_slice_iter(&pem) {
                let certificate = certificate.map_err(|error| format!("ca: {error}"))?;
                roots.add(certificate).map_err(|error| format!("ca: {error}"))?;
            }
            if roots.is_empty() {
                return Err("ca: holds no certificate".to_owned());
            }
        }
        None => {
            let native = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(native.certs);
            if roots.is_empty() {
                return Err("the system has no trusted certificates; name a `ca`".to_owned());
            }
        }
    }
    let builder = ClientConfig::builder().with_root_certificates(roots);
    let mut config = match (&tls.client_certificate, &tls.client_key) {
        (Some(certificate), Some(key)) => {
            let chain = read(certificate)?;
            material.update(&chain);
            let chain = CertificateDer::pem_slice_iter(&chain)
                .collect::<Result<Vec<_>, _>>()
                .map_err(|error| format!("client_certificate: {error}"))?;
            let key = zeroize::Zeroizing::new(read(key)?);
            let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| format!("client_key: {error}"))?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|error| format!("client_certificate: {error}"))?
        }
        (None, None) => builder.with_no_client_auth(),
        _ => return Err("client_certificate and client_key belong together".to_owned()),
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let server_name = ServerName::try_from(tls.server_name.clone())
        .map_err(|_| format!("server_name: `{}` is not a host name", tls.server_name))?;
    let fingerprint = material.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((EndpointTls { config: Arc::new(config), server_name }, fingerprint))
}

impl AsyncRead for UpstreamStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tcp(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for UpstreamStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tcp(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tcp(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Unix(stream) => stream.is_write_vectored(),
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
