//! Sessions of this gateway, with what other gateways know of them.

use std::{sync::Arc, time::Duration};

use sealgate_policy::{Denial, Identity, Policy, SessionId};

use super::{Gateway, inbox::Notice};
use crate::{
    clock,
    session::{Begun, Look, Session, SessionEnd, Sessions},
    shared::{Began, Beginning, Settled, Together},
};

/// With other gateways a session is idle so much later: their activity is told once a second.
const MARGIN: Duration = Duration::from_secs(2);

/// Sessions that are asked about at once.
const BATCH: usize = 500;

/// Between two looks for sessions that became idle.
const TICK: Duration = Duration::from_secs(1);

/// After that a session is asked about again whose sockets were closed while nobody could say.
const ASK_AGAIN: u64 = 10;

impl Gateway {
    /// The session of a verified identity that is otherwise permitted, if it runs at `now` (unix seconds); begins it on first
    /// sight. Counts as no activity: see [`Session::touch`]. Waits only where a session is new here or seems idle, and other
    /// gateways are to be asked: for one round trip, for the deadline of `[shared]` at most.
    ///
    /// # Errors
    /// [`Denial::SessionIdle`], [`Denial::SessionReplaced`], [`Denial::TooManySessions`], [`Denial::Overloaded`], and
    /// [`Denial::ContactLost`] for a session that seems idle while Redis is late, or has not been told for a while.
    pub async fn session(
        &self,
        policy: &Policy,
        identity: &Identity,
        now: u64,
    ) -> Result<Arc<Session>, Denial> {
        match self.sessions.look(identity, idle(policy), now) {
            Look::Live(session) => Ok(session),
            Look::Ended(end) => Err(end.denial()),
            // In boxes: few requests come here, and the future is moved for all.
            Look::SeemsIdle(session) => Box::pin(self.doubt(policy, session, now)).await,
            Look::Unknown => Box::pin(self.begin(policy, identity, now)).await,
        }
    }

    /// Nobody here saw activity; somebody else may have.
    async fn doubt(&self, policy: &Policy, session: Arc<Session>, now: u64) -> Result<Arc<Session>, Denial> {
        let idle = idle(policy);
        match self.shared.settle_sessions(std::slice::from_ref(&session), idle, now).await {
            Together::Alone => {
                self.end_sessions(&[session], SessionEnd::Idle);
                Err(Denial::SessionIdle)
            }
            Together::Answer(answers) => match answers.first() {
                Some(Settled::Active(at)) => {
                    session.saw(*at);
                    Ok(session)
                }
                Some(Settled::Ended(end)) => {
                    self.end_sessions(&[session], *end);
                    Err(end.denial())
                }
                Some(Settled::Unsure) => Err(Denial::ContactLost),
                None => Err(Denial::Internal),
            },
            // Its own word alone. It is not remembered: others may know better when they are back.
            Together::Unknown if self.shared.is_lost() => Err(Denial::SessionIdle),
            // It may be fine: nobody is to be logged out for that.
            Together::Unknown => Err(Denial::ContactLost),
        }
    }

    async fn begin(&self, policy: &Policy, identity: &Identity, now: u64) -> Result<Arc<Session>, Denial> {
        let (rules, idle) = (policy.session(), idle(policy));
        let start = Sessions::start_of(identity, rules, now);
        let limit = rules.limit_of(identity);
        let beginning = Beginning {
            id: identity.session_id,
            subject: SessionId::of_subject(&identity.issuer, &identity.subject),
            start,
            idle,
            lifetime: rules.lifetime.as_secs(),
            now,
            counts: !rules.limits.is_empty() && identity.names_session(),
            limit,
        };
        let begun = match self.shared.begin_session(&beginning).await {
            Together::Alone | Together::Unknown => {
                if start.saturating_add(idle) <= now {
                    return Err(Denial::SessionIdle);
                }
                // Others are told as soon as they can be.
                self.sessions.begin(identity, rules, idle, start, limit, now)?
            }
            Together::Answer(Began::Live { active, replaced }) => {
                let ended: Vec<_> = replaced.iter().filter_map(|id| self.sessions.find(*id)).collect();
                self.end_sessions(&ended, SessionEnd::Replaced);
                let begun = self.sessions.begin(identity, rules, idle, active, None, now)?;
                begun.session.told();
                begun
            }
            Together::Answer(Began::Ended(end)) => {
                // Remembered, so that nobody is asked for every request of it.
                let begun = self.sessions.begin(identity, rules, idle, start, None, now)?;
                self.sessions.end(&begun.session, end);
                return Err(end.denial());
            }
            Together::Answer(Began::Old) => return Err(Denial::SessionIdle),
            Together::Answer(Began::Unsure) => return Err(Denial::ContactLost),
            Together::Answer(Began::Full) => return Err(Denial::TooManySessions),
        };
        let Begun { session, replaced } = begun;
        self.close_sessions(&replaced, SessionEnd::Replaced);
        match session.ended() {
            Some(end) => Err(end.denial()),
            None => Ok(session),
        }
    }

    /// Ends sessions: their requests are refused from now on, their sockets close.
    pub(crate) fn end_sessions(&self, sessions: &[Arc<Session>], end: SessionEnd) {
        let ended: Vec<_> =
            sessions.iter().filter(|session| self.sessions.end(session, end)).cloned().collect();
        self.close_sessions(&ended, end);
    }

    /// Closes the sockets of sessions that have ended.
    fn close_sessions(&self, sessions: &[Arc<Session>], end: SessionEnd) {
        if sessions.is_empty() {
            return;
        }
        self.metrics().sessions_ended(&end.denial(), sessions.len());
        let sessions = sessions.iter().map(|session| session.id()).collect();
        self.cores.tell_all(&Notice::Ended { sessions, end });
    }

    /// Ends sessions as they become idle, for ever.
    pub(crate) async fn keep_sessions(&self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let policy = self.current.load_full();
            let (idle, now) = (idle(&policy.policy), clock::unix_now());
            let due = self.sessions.due(idle, now);
            for sessions in due.chunks(BATCH) {
                self.settle(sessions, idle, now).await;
            }
        }
    }

    async fn settle(&self, sessions: &[Arc<Session>], idle: u64, now: u64) {
        match self.shared.settle_sessions(sessions, idle, now).await {
            Together::Alone => self.end_sessions(sessions, SessionEnd::Idle),
            Together::Answer(answers) => {
                for (session, answer) in sessions.iter().zip(answers) {
                    match answer {
                        Settled::Active(at) => {
                            session.saw(at);
                            self.sessions.look_again(session.clone(), at.saturating_add(idle));
                        }
                        Settled::Ended(end) => self.end_sessions(std::slice::from_ref(session), end),
                        Settled::Unsure => {
                            self.ask_again(std::slice::from_ref(session), now.saturating_add(1))
                        }
                    }
                }
            }
            Together::Unknown if self.shared.is_lost() => {
                // As for requests: by its own word alone, and not for good.
                let ids = sessions.iter().map(|session| session.id()).collect();
                self.cores.tell_all(&Notice::Ended { sessions: ids, end: SessionEnd::Idle });
                self.ask_again(sessions, now.saturating_add(ASK_AGAIN));
            }
            Together::Unknown => self.ask_again(sessions, now.saturating_add(1)),
        }
    }

    fn ask_again(&self, sessions: &[Arc<Session>], then: u64) {
        for session in sessions {
            self.sessions.look_again(session.clone(), then);
        }
    }

    /// Sessions that run, and those that are remembered, for metrics.
    pub(crate) fn count_sessions(&self) -> (usize, usize) {
        let snapshot = self.current.load();
        (self.sessions.live(idle(&snapshot.policy), clock::unix_now()), self.sessions.remembered())
    }
}

/// Seconds without activity that end a session.
fn idle(policy: &Policy) -> u64 {
    let margin = if policy.shared().is_some() { MARGIN } else { Duration::ZERO };
    (policy.session().idle + margin).as_secs()
}
