//! `sealgate block`, `unblock` and `blocks`, over the control socket.

use std::{net::IpAddr, time::Duration};

use clap::Args;
use sealgate_policy::parse_duration;

use super::{
    FINE, REFUSED, complain,
    reload::{ControlArgs, NOT_ASKED},
};
use crate::{
    admin::control::{Answer, Command},
    clock,
};

#[derive(Args)]
pub struct BlockArgs {
    /// The address; of IPv6, its /64.
    #[arg(value_name = "ADDRESS")]
    address: IpAddr,
    /// For how long, such as "1h".
    #[arg(long = "for", value_name = "DURATION", default_value = "1h", value_parser = parse_duration)]
    duration: Duration,
    #[command(flatten)]
    control: ControlArgs,
}

#[derive(Args)]
pub struct UnblockArgs {
    /// The address; of IPv6, its /64.
    #[arg(value_name = "ADDRESS")]
    address: IpAddr,
    #[command(flatten)]
    control: ControlArgs,
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
pub fn block(args: &BlockArgs) -> anyhow::Result<u8> {
    let ttl = args.duration.as_secs().max(1);
    match args.control.ask(&Command::Block { address: args.address, ttl })? {
        Answer::Blocked { allowed, .. } => {
            if !args.control.json {
                println!("{} is blocked for {ttl} s", args.address);
            }
            if allowed {
                complain("the policy's allow list has this address: it is let in all the same");
            }
            Ok(if allowed { REFUSED } else { FINE })
        }
        other => refused(&other),
    }
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
pub fn unblock(args: &UnblockArgs) -> anyhow::Result<u8> {
    match args.control.ask(&Command::Unblock { address: args.address })? {
        Answer::Unblocked { was_blocked } => {
            if !args.control.json {
                let was = if was_blocked { "is let in again" } else { "was not blocked" };
                println!("{} {was}", args.address);
            }
            Ok(FINE)
        }
        other => refused(&other),
    }
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
pub fn blocks(control: &ControlArgs) -> anyhow::Result<u8> {
    match control.ask(&Command::Blocks)? {
        Answer::Blocks { blocks, count } => {
            if !control.json {
                let now = clock::unix_now();
                for block in &blocks {
                    let left = block.until.saturating_sub(now);
                    let by = block.penalty.as_deref().unwrap_or("the operator");
                    println!("{}  for {left} s  by {by}", block.address);
                }
                if count > blocks.len() {
                    println!("and {} more", count - blocks.len());
                }
            }
            Ok(FINE)
        }
        other => refused(&other),
    }
}

fn refused(answer: &Answer) -> anyhow::Result<u8> {
    complain(match answer {
        Answer::Refused { message } => message,
        _ => NOT_ASKED,
    });
    Ok(REFUSED)
}
