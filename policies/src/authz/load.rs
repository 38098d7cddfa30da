//! `authz.cedar` and `authz.cedarschema` → policies that hold against their schema; what a rule asks → a decision.

use std::borrow::Cow;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::str;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cedar_policy::{
    EntityId, EntityUid, Policy, PolicyId, PolicySet, Request, Schema, SchemaFragment, ValidationMode,
    Validator,
};
use miette::Diagnostic;

use crate::authz::inspect::{Facts, Inspection};
use crate::authz::resource::{Field, Found, ResourceRule};
use crate::authz::table::Table;
use crate::authz::{Action, Authz, Decision, Judge, Sample, TlsFacts, TypeNames, context, entities, full};
use crate::bundle::Bundle;
use crate::errors::PolicyError;
use crate::source::hint;

/// Most policies of a bundle.
const MAX_POLICIES: usize = 1_000;

/// Where a policy stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Where {
    pub(crate) file: String,
    pub(crate) line: u32,
}

/// A file of the bundle, as text.
struct Source<'b> {
    name: &'b str,
    text: &'b str,
}

impl Source<'_> {
    fn error(&self, offset: usize, message: String) -> PolicyError {
        PolicyError::at(self.name, self.text, offset, String::new(), message)
    }

    /// What Cedar found wrong, at the first place that it points to.
    fn diagnostic(&self, diagnostic: &dyn Diagnostic) -> PolicyError {
        let label = diagnostic.labels().and_then(|mut labels| labels.next());
        let mut message = diagnostic.to_string();
        if let Some(said) = label.as_ref().and_then(|label| label.label()) {
            message = format!("{message}: {said}");
        }
        if let Some(help) = diagnostic.help() {
            message = format!("{message}; {help}");
        }
        self.error(label.map_or(0, |label| label.offset()), message)
    }
}

impl Authz {
    /// The bundle's Cedar policies: `authz.cedar` and `authz.cedarschema`, and more of both in `policy.d/`. `None`
    /// where there are none, or they are wrong.
    pub(crate) fn read(bundle: &Bundle) -> (Option<Arc<Self>>, Vec<PolicyError>) {
        let mut errors = Vec::new();
        let mut texts = Vec::new();
        for (name, bytes) in &bundle.files {
            let overlay = name.strip_prefix("policy.d/").is_some_and(|rest| !rest.contains('/'));
            if !(name.starts_with("authz.") || overlay) {
                continue;
            }
            match (name.ends_with(".cedar") || name.ends_with(".cedarschema"), str::from_utf8(bytes)) {
                (false, _) => {}
                (true, Ok(text)) => texts.push(Source { name, text }),
                (true, Err(error)) => {
                    let valid = bytes.get(..error.valid_up_to()).unwrap_or_default();
                    let source = Source { name, text: str::from_utf8(valid).unwrap_or_default() };
                    errors.push(source.error(valid.len(), "not UTF-8".into()));
                }
            }
        }
        if texts.is_empty() {
            return (None, errors);
        }
        let (schemas, policies): (Vec<_>, Vec<_>) =
            texts.into_iter().partition(|source| source.name.ends_with(".cedarschema"));
        for (name, files) in [("authz.cedar", &policies), ("authz.cedarschema", &schemas)] {
            if files.is_empty() {
                let message = "there is no such file; Cedar's policies and their schema come together";
                errors.push(PolicyError::at(name, "", 0, String::new(), message.into()));
            }
        }
        let schema = read_schema(&schemas, &mut errors);
        let read = read_policies(&policies, &mut errors);
        let Some(schema) = schema.filter(|_| errors.is_empty()) else { return (None, errors) };
        match Self::validated(schema, read, &policies, &mut errors) {
            Some(authz) if errors.is_empty() => (Some(Arc::new(authz)), errors),
            _ => (None, errors),
        }
    }

    fn validated(
        schema: Schema,
        read: Read,
        sources: &[Source<'_>],
        errors: &mut Vec<PolicyError>,
    ) -> Option<Self> {
        let names = TypeNames {
            user: "User".parse().ok()?,
            role: "Role".parse().ok()?,
            action: "Action".parse().ok()?,
        };
        let validator = Validator::new(schema);
        let result = validator.validate(&read.policies, ValidationMode::Strict);
        let mut fault = |id: &PolicyId, diagnostic: &dyn Diagnostic| {
            let id: &str = id.as_ref();
            let source = read.files.get(id).and_then(|file| sources.get(*file));
            if let Some(source) = source.or(sources.first()) {
                errors.push(source.diagnostic(diagnostic));
            }
        };
        result.validation_errors().for_each(|error| fault(error.policy_id(), error));
        // What Cedar warns of (a policy that can never apply, text that looks like other text) is a mistake here.
        result.validation_warnings().for_each(|warning| fault(warning.policy_id(), warning));
        let schema = validator.schema().clone();
        let action_entities = match schema.action_entities() {
            Ok(entities) => entities,
            Err(error) => {
                let message = full(&error);
                errors.extend(sources.first().map(|source| source.error(0, message)));
                return None;
            }
        };
        let mut actions: Vec<_> =
            schema.actions().map(|action| AsRef::<str>::as_ref(action.id()).to_owned()).collect();
        actions.sort_unstable();
        let applies = read.policies.policies().map(|policy| {
            let cases = policy.get_valid_request_envs(&schema);
            (policy.clone(), cases.map(|case| (case.action().clone(), case.resource().clone())).collect())
        });
        Some(Self {
            applies: applies.collect(),
            schema,
            policies: read.policies,
            places: read.places,
            actions,
            action_entities,
            names,
        })
    }

    /// What a rule asks. Answers for the same action on the same type of resource share one table (`shared`).
    ///
    /// # Errors
    /// What is wrong, and whether it is the action (otherwise the resource).
    pub(crate) fn decision(
        self: &Arc<Self>,
        action_name: &str,
        resource: ResourceRule,
        shared: &mut SharedJudges,
    ) -> Result<Decision, (Culprit, String)> {
        let uid = EntityUid::from_type_name_and_id(self.names.action.clone(), EntityId::new(action_name));
        let action = Action { entity: self.action_entities.get(&uid).cloned(), uid };
        let Some(kinds) = self.schema.resources_for_action(&action.uid) else {
            let known: Vec<_> = self.actions.iter().map(String::as_str).collect();
            let message = format!("the schema has no action `{action_name}`{}", hint(action_name, &known));
            return Err((Culprit::Action, message));
        };
        let kinds: Vec<_> = kinds.collect();
        if !kinds.contains(&&resource.kind) {
            let known: Vec<_> = kinds.iter().map(ToString::to_string).collect();
            let known: Vec<_> = known.iter().map(String::as_str).collect();
            let kind = resource.kind.to_string();
            let message = format!("`{action_name}` does not apply to a {kind}{}", hint(&kind, &known));
            return Err((Culprit::Resource, message));
        }
        self.check(&action, &resource).map_err(|message| (Culprit::Resource, message))?;
        let fixed = if let Field::Fixed(id) = &resource.id { Some(id.clone()) } else { None };
        let mut applying: Vec<_> = Vec::new();
        for (policy, cases) in &self.applies {
            if cases.contains(&(action.uid.clone(), resource.kind.clone())) {
                applying.push(policy);
            }
        }
        let key = |of_action: bool| JudgeKey {
            policies: applying.iter().map(|policy| policy.id().to_string()).collect(),
            action: of_action.then(|| action_name.to_owned()),
            kind: resource.kind.to_string(),
            attributes: (resource.department.is_some(), resource.owner.is_some()),
            fixed: fixed
                .as_deref()
                .map(|id| if self.names_resources() { id.to_owned() } else { String::new() }),
        };
        let known = shared.0.get(&key(false)).or_else(|| shared.0.get(&key(true)));
        let judge = match known {
            Some(judge) => Arc::clone(judge),
            None => {
                let judge = self.judge(&action, &applying, &resource, fixed.as_deref());
                let judge = Arc::new(judge.map_err(|message| (Culprit::Action, message))?);
                shared.0.insert(key(judge.inspection.asks_action), Arc::clone(&judge));
                judge
            }
        };
        Ok(Decision {
            serial: NEXT_SERIAL.fetch_add(1, Ordering::Relaxed),
            authz: Arc::clone(self),
            action,
            action_name: action_name.into(),
            resource,
            judge,
        })
    }

    /// Whether any policy names a single resource.
    fn names_resources(&self) -> bool {
        let named = |id: &EntityUid| {
            let kind = id.type_name();
            *kind != self.names.user && *kind != self.names.role && *kind != self.names.action
        };
        self.policies.policies().any(|policy| policy.entity_literals().iter().any(named))
    }

    fn judge(
        &self,
        action: &Action,
        applying: &[&Policy],
        resource: &ResourceRule,
        fixed: Option<&str>,
    ) -> Result<Judge, String> {
        // INVARIANT: ids are unique, as they come from one set.
        let policies =
            PolicySet::from_policies(applying.iter().copied().cloned()).map_err(|error| error.to_string())?;
        let inspection = Inspection::of(&policies, fixed.is_some());
        let mut judge = Judge { policies, inspection, table: None, privileged: true };
        if judge.inspection.obstacle.is_none() {
            let decide =
                |sample: &Sample<'_>| judge.evaluate(&self.names, action, &resource.kind, sample).allowed;
            judge.table = Table::build(&judge.inspection.dimensions, &example(resource), decide);
            if judge.table.is_none() {
                judge.inspection.obstacle = Some("can tell too many cases apart".to_owned());
            }
        }
        judge.privileged = judge.table.as_ref().is_none_or(|table| !table.allows_without_role());
        Ok(judge)
    }

    /// Holds an example of what will be asked against the schema: policies were validated on the promise that all
    /// requests keep it.
    fn check(&self, action: &Action, resource: &ResourceRule) -> Result<(), String> {
        let example = &example(resource);
        let (roles, amr) = (["example".to_owned()], ["example".to_owned()]);
        let sample = Sample {
            subject: "example",
            issuer: "example",
            roles: &roles,
            department: Some("example"),
            acr: Some("example"),
            amr: &amr,
            login_age: Some(0),
            token_age: Some(0),
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            tls: TlsFacts::default(),
            now: 0,
            resource: example,
        };
        // With what is optional, and without.
        let bare = Sample { department: None, acr: None, login_age: None, token_age: None, ..sample.clone() };
        for sample in [sample, bare] {
            let all = Facts::all();
            let (user, resource, _) =
                entities(&self.names, action, &resource.kind, &sample, &all, Some(&self.schema))?;
            let context = context(&sample, &all)?;
            Request::new(user, action.uid.clone(), resource, context, Some(&self.schema))
                .map_err(|error| full(&error))?;
        }
        Ok(())
    }
}

static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);

/// What a decision cannot be made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Culprit {
    Action,
    Resource,
}

/// Judges so far, by all that a table depends on.
#[derive(Default)]
pub(crate) struct SharedJudges(HashMap<JudgeKey, Arc<Judge>>);

#[derive(PartialEq, Eq, Hash)]
struct JudgeKey {
    policies: Vec<String>,
    /// Where a policy asks for it.
    action: Option<String>,
    kind: String,
    /// Whether the resource has a department, and an owner.
    attributes: (bool, bool),
    /// The resource's id where it never changes; empty where no policy names any.
    fixed: Option<String>,
}

/// A resource as the rule will find it.
fn example(rule: &ResourceRule) -> Found<'static> {
    let id = if let Field::Fixed(id) = &rule.id { id.to_string() } else { "example".to_owned() };
    Found {
        id: Cow::Owned(id),
        department: rule.department.as_ref().map(|_| Cow::Borrowed("example")),
        owner: rule.owner.as_ref().map(|_| Cow::Borrowed("example")),
    }
}

fn read_schema(sources: &[Source<'_>], errors: &mut Vec<PolicyError>) -> Option<Schema> {
    let mut fragments = Vec::new();
    for source in sources {
        match SchemaFragment::from_cedarschema_str(source.text) {
            Ok((fragment, warnings)) => {
                errors.extend(warnings.map(|warning| source.diagnostic(&warning)));
                fragments.push(fragment);
            }
            Err(error) => errors.push(source.diagnostic(&error)),
        }
    }
    if fragments.len() != sources.len() || fragments.is_empty() {
        return None;
    }
    match Schema::from_schema_fragments(fragments) {
        Ok(schema) => Some(schema),
        Err(error) => {
            // It does not say which file; with one alone its place counts.
            errors.extend(match sources {
                [only] => Some(only.diagnostic(&error)),
                _ => sources.first().map(|source| source.error(0, full(&error))),
            });
            None
        }
    }
}

/// Policies by their `@id`.
struct Read {
    policies: PolicySet,
    places: HashMap<String, Where>,
    /// Index of each policy's file.
    files: HashMap<String, usize>,
}

fn read_policies(sources: &[Source<'_>], errors: &mut Vec<PolicyError>) -> Read {
    let mut read = Read { policies: PolicySet::new(), places: HashMap::new(), files: HashMap::new() };
    for (index, source) in sources.iter().enumerate() {
        let parsed: PolicySet = match source.text.parse() {
            Ok(parsed) => parsed,
            Err(error) => {
                let error: cedar_policy::ParseErrors = error;
                errors.extend(error.iter().map(|error| source.diagnostic(error)));
                continue;
            }
        };
        if let Some(template) = parsed.templates().next() {
            let message =
                format!("a template, with {}; nothing here links templates", template.slots().count());
            errors.push(source.error(0, message));
        }
        for policy in parsed.policies() {
            let offset = offset_of(policy);
            let Some(id) = policy.annotation("id").filter(|id| !id.is_empty() && id.len() <= 128) else {
                let message =
                    "expected @id(\"…\"): what records and `sealgate policy explain` call the policy";
                errors.push(source.error(offset, message.to_owned()));
                continue;
            };
            let place = source.error(offset, String::new());
            let place = Where { file: place.file, line: place.line };
            if let Some(first) = read.places.get(id) {
                let message = format!("`{id}` is defined twice; first at {}:{}", first.file, first.line);
                errors.push(source.error(offset, message));
                continue;
            }
            if read.places.len() == MAX_POLICIES {
                errors.push(source.error(offset, format!("more than {MAX_POLICIES} policies")));
                return read;
            }
            read.places.insert(id.to_owned(), place);
            read.files.insert(id.to_owned(), index);
            if let Err(error) = read.policies.add(policy.new_id(PolicyId::new(id))) {
                errors.push(source.error(offset, error.to_string()));
            }
        }
    }
    read
}

/// Where a policy begins in its file.
fn offset_of(policy: &Policy) -> usize {
    policy.as_ref().loc().map_or(0, |loc| loc.start())
}
