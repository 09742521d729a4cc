package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"time"
)

// Retention says how long a database keeps what is only there to look back at.
type Retention struct {
	Dedup    time.Duration // which messages were handled, and what requests with an idempotency key were answered
	Failures time.Duration // failures, after they were closed
	History  time.Duration // which events were confirmed, what was repaired, what reconciliation found
}

const (
	// pruneBatch is the most rows that one statement deletes, so that nobody waits long for it.
	pruneBatch = 1000
	// inboxMargin is how much longer than the dedup horizon a message is remembered: whether it is too old is judged by the
	// time that it bears, of another machine's clock, and it must not be forgotten before.
	inboxMargin = 24 * time.Hour
	// shortestPause is the least time between two statements. A slow database is left alone for as long as it took.
	shortestPause = 20 * time.Millisecond
)

// aged is a table whose rows may go when they are old.
type aged struct {
	table, key string // and the columns of its primary key
	where      string // of the rows that may go; takes the time before which they may
	by         string // the indexed column that is compared with the time
	before     time.Time
}

func (d *Database) aged(keep Retention, now time.Time) []aged {
	answered, history := now.Add(-keep.Dedup), now.Add(-keep.History)
	all := []aged{
		{"inbox", "consumer, event_id", "handled_at < ?", "handled_at", answered.Add(-inboxMargin)},
		{"outbox_confirmed", "id", "confirmed_at < ?", "confirmed_at", history},
		{"history", "id", "at < ?", "at", history},
		{"reconcile_dirty", "id", "at < ?", "id", history},
	}
	if d.db.Name() == "order" {
		all = append(all,
			aged{"idempotency_answer", "request_key", "created_at < ?", "created_at", answered},
			aged{"finding", "id", "resolved_at < ? AND state = 'resolved'", "resolved_at", history},
			aged{"reconcile_report", "id", "started_at < ?", "started_at", history})
	}
	return all
}

// Prune deletes what is older than keep says, and returns how many rows of which table it deleted, also with an error. It
// never deletes orders, dispatches, payments, points, or a failure that is open. It is safe while everybody works, and
// in several processes at once: it deletes in small statements with pauses between them. What it could not delete is
// for the next time.
func (d *Database) Prune(ctx context.Context, keep Retention) (pruned map[string]int, err error) {
	// A process whose clock is far ahead must not make all others forget.
	clock, err := d.db.Clock(ctx)
	if err != nil {
		return nil, err
	}
	today := now()
	if clock.Before(today) {
		today = clock
	}
	pruned = map[string]int{}
	errs := []error{d.forgetMarks(ctx, today.Add(-keep.History))}
	for _, a := range d.aged(keep, today) {
		if a.table == "reconcile_dirty" && errs[0] != nil {
			continue
		}
		n, err := d.pruneTable(ctx, a)
		pruned[a.table] = n
		errs = append(errs, err)
	}
	n, err := d.pruneFailures(ctx, today.Add(-keep.Failures))
	pruned["failure"] = n
	return pruned, errors.Join(append(errs, err)...)
}

// forgetMarks lets everything be compared again if changes of which nobody has taken notice for that long are about to be
// forgotten: where nobody reconciles, notes of them would be kept for ever.
func (d *Database) forgetMarks(ctx context.Context, before time.Time) error {
	var one int
	err := d.db.Reader().QueryRowContext(ctx, "SELECT 1 FROM reconcile_dirty WHERE at < ? LIMIT 1", before).Scan(&one)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err == nil {
		_, err = d.db.Writer().ExecContext(ctx, "DELETE FROM reconcile_mark")
	}
	return d.db.Error(err)
}

// pruneTable looks before it locks: a DELETE that finds nothing waits for the handler that is inserting the next row.
func (d *Database) pruneTable(ctx context.Context, a aged) (total int, err error) {
	var one int
	err = d.db.Reader().QueryRowContext(ctx, "SELECT 1 FROM "+a.table+" WHERE "+a.where+" LIMIT 1", a.before).Scan(&one)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	if err != nil {
		return 0, d.db.Error(err)
	}
	statement := d.db.DeleteOldest(a.table, a.key, a.where, a.by)
	err = inBatches(ctx, func() (int, error) {
		var n int64
		err := d.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
			result, err := tx.ExecContext(ctx, statement, a.before, pruneBatch)
			if err != nil {
				return err
			}
			n, err = result.RowsAffected()
			return err
		})
		total += int(n)
		return int(n), err
	})
	return total, err
}

// pruneFailures deletes failures one by one, with all that belongs to them: there are few, and their payloads may be large.
func (d *Database) pruneFailures(ctx context.Context, before time.Time) (total int, err error) {
	err = inBatches(ctx, func() (int, error) {
		ids, err := d.closedFailures(ctx, before)
		if err != nil {
			return 0, err
		}
		for _, id := range ids {
			deleted, err := d.pruneFailure(ctx, id, before)
			if err != nil {
				return 0, err
			}
			if deleted {
				total++
			}
		}
		return len(ids), nil
	})
	return total, err
}

// isClosed is of failures that may be deleted once closed_at is long ago.
const isClosed = "closed_at < ? AND state NOT IN ('open', 'retrying')"

func (d *Database) closedFailures(ctx context.Context, before time.Time) ([]int64, error) {
	return readAll(ctx, d.db, scanOne[int64], "SELECT id FROM failure WHERE "+isClosed+" ORDER BY closed_at LIMIT ?", before, pruneBatch)
}

// pruneFailure deletes a failure, unless somebody opened or deleted it meanwhile.
func (d *Database) pruneFailure(ctx context.Context, id int64, before time.Time) (deleted bool, err error) {
	err = d.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		result, err := tx.ExecContext(ctx, "DELETE FROM failure WHERE id = ? AND "+isClosed, id, before)
		if err != nil {
			return err
		}
		n, err := result.RowsAffected()
		if deleted = n == 1; err != nil || !deleted {
			return err
		}
		if _, err := tx.ExecContext(ctx, "DELETE FROM failure_payload WHERE failure_id = ?", id); err != nil {
			return err
		}
		_, err = tx.ExecContext(ctx, "DELETE FROM failure_action WHERE failure_id = ?", id)
		return err
	})
	return deleted, err
}

// inBatches deletes until less than a batch was left, and leaves the database alone in between.
func inBatches(ctx context.Context, deleteBatch func() (int, error)) error {
	for {
		began := time.Now()
		n, err := deleteBatch()
		if err != nil || n < pruneBatch {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(max(time.Since(began), shortestPause)):
		}
	}
}
