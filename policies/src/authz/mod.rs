//! Who may do what: Cedar policies of the bundle, decided by table where the facts they touch are few, evaluated and
//! remembered where they are not.
//!
//! What Cedar is told, and nothing else; the names are the vocabulary of `authz.cedarschema`:
//!
//! | entity or record | attribute | type | |
//! |---|---|---|---|
//! | principal `User::"SUBJECT"`, in `Role::"…"` | `issuer` | String | `iss` |
//! | | `department` | String, optional | the token's |
//! | | `acr` | String, optional | authentication context class |
//! | | `amr` | Set of String | authentication methods |
//! | | `login_age` | Long, optional | seconds since `auth_time` |
//! | action `Action::"…"` | | | the rule's or message's `action` |
//! | resource, of the rule's type | `department` | String | where the rule says from where |
//! | | `owner` | User | where the rule says from where |
//! | context | `address` | ipaddr | the client's |
//! | | `tls_version` | String | "1.2" or "1.3" |
//! | | `client_certificate` | Bool | whether the connection has a verified one |
//! | | `token_age` | Long, optional | seconds since `iat` |
//! | | `now` | datetime | to the second |
//! | | `hour`, `weekday` | Long | UTC; 0 to 23, and 1 (Monday) to 7 |
//!
//! Nothing is allowed that no policy permits; a `forbid` wins; a policy that errs is a denial.

mod cache;
mod inspect;
mod load;
mod resource;
mod table;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

use cedar_policy::{
    Authorizer, Context, Decision as CedarDecision, Entities, Entity, EntityId, EntityTypeName, EntityUid,
    PolicySet, Request, RestrictedExpression, Schema,
};

pub use cache::DecisionCache;
use inspect::Fact;
use inspect::{Facts, Inspection};
use load::Where;
pub(crate) use load::{Culprit, SharedJudges};
pub(crate) use resource::{Field, Found, Places, ResourceRule};
use table::Table;

use crate::identity::Identity;
use crate::verdict::DecidingPolicy;

/// What is known of the TLS connection that a request came over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TlsFacts {
    /// Whether it is TLS 1.3; otherwise 1.2.
    pub tls13: bool,
    /// Whether the client has shown a certificate that was verified.
    pub client_certificate: bool,
}

/// The Cedar policies of a bundle, validated against its schema.
pub(crate) struct Authz {
    pub(crate) schema: Schema,
    pub(crate) policies: PolicySet,
    /// What each policy may apply to: action and type of resource. Cedar's validator finds it false for all others.
    pub(crate) applies: Vec<(cedar_policy::Policy, HashSet<(EntityUid, EntityTypeName)>)>,
    /// Where each policy stands.
    pub(crate) places: HashMap<String, Where>,
    /// Ids of all actions of the schema.
    pub(crate) actions: Vec<String>,
    /// Actions with the groups that they are in.
    pub(crate) action_entities: Entities,
    pub(crate) names: TypeNames,
}

pub(crate) struct TypeNames {
    pub(crate) user: EntityTypeName,
    pub(crate) role: EntityTypeName,
    pub(crate) action: EntityTypeName,
}

impl std::fmt::Debug for Authz {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authz").field("policies", &self.policies.num_of_policies()).finish_non_exhaustive()
    }
}

/// Everything that a decision may depend on, in the words of Cedar.
#[derive(Debug, Clone)]
pub(crate) struct Sample<'a> {
    pub(crate) subject: &'a str,
    pub(crate) issuer: &'a str,
    pub(crate) roles: &'a [String],
    pub(crate) department: Option<&'a str>,
    pub(crate) acr: Option<&'a str>,
    pub(crate) amr: &'a [String],
    pub(crate) login_age: Option<i64>,
    pub(crate) token_age: Option<i64>,
    pub(crate) address: IpAddr,
    pub(crate) tls: TlsFacts,
    /// Unix seconds.
    pub(crate) now: u64,
    pub(crate) resource: &'a Found<'a>,
}

impl<'a> Sample<'a> {
    pub(crate) fn of(
        identity: &'a Identity,
        address: IpAddr,
        tls: TlsFacts,
        now: u64,
        resource: &'a Found<'a>,
    ) -> Self {
        let age = |since: Option<u64>| {
            since.map(|since| i64::try_from(now.saturating_sub(since)).unwrap_or(i64::MAX))
        };
        Self {
            subject: &identity.subject,
            issuer: &identity.issuer,
            roles: &identity.roles,
            department: identity.department.as_deref(),
            acr: identity.acr.as_deref(),
            amr: &identity.amr,
            login_age: age(identity.auth_time),
            token_age: age(identity.issued_at),
            address,
            tls,
            now,
            resource,
        }
    }

    /// UTC, 0 to 23.
    pub(crate) fn hour(&self) -> u8 {
        u8::try_from(self.now / 3_600 % 24).unwrap_or_default()
    }

    /// UTC, 1 for Monday to 7 for Sunday (ISO 8601). 1 January 1970 was a Thursday.
    pub(crate) fn weekday(&self) -> u8 {
        u8::try_from((self.now / 86_400 + 3) % 7 + 1).unwrap_or(1)
    }
}

/// What one rule, or one type of message, asks of the policies. Made at load.
pub(crate) struct Decision {
    /// This one's and no other's, over all policies of the process: what was decided under one counts under no other.
    serial: u64,
    authz: Arc<Authz>,
    action: Action,
    pub(crate) action_name: Arc<str>,
    pub(crate) resource: ResourceRule,
    judge: Arc<Judge>,
}

/// An action, and the groups that it is in.
#[derive(Clone)]
struct Action {
    uid: EntityUid,
    entity: Option<Entity>,
}

/// How an action on a type of resource is decided; the same for all actions that the same policies may apply to, unless one
/// of them asks for the action.
pub(crate) struct Judge {
    /// Those of the policies that may apply.
    policies: PolicySet,
    inspection: Inspection,
    /// Where the facts are few.
    table: Option<Table>,
    /// Whether it takes a role, or more, to be permitted.
    privileged: bool,
}

impl std::fmt::Debug for Decision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decision")
            .field("action", &self.action_name)
            .field("resource", &self.resource)
            .field("tabulated", &self.is_tabulated())
            .finish_non_exhaustive()
    }
}

/// What Cedar said, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Evaluated {
    pub(crate) allowed: bool,
    /// Ids of the policies that decided; none where nothing permits.
    pub(crate) policies: Vec<String>,
    /// What went wrong while evaluating: then it is a denial, whatever else.
    pub(crate) errors: Vec<String>,
}

impl Decision {
    /// Whether everything is known at load, and the answer is looked up.
    pub(crate) fn is_tabulated(&self) -> bool {
        self.judge.table.is_some()
    }

    /// Whether it takes more than a token to be permitted.
    pub(crate) fn is_privileged(&self) -> bool {
        self.judge.privileged
    }

    /// Whether the answer depends on the time.
    pub(crate) fn needs_time(&self) -> bool {
        self.judge.inspection.touched.iter().any(|fact| {
            matches!(fact, Fact::LoginAge | Fact::TokenAge | Fact::Now | Fact::Hour | Fact::Weekday)
        })
    }

    /// The answer, where it can be looked up: takes no memory.
    pub(crate) fn look_up(&self, sample: &Sample<'_>) -> Option<bool> {
        self.judge.table.as_ref().map(|table| table.allows(sample))
    }

    /// The answer: looked up, remembered or evaluated.
    pub(crate) fn allows(
        &self,
        sample: &Sample<'_>,
        identity: &Arc<Identity>,
        cache: &DecisionCache,
    ) -> bool {
        self.look_up(sample).unwrap_or_else(|| {
            let touched = &self.judge.inspection.touched;
            cache.decide(self.serial, identity, touched, sample, || self.evaluate(sample).allowed)
        })
    }

    /// Asks Cedar, whatever the table says.
    pub(crate) fn evaluate(&self, sample: &Sample<'_>) -> Evaluated {
        self.judge.evaluate(&self.authz.names, &self.action, &self.resource.kind, sample)
    }

    /// Why there is no table.
    pub(crate) fn obstacle(&self) -> Option<&str> {
        self.judge.inspection.obstacle.as_deref()
    }

    /// One of the policies.
    pub(crate) fn policy(&self, id: &str) -> DecidingPolicy {
        let policy = self.authz.policies.policy(&cedar_policy::PolicyId::new(id));
        let place = self.authz.places.get(id);
        DecidingPolicy {
            id: id.to_owned(),
            effect: match policy.map(cedar_policy::Policy::effect) {
                Some(cedar_policy::Effect::Permit) => "permit",
                Some(cedar_policy::Effect::Forbid) | None => "forbid",
            },
            reason: policy.and_then(|policy| policy.annotation("reason")).map(str::to_owned),
            file: place.map(|place| place.file.clone()).unwrap_or_default(),
            line: place.map(|place| place.line).unwrap_or_default(),
        }
    }

    /// The facts that make the table, or that a remembered answer is remembered by.
    pub(crate) fn facts(&self) -> Vec<&'static str> {
        self.judge.inspection.touched.iter().map(|fact| fact.name()).collect()
    }
}

impl Judge {
    fn evaluate(
        &self,
        names: &TypeNames,
        action: &Action,
        kind: &EntityTypeName,
        sample: &Sample<'_>,
    ) -> Evaluated {
        let touched = &self.inspection.touched;
        let asked = entities(names, action, kind, sample, touched, None);
        let outcome = asked.and_then(|(user, resource, entities)| {
            let context = context(sample, touched)?;
            let request = Request::new(user, action.uid.clone(), resource, context, None)
                .map_err(|error| error.to_string())?;
            Ok(Authorizer::new().is_authorized(&request, &self.policies, &entities))
        });
        match outcome {
            Ok(response) => {
                let errors: Vec<_> = response.diagnostics().errors().map(|error| error.to_string()).collect();
                Evaluated {
                    allowed: response.decision() == CedarDecision::Allow && errors.is_empty(),
                    policies: response.diagnostics().reason().map(ToString::to_string).collect(),
                    errors,
                }
            }
            Err(error) => Evaluated { allowed: false, policies: Vec::new(), errors: vec![error] },
        }
    }
}

/// Principal, resource and action as Cedar wants them, with what the policies look at.
fn entities(
    names: &TypeNames,
    action: &Action,
    kind: &EntityTypeName,
    sample: &Sample<'_>,
    touched: &Facts,
    schema: Option<&Schema>,
) -> Result<(EntityUid, EntityUid, Entities), String> {
    let uid =
        |name: &EntityTypeName, id: &str| EntityUid::from_type_name_and_id(name.clone(), EntityId::new(id));
    let text = |text: &str| RestrictedExpression::new_string(text.to_owned());
    let mut attributes = HashMap::new();
    let mut add = |fact: Fact, value: Option<RestrictedExpression>| {
        if let Some(value) = value.filter(|_| touched.contains(&fact)) {
            attributes.insert(fact.name().to_owned(), value);
        }
    };
    add(Fact::Issuer, Some(text(sample.issuer)));
    add(Fact::Department, sample.department.map(text));
    add(Fact::Acr, sample.acr.map(text));
    add(Fact::Amr, Some(RestrictedExpression::new_set(sample.amr.iter().map(|method| text(method)))));
    add(Fact::LoginAge, sample.login_age.map(RestrictedExpression::new_long));
    let roles: HashSet<_> = sample.roles.iter().map(|role| uid(&names.role, role)).collect();
    let user = uid(&names.user, sample.subject);
    let principal = Entity::new(user.clone(), attributes, roles).map_err(|error| error.to_string())?;

    let found = sample.resource;
    let department = found.department.as_deref().map(|it| ("department".to_owned(), text(it)));
    let owner = found
        .owner
        .as_deref()
        .map(|it| ("owner".to_owned(), RestrictedExpression::new_entity_uid(uid(&names.user, it))));
    let resource_uid = uid(kind, &found.id);
    let attributes = department.into_iter().chain(owner).collect();
    let resource =
        Entity::new(resource_uid.clone(), attributes, HashSet::new()).map_err(|error| error.to_string())?;
    let all = [principal, resource].into_iter().chain(action.entity.clone());
    let entities = Entities::from_entities(all, schema).map_err(|error| full(&error))?;
    Ok((user, resource_uid, entities))
}

fn context(sample: &Sample<'_>, touched: &Facts) -> Result<Context, String> {
    let mut pairs = Vec::new();
    let mut add = |fact: Fact, value: &dyn Fn() -> RestrictedExpression| {
        if touched.contains(&fact) {
            pairs.push((fact.name().to_owned(), value()));
        }
    };
    add(Fact::Address, &|| RestrictedExpression::new_ip(sample.address.to_string()));
    let version = if sample.tls.tls13 { "1.3" } else { "1.2" };
    add(Fact::TlsVersion, &|| RestrictedExpression::new_string(version.to_owned()));
    add(Fact::ClientCertificate, &|| RestrictedExpression::new_bool(sample.tls.client_certificate));
    if let Some(age) = sample.token_age {
        add(Fact::TokenAge, &|| RestrictedExpression::new_long(age));
    }
    add(Fact::Now, &|| RestrictedExpression::new_datetime(rfc3339(sample.now)));
    add(Fact::Hour, &|| RestrictedExpression::new_long(sample.hour().into()));
    add(Fact::Weekday, &|| RestrictedExpression::new_long(sample.weekday().into()));
    Context::from_pairs(pairs).map_err(|error| error.to_string())
}

/// Unix seconds as Cedar reads dates; what it cannot read is an error there, and so a denial.
fn rfc3339(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 1 March 0000, in eras of 400 years (Hinnant, "chrono-compatible low-level date algorithms").
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3_600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// An error with all that it stems from.
fn full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests;
