package app

import (
	"context"
	"errors"
	"time"

	"takeout/crashpoint"
	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/domain/payment"
)

// Payments is what the payment service does: it charges each order once, and pays back what was charged for one that is
// cancelled.
type Payments struct {
	store   Store[PaymentTx]
	gateway Gateway

	begin  func(ctx context.Context, bill order.Terms) error // see beginOne
	settle func(ctx context.Context, c charged) error        // see settleOne
}

// NewPayments returns the use cases over the payment service's database.
func NewPayments(store Store[PaymentTx], gateway Gateway) *Payments {
	s := &Payments{store: store, gateway: gateway}
	s.begin = HandleTogether(paymentRest, s.beginOne, s.beginMany)
	s.settle = HandleTogether(paymentRest, s.settleOne, s.settleMany)
	return s
}

// Gateway takes and gives back money. Both calls are idempotent by the order's id: asked again, it answers as before. An
// error leaves open what happened, so that the caller must ask again.
type Gateway interface {
	// Charge takes the money and returns a reference, 1 to 100 printable ASCII characters. A refusal is a Conflict
	// error, whose message is the reason: then nothing was taken, and nothing ever will be.
	Charge(ctx context.Context, bill order.Terms) (reference string, err error)
	// Cancel makes sure that nothing is charged for the order, and never will be: what was taken is given back, and
	// what is asked for from now on is refused.
	Cancel(ctx context.Context, bill order.Terms) error
}

// paymentRest is how long the transactions before and after the gateway is asked let payments gather that come faster than
// that: little beside the time that a gateway takes.
const paymentRest = 10 * time.Millisecond

// gatewayTimeout is how long one call of the gateway may take.
const gatewayTimeout = 10 * time.Second

// Charge charges an order that was placed, and announces whether it is paid. An order whose payment is decided keeps
// it: ErrDuplicate. One from before there were payments is left alone. It is Invalid if the event breaks a rule or tells of
// another order than the one that the payment is for.
//
// That the payment has begun is stored before the gateway is asked, so that whoever finds it after a crash asks the
// gateway again, and a cancellation that comes meanwhile knows that there may be something to give back. Orders that are
// charged at the same time share the transactions before and after; the gateway is asked for each by itself.
func (s *Payments) Charge(ctx context.Context, e event.OrderPlaced) error {
	bill, err := placedTerms(e)
	if err != nil {
		return err
	}
	if e.BeforePayments {
		return nil
	}
	if err := s.begin(ctx, bill); err != nil {
		return err
	}
	c := charged{order: e.Order, id: bill.OrderID}
	c.reference, err = s.charge(ctx, bill)
	crashpoint.Here("payment/charged")
	if refusal, ok := errors.AsType[*domain.Error](err); ok && refusal.Kind == domain.Conflict {
		c.refused, c.reason = true, refusal.Message
	} else if err != nil {
		return err
	}
	c.at = domain.Micro(time.Now())
	return s.settle(ctx, c)
}

// beginOne stores that the order is being charged, unless it is stored. ErrDuplicate if the payment is decided.
func (s *Payments) beginOne(ctx context.Context, bill order.Terms) error {
	ctx = WithoutDelivery(ctx)
	p, err := s.Get(ctx, bill.OrderID)
	if domain.KindOf(err) == domain.NotFound {
		err = s.store.InTx(ctx, func(ctx context.Context, tx PaymentTx) error {
			p = charging(bill)
			err := tx.Payments.Add(ctx, p)
			if domain.KindOf(err) == domain.Conflict { // somebody else's, or our own from a COMMIT without an answer
				p, err = tx.Payments.Get(ctx, bill.OrderID)
			}
			return err
		})
	}
	if err != nil {
		return err
	}
	newer := bill.Newer(p.Bill)
	_, err = p.Bill.Correct(bill)
	if err == nil && newer {
		err = s.correct(ctx, bill)
	}
	if err == nil && p.State != payment.Charging {
		return ErrDuplicate
	}
	return err
}

// beginMany stores that these orders are being charged, if nothing is stored of any.
func (s *Payments) beginMany(ctx context.Context, bills []order.Terms) error {
	payments := make([]payment.Payment, len(bills))
	for i, bill := range bills {
		payments[i] = charging(bill)
	}
	return s.store.InTx(WithoutDelivery(ctx), func(ctx context.Context, tx PaymentTx) error {
		return tx.Payments.AddMany(ctx, payments)
	})
}

func charging(bill order.Terms) payment.Payment {
	return payment.Payment{Bill: bill, State: payment.Charging}
}

// charged is what the gateway said about an order.
type charged struct {
	order     event.Order
	id        order.ID
	reference string
	refused   bool
	reason    string
	at        time.Time
}

// settleOne stores and announces what the gateway said.
func (s *Payments) settleOne(ctx context.Context, c charged) error {
	return s.store.InTx(ctx, func(ctx context.Context, tx PaymentTx) error {
		var changed bool
		err := tx.Payments.Update(ctx, c.id, func(p *payment.Payment) (bool, error) {
			changed = c.decide(p)
			return changed, nil
		})
		if err != nil || !changed { // the order was cancelled meanwhile, or this is not the only one who asked
			return err
		}
		return tx.Outbox.Publish(ctx, c.event())
	})
}

// settleMany is settleOne of several, all or none.
func (s *Payments) settleMany(ctx context.Context, all []charged) error {
	of, ids, err := byOrder(all, func(c charged) (order.ID, error) { return c.id, nil })
	if err != nil {
		return err
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx PaymentTx) error {
		var events []event.Event
		err := tx.Payments.UpdateMany(ctx, ids, func(p *payment.Payment) (bool, error) {
			c := of[p.Bill.OrderID]
			changed := c.decide(p)
			if changed {
				events = append(events, c.event())
			}
			return changed, nil
		})
		if err != nil || len(events) == 0 {
			return err
		}
		return tx.Outbox.Publish(ctx, events...)
	})
}

func (c charged) decide(p *payment.Payment) (changed bool) {
	if c.refused {
		return p.Refuse(c.reason, c.at)
	}
	return p.Succeed(c.reference, c.at)
}

func (c charged) event() event.Event {
	if c.refused {
		return event.PaymentRefused{Order: c.order, Reason: c.reason, RefusedAt: c.at}
	}
	return event.PaymentSucceeded{Order: c.order, Reference: c.reference, PaidAt: c.at}
}

func (s *Payments) correct(ctx context.Context, bill order.Terms) error {
	return s.store.InTx(ctx, func(ctx context.Context, tx PaymentTx) error {
		var corrected bool
		err := tx.Payments.Update(ctx, bill.OrderID, func(p *payment.Payment) (newer bool, err error) {
			newer = bill.Newer(p.Bill)
			corrected, err = p.Bill.Correct(bill)
			return newer, err
		})
		if err != nil || !corrected {
			return err
		}
		return tx.History.Add(ctx, bill.OrderID.String(), "payment_corrected", "name and time are as the order service knows them now")
	})
}

func (s *Payments) charge(ctx context.Context, bill order.Terms) (reference string, err error) {
	ctx, cancel := context.WithTimeout(ctx, gatewayTimeout)
	defer cancel()
	return s.gateway.Charge(ctx, bill)
}

// Refund pays back what was charged for an order that is cancelled, and announces it. If the order is not known yet, that
// is recorded, and it will not be charged. It is Invalid if the event breaks a rule or tells of another order than the
// one that the payment is for.
func (s *Payments) Refund(ctx context.Context, e event.OrderCancelled) error {
	bill, err := cancelledTerms(e)
	if err != nil {
		return err
	}
	p, err := s.Get(ctx, bill.OrderID)
	known := domain.KindOf(err) != domain.NotFound
	if known && err != nil {
		return err
	}
	if known {
		if _, err := p.Bill.Correct(bill); err != nil {
			return err
		}
		bill = p.Bill
	}
	// Also when nothing is known: what this database knew may be lost.
	if !known || p.State == payment.Charging || p.State == payment.Succeeded {
		if err := s.cancel(ctx, bill); err != nil {
			return err
		}
		crashpoint.Here("payment/cancelled")
	}
	at := domain.Micro(time.Now())
	return s.store.InTx(ctx, func(ctx context.Context, tx PaymentTx) error {
		if !known {
			return tx.Payments.Add(ctx, payment.Payment{Bill: bill, State: payment.Void, DecidedAt: at})
		}
		var before payment.Payment
		err := tx.Payments.Update(ctx, bill.OrderID, func(p *payment.Payment) (bool, error) {
			before = *p
			newer, cancelled := bill.Newer(p.Bill), p.Cancel(at)
			// What contradicts what was stored meanwhile is cancelled all the same, as the gateway has done.
			_, err := p.Bill.Correct(bill)
			return cancelled || err == nil && newer, nil
		})
		if err != nil || before.State != payment.Succeeded {
			return err
		}
		return tx.Outbox.Publish(ctx, event.PaymentRefunded{Order: e.Order, Reference: before.Reference, RefundedAt: at})
	})
}

func (s *Payments) cancel(ctx context.Context, bill order.Terms) error {
	ctx, cancel := context.WithTimeout(ctx, gatewayTimeout)
	defer cancel()
	return s.gateway.Cancel(ctx, bill)
}

// Get returns the payment of an order. NotFound if there is none.
func (s *Payments) Get(ctx context.Context, id order.ID) (payment.Payment, error) {
	var p payment.Payment
	err := s.store.View(ctx, func(ctx context.Context, tx PaymentTx) (err error) {
		p, err = tx.Payments.Get(ctx, id)
		return err
	})
	return p, err
}
