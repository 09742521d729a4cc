//go:build linux

package main

import (
	"context"
	"database/sql"
	"errors"
	"path/filepath"
	"strings"
	"time"
)

// embeddedFloor is the floor of the embedded installation: the same rows in three files of SQLite, which has one writer
// for each, in batches.
type embeddedFloor struct {
	orders, dispatches, queue *sql.DB
	batches                   batcher
	stored, sent              chan struct{} // bells
}

const queueTable = `CREATE TABLE message (id INTEGER PRIMARY KEY AUTOINCREMENT, uuid TEXT NOT NULL, payload BLOB NOT NULL)`

func startEmbeddedFloor(ctx context.Context, s site) (_ system, err error) {
	f := &embeddedFloor{stored: make(chan struct{}, 1), sent: make(chan struct{}, 1)}
	if f.orders, err = open(s.Order, 1, false); err != nil {
		return nil, err
	}
	if f.dispatches, err = open(s.Dispatch, 1, false); err != nil {
		return nil, err
	}
	if f.queue, err = openSQLite(filepath.Join(s.Dir, "queue.db"), 1); err != nil {
		return nil, err
	}
	if err := errors.Join(
		create(ctx, f.orders, sqliteTable(orderTable), sqliteTable(outboxTable)),
		create(ctx, f.dispatches, sqliteTable(inboxTable), sqliteTable(platoonTable)), create(ctx, f.queue, queueTable),
	); err != nil {
		return nil, err
	}
	f.batches = newBatcher(1, func(numbers []int) error { return f.store(ctx, numbers) })
	go forever("relay", f.stored, func() (int, error) { return f.carry(ctx) })
	go forever("consumer", f.sent, func() (int, error) { return f.dispatch(ctx) })
	return f, nil
}

// sqliteTable is the statement of a table of MySQL as SQLite takes it.
func sqliteTable(statement string) string {
	return strings.NewReplacer("BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY", "INTEGER PRIMARY KEY AUTOINCREMENT",
		" CHARACTER SET ascii COLLATE ascii_bin", "", "MEDIUMBLOB", "BLOB", "BINARY(32)", "BLOB", "DATETIME(6)", "DATETIME", " ENGINE=InnoDB", "").Replace(statement)
}

func (f *embeddedFloor) place(_ context.Context, number int) error { return f.batches.do(number) }

func (f *embeddedFloor) store(ctx context.Context, numbers []int) error {
	defer ring(f.stored)
	orders, announcements, err := rowsOf(numbers, time.Now().UTC())
	if err != nil {
		return err
	}
	return inTx(ctx, f.orders, func(tx *sql.Tx) error {
		return errors.Join(insert(ctx, tx, insertOrders, orders...), insert(ctx, tx, insertOutbox, announcements...))
	})
}

// carry moves rows from the outbox to the queue.
func (f *embeddedFloor) carry(ctx context.Context) (int, error) {
	last, rows, err := take(ctx, f.orders, "outbox")
	if err != nil || len(rows) == 0 {
		return 0, err
	}
	if err := insert(ctx, f.queue, "INSERT INTO message (uuid, payload) VALUES ", rows...); err != nil {
		return 0, err
	}
	ring(f.sent)
	_, err = f.orders.ExecContext(ctx, "DELETE FROM outbox WHERE id <= ?", last)
	return len(rows), err
}

func (f *embeddedFloor) dispatch(ctx context.Context) (int, error) {
	last, rows, err := take(ctx, f.queue, "message")
	if err != nil || len(rows) == 0 {
		return 0, err
	}
	var p pair
	for _, row := range rows {
		if err := p.add(row[1].([]byte)); err != nil {
			return 0, err
		}
	}
	if err := inTx(ctx, f.dispatches, func(tx *sql.Tx) error { return p.insert(ctx, tx) }); err != nil {
		return 0, err
	}
	_, err = f.queue.ExecContext(ctx, "DELETE FROM message WHERE id <= ?", last)
	return len(rows), err
}

// take reads the first rows of a table that is a queue. Rows appear in the order of their ids, for there is one writer.
func take(ctx context.Context, db *sql.DB, table string) (last int64, found [][]any, err error) {
	rows, err := db.QueryContext(ctx, "SELECT id, uuid, payload FROM "+table+" ORDER BY id LIMIT ?", floorBatch)
	if err != nil {
		return 0, nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var uuid string
		var payload []byte
		if err := rows.Scan(&last, &uuid, &payload); err != nil {
			return 0, nil, err
		}
		found = append(found, []any{uuid, payload})
	}
	return last, found, rows.Err()
}

func (f *embeddedFloor) addr() string { return "" }

// close leaves everything to the end of the process.
func (f *embeddedFloor) close() error { return nil }
