//! What a request or message is about: taken from its path, query, body or fields, and bounded.

use std::borrow::Cow;

use cedar_policy::EntityTypeName;

use crate::json::Judged;
use crate::path;

/// Longest id, department or owner, in bytes once decoded. A longer one is not found.
const MAX_VALUE: usize = 256;

/// The resource of a rule or message.
#[derive(Debug)]
pub(crate) struct ResourceRule {
    pub(crate) kind: EntityTypeName,
    pub(crate) id: Field,
    pub(crate) department: Option<Field>,
    pub(crate) owner: Option<Field>,
}

/// Where a value stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Field {
    /// The same for all.
    Fixed(Box<str>),
    /// The segment of the path with this number, after the first slash.
    Path(usize),
    /// A parameter of the query, which must stand there once.
    Query(Box<str>),
    /// A text in the body; tokens of its JSON pointer.
    Body(Vec<String>),
    /// A text in the message; tokens of its JSON pointer.
    Message(Vec<String>),
}

/// Where values are looked for.
#[derive(Clone, Copy)]
pub(crate) struct Places<'a> {
    /// In canonical form.
    pub(crate) path: &'a str,
    pub(crate) query: Option<&'a str>,
    /// Body or message.
    pub(crate) document: Option<Judged<'a>>,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found<'a> {
    pub(crate) id: Cow<'a, str>,
    pub(crate) department: Option<Cow<'a, str>>,
    pub(crate) owner: Option<Cow<'a, str>>,
}

impl Found<'_> {
    pub(crate) fn into_owned(self) -> Found<'static> {
        let owned = |text: Cow<'_, str>| Cow::Owned(text.into_owned());
        Found { id: owned(self.id), department: self.department.map(owned), owner: self.owner.map(owned) }
    }
}

impl ResourceRule {
    fn fields(&self) -> impl Iterator<Item = &Field> {
        [Some(&self.id), self.department.as_ref(), self.owner.as_ref()].into_iter().flatten()
    }

    /// Whether it takes the query to find it.
    pub(crate) fn needs_query(&self) -> bool {
        self.fields().any(|field| matches!(field, Field::Query(_)))
    }

    /// Whether it takes the body to find it.
    pub(crate) fn needs_body(&self) -> bool {
        self.fields().any(|field| matches!(field, Field::Body(_)))
    }

    /// Finds it; `None` if anything of it is missing, empty, too long, no text, or stands twice.
    pub(crate) fn find<'a>(&'a self, places: Places<'a>) -> Option<Found<'a>> {
        // The outer `Option` says whether it was found, the inner one whether it was looked for.
        let optional = |field: Option<&'a Field>| match field {
            None => Some(None),
            Some(field) => field.find(places).map(Some),
        };
        Some(Found {
            id: self.id.find(places)?,
            department: optional(self.department.as_ref())?,
            owner: optional(self.owner.as_ref())?,
        })
    }
}

impl Field {
    fn find<'a>(&'a self, places: Places<'a>) -> Option<Cow<'a, str>> {
        let value = match self {
            Self::Fixed(value) => Cow::Borrowed(&**value),
            Self::Path(index) => {
                let segment = places.path.strip_prefix('/')?.split('/').nth(*index)?;
                decoded(segment, path_decoded)?
            }
            Self::Query(name) => {
                let pairs = places.query?.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
                let mut named = pairs
                    .filter(|(key, _)| decoded(key, path::form_decoded).is_some_and(|key| *key == **name));
                let (_, value) = named.next()?;
                if named.next().is_some() {
                    return None;
                }
                decoded(value, path::form_decoded)?
            }
            Self::Body(tokens) | Self::Message(tokens) => places.document?.string(tokens)?,
        };
        (!value.is_empty() && value.len() <= MAX_VALUE).then_some(value)
    }
}

/// Without a copy where there is nothing to decode.
fn decoded(text: &str, decode: fn(&str) -> Option<String>) -> Option<Cow<'_, str>> {
    if text.contains(['%', '+']) { decode(text).map(Cow::Owned) } else { Some(Cow::Borrowed(text)) }
}

/// In a path `+` is itself.
fn path_decoded(segment: &str) -> Option<String> {
    path::form_decoded(&segment.replace('+', "%2B"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::{self, Limits};

    fn rule(id: Field) -> ResourceRule {
        ResourceRule { kind: "Room".parse().unwrap(), id, department: None, owner: None }
    }

    #[test]
    fn what_is_missing_too_long_no_text_or_there_twice_is_not_found() {
        let long = "x".repeat(MAX_VALUE + 1);
        let fits = "x".repeat(MAX_VALUE);
        let body = serde_json::json!({ "room": "r", "n": 1, "empty": "", "long": long, "fits": fits });
        let body = body.to_string();
        let document = json::scan(body.as_bytes(), &Limits::DEFAULT).ok();
        let at = |pointer: &str| Field::Body(json::pointer_tokens(pointer).unwrap());
        let find = |field: Field, path: &str, query: Option<&str>| {
            let rule = rule(field);
            rule.find(Places { path, query, document }).map(|found| found.id.into_owned())
        };
        assert_eq!(find(at("/room"), "/", None).as_deref(), Some("r"));
        assert_eq!(find(at("/fits"), "/", None), Some(fits.clone()));
        for pointer in ["/n", "/empty", "/long", "/none", "/room/x", ""] {
            assert_eq!(find(at(pointer), "/", None), None, "{pointer}");
        }
        for (path, found) in [
            ("/rooms/r1", Some("r1")),
            ("/rooms/a%20b", Some("a b")),
            ("/rooms/a+b", Some("a+b")),
            ("/rooms/%E4%BD%A0", Some("\u{4f60}")),
            ("/rooms/", None),
            ("/rooms", None),
        ] {
            assert_eq!(find(Field::Path(1), path, None).as_deref(), found, "{path}");
        }
        for (query, found) in [
            (Some("room=a+b&x=1"), Some("a b")),
            (Some("x=1&%72oom=r"), Some("r")),
            (Some("room=r&room=r"), None),
            (Some("room=r&roo%6d=s"), None),
            (Some("room="), None),
            (Some("room"), None),
            (Some("rooms=r"), None),
            (Some("room=%ff"), None),
            (None, None),
        ] {
            assert_eq!(find(Field::Query("room".into()), "/", query).as_deref(), found, "{query:?}");
        }
    }

    #[test]
    fn one_thing_that_is_not_found_is_all_of_it() {
        let rule = ResourceRule {
            kind: "Room".parse().unwrap(),
            id: Field::Fixed("r".into()),
            department: Some(Field::Path(0)),
            owner: Some(Field::Query("owner".into())),
        };
        let find = |query| rule.find(Places { path: "/sales", query, document: None });
        assert!(find(Some("owner=alice")).is_some_and(|found| found.owner.as_deref() == Some("alice")));
        assert!(find(None).is_none());
    }
}
