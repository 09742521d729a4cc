package app

import (
	"context"

	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/domain/payment"
)

// Payments is what the payment service does: it charges each order once, and pays back what was charged for one that is
// cancelled.
type Payments struct {
	store   Store[PaymentTx]
	gateway Gateway
}

// NewPayments returns the use cases over the payment service's database.
func NewPayments(store Store[PaymentTx], gateway Gateway) *Payments { return &Payments{store, gateway} }

// Gateway takes and gives back money. Both calls are idempotent by the order's id: asked again, it answers as before.
type Gateway interface {
	// Charge takes the money and returns a reference, 1 to 100 printable ASCII characters. A refusal is a Conflict
	// error, whose message is the reason; any other error leaves open what happened.
	Charge(ctx context.Context, bill payment.Bill) (reference string, err error)
	// Refund gives back what was charged. An error leaves open what happened.
	Refund(ctx context.Context, bill payment.Bill, reference string) error
}

// Charge charges an order that was placed.
func (s *Payments) Charge(ctx context.Context, e event.OrderPlaced) error { return nil }

// Refund pays back what was charged for an order that is cancelled.
func (s *Payments) Refund(ctx context.Context, e event.OrderCancelled) error { return nil }

// Get returns the payment of an order. NotFound if there is none.
func (s *Payments) Get(ctx context.Context, id order.ID) (payment.Payment, error) {
	var p payment.Payment
	err := s.store.View(ctx, func(ctx context.Context, tx PaymentTx) (err error) {
		p, err = tx.Payments.Get(ctx, id)
		return err
	})
	return p, err
}
