// Package dispatch is the dispatch: which courier takes which order, and the roster of couriers.
package dispatch

import (
	"context"
	"time"

	"takeout/domain"
	"takeout/domain/order"
)

// Job is what the dispatch side knows of the order that it dispatches, taken from the order's event.
type Job struct {
	OrderID      order.ID
	Name         string
	Money        domain.Money
	PlacedAt     time.Time // UTC
	OrderVersion int64     // the order's version that the event told of
}

// State is what became of a dispatch. It is a struct so that no other value than these can exist.
type State struct{ s string }

// Assigned is the state of a dispatch whose courier is on the way.
var Assigned = State{"assigned"}

// String returns the state's name.
func (s State) String() string { return s.s }

// RestoreState is for stores only: it trusts the text.
func RestoreState(s string) State { return State{s} }

// Dispatch is the one courier of one order.
type Dispatch struct {
	Job        Job
	CourierID  CourierID
	State      State
	AssignedAt time.Time // UTC, to the microsecond
}

// New assigns the courier to the job.
func New(job Job, courier CourierID, at time.Time) Dispatch {
	return Dispatch{Job: job, CourierID: courier, State: Assigned, AssignedAt: at.UTC().Truncate(time.Microsecond)}
}

// Repository stores dispatches. It is bound to the transaction that it was made for.
type Repository interface {
	// Add stores the dispatch of an order. Conflict if the order has one.
	Add(ctx context.Context, d Dispatch) error
	// Get returns the dispatch of an order. NotFound if there is none.
	Get(ctx context.Context, id order.ID) (Dispatch, error)
}
