//! Following a source: ask, read to the end, ask again; the snapshot first, and whenever something is missing.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use sealgate_policy::OnLoss;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::Instant;

use super::EventSource;
use super::line::{Because, Copied, Copying, Fault, Lines, Reading, Step};
use crate::clock;
use crate::edge::Gateway;
use crate::session::{OwnedRevocation, Place};
use crate::upstream::{Chosen, ConnectError, Key, Tried, Underway};

/// Between attempts.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Between questions that a source answers at once, with nothing, and between snapshots.
const QUIET_PAUSE: Duration = Duration::from_secs(1);

/// Longest time that a snapshot may take.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(300);

/// What hyper may hold of an answer that was not looked at yet; most bytes that are looked at in one go.
const READ_BUFFER: usize = 64 * 1024;

/// Entries that may wait for the disk before a source has to wait too, and how long it waits then.
const MAX_UNWRITTEN: u64 = 64 * 1024;
const DISK_PATIENCE: Duration = Duration::from_secs(1);

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
    #[error("there is no room to remember what it revokes")]
    NoRoom,
}

/// Follows whatever sources the policy names, for ever.
pub async fn follow(gateway: Arc<Gateway>) {
    let mut changes = gateway.outliving.changes.subscribe();
    loop {
        let sources = gateway.current.load().sources.clone();
        let names = || sources.iter().map(|source| &source.policy.name);
        gateway.sources.retain(|name| names().any(|wanted| **wanted == *name));
        gateway.metrics().sources.retain(names().map(|name| &**name));
        gateway.journal.retain_places(|kept| sources.iter().any(|source| *source.place == *kept));
        // Another policy may lead elsewhere, or have another secret: all are asked anew, from the place that is known.
        let mut followers = JoinSet::new();
        for source in &*sources {
            // Without a new one the gateway has served until now: that may go on for as long as contact may be lost.
            gateway.sources.begin(
                &source.policy.name,
                source.policy.on_loss,
                false,
                std::time::Instant::now(),
            );
            let follower = Follower { gateway: gateway.clone(), source: source.clone() };
            followers.spawn(async move {
                tokio::join!(follower.stay_in_touch(), follower.watch());
            });
        }
        if gateway.sources.lost() == Some(OnLoss::FailClosed) {
            gateway.cores.contact_lost();
        }
        if changes.changed().await.is_err() {
            return;
        }
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
        let mut place = self.gateway.journal.place(&self.source.place);
        let mut because = Because::First;
        let mut pause = FIRST_PAUSE;
        let mut copied: Option<Instant> = None;
        loop {
            let began = Instant::now();
            let outcome = match &mut place {
                Some(place) => self.read(place, &mut pause).await,
                None => {
                    // A source whose log changes whenever it is asked must not be copied without end.
                    if let Some(copied) = copied {
                        tokio::time::sleep_until(copied + jittered(QUIET_PAUSE)).await;
                    }
                    copied = Some(Instant::now());
                    self.copy(because).await.map(|here| {
                        place = Some(here);
                        Ended::Next(true)
                    })
                }
            };
            match outcome {
                Ok(Ended::Next(true)) => continue,
                Ok(Ended::Next(false)) => {
                    tokio::time::sleep_until(began + jittered(QUIET_PAUSE)).await;
                    continue;
                }
                Ok(Ended::Repair(why)) => {
                    tracing::warn!(source = %self.name(), because = ?why, "events are missing; all are read anew");
                    (place, because) = (None, why);
                    continue;
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
                        tracing::debug!(source = %self.name(), %error, "still no contact with a source of revocations");
                    }
                }
            }
            tokio::time::sleep(jittered(pause)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Takes in what follows `place`, until the answer ends.
    async fn read(&self, place: &mut Place, pause: &mut Duration) -> Result<Ended, Broken> {
        let query = after(place, (self.source.policy.contact_timeout / 4).as_secs().max(1));
        let mut answer = match self.ask(&query).await {
            Err(Broken::Status(StatusCode::GONE)) => return Ok(Ended::Repair(Because::Gap)),
            answer => answer?,
        };
        let (mut lines, mut reading, mut came) = (Lines::default(), Reading::from(place), false);
        while let Some(data) = answer.next().await? {
            let taken = lines.take(&data, |line| {
                answer.came();
                match reading.take(line, clock::unix_now())? {
                    Step::Nothing => {}
                    Step::UpToDate => self.hear(pause),
                    Step::Repair(because) => return Ok(ControlFlow::Break(because)),
                    Step::Enter { revocation, at } => {
                        if let Some(revocation) = revocation.filter(|it| self.may(it))
                            && !self.enter_one(&revocation)
                        {
                            reading.undo();
                            return Err(Broken::NoRoom);
                        }
                        came = true;
                        self.gateway.metrics().sources.event(self.name());
                        if let Some(at) = at {
                            let lag = Duration::from_millis(clock::unix_now_ms().saturating_sub(at));
                            self.gateway.metrics().sources.lag(self.name(), lag);
                        }
                    }
                }
                Ok(ControlFlow::Continue(()))
            });
            // Once for all lines that came together, and also for those before a fault.
            let mark = self.gateway.journal.keep_place(&self.source.place, reading.place());
            if let ControlFlow::Break(because) = taken? {
                return Ok(Ended::Repair(because));
            }
            if self.gateway.journal.waiting() > MAX_UNWRITTEN {
                self.gateway.journal.kept(mark, DISK_PATIENCE).await;
            }
        }
        lines.end()?;
        Ok(Ended::Next(came))
    }

    /// Enters an event; whether it will be remembered, here and on disk.
    fn enter_one(&self, revocation: &OwnedRevocation) -> bool {
        // Counts nobody: the sockets close all the same.
        let applied = self.gateway.apply(&revocation.borrowed());
        self.gateway.shared.publish(&revocation.borrowed());
        applied.is_remembered()
    }

    /// Takes in all that holds, and gives the place in the log from which to go on.
    async fn copy(&self, because: Because) -> Result<Place, Broken> {
        let mut entered = 0;
        let outcome = tokio::time::timeout(SNAPSHOT_PATIENCE, self.copy_all(&mut entered)).await;
        // One look at all sockets, however many revocations there are; and also where it broke off.
        if entered > 0 {
            self.gateway.cores.sweep_all();
        }
        let here = outcome.map_err(|_| Broken::Late)??;
        // INVARIANT: behind all that the snapshot held: the journal keeps the order.
        self.gateway.journal.keep_place(&self.source.place, &here);
        self.gateway.metrics().sources.copied(self.name(), because.label());
        tracing::info!(source = %self.name(), ?because, entered, number = here.number, "revocations of a source read");
        Ok(here)
    }

    async fn copy_all(&self, entered: &mut u64) -> Result<Place, Broken> {
        let mut answer = self.ask("snapshot=1").await?;
        let (mut lines, mut copying) = (Lines::default(), Copying::default());
        while let Some(data) = answer.next().await? {
            let taken = lines.take(&data, |line| {
                answer.came();
                match copying.take(line, clock::unix_now())? {
                    Copied::Nothing => {}
                    Copied::Whole(here) => return Ok(ControlFlow::Break(here)),
                    Copied::Enter(revocation) if self.may(&revocation) => {
                        *entered += 1;
                        let (held, mark) = self.gateway.enter(&revocation.borrowed());
                        self.gateway.shared.publish(&revocation.borrowed());
                        if !held || !mark.is_possible() {
                            return Err(Broken::NoRoom);
                        }
                    }
                    Copied::Enter(_) => {}
                }
                Ok(ControlFlow::Continue(()))
            })?;
            if let ControlFlow::Break(here) = taken {
                return Ok(here);
            }
        }
        Err(Fault::CutOff.into())
    }

    /// Asks, and gives an answer of status 200.
    async fn ask(&self, query: &str) -> Result<Answer, Broken> {
        let policy = &self.source.policy;
        // It has to say something twice as often as this.
        let patience = policy.contact_timeout / 2;
        let snapshot = self.gateway.current.load_full();
        let upstream = snapshot.upstreams.iter().find(|it| it.name == policy.upstream);
        let upstream = upstream.ok_or(Broken::NoEndpoint)?;
        let key = Key { subject: None, client: IpAddr::V4(Ipv4Addr::UNSPECIFIED) };
        let members = upstream.members();
        let chosen = members.choose(key, &mut Tried::default()).map_err(|_| Broken::NoEndpoint)?;
        let Chosen { endpoint, mut underway } = chosen;
        let stream = upstream.connect(endpoint).await.inspect_err(|_| underway.failed())?;
        let mut request = Request::get(format!("{}?{query}", policy.path))
            .header(header::HOST, endpoint.authority.clone())
            .header(header::ACCEPT, "application/x-ndjson")
            .header(header::USER_AGENT, "sealgate");
        if let Some(authorization) = self.source.authorization() {
            request = request.header(header::AUTHORIZATION, authorization);
        }
        let request = request.body(Empty::<Bytes>::new()).map_err(|_| Broken::Request)?;
        underway.ended();
        // The answer may outlive many snapshots.
        drop(snapshot);
        let (mut sender, connection) =
            http1::Builder::new().max_buf_size(READ_BUFFER).handshake(TokioIo::new(stream)).await?;
        let connection = Running(tokio::spawn(connection).abort_handle());
        let response = tokio::time::timeout(patience, sender.send_request(request));
        let response = response.await.map_err(|_| Broken::Late)??;
        if response.status() != StatusCode::OK {
            return Err(Broken::Status(response.status()));
        }
        self.gateway.metrics().sources.connected(self.name(), true);
        Ok(Answer {
            body: response.into_body(),
            patience,
            deadline: Instant::now() + patience,
            _underway: underway,
            _sender: sender,
            _connection: connection,
        })
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

    /// Everything that it has is known here.
    fn hear(&self, pause: &mut Duration) {
        *pause = FIRST_PAUSE;
        self.gateway.metrics().sources.heard(self.name(), clock::unix_now());
        if self.gateway.sources.hear(self.name(), std::time::Instant::now()) {
            tracing::info!(source = %self.name(), "in contact with a source of revocations");
        }
    }

    /// Notices that contact is lost.
    async fn watch(&self) -> Infallible {
        let policy = &self.source.policy;
        let mut due = tokio::time::interval(policy.contact_timeout / 20);
        loop {
            due.tick().await;
            let now = std::time::Instant::now();
            let (lost, before) = self.gateway.sources.silent(self.name(), policy.contact_timeout, now);
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

fn after(place: &Place, wait: u64) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    query.append_pair("log", &place.log).append_pair("after", &place.number.to_string());
    query.append_pair("wait", &wait.to_string()).finish()
}

/// Gateways that lost the same source do not come back in step.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// An answer that is being read. Its connection ends with it.
struct Answer {
    body: Incoming,
    patience: Duration,
    deadline: Instant,
    _underway: Underway,
    _sender: http1::SendRequest<Empty<Bytes>>,
    _connection: Running,
}

impl Answer {
    /// What comes next; nothing at the end.
    async fn next(&mut self) -> Result<Option<Bytes>, Broken> {
        loop {
            let frame = tokio::time::timeout_at(self.deadline, self.body.frame());
            match frame.await.map_err(|_| Broken::Late)?.transpose()? {
                None => return Ok(None),
                Some(frame) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    /// A whole line came: bytes alone give no more time.
    fn came(&mut self) {
        self.deadline = Instant::now() + self.patience;
    }
}

/// A task that ends with this.
struct Running(AbortHandle);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}
