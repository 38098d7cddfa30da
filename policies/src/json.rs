//! Strict JSON, and schemas compiled at load.

mod scan;

use std::fmt;

use jsonschema::Validator;
use jsonschema::error::ValidationErrorKind;
use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

pub(crate) use self::scan::{Limits, scan};
use crate::denial::{Denial, JsonFault};

/// Longest JSON pointer told to a peer; it may be made of the peer's own keys.
const MAX_POINTER: usize = 64;

/// Faults of one value that are looked at.
const MAX_FAULTS: usize = 32;

/// The value of a text that [`scan`] has judged.
///
/// # Errors
/// [`Denial::Json`] where the two differ, which they do not: fail closed.
pub(crate) fn value(judged: &[u8]) -> Result<Value, Denial> {
    serde_json::from_slice(judged).map_err(|_| Denial::Json {
        fault: JsonFault::Syntax,
        at: 0,
        pointer: String::new(),
    })
}

/// Reads one JSON document of the bundle and nothing after it; peers' are for [`scan`].
///
/// Beyond `serde_json` (no lone surrogates, numbers in range, at most 127 levels) it refuses an object that has a
/// key twice: readers disagree which one counts (RFC 8259 §4), so what is judged might not be what is understood
/// behind the gateway.
pub(crate) fn parse(bytes: &[u8]) -> Result<Value, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = Strict.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(value)
}

/// A JSON Schema (draft 2020-12), compiled. Patterns run in linear time.
pub(crate) struct Schema {
    validator: Validator,
}

impl Schema {
    pub(crate) fn new(validator: Validator) -> Self {
        Self { validator }
    }

    /// # Errors
    /// JSON pointer to the first offending field, fit to be shown.
    pub(crate) fn check(&self, value: &Value) -> Result<(), String> {
        // `is_valid` stops at the first fault and builds no error: the way that honest traffic takes.
        if self.validator.is_valid(value) {
            return Ok(());
        }
        Err(self
            .validator
            .iter_errors(value)
            .next()
            .map_or_else(String::new, |error| printable_pointer(error.instance_path().as_str())))
    }
}

impl Schema {
    /// Whether an invalid value holds members that the schema does not know. Looks at so many faults and no more, and
    /// takes it for granted beyond.
    pub(crate) fn has_unknown_members(&self, value: &Value) -> bool {
        let mut faults = self.validator.iter_errors(value).enumerate();
        faults.any(|(index, fault)| {
            let kind = fault.kind();
            index >= MAX_FAULTS
                || matches!(
                    kind,
                    ValidationErrorKind::AdditionalProperties { .. }
                        | ValidationErrorKind::UnevaluatedProperties { .. }
                )
        })
    }
}

impl fmt::Debug for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Schema(..)")
    }
}

/// A pointer may hold the peer's keys: what is not visible ASCII becomes `?`, and a long one is cut.
fn printable_pointer(pointer: &str) -> String {
    pointer.chars().map(|c| if c.is_ascii_graphic() { c } else { '?' }).take(MAX_POINTER).collect()
}

/// Splits an RFC 6901 pointer into unescaped tokens; `None` if it is none.
pub(crate) fn pointer_tokens(pointer: &str) -> Option<Vec<String>> {
    if pointer.is_empty() {
        return Some(Vec::new());
    }
    let tokens = pointer.strip_prefix('/')?.split('/');
    tokens
        .map(|token| {
            let escapes_hold =
                token.split('~').skip(1).all(|rest| rest.starts_with('0') || rest.starts_with('1'));
            escapes_hold.then(|| token.replace("~1", "/").replace("~0", "~"))
        })
        .collect()
}

/// Follows unescaped tokens through objects and arrays.
pub(crate) fn lookup<'v>(value: &'v Value, tokens: &[String]) -> Option<&'v Value> {
    tokens.iter().try_fold(value, |value, token| match value {
        Value::Object(map) => map.get(token),
        Value::Array(items) => items.get(index(token)?),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    })
}

/// A token as the index of an array (RFC 6901 §4): no sign, no leading zero.
fn index(token: &str) -> Option<usize> {
    let plain = token == "0" || token.starts_with(|first: char| matches!(first, '1'..='9'));
    plain.then(|| token.parse().ok()).flatten()
}

/// Deserializes into a [`Value`], refusing duplicate keys.
#[derive(Clone, Copy)]
struct Strict;

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value).map(Value::Number).ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(self)?;
            if map.insert(key, value).is_some() {
                return Err(de::Error::custom("a key stands twice in one object"));
            }
        }
        Ok(Value::Object(map))
    }
}

/// Finds where a value stands in a valid JSON text: 1-based line and column, for errors in schema files.
///
/// Falls back to the deepest ancestor that exists.
pub(crate) fn locate(text: &str, tokens: &[String]) -> usize {
    let mut scanner = Scanner { bytes: text.as_bytes(), at: 0 };
    scanner.space();
    let mut found = scanner.at;
    for token in tokens {
        let Some(at) = scanner.enter(token) else { break };
        found = at;
    }
    found
}

/// Walks over JSON that is already known to be valid.
struct Scanner<'t> {
    bytes: &'t [u8],
    at: usize,
}

impl Scanner<'_> {
    fn peek(&self) -> u8 {
        self.bytes.get(self.at).copied().unwrap_or(0)
    }

    fn space(&mut self) {
        while matches!(self.peek(), b' ' | b'\t' | b'\r' | b'\n') {
            self.at += 1;
        }
    }

    /// Steps into the object or array at hand, to the value named by `token`.
    fn enter(&mut self, token: &str) -> Option<usize> {
        let opening = self.peek();
        if opening != b'{' && opening != b'[' {
            return None;
        }
        self.at += 1;
        for index in 0_usize.. {
            self.space();
            let here = if opening == b'{' {
                let start = self.at;
                self.skip();
                let key: String = serde_json::from_slice(self.bytes.get(start..self.at)?).ok()?;
                self.space();
                self.at += 1; // the colon
                self.space();
                key == token
            } else {
                token.parse() == Ok(index)
            };
            if here {
                return Some(self.at);
            }
            self.skip();
            self.space();
            if self.peek() != b',' {
                return None;
            }
            self.at += 1;
        }
        None
    }

    /// Skips one value.
    fn skip(&mut self) {
        let mut depth = 0_usize;
        while self.at < self.bytes.len() {
            match self.peek() {
                b'"' => self.skip_string(),
                b'{' | b'[' => {
                    depth += 1;
                    self.at += 1;
                }
                b'}' | b']' => {
                    if depth == 0 {
                        return;
                    }
                    depth -= 1;
                    self.at += 1;
                }
                b',' | b':' if depth == 0 => return,
                _ => {
                    self.at += 1;
                    continue;
                }
            }
            if depth == 0 {
                return;
            }
        }
    }

    fn skip_string(&mut self) {
        self.at += 1;
        while self.at < self.bytes.len() {
            match self.peek() {
                b'\\' => self.at += 2,
                b'"' => {
                    self.at += 1;
                    return;
                }
                _ => self.at += 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_readers_disagree_about() {
        for bad in [
            r#"{"a":1,"a":2}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#"[{"x":{"b":1,"b":1}}]"#,
            r#""\ud800""#,
            "1e999",
            "{} {}",
            "",
            "[1,]",
            "NaN",
            "\u{feff}{}",
        ] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(parse("[".repeat(200).as_bytes()).is_err());
        assert!(parse(b"\"\xff\"").is_err());
        for good in [r#" {"a":{"a":1},"b":[null,true,-1,1.5,"x"]} "#, "0", "18446744073709551615"] {
            assert_eq!(parse(good.as_bytes()).unwrap(), serde_json::from_str::<Value>(good).unwrap());
        }
    }

    #[test]
    fn pointers() {
        assert_eq!(pointer_tokens(""), Some(vec![]));
        assert_eq!(pointer_tokens("/a~1b/~0/"), Some(vec!["a/b".into(), "~".into(), String::new()]));
        for bad in ["a", "/~", "/a~2", "/~01~"] {
            assert_eq!(pointer_tokens(bad), None, "{bad}");
        }
        let value = parse(br#"{"a":[{"t":"x"}]}"#).unwrap();
        assert_eq!(lookup(&value, &pointer_tokens("/a/0/t").unwrap()), Some(&"x".into()));
        assert_eq!(lookup(&value, &pointer_tokens("/a/1/t").unwrap()), None);
        assert_eq!(printable_pointer("/a\nb\u{e9}"), "/a?b?");
    }

    #[test]
    fn locates_values_in_text() {
        let text = "{\n \"a\\\"\": [1, {\"b\" : {}}],\n \"c\": \"x,]\", \"d\": 7}";
        let at = |pointer: &str| locate(text, &pointer_tokens(pointer).unwrap());
        assert_eq!(at(""), 0);
        assert_eq!(text.get(at("/a\"/1/b")..).unwrap().get(..2), Some("{}"));
        assert_eq!(text.get(at("/d")..).unwrap().get(..1), Some("7"));
        assert_eq!(text.get(at("/c/zzz")..).unwrap().get(..2), Some("\"x"));
    }
}
