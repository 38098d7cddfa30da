//! `sealgate policy …`: what needs no running gateway.

use clap::{Args, Subcommand};
use sealgate_policy::Bundle;

use super::{FINE, PolicyArgs, REFUSED};
use crate::reload::PolicySource;

#[derive(Subcommand)]
pub enum PolicyCommand {
    /// Run the verdicts in the bundle's `tests/`. Exit code 0 or 1.
    Test(TestArgs),
    /// Print the JSON Schema of `policy.toml`, for editors.
    Schema,
}

#[derive(Args)]
pub struct TestArgs {
    #[command(flatten)]
    policy: PolicyArgs,
}

pub fn policy(command: PolicyCommand) -> anyhow::Result<u8> {
    match command {
        PolicyCommand::Test(args) => test(&args),
        PolicyCommand::Schema => schema(),
    }
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn schema() -> anyhow::Result<u8> {
    println!("{}", serde_json::to_string_pretty(&sealgate_policy::json_schema())?);
    Ok(FINE)
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn test(args: &TestArgs) -> anyhow::Result<u8> {
    let source = PolicySource::from(&args.policy);
    let bundle = Bundle::read(&source.bundle)?;
    let policy = sealgate_policy::Policy::compile(&bundle, &source.variables)?;
    let outcomes = sealgate_policy::run_tests(&policy, &bundle);
    let mut failed = 0;
    for outcome in &outcomes {
        match &outcome.failure {
            None => println!("ok      {}", outcome.name),
            Some(why) => {
                failed += 1;
                println!("FAILED  {}: {why}", outcome.name);
            }
        }
    }
    println!("{} passed, {failed} failed", outcomes.len() - failed);
    Ok(if failed == 0 { FINE } else { REFUSED })
}
