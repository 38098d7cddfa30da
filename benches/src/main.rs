//! Compares sealgate with other proxies, side by side on one machine: see `README.md`.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a command line tool talks to its user")]

mod cluster;
mod crowd;
mod load;
mod measure;
mod proxies;
mod report;
mod shared;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;

use crate::load::{Idle, MESSAGE_BYTES, Plan, Quiet, Shake, Work};
use crate::measure::{Memory, Processes};
use crate::proxies::{Binaries, Cpus, Kind, Proxy, Stage};
use crate::report::{Sample, Section};

/// Work that is done before it is measured.
const WARM_UP: Duration = Duration::from_millis(500);

/// Sockets that are opened and closed before the base of an idle measurement is taken, so that what a
/// proxy allocates once is not charged to the sockets.
const IDLE_WARM_UP: usize = 16;

#[derive(Parser)]
#[command(about = "Benchmarks of sealgate")]
struct Arguments {
    #[command(subcommand)]
    command: Subject,
}

#[derive(Subcommand)]
enum Subject {
    /// Measure sealgate beside nginx, HAProxy and Caddy: server CPU per unit of work, and memory per idle socket.
    Compare(Options),
    /// Measure what revoking a subject and loading a policy cost while thousands of sockets are open.
    Crowd(crowd::Crowd),
    /// Measure how long a logout takes over three gateways and Redis, and what happens when Redis is away.
    Cluster(cluster::Cluster),
    /// Measure requests under a rate that gateways share, while Redis is well, slow, late, paused and gone.
    Shared(shared::Options),
}

#[derive(Args, Serialize)]
struct Options {
    /// Only these workloads (default: all).
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Workload>,
    /// Only these proxies; the first is the base of the ratios.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Kind::Nginx, Kind::Haproxy, Kind::Caddy, Kind::Sealgate])]
    proxies: Vec<Kind>,
    /// Rounds; in each, every proxy is visited once.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Measured seconds per visit.
    #[arg(long, default_value_t = 2.5)]
    seconds: f64,
    /// Connections that work at the same time.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    connections: u16,
    /// Messages under way per WebSocket in the echo workloads.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    in_flight: u16,
    /// Units per second, the same for every proxy (default: as fast as answers come).
    #[arg(long)]
    rate: Option<f64>,
    /// Sockets, or connections, of the idle workloads.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u16).range(1..))]
    idle_sockets: u16,
    /// The gateway to measure (default: built in release from this workspace).
    #[arg(long)]
    binary: Option<PathBuf>,
    /// The backend behind every proxy (default: built in release from this workspace).
    #[arg(long)]
    backend: Option<PathBuf>,
    /// Where the figures go (default: `benches/results/compare-SECONDS.json`).
    #[arg(long)]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Workload {
    /// HTTPS/1.1 requests on kept-alive connections.
    Requests,
    /// HTTP/2 requests on kept-alive connections, one at a time on each.
    H2,
    /// Full TLS 1.3 handshakes (ECDSA P-256, X25519), with one request each.
    Handshakes,
    /// The same with an RSA-2048 key; not with Caddy, which takes one certificate here.
    HandshakesRsa,
    /// Handshakes resumed by tickets, with a fresh key exchange, with one request each.
    HandshakesResumed,
    /// Full handshakes with the post-quantum hybrid X25519MLKEM768; sealgate alone: Debian's others have none.
    HandshakesHybrid,
    /// Messages through WebSockets and back.
    Echo,
    /// The same where sealgate judges every message by a schema and a rate; the others look at none.
    EchoChecked,
    /// Memory of idle proxied WebSockets.
    Idle,
    /// Memory of idle HTTPS/1.1 connections that are kept alive after a request.
    IdleKeptAlive,
    /// Memory of idle TLS connections without a request.
    IdleHandshaken,
}

fn main() -> ExitCode {
    match run(&Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(subject: &Subject) -> Result<()> {
    let binaries = match subject {
        Subject::Compare(options) => {
            options.check()?;
            let wants_sealgate = options.proxies.contains(&Kind::Sealgate);
            binaries(options.binary.as_deref(), options.backend.as_deref(), wants_sealgate)?
        }
        Subject::Crowd(options) => binaries(options.binary.as_deref(), options.backend.as_deref(), true)?,
        Subject::Cluster(options) => binaries(options.binary.as_deref(), options.backend.as_deref(), true)?,
        Subject::Shared(options) => binaries(options.binary.as_deref(), options.backend.as_deref(), true)?,
    };
    let open_files = measure::lift_open_files()?;
    let cpus = Cpus::find()?;
    cpus.pin_client()?;
    if cpus.proxy == cpus.client {
        eprintln!("warning: one CPU for proxy and client: they disturb each other");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        tokio::select! {
            done = async {
                match subject {
                    Subject::Compare(options) => compare(options, binaries, cpus, open_files).await,
                    Subject::Crowd(options) => {
                        crowd::run(options, Stage::set(cpus, binaries, open_files).await?).await
                    }
                    Subject::Cluster(options) => {
                        cluster::run(options, Stage::set(cpus, binaries, open_files).await?).await
                    }
                    Subject::Shared(options) => {
                        shared::run(options, Stage::set(cpus, binaries, open_files).await?).await
                    }
                }
            } => done,
            signal = stopped() => bail!("stopped by {}", signal?),
        }
    })
}

impl Options {
    fn check(&self) -> Result<()> {
        ensure!(self.seconds > 0.0 && self.seconds <= 3600.0, "--seconds: 0 to 3600");
        ensure!(self.rate.is_none_or(|rate| rate >= 1.0), "--rate: at least 1");
        for (place, kind) in self.proxies.iter().enumerate() {
            ensure!(!self.proxies.iter().take(place).any(|other| other == kind), "--proxies: {kind} twice");
        }
        Ok(())
    }

    fn workloads(&self) -> &[Workload] {
        match self.only.as_slice() {
            [] => Workload::value_variants(),
            only => only,
        }
    }

    fn plan(&self) -> Plan {
        Plan {
            connections: self.connections.into(),
            warm_up: WARM_UP,
            measured: Duration::from_secs_f64(self.seconds),
            rate: self.rate,
        }
    }
}

/// Builds what was not named, so that no stale binary is measured.
fn binaries(sealgate: Option<&Path>, backend: Option<&Path>, wants_sealgate: bool) -> Result<Binaries> {
    let own = env::current_exe()?;
    let target = own.ancestors().nth(2).context("no target folder")?;
    let build = |package: &str| -> Result<PathBuf> {
        eprintln!("building {package}");
        let status = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "--release", "--quiet", "--bin", package, "--package", package, "--target-dir"])
            .arg(target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .context("cargo")?;
        ensure!(status.success(), "{package} does not build");
        Ok(target.join("release").join(package))
    };
    let named =
        |path: Option<&Path>, package| path.map_or_else(|| build(package), |path| Ok(path.to_owned()));
    Ok(Binaries {
        backend: named(backend, "backend-echo")?,
        sealgate: if wants_sealgate { named(sealgate, "sealgate")? } else { PathBuf::new() },
    })
}

/// Which signal asked us to stop. Dropping the comparison ends all its children.
async fn stopped() -> Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    tokio::select! {
        done = tokio::signal::ctrl_c() => done.map(|()| "SIGINT").map_err(Into::into),
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = hang_up.recv() => Ok("SIGHUP"),
    }
}

#[derive(Serialize)]
struct Report<'a> {
    started_unix_s: u64,
    kernel: String,
    processor: String,
    cpus: Cpus,
    versions: Vec<(Kind, String)>,
    options: &'a Options,
    sections: Vec<Section>,
}

async fn compare(options: &Options, binaries: Binaries, cpus: Cpus, open_files: u64) -> Result<()> {
    let mut report = Report {
        started_unix_s: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        processor: processor(),
        cpus,
        versions: Vec::new(),
        options,
        sections: Vec::new(),
    };
    println!(
        "Linux {}, {}; proxy on CPU {}, client and backend on CPU {}",
        report.kernel, report.processor, cpus.proxy, cpus.client
    );
    for kind in &options.proxies {
        let version = proxies::version(*kind, &binaries)?;
        println!("  {kind:10} {version}");
        report.versions.push((*kind, version));
    }
    println!();

    let mut stage = Stage::set(cpus, binaries, open_files).await?;
    let mut running = Vec::new();
    for kind in &options.proxies {
        running.push(stage.start(*kind).await?);
    }
    for workload in options.workloads() {
        // Those that can do it; the others stand idle meanwhile, on the same CPU, and cost nothing there.
        let (mut able, idle): (Vec<_>, Vec<_>) =
            running.into_iter().partition(|proxy: &Proxy| workload.is_for(proxy.kind));
        let mut rounds = Vec::new();
        for round in 0..options.rounds.into() {
            rounds.push(one_round(options, *workload, round, &mut stage, &mut able).await?);
        }
        running = able;
        running.extend(idle);
        running.sort_by_key(|proxy| options.proxies.iter().position(|kind| *kind == proxy.kind));
        let section = workload.section(options, rounds);
        println!("{section}");
        report.sections.push(section);
    }

    let path = options.json.clone().unwrap_or_else(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
        folder.join(format!("compare-{}.json", report.started_unix_s))
    });
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")
        .with_context(|| path.display().to_string())?;
    println!("{}", path.display());
    Ok(())
}

/// Visits every proxy once, each round beginning with another; returns the samples in the order of
/// `running`.
async fn one_round(
    options: &Options,
    workload: Workload,
    round: usize,
    stage: &mut Stage,
    running: &mut [Proxy],
) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    let count = running.len();
    let first = round % count.max(1);
    for place in (0..count).cycle().skip(first).take(count) {
        let Some(proxy) = running.get_mut(place) else {
            continue;
        };
        let kind = proxy.kind;
        let sample = match workload.work(options) {
            Ok(work) => one_visit(options, work, stage, proxy).await,
            Err(quiet) => idle_memory(options, quiet, stage, kind).await,
        };
        stage.check_backend()?;
        let sample = sample.with_context(|| format!("{kind}, {}, round {}", workload.name(), round + 1))?;
        samples.push((place, sample));
    }
    samples.sort_by_key(|(place, _)| *place);
    Ok(samples.into_iter().map(|(_, sample)| sample).collect())
}

async fn one_visit(options: &Options, work: Work, stage: &Stage, proxy: &mut Proxy) -> Result<Sample> {
    let target = stage.target(proxy)?;
    let (processes, watch) = (proxy.processes()?, stage.watch(proxy)?);
    let visited = load::visit(&target, work, &options.plan(), &processes, &watch).await;
    // A proxy that has ended explains more than the connections that it cut.
    proxy.processes()?;
    Ok(Sample::of_visit(&visited?))
}

/// Growth per socket of a proxy that was started for this alone, in KiB.
async fn idle_memory(options: &Options, quiet: Quiet, stage: &Stage, kind: Kind) -> Result<Sample> {
    let mut proxy = stage.start(kind).await?;
    let target = stage.target(&proxy)?;
    drop(Idle::open(&target, quiet, IDLE_WARM_UP).await?);
    let processes = proxy.processes()?;
    let before = settled(&processes, async |time| {
        tokio::time::sleep(time).await;
        Ok(())
    })
    .await?;
    let count = usize::from(options.idle_sockets);
    let mut sockets = Idle::open(&target, quiet, count).await?;
    let after = settled(&processes, async |time| sockets.hold(time).await).await?;
    processes.unchanged()?;
    let per_socket = |after: u64, before: u64| (after as f64 - before as f64) / count as f64 / 1024.0;
    Ok(Sample {
        figure: per_socket(after.rss, before.rss),
        speed: None,
        pss_kib: Some(per_socket(after.pss, before.pss)),
    })
}

/// Memory once it has stopped changing (by more than 0.5 % in half a second; at most 10 s are waited).
async fn settled(processes: &Processes, mut wait: impl AsyncFnMut(Duration) -> Result<()>) -> Result<Memory> {
    let mut last = processes.memory()?;
    for _ in 0..20 {
        wait(Duration::from_millis(500)).await?;
        let now = processes.memory()?;
        let change = now.rss.abs_diff(last.rss);
        last = now;
        if change * 200 <= now.rss {
            break;
        }
    }
    Ok(last)
}

impl Workload {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// What the client does, or what idles where memory is counted.
    fn work(self, options: &Options) -> Result<Work, Quiet> {
        let in_flight = options.in_flight.into();
        Ok(match self {
            Self::Requests => Work::Request,
            Self::H2 => Work::Request2,
            Self::Handshakes => Work::Handshake(Shake::Ecdsa),
            Self::HandshakesRsa => Work::Handshake(Shake::Rsa),
            Self::HandshakesResumed => Work::Handshake(Shake::Resumed),
            Self::HandshakesHybrid => Work::Handshake(Shake::Hybrid),
            Self::Echo => Work::Echo { path: "/v1/echo", in_flight },
            Self::EchoChecked => Work::Echo { path: "/v1/echo-checked", in_flight },
            Self::Idle => return Err(Quiet::Socket("/v1/echo")),
            Self::IdleKeptAlive => return Err(Quiet::KeptAlive),
            Self::IdleHandshaken => return Err(Quiet::Handshaken),
        })
    }

    fn is_for(self, kind: Kind) -> bool {
        match self {
            Self::HandshakesRsa => kind != Kind::Caddy,
            Self::HandshakesHybrid => kind == Kind::Sealgate,
            _ => true,
        }
    }

    fn section(self, options: &Options, rounds: Vec<Vec<Sample>>) -> Section {
        let Options { connections, in_flight, seconds, idle_sockets, .. } = options;
        let pace = match options.rate {
            Some(rate) => format!("{rate} per second"),
            None => "closed loop".to_owned(),
        };
        let times = format!("{} rounds of {seconds} s, {pace}", options.rounds);
        let what = match self {
            Self::Requests => format!("HTTPS/1.1 request, {connections} kept-alive connections, {times}"),
            Self::H2 => format!("HTTP/2 request, {connections} kept-alive connections, {times}"),
            Self::Handshakes => {
                format!("full TLS 1.3 handshake and one request, {connections} at a time, {times}")
            }
            Self::HandshakesRsa => {
                format!(
                    "full TLS 1.3 handshake with RSA-2048 and one request, {connections} at a time, {times}"
                )
            }
            Self::HandshakesResumed => {
                format!("resumed TLS 1.3 handshake and one request, {connections} at a time, {times}")
            }
            Self::HandshakesHybrid => format!(
                "full TLS 1.3 handshake with X25519MLKEM768 and one request, {connections} at a time, {times}"
            ),
            Self::Echo => format!(
                "WSS echo of {MESSAGE_BYTES} bytes, {connections} sockets, {in_flight} in flight on each, {times}"
            ),
            Self::EchoChecked => format!(
                "WSS echo as before, where sealgate checks schema and rate of every message, {connections} \
                 sockets, {in_flight} in flight on each, {times}"
            ),
            Self::IdleKeptAlive => format!(
                "memory per idle HTTPS/1.1 connection: growth of RSS over all processes, {idle_sockets} connections that \
                 have each carried one request, {} rounds with fresh processes",
                options.rounds
            ),
            Self::IdleHandshaken => format!(
                "memory per idle TLS connection: growth of RSS over all processes, {idle_sockets} connections after \
                 the handshake, without a request, {} rounds with fresh processes",
                options.rounds
            ),
            Self::Idle => format!(
                "memory per idle proxied WSS: growth of RSS over all processes, {idle_sockets} sockets that have \
                 each echoed one message, {} rounds with fresh processes",
                options.rounds
            ),
        };
        let (title, unit) = match self {
            Self::Idle | Self::IdleKeptAlive | Self::IdleHandshaken => (what, "KiB"),
            _ => (format!("server CPU per {what}"), "µs"),
        };
        let proxies = options.proxies.iter().copied().filter(|kind| self.is_for(*kind)).collect();
        Section::new(self.name(), title, unit, proxies, rounds)
    }
}

fn processor() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_sound() {
        use clap::CommandFactory as _;
        Arguments::command().debug_assert();
        let parsed = Arguments::try_parse_from(["x", "compare", "--only", "echo,idle", "--proxies", "nginx"]);
        let Subject::Compare(options) = parsed.unwrap().command else { panic!("not a comparison") };
        assert_eq!(options.workloads(), [Workload::Echo, Workload::Idle]);
        assert!(options.check().is_ok());
        let parsed = Arguments::try_parse_from(["x", "compare", "--proxies", "nginx,nginx"]);
        let Subject::Compare(options) = parsed.unwrap().command else { panic!("not a comparison") };
        assert!(options.check().is_err());
    }
}
