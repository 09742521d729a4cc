-- +goose Up

-- A row without a courier is an order that waits for one, got none in time, or was cancelled before it had one.
-- SQLite cannot change a column, so the table is made again.
CREATE TABLE platoon_2 (
    id             INTEGER  PRIMARY KEY AUTOINCREMENT,
    orderId        TEXT     NOT NULL,
    takeout_userId TEXT     NULL, -- the courier
    state          TEXT     NOT NULL,
    name           TEXT     NOT NULL,
    order_money    INTEGER  NOT NULL, -- minor units
    currency       TEXT     NOT NULL,
    placed_at      DATETIME NOT NULL,
    order_version  INTEGER  NOT NULL,
    assigned_at    DATETIME NULL,
    delivered_at   DATETIME NULL,
    released_at    DATETIME NULL,
    UNIQUE (orderId)
);
INSERT INTO platoon_2 (id, orderId, takeout_userId, state, name, order_money, currency, placed_at, order_version, assigned_at)
    SELECT id, orderId, takeout_userId, state, name, order_money, currency, placed_at, order_version, assigned_at FROM platoon;
DROP TABLE platoon;
ALTER TABLE platoon_2 RENAME TO platoon;
CREATE INDEX platoon_courier ON platoon (takeout_userId, state);
CREATE INDEX platoon_placed_at ON platoon (placed_at);
CREATE INDEX platoon_state ON platoon (state, placed_at);
