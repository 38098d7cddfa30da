//! One certificate from an ACME authority: account, order, challenges, certificate (RFC 8555 §7).

use std::{path::Path, sync::Arc, time::Duration};

use instant_acme::{
    Account, AccountCredentials, AuthorizationStatus, CertificateIdentifier, ChallengeType, Error,
    ExternalAccountKey, Identifier, NewAccount, NewOrder, Order, OrderStatus, Problem, RetryPolicy,
};
use sealgate_keys::{AcmeKeyError, FileError, ProviderChoice, certificate_request, validation_config};
use sealgate_policy::AcmeChallenge;
use zeroize::Zeroizing;

use super::{
    Authority,
    challenges::{Challenges, OpenChallenge, Response},
    client::HttpsClient,
    files,
};

/// For the whole of it, from the account to the certificate.
const PATIENCE: Duration = Duration::from_secs(5 * 60);

/// For an authority to validate all names, and to issue.
const POLLING: RetryPolicy =
    RetryPolicy::new().initial_delay(Duration::from_millis(250)).timeout(Duration::from_secs(120));

/// Longest detail of an authority's that is passed on.
const MAX_DETAIL: usize = 500;

/// Why a certificate could not be had. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub(super) enum OrderError {
    /// The authority refused, or could not be reached.
    #[error("{}", shown(.0))]
    Acme(#[from] Error),
    /// The account, or the certificate, cannot be kept.
    #[error(transparent)]
    File(#[from] FileError),
    /// The account's file is no account.
    #[error("{path} holds no ACME account; remove it to have another one made")]
    Account {
        /// The file.
        path: String,
    },
    /// No key or certificate could be made.
    #[error(transparent)]
    Key(#[from] AcmeKeyError),
    /// The authority validates in none of the ways that the policy allows.
    #[error("{name} cannot be validated as the policy allows; the authority offers {offered}")]
    NoChallenge {
        /// Whose.
        name: String,
        /// What it would do.
        offered: String,
    },
    /// A name could not be validated.
    #[error("{0}")]
    Invalid(String),
    /// Too many challenges are open.
    #[error("too many challenges are open at a time")]
    Full,
    /// It took too long.
    #[error("no certificate within {} s", PATIENCE.as_secs())]
    TooLong,
}

impl OrderError {
    /// Whether the authority was asked too often (RFC 8555 §6.6).
    pub(super) fn is_limit(&self) -> bool {
        matches!(self, Self::Acme(Error::Api(problem)) if is(problem, "rateLimited"))
    }
}

fn is(problem: &Problem, kind: &str) -> bool {
    let name = problem.r#type.as_deref().and_then(|name| name.strip_prefix("urn:ietf:params:acme:error:"));
    name == Some(kind)
}

/// What an authority said, fit for a log.
fn shown(error: &Error) -> String {
    let text: String = error.to_string().chars().take(MAX_DETAIL).collect();
    text.escape_debug().to_string()
}

/// The account at `authority`: the one that is kept, or a new one.
pub(super) async fn account(authority: &Authority) -> Result<Account, OrderError> {
    let path = authority.folder.join("account.json");
    let builder = || Account::builder_with_http(Box::new(HttpsClient::new(authority.tls.clone())));
    if let Some(kept) = files::read(&path)? {
        let credentials: AccountCredentials = serde_json::from_slice(&kept)
            .map_err(|_| OrderError::Account { path: path.display().to_string() })?;
        return Ok(builder().from_credentials(credentials).await?);
    }
    let contact: Vec<_> = authority.policy.contact.iter().map(String::as_str).collect();
    let wanted = NewAccount { contact: &contact, terms_of_service_agreed: true, only_return_existing: false };
    let external = authority.external.as_ref().map(|(id, key)| ExternalAccountKey::new(id.clone(), key));
    let directory = authority.policy.directory.clone();
    let (account, credentials) = builder().create(&wanted, directory, external.as_ref()).await?;
    let text = Zeroizing::new(serde_json::to_vec(&credentials).map_err(Error::from)?);
    files::write(&path, &text)?;
    tracing::info!(target: "sealgate::audit", activity = "acme-account-created", authority = %authority.policy.name);
    Ok(account)
}

/// A certificate for `names` and its key, in PEM. `turn` counts attempts: each begins with another kind of challenge.
pub(super) async fn obtain(
    authority: &Authority,
    names: &[String],
    replaced: Option<CertificateIdentifier<'static>>,
    turn: usize,
    challenges: &Arc<Challenges>,
) -> Result<Zeroizing<Vec<u8>>, OrderError> {
    let obtaining = async {
        let account = account(authority).await?;
        let outcome = with_account(authority, &account, names, replaced, turn, challenges).await;
        if let Err(OrderError::Acme(Error::Api(problem))) = &outcome
            && is(problem, "accountDoesNotExist")
        {
            forget_account(&authority.folder);
        }
        outcome
    };
    tokio::time::timeout(PATIENCE, obtaining).await.unwrap_or(Err(OrderError::TooLong))
}

/// The authority has no such account any more: the next attempt makes another one.
fn forget_account(folder: &Path) {
    let (path, aside) = (folder.join("account.json"), folder.join("account.json.unknown"));
    if let Err(error) = std::fs::rename(&path, aside) {
        tracing::error!(%error, path = %path.display(), "an account that its authority does not know stays");
    }
}

async fn with_account(
    authority: &Authority,
    account: &Account,
    names: &[String],
    replaced: Option<CertificateIdentifier<'static>>,
    turn: usize,
    challenges: &Arc<Challenges>,
) -> Result<Zeroizing<Vec<u8>>, OrderError> {
    let identifiers: Vec<_> = names.iter().cloned().map(Identifier::Dns).collect();
    let plain = NewOrder::new(&identifiers);
    let mut order = match replaced {
        // RFC 9773 §5. An authority that does not take it (it was replaced already, say) still issues without.
        Some(replaced) => match account.new_order(&NewOrder::new(&identifiers).replaces(replaced)).await {
            Ok(order) => order,
            Err(_) => account.new_order(&plain).await?,
        },
        None => account.new_order(&plain).await?,
    };
    // Answered until the authority has looked at all of them.
    let answered = answer(authority, &mut order, turn, challenges).await?;
    match order.poll_ready(&POLLING).await {
        Ok(OrderStatus::Ready) => {}
        Ok(status) => return Err(why_not(&mut order, &format!("the order is {status:?}")).await),
        Err(Error::Api(problem)) => return Err(why_not(&mut order, &problem.to_string()).await),
        Err(error) => return Err(error.into()),
    }
    drop(answered);
    let request = certificate_request(names)?;
    order.finalize_csr(&request.der).await?;
    let chain = order.poll_certificate(&POLLING).await?;
    let mut pem = Zeroizing::new(Vec::with_capacity(request.key_pem.len() + chain.len() + 1));
    pem.extend_from_slice(request.key_pem.as_bytes());
    pem.extend_from_slice(chain.as_bytes());
    Ok(pem)
}

/// Answers a challenge for each name that has to be validated, and has the authority look.
async fn answer(
    authority: &Authority,
    order: &mut Order,
    turn: usize,
    challenges: &Arc<Challenges>,
) -> Result<Vec<OpenChallenge>, OrderError> {
    let mut open = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        match authorization.status {
            AuthorizationStatus::Valid => continue,
            AuthorizationStatus::Pending => {}
            other => return Err(OrderError::Invalid(format!("an authorization is {other:?}"))),
        }
        let name = match authorization.identifier().identifier {
            Identifier::Dns(name) => name.to_ascii_lowercase(),
            other => return Err(OrderError::Invalid(format!("{other:?} is no host name"))),
        };
        let offered: Vec<_> = authorization.challenges.iter().map(|it| it.r#type.clone()).collect();
        let possible: Vec<_> =
            authority.policy.challenges.iter().filter(|kind| offered.contains(&wire(**kind))).collect();
        let Some(kind) = possible.get(turn % possible.len().max(1)) else {
            return Err(OrderError::NoChallenge { name, offered: format!("{offered:?}") });
        };
        let Some(mut challenge) = authorization.challenge(wire(**kind)) else {
            return Err(OrderError::NoChallenge { name, offered: format!("{offered:?}") });
        };
        let key = challenge.key_authorization();
        let response = match kind {
            AcmeChallenge::Http => {
                Response::Http { token: challenge.token.clone(), key_authorization: key.as_str().to_owned() }
            }
            AcmeChallenge::TlsAlpn => {
                let mut digest = [0; 32];
                digest.copy_from_slice(key.digest().as_ref());
                let provider = sealgate_keys::provider(&ProviderChoice::default());
                let config = validation_config(&name, &digest, provider)?;
                Response::Tls { name, config }
            }
        };
        open.push(challenges.open(response).ok_or(OrderError::Full)?);
        challenge.set_ready().await?;
    }
    Ok(open)
}

fn wire(kind: AcmeChallenge) -> ChallengeType {
    match kind {
        AcmeChallenge::Http => ChallengeType::Http01,
        AcmeChallenge::TlsAlpn => ChallengeType::TlsAlpn01,
    }
}

/// What the authority found wrong with each name; `otherwise` if it says nothing of that.
async fn why_not(order: &mut Order, otherwise: &str) -> OrderError {
    let mut faults = Vec::new();
    let mut authorizations = order.authorizations();
    while let Some(Ok(mut authorization)) = authorizations.next().await {
        let name = format!("{:?}", authorization.identifier().identifier);
        let Ok(state) = authorization.refresh().await else { continue };
        let errors = state.challenges.iter().filter_map(|challenge| challenge.error.as_ref());
        faults.extend(errors.map(|error| {
            let detail = error.detail.as_deref().unwrap_or_default();
            format!("{name}: {}: {detail}", error.r#type.as_deref().unwrap_or("no type"))
        }));
    }
    let text = if faults.is_empty() { otherwise.to_owned() } else { faults.join("; ") };
    let text: String = text.chars().take(MAX_DETAIL).collect();
    OrderError::Invalid(text.escape_debug().to_string())
}
