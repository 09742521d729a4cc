// Package payment is the payment of an order: what was charged, and what was paid back.
package payment

import (
	"context"
	"time"

	"takeout/domain/order"
)

// State is what became of a payment. It is a struct so that no text is taken for one by mistake.
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

// Payment is the one payment of one order.
type Payment struct {
	Bill       order.Terms // of the order
	State      State
	Reference  string    // the gateway's, empty until it has charged
	Reason     string    // why the gateway refused, empty otherwise
	DecidedAt  time.Time // when it succeeded or was refused or void, zero before, UTC
	RefundedAt time.Time // zero until refunded, UTC
}

// Succeed records that the gateway has charged, and reports whether the payment changed: one that is decided stays so.
func (p *Payment) Succeed(reference string, at time.Time) bool {
	if p.State != Charging {
		return false
	}
	p.State, p.Reference, p.DecidedAt = Succeeded, reference, at
	return true
}

// Refuse records that the gateway will not charge, and reports whether the payment changed: one that is decided stays
// so.
func (p *Payment) Refuse(reason string, at time.Time) bool {
	if p.State != Charging {
		return false
	}
	p.State, p.Reason, p.DecidedAt = Refused, reason, at
	return true
}

// Cancel records that the gateway has charged nothing or has given it back, because the order is cancelled, and reports
// whether the payment changed.
func (p *Payment) Cancel(at time.Time) bool {
	switch p.State {
	case Charging:
		p.State, p.DecidedAt = Void, at
	case Succeeded:
		p.State, p.RefundedAt = Refunded, at
	default:
		return false
	}
	return true
}

// Repository stores payments. It is bound to the transaction that it was made for.
type Repository interface {
	// Add stores a new payment. Conflict if the order has one.
	Add(ctx context.Context, p Payment) error
	// AddMany stores payments of different orders, all or none. Conflict if one of the orders has a payment. Concurrent
	// transactions that do so do not deadlock.
	AddMany(ctx context.Context, all []Payment) error
	// Get returns the payment of an order. NotFound if there is none. In a transaction it sees whatever Add was refused
	// for, and nobody changes what it returned before the transaction ends.
	Get(ctx context.Context, id order.ID) (Payment, error)
	// Update locks the payment, lets change modify it, and saves it if change reports true. NotFound if there is
	// none.
	Update(ctx context.Context, id order.ID, change func(*Payment) (bool, error)) error
	// UpdateMany is Update of the payments of several orders, whose ids are distinct. An error of change ends it. NotFound
	// if one of the orders has no payment. Concurrent
	// transactions that do so do not deadlock.
	UpdateMany(ctx context.Context, ids []order.ID, change func(*Payment) (bool, error)) error
}
