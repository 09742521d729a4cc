-- +goose Up

-- A relay takes new events in the order of their ids, and those that rest when their time has come, however many others
-- there are of either kind.
ALTER TABLE outbox ADD KEY outbox_available (available_at);
