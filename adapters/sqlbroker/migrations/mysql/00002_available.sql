-- +goose Up

-- As for the outbox: new messages by id, and those that rest by their time.
ALTER TABLE broker_message
    ADD KEY broker_message_available (queue, available_at),
    DROP KEY broker_message_queue;
