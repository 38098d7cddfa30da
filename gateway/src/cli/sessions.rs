//! `sealgate sessions`, over the control socket.

use std::time::Duration;

use clap::{Args, Subcommand};
use sealgate_policy::parse_duration;

use super::{
    FINE, REFUSED, complain,
    reload::{ControlArgs, NOT_ASKED},
};
use crate::{
    admin::control::{Answer, Command, RevokeTarget},
    clock,
    session::{MAX_PAGE, SessionRow},
};

#[derive(Subcommand)]
pub enum SessionsCommand {
    /// Show whose WebSockets are open. With --json, one object a line for each 1,000 sessions.
    List(ListArgs),
    /// End sessions: their tokens count no more, and their open sockets are closed with 4410.
    Revoke(RevokeArgs),
}

#[derive(Args)]
pub struct ListArgs {
    /// Only this subject.
    #[arg(long, value_name = "SUBJECT")]
    subject: Option<String>,
    /// Only subjects of this issuer, by its name or `iss`.
    #[arg(long, value_name = "ISSUER")]
    issuer: Option<String>,
    /// Sessions that are shown at most.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
    #[command(flatten)]
    control: ControlArgs,
}

#[derive(Args)]
pub struct RevokeArgs {
    #[command(flatten)]
    whose: Whose,
    /// Name or `iss` of their issuer; needed where the policy has several.
    #[arg(long, value_name = "ISSUER")]
    issuer: Option<String>,
    /// How long to remember it, such as "2h"; by default the policy's session.lifetime, and 400 days for a key.
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
    /// All tokens signed with the issuer's key of this `kid`, now and later: it has leaked. Take it from the issuer's key
    /// set too.
    #[arg(long, value_name = "KID")]
    key: Option<String>,
}

pub fn sessions(command: &SessionsCommand) -> anyhow::Result<u8> {
    match command {
        SessionsCommand::List(args) => list(args),
        SessionsCommand::Revoke(args) => revoke(args),
    }
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn list(args: &ListArgs) -> anyhow::Result<u8> {
    let (mut after, mut left, mut code) = (None, args.limit as usize, FINE);
    let now = clock::unix_now();
    loop {
        let answer = args.control.ask(&Command::Sessions {
            issuer: args.issuer.clone(),
            subject: args.subject.clone(),
            after,
            limit: Some(left.min(MAX_PAGE)),
        })?;
        let page = match answer {
            Answer::Sessions(page) => page,
            other => return refused(&other),
        };
        for SessionRow { of, sockets, opened_at, routes } in &page.sessions {
            if !args.control.json {
                let word = |word: &Option<String>| word.clone().unwrap_or_else(|| "-".to_owned());
                let (subject, session, issuer) = (word(&of.subject), word(&of.session), word(&of.issuer));
                let age = now.saturating_sub(*opened_at);
                println!("{subject}  {session}  {issuer}  {sockets} open  for {age} s  {}", routes.join(","));
            }
        }
        if !page.complete {
            complain("not all cores have answered: sockets are missing here");
            code = REFUSED;
        }
        left = left.saturating_sub(page.sessions.len());
        match page.next {
            Some(next) if left > 0 => after = Some(next),
            Some(_) => {
                complain("there are more; see --limit");
                return Ok(code);
            }
            None => return Ok(code),
        }
    }
}

fn refused(answer: &Answer) -> anyhow::Result<u8> {
    complain(match answer {
        Answer::Refused { message } => message,
        _ => NOT_ASKED,
    });
    Ok(REFUSED)
}

#[expect(clippy::print_stdout, reason = "the command's answer")]
fn revoke(args: &RevokeArgs) -> anyhow::Result<u8> {
    let Whose { subject, session, token_id, key, all_of_issuer: _ } = &args.whose;
    let target = match (subject, session, token_id, key) {
        (Some(subject), ..) => RevokeTarget::Subject(subject.clone()),
        (_, Some(session), ..) => RevokeTarget::Session(session.clone()),
        (_, _, Some(token), _) => RevokeTarget::Token(token.clone()),
        (.., Some(key)) => RevokeTarget::Key(key.clone()),
        // INVARIANT: clap has seen to it that one of the five was given.
        (None, None, None, None) => RevokeTarget::AllOfIssuer,
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
            if !report.kept {
                complain(
                    "not on disk: it holds now, and is forgotten if the gateway restarts before it can be written",
                );
            }
            Ok(if report.entered && report.complete && report.kept { FINE } else { REFUSED })
        }
        other => refused(&other),
    }
}
