//! Listening, accepting, and stopping in order.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;

use crate::hub::Hub;
use crate::options::{Listen, Options};
use crate::store::Store;
use crate::tokens::Tokens;
use crate::{routes, tls};

/// Connections and open WebSockets at one time; further ones wait to be accepted.
const MAX_CONNECTIONS: u32 = 65_536;
/// How long a TLS handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// How often what has expired is deleted.
const SWEEP: Duration = Duration::from_secs(3600);

/// What every request may reach.
pub(crate) struct Backend {
    pub(crate) store: Store,
    pub(crate) tokens: Tokens,
    pub(crate) hub: Hub,
    /// Whether the development login is offered.
    pub(crate) development: bool,
    stopping: watch::Receiver<bool>,
}

impl Backend {
    /// Resolves once the server stops.
    pub(crate) async fn stopping(&self) {
        let mut stopping = self.stopping.clone();
        // An error means that the server is gone: then it has stopped, too.
        let _ = stopping.wait_for(|stopping| *stopping).await;
    }
}

/// Held while a connection, or the WebSocket it became, is open.
pub(crate) type Open = Arc<OwnedSemaphorePermit>;

/// Serves until `shutdown` resolves; then finishes what runs, for at most [`Options::drain`](field@Options::drain) seconds.
///
/// # Errors
/// If the state folder, the database, a key or a listener cannot be had. Nothing is served then.
pub async fn serve(options: Options, shutdown: impl Future<Output = ()>) -> anyhow::Result<()> {
    let (stop, stopping) = watch::channel(false);
    let backend = Arc::new(open(&options, stopping).await?);
    let mut listeners = Vec::new();
    for listen in options.listeners() {
        listeners.push((Listener::bind(&listen, &options).await?, listen));
    }

    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS as usize));
    let mut tasks = JoinSet::new();
    tasks.spawn(sweep(backend.clone()));
    for (listener, listen) in listeners {
        match listen {
            Listen::Unix(path) => {
                tracing::info!(listen = %path.display(), "the backend serves on a unix socket")
            }
            Listen::Tls(_) => {
                tracing::info!(listen = %listener.address(), "the backend serves with mutual TLS")
            }
        }
        tasks.spawn(listener.run(backend.clone(), slots.clone()));
    }

    shutdown.await;
    stop.send_replace(true);
    tasks.shutdown().await;
    if tokio::time::timeout(options.drain_time(), slots.acquire_many(MAX_CONNECTIONS)).await.is_err() {
        tracing::warn!("connections were still open at the end of the drain time");
    }
    backend.store.close().await;
    Ok(())
}

async fn open(options: &Options, stopping: watch::Receiver<bool>) -> anyhow::Result<Backend> {
    let state = &options.state;
    sealgate_keys::private_dir(state)
        .with_context(|| format!("cannot use the state folder {}", state.display()))?;
    let own = state.join("backend");
    sealgate_keys::private_dir(&own).with_context(|| format!("cannot use the folder {}", own.display()))?;
    let tokens = Tokens::open(&own.join("token-signing.key"), options)?;
    // The gateway's policy reads the keys from this file.
    let jwks = state.join("jwks.json");
    sealgate_keys::write_private(&jwks, tokens.jwks())
        .with_context(|| format!("cannot write {}", jwks.display()))?;
    let store = own.join("store.sqlite");
    let store =
        Store::open(&store).await.with_context(|| format!("cannot use the database {}", store.display()))?;
    Ok(Backend { store, tokens, hub: Hub::default(), development: options.development, stopping })
}

enum Listener {
    Unix(UnixListener, SocketFile),
    Tls(TcpListener, TlsAcceptor),
}

impl Listener {
    async fn bind(listen: &Listen, options: &Options) -> anyhow::Result<Self> {
        match listen {
            Listen::Unix(path) => {
                bind_private(path).await.with_context(|| format!("cannot listen on unix:{}", path.display()))
            }
            Listen::Tls(address) => {
                let acceptor = tls::acceptor(options)?;
                let listener = TcpListener::bind(address)
                    .await
                    .with_context(|| format!("cannot listen on tls:{address}"))?;
                Ok(Self::Tls(listener, acceptor))
            }
        }
    }

    /// The address in use: the system may have chosen the port.
    fn address(&self) -> String {
        match self {
            Self::Unix(_, file) => file.0.display().to_string(),
            Self::Tls(listener, _) => listener.local_addr().map(|a| a.to_string()).unwrap_or_default(),
        }
    }

    async fn run(self, backend: Arc<Backend>, slots: Arc<Semaphore>) {
        loop {
            let Ok(slot) = slots.clone().acquire_owned().await else {
                return;
            };
            let (backend, open) = (backend.clone(), Arc::new(slot));
            match &self {
                Self::Unix(listener, _) => match listener.accept().await {
                    Ok((stream, _)) => drop(tokio::spawn(connection(stream, backend, open))),
                    Err(error) => pause_after(error).await,
                },
                Self::Tls(listener, acceptor) => match listener.accept().await {
                    Ok((stream, peer)) => {
                        let accepting = acceptor.accept(stream);
                        tokio::spawn(async move {
                            match tokio::time::timeout(HANDSHAKE, accepting).await {
                                Ok(Ok(stream)) => {
                                    let _ = stream.get_ref().0.set_nodelay(true);
                                    connection(stream, backend, open).await;
                                }
                                Ok(Err(error)) => {
                                    tracing::warn!(%peer, %error, "a TLS handshake was refused")
                                }
                                Err(_) => tracing::warn!(%peer, "a TLS handshake took too long"),
                            }
                        });
                    }
                    Err(error) => pause_after(error).await,
                },
            }
        }
    }
}

/// Out of file descriptors, mostly: trying again at once would only burn the processor.
async fn pause_after(error: io::Error) {
    tracing::error!(%error, "cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

async fn connection<S>(stream: S, backend: Arc<Backend>, open: Open)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let stopping = backend.clone();
    let service = service_fn(move |request: hyper::Request<Incoming>| {
        let (backend, open) = (backend.clone(), open.clone());
        async move { Ok::<_, Infallible>(routes::answer(&backend, open, request).await) }
    });
    // No header timeout: it would also cut the gateway's idle pooled connections, and nobody else gets here.
    let serving =
        http1::Builder::new().max_buf_size(64 * 1024).serve_connection(TokioIo::new(stream), service);
    let mut serving = pin!(serving.with_upgrades());
    let result = tokio::select! {
        result = serving.as_mut() => result,
        () = stopping.stopping() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "a connection broke");
    }
}

async fn sweep(backend: Arc<Backend>) {
    let mut ticks = tokio::time::interval(SWEEP);
    loop {
        ticks.tick().await;
        if let Err(error) = backend.store.sweep(unix_seconds(SystemTime::now())).await {
            tracing::error!(%error, "what has expired could not be deleted");
        }
    }
}

/// Seconds since 1970; 0 for a clock set before.
pub(crate) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Removes the socket's file when the listener goes.
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Binds beside `path`, sets mode 0600 and only then moves the socket to its name, so that nobody can connect in
/// between; a socket left by a dead process is replaced, that of a living one is not.
async fn bind_private(path: &Path) -> anyhow::Result<Listener> {
    if UnixStream::connect(path).await.is_ok() {
        bail!("another process already serves there");
    }
    if path.symlink_metadata().is_ok_and(|found| !is_socket(&found)) {
        bail!("there is something else at this path, not a socket");
    }
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(format!(".{}", std::process::id()));
    let fresh = PathBuf::from(fresh);
    let _ = std::fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh)?;
    let fresh = SocketFile(fresh);
    std::fs::set_permissions(&fresh.0, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh.0, path)?;
    Ok(Listener::Unix(listener, SocketFile(path.to_owned())))
}

fn is_socket(metadata: &std::fs::Metadata) -> bool {
    use std::os::unix::fs::FileTypeExt;
    metadata.file_type().is_socket()
}
