//! The backend believes identity headers: so nobody but the gateway may reach it.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use sealgate_tests::{Bundle, DEADLINE, Gateway, Pki, Process, binary, curl, free_port, until};

#[test]
fn in_dev_the_backend_listens_on_a_private_unix_socket_alone() {
    let mut gateway = Gateway::dev();
    let state = gateway.policy().parent().expect("the state folder").to_owned();
    let sockets = sockets_below(&state);
    assert!(sockets.len() >= 2, "the backend's and the control socket: {sockets:?}");
    for path in &sockets {
        let mode = fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600, "{}", path.display());
    }
    let backend = gateway.process().descendants();
    assert!(!backend.is_empty());
    for id in backend {
        assert_eq!(listening_ports(id), 0, "process {id} listens on TCP");
    }
    let own = gateway.process().id();
    assert!(listening_ports(own) > 0, "the check itself finds listeners");
}

fn sockets_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder").flatten() {
        let kind = entry.file_type().expect("a kind");
        if kind.is_dir() {
            found.extend(sockets_below(&entry.path()));
        } else if kind.is_socket() {
            found.push(entry.path());
        }
    }
    found
}

/// How many TCP sockets in state LISTEN a process holds.
fn listening_ports(id: u32) -> usize {
    let held: BTreeSet<String> = fs::read_dir(format!("/proc/{id}/fd"))
        .expect("its descriptors")
        .flatten()
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .filter_map(|link| Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    ["tcp", "tcp6"]
        .iter()
        .filter_map(|table| fs::read_to_string(format!("/proc/{id}/net/{table}")).ok())
        .flat_map(|table| table.lines().map(str::to_owned).collect::<Vec<_>>())
        .filter(|line| {
            let columns: Vec<&str> = line.split_whitespace().collect();
            columns.get(3) == Some(&"0A") && columns.get(9).is_some_and(|inode| held.contains(*inode))
        })
        .count()
}

#[test]
fn over_tcp_only_the_gateways_certificate_and_name_are_let_in() {
    let folder = tempfile::tempdir().unwrap();
    let pki = Pki::new(&folder.path().join("pki"));
    pki.issue("backend", &["backend.internal"]);
    pki.issue("gateway", &["gateway.internal"]);
    pki.issue("intern", &["intern.internal"]);
    let stranger = Pki::new(&folder.path().join("stranger"));
    stranger.issue("gateway", &["gateway.internal"]);
    let port = free_port();

    let mut command = Command::new(binary("backend-echo"));
    command.arg("--state").arg(folder.path().join("state")).arg("--development");
    command.arg("--listen").arg(format!("tls:127.0.0.1:{port}"));
    command.arg("--cert").arg(pki.path("backend.pem")).arg("--key").arg(pki.path("backend.key"));
    command.arg("--client-ca").arg(pki.ca()).args(["--client-name", "gateway.internal"]);
    let _backend = Process::start(&mut command, folder.path(), "backend");
    until("the backend listens", DEADLINE, || std::net::TcpStream::connect(("127.0.0.1", port)).ok());

    let url = format!("https://backend.internal:{port}/healthz");
    let resolve = format!("backend.internal:{port}:127.0.0.1");
    let ask = |certificate: Option<(&Pki, &str)>| {
        let request = curl(&url, &pki.ca()).args(["--resolve", &resolve]).header("X-Sealgate-Subject: root");
        let request = match certificate {
            Some((pki, name)) => request
                .args([Path::new("--cert"), &pki.path(&format!("{name}.pem"))])
                .args([Path::new("--key"), &pki.path(&format!("{name}.key"))]),
            None => request,
        };
        request.try_send()
    };
    let allowed = ask(Some((&pki, "gateway"))).expect("the gateway's own certificate");
    assert_eq!(allowed.status, 200, "{allowed:?}");
    for (what, certificate) in [
        ("no certificate", None),
        ("another name of the same authority", Some((&pki, "intern"))),
        ("the right name of another authority", Some((&stranger, "gateway"))),
    ] {
        let refused = ask(certificate);
        assert!(refused.is_err(), "{what}: {refused:?}");
    }
    let plain = curl(&format!("http://127.0.0.1:{port}/healthz"), &pki.ca()).try_send();
    assert!(!plain.as_ref().is_ok_and(|reply| reply.status == 200), "{plain:?}");

    // Through the gateway, whose policy names certificate and authority, it works; with another's it does not.
    let rules = |ca: &Path, name: &str, server: &str| {
        let files = pki.path("").display().to_string();
        format!(
            "[[upstream]]\nname = \"secure\"\nendpoints = [\"tls:127.0.0.1:{port}\"]\n\
             tls = {{ ca = \"file:{}\", server_name = \"{server}\", client_certificate = \"file:{files}{name}.pem\", \
             client_key = \"file:{files}{name}.key\" }}\n\n\
             [[route]]\nname = \"health\"\npath = \"/healthz\"\nmethods = [\"GET\"]\nupstream = \"secure\"\nauth = \"none\"\n",
            ca.display()
        )
    };
    let bundle = Bundle::new(&rules(&pki.ca(), "gateway", "backend.internal"));
    let gateway = Gateway::run(&bundle);
    let reply = gateway.curl("/healthz").send();
    assert_eq!(reply.status, 200, "{reply:?}");
    for (what, rules) in [
        ("another client name", rules(&pki.ca(), "intern", "backend.internal")),
        ("an authority that did not sign the backend", rules(&stranger.ca(), "gateway", "backend.internal")),
        ("a name that the backend does not have", rules(&pki.ca(), "gateway", "other.internal")),
    ] {
        bundle.write(&rules);
        let (reloaded, said) = gateway.reload();
        assert!(reloaded, "{what}: {said}");
        let reply = gateway.curl("/healthz").send();
        assert!(matches!(reply.status, 502 | 503), "{what}: {reply:?}");
    }
}

#[test]
fn plain_tcp_and_half_a_configuration_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [
        &["--listen", "tcp:127.0.0.1:0"][..],
        &["--listen", "127.0.0.1:0"],
        &["--listen", "tls:127.0.0.1:0"],
        &["--listen", "tls:127.0.0.1:0", "--cert", "/dev/null", "--key", "/dev/null"],
    ] {
        let mut command = Command::new(binary("backend-echo"));
        command.arg("--state").arg(folder.path().join("state")).args(arguments);
        let mut process = Process::start(&mut command, folder.path(), "backend");
        let status = process.wait(DEADLINE);
        assert!(matches!(status.code(), Some(1 | 2)), "{arguments:?}: {status} {}", process.stderr());
        assert!(!process.stderr().contains("panicked"), "{}", process.stderr());
    }
}
