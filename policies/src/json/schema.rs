//! Schemas compiled at load: by `jsonschema`, and what most of them are made of in a form of our own as well, by which
//! texts are held against them where they lie.

use std::collections::{BTreeSet, HashMap};
use std::fmt;

use jsonschema::Validator;
use jsonschema::error::ValidationErrorKind;
use serde_json::{Map, Number, Value};

use super::judged::{Cursor, Judged};
use super::printable_pointer;

/// Faults of one value that are looked at.
const MAX_FAULTS: usize = 32;

/// A JSON Schema (draft 2020-12), compiled. Patterns run in linear time.
pub(crate) struct Schema {
    validator: Validator,
    /// The same in our form, where it could be brought into it.
    form: Option<Form>,
}

/// Where a schema and those that it refers to come from.
pub(crate) trait Library {
    /// The file that a reference (without its fragment) leads to from another, and its text.
    fn file(&self, from: &str, reference: &str) -> Option<(&str, &Value)>;

    /// Compiles a schema of its own.
    fn validator(&self, schema: &Value) -> Option<Validator>;

    /// Compiles a part of a file.
    fn part(&self, file: &str, pointer: &str) -> Option<Validator>;
}

impl Schema {
    /// `file` of `library`, which `validator` was made of.
    pub(crate) fn new(validator: Validator, file: &str, library: &impl Library) -> Self {
        Self { validator, form: Form::new(file, library) }
    }

    /// Holds a text against it.
    ///
    /// # Errors
    /// JSON pointer to the first offending field, fit to be shown.
    pub(crate) fn check(&self, text: Judged<'_>) -> Result<(), String> {
        // The way that honest traffic takes.
        if self.form.as_ref().is_some_and(|form| form.fits(text)) {
            return Ok(());
        }
        let value = text.value().map_err(|_| String::new())?;
        match self.check_value(&value) {
            // Two that disagree, which they do not: fail closed.
            Ok(()) if self.form.is_some() => Err(String::new()),
            outcome => outcome,
        }
    }

    /// Holds a value against it.
    ///
    /// # Errors
    /// As [`Schema::check`].
    pub(crate) fn check_value(&self, value: &Value) -> Result<(), String> {
        // `is_valid` stops at the first fault and builds no error.
        if self.validator.is_valid(value) {
            return Ok(());
        }
        Err(self
            .validator
            .iter_errors(value)
            .next()
            .map_or_else(String::new, |error| printable_pointer(error.instance_path().as_str())))
    }

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

/// A schema as nodes that refer to each other. What it does not know is left to a [`Validator`], for the smallest part that
/// needs one: so it is never laxer or stricter than `jsonschema`, which is property-tested.
struct Form {
    nodes: Vec<Node>,
    root: usize,
}

/// What one schema says. A keyword says nothing of values of another kind.
#[derive(Default)]
struct Node {
    /// Kinds that `type` allows; `None` for all.
    kinds: Option<u8>,
    /// What `const` and `enum` allow; `None` for anything.
    constants: Option<Vec<Constant>>,
    /// Characters of a string.
    length: Bounds,
    /// What else is asked of a string: `pattern`, `format`.
    string: Option<Validator>,
    /// What is asked of a number: `minimum` and its like.
    number: Option<Validator>,
    object: Option<Object>,
    items: Option<usize>,
    /// Items of an array.
    count: Bounds,
    /// Schemas that have to hold too.
    also: Vec<usize>,
    /// The schema as a whole, where it says more than this form can.
    whole: Option<Validator>,
}

#[derive(Clone, PartialEq, Eq)]
enum Constant {
    String(Box<str>),
    /// `null`, `true` or `false`, as it is written.
    Literal(&'static str),
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Bounds {
    min: usize,
    max: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { min: 0, max: usize::MAX }
    }
}

impl Bounds {
    fn hold(self, count: usize) -> bool {
        (self.min..=self.max).contains(&count)
    }
}

#[derive(Default)]
struct Object {
    members: Vec<Member>,
    /// How many of them are required.
    required: usize,
    unknown: Unknown,
    count: Bounds,
}

struct Member {
    key: Box<str>,
    required: bool,
    /// `None` if it is only required, and otherwise unknown.
    node: Option<usize>,
}

/// What members may be that are not listed.
#[derive(Clone, Copy, Default)]
enum Unknown {
    #[default]
    Anything,
    Nothing,
    Node(usize),
}

const NULL: u8 = 1;
const BOOLEAN: u8 = 2;
const OBJECT: u8 = 4;
const ARRAY: u8 = 8;
const STRING: u8 = 16;
const NUMBER: u8 = 32;
/// A number without fraction.
const INTEGER: u8 = 64;

impl Form {
    /// `None` where it is better left to `jsonschema` altogether.
    fn new(file: &str, library: &impl Library) -> Option<Self> {
        let mut builder =
            Builder { library, nodes: Vec::new(), known: HashMap::new(), open: BTreeSet::new() };
        let root = builder.node(file, "", library.file(file, "")?.1)?;
        let nodes = builder.nodes;
        // Nothing is gained by a detour.
        let is_whole = nodes.get(root).is_none_or(|node| node.whole.is_some());
        (!is_whole).then_some(Self { nodes, root })
    }

    fn fits(&self, text: Judged<'_>) -> bool {
        self.holds(self.root, &mut text.cursor())
    }

    /// Whether the value at hand is as a node says; if so, the cursor stands behind it.
    // No deeper than the text, whose depth was bounded, times the references in a row, of which the bundle decides.
    fn holds(&self, node: usize, cursor: &mut Cursor<'_>) -> bool {
        let Some(node) = self.nodes.get(node) else { return false };
        let start = *cursor;
        if let Some(whole) = &node.whole {
            return serde_json::from_str::<Value>(cursor.skip()).is_ok_and(|value| whole.is_valid(&value));
        }
        let allows = |kind: u8| node.kinds.is_none_or(|kinds| kinds & kind != 0);
        let holds = match cursor.peek() {
            b'"' => allows(STRING) && node.holds_string(cursor),
            b'{' => allows(OBJECT) && node.constants.is_none() && self.holds_object(node, cursor),
            b'[' => allows(ARRAY) && node.constants.is_none() && self.holds_items(node, cursor),
            b'n' => allows(NULL) && node.holds_literal(cursor),
            b't' | b'f' => allows(BOOLEAN) && node.holds_literal(cursor),
            _ => node.constants.is_none() && node.holds_number(cursor),
        };
        holds && node.also.iter().all(|&also| self.holds(also, &mut { start }))
    }

    fn holds_object(&self, node: &Node, cursor: &mut Cursor<'_>) -> bool {
        let Some(object) = &node.object else {
            cursor.skip();
            return true;
        };
        let (mut count, mut required) = (0, 0);
        let mut goes_on = cursor.first();
        while goes_on {
            let key = cursor.key();
            let member = object.members.iter().find(|member| key.is(&member.key));
            required += usize::from(member.is_some_and(|member| member.required));
            count += 1;
            let holds = match (member.and_then(|member| member.node), object.unknown) {
                (Some(node), _) | (None, Unknown::Node(node)) => self.holds(node, cursor),
                (None, Unknown::Nothing) => false,
                (None, Unknown::Anything) => {
                    cursor.skip();
                    true
                }
            };
            if !holds {
                return false;
            }
            goes_on = cursor.next();
        }
        // No key stands twice.
        required == object.required && object.count.hold(count)
    }

    fn holds_items(&self, node: &Node, cursor: &mut Cursor<'_>) -> bool {
        let mut count = 0;
        let mut goes_on = cursor.first();
        while goes_on {
            count += 1;
            match node.items {
                Some(items) if !self.holds(items, cursor) => return false,
                Some(_) => {}
                None => drop(cursor.skip()),
            }
            goes_on = cursor.next();
        }
        node.count.hold(count)
    }
}

impl Node {
    fn holds_string(&self, cursor: &mut Cursor<'_>) -> bool {
        let written = cursor.string();
        if let Some(constants) = &self.constants {
            let is = |constant: &Constant| matches!(constant, Constant::String(text) if written.is(text));
            if !constants.iter().any(is) {
                return false;
            }
        }
        if self.length != Bounds::default() && !self.length.hold(written.count()) {
            return false;
        }
        let Some(string) = &self.string else { return true };
        written.text().is_some_and(|text| string.is_valid(&Value::String(text.into_owned())))
    }

    fn holds_literal(&self, cursor: &mut Cursor<'_>) -> bool {
        let text = cursor.skip();
        let is = |constant: &Constant| matches!(constant, Constant::Literal(literal) if *literal == text);
        self.constants.as_ref().is_none_or(|constants| constants.iter().any(is))
    }

    fn holds_number(&self, cursor: &mut Cursor<'_>) -> bool {
        let text = cursor.skip();
        let read = || serde_json::from_str::<Number>(text).ok();
        let allowed = self.kinds.is_none_or(|kinds| {
            kinds & NUMBER != 0
                || (kinds & INTEGER != 0 && (is_plain(text) || read().is_some_and(is_integer)))
        });
        let Some(number) = self.number.as_ref().filter(|_| allowed) else { return allowed };
        read().is_some_and(|read| number.is_valid(&Value::Number(read)))
    }
}

/// Surely without fraction.
fn is_plain(number: &str) -> bool {
    number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-')
}

/// As `jsonschema` has it: 1.0 is one.
fn is_integer(number: Number) -> bool {
    number.is_i64() || number.is_u64() || number.as_f64().is_some_and(|number| number.fract() == 0.0)
}

struct Builder<'l, L> {
    library: &'l L,
    nodes: Vec<Node>,
    /// By file and pointer.
    known: HashMap<(String, String), usize>,
    /// Those that are being built.
    open: BTreeSet<(String, String)>,
}

impl<L: Library> Builder<'_, L> {
    /// The node of the schema at `pointer`.
    fn node(&mut self, file: &str, pointer: &str, schema: &Value) -> Option<usize> {
        let place = (file.to_owned(), pointer.to_owned());
        if let Some(&known) = self.known.get(&place) {
            return Some(known);
        }
        // One that contains itself is left to the validator where it begins anew.
        let recurs = !self.open.insert(place.clone());
        let node = if recurs { None } else { self.read(file, pointer, schema) };
        let node = match node {
            Some(node) => node,
            None => Node { whole: Some(self.library.part(file, pointer)?), ..Node::default() },
        };
        self.nodes.push(node);
        let index = self.nodes.len() - 1;
        if !recurs {
            self.open.remove(&place);
            self.known.insert(place, index);
        }
        Some(index)
    }

    /// `None` if there is more to it than this form can say.
    fn read(&mut self, file: &str, pointer: &str, schema: &Value) -> Option<Node> {
        let mut node = Node::default();
        let schema = match schema {
            Value::Bool(true) => return Some(node),
            Value::Bool(false) => return Some(Node { kinds: Some(0), ..node }),
            Value::Object(schema) => schema,
            _ => return None,
        };
        let (mut object, mut string, mut number) = (Object::default(), Map::new(), Map::new());
        let mut of_objects = false;
        for (keyword, value) in schema {
            let at = || format!("{pointer}/{keyword}");
            match keyword.as_str() {
                "$schema" | "$comment" | "title" | "description" | "default" | "examples" | "deprecated"
                | "readOnly" | "writeOnly" | "$defs" => {}
                "type" => node.kinds = Some(kinds(value)?),
                "const" => restrict(&mut node.constants, vec![constant(value)?]),
                "enum" => {
                    let allowed: Option<Vec<_>> = value.as_array()?.iter().map(constant).collect();
                    restrict(&mut node.constants, allowed?);
                }
                "minLength" => node.length.min = size(value)?,
                "maxLength" => node.length.max = size(value)?,
                "minItems" => node.count.min = size(value)?,
                "maxItems" => node.count.max = size(value)?,
                "pattern" | "format" => drop(string.insert(keyword.clone(), value.clone())),
                "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" | "multipleOf" => {
                    number.insert(keyword.clone(), value.clone());
                }
                "items" => node.items = Some(self.node(file, &at(), value)?),
                "allOf" => {
                    for (index, also) in value.as_array()?.iter().enumerate() {
                        node.also.push(self.node(file, &format!("{}/{index}", at()), also)?);
                    }
                }
                "$ref" => node.also.push(self.reference(file, value.as_str()?)?),
                "minProperties" => object.count.min = size(value)?,
                "maxProperties" => object.count.max = size(value)?,
                "properties" => {
                    for (key, member) in value.as_object()? {
                        let at = format!("{}/{}", at(), key.replace('~', "~0").replace('/', "~1"));
                        let node = Some(self.node(file, &at, member)?);
                        object.member(key).node = node;
                    }
                }
                "required" => {
                    for key in value.as_array()? {
                        object.member(key.as_str()?).required = true;
                    }
                }
                "additionalProperties" => {
                    object.unknown = match value {
                        Value::Bool(true) => Unknown::Anything,
                        Value::Bool(false) => Unknown::Nothing,
                        _ => Unknown::Node(self.node(file, &at(), value)?),
                    }
                }
                _ => return None,
            }
            of_objects |= matches!(
                keyword.as_str(),
                "minProperties" | "maxProperties" | "properties" | "required" | "additionalProperties"
            );
        }
        for (keywords, validator) in [(string, &mut node.string), (number, &mut node.number)] {
            if !keywords.is_empty() {
                *validator = Some(self.library.validator(&Value::Object(keywords))?);
            }
        }
        object.required = object.members.iter().filter(|member| member.required).count();
        node.object = of_objects.then_some(object);
        Some(node)
    }

    fn reference(&mut self, from: &str, reference: &str) -> Option<usize> {
        let (path, fragment) = reference.split_once('#').unwrap_or((reference, ""));
        let (file, text) = self.library.file(from, path)?;
        let (file, mut found) = (file.to_owned(), text);
        if fragment.contains('%') {
            return None;
        }
        for token in super::pointer_tokens(fragment)? {
            found = match found {
                Value::Object(members) => members.get(&token)?,
                Value::Array(items) => items.get(super::index(&token)?)?,
                _ => return None,
            };
            // A base of its own would lead its references elsewhere.
            if found.get("$id").is_some() {
                return None;
            }
        }
        self.node(&file, fragment, found)
    }
}

impl Object {
    fn member(&mut self, key: &str) -> &mut Member {
        let place = self.members.iter().position(|member| &*member.key == key).unwrap_or_else(|| {
            self.members.push(Member { key: key.into(), required: false, node: None });
            self.members.len() - 1
        });
        #[expect(clippy::indexing_slicing, reason = "found or pushed just now")]
        &mut self.members[place]
    }
}

fn restrict(constants: &mut Option<Vec<Constant>>, allowed: Vec<Constant>) {
    *constants = Some(match constants.take() {
        None => allowed,
        Some(before) => before.into_iter().filter(|constant| allowed.contains(constant)).collect(),
    });
}

fn constant(value: &Value) -> Option<Constant> {
    match value {
        Value::String(text) => Some(Constant::String(text.as_str().into())),
        Value::Null => Some(Constant::Literal("null")),
        Value::Bool(true) => Some(Constant::Literal("true")),
        Value::Bool(false) => Some(Constant::Literal("false")),
        Value::Number(_) | Value::Array(_) | Value::Object(_) => None,
    }
}

fn size(value: &Value) -> Option<usize> {
    usize::try_from(value.as_u64()?).ok()
}

fn kinds(value: &Value) -> Option<u8> {
    let kind = |value: &Value| {
        Some(match value.as_str()? {
            "null" => NULL,
            "boolean" => BOOLEAN,
            "object" => OBJECT,
            "array" => ARRAY,
            "string" => STRING,
            "number" => NUMBER,
            "integer" => INTEGER,
            _ => return None,
        })
    };
    match value {
        Value::Array(all) => all.iter().try_fold(0, |sum, one| Some(sum | kind(one)?)),
        one => kind(one),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::{Limits, scan};
    use super::*;

    /// One file, which refers to itself only.
    struct Alone(Value);

    impl Alone {
        const FILE: &'static str = "alone.json";
        const URI: &'static str = "memory:///alone.json";

        fn options(&self) -> jsonschema::ValidationOptions<'static> {
            jsonschema::options()
                .with_draft(jsonschema::Draft::Draft202012)
                .with_pattern_options(jsonschema::PatternOptions::regex())
                .should_validate_formats(true)
        }

        fn schema(&self) -> Schema {
            Schema::new(self.validator(&self.0).expect("a schema"), Self::FILE, self)
        }
    }

    impl Library for Alone {
        fn file(&self, _: &str, reference: &str) -> Option<(&str, &Value)> {
            reference.is_empty().then_some((Self::FILE, &self.0))
        }

        fn validator(&self, schema: &Value) -> Option<Validator> {
            self.options().build(schema).ok()
        }

        fn part(&self, _: &str, pointer: &str) -> Option<Validator> {
            // As a resource of its own, so that its references begin at its root.
            let mut file = self.0.clone();
            file.as_object_mut()?.insert("$id".into(), Self::URI.into());
            let whole = json!({ "$ref": format!("{}#{pointer}", Self::URI), "$defs": { "file": file } });
            self.options().build(&whole).ok()
        }
    }

    /// Whether the form and `jsonschema` say the same of a text, and what; nothing where no form was made.
    #[track_caller]
    fn agree(schema: &Schema, text: &str) -> Option<bool> {
        let judged = scan(text.as_bytes(), &Limits::DEFAULT).expect("JSON");
        let fits = schema.form.as_ref()?.fits(judged);
        assert_eq!(fits, schema.validator.is_valid(&judged.value().unwrap()), "{text}");
        Some(fits)
    }

    #[test]
    fn what_a_reader_might_take_for_something_else() {
        let all = json!({ "x": true });
        for (schema, valid, invalid) in [
            (
                json!({ "type": "integer" }),
                vec!["1", "1.0", "-0", "1e2", "18446744073709551616", "1e300"],
                vec!["1.5", "1e-1", "\"1\"", "true", "null", "[]"],
            ),
            (json!({ "type": ["number", "null"] }), vec!["1", "1.5", "-1e-3", "null"], vec!["true", "{}"]),
            (
                json!({ "type": "number", "minimum": 2, "multipleOf": 2 }),
                vec!["2", "4.0", "2e1"],
                vec!["0", "3", "2.5"],
            ),
            (
                json!({ "type": "integer", "maximum": 9_007_199_254_740_993_u64 }),
                vec!["9007199254740993"],
                vec!["9007199254740994"],
            ),
            // Characters, not bytes and not UTF-16.
            (
                json!({ "type": "string", "minLength": 2, "maxLength": 2 }),
                vec![r#""ab""#, r#""é🦀""#, r#""\ud83e\udd80a""#, r#""\n\"""#],
                vec![r#""🦀""#, r#""a""#, r#""abc""#, r#""\u0061""#],
            ),
            (
                json!({ "const": "a/b\n" }),
                vec![r#""a/b\n""#, r#""a\/b\u000a""#],
                vec![r#""a/b""#, "1", "null"],
            ),
            (
                json!({ "enum": [null, true, "x"] }),
                vec!["null", "true", r#""\u0078""#],
                vec!["false", "{}", "0", "[]"],
            ),
            (json!({ "enum": ["x", "y"], "const": "y" }), vec![r#""y""#], vec![r#""x""#]),
            (
                json!({ "properties": { "a": { "type": "null" }, "é\"": false }, "required": ["a", "b"] }),
                vec![r#"{"a":null,"b":1}"#, r#"{"b":1,"\u0061":null,"c":[{"a":1}]}"#, "[1]", "\"a\""],
                vec![
                    r#"{"a":null}"#,
                    r#"{"a":1,"b":1}"#,
                    r#"{"\u0061":1,"b":1}"#,
                    r#"{"a":null,"b":1,"é\"":1}"#,
                    "{}",
                ],
            ),
            (
                json!({ "additionalProperties": false, "properties": { "a": all }, "required": ["b"] }),
                vec!["1"],
                vec!["{}", r#"{"a":1}"#, r#"{"a":1,"b":1}"#],
            ),
            (
                json!({ "additionalProperties": { "type": "string" }, "properties": { "a": {} } }),
                vec![r#"{"a":1,"b":"x"}"#, "{}"],
                vec![r#"{"b":1}"#],
            ),
            (
                json!({ "minProperties": 1, "maxProperties": 2 }),
                vec![r#"{"a":1}"#, "1"],
                vec!["{}", r#"{"a":1,"b":2,"c":3}"#],
            ),
            (
                json!({ "items": { "type": "string", "format": "date" }, "minItems": 1, "maxItems": 2 }),
                vec![r#"["2024-02-29"]"#, "{}"],
                vec!["[]", r#"["2023-02-29"]"#, "[1]", r#"["2024-01-01","2024-01-01","2024-01-01"]"#],
            ),
            (
                json!({ "type": "string", "pattern": "^[a-z]+$" }),
                vec![r#""abc""#, r#""\u0061""#],
                vec![r#""""#, r#""A""#, "1"],
            ),
            (
                json!({ "$defs": { "n": { "minimum": 3 } }, "$ref": "#/$defs/n", "type": "integer" }),
                vec!["3"],
                vec!["2", "3.5", "{}"],
            ),
            (
                json!({ "properties": { "a": { "if": { "const": 1 }, "then": false } } }),
                vec![r#"{"a":2}"#, r#"{"b":1}"#],
                vec![r#"{"a":1}"#, r#"{"a":1.0}"#],
            ),
            // A list.
            (
                json!({ "type": "object", "properties": { "next": { "$ref": "#" } }, "required": ["v"] }),
                vec![r#"{"v":1,"next":{"v":1}}"#, r#"{"v":1}"#],
                vec![
                    r#"{"v":1,"next":{}}"#,
                    r#"{"v":1,"next":{"v":1,"next":{"next":1}}}"#,
                    r#"{"v":1,"next":1}"#,
                ],
            ),
        ] {
            let compiled = Alone(schema.clone()).schema();
            assert!(compiled.form.is_some(), "{schema}");
            for (texts, expected) in [(valid, true), (invalid, false)] {
                for text in texts {
                    assert_eq!(agree(&compiled, text), Some(expected), "{schema} {text}");
                    let padded = format!(" {text}\n");
                    let judged = scan(padded.as_bytes(), &Limits::DEFAULT).unwrap();
                    assert_eq!(compiled.check(judged).is_ok(), expected, "{schema} {text}");
                }
            }
        }
    }

    #[test]
    fn what_the_form_cannot_say_is_left_to_jsonschema() {
        for schema in [
            json!({ "oneOf": [{ "const": 1 }, { "type": "string" }] }),
            json!({ "const": 1 }),
            json!({ "type": "object", "patternProperties": { "^x": false }, "additionalProperties": true }),
            json!({ "unevaluatedProperties": false, "properties": { "a": true } }),
        ] {
            assert!(Alone(schema.clone()).schema().form.is_none(), "{schema}");
        }
    }

    #[test]
    fn the_first_offending_field_is_told() {
        let schema = Alone(json!({ "properties": { "a": { "items": { "type": "null" } } } })).schema();
        let check = |text: &str| schema.check(scan(text.as_bytes(), &Limits::DEFAULT).unwrap());
        assert_eq!(check(r#"{"a":[null,1]}"#), Err("/a/1".into()));
        assert_eq!(check(r#"{"a":[null]}"#), Ok(()));
    }

    fn any_schema() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            Just(json!({})),
            prop::sample::subsequence(
                vec!["null", "boolean", "object", "array", "string", "number", "integer"],
                1..4
            )
            .prop_map(|kinds| json!({ "type": kinds })),
            any_leaf().prop_map(|value| json!({ "const": value })),
            prop::collection::vec(any_leaf(), 1..4).prop_map(|values| {
                // Twice the same is no schema.
                let mut all: Vec<Value> = Vec::new();
                values.into_iter().for_each(|value| {
                    if !all.contains(&value) {
                        all.push(value)
                    }
                });
                json!({ "enum": all })
            }),
            (0..4_u8, 0..4_u8).prop_map(|(min, max)| json!({ "minLength": min, "maxLength": max })),
            (0..3_u8, 0..4_u8).prop_map(|(min, max)| json!({ "minItems": min, "maxItems": max })),
            (0..3_u8, 0..4_u8).prop_map(|(min, max)| json!({ "minProperties": min, "maxProperties": max })),
            (-3..3_i8).prop_map(|min| json!({ "minimum": min, "exclusiveMaximum": 2.5 })),
            Just(json!({ "multipleOf": 2, "type": ["integer", "string"] })),
            Just(json!({ "pattern": "^a" })),
            Just(json!({ "$ref": "#" })),
            Just(json!({ "$ref": "#/$defs/a" })),
            Just(json!({ "not": { "type": "string" } })),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            let members = prop::collection::btree_map("[abé]", inner.clone(), 0..3);
            let required = prop::sample::subsequence(vec!["a", "b", "é"], 0..3);
            prop_oneof![
                (members, required, proptest::option::of(inner.clone())).prop_map(
                    |(members, required, other)| {
                        let mut schema = json!({ "properties": members, "required": required });
                        if let Some(other) = other {
                            schema["additionalProperties"] = other;
                        }
                        schema
                    }
                ),
                (inner.clone(), 0..3_u8).prop_map(|(items, min)| json!({ "items": items, "minItems": min })),
                prop::collection::vec(inner.clone(), 1..3).prop_map(|all| json!({ "allOf": all })),
                prop::collection::vec(inner.clone(), 1..3).prop_map(|any| json!({ "anyOf": any })),
                // Keywords of both at once.
                (inner.clone(), inner).prop_map(|(one, other)| match (one, other) {
                    (Value::Object(mut one), Value::Object(other)) => {
                        other.into_iter().for_each(|(keyword, value)| drop(one.insert(keyword, value)));
                        Value::Object(one)
                    }
                    (one, _) => one,
                }),
            ]
        })
    }

    fn any_leaf() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (-4..4_i64).prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            prop::sample::select(vec![1.0, 2.0, -0.0, 0.5, 2.5, 1e300]).prop_map(Value::from),
            "[ab\"\\\\é🦀\n]{0,4}".prop_map(Value::from),
        ]
    }

    fn any_value() -> impl Strategy<Value = Value> {
        any_leaf().prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[abcé]", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// The same text with its strings written otherwise; no literal has a b.
    fn escaped(text: &str) -> String {
        text.chars().map(|c| if c == 'b' { "\\u0062".to_owned() } else { c.to_string() }).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(2_000), ..ProptestConfig::default() })]

        #[test]
        fn the_form_says_what_jsonschema_says(
            root in any_schema(),
            definition in any_schema(),
            values in prop::collection::vec(any_value(), 1..8),
        ) {
            let Value::Object(mut root) = root else { return Ok(()) };
            // A schema that is nothing but itself never ends, wherever it is judged.
            let goes_round = |schema: &Value| schema.to_string().contains("\"$ref\"");
            if !goes_round(&Value::Object(root.clone())) || !goes_round(&definition) {
                root.insert("$defs".into(), json!({ "a": definition }));
            }
            let root = Value::Object(root);
            if ends_nowhere(&root, &root, 0) {
                return Ok(());
            }
            let library = Alone(root);
            let Some(validator) = library.validator(&library.0) else { return Ok(()) };
            let schema = Schema::new(validator, Alone::FILE, &library);
            for value in values {
                for text in [value.to_string(), serde_json::to_string_pretty(&value).unwrap(), escaped(&value.to_string())] {
                    agree(&schema, &text);
                }
            }
        }
    }

    /// Whether a schema leads back to itself about the same value, or to nothing.
    fn ends_nowhere(schema: &Value, root: &Value, depth: usize) -> bool {
        if depth > 12 {
            return true;
        }
        let Value::Object(members) = schema else { return false };
        members.iter().any(|(keyword, value)| match (keyword.as_str(), value) {
            ("$ref", Value::String(place)) => match root.pointer(place.trim_start_matches('#')) {
                Some(found) => ends_nowhere(found, root, depth + 1),
                None => true,
            },
            ("allOf" | "anyOf", Value::Array(all)) => {
                all.iter().any(|one| ends_nowhere(one, root, depth + 1))
            }
            ("not", one) => ends_nowhere(one, root, depth + 1),
            _ => false,
        })
    }
}
