//! A JSON text that was judged, read where it lies.

use std::borrow::Cow;

use serde_json::Value;

use super::index;
use super::scan::{plain_run, unescape};
use crate::denial::{Denial, JsonFault};

/// Proof that [`scan`](super::scan()) agreed with a text: it is JSON, no key stands twice in an object of it, and it is within
/// bounds. Made by it only.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Judged<'t> {
    text: &'t str,
}

impl<'t> Judged<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self { text }
    }

    /// The string at unescaped tokens, if it is one; a copy only where it was written with escapes.
    pub(crate) fn string(self, tokens: &[String]) -> Option<Cow<'t, str>> {
        let mut cursor = self.cursor();
        for token in tokens {
            cursor.enter(token)?;
        }
        match cursor.peek() {
            b'"' => cursor.string().text(),
            _ => None,
        }
    }

    /// All of it.
    ///
    /// # Errors
    /// [`Denial::Json`] where serde_json does not agree with the scan, which it does: fail closed.
    pub(crate) fn value(self) -> Result<Value, Denial> {
        serde_json::from_str(self.text).map_err(|_| Denial::Json {
            fault: JsonFault::Syntax,
            at: 0,
            pointer: String::new(),
        })
    }

    /// At its one value.
    pub(super) fn cursor(self) -> Cursor<'t> {
        let mut cursor = Cursor::new(self.text);
        cursor.space();
        cursor
    }
}

/// A place in a text that is known to be JSON. In one that is not it goes astray, but never beyond the end.
#[derive(Clone, Copy)]
pub(super) struct Cursor<'t> {
    text: &'t str,
    pub(super) at: usize,
}

/// A string as it is written, between its quotes.
#[derive(Clone, Copy)]
pub(super) struct Written<'t> {
    pub(super) raw: &'t str,
    pub(super) escaped: bool,
}

impl<'t> Written<'t> {
    pub(super) fn text(self) -> Option<Cow<'t, str>> {
        if !self.escaped {
            return Some(Cow::Borrowed(self.raw));
        }
        let mut bytes = Vec::with_capacity(self.raw.len());
        unescape(self.raw.as_bytes(), &mut bytes);
        String::from_utf8(bytes).ok().map(Cow::Owned)
    }

    pub(super) fn is(self, other: &str) -> bool {
        match self.escaped {
            false => self.raw == other,
            true => self.text().is_some_and(|text| text == other),
        }
    }

    /// Its length in characters.
    pub(super) fn count(self) -> usize {
        let characters = |text: &str| text.bytes().filter(|byte| byte & 0xC0 != 0x80).count();
        match self.escaped {
            false => characters(self.raw),
            true => self.text().map_or(0, |text| characters(&text)),
        }
    }
}

impl<'t> Cursor<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self { text, at: 0 }
    }

    fn rest(&self) -> &'t [u8] {
        self.text.as_bytes().get(self.at..).unwrap_or_default()
    }

    /// The byte at hand; 0 at the end.
    pub(super) fn peek(&self) -> u8 {
        self.text.as_bytes().get(self.at).copied().unwrap_or(0)
    }

    pub(super) fn space(&mut self) {
        while let b' ' | b'\n' | b'\r' | b'\t' = self.peek() {
            self.at += 1;
        }
    }

    /// Past a byte and what space follows it.
    pub(super) fn step(&mut self) {
        self.at += 1;
        self.space();
    }

    /// Takes a string. What stands at hand is its quote.
    pub(super) fn string(&mut self) -> Written<'t> {
        self.at += 1;
        let (start, mut escaped) = (self.at, false);
        loop {
            self.at += plain_run(self.rest());
            match self.peek() {
                b'\\' => {
                    escaped = true;
                    self.at += 2;
                }
                _ => break,
            }
        }
        let raw = self.text.get(start..self.at).unwrap_or_default();
        self.at += 1;
        Written { raw, escaped }
    }

    /// Takes the key at hand and the colon behind it.
    pub(super) fn key(&mut self) -> Written<'t> {
        let key = self.string();
        self.space();
        self.step();
        key
    }

    /// Past the comma to the next member or item, or past the end of the container (then `false`).
    pub(super) fn next(&mut self) -> bool {
        self.space();
        let goes_on = self.peek() == b',';
        if goes_on {
            self.step()
        } else {
            self.at += 1
        }
        goes_on
    }

    /// Past the bracket to the first member or item, or past the end of an empty container (then `false`).
    pub(super) fn first(&mut self) -> bool {
        self.step();
        let is_empty = matches!(self.peek(), b'}' | b']');
        self.at += usize::from(is_empty);
        !is_empty
    }

    /// Steps from a container to what stands in it at `token`.
    pub(super) fn enter(&mut self, token: &str) -> Option<()> {
        let is_object = match self.peek() {
            b'{' => true,
            b'[' => false,
            _ => return None,
        };
        let wanted = if is_object { None } else { Some(index(token)?) };
        let (mut place, mut goes_on) = (0, self.first());
        while goes_on {
            let here = match wanted {
                None => self.key().is(token),
                Some(wanted) => place == wanted,
            };
            if here {
                return Some(());
            }
            self.skip();
            place += 1;
            goes_on = self.next();
        }
        None
    }

    /// Past one value; what it is made of is its text.
    pub(super) fn skip(&mut self) -> &'t str {
        let start = self.at;
        let mut depth = 0_usize;
        loop {
            match self.peek() {
                b'"' => drop(self.string()),
                b'{' | b'[' => {
                    depth += 1;
                    self.at += 1;
                }
                b'}' | b']' => {
                    depth = depth.saturating_sub(1);
                    self.at += 1;
                }
                b',' | b':' | b' ' | b'\n' | b'\r' | b'\t' => {
                    self.at += 1;
                    continue;
                }
                0 => break,
                _ => self.scalar(),
            }
            if depth == 0 {
                break;
            }
        }
        self.text.get(start..self.at).unwrap_or_default()
    }

    /// Past a number or a literal.
    fn scalar(&mut self) {
        let is_part = |byte: &u8| !matches!(byte, b',' | b'}' | b']' | b' ' | b'\n' | b'\r' | b'\t' | b'"');
        self.at += self.rest().iter().take_while(|byte| is_part(byte)).count().max(1);
    }
}
