//! Which cryptography TLS may use. This is the only file that decides it.
//!
//! Two libraries share the work, each where it is the better one:
//!
//! | algorithm | from | why |
//! |---|---|---|
//! | TLS 1.2 and 1.3 as a whole: X25519MLKEM768, X25519, P-256, P-384; AES-GCM and ChaCha20-Poly1305 records; certificate signatures | aws-lc-rs | rustls offers the post-quantum hybrid through aws-lc-rs only, and one provider serves a whole configuration. Its P-256 and X25519 (s2n-bignum, with machine-checked proofs) sign and agree faster, which is most of what a handshake costs |
//! | ES256 signatures of our own tokens | aws-lc-rs | the same P-256 code; private keys are erased when freed |
//! | AES-256-GCM of tickets and data at rest, HKDF, HMAC, SHA-2, random bytes | ring | small, no global state, random bytes straight from the operating system |
//!
//! Whatever is not named below cannot be negotiated: no RSA key exchange, no CBC, no SHA-1, no finite-field
//! Diffie-Hellman (requirement T-2). All suites are ECDHE with AEAD, hence forward secret. There is no setting that
//! adds one; a policy can only leave some out.

use std::sync::Arc;

use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::crypto::{ActiveKeyExchange, CompletedKeyExchange, CryptoProvider, SupportedKxGroup};
use rustls::ffdhe_groups::FfdheGroup;
use rustls::{CipherSuite, Error, NamedGroup, ProtocolVersion, SupportedCipherSuite};

/// All key exchange groups that there are, in the order that is the default: the post-quantum hybrid first.
pub const GROUPS: [NamedGroup; 4] =
    [NamedGroup::X25519MLKEM768, NamedGroup::X25519, NamedGroup::secp256r1, NamedGroup::secp384r1];

/// TLS 1.3 (RFC 8446 §B.4), the most wanted first: the server's order counts. But a client without AES instructions puts
/// ChaCha20-Poly1305 first with good reason, and gets it: see [`chacha_first`].
const TLS13_SUITES: [SupportedCipherSuite; 3] = [
    cipher_suite::TLS13_AES_256_GCM_SHA384,
    cipher_suite::TLS13_AES_128_GCM_SHA256,
    cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
];

/// TLS 1.2: ECDHE with AEAD only (RFC 5289, RFC 7905), as RFC 9325 §4.2 recommends.
const TLS12_SUITES: [SupportedCipherSuite; 6] = [
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
    cipher_suite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    cipher_suite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256,
];

/// What a policy chooses of the cryptography above.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProviderChoice {
    /// Key exchange groups, the most wanted first.
    ///
    /// Possible are those of [`GROUPS`], which is also the default. Others, and repetitions, are left out; with none left, [`server_config`](crate::server_config) fails.
    pub groups: Vec<NamedGroup>,
    /// Leaves out all suites of TLS 1.2. Default: false.
    pub tls13_only: bool,
}

impl Default for ProviderChoice {
    fn default() -> Self {
        Self { groups: GROUPS.to_vec(), tls13_only: false }
    }
}

/// The cryptography for a TLS configuration.
pub fn provider(choice: &ProviderChoice) -> Arc<CryptoProvider> {
    let mut cipher_suites = TLS13_SUITES.to_vec();
    if !choice.tls13_only {
        cipher_suites.extend(TLS12_SUITES);
    }
    let mut kx_groups: Vec<&'static dyn SupportedKxGroup> = Vec::new();
    for group in choice.groups.iter().filter_map(|name| key_exchange(*name)) {
        if kx_groups.iter().all(|known| known.name() != group.name()) {
            kx_groups.push(group);
        }
    }
    Arc::new(CryptoProvider { cipher_suites, kx_groups, ..aws_lc_rs::default_provider() })
}

/// The same cryptography for a client that wants ChaCha20-Poly1305 most.
pub fn chacha_first(provider: &CryptoProvider) -> Arc<CryptoProvider> {
    let mut ours = provider.clone();
    // Stable: the rest keeps its order.
    ours.cipher_suites.sort_by_key(|suite| !is_chacha(suite.suite()));
    Arc::new(ours)
}

/// The same cryptography for a client with which `wanted` is to be agreed on: rustls alone would go by the client's order of groups,
/// not by ours.
pub(crate) fn agreeing_on(provider: &CryptoProvider, wanted: NamedGroup) -> Arc<CryptoProvider> {
    let mut ours = provider.clone();
    let (wanted, others): (Vec<_>, _) = ours.kx_groups.into_iter().partition(|group| group.name() == wanted);
    ours.kx_groups = wanted;
    if ours.kx_groups.iter().any(|group| !group.usable_for_version(ProtocolVersion::TLSv1_2)) {
        // The hybrid. A client that offers it and agrees on TLS 1.2 after all has the others.
        let known =
            others.iter().filter_map(|group| TLS12_GROUPS.iter().find(|it| it.name() == group.name()));
        ours.kx_groups.extend(known.map(|group| group as &'static dyn SupportedKxGroup));
    }
    Arc::new(ours)
}

/// A group that is not there for TLS 1.3.
#[derive(Debug)]
struct Tls12Group(&'static dyn SupportedKxGroup);

static TLS12_GROUPS: [Tls12Group; 3] =
    [Tls12Group(kx_group::X25519), Tls12Group(kx_group::SECP256R1), Tls12Group(kx_group::SECP384R1)];

impl SupportedKxGroup for Tls12Group {
    fn start(&self) -> Result<Box<dyn ActiveKeyExchange>, Error> {
        self.0.start()
    }

    fn start_and_complete(&self, theirs: &[u8]) -> Result<CompletedKeyExchange, Error> {
        self.0.start_and_complete(theirs)
    }

    fn ffdhe_group(&self) -> Option<FfdheGroup<'static>> {
        self.0.ffdhe_group()
    }

    fn name(&self) -> NamedGroup {
        self.0.name()
    }

    fn fips(&self) -> bool {
        self.0.fips()
    }

    fn usable_for_version(&self, version: ProtocolVersion) -> bool {
        version == ProtocolVersion::TLSv1_2 && self.0.usable_for_version(version)
    }
}

/// Whether a suite is one of ChaCha20-Poly1305.
pub fn is_chacha(suite: CipherSuite) -> bool {
    matches!(
        suite,
        CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
            | CipherSuite::TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256
            | CipherSuite::TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256
    )
}

/// Makes the default [`provider`] that of the process, for libraries that ask for one (Pingora installs ring's
/// if none is set). Call it first in `main`; the first call in a process wins, later ones do nothing.
pub fn install_default_provider() {
    let ours = Arc::unwrap_or_clone(provider(&ProviderChoice::default()));
    // The error is the provider that came first, which stays.
    let _ = ours.install_default();
}

fn key_exchange(name: NamedGroup) -> Option<&'static dyn SupportedKxGroup> {
    match name {
        NamedGroup::X25519MLKEM768 => Some(kx_group::X25519MLKEM768),
        NamedGroup::X25519 => Some(kx_group::X25519),
        NamedGroup::secp256r1 => Some(kx_group::SECP256R1),
        NamedGroup::secp384r1 => Some(kx_group::SECP384R1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn groups(provider: &CryptoProvider) -> Vec<NamedGroup> {
        provider.kx_groups.iter().map(|group| group.name()).collect()
    }

    #[test]
    fn every_suite_is_ecdhe_with_aead_t_2() {
        for suite in &provider(&ProviderChoice::default()).cipher_suites {
            let name = format!("{:?}", suite.suite());
            assert!(name.starts_with("TLS13_") || name.starts_with("TLS_ECDHE_"), "{name}");
            assert!(name.contains("_GCM_") || name.contains("_CHACHA20_POLY1305_"), "{name}");
        }
    }

    #[test]
    fn tls_1_3_only_leaves_no_other_suite() {
        let provider = provider(&ProviderChoice { tls13_only: true, ..ProviderChoice::default() });
        assert_eq!(provider.cipher_suites.len(), 3);
        assert!(provider.cipher_suites.iter().all(|suite| suite.tls13().is_some()));
    }

    #[test]
    fn the_hybrid_comes_first_by_default() {
        let default = ProviderChoice::default();
        assert_eq!(groups(&provider(&default)), default.groups);
        assert_eq!(default.groups[0], NamedGroup::X25519MLKEM768);
    }

    #[test]
    fn groups_keep_the_order_of_the_policy_and_weak_ones_are_left_out() {
        let wanted =
            vec![NamedGroup::secp384r1, NamedGroup::FFDHE2048, NamedGroup::X25519, NamedGroup::secp384r1];
        let provider = provider(&ProviderChoice { groups: wanted, tls13_only: false });
        assert_eq!(groups(&provider), [NamedGroup::secp384r1, NamedGroup::X25519]);
    }

    #[test]
    fn chacha_can_come_first_and_changes_nothing_else() {
        let ours = provider(&ProviderChoice::default());
        let theirs = chacha_first(&ours);
        assert!(!is_chacha(ours.cipher_suites[0].suite()));
        assert!(theirs.cipher_suites[..3].iter().all(|suite| is_chacha(suite.suite())));
        let mut rest = ours.cipher_suites.clone();
        rest.retain(|suite| !is_chacha(suite.suite()));
        assert_eq!(theirs.cipher_suites[3..], rest);
        assert_eq!(groups(&ours), groups(&theirs));
    }

    #[test]
    fn installs_once_and_bears_a_second_call() {
        install_default_provider();
        install_default_provider();
        let installed = CryptoProvider::get_default().unwrap();
        assert_eq!(groups(installed), ProviderChoice::default().groups);
    }
}
