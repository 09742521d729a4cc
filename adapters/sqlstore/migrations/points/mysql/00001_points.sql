-- +goose Up

-- The ledger. Entries are added and never changed; an order has at most one of each kind.
CREATE TABLE points_entry (
    id        BIGINT      NOT NULL AUTO_INCREMENT PRIMARY KEY,
    orderId   VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    kind      VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    points    BIGINT      NOT NULL, -- negative when taken back
    placed_at DATETIME(6) NOT NULL, -- of the order
    at        DATETIME(6) NOT NULL,
    UNIQUE KEY points_entry_order (orderId, kind),
    KEY points_entry_placed_at (placed_at)
) ENGINE=InnoDB;
