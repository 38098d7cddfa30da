//! Document → Policy: names resolved, ranges checked, matchers and schemas built. Nothing is live until all is.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::num::NonZeroU32;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str;
use std::sync::Arc;
use std::time::Duration;

use http::Method;
use jsonschema::{Draft, PatternOptions, Retrieve, Uri};
use ring::digest;
use serde_json::Value;

use crate::bundle::Bundle;
use crate::document::{
    AlgorithmDocument, AuditRequestsDocument, AuthDocument, BalanceDocument, BodyDocument,
    CertificateDocument, ConnectionsDocument, DirectionDocument, Document, GroupDocument, HealthDocument,
    Hosts, InspectDocument, IssuerDocument, KindDocument, MessageDocument, MethodDocument, ModeDocument,
    NameText, OnRefusalDocument, QueryDocument, RateDocument, RateKeyDocument, RouteDocument,
    SessionDocument, TlsDocument, TlsVersionDocument, UpstreamDocument, UpstreamTlsDocument,
    WebsocketDocument,
};
use crate::errors::{PolicyError, PolicyErrors};
use crate::json::{self, Schema};
use crate::matcher::{ContentTypes, Host, MAX_QUERY, Origins, PathPattern, RoutesBuilder};
use crate::policy::{
    Algorithm, AuditPolicy, AuditRequests, Balance, CertificateSource, ClaimNames, ConnectionPolicy,
    Endpoint, Group, Health, Issuer, JwksSource, Mode, Policy, Rate, RateIndex, RateKey, RuleId,
    SessionPolicy, Source, TlsPolicy, TlsVersions, Upstream, UpstreamIndex, UpstreamTls,
};
use crate::rule::{
    Authentication, BodyRule, Kinds, MessageRule, MessageTable, OnRefusal, QueryRule, RateList, Rule,
    TunnelLimits, TunnelRule,
};
use crate::source::{self, Sources, child, hint};
use crate::units::{DurationText, SizeText};

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
    /// Every error there is, by file, line, column and key. Syntax errors hide what comes after them, and a key
    /// that is missing hides errors of meaning; nothing else hides anything.
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
    let mut compiler = Compiler {
        sources: &sources,
        bundle,
        schemas: &schemas,
        errors,
        rule_names: HashMap::new(),
    };
    let policy = compiler.policy(&document, hash(bundle, variables));
    match policy {
        Some(policy) if compiler.errors.is_empty() => Ok(policy),
        _ => Err(compiler.errors),
    }
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
    context
        .finish()
        .as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
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

/// What a route and a websocket have in common, with the pointer to it.
struct Common<'d> {
    at: String,
    name: &'d NameText,
    host: &'d Hosts,
    path: &'d str,
    upstream: &'d str,
    auth: AuthDocument,
    roles: &'d [String],
    action: Option<&'d str>,
    rates: &'d [String],
    query: Option<&'d QueryDocument>,
    mode: ModeDocument,
}

impl Compiler<'_> {
    fn policy(&mut self, document: &Document, hash: String) -> Option<Policy> {
        let session = self.session(&document.session);
        let certificates = each(&document.certificate, "/certificate", |at, certificate| {
            self.certificate(at, certificate)
        });
        let mut names = HashMap::new();
        let issuers = each(&document.issuer, "/issuer", |at, issuer| {
            self.issuer(at, issuer, &session, &mut names)
        });
        let mut names = HashMap::new();
        let upstreams = each(&document.upstream, "/upstream", |at, upstream| {
            self.upstream(at, upstream, &mut names)
        });
        let mut names = HashMap::new();
        let rates = each(&document.rate, "/rate", |at, rate| {
            self.rate(at, rate, &mut names)
        });

        let mut known = Known {
            upstreams: &upstreams,
            rates: &rates,
            rules: Vec::new(),
            any_auth: false,
        };
        let mut routes = RoutesBuilder::default();
        for (index, route) in document.route.iter().enumerate() {
            self.route(format!("/route/{index}"), route, &mut known, &mut routes);
        }
        for (index, websocket) in document.websocket.iter().enumerate() {
            self.websocket(format!("/websocket/{index}"), websocket, &mut known, &mut routes);
        }
        if known.any_auth && issuers.is_empty() {
            self.error(
                "/issuer",
                "a rule wants a token, and there is no [[issuer]] whose tokens count",
            );
        }
        let Known { rules, .. } = known;
        let routes = routes.build().map_err(|text| self.error("/route", text)).ok()?;
        Some(Policy {
            hash,
            tls: self.tls(&document.tls),
            connections: self.connections(&document.connections),
            certificates,
            issuers,
            session,
            audit: AuditPolicy {
                requests: match document.audit.requests {
                    Some(AuditRequestsDocument::All) => AuditRequests::All,
                    Some(AuditRequestsDocument::Refused) | None => AuditRequests::Refused,
                    Some(AuditRequestsDocument::None) => AuditRequests::None,
                },
            },
            upstreams,
            rates,
            rules,
            routes,
        })
    }

    fn error(&mut self, pointer: &str, message: impl Into<String>) {
        self.errors.push(self.sources.error(pointer, message));
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
                format!(
                    "`{}` is defined twice; first at {}:{}",
                    name.0, first.file, first.line
                ),
            );
        }
        name.0.as_str().into()
    }

    fn tls(&mut self, document: &TlsDocument) -> TlsPolicy {
        let versions = match document.versions.as_deref() {
            None => TlsVersions::Tls12And13,
            Some(list) if !list.contains(&TlsVersionDocument::Tls13) => {
                self.error(
                    "/tls/versions",
                    "\"1.3\" is always offered; expected it in the list",
                );
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
            self.error(
                "/tls/groups",
                "TLS 1.2 needs one of \"X25519\", \"P-256\", \"P-384\" too",
            );
        }
        let hsts = document.hsts.as_ref().map(|hsts| {
            let age = self.duration(
                "/tls/hsts/max_age",
                Some(hsts.max_age),
                DAY,
                Duration::ZERO..=DAY * 3_660,
            );
            if hsts.preload && (!hsts.include_subdomains || age < DAY * 365) {
                let message = "preload wants include_subdomains and a max_age of at least \"365d\"";
                self.error("/tls/hsts/preload", message);
            }
            let subdomains = if hsts.include_subdomains {
                "; includeSubDomains"
            } else {
                ""
            };
            let preload = if hsts.preload { "; preload" } else { "" };
            format!("max-age={}{subdomains}{preload}", age.as_secs())
        });
        TlsPolicy {
            versions,
            groups,
            hsts,
            tickets: document.tickets.unwrap_or(true),
        }
    }

    fn connections(&mut self, document: &ConnectionsDocument) -> ConnectionPolicy {
        let d = document;
        let mut time = |key: &str, text, default, range| {
            self.duration(&format!("/connections/{key}"), text, default, range)
        };
        let short = MILLISECOND * 100..=MINUTE * 5;
        ConnectionPolicy {
            max_total: d.max_total.unwrap_or(20_000),
            max_per_address: d.max_per_address.unwrap_or(200),
            handshake_timeout: time(
                "handshake_timeout",
                d.handshake_timeout,
                SECOND * 5,
                short.clone(),
            ),
            header_timeout: time("header_timeout", d.header_timeout, SECOND * 10, short),
            idle_timeout: time("idle_timeout", d.idle_timeout, SECOND * 75, SECOND..=HOUR),
            body_timeout: time(
                "body_timeout",
                d.body_timeout,
                SECOND * 30,
                MILLISECOND * 100..=HOUR,
            ),
            drain_timeout: time(
                "drain_timeout",
                d.drain_timeout,
                SECOND * 30,
                Duration::ZERO..=HOUR,
            ),
            max_header_bytes: self.size32(
                "/connections/max_header_bytes",
                d.max_header_bytes,
                16 * KIB,
                KIB..=MIB,
            ),
            max_headers: d.max_headers.unwrap_or(100),
            h2_max_streams: d.h2_max_streams.unwrap_or(100),
            http2: d.http2.unwrap_or(true),
        }
    }

    fn session(&mut self, document: &SessionDocument) -> SessionPolicy {
        let session = SessionPolicy {
            idle: self.duration("/session/idle", document.idle, MINUTE * 15, MINUTE..=DAY * 30),
            lifetime: self.duration(
                "/session/lifetime",
                document.lifetime,
                HOUR * 12,
                MINUTE..=DAY * 400,
            ),
            skew: self.duration(
                "/session/skew",
                document.skew,
                SECOND * 30,
                Duration::ZERO..=MINUTE * 5,
            ),
        };
        if session.idle > session.lifetime {
            self.error("/session/idle", "expected at most session.lifetime");
        }
        session
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

    fn certificate(&mut self, at: &str, document: &CertificateDocument) -> CertificateSource {
        for (index, name) in document.names.iter().enumerate() {
            if !matches!(Host::parse(name), Ok(Host::Exact(_) | Host::Wildcard(_))) {
                let message = "expected a host name in lower case, or \"*.\" and one";
                self.error(&format!("{at}/names/{index}"), message);
            }
        }
        CertificateSource {
            names: document.names.clone(),
            chain: self.source(&format!("{at}/chain"), &document.chain),
            key: self.source(&format!("{at}/key"), &document.key),
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
        let skew = self.duration(
            &format!("{at}/skew"),
            d.skew,
            session.skew,
            Duration::ZERO..=MINUTE * 5,
        );
        let max_token_bytes = self.size32(
            &format!("{at}/max_token_bytes"),
            d.max_token_bytes,
            8 * KIB,
            256..=64 * KIB,
        );
        let jwks = match d.jwks.split_once(':') {
            Some(("file", path)) if !path.is_empty() => JwksSource::File(self.bundle.root.join(path)),
            Some(("https", rest)) if rest.len() > 2 && d.jwks.parse::<http::Uri>().is_ok() => {
                JwksSource::Url(d.jwks.clone())
            }
            _ => {
                self.error(
                    &format!("{at}/jwks"),
                    "expected \"file:PATH\" or an \"https:\" URL",
                );
                JwksSource::Url(String::new())
            }
        };
        let claim = |name: &Option<String>, default: &str| name.clone().unwrap_or_else(|| default.to_owned());
        Issuer {
            name: self.unique(at, &d.name, names),
            issuer: d.issuer.clone(),
            audience: d.audience.clone(),
            algorithms: d
                .algorithms
                .iter()
                .map(|algorithm| match algorithm {
                    AlgorithmDocument::ES256 => Algorithm::ES256,
                    AlgorithmDocument::ES384 => Algorithm::ES384,
                    AlgorithmDocument::EdDSA => Algorithm::EdDSA,
                    AlgorithmDocument::RS256 => Algorithm::RS256,
                    AlgorithmDocument::PS256 => Algorithm::PS256,
                })
                .collect(),
            types: d.types.clone().unwrap_or_else(|| vec!["at+jwt".to_owned()]),
            jwks,
            refresh,
            skew,
            max_token_bytes,
            claims: ClaimNames {
                subject: claim(&d.claims.subject, "sub"),
                session: claim(&d.claims.session, "sid"),
                roles: claim(&d.claims.roles, "roles"),
                department: claim(&d.claims.department, "dept"),
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
            self.error(
                &format!("{at}/endpoints"),
                "expected all endpoints with \"tls:\", or none",
            );
        }
        if d.tls.is_some() && over_tls.contains(&false) {
            self.error(&format!("{at}/tls"), "only for \"tls:\" endpoints");
        }
        let tls = over_tls
            .contains(&true)
            .then(|| self.upstream_tls(at, d.tls.as_ref(), &endpoints));
        let health = d
            .health
            .as_ref()
            .map(|health| self.health(&format!("{at}/health"), health));
        let mut time =
            |key: &str, text, default, range| self.duration(&format!("{at}/{key}"), text, default, range);
        let ten = MILLISECOND * 10;
        Upstream {
            endpoints,
            tls,
            balance: match d.balance {
                Some(BalanceDocument::RoundRobin) | None => Balance::RoundRobin,
                Some(BalanceDocument::ConsistentHash) => Balance::ConsistentHash,
            },
            connect_timeout: time("connect_timeout", d.connect_timeout, SECOND * 2, ten..=MINUTE * 5),
            response_timeout: time("response_timeout", d.response_timeout, SECOND * 30, ten..=HOUR),
            idle_timeout: time("idle_timeout", d.idle_timeout, SECOND * 60, SECOND..=HOUR),
            max_idle: d.max_idle.unwrap_or(256),
            health,
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
            text.as_ref()
                .map(|text| self.source(&format!("{at}/tls/{key}"), text))
        };
        let ca = source("ca", &d.ca);
        let client_certificate = source("client_certificate", &d.client_certificate);
        let client_key = source("client_key", &d.client_key);
        if client_certificate.is_some() != client_key.is_some() {
            self.error(
                &format!("{at}/tls"),
                "client_certificate and client_key come together",
            );
        }
        let hosts: HashSet<_> = endpoints
            .iter()
            .filter_map(|endpoint| match endpoint {
                Endpoint::Tcp { host, .. } => Some(host),
                Endpoint::Unix(_) => None,
            })
            .collect();
        if d.server_name.is_none() && hosts.len() > 1 {
            self.error(
                &format!("{at}/endpoints"),
                "hosts of several names need one tls.server_name",
            );
        }
        let host = || {
            hosts
                .iter()
                .next()
                .map_or_else(String::new, |host| (*host).clone())
        };
        UpstreamTls {
            ca,
            server_name: d.server_name.clone().unwrap_or_else(host),
            client_certificate,
            client_key,
        }
    }

    fn health(&mut self, at: &str, document: &HealthDocument) -> Health {
        let d = document;
        if !matches!(crate::matcher::canonical_path(&d.path), Ok(path) if path == d.path) {
            self.error(
                &format!("{at}/path"),
                "expected a path in canonical form, without query",
            );
        }
        let health = Health {
            path: d.path.clone(),
            interval: self.duration(
                &format!("{at}/interval"),
                d.interval,
                SECOND * 5,
                MILLISECOND * 100..=HOUR,
            ),
            timeout: self.duration(
                &format!("{at}/timeout"),
                d.timeout,
                SECOND,
                MILLISECOND * 10..=MINUTE,
            ),
            healthy: d.healthy.unwrap_or(1),
            unhealthy: d.unhealthy.unwrap_or(3),
        };
        if health.timeout > health.interval {
            self.error(&format!("{at}/timeout"), "expected at most the interval");
        }
        health
    }

    fn rate(&mut self, at: &str, document: &RateDocument, names: &mut HashMap<String, String>) -> Rate {
        let mut per: Vec<_> = document
            .per
            .iter()
            .map(|key| match key {
                RateKeyDocument::Address => RateKey::Address,
                RateKeyDocument::Subject => RateKey::Subject,
                RateKeyDocument::Session => RateKey::Session,
                RateKeyDocument::Route => RateKey::Route,
                RateKeyDocument::MessageType => RateKey::MessageType,
            })
            .collect();
        per.sort_unstable();
        per.dedup();
        if per.len() < document.per.len() {
            self.error(&format!("{at}/per"), "a key stands twice");
        }
        let period = self.duration(
            &format!("{at}/period"),
            Some(document.period),
            SECOND,
            MILLISECOND..=DAY * 366,
        );
        // INVARIANT: the schema gives both a minimum of 1.
        let quota = NonZeroU32::new(document.quota).unwrap_or(NonZeroU32::MIN);
        if period.as_nanos() < u128::from(quota.get()) {
            self.error(&format!("{at}/quota"), "more than one in a nanosecond");
        }
        Rate {
            name: self.unique(at, &document.name, names),
            per,
            quota,
            period,
            burst: document.burst.and_then(NonZeroU32::new).unwrap_or(quota),
            mode: mode(document.mode),
        }
    }

    fn route(
        &mut self,
        at: String,
        document: &RouteDocument,
        known: &mut Known<'_>,
        routes: &mut RoutesBuilder,
    ) {
        let d = document;
        let common = Common {
            at,
            name: &d.name,
            host: &d.host,
            path: &d.path,
            upstream: &d.upstream,
            auth: d.auth,
            roles: &d.roles,
            action: d.action.as_deref(),
            rates: &d.rates,
            query: d.query.as_ref(),
            mode: d.mode,
        };
        let mut rule = self.rule(&common, known);
        rule.activity = d.activity.unwrap_or(true);
        if let Some(body) = &d.body {
            self.body(&common.at, body, &mut rule);
            // Servers and proxies disagree about bodies of these (RFC 9110 §9.3.1).
            let bodiless = [MethodDocument::Get, MethodDocument::Head];
            if d.methods.iter().any(|method| bodiless.contains(method)) {
                self.error(
                    &format!("{}/body", common.at),
                    "GET and HEAD take no body; make it a route of its own",
                );
            }
        }
        let mut methods = Vec::new();
        for (index, method) in d.methods.iter().enumerate() {
            let method = match method {
                MethodDocument::Get => Method::GET,
                MethodDocument::Head => Method::HEAD,
                MethodDocument::Post => Method::POST,
                MethodDocument::Put => Method::PUT,
                MethodDocument::Patch => Method::PATCH,
                MethodDocument::Delete => Method::DELETE,
                MethodDocument::Options => Method::OPTIONS,
            };
            if methods.contains(&method) {
                self.error(
                    &format!("{}/methods/{index}", common.at),
                    "the method stands twice",
                );
            } else {
                methods.push(method);
            }
        }
        self.place(&common, Some(&methods), rule, known, routes);
    }

    /// The part that routes and websockets share.
    fn rule(&mut self, common: &Common<'_>, known: &mut Known<'_>) -> Rule {
        let at = &common.at;
        let mut names = std::mem::take(&mut self.rule_names);
        let name = self.unique(at, common.name, &mut names);
        self.rule_names = names;
        let upstream = known
            .upstreams
            .iter()
            .position(|upstream| *upstream.name == *common.upstream);
        if upstream.is_none() {
            let names: Vec<_> = known.upstreams.iter().map(|upstream| &*upstream.name).collect();
            let message = format!(
                "unknown upstream `{}`{}",
                common.upstream,
                hint(common.upstream, &names)
            );
            self.error(&format!("{at}/upstream"), message);
        }
        let authentication = match common.auth {
            AuthDocument::None => Authentication::None,
            AuthDocument::Required => Authentication::Required,
        };
        known.any_auth |= authentication == Authentication::Required;
        if authentication == Authentication::None && !common.roles.is_empty() {
            self.error(
                &format!("{at}/roles"),
                "roles come with a token, and auth is \"none\"",
            );
        }
        let query = common.query.map(|query| {
            let limit = u64::try_from(MAX_QUERY).unwrap_or(u64::MAX);
            let max_bytes = self.size(
                &format!("{at}/query/max_bytes"),
                query.max_bytes,
                2 * KIB,
                1..=limit,
            );
            QueryRule {
                max_bytes: usize::try_from(max_bytes).unwrap_or(MAX_QUERY),
                schema: self.schema(&format!("{at}/query/schema"), query.schema.as_deref()),
            }
        });
        Rule {
            id: RuleId(u32::try_from(known.rules.len()).unwrap_or(u32::MAX)),
            name,
            mode: mode(common.mode),
            upstream: UpstreamIndex(upstream.unwrap_or(usize::MAX)),
            authentication,
            action: common.action.map(Into::into),
            activity: true,
            roles: common.roles.to_vec(),
            rates: self.rates(
                &format!("{at}/rates"),
                common.rates,
                authentication,
                false,
                known.rates,
            ),
            query,
            body: BodyRule {
                max_bytes: 0,
                buffered: false,
            },
            content_types: ContentTypes::Any,
            body_schema: None,
            tunnel: None,
        }
    }

    /// Puts a finished rule where its host, path and methods say.
    fn place(
        &mut self,
        common: &Common<'_>,
        methods: Option<&[Method]>,
        rule: Rule,
        known: &mut Known<'_>,
        routes: &mut RoutesBuilder,
    ) {
        let at = &common.at;
        let rule = Arc::new(rule);
        known.rules.push(Arc::clone(&rule));
        let path = match PathPattern::parse(common.path) {
            Ok(path) => path,
            Err(message) => return self.error(&format!("{at}/path"), message),
        };
        let hosts: Vec<_> = match common.host {
            Hosts::One(host) => vec![(format!("{at}/host"), host)],
            Hosts::Several(hosts) => hosts
                .iter()
                .enumerate()
                .map(|(index, host)| (format!("{at}/host/{index}"), host))
                .collect(),
        };
        for (pointer, host) in hosts {
            let host = match Host::parse(host) {
                Ok(host) => host,
                Err(message) => {
                    self.error(&pointer, message);
                    continue;
                }
            };
            if let Err(other) = routes.insert(&host, &path, methods, &rule) {
                let message = format!("equal to `{}`: same host, path and method", other.name);
                self.error(&format!("{at}/path"), message);
            }
        }
    }

    fn body(&mut self, at: &str, document: &BodyDocument, rule: &mut Rule) {
        let buffered = document.schema.is_some();
        // A body with a schema is held in memory until it is judged.
        let highest = if buffered { 16 * MIB } else { 64 * GIB };
        let max_bytes = self.size(
            &format!("{at}/body/max_bytes"),
            Some(document.max_bytes),
            0,
            1..=highest,
        );
        rule.body = BodyRule { max_bytes, buffered };
        rule.body_schema = self.schema(&format!("{at}/body/schema"), document.schema.as_deref());
        rule.content_types = match &document.content_types {
            None if buffered => ContentTypes::Listed(vec!["application/json".to_owned()]),
            None => ContentTypes::Any,
            Some(list) => {
                for (index, essence) in list.iter().enumerate() {
                    let plain = |part: &str| {
                        !part.is_empty()
                            && part
                                .bytes()
                                .all(|b| b.is_ascii_alphanumeric() || b"!#$&-^_.+".contains(&b))
                    };
                    let pointer = format!("{at}/body/content_types/{index}");
                    if !essence
                        .split_once('/')
                        .is_some_and(|(kind, subkind)| plain(kind) && plain(subkind))
                    {
                        self.error(
                            &pointer,
                            "expected a media type without parameters, such as \"application/json\"",
                        );
                    } else if buffered && !(essence.ends_with("/json") || essence.ends_with("+json")) {
                        self.error(&pointer, "a body with a schema must be JSON");
                    }
                }
                ContentTypes::Listed(list.clone())
            }
        };
    }

    /// Resolves names of rates, and sees that their keys will have a value where they are taken.
    fn rates(
        &mut self,
        pointer: &str,
        names: &[String],
        authentication: Authentication,
        of_messages: bool,
        rates: &[Rate],
    ) -> RateList {
        let mut enforced = Vec::new();
        let mut shadow = Vec::new();
        for (index, name) in names.iter().enumerate() {
            let pointer = format!("{pointer}/{index}");
            let Some((place, rate)) = rates.iter().enumerate().find(|(_, rate)| *rate.name == **name) else {
                let known: Vec<_> = rates.iter().map(|rate| &*rate.name).collect();
                self.error(&pointer, format!("unknown rate `{name}`{}", hint(name, &known)));
                continue;
            };
            let list = if rate.mode == Mode::Shadow {
                &mut shadow
            } else {
                &mut enforced
            };
            if list.contains(&RateIndex(place)) {
                self.error(&pointer, "the rate stands twice");
                continue;
            }
            list.push(RateIndex(place));
            let by_identity = rate
                .per
                .iter()
                .any(|key| matches!(key, RateKey::Subject | RateKey::Session));
            if by_identity && authentication == Authentication::None {
                self.error(
                    &pointer,
                    format!("`{name}` counts by subject or session, and auth is \"none\""),
                );
            }
            if rate.per.contains(&RateKey::MessageType) && !of_messages {
                self.error(
                    &pointer,
                    format!("`{name}` counts by message type, and this is no message"),
                );
            }
        }
        let count = enforced.len();
        enforced.extend(shadow);
        RateList {
            all: enforced,
            enforced: count,
        }
    }

    fn schema(&mut self, pointer: &str, name: Option<&str>) -> Option<Schema> {
        let name = name?;
        match self.schemas.compile(name) {
            Some(schema) => schema,
            None => {
                let known: Vec<_> = self.schemas.texts.keys().map(String::as_str).collect();
                self.error(
                    pointer,
                    format!("there is no `{name}` in the bundle{}", hint(name, &known)),
                );
                None
            }
        }
    }

    fn websocket(
        &mut self,
        at: String,
        document: &WebsocketDocument,
        known: &mut Known<'_>,
        routes: &mut RoutesBuilder,
    ) {
        let d = document;
        let common = Common {
            at,
            name: &d.name,
            host: &d.host,
            path: &d.path,
            upstream: &d.upstream,
            auth: d.auth,
            roles: &d.roles,
            action: d.action.as_deref(),
            rates: &d.rates,
            query: d.query.as_ref(),
            mode: d.mode,
        };
        let mut rule = self.rule(&common, known);
        rule.tunnel = Some(self.tunnel(&common.at, d, rule.authentication, known.rates));
        self.place(&common, None, rule, known, routes);
    }

    fn tunnel(
        &mut self,
        at: &str,
        document: &WebsocketDocument,
        authentication: Authentication,
        rates: &[Rate],
    ) -> TunnelRule {
        let d = document;
        let inspect = d.inspect.unwrap_or(if d.message.is_empty() {
            InspectDocument::None
        } else {
            InspectDocument::Json
        });
        let origins = Origins::parse(&d.origins, d.require_origin).unwrap_or_else(|errors| {
            for (index, message) in errors {
                self.error(&format!("{at}/origins/{index}"), message);
            }
            Origins::default()
        });
        for (index, subprotocol) in d.subprotocols.iter().enumerate() {
            let pointer = format!("{at}/subprotocols/{index}");
            let token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
            if subprotocol.is_empty() || !subprotocol.bytes().all(token) {
                self.error(&pointer, "expected a token (RFC 9110 §5.6.2)");
            } else if subprotocol.starts_with("sealgate.") {
                self.error(
                    &pointer,
                    "names that begin with \"sealgate.\" carry tokens and are never agreed on",
                );
            }
        }
        if d.require_subprotocol == Some(true) && d.subprotocols.is_empty() {
            self.error(&format!("{at}/require_subprotocol"), "no subprotocol is listed");
        }
        let [to_upstream, to_client] = self.tables(at, d, inspect, authentication, rates);
        let kinds = match (&d.kinds, inspect) {
            (None, InspectDocument::Json) => Kinds {
                text: true,
                binary: false,
            },
            (None, InspectDocument::None) => Kinds {
                text: true,
                binary: true,
            },
            (Some(kinds), _) => Kinds {
                text: kinds.contains(&KindDocument::Text),
                binary: kinds.contains(&KindDocument::Binary),
            },
        };
        let message_rates = self.rates(
            &format!("{at}/message_rates"),
            &d.message_rates,
            authentication,
            true,
            rates,
        );
        TunnelRule {
            limits: self.tunnel_limits(at, d),
            origins,
            subprotocols: d.subprotocols.clone(),
            subprotocol_required: d.require_subprotocol.unwrap_or(!d.subprotocols.is_empty()),
            kinds,
            to_upstream,
            to_client,
            message_rates,
            activity: d.activity.unwrap_or(true),
        }
    }

    fn tunnel_limits(&mut self, at: &str, document: &WebsocketDocument) -> TunnelLimits {
        let d = document;
        let mut size =
            |key: &str, text, default, range| self.size32(&format!("{at}/{key}"), text, default, range);
        let max_frame = size("max_frame", d.max_frame, 64 * KIB, 125..=16 * MIB);
        let max_message = size("max_message", d.max_message, 64 * KIB, 1..=16 * MIB);
        let buffer = size("buffer", d.buffer, 256 * KIB, KIB..=64 * MIB);
        let mut time =
            |key: &str, text, default, range| self.duration(&format!("{at}/{key}"), text, default, range);
        TunnelLimits {
            max_frame,
            max_message,
            max_fragments: d.max_fragments.unwrap_or(64),
            control_per_second: d.control_per_second.unwrap_or(10),
            idle: d
                .idle
                .map(|idle| time("idle", Some(idle), idle.0, SECOND..=DAY * 30)),
            ping_interval: time("ping_interval", d.ping_interval, SECOND * 30, SECOND..=HOUR),
            pong_timeout: time("pong_timeout", d.pong_timeout, SECOND * 20, SECOND..=HOUR),
            write_timeout: time(
                "write_timeout",
                d.write_timeout,
                SECOND * 20,
                MILLISECOND * 100..=HOUR,
            ),
            buffer,
        }
    }

    /// The message tables: to the upstream, to the client. A direction without messages is not looked into.
    fn tables(
        &mut self,
        at: &str,
        document: &WebsocketDocument,
        inspect: InspectDocument,
        authentication: Authentication,
        rates: &[Rate],
    ) -> [Option<MessageTable>; 2] {
        let d = document;
        let pointer = d.type_pointer.as_deref().unwrap_or("/type");
        let tokens = json::pointer_tokens(pointer).filter(|tokens| !tokens.is_empty());
        if tokens.is_none() {
            let message = "expected a JSON pointer (RFC 6901) to a field, such as \"/type\"";
            self.error(&format!("{at}/type_pointer"), message);
        }
        if inspect == InspectDocument::None {
            if !d.message.is_empty() {
                self.error(
                    &format!("{at}/message"),
                    "messages are listed, and inspect is \"none\"",
                );
            }
            if d.type_pointer.is_some() {
                self.error(
                    &format!("{at}/type_pointer"),
                    "nothing is looked into, as inspect is \"none\"",
                );
            }
            return [None, None];
        }
        let covers = |direction: DirectionDocument, wanted| {
            direction == DirectionDocument::Both || direction == wanted
        };
        if !d
            .message
            .iter()
            .any(|message| covers(message.direction, DirectionDocument::ToUpstream))
        {
            let message =
                "inspect is \"json\", and no message to the upstream is listed: nothing could be sent";
            self.error(&format!("{at}/inspect"), message);
        }
        if d.kinds
            .as_ref()
            .is_some_and(|kinds| kinds.contains(&KindDocument::Binary))
        {
            self.error(
                &format!("{at}/kinds"),
                "binary messages cannot be looked into as JSON",
            );
        }
        [DirectionDocument::ToUpstream, DirectionDocument::ToClient].map(|direction| {
            let mut types = HashMap::new();
            for (index, message) in d.message.iter().enumerate() {
                let at_message = format!("{at}/message/{index}");
                if !covers(message.direction, direction) {
                    continue;
                }
                let of_client = direction == DirectionDocument::ToUpstream;
                let message_rates = if of_client {
                    d.message_rates.as_slice()
                } else {
                    &[]
                };
                let rule = self.message(&at_message, message, message_rates, authentication, rates);
                if types.insert(Box::from(message.name.as_str()), rule).is_some() {
                    let message = format!("`{}` is defined twice for one direction", message.name);
                    self.error(&child(&at_message, "type"), message);
                }
            }
            (!types.is_empty()).then(|| MessageTable {
                pointer: tokens.clone().unwrap_or_default(),
                types,
                on_unknown: on_refusal(d.unknown),
            })
        })
    }

    fn message(
        &mut self,
        at: &str,
        document: &MessageDocument,
        message_rates: &[String],
        authentication: Authentication,
        rates: &[Rate],
    ) -> MessageRule {
        let d = document;
        let own = self.rates(&format!("{at}/rates"), &d.rates, authentication, true, rates);
        if let Some(index) = d.rates.iter().position(|name| message_rates.contains(name)) {
            self.error(
                &format!("{at}/rates/{index}"),
                "the rate stands in message_rates already",
            );
        }
        // Errors in `message_rates` are reported where they stand; here they only need to resolve.
        let reported = self.errors.len();
        let of_all = self.rates(at, message_rates, authentication, true, rates);
        self.errors.truncate(reported);
        let split = |list: &RateList| {
            let (enforced, shadow) = list.all.split_at_checked(list.enforced).unwrap_or_default();
            (enforced.to_vec(), shadow.to_vec())
        };
        let ((mut all, shadow), (own_enforced, own_shadow)) = (split(&of_all), split(&own));
        all.extend(own_enforced);
        let enforced = all.len();
        all.extend(shadow);
        all.extend(own_shadow);
        if d.activity && d.direction == DirectionDocument::ToClient {
            self.error(&format!("{at}/activity"), "only what the user sends is activity");
        }
        MessageRule {
            name: d.name.as_str().into(),
            schema: self.schema(&format!("{at}/schema"), d.schema.as_deref()),
            action: d.action.as_deref().map(Into::into),
            rates: RateList { all, enforced },
            activity: d.activity,
            on_refusal: on_refusal(d.on_refusal),
        }
    }
}

/// What rules refer to, and the rules so far.
struct Known<'a> {
    upstreams: &'a [Upstream],
    rates: &'a [Rate],
    rules: Vec<Arc<Rule>>,
    any_auth: bool,
}

fn each<D, P>(documents: &[D], pointer: &str, mut compile: impl FnMut(&str, &D) -> P) -> Vec<P> {
    let numbered = documents.iter().enumerate();
    numbered
        .map(|(index, document)| compile(&format!("{pointer}/{index}"), document))
        .collect()
}

const fn mode(document: ModeDocument) -> Mode {
    match document {
        ModeDocument::Enforce => Mode::Enforce,
        ModeDocument::Shadow => Mode::Shadow,
    }
}

const fn on_refusal(document: OnRefusalDocument) -> OnRefusal {
    match document {
        OnRefusalDocument::Close => OnRefusal::Close,
        OnRefusalDocument::Answer => OnRefusal::Answer,
    }
}

/// Parses an endpoint; true for TLS.
fn endpoint(text: &str) -> Option<(Endpoint, bool)> {
    let (scheme, rest) = text.split_once(':')?;
    if scheme == "unix" {
        return rest
            .starts_with('/')
            .then(|| (Endpoint::Unix(PathBuf::from(rest)), false));
    }
    let (host, port) = rest.rsplit_once(':')?;
    let port = port
        .parse()
        .ok()
        .filter(|port| *port > 0 && !rest.ends_with(['+']))?;
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

/// Base of all schema files, so that `{"$ref": "envelope.json"}` finds its neighbour.
const SCHEMA_BASE: &str = "bundle:///";

/// The files below `schemas/`.
struct SchemaFiles {
    texts: BTreeMap<String, Arc<Value>>,
    /// By absolute URI, for references between files.
    retriever: Neighbours,
    /// Files that do not compile; their errors are reported once.
    broken: HashSet<String>,
}

/// Finds referenced files in the bundle and nowhere else.
#[derive(Clone)]
struct Neighbours(Arc<HashMap<String, Arc<Value>>>);

impl Retrieve for Neighbours {
    fn retrieve(&self, uri: &Uri<String>) -> Result<Value, Box<dyn std::error::Error + Send + Sync>> {
        let found = self.0.get(uri.as_str()).map(|value| Value::clone(value));
        found.ok_or_else(|| "references may only lead to files of the bundle's schemas/".into())
    }
}

impl SchemaFiles {
    /// Reads and compiles all of them, used or not: a broken file is an error today, not when it is used.
    fn read(bundle: &Bundle) -> (Self, Vec<PolicyError>) {
        let mut errors = Vec::new();
        let mut texts = BTreeMap::new();
        let mut broken = HashSet::new();
        for (name, bytes) in bundle
            .files
            .iter()
            .filter(|(name, _)| name.starts_with("schemas/"))
        {
            if !name.ends_with(".json") {
                continue;
            }
            let text = str::from_utf8(bytes).unwrap_or_default();
            match json::parse(bytes) {
                Ok(value) => drop(texts.insert(name.clone(), Arc::new(value))),
                Err(error) => {
                    // serde_json counts lines from 1, and columns in bytes.
                    let line_start: usize = text
                        .split_inclusive('\n')
                        .take(error.line().saturating_sub(1))
                        .map(str::len)
                        .sum();
                    let offset = (line_start + error.column().saturating_sub(1)).min(text.len());
                    let message = format!("not JSON: {}", without_position(&error.to_string()));
                    errors.push(PolicyError::at(name, text, offset, String::new(), message));
                    broken.insert(name.clone());
                    texts.insert(name.clone(), Arc::new(Value::Bool(true)));
                }
            }
        }
        let by_uri = texts
            .iter()
            .map(|(name, value)| (format!("{SCHEMA_BASE}{name}"), Arc::clone(value)));
        let retriever = Neighbours(Arc::new(by_uri.collect()));
        let mut files = Self {
            texts,
            retriever,
            broken,
        };
        let names: Vec<_> = files
            .texts
            .keys()
            .filter(|name| !files.broken.contains(*name))
            .cloned()
            .collect();
        for name in names {
            if let Err((pointer, message)) = files.build(&name) {
                let bytes = bundle.files.get(&name).map(Vec::as_slice).unwrap_or_default();
                let text = str::from_utf8(bytes).unwrap_or_default();
                let tokens = json::pointer_tokens(&pointer).unwrap_or_default();
                let offset = json::locate(text, &tokens);
                errors.push(PolicyError::at(&name, text, offset, pointer, message));
                files.broken.insert(name);
            }
        }
        (files, errors)
    }

    /// `None` if there is no such file, `Some(None)` if it is broken, which is reported already.
    fn compile(&self, name: &str) -> Option<Option<Schema>> {
        self.texts.get(name)?;
        Some(if self.broken.contains(name) {
            None
        } else {
            self.build(name).ok()
        })
    }

    fn build(&self, name: &str) -> Result<Schema, (String, String)> {
        let schema = self
            .texts
            .get(name)
            .map(|value| &**value)
            .unwrap_or(&Value::Bool(false));
        let draft = schema.get("$schema").and_then(Value::as_str);
        if draft.is_some_and(|draft| draft != "https://json-schema.org/draft/2020-12/schema") {
            return Err(("/$schema".into(), "expected draft 2020-12".into()));
        }
        if schema.get("$id").is_some() {
            return Err((
                "/$id".into(),
                "files are known by their path; leave `$id` out".into(),
            ));
        }
        jsonschema::options()
            .with_draft(Draft::Draft202012)
            .with_base_uri(format!("{SCHEMA_BASE}{name}"))
            .with_retriever(self.retriever.clone())
            // Linear time, whatever a peer sends.
            .with_pattern_options(PatternOptions::regex())
            .should_validate_formats(true)
            .should_ignore_unknown_formats(false)
            .build(schema)
            .map(Schema::new)
            .map_err(|error| (error.instance_path().as_str().to_owned(), error.to_string()))
    }
}

fn without_position(message: &str) -> &str {
    message
        .rsplit_once(" at line ")
        .map_or(message, |(message, _)| message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::verdict::run_tests;

    fn state() -> BTreeMap<String, String> {
        [("state".to_owned(), "/state".to_owned())].into()
    }

    fn with_overlay() -> Bundle {
        let mut bundle = Bundle::shipped("enterprise").unwrap();
        bundle.files.extend(Bundle::shipped("development").unwrap().files);
        bundle
    }

    #[test]
    fn every_shipped_bundle_loads_and_its_verdicts_hold() {
        let shipped =
            ["enterprise", "consumer", "regulated"].map(|name| (name, Bundle::shipped(name).unwrap()));
        for (name, bundle) in shipped.into_iter().chain([("development", with_overlay())]) {
            let policy =
                Policy::compile(&bundle, &state()).unwrap_or_else(|errors| panic!("{name}:\n{errors}"));
            let outcomes = run_tests(&policy, &bundle);
            let failed: Vec<_> = outcomes.iter().filter(|outcome| !outcome.passed()).collect();
            assert!(failed.is_empty(), "{name}: {failed:#?}");
            assert!(outcomes.len() > 10, "{name}");
        }
    }
}
