//! `[[ciphertext]]`, and who refers to it.

use std::collections::HashMap;
use std::sync::Arc;

use crate::ciphertext::Ciphertext;
use crate::compile::{Compiler, MIB};
use crate::document::CiphertextDocument;
use crate::json;
use crate::rule::CiphertextRule;
use crate::source::hint;

/// A compiled `[[ciphertext]]` under its name.
pub(super) struct Named {
    name: Arc<str>,
    envelope: Option<String>,
    rule: Arc<Ciphertext>,
}

impl Compiler<'_> {
    pub(super) fn ciphertext(
        &mut self,
        at: &str,
        document: &CiphertextDocument,
        names: &mut HashMap<String, String>,
    ) -> Named {
        let d = document;
        for (index, other) in d.readable.iter().enumerate() {
            if other.is_empty() || other.starts_with(&d.prefix) || d.prefix.starts_with(other.as_str()) {
                let message = format!("expected a prefix that cannot be confused with \"{}\"", d.prefix);
                self.error(&format!("{at}/readable/{index}"), message);
            }
        }
        if d.envelope.is_none() && d.payload.is_empty() {
            self.error(at, "expected `payload`, `envelope` or both: nothing would be asked of a message");
        }
        let min_bytes = self.size(&format!("{at}/min_bytes"), d.min_bytes, 16, 16..=16 * MIB);
        let rule = Ciphertext {
            pointer: self.pointer(&format!("{at}/pointer"), &d.pointer, false),
            prefix: d.prefix.as_str().into(),
            readable: d.readable.iter().map(|prefix| prefix.as_str().into()).collect(),
            envelope: self.schema(&format!("{at}/envelope"), d.envelope.as_deref()),
            plaintext: self.pointers(&format!("{at}/plaintext"), &d.plaintext),
            payload: self.pointers(&format!("{at}/payload"), &d.payload),
            min_bytes: usize::try_from(min_bytes).unwrap_or(usize::MAX),
        };
        Named { name: self.unique(at, &d.name, names), envelope: d.envelope.clone(), rule: Arc::new(rule) }
    }

    /// The rule of that name, for something with this schema.
    pub(super) fn ciphertext_rule(
        &mut self,
        pointer: &str,
        name: Option<&str>,
        schema: Option<&str>,
        known: &[Named],
    ) -> Option<CiphertextRule> {
        let name = name?;
        let Some(named) = known.iter().find(|named| *named.name == *name) else {
            let names: Vec<_> = known.iter().map(|named| &*named.name).collect();
            self.error(pointer, format!("unknown ciphertext `{name}`{}", hint(name, &names)));
            return None;
        };
        // One look is enough where both are the same file.
        let covers_schema = schema.is_some() && named.envelope.as_deref() == schema;
        Some(CiphertextRule { rule: Arc::clone(&named.rule), covers_schema })
    }

    fn pointers(&mut self, at: &str, texts: &[String]) -> Vec<Vec<String>> {
        let pointers = texts.iter().enumerate();
        pointers.map(|(index, text)| self.pointer(&format!("{at}/{index}"), text, true)).collect()
    }

    fn pointer(&mut self, at: &str, text: &str, items: bool) -> Vec<String> {
        match json::pointer_tokens(text).filter(|tokens| !tokens.is_empty()) {
            Some(tokens) if items || !tokens.iter().any(|token| token == "*") => tokens,
            Some(_) | None => {
                let message = "expected a JSON pointer (RFC 6901) to a field, such as \"/conversation\"";
                self.error(at, message);
                Vec::new()
            }
        }
    }
}
