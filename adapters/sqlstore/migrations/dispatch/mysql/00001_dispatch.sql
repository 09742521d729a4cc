-- +goose Up

-- One courier for each order. The order's own values are kept so that the two sides can be compared, and an order
-- that the order side lost can be built again.
CREATE TABLE platoon (
    id             BIGINT      NOT NULL AUTO_INCREMENT PRIMARY KEY,
    orderId        VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    takeout_userId VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL, -- the courier
    state          VARCHAR(16) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    name           VARCHAR(30) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    order_money    BIGINT      NOT NULL, -- minor units
    currency       CHAR(3)     CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    placed_at      DATETIME(6) NOT NULL,
    order_version  BIGINT      NOT NULL,
    assigned_at    DATETIME(6) NOT NULL,
    UNIQUE KEY platoon_orderId (orderId),
    KEY platoon_courier (takeout_userId, state)
) ENGINE=InnoDB;

CREATE TABLE courier (
    id         BIGINT      NOT NULL AUTO_INCREMENT PRIMARY KEY,
    courier_id VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    name       VARCHAR(60) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    on_duty    TINYINT     NOT NULL,
    capacity   INT         NOT NULL, -- orders at the same time, 0 for no limit
    active     INT         NOT NULL, -- orders now; counted only for those whose capacity has a limit
    UNIQUE KEY courier_courier_id (courier_id),
    KEY courier_on_duty (on_duty)
) ENGINE=InnoDB;
