// Package app holds the use cases. One changes one service's tables and announces it, in one transaction; what the
// other services do about it is their own use case, called with the announcement.
package app

import (
	"context"

	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/domain/payment"
	"takeout/domain/points"
)

// Store is one service's database.
type Store[T any] interface {
	// InTx commits everything that fn did through tx, or nothing.
	//
	// If ctx carries a Delivery, InTx first records it in the inbox table of the same transaction. If it is
	// there already, InTx returns ErrDuplicate without calling fn; if it is there with another body, an Invalid
	// error. So one message changes the database at most once, and a handler calls InTx at most once. If ctx carries
	// several Deliveries, InTx records all of them. If some are there already, it returns Recorded without calling fn, and
	// ErrDuplicate if one is there twice among them.
	//
	// fn must do nothing but use tx, and must recognise its own work by natural keys, because it may run again:
	// after a deadlock, and when the answer to COMMIT was lost, in which case its first run may have taken
	// effect. If that cannot be resolved while ctx lasts, the error is Unavailable. If a lock is held by
	// somebody else for too long, it is Busy.
	InTx(ctx context.Context, fn func(ctx context.Context, tx T) error) error

	// View lets fn read what is committed, without a transaction. fn must not write.
	View(ctx context.Context, fn func(ctx context.Context, tx T) error) error
}

// OrderTx is what the order service may touch in one transaction.
type OrderTx struct {
	Orders  order.Repository
	Answers Answers
	Outbox  Outbox
	History History
}

// DispatchTx is what the dispatch service may touch in one transaction.
type DispatchTx struct {
	Dispatches dispatch.Repository
	Couriers   dispatch.Roster
	Outbox     Outbox
	History    History
}

// PaymentTx is what the payment service may touch in one transaction.
type PaymentTx struct {
	Payments payment.Repository
	Outbox   Outbox
	History  History
}

// PointsTx is what the points service may touch in one transaction.
type PointsTx struct {
	Ledger  points.Ledger
	Outbox  Outbox
	History History
}

// History keeps what was done about an order beyond its ordinary course: what was repaired, by whom and why. It is
// written in the transaction that does it.
type History interface {
	Add(ctx context.Context, orderID, step, detail string) error
}

// Outbox stores events next to the state that they announce; a relay sends them after the commit.
type Outbox interface {
	// Publish stores the events. Those about one order are sent in the sequence given; across orders none is promised.
	Publish(ctx context.Context, events ...event.Event) error
}

// Answers remembers what a request with an idempotency key was answered.
type Answers interface {
	// Add stores the answer. Conflict if the key was used before.
	Add(ctx context.Context, a Answer) error
	// AddMany stores up to a few hundred answers as Add does. Conflict if one of the keys was used before, or comes twice:
	// then the transaction must not be committed.
	AddMany(ctx context.Context, many []Answer) error
	// Amend replaces the body that this transaction added under the key.
	Amend(ctx context.Context, key string, body []byte) error
	// Used returns those of the keys that were used before.
	Used(ctx context.Context, keys []string) ([]string, error)
	// Get returns the answer stored under the key. NotFound if there is none. In a transaction it sees whatever Add was
	// refused for.
	Get(ctx context.Context, key string) (Answer, error)
}

// Answer is what a request with an idempotency key was answered.
type Answer struct {
	Key         string   // 1 to 255 bytes
	Fingerprint [32]byte // of the request, to tell a retry from another request under the same key
	OrderID     order.ID
	Body        []byte // as it was sent
}
