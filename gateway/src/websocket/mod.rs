//! WebSockets: RFC 6455 in both roles, and the relay that judges every message between them.

pub mod close;
pub mod deflate;
pub mod frame;
pub mod handshake;
pub mod message;
pub mod relay;
mod side;
