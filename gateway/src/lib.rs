//! sealgate: an edge gateway for instant messaging.
//!
//! A connection enters at [`edge`], becomes requests in [`http`], and perhaps a WebSocket in
//! [`websocket`]. Whether any of it may pass is for [`sealgate_policy`] to say; [`session`] and
//! [`limits`] bring the evidence, [`upstream`] knows the way on, [`shared`] what other gateways know, [`events`] what
//! services revoke, [`acme`] who issues certificates. [`reload`] puts policies into force.

pub mod acme;
pub mod admin;
pub mod audit;
pub mod cli;
mod clock;
pub mod edge;
pub mod events;
pub mod http;
pub mod limits;
mod lock;
pub mod metrics;
pub mod reload;
pub mod session;
pub mod shared;
pub mod tls;
pub mod upstream;
pub mod websocket;
