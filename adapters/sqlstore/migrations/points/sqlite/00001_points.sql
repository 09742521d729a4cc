-- +goose Up

-- The ledger. Entries are added and never changed; an order has at most one of each kind.
CREATE TABLE points_entry (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    orderId TEXT NOT NULL,
    kind TEXT NOT NULL,
    points INTEGER NOT NULL, -- negative when taken back
    placed_at DATETIME NOT NULL, -- of the order
    at DATETIME NOT NULL,
    UNIQUE (orderId, kind)
);
CREATE INDEX points_entry_placed_at ON points_entry (placed_at);
