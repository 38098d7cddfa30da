//! Read, build, swap, report: how a policy comes into force.
//!
//! Nothing is live until all of it is built; a bundle that does not load whole changes nothing. What a
//! snapshot does not hold (rate cells, open sockets, revocations) is untouched by a reload.

mod files;

use std::{
    collections::{BTreeMap, HashSet},
    io::Read as _,
    path::PathBuf,
    sync::Arc,
    time::SystemTime,
};

use arc_swap::ArcSwap;
use ring::digest;
use rustls::{NamedGroup, crypto::CryptoProvider, version};
use sealgate_keys::{
    CertificateEntry, CertificateError, CertificateInfo, CertificateStore, ClientDemand, ClientTrust,
    ClientTrustError, ProviderChoice, ServerConfigs, TicketKeys,
};
use sealgate_policy::{
    Bundle, CertificateOrigin, ClientAuthentication, ClientMode, Group, Policy, PolicyError, PolicyErrors,
    Source, TlsVersions,
};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot, watch};
use zeroize::Zeroizing;

pub use self::files::watch_files;
use crate::{
    acme::{Acme, Authority, Wanted},
    clock,
    edge::{Zone, Zones},
    events::EventSource,
    http::AnswerFields,
    limits::{
        ConcurrencyLimits, InFlight, Listed, Lists, ListsBuilder, Penalties, PenaltyStore, RateClock,
        RateStore, Rates,
    },
    metrics::{Metrics, RouteMetrics},
    session::{KeyFetcher, Verifier},
    shared::Servers,
    upstream::{EndpointIds, Upstreams},
};

/// Largest certificate, key or JWKS file.
const MAX_SECRET_BYTES: u64 = 1024 * 1024;

/// Largest list of addresses, bundle of authorities or revocation list.
const MAX_LIST_BYTES: u64 = 64 * 1024 * 1024;

/// A certificate with less time left is spoken of, in seconds: renewal was due before.
const EXPIRES_SOON: u64 = 7 * 24 * 60 * 60;

/// One immutable state of all that a reload can change. A unit of work takes one and keeps it to its
/// end.
pub struct Snapshot {
    /// Counts the snapshots of this process, from 1.
    pub generation: u64,
    /// The rules.
    pub policy: Policy,
    /// TLS for new connections, and what is asked of clients.
    pub tls: Zones,
    /// Who may have issued a token, and their keys.
    pub verifier: Verifier,
    /// The policy's rates over the process's cells.
    pub rates: Arc<Rates>,
    /// The policy's penalties over the process's records.
    pub penalties: Penalties,
    /// The policy's limits of what is under way.
    pub concurrency: ConcurrencyLimits,
    /// Addresses that may or may not connect.
    pub lists: Lists,
    /// Through what it agrees with other gateways. The same for as long as nothing of it changes.
    pub shared: Option<Arc<Servers>>,
    /// Services that say what is revoked.
    pub sources: Arc<[Arc<EventSource>]>,
    /// Where permits lead.
    pub upstreams: Upstreams,
    /// Counters of the rules.
    pub metrics: RouteMetrics,
    /// Fields of answers.
    pub answers: AnswerFields,
    /// Files that this snapshot was made of, beside the bundle's.
    pub files: Vec<PathBuf>,
    /// The servers' certificates.
    pub certificates: Vec<CertificateRow>,
    /// Certificates that ACME authorities issue, there or not.
    pub acme: Vec<Wanted>,
    warnings: Vec<String>,
    fingerprint: [u8; 32],
}

/// Where the policy comes from. Fixed at the start.
#[derive(Clone, Debug)]
pub struct PolicySource {
    /// The bundle's folder.
    pub bundle: PathBuf,
    /// `--define name=value`, and `state`.
    pub variables: BTreeMap<String, String>,
}

/// Why a policy was not taken. All of its faults at once.
#[derive(Debug, thiserror::Error, Serialize, Deserialize)]
#[error("{}", self.text())]
pub struct LoadError {
    /// One for each fault, in the order of the files.
    pub errors: Vec<Fault>,
}

/// One fault of a policy.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Fault {
    /// In a file of the bundle.
    Policy(PolicyError),
    /// In something that the bundle names: a certificate, a key, a host.
    Other {
        /// What is wrong with it.
        message: String,
    },
}

impl LoadError {
    fn all<E: std::fmt::Display>(faults: Vec<E>) -> Self {
        let errors = faults.iter().map(|fault| Fault::Other { message: fault.to_string() }).collect();
        Self { errors }
    }

    fn other(message: impl std::fmt::Display) -> Self {
        Self { errors: vec![Fault::Other { message: message.to_string() }] }
    }

    fn text(&self) -> String {
        let texts = self.errors.iter().map(|fault| match fault {
            Fault::Policy(error) => error.to_string(),
            Fault::Other { message } => format!("error: {message}"),
        });
        texts.collect::<Vec<_>>().join("\n")
    }
}

impl From<PolicyErrors> for LoadError {
    fn from(errors: PolicyErrors) -> Self {
        Self { errors: errors.0.into_iter().map(Fault::Policy).collect() }
    }
}

/// What an operator is shown of a certificate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CertificateRow {
    /// The names that it is served for, or `default`.
    pub names: String,
    /// Its subject.
    pub subject: String,
    /// Its issuer.
    pub issuer: String,
    /// Serial number in lower-case hexadecimal.
    pub serial: String,
    /// Kind of its key: `ECDSA`, `Ed25519` or `RSA`.
    pub key: String,
    /// When it becomes valid, in seconds since 1970.
    pub not_before: u64,
    /// When it expires, in seconds since 1970.
    pub expires_at: u64,
}

impl From<&CertificateInfo> for CertificateRow {
    fn from(info: &CertificateInfo) -> Self {
        let CertificateInfo { names, subject, issuer, serial, key, not_before, expires_at } = info.clone();
        Self { names, subject, issuer, serial, key: key.to_owned(), not_before, expires_at }
    }
}

impl CertificateRow {
    /// What is to be said of it at `now` (unix seconds): that it has expired, or soon will; nothing while it is fine.
    #[must_use]
    pub fn alarm(&self, now: u64) -> Option<String> {
        let Self { names, key, expires_at, .. } = self;
        match expires_at.checked_sub(now) {
            None => Some(format!("the {key} certificate for {names} has expired")),
            Some(left) if left < EXPIRES_SOON => {
                Some(format!("the {key} certificate for {names} expires in {} h", left / 3600))
            }
            Some(_) => None,
        }
    }
}

/// What a snapshot is built from, read in one go.
pub struct Material {
    policy: Policy,
    /// Each with where it comes from.
    certificates: Vec<(CertificateEntry, String)>,
    acme: Vec<Wanted>,
    /// Names of certificates that are to be issued yet, and why they are not there.
    awaited: Vec<(Vec<String>, String)>,
    clients: Vec<Authorities>,
    shared: Option<Servers>,
    sources: Vec<Arc<EventSource>>,
    lists: Lists,
    fingerprint: [u8; 32],
    files: Vec<PathBuf>,
}

/// What the certificates of some clients are verified by; empty where none is asked.
#[derive(Default)]
struct Authorities {
    ca: Zeroizing<Vec<u8>>,
    crls: Vec<Zeroizing<Vec<u8>>>,
}

impl PolicySource {
    /// Reads and compiles the bundle, and reads the certificates that it names. Touches no network.
    ///
    /// # Errors
    ///
    /// Every fault that was found.
    pub fn read(&self) -> Result<Material, LoadError> {
        let bundle = Bundle::read(&self.bundle).map_err(LoadError::other)?;
        let policy = Policy::compile(&bundle, &self.variables)?;
        let mut fingerprint = digest::Context::new(&digest::SHA256);
        fingerprint.update(policy.hash().as_bytes());
        let mut errors = Vec::new();
        let mut files = Vec::new();
        let mut certificates = Vec::new();
        let mut read = |what: &str, source: &Source| {
            if let Source::File(path) = source {
                files.push(path.clone());
            }
            read_source(source)
                .inspect(|bytes| fingerprint.update(bytes))
                .map_err(|error| {
                    errors.push(Fault::Other { message: format!("certificate.{what}: {error}") })
                })
                .ok()
        };
        for source in policy.certificates() {
            let CertificateOrigin::Given { chain, key } = &source.origin else { continue };
            let from = format!("chain {chain}, key {key}");
            let (chain, key) = (read("chain", chain), read("key", key));
            if let (Some(chain), Some(key_pem)) = (chain, key) {
                let names = source.names.clone();
                certificates.push((CertificateEntry { names, chain_pem: chain.to_vec(), key_pem }, from));
            }
        }
        let mut read = |source: &Source, most: u64| {
            if let Source::File(path) = source {
                files.push(path.clone());
            }
            read_up_to(source, most).inspect(|bytes| fingerprint.update(bytes))
        };
        let mut clients = Vec::new();
        for zone in policy.tls().client.all() {
            let mut found = Authorities::default();
            if zone.mode != ClientMode::None {
                for (what, source) in
                    zone.ca.iter().map(|ca| ("ca", ca)).chain(zone.crls.iter().map(|crl| ("crls", crl)))
                {
                    match read(source, MAX_LIST_BYTES) {
                        Ok(bytes) if what == "ca" => found.ca = bytes,
                        Ok(bytes) => found.crls.push(bytes),
                        Err(error) => {
                            let message = format!("tls.client.{what}: {source}: {error}");
                            // Zones share most of it.
                            if !errors.iter().any(
                                |fault| matches!(fault, Fault::Other { message: known } if *known == message),
                            ) {
                                errors.push(Fault::Other { message });
                            }
                        }
                    }
                }
            }
            clients.push(found);
        }
        let mut read = |source: &Source| read(source, MAX_SECRET_BYTES);
        let state = PathBuf::from(self.variables.get("state").cloned().unwrap_or_default());
        let authorities =
            policy.acme().iter().map(|acme| Authority::read(acme, &state, &mut read).map(Arc::new));
        let (mut acme, mut awaited) = (Vec::new(), Vec::new());
        match authorities.collect::<Result<Vec<_>, _>>() {
            Ok(authorities) => {
                for source in policy.certificates() {
                    let CertificateOrigin::Acme(index) = source.origin else { continue };
                    let Some(authority) = authorities.get(index) else { continue };
                    match Wanted::read(authority, &source.names) {
                        Ok((wanted, entry)) => {
                            acme.push(wanted);
                            match entry {
                                Ok(entry) => {
                                    certificates.push((entry, format!("acme {}", authority.policy.name)));
                                }
                                Err(why) => awaited.push((source.names.clone(), why)),
                            }
                        }
                        Err(message) => errors.push(Fault::Other { message }),
                    }
                }
            }
            Err(message) => errors.push(Fault::Other { message }),
        }
        let mut sources = Vec::new();
        for source in policy.revocation_sources() {
            match EventSource::read(source, &mut read) {
                Ok(source) => sources.push(Arc::new(source)),
                Err(message) => errors.push(Fault::Other { message }),
            }
        }
        let shared = policy.shared().map(|shared| Servers::read(shared, read)).transpose();
        let shared = shared.unwrap_or_else(|faults| {
            errors.extend(LoadError::all(faults).errors);
            None
        });
        let mut lists = ListsBuilder::default();
        let of =
            |sources: &[Source], verdict| sources.iter().map(|it| (it.clone(), verdict)).collect::<Vec<_>>();
        let (deny, allow) =
            (of(&policy.lists().deny, Listed::Denied), of(&policy.lists().allow, Listed::Allowed));
        for (source, verdict) in deny.into_iter().chain(allow) {
            let added = read_up_to(&source, MAX_LIST_BYTES).map_err(|error| vec![error]).and_then(|text| {
                fingerprint.update(&text);
                let named = |fault| format!("{source}:{fault}");
                lists.add(&text, verdict).map_err(|faults| faults.into_iter().map(named).collect())
            });
            if let Err(faults) = added {
                errors.extend(
                    LoadError::all(faults.into_iter().map(|it| format!("lists: {it}")).collect()).errors,
                );
            }
            if let Source::File(path) = source {
                files.push(path);
            }
        }
        if !errors.is_empty() {
            return Err(LoadError { errors });
        }
        for (entry, _) in &certificates {
            fingerprint.update(&entry.chain_pem);
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(fingerprint.finish().as_ref());
        Ok(Material {
            policy,
            certificates,
            acme,
            awaited,
            clients,
            shared,
            sources,
            lists: lists.build(),
            fingerprint: digest,
            files,
        })
    }
}

/// A policy that would load.
pub struct Checked {
    /// The policy.
    pub policy: Policy,
    /// Its certificates.
    pub certificates: Vec<CertificateRow>,
    /// What is no error, and yet should be known.
    pub warnings: Vec<String>,
}

impl Material {
    /// Checks all that can be checked without a network: certificates, names and keys.
    ///
    /// # Errors
    ///
    /// Every fault that was found.
    pub fn check(self) -> Result<Checked, LoadError> {
        let certificates = (self.certificates, self.awaited);
        let (_, certificates, mut warnings) = tls(&self.policy, certificates, &self.clients, None)?;
        let now = clock::unix_now();
        warnings.extend(certificates.iter().filter_map(|row| row.alarm(now)));
        Ok(Checked { policy: self.policy, certificates, warnings })
    }

    /// Builds the snapshot: TLS, upstreams, keys of issuers, rates, counters.
    async fn build(self, gateway: &Outliving, previous: Option<&Snapshot>) -> Result<Snapshot, LoadError> {
        let Self {
            policy,
            certificates: entries,
            acme,
            awaited,
            clients,
            shared,
            sources,
            lists,
            fingerprint,
            files,
        } = self;
        let tickets = policy.tls().tickets.then(|| gateway.tickets.clone());
        let tls = tls(&policy, (entries, awaited), &clients, tickets);
        let upstreams = Upstreams::build(
            policy.upstreams(),
            previous.map(|snapshot| &snapshot.upstreams),
            &gateway.endpoints,
            &gateway.metrics,
            &|source| read_source(source).map(|bytes| bytes.to_vec()),
        )
        .await
        .map_err(LoadError::all);
        let ((tls, certificates, warnings), upstreams) = match (tls, upstreams) {
            (Ok(tls), Ok(upstreams)) => (tls, upstreams),
            (tls, upstreams) => {
                let faults = [tls.err(), upstreams.err()].into_iter().flatten();
                return Err(LoadError { errors: faults.flat_map(|error| error.errors).collect() });
            }
        };
        let verifier =
            Verifier::build(policy.issuers(), previous.map(|snapshot| &snapshot.verifier), &gateway.keys)
                .await
                .map_err(LoadError::all)?;
        let rates = Rates::build(policy.rates(), &gateway.rates, gateway.clock.clone());
        let rates = Arc::new(rates.counted(policy.rates(), |name| gateway.metrics.rate(name)));
        // What did not change is not connected to anew.
        let connected = previous.and_then(|snapshot| snapshot.shared.clone());
        let shared = shared.map(|new| match connected {
            Some(old) if old.same(&new) => old,
            _ => Arc::new(new),
        });
        Ok(Snapshot {
            generation: previous.map_or(1, |snapshot| snapshot.generation + 1),
            metrics: gateway.metrics.routes(&policy),
            tls,
            verifier,
            rates,
            penalties: Penalties::build(policy.penalties(), &gateway.penalties, |name| {
                Some(gateway.metrics.penalty(name))
            }),
            concurrency: ConcurrencyLimits::build(policy.concurrency(), &gateway.in_flight, |name| {
                Some(gateway.metrics.concurrency(name))
            }),
            lists,
            shared,
            sources: sources.into(),
            upstreams,
            answers: AnswerFields::of(&policy),
            certificates,
            acme,
            warnings,
            files,
            fingerprint,
            policy,
        })
    }
}

/// Certificates, each with where it comes from, and the names of those that are not there yet, each with why.
type Certificates = (Vec<(CertificateEntry, String)>, Vec<(Vec<String>, String)>);

type Tls = (Zones, Vec<CertificateRow>, Vec<String>);

fn tls(
    policy: &Policy,
    (certificates, awaited): Certificates,
    clients: &[Authorities],
    tickets: Option<Arc<TicketKeys>>,
) -> Result<Tls, LoadError> {
    if certificates.is_empty() && awaited.is_empty() {
        return Err(LoadError::other("policy.toml: no [[certificate]]: nobody could connect"));
    }
    let wanted = policy.tls();
    let tls13_only = wanted.versions == TlsVersions::Tls13;
    let groups = wanted.groups.iter().map(|group| match group {
        Group::X25519MlKem768 => NamedGroup::X25519MLKEM768,
        Group::X25519 => NamedGroup::X25519,
        Group::Secp256r1 => NamedGroup::secp256r1,
        Group::Secp384r1 => NamedGroup::secp384r1,
    });
    let provider = sealgate_keys::provider(&ProviderChoice { groups: groups.collect(), tls13_only });
    let (certificates, from): (Vec<_>, Vec<_>) = certificates.into_iter().unzip();
    let store = CertificateStore::build(certificates, &provider, SystemTime::now()).map_err(|faults| {
        let named = |fault: CertificateError| match from.get(fault.entry) {
            Some(from) => format!("{fault} ({from})"),
            None => fault.to_string(),
        };
        faults.into_iter().map(named).collect::<Vec<_>>()
    });
    let trusts: Vec<_> = wanted
        .client
        .all()
        .iter()
        .zip(clients)
        .map(|(wanted, found)| client_trust(wanted, found, &provider))
        .collect();
    let refused = trusts.iter().filter_map(|trust| trust.as_ref().err());
    let mut faults: Vec<_> = store.as_ref().err().into_iter().chain(refused).flatten().cloned().collect();
    // Zones share most of their authorities and lists.
    let mut seen = HashSet::new();
    faults.retain(|fault| seen.insert(fault.clone()));
    let (Ok(store), Ok(trusts)) = (store, trusts.into_iter().collect::<Result<Vec<_>, _>>()) else {
        return Err(LoadError::all(faults));
    };
    let rows = store.entries().iter().map(CertificateRow::from).collect();
    let versions: &[_] = if tls13_only { &[&version::TLS13] } else { &[&version::TLS13, &version::TLS12] };
    let alpn: &[&[u8]] = if policy.connections().http2 { &[b"h2", b"http/1.1"] } else { &[b"http/1.1"] };
    let store = Arc::new(store);
    let mut zones = Vec::new();
    for (wanted, trust) in wanted.client.all().iter().zip(trusts) {
        let configs = ServerConfigs::new(&provider, |provider| {
            let (store, tickets) = (store.clone(), tickets.clone());
            sealgate_keys::server_config(store, provider, versions, tickets, alpn, &trust)
        });
        let configs = configs.map_err(LoadError::other)?;
        zones.push(Zone { configs, trust, forward: wanted.forward });
    }
    let mut warnings: Vec<_> = zones.iter().flat_map(|zone| zone.trust.warnings().to_vec()).collect();
    warnings.dedup();
    // No error: such a host may be reached through somebody else's proxy, or its certificate may be on its way.
    let missing: HashSet<String> = awaited.iter().flat_map(|(names, _)| names.iter().cloned()).collect();
    warnings.extend(awaited.iter().map(|(names, why)| {
        format!(
            "no certificate for {} yet: {why}; these names are refused until there is one",
            names.join(", ")
        )
    }));
    let uncovered =
        policy.hosts().into_iter().filter(|host| !covered(&store, host) && !missing.contains(host));
    warnings.extend(
        uncovered.map(|host| format!("no certificate is for `{host}`, which a rule has for its host")),
    );
    let refuses = policy.tls().refuse_unknown_names;
    let zones =
        Zones::new(policy.tls().client.clone(), zones, store, refuses, missing).map_err(LoadError::other)?;
    Ok((zones, rows, warnings))
}

/// Whether there is a certificate for a rule's host.
fn covered(store: &CertificateStore, host: &str) -> bool {
    match host.strip_prefix("*.") {
        // One of the hosts that it stands for.
        Some(parent) => store.covers(&format!("any.{parent}")),
        None => store.covers(host.trim_matches(['[', ']'])),
    }
}

fn client_trust(
    wanted: &ClientAuthentication,
    found: &Authorities,
    provider: &Arc<CryptoProvider>,
) -> Result<ClientTrust, Vec<String>> {
    let demand = match wanted.mode {
        ClientMode::None => return Ok(ClientTrust::none()),
        ClientMode::Request => ClientDemand::Request,
        ClientMode::Require => ClientDemand::Require,
    };
    ClientTrust::build(demand, &found.ca, &found.crls, provider, SystemTime::now()).map_err(|faults| {
        let named = |fault: &ClientTrustError| match (fault, &wanted.ca) {
            (ClientTrustError::List { list, error }, _) => {
                let source = wanted.crls.get(*list).map(ToString::to_string).unwrap_or_default();
                format!("tls.client.crls: {source}: {error}")
            }
            (_, Some(ca)) => format!("tls.client.ca: {ca}: {fault}"),
            (_, None) => format!("tls.client.ca: {fault}"),
        };
        faults.iter().map(named).collect()
    })
}

/// The bytes behind a `file:` or `env:` source, bounded.
fn read_source(source: &Source) -> Result<Zeroizing<Vec<u8>>, String> {
    read_up_to(source, MAX_SECRET_BYTES)
}

fn read_up_to(source: &Source, limit: u64) -> Result<Zeroizing<Vec<u8>>, String> {
    match source {
        Source::File(path) => {
            let fail = |error: std::io::Error| format!("{}: {error}", path.display());
            let file = std::fs::File::open(path).map_err(fail)?;
            let mut bytes = Zeroizing::new(Vec::new());
            file.take(limit + 1).read_to_end(&mut bytes).map_err(fail)?;
            if bytes.len() as u64 > limit {
                return Err(format!("{}: larger than {limit} bytes", path.display()));
            }
            Ok(bytes)
        }
        Source::Env(name) => match std::env::var(name) {
            Ok(value) => Ok(Zeroizing::new(value.into_bytes())),
            Err(_) => Err(format!("the environment has no `{name}`")),
        },
    }
}

/// What outlives every reload and is needed to build a snapshot.
pub struct Outliving {
    /// Rate limit cells: a reload forgives nobody.
    pub rates: Arc<RateStore>,
    /// What is under way, of what is limited.
    pub in_flight: Arc<InFlight>,
    /// Who failed how often.
    pub penalties: Arc<PenaltyStore>,
    /// Their clock.
    pub clock: RateClock,
    /// What Prometheus scrapes.
    pub metrics: Metrics,
    /// Names endpoints for the pools.
    pub endpoints: EndpointIds,
    /// Keys of TLS 1.3 tickets.
    pub tickets: Arc<TicketKeys>,
    /// Certificates that are to be had of ACME authorities.
    pub acme: Arc<Acme>,
    /// Fetches issuers' keys.
    pub keys: Arc<KeyFetcher>,
    /// The generation in force; cores judge their open sockets anew when it changes.
    pub changes: watch::Sender<u64>,
}

/// Why a reload is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// `sealgate reload`.
    Command,
    /// SIGHUP.
    Signal,
    /// A file changed.
    FileChange,
    /// An ACME authority has issued a certificate.
    Certificate,
}

/// What a reload led to.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The generation now in force.
    pub generation: u64,
    /// The hash of the policy now in force.
    pub hash: String,
    /// Whether anything was swapped in.
    pub changed: bool,
    /// What an operator should know of it.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// A request to reload, and where to report.
pub struct Request {
    /// Who asks.
    pub cause: Cause,
    /// Hears the outcome.
    pub reply: Option<oneshot::Sender<Result<Report, LoadError>>>,
}

/// Loads policies, one at a time.
pub struct Reloader {
    source: PolicySource,
    outliving: Arc<Outliving>,
    current: Arc<ArcSwap<Snapshot>>,
    /// What was last found faulty, so that a file event does not report it again.
    rejected: Option<String>,
}

impl Reloader {
    /// Loads the first policy.
    ///
    /// # Errors
    ///
    /// Every fault that was found; there is nothing to fall back to.
    pub async fn first(source: PolicySource, outliving: Arc<Outliving>) -> Result<Self, LoadError> {
        let snapshot = source.read()?.build(&outliving, None).await?;
        announce(&outliving.metrics, &snapshot);
        outliving.tickets.set_period(snapshot.policy.tls().ticket_lifetime);
        let current = Arc::new(ArcSwap::from_pointee(snapshot));
        Ok(Self { source, outliving, current, rejected: None })
    }

    /// The policy in force, as it changes.
    #[must_use]
    pub fn current(&self) -> Arc<ArcSwap<Snapshot>> {
        self.current.clone()
    }

    /// Answers requests until their senders are gone.
    pub async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        while let Some(Request { cause, reply }) = requests.recv().await {
            let outcome = self.reload(cause).await;
            if let Some(reply) = reply {
                // The one who asked may have left.
                let _ = reply.send(outcome);
            }
        }
    }

    async fn reload(&mut self, cause: Cause) -> Result<Report, LoadError> {
        match self.load(cause).await {
            Ok(report) => {
                self.rejected = None;
                Ok(report)
            }
            Err(error) => {
                let text = error.to_string();
                // Editors and mounts cause several events for one change.
                if cause != Cause::FileChange || self.rejected.as_ref() != Some(&text) {
                    self.outliving.metrics.policy_failed();
                    tracing::error!(
                        target: "sealgate::audit",
                        activity = "policy-rejected",
                        ?cause,
                        "the policy was not taken; the one before stays in force\n{text}"
                    );
                }
                self.rejected = Some(text);
                Err(error)
            }
        }
    }

    async fn load(&mut self, cause: Cause) -> Result<Report, LoadError> {
        let previous = self.current.load_full();
        let source = self.source.clone();
        // Compiling schemas takes its time: not on the thread that answers probes.
        let material =
            tokio::task::spawn_blocking(move || source.read()).await.map_err(LoadError::other)??;
        let unchanged = material.fingerprint == previous.fingerprint;
        if unchanged && cause == Cause::FileChange {
            // Back to what is in force: nothing is rejected any more.
            self.outliving.metrics.policy_confirmed();
            return Ok(Report {
                generation: previous.generation,
                hash: previous.policy.hash().to_owned(),
                changed: false,
                warnings: warnings(&previous),
            });
        }
        let snapshot = material.build(&self.outliving, Some(&previous)).await?;
        announce(&self.outliving.metrics, &snapshot);
        let report = Report {
            generation: snapshot.generation,
            hash: snapshot.policy.hash().to_owned(),
            changed: !unchanged,
            warnings: warnings(&snapshot),
        };
        self.outliving.tickets.set_period(snapshot.policy.tls().ticket_lifetime);
        self.current.store(Arc::new(snapshot));
        self.outliving.changes.send_replace(report.generation);
        tracing::info!(
            target: "sealgate::audit",
            activity = "policy-loaded",
            ?cause,
            generation = report.generation,
            hash = report.hash,
            "a policy is in force"
        );
        Ok(report)
    }
}

fn announce(metrics: &Metrics, snapshot: &Snapshot) {
    metrics.policy_loaded(snapshot.generation, snapshot.policy.hash(), clock::unix_now());
    for warning in warnings(snapshot) {
        tracing::warn!(%warning, "certificates");
    }
    metrics.certificates(&snapshot.certificates);
}

fn warnings(snapshot: &Snapshot) -> Vec<String> {
    let now = clock::unix_now();
    let alarms = snapshot.certificates.iter().filter_map(|row| row.alarm(now));
    snapshot.warnings.iter().cloned().chain(alarms).collect()
}
