//! Staying in touch with the others: connect, read all, then the news, and publish; from the beginning after any fault.

use std::convert::Infallible;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sealgate_policy::OnLoss;
use tokio::sync::{Notify, mpsc};

use super::record::{self, Keys, News};
use super::servers::{Connection, Fault, Servers};
use super::{Board, Link, Shared, Standing, TicketBoard, activity, rates};
use crate::clock;
use crate::edge::Gateway;
use crate::lock::lock;
use crate::session::decode;

/// Revocations in one command.
const BATCH: usize = 200;

/// Between attempts to connect.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What a command of a request may take at least until its connection is given up.
const SHORTEST_ANSWER: Duration = Duration::from_millis(500);

/// Between probes of a Redis that nobody complained of.
const LONGEST_UNPROBED: Duration = Duration::from_secs(1);

/// Between probes of a Redis that was late.
const PROBE_PAUSE: Duration = Duration::from_millis(100);

/// Follows the others through whatever servers the policy names, for ever.
pub async fn follow(gateway: &Gateway) {
    let mut changes = gateway.outliving.changes.subscribe();
    loop {
        let servers = gateway.current.load().shared.clone();
        let changed = async {
            loop {
                let now = gateway.current.load().shared.clone();
                let same = match (&servers, &now) {
                    (Some(before), Some(now)) => Arc::ptr_eq(before, now),
                    (None, None) => true,
                    _ => false,
                };
                if !same || changes.changed().await.is_err() {
                    return;
                }
            }
        };
        match &servers {
            None => {
                gateway.shared.stand(Standing::Alone);
                gateway.sessions.note_for_others(false);
                changed.await;
            }
            Some(servers) => {
                if gateway.shared.standing() == Standing::Alone {
                    // It has served alone until now: that may go on for as long as contact may be lost.
                    gateway.shared.hear();
                    gateway.shared.stand(Standing::Together);
                }
                let follower = Follower { gateway, shared: &gateway.shared, servers, keys: keys(servers) };
                tokio::select! {
                    () = follower.stay_in_touch() => {}
                    () = follower.answer_requests() => {}
                    () = follower.watch() => {}
                    () = changed => {}
                }
                gateway.shared.link.store(None);
                gateway.metrics().shared.connected.set(0);
            }
        }
    }
}

fn keys(servers: &Servers) -> Keys {
    Keys::new(&servers.policy().key_prefix)
}

struct Follower<'g> {
    gateway: &'g Gateway,
    shared: &'g Shared,
    servers: &'g Servers,
    keys: Keys,
}

/// Where in the log we are.
#[derive(Default)]
struct Position {
    number: u64,
    /// What stands there. Something else means that Redis lost what we read.
    entry: Option<News>,
}

/// Why the live set is read.
#[derive(Debug, Clone, Copy)]
enum Because {
    Connected,
    /// News are missing that we have not read.
    Gap,
    /// The log is not the one that we read.
    Rewritten,
}

impl Follower<'_> {
    async fn stay_in_touch(&self) {
        let mut attempts = Attempts::default();
        loop {
            attempts.begin();
            let Err(fault) = self.meet(attempts.count).await;
            self.gateway.metrics().shared.connected.set(0);
            // It may have broken with ours.
            if let Some(link) = &*self.shared.link.load() {
                link.probe.notify_one();
            }
            if attempts.failed() {
                tracing::warn!(error = %fault, "no connection to other gateways through Redis; trying again");
            } else {
                tracing::debug!(error = %fault, "still no connection to Redis");
            }
            attempts.rest().await;
        }
    }

    /// One meeting, until a fault ends it.
    async fn meet(&self, attempt: usize) -> Result<Infallible, Fault> {
        let patience = self.servers.patience();
        // News are waited for, and nothing may wait behind that: a connection of its own.
        let (commands, news) = tokio::try_join!(
            self.servers.connect(patience, attempt),
            self.servers.connect(self.longest_block() + patience, attempt),
        )?;
        if !commands.leads_where(&news) {
            return Err(Fault::Moved);
        }
        let mut position = self.read_all(&commands, Because::Connected).await?;
        self.gateway.metrics().shared.connected.set(1);
        tracing::info!("in contact with other gateways through Redis");
        let (never, _, _, _) = tokio::try_join!(
            self.read_news(&news, &commands, &mut position),
            self.publish(&commands),
            activity::follow(self.gateway, self.servers, &commands),
            async { Err::<Infallible, _>(self.servers.moved(&news).await) },
        )?;
        Ok(never)
    }

    /// The way of requests to Redis: on a connection of its own, since they may ask any node of a cluster, and the trouble of one is not
    /// that of the others.
    async fn answer_requests(&self) {
        let mut attempts = Attempts::default();
        loop {
            attempts.begin();
            let Err(fault) = self.link(attempts.count).await;
            self.shared.link.store(None);
            attempts.failed();
            tracing::debug!(error = %fault, "requests cannot ask Redis");
            attempts.rest().await;
        }
    }

    async fn link(&self, attempt: usize) -> Result<Infallible, Fault> {
        let deadline = self.servers.policy().deadline;
        // Who was not answered by then has long gone; what a silent node holds up is to be short.
        let connection = self.servers.connect((deadline * 4).max(SHORTEST_ANSWER), attempt).await?;
        let (asking, asked) = mpsc::channel(rates::MAX_WAITING);
        let link = Arc::new(Link {
            connection: connection.clone(),
            keys: keys(self.servers),
            tickets: TicketBoard {
                connection: connection.clone(),
                prefix: self.servers.policy().key_prefix.clone(),
            },
            board: Board::new(connection.clone(), self.servers.policy().key_prefix.clone()),
            deadline,
            suspect: false.into(),
            late: Mutex::default(),
            probe: Notify::new(),
            rates: asking,
        });
        self.shared.link.store(Some(link.clone()));
        let (never, _, ()) = tokio::try_join!(
            self.probe(&link),
            async { Err::<Infallible, _>(self.servers.moved(&connection).await) },
            rates::answer(&link, asked),
        )?;
        Ok(never)
    }

    /// Reads the live set, and writes what it lacks.
    async fn read_all(&self, redis: &Connection, because: Because) -> Result<Position, Fault> {
        let patience = self.servers.patience();
        // INVARIANT: the place in the log first, the live set second: what comes between stands in both.
        let entry = record::newest(redis.ask(&self.keys.newest(), patience).await?)?;
        let round = {
            let mut known = lock(&self.shared.known);
            known.round += 1;
            known.round
        };
        let now = clock::unix_now();
        let (mut cursor, mut entered) = (0, 0);
        loop {
            let page = record::live(redis.ask(&self.keys.live(cursor), patience).await?)?;
            for (record, until) in page.entries {
                if now < until && self.enter(&record, until, Some(round)) {
                    entered += 1;
                }
            }
            self.shared.hear();
            cursor = page.next;
            if cursor == 0 {
                break;
            }
        }
        // One look at all sockets, however many revocations there are.
        if entered > 0 {
            self.gateway.cores.sweep_all();
        }
        self.shared.overflown.store(false, Ordering::Release);
        let missing = lock(&self.shared.known).missing(round, now);
        for batch in missing.chunks(BATCH) {
            self.write(redis, batch.iter().map(|(record, until)| (&**record, *until))).await?;
        }
        self.gateway.metrics().shared.read_all(match because {
            Because::Connected => "connected",
            Because::Gap => "gap",
            Because::Rewritten => "rewritten",
        });
        tracing::info!(
            ?because,
            entered,
            written = missing.len(),
            "revocations compared with other gateways'"
        );
        self.shared.hear();
        self.shared.stand(Standing::Together);
        Ok(Position { number: entry.as_ref().map_or(0, |entry| entry.number), entry })
    }

    /// How long news are waited for. A silent Redis must answer several times before contact counts as lost.
    fn longest_block(&self) -> Duration {
        (self.servers.policy().contact_timeout / 4).min(Duration::from_secs(1))
    }

    async fn read_news(
        &self,
        news: &Connection,
        commands: &Connection,
        position: &mut Position,
    ) -> Result<Infallible, Fault> {
        let block = self.longest_block();
        let block_ms = u64::try_from(block.as_millis()).unwrap_or(u64::MAX);
        let patience = block + self.servers.patience();
        loop {
            let answer = news.ask(&self.keys.news(position.number, block_ms), patience).await?;
            let entries = record::news(answer)?;
            self.shared.hear();
            self.gateway.metrics().shared.heard_at(clock::unix_now());
            let because = if entries.is_empty() {
                let newest =
                    record::newest(commands.ask(&self.keys.newest(), self.servers.patience()).await?)?;
                // Newer ones came between the two questions.
                let same = newest == position.entry
                    || newest.as_ref().is_some_and(|newest| newest.number > position.number);
                (!same).then_some(Because::Rewritten)
            } else {
                self.take_in(entries, position).err()
            };
            if let Some(because) = because {
                *position = self.read_all(commands, because).await?;
            }
            // A Redis that was only slow has kept everything for us.
            self.shared.stand(Standing::Together);
        }
    }

    fn take_in(&self, entries: Vec<News>, position: &mut Position) -> Result<(), Because> {
        let now_ms = clock::unix_now_ms();
        for entry in entries {
            if entry.number != position.number + 1 {
                return Err(Because::Gap);
            }
            // What we wrote ourselves was entered before it was written.
            if entry.origin != self.shared.origin.as_bytes() {
                self.enter(&entry.record, entry.until, None);
                self.gateway
                    .metrics()
                    .shared
                    .lag(Duration::from_millis(now_ms.saturating_sub(entry.written_at)));
            }
            position.number = entry.number;
            position.entry = Some(entry);
        }
        Ok(())
    }

    /// Enters another gateway's revocation. Those of the live set (`round`) are looked for in open sockets later, all at once.
    fn enter(&self, record: &[u8], until: u64, round: Option<u32>) -> bool {
        let now = clock::unix_now();
        let (Some(revocation), Ok(text)) = (decode(record, until, now), std::str::from_utf8(record)) else {
            self.gateway.metrics().shared.refused.inc();
            tracing::error!("a record in Redis is not a gateway's; who else writes there?");
            return false;
        };
        lock(&self.shared.known).learn(&text.into(), revocation.until, round);
        if round.is_some() {
            let _ = self.gateway.enter(&revocation.borrowed());
        } else {
            // Counts nobody: the sockets close all the same.
            drop(self.gateway.apply(&revocation.borrowed()));
        }
        true
    }

    async fn publish(&self, redis: &Connection) -> Result<Infallible, Fault> {
        loop {
            let posted = self.shared.posted.notified();
            if self.shared.overflown.load(Ordering::Acquire) {
                return Err(Fault::Overflow);
            }
            let batch: Vec<_> = lock(&self.shared.outbox).iter().take(BATCH).cloned().collect();
            self.gateway.metrics().shared.waiting(lock(&self.shared.outbox).len());
            if batch.is_empty() {
                posted.await;
                continue;
            }
            self.write(redis, batch.iter().map(|(record, until)| (&**record, *until))).await?;
            // INVARIANT: nobody else takes from the front.
            lock(&self.shared.outbox).drain(..batch.len());
        }
    }

    async fn write<'a>(
        &self,
        redis: &Connection,
        entries: impl Iterator<Item = (&'a str, u64)>,
    ) -> Result<(), Fault> {
        let (now, now_ms) = (clock::unix_now(), clock::unix_now_ms());
        let command = self.keys.publish(entries, &self.shared.origin, now, now_ms);
        redis.ask(&command, self.servers.patience()).await.map(drop)
    }

    /// Asks a Redis that was late for requests until it answers in time again: for the key that it was late with, because in a cluster
    /// another node may be well.
    async fn probe(&self, link: &Link) -> Result<Infallible, Fault> {
        loop {
            // Now and then without a cause, so that a connection that broke is renewed before somebody needs it.
            tokio::select! {
                () = link.probe.notified() => {}
                () = tokio::time::sleep(LONGEST_UNPROBED) => {}
            }
            let late = lock(&link.late).clone();
            let since = Instant::now();
            while let Err(fault) = link.connection.ask(&link.keys.probe(&late), link.deadline).await {
                link.suspect.store(true, Ordering::Release);
                if fault.is_final() || since.elapsed() > self.servers.patience() {
                    return Err(fault);
                }
                tokio::time::sleep(PROBE_PAUSE).await;
            }
            link.suspect.store(false, Ordering::Release);
        }
    }

    /// Notices that contact is lost, and that it is back.
    async fn watch(&self) {
        let policy = self.servers.policy();
        let mut due = tokio::time::interval(policy.contact_timeout / 20);
        let began = Instant::now();
        loop {
            due.tick().await;
            let heard = lock(&self.shared.heard).unwrap_or(began);
            let lost = heard.elapsed() > policy.contact_timeout;
            self.gateway.metrics().shared.lost.set(i64::from(lost));
            if !lost || self.shared.stand(Standing::Lost) == Standing::Lost {
                continue;
            }
            tracing::error!(
                on_loss = ?policy.on_loss,
                "contact with other gateways is lost: what they revoke is not known here"
            );
            if policy.on_loss == OnLoss::FailClosed {
                self.gateway.cores.contact_lost();
            }
        }
    }
}

/// Attempts that fail, with pauses between them: longer and longer, and short again after one that held.
struct Attempts {
    began: Instant,
    pause: Duration,
    count: usize,
}

impl Default for Attempts {
    fn default() -> Self {
        Self { began: Instant::now(), pause: FIRST_PAUSE, count: 0 }
    }
}

impl Attempts {
    fn begin(&mut self) {
        self.began = Instant::now();
    }

    /// Whether it is a loss, and not one more failure after it.
    fn failed(&mut self) -> bool {
        if self.began.elapsed() > LONGEST_PAUSE * 3 {
            self.pause = FIRST_PAUSE;
        }
        self.pause == FIRST_PAUSE
    }

    async fn rest(&mut self) {
        // Gateways that lost the same server do not come back in step.
        tokio::time::sleep(self.pause.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.count += 1;
    }
}
