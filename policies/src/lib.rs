//! The policy of the sealgate edge gateway: what may pass, and why not.
//!
//! Pure: no sockets, no clock, no environment; only [`Bundle::read`] touches files. A [`Bundle`] (a folder with
//! `policy.toml`, `schemas/`, `tests/`) is compiled whole into an immutable [`Policy`], or refused with every error
//! by file, line and column. The gateway then asks the policy in two steps:
//!
//! ```text
//! Policy::match_request → RouteMatch::judge → RequestDemands ─┐ rates taken, nothing revoked
//!                                             settle ◄────────┘ → RequestPermit → TunnelPermit
//! TunnelPermit::judge_message → MessageDemands → settle_message → MessagePermit
//! ```
//!
//! A permit has no public constructor: what was not judged cannot be forwarded.

mod access;
mod answer;
mod authz;
mod bundle;
mod certificate;
mod ciphertext;
mod compile;
mod denial;
mod document;
mod errors;
mod identity;
mod json;
mod matcher;
mod media;
mod multipart;
mod path;
mod permit;
mod policy;
mod routes;
mod rule;
mod source;
mod units;
mod verdict;

pub use access::{Access, Resource};
pub use answer::{AnswerRule, Passes};
pub use authz::{DecisionCache, TlsFacts};
pub use bundle::{Bundle, BundleError};
pub use certificate::{
    CertificateName, ClientAuthentication, ClientCertificate, ClientMode, ClientZone, ClientZones,
    ForwardCertificate,
};
pub use denial::{Denial, FormFault, JsonFault, LogoutFault, ProofFault, TokenFault};
pub use document::json_schema;
pub use errors::{PolicyError, PolicyErrors};
pub use identity::{Binding, IDENTITY_HEADER_PREFIX, IDENTITY_HEADERS, Identity, IdentityParts, SessionId};
pub use multipart::FormJudge;
pub use permit::{
    BodyPermit, ConnectionFacts, ConnectionPermit, Direction, Evidence, Message, MessageDemands, MessageKind,
    MessagePermit, RateExceeded, Refusal, Renewal, RequestDemands, RequestFacts, RequestPermit, RouteMatch,
    TunnelPermit, settle, settle_message, settle_renewal,
};
pub use policy::{
    AcmeAuthority, AcmeChallenge, Algorithm, AuditPolicy, AuditRequests, Balance, Breaker, CertificateOrigin,
    CertificateSource, ClaimNames, Concurrency, ConcurrencyIndex, ConnectionPolicy, DpopPolicy, Endpoint,
    ExternalAccount, Group, HeaderPolicy, Health, Issuer, JwksSource, ListsPolicy, Mode, OnLoss, OnRateError,
    OverloadPolicy, Penalty, PenaltyIndex, Policy, Rate, RateFacts, RateIndex, RateKey, RevocationSource,
    RuleId, Sender, SessionLimit, SessionPolicy, SharedMode, SharedPolicy, SharedServer, Source, TlsPolicy,
    TlsVersions, Upstream, UpstreamIndex, UpstreamTls,
};
pub use rule::{
    AtLimit, Authentication, BodyRule, Compression, LogoutRule, MaxOpen, OnRefusal, RenewRule, Rule,
    TicketRule, TunnelLimits,
};
pub use units::{parse_duration, parse_network};
pub use verdict::{Authorization, DecidingPolicy, Explanation, Question, TestOutcome, explain, run_tests};
