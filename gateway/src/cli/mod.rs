//! The command line.

mod blocks;
mod certs;
mod check;
#[cfg(feature = "dev")]
mod dev;
mod logs;
mod policy;
mod reload;
mod run;
mod sessions;

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};

/// Nothing wrong.
const FINE: u8 = 0;
/// A configuration was refused, or the command failed.
const REFUSED: u8 = 1;
// 2, for wrong usage, is clap's.

/// An edge gateway for instant messaging.
#[derive(Parser)]
#[command(name = "sealgate", version, about, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the gateway.
    Run(RunArgs),
    /// Run everything on this machine: certificates, backend, gateway, demo users.
    #[cfg(feature = "dev")]
    Dev(dev::DevArgs),
    /// Check a policy and all that it names; report every error. Exit code 0 or 1.
    #[command(visible_alias = "test-config", short_flag = 't')]
    Check(check::CheckArgs),
    /// Make a running gateway load its policy anew, and say what came of it.
    Reload(reload::ControlArgs),
    /// Say what a running gateway has in force.
    Status(reload::ControlArgs),
    /// See and end sessions of a running gateway.
    #[command(subcommand)]
    Sessions(sessions::SessionsCommand),
    /// Refuse an address for a time: its new connections are closed, its requests get 403.
    Block(blocks::BlockArgs),
    /// Let an address in again.
    Unblock(blocks::UnblockArgs),
    /// Show which addresses are refused for a time, by an operator or a penalty.
    Blocks(reload::ControlArgs),
    /// See certificates, of a running gateway or of a policy.
    #[command(subcommand)]
    Certs(certs::CertsCommand),
    /// Look at policies.
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Say which version this is.
    Version {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// The included backend, for `dev` to start.
    #[cfg(feature = "dev")]
    #[command(hide = true, name = "dev-backend")]
    DevBackend(backend_echo::Options),
}

/// Where a policy is, and what it is filled in with.
#[derive(Args, Clone)]
struct PolicyArgs {
    /// Folder of the policy bundle.
    #[arg(long, value_name = "DIR")]
    policy: PathBuf,
    /// Folder for keys, sockets and other state; `${state}` in the policy.
    #[arg(long, value_name = "DIR", default_value = ".sealgate")]
    state: PathBuf,
    /// Sets a variable of the policy. May be repeated.
    #[arg(long = "define", value_name = "NAME=VALUE", value_parser = definition)]
    define: Vec<(String, String)>,
}

#[derive(Args, Clone)]
struct RunArgs {
    #[command(flatten)]
    policy: PolicyArgs,
    /// Address to serve TLS on. May be repeated.
    #[arg(long, value_name = "ADDRESS:PORT", default_values = ["0.0.0.0:8443"])]
    listen: Vec<SocketAddr>,
    /// Address for plain HTTP, which is sent on to HTTPS (308), and where ACME authorities validate names (http-01). May be repeated;
    /// none by default.
    #[arg(long, value_name = "ADDRESS:PORT")]
    http: Vec<SocketAddr>,
    /// The port of HTTPS that plain HTTP is sent to.
    #[arg(long, value_name = "PORT", default_value_t = 443)]
    https_port: u16,
    /// Address for /metrics, /healthz and /readyz: private, without TLS.
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:9180")]
    metrics: SocketAddr,
    /// The control socket; by default `control.sock` in the state folder.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Threads that serve; by default one for each core of the machine.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    cores: Option<u16>,
}

fn definition(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

/// The whole program.
#[must_use]
pub fn main() -> ExitCode {
    sealgate_keys::install_default_provider();
    let outcome = match Cli::parse().command {
        Command::Run(args) => {
            logs::to_stderr();
            run::run(&args, |_| {})
        }
        #[cfg(feature = "dev")]
        Command::Dev(args) => dev::dev(&args),
        Command::Check(args) => check::check(&args),
        Command::Reload(args) => reload::reload(&args),
        Command::Status(args) => reload::status(&args),
        Command::Sessions(command) => sessions::sessions(&command),
        Command::Block(args) => blocks::block(&args),
        Command::Unblock(args) => blocks::unblock(&args),
        Command::Blocks(args) => blocks::blocks(&args),
        Command::Certs(command) => certs::certs(&command),
        Command::Policy(command) => policy::policy(command),
        Command::Version { json } => version(json),
        #[cfg(feature = "dev")]
        Command::DevBackend(options) => dev::backend(options),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain(&format!("{error:#}"));
            ExitCode::from(REFUSED)
        }
    }
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn version(json: bool) -> anyhow::Result<u8> {
    let version = env!("CARGO_PKG_VERSION");
    if json {
        println!("{}", serde_json::json!({ "name": "sealgate", "version": version }));
    } else {
        println!("sealgate {version}");
    }
    Ok(FINE)
}

/// An error for a person, on stderr.
#[expect(clippy::print_stderr, reason = "where errors of a command go")]
fn complain(text: &str) {
    eprintln!("sealgate: {text}");
}
