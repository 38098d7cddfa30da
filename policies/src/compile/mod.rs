//! Document → Policy: names resolved, ranges checked, matchers and schemas built. Nothing is live until all is.

mod acme;
mod authz;
mod body;
mod ciphertext;
mod client;
mod json;
mod limits;
mod rules;
mod schemas;
mod shared;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use ipnet::IpNet;
use ring::digest;

use crate::authz::{Authz, SharedJudges};
use crate::bundle::Bundle;
use crate::compile::authz::AuthzState;
use crate::compile::rules::Known;
use crate::compile::schemas::SchemaFiles;
use crate::document::{
    AlgorithmDocument, AtLimitDocument, AuditRequestsDocument, BalanceDocument, ConnectionsDocument,
    Document, DpopDocument, GroupDocument, HeadersDocument, HealthDocument, IssuerDocument, ModeDocument,
    NameText, RateDocument, RateKeyDocument, RateOnErrorDocument, RateScopeDocument, ReferrerPolicyDocument,
    RoleDocument, SenderDocument, SessionDocument, SessionLimitDocument, TlsDocument, TlsVersionDocument,
    UnknownNameDocument, UpstreamDocument, UpstreamTlsDocument,
};
use crate::errors::{PolicyError, PolicyErrors};
use crate::json::Limits;
use crate::policy::{
    Algorithm, AuditPolicy, AuditRequests, Balance, Breaker, ClaimNames, ConnectionPolicy, DpopPolicy,
    Endpoint, Group, HeaderPolicy, Health, Issuer, JwksSource, Mode, OnRateError, Policy, Rate, RateKey,
    Sender, SessionLimit, SessionPolicy, Source, TlsPolicy, TlsVersions, Upstream, UpstreamTls,
};
use crate::routes::{Host, Routes};
use crate::rule::{AtLimit, RoleRule};
use crate::source::{self, Sources};
use crate::units::{self, DurationText, SizeText};

const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);
const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
const GIB: u64 = 1024 * MIB;

impl Policy {
    /// Compiles a bundle: `policy.toml` and any `policy.d/*.toml` (in the order of their names), with all schemas.
    ///
    /// Arrays of tables concatenate; a table or a name defined twice is an error. `variables` override the
    /// defaults under `[variables]`.
    ///
    /// # Errors
    /// Every error, by file, line, column and key. Syntax errors and bad variables hide the rest; a required key that
    /// is missing or wrong hides errors of meaning; nothing else hides anything.
    pub fn compile(bundle: &Bundle, variables: &BTreeMap<String, String>) -> Result<Self, PolicyErrors> {
        compile(bundle, variables).map_err(|mut errors| {
            errors.sort_by(|a, b| {
                // `policy.toml` before `policy.d/…` before `schemas/…`.
                let order = |error: &PolicyError| (error.file != "policy.toml", error.file.clone());
                (order(a), a.line, a.column).cmp(&(order(b), b.line, b.column))
            });
            errors.dedup();
            PolicyErrors(errors)
        })
    }
}

fn compile(bundle: &Bundle, variables: &BTreeMap<String, String>) -> Result<Policy, Vec<PolicyError>> {
    let (schemas, mut errors) = SchemaFiles::read(bundle);
    let (authz, more) = Authz::read(bundle);
    errors.extend(more);
    let mut sources = match source::load(bundle, variables) {
        Ok(sources) => sources,
        Err(more) => {
            errors.extend(more);
            return Err(errors);
        }
    };
    errors.extend(sources.check_structure());
    // What the structure check took out may have been needed; then its errors must do.
    let document: Document = match serde_json::from_value(sources.value.clone()) {
        Ok(document) => document,
        Err(error) => {
            if errors.is_empty() {
                errors.push(sources.error("", format!("internal: schema and parser differ: {error}")));
            }
            return Err(errors);
        }
    };
    let mut compiler =
        Compiler { sources: &sources, bundle, schemas: &schemas, errors, rule_names: HashMap::new() };
    let authz = AuthzState::of(bundle, authz);
    let policy = compiler.policy(&document, authz, hash(bundle, variables));
    if compiler.errors.is_empty() { Ok(policy) } else { Err(compiler.errors) }
}

/// SHA-256 over names and contents, each with its length before it, so that no two bundles look alike.
fn hash(bundle: &Bundle, variables: &BTreeMap<String, String>) -> String {
    let mut context = digest::Context::new(&digest::SHA256);
    let mut add = |bytes: &[u8]| {
        context.update(&u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(bytes);
    };
    for (name, bytes) in &bundle.files {
        add(name.as_bytes());
        add(bytes);
    }
    add(b"variables");
    for (name, value) in variables {
        add(name.as_bytes());
        add(value.as_bytes());
    }
    context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Collects errors by JSON pointer while it builds. Where something is wrong it goes on with something harmless:
/// with any error nothing of it is used.
struct Compiler<'a> {
    sources: &'a Sources<'a>,
    bundle: &'a Bundle,
    schemas: &'a SchemaFiles,
    errors: Vec<PolicyError>,
    /// Names of routes and websockets, with the pointer of the first.
    rule_names: HashMap<String, String>,
}

impl Compiler<'_> {
    fn policy(&mut self, document: &Document, authz: AuthzState, hash: String) -> Policy {
        let session = self.session(&document.session);
        let mut names = HashMap::new();
        let acme = each(&document.acme, "/acme", |at, acme| self.acme(at, acme, &mut names));
        let certificates = each(&document.certificate, "/certificate", |at, certificate| {
            self.certificate(at, certificate, &acme)
        });
        let mut names = HashMap::new();
        let issuers =
            each(&document.issuer, "/issuer", |at, issuer| self.issuer(at, issuer, &session, &mut names));
        let mut names = HashMap::new();
        let upstreams =
            each(&document.upstream, "/upstream", |at, upstream| self.upstream(at, upstream, &mut names));
        let mut names = HashMap::new();
        let rates = each(&document.rate, "/rate", |at, rate| {
            self.rate(at, rate, &mut names, document.shared.is_some())
        });
        let mut names = HashMap::new();
        let concurrency =
            each(&document.concurrency, "/concurrency", |at, limit| self.concurrency(at, limit, &mut names));
        let mut names = HashMap::new();
        let penalties =
            each(&document.penalty, "/penalty", |at, penalty| self.penalty(at, penalty, &mut names));
        let mut names = HashMap::new();
        let ciphertexts =
            each(&document.ciphertext, "/ciphertext", |at, rule| self.ciphertext(at, rule, &mut names));

        let role_rules = self.role_rules(&document.role);
        self.check_answers("/answers", &document.answers);
        let mut known = Known {
            upstreams: &upstreams,
            issuers: &issuers,
            rates: &rates,
            role_rules,
            authz,
            judges: SharedJudges::default(),
            penalties: &document.penalty,
            concurrency: &concurrency,
            exempt: &document.overload.exempt,
            ciphertexts: &ciphertexts,
            json: self.json("/json", &document.json, Limits::DEFAULT),
            answers: &document.answers,
            rules: Vec::new(),
            any_auth: false,
        };
        let mut routes = Routes::default();
        for (index, route) in document.route.iter().enumerate() {
            self.route(format!("/route/{index}"), route, &mut known, &mut routes);
        }
        for (index, websocket) in document.websocket.iter().enumerate() {
            self.websocket(format!("/websocket/{index}"), websocket, &mut known, &mut routes);
        }
        let names: Vec<_> = document.route.iter().map(|route| route.name.0.as_str()).collect();
        self.check_penalties(&document.penalty, &names);
        let overload = self.overload(&document.overload, &names);
        if known.any_auth && issuers.is_empty() {
            self.error("/issuer", "a rule wants a token, and there is no [[issuer]] whose tokens count");
        }
        let Known { rules, .. } = known;
        let http2_websockets =
            rules.iter().filter_map(|rule| rule.tunnel.as_ref()).any(|tunnel| tunnel.http2);
        let demanded = issuers.iter().any(|issuer| issuer.sender == Sender::Dpop)
            || rules.iter().any(|rule| rule.sender == Sender::Dpop);
        let dpop = self.dpop(&document.dpop, &session, demanded);
        let shared = document.shared.as_ref().map(|shared| self.shared(shared));
        let mut names = HashMap::new();
        let revocation_sources = each(&document.revocation_source, "/revocation_source", |at, source| {
            self.revocation_source(at, source, &issuers, &upstreams, &mut names)
        });
        let tls = self.tls(&document.tls);
        self.wanted_certificates(&tls.client, &issuers, &rules);
        Policy {
            hash,
            tls,
            connections: self.connections(&document.connections),
            headers: self.headers(&document.headers),
            certificates,
            acme,
            issuers,
            session,
            dpop,
            shared,
            revocation_sources,
            audit: AuditPolicy {
                requests: match document.audit.requests {
                    Some(AuditRequestsDocument::All) => AuditRequests::All,
                    Some(AuditRequestsDocument::Refused) | None => AuditRequests::Refused,
                    Some(AuditRequestsDocument::None) => AuditRequests::None,
                },
            },
            upstreams,
            rates,
            concurrency,
            overload,
            penalties,
            lists: self.lists(&document.lists),
            rules,
            routes,
            http2_websockets,
        }
    }

    fn error(&mut self, pointer: &str, message: impl Into<String>) {
        self.errors.push(self.sources.error(pointer, message));
    }

    fn networks(&mut self, pointer: &str, texts: &[String]) -> Vec<IpNet> {
        let mut networks = Vec::with_capacity(texts.len());
        for (index, text) in texts.iter().enumerate() {
            match units::parse_network(text) {
                Some(network) => networks.push(network),
                None => self.error(
                    &format!("{pointer}/{index}"),
                    format!("expected an address or a prefix such as \"192.0.2.0/24\", found \"{text}\""),
                ),
            }
        }
        networks
    }

    fn duration(
        &mut self,
        pointer: &str,
        text: Option<DurationText>,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        let Some(DurationText(duration)) = text else {
            return default;
        };
        if !range.contains(&duration) {
            let (low, high) = (DurationText(*range.start()), DurationText(*range.end()));
            self.error(pointer, format!("expected \"{low}\" to \"{high}\""));
        }
        duration
    }

    fn size(
        &mut self,
        pointer: &str,
        text: Option<SizeText>,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> u64 {
        let Some(SizeText(size)) = text else {
            return default;
        };
        if !range.contains(&size) {
            let (low, high) = (SizeText(*range.start()), SizeText(*range.end()));
            self.error(pointer, format!("expected \"{low}\" to \"{high}\""));
        }
        size
    }

    fn size32(
        &mut self,
        pointer: &str,
        text: Option<SizeText>,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> u32 {
        // Saturates only above the range, and then there is an error.
        u32::try_from(self.size(pointer, text, default, range)).unwrap_or(u32::MAX)
    }

    fn unique(&mut self, at: &str, name: &NameText, names: &mut HashMap<String, String>) -> Arc<str> {
        let pointer = format!("{at}/name");
        if let Some(first) = names.insert(name.0.clone(), pointer.clone()) {
            let first = self.sources.error(&first, "");
            self.error(
                &pointer,
                format!("`{}` is defined twice; first at {}:{}", name.0, first.file, first.line),
            );
        }
        name.0.as_str().into()
    }

    fn tls(&mut self, document: &TlsDocument) -> TlsPolicy {
        let versions = match document.versions.as_deref() {
            None => TlsVersions::Tls12And13,
            Some(list) if !list.contains(&TlsVersionDocument::Tls13) => {
                self.error("/tls/versions", "\"1.3\" is always offered; expected it in the list");
                TlsVersions::Tls13
            }
            Some(list) if list.contains(&TlsVersionDocument::Tls12) => TlsVersions::Tls12And13,
            Some(_) => TlsVersions::Tls13,
        };
        let all = [
            GroupDocument::X25519MlKem768,
            GroupDocument::X25519,
            GroupDocument::Secp256r1,
            GroupDocument::Secp384r1,
        ];
        let listed = document.groups.as_deref().unwrap_or(&all);
        let mut groups = Vec::new();
        for (index, group) in listed.iter().enumerate() {
            let group = match group {
                GroupDocument::X25519MlKem768 => Group::X25519MlKem768,
                GroupDocument::X25519 => Group::X25519,
                GroupDocument::Secp256r1 => Group::Secp256r1,
                GroupDocument::Secp384r1 => Group::Secp384r1,
            };
            if groups.contains(&group) {
                self.error(&format!("/tls/groups/{index}"), "the group stands twice");
            }
            groups.push(group);
        }
        // The hybrid exists in TLS 1.3 only; alone it would leave TLS 1.2 without key exchange.
        if versions == TlsVersions::Tls12And13 && groups == [Group::X25519MlKem768] {
            self.error("/tls/groups", "TLS 1.2 needs one of \"X25519\", \"P-256\", \"P-384\" too");
        }
        let hsts = document.hsts.as_ref().map(|hsts| {
            let age =
                self.duration("/tls/hsts/max_age", Some(hsts.max_age), DAY, Duration::ZERO..=DAY * 3_660);
            if hsts.preload && (!hsts.include_subdomains || age < DAY * 365) {
                let message = "preload wants include_subdomains and a max_age of at least \"365d\"";
                self.error("/tls/hsts/preload", message);
            }
            let subdomains = if hsts.include_subdomains { "; includeSubDomains" } else { "" };
            let preload = if hsts.preload { "; preload" } else { "" };
            format!("max-age={}{subdomains}{preload}", age.as_secs())
        });
        let client = self.client_zones(&document.client);
        let ticket_lifetime =
            self.duration("/tls/ticket_lifetime", document.ticket_lifetime, HOUR * 6, SECOND..=DAY * 7);
        TlsPolicy {
            versions,
            groups,
            hsts,
            tickets: document.tickets.unwrap_or(true),
            ticket_lifetime,
            refuse_unknown_names: document.unknown_name == Some(UnknownNameDocument::Refuse),
            client,
        }
    }

    fn headers(&mut self, document: &HeadersDocument) -> HeaderPolicy {
        use ReferrerPolicyDocument as Referrer;
        let referrer_policy = HeaderValue::from_static(match document.referrer_policy {
            None | Some(Referrer::NoReferrer) => "no-referrer",
            Some(Referrer::NoReferrerWhenDowngrade) => "no-referrer-when-downgrade",
            Some(Referrer::Origin) => "origin",
            Some(Referrer::OriginWhenCrossOrigin) => "origin-when-cross-origin",
            Some(Referrer::SameOrigin) => "same-origin",
            Some(Referrer::StrictOrigin) => "strict-origin",
            Some(Referrer::StrictOriginWhenCrossOrigin) => "strict-origin-when-cross-origin",
        });
        let mut set = Vec::new();
        for (name, value) in &document.set {
            let at = format!("/headers/set/{}", name.replace('~', "~0").replace('/', "~1"));
            let Some(name) = self.answer_field(&at, name) else { continue };
            match HeaderValue::from_str(value) {
                Ok(value) => set.push((name, value)),
                Err(_) => self.error(&at, "expected visible ASCII characters and blanks"),
            }
        }
        let remove = document.remove.iter().enumerate();
        let remove =
            remove.filter_map(|(index, name)| self.answer_field(&format!("/headers/remove/{index}"), name));
        HeaderPolicy { referrer_policy, remove: remove.collect(), set }
    }

    /// A field of answers that a policy may speak of: framing is hyper's, and a few have keys of their own.
    fn answer_field(&mut self, at: &str, name: &str) -> Option<HeaderName> {
        let Ok(name) = name.parse::<HeaderName>() else {
            self.error(at, "expected the name of a field");
            return None;
        };
        let own = match name.as_str() {
            "connection" | "content-length" | "content-type" | "date" | "keep-alive" | "location"
            | "set-cookie" | "te" | "trailer" | "transfer-encoding" | "upgrade" | "www-authenticate" => {
                "is not for a policy to change"
            }
            "strict-transport-security" => "is tls.hsts",
            "referrer-policy" => "is headers.referrer_policy",
            "x-content-type-options" | "x-request-id" => "is always there",
            other if other.starts_with("sec-websocket-") => "is not for a policy to change",
            _ => return Some(name),
        };
        self.error(at, format!("{name} {own}"));
        None
    }

    fn connections(&mut self, document: &ConnectionsDocument) -> ConnectionPolicy {
        let d = document;
        let mut time = |key: &str, text, default, range| {
            self.duration(&format!("/connections/{key}"), text, default, range)
        };
        let short = MILLISECOND * 100..=MINUTE * 5;
        let drain_timeout = time("drain_timeout", d.drain_timeout, SECOND * 30, Duration::ZERO..=HOUR);
        let drain_jitter = time(
            "drain_jitter",
            d.drain_jitter,
            drain_timeout.min(SECOND * 5),
            Duration::ZERO..=drain_timeout,
        );
        let policy = ConnectionPolicy {
            max_total: d.max_total.unwrap_or(20_000),
            max_per_address: d.max_per_address.unwrap_or(200),
            handshake_timeout: time("handshake_timeout", d.handshake_timeout, SECOND * 5, short.clone()),
            header_timeout: time("header_timeout", d.header_timeout, SECOND * 10, short),
            idle_timeout: time("idle_timeout", d.idle_timeout, SECOND * 75, SECOND..=HOUR),
            body_timeout: time("body_timeout", d.body_timeout, SECOND * 30, MILLISECOND * 100..=HOUR),
            write_timeout: time("write_timeout", d.write_timeout, SECOND * 30, MILLISECOND * 100..=HOUR),
            drain_timeout,
            drain_jitter,
            min_body_rate: self.size32("/connections/min_body_rate", d.min_body_rate, 128, 0..=MIB),
            max_header_bytes: self.size32(
                "/connections/max_header_bytes",
                d.max_header_bytes,
                16 * KIB,
                KIB..=MIB,
            ),
            max_headers: d.max_headers.unwrap_or(100),
            h2_max_streams: d.h2_max_streams.unwrap_or(100),
            h2_stream_window: self.size32(
                "/connections/h2_stream_window",
                d.h2_stream_window,
                128 * KIB,
                16 * KIB..=16 * MIB,
            ),
            h2_connection_window: self.size32(
                "/connections/h2_connection_window",
                d.h2_connection_window,
                MIB,
                64 * KIB..=64 * MIB,
            ),
            http2: d.http2.unwrap_or(true),
            proxy_protocol_from: self.networks("/connections/proxy_protocol_from", &d.proxy_protocol_from),
        };
        if policy.h2_connection_window / 2 < policy.h2_stream_window {
            let key =
                if d.h2_connection_window.is_some() { "h2_connection_window" } else { "h2_stream_window" };
            let message = "expected h2_connection_window to be at least twice h2_stream_window, or one stream could \
                           stall all others";
            self.error(&format!("/connections/{key}"), message);
        }
        policy
    }

    fn session(&mut self, document: &SessionDocument) -> SessionPolicy {
        let session = SessionPolicy {
            idle: self.duration("/session/idle", document.idle, MINUTE * 15, SECOND..=DAY * 30),
            lifetime: self.duration("/session/lifetime", document.lifetime, HOUR * 12, MINUTE..=DAY * 400),
            skew: self.duration("/session/skew", document.skew, SECOND * 30, Duration::ZERO..=MINUTE * 5),
            max_sessions: document.max_sessions.unwrap_or(1_000_000),
            limits: self.session_limits(&document.limit),
        };
        if session.idle > session.lifetime {
            self.error("/session/idle", "expected at most session.lifetime");
        }
        session
    }

    fn session_limits(&mut self, documents: &[SessionLimitDocument]) -> Vec<SessionLimit> {
        for (index, limit) in documents.iter().enumerate() {
            if documents.iter().take(index).any(|other| other.role == limit.role) {
                let whose = limit.role.as_ref().map_or("everybody".to_owned(), |role| format!("`{role}`"));
                self.error(&format!("/session/limit/{index}"), format!("a second limit for {whose}"));
            }
        }
        let limit = |limit: &SessionLimitDocument| SessionLimit {
            role: limit.role.clone(),
            max: limit.max,
            at_limit: match limit.at_limit {
                AtLimitDocument::Reject => AtLimit::Reject,
                AtLimitDocument::ReplaceOldest => AtLimit::ReplaceOldest,
            },
        };
        let mut limits: Vec<_> = documents.iter().map(limit).collect();
        // The first that applies is the strictest, in whatever order they were typed.
        limits.sort_by_key(|limit| (limit.max, limit.at_limit == AtLimit::ReplaceOldest));
        limits
    }

    fn role_rules(&mut self, documents: &[RoleDocument]) -> Arc<[RoleRule]> {
        for (index, role) in documents.iter().enumerate() {
            if role.require_amr.is_empty() && role.excludes.is_empty() {
                self.error(&format!("/role/{index}"), "expected require_amr or excludes");
            }
            for (other, name) in role.excludes.iter().enumerate() {
                let pointer = format!("/role/{index}/excludes/{other}");
                if *name == role.name {
                    self.error(&pointer, "a role cannot exclude itself");
                } else if role.excludes.iter().take(other).any(|it| it == name) {
                    self.error(&pointer, "stands twice");
                }
            }
            if documents.iter().take(index).any(|other| other.name == role.name) {
                self.error(&format!("/role/{index}/name"), format!("`{}` is defined twice", role.name));
            }
        }
        let rule = |role: &RoleDocument| RoleRule {
            role: role.name.clone(),
            amr: role.require_amr.clone(),
            excludes: role.excludes.clone(),
        };
        documents.iter().map(rule).collect()
    }

    fn dpop(&mut self, document: &DpopDocument, session: &SessionPolicy, demanded: bool) -> DpopPolicy {
        let d = document;
        let default = [AlgorithmDocument::ES256, AlgorithmDocument::ES384, AlgorithmDocument::EdDSA];
        let listed = d.algorithms.as_deref().unwrap_or(&default);
        let names: Vec<_> = listed.iter().map(|algorithm| format!("{algorithm:?}")).collect();
        if let Some(index) =
            (1..listed.len()).find(|&at| listed.iter().take(at).any(|it| listed.get(at) == Some(it)))
        {
            self.error(&format!("/dpop/algorithms/{index}"), "the algorithm stands twice");
        }
        let dpop = DpopPolicy {
            algorithms: listed.iter().copied().map(algorithm).collect(),
            max_age: self.duration("/dpop/max_age", d.max_age, MINUTE, SECOND * 5..=MINUTE * 10),
            skew: session.skew,
            nonce: d.nonce,
            nonce_lifetime: self.duration(
                "/dpop/nonce_lifetime",
                d.nonce_lifetime,
                MINUTE * 5,
                SECOND * 30..=HOUR,
            ),
            max_proofs: d.max_proofs.unwrap_or(1_000_000),
            max_proofs_per_subject: d.max_proofs_per_subject.unwrap_or(10_000),
            demanded,
            algorithm_names: names.join(" "),
        };
        if dpop.max_proofs_per_subject > dpop.max_proofs {
            self.error("/dpop/max_proofs_per_subject", "expected at most dpop.max_proofs");
        }
        dpop
    }

    fn source(&mut self, pointer: &str, text: &str) -> Source {
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Source::File(self.bundle.root.join(path)),
            Some(("env", name)) if !name.is_empty() && !name.contains(['=', '\0']) => {
                Source::Env(name.to_owned())
            }
            _ => {
                self.error(pointer, "expected \"file:PATH\" or \"env:NAME\"");
                Source::Env(String::new())
            }
        }
    }

    fn issuer(
        &mut self,
        at: &str,
        document: &IssuerDocument,
        session: &SessionPolicy,
        names: &mut HashMap<String, String>,
    ) -> Issuer {
        let d = document;
        let refresh = self.duration(&format!("{at}/refresh"), d.refresh, MINUTE * 5, SECOND * 10..=DAY);
        let skew = self.duration(&format!("{at}/skew"), d.skew, session.skew, Duration::ZERO..=MINUTE * 5);
        let max_token_bytes =
            self.size32(&format!("{at}/max_token_bytes"), d.max_token_bytes, 8 * KIB, 256..=64 * KIB);
        let jwks = match d.jwks.split_once(':') {
            Some(("file", path)) if !path.is_empty() => JwksSource::File(self.bundle.root.join(path)),
            Some(("https", _)) if d.jwks.parse::<http::Uri>().is_ok_and(|uri| uri.host().is_some()) => {
                JwksSource::Url(d.jwks.clone())
            }
            _ => {
                self.error(&format!("{at}/jwks"), "expected \"file:PATH\" or an \"https:\" URL");
                JwksSource::Url(String::new())
            }
        };
        let claim = |name: &Option<String>, default: &str| name.clone().unwrap_or_else(|| default.to_owned());
        Issuer {
            name: self.unique(at, &d.name, names),
            issuer: d.issuer.clone(),
            audience: d.audience.clone(),
            algorithms: d.algorithms.iter().copied().map(algorithm).collect(),
            types: d.types.clone().unwrap_or_else(|| vec!["at+jwt".to_owned()]),
            jwks,
            refresh,
            skew,
            max_token_bytes,
            sender: sender(d.sender),
            claims: ClaimNames {
                subject: claim(&d.claims.subject, "sub"),
                session: claim(&d.claims.session, "sid"),
                roles: claim(&d.claims.roles, "roles"),
                department: claim(&d.claims.department, "dept"),
                device: claim(&d.claims.device, "device_id"),
            },
        }
    }

    fn upstream(
        &mut self,
        at: &str,
        document: &UpstreamDocument,
        names: &mut HashMap<String, String>,
    ) -> Upstream {
        let d = document;
        let mut endpoints = Vec::new();
        let mut over_tls = HashSet::new();
        for (index, text) in d.endpoints.iter().enumerate() {
            let Some((endpoint, tls)) = endpoint(text) else {
                let message = "expected \"unix:/PATH\", \"tcp:HOST:PORT\" or \"tls:HOST:PORT\"";
                self.error(&format!("{at}/endpoints/{index}"), message);
                continue;
            };
            if endpoints.contains(&endpoint) {
                self.error(&format!("{at}/endpoints/{index}"), "the endpoint stands twice");
            }
            over_tls.insert(tls);
            endpoints.push(endpoint);
        }
        if over_tls.len() > 1 {
            self.error(&format!("{at}/endpoints"), "expected all endpoints with \"tls:\", or none");
        }
        if d.tls.is_some() && over_tls.contains(&false) {
            self.error(&format!("{at}/tls"), "only for \"tls:\" endpoints");
        }
        let over_unix = endpoints.iter().any(|endpoint| matches!(endpoint, Endpoint::Unix(_)));
        if matches!(d.balance, Some(BalanceDocument::ConsistentHash)) && endpoints.len() > 1 && over_unix {
            self.error(
                &format!("{at}/balance"),
                "\"consistent-hash\" over several endpoints needs \"tcp:\" or \"tls:\"",
            );
        }
        let all_over_tls = over_tls.contains(&true) && over_tls.len() == 1;
        let tls = all_over_tls.then(|| self.upstream_tls(at, d.tls.as_ref(), &endpoints));
        let health = d.health.as_ref().map(|health| self.health(&format!("{at}/health"), health));
        let breaker = d.breaker.as_ref().map(|breaker| Breaker {
            failures: breaker.failures.unwrap_or(5),
            open_for: self.duration(
                &format!("{at}/breaker/open_for"),
                breaker.open_for,
                SECOND * 10,
                MILLISECOND * 100..=HOUR,
            ),
            trials: breaker.trials.unwrap_or(1),
            server_errors: breaker.server_errors.unwrap_or(false),
        });
        let mut time =
            |key: &str, text, default, range| self.duration(&format!("{at}/{key}"), text, default, range);
        let ten = MILLISECOND * 10;
        Upstream {
            endpoints,
            tls,
            balance: match d.balance {
                Some(BalanceDocument::RoundRobin) | None => Balance::RoundRobin,
                Some(BalanceDocument::LeastConnections) => Balance::LeastConnections,
                Some(BalanceDocument::ConsistentHash) => Balance::ConsistentHash,
            },
            connect_timeout: time("connect_timeout", d.connect_timeout, SECOND * 2, ten..=MINUTE * 5),
            response_timeout: time("response_timeout", d.response_timeout, SECOND * 30, ten..=HOUR),
            idle_timeout: time("idle_timeout", d.idle_timeout, SECOND * 60, SECOND..=HOUR),
            max_idle: d.max_idle.unwrap_or(256),
            health,
            breaker,
            retries: d.retries.unwrap_or(1),
            retry_budget: d.retry_budget.unwrap_or(20),
            name: self.unique(at, &d.name, names),
        }
    }

    fn upstream_tls(
        &mut self,
        at: &str,
        document: Option<&UpstreamTlsDocument>,
        endpoints: &[Endpoint],
    ) -> UpstreamTls {
        let default = UpstreamTlsDocument::default();
        let d = document.unwrap_or(&default);
        let mut source = |key: &str, text: &Option<String>| {
            text.as_ref().map(|text| self.source(&format!("{at}/tls/{key}"), text))
        };
        let ca = source("ca", &d.ca);
        let client_certificate = source("client_certificate", &d.client_certificate);
        let client_key = source("client_key", &d.client_key);
        if client_certificate.is_some() != client_key.is_some() {
            self.error(&format!("{at}/tls"), "client_certificate and client_key come together");
        }
        let hosts: HashSet<_> = endpoints
            .iter()
            .filter_map(|endpoint| match endpoint {
                Endpoint::Tcp { host, .. } => Some(host),
                Endpoint::Unix(_) => None,
            })
            .collect();
        if d.server_name.is_none() && hosts.len() > 1 {
            self.error(&format!("{at}/endpoints"), "hosts of several names need one tls.server_name");
        }
        let host = || hosts.iter().next().map_or_else(String::new, |host| (*host).clone());
        UpstreamTls {
            ca,
            server_name: d.server_name.clone().unwrap_or_else(host),
            client_certificate,
            client_key,
        }
    }

    fn health(&mut self, at: &str, document: &HealthDocument) -> Health {
        let d = document;
        if !matches!(crate::path::canonical_path(&d.path), Ok(path) if path == d.path) {
            self.error(&format!("{at}/path"), "expected a path in canonical form, without query");
        }
        let health = Health {
            path: d.path.clone(),
            interval: self.duration(
                &format!("{at}/interval"),
                d.interval,
                SECOND * 5,
                MILLISECOND * 100..=HOUR,
            ),
            timeout: self.duration(&format!("{at}/timeout"), d.timeout, SECOND, MILLISECOND * 10..=MINUTE),
            healthy: d.healthy.unwrap_or(1),
            unhealthy: d.unhealthy.unwrap_or(3),
        };
        if health.timeout > health.interval {
            self.error(&format!("{at}/timeout"), "expected at most the interval");
        }
        health
    }

    fn rate(
        &mut self,
        at: &str,
        document: &RateDocument,
        names: &mut HashMap<String, String>,
        others: bool,
    ) -> Rate {
        let (per, header) = self.rate_keys(at, &document.per, document.header.as_deref());
        let period =
            self.duration(&format!("{at}/period"), Some(document.period), SECOND, MILLISECOND..=DAY * 366);
        // INVARIANT: the schema gives both a minimum of 1.
        let quota = NonZeroU32::new(document.quota).unwrap_or(NonZeroU32::MIN);
        if period.as_nanos() < u128::from(quota.get()) {
            self.error(&format!("{at}/quota"), "more than one in a nanosecond");
        }
        let of_socket = per.contains(&RateKey::Socket);
        Rate {
            name: self.unique(at, &document.name, names),
            per,
            header,
            ipv6_prefix: document.ipv6_prefix.unwrap_or(64),
            quota,
            period,
            burst: document.burst.and_then(NonZeroU32::new).unwrap_or(quota),
            shared: self.shared_rate(at, document, others, of_socket, period / quota.get()),
            mode: mode(document.mode),
        }
    }

    /// Keys, sorted, and the header that one of them means.
    fn rate_keys(
        &mut self,
        at: &str,
        per: &[RateKeyDocument],
        header: Option<&str>,
    ) -> (Vec<RateKey>, Option<HeaderName>) {
        let mut keys: Vec<_> = per
            .iter()
            .map(|key| match key {
                RateKeyDocument::Address => RateKey::Address,
                RateKeyDocument::Subject => RateKey::Subject,
                RateKeyDocument::Session => RateKey::Session,
                RateKeyDocument::Route => RateKey::Route,
                RateKeyDocument::Device => RateKey::Device,
                RateKeyDocument::Issuer => RateKey::Issuer,
                RateKeyDocument::Header => RateKey::Header,
                RateKeyDocument::MessageType => RateKey::MessageType,
                RateKeyDocument::Socket => RateKey::Socket,
            })
            .collect();
        keys.sort_unstable();
        keys.dedup();
        if keys.len() < per.len() {
            self.error(&format!("{at}/per"), "a key stands twice");
        }
        let named = header.and_then(|name| {
            let parsed = HeaderName::from_bytes(name.as_bytes()).ok();
            if parsed.is_none() {
                self.error(&format!("{at}/header"), "expected the name of a header");
            }
            parsed
        });
        match (keys.contains(&RateKey::Header), header.is_some()) {
            (true, false) => self.error(&format!("{at}/per"), "\"header\" needs the name of one: header"),
            (false, true) => {
                self.error(&format!("{at}/header"), "nothing counts by it; expected \"header\" in per")
            }
            _ => {}
        }
        (keys, named)
    }

    fn shared_rate(
        &mut self,
        at: &str,
        document: &RateDocument,
        others: bool,
        of_socket: bool,
        interval: Duration,
    ) -> Option<OnRateError> {
        let shared = document.scope == RateScopeDocument::Shared;
        if document.on_error.is_some() && !shared {
            self.error(&format!("{at}/on_error"), "nobody is asked; expected scope = \"shared\"");
        }
        if !shared {
            return None;
        }
        if !others {
            self.error(&format!("{at}/scope"), "there is nobody to share it with; expected [shared]");
        }
        if of_socket {
            self.error(&format!("{at}/scope"), "a socket is open at one gateway only; expected \"local\"");
        }
        if interval < Duration::from_micros(10) {
            self.error(&format!("{at}/quota"), "a shared rate lets 100000 a second pass at most");
        }
        Some(match document.on_error {
            Some(RateOnErrorDocument::Allow) => OnRateError::Allow,
            Some(RateOnErrorDocument::Deny) => OnRateError::Deny,
            Some(RateOnErrorDocument::Local) | None => OnRateError::Local,
        })
    }
}

fn each<D, P>(documents: &[D], pointer: &str, mut compile: impl FnMut(&str, &D) -> P) -> Vec<P> {
    let numbered = documents.iter().enumerate();
    numbered.map(|(index, document)| compile(&format!("{pointer}/{index}"), document)).collect()
}

const fn mode(document: ModeDocument) -> Mode {
    match document {
        ModeDocument::Enforce => Mode::Enforce,
        ModeDocument::Shadow => Mode::Shadow,
    }
}

const fn sender(document: SenderDocument) -> Sender {
    match document {
        SenderDocument::Any => Sender::Any,
        SenderDocument::Dpop => Sender::Dpop,
        SenderDocument::Mtls => Sender::Mtls,
    }
}

const fn algorithm(document: AlgorithmDocument) -> Algorithm {
    match document {
        AlgorithmDocument::ES256 => Algorithm::ES256,
        AlgorithmDocument::ES384 => Algorithm::ES384,
        AlgorithmDocument::EdDSA => Algorithm::EdDSA,
        AlgorithmDocument::RS256 => Algorithm::RS256,
        AlgorithmDocument::PS256 => Algorithm::PS256,
    }
}

/// Parses an endpoint; true for TLS.
fn endpoint(text: &str) -> Option<(Endpoint, bool)> {
    let (scheme, rest) = text.split_once(':')?;
    if scheme == "unix" {
        return rest.starts_with('/').then(|| (Endpoint::Unix(PathBuf::from(rest)), false));
    }
    let (host, port) = rest.rsplit_once(':')?;
    // `parse` alone would take `+80`.
    let port = port.parse().ok().filter(|number| *number > 0 && port.bytes().all(|b| b.is_ascii_digit()))?;
    let Ok(Host::Exact(host)) = Host::parse(host) else {
        return None;
    };
    let host = host.trim_matches(['[', ']']).to_owned();
    let endpoint = Endpoint::Tcp { host, port };
    match scheme {
        "tcp" => Some((endpoint, false)),
        "tls" => Some((endpoint, true)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
