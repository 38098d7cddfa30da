//! `[shared]` and `[[revocation_source]]`: revocations that are made elsewhere.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use super::{Compiler, HOUR, MILLISECOND, SECOND, endpoint};
use crate::document::{
    DpopOnLossDocument, OnLossDocument, RevocationSourceDocument, SharedDocument, SharedModeDocument,
};
use crate::policy::{
    Endpoint, Issuer, OnLoss, RevocationSource, SharedMode, SharedPolicy, SharedServer, Upstream,
};

impl Compiler<'_> {
    pub(super) fn shared(&mut self, document: &SharedDocument) -> SharedPolicy {
        let d = document;
        let mut servers = Vec::new();
        for (index, text) in d.redis.iter().enumerate() {
            match server(text) {
                Some(server) => servers.push(server),
                None => self.error(
                    &format!("/shared/redis/{index}"),
                    "expected \"redis://HOST:PORT\", \"rediss://HOST:PORT\" or \"unix:/PATH\"; user and password have keys of \
                     their own",
                ),
            }
        }
        let all_parsed = servers.len() == d.redis.len();
        let mode = d.mode.unwrap_or(SharedModeDocument::Single);
        if mode == SharedModeDocument::Single && d.redis.len() > 1 {
            self.error("/shared/redis", "one server; for several, expected mode \"sentinel\" or \"cluster\"");
        }
        let sockets = servers.iter().any(|server| matches!(server.endpoint, Endpoint::Unix(_)));
        if mode != SharedModeDocument::Single && sockets {
            self.error("/shared/redis", "sentinels and cluster nodes are reached by host and port");
        }
        if servers.iter().any(|it| it.tls) && servers.iter().any(|it| !it.tls) {
            self.error("/shared/redis", "expected \"redis:\" for all servers, or \"rediss:\" for all");
        }
        if d.ca.is_some() && all_parsed && !servers.iter().any(|server| server.tls) {
            self.error("/shared/ca", "only for \"rediss:\" servers");
        }
        match (mode, &d.service) {
            (SharedModeDocument::Sentinel, None) => {
                self.error("/shared/mode", "sentinels want the master's name in `service`");
            }
            (SharedModeDocument::Single | SharedModeDocument::Cluster, Some(_)) => {
                self.error("/shared/service", "only for mode \"sentinel\"");
            }
            _ => {}
        }
        if d.username.is_some() && d.password.is_none() {
            self.error("/shared/username", "a user wants a `password`");
        }
        let mut source = |key: &str, text: &Option<String>| {
            text.as_ref().map(|text| self.source(&format!("/shared/{key}"), text))
        };
        let (ca, username, password) =
            (source("ca", &d.ca), source("username", &d.username), source("password", &d.password));
        let deadline =
            self.duration("/shared/deadline", d.deadline, MILLISECOND * 50, MILLISECOND * 5..=SECOND * 2);
        let contact_timeout =
            self.duration("/shared/contact_timeout", d.contact_timeout, SECOND * 10, SECOND * 2..=HOUR);
        SharedPolicy {
            servers,
            mode: match mode {
                SharedModeDocument::Single => SharedMode::Single,
                SharedModeDocument::Sentinel => {
                    SharedMode::Sentinel { service: d.service.clone().unwrap_or_default() }
                }
                SharedModeDocument::Cluster => SharedMode::Cluster,
            },
            ca,
            username,
            password,
            key_prefix: d.key_prefix.as_deref().map_or_else(|| Arc::from("sealgate"), Arc::from),
            deadline,
            contact_timeout,
            on_loss: on_loss(d.on_loss),
            dpop_fails_closed: d.dpop_on_loss == Some(DpopOnLossDocument::Deny),
            tickets_fail_closed: d.tickets_on_loss == Some(DpopOnLossDocument::Deny),
        }
    }

    pub(super) fn revocation_source(
        &mut self,
        at: &str,
        document: &RevocationSourceDocument,
        issuers: &[Issuer],
        upstreams: &[Upstream],
        names: &mut HashMap<String, String>,
    ) -> RevocationSource {
        let d = document;
        match upstreams.iter().find(|upstream| *upstream.name == *d.upstream) {
            None => {
                self.error(&format!("{at}/upstream"), format!("there is no [[upstream]] `{}`", d.upstream));
            }
            Some(upstream) if !is_private(upstream) => self.error(
                &format!("{at}/upstream"),
                "whoever speaks for it ends sessions: expected an [[upstream]] over TLS, a unix socket or loopback",
            ),
            Some(_) => {}
        }
        if d.path.contains(['?', '#']) || d.path.parse::<http::uri::PathAndQuery>().is_err() {
            self.error(&format!("{at}/path"), "expected a path without query");
        }
        let mut allowed = Vec::new();
        for (index, name) in d.issuers.iter().flatten().enumerate() {
            match issuers.iter().find(|issuer| *issuer.name == **name) {
                Some(issuer) => allowed.push(issuer.issuer.clone()),
                None => {
                    self.error(&format!("{at}/issuers/{index}"), format!("there is no [[issuer]] `{name}`"))
                }
            }
        }
        if d.issuers.is_none() {
            allowed = issuers.iter().map(|issuer| issuer.issuer.clone()).collect();
        }
        RevocationSource {
            name: self.unique(at, &d.name, names),
            upstream: d.upstream.as_str().into(),
            path: d.path.clone(),
            issuers: allowed,
            token: d.token.as_ref().map(|token| self.source(&format!("{at}/token"), token)),
            contact_timeout: self.duration(
                &format!("{at}/contact_timeout"),
                d.contact_timeout,
                SECOND * 30,
                SECOND * 4..=HOUR,
            ),
            on_loss: on_loss(d.on_loss),
        }
    }
}

fn on_loss(document: Option<OnLossDocument>) -> OnLoss {
    match document {
        None | Some(OnLossDocument::Warn) => OnLoss::Warn,
        Some(OnLossDocument::NoNewPrivileged) => OnLoss::NoNewPrivileged,
        Some(OnLossDocument::FailClosed) => OnLoss::FailClosed,
    }
}

/// Whether nobody on a network can speak in its place.
fn is_private(upstream: &Upstream) -> bool {
    let here = |endpoint: &Endpoint| match endpoint {
        Endpoint::Unix(_) => true,
        Endpoint::Tcp { host, .. } => {
            host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
        }
    };
    upstream.tls.is_some() || upstream.endpoints.iter().all(here)
}

/// Reads a server's address. A user or a password in it is refused: policies are shown to people.
fn server(text: &str) -> Option<SharedServer> {
    let (scheme, rest) = text.split_once(':')?;
    let (kind, tls) = match scheme {
        "redis" => ("tcp", false),
        "rediss" => ("tcp", true),
        "unix" => ("unix", false),
        _ => return None,
    };
    let rest = if kind == "tcp" { rest.strip_prefix("//")?.trim_end_matches('/') } else { rest };
    let (endpoint, _) = endpoint(&format!("{kind}:{rest}"))?;
    Some(SharedServer { endpoint, tls })
}
