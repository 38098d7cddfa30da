//! How much is to be done, and whom it is too much for: load is shed before it ends in collapse.

use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sealgate_policy::OverloadPolicy;

use crate::lock::lock;

/// How often memory is looked at.
pub const LOOK: Duration = Duration::from_millis(250);

/// Requests under way, memory, and how fast connections come. Older than any snapshot.
#[derive(Debug, Default)]
pub struct Load {
    in_flight: AtomicU32,
    /// Of what the policy allows, in thousandths.
    memory: AtomicU32,
    accepted: Mutex<Option<Accepted>>,
    /// Bytes at the latest look.
    resident: AtomicU64,
}

/// Connections taken, as a bucket that a second's worth fills.
#[derive(Debug, Clone, Copy)]
struct Accepted {
    room: f64,
    at: Instant,
}

/// How much it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LoadLevel {
    /// Everybody is served.
    Normal,
    /// Whoever has a session is.
    High,
    /// Nobody is whose request or connection is new.
    Full,
}

/// One request under way.
#[derive(Debug)]
pub struct Work(Arc<Load>);

impl Load {
    /// Nothing is to be done.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Counts a request until the guard is dropped.
    pub fn begin(self: &Arc<Self>) -> Work {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Work(Arc::clone(self))
    }

    /// Requests under way.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Bytes of memory at the latest look; 0 if nobody looks.
    pub fn resident(&self) -> u64 {
        self.resident.load(Ordering::Relaxed)
    }

    /// How much it is by `policy`, for a request, which is under way itself.
    pub fn level(&self, policy: &OverloadPolicy) -> LoadLevel {
        self.level_of(self.in_flight().saturating_sub(1), policy)
    }

    /// How much it is by `policy`, for a connection, of which nothing is under way yet.
    pub fn level_at_accept(&self, policy: &OverloadPolicy) -> LoadLevel {
        self.level_of(self.in_flight(), policy)
    }

    fn level_of(&self, in_flight: u32, policy: &OverloadPolicy) -> LoadLevel {
        let requests =
            policy.max_in_flight.map_or(0, |most| u64::from(in_flight) * 1000 / u64::from(most.max(1)));
        let memory = if policy.watches_memory() { u64::from(self.memory.load(Ordering::Relaxed)) } else { 0 };
        match requests.max(memory) {
            1000.. => LoadLevel::Full,
            share if share >= u64::from(policy.shed_at) * 10 => LoadLevel::High,
            _ => LoadLevel::Normal,
        }
    }

    /// Whether one more connection may come at `now`; if so, it is counted.
    pub fn accept(&self, policy: &OverloadPolicy, now: Instant) -> bool {
        let Some(rate) = policy.max_accept_rate else { return true };
        let rate = f64::from(rate);
        let mut accepted = lock(&self.accepted);
        let known = accepted.unwrap_or(Accepted { room: rate, at: now });
        let passed = now.saturating_duration_since(known.at).as_secs_f64();
        let room = (known.room + passed * rate).min(rate);
        let fits = room >= 1.0;
        *accepted = Some(Accepted { room: if fits { room - 1.0 } else { room }, at: now });
        fits
    }

    /// Looks at memory, if `policy` limits it. Blocks for a few reads of kernel files.
    pub fn look(&self, policy: &OverloadPolicy) {
        if !policy.watches_memory() {
            return;
        }
        let resident = resident(&std::fs::read_to_string("/proc/self/status").unwrap_or_default());
        self.resident.store(resident.unwrap_or(0), Ordering::Relaxed);
        let of_limit = policy.max_memory.zip(resident).map(|(most, used)| share(used, most));
        let of_group = policy.max_group_memory.and_then(|percent| {
            let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
            // Of its group, and of those around it: the narrowest counts.
            Path::new(group(&groups)?)
                .ancestors()
                .filter_map(|group| {
                    let folder = Path::new("/sys/fs/cgroup").join(group.strip_prefix("/").ok()?);
                    let most = read_number(&folder.join("memory.max"))?;
                    Some(share(read_number(&folder.join("memory.current"))?, most / 100 * u64::from(percent)))
                })
                .max()
        });
        let memory = of_limit.into_iter().chain(of_group).max().unwrap_or(0);
        self.memory.store(memory, Ordering::Relaxed);
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

fn share(used: u64, most: u64) -> u32 {
    u32::try_from(u128::from(used) * 1000 / u128::from(most.max(1))).unwrap_or(u32::MAX)
}

/// `VmRSS` of `/proc/self/status` (proc(5)), in bytes.
fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// The control group of a process by its `/proc/self/cgroup` (cgroups(7)), version 2.
fn group(groups: &str) -> Option<&str> {
    groups.lines().find_map(|line| line.strip_prefix("0::"))
}

/// `max` is no number: there is no limit then.
fn read_number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> OverloadPolicy {
        OverloadPolicy {
            max_memory: None,
            max_group_memory: None,
            max_in_flight: None,
            max_accept_rate: None,
            shed_at: 80,
        }
    }

    #[test]
    fn strangers_go_first_and_then_all() {
        let load = Load::new();
        let policy = OverloadPolicy { max_in_flight: Some(10), ..policy() };
        let mut under_way = vec![load.begin()];
        let mut levels = vec![load.level(&policy)];
        for _ in 0..11 {
            under_way.push(load.begin());
            levels.push(load.level(&policy));
        }
        use LoadLevel::{Full, High, Normal};
        assert_eq!(levels, [[Normal; 8].as_slice(), &[High; 2], &[Full; 2]].concat());
        assert_eq!(load.level(&super::tests::policy()), Normal, "without limits nothing is too much");
        under_way.clear();
        assert_eq!((load.in_flight(), load.level(&policy)), (0, Normal));
    }

    #[test]
    fn memory_is_read_and_compared() {
        assert_eq!(resident("Name:\tx\nVmRSS:\t    2048 kB\nThreads:\t1\n"), Some(2 << 20));
        assert_eq!(resident("Name:\tx\n"), None);
        let load = Load::new();
        let little = OverloadPolicy { max_memory: Some(1 << 20), ..policy() };
        assert_eq!(load.level(&little), LoadLevel::Normal, "not looked at yet");
        load.look(&little);
        assert!(load.resident() > 1 << 20);
        assert_eq!(load.level(&little), LoadLevel::Full);
        let much = OverloadPolicy { max_memory: Some(1 << 50), ..policy() };
        load.look(&much);
        assert_eq!(load.level(&much), LoadLevel::Normal);
    }

    #[test]
    fn connections_come_no_faster_than_allowed() {
        let load = Load::new();
        let policy = OverloadPolicy { max_accept_rate: Some(10), ..policy() };
        let start = Instant::now();
        let taken =
            |at: f64| (0..100).filter(|_| load.accept(&policy, start + Duration::from_secs_f64(at))).count();
        assert_eq!([taken(0.0), taken(0.5), taken(0.55), taken(10.0)], [10, 5, 0, 10]);
        assert!((0..100).all(|_| load.accept(&super::tests::policy(), start)));
    }
}
