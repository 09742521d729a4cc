-- +goose Up

CREATE TABLE order_info (
    id          INTEGER  PRIMARY KEY AUTOINCREMENT,
    orderId     TEXT     NOT NULL,
    name        TEXT     NOT NULL,
    order_money INTEGER  NOT NULL, -- minor units
    currency    TEXT     NOT NULL,
    status      TEXT     NOT NULL,
    version     INTEGER  NOT NULL,
    courier_id  TEXT     NULL,
    assigned_at DATETIME NULL,
    placed_at   DATETIME NOT NULL,
    UNIQUE (orderId),
    CHECK (order_money > 0)
);
CREATE INDEX order_info_status ON order_info (status, id);

-- What requests with an Idempotency-Key were answered.
CREATE TABLE idempotency_answer (
    request_key BLOB     NOT NULL PRIMARY KEY,
    fingerprint BLOB     NOT NULL,
    orderId     TEXT     NOT NULL,
    body        BLOB     NOT NULL,
    created_at  DATETIME NOT NULL
) WITHOUT ROWID;
CREATE INDEX idempotency_answer_created_at ON idempotency_answer (created_at);
