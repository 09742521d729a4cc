-- +goose Up

-- One payment for each order. The order's own values are kept so that the two sides can be compared.
CREATE TABLE payment (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    orderId TEXT NOT NULL,
    name TEXT NOT NULL,
    order_money INTEGER NOT NULL, -- minor units
    currency TEXT NOT NULL,
    placed_at DATETIME NOT NULL,
    order_version INTEGER NOT NULL,
    state TEXT NOT NULL,
    reference TEXT NOT NULL, -- the gateway's
    reason TEXT NOT NULL, -- why it was refused
    decided_at DATETIME NULL,
    refunded_at DATETIME NULL,
    UNIQUE (orderId)
);
CREATE INDEX payment_placed_at ON payment (placed_at);
