//! `sealgate dev`: everything on one machine, for the first minute and for development.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::unix::{net::UnixStream, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use clap::Args;
use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};
use sealgate_keys::{dev::DevAuthority, private_dir, write_private};
use sealgate_policy::Bundle;
use tokio::{
    runtime::Runtime,
    signal::unix::{SignalKind, signal},
};

use super::{FINE, PolicyArgs, RunArgs, logs, run};

/// How long the backend may take to answer for the first time, and to end.
const BACKEND_PATIENCE: Duration = Duration::from_secs(10);

#[derive(Args)]
pub struct DevArgs {
    /// Folder for keys, certificates, the policy, the backend's data. Kept for the next start.
    #[arg(long, value_name = "DIR", default_value = ".sealgate")]
    state: PathBuf,
    /// Port for HTTPS on loopback; 0 takes a free one.
    #[arg(long, default_value_t = 8443)]
    port: u16,
    /// Port for /metrics on loopback; 0 takes a free one.
    #[arg(long, default_value_t = 9180)]
    metrics_port: u16,
    /// Threads that serve; by default one for each core of the machine.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    cores: Option<u16>,
}

/// Where things are in the state folder.
struct State {
    root: PathBuf,
    policy: PathBuf,
    backend: PathBuf,
    control: PathBuf,
    facts: PathBuf,
}

impl State {
    fn open(root: &Path) -> anyhow::Result<Self> {
        let root = std::path::absolute(root)?;
        private_dir(&root)?;
        let state = Self {
            policy: root.join("policy"),
            backend: root.join("backend"),
            control: root.join("control.sock"),
            facts: root.join("dev.json"),
            root,
        };
        private_dir(&state.backend)?;
        Ok(state)
    }

    fn backend_socket(&self) -> PathBuf {
        self.backend.join("backend.sock")
    }
}

pub fn dev(args: &DevArgs) -> anyhow::Result<u8> {
    logs::to_stderr();
    let state = State::open(&args.state)?;
    if UnixStream::connect(&state.control).is_ok() {
        bail!(
            "a gateway runs with the state folder {} already; stop it or use --state",
            state.root.display()
        );
    }
    let listen = addresses(args.port)?;
    for address in &listen {
        // Before a backend is started for nothing.
        crate::edge::listener::bind(*address, 1)?;
    }
    let files = DevAuthority::open_or_create(&state.root.join("certs"), &["localhost", "127.0.0.1", "::1"])?;
    write_policy(&state.policy)?;
    let backend = Backend::start(&state)?;
    let run_args = RunArgs {
        policy: PolicyArgs {
            policy: state.policy.clone(),
            state: state.root.clone(),
            define: vec![
                ("backend".to_owned(), format!("unix:{}", state.backend_socket().display())),
                ("jwks".to_owned(), format!("file:{}", state.backend.join("jwks.json").display())),
            ],
        },
        listen,
        http: Vec::new(),
        https_port: args.port,
        metrics: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), args.metrics_port),
        control: Some(state.control.clone()),
        cores: args.cores,
    };
    let token = runtime()?.block_on(backend_echo::demo_token(&state.backend_socket(), "alice", "browser"))?;
    let mut published = Ok(());
    let outcome = run::run(&run_args, |running| published = publish(&state, &files.ca, &token, running));
    drop(backend);
    // Tells scripts that nothing runs here any more.
    let _ = fs::remove_file(&state.facts);
    published?;
    outcome
}

/// Loopback in both families, where the machine has both.
fn addresses(port: u16) -> anyhow::Result<Vec<SocketAddr>> {
    let v4 = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let v6 = IpAddr::V6(Ipv6Addr::LOCALHOST);
    let port = match port {
        0 => TcpListener::bind((v4, 0))?.local_addr()?.port(),
        port => port,
    };
    let mut addresses = vec![SocketAddr::new(v4, port)];
    if TcpListener::bind((v6, 0)).is_ok() {
        addresses.push(SocketAddr::new(v6, port));
    }
    Ok(addresses)
}

/// Puts the `enterprise` bundle and the demo's additions where a person can edit them. What is there
/// stays.
fn write_policy(folder: &Path) -> anyhow::Result<()> {
    if folder.join("policy.toml").exists() {
        return Ok(());
    }
    for name in ["enterprise", "development"] {
        let bundle = Bundle::shipped(name).with_context(|| format!("bundle {name} is not built in"))?;
        for (path, content) in bundle.files {
            let target = folder.join(path);
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::write(&target, content).with_context(|| target.display().to_string())?;
        }
    }
    Ok(())
}

/// The included backend in a process of its own. Dropped, it ends.
struct Backend(Child);

impl Backend {
    fn start(state: &State) -> anyhow::Result<Self> {
        let socket = state.backend_socket();
        let child = Command::new(std::env::current_exe()?)
            .arg("dev-backend")
            .args(["--development", "--state"])
            .arg(&state.backend)
            .arg("--listen")
            .arg(format!("unix:{}", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            // Ctrl-C is for the gateway: the backend ends after it, so that requests can finish.
            .process_group(0)
            .spawn()
            .context("the backend could not be started")?;
        let mut backend = Self(child);
        let deadline = Instant::now() + BACKEND_PATIENCE;
        while UnixStream::connect(&socket).is_err() {
            if let Some(status) = backend.0.try_wait()? {
                bail!("the backend ended at once ({status})");
            }
            if Instant::now() > deadline {
                bail!("the backend does not answer at {}", socket.display());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(backend)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + BACKEND_PATIENCE;
        while Instant::now() < deadline {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `sealgate dev-backend`: what [`Backend::start`] starts.
pub fn backend(options: backend_echo::Options) -> anyhow::Result<u8> {
    logs::to_stderr();
    // However the gateway ends, its backend does not stay behind.
    set_parent_process_death_signal(Some(Signal::TERM))?;
    runtime()?.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        backend_echo::serve(options, async move {
            terminate.recv().await;
        })
        .await
    })?;
    Ok(FINE)
}

fn runtime() -> std::io::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build()
}

/// Says what to try next: to a person on stdout, to scripts in `dev.json`.
#[expect(clippy::print_stdout, reason = "the command's answer")]
fn publish(state: &State, ca: &Path, token: &str, running: &run::Running) -> anyhow::Result<()> {
    let port = running.addresses.first().context("no address")?.port();
    let url = format!("https://127.0.0.1:{port}");
    let ws_url = format!("wss://127.0.0.1:{port}");
    let metrics_url = format!("http://{}/metrics", running.metrics);
    let facts = serde_json::json!({
        "url": url,
        "ws_url": ws_url,
        "ca": ca,
        "token": token,
        "metrics_url": metrics_url,
        "control": running.control,
        "policy": state.policy,
    });
    write_private(&state.facts, serde_json::to_string_pretty(&facts)?.as_bytes())?;
    let here = std::env::current_dir().unwrap_or_default();
    let short = |path: &Path| path.strip_prefix(&here).unwrap_or(path).display().to_string();
    let (ca, facts, policy) = (short(ca), short(&state.facts), short(&state.policy.join("policy.toml")));
    let im = im_command();
    let state_option = if state.root == here.join(".sealgate") {
        String::new()
    } else {
        format!(" --state {}", short(&state.root))
    };
    println!(
        "\
sealgate {version} serves {url} (also https://localhost:{port}). Ctrl-C stops everything.

A request that the policy allows, and one that it refuses:

  curl --cacert {ca} -H 'Authorization: Bearer {token}' {url}/v1/echo
  curl --cacert {ca} {url}/v1/echo

An end-to-end encrypted message from one process to another (two terminals; the backend stores ciphertext):

  {im} --dev {facts} --user bob listen
  {im} --dev {facts} --user alice send bob 'hello'

Metrics:      curl {metrics_url}
The policy:   {policy} (edit it: a change takes effect when you save, a faulty one is reported here)
Ask for it:   sealgate reload{state_option}
For scripts:  {facts}
",
        version = env!("CARGO_PKG_VERSION"),
    );
    Ok(())
}

/// How a person starts `im` from where this program was started.
fn im_command() -> String {
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join("im")));
    match beside {
        Some(im) if im.is_file() => {
            let here = std::env::current_dir().unwrap_or_default();
            im.strip_prefix(here).unwrap_or(&im).display().to_string()
        }
        _ => "cargo run -q --release -p backend-echo --bin im --".to_owned(),
    }
}
