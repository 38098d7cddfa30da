//! What is compared: one stage (certificate, backend, folder) and the proxies on it, configured alike.
//!
//! Every process runs in a process group of its own and ends with the value that holds it, also when
//! the run fails; and by the kernel's hand (`setpriv --pdeathsig`) should this process be killed.

use std::fmt;
use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clap::ValueEnum;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, geteuid};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::CertificateDer;
use serde::Serialize;
use tempfile::TempDir;
use tokio::net::{TcpStream, UnixStream};

use crate::load::{Target, fetch};
use crate::measure::{Processes, Watch};

/// How long a process may take until it listens.
const START: Duration = Duration::from_secs(15);

/// How long a process may take to stop when it is asked to.
const STOP: Duration = Duration::from_secs(2);

/// How many different tokens the client has; connections share them in turn, so that a proxy that
/// caches verified tokens is neither starved nor flattered by a single one.
const TOKENS: usize = 64;

/// A proxy that can be compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// Debian's nginx: the measure of the others.
    Nginx,
    /// Debian's HAProxy.
    Haproxy,
    /// Debian's Caddy.
    Caddy,
    /// This product, verifying the token of every request.
    Sealgate,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Nginx => "nginx",
            Self::Haproxy => "haproxy",
            Self::Caddy => "caddy",
            Self::Sealgate => "sealgate",
        })
    }
}

/// Which CPU does what.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Cpus {
    /// The proxy that is measured.
    pub proxy: usize,
    /// Client and backend.
    pub client: usize,
}

impl Cpus {
    /// The first two CPUs that we may use; the same one twice if there is no second.
    pub(crate) fn find() -> Result<Self> {
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        let mut all = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
        let proxy = all.next().context("no CPU may be used")?;
        Ok(Self { proxy, client: all.next().unwrap_or(proxy) })
    }

    /// Moves this process, and with it the children that it will start, to the client's CPU.
    pub(crate) fn pin_client(&self) -> Result<()> {
        let mut set = CpuSet::new();
        set.set(self.client)?;
        Ok(sched_setaffinity(Pid::from_raw(0), &set)?)
    }
}

/// Binaries of this workspace.
#[derive(Clone, Debug)]
pub(crate) struct Binaries {
    /// The gateway.
    pub sealgate: PathBuf,
    /// The backend behind every proxy.
    pub backend: PathBuf,
}

/// Everything that the proxies share. Its folder is removed and its backend ended with it.
pub(crate) struct Stage {
    cpus: Cpus,
    binaries: Binaries,
    /// What a proxy may have open: connections on either side.
    open_files: u64,
    authority: CertificateDer<'static>,
    /// What clients show, in turn; good for longer than any run.
    tokens: Vec<String>,
    backend: Running,
    socket: PathBuf,
    folder: TempDir,
}

impl Stage {
    /// Mints the certificate and starts the backend.
    pub(crate) async fn set(cpus: Cpus, binaries: Binaries, open_files: u64) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("sealgate-benches-").tempdir()?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700))?;
        let authority = mint_certificates(folder.path())?;
        copy_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("policy"), &folder.path().join("policy"))?;
        let socket = folder.path().join("backend.sock");
        let mut command = Command::new(&binaries.backend);
        command.arg("--listen").arg(format!("unix:{}", socket.display()));
        command.arg("--state").arg(folder.path().join("backend"));
        command.args(["--development", "--token-lifetime", "86400"]);
        let mut backend = Running::start(command, cpus.client, &folder.path().join("backend.log"))?;
        backend.until(async || UnixStream::connect(&socket).await.is_ok()).await.context("backend-echo")?;
        let keys = ask(&socket, "GET /.well-known/jwks.json HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
        fs::write(folder.path().join("jwks.json"), keys.context("keys from the backend")?)?;
        let mut tokens = Vec::new();
        for number in 0..TOKENS {
            let token = log_in(&socket, "alice", &format!("bench-{number}")).await;
            tokens.push(token.context("token from the backend")?);
        }
        Ok(Self { cpus, binaries, open_files, authority, tokens, backend, socket, folder })
    }

    /// Starts a proxy on a free port and waits until it accepts.
    pub(crate) async fn start(&self, kind: Kind) -> Result<Proxy> {
        let port = free_port()?;
        let folder = self.folder.path().join(format!("{kind}-{port}"));
        // sealgate keeps state there, and refuses a folder that others may enter.
        fs::DirBuilder::new().mode(0o700).create(&folder)?;
        let command = match kind {
            Kind::Nginx => self.nginx(&folder, port)?,
            Kind::Haproxy => self.haproxy(&folder, port)?,
            Kind::Caddy => self.caddy(&folder, port)?,
            Kind::Sealgate => self.sealgate(&folder, port)?,
        };
        let mut running = Running::start(command, self.cpus.proxy, &folder.join("log"))?;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        running
            .until(async || TcpStream::connect(address).await.is_ok())
            .await
            .with_context(|| kind.to_string())?;
        Ok(Proxy { kind, address, folder, running })
    }

    /// A client of `proxy`.
    pub(crate) fn target(&self, proxy: &Proxy) -> Result<Rc<Target>> {
        Ok(Rc::new(Target::new(proxy.address, self.authority.clone(), self.tokens.clone())?))
    }

    /// The same, with a new token of `user`.
    pub(crate) async fn target_of(&self, proxy: &Proxy, user: &str) -> Result<Rc<Target>> {
        let token = log_in(&self.socket, user, "bench").await.context("token from the backend")?;
        Ok(Rc::new(Target::new(proxy.address, self.authority.clone(), vec![token])?))
    }

    /// What sealgate judges by; a copy, to be changed.
    pub(crate) fn policy(&self) -> PathBuf {
        self.folder.path().join("policy")
    }

    /// Starts Debian's Redis, that keeps nothing on disk, beside the client.
    pub(crate) async fn start_redis(&self) -> Result<Redis> {
        let mut redis = Redis { port: free_port()?, running: None };
        self.run_redis(&mut redis).await?;
        Ok(redis)
    }

    /// Runs it, empty, on the port that it had before.
    pub(crate) async fn run_redis(&self, redis: &mut Redis) -> Result<()> {
        let port = redis.port.to_string();
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &port, "--save", "", "--appendonly", "no", "--dir"]);
        command.arg(self.folder.path());
        let mut running = Running::start(command, self.cpus.client, &self.folder.path().join("redis.log"))?;
        let ready = async || TcpStream::connect(("127.0.0.1", redis.port)).await.is_ok();
        running.until(ready).await.context("redis-server (Debian: redis-server)")?;
        redis.running = Some(running);
        Ok(())
    }

    /// From now on gateways agree through the Redis at `address`.
    pub(crate) fn share(&self, address: &str) -> Result<()> {
        let path = self.policy().join("policy.toml");
        let text = fs::read_to_string(&path)?;
        let shared = format!("[shared]\nredis = [\"redis://{address}\"]\ncontact_timeout = \"2s\"\n");
        Ok(fs::write(path, format!("{text}\n{shared}"))?)
    }

    /// What tells whether anybody but us, the backend and `proxy` uses our CPUs.
    pub(crate) fn watch(&self, proxy: &mut Proxy) -> Result<Watch> {
        let ours = vec![Processes::of_group(self.backend.group)?, proxy.processes()?];
        Ok(Watch::new(vec![self.cpus.proxy, self.cpus.client], ours))
    }

    /// Fails if the backend has ended.
    pub(crate) fn check_backend(&mut self) -> Result<()> {
        self.backend.check().context("backend-echo")
    }

    fn nginx(&self, folder: &Path, port: u16) -> Result<Command> {
        // Started as root, nginx would run its worker as another user, who may not use our socket.
        let user = if geteuid().is_root() { "user root;" } else { "" };
        let stage = self.folder.path().display();
        let configuration = format!(
            r#"{user}
daemon off;
worker_processes 1;
worker_rlimit_nofile {files};
pid {folder}/nginx.pid;
error_log stderr error;
events {{ worker_connections {files}; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream backend {{
        server unix:{socket};
        keepalive 512;
        keepalive_requests 1000000000;
        keepalive_timeout 1h;
    }}
    map $http_upgrade $connection_upgrade {{ default upgrade; "" ""; }}
    server {{
        listen 127.0.0.1:{port} ssl http2;
        server_name localhost;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_certificate {stage}/server.pem;
        ssl_certificate_key {stage}/server.key;
        ssl_certificate {stage}/rsa.pem;
        ssl_certificate_key {stage}/rsa.key;
        keepalive_requests 1000000000;
        keepalive_timeout 1h;
        client_header_timeout 1h;
        location / {{
            proxy_pass http://backend;
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto https;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_read_timeout 1h;
            proxy_send_timeout 1h;
        }}
    }}
}}
"#,
            files = self.open_files,
            folder = folder.display(),
            socket = self.socket.display(),
        );
        let path = folder.join("nginx.conf");
        fs::write(&path, configuration)?;
        let mut command = Command::new("nginx");
        command.arg("-e").arg("stderr").arg("-p").arg(folder).arg("-c").arg(path);
        Ok(command)
    }

    fn haproxy(&self, folder: &Path, port: u16) -> Result<Command> {
        let configuration = format!(
            r"global
    nbthread 1
    maxconn {connections}
    ssl-default-bind-options ssl-min-ver TLSv1.2
defaults
    mode http
    option forwardfor
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    timeout tunnel 1h
    timeout http-keep-alive 1h
    timeout http-request 1h
frontend edge
    bind 127.0.0.1:{port} ssl crt {stage}/server.both.pem crt {stage}/rsa.both.pem alpn h2,http/1.1
    http-request set-header X-Forwarded-Proto https
    default_backend backend
backend backend
    http-reuse always
    server backend unix@{socket} pool-max-conn 512 pool-purge-delay 1h
",
            // Two descriptors per connection, some for itself.
            connections = self.open_files.saturating_sub(200) / 2,
            stage = self.folder.path().display(),
            socket = self.socket.display(),
        );
        let path = folder.join("haproxy.cfg");
        fs::write(&path, configuration)?;
        let mut command = Command::new("haproxy");
        command.arg("-db").arg("-q").arg("-f").arg(path);
        Ok(command)
    }

    fn caddy(&self, folder: &Path, port: u16) -> Result<Command> {
        let configuration = format!(
            r"{{
    admin off
    auto_https off
    servers {{
        protocols h1 h2
    }}
}}
https://localhost:{port} {{
    bind 127.0.0.1
    tls {stage}/server.pem {stage}/server.key
    reverse_proxy unix/{socket} {{
        transport http {{
            keepalive 1h
            keepalive_idle_conns 512
            keepalive_idle_conns_per_host 512
        }}
    }}
}}
",
            stage = self.folder.path().display(),
            socket = self.socket.display(),
        );
        let path = folder.join("Caddyfile");
        fs::write(&path, configuration)?;
        let mut command = Command::new("caddy");
        command.args(["run", "--adapter", "caddyfile", "--config"]).arg(path);
        command.env("GOMAXPROCS", "1").env("HOME", folder).env("XDG_DATA_HOME", folder);
        command.env("XDG_CONFIG_HOME", folder);
        Ok(command)
    }

    fn sealgate(&self, folder: &Path, port: u16) -> Result<Command> {
        let stage = self.folder.path();
        let policy = self.policy();
        let mut command = Command::new(&self.binaries.sealgate);
        command.arg("run").arg("--policy").arg(policy).arg("--state").arg(folder);
        command.arg("--listen").arg(format!("127.0.0.1:{port}"));
        command.arg("--metrics").arg(format!("127.0.0.1:{}", free_port()?));
        command.args(["--cores", "1"]);
        for (name, value) in [
            ("backend", format!("unix:{}", self.socket.display())),
            ("chain", format!("file:{}/server.pem", stage.display())),
            ("key", format!("file:{}/server.key", stage.display())),
            ("rsa_chain", format!("file:{}/rsa.pem", stage.display())),
            ("rsa_key", format!("file:{}/rsa.key", stage.display())),
            ("jwks", format!("file:{}/jwks.json", stage.display())),
        ] {
            command.arg("--define").arg(format!("{name}={value}"));
        }
        Ok(command)
    }
}

/// A proxy that runs.
pub(crate) struct Proxy {
    /// Which.
    pub kind: Kind,
    address: SocketAddr,
    folder: PathBuf,
    running: Running,
}

impl Proxy {
    /// The operator's way in; sealgate only.
    pub(crate) fn control(&self) -> PathBuf {
        self.folder.join("control.sock")
    }

    /// Its processes, to be measured. Fails, with the end of its log, if it has ended.
    pub(crate) fn processes(&mut self) -> Result<Processes> {
        self.running.check().with_context(|| self.kind.to_string())?;
        Processes::of_group(self.running.group)
    }
}

/// A Redis server; ended with this value.
pub(crate) struct Redis {
    port: u16,
    running: Option<Running>,
}

impl Redis {
    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Ends it, with all that it knows.
    pub(crate) fn end(&mut self) {
        self.running = None;
    }

    /// Stops its every movement, or lets it go on.
    pub(crate) fn signal(&self, signal: Signal) -> Result<()> {
        let running = self.running.as_ref().context("Redis does not run")?;
        Ok(killpg(running.group, signal)?)
    }
}

/// What `kind` says its version is.
pub(crate) fn version(kind: Kind, binaries: &Binaries) -> Result<String> {
    let mut command = match kind {
        Kind::Nginx => Command::new("nginx"),
        Kind::Haproxy => Command::new("haproxy"),
        Kind::Caddy => Command::new("caddy"),
        Kind::Sealgate => Command::new(&binaries.sealgate),
    };
    command.arg(match kind {
        Kind::Nginx | Kind::Haproxy => "-v",
        Kind::Caddy => "version",
        Kind::Sealgate => "--version",
    });
    let output = command.output().with_context(|| {
        format!("{kind} is not installed (Debian: apt-get install nginx-light haproxy caddy)")
    })?;
    ensure!(output.status.success(), "{kind} does not tell its version: {}", output.status);
    // nginx tells it on standard error.
    let text = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned())
}

/// A child and all that it starts: one process group, ended and reaped on drop.
struct Running {
    child: Child,
    group: Pid,
    log: PathBuf,
}

impl Running {
    fn start(command: Command, cpu: usize, log: &Path) -> Result<Self> {
        let output = File::create(log)?;
        // Both programs become the one they start, so the process id stays the same.
        let mut pinned = Command::new("taskset");
        pinned.arg("--cpu-list").arg(cpu.to_string());
        pinned.args(["setpriv", "--pdeathsig", "TERM"]).arg(command.get_program()).args(command.get_args());
        pinned.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        pinned.process_group(0).stdin(std::process::Stdio::null());
        pinned.stdout(output.try_clone()?).stderr(output);
        let child = pinned.spawn().context("taskset (Debian: util-linux)")?;
        let group = Pid::from_raw(i32::try_from(child.id())?);
        Ok(Self { child, group, log: log.to_owned() })
    }

    /// Waits for `ready`, and fails early if the process ends.
    async fn until(&mut self, ready: impl AsyncFn() -> bool) -> Result<()> {
        let deadline = Instant::now() + START;
        while !ready().await {
            self.check()?;
            ensure!(Instant::now() < deadline, "does not listen after {START:?}{}", self.last_words());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.check()
    }

    fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("ended by itself ({status}){}", self.last_words()),
        }
    }

    fn last_words(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let skipped = lines.len().saturating_sub(20);
        lines.into_iter().skip(skipped).map(|line| format!("\n  | {line}")).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Asked politely first, so that a master reaps its workers; then the whole group is killed.
        let _ = kill(self.group, Signal::SIGTERM);
        let deadline = Instant::now() + STOP;
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Nothing is left of a group that went by itself: an error here is the good case.
        let _ = killpg(self.group, Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// A token for a session of its own.
async fn log_in(socket: &Path, user: &str, device: &str) -> Result<String> {
    let body = format!(r#"{{"user":"{user}","device":"{device}"}}"#);
    let request = format!(
        "POST /v1/dev/login HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let answer: serde_json::Value = serde_json::from_slice(&ask(socket, &request).await?)?;
    let token = answer.get("access_token").and_then(serde_json::Value::as_str);
    Ok(token.with_context(|| format!("no access_token in {answer}"))?.to_owned())
}

async fn ask(socket: &Path, request: &str) -> Result<Bytes> {
    fetch(UnixStream::connect(socket).await?, request).await
}

/// An authority and certificates for `localhost`, ECDSA P-256 and RSA-2048, in the forms that the proxies want:
/// `server.pem`, `server.key`, and both in `server.both.pem`; `rsa.…` the same. Returns the authority's certificate.
fn mint_certificates(folder: &Path) -> Result<CertificateDer<'static>> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority =
        CertifiedIssuer::self_signed(params, KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?)?;
    let ecdsa = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let rsa = KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048)?;
    for (name, key) in [("server", ecdsa), ("rsa", rsa)] {
        let certificate =
            CertificateParams::new(vec!["localhost".to_owned()])?.signed_by(&key, &authority)?;
        let (chain, key) = (certificate.pem(), key.serialize_pem());
        let both = format!("{chain}{key}");
        for (end, text) in [("pem", chain), ("key", key), ("both.pem", both)] {
            let path = folder.join(format!("{name}.{end}"));
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
            std::io::Write::write_all(&mut file, text.as_bytes())?;
        }
    }
    Ok(authority.der().clone())
}

fn copy_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        match entry.file_type()?.is_dir() {
            true => copy_folder(&entry.path(), &to)?,
            false => drop(fs::copy(entry.path(), to)?),
        }
    }
    Ok(())
}

/// A port that was free a moment ago.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}
