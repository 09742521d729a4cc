-- +goose Up

ALTER TABLE order_info ADD COLUMN delivered_at DATETIME NULL;
ALTER TABLE order_info ADD COLUMN cancelled_at DATETIME NULL;
ALTER TABLE order_info ADD COLUMN cancel_reason TEXT NOT NULL DEFAULT '';
ALTER TABLE order_info ADD COLUMN points INTEGER NOT NULL DEFAULT 0; -- what paying for it earned
CREATE INDEX order_info_placed_at ON order_info (placed_at);

-- What reconciliation found, with the evidence and what became of it.
CREATE TABLE finding (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    orderId TEXT NOT NULL,
    class TEXT NOT NULL,
    minute INTEGER NOT NULL, -- of placed_at, since 1970
    state TEXT NOT NULL, -- open, repairing, person, resolved
    evidence BLOB NOT NULL, -- JSON: what each side holds
    repair TEXT NOT NULL, -- what was done, empty if nothing
    repairs INTEGER NOT NULL DEFAULT 0,
    first_seen DATETIME NOT NULL,
    last_seen DATETIME NOT NULL,
    repaired_at DATETIME NULL, -- last
    resolved_at DATETIME NULL,
    UNIQUE (orderId, class)
);
CREATE INDEX finding_state ON finding (state, id);
CREATE INDEX finding_minute ON finding (minute);
CREATE INDEX finding_resolved_at ON finding (resolved_at);

-- The last reports of reconciliation. Kept for a bounded time.
CREATE TABLE reconcile_report (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    started_at DATETIME NOT NULL,
    report BLOB NOT NULL -- JSON
);
CREATE INDEX reconcile_report_started_at ON reconcile_report (started_at);

-- Which process reconciles in the background.
CREATE TABLE reconcile_lease (
    id INTEGER NOT NULL PRIMARY KEY,
    owner TEXT NOT NULL,
    expires INTEGER NOT NULL -- server clock, microseconds since 1970
);
