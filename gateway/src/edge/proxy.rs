//! The PROXY protocol, versions 1 and 2: a load balancer in front says who its client is, before TLS begins.
//!
//! <https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>. Whoever may say so is believed in everything that
//! depends on an address: so it is for the policy to name them, and nobody else is asked.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use tokio::{io::AsyncReadExt as _, net::TcpStream};

/// Longest header of version 1, its CRLF included (§2.1).
const LONGEST_LINE: usize = 107;

/// Longest header of version 2. The addresses take 52 bytes at most; the rest is for extensions, which are passed over.
const LONGEST_BLOCK: usize = 2048;

/// What a header of version 2 begins with (§2.2).
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// Who a connection is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A client of the load balancer.
    Client(SocketAddr),
    /// The load balancer itself: it looks whether we are well, or does not know.
    Itself,
}

/// A header that has come whole: its length, and what it says.
pub type Header = (usize, Source);

/// Bytes that are no header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a PROXY header: {0}")]
pub struct NoHeader(&'static str);

/// Reads a header from the beginning of what came; `None` if there is more to come.
///
/// # Errors
/// It is none, or none that can be believed.
pub fn read_header(wire: &[u8]) -> Result<Option<Header>, NoHeader> {
    let common = wire.iter().zip(&SIGNATURE).take_while(|(came, expected)| came == expected).count();
    match common {
        12 => read_block(wire),
        common if common == wire.len() => Ok(None),
        _ => read_line(wire),
    }
}

fn read_block(wire: &[u8]) -> Result<Option<Header>, NoHeader> {
    let Some((&[version, family, high, low], rest)) = wire.get(12..).and_then(<[u8]>::split_first_chunk)
    else {
        return Ok(None);
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if 16 + length > LONGEST_BLOCK {
        return Err(NoHeader("it is too long"));
    }
    let Some(rest) = rest.get(..length) else { return Ok(None) };
    let source = match (version, family) {
        (0x20, _) => Source::Itself,
        // AF_UNSPEC: it does not know.
        (0x21, 0x00) => Source::Itself,
        (0x21, 0x11) => match rest.first_chunk::<12>() {
            Some(&[a, b, c, d, _, _, _, _, high, low, _, _]) => {
                client(Ipv4Addr::new(a, b, c, d).into(), u16::from_be_bytes([high, low]))
            }
            None => return Err(NoHeader("it has no room for its addresses")),
        },
        (0x21, 0x21) => match (rest.first_chunk::<16>(), rest.get(32..36)) {
            (Some(address), Some(&[high, low, _, _])) => {
                client(Ipv6Addr::from(*address).into(), u16::from_be_bytes([high, low]))
            }
            _ => return Err(NoHeader("it has no room for its addresses")),
        },
        // AF_UNIX, STREAM: somebody on the load balancer's machine.
        (0x21, 0x31) if rest.len() >= 216 => Source::Itself,
        (0x21, _) => return Err(NoHeader("it is not of a TCP connection")),
        _ => return Err(NoHeader("its version or command is unknown")),
    };
    Ok(Some((16 + length, source)))
}

fn read_line(wire: &[u8]) -> Result<Option<Header>, NoHeader> {
    const BEGIN: &[u8] = b"PROXY ";
    if wire.iter().zip(BEGIN).any(|(came, expected)| came != expected) {
        return Err(NoHeader("it begins with something else"));
    }
    let seen = wire.get(..LONGEST_LINE).unwrap_or(wire);
    let Some(end) = seen.windows(2).position(|pair| pair == b"\r\n") else {
        return if seen.len() < LONGEST_LINE { Ok(None) } else { Err(NoHeader("it is too long")) };
    };
    let line = seen.get(BEGIN.len()..end).and_then(|line| str::from_utf8(line).ok());
    let line = line.ok_or(NoHeader("it is not text"))?;
    let mut words = line.split(' ');
    let source = match words.next() {
        // Whatever follows is to be passed over.
        Some("UNKNOWN") => Source::Itself,
        Some("TCP4") => addresses::<Ipv4Addr>(words)?,
        Some("TCP6") => addresses::<Ipv6Addr>(words)?,
        _ => return Err(NoHeader("it is not of a TCP connection")),
    };
    Ok(Some((end + 2, source)))
}

/// Both addresses and both ports, of which only the source's are of use.
fn addresses<A: FromStr + Into<IpAddr>>(mut words: std::str::Split<'_, char>) -> Result<Source, NoHeader> {
    let mut address = || words.next()?.parse::<A>().ok();
    let (source, to) = (address(), address());
    let mut port = || {
        let digits = words.next()?;
        let plain =
            digits.bytes().all(|byte| byte.is_ascii_digit()) && (digits == "0" || !digits.starts_with('0'));
        digits.parse::<u16>().ok().filter(|_| plain)
    };
    let (from_port, to_port) = (port(), port());
    match (source, to, from_port, to_port, words.next()) {
        (Some(source), Some(_), Some(port), Some(_), None) => Ok(client(source.into(), port)),
        _ => Err(NoHeader("its addresses cannot be read")),
    }
}

fn client(address: IpAddr, port: u16) -> Source {
    Source::Client(SocketAddr::new(address, port))
}

/// Takes the header off a connection, and not a byte more.
///
/// # Errors
/// It ended, or something else came.
pub(super) async fn take_header(stream: &mut TcpStream) -> io::Result<Source> {
    let mut head = vec![0; LONGEST_BLOCK];
    let mut taken = 0;
    loop {
        let fresh = head.get_mut(taken..).unwrap_or_default();
        // Looked at first, since nobody says where it ends.
        let came = stream.peek(fresh).await?;
        if came == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let header = read_header(head.get(..taken + came).unwrap_or_default());
        let header = header.map_err(|fault| io::Error::new(io::ErrorKind::InvalidData, fault))?;
        let end = header.map_or(taken + came, |(length, _)| length);
        stream.read_exact(head.get_mut(taken..end).unwrap_or_default()).await?;
        match header {
            Some((_, source)) => return Ok(source),
            None => taken = end,
        }
    }
}

#[cfg(test)]
mod tests {
    use ppp::{HeaderResult, v1, v2};
    use proptest::prelude::*;

    use super::*;

    fn block(version: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = (rest.len() as u16).to_be_bytes();
        [&SIGNATURE[..], &[version, family], &length, rest].concat()
    }

    fn client_of(text: &str) -> Source {
        Source::Client(text.parse().unwrap())
    }

    #[test]
    fn headers_of_both_versions_say_who_the_client_is() {
        let v4 = [192, 0, 2, 7, 198, 51, 100, 1, 0xdd, 0xd5, 1, 0xbb];
        let v6 = {
            let (from, to): (Ipv6Addr, Ipv6Addr) =
                ("2001:db8::7".parse().unwrap(), "2001:db8::1".parse().unwrap());
            [&from.octets()[..], &to.octets(), &[0xdd, 0xd5, 1, 0xbb]].concat()
        };
        for (wire, source) in [
            (b"PROXY TCP4 192.0.2.7 198.51.100.1 56789 443\r\n".to_vec(), client_of("192.0.2.7:56789")),
            (b"PROXY TCP6 2001:db8::7 2001:db8::1 56789 443\r\n".to_vec(), client_of("[2001:db8::7]:56789")),
            (b"PROXY TCP4 0.0.0.0 0.0.0.0 0 0\r\n".to_vec(), client_of("0.0.0.0:0")),
            (b"PROXY UNKNOWN\r\n".to_vec(), Source::Itself),
            (b"PROXY UNKNOWN ffff::1 whatever\r\n".to_vec(), Source::Itself),
            (block(0x21, 0x11, &v4), client_of("192.0.2.7:56789")),
            (block(0x21, 0x21, &v6), client_of("[2001:db8::7]:56789")),
            // With extensions (§2.2.1), which are passed over.
            (
                block(0x21, 0x11, &[&v4[..], &[2, 0, 4, b'c', b'h', b'a', b't']].concat()),
                client_of("192.0.2.7:56789"),
            ),
            (block(0x20, 0x00, &[]), Source::Itself),
            (block(0x20, 0x11, &v4), Source::Itself),
            (block(0x21, 0x00, &[]), Source::Itself),
            (block(0x21, 0x31, &[0; 216]), Source::Itself),
        ] {
            for end in 0..wire.len() {
                assert_eq!(read_header(&wire[..end]), Ok(None), "{end} of {}", wire.escape_ascii());
            }
            let more = [&wire[..], b"\x16\x03\x01"].concat();
            assert_eq!(read_header(&more), Ok(Some((wire.len(), source))), "{}", wire.escape_ascii());
        }
    }

    #[test]
    fn what_is_no_header_is_none() {
        let long = format!("PROXY UNKNOWN {}\r\n", "x".repeat(100));
        for wire in [
            &b"\x16\x03\x01\x02\x00"[..],
            b"GET / HTTP/1.1\r\n",
            b"proxy TCP4 192.0.2.7 198.51.100.1 1 2\r\n",
            b"PROXY\r\n",
            b"PROXY TCP5 192.0.2.7 198.51.100.1 1 2\r\n",
            b"PROXY TCP4\r\n",
            b"PROXY TCP4 192.0.2.7 198.51.100.1 1\r\n",
            b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2 3\r\n",
            b"PROXY TCP4 192.0.2.7  198.51.100.1 1 2\r\n",
            b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2 \r\n",
            b"PROXY TCP4 192.0.2.7 198.51.100.1 01 2\r\n",
            b"PROXY TCP4 192.0.2.7 198.51.100.1 +1 2\r\n",
            b"PROXY TCP4 192.0.2.7 198.51.100.1 65536 2\r\n",
            b"PROXY TCP4 192.0.2.256 198.51.100.1 1 2\r\n",
            b"PROXY TCP4 192.0.02.7 198.51.100.1 1 2\r\n",
            b"PROXY TCP4 ::1 ::1 1 2\r\n",
            b"PROXY TCP6 192.0.2.7 198.51.100.1 1 2\r\n",
            b"PROXY TCP6 fe80::1%1 ::1 1 2\r\n",
            b"PROXY TCP4 192.0.2.7 198.51.100.1 1 2\n\r\n",
            b"PROXY \xff\xff\r\n",
            long.as_bytes(),
            &block(0x11, 0x11, &[0; 12]),
            &block(0x22, 0x11, &[0; 12]),
            &block(0x21, 0x11, &[0; 11]),
            &block(0x21, 0x21, &[0; 35]),
            &block(0x21, 0x31, &[0; 215]),
            // A datagram's, and a family that there is not.
            &block(0x21, 0x12, &[0; 12]),
            &block(0x21, 0x41, &[0; 12]),
            &block(0x21, 0x11, &[0; 2033]),
        ] {
            assert!(read_header(wire).is_err(), "{}", wire.escape_ascii());
        }
    }

    /// What another reader makes of a header.
    fn by_ppp(wire: &[u8]) -> Option<Source> {
        match HeaderResult::parse(wire) {
            HeaderResult::V1(Ok(header)) => Some(match header.addresses {
                v1::Addresses::Tcp4(it) => client(it.source_address.into(), it.source_port),
                v1::Addresses::Tcp6(it) => client(it.source_address.into(), it.source_port),
                v1::Addresses::Unknown => Source::Itself,
            }),
            HeaderResult::V2(Ok(header)) => Some(match (header.command, header.addresses) {
                (v2::Command::Proxy, v2::Addresses::IPv4(it)) => {
                    client(it.source_address.into(), it.source_port)
                }
                (v2::Command::Proxy, v2::Addresses::IPv6(it)) => {
                    client(it.source_address.into(), it.source_port)
                }
                _ => Source::Itself,
            }),
            _ => None,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: ProptestConfig::default().cases.max(4_000), ..ProptestConfig::default() })]

        /// Whatever is believed, another reader believes too; and the rest of the connection plays no part.
        #[test]
        fn nothing_is_read_in_two_ways(
            line in "PROXY (TCP4|TCP6|UNKNOWN|TCP) ?([0-9.:a-f]{0,12} ){0,3}[0-9]{0,6} ?[0-9]{0,6}\r?\n?",
            command in prop::sample::select(vec![0x20_u8, 0x21, 0x22, 0x31]),
            family in prop::sample::select(vec![0_u8, 0x11, 0x12, 0x21, 0x31, 0x41]),
            rest in prop::collection::vec(any::<u8>(), 0..256),
            cut in 0..300_usize,
            behind in prop::collection::vec(any::<u8>(), 0..8),
        ) {
            for wire in [line.into_bytes(), block(command, family, &rest)] {
                let read = read_header(&wire);
                if let Ok(Some((length, source))) = read {
                    prop_assert!(length <= wire.len());
                    // That reader is stricter where the rest does not matter (UNKNOWN, LOCAL), and never finds a client there.
                    let theirs = by_ppp(&wire[..length]).or((source == Source::Itself).then_some(source));
                    prop_assert_eq!(theirs, Some(source), "{}", wire.escape_ascii());
                    let longer = [&wire[..], &behind].concat();
                    prop_assert_eq!(read_header(&longer), read);
                }
                // What is refused whole may not have come whole; what was taken does not change by what follows.
                let part = &wire[..cut.min(wire.len())];
                match read_header(part) {
                    Ok(None) => {}
                    early => prop_assert_eq!(early.is_err(), read.is_err(), "{}", wire.escape_ascii()),
                }
            }
        }
    }
}
