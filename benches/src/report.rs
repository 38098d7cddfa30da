//! What was found: ratios within each round, a table for people, JSON for scripts.

use std::fmt::{self, Write as _};
use std::time::Duration;

use serde::Serialize;

use crate::load::Visit;
use crate::measure::Spread;
use crate::proxies::Kind;

/// What one proxy showed in one round.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Sample {
    /// The figure that is compared, in the workload's unit.
    pub figure: f64,
    /// Speed as the client saw it; nothing for memory.
    #[serde(skip_serializing_if = "Option::is_none", flatten)]
    pub speed: Option<Speed>,
    /// Memory per socket by proportional set size, in KiB; nothing for work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pss_kib: Option<f64>,
}

/// Wall-clock view of a visit.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Speed {
    /// Units of work per second.
    pub per_second: f64,
    /// Share of one CPU that the proxy used.
    pub busy: f64,
    /// Share of our CPUs that processes not of this comparison used meanwhile.
    pub(crate) others: f64,
    /// Median latency in µs.
    pub p50_us: f64,
    /// 99th percentile of the latency in µs.
    pub p99_us: f64,
}

impl Sample {
    /// CPU time per unit of work, in µs.
    pub(crate) fn of_visit(visit: &Visit) -> Self {
        let micros = |time: Duration| time.as_secs_f64() * 1e6;
        Self {
            figure: micros(visit.cpu) / visit.units as f64,
            speed: Some(Speed {
                per_second: visit.units as f64 / visit.wall.as_secs_f64(),
                busy: visit.cpu.as_secs_f64() / visit.wall.as_secs_f64(),
                others: visit.others,
                p50_us: micros(visit.p50),
                p99_us: micros(visit.p99),
            }),
            pss_kib: None,
        }
    }
}

/// One workload over all rounds.
#[derive(Debug, Serialize)]
pub(crate) struct Section {
    /// Its name on the command line.
    pub workload: String,
    /// What was done, and what the figure counts.
    pub title: String,
    /// Unit of the figure.
    pub unit: &'static str,
    /// Proxies in the order of the table; the first is the base of the ratios.
    pub proxies: Vec<Kind>,
    /// Per round, one sample per proxy, in the same order.
    pub rounds: Vec<Vec<Sample>>,
    /// Per proxy, in the same order.
    pub summary: Vec<Summary>,
}

/// One proxy over all rounds.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    /// Which.
    pub proxy: Kind,
    /// Its figures.
    pub figure: Spread,
    /// Its figures divided by those of the base in the same round.
    pub ratio: Spread,
}

impl Section {
    /// Sums up `rounds`; each must hold one sample per proxy.
    pub(crate) fn new(
        workload: String,
        title: String,
        unit: &'static str,
        proxies: Vec<Kind>,
        rounds: Vec<Vec<Sample>>,
    ) -> Self {
        let summary = proxies
            .iter()
            .enumerate()
            .filter_map(|(place, proxy)| {
                let of_round = |round: &Vec<Sample>| Some((round.get(place)?.figure, round.first()?.figure));
                let figures: Vec<(f64, f64)> = rounds.iter().filter_map(of_round).collect();
                let own: Vec<f64> = figures.iter().map(|(own, _)| *own).collect();
                let ratios: Vec<f64> = figures.iter().map(|(own, base)| own / base).collect();
                Some(Summary { proxy: *proxy, figure: Spread::of(&own)?, ratio: Spread::of(&ratios)? })
            })
            .collect();
        Self { workload, title, unit, proxies, rounds, summary }
    }

    /// Median over the rounds of something about the proxy at `place`.
    fn median(&self, place: usize, of: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        let values: Vec<f64> = self.rounds.iter().filter_map(|round| of(round.get(place)?)).collect();
        Spread::of(&values).map(|spread| spread.median)
    }
}

/// What strangers may use of our CPUs before a measurement says nothing about the proxies.
const QUIET: f64 = 0.05;

impl fmt::Display for Section {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.workload, self.title)?;
        let base = self.proxies.first().map_or_else(String::new, Kind::to_string);
        write!(f, "  {:10} {:>9} {:>24}", "", self.unit, format!("ratio to {base}"))?;
        let timed = self.median(0, |sample| sample.speed.as_ref().map(|speed| speed.per_second)).is_some();
        match timed {
            true => writeln!(f, " {:>10} {:>6} {:>9} {:>9}", "per second", "busy", "p50 µs", "p99 µs")?,
            false => writeln!(f, " {:>10}", "by PSS")?,
        }
        for (place, summary) in self.summary.iter().enumerate() {
            let Spread { median, low, high } = summary.ratio;
            let ratio = format!("{median:.2} ({low:.2}–{high:.2})");
            write!(f, "  {:10} {:>9.2} {ratio:>24}", summary.proxy, summary.figure.median)?;
            let mut column = |width: usize, decimals: usize, value: Option<f64>| match value {
                Some(value) => write!(f, " {value:>width$.decimals$}"),
                None => Ok(()),
            };
            let speed = |of: fn(&Speed) -> f64| self.median(place, |sample| sample.speed.as_ref().map(of));
            column(10, 0, speed(|speed| speed.per_second))?;
            column(6, 2, speed(|speed| speed.busy))?;
            column(9, 0, speed(|speed| speed.p50_us))?;
            column(9, 0, speed(|speed| speed.p99_us))?;
            column(10, 2, self.median(place, |sample| sample.pss_kib))?;
            f.write_char('\n')?;
        }
        let others = self.rounds.iter().flatten().filter_map(|sample| Some(sample.speed.as_ref()?.others));
        let worst = others.fold(0.0, f64::max);
        if worst > QUIET {
            let percent = worst * 100.0;
            writeln!(
                f,
                "  NOT VALID: other processes used up to {percent:.0} % of our CPUs; run it on a quiet machine"
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(figure: f64) -> Sample {
        Sample { figure, speed: None, pss_kib: None }
    }

    #[test]
    fn ratios_are_taken_within_a_round() {
        // The machine was twice as slow in the second round: the ratio does not care.
        let rounds = vec![
            vec![sample(10.0), sample(5.0)],
            vec![sample(20.0), sample(10.0)],
            vec![sample(10.0), sample(6.0)],
        ];
        let section = Section::new(
            "echo".to_owned(),
            "title".to_owned(),
            "µs",
            vec![Kind::Nginx, Kind::Sealgate],
            rounds,
        );
        let [nginx, sealgate] = section.summary.as_slice() else { panic!("two proxies") };
        assert_eq!(nginx.ratio, Spread { median: 1.0, low: 1.0, high: 1.0 });
        assert_eq!(sealgate.ratio, Spread { median: 0.5, low: 0.5, high: 0.6 });
        assert_eq!(sealgate.figure, Spread { median: 6.0, low: 5.0, high: 10.0 });
        assert!(section.to_string().contains("0.50 (0.50–0.60)"), "{section}");
    }

    #[test]
    fn a_visit_becomes_cpu_per_unit() {
        let visit = Visit {
            units: 1000,
            cpu: Duration::from_millis(30),
            wall: Duration::from_millis(100),
            others: 0.0,
            p50: Duration::from_micros(40),
            p99: Duration::from_micros(90),
        };
        let sample = Sample::of_visit(&visit);
        assert!((sample.figure - 30.0).abs() < 1e-9);
        let speed = sample.speed.unwrap();
        assert!((speed.per_second - 10_000.0).abs() < 1e-6);
        assert!((speed.busy - 0.3).abs() < 1e-9);
    }
}
