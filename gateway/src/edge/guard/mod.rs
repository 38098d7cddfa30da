//! Judges raw bytes before hyper interprets them: what hyper forgives, hides or does not count.
//!
//! Without I/O, and without memory of its own: whoever reads keeps what could not be judged yet.

mod frames;
mod requests;

use std::sync::Arc;

use sealgate_policy::{ConnectionPolicy, Denial};

pub use self::{
    frames::FrameGuard,
    requests::{Judged, RequestGuard},
};

/// What ends a connection here and now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GuardFault {
    /// A message that breaks RFC 9112, or that two readers might read differently.
    #[error("{0}")]
    Malformed(&'static str),
    /// The request line is longer than a whole head may be.
    #[error("the request line is too long")]
    LineTooLong,
    /// The head is larger, or has more fields, than allowed.
    #[error("the head is too large")]
    HeadTooLarge,
    /// A transfer coding that is none of ours (RFC 9112 §6.1).
    #[error("an unknown transfer coding")]
    UnknownCoding,
    /// Neither HTTP/1.1 nor HTTP/1.0.
    #[error("an unknown version of HTTP")]
    UnknownVersion,
    /// CONNECT: we are no forward proxy.
    #[error("CONNECT is not offered")]
    Connect,
    /// More HTTP/2 frames of a kind than any honest client sends (CVE-2019-9512 and its kin, CVE-2023-44487).
    #[error("a flood of {0}")]
    Flood(&'static str),
}

impl GuardFault {
    /// The refusal that answers it, where an answer is possible.
    #[must_use]
    pub fn denial(self) -> Denial {
        match self {
            Self::Malformed(detail) => Denial::Malformed { detail },
            Self::LineTooLong => Denial::UriTooLong,
            Self::HeadTooLarge => Denial::HeadersTooLarge,
            Self::UnknownCoding => Denial::UnknownTransferCoding,
            Self::UnknownVersion => Denial::VersionNotSupported,
            Self::Connect => {
                Denial::MethodNotAllowed { allow: Arc::from("DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT") }
            }
            Self::Flood(_) => Denial::Overloaded,
        }
    }
}

/// The guard of one connection.
pub enum Guard {
    /// HTTP/1.1.
    Requests(RequestGuard),
    /// HTTP/2.
    Frames(FrameGuard),
    /// Neither any more: a WebSocket, whose frames the relay judges.
    None,
}

impl Guard {
    /// A guard for what ALPN chose.
    #[must_use]
    pub fn new(http2: bool, limits: &ConnectionPolicy) -> Self {
        if http2 {
            Self::Frames(FrameGuard::default())
        } else {
            Self::Requests(RequestGuard::new(limits.max_header_bytes, limits.max_headers))
        }
    }
}
