//! Lists of attacks (tests/attacks/): what their cases have in common.

use serde_json::{Map, Value};

use crate::now;

/// Puts in what stands between `<` and `>`: `<now>`, `<now-1>` and `<now+30>` are seconds since 1970, `<a*257>` is a
/// character so many times, the rest is for `known` to say. The words `later` stay, for another filling.
pub fn filled(text: &str, later: &[&str], known: impl Fn(&str) -> Option<String>) -> String {
    let (mut filled, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once('<') {
        let (word, after) = after.split_once('>').unwrap_or_else(|| panic!("no `>` in {text}"));
        filled.push_str(before);
        filled.push_str(&match (known(word), word.strip_prefix("now"), word.rsplit_once('*')) {
            (Some(known), ..) => known,
            (None, Some(offset), _) => {
                let offset: i64 = if offset.is_empty() { 0 } else { offset.parse().expect("seconds") };
                now().checked_add_signed(offset).expect("a time").to_string()
            }
            (None, None, Some((part, count))) => part.repeat(count.parse().expect("a count")),
            (None, None, None) if later.contains(&word) => format!("<{word}>"),
            (None, None, None) => panic!("<{word}> in {text}?"),
        });
        rest = after;
    }
    filled + rest
}

/// The text of a JSON object that a case changes: the members `changes` instead of its own, those of `without` taken out; or
/// `whole` instead, where `<header>` and `<claims>` stand for that object.
pub fn changed_object(
    good: &Value,
    changes: Option<&str>,
    without: &[String],
    whole: Option<&str>,
    filled: impl Fn(&str) -> String,
) -> String {
    let mut object = good.as_object().expect("an object").clone();
    let changes = filled(changes.unwrap_or("{}"));
    let changes: Map<String, Value> =
        serde_json::from_str(&changes).unwrap_or_else(|error| panic!("{changes}: {error}"));
    object.extend(changes);
    object.retain(|name, _| !without.contains(name));
    let object = Value::Object(object).to_string();
    match whole {
        Some(whole) => filled(whole).replace("<header>", &object).replace("<claims>", &object),
        None => object,
    }
}
