//! `schemas/*.json`, compiled; references lead to files of the bundle only.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::str;
use std::sync::Arc;

use jsonschema::{Draft, PatternOptions, Retrieve, Uri, ValidationOptions, Validator};
use serde_json::Value;

use crate::bundle::Bundle;
use crate::errors::PolicyError;
use crate::json::{self, Library, Schema};

/// Base of all schema files, so that `{"$ref": "envelope.json"}` finds its neighbour.
const SCHEMA_BASE: &str = "bundle:///";

/// The files below `schemas/`.
pub(super) struct SchemaFiles {
    pub(super) texts: BTreeMap<String, Arc<Value>>,
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
    pub(super) fn read(bundle: &Bundle) -> (Self, Vec<PolicyError>) {
        let mut errors = Vec::new();
        let mut texts = BTreeMap::new();
        let mut broken = HashSet::new();
        for (name, bytes) in bundle.files.iter().filter(|(name, _)| name.starts_with("schemas/")) {
            if !name.ends_with(".json") {
                continue;
            }
            let text = str::from_utf8(bytes).unwrap_or_default();
            match json::parse(bytes) {
                Ok(value) => drop(texts.insert(name.clone(), Arc::new(value))),
                Err(error) => {
                    // serde_json counts lines from 1, and columns in bytes.
                    let line_start: usize =
                        text.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
                    let offset = (line_start + error.column().saturating_sub(1)).min(text.len());
                    let message = format!("not JSON: {}", without_position(&error.to_string()));
                    errors.push(PolicyError::at(name, text, offset, String::new(), message));
                    broken.insert(name.clone());
                    texts.insert(name.clone(), Arc::new(Value::Bool(true)));
                }
            }
        }
        let by_uri = texts.iter().map(|(name, value)| (format!("{SCHEMA_BASE}{name}"), Arc::clone(value)));
        let retriever = Neighbours(Arc::new(by_uri.collect()));
        let mut files = Self { texts, retriever, broken };
        let names: Vec<_> =
            files.texts.keys().filter(|name| !files.broken.contains(*name)).cloned().collect();
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
    pub(super) fn compile(&self, name: &str) -> Option<Option<Schema>> {
        self.texts.get(name)?;
        Some(if self.broken.contains(name) { None } else { self.build(name).ok() })
    }

    fn build(&self, name: &str) -> Result<Schema, (String, String)> {
        let schema = self.texts.get(name).map(|value| &**value).unwrap_or(&Value::Bool(false));
        let draft = schema.get("$schema").and_then(Value::as_str);
        if draft.is_some_and(|draft| draft != "https://json-schema.org/draft/2020-12/schema") {
            return Err(("/$schema".into(), "expected draft 2020-12".into()));
        }
        if schema.get("$id").is_some() {
            return Err(("/$id".into(), "files are known by their path; leave `$id` out".into()));
        }
        let validator = self
            .options(&format!("{SCHEMA_BASE}{name}"))
            .build(schema)
            .map_err(|error| (error.instance_path().as_str().to_owned(), error.to_string()))?;
        Ok(Schema::new(validator, name, self))
    }

    fn options(&self, base: &str) -> ValidationOptions<'_> {
        jsonschema::options()
            .with_draft(Draft::Draft202012)
            .with_base_uri(base)
            .with_retriever(self.retriever.clone())
            // Linear time, whatever a peer sends.
            .with_pattern_options(PatternOptions::regex())
            .should_validate_formats(true)
            .should_ignore_unknown_formats(false)
    }
}

impl Library for SchemaFiles {
    fn file(&self, from: &str, reference: &str) -> Option<(&str, &Value)> {
        let name = match (reference, from.rsplit_once('/')) {
            ("", _) => from.to_owned(),
            // What leads through other folders is for `jsonschema` to resolve.
            (_, Some((folder, _)))
                if !reference.contains(['/', ':', '?', '%', '\\']) && reference != ".." =>
            {
                format!("{folder}/{reference}")
            }
            _ => return None,
        };
        let (name, text) = self.texts.get_key_value(&name).filter(|_| !self.broken.contains(&name))?;
        Some((name, text))
    }

    fn validator(&self, schema: &Value) -> Option<Validator> {
        self.options(SCHEMA_BASE).build(schema).ok()
    }

    fn part(&self, file: &str, pointer: &str) -> Option<Validator> {
        let mut fragment = String::new();
        for byte in pointer.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'/' | b'-' | b'.' | b'_' | b'~' | b'$' => {
                    fragment.push(char::from(byte));
                }
                other => fragment.push_str(&format!("%{other:02X}")),
            }
        }
        let reference = serde_json::json!({ "$ref": format!("{SCHEMA_BASE}{file}#{fragment}") });
        self.options(SCHEMA_BASE).build(&reference).ok()
    }
}

fn without_position(message: &str) -> &str {
    message.rsplit_once(" at line ").map_or(message, |(message, _)| message)
}
