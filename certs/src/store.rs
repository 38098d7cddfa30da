//! Server certificates: checked whole when loaded, chosen by SNI and signature scheme at each handshake.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{Error, InconsistentKeys, SignatureAlgorithm, SignatureScheme};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
use x509_parser::public_key::PublicKey;
use zeroize::Zeroizing;

/// Shortest RSA modulus accepted, in bits (NIST SP 800-57 part 1, requirement K-1).
const MIN_RSA_BITS: usize = 2048;

/// A certificate chain with its private key, as it stands in the policy, not yet checked.
#[derive(Clone)]
pub struct CertificateEntry {
    /// DNS names it serves, such as `chat.example` or `*.chat.example` (one label, RFC 9525 §6.3); IP addresses are
    /// allowed, and checked, but cannot be asked for by SNI. Empty: it is a default, for clients whose name no other
    /// entry serves.
    pub names: Vec<String>,
    /// PEM, the server's own certificate first, its issuers after it.
    pub chain_pem: Vec<u8>,
    /// PEM: PKCS#8, PKCS#1 or SEC1.
    pub key_pem: Zeroizing<Vec<u8>>,
}

impl fmt::Debug for CertificateEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateEntry").field("names", &self.names).finish_non_exhaustive()
    }
}

/// Why an entry cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("certificate for {names}: {fault}")]
pub struct CertificateError {
    /// The entry's position among those given, from 0.
    pub entry: usize,
    /// The entry's names, or `default`.
    pub names: String,
    /// What is wrong with it.
    pub fault: CertificateFault,
}

/// What is wrong with a certificate, its key or its names.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateFault {
    /// Not PEM, or a part of the chain is no X.509 certificate.
    #[error("the chain is unreadable: {0}")]
    ChainUnreadable(String),
    /// PEM, perhaps, but without a certificate in it.
    #[error("the chain holds no certificate")]
    ChainEmpty,
    /// Not PEM, or of no kind of key that TLS may use here (RSA of 2048 bits or more, P-256, P-384, P-521, Ed25519).
    /// Deliberately without detail: the detail could hold parts of the key.
    #[error("the private key is unreadable or of a kind that is not supported")]
    KeyUnreadable,
    /// The key is another one's, or the chain does not begin with the server's own certificate.
    #[error("the private key does not match the first certificate of the chain")]
    KeyMismatch,
    /// An RSA key shorter than 2048 bits.
    #[error("the RSA key has {bits} bits; at least {MIN_RSA_BITS} are needed")]
    KeyTooShort {
        /// Its length in bits.
        bits: usize,
    },
    /// A certificate of the chain is past its time.
    #[error("{subject} expired on {at}")]
    Expired {
        /// Its subject, as in the certificate.
        subject: String,
        /// Its end.
        at: String,
    },
    /// A certificate of the chain is not valid yet; or the clock is wrong.
    #[error("{subject} is not valid before {at}")]
    NotYetValid {
        /// Its subject, as in the certificate.
        subject: String,
        /// Its beginning.
        at: String,
    },
    /// The certificate was not issued for a name that the entry should serve.
    #[error("the certificate does not cover {name}; it covers {covers}")]
    NameMissing {
        /// The name in the entry.
        name: String,
        /// The certificate's own names.
        covers: String,
    },
    /// The entry names something that is neither a DNS name (in its ASCII form, without a final dot), nor `*.` and
    /// one, nor an IP address.
    #[error("{name} is not a DNS name")]
    NameInvalid {
        /// The name in the entry.
        name: String,
    },
    /// Another entry serves the name with a key of the same kind, so this one would never be chosen.
    #[error("{name} has another certificate with the same kind of key")]
    Duplicate {
        /// The name, or `default`.
        name: String,
    },
}

/// The certificates of a listener.
///
/// Chosen by the client's SNI: a name that stands in an entry, else a wildcard that covers it, else a default (an
/// entry without names). With no default, an unknown name is refused, but a client that sends none (it connected to
/// an address) gets the first entry's. Of several for one name, such as ECDSA beside RSA, the client gets the
/// first whose signatures it understands, the cheaper kind first: Ed25519 and ECDSA before RSA.
pub struct CertificateStore {
    exact: HashMap<String, Vec<Arc<CertifiedKey>>>,
    /// By the name without its first label: `*.chat.example` stands under `chat.example`.
    wildcard: HashMap<String, Vec<Arc<CertifiedKey>>>,
    default: Vec<Arc<CertifiedKey>>,
    nameless: Vec<Arc<CertifiedKey>>,
    entries: Vec<CertificateInfo>,
}

/// What an operator is shown of a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateInfo {
    /// The names that it is served for, or `default`.
    pub names: String,
    /// Its subject, as in the certificate.
    pub subject: String,
    /// Its issuer, as in the certificate.
    pub issuer: String,
    /// Serial number in lower-case hexadecimal.
    pub serial: String,
    /// Kind of its key: `ECDSA`, `Ed25519` or `RSA`.
    pub key: &'static str,
    /// When it becomes valid, in seconds since 1970.
    pub not_before: u64,
    /// When it expires, in seconds since 1970.
    pub expires_at: u64,
}

impl CertificateStore {
    /// Checks all entries, as of `now`.
    ///
    /// # Errors
    /// Every fault of every entry. Nothing is to be swapped in then.
    pub fn build(
        entries: Vec<CertificateEntry>,
        provider: &CryptoProvider,
        now: SystemTime,
    ) -> Result<Self, Vec<CertificateError>> {
        let now = unix_seconds(now);
        let mut store = Self {
            exact: HashMap::new(),
            wildcard: HashMap::new(),
            default: Vec::new(),
            nameless: Vec::new(),
            entries: Vec::new(),
        };
        let mut errors = Vec::new();
        for (position, entry) in entries.into_iter().enumerate() {
            let names = if entry.names.is_empty() { "default".to_owned() } else { entry.names.join(", ") };
            let faults = match Checked::new(&entry, provider, now) {
                Ok(checked) => store.insert(&entry.names, &names, checked),
                Err(faults) => faults,
            };
            errors.extend(faults.into_iter().map(|fault| CertificateError {
                entry: position,
                names: names.clone(),
                fault,
            }));
        }
        if !errors.is_empty() {
            return Err(errors);
        }
        Ok(store)
    }

    /// The servers' own certificates, in the order of the entries.
    pub fn entries(&self) -> &[CertificateInfo] {
        &self.entries
    }

    /// Whether an entry without names serves whoever asks for an unknown one.
    pub fn has_default(&self) -> bool {
        !self.default.is_empty()
    }

    /// Whether an entry names this, itself or by a wildcard. `name` is lower case, without a final dot.
    pub fn names(&self, name: &str) -> bool {
        self.named(name).is_some()
    }

    /// Whether a client that asks for `host` gets a certificate that is for it. `host` is lower case; an IPv6 address stands
    /// without brackets.
    pub fn covers(&self, host: &str) -> bool {
        let Ok(wanted) = ServerName::try_from(host) else { return false };
        let candidates = self.named(host).unwrap_or(&self.default);
        let covered = |key: &Arc<CertifiedKey>| {
            let leaf = key.cert.first().and_then(|leaf| ParsedCertificate::try_from(leaf).ok());
            leaf.is_some_and(|leaf| verify_server_name(&leaf, &wanted).is_ok())
        };
        !candidates.is_empty() && candidates.iter().all(covered)
    }

    fn insert(&mut self, names: &[String], label: &str, checked: Checked) -> Vec<CertificateFault> {
        let Checked { key, info } = checked;
        let mut faults = Vec::new();
        let mut place = |slot: &mut Vec<Arc<CertifiedKey>>, name: &str| {
            if slot.iter().any(|other| other.key.algorithm() == key.key.algorithm()) {
                faults.push(CertificateFault::Duplicate { name: name.to_owned() });
                return;
            }
            slot.push(Arc::clone(&key));
            slot.sort_by_key(|key| rank(key.key.algorithm()));
        };
        if names.is_empty() {
            place(&mut self.default, "default");
        }
        for name in names {
            let lower = name.to_ascii_lowercase();
            match lower.strip_prefix("*.") {
                Some(parent) => place(self.wildcard.entry(parent.to_owned()).or_default(), name),
                None => place(self.exact.entry(lower).or_default(), name),
            }
        }
        if self.entries.is_empty() {
            self.nameless.push(key);
        }
        self.entries.push(CertificateInfo { names: label.to_owned(), ..info });
        faults
    }

    /// `name` is lower case, without a final dot, as rustls gives it.
    fn select(&self, name: Option<&str>, schemes: &[SignatureScheme]) -> Option<&Arc<CertifiedKey>> {
        let candidates = match (name.and_then(|name| self.named(name)), name) {
            (Some(candidates), _) => candidates,
            (None, None) if self.default.is_empty() => &self.nameless,
            (None, _) => &self.default,
        };
        candidates.iter().find(|candidate| candidate.key.choose_scheme(schemes).is_some())
    }

    fn named(&self, name: &str) -> Option<&Vec<Arc<CertifiedKey>>> {
        self.exact.get(name).or_else(|| self.wildcard.get(name.split_once('.')?.1))
    }
}

impl ResolvesServerCert for CertificateStore {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        // rustls has already taken out the schemes that none of the client's cipher suites can use.
        self.select(hello.server_name(), hello.signature_schemes()).cloned()
    }
}

impl fmt::Debug for CertificateStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateStore").field("entries", &self.entries).finish_non_exhaustive()
    }
}

/// An entry's chain and key after all checks.
struct Checked {
    key: Arc<CertifiedKey>,
    info: CertificateInfo,
}

impl Checked {
    fn new(
        entry: &CertificateEntry,
        provider: &CryptoProvider,
        now: u64,
    ) -> Result<Self, Vec<CertificateFault>> {
        let chain = read_chain(&entry.chain_pem).map_err(|fault| vec![fault])?;
        let parsed = parse_chain(&chain).map_err(|fault| vec![fault])?;
        let Some(leaf) = parsed.first() else {
            return Err(vec![CertificateFault::ChainEmpty]);
        };

        // From here on each check stands for itself, so that an operator learns of all faults at once.
        let mut faults: Vec<_> =
            parsed.iter().filter_map(|certificate| check_time(certificate, now)).collect();
        faults.extend(check_key_length(leaf));
        faults.extend(entry.names.iter().filter_map(|name| check_name(&chain, leaf, name)));
        let seconds = |time: x509_parser::time::ASN1Time| u64::try_from(time.timestamp()).unwrap_or(0);
        let mut info = CertificateInfo {
            names: String::new(),
            subject: leaf.subject().to_string(),
            issuer: leaf.issuer().to_string(),
            serial: leaf.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
            key: "",
            not_before: seconds(leaf.validity().not_before),
            expires_at: seconds(leaf.validity().not_after),
        };
        match certified_key(chain.clone(), &entry.key_pem, provider) {
            Ok(key) if faults.is_empty() => {
                info.key = kind(key.key.algorithm());
                Ok(Self { key: Arc::new(key), info })
            }
            Ok(_) => Err(faults),
            Err(fault) => {
                faults.push(fault);
                Err(faults)
            }
        }
    }
}

fn read_chain(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertificateFault> {
    CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| CertificateFault::ChainUnreadable(error.to_string()))
}

fn parse_chain<'a>(chain: &'a [CertificateDer<'_>]) -> Result<Vec<X509Certificate<'a>>, CertificateFault> {
    let parse = |der: &'a CertificateDer<'_>| match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(CertificateFault::ChainUnreadable("bytes after a certificate".to_owned())),
        Err(error) => Err(CertificateFault::ChainUnreadable(error.to_string())),
    };
    chain.iter().map(parse).collect()
}

fn check_time(certificate: &X509Certificate<'_>, now: u64) -> Option<CertificateFault> {
    let validity = certificate.validity();
    let now = i64::try_from(now).unwrap_or(i64::MAX);
    if now > validity.not_after.timestamp() {
        return Some(CertificateFault::Expired {
            subject: certificate.subject().to_string(),
            at: validity.not_after.to_string(),
        });
    }
    if now < validity.not_before.timestamp() {
        return Some(CertificateFault::NotYetValid {
            subject: certificate.subject().to_string(),
            at: validity.not_before.to_string(),
        });
    }
    None
}

fn check_key_length(leaf: &X509Certificate<'_>) -> Option<CertificateFault> {
    match leaf.public_key().parsed() {
        Ok(PublicKey::RSA(key)) if key.key_size() < MIN_RSA_BITS => {
            Some(CertificateFault::KeyTooShort { bits: key.key_size() })
        }
        _ => None,
    }
}

fn check_name(
    chain: &[CertificateDer<'_>],
    leaf: &X509Certificate<'_>,
    name: &str,
) -> Option<CertificateFault> {
    let invalid = || Some(CertificateFault::NameInvalid { name: name.to_owned() });
    let own = own_names(leaf);
    let missing = || {
        let covers = if own.is_empty() { "no name".to_owned() } else { own.join(", ") };
        Some(CertificateFault::NameMissing { name: name.to_owned(), covers })
    };
    if let Some(parent) = name.strip_prefix("*.") {
        // A wildcard over a whole top-level domain is in no honest certificate.
        if !parent.contains('.') || parent.ends_with('.') || ServerName::try_from(parent).is_err() {
            return invalid();
        }
        return if own.iter().any(|san| san.eq_ignore_ascii_case(name)) { None } else { missing() };
    }
    let wanted = match ServerName::try_from(name) {
        // SNI never carries the final dot (RFC 6066 §3), so such a name would never be found.
        Ok(wanted) if !name.ends_with('.') => wanted,
        _ => return invalid(),
    };
    let covered = chain
        .first()
        .and_then(|leaf| ParsedCertificate::try_from(leaf).ok())
        .is_some_and(|leaf| verify_server_name(&leaf, &wanted).is_ok());
    if covered { None } else { missing() }
}

fn own_names(leaf: &X509Certificate<'_>) -> Vec<String> {
    let Ok(Some(extension)) = leaf.subject_alternative_name() else {
        return Vec::new();
    };
    let name = |general: &GeneralName<'_>| match general {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(bytes) => {
            let v4 = <[u8; 4]>::try_from(*bytes).map(|octets| std::net::IpAddr::from(octets).to_string());
            let v6 = <[u8; 16]>::try_from(*bytes).map(|octets| std::net::IpAddr::from(octets).to_string());
            v4.or(v6).ok()
        }
        _ => None,
    };
    extension.value.general_names.iter().filter_map(name).collect()
}

fn certified_key(
    chain: Vec<CertificateDer<'static>>,
    key_pem: &[u8],
    provider: &CryptoProvider,
) -> Result<CertifiedKey, CertificateFault> {
    let der = PrivateKeyDer::from_pem_slice(key_pem).map_err(|_| CertificateFault::KeyUnreadable)?;
    // rustls erases the DER form after loading.
    let key = provider.key_provider.load_private_key(der).map_err(|_| CertificateFault::KeyUnreadable)?;
    let key = CertifiedKey::new(chain, key);
    match key.keys_match() {
        Ok(()) => Ok(key),
        Err(Error::InconsistentKeys(InconsistentKeys::KeyMismatch | InconsistentKeys::Unknown)) => {
            Err(CertificateFault::KeyMismatch)
        }
        Err(error) => Err(CertificateFault::ChainUnreadable(error.to_string())),
    }
}

fn kind(algorithm: SignatureAlgorithm) -> &'static str {
    match algorithm {
        SignatureAlgorithm::ECDSA => "ECDSA",
        SignatureAlgorithm::ED25519 => "Ed25519",
        _ => "RSA",
    }
}

/// Smaller is preferred: an RSA signature costs the server about twenty times an ECDSA one.
fn rank(algorithm: SignatureAlgorithm) -> u8 {
    match algorithm {
        SignatureAlgorithm::ECDSA => 0,
        SignatureAlgorithm::ED25519 => 1,
        _ => 2,
    }
}

pub(crate) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use rustls::SignatureScheme;

    use super::*;
    use crate::testing::{Authority, ECDSA, ED25519, RSA, any_provider, at};

    const NOW: u64 = 1_800_000_000;
    const DAY: u64 = 24 * 60 * 60;
    const ANY: &[SignatureScheme] =
        &[SignatureScheme::RSA_PSS_SHA256, SignatureScheme::ED25519, SignatureScheme::ECDSA_NISTP256_SHA256];
    const RSA_ONLY: &[SignatureScheme] = &[SignatureScheme::RSA_PSS_SHA256];

    /// A self-signed certificate with a 1024-bit RSA key, which no key generator here still makes.
    const SHORT_RSA: &str = "-----BEGIN CERTIFICATE-----
MIICGDCCAYGgAwIBAgIUdnTvg6x5b7EAEo1YiiKf4flI+h4wDQYJKoZIhvcNAQEL
BQAwEDEOMAwGA1UEAwwFc2hvcnQwIBcNMjYxMTIyMTMxNzMyWhgPMjEyNjEwMjkx
MzE3MzJaMBAxDjAMBgNVBAMMBXNob3J0MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCB
iQKBgQDK2A6wPhuQweIQ5O7MNoBTxUCK9vKXJtyD42AKjP6Zy43R6gWOlb0jYPTP
TUaM7DIy5VvlKy9UpNbBFO920ALRdTKKNw52JxaHCjCUrVqCTZQwhQjx4ozgE6+h
Q0coAS6NHmr819co7JkxKhNj1gswyBZ6sbWsEAVsQ9Z6xWjOTQIDAQABo20wazAd
BgNVHQ4EFgQU6YOs9k0l0wmIxtBR9lREtWDh/4cwHwYDVR0jBBgwFoAU6YOs9k0l
0wmIxtBR9lREtWDh/4cwDwYDVR0TAQH/BAUwAwEB/zAYBgNVHREEETAPgg1zaG9y
dC5leGFtcGxlMA0GCSqGSIb3DQEBCwUAA4GBAGMa2R1o97oq0cbgGN0PJJrSmd9f
AJR19mNcSvVZVI4ahsiyAkbfJ0PkZCuZjTu/jQpkZjBCXUXrOUyC8nYNRGFgWjgQ
FRBdNLYYrprrjBWT73eB/LV3ylnvW396bDlIajYblAtEoqOeskMKbu9aUkIbIxgq
lLxpt1Nj/j6aZhtB
-----END CERTIFICATE-----
";

    fn entry(names: &[&str], kind: &'static rcgen::SignatureAlgorithm) -> CertificateEntry {
        Authority::new().entry_valid(names, kind, at(NOW - DAY), at(NOW + DAY))
    }

    /// An entry for `names` whose certificate covers `covered`.
    fn entry_covering(names: &[&str], covered: &[&str]) -> CertificateEntry {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        CertificateEntry { names, ..entry(covered, ECDSA) }
    }

    fn build(entries: &[CertificateEntry]) -> Result<CertificateStore, Vec<CertificateError>> {
        CertificateStore::build(entries.to_vec(), &any_provider(), at(NOW))
    }

    fn faults(entries: &[CertificateEntry]) -> Vec<CertificateFault> {
        build(entries).unwrap_err().into_iter().map(|error| error.fault).collect()
    }

    /// Which of `entries` a client gets.
    fn chosen(
        entries: &[CertificateEntry],
        name: Option<&str>,
        schemes: &[SignatureScheme],
    ) -> Option<usize> {
        let store = build(entries).unwrap();
        let key = store.select(name, schemes)?;
        entries.iter().position(|entry| read_chain(&entry.chain_pem).unwrap() == key.cert)
    }

    #[test]
    fn an_exact_name_comes_before_a_wildcard_and_a_wildcard_before_the_default() {
        let entries = [
            entry_covering(&[], &["fallback.example"]),
            entry(&["*.chat.example"], ECDSA),
            entry(&["a.chat.example", "A2.Chat.Example"], ECDSA),
        ];
        let chosen = |name| chosen(&entries, name, ANY);
        assert_eq!(chosen(Some("a.chat.example")), Some(2));
        assert_eq!(chosen(Some("a2.chat.example")), Some(2), "names are compared in lower case");
        assert_eq!(chosen(Some("b.chat.example")), Some(1));
        assert_eq!(chosen(Some("chat.example")), Some(0), "a wildcard covers one label, not none");
        assert_eq!(chosen(Some("a.b.chat.example")), Some(0), "nor two");
        assert_eq!(chosen(Some("unknown")), Some(0));
        assert_eq!(chosen(None), Some(0));
    }

    #[test]
    fn without_a_default_an_unknown_name_is_refused_but_no_name_is_not() {
        let entries = [entry(&["first.example"], ECDSA), entry(&["second.example"], ECDSA)];
        assert_eq!(chosen(&entries, Some("third.example"), ANY), None);
        assert_eq!(chosen(&entries, None, ANY), Some(0));
        assert_eq!(chosen(&[], None, ANY), None);
    }

    #[test]
    fn ecdsa_comes_before_rsa_for_those_who_understand_it() {
        let names = ["chat.example"];
        let entries = [entry(&names, RSA), entry(&names, ED25519), entry(&names, ECDSA)];
        let chosen = |schemes| chosen(&entries, Some("chat.example"), schemes);
        assert_eq!(chosen(ANY), Some(2));
        assert_eq!(chosen(RSA_ONLY), Some(0));
        assert_eq!(chosen(&[SignatureScheme::ED25519, SignatureScheme::RSA_PSS_SHA256]), Some(1));
        assert_eq!(chosen(&[SignatureScheme::RSA_PKCS1_SHA1]), None);
    }

    #[test]
    fn a_wildcard_is_not_asked_when_the_exact_name_has_no_key_for_the_client() {
        // Otherwise a client could pick another tenant's certificate by what it offers.
        let entries = [entry(&["a.chat.example"], ECDSA), entry(&["*.chat.example"], RSA)];
        assert_eq!(chosen(&entries, Some("a.chat.example"), RSA_ONLY), None);
    }

    #[test]
    fn a_key_that_is_another_ones_is_named() {
        let mut first = entry(&["chat.example"], ECDSA);
        first.key_pem = entry(&["chat.example"], ECDSA).key_pem;
        let errors = build(&[first]).unwrap_err();
        assert_eq!(errors[0].fault, CertificateFault::KeyMismatch);
        assert_eq!(
            errors[0].to_string(),
            "certificate for chat.example: the private key does not match the first certificate of the chain"
        );
    }

    #[test]
    fn time_is_judged_by_the_clock_given() {
        let entries = [entry(&["chat.example"], ECDSA)];
        let judge = |now| CertificateStore::build(entries.to_vec(), &any_provider(), at(now)).map(drop);
        assert_eq!(judge(NOW - DAY), Ok(()));
        assert_eq!(judge(NOW + DAY), Ok(()));
        let fault = |now: u64| judge(now).unwrap_err().remove(0).fault;
        assert!(matches!(fault(NOW - DAY - 1), CertificateFault::NotYetValid { .. }));
        assert!(matches!(fault(NOW + DAY + 1), CertificateFault::Expired { .. }));
        let message = fault(NOW + DAY + 1).to_string();
        assert!(message.contains("expired on Jan 16 08:00:00 2027"), "{message}");
    }

    #[test]
    fn an_expired_issuer_in_the_chain_is_named_too() {
        let authority = Authority::new();
        let mut good = authority.entry_valid(&["chat.example"], ECDSA, at(NOW - DAY), at(NOW + DAY));
        let old = authority.entry_valid(&["old.example"], ECDSA, at(NOW - DAY), at(NOW - 1));
        good.chain_pem.extend_from_slice(&old.chain_pem);
        assert!(matches!(faults(&[good]).as_slice(), [CertificateFault::Expired { .. }]));
    }

    #[test]
    fn names_that_the_certificate_does_not_cover_are_named() {
        let covered = ["chat.example", "*.eu.chat.example", "127.0.0.1", "::1"];
        let good =
            ["chat.example", "CHAT.example", "a.eu.chat.example", "*.eu.chat.example", "127.0.0.1", "::1"];
        for name in good {
            assert!(build(&[entry_covering(&[name], &covered)]).is_ok(), "{name}");
        }
        for name in ["eu.chat.example", "*.chat.example", "*.us.chat.example", "127.0.0.2", "other.example"] {
            let fault = faults(&[entry_covering(&[name], &covered)]).remove(0);
            let covers = "chat.example, *.eu.chat.example, 127.0.0.1, ::1".to_owned();
            assert_eq!(fault, CertificateFault::NameMissing { name: name.to_owned(), covers });
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for name in [
            "",
            "*",
            "*.",
            "*.example",
            "a.*.example",
            "chat.example.",
            "*.chat.example.",
            "a b",
            "köln.example",
        ] {
            let fault = faults(&[entry_covering(&[name], &["chat.example"])]).remove(0);
            assert_eq!(fault, CertificateFault::NameInvalid { name: name.to_owned() });
        }
    }

    #[test]
    fn unreadable_parts_are_named_and_no_key_is_quoted() {
        let good = entry(&["chat.example"], ECDSA);
        let with_chain = |chain: &[u8]| CertificateEntry { chain_pem: chain.to_vec(), ..good.clone() };
        let with_key =
            |key: &[u8]| CertificateEntry { key_pem: Zeroizing::new(key.to_vec()), ..good.clone() };
        assert_eq!(faults(&[with_chain(b"")]), [CertificateFault::ChainEmpty]);
        assert_eq!(faults(&[with_chain(&good.key_pem)]), [CertificateFault::ChainEmpty]);
        let broken = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(matches!(faults(&[with_chain(broken)])[..], [CertificateFault::ChainUnreadable(_)]));
        let cut = b"-----BEGIN CERTIFICATE-----\nAAAA\n";
        assert!(matches!(faults(&[with_chain(cut)])[..], [CertificateFault::ChainUnreadable(_)]));
        assert_eq!(faults(&[with_key(b"hunter2")]), [CertificateFault::KeyUnreadable]);
        assert_eq!(faults(&[with_key(&good.chain_pem)]), [CertificateFault::KeyUnreadable]);
        assert!(!build(&[with_key(b"hunter2")]).unwrap_err()[0].to_string().contains("hunter2"));
    }

    #[test]
    fn short_rsa_keys_are_refused_k_1() {
        let entry = CertificateEntry {
            names: vec!["short.example".to_owned()],
            chain_pem: SHORT_RSA.as_bytes().to_vec(),
            key_pem: entry(&["short.example"], RSA).key_pem,
        };
        let errors = CertificateStore::build(vec![entry], &any_provider(), at(1_900_000_000)).unwrap_err();
        assert_eq!(errors[0].fault, CertificateFault::KeyTooShort { bits: 1024 });
    }

    #[test]
    fn all_faults_of_all_entries_come_at_once() {
        let mut first = entry_covering(&["absent.example"], &["chat.example"]);
        first.key_pem = Zeroizing::new(Vec::new());
        let second = entry_covering(&["not a name"], &["chat.example"]);
        let errors = build(&[first, entry(&["fine.example"], ECDSA), second]).unwrap_err();
        let found: Vec<_> = errors.iter().map(|error| (error.entry, error.names.as_str())).collect();
        assert_eq!(found, [(0, "absent.example"), (0, "absent.example"), (2, "not a name")]);
    }

    #[test]
    fn a_certificate_that_would_never_be_chosen_is_an_error() {
        let names = ["chat.example"];
        let twice = [entry(&names, ECDSA), entry(&["CHAT.example"], ECDSA)];
        let name = "CHAT.example".to_owned();
        assert_eq!(faults(&twice), [CertificateFault::Duplicate { name }]);
        let defaults = [entry_covering(&[], &names), entry_covering(&[], &names)];
        assert_eq!(faults(&defaults), [CertificateFault::Duplicate { name: "default".to_owned() }]);
        assert!(build(&[entry(&names, ECDSA), entry(&names, RSA)]).is_ok());
    }

    #[test]
    fn entries_tell_of_the_servers_own_certificates() {
        let store = build(&[entry(&["a.example", "b.example"], ECDSA), entry_covering(&[], &["c"])]).unwrap();
        let expiries: Vec<_> =
            store.entries().iter().map(|entry| (entry.names.as_str(), entry.expires_at)).collect();
        assert!(store.entries().iter().all(|entry| entry.key == "ECDSA" && entry.not_before == NOW - DAY));
        assert_eq!(expiries, [("a.example, b.example", NOW + DAY), ("default", NOW + DAY)]);
    }

    #[test]
    fn it_is_known_which_names_are_covered() {
        let entries = [
            entry(&["a.example", "*.b.example"], ECDSA),
            entry(&["a.example"], RSA),
            entry_covering(&[], &["fallback.example", "::1"]),
        ];
        let store = build(&entries).unwrap();
        for covered in ["a.example", "x.b.example", "fallback.example", "::1"] {
            assert!(store.covers(covered), "{covered}");
        }
        for other in ["b.example", "x.x.b.example", "other.example", "127.0.0.1", "", "a b"] {
            assert!(!store.covers(other), "{other}");
        }
        assert!(store.names("a.example") && store.names("x.b.example") && store.has_default());
        assert!(!store.names("fallback.example") && !store.names("b.example"));
        let none = build(&entries[..2]).unwrap();
        assert!(!none.has_default() && !none.covers("fallback.example"));
    }

    #[test]
    fn prints_no_key_k_3() {
        let entry = entry(&["chat.example"], ECDSA);
        let secret = String::from_utf8(entry.key_pem.to_vec()).unwrap();
        let lines: Vec<_> = secret.lines().collect();
        let store = build(std::slice::from_ref(&entry)).unwrap();
        for printed in [format!("{entry:?}"), format!("{store:?}")] {
            assert!(printed.contains("chat.example"));
            assert!(!lines.iter().any(|line| printed.contains(line)), "{printed}");
            assert!(!printed.contains("key_pem"), "{printed}");
        }
    }
}
