//! Requests by curl.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

/// A curl command line under construction.
pub struct Curl {
    command: Command,
}

/// Starts a request; certificates are checked against `ca`.
pub fn curl(url: &str, ca: &Path) -> Curl {
    let mut command = Command::new("curl");
    // `--path-as-is`: what a test writes is what is sent. No proxy and no ~/.curlrc get in between.
    command.args(["--disable", "--silent", "--show-error", "--include", "--path-as-is", "--noproxy", "*"]);
    command.args(["--max-time", "30", "--globoff", "--cacert"]).arg(ca).arg(url);
    command.stdin(Stdio::null());
    Curl { command }
}

impl Curl {
    /// Further arguments.
    pub fn args<S: AsRef<std::ffi::OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Curl {
        self.command.args(args);
        self
    }

    /// A header line, as it is.
    pub fn header(self, line: &str) -> Curl {
        self.args(["--header", line])
    }

    /// A bearer token.
    pub fn token(self, token: &str) -> Curl {
        self.header(&format!("Authorization: Bearer {token}"))
    }

    /// The method.
    pub fn method(self, method: &str) -> Curl {
        self.args(["--request", method])
    }

    /// HTTP/1.1 rather than what ALPN finds (HTTP/2).
    pub fn http1(self) -> Curl {
        self.args(["--http1.1"])
    }

    /// A JSON body, sent with POST.
    pub fn json(self, body: &str) -> Curl {
        self.header("Content-Type: application/json").args(["--data-binary", body])
    }

    /// A body and its type, sent with POST.
    pub fn body(self, content_type: &str, body: &str) -> Curl {
        self.header(&format!("Content-Type: {content_type}")).args(["--data-binary", body])
    }

    /// Starts it, to be waited for later with [`Curl::finish`].
    pub fn start(mut self) -> std::process::Child {
        self.command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("curl starts")
    }

    /// The answer to a started request.
    pub fn finish(child: std::process::Child) -> Result<Reply, String> {
        let output = child.wait_with_output().expect("curl ends");
        if output.status.success() {
            Ok(Reply::parse(&output.stdout))
        } else {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("curl exit {}: {}", output.status.code().unwrap_or(-1), said.trim()))
        }
    }

    /// Sends it; an error is curl's exit code and words.
    pub fn try_send(self) -> Result<Reply, String> {
        Curl::finish(self.start())
    }

    /// Sends it and panics when there is no answer.
    pub fn send(self) -> Reply {
        let shown = format!("{:?}", self.command);
        self.try_send().unwrap_or_else(|error| panic!("{error}\n{shown}"))
    }
}

/// A response.
#[derive(Clone, Debug)]
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// `HTTP/1.1` or `HTTP/2`.
    pub version: String,
    /// Header names in lower case, and values, in order.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: String,
}

impl Reply {
    /// Reads a response as curl's `--include` prints it: interim ones are passed over.
    pub(crate) fn parse(bytes: &[u8]) -> Reply {
        let mut rest = bytes;
        loop {
            let end = rest.windows(4).position(|four| four == b"\r\n\r\n").expect("a response head");
            let head = String::from_utf8_lossy(&rest[..end]).into_owned();
            rest = &rest[end + 4..];
            let mut lines = head.split("\r\n");
            let mut first = lines.next().expect("a status line").split(' ');
            let version = first.next().expect("a version").to_owned();
            let status: u16 = first.next().and_then(|code| code.parse().ok()).expect("a status");
            if (100..200).contains(&status) && status != 101 {
                continue;
            }
            let headers = lines
                .map(|line| line.split_once(':').expect("name: value"))
                .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
                .collect();
            return Reply { status, version, headers, body: String::from_utf8_lossy(rest).into_owned() };
        }
    }

    /// The value of a header; the first, if there are several.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }

    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Checks that it is a whole problem document (RFC 9457) with this status, and returns its `type`.
    #[track_caller]
    pub fn problem(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header("content-type"), Some("application/problem+json"), "{self:?}");
        let problem = self.json();
        assert_eq!(problem["status"], status, "{self:?}");
        for member in ["type", "title", "detail", "instance"] {
            assert!(problem[member].as_str().is_some_and(|text| !text.is_empty()), "no {member}: {self:?}");
        }
        let id = self.header("x-request-id").unwrap_or_else(|| panic!("no request id: {self:?}"));
        assert!(problem["instance"].as_str().is_some_and(|instance| instance.contains(id)), "{self:?}");
        problem["type"].as_str().expect("checked above").to_owned()
    }
}
