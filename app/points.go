package app

import (
	"context"

	"takeout/domain/event"
)

// Points is what the points service does: it keeps the ledger of what orders earn.
type Points struct{ store Store[PointsTx] }

// NewPoints returns the use cases over the points service's database.
func NewPoints(store Store[PointsTx]) *Points { return &Points{store} }

// Award enters what a paid order earns.
func (s *Points) Award(ctx context.Context, e event.PaymentSucceeded) error { return nil }

// Revoke takes back what a refunded order earned.
func (s *Points) Revoke(ctx context.Context, e event.PaymentRefunded) error { return nil }
