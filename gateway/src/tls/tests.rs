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
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let rcgen::CertifiedKey { cert, signing_key } =
        rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(signing_key.serialize_der()));
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[version])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![cert.der().clone()], key)
        .unwrap();
    let mut roots = RootCertStore::empty();
    roots.add(cert.der().clone()).unwrap();
    let client = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
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
    ) {
        // Tiny pipes are for tiny data: every byte is a wake-up.
        let len = len.min(capacity * 500);
        let data: Vec<u8> = (0..len).map(|at| ((at * 31) >> 3) as u8).collect();
        let configs = configs(if tls13 { &TLS13 } else { &TLS12 });
        run(both_ways(configs, as_server, capacity, &data, &pieces));
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
