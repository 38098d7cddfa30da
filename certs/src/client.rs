//! Client certificates: which authorities vouch for clients, and what a certificate says.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ring::digest;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{Error, RootCertStore};
use x509_parser::prelude::{CertificateRevocationList, FromDer, GeneralName, X509Certificate};

use crate::store::unix_seconds;

/// Whether clients are asked for a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientDemand {
    /// They are, and may have none.
    Request,
    /// Without one there is no handshake.
    Require,
}

/// Which client certificates are good, and whether a client needs one.
///
/// A certificate has to lead to one of the authorities and to be made for clients (RFC 5280 §4.2.1.12). With revocation lists,
/// every certificate of the chain has to be covered by one that is still valid: unknown means refused.
#[derive(Clone)]
pub struct ClientTrust {
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    fingerprint: [u8; 32],
    warnings: Vec<String>,
    lists_end: Option<u64>,
}

/// Why no client could be verified.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClientTrustError {
    /// Not PEM, or what is in it is no certificate.
    #[error("the authorities are unreadable: {0}")]
    Authorities(String),
    /// Not one certificate, or none that is valid now.
    #[error("there is no authority that is valid now")]
    NoAuthority,
    /// Neither PEM nor DER of a revocation list.
    #[error("revocation list {list} is unreadable: {error}")]
    List {
        /// Its position among those given, from 0.
        list: usize,
        /// What is wrong with it.
        error: String,
    },
}

impl ClientTrust {
    /// Nobody is asked.
    pub fn none() -> Self {
        Self { verifier: None, fingerprint: [0; 32], warnings: Vec::new(), lists_end: None }
    }

    /// Trusts the authorities in `authorities` (PEM), less what `lists` (each PEM or DER) revoke, as of `now`.
    ///
    /// An authority past its time is left out; a list past its time refuses what it covers. Both make a
    /// [`warning`](Self::warnings).
    ///
    /// # Errors
    /// Every file that cannot be used.
    pub fn build(
        demand: ClientDemand,
        authorities: &[u8],
        lists: &[impl AsRef<[u8]>],
        provider: &Arc<CryptoProvider>,
        now: SystemTime,
    ) -> Result<Self, Vec<ClientTrustError>> {
        let now = unix_seconds(now);
        let mut warnings = Vec::new();
        let mut errors = Vec::new();
        let roots = roots(authorities, now, &mut warnings).map_err(|error| errors.push(error));
        let mut revoked = Vec::new();
        let mut lists_end = None;
        for (list, bytes) in lists.iter().enumerate() {
            match revocation_lists(bytes.as_ref()) {
                Ok(found) => {
                    for (der, end) in found {
                        if end < now {
                            warnings.push(format!(
                                "revocation list {list} is past its time; what it covers is refused until it is replaced"
                            ));
                        }
                        lists_end = Some(lists_end.map_or(end, |other: u64| other.min(end)));
                        revoked.push(der);
                    }
                }
                Err(error) => errors.push(ClientTrustError::List { list, error }),
            }
        }
        let Ok(roots) = roots else { return Err(errors) };
        let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
            .with_crls(revoked)
            .enforce_revocation_expiration();
        let builder = match demand {
            ClientDemand::Request => builder.allow_unauthenticated(),
            ClientDemand::Require => builder,
        };
        let verifier = builder.build().map_err(|error| {
            errors.push(ClientTrustError::List { list: 0, error: error.to_string() });
        });
        match verifier {
            Ok(verifier) if errors.is_empty() => Ok(Self {
                verifier: Some(verifier),
                fingerprint: fingerprint(demand, authorities, lists),
                warnings,
                lists_end,
            }),
            _ => Err(errors),
        }
    }

    /// Names all that decides: equal for equal settings, different for any other authority, list or demand.
    pub fn fingerprint(&self) -> &[u8; 32] {
        &self.fingerprint
    }

    /// What an operator should know of what was built.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// When the first revocation list ends (`nextUpdate`), in seconds since 1970.
    pub fn lists_end(&self) -> Option<u64> {
        self.lists_end
    }

    /// Whether a connection with this chain (its own certificate first; empty: none) would be made now.
    ///
    /// # Errors
    /// Why not. A chain where nobody is asked is an error too: nobody vouches for it.
    pub fn check(&self, chain: &[CertificateDer<'_>], now: SystemTime) -> Result<(), Error> {
        let now = UnixTime::since_unix_epoch(std::time::Duration::from_secs(unix_seconds(now)));
        match (&self.verifier, chain) {
            (None, []) => Ok(()),
            (None, _) => Err(Error::General("no client certificates are taken".to_owned())),
            (Some(verifier), []) if verifier.client_auth_mandatory() => Err(Error::NoCertificatesPresented),
            (Some(_), []) => Ok(()),
            (Some(verifier), [own, issuers @ ..]) => {
                verifier.verify_client_cert(own, issuers, now).map(|_| ())
            }
        }
    }

    pub(crate) fn verifier(&self) -> Arc<dyn ClientCertVerifier> {
        self.verifier.clone().unwrap_or_else(WebPkiClientVerifier::no_client_auth)
    }
}

impl fmt::Debug for ClientTrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTrust").field("asks", &self.verifier.is_some()).finish_non_exhaustive()
    }
}

fn roots(pem: &[u8], now: u64, warnings: &mut Vec<String>) -> Result<RootCertStore, ClientTrustError> {
    let unreadable = |error: &dyn fmt::Display| ClientTrustError::Authorities(error.to_string());
    let mut roots = RootCertStore::empty();
    for der in CertificateDer::pem_slice_iter(pem) {
        let der = der.map_err(|error| unreadable(&error))?;
        let (_, parsed) = X509Certificate::from_der(&der).map_err(|error| unreadable(&error))?;
        let validity = parsed.validity();
        let at = i64::try_from(now).unwrap_or(i64::MAX);
        if !(validity.not_before.timestamp()..=validity.not_after.timestamp()).contains(&at) {
            warnings.push(format!("the authority {} is not valid now, and not trusted", parsed.subject()));
            continue;
        }
        roots.add(der.clone()).map_err(|error| unreadable(&error))?;
    }
    if roots.is_empty() { Err(ClientTrustError::NoAuthority) } else { Ok(roots) }
}

/// The lists of a file, each with its end.
fn revocation_lists(bytes: &[u8]) -> Result<Vec<(CertificateRevocationListDer<'static>, u64)>, String> {
    // DER of a list begins with a SEQUENCE.
    let lists = if bytes.first() == Some(&0x30) {
        vec![CertificateRevocationListDer::from(bytes.to_vec())]
    } else {
        let lists = CertificateRevocationListDer::pem_slice_iter(bytes).collect::<Result<Vec<_>, _>>();
        lists.map_err(|error| error.to_string())?
    };
    if lists.is_empty() {
        return Err("there is none in it".to_owned());
    }
    let end = |der: CertificateRevocationListDer<'static>| {
        let (rest, list) = CertificateRevocationList::from_der(&der).map_err(|error| error.to_string())?;
        if !rest.is_empty() {
            return Err("bytes after the list".to_owned());
        }
        // RFC 5280 §5.1.2.5 wants one, and without it nobody would notice that a list is old.
        let end = list.next_update().ok_or("it has no nextUpdate")?.timestamp();
        Ok((der, u64::try_from(end).unwrap_or(0)))
    };
    lists.into_iter().map(end).collect()
}

fn fingerprint(demand: ClientDemand, authorities: &[u8], lists: &[impl AsRef<[u8]>]) -> [u8; 32] {
    let mut context = digest::Context::new(&digest::SHA256);
    context.update(&[match demand {
        ClientDemand::Request => 1,
        ClientDemand::Require => 2,
    }]);
    for bytes in std::iter::once(authorities).chain(lists.iter().map(AsRef::as_ref)) {
        context.update(&u64::try_from(bytes.len()).unwrap_or(u64::MAX).to_be_bytes());
        context.update(bytes);
    }
    sized(&context.finish())
}

fn sized(digest: &digest::Digest) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest.as_ref());
    bytes
}

/// What a client's certificate says. Says nothing of whether it is good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientFacts {
    /// SHA-256 over its DER form (RFC 8705 §3.1).
    pub thumbprint: [u8; 32],
    /// Subject as a text, such as `O=Example, CN=bot`.
    pub subject: String,
    /// Serial number in lower-case hexadecimal.
    pub serial: String,
    /// DNS names, lower case.
    pub dns: Vec<String>,
    /// URIs.
    pub uris: Vec<String>,
    /// Mail addresses.
    pub emails: Vec<String>,
    /// IP addresses.
    pub addresses: Vec<IpAddr>,
    /// `notAfter`, in seconds since 1970.
    pub expires_at: u64,
}

impl ClientFacts {
    /// Reads a certificate; `None` if it is none.
    pub fn read(der: &[u8]) -> Option<Self> {
        let ([], certificate) = X509Certificate::from_der(der).ok()? else { return None };
        let mut facts = Self {
            thumbprint: sized(&digest::digest(&digest::SHA256, der)),
            subject: certificate.subject().to_string(),
            serial: certificate.raw_serial().iter().map(|byte| format!("{byte:02x}")).collect(),
            dns: Vec::new(),
            uris: Vec::new(),
            emails: Vec::new(),
            addresses: Vec::new(),
            expires_at: u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0),
        };
        if let Some(names) = certificate.subject_alternative_name().ok()? {
            for name in &names.value.general_names {
                match name {
                    GeneralName::DNSName(name) => facts.dns.push(name.to_ascii_lowercase()),
                    GeneralName::URI(uri) => facts.uris.push((*uri).to_owned()),
                    GeneralName::RFC822Name(email) => facts.emails.push((*email).to_owned()),
                    GeneralName::IPAddress(bytes) => facts.addresses.extend(address(bytes)),
                    _ => {}
                }
            }
        }
        Some(facts)
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Authority, any_provider};

    fn build(
        demand: ClientDemand,
        authorities: &str,
        lists: &[Vec<u8>],
    ) -> Result<ClientTrust, Vec<ClientTrustError>> {
        ClientTrust::build(demand, authorities.as_bytes(), lists, &any_provider(), SystemTime::now())
    }

    #[test]
    fn a_chain_is_good_when_an_authority_vouches_for_it_and_no_list_revokes_it() {
        let (ours, other) = (Authority::new(), Authority::new());
        let (good, bad, foreign) = (ours.client_leaf("a"), ours.client_leaf("b"), other.client_leaf("c"));
        let now = SystemTime::now();
        let open = build(ClientDemand::Request, &ours.pem(), &[]).unwrap();
        assert!(open.check(&[], now).is_ok());
        assert!(
            open.check(std::slice::from_ref(&good), now).is_ok()
                && open.check(std::slice::from_ref(&bad), now).is_ok()
        );
        assert!(open.check(std::slice::from_ref(&foreign), now).is_err());

        let list = ours.revoke(&[&bad], now);
        let strict = build(ClientDemand::Require, &ours.pem(), std::slice::from_ref(&list)).unwrap();
        assert_eq!(strict.check(&[], now), Err(Error::NoCertificatesPresented));
        assert!(strict.check(std::slice::from_ref(&good), now).is_ok());
        let revoked = rustls::CertificateError::Revoked;
        assert_eq!(strict.check(&[bad], now), Err(Error::InvalidCertificate(revoked)));
        // A list that is past its time, or another authority's, covers nothing.
        let later = now + std::time::Duration::from_secs(3 * 24 * 60 * 60);
        assert!(strict.check(std::slice::from_ref(&good), later).is_err());
        let uncovered = build(ClientDemand::Require, &ours.pem(), &[other.revoke(&[], now)]).unwrap();
        assert!(uncovered.check(std::slice::from_ref(&good), now).is_err());
        // Nobody vouches where nobody is asked.
        assert!(ClientTrust::none().check(&[good], now).is_err());
        assert!(ClientTrust::none().check(&[], now).is_ok());
    }

    #[test]
    fn the_fingerprint_changes_with_all_that_decides() {
        let (ours, other) = (Authority::new(), Authority::new());
        let now = SystemTime::now();
        let list = ours.revoke(&[], now);
        let of = |demand, authorities: &str, lists: &[Vec<u8>]| {
            *build(demand, authorities, lists).unwrap().fingerprint()
        };
        let base = of(ClientDemand::Request, &ours.pem(), &[]);
        assert_eq!(base, of(ClientDemand::Request, &ours.pem(), &[]));
        let different = [
            of(ClientDemand::Require, &ours.pem(), &[]),
            of(ClientDemand::Request, &other.pem(), &[]),
            of(ClientDemand::Request, &(ours.pem() + &other.pem()), &[]),
            of(ClientDemand::Request, &ours.pem(), std::slice::from_ref(&list)),
            of(ClientDemand::Request, &ours.pem(), &[list.clone(), list]),
            *ClientTrust::none().fingerprint(),
        ];
        for (place, print) in different.iter().enumerate() {
            assert!(*print != base && !different[..place].contains(print), "{place}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        let ours = Authority::new();
        let errors = |authorities: &str, lists: &[Vec<u8>]| {
            build(ClientDemand::Require, authorities, lists).unwrap_err()
        };
        assert_eq!(errors("", &[]), [ClientTrustError::NoAuthority]);
        assert_eq!(errors("junk", &[]), [ClientTrustError::NoAuthority]);
        let cut = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        assert!(matches!(errors(cut, &[])[..], [ClientTrustError::Authorities(_)]));
        for list in [b"".to_vec(), b"junk".to_vec(), vec![0x30, 0x80], ours.pem().into_bytes()] {
            assert!(matches!(errors(&ours.pem(), &[list])[..], [ClientTrustError::List { list: 0, .. }]));
        }
        assert_eq!(errors("", &[b"junk".to_vec()]).len(), 2, "all at once");
    }

    #[test]
    fn a_list_past_its_time_is_a_warning_and_refuses() {
        let ours = Authority::new();
        let long_ago = SystemTime::now() - std::time::Duration::from_secs(30 * 24 * 60 * 60);
        let trust = build(ClientDemand::Request, &ours.pem(), &[ours.revoke(&[], long_ago)]).unwrap();
        assert_eq!(trust.warnings().len(), 1);
        assert!(trust.check(&[ours.client_leaf("a")], SystemTime::now()).is_err());
        assert!(trust.check(&[], SystemTime::now()).is_ok());
    }

    #[test]
    fn facts_are_those_of_the_certificate() {
        let leaf = Authority::new().client_leaf("bot.example");
        let facts = ClientFacts::read(&leaf).unwrap();
        assert_eq!(facts.subject, "CN=bot.example");
        assert_eq!(facts.dns, ["bot.example"]);
        assert_eq!(facts.thumbprint, sized(&digest::digest(&digest::SHA256, &leaf)));
        assert!(ClientFacts::read(b"junk").is_none() && ClientFacts::read(&leaf[..leaf.len() - 1]).is_none());
    }
}
