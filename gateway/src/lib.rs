//! The gateway.

pub mod limits;
pub mod session;
