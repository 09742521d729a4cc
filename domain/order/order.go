// Package order is the order: what a customer asked for, what it costs, and how far it has come.
package order

import (
	"context"
	"time"

	"takeout/domain"
)

// ID names an order: 1 to 64 of A-Z a-z 0-9 _ and -. Only ParseID makes one from outside text.
type ID struct{ s string }

// ParseID returns the id, or an Invalid error.
func ParseID(s string) (ID, error) {
	if err := domain.CheckID("order_id", s); err != nil {
		return ID{}, err
	}
	return ID{s}, nil
}

// String returns the id as text, empty for the zero ID.
func (id ID) String() string { return id.s }

// Status is how far an order has come. It is a struct so that no other value than these can exist.
type Status struct{ s string }

// The statuses.
var (
	Placed     = Status{"placed"}
	Dispatched = Status{"dispatched"}
	Delivered  = Status{"delivered"}
	Cancelled  = Status{"cancelled"}
)

// ParseStatus returns the status of that name, or an Invalid error.
func ParseStatus(s string) (Status, error) {
	for _, known := range []Status{Placed, Dispatched, Delivered, Cancelled} {
		if known.s == s {
			return known, nil
		}
	}
	return Status{}, domain.InvalidField("status", "status_unknown",
		"status must be placed, dispatched, delivered or cancelled")
}

// String returns the status' name.
func (s Status) String() string { return s.s }

// Limits of an order's texts in code points.
const (
	MaxName   = 30
	MaxReason = 200
)

// Why an order is cancelled, when it is not the customer who says it.
const (
	ReasonNoCourier     = "no courier was found in time"
	ReasonNotPaid       = "the payment was refused"
	ReasonCancelWasLost = "another service knows that it was cancelled"
)

// Order is one order. A value outside this package is always valid: Place and Restore are the only ways to get
// one, and its methods the only ways to change it.
type Order struct{ now Snapshot }

// Place returns a new order with status placed and version 1. The name is 1 to MaxName code points that people
// can read; the time is kept in UTC to the microsecond, as the databases do. It is Invalid otherwise.
func Place(id ID, name string, money domain.Money, at time.Time) (*Order, error) {
	if id == (ID{}) {
		return nil, domain.InvalidField("order_id", "order_id_invalid", "order_id must not be empty")
	}
	if err := domain.CheckName("name", name, MaxName); err != nil {
		return nil, err
	}
	if money.IsZero() {
		return nil, domain.InvalidField("amount", "amount_out_of_range", "amount must be set: an order costs something")
	}
	return &Order{Snapshot{ID: id, Name: name, Money: money, PlacedAt: domain.Micro(at), Status: Placed, Version: 1}}, nil
}

// Snapshot is everything an Order holds, for those who store or show one.
type Snapshot struct {
	ID         ID
	Name       string
	Money      domain.Money
	PlacedAt   time.Time // UTC
	Status     Status
	Version    int64     // 1 when placed, one more with each change
	CourierID  string    // empty until dispatched
	AssignedAt time.Time // zero until dispatched, UTC

	DeliveredAt  time.Time // zero until delivered, UTC
	CancelledAt  time.Time // zero until cancelled, UTC
	CancelReason string    // empty if cancelled without one
	Points       int64     // what paying for it earned
}

// ID returns the order's id.
func (o *Order) ID() ID { return o.now.ID }

// Snapshot returns what the order holds now.
func (o *Order) Snapshot() Snapshot { return o.now }

// AsPlaced returns what the order held when it was placed.
func (o *Order) AsPlaced() Snapshot {
	return Snapshot{ID: o.now.ID, Name: o.now.Name, Money: o.now.Money, PlacedAt: o.now.PlacedAt, Status: Placed, Version: 1}
}

// Restore returns the order that a store kept. It is for stores only: it trusts what Snapshot once gave.
func Restore(s Snapshot) *Order { return &Order{s} }

// SameRequest reports whether both orders ask for the same: same id, name and money. How far they have come and
// when they were placed does not matter.
func (o *Order) SameRequest(other *Order) bool {
	return o.now.ID == other.now.ID && o.now.Name == other.now.Name && o.now.Money == other.now.Money
}

// MarkDispatched records the courier who was assigned. It reports whether the order changed: an order that is
// already past that point, or cancelled, stays as it is, because an assignment that comes late or again says
// nothing new.
func (o *Order) MarkDispatched(courierID string, at time.Time) bool {
	if o.now.Status != Placed {
		return false
	}
	o.now.Status = Dispatched
	o.now.CourierID = courierID
	o.now.AssignedAt = domain.Micro(at)
	o.now.Version++
	return true
}

// MarkDelivered records that the courier brought the order. It reports whether the order changed: one that is
// cancelled stays cancelled. The assignment comes with it, because the event that told of it may be late.
func (o *Order) MarkDelivered(courierID string, assigned, at time.Time) bool {
	if o.now.Status != Placed && o.now.Status != Dispatched {
		return false
	}
	o.now.Status = Delivered
	o.now.CourierID = courierID
	o.now.AssignedAt = domain.Micro(assigned)
	o.now.DeliveredAt = domain.Micro(at)
	o.now.Version++
	return true
}

// CorrectCourier replaces the courier of an order that has one, and reports whether the order changed.
func (o *Order) CorrectCourier(courierID string, assigned time.Time) bool {
	if o.now.Status != Dispatched && o.now.Status != Delivered || o.now.CourierID == courierID {
		return false
	}
	o.now.CourierID = courierID
	o.now.AssignedAt = domain.Micro(assigned)
	o.now.Version++
	return true
}

// Cancel ends an order that is not delivered, and reports whether it changed: one that is cancelled stays as it is.
// The reason may be empty. It is Invalid if the reason is longer than MaxReason or not readable, and Conflict if the
// order is delivered.
func (o *Order) Cancel(reason string, at time.Time) (bool, error) {
	if reason != "" {
		if err := domain.CheckName("reason", reason, MaxReason); err != nil {
			return false, err
		}
	}
	switch o.now.Status {
	case Cancelled:
		return false, nil
	case Delivered:
		return false, domain.Errorf(domain.Conflict, "order_delivered", "order %s is delivered and cannot be cancelled any more", o.now.ID)
	}
	o.now.Status = Cancelled
	o.now.CancelledAt = domain.Micro(at)
	o.now.CancelReason = reason
	o.now.Points = 0 // what was paid is paid back, and what that earned is taken back
	o.now.Version++
	return true, nil
}

// RecordPoints notes what paying for the order earned, and reports whether the order changed: one that is cancelled
// keeps nothing.
func (o *Order) RecordPoints(points int64) bool {
	if o.now.Status == Cancelled || o.now.Points == points {
		return false
	}
	o.now.Points = points
	return true
}

// Correct gives the order a new version without another change, so that it can be announced once more to somebody
// who holds something else under the version before.
func (o *Order) Correct() { o.now.Version++ }

// CatchUp gives the order at least that version. One that is made again must not fall behind what was announced of it:
// whoever was told that version would take the next for an old one.
func (o *Order) CatchUp(version int64) { o.now.Version = max(o.now.Version, version) }

// Query asks for a page of orders, newest first.
type Query struct {
	Status Status // zero for any
	Before int64  // Next of the page before, zero for the first page
	Limit  int
}

// Page is a part of a list.
type Page struct {
	Orders []*Order
	Next   int64 // Before of the next page, zero if this is the last
}

// Repository stores orders. It is bound to the transaction that it was made for.
type Repository interface {
	// Add stores a new order. Conflict if the id is taken.
	Add(ctx context.Context, o *Order) error
	// AddMany stores up to a few hundred new orders. Conflict if one of the ids is taken, or comes twice: then the
	// transaction must not be committed.
	AddMany(ctx context.Context, many []*Order) error
	// Get returns the order. NotFound if there is none. In a transaction it sees whatever Add was refused for, and nobody
	// changes what it returned before the transaction ends.
	Get(ctx context.Context, id ID) (*Order, error)
	// Update locks the order, lets change modify it, and saves it if change reports true. NotFound if there is
	// none.
	Update(ctx context.Context, id ID, change func(*Order) (bool, error)) error
	// GetMany returns those of the orders that are stored, in any order.
	GetMany(ctx context.Context, ids []ID) ([]*Order, error)
	// UpdateMany locks the orders, whose ids are distinct, lets change modify one after the other, and saves those for
	// which it reports true. An error of change ends it. NotFound if one of the orders is not stored. Concurrent
	// calls do not deadlock.
	UpdateMany(ctx context.Context, ids []ID, change func(*Order) (bool, error)) error
	// List returns a page of orders, newest first.
	List(ctx context.Context, q Query) (Page, error)
}
