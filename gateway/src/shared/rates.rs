//! Rates that gateways share: what stands in Redis, the one script that takes from it, and how requests come together in it.
//!
//! A key holds the theoretical arrival time of its rate (GCRA) by Redis' own clock, so that clocks of gateways do not matter. All keys
//! are of one slot of a cluster: what a request takes from several rates it takes from all or none.

use std::sync::Arc;
use std::time::Duration;

use redis::{Cmd, Value, cmd};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::Link;
use super::record::Keys;
use super::servers::Fault;

/// Requests that wait for a batch. More are not asked for.
pub(super) const MAX_WAITING: usize = 8 * 1024;

/// Requests in one script: it runs for well under a millisecond.
const BATCH: usize = 128;

/// Scripts under way at a time. What comes meanwhile goes together in the next.
const IN_FLIGHT: usize = 4;

/// Where the script asks for the time.
const CLOCK: &str = "redis.call('TIME')";

/// Numbers are doubles in there: microseconds since a late epoch leave room for fractions.
///
/// For each group its number of keys, then four numbers for each: interval and reach in microseconds, cost, kind. Gives two for each
/// key: by how much it is ahead now, and how long one more such would have to wait, 0 if it did not.
const TAKE: &str = r"
local clock = redis.call('TIME')
local now = (clock[1] - 1700000000) * 1000000 + clock[2]
local answers, at, first = {}, 1, 1
while at <= #ARGV do
  local count = tonumber(ARGV[at])
  at = at + 1
  local fits, held, after, wait = true, {}, {}, {}
  for i = 1, count do
    local interval, reach, cost = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2])
    local known = redis.call('GET', KEYS[first + i - 1])
    held[i] = math.min(math.max(known and tonumber(known) or now, now), now + 2 * reach)
    after[i] = held[i] + interval * cost
    wait[i] = after[i] - reach - now
    if wait[i] < 0.01 then wait[i] = 0 end
    if ARGV[at + 3] == 'e' and wait[i] > 0 then fits = false end
    at = at + 4
  end
  for i = 1, count do
    local kind = ARGV[at - 4 * (count - i) - 1]
    if kind == 'o' or (fits and wait[i] == 0) then
      held[i] = after[i]
      redis.call('SET', KEYS[first + i - 1], string.format('%.3f', held[i]), 'PX', math.ceil((held[i] - now) / 1000) + 1)
    end
    answers[#answers + 1] = math.ceil(held[i] - now)
    answers[#answers + 1] = math.ceil(wait[i])
  end
  first = first + count
end
return answers
";

/// What is taken of one rate.
#[derive(Debug, Clone, PartialEq)]
pub struct RateAsk {
    /// Names the rate and what it counts, the same on all gateways.
    pub key: String,
    /// Between two, in microseconds.
    pub interval: f64,
    /// The whole burst, in microseconds.
    pub reach: f64,
    /// How many are taken.
    pub cost: u32,
    /// What is done where there is no room.
    pub kind: AskKind,
}

/// What is done where there is no room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AskKind {
    /// Nothing is taken, from none of those that are asked for together.
    Enforced,
    /// Nothing is taken from this one.
    Shadow,
    /// It is taken all the same, because it has passed: what is too much has to be waited for by those that follow.
    Owed,
}

/// How a rate stands over all gateways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateAnswer {
    /// Until it is wholly replenished, if nothing more is taken.
    pub ahead: Duration,
    /// Until what was asked for would have room; none if it had.
    pub wait: Duration,
}

/// What one request asks for.
pub(super) struct Asked {
    asks: Vec<RateAsk>,
    answer: oneshot::Sender<Vec<RateAnswer>>,
}

/// The answer to come.
pub struct RateAnswers {
    link: Arc<Link>,
    answer: oneshot::Receiver<Vec<RateAnswer>>,
}

impl RateAnswers {
    /// Asks, together with others, if there is anybody to be asked.
    pub(super) fn ask(link: Arc<Link>, asks: Vec<RateAsk>) -> Option<RateAnswers> {
        let (sender, answer) = oneshot::channel();
        link.rates.try_send(Asked { asks, answer: sender }).ok()?;
        Some(RateAnswers { link, answer })
    }

    /// One for each that was asked for, in order; nothing if none came within the policy's deadline.
    pub async fn wait(self) -> Option<Vec<RateAnswer>> {
        match tokio::time::timeout(self.link.deadline, self.answer).await {
            Ok(Ok(answers)) => Some(answers),
            Ok(Err(_)) | Err(_) => {
                self.link.was_late(&Fault::Late(self.link.deadline), &self.link.keys.rate(""));
                None
            }
        }
    }
}

/// Answers those that ask, for ever.
pub(super) async fn answer(link: &Arc<Link>, mut asked: mpsc::Receiver<Asked>) -> Result<(), Fault> {
    let room = Arc::new(Semaphore::new(IN_FLIGHT));
    loop {
        let Ok(place) = room.clone().acquire_owned().await else { return Ok(()) };
        let mut batch = Vec::new();
        if asked.recv_many(&mut batch, BATCH).await == 0 {
            return Ok(());
        }
        // Those that have given up meanwhile must not be charged.
        batch.retain(|asked| !asked.answer.is_closed());
        if batch.is_empty() {
            continue;
        }
        let link = link.clone();
        tokio::spawn(async move {
            let _place = place;
            let command = take(TAKE, &link.keys, batch.iter().map(|asked| asked.asks.as_slice()));
            let answer = link.connection.ask(&command, link.deadline).await;
            match answer.and_then(|answer| read(answer).ok_or(Fault::Answer("EVAL"))) {
                Ok(answers) => {
                    let mut answers = answers.into_iter();
                    for Asked { asks, answer } in batch {
                        let own: Vec<_> = answers.by_ref().take(asks.len()).collect();
                        if own.len() == asks.len() {
                            let _ = answer.send(own);
                        }
                    }
                }
                // Each of those that ask hears that nothing comes.
                Err(error) => tracing::debug!(%error, "no answer about shared rates"),
            }
        });
    }
}

/// The command that takes from rates of `groups`, each all or none, as it goes to Redis: for tests that hold it against a model.
/// `clock` is what they ask, in Lua, in the place of the server's clock; it gives seconds and microseconds.
pub fn rate_command(prefix: &str, groups: &[Vec<RateAsk>], clock: Option<&str>) -> Vec<u8> {
    let script = clock.map_or_else(|| TAKE.to_owned(), |clock| TAKE.replace(CLOCK, clock));
    take(&script, &Keys::new(prefix), groups.iter().map(Vec::as_slice)).get_packed_command()
}

fn take<'a>(script: &str, keys: &Keys, groups: impl Iterator<Item = &'a [RateAsk]> + Clone) -> Cmd {
    let mut command = cmd("EVAL");
    command.arg(script).arg(groups.clone().map(<[_]>::len).sum::<usize>());
    for ask in groups.clone().flatten() {
        command.arg(keys.rate(&ask.key));
    }
    for group in groups {
        command.arg(group.len());
        for ask in group {
            let kind = match ask.kind {
                AskKind::Enforced => "e",
                AskKind::Shadow => "s",
                AskKind::Owed => "o",
            };
            command.arg(ask.interval).arg(ask.reach).arg(ask.cost).arg(kind);
        }
    }
    command
}

fn read(answer: Value) -> Option<Vec<RateAnswer>> {
    let Value::Array(numbers) = answer else { return None };
    let mut numbers = numbers.into_iter().map(|number| match number {
        Value::Int(micros) => u64::try_from(micros).ok().map(Duration::from_micros),
        _ => None,
    });
    let mut answers = Vec::new();
    while let Some(ahead) = numbers.next() {
        answers.push(RateAnswer { ahead: ahead?, wait: numbers.next()?? });
    }
    Some(answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_of_another_shape_are_none() {
        let micros = |all: &[i64]| Value::Array(all.iter().copied().map(Value::Int).collect());
        let millis = Duration::from_millis;
        assert_eq!(
            read(micros(&[1000, 0, 3000, 2000])),
            Some(vec![
                RateAnswer { ahead: millis(1), wait: Duration::ZERO },
                RateAnswer { ahead: millis(3), wait: millis(2) }
            ])
        );
        for bad in
            [micros(&[1]), micros(&[-1, 0]), Value::Nil, Value::Array(vec![Value::Okay, Value::Int(0)])]
        {
            assert_eq!(read(bad), None);
        }
    }
}
