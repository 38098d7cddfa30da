//! TLS streams whose buffers belong to the core.
//!
//! rustls' buffered connections hold 4 KiB each from the first byte they read, and read no more than that at once.
//! These are its unbuffered ones: ciphertext is read into, and written from, scratch memory of the thread, much at a
//! time. Only what cannot be finished stays with the stream: half a record, plaintext for which the reader had no
//! room, ciphertext that the socket does not take yet. An idle stream holds none of it.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use rustls::{
    CommonState, Error, InvalidMessage, NamedGroup,
    client::{ClientConfig, ClientConnectionData, UnbufferedClientConnection},
    pki_types::ServerName,
    server::{Acceptor, ClientHello, ServerConfig, ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus, WriteTraffic},
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};

/// Ciphertext that is looked at, or made, in one go. rustls bounds a handshake message to 64 KiB, a record to 16 KiB
/// and a bit.
const WIRE: usize = 96 * 1024;

/// Least ciphertext asked for at once, however little room the reader has.
const LEAST_READ: usize = 4 * 1024;

/// Most plaintext that one write takes: with what its records add, less than [`WIRE`].
const MOST_WRITE: usize = 64 * 1024;

thread_local! {
    // INVARIANT: borrowed inside one poll of one stream only, and no stream of ours runs over another.
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { wire: Vec::new(), plain: Vec::new() }) };
}

/// Memory of the core.
struct Scratch {
    wire: Vec<u8>,
    /// The slices of a vectored write, put together.
    plain: Vec<u8>,
}

/// Our side of a TLS connection: [`UnbufferedServerConnection`] or [`UnbufferedClientConnection`].
pub trait Side: Unpin {
    /// What rustls keeps for this side.
    type Data;

    /// Looks at ciphertext; see rustls' [`unbuffered`](rustls::unbuffered).
    fn step<'c, 'i>(&'c mut self, wire: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;

    /// What the handshake agreed on.
    fn common(&self) -> &CommonState;
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn step<'c, 'i>(&'c mut self, wire: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(wire)
    }

    fn common(&self) -> &CommonState {
        self
    }
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn step<'c, 'i>(&'c mut self, wire: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(wire)
    }

    fn common(&self) -> &CommonState {
        self
    }
}

/// A TLS stream over `I`.
///
/// INVARIANT: rustls remembers positions in what it has not discarded (fragments of handshake messages), so it is
/// shown just that again, with more behind it or not, at every step.
pub struct TlsStream<I, S> {
    io: I,
    // In a box: hyper and the tunnel move the stream around.
    session: Box<S>,
    /// Ciphertext of a record, or a handshake message, that has not come whole.
    incoming: Vec<u8>,
    /// Plaintext that its reader had no room for.
    plain: Queue,
    /// Ciphertext that `io` has not taken.
    outgoing: Queue,
    /// Nothing more comes in: the peer has said so, or what it said was wrong.
    ended: bool,
    /// We have said that nothing more comes.
    closed: bool,
    /// rustls gave an error: it must not be asked again.
    failed: bool,
}

/// A stream on which we are the server.
pub type ServerStream<I> = TlsStream<I, UnbufferedServerConnection>;

/// A stream on which we are the client.
pub type ClientStream<I> = TlsStream<I, UnbufferedClientConnection>;

impl<I: AsyncRead + AsyncWrite + Unpin> ServerStream<I> {
    /// Takes the server's part of the handshake. Has no deadline of its own.
    ///
    /// # Errors
    /// The peer broke off or broke the rules; it got an alert then, as far as it listens.
    pub async fn accept(config: Arc<ServerConfig>, io: I) -> io::Result<Self> {
        let session = UnbufferedServerConnection::new(config).map_err(invalid)?;
        TlsStream::new(io, session).shake_hands(&mut []).await
    }

    /// As [`ServerStream::accept`], with the configuration that `choose` has for what the client says. If it has none, the client
    /// gets the alert for a name that nobody has (RFC 6066 §3).
    ///
    /// # Errors
    /// As there, and those of `choose`.
    pub async fn accept_by(
        choose: impl FnOnce(&Hello) -> io::Result<Option<Arc<ServerConfig>>>,
        mut io: I,
    ) -> io::Result<Self> {
        let mut hello = Vec::new();
        let said = read_hello(&mut io, &mut hello).await?;
        if said.falls_back {
            return Err(no_fallback(&mut io).await);
        }
        let config = choose(&said)?;
        let Some(config) = config else {
            // A fatal unrecognized_name.
            let _ = io.write_all(&[21, 3, 3, 0, 2, 2, 112]).await;
            return Err(io::Error::new(io::ErrorKind::InvalidData, "nobody is here by the name asked for"));
        };
        let session = UnbufferedServerConnection::new(config).map_err(invalid)?;
        TlsStream::new(io, session).shake_hands(&mut hello).await
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin> ClientStream<I> {
    /// Takes the client's part of the handshake with the server `name`. Has no deadline of its own.
    ///
    /// # Errors
    /// As [`ServerStream::accept`]; a server that cannot be verified breaks the rules.
    pub async fn connect(config: Arc<ClientConfig>, name: ServerName<'static>, io: I) -> io::Result<Self> {
        let session = UnbufferedClientConnection::new(config, name).map_err(invalid)?;
        TlsStream::new(io, session).shake_hands(&mut []).await
    }
}

impl<I, S: Side> TlsStream<I, S> {
    fn new(io: I, session: S) -> Self {
        Self {
            io,
            session: Box::new(session),
            incoming: Vec::new(),
            plain: Queue::default(),
            outgoing: Queue::default(),
            ended: false,
            closed: false,
            failed: false,
        }
    }

    /// What it runs over.
    pub fn get_ref(&self) -> &I {
        &self.io
    }

    /// Bytes of ciphertext that the other side has not taken.
    pub fn unsent(&self) -> usize {
        self.outgoing.rest().len()
    }

    /// What the handshake agreed on.
    pub fn session(&self) -> &CommonState {
        self.session.common()
    }

    /// Takes in `wire`: plaintext goes to `into` and, beyond its room, to `plain`; what rustls wants to say goes to
    /// `outgoing`; an unfinished rest to `incoming`.
    fn take_in(&mut self, wire: &mut [u8], into: &mut ReadBuf<'_>) -> io::Result<()> {
        let mut at = 0;
        loop {
            let rest = wire.get_mut(at..).unwrap_or_default();
            let UnbufferedStatus { mut discard, state } = self.session.step(rest);
            let is_over = match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record.map_err(invalid)?;
                        discard += record.discard;
                        let room = into.remaining().min(record.payload.len());
                        let (now, later) = record.payload.split_at_checked(room).unwrap_or_default();
                        into.put_slice(now);
                        self.plain.push(later);
                    }
                    false
                }
                Ok(ConnectionState::EncodeTlsData(data)) => {
                    encode(data, &mut self.outgoing)?;
                    false
                }
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    // It stands in `outgoing`, which goes out before anything else does.
                    data.done();
                    false
                }
                Ok(ConnectionState::WriteTraffic(_) | ConnectionState::BlockedHandshake) => true,
                Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => {
                    self.ended = true;
                    self.incoming = Vec::new();
                    return Ok(());
                }
                Ok(_) => return Err(io::Error::other("early data, which we never accept")),
                Err(error) => {
                    self.fail();
                    self.say_why(&error);
                    return Err(invalid(error));
                }
            };
            at += discard;
            if is_over {
                break;
            }
        }
        self.incoming = wire.get(at..).unwrap_or_default().to_vec();
        Ok(())
    }

    /// Sees to it that the alert is the right one, where rustls has none or another.
    fn say_why(&mut self, error: &Error) {
        // Before a version is agreed on nothing is encrypted.
        let is_plain = self.session().protocol_version().is_none();
        let alert = match (error, self.outgoing.bytes.as_slice()) {
            // Where no certificate has a signature that the client understands, rustls says access_denied, which means something
            // else. RFC 8446 §4.1.1 and RFC 5246 §7.4.3 want handshake_failure, and clients and scanners take it for what it is.
            (Error::General(_), [21, 3, 3, 0, 2, 2, 49]) => 40,
            // A handshake message that is too long, and records of other kinds between its parts: RFC 8446 §6.2.
            (Error::InvalidMessage(_), []) if is_plain => 50,
            (Error::PeerMisbehaved(_), []) if is_plain => 10,
            _ => return,
        };
        self.outgoing = Queue { bytes: vec![21, 3, 3, 0, 2, 2, alert], taken: 0 };
    }

    /// Ends both directions after an error, but for what rustls has left to say: the alert, and what came before it.
    fn fail(&mut self) {
        (self.ended, self.failed) = (true, true);
        self.incoming = Vec::new();
        // rustls looks at no input while it has something to say. It must not any more: the input is what was wrong.
        while self.session.common().wants_write() {
            match self.session.step(&mut []).state {
                Ok(ConnectionState::EncodeTlsData(data)) => {
                    if encode(data, &mut self.outgoing).is_err() {
                        return;
                    }
                }
                Ok(ConnectionState::ReadTraffic(mut traffic)) => while traffic.next_record().is_some() {},
                _ => return,
            }
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin, S: Side> TlsStream<I, S> {
    /// `first` has already come.
    async fn shake_hands(mut self, first: &mut [u8]) -> io::Result<Self> {
        // A client speaks first.
        if let Err(error) = self.take_in(first, &mut ReadBuf::new(&mut [])) {
            // The alert, as far as the peer listens.
            let _ = poll_fn(|cx| self.poll_out(cx)).await;
            return Err(error);
        }
        poll_fn(|cx| self.poll_handshake(cx)).await?;
        Ok(self)
    }

    fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            // Reads on even while it cannot write: over a narrow path the peer may be doing the same.
            let _sent = self.poll_out(cx)?;
            if !self.session().is_handshaking() {
                // Tickets may wait for the first write: some clients do not read before they have written.
                return Poll::Ready(Ok(()));
            }
            if self.ended {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            // Plaintext that comes behind the handshake waits for its reader.
            ready!(self.poll_in(cx, &mut ReadBuf::new(&mut [])))?;
        }
    }

    /// Reads ciphertext once, and takes it in.
    fn poll_in(&mut self, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        SCRATCH.with_borrow_mut(|Scratch { wire, .. }| {
            if wire.is_empty() {
                wire.resize(WIRE, 0);
            }
            let kept = self.incoming.len();
            let Some((front, room)) = wire.split_at_mut_checked(kept) else {
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            };
            front.copy_from_slice(&self.incoming);
            // No more than the reader has room for, by and large: what it has no room for is kept.
            let most = room.len().min(into.remaining().max(LEAST_READ));
            if most == 0 {
                return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
            }
            let mut came = ReadBuf::new(room.get_mut(..most).unwrap_or_default());
            ready!(Pin::new(&mut self.io).poll_read(cx, &mut came))?;
            let came = came.filled().len();
            if came == 0 {
                // Cut off, perhaps by somebody in between: the peer would have said that it ends (RFC 8446 §6.1).
                self.ended = true;
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            let taken = self.take_in(wire.get_mut(..kept + came).unwrap_or_default(), into);
            if taken.is_err() {
                // The alert, as far as the peer listens.
                let _ = self.poll_out(cx);
            }
            Poll::Ready(taken)
        })
    }

    /// Writes what waits.
    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let waiting @ [_, ..] = self.outgoing.rest() {
            match ready!(Pin::new(&mut self.io).poll_write(cx, waiting))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                taken => self.outgoing.take(taken),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Has rustls encrypt what `put` says, and writes it as far as `io` takes it; the rest waits.
    fn write_wire(
        &mut self,
        cx: &mut Context<'_>,
        wire: &mut Vec<u8>,
        put: impl FnOnce(&mut WriteTraffic<'_, S::Data>, &mut [u8]) -> Result<usize, EncryptError>,
    ) -> io::Result<()> {
        if self.failed {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if wire.is_empty() {
            wire.resize(WIRE, 0);
        }
        let len = loop {
            let UnbufferedStatus { discard, state } = self.session.step(&mut self.incoming);
            let state = match state {
                Ok(state) => state,
                Err(error) => {
                    self.fail();
                    return Err(invalid(error));
                }
            };
            // INVARIANT: nothing, since `take_in` left nothing in there that can be finished.
            debug_assert_eq!(discard, 0);
            match state {
                ConnectionState::WriteTraffic(mut traffic) => {
                    break put(&mut traffic, wire).map_err(io::Error::other)?;
                }
                ConnectionState::EncodeTlsData(data) => encode(data, &mut self.outgoing)?,
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::PeerClosed => self.ended = true,
                _ => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        };
        let mut wire = wire.get(..len).unwrap_or_default();
        while self.outgoing.is_empty() && !wire.is_empty() {
            match Pin::new(&mut self.io).poll_write(cx, wire)? {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(taken) => wire = wire.get(taken..).unwrap_or_default(),
                Poll::Pending => break,
            }
        }
        self.outgoing.push(wire);
        Ok(())
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin, S: Side> AsyncRead for TlsStream<I, S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        loop {
            // Somebody who only reads would never send what rustls had to say, such as the answer to a key update.
            if let Poll::Ready(Err(error)) = this.poll_out(cx) {
                return Poll::Ready(Err(error));
            }
            if !this.plain.is_empty() {
                let waiting = this.plain.rest();
                let now = waiting.get(..buf.remaining()).unwrap_or(waiting);
                buf.put_slice(now);
                let len = now.len();
                this.plain.take(len);
            }
            if this.ended || buf.filled().len() > before {
                return Poll::Ready(Ok(()));
            }
            ready!(this.poll_in(cx, buf))?;
        }
    }
}

impl<I: AsyncRead + AsyncWrite + Unpin, S: Side> AsyncWrite for TlsStream<I, S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_out(cx))?;
        let plain = buf.get(..MOST_WRITE).unwrap_or(buf);
        SCRATCH.with_borrow_mut(|Scratch { wire, .. }| {
            this.write_wire(cx, wire, |traffic, room| traffic.encrypt(plain, room))
        })?;
        Poll::Ready(Ok(plain.len()))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_out(cx))?;
        let len = SCRATCH.with_borrow_mut(|Scratch { wire, plain }| {
            plain.clear();
            for buf in bufs {
                let room = MOST_WRITE.saturating_sub(plain.len());
                plain.extend_from_slice(buf.get(..room).unwrap_or(buf));
            }
            this.write_wire(cx, wire, |traffic, room| traffic.encrypt(plain, room))?;
            Ok::<_, io::Error>(plain.len())
        })?;
        Poll::Ready(Ok(len))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_out(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_out(cx))?;
        if !this.closed && !this.failed {
            this.closed = true;
            SCRATCH.with_borrow_mut(|Scratch { wire, .. }| {
                this.write_wire(cx, wire, |traffic, room| traffic.queue_close_notify(room))
            })?;
            ready!(this.poll_out(cx))?;
        }
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

/// Most that a client may send before its ClientHello is whole. Those of browsers, with post-quantum shares, have 2 KiB.
const MOST_HELLO: usize = 64 * 1024;

pub use sealgate_keys::ACME_TLS;

/// What a ClientHello says that decides about the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// The name asked for (SNI), lower case.
    pub name: Option<String>,
    /// The key exchange groups that it offers of those that there are, in our order.
    pub groups: Vec<NamedGroup>,
    /// It wants ChaCha20-Poly1305 most.
    pub wants_chacha: bool,
    /// It has tried with TLS 1.3 and failed, or so it thinks: it says that it falls back to 1.2 (RFC 7507).
    pub falls_back: bool,
    /// It is an ACME server's that validates a name: it offers [`ACME_TLS`] and nothing else (RFC 8737 §3).
    pub validates: bool,
}

/// A ClientHello as it comes.
#[derive(Default)]
pub struct HelloReader {
    acceptor: Acceptor,
    seen: usize,
}

/// A ClientHello that is none.
#[derive(Debug)]
pub struct NoHello {
    /// What is wrong with it.
    pub error: Error,
    /// What its client is to be told: an alert in its record.
    pub alert: Vec<u8>,
}

impl HelloReader {
    /// Looks at all that has come so far; `None`: more has to come. Not to be asked again after it has answered.
    ///
    /// # Errors
    /// It is no ClientHello.
    pub fn read(&mut self, came: &[u8]) -> Result<Option<Hello>, NoHello> {
        while let mut rest @ [_, ..] = came.get(self.seen..).unwrap_or_default() {
            // From memory, so it cannot fail but for want of room: then what has come is no ClientHello.
            let Ok(taken) = self.acceptor.read_tls(&mut rest) else { return Err(NoHello::too_long()) };
            self.seen += taken;
            match self.acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => return Ok(Some(Hello::of(&accepted.client_hello()))),
                Err((error, mut words)) => {
                    let mut alert = Vec::new();
                    let _ = words.write_all(&mut alert);
                    return Err(NoHello::of(error, alert));
                }
            }
        }
        if came.len() > MOST_HELLO { Err(NoHello::too_long()) } else { Ok(None) }
    }
}

impl NoHello {
    /// `said` is what rustls would say. Here it has often nothing to say, where it has in a whole handshake.
    fn of(error: Error, said: Vec<u8>) -> Self {
        use InvalidMessage::{DuplicateExtension, PreSharedKeyIsNotFinalExtension};
        let alert = match error {
            // RFC 8446 §4.2 and §4.2.11: illegal_parameter.
            Error::InvalidMessage(DuplicateExtension(_) | PreSharedKeyIsNotFinalExtension) => 47,
            // Whoever has said goodbye is not talked to.
            Error::AlertReceived(_) => return Self { error, alert: Vec::new() },
            _ if !said.is_empty() => return Self { error, alert: said },
            Error::InvalidMessage(_) => 50,
            _ => 10,
        };
        Self { error, alert: vec![21, 3, 3, 0, 2, 2, alert] }
    }

    fn too_long() -> Self {
        Self::of(Error::InvalidMessage(InvalidMessage::HandshakePayloadTooLarge), Vec::new())
    }
}

impl Hello {
    fn of(hello: &ClientHello<'_>) -> Self {
        let mut protocols = hello.alpn().into_iter().flatten();
        let offered = hello.named_groups().unwrap_or_default();
        let suites = || hello.cipher_suites().iter().map(|suite| u16::from(*suite));
        Self {
            name: hello.server_name().map(str::to_owned),
            groups: sealgate_keys::GROUPS.into_iter().filter(|group| offered.contains(group)).collect(),
            wants_chacha: chacha_is_first(suites()),
            falls_back: is_fallback(suites()),
            validates: protocols.next() == Some(ACME_TLS) && protocols.next().is_none(),
        }
    }
}

/// TLS_FALLBACK_SCSV of a client that offers no suite of TLS 1.3, which every policy here does (RFC 7507 §3). Clients that have 1.3
/// notice a downgrade by the sentinel anyway (RFC 8446 §4.1.3).
fn is_fallback(mut suites: impl Iterator<Item = u16>) -> bool {
    let (mut says_so, mut has_tls13) = (false, false);
    suites.by_ref().for_each(|suite| {
        says_so |= suite == 0x5600;
        has_tls13 |= matches!(suite, 0x1301..=0x1305);
    });
    says_so && !has_tls13
}

/// Tells a client that it need not fall back.
async fn no_fallback<I: AsyncWrite + Unpin>(io: &mut I) -> io::Error {
    // A fatal inappropriate_fallback.
    let _ = io.write_all(&[21, 3, 3, 0, 2, 2, 86]).await;
    io::Error::new(io::ErrorKind::InvalidData, "a fallback from TLS 1.3, which is offered")
}

fn chacha_is_first(mut suites: impl Iterator<Item = u16>) -> bool {
    // Numbers that mean nothing may come before (RFC 8701).
    let first = suites.find(|suite| suite & 0x0f0f != 0x0a0a);
    first.is_some_and(|suite| sealgate_keys::is_chacha(suite.into()))
}

/// Reads until a ClientHello is whole. All that came stands in `came`, to be read again.
async fn read_hello<I: AsyncRead + AsyncWrite + Unpin>(io: &mut I, came: &mut Vec<u8>) -> io::Result<Hello> {
    let mut reader = HelloReader::default();
    loop {
        came.reserve(LEAST_READ);
        if io.read_buf(came).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        match reader.read(came) {
            Ok(Some(hello)) => return Ok(hello),
            Ok(None) => {}
            Err(NoHello { error, alert }) => {
                let _ = io.write_all(&alert).await;
                return Err(invalid(error));
            }
        }
    }
}

/// Bytes on their way through. Holds memory only while there are any.
#[derive(Default)]
struct Queue {
    bytes: Vec<u8>,
    taken: usize,
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn rest(&self) -> &[u8] {
        self.bytes.get(self.taken..).unwrap_or_default()
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn take(&mut self, len: usize) {
        self.taken += len;
        if self.taken >= self.bytes.len() {
            *self = Queue::default();
        }
    }
}

/// Adds what rustls wants to say to what waits.
fn encode<D>(mut data: EncodeTlsData<'_, D>, outgoing: &mut Queue) -> io::Result<()> {
    let size = match data.encode(&mut []) {
        Err(EncodeError::InsufficientSize(size)) => size.required_size,
        Err(error @ EncodeError::AlreadyEncoded) => return Err(io::Error::other(error)),
        Ok(_) => return Ok(()),
    };
    let before = outgoing.bytes.len();
    outgoing.bytes.resize(before + size, 0);
    let room = outgoing.bytes.get_mut(before..).unwrap_or_default();
    data.encode(room).map(drop).map_err(io::Error::other)
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests;
