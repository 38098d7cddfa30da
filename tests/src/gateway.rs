//! A running gateway.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use crate::curl::{Curl, Reply, curl};
use crate::{Bundle, DEADLINE, Metrics, Process, Signal, Wire, binary, free_port, until};

/// A gateway process, ready to serve; ended on drop.
pub struct Gateway {
    process: Process,
    /// `host:port` of the public listener.
    authority: String,
    ca: PathBuf,
    admin: SocketAddr,
    control: PathBuf,
    policy: PathBuf,
    facts: Value,
    /// Kept for its drop: after the process, which writes there.
    _folder: Option<TempDir>,
}

impl Gateway {
    /// `sealgate dev` in a fresh state folder: the enterprise bundle before the included backend.
    pub fn dev() -> Gateway {
        let folder = tempfile::Builder::new().prefix("sealgate-").tempdir().expect("a folder");
        let mut gateway = Gateway::dev_in(&folder.path().join("state"));
        gateway._folder = Some(folder);
        gateway
    }

    /// `sealgate dev` in a state folder that may have been used before.
    pub fn dev_in(state: &Path) -> Gateway {
        let facts_path = state.join("dev.json");
        let _ = fs::remove_file(&facts_path);
        let logs = state.parent().expect("the state folder has a parent");
        let mut command = Gateway::dev_command(state, 0);
        let mut process = Process::start(&mut command, logs, "sealgate");
        let facts: Value = until("dev.json appears", DEADLINE, || {
            assert_running(&mut process);
            serde_json::from_str(&fs::read_to_string(&facts_path).ok()?).ok()
        });
        let text =
            |name: &str| facts[name].as_str().unwrap_or_else(|| panic!("no {name} in {facts}")).to_owned();
        let url = text("url");
        let metrics_url = text("metrics_url");
        let admin = metrics_url.trim_start_matches("http://").trim_end_matches("/metrics");
        let mut gateway = Gateway {
            process,
            authority: url.trim_start_matches("https://").trim_end_matches('/').to_owned(),
            ca: PathBuf::from(text("ca")),
            admin: admin.parse().unwrap_or_else(|error| panic!("{metrics_url}: {error}")),
            control: PathBuf::from(text("control")),
            policy: state.join("policy"),
            facts,
            _folder: None,
        };
        gateway.wait_ready();
        gateway
    }

    /// The command behind [`Gateway::dev_in`]; port 0 is any free one.
    pub fn dev_command(state: &Path, port: u16) -> Command {
        let mut command = Command::new(binary("sealgate"));
        command.arg("dev").arg("--state").arg(state);
        command.args(["--port", &port.to_string(), "--metrics-port", "0"]);
        command
    }

    /// `sealgate run` with a bundle of the test's own.
    pub fn run(bundle: &Bundle) -> Gateway {
        Gateway::run_with(bundle, |_| {})
    }

    /// [`Gateway::run`] with more said on its command line, or in its environment.
    pub fn run_with(bundle: &Bundle, adjust: impl Fn(&mut Command)) -> Gateway {
        Gateway::start(bundle, "sealgate", &bundle.state(), true, adjust)
    }

    /// One of several gateways with the same policy, each with a state of its own; ready if `wait`, and starting if not.
    pub fn run_beside(bundle: &Bundle, name: &str, wait: bool, adjust: impl Fn(&mut Command)) -> Gateway {
        let state = bundle.folder().join(format!("state-of-{name}"));
        if !state.exists() {
            fs::create_dir(&state).expect("a state folder");
            let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
            fs::set_permissions(&state, private).expect("the state is private");
            for shared in ["certs", "jwks.json", "backend.sock"] {
                std::os::unix::fs::symlink(bundle.state().join(shared), state.join(shared)).expect("a link");
            }
        }
        Gateway::start(bundle, name, &state, wait, adjust)
    }

    fn start(
        bundle: &Bundle,
        name: &str,
        state: &Path,
        wait: bool,
        adjust: impl Fn(&mut Command),
    ) -> Gateway {
        let control = state.join("control.sock");
        // A free port may be taken before the gateway binds it: another is tried then.
        for _ in 0..3 {
            let (port, admin) = (free_port(), free_port());
            let mut command = Command::new(binary("sealgate"));
            command.arg("run").arg("--policy").arg(bundle.policy()).arg("--state").arg(state);
            command.arg("--listen").arg(format!("127.0.0.1:{port}"));
            command.arg("--metrics").arg(format!("127.0.0.1:{admin}"));
            command.arg("--control").arg(&control).args(["--cores", "2"]);
            adjust(&mut command);
            let process = Process::start(&mut command, bundle.folder(), name);
            let mut gateway = Gateway {
                process,
                authority: format!("localhost:{port}"),
                ca: bundle.pki.ca(),
                admin: SocketAddr::from(([127, 0, 0, 1], admin)),
                control: control.clone(),
                policy: bundle.policy(),
                facts: Value::Null,
                _folder: None,
            };
            let taken = until("the gateway is ready", DEADLINE, || match gateway.process.ended() {
                Some(_) if gateway.process.stderr().contains("in use") => Some(true),
                Some(status) => panic!("the gateway ended: {status}\n{}", gateway.process.stderr()),
                None if wait => gateway.is_ready().then_some(false),
                None => gateway.try_admin("/healthz").map(|_| false),
            });
            if !taken {
                return gateway;
            }
        }
        panic!("no free port found")
    }

    fn wait_ready(&mut self) {
        until("the gateway is ready", DEADLINE, || {
            assert_running(&mut self.process);
            self.is_ready().then_some(())
        });
    }

    fn is_ready(&self) -> bool {
        self.try_admin("/readyz").is_some_and(|reply| reply.status == 200)
    }

    /// What `sealgate dev` wrote to `dev.json`.
    pub fn facts(&self) -> &Value {
        &self.facts
    }

    /// The demo token of `sealgate dev`.
    pub fn token(&self) -> String {
        self.facts["token"].as_str().expect("a token in dev.json").to_owned()
    }

    /// A token for `user` from the development login, good for `lifetime` seconds.
    pub fn login(&self, user: &str, lifetime: u64) -> String {
        let body = serde_json::json!({ "user": user, "device": "tests", "lifetime": lifetime }).to_string();
        let reply = self.curl("/v1/dev/login").json(&body).send();
        assert_eq!(reply.status, 200, "{reply:?}");
        let answer = reply.json();
        let token = ["token", "access_token"].iter().find_map(|name| answer[*name].as_str());
        token.unwrap_or_else(|| panic!("no token in {answer}")).to_owned()
    }

    /// `https://…` and the path.
    pub fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.authority)
    }

    /// `wss://…` and the path.
    pub fn ws(&self, path: &str) -> String {
        format!("wss://{}{path}", self.authority)
    }

    /// `host:port` as clients write it.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// The public listener's port.
    pub fn port(&self) -> u16 {
        self.authority.rsplit(':').next().and_then(|port| port.parse().ok()).expect("a port")
    }

    /// The public listener.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port()))
    }

    /// The authority that signed its certificate.
    pub fn ca(&self) -> &Path {
        &self.ca
    }

    /// Its control socket.
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// Its bundle's folder.
    pub fn policy(&self) -> &Path {
        &self.policy
    }

    /// A request to it by curl.
    pub fn curl(&self, path: &str) -> Curl {
        curl(&self.url(path), &self.ca)
    }

    /// A raw TLS connection to it that agrees on HTTP/1.1.
    pub fn wire(&self) -> Wire {
        Wire::connect(self.address(), &self.ca, &["http/1.1"])
    }

    /// An open WebSocket of whom `token` names.
    #[track_caller]
    pub fn open(&self, path: &str, token: &str) -> Wire {
        let mut wire = self.wire();
        let reply = wire.upgrade(path, &format!("Authorization: Bearer {token}\r\n"));
        assert_eq!(reply.status, 101, "{reply:?}");
        wire
    }

    /// A GET on the private listener.
    pub fn admin(&self, path: &str) -> Reply {
        self.try_admin(path).unwrap_or_else(|| panic!("no answer from {}{path}", self.admin))
    }

    /// The address of the private listener.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin
    }

    fn try_admin(&self, path: &str) -> Option<Reply> {
        let mut stream = TcpStream::connect(self.admin).ok()?;
        stream.set_read_timeout(Some(DEADLINE)).ok()?;
        let host = self.admin;
        write!(stream, "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").ok()?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).ok()?;
        bytes.windows(4).any(|four| four == b"\r\n\r\n").then(|| Reply::parse(&bytes))
    }

    /// Its metrics now.
    pub fn metrics(&self) -> Metrics {
        let reply = self.admin("/metrics");
        assert_eq!(reply.status, 200, "{reply:?}");
        Metrics::parse(&reply.body)
    }

    /// `sealgate reload`: whether it succeeded, and what it said.
    pub fn reload(&self) -> (bool, String) {
        let output = sealgate(&[&"reload", &"--control", &self.control]);
        let said =
            format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.success(), said)
    }

    /// `sealgate sessions …` with `--json`: whether it succeeded, and its answer.
    pub fn sessions(&self, arguments: &[&str]) -> (bool, Value) {
        let mut command = Command::new(binary("sealgate"));
        command.arg("sessions").args(arguments).arg("--json").arg("--control").arg(&self.control);
        let output = command.output().expect("sealgate runs");
        let answer = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&output.stderr).into_owned()));
        (output.status.success(), answer)
    }

    /// The serial number, in upper-case hex, of the certificate shown to a client that asks for `name`.
    pub fn served_serial(&self, name: &str) -> String {
        let shown = Command::new("openssl")
            .args(["s_client", "-connect", &self.address().to_string(), "-servername", name])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .expect("openssl runs");
        let mut read = Command::new("openssl")
            .args(["x509", "-noout", "-serial"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("openssl runs");
        read.stdin.take().expect("piped").write_all(&shown.stdout).expect("openssl listens");
        let output = read.wait_with_output().expect("openssl ends");
        String::from_utf8_lossy(&output.stdout).trim().trim_start_matches("serial=").to_owned()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// Waits for its end.
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        self.process.wait(deadline)
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

/// Runs `sealgate` to its end.
pub fn sealgate(arguments: &[&dyn AsRef<std::ffi::OsStr>]) -> Output {
    let mut command = Command::new(binary("sealgate"));
    for argument in arguments {
        command.arg(argument);
    }
    command.output().expect("sealgate runs")
}

fn assert_running(process: &mut Process) {
    if let Some(status) = process.ended() {
        panic!("sealgate ended: {status}\n{}\n{}", process.stdout(), process.stderr());
    }
}
