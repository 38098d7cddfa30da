//! How the cores are reached from outside their threads.

use std::sync::Arc;

use sealgate_policy::SessionId;
use tokio::sync::{Notify, mpsc};

use crate::session::{OwnedTarget, Rows, SessionEnd, SessionQuery};

/// Notices that wait for one core. More are not kept: the core looks at all its sockets then.
const NOTICES: usize = 1024;

/// What a core is told.
#[derive(Clone)]
pub(super) enum Notice {
    /// A revocation was entered: close what it ends, and say how many sockets that were.
    Revoked {
        target: Arc<OwnedTarget>,
        /// See [`Revocation`](crate::session::Revocation).
        issued_before: u64,
        closed: mpsc::Sender<usize>,
    },
    /// Say which sockets are open.
    List { query: Arc<SessionQuery>, found: mpsc::Sender<Rows> },
    /// A newer socket took this one's place; see [`SocketGuard::id`](crate::limits::SocketGuard::id).
    Displaced(u64),
    /// These sessions have ended: close their sockets.
    Ended { sessions: Arc<[SessionId]>, end: SessionEnd },
    /// Other gateways cannot be heard, and the policy wants sessions' sockets closed then.
    ContactLost,
}

/// One way in for each core.
pub struct Inboxes(Box<[Sender]>);

struct Sender {
    notices: mpsc::Sender<Notice>,
    overflow: Arc<Notify>,
}

/// The core's end.
pub struct Inbox {
    notices: mpsc::Receiver<Notice>,
    overflow: Arc<Notify>,
}

/// What comes out of an inbox.
pub(super) enum Mail {
    /// One notice.
    Notice(Notice),
    /// Some did not find room: the state that they told of is to be looked at instead.
    Missed,
}

impl Inboxes {
    /// Ways in for `cores` cores, and the ends for the cores themselves.
    #[must_use]
    pub fn new(cores: usize) -> (Self, Vec<Inbox>) {
        let pair = |_| {
            let (sender, receiver) = mpsc::channel(NOTICES);
            let overflow = Arc::new(Notify::new());
            let sender = Sender { notices: sender, overflow: overflow.clone() };
            (sender, Inbox { notices: receiver, overflow })
        };
        let (senders, receivers): (Vec<_>, Vec<_>) = (0..cores).map(pair).unzip();
        (Self(senders.into()), receivers)
    }

    /// How many cores there are.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Tells one core, by its index. Never waits, never loses what matters.
    pub(super) fn tell(&self, core: usize, notice: Notice) {
        if let Some(sender) = self.0.get(core) {
            sender.tell(notice);
        }
    }

    /// Has every core hold all its sockets against the revocations and limits.
    pub(crate) fn sweep_all(&self) {
        for sender in &self.0 {
            sender.overflow.notify_one();
        }
    }

    /// Has every core close the sockets of sessions, if it still is as the notice says.
    pub(crate) fn contact_lost(&self) {
        self.tell_all(&Notice::ContactLost);
    }

    /// Tells every core. Never waits, never loses what matters: see [`Mail::Missed`].
    pub(super) fn tell_all(&self, notice: &Notice) {
        for sender in &self.0 {
            sender.tell(notice.clone());
        }
    }
}

impl Sender {
    fn tell(&self, notice: Notice) {
        // A core that has ended has no sockets either.
        if let Err(mpsc::error::TrySendError::Full(_)) = self.notices.try_send(notice) {
            self.overflow.notify_one();
        }
    }
}

impl Inbox {
    /// Waits for what comes next; `None` when nothing can come any more.
    pub(super) async fn next(&mut self) -> Option<Mail> {
        tokio::select! {
            notice = self.notices.recv() => notice.map(Mail::Notice),
            () = self.overflow.notified() => Some(Mail::Missed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revoked(subject: &str) -> Notice {
        Notice::Revoked {
            target: Arc::new(OwnedTarget::Subject { issuer: "i".into(), subject: subject.into() }),
            issued_before: 1,
            closed: mpsc::channel(1).0,
        }
    }

    #[tokio::test]
    async fn every_core_hears_and_one_that_does_not_listen_hears_that_it_missed_something() {
        let (inboxes, mut cores) = Inboxes::new(2);
        assert_eq!(inboxes.len(), 2);
        for number in 0..NOTICES + 1 {
            inboxes.tell_all(&revoked(&number.to_string()));
            // The first core listens.
            assert!(matches!(cores[0].next().await, Some(Mail::Notice(_))));
        }
        let (mut notices, mut missed) = (0, 0);
        while notices + missed < NOTICES + 1 {
            match cores[1].next().await {
                Some(Mail::Notice(_)) => notices += 1,
                Some(Mail::Missed) => missed += 1,
                None => panic!("ended"),
            }
        }
        assert_eq!((notices, missed), (NOTICES, 1));
        drop(inboxes);
        assert!(cores[0].next().await.is_none());
    }
}
