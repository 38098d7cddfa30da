//! Lists of addresses that may or may not connect: a million prefixes, the longest one decides.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use sealgate_policy::parse_network;

/// Most prefixes in all lists of a policy.
const MAX_PREFIXES: usize = 4_000_000;

/// Faults that are told of one file.
const MAX_FAULTS: usize = 20;

/// What the lists say of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Listed {
    /// No list has it.
    Nowhere,
    /// The allow list.
    Allowed,
    /// The deny list.
    Denied,
}

/// The prefixes of a policy's lists, built and never changed.
///
/// Prefixes nest or are apart, so they cut the addresses into ranges of which each has one verdict: a look-up is a search for
/// the last range that begins at or before the address (benches/micro/lists.rs). 5 bytes for each end of an IPv4 prefix, 17 for IPv6.
#[derive(Default)]
pub struct Lists {
    v4: Ranges<u32>,
    v6: Ranges<u128>,
    prefixes: usize,
}

/// Ranges by their beginnings; before the first one nothing is listed.
#[derive(Default)]
struct Ranges<T> {
    starts: Box<[T]>,
    verdicts: Box<[Listed]>,
    /// Every `STEP`th beginning, close together: the search begins here.
    marks: Box<[T]>,
}

const STEP: usize = 64;

/// Gathers prefixes for [`Lists`].
#[derive(Default)]
pub struct ListsBuilder {
    v4: Vec<Prefix<u32>>,
    v6: Vec<Prefix<u128>>,
}

/// INVARIANT: in this order of its fields prefixes are sorted so that what holds others comes before them, and of two equal ones
/// the denying comes last, which decides.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Prefix<T> {
    start: T,
    length: u8,
    verdict: Listed,
    end: T,
}

impl ListsBuilder {
    /// Adds the prefixes of a list: one in a line, an address or CIDR; `#` and what follows is left out.
    ///
    /// # Errors
    /// The first faults, each with its line.
    pub fn add(&mut self, text: &[u8], verdict: Listed) -> Result<(), Vec<String>> {
        let mut faults = Vec::new();
        for (number, line) in text.split(|byte| *byte == b'\n').enumerate() {
            let entry = line.split(|byte| *byte == b'#').next().unwrap_or_default().trim_ascii();
            if entry.is_empty() {
                continue;
            }
            if faults.len() == MAX_FAULTS {
                faults.push("there are more".to_owned());
                break;
            }
            let fault = match std::str::from_utf8(entry).ok().and_then(parse_network) {
                Some(net) if net.trunc() == net => match self.len() < MAX_PREFIXES {
                    true => {
                        self.push(net, verdict);
                        continue;
                    }
                    false => return Err(vec![format!("more than {MAX_PREFIXES} prefixes")]),
                },
                Some(net) => format!("the prefix begins at {}; expected {}", net.network(), net.trunc()),
                None => {
                    let shown: String = entry.escape_ascii().to_string().chars().take(64).collect();
                    format!("expected an address or a prefix such as 192.0.2.0/24, found {shown}")
                }
            };
            faults.push(format!("{}: {fault}", number + 1));
        }
        if faults.is_empty() { Ok(()) } else { Err(faults) }
    }

    fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    fn push(&mut self, net: IpNet, verdict: Listed) {
        match net {
            IpNet::V4(net) => self.v4.push(Prefix {
                start: net.network().to_bits(),
                length: net.prefix_len(),
                verdict,
                end: net.broadcast().to_bits(),
            }),
            IpNet::V6(net) => self.v6.push(Prefix {
                start: net.network().to_bits(),
                length: net.prefix_len(),
                verdict,
                end: net.broadcast().to_bits(),
            }),
        }
    }

    /// Ready to be asked.
    #[must_use]
    pub fn build(self) -> Lists {
        let prefixes = self.len();
        let Self { v4, v6 } = self;
        Lists {
            v4: Ranges::of(v4, |end| end.checked_add(1)),
            v6: Ranges::of(v6, |end| end.checked_add(1)),
            prefixes,
        }
    }
}

impl Lists {
    /// What the lists say of an address.
    pub fn of(&self, address: IpAddr) -> Listed {
        match address.to_canonical() {
            IpAddr::V4(v4) => self.v4.find(v4.to_bits()),
            IpAddr::V6(v6) => self.v6.find(v6.to_bits()),
        }
    }

    /// Prefixes in all lists.
    pub fn len(&self) -> usize {
        self.prefixes
    }

    /// Whether nothing is listed.
    pub fn is_empty(&self) -> bool {
        self.prefixes == 0
    }
}

impl<T: Ord + Copy> Ranges<T> {
    fn of(mut prefixes: Vec<Prefix<T>>, after: impl Fn(T) -> Option<T>) -> Self {
        prefixes.sort_unstable();
        let mut ranges: Vec<(T, Listed)> = Vec::with_capacity(prefixes.len() * 2);
        let mut begin = |start: T, verdict: Listed| {
            if ranges.last().is_some_and(|(last, _)| *last == start) {
                ranges.pop();
            }
            if ranges.last().map_or(Listed::Nowhere, |(_, last)| *last) != verdict {
                ranges.push((start, verdict));
            }
        };
        // Those that are begun and not ended, each within the one before.
        let mut open: Vec<(T, Listed)> = Vec::new();
        for Prefix { start, verdict, end, .. } in prefixes {
            while let Some((ended, _)) = open.pop_if(|(end, _)| *end < start) {
                if let Some(next) = after(ended) {
                    begin(next, open.last().map_or(Listed::Nowhere, |(_, verdict)| *verdict));
                }
            }
            begin(start, verdict);
            open.push((end, verdict));
        }
        while let Some((ended, _)) = open.pop() {
            if let Some(next) = after(ended) {
                begin(next, open.last().map_or(Listed::Nowhere, |(_, verdict)| *verdict));
            }
        }
        let (starts, verdicts): (Vec<_>, Vec<_>) = ranges.into_iter().unzip();
        let marks = starts.iter().copied().step_by(STEP).collect();
        Ranges { starts: starts.into(), verdicts: verdicts.into(), marks }
    }

    fn find(&self, address: T) -> Listed {
        let block = self.marks.partition_point(|mark| *mark <= address);
        let Some(block) = block.checked_sub(1) else { return Listed::Nowhere };
        let begin = block * STEP;
        let end = (begin + STEP).min(self.starts.len());
        let within = self.starts.get(begin..end).unwrap_or_default();
        let place = begin + within.partition_point(|start| *start <= address);
        place.checked_sub(1).and_then(|place| self.verdicts.get(place)).copied().unwrap_or(Listed::Nowhere)
    }
}

impl fmt::Debug for Lists {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lists").field("prefixes", &self.prefixes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lists(deny: &str, allow: &str) -> Lists {
        let mut builder = ListsBuilder::default();
        builder.add(deny.as_bytes(), Listed::Denied).unwrap();
        builder.add(allow.as_bytes(), Listed::Allowed).unwrap();
        builder.build()
    }

    fn of(lists: &Lists, address: &str) -> Listed {
        lists.of(address.parse().unwrap())
    }

    #[test]
    fn the_longest_prefix_decides() {
        let lists = lists(
            "10.0.0.0/8 # all\n10.1.2.3\n2001:db8::/32\n0.0.0.0/32\n255.255.255.255\n\n::ffff:192.0.2.0/120",
            "10.1.0.0/16\n2001:db8:1::/48\n",
        );
        for (address, verdict) in [
            ("9.255.255.255", Listed::Nowhere),
            ("10.0.0.0", Listed::Denied),
            ("10.0.255.255", Listed::Denied),
            ("10.1.0.0", Listed::Allowed),
            ("10.1.2.2", Listed::Allowed),
            ("10.1.2.3", Listed::Denied),
            ("10.1.2.4", Listed::Allowed),
            ("10.1.255.255", Listed::Allowed),
            ("10.2.0.0", Listed::Denied),
            ("10.255.255.255", Listed::Denied),
            ("11.0.0.0", Listed::Nowhere),
            ("0.0.0.0", Listed::Denied),
            ("0.0.0.1", Listed::Nowhere),
            ("255.255.255.254", Listed::Nowhere),
            ("255.255.255.255", Listed::Denied),
            ("192.0.2.77", Listed::Denied),
            ("::ffff:10.1.2.3", Listed::Denied),
            ("2001:db7:ffff::", Listed::Nowhere),
            ("2001:db8::1", Listed::Denied),
            ("2001:db8:1::1", Listed::Allowed),
            ("2001:db8:2::1", Listed::Denied),
            ("2001:db9::", Listed::Nowhere),
        ] {
            assert_eq!(of(&lists, address), verdict, "{address}");
        }
        assert_eq!(lists.len(), 8);
        let all = self::lists("0.0.0.0/0\n::/0", "192.0.2.0/24");
        assert_eq!(of(&all, "255.255.255.255"), Listed::Denied);
        assert_eq!(of(&all, "::"), Listed::Denied);
        assert_eq!(of(&all, "192.0.2.1"), Listed::Allowed);
        // Equal ones: who is in both lists is denied.
        let both = self::lists("192.0.2.0/24", "192.0.2.0/24\n192.0.2.0/25");
        assert_eq!(of(&both, "192.0.2.200"), Listed::Denied);
        assert_eq!(of(&both, "192.0.2.1"), Listed::Allowed);
        assert_eq!(of(&self::lists("", ""), "192.0.2.1"), Listed::Nowhere);
    }

    #[test]
    fn faults_are_told_with_their_lines() {
        let faults = |text: &[u8]| ListsBuilder::default().add(text, Listed::Denied).unwrap_err();
        assert_eq!(
            faults(b"192.0.2.1\n192.0.2.1/24\nevil.example\n\xff\n10.0.0.0/33"),
            [
                "2: the prefix begins at 192.0.2.0; expected 192.0.2.0/24",
                "3: expected an address or a prefix such as 192.0.2.0/24, found evil.example",
                "4: expected an address or a prefix such as 192.0.2.0/24, found \\xff",
                "5: expected an address or a prefix such as 192.0.2.0/24, found 10.0.0.0/33",
            ]
        );
        assert_eq!(faults("x\n".repeat(100).as_bytes()).len(), MAX_FAULTS + 1);
    }

    #[test]
    fn a_million_prefixes_are_compact() {
        let mut builder = ListsBuilder::default();
        for number in 0..1_000_000u32 {
            // Every other /24 of the first half of the addresses.
            let net = ipnet::Ipv4Net::new((number << 9).into(), 24).unwrap();
            builder.push(net.into(), Listed::Denied);
        }
        let lists = builder.build();
        let bytes = lists.v4.starts.len() * 4 + lists.v4.verdicts.len() + lists.v4.marks.len() * 4;
        assert!(bytes < 11_000_000, "{bytes}");
        for (address, verdict) in [
            (0u32, Listed::Denied),
            (255, Listed::Denied),
            (256, Listed::Nowhere),
            (511, Listed::Nowhere),
            (777_777 << 9, Listed::Denied),
            ((777_777 << 9) + 256, Listed::Nowhere),
        ] {
            assert_eq!(lists.of(IpAddr::V4(address.into())), verdict, "{address}");
        }
    }

    proptest! {
        #[test]
        fn agrees_with_a_search_through_all(
            prefixes in prop::collection::vec((any::<[u8; 2]>(), 0u8..=16, any::<bool>(), any::<bool>()), 0..60),
            asked in prop::collection::vec((any::<[u8; 2]>(), any::<bool>()), 1..40),
        ) {
            // Addresses of which two bytes differ, so that prefixes nest; the same for both families.
            let address = |[a, b]: [u8; 2], six: bool| -> IpAddr {
                if six { IpAddr::from([a.into(), b.into(), 0, 0, 0, 0, 0, 0u16]) } else { IpAddr::from([a, b, 0, 0]) }
            };
            let mut builder = ListsBuilder::default();
            let mut model = Vec::new();
            for (start, length, denied, six) in prefixes {
                let net = IpNet::new(address(start, six), if six { length * 2 } else { length }).unwrap().trunc();
                let verdict = if denied { Listed::Denied } else { Listed::Allowed };
                builder.push(net, verdict);
                model.push((net, verdict));
            }
            let lists = builder.build();
            for (bytes, six) in asked {
                let address = address(bytes, six);
                let covering = model.iter().filter(|(net, _)| net.contains(&address));
                let longest = covering.max_by_key(|(net, verdict)| (net.prefix_len(), *verdict));
                prop_assert_eq!(lists.of(address), longest.map_or(Listed::Nowhere, |(_, verdict)| *verdict));
            }
        }

        #[test]
        fn any_text_is_answered(text in any::<Vec<u8>>()) {
            let _ = ListsBuilder::default().add(&text, Listed::Denied);
        }
    }
}
