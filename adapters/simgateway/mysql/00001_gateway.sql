-- +goose Up

-- The books of the simulated payment gateway, one line for each order that it was asked about. Money is held if there is
-- charged_at and no cancelled_at; without either, the charge was refused.
CREATE TABLE simulated_charge (
    id           BIGINT       NOT NULL AUTO_INCREMENT PRIMARY KEY,
    orderId      VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    amount       BIGINT       NOT NULL, -- minor units
    currency     CHAR(3)      CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    reference    VARCHAR(100) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    charged_at   DATETIME(6)  NULL,
    cancelled_at DATETIME(6)  NULL,
    calls        INT          NOT NULL, -- how often it was asked
    UNIQUE KEY simulated_charge_orderId (orderId)
) ENGINE=InnoDB;
