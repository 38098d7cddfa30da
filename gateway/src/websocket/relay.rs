//! The relay: one task per tunnel, both directions in one future.
//!
//! A wake-up reads all that a peer has sent into a buffer of the core, judges it where it lies, and writes
//! what is accepted from there, at once. Only what cannot be finished (a frame that has not come whole, bytes
//! that the other side does not take yet) is copied, into memory of the connection that goes when it is empty.
//! So an idle tunnel holds its streams and a few hundred bytes, and a busy one allocates nothing per message.
//!
//! Everything that a tunnel waits for (expiry, idleness, pings, slow readers, the closing handshake) shares one
//! timer, which is only touched when an earlier deadline appears or when it fires.

use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use prometheus::{IntCounter, IntGauge};
use sealgate_policy::{
    Access, DecisionCache, Denial, Direction, Evidence, Message, MessageKind, MessagePermit, OnLoss,
    OnRefusal, RateExceeded, RateFacts, RateIndex, Refusal, Renewal, TokenFault, TunnelPermit,
    settle_message, settle_renewal,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Sleep};

use super::close::{self, ABNORMAL, GOING_AWAY};
use super::deflate::{Agreed, Deflater};
use super::frame::{self, Opcode, Sender};
use super::message::{self, Forward, Step, WireFault};
use super::side::{Intake, Side};
use crate::audit;
use crate::limits::Settling;
use crate::session::Session;

/// Most bytes taken from a peer before what they say is judged and passed on.
const READ: usize = 64 * 1024;

/// How often one wake-up comes back to a peer that has still more, before other tunnels get their turn.
const TURNS: u32 = 4;

/// For a peer to answer a close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// After that, for our last bytes to reach it: a socket closed with unread bytes in it resets the connection
/// and can take our close frame with it.
const LINGER: Duration = Duration::from_secs(1);

/// Scratch that grew beyond this for a long message is given back.
const SCRATCH_KEPT: usize = 256 * 1024;

thread_local! {
    /// Buffers of this core, in use only inside one poll of one tunnel.
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

#[derive(Default)]
struct Scratch {
    /// As read.
    read: Vec<u8>,
    /// Unmasked and inflated, to be judged.
    judged: message::Scratch,
    deflater: Deflater,
}

/// An open WebSocket on both sides, agreed and permitted, ready to run.
pub struct Tunnel<D, U> {
    /// Stream of the client.
    pub downstream: D,
    /// Stream of the upstream.
    pub upstream: U,
    /// What came behind the client's request head.
    pub downstream_early: Bytes,
    /// What came behind the upstream's response head.
    pub upstream_early: Bytes,
    /// What was agreed on with the client, if its messages and ours may be compressed.
    pub deflate: Option<Agreed>,
    /// By which every message is judged, until an [`Order`] brings others.
    pub terms: Terms,
    /// Where the client's new tokens go to be judged.
    pub renewer: Rc<dyn Renewer>,
    /// Where the rest of the gateway reaches this tunnel.
    pub orders: Rc<Orders>,
}

/// What a tunnel is judged by, all of it from one snapshot of the policy and one token.
pub struct Terms {
    /// What the policy says of this tunnel.
    pub permit: TunnelPermit,
    /// Where messages take from their rates: a [`RateIndex`] of the permit points into no other.
    pub rates: Rc<dyn RateTaker>,
    /// Where decisions that no table has are remembered.
    pub decisions: Rc<DecisionCache>,
    /// Counters of the permit's rule.
    pub metrics: Arc<TunnelMetrics>,
    /// Unix seconds at which the session ends, whatever happens; `None` for a tunnel that is nobody's.
    pub session_ends: Option<u64>,
    /// The session whose activity the client's messages are.
    pub session: Option<Arc<Session>>,
    /// The moment when these terms were made, on both clocks: places their dates on the clock of the timers, which no step
    /// of the wall clock moves afterwards.
    pub clock: (Instant, SystemTime),
}

/// Judges a client's new token.
pub trait Renewer {
    /// Begins to judge it, and never waits: the outcome comes as an [`Order::Renewal`], exactly one.
    fn renew(&self, renewal: Renewal);
}

/// Takes from rate limits: all that are wanted, or none of effect.
pub trait RateTaker {
    /// Takes one message's worth from every rate of `wanted` (never empty). What it gives has to end before another message of
    /// this client is looked at: so a client is no further ahead of rates that gateways share than by one message.
    ///
    /// # Errors
    /// The first rate that is used up.
    fn take(&self, wanted: &[RateIndex], facts: &RateFacts<'_>) -> Result<Option<Settling>, RateExceeded>;

    /// What the policy wants while revocations that were made elsewhere cannot be known; `None` while they can.
    fn lost(&self) -> Option<OnLoss> {
        None
    }
}

/// Counters, prepared when the policy was loaded: nothing is looked up per message.
#[derive(Debug, Clone)]
pub struct TunnelMetrics {
    /// Messages that went from clients to the upstream.
    pub messages_to_upstream: IntCounter,
    /// Their payload in bytes.
    pub bytes_to_upstream: IntCounter,
    /// Messages that went from the upstream to clients.
    pub messages_to_client: IntCounter,
    /// Their payload in bytes.
    pub bytes_to_client: IntCounter,
    /// Messages and frames refused, by reason.
    pub refused: ReasonCounters,
    /// Messages that rules in shadow mode would have refused, by reason.
    pub shadowed: ReasonCounters,
    /// Tunnels that run under the rule now.
    pub open: IntGauge,
}

/// One counter for each of [`Denial::ALL_REASONS`].
#[derive(Debug, Clone)]
pub struct ReasonCounters(Box<[(&'static str, IntCounter)]>);

impl ReasonCounters {
    /// Takes the metric's child for each reason.
    pub fn prepare(child: impl Fn(&'static str) -> IntCounter) -> ReasonCounters {
        ReasonCounters(Denial::ALL_REASONS.iter().map(|&reason| (reason, child(reason))).collect())
    }

    /// Counts one.
    pub fn count(&self, denial: &Denial) {
        let reason = denial.reason();
        if let Some((_, counter)) = self.0.iter().find(|(name, _)| *name == reason) {
            counter.inc();
        }
    }
}

/// What the rest of the gateway wants of an open tunnel.
pub enum Order {
    /// Close with this denial's code: revoked, replaced, restarting, policy changed…
    Close(Denial),
    /// Judge by these from the next message on: the policy changed.
    Policy(Box<Terms>),
    /// What came of the client's renewal: terms for the new token, or why the old one stays. [`closes`] says which
    /// denials end the tunnel whatever the policy says.
    Renewal(Result<Box<Terms>, Denial>),
}

/// Inbox of one tunnel, on the tunnel's own core. A later order of a kind takes the place of an earlier one, but nothing
/// takes the place of [`Order::Close`].
#[derive(Default)]
pub struct Orders {
    waiting: Cell<Option<Box<Waiting>>>,
    waker: Cell<Option<Waker>>,
}

/// Orders that nobody has read yet.
#[derive(Default)]
struct Waiting {
    close: Option<Denial>,
    renewal: Option<Result<Box<Terms>, Denial>>,
    /// Given after the renewal, where there is one.
    policy: Option<Box<Terms>>,
}

/// Whether a refused renewal ends the tunnel in any case: its new token proves that the old one must not count either, or
/// that the upstream holds something for true that no longer is.
#[must_use]
pub fn closes(denial: &Denial) -> bool {
    use Denial::{
        PolicyChanged, RenewalMismatch, Revoked, RightsChanged, SessionEnded, SessionIdle, SessionReplaced,
    };
    matches!(
        denial,
        Revoked
            | RenewalMismatch
            | RightsChanged
            | SessionEnded
            | SessionIdle
            | SessionReplaced
            | PolicyChanged
    )
}

impl Orders {
    /// An empty inbox; keep one `Rc`, give the other to the [`Tunnel`].
    pub fn new() -> Rc<Orders> {
        Rc::default()
    }

    /// Leaves an order and wakes the tunnel. Given before the tunnel runs, it is obeyed before anything is relayed;
    /// after it ended, nobody reads it.
    pub fn give(&self, order: Order) {
        let mut waiting = self.waiting.take().unwrap_or_default();
        match order {
            Order::Close(denial) => drop(waiting.close.get_or_insert(denial)),
            Order::Policy(terms) => waiting.policy = Some(terms),
            Order::Renewal(outcome) => {
                if outcome.is_ok() {
                    // They are the newer ones, and for the newer token.
                    waiting.policy = None;
                }
                waiting.renewal = Some(outcome);
            }
        }
        self.waiting.set(Some(waiting));
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn watch(&self, waker: &Waker) {
        let known = self.waker.take().filter(|known| known.will_wake(waker));
        self.waker.set(Some(known.unwrap_or_else(|| waker.clone())));
    }
}

/// How a tunnel ended, for the audit record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TunnelEnd {
    /// Close code that the client got or gave; 1006 if it vanished without one.
    pub code: u16,
    /// Who ended it.
    pub by: EndedBy,
    /// Why, where the gateway ended it.
    pub denial: Option<Denial>,
    /// What the client sent and was let through.
    pub to_upstream: Traffic,
    /// What the upstream sent and was let through.
    pub to_client: Traffic,
    /// Messages and frames refused, both ways.
    pub refused: u64,
}

/// Who ended a tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndedBy {
    /// The client closed, or vanished.
    Client,
    /// The upstream closed, or vanished.
    Upstream,
    /// We refused, or were told to close.
    Gateway,
}

/// What passed in one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Whole messages.
    pub messages: u64,
    /// Their payload in bytes.
    pub bytes: u64,
}

impl<D, U> Tunnel<D, U>
where
    D: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    /// Relays until both sides are closed. Needs a Tokio runtime with timers; the future stays on its core.
    pub fn run(self) -> Relay<D, U> {
        let now = Instant::now();
        let ends = Ends::of(&self.terms);
        let armed = now + self.terms.permit.limits().ping_interval;
        Relay {
            client: Side::new(self.downstream, Sender::Client, self.deflate, &self.downstream_early, now),
            upstream: Side::new(self.upstream, Sender::Server, None, &self.upstream_early, now),
            desk: Desk {
                permit: self.terms.permit,
                rates: self.terms.rates,
                decisions: self.terms.decisions,
                session: self.terms.session,
                metrics: Counted::new(self.terms.metrics),
                renewer: self.renewer,
                renewed: Renewed::Never,
                active: now,
                to_upstream: Traffic::default(),
                to_client: Traffic::default(),
                refused: 0,
                settling: None,
                answers: Vec::new(),
            },
            orders: self.orders,
            ends,
            armed,
            timer: Box::pin(tokio::time::sleep_until(armed)),
            ending: None,
        }
    }
}

/// When terms run out, on the clock of the timers; `None` if they never do, or in the far future.
#[derive(Clone, Copy)]
struct Ends {
    token: Option<Instant>,
    session: Option<Instant>,
}

impl Ends {
    fn of(terms: &Terms) -> Ends {
        let (at, wall) = terms.clock;
        let place = |seconds| {
            let end = UNIX_EPOCH.checked_add(Duration::from_secs(seconds))?;
            at.checked_add(end.duration_since(wall).unwrap_or_default())
        };
        let identity = terms.permit.identity();
        Ends {
            token: identity.and_then(|identity| place(identity.expires_at)),
            session: terms.session_ends.and_then(place),
        }
    }
}

/// A running tunnel: see [`Tunnel::run`].
pub struct Relay<D, U> {
    client: Side<D>,
    upstream: Side<U>,
    desk: Desk,
    orders: Rc<Orders>,
    ends: Ends,
    timer: Pin<Box<Sleep>>,
    armed: Instant,
    /// Set once, when the end is certain; from then on only the closing is left.
    ending: Option<Box<Ending>>,
}

struct Ending {
    code: u16,
    by: EndedBy,
    denial: Option<Denial>,
    deadline: Instant,
    /// The deadline has passed once: the last bytes go out, nobody is waited for.
    lingering: bool,
    /// It has passed twice.
    cut: bool,
}

impl<D, U> Future for Relay<D, U>
where
    D: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    type Output = TunnelEnd;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<TunnelEnd> {
        let this = self.get_mut();
        this.orders.watch(cx.waker());
        loop {
            let now = Instant::now();
            this.obey(now);
            this.keep_deadlines(now);
            let before = (this.desk.to_upstream, this.desk.to_client);
            let more = SCRATCH.with_borrow_mut(|scratch| this.relay(cx, scratch, now));
            this.desk.publish(before);
            if let Some(end) = this.end() {
                return Poll::Ready(end);
            }

            let next = this.next_deadline();
            if next < this.armed || this.timer.is_elapsed() {
                this.timer.as_mut().reset(next);
                this.armed = next;
            }
            if this.timer.as_mut().poll(cx).is_ready() {
                continue;
            }
            if more {
                cx.waker().wake_by_ref();
            }
            return Poll::Pending;
        }
    }
}

impl<D, U> Relay<D, U>
where
    D: AsyncRead + AsyncWrite + Unpin,
    U: AsyncRead + AsyncWrite + Unpin,
{
    fn obey(&mut self, now: Instant) {
        let Some(waiting) = self.orders.waiting.take() else { return };
        let Waiting { close, renewal, policy } = *waiting;
        if let Some(outcome) = renewal {
            self.desk.renewed = Renewed::At(now);
            match outcome {
                Ok(terms) => {
                    self.adopt(*terms);
                    self.desk.answer_renewed(self.ends, now);
                }
                Err(denial) => {
                    self.desk.refuse(&denial);
                    let rule = self.desk.permit.renew();
                    let close = rule.is_some_and(|rule| rule.on_refusal == OnRefusal::Close);
                    if close || closes(&denial) || !self.desk.answer(&denial, self.client.waiting()) {
                        self.close_both(denial, now);
                    }
                }
            }
        }
        if let Some(terms) = policy {
            self.adopt(*terms);
        }
        if let Some(denial) = close {
            self.close_both(denial, now);
        }
    }

    fn adopt(&mut self, terms: Terms) {
        self.ends = Ends::of(&terms);
        self.desk.permit = terms.permit;
        self.desk.rates = terms.rates;
        self.desk.decisions = terms.decisions;
        self.desk.session = terms.session;
        self.desk.metrics = Counted::new(terms.metrics);
    }

    /// Does what is due at `now`. INVARIANT: afterwards [`Relay::next_deadline`] is later than `now`.
    fn keep_deadlines(&mut self, now: Instant) {
        let limits = self.desk.permit.limits();
        let (ping_interval, idle) = (limits.ping_interval, limits.idle);
        if self.client.is_stuck(limits, now) {
            self.client.lose();
            self.upstream.close(GOING_AWAY, "too-slow");
            self.begin_end(Denial::TooSlow.close_code(), EndedBy::Gateway, Some(Denial::TooSlow), now);
        }
        if self.upstream.is_stuck(self.desk.permit.limits(), now) {
            self.upstream.lose();
            self.refuse_client(Denial::UpstreamTimeout, EndedBy::Upstream, now);
        }
        if let Some(ending) = &mut self.ending {
            if now >= ending.deadline {
                ending.cut = ending.lingering;
                ending.lingering = true;
                ending.deadline = now + LINGER;
                let code = ending.code;
                self.client.stop_waiting(code);
                self.upstream.stop_waiting(code);
            }
            return;
        }

        if self.ends.session.is_some_and(|ends| now >= ends) {
            return self.close_both(Denial::SessionEnded, now);
        }
        if self.ends.token.is_some_and(|expires| now >= expires) {
            return self.close_both(Denial::TokenInvalid(TokenFault::Expired), now);
        }
        if idle.is_some_and(|idle| now >= self.desk.active + idle) {
            return self.close_both(Denial::SessionIdle, now);
        }
        if !self.is_stalled() {
            if self.client.is_unresponsive(self.desk.permit.limits(), now) {
                self.client.close(GOING_AWAY, "pong-timeout");
                self.client.lose_input();
                self.upstream.close(GOING_AWAY, "client-gone");
                return self.begin_end(ABNORMAL, EndedBy::Client, None, now);
            }
            if self.upstream.is_unresponsive(self.desk.permit.limits(), now) {
                self.upstream.close(GOING_AWAY, "pong-timeout");
                self.upstream.lose_input();
                return self.refuse_client(Denial::UpstreamTimeout, EndedBy::Upstream, now);
            }
            self.client.ping_if_silent(ping_interval, now);
            self.upstream.ping_if_silent(ping_interval, now);
        }
    }

    fn next_deadline(&self) -> Instant {
        let limits = self.desk.permit.limits();
        let stuck = [self.client.stuck_at(limits), self.upstream.stuck_at(limits)];
        let due = match &self.ending {
            Some(ending) => [Some(ending.deadline), None, None, None, None],
            None => {
                let idle = limits.idle.map(|idle| self.desk.active + idle);
                let (client, upstream) = match self.is_stalled() {
                    true => (None, None),
                    false => (Some(self.client.watch_at(limits)), Some(self.upstream.watch_at(limits))),
                };
                [self.ends.token, self.ends.session, idle, client, upstream]
            }
        };
        // Nothing due means that somebody is stalled, or that the tunnel ends.
        stuck.into_iter().chain(due).flatten().min().unwrap_or(self.armed + CLOSE_TIMEOUT)
    }

    /// A peer that does not read keeps us from reading the other: then silence proves nothing about either.
    fn is_stalled(&self) -> bool {
        self.client.stalled.is_some() || self.upstream.stalled.is_some()
    }

    /// Moves bytes both ways until nobody has more, or other tunnels have waited long enough (then `true`).
    fn relay(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch, now: Instant) -> bool {
        if scratch.read.is_empty() {
            scratch.read = vec![0; READ];
        }
        let was_stalled = self.is_stalled();
        let mut more = true;
        for _ in 0..TURNS {
            more = self.relay_to_upstream(cx, scratch, now) | self.relay_to_client(cx, scratch, now);
            if !more {
                break;
            }
        }
        self.give_answers();
        self.client.poll_out(cx, now);
        self.upstream.poll_out(cx, now);
        // What can no longer be written to is not worth reading, beyond what came by now.
        if self.client.broken && self.client.intake != Intake::Ended {
            self.client_gone(now);
        }
        if self.upstream.broken && self.upstream.intake != Intake::Ended {
            self.upstream_gone(now);
        }
        // The closing words of `…_gone`, if any.
        self.client.poll_out(cx, now);
        self.upstream.poll_out(cx, now);
        self.client.poll_shutdown(cx);
        self.upstream.poll_shutdown(cx);

        if was_stalled && !self.is_stalled() {
            self.client.hear(now);
            self.upstream.hear(now);
        }
        scratch.judged.trim(SCRATCH_KEPT);
        scratch.deflater.trim(SCRATCH_KEPT);
        more
    }

    fn relay_to_upstream(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch, now: Instant) -> bool {
        let Relay { client, upstream, desk, .. } = self;
        match client.intake {
            Intake::Frames => {
                let carried = carry(Direction::ToUpstream, client, upstream, desk, scratch, cx, now);
                match carried.outcome {
                    None => {}
                    Some(Outcome::Closed(code)) => self.begin_end(code, EndedBy::Client, None, now),
                    Some(Outcome::Gone) => self.client_gone(now),
                    Some(Outcome::Refused(denial)) => {
                        self.upstream.close(GOING_AWAY, denial.reason());
                        self.refuse_client(denial, EndedBy::Gateway, now);
                    }
                }
                carried.more
            }
            Intake::Drain | Intake::Discard => client.drain(&mut scratch.read, cx),
            Intake::Ended => false,
        }
    }

    fn relay_to_client(&mut self, cx: &mut Context<'_>, scratch: &mut Scratch, now: Instant) -> bool {
        let Relay { client, upstream, desk, .. } = self;
        match upstream.intake {
            Intake::Frames => {
                let carried = carry(Direction::ToClient, upstream, client, desk, scratch, cx, now);
                match carried.outcome {
                    None => {}
                    Some(Outcome::Closed(code)) => self.begin_end(code, EndedBy::Upstream, None, now),
                    Some(Outcome::Gone) => self.upstream_gone(now),
                    Some(Outcome::Refused(denial)) => {
                        // Not the client's fault, and none of its business.
                        self.upstream.close(denial.close_code(), denial.reason());
                        self.client.close_with(&Denial::Internal);
                        self.begin_end(close::INTERNAL_ERROR, EndedBy::Gateway, Some(denial), now);
                    }
                }
                carried.more
            }
            Intake::Drain | Intake::Discard => upstream.drain(&mut scratch.read, cx),
            Intake::Ended => false,
        }
    }

    fn client_gone(&mut self, now: Instant) {
        self.client.lose_input();
        // It may have closed in order, and be waiting for our answer with its own side shut.
        if self.client.broken || !self.client.close_received {
            self.client.close_sent = true;
            self.upstream.close(GOING_AWAY, "client-gone");
            self.begin_end(ABNORMAL, EndedBy::Client, None, now);
        }
    }

    fn upstream_gone(&mut self, now: Instant) {
        self.upstream.lose_input();
        if self.upstream.broken || !self.upstream.close_received {
            self.upstream.close_sent = true;
            self.refuse_client(Denial::UpstreamUnavailable, EndedBy::Upstream, now);
        }
    }

    /// What was refused before the end is still told.
    fn give_answers(&mut self) {
        if !self.desk.answers.is_empty() && !self.upstream.incoming.is_amid_message() {
            let answers = std::mem::take(&mut self.desk.answers);
            self.client.queue(&answers);
        }
    }

    fn close_both(&mut self, denial: Denial, now: Instant) {
        self.upstream.close(denial.close_code(), denial.reason());
        self.refuse_client(denial, EndedBy::Gateway, now);
    }

    fn refuse_client(&mut self, denial: Denial, by: EndedBy, now: Instant) {
        self.give_answers();
        self.client.close_with(&denial);
        self.begin_end(denial.close_code(), by, Some(denial), now);
    }

    /// The first end counts. Messages that can go nowhere any more are only read past.
    fn begin_end(&mut self, code: u16, by: EndedBy, denial: Option<Denial>, now: Instant) {
        if self.upstream.close_sent {
            self.client.stop_reading_messages();
        }
        if self.client.close_sent {
            self.upstream.stop_reading_messages();
        }
        self.ending.get_or_insert_with(|| {
            let deadline = now + CLOSE_TIMEOUT;
            Box::new(Ending { code, by, denial, deadline, lingering: false, cut: false })
        });
    }

    fn end(&mut self) -> Option<TunnelEnd> {
        let ending = self.ending.as_mut()?;
        let is_over = ending.cut || (self.client.is_done() && self.upstream.is_done());
        if !is_over {
            return None;
        }
        Some(TunnelEnd {
            code: ending.code,
            by: ending.by,
            denial: ending.denial.take(),
            to_upstream: self.desk.to_upstream,
            to_client: self.desk.to_client,
            refused: self.desk.refused,
        })
    }
}

/// Where messages are judged and counted.
struct Desk {
    permit: TunnelPermit,
    rates: Rc<dyn RateTaker>,
    decisions: Rc<DecisionCache>,
    session: Option<Arc<Session>>,
    metrics: Counted,
    renewer: Rc<dyn Renewer>,
    renewed: Renewed,
    /// Last declared activity.
    active: Instant,
    to_upstream: Traffic,
    to_client: Traffic,
    refused: u64,
    /// What the client's next message has to wait for.
    settling: Option<Settling>,
    /// Error messages for the client. They wait for the end of a message that goes to it frame by frame: a
    /// message must not begin inside another (RFC 6455 §5.4).
    answers: Vec<u8>,
}

/// Metrics under which the tunnel counts as open until this is dropped.
struct Counted(Arc<TunnelMetrics>);

impl Counted {
    fn new(metrics: Arc<TunnelMetrics>) -> Counted {
        metrics.open.inc();
        Counted(metrics)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.dec();
    }
}

impl std::ops::Deref for Counted {
    type Target = TunnelMetrics;

    fn deref(&self) -> &TunnelMetrics {
        &self.0
    }
}

/// How far the client's last renewal has come.
#[derive(Clone, Copy)]
enum Renewed {
    Never,
    /// It is being judged.
    Pending,
    /// It was answered.
    At(Instant),
}

/// What the policy permits of a message.
enum Permitted {
    Message(MessagePermit),
    Renewal(Renewal),
}

/// What became of a message that was permitted.
enum Judged {
    /// Goes on to the other side.
    Accepted(Accepted),
    /// Was for the gateway alone: nothing of it goes on.
    Swallowed,
}

/// Proof that a frame may go on: its message was judged by the [`Desk`], or it is a close frame.
struct Accepted(());

impl Desk {
    /// Judges a message: a whole one, or, where the policy does not look into it, its first frame.
    fn judge(&mut self, message: &Message<'_>, now: Instant) -> Result<Judged, Refusal> {
        let permit = match self.permit_message(message) {
            Ok(Permitted::Message(permit)) => permit,
            Ok(Permitted::Renewal(renewal)) => {
                self.renew(renewal, now).inspect_err(|refusal| self.refuse(&refusal.denial))?;
                return Ok(Judged::Swallowed);
            }
            Err(refusal) => {
                self.refuse(&refusal.denial);
                return Err(refusal);
            }
        };
        if let Some(denial) = permit.shadowed() {
            self.metrics.shadowed.count(denial);
        }
        // What the backend says is not the user's activity (row S-1), whatever a type of both directions declares.
        if permit.activity() && message.direction == Direction::ToUpstream {
            self.active = now;
            if let Some(session) = &self.session {
                session.touch(crate::clock::unix_now());
            }
        }
        Ok(Judged::Accepted(Accepted(())))
    }

    fn permit_message(&mut self, message: &Message<'_>) -> Result<Permitted, Refusal> {
        let mut access = None;
        let permitted = self.permit_watched(message, &mut access);
        if let Some(access) = access {
            audit::message(&audit::MessageRecord {
                address: self.permit.address(),
                route: &self.permit.rule().name,
                identity: self.permit.identity().map(|identity| &**identity),
                access: &access,
                denial: permitted.as_ref().err().map(|refusal| &refusal.denial),
            });
        }
        permitted
    }

    fn permit_watched(
        &mut self,
        message: &Message<'_>,
        access: &mut Option<Access>,
    ) -> Result<Permitted, Refusal> {
        let demands = self.permit.judge_watched(message, access)?;
        let rates = match demands.rates() {
            [] => Ok(()),
            wanted => {
                let taken = self.rates.take(wanted, &demands.rate_facts());
                taken.map(|settling| self.settling = settling)
            }
        };
        // The clock is read for few messages.
        let demands = match demands.needs_moment() {
            true => demands.at(crate::clock::unix_now(), &self.decisions),
            false => demands,
        };
        // A revocation reaches an open tunnel as an order.
        let evidence = Evidence { rates, revoked: false, lost: self.rates.lost() };
        match demands.is_renewal() {
            true => settle_renewal(demands, evidence).map(Permitted::Renewal),
            false => settle_message(demands, evidence).map(Permitted::Message),
        }
    }

    /// Whether the client's next message has to wait. If so, the task is woken when it need not any more.
    fn is_settling(&mut self, cx: &mut Context<'_>) -> bool {
        let pending = self.settling.as_mut().is_some_and(|settling| settling.as_mut().poll(cx).is_pending());
        if !pending {
            self.settling = None;
        }
        pending
    }

    /// Has the new token judged, unless that was asked for a moment ago or still goes on.
    fn renew(&mut self, renewal: Renewal, now: Instant) -> Result<(), Refusal> {
        let Some(rule) = self.permit.renew() else {
            return Err(Refusal { denial: Denial::Internal, action: OnRefusal::Close });
        };
        let wait = match self.renewed {
            Renewed::Never => Duration::ZERO,
            Renewed::Pending => rule.min_interval,
            Renewed::At(at) => (at + rule.min_interval).saturating_duration_since(now),
        };
        if !wait.is_zero() {
            let denial = Denial::RenewalTooSoon { retry_after: wait };
            return Err(Refusal { denial, action: rule.on_refusal });
        }
        if let Some(denial) = renewal.shadowed() {
            self.metrics.shadowed.count(denial);
        }
        self.renewed = Renewed::Pending;
        self.renewer.renew(renewal);
        Ok(())
    }

    /// Tells the client that its new token counts, and until when.
    fn answer_renewed(&mut self, ends: Ends, now: Instant) {
        let (Some(rule), Some(identity)) = (self.permit.renew(), self.permit.identity()) else { return };
        // Seconds, as tokens count them; never later than the socket's own end.
        let token = ends.token.map_or(Duration::ZERO, |at| at.saturating_duration_since(now));
        let session = ends.session.map_or(token, |at| at.saturating_duration_since(now));
        let earlier = token.saturating_sub(session).as_secs();
        let answer = serde_json::json!({
            "type": format!("{}.ok", rule.name),
            "expires_at": identity.expires_at.saturating_sub(earlier),
        });
        frame::write_frame(&mut self.answers, Opcode::Text, None, answer.to_string().as_bytes());
    }

    fn count(&mut self, direction: Direction, messages: bool, bytes: usize) {
        let traffic = match direction {
            Direction::ToUpstream => &mut self.to_upstream,
            Direction::ToClient => &mut self.to_client,
        };
        traffic.messages += u64::from(messages);
        traffic.bytes += bytes as u64;
    }

    fn refuse(&mut self, denial: &Denial) {
        self.refused += 1;
        self.metrics.refused.count(denial);
    }

    fn refuse_wire(&mut self, fault: WireFault) -> Denial {
        let denial = Denial::from(fault);
        self.refuse(&denial);
        denial
    }

    /// Once per wake-up rather than once per message: the counters are shared by all cores.
    fn publish(&self, before: (Traffic, Traffic)) {
        let add = |counter: &IntCounter, before: u64, after: u64| {
            if after > before {
                counter.inc_by(after - before);
            }
        };
        let (to_upstream, to_client) = before;
        add(&self.metrics.messages_to_upstream, to_upstream.messages, self.to_upstream.messages);
        add(&self.metrics.bytes_to_upstream, to_upstream.bytes, self.to_upstream.bytes);
        add(&self.metrics.messages_to_client, to_client.messages, self.to_client.messages);
        add(&self.metrics.bytes_to_client, to_client.bytes, self.to_client.bytes);
    }

    /// Tells the client that a message was dropped; `false` if it leaves too much unread for that: `waiting` bytes.
    fn answer(&mut self, denial: &Denial, waiting: usize) -> bool {
        let mut answer = serde_json::Map::from_iter([
            ("type".to_owned(), "error".into()),
            ("reason".to_owned(), denial.reason().into()),
            ("detail".to_owned(), denial.detail().into()),
        ]);
        if let Some(seconds) = denial.retry_after() {
            answer.insert("retry_after".to_owned(), seconds.into());
        }
        let answer = serde_json::Value::Object(answer).to_string();
        frame::write_frame(&mut self.answers, Opcode::Text, None, answer.as_bytes());
        self.answers.len().saturating_add(waiting) <= self.permit.limits().buffer as usize
    }
}

/// What one look at a peer led to.
struct Carried {
    /// There may be more to read at once.
    more: bool,
    outcome: Option<Outcome>,
}

enum Outcome {
    /// The peer closed in order, with this code; its close frame has been passed on.
    Closed(u16),
    /// The peer's stream ended without a close frame.
    Gone,
    /// The peer broke a rule.
    Refused(Denial),
}

/// Reads what `from` has, judges it, and writes what is accepted to `to`.
fn carry<S, T>(
    direction: Direction,
    from: &mut Side<S>,
    to: &mut Side<T>,
    desk: &mut Desk,
    scratch: &mut Scratch,
    cx: &mut Context<'_>,
    now: Instant,
) -> Carried
where
    S: AsyncRead + AsyncWrite + Unpin,
    T: AsyncRead + AsyncWrite + Unpin,
{
    // Back pressure: nothing more from one side while the other has not taken what came before.
    if !to.poll_out(cx, now) || to.broken {
        return Carried { more: false, outcome: None };
    }
    let waits =
        |desk: &mut Desk, cx: &mut Context<'_>| direction == Direction::ToUpstream && desk.is_settling(cx);
    if waits(desk, cx) {
        return Carried { more: false, outcome: None };
    }
    let Scratch { read, judged: scratch, deflater } = scratch;
    let (came, mut more, ended) = match from.unexamined {
        // First what is there: so little is kept, however much it inflates to.
        true => (&[][..], true, false),
        false => from.poll_in(cx, read, desk.permit.limits().buffer as usize),
    };
    let mut outcome = ended.then_some(Outcome::Gone);
    if came.is_empty() && !from.unexamined {
        return Carried { more, outcome };
    }
    from.unexamined = false;
    from.hear(now);

    let mut kept = std::mem::take(&mut from.unread);
    let bytes = match kept.is_empty() {
        true => came,
        false => {
            kept.extend_from_slice(came);
            kept.as_slice()
        }
    };
    let judged = desk.permit.inspects(direction);
    let mut run = Run { bytes, start: 0, at: 0 };
    let mut inflated = 0;
    loop {
        if waits(desk, cx) {
            // What is left is looked at when the wait is over; so is the end of the stream, if it came.
            from.unexamined = true;
            more = false;
            outcome = None;
            break;
        }
        let limits = desk.permit.limits();
        let step = match from.incoming.next(run.rest(), judged, limits, now.into_std(), scratch) {
            Ok(step) => step,
            Err(fault) => {
                from.intake = Intake::Discard;
                outcome = Some(Outcome::Refused(desk.refuse_wire(fault)));
                break;
            }
        };
        match step {
            Step::Partial => break,
            Step::Frame { len, kind, first, last, payload } => {
                let verdict = match first {
                    true => desk.judge(&Message { direction, kind, payload }, now),
                    // Its message was judged with its first frame.
                    false => Ok(Judged::Accepted(Accepted(()))),
                };
                match verdict {
                    // INVARIANT: where messages go on frame by frame, none is looked into, and none renews a token.
                    Ok(Judged::Swallowed) => {
                        outcome = Some(Outcome::Refused(Denial::Internal));
                        break;
                    }
                    Ok(Judged::Accepted(accepted)) => {
                        desk.count(direction, last, payload.len());
                        match first && last {
                            true => run.pass_on(len, accepted, kind, payload, to, deflater),
                            false => run.accept(len, accepted),
                        }
                    }
                    // Without a type to say otherwise, a refusal closes; its other frames could not be told apart.
                    Err(Refusal { denial, .. }) => {
                        to.queue(run.pass_over(len));
                        outcome = Some(Outcome::Refused(denial));
                        break;
                    }
                }
            }
            Step::Message { len, kind, payload, forward } => {
                inflated += if forward == Forward::Anew { payload.len() } else { 0 };
                let verdict = desk.judge(&Message { direction, kind, payload }, now);
                let held = from.incoming.take_held();
                match verdict {
                    Ok(Judged::Swallowed) => {
                        to.queue(run.pass_over(len));
                        // A token was in there.
                        scratch.erase();
                    }
                    Ok(Judged::Accepted(accepted)) => {
                        desk.count(direction, true, payload.len());
                        match forward {
                            Forward::InPlace => run.pass_on(len, accepted, kind, payload, to, deflater),
                            Forward::Held => {
                                to.queue(run.pass_over(len));
                                to.queue(&held);
                            }
                            Forward::Anew => {
                                to.queue(run.pass_over(len));
                                to.queue_frame(kind.into(), payload);
                            }
                        }
                    }
                    Err(Refusal { denial, action }) => {
                        to.queue(run.pass_over(len));
                        let waiting = match direction {
                            Direction::ToUpstream => from.waiting(),
                            Direction::ToClient => to.waiting(),
                        };
                        if action == OnRefusal::Close || !desk.answer(&denial, waiting) {
                            outcome = Some(Outcome::Refused(denial));
                            break;
                        }
                    }
                }
                if inflated >= READ {
                    // Few bytes can become many: no more until these are taken, and other tunnels had their turn.
                    from.unexamined = true;
                    more = true;
                    // The end of the stream, if it came, will show again.
                    outcome = None;
                    break;
                }
            }
            Step::Held { len } => to.queue(run.pass_over(len)),
            Step::Control { len, opcode: Opcode::Close, payload } => {
                match close::read(payload) {
                    Ok(code) => {
                        if !to.close_sent {
                            run.accept(len, Accepted(()));
                        }
                        from.close_received = true;
                        from.intake = Intake::Discard;
                        outcome = Some(Outcome::Closed(code));
                    }
                    Err(error) => {
                        from.intake = Intake::Discard;
                        outcome = Some(Outcome::Refused(desk.refuse_wire(error.into())));
                    }
                }
                break;
            }
            Step::Control { len, opcode, payload } => {
                if opcode == Opcode::Ping {
                    from.pong(payload, desk.permit.limits());
                }
                to.queue(run.pass_over(len));
            }
        }
    }

    to.write(run.accepted(), cx, now);
    if from.close_received {
        to.close_sent = true;
    }
    let (examined, rest) = (run.at, run.rest().len());
    if from.intake == Intake::Frames && rest > 0 {
        from.unread = match kept.is_empty() {
            true => run.rest().to_vec(),
            false => {
                kept.drain(..examined);
                kept.shrink_to(rest.saturating_mul(2));
                kept
            }
        };
    }
    Carried { more, outcome }
}

/// A run of accepted wire bytes that lie side by side, so that they go out in one write.
struct Run<'a> {
    bytes: &'a [u8],
    /// Where the accepted bytes begin that are in nobody's hands yet.
    start: usize,
    /// Where the bytes begin that have not been looked at.
    at: usize,
}

impl<'a> Run<'a> {
    fn accept(&mut self, len: usize, _proof: Accepted) {
        self.at += len;
    }

    /// A message in one frame: compressed where that is agreed on and saves anything, else as it lies.
    fn pass_on<T>(
        &mut self,
        len: usize,
        proof: Accepted,
        kind: MessageKind,
        payload: &[u8],
        to: &mut Side<T>,
        deflater: &mut Deflater,
    ) {
        match to.deflate.and_then(|agreed| deflater.deflate(agreed, payload)) {
            None => self.accept(len, proof),
            Some(compressed) => {
                to.queue(self.pass_over(len));
                to.queue_compressed(kind.into(), compressed);
            }
        }
    }

    /// Leaves out `len` bytes: gives the run up to there, which a new one follows.
    fn pass_over(&mut self, len: usize) -> &'a [u8] {
        let run = self.accepted();
        self.at += len;
        self.start = self.at;
        run
    }

    fn accepted(&self) -> &'a [u8] {
        self.bytes.get(self.start..self.at).unwrap_or_default()
    }

    fn rest(&self) -> &'a [u8] {
        self.bytes.get(self.at..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
