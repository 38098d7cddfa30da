//! Redis servers as the policy names them, with their secrets: how to connect.

use std::fmt;
use std::time::Duration;

use redis::aio::MultiplexedConnection;
use redis::cluster::ClusterClientBuilder;
use redis::cluster_async::ClusterConnection;
use redis::sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, RedisConnectionInfo, RedisError,
    TlsCertificates, TlsMode, Value,
};
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use sealgate_policy::{Endpoint, SharedMode, SharedPolicy, SharedServer, Source};
use zeroize::Zeroizing;

/// To connect, with TLS, name and password, at least.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);

/// Between questions to sentinels who the master is.
const LONGEST_UNASKED: Duration = Duration::from_secs(2);

/// Longest user name or password.
const MAX_SECRET_BYTES: usize = 4096;

/// Redis servers, ready to connect to. Prints no secret.
pub struct Servers {
    policy: SharedPolicy,
    ca: Option<Zeroizing<Vec<u8>>>,
    username: Option<Zeroizing<String>>,
    password: Option<Zeroizing<String>>,
}

/// Why Redis cannot be asked, or what is wrong with its answer.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// The connection broke, or Redis refused.
    #[error("{0}")]
    Redis(#[from] RedisError),
    /// No answer within the patience.
    #[error("no answer within {} ms", .0.as_millis())]
    Late(Duration),
    /// An answer of a shape that Redis does not give.
    #[error("an answer of unexpected shape to {0}")]
    Answer(&'static str),
    /// More was to be published than is kept.
    #[error("too much is waiting to be published")]
    Overflow,
    /// The sentinels made another server the master, and the one that we are connected to has not noticed.
    #[error("another server is the master now")]
    Moved,
}

impl Fault {
    /// Whether the connection will not come back.
    pub(super) fn is_final(&self) -> bool {
        matches!(self, Self::Redis(error) if error.is_unrecoverable_error())
    }
}

impl Servers {
    /// Reads the secrets that `policy` names and looks at them. Touches no network.
    ///
    /// # Errors
    ///
    /// Every fault that was found, by key; without a secret.
    pub fn read(
        policy: &SharedPolicy,
        mut read: impl FnMut(&Source) -> Result<Zeroizing<Vec<u8>>, String>,
    ) -> Result<Self, Vec<String>> {
        let mut faults = Vec::new();
        let mut bytes = |key: &str, source: &Option<Source>| {
            let read =
                source.as_ref().map(|source| read(source).map_err(|error| format!("shared.{key}: {error}")));
            read.transpose().unwrap_or_else(|fault| {
                faults.push(fault);
                None
            })
        };
        let ca = bytes("ca", &policy.ca);
        let username = bytes("username", &policy.username);
        let password = bytes("password", &policy.password);
        if let Some(ca) = &ca
            && let Err(error) = authorities(ca)
        {
            faults.push(format!("shared.ca: {error}"));
        }
        let mut text = |key: &str, bytes: Option<Zeroizing<Vec<u8>>>| {
            let text = bytes.as_deref().map(|bytes| line(bytes))?;
            if text.is_none() {
                faults
                    .push(format!("shared.{key}: expected one line of UTF-8, 1 to {MAX_SECRET_BYTES} bytes"));
            }
            text
        };
        let (username, password) = (text("username", username), text("password", password));
        if faults.is_empty() {
            Ok(Self { policy: policy.clone(), ca, username, password })
        } else {
            Err(faults)
        }
    }

    /// What they are for.
    pub fn policy(&self) -> &SharedPolicy {
        &self.policy
    }

    /// Whether connections to the ones are as good as to the others.
    #[must_use]
    pub fn same(&self, other: &Self) -> bool {
        self.policy == other.policy
            && self.ca == other.ca
            && self.username == other.username
            && self.password == other.password
    }

    /// How long anything may take that no request waits for.
    pub(super) fn patience(&self) -> Duration {
        (self.policy.deadline * 4).max(CONNECT_PATIENCE)
    }

    /// A connection on which no command is waited for longer than `longest`. `turn` says which sentinel is asked first: another one at each
    /// attempt, since one that is silent uses up the patience.
    pub(super) async fn connect(&self, longest: Duration, turn: usize) -> Result<Connection, Fault> {
        let patience = self.patience();
        // The library's own time limits leave out looking up names.
        let opened = tokio::time::timeout(patience * 2, self.open(longest, turn)).await;
        opened.map_err(|_| Fault::Late(patience * 2))?.map_err(Fault::from)
    }

    async fn open(&self, longest: Duration, turn: usize) -> Result<Connection, RedisError> {
        // Each command has a limit of its own; that of the library would end one that waits for news.
        let config = AsyncConnectionConfig::new().set_connection_timeout(self.patience());
        match &self.policy.mode {
            SharedMode::Single => {
                let server = self.policy.servers.first();
                let info = self.info(server.ok_or_else(no_server)?);
                let client = match (self.certificates(), &info.addr) {
                    (Some(certificates), ConnectionAddr::TcpTls { .. }) => {
                        Client::build_with_tls(info, certificates)?
                    }
                    _ => Client::open(info)?,
                };
                let connection = client.get_multiplexed_async_connection_with_config(&config).await?;
                Ok(Connection::Server { connection, master: None })
            }
            SharedMode::Sentinel { service } => {
                let client = self.master(service, turn).await?;
                let connection = client.get_multiplexed_async_connection_with_config(&config).await?;
                let master = Some(client.get_connection_info().addr.clone());
                Ok(Connection::Server { connection, master })
            }
            SharedMode::Cluster => {
                let nodes = self.policy.servers.iter().map(|server| self.info(server));
                // Not tried again behind our back: what was lost in between must be noticed. A node that accepts and then
                // says nothing is waited for with all others, twice: it may not use up the patience.
                let mut builder = ClusterClientBuilder::new(nodes)
                    .retries(0)
                    .connection_timeout(self.patience() / 4)
                    .response_timeout(longest);
                if let Some(certificates) = self.certificates().filter(|_| self.over_tls()) {
                    builder = builder.certs(certificates);
                }
                builder.build()?.get_async_connection().await.map(Connection::Cluster)
            }
        }
    }

    /// Returns with [`Fault::Moved`] once the sentinels have named another master than the one of this connection; else never.
    ///
    /// A master that was cut off from its sentinels takes writes, and keeps its clients, until it hears of its successor.
    pub(super) async fn moved(&self, connection: &Connection) -> Fault {
        let (SharedMode::Sentinel { service }, Connection::Server { master: Some(master), .. }) =
            (&self.policy.mode, connection)
        else {
            return std::future::pending().await;
        };
        let every = (self.policy.contact_timeout / 4).min(LONGEST_UNASKED);
        for turn in 0.. {
            tokio::time::sleep(every).await;
            match tokio::time::timeout(self.patience() * 2, self.master(service, turn)).await {
                Ok(Ok(client)) if client.get_connection_info().addr != *master => return Fault::Moved,
                Ok(Ok(_)) => {}
                // While a master is sought there is none; and without sentinels the connection is all there is.
                failed => {
                    let error = failed.map(Result::err);
                    tracing::debug!(?error, "sentinels do not say who is the master");
                }
            }
        }
        Fault::Moved
    }

    /// The master of which the first sentinel says so that answers; `turn` is who is asked first.
    async fn master(&self, service: &str, turn: usize) -> Result<Client, RedisError> {
        let servers = &self.policy.servers;
        let first = turn % servers.len().max(1);
        let mut last = no_server();
        for server in servers.iter().cycle().skip(first).take(servers.len()) {
            // One by one: one that accepts and then says nothing would use up the patience for all.
            let mut sentinel = self.sentinel(server, service)?;
            match tokio::time::timeout(self.patience() / 2, sentinel.async_get_client()).await {
                Ok(Ok(client)) => return Ok(client),
                Ok(Err(error)) => last = error,
                Err(_) => last = (redis::ErrorKind::IoError, "a sentinel does not answer").into(),
            }
        }
        Err(last)
    }

    fn sentinel(&self, server: &SharedServer, service: &str) -> Result<SentinelClient, RedisError> {
        let (service, kind) = (service.to_owned(), SentinelServerType::Master);
        let mut builder = SentinelClientBuilder::new([address(server)], service, kind)?;
        if self.over_tls() {
            builder = builder.set_client_to_redis_tls_mode(TlsMode::Secure);
            if let Some(certificates) = self.certificates() {
                builder = builder
                    .set_client_to_redis_certificates(certificates.clone())
                    .set_client_to_sentinel_certificates(certificates);
            }
        }
        if let Some(username) = &self.username {
            builder = builder.set_client_to_redis_username(username.as_str().to_owned());
        }
        if let Some(password) = &self.password {
            builder = builder.set_client_to_redis_password(password.as_str().to_owned());
        }
        builder.build()
    }

    /// Prints its secrets: not to be shown to anybody.
    fn info(&self, server: &SharedServer) -> ConnectionInfo {
        let text = |secret: &Option<Zeroizing<String>>| secret.as_ref().map(|it| it.as_str().to_owned());
        let redis = RedisConnectionInfo {
            username: text(&self.username),
            password: text(&self.password),
            ..RedisConnectionInfo::default()
        };
        ConnectionInfo { addr: address(server), redis }
    }

    fn over_tls(&self) -> bool {
        self.policy.servers.iter().any(|server| server.tls)
    }

    fn certificates(&self) -> Option<TlsCertificates> {
        let root_cert = self.ca.as_ref().map(|ca| ca.to_vec());
        root_cert.map(|root_cert| TlsCertificates { client_tls: None, root_cert: Some(root_cert) })
    }
}

impl fmt::Debug for Servers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Servers").field("servers", &self.policy.servers).finish_non_exhaustive()
    }
}

/// One connection; clones share it. It does not come back once it broke.
#[derive(Clone)]
pub(super) enum Connection {
    Server {
        connection: MultiplexedConnection,
        /// Who it is, if sentinels said so.
        master: Option<ConnectionAddr>,
    },
    Cluster(ClusterConnection),
}

impl Connection {
    /// Asks, and waits for the answer no longer than `patience`.
    pub(super) async fn ask(&self, command: &Cmd, patience: Duration) -> Result<Value, Fault> {
        let asking = async {
            match self.clone() {
                Self::Server { mut connection, .. } => command.query_async::<Value>(&mut connection).await,
                Self::Cluster(mut cluster) => command.query_async::<Value>(&mut cluster).await,
            }
        };
        tokio::time::timeout(patience, asking).await.map_err(|_| Fault::Late(patience))?.map_err(Fault::from)
    }

    /// Whether both lead to the same server, as far as sentinels choose it.
    pub(super) fn leads_where(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Server { master: one, .. }, Self::Server { master: two, .. }) => one == two,
            _ => true,
        }
    }
}

fn address(server: &SharedServer) -> ConnectionAddr {
    match &server.endpoint {
        Endpoint::Unix(path) => ConnectionAddr::Unix(path.clone()),
        Endpoint::Tcp { host, port } if server.tls => {
            ConnectionAddr::TcpTls { host: host.clone(), port: *port, insecure: false, tls_params: None }
        }
        Endpoint::Tcp { host, port } => ConnectionAddr::Tcp(host.clone(), *port),
    }
}

fn no_server() -> RedisError {
    (redis::ErrorKind::InvalidClientConfig, "no server is named").into()
}

fn authorities(pem: &[u8]) -> Result<(), String> {
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| format!("not PEM: {error:?}"))?;
        store.add(certificate).map_err(|error| error.to_string())?;
    }
    if store.is_empty() { Err("no certificate in it".to_owned()) } else { Ok(()) }
}

/// A secret's file usually ends in a line break that is not meant.
fn line(bytes: &[u8]) -> Option<Zeroizing<String>> {
    let text = std::str::from_utf8(bytes).ok()?;
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    let fits = (1..=MAX_SECRET_BYTES).contains(&text.len()) && !text.contains(['\n', '\r', '\0']);
    fits.then(|| Zeroizing::new(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn policy() -> SharedPolicy {
        let endpoint = Endpoint::Tcp { host: "redis.example".into(), port: 6379 };
        SharedPolicy {
            servers: vec![SharedServer { endpoint, tls: true }],
            mode: SharedMode::Single,
            ca: None,
            username: Some(Source::Env("USER".into())),
            password: Some(Source::Env("PASSWORD".into())),
            key_prefix: Arc::from("sealgate"),
            deadline: Duration::from_millis(50),
            contact_timeout: Duration::from_secs(10),
            on_loss: sealgate_policy::OnLoss::Warn,
            dpop_fails_closed: false,
            tickets_fail_closed: false,
        }
    }

    #[test]
    fn secrets_are_read_once_and_never_shown() {
        let read = |secret: &'static str| {
            move |source: &Source| match source {
                Source::Env(name) if name == "USER" => Ok(Zeroizing::new(b"gateway".to_vec())),
                _ => Ok(Zeroizing::new(secret.as_bytes().to_vec())),
            }
        };
        let servers = Servers::read(&policy(), read("s3cret\n")).unwrap();
        assert_eq!(servers.password.as_ref().unwrap().as_str(), "s3cret");
        let shown = format!("{servers:?}");
        assert!(!shown.contains("s3cret"), "{shown}");
        assert!(servers.same(&Servers::read(&policy(), read("s3cret")).unwrap()));
        assert!(!servers.same(&Servers::read(&policy(), read("other")).unwrap()));
    }

    #[test]
    fn all_faults_are_told_by_key() {
        let with_ca = SharedPolicy { ca: Some(Source::File("ca.pem".into())), ..policy() };
        let read = |source: &Source| match source {
            Source::Env(name) if name == "USER" => Err("the environment has no `USER`".to_owned()),
            Source::Env(_) => Ok(Zeroizing::new(b"two\nlines".to_vec())),
            Source::File(_) => Ok(Zeroizing::new(b"no certificate".to_vec())),
        };
        assert_eq!(
            Servers::read(&with_ca, read).unwrap_err(),
            [
                "shared.username: the environment has no `USER`",
                "shared.ca: no certificate in it",
                "shared.password: expected one line of UTF-8, 1 to 4096 bytes"
            ]
        );
    }
}
