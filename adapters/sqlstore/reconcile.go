package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"iter"
	"slices"
	"strings"
	"time"

	"takeout/adapters/sqldb"
	"takeout/app/reconcile"
	"takeout/domain/event"
)

// Book is one service's database as reconciliation sees it. It implements reconcile.Book.
type Book struct {
	db    *sqldb.DB
	table table
}

// table is what reconciliation knows of the table that a service keeps its orders in.
type table struct {
	name    string
	record  string   // SELECT list of reconcile.Record, after orderId
	changed []string // columns of the times at which something happened to the order
	lines   map[reconcile.Pair]func(d sqldb.Dialect) line
	watched []string // columns whose change is noted
	// newest has, by the key of an event, the queries behind Book.Newest: the placed_at of the newest row that this event
	// left, or that one left which more orders have, and earlier, so that its queue cannot be ahead of this one's.
	newest map[string][]string
}

// line says which rows make lines, and of what. The parts must be the same on both sides of a pair.
type line struct {
	parts []string
	where string
	group bool // several rows make one line
}

var tablesOf = map[string]table{
	"order": {
		name:    "order_info",
		record:  "status, name, order_money, currency, COALESCE(courier_id, ''), points, version, placed_at",
		changed: []string{"assigned_at", "delivered_at", "cancelled_at"},
		watched: []string{"orderId", "name", "order_money", "currency", "status", "courier_id", "points", "placed_at"},
		newest: map[string][]string{
			event.DispatchAssigned{}.Key():   dispatched,
			event.DispatchDelivered{}.Key():  append([]string{newestIn("order_info", "status = 'delivered'", "id")}, dispatched...),
			event.DispatchImpossible{}.Key(): dispatched,
			event.PaymentRefused{}.Key():     dispatched,
			event.PointsAwarded{}.Key():      {newestAmong("order_info", "placed_at", "points", "points > 0")},
		},
		lines: map[reconcile.Pair]func(sqldb.Dialect) line{
			reconcile.OrderDispatch: func(d sqldb.Dialect) line {
				return line{parts: []string{"orderId", "order_money", "currency",
					"CASE status WHEN 'placed' THEN 'waiting' WHEN 'dispatched' THEN 'assigned' WHEN 'cancelled' THEN 'ended' ELSE status END",
					"CASE WHEN status IN ('dispatched', 'delivered') THEN COALESCE(courier_id, '') ELSE '' END", "name", d.Micros("placed_at")}}
			},
			reconcile.OrderPayment: func(sqldb.Dialect) line {
				return line{parts: []string{"orderId", "order_money", "currency", "CASE status WHEN 'cancelled' THEN 'unpaid' ELSE 'paid' END"}}
			},
			reconcile.PointsOrder: func(sqldb.Dialect) line {
				return line{parts: []string{"orderId", "points"}, where: " AND points <> 0"}
			},
		},
	},
	"dispatch": {
		name:    "platoon",
		record:  "state, name, order_money, currency, COALESCE(takeout_userId, ''), 0, order_version, placed_at",
		changed: []string{"assigned_at", "delivered_at", "released_at"},
		watched: []string{"orderId", "name", "order_money", "currency", "state", "takeout_userId", "placed_at"},
		newest: map[string][]string{
			event.OrderPlaced{}.Key():    assigned,
			event.OrderCancelled{}.Key(): append([]string{newestIn("platoon", "state = 'released'", "placed_at")}, assigned...),
		},
		lines: map[reconcile.Pair]func(sqldb.Dialect) line{
			reconcile.OrderDispatch: func(d sqldb.Dialect) line {
				return line{parts: []string{"orderId", "order_money", "currency",
					"CASE WHEN state IN ('released', 'impossible') THEN 'ended' ELSE state END",
					"CASE WHEN state IN ('assigned', 'delivered') THEN COALESCE(takeout_userId, '') ELSE '' END", "name", d.Micros("placed_at")}}
			},
		},
	},
	"payment": {
		name:    "payment",
		record:  "state, name, order_money, currency, '', 0, order_version, placed_at",
		changed: []string{"decided_at", "refunded_at"},
		watched: []string{"orderId", "order_money", "currency", "state", "placed_at"},
		newest: map[string][]string{
			event.OrderPlaced{}.Key():    {newestAmong("payment", "placed_at", "state", "state IN ('succeeded', 'refused')")},
			event.OrderCancelled{}.Key(): {newestAmong("payment", "placed_at", "state", "state <> 'charging'")},
		},
		lines: map[reconcile.Pair]func(sqldb.Dialect) line{
			reconcile.OrderPayment: func(sqldb.Dialect) line {
				return line{parts: []string{"orderId", "order_money", "currency",
					"CASE WHEN state = 'succeeded' THEN 'paid' WHEN state = 'charging' THEN state ELSE 'unpaid' END"}}
			},
			reconcile.PaymentPoints: func(d sqldb.Dialect) line {
				return line{parts: []string{"orderId", d.Divide("order_money", "100")}, where: " AND state = 'succeeded' AND order_money >= 100"}
			},
		},
	},
	"points": {
		name:    "points_entry",
		record:  "kind, '', 0, '', '', points, 0, placed_at",
		changed: []string{"at"},
		watched: []string{"orderId", "kind", "points", "placed_at"},
		newest: map[string][]string{
			// What was taken back before it was awarded is entered as an award of nothing.
			event.PaymentSucceeded{}.Key(): {newestAmong("points_entry", "placed_at", "kind, points", "kind = 'award' AND points > 0")},
			event.PaymentRefunded{}.Key():  {newestAmong("points_entry", "placed_at", "kind, points", "kind = 'revoke' OR points > 0")},
		},
		lines: map[reconcile.Pair]func(sqldb.Dialect) line{
			reconcile.PaymentPoints: earned,
			reconcile.PointsOrder:   earned,
		},
	},
}

// dispatched select orders whose courier was heard of. One whose delivery was heard of first has the version 2.
var dispatched = []string{
	newestIn("order_info", "status = 'dispatched'", "id"),
	newestAmong("order_info WHERE status = 'delivered'", "id", "version", "version > 2"),
}

// assigned select dispatches that an order made, and not its cancellation.
var assigned = []string{
	newestIn("platoon", "state = 'waiting'", "placed_at"), newestIn("platoon", "state = 'assigned'", "placed_at"),
	newestIn("platoon", "state = 'delivered'", "placed_at"), newestIn("platoon", "state = 'impossible'", "placed_at"),
}

// earned are the lines of what orders earned.
func earned(sqldb.Dialect) line {
	return line{parts: []string{"orderId", "SUM(points)"}, group: true}
}

// NewBook returns the book of the service that the database is named after.
func NewBook(db *sqldb.DB) *Book { return &Book{db, tablesOf[db.Name()]} }

// linesOf is a SELECT of the pair's lines between two times, which are its arguments.
func (b *Book) linesOf(pair reconcile.Pair) string {
	l := b.table.lines[pair](b.db.Dialect)
	minute, digest, group := b.db.Minute("placed_at"), b.db.Digest(l.parts...), ""
	if l.group {
		minute, group = "MIN("+minute+")", " GROUP BY orderId HAVING SUM(points) <> 0"
	}
	return "SELECT orderId, " + minute + " AS minute, " + digest + " AS digest FROM " + b.table.name +
		" WHERE placed_at >= ? AND placed_at < ?" + l.where + group
}

// Digests implements reconcile.Book.
func (b *Book) Digests(ctx context.Context, pair reconcile.Pair, from, to time.Time) (map[int64]reconcile.Digest, error) {
	digests := map[int64]reconcile.Digest{}
	err := each(ctx, b.db.Reader(), "SELECT minute, COUNT(*), SUM(digest) FROM ("+b.linesOf(pair)+") lines_of_pair GROUP BY minute", []any{from, to},
		func(row scanner) error {
			var minute int64
			var d reconcile.Digest
			err := row.Scan(&minute, &d.Rows, &d.Sum)
			digests[minute] = d
			return err
		})
	return digests, b.db.Error(err)
}

// Lines implements reconcile.Book.
func (b *Book) Lines(ctx context.Context, pair reconcile.Pair, from, to time.Time) iter.Seq2[reconcile.Line, error] {
	return func(yield func(reconcile.Line, error) bool) {
		rows, err := b.db.Reader().QueryContext(ctx, b.linesOf(pair)+" ORDER BY orderId, digest", from, to)
		if err != nil {
			yield(reconcile.Line{}, b.db.Error(err))
			return
		}
		defer rows.Close()
		for rows.Next() {
			var l reconcile.Line
			if err := rows.Scan(&l.OrderID, &l.Minute, &l.Digest); err != nil {
				yield(l, err)
				return
			}
			if !yield(l, nil) {
				return
			}
		}
		if err := rows.Err(); err != nil {
			yield(reconcile.Line{}, b.db.Error(err))
		}
	}
}

// Cut implements reconcile.Book.
func (b *Book) Cut(ctx context.Context, from, to time.Time, rows int) (time.Time, error) {
	var cut time.Time
	err := b.db.Reader().QueryRowContext(ctx, "SELECT placed_at FROM "+b.table.name+
		" WHERE placed_at >= ? AND placed_at < ? ORDER BY placed_at LIMIT 1 OFFSET ?", from, to, rows).Scan(&cut)
	if errors.Is(err, sql.ErrNoRows) {
		return to, nil
	}
	if err != nil {
		return to, b.db.Error(b.unreadable(ctx, err))
	}
	if cut = cut.UTC().Truncate(time.Minute).Add(time.Minute); cut.After(to) {
		return to, nil
	}
	return cut, nil
}

// Records implements reconcile.Book.
func (b *Book) Records(ctx context.Context, orderIDs []string) (map[string][]reconcile.Record, error) {
	records := map[string][]reconcile.Record{}
	err := each(ctx, b.db.Reader(), "SELECT orderId, "+b.table.record+", "+strings.Join(b.table.changed, ", ")+
		" FROM "+b.table.name+" WHERE "+among("orderId", len(orderIDs))+" ORDER BY id", values(orderIDs), func(row scanner) error {
		var id string
		var r reconcile.Record
		times := make([]sql.NullTime, len(b.table.changed))
		into := []any{&id, &r.State, &r.Name, &r.Amount, &r.Currency, &r.CourierID, &r.Points, &r.Version, &r.PlacedAt}
		for i := range times {
			into = append(into, &times[i])
		}
		if err := row.Scan(into...); err != nil {
			return scanned(b.table.name, id, err)
		}
		r.PlacedAt = r.PlacedAt.UTC()
		r.ChangedAt = r.PlacedAt
		for _, t := range times {
			if at := utc(t); at.After(r.ChangedAt) {
				r.ChangedAt = at
			}
		}
		records[id] = append(records[id], r)
		return nil
	})
	return records, b.db.Error(err)
}

// Flights implements reconcile.Book.
func (b *Book) Flights(ctx context.Context, orderIDs []string) (map[string]reconcile.Flight, error) {
	about, ids := among("order_id", len(orderIDs)), values(orderIDs)
	all := slices.Concat(ids, ids, ids)
	flights := map[string]reconcile.Flight{}
	err := each(ctx, b.db.Reader(), "SELECT order_id, NULL FROM outbox WHERE "+about+
		" UNION ALL SELECT order_id, NULL FROM retry WHERE "+about+
		" UNION ALL SELECT order_id, consumer FROM failure WHERE "+about+" AND state IN ('open', 'retrying')", all, func(row scanner) error {
		var id string
		var failed sql.NullString
		err := row.Scan(&id, &failed)
		f := flights[id]
		if failed.Valid {
			f.Failures = append(f.Failures, failed.String)
		} else {
			f.Events = true
		}
		flights[id] = f
		return err
	})
	return flights, b.db.Error(err)
}

// Stuck implements reconcile.Book.
func (b *Book) Stuck(ctx context.Context, before time.Time, limit int) ([]reconcile.Stuck, error) {
	// The oldest event is the one with the lowest id, or nearly.
	events, err := readAll(ctx, b.db, func(row scanner) (s reconcile.Stuck, err error) {
		err = row.Scan(&s.OrderID, &s.Since)
		s.Since = s.Since.UTC()
		return s, scanned("outbox", s.OrderID, err)
	}, "SELECT order_id, created_at FROM "+
		"(SELECT order_id, created_at FROM outbox ORDER BY id LIMIT ?) oldest WHERE created_at < ? AND order_id <> ''", limit, before)
	if err != nil {
		return nil, err
	}
	retries, err := readAll(ctx, b.db, func(row scanner) (reconcile.Stuck, error) {
		s := reconcile.Stuck{Retry: true}
		var micros int64
		err := row.Scan(&s.OrderID, &micros)
		s.Since = time.UnixMicro(micros).UTC()
		return s, err
	}, "SELECT order_id, available_at FROM retry WHERE available_at < ? AND order_id <> '' "+
		"ORDER BY available_at LIMIT ?", before.UnixMicro(), limit)
	return append(events, retries...), err
}

// Newest implements reconcile.Book.
func (b *Book) Newest(ctx context.Context, key string) (time.Time, error) {
	var newest time.Time
	for _, query := range b.table.newest[key] {
		at, err := b.time(ctx, query)
		if err != nil {
			return newest, b.unreadable(ctx, err)
		}
		if at.After(newest) {
			newest = at
		}
	}
	return newest, nil
}

// unreadable is scanned where only the placed_at of rows was asked for, which an index has.
func (b *Book) unreadable(ctx context.Context, err error) error {
	if !isDamaged(scanned(b.table.name, "", err)) {
		return err
	}
	var id string
	_ = b.db.Reader().QueryRowContext(ctx, "SELECT orderId FROM "+b.table.name+" WHERE "+b.db.Micros("placed_at")+" = 0 LIMIT 1").Scan(&id)
	return scanned(b.table.name, id, err)
}

// newestIn selects when the newest row for which the condition holds was placed. An index has both.
func newestIn(table, condition, by string) string {
	return "SELECT placed_at FROM " + table + " WHERE " + condition + " ORDER BY " + by + " DESC LIMIT 1"
}

// newestAmong selects when the newest of those rows was placed for which a condition on further columns holds, that no
// index has. If it holds for none of the newest ten thousand, there is no saying.
func newestAmong(rows, by, columns, condition string) string {
	return "SELECT newest_placed_at FROM (SELECT " + by + " AS newest_by, placed_at AS newest_placed_at, " + columns + " FROM " + rows +
		" ORDER BY " + by + " DESC LIMIT 10000) newest WHERE " + condition + " ORDER BY newest_by DESC LIMIT 1"
}

// Created implements reconcile.Book.
func (b *Book) Created(ctx context.Context) (time.Time, error) {
	return b.time(ctx, "SELECT created_at FROM owner")
}

// Clock implements reconcile.Book.
func (b *Book) Clock(ctx context.Context) (time.Time, error) { return b.db.Clock(ctx) }

func (b *Book) time(ctx context.Context, query string) (time.Time, error) {
	var at time.Time
	err := b.db.Reader().QueryRowContext(ctx, query).Scan(&at)
	if errors.Is(err, sql.ErrNoRows) {
		return time.Time{}, nil
	}
	return at.UTC(), b.db.Error(err)
}

// Dirty implements reconcile.Book.
func (b *Book) Dirty(ctx context.Context, limit int) ([]reconcile.Dirty, error) {
	return readAll(ctx, b.db, func(row scanner) (n reconcile.Dirty, err error) {
		err = row.Scan(&n.ID, &n.Minute)
		return n, err
	}, "SELECT id, minute FROM reconcile_dirty ORDER BY id LIMIT ?", limit)
}

// Clean implements reconcile.Book. It deletes those notes and no range of them: one with a lower number may be committed
// later.
func (b *Book) Clean(ctx context.Context, notes []reconcile.Dirty) error {
	for some := range slices.Chunk(notes, mostIDs) {
		ids := make([]any, len(some))
		for i, n := range some {
			ids[i] = n.ID
		}
		if _, err := b.db.Writer().ExecContext(ctx, b.db.DeleteByID("reconcile_dirty", len(ids)), ids...); err != nil {
			return b.db.WriteError(ctx, err)
		}
	}
	return nil
}

// MarkDirty implements reconcile.Book.
func (b *Book) MarkDirty(ctx context.Context, minutes []int64) error {
	at, rows := now(), make([][]any, len(minutes))
	for i, minute := range minutes {
		rows[i] = []any{minute, at}
	}
	return b.db.WriteError(ctx, insertRows(ctx, b.db.Writer(), "reconcile_dirty", "minute, at", rows))
}

// Mark implements reconcile.Book.
func (b *Book) Mark(ctx context.Context, pair reconcile.Pair) (reconcile.Mark, error) {
	var m reconcile.Mark
	err := b.db.Reader().QueryRowContext(ctx, "SELECT minute, pass FROM reconcile_mark WHERE pair = ?", string(pair)).Scan(&m.Minute, &m.Pass)
	if errors.Is(err, sql.ErrNoRows) {
		return m, nil
	}
	return m, b.db.Error(err)
}

// SetMark implements reconcile.Book.
func (b *Book) SetMark(ctx context.Context, pair reconcile.Pair, m reconcile.Mark) error {
	return b.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		result, err := tx.ExecContext(ctx, "UPDATE reconcile_mark SET minute = ?, pass = ? WHERE pair = ?", m.Minute, m.Pass, string(pair))
		if err != nil {
			return err
		}
		if n, err := result.RowsAffected(); err != nil || n == 1 {
			return err
		}
		_, err = tx.ExecContext(ctx, "INSERT INTO reconcile_mark (pair, minute, pass) VALUES (?, ?, ?)", string(pair), m.Minute, m.Pass)
		return err
	})
}
