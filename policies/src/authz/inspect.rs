//! Which facts the policies for an action look at, and whether only finitely many cases of them can be told apart.
//!
//! A policy can be tabulated if every fact in it stands in a test with literals (`principal.acr == "mfa"`), or in one
//! between two facts (`principal.department == resource.department`): then the answer depends on the outcomes of these
//! tests alone, and one example of each case stands for all others. Where a fact is used in any other way, Cedar is
//! asked each time.

use cedar_policy::PolicySet;
use serde_json::Value;

/// What a decision may depend on besides action and type of resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Fact {
    Roles,
    Subject,
    Issuer,
    Department,
    Acr,
    Amr,
    LoginAge,
    Address,
    TlsVersion,
    ClientCertificate,
    TokenAge,
    Now,
    Hour,
    Weekday,
    /// The resource's id.
    Resource,
    ResourceDepartment,
    ResourceOwner,
}

impl Fact {
    /// As Cedar's policies call it.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Roles => "roles",
            Self::Subject => "principal",
            Self::Issuer => "issuer",
            Self::Department => "department",
            Self::Acr => "acr",
            Self::Amr => "amr",
            Self::LoginAge => "login_age",
            Self::Address => "address",
            Self::TlsVersion => "tls_version",
            Self::ClientCertificate => "client_certificate",
            Self::TokenAge => "token_age",
            Self::Now => "now",
            Self::Hour => "hour",
            Self::Weekday => "weekday",
            Self::Resource => "resource",
            Self::ResourceDepartment => "resource.department",
            Self::ResourceOwner => "resource.owner",
        }
    }

    const PRINCIPAL: [Self; 5] = [Self::Issuer, Self::Department, Self::Acr, Self::Amr, Self::LoginAge];
    const CONTEXT: [Self; 7] = [
        Self::Address,
        Self::TlsVersion,
        Self::ClientCertificate,
        Self::TokenAge,
        Self::Now,
        Self::Hour,
        Self::Weekday,
    ];
}

/// Facts that policies touch, each once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Facts(Vec<Fact>);

impl Facts {
    pub(crate) fn contains(&self, fact: &Fact) -> bool {
        self.0.contains(fact)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = Fact> + '_ {
        self.0.iter().copied()
    }

    fn add(&mut self, fact: Fact) {
        if !self.contains(&fact) {
            self.0.push(fact);
        }
    }

    /// All there are.
    pub(crate) fn all() -> Self {
        let mut all = Self::default();
        let single =
            [Fact::Roles, Fact::Subject, Fact::Resource, Fact::ResourceDepartment, Fact::ResourceOwner];
        single.into_iter().chain(Fact::PRINCIPAL).chain(Fact::CONTEXT).for_each(|fact| all.add(fact));
        all
    }
}

/// One fact's cases that policies can tell apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Dimension {
    /// Whether the principal has the role.
    Role(Box<str>),
    /// Whether the login used the method.
    Method(Box<str>),
    /// None, one of these, or another.
    Acr(Vec<Box<str>>),
    /// None, or between which two of these ages in seconds, sorted.
    LoginAge(Vec<i64>),
    /// The principal has none, the resource's, or another.
    Department,
    /// Whether the resource is the principal's.
    Owner,
    TlsVersion,
    ClientCertificate,
    Hour,
    Weekday,
}

/// What came of it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Inspection {
    pub(crate) touched: Facts,
    pub(crate) dimensions: Vec<Dimension>,
    /// Whether a policy asks for the action, other than in its head.
    pub(crate) asks_action: bool,
    /// Why a table cannot be made.
    pub(crate) obstacle: Option<String>,
}

impl Inspection {
    /// Looks at all policies of a set. `resource_fixed`: its id never changes.
    pub(crate) fn of(policies: &PolicySet, resource_fixed: bool) -> Self {
        let mut inspector = Inspector { found: Self::default(), resource_fixed };
        for policy in policies.policies() {
            match policy.to_json() {
                Ok(json) => inspector.policy(&json),
                Err(error) => inspector.anything(&format!("the policy has no JSON form: {error}")),
            }
        }
        inspector.found
    }
}

struct Inspector {
    found: Inspection,
    resource_fixed: bool,
}

impl Inspector {
    fn policy(&mut self, policy: &Value) {
        match policy.get("principal") {
            Some(scope) => self.principal_scope(scope),
            None => self.anything("a policy without principal"),
        }
        match policy.get("resource").and_then(|scope| scope.get("op")).and_then(Value::as_str) {
            Some("All") => {}
            Some("is") if policy.pointer("/resource/in").is_none() => {}
            // Resources are in nothing but themselves.
            _ => self.resource_id(),
        }
        // The action's scope was looked at when the policies were chosen.
        for condition in policy.get("conditions").and_then(Value::as_array).into_iter().flatten() {
            match condition.get("body") {
                Some(body) => self.expression(body),
                None => self.anything("a condition without body"),
            }
        }
    }

    fn principal_scope(&mut self, scope: &Value) {
        let entity = match scope.get("op").and_then(Value::as_str) {
            Some("All") => return,
            Some("is") => match scope.get("in") {
                None => return,
                Some(within) => within.get("entity"),
            },
            Some("in") => scope.get("entity"),
            _ => None,
        };
        match entity.and_then(role) {
            Some(role) => self.role(role),
            None => self.opaque(Fact::Subject, "names a principal that is no role"),
        }
    }

    fn expression(&mut self, expression: &Value) {
        let Some((operator, argument)) = node(expression) else {
            return self.anything("an expression of an unknown form");
        };
        let side = |name: &str| argument.get(name).unwrap_or(&Value::Null);
        let (left, right) = (side("left"), side("right"));
        match operator {
            "Value" => {}
            "Var" => match argument.as_str() {
                Some("action") => self.found.asks_action = true,
                Some("resource") => self.resource_id(),
                Some("principal") => self.opaque(Fact::Subject, "compares the principal itself"),
                _ => self.anything("uses the context as a whole"),
            },
            "." => match (variable(left), argument.get("attr").and_then(Value::as_str)) {
                (Some(variable), Some(name)) => self.attribute(variable, name),
                (Some(_), None) => self.anything("an attribute of an unknown form"),
                (None, _) => self.expression(left),
            },
            "has" => match (variable(left), argument.get("attr").and_then(Value::as_str)) {
                (Some(variable), Some(name)) => self.presence(variable, name),
                (Some(_), None) => self.anything("an attribute of an unknown form"),
                (None, _) => self.expression(left),
            },
            "is" if argument.get("in").is_none() && variable(left).is_some_and(|it| it != "action") => {}
            "in" if variable(left) == Some("principal") && roles(right).is_some() => {
                roles(right).into_iter().flatten().for_each(|name| self.role(name));
            }
            "==" | "!=" if self.equality(left, right) || self.equality(right, left) => {}
            "<" | "<=" | ">" | ">=" if self.age(left, right) || self.age(right, left) => {}
            "contains" if self.contains(left, right) => {}
            "containsAny" | "containsAll" if is(left, "principal", "amr") && texts(right).is_some() => {
                texts(right).into_iter().flatten().for_each(|method| self.method(method));
            }
            _ => self.children(argument),
        }
    }

    fn children(&mut self, argument: &Value) {
        match argument {
            Value::Object(map) => {
                for child in map.values() {
                    match child {
                        Value::Object(_) => self.expression(child),
                        Value::Array(_) => self.children(child),
                        // Names of attributes and types, patterns.
                        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| match item {
                Value::Object(_) => self.expression(item),
                Value::Array(_) => self.children(item),
                // Parts of a pattern.
                Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
            }),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }

    /// A fact on the left that is compared to something on the right of which the outcome alone matters.
    fn equality(&mut self, left: &Value, right: &Value) -> bool {
        if is(left, "principal", "acr")
            && let Some(text) = text(right)
        {
            self.acr(&[text]);
        } else if is(left, "principal", "department") && is(right, "resource", "department") {
            self.found.touched.add(Fact::ResourceDepartment);
            self.department();
        } else if is(left, "resource", "owner") && variable(right) == Some("principal") {
            self.found.touched.add(Fact::ResourceOwner);
            self.found.touched.add(Fact::Subject);
            self.dimension(Dimension::Owner);
        } else {
            return false;
        }
        true
    }

    fn age(&mut self, left: &Value, right: &Value) -> bool {
        let number = node(right).filter(|(operator, _)| *operator == "Value").and_then(|it| it.1.as_i64());
        match number {
            Some(number) if is(left, "principal", "login_age") => {
                // `<` and `<=` fall to either side of two of them.
                self.login_age(&[number, number.saturating_add(1)]);
                true
            }
            _ => false,
        }
    }

    fn contains(&mut self, left: &Value, right: &Value) -> bool {
        if is(left, "principal", "amr")
            && let Some(text) = text(right)
        {
            self.method(text);
            return true;
        }
        match texts(left) {
            Some(classes) if is(right, "principal", "acr") => {
                self.acr(&classes);
                true
            }
            _ => false,
        }
    }

    /// An attribute that stands in none of the tests above.
    fn attribute(&mut self, variable: &str, name: &str) {
        match (variable, name) {
            ("context", "tls_version") => self.finite(Fact::TlsVersion, Dimension::TlsVersion),
            ("context", "client_certificate") => {
                self.finite(Fact::ClientCertificate, Dimension::ClientCertificate);
            }
            ("context", "hour") => self.finite(Fact::Hour, Dimension::Hour),
            ("context", "weekday") => self.finite(Fact::Weekday, Dimension::Weekday),
            ("resource", "department") => self.opaque(Fact::ResourceDepartment, "uses resource.department"),
            ("resource", "owner") => self.opaque(Fact::ResourceOwner, "uses resource.owner"),
            _ => {
                // What is never there is an error to evaluate, whoever asks.
                if let Some(fact) = fact(variable, name) {
                    self.opaque(fact, &format!("uses {variable}.{name}"));
                }
            }
        }
    }

    /// `has`. What a resource has is the same for every request of a rule.
    fn presence(&mut self, variable: &str, name: &str) {
        match (variable, fact(variable, name)) {
            (_, Some(Fact::Department)) => self.department(),
            (_, Some(Fact::Acr)) => self.acr(&[]),
            (_, Some(Fact::LoginAge)) => self.login_age(&[]),
            (_, Some(Fact::TokenAge)) => self.opaque(Fact::TokenAge, "uses context.token_age"),
            // Always there, if only the policies ask.
            (_, Some(fact)) => match fact {
                Fact::TlsVersion | Fact::ClientCertificate | Fact::Hour | Fact::Weekday => {
                    self.attribute(variable, name);
                }
                _ => self.found.touched.add(fact),
            },
            (_, None) => {}
        }
    }

    fn role(&mut self, name: &str) {
        self.finite(Fact::Roles, Dimension::Role(name.into()));
    }

    fn method(&mut self, name: &str) {
        self.finite(Fact::Amr, Dimension::Method(name.into()));
    }

    fn department(&mut self) {
        self.finite(Fact::Department, Dimension::Department);
    }

    fn acr(&mut self, classes: &[&str]) {
        self.found.touched.add(Fact::Acr);
        let known = self.found.dimensions.iter_mut().find_map(|dimension| match dimension {
            Dimension::Acr(known) => Some(known),
            _ => None,
        });
        let known = match known {
            Some(known) => known,
            None => {
                return self.dimension(Dimension::Acr(sorted(classes.iter().map(|&it| it.into()).collect())));
            }
        };
        known.extend(classes.iter().map(|&class| Box::from(class)));
        *known = sorted(std::mem::take(known));
    }

    fn login_age(&mut self, ages: &[i64]) {
        self.found.touched.add(Fact::LoginAge);
        // No login is younger than nothing.
        let ages = ages.iter().copied().filter(|age| *age > 0);
        let known = self.found.dimensions.iter_mut().find_map(|dimension| match dimension {
            Dimension::LoginAge(known) => Some(known),
            _ => None,
        });
        match known {
            Some(known) => {
                known.extend(ages);
                *known = sorted(std::mem::take(known));
            }
            None => self.dimension(Dimension::LoginAge(sorted(ages.collect()))),
        }
    }

    fn resource_id(&mut self) {
        if self.resource_fixed {
            self.found.touched.add(Fact::Resource);
        } else {
            self.opaque(Fact::Resource, "compares the resource itself");
        }
    }

    fn finite(&mut self, fact: Fact, dimension: Dimension) {
        self.found.touched.add(fact);
        self.dimension(dimension);
    }

    fn dimension(&mut self, dimension: Dimension) {
        if !self.found.dimensions.contains(&dimension) {
            self.found.dimensions.push(dimension);
        }
    }

    fn opaque(&mut self, fact: Fact, why: &str) {
        self.found.touched.add(fact);
        self.found.obstacle.get_or_insert_with(|| why.to_owned());
    }

    /// Something that this does not understand: it may look at anything.
    fn anything(&mut self, why: &str) {
        self.found.touched = Facts::all();
        self.found.asks_action = true;
        self.found.obstacle.get_or_insert_with(|| why.to_owned());
    }
}

fn sorted<T: Ord>(mut values: Vec<T>) -> Vec<T> {
    values.sort_unstable();
    values.dedup();
    values
}

/// The one operator of an expression, and what it is applied to.
fn node(expression: &Value) -> Option<(&str, &Value)> {
    let map = expression.as_object().filter(|map| map.len() == 1)?;
    map.iter().next().map(|(operator, argument)| (operator.as_str(), argument))
}

fn variable(expression: &Value) -> Option<&str> {
    let (operator, name) = node(expression)?;
    if operator == "Var" { name.as_str() } else { None }
}

fn is(expression: &Value, of: &str, attribute: &str) -> bool {
    node(expression).is_some_and(|(operator, argument)| {
        operator == "."
            && argument.get("left").and_then(variable) == Some(of)
            && argument.get("attr").and_then(Value::as_str) == Some(attribute)
    })
}

fn text(expression: &Value) -> Option<&str> {
    node(expression).filter(|(operator, _)| *operator == "Value").and_then(|(_, value)| value.as_str())
}

/// A set of texts.
fn texts(expression: &Value) -> Option<Vec<&str>> {
    let (operator, items) = node(expression)?;
    let items = items.as_array().filter(|_| operator == "Set" || operator == "Value")?;
    items.iter().map(|item| item.as_str().or_else(|| text(item))).collect()
}

/// The id of a role.
fn role(entity: &Value) -> Option<&str> {
    let entity = entity.get("__entity").unwrap_or(entity);
    let kind = entity.get("type").and_then(Value::as_str)?;
    if kind == "Role" { entity.get("id").and_then(Value::as_str) } else { None }
}

/// A role, or a set of them.
fn roles(expression: &Value) -> Option<Vec<&str>> {
    let (operator, argument) = node(expression)?;
    match operator {
        "Value" => role(argument).map(|role| vec![role]),
        "Set" => argument.as_array()?.iter().map(|item| role(node(item)?.1)).collect(),
        _ => None,
    }
}

fn fact(variable: &str, name: &str) -> Option<Fact> {
    let known: &[Fact] = match variable {
        "principal" => &Fact::PRINCIPAL,
        "context" => &Fact::CONTEXT,
        _ => &[],
    };
    known.iter().copied().find(|fact| fact.name() == name)
}
