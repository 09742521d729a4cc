-- +goose Up

-- The books of the simulated payment gateway, one line for each order that it was asked about. Money is held if there is
-- charged_at and no cancelled_at; without either, the charge was refused.
CREATE TABLE simulated_charge (
    id           INTEGER  PRIMARY KEY AUTOINCREMENT,
    orderId      TEXT     NOT NULL,
    amount       INTEGER  NOT NULL, -- minor units
    currency     TEXT     NOT NULL,
    reference    TEXT     NOT NULL,
    charged_at   DATETIME NULL,
    cancelled_at DATETIME NULL,
    calls        INTEGER  NOT NULL, -- how often it was asked
    UNIQUE (orderId)
);
