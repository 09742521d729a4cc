-- +goose Up

ALTER TABLE order_info
    ADD COLUMN delivered_at  DATETIME(6)  NULL,
    ADD COLUMN cancelled_at  DATETIME(6)  NULL,
    ADD COLUMN cancel_reason VARCHAR(200) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL DEFAULT '',
    ADD COLUMN points        BIGINT       NOT NULL DEFAULT 0, -- what paying for it earned
    ADD KEY order_info_placed_at (placed_at);

-- What reconciliation found, with the evidence and what became of it.
CREATE TABLE finding (
    id          BIGINT      NOT NULL AUTO_INCREMENT PRIMARY KEY,
    orderId     VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    class       VARCHAR(32) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    minute      BIGINT      NOT NULL, -- of placed_at, since 1970
    state       VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL, -- open, repairing, person, resolved
    evidence    BLOB        NOT NULL, -- JSON: what each side holds
    repair      VARCHAR(200) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL, -- what was done, empty if nothing
    repairs     INT         NOT NULL DEFAULT 0,
    first_seen  DATETIME(6) NOT NULL,
    last_seen   DATETIME(6) NOT NULL,
    repaired_at DATETIME(6) NULL, -- last
    resolved_at DATETIME(6) NULL,
    UNIQUE KEY finding_order (orderId, class),
    KEY finding_state (state, id),
    KEY finding_minute (minute),
    KEY finding_resolved_at (resolved_at)
) ENGINE=InnoDB;

-- The last reports of reconciliation. Kept for a bounded time.
CREATE TABLE reconcile_report (
    id         BIGINT      NOT NULL AUTO_INCREMENT PRIMARY KEY,
    started_at DATETIME(6) NOT NULL,
    report     MEDIUMBLOB  NOT NULL, -- JSON
    KEY reconcile_report_started_at (started_at)
) ENGINE=InnoDB;

-- Which process reconciles in the background.
CREATE TABLE reconcile_lease (
    id      INT         NOT NULL PRIMARY KEY,
    owner   VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    expires BIGINT      NOT NULL -- server clock, microseconds since 1970
) ENGINE=InnoDB;
