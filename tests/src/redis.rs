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
    /// Of a sentinel: what it watches. It writes down there what it finds out.
    sentinel: Option<PathBuf>,
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
            sentinel: None,
        };
        redis.run();
        redis
    }

    /// A replica of `master`, that has all that it has.
    pub fn replica_of(master: &Redis) -> Redis {
        let port = master.port.to_string();
        let redis =
            Redis::with(&["--save", "", "--appendonly", "no", "--replicaof", "127.0.0.1", &port], &[]);
        until("the replica has all", DEADLINE, || {
            redis.ask(&["INFO", "replication"]).contains("master_link_status:up").then_some(())
        });
        redis
    }

    /// A sentinel that watches `master` under the name `chat`, knows its one replica, and needs nobody's consent to make that the master.
    pub fn sentinel_of(master: &Redis) -> Redis {
        let folder = tempfile::Builder::new().prefix("sealgate-redis-").tempdir().expect("a folder");
        let file = folder.path().join("sentinel.conf");
        let watched = format!(
            "sentinel monitor chat 127.0.0.1 {} 1\nsentinel down-after-milliseconds chat 500\n\
             sentinel failover-timeout chat 1000\n",
            master.port
        );
        std::fs::write(&file, watched).expect("a file");
        let (process, options, client) = (None, Vec::new(), Vec::new());
        let mut redis = Redis { process, port: free_port(), options, client, folder, sentinel: Some(file) };
        redis.run();
        until("the sentinel knows the replica", DEADLINE, || {
            redis.ask(&["SENTINEL", "replicas", "chat"]).contains("master-link-status\nok").then_some(())
        });
        redis
    }

    /// A cluster of three masters that share the slots, and a replica of the one that has `key`, which comes first and is followed by
    /// its replica.
    pub fn cluster(key: &str) -> [Redis; 4] {
        let mut nodes = [(); 4].map(|()| {
            // Debian's own way takes the port and 10000 for the bus, which may be none.
            let bus = free_port().to_string();
            let options =
                ["--save", "", "--appendonly", "no", "--cluster-enabled", "yes", "--cluster-port", &bus];
            let more = ["--cluster-node-timeout", "1000", "--cluster-replica-validity-factor", "0"];
            let diskless = ["--repl-diskless-sync-delay", "0"];
            (Redis::with(&[&options[..], &more, &diskless].concat(), &[]), bus)
        });
        let slot: usize = nodes[0].0.ask(&["CLUSTER", "KEYSLOT", key]).trim().parse().expect("a slot");
        let bounds = [0, 5461, 10923, 16384];
        let owner = (0..3).find(|at| slot < bounds[at + 1]).expect("of 16384");
        for (at, (node, _)) in nodes[..3].iter().enumerate() {
            let (first, last) = (bounds[at].to_string(), (bounds[at + 1] - 1).to_string());
            assert_eq!(node.ask(&["CLUSTER", "ADDSLOTSRANGE", &first, &last]).trim(), "OK");
            assert_eq!(node.ask(&["CLUSTER", "SET-CONFIG-EPOCH", &(at + 1).to_string()]).trim(), "OK");
        }
        for (node, bus) in &nodes[1..] {
            let port = node.port.to_string();
            assert_eq!(nodes[0].0.ask(&["CLUSTER", "MEET", "127.0.0.1", &port, bus]).trim(), "OK");
        }
        let id = nodes[owner].0.ask(&["CLUSTER", "MYID"]);
        until("the nodes know each other", DEADLINE, || {
            let all = |(node, _): &(Redis, String)| {
                let info = node.ask(&["CLUSTER", "INFO"]);
                info.contains("cluster_state:ok") && info.contains("cluster_known_nodes:4")
            };
            nodes.iter().all(all).then_some(())
        });
        until("the replica has a master", DEADLINE, || {
            (nodes[3].0.ask(&["CLUSTER", "REPLICATE", id.trim()]).trim() == "OK").then_some(())
        });
        until("the replica has all", DEADLINE, || {
            let info = nodes[3].0.ask(&["INFO", "replication"]);
            let known = |(node, _): &(Redis, String)| node.ask(&["CLUSTER", "NODES"]).contains("slave");
            (info.contains("master_link_status:up") && nodes.iter().all(known)).then_some(())
        });
        nodes.swap(0, owner);
        nodes.swap(1, 3);
        nodes.map(|(node, _)| node)
    }

    /// Runs it, on the port that it had before.
    pub fn run(&mut self) {
        let mut command = Command::new("redis-server");
        if let Some(file) = &self.sentinel {
            command.arg(file).arg("--sentinel");
        }
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

    /// Ends it at once, as if its machine had failed.
    pub fn kill(&mut self) {
        let mut process = self.process.take().expect("it runs");
        process.signal(Signal::KILL);
        process.wait(DEADLINE);
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
