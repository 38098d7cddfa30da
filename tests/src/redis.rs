//! Redis servers under test: Debian's, on loopback.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::{DEADLINE, Process, free_port, until};

/// A Redis server; ended on drop, with all that it knows.
pub struct Redis {
    process: Option<Process>,
    port: u16,
    options: Vec<String>,
    /// How `redis-cli` reaches it.
    client: Vec<String>,
    folder: TempDir,
}

impl Redis {
    /// A server that keeps nothing on disk.
    pub fn start() -> Redis {
        Redis::with(&["--save", "", "--appendonly", "no"], &[])
    }

    /// A server with options of its own, and what `redis-cli` needs for it.
    pub fn with(options: &[&str], client: &[&str]) -> Redis {
        let owned = |list: &[&str]| list.iter().map(|it| (*it).to_owned()).collect();
        let folder = tempfile::Builder::new().prefix("sealgate-redis-").tempdir().expect("a folder");
        let mut redis = Redis {
            process: None,
            port: free_port(),
            options: owned(options),
            client: owned(client),
            folder,
        };
        redis.run();
        redis
    }

    /// Runs it, on the port that it had before.
    pub fn run(&mut self) {
        let mut command = Command::new("redis-server");
        command.args(["--bind", "127.0.0.1", "--dir"]).arg(self.folder.path());
        // A test's own port option comes last, and counts.
        command
            .args(["--port", &self.port.to_string()])
            .args(self.options.iter().map(|option| option.replace("PORT", &self.port.to_string())));
        let mut process = Process::start(&mut command, self.folder.path(), "redis");
        until("redis answers", DEADLINE, || {
            assert!(process.ended().is_none(), "redis ended: {}", process.stdout());
            (self.try_ask(&["PING"])?.trim() == "PONG").then_some(())
        });
        self.process = Some(process);
    }

    /// Ends it; what it did not write to disk is gone.
    pub fn end(&mut self) {
        self.process = None;
    }

    /// Stops its every movement, or lets it go on.
    pub fn signal(&self, signal: Signal) {
        self.process.as_ref().expect("it runs").signal(signal);
    }

    /// `redis://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its folder.
    pub fn folder(&self) -> PathBuf {
        Path::new(self.folder.path()).to_owned()
    }

    /// What it answers to a command, as `redis-cli` shows it.
    pub fn ask(&self, command: &[&str]) -> String {
        self.try_ask(command).unwrap_or_else(|| panic!("no answer to {command:?}"))
    }

    fn try_ask(&self, command: &[&str]) -> Option<String> {
        let mut cli = Command::new("redis-cli");
        cli.args(["-p", &self.port.to_string(), "--no-auth-warning"]).args(&self.client).args(command);
        let output = cli.output().expect("redis-cli runs");
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        if let Some(process) = &self.process {
            // One that was stopped would not hear that it is to end.
            process.signal(Signal::CONT);
        }
    }
}
