// Package points is the ledger of the points that orders earn.
package points

import (
	"context"
	"time"

	"takeout/domain"
	"takeout/domain/order"
)

// Kind says why points are entered. It is a struct so that no text is taken for one by mistake.
type Kind struct{ s string }

// The kinds. An order has at most one entry of each.
var (
	Award  = Kind{"award"}
	Revoke = Kind{"revoke"}
)

// String returns the kind's name.
func (k Kind) String() string { return k.s }

// RestoreKind is for stores only: it trusts the text.
func RestoreKind(s string) Kind { return Kind{s} }

// For returns what paying that much earns: a point for each hundred minor units.
func For(money domain.Money) int64 { return money.Amount() / 100 }

// Entry is one line of the ledger.
type Entry struct {
	OrderID  order.ID
	Kind     Kind
	Points   int64     // negative when taken back
	PlacedAt time.Time // of the order, UTC
	At       time.Time // UTC
}

// Sum returns what the entries come to.
func Sum(entries []Entry) int64 {
	var sum int64
	for _, e := range entries {
		sum += e.Points
	}
	return sum
}

// Ledger stores entries; they are never changed. It is bound to the transaction that it was made for.
type Ledger interface {
	// Add enters points. Conflict if the order has an entry of this kind.
	Add(ctx context.Context, e Entry) error
	// AddMany enters several, all or none. Conflict if one of the orders has an entry of this kind, or two are the same.
	AddMany(ctx context.Context, all []Entry) error
	// Entries returns what is entered for an order, the oldest first. In a transaction it sees whatever Add was refused for.
	Entries(ctx context.Context, id order.ID) ([]Entry, error)
}
