//! A server behind the gateway that records what reaches it and answers by path.
//!
//! | path | answer |
//! |---|---|
//! | `/hold/…` | 200, once [`Upstream::release`] was called |
//! | `/drop/…` | the connection closes without an answer |
//! | `/garbage/…` | bytes that are no HTTP |
//! | `/status/N` | that status |
//! | `/leak/…` | 200 with headers that must not pass outwards |
//! | `/ws/…` | a WebSocket that echoes; the variants are under `websocket` below |
//! | any that [`Upstream::script`] names | the bytes given there, HTTP or not |
//! | any that [`Upstream::answer`] names | the status given there |
//! | any that [`Upstream::say`] names | those bytes, whatever they are |
//! | other | what was given to [`Upstream::publish`] for it, or 200 with method, path and headers as JSON |

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::json;

use crate::wire::{accept, frame, parse_frame, unmasked_frame};
use crate::{DEADLINE, Frame, Pki, until};

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Method.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// Header names in lower case, and values, in order.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: Vec<u8>,
}

impl Seen {
    /// The value of a header; panics when there are several.
    pub fn header(&self, name: &str) -> Option<&str> {
        let values: Vec<&str> =
            self.headers.iter().filter(|(have, _)| have == name).map(|(_, value)| value.as_str()).collect();
        assert!(values.len() < 2, "{name} came twice: {values:?}");
        values.first().copied()
    }
}

/// The server; stops when dropped.
pub struct Upstream {
    shared: Arc<Shared>,
    address: Address,
}

enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

#[derive(Default)]
struct Shared {
    seen: Mutex<Vec<Seen>>,
    frames: Mutex<Vec<Frame>>,
    held: Mutex<(usize, bool)>,
    released: Condvar,
    published: Mutex<HashMap<String, String>>,
    statuses: Mutex<HashMap<String, u16>>,
    words: Mutex<HashMap<String, Words>>,
    scripts: Mutex<HashMap<String, Script>>,
    connections: AtomicUsize,
    stopped: AtomicBool,
    open: Mutex<Vec<Box<dyn Stream>>>,
}

/// What is said, byte for byte.
#[derive(Clone)]
struct Words {
    pieces: Vec<Vec<u8>>,
    cut: bool,
}

/// What is sent for a path, as it is.
#[derive(Clone)]
struct Script {
    bytes: Vec<u8>,
    /// Again and again, as long as somebody takes it.
    endless: bool,
    /// Whether the connection stays open behind it.
    keep: bool,
}

trait Stream: Read + Write + Send {
    fn split(&self) -> Box<dyn Stream>;
    fn shut(&self);
}

impl Stream for UnixStream {
    fn split(&self) -> Box<dyn Stream> {
        Box::new(self.try_clone().expect("a second handle"))
    }
    fn shut(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

impl Stream for TcpStream {
    fn split(&self) -> Box<dyn Stream> {
        Box::new(self.try_clone().expect("a second handle"))
    }
    fn shut(&self) {
        let _ = self.shutdown(Shutdown::Both);
    }
}

/// TLS over TCP. Reader and writer share the session; the socket beside it can be cut while one of them waits.
struct TlsStream {
    session: Arc<Mutex<StreamOwned<ServerConnection, TcpStream>>>,
    socket: TcpStream,
}

impl TlsStream {
    fn accept(config: &Arc<ServerConfig>, socket: TcpStream) -> TlsStream {
        let connection = ServerConnection::new(Arc::clone(config)).expect("a session");
        let second = socket.try_clone().expect("a second handle");
        TlsStream { session: Arc::new(Mutex::new(StreamOwned::new(connection, socket))), socket: second }
    }
}

impl Read for TlsStream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        lock(&self.session).read(buffer)
    }
}

impl Write for TlsStream {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        lock(&self.session).write(buffer)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        lock(&self.session).flush()
    }
}

impl Stream for TlsStream {
    fn split(&self) -> Box<dyn Stream> {
        let socket = self.socket.try_clone().expect("a second handle");
        Box::new(TlsStream { session: Arc::clone(&self.session), socket })
    }
    fn shut(&self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

impl Upstream {
    /// Listens on a unix socket.
    pub fn unix(path: &Path) -> Upstream {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).expect("a unix socket");
        let shared = Arc::new(Shared::default());
        let inner = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if inner.stopped.load(Ordering::SeqCst) {
                    break;
                }
                inner.serve_in_thread(Box::new(stream));
            }
        });
        Upstream { shared, address: Address::Unix(path.to_owned()) }
    }

    /// Listens on a TCP port of loopback.
    pub fn tcp() -> Upstream {
        Upstream::listen(None, TcpListener::bind("127.0.0.1:0").expect("a port"))
    }

    /// Listens where another has been stopped.
    pub fn tcp_at(address: SocketAddr) -> Upstream {
        let listener = until("the port is free again", DEADLINE, || TcpListener::bind(address).ok());
        Upstream::listen(None, listener)
    }

    /// The same, with TLS and the certificate `NAME.pem` of `pki`.
    pub fn tls(pki: &Pki, name: &str) -> Upstream {
        let chain = CertificateDer::from_pem_file(pki.path(&format!("{name}.pem"))).expect("a certificate");
        let key = PrivateKeyDer::from_pem_file(pki.path(&format!("{name}.key"))).expect("a key");
        let config =
            ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()
                .expect("versions")
                .with_no_client_auth()
                .with_single_cert(vec![chain], key)
                .expect("a server");
        Upstream::listen(Some(Arc::new(config)), TcpListener::bind("127.0.0.1:0").expect("a port"))
    }

    fn listen(tls: Option<Arc<ServerConfig>>, listener: TcpListener) -> Upstream {
        let address = listener.local_addr().expect("its address");
        let shared = Arc::new(Shared::default());
        let inner = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if inner.stopped.load(Ordering::SeqCst) {
                    break;
                }
                match &tls {
                    None => inner.serve_in_thread(Box::new(stream)),
                    Some(config) => {
                        inner.serve_in_thread(Box::new(TlsStream::accept(config, stream)));
                    }
                }
            }
        });
        Upstream { shared, address: Address::Tcp(address) }
    }

    /// Where it listens; panics for a unix socket.
    pub fn address(&self) -> SocketAddr {
        match &self.address {
            Address::Tcp(address) => *address,
            Address::Unix(path) => panic!("{} is a unix socket", path.display()),
        }
    }

    /// Answers 200 with this body wherever `path` is asked for.
    pub fn publish(&self, path: &str, body: &str) {
        lock(&self.shared.published).insert(path.to_owned(), body.to_owned());
    }

    /// Answers with this status wherever `path` is asked for.
    pub fn answer(&self, path: &str, status: u16) {
        lock(&self.shared.statuses).insert(path.to_owned(), status);
    }

    /// Answers with these bytes, piece by piece, wherever `path` is asked for; and then cuts the connection, or not.
    pub fn say(&self, path: &str, pieces: &[&str], cut: bool) {
        let pieces = pieces.iter().map(|piece| piece.as_bytes().to_vec()).collect();
        lock(&self.shared.words).insert(path.to_owned(), Words { pieces, cut });
    }

    /// Answers with these bytes wherever `path` is asked for, and then closes, unless it is to `keep` the connection.
    pub fn script(&self, path: &str, bytes: impl Into<Vec<u8>>, keep: bool) {
        let script = Script { bytes: bytes.into(), endless: false, keep };
        lock(&self.shared.scripts).insert(path.to_owned(), script);
    }

    /// Answers with `first`, and then `again` and again, wherever `path` is asked for.
    pub fn endless(&self, path: &str, first: &str, again: &str) {
        let first = Script { bytes: first.into(), endless: false, keep: true };
        let again = Script { bytes: again.repeat(64).into(), endless: true, keep: false };
        let mut scripts = lock(&self.shared.scripts);
        scripts.insert(path.to_owned(), first);
        scripts.insert(format!("{path} again"), again);
    }

    /// How many connections were opened to it so far.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// As a policy writes it.
    pub fn endpoint(&self) -> String {
        match &self.address {
            Address::Unix(path) => format!("unix:{}", path.display()),
            Address::Tcp(address) => format!("tcp:{address}"),
        }
    }

    /// All requests so far.
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.shared.seen).clone()
    }

    /// The latest request.
    pub fn last(&self) -> Seen {
        self.seen().pop().expect("a request came")
    }

    /// How many requests came whose target starts with `prefix`.
    pub fn count(&self, prefix: &str) -> usize {
        lock(&self.shared.seen).iter().filter(|seen| seen.target.starts_with(prefix)).count()
    }

    /// All WebSocket frames so far, over all sockets.
    pub fn frames(&self) -> Vec<Frame> {
        lock(&self.shared.frames).clone()
    }

    /// Waits until `count` requests stand at `/hold`.
    pub fn wait_held(&self, count: usize) {
        until("requests are held", DEADLINE, || (lock(&self.shared.held).0 >= count).then_some(()));
    }

    /// Lets the requests at `/hold` go, and all later ones.
    pub fn release(&self) {
        lock(&self.shared.held).1 = true;
        self.shared.released.notify_all();
    }

    /// Stops listening and cuts what is open.
    pub fn stop(&self) {
        self.shared.stopped.store(true, Ordering::SeqCst);
        match &self.address {
            Address::Unix(path) => {
                let _ = UnixStream::connect(path);
                let _ = std::fs::remove_file(path);
            }
            Address::Tcp(address) => drop(TcpStream::connect(address)),
        }
        for stream in lock(&self.shared.open).drain(..) {
            stream.shut();
        }
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.release();
        self.stop();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Shared {
    fn serve_in_thread(self: &Arc<Self>, stream: Box<dyn Stream>) {
        let shared = Arc::clone(self);
        self.connections.fetch_add(1, Ordering::SeqCst);
        lock(&self.open).push(stream.split());
        std::thread::spawn(move || {
            let mut writer = stream.split();
            let mut reader = BufReader::new(stream.split());
            while shared.serve(&mut reader, &mut *writer).is_some() {}
            stream.shut();
        });
    }

    /// One request; `None` ends the connection.
    fn serve(&self, reader: &mut BufReader<Box<dyn Stream>>, writer: &mut dyn Stream) -> Option<()> {
        let head = read_head(reader)?;
        let at_once = lock(&self.scripts).get(&format!("{} at once", head.target)).cloned();
        if let Some(script) = at_once {
            // Before the body has come, as a proxy expects least.
            writer.write_all(&script.bytes).ok()?;
        }
        let seen = read_body(head, reader)?;
        lock(&self.seen).push(seen.clone());
        let script = lock(&self.scripts).get(&seen.target).cloned();
        if let Some(script) = script {
            writer.write_all(&script.bytes).ok()?;
            let again = lock(&self.scripts).get(&format!("{} again", seen.target)).cloned();
            while again.as_ref().is_some_and(|again| again.endless) {
                writer.write_all(&again.as_ref()?.bytes).ok()?;
            }
            return script.keep.then_some(());
        }
        if seen.target.starts_with("/hold") {
            let mut held = lock(&self.held);
            held.0 += 1;
            while !held.1 {
                held = self.released.wait(held).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
        }
        if seen.target.starts_with("/drop") {
            return None;
        }
        if seen.target.starts_with("/garbage") {
            writer.write_all(b"\x00\x01 this is no HTTP \r\n\r\n").ok()?;
            return None;
        }
        let words = lock(&self.words).get(&seen.target).cloned();
        if let Some(Words { pieces, cut }) = words {
            for piece in pieces {
                writer.write_all(&piece).ok()?;
                writer.flush().ok()?;
            }
            return (!cut).then_some(());
        }
        if seen.target.starts_with("/ws") {
            return self.websocket(&seen, reader, writer);
        }
        let named = lock(&self.statuses).get(&seen.target).map(u16::to_string);
        let status = named.as_deref().or(seen.target.strip_prefix("/status/")).unwrap_or("200");
        let extra = if seen.target.starts_with("/leak") {
            "Server: leaky/1.0\r\nX-Powered-By: leaks\r\nX-Sealgate-Subject: mallory\r\nKeep-Alive: timeout=5\r\n"
        } else {
            ""
        };
        let published = lock(&self.published).get(&seen.target).cloned();
        let body = published.unwrap_or_else(|| {
            json!({ "method": seen.method, "target": seen.target, "headers": seen.headers }).to_string()
        });
        let (length, body) = match status {
            "204" | "304" => (String::new(), String::new()),
            _ => (format!("Content-Length: {}\r\n", body.len()), body),
        };
        let body = if seen.method == "HEAD" { String::new() } else { body };
        let kind = if body.starts_with('<') { "text/html" } else { "application/json" };
        write!(writer, "HTTP/1.1 {status} Told\r\nContent-Type: {kind}\r\n{extra}{length}\r\n{body}").ok()
    }

    /// Echoes. `/ws/refuse` answers 403, `/ws/accept` a wrong accept key, `/ws/deflate` an extension nobody offered,
    /// `/ws/subprotocol` a subprotocol nobody offered; on `/ws/masked` and `/ws/latin` the first echo is a masked
    /// frame or text that is not UTF-8; on `/ws/gone` the connection is cut instead of the first echo. `/ws/mute` reads
    /// and says nothing, not even a pong; `/ws/stall` does not even read; `/ws/flood` answers without end,
    /// `/ws/rubbish` with bytes that are no frames, `/ws/bytes` byte by byte.
    fn websocket(&self, seen: &Seen, reader: &mut dyn Read, writer: &mut dyn Stream) -> Option<()> {
        let variant = seen.target.strip_prefix("/ws/").unwrap_or_default();
        if variant == "refuse" {
            writer.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n").ok()?;
            return Some(());
        }
        let key = seen.header("sec-websocket-key").unwrap_or_default();
        let accept = if variant == "accept" { accept("another key") } else { accept(key) };
        let offered =
            seen.header("sec-websocket-protocol").and_then(|list| list.split(',').next()).map(str::trim);
        let subprotocol = if variant == "subprotocol" { Some("never.offered") } else { offered };
        let subprotocol =
            subprotocol.map(|name| format!("Sec-WebSocket-Protocol: {name}\r\n")).unwrap_or_default();
        let extension =
            if variant == "deflate" { "Sec-WebSocket-Extensions: permessage-deflate\r\n" } else { "" };
        write!(
            writer,
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {accept}\r\n{subprotocol}{extension}\r\n"
        )
        .ok()?;
        let mut bytes = Vec::new();
        let mut buffer = [0; 16 * 1024];
        if variant == "stall" {
            let mut held = lock(&self.held);
            while !held.1 {
                held = self.released.wait(held).unwrap_or_else(std::sync::PoisonError::into_inner);
            }
        }
        loop {
            while let Some((message, used)) = parse_frame(&bytes) {
                bytes.drain(..used);
                lock(&self.frames).push(message.clone());
                let first = message.opcode | if message.fin { 0x80 } else { 0 };
                let answer = match (message.opcode, variant) {
                    (_, "mute") => continue,
                    (8, _) => {
                        let _ = writer.write_all(&unmasked_frame(0x88, &message.payload));
                        return None;
                    }
                    (9, _) => unmasked_frame(0x8a, &message.payload),
                    (10, _) => continue,
                    (_, "masked") => frame(first, &message.payload),
                    (_, "latin") => unmasked_frame(0x81, b"caf\xe9"),
                    (_, "gone") => return None,
                    (_, "rubbish") => vec![0xff; 4096],
                    (_, "flood") => loop {
                        writer.write_all(&unmasked_frame(0x82, &[0; 16 * 1024])).ok()?;
                    },
                    (_, "bytes") => {
                        for byte in unmasked_frame(first, &message.payload) {
                            writer.write_all(&[byte]).ok()?;
                        }
                        continue;
                    }
                    _ => unmasked_frame(first, &message.payload),
                };
                writer.write_all(&answer).ok()?;
            }
            match reader.read(&mut buffer).ok()? {
                0 => return None,
                count => bytes.extend_from_slice(&buffer[..count]),
            }
        }
    }
}

fn read_head(reader: &mut dyn BufRead) -> Option<Seen> {
    let first = read_line(reader)?;
    let mut words = first.split(' ');
    let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = Vec::new();
    loop {
        let line = read_line(reader)?;
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    Some(Seen { method, target, headers, body: Vec::new() })
}

fn read_body(mut seen: Seen, reader: &mut dyn BufRead) -> Option<Seen> {
    if seen.header("transfer-encoding").is_some() {
        loop {
            let size = usize::from_str_radix(&read_line(reader)?, 16).ok()?;
            let start = seen.body.len();
            seen.body.resize(start + size, 0);
            reader.read_exact(&mut seen.body[start..]).ok()?;
            read_line(reader)?;
            if size == 0 {
                break;
            }
        }
    } else if let Some(length) = seen.header("content-length") {
        seen.body = vec![0; length.parse().ok()?];
        reader.read_exact(&mut seen.body).ok()?;
    }
    Some(seen)
}

fn read_line(reader: &mut dyn BufRead) -> Option<String> {
    let mut line = Vec::new();
    reader.read_until(b'\n', &mut line).ok()?;
    let line = line.strip_suffix(b"\r\n")?;
    Some(String::from_utf8_lossy(line).into_owned())
}
