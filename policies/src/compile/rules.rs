//! `[[route]]` and `[[websocket]]` → rules, each put where its host, path and methods say.

use std::collections::HashMap;
use std::num::NonZeroU32;
use std::sync::Arc;

use http::{HeaderName, Method};

use crate::access::{AuditRule, Reason};
use crate::authz::{Decision, SharedJudges};
use crate::certificate::{CertificateRule, NamePattern};
use crate::compile::authz::{Asker, AuthzState, Takes};
use crate::compile::body::{NO_ESSENCE, is_essence};
use crate::compile::ciphertext::Named;
use crate::compile::{Compiler, DAY, GIB, HOUR, KIB, MIB, MILLISECOND, SECOND, mode, sender};
use crate::document::{
    AnswersDocument, AtLimitDocument, AuthDocument, BodyDocument, CertificateDemandDocument,
    CompressionDocument, DirectionDocument, Hosts, InspectDocument, KindDocument, LogoutDocument,
    MaxOpenDocument, MessageDocument, MethodDocument, ModeDocument, NameText, OnRefusalDocument,
    PenaltyDocument, QueryDocument, ResourceDocument, RouteDocument, SenderDocument, StepUpDocument,
    TicketDocument, WebsocketDocument,
};
use crate::identity::IDENTITY_HEADER_PREFIX;
use crate::json::{self, Limits, Schema};
use crate::matcher::{ContentCodings, ContentTypes, Origins};
use crate::path::{MAX_QUERY, PathPattern};
use crate::policy::{Concurrency, Issuer, Mode, Rate, RateIndex, RateKey, RuleId, Upstream, UpstreamIndex};
use crate::routes::{Host, Routes};
use crate::rule::{
    AtLimit, Authentication, BodyRule, Compression, Kinds, LogoutRule, MaxOpen, MessageRule, MessageTable,
    OnRefusal, QueryRule, RateList, RenewRule, RoleRule, Rule, StepUp, TicketRule, TunnelLimits, TunnelRule,
};
use crate::source::{child, hint};

/// Longest form with a logout token.
const MAX_LOGOUT_BYTES: u64 = 16 * KIB;

/// What a route and a websocket have in common, with the pointer to it.
struct Common<'d> {
    at: String,
    name: &'d NameText,
    host: &'d Hosts,
    path: &'d str,
    /// None only where the gateway itself answers.
    upstream: Option<&'d str>,
    auth: AuthDocument,
    sender: SenderDocument,
    client_certificate: CertificateDemandDocument,
    client_names: &'d [String],
    roles: &'d [String],
    step_up: Option<&'d StepUpDocument>,
    action: Option<&'d str>,
    audit: Option<bool>,
    reason: Option<&'d str>,
    rates: &'d [String],
    cost: Option<u32>,
    concurrency: &'d [String],
    query: Option<&'d QueryDocument>,
    mode: ModeDocument,
}

/// What rules refer to, and the rules so far.
pub(super) struct Known<'a> {
    pub(super) upstreams: &'a [Upstream],
    pub(super) issuers: &'a [Issuer],
    pub(super) rates: &'a [Rate],
    pub(super) role_rules: Arc<[RoleRule]>,
    pub(super) authz: AuthzState,
    pub(super) judges: SharedJudges,
    pub(super) penalties: &'a [PenaltyDocument],
    pub(super) concurrency: &'a [Concurrency],
    /// Names of routes that are served whatever the load is.
    pub(super) exempt: &'a [String],
    pub(super) ciphertexts: &'a [Named],
    pub(super) json: Limits,
    pub(super) answers: &'a AnswersDocument,
    pub(super) rules: Vec<Arc<Rule>>,
    pub(super) any_auth: bool,
}

impl Compiler<'_> {
    pub(super) fn route(
        &mut self,
        at: String,
        document: &RouteDocument,
        known: &mut Known<'_>,
        routes: &mut Routes,
    ) {
        let d = document;
        let common = Common {
            at,
            name: &d.name,
            host: &d.host,
            path: &d.path,
            upstream: d.upstream.as_deref(),
            auth: d.auth,
            sender: d.sender,
            client_certificate: d.client_certificate,
            client_names: &d.client_names,
            roles: &d.roles,
            step_up: d.step_up.as_ref(),
            action: d.action.as_deref(),
            audit: d.audit,
            reason: d.reason.as_deref(),
            rates: &d.rates,
            cost: d.cost,
            concurrency: &d.concurrency,
            query: d.query.as_ref(),
            mode: d.mode,
        };
        let mut rule = self.rule(&common, known);
        rule.activity = d.activity.unwrap_or(true);
        rule.answer = self.answer(&common.at, d, known);
        match (&d.upstream, &d.ticket, &d.logout) {
            (Some(_), None, None) => {}
            (None, None, None) => self.error(&common.at, "expected an upstream, or a ticket or logout"),
            (upstream, Some(ticket), None) => {
                rule.ticket = Some(self.ticket(&common, d, ticket, upstream.is_some()))
            }
            (_, _, Some(logout)) => {
                rule.logout = self.logout(&common, d, logout, known.issuers);
                // It comes in a form, and is looked at whole.
                rule.body = BodyRule { max_bytes: MAX_LOGOUT_BYTES, buffered: true };
            }
        }
        if let Some(body) = &d.body {
            self.body(&common.at, body, known, &mut rule);
            // Servers and proxies disagree about bodies of these (RFC 9110 §9.3.1).
            let bodiless = [MethodDocument::Get, MethodDocument::Head];
            if d.methods.iter().any(|method| bodiless.contains(method)) {
                self.error(
                    &format!("{}/body", common.at),
                    "GET and HEAD take no body; make it a route of its own",
                );
            }
        }
        let takes =
            Takes::Request { query: d.query.is_some(), body: rule.body.buffered && rule.form.is_none() };
        rule.authorization = self.decide(&common, d.resource.as_ref(), takes, known);
        rule.penalties = self.penalties_of(&rule, known.penalties);
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
                self.error(&format!("{}/methods/{index}", common.at), "the method stands twice");
            } else {
                methods.push(method);
            }
        }
        self.place(&common, Some(&methods), rule, known, routes);
    }

    fn ticket(
        &mut self,
        common: &Common<'_>,
        route: &RouteDocument,
        document: &TicketDocument,
        upstream: bool,
    ) -> TicketRule {
        let at = format!("{}/ticket", common.at);
        let faults = [
            (upstream, "the gateway itself answers with a ticket, and there is an upstream"),
            (common.auth == AuthDocument::None, "a ticket is made of a token, and auth is \"none\""),
            (
                route.methods != [MethodDocument::Post],
                "a ticket is made by POST; expected methods = [\"POST\"]",
            ),
            (route.body.is_some(), "a ticket takes no body"),
        ];
        for (_, message) in faults.into_iter().filter(|(fault, _)| *fault) {
            self.error(&at, message);
        }
        TicketRule {
            ttl: self.duration(&format!("{at}/ttl"), document.ttl, SECOND * 30, SECOND * 5..=SECOND * 300),
        }
    }

    fn logout(
        &mut self,
        common: &Common<'_>,
        route: &RouteDocument,
        document: &LogoutDocument,
        issuers: &[Issuer],
    ) -> Option<LogoutRule> {
        let at = format!("{}/logout", common.at);
        let faults = [
            (route.upstream.is_some(), "the gateway itself answers a logout, and there is an upstream"),
            (route.ticket.is_some(), "expected a ticket or logout, and not both"),
            (common.auth != AuthDocument::None, "the logout token alone counts; expected auth = \"none\""),
            (
                route.methods != [MethodDocument::Post],
                "a logout token comes by POST; expected methods = [\"POST\"]",
            ),
            (route.body.is_some(), "what the body may be is known; expected none of it here"),
            (
                common.rates.is_empty(),
                "anybody may call, and signatures cost time; expected rates, such as one by address",
            ),
            (mode(common.mode) == Mode::Shadow, "there is nothing to pass a logout on to in mode \"shadow\""),
        ];
        for (_, message) in faults.into_iter().filter(|(fault, _)| *fault) {
            self.error(&at, message);
        }
        let max_age = self.duration(
            &format!("{at}/max_age"),
            document.max_age,
            SECOND * 300,
            SECOND * 10..=SECOND * 3600,
        );
        let Some(issuer) = issuers.iter().find(|issuer| *issuer.name == *document.issuer) else {
            self.error(&format!("{at}/issuer"), format!("there is no [[issuer]] `{}`", document.issuer));
            return None;
        };
        if (issuer.claims.subject.as_str(), issuer.claims.session.as_str()) != ("sub", "sid") {
            let message = "logout tokens name `sub` and `sid`, and this issuer's claims map subject or session to others";
            self.error(&format!("{at}/issuer"), message);
        }
        Some(LogoutRule {
            issuer: issuer.name.clone(),
            audience: document.audience.clone().unwrap_or_else(|| issuer.audience.clone()),
            max_age,
            strict_type: document.strict_type,
        })
    }

    /// What a step-up wants, and its challenge (RFC 9470 §3).
    fn step_up(
        &mut self,
        at: &str,
        document: Option<&StepUpDocument>,
        authentication: Authentication,
    ) -> Option<StepUp> {
        let d = document?;
        let at = format!("{at}/step_up");
        if authentication == Authentication::None {
            self.error(&at, "a login comes with a token, and auth is \"none\"");
        }
        if d.acr.is_empty() && d.amr.is_empty() && d.max_age.is_none() {
            self.error(&at, "expected acr, amr or max_age");
        }
        for (key, list) in [("acr", &d.acr), ("amr", &d.amr)] {
            for (index, value) in list.iter().enumerate() {
                // They go into a quoted string, parted by blanks.
                let plain = |b: u8| b.is_ascii_graphic() && b != b'"' && b != b'\\';
                if value.is_empty() || value.len() > 256 || !value.bytes().all(plain) {
                    self.error(
                        &format!("{at}/{key}/{index}"),
                        "expected visible ASCII without blanks and quotes",
                    );
                } else if list.iter().take(index).any(|other| other == value) {
                    self.error(&format!("{at}/{key}/{index}"), "stands twice");
                }
            }
        }
        let max_age = d.max_age.map(|max_age| {
            self.duration(&format!("{at}/max_age"), Some(max_age), SECOND, SECOND * 10..=DAY * 30)
        });
        let acr = (!d.acr.is_empty()).then(|| format!("acr_values=\"{}\"", d.acr.join(" ")));
        let age = max_age.map(|max_age| format!("max_age=\"{}\"", max_age.as_secs()));
        let challenge = acr.into_iter().chain(age).collect::<Vec<_>>().join(", ").into();
        Some(StepUp { acr: d.acr.clone(), amr: d.amr.clone(), max_age, challenge })
    }

    /// That uses are recorded, and where they say why; `place` reads where.
    fn audit<P>(
        &mut self,
        at: &str,
        audit: Option<bool>,
        reason: Option<&str>,
        place: impl Fn(&str) -> Result<P, String>,
    ) -> Option<AuditRule<P>> {
        let Some(text) = reason else {
            return audit.filter(|audit| *audit).map(|_| AuditRule { reason: None });
        };
        if audit == Some(false) {
            self.error(
                &format!("{at}/audit"),
                "a reason is asked for to be recorded; expected true, or no reason",
            );
        }
        match place(text) {
            Ok(place) => Some(AuditRule { reason: Some(Reason { place, text: text.into() }) }),
            Err(message) => {
                self.error(&format!("{at}/reason"), message);
                None
            }
        }
    }

    fn certificate_rule(&mut self, common: &Common<'_>) -> Option<CertificateRule> {
        let mut names = Vec::new();
        for (index, name) in common.client_names.iter().enumerate() {
            match NamePattern::parse(name) {
                Ok(name) => names.push(name),
                Err(message) => self.error(&format!("{}/client_names/{index}", common.at), message),
            }
        }
        if common.client_certificate == CertificateDemandDocument::Required {
            return Some(CertificateRule { names });
        }
        if !common.client_names.is_empty() {
            self.error(
                &format!("{}/client_names", common.at),
                "names are of a client certificate; expected client_certificate = \"required\"",
            );
        }
        None
    }

    /// The part that routes and websockets share.
    fn rule(&mut self, common: &Common<'_>, known: &mut Known<'_>) -> Rule {
        let at = &common.at;
        let mut names = std::mem::take(&mut self.rule_names);
        let name = self.unique(at, common.name, &mut names);
        self.rule_names = names;
        let upstream = common.upstream.and_then(|wanted| {
            let found = known.upstreams.iter().position(|upstream| *upstream.name == *wanted);
            if found.is_none() {
                let names: Vec<_> = known.upstreams.iter().map(|upstream| &*upstream.name).collect();
                let message = format!("unknown upstream `{wanted}`{}", hint(wanted, &names));
                self.error(&format!("{at}/upstream"), message);
            }
            found
        });
        let authentication = match common.auth {
            AuthDocument::None => Authentication::None,
            AuthDocument::Required => Authentication::Required,
        };
        known.any_auth |= authentication == Authentication::Required;
        if authentication == Authentication::None && !common.roles.is_empty() {
            self.error(&format!("{at}/roles"), "roles come with a token, and auth is \"none\"");
        }
        if authentication == Authentication::None && common.sender != SenderDocument::Any {
            self.error(&format!("{at}/sender"), "a sender proves whose the token is, and auth is \"none\"");
        }
        let query = common.query.map(|query| {
            let limit = u64::try_from(MAX_QUERY).unwrap_or(u64::MAX);
            let max_bytes = self.size(&format!("{at}/query/max_bytes"), query.max_bytes, 2 * KIB, 1..=limit);
            QueryRule {
                max_bytes: usize::try_from(max_bytes).unwrap_or(MAX_QUERY),
                schema: self.schema(&format!("{at}/query/schema"), query.schema.as_deref()),
            }
        });
        let rates = self.rates(&format!("{at}/rates"), common.rates, authentication, false, known.rates);
        Rule {
            id: RuleId(u32::try_from(known.rules.len()).unwrap_or(u32::MAX)),
            name,
            mode: mode(common.mode),
            upstream: UpstreamIndex(upstream.unwrap_or(usize::MAX)),
            authentication,
            sender: sender(common.sender),
            action: common.action.map(Into::into),
            activity: true,
            ticket: None,
            logout: None,
            roles: common.roles.to_vec(),
            certificate: self.certificate_rule(common),
            step_up: self.step_up(at, common.step_up, authentication),
            audit: self.audit(at, common.audit, common.reason, reason_field),
            role_rules: Arc::clone(&known.role_rules),
            authorization: None,
            cost: self.cost(at, common.cost, &rates, known.rates),
            rates,
            query,
            body: BodyRule { max_bytes: 0, buffered: false },
            content_types: ContentTypes::Any,
            content_codings: ContentCodings::new(&[]),
            form: None,
            answer: None,
            body_json: None,
            body_ciphertext: None,
            body_account: None,
            penalties: Vec::new(),
            concurrency: self.concurrency_of(at, common.concurrency, authentication, known.concurrency),
            exempt: known.exempt.contains(&common.name.0),
            body_schema: None,
            tunnel: None,
        }
    }

    fn decide(
        &mut self,
        common: &Common<'_>,
        resource: Option<&ResourceDocument>,
        takes: Takes,
        known: &mut Known<'_>,
    ) -> Option<Decision> {
        let authentication = match common.auth {
            AuthDocument::None => Authentication::None,
            AuthDocument::Required => Authentication::Required,
        };
        let asker = Asker {
            at: &common.at,
            authentication,
            action: common.action,
            resource,
            path: common.path,
            name: &common.name.0,
            takes,
        };
        self.decision(&asker, known)
    }

    /// Puts a finished rule where its host, path and methods say.
    fn place(
        &mut self,
        common: &Common<'_>,
        methods: Option<&[Method]>,
        rule: Rule,
        known: &mut Known<'_>,
        routes: &mut Routes,
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
            Hosts::Several(hosts) => {
                hosts.iter().enumerate().map(|(index, host)| (format!("{at}/host/{index}"), host)).collect()
            }
        };
        for (pointer, host) in hosts {
            let host = match Host::parse(host) {
                Ok(host) => host,
                Err(message) => {
                    self.error(&pointer, message);
                    continue;
                }
            };
            if let Err(other) = routes.insert(host, &path, methods, &rule) {
                let message = format!("equal to `{}`: same host, path and method", other.name);
                self.error(&format!("{at}/path"), message);
            }
        }
    }

    fn body(&mut self, at: &str, document: &BodyDocument, known: &Known<'_>, rule: &mut Rule) {
        let looked_into =
            document.schema.is_some() || document.ciphertext.is_some() || document.json.is_some();
        let is_form = document.form.is_some();
        let is_json = looked_into || document.account.is_some();
        let buffered = is_json || document.form.as_ref().is_some_and(|form| form.hold.unwrap_or(true));
        if is_form && is_json {
            self.error(
                &format!("{at}/body/form"),
                "expected a form, or JSON (schema, ciphertext, account, json), and not both",
            );
        }
        rule.body_account = document.account.as_deref().map(|pointer| {
            let tokens = json::pointer_tokens(pointer).filter(|tokens| !tokens.is_empty());
            if tokens.is_none() {
                let message = "expected a JSON pointer (RFC 6901) to a field, such as \"/username\"";
                self.error(&format!("{at}/body/account"), message);
            }
            tokens.unwrap_or_default()
        });
        // A body that is looked into is held in memory until it is judged.
        let highest = if buffered { 16 * MIB } else { 64 * GIB };
        let max_bytes = self.size(&format!("{at}/body/max_bytes"), Some(document.max_bytes), 0, 1..=highest);
        rule.body = BodyRule { max_bytes, buffered };
        let (ciphertext, schema) = (document.ciphertext.as_deref(), document.schema.as_deref());
        rule.body_ciphertext =
            self.ciphertext_rule(&format!("{at}/body/ciphertext"), ciphertext, schema, known.ciphertexts);
        let json = format!("{at}/body/json");
        rule.body_json = match &document.json {
            Some(document) => Some(self.json(&json, document, known.json)),
            None => is_json.then_some(known.json),
        };
        rule.form =
            document.form.as_ref().map(|form| self.form(&format!("{at}/body/form"), form, max_bytes, known));
        rule.content_codings =
            self.codings(&format!("{at}/body/content_codings"), document, is_form || is_json);
        rule.body_schema = self.schema(&format!("{at}/body/schema"), document.schema.as_deref());
        rule.content_types = match &document.content_types {
            None if is_form => ContentTypes::listed(vec!["multipart/form-data".to_owned()]),
            None if is_json => ContentTypes::listed(vec!["application/json".to_owned()]),
            None => ContentTypes::Any,
            Some(_) if is_form => {
                self.error(
                    &format!("{at}/body/content_types"),
                    "a form is multipart/form-data; expected none of it here",
                );
                ContentTypes::Any
            }
            Some(list) => {
                for (index, essence) in list.iter().enumerate() {
                    let pointer = format!("{at}/body/content_types/{index}");
                    if !is_essence(essence) {
                        self.error(&pointer, NO_ESSENCE);
                    } else if is_json && !(essence.ends_with("/json") || essence.ends_with("+json")) {
                        self.error(&pointer, "a body that is looked into must be JSON");
                    }
                }
                ContentTypes::listed(list.clone())
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
            let list = if rate.mode == Mode::Shadow { &mut shadow } else { &mut enforced };
            if list.contains(&RateIndex(place)) {
                self.error(&pointer, "the rate stands twice");
                continue;
            }
            list.push(RateIndex(place));
            let by_identity = rate.per.iter().any(|key| key.is_of_identity());
            if by_identity && authentication == Authentication::None {
                self.error(&pointer, format!("`{name}` counts by what a token says, and auth is \"none\""));
            }
            if rate.per.contains(&RateKey::Header) && of_messages {
                self.error(&pointer, format!("`{name}` counts by header, and messages have none"));
            }
            if rate.per.contains(&RateKey::MessageType) && !of_messages {
                self.error(&pointer, format!("`{name}` counts by message type, and this is no message"));
            }
            if rate.per.contains(&RateKey::Socket) && !of_messages {
                self.error(&pointer, format!("`{name}` counts by socket, and this is no message"));
            }
        }
        let count = enforced.len();
        enforced.extend(shadow);
        RateList { all: enforced, enforced: count }
    }

    /// How many are taken of each rate: never more than it ever has, or nothing would pass.
    fn cost(&mut self, at: &str, cost: Option<u32>, list: &RateList, rates: &[Rate]) -> NonZeroU32 {
        let Some(cost) = cost.and_then(NonZeroU32::new) else { return NonZeroU32::MIN };
        if list.all.is_empty() {
            self.error(&format!("{at}/cost"), "there are no rates to take it from");
        }
        for rate in list.all.iter().filter_map(|&RateIndex(index)| rates.get(index)) {
            if cost > rate.burst {
                let message =
                    format!("`{}` never has so many at once; its burst is {}", rate.name, rate.burst);
                self.error(&format!("{at}/cost"), message);
            }
        }
        cost
    }

    pub(super) fn schema(&mut self, pointer: &str, name: Option<&str>) -> Option<Schema> {
        let name = name?;
        match self.schemas.compile(name) {
            Some(schema) => schema,
            None => {
                let known: Vec<_> = self.schemas.texts.keys().map(String::as_str).collect();
                self.error(pointer, format!("there is no `{name}` in the bundle{}", hint(name, &known)));
                None
            }
        }
    }

    pub(super) fn websocket(
        &mut self,
        at: String,
        document: &WebsocketDocument,
        known: &mut Known<'_>,
        routes: &mut Routes,
    ) {
        let d = document;
        let common = Common {
            at,
            name: &d.name,
            host: &d.host,
            path: &d.path,
            upstream: Some(&d.upstream),
            auth: d.auth,
            sender: d.sender,
            client_certificate: d.client_certificate,
            client_names: &d.client_names,
            roles: &d.roles,
            step_up: d.step_up.as_ref(),
            action: d.action.as_deref(),
            audit: d.audit,
            reason: None,
            rates: &d.rates,
            cost: d.cost,
            concurrency: &d.concurrency,
            query: d.query.as_ref(),
            mode: d.mode,
        };
        let mut rule = self.rule(&common, known);
        rule.tunnel = Some(self.tunnel(&common.at, d, rule.authentication, known));
        let takes = Takes::Request { query: d.query.is_some(), body: false };
        rule.authorization = self.decide(&common, d.resource.as_ref(), takes, known);
        self.place(&common, None, rule, known, routes);
    }

    fn tunnel(
        &mut self,
        at: &str,
        document: &WebsocketDocument,
        authentication: Authentication,
        known: &mut Known<'_>,
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
        let compression = match d.compression {
            CompressionDocument::Off => Compression::Off,
            CompressionDocument::Terminate => Compression::Terminate,
        };
        if d.max_inflate_ratio.is_some() && compression == Compression::Off {
            self.error(
                &format!("{at}/max_inflate_ratio"),
                "nothing is inflated; expected compression = \"terminate\"",
            );
        }
        let [to_upstream, to_client] = self.tables(at, d, inspect, authentication, known);
        let kinds = match (&d.kinds, inspect) {
            (None, InspectDocument::Json) => Kinds { text: true, binary: false },
            (None, InspectDocument::None) => Kinds { text: true, binary: true },
            (Some(kinds), _) => Kinds {
                text: kinds.contains(&KindDocument::Text),
                binary: kinds.contains(&KindDocument::Binary),
            },
        };
        let message_rates =
            self.rates(&format!("{at}/message_rates"), &d.message_rates, authentication, true, known.rates);
        TunnelRule {
            limits: self.tunnel_limits(at, d),
            http2: d.http2.unwrap_or(true),
            origins,
            subprotocols: d.subprotocols.clone(),
            subprotocol_required: d.require_subprotocol.unwrap_or(!d.subprotocols.is_empty()),
            compression,
            kinds,
            to_upstream,
            to_client,
            message_rates,
            activity: d.activity.unwrap_or(true),
            renew: self.renew(at, d, inspect, authentication),
            max_open: d
                .max_open
                .as_ref()
                .map(|it| self.max_open(&format!("{at}/max_open"), it, authentication)),
        }
    }

    fn renew(
        &mut self,
        at: &str,
        document: &WebsocketDocument,
        inspect: InspectDocument,
        authentication: Authentication,
    ) -> Option<RenewRule> {
        let d = document.renew.as_ref()?;
        let at_renew = format!("{at}/renew");
        if authentication == Authentication::None {
            self.error(&at_renew, "there is no token to renew, as auth is \"none\"");
        }
        if inspect == InspectDocument::None {
            self.error(&at_renew, "a renewal would not be seen, as nothing is looked into (inspect)");
        }
        let listed = |message: &MessageDocument| {
            message.name == d.name && message.direction != DirectionDocument::ToClient
        };
        if document.message.iter().any(listed) {
            let message =
                format!("`{}` is a message to the upstream too; expected a type of its own", d.name);
            self.error(&format!("{at_renew}/type"), message);
        }
        let pointer = d.token_pointer.as_deref().unwrap_or("/token");
        let tokens = json::pointer_tokens(pointer).filter(|tokens| !tokens.is_empty());
        if tokens.is_none() {
            let message = "expected a JSON pointer (RFC 6901) to a field, such as \"/token\"";
            self.error(&format!("{at_renew}/token_pointer"), message);
        }
        Some(RenewRule {
            name: d.name.as_str().into(),
            min_interval: self.duration(
                &format!("{at_renew}/min_interval"),
                d.min_interval,
                SECOND * 5,
                MILLISECOND * 100..=HOUR,
            ),
            on_refusal: on_refusal(d.on_refusal.unwrap_or(OnRefusalDocument::Answer)),
            pointer: tokens.unwrap_or_default(),
        })
    }

    fn max_open(&mut self, at: &str, document: &MaxOpenDocument, authentication: Authentication) -> MaxOpen {
        let d = document;
        let of_identity = d.session.is_some() || d.subject.is_some();
        if !of_identity && d.address.is_none() {
            self.error(at, "expected a limit: session, subject or address");
        }
        if authentication == Authentication::None {
            for (key, limit) in [("session", d.session), ("subject", d.subject)] {
                if limit.is_some() {
                    self.error(
                        &format!("{at}/{key}"),
                        "nobody is known by a token here, as auth is \"none\"",
                    );
                }
            }
        }
        if d.at_limit == AtLimitDocument::ReplaceOldest && !of_identity {
            let message = "only sockets of one session or subject replace each other; expected \"reject\"";
            self.error(&format!("{at}/at_limit"), message);
        }
        MaxOpen {
            session: d.session,
            subject: d.subject,
            address: d.address,
            at_limit: match d.at_limit {
                AtLimitDocument::Reject => AtLimit::Reject,
                AtLimitDocument::ReplaceOldest => AtLimit::ReplaceOldest,
            },
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
            max_inflate_ratio: d.max_inflate_ratio.unwrap_or(100),
            control_per_second: d.control_per_second.unwrap_or(10),
            idle: d.idle.map(|idle| time("idle", Some(idle), idle.0, SECOND..=DAY * 30)),
            ping_interval: time("ping_interval", d.ping_interval, SECOND * 30, SECOND..=HOUR),
            pong_timeout: time("pong_timeout", d.pong_timeout, SECOND * 20, SECOND..=HOUR),
            write_timeout: time("write_timeout", d.write_timeout, SECOND * 20, MILLISECOND * 100..=HOUR),
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
        known: &mut Known<'_>,
    ) -> [Option<MessageTable>; 2] {
        let d = document;
        let pointer = d.type_pointer.as_deref().unwrap_or("/type");
        let tokens = json::pointer_tokens(pointer).filter(|tokens| !tokens.is_empty());
        if tokens.is_none() {
            let message = "expected a JSON pointer (RFC 6901) to a field, such as \"/type\"";
            self.error(&format!("{at}/type_pointer"), message);
        }
        let json = match &d.json {
            Some(json) => self.json(&format!("{at}/json"), json, known.json),
            None => known.json,
        };
        if inspect == InspectDocument::None {
            if d.json.is_some() {
                self.error(&format!("{at}/json"), "nothing is looked into, as inspect is \"none\"");
            }
            if !d.message.is_empty() {
                self.error(&format!("{at}/message"), "messages are listed, and inspect is \"none\"");
            }
            if d.type_pointer.is_some() {
                self.error(&format!("{at}/type_pointer"), "nothing is looked into, as inspect is \"none\"");
            }
            return [None, None];
        }
        let covers = |direction: DirectionDocument, wanted| {
            direction == DirectionDocument::Both || direction == wanted
        };
        if !d.message.iter().any(|message| covers(message.direction, DirectionDocument::ToUpstream)) {
            let message =
                "inspect is \"json\", and no message to the upstream is listed: nothing could be sent";
            self.error(&format!("{at}/inspect"), message);
        }
        if d.kinds.as_ref().is_some_and(|kinds| kinds.contains(&KindDocument::Binary)) {
            self.error(&format!("{at}/kinds"), "binary messages cannot be looked into as JSON");
        }
        [DirectionDocument::ToUpstream, DirectionDocument::ToClient].map(|direction| {
            let mut types = HashMap::new();
            for (index, message) in d.message.iter().enumerate() {
                let at_message = format!("{at}/message/{index}");
                if !covers(message.direction, direction) {
                    continue;
                }
                let of_client = direction == DirectionDocument::ToUpstream;
                let message_rates = if of_client { d.message_rates.as_slice() } else { &[] };
                let mut rule =
                    self.message(&at_message, message, &d.path, message_rates, authentication, known);
                let own = message.json.as_ref();
                rule.json = own.map(|own| self.message_json(&format!("{at_message}/json"), own, json));
                if types.insert(Box::from(message.name.as_str()), rule).is_some() {
                    let message = format!("`{}` is defined twice for one direction", message.name);
                    self.error(&child(&at_message, "type"), message);
                }
            }
            (!types.is_empty()).then(|| MessageTable {
                pointer: tokens.clone().unwrap_or_default(),
                types,
                json,
                on_unknown: on_refusal(d.unknown),
            })
        })
    }

    fn message(
        &mut self,
        at: &str,
        document: &MessageDocument,
        path: &str,
        message_rates: &[String],
        authentication: Authentication,
        known: &mut Known<'_>,
    ) -> MessageRule {
        let d = document;
        let own = self.rates(&format!("{at}/rates"), &d.rates, authentication, true, known.rates);
        if let Some(index) = d.rates.iter().position(|name| message_rates.contains(name)) {
            self.error(&format!("{at}/rates/{index}"), "the rate stands in message_rates already");
        }
        // Errors in `message_rates` are reported where they stand; here they only need to resolve.
        let reported = self.errors.len();
        let of_all = self.rates(at, message_rates, authentication, true, known.rates);
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
        if d.step_up.is_some() && d.direction != DirectionDocument::ToUpstream {
            self.error(&format!("{at}/step_up"), "only for messages to the upstream");
        }
        if d.activity && d.direction == DirectionDocument::ToClient {
            self.error(&format!("{at}/activity"), "only what the user sends is activity");
        }
        for (key, is_set) in [("audit", d.audit == Some(true)), ("reason", d.reason.is_some())] {
            if is_set && d.direction != DirectionDocument::ToUpstream {
                self.error(&format!("{at}/{key}"), "only for messages to the upstream");
            }
        }
        let rates = RateList { all, enforced };
        let authorization = self.decision(
            &Asker {
                at,
                authentication,
                action: d.action.as_deref(),
                resource: d.resource.as_ref(),
                path,
                name: &d.name,
                takes: Takes::Message,
            },
            known,
        );
        MessageRule {
            name: d.name.as_str().into(),
            json: None,
            ciphertext: self.ciphertext_rule(
                &format!("{at}/ciphertext"),
                d.ciphertext.as_deref(),
                d.schema.as_deref(),
                known.ciphertexts,
            ),
            schema: self.schema(&format!("{at}/schema"), d.schema.as_deref()),
            action: d.action.as_deref().map(Into::into),
            authorization,
            audit: self.audit(at, d.audit, d.reason.as_deref(), |text| {
                let tokens = json::pointer_tokens(text).filter(|tokens| !tokens.is_empty());
                tokens.ok_or_else(|| {
                    "expected a JSON pointer (RFC 6901) to a field, such as \"/reason\"".into()
                })
            }),
            cost: self.cost(at, d.cost, &rates, known.rates),
            rates,
            step_up: self.step_up(at, d.step_up.as_ref(), authentication),
            activity: d.activity,
            on_refusal: on_refusal(d.on_refusal),
        }
    }
}

/// A field that says why. What it says is written down, so it must be none that holds a secret, or has a meaning of its own.
fn reason_field(text: &str) -> Result<HeaderName, String> {
    let name = HeaderName::from_bytes(text.as_bytes())
        .ok()
        .filter(|name| name.as_str().starts_with("x-") && !name.as_str().starts_with(IDENTITY_HEADER_PREFIX));
    name.ok_or_else(|| {
        format!("expected the name of a field of its own, such as \"X-Access-Reason\": it begins with X-, and not with {IDENTITY_HEADER_PREFIX}")
    })
}

const fn on_refusal(document: OnRefusalDocument) -> OnRefusal {
    match document {
        OnRefusalDocument::Close => OnRefusal::Close,
        OnRefusalDocument::Answer => OnRefusal::Answer,
    }
}
