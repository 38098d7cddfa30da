//! `action` and `resource` of rules and messages → what the Cedar policies are asked.

use std::sync::Arc;

use crate::authz::{Authz, Culprit, Decision, Field, ResourceRule};
use crate::bundle::Bundle;
use crate::compile::Compiler;
use crate::compile::rules::Known;
use crate::document::ResourceDocument;
use crate::json;
use crate::path;
use crate::rule::Authentication;

/// The bundle's Cedar policies.
pub(super) enum AuthzState {
    /// There are none: rules decide by their roles.
    None,
    /// They are wrong, and that is reported.
    Broken,
    Ready(Arc<Authz>),
}

impl AuthzState {
    pub(super) fn of(bundle: &Bundle, authz: Option<Arc<Authz>>) -> Self {
        match authz {
            Some(authz) => Self::Ready(authz),
            None if bundle.files.keys().any(|name| is_cedar(name)) => Self::Broken,
            None => Self::None,
        }
    }
}

fn is_cedar(name: &str) -> bool {
    name.ends_with(".cedar") || name.ends_with(".cedarschema")
}

/// What asks.
pub(super) struct Asker<'d> {
    pub(super) at: &'d str,
    pub(super) authentication: Authentication,
    pub(super) action: Option<&'d str>,
    pub(super) resource: Option<&'d ResourceDocument>,
    /// Pattern of the rule's path.
    pub(super) path: &'d str,
    /// The rule's name, or the message's type.
    pub(super) name: &'d str,
    pub(super) takes: Takes,
}

/// Where values may be looked for besides the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Takes {
    Request { query: bool, body: bool },
    Message,
}

impl Compiler<'_> {
    pub(super) fn decision(&mut self, asker: &Asker<'_>, known: &mut Known<'_>) -> Option<Decision> {
        let at = asker.at;
        let authz = match &known.authz {
            AuthzState::Ready(authz) => Arc::clone(authz),
            AuthzState::Broken => return None,
            AuthzState::None => {
                if asker.resource.is_some() {
                    self.error(&format!("{at}/resource"), "there is no authz.cedar that would decide on it");
                }
                return None;
            }
        };
        if asker.authentication == Authentication::None {
            if asker.resource.is_some() {
                let message = "nobody is known by a token here, as auth is \"none\"";
                self.error(&format!("{at}/resource"), message);
            }
            return None;
        }
        let Some(action) = asker.action else {
            match (asker.takes, asker.resource) {
                (Takes::Message, None) => {}
                // Default deny: what nothing decides on must not be open to whoever has a token.
                (Takes::Request { .. }, None) => {
                    self.error(at, "expected an action: authz.cedar decides on all that wants a token");
                }
                (_, Some(_)) => self.error(&format!("{at}/resource"), "expected an action too"),
            }
            return None;
        };
        let errors = self.errors.len();
        let resource = self.resource(asker)?;
        if self.errors.len() > errors {
            return None;
        }
        match authz.decision(action, resource, &mut known.judges) {
            Ok(decision) => Some(decision),
            Err((culprit, message)) => {
                let key = match (culprit, asker.resource) {
                    (Culprit::Resource, Some(_)) => "resource",
                    (Culprit::Action, _) | (Culprit::Resource, None) => "action",
                };
                self.error(&format!("{at}/{key}"), message);
                None
            }
        }
    }

    fn resource(&mut self, asker: &Asker<'_>) -> Option<ResourceRule> {
        let own = Field::Fixed(asker.name.into());
        let Some(document) = asker.resource else {
            let kind = "Route".parse().ok()?;
            return Some(ResourceRule { kind, id: own, department: None, owner: None });
        };
        let at = format!("{}/resource", asker.at);
        let kind = match document.kind.parse() {
            Ok(kind) if !["User", "Role", "Action"].contains(&document.kind.as_str()) => Some(kind),
            Ok(_) => {
                self.error(&format!("{at}/type"), "who asks, and what for, is no resource");
                None
            }
            Err(_) => {
                self.error(&format!("{at}/type"), "expected an entity type, such as \"Room\"");
                None
            }
        };
        let mut field = |key: &str, text: &Option<String>| {
            text.as_ref().map(|text| match field(text, asker) {
                Ok(field) => field,
                Err(message) => {
                    self.error(&format!("{at}/{key}"), message);
                    Field::Fixed("".into())
                }
            })
        };
        let id = field("id", &document.id);
        let (department, owner) =
            (field("department", &document.department), field("owner", &document.owner));
        Some(ResourceRule { kind: kind?, id: id.unwrap_or(own), department, owner })
    }
}

fn field(text: &str, asker: &Asker<'_>) -> Result<Field, String> {
    let expected =
        || "expected \"path:NAME\", \"query:NAME\", \"body:/POINTER\", \"message:/POINTER\" or \"is:TEXT\"";
    let (place, rest) =
        text.split_once(':').filter(|(_, rest)| !rest.is_empty()).ok_or_else(|| expected().to_owned())?;
    let pointer = || {
        let tokens = json::pointer_tokens(rest).filter(|tokens| !tokens.is_empty());
        tokens.ok_or_else(|| "expected a JSON pointer (RFC 6901) to a field, such as \"/room\"".to_owned())
    };
    match (place, asker.takes) {
        ("is", _) => Ok(Field::Fixed(rest.into())),
        ("path", _) => path::parameter(asker.path, rest)
            .map(Field::Path)
            .ok_or_else(|| format!("the path has no `{{{rest}}}`")),
        ("query", Takes::Request { query: true, .. }) => Ok(Field::Query(rest.into())),
        ("query", Takes::Request { query: false, .. }) => Err("the rule takes no query".into()),
        ("body", Takes::Request { body: true, .. }) => pointer().map(Field::Body),
        ("body", Takes::Request { body: false, .. }) => {
            Err("the body is not looked into; expected a schema or ciphertext for it".into())
        }
        ("message", Takes::Message) => pointer().map(Field::Message),
        ("message", Takes::Request { .. }) => Err("only for messages".into()),
        ("query" | "body", Takes::Message) => {
            Err("a message has no query and no body; expected \"message:/POINTER\"".into())
        }
        _ => Err(expected().to_owned()),
    }
}
