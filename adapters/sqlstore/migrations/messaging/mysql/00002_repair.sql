-- +goose Up

-- Which event a row of the outbox holds, so that an order's way can be told without opening payloads.
ALTER TABLE outbox
    ADD COLUMN event_id  VARCHAR(100) CHARACTER SET ascii COLLATE ascii_bin NOT NULL DEFAULT '',
    ADD COLUMN event_key VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL DEFAULT '',
    ADD COLUMN order_id  VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL DEFAULT '',
    ADD KEY outbox_order_id (order_id);

-- Events that the broker has confirmed. Written when their outbox rows are deleted, kept for a bounded time.
CREATE TABLE outbox_confirmed (
    id           BIGINT       NOT NULL AUTO_INCREMENT PRIMARY KEY,
    event_id     VARCHAR(100) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    event_key    VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    order_id     VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    created_at   DATETIME(6)  NOT NULL,
    confirmed_at DATETIME(6)  NOT NULL,
    KEY outbox_confirmed_order_id (order_id),
    KEY outbox_confirmed_at (confirmed_at)
) ENGINE=InnoDB;

ALTER TABLE inbox
    ADD COLUMN order_id VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL DEFAULT '',
    ADD KEY inbox_order_id (order_id),
    ADD KEY inbox_handled_at (handled_at);

-- Messages that failed and wait for their next attempt, read as a queue by the consumers of this database.
CREATE TABLE retry (
    id           BIGINT       NOT NULL AUTO_INCREMENT PRIMARY KEY,
    queue        VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL, -- the consumer
    uuid         VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL, -- the message's id
    fingerprint  BINARY(32)   NOT NULL, -- SHA-256 of message id, body and signature, as in failure
    tier         INT          NOT NULL, -- which delay this is, 1 for the first, 0 for a retry that a person asked for
    order_id     VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    failure_id   BIGINT       NULL,     -- the failure that is retried, if a person asked for it
    batch        VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL DEFAULT '', -- of retries that stop together
    payload      MEDIUMBLOB   NOT NULL,
    metadata     MEDIUMBLOB   NULL,     -- JSON
    error_text   VARCHAR(512) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL, -- of the attempt before
    created_at   DATETIME(6)  NOT NULL,
    available_at BIGINT       NOT NULL, -- when it may be tried, server clock, microseconds since 1970
    attempts     INT          NOT NULL DEFAULT 0, -- how often it was taken
    UNIQUE KEY retry_message (queue, fingerprint, tier),
    KEY retry_available (queue, available_at),
    KEY retry_order_id (order_id),
    KEY retry_batch (batch),
    KEY retry_failure_id (failure_id)
) ENGINE=InnoDB;

ALTER TABLE failure
    ADD COLUMN occurrences INT          NOT NULL DEFAULT 1,
    ADD COLUMN closed_at   DATETIME(6)  NULL,
    ADD COLUMN replaced_by VARCHAR(100) CHARACTER SET ascii COLLATE ascii_bin NOT NULL DEFAULT '', -- event id of the edited message
    ADD KEY failure_order_id (order_id),
    ADD KEY failure_consumer_state (consumer, state, id),
    ADD KEY failure_closed_at (closed_at);

-- Who did what with a failure, and why.
CREATE TABLE failure_action (
    id         BIGINT       NOT NULL AUTO_INCREMENT PRIMARY KEY,
    failure_id BIGINT       NOT NULL,
    at         DATETIME(6)  NOT NULL,
    operator   VARCHAR(64)  CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    action     VARCHAR(32)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    reason     VARCHAR(512) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    KEY failure_action_failure (failure_id, id)
) ENGINE=InnoDB;

-- What was done about an order beyond its ordinary course. Kept for a bounded time.
CREATE TABLE history (
    id       BIGINT        NOT NULL AUTO_INCREMENT PRIMARY KEY,
    order_id VARCHAR(64)   CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    at       DATETIME(6)   NOT NULL,
    step     VARCHAR(64)   CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    detail   VARCHAR(1024) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    KEY history_order_id (order_id),
    KEY history_at (at)
) ENGINE=InnoDB;

-- Minutes whose rows changed after they had been compared, so that reconciliation looks at them again.
CREATE TABLE reconcile_dirty (
    id     BIGINT      NOT NULL AUTO_INCREMENT PRIMARY KEY,
    minute BIGINT      NOT NULL, -- of placed_at, since 1970
    at     DATETIME(6) NOT NULL
) ENGINE=InnoDB;

-- How far this database has been compared with another, and in which comparison. Both sides keep it: when they
-- disagree, one was restored from an earlier copy, and everything is compared again.
CREATE TABLE reconcile_mark (
    pair   VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL PRIMARY KEY,
    minute BIGINT      NOT NULL,
    pass   BIGINT      NOT NULL
) ENGINE=InnoDB;
