//! An issuer's keys: read, kept, and read again (RFC 7517).

use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use jsonwebtoken::DecodingKey;
use ring::digest::{SHA256, digest};
use rustls::ClientConfig;
use rustls::pki_types::{CertificateDer, ServerName};
use sealgate_policy::{Algorithm, JwksSource};
use serde_json::{Map, Value};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsConnector;

use super::json;
use super::token::decode;

/// Longest JWKS document.
const MAX_DOCUMENT_BYTES: usize = 256 * 1024;

/// Most keys in one document.
const MAX_KEYS: usize = 64;

/// For one attempt to read the keys, from the name look-up to the last byte.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);

/// Between two attempts, however many tokens name unknown keys. A token whose key was published since waits no longer
/// than this; that, and not a share per address, is why one address cannot use the attempts up.
const ATTEMPT_PAUSE: Duration = Duration::from_secs(5);

/// Why keys could not be read.
#[derive(Debug, thiserror::Error)]
pub enum JwksError {
    /// The file cannot be read, or the connection failed; the next attempt may succeed.
    #[error("cannot be read: {0}")]
    Io(#[from] std::io::Error),
    /// The server broke HTTP.
    #[error("cannot be fetched: {0}")]
    Http(#[from] hyper::Error),
    /// The server answered something other than 200; redirects are not followed.
    #[error("answered with status {0}")]
    Status(StatusCode),
    /// No answer within the time for one attempt.
    #[error("no answer within {} s", ATTEMPT_TIMEOUT.as_secs())]
    Timeout,
    /// The URL is not `https:`, nor `http:` to loopback, or holds credentials.
    #[error("must be an https URL, or http to a loopback address, without credentials")]
    Url,
    /// No certificate authorities are known to verify the server with.
    #[error("no certificate authorities to verify the server with")]
    NoAuthorities,
    /// Longer than 256 KiB.
    #[error("longer than {MAX_DOCUMENT_BYTES} bytes")]
    TooLong,
    /// Not a JWK set (RFC 7517 §5).
    #[error("not a JWK set")]
    Malformed,
    /// More than 64 keys.
    #[error("more than {MAX_KEYS} keys")]
    TooManyKeys,
    /// None of the keys can verify a token.
    #[error("holds no key that can verify a token")]
    NoKeys,
}

/// The keys of one document that may verify tokens.
#[derive(Debug)]
pub(super) struct KeySet {
    keys: Vec<Key>,
    digest: [u8; 32],
}

#[derive(Debug)]
struct Key {
    id: Option<Arc<str>>,
    algorithm: Algorithm,
    decoding: DecodingKey,
}

impl KeySet {
    /// Takes the public signature keys out of a JWK set. Others are left out, as RFC 7517 §5 asks: other uses, other
    /// algorithms, RSA below 2048 bits, symmetric keys, and private keys, which are no secret any more.
    pub(super) fn parse(document: &[u8]) -> Result<Self, JwksError> {
        if document.len() > MAX_DOCUMENT_BYTES {
            return Err(JwksError::TooLong);
        }
        let set = json::object(document).ok_or(JwksError::Malformed)?;
        let entries = set.get("keys").and_then(Value::as_array).ok_or(JwksError::Malformed)?;
        if entries.len() > MAX_KEYS {
            return Err(JwksError::TooManyKeys);
        }
        let mut seen = HashSet::new();
        let keys = entries.iter().filter_map(Value::as_object).flat_map(keys_of);
        // Two keys under one name leave no telling which is meant: the first counts.
        let keys: Vec<Key> =
            keys.filter(|key| key.id.is_none() || seen.insert((key.id.clone(), key.algorithm))).collect();
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, document).as_ref());
        Ok(KeySet { keys, digest: hash })
    }

    /// The key of that name for that algorithm, and its name; for a token that names none, the only key for the algorithm.
    pub(super) fn find(
        &self,
        algorithm: Algorithm,
        id: Option<&str>,
    ) -> Option<(&DecodingKey, Option<&Arc<str>>)> {
        let mut keys = self.keys.iter().filter(|key| key.algorithm == algorithm);
        let found = match id {
            Some(_) => keys.find(|key| key.id.as_deref() == id),
            None => keys.next().filter(|_| keys.next().is_none()),
        };
        found.map(|key| (&key.decoding, key.id.as_ref()))
    }

    fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

/// The key of a JWK that stands alone, for one algorithm; `None` if it must not verify anything by that.
pub(super) fn key_of(jwk: &Map<String, Value>, algorithm: Algorithm) -> Option<DecodingKey> {
    keys_of(jwk).into_iter().find(|key| key.algorithm == algorithm).map(|key| key.decoding)
}

/// One key for each algorithm that a JWK may verify.
fn keys_of(jwk: &Map<String, Value>) -> Vec<Key> {
    let text = |name: &str| jwk.get(name).and_then(Value::as_str);
    let bytes = |name: &str| text(name).and_then(decode);

    let for_signatures = jwk.get("use").is_none_or(|it| it == "sig");
    let operations =
        jwk.get("key_ops").map(|it| it.as_array().is_some_and(|ops| ops.iter().any(|op| op == "verify")));
    let private = ["d", "k", "p", "q", "dp", "dq", "qi"].iter().any(|name| jwk.contains_key(*name));
    if !for_signatures || operations == Some(false) || private {
        return Vec::new();
    }

    let (able, decoding): (&[Algorithm], _) = match (text("kty"), text("crv")) {
        (Some("EC"), Some("P-256")) => (&[Algorithm::ES256], point(bytes("x"), bytes("y"), 32)),
        (Some("EC"), Some("P-384")) => (&[Algorithm::ES384], point(bytes("x"), bytes("y"), 48)),
        (Some("OKP"), Some("Ed25519")) => {
            let key = bytes("x").filter(|x| x.len() == 32);
            (&[Algorithm::EdDSA], key.map(|x| DecodingKey::from_ed_der(&x)))
        }
        (Some("RSA"), _) => (&[Algorithm::RS256, Algorithm::PS256], rsa(bytes("n"), bytes("e"))),
        _ => (&[], None),
    };
    let Some(decoding) = decoding else {
        return Vec::new();
    };
    let allowed = |algorithm: &Algorithm| match (jwk.get("alg"), algorithm) {
        (None, _) => true,
        (Some(name), Algorithm::ES256) => name == "ES256",
        (Some(name), Algorithm::ES384) => name == "ES384",
        // RFC 9864 names it by its curve; both names mean the same key.
        (Some(name), Algorithm::EdDSA) => name == "EdDSA" || name == "Ed25519",
        (Some(name), Algorithm::RS256) => name == "RS256",
        (Some(name), Algorithm::PS256) => name == "PS256",
    };
    let id = text("kid").map(Arc::from);
    let key = |&algorithm: &Algorithm| Key { id: id.clone(), algorithm, decoding: decoding.clone() };
    able.iter().filter(|algorithm| allowed(algorithm)).map(key).collect()
}

/// An uncompressed point (SEC 1 §2.3.3); coordinates have the curve's full length (RFC 7518 §6.2.1.2).
fn point(x: Option<Vec<u8>>, y: Option<Vec<u8>>, length: usize) -> Option<DecodingKey> {
    let (x, y) = (x.filter(|x| x.len() == length)?, y.filter(|y| y.len() == length)?);
    Some(DecodingKey::from_ec_der(&[&[4], &x[..], &y[..]].concat()))
}

/// 2048 to 8192 bits, and an odd exponent of at least 65537 (NIST FIPS 186-5 §A.1.1).
fn rsa(n: Option<Vec<u8>>, e: Option<Vec<u8>>) -> Option<DecodingKey> {
    let trimmed = |bytes: Vec<u8>| bytes.into_iter().skip_while(|byte| *byte == 0).collect::<Vec<u8>>();
    let (n, e) = (trimmed(n?), trimmed(e?));
    let bits = n.len() * 8 - n.first()?.leading_zeros() as usize;
    let exponent = e.iter().take(9).fold(0u64, |value, byte| (value << 8) | u64::from(*byte));
    let fits = (2048..=8192).contains(&bits) && e.len() <= 8 && exponent >= 65537 && exponent % 2 == 1;
    fits.then(|| DecodingKey::from_rsa_raw_components(&n, &e))
}

/// Reads JWKS documents: from files, and over https with the server verified. One per process.
#[derive(Debug, Default)]
pub struct KeyFetcher {
    authorities: Option<Vec<CertificateDer<'static>>>,
    tls: OnceLock<Arc<ClientConfig>>,
}

impl KeyFetcher {
    /// Verifies servers by the system's certificate authorities, which are read when the first https URL is.
    pub fn system() -> Arc<Self> {
        Arc::default()
    }

    /// Verifies servers by these authorities and no others.
    pub fn trusting(authorities: Vec<CertificateDer<'static>>) -> Arc<Self> {
        Arc::new(KeyFetcher { authorities: Some(authorities), tls: OnceLock::new() })
    }

    async fn read(&self, source: &JwksSource) -> Result<KeySet, JwksError> {
        let attempt = async {
            match source {
                JwksSource::File(path) => read_file(path).await,
                JwksSource::Url(url) => self.fetch(url).await,
            }
        };
        let document = timeout(ATTEMPT_TIMEOUT, attempt).await.map_err(|_| JwksError::Timeout)??;
        KeySet::parse(&document)
    }

    async fn fetch(&self, url: &str) -> Result<Bytes, JwksError> {
        let uri: Uri = url.parse().map_err(|_| JwksError::Url)?;
        let secure = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(JwksError::Url),
        };
        // Credentials in a URL (RFC 3986 §3.2.1) would end up in logs.
        if uri.authority().is_none_or(|authority| authority.as_str().contains('@')) {
            return Err(JwksError::Url);
        }
        let host = uri.host().map(|host| host.trim_matches(['[', ']'])).ok_or(JwksError::Url)?;
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let mut addresses: Vec<SocketAddr> = tokio::net::lookup_host((host, port)).await?.collect();
        if !secure {
            addresses.retain(|address| address.ip().to_canonical().is_loopback());
            if addresses.is_empty() {
                return Err(JwksError::Url);
            }
        }
        let tcp = TcpStream::connect(&*addresses).await?;
        if !secure {
            return exchange(tcp, &uri).await;
        }
        let name = ServerName::try_from(host.to_owned()).map_err(|_| JwksError::Url)?;
        exchange(TlsConnector::from(self.tls()?).connect(name, tcp).await?, &uri).await
    }

    fn tls(&self) -> Result<Arc<ClientConfig>, JwksError> {
        if let Some(known) = self.tls.get() {
            return Ok(Arc::clone(known));
        }
        let mut roots = rustls::RootCertStore::empty();
        match &self.authorities {
            Some(authorities) => roots.add_parsable_certificates(authorities.iter().cloned()),
            None => roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs),
        };
        if roots.is_empty() {
            return Err(JwksError::NoAuthorities);
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|_| JwksError::NoAuthorities)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Arc::clone(self.tls.get_or_init(|| Arc::new(config))))
    }
}

async fn read_file(path: &Path) -> Result<Bytes, JwksError> {
    // One byte beyond the limit is enough to see that it is exceeded.
    let mut document = Vec::new();
    let file = tokio::fs::File::open(path).await?;
    file.take(MAX_DOCUMENT_BYTES as u64 + 1).read_to_end(&mut document).await?;
    Ok(document.into())
}

async fn exchange<S>(stream: S, uri: &Uri) -> Result<Bytes, JwksError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let _connection = AbortOnDrop(tokio::spawn(connection).abort_handle());
    let authority = uri.authority().ok_or(JwksError::Url)?;
    let request = Request::get(uri.path_and_query().map_or("/", |path| path.as_str()))
        .header(header::HOST, authority.as_str())
        .header(header::ACCEPT, "application/jwk-set+json, application/json")
        .header(header::USER_AGENT, "sealgate")
        .body(Empty::<Bytes>::new())
        .map_err(|_| JwksError::Url)?;
    let response = sender.send_request(request).await?;
    if response.status() != StatusCode::OK {
        return Err(JwksError::Status(response.status()));
    }
    match Limited::new(response.into_body(), MAX_DOCUMENT_BYTES).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) => {
            Err(error.downcast::<hyper::Error>().map_or(JwksError::TooLong, |error| JwksError::Http(*error)))
        }
    }
}

#[derive(Debug)]
struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// One JWKS source with the keys it last gave, kept up to date by a task that ends with it.
///
/// Outlives reloads that leave it unchanged. The last good keys count until others are read, however long that takes;
/// [`age`](Self::age) tells.
#[derive(Debug)]
pub(super) struct KeySource {
    source: JwksSource,
    refresh: Duration,
    shared: Arc<Shared>,
    _task: AbortOnDrop,
}

#[derive(Debug)]
struct Shared {
    current: ArcSwapOption<Current>,
    /// Counts the sets of keys that were ever current.
    generation: AtomicU64,
    failures: AtomicU64,
    /// A token named a key that is not known.
    wanted: Notify,
    progress: watch::Sender<Progress>,
}

#[derive(Debug, Clone, Copy)]
struct Progress {
    /// Attempts that have ended.
    attempts: u64,
    /// When the next may begin.
    next: Instant,
}

#[derive(Debug)]
struct Current {
    keys: Arc<KeySet>,
    read_at: Instant,
}

impl KeySource {
    /// Starts reading on the current runtime, which must live as long as the source.
    pub(super) fn start(source: JwksSource, refresh: Duration, fetcher: Arc<KeyFetcher>) -> Self {
        let shared = Arc::new(Shared {
            current: ArcSwapOption::empty(),
            generation: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            wanted: Notify::new(),
            progress: watch::Sender::new(Progress { attempts: 0, next: Instant::now() }),
        });
        let task = tokio::spawn(keep_reading(Arc::clone(&shared), source.clone(), refresh, fetcher));
        KeySource { source, refresh, shared, _task: AbortOnDrop(task.abort_handle()) }
    }

    pub(super) fn is(&self, source: &JwksSource, refresh: Duration) -> bool {
        self.source == *source && self.refresh == refresh
    }

    /// The keys, or nothing if none could be read so far.
    pub(super) fn keys(&self) -> Option<Arc<KeySet>> {
        self.shared
            .current
            .load()
            .as_ref()
            .map(|current| Arc::clone(&current.keys))
            .filter(|keys| !keys.is_empty())
    }

    /// Changes whenever the keys do.
    pub(super) fn generation(&self) -> u64 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// How long ago the keys were last read with success.
    pub(super) fn age(&self, now: std::time::Instant) -> Option<Duration> {
        let read_at = self.shared.current.load().as_ref()?.read_at;
        Some(now.saturating_duration_since(read_at.into_std()))
    }

    /// Attempts that failed since the start.
    pub(super) fn failures(&self) -> u64 {
        self.shared.failures.load(Ordering::Relaxed)
    }

    /// Asks for another attempt, as soon as the pause between attempts allows. Cheap, and never waits.
    pub(super) fn want(&self) {
        self.shared.wanted.notify_one();
    }

    /// Waits for the end of the attempt that is due, at most `patience`; not at all if one has only just ended. Says
    /// whether an attempt has ended.
    pub(super) async fn attempted(&self, patience: Duration) -> bool {
        let mut progress = self.shared.progress.subscribe();
        let Progress { attempts, next } = *progress.borrow();
        if attempts > 0 && next > Instant::now() {
            return true;
        }
        self.want();
        matches!(timeout(patience, progress.wait_for(|now| now.attempts > attempts)).await, Ok(Ok(_)))
    }

    /// Waits for the first attempt to end.
    pub(super) async fn started(&self) {
        // The sender lives in `shared`, so this cannot fail.
        let _ = self.shared.progress.subscribe().wait_for(|progress| progress.attempts > 0).await;
    }

    /// Reads now, and keeps what is read.
    ///
    /// # Errors
    /// Whatever kept it from being read; [`JwksError::NoKeys`] if it is useless. The last good keys stay.
    pub(super) async fn read(&self, fetcher: &KeyFetcher) -> Result<(), JwksError> {
        let keys = fetcher.read(&self.source).await?;
        if keys.is_empty() {
            return Err(JwksError::NoKeys);
        }
        self.shared.keep(keys);
        Ok(())
    }
}

impl Shared {
    fn keep(&self, keys: KeySet) {
        let current = self.current.load();
        let known = current.as_ref().map(|current| &current.keys).filter(|known| known.digest == keys.digest);
        let unchanged = known.is_some();
        let keys = known.map_or_else(|| Arc::new(keys), Arc::clone);
        self.current.store(Some(Arc::new(Current { keys, read_at: Instant::now() })));
        if !unchanged {
            // After the store: who sees the new generation sees the new keys.
            self.generation.fetch_add(1, Ordering::Release);
        }
    }
}

async fn keep_reading(shared: Arc<Shared>, source: JwksSource, refresh: Duration, fetcher: Arc<KeyFetcher>) {
    let pause = ATTEMPT_PAUSE.min(refresh);
    // A file is read by whoever starts the source; a URL may keep him waiting, so its first attempt is made here.
    let mut due =
        Instant::now() + if matches!(source, JwksSource::File(_)) { refresh } else { Duration::ZERO };
    let mut earliest = Instant::now();
    let mut retry = pause;
    loop {
        tokio::select! {
            () = sleep_until(due) => {}
            () = shared.wanted.notified() => sleep_until(earliest.min(due)).await,
        }
        let outcome = fetcher.read(&source).await;
        let ended = Instant::now();
        earliest = ended + pause;
        match outcome {
            // A document without usable keys replaces the keys all the same: the issuer may have withdrawn them.
            Ok(keys) => {
                shared.keep(keys);
                retry = pause;
                due = ended + refresh;
            }
            Err(error) => {
                shared.failures.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(source = label(&source), %error, "token keys not read; the last ones stay");
                due = ended + retry;
                retry = (retry * 2).min(refresh);
            }
        }
        shared.progress.send_modify(|it| *it = Progress { attempts: it.attempts + 1, next: earliest });
    }
}

/// The source for a log: a URL without what may be a secret in it.
fn label(source: &JwksSource) -> String {
    match source {
        JwksSource::File(path) => path.display().to_string(),
        JwksSource::Url(url) => {
            let uri = url.parse::<Uri>().unwrap_or_default();
            format!(
                "{}://{}{}",
                uri.scheme_str().unwrap_or_default(),
                uri.host().unwrap_or_default(),
                uri.path()
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::minting::{Mint, encode, jwks};
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::sync::atomic::AtomicUsize;
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    /// The algorithms for which the set has a key of that name.
    fn able(key: &Value, id: &str) -> Vec<Algorithm> {
        let all = [Algorithm::ES256, Algorithm::ES384, Algorithm::EdDSA, Algorithm::RS256, Algorithm::PS256];
        let set = KeySet::parse(json!({"keys": [key]}).to_string().as_bytes()).unwrap();
        all.into_iter().filter(|algorithm| set.find(*algorithm, Some(id)).is_some()).collect()
    }

    fn changed(mut key: Value, name: &str, value: Value) -> Value {
        key[name] = value;
        key
    }

    /// A modulus of so many bits; nobody has the key to it.
    fn rsa_of(bits: usize, exponent: &[u8]) -> Value {
        let mut modulus = vec![0xff; bits.div_ceil(8)];
        modulus[0] >>= (8 - bits % 8) % 8;
        json!({"kty": "RSA", "kid": "k", "n": encode(&modulus), "e": encode(exponent)})
    }

    #[test]
    fn takes_public_signature_keys() {
        assert_eq!(able(&Mint::es256("k").jwk(), "k"), [Algorithm::ES256]);
        assert_eq!(able(&Mint::es384("k").jwk(), "k"), [Algorithm::ES384]);
        assert_eq!(able(&Mint::eddsa("k").jwk(), "k"), [Algorithm::EdDSA]);
        assert_eq!(able(&changed(Mint::eddsa("k").jwk(), "alg", "Ed25519".into()), "k"), [Algorithm::EdDSA]);
        let rsa = rsa_of(2048, &[1, 0, 1]);
        assert_eq!(able(&rsa, "k"), [Algorithm::RS256, Algorithm::PS256]);
        assert_eq!(able(&changed(rsa.clone(), "alg", "PS256".into()), "k"), [Algorithm::PS256]);
        assert_eq!(
            able(&changed(rsa, "key_ops", json!(["verify"])), "k"),
            [Algorithm::RS256, Algorithm::PS256]
        );
    }

    #[test]
    fn leaves_out_what_must_not_verify_a_token() {
        let ec = Mint::es256("k").jwk();
        let text = |name: &str| ec[name].as_str().unwrap().to_owned();
        let left_out = [
            ("for encryption", changed(ec.clone(), "use", "enc".into())),
            ("of no known use", changed(ec.clone(), "use", 1.into())),
            ("not for verifying", changed(ec.clone(), "key_ops", json!(["encrypt"]))),
            ("for another algorithm", changed(ec.clone(), "alg", "ES384".into())),
            ("for a symmetric algorithm", changed(ec.clone(), "alg", "HS256".into())),
            ("private", changed(ec.clone(), "d", text("x").into())),
            ("symmetric", json!({"kty": "oct", "kid": "k", "k": encode(&[1; 32])})),
            ("on another curve", changed(ec.clone(), "crv", "P-521".into())),
            ("on a curve by another name", changed(ec.clone(), "crv", "p-256".into())),
            ("with a short coordinate", changed(ec.clone(), "x", encode(&[1; 31]).into())),
            ("with a long coordinate", changed(ec.clone(), "x", encode(&[1; 33]).into())),
            ("with a padded coordinate", changed(ec.clone(), "x", format!("{}=", text("x")).into())),
            ("without a coordinate", changed(ec.clone(), "y", Value::Null)),
            ("Ed448", json!({"kty": "OKP", "kid": "k", "crv": "Ed448", "x": encode(&[1; 57])})),
            ("X25519", json!({"kty": "OKP", "kid": "k", "crv": "X25519", "x": encode(&[1; 32])})),
            ("RSA of 1024 bits", rsa_of(1024, &[1, 0, 1])),
            ("RSA of 2047 bits", rsa_of(2047, &[1, 0, 1])),
            ("RSA of 1024 bits behind zeros", {
                let modulus = [&[0; 128][..], &[0xff; 128]].concat();
                changed(rsa_of(1024, &[1, 0, 1]), "n", encode(&modulus).into())
            }),
            ("RSA of 16384 bits", rsa_of(16384, &[1, 0, 1])),
            ("RSA with exponent 1", rsa_of(2048, &[1])),
            ("RSA with exponent 3", rsa_of(2048, &[3])),
            ("RSA with an even exponent", rsa_of(2048, &[1, 0, 2])),
            ("RSA with an endless exponent", rsa_of(2048, &[1; 9])),
            ("of no known type", json!({"kty": "XYZ", "kid": "k"})),
            ("of no type", json!({"kid": "k"})),
            ("no object", json!("k")),
        ];
        for (name, key) in left_out {
            assert_eq!(able(&key, "k"), [], "{name}");
        }
    }

    #[test]
    fn refuses_documents_that_are_no_bounded_set() {
        let parse = |text: &str| KeySet::parse(text.as_bytes()).map(drop).unwrap_err().to_string();
        for text in ["", "{}", "[]", r#"{"keys":{}}"#, r#"{"keys":[],"keys":[]}"#, "<html>"] {
            assert_eq!(parse(text), "not a JWK set", "{text}");
        }
        assert_eq!(parse(&json!({"keys": vec![json!({}); 65]}).to_string()), "more than 64 keys");
        assert_eq!(parse(&" ".repeat(MAX_DOCUMENT_BYTES + 1)), "longer than 262144 bytes");
    }

    #[test]
    fn the_first_of_two_keys_with_one_name_counts() {
        let (one, two) = (Mint::es256("k"), Mint::es256("k"));
        let both = KeySet::parse(jwks(&[&one, &two]).as_bytes()).unwrap();
        let first = KeySet::parse(jwks(&[&one]).as_bytes()).unwrap();
        let bytes = |set: &KeySet| {
            set.find(Algorithm::ES256, Some("k")).unwrap().0.try_get_as_bytes().unwrap().to_vec()
        };
        assert_eq!(bytes(&both), bytes(&first));
        assert_eq!(both.keys.len(), 1);
    }

    proptest! {
        #[test]
        fn any_document_is_answered(document in any::<Vec<u8>>()) {
            let _ = KeySet::parse(&document);
        }

        #[test]
        fn any_key_is_answered(
            kty in prop::sample::select(vec!["EC", "RSA", "OKP", "oct"]),
            crv in prop::sample::select(vec!["P-256", "P-384", "Ed25519"]),
            values in prop::collection::vec("[A-Za-z0-9_-]{0,90}", 4),
        ) {
            let key = json!({"kty": kty, "crv": crv, "x": values[0], "y": values[1], "n": values[2], "e": values[3]});
            let _ = KeySet::parse(json!({"keys": [key]}).to_string().as_bytes());
        }
    }

    /// Answers every connection with one response; counts them.
    struct Server {
        port: u16,
        asked: Arc<AtomicUsize>,
        _task: AbortOnDrop,
    }

    impl Server {
        async fn start(response: String, tls: Option<TlsAcceptor>) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = listener.local_addr().unwrap().port();
            let asked = Arc::new(AtomicUsize::new(0));
            let count = Arc::clone(&asked);
            let task = tokio::spawn(async move {
                loop {
                    let (tcp, _) = listener.accept().await.unwrap();
                    match &tls {
                        None => answer(tcp, &response, &count).await,
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(tcp).await {
                                answer(stream, &response, &count).await;
                            }
                        }
                    }
                }
            });
            Server { port, asked, _task: AbortOnDrop(task.abort_handle()) }
        }

        fn asked(&self) -> usize {
            self.asked.load(Ordering::SeqCst)
        }
    }

    async fn answer(mut stream: impl AsyncRead + AsyncWrite + Unpin, response: &str, count: &AtomicUsize) {
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            if stream.read_buf(&mut request).await.unwrap_or(0) == 0 {
                return;
            }
        }
        count.fetch_add(1, Ordering::SeqCst);
        let _ = stream.write_all(response.as_bytes()).await;
        let _ = stream.shutdown().await;
    }

    fn ok(body: &str) -> String {
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    }

    async fn fetched(fetcher: &KeyFetcher, url: String) -> Result<usize, String> {
        let read = fetcher.read(&JwksSource::Url(url)).await;
        read.map(|set| set.keys.len()).map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn fetches_over_loopback() {
        let server = Server::start(ok(&jwks(&[&Mint::es256("k")])), None).await;
        let fetcher = KeyFetcher::system();
        for host in ["127.0.0.1", "localhost"] {
            assert_eq!(
                fetched(&fetcher, format!("http://{host}:{}/jwks.json?v=1", server.port)).await,
                Ok(1)
            );
        }
        assert_eq!(server.asked(), 2);
    }

    #[tokio::test]
    async fn never_asks_a_stranger_in_the_clear() {
        let fetcher = KeyFetcher::system();
        let refused = Err(JwksError::Url.to_string());
        for url in [
            "http://192.0.2.1/jwks",
            "ftp://127.0.0.1/jwks",
            "file:///etc/passwd",
            "/jwks",
            "",
            "https://a:b@127.0.0.1/jwks",
        ] {
            assert_eq!(fetched(&fetcher, url.to_owned()).await, refused, "{url}");
        }
    }

    #[tokio::test]
    async fn takes_nothing_but_200_and_not_without_end() {
        let fetcher = KeyFetcher::system();
        let body = jwks(&[&Mint::es256("k")]);
        let long = " ".repeat(MAX_DOCUMENT_BYTES + 1);
        let cases = [
            (
                "HTTP/1.1 302 Found\r\nlocation: /other\r\ncontent-length: 0\r\n\r\n".to_owned(),
                "answered with status 302 Found",
            ),
            (ok(&body).replace("200 OK", "500 No"), "answered with status 500 Internal Server Error"),
            (ok("<html>"), "not a JWK set"),
            (ok(&long), "longer than 262144 bytes"),
            (format!("HTTP/1.1 200 OK\r\n\r\n{long}"), "longer than 262144 bytes"),
        ];
        for (response, expected) in cases {
            let server = Server::start(response, None).await;
            let outcome = fetched(&fetcher, format!("http://127.0.0.1:{}/", server.port)).await;
            assert_eq!(outcome, Err(expected.to_owned()));
            assert_eq!(server.asked(), 1, "redirects are not followed");
        }
    }

    #[tokio::test]
    async fn verifies_the_server() {
        let mut authority = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority_key = rcgen::KeyPair::generate().unwrap();
        let authority_certificate = authority.self_signed(&authority_key).unwrap();
        let issuer = rcgen::Issuer::new(authority, authority_key);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["localhost".to_owned()])
            .unwrap()
            .signed_by(&key, &issuer)
            .unwrap();
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(
            rustls::crypto::aws_lc_rs::default_provider(),
        ))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![certificate.der().clone()],
            rustls::pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
        )
        .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let server = Server::start(ok(&jwks(&[&Mint::es256("k")])), Some(acceptor)).await;

        let trusting = KeyFetcher::trusting(vec![authority_certificate.der().clone()]);
        assert_eq!(fetched(&trusting, format!("https://localhost:{}/", server.port)).await, Ok(1));
        // The name must be in the certificate, the authority trusted, and there must be one.
        assert!(fetched(&trusting, format!("https://127.0.0.1:{}/", server.port)).await.is_err());
        let other = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let distrusting = KeyFetcher::trusting(vec![other.cert.der().clone()]);
        assert!(fetched(&distrusting, format!("https://localhost:{}/", server.port)).await.is_err());
        let nobody =
            fetched(&KeyFetcher::trusting(Vec::new()), format!("https://localhost:{}/", server.port)).await;
        assert_eq!(nobody, Err(JwksError::NoAuthorities.to_string()));
        assert_eq!(server.asked(), 1);
    }
}
