-- +goose Up

-- As for the outbox: new messages by id, and those that rest by their time.
CREATE INDEX broker_message_available ON broker_message (queue, available_at);
DROP INDEX broker_message_queue;
