//! `sealgate sessions`, over the control socket.

use std::time::Duration;

use clap::{Args, Subcommand};
use sealgate_policy::parse_duration;

use super::{
    FINE, REFUSED, complain,
    reload::{ControlArgs, NOT_ASKED},
};
use crate::admin::control::{Answer, Command, RevokeTarget};

#[derive(Subcommand)]
pub enum SessionsCommand {
    /// End sessions: their tokens count no more, and their open sockets are closed with 4410.
    Revoke(RevokeArgs),
}

#[derive(Args)]
pub struct RevokeArgs {
    #[command(flatten)]
    whose: Whose,
    /// Name or `iss` of their issuer; needed where the policy has several.
    #[arg(long, value_name = "ISSUER")]
    issuer: Option<String>,
    /// How long to remember it, such as "2h"; by default the policy's session.lifetime.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    ttl: Option<Duration>,
    #[command(flatten)]
    control: ControlArgs,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Whose {
    /// All tokens of this subject issued until now; it may log in anew.
    #[arg(long, value_name = "SUBJECT")]
    subject: Option<String>,
    /// This session (`sid`), now and later.
    #[arg(long, value_name = "SID")]
    session: Option<String>,
    /// This one token (`jti`).
    #[arg(long, value_name = "JTI")]
    token_id: Option<String>,
    /// All tokens of the issuer issued until now.
    #[arg(long)]
    all_of_issuer: bool,
}

pub fn sessions(command: &SessionsCommand) -> anyhow::Result<u8> {
    match command {
        SessionsCommand::Revoke(args) => revoke(args),
    }
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn revoke(args: &RevokeArgs) -> anyhow::Result<u8> {
    let Whose { subject, session, token_id, all_of_issuer: _ } = &args.whose;
    let target = match (subject, session, token_id) {
        (Some(subject), ..) => RevokeTarget::Subject(subject.clone()),
        (_, Some(session), _) => RevokeTarget::Session(session.clone()),
        (.., Some(token)) => RevokeTarget::Token(token.clone()),
        // INVARIANT: clap has seen to it that one of the four was given.
        (None, None, None) => RevokeTarget::AllOfIssuer,
    };
    let ttl = args.ttl.map(|ttl| ttl.as_secs());
    let answer = args.control.ask(&Command::Revoke { target, issuer: args.issuer.clone(), ttl })?;
    match answer {
        Answer::Revoked(report) => {
            if !args.control.json {
                println!("revoked; {} open socket(s) closed", report.sockets);
            }
            if !report.complete {
                complain("not all cores have answered yet: more sockets may be closing");
            }
            if !report.entered {
                complain("no room to remember it: open sockets were closed, but the tokens still count");
            }
            Ok(if report.entered && report.complete { FINE } else { REFUSED })
        }
        Answer::Refused { message } => {
            complain(&message);
            Ok(REFUSED)
        }
        Answer::Loaded(_) | Answer::Rejected(_) | Answer::Status(_) => {
            complain(NOT_ASKED);
            Ok(REFUSED)
        }
    }
}
