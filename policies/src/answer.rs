//! What upstreams may answer.

use http::{HeaderMap, HeaderName, StatusCode, header};

use crate::denial::Denial;

/// What answers of a route may be. Made only by [`Policy::compile`](crate::Policy::compile).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerRule {
    /// Media types in lower case; `None` for any.
    pub(crate) content_types: Option<Vec<String>>,
    /// Fields beside [`ALWAYS`]; `None` for any.
    pub(crate) headers: Option<Vec<HeaderName>>,
    /// Whether what an upstream says of its own faults (5xx) stays here.
    pub(crate) hides_errors: bool,
}

/// Fields that say what an answer is and how long it counts, and tell nothing else: they pass wherever answers do.
pub(crate) const ALWAYS: [HeaderName; 19] = [
    header::ACCEPT_RANGES,
    header::AGE,
    header::ALLOW,
    header::CACHE_CONTROL,
    header::CONTENT_DISPOSITION,
    header::CONTENT_ENCODING,
    header::CONTENT_LANGUAGE,
    header::CONTENT_LENGTH,
    header::CONTENT_RANGE,
    header::CONTENT_TYPE,
    header::DATE,
    header::ETAG,
    header::EXPIRES,
    header::LAST_MODIFIED,
    header::LOCATION,
    header::RETRY_AFTER,
    header::VARY,
    header::REFERRER_POLICY,
    header::WWW_AUTHENTICATE,
];

/// What becomes of an answer that was judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Passes {
    /// It goes out.
    Whole,
    /// Its status goes out, with a problem document instead of what the upstream said of its fault.
    Status,
}

impl AnswerRule {
    /// Judges the head of an answer; `has_body` is whether something follows.
    ///
    /// # Errors
    /// [`Denial::AnswerNotAllowed`]: a body of another type than the rule lists, or of none, or of two.
    pub fn judge(&self, status: StatusCode, fields: &HeaderMap, has_body: bool) -> Result<Passes, Denial> {
        if self.hides_errors && status.is_server_error() {
            return Ok(Passes::Status);
        }
        if let Some(list) = self.content_types.as_ref().filter(|_| has_body) {
            let mut values = fields.get_all(header::CONTENT_TYPE).iter();
            let (Some(value), None) = (values.next(), values.next()) else {
                return Err(Denial::AnswerNotAllowed);
            };
            let essence = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
            let essence = essence.trim_matches([' ', '\t']);
            if !list.iter().any(|known| known.eq_ignore_ascii_case(essence)) {
                return Err(Denial::AnswerNotAllowed);
            }
        }
        Ok(Passes::Whole)
    }

    /// Whether the upstream may send this field to clients.
    #[must_use]
    pub fn lets_out(&self, field: &HeaderName) -> bool {
        self.headers.as_ref().is_none_or(|list| list.contains(field) || ALWAYS.contains(field))
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn rule() -> AnswerRule {
        AnswerRule {
            content_types: Some(vec!["application/json".to_owned(), "application/problem+json".to_owned()]),
            headers: Some(vec![HeaderName::from_static("x-total-count")]),
            hides_errors: true,
        }
    }

    fn typed(types: &[&'static str]) -> HeaderMap {
        types.iter().fold(HeaderMap::new(), |mut fields, kind| {
            fields.append(header::CONTENT_TYPE, HeaderValue::from_static(kind));
            fields
        })
    }

    #[test]
    fn only_listed_types_go_out() {
        let rule = rule();
        for good in ["application/json", "Application/JSON; charset=utf-8", "application/problem+json"] {
            assert_eq!(rule.judge(StatusCode::OK, &typed(&[good]), true), Ok(Passes::Whole), "{good}");
        }
        for bad in
            [&["text/html"][..], &[], &["application/json", "text/html"], &["application/jsonx"], &[""]]
        {
            let judged = rule.judge(StatusCode::NOT_FOUND, &typed(bad), true);
            assert_eq!(judged, Err(Denial::AnswerNotAllowed), "{bad:?}");
        }
        assert_eq!(rule.judge(StatusCode::NO_CONTENT, &typed(&[]), false), Ok(Passes::Whole));
        let open = AnswerRule { content_types: None, headers: None, hides_errors: false };
        assert_eq!(open.judge(StatusCode::BAD_GATEWAY, &typed(&[]), true), Ok(Passes::Whole));
    }

    #[test]
    fn of_faults_only_the_status_goes_out() {
        for status in [StatusCode::INTERNAL_SERVER_ERROR, StatusCode::SERVICE_UNAVAILABLE] {
            assert_eq!(rule().judge(status, &typed(&["text/html"]), true), Ok(Passes::Status));
        }
        let judged = rule().judge(StatusCode::CONFLICT, &typed(&["application/json"]), true);
        assert_eq!(judged, Ok(Passes::Whole));
    }

    #[test]
    fn only_listed_fields_go_out_and_those_that_an_answer_needs() {
        let rule = rule();
        for good in ["x-total-count", "content-type", "etag", "location"] {
            assert!(rule.lets_out(&HeaderName::from_static(good)), "{good}");
        }
        for bad in ["set-cookie", "x-debug", "access-control-allow-origin", "link"] {
            assert!(!rule.lets_out(&HeaderName::from_static(bad)), "{bad}");
        }
        let open = AnswerRule { headers: None, ..rule };
        assert!(open.lets_out(&HeaderName::from_static("set-cookie")));
    }
}
