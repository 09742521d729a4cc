-- +goose Up

-- A row without a courier is an order that waits for one, got none in time, or was cancelled before it had one.
ALTER TABLE platoon
    MODIFY takeout_userId VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NULL,
    MODIFY assigned_at DATETIME(6) NULL,
    ADD COLUMN delivered_at DATETIME(6) NULL,
    ADD COLUMN released_at  DATETIME(6) NULL,
    ADD KEY platoon_placed_at (placed_at),
    ADD KEY platoon_state (state, placed_at);
