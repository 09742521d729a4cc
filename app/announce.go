package app

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/domain/payment"
	"takeout/domain/points"
)

// announceAgain stores e, which tells what a row holds. It is Invalid if the row is such that consumers would refuse e.
func announceAgain(ctx context.Context, outbox Outbox, history History, e event.Event, why string) error {
	if err := believable(e); err != nil {
		return fmt.Errorf("%s cannot be announced: %w", e.Key(), err)
	}
	if err := outbox.Publish(ctx, e); err != nil {
		return err
	}
	return history.Add(ctx, e.Subject(), "announced_again", why)
}

// believable is Invalid if a consumer would refuse the event.
func believable(e event.Event) error {
	if e.OrderVersion() < 1 {
		return domain.InvalidField("version", "version_out_of_range", "version must be at least 1")
	}
	var err error
	switch e := e.(type) {
	case event.OrderPlaced:
		_, err = asAnnounced(e)
	case event.OrderCancelled:
		_, err = asCancelled(e)
	case event.DispatchAssigned:
		_, err = courierOf(e.CourierID, e.AssignedAt)
	case event.DispatchDelivered:
		if _, err = courierOf(e.CourierID, e.AssignedAt); err == nil {
			return domain.CheckTime("delivered_at", e.DeliveredAt)
		}
	case event.PaymentSucceeded:
		_, err = rebuild(e.Order)
	case event.PaymentRefused:
		_, err = rebuild(e.Order)
	case event.PaymentRefunded:
		_, err = rebuild(e.Order)
	case event.PointsAwarded:
		_, err = earner(e)
	}
	return err
}

// Announce announces once more what became of the order's dispatch, under a new event id, for somebody who lost it; why
// goes into the history. NotFound if the order has no dispatch, Conflict if there is nothing to announce, Invalid if its row
// breaks a rule of what is announced.
func (s *Dispatches) Announce(ctx context.Context, id order.ID, why string) error {
	return s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		d, err := tx.Dispatches.Get(ctx, id)
		if err != nil {
			return err
		}
		e, err := dispatchEvent(d)
		if err != nil {
			return err
		}
		return announceAgain(ctx, tx.Outbox, tx.History, e, why)
	})
}

// orNow is the time at which something happened, and the present if a row that a person changed does not say it.
func orNow(at time.Time) time.Time { return cmp.Or(at, domain.Micro(time.Now())) }

// dispatchEvent tells what became of a dispatch to somebody who may have heard something else.
func dispatchEvent(d dispatch.Dispatch) (event.Event, error) {
	switch d.State {
	case dispatch.Assigned:
		e := assignedEvent(d)
		e.Correction = true
		return e, nil
	case dispatch.Delivered:
		e := deliveredEvent(d)
		e.Correction, e.DeliveredAt = true, orNow(e.DeliveredAt)
		return e, nil
	}
	return nil, domain.Errorf(domain.Conflict, "nothing_to_announce", "the dispatch of order %s is %s", d.Job.OrderID, d.State)
}

// Announce announces once more what became of the order's payment, under a new event id, for somebody who lost it; why
// goes into the history. NotFound if the order has no payment, Conflict if there is nothing to announce, Invalid if its row
// breaks a rule of what is announced.
func (s *Payments) Announce(ctx context.Context, id order.ID, why string) error {
	return s.store.InTx(ctx, func(ctx context.Context, tx PaymentTx) error {
		p, err := tx.Payments.Get(ctx, id)
		if err != nil {
			return err
		}
		e, err := paymentEvent(p)
		if err != nil {
			return err
		}
		return announceAgain(ctx, tx.Outbox, tx.History, e, why)
	})
}

// Announce announces once more what the order earned in all, under a new event id, for somebody who lost it; why goes into
// the history. NotFound if nothing is entered for the order, Invalid if no order can earn that much.
func (s *Points) Announce(ctx context.Context, id order.ID, why string) error {
	return s.store.InTx(ctx, func(ctx context.Context, tx PointsTx) error {
		entries, err := tx.Ledger.Entries(ctx, id)
		if err != nil {
			return err
		}
		if len(entries) == 0 {
			return nothingEntered(id)
		}
		// The ledger does not keep which version was paid. Every order had the first.
		e := event.PointsAwarded{OrderID: id.String(), Points: points.Sum(entries), AwardedAt: entries[0].At, Version: 1}
		return announceAgain(ctx, tx.Outbox, tx.History, e, why)
	})
}

func paymentEvent(p payment.Payment) (event.Event, error) {
	bill := orderEvent(p.Bill)
	switch p.State {
	case payment.Succeeded:
		return event.PaymentSucceeded{Order: bill, Reference: p.Reference, PaidAt: p.DecidedAt}, nil
	case payment.Refused:
		return event.PaymentRefused{Order: bill, Reason: p.Reason, RefusedAt: p.DecidedAt}, nil
	case payment.Refunded:
		bill.Status = order.Cancelled.String()
		return event.PaymentRefunded{Order: bill, Reference: p.Reference, RefundedAt: p.RefundedAt}, nil
	}
	return nil, domain.Errorf(domain.Conflict, "nothing_to_announce", "the payment of order %s is %s", p.Bill.OrderID, p.State)
}
