//! A certificate authority for development and tests, which lives in the state folder and nowhere else.

use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    GeneralSubtree, IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, SanType,
};
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::sign::CertifiedKey;
use time::OffsetDateTime;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::files::{FileError, private_dir, read_private, write_private, write_public};
use crate::provider::{ProviderChoice, provider};
use crate::random::{self, CryptoError};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

/// Validity of the authority. Long, since each new one has to be trusted anew.
const CA_VALIDITY: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// Validity of what it issues.
const VALIDITY: Duration = Duration::from_secs(90 * 24 * 60 * 60);

/// A certificate with less than this left is renewed.
const RENEW_BEFORE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// Certificates begin this long ago, for clients whose clock is behind.
const BACKDATED: Duration = Duration::from_secs(60 * 60);

/// What every server certificate covers.
const LOCAL_NAMES: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// Top-level domains that are reserved (RFC 6761 §6.2, §6.3), so that the authority may speak for them.
const RESERVED_DOMAINS: [&str; 2] = ["localhost", "test"];

const CA_CERTIFICATE: &str = "ca.pem";
const CA_KEY: &str = "ca.key";
const SERVER: &str = "server";

/// An authority of one's own (ECDSA P-256), for development and tests.
///
/// Its name constraints (RFC 5280 §4.2.1.10) allow `localhost`, `.test`, loopback addresses and the names it was made
/// for: someone who steals the key of an authority that a developer has told their browser to trust cannot
/// impersonate anything else.
pub struct DevAuthority {
    certificate: CertificateDer<'static>,
    issuer: Issuer<'static, KeyPair>,
    expiry: SystemTime,
}

/// Where [`DevAuthority::open_or_create`] put things.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevFiles {
    /// The authority's certificate, PEM, for clients to trust.
    pub ca: PathBuf,
    /// The server's certificate, PEM.
    pub chain: PathBuf,
    /// The server's private key, PKCS#8 PEM, 0600.
    pub key: PathBuf,
}

/// Where [`DevAuthority::issue`] put things.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuedFiles {
    /// The certificate, PEM.
    pub chain: PathBuf,
    /// The private key, PKCS#8 PEM, 0600.
    pub key: PathBuf,
}

/// Development certificates cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DevError {
    /// A file or folder cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// A key could not be made.
    #[error(transparent)]
    Crypto(#[from] CryptoError),
    /// A certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// Neither a DNS name nor an IP address.
    #[error("`{0}` is neither a DNS name nor an IP address")]
    Name(String),
    /// The authority may not speak for this name: see the name constraints of [`DevAuthority`].
    #[error("the development authority may not issue for `{0}`; names under .test and localhost are allowed")]
    NotPermitted(String),
    /// There is no authority in the folder: [`DevAuthority::open_or_create`] makes one.
    #[error("no development authority in {0}")]
    NoAuthority(PathBuf),
}

impl DevAuthority {
    /// Makes sure that `dir` holds an authority and a server certificate of it for `localhost`, `127.0.0.1`, `::1` and
    /// `names`, both good for 30 days at least.
    ///
    /// What is there and good is left alone. The authority is made anew only if it is unreadable, runs out within the
    /// life of a certificate, or may not speak for a name; then clients have to trust the new one.
    ///
    /// # Errors
    /// `dir` or a key in it is open to others, cannot be written, or a name is none.
    pub fn open_or_create(dir: &Path, names: &[&str]) -> Result<DevFiles, DevError> {
        Self::open_or_create_at(dir, names, SystemTime::now())
    }

    /// As [`open_or_create`](Self::open_or_create), by the clock given.
    pub fn open_or_create_at(dir: &Path, names: &[&str], now: SystemTime) -> Result<DevFiles, DevError> {
        private_dir(dir)?;
        let mut all = LOCAL_NAMES.to_vec();
        for name in names {
            if !all.contains(name) {
                all.push(name);
            }
        }
        let authority = match Self::load(dir)? {
            Some(authority) if authority.serves(&all, now) => authority,
            _ => Self::create(dir, &all, now)?,
        };
        let files = paths(dir, SERVER);
        if !authority.is_good(&files, &all, now)? {
            authority.write_certificate(&files, &all, &[ExtendedKeyUsagePurpose::ServerAuth], now)?;
        }
        Ok(DevFiles { ca: dir.join(CA_CERTIFICATE), chain: files.chain, key: files.key })
    }

    /// Makes sure that `dir`, which holds an authority, holds a certificate `NAME.pem` of it with `NAME.key`, for mutual
    /// TLS: `name` may serve and may be a client.
    ///
    /// What is there and good for 30 days is left alone.
    ///
    /// # Errors
    /// [`DevError::NotPermitted`] if `name` is not under `.test` or `localhost`, nor one the authority was made for.
    pub fn issue(dir: &Path, name: &str) -> Result<IssuedFiles, DevError> {
        Self::issue_at(dir, name, SystemTime::now())
    }

    /// As [`issue`](Self::issue), by the clock given.
    pub fn issue_at(dir: &Path, name: &str, now: SystemTime) -> Result<IssuedFiles, DevError> {
        private_dir(dir)?;
        let Some(authority) = Self::load(dir)? else {
            return Err(DevError::NoAuthority(dir.to_owned()));
        };
        // Also keeps `/` out of the file's name.
        ServerName::try_from(name).map_err(|_| DevError::Name(name.to_owned()))?;
        let taken = [CA_CERTIFICATE.trim_end_matches(".pem"), SERVER];
        if taken.contains(&name) || !authority.permits(name) {
            return Err(DevError::NotPermitted(name.to_owned()));
        }
        let files = paths(dir, name);
        if !authority.is_good(&files, &[name], now)? {
            let usages = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
            authority.write_certificate(&files, &[name], &usages, now)?;
        }
        Ok(files)
    }

    /// The authority in `dir`; `None` if there is none, or what is there cannot be read as one.
    fn load(dir: &Path) -> Result<Option<Self>, DevError> {
        let key_path = dir.join(CA_KEY);
        let Ok(pem) = fs::read(dir.join(CA_CERTIFICATE)) else {
            return Ok(None);
        };
        if !key_path.exists() {
            return Ok(None);
        }
        let key_pem = read_private(&key_path)?;
        Ok(Self::from_pem(&pem, &key_pem))
    }

    fn from_pem(pem: &[u8], key_pem: &[u8]) -> Option<Self> {
        let certificate = CertificateDer::from_pem_slice(pem).ok()?;
        let key = KeyPair::from_pem(std::str::from_utf8(key_pem).ok()?).ok()?;
        let expiry = {
            let (_, parsed) = X509Certificate::from_der(&certificate).ok()?;
            // A crash between the two writes leaves a key that is not the certificate's.
            if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
                return None;
            }
            UNIX_EPOCH + Duration::from_secs(u64::try_from(parsed.validity().not_after.timestamp()).ok()?)
        };
        let issuer = Issuer::from_ca_cert_der(&certificate, key).ok()?;
        Some(Self { certificate, issuer, expiry })
    }

    fn create(dir: &Path, names: &[&str], now: SystemTime) -> Result<Self, DevError> {
        let expiry = now + CA_VALIDITY;
        let mut params = CertificateParams::default();
        params.not_before = date(now - BACKDATED);
        params.not_after = date(expiry);
        params.distinguished_name = DistinguishedName::new();
        // Told apart in the list of a browser that has seen several of them.
        let suffix = u32::from_ne_bytes(*random::bytes()?);
        params
            .distinguished_name
            .push(DnType::CommonName, format!("sealgate development authority {suffix:08x}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.name_constraints =
            Some(NameConstraints { permitted_subtrees: permitted(names)?, excluded_subtrees: Vec::new() });

        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        write_private(&dir.join(CA_KEY), Zeroizing::new(key.serialize_pem()).as_bytes())?;
        write_public(&dir.join(CA_CERTIFICATE), certificate.pem().as_bytes())?;
        Ok(Self { certificate: certificate.der().clone(), issuer: Issuer::new(params, key), expiry })
    }

    /// Whether it may speak for all of `names`, and outlives what it issues `now`.
    fn serves(&self, names: &[&str], now: SystemTime) -> bool {
        self.expiry > now + VALIDITY + DAY && names.iter().all(|name| self.permits(name))
    }

    /// RFC 5280 §4.2.1.10, for the two kinds of names we use.
    fn permits(&self, name: &str) -> bool {
        let Ok((_, certificate)) = X509Certificate::from_der(&self.certificate) else {
            return false;
        };
        let Ok(Some(extension)) = certificate.name_constraints() else {
            return false;
        };
        let subtrees = extension.value.permitted_subtrees.as_deref().unwrap_or_default();
        let address = name.parse::<IpAddr>().ok();
        subtrees.iter().any(|subtree| match (&subtree.base, address) {
            (GeneralName::DNSName(domain), None) => is_under(name, domain),
            (GeneralName::IPAddress(range), Some(address)) => is_within(address, range),
            _ => false,
        })
    }

    /// Whether `files` hold a certificate of this authority for `names`, good for 30 more days, and its key.
    fn is_good(&self, files: &IssuedFiles, names: &[&str], now: SystemTime) -> Result<bool, DevError> {
        let Ok(pem) = fs::read(&files.chain) else {
            return Ok(false);
        };
        if !files.key.exists() {
            return Ok(false);
        }
        let key_pem = read_private(&files.key)?;
        Ok(self.verify(&pem, &key_pem, names, now).is_some())
    }

    /// Verifies as a client would, today and when the renewal would be due.
    fn verify(&self, pem: &[u8], key_pem: &[u8], names: &[&str], now: SystemTime) -> Option<()> {
        let leaf = CertificateDer::from_pem_slice(pem).ok()?;
        let provider = provider(&ProviderChoice::default());
        let key = PrivateKeyDer::from_pem_slice(key_pem).ok()?;
        CertifiedKey::from_der(vec![leaf.clone()], key, &provider).ok()?;

        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).ok()?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build().ok()?;
        for name in names {
            let name = ServerName::try_from(*name).ok()?;
            for at in [now, now + RENEW_BEFORE] {
                let at = UnixTime::since_unix_epoch(at.duration_since(UNIX_EPOCH).ok()?);
                verifier.verify_server_cert(&leaf, &[], &name, &[], at).ok()?;
            }
        }
        Some(())
    }

    fn write_certificate(
        &self,
        files: &IssuedFiles,
        names: &[&str],
        usages: &[ExtendedKeyUsagePurpose],
        now: SystemTime,
    ) -> Result<(), DevError> {
        let mut params = CertificateParams::default();
        params.not_before = date(now - BACKDATED);
        params.not_after = date(now + VALIDITY);
        params.subject_alt_names =
            names.iter().map(|name| alternative_name(name)).collect::<Result<_, _>>()?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, names.first().copied().unwrap_or_default());
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages.to_vec();
        params.use_authority_key_identifier_extension = true;

        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.issuer)?;
        // A crash between the two leaves a pair that does not match; the next start then makes both anew.
        write_private(&files.key, Zeroizing::new(key.serialize_pem()).as_bytes())?;
        write_public(&files.chain, certificate.pem().as_bytes())?;
        Ok(())
    }
}

fn paths(dir: &Path, name: &str) -> IssuedFiles {
    IssuedFiles { chain: dir.join(format!("{name}.pem")), key: dir.join(format!("{name}.key")) }
}

fn permitted(names: &[&str]) -> Result<Vec<GeneralSubtree>, DevError> {
    let loopback4 = CidrSubnet::from_v4_prefix([127, 0, 0, 0], 8);
    let loopback6 = CidrSubnet::from_v6_prefix(Ipv6Addr::LOCALHOST.octets(), 128);
    let mut subtrees = vec![GeneralSubtree::IpAddress(loopback4), GeneralSubtree::IpAddress(loopback6)];
    subtrees.extend(RESERVED_DOMAINS.map(|domain| GeneralSubtree::DnsName(domain.to_owned())));
    for name in names {
        let subtree = match alternative_name(name)? {
            SanType::IpAddress(address) if address.is_loopback() => continue,
            SanType::IpAddress(address @ IpAddr::V4(_)) => {
                GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(address, 32))
            }
            SanType::IpAddress(address) => {
                GeneralSubtree::IpAddress(CidrSubnet::from_addr_prefix(address, 128))
            }
            _ if RESERVED_DOMAINS.iter().any(|domain| is_under(name, domain)) => continue,
            _ => GeneralSubtree::DnsName((*name).to_owned()),
        };
        subtrees.push(subtree);
    }
    Ok(subtrees)
}

fn alternative_name(name: &str) -> Result<SanType, DevError> {
    match ServerName::try_from(name) {
        Ok(ServerName::IpAddress(address)) => Ok(SanType::IpAddress(address.into())),
        Ok(ServerName::DnsName(_)) => Ok(SanType::DnsName(name.try_into()?)),
        _ => Err(DevError::Name(name.to_owned())),
    }
}

fn is_under(name: &str, domain: &str) -> bool {
    let (name, domain) = (name.to_ascii_lowercase(), domain.to_ascii_lowercase());
    name.strip_suffix(domain.as_str()).is_some_and(|front| front.is_empty() || front.ends_with('.'))
}

/// `range` is an address and a mask, both in network order.
fn is_within(address: IpAddr, range: &[u8]) -> bool {
    let octets = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let (base, mask) = range.split_at(range.len() / 2);
    base.len() == octets.len()
        && octets.iter().zip(base).zip(mask).all(|((octet, base), mask)| octet & mask == base & mask)
}

fn date(at: SystemTime) -> OffsetDateTime {
    OffsetDateTime::from(at)
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    use rustls::server::WebPkiClientVerifier;
    use rustls::version::TLS13;
    use rustls::{ClientConfig, ServerConfig};

    use super::*;
    use crate::testing::{any_provider, handshake};

    fn state() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path().join("state/certs");
        (folder, dir)
    }

    fn roots(ca: &Path) -> Arc<RootCertStore> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
        Arc::new(roots)
    }

    fn identity(chain: &Path, key: &Path) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (vec![CertificateDer::from_pem_file(chain).unwrap()], PrivateKeyDer::from_pem_file(key).unwrap())
    }

    fn client(ca: &Path) -> Arc<ClientConfig> {
        let builder =
            ClientConfig::builder_with_provider(any_provider()).with_protocol_versions(&[&TLS13]).unwrap();
        Arc::new(builder.with_root_certificates(roots(ca)).with_no_client_auth())
    }

    fn server(chain: &Path, key: &Path) -> Arc<ServerConfig> {
        let builder =
            ServerConfig::builder_with_provider(any_provider()).with_protocol_versions(&[&TLS13]).unwrap();
        let (chain, key) = identity(chain, key);
        Arc::new(builder.with_no_client_auth().with_single_cert(chain, key).unwrap())
    }

    fn read(files: &DevFiles) -> [Vec<u8>; 3] {
        [&files.ca, &files.chain, &files.key].map(|path| fs::read(path).unwrap())
    }

    #[test]
    fn a_client_that_trusts_the_authority_accepts_the_server_under_all_its_names() {
        let (_folder, dir) = state();
        let files = DevAuthority::open_or_create(&dir, &["chat.test", "192.0.2.7", "chat.example"]).unwrap();
        let (client, server) = (client(&files.ca), server(&files.chain, &files.key));
        for name in ["localhost", "127.0.0.1", "::1", "chat.test", "192.0.2.7", "chat.example"] {
            handshake(&client, &server, name).unwrap();
        }
        assert!(handshake(&client, &server, "other.test").is_err());
    }

    #[test]
    fn keys_are_0600_certificates_0644_and_the_folder_0700() {
        let (_folder, dir) = state();
        DevAuthority::open_or_create(&dir, &[]).unwrap();
        DevAuthority::issue(&dir, "gateway.sealgate.test").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode(&dir), 0o700);
        let mut found = Vec::new();
        for file in fs::read_dir(&dir).unwrap() {
            let path = file.unwrap().path();
            let expected = if path.extension().unwrap() == "key" { 0o600 } else { 0o644 };
            assert_eq!(mode(&path), expected, "{}", path.display());
            found.push(path.file_name().unwrap().to_str().unwrap().to_owned());
        }
        found.sort();
        let expected = [
            "ca.key",
            "ca.pem",
            "gateway.sealgate.test.key",
            "gateway.sealgate.test.pem",
            "server.key",
            "server.pem",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_second_start_changes_nothing_until_30_days_are_left() {
        let (_folder, dir) = state();
        let begin = SystemTime::now();
        let open = |days: u32| read(&DevAuthority::open_or_create_at(&dir, &[], begin + DAY * days).unwrap());
        let first = open(0);
        assert_eq!(open(0), first);
        assert_eq!(open(59), first);
        let renewed = open(61);
        assert_eq!(renewed[0], first[0], "same authority");
        assert_ne!(renewed[1], first[1]);
        assert_ne!(renewed[2], first[2], "a new certificate has a new key");
        assert_eq!(open(120), renewed);
    }

    #[test]
    fn the_authority_is_renewed_before_it_ends_within_a_certificates_life() {
        let (_folder, dir) = state();
        let begin = SystemTime::now();
        let ca = |days: u32| {
            let files = DevAuthority::open_or_create_at(&dir, &[], begin + DAY * days).unwrap();
            fs::read(files.ca).unwrap()
        };
        let first = ca(0);
        assert_eq!(ca(10 * 365 - 92), first);
        assert_ne!(ca(10 * 365 - 90), first);
    }

    #[test]
    fn a_new_name_gets_a_new_certificate_and_only_if_need_be_a_new_authority() {
        let (_folder, dir) = state();
        let open = |names: &[&str]| read(&DevAuthority::open_or_create(&dir, names).unwrap());
        let first = open(&[]);
        let under_test = open(&["chat.test"]);
        assert_eq!(under_test[0], first[0]);
        assert_ne!(under_test[1], first[1]);
        assert_eq!(open(&["localhost"]), under_test, "a certificate that covers more stays");

        let elsewhere = open(&["chat.example"]);
        assert_ne!(elsewhere[0], first[0]);
        assert_eq!(open(&["chat.example", "a.chat.example"])[0], elsewhere[0]);
    }

    #[test]
    fn damage_is_repaired() {
        let (_folder, dir) = state();
        let open = || read(&DevAuthority::open_or_create(&dir, &[]).unwrap());
        let first = open();
        fs::write(dir.join("server.pem"), b"rubbish").unwrap();
        let second = open();
        assert_eq!(second[0], first[0]);
        assert_ne!(second[1], first[1]);

        // As after a crash between the two writes: the key is new, the certificate old.
        let other = KeyPair::generate().unwrap().serialize_pem();
        write_private(&dir.join("server.key"), other.as_bytes()).unwrap();
        assert_ne!(open()[1], second[1]);

        write_private(&dir.join("ca.key"), other.as_bytes()).unwrap();
        let third = open();
        assert_ne!(third[0], first[0]);
        let files = DevAuthority::open_or_create(&dir, &[]).unwrap();
        handshake(&client(&files.ca), &server(&files.chain, &files.key), "localhost").unwrap();

        fs::remove_file(dir.join("ca.pem")).unwrap();
        assert_ne!(open()[0], third[0]);
    }

    #[test]
    fn a_key_or_folder_open_to_others_is_refused() {
        let (_folder, dir) = state();
        DevAuthority::open_or_create(&dir, &[]).unwrap();
        for (path, open, closed) in [
            (dir.join("ca.key"), 0o644, 0o600),
            (dir.join("server.key"), 0o640, 0o600),
            (dir.clone(), 0o755, 0o700),
        ] {
            fs::set_permissions(&path, Permissions::from_mode(open)).unwrap();
            let refused = DevAuthority::open_or_create(&dir, &[]);
            assert!(matches!(refused, Err(DevError::File(FileError::OpenToOthers { .. }))));
            fs::set_permissions(&path, Permissions::from_mode(closed)).unwrap();
            DevAuthority::open_or_create(&dir, &[]).unwrap();
        }
    }

    #[test]
    fn a_stolen_authority_cannot_speak_for_other_names() {
        let (_folder, dir) = state();
        let files = DevAuthority::open_or_create(&dir, &[]).unwrap();
        let authority = DevAuthority::load(&dir).unwrap().unwrap();
        for (name, accepted) in [("bank.test", true), ("bank.example", false), ("192.0.2.7", false)] {
            // The thief does not ask `permits`.
            let forged = paths(&dir, "forged");
            authority
                .write_certificate(
                    &forged,
                    &[name],
                    &[ExtendedKeyUsagePurpose::ServerAuth],
                    SystemTime::now(),
                )
                .unwrap();
            let done = handshake(&client(&files.ca), &server(&forged.chain, &forged.key), name);
            assert_eq!(done.is_ok(), accepted, "{name}");
            assert_eq!(authority.permits(name), accepted, "{name}");
        }
    }

    #[test]
    fn issued_certificates_serve_mutual_tls() {
        let (_folder, dir) = state();
        let ca = DevAuthority::open_or_create(&dir, &[]).unwrap().ca;
        let gateway = DevAuthority::issue(&dir, "gateway.sealgate.test").unwrap();
        let backend = DevAuthority::issue(&dir, "backend.sealgate.test").unwrap();
        assert_eq!(DevAuthority::issue(&dir, "gateway.sealgate.test").unwrap(), gateway);

        let verifier =
            WebPkiClientVerifier::builder_with_provider(roots(&ca), any_provider()).build().unwrap();
        let (chain, key) = identity(&backend.chain, &backend.key);
        let server = ServerConfig::builder_with_provider(any_provider())
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .unwrap();
        let server = Arc::new(server);
        let with_identity = |chain: &Path, key: &Path| {
            let (chain, key) = identity(chain, key);
            let builder = ClientConfig::builder_with_provider(any_provider())
                .with_protocol_versions(&[&TLS13])
                .unwrap()
                .with_root_certificates(roots(&ca));
            Arc::new(builder.with_client_auth_cert(chain, key).unwrap())
        };

        let good = with_identity(&gateway.chain, &gateway.key);
        handshake(&good, &server, "backend.sealgate.test").unwrap();
        assert!(handshake(&client(&ca), &server, "backend.sealgate.test").is_err(), "no certificate");
        let files = DevAuthority::open_or_create(&dir, &[]).unwrap();
        let no_client = with_identity(&files.chain, &files.key);
        assert!(handshake(&no_client, &server, "backend.sealgate.test").is_err(), "for servers only");
    }

    #[test]
    fn issues_for_permitted_names_only() {
        let (_folder, dir) = state();
        assert!(DevAuthority::issue(&dir, "gateway.test").is_err(), "no authority yet");
        assert!(matches!(DevAuthority::issue(&dir, "gateway.test"), Err(DevError::NoAuthority(_))));
        DevAuthority::open_or_create(&dir, &["own.example"]).unwrap();
        for name in ["gateway.test", "a.localhost", "own.example", "a.own.example", "127.0.0.9"] {
            assert!(DevAuthority::issue(&dir, name).is_ok(), "{name}");
        }
        for name in ["other.example", "notown.example", "contest", "192.0.2.1", "ca", "server"] {
            assert!(matches!(DevAuthority::issue(&dir, name), Err(DevError::NotPermitted(_))), "{name}");
        }
        for name in ["", "../server", "a/b.test", "*.test", "a b.test"] {
            assert!(matches!(DevAuthority::issue(&dir, name), Err(DevError::Name(_))), "{name}");
        }
        assert!(matches!(DevAuthority::open_or_create(&dir, &["a b"]), Err(DevError::Name(_))));
    }
}
