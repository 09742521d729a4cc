-- +goose Up

-- One payment for each order. The order's own values are kept so that the two sides can be compared.
CREATE TABLE payment (
    id            BIGINT       NOT NULL AUTO_INCREMENT PRIMARY KEY,
    orderId       VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    name          VARCHAR(30)  CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    order_money   BIGINT       NOT NULL, -- minor units
    currency      CHAR(3)      CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    placed_at     DATETIME(6)  NOT NULL,
    order_version BIGINT       NOT NULL,
    state         VARCHAR(16)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    reference     VARCHAR(100) CHARACTER SET ascii COLLATE ascii_bin NOT NULL, -- the gateway's
    reason        VARCHAR(200) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL, -- why it was refused
    decided_at    DATETIME(6)  NULL,
    refunded_at   DATETIME(6)  NULL,
    UNIQUE KEY payment_orderId (orderId),
    KEY payment_placed_at (placed_at)
) ENGINE=InnoDB;
