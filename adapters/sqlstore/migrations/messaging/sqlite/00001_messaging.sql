-- +goose Up

-- Whose database this is. One row.
CREATE TABLE owner (
    service     TEXT     NOT NULL PRIMARY KEY,
    database_id TEXT     NOT NULL,
    created_at  DATETIME NOT NULL
);

-- Events that are not yet known to be in the broker. A row is pending because it is here; it is deleted when the
-- broker has confirmed it.
CREATE TABLE outbox (
    id           INTEGER  PRIMARY KEY AUTOINCREMENT,
    uuid         TEXT     NOT NULL,
    payload      BLOB     NOT NULL,
    metadata     BLOB     NULL,
    created_at   DATETIME NOT NULL,
    available_at INTEGER  NOT NULL DEFAULT 0, -- when a relay may take it, microseconds since 1970
    attempts     INTEGER  NOT NULL DEFAULT 0  -- how often a relay took it
);

-- Which consumer has handled which event. Written in the transaction that handles it.
CREATE TABLE inbox (
    consumer   TEXT     NOT NULL,
    event_id   TEXT     NOT NULL,
    body_hash  BLOB     NOT NULL, -- SHA-256 of the message's body
    handled_at DATETIME NOT NULL,
    PRIMARY KEY (consumer, event_id)
) WITHOUT ROWID;

-- Messages that a consumer gave up on, for a person. The bytes are in failure_payload.
CREATE TABLE failure (
    id              INTEGER  PRIMARY KEY AUTOINCREMENT,
    consumer        TEXT     NOT NULL,
    fingerprint     BLOB     NOT NULL, -- SHA-256 of message id, body and signature: the same message is kept once
    message_id      TEXT     NOT NULL,
    order_id        TEXT     NOT NULL, -- empty if it could not be read
    error_class     TEXT     NOT NULL,
    error_code      TEXT     NOT NULL,
    error_text      TEXT     NOT NULL,
    attempts        INTEGER  NOT NULL,
    headers         BLOB     NOT NULL, -- JSON
    payload_size    INTEGER  NOT NULL, -- bytes
    state           TEXT     NOT NULL,
    first_failed_at DATETIME NOT NULL,
    last_failed_at  DATETIME NOT NULL,
    UNIQUE (consumer, fingerprint)
);
CREATE INDEX failure_state ON failure (state, id);

-- The bytes of a failed message in parts, as on MySQL.
CREATE TABLE failure_payload (
    failure_id INTEGER NOT NULL,
    part       INTEGER NOT NULL,
    bytes      BLOB    NOT NULL,
    PRIMARY KEY (failure_id, part)
) WITHOUT ROWID;
