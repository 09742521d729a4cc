-- +goose Up

-- A relay takes new events in the order of their ids, and those that rest when their time has come, however many others
-- there are of either kind.
CREATE INDEX outbox_available ON outbox (available_at);
