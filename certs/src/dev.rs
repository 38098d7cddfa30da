//! A certificate authority for development and tests, which lives in the state folder and nowhere else.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
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
        Ok(DevFiles {
            ca: dir.join(CA_CERTIFICATE),
            chain: files.chain,
            key: files.key,
        })
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
            let usages = [
                ExtendedKeyUsagePurpose::ServerAuth,
                ExtendedKeyUsagePurpose::ClientAuth,
            ];
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
        Some(Self {
            certificate,
            issuer,
            expiry,
        })
    }

    fn create(dir: &Path, names: &[&str], now: SystemTime) -> Result<Self, DevError> {
        let expiry = now + CA_VALIDITY;
        let mut params = CertificateParams::default();
        params.not_before = date(now - BACKDATED);
        params.not_after = date(expiry);
        params.distinguished_name = DistinguishedName::new();
        // Told apart in the list of a browser that has seen several of them.
        let suffix = u32::from_ne_bytes(*random::bytes()?);
        params.distinguished_name.push(
            DnType::CommonName,
            format!("sealgate development authority {suffix:08x}"),
        );
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: permitted(names)?,
            excluded_subtrees: Vec::new(),
        });

        let key = KeyPair::generate()?;
        let certificate = params.self_signed(&key)?;
        write_private(&dir.join(CA_KEY), Zeroizing::new(key.serialize_pem()).as_bytes())?;
        write_public(&dir.join(CA_CERTIFICATE), certificate.pem().as_bytes())?;
        Ok(Self {
            certificate: certificate.der().clone(),
            issuer: Issuer::new(params, key),
            expiry,
        })
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
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .ok()?;
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
        params.subject_alt_names = names
            .iter()
            .map(|name| alternative_name(name))
            .collect::<Result<_, _>>()?;
        params.distinguished_name = DistinguishedName::new();
        params
            .distinguished_name
            .push(DnType::CommonName, names.first().copied().unwrap_or_default());
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
    IssuedFiles {
        chain: dir.join(format!("{name}.pem")),
        key: dir.join(format!("{name}.key")),
    }
}

fn permitted(names: &[&str]) -> Result<Vec<GeneralSubtree>, DevError> {
    let loopback4 = CidrSubnet::from_addr_prefix(IpAddr::V4(Ipv4Addr::LOCALHOST), 8);
    let loopback6 = CidrSubnet::from_addr_prefix(IpAddr::V6(Ipv6Addr::LOCALHOST), 128);
    let mut subtrees = vec![
        GeneralSubtree::IpAddress(loopback4),
        GeneralSubtree::IpAddress(loopback6),
    ];
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
    name.strip_suffix(domain.as_str())
        .is_some_and(|front| front.is_empty() || front.ends_with('.'))
}

/// `range` is an address and a mask, both in network order.
fn is_within(address: IpAddr, range: &[u8]) -> bool {
    let octets = match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    let (base, mask) = range.split_at(range.len() / 2);
    base.len() == octets.len()
        && octets
            .iter()
            .zip(base)
            .zip(mask)
            .all(|((octet, base), mask)| octet & mask == base & mask)
}

fn date(at: SystemTime) -> OffsetDateTime {
    OffsetDateTime::from(at)
}
