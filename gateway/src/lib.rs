//! The gateway.

pub mod websocket;
