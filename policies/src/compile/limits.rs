//! `[[penalty]]`, `[[concurrency]]`, `[overload]` and `[lists]`.

use std::collections::HashMap;

use super::{Compiler, DAY, GIB, HOUR, MIB, MINUTE, SECOND, mode};
use crate::document::{
    ConcurrencyDocument, ListsDefaultDocument, ListsDocument, OverloadDocument, PenaltyDocument,
    PenaltyKeyDocument, PenaltyRefuseDocument,
};
use crate::policy::{
    Concurrency, ConcurrencyIndex, ListsPolicy, OverloadPolicy, Penalty, PenaltyIndex, RateKey, Source,
};
use crate::rule::{Authentication, Rule};
use crate::source::hint;

impl Compiler<'_> {
    pub(super) fn penalty(
        &mut self,
        at: &str,
        document: &PenaltyDocument,
        names: &mut HashMap<String, String>,
    ) -> Penalty {
        let d = document;
        let per_address = d.per.contains(&PenaltyKeyDocument::Address);
        let per_account = d.per.contains(&PenaltyKeyDocument::Account);
        if d.per.len() > usize::from(per_address) + usize::from(per_account) {
            self.error(&format!("{at}/per"), "a key stands twice");
        }
        if d.routes.is_empty() && !d.tokens {
            self.error(at, "nothing counts; expected routes, or tokens = true");
        }
        if d.tokens && per_account {
            self.error(&format!("{at}/tokens"), "a refused token is nobody's; expected per = [\"address\"]");
        }
        if d.statuses.is_some() && d.routes.is_empty() {
            self.error(&format!("{at}/statuses"), "there are no routes whose answers count");
        }
        let refuses_connections = d.refuse == PenaltyRefuseDocument::Connections;
        if refuses_connections && per_account {
            self.error(
                &format!("{at}/refuse"),
                "connections come from addresses; expected per = [\"address\"]",
            );
        }
        let block = self.duration(&format!("{at}/block"), d.block, SECOND * 30, SECOND..=DAY);
        Penalty {
            name: self.unique(at, &d.name, names),
            per_address,
            per_account,
            statuses: d.statuses.clone().unwrap_or_else(|| vec![401]),
            tokens: d.tokens,
            after: d.after.unwrap_or(5),
            window: self.duration(&format!("{at}/window"), d.window, MINUTE * 15, SECOND..=DAY * 30),
            block,
            max_block: self.duration(
                &format!("{at}/max_block"),
                d.max_block,
                HOUR.max(block),
                block..=DAY * 30,
            ),
            refuses_connections,
            ipv6_prefix: d.ipv6_prefix.unwrap_or(64),
            mode: mode(d.mode),
        }
    }

    /// The penalties under which a finished route's answers count.
    pub(super) fn penalties_of(&mut self, rule: &Rule, penalties: &[PenaltyDocument]) -> Vec<PenaltyIndex> {
        let mut found = Vec::new();
        for (index, penalty) in penalties.iter().enumerate() {
            let Some(place) = penalty.routes.iter().position(|name| **name == *rule.name) else { continue };
            let pointer = format!("/penalty/{index}/routes/{place}");
            if penalty.per.contains(&PenaltyKeyDocument::Account) && rule.body_account.is_none() {
                let message =
                    format!("`{}` does not say where its account is; expected body.account there", rule.name);
                self.error(&pointer, message);
            }
            if rule.ticket.is_some() {
                self.error(&pointer, "no upstream answers there");
            }
            found.push(PenaltyIndex(index));
        }
        found
    }

    /// Sees that penalties name routes that are there.
    pub(super) fn check_penalties(&mut self, penalties: &[PenaltyDocument], routes: &[&str]) {
        for (index, penalty) in penalties.iter().enumerate() {
            for (place, name) in penalty.routes.iter().enumerate() {
                let pointer = format!("/penalty/{index}/routes/{place}");
                if !routes.contains(&name.as_str()) {
                    self.error(&pointer, format!("unknown route `{name}`{}", hint(name, routes)));
                } else if penalty.routes.iter().take(place).any(|other| other == name) {
                    self.error(&pointer, "the route stands twice");
                }
            }
        }
    }

    pub(super) fn concurrency(
        &mut self,
        at: &str,
        document: &ConcurrencyDocument,
        names: &mut HashMap<String, String>,
    ) -> Concurrency {
        let d = document;
        let (per, header) = self.rate_keys(at, &d.per, d.header.as_deref());
        if per.iter().any(|key| matches!(key, RateKey::MessageType | RateKey::Socket)) {
            self.error(
                &format!("{at}/per"),
                "messages are not counted; not by \"message-type\" or \"socket\"",
            );
        }
        Concurrency {
            name: self.unique(at, &d.name, names),
            per,
            header,
            ipv6_prefix: d.ipv6_prefix.unwrap_or(64),
            limit: d.limit,
            mode: mode(d.mode),
        }
    }

    /// Resolves names of limits, and sees that their keys will have a value.
    pub(super) fn concurrency_of(
        &mut self,
        at: &str,
        names: &[String],
        authentication: Authentication,
        limits: &[Concurrency],
    ) -> Vec<ConcurrencyIndex> {
        let mut found = Vec::new();
        for (index, name) in names.iter().enumerate() {
            let pointer = format!("{at}/concurrency/{index}");
            let Some((place, limit)) = limits.iter().enumerate().find(|(_, limit)| *limit.name == **name)
            else {
                let known: Vec<_> = limits.iter().map(|limit| &*limit.name).collect();
                self.error(&pointer, format!("unknown concurrency limit `{name}`{}", hint(name, &known)));
                continue;
            };
            if found.contains(&ConcurrencyIndex(place)) {
                self.error(&pointer, "the limit stands twice");
            }
            if limit.per.iter().any(|key| key.is_of_identity()) && authentication == Authentication::None {
                self.error(&pointer, format!("`{name}` counts by what a token says, and auth is \"none\""));
            }
            found.push(ConcurrencyIndex(place));
        }
        found
    }

    pub(super) fn overload(&mut self, document: &OverloadDocument, routes: &[&str]) -> OverloadPolicy {
        let d = document;
        for (index, name) in d.exempt.iter().enumerate() {
            if !routes.contains(&name.as_str()) {
                let message = format!("unknown route `{name}`{}", hint(name, routes));
                self.error(&format!("/overload/exempt/{index}"), message);
            }
        }
        let max_memory =
            d.max_memory.map(|size| self.size("/overload/max_memory", Some(size), 0, 16 * MIB..=999 * GIB));
        OverloadPolicy {
            max_memory,
            max_group_memory: d.max_group_memory,
            max_in_flight: d.max_in_flight,
            max_accept_rate: d.max_accept_rate,
            shed_at: d.shed_at.unwrap_or(80),
        }
    }

    pub(super) fn lists(&mut self, document: &ListsDocument) -> ListsPolicy {
        let mut sources = |key: &str, texts: &[String]| -> Vec<Source> {
            let numbered = texts.iter().enumerate();
            numbered.map(|(index, text)| self.source(&format!("/lists/{key}/{index}"), text)).collect()
        };
        let (deny, allow) = (sources("deny", &document.deny), sources("allow", &document.allow));
        let denies_others = document.default == ListsDefaultDocument::Deny;
        if denies_others && allow.is_empty() {
            self.error("/lists/default", "nobody could connect; expected a list in allow");
        }
        ListsPolicy { deny, allow, denies_others }
    }
}
