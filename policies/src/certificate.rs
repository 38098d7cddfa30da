//! Client certificates: who is asked for one, and what a rule may want of it.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::denial::Denial;
use crate::policy::Source;

/// A client certificate that TLS has verified. Only what verifies one should make one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// SHA-256 over its DER form, `x5t#S256` (RFC 8705 §3.1).
    pub thumbprint: [u8; 32],
    /// Subject as a text, such as `O=Example, CN=bot`.
    pub subject: String,
    /// Serial number in lower-case hexadecimal.
    pub serial: String,
    /// Subject alternative names, in the certificate's order.
    pub names: Vec<CertificateName>,
    /// `notAfter`, unix seconds.
    pub expires_at: u64,
}

/// A subject alternative name (RFC 5280 §4.2.1.6).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum CertificateName {
    /// A DNS name, lower case; may be a wildcard.
    Dns(String),
    /// A URI, such as a SPIFFE id.
    Uri(String),
    /// A mail address.
    Email(String),
    /// An IP address.
    Ip(IpAddr),
}

/// Whether clients are asked for a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ClientMode {
    /// They are not.
    #[default]
    None,
    /// They are, and may have none. One that cannot be verified is refused all the same.
    Request,
    /// Without one there is no handshake.
    Require,
}

/// What is said upstream of a verified client certificate, in fields that clients cannot send (RFC 9440).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ForwardCertificate {
    /// Nothing.
    None,
    /// `Client-Cert`.
    #[default]
    Certificate,
    /// `Client-Cert`, and `Client-Cert-Chain` with what the client sent beside it.
    Chain,
}

/// `[tls.client]`, or one of its overrides with what it takes from there.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ClientAuthentication {
    /// Whether clients are asked.
    pub mode: ClientMode,
    /// PEM of the authorities that certificates are trusted by; there unless `mode` is none.
    pub ca: Option<Source>,
    /// Revocation lists, PEM or DER. With any, each certificate of a chain must be covered by one that is still valid.
    pub crls: Vec<Source>,
    /// What upstreams are told.
    pub forward: ForwardCertificate,
}

/// Points into [`ClientZones::all`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct ClientZone(pub usize);

/// Who is asked for a certificate: by the name that the client asks for (SNI), and by the port that it came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientZones {
    /// The first is `[tls.client]`; then its overrides, in the file's order.
    pub(crate) all: Vec<ClientAuthentication>,
    exact: HashMap<Box<str>, Vec<Place>>,
    /// By the name without its first label.
    wildcard: HashMap<Box<str>, Vec<Place>>,
    any: Vec<Place>,
}

/// A zone, and the port that it is for; none: all.
type Place = (Option<u16>, ClientZone);

impl ClientZones {
    pub(crate) fn new(default: ClientAuthentication) -> Self {
        Self { all: vec![default], exact: HashMap::new(), wildcard: HashMap::new(), any: Vec::new() }
    }

    /// Adds an override for a name (`*.` and one for a wildcard; none: all names) and a port (none: all).
    ///
    /// # Errors
    /// There is one for both.
    pub(crate) fn place(
        &mut self,
        name: Option<&str>,
        port: Option<u16>,
        zone: ClientZone,
    ) -> Result<(), ()> {
        let places = match name.map(|name| name.strip_prefix("*.").ok_or(name)) {
            None => &mut self.any,
            Some(Ok(parent)) => self.wildcard.entry(parent.into()).or_default(),
            Some(Err(name)) => self.exact.entry(name.into()).or_default(),
        };
        if places.iter().any(|(other, _)| *other == port) {
            return Err(());
        }
        places.push((port, zone));
        Ok(())
    }

    /// All of them; [`ClientZone`] points into this slice.
    pub fn all(&self) -> &[ClientAuthentication] {
        &self.all
    }

    /// Whether the client's name has to be known before it is known how to answer it.
    pub fn by_name(&self) -> bool {
        !self.exact.is_empty() || !self.wildcard.is_empty()
    }

    /// The zone of a name (lower case, none if the client named none) and the port that the client came to: that of the
    /// name itself before a wildcard's, a wildcard's before one of all names; among these the port's own before any.
    pub fn of(&self, name: Option<&str>, port: u16) -> ClientZone {
        if self.all.len() == 1 {
            return ClientZone(0);
        }
        let exact = name.and_then(|name| self.exact.get(name));
        let wildcard = name.and_then(|name| self.wildcard.get(name.split_once('.')?.1));
        let places = [exact, wildcard, Some(&self.any)];
        let best = places.into_iter().flatten().find_map(|places| {
            let of = |port| places.iter().find(|(other, _)| *other == port);
            of(Some(port)).or_else(|| of(None))
        });
        best.map_or(ClientZone(0), |(_, zone)| *zone)
    }
}

/// A rule that wants a client certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CertificateRule {
    /// Of which one must fit; empty: any certificate does.
    pub(crate) names: Vec<NamePattern>,
}

/// What a certificate may be named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NamePattern {
    Dns(String),
    /// One label, then this.
    DnsBelow(String),
    Uri(String),
    /// A URI that begins so.
    UriBelow(String),
    Email(String),
    Ip(IpAddr),
    Subject(String),
}

impl NamePattern {
    /// Reads `dns:NAME`, `dns:*.NAME`, `uri:URI`, `uri:PREFIX/*`, `email:ADDRESS`, `ip:ADDRESS` or `subject:TEXT`.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        const EXPECTED: &str = "expected \"dns:NAME\", \"dns:*.NAME\", \"uri:URI\", \"uri:PREFIX/*\", \
                                \"email:ADDRESS\", \"ip:ADDRESS\" or \"subject:TEXT\"";
        let (kind, value) = text.split_once(':').filter(|(_, value)| !value.is_empty()).ok_or(EXPECTED)?;
        let host = |name: &str| {
            let fine = name
                .bytes()
                .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.'));
            fine && name.split('.').all(|label| !label.is_empty())
        };
        match (kind, value.strip_prefix("*."), value.strip_suffix("/*")) {
            ("dns", Some(parent), _) if host(parent) => Ok(Self::DnsBelow(parent.to_owned())),
            ("dns", None, _) if host(value) => Ok(Self::Dns(value.to_owned())),
            ("uri", _, Some(prefix)) if prefix.contains("://") => Ok(Self::UriBelow(format!("{prefix}/"))),
            ("uri", _, None) if !value.contains('*') => Ok(Self::Uri(value.to_owned())),
            ("email", ..) if value.contains('@') => Ok(Self::Email(value.to_owned())),
            ("ip", ..) => value.parse().map(Self::Ip).map_err(|_| EXPECTED),
            ("subject", ..) => Ok(Self::Subject(value.to_owned())),
            _ => Err(EXPECTED),
        }
    }

    fn fits(&self, certificate: &ClientCertificate) -> bool {
        use CertificateName as Name;
        certificate.names.iter().any(|name| match (self, name) {
            (Self::Dns(wanted), Name::Dns(name)) => wanted == name,
            (Self::DnsBelow(parent), Name::Dns(name)) => {
                // A certificate for `*.parent` is not one of `parent`'s hosts, but may be any of them.
                name.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == parent)
            }
            (Self::Uri(wanted), Name::Uri(name)) => wanted == name,
            (Self::UriBelow(prefix), Name::Uri(name)) => {
                name.len() > prefix.len() && name.starts_with(prefix.as_str())
            }
            (Self::Email(wanted), Name::Email(name)) => wanted == name,
            (Self::Ip(wanted), Name::Ip(name)) => wanted == name,
            _ => false,
        }) || matches!(self, Self::Subject(wanted) if *wanted == certificate.subject)
    }
}

impl CertificateRule {
    /// # Errors
    /// [`Denial::ClientCertificateMissing`], [`Denial::ClientCertificateNotAllowed`].
    pub(crate) fn check(&self, certificate: Option<&ClientCertificate>) -> Result<(), Denial> {
        let certificate = certificate.ok_or(Denial::ClientCertificateMissing)?;
        if self.names.is_empty() || self.names.iter().any(|name| name.fits(certificate)) {
            Ok(())
        } else {
            Err(Denial::ClientCertificateNotAllowed)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_specific_zone_counts() {
        let mut zones = ClientZones::new(ClientAuthentication::default());
        assert_eq!(zones.of(Some("a.example"), 443), ClientZone(0));
        zones.all.resize(6, ClientAuthentication::default());
        let places = [
            (Some("a.example"), None, 1),
            (Some("a.example"), Some(8443), 2),
            (Some("*.example"), None, 3),
            (None, Some(8443), 4),
            (Some("*.example"), Some(9443), 5),
        ];
        for (name, port, zone) in places {
            assert_eq!(zones.place(name, port, ClientZone(zone)), Ok(()));
            assert_eq!(zones.place(name, port, ClientZone(zone)), Err(()));
        }
        let cases = [
            (Some("a.example"), 443, 1),
            (Some("a.example"), 8443, 2),
            (Some("b.example"), 443, 3),
            (Some("b.example"), 8443, 3),
            (Some("b.example"), 9443, 5),
            (Some("b.b.example"), 443, 0),
            (Some("example"), 443, 0),
            (Some("other"), 8443, 4),
            (None, 8443, 4),
            (None, 443, 0),
        ];
        for (name, port, zone) in cases {
            assert_eq!(zones.of(name, port), ClientZone(zone), "{name:?}:{port}");
        }
    }

    #[test]
    fn names_fit_exactly_and_below() {
        let certificate = ClientCertificate {
            thumbprint: [1; 32],
            subject: "O=Example, CN=bot".into(),
            serial: "0a".into(),
            names: vec![
                CertificateName::Dns("bot.svc.example".into()),
                CertificateName::Uri("spiffe://example/ns/chat/bot".into()),
                CertificateName::Email("bot@example".into()),
                CertificateName::Ip([10, 0, 0, 1].into()),
            ],
            expires_at: 0,
        };
        let check = |names: &[&str]| {
            let names = names.iter().map(|name| NamePattern::parse(name).unwrap()).collect();
            CertificateRule { names }.check(Some(&certificate))
        };
        let fitting = [
            "dns:bot.svc.example",
            "dns:*.svc.example",
            "uri:spiffe://example/ns/chat/bot",
            "uri:spiffe://example/ns/*",
            "email:bot@example",
            "ip:10.0.0.1",
            "subject:O=Example, CN=bot",
        ];
        for name in fitting {
            assert_eq!(check(&[name]), Ok(()), "{name}");
            assert_eq!(check(&["dns:other", name]), Ok(()), "{name}");
        }
        let others = [
            "dns:svc.example",
            "dns:*.example",
            "dns:ot.svc.example",
            "uri:spiffe://example/ns/chat",
            "uri:spiffe://example/ns/chat/bot/*",
            "uri:spiffe://example/n/*",
            "email:BOT@example",
            "ip:10.0.0.2",
            "subject:CN=bot",
        ];
        for name in others {
            assert_eq!(check(&[name]), Err(Denial::ClientCertificateNotAllowed), "{name}");
        }
        assert_eq!(check(&[]), Ok(()));
        let any = CertificateRule { names: Vec::new() };
        assert_eq!(any.check(None), Err(Denial::ClientCertificateMissing));
    }

    #[test]
    fn what_is_no_name_is_told() {
        for bad in [
            "",
            "bot",
            "dns:",
            "dns:Bot.example",
            "dns:*",
            "dns:*.",
            "dns:a.*.b",
            "dns:a..b",
            "uri:*",
            "ip:x",
        ] {
            assert!(NamePattern::parse(bad).is_err(), "{bad}");
        }
        for bad in ["uri:spiffe*", "uri:a/*", "email:bot", "user:x"] {
            assert!(NamePattern::parse(bad).is_err(), "{bad}");
        }
    }
}
