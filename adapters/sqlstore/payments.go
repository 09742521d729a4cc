package sqlstore

import (
	"context"
	"errors"

	"takeout/adapters/sqldb"
	"takeout/domain/order"
	"takeout/domain/payment"
	"takeout/domain/points"
)

// payments implements payment.Repository.
type payments struct {
	q  querier
	db *sqldb.DB
}

func (r payments) Add(ctx context.Context, p payment.Payment) error { return errors.ErrUnsupported }

func (r payments) Get(ctx context.Context, id order.ID) (payment.Payment, error) {
	return payment.Payment{}, errors.ErrUnsupported
}

func (r payments) Update(ctx context.Context, id order.ID, change func(*payment.Payment) (bool, error)) error {
	return errors.ErrUnsupported
}

// ledger implements points.Ledger on points_entry.
type ledger struct {
	q  querier
	db *sqldb.DB
}

func (r ledger) Add(ctx context.Context, e points.Entry) error { return errors.ErrUnsupported }

func (r ledger) Entries(ctx context.Context, id order.ID) ([]points.Entry, error) {
	return nil, errors.ErrUnsupported
}
