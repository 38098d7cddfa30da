//! The bundle's TOML files as one document: merged, variables replaced, every value with its place.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::str;

use jsonschema::error::{TypeKind, ValidationErrorKind};
use serde_json::{Map, Number, Value};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::bundle::Bundle;
use crate::document;
use crate::errors::PolicyError;

/// Longest string after variables were replaced: variables that use each other may grow fast.
const MAX_STRING: usize = 64 * 1024;

/// The merged document.
pub(crate) struct Sources<'b> {
    files: Vec<(&'b str, &'b str)>,
    places: HashMap<String, Place>,
    /// The document as JSON; pointers into it are what errors are reported by.
    pub(crate) value: Value,
}

/// Where a key and its value stand: file, and byte offsets in it.
#[derive(Debug, Clone, Copy)]
struct Place {
    file: usize,
    key: usize,
    value: usize,
}

/// Reads `policy.toml` and `policy.d/*.toml`.
///
/// # Errors
/// Every syntax error; or every double definition and bad variable.
pub(crate) fn load<'b>(
    bundle: &'b Bundle,
    variables: &BTreeMap<String, String>,
) -> Result<Sources<'b>, Vec<PolicyError>> {
    let mut errors = Vec::new();
    let mut files = Vec::new();
    let mut tables = Vec::new();
    let overlay = |name: &str| {
        name.strip_prefix("policy.d/").is_some_and(|rest| rest.ends_with(".toml") && !rest.contains('/'))
    };
    for (name, bytes) in &bundle.files {
        if name != "policy.toml" && !overlay(name) {
            continue;
        }
        let text = match str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => {
                let text =
                    str::from_utf8(bytes.get(..error.valid_up_to()).unwrap_or_default()).unwrap_or_default();
                errors.push(PolicyError::at(name, text, text.len(), String::new(), "not UTF-8".into()));
                continue;
            }
        };
        let (table, faults) = DeTable::parse_recoverable(text);
        errors.extend(faults.into_iter().map(|fault| {
            let offset = fault.span().map_or(0, |span| span.start);
            PolicyError::at(name, text, offset, String::new(), fault.message().to_owned())
        }));
        files.push((name.as_str(), text));
        tables.push(table.into_inner());
    }
    // The main file first, so that overlays are what is called the second definition.
    let main_first = |(index, (name, _)): &(usize, &(&str, &str))| (*name != "policy.toml", *index);
    let mut order: Vec<_> = files.iter().enumerate().collect();
    order.sort_by_key(main_first);
    let order: Vec<_> = order.into_iter().map(|(index, _)| index).collect();
    if !bundle.files.contains_key("policy.toml") {
        errors.push(PolicyError::at("policy.toml", "", 0, String::new(), "there is no such file".into()));
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    let sources = Sources { files, places: HashMap::new(), value: Value::Null };
    let mut merger = Merger { sources, errors, variables: Variables::default() };
    for &file in &order {
        if let Some(table) = tables.get(file) {
            merger.define_variables(table);
        }
    }
    merger.variables.given.clone_from(variables);
    let mut document = Map::new();
    for &file in &order {
        if let Some(table) = tables.get(file) {
            merger.merge(file, table, &mut document);
        }
    }
    merger.sources.value = Value::Object(document);
    if merger.errors.is_empty() { Ok(merger.sources) } else { Err(merger.errors) }
}

struct Merger<'b> {
    sources: Sources<'b>,
    errors: Vec<PolicyError>,
    variables: Variables,
}

impl Merger<'_> {
    fn define_variables(&mut self, table: &DeTable<'_>) {
        let Some(DeValue::Table(variables)) = table.get("variables").map(Spanned::get_ref) else {
            return;
        };
        for (key, value) in variables {
            if let DeValue::String(text) = value.get_ref() {
                self.variables.defined.entry(key.get_ref().to_string()).or_insert_with(|| text.to_string());
            }
        }
    }

    fn merge(&mut self, file: usize, table: &DeTable<'_>, into: &mut Map<String, Value>) {
        for (key, value) in table {
            let name = key.get_ref().as_ref();
            let pointer = child("", name);
            let first = self.sources.places.get(&pointer).copied();
            let place = Place { file, key: key.span().start, value: value.span().start };
            match (into.get_mut(name), value.get_ref()) {
                (None, _) => {
                    let value = self.convert(&pointer, place, value.get_ref());
                    into.insert(name.to_owned(), value);
                }
                (Some(Value::Array(items)), DeValue::Array(more)) => {
                    for item in more {
                        let pointer = child(&pointer, &items.len().to_string());
                        let offset = item.span().start;
                        let place = Place { file, key: offset, value: offset };
                        items.push(self.convert(&pointer, place, item.get_ref()));
                    }
                }
                (Some(Value::Object(known)), DeValue::Table(more)) if name == "variables" => {
                    let mut merged = std::mem::take(known);
                    for (key, value) in more {
                        let pointer = child(&pointer, key.get_ref());
                        let place = Place { file, key: key.span().start, value: value.span().start };
                        if let Some(first) = self.sources.places.get(&pointer).copied() {
                            self.twice(&pointer, place, first);
                        } else {
                            let value = self.convert(&pointer, place, value.get_ref());
                            merged.insert(key.get_ref().to_string(), value);
                        }
                    }
                    into.insert(name.to_owned(), Value::Object(merged));
                }
                (Some(Value::Number(known)), DeValue::Integer(again))
                    if name == "version" && known.to_string() == again.to_string() => {}
                (Some(_), _) => {
                    if let Some(first) = first {
                        self.twice(&pointer, place, first);
                    }
                }
            }
        }
    }

    fn twice(&mut self, pointer: &str, place: Place, first: Place) {
        let earlier = self.sources.at(first.file, first.key, String::new(), String::new());
        let message = format!("defined twice; first at {}:{}", earlier.file, earlier.line);
        let key = self.sources.key(pointer);
        self.errors.push(self.sources.at(place.file, place.key, key, message));
    }

    /// Turns TOML into JSON, remembers where it stood and replaces variables.
    fn convert(&mut self, pointer: &str, place: Place, value: &DeValue<'_>) -> Value {
        self.sources.places.insert(pointer.to_owned(), place);
        let fault = |merger: &mut Self, message: String| {
            let key = pointer.trim_start_matches('/').replace('/', ".");
            merger.errors.push(merger.sources.at(place.file, place.value, key, message));
            Value::Null
        };
        match value {
            DeValue::String(text) => match self.variables.replace(text) {
                Ok(text) => Value::String(text),
                Err(message) => fault(self, message),
            },
            DeValue::Integer(integer) => match i64::from_str_radix(integer.as_str(), integer.radix()) {
                Ok(integer) => Value::Number(integer.into()),
                Err(_) => fault(self, "the integer is out of range".into()),
            },
            DeValue::Float(float) => match float.as_str().parse().ok().and_then(Number::from_f64) {
                Some(float) => Value::Number(float),
                None => fault(self, "expected a finite number".into()),
            },
            DeValue::Boolean(boolean) => Value::Bool(*boolean),
            DeValue::Datetime(_) => fault(self, "dates have no place in a policy".into()),
            DeValue::Array(items) => {
                let mut array = Vec::new();
                for (index, item) in items.iter().enumerate() {
                    let offset = item.span().start;
                    let place = Place { file: place.file, key: offset, value: offset };
                    array.push(self.convert(&child(pointer, &index.to_string()), place, item.get_ref()));
                }
                Value::Array(array)
            }
            DeValue::Table(table) => {
                let mut object = Map::new();
                for (key, value) in table {
                    let name = key.get_ref();
                    let place = Place { file: place.file, key: key.span().start, value: value.span().start };
                    let value = self.convert(&child(pointer, name), place, value.get_ref());
                    object.insert(name.to_string(), value);
                }
                Value::Object(object)
            }
        }
    }
}

/// Variables: those given count before those the files define; only the latter may use others.
#[derive(Default)]
struct Variables {
    given: BTreeMap<String, String>,
    defined: BTreeMap<String, String>,
}

impl Variables {
    fn replace(&self, text: &str) -> Result<String, String> {
        self.replace_within(text, &mut HashSet::new())
    }

    fn replace_within(&self, text: &str, open: &mut HashSet<String>) -> Result<String, String> {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((before, after)) = rest.split_once("${") {
            if let Some(before) = before.strip_suffix('$') {
                out.push_str(before);
                out.push_str("${");
                rest = after;
                continue;
            }
            out.push_str(before);
            let (name, after) =
                after.split_once('}').ok_or("`${` without `}`; a literal `${` is written `$${`")?;
            out.push_str(&self.value_of(name, open)?);
            if out.len() > MAX_STRING {
                return Err(format!("longer than {MAX_STRING} bytes with its variables replaced"));
            }
            rest = after;
        }
        out.push_str(rest);
        Ok(out)
    }

    fn value_of(&self, name: &str, open: &mut HashSet<String>) -> Result<String, String> {
        if let Some(given) = self.given.get(name) {
            return Ok(given.clone());
        }
        let Some(defined) = self.defined.get(name) else {
            let known: Vec<_> = self.given.keys().chain(self.defined.keys()).map(String::as_str).collect();
            return Err(format!("unknown variable `{name}`{}", hint(name, &known)));
        };
        if !open.insert(name.to_owned()) {
            return Err(format!("variable `{name}` is made of itself"));
        }
        let value = self.replace_within(defined, open)?;
        open.remove(name);
        Ok(value)
    }
}

impl Sources<'_> {
    fn at(&self, file: usize, offset: usize, key: String, message: String) -> PolicyError {
        let (name, text) = self.files.get(file).copied().unwrap_or_default();
        PolicyError::at(name, text, offset, key, message)
    }

    /// An error at the value that `pointer` names, or at its nearest ancestor.
    pub(crate) fn error(&self, pointer: &str, message: impl Into<String>) -> PolicyError {
        self.error_at(pointer, message.into(), |place| place.value)
    }

    fn error_at(&self, pointer: &str, message: String, offset: fn(&Place) -> usize) -> PolicyError {
        let mut known = pointer;
        let place = loop {
            match (self.places.get(known), known.rfind('/')) {
                (Some(place), _) => break *place,
                (None, Some(slash)) => known = known.get(..slash).unwrap_or_default(),
                (None, None) => {
                    break Place { file: self.main_file(), key: 0, value: 0 };
                }
            }
        };
        self.at(place.file, offset(&place), self.key(pointer), message)
    }

    fn main_file(&self) -> usize {
        self.files.iter().position(|(name, _)| *name == "policy.toml").unwrap_or_default()
    }

    /// `/route/3/rates/0` as `route.login.rates[0]`: tables are called by their name where they have one.
    pub(crate) fn key(&self, pointer: &str) -> String {
        let mut key = String::new();
        let mut value = Some(&self.value);
        for token in pointer.split('/').skip(1) {
            let token = token.replace("~1", "/").replace("~0", "~");
            let in_array = value.is_none_or(Value::is_array);
            value = value.and_then(|value| match value {
                Value::Array(items) => items.get(token.parse::<usize>().ok()?),
                _ => value.get(&token),
            });
            let name = value.and_then(|value| value.get("name")).and_then(Value::as_str);
            match (name, in_array && token.bytes().all(|b| b.is_ascii_digit())) {
                (Some(name), true) => key.push_str(&format!(".{name}")),
                (None, true) => key.push_str(&format!("[{token}]")),
                (_, false) if key.is_empty() => key.push_str(&token),
                (_, false) => key.push_str(&format!(".{token}")),
            }
        }
        key
    }

    /// Runs the JSON Schema over the document: *all* structural errors, where serde would stop at the first.
    ///
    /// What is wrong is taken out of the document, so that the rest can be looked at too.
    pub(crate) fn check_structure(&mut self) -> Vec<PolicyError> {
        let schema = document::json_schema();
        let validator = match jsonschema::options().offline().build(&schema) {
            Ok(validator) => validator,
            // Cannot happen (tested); were it to, nothing may load.
            Err(error) => return vec![self.error("", format!("internal: {error}"))],
        };
        let mut errors = Vec::new();
        let mut wrong = Vec::new();
        for fault in validator.iter_errors(&self.value) {
            let pointer = fault.instance_path().as_str();
            if let ValidationErrorKind::AdditionalProperties { unexpected } = fault.kind() {
                let parent = parent(fault.schema_path().as_str());
                let known: Vec<_> = schema
                    .pointer(&format!("{parent}/properties"))
                    .and_then(Value::as_object)
                    .map(|properties| properties.keys().map(String::as_str).collect())
                    .unwrap_or_default();
                for name in unexpected {
                    let pointer = child(pointer, name);
                    let message = format!("unknown key{}", hint(name, &known));
                    errors.push(self.error_at(&pointer, message, |place| place.key));
                    wrong.push(pointer);
                }
            } else {
                let described = schema.pointer(parent(fault.schema_path().as_str()));
                errors.push(self.error(pointer, expectation(&fault, described)));
                wrong.push(pointer.to_owned());
            }
        }
        for pointer in wrong {
            self.take_out(&pointer);
        }
        errors
    }

    /// Removes a key of a table. Items of arrays stay: removing one would move the places of the others.
    fn take_out(&mut self, pointer: &str) {
        let (table, key) = pointer.rsplit_once('/').unwrap_or_default();
        if let Some(Value::Object(table)) = self.value.pointer_mut(table) {
            table.remove(&key.replace("~1", "/").replace("~0", "~"));
        }
    }
}

/// What was expected, in words.
fn expectation(fault: &jsonschema::ValidationError<'_>, schema: Option<&Value>) -> String {
    let found = match fault.instance().as_ref() {
        Value::Null => "nothing".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(value) => value.to_string(),
        Value::String(value) => format!("{:?}", value.chars().take(64).collect::<String>()),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "a table".to_owned(),
    };
    let description = schema.and_then(|schema| schema.get("description")).and_then(Value::as_str);
    match fault.kind() {
        ValidationErrorKind::Required { property: Value::String(name) } => format!("`{name}` is missing"),
        ValidationErrorKind::Type { kind } => {
            let name = |kind: &str| match kind {
                "array" => "a list".to_owned(),
                "object" => "a table".to_owned(),
                "boolean" => "true or false".to_owned(),
                "integer" => "a whole number".to_owned(),
                kind => format!("a {kind}"),
            };
            let kinds = match kind {
                TypeKind::Single(kind) => name(&kind.to_string()),
                TypeKind::Multiple(kinds) => {
                    kinds.iter().map(|kind| name(&kind.to_string())).collect::<Vec<_>>().join(" or ")
                }
            };
            // A type may say it better than its JSON kind ("a duration such as …").
            let expected = match description {
                Some(text) if text.starts_with("a ") => text.to_owned(),
                _ => kinds,
            };
            format!("expected {expected}, found {found}")
        }
        ValidationErrorKind::Enum { options } => {
            let options: Vec<_> = options.as_array().into_iter().flatten().map(Value::to_string).collect();
            format!("expected one of {}, found {found}", options.join(", "))
        }
        ValidationErrorKind::Minimum { limit } => format!("expected at least {limit}, found {found}"),
        ValidationErrorKind::Maximum { limit } => format!("expected at most {limit}, found {found}"),
        ValidationErrorKind::MinItems { limit: 1 } => "expected at least one entry".to_owned(),
        ValidationErrorKind::MinLength { limit: 1 } => "expected some text".to_owned(),
        _ => match description {
            Some(description) => format!("expected {description}, found {found}"),
            None => fault.to_string(),
        },
    }
}

/// The near miss, or what there is: helps whoever mistyped.
pub(crate) fn hint(name: &str, known: &[&str]) -> String {
    // A name defined twice is reported elsewhere, and here said once.
    let known: BTreeSet<_> = known.iter().copied().collect();
    let near = known.iter().map(|known| (distance(name, known), known)).min();
    match near {
        Some((distance, known)) if distance <= 2 && distance < name.len() => {
            format!("; did you mean `{known}`?")
        }
        Some(_) => format!("; there are {}", known.into_iter().collect::<Vec<_>>().join(", ")),
        None => "; there are none".to_owned(),
    }
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, from) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, to) in row.iter_mut().skip(1).zip(b.chars()) {
            let cost = (diagonal + usize::from(from != to)).min(*cell + 1).min(left + 1);
            diagonal = *cell;
            *cell = cost;
            left = cost;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or_default()
}

pub(crate) fn child(pointer: &str, token: &str) -> String {
    format!("{pointer}/{}", token.replace('~', "~0").replace('/', "~1"))
}

fn parent(pointer: &str) -> &str {
    pointer.rsplit_once('/').map_or("", |(parent, _)| parent)
}
