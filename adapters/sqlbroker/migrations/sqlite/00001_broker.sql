-- +goose Up

-- Which queues get what is published to a topic.
CREATE TABLE broker_binding (
    topic TEXT NOT NULL,
    queue TEXT NOT NULL,
    PRIMARY KEY (topic, queue)
) WITHOUT ROWID;

-- The messages of all queues. A row is pending because it is here.
CREATE TABLE broker_message (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    queue        TEXT    NOT NULL,
    uuid         TEXT    NOT NULL,
    payload      BLOB    NOT NULL,
    metadata     BLOB    NULL,
    available_at INTEGER NOT NULL DEFAULT 0, -- when a consumer may take it, microseconds since 1970
    attempts     INTEGER NOT NULL DEFAULT 0  -- how often a consumer took it
);
CREATE INDEX broker_message_queue ON broker_message (queue, id);
