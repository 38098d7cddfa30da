//! `sealgate check`: would this policy load?

use std::path::Path;

use clap::Args;

use super::{FINE, PolicyArgs, REFUSED};
use crate::reload::{Checked, PolicySource};

#[derive(Args)]
pub struct CheckArgs {
    #[command(flatten)]
    policy: PolicyArgs,
    /// Report as JSON.
    #[arg(long)]
    json: bool,
}

#[expect(clippy::print_stdout, clippy::print_stderr, reason = "the command's answer")]
pub fn check(args: &CheckArgs) -> anyhow::Result<u8> {
    let source = PolicySource::from(&args.policy);
    match source.read().and_then(crate::reload::Material::check) {
        Ok(Checked { policy, warnings, .. }) if args.json => {
            let found = serde_json::json!({
                "ok": true, "hash": policy.hash(), "errors": [], "warnings": warnings,
            });
            println!("{found}");
            Ok(FINE)
        }
        Ok(Checked { policy, warnings, .. }) => {
            for warning in &warnings {
                eprintln!("warning: {warning}");
            }
            println!(
                "{}: fine, {} rules, hash {}",
                args.policy.policy.display(),
                policy.rules().len(),
                policy.hash()
            );
            Ok(FINE)
        }
        Err(error) => {
            if args.json {
                println!("{}", serde_json::json!({ "ok": false, "errors": error.errors }));
            } else {
                eprintln!("{error}");
                eprintln!("{}: {} error(s)", args.policy.policy.display(), error.errors.len());
            }
            Ok(REFUSED)
        }
    }
}

impl PolicySource {
    /// A bundle, its state folder, and what the command line defines.
    pub(super) fn of(policy: &Path, state: &Path, define: &[(String, String)]) -> Self {
        let state = std::path::absolute(state).unwrap_or_else(|_| state.to_owned());
        let mut variables: std::collections::BTreeMap<_, _> = define.iter().cloned().collect();
        variables.insert("state".to_owned(), state.display().to_string());
        let bundle = std::path::absolute(policy).unwrap_or_else(|_| policy.to_owned());
        Self { bundle, variables }
    }
}

impl From<&PolicyArgs> for PolicySource {
    fn from(args: &PolicyArgs) -> Self {
        Self::of(&args.policy, &args.state, &args.define)
    }
}
