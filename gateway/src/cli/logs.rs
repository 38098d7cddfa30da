//! Logs go to stderr: for people on a terminal, as JSON otherwise.

use std::io::{IsTerminal as _, Result, Write, stderr};
use std::sync::atomic::Ordering;

use tracing_subscriber::EnvFilter;

use crate::metrics::LOST_LOG_LINES;

/// Starts logging. `SEALGATE_LOG` filters (`info` by default, `sealgate=debug` and so on).
pub fn to_stderr() {
    let filter =
        EnvFilter::try_from_env("SEALGATE_LOG").unwrap_or_else(|_| EnvFilter::new("warn,sealgate=info"));
    let logs =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(|| Lines).log_internal_errors(false);
    // A second subscriber is refused: the first one stays.
    let _ = if stderr().is_terminal() {
        logs.with_ansi(std::env::var_os("NO_COLOR").is_none()).try_init()
    } else {
        logs.json().flatten_event(true).try_init()
    };
}

/// Stderr, of which a line that cannot be written is counted and forgotten: a full disk must cost the log alone. (What the subscriber
/// says of its own about such errors goes to stderr too, and panics there.)
struct Lines;

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> Result<usize> {
        if stderr().write_all(line).is_err() {
            LOST_LOG_LINES.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
