//! Durations (`15m`) and sizes (`64KiB`) as operators type them.

use std::borrow::Cow;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A duration: digits and one of `ms`, `s`, `m`, `h`, `d`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DurationText(pub(crate) Duration);

/// A size: digits and one of `B`, `KiB`, `MiB`, `GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SizeText(pub(crate) u64);

/// At most nine digits: 10⁹ days of milliseconds still fit 64 bits.
const DIGITS: usize = 9;
const DURATION_UNITS: [(&str, u64); 5] =
    [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];
const SIZE_UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

const DURATION_EXPECTED: &str = "a duration such as \"500ms\", \"30s\", \"15m\", \"12h\" or \"730d\"";
const SIZE_EXPECTED: &str = "a size such as \"512B\", \"64KiB\" or \"1MiB\"";

fn parse(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit())?;
    let (digits, unit) = text.split_at_checked(unit_at)?;
    if digits.len() > DIGITS {
        return None;
    }
    let (_, factor) = units.iter().find(|(known, _)| *known == unit)?;
    digits.parse::<u64>().ok()?.checked_mul(*factor)
}

/// Writes with the largest unit that leaves no rest.
fn format(value: u64, units: &[(&str, u64)]) -> String {
    let whole = |(_, factor): &&(&str, u64)| value.is_multiple_of(*factor) && value >= *factor;
    match units.iter().find(whole).or(units.last()) {
        Some((unit, factor)) => format!("{}{unit}", value / factor),
        None => value.to_string(),
    }
}

/// Reads a duration as policies write it, such as `15m`: digits and one of `ms`, `s`, `m`, `h`, `d`.
///
/// # Errors
/// What was expected instead.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    DurationText::parse(text).map(|it| it.0).ok_or_else(|| format!("expected {DURATION_EXPECTED}"))
}

impl DurationText {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        parse(text, &DURATION_UNITS).map(Duration::from_millis).map(Self)
    }
}

impl SizeText {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        parse(text, &SIZE_UNITS).map(Self)
    }
}

impl std::fmt::Display for DurationText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&format(u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX), &DURATION_UNITS))
    }
}

impl std::fmt::Display for SizeText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&format(self.0, &SIZE_UNITS))
    }
}

macro_rules! text_form {
    ($name:ident, $expected:ident, $units:literal) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                Self::parse(&text).ok_or_else(|| de::Error::custom(concat!("not a ", stringify!($name))))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl JsonSchema for $name {
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).trim_end_matches("Text").into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                let pattern = format!("^[0-9]{{1,{DIGITS}}}({})$", $units);
                json_schema!({ "type": "string", "pattern": pattern, "description": $expected })
            }
        }
    };
}

text_form!(DurationText, DURATION_EXPECTED, "ms|s|m|h|d");
text_form!(SizeText, SIZE_EXPECTED, "B|KiB|MiB|GiB");

/// An address, or a prefix of addresses (CIDR). An IPv4 address in IPv6 is the IPv4 address; connections count by that too.
#[must_use]
pub fn parse_network(text: &str) -> Option<IpNet> {
    let net = match text.parse::<IpAddr>() {
        Ok(address) => IpNet::from(address.to_canonical()),
        Err(_) => text.parse::<IpNet>().ok()?,
    };
    match net {
        IpNet::V6(v6) if v6.prefix_len() >= 96 => match v6.network().to_ipv4_mapped() {
            Some(v4) => Ipv4Net::new(v4, v6.prefix_len() - 96).ok().map(IpNet::V4),
            None => Some(net),
        },
        IpNet::V4(_) | IpNet::V6(_) => Some(net),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations() {
        for (text, milliseconds) in [
            ("500ms", 500),
            ("0s", 0),
            ("15m", 900_000),
            ("12h", 43_200_000),
            ("730d", 63_072_000_000),
            ("999999999d", 86_399_999_913_600_000),
        ] {
            assert_eq!(
                DurationText::parse(text),
                Some(DurationText(Duration::from_millis(milliseconds))),
                "{text}"
            );
        }
        for bad in
            ["", "5", "s", "5x", "-5s", "1.5s", " 5s", "5s ", "5 s", "1h30m", "5S", "1000000000s", "٣s"]
        {
            assert_eq!(DurationText::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("0B", 0), ("512B", 512), ("64KiB", 65_536), ("1MiB", 1 << 20), ("2GiB", 2 << 30)]
        {
            assert_eq!(SizeText::parse(text), Some(SizeText(bytes)), "{text}");
        }
        for bad in ["", "64", "64kb", "64KB", "64K", "-1B", "1.5KiB", "1000000000B"] {
            assert_eq!(SizeText::parse(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(milliseconds in 0_u64..1_000_000_000, bytes in 0_u64..1_000_000_000) {
            let duration = DurationText(Duration::from_millis(milliseconds));
            prop_assert_eq!(DurationText::parse(&duration.to_string()), Some(duration));
            let size = SizeText(bytes);
            prop_assert_eq!(SizeText::parse(&size.to_string()), Some(size));
        }

        /// The pattern in the JSON Schema and the parser agree, so that the schema reports every error.
        #[test]
        fn schema_and_parser_agree(text in "[0-9]{0,10}(ms|s|m|h|d|B|KiB|MiB|GiB|x|)") {
            let valid = |schema: Schema| {
                let validator = jsonschema::validator_for(schema.as_value()).unwrap();
                validator.is_valid(&text.as_str().into())
            };
            let mut generator = SchemaGenerator::default();
            prop_assert_eq!(valid(DurationText::json_schema(&mut generator)), DurationText::parse(&text).is_some());
            prop_assert_eq!(valid(SizeText::json_schema(&mut generator)), SizeText::parse(&text).is_some());
        }
    }
}
