-- +goose Up

-- Whose database this is. One row.
CREATE TABLE owner (
    service     VARCHAR(16)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL PRIMARY KEY,
    database_id CHAR(36)     CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    created_at  DATETIME(6)  NOT NULL
) ENGINE=InnoDB;

-- Events that are not yet known to be in the broker. A row is pending because it is here; it is deleted when the
-- broker has confirmed it.
CREATE TABLE outbox (
    id           BIGINT       NOT NULL AUTO_INCREMENT PRIMARY KEY,
    uuid         CHAR(36)     CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    payload      MEDIUMBLOB   NOT NULL,
    metadata     BLOB         NULL,
    created_at   DATETIME(6)  NOT NULL,
    available_at BIGINT       NOT NULL DEFAULT 0, -- when a relay may take it, server clock, microseconds since 1970
    attempts     INT          NOT NULL DEFAULT 0  -- how often a relay took it
) ENGINE=InnoDB;

-- Which consumer has handled which event. Written in the transaction that handles it.
CREATE TABLE inbox (
    consumer   VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    event_id   VARCHAR(100) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    body_hash  BINARY(32)   NOT NULL, -- SHA-256 of the message's body
    handled_at DATETIME(6)  NOT NULL,
    PRIMARY KEY (consumer, event_id)
) ENGINE=InnoDB;

-- Messages that a consumer gave up on, for a person. The bytes are in failure_payload.
CREATE TABLE failure (
    id              BIGINT       NOT NULL AUTO_INCREMENT PRIMARY KEY,
    consumer        VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    fingerprint     BINARY(32)   NOT NULL, -- SHA-256 of message id, body and signature: the same message is kept once
    message_id      VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    order_id        VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL, -- empty if it could not be read
    error_class     VARCHAR(32)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    error_code      VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    error_text      VARCHAR(512) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    attempts        INT          NOT NULL,
    headers         MEDIUMBLOB   NOT NULL, -- JSON
    payload_size    BIGINT       NOT NULL, -- bytes
    state           VARCHAR(16)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    first_failed_at DATETIME(6)  NOT NULL,
    last_failed_at  DATETIME(6)  NOT NULL,
    UNIQUE KEY failure_message (consumer, fingerprint),
    KEY failure_state (state, id)
) ENGINE=InnoDB;

-- The bytes of a failed message in parts, so that one larger than a packet of the server is kept whole.
CREATE TABLE failure_payload (
    failure_id BIGINT     NOT NULL,
    part       INT        NOT NULL,
    bytes      MEDIUMBLOB NOT NULL,
    PRIMARY KEY (failure_id, part)
) ENGINE=InnoDB;
