// Package payment is the payment of an order: what was charged, and what was paid back.
package payment

import (
	"context"
	"time"

	"takeout/domain"
	"takeout/domain/order"
)

// State is what became of a payment. It is a struct so that no other value than these can exist.
type State struct{ s string }

// The states. A payment is charging until the gateway has said what became of it; void is the payment of an order
// that was cancelled before anything was charged.
var (
	Charging  = State{"charging"}
	Succeeded = State{"succeeded"}
	Refused   = State{"refused"}
	Refunded  = State{"refunded"}
	Void      = State{"void"}
)

// String returns the state's name.
func (s State) String() string { return s.s }

// RestoreState is for stores only: it trusts the text.
func RestoreState(s string) State { return State{s} }

// Bill is what is to be paid, taken from the order's event.
type Bill struct {
	OrderID      order.ID
	Name         string
	Money        domain.Money
	PlacedAt     time.Time // UTC
	OrderVersion int64     // the order's version that the event told of
}

// Payment is the one payment of one order.
type Payment struct {
	Bill       Bill
	State      State
	Reference  string    // the gateway's, empty until it has charged
	Reason     string    // why the gateway refused, empty otherwise
	DecidedAt  time.Time // when it succeeded or was refused or void, zero before, UTC
	RefundedAt time.Time // zero until refunded, UTC
}

// Repository stores payments. It is bound to the transaction that it was made for.
type Repository interface {
	// Add stores a new payment. Conflict if the order has one.
	Add(ctx context.Context, p Payment) error
	// Get returns the payment of an order. NotFound if there is none.
	Get(ctx context.Context, id order.ID) (Payment, error)
	// Update locks the payment, lets change modify it, and saves it if change reports true. NotFound if there is
	// none.
	Update(ctx context.Context, id order.ID, change func(*Payment) (bool, error)) error
}
