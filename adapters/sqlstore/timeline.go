package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"time"

	"takeout/app"
	"takeout/domain/order"
)

// chapter is what one table tells of an order. The query takes the order's id, by is the column that its rows are told by, and read
// returns the steps of one row.
type chapter struct {
	query, by string
	read      func(r scanner) ([]app.Step, error)
}

// mostTold is how many rows a chapter tells. Whoever sends messages decides how many there are about an order.
const mostTold = 1000

// messageChapters are of the tables that every service has.
var messageChapters = []chapter{
	{"SELECT handled_at, consumer, event_id FROM inbox WHERE order_id = ?", "handled_at", readHandled},
	{"SELECT created_at, event_key, event_id FROM outbox WHERE order_id = ?", "id", readEvent("in_outbox", "not yet confirmed by the broker")},
	{"SELECT DISTINCT created_at, event_key, event_id FROM outbox_confirmed WHERE order_id = ?", "created_at", readEvent("in_outbox", "")},
	{"SELECT confirmed_at, event_key, event_id FROM outbox_confirmed WHERE order_id = ?", "id", readEvent("confirmed", "")},
	{"SELECT at, step, detail FROM history WHERE order_id = ?", "id", readHistory},
	{"SELECT created_at, queue, uuid, tier, COALESCE(failure_id, 0), available_at, error_text FROM retry WHERE order_id = ?", "id", readRetry},
	{"SELECT id, first_failed_at, last_failed_at, closed_at, consumer, message_id, state, error_class, error_text, attempts, occurrences " +
		"FROM failure WHERE order_id = ?", "id", readFailure},
	{"SELECT a.at, a.operator, a.action, a.reason, f.id, f.consumer, f.message_id FROM failure f JOIN failure_action a ON a.failure_id = f.id " +
		"WHERE f.order_id = ?", "a.id", readAction},
}

// chapters are of the tables that only one service has.
var chapters = map[string][]chapter{
	"order": {
		{"SELECT " + orderColumns + " FROM order_info WHERE orderId = ?", "id", readOrder},
		{"SELECT first_seen, resolved_at, class, state, repair, repairs FROM finding WHERE orderId = ?", "id", readFinding},
	},
	"dispatch": {{"SELECT " + dispatchColumns + " FROM platoon WHERE orderId = ?", "id", readDispatch}},
	"payment":  {{"SELECT state, reference, reason, placed_at, decided_at, refunded_at FROM payment WHERE orderId = ?", "id", readPayment}},
	"points":   {{"SELECT at, kind, points FROM points_entry WHERE orderId = ?", "id", readEntry}},
}

// Steps implements app.StepSource. One snapshot is read: what is moved from one table to another in between would be
// told twice or not at all.
func (d *Database) Steps(ctx context.Context, id order.ID) ([]app.Step, error) {
	tx, err := d.db.Reader().BeginTx(ctx, &sql.TxOptions{Isolation: sql.LevelRepeatableRead, ReadOnly: true})
	if err != nil {
		return nil, d.db.Error(err)
	}
	defer func() { _ = tx.Rollback() }()
	var steps []app.Step
	for _, all := range [][]chapter{chapters[d.db.Name()], messageChapters} {
		for _, c := range all {
			told, err := c.tell(ctx, tx, id)
			if err != nil {
				return nil, d.db.Error(err)
			}
			steps = append(steps, told...)
		}
	}
	return steps, nil
}

func (c chapter) tell(ctx context.Context, tx *sql.Tx, id order.ID) ([]app.Step, error) {
	rows, err := collect(ctx, tx, c.read, c.query+" ORDER BY "+c.by+" DESC LIMIT ?", id.String(), mostTold+1)
	if err != nil {
		return nil, err
	}
	slices.Reverse(rows)
	if len(rows) > mostTold {
		newest := rows[0][0]
		rows[0] = []app.Step{{Name: app.LeftOut, At: newest.At, Detail: fmt.Sprintf("%s and all before it: the newest %d are told", newest.Name, mostTold)}}
	}
	steps := slices.Concat(rows...)
	for i := range steps {
		steps[i].At = steps[i].At.UTC()
	}
	return steps, nil
}

func readHandled(r scanner) ([]app.Step, error) {
	s := app.Step{Name: "handled"}
	err := r.Scan(&s.At, &s.Handler, &s.EventID)
	return []app.Step{s}, err
}

func readEvent(name, detail string) func(scanner) ([]app.Step, error) {
	return func(r scanner) ([]app.Step, error) {
		s := app.Step{Name: name, Detail: detail}
		err := r.Scan(&s.At, &s.Event, &s.EventID)
		return []app.Step{s}, err
	}
}

func readHistory(r scanner) ([]app.Step, error) {
	var s app.Step
	err := r.Scan(&s.At, &s.Name, &s.Detail)
	return []app.Step{s}, err
}

func readRetry(r scanner) ([]app.Step, error) {
	s := app.Step{Name: "retry_waits"}
	var (
		tier int
		due  int64
		text string
	)
	err := r.Scan(&s.At, &s.Handler, &s.EventID, &tier, &s.FailureID, &due, &text)
	s.Detail = fmt.Sprintf("due at %s, after delay %d: %s", clock(time.UnixMicro(due)), tier, text)
	if s.FailureID != 0 {
		s.Detail = fmt.Sprintf("due at %s, as a person asked: %s", clock(time.UnixMicro(due)), text)
	}
	return []app.Step{s}, err
}

func readFailure(r scanner) ([]app.Step, error) {
	s := app.Step{Name: "kept"}
	var (
		last                  time.Time
		closed                sql.NullTime
		state, class, text    string
		attempts, occurrences int
	)
	err := r.Scan(&s.FailureID, &s.At, &last, &closed, &s.Handler, &s.EventID, &state, &class, &text, &attempts, &occurrences)
	s.Detail = fmt.Sprintf("%s, %d attempts, now %s: %s", class, attempts, state, text)
	steps := []app.Step{s}
	if last.After(s.At) {
		again := s
		again.Name, again.At, again.Detail = "kept_again", last, fmt.Sprintf("%d times in all", occurrences)
		steps = append(steps, again)
	}
	if closed.Valid {
		end := s
		end.Name, end.At, end.Detail = "failure_closed", closed.Time, state
		steps = append(steps, end)
	}
	return steps, err
}

func readAction(r scanner) ([]app.Step, error) {
	s := app.Step{Name: "failure_action"}
	var operator, action, reason string
	err := r.Scan(&s.At, &operator, &action, &reason, &s.FailureID, &s.Handler, &s.EventID)
	s.Detail = action + " by " + operator
	if reason != "" {
		s.Detail += ": " + reason
	}
	return []app.Step{s}, err
}

func readOrder(r scanner) ([]app.Step, error) {
	stored, err := scanOrder(r)
	if err != nil {
		return nil, err
	}
	o := stored.Snapshot()
	steps := []app.Step{{Name: "placed", At: o.PlacedAt, Detail: fmt.Sprintf("%d %s", o.Money.Amount(), o.Money.Currency())}}
	if !o.AssignedAt.IsZero() {
		steps = append(steps, app.Step{Name: "dispatched", At: o.AssignedAt, Detail: "courier " + o.CourierID + ", as the order service knows"})
	}
	if !o.DeliveredAt.IsZero() {
		steps = append(steps, app.Step{Name: "delivered", At: o.DeliveredAt, Detail: "as the order service knows"})
	}
	if !o.CancelledAt.IsZero() {
		steps = append(steps, app.Step{Name: "cancelled", At: o.CancelledAt, Detail: o.CancelReason})
	}
	return steps, nil
}

func readFinding(r scanner) ([]app.Step, error) {
	s := app.Step{Name: "drift_found"}
	var (
		resolved             sql.NullTime
		class, state, repair string
		repairs              int
	)
	err := r.Scan(&s.At, &resolved, &class, &state, &repair, &repairs)
	s.Detail = class + ", now " + state
	if repairs > 0 {
		s.Detail += fmt.Sprintf("; repaired %d times: %s", repairs, repair)
	}
	steps := []app.Step{s}
	if resolved.Valid {
		steps = append(steps, app.Step{Name: "drift_resolved", At: resolved.Time, Detail: class})
	}
	return steps, err
}

// readDispatch tells the states of a dispatch. That it waits has no time of its own and is told with the placing.
func readDispatch(r scanner) ([]app.Step, error) {
	d, err := scanDispatch(r)
	if err != nil {
		return nil, err
	}
	var steps []app.Step
	if !d.AssignedAt.IsZero() {
		steps = append(steps, app.Step{Name: "dispatched", At: d.AssignedAt, Detail: "courier " + d.CourierID.String()})
	}
	switch {
	case !d.DeliveredAt.IsZero():
		steps = append(steps, app.Step{Name: "delivered", At: d.DeliveredAt})
	case !d.ReleasedAt.IsZero():
		steps = append(steps, app.Step{Name: d.State.String(), At: d.ReleasedAt})
	case d.AssignedAt.IsZero():
		steps = append(steps, app.Step{Name: d.State.String(), At: d.Job.PlacedAt, Detail: "for a courier, since the order was placed"})
	}
	return steps, nil
}

// readPayment tells the states of a payment. That it is being charged has no time of its own and is told with the
// placing.
func readPayment(r scanner) ([]app.Step, error) {
	var (
		state, reference, reason string
		placed                   time.Time
		decided, refunded        sql.NullTime
	)
	if err := r.Scan(&state, &reference, &reason, &placed, &decided, &refunded); err != nil {
		return nil, err
	}
	if !decided.Valid {
		return []app.Step{{Name: "charging", At: placed, Detail: "since the order was placed; the gateway has not said what became of it"}}, nil
	}
	first := app.Step{Name: "paid", At: decided.Time, Detail: reference}
	switch state {
	case "refused":
		first.Name, first.Detail = "payment_refused", reason
	case "void":
		first.Name, first.Detail = "payment_void", "nothing was charged"
	}
	if !refunded.Valid {
		return []app.Step{first}, nil
	}
	return []app.Step{first, {Name: "refunded", At: refunded.Time, Detail: reference}}, nil
}

func readEntry(r scanner) ([]app.Step, error) {
	var (
		s      app.Step
		kind   string
		points int64
	)
	err := r.Scan(&s.At, &kind, &points)
	s.Name, s.Detail = map[string]string{"award": "points_awarded", "revoke": "points_revoked"}[kind], fmt.Sprint(points)
	return []app.Step{s}, err
}

func clock(t time.Time) string { return t.UTC().Format(time.RFC3339) }
