package sqlstore

import (
	"context"

	"takeout/adapters/sqldb"
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
