//! Everything that survives a restart, in SQLite.
//!
//! One connection writes, so writers queue here instead of meeting `SQLITE_BUSY`; several read. What a method did is on
//! disk when it returns (`synchronous = FULL`).

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{Row, Sqlite, Transaction};

use crate::wire::{
    ClaimedKey, Delivery, DeviceAddress, DeviceKeys, Envelope, Fixed, IdentityKeys, KeyCount, KeyUpload,
    MAX_DEVICES, MAX_ONE_TIME_KEYS, Name, OlmKind, Prekey,
};

/// Messages that may wait for one device.
pub(crate) const MAX_QUEUED: u32 = 1_000;
/// Their ciphertexts' bytes.
const MAX_QUEUED_BYTES: i64 = 64 * 1024 * 1024;
/// How long a message waits for its device, in seconds: 30 days.
const QUEUE_LIFE: u64 = 30 * 24 * 3600;
/// How long an accepted id is remembered: longer than the message can wait.
const ACCEPTED_LIFE: u64 = QUEUE_LIFE + 24 * 3600;
/// Sessions of one user; a further login ends the oldest.
const MAX_SESSIONS: i64 = 1_000;

/// Older ones can corrupt a database in WAL mode.
const OLDEST_SQLITE: (u32, u32, u32) = (3, 51, 3);

/// In order; a database has seen as many as its `user_version` says. Never change one, only append.
const MIGRATIONS: &[&str] = &[include_str!("../migrations/0001-messages.sql")];

/// The database.
#[derive(Debug)]
pub(crate) struct Store {
    write: SqlitePool,
    read: SqlitePool,
}

/// A fault of the store: nothing that a client could mend.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("the database failed")]
    Database(#[from] sqlx::Error),
    #[error("the database file cannot be opened")]
    File(#[from] io::Error),
    #[error("SQLite {found} can corrupt a database in WAL mode; this needs 3.51.3 or later")]
    TooOld { found: String },
    #[error(
        "the database was written by a later version of this program (schema {found}, known up to {known})"
    )]
    FromTheFuture { found: u32, known: u32 },
    #[error("the database holds a row that cannot be: {0}")]
    Row(String),
}

/// What became of an upload of keys.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Upload {
    Stored(KeyCount),
    /// The device is registered with other identity keys.
    OtherIdentity,
    TooManyDevices,
    TooManyKeys,
    /// A key of the same id is there already, and it is another one.
    KeyIdTaken,
}

/// What became of an envelope.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Sent {
    Stored,
    /// Its id was accepted before; nothing changed.
    Duplicate,
    /// The sending device has no keys here, so nobody could read what it sends.
    SenderUnregistered,
    /// No device of that name; nothing was stored for anyone.
    UnknownDevices(Vec<DeviceAddress>),
    /// The device has not fetched its messages for long; nothing was stored for anyone.
    QueueFull(DeviceAddress),
}

impl Store {
    /// Opens the database, creating the file (0600) and applying the migrations it has not seen.
    pub(crate) async fn open(path: &Path) -> Result<Self, StoreError> {
        // SQLite gives its -wal and -shm files the mode of the database.
        OpenOptions::new().create(true).append(true).mode(0o600).open(path)?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(5))
            // Claimed keys and delivered messages are overwritten, not only unlinked.
            .pragma("secure_delete", "ON");
        let write = SqlitePoolOptions::new().max_connections(1).connect_with(options.clone()).await?;
        demand_version(&write).await?;
        migrate(&write).await?;
        let read = SqlitePoolOptions::new().max_connections(4).connect_with(options.read_only(true)).await?;
        Ok(Self { write, read })
    }

    pub(crate) async fn close(&self) {
        self.read.close().await;
        self.write.close().await;
    }

    /// Whether the database answers.
    pub(crate) async fn ping(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1").execute(&self.read).await?;
        Ok(())
    }

    pub(crate) async fn open_session(
        &self,
        session: &str,
        device: &DeviceAddress,
        now: u64,
        expires: u64,
    ) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query("INSERT INTO sessions (id, user, device, opened_at, expires_at) VALUES (?, ?, ?, ?, ?)")
            .bind(session)
            .bind(device.user.as_str())
            .bind(device.device.as_str())
            .bind(integer(now))
            .bind(integer(expires))
            .execute(&mut *tx)
            .await?;
        sqlx::query(
            "DELETE FROM sessions WHERE id IN
             (SELECT id FROM sessions WHERE user = ? ORDER BY opened_at DESC, id LIMIT -1 OFFSET ?)",
        )
        .bind(device.user.as_str())
        .bind(MAX_SESSIONS)
        .execute(&mut *tx)
        .await?;
        Ok(tx.commit().await?)
    }

    /// The device that a live session belongs to.
    pub(crate) async fn session(&self, session: &str, now: u64) -> Result<Option<DeviceAddress>, StoreError> {
        let row = sqlx::query("SELECT user, device FROM sessions WHERE id = ? AND expires_at > ?")
            .bind(session)
            .bind(integer(now))
            .fetch_optional(&self.read)
            .await?;
        row.map(|row| address(&row, "user", "device")).transpose()
    }

    /// Registers a device or adds to its keys.
    pub(crate) async fn put_keys(
        &self,
        owner: &DeviceAddress,
        upload: &KeyUpload,
        now: u64,
    ) -> Result<Upload, StoreError> {
        let mut tx = self.begin().await?;
        let row =
            sqlx::query("SELECT curve25519, ed25519, signature FROM devices WHERE user = ? AND device = ?")
                .bind(owner.user.as_str())
                .bind(owner.device.as_str())
                .fetch_optional(&mut *tx)
                .await?;
        match row {
            Some(row) if identity(&row)? != upload.identity => return Ok(Upload::OtherIdentity),
            Some(_) => {}
            None => {
                if count(&mut tx, "SELECT COUNT(*) FROM devices WHERE user = ?", &[owner.user.as_str()])
                    .await?
                    >= MAX_DEVICES
                {
                    return Ok(Upload::TooManyDevices);
                }
                register(&mut tx, owner, &upload.identity, now).await?;
            }
        }

        for key in &upload.one_time_keys {
            if !insert_key(&mut tx, owner, key).await? {
                return Ok(Upload::KeyIdTaken);
            }
        }
        let keys = key_count(&mut *tx, owner).await?;
        if keys.one_time_keys as usize > MAX_ONE_TIME_KEYS {
            return Ok(Upload::TooManyKeys);
        }
        if let Some(key) = &upload.fallback_key {
            replace_fallback(&mut tx, owner, key).await?;
        }
        let keys = key_count(&mut *tx, owner).await?;
        tx.commit().await?;
        Ok(Upload::Stored(keys))
    }

    pub(crate) async fn key_count(&self, device: &DeviceAddress) -> Result<KeyCount, StoreError> {
        key_count(&self.read, device).await
    }

    /// The registered devices of a user, by name.
    pub(crate) async fn devices(&self, user: &Name) -> Result<Vec<DeviceKeys>, StoreError> {
        let rows = sqlx::query(
            "SELECT device, curve25519, ed25519, signature FROM devices WHERE user = ? ORDER BY device",
        )
        .bind(user.as_str())
        .fetch_all(&self.read)
        .await?;
        rows.iter()
            .map(|row| Ok(DeviceKeys { device: parsed(row, "device")?, identity: identity(row)? }))
            .collect()
    }

    /// Takes the oldest one-time key, or lends the fallback key if none is left. `None`: no such device, or no key at
    /// all.
    pub(crate) async fn claim(&self, device: &DeviceAddress) -> Result<Option<ClaimedKey>, StoreError> {
        let mut tx = self.begin().await?;
        let Some(row) =
            sqlx::query("SELECT curve25519, ed25519, signature FROM devices WHERE user = ? AND device = ?")
                .bind(device.user.as_str())
                .bind(device.device.as_str())
                .fetch_optional(&mut *tx)
                .await?
        else {
            return Ok(None);
        };
        let identity = identity(&row)?;

        // One statement finds and removes, so no two askers get the same key.
        let taken = sqlx::query(
            "DELETE FROM one_time_keys WHERE position =
             (SELECT position FROM one_time_keys WHERE user = ? AND device = ? ORDER BY position LIMIT 1)
             RETURNING id, key, signature",
        )
        .bind(device.user.as_str())
        .bind(device.device.as_str())
        .fetch_optional(&mut *tx)
        .await?;
        let (row, fallback) = match taken {
            Some(row) => (Some(row), false),
            None => {
                let lent = sqlx::query(
                    "UPDATE devices SET fallback_used = 1
                     WHERE user = ? AND device = ? AND fallback_id IS NOT NULL
                     RETURNING fallback_id AS id, fallback_key AS key, fallback_signature AS signature",
                )
                .bind(device.user.as_str())
                .bind(device.device.as_str())
                .fetch_optional(&mut *tx)
                .await?;
                (lent, true)
            }
        };
        let prekey = row.map(|row| prekey(&row)).transpose()?;
        tx.commit().await?;
        Ok(prekey.map(|prekey| ClaimedKey { identity, prekey, fallback }))
    }

    /// Stores an envelope for all its recipients, or for none.
    pub(crate) async fn send(
        &self,
        sender: &DeviceAddress,
        envelope: &Envelope,
        now: u64,
    ) -> Result<Sent, StoreError> {
        let mut tx = self.begin().await?;
        let id = envelope.id.to_string();
        let first = sqlx::query(
            "INSERT INTO accepted (user, device, message, accepted_at) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        )
        .bind(sender.user.as_str())
        .bind(sender.device.as_str())
        .bind(&id)
        .bind(integer(now))
        .execute(&mut *tx)
        .await?;
        if first.rows_affected() == 0 {
            return Ok(Sent::Duplicate);
        }

        let registered = "SELECT COUNT(*) FROM devices WHERE user = ? AND device = ?";
        if count(&mut tx, registered, &[sender.user.as_str(), sender.device.as_str()]).await? == 0 {
            return Ok(Sent::SenderUnregistered);
        }
        let mut unknown = Vec::new();
        for sealed in &envelope.recipients {
            let to = DeviceAddress { user: sealed.user.clone(), device: sealed.device.clone() };
            let bytes = sealed.ciphertext.as_bytes();
            let row = sqlx::query(
                "UPDATE devices SET last_seq = last_seq + 1, queued = queued + 1, queued_bytes = queued_bytes + ?
                 WHERE user = ? AND device = ? RETURNING last_seq, queued, queued_bytes",
            )
            .bind(bytes.len() as i64)
            .bind(to.user.as_str())
            .bind(to.device.as_str())
            .fetch_optional(&mut *tx)
            .await?;
            let Some(row) = row else {
                unknown.push(to);
                continue;
            };
            if row.try_get::<i64, _>("queued")? > i64::from(MAX_QUEUED)
                || row.try_get::<i64, _>("queued_bytes")? > MAX_QUEUED_BYTES
            {
                return Ok(Sent::QueueFull(to));
            }
            sqlx::query(
                "INSERT INTO queue (user, device, seq, sender_user, sender_device, message, conversation, olm_type,
                 ciphertext, received_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            )
            .bind(to.user.as_str())
            .bind(to.device.as_str())
            .bind(row.try_get::<i64, _>("last_seq")?)
            .bind(sender.user.as_str())
            .bind(sender.device.as_str())
            .bind(&id)
            .bind(envelope.conversation.as_str())
            .bind(i64::from(u8::from(sealed.kind)))
            .bind(bytes)
            .bind(integer(now))
            .execute(&mut *tx)
            .await?;
        }
        if !unknown.is_empty() {
            return Ok(Sent::UnknownDevices(unknown));
        }
        tx.commit().await?;
        Ok(Sent::Stored)
    }

    /// How many messages wait for a device.
    pub(crate) async fn queued(&self, device: &DeviceAddress) -> Result<u32, StoreError> {
        let row = sqlx::query("SELECT queued FROM devices WHERE user = ? AND device = ?")
            .bind(device.user.as_str())
            .bind(device.device.as_str())
            .fetch_optional(&self.read)
            .await?;
        Ok(row.map(|row| row.try_get::<u32, _>("queued")).transpose()?.unwrap_or(0))
    }

    /// The messages after `seq`, in order, at most `limit`.
    pub(crate) async fn waiting(
        &self,
        device: &DeviceAddress,
        seq: u64,
        limit: u32,
    ) -> Result<Vec<Delivery>, StoreError> {
        let rows = sqlx::query(
            "SELECT seq, sender_user, sender_device, message, conversation, olm_type, ciphertext, received_at
             FROM queue WHERE user = ? AND device = ? AND seq > ? ORDER BY seq LIMIT ?",
        )
        .bind(device.user.as_str())
        .bind(device.device.as_str())
        .bind(integer(seq))
        .bind(limit)
        .fetch_all(&self.read)
        .await?;
        rows.iter().map(delivery).collect()
    }

    /// Forgets the messages up to `seq`; says how many there were.
    pub(crate) async fn acknowledge(&self, device: &DeviceAddress, seq: u64) -> Result<u64, StoreError> {
        let mut tx = self.begin().await?;
        let gone = sqlx::query(
            "DELETE FROM queue WHERE user = ? AND device = ? AND seq <= ? RETURNING length(ciphertext)",
        )
        .bind(device.user.as_str())
        .bind(device.device.as_str())
        .bind(integer(seq))
        .fetch_all(&mut *tx)
        .await?;
        let mut bytes = 0_i64;
        for row in &gone {
            bytes += row.try_get::<i64, _>(0)?;
        }
        if !gone.is_empty() {
            release(&mut tx, device, gone.len(), bytes).await?;
        }
        tx.commit().await?;
        Ok(gone.len() as u64)
    }

    /// Deletes what has expired: sessions, messages nobody fetched for 30 days, and ids too old to come again.
    pub(crate) async fn sweep(&self, now: u64) -> Result<(), StoreError> {
        let mut tx = self.begin().await?;
        sqlx::query("DELETE FROM sessions WHERE expires_at <= ?")
            .bind(integer(now))
            .execute(&mut *tx)
            .await?;
        sqlx::query("DELETE FROM accepted WHERE accepted_at <= ?")
            .bind(integer(now.saturating_sub(ACCEPTED_LIFE)))
            .execute(&mut *tx)
            .await?;
        let gone = sqlx::query(
            "DELETE FROM queue WHERE received_at <= ? RETURNING user, device, length(ciphertext)",
        )
        .bind(integer(now.saturating_sub(QUEUE_LIFE)))
        .fetch_all(&mut *tx)
        .await?;
        for row in &gone {
            release(&mut tx, &address(row, "user", "device")?, 1, row.try_get(2)?).await?;
        }
        Ok(tx.commit().await?)
    }

    /// Begun as a writer from the start: a reader that turns writer could find that it read something old.
    async fn begin(&self) -> Result<Transaction<'static, Sqlite>, StoreError> {
        Ok(self.write.begin_with("BEGIN IMMEDIATE").await?)
    }
}

async fn demand_version(pool: &SqlitePool) -> Result<(), StoreError> {
    let found: String = sqlx::query("SELECT sqlite_version()").fetch_one(pool).await?.try_get(0)?;
    let mut numbers = found.split('.').map(|part| part.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    if (next(), next(), next()) < OLDEST_SQLITE { Err(StoreError::TooOld { found }) } else { Ok(()) }
}

async fn migrate(pool: &SqlitePool) -> Result<(), StoreError> {
    let found: u32 = sqlx::query("PRAGMA user_version").fetch_one(pool).await?.try_get(0)?;
    let known = MIGRATIONS.len() as u32;
    if found > known {
        return Err(StoreError::FromTheFuture { found, known });
    }
    for (migration, version) in MIGRATIONS.iter().zip(1_u32..).skip(found as usize) {
        // Schema and version in one transaction: a crash between them cannot be.
        let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
        sqlx::raw_sql(*migration).execute(&mut *tx).await?;
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("PRAGMA user_version = {version}")))
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
    }
    Ok(())
}

async fn register(
    tx: &mut Transaction<'static, Sqlite>,
    owner: &DeviceAddress,
    identity: &IdentityKeys,
    now: u64,
) -> Result<(), StoreError> {
    sqlx::query(
        "INSERT INTO devices (user, device, curve25519, ed25519, signature, registered_at) VALUES (?, ?, ?, ?, ?, ?)",
    )
    .bind(owner.user.as_str())
    .bind(owner.device.as_str())
    .bind(String::from(identity.curve25519.clone()))
    .bind(String::from(identity.ed25519.clone()))
    .bind(String::from(identity.signature.clone()))
    .bind(integer(now))
    .execute(&mut **tx)
    .await?;
    Ok(())
}

/// False if another key has the same id. The same key again changes nothing: the upload may be a repeated one.
async fn insert_key(
    tx: &mut Transaction<'static, Sqlite>,
    owner: &DeviceAddress,
    prekey: &Prekey,
) -> Result<bool, StoreError> {
    let key = String::from(prekey.key.clone());
    let inserted = sqlx::query(
        "INSERT INTO one_time_keys (user, device, id, key, signature) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
    )
    .bind(owner.user.as_str())
    .bind(owner.device.as_str())
    .bind(prekey.id.as_str())
    .bind(&key)
    .bind(String::from(prekey.signature.clone()))
    .execute(&mut **tx)
    .await?;
    if inserted.rows_affected() == 1 {
        return Ok(true);
    }
    let same = "SELECT COUNT(*) FROM one_time_keys WHERE user = ? AND device = ? AND id = ? AND key = ?";
    let same =
        count(tx, same, &[owner.user.as_str(), owner.device.as_str(), prekey.id.as_str(), &key]).await?;
    Ok(same == 1)
}

async fn replace_fallback(
    tx: &mut Transaction<'static, Sqlite>,
    owner: &DeviceAddress,
    prekey: &Prekey,
) -> Result<(), StoreError> {
    // The same key again is not fresh: `used` stays.
    sqlx::query(
        "UPDATE devices SET fallback_used = fallback_used AND fallback_key = ?1,
         fallback_id = ?2, fallback_key = ?1, fallback_signature = ?3 WHERE user = ?4 AND device = ?5",
    )
    .bind(String::from(prekey.key.clone()))
    .bind(prekey.id.as_str())
    .bind(String::from(prekey.signature.clone()))
    .bind(owner.user.as_str())
    .bind(owner.device.as_str())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

async fn key_count<'e>(
    executor: impl sqlx::Executor<'e, Database = Sqlite>,
    device: &DeviceAddress,
) -> Result<KeyCount, StoreError> {
    let row = sqlx::query(
        "SELECT (SELECT COUNT(*) FROM one_time_keys WHERE user = ?1 AND device = ?2),
         COALESCE((SELECT fallback_used FROM devices WHERE user = ?1 AND device = ?2), 0)",
    )
    .bind(device.user.as_str())
    .bind(device.device.as_str())
    .fetch_one(executor)
    .await?;
    Ok(KeyCount { one_time_keys: row.try_get(0)?, fallback_used: row.try_get::<i64, _>(1)? != 0 })
}

async fn release(
    tx: &mut Transaction<'static, Sqlite>,
    device: &DeviceAddress,
    messages: usize,
    bytes: i64,
) -> Result<(), StoreError> {
    sqlx::query(
        "UPDATE devices SET queued = queued - ?, queued_bytes = queued_bytes - ? WHERE user = ? AND device = ?",
    )
    .bind(messages as i64)
    .bind(bytes)
    .bind(device.user.as_str())
    .bind(device.device.as_str())
    .execute(&mut **tx)
    .await?;
    Ok(())
}

async fn count(
    tx: &mut Transaction<'static, Sqlite>,
    sql: &'static str,
    values: &[&str],
) -> Result<usize, StoreError> {
    let mut query = sqlx::query(sql);
    for value in values {
        query = query.bind((*value).to_owned());
    }
    let count: i64 = query.fetch_one(&mut **tx).await?.try_get(0)?;
    Ok(count.try_into().unwrap_or(usize::MAX))
}

fn identity(row: &SqliteRow) -> Result<IdentityKeys, StoreError> {
    Ok(IdentityKeys {
        curve25519: fixed(row, "curve25519")?,
        ed25519: fixed(row, "ed25519")?,
        signature: fixed(row, "signature")?,
    })
}

fn prekey(row: &SqliteRow) -> Result<Prekey, StoreError> {
    let id = row.try_get::<String, _>("id")?.try_into().map_err(impossible)?;
    Ok(Prekey { id, key: fixed(row, "key")?, signature: fixed(row, "signature")? })
}

fn delivery(row: &SqliteRow) -> Result<Delivery, StoreError> {
    let kind: u8 = row.try_get("olm_type")?;
    Ok(Delivery {
        seq: natural(row, "seq")?,
        id: row.try_get::<String, _>("message")?.try_into().map_err(impossible)?,
        conversation: row.try_get::<String, _>("conversation")?.try_into().map_err(impossible)?,
        sender: address(row, "sender_user", "sender_device")?,
        olm_type: OlmKind::try_from(kind).map_err(impossible)?,
        ciphertext: row.try_get::<Vec<u8>, _>("ciphertext")?.try_into().map_err(impossible)?,
        received_at: natural(row, "received_at")?,
    })
}

fn address(row: &SqliteRow, user: &str, device: &str) -> Result<DeviceAddress, StoreError> {
    Ok(DeviceAddress { user: parsed(row, user)?, device: parsed(row, device)? })
}

fn parsed(row: &SqliteRow, column: &str) -> Result<Name, StoreError> {
    row.try_get::<String, _>(column)?.try_into().map_err(impossible)
}

fn fixed<const N: usize>(row: &SqliteRow, column: &str) -> Result<Fixed<N>, StoreError> {
    row.try_get::<String, _>(column)?.try_into().map_err(impossible)
}

fn natural(row: &SqliteRow, column: &str) -> Result<u64, StoreError> {
    u64::try_from(row.try_get::<i64, _>(column)?).map_err(impossible)
}

fn impossible(error: impl ToString) -> StoreError {
    StoreError::Row(error.to_string())
}

/// SQLite's integers have a sign. Times and sequence numbers do not get near it.
fn integer(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{MessageId, Sealed};

    const DAY: u64 = 24 * 3600;

    async fn store() -> (Store, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store.sqlite")).await.unwrap();
        (store, folder)
    }

    fn device(user: &str) -> DeviceAddress {
        DeviceAddress { user: user.parse().unwrap(), device: "phone".parse().unwrap() }
    }

    async fn register(store: &Store, user: &str) -> DeviceAddress {
        let device = device(user);
        let identity =
            IdentityKeys { curve25519: [1; 32].into(), ed25519: [2; 32].into(), signature: [3; 64].into() };
        let upload = KeyUpload { identity, one_time_keys: Vec::new(), fallback_key: None };
        store.put_keys(&device, &upload, 0).await.unwrap();
        device
    }

    fn envelope(to: &DeviceAddress, bytes: usize) -> Envelope {
        let sealed = Sealed {
            user: to.user.clone(),
            device: to.device.clone(),
            kind: OlmKind::Prekey,
            ciphertext: vec![7; bytes].try_into().unwrap(),
        };
        Envelope {
            id: MessageId::now(),
            conversation: "e2e:x".to_owned().try_into().unwrap(),
            recipients: vec![sealed],
        }
    }

    #[tokio::test]
    async fn messages_wait_thirty_days_and_their_ids_are_known_longer() {
        let (store, _folder) = store().await;
        let (alice, bob) = (register(&store, "alice").await, register(&store, "bob").await);
        let message = envelope(&bob, 10);
        assert_eq!(store.send(&alice, &message, 1_000).await.unwrap(), Sent::Stored);

        store.sweep(1_000 + 30 * DAY - 1).await.unwrap();
        assert_eq!(store.queued(&bob).await.unwrap(), 1);
        store.sweep(1_000 + 30 * DAY).await.unwrap();
        assert_eq!(store.queued(&bob).await.unwrap(), 0);
        assert!(store.waiting(&bob, 0, 10).await.unwrap().is_empty());
        assert_eq!(store.send(&alice, &message, 0).await.unwrap(), Sent::Duplicate);
        store.sweep(1_000 + 31 * DAY).await.unwrap();
        assert_eq!(store.send(&alice, &message, 0).await.unwrap(), Sent::Stored);
    }

    #[tokio::test]
    async fn sessions_end_when_they_say_and_only_so_many_are_kept() {
        let (store, _folder) = store().await;
        let alice = device("alice");
        store.open_session("s", &alice, 100, 200).await.unwrap();
        assert_eq!(store.session("s", 199).await.unwrap(), Some(alice.clone()));
        assert_eq!(store.session("s", 200).await.unwrap(), None);
        assert_eq!(store.session("t", 199).await.unwrap(), None);

        for number in 0..1_000 {
            store.open_session(&format!("s{number}"), &alice, 101 + number, 10_000).await.unwrap();
        }
        assert_eq!(store.session("s", 199).await.unwrap(), None, "the oldest went");
        assert!(store.session("s0", 199).await.unwrap().is_some());
    }

    #[tokio::test]
    async fn a_queue_is_bounded_in_bytes_too() {
        let (store, _folder) = store().await;
        let (alice, bob) = (register(&store, "alice").await, register(&store, "bob").await);
        let largest = crate::wire::MAX_CIPHERTEXT;
        let fit = 64 * 1024 * 1024 / largest;
        for _ in 0..fit {
            assert_eq!(store.send(&alice, &envelope(&bob, largest), 0).await.unwrap(), Sent::Stored);
        }
        let over = envelope(&bob, largest);
        assert_eq!(store.send(&alice, &over, 0).await.unwrap(), Sent::QueueFull(bob.clone()));
        assert_eq!(store.acknowledge(&bob, 1).await.unwrap(), 1);
        assert_eq!(store.send(&alice, &over, 0).await.unwrap(), Sent::Stored);
        assert_eq!(store.acknowledge(&bob, u64::MAX).await.unwrap(), fit as u64);
        assert_eq!(store.queued(&bob).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_database_of_a_later_version_is_left_alone() {
        let (store, folder) = store().await;
        sqlx::query("PRAGMA user_version = 99").execute(&store.write).await.unwrap();
        store.close().await;
        let error = Store::open(&folder.path().join("store.sqlite")).await.unwrap_err();
        assert!(matches!(error, StoreError::FromTheFuture { found: 99, .. }), "{error}");
    }

    #[tokio::test]
    async fn readers_cannot_write() {
        let (store, _folder) = store().await;
        assert!(sqlx::query("DELETE FROM sessions").execute(&store.read).await.is_err());
    }
}
