-- +goose Up

-- Which event a row of the outbox holds, so that an order's way can be told without opening payloads.
ALTER TABLE outbox ADD COLUMN event_id TEXT NOT NULL DEFAULT '';
ALTER TABLE outbox ADD COLUMN event_key TEXT NOT NULL DEFAULT '';
ALTER TABLE outbox ADD COLUMN order_id TEXT NOT NULL DEFAULT '';
CREATE INDEX outbox_order_id ON outbox (order_id);

-- Events that the broker has confirmed. Written when their outbox rows are deleted, kept for a bounded time.
CREATE TABLE outbox_confirmed (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL,
    event_key TEXT NOT NULL,
    order_id TEXT NOT NULL,
    created_at DATETIME NOT NULL,
    confirmed_at DATETIME NOT NULL
);
CREATE INDEX outbox_confirmed_order_id ON outbox_confirmed (order_id);
CREATE INDEX outbox_confirmed_at ON outbox_confirmed (confirmed_at);

ALTER TABLE inbox ADD COLUMN order_id TEXT NOT NULL DEFAULT '';
CREATE INDEX inbox_order_id ON inbox (order_id);
CREATE INDEX inbox_handled_at ON inbox (handled_at);

-- Messages that failed and wait for their next attempt, read as a queue by the consumers of this database.
CREATE TABLE retry (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    queue TEXT NOT NULL, -- the consumer
    uuid TEXT NOT NULL, -- the message's id
    fingerprint BLOB NOT NULL, -- SHA-256 of message id, body and signature, as in failure
    tier INTEGER NOT NULL, -- which delay this is, 1 for the first, 0 for a retry that a person asked for
    order_id TEXT NOT NULL,
    failure_id INTEGER NULL,     -- the failure that is retried, if a person asked for it
    batch TEXT NOT NULL DEFAULT '', -- of retries that stop together
    payload BLOB NOT NULL,
    metadata BLOB NULL,     -- JSON
    error_text TEXT NOT NULL, -- of the attempt before
    created_at DATETIME NOT NULL,
    available_at INTEGER NOT NULL, -- when it may be tried, server clock, microseconds since 1970
    attempts INTEGER NOT NULL DEFAULT 0, -- how often it was taken
    UNIQUE (queue, fingerprint, tier)
);
CREATE INDEX retry_available ON retry (queue, available_at);
CREATE INDEX retry_order_id ON retry (order_id);
CREATE INDEX retry_batch ON retry (batch);
CREATE INDEX retry_failure_id ON retry (failure_id);

ALTER TABLE failure ADD COLUMN occurrences INTEGER NOT NULL DEFAULT 1;
ALTER TABLE failure ADD COLUMN closed_at DATETIME NULL;
ALTER TABLE failure ADD COLUMN replaced_by TEXT NOT NULL DEFAULT ''; -- event id of the edited message
CREATE INDEX failure_order_id ON failure (order_id);
CREATE INDEX failure_consumer_state ON failure (consumer, state, id);
CREATE INDEX failure_closed_at ON failure (closed_at);

-- Who did what with a failure, and why.
CREATE TABLE failure_action (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    failure_id INTEGER NOT NULL,
    at DATETIME NOT NULL,
    operator TEXT NOT NULL,
    action TEXT NOT NULL,
    reason TEXT NOT NULL
);
CREATE INDEX failure_action_failure ON failure_action (failure_id, id);

-- What was done about an order beyond its ordinary course. Kept for a bounded time.
CREATE TABLE history (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    order_id TEXT NOT NULL,
    at DATETIME NOT NULL,
    step TEXT NOT NULL,
    detail TEXT NOT NULL
);
CREATE INDEX history_order_id ON history (order_id);
CREATE INDEX history_at ON history (at);

-- Minutes whose rows changed after they had been compared, so that reconciliation looks at them again.
CREATE TABLE reconcile_dirty (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    minute INTEGER NOT NULL, -- of placed_at, since 1970
    at DATETIME NOT NULL
);

-- How far this database has been compared with another, and in which comparison. Both sides keep it: when they
-- disagree, one was restored from an earlier copy, and everything is compared again.
CREATE TABLE reconcile_mark (
    pair TEXT NOT NULL PRIMARY KEY,
    minute INTEGER NOT NULL,
    pass INTEGER NOT NULL
);
