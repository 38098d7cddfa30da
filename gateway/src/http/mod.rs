//! The hyper service: a request's walk from its first byte to its audit record.

pub mod body;
pub mod exchange;
mod forward;
mod headers;
mod logout;
mod refusal;
pub mod target;
mod ticket;
mod tunnel;
mod walk;

pub use body::Pace;
pub use exchange::RequestId;
pub use headers::{AnswerFields, Origin};
pub use tunnel::{
    OpenSocket, Sockets, contact_lost, displace, drain, end_sessions, list, rejudge, revoke, sweep,
};
pub use walk::serve;
