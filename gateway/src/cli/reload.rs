//! `sealgate reload` and `sealgate status`, over the control socket.

use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use super::{FINE, REFUSED};
use crate::admin::control::{Answer, Command, ask};

/// For an answer to another question: only a gateway of another version gives one.
pub(super) const NOT_ASKED: &str = "the gateway answers what was not asked";

/// Where the running gateway is, and how to report.
#[derive(Args)]
pub struct ControlArgs {
    /// The running gateway's control socket; by default `control.sock` in the state folder.
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// The running gateway's state folder.
    #[arg(long, value_name = "DIR", default_value = ".sealgate")]
    state: PathBuf,
    /// Report as JSON.
    #[arg(long)]
    pub(super) json: bool,
}

impl ControlArgs {
    pub(super) fn state(&self) -> &std::path::Path {
        &self.state
    }

    /// Has the gateway do it, and prints its answer if that is to be JSON.
    #[expect(clippy::print_stdout, reason = "the command's answer")]
    pub(super) fn ask(&self, command: &Command) -> anyhow::Result<Answer> {
        let path = self.control.clone().unwrap_or_else(|| self.state.join("control.sock"));
        let answer = ask(&path, command)
            .with_context(|| format!("no gateway answers at {} (name it with --control)", path.display()))?;
        if self.json {
            println!("{}", serde_json::to_string(&answer)?);
        }
        Ok(answer)
    }
}

pub fn reload(args: &ControlArgs) -> anyhow::Result<u8> {
    report(args, &Command::Reload)
}

pub fn status(args: &ControlArgs) -> anyhow::Result<u8> {
    report(args, &Command::Status)
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the command's answer")]
fn report(args: &ControlArgs, command: &Command) -> anyhow::Result<u8> {
    let answer = args.ask(command)?;
    let code = match &answer {
        Answer::Loaded(_) | Answer::Status(_) => FINE,
        _ => REFUSED,
    };
    if !args.json {
        match answer {
            Answer::Loaded(report) => {
                let what = if report.changed { "loaded" } else { "loaded, nothing had changed" };
                println!("{what}: generation {}, hash {}", report.generation, report.hash);
                for warning in &report.warnings {
                    eprintln!("warning: {warning}");
                }
            }
            Answer::Status(status) => println!(
                "version {}, generation {}, hash {}, {} open connection(s)",
                status.version, status.generation, status.hash, status.connections
            ),
            Answer::Rejected(error) => {
                eprintln!("{error}");
                eprintln!("not loaded: {} error(s); the policy before stays in force", error.errors.len());
            }
            Answer::Refused { message } => eprintln!("sealgate: {message}"),
            _ => super::complain(NOT_ASKED),
        }
    }
    Ok(code)
}
