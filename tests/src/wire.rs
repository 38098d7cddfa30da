//! TLS sockets under a test's full control, for what no decent client would send.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, digest};
use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{
    ClientConfig, ClientConnection, NamedGroup, RootCertStore, StreamOwned, SupportedProtocolVersion,
};

use crate::{DEADLINE, Reply};

/// A TLS connection that bytes are written to as they are.
pub struct Wire {
    stream: StreamOwned<ClientConnection, TcpStream>,
    read: Vec<u8>,
}

/// TLS 1.3 and 1.2.
pub const ALL_VERSIONS: &[&SupportedProtocolVersion] = rustls::ALL_VERSIONS;

/// A client that trusts `ca`, with the certificate and key given.
pub fn client_config(
    ca: &Path,
    alpn: &[&str],
    identity: Option<(&Path, &Path)>,
    versions: &[&'static SupportedProtocolVersion],
) -> ClientConfig {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    // As browsers and OpenSSL have it; rustls sends a key for the first only.
    provider.kx_groups.sort_by_key(|group| group.name() != NamedGroup::X25519MLKEM768);
    let provider = Arc::new(provider);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).expect("the authority")).expect("a usable authority");
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .expect("versions")
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => {
            let chain = CertificateDer::pem_file_iter(chain).expect("a chain");
            let chain = chain.collect::<Result<Vec<_>, _>>().expect("certificates");
            let key = PrivateKeyDer::from_pem_file(key).expect("a key");
            builder.with_client_auth_cert(chain, key).expect("a certificate and its key")
        }
    };
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    config
}

/// A WebSocket frame as read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Whether it ends its message.
    pub fin: bool,
    /// RSV bits, as they lie in the first byte (0x40, 0x20, 0x10).
    pub reserved: u8,
    /// Opcode.
    pub opcode: u8,
    /// Whether it came masked.
    pub masked: bool,
    /// Payload, unmasked.
    pub payload: Vec<u8>,
}

impl Frame {
    /// Code and reason of a close frame.
    pub fn close(&self) -> (u16, String) {
        assert_eq!(self.opcode, 8, "not a close: {self:?}");
        match self.payload.split_first_chunk::<2>() {
            Some((code, reason)) => {
                (u16::from_be_bytes(*code), String::from_utf8(reason.to_vec()).expect("UTF-8"))
            }
            None => (1005, String::new()),
        }
    }
}

impl Wire {
    /// Connects with the protocols given for ALPN.
    pub fn connect(address: SocketAddr, ca: &Path, alpn: &[&str]) -> Wire {
        Wire::with(address, &Arc::new(client_config(ca, alpn, None, ALL_VERSIONS)), "localhost")
    }

    /// Connects as `config` says, asking for `name`. One configuration for several connections resumes sessions.
    pub fn with(address: SocketAddr, config: &Arc<ClientConfig>, name: &str) -> Wire {
        Wire::over(TcpStream::connect(address).expect("a connection"), config, name)
    }

    /// The same from another address than 127.0.0.1: all of 127.0.0.0/8 is this machine's.
    pub fn from(source: Ipv4Addr, address: SocketAddr, config: &Arc<ClientConfig>, name: &str) -> Wire {
        let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
        bind(&socket, &SocketAddr::from((source, 0))).expect("an address of this machine");
        connect(&socket, &address).expect("a connection");
        Wire::over(TcpStream::from(socket), config, name)
    }

    fn over(socket: TcpStream, config: &Arc<ClientConfig>, name: &str) -> Wire {
        let name = ServerName::try_from(name.to_owned()).expect("a name");
        let connection = ClientConnection::new(config.clone(), name).expect("a client");
        socket.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        socket.set_nodelay(true).expect("no delay");
        Wire { stream: StreamOwned::new(connection, socket), read: Vec::new() }
    }

    /// Completes the handshake; an error is what either side found wrong. In TLS 1.3 the server's may come later.
    pub fn handshake(&mut self) -> std::io::Result<()> {
        while self.stream.conn.is_handshaking() {
            self.stream.conn.complete_io(&mut self.stream.sock)?;
        }
        Ok(())
    }

    /// The TLS connection.
    pub fn tls(&self) -> &ClientConnection {
        &self.stream.conn
    }

    /// What ended the connection: the text of the alert, or of whatever it was; `None` if the peer ended it in order.
    pub fn fault(&mut self) -> Option<String> {
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return None,
                Ok(_) => {}
                Err(error) => return Some(error.to_string()),
            }
        }
    }

    /// The stream itself, for a client that we did not write.
    pub fn into_stream(self) -> StreamOwned<ClientConnection, TcpStream> {
        self.stream
    }

    /// The protocol agreed by ALPN; drives the handshake.
    pub fn alpn(&mut self) -> Option<String> {
        while self.stream.conn.is_handshaking() {
            self.stream.conn.complete_io(&mut self.stream.sock).expect("a handshake");
        }
        self.stream.conn.alpn_protocol().map(|name| String::from_utf8_lossy(name).into_owned())
    }

    /// Writes bytes as they are. A peer that has gone is not an error here: the answer is what a test looks at.
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) {
        let _ = self.stream.write_all(bytes.as_ref());
        let _ = self.stream.flush();
    }

    /// Ends this side's half in order: close_notify, then FIN. The other half can still be read.
    pub fn half_close(&mut self) {
        self.stream.conn.send_close_notify();
        let _ = self.stream.flush();
        let _ = self.stream.sock.shutdown(Shutdown::Write);
    }

    /// Breaks the connection off with a TCP reset.
    pub fn reset(self) {
        rustix::net::sockopt::set_socket_linger(&self.stream.sock, Some(Duration::ZERO)).expect("linger");
    }

    /// One response to a request without `HEAD`, delimited by its Content-Length; `None` if the peer closes instead.
    pub fn response(&mut self) -> Option<Reply> {
        let head = loop {
            match self.read.windows(4).position(|four| four == b"\r\n\r\n") {
                Some(end) => break end + 4,
                None => self.fill()?,
            }
        };
        if self.read.starts_with(b"HTTP/1.1 100 ") {
            self.read.drain(..head);
            return self.response();
        }
        let reply = Reply::parse(&self.read[..head]);
        let length = reply.header("content-length").map_or(0, |length| length.parse().expect("a length"));
        while self.read.len() < head + length {
            self.fill()?;
        }
        let bytes: Vec<u8> = self.read.drain(..head + length).collect();
        Some(Reply::parse(&bytes))
    }

    /// Sends an upgrade for `path` with further header lines (each ending in CRLF); returns the answer.
    pub fn upgrade(&mut self, path: &str, headers: &str) -> Reply {
        self.send(format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{headers}\r\n"
        ));
        let reply = self.response().expect("an answer to the upgrade");
        if reply.status == 101 {
            assert_eq!(
                reply.header("sec-websocket-accept"),
                Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="),
                "{reply:?}"
            );
        }
        reply
    }

    /// The next frame; `None` at the end of the stream.
    pub fn frame(&mut self) -> Option<Frame> {
        loop {
            if let Some((frame, used)) = parse_frame(&self.read) {
                self.read.drain(..used);
                return Some(frame);
            }
            self.fill()?;
        }
    }

    /// The next frame that is neither ping nor pong.
    pub fn message(&mut self) -> Option<Frame> {
        loop {
            match self.frame() {
                Some(frame) if frame.opcode == 9 || frame.opcode == 10 => {}
                other => return other,
            }
        }
    }

    /// The code of the close frame that comes next, past pings and pongs.
    #[track_caller]
    pub fn close_code(&mut self) -> u16 {
        loop {
            let message = self.message().expect("a close frame");
            if !matches!(message.opcode, 9 | 10) {
                return message.close().0;
            }
        }
    }

    /// A message comes back from a backend that echoes: the WebSocket is open.
    #[track_caller]
    pub fn assert_echoes(&mut self) {
        self.send(frame(0x81, b"still here"));
        loop {
            let message = self.message().expect("the echo");
            if message.opcode == 1 {
                return assert_eq!(message.payload, b"still here");
            }
            assert_eq!(message.opcode, 9, "only pings come between: {message:?}");
        }
    }

    /// Reads to the end of the stream; true if it came within the deadline.
    pub fn ended(&mut self) -> bool {
        self.ends_within(DEADLINE)
    }

    /// Reads to the end of the stream; false if the peer is silent for so long instead.
    pub fn ends_within(&mut self, deadline: Duration) -> bool {
        self.stream.sock.set_read_timeout(Some(deadline)).expect("a timeout");
        let mut buffer = [0; 16 * 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
            }
        }
    }

    /// Reads more; `None` at the end of the stream. Panics if nothing comes in time.
    fn fill(&mut self) -> Option<()> {
        let mut buffer = [0; 16 * 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => None,
            Ok(count) => {
                self.read.extend_from_slice(&buffer[..count]);
                Some(())
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                panic!(
                    "nothing came within {DEADLINE:?}; read so far: {:?}",
                    String::from_utf8_lossy(&self.read)
                )
            }
            Err(_) => None,
        }
    }
}

/// Reads one frame off the front of `bytes`, and its length on the wire.
pub(crate) fn parse_frame(bytes: &[u8]) -> Option<(Frame, usize)> {
    let (first, second) = (*bytes.first()?, *bytes.get(1)?);
    let (length, mut at) = match second & 0x7f {
        126 => (u64::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?)), 4),
        127 => (u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?), 10),
        short => (u64::from(short), 2),
    };
    let masked = second & 0x80 != 0;
    let mut mask = [0; 4];
    if masked {
        mask = bytes.get(at..at + 4)?.try_into().ok()?;
        at += 4;
    }
    let end = at.checked_add(usize::try_from(length).ok()?)?;
    let payload =
        bytes.get(at..end)?.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
    Some((
        Frame { fin: first & 0x80 != 0, reserved: first & 0x70, opcode: first & 0x0f, masked, payload },
        end,
    ))
}

/// A client's frame: `first` is FIN, RSV and opcode.
pub fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [0x37, 0xfa, 0x21, 0x3d];
    let mut bytes = head(first, payload.len(), 0x80);
    bytes.extend_from_slice(&mask);
    bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    bytes
}

/// A server's frame, or a client's wrong one.
pub fn unmasked_frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = head(first, payload.len(), 0);
    bytes.extend_from_slice(payload);
    bytes
}

fn head(first: u8, length: usize, mask_bit: u8) -> Vec<u8> {
    let mut bytes = vec![first];
    match length {
        0..126 => bytes.push(length as u8 | mask_bit),
        126..0x1_0000 => {
            bytes.push(126 | mask_bit);
            bytes.extend_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            bytes.push(127 | mask_bit);
            bytes.extend_from_slice(&(length as u64).to_be_bytes());
        }
    }
    bytes
}

/// `Sec-WebSocket-Accept` for a key (RFC 6455 §4.2.2).
pub(crate) fn accept(key: &str) -> String {
    let text = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    STANDARD.encode(digest(&SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes()))
}
