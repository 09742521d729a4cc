package sqlstore

import (
	"context"
	"slices"
	"strings"

	"takeout/adapters/sqldb"
	"takeout/domain"
	"takeout/domain/order"
)

// scanner is one row.
type scanner interface{ Scan(into ...any) error }

// each reads rows one after the other.
func each(ctx context.Context, q querier, query string, args []any, read func(row scanner) error) error {
	rows, err := q.QueryContext(ctx, query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		if err := read(rows); err != nil {
			return err
		}
	}
	return rows.Err()
}

// collect returns what scan makes of each row; empty and not nil if there are none. It is for transactions, whose InTx gives
// errors their kind.
func collect[T any](ctx context.Context, q querier, scan func(row scanner) (T, error), query string, args ...any) ([]T, error) {
	all := []T{}
	err := each(ctx, q, query, args, func(row scanner) error {
		one, err := scan(row)
		all = append(all, one)
		return err
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// readAll is collect outside of transactions.
func readAll[T any](ctx context.Context, db *sqldb.DB, scan func(row scanner) (T, error), query string, args ...any) ([]T, error) {
	all, err := collect(ctx, db.Reader(), scan, query, args...)
	return all, db.Error(err)
}

// scanOne scans a row that has one column.
func scanOne[T any](row scanner) (value T, err error) {
	err = row.Scan(&value)
	return value, err
}

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

// insertByOrder inserts a row for each of all. It takes locks in the order of the orders' ids, so that concurrent calls do
// not deadlock.
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

// values are ids or texts as arguments.
func values[T any](all []T) []any {
	args := make([]any, len(all))
	for i, one := range all {
		args[i] = one
	}
	return args
}

// mostIDs is how many rows one statement names by id: few enough that its text stays well below a packet.
const mostIDs = 500
