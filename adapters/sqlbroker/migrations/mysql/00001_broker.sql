-- +goose Up

-- Which queues get what is published to a topic.
CREATE TABLE broker_binding (
    topic VARCHAR(64)  CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    queue VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    PRIMARY KEY (topic, queue)
) ENGINE=InnoDB;

-- The messages of all queues. A row is pending because it is here.
CREATE TABLE broker_message (
    id           BIGINT       NOT NULL AUTO_INCREMENT PRIMARY KEY,
    queue        VARCHAR(128) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
    uuid         VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin NOT NULL,
    payload      LONGBLOB     NOT NULL,
    metadata     MEDIUMBLOB   NULL,
    available_at BIGINT       NOT NULL DEFAULT 0, -- when a consumer may take it, server clock, microseconds since 1970
    attempts     INT          NOT NULL DEFAULT 0, -- how often a consumer took it
    KEY broker_message_queue (queue, id)
) ENGINE=InnoDB;
