package sqlstore

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"takeout/adapters/sqldb"
	"takeout/adapters/sqlqueue"
	"takeout/app"
	"takeout/domain/event"
)

const (
	// payloadPart is how much of a failed message goes into one row: well below the smallest packet that a server takes, which is
	// 1 MiB. Quotes, backslashes and zeros need twice their room in a statement.
	payloadPart = 256 << 10
	// retryLimit is how often a retry is taken without an end, as when it kills the process, before it is undeliverable.
	retryLimit = 50
	// retryWindow is the most retries of one consumer that are in flight.
	retryWindow = 200
)

// fingerprint tells whether two messages are the same one. With another signature it is another: one of them is forged, and must
// not take the place of the other.
func fingerprint(messageID string, payload []byte, headers map[string]string) []byte {
	sum := sha256.Sum256(append([]byte(messageID+"\x00"), payload...))
	if signature := headers[event.SignatureHeader]; signature != "" {
		// Without a zero byte, which every unsigned message has: nobody can make one with this fingerprint.
		sum = sha256.Sum256(fmt.Appendf(nil, "%x %x", sum, signature))
	}
	return sum[:]
}

// Delay implements app.Failures.
func (d *Database) Delay(ctx context.Context, f app.Failure, tier int, after time.Duration) error {
	headers, err := json.Marshal(f.Headers)
	if err != nil {
		return err
	}
	err = d.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		_, err := tx.ExecContext(ctx, "INSERT INTO retry (queue, uuid, fingerprint, tier, order_id, payload, metadata, "+
			"error_text, created_at, available_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, "+d.db.Now+" + ?)",
			f.Consumer, clip(f.MessageID, 255), fingerprint(f.MessageID, f.Payload, f.Headers), tier, f.OrderID, sqldb.NotNull(f.Payload), headers,
			clip(f.Error, 512), now(), after.Microseconds())
		if d.db.IsDuplicate(err) {
			return nil
		}
		if err != nil || f.OrderID == "" {
			return err
		}
		return history{tx}.Add(ctx, f.OrderID, "attempt_failed",
			fmt.Sprintf("%s: message %s failed, and is tried again in %s: %s", f.Consumer, f.MessageID, after, f.Error))
	})
	if err == nil {
		d.retryBell.RingIn(after, f.Consumer)
	}
	return err
}

// Retries returns a reader of the messages of the consumer that wait for their next attempt. Which retry a message is
// is in its context. drain is how long messages in flight may take when it closes.
func (d *Database) Retries(consumer string, drain time.Duration, logger *slog.Logger) *sqlqueue.Reader {
	return sqlqueue.NewReader(d.db, sqlqueue.Config{
		Table: "retry", Queue: consumer, Bell: &d.retryBell, Poll: sqlqueue.SlowPoll, Drain: drain, Window: retryWindow, DeliveryLimit: retryLimit,
		Columns: []string{"tier", "failure_id", "batch"}, Context: withRetry,
	}, logger.With("queue", consumer))
}

func withRetry(ctx context.Context, columns []string) context.Context {
	tier, _ := strconv.Atoi(columns[0])
	failureID, _ := strconv.ParseInt(columns[1], 10, 64) // empty if nobody asked for the retry
	return app.WithRetry(ctx, app.Retry{Tier: tier, FailureID: failureID, Batch: columns[2]})
}

// Keep implements app.Failures.
func (d *Database) Keep(ctx context.Context, f app.Failure) error {
	at := now()
	return d.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		err := d.keep(ctx, tx, f, at)
		if err == nil && f.Retry.Batch != "" {
			err = d.stopBatch(ctx, tx, f.Retry.Batch, at)
		}
		return err
	})
}

func (d *Database) keep(ctx context.Context, tx *sql.Tx, f app.Failure, at time.Time) error {
	if id := f.Retry.FailureID; id != 0 {
		if err := endRetry(ctx, tx, id); err != nil {
			return err
		}
		known, err := failedAgain(ctx, tx, f, at, "closed_at = CASE WHEN state IN ('discarded', 'replaced') THEN closed_at END, "+
			"state = CASE WHEN state IN ('discarded', 'replaced') THEN state ELSE 'open' END WHERE consumer = ? AND id = ?", id)
		if err != nil || known {
			return err
		}
	}
	const open = "closed_at = NULL, state = 'open' WHERE consumer = ? AND "
	if id, err := d.keptUnderOldFingerprint(ctx, tx, f); err != nil || id != 0 {
		if err == nil {
			_, err = failedAgain(ctx, tx, f, at, open+"id = ?", id)
		}
		return err
	}
	headers, err := json.Marshal(f.Headers)
	if err != nil {
		return err
	}
	print := fingerprint(f.MessageID, f.Payload, f.Headers)
	result, err := tx.ExecContext(ctx, "INSERT INTO failure (consumer, fingerprint, message_id, order_id, error_class, error_code, "+
		"error_text, attempts, headers, payload_size, state, first_failed_at, last_failed_at) "+
		"VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'open', ?, ?)",
		f.Consumer, print, clip(f.MessageID, 255), f.OrderID, f.Class, clip(f.Code, 64),
		clip(f.Error, 512), f.Attempts, headers, len(f.Payload), at, at)
	if d.db.IsDuplicate(err) {
		// Kept before, and delivered again because the ack was lost, or sent again by somebody.
		_, err = failedAgain(ctx, tx, f, at, open+"fingerprint = ?", print)
		return err
	}
	if err != nil {
		return err
	}
	id, err := result.LastInsertId()
	if err != nil {
		return err
	}
	return keepPayload(ctx, tx, id, f.Payload)
}

// keptUnderOldFingerprint returns the failure of this signed message from when the signature was not in the fingerprint yet, 0 if
// there is none.
func (d *Database) keptUnderOldFingerprint(ctx context.Context, tx *sql.Tx, f app.Failure) (id int64, err error) {
	signature := f.Headers[event.SignatureHeader]
	if signature == "" {
		return 0, nil
	}
	var headers []byte
	err = tx.QueryRowContext(ctx, "SELECT id, headers FROM failure WHERE consumer = ? AND fingerprint = ?"+d.db.ForUpdate,
		f.Consumer, fingerprint(f.MessageID, f.Payload, nil)).Scan(&id, &headers)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	var kept map[string]string
	if err != nil || json.Unmarshal(headers, &kept) != nil || kept[event.SignatureHeader] != signature {
		return 0, err
	}
	return id, nil
}

// failedAgain updates what is known of a failure of the consumer, and reports whether there is one. rest is the rest of
// the statement: what becomes of its state, and which failure it is.
func failedAgain(ctx context.Context, tx *sql.Tx, f app.Failure, at time.Time, rest string, which any) (bool, error) {
	result, err := tx.ExecContext(ctx, "UPDATE failure SET error_class = ?, error_code = ?, error_text = ?, attempts = attempts + ?, "+
		"occurrences = occurrences + 1, last_failed_at = ?, "+rest,
		f.Class, clip(f.Code, 64), clip(f.Error, 512), f.Attempts, at, f.Consumer, which)
	if err != nil {
		return false, err
	}
	n, err := result.RowsAffected()
	return n > 0, err
}

func keepPayload(ctx context.Context, tx *sql.Tx, failureID int64, payload []byte) error {
	for part, rest := 0, payload; part == 0 || len(rest) > 0; part++ {
		n := min(len(rest), payloadPart)
		_, err := tx.ExecContext(ctx, "INSERT INTO failure_payload (failure_id, part, bytes) VALUES (?, ?, ?)",
			failureID, part, sqldb.NotNull(rest[:n]))
		if err != nil {
			return err
		}
		rest = rest[n:]
	}
	return nil
}

// stopBatch takes back the retries of the batch that nobody has begun, and opens their failures again. Those that
// somebody is just taking have begun.
func (d *Database) stopBatch(ctx context.Context, tx *sql.Tx, batch string, at time.Time) error {
	retries, failures, err := d.waiting(ctx, tx, batch)
	if err != nil {
		return err
	}
	for ids := range slices.Chunk(retries, mostIDs) {
		if _, err := tx.ExecContext(ctx, d.db.DeleteByID("retry", len(ids)), values(ids)...); err != nil {
			return err
		}
	}
	stopped := app.FailureAction{At: at, Operator: "takeout", Action: "stopped", Reason: "another message of the batch was given up"}
	for ids := range slices.Chunk(failures, mostIDs) {
		opened := "state = CASE WHEN state = 'retrying' THEN 'open' ELSE state END"
		if _, err := tx.ExecContext(ctx, d.db.UpdateByID("failure", opened, len(ids)), values(ids)...); err != nil {
			return err
		}
		if err := addActions(ctx, tx, stopped, ids...); err != nil {
			return err
		}
	}
	return nil
}

// waiting returns the ids of the retries of the batch that wait, and of the failures that they retry.
func (d *Database) waiting(ctx context.Context, tx *sql.Tx, batch string) (retries, failures []int64, err error) {
	err = each(ctx, tx, "SELECT id, failure_id FROM retry WHERE batch = ? AND failure_id IS NOT NULL "+
		"AND (attempts = 0 OR available_at <= "+d.db.Now+") ORDER BY id"+d.db.ForUpdate+d.db.SkipLocked, []any{batch}, func(row scanner) error {
		var retry, failure int64
		err := row.Scan(&retry, &failure)
		retries, failures = append(retries, retry), append(failures, failure)
		return err
	})
	return retries, failures, err
}

// Resolve implements app.Failures.
func (d *Database) Resolve(ctx context.Context, failureID int64) error {
	at := now()
	return d.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		if err := endRetry(ctx, tx, failureID); err != nil {
			return err
		}
		result, err := tx.ExecContext(ctx, "UPDATE failure SET state = 'resolved', closed_at = ? WHERE id = ? AND state IN ('open', 'retrying')",
			at, failureID)
		if err != nil {
			return err
		}
		if n, err := result.RowsAffected(); err != nil || n == 0 {
			return err
		}
		return addActions(ctx, tx, app.FailureAction{At: at, Operator: "takeout", Action: "handled", Reason: "its retry was handled"}, failureID)
	})
}

// endRetry deletes the retry that somebody asked for. The ack would do so too, but later: a failure that is not being
// retried has no retry, so that the next one can be asked for at once.
func endRetry(ctx context.Context, tx *sql.Tx, failureID int64) error {
	_, err := tx.ExecContext(ctx, "DELETE FROM retry WHERE failure_id = ?", failureID)
	return err
}

// Unhandled returns how many messages wait for their next attempt, and how many for a person, counting each no further
// than limit.
func (d *Database) Unhandled(ctx context.Context, limit int) (waiting, open int, err error) {
	err = d.db.Reader().QueryRowContext(ctx, "SELECT (SELECT COUNT(*) FROM (SELECT 1 FROM retry LIMIT ?) waiting), "+
		"(SELECT COUNT(*) FROM (SELECT 1 FROM failure WHERE state = 'open' LIMIT ?) opened)", limit, limit).Scan(&waiting, &open)
	return waiting, open, d.db.Error(err)
}

// clip cuts text to what its column holds, and makes it valid for it.
func clip(s string, limit int) string {
	s = strings.ToValidUTF8(s, "�")
	if utf8.RuneCountInString(s) > limit {
		s = string([]rune(s)[:limit])
	}
	return s
}
