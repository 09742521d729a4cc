-- +goose Up

CREATE TABLE order_info (
    id          BIGINT      NOT NULL AUTO_INCREMENT PRIMARY KEY,
    orderId     VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    name        VARCHAR(30) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    order_money BIGINT      NOT NULL, -- minor units
    currency    CHAR(3)     CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    status      VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    version     BIGINT      NOT NULL,
    courier_id  VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NULL,
    assigned_at DATETIME(6) NULL,
    placed_at   DATETIME(6) NOT NULL,
    UNIQUE KEY order_info_orderId (orderId),
    KEY order_info_status (status, id),
    CHECK (order_money > 0)
) ENGINE=InnoDB;

-- What requests with an Idempotency-Key were answered.
CREATE TABLE idempotency_answer (
    request_key VARBINARY(255) NOT NULL PRIMARY KEY,
    fingerprint BINARY(32)     NOT NULL,
    orderId     VARCHAR(64)    CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    body        BLOB           NOT NULL,
    created_at  DATETIME(6)    NOT NULL,
    KEY idempotency_answer_created_at (created_at)
) ENGINE=InnoDB;
