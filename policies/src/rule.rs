//! One compiled `[[route]]` or `[[websocket]]`: everything that is judged after the path was found.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderName;

use crate::access::AuditRule;
use crate::answer::AnswerRule;
use crate::authz::Decision;
use crate::certificate::CertificateRule;
use crate::ciphertext::Ciphertext;
use crate::denial::Denial;
use crate::identity::Identity;
use crate::json::{Limits, Schema};
use crate::matcher::{ContentCodings, ContentTypes, Origins};
use crate::multipart::Form;
use crate::permit::Direction;
use crate::policy::{ConcurrencyIndex, Mode, PenaltyIndex, RateIndex, RuleId, Sender, UpstreamIndex};

/// One rule. Made only by [`Policy::compile`](crate::Policy::compile).
#[derive(Debug)]
pub struct Rule {
    /// Dense index.
    pub id: RuleId,
    /// Unique name; a metric label.
    pub name: Arc<str>,
    /// Whether it refuses or only counts.
    pub mode: Mode,
    /// Where requests go.
    pub upstream: UpstreamIndex,
    /// Whether it wants a token.
    pub authentication: Authentication,
    /// What its token must be bound to.
    pub sender: Sender,
    /// Name of what a request does, for authorization and audit.
    pub action: Option<Arc<str>>,
    /// Whether a request counts as the user's activity (row S-1). A socket's opening always does.
    pub activity: bool,
    /// The gateway answers with a ticket; then there is no upstream.
    pub ticket: Option<TicketRule>,
    /// An issuer tells there whom it has logged out; then there is no upstream.
    pub logout: Option<LogoutRule>,
    /// Whether uses are recorded whatever `[audit]` says.
    pub(crate) audit: Option<AuditRule<HeaderName>>,
    pub(crate) roles: Vec<String>,
    /// What client certificate it wants.
    pub(crate) certificate: Option<CertificateRule>,
    pub(crate) step_up: Option<StepUp>,
    /// What the policy says of roles.
    pub(crate) role_rules: Arc<[RoleRule]>,
    /// What the Cedar policies are asked; `None` where there are none, or no token is wanted.
    pub(crate) authorization: Option<Decision>,
    pub(crate) rates: RateList,
    /// How many a request takes of each rate.
    pub(crate) cost: NonZeroU32,
    pub(crate) query: Option<QueryRule>,
    pub(crate) body: BodyRule,
    pub(crate) content_types: ContentTypes,
    pub(crate) content_codings: ContentCodings,
    /// What parts a body has to have: then it is a form.
    pub(crate) form: Option<Arc<Form>>,
    /// Bounds of a body that must be JSON.
    pub(crate) body_json: Option<Limits>,
    pub(crate) body_ciphertext: Option<CiphertextRule>,
    /// Tokens of the JSON pointer to the account in a body.
    pub(crate) body_account: Option<Vec<String>>,
    pub(crate) penalties: Vec<PenaltyIndex>,
    pub(crate) concurrency: Vec<ConcurrencyIndex>,
    /// Whether it is served whatever the load is.
    pub(crate) exempt: bool,
    pub(crate) body_schema: Option<Schema>,
    pub(crate) answer: Option<AnswerRule>,
    pub(crate) tunnel: Option<TunnelRule>,
}

impl Rule {
    /// Whether it is a `[[websocket]]`.
    pub fn is_websocket(&self) -> bool {
        self.tunnel.is_some()
    }

    /// Roles of which one is needed; empty for none.
    pub fn roles(&self) -> &[String] {
        &self.roles
    }

    /// Rates that a request or an upgrade takes.
    pub fn rates(&self) -> &[RateIndex] {
        &self.rates.all
    }

    /// Whether requests of it are served whatever the load is.
    pub fn is_exempt_from_shedding(&self) -> bool {
        self.exempt
    }

    /// What a body may be.
    pub fn body(&self) -> &BodyRule {
        &self.body
    }

    /// What the upstream's answers may be; `None` for anything.
    pub fn answer(&self) -> Option<&AnswerRule> {
        self.answer.as_ref()
    }

    /// Frame, message and time limits; `None` for a route.
    pub fn tunnel_limits(&self) -> Option<&TunnelLimits> {
        self.tunnel.as_ref().map(|tunnel| &tunnel.limits)
    }
}

/// A rule that is answered with a one-use ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TicketRule {
    /// How long a ticket is good. 5 s to 5 min; default 30 s.
    pub ttl: Duration,
}

/// A rule at which an issuer tells whom it has logged out (OpenID Connect Back-Channel Logout 1.0).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogoutRule {
    /// Name of the issuer.
    pub issuer: Arc<str>,
    /// Of which a token's audience must be.
    pub audience: Vec<String>,
    /// How old a token may be. 10 s to 1 h; default 5 min.
    pub max_age: Duration,
    /// Whether a token must be of the type `logout+jwt`. Default false.
    pub strict_type: bool,
}

/// A stronger or fresher login that a rule or message wants (RFC 9470).
#[derive(Debug)]
pub(crate) struct StepUp {
    /// Of which one is needed; empty: any.
    pub(crate) acr: Vec<String>,
    /// All are needed.
    pub(crate) amr: Vec<String>,
    pub(crate) max_age: Option<Duration>,
    /// Parameters of the challenge, ready.
    pub(crate) challenge: Arc<str>,
}

impl StepUp {
    /// # Errors
    /// [`Denial::StepUpNeeded`].
    pub(crate) fn check(&self, identity: &Identity, now: u64) -> Result<(), Denial> {
        let acr = self.acr.is_empty() || identity.acr.as_ref().is_some_and(|acr| self.acr.contains(acr));
        let amr = self.amr.iter().all(|method| identity.amr.contains(method));
        let age = identity.auth_time.map(|at| now.saturating_sub(at));
        let fresh = self.max_age.is_none_or(|limit| age.is_some_and(|age| age <= limit.as_secs()));
        if acr && amr && fresh { Ok(()) } else { Err(self.denial()) }
    }

    pub(crate) fn denial(&self) -> Denial {
        Denial::StepUpNeeded { challenge: Arc::clone(&self.challenge) }
    }
}

/// What a role wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RoleRule {
    pub(crate) role: String,
    /// Authentication methods of which one is needed; empty: none is.
    pub(crate) amr: Vec<String>,
    /// Roles that nobody may have beside it.
    pub(crate) excludes: Vec<String>,
}

impl RoleRule {
    /// # Errors
    /// [`Denial::RolesConflict`]; [`Denial::StepUpNeeded`] for a login without second factor.
    pub(crate) fn check(&self, identity: &Identity) -> Result<(), Denial> {
        if !identity.roles.contains(&self.role) {
            return Ok(());
        }
        if self.excludes.iter().any(|other| identity.roles.contains(other)) {
            return Err(Denial::RolesConflict);
        }
        if !self.amr.is_empty() && !self.amr.iter().any(|method| identity.amr.contains(method)) {
            return Err(Denial::StepUpNeeded { challenge: "".into() });
        }
        Ok(())
    }
}

/// Whether a rule wants a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Authentication {
    /// Anyone may; a token is not looked at and no identity goes upstream.
    None,
    /// Only with a verified token.
    Required,
}

/// What a body may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BodyRule {
    /// Longest body in bytes; 0 takes none. Holds in shadow mode too: it protects the gateway.
    pub max_bytes: u64,
    /// Whether the whole body must be held and judged before it goes on.
    pub buffered: bool,
}

/// A reference to a `[[ciphertext]]`.
#[derive(Debug)]
pub(crate) struct CiphertextRule {
    pub(crate) rule: Arc<Ciphertext>,
    /// Its envelope is the referrer's own schema: what kept the one needs no second look.
    pub(crate) covers_schema: bool,
}

/// What a query may be; no rule, no query.
#[derive(Debug)]
pub(crate) struct QueryRule {
    pub(crate) max_bytes: usize,
    pub(crate) schema: Option<Schema>,
}

/// Rates with the enforced ones first, so that a refusal by a shadow rate means that all enforced ones agreed.
#[derive(Debug, Default)]
pub(crate) struct RateList {
    pub(crate) all: Vec<RateIndex>,
    pub(crate) enforced: usize,
}

impl RateList {
    pub(crate) const NONE: &Self = &Self { all: Vec::new(), enforced: 0 };

    /// Whether this rate only counts. An unknown one enforces.
    pub(crate) fn is_shadow(&self, rate: RateIndex) -> bool {
        self.all.iter().position(|&index| index == rate).is_some_and(|place| place >= self.enforced)
    }
}

/// The WebSocket half of a rule.
#[derive(Debug)]
pub(crate) struct TunnelRule {
    pub(crate) limits: TunnelLimits,
    /// Whether it may be opened by an extended CONNECT (RFC 8441).
    pub(crate) http2: bool,
    pub(crate) origins: Origins,
    pub(crate) subprotocols: Vec<String>,
    pub(crate) subprotocol_required: bool,
    pub(crate) compression: Compression,
    pub(crate) kinds: Kinds,
    /// Judges what the client sends.
    pub(crate) to_upstream: Option<MessageTable>,
    /// Judges what the upstream sends.
    pub(crate) to_client: Option<MessageTable>,
    /// Rates of every client message that no table judges.
    pub(crate) message_rates: RateList,
    /// Whether a client message that no table judges is activity.
    pub(crate) activity: bool,
    pub(crate) renew: Option<RenewRule>,
    pub(crate) max_open: Option<MaxOpen>,
}

impl TunnelRule {
    pub(crate) fn table(&self, direction: Direction) -> Option<&MessageTable> {
        match direction {
            Direction::ToUpstream => self.to_upstream.as_ref(),
            Direction::ToClient => self.to_client.as_ref(),
        }
    }
}

/// How a client renews its token inside an open WebSocket.
#[derive(Debug)]
pub struct RenewRule {
    /// Type of the message. 1 to 64 characters.
    pub name: Arc<str>,
    /// Between two renewals. 100 ms to 1 h; default 5 s.
    pub min_interval: Duration,
    /// What a token that is not acceptable leads to; default an answer.
    pub on_refusal: OnRefusal,
    /// Tokens of the JSON pointer to the new token, unescaped.
    pub(crate) pointer: Vec<String>,
}

/// How many WebSockets of a rule may be open at the same time. At least one limit is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaxOpen {
    /// Of one session. 1 to 1,000,000; default no limit.
    pub session: Option<u32>,
    /// Of one subject. 1 to 1,000,000; default no limit.
    pub subject: Option<u32>,
    /// From one address. 1 to 1,000,000; default no limit.
    pub address: Option<u32>,
    /// What happens at a limit.
    pub at_limit: AtLimit,
}

/// What a socket too many leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum AtLimit {
    /// It is refused (429).
    #[default]
    Reject,
    /// The oldest one of its session or subject is closed (4409). One too many from an address is refused all the same:
    /// the others may be other people's.
    ReplaceOldest,
}

/// Limits of one open WebSocket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelLimits {
    /// Payload of one frame in bytes. 125 B to 16 MiB; default 64 KiB.
    pub max_frame: u32,
    /// Payload of one message over all its fragments, in bytes. 1 B to 16 MiB; default 64 KiB.
    pub max_message: u32,
    /// Fragments of one message. 1 to 100,000; default 64.
    pub max_fragments: u32,
    /// Inflated bytes for each compressed one, where a message inflates beyond 64 KiB (RFC 7692). 1 to 1032, the
    /// most that DEFLATE can do; default 100.
    pub max_inflate_ratio: u32,
    /// Control frames per second. 1 to 10,000; default 10.
    pub control_per_second: u32,
    /// Without activity for so long, the socket closes with 4408. 1 s to 30 d; default none.
    pub idle: Option<Duration>,
    /// Between two pings to a silent client. 1 s to 1 h; default 30 s.
    pub ping_interval: Duration,
    /// For the pong. 1 s to 1 h; default 20 s.
    pub pong_timeout: Duration,
    /// For a peer that does not read. 100 ms to 1 h; default 20 s.
    pub write_timeout: Duration,
    /// Bytes held for a slow peer, per direction. 1 KiB to 64 MiB; default 256 KiB.
    pub buffer: u32,
}

impl TunnelLimits {
    /// Lets nothing through: fail closed where a rule has no limits.
    pub(crate) const NOTHING: Self = Self {
        max_frame: 0,
        max_message: 0,
        max_fragments: 0,
        max_inflate_ratio: 0,
        control_per_second: 0,
        idle: Some(Duration::ZERO),
        ping_interval: Duration::ZERO,
        pong_timeout: Duration::ZERO,
        write_timeout: Duration::ZERO,
        buffer: 0,
    };
}

/// What becomes of a client's offer of permessage-deflate (RFC 7692). Whatever it is, every message is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// It is removed: nothing is compressed.
    #[default]
    Off,
    /// The gateway accepts it and ends it: messages are judged inflated, and go on plain.
    Terminate,
}

/// Kinds of messages taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kinds {
    pub(crate) text: bool,
    pub(crate) binary: bool,
}

/// The messages of one direction, by type.
#[derive(Debug)]
pub(crate) struct MessageTable {
    /// Tokens of the JSON pointer to the type, unescaped.
    pub(crate) pointer: Vec<String>,
    pub(crate) types: HashMap<Box<str>, MessageRule>,
    /// Bounds of every message.
    pub(crate) json: Limits,
    /// What becomes of an unknown type, and of what is not JSON.
    pub(crate) on_unknown: OnRefusal,
}

/// One `[[websocket.message]]`, for one direction.
#[derive(Debug)]
pub(crate) struct MessageRule {
    pub(crate) name: Arc<str>,
    /// Narrower bounds than the table's.
    pub(crate) json: Option<Limits>,
    pub(crate) ciphertext: Option<CiphertextRule>,
    pub(crate) schema: Option<Schema>,
    pub(crate) action: Option<Arc<str>>,
    /// What the Cedar policies are asked; `None` where there are none, or the message has no action.
    pub(crate) authorization: Option<Decision>,
    /// Whether uses are recorded; where the reason stands is a pointer, as tokens.
    pub(crate) audit: Option<AuditRule<Vec<String>>>,
    /// The rule's message rates (client messages only) and the type's own.
    pub(crate) rates: RateList,
    /// How many it takes of each rate.
    pub(crate) cost: NonZeroU32,
    pub(crate) step_up: Option<StepUp>,
    pub(crate) activity: bool,
    pub(crate) on_refusal: OnRefusal,
}

/// What a refused message leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum OnRefusal {
    /// The socket is closed with the denial's code.
    #[default]
    Close,
    /// The message is dropped and the client told; the socket stays open.
    Answer,
}
