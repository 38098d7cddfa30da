//! Refusals, as RFC 9457 problem documents. The one table that faces the outside.

use std::borrow::Cow;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode, header};
use http_body_util::Full;
use serde_json::{Map, Value, json};

/// Why a request was not done. The slug is stable; the detail is for people.
#[derive(Debug)]
pub(crate) struct Problem {
    pub(crate) status: StatusCode,
    pub(crate) slug: &'static str,
    pub(crate) detail: Cow<'static, str>,
    more: Option<Box<More>>,
}

/// What few refusals have.
#[derive(Debug, Default)]
struct More {
    /// Further members of the document (RFC 9457 §3.2), such as what was missing.
    members: Map<String, Value>,
    headers: HeaderMap,
}

impl Problem {
    pub(crate) fn new(status: StatusCode, slug: &'static str, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { status, slug, detail: detail.into(), more: None }
    }

    pub(crate) fn malformed(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "malformed", detail)
    }

    /// Well-formed JSON of the wrong shape.
    pub(crate) fn shape(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "schema", detail)
    }

    pub(crate) fn no_route() -> Self {
        Self::new(StatusCode::NOT_FOUND, "no-route", "there is nothing at this path")
    }

    pub(crate) fn method(allow: &'static str) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed", format!("this path takes {allow}"))
            .header(header::ALLOW, HeaderValue::from_static(allow))
    }

    pub(crate) fn forbidden(slug: &'static str, detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::FORBIDDEN, slug, detail)
    }

    pub(crate) fn too_large(limit: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "body-too-large",
            format!("a body may have {limit} bytes at most"),
        )
    }

    /// A fault of ours: logged in full here, told in one word.
    pub(crate) fn internal(error: &dyn std::error::Error) -> Self {
        tracing::error!(error = %chain(error), "a request failed");
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "the backend failed; its log says why")
    }

    pub(crate) fn with(mut self, member: &str, value: Value) -> Self {
        self.more.get_or_insert_default().members.insert(member.to_owned(), value);
        self
    }

    pub(crate) fn header(mut self, name: http::HeaderName, value: HeaderValue) -> Self {
        self.more.get_or_insert_default().headers.insert(name, value);
        self
    }

    pub(crate) fn into_response(self) -> Response<Full<Bytes>> {
        let More { members, headers } = self.more.map(|more| *more).unwrap_or_default();
        let mut document = json!({
            "type": format!("urn:sealgate:problem:{}", self.slug),
            "title": self.status.canonical_reason().unwrap_or("Refused"),
            "status": self.status.as_u16(),
            "detail": self.detail,
        });
        if let Some(document) = document.as_object_mut() {
            document.extend(members);
        }
        let mut response = Response::new(Full::new(Bytes::from(document.to_string())));
        *response.status_mut() = self.status;
        *response.headers_mut() = headers;
        response
            .headers_mut()
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        response
    }
}

/// An error with its causes, on one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}
