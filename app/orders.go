package app

import (
	"context"
	"time"

	"takeout/crashpoint"
	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
)

// Orders is what customers and the other services can do with orders.
type Orders struct {
	store    Store[OrderTx]
	together *Together[*placing]
	legacy   *LegacyPublishing
}

// NewOrders returns the use cases over the order service's database.
func NewOrders(store Store[OrderTx]) *Orders {
	s := &Orders{store: store}
	s.together = &Together[*placing]{
		One: s.placeOne, Many: s.placeMany, Most: 64, Parallel: 1, Patience: 100 * time.Millisecond, Rest: 2 * time.Millisecond,
	}
	return s
}

// MarkDispatched records on the order that a courier has it. An order that has another one keeps it, unless the event is
// a correction: the dispatch service decides who brings an order, once. NotFound if there is no such order, or not yet.
// Invalid if the event breaks a rule.
func (s *Orders) MarkDispatched(ctx context.Context, e event.DispatchAssigned) error {
	id, err := order.ParseID(e.OrderID)
	if err != nil {
		return err
	}
	if _, err := courierOf(e.CourierID, e.AssignedAt); err != nil {
		return err
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx OrderTx) error {
		return tx.Orders.Update(ctx, id, func(o *order.Order) (bool, error) { return markDispatched(o, e), nil })
	})
}

// MarkDispatchedMany is MarkDispatched of several events, all or none.
func (s *Orders) MarkDispatchedMany(ctx context.Context, events []event.DispatchAssigned) error {
	of, ids, err := byOrder(events, func(e event.DispatchAssigned) (order.ID, error) {
		if _, err := courierOf(e.CourierID, e.AssignedAt); err != nil {
			return order.ID{}, err
		}
		return order.ParseID(e.OrderID)
	})
	if err != nil {
		return err
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx OrderTx) error {
		return tx.Orders.UpdateMany(ctx, ids, func(o *order.Order) (bool, error) { return markDispatched(o, of[o.ID()]), nil })
	})
}

func markDispatched(o *order.Order, e event.DispatchAssigned) bool {
	return o.MarkDispatched(e.CourierID, e.AssignedAt) || e.Correction && o.CorrectCourier(e.CourierID, e.AssignedAt)
}

// MarkDelivered records on the order that the courier brought it. An order that was cancelled meanwhile stays so, and
// its history tells. NotFound if there is no such order, or not yet. Invalid if the event breaks a rule.
func (s *Orders) MarkDelivered(ctx context.Context, e event.DispatchDelivered) error {
	id, err := order.ParseID(e.OrderID)
	if err != nil {
		return err
	}
	if _, err := courierOf(e.CourierID, e.AssignedAt); err != nil {
		return err
	}
	if err := domain.CheckTime("delivered_at", e.DeliveredAt); err != nil {
		return err
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx OrderTx) error {
		var cancelled bool
		err := tx.Orders.Update(ctx, id, func(o *order.Order) (bool, error) {
			cancelled = o.Snapshot().Status == order.Cancelled
			return o.MarkDelivered(e.CourierID, e.AssignedAt, e.DeliveredAt) || e.Correction && o.CorrectCourier(e.CourierID, e.AssignedAt), nil
		})
		if err == nil && cancelled {
			err = tx.History.Add(ctx, e.OrderID, "delivered_after_cancel", "courier "+e.CourierID+" brought the order, which had been cancelled")
		}
		return err
	})
}

// RecordPoints records on the order what paying for it earned. NotFound if there is no such order, or not yet.
// Invalid if no order can earn that much.
func (s *Orders) RecordPoints(ctx context.Context, e event.PointsAwarded) error {
	id, err := earner(e)
	if err != nil {
		return err
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx OrderTx) error {
		return tx.Orders.Update(ctx, id, func(o *order.Order) (bool, error) { return o.RecordPoints(e.Points), nil })
	})
}

// RecordPointsMany is RecordPoints of several events, all or none.
func (s *Orders) RecordPointsMany(ctx context.Context, events []event.PointsAwarded) error {
	of, ids, err := byOrder(events, earner)
	if err != nil {
		return err
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx OrderTx) error {
		return tx.Orders.UpdateMany(ctx, ids, func(o *order.Order) (bool, error) {
			return o.RecordPoints(of[o.ID()].Points), nil
		})
	})
}

// Cancel ends an order and announces it. Cancelling again changes nothing. NotFound if there is no such order,
// Conflict if it is delivered, Invalid if the reason is longer than order.MaxReason, or no text that people can read.
func (s *Orders) Cancel(ctx context.Context, id order.ID, reason string) (order.Snapshot, error) {
	return s.cancel(ctx, id, reason, func(order.Snapshot) error { return nil })
}

// cancel is Cancel, unless check has something against the order that is stored.
func (s *Orders) cancel(ctx context.Context, id order.ID, reason string, check func(order.Snapshot) error) (order.Snapshot, error) {
	var cancelled order.Snapshot
	err := s.store.InTx(ctx, func(ctx context.Context, tx OrderTx) error {
		var changed bool
		err := tx.Orders.Update(ctx, id, func(o *order.Order) (_ bool, err error) {
			if err := check(o.Snapshot()); err != nil {
				return false, err
			}
			changed, err = o.Cancel(reason, time.Now())
			cancelled = o.Snapshot()
			return changed, err
		})
		if err != nil || !changed {
			return err
		}
		err = tx.Outbox.Publish(ctx, cancelledEvent(cancelled))
		crashpoint.Here("order.cancel/before-commit")
		return err
	})
	crashpoint.Here("order.cancel/after-commit")
	return cancelled, err
}

// CancelUndispatchable ends an order for which no courier was found. Invalid if the event breaks a rule or tells of an
// order that costs something else.
func (s *Orders) CancelUndispatchable(ctx context.Context, e event.DispatchImpossible) error {
	return s.cancelFor(ctx, e.Order, order.ReasonNoCourier)
}

// CancelUnpaid ends an order whose payment was refused. Invalid if the event breaks a rule or tells of an order that
// costs something else.
func (s *Orders) CancelUnpaid(ctx context.Context, e event.PaymentRefused) error {
	return s.cancelFor(ctx, e.Order, order.ReasonNotPaid)
}

func (s *Orders) cancelFor(ctx context.Context, e event.Order, reason string) error {
	want, err := rebuild(e)
	if err != nil {
		return err
	}
	w := want.Snapshot()
	_, err = s.cancel(ctx, w.ID, reason, func(stored order.Snapshot) error {
		if stored.Money != w.Money {
			return domain.Errorf(domain.Invalid, "order_mismatch", "order %s is stored with another amount than this event says", w.ID)
		}
		if stored.Status == order.Delivered { // trying again does not change that, so the message is kept for a person
			return domain.Errorf(domain.Invalid, "order_delivered", "order %s is delivered, and so it is not cancelled because %s", w.ID, reason)
		}
		return nil
	})
	return err
}

// Reannouncement says how an order is announced once more.
type Reannouncement struct {
	Corrected     bool      // under a new version, so that whoever holds something else takes it over
	PaymentsSince time.Time // orders that were placed before are announced as such that must not be charged; zero if none are
}

// Announce announces the order once more as it is now, under a new event id, for somebody who lost it; why goes into
// its history. NotFound if there is no such order, Invalid if its row breaks a rule of what is announced.
func (s *Orders) Announce(ctx context.Context, id order.ID, how Reannouncement, why string) error {
	return s.store.InTx(ctx, func(ctx context.Context, tx OrderTx) error {
		var now order.Snapshot
		err := tx.Orders.Update(ctx, id, func(o *order.Order) (bool, error) {
			if how.Corrected {
				o.Correct()
			}
			now = o.Snapshot()
			return how.Corrected, nil
		})
		if err != nil {
			return err
		}
		var e event.Event
		switch now.Status {
		case order.Cancelled:
			now.CancelledAt = orNow(now.CancelledAt)
			e = cancelledEvent(now)
		case order.Delivered:
			now.DeliveredAt = orNow(now.DeliveredAt)
			fallthrough
		default:
			placed := placedEvent(now)
			placed.BeforePayments = now.PlacedAt.Before(how.PaymentsSince)
			e = placed
		}
		return announceAgain(ctx, tx.Outbox, tx.History, e, why)
	})
}

// Get returns the order. NotFound if there is none.
func (s *Orders) Get(ctx context.Context, id order.ID) (order.Snapshot, error) {
	var o *order.Order
	err := s.store.View(ctx, func(ctx context.Context, tx OrderTx) (err error) {
		o, err = tx.Orders.Get(ctx, id)
		return err
	})
	if err != nil {
		return order.Snapshot{}, err
	}
	return o.Snapshot(), nil
}

// List returns a page of orders, newest first.
func (s *Orders) List(ctx context.Context, q order.Query) (order.Page, error) {
	var page order.Page
	err := s.store.View(ctx, func(ctx context.Context, tx OrderTx) (err error) {
		page, err = tx.Orders.List(ctx, q)
		return err
	})
	return page, err
}
