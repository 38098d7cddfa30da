//! The included message backend of sealgate, and its command-line client.
//!
//! A small instant-messaging server that stands behind the gateway: end-to-end encrypted messages
//! with a queue per device, prekeys, a development login, and an echo for proving and measuring the
//! gateway. It sees ciphertext only; the keys stay with the devices ([`mod@im`]).
//!
//! It trusts the identity headers `X-Sealgate-Subject`, `X-Sealgate-Session` and
//! `X-Sealgate-Roles`, because nobody but the gateway can reach it: it listens on unix sockets of
//! mode 0600 and on TCP with mutual TLS and a pinned client name, and refuses anything else.
//!
//! ```text
//! gateway ──► server (listen, TLS) ──► routes ─┬─► echo, whoami
//!                                              ├─► login ──► tokens
//!                                              ├─► messages ─┬─► store (SQLite)
//!                                              └─► stream  ──┴─► hub (who is connected)
//! ```

mod caller;
mod echo;
mod hub;
pub mod im;
mod login;
mod messages;
mod options;
mod problem;
mod routes;
mod server;
mod store;
mod stream;
mod tls;
mod tokens;
mod websocket;
pub mod wire;

pub use im::{ImArgs, im};
pub use login::demo_token;
pub use options::{Listen, ListenError, Options};
pub use server::serve;
