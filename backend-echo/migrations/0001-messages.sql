-- Times are Unix seconds. Names and ids were checked before they come here.

-- Which device a session of the gateway belongs to.
CREATE TABLE sessions (
    id         TEXT    PRIMARY KEY,
    user       TEXT    NOT NULL,
    device     TEXT    NOT NULL,
    opened_at  INTEGER NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX sessions_by_user ON sessions (user, opened_at);
CREATE INDEX sessions_by_expiry ON sessions (expires_at);

-- A registered device: its public identity, its fallback key, and the counters of its queue.
CREATE TABLE devices (
    user               TEXT    NOT NULL,
    device             TEXT    NOT NULL,
    curve25519         TEXT    NOT NULL,
    ed25519            TEXT    NOT NULL,
    signature          TEXT    NOT NULL,
    fallback_id        TEXT,
    fallback_key       TEXT,
    fallback_signature TEXT,
    fallback_used      INTEGER NOT NULL DEFAULT 0,
    last_seq           INTEGER NOT NULL DEFAULT 0,
    queued             INTEGER NOT NULL DEFAULT 0,
    queued_bytes       INTEGER NOT NULL DEFAULT 0,
    registered_at      INTEGER NOT NULL,
    PRIMARY KEY (user, device)
) STRICT, WITHOUT ROWID;

-- Prekeys; `position` orders them by arrival, so that the oldest is claimed first.
CREATE TABLE one_time_keys (
    position  INTEGER PRIMARY KEY AUTOINCREMENT,
    user      TEXT    NOT NULL,
    device    TEXT    NOT NULL,
    id        TEXT    NOT NULL,
    key       TEXT    NOT NULL,
    signature TEXT    NOT NULL,
    UNIQUE (user, device, id),
    FOREIGN KEY (user, device) REFERENCES devices (user, device) ON DELETE CASCADE
) STRICT;
CREATE INDEX one_time_keys_by_age ON one_time_keys (user, device, position);

-- Messages that their device has not acknowledged yet. Ciphertext only.
CREATE TABLE queue (
    user          TEXT    NOT NULL,
    device        TEXT    NOT NULL,
    seq           INTEGER NOT NULL,
    sender_user   TEXT    NOT NULL,
    sender_device TEXT    NOT NULL,
    message       TEXT    NOT NULL,
    conversation  TEXT    NOT NULL,
    olm_type      INTEGER NOT NULL,
    ciphertext    BLOB    NOT NULL,
    received_at   INTEGER NOT NULL,
    PRIMARY KEY (user, device, seq),
    FOREIGN KEY (user, device) REFERENCES devices (user, device) ON DELETE CASCADE
) STRICT;
CREATE INDEX queue_by_age ON queue (received_at);

-- Ids that were accepted, kept longer than any queue, so that a repeated send does nothing.
CREATE TABLE accepted (
    user        TEXT    NOT NULL,
    device      TEXT    NOT NULL,
    message     TEXT    NOT NULL,
    accepted_at INTEGER NOT NULL,
    PRIMARY KEY (user, device, message)
) STRICT, WITHOUT ROWID;
CREATE INDEX accepted_by_age ON accepted (accepted_at);
