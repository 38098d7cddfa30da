//! `sealgate certs`, over the control socket or from a policy.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{
    FINE, REFUSED, complain, definition,
    reload::{ControlArgs, NOT_ASKED},
};
use crate::{
    admin::control::{Answer, Command},
    clock,
    reload::{CertificateRow, Material, PolicySource},
};

#[derive(Subcommand)]
pub enum CertsCommand {
    /// Show the certificates that a running gateway serves, or with --policy those that it would serve. Exit code 1 if one has
    /// expired.
    List(ListArgs),
    /// Have a running gateway ask its ACME authorities for certificates now, whatever is left of those that it has. Does not wait for
    /// them: its log and `certs list` tell.
    Renew(RenewArgs),
}

#[derive(Args)]
pub struct RenewArgs {
    /// Only certificates that have this name.
    #[arg(value_name = "NAME")]
    name: Option<String>,
    #[command(flatten)]
    control: ControlArgs,
}

#[derive(Args)]
pub struct ListArgs {
    /// Folder of a policy bundle to read instead of asking a gateway.
    #[arg(long, value_name = "DIR")]
    policy: Option<PathBuf>,
    /// Sets a variable of the policy. May be repeated.
    #[arg(long = "define", value_name = "NAME=VALUE", value_parser = definition, requires = "policy")]
    define: Vec<(String, String)>,
    #[command(flatten)]
    control: ControlArgs,
}

pub fn certs(command: &CertsCommand) -> anyhow::Result<u8> {
    let args = match command {
        CertsCommand::List(args) => args,
        CertsCommand::Renew(args) => return renew(args),
    };
    match &args.policy {
        Some(policy) => of_policy(args, policy),
        None => match args.control.ask(&Command::Certificates)? {
            Answer::Certificates { certificates } => Ok(show(&certificates, args.control.json)),
            Answer::Refused { message } => {
                complain(&message);
                Ok(REFUSED)
            }
            _ => {
                complain(NOT_ASKED);
                Ok(REFUSED)
            }
        },
    }
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn renew(args: &RenewArgs) -> anyhow::Result<u8> {
    match args.control.ask(&Command::Renew { name: args.name.clone() })? {
        Answer::Renewing { certificates } => {
            if !args.control.json {
                println!("{certificates} certificate(s) asked for");
            }
            Ok(FINE)
        }
        Answer::Refused { message } => {
            complain(&message);
            Ok(REFUSED)
        }
        _ => {
            complain(NOT_ASKED);
            Ok(REFUSED)
        }
    }
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the command's answer")]
fn of_policy(args: &ListArgs, policy: &std::path::Path) -> anyhow::Result<u8> {
    let source = PolicySource::of(policy, args.control.state(), &args.define);
    match source.read().and_then(Material::check) {
        Ok(checked) => {
            if args.control.json {
                let certificates = checked.certificates.clone();
                println!("{}", serde_json::to_string(&Answer::Certificates { certificates })?);
            }
            Ok(show(&checked.certificates, args.control.json))
        }
        Err(error) => {
            eprintln!("{error}");
            Ok(REFUSED)
        }
    }
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn show(rows: &[CertificateRow], json: bool) -> u8 {
    let now = clock::unix_now();
    for row in rows {
        if !json {
            let days = row.expires_at.saturating_sub(now) / 86_400;
            let state = match row.alarm(now) {
                _ if row.expires_at < now => "EXPIRED".to_owned(),
                Some(_) => format!("{days} days left, renew it"),
                None => format!("{days} days left"),
            };
            println!("{}  {}  {}  {}  by {}", row.names, row.key, state, row.serial, row.issuer);
        }
    }
    if rows.iter().any(|row| row.expires_at < now) { REFUSED } else { FINE }
}
