//! WebSockets by Python's `websockets` and Node's `ws`, over HTTP/2 by Python's `h2`, and by Chromium, driven line by line (tests/clients/).

use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::DEADLINE;

/// Which client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// Python, `websockets`.
    Python,
    /// Node, `ws`.
    Node,
    /// Python, `h2` with the frames of `websockets`: RFC 8441, all sockets on one connection.
    Http2,
    /// Chromium, headless: [`Driver::goto`] first. What is refused is a `close` with 1006 there, and it knows no
    /// headers. Its authority is the server's certificate.
    Chromium,
}

impl Client {
    /// Those over HTTP/1.1.
    pub const HTTP1: [Client; 2] = [Client::Python, Client::Node];
    /// All but the browser.
    pub const ALL: [Client; 3] = [Client::Python, Client::Node, Client::Http2];
}

/// How to open a socket.
#[derive(Clone, Debug, Default)]
pub struct Open {
    token: Option<String>,
    origin: Option<String>,
    headers: Vec<(String, String)>,
    subprotocols: Vec<String>,
    compression: bool,
    protocol: Option<String>,
}

impl Open {
    /// Without anything.
    pub fn bare() -> Open {
        Open::default()
    }

    /// With a bearer token in the `Authorization` header.
    pub fn token(token: &str) -> Open {
        Open { token: Some(token.to_owned()), ..Open::default() }
    }

    /// With an Origin, as browsers send.
    pub fn origin(self, origin: &str) -> Open {
        Open { origin: Some(origin.to_owned()), ..self }
    }

    /// With one more header.
    pub fn header(mut self, name: &str, value: &str) -> Open {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With one more subprotocol in the list.
    pub fn subprotocol(mut self, name: &str) -> Open {
        self.subprotocols.push(name.to_owned());
        self
    }

    /// Offering permessage-deflate, as browsers do.
    pub fn compression(self) -> Open {
        Open { compression: true, ..self }
    }

    /// With another `:protocol` than `websocket` ([`Client::Http2`] only).
    pub fn protocol(self, name: &str) -> Open {
        Open { protocol: Some(name.to_owned()), ..self }
    }
}

/// One client process, holding any number of sockets.
pub struct Driver {
    child: Child,
    /// Taken when it is to end.
    input: Option<ChildStdin>,
    events: Receiver<Value>,
    waiting: HashMap<String, VecDeque<Value>>,
    /// For its end.
    patience: Duration,
}

impl Driver {
    /// Starts the client; certificates are checked against `ca`.
    pub fn start(client: Client, ca: &Path) -> Driver {
        Driver::start_as(client, ca, None)
    }

    /// As [`Driver::start`], with a client certificate and its key; `Client::Http2` only.
    pub fn start_as(client: Client, ca: &Path, identity: Option<(&Path, &Path)>) -> Driver {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
        let mut command = match client {
            Client::Python | Client::Http2 | Client::Chromium => {
                let script = match client {
                    Client::Http2 => "ws_h2.py",
                    Client::Chromium => "browser.py",
                    _ => "ws.py",
                };
                let mut command = Command::new(folder.join("venv/bin/python3"));
                command.arg("-u").arg(folder.join(script));
                command
            }
            Client::Node => {
                let mut command = Command::new("node");
                command.arg(folder.join("ws.mjs"));
                command
            }
        };
        command.arg(ca);
        if let Some((certificate, key)) = identity {
            assert_eq!(client, Client::Http2, "others take no certificate");
            command.arg(certificate).arg(key);
        }
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap_or_else(|error| {
                panic!("{client:?} does not start ({error}); ./test installs the clients")
            });
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let (sender, events) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line)
                    .unwrap_or_else(|_| json!({ "event": "output", "line": line }));
                if sender.send(event).is_err() {
                    break;
                }
            }
        });
        // A browser has children of its own, which must not be left behind.
        let patience = if client == Client::Chromium { DEADLINE } else { Duration::ZERO };
        Driver { child, input, events, waiting: HashMap::new(), patience }
    }

    /// Starts to open a socket under a name of the test's choice.
    pub fn begin(&mut self, id: &str, url: &str, open: &Open) {
        let mut headers = open.headers.clone();
        if let Some(token) = &open.token {
            headers.push(("Authorization".to_owned(), format!("Bearer {token}")));
        }
        self.command(json!({
            "op": "open", "id": id, "url": url, "headers": headers, "origin": open.origin,
            "subprotocols": open.subprotocols, "compression": open.compression,
            "protocol": open.protocol.as_deref().unwrap_or("websocket"),
        }));
    }

    /// Opens a socket and returns the event: `open` (with `subprotocol`, `extensions`) or `refused` (with `status`,
    /// `headers`, `body`).
    pub fn attempt(&mut self, id: &str, url: &str, open: &Open) -> Value {
        self.begin(id, url, open);
        self.next(id)
    }

    /// Opens a socket that must open.
    #[track_caller]
    pub fn open(&mut self, id: &str, url: &str, open: &Open) -> Value {
        let event = self.attempt(id, url, open);
        assert_eq!(event["event"], "open", "{event}");
        event
    }

    /// Opens a socket that must be refused with this status; returns the event.
    #[track_caller]
    pub fn refused(&mut self, id: &str, url: &str, open: &Open, status: u16) -> Value {
        let event = self.attempt(id, url, open);
        assert_eq!(event["event"], "refused", "{event}");
        assert_eq!(event["status"], status, "{event}");
        event
    }

    /// Sends a text message.
    pub fn text(&mut self, id: &str, text: &str) {
        self.command(json!({ "op": "text", "id": id, "data": text }));
    }

    /// Sends a text message in several frames.
    pub fn fragments(&mut self, id: &str, parts: &[&str]) {
        self.command(json!({ "op": "fragments", "id": id, "parts": parts }));
    }

    /// Sends a binary message.
    pub fn binary(&mut self, id: &str, bytes: &[u8]) {
        self.command(json!({ "op": "binary", "id": id, "data": STANDARD.encode(bytes) }));
    }

    /// Sends a ping.
    pub fn ping(&mut self, id: &str) {
        self.command(json!({ "op": "ping", "id": id }));
    }

    /// Has the browser load a page ([`Client::Chromium`] only); returns its status.
    pub fn goto(&mut self, url: &str) -> u64 {
        self.command(json!({ "op": "goto", "id": "page", "url": url }));
        let event = self.next("page");
        event["status"].as_u64().unwrap_or_else(|| panic!("{event}"))
    }

    /// Ends a stream with RST_STREAM ([`Client::Http2`] only, as are the four below).
    pub fn reset(&mut self, id: &str) {
        self.command(json!({ "op": "reset", "id": id }));
    }

    /// Ends this side's half of a stream, without a close frame.
    pub fn half_close(&mut self, id: &str) {
        self.command(json!({ "op": "half-close", "id": id }));
    }

    /// Opens a stream's window no further: what comes is neither read nor told.
    pub fn stall(&mut self, id: &str) {
        self.command(json!({ "op": "stall", "id": id }));
    }

    /// Opens it again; what came meanwhile is lost.
    pub fn resume(&mut self, id: &str) {
        self.command(json!({ "op": "resume", "id": id }));
    }

    /// A GET on the connection of the sockets; returns the event `response` with `status`, `headers`, `body`.
    pub fn request(&mut self, id: &str, url: &str, token: &str) -> Value {
        let headers = [("authorization", format!("Bearer {token}"))];
        self.command(json!({ "op": "request", "id": id, "url": url, "headers": headers }));
        self.next(id)
    }

    /// Closes from this side.
    pub fn close(&mut self, id: &str, code: u16, reason: &str) {
        self.command(json!({ "op": "close", "id": id, "code": code, "reason": reason }));
    }

    /// The next event on a socket.
    #[track_caller]
    pub fn next(&mut self, id: &str) -> Value {
        match self.next_within(id, DEADLINE) {
            Some(event) => event,
            None => panic!("no event on {id} within {DEADLINE:?}; others: {:?}", self.waiting),
        }
    }

    /// The next event on a socket, if one comes in time.
    pub fn next_within(&mut self, id: &str, deadline: Duration) -> Option<Value> {
        let start = Instant::now();
        loop {
            if let Some(event) = self.waiting.get_mut(id).and_then(VecDeque::pop_front) {
                return Some(event);
            }
            let event = self.events.recv_timeout(deadline.checked_sub(start.elapsed())?).ok()?;
            let id = event["id"].as_str().unwrap_or_default().to_owned();
            self.waiting.entry(id).or_default().push_back(event);
        }
    }

    /// The next event must be this text.
    #[track_caller]
    pub fn expect_text(&mut self, id: &str, text: &str) {
        let event = self.next(id);
        assert_eq!((event["event"].as_str(), event["data"].as_str()), (Some("text"), Some(text)), "{event}");
    }

    /// Sends a text and expects it back.
    #[track_caller]
    pub fn echo(&mut self, id: &str, text: &str) {
        self.text(id, text);
        self.expect_text(id, text);
    }

    /// The next event must be the other side's close with this code; returns the reason.
    #[track_caller]
    pub fn expect_close(&mut self, id: &str, code: u16) -> String {
        let event = self.next(id);
        assert_eq!(
            (event["event"].as_str(), event["code"].as_u64()),
            (Some("close"), Some(u64::from(code))),
            "{event}"
        );
        event["reason"].as_str().unwrap_or_default().to_owned()
    }

    fn command(&mut self, command: Value) {
        let mut input = self.input.as_ref().expect("the client runs");
        writeln!(input, "{command}").and_then(|()| input.flush()).expect("the client takes commands");
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // At the end of its commands it ends by itself, and a browser with it.
        drop(self.input.take());
        let start = Instant::now();
        while self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            if start.elapsed() > self.patience {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
