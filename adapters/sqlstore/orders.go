package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"slices"
	"strings"
	"time"

	"takeout/adapters/sqldb"
	"takeout/domain"
	"takeout/domain/order"
)

// orders implements order.Repository on order_info.
type orders struct {
	q  querier
	db *sqldb.DB
}

const orderColumns = "orderId, name, order_money, currency, status, version, courier_id, assigned_at, placed_at, delivered_at, cancelled_at, cancel_reason, points"

func (r orders) Add(ctx context.Context, o *order.Order) error {
	return r.AddMany(ctx, []*order.Order{o})
}

func (r orders) AddMany(ctx context.Context, many []*order.Order) error {
	err := insertByOrder(ctx, r.q, "order_info", orderColumns, many, (*order.Order).ID, orderValues)
	if r.db.IsDuplicate(err) {
		return domain.Errorf(domain.Conflict, "order_id_taken", "an order with this id exists")
	}
	return err
}

// orderValues are the values of orderColumns.
func orderValues(o *order.Order) []any {
	s := o.Snapshot()
	return []any{
		s.ID.String(), s.Name, s.Money.Amount(), s.Money.Currency(), s.Status.String(), s.Version, nullString(s.CourierID),
		nullTime(s.AssignedAt), s.PlacedAt, nullTime(s.DeliveredAt), nullTime(s.CancelledAt), s.CancelReason, s.Points,
	}
}

func (r orders) Get(ctx context.Context, id order.ID) (*order.Order, error) {
	return r.get(ctx, id, lockingRead(r.q, r.db))
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

func (r orders) get(ctx context.Context, id order.ID, lock string) (*order.Order, error) {
	o, err := scanOrder(r.q.QueryRowContext(ctx, "SELECT "+orderColumns+" FROM order_info WHERE orderId = ?"+lock, id.String()))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, domain.Errorf(domain.NotFound, "order_not_found", "there is no order %s", id)
	}
	return o, err
}

func (r orders) Update(ctx context.Context, id order.ID, change func(*order.Order) (bool, error)) error {
	o, err := r.get(ctx, id, r.db.ForUpdate)
	if err != nil {
		return err
	}
	if changed, err := change(o); err != nil || !changed {
		return err
	}
	s := o.Snapshot()
	_, err = r.q.ExecContext(ctx, "UPDATE order_info SET status = ?, version = ?, courier_id = ?, assigned_at = ?, "+
		"delivered_at = ?, cancelled_at = ?, cancel_reason = ?, points = ? WHERE orderId = ?", append(changeable(s), s.ID.String())...)
	return err
}

func (r orders) UpdateMany(ctx context.Context, ids []order.ID, change func(*order.Order) (bool, error)) error {
	return changing[*order.Order]{
		table: "order_info", columns: orderColumns, index: "order_info_orderId", scan: scanOrder,
		changeable: changeableColumns, values: func(o *order.Order) []any { return changeable(o.Snapshot()) },
	}.update(ctx, r.q, r.db, ids, change)
}

// changeable are the values of an order that may change, in the order of changeableColumns.
func changeable(s order.Snapshot) []any {
	return []any{
		s.Status.String(), s.Version, nullString(s.CourierID), nullTime(s.AssignedAt),
		nullTime(s.DeliveredAt), nullTime(s.CancelledAt), s.CancelReason, s.Points,
	}
}

var changeableColumns = []string{"status", "version", "courier_id", "assigned_at", "delivered_at", "cancelled_at", "cancel_reason", "points"}

func (r orders) List(ctx context.Context, q order.Query) (order.Page, error) {
	query, args := "SELECT id, "+orderColumns+" FROM order_info WHERE 1 = 1", []any{}
	if q.Status != (order.Status{}) {
		query, args = query+" AND status = ?", append(args, q.Status.String())
	}
	if q.Before > 0 {
		query, args = query+" AND id < ?", append(args, q.Before)
	}
	rows, err := r.q.QueryContext(ctx, query+" ORDER BY id DESC LIMIT ?", append(args, q.Limit+1)...)
	if err != nil {
		return order.Page{}, err
	}
	defer rows.Close()
	var page order.Page
	var last int64
	for rows.Next() {
		if len(page.Orders) == q.Limit {
			page.Next = last
			break
		}
		o, err := scanOrder(rows, &last)
		if err != nil {
			return order.Page{}, err
		}
		page.Orders = append(page.Orders, o)
	}
	return page, rows.Err()
}

// scanOrder reads orderColumns, after those that the caller wants to read before them.
func scanOrder(row scanner, before ...any) (*order.Order, error) {
	var (
		s                    order.Snapshot
		id, currency, status string
		amount               int64
		courier              sql.NullString
		assigned             sql.NullTime
		delivered, cancelled sql.NullTime
	)
	err := row.Scan(append(before, &id, &s.Name, &amount, &currency, &status, &s.Version, &courier, &assigned, &s.PlacedAt,
		&delivered, &cancelled, &s.CancelReason, &s.Points)...)
	if err != nil {
		return nil, scanned("order_info", id, err)
	}
	var errs [3]error
	s.ID, errs[0] = order.ParseID(id)
	s.Money, errs[1] = domain.NewMoney(amount, currency)
	s.Status, errs[2] = order.ParseStatus(status)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, damaged("order_info", id, err)
	}
	s.PlacedAt, s.CourierID, s.AssignedAt = s.PlacedAt.UTC(), courier.String, utc(assigned)
	s.DeliveredAt, s.CancelledAt = utc(delivered), utc(cancelled)
	return order.Restore(s), nil
}

// damaged says that a row holds what this program never writes. The kind of the cause is not passed on: the row is
// at fault, not the one who asks.
func damaged(table, id string, cause error) error {
	return &domain.Error{Kind: domain.Unknown, Code: "row_damaged", Message: "the row " + id + " of " + table + " is damaged: " + cause.Error()}
}

// scanned is the error of a Scan, which says of a value that cannot be read only which column has it, with the name of the row.
// Other errors, as that there is no row, stay as they are. What is scanned before the value is known, so the id comes first.
func scanned(table, id string, err error) error {
	if err == nil || !strings.HasPrefix(err.Error(), "sql: Scan error") { // it has no type
		return err
	}
	return damaged(table, id, err)
}

func isDamaged(err error) bool {
	e, ok := errors.AsType[*domain.Error](err)
	return ok && e.Code == "row_damaged"
}

func nullString(s string) any {
	if s == "" {
		return nil
	}
	return s
}

func nullTime(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return t
}

func utc(t sql.NullTime) time.Time {
	if !t.Valid {
		return time.Time{}
	}
	return t.Time.UTC()
}
