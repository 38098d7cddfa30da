//! `[shared]`.

use std::sync::Arc;

use super::{Compiler, HOUR, MILLISECOND, SECOND, endpoint};
use crate::document::{DpopOnLossDocument, OnLossDocument, SharedDocument, SharedModeDocument};
use crate::policy::{Endpoint, OnLoss, SharedMode, SharedPolicy, SharedServer};

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
            on_loss: match d.on_loss {
                None | Some(OnLossDocument::Warn) => OnLoss::Warn,
                Some(OnLossDocument::NoNewPrivileged) => OnLoss::NoNewPrivileged,
                Some(OnLossDocument::FailClosed) => OnLoss::FailClosed,
            },
            dpop_fails_closed: d.dpop_on_loss == Some(DpopOnLossDocument::Deny),
            tickets_fail_closed: d.tickets_on_loss == Some(DpopOnLossDocument::Deny),
        }
    }
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
