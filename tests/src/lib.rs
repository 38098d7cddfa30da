//! Fixtures for the end-to-end tests.
//!
//! A test talks to real processes over real sockets: [`Gateway`] starts one, [`curl`] and [`Driver`] are clients that
//! we did not write, [`Wire`] sends what no decent client would, and [`Upstream`] stands behind a gateway and records
//! what reached it. Nothing here knows the gateway's insides.

mod attacks;
mod bundle;
mod curl;
mod driver;
pub mod fuzz;
mod gateway;
mod metrics;
mod pki;
mod process;
mod redis;
mod tokens;
mod upstream;
mod wire;

pub use attacks::{changed_object, filled};
pub use bundle::Bundle;
pub use curl::{Curl, Reply, curl};
pub use driver::{Client, Driver, Open};
pub use gateway::{Gateway, sealgate};
pub use metrics::{Metrics, Sample};
pub use pki::Pki;
pub use process::{DEADLINE, MemoryWatch, Process, binary, free_port, until};
pub use redis::Redis;
pub use rustix::process::Signal;
pub use tokens::{Holder, TokenIssuer, now};
pub use upstream::{Seen, Upstream};
pub use wire::{ALL_VERSIONS, Frame, Wire, client_config, frame, unmasked_frame};
