//! The TLS configuration of a listener.

use std::sync::Arc;

use rustls::compress::CompressionCache;
use rustls::crypto::CryptoProvider;
use rustls::server::NoServerSessionStorage;
use rustls::{NamedGroup, ServerConfig, SupportedProtocolVersion};

use crate::provider::agreeing_on;
use crate::{CertificateStore, ClientTrust, TicketKeys, chacha_first};

/// Tickets after a full TLS 1.3 handshake: two, so that a browser's second connection resumes as well.
const TICKETS_PER_HANDSHAKE: usize = 2;

/// The TLS configurations of a listener, one for each kind of client. They differ in what is taken of that which a client offers, and in
/// nothing else; a ticket of one opens under all.
pub struct ServerConfigs {
    /// The most wanted group first.
    by_group: Vec<(NamedGroup, BySuite)>,
    /// For those that offer none of these: rustls tells them so.
    others: BySuite,
}

struct BySuite {
    chacha_first: Arc<ServerConfig>,
    aes_first: Arc<ServerConfig>,
}

impl ServerConfigs {
    /// As `build` makes them of cryptography; `provider` has all of it that there is.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn new<E>(
        provider: &Arc<CryptoProvider>,
        build: impl Fn(Arc<CryptoProvider>) -> Result<ServerConfig, E>,
    ) -> Result<Self, E> {
        let of = |provider: Arc<CryptoProvider>| {
            let chacha_first = Arc::new(build(chacha_first(&provider))?);
            Ok(BySuite { chacha_first, aes_first: Arc::new(build(provider)?) })
        };
        let names = provider.kx_groups.iter().map(|group| group.name());
        let by_group = names.map(|name| Ok((name, of(agreeing_on(provider, name))?)));
        Ok(Self { by_group: by_group.collect::<Result<_, E>>()?, others: of(provider.clone())? })
    }

    /// That for a client that offers `groups`, whatever their order: the most wanted of them is taken, which the client is asked for if
    /// it has sent a key for others only (HelloRetryRequest, RFC 8446 §4.1.4).
    pub fn of(&self, groups: &[NamedGroup], wants_chacha: bool) -> Arc<ServerConfig> {
        let wanted = self.by_group.iter().find(|(group, _)| groups.contains(group));
        let by_suite = wanted.map_or(&self.others, |(_, by_suite)| by_suite);
        if wants_chacha { by_suite.chacha_first.clone() } else { by_suite.aes_first.clone() }
    }
}

/// A TLS configuration of a listener.
///
/// - **0-RTT is off**: early data can be replayed (RFC 8446 §8).
/// - **TLS 1.3 resumes** by stateless tickets if `tickets` are given, always with a fresh key exchange.
/// - **TLS 1.2 never resumes.** A ticket key shared by its sessions would undo their forward secrecy. A store of
///   sessions by id would keep their master secrets in memory long after the connections, would have to be
///   shared by all cores, and could be filled by strangers. The few clients left on 1.2 pay a full handshake instead.
/// - **Resumption skips no change** of which client certificates are good: tickets open under the `client` only that
///   they were sealed under, and under any other lead to a full handshake.
/// - **The server's order of suites counts**, which is that of `provider`; see [`chacha_first`](crate::chacha_first). That of groups counts
///   through [`ServerConfigs`] alone.
/// - **Nothing is cached per connection**, so that an idle one stays small.
///
/// `versions` is any of [`rustls::version::TLS12`] and [`rustls::version::TLS13`]; older ones do not exist in rustls.
/// One configuration serves both, because only then does a TLS 1.2 answer carry the downgrade sentinel (RFC 8446 §4.1.3).
/// `alpn` lists protocols, the most wanted first; a client that shares none is refused (RFC 7301 §3.2).
///
/// # Errors
/// `provider` has no suite or no key exchange group for one of `versions`.
pub fn server_config(
    store: Arc<CertificateStore>,
    provider: Arc<CryptoProvider>,
    versions: &[&'static SupportedProtocolVersion],
    tickets: Option<Arc<TicketKeys>>,
    alpn: &[&[u8]],
    client: &ClientTrust,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)?
        .with_client_cert_verifier(client.verifier())
        .with_cert_resolver(store);
    config.alpn_protocols = alpn.iter().map(|protocol| protocol.to_vec()).collect();
    config.ignore_client_order = true;
    config.max_early_data_size = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    if let Some(tickets) = tickets {
        config.ticketer = tickets.bound_to(*client.fingerprint());
        config.send_tls13_tickets = TICKETS_PER_HANDSHAKE;
        // Lets a client ask for fewer (RFC 9149), never for more.
        config.max_tls13_tickets = TICKETS_PER_HANDSHAKE;
    }
    config.cert_compression_cache = Arc::new(CompressionCache::Disabled);
    Ok(config)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use rustls::crypto::aws_lc_rs::cipher_suite;
    use rustls::sign::SingleCertAndKey;
    use rustls::version::{TLS12, TLS13};
    use rustls::{
        ClientConfig, Error, HandshakeKind, NamedGroup, PeerIncompatible, ProtocolVersion, ServerConfig,
    };

    use super::*;
    use crate::testing::{Authority, Clock, ECDSA, RSA, any_provider, handshake};
    use crate::{ClientDemand, ProviderChoice, chacha_first, provider};

    const HOUR: u64 = 60 * 60;
    const BOTH: &[&SupportedProtocolVersion] = &[&TLS13, &TLS12];
    const ALPN: &[&[u8]] = &[b"h2", b"http/1.1"];

    struct Setting {
        authority: Authority,
        store: Arc<CertificateStore>,
        clock: Arc<Clock>,
        tickets: Arc<TicketKeys>,
    }

    impl Setting {
        fn new() -> Self {
            let authority = Authority::new();
            let entries = vec![
                authority.entry(&["chat.example"], ECDSA),
                authority.entry(&["chat.example"], RSA),
                authority.entry(&["other.example"], ECDSA),
            ];
            let store = CertificateStore::build(entries, &any_provider(), SystemTime::now()).unwrap();
            let clock = Clock::new();
            let tickets = TicketKeys::with_clock(Duration::from_secs(6 * HOUR), clock.clone()).unwrap();
            Self { authority, store: Arc::new(store), clock, tickets }
        }

        fn server(&self) -> Arc<ServerConfig> {
            self.server_with(BOTH, Some(&self.tickets))
        }

        fn server_with(
            &self,
            versions: &[&'static SupportedProtocolVersion],
            tickets: Option<&Arc<TicketKeys>>,
        ) -> Arc<ServerConfig> {
            let store = Arc::clone(&self.store);
            Arc::new(
                server_config(store, any_provider(), versions, tickets.cloned(), ALPN, &ClientTrust::none())
                    .unwrap(),
            )
        }

        fn client(&self, versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
            Arc::new(self.authority.client(any_provider(), versions))
        }
    }

    #[test]
    fn tls_1_3_resumes_with_a_fresh_key_exchange() {
        let setting = Setting::new();
        let (client, server) = (setting.client(BOTH), setting.server());
        let first = handshake(&client, &server, "chat.example").unwrap();
        assert_eq!((first.version(), first.kind()), (ProtocolVersion::TLSv1_3, HandshakeKind::Full));
        assert_eq!(first.client.tls13_tickets_received(), 2);

        let second = handshake(&client, &server, "chat.example").unwrap();
        assert!(second.resumed());
        assert!(second.server.negotiated_key_exchange_group().is_some());
    }

    #[test]
    fn tls_1_2_gets_an_empty_ticket_and_does_not_resume() {
        let setting = Setting::new();
        let (client, server) = (setting.client(&[&TLS12]), setting.server());
        for _ in 0..2 {
            let done = handshake(&client, &server, "chat.example").unwrap();
            assert_eq!((done.version(), done.kind()), (ProtocolVersion::TLSv1_2, HandshakeKind::Full));
            // NewSessionTicket (RFC 5077 §3.3) goes in the clear: type 4, 6 bytes, lifetime hint, no ticket.
            let lifetime = (6 * HOUR as u32).to_be_bytes();
            let empty = [&[4, 0, 0, 6], lifetime.as_slice(), &[0, 0]].concat();
            assert!(done.from_server.windows(empty.len()).any(|window| window == empty));
            // ServerHello: type, length (3), version (2), random (32), then the length of the session id.
            assert_eq!(done.from_server[5 + 4 + 2 + 32], 0, "no session id to resume by");
        }
    }

    #[test]
    fn a_tls_1_2_answer_carries_the_downgrade_sentinel() {
        let setting = Setting::new();
        let done = handshake(&setting.client(&[&TLS12]), &setting.server(), "chat.example").unwrap();
        let random = &done.from_server[5 + 4 + 2..][..32];
        assert_eq!(&random[24..], b"DOWNGRD\x01"); // RFC 8446 §4.1.3
    }

    #[test]
    fn without_ticket_keys_nothing_resumes() {
        let setting = Setting::new();
        let server = setting.server_with(BOTH, None);
        for version in [&TLS13, &TLS12] {
            let client = setting.client(&[version]);
            for _ in 0..2 {
                let done = handshake(&client, &server, "chat.example").unwrap();
                assert!(!done.resumed());
                assert_eq!(done.client.tls13_tickets_received(), 0);
            }
        }
    }

    #[test]
    fn tickets_survive_a_rotation_and_a_reload_but_not_their_lifetime_k_4() {
        let setting = Setting::new();
        let client = setting.client(BOTH);
        let connect = || handshake(&client, &setting.server(), "chat.example").unwrap();
        assert!(!connect().resumed());
        setting.clock.advance(5 * HOUR);
        assert!(connect().resumed(), "sealed by the current key");
        setting.clock.advance(5 * HOUR);
        assert!(connect().resumed(), "sealed by the previous key, now rotated");
        setting.clock.advance(7 * HOUR);
        assert!(!connect().resumed(), "older than a period");
        assert!(connect().resumed());
    }

    #[test]
    fn foreign_tickets_lead_to_a_full_handshake() {
        let setting = Setting::new();
        let client = setting.client(BOTH);
        handshake(&client, &setting.server(), "chat.example").unwrap();
        let stranger = TicketKeys::new().unwrap();
        let other = setting.server_with(BOTH, Some(&stranger));
        assert!(!handshake(&client, &other, "chat.example").unwrap().resumed());
    }

    #[test]
    fn early_data_is_never_offered() {
        let setting = Setting::new();
        let mut client = setting.authority.client(any_provider(), &[&TLS13]);
        client.enable_early_data = true;
        let (client, server) = (Arc::new(client), setting.server());
        handshake(&client, &server, "chat.example").unwrap();
        let mut resumed = handshake(&client, &server, "chat.example").unwrap();
        assert!(resumed.resumed());
        assert!(!resumed.client.is_early_data_accepted());
        assert!(resumed.server.early_data().is_none());
    }

    #[test]
    fn the_hybrid_is_negotiated_by_those_who_offer_it() {
        let setting = Setting::new();
        let done = handshake(&setting.client(BOTH), &setting.server(), "chat.example").unwrap();
        let group = done.server.negotiated_key_exchange_group().unwrap().name();
        assert_eq!(group, NamedGroup::X25519MLKEM768);

        for group in [NamedGroup::X25519, NamedGroup::secp256r1, NamedGroup::secp384r1] {
            let only = provider(&ProviderChoice { groups: vec![group], tls13_only: false });
            for version in [&TLS13, &TLS12] {
                let client = Arc::new(setting.authority.client(only.clone(), &[version]));
                let done = handshake(&client, &setting.server(), "chat.example").unwrap();
                assert_eq!(done.server.negotiated_key_exchange_group().unwrap().name(), group);
            }
        }
    }

    #[test]
    fn a_group_left_out_by_the_policy_is_refused() {
        let setting = Setting::new();
        let only = |group| provider(&ProviderChoice { groups: vec![group], tls13_only: false });
        let server = server_config(
            setting.store.clone(),
            only(NamedGroup::X25519),
            BOTH,
            None,
            ALPN,
            &ClientTrust::none(),
        )
        .unwrap();
        let client = Arc::new(setting.authority.client(only(NamedGroup::secp384r1), BOTH));
        let refused = handshake(&client, &Arc::new(server), "chat.example").unwrap_err();
        assert_eq!(refused, Error::PeerIncompatible(PeerIncompatible::NoKxGroupsInCommon));
    }

    #[test]
    fn tls_1_3_only_refuses_tls_1_2_t_2() {
        let setting = Setting::new();
        let modern = provider(&ProviderChoice { tls13_only: true, ..ProviderChoice::default() });
        let server =
            server_config(setting.store.clone(), modern.clone(), &[&TLS13], None, ALPN, &ClientTrust::none())
                .unwrap();
        let server = Arc::new(server);
        assert!(handshake(&setting.client(BOTH), &server, "chat.example").is_ok());
        let refused = handshake(&setting.client(&[&TLS12]), &server, "chat.example").unwrap_err();
        assert!(matches!(refused, Error::PeerIncompatible(_)), "{refused}");

        // Versions and suites that do not fit are an error when the policy is loaded, not at the handshake.
        assert!(
            server_config(setting.store.clone(), modern, &[&TLS12], None, ALPN, &ClientTrust::none())
                .is_err()
        );
        let none = provider(&ProviderChoice { groups: vec![NamedGroup::FFDHE2048], tls13_only: false });
        assert!(server_config(setting.store.clone(), none, BOTH, None, ALPN, &ClientTrust::none()).is_err());
    }

    #[test]
    fn the_servers_order_of_suites_counts_and_chacha_comes_to_whom_it_is_for() {
        use rustls::CipherSuite::{TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256};
        let setting = Setting::new();
        let agreed = |client: Vec<_>, ours: Arc<CryptoProvider>| {
            let mut theirs = Arc::unwrap_or_clone(any_provider());
            theirs.cipher_suites = client;
            let client = Arc::new(setting.authority.client(Arc::new(theirs), BOTH));
            let store = setting.store.clone();
            let server = server_config(store, ours, BOTH, None, ALPN, &ClientTrust::none()).unwrap();
            let done = handshake(&client, &Arc::new(server), "chat.example").unwrap();
            done.server.negotiated_cipher_suite().unwrap().suite()
        };
        let (aes, chacha) =
            (cipher_suite::TLS13_AES_256_GCM_SHA384, cipher_suite::TLS13_CHACHA20_POLY1305_SHA256);
        let aes_128 = cipher_suite::TLS13_AES_128_GCM_SHA256;
        assert_eq!(agreed(vec![aes_128, chacha, aes], any_provider()), TLS13_AES_256_GCM_SHA384);
        assert_eq!(agreed(vec![chacha, aes], any_provider()), TLS13_AES_256_GCM_SHA384);
        let first = chacha_first(&any_provider());
        assert_eq!(agreed(vec![chacha, aes], first.clone()), TLS13_CHACHA20_POLY1305_SHA256);
        assert_eq!(agreed(vec![aes], first), TLS13_AES_256_GCM_SHA384);
    }

    #[test]
    fn the_servers_order_of_groups_counts_in_both_versions() {
        use rustls::NamedGroup::{X25519, X25519MLKEM768, secp256r1, secp384r1};
        let setting = Setting::new();
        let agreed = |offered: &[NamedGroup], ours: &[NamedGroup], versions| {
            let theirs = provider(&ProviderChoice { groups: offered.to_vec(), tls13_only: false });
            let client = Arc::new(setting.authority.client(theirs, versions));
            let ours = provider(&ProviderChoice { groups: ours.to_vec(), tls13_only: false });
            let configs = ServerConfigs::new(&ours, |provider| {
                server_config(setting.store.clone(), provider, BOTH, None, ALPN, &ClientTrust::none())
            });
            let server = configs.unwrap().of(offered, false);
            let done = handshake(&client, &server, "chat.example").ok()?;
            Some((done.server.negotiated_key_exchange_group()?.name(), done.kind()))
        };
        const TLS_13: &[&SupportedProtocolVersion] = &[&TLS13];
        const TLS_12: &[&SupportedProtocolVersion] = &[&TLS12];
        let (all, full, retried) =
            (&crate::GROUPS, HandshakeKind::Full, HandshakeKind::FullWithHelloRetryRequest);
        assert_eq!(agreed(&[X25519MLKEM768, X25519], all, TLS_13), Some((X25519MLKEM768, full)));
        assert_eq!(agreed(&[X25519, X25519MLKEM768], all, TLS_13), Some((X25519MLKEM768, retried)));
        assert_eq!(agreed(&[secp384r1, secp256r1], all, TLS_13), Some((secp256r1, retried)));
        assert_eq!(agreed(&[secp384r1], all, TLS_13), Some((secp384r1, full)));
        assert_eq!(agreed(&[X25519, secp384r1], &[secp384r1, X25519], TLS_13), Some((secp384r1, retried)));
        assert_eq!(agreed(&[secp256r1], &[secp384r1, X25519], TLS_13), None);

        assert_eq!(agreed(&[secp384r1, X25519], all, TLS_12), Some((X25519, full)));
        assert_eq!(agreed(&[secp256r1, secp384r1], &[secp384r1, secp256r1], TLS_12), Some((secp384r1, full)));
        // Of those that offer the hybrid, some agree on TLS 1.2 all the same.
        assert_eq!(agreed(&[X25519MLKEM768, secp256r1], all, TLS_12), Some((secp256r1, full)));
        assert_eq!(agreed(&[X25519MLKEM768, secp256r1], &[X25519MLKEM768, X25519], TLS_12), None);
    }

    /// Whatever the two connections of a client offer.
    #[test]
    fn a_ticket_of_one_configuration_opens_under_all() {
        let setting = Setting::new();
        let configs = ServerConfigs::new(&any_provider(), |provider| {
            let (store, tickets) = (setting.store.clone(), Some(setting.tickets.clone()));
            server_config(store, provider, BOTH, tickets, ALPN, &ClientTrust::none())
        });
        let configs = configs.unwrap();
        let client = setting.client(BOTH);
        let first = handshake(&client, &configs.of(&[NamedGroup::X25519], false), "chat.example").unwrap();
        assert!(!first.resumed());
        for groups in [&crate::GROUPS[..], &[NamedGroup::secp384r1], &[]] {
            let next = handshake(&client, &configs.of(groups, false), "chat.example").unwrap();
            assert!(next.resumed(), "{groups:?}");
        }
    }

    #[test]
    fn alpn_takes_the_most_wanted_and_refuses_strangers() {
        let setting = Setting::new();
        let connect = |offered: &[&[u8]]| {
            let mut client = setting.authority.client(any_provider(), BOTH);
            client.alpn_protocols = offered.iter().map(|protocol| protocol.to_vec()).collect();
            let done = handshake(&Arc::new(client), &setting.server(), "chat.example")?;
            Ok::<_, Error>(done.server.alpn_protocol().map(<[u8]>::to_vec))
        };
        assert_eq!(connect(&[b"http/1.1", b"h2"]), Ok(Some(b"h2".to_vec())));
        assert_eq!(connect(&[b"http/1.1"]), Ok(Some(b"http/1.1".to_vec())));
        assert_eq!(connect(&[]), Ok(None));
        assert_eq!(connect(&[b"smtp"]), Err(Error::NoApplicationProtocol));
    }

    #[test]
    fn the_certificate_fits_the_name_and_the_clients_signatures() {
        let setting = Setting::new();
        let server = setting.server();
        let ecdsa = handshake(&setting.client(BOTH), &server, "chat.example").unwrap();
        let other = handshake(&setting.client(BOTH), &server, "other.example").unwrap();
        assert_ne!(ecdsa.certificate(), other.certificate());

        let mut old = Arc::unwrap_or_clone(any_provider());
        old.cipher_suites = vec![cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256];
        let old = Arc::new(setting.authority.client(Arc::new(old), &[&TLS12]));
        let rsa = handshake(&old, &server, "chat.example").unwrap();
        assert_ne!(rsa.certificate(), ecdsa.certificate());

        // This name has no RSA certificate, and the third is not served at all.
        assert!(handshake(&old, &server, "other.example").is_err());
        let client = setting.client(BOTH);
        assert!(handshake(&client, &server, "third.example").is_err());
    }

    /// A changed client-certificate setting leads to a full handshake; an equal one resumes.
    #[test]
    fn tickets_open_under_the_client_trust_they_were_sealed_under_only() {
        let setting = Setting::new();
        let (ours, other) = (Authority::new(), Authority::new());
        let (leaf, key) = ours.client_pair("bot.example");
        let mut client = setting.authority.client(any_provider(), BOTH);
        client.client_auth_cert_resolver =
            Arc::new(SingleCertAndKey::from(rustls::sign::CertifiedKey::new(vec![leaf.clone()], key)));
        let client = Arc::new(client);
        let now = SystemTime::now();
        let trust = |demand, authorities: &str, lists: &[Vec<u8>]| {
            ClientTrust::build(demand, authorities.as_bytes(), lists, &any_provider(), now).unwrap()
        };
        let connect = |trust: &ClientTrust| {
            let (store, tickets) = (Arc::clone(&setting.store), Arc::clone(&setting.tickets));
            let server = server_config(store, any_provider(), BOTH, Some(tickets), ALPN, trust).unwrap();
            handshake(&client, &Arc::new(server), "chat.example")
        };
        let request = trust(ClientDemand::Request, &ours.pem(), &[]);
        let first = connect(&request).unwrap();
        assert!(!first.resumed());
        assert_eq!(first.server.peer_certificates().unwrap()[0], leaf);
        let again = connect(&trust(ClientDemand::Request, &ours.pem(), &[])).unwrap();
        assert!(again.resumed());
        assert_eq!(again.server.peer_certificates().unwrap()[0], leaf, "carried in the ticket");

        let changed = [
            trust(ClientDemand::Require, &ours.pem(), &[]),
            trust(ClientDemand::Request, &(ours.pem() + &other.pem()), &[]),
            trust(ClientDemand::Request, &ours.pem(), &[ours.revoke(&[], now)]),
            ClientTrust::none(),
        ];
        for changed in &changed {
            connect(&request).unwrap();
            assert!(connect(&request).unwrap().resumed());
            assert!(!connect(changed).unwrap().resumed(), "{changed:?}");
        }
        // What the new setting does not take is refused, with a ticket of the old one in hand.
        connect(&request).unwrap();
        let revoked = trust(ClientDemand::Request, &ours.pem(), &[ours.revoke(&[&leaf], now)]);
        let refused = connect(&revoked).unwrap_err();
        assert_eq!(refused, Error::InvalidCertificate(rustls::CertificateError::Revoked));
        connect(&request).unwrap();
        assert!(connect(&trust(ClientDemand::Request, &other.pem(), &[])).is_err());
    }

    #[test]
    fn without_a_certificate_there_is_no_handshake_where_one_is_required() {
        let setting = Setting::new();
        let ours = Authority::new();
        for version in [&TLS13, &TLS12] {
            for (demand, passes) in [(ClientDemand::Request, true), (ClientDemand::Require, false)] {
                let trust = ClientTrust::build(
                    demand,
                    ours.pem().as_bytes(),
                    &[[0_u8; 0]; 0],
                    &any_provider(),
                    SystemTime::now(),
                );
                let store = Arc::clone(&setting.store);
                let server = server_config(store, any_provider(), BOTH, None, ALPN, &trust.unwrap()).unwrap();
                let done = handshake(&setting.client(&[version]), &Arc::new(server), "chat.example");
                assert_eq!(done.is_ok(), passes, "{version:?} {demand:?}");
                if let Err(error) = done {
                    assert_eq!(error, Error::NoCertificatesPresented);
                }
            }
        }
    }
}
