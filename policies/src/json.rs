//! Strict JSON, and schemas compiled at load.

mod judged;
mod scan;
mod schema;

use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use self::judged::Cursor;
pub(crate) use self::judged::Judged;
pub(crate) use self::scan::{Limits, scan};
pub(crate) use self::schema::{Library, Schema};

/// Longest JSON pointer told to a peer; it may be made of the peer's own keys.
const MAX_POINTER: usize = 64;

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

/// Finds where a value stands in a valid JSON text, for errors in schema files.
///
/// Falls back to the deepest ancestor that exists.
pub(crate) fn locate(text: &str, tokens: &[String]) -> usize {
    let mut cursor = Cursor::new(text);
    cursor.space();
    let mut found = cursor.at;
    for token in tokens {
        if cursor.enter(token).is_none() {
            break;
        }
        found = cursor.at;
    }
    found
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
