//! Why something was refused: one closed list, and the one table that faces the outside.
//!
//! Statuses, close codes and titles are chosen in [`Denial::row`] and nowhere else.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;

use crate::access::MAX_REASON;
use crate::policy::RateIndex;

/// A refusal: a value, not a fault. It says what was refused without telling an attacker more than that.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Denial {
    // The shape of a request.
    /// The request breaks HTTP's or URI's rules, or is ambiguous; `detail` is a fixed text.
    Malformed {
        /// What is wrong, without any of the peer's bytes.
        detail: &'static str,
    },
    /// Path or query is longer than allowed.
    UriTooLong,
    /// The header section is larger, or has more fields, than allowed.
    HeadersTooLarge,
    /// A transfer coding other than `chunked` (RFC 9112 §6.1).
    UnknownTransferCoding,
    /// A version of HTTP other than those offered.
    VersionNotSupported,
    /// Handshake, header or body did not arrive within its deadline.
    TooSlow,
    /// The route takes no query, and the request brought one.
    QueryNotAllowed,

    // Where it wants to go.
    /// No rule covers this path.
    NoRoute,
    /// No rule serves this host, or the host is not the one this connection was opened for (RFC 9110 §15.5.20).
    Misdirected,
    /// A WebSocket without TLS.
    PlainHttp,
    /// The path exists, the method does not.
    MethodNotAllowed {
        /// Ready `Allow` header value.
        allow: Arc<str>,
    },
    /// The path is a WebSocket only, and the request does not ask for one.
    UpgradeRequired,
    /// A WebSocket was asked for at a path that has none.
    NoWebsocket,
    /// None of the WebSocket subprotocols offered is one the rule allows.
    SubprotocolNotAllowed,
    /// An extended CONNECT for what is no WebSocket, or for one that is not opened over HTTP/2 (RFC 8441, RFC 9220 §3).
    ProtocolNotOffered,

    // Who asks.
    /// The rule demands a token and none came.
    TokenMissing,
    /// The token is not acceptable.
    TokenInvalid(TokenFault),
    /// The token is bound to a key, and the request proves to hold none (RFC 9449 §7.2).
    ProofMissing,
    /// The proof of possession is not acceptable (RFC 9449 §4.3).
    ProofInvalid(ProofFault),
    /// The proof needs a nonce of ours (RFC 9449 §9).
    ProofNonce {
        /// Ready `DPoP-Nonce` value.
        nonce: Arc<str>,
    },
    /// As many proofs are remembered as may be, in all or of this subject: one more could not be told from a replay.
    TooManyProofs,
    /// As many tickets are open as may be, in all or of this subject.
    TooManyTickets,
    /// The token is bound to another client certificate than the connection's, or the connection has none (RFC 8705 §3).
    CertificateMissing,
    /// The rule wants a client certificate, and the connection has none.
    ClientCertificateMissing,
    /// The connection's client certificate is not one that the rule names.
    ClientCertificateNotAllowed,
    /// The keys to verify the token cannot be had: our fault, so never a 401.
    TokenKeysUnavailable,
    /// The logout token is not acceptable (OpenID Connect Back-Channel Logout 1.0 §2.6).
    LogoutInvalid(LogoutFault),
    /// The logout token may be good, and what it names could not be ended, or not for good: its issuer is to try again.
    LogoutFailed,
    /// What other gateways revoked cannot be known at present, and the policy would rather refuse (`shared.on_loss`).
    ContactLost,
    /// The identity has none of the roles that the rule names.
    RoleMissing,
    /// The identity has roles that nobody may have together.
    RolesConflict,
    /// No Cedar policy permits it, one forbids it, or one of them erred.
    NotPermitted,
    /// What it is about does not stand where the rule says, so that nobody can say whether it is permitted.
    ResourceMissing,
    /// It has to say why it is made, and does not.
    ReasonMissing {
        /// Where, as the policy writes it.
        place: Arc<str>,
    },
    /// The session, token or subject was revoked.
    Revoked,
    /// The session was idle for too long.
    SessionIdle,
    /// A newer session or socket took this one's place.
    SessionReplaced,
    /// The session has lasted as long as any may.
    SessionEnded,
    /// The subject has as many sessions as its roles allow, and the policy rejects one more.
    TooManySessions,
    /// A renewal brought the token of another subject or session, or one bound to another key.
    RenewalMismatch,
    /// A renewal brought other roles or another authentication: only a new socket can tell the upstream.
    RightsChanged,
    /// The operation wants a second or fresher proof of identity (RFC 9470).
    StepUpNeeded {
        /// Ready parameters of the challenge: `acr_values="…", max_age="…"`; empty where only methods are wanted.
        challenge: Arc<str>,
    },
    /// The browser's `Origin` is not one the rule names (RFC 6455 §10.2).
    OriginNotAllowed,

    // What it brings.
    /// The body is longer than the rule allows; a limit of 0 means that the route takes none.
    BodyTooLarge {
        /// Bytes the rule allows.
        limit: u64,
    },
    /// The body's media type is not one the rule allows.
    ContentType {
        /// Ready `Accept` value; empty where it would be no help.
        accept: Arc<str>,
    },
    /// The body's content coding is not one the rule allows: one that is judged has none.
    ContentCoding {
        /// Ready `Accept-Encoding` value.
        accept: Arc<str>,
    },
    /// The body is not one form (RFC 7578) to every reader, or its parts are not what the rule says.
    Form {
        /// What is wrong.
        fault: FormFault,
        /// Name of the part, by the rule's word; `None` where it is about none that is known.
        part: Option<Arc<str>>,
    },
    /// The body or message is not JSON (RFC 8259), is ambiguous, or is larger than `[json]` allows.
    Json {
        /// What is wrong.
        fault: JsonFault,
        /// Offset of the byte that shows it.
        at: u32,
        /// JSON pointer (RFC 6901) to the value or key at hand, escaped and shortened.
        pointer: String,
    },
    /// The query, body or message does not match its schema.
    Schema {
        /// JSON pointer (RFC 6901) to the offending field, escaped and shortened; empty for the whole document.
        pointer: String,
    },
    /// A text message that is not UTF-8 (RFC 6455 §8.1).
    NotUtf8,
    /// A compressed message that does not inflate (RFC 7692 §7.2.2).
    BadCompression,
    /// A kind of message (text or binary) that the rule does not take.
    MessageKind,
    /// The message's type is missing, or not one the rule lists for this direction.
    UnknownMessageType,
    /// Plaintext where only ciphertext may be.
    PlaintextRefused,
    /// A frame or message longer than allowed.
    MessageTooBig {
        /// Payload bytes allowed.
        limit: u32,
    },
    /// A compressed message that grows too much: what inflate bombs do.
    InflateRatio {
        /// Bytes allowed for each compressed one.
        limit: u32,
    },
    /// More fragments in one message than allowed.
    TooManyFragments {
        /// Fragments allowed.
        limit: u32,
    },
    /// The peer breaks RFC 6455; `detail` is a fixed text.
    Protocol {
        /// What is wrong, without any of the peer's bytes.
        detail: &'static str,
    },

    // How much, how often.
    /// A rate is used up.
    RateExceeded {
        /// The rate that is used up.
        rate: RateIndex,
        /// When one more would be let through.
        retry_after: Duration,
    },
    /// As much is under way as a `[[concurrency]]` allows.
    TooManyAtOnce,
    /// Too many attempts have failed, and the wait that follows is not over.
    TooManyFailures {
        /// When one more would be looked at.
        retry_after: Duration,
    },
    /// Nobody can say at present whether a rate that gateways share has room, and the policy would rather refuse
    /// (`on_error = "deny"`).
    LimitUnavailable,
    /// A renewal came too soon after another.
    RenewalTooSoon {
        /// When one would be looked at.
        retry_after: Duration,
    },
    /// As many sockets of this session, subject or address are open as the rule allows.
    TooManySockets,
    /// More control frames per second than allowed.
    ControlFlood,
    /// A list or a block refuses this address.
    AddressRefused,
    /// As many connections as the policy allows, in all or from this address.
    TooManyConnections,
    /// The gateway sheds load.
    Overloaded,

    // What happened on our side.
    /// The policy changed, and what is open is no longer allowed.
    PolicyChanged,
    /// The gateway is going down or handing over.
    Restarting,
    /// The upstream cannot be reached, or broke off.
    UpstreamUnavailable,
    /// The upstream did not answer in time.
    UpstreamTimeout,
    /// All of the upstream's endpoints are left alone for having failed.
    UpstreamCircuitOpen {
        /// When the first of them is tried again.
        retry_after: Duration,
    },
    /// The upstream's answer is not one that the rule lets out.
    AnswerNotAllowed,
    /// Judging or forwarding failed; fail closed.
    Internal,
}

/// What is wrong with a JSON text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum JsonFault {
    /// Not UTF-8 (RFC 8259 §8.1).
    Utf8,
    /// A byte that cannot stand where it does.
    Syntax,
    /// It ends too soon; an empty text does.
    End,
    /// Half of a surrogate pair (RFC 8259 §8.2).
    Surrogate,
    /// A number beyond what a double can hold (RFC 8259 §6).
    Range,
    /// A key stands twice in one object: readers disagree which one counts (RFC 8259 §4).
    Duplicate,
    /// More levels than allowed.
    Depth,
    /// More values in all than allowed.
    Values,
    /// More members in one object than allowed.
    Members,
    /// More items in one array than allowed.
    Items,
    /// A longer key than allowed.
    Key,
    /// A longer string than allowed.
    String,
    /// A number of more digits than allowed.
    Digits,
    /// A number with a larger exponent than allowed.
    Exponent,
}

/// What is wrong with a form (multipart/form-data, RFC 7578).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FormFault {
    /// Content-Type names no boundary, two, or one that can be read in two ways.
    Boundary,
    /// Something stands before the first boundary.
    Start,
    /// The boundary stands where it is no delimiter, or with something beside it in its line.
    Delimiter,
    /// Something stands behind the last boundary.
    Behind,
    /// It ends too soon.
    End,
    /// The fields of a part are longer than allowed.
    Head,
    /// A field of a part is malformed, stands twice, is none of those that forms have, or is not true.
    Field,
    /// Content-Disposition is missing, or can be read in two ways.
    Disposition,
    /// A part of no name that the rule knows.
    Unknown,
    /// More parts than allowed, in all or of one name.
    TooMany,
    /// A part that has to be there is not.
    Missing,
    /// A part is longer than allowed.
    Size,
    /// A file has no name, or none that a file may have; or what is no file has one.
    FileName,
    /// A part's type is missing, or not one the rule allows.
    Type,
    /// A part's content is not of its type.
    Content,
}

/// What is wrong with a token. Goes to log and metrics; the outside sees only `token-invalid` or `token-expired`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TokenFault {
    /// Not a compact JWS of strict base64url and JSON.
    Malformed,
    /// Its algorithm is not one pinned for the issuer.
    Algorithm,
    /// No key with that id.
    Key,
    /// The signature does not verify.
    Signature,
    /// No such issuer.
    Issuer,
    /// Made for somebody else.
    Audience,
    /// `exp` has passed.
    Expired,
    /// `nbf` or `iat` is in the future.
    NotYetValid,
    /// `typ` is not one the issuer may use.
    Type,
    /// A required claim is missing or of the wrong type.
    Claims,
    /// Longer than the issuer's limit.
    TooLarge,
    /// The request brings two tokens (RFC 6750 §2).
    Twice,
    /// It is not bound to a key, where it must be.
    Unbound,
    /// The ticket is not one of ours, was used, is too old, or is another page's.
    Ticket,
}

/// What is wrong with a proof of possession. Goes to log and metrics; the outside sees only `proof-invalid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProofFault {
    /// Not one compact JWS of strict base64url and JSON in one field, or too long.
    Malformed,
    /// `typ` is not `dpop+jwt`.
    Type,
    /// Its algorithm is not one of the policy's.
    Algorithm,
    /// Its key cannot verify it, is private, or is not the one that the token is bound to.
    Key,
    /// The signature does not verify.
    Signature,
    /// A claim is missing or of the wrong type.
    Claims,
    /// Made for another method.
    Method,
    /// Made for another URL.
    Url,
    /// Too old, or from the future.
    Time,
    /// Made for another token.
    Token,
    /// Seen before.
    Replayed,
}

/// What is wrong with a logout token. The outside learns only that something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LogoutFault {
    /// No form with one `logout_token`.
    Form,
    /// What may be wrong with any token.
    Token(TokenFault),
    /// No event of a logout.
    Event,
    /// It has a nonce.
    Nonce,
    /// It names neither a session nor a subject.
    Nobody,
    /// Seen before.
    Replayed,
}

/// One line of the table that faces the outside.
struct Row {
    reason: &'static str,
    status: u16,
    close: u16,
    title: &'static str,
}

const fn row(reason: &'static str, status: u16, close: u16, title: &'static str) -> Row {
    Row { reason, status, close, title }
}

impl Denial {
    /// Every value that [`Denial::reason`] can have: the closed label set of the metrics.
    pub const ALL_REASONS: &[&str] = &[
        "malformed",
        "uri-too-long",
        "headers-too-large",
        "unknown-transfer-coding",
        "version-not-supported",
        "too-slow",
        "query-not-allowed",
        "no-route",
        "misdirected",
        "plain-http",
        "method-not-allowed",
        "upgrade-required",
        "no-websocket",
        "subprotocol-not-allowed",
        "protocol-not-offered",
        "token-missing",
        "token-expired",
        "token-twice",
        "token-invalid",
        "proof-missing",
        "proof-invalid",
        "proof-nonce",
        "too-many-proofs",
        "too-many-tickets",
        "certificate-missing",
        "client-certificate-missing",
        "client-certificate-not-allowed",
        "token-keys-unavailable",
        "logout-invalid",
        "logout-failed",
        "contact-lost",
        "role-missing",
        "roles-conflict",
        "not-permitted",
        "resource-missing",
        "reason-missing",
        "revoked",
        "session-idle",
        "session-replaced",
        "session-ended",
        "too-many-sessions",
        "renewal-mismatch",
        "rights-changed",
        "step-up-needed",
        "origin-not-allowed",
        "body-too-large",
        "content-type",
        "content-coding",
        "not-a-form",
        "form-parts",
        "form-part-too-large",
        "file-name",
        "file-type",
        "not-json",
        "json-duplicate-key",
        "json-too-deep",
        "json-too-many",
        "json-too-long",
        "json-number",
        "schema",
        "not-utf8",
        "bad-compression",
        "message-kind",
        "unknown-message-type",
        "plaintext-refused",
        "message-too-big",
        "inflate-ratio",
        "too-many-fragments",
        "protocol",
        "rate-exceeded",
        "too-many-at-once",
        "too-many-failures",
        "limit-unavailable",
        "renewal-too-soon",
        "too-many-sockets",
        "control-flood",
        "address-refused",
        "too-many-connections",
        "overloaded",
        "policy-changed",
        "restarting",
        "upstream-unavailable",
        "upstream-timeout",
        "upstream-circuit-open",
        "answer-not-allowed",
        "internal",
    ];

    /// The table. The status answers a request, the close code (RFC 6455 §7.4) ends an open WebSocket;
    /// a reason that can only happen to one of them still names both, so that no caller has to choose.
    #[rustfmt::skip]
    const fn row(&self) -> Row {
        use FormFault as Form;
        use JsonFault as Json;
        use TokenFault as Fault;
        match self {
            Self::Malformed { .. }        => row("malformed",               400, 1002, "Malformed request"),
            Self::UriTooLong              => row("uri-too-long",            414, 1008, "URI too long"),
            Self::HeadersTooLarge         => row("headers-too-large",       431, 1008, "Header fields too large"),
            Self::UnknownTransferCoding   => row("unknown-transfer-coding", 501, 1002, "Unknown transfer coding"),
            Self::VersionNotSupported     => row("version-not-supported",   505, 1002, "HTTP version not supported"),
            Self::TooSlow                 => row("too-slow",                408, 1008, "Too slow"),
            Self::QueryNotAllowed         => row("query-not-allowed",       400, 1008, "Query not allowed"),

            Self::NoRoute                 => row("no-route",                404, 1008, "No such resource"),
            Self::Misdirected             => row("misdirected",             421, 1008, "Misdirected request"),
            Self::PlainHttp               => row("plain-http",              403, 1008, "HTTPS only"),
            Self::MethodNotAllowed { .. } => row("method-not-allowed",      405, 1008, "Method not allowed"),
            Self::UpgradeRequired         => row("upgrade-required",        426, 1008, "WebSocket only"),
            Self::NoWebsocket             => row("no-websocket",            404, 1008, "No WebSocket here"),
            Self::SubprotocolNotAllowed   => row("subprotocol-not-allowed", 400, 1002, "Subprotocol not allowed"),
            Self::ProtocolNotOffered      => row("protocol-not-offered",    501, 1008, "Protocol not offered"),

            Self::TokenMissing            => row("token-missing",           401, 4401, "Token missing"),
            Self::TokenInvalid(fault) => match fault {
                Fault::Expired            => row("token-expired",           401, 4401, "Token expired"),
                Fault::Twice              => row("token-twice",             400, 4401, "More than one token"),
                Fault::Malformed | Fault::Algorithm | Fault::Key | Fault::Signature | Fault::Issuer
                | Fault::Audience | Fault::NotYetValid | Fault::Type | Fault::Claims | Fault::TooLarge
                | Fault::Unbound | Fault::Ticket
                                          => row("token-invalid",           401, 4401, "Token not accepted"),
            },
            Self::ProofMissing            => row("proof-missing",           401, 4401, "Proof of possession missing"),
            Self::ProofInvalid(_)         => row("proof-invalid",           401, 4401, "Proof of possession not accepted"),
            Self::ProofNonce { .. }       => row("proof-nonce",             401, 4401, "Proof of possession needs a nonce"),
            Self::TooManyProofs           => row("too-many-proofs",         429, 4429, "Too many requests"),
            Self::TooManyTickets          => row("too-many-tickets",        429, 4429, "Too many requests"),
            Self::CertificateMissing      => row("certificate-missing",     401, 4401, "Token of another certificate"),
            Self::ClientCertificateMissing => row("client-certificate-missing", 403, 4403, "Client certificate missing"),
            Self::ClientCertificateNotAllowed => row("client-certificate-not-allowed", 403, 4403, "Client certificate not allowed"),
            Self::TokenKeysUnavailable    => row("token-keys-unavailable",  503, 1013, "Token keys unavailable"),
            Self::LogoutInvalid(_)        => row("logout-invalid",          400, 1008, "Logout token not accepted"),
            Self::LogoutFailed            => row("logout-failed",           400, 1013, "Logout failed"),
            Self::ContactLost             => row("contact-lost",            503, 1013, "Sessions cannot be checked"),
            Self::RoleMissing             => row("role-missing",            403, 4403, "Not allowed"),
            Self::RolesConflict           => row("roles-conflict",          403, 4403, "Not allowed"),
            Self::NotPermitted            => row("not-permitted",           403, 4403, "Not allowed"),
            Self::ResourceMissing         => row("resource-missing",        422, 4403, "Does not say what it is about"),
            Self::ReasonMissing { .. }    => row("reason-missing",          403, 4403, "Does not say why"),
            Self::Revoked                 => row("revoked",                 401, 4410, "Session revoked"),
            Self::SessionIdle             => row("session-idle",            401, 4408, "Session idle for too long"),
            Self::SessionReplaced         => row("session-replaced",        401, 4409, "Session replaced"),
            Self::SessionEnded            => row("session-ended",           401, 4401, "Session ended"),
            Self::TooManySessions         => row("too-many-sessions",       429, 4429, "Too many sessions"),
            Self::RenewalMismatch         => row("renewal-mismatch",        403, 4403, "Token of another session"),
            Self::RightsChanged           => row("rights-changed",          403, 1012, "Rights changed"),
            Self::StepUpNeeded { .. }     => row("step-up-needed",          401, 4412, "Stronger authentication needed"),
            Self::OriginNotAllowed        => row("origin-not-allowed",      403, 4403, "Origin not allowed"),

            Self::BodyTooLarge { .. }     => row("body-too-large",          413, 1009, "Body too large"),
            Self::ContentType { .. }      => row("content-type",            415, 1003, "Content type not allowed"),
            Self::ContentCoding { .. }    => row("content-coding",          415, 1003, "Content coding not allowed"),
            Self::Form { fault, .. } => match fault {
                Form::Boundary | Form::Start | Form::Delimiter | Form::Behind | Form::End | Form::Head
                | Form::Field | Form::Disposition
                                          => row("not-a-form",              400, 1007, "Not a form"),
                Form::Unknown | Form::TooMany | Form::Missing
                                          => row("form-parts",              422, 1007, "Not the parts of this form"),
                Form::Size                => row("form-part-too-large",     413, 1009, "Part of a form too large"),
                Form::FileName            => row("file-name",               422, 1007, "Name of a file not allowed"),
                Form::Type | Form::Content => row("file-type",              415, 1003, "Type of a file not allowed"),
            },
            Self::Json { fault, .. } => match fault {
                Json::Utf8 | Json::Syntax | Json::End | Json::Surrogate
                                          => row("not-json",                400, 1007, "Not JSON"),
                Json::Duplicate           => row("json-duplicate-key",      400, 1007, "A key stands twice"),
                Json::Depth               => row("json-too-deep",           422, 1007, "JSON too deep"),
                Json::Values | Json::Members | Json::Items
                                          => row("json-too-many",           422, 1007, "Too many JSON values"),
                Json::Key | Json::String  => row("json-too-long",           422, 1007, "JSON string too long"),
                Json::Digits | Json::Exponent | Json::Range
                                          => row("json-number",             422, 1007, "JSON number too large"),
            },
            Self::Schema { .. }           => row("schema",                  422, 1007, "Does not match the schema"),
            Self::NotUtf8                 => row("not-utf8",                400, 1007, "Text is not UTF-8"),
            Self::BadCompression          => row("bad-compression",         400, 1007, "Does not inflate"),
            Self::MessageKind             => row("message-kind",            415, 1003, "Kind of message not allowed"),
            Self::UnknownMessageType      => row("unknown-message-type",    422, 1008, "Unknown message type"),
            Self::PlaintextRefused        => row("plaintext-refused",       422, 4422, "Plaintext refused"),
            Self::MessageTooBig { .. }    => row("message-too-big",         413, 1009, "Message too big"),
            Self::InflateRatio { .. }     => row("inflate-ratio",           413, 1009, "Inflates too much"),
            Self::TooManyFragments { .. } => row("too-many-fragments",      413, 1009, "Too many fragments"),
            Self::Protocol { .. }         => row("protocol",                400, 1002, "WebSocket protocol error"),

            Self::RateExceeded { .. }     => row("rate-exceeded",           429, 4429, "Too many requests"),
            Self::TooManyAtOnce           => row("too-many-at-once",        429, 4429, "Too many at once"),
            Self::TooManyFailures { .. }  => row("too-many-failures",       429, 4429, "Too many failures"),
            Self::LimitUnavailable        => row("limit-unavailable",       503, 1013, "Limits cannot be checked"),
            Self::RenewalTooSoon { .. }   => row("renewal-too-soon",        429, 4429, "Renewal too soon"),
            Self::TooManySockets          => row("too-many-sockets",        429, 4429, "Too many sockets"),
            Self::ControlFlood            => row("control-flood",           429, 4429, "Too many control frames"),
            Self::AddressRefused          => row("address-refused",         403, 1008, "Address refused"),
            Self::TooManyConnections      => row("too-many-connections",    503, 1013, "Too many connections"),
            Self::Overloaded              => row("overloaded",              503, 1013, "Try again later"),

            Self::PolicyChanged           => row("policy-changed",          403, 1008, "No longer allowed"),
            Self::Restarting              => row("restarting",              503, 1012, "Restarting"),
            Self::UpstreamUnavailable     => row("upstream-unavailable",    502, 1013, "Upstream unavailable"),
            Self::UpstreamTimeout         => row("upstream-timeout",        504, 1013, "Upstream too slow"),
            Self::UpstreamCircuitOpen { .. } => row("upstream-circuit-open", 503, 1013, "Upstream out of order"),
            Self::AnswerNotAllowed        => row("answer-not-allowed",      502, 1011, "Answer not allowed"),
            Self::Internal                => row("internal",                500, 1011, "Internal error"),
        }
    }

    /// Machine-readable word, stable over versions: label of metrics, last part of a problem's `type`,
    /// first word of a close reason. One of [`Denial::ALL_REASONS`].
    pub const fn reason(&self) -> &'static str {
        self.row().reason
    }

    /// Whether it is what somebody gets who tries out tokens. An old one is no guess, and neither is one from ahead of our clock.
    pub const fn is_guess(&self) -> bool {
        match self {
            Self::TokenInvalid(fault) => !matches!(fault, TokenFault::Expired | TokenFault::NotYetValid),
            Self::ProofInvalid(_) => true,
            _ => false,
        }
    }

    /// Status that answers a refused request.
    pub fn status(&self) -> StatusCode {
        // INVARIANT: the table holds only three-digit statuses (tested below); were one wrong, 500 is fail closed.
        StatusCode::from_u16(self.row().status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// Code that closes an open WebSocket (RFC 6455 §7.4; 4000–4999 are ours, see CONVENTIONS).
    pub const fn close_code(&self) -> u16 {
        self.row().close
    }

    /// `title` of the problem document (RFC 9457 §3.1.3): the same for every occurrence.
    pub const fn title(&self) -> &'static str {
        self.row().title
    }

    /// `detail` of the problem document: helps the honest client's author, and says nothing about other
    /// users, keys or what stands behind the gateway.
    pub fn detail(&self) -> Cow<'static, str> {
        match self {
            Self::Malformed { detail } | Self::Protocol { detail } => Cow::Borrowed(detail),
            Self::UriTooLong => "path or query is longer than allowed".into(),
            Self::HeadersTooLarge => "the header fields are larger or more than allowed".into(),
            Self::UnknownTransferCoding => "only the transfer coding `chunked` is known".into(),
            Self::VersionNotSupported => "this version of HTTP is not spoken here".into(),
            Self::TooSlow => "the request did not arrive in time".into(),
            Self::QueryNotAllowed => "this resource takes no query".into(),
            Self::NoRoute => "there is nothing at this path".into(),
            Self::Misdirected => "this host is not served on this connection".into(),
            Self::PlainHttp => "this is served over TLS only".into(),
            Self::MethodNotAllowed { allow } => format!("allowed here: {allow}").into(),
            Self::UpgradeRequired => "this resource is a WebSocket".into(),
            Self::NoWebsocket => "this resource is not a WebSocket".into(),
            Self::SubprotocolNotAllowed => "none of the offered subprotocols is spoken here".into(),
            Self::ProtocolNotOffered => "this protocol is not offered here over HTTP/2".into(),
            Self::TokenMissing => "a bearer token is needed".into(),
            Self::TokenInvalid(TokenFault::Expired) => "the token has expired; get a new one".into(),
            Self::TokenInvalid(TokenFault::Twice) => "send one token, in one place".into(),
            Self::TokenInvalid(_) => "the token is not accepted here".into(),
            Self::ProofMissing => "the token is bound to a key; prove that you hold it".into(),
            Self::ProofInvalid(_) => "the proof of possession is not accepted".into(),
            Self::ProofNonce { .. } => "make a proof with the nonce of this answer".into(),
            Self::TooManyProofs => "too many proofs of possession at once; try again".into(),
            Self::TooManyTickets => "too many tickets are open; use them, or try again".into(),
            Self::CertificateMissing => "the token is bound to another client certificate".into(),
            Self::ClientCertificateMissing => "connect with a client certificate".into(),
            Self::ClientCertificateNotAllowed => "the client certificate may not do this".into(),
            Self::TokenKeysUnavailable => {
                "tokens cannot be verified at present; keep yours and try again".into()
            }
            Self::LogoutInvalid(_) => "the logout token is not accepted".into(),
            Self::LogoutFailed => "the logout could not be carried out; try again".into(),
            Self::ContactLost => {
                "sessions cannot be checked at present; keep your token and try again".into()
            }
            Self::RoleMissing => "your roles do not allow this".into(),
            Self::RolesConflict => "you have roles that nobody may have together".into(),
            Self::NotPermitted => "nothing that is known of you allows this".into(),
            Self::ResourceMissing => "the request or message does not say what it is about".into(),
            Self::ReasonMissing { place } => {
                format!("this is recorded; say why, in {place}, in 1 to {MAX_REASON} bytes of text").into()
            }
            Self::Revoked => "this session has ended; log in again".into(),
            Self::SessionIdle => "this session was idle for too long; log in again".into(),
            Self::SessionReplaced => "a newer session or connection took the place of this one".into(),
            Self::SessionEnded => "the session has lasted as long as any may; log in again".into(),
            Self::TooManySessions => "as many sessions of yours are open as may be; end another".into(),
            Self::RenewalMismatch => "the new token is not of this session".into(),
            Self::RightsChanged => "your rights changed; connect again".into(),
            Self::StepUpNeeded { .. } => "this needs a stronger or fresher login".into(),
            Self::OriginNotAllowed => "pages of this origin may not connect".into(),
            Self::BodyTooLarge { limit: 0 } => "this resource takes no body".into(),
            Self::BodyTooLarge { limit } => format!("at most {limit} bytes are allowed").into(),
            Self::ContentType { .. } => "this content type is not taken here".into(),
            Self::ContentCoding { .. } => "this content coding is not taken here; send it plain".into(),
            Self::Form { fault, part: None } => fault.detail().into(),
            Self::Form { fault, part: Some(part) } => format!("`{part}`: {}", fault.detail()).into(),
            Self::Json { fault, at, pointer } => fault.detail(*at, pointer),
            Self::Schema { pointer } if pointer.is_empty() => "the document does not match its schema".into(),
            Self::Schema { pointer } => format!("{pointer} does not match its schema").into(),
            Self::NotUtf8 => "a text message must be UTF-8".into(),
            Self::BadCompression => "a compressed message must inflate by itself, to its end".into(),
            Self::MessageKind => "this kind of message (text or binary) is not taken here".into(),
            Self::UnknownMessageType => "the message's type is missing or not known here".into(),
            Self::PlaintextRefused => "this conversation is end-to-end encrypted".into(),
            Self::MessageTooBig { limit } => format!("at most {limit} bytes are allowed").into(),
            Self::InflateRatio { limit } => {
                format!("a compressed message may grow to {limit} times its size").into()
            }
            Self::TooManyFragments { limit } => format!("at most {limit} fragments are allowed").into(),
            Self::RateExceeded { retry_after, .. } | Self::RenewalTooSoon { retry_after } => {
                format!("try again in {} s", whole_seconds(*retry_after)).into()
            }
            Self::TooManyAtOnce => {
                "too many requests or connections of yours are under way; wait for one".into()
            }
            Self::TooManyFailures { retry_after } => {
                format!("too many attempts failed; try again in {} s", whole_seconds(*retry_after)).into()
            }
            Self::AddressRefused => "this address may not connect at present".into(),
            Self::LimitUnavailable => "limits cannot be checked at present; try again".into(),
            Self::TooManySockets => "too many connections of yours are open here; close one".into(),
            Self::ControlFlood => "pings, pongs or empty frames come too fast".into(),
            Self::TooManyConnections => "too many connections are open".into(),
            Self::Overloaded => "too much work at present".into(),
            Self::PolicyChanged => "the rules changed, and this is no longer allowed".into(),
            Self::Restarting => "the gateway restarts; connect again".into(),
            Self::UpstreamUnavailable => "the service cannot be reached at present; try again".into(),
            Self::UpstreamTimeout => "the service did not answer in time; try again".into(),
            Self::UpstreamCircuitOpen { .. } => "the service has failed and is given time to recover".into(),
            Self::AnswerNotAllowed => "the service gave an answer that may not be passed on".into(),
            Self::Internal => "something went wrong here".into(),
        }
    }

    /// Delay for `Retry-After` (RFC 9110 §10.2.3), in whole seconds, rounded up; `None` where waiting is no help.
    pub fn retry_after(&self) -> Option<u64> {
        match self {
            Self::RateExceeded { retry_after, .. }
            | Self::RenewalTooSoon { retry_after }
            | Self::TooManyFailures { retry_after }
            | Self::UpstreamCircuitOpen { retry_after } => Some(whole_seconds(*retry_after)),
            Self::TokenKeysUnavailable
            | Self::ContactLost
            | Self::LimitUnavailable
            | Self::TooManyAtOnce
            | Self::TooManyConnections
            | Self::TooManyProofs
            | Self::TooManySockets
            | Self::TooManyTickets
            | Self::Overloaded
            | Self::Restarting
            | Self::UpstreamUnavailable
            | Self::UpstreamTimeout => Some(1),
            // Somebody has to log out, or to be idle.
            Self::TooManySessions => Some(60),
            _ => None,
        }
    }
}

/// At least 1: a client told "0" would come back at once.
fn whole_seconds(duration: Duration) -> u64 {
    let rounding_up = u64::from(duration.subsec_nanos() > 0);
    duration.as_secs().saturating_add(rounding_up).max(1)
}

/// `reason: detail`, for logs.
impl fmt::Display for Denial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TokenInvalid(fault) => write!(f, "{}: {}", self.reason(), fault.name()),
            Self::ProofInvalid(fault) => write!(f, "{}: {}", self.reason(), fault.name()),
            Self::LogoutInvalid(fault) => write!(f, "{}: {}", self.reason(), fault.name()),
            _ => write!(f, "{}: {}", self.reason(), self.detail()),
        }
    }
}

impl JsonFault {
    fn detail(self, at: u32, pointer: &str) -> Cow<'static, str> {
        let what = match self {
            Self::Utf8 => return format!("not UTF-8 at byte {at}").into(),
            Self::Syntax => return format!("not JSON at byte {at}").into(),
            Self::End => return "the JSON text ends too soon".into(),
            Self::Surrogate => return format!("half a surrogate pair at byte {at}").into(),
            Self::Duplicate => "stands twice",
            Self::Depth => "too deep",
            Self::Values => "too many values in all",
            Self::Members => "too many members",
            Self::Items => "too many items",
            Self::Key => "a key is too long",
            Self::String => "string too long",
            Self::Digits => "number of too many digits",
            Self::Exponent => "number of too large an exponent",
            Self::Range => "number out of range",
        };
        if pointer.is_empty() { what.into() } else { format!("{pointer}: {what}").into() }
    }
}

impl FormFault {
    /// Fixed text, short enough for a close frame with the name of a part.
    const fn detail(self) -> &'static str {
        match self {
            Self::Boundary => "Content-Type must name one plain boundary",
            Self::Start => "something stands before the first boundary",
            Self::Delimiter => "the boundary stands where no part ends",
            Self::Behind => "something stands behind the last boundary",
            Self::End => "the form ends too soon",
            Self::Head => "the fields of a part are too long",
            Self::Field => "a field of a part is malformed or not allowed",
            Self::Disposition => "a part has no plain Content-Disposition",
            Self::Unknown => "a part has a name that is not known here",
            Self::TooMany => "more parts than allowed",
            Self::Missing => "the part is missing",
            Self::Size => "the part is too large",
            Self::FileName => "not a name that a file may have here",
            Self::Type => "its type is not taken here",
            Self::Content => "its content is not of its type",
        }
    }
}

impl TokenFault {
    /// Every value that [`TokenFault::name`] can have.
    pub const ALL_NAMES: &[&str] = &[
        "malformed",
        "algorithm",
        "key",
        "signature",
        "issuer",
        "audience",
        "expired",
        "not-yet-valid",
        "type",
        "claims",
        "too-large",
        "twice",
        "unbound",
        "ticket",
    ];

    /// Word for log and metrics; the outside never sees it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Algorithm => "algorithm",
            Self::Key => "key",
            Self::Signature => "signature",
            Self::Issuer => "issuer",
            Self::Audience => "audience",
            Self::Expired => "expired",
            Self::NotYetValid => "not-yet-valid",
            Self::Type => "type",
            Self::Claims => "claims",
            Self::TooLarge => "too-large",
            Self::Twice => "twice",
            Self::Unbound => "unbound",
            Self::Ticket => "ticket",
        }
    }
}

impl ProofFault {
    /// Word for log and metrics; the outside never sees it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Type => "type",
            Self::Algorithm => "algorithm",
            Self::Key => "key",
            Self::Signature => "signature",
            Self::Claims => "claims",
            Self::Method => "method",
            Self::Url => "url",
            Self::Time => "time",
            Self::Token => "token",
            Self::Replayed => "replayed",
        }
    }
}

impl LogoutFault {
    /// Word for log and metrics; the outside never sees it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Form => "form",
            Self::Token(fault) => fault.name(),
            Self::Event => "event",
            Self::Nonce => "nonce",
            Self::Nobody => "nobody",
            Self::Replayed => "replayed",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn every_denial() -> Vec<Denial> {
        use TokenFault as Fault;
        let faults = [
            Fault::Malformed,
            Fault::Algorithm,
            Fault::Key,
            Fault::Signature,
            Fault::Issuer,
            Fault::Audience,
            Fault::Expired,
            Fault::NotYetValid,
            Fault::Type,
            Fault::Claims,
            Fault::TooLarge,
            Fault::Twice,
            Fault::Unbound,
            Fault::Ticket,
        ];
        let names: Vec<_> = faults.iter().map(|fault| fault.name()).collect();
        assert_eq!(names, TokenFault::ALL_NAMES);
        // As long as any that is shown.
        let pointer = "/".repeat(64);
        let mut all: Vec<_> = faults.into_iter().map(Denial::TokenInvalid).collect();
        all.extend([
            Denial::Malformed { detail: "a test" },
            Denial::UriTooLong,
            Denial::HeadersTooLarge,
            Denial::UnknownTransferCoding,
            Denial::VersionNotSupported,
            Denial::TooSlow,
            Denial::QueryNotAllowed,
            Denial::NoRoute,
            Denial::Misdirected,
            Denial::PlainHttp,
            Denial::MethodNotAllowed { allow: "GET".into() },
            Denial::UpgradeRequired,
            Denial::NoWebsocket,
            Denial::SubprotocolNotAllowed,
            Denial::ProtocolNotOffered,
            Denial::TokenMissing,
            Denial::ProofMissing,
            Denial::ProofInvalid(ProofFault::Replayed),
            Denial::ProofNonce { nonce: "a-test".into() },
            Denial::TooManyProofs,
            Denial::TooManyTickets,
            Denial::CertificateMissing,
            Denial::ClientCertificateMissing,
            Denial::ClientCertificateNotAllowed,
            Denial::TokenKeysUnavailable,
            Denial::LogoutInvalid(LogoutFault::Replayed),
            Denial::LogoutFailed,
            Denial::ContactLost,
            Denial::RoleMissing,
            Denial::RolesConflict,
            Denial::NotPermitted,
            Denial::ResourceMissing,
            Denial::ReasonMissing { place: "X-Why".into() },
            Denial::Revoked,
            Denial::SessionIdle,
            Denial::SessionReplaced,
            Denial::SessionEnded,
            Denial::TooManySessions,
            Denial::RenewalMismatch,
            Denial::RightsChanged,
            Denial::StepUpNeeded { challenge: "max_age=\"60\"".into() },
            Denial::OriginNotAllowed,
            Denial::BodyTooLarge { limit: 0 },
            Denial::ContentType { accept: "application/json".into() },
            Denial::ContentCoding { accept: "identity".into() },
            Denial::Json { fault: JsonFault::Utf8, at: u32::MAX, pointer: pointer.clone() },
            Denial::Json { fault: JsonFault::Syntax, at: u32::MAX, pointer: pointer.clone() },
            Denial::Json { fault: JsonFault::End, at: 0, pointer: pointer.clone() },
            Denial::Json { fault: JsonFault::Surrogate, at: u32::MAX, pointer: pointer.clone() },
            Denial::Json { fault: JsonFault::Range, at: 0, pointer: pointer.clone() },
            Denial::Json { fault: JsonFault::Duplicate, at: 0, pointer: pointer.clone() },
            Denial::Json { fault: JsonFault::Depth, at: 0, pointer: pointer.clone() },
            Denial::Json { fault: JsonFault::Values, at: 0, pointer: pointer.clone() },
            Denial::Json { fault: JsonFault::Members, at: 0, pointer: pointer.clone() },
            Denial::Json { fault: JsonFault::Items, at: 0, pointer: pointer.clone() },
            Denial::Json { fault: JsonFault::Key, at: 0, pointer: pointer.clone() },
            Denial::Json { fault: JsonFault::String, at: 0, pointer: pointer.clone() },
            Denial::Json { fault: JsonFault::Digits, at: 0, pointer: pointer.clone() },
            Denial::Json { fault: JsonFault::Exponent, at: 0, pointer: pointer.clone() },
            Denial::Schema { pointer: "/a".into() },
            Denial::NotUtf8,
            Denial::BadCompression,
            Denial::MessageKind,
            Denial::UnknownMessageType,
            Denial::PlaintextRefused,
            Denial::MessageTooBig { limit: 1 },
            Denial::InflateRatio { limit: u32::MAX },
            Denial::TooManyFragments { limit: 1 },
            Denial::Protocol { detail: "a test" },
            Denial::RateExceeded { rate: RateIndex(0), retry_after: Duration::from_millis(1) },
            Denial::LimitUnavailable,
            Denial::TooManyFailures { retry_after: Duration::from_secs(1) },
            Denial::TooManyAtOnce,
            Denial::AddressRefused,
            Denial::RenewalTooSoon { retry_after: Duration::from_millis(1) },
            Denial::TooManySockets,
            Denial::ControlFlood,
            Denial::TooManyConnections,
            Denial::Overloaded,
            Denial::PolicyChanged,
            Denial::Restarting,
            Denial::UpstreamUnavailable,
            Denial::UpstreamTimeout,
            Denial::UpstreamCircuitOpen { retry_after: Duration::from_secs(1) },
            Denial::AnswerNotAllowed,
            Denial::Internal,
        ]);
        use FormFault as Form;
        let longest: Arc<str> = "a".repeat(40).into();
        for fault in [
            Form::Boundary,
            Form::Start,
            Form::Delimiter,
            Form::Behind,
            Form::End,
            Form::Head,
            Form::Field,
            Form::Disposition,
            Form::Unknown,
            Form::TooMany,
            Form::Missing,
            Form::Size,
            Form::FileName,
            Form::Type,
            Form::Content,
        ] {
            all.push(Denial::Form { fault, part: None });
            all.push(Denial::Form { fault, part: Some(Arc::clone(&longest)) });
        }
        all
    }

    #[test]
    fn reasons_are_the_closed_set_and_codes_are_the_agreed_ones() {
        let agreed =
            [1002, 1003, 1007, 1008, 1009, 1011, 1012, 1013, 4401, 4403, 4408, 4409, 4410, 4412, 4422, 4429];
        let mut seen = BTreeSet::new();
        let mut codes = BTreeSet::new();
        for denial in every_denial() {
            seen.insert(denial.reason());
            codes.insert(denial.close_code());
            assert_eq!(denial.status().as_u16(), denial.row().status);
            assert!(denial.status().is_client_error() || denial.status().is_server_error(), "{denial}");
            assert!(agreed.contains(&denial.close_code()), "{denial}");
            // Reason and detail must fit a close frame: 123 bytes (RFC 6455 §5.5.1).
            assert!(denial.reason().len() + 2 + denial.detail().len() <= 123, "{denial}");
        }
        assert_eq!(seen, Denial::ALL_REASONS.iter().copied().collect());
        assert_eq!(Denial::ALL_REASONS.len(), seen.len(), "a reason stands twice");
        assert_eq!(codes, agreed.into_iter().collect());
    }

    #[test]
    fn a_wait_is_rounded_up_and_never_zero() {
        assert_eq!(whole_seconds(Duration::ZERO), 1);
        assert_eq!(whole_seconds(Duration::from_millis(1001)), 2);
        assert_eq!(whole_seconds(Duration::from_secs(3)), 3);
        assert_eq!(whole_seconds(Duration::MAX), u64::MAX);
    }
}
