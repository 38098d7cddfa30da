//! Revocations as they stand in Redis, and the commands that read and write them.
//!
//! Two keys, of one slot of a cluster: the log (a stream, whose ids count from 1 without gaps: news), and the live set (a sorted
//! set by the time from which an entry may be forgotten: the snapshot). One script writes both, and writes to the log only what
//! is new to the set; so nobody needs to remember what was said already.

use redis::{Cmd, Value, cmd};

use super::servers::Fault;

/// News kept, about. Who was away for longer reads the live set.
const LOG_ENTRIES: usize = 100_000;

/// Most news or live entries in one answer.
const PAGE: usize = 500;

const PUBLISH: &str = r"
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', ARGV[1])
local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local number = last and tonumber(string.match(last[1], '^%d+')) or 0
for at = 5, #ARGV, 2 do
  if redis.call('ZADD', KEYS[2], 'GT', 'CH', ARGV[at + 1], ARGV[at]) > 0 then
    number = number + 1
    redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[2], string.format('%.0f', number) .. '-0',
      'r', ARGV[at], 'u', ARGV[at + 1], 'o', ARGV[3], 't', ARGV[4])
  end
end
return number
";

/// Names of the keys that gateways have in common.
pub(super) struct Keys {
    log: String,
    live: String,
    prefix: String,
}

impl Keys {
    pub(super) fn new(prefix: &str) -> Self {
        Self {
            log: format!("{{{prefix}}}:revocations"),
            live: format!("{{{prefix}}}:revoked"),
            prefix: prefix.to_owned(),
        }
    }

    /// Publishes what is new of `entries`.
    pub(super) fn publish<'a>(
        &self,
        entries: impl Iterator<Item = (&'a str, u64)>,
        origin: &str,
        now: u64,
        now_ms: u64,
    ) -> Cmd {
        let mut command = cmd("EVAL");
        command.arg(PUBLISH).arg(2).arg(&self.log).arg(&self.live);
        command.arg(now).arg(LOG_ENTRIES).arg(origin).arg(now_ms);
        for (record, until) in entries {
            command.arg(record).arg(until);
        }
        command
    }

    /// The newest entry of the log.
    pub(super) fn newest(&self) -> Cmd {
        let mut command = cmd("XREVRANGE");
        command.arg(&self.log).arg("+").arg("-").arg("COUNT").arg(1);
        command
    }

    /// What follows the entry with this number, waiting for it `block_ms`.
    pub(super) fn news(&self, after: u64, block_ms: u64) -> Cmd {
        let mut command = cmd("XREAD");
        command.arg("COUNT").arg(PAGE).arg("BLOCK").arg(block_ms);
        command.arg("STREAMS").arg(&self.log).arg(format!("{after}-0"));
        command
    }

    /// A page of the live set.
    pub(super) fn live(&self, cursor: u64) -> Cmd {
        let mut command = cmd("ZSCAN");
        command.arg(&self.live).arg(cursor).arg("COUNT").arg(PAGE);
        command
    }

    /// Asks for nothing but an answer, of whoever has this key.
    pub(super) fn probe(&self, key: &str) -> Cmd {
        let mut command = cmd("EXISTS");
        command.arg(if key.is_empty() { self.log.as_str() } else { key });
        command
    }

    /// Where a rate's key stands.
    pub(super) fn rate(&self, key: &str) -> String {
        format!("{{{}}}:rate:{key}", self.prefix)
    }

    /// Takes a name that may be taken once within `ttl_ms`.
    pub(super) fn take_once(&self, name: &str, ttl_ms: u64) -> Cmd {
        let mut command = cmd("SET");
        command.arg(self.once(name)).arg("").arg("NX").arg("PX").arg(ttl_ms);
        command
    }

    pub(super) fn once(&self, name: &str) -> String {
        format!("{}:once:{name}", self.prefix)
    }
}

/// An entry of the log.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct News {
    pub(super) number: u64,
    pub(super) record: Vec<u8>,
    pub(super) until: u64,
    /// Who wrote it.
    pub(super) origin: Vec<u8>,
    /// Unix milliseconds by the writer's clock.
    pub(super) written_at: u64,
}

/// Reads the answer to [`Keys::newest`].
pub(super) fn newest(answer: Value) -> Result<Option<News>, Fault> {
    let fault = || Fault::Answer("XREVRANGE");
    let entries = entries(answer).ok_or_else(fault)?;
    Ok(entries.into_iter().next())
}

/// Reads the answer to [`Keys::news`]; empty when nothing came in time.
pub(super) fn news(answer: Value) -> Result<Vec<News>, Fault> {
    let fault = || Fault::Answer("XREAD");
    if answer == Value::Nil {
        return Ok(Vec::new());
    }
    // One stream was asked for: [[its key, its entries]].
    let [stream] = <[Value; 1]>::try_from(array(answer).ok_or_else(fault)?).map_err(|_| fault())?;
    let [_, list] = <[Value; 2]>::try_from(array(stream).ok_or_else(fault)?).map_err(|_| fault())?;
    entries(list).ok_or_else(fault)
}

/// Some of the live set.
pub(super) struct Page {
    /// Where the next page begins; 0 after the last.
    pub(super) next: u64,
    /// Records and their ends.
    pub(super) entries: Vec<(Vec<u8>, u64)>,
}

/// Reads the answer to [`Keys::live`].
pub(super) fn live(answer: Value) -> Result<Page, Fault> {
    let read = || {
        let [cursor, list] = <[Value; 2]>::try_from(array(answer)?).ok()?;
        let next = number(&bytes(cursor)?)?;
        let mut entries = Vec::new();
        let mut list = array(list)?.into_iter();
        while let (Some(record), Some(score)) = (list.next(), list.next()) {
            entries.push((bytes(record)?, score_of(&bytes(score)?)?));
        }
        Some(Page { next, entries })
    };
    read().ok_or(Fault::Answer("ZSCAN"))
}

fn entries(answer: Value) -> Option<Vec<News>> {
    array(answer)?.into_iter().map(entry).collect()
}

fn entry(value: Value) -> Option<News> {
    let [id, fields] = <[Value; 2]>::try_from(array(value)?).ok()?;
    let id = bytes(id)?;
    let mut news = News {
        number: number(id.strip_suffix(b"-0")?)?,
        record: Vec::new(),
        until: 0,
        origin: Vec::new(),
        written_at: 0,
    };
    let mut fields = array(fields)?.into_iter();
    while let (Some(name), Some(value)) = (fields.next(), fields.next()) {
        let value = bytes(value)?;
        match bytes(name)?.as_slice() {
            b"r" => news.record = value,
            b"u" => news.until = number(&value)?,
            b"o" => news.origin = value,
            b"t" => news.written_at = number(&value)?,
            // A later version may say more.
            _ => {}
        }
    }
    Some(news)
}

fn array(value: Value) -> Option<Vec<Value>> {
    if let Value::Array(values) = value { Some(values) } else { None }
}

fn bytes(value: Value) -> Option<Vec<u8>> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.into_bytes()),
        _ => None,
    }
}

fn number(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Scores are doubles: a time in seconds is one without loss.
fn score_of(text: &[u8]) -> Option<u64> {
    let score: f64 = std::str::from_utf8(text).ok()?.parse().ok()?;
    // Saturates: "inf" is the end of time, and cut to what a record may hold.
    (score >= 0.0).then_some(score as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.into())
    }

    fn entry_of(id: &str) -> Value {
        let fields = ["r", "{}", "u", "7", "o", "me", "t", "5", "later", "x"].map(bulk).to_vec();
        Value::Array(vec![bulk(id), Value::Array(fields)])
    }

    #[test]
    fn answers_are_read_and_those_of_another_shape_refused() {
        let expected =
            || News { number: 12, record: b"{}".to_vec(), until: 7, origin: b"me".to_vec(), written_at: 5 };
        assert_eq!(newest(Value::Array(vec![entry_of("12-0")])).unwrap(), Some(expected()));
        assert_eq!(newest(Value::Array(vec![])).unwrap(), None);
        let stream = |entries| Value::Array(vec![Value::Array(vec![bulk("key"), Value::Array(entries)])]);
        assert_eq!(news(stream(vec![entry_of("12-0")])).unwrap(), [expected()]);
        assert_eq!(news(Value::Nil).unwrap(), []);
        // Ids that no gateway of ours gives: somebody else writes there.
        for id in ["12-1", "12", "-0", "x-0"] {
            assert!(news(stream(vec![entry_of(id)])).is_err(), "{id}");
        }
        assert!(news(Value::Okay).is_err() && newest(Value::Nil).is_err());
        let page = Value::Array(vec![
            bulk("42"),
            Value::Array(["a", "1800000000", "b", "inf", "c", "1.8e9"].map(bulk).to_vec()),
        ]);
        let page = live(page).unwrap();
        assert_eq!(page.next, 42);
        assert_eq!(page.entries, [(b"a".to_vec(), NOW), (b"b".to_vec(), u64::MAX), (b"c".to_vec(), NOW)]);
        assert!(live(Value::Array(vec![bulk("x"), Value::Array(vec![])])).is_err());
        assert_eq!(score_of(b"-1"), None);
        assert_eq!(score_of(b"nan"), None);
    }
}
