//! The control socket: one JSON object a line in, one out. Whoever may open it (mode 0600) may command.

use std::{
    io::{self, BufRead as _, Write as _},
    net::IpAddr,
    os::unix::{fs::PermissionsExt as _, net::UnixListener as StdListener, net::UnixStream as StdStream},
    path::Path,
    sync::Arc,
    time::Duration,
};

use sealgate_policy::Issuer;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{mpsc, oneshot},
};

use crate::{
    clock,
    edge::{Gateway, RevokeReport},
    limits::{Block, Listed},
    reload::{Cause, CertificateRow, LoadError, Report, Request},
    session::{MAX_PAGE, MAX_TTL, Revocation, SessionKey, SessionPage, SessionQuery, Target},
};

/// Longest line that is read.
const MAX_LINE_BYTES: u64 = 64 * 1024;

/// Longest id that a token can hold.
const MAX_ID_BYTES: usize = 256;

/// How long a client may take over its line.
const LINE_TIMEOUT: Duration = Duration::from_secs(10);

/// A command of the operator.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Command {
    /// Load the policy anew.
    Reload,
    /// Say what is in force.
    Status,
    /// Say which certificates are served.
    Certificates,
    /// Ask ACME authorities for certificates now.
    Renew {
        /// Those that have this name; default all.
        #[serde(default)]
        name: Option<String>,
    },
    /// Say whose sockets are open, one page.
    Sessions {
        /// Name or `iss` of an issuer: only its subjects.
        #[serde(default)]
        issuer: Option<String>,
        /// Only this subject.
        #[serde(default)]
        subject: Option<String>,
        /// `next` of the page before.
        #[serde(default)]
        after: Option<SessionKey>,
        /// Lines, 1 to 1,000; default 100.
        #[serde(default)]
        limit: Option<usize>,
    },
    /// End sessions: their tokens count no more, and their sockets close.
    Revoke {
        /// Whose.
        target: RevokeTarget,
        /// Name or `iss` of the issuer; may be left out where the policy has only one.
        #[serde(default)]
        issuer: Option<String>,
        /// How long the revocation is remembered, in seconds, 1 to 400 days; default the policy's `session.lifetime`,
        /// and 400 days for a key.
        #[serde(default)]
        ttl: Option<u64>,
    },
    /// Refuse an address for a time.
    Block {
        /// IPv6: its /64.
        address: IpAddr,
        /// In seconds, 1 to 400 days.
        ttl: u64,
    },
    /// Let an address in again.
    Unblock {
        /// As it was blocked.
        address: IpAddr,
    },
    /// Say which addresses are blocked.
    Blocks,
}

/// What a [`Command::Revoke`] ends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RevokeTarget {
    /// One token, by `jti`.
    Token(String),
    /// One session, by `sid`, and every token that is or will be issued for it.
    Session(String),
    /// All tokens of a subject that were issued until now. Whoever logs in anew is let in.
    Subject(String),
    /// All tokens of the issuer that were issued until now.
    AllOfIssuer,
    /// All tokens that are or will be signed with the issuer's key of this `kid`: it has leaked.
    Key(String),
}

/// The answer to a [`Command`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Answer {
    /// A policy is in force.
    Loaded(Report),
    /// The policy was not taken.
    Rejected(LoadError),
    /// What is in force.
    Status(Status),
    /// Which certificates are served.
    Certificates {
        /// In the policy's order.
        certificates: Vec<CertificateRow>,
    },
    /// Certificates are asked for.
    Renewing {
        /// How many.
        certificates: usize,
    },
    /// Whose sockets are open.
    Sessions(SessionPage),
    /// Sessions were ended.
    Revoked(RevokeReport),
    /// An address is blocked.
    Blocked {
        /// Unix seconds.
        until: u64,
        /// Whether the policy's allow list has it: then it is let in all the same.
        allowed: bool,
    },
    /// An address is blocked no more.
    Unblocked {
        /// Whether it was.
        was_blocked: bool,
    },
    /// Which addresses are blocked.
    Blocks {
        /// Those that end first, at most 1,000.
        blocks: Vec<Block>,
        /// How many there are.
        count: usize,
    },
    /// The command was not understood.
    Refused {
        /// Why.
        message: String,
    },
}

/// The state of a gateway.
#[derive(Debug, Serialize, Deserialize)]
pub struct Status {
    /// The running version.
    pub version: String,
    /// Counts the policies since the start.
    pub generation: u64,
    /// The hash of the policy in force.
    pub hash: String,
    /// Open connections, WebSockets included.
    pub connections: u32,
}

/// Binds the control socket at `path`, mode 0600. Takes the place of a socket that nobody answers on.
///
/// # Errors
///
/// Another gateway answers there, or the path is not ours to write.
pub fn bind(path: &Path) -> io::Result<StdListener> {
    if path.exists() {
        if StdStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another gateway answers there"));
        }
        std::fs::remove_file(path)?;
    }
    // Bound under another name and moved when its mode is set: at `path`, it was never open to others.
    let fresh = path.with_extension(format!("{}.new", std::process::id()));
    let listener = StdListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Answers commands for ever.
pub(super) async fn serve(listener: UnixListener, gateway: Arc<Gateway>, requests: mpsc::Sender<Request>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let (gateway, requests) = (gateway.clone(), requests.clone());
                tokio::spawn(async move {
                    if let Err(error) = converse(stream, &gateway, &requests).await {
                        tracing::debug!(%error, "control socket");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "control socket");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn converse(stream: UnixStream, gateway: &Gateway, requests: &mpsc::Sender<Request>) -> io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    let mut read = BufReader::new(read.take(MAX_LINE_BYTES));
    tokio::time::timeout(LINE_TIMEOUT, read.read_line(&mut line)).await??;
    let answer = match serde_json::from_str(&line) {
        Ok(command) => obey(command, gateway, requests).await,
        Err(error) => Answer::Refused { message: error.to_string() },
    };
    let mut text = serde_json::to_vec(&answer)?;
    text.push(b'\n');
    write.write_all(&text).await
}

async fn obey(command: Command, gateway: &Gateway, requests: &mpsc::Sender<Request>) -> Answer {
    match command {
        Command::Reload => {
            let (reply, outcome) = oneshot::channel();
            let request = Request { cause: Cause::Command, reply: Some(reply) };
            if requests.send(request).await.is_err() {
                return Answer::Refused { message: "the gateway is going down".to_owned() };
            }
            match outcome.await {
                Ok(Ok(report)) => Answer::Loaded(report),
                Ok(Err(error)) => Answer::Rejected(error),
                Err(_) => Answer::Refused { message: "the gateway is going down".to_owned() },
            }
        }
        Command::Status => {
            let snapshot = gateway.current.load();
            Answer::Status(Status {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                generation: snapshot.generation,
                hash: snapshot.policy.hash().to_owned(),
                connections: gateway.connections.total(),
            })
        }
        Command::Certificates => {
            Answer::Certificates { certificates: gateway.current.load().certificates.clone() }
        }
        Command::Renew { name } => renew(gateway, name),
        Command::Sessions { issuer, subject, after, limit } => {
            let limit = limit.unwrap_or(100);
            if !(1..=MAX_PAGE).contains(&limit) {
                return Answer::Refused { message: format!("limit: expected 1 to {MAX_PAGE}") };
            }
            let snapshot = gateway.current.load_full();
            let issuer =
                issuer.map(|it| issuer_named(snapshot.policy.issuers(), Some(&it)).map(str::to_owned));
            match issuer.transpose() {
                Ok(issuer) => {
                    Answer::Sessions(gateway.sessions(SessionQuery { issuer, subject, after, limit }).await)
                }
                Err(message) => Answer::Refused { message },
            }
        }
        Command::Block { address, ttl } => block(gateway, address, ttl),
        Command::Unblock { address } => {
            Answer::Unblocked { was_blocked: gateway.blocks.unblock(address.to_canonical()) }
        }
        Command::Blocks => {
            let (blocks, count) = gateway.blocks.list(clock::unix_now());
            Answer::Blocks { blocks, count }
        }
        Command::Revoke { target, issuer, ttl } => {
            match revoke(gateway, &target, issuer.as_deref(), ttl).await {
                Ok(report) => Answer::Revoked(report),
                Err(message) => Answer::Refused { message },
            }
        }
    }
}

/// Has certificates asked for now; says how many, or that there is none to ask for.
fn renew(gateway: &Gateway, name: Option<String>) -> Answer {
    let snapshot = gateway.current.load();
    let wanted = |names: &[String]| name.as_ref().is_none_or(|name| names.contains(name));
    let certificates = snapshot.acme.iter().filter(|it| wanted(&it.names)).count();
    if certificates == 0 {
        return Answer::Refused { message: "no [[certificate]] with acme has that name".to_owned() };
    }
    if !gateway.outliving.acme.hurry(name) {
        return Answer::Refused { message: "too much was asked for already; try again".to_owned() };
    }
    Answer::Renewing { certificates }
}

fn block(gateway: &Gateway, address: IpAddr, ttl: u64) -> Answer {
    if !(1..=MAX_TTL).contains(&ttl) {
        return Answer::Refused { message: format!("ttl: expected 1 to {MAX_TTL} seconds") };
    }
    let (address, now) = (address.to_canonical(), clock::unix_now());
    let until = now.saturating_add(ttl);
    let allowed = gateway.current.load().lists.of(address) == Listed::Allowed;
    match gateway.blocks.block(Block { address, until, penalty: None }, now) {
        Ok(()) => {
            tracing::info!(target: "sealgate::audit", activity = "address-blocked", %address, ttl, "by the operator");
            Answer::Blocked { until, allowed }
        }
        Err(error) => Answer::Refused { message: error.to_string() },
    }
}

async fn revoke(
    gateway: &Gateway,
    target: &RevokeTarget,
    issuer: Option<&str>,
    ttl: Option<u64>,
) -> Result<RevokeReport, String> {
    let snapshot = gateway.current.load_full();
    let issuer = issuer_named(snapshot.policy.issuers(), issuer)?;
    // Whoever has a leaked key can sign for as long as it is trusted: no lifetime of ours ends that.
    let usual = match target {
        RevokeTarget::Key(_) => MAX_TTL,
        _ => snapshot.policy.session().lifetime.as_secs(),
    };
    let ttl = ttl.unwrap_or(usual);
    if !(1..=MAX_TTL).contains(&ttl) {
        return Err(format!("ttl: expected 1 to {MAX_TTL} seconds"));
    }
    if let RevokeTarget::Token(id)
    | RevokeTarget::Session(id)
    | RevokeTarget::Subject(id)
    | RevokeTarget::Key(id) = target
        && (id.is_empty() || id.len() > MAX_ID_BYTES)
    {
        return Err(format!("expected an id of 1 to {MAX_ID_BYTES} bytes: no token has another"));
    }
    let now = clock::unix_now();
    let (target, issued_before) = match target {
        RevokeTarget::Token(token_id) => (Target::Token { issuer, token_id }, u64::MAX),
        RevokeTarget::Session(session) => (Target::Session { issuer, session }, u64::MAX),
        // Dates of tokens are whole seconds: one of this second may be older than this command.
        RevokeTarget::Subject(subject) => (Target::Subject { issuer, subject }, now.saturating_add(1)),
        RevokeTarget::Key(key_id) => (Target::Key { issuer, key_id }, u64::MAX),
        RevokeTarget::AllOfIssuer => (Target::Issuer { issuer }, now.saturating_add(1)),
    };
    let report = gateway.revoke(&Revocation { target, issued_before, until: now.saturating_add(ttl) }).await;
    tracing::info!(
        sockets = report.sockets,
        entered = report.entered,
        kept = report.kept,
        "sessions revoked by the operator"
    );
    Ok(report)
}

/// The `iss` of the issuer that is meant.
fn issuer_named<'p>(issuers: &'p [Issuer], wanted: Option<&str>) -> Result<&'p str, String> {
    let names = || issuers.iter().map(|it| &*it.name).collect::<Vec<_>>().join(", ");
    match (issuers, wanted) {
        (issuers, Some(wanted)) => {
            let found = issuers.iter().find(|it| *it.name == *wanted || it.issuer == wanted);
            found.map(|it| it.issuer.as_str()).ok_or_else(|| match issuers {
                [] => "the policy has no issuer, so there are no sessions".to_owned(),
                _ => format!("no such issuer; the policy has: {}", names()),
            })
        }
        ([only], None) => Ok(&only.issuer),
        ([], None) => Err("the policy has no issuer, so there are no sessions".to_owned()),
        (_, None) => Err(format!("the policy has several issuers; name one of: {}", names())),
    }
}

/// Sends `command` to the gateway at `path` and waits for its answer.
///
/// # Errors
///
/// Nobody answers there, or not what was expected.
pub fn ask(path: &Path, command: &Command) -> io::Result<Answer> {
    let mut stream = StdStream::connect(path)?;
    let mut text = serde_json::to_vec(command)?;
    text.push(b'\n');
    stream.write_all(&text)?;
    let mut line = String::new();
    io::BufReader::new(stream).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}
