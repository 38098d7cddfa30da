//! Logs go to stderr: for people on a terminal, as JSON otherwise.

use std::io::{IsTerminal as _, stderr};

use tracing_subscriber::EnvFilter;

/// Starts logging. `SEALGATE_LOG` filters (`info` by default, `sealgate=debug` and so on).
pub fn to_stderr() {
    let filter =
        EnvFilter::try_from_env("SEALGATE_LOG").unwrap_or_else(|_| EnvFilter::new("warn,sealgate=info"));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(stderr);
    // A second subscriber is refused: the first one stays.
    let _ = if stderr().is_terminal() {
        logs.with_ansi(std::env::var_os("NO_COLOR").is_none()).try_init()
    } else {
        logs.json().flatten_event(true).try_init()
    };
}
