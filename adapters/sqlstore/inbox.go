package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"
	"time"

	"takeout/adapters/sqldb"
	"takeout/app"
	"takeout/domain"
)

const inboxColumns = "consumer, event_id, body_hash, handled_at, order_id"

// inboxValues are the values of inboxColumns.
func inboxValues(d app.Delivery, at time.Time) []any {
	return []any{d.Consumer, d.EventID, d.Hash[:], at, d.OrderID}
}

// record writes the inbox rows of the deliveries.
func record(ctx context.Context, db *sqldb.DB, tx *sql.Tx, delivered []app.Delivery) error {
	switch len(delivered) {
	case 0:
		return nil
	case 1:
		return recordDelivery(ctx, db, tx, delivered[0])
	}
	at := now()
	rows := make([][]any, len(delivered))
	for i, d := range slices.SortedFunc(slices.Values(delivered), func(a, b app.Delivery) int { return strings.Compare(a.EventID, b.EventID) }) {
		rows[i] = inboxValues(d, at)
	}
	err := insertRows(ctx, tx, "inbox", inboxColumns, rows)
	if db.IsDuplicate(err) {
		return errRecorded
	}
	return err
}

// errRecorded says that the inbox has some of several deliveries.
var errRecorded = fmt.Errorf("one of the messages: %w", app.ErrDuplicate)

// recordDelivery writes the inbox row of the delivery. The insert waits for a transaction that handles the same
// message at this moment, and then finds what it did.
func recordDelivery(ctx context.Context, db *sqldb.DB, tx *sql.Tx, d app.Delivery) error {
	_, err := tx.ExecContext(ctx, sqldb.Insert("inbox", inboxColumns, 1), inboxValues(d, now())...)
	if !db.IsDuplicate(err) {
		return err
	}
	var hash []byte
	err = tx.QueryRowContext(ctx, "SELECT body_hash FROM inbox WHERE consumer = ? AND event_id = ?"+db.ForShare,
		d.Consumer, d.EventID).Scan(&hash)
	if err != nil {
		return err
	}
	return before(d, string(hash))
}

// recorded returns app.Recorded of those deliveries that the inbox has, or errRecorded if it has none.
func recorded(ctx context.Context, db *sqldb.DB, delivered []app.Delivery) error {
	answers := make(app.Recorded)
	for some := range slices.Chunk(delivered, mostRows) {
		args := []any{some[0].Consumer}
		for _, d := range some {
			args = append(args, d.EventID)
		}
		hashes := make(map[string]string, len(some))
		err := each(ctx, db.Reader(), "SELECT event_id, body_hash FROM inbox WHERE consumer = ? AND "+among("event_id", len(some)), args, func(row scanner) error {
			var id string
			var hash []byte
			err := row.Scan(&id, &hash)
			hashes[id] = string(hash)
			return err
		})
		if err != nil {
			return err
		}
		for _, d := range some {
			if hash, has := hashes[d.EventID]; has {
				answers[d] = before(d, hash)
			}
		}
	}
	if len(answers) == 0 {
		return errRecorded
	}
	return answers
}

// before is the answer to a delivery that is in the inbox with that hash.
func before(d app.Delivery, hash string) error {
	if hash != string(d.Hash[:]) {
		return domain.Errorf(domain.Invalid, "event_id_reused",
			"event %s was handled before with another body", d.EventID)
	}
	return app.ErrDuplicate
}
