//! `[json]` and its overrides → bounds.

use crate::compile::{Compiler, KIB, MIB};
use crate::document::JsonDocument;
use crate::json::Limits;

impl Compiler<'_> {
    /// Bounds of a table; what it leaves out is `around`'s.
    pub(super) fn json(&mut self, at: &str, document: &JsonDocument, around: Limits) -> Limits {
        let d = document;
        let mut size = |key: &str, text, default: u32, highest| {
            self.size32(&format!("{at}/{key}"), text, default.into(), 1..=highest)
        };
        Limits {
            depth: d.max_depth.unwrap_or(around.depth),
            values: d.max_values.unwrap_or(around.values),
            members: d.max_members.unwrap_or(around.members),
            items: d.max_items.unwrap_or(around.items),
            key: size("max_key", d.max_key, around.key, 64 * KIB),
            string: size("max_string", d.max_string, around.string, 16 * MIB),
            digits: d.max_digits.unwrap_or(around.digits),
            exponent: d.max_exponent.unwrap_or(around.exponent),
        }
    }

    /// Bounds of one type of message: its type is known only after all were held against the websocket's.
    pub(super) fn message_json(&mut self, at: &str, document: &JsonDocument, around: Limits) -> Limits {
        let own = self.json(at, document, around);
        for (key, own, around) in [
            ("max_depth", own.depth, around.depth),
            ("max_values", own.values, around.values),
            ("max_members", own.members, around.members),
            ("max_items", own.items, around.items),
            ("max_key", own.key, around.key),
            ("max_string", own.string, around.string),
            ("max_digits", own.digits, around.digits),
            ("max_exponent", own.exponent, around.exponent),
        ] {
            if own > around {
                let message = format!("expected no more than the websocket's, which is {around}");
                self.error(&format!("{at}/{key}"), message);
            }
        }
        own
    }
}
