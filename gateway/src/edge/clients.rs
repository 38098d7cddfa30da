//! Client certificates: what is asked of whom, and what a connection has shown.

use std::{collections::HashSet, sync::Arc, time::SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use http::HeaderValue;
use rustls::pki_types::CertificateDer;
use sealgate_keys::{CertificateStore, ClientFacts, ClientTrust, ServerConfigs};
use sealgate_policy::{CertificateName, ClientCertificate, ClientZones, ForwardCertificate};

/// TLS for the clients of one name and port.
pub struct Zone {
    /// Their TLS configurations.
    pub configs: ServerConfigs,
    /// Which of their certificates are good.
    pub trust: ClientTrust,
    /// What upstreams are told of these.
    pub forward: ForwardCertificate,
}

/// TLS for all clients. Part of the snapshot.
pub struct Zones {
    /// As [`ClientZones::all`], and never empty.
    all: Vec<Zone>,
    places: ClientZones,
    store: Arc<CertificateStore>,
    /// Names that no certificate has are refused.
    refuses_unknown: bool,
    /// Names whose certificates are to be issued yet, lower case: refused until they are.
    awaited: HashSet<String>,
}

/// A zone that is not there: the policy and what was built of it differ.
#[derive(Debug, thiserror::Error)]
#[error("internal: no TLS configuration for some clients")]
pub struct NoZone;

impl Zones {
    /// `all` are the zones of `places`, in that order; `refuses_unknown` is the policy's wish, and holds anyway where `store` has no
    /// certificate for unknown names. `awaited` are names whose certificates are not there yet: another one would not do.
    ///
    /// # Errors
    ///
    /// They are not as many.
    pub fn new(
        places: ClientZones,
        all: Vec<Zone>,
        store: Arc<CertificateStore>,
        refuses_unknown: bool,
        awaited: HashSet<String>,
    ) -> Result<Self, NoZone> {
        if all.len() != places.all().len() || all.is_empty() {
            return Err(NoZone);
        }
        let refuses_unknown = refuses_unknown || !store.has_default();
        Ok(Self { all, places, store, refuses_unknown, awaited })
    }

    /// Whether somebody is here by the name that a client asks for; a client that names none is always answered.
    pub fn knows(&self, name: Option<&str>) -> bool {
        name.is_none_or(|name| {
            let known = !self.refuses_unknown || self.store.names(name);
            // A wildcard may have it meanwhile.
            known && (!self.awaited.contains(name) || self.store.names(name))
        })
    }

    /// Whether HTTPS is served for a host (lower case, an IPv6 address without brackets), or will be.
    pub fn serves(&self, host: &str) -> bool {
        self.store.covers(host) || self.awaited.contains(host)
    }

    /// The zone of a client that asks for `name` (none: names none) at `port`.
    ///
    /// # Errors
    ///
    /// Never, with zones made by [`Zones::new`]; refuse the client.
    pub fn of(&self, name: Option<&str>, port: u16) -> Result<&Zone, NoZone> {
        self.all.get(self.places.of(name, port).0).ok_or(NoZone)
    }

    /// Whether the client's name has to be known before it is answered.
    pub fn by_name(&self) -> bool {
        self.places.by_name() || self.refuses_unknown || !self.awaited.is_empty()
    }

    /// Whether all clients are treated alike.
    pub fn only_one(&self) -> bool {
        self.all.len() == 1
    }

    /// All zones.
    pub fn all(&self) -> &[Zone] {
        &self.all
    }
}

/// A certificate that a client has shown and that was good then.
pub struct Client {
    /// What it says.
    pub certificate: ClientCertificate,
    /// Its own first.
    chain: Vec<CertificateDer<'static>>,
    /// Ready fields for upstreams.
    own: HeaderValue,
    issuers: Option<HeaderValue>,
    thumbprint: HeaderValue,
}

impl Client {
    /// Reads a chain that TLS has verified; `None` if the first of it is no certificate after all.
    #[must_use]
    pub fn read(chain: &[CertificateDer<'_>]) -> Option<Self> {
        let (own, issuers) = chain.split_first()?;
        let facts = ClientFacts::read(own)?;
        // RFC 9440 §2.1: a byte sequence (RFC 8941 §3.3.5).
        let sequence = |der: &CertificateDer<'_>| format!(":{}:", STANDARD.encode(der));
        let issued: Vec<_> = issuers.iter().map(sequence).collect();
        let dns = facts.dns.into_iter().map(CertificateName::Dns);
        let uris = facts.uris.into_iter().map(CertificateName::Uri);
        let emails = facts.emails.into_iter().map(CertificateName::Email);
        let addresses = facts.addresses.into_iter().map(CertificateName::Ip);
        Some(Self {
            own: HeaderValue::try_from(sequence(own)).ok()?,
            issuers: (!issued.is_empty()).then(|| HeaderValue::try_from(issued.join(", ")).ok()).flatten(),
            thumbprint: HeaderValue::try_from(URL_SAFE_NO_PAD.encode(facts.thumbprint)).ok()?,
            certificate: ClientCertificate {
                thumbprint: facts.thumbprint,
                subject: facts.subject,
                serial: facts.serial,
                names: dns.chain(uris).chain(emails).chain(addresses).collect(),
                expires_at: facts.expires_at,
            },
            chain: chain.iter().map(|der| der.clone().into_owned()).collect(),
        })
    }

    /// Whether a zone takes it now.
    #[must_use]
    pub fn is_good(&self, zone: &Zone) -> bool {
        zone.trust.check(&self.chain, SystemTime::now()).is_ok()
    }

    /// `Client-Cert` (RFC 9440 §2.2).
    #[must_use]
    pub fn own(&self) -> HeaderValue {
        self.own.clone()
    }

    /// `Client-Cert-Chain` (RFC 9440 §2.3); `None` if the client sent its own alone.
    #[must_use]
    pub fn issuers(&self) -> Option<HeaderValue> {
        self.issuers.clone()
    }

    /// `x5t#S256` (RFC 8705 §3.1).
    #[must_use]
    pub fn thumbprint(&self) -> HeaderValue {
        self.thumbprint.clone()
    }

    /// The same, for records.
    #[must_use]
    pub fn thumbprint_text(&self) -> &str {
        self.thumbprint.to_str().unwrap_or_default()
    }
}
