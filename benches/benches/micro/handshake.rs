//! What a TLS handshake costs the server, in memory: full, resumed and hybrid, ECDSA and RSA, aws-lc-rs and ring.
//!
//! Only the server's part is timed. The client is always the same (aws-lc-rs).

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use criterion::Criterion;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, PKCS_RSA_SHA256, RsaKeySize,
};
use rustls::crypto::{CryptoProvider, aws_lc_rs, ring};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::version::TLS13;
use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, NamedGroup, RootCertStore, ServerConfig, ServerConnection,
};
use sealgate_keys::{CertificateEntry, CertificateStore, ClientTrust, ProviderChoice, TicketKeys, provider};

/// One kind of handshake.
struct Case {
    name: &'static str,
    provider: Arc<CryptoProvider>,
    group: NamedGroup,
    rsa: bool,
    resumed: bool,
}

pub(crate) fn measure(criterion: &mut Criterion) -> Result<()> {
    let ours = |group| provider(&ProviderChoice { groups: vec![group], tls13_only: true });
    let rings = Arc::new(CryptoProvider {
        cipher_suites: vec![ring::cipher_suite::TLS13_AES_256_GCM_SHA384],
        kx_groups: vec![ring::kx_group::X25519],
        ..ring::default_provider()
    });
    let (x25519, hybrid) = (NamedGroup::X25519, NamedGroup::X25519MLKEM768);
    let case = |name, provider: &Arc<CryptoProvider>, group, rsa, resumed| Case {
        name,
        provider: provider.clone(),
        group,
        rsa,
        resumed,
    };
    let (aws, aws_hybrid) = (ours(x25519), ours(hybrid));
    // Of the two, aws-lc-rs alone has the hybrid.
    let cases = [
        case("full-ecdsa-aws-lc-rs", &aws, x25519, false, false),
        case("full-ecdsa-ring", &rings, x25519, false, false),
        case("full-rsa-aws-lc-rs", &aws, x25519, true, false),
        case("full-rsa-ring", &rings, x25519, true, false),
        case("hybrid-ecdsa-aws-lc-rs", &aws_hybrid, hybrid, false, false),
        case("hybrid-rsa-aws-lc-rs", &aws_hybrid, hybrid, true, false),
        case("resumed-aws-lc-rs", &aws, x25519, false, true),
        case("resumed-ring", &rings, x25519, false, true),
        case("resumed-hybrid-aws-lc-rs", &aws_hybrid, hybrid, false, true),
    ];
    let mut group = criterion.benchmark_group("handshake");
    for case in cases {
        let pair = Pair::new(&case)?;
        // The first is never resumed.
        pair.shake(false)?;
        let mut failed = None;
        group.bench_function(case.name, |bencher| {
            bencher.iter_custom(|count| {
                let mut time = Duration::ZERO;
                for _ in 0..count {
                    match pair.shake(case.resumed) {
                        Ok(part) => time += part,
                        Err(error) => failed = Some(error),
                    }
                }
                time
            });
        });
        if let Some(error) = failed {
            return Err(error.context(case.name));
        }
    }
    group.finish();
    Ok(())
}

/// Both sides of one case.
struct Pair {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    name: ServerName<'static>,
    group: NamedGroup,
    keeps: bool,
}

impl Pair {
    fn new(case: &Case) -> Result<Self> {
        let (authority, entry) = certificate(case.rsa)?;
        let store = CertificateStore::build(vec![entry], &case.provider, SystemTime::now());
        let store = store.map_err(|faults| anyhow::anyhow!("{faults:?}"))?;
        let tickets = case.resumed.then(TicketKeys::new).transpose()?;
        let server = sealgate_keys::server_config(
            Arc::new(store),
            case.provider.clone(),
            &[&TLS13],
            tickets,
            &[b"http/1.1"],
            &ClientTrust::none(),
        )?;
        let group = aws_lc_rs::ALL_KX_GROUPS.iter().find(|group| group.name() == case.group);
        let theirs = CryptoProvider {
            cipher_suites: vec![aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384],
            kx_groups: vec![*group.context("a group")?],
            ..aws_lc_rs::default_provider()
        };
        let mut roots = RootCertStore::empty();
        roots.add(authority)?;
        let mut client = ClientConfig::builder_with_provider(Arc::new(theirs))
            .with_protocol_versions(&[&TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.alpn_protocols = vec![b"http/1.1".to_vec()];
        let name = ServerName::try_from("localhost")?;
        Ok(Self {
            client: Arc::new(client),
            server: Arc::new(server),
            name,
            group: case.group,
            keeps: case.resumed,
        })
    }

    /// One handshake, tickets included; gives the server's part of its time.
    fn shake(&self, resumed: bool) -> Result<Duration> {
        let mut time = Duration::ZERO;
        let mut client = ClientConnection::new(self.client.clone(), self.name.clone())?;
        let begun = Instant::now();
        let mut server = ServerConnection::new(self.server.clone())?;
        time += begun.elapsed();
        let mut wire = Vec::with_capacity(8192);
        while client.wants_write()
            || server.wants_write()
            || client.is_handshaking()
            || server.is_handshaking()
        {
            wire.clear();
            while client.wants_write() {
                client.write_tls(&mut wire)?;
            }
            let mut rest = wire.as_slice();
            let begun = Instant::now();
            while !rest.is_empty() {
                server.read_tls(&mut rest)?;
                server.process_new_packets()?;
            }
            let mut answer = Vec::with_capacity(8192);
            while server.wants_write() {
                server.write_tls(&mut answer)?;
            }
            time += begun.elapsed();
            let mut rest = answer.as_slice();
            while !rest.is_empty() {
                client.read_tls(&mut rest)?;
                client.process_new_packets()?;
            }
        }
        let expected = if resumed { HandshakeKind::Resumed } else { HandshakeKind::Full };
        ensure!(server.handshake_kind() == Some(expected), "not {expected:?}: {:?}", server.handshake_kind());
        let agreed = server.negotiated_key_exchange_group().map(|group| group.name());
        ensure!(agreed == Some(self.group), "not {:?}: {agreed:?}", self.group);
        ensure!(!self.keeps || client.tls13_tickets_received() > 0, "no ticket came");
        Ok(time)
    }
}

/// An authority and a certificate of it for localhost.
fn certificate(rsa: bool) -> Result<(CertificateDer<'static>, CertificateEntry)> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let key = match rsa {
        true => KeyPair::generate_rsa_for(&PKCS_RSA_SHA256, RsaKeySize::_2048)?,
        false => KeyPair::generate()?,
    };
    let certificate = CertificateParams::new(vec!["localhost".to_owned()])?.signed_by(&key, &authority)?;
    let entry = CertificateEntry {
        names: vec!["localhost".to_owned()],
        chain_pem: certificate.pem().into_bytes(),
        key_pem: key.serialize_pem().into_bytes().into(),
    };
    Ok((authority.der().clone(), entry))
}
