//! `[[acme]]` and `[[certificate]]` → where certificates come from.

use std::collections::HashMap;

use super::{Compiler, DAY, HOUR};
use crate::document::{AcmeChallengeDocument, AcmeDocument, CertificateDocument};
use crate::policy::{
    AcmeAuthority, AcmeChallenge, CertificateOrigin, CertificateSource, ExternalAccount, Source,
};
use crate::routes::Host;

/// Most names of one certificate that is issued by ACME; Let's Encrypt's limit.
const MAX_NAMES: usize = 100;

impl Compiler<'_> {
    pub(super) fn acme(
        &mut self,
        at: &str,
        document: &AcmeDocument,
        names: &mut HashMap<String, String>,
    ) -> AcmeAuthority {
        let d = document;
        let is_https = d.directory.parse::<http::Uri>().is_ok_and(|uri| {
            let authority = uri.authority().map(|authority| authority.as_str().to_owned());
            uri.scheme_str() == Some("https") && authority.is_some_and(|authority| !authority.contains('@'))
        });
        if !is_https {
            self.error(&format!("{at}/directory"), "expected an \"https:\" URL without credentials");
        }
        for (index, contact) in d.contact.iter().enumerate() {
            let address = contact.strip_prefix("mailto:").and_then(|address| address.split_once('@'));
            let fits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
            if !address
                .is_some_and(|(user, host)| fits(user) && fits(host) && !host.contains(['@', '?', ',']))
            {
                let message = "expected \"mailto:\" and one address";
                self.error(&format!("{at}/contact/{index}"), message);
            }
        }
        if !d.terms_agreed {
            let message = "expected true: read the authority's terms of service, and agree to them";
            self.error(&format!("{at}/terms_agreed"), message);
        }
        let mut challenges = Vec::new();
        let default = [AcmeChallengeDocument::TlsAlpn, AcmeChallengeDocument::Http];
        for (index, challenge) in d.challenges.as_deref().unwrap_or(&default).iter().enumerate() {
            let challenge = match challenge {
                AcmeChallengeDocument::Http => AcmeChallenge::Http,
                AcmeChallengeDocument::TlsAlpn => AcmeChallenge::TlsAlpn,
            };
            if challenges.contains(&challenge) {
                self.error(&format!("{at}/challenges/{index}"), "the challenge stands twice");
            }
            challenges.push(challenge);
        }
        let external_account = d.external_account.as_ref().map(|external| ExternalAccount {
            id: external.id.clone(),
            key: self.source(&format!("{at}/external_account/key"), &external.key),
        });
        let renew_before = d
            .renew_before
            .map(|text| self.duration(&format!("{at}/renew_before"), Some(text), DAY, HOUR..=DAY * 365));
        AcmeAuthority {
            name: self.unique(at, &d.name, names),
            directory: d.directory.clone(),
            contact: d.contact.clone(),
            ca: d.ca.as_ref().map(|ca| self.source(&format!("{at}/ca"), ca)),
            challenges,
            external_account,
            renew_before,
        }
    }

    pub(super) fn certificate(
        &mut self,
        at: &str,
        document: &CertificateDocument,
        acme: &[AcmeAuthority],
    ) -> CertificateSource {
        let d = document;
        for (index, name) in d.names.iter().enumerate() {
            let (message, fits) = match (Host::parse(name), &d.acme) {
                (Ok(Host::Exact(_)), None) | (Ok(Host::Wildcard(_)), None) => continue,
                (Ok(Host::Exact(_)), Some(_)) => {
                    ("expected a host name: no address can be validated", is_dns_name(name))
                }
                (Ok(Host::Wildcard(_)), Some(_)) => {
                    ("expected an exact name: neither http-01 nor tls-alpn-01 validates a wildcard", false)
                }
                _ => ("expected a host name in lower case, or \"*.\" and one", false),
            };
            if !fits {
                self.error(&format!("{at}/names/{index}"), message);
            }
        }
        let origin = match (&d.acme, &d.chain, &d.key) {
            (None, Some(chain), Some(key)) => CertificateOrigin::Given {
                chain: self.source(&format!("{at}/chain"), chain),
                key: self.source(&format!("{at}/key"), key),
            },
            (Some(name), None, None) => {
                if d.names.is_empty() || d.names.len() > MAX_NAMES {
                    let message = format!("expected 1 to {MAX_NAMES} names that it is to be issued for");
                    self.error(&format!("{at}/acme"), message);
                }
                if let Some(index) = acme.iter().position(|authority| *authority.name == **name) {
                    CertificateOrigin::Acme(index)
                } else {
                    self.error(&format!("{at}/acme"), format!("`{name}` is no [[acme]]"));
                    nothing()
                }
            }
            _ => {
                self.error(at, "expected chain and key, or acme");
                nothing()
            }
        };
        CertificateSource { names: d.names.clone(), origin }
    }
}

/// Something harmless: there is an error, so it is not used.
fn nothing() -> CertificateOrigin {
    CertificateOrigin::Given { chain: Source::Env(String::new()), key: Source::Env(String::new()) }
}

/// A name of several labels that is no IP address: what a public authority issues for, and what may stand in a file's name.
fn is_dns_name(name: &str) -> bool {
    name.contains('.')
        && !name.starts_with('.')
        && !name.ends_with('.')
        && name.parse::<std::net::IpAddr>().is_err()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte))
}
