//! Content codings and forms of bodies, and what upstreams may answer.

use std::sync::Arc;

use http::{HeaderName, header};

use crate::answer::{ALWAYS, AnswerRule};
use crate::compile::rules::Known;
use crate::compile::{Compiler, GIB, KIB, MIB};
use crate::document::{
    AnswerErrorsDocument, AnswersDocument, BodyDocument, FormDocument, PartDocument, RouteDocument,
};
use crate::matcher::ContentCodings;
use crate::media::{self, Content};
use crate::multipart::{Form, PartRule};
use crate::source::hint;

/// Longest part that is JSON: it is held.
const MAX_JSON_PART: u64 = MIB;

pub(super) const NO_ESSENCE: &str = "expected a media type without parameters, such as \"application/json\"";

/// Whether it is a media type without parameters (RFC 6838 §4.2).
pub(super) fn is_essence(text: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$&-^_.+".contains(&b))
    };
    text.split_once('/').is_some_and(|(kind, subkind)| plain(kind) && plain(subkind))
}

impl Compiler<'_> {
    pub(super) fn codings(&mut self, at: &str, document: &BodyDocument, judged: bool) -> ContentCodings {
        let list = &document.content_codings;
        if judged && !list.is_empty() {
            self.error(at, "a body that is looked into must not be hidden by a coding");
        }
        for (index, coding) in list.iter().enumerate() {
            let pointer = format!("{at}/{index}");
            let token = |b: u8| b.is_ascii_alphanumeric() || b"-._".contains(&b);
            if coding.is_empty() || !coding.bytes().all(token) {
                self.error(&pointer, "expected a content coding, such as \"gzip\"");
            } else if coding.eq_ignore_ascii_case("identity") {
                self.error(&pointer, "a body without a coding is always taken");
            } else if list.iter().take(index).any(|other| other.eq_ignore_ascii_case(coding)) {
                self.error(&pointer, "stands twice");
            }
        }
        ContentCodings::new(list)
    }

    pub(super) fn form(
        &mut self,
        at: &str,
        document: &FormDocument,
        whole: u64,
        known: &Known<'_>,
    ) -> Arc<Form> {
        let mut parts: Vec<PartRule> = Vec::new();
        for (index, part) in document.part.iter().enumerate() {
            let at = format!("{at}/part/{index}");
            if parts.iter().any(|other| *other.name == *part.name) {
                self.error(
                    &format!("{at}/name"),
                    "another part has this name; `max` says how many there may be",
                );
            }
            parts.push(self.part(&at, part, whole, known));
        }
        let max_parts = document.max_parts.unwrap_or(16);
        let needed = parts.iter().fold(0_u32, |sum, part| sum.saturating_add(part.count.0));
        if needed > max_parts {
            self.error(&format!("{at}/max_parts"), format!("{needed} parts have to be there (min)"));
        }
        Arc::new(Form {
            max_parts,
            max_head: self.size32(&format!("{at}/max_head"), document.max_head, KIB, 64..=16 * KIB),
            parts,
        })
    }

    fn part(&mut self, at: &str, document: &PartDocument, whole: u64, known: &Known<'_>) -> PartRule {
        let d = document;
        let mut types = Vec::new();
        let text = ["text/plain".to_owned()];
        let listed = match &d.types {
            Some(types) => types.as_slice(),
            None if d.file => {
                self.error(at, "expected types, such as [\"image/png\"]: nothing is guessed of a file");
                &[]
            }
            None => &text,
        };
        for (index, name) in listed.iter().enumerate() {
            let pointer = format!("{at}/types/{index}");
            match media::media_type(name) {
                Some(known) => types.push(known),
                None => {
                    let message = format!(
                        "the content of `{name}` does not tell its type{}; \"application/octet-stream\" takes anything",
                        hint(name, &media::known_types())
                    );
                    self.error(&pointer, message);
                }
            }
        }
        let is_json = types.iter().any(|known| matches!(known.content, Content::Json));
        if d.schema.is_some() && !(is_json && types.len() == 1) {
            self.error(&format!("{at}/schema"), "a schema is for types = [\"application/json\"]");
        }
        if !d.file && d.extensions.is_some() {
            self.error(&format!("{at}/extensions"), "only names of files have extensions (file = true)");
        }
        for (index, extension) in d.extensions.iter().flatten().enumerate() {
            if extension.is_empty() || !extension.bytes().all(|b| b.is_ascii_alphanumeric()) {
                let pointer = format!("{at}/extensions/{index}");
                self.error(&pointer, "expected letters and digits without the dot, such as \"png\"");
            }
        }
        let highest = if is_json { MAX_JSON_PART } else { 64 * GIB };
        let max_bytes = self.size(&format!("{at}/max_bytes"), Some(d.max_bytes), 0, 1..=highest);
        if max_bytes > whole {
            self.error(&format!("{at}/max_bytes"), "expected no more than the body's max_bytes");
        }
        let min = d.min.unwrap_or(0);
        if d.max.is_some_and(|max| max < min) {
            self.error(&format!("{at}/max"), "expected no less than min");
        }
        PartRule {
            name: d.name.as_str().into(),
            count: (min, d.max.unwrap_or(min.max(1))),
            max_bytes,
            file: d.file,
            types,
            extensions: d.extensions.clone(),
            json: known.json,
            schema: self.schema(&format!("{at}/schema"), d.schema.as_deref()),
        }
    }

    /// What the upstream of a route may answer; `None` for anything.
    pub(super) fn answer(
        &mut self,
        at: &str,
        document: &RouteDocument,
        known: &Known<'_>,
    ) -> Option<AnswerRule> {
        if document.upstream.is_none() {
            if document.answer.is_some() {
                self.error(&format!("{at}/answer"), "the gateway itself answers here");
            }
            return None;
        }
        let all = &known.answers;
        let own = document.answer.as_ref();
        if let Some(own) = own {
            self.check_answers(&format!("{at}/answer"), own);
        }
        let content_types = own.and_then(|own| own.content_types.as_ref()).or(all.content_types.as_ref());
        let headers = own.and_then(|own| own.headers.as_ref()).or(all.headers.as_ref());
        let errors = own.and_then(|own| own.errors).or(all.errors);
        let rule = AnswerRule {
            content_types: content_types.map(|list| list.iter().map(|it| it.to_ascii_lowercase()).collect()),
            headers: headers.map(|list| list.iter().filter_map(|name| name.parse().ok()).collect()),
            hides_errors: errors == Some(AnswerErrorsDocument::Replace),
        };
        let judges = rule.content_types.is_some() || rule.headers.is_some() || rule.hides_errors;
        judges.then_some(rule)
    }

    pub(super) fn check_answers(&mut self, at: &str, document: &AnswersDocument) {
        for (index, essence) in document.content_types.iter().flatten().enumerate() {
            if !is_essence(essence) {
                self.error(&format!("{at}/content_types/{index}"), NO_ESSENCE);
            }
        }
        for (index, name) in document.headers.iter().flatten().enumerate() {
            let pointer = format!("{at}/headers/{index}");
            match name.parse::<HeaderName>() {
                Err(_) => self.error(&pointer, "expected a name of a header field"),
                Ok(name) if ALWAYS.contains(&name) => self.error(&pointer, "passes always"),
                Ok(header::CONNECTION | header::TRANSFER_ENCODING | header::UPGRADE) => {
                    self.error(&pointer, "is never passed on");
                }
                Ok(_) => {}
            }
        }
    }
}
