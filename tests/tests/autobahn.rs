//! Autobahn|Testsuite as fuzzing client: over WSS through the gateway to the included echo backend, which passes it
//! alone. With compression off, and with compression terminated by the gateway.
//!
//! `./test` installs it (tests/clients/autobahn). The compression cases send a thousand messages each; here they send
//! [`MESSAGES`], or as many as the environment variable `SEALGATE_AUTOBAHN_MESSAGES` says.

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, copy};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sealgate_tests::{Bundle, DEADLINE, Gateway, Process, binary, until};
use serde_json::{Value, json};

/// Limits wide enough for 9.*, which send up to 16 MiB, in frames of 64 bytes too, and for 2.*, which ping at will.
const RULES: &str = r#"
[[upstream]]
name = "echo"
endpoints = ["unix:${state}/echo/backend.sock"]

[[websocket]]
name = "off"
path = "/v1/echo"
upstream = "echo"
auth = "none"
inspect = "none"
max_frame = "16MiB"
max_message = "16MiB"
max_fragments = 100_000
control_per_second = 10_000

[[websocket]]
name = "terminated"
path = "/v1/echo-checked"
upstream = "echo"
auth = "none"
inspect = "none"
max_frame = "16MiB"
max_message = "16MiB"
max_fragments = 100_000
control_per_second = 10_000
compression = "terminate"
"#;

/// Cases that have no better outcome than INFORMATIONAL: what follows a close frame, and close codes that nobody has.
const INFORMATIONAL: [&str; 3] = ["7.1.6", "7.13.1", "7.13.2"];

/// Cases that may be NON-STRICT, which is within RFC 6455: behind a good message comes a frame that breaks the rules,
/// and the suite would like to see the echo of the message before the close. Whoever finds the fault closes at once; the
/// good message was delivered to the backend, whose echo comes too late.
const ECHO_CUT_OFF: [&str; 10] =
    ["3.2", "3.3", "3.4", "4.1.3", "4.1.4", "4.1.5", "4.2.3", "4.2.4", "4.2.5", "5.15"];

/// What the backend alone may be NON-STRICT in besides: its library looks at text frame by frame, the suite would like
/// it byte by byte (as the gateway does).
const LATE_UTF8: [&str; 2] = ["6.4.3", "6.4.4"];

/// Messages of each compression case, unless the environment says otherwise.
const MESSAGES: u32 = 50;

/// For one run of the suite, on a machine that does something else besides.
const RUN: Duration = Duration::from_secs(900);

/// All cases but those of compression, and how many they are.
const CASES: (&[&str], usize) = (&["1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "9.*", "10.*"], 301);

struct Bed {
    gateway: Gateway,
    bundle: Bundle,
    _echo: Process,
}

impl Bed {
    fn start() -> Bed {
        let bundle = Bundle::new(RULES);
        let state = bundle.state().join("echo");
        let mut command = Command::new(binary("backend-echo"));
        let mut echo = Process::start(command.arg("--state").arg(&state), bundle.folder(), "backend-echo");
        until("the backend listens", DEADLINE, || {
            assert!(echo.ended().is_none(), "{}", echo.stderr());
            UnixStream::connect(state.join("backend.sock")).ok()
        });
        Bed { gateway: Gateway::run(&bundle), bundle, _echo: echo }
    }

    /// Runs cases against `url`; gives behavior and behavior on closing, by case.
    fn run(&self, url: &str, cases: &[&str]) -> BTreeMap<String, (String, String)> {
        let clients = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
        let installed = clients.join("autobahn");
        assert!(installed.join("installed.txt").exists(), "no Autobahn|Testsuite; ./test installs it");
        let report = self.bundle.folder().join("report");
        let spec = self.bundle.folder().join("spec.json");
        // Its own deadlines suit a quiet machine.
        let options = json!({
            "openHandshakeTimeout": 30, "closeHandshakeTimeout": 30, "serverConnectionDropTimeout": 30,
        });
        let text = json!({
            "outdir": report, "options": options, "servers": [{ "agent": "it", "url": url }],
            "cases": cases, "exclude-cases": [], "exclude-agent-cases": {},
        });
        fs::write(&spec, text.to_string()).expect("a file");
        let messages = std::env::var("SEALGATE_AUTOBAHN_MESSAGES").unwrap_or_else(|_| MESSAGES.to_string());
        let mut command = Command::new(installed.join("python"));
        command.env("PYTHONUSERBASE", &installed).env("PYTHONDONTWRITEBYTECODE", "1");
        command.arg(clients.join("fuzzing_client.py")).arg(&spec).arg(&messages);
        let mut suite = Process::start(&mut command, self.bundle.folder(), "wstest");
        let status = suite.wait(RUN);
        let index = fs::read_to_string(report.join("index.json"));
        let index: Value = serde_json::from_str(&index.unwrap_or_default())
            .unwrap_or_else(|error| panic!("{status}, no report ({error}): {}", suite.stdout()));
        let word = |case: &Value, key: &str| case[key].as_str().unwrap_or_default().to_owned();
        let cases = index["it"].as_object().expect("cases");
        let outcome = |case| (word(case, "behavior"), word(case, "behaviorClose"));
        cases.iter().map(|(id, case)| (id.clone(), outcome(case))).collect()
    }

    fn secure(&self, path: &str) -> String {
        format!("wss://127.0.0.1:{}{path}", self.gateway.port())
    }
}

/// Every case went as it should, those of compression too if `compressed`; `lax` ones may be NON-STRICT.
#[track_caller]
fn judge(outcomes: &BTreeMap<String, (String, String)>, count: usize, compressed: bool, lax: &[&str]) {
    assert_eq!(outcomes.len(), count, "{:?}", outcomes.keys());
    let is_fine = |id: &str, behavior: &str, closing: &str| {
        if (id.starts_with("12.") || id.starts_with("13.")) && !compressed {
            return behavior == "UNIMPLEMENTED" && closing == "OK";
        }
        match behavior {
            "OK" => closing == "OK",
            "NON-STRICT" => closing == "OK" && lax.contains(&id),
            "INFORMATIONAL" => INFORMATIONAL.contains(&id),
            _ => false,
        }
    };
    let wrong: Vec<_> =
        outcomes.iter().filter(|(id, (behavior, closing))| !is_fine(id, behavior, closing)).collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn a1_the_backend_alone_passes() {
    let bed = Bed::start();
    let address = forward(bed.bundle.state().join("echo/backend.sock"));
    judge(
        &bed.run(&format!("ws://{address}/v1/echo"), CASES.0),
        CASES.1,
        false,
        &[&ECHO_CUT_OFF[..], &LATE_UTF8].concat(),
    );
}

#[test]
fn a1_through_the_gateway_without_compression() {
    let bed = Bed::start();
    judge(&bed.run(&bed.secure("/v1/echo"), CASES.0), CASES.1, false, &ECHO_CUT_OFF);
}

#[test]
fn a1_through_the_gateway_an_offer_of_compression_is_declined() {
    let bed = Bed::start();
    judge(&bed.run(&bed.secure("/v1/echo"), &["12.*", "13.*"]), 216, false, &[]);
}

#[test]
fn a1_through_the_gateway_where_compression_is_terminated() {
    let bed = Bed::start();
    judge(&bed.run(&bed.secure("/v1/echo-checked"), CASES.0), CASES.1, true, &ECHO_CUT_OFF);
}

#[test]
fn a1_through_the_gateway_compressed() {
    let bed = Bed::start();
    judge(&bed.run(&bed.secure("/v1/echo-checked"), &["12.*"]), 90, true, &[]);
}

#[test]
fn a1_through_the_gateway_compressed_with_every_offer() {
    let bed = Bed::start();
    judge(&bed.run(&bed.secure("/v1/echo-checked"), &["13.*"]), 126, true, &[]);
}

/// A TCP listener before a unix socket, for a client that knows TCP only.
fn forward(socket: PathBuf) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(client), Ok(backend)) = (client, UnixStream::connect(&socket)) else { return };
            let (Ok(from), Ok(to)) = (client.try_clone(), backend.try_clone()) else { return };
            std::thread::spawn(move || upwards(from, to));
            std::thread::spawn(move || downwards(backend, client));
        }
    });
    address
}

fn upwards(mut from: TcpStream, mut to: UnixStream) {
    end(copy(&mut from, &mut to));
    let _ = to.shutdown(Shutdown::Write);
}

fn downwards(mut from: UnixStream, mut to: TcpStream) {
    end(copy(&mut from, &mut to));
    let _ = to.shutdown(Shutdown::Write);
}

fn end(copied: std::io::Result<u64>) {
    let expected = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset, ErrorKind::NotConnected];
    assert!(copied.is_ok() || copied.is_err_and(|error| expected.contains(&error.kind())));
}
