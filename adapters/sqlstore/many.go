package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"

	"takeout/adapters/sqldb"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/order"
	"takeout/domain/payment"
	"takeout/domain/points"
)

// mostRows is how many rows one statement writes or asks for. Rows of business tables are below 1 kB, and servers take
// packets of 1 MB at least.
const mostRows = 200

// insertRows inserts the rows with as few statements as may be. Locks are taken in the order of the rows.
func insertRows(ctx context.Context, q querier, table, columns string, rows [][]any) error {
	for some := range slices.Chunk(rows, mostRows) {
		if _, err := q.ExecContext(ctx, sqldb.Insert(table, columns, len(some)), slices.Concat(some...)...); err != nil {
			return err
		}
	}
	return nil
}

// insertByOrder inserts a row for each of all. Whoever does so takes locks in the order of the orders' ids, so that two who
// do it at once do not wait for each other in a circle.
func insertByOrder[T any](ctx context.Context, q querier, table, columns string, all []T, id func(T) order.ID, values func(T) []any) error {
	rows := make([][]any, len(all))
	for i, one := range slices.SortedFunc(slices.Values(all), func(a, b T) int { return compareOrders(id(a), id(b)) }) {
		rows[i] = values(one)
	}
	return insertRows(ctx, q, table, columns, rows)
}

// among is the condition that a column has one of n values.
func among(column string, n int) string {
	return column + " IN (?" + strings.Repeat(", ?", n-1) + ")"
}

func compareOrders(a, b order.ID) int { return strings.Compare(a.String(), b.String()) }

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

func (r orders) GetMany(ctx context.Context, ids []order.ID) ([]*order.Order, error) {
	var found []*order.Order
	for some := range slices.Chunk(ids, mostRows) {
		stored, err := collect(ctx, r.q, func(row scanner) (*order.Order, error) { return scanOrder(row) },
			"SELECT "+orderColumns+" FROM order_info WHERE "+among("orderId", len(some)), texts(some)...)
		if err != nil {
			return nil, err
		}
		found = append(found, stored...)
	}
	return found, nil
}

func (r orders) UpdateMany(ctx context.Context, ids []order.ID, change func(*order.Order) (bool, error)) error {
	return changing[*order.Order]{
		table: "order_info", columns: orderColumns, index: "order_info_orderId", scan: scanOrder,
		changeable: changeableColumns, values: func(o *order.Order) []any { return changeable(o.Snapshot()) },
	}.update(ctx, r.q, r.db, ids, change)
}

// changing is how rows of a table are changed, many with two statements.
type changing[T any] struct {
	table, columns, index string // of the order's id
	scan                  func(row scanner, before ...any) (T, error)
	changeable            []string
	values                func(T) []any // of the changeable
}

// update locks the rows of the orders, in the order of their ids, and stores those that change reports to have changed.
func (c changing[T]) update(ctx context.Context, q querier, db *sqldb.DB, ids []order.ID, change func(T) (bool, error)) error {
	for some := range slices.Chunk(slices.SortedFunc(slices.Values(ids), compareOrders), mostRows) {
		if err := c.updateSome(ctx, q, db, some, change); err != nil {
			return err
		}
	}
	return nil
}

func (c changing[T]) updateSome(ctx context.Context, q querier, db *sqldb.DB, ids []order.ID, change func(T) (bool, error)) error {
	var rows []int64
	var found []T
	err := each(ctx, q, "SELECT id, "+c.columns+" FROM "+c.table+db.Force(c.index)+" WHERE "+among("orderId", len(ids))+
		" ORDER BY orderId"+db.ForUpdate, texts(ids), func(row scanner) error {
		var id int64
		one, err := c.scan(row, &id)
		rows, found = append(rows, id), append(found, one)
		return err
	})
	if err != nil {
		return err
	}
	if len(found) < len(ids) {
		return domain.Errorf(domain.NotFound, "order_not_found", "%d of %d orders are not in %s", len(ids)-len(found), len(ids), c.table)
	}
	var values []any
	changes := 0
	for i, one := range found {
		changed, err := change(one)
		if err != nil {
			return err
		}
		if changed {
			changes++
			values = append(append(values, rows[i]), c.values(one)...)
		}
	}
	if changes == 0 {
		return nil
	}
	_, err = q.ExecContext(ctx, db.UpdateRows(c.table, c.changeable, changes), values...)
	return err
}

// texts are ids as arguments.
func texts[T interface{ String() string }](ids []T) []any {
	all := make([]any, len(ids))
	for i, id := range ids {
		all[i] = id.String()
	}
	return all
}

func (r dispatches) AddMany(ctx context.Context, all []dispatch.Dispatch) error {
	err := insertByOrder(ctx, r.q, "platoon", dispatchColumns, all, func(d dispatch.Dispatch) order.ID { return d.Job.OrderID }, dispatchValues)
	if r.db.IsDuplicate(err) {
		return domain.Errorf(domain.Conflict, "dispatched_before", "one of %d orders has a dispatch", len(all))
	}
	return err
}

// TakeAll takes those without a limit first, and both kinds in the order of their ids, so that two who do so at once do not
// end in a deadlock.
func (r couriers) TakeAll(ctx context.Context, orders int) ([]dispatch.CourierID, error) {
	free, err := r.candidates(ctx)
	if err != nil {
		return nil, err
	}
	taken := spread(free, orders)
	if len(taken) < orders {
		return nil, errNoCourier
	}
	count := map[dispatch.CourierID]int{}
	for _, id := range taken {
		count[id]++
	}
	var limited, unlimited []dispatch.CourierID
	for _, c := range free {
		switch {
		case count[c.ID()] == 0:
		case c.Capacity() > 0:
			limited = append(limited, c.ID())
		default:
			unlimited = append(unlimited, c.ID())
		}
	}
	kept, err := r.keep(ctx, unlimited)
	if err != nil {
		return nil, err
	}
	counted, err := r.count(ctx, limited, count)
	if err != nil {
		return nil, err
	}
	if !kept || !counted { // they were taken, or went off duty, since they were read
		return nil, errNoCourier
	}
	return taken, nil
}

// keep keeps couriers without a limit as they are until the transaction ends, and reports whether all of them still are.
func (r couriers) keep(ctx context.Context, ids []dispatch.CourierID) (bool, error) {
	n := 0
	for some := range slices.Chunk(ids, mostRows) {
		var kept int
		err := r.q.QueryRowContext(ctx, "SELECT COUNT(*) FROM courier"+r.db.Force("courier_courier_id")+" WHERE "+among("courier_id", len(some))+
			" AND on_duty = 1 AND capacity = 0"+r.db.ForShare, texts(some)...).Scan(&kept)
		if err != nil {
			return false, err
		}
		n += kept
	}
	return n == len(ids), nil
}

// count adds so many orders to what each of the couriers with a limit carries, and reports whether all have room.
func (r couriers) count(ctx context.Context, ids []dispatch.CourierID, orders map[dispatch.CourierID]int) (bool, error) {
	n := 0
	slices.SortFunc(ids, func(a, b dispatch.CourierID) int { return strings.Compare(a.String(), b.String()) })
	for some := range slices.Chunk(ids, mostRows) {
		var more []any
		for _, id := range some {
			more = append(more, id.String(), orders[id])
		}
		then := "(active + CASE courier_id" + strings.Repeat(" WHEN ? THEN ?", len(some)) + " END)"
		result, err := r.q.ExecContext(ctx, "UPDATE courier"+r.db.Force("courier_courier_id")+" SET active = "+then+
			" WHERE "+among("courier_id", len(some))+" AND on_duty = 1 AND capacity >= "+then, slices.Concat(more, texts(some), more)...)
		if err != nil {
			return false, err
		}
		counted, err := result.RowsAffected()
		if err != nil {
			return false, err
		}
		n += int(counted)
	}
	return n == len(ids), nil
}

func (r payments) AddMany(ctx context.Context, all []payment.Payment) error {
	err := insertByOrder(ctx, r.q, "payment", paymentColumns, all, func(p payment.Payment) order.ID { return p.Bill.OrderID }, paymentValues)
	if r.db.IsDuplicate(err) {
		return domain.Errorf(domain.Conflict, "payment_exists", "one of %d orders has a payment", len(all))
	}
	return err
}

func (r payments) UpdateMany(ctx context.Context, ids []order.ID, change func(*payment.Payment) (bool, error)) error {
	return changing[*payment.Payment]{
		table: "payment", columns: paymentColumns, index: "payment_orderId",
		scan: func(row scanner, before ...any) (*payment.Payment, error) {
			p, err := scanPayment(row, before...)
			return &p, err
		},
		changeable: changeablePayment, values: func(p *payment.Payment) []any { return changeablePaymentValues(*p) },
	}.update(ctx, r.q, r.db, ids, change)
}

func (r ledger) AddMany(ctx context.Context, all []points.Entry) error {
	err := insertByOrder(ctx, r.q, "points_entry", entryColumns, all, func(e points.Entry) order.ID { return e.OrderID }, entryValues)
	if r.db.IsDuplicate(err) {
		return domain.Errorf(domain.Conflict, "points_entered", "one of %d orders has an entry of its kind", len(all))
	}
	return err
}
