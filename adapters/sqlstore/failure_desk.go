package sqlstore

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"takeout/adapters/sqldb"
	"takeout/app"
	"takeout/domain"
)

// retryChunk is how many failures one statement handles; retryPacket is how many bytes of messages, unless a single
// one has more.
const (
	retryChunk  = 200
	retryPacket = payloadPart
)

const failureColumns = "id, consumer, message_id, order_id, error_class, error_code, error_text, attempts, payload_size, state, " +
	"first_failed_at, last_failed_at, occurrences, closed_at, replaced_by"

// ListFailures implements app.FailureStore.
func (d *Database) ListFailures(ctx context.Context, filter app.FailureFilter, before int64, limit int) ([]app.KeptFailure, error) {
	where, args := failureWhere(filter)
	if before > 0 {
		where, args = where+" AND id < ?", append(args, before)
	}
	return d.failures(ctx, where+" ORDER BY id DESC LIMIT ?", append(args, limit)...)
}

// OldestFailures implements app.FailureStore.
func (d *Database) OldestFailures(ctx context.Context, filter app.FailureFilter, limit int) ([]app.KeptFailure, error) {
	where, args := failureWhere(filter)
	return readAll(ctx, d.db, func(row scanner) (f app.KeptFailure, err error) {
		err = row.Scan(&f.ID.Number, &f.PayloadSize)
		return f, err
	}, "SELECT id, payload_size FROM failure"+where+" ORDER BY id LIMIT ?", append(args, limit)...)
}

// CountFailures implements app.FailureStore.
func (d *Database) CountFailures(ctx context.Context, filter app.FailureFilter) (int, error) {
	where, args := failureWhere(filter)
	var n int
	err := d.db.Reader().QueryRowContext(ctx, "SELECT COUNT(*) FROM failure"+where, args...).Scan(&n)
	return n, d.db.Error(err)
}

// GroupFailures implements app.FailureStore.
func (d *Database) GroupFailures(ctx context.Context, filter app.FailureFilter, limit int) ([]app.FailureGroup, error) {
	where, args := failureWhere(filter)
	return readAll(ctx, d.db, func(row scanner) (g app.FailureGroup, err error) {
		var first, last moment
		err = row.Scan(&g.Handler, &g.Class, &g.Code, &g.Error, &g.Count, &first, &last, &g.Example.Number)
		g.First, g.Last = time.Time(first), time.Time(last)
		return g, err
	}, "SELECT consumer, error_class, error_code, error, COUNT(*), MIN(first_failed_at), MAX(last_failed_at), MAX(id) FROM ("+
		"SELECT id, consumer, error_class, error_code, first_failed_at, last_failed_at, "+
		"REPLACE(REPLACE(error_text, order_id, '<order>'), message_id, '<message>') AS error FROM failure"+where+") chosen "+
		"GROUP BY consumer, error_class, error_code, error ORDER BY COUNT(*) DESC, MAX(id) DESC LIMIT ?", append(args, limit)...)
}

// failureWhere makes the condition of a filter. The text is looked for with INSTR, which knows no wildcards.
func failureWhere(f app.FailureFilter) (string, []any) {
	where, args := " WHERE 1 = 1", []any{}
	and := func(condition string, values ...any) { where, args = where+" AND "+condition, append(args, values...) }
	for _, equal := range [][2]string{
		{"consumer", f.Handler}, {"error_class", f.Class}, {"error_code", f.Code}, {"order_id", f.OrderID}, {"state", f.State},
	} {
		if equal[1] != "" {
			and(equal[0]+" = ?", equal[1])
		}
	}
	if !f.Since.IsZero() {
		and("last_failed_at >= ?", f.Since.UTC())
	}
	if !f.Until.IsZero() {
		and("last_failed_at < ?", f.Until.UTC())
	}
	if f.Text != "" {
		and("(INSTR(LOWER(error_text), LOWER(?)) > 0 OR INSTR(message_id, ?) > 0 OR "+
			"EXISTS (SELECT 1 FROM failure_payload WHERE failure_id = failure.id AND INSTR(bytes, ?) > 0))", f.Text, f.Text, []byte(f.Text))
	}
	return where, args
}

// failures reads failureColumns of the rows that the condition names.
func (d *Database) failures(ctx context.Context, where string, args ...any) ([]app.KeptFailure, error) {
	return readAll(ctx, d.db, func(row scanner) (f app.KeptFailure, err error) {
		var closed sql.NullTime
		err = row.Scan(&f.ID.Number, &f.Consumer, &f.MessageID, &f.OrderID, &f.Class, &f.Code, &f.Error, &f.Attempts, &f.PayloadSize, &f.State,
			&f.FirstFailedAt, &f.LastFailedAt, &f.Occurrences, &closed, &f.ReplacedBy)
		f.FirstFailedAt, f.LastFailedAt, f.ClosedAt = f.FirstFailedAt.UTC(), f.LastFailedAt.UTC(), utc(closed)
		return f, scanned("failure", strconv.FormatInt(f.ID.Number, 10), err)
	}, "SELECT "+failureColumns+" FROM failure"+where, args...)
}

// moment is a time that comes out of an aggregate. SQLite does not know its type any more.
type moment time.Time

// Scan implements sql.Scanner.
func (m *moment) Scan(value any) error {
	switch v := value.(type) {
	case time.Time:
		*m = moment(v.UTC())
		return nil
	case string:
		t, err := time.Parse("2006-01-02 15:04:05.999999999-07:00", v)
		*m = moment(t.UTC())
		return err
	}
	return fmt.Errorf("%T is not a time", value)
}

// GetFailure implements app.FailureStore.
func (d *Database) GetFailure(ctx context.Context, number int64) (app.KeptFailure, error) {
	found, err := d.failures(ctx, " WHERE id = ?", number)
	if err != nil {
		return app.KeptFailure{}, err
	}
	if len(found) == 0 {
		return app.KeptFailure{}, domain.Errorf(domain.NotFound, "failure_not_found", "there is no such failure in the %s database", d.db.Name())
	}
	f := found[0]
	var headers []byte
	if err := d.db.Reader().QueryRowContext(ctx, "SELECT headers FROM failure WHERE id = ?", number).Scan(&headers); err != nil {
		return f, d.db.Error(err)
	}
	if err := json.Unmarshal(headers, &f.Headers); err != nil {
		return f, damaged("failure", strconv.FormatInt(number, 10), err)
	}
	f.Actions, err = readAll(ctx, d.db, func(row scanner) (a app.FailureAction, err error) {
		err = row.Scan(&a.At, &a.Operator, &a.Action, &a.Reason)
		a.At = a.At.UTC()
		return a, err
	}, "SELECT at, operator, action, reason FROM failure_action WHERE failure_id = ? ORDER BY id", number)
	return f, err
}

// FailurePayload implements app.FailureStore.
func (d *Database) FailurePayload(ctx context.Context, number, limit int64) ([]byte, error) {
	payload := make([]byte, 0, limit)
	for part := 0; int64(len(payload)) < limit; part++ {
		var bytes []byte
		err := d.db.Reader().QueryRowContext(ctx, "SELECT bytes FROM failure_payload WHERE failure_id = ? AND part = ?", number, part).Scan(&bytes)
		if errors.Is(err, sql.ErrNoRows) {
			break
		}
		if err != nil {
			return nil, d.db.Error(err)
		}
		payload = append(payload, bytes...)
	}
	return payload[:min(int64(len(payload)), limit)], nil
}

// RetryFailures implements app.FailureStore.
func (d *Database) RetryFailures(ctx context.Context, numbers []int64, retry app.FailureRetry) ([]int64, error) {
	var retried []int64
	ranBefore := false
	retry.At = now()
	err := d.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		retried = nil
		for chunk := range slices.Chunk(numbers, retryChunk) {
			if ranBefore {
				before, err := d.actedOn(ctx, tx, chunk, retry.FailureAction)
				if err != nil {
					return err
				}
				retried = append(retried, before...)
			}
			open, err := d.lockFailures(ctx, tx, chunk, app.FailureOpen)
			if err != nil {
				return err
			}
			delay := retry.Delay + retry.Spacing*time.Duration(len(retried))
			if err := d.retry(ctx, tx, open, retry, delay); err != nil {
				return err
			}
			for _, f := range open {
				retried = append(retried, f.number)
			}
		}
		ranBefore = true
		return nil
	})
	if err == nil && len(retried) > 0 {
		d.retryBell.Ring()
	}
	return retried, err
}

// actedOn returns those of the failures with which this very action was done before: an earlier run of the same call
// may have been committed although the answer to its COMMIT was lost.
func (d *Database) actedOn(ctx context.Context, tx *sql.Tx, numbers []int64, a app.FailureAction) ([]int64, error) {
	return collect(ctx, tx, scanOne[int64], "SELECT failure_id FROM failure_action WHERE at = ? AND operator = ? AND action = ? AND "+among("failure_id", len(numbers))+" ORDER BY failure_id",
		append([]any{a.At, a.Operator, a.Action}, values(numbers)...)...)
}

// lockedFailure is what is needed to send a failure's message again.
type lockedFailure struct {
	number                                int64
	consumer, messageID, orderID, problem string
	fingerprint                           []byte
	headers                               []byte
	size                                  int64
}

// lockFailures returns those of the failures that are in one of the states, in their order, and keeps others from
// changing them.
func (d *Database) lockFailures(ctx context.Context, tx *sql.Tx, numbers []int64, states ...string) ([]lockedFailure, error) {
	args := values(numbers)
	for _, state := range states {
		args = append(args, state)
	}
	return collect(ctx, tx, func(row scanner) (f lockedFailure, err error) {
		err = row.Scan(&f.number, &f.consumer, &f.messageID, &f.orderID, &f.problem, &f.fingerprint, &f.headers, &f.size)
		return f, err
	}, "SELECT id, consumer, message_id, order_id, error_text, fingerprint, headers, payload_size FROM failure "+
		"WHERE "+among("id", len(numbers))+" AND "+among("state", len(states))+" ORDER BY id"+d.db.ForUpdate, args...)
}

// retry sends the messages of open failures to their consumers, the first after delay.
func (d *Database) retry(ctx context.Context, tx *sql.Tx, open []lockedFailure, retry app.FailureRetry, delay time.Duration) error {
	for len(open) > 0 {
		n, size := 1, open[0].size
		for n < len(open) && size+open[n].size <= retryPacket {
			size, n = size+open[n].size, n+1
		}
		payloads, err := d.payloads(ctx, tx, open[:n])
		if err != nil {
			return err
		}
		rows := make([]retryRow, n)
		numbers := make([]int64, n)
		for i, f := range open[:n] {
			metadata, err := retryMetadata(f)
			if err != nil {
				return err
			}
			numbers[i] = f.number
			rows[i] = retryRow{
				queue: f.consumer, uuid: f.messageID, fingerprint: f.fingerprint, orderID: f.orderID, failureID: f.number, batch: retry.Batch,
				payload: payloads[f.number], metadata: metadata, problem: f.problem, delay: delay,
			}
			delay += retry.Spacing
		}
		_, err = tx.ExecContext(ctx, "UPDATE failure SET state = ?, closed_at = NULL WHERE "+among("id", n),
			append([]any{app.FailureRetrying}, values(numbers)...)...)
		if err != nil {
			return err
		}
		if err := d.addRetries(ctx, tx, retry.At, rows...); err != nil {
			return err
		}
		if err := addActions(ctx, tx, retry.FailureAction, numbers...); err != nil {
			return err
		}
		open = open[n:]
	}
	return nil
}

// payloads puts the messages together.
func (d *Database) payloads(ctx context.Context, tx *sql.Tx, failures []lockedFailure) (map[int64][]byte, error) {
	numbers := make([]any, len(failures))
	for i, f := range failures {
		numbers[i] = f.number
	}
	payloads := map[int64][]byte{}
	err := each(ctx, tx, "SELECT failure_id, bytes FROM failure_payload WHERE "+among("failure_id", len(numbers))+" ORDER BY failure_id, part", numbers,
		func(row scanner) error {
			var number int64
			var bytes []byte
			err := row.Scan(&number, &bytes)
			payloads[number] = append(payloads[number], bytes...)
			return err
		})
	return payloads, err
}

// retryMetadata is what the message came with. That its broker had given it up is left out, because its consumer would
// not try it then.
func retryMetadata(f lockedFailure) ([]byte, error) {
	var headers map[string]string
	if err := json.Unmarshal(f.headers, &headers); err != nil {
		return nil, damaged("failure", strconv.FormatInt(f.number, 10), err)
	}
	delete(headers, app.MetadataUndeliverable)
	return encodeMetadata(headers)
}

// encodeMetadata writes no metadata as an empty object, to which whoever reads it can add some.
func encodeMetadata(metadata map[string]string) ([]byte, error) {
	if metadata == nil {
		metadata = map[string]string{}
	}
	return json.Marshal(metadata)
}

// retryRow is a message in the retry table that a person asked for.
type retryRow struct {
	queue, uuid, orderID, batch, problem string
	fingerprint, payload, metadata       []byte
	failureID                            any // nil for a corrected message
	delay                                time.Duration
}

// addRetries puts messages into the retry table. One that is there already, because its last retry has failed and is
// not settled yet, gives way.
func (d *Database) addRetries(ctx context.Context, tx *sql.Tx, at time.Time, rows ...retryRow) error {
	args := make([]any, 0, 11*len(rows))
	for _, r := range rows {
		args = append(args, r.queue, r.uuid, r.fingerprint, r.orderID, r.failureID, r.batch, sqldb.NotNull(r.payload), r.metadata, r.problem, at, r.delay.Microseconds())
	}
	row := "(?, ?, ?, 0, ?, ?, ?, ?, ?, ?, ?, " + d.db.Now + " + ?)"
	_, err := tx.ExecContext(ctx, "REPLACE INTO retry (queue, uuid, fingerprint, tier, order_id, failure_id, batch, payload, metadata, error_text, "+
		"created_at, available_at) VALUES "+row+strings.Repeat(", "+row, len(rows)-1), args...)
	return err
}

// addActions records what somebody did with failures.
func addActions(ctx context.Context, tx *sql.Tx, a app.FailureAction, numbers ...int64) error {
	rows := make([][]any, len(numbers))
	for i, number := range numbers {
		rows[i] = []any{number, a.At, a.Operator, a.Action, a.Reason}
	}
	return insertRows(ctx, tx, "failure_action", "failure_id, at, operator, action, reason", rows)
}

// ReplaceFailure implements app.FailureStore.
func (d *Database) ReplaceFailure(ctx context.Context, number int64, by app.Correction, action app.FailureAction) (bool, error) {
	metadata, err := encodeMetadata(by.Metadata)
	if err != nil {
		return false, err
	}
	return d.closeFailure(ctx, number, action, app.FailureReplaced, by.EventID, func(ctx context.Context, tx *sql.Tx, f lockedFailure, at time.Time) error {
		return d.addRetries(ctx, tx, at, retryRow{
			queue: f.consumer, uuid: by.EventID, fingerprint: fingerprint(by.EventID, by.Payload, by.Metadata), orderID: by.OrderID,
			payload: by.Payload, metadata: metadata, problem: f.problem,
		})
	}, app.FailureOpen)
}

// DiscardFailure implements app.FailureStore.
func (d *Database) DiscardFailure(ctx context.Context, number int64, action app.FailureAction) (bool, error) {
	return d.closeFailure(ctx, number, action, app.FailureDiscarded, "", func(ctx context.Context, tx *sql.Tx, f lockedFailure, _ time.Time) error {
		_, err := tx.ExecContext(ctx, "DELETE FROM retry WHERE queue = ? AND fingerprint = ? AND tier = 0", f.consumer, f.fingerprint)
		return err
	}, app.FailureOpen, app.FailureRetrying)
}

// closeFailure closes a failure that is in one of the states, and does what belongs to it in the same transaction. It
// reports whether it did.
func (d *Database) closeFailure(ctx context.Context, number int64, action app.FailureAction, state, replacedBy string,
	also func(ctx context.Context, tx *sql.Tx, f lockedFailure, at time.Time) error, from ...string) (bool, error) {
	closed, ranBefore := false, false
	action.At = now()
	err := d.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		closed = false
		if ranBefore {
			before, err := d.actedOn(ctx, tx, []int64{number}, action)
			if closed = len(before) > 0; err != nil || closed {
				return err
			}
		}
		ranBefore = true
		found, err := d.lockFailures(ctx, tx, []int64{number}, from...)
		if err != nil || len(found) == 0 {
			return err
		}
		closed = true
		_, err = tx.ExecContext(ctx, "UPDATE failure SET state = ?, closed_at = ?, replaced_by = ? WHERE id = ?", state, action.At, replacedBy, number)
		if err != nil {
			return err
		}
		if err := also(ctx, tx, found[0], action.At); err != nil {
			return err
		}
		return addActions(ctx, tx, action, number)
	})
	if err == nil && closed {
		d.retryBell.Ring()
	}
	return closed, err
}
