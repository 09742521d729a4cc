-- +goose Up

-- One courier for each order. The order's own values are kept so that the two sides can be compared, and an order
-- that the order side lost can be built again.
CREATE TABLE platoon (
    id             INTEGER  PRIMARY KEY AUTOINCREMENT,
    orderId        TEXT     NOT NULL,
    takeout_userId TEXT     NOT NULL, -- the courier
    state          TEXT     NOT NULL,
    name           TEXT     NOT NULL,
    order_money    INTEGER  NOT NULL, -- minor units
    currency       TEXT     NOT NULL,
    placed_at      DATETIME NOT NULL,
    order_version  INTEGER  NOT NULL,
    assigned_at    DATETIME NOT NULL,
    UNIQUE (orderId)
);
CREATE INDEX platoon_courier ON platoon (takeout_userId, state);

CREATE TABLE courier (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    courier_id TEXT    NOT NULL,
    name       TEXT    NOT NULL,
    on_duty    INTEGER NOT NULL,
    capacity   INTEGER NOT NULL, -- orders at the same time, 0 for no limit
    active     INTEGER NOT NULL, -- orders now; counted only for those whose capacity has a limit
    UNIQUE (courier_id)
);
CREATE INDEX courier_on_duty ON courier (on_duty);
