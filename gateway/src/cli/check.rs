//! `sealgate check`: would this policy load?

use clap::Args;

use super::{FINE, PolicyArgs, REFUSED};
use crate::reload::PolicySource;

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
        Ok(policy) if args.json => {
            println!("{}", serde_json::json!({ "ok": true, "hash": policy.hash(), "errors": [] }));
            Ok(FINE)
        }
        Ok(policy) => {
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

impl From<&PolicyArgs> for PolicySource {
    fn from(args: &PolicyArgs) -> Self {
        let state = std::path::absolute(&args.state).unwrap_or_else(|_| args.state.clone());
        let mut variables: std::collections::BTreeMap<_, _> = args.define.iter().cloned().collect();
        variables.insert("state".to_owned(), state.display().to_string());
        let bundle = std::path::absolute(&args.policy).unwrap_or_else(|_| args.policy.clone());
        Self { bundle, variables }
    }
}
