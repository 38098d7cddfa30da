//! One strict pass over a JSON text (RFC 8259), without building a value.
//!
//! What it accepts, `serde_json` accepts too, and the other way round, but for keys that stand twice and for
//! [`Limits`]; both are property-tested. Its stacks belong to the thread: a message takes no memory.

use std::cell::RefCell;
use std::str;

use super::judged::Judged;
use super::{MAX_POINTER, printable_pointer};
use crate::denial::{Denial, JsonFault};

/// Scratch that grew beyond so many entries for a long text is given back.
const SCRATCH_KEPT: usize = 4096;

/// Keys of one object that are compared with each other rather than sorted.
const FEW_KEYS: usize = 8;

/// Digits before the point up to which a number without exponent is surely a finite double.
const SURE_DIGITS: u64 = 300;

/// How large a JSON text may be in every way that costs its reader. Made at load from `[json]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Objects and arrays within each other. 1 to 127.
    pub(crate) depth: u32,
    /// Values in all, containers included.
    pub(crate) values: u32,
    /// Members of one object.
    pub(crate) members: u32,
    /// Items of one array.
    pub(crate) items: u32,
    /// Bytes of a key, as it is written.
    pub(crate) key: u32,
    /// Bytes of a string, as it is written.
    pub(crate) string: u32,
    /// Digits of a number, before and behind the point.
    pub(crate) digits: u32,
    /// Of a number, without its sign.
    pub(crate) exponent: u32,
}

impl Limits {
    pub(crate) const DEFAULT: Self = Self {
        depth: 32,
        values: 10_000,
        members: 1_000,
        items: 10_000,
        key: 256,
        string: 16 * 1024 * 1024,
        digits: 100,
        exponent: 308,
    };
}

/// Why a text was refused, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) fault: JsonFault,
    /// Offset of the byte that shows it.
    pub(crate) at: usize,
    /// JSON pointer to the value or key at hand, fit to be shown.
    pub(crate) pointer: String,
}

impl From<Fault> for Denial {
    fn from(fault: Fault) -> Self {
        let Fault { fault, at, pointer } = fault;
        Self::Json { fault, at: u32::try_from(at).unwrap_or(u32::MAX), pointer }
    }
}

/// Judges a text.
pub(crate) fn scan<'t>(text: &'t [u8], limits: &Limits) -> Result<Judged<'t>, Fault> {
    thread_local! {
        static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
    }
    let checked = match str::from_utf8(text) {
        Ok(checked) => checked,
        Err(error) => {
            let at = error.valid_up_to();
            return Err(Fault { fault: JsonFault::Utf8, at, pointer: String::new() });
        }
    };
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.frames.clear();
        scratch.keys.clear();
        scratch.decoded.clear();
        let mut scanner = Scanner { text, at: 0, limits, values: 0, scratch };
        let outcome = match scanner.text() {
            Ok(()) => Ok(Judged::new(checked)),
            Err(fault) => Err(Fault { fault, at: scanner.at, pointer: scanner.pointer() }),
        };
        scratch.trim();
        outcome
    })
}

/// Stacks of the texts before, empty.
#[derive(Default)]
struct Scratch {
    /// Containers that are open.
    frames: Vec<Frame>,
    /// Keys of the objects among them.
    keys: Vec<Span>,
    /// Keys that were written with escapes, without them.
    decoded: Vec<u8>,
}

impl Scratch {
    fn trim(&mut self) {
        if self.keys.capacity() > SCRATCH_KEPT {
            self.keys = Vec::new();
        }
        if self.decoded.capacity() > SCRATCH_KEPT {
            self.decoded = Vec::new();
        }
    }
}

#[derive(Clone, Copy)]
struct Frame {
    is_object: bool,
    /// Where its keys begin in the stack of keys.
    keys: usize,
    /// Members or items so far.
    count: u32,
}

/// A string between its quotes.
#[derive(Clone, Copy)]
struct Span {
    start: usize,
    end: usize,
    /// In the text: it holds escapes. In the stack of keys: it points into what was decoded.
    escaped: bool,
}

struct Scanner<'t, 's> {
    text: &'t [u8],
    at: usize,
    limits: &'s Limits,
    values: u32,
    scratch: &'s mut Scratch,
}

impl Scanner<'_, '_> {
    /// One value, and nothing after it.
    fn text(&mut self) -> Result<(), JsonFault> {
        self.space();
        loop {
            self.value()?;
            // Ends what ends here, until something goes on.
            loop {
                self.space();
                let Some(&frame) = self.scratch.frames.last() else {
                    return if self.at == self.text.len() { Ok(()) } else { Err(JsonFault::Syntax) };
                };
                match (self.peek()?, frame.is_object) {
                    (b',', true) => {
                        self.at += 1;
                        self.space();
                        self.key()?;
                    }
                    (b',', false) => {
                        self.at += 1;
                        self.space();
                        self.item()?;
                    }
                    (b'}', true) | (b']', false) => {
                        self.close(frame)?;
                        continue;
                    }
                    _ => return Err(JsonFault::Syntax),
                }
                break;
            }
        }
    }

    /// A scalar or an empty container; or as far into a container as to its first value's end.
    fn value(&mut self) -> Result<(), JsonFault> {
        loop {
            self.values += 1;
            if self.values > self.limits.values {
                return Err(JsonFault::Values);
            }
            match self.peek()? {
                b'"' => {
                    let span = self.string()?;
                    if span.end - span.start > self.limits.string as usize {
                        return Err(JsonFault::String);
                    }
                    return Ok(());
                }
                b'{' => {
                    self.open(true)?;
                    if self.peek()? == b'}' {
                        self.leave();
                        return Ok(());
                    }
                    self.key()?;
                }
                b'[' => {
                    self.open(false)?;
                    if self.peek()? == b']' {
                        self.leave();
                        return Ok(());
                    }
                    self.item()?;
                }
                b'-' | b'0'..=b'9' => return self.number(),
                b't' => return self.literal(b"true"),
                b'f' => return self.literal(b"false"),
                b'n' => return self.literal(b"null"),
                _ => return Err(JsonFault::Syntax),
            }
        }
    }

    fn peek(&self) -> Result<u8, JsonFault> {
        self.text.get(self.at).copied().ok_or(JsonFault::End)
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.text.get(self.at) {
            self.at += 1;
        }
    }

    fn open(&mut self, is_object: bool) -> Result<(), JsonFault> {
        let Scratch { frames, keys, .. } = &mut *self.scratch;
        if frames.len() >= self.limits.depth as usize {
            return Err(JsonFault::Depth);
        }
        frames.push(Frame { is_object, keys: keys.len(), count: 0 });
        self.at += 1;
        self.space();
        Ok(())
    }

    fn close(&mut self, frame: Frame) -> Result<(), JsonFault> {
        if frame.is_object && frame.count > 1 && self.has_duplicate(frame) {
            return Err(JsonFault::Duplicate);
        }
        self.scratch.keys.truncate(frame.keys);
        self.leave();
        Ok(())
    }

    fn leave(&mut self) {
        self.at += 1;
        self.scratch.frames.pop();
    }

    /// One more in the innermost container: the how manieth it is.
    fn count(&mut self) -> u32 {
        self.scratch.frames.last_mut().map_or(0, |frame| {
            frame.count += 1;
            frame.count
        })
    }

    fn item(&mut self) -> Result<(), JsonFault> {
        if self.count() > self.limits.items { Err(JsonFault::Items) } else { Ok(()) }
    }

    /// A key and the colon behind it.
    fn key(&mut self) -> Result<(), JsonFault> {
        if self.peek()? != b'"' {
            return Err(JsonFault::Syntax);
        }
        let mut span = self.string()?;
        let count = self.count();
        if span.end - span.start > self.limits.key as usize {
            return Err(JsonFault::Key);
        }
        let Scratch { keys, decoded, .. } = &mut *self.scratch;
        if span.escaped {
            let start = decoded.len();
            unescape(self.text.get(span.start..span.end).unwrap_or_default(), decoded);
            span = Span { start, end: decoded.len(), escaped: true };
        }
        keys.push(span);
        if count > self.limits.members {
            return Err(JsonFault::Members);
        }
        self.space();
        if self.peek()? != b':' {
            return Err(JsonFault::Syntax);
        }
        self.at += 1;
        self.space();
        Ok(())
    }

    fn key_text(&self, span: Span) -> &[u8] {
        let from = if span.escaped { self.scratch.decoded.as_slice() } else { self.text };
        from.get(span.start..span.end).unwrap_or_default()
    }

    /// Whether a key stands twice in an object that ends here. Leaves the one that does on top.
    fn has_duplicate(&mut self, frame: Frame) -> bool {
        let count = frame.count as usize;
        let found = if count <= FEW_KEYS {
            let keys = self.scratch.keys.get(frame.keys..).unwrap_or_default();
            keys.iter().enumerate().find_map(|(place, &key)| {
                let text = self.key_text(key);
                keys.iter().take(place).any(|&other| self.key_text(other) == text).then_some(key)
            })
        } else {
            // Sorted rather than hashed: no peer can choose keys that make it slow.
            let Scratch { keys, decoded, .. } = &mut *self.scratch;
            let text = |key: &Span| {
                let from = if key.escaped { decoded.as_slice() } else { self.text };
                from.get(key.start..key.end).unwrap_or_default()
            };
            let keys = keys.get_mut(frame.keys..).unwrap_or_default();
            keys.sort_unstable_by(|a, b| text(a).cmp(text(b)));
            keys.windows(2).find_map(|pair| match pair {
                [a, b] if text(a) == text(b) => Some(*b),
                _ => None,
            })
        };
        self.scratch.keys.extend(found);
        found.is_some()
    }

    fn literal(&mut self, word: &[u8]) -> Result<(), JsonFault> {
        for &byte in word {
            if self.peek()? != byte {
                return Err(JsonFault::Syntax);
            }
            self.at += 1;
        }
        Ok(())
    }

    fn digits(&mut self) -> Result<u64, JsonFault> {
        let start = self.at;
        while let Some(b'0'..=b'9') = self.text.get(self.at) {
            self.at += 1;
        }
        match self.at - start {
            0 => Err(self.peek().map_or_else(|end| end, |_| JsonFault::Syntax)),
            count => Ok(count as u64),
        }
    }

    fn number(&mut self) -> Result<(), JsonFault> {
        let start = self.at;
        if self.peek()? == b'-' {
            self.at += 1;
        }
        let whole = if self.peek()? == b'0' {
            self.at += 1;
            1
        } else {
            self.digits()?
        };
        let mut digits = whole;
        if self.text.get(self.at) == Some(&b'.') {
            self.at += 1;
            digits += self.digits()?;
        }
        if digits > u64::from(self.limits.digits) {
            return Err(JsonFault::Digits);
        }
        let mut exponent = None;
        if let Some(b'e' | b'E') = self.text.get(self.at) {
            self.at += 1;
            if let Some(b'+' | b'-') = self.text.get(self.at) {
                self.at += 1;
            }
            let first = self.at;
            self.digits()?;
            let digits = self.text.get(first..self.at).unwrap_or_default();
            exponent =
                Some(digits.iter().fold(0_u32, |sum, digit| {
                    sum.saturating_mul(10).saturating_add(u32::from(digit - b'0'))
                }));
        }
        if exponent.is_some_and(|exponent| exponent > self.limits.exponent) {
            return Err(JsonFault::Exponent);
        }
        // Beyond a double readers disagree (RFC 8259 §6).
        if exponent.is_some() || whole > SURE_DIGITS {
            let text = str::from_utf8(self.text.get(start..self.at).unwrap_or_default()).unwrap_or_default();
            if !text.parse::<f64>().is_ok_and(f64::is_finite) {
                return Err(JsonFault::Range);
            }
        }
        Ok(())
    }

    /// The string that begins here, with its quotes taken.
    fn string(&mut self) -> Result<Span, JsonFault> {
        let start = self.at + 1;
        self.at = start;
        let mut escaped = false;
        loop {
            self.at += plain_run(self.text.get(self.at..).unwrap_or_default());
            match self.peek()? {
                b'"' => {
                    let end = self.at;
                    self.at += 1;
                    return Ok(Span { start, end, escaped });
                }
                b'\\' => {
                    escaped = true;
                    self.escape()?;
                }
                // A control character.
                _ => return Err(JsonFault::Syntax),
            }
        }
    }

    fn escape(&mut self) -> Result<(), JsonFault> {
        self.at += 1;
        match self.peek()? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => self.at += 1,
            b'u' => {
                let first = self.hex()?;
                if (0xDC00..0xE000).contains(&first) {
                    return Err(JsonFault::Surrogate);
                }
                if (0xD800..0xDC00).contains(&first) {
                    if self.peek()? != b'\\' || self.text.get(self.at + 1) != Some(&b'u') {
                        return Err(JsonFault::Surrogate);
                    }
                    self.at += 1;
                    if !(0xDC00..0xE000).contains(&self.hex()?) {
                        return Err(JsonFault::Surrogate);
                    }
                }
            }
            _ => return Err(JsonFault::Syntax),
        }
        Ok(())
    }

    /// Four digits behind the `u` at hand.
    fn hex(&mut self) -> Result<u32, JsonFault> {
        let mut value = 0;
        for _ in 0..4 {
            self.at += 1;
            let digit = char::from(self.peek()?).to_digit(16).ok_or(JsonFault::Syntax)?;
            value = value << 4 | digit;
        }
        self.at += 1;
        Ok(value)
    }

    /// Where the scanner stands, fit to be shown.
    fn pointer(&self) -> String {
        let mut pointer = String::new();
        let Scratch { frames, keys, .. } = &*self.scratch;
        for (depth, frame) in frames.iter().enumerate() {
            if pointer.len() > MAX_POINTER {
                break;
            }
            if !frame.is_object {
                if frame.count > 0 {
                    pointer.push_str(&format!("/{}", frame.count - 1));
                }
                continue;
            }
            let end = frames.get(depth + 1).map_or(keys.len(), |inner| inner.keys);
            let Some(&key) = keys.get(frame.keys..end).and_then(<[Span]>::last) else { break };
            let start: String =
                String::from_utf8_lossy(self.key_text(key)).chars().take(MAX_POINTER).collect();
            pointer.push('/');
            pointer.push_str(&start.replace('~', "~0").replace('/', "~1"));
        }
        printable_pointer(&pointer)
    }
}

/// How many bytes from the start are neither quote, backslash nor control character.
pub(super) fn plain_run(bytes: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGHS: u64 = 0x8080_8080_8080_8080;
    // The lowest byte with its high bit set is the first one below the bound, whatever stands above it.
    let below = |word: u64, bound: u64| word.wrapping_sub(ONES * bound) & !word & HIGHS;
    let (words, rest) = bytes.as_chunks::<8>();
    let mut run = 0;
    for word in words {
        let word = u64::from_le_bytes(*word);
        let hits = below(word, 0x20)
            | below(word ^ (ONES * u64::from(b'"')), 1)
            | below(word ^ (ONES * u64::from(b'\\')), 1);
        if hits != 0 {
            return run + hits.trailing_zeros() as usize / 8;
        }
        run += 8;
    }
    run + rest.iter().take_while(|byte| !matches!(byte, 0..0x20 | b'"' | b'\\')).count()
}

/// Takes the escapes out of a string that was judged.
pub(super) fn unescape(written: &[u8], into: &mut Vec<u8>) {
    let mut rest = written;
    while let Some(place) = rest.iter().position(|&byte| byte == b'\\') {
        let (plain, escape) = rest.split_at_checked(place).unwrap_or_default();
        into.extend_from_slice(plain);
        let (character, length) = match escape.get(1) {
            Some(b'b') => ('\u{8}', 2),
            Some(b'f') => ('\u{c}', 2),
            Some(b'n') => ('\n', 2),
            Some(b'r') => ('\r', 2),
            Some(b't') => ('\t', 2),
            Some(b'u') => {
                let unit = |at: usize| {
                    let digits = escape.get(at..at + 4).and_then(|digits| str::from_utf8(digits).ok());
                    digits.and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0xFFFD)
                };
                match unit(2) {
                    high @ 0xD800..0xDC00 => {
                        let code = 0x1_0000 + ((high & 0x3FF) << 10) + (unit(8) & 0x3FF);
                        (char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), 12)
                    }
                    code => (char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER), 6),
                }
            }
            Some(&other) => (char::from(other), 2),
            None => return,
        };
        into.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
        rest = escape.get(length..).unwrap_or_default();
    }
    into.extend_from_slice(rest);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::json::{lookup, parse, pointer_tokens};

    const LOOSE: Limits = Limits {
        depth: 127,
        values: u32::MAX,
        members: u32::MAX,
        items: u32::MAX,
        key: u32::MAX,
        string: u32::MAX,
        digits: u32::MAX,
        exponent: u32::MAX,
    };

    fn fault(text: &str, limits: &Limits) -> Option<(JsonFault, String)> {
        scan(text.as_bytes(), limits).err().map(|fault| (fault.fault, fault.pointer))
    }

    #[track_caller]
    fn agree(text: &[u8], tokens: &[String]) {
        let shown = String::from_utf8_lossy(text);
        match (scan(text, &LOOSE), parse(text)) {
            (Ok(judged), Ok(value)) => {
                assert_eq!(judged.value().unwrap(), value, "{shown}");
                let found = judged.string(tokens);
                assert_eq!(found.as_deref(), lookup(&value, tokens).and_then(Value::as_str), "{shown}");
            }
            (Err(_), Err(_)) => {}
            (ours, theirs) => panic!("{shown}: {ours:?}, serde_json {theirs:?}"),
        }
    }

    #[test]
    fn faults_name_what_and_where() {
        let limits =
            Limits { depth: 3, values: 8, members: 2, items: 3, key: 4, string: 5, digits: 4, exponent: 2 };
        for (text, expected, pointer) in [
            (r#"{"a":{"b":[1]}}"#, None, ""),
            (r#"{"a":{"b":[[]]}}"#, Some(JsonFault::Depth), "/a/b/0"),
            ("[[1,2,3],[1,2,3]]", Some(JsonFault::Values), "/1/2"),
            (r#"{"a":[{"x":1,"y":2,"z":3}]}"#, Some(JsonFault::Members), "/a/0/z"),
            ("[1,2,3,4]", Some(JsonFault::Items), "/3"),
            (r#"{"a":1,"abcde":2}"#, Some(JsonFault::Key), "/a"),
            (r#"{"a":["abcdef"]}"#, Some(JsonFault::String), "/a/0"),
            ("12.34", None, ""),
            ("[12.345]", Some(JsonFault::Digits), "/0"),
            ("-1e-2", None, ""),
            ("1e3", Some(JsonFault::Exponent), ""),
            (r#"{"a":{"b~/":1,"b~\/":2}}"#, Some(JsonFault::Duplicate), "/a/b~0~1"),
            (r#"{"a":[1,]}"#, Some(JsonFault::Syntax), "/a/1"),
            (r#"{"a":"\ud800"}"#, Some(JsonFault::Surrogate), "/a"),
            (r#"{"a":1"#, Some(JsonFault::End), "/a"),
            ("", Some(JsonFault::End), ""),
        ] {
            let expected = expected.map(|fault| (fault, pointer.to_owned()));
            assert_eq!(fault(text, &limits), expected, "{text}");
        }
        let range = fault("[1e309]", &Limits { exponent: u32::MAX, ..limits });
        assert_eq!(range, Some((JsonFault::Range, "/0".into())));
        let utf8 = scan(b"[\"\xff\"]", &limits).unwrap_err();
        assert_eq!((utf8.fault, utf8.at), (JsonFault::Utf8, 2));
    }

    #[test]
    fn a_key_that_stands_twice_is_found_among_few_and_among_many() {
        for count in [2, 3, 8, 9, 100, 900] {
            for twice in [0, count / 2, count - 1] {
                let mut keys: Vec<String> = (0..count).map(|n| format!("\"k{n}\":{{\"k0\":1}}")).collect();
                let text = |keys: &[String]| format!("[{{{}}}]", keys.join(","));
                assert_eq!(fault(&text(&keys), &LOOSE), None, "{count}");
                keys.push(format!("\"\\u006b{twice}\":0"));
                let expected = Some((JsonFault::Duplicate, format!("/0/k{twice}")));
                assert_eq!(fault(&text(&keys), &LOOSE), expected, "{count}");
            }
        }
    }

    #[test]
    fn a_pointer_of_the_peers_own_keys_is_fit_to_be_shown() {
        let (_, pointer) = fault(&format!(r#"{{"a\né{}":[}}"#, "x".repeat(200)), &LOOSE).unwrap();
        assert!(pointer.starts_with("/a??xx") && pointer.len() == MAX_POINTER, "{pointer}");
    }

    #[test]
    fn agrees_with_serde_json_about_hard_cases() {
        let deep = |depth| "[".repeat(depth) + &"]".repeat(depth);
        for text in
            [&deep(127), &deep(128), &format!("1{}", "0".repeat(308)), &format!("1{}", "0".repeat(309))]
        {
            agree(text.as_bytes(), &[]);
        }
        for text in [
            "1e308",
            "1e309",
            "-1e400",
            "1e-400",
            "0e999999999999",
            "1e99999999999999999999",
            "0.1e+1",
            "1.e1",
            "-0",
            "-",
            "01",
            "-01",
            "+1",
            ".1",
            "1.",
            "1e",
            "1e+",
            "0x1",
            "\"\\u00e9\"",
            "\"\\uD83D\\uDE00\"",
            "\"\\uD83Dx\"",
            "\"\\uD83D\\n\"",
            "\"\\uD83D\\uD83D\"",
            "\"\\uDE00\"",
            "\"\\u12\"",
            "\"\\u12g4\"",
            "\"\\x\"",
            "\"\t\"",
            "\"\u{7f}\"",
            "\"\\u0000\"",
            "tru",
            "true1",
            "nul",
            "[1 2]",
            "{\"a\" 1}",
            "{a:1}",
            "{,}",
            "[,]",
            "{\"a\":1,}",
            "[1,]",
            " \t\r\n1 ",
            "\u{c}1",
            "\u{a0}1",
            "1\0",
            "\"a\\",
            "\"\\\"",
            "[\"a\",\n4\n,1,",
            "{}}",
            "[]]",
            "[}",
            "{]",
            "\"\u{2028}\"",
            "\u{feff}1",
            "/**/1",
            "1//",
            "'a'",
            "NaN",
        ] {
            agree(text.as_bytes(), &[]);
        }
    }

    #[test]
    fn finds_the_string_at_a_pointer() {
        for (text, pointer, found) in [
            (r#"{"type":"say","x":{"type":"no"}}"#, "/type", Some("say")),
            (r#"{"x":{"type":"no"},"\u0074ype":"s\u00e4y"}"#, "/type", Some("säy")),
            (r#"{"x":{"type":"no"}}"#, "/type", None),
            (r#"{"type":7}"#, "/type", None),
            (r#"{"type":{"type":"no"}}"#, "/type", None),
            (r#"{"a":[{"t":"0"},{"t":"1"}],"b":[{},{"t":"2"}]}"#, "/a/1/t", Some("1")),
            (r#"[["a"],"b"]"#, "/1", Some("b")),
            (r#"[["a"],"b"]"#, "/01", None),
            (r#"{"":{"a/b":"x"}}"#, "//a~1b", Some("x")),
            (r#""root""#, "", Some("root")),
        ] {
            let tokens = pointer_tokens(pointer).unwrap();
            assert_eq!(scan(text.as_bytes(), &LOOSE).unwrap().string(&tokens).as_deref(), found, "{text}");
            agree(text.as_bytes(), &tokens);
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
            "[a\"\\\\\n\u{1}/é🦀]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 60, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                prop::collection::btree_map("[a-c\"\\\\é]{0,3}", inner, 0..12)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    /// Pointers to everything in a value.
    fn paths(value: &Value, here: Vec<String>, all: &mut Vec<Vec<String>>) {
        match value {
            Value::Object(map) => {
                map.iter().for_each(|(key, value)| {
                    paths(value, [&here[..], std::slice::from_ref(key)].concat(), all)
                });
            }
            Value::Array(items) => items.iter().enumerate().for_each(|(index, value)| {
                paths(value, [&here[..], &[index.to_string()]].concat(), all);
            }),
            _ => {}
        }
        all.push(here);
    }

    proptest! {
        #[test]
        fn accepts_every_value_and_finds_everything_in_it(value in any_value(), pretty: bool) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let text = text.unwrap();
            let mut all = Vec::new();
            paths(&value, Vec::new(), &mut all);
            for tokens in all {
                let found = scan(text.as_bytes(), &LOOSE).unwrap().string(&tokens);
                prop_assert_eq!(found.as_deref(), lookup(&value, &tokens).and_then(Value::as_str));
            }
        }

        #[test]
        fn accepts_what_serde_json_accepts(
            value in any_value(),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4_u8), 1..4),
        ) {
            let mut bytes = value.to_string().into_bytes();
            for (place, byte, what) in edits {
                let at = place.index(bytes.len() + 1);
                let likely = b"{}[]\",:\\0129.-+eEu \ntn"[byte as usize % 22];
                match what {
                    0 => bytes.insert(at, likely),
                    1 => bytes.insert(at, byte),
                    2 if at < bytes.len() => drop(bytes.remove(at)),
                    _ => bytes.truncate(at.max(1)),
                }
            }
            agree(&bytes, &[]);
        }

        #[test]
        fn agrees_about_numbers(text in "-?[0-9]{1,4}(\\.[0-9]{0,3})?([eE][+-]?[0-9]{0,4})?") {
            agree(text.as_bytes(), &[]);
        }

        #[test]
        fn agrees_about_strings(text in "\"([ -~]|\\\\[\"\\\\/bfnrtux]|\\\\u[dD][89a-fA-F][0-9a-f]{2}|\\\\u00[0-9a-f]{2}|é|🦀){0,8}\"?") {
            agree(text.as_bytes(), &[]);
        }

        #[test]
        fn agrees_about_anything(text in prop::collection::vec(any::<u8>(), 0..24)) {
            agree(&text, &[]);
        }

        #[test]
        fn a_run_is_what_it_says(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let naive = bytes.iter().position(|&byte| byte < 0x20 || byte == b'"' || byte == b'\\');
            prop_assert_eq!(plain_run(&bytes), naive.unwrap_or(bytes.len()));
        }
    }

    #[test]
    fn limits_are_the_last_that_pass() {
        let text = json!({ "abcd": [[1, 22.33, "12345"], []] }).to_string();
        let exact =
            Limits { depth: 3, values: 7, members: 1, items: 3, key: 4, string: 5, digits: 4, exponent: 0 };
        assert_eq!(fault(&text, &exact), None);
        for (smaller, expected) in [
            (Limits { depth: 2, ..exact }, JsonFault::Depth),
            (Limits { values: 6, ..exact }, JsonFault::Values),
            (Limits { members: 0, ..exact }, JsonFault::Members),
            (Limits { items: 2, ..exact }, JsonFault::Items),
            (Limits { key: 3, ..exact }, JsonFault::Key),
            (Limits { string: 4, ..exact }, JsonFault::String),
            (Limits { digits: 3, ..exact }, JsonFault::Digits),
        ] {
            assert_eq!(fault(&text, &smaller).map(|(fault, _)| fault), Some(expected));
        }
    }
}
