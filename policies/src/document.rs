//! `policy.toml` as it is typed: the raw form, used by `compile` and by nobody else.
//!
//! The doc comments here become the JSON Schema that editors show and that finds all structural errors. Whatever
//! the schema accepts, serde accepts: integers carry their range, durations and sizes their pattern.

use std::borrow::Cow;
use std::collections::BTreeMap;

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::units::{DurationText, SizeText};

/// JSON Schema (draft 2020-12) of `policy.toml`, for editors and for [`Policy::compile`](crate::Policy::compile).
pub fn json_schema() -> Value {
    let generator = SchemaSettings::draft2020_12().into_generator();
    let mut schema = generator.into_root_schema_for::<Document>().to_value();
    without_null(&mut schema);
    schema
}

/// TOML has no null: an optional key is left out. Without this every error under an optional key would be reported
/// as "neither this nor null".
fn without_null(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            if let Some(Value::Array(types)) = map.get_mut("type") {
                types.retain(|kind| kind != "null");
                if let [only] = types.as_slice() {
                    let only = only.clone();
                    map.insert("type".into(), only);
                }
            }
            if map.get("default") == Some(&Value::Null) {
                map.remove("default");
            }
            if let Some(Value::Array(options)) = map.get_mut("anyOf") {
                options.retain(|option| option != &json!({ "type": "null" }));
                if let [Value::Object(only)] = options.as_slice() {
                    let only = only.clone();
                    map.remove("anyOf");
                    for (key, value) in only {
                        map.entry(key).or_insert(value);
                    }
                }
            }
            map.values_mut().for_each(without_null);
        }
        Value::Array(items) => items.iter_mut().for_each(without_null),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Policy of a sealgate gateway.
///
/// Any string may hold `${name}` for a variable; `$${` stands for a literal `${`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "sealgate policy")]
pub(crate) struct Document {
    /// Version of this vocabulary: 1.
    #[serde(rename = "version")]
    #[schemars(range(min = 1, max = 1))]
    pub(crate) _version: u32,
    /// Defaults of variables; `--define name=value` overrides them, `state` is always given.
    #[serde(default, rename = "variables")]
    pub(crate) _variables: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) tls: TlsDocument,
    #[serde(default)]
    pub(crate) connections: ConnectionsDocument,
    #[serde(default)]
    pub(crate) headers: HeadersDocument,
    #[serde(default)]
    pub(crate) certificate: Vec<CertificateDocument>,
    #[serde(default)]
    pub(crate) acme: Vec<AcmeDocument>,
    #[serde(default)]
    pub(crate) issuer: Vec<IssuerDocument>,
    #[serde(default)]
    pub(crate) session: SessionDocument,
    #[serde(default)]
    pub(crate) dpop: DpopDocument,
    pub(crate) shared: Option<SharedDocument>,
    #[serde(default)]
    pub(crate) revocation_source: Vec<RevocationSourceDocument>,
    #[serde(default)]
    pub(crate) role: Vec<RoleDocument>,
    #[serde(default)]
    pub(crate) upstream: Vec<UpstreamDocument>,
    #[serde(default)]
    pub(crate) rate: Vec<RateDocument>,
    #[serde(default)]
    pub(crate) concurrency: Vec<ConcurrencyDocument>,
    #[serde(default)]
    pub(crate) overload: OverloadDocument,
    #[serde(default)]
    pub(crate) penalty: Vec<PenaltyDocument>,
    #[serde(default)]
    pub(crate) lists: ListsDocument,
    #[serde(default)]
    pub(crate) ciphertext: Vec<CiphertextDocument>,
    /// Bounds of all JSON that is looked into; bodies, websockets and messages may have bounds of their own.
    #[serde(default)]
    pub(crate) json: JsonDocument,
    /// What upstreams may answer; routes may say something else (`answer`).
    #[serde(default)]
    pub(crate) answers: AnswersDocument,
    #[serde(default)]
    pub(crate) route: Vec<RouteDocument>,
    #[serde(default)]
    pub(crate) websocket: Vec<WebsocketDocument>,
    #[serde(default)]
    pub(crate) audit: AuditDocument,
}

/// TLS towards clients. Suites are no choice: ECDHE with AEAD only.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "tls")]
pub(crate) struct TlsDocument {
    /// Default both.
    #[schemars(length(min = 1))]
    pub(crate) versions: Option<Vec<TlsVersionDocument>>,
    /// Key exchange groups, most wanted first: of those that a client offers the first here is taken, in whatever order it offers them,
    /// and at the cost of one more round trip if it has not sent a key for it. Default X25519MLKEM768, X25519, P-256, P-384.
    #[schemars(length(min = 1))]
    pub(crate) groups: Option<Vec<GroupDocument>>,
    /// Strict-Transport-Security; default none.
    pub(crate) hsts: Option<HstsDocument>,
    /// TLS 1.3 session tickets; default true.
    pub(crate) tickets: Option<bool>,
    /// How long a ticket may be used, and a ticket key seals, "1s" to "7d"; default "6h". Keys are made in the process and never stored;
    /// each opens for as long again as it sealed, and is erased then.
    pub(crate) ticket_lifetime: Option<DurationText>,
    /// A client that asks for a name (SNI) that no [[certificate]] lists: "default" answers with the one without names, "refuse" with
    /// the alert unrecognized_name (RFC 6066), as without such a one. Default "default".
    pub(crate) unknown_name: Option<UnknownNameDocument>,
    #[serde(default)]
    pub(crate) client: ClientAuthDocument,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "unknown-name")]
pub(crate) enum UnknownNameDocument {
    Default,
    Refuse,
}

/// Client certificates (mutual TLS). A certificate that is sent has to be good, whatever the mode: otherwise the handshake fails.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "client-certificates")]
pub(crate) struct ClientAuthDocument {
    /// "none" does not ask; "request" asks, and clients may have none; "require" makes no connection without one. Default "none".
    pub(crate) mode: Option<ClientModeDocument>,
    /// PEM of the authorities that certificates are trusted by, any number in one file: "file:PATH" or "env:NAME".
    pub(crate) ca: Option<String>,
    /// Revocation lists (RFC 5280), PEM or DER: "file:PATH" or "env:NAME". One that is missing or unreadable is an error of the
    /// policy. With any, every certificate of a chain must be covered by one; where none is, or its nextUpdate has passed,
    /// certificates are refused until it is replaced. Default none: nothing is looked up.
    #[serde(default)]
    pub(crate) crls: Vec<String>,
    /// What upstreams are told of a certificate: "none", "certificate" (Client-Cert) or "chain" (Client-Cert-Chain too; RFC
    /// 9440); default "certificate". What clients send in these fields is removed.
    pub(crate) forward: Option<ForwardDocument>,
    /// For some names and ports. The name's own comes before a wildcard's, a wildcard's before one without names.
    #[serde(default, rename = "override")]
    pub(crate) overrides: Vec<ClientOverrideDocument>,
}

/// Client certificates for some names or ports. What is left out is as in [tls.client].
///
/// A request for a host of another setting than its connection's is answered 421 (RFC 9110 §15.5.20).
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "client-certificates-override")]
pub(crate) struct ClientOverrideDocument {
    /// Names that clients ask for (SNI), exact or "*.example.com"; default all.
    #[serde(default)]
    pub(crate) names: Vec<String>,
    /// Ports that clients came to; default all.
    #[serde(default)]
    pub(crate) ports: Vec<u16>,
    /// "none", "request" or "require".
    pub(crate) mode: Option<ClientModeDocument>,
    /// PEM of the authorities that certificates are trusted by: "file:PATH" or "env:NAME".
    pub(crate) ca: Option<String>,
    /// Revocation lists; taken from [tls.client] only where ca is too.
    pub(crate) crls: Option<Vec<String>>,
    /// What upstreams are told: "none", "certificate" or "chain".
    pub(crate) forward: Option<ForwardDocument>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "client-mode")]
pub(crate) enum ClientModeDocument {
    None,
    Request,
    Require,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "forward-certificate")]
pub(crate) enum ForwardDocument {
    None,
    Certificate,
    Chain,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "client-certificate")]
pub(crate) enum CertificateDemandDocument {
    #[default]
    Any,
    Required,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "tls-version")]
pub(crate) enum TlsVersionDocument {
    #[serde(rename = "1.2")]
    Tls12,
    #[serde(rename = "1.3")]
    Tls13,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "group")]
pub(crate) enum GroupDocument {
    #[serde(rename = "X25519MLKEM768")]
    X25519MlKem768,
    X25519,
    #[serde(rename = "P-256")]
    Secp256r1,
    #[serde(rename = "P-384")]
    Secp384r1,
}

/// Strict-Transport-Security (RFC 6797).
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "hsts")]
pub(crate) struct HstsDocument {
    /// How long browsers remember, such as "730d".
    pub(crate) max_age: DurationText,
    /// Default false.
    #[serde(default)]
    pub(crate) include_subdomains: bool,
    /// Default false. Wants include_subdomains and at least "365d".
    #[serde(default)]
    pub(crate) preload: bool,
}

/// Caps and deadlines of connections.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "connections")]
pub(crate) struct ConnectionsDocument {
    /// Open connections in all; default 20000.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub(crate) max_total: Option<u32>,
    /// Open connections of one address; default 200.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub(crate) max_per_address: Option<u32>,
    /// From accept to the end of the TLS handshake, "100ms" to "5m"; default "5s".
    pub(crate) handshake_timeout: Option<DurationText>,
    /// For the head of a request, over HTTP/2 also for the first words, "100ms" to "5m"; default "10s".
    pub(crate) header_timeout: Option<DurationText>,
    /// For a connection without a request, "1s" to "1h"; default "75s".
    pub(crate) idle_timeout: Option<DurationText>,
    /// Longest pause within a body, "100ms" to "1h"; default "30s".
    pub(crate) body_timeout: Option<DurationText>,
    /// Bytes in a second that a client must send of a body, over the time that was waited for it, after 5 s; "0B" (any)
    /// to "1MiB"; default "128B".
    pub(crate) min_body_rate: Option<SizeText>,
    /// Longest time that a client may take nothing of an answer, "100ms" to "1h"; default "30s". What it has not taken
    /// then is dropped, also by the system.
    pub(crate) write_timeout: Option<DurationText>,
    /// From SIGTERM to the end, "0s" to "1h"; default "30s".
    pub(crate) drain_timeout: Option<DurationText>,
    /// On SIGTERM open WebSockets are told to reconnect at even chances over this time, so that they do not come back
    /// all at once; "0s" (all at once) to drain_timeout; default "5s", or drain_timeout where that is shorter.
    pub(crate) drain_jitter: Option<DurationText>,
    /// Header section, "1KiB" to "1MiB"; default "16KiB".
    pub(crate) max_header_bytes: Option<SizeText>,
    /// Header fields; default 100.
    #[schemars(range(min = 1, max = 1000))]
    pub(crate) max_headers: Option<u32>,
    /// Concurrent HTTP/2 streams per connection; default 100.
    #[schemars(range(min = 1, max = 10_000))]
    pub(crate) h2_max_streams: Option<u32>,
    /// What one HTTP/2 stream may send ahead of what is read of it, "16KiB" to "16MiB"; default "128KiB".
    pub(crate) h2_stream_window: Option<SizeText>,
    /// The same for all streams of a connection, at least twice as much, so that no stream can stall the others,
    /// "64KiB" to "64MiB"; default "1MiB".
    pub(crate) h2_connection_window: Option<SizeText>,
    /// Whether HTTP/2 is offered; default true.
    pub(crate) http2: Option<bool>,
    /// Addresses and prefixes (CIDR) of load balancers that say who their clients are, by the PROXY protocol, version 1 or 2, at the
    /// beginning of every connection. They are believed in all that depends on an address, so let nobody else come from there; and
    /// who comes from elsewhere is not asked. Default none.
    #[serde(default)]
    #[schemars(length(max = 64))]
    pub(crate) proxy_protocol_from: Vec<String>,
}

/// Fields of answers. Always there: X-Content-Type-Options: nosniff and the request's id; never: Server, X-Powered-By and
/// whatever else an upstream tells of itself. Strict-Transport-Security is tls.hsts.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "headers")]
pub(crate) struct HeadersDocument {
    /// Referrer-Policy, where the upstream gives none; default "no-referrer".
    pub(crate) referrer_policy: Option<ReferrerPolicyDocument>,
    /// Fields of every answer, whatever the upstream says, such as { "X-Frame-Options" = "DENY" }.
    #[serde(default)]
    pub(crate) set: BTreeMap<String, String>,
    /// Fields that upstreams may not send to clients.
    #[serde(default)]
    pub(crate) remove: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "referrer-policy")]
pub(crate) enum ReferrerPolicyDocument {
    NoReferrer,
    NoReferrerWhenDowngrade,
    Origin,
    OriginWhenCrossOrigin,
    SameOrigin,
    StrictOrigin,
    StrictOriginWhenCrossOrigin,
}

/// A certificate: a chain and its key, or one that an ACME authority issues.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "certificate")]
pub(crate) struct CertificateDocument {
    /// Names it answers for, exact or "*.example.com"; none: the default certificate.
    #[serde(default)]
    pub(crate) names: Vec<String>,
    /// PEM chain, leaf first: "file:PATH" or "env:NAME". Together with key.
    pub(crate) chain: Option<String>,
    /// PEM private key: "file:PATH" or "env:NAME". Together with chain.
    pub(crate) key: Option<String>,
    /// Name of the [[acme]] that issues it, instead of chain and key. It is for all names, 1 to 100 exact ones, with a key (P-256) of its
    /// own; until it is there, clients that ask for them are refused.
    pub(crate) acme: Option<String>,
}

/// An authority that issues certificates by ACME (RFC 8555), such as Let's Encrypt. Accounts and certificates stand in `acme/` of the
/// state folder; certificates are renewed in the background.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "acme")]
pub(crate) struct AcmeDocument {
    /// What certificates refer to it by.
    pub(crate) name: NameText,
    /// "https:" URL of its directory.
    pub(crate) directory: String,
    /// Whom it may write to, "mailto:ADDRESS"; default nobody.
    #[serde(default)]
    pub(crate) contact: Vec<String>,
    /// Has to be true: whoever runs the gateway agrees to the authority's terms of service.
    pub(crate) terms_agreed: bool,
    /// PEM of the authorities that its server is trusted by: "file:PATH" or "env:NAME"; default the system's.
    pub(crate) ca: Option<String>,
    /// How names are validated, the first choice first; after a failure the next one is tried. "tls-alpn-01" comes to port 443 (RFC
    /// 8737), "http-01" to port 80 (--http). Default both, in this order.
    #[schemars(length(min = 1))]
    pub(crate) challenges: Option<Vec<AcmeChallengeDocument>>,
    /// An account elsewhere that the authority's is bound to (RFC 8555 §7.3.4).
    pub(crate) external_account: Option<ExternalAccountDocument>,
    /// Renewal is due when so much is left of a certificate, "1h" to "365d"; default a third of its time. Where the authority has advice
    /// of its own (ARI, RFC 9773), that counts instead.
    pub(crate) renew_before: Option<DurationText>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "acme-challenge")]
pub(crate) enum AcmeChallengeDocument {
    #[serde(rename = "http-01")]
    Http,
    #[serde(rename = "tls-alpn-01")]
    TlsAlpn,
}

/// External account binding.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "external-account")]
pub(crate) struct ExternalAccountDocument {
    /// Key id that the authority gave.
    #[schemars(length(min = 1))]
    pub(crate) id: String,
    /// The key that it gave, in base64url: "file:PATH" or "env:NAME".
    pub(crate) key: String,
}

/// Whose tokens count.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "issuer")]
pub(crate) struct IssuerDocument {
    /// Unique name: lower-case letters, digits, "-".
    pub(crate) name: NameText,
    /// Exact `iss` claim.
    #[schemars(length(min = 1))]
    pub(crate) issuer: String,
    /// Accepted `aud` claims, any of them.
    #[schemars(length(min = 1))]
    pub(crate) audience: Vec<String>,
    /// Pinned signature algorithms.
    #[schemars(length(min = 1))]
    pub(crate) algorithms: Vec<AlgorithmDocument>,
    /// Accepted `typ` headers; default ["at+jwt"].
    #[schemars(length(min = 1))]
    pub(crate) types: Option<Vec<String>>,
    /// "file:PATH" or an "https:" URL.
    pub(crate) jwks: String,
    /// How often the keys are read anew, "10s" to "1d"; default "5m".
    pub(crate) refresh: Option<DurationText>,
    /// Tolerated difference of clocks, "0s" to "5m"; default session.skew.
    pub(crate) skew: Option<DurationText>,
    /// Longest token, "256B" to "64KiB"; default "8KiB".
    pub(crate) max_token_bytes: Option<SizeText>,
    /// "dpop" takes tokens only that are bound to a key (RFC 9449), "mtls" those that are bound to a client certificate (RFC
    /// 8705); default "any". A bound token always needs its proof, or its certificate.
    #[serde(default)]
    pub(crate) sender: SenderDocument,
    #[serde(default)]
    pub(crate) claims: ClaimsDocument,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "sender")]
pub(crate) enum SenderDocument {
    #[default]
    Any,
    Dpop,
    Mtls,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[schemars(rename = "algorithm")]
pub(crate) enum AlgorithmDocument {
    ES256,
    ES384,
    EdDSA,
    RS256,
    PS256,
}

/// Which top-level claim means what.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "claims")]
pub(crate) struct ClaimsDocument {
    /// Default "sub".
    #[schemars(length(min = 1))]
    pub(crate) subject: Option<String>,
    /// Default "sid".
    #[schemars(length(min = 1))]
    pub(crate) session: Option<String>,
    /// Default "roles".
    #[schemars(length(min = 1))]
    pub(crate) roles: Option<String>,
    /// Default "dept".
    #[schemars(length(min = 1))]
    pub(crate) department: Option<String>,
    /// Default "device_id".
    #[schemars(length(min = 1))]
    pub(crate) device: Option<String>,
}

/// Session clock.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "session")]
pub(crate) struct SessionDocument {
    /// A session ends without activity for so long, "1s" to "30d"; default "15m". Activity are requests of routes and messages
    /// of types that say so (`activity`), and the opening of a socket; over all gateways, where `[shared]` is. A session that
    /// ended stays so (401, open sockets close with 4408), however many tokens are renewed for it. A session is what has one
    /// `sid`; without, one login (`auth_time`); without either, one token.
    pub(crate) idle: Option<DurationText>,
    /// A session ends so long after login (`auth_time`, else the token's `iat`), "1m" to "400d"; default "12h".
    /// Requests are refused then and sockets closed, however often tokens are renewed.
    pub(crate) lifetime: Option<DurationText>,
    /// Tolerated difference of clocks, "0s" to "5m"; default "30s".
    pub(crate) skew: Option<DurationText>,
    /// Sessions remembered at the same time, ended ones too until their tokens are gone; more are refused (503), so that none is
    /// forgotten. Default 1000000.
    #[schemars(range(min = 1_000, max = 100_000_000))]
    pub(crate) max_sessions: Option<u32>,
    /// How many sessions one subject may have at the same time, by role; default any number.
    #[serde(default)]
    pub(crate) limit: Vec<SessionLimitDocument>,
}

/// Sessions that one subject may have at the same time, over all gateways where `[shared]` is. Sessions of all its roles count;
/// of several limits that apply to a new session the smallest holds. Idle sessions count no more, and neither do tokens that
/// tell of no session (`sid`) or login (`auth_time`).
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "session-limit")]
pub(crate) struct SessionLimitDocument {
    /// For whom: a role as tokens name it; default everybody.
    #[schemars(length(min = 1))]
    pub(crate) role: Option<String>,
    /// So many sessions.
    #[schemars(range(min = 1, max = 1000))]
    pub(crate) max: u32,
    /// "reject" refuses the new session with 429, "replace-oldest" ends the oldest: its requests are refused (401), its sockets
    /// close with 4409; default "reject".
    #[serde(default)]
    pub(crate) at_limit: AtLimitDocument,
}

/// Proofs of possession (RFC 9449).
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "dpop")]
pub(crate) struct DpopDocument {
    /// Algorithms that a proof may be signed by; default ["ES256", "ES384", "EdDSA"].
    #[schemars(length(min = 1))]
    pub(crate) algorithms: Option<Vec<AlgorithmDocument>>,
    /// Age of a proof, "5s" to "10m"; default "1m". The clocks may differ by session.skew.
    pub(crate) max_age: Option<DurationText>,
    /// Whether a proof must hold a nonce that the gateway gave; default false.
    #[serde(default)]
    pub(crate) nonce: bool,
    /// How long a nonce is good, at least, "30s" to "1h"; default "5m".
    pub(crate) nonce_lifetime: Option<DurationText>,
    /// Proofs remembered against replay, in all; more are refused. Default 1000000.
    #[schemars(range(min = 1_000, max = 100_000_000))]
    pub(crate) max_proofs: Option<u32>,
    /// Proofs remembered of one subject; more are refused. Default 10000.
    #[schemars(range(min = 10, max = 1_000_000))]
    pub(crate) max_proofs_per_subject: Option<u32>,
}

/// Several gateways agree through Redis (6.2 or later): what one revokes ends on all. One gateway alone needs nothing of it.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "shared")]
pub(crate) struct SharedDocument {
    /// "redis://HOST:PORT", "rediss://HOST:PORT" (TLS) or "unix:/PATH": the one server, or sentinels or cluster nodes.
    #[schemars(length(min = 1, max = 64))]
    pub(crate) redis: Vec<String>,
    /// What the servers are; default "single".
    pub(crate) mode: Option<SharedModeDocument>,
    /// The master's name, for sentinels.
    #[schemars(length(min = 1))]
    pub(crate) service: Option<String>,
    /// PEM of the authorities that "rediss:" servers are trusted by: "file:PATH" or "env:NAME"; default the system's.
    pub(crate) ca: Option<String>,
    /// Redis user: "file:PATH" or "env:NAME"; default Redis' default user.
    pub(crate) username: Option<String>,
    /// Password: "file:PATH" or "env:NAME"; default none. Read anew with every reload.
    pub(crate) password: Option<String>,
    /// What all keys begin with: gateways agree that have it in common. Letters, digits, "-", "_", "."; default "sealgate".
    #[schemars(regex(pattern = r"^[A-Za-z0-9._-]{1,64}$"))]
    pub(crate) key_prefix: Option<String>,
    /// What a request waits for one answer of Redis, "5ms" to "2s"; default "50ms".
    pub(crate) deadline: Option<DurationText>,
    /// Without contact for so long, contact is lost, "2s" to "1h"; default "10s".
    pub(crate) contact_timeout: Option<DurationText>,
    /// Once contact is lost: "warn" goes on; "no-new-privileged" refuses what wants a role or step-up; "fail-closed" refuses
    /// whatever wants a token (503), and closes open WebSockets of sessions (1013). Default "warn".
    pub(crate) on_loss: Option<OnLossDocument>,
    /// When Redis does not answer about a proof of possession: "local" asks this gateway's memory alone, "deny" refuses
    /// (503). Default "local".
    pub(crate) dpop_on_loss: Option<DpopOnLossDocument>,
    /// When Redis does not answer about a ticket for a WebSocket: "local" takes it on the gateway that made it, "deny" nowhere
    /// (503). A ticket of another gateway is refused then in any case (503). Default "local".
    pub(crate) tickets_on_loss: Option<DpopOnLossDocument>,
}

/// A service that says over HTTP what is revoked, such as the backend that keeps accounts. The gateway follows it;
/// the protocol stands in ARCHITECTURE.md.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "revocation-source")]
pub(crate) struct RevocationSourceDocument {
    /// Unique name: lower-case letters, digits, "-". The place in its log is kept by it.
    pub(crate) name: NameText,
    /// Name of the upstream that it is reached by: over TLS (with a client certificate, where it wants one), a unix socket or loopback.
    pub(crate) upstream: String,
    /// Path without query.
    #[schemars(regex(pattern = r"^/[!-~]*$"))]
    pub(crate) path: String,
    /// Names of the issuers whose sessions it may end; default all.
    #[schemars(length(min = 1))]
    pub(crate) issuers: Option<Vec<String>>,
    /// Bearer token that it is asked with: "file:PATH" (read anew when the file changes) or "env:NAME"; default none.
    pub(crate) token: Option<String>,
    /// Without contact for so long, contact is lost, "4s" to "1h"; default "30s". It is asked to say something four times as often.
    pub(crate) contact_timeout: Option<DurationText>,
    /// Once contact is lost, and until there was any: as `shared.on_loss`. Default "warn".
    pub(crate) on_loss: Option<OnLossDocument>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "shared-mode")]
pub(crate) enum SharedModeDocument {
    Single,
    Sentinel,
    Cluster,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "on-loss")]
pub(crate) enum OnLossDocument {
    Warn,
    NoNewPrivileged,
    FailClosed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "dpop-on-loss")]
pub(crate) enum DpopOnLossDocument {
    Local,
    Deny,
}

/// A service behind the gateway.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "upstream")]
pub(crate) struct UpstreamDocument {
    /// Unique name: lower-case letters, digits, "-".
    pub(crate) name: NameText,
    /// "unix:/PATH", "tcp:HOST:PORT" or "tls:HOST:PORT".
    #[schemars(length(min = 1))]
    pub(crate) endpoints: Vec<String>,
    /// "round-robin" (default); "least-connections", to whom has the fewest requests and WebSockets under way; or
    /// "consistent-hash", by the subject, by the client's address where there is none.
    pub(crate) balance: Option<BalanceDocument>,
    /// For "tls:" endpoints.
    pub(crate) tls: Option<UpstreamTlsDocument>,
    /// To connect, TLS included, "10ms" to "5m"; default "2s".
    pub(crate) connect_timeout: Option<DurationText>,
    /// For each try: while nothing more of the request is taken, and from its end to the head of its response, "10ms" to "1h";
    /// default "30s".
    pub(crate) response_timeout: Option<DurationText>,
    /// For a pooled connection without a request, "1s" to "1h"; default "60s".
    pub(crate) idle_timeout: Option<DurationText>,
    /// Pooled idle connections per endpoint and core; default 256.
    #[schemars(range(min = 0, max = 100_000))]
    pub(crate) max_idle: Option<u32>,
    /// Active health checks; default none.
    pub(crate) health: Option<HealthDocument>,
    /// Passive health: an endpoint that fails again and again is left alone for a time; default none.
    pub(crate) breaker: Option<BreakerDocument>,
    /// Other endpoints that a request without an answer is tried on, if its method is idempotent (RFC 9110 §9.2.2) and its body at
    /// hand, or nothing of it was sent; default 1.
    #[schemars(range(min = 0, max = 5))]
    pub(crate) retries: Option<u32>,
    /// Most retries for 100 requests over 10 seconds; 10 are always allowed. Default 20.
    #[schemars(range(min = 0, max = 100))]
    pub(crate) retry_budget: Option<u32>,
}

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "balance")]
pub(crate) enum BalanceDocument {
    RoundRobin,
    LeastConnections,
    ConsistentHash,
}

/// TLS towards an upstream. Verification cannot be switched off.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "upstream-tls")]
pub(crate) struct UpstreamTlsDocument {
    /// Authority to trust, "file:PATH" or "env:NAME"; default the system's.
    pub(crate) ca: Option<String>,
    /// Name its certificate must hold; default the endpoint's host.
    #[schemars(length(min = 1))]
    pub(crate) server_name: Option<String>,
    /// Our certificate for mutual TLS, "file:PATH" or "env:NAME".
    pub(crate) client_certificate: Option<String>,
    /// Key of client_certificate, "file:PATH" or "env:NAME".
    pub(crate) client_key: Option<String>,
}

/// Active health checks.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "health")]
pub(crate) struct HealthDocument {
    /// Path that answers 2xx when healthy.
    pub(crate) path: String,
    /// Between two checks, "100ms" to "1h"; default "5s".
    pub(crate) interval: Option<DurationText>,
    /// For one check, "10ms" to "1m"; default "1s".
    pub(crate) timeout: Option<DurationText>,
    /// Successes in a row that make it healthy; default 1.
    #[schemars(range(min = 1, max = 100))]
    pub(crate) healthy: Option<u32>,
    /// Failures in a row that make it unhealthy; default 3.
    #[schemars(range(min = 1, max = 100))]
    pub(crate) unhealthy: Option<u32>,
}

/// Passive health: a circuit breaker for each endpoint.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "breaker")]
pub(crate) struct BreakerDocument {
    /// Failures in a row that open it: no connection, no answer in time, an answer that breaks off or is malformed; default 5.
    #[schemars(range(min = 1, max = 1000))]
    pub(crate) failures: Option<u32>,
    /// How long the endpoint is left alone, "100ms" to "1h"; default "10s".
    pub(crate) open_for: Option<DurationText>,
    /// Requests that try it at the same time afterwards: one answer closes it, one failure opens it again; default 1.
    #[schemars(range(min = 1, max = 100))]
    pub(crate) trials: Option<u32>,
    /// Whether the statuses 502, 503 and 504 are failures; default false.
    pub(crate) server_errors: Option<bool>,
}

/// How often, per what.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "rate")]
pub(crate) struct RateDocument {
    /// Unique name: lower-case letters, digits, "-".
    pub(crate) name: NameText,
    /// What is counted apart; several together make one key. What a request lacks (a token without a session, a header that
    /// did not come) counts by address. A client chooses its headers: let one of them alone be no limit.
    #[schemars(length(min = 1))]
    pub(crate) per: Vec<RateKeyDocument>,
    /// Name of the header, for "header".
    pub(crate) header: Option<String>,
    /// How much of an IPv6 address counts as one, in bits; default 64, which is what one subscriber has (RFC 6177).
    #[schemars(range(min = 16, max = 64))]
    pub(crate) ipv6_prefix: Option<u8>,
    /// How many in a period.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub(crate) quota: u32,
    /// "1ms" to "366d".
    pub(crate) period: DurationText,
    /// How many at once; default the quota.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub(crate) burst: Option<u32>,
    /// "local" counts at this gateway; "shared" over all gateways of [shared], at most 100000 in a second. Default "local". A request waits
    /// for Redis' answer, within shared.deadline; a message of a socket does not: the next one of the same socket waits in its place,
    /// and what was too much is owed by those that follow.
    #[serde(default)]
    pub(crate) scope: RateScopeDocument,
    /// When Redis does not answer in time: "allow" lets pass, "deny" refuses (503), "local" counts at this gateway. Default "local".
    pub(crate) on_error: Option<RateOnErrorDocument>,
    #[serde(default)]
    pub(crate) mode: ModeDocument,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "rate-scope")]
pub(crate) enum RateScopeDocument {
    #[default]
    Local,
    Shared,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "rate-on-error")]
pub(crate) enum RateOnErrorDocument {
    Allow,
    Deny,
    Local,
}

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "rate-key")]
pub(crate) enum RateKeyDocument {
    Address,
    Subject,
    Session,
    Route,
    Device,
    Issuer,
    Header,
    MessageType,
    Socket,
}

/// How many requests, or open WebSockets, of a key may be under way at the same time, at this gateway. One more is refused with 429.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "concurrency")]
pub(crate) struct ConcurrencyDocument {
    /// Unique name: lower-case letters, digits, "-".
    pub(crate) name: NameText,
    /// What is counted apart, as for a [[rate]]; not "message-type" and not "socket".
    #[schemars(length(min = 1))]
    pub(crate) per: Vec<RateKeyDocument>,
    /// Name of the header, for "header".
    pub(crate) header: Option<String>,
    /// How much of an IPv6 address counts as one, in bits; default 64.
    #[schemars(range(min = 16, max = 64))]
    pub(crate) ipv6_prefix: Option<u8>,
    /// How many at the same time. A request is under way until the last byte of its answer is gone, a WebSocket until it is closed.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub(crate) limit: u32,
    #[serde(default)]
    pub(crate) mode: ModeDocument,
}

/// When load is shed, before it ends in collapse. Near a limit, requests without a session are refused (503) and sessions are served; at it
/// every new request, WebSocket and connection is refused. WebSockets that are open go on. Without limits nothing is shed.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "overload")]
pub(crate) struct OverloadDocument {
    /// Memory of the process, "16MiB" to "999GiB"; default no limit.
    pub(crate) max_memory: Option<SizeText>,
    /// Memory of its control group (cgroup v2), in hundredths of what that may have; default no limit.
    #[schemars(range(min = 1, max = 100))]
    pub(crate) max_group_memory: Option<u8>,
    /// Requests under way; default no limit.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub(crate) max_in_flight: Option<u32>,
    /// New connections in a second; more are closed before TLS. Default no limit.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub(crate) max_accept_rate: Option<u32>,
    /// Where it counts as near, in hundredths of a limit; default 80.
    #[schemars(range(min = 1, max = 100))]
    pub(crate) shed_at: Option<u8>,
    /// Names of routes that are never refused for it, such as a health check; default none.
    #[serde(default)]
    pub(crate) exempt: Vec<String>,
}

/// A growing wait for who fails again and again: wrong passwords, tokens that do not count. Meanwhile the routes answer 429, and the
/// upstream is not asked.
///
/// Attempts whose outcome is not known yet count as failures, and so does one whose client left before the answer: parallel guesses
/// are no more than those one after the other.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "penalty")]
pub(crate) struct PenaltyDocument {
    /// Unique name: lower-case letters, digits, "-".
    pub(crate) name: NameText,
    /// What is counted apart: "address", "account" (see body.account; whatever its letters' case), or both as one. A success (2xx) forgives
    /// an account its failures, and never an address.
    #[schemars(length(min = 1))]
    pub(crate) per: Vec<PenaltyKeyDocument>,
    /// Names of routes whose answers count.
    #[serde(default)]
    pub(crate) routes: Vec<String>,
    /// Statuses of the upstream's answers that are failures; default [401].
    #[schemars(length(min = 1), inner(range(min = 400, max = 599)))]
    pub(crate) statuses: Option<Vec<u16>>,
    /// Whether tokens and proofs that the gateway refuses are failures, expired ones apart, on all routes and WebSockets that want one;
    /// default false. Only per "address".
    #[serde(default)]
    pub(crate) tokens: bool,
    /// The failure that is followed by a wait, the first time; default 5.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub(crate) after: Option<u32>,
    /// Without a failure for so long all are forgotten, "1s" to "30d"; default "15m". An address is also forgiven one failure in each
    /// `after`th part of it, because there may be many people behind it.
    pub(crate) window: Option<DurationText>,
    /// The first wait, "1s" to "1d"; default "30s". Each further failure doubles it.
    pub(crate) block: Option<DurationText>,
    /// The longest wait, block to "30d"; default "1h", or block where that is longer.
    pub(crate) max_block: Option<DurationText>,
    /// What is refused meanwhile: "requests" of the routes, or "connections" too, all new ones from the address (see `sealgate
    /// blocks`); default "requests". "connections" only per "address".
    #[serde(default)]
    pub(crate) refuse: PenaltyRefuseDocument,
    /// How much of an IPv6 address counts as one, in bits; default 64.
    #[schemars(range(min = 16, max = 64))]
    pub(crate) ipv6_prefix: Option<u8>,
    #[serde(default)]
    pub(crate) mode: ModeDocument,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "penalty-key")]
pub(crate) enum PenaltyKeyDocument {
    Address,
    Account,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "penalty-refuse")]
pub(crate) enum PenaltyRefuseDocument {
    #[default]
    Requests,
    Connections,
}

/// Addresses that may or may not connect. The longest prefix decides; of two equal ones the denying. Connections are closed before TLS;
/// requests on connections that are open already get 403.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "lists")]
pub(crate) struct ListsDocument {
    /// Lists of addresses that are refused, "file:PATH": an address or a prefix (CIDR) in each line, "#" begins a comment.
    #[serde(default)]
    pub(crate) deny: Vec<String>,
    /// Lists of addresses that are let in, and never blocked for a time.
    #[serde(default)]
    pub(crate) allow: Vec<String>,
    /// What becomes of an address that no list has: "allow" or "deny"; default "allow".
    #[serde(default)]
    pub(crate) default: ListsDefaultDocument,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "lists-default")]
pub(crate) enum ListsDefaultDocument {
    #[default]
    Allow,
    Deny,
}

/// End-to-end encrypted conversations, known by the kind in their ids: what is sent in one must be ciphertext.
///
/// A conversation of no listed kind, or that cannot be told, is refused with `plaintext-refused` (422, 4422) like
/// plaintext in an encrypted one.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ciphertext")]
pub(crate) struct CiphertextDocument {
    /// Unique name: lower-case letters, digits, "-".
    pub(crate) name: NameText,
    /// JSON pointer to the conversation's id, a string, such as "/conversation".
    pub(crate) pointer: String,
    /// What the ids of encrypted conversations begin with, such as "e2e:".
    #[schemars(length(min = 1))]
    pub(crate) prefix: String,
    /// What the ids of conversations begin with that may be readable; default none.
    #[serde(default)]
    pub(crate) readable: Vec<String>,
    /// JSON Schema in the bundle that an encrypted message has to match, such as "schemas/envelope.json". A member that
    /// it does not know is taken for plaintext.
    pub(crate) envelope: Option<String>,
    /// JSON pointers where an encrypted message may hold nothing; "*" is every item of an array.
    #[serde(default)]
    pub(crate) plaintext: Vec<String>,
    /// JSON pointers where an encrypted message has to hold ciphertext: base64 that does not decode to text. "*" is
    /// every item of an array, of at least one.
    #[serde(default)]
    pub(crate) payload: Vec<String>,
    /// Least length of a payload, decoded, "16B" to "16MiB"; default "16B".
    pub(crate) min_bytes: Option<SizeText>,
}

/// How large JSON may be. What is looked into is JSON as RFC 8259 has it and nothing else: UTF-8 without byte order mark,
/// no half surrogate pairs, no number beyond a double, no key twice in one object; anything else is refused with
/// `not-json` or `json-duplicate-key` (400, 1007), what is beyond these bounds with `json-too-deep`, `json-too-many`,
/// `json-too-long` or `json-number` (422, 1007).
///
/// A key that is left out is taken from the table around: a message's from its websocket's, those of websockets and
/// bodies from [json].
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "json")]
pub(crate) struct JsonDocument {
    /// Objects and arrays within each other; default 32.
    #[schemars(range(min = 1, max = 127))]
    pub(crate) max_depth: Option<u32>,
    /// Values in all: objects, arrays and what is in them; default 10000.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub(crate) max_values: Option<u32>,
    /// Members of one object; default 1000.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub(crate) max_members: Option<u32>,
    /// Items of one array; default 10000.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub(crate) max_items: Option<u32>,
    /// A key as it is written, escapes and all, "1B" to "64KiB"; default "256B".
    pub(crate) max_key: Option<SizeText>,
    /// A string as it is written, "1B" to "16MiB"; default "16MiB".
    pub(crate) max_string: Option<SizeText>,
    /// Digits of a number, before and behind the point; default 100.
    #[schemars(range(min = 1, max = 10_000))]
    pub(crate) max_digits: Option<u32>,
    /// Exponent of a number, without its sign; default 308.
    #[schemars(range(min = 0, max = 308))]
    pub(crate) max_exponent: Option<u32>,
}

#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "mode")]
pub(crate) enum ModeDocument {
    #[default]
    Enforce,
    Shadow,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "auth")]
pub(crate) enum AuthDocument {
    None,
    #[default]
    Required,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[schemars(rename = "method")]
pub(crate) enum MethodDocument {
    Get,
    Head,
    Post,
    Put,
    Patch,
    Delete,
    Options,
}

/// A resource that may be asked for.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "route")]
pub(crate) struct RouteDocument {
    /// Unique name over routes and websockets: lower-case letters, digits, "-".
    pub(crate) name: NameText,
    /// Host or list of hosts, exact, "*.example.com" or "*"; default "*".
    #[serde(default)]
    pub(crate) host: Hosts,
    /// "/v1/users/{user}" (one segment), "/v1/files/**" (all below).
    pub(crate) path: String,
    /// GET brings HEAD along.
    #[schemars(length(min = 1))]
    pub(crate) methods: Vec<MethodDocument>,
    /// Name of an upstream; required but with ticket or logout.
    pub(crate) upstream: Option<String>,
    /// The gateway itself answers, with a one-use ticket that opens a WebSocket of the same session and origin: the way for
    /// browsers, which cannot send a token there.
    pub(crate) ticket: Option<TicketDocument>,
    /// The gateway itself answers: an issuer tells here whom it has logged out (OpenID Connect Back-Channel Logout 1.0). A form
    /// is taken, POSTed and up to 16 KiB long, with auth "none"; rates are needed, since anybody may call.
    pub(crate) logout: Option<LogoutDocument>,
    /// Default "required".
    #[serde(default)]
    pub(crate) auth: AuthDocument,
    /// "dpop" takes tokens only that are bound to a key (RFC 9449), "mtls" those bound to a client certificate (RFC 8705); default "any".
    #[serde(default)]
    pub(crate) sender: SenderDocument,
    /// "required" refuses connections without a client certificate (403); default "any".
    #[serde(default)]
    pub(crate) client_certificate: CertificateDemandDocument,
    /// Names of which a client certificate must have one: "dns:NAME", "dns:*.NAME", "uri:URI", "uri:PREFIX/*", "email:ADDRESS",
    /// "ip:ADDRESS", "subject:TEXT" (the whole subject, as the audit shows it); default any. Wants client_certificate "required".
    #[serde(default)]
    pub(crate) client_names: Vec<String>,
    /// Roles of which one is needed; default none.
    #[serde(default)]
    pub(crate) roles: Vec<String>,
    /// A stronger or fresher login that is wanted (RFC 9470); default none.
    pub(crate) step_up: Option<StepUpDocument>,
    /// What a request does, in a word for authorization and audit: an action of authz.cedarschema, where there is one; then
    /// every rule that wants a token has to have it.
    pub(crate) action: Option<String>,
    /// What a request is about, for authorization; default the rule itself, `Route::"NAME"`. Wants action and authz.cedar.
    pub(crate) resource: Option<ResourceDocument>,
    /// Whether every use is recorded, allowed or refused, whatever [audit] says: who, what, by which path, about what, with what outcome;
    /// default false, and true where there is a reason. Path and resource are the peer's text, up to 512 and 256 bytes.
    pub(crate) audit: Option<bool>,
    /// Field in which a request must say why, such as "X-Access-Reason": one, of 1 to 512 bytes of UTF-8 without control characters;
    /// 403 otherwise. It is recorded, and goes upstream. Default none.
    pub(crate) reason: Option<String>,
    /// Names of rates that a request takes.
    #[serde(default)]
    pub(crate) rates: Vec<String>,
    /// How many a request takes of each of them; at most the burst of any. Default 1.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub(crate) cost: Option<u32>,
    /// Names of [[concurrency]] limits under which a request is counted.
    #[serde(default)]
    pub(crate) concurrency: Vec<String>,
    /// What a body may be; default: no body is taken.
    pub(crate) body: Option<BodyDocument>,
    /// What a query may be; default: no query is taken.
    pub(crate) query: Option<QueryDocument>,
    /// What the upstream may answer; default [answers].
    pub(crate) answer: Option<AnswersDocument>,
    /// Whether a request is the user's activity; default true.
    pub(crate) activity: Option<bool>,
    #[serde(default)]
    pub(crate) mode: ModeDocument,
}

/// One-use tickets for WebSockets.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ticket")]
pub(crate) struct TicketDocument {
    /// How long a ticket is good, "5s" to "5m"; default "30s".
    pub(crate) ttl: Option<DurationText>,
}

/// Logout tokens of an issuer (OpenID Connect Back-Channel Logout 1.0). They end the session that they name, or all sessions of
/// the subject that began before them.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "logout")]
pub(crate) struct LogoutDocument {
    /// Name of the issuer: its keys and algorithms count.
    pub(crate) issuer: String,
    /// Our client ids at the issuer: a token's `aud` must hold one of them, and no other; default the issuer's audience.
    #[schemars(length(min = 1))]
    pub(crate) audience: Option<Vec<String>>,
    /// How old a token may be, "10s" to "1h"; default "5m".
    pub(crate) max_age: Option<DurationText>,
    /// Whether a token must be of the type "logout+jwt"; otherwise "JWT" and no type will do. Default false.
    #[serde(default)]
    pub(crate) strict_type: bool,
}

/// A stronger or fresher login (RFC 9470). At least one of its keys.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "step-up")]
pub(crate) struct StepUpDocument {
    /// Authentication context classes (`acr`), of which one is needed, most wanted first; default any.
    #[serde(default)]
    pub(crate) acr: Vec<String>,
    /// Authentication methods (`amr`, RFC 8176), all of which are needed; default none.
    #[serde(default)]
    pub(crate) amr: Vec<String>,
    /// How long ago the login (`auth_time`) may be, "10s" to "30d"; default any time.
    pub(crate) max_age: Option<DurationText>,
}

/// What a request or message is about. What cannot be found, is empty, longer than 256 bytes, no text, or stands twice in a
/// query is a denial (`resource-missing`, 422).
///
/// Where it stands: "path:NAME" for a `{NAME}` of the rule's path, "query:NAME", "body:/POINTER" for a body that is looked
/// into, "message:/POINTER" for a message; "is:TEXT" is the same for all.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "resource")]
pub(crate) struct ResourceDocument {
    /// Entity type of authz.cedarschema, such as "Room".
    #[serde(rename = "type")]
    #[schemars(length(min = 1))]
    pub(crate) kind: String,
    /// Where its id stands; default "is:" and the rule's name, or the message's type.
    pub(crate) id: Option<String>,
    /// Where the department that it belongs to stands: `resource.department`; default it has none.
    pub(crate) department: Option<String>,
    /// Where the subject that it belongs to stands: `resource.owner`, a `User`; default it has none.
    pub(crate) owner: Option<String>,
}

/// What a role wants, wherever a token with it is used.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "role")]
pub(crate) struct RoleDocument {
    /// The role, as tokens name it; unique.
    #[schemars(length(min = 1))]
    pub(crate) name: String,
    /// Authentication methods (`amr`, RFC 8176), of which one is needed, such as ["otp", "hwk", "mfa"]; default none is.
    #[serde(default)]
    pub(crate) require_amr: Vec<String>,
    /// Roles that nobody may have together with this one: a token with both is refused everywhere (`roles-conflict`, 403).
    /// Default none.
    #[serde(default)]
    pub(crate) excludes: Vec<String>,
}

/// What a body may be.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "body")]
pub(crate) struct BodyDocument {
    /// Longest body, "1B" to "16MiB" where it is looked into as JSON, to "64GiB" otherwise.
    pub(crate) max_bytes: SizeText,
    /// Media types; default ["application/json"] where the body is looked into as JSON, any otherwise.
    #[schemars(length(min = 1))]
    pub(crate) content_types: Option<Vec<String>>,
    /// Content codings (RFC 9110 §8.4) that a body may have, such as ["gzip"], one at a time. Others are refused with 415, and
    /// Accept-Encoding says which are taken. Default none; never for a body that is looked into, as JSON or as a form.
    #[serde(default)]
    pub(crate) content_codings: Vec<String>,
    /// The body has to be a form with files, multipart/form-data (RFC 7578), of these parts.
    pub(crate) form: Option<FormDocument>,
    /// JSON Schema in the bundle, such as "schemas/message.json". The body is held until it is judged.
    pub(crate) schema: Option<String>,
    /// Name of a [[ciphertext]] that the body has to keep, before its schema. The body is held for it too.
    pub(crate) ciphertext: Option<String>,
    /// JSON pointer to the account that a login is for, a string, such as "/username". The body is held for it too.
    pub(crate) account: Option<String>,
    /// The body has to be JSON within these bounds ({} for those of [json]), as with a schema or ciphertext.
    pub(crate) json: Option<JsonDocument>,
}

/// A form with files, multipart/form-data (RFC 7578), read in the one way that no reader reads otherwise: anything else is refused with
/// `not-a-form` (400). Parts that are not listed are refused (`form-parts`, 422), and so are contents that are not of their type
/// (`file-type`, 415) and names that no file should have (`file-name`, 422): with separators of paths, with control characters,
/// beginning with a dot, ending with a dot or a blank.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "form")]
pub(crate) struct FormDocument {
    /// Whether the upstream gets nothing of a form before all of it was judged. Otherwise it is judged while it flows: the upstream
    /// gets the beginning of a form that is refused further on, never the end, and must not act before that. Default true; then
    /// max_bytes of the body is at most "16MiB".
    pub(crate) hold: Option<bool>,
    /// Parts in all; default 16.
    #[schemars(range(min = 1, max = 1000))]
    pub(crate) max_parts: Option<u32>,
    /// Header fields of one part, "64B" to "16KiB"; default "1KiB".
    pub(crate) max_head: Option<SizeText>,
    /// The parts that there may be.
    #[schemars(length(min = 1, max = 100))]
    pub(crate) part: Vec<PartDocument>,
}

/// Parts of one name.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "part")]
pub(crate) struct PartDocument {
    /// The field's name, exactly: letters, digits, "-", "_", ".", "[" and "]".
    #[schemars(regex(pattern = r"^[A-Za-z0-9._\[\]-]{1,40}$"))]
    pub(crate) name: String,
    /// Whether it is a file, which has to have a name; what is none must not have one. Default false.
    #[serde(default)]
    pub(crate) file: bool,
    /// Types that it may claim to have, such as ["image/png", "image/jpeg"]; its content has to be of the type that it claims.
    /// Taken are types whose content gives them away (pictures, sounds, films, documents and archives of common kinds), text/plain,
    /// text/csv, text/markdown, text/calendar, text/vcard (UTF-8 without control characters), application/json, and
    /// application/octet-stream, which says nothing and is not looked into. Required for files; default ["text/plain"] otherwise.
    #[schemars(length(min = 1))]
    pub(crate) types: Option<Vec<String>>,
    /// Extensions that a file's name may have, without the dot; default those of the type that it claims. A name without any passes.
    #[schemars(length(min = 1))]
    pub(crate) extensions: Option<Vec<String>>,
    /// Longest content, "1B" to "64GiB"; to "1MiB" where application/json is a type.
    pub(crate) max_bytes: SizeText,
    /// How many there have to be; default 0.
    #[schemars(range(min = 0, max = 1000))]
    pub(crate) min: Option<u32>,
    /// How many there may be; default 1, or min where that is more.
    #[schemars(range(min = 1, max = 1000))]
    pub(crate) max: Option<u32>,
    /// JSON Schema in the bundle, for types = ["application/json"]. Bounds are those of [json].
    pub(crate) schema: Option<String>,
}

/// What upstreams may answer. What a route leaves out is as in [answers].
#[derive(Debug, Clone, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "answers")]
pub(crate) struct AnswersDocument {
    /// Media types of answers with a body; another one, or none, is answered by 502 `answer-not-allowed` instead. Default any.
    #[schemars(length(min = 1))]
    pub(crate) content_types: Option<Vec<String>>,
    /// Fields that upstreams may send, such as ["Set-Cookie"], beside those that say what an answer is, how long it counts and how
    /// it may be asked for again; others are removed. Default any but those of [headers].
    pub(crate) headers: Option<Vec<String>>,
    /// What becomes of answers that tell of a fault (500 to 599), which may show what stands behind the gateway, such as a stack trace:
    /// "pass" or "replace", which sends the status and Retry-After with a problem document. Default "pass".
    pub(crate) errors: Option<AnswerErrorsDocument>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "answer-errors")]
pub(crate) enum AnswerErrorsDocument {
    Pass,
    Replace,
}

/// What a query may be.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "query")]
pub(crate) struct QueryDocument {
    /// Longest query, "1B" to "8KiB"; default "2KiB".
    pub(crate) max_bytes: Option<SizeText>,
    /// JSON Schema in the bundle for an object of strings (arrays of strings where a name stands twice).
    pub(crate) schema: Option<String>,
}

/// A WebSocket that may be opened, and the messages that may pass in it.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "websocket")]
pub(crate) struct WebsocketDocument {
    /// Unique name over routes and websockets: lower-case letters, digits, "-".
    pub(crate) name: NameText,
    /// Host or list of hosts, exact, "*.example.com" or "*"; default "*".
    #[serde(default)]
    pub(crate) host: Hosts,
    /// "/v1/stream", "/v1/rooms/{room}" (one segment), "/v1/rooms/**" (all below).
    pub(crate) path: String,
    /// Name of an upstream.
    pub(crate) upstream: String,
    /// Default "required".
    #[serde(default)]
    pub(crate) auth: AuthDocument,
    /// "dpop" takes tokens only that are bound to a key (RFC 9449), "mtls" those bound to a client certificate (RFC 8705); default "any".
    #[serde(default)]
    pub(crate) sender: SenderDocument,
    /// "required" refuses connections without a client certificate (403); default "any".
    #[serde(default)]
    pub(crate) client_certificate: CertificateDemandDocument,
    /// Names of which a client certificate must have one: "dns:NAME", "dns:*.NAME", "uri:URI", "uri:PREFIX/*", "email:ADDRESS",
    /// "ip:ADDRESS", "subject:TEXT" (the whole subject, as the audit shows it); default any. Wants client_certificate "required".
    #[serde(default)]
    pub(crate) client_names: Vec<String>,
    /// Roles of which one is needed; default none.
    #[serde(default)]
    pub(crate) roles: Vec<String>,
    /// A stronger or fresher login that is wanted (RFC 9470); default none.
    pub(crate) step_up: Option<StepUpDocument>,
    /// What opening it does, in a word for authorization and audit: an action of authz.cedarschema, where there is one; then
    /// every rule that wants a token has to have it.
    pub(crate) action: Option<String>,
    /// What it is about, for authorization; default the rule itself, `Route::"NAME"`. Wants action and authz.cedar.
    pub(crate) resource: Option<ResourceDocument>,
    /// Whether every opening is recorded, allowed or refused, whatever [audit] says; default false.
    pub(crate) audit: Option<bool>,
    /// Names of rates that opening it takes.
    #[serde(default)]
    pub(crate) rates: Vec<String>,
    /// How many opening it takes of each of them; at most the burst of any. Default 1.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub(crate) cost: Option<u32>,
    /// What a query may be; default: no query is taken.
    pub(crate) query: Option<QueryDocument>,
    #[serde(default)]
    pub(crate) mode: ModeDocument,
    /// Whether it may be opened over HTTP/2 too (RFC 8441); default true. Browsers do not fall back to HTTP/1.1: once
    /// any WebSocket may, one that may not fails on their HTTP/2 connections.
    pub(crate) http2: Option<bool>,
    /// Pages that may connect: "https://chat.example", "https://*.chat.example", "self" (the request's own host),
    /// "null", "*" (any); default none.
    #[serde(default)]
    pub(crate) origins: Vec<String>,
    /// Whether clients that send no Origin (no browsers) are refused; default false.
    #[serde(default)]
    pub(crate) require_origin: bool,
    /// Subprotocols that may be agreed on; default none.
    #[serde(default)]
    pub(crate) subprotocols: Vec<String>,
    /// Whether one of them must be offered; default true if any is listed.
    pub(crate) require_subprotocol: Option<bool>,
    /// Payload of a frame, "125B" to "16MiB"; default "64KiB".
    pub(crate) max_frame: Option<SizeText>,
    /// Payload of a message over all its fragments, "1B" to "16MiB"; default "64KiB".
    pub(crate) max_message: Option<SizeText>,
    /// Fragments of a message; default 64.
    #[schemars(range(min = 1, max = 100_000))]
    pub(crate) max_fragments: Option<u32>,
    /// What becomes of a client's offer of permessage-deflate (RFC 7692): "off" removes it, "terminate" accepts it,
    /// judges messages inflated and forwards them plain; default "off". Secrets and what strangers write should not
    /// share a compressed message.
    #[serde(default)]
    pub(crate) compression: CompressionDocument,
    /// Inflated bytes for each compressed one, where a message inflates beyond 64 KiB; default 100. Wants
    /// compression "terminate".
    #[schemars(range(min = 1, max = 1032))]
    pub(crate) max_inflate_ratio: Option<u32>,
    /// Control frames per second; default 10.
    #[schemars(range(min = 1, max = 10_000))]
    pub(crate) control_per_second: Option<u32>,
    /// Without activity for so long the socket closes, "1s" to "30d"; default never.
    pub(crate) idle: Option<DurationText>,
    /// Between two pings to a silent client, "1s" to "1h"; default "30s".
    pub(crate) ping_interval: Option<DurationText>,
    /// For the pong, "1s" to "1h"; default "20s".
    pub(crate) pong_timeout: Option<DurationText>,
    /// For a peer that does not read, "100ms" to "1h"; default "20s".
    pub(crate) write_timeout: Option<DurationText>,
    /// Held for a slow peer per direction, "1KiB" to "64MiB"; default "256KiB".
    pub(crate) buffer: Option<SizeText>,
    /// "json" looks into messages of each direction for which one is listed, "none" into none; default "json" if
    /// any message is listed.
    pub(crate) inspect: Option<InspectDocument>,
    /// Kinds of messages taken; default ["text"] with inspect "json", both without.
    #[schemars(length(min = 1))]
    pub(crate) kinds: Option<Vec<KindDocument>>,
    /// Bounds of messages that are looked into; default [json].
    pub(crate) json: Option<JsonDocument>,
    /// JSON pointer to a message's type; default "/type".
    pub(crate) type_pointer: Option<String>,
    /// What becomes of a message that is not JSON or of no listed type: "close" or "answer"; default "close".
    #[serde(default)]
    pub(crate) unknown: OnRefusalDocument,
    /// Whether a client message that is not looked into is the user's activity; default true.
    pub(crate) activity: Option<bool>,
    /// Names of rates that each client message takes.
    #[serde(default)]
    pub(crate) message_rates: Vec<String>,
    #[serde(default)]
    pub(crate) message: Vec<MessageDocument>,
    /// How a client may renew its token inside the open socket; default not at all.
    pub(crate) renew: Option<RenewDocument>,
    /// Names of [[concurrency]] limits under which it is counted while it is open.
    #[serde(default)]
    pub(crate) concurrency: Vec<String>,
    /// How many may be open at the same time; default no limit.
    pub(crate) max_open: Option<MaxOpenDocument>,
}

/// Renewal of the token inside an open socket, by a message of its own that the upstream never sees.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "renew")]
pub(crate) struct RenewDocument {
    /// Value at type_pointer; no message to the upstream can have it.
    #[serde(rename = "type")]
    #[schemars(length(min = 1, max = 64))]
    pub(crate) name: String,
    /// JSON pointer to the new token; default "/token".
    pub(crate) token_pointer: Option<String>,
    /// Between two renewals, "100ms" to "1h"; default "5s".
    pub(crate) min_interval: Option<DurationText>,
    /// What a token that is not acceptable leads to: "answer" (the old one counts until it expires) or "close";
    /// default "answer". A revoked token, another session or other rights always close.
    pub(crate) on_refusal: Option<OnRefusalDocument>,
}

/// Sockets of a rule that may be open at the same time, over all cores of the gateway.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "max-open")]
pub(crate) struct MaxOpenDocument {
    /// Of one session; default no limit.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub(crate) session: Option<u32>,
    /// Of one subject; default no limit.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub(crate) subject: Option<u32>,
    /// From one address; default no limit.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub(crate) address: Option<u32>,
    /// "reject" refuses the new socket with 429, "replace-oldest" closes the oldest one of the session or subject with
    /// 4409; default "reject". What is too many for an address is always rejected: its sockets may be different people's.
    #[serde(default)]
    pub(crate) at_limit: AtLimitDocument,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "at-limit")]
pub(crate) enum AtLimitDocument {
    #[default]
    Reject,
    ReplaceOldest,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "compression")]
pub(crate) enum CompressionDocument {
    #[default]
    Off,
    Terminate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "inspect")]
pub(crate) enum InspectDocument {
    Json,
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "kind")]
pub(crate) enum KindDocument {
    Text,
    Binary,
}

/// A type of message.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "message")]
pub(crate) struct MessageDocument {
    /// Value at type_pointer.
    #[serde(rename = "type")]
    #[schemars(length(min = 1))]
    pub(crate) name: String,
    pub(crate) direction: DirectionDocument,
    /// JSON Schema in the bundle, such as "schemas/ack.json"; default any JSON.
    pub(crate) schema: Option<String>,
    /// Name of a [[ciphertext]] that the message has to keep, before its schema.
    pub(crate) ciphertext: Option<String>,
    /// Bounds no wider than the websocket's; default those.
    pub(crate) json: Option<JsonDocument>,
    /// What the message does, in a word for authorization and audit: an action of authz.cedarschema, where there is one. A
    /// message without is covered by the action of its socket.
    pub(crate) action: Option<String>,
    /// What the message is about, for authorization; default the rule itself, `Route::"NAME"`. Wants action and authz.cedar.
    pub(crate) resource: Option<ResourceDocument>,
    /// Whether every one is recorded, allowed or refused, as for a route; default false, and true where there is a reason. Only for
    /// messages to the upstream.
    pub(crate) audit: Option<bool>,
    /// JSON pointer to where it must say why, as for a route; 4403 otherwise. Only for messages to the upstream. Default none.
    pub(crate) reason: Option<String>,
    /// Names of rates that it takes, beside message_rates.
    #[serde(default)]
    pub(crate) rates: Vec<String>,
    /// How many it takes of each of all these; at most the burst of any. Default 1.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub(crate) cost: Option<u32>,
    /// A stronger or fresher login that is wanted (RFC 9470); 4412 otherwise. Only for messages to the upstream.
    pub(crate) step_up: Option<StepUpDocument>,
    /// Whether it is the user's activity; default false. Only for messages to the upstream.
    #[serde(default)]
    pub(crate) activity: bool,
    /// Default "close".
    #[serde(default)]
    pub(crate) on_refusal: OnRefusalDocument,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "direction")]
pub(crate) enum DirectionDocument {
    ToUpstream,
    ToClient,
    Both,
}

#[derive(Debug, Clone, Copy, Default, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "on-refusal")]
pub(crate) enum OnRefusalDocument {
    #[default]
    Close,
    Answer,
}

/// What gets an audit record.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "audit")]
pub(crate) struct AuditDocument {
    /// Default "refused".
    pub(crate) requests: Option<AuditRequestsDocument>,
}

#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "audit-requests")]
pub(crate) enum AuditRequestsDocument {
    All,
    Refused,
    None,
}

/// A name that is a metric label too.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct NameText(pub(crate) String);

impl JsonSchema for NameText {
    fn schema_name() -> Cow<'static, str> {
        "name".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^[a-z][a-z0-9-]{0,63}$",
            "description": "a name of at most 64 lower-case letters, digits and \"-\", a letter first"
        })
    }
}

/// One host or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Hosts {
    One(String),
    Several(Vec<String>),
}

impl Default for Hosts {
    fn default() -> Self {
        Self::One("*".into())
    }
}

impl JsonSchema for Hosts {
    fn schema_name() -> Cow<'static, str> {
        "hosts".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({
            "anyOf": [
                { "type": "string" },
                { "type": "array", "items": { "type": "string" }, "minItems": 1 }
            ],
            "description": "a host or a list of hosts"
        })
    }
}
