//! A compiled policy: everything a gateway needs to know, resolved, ranged and ready.
//!
//! All of it is made by [`Policy::compile`](crate::Policy::compile) and never changes afterwards.

use std::fmt;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use ipnet::IpNet;

use crate::certificate::ClientZones;
use crate::denial::Denial;
use crate::identity::Identity;
use crate::routes::Routes;
use crate::rule::{AtLimit, Rule};

/// One immutable snapshot of all rules. Share it in an `Arc`; judge one connection, request or message by one.
#[derive(Debug)]
pub struct Policy {
    pub(crate) hash: String,
    pub(crate) tls: TlsPolicy,
    pub(crate) connections: ConnectionPolicy,
    pub(crate) headers: HeaderPolicy,
    pub(crate) certificates: Vec<CertificateSource>,
    pub(crate) acme: Vec<AcmeAuthority>,
    pub(crate) issuers: Vec<Issuer>,
    pub(crate) session: SessionPolicy,
    pub(crate) dpop: DpopPolicy,
    pub(crate) shared: Option<SharedPolicy>,
    pub(crate) revocation_sources: Vec<RevocationSource>,
    pub(crate) audit: AuditPolicy,
    pub(crate) upstreams: Vec<Upstream>,
    pub(crate) rates: Vec<Rate>,
    pub(crate) concurrency: Vec<Concurrency>,
    pub(crate) overload: OverloadPolicy,
    pub(crate) penalties: Vec<Penalty>,
    pub(crate) lists: ListsPolicy,
    pub(crate) rules: Vec<Arc<Rule>>,
    pub(crate) routes: Routes,
    pub(crate) http2_websockets: bool,
}

impl Policy {
    /// Hex SHA-256 over the bundle's files and the variables: equal inputs, equal hash.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// TLS versions, groups, HSTS.
    pub fn tls(&self) -> &TlsPolicy {
        &self.tls
    }

    /// Caps and deadlines of connections.
    pub fn connections(&self) -> &ConnectionPolicy {
        &self.connections
    }

    /// Fields of answers.
    pub fn headers(&self) -> &HeaderPolicy {
        &self.headers
    }

    /// Server certificates, in the file's order.
    pub fn certificates(&self) -> &[CertificateSource] {
        &self.certificates
    }

    /// Authorities that issue certificates by ACME; [`CertificateOrigin::Acme`] points into this slice.
    pub fn acme(&self) -> &[AcmeAuthority] {
        &self.acme
    }

    /// Token issuers.
    pub fn issuers(&self) -> &[Issuer] {
        &self.issuers
    }

    /// Session clock.
    pub fn session(&self) -> &SessionPolicy {
        &self.session
    }

    /// Proofs of possession.
    pub fn dpop(&self) -> &DpopPolicy {
        &self.dpop
    }

    /// How this gateway agrees with others; `None` for one alone.
    pub fn shared(&self) -> Option<&SharedPolicy> {
        self.shared.as_ref()
    }

    /// Services that say what is revoked.
    pub fn revocation_sources(&self) -> &[RevocationSource] {
        &self.revocation_sources
    }

    /// What gets an audit record.
    pub fn audit(&self) -> &AuditPolicy {
        &self.audit
    }

    /// Upstreams; [`UpstreamIndex`] points into this slice.
    pub fn upstreams(&self) -> &[Upstream] {
        &self.upstreams
    }

    /// Rates; [`RateIndex`] points into this slice.
    pub fn rates(&self) -> &[Rate] {
        &self.rates
    }

    /// Limits of what is under way; [`ConcurrencyIndex`] points into this slice.
    pub fn concurrency(&self) -> &[Concurrency] {
        &self.concurrency
    }

    /// When load is shed.
    pub fn overload(&self) -> &OverloadPolicy {
        &self.overload
    }

    /// Penalties; [`PenaltyIndex`] points into this slice.
    pub fn penalties(&self) -> &[Penalty] {
        &self.penalties
    }

    /// Addresses that may or may not connect.
    pub fn lists(&self) -> &ListsPolicy {
        &self.lists
    }

    /// Rules, routes and websockets; [`RuleId`] points into this slice.
    pub fn rules(&self) -> &[Arc<Rule>] {
        &self.rules
    }

    /// Hosts that rules name, exact or `*.` and one, in order; not those of rules for any host.
    pub fn hosts(&self) -> Vec<String> {
        self.routes.hosts()
    }

    /// Whether any WebSocket may be opened over HTTP/2, so that clients are told (RFC 8441 §3).
    pub fn http2_websockets(&self) -> bool {
        self.http2_websockets
    }

    /// Names of all rules in the order of their [`RuleId`]: a closed label set.
    pub fn route_names(&self) -> impl Iterator<Item = &Arc<str>> {
        self.rules.iter().map(|rule| &rule.name)
    }
}

/// Where a secret or a certificate comes from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Source {
    /// `file:PATH`, already resolved against the bundle's folder.
    File(PathBuf),
    /// `env:NAME`: an environment variable's value.
    Env(String),
}

/// As it stands in a policy.
impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{}", path.display()),
            Self::Env(name) => write!(f, "env:{name}"),
        }
    }
}

/// `[tls]`. Suites are no choice: ECDHE with AEAD only (row T-2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsPolicy {
    /// Versions offered; default both.
    pub versions: TlsVersions,
    /// Key exchange groups, most wanted first.
    pub groups: Vec<Group>,
    /// Ready value of `Strict-Transport-Security` (RFC 6797); `None` sends none.
    pub hsts: Option<String>,
    /// Whether TLS 1.3 tickets are given; default true. TLS 1.2 never gets one.
    pub tickets: bool,
    /// How long a ticket lives and a ticket key seals. 1 s to 7 d; default 6 h.
    pub ticket_lifetime: Duration,
    /// Whether a client that asks for a name of no certificate is refused; default false: it gets the one without names.
    pub refuse_unknown_names: bool,
    /// Who is asked for a certificate.
    pub client: ClientZones,
}

/// TLS versions. Older ones cannot be expressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TlsVersions {
    /// TLS 1.2 and 1.3.
    Tls12And13,
    /// TLS 1.3 only.
    Tls13,
}

/// Key exchange groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Group {
    /// Post-quantum hybrid X25519MLKEM768.
    X25519MlKem768,
    /// X25519.
    X25519,
    /// NIST P-256.
    Secp256r1,
    /// NIST P-384.
    Secp384r1,
}

/// `[connections]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionPolicy {
    /// Open connections in all. 1 to 10,000,000; default 20,000.
    pub max_total: u32,
    /// Open connections of one address. 1 to 10,000,000; default 200.
    pub max_per_address: u32,
    /// From accept to the end of the TLS handshake. 100 ms to 5 min; default 5 s.
    pub handshake_timeout: Duration,
    /// From the first byte of a head to its end. 100 ms to 5 min; default 10 s.
    pub header_timeout: Duration,
    /// A connection without a request. 1 s to 1 h; default 75 s.
    pub idle_timeout: Duration,
    /// Longest pause within a body. 100 ms to 1 h; default 30 s.
    pub body_timeout: Duration,
    /// Bytes in a second that a client must send of a body, over the time that was waited for it. 0 (any) to 1 MiB; default 128.
    pub min_body_rate: u32,
    /// Longest time that a client may take nothing of an answer. 100 ms to 1 h; default 30 s.
    pub write_timeout: Duration,
    /// From SIGTERM to the end, whatever still runs. 0 to 1 h; default 30 s.
    pub drain_timeout: Duration,
    /// On SIGTERM open WebSockets are told to close at even chances over this time. 0 to `drain_timeout`; default 5 s.
    pub drain_jitter: Duration,
    /// Header section in bytes. 1 KiB to 1 MiB; default 16 KiB.
    pub max_header_bytes: u32,
    /// Header fields. 1 to 1,000; default 100.
    pub max_headers: u32,
    /// Concurrent HTTP/2 streams per connection. 1 to 10,000; default 100.
    pub h2_max_streams: u32,
    /// Bytes that one HTTP/2 stream may send ahead of what is read of it (RFC 9113 §5.2). 16 KiB to 16 MiB; default
    /// 128 KiB.
    pub h2_stream_window: u32,
    /// The same for all streams of a connection; at least twice as much. 64 KiB to 64 MiB; default 1 MiB.
    pub h2_connection_window: u32,
    /// Whether HTTP/2 is offered (ALPN `h2`); default true.
    pub http2: bool,
    /// Where load balancers are that say who their clients are (PROXY protocol); at most 64, default none.
    pub proxy_protocol_from: Vec<IpNet>,
}

impl ConnectionPolicy {
    /// Whether connections from `peer`, an IPv4 address not written as an IPv6 one, begin with a PROXY header.
    #[must_use]
    pub fn is_proxy(&self, peer: IpAddr) -> bool {
        self.proxy_protocol_from.iter().any(|net| net.contains(&peer))
    }
}

/// `[headers]`: what answers say beside what upstreams do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeaderPolicy {
    /// `Referrer-Policy` where the upstream gives none; default `no-referrer`.
    pub referrer_policy: HeaderValue,
    /// Of every answer, whatever the upstream says.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// What upstreams may not send.
    pub remove: Vec<HeaderName>,
}

/// `[[certificate]]`: one chain and its key, or whom they are to be had of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateSource {
    /// Names it answers for, exact or `*.example.com`, lower case; empty for the default certificate.
    pub names: Vec<String>,
    /// Where it comes from.
    pub origin: CertificateOrigin,
}

/// Where a certificate comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateOrigin {
    /// Somebody puts it there.
    Given {
        /// PEM chain, leaf first.
        chain: Source,
        /// PEM private key.
        key: Source,
    },
    /// The place in [`Policy::acme`] of the authority that issues it. It then has 1 to 100 names, all exact.
    Acme(usize),
}

/// `[[acme]]`: an authority that issues certificates (RFC 8555).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcmeAuthority {
    /// Name in logs, metrics and the state folder.
    pub name: Arc<str>,
    /// `https:` URL of its directory.
    pub directory: String,
    /// Whom it may write to, `mailto:` URLs.
    pub contact: Vec<String>,
    /// PEM of the authorities that its server is trusted by; `None` for the system's.
    pub ca: Option<Source>,
    /// How names are validated, the first choice first; never empty.
    pub challenges: Vec<AcmeChallenge>,
    /// An account elsewhere that the authority's is bound to.
    pub external_account: Option<ExternalAccount>,
    /// Renewal is due when so much is left of a certificate. 1 h to 365 d; `None`: a third of its time.
    pub renew_before: Option<Duration>,
}

/// How an authority sees that a name is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AcmeChallenge {
    /// `http-01`: over plain HTTP, port 80 (RFC 8555 §8.3).
    Http,
    /// `tls-alpn-01`: over TLS, port 443 (RFC 8737).
    TlsAlpn,
}

/// External account binding (RFC 8555 §7.3.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExternalAccount {
    /// Key id.
    pub id: String,
    /// Key, base64url.
    pub key: Source,
}

/// `[[issuer]]`: whose tokens count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issuer {
    /// Name in logs and metrics.
    pub name: Arc<str>,
    /// Exact `iss`.
    pub issuer: String,
    /// Accepted `aud`, any of them.
    pub audience: Vec<String>,
    /// Pinned algorithms. Never `none`, never symmetric: neither can be expressed.
    pub algorithms: Vec<Algorithm>,
    /// Accepted `typ`, compared without regard to case and an `application/` prefix; default `at+jwt`.
    pub types: Vec<String>,
    /// Where its keys are.
    pub jwks: JwksSource,
    /// How often keys are read anew. 10 s to 1 d; default 5 min.
    pub refresh: Duration,
    /// Tolerated difference of clocks. 0 to 5 min; default `session.skew`.
    pub skew: Duration,
    /// Longest token. 256 B to 64 KiB; default 8 KiB.
    pub max_token_bytes: u32,
    /// What every token must be bound to; default nothing.
    pub sender: Sender,
    /// Which claim means what.
    pub claims: ClaimNames,
}

/// What a token must be bound to. Whatever is demanded: a token that is bound is accepted from its holder only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Sender {
    /// Nothing: bearer tokens pass.
    #[default]
    Any,
    /// A key that each request proves to hold (DPoP, RFC 9449).
    Dpop,
    /// The client certificate of the connection (mutual TLS, RFC 8705).
    Mtls,
}

/// Signature algorithms (RFC 7518, RFC 8037).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// ECDSA, P-256, SHA-256.
    ES256,
    /// ECDSA, P-384, SHA-384.
    ES384,
    /// Ed25519.
    EdDSA,
    /// RSASSA-PKCS1-v1_5, SHA-256.
    RS256,
    /// RSASSA-PSS, SHA-256.
    PS256,
}

/// Where a JWKS document is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum JwksSource {
    /// A file, already resolved against the bundle's folder.
    File(PathBuf),
    /// An `https:` URL.
    Url(String),
}

/// `[issuer.claims]`: names of top-level claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimNames {
    /// Default `sub`.
    pub subject: String,
    /// Default `sid`.
    pub session: String,
    /// Default `roles`: an array of strings, or one string split at spaces.
    pub roles: String,
    /// Default `dept`.
    pub department: String,
    /// Default `device_id`.
    pub device: String,
}

/// `[session]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionPolicy {
    /// Without activity for so long, a session ends (row S-1). 1 s to 30 d; default 15 min.
    pub idle: Duration,
    /// A session ends so long after it began ([`Identity::began`](crate::Identity::began)), whatever happens. 1 min to
    /// 400 d; default 12 h.
    pub lifetime: Duration,
    /// Tolerated difference of clocks. 0 to 5 min; default 30 s.
    pub skew: Duration,
    /// Sessions remembered at the same time. 1,000 to 100,000,000; default 1,000,000. More are refused.
    pub max_sessions: u32,
    /// How many sessions a subject may have; the strictest first.
    pub limits: Vec<SessionLimit>,
}

/// `[[session.limit]]`: sessions that one subject may have at the same time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SessionLimit {
    /// For whom; `None` for everybody.
    pub role: Option<String>,
    /// So many. 1 to 1,000.
    pub max: u32,
    /// What becomes of one more.
    pub at_limit: AtLimit,
}

impl SessionPolicy {
    /// The limit that holds for a session that begins with this identity: the smallest of those for its roles.
    pub fn limit_of(&self, identity: &Identity) -> Option<&SessionLimit> {
        let applies = |limit: &&SessionLimit| {
            limit.role.as_ref().is_none_or(|role| identity.roles.iter().any(|own| own == role))
        };
        self.limits.iter().find(applies).filter(|_| identity.names_session())
    }

    /// When a session that began at `began` ends, whatever happens; both in unix seconds.
    pub fn ends_at(&self, began: u64) -> u64 {
        began.saturating_add(self.lifetime.as_secs())
    }

    /// Whether the identity's session still runs at `now` (unix seconds). One that does not say when it began is bounded
    /// by its token's expiry alone.
    ///
    /// # Errors
    /// [`Denial::SessionEnded`].
    pub fn permit_session(&self, identity: &Identity, now: u64) -> Result<(), Denial> {
        match identity.began() {
            Some(began) if now >= self.ends_at(began) => Err(Denial::SessionEnded),
            Some(_) | None => Ok(()),
        }
    }
}

/// `[shared]`: several gateways agree through Redis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedPolicy {
    /// Redis servers; its sentinels, or some of its nodes, by `mode`. Never empty.
    pub servers: Vec<SharedServer>,
    /// What the servers are.
    pub mode: SharedMode,
    /// PEM of the authorities that servers over TLS are trusted by; none: the system's.
    pub ca: Option<Source>,
    /// Redis user; none: the default user.
    pub username: Option<Source>,
    /// The user's password.
    pub password: Option<Source>,
    /// What all keys begin with: gateways agree that have it in common. Default "sealgate".
    pub key_prefix: Arc<str>,
    /// What a request waits for one answer, at most. 5 ms to 2 s; default 50 ms.
    pub deadline: Duration,
    /// Without contact for so long, contact is lost. 2 s to 1 h; default 10 s.
    pub contact_timeout: Duration,
    /// What is done without contact; default warn.
    pub on_loss: OnLoss,
    /// Whether proofs of possession are refused while others cannot be asked about them (503); otherwise each gateway
    /// remembers its own. Default false.
    pub dpop_fails_closed: bool,
    /// Whether tickets are refused while Redis does not answer (503); otherwise the gateway that made one takes it. Default
    /// false.
    pub tickets_fail_closed: bool,
}

/// Where a Redis server is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SharedServer {
    /// Where it listens.
    pub endpoint: Endpoint,
    /// Whether it speaks TLS; its host is then verified.
    pub tls: bool,
}

/// What Redis servers are to each other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SharedMode {
    /// The one server.
    Single,
    /// Sentinels, which know the master.
    Sentinel {
        /// The master's name.
        service: String,
    },
    /// Nodes of a cluster.
    Cluster,
}

/// `[[revocation_source]]`: a service that is followed over HTTP, and says what is revoked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevocationSource {
    /// Its name; a metric label.
    pub name: Arc<str>,
    /// Name of the upstream.
    pub upstream: Arc<str>,
    /// Path without query.
    pub path: String,
    /// `iss` of the issuers whose sessions it may end.
    pub issuers: Vec<String>,
    /// Bearer token.
    pub token: Option<Source>,
    /// Without contact for so long, contact is lost. 4 s to 1 h; default 30 s.
    pub contact_timeout: Duration,
    /// What is done without contact; default warn.
    pub on_loss: OnLoss,
}

/// What is done while revocations that were made elsewhere cannot be known, from the mildest to the strictest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum OnLoss {
    /// Go on, and say so.
    #[default]
    Warn,
    /// Refuse what wants a role or step-up; the rest goes on.
    NoNewPrivileged,
    /// Refuse whatever wants a token, and close open WebSockets of sessions.
    FailClosed,
}

/// `[dpop]`: proofs of possession (RFC 9449).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DpopPolicy {
    /// Algorithms that a proof may be signed by; default ES256, ES384, EdDSA.
    pub algorithms: Vec<Algorithm>,
    /// Age of a proof. 5 s to 10 min; default 1 min.
    pub max_age: Duration,
    /// Tolerated difference of clocks: `session.skew`.
    pub skew: Duration,
    /// Whether a proof must hold a nonce of ours (§9); default false.
    pub nonce: bool,
    /// How long a nonce is good, at least; at most twice that. 30 s to 1 h; default 5 min.
    pub nonce_lifetime: Duration,
    /// Proofs remembered against replay, in all. 1,000 to 100,000,000; default 1,000,000. More are refused.
    pub max_proofs: u32,
    /// Proofs remembered of one subject. 10 to 1,000,000; default 10,000. More are refused.
    pub max_proofs_per_subject: u32,
    /// Whether an issuer or a rule demands proofs, so that a challenge should say so.
    pub demanded: bool,
    /// Names of `algorithms` as a challenge lists them: `ES256 ES384`.
    pub algorithm_names: String,
}

/// `[audit]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditPolicy {
    /// Which requests get a record; default refused ones.
    pub requests: AuditRequests,
}

/// Which requests get an audit record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AuditRequests {
    /// Every one.
    All,
    /// Those that were refused.
    Refused,
    /// None.
    None,
}

/// Points into [`Policy::upstreams`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UpstreamIndex(pub usize);

/// `[[upstream]]`: a service behind the gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// Unique name.
    pub name: Arc<str>,
    /// At least one.
    pub endpoints: Vec<Endpoint>,
    /// `None` speaks plain: for unix sockets and loopback.
    pub tls: Option<UpstreamTls>,
    /// How an endpoint is chosen; default round robin.
    pub balance: Balance,
    /// To connect, TLS included. 10 ms to 5 min; default 2 s.
    pub connect_timeout: Duration,
    /// For each try: while nothing more of the request is taken, and from its end to the head of its response. 10 ms to 1 h;
    /// default 30 s.
    pub response_timeout: Duration,
    /// A pooled connection without a request. 1 s to 1 h; default 60 s.
    pub idle_timeout: Duration,
    /// Pooled idle connections per endpoint and core. 0 to 100,000; default 256.
    pub max_idle: u32,
    /// Active health checks; `None` makes none.
    pub health: Option<Health>,
    /// Passive health; `None` keeps none.
    pub breaker: Option<Breaker>,
    /// Other endpoints that a request is tried on. 0 to 5; default 1.
    pub retries: u32,
    /// Most retries for 100 requests. 0 to 100; default 20.
    pub retry_budget: u32,
}

/// Where an upstream listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A unix socket.
    Unix(PathBuf),
    /// A host name or address (IPv6 without brackets), and a port.
    Tcp {
        /// Host name or address.
        host: String,
        /// Port.
        port: u16,
    },
}

/// TLS towards an upstream. Verification cannot be switched off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamTls {
    /// Authority to trust; `None` trusts the system's.
    pub ca: Option<Source>,
    /// Name the upstream's certificate must hold; never empty.
    pub server_name: String,
    /// Our certificate for mutual TLS; comes with `client_key` or not at all.
    pub client_certificate: Option<Source>,
    /// Key of `client_certificate`.
    pub client_key: Option<Source>,
}

/// How an endpoint is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Balance {
    /// In turn.
    RoundRobin,
    /// Whoever has the fewest requests and WebSockets under way; in turn among equals.
    LeastConnections,
    /// By the identity's subject, by the peer's address where there is none.
    ConsistentHash,
}

/// `[upstream.health]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Path that answers 2xx when healthy.
    pub path: String,
    /// Between two checks. 100 ms to 1 h; default 5 s.
    pub interval: Duration,
    /// For one check. 10 ms to 1 min; default 1 s.
    pub timeout: Duration,
    /// Successes in a row that make it healthy. 1 to 100; default 1.
    pub healthy: u32,
    /// Failures in a row that make it unhealthy. 1 to 100; default 3.
    pub unhealthy: u32,
}

/// `[upstream.breaker]`: when an endpoint is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Breaker {
    /// Failures in a row that open it. 1 to 1,000; default 5.
    pub failures: u32,
    /// How long it stays open. 100 ms to 1 h; default 10 s.
    pub open_for: Duration,
    /// Requests that may try it at the same time afterwards. 1 to 100; default 1.
    pub trials: u32,
    /// Whether the statuses 502, 503 and 504 are failures; default no.
    pub server_errors: bool,
}

/// Points into [`Policy::rates`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RateIndex(pub usize);

/// `[[rate]]`: how often, per what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rate {
    /// Unique name: metric label, and policy name in the `RateLimit` header.
    pub name: Arc<str>,
    /// What is counted apart; all of them together make the key. Never empty, sorted, no doubles.
    pub per: Vec<RateKey>,
    /// The header that [`RateKey::Header`] means; there with it and not without.
    pub header: Option<HeaderName>,
    /// How many bits of an IPv6 address count. 16 to 64; default 64.
    pub ipv6_prefix: u8,
    /// How many in a period.
    pub quota: NonZeroU32,
    /// The period. 1 ms to 366 d.
    pub period: Duration,
    /// How many at once. Default: the quota.
    pub burst: NonZeroU32,
    /// Whether it counts over all gateways, and what is done where Redis does not answer; `None` counts at this one.
    pub shared: Option<OnRateError>,
    /// Whether it refuses or only counts.
    pub mode: Mode,
}

/// Points into [`Policy::concurrency`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ConcurrencyIndex(pub usize);

/// `[[concurrency]]`: how many at the same time, per what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Concurrency {
    /// Unique name; a metric label.
    pub name: Arc<str>,
    /// As [`Rate::per`].
    pub per: Vec<RateKey>,
    /// As [`Rate::header`].
    pub header: Option<HeaderName>,
    /// As [`Rate::ipv6_prefix`].
    pub ipv6_prefix: u8,
    /// How many. 1 to 10,000,000.
    pub limit: u32,
    /// Whether it refuses or only counts.
    pub mode: Mode,
}

/// `[overload]`: when load is shed. `None` is no limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverloadPolicy {
    /// Memory of the process, in bytes. 16 MiB to 999 GiB.
    pub max_memory: Option<u64>,
    /// Memory of its control group, in hundredths of what that may have.
    pub max_group_memory: Option<u8>,
    /// Requests under way.
    pub max_in_flight: Option<u32>,
    /// New connections in a second.
    pub max_accept_rate: Option<u32>,
    /// From where on only sessions are served, in hundredths of a limit; default 80.
    pub shed_at: u8,
}

impl OverloadPolicy {
    /// Whether memory has to be looked at.
    pub const fn watches_memory(&self) -> bool {
        self.max_memory.is_some() || self.max_group_memory.is_some()
    }
}

/// Points into [`Policy::penalties`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PenaltyIndex(pub usize);

/// `[[penalty]]`: a growing wait for who fails again and again (row I-4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Penalty {
    /// Unique name; a metric label.
    pub name: Arc<str>,
    /// Whether addresses are counted apart.
    pub per_address: bool,
    /// Whether accounts are; one of the two at least.
    pub per_account: bool,
    /// Statuses of the upstream that are failures; default 401.
    pub statuses: Vec<u16>,
    /// Whether tokens that the gateway refuses are.
    pub tokens: bool,
    /// The failure that is followed by a wait, the first time. 1 to 1,000,000; default 5.
    pub after: u32,
    /// Without a failure for so long all are forgotten. 1 s to 30 d; default 15 min.
    pub window: Duration,
    /// The first wait; each further failure doubles it. 1 s to 1 d; default 30 s.
    pub block: Duration,
    /// The longest wait. `block` to 30 d; default 1 h.
    pub max_block: Duration,
    /// Whether new connections from the address are refused meanwhile too.
    pub refuses_connections: bool,
    /// How many bits of an IPv6 address count. 16 to 64; default 64.
    pub ipv6_prefix: u8,
    /// Whether it refuses or only counts.
    pub mode: Mode,
}

impl Penalty {
    /// For how long new connections from the address are refused while a wait of `block` lasts, and by whose word.
    pub fn connection_block(&self, block: Duration) -> Option<(Arc<str>, Duration)> {
        let refuses = self.refuses_connections && self.mode == Mode::Enforce;
        refuses.then(|| (Arc::clone(&self.name), block))
    }
}

/// `[lists]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ListsPolicy {
    /// Lists of addresses that are refused.
    pub deny: Vec<Source>,
    /// Lists of addresses that are let in.
    pub allow: Vec<Source>,
    /// Whether an address is refused that no list has.
    pub denies_others: bool,
}

/// What becomes of a request while nobody can say how a shared rate stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum OnRateError {
    /// It passes.
    Allow,
    /// It is refused (503, 1013).
    Deny,
    /// It counts at this gateway alone.
    #[default]
    Local,
}

/// What a rate counts apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RateKey {
    /// The peer's address.
    Address,
    /// The identity's subject (within its issuer).
    Subject,
    /// The identity's session.
    Session,
    /// The rule.
    Route,
    /// The identity's device (within its subject).
    Device,
    /// The identity's issuer.
    Issuer,
    /// A header of the request, or of the request that opened the WebSocket.
    Header,
    /// The message's type.
    MessageType,
    /// The WebSocket that the message came in.
    Socket,
}

impl RateKey {
    /// Whether it counts by what a verified token says.
    pub const fn is_of_identity(self) -> bool {
        match self {
            Self::Subject | Self::Session | Self::Device | Self::Issuer => true,
            Self::Address | Self::Route | Self::Header | Self::MessageType | Self::Socket => false,
        }
    }
}

/// What a rate is taken for; borrowed from the demands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateFacts<'a> {
    /// The peer's address.
    pub address: IpAddr,
    /// Issuer of the subject: equal subjects of two issuers are two people.
    pub issuer: Option<&'a str>,
    /// Subject, where there is an identity.
    pub subject: Option<&'a str>,
    /// Session, where the token names one.
    pub session: Option<&'a str>,
    /// Device, where the token names one.
    pub device: Option<&'a str>,
    /// Fields of the request; none for a message.
    pub headers: Option<&'a HeaderMap>,
    /// How many are taken of each rate.
    pub cost: NonZeroU32,
    /// Name of the rule.
    pub route: &'a str,
    /// Type of the message, where it has one.
    pub message_type: Option<&'a str>,
    /// WebSocket, for a message: what [`TunnelPermit::of_socket`](crate::TunnelPermit::of_socket) was told.
    pub socket: Option<u64>,
}

/// Whether a rule refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Mode {
    /// It does.
    #[default]
    Enforce,
    /// It lets pass what it would refuse, and says so.
    Shadow,
}

/// Dense index into [`Policy::rules`]; for pre-registered metric children.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId(pub u32);
