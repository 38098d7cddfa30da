//! Following a source: ask, read to the end, ask again; the snapshot first, and whenever something is missing.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use sealgate_policy::OnLoss;
use tokio::task::AbortHandle;

use super::EventSource;
use super::line::{Because, Copied, Copying, Fault, MAX_LINE_BYTES, Reading, Step};
use crate::clock;
use crate::edge::Gateway;
use crate::session::{OwnedRevocation, Place};
use crate::upstream::ConnectError;

/// Between attempts.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Between questions that a source answers at once, with nothing.
const QUIET_PAUSE: Duration = Duration::from_secs(1);

/// Most entries of a snapshot: as many as can be remembered.
const MAX_ENTRIES: usize = 1 << 20;

/// Why an answer ended before its time.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("the upstream has no endpoint that is fit")]
    NoEndpoint,
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the answer broke off: {0}")]
    Http(#[from] hyper::Error),
    #[error("the request could not be made")]
    Request,
    #[error("answered with status {0}")]
    Status(StatusCode),
    #[error("nothing came in time")]
    Late,
    #[error("{0}")]
    Line(#[from] Fault),
    #[error("the answer ended within a line, or without its end")]
    CutOff,
    #[error("more entries than can be remembered")]
    TooMany,
}

/// Follows whatever sources the policy names, for ever.
pub async fn follow(gateway: Arc<Gateway>) {
    let mut changes = gateway.outliving.changes.subscribe();
    let mut running: HashMap<Arc<str>, (Arc<EventSource>, Running)> = HashMap::new();
    loop {
        let wanted = gateway.current.load().sources.clone();
        running.retain(|_, (source, _)| wanted.contains(source));
        gateway.sources.retain(|name| wanted.iter().any(|source| *source.policy.name == *name));
        gateway.metrics().sources.retain(wanted.iter().map(|source| &*source.policy.name));
        for source in &*wanted {
            let name = &source.policy.name;
            if !running.contains_key(name) {
                // Without it the gateway has served until now: that may go on for as long as contact may be lost.
                gateway.sources.begin(name, source.policy.on_loss, false);
                let follower = Follower { gateway: gateway.clone(), source: source.clone() };
                let task = tokio::spawn(async move {
                    tokio::join!(follower.stay_in_touch(), follower.watch());
                });
                running.insert(name.clone(), (source.clone(), Running(task.abort_handle())));
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// A task that ends with this.
struct Running(AbortHandle);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Follower {
    gateway: Arc<Gateway>,
    source: Arc<EventSource>,
}

/// How an answer ended.
enum Ended {
    /// Ask for what follows; whether anything came.
    Next(bool),
    Repair(Because),
}

impl Follower {
    fn name(&self) -> &Arc<str> {
        &self.source.policy.name
    }

    async fn stay_in_touch(&self) -> Infallible {
        let metrics = &self.gateway.metrics().sources;
        let mut place = self.gateway.journal.place(self.name());
        let mut because = Because::First;
        let mut pause = FIRST_PAUSE;
        loop {
            let began = Instant::now();
            let outcome = match &mut place {
                Some(place) => self.read(place, &mut pause).await,
                None => self.copy(because, &mut pause).await.map(|here| {
                    place = Some(here);
                    Ended::Next(true)
                }),
            };
            match outcome {
                Ok(Ended::Next(true)) => continue,
                Ok(Ended::Next(false)) => {
                    let quiet = QUIET_PAUSE.mul_f64(0.5 + fastrand::f64() / 2.0);
                    tokio::time::sleep(quiet.saturating_sub(began.elapsed())).await;
                    continue;
                }
                Ok(Ended::Repair(why)) => {
                    tracing::warn!(source = %self.name(), because = ?why, "events are missing; all are read anew");
                    (place, because) = (None, why);
                }
                Err(error) => {
                    metrics.connected(self.name(), false);
                    if matches!(error, Broken::Line(_)) {
                        metrics.refused(self.name());
                    }
                    // Once for each loss, and not for each attempt.
                    if pause == FIRST_PAUSE {
                        tracing::warn!(source = %self.name(), %error, "no contact with a source of revocations; trying again");
                    } else {
                        tracing::debug!(source = %self.name(), %error, "still no contact with a source");
                    }
                }
            }
            // Gateways that lost the same source do not come back in step.
            tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Events after `place`, until the answer ends.
    async fn read(&self, place: &mut Place, pause: &mut Duration) -> Result<Ended, Broken> {
        let wait = (self.source.policy.contact_timeout / 4).as_secs().max(1);
        let mut query = form_urlencoded::Serializer::new(String::new());
        query.append_pair("log", &place.log).append_pair("after", &place.number.to_string());
        let query = query.append_pair("wait", &wait.to_string()).finish();
        let (mut reading, mut came) = (Reading::from(place), false);
        let asked = self.lines(&query, |line| {
            match reading.take(line, clock::unix_now())? {
                Step::Nothing => {}
                Step::UpToDate => self.hear(pause),
                Step::Enter { revocation, at } => {
                    came = true;
                    if let Some(revocation) = revocation.filter(|it| self.may(it)) {
                        // Counts nobody: the sockets close all the same.
                        drop(self.gateway.apply(&revocation.borrowed()));
                        self.gateway.shared.publish(&revocation.borrowed());
                    }
                    self.gateway.journal.keep_place(self.name(), reading.place());
                    if let Some(at) = at {
                        let lag = Duration::from_millis(clock::unix_now_ms().saturating_sub(at));
                        self.gateway.metrics().sources.lag(self.name(), lag);
                    }
                    self.hear(pause);
                }
                Step::Repair(because) => return Ok(ControlFlow::Break(because)),
            }
            Ok(ControlFlow::Continue(()))
        });
        match asked.await {
            Ok(Some(because)) => Ok(Ended::Repair(because)),
            Ok(None) => Ok(Ended::Next(came)),
            Err(Broken::Status(StatusCode::GONE)) => Ok(Ended::Repair(Because::Gap)),
            Err(error) => Err(error),
        }
    }

    /// All that holds, and the place in the log from which to go on.
    async fn copy(&self, because: Because, pause: &mut Duration) -> Result<Place, Broken> {
        let (mut copying, mut entered) = (Copying::default(), 0);
        let outcome = self
            .lines("snapshot=1", |line| {
                match copying.take(line, clock::unix_now())? {
                    Copied::Nothing => {}
                    Copied::Enter(revocation) if self.may(&revocation) => {
                        entered += 1;
                        if entered > MAX_ENTRIES {
                            return Err(Broken::TooMany);
                        }
                        let _ = self.gateway.enter(&revocation.borrowed());
                        self.gateway.shared.publish(&revocation.borrowed());
                    }
                    Copied::Enter(_) => {}
                    Copied::Whole(here) => return Ok(ControlFlow::Break(here)),
                }
                Ok(ControlFlow::Continue(()))
            })
            .await;
        // One look at all sockets, however many revocations there are; and also where it broke off.
        if entered > 0 {
            self.gateway.cores.sweep_all();
        }
        let here = outcome?.ok_or(Broken::CutOff)?;
        self.gateway.journal.keep_place(self.name(), &here);
        self.gateway.metrics().sources.repaired(self.name(), match because {
            Because::First => "first",
            Because::Gap => "gap",
            Because::Rewritten => "rewritten",
        });
        tracing::info!(source = %self.name(), ?because, entered, number = here.number, "revocations of a source read");
        self.hear(pause);
        Ok(here)
    }

    /// Shows each line of an answer to `each`, until it breaks or the answer ends.
    async fn lines<T>(
        &self,
        query: &str,
        mut each: impl FnMut(&[u8]) -> Result<ControlFlow<T>, Broken>,
    ) -> Result<Option<T>, Broken> {
        let policy = &self.source.policy;
        // It has to say something twice as often as this.
        let patience = policy.contact_timeout / 2;
        let snapshot = self.gateway.current.load_full();
        let upstream = snapshot.upstreams.iter().find(|it| it.name == policy.upstream);
        let endpoint = upstream.and_then(|it| Some((it, it.select(None, IpAddr::V4(Ipv4Addr::UNSPECIFIED))?)));
        let (upstream, endpoint) = endpoint.ok_or(Broken::NoEndpoint)?;
        let stream = upstream.connect(endpoint).await?;
        let mut request = Request::get(format!("{}?{query}", policy.path))
            .header(header::HOST, endpoint.authority.clone())
            .header(header::ACCEPT, "application/x-ndjson")
            .header(header::USER_AGENT, "sealgate");
        if let Some(authorization) = &self.source.authorization {
            request = request.header(header::AUTHORIZATION, authorization.clone());
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|_| Broken::Request)?;
        // The policy in force may change many times before the answer ends.
        drop(snapshot);
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let _connection = Running(tokio::spawn(connection).abort_handle());
        let response = tokio::time::timeout(patience, sender.send_request(request));
        let response = response.await.map_err(|_| Broken::Late)??;
        if response.status() != StatusCode::OK {
            return Err(Broken::Status(response.status()));
        }
        self.gateway.metrics().sources.connected(self.name(), true);
        let mut body = response.into_body();
        let mut rest: Vec<u8> = Vec::new();
        while let Some(frame) =
            tokio::time::timeout(patience, body.frame()).await.map_err(|_| Broken::Late)?
        {
            let Ok(data) = frame?.into_data() else { continue };
            // Bounded by what one read brings, and by a line that has not ended yet.
            rest.extend_from_slice(&data);
            let mut from = 0;
            while let Some(end) = memchr::memchr(b'\n', rest.get(from..).unwrap_or_default()) {
                let line = rest.get(from..from + end).unwrap_or_default();
                from += end + 1;
                // A blank line only shows that the connection lives.
                if !line.trim_ascii().is_empty()
                    && let ControlFlow::Break(outcome) = each(line)?
                {
                    return Ok(Some(outcome));
                }
            }
            rest.drain(..from);
            if rest.len() > MAX_LINE_BYTES {
                return Err(Fault::Malformed.into());
            }
        }
        if rest.is_empty() { Ok(None) } else { Err(Broken::CutOff) }
    }

    /// Whether the source may speak for the issuer.
    fn may(&self, revocation: &OwnedRevocation) -> bool {
        let issuer = revocation.target.borrowed().issuer();
        let may = self.source.policy.issuers.iter().any(|allowed| allowed == issuer);
        if !may {
            self.gateway.metrics().sources.refused(self.name());
            tracing::error!(source = %self.name(), "a source revokes for an issuer that it may not speak for");
        }
        may
    }

    fn hear(&self, pause: &mut Duration) {
        *pause = FIRST_PAUSE;
        self.gateway.metrics().sources.heard(self.name(), clock::unix_now());
        if self.gateway.sources.hear(self.name()) {
            tracing::info!(source = %self.name(), "in contact with a source of revocations");
        }
    }

    /// Notices that contact is lost.
    async fn watch(&self) -> Infallible {
        let policy = &self.source.policy;
        let mut due = tokio::time::interval(policy.contact_timeout / 20);
        loop {
            due.tick().await;
            let (lost, before) = self.gateway.sources.silent(self.name(), policy.contact_timeout);
            self.gateway.metrics().sources.lost(self.name(), lost);
            if lost && !before {
                tracing::error!(
                    source = %self.name(),
                    on_loss = ?policy.on_loss,
                    "contact with a source of revocations is lost: what it revokes is not known here"
                );
                if policy.on_loss == OnLoss::FailClosed {
                    self.gateway.cores.contact_lost();
                }
            }
        }
    }
}
