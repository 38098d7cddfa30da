//! Against rustls' buffered streams, with data cut in every way.

use proptest::prelude::*;
use rustls::{
    RootCertStore, ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    version::{TLS12, TLS13},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;

type Configs = (Arc<ServerConfig>, Arc<ClientConfig>);

fn configs(version: &'static rustls::SupportedProtocolVersion) -> Configs {
    configs_in_fragments(version, None)
}

/// The same, with records of `fragment` bytes at most: handshake messages then come in several.
fn configs_in_fragments(
    version: &'static rustls::SupportedProtocolVersion,
    fragment: Option<usize>,
) -> Configs {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
    let mut server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[version])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(cert.der().clone()).unwrap();
    let mut client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    // Tickets are handshake messages that come when the handshake is over.
    server.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().unwrap();
    (server.max_fragment_size, client.max_fragment_size) = (fragment, fragment);
    (Arc::new(server), Arc::new(client))
}

fn localhost() -> ServerName<'static> {
    ServerName::try_from("localhost").unwrap()
}

/// Our server and their client, over pipes that hold `capacity` bytes.
async fn served(
    (server, client): Configs,
    capacity: usize,
) -> (ServerStream<DuplexStream>, tokio_rustls::client::TlsStream<DuplexStream>) {
    let (near, far) = duplex(capacity);
    let connector = TlsConnector::from(client);
    let (ours, theirs) =
        tokio::join!(ServerStream::accept(server, near), connector.connect(localhost(), far));
    (ours.unwrap(), theirs.unwrap())
}

/// Sends `data` in `pieces` and ends.
async fn send(mut to: impl AsyncWrite + Unpin, data: &[u8], pieces: &[usize]) {
    let (mut rest, mut sizes) = (data, pieces.iter().cycle());
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
        to.write_all(piece).await.unwrap();
        rest = behind;
    }
    to.flush().await.unwrap();
    to.shutdown().await.unwrap();
}

/// Reads to the end in `pieces`.
async fn receive(mut from: impl AsyncRead + Unpin, pieces: &[usize]) -> Vec<u8> {
    let (mut data, mut sizes) = (Vec::new(), pieces.iter().cycle());
    loop {
        let mut piece = vec![0; *sizes.next().unwrap()];
        match from.read(&mut piece).await.unwrap() {
            0 => return data,
            len => data.extend_from_slice(&piece[..len]),
        }
    }
}

/// One side: handshake, then sends `data` and receives until the other has ended.
async fn side<T: AsyncRead + AsyncWrite + Unpin>(
    handshake: impl Future<Output = io::Result<T>>,
    data: &[u8],
    pieces: &[usize],
) -> Vec<u8> {
    let (read, write) = tokio::io::split(handshake.await.unwrap());
    tokio::join!(receive(read, pieces), send(write, data, pieces)).0
}

/// Sends `data` both ways between a side of ours and one of theirs. Each goes its own way from the first byte on: over
/// a narrow path the one may still be shaking hands when the other is done.
async fn both_ways(
    (server, client): Configs,
    as_server: bool,
    capacity: usize,
    data: &[u8],
    pieces: &[usize],
) {
    let (near, far) = duplex(capacity);
    let (at_ours, at_theirs) = if as_server {
        let theirs = TlsConnector::from(client);
        tokio::join!(
            side(ServerStream::accept(server, near), data, pieces),
            side(theirs.connect(localhost(), far), data, pieces)
        )
    } else {
        let theirs = TlsAcceptor::from(server);
        tokio::join!(
            side(ClientStream::connect(client, localhost(), near), data, pieces),
            side(theirs.accept(far), data, pieces)
        )
    };
    assert!(at_ours == data && at_theirs == data);
}

/// Handshake, then both directions; errors are fine.
async fn try_side<T: AsyncRead + AsyncWrite + Unpin>(
    handshake: impl Future<Output = io::Result<T>>,
    data: &[u8],
) -> io::Result<Vec<u8>> {
    let (mut read, mut write) = tokio::io::split(handshake.await?);
    // Not shut before it has received: rustls asserts, where debugging, that nothing wrong comes after our own end.
    let send = async {
        write.write_all(data).await?;
        write.flush().await
    };
    let receive = async {
        let mut came = vec![0; data.len()];
        read.read_exact(&mut came).await.map(|_| came)
    };
    let (sent, came) = tokio::join!(send, receive);
    sent.and(came)
}

/// Carries bytes on, one bit of them changed.
async fn forward(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    flip: Option<(usize, u8)>,
) {
    let (mut seen, mut buffer) = (0, [0; 500]);
    while let Ok(len @ 1..) = from.read(&mut buffer).await {
        if let Some((at, bit)) = flip
            && (seen..seen + len).contains(&at)
        {
            buffer[at - seen] ^= bit;
        }
        seen += len;
        if to.write_all(&buffer[..len]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

fn run<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn carries_everything_both_ways_however_it_is_cut(
        len in 0usize..200_000,
        capacity in prop_oneof![1usize..64, 1usize..40_000],
        pieces in prop::collection::vec(1usize..70_000, 1..6),
        tls13: bool,
        as_server: bool,
        fragment in prop_oneof![Just(None), (64usize..2000).prop_map(Some)],
    ) {
        // Tiny pipes are for tiny data: every byte is a wake-up.
        let len = len.min(capacity * 500);
        let data: Vec<u8> = (0..len).map(|at| ((at * 31) >> 3) as u8).collect();
        let configs = configs_in_fragments(if tls13 { &TLS13 } else { &TLS12 }, fragment);
        run(both_ways(configs, as_server, capacity, &data, &pieces));
    }

    #[test]
    fn a_bit_that_fell_over_on_the_way_is_noticed_and_no_panic(
        at in 0usize..4000,
        bit in 0u8..8,
        from_ours: bool,
        as_server: bool,
        tls13: bool,
        fragment in prop_oneof![Just(None), (64usize..2000).prop_map(Some)],
    ) {
        let (server, client) = configs_in_fragments(if tls13 { &TLS13 } else { &TLS12 }, fragment);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
        let data = [7; 2000];
        let talk = async {
            let ((near, middle), (other, far)) = (duplex(1000), duplex(1000));
            let (our_read, our_write) = tokio::io::split(middle);
            let (their_read, their_write) = tokio::io::split(other);
            let flip = |here: bool| here.then_some((at, 1 << bit));
            let wires = async {
                tokio::join!(
                    forward(our_read, their_write, flip(from_ours)),
                    forward(their_read, our_write, flip(!from_ours)),
                )
            };
            let sides = async {
                if as_server {
                    let theirs = TlsConnector::from(client);
                    tokio::join!(
                        try_side(ServerStream::accept(server, near), &data),
                        try_side(theirs.connect(localhost(), far), &data)
                    )
                } else {
                    let theirs = TlsAcceptor::from(server);
                    tokio::join!(
                        try_side(ClientStream::connect(client, localhost(), near), &data),
                        try_side(theirs.accept(far), &data)
                    )
                }
            };
            tokio::join!(sides, wires).0
        };
        // A length that grew makes both wait for what never comes.
        let outcome = runtime.unwrap().block_on(async {
            tokio::time::timeout(std::time::Duration::from_secs(5), talk).await
        });
        if let Ok((ours, theirs)) = outcome {
            for came in [ours, theirs].into_iter().flatten() {
                prop_assert!(came == data, "something else was let through");
            }
        }
    }

    #[test]
    fn rubbish_is_an_error_and_neither_a_panic_nor_kept(
        rubbish in prop::collection::vec(any::<u8>(), 0..4096),
        amid in any::<bool>(),
    ) {
        let configs = configs(&TLS13);
        run(async {
            if amid {
                let (mut ours, theirs) = served(configs, 64 * 1024).await;
                let (mut raw, _) = theirs.into_inner();
                raw.write_all(&rubbish).await.unwrap();
                drop(raw);
                let error = ours.read(&mut [0; 100]).await.unwrap_err();
                assert!(matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData));
                assert!(ours.plain.is_empty() && ours.incoming.len() <= rubbish.len());
                // Whatever is tried with it now, it stays an error or the end.
                assert!(ours.write_all(b"more").await.is_err() || error.kind() == io::ErrorKind::UnexpectedEof);
                let _ = ours.shutdown().await;
                assert_eq!(ours.read(&mut [0; 100]).await.unwrap_or_default(), 0);
            } else {
                let (near, mut far) = duplex(64 * 1024);
                far.write_all(&rubbish).await.unwrap();
                drop(far);
                assert!(ServerStream::accept(configs.0, near).await.is_err());
            }
        });
    }
}

#[test]
fn an_idle_stream_holds_no_buffer() {
    for version in [&TLS12, &TLS13] {
        run(async {
            let (mut ours, mut theirs) = served(configs(version), 64 * 1024).await;
            theirs.write_all(&[7; 30_000]).await.unwrap();
            let mut came = vec![0; 30_000];
            ours.read_exact(&mut came).await.unwrap();
            ours.write_all(&came).await.unwrap();
            ours.flush().await.unwrap();
            theirs.read_exact(&mut came).await.unwrap();
            let mut room = [0; 1];
            let idle = tokio::time::timeout(std::time::Duration::from_millis(1), ours.read(&mut room)).await;
            assert!(idle.is_err());
            let held =
                [ours.incoming.capacity(), ours.plain.bytes.capacity(), ours.outgoing.bytes.capacity()];
            assert_eq!(held, [0; 3]);
            assert!(size_of_val(&ours) <= size_of::<DuplexStream>() + 120, "{}", size_of_val(&ours));
        });
    }
}

#[test]
fn a_handshake_in_one_byte_pieces_and_one_cut_short() {
    run(async {
        both_ways(configs(&TLS13), true, 1, b"hello", &[1]).await;

        let (server, client) = configs(&TLS13);
        let (near, far) = duplex(4096);
        let mut connecting = Box::pin(TlsConnector::from(client).connect(localhost(), far));
        // Their hello is sent; then they are gone.
        assert!(std::future::poll_fn(|cx| Poll::Ready(connecting.as_mut().poll(cx).is_pending())).await);
        drop(connecting);
        let error = ServerStream::accept(server, near).await.err().unwrap();
        assert!(matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe), "{error}");
    });
}

#[test]
fn a_peer_that_refuses_us_and_one_that_we_refuse_hear_why() {
    run(async {
        // Their client does not trust our certificate: we read its alert.
        let (server, _) = configs(&TLS13);
        let (_, stranger) = configs(&TLS13);
        let (near, far) = duplex(64 * 1024);
        let connector = TlsConnector::from(stranger.clone());
        let (ours, theirs) =
            tokio::join!(ServerStream::accept(server.clone(), near), connector.connect(localhost(), far));
        assert!(theirs.is_err());
        assert_eq!(ours.err().unwrap().kind(), io::ErrorKind::InvalidData);

        // Our client does not trust theirs: they read ours.
        let (near, far) = duplex(64 * 1024);
        let acceptor = TlsAcceptor::from(server);
        let (ours, theirs) =
            tokio::join!(ClientStream::connect(stranger, localhost(), near), acceptor.accept(far));
        assert!(ours.is_err());
        let alert = theirs.err().unwrap().to_string();
        assert!(
            ["UnknownCA", "BadCertificate", "DecryptError"].iter().any(|known| alert.contains(known)),
            "{alert}"
        );
    });
}

#[test]
fn an_end_without_a_word_is_an_error_and_one_with_it_is_the_end() {
    run(async {
        let (mut ours, theirs) = served(configs(&TLS13), 4096).await;
        drop(theirs.into_inner());
        assert_eq!(ours.read(&mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);

        let (mut ours, mut theirs) = served(configs(&TLS13), 4096).await;
        theirs.shutdown().await.unwrap();
        assert_eq!(ours.read(&mut [0; 8]).await.unwrap(), 0);
        // Its half is closed, ours is not.
        ours.write_all(b"still here").await.unwrap();
        ours.flush().await.unwrap();
        let mut came = [0; 10];
        theirs.read_exact(&mut came).await.unwrap();
        assert_eq!(&came, b"still here");
    });
}

#[test]
fn new_traffic_keys_are_taken_and_answered() {
    run(async {
        let (mut ours, mut theirs) = served(configs(&TLS13), 4096).await;
        for round in 0u8..3 {
            theirs.get_mut().1.refresh_traffic_keys().unwrap();
            theirs.write_all(&[round; 4]).await.unwrap();
            let mut came = [0; 4];
            ours.read_exact(&mut came).await.unwrap();
            assert_eq!(came, [round; 4]);
            ours.write_all(&came).await.unwrap();
            ours.flush().await.unwrap();
            theirs.read_exact(&mut came).await.unwrap();
            assert_eq!(came, [round; 4]);
        }
    });
}

#[test]
fn a_reader_that_stops_holds_up_the_writer_and_memory_stays_bounded() {
    run(async {
        let (mut ours, _theirs) = served(configs(&TLS13), 1024).await;
        let data = vec![1; 1024 * 1024];
        let stuck = tokio::time::timeout(std::time::Duration::from_millis(5), ours.write_all(&data)).await;
        assert!(stuck.is_err());
        assert!(ours.outgoing.bytes.len() <= MOST_WRITE + 1024, "{}", ours.outgoing.bytes.len());
    });
}

/// The first flight of a client with these suites and groups, asking for `name`.
fn client_hello(
    suites: Vec<rustls::SupportedCipherSuite>,
    groups: &[NamedGroup],
    name: &str,
    alpn: &[&[u8]],
) -> Vec<u8> {
    let choice = sealgate_keys::ProviderChoice { groups: groups.to_vec(), tls13_only: false };
    let ours = Arc::unwrap_or_clone(sealgate_keys::provider(&choice));
    let provider = rustls::crypto::CryptoProvider { cipher_suites: suites, ..ours };
    let mut client = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    client.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut connection = rustls::ClientConnection::new(Arc::new(client), name).unwrap();
    let mut wire = Vec::new();
    connection.write_tls(&mut wire).unwrap();
    wire
}

proptest! {
    /// In whatever pieces it comes, a ClientHello is read as it is.
    #[test]
    fn what_a_client_says_first_is_read_in_any_pieces(
        order in Just((0..9).collect::<Vec<usize>>()).prop_shuffle(),
        groups in prop::sample::subsequence(sealgate_keys::GROUPS.to_vec(), 1..=4).prop_shuffle(),
        cuts in prop::collection::vec(1..400_usize, 1..8),
        validates in any::<bool>(),
        more in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let all = rustls::crypto::aws_lc_rs::ALL_CIPHER_SUITES;
        let suites: Vec<_> = order.iter().map(|at| all[*at]).collect();
        let chacha = sealgate_keys::is_chacha(suites[0].suite());
        let alpn: &[&[u8]] = if validates { &[ACME_TLS] } else { &[b"h2", ACME_TLS] };
        let hello = client_hello(suites, &groups, "Chat.Example", alpn);
        let mut wire = hello.clone();
        wire.extend(more);
        let mut reader = HelloReader::default();
        let mut end = 0;
        for cut in cuts.iter().cycle() {
            end = wire.len().min(end + cut);
            match reader.read(&wire[..end]).expect("a hello") {
                Some(read) => {
                    prop_assert!(end >= hello.len());
                    prop_assert_eq!(read.name, Some("chat.example".to_owned()));
                    prop_assert_eq!((read.wants_chacha, read.falls_back), (chacha, false));
                    prop_assert_eq!(read.validates, validates);
                    let known = |group: &NamedGroup| groups.contains(group);
                    let ours: Vec<_> = sealgate_keys::GROUPS.into_iter().filter(known).collect();
                    prop_assert_eq!(read.groups, ours);
                    break;
                }
                None => prop_assert!(end < hello.len()),
            }
        }
    }
}

#[test]
fn what_suites_say() {
    let wants_chacha = |suites: &[u16]| chacha_is_first(suites.iter().copied());
    let falls_back = |suites: &[u16]| is_fallback(suites.iter().copied());
    assert!(wants_chacha(&[0x1303]));
    assert!(wants_chacha(&[0x1a1a, 0xcca9, 0x1301]), "a number that means nothing comes first");
    assert!(!wants_chacha(&[0x1a1a, 0x1301, 0x1303]));
    assert!(falls_back(&[0xc02b, 0x5600]));
    assert!(!falls_back(&[0xc02b]));
    assert!(!falls_back(&[0x1301, 0x5600]) && !falls_back(&[0x5600, 0x1301]), "it has TLS 1.3 too");
    assert!(!wants_chacha(&[]) && !falls_back(&[]));
}

#[test]
fn a_client_gets_the_configuration_for_what_it_says() {
    run(async {
        let (server, _) = configs(&TLS13);
        for wanted in [true, false] {
            let (near, mut far) = duplex(64 * 1024);
            let mut all = rustls::crypto::aws_lc_rs::ALL_CIPHER_SUITES.to_vec();
            all.sort_by_key(|suite| sealgate_keys::is_chacha(suite.suite()) != wanted);
            let groups = [NamedGroup::secp384r1, NamedGroup::X25519];
            far.write_all(&client_hello(all, &groups, "localhost", &[])).await.unwrap();
            let mut asked = None;
            let choose = |hello: &Hello| {
                asked = Some(hello.clone());
                Ok(Some(server.clone()))
            };
            let accepting = ServerStream::accept_by(choose, near);
            // The client is silent from here on.
            let waited = tokio::time::timeout(std::time::Duration::from_millis(50), accepting).await;
            assert!(waited.is_err());
            let asked = asked.unwrap();
            assert_eq!(asked.wants_chacha, wanted);
            assert_eq!(asked.groups, [NamedGroup::X25519, NamedGroup::secp384r1]);
            // A ServerHello came: handshake, and its message of kind 2.
            let mut head = [0; 6];
            far.read_exact(&mut head).await.unwrap();
            assert_eq!((head[0], head[5]), (22, 2));
        }
    });
}
