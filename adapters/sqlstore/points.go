package sqlstore

import (
	"context"

	"takeout/adapters/sqldb"
	"takeout/domain"
	"takeout/domain/order"
	"takeout/domain/points"
)

// ledger implements points.Ledger on points_entry.
type ledger struct {
	q  querier
	db *sqldb.DB
}

const entryColumns = "orderId, kind, points, placed_at, at"

// entryValues are the values of entryColumns.
func entryValues(e points.Entry) []any {
	return []any{e.OrderID.String(), e.Kind.String(), e.Points, e.PlacedAt, e.At}
}

func (r ledger) Add(ctx context.Context, e points.Entry) error {
	_, err := r.q.ExecContext(ctx, sqldb.Insert("points_entry", entryColumns, 1), entryValues(e)...)
	if r.db.IsDuplicate(err) {
		return domain.Errorf(domain.Conflict, "points_entered", "order %s has an entry of the kind %s", e.OrderID, e.Kind)
	}
	return err
}

func (r ledger) AddMany(ctx context.Context, all []points.Entry) error {
	err := insertByOrder(ctx, r.q, "points_entry", entryColumns, all, func(e points.Entry) order.ID { return e.OrderID }, entryValues)
	if r.db.IsDuplicate(err) {
		return domain.Errorf(domain.Conflict, "points_entered", "one of %d orders has an entry of its kind", len(all))
	}
	return err
}

func (r ledger) Entries(ctx context.Context, id order.ID) ([]points.Entry, error) {
	return collect(ctx, r.q, func(row scanner) (points.Entry, error) {
		e := points.Entry{OrderID: id}
		var kind string
		err := row.Scan(&kind, &e.Points, &e.PlacedAt, &e.At)
		e.Kind, e.PlacedAt, e.At = points.RestoreKind(kind), e.PlacedAt.UTC(), e.At.UTC()
		return e, scanned("points_entry", id.String(), err)
	}, "SELECT kind, points, placed_at, at FROM points_entry WHERE orderId = ? ORDER BY id"+lockingRead(r.q, r.db), id.String())
}
