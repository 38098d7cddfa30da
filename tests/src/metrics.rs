//! Prometheus text, read strictly enough to notice what a scraper would refuse.

use std::collections::BTreeMap;

/// One line of an exposition.
#[derive(Clone, Debug)]
pub struct Sample {
    /// Metric name.
    pub name: String,
    /// Label names and values.
    pub labels: BTreeMap<String, String>,
    /// Value.
    pub value: f64,
}

/// A parsed exposition.
#[derive(Debug)]
pub struct Metrics {
    /// Every sample, in order.
    pub samples: Vec<Sample>,
    /// Type by family name: `counter`, `gauge`, `histogram`…
    pub types: BTreeMap<String, String>,
    /// Families with a HELP line.
    pub help: Vec<String>,
}

impl Metrics {
    /// Parses the text format; panics at the first line that is not of it.
    pub fn parse(text: &str) -> Metrics {
        let mut metrics = Metrics { samples: Vec::new(), types: BTreeMap::new(), help: Vec::new() };
        for line in text.lines().filter(|line| !line.is_empty() && *line != "# EOF") {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect("# TYPE name kind");
                assert!(
                    metrics.types.insert(name.to_owned(), kind.to_owned()).is_none(),
                    "{name} is typed twice"
                );
            } else if let Some(rest) = line.strip_prefix("# HELP ") {
                metrics.help.push(rest.split(' ').next().expect("a name").to_owned());
            } else if !line.starts_with('#') {
                metrics.samples.push(sample(line).unwrap_or_else(|| panic!("not a sample: {line}")));
            }
        }
        metrics
    }

    /// The sum over all samples of `name` that carry the labels given.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.samples
            .iter()
            .filter(|sample| sample.name == name)
            .filter(|sample| {
                labels.iter().all(|(key, value)| sample.labels.get(*key).is_some_and(|have| have == value))
            })
            .map(|sample| sample.value)
            .sum()
    }

    /// Whether there is any sample of that name.
    pub fn has(&self, name: &str) -> bool {
        self.samples.iter().any(|sample| sample.name == name)
    }
}

fn sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inner) = rest.strip_prefix('{') {
        rest = inner;
        while !rest.starts_with('}') {
            let (key, after) = rest.split_once("=\"")?;
            let mut value = String::new();
            let mut characters = after.char_indices();
            let close = loop {
                match characters.next()? {
                    (at, '"') => break at,
                    (_, '\\') => value.push(characters.next()?.1),
                    (_, character) => value.push(character),
                }
            };
            labels.insert(key.to_owned(), value);
            rest = &after[close + 1..];
            rest = rest.strip_prefix(',').unwrap_or(rest);
        }
        rest = &rest[1..];
    }
    let value = rest.split_whitespace().next()?;
    let value = if value == "+Inf" { f64::INFINITY } else { value.parse().ok()? };
    Some(Sample { name: name.to_owned(), labels, value })
}
