//! Certificates from ACME authorities (RFC 8555): `[[acme]]`, and `[[certificate]]` with `acme`.
//!
//! What is held stands in the state folder (`files`). A certificate that is not there yet, or is not good any more, keeps no gateway
//! from starting: its names are refused until it is. `follow` asks for it in the background (`order`), one certificate at a time,
//! when `schedule` says so; `challenges` answers the authority meanwhile. A new certificate is verified as any other one, kept, and
//! comes into force by a reload, so that nothing else takes another way.

mod challenges;
mod client;
mod files;
mod order;
mod schedule;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use instant_acme::CertificateIdentifier;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use sealgate_keys::{CertificateEntry, CertificateInfo, CertificateStore, ProviderChoice};
use sealgate_policy::{AcmeAuthority, Source};
use tokio::sync::{Notify, mpsc, oneshot};
use zeroize::Zeroizing;

pub use self::challenges::{CHALLENGE_PATH, Challenges, OpenChallenge, Response};
use self::schedule::{Schedule, Term};
use crate::{
    clock,
    edge::Gateway,
    lock::lock,
    reload::{Cause, Request},
};

/// Longest sleep: what is kept may be changed by somebody else.
const LOOK: Duration = Duration::from_secs(10 * 60);

/// Shortest time between two reloads for a certificate that is kept and not in force: the policy may be faulty meanwhile.
const RELOAD_PAUSE: u64 = 60;

/// Names that operators ask for and that were not looked at yet, at most.
const MAX_HURRIED: usize = 64;

/// What of ACME outlives every reload.
#[derive(Default)]
pub struct Acme {
    /// What authorities are answered.
    pub challenges: Arc<Challenges>,
    hurried: Mutex<Vec<Option<String>>>,
    wake: Notify,
}

impl Acme {
    /// Has certificates with `name` among theirs, or all, asked for now. Says whether there was room to remember that.
    pub fn hurry(&self, name: Option<String>) -> bool {
        let mut hurried = lock(&self.hurried);
        if hurried.len() >= MAX_HURRIED {
            return false;
        }
        hurried.push(name);
        drop(hurried);
        self.wake.notify_one();
        true
    }
}

/// An authority as a snapshot has it. Prints no secret.
pub struct Authority {
    /// What the policy says of it.
    pub policy: AcmeAuthority,
    /// Where its account and its certificates are.
    folder: PathBuf,
    tls: Arc<ClientConfig>,
    /// External account binding (RFC 8555 §7.3.4): the id and the key.
    external: Option<(String, Zeroizing<Vec<u8>>)>,
}

impl Authority {
    /// Reads what the policy names.
    ///
    /// # Errors
    /// What is wrong with it, without secrets.
    pub fn read(
        policy: &AcmeAuthority,
        state: &Path,
        read: &mut impl FnMut(&Source) -> Result<Zeroizing<Vec<u8>>, String>,
    ) -> Result<Self, String> {
        let fault = |key: &str, reason: String| format!("acme.{}.{key}: {reason}", policy.name);
        let ca = policy.ca.as_ref().map(&mut *read).transpose().map_err(|reason| fault("ca", reason))?;
        let tls = trust(ca.as_deref().map(Vec::as_slice)).map_err(|reason| fault("ca", reason))?;
        let external = match &policy.external_account {
            None => None,
            Some(external) => {
                let key = "external_account.key";
                let text = read(&external.key).map_err(|reason| fault(key, reason))?;
                // RFC 8555 §7.3.4: base64url. Some authorities print it padded.
                let text: Zeroizing<Vec<u8>> =
                    Zeroizing::new(text.trim_ascii().iter().copied().filter(|byte| *byte != b'=').collect());
                let bytes = URL_SAFE_NO_PAD.decode(&*text).map_err(|_| "expected base64url".to_owned());
                let bytes = bytes.map(Zeroizing::new).map_err(|reason| fault(key, reason))?;
                if bytes.len() < 16 {
                    return Err(fault(key, "too short: expected 16 bytes at least, in base64url".to_owned()));
                }
                Some((external.id.clone(), bytes))
            }
        };
        let folder = files::folder(state, &policy.name, &policy.directory);
        Ok(Self { policy: policy.clone(), folder, tls, external })
    }
}

/// How a server is verified: by `ca` (PEM), or by the system's authorities.
fn trust(ca: Option<&[u8]>) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    match ca {
        Some(pem) => {
            for certificate in CertificateDer::pem_slice_iter(pem) {
                let certificate = certificate.map_err(|error| error.to_string())?;
                roots.add(certificate).map_err(|error| error.to_string())?;
            }
        }
        None => {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if roots.is_empty() {
        return Err("no certificate to verify the authority's server by".to_owned());
    }
    let provider = sealgate_keys::provider(&ProviderChoice::default());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// A certificate that is to be had of an authority.
pub struct Wanted {
    /// Of whom.
    pub authority: Arc<Authority>,
    /// For whom.
    pub names: Vec<String>,
    file: PathBuf,
    /// What the snapshot was made with.
    held: Option<Held>,
}

/// A certificate that is there and good.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    term: Term,
    serial: String,
}

impl Wanted {
    /// Looks at what is kept for `names`: the certificate, if there is a good one, and else why not.
    ///
    /// # Errors
    /// What is kept may not be read: it is open to others, say.
    pub fn read(
        authority: &Arc<Authority>,
        names: &[String],
    ) -> Result<(Self, Result<CertificateEntry, String>), String> {
        let file = files::certificate_file(&authority.folder, names);
        let (held, entry) = match kept(&file, names)? {
            Ok((entry, info)) => (Some(Held::of(&info)), Ok(entry)),
            Err(why) => (None, Err(why)),
        };
        Ok((Self { authority: authority.clone(), names: names.to_vec(), file, held }, entry))
    }

    /// What is to be said of it: that it is not there; nothing while it is.
    #[must_use]
    pub fn alarm(&self) -> Option<String> {
        self.held.is_none().then(|| format!("no certificate for {} yet", self.names.join(", ")))
    }

    fn name(&self) -> &str {
        self.names.first().map_or("none", String::as_str)
    }
}

impl Held {
    fn of(info: &CertificateInfo) -> Self {
        Self { term: Term { begins: info.not_before, ends: info.expires_at }, serial: info.serial.clone() }
    }
}

type Kept = Result<(CertificateEntry, CertificateInfo), String>;

/// What is kept in a file, as far as it is good now.
fn kept(file: &Path, names: &[String]) -> Result<Kept, String> {
    let Some(pem) = files::read(file).map_err(|error| error.to_string())? else {
        return Ok(Err("it was not issued yet".to_owned()));
    };
    Ok(verified(names, &pem))
}

fn verified(names: &[String], pem: &Zeroizing<Vec<u8>>) -> Kept {
    let entry = files::entry(names, pem);
    let provider = sealgate_keys::provider(&ProviderChoice::default());
    match CertificateStore::build(vec![entry.clone()], &provider, SystemTime::now()) {
        Ok(store) => match store.entries() {
            [info] => Ok((entry, info.clone())),
            _ => Err("internal: not one certificate".to_owned()),
        },
        Err(faults) => Err(faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")),
    }
}

/// What is known of one certificate that is to be had.
#[derive(Default)]
struct Job {
    schedule: Schedule,
    held: Option<Held>,
    looked: bool,
    attempts: usize,
    reloaded_at: u64,
}

/// Sees to it, for ever, that certificates are there and are renewed.
pub async fn follow(gateway: Arc<Gateway>, requests: mpsc::Sender<Request>) {
    let mut changes = gateway.outliving.changes.subscribe();
    let acme = gateway.outliving.acme.clone();
    let mut jobs: HashMap<PathBuf, Job> = HashMap::new();
    loop {
        changes.borrow_and_update();
        let snapshot = gateway.current.load_full();
        jobs.retain(|file, _| snapshot.acme.iter().any(|wanted| wanted.file == *file));
        let hurried = std::mem::take(&mut *lock(&acme.hurried));
        let mut next = clock::unix_now().saturating_add(LOOK.as_secs());
        let mut missing = 0;
        for wanted in &snapshot.acme {
            let job = jobs.entry(wanted.file.clone()).or_default();
            if hurried.iter().any(|name| name.as_ref().is_none_or(|name| wanted.names.contains(name))) {
                job.schedule.hurry();
            }
            attend(&gateway, &acme.challenges, wanted, job, &requests).await;
            missing += u64::from(job.held.is_none());
            next = next.min(job.schedule.due_at());
        }
        gateway.metrics().acme_missing(missing);
        let wait = Duration::from_secs(next.saturating_sub(clock::unix_now()).max(1));
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = acme.wake.notified() => {}
            changed = changes.changed() => if changed.is_err() { return },
        }
    }
}

/// Does what is due for one certificate.
async fn attend(
    gateway: &Gateway,
    challenges: &Arc<Challenges>,
    wanted: &Wanted,
    job: &mut Job,
    requests: &mpsc::Sender<Request>,
) {
    let authority = &wanted.authority;
    // Somebody else may have put another one there, or taken it away.
    let held = match kept(&wanted.file, &wanted.names) {
        Ok(kept) => kept.ok().map(|(_, info)| Held::of(&info)),
        Err(error) => {
            tracing::error!(%error, "a certificate that is kept cannot be read");
            return;
        }
    };
    // Kept beside the certificate, so that a restart forgets no failures.
    let failures = wanted.file.with_extension("failures");
    if !job.looked
        && let Ok(Some(record)) = files::read(&failures)
    {
        job.schedule.restore(&String::from_utf8_lossy(&record), clock::unix_now());
    }
    if !job.looked || held != job.held {
        let term = held.as_ref().map(|held| held.term);
        job.schedule.holds(term, authority.policy.renew_before, fastrand::f64());
        (job.looked, job.held) = (true, held);
    }
    let now = clock::unix_now();
    if let Some(held) = &job.held
        && job.schedule.wants_advice(now)
    {
        let advice = advice(authority, &wanted.file, held).await;
        match advice {
            Some((start, end, again)) => job.schedule.advise(start, end, again, fastrand::f64(), now),
            None => job.schedule.not_advised(now),
        }
    }
    if job.schedule.is_due(now) {
        let replaced = job.held.as_ref().and_then(|_| identifier(&wanted.file));
        let turn = job.attempts;
        job.attempts = job.attempts.wrapping_add(1);
        let outcome = order::obtain(authority, &wanted.names, replaced, turn, challenges).await;
        let outcome = outcome.map_err(|error| (error.is_limit(), error.to_string()));
        match outcome.and_then(|pem| keep(wanted, &pem).map_err(|error| (false, error))) {
            Ok(held) => {
                tracing::info!(
                    target: "sealgate::audit",
                    activity = "certificate-issued",
                    authority = %authority.policy.name,
                    names = ?wanted.names,
                    serial = held.serial,
                    expires_at = held.term.ends,
                );
                job.schedule.succeeded();
                let _ = std::fs::remove_file(&failures);
                job.schedule.holds(Some(held.term), authority.policy.renew_before, fastrand::f64());
                (job.held, job.attempts, job.reloaded_at) = (Some(held), 0, 0);
                gateway.metrics().acme_order(&authority.policy.name, true);
            }
            Err((limited, error)) => {
                job.schedule.failed(clock::unix_now(), limited, fastrand::f64());
                if let Err(error) = files::write(&failures, job.schedule.record().as_bytes()) {
                    tracing::warn!(%error, "a restart will ask again at once");
                }
                tracing::error!(
                    target: "sealgate::audit",
                    activity = "certificate-not-issued",
                    authority = %authority.policy.name,
                    name = wanted.name(),
                    again_at = job.schedule.due_at(),
                    %error,
                );
                gateway.metrics().acme_order(&authority.policy.name, false);
            }
        }
    }
    let now = clock::unix_now();
    if job.held.is_some() && job.held != wanted.held && now >= job.reloaded_at.saturating_add(RELOAD_PAUSE) {
        job.reloaded_at = now;
        let (reply, outcome) = oneshot::channel();
        if requests.send(Request { cause: Cause::Certificate, reply: Some(reply) }).await.is_ok() {
            // The reloader has logged the outcome.
            let _ = outcome.await;
        }
    }
}

/// Keeps a certificate, if it is good.
fn keep(wanted: &Wanted, pem: &Zeroizing<Vec<u8>>) -> Result<Held, String> {
    let (_, info) =
        verified(&wanted.names, pem).map_err(|why| format!("what was issued is not good: {why}"))?;
    files::write(&wanted.file, pem).map_err(|error| error.to_string())?;
    Ok(Held::of(&info))
}

/// How ACME names the certificate of a file (RFC 9773 §4.1).
fn identifier(file: &Path) -> Option<CertificateIdentifier<'static>> {
    let pem = files::read(file).ok().flatten()?;
    let leaf = CertificateDer::pem_slice_iter(&pem).next()?.ok()?;
    CertificateIdentifier::try_from(&leaf).ok().map(CertificateIdentifier::into_owned)
}

/// When the authority would have the certificate renewed (RFC 9773), and in how many seconds it is to be asked again.
async fn advice(authority: &Authority, file: &Path, held: &Held) -> Option<(u64, u64, u64)> {
    let identifier = identifier(file)?;
    let account = match order::account(authority).await {
        Ok(account) => account,
        Err(error) => {
            tracing::debug!(%error, serial = held.serial, "no advice on renewal");
            return None;
        }
    };
    match account.renewal_info(&identifier).await {
        Ok((info, again)) => {
            let seconds = |time: i64| u64::try_from(time).unwrap_or(0);
            let window = info.suggested_window;
            let (start, end) = (seconds(window.start.unix_timestamp()), seconds(window.end.unix_timestamp()));
            Some((start, end, again.as_secs()))
        }
        // Most do not offer it.
        Err(error) => {
            tracing::debug!(%error, serial = held.serial, "no advice on renewal");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// A key and its certificate for `names`, which ends so many days from a minute ago.
    fn pem(names: &[String], days: u64) -> Zeroizing<Vec<u8>> {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        let now = SystemTime::now();
        params.not_before = (now - Duration::from_secs(100 * 86_400)).into();
        let end = now - Duration::from_secs(60) + Duration::from_secs(days * 86_400);
        params.not_after = end.into();
        let certificate = params.self_signed(&key).unwrap();
        Zeroizing::new((key.serialize_pem() + &certificate.pem()).into_bytes())
    }

    /// What is kept is served only while it is good: else its names wait for another one.
    #[test]
    fn what_is_kept_is_verified_like_any_other_certificate() {
        let folder = tempfile::tempdir().unwrap();
        let names = names(&["chat.example", "www.chat.example"]);
        let file = files::certificate_file(&folder.path().join("acme/authority"), &names);
        let why = |kept: Kept| kept.map(drop).unwrap_err();
        assert_eq!(why(kept(&file, &names).unwrap()), "it was not issued yet");

        files::write(&file, &pem(&names, 30)).unwrap();
        let (entry, info) = kept(&file, &names).unwrap().unwrap();
        assert_eq!(entry.names, names);
        assert!(info.expires_at > clock::unix_now());
        assert!(identifier(&file).is_none(), "without the issuer's key it has no name for ACME");

        files::write(&file, &pem(&names, 0)).unwrap();
        assert!(why(kept(&file, &names).unwrap()).contains("expired"));
        files::write(&file, &pem(&names[..1], 30)).unwrap();
        assert!(why(kept(&file, &names).unwrap()).contains("does not cover www.chat.example"));
        files::write(&file, b"junk").unwrap();
        assert!(!why(kept(&file, &names).unwrap()).is_empty());
        let other = [pem(&names, 30), pem(&names, 30)];
        let mixed = [&other[0][..200], &files::entry(&names, &other[1]).chain_pem].concat();
        files::write(&file, &mixed).unwrap();
        assert!(kept(&file, &names).unwrap().is_err());

        files::write(&file, &pem(&names, 30)).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(kept(&file, &names).unwrap_err().contains("open to other users"));
    }

    #[test]
    fn operators_are_heard_until_there_is_no_room() {
        let acme = Acme::default();
        for _ in 0..MAX_HURRIED {
            assert!(acme.hurry(None));
        }
        assert!(!acme.hurry(Some("chat.example".to_owned())));
    }
}
