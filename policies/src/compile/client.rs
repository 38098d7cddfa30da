//! `[tls.client]` → who is asked for a certificate.

use std::sync::Arc;

use crate::certificate::{ClientAuthentication, ClientMode, ClientZone, ClientZones, ForwardCertificate};
use crate::compile::Compiler;
use crate::document::{ClientAuthDocument, ClientModeDocument, ForwardDocument};
use crate::policy::{Issuer, Sender, Source};
use crate::routes::Host;
use crate::rule::Rule;

impl Compiler<'_> {
    pub(super) fn client_zones(&mut self, document: &ClientAuthDocument) -> ClientZones {
        let d = document;
        let default = ClientAuthentication {
            mode: d.mode.map_or(ClientMode::None, mode),
            ca: d.ca.as_ref().map(|ca| self.source("/tls/client/ca", ca)),
            crls: self.crls("/tls/client/crls", &d.crls),
            forward: d.forward.map_or(ForwardCertificate::default(), forward),
        };
        self.complete("/tls/client", &default);
        let mut zones = ClientZones::new(default.clone());
        for (index, d) in d.overrides.iter().enumerate() {
            let at = format!("/tls/client/override/{index}");
            let crls = match (&d.crls, &d.ca) {
                (Some(crls), _) => self.crls(&format!("{at}/crls"), crls),
                // Lists of other authorities: with them no certificate of these would be good.
                (None, Some(_)) => Vec::new(),
                (None, None) => default.crls.clone(),
            };
            let zone = ClientAuthentication {
                mode: d.mode.map_or(default.mode, mode),
                ca: d.ca.as_ref().map(|ca| self.source(&format!("{at}/ca"), ca)).or(default.ca.clone()),
                crls,
                forward: d.forward.map_or(default.forward, forward),
            };
            self.complete(&at, &zone);
            let place = ClientZone(zones.all.len());
            zones.all.push(zone);
            if d.names.is_empty() && d.ports.is_empty() {
                self.error(&at, "expected names or ports that it is for");
            }
            for (index, name) in d.names.iter().enumerate() {
                if !matches!(Host::parse(name), Ok(Host::Exact(_) | Host::Wildcard(_))) || name.contains(':')
                {
                    let message = "expected a host name in lower case, or \"*.\" and one";
                    self.error(&format!("{at}/names/{index}"), message);
                }
            }
            let names = d.names.iter().map(|name| Some(name.as_str()));
            let names: Vec<_> = if d.names.is_empty() { vec![None] } else { names.collect() };
            let ports = d.ports.iter().map(|port| Some(*port));
            let ports: Vec<_> = if d.ports.is_empty() { vec![None] } else { ports.collect() };
            for name in names {
                for port in &ports {
                    if zones.place(name, *port, place).is_err() {
                        let name = name.unwrap_or("all names");
                        let port = port.map_or_else(|| "all ports".to_owned(), |port| format!("port {port}"));
                        self.error(&at, format!("{name} at {port} stands twice"));
                    }
                }
            }
        }
        zones
    }

    fn crls(&mut self, at: &str, list: &[String]) -> Vec<Source> {
        list.iter().enumerate().map(|(index, crl)| self.source(&format!("{at}/{index}"), crl)).collect()
    }

    fn complete(&mut self, at: &str, zone: &ClientAuthentication) {
        if zone.mode != ClientMode::None && zone.ca.is_none() {
            self.error(at, "expected a ca that clients' certificates are trusted by");
        }
        if zone.ca.is_none() && !zone.crls.is_empty() {
            self.error(at, "crls belong to a ca");
        }
    }

    /// What wants a client certificate must be able to get one.
    pub(super) fn wanted_certificates(
        &mut self,
        zones: &ClientZones,
        issuers: &[Issuer],
        rules: &[Arc<Rule>],
    ) {
        if zones.all().iter().any(|zone| zone.mode != ClientMode::None) {
            return;
        }
        let message = "wants client certificates, and no client is asked for one; see tls.client.mode";
        if let Some(index) = issuers.iter().position(|issuer| issuer.sender == Sender::Mtls) {
            self.error(&format!("/issuer/{index}/sender"), message);
        }
        if let Some(rule) =
            rules.iter().find(|rule| rule.sender == Sender::Mtls || rule.certificate.is_some())
        {
            let at = self.rule_names.get(&*rule.name).cloned().unwrap_or_default();
            self.error(&at, message);
        }
    }
}

const fn mode(document: ClientModeDocument) -> ClientMode {
    match document {
        ClientModeDocument::None => ClientMode::None,
        ClientModeDocument::Request => ClientMode::Request,
        ClientModeDocument::Require => ClientMode::Require,
    }
}

const fn forward(document: ForwardDocument) -> ForwardCertificate {
    match document {
        ForwardDocument::None => ForwardCertificate::None,
        ForwardDocument::Certificate => ForwardCertificate::Certificate,
        ForwardDocument::Chain => ForwardCertificate::Chain,
    }
}
