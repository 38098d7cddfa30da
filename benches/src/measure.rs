//! What the kernel says about a proxy: CPU time, memory, and that it still runs.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::time::{clock_getcpuclockid, clock_gettime};
use nix::unistd::{Pid, SysconfVar, getpgrp, getpid, sysconf};
use serde::Serialize;

/// All processes of one proxy, found once and held: master, workers, helpers.
///
/// A proxy that loses or gains a process while it is measured would be charged for too little, so
/// [`Processes::cpu`] fails when one is gone and [`Processes::unchanged`] when one came.
#[derive(Debug)]
pub(crate) struct Processes {
    group: Pid,
    members: Vec<Pid>,
}

impl Processes {
    /// The processes whose process group is `group`.
    pub(crate) fn of_group(group: Pid) -> Result<Self> {
        let members = members(group)?;
        if members.is_empty() {
            bail!("process group {group} has no process");
        }
        Ok(Self { group, members })
    }

    /// CPU time that all of them have used since they started, user and kernel, in ns resolution:
    /// the CPU clock of each process (`clock_getcpuclockid`), which counts threads that have ended too.
    pub(crate) fn cpu(&self) -> Result<Duration> {
        let mut total = Duration::ZERO;
        for pid in &self.members {
            let clock = clock_getcpuclockid(*pid).with_context(|| format!("process {pid} is gone"))?;
            total += Duration::from(clock_gettime(clock)?);
        }
        Ok(total)
    }

    /// Fails if the set of processes is no longer what it was.
    pub(crate) fn unchanged(&self) -> Result<()> {
        let now = members(self.group)?;
        if now != self.members {
            bail!("processes changed from {:?} to {now:?}", self.members);
        }
        Ok(())
    }

    /// Memory of all of them, from `/proc/PID/smaps_rollup`.
    pub(crate) fn memory(&self) -> Result<Memory> {
        let mut total = Memory { rss: 0, pss: 0 };
        for pid in &self.members {
            let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
                .with_context(|| format!("memory of process {pid}"))?;
            total.rss += kib(&text, "Rss:").context("no Rss in smaps_rollup")? * 1024;
            total.pss += kib(&text, "Pss:").context("no Pss in smaps_rollup")? * 1024;
        }
        Ok(total)
    }
}

/// Tells how much of our CPUs somebody else used: a comparison on a busy machine compares the noise.
#[derive(Debug)]
pub(crate) struct Watch {
    cpus: Vec<usize>,
    ours: Vec<Processes>,
}

impl Watch {
    /// Over `cpus`, where this process and `ours` are known to run.
    pub(crate) fn new(mut cpus: Vec<usize>, mut ours: Vec<Processes>) -> Self {
        cpus.dedup();
        ours.push(Processes { group: getpgrp(), members: vec![getpid()] });
        Self { cpus, ours }
    }

    /// CPU time of all that runs on the CPUs less that of ours, since some moment in the past. To be
    /// subtracted from a later reading; exact to a tick (10 ms) for each CPU.
    pub(crate) fn others(&self) -> Result<f64> {
        let ticks = busy_ticks(&fs::read_to_string("/proc/stat")?, &self.cpus)
            .context("no such CPU in /proc/stat")?;
        let per_second = sysconf(SysconfVar::CLK_TCK)?.context("no clock tick")?;
        let mut own = Duration::ZERO;
        for processes in &self.ours {
            own += processes.cpu()?;
        }
        Ok(ticks as f64 / per_second as f64 - own.as_secs_f64())
    }

    /// How many CPUs are watched.
    pub(crate) fn cpus(&self) -> usize {
        self.cpus.len()
    }
}

/// Ticks that `cpus` were not idle, stolen ones included.
fn busy_ticks(stat: &str, cpus: &[usize]) -> Option<u64> {
    cpus.iter()
        .map(|cpu| {
            let name = format!("cpu{cpu}");
            let mut fields = stat.lines().map(str::split_ascii_whitespace);
            let fields = fields.find_map(|mut line| (line.next()? == name).then_some(line))?;
            // user nice system idle iowait irq softirq steal; what follows is in user already.
            let idle = |place: usize| place == 3 || place == 4;
            let busy = fields.take(8).enumerate().filter(|(place, _)| !idle(*place));
            busy.map(|(_, ticks)| ticks.parse::<u64>().ok()).sum::<Option<u64>>()
        })
        .sum()
}

/// Memory in bytes, summed over all processes of a proxy.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Memory {
    /// Resident set size; what two processes share counts twice.
    pub rss: u64,
    /// Proportional set size; what two processes share counts once.
    pub pss: u64,
}

fn kib(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

fn members(group: Pid) -> Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        // A process may end between the listing and the reading.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        if process_group(&stat) == Some(group.as_raw()) {
            found.push(Pid::from_raw(pid));
        }
    }
    found.sort();
    Ok(found)
}

/// The fifth field of `/proc/PID/stat`, if the process is not a zombie. The second, the name in
/// parentheses, may hold spaces and parentheses itself.
fn process_group(stat: &str) -> Option<i32> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?;
    let group = fields.nth(1)?.parse().ok()?;
    (state != "Z").then_some(group)
}

/// Lifts the limit of open files to what the system allows, for us and for the children.
///
/// Returns the limit.
pub(crate) fn lift_open_files() -> Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

/// Median, lowest and highest of a set of figures.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    /// The middle one; the mean of the two middle ones when their number is even.
    pub median: f64,
    /// The lowest.
    pub low: f64,
    /// The highest.
    pub high: f64,
}

impl Spread {
    /// Over `figures`; nothing when there are none.
    pub(crate) fn of(figures: &[f64]) -> Option<Self> {
        let mut sorted = figures.to_vec();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let upper = *sorted.get(middle)?;
        let median = match sorted.len() % 2 {
            0 => (sorted.get(middle.checked_sub(1)?)? + upper) / 2.0,
            _ => upper,
        };
        Some(Self { median, low: *sorted.first()?, high: *sorted.last()? })
    }
}

/// The value below which `share` (0 to 1) of `figures` lie, by the nearest-rank method; nothing when
/// there are none. Reorders `figures`.
pub(crate) fn percentile(figures: &mut [u32], share: f64) -> Option<u32> {
    let rank = (figures.len() as f64 * share.clamp(0.0, 1.0)).ceil() as usize;
    let index = rank.saturating_sub(1);
    if index >= figures.len() {
        return None;
    }
    Some(*figures.select_nth_unstable(index).1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spread_of_odd_even_one_and_none() {
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, low: 1.0, high: 3.0 }));
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]), Some(Spread { median: 2.5, low: 1.0, high: 4.0 }));
        assert_eq!(Spread::of(&[7.0]), Some(Spread { median: 7.0, low: 7.0, high: 7.0 }));
        assert_eq!(Spread::of(&[]), None);
    }

    #[test]
    fn percentile_is_the_nearest_rank() {
        let mut figures: Vec<u32> = (1..=100).rev().collect();
        assert_eq!(percentile(&mut figures, 0.5), Some(50));
        assert_eq!(percentile(&mut figures, 0.99), Some(99));
        assert_eq!(percentile(&mut figures, 1.0), Some(100));
        assert_eq!(percentile(&mut figures, 0.0), Some(1));
        assert_eq!(percentile(&mut [5], 0.99), Some(5));
        assert_eq!(percentile(&mut [], 0.5), None);
    }

    #[test]
    fn process_group_of_awkward_names_and_zombies() {
        assert_eq!(process_group("12 (a b) c) S 1 34 34 0 -1"), Some(34));
        assert_eq!(process_group("12 (sh) Z 1 34 34 0 -1"), None);
        assert_eq!(process_group("12"), None);
    }

    #[test]
    fn own_process_is_measured() {
        let group = nix::unistd::getpgrp();
        let processes = Processes::of_group(group).unwrap();
        assert!(processes.memory().unwrap().rss >= processes.memory().unwrap().pss);
        assert!(processes.members.contains(&nix::unistd::getpid()));
    }

    #[test]
    fn busy_ticks_leave_idle_and_iowait_out() {
        let stat = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 3 100 200 4 5 6 7 8\ncpu1 10 0 0 1 1 0 0 0 0 0\ncpu10 5 0 0 0 0 0 0 0\n";
        assert_eq!(busy_ticks(stat, &[0]), Some(21));
        assert_eq!(busy_ticks(stat, &[0, 1]), Some(31));
        assert_eq!(busy_ticks(stat, &[2]), None);
    }

    #[test]
    fn rollup_lines_are_found() {
        assert_eq!(kib("[rollup]\nRss:     1704 kB\nPss:  366 kB\nPss_Dirty: 1 kB\n", "Pss:"), Some(366));
        assert_eq!(kib("nothing", "Rss:"), None);
    }
}
