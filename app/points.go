package app

import (
	"context"
	"time"

	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/domain/points"
)

// Points is what the points service does: it keeps the ledger of what orders earn.
type Points struct{ store Store[PointsTx] }

// NewPoints returns the use cases over the points service's database.
func NewPoints(store Store[PointsTx]) *Points { return &Points{store} }

// Award enters what a paid order earns, and announces it. ErrDuplicate if the order has its entry.
func (s *Points) Award(ctx context.Context, e event.PaymentSucceeded) error {
	award, err := entryOf(e.Order, points.Award)
	if err != nil {
		return err
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx PointsTx) error {
		err := tx.Ledger.Add(ctx, award)
		if domain.KindOf(err) == domain.Conflict {
			return ErrDuplicate
		}
		if err != nil {
			return err
		}
		return tx.Outbox.Publish(ctx, awardedEvent(e, award))
	})
}

// AwardMany is Award of several events, all or none.
func (s *Points) AwardMany(ctx context.Context, events []event.PaymentSucceeded) error {
	awards, announcements := make([]points.Entry, len(events)), make([]event.Event, len(events))
	for i, e := range events {
		award, err := entryOf(e.Order, points.Award)
		if err != nil {
			return err
		}
		awards[i], announcements[i] = award, awardedEvent(e, award)
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx PointsTx) error {
		if err := tx.Ledger.AddMany(ctx, awards); err != nil {
			return err
		}
		return tx.Outbox.Publish(ctx, announcements...)
	})
}

func awardedEvent(e event.PaymentSucceeded, award points.Entry) event.PointsAwarded {
	return event.PointsAwarded{OrderID: e.OrderID, Points: award.Points, AwardedAt: award.At, Version: e.Version}
}

// Revoke takes back what a refunded order earned. If it has earned nothing yet, an award of nothing is entered, so that
// one that comes late finds its place taken. ErrDuplicate if it was taken back before.
func (s *Points) Revoke(ctx context.Context, e event.PaymentRefunded) error {
	revoke, err := entryOf(e.Order, points.Revoke)
	if err != nil {
		return err
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx PointsTx) error {
		nothing := revoke
		nothing.Kind, nothing.Points = points.Award, 0
		err := tx.Ledger.Add(ctx, nothing) // waits for an award that is being entered
		if err != nil && domain.KindOf(err) != domain.Conflict {
			return err
		}
		entries, err := tx.Ledger.Entries(ctx, revoke.OrderID)
		if err != nil {
			return err
		}
		revoke.Points = -points.Sum(entries)
		err = tx.Ledger.Add(ctx, revoke)
		if domain.KindOf(err) == domain.Conflict {
			return ErrDuplicate
		}
		return err
	})
}

// entryOf is a new entry about the order, with what paying for it earns.
func entryOf(e event.Order, kind points.Kind) (points.Entry, error) {
	o, err := rebuild(e)
	if err != nil {
		return points.Entry{}, err
	}
	s := o.Snapshot()
	return points.Entry{OrderID: s.ID, Kind: kind, Points: points.For(s.Money), PlacedAt: s.PlacedAt, At: domain.Micro(time.Now())}, nil
}

// Entries returns what is entered for an order, the oldest first. NotFound if nothing is.
func (s *Points) Entries(ctx context.Context, id order.ID) ([]points.Entry, error) {
	var entries []points.Entry
	err := s.store.View(ctx, func(ctx context.Context, tx PointsTx) (err error) {
		entries, err = tx.Ledger.Entries(ctx, id)
		return err
	})
	if err == nil && len(entries) == 0 {
		err = nothingEntered(id)
	}
	return entries, err
}

func nothingEntered(id order.ID) error {
	return domain.Errorf(domain.NotFound, "points_not_found", "nothing is entered for order %s", id)
}
