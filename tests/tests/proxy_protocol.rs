//! Load balancers in front, which say who their clients are by the PROXY protocol: two that are not ours, and lies.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
use sealgate_tests::{
    ALL_VERSIONS, Bundle, DEADLINE, Gateway, Process, Signal, Upstream, client_config, curl, free_port, until,
};

/// Where the tests' load balancers are.
const PROXY: Ipv4Addr = Ipv4Addr::LOCALHOST;

fn bundle(upstream: &Upstream, more: &str) -> Bundle {
    Bundle::new(&format!(
        "[connections]\nproxy_protocol_from = [\"{PROXY}\"]\nhandshake_timeout = \"1s\"\n{more}\n\
         [[upstream]]\nname = \"pool\"\nendpoints = [\"{}\"]\n\n\
         [[route]]\nname = \"anyone\"\npath = \"/anyone\"\nmethods = [\"GET\"]\nupstream = \"pool\"\nauth = \"none\"\n",
        upstream.endpoint()
    ))
}

/// A TCP connection to the gateway from an address of this machine.
fn reach(from: Ipv4Addr, gateway: &Gateway) -> TcpStream {
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).expect("a socket");
    bind(&socket, &SocketAddr::from((from, 0))).expect("an address of this machine");
    connect(&socket, &gateway.address()).expect("the gateway listens");
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(DEADLINE)).expect("a deadline");
    stream.set_nodelay(true).expect("no delay");
    stream
}

/// What a client is answered that begins with `header`: the status, or nothing if the connection was ended.
fn ask(gateway: &Gateway, from: Ipv4Addr, header: &[u8]) -> Option<u16> {
    let mut stream = reach(from, gateway);
    let _ = stream.write_all(header);
    ask_over(gateway, stream)
}

fn ask_over(gateway: &Gateway, stream: TcpStream) -> Option<u16> {
    let config = client_config(gateway.ca(), &["http/1.1"], None, ALL_VERSIONS);
    let session =
        rustls::ClientConnection::new(config.into(), "localhost".try_into().expect("a name")).expect("TLS");
    let mut tls = rustls::StreamOwned::new(session, stream);
    let request = b"GET /anyone HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    tls.write_all(request).ok()?;
    let mut answer = Vec::new();
    let _ = tls.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).split(' ').nth(1)?.parse().ok()
}

fn line(client: &str) -> Vec<u8> {
    format!("PROXY TCP4 {client} 203.0.113.1 4711 443\r\n").into_bytes()
}

fn block(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    [b"\r\n\r\n\0\r\nQUIT\n", &[command, family][..], &(rest.len() as u16).to_be_bytes(), rest].concat()
}

fn refused(gateway: &Gateway, reason: &str) -> f64 {
    gateway.metrics().sum("sealgate_connections_refused_total", &[("reason", reason)])
}

#[test]
fn what_a_load_balancer_says_is_believed_and_what_others_say_is_not() {
    let upstream = Upstream::tcp();
    let bundle = bundle(&upstream, "");
    let gateway = Gateway::run(&bundle);
    let told = || upstream.last().header("x-forwarded-for").map(str::to_owned);

    let v4 = [198, 51, 100, 9, 203, 0, 113, 1, 0x12, 0x67, 1, 0xbb];
    let v6 =
        [&"2001:db8::9".parse::<std::net::Ipv6Addr>().expect("an address").octets()[..], &[0; 20]].concat();
    let mapped = [&Ipv4Addr::new(198, 51, 100, 9).to_ipv6_mapped().octets()[..], &[0; 20]].concat();
    for (header, client) in [
        (line("198.51.100.7"), "198.51.100.7"),
        (b"PROXY TCP6 2001:db8::7 2001:db8::1 4711 443\r\n".to_vec(), "2001:db8::7"),
        (block(0x21, 0x11, &v4), "198.51.100.9"),
        (block(0x21, 0x21, &v6), "2001:db8::9"),
        (block(0x21, 0x21, &mapped), "198.51.100.9"),
        (block(0x21, 0x11, &[&v4[..], &[4, 0, 200], &[0; 200]].concat()), "198.51.100.9"),
        // It asks for itself, or does not know.
        (b"PROXY UNKNOWN\r\n".to_vec(), "127.0.0.1"),
        (block(0x20, 0, &[]), "127.0.0.1"),
    ] {
        assert_eq!(ask(&gateway, PROXY, &header), Some(200), "{}", header.escape_ascii());
        assert_eq!(told().as_deref(), Some(client), "{}", header.escape_ascii());
    }

    // In pieces, however small.
    for header in [line("198.51.100.8"), block(0x21, 0x11, &v4)] {
        let mut stream = reach(PROXY, &gateway);
        for byte in header {
            stream.write_all(&[byte]).expect("the gateway listens");
        }
        assert_eq!(ask_over(&gateway, stream), Some(200));
    }

    // One that says nothing, or nonsense, is not let in as itself.
    let seen = upstream.count("/anyone");
    for header in [
        &b""[..],
        b"PROXY TCP4 198.51.100.7\r\n",
        b"PROXY TCP4 198.51.100.999 203.0.113.1 4711 443\r\n",
        &block(0x22, 0x11, &v4),
        &block(0x21, 0x11, &v4[..8]),
        &block(0x21, 0x11, &[0; 4000]),
        &[b"PROXY UNKNOWN ", &[b'x'; 200][..], b"\r\n"].concat(),
    ] {
        assert_eq!(ask(&gateway, PROXY, header), None, "{}", header.escape_ascii());
    }
    assert_eq!(refused(&gateway, "no-proxy-header"), 7.0);

    // And nobody else is asked: without a header they are who they are, with one they speak no TLS.
    let elsewhere = Ipv4Addr::new(127, 0, 0, 2);
    assert_eq!(ask(&gateway, elsewhere, b""), Some(200));
    assert_eq!(told().as_deref(), Some("127.0.0.2"));
    assert_eq!(ask(&gateway, elsewhere, &line("198.51.100.7")), None);
    assert_eq!(ask(&gateway, elsewhere, &block(0x21, 0x11, &v4)), None);
    assert_eq!(upstream.count("/anyone"), seen + 1);
}

#[test]
fn lists_and_limits_are_the_clients() {
    let upstream = Upstream::tcp();
    let bundle = bundle(&upstream, "max_per_address = 2\n[lists]\ndeny = [\"file:deny.txt\"]");
    bundle.write_file("deny.txt", "198.51.100.66\n");
    let gateway = Gateway::run(&bundle);

    assert_eq!(ask(&gateway, PROXY, &line("198.51.100.66")), None, "a denied client");
    assert_eq!(refused(&gateway, "address-refused"), 1.0);
    assert_eq!(ask(&gateway, PROXY, &line("198.51.100.67")), Some(200));

    // Two of one client; those of others come through the same load balancer and are not counted with them.
    let open = |client: &str| {
        let mut stream = reach(PROXY, &gateway);
        stream.write_all(&line(client)).expect("the gateway listens");
        stream
    };
    let _held: Vec<_> = (0..2).map(|_| open("198.51.100.1")).collect();
    let opened = || gateway.metrics().sum("sealgate_connections_open", &[]);
    until("both are open", DEADLINE, || (opened() >= 2.0).then_some(()));
    assert_eq!(ask(&gateway, PROXY, &line("198.51.100.1")), None, "a third one");
    assert_eq!(ask(&gateway, PROXY, &line("198.51.100.2")), Some(200), "another client");
}

#[test]
fn a_load_balancer_that_says_nothing_is_cut_and_does_not_outlive_a_drain() {
    let upstream = Upstream::tcp();
    let bundle = bundle(&upstream, "");
    let mut gateway = Gateway::run(&bundle);
    let begun = Instant::now();
    for said in [&b""[..], b"PROXY TCP4 198", &block(0x21, 0x11, &[0; 12])[..20]] {
        let mut stream = reach(PROXY, &gateway);
        stream.write_all(said).expect("the gateway listens");
        assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)), "it was answered");
    }
    assert!(begun.elapsed() >= Duration::from_secs(2), "each had its second");
    assert_eq!(refused(&gateway, "no-proxy-header"), 3.0);

    let _silent = reach(PROXY, &gateway);
    gateway.signal(Signal::TERM);
    assert!(gateway.wait(DEADLINE).success());
}

/// HAProxy, in both versions; and curl, which can speak as one.
#[test]
fn load_balancers_that_we_did_not_write_are_understood() {
    let upstream = Upstream::tcp();
    let bundle = bundle(&upstream, "");
    let gateway = Gateway::run(&bundle);
    let folder = bundle.folder();
    let (one, two) = (free_port(), free_port());
    let config = folder.join("haproxy.cfg");
    let target = gateway.address();
    let text = format!(
        "defaults\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n\
         listen one\n bind 127.0.0.1:{one}\n server gateway {target} send-proxy\n\
         listen two\n bind 127.0.0.1:{two}\n server gateway {target} send-proxy-v2 proxy-v2-options unique-id,crc32c\n"
    );
    std::fs::write(&config, text).expect("a file");
    let process =
        Process::start(Command::new("haproxy").arg("-db").arg("-f").arg(&config), folder, "haproxy");
    for port in [one, two] {
        until("HAProxy listens", DEADLINE, || TcpStream::connect((PROXY, port)).ok());
        let reply = curl(&format!("https://localhost:{port}/anyone"), gateway.ca())
            .args(["--resolve", &format!("localhost:{port}:127.0.0.1"), "--interface", "127.0.0.77"])
            .send();
        assert_eq!(reply.status, 200, "{}", process.stderr());
        assert_eq!(upstream.last().header("x-forwarded-for"), Some("127.0.0.77"));
    }
    let reply = gateway.curl("/anyone").args(["--haproxy-protocol"]).send();
    assert_eq!(reply.status, 200);
    assert_eq!(upstream.last().header("x-forwarded-for"), Some("127.0.0.1"));
    let reply = gateway.curl("/anyone").args(["--haproxy-protocol", "--interface", "127.0.0.78"]).try_send();
    assert!(reply.is_err(), "whoever is not named is not asked: {reply:?}");
}
