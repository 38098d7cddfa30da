//! Processes under test: started, watched, and ended by id.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long anything that should happen at once may take on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Asks `condition` until it gives a value; panics, naming `what`, once `deadline` has passed.
pub fn until<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < deadline, "not within {deadline:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("its address").port()
}

/// The path of a binary of this workspace: `SEALGATE_BIN`'s folder, or the target folder that this test was built
/// into. Built here when it is not there yet.
pub fn binary(name: &str) -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    let folder = match std::env::var_os("SEALGATE_BIN") {
        Some(path) => PathBuf::from(path).parent().expect("SEALGATE_BIN has a folder").to_owned(),
        None => {
            let test = std::env::current_exe().expect("the test's own path");
            test.ancestors().nth(2).expect("target/PROFILE/deps/test").to_owned()
        }
    };
    let path = folder.join(name);
    if !path.exists() {
        BUILT.get_or_init(|| {
            let status = Command::new(env!("CARGO"))
                .args(["build", "--quiet", "--package", "sealgate", "--package", "backend-echo"])
                .arg("--target-dir")
                .arg(folder.parent().expect("target/PROFILE"))
                .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
                .status()
                .expect("cargo runs");
            assert!(status.success(), "cargo build failed");
        });
    }
    assert!(path.exists(), "no binary at {}", path.display());
    path
}

/// A child process, its output kept in files; ended on drop: SIGTERM, then SIGKILL.
pub struct Process {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

impl Process {
    /// Starts `command`; what it prints goes to `NAME.out` and `NAME.err` in `folder`.
    pub fn start(command: &mut Command, folder: &Path, name: &str) -> Process {
        let stdout = folder.join(format!("{name}.out"));
        let stderr = folder.join(format!("{name}.err"));
        let child = command
            .stdin(Stdio::null())
            .stdout(File::create(&stdout).expect("a file for stdout"))
            .stderr(File::create(&stderr).expect("a file for stderr"))
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?} does not start: {error}"));
        Process { child, stdout, stderr }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its resident memory in bytes.
    pub fn memory(&self) -> u64 {
        resident(self.id())
    }

    /// Watches its memory from now on.
    pub fn watch_memory(&self) -> MemoryWatch {
        MemoryWatch::start(self.id())
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("the process takes a signal");
    }

    /// The exit status, if it has ended.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("waiting for a child")
    }

    /// Waits for the end.
    pub fn wait(&mut self, deadline: Duration) -> ExitStatus {
        until("the process ends", deadline, || self.ended())
    }

    /// What it has printed so far.
    pub fn stdout(&self) -> String {
        said(&self.stdout)
    }

    /// What it has logged so far.
    pub fn stderr(&self) -> String {
        said(&self.stderr)
    }

    /// The ids of its children, and of theirs.
    pub fn descendants(&self) -> Vec<u32> {
        let mut found = vec![self.id()];
        let mut next = 0;
        while let Some(parent) = found.get(next).copied() {
            found.extend(children(parent));
            next += 1;
        }
        found.split_off(1)
    }
}

fn resident(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kibibytes.unwrap_or(0) << 10
}

/// The highest memory of a process since a moment, looked at every few milliseconds.
pub struct MemoryWatch {
    idle: u64,
    peak: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl MemoryWatch {
    fn start(process: u32) -> MemoryWatch {
        let idle = resident(process);
        assert!(idle > 0, "no memory of process {process}");
        let (peak, stop) = (Arc::new(AtomicU64::new(idle)), Arc::new(AtomicBool::new(false)));
        let (shared, stopped) = (Arc::clone(&peak), Arc::clone(&stop));
        std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                shared.fetch_max(resident(process), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        MemoryWatch { idle, peak, stop }
    }

    /// How many bytes more than at the beginning it had at the most.
    pub fn grown(&self) -> u64 {
        self.peak.load(Ordering::Relaxed) - self.idle
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// What was printed there. A device, which a test may have put there, says nothing and never ends.
fn said(path: &Path) -> String {
    let is_file = fs::metadata(path).is_ok_and(|metadata| metadata.is_file());
    if is_file { fs::read_to_string(path).unwrap_or_default() } else { String::new() }
}

fn children(parent: u32) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{parent}/task")) else {
        return Vec::new();
    };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("children")).ok())
        .flat_map(|list| list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<u32>>())
        .collect()
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.ended().is_none() {
            let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
            let start = Instant::now();
            while self.ended().is_none() {
                if start.elapsed() > Duration::from_secs(5) {
                    let _ = self.child.kill();
                    let _ = self.child.wait();
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        if std::thread::panicking() {
            eprintln!(
                "--- {}\n{}\n--- {}\n{}",
                self.stdout.display(),
                self.stdout(),
                self.stderr.display(),
                self.stderr()
            );
        }
    }
}
