// Package dispatch is the dispatch: which courier takes which order, and the roster of couriers.
package dispatch

import (
	"context"
	"time"

	"takeout/domain"
	"takeout/domain/order"
)

// State is what became of a dispatch. It is a struct so that no text is taken for one by mistake.
type State struct{ s string }

// The states. An order waits while no courier has room; it is impossible if none had in time, and released if the
// order was cancelled, before or after it had a courier.
var (
	Waiting    = State{"waiting"}
	Assigned   = State{"assigned"}
	Delivered  = State{"delivered"}
	Released   = State{"released"}
	Impossible = State{"impossible"}
)

// String returns the state's name.
func (s State) String() string { return s.s }

// RestoreState is for stores only: it trusts the text.
func RestoreState(s string) State { return State{s} }

// Dispatch is what became of one order at the dispatch service. There is one for each order, also for one that was
// cancelled before it was announced: it keeps a late announcement from sending a courier.
type Dispatch struct {
	Job         order.Terms // of the order
	CourierID   CourierID   // zero if nobody was found
	State       State
	AssignedAt  time.Time // zero without a courier, UTC, to the microsecond
	DeliveredAt time.Time // zero until delivered, UTC
	ReleasedAt  time.Time // zero until released or impossible, UTC
}

// New assigns the courier to the job.
func New(job order.Terms, courier CourierID, at time.Time) Dispatch {
	return Dispatch{Job: job, CourierID: courier, State: Assigned, AssignedAt: domain.Micro(at)}
}

// Wait is the dispatch of a job that nobody has room for.
func Wait(job order.Terms) Dispatch { return Dispatch{Job: job, State: Waiting} }

// End is the dispatch of a job that nobody will do: Released or Impossible.
func End(job order.Terms, state State, at time.Time) Dispatch {
	return Dispatch{Job: job, State: state, ReleasedAt: domain.Micro(at)}
}

// Assign gives a waiting job to the courier, and reports whether the dispatch changed.
func (d *Dispatch) Assign(courier CourierID, at time.Time) bool {
	if d.State != Waiting {
		return false
	}
	d.State, d.CourierID, d.AssignedAt = Assigned, courier, domain.Micro(at)
	return true
}

// Restore puts known, an earlier state of the same dispatch that was lost, in the place of one that waits, and reports
// whether it did.
func (d *Dispatch) Restore(known Dispatch) bool {
	if d.State != Waiting || d.Job.Name != known.Job.Name || d.Job.Money != known.Job.Money {
		return false
	}
	*d = known
	return true
}

// Active reports whether a courier is on the way.
func (d *Dispatch) Active() bool { return d.State == Assigned }

// Release ends a dispatch whose order is cancelled, and reports whether it changed: what is delivered or ended stays
// so.
func (d *Dispatch) Release(at time.Time) bool { return d.end(Released, at) }

// GiveUp ends a dispatch that waited too long, and reports whether it changed.
func (d *Dispatch) GiveUp(at time.Time) bool {
	return d.State == Waiting && d.end(Impossible, at)
}

func (d *Dispatch) end(state State, at time.Time) bool {
	if d.State != Waiting && d.State != Assigned {
		return false
	}
	d.State, d.ReleasedAt = state, domain.Micro(at)
	return true
}

// MarkDelivered records that the courier brought the order, and reports whether the dispatch changed. Conflict if no
// courier is on the way.
func (d *Dispatch) MarkDelivered(at time.Time) (bool, error) {
	switch d.State {
	case Delivered:
		return false, nil
	case Assigned:
		d.State, d.DeliveredAt = Delivered, domain.Micro(at)
		return true, nil
	}
	return false, domain.Errorf(domain.Conflict, "not_on_the_way", "no courier is on the way with order %s: its dispatch is %s", d.Job.OrderID, d.State)
}

// Repository stores dispatches. It is bound to the transaction that it was made for.
type Repository interface {
	// Add stores the dispatch of an order. Conflict if the order has one.
	Add(ctx context.Context, d Dispatch) error
	// AddMany stores dispatches of different orders, all or none. Conflict if one of the orders has a dispatch. Concurrent
	// transactions that do so do not deadlock.
	AddMany(ctx context.Context, all []Dispatch) error
	// Get returns the dispatch of an order. NotFound if there is none. In a transaction it sees whatever Add was refused
	// for, and nobody changes what it returned before the transaction ends.
	Get(ctx context.Context, id order.ID) (Dispatch, error)
	// Update locks the dispatch, lets change modify it, and saves it if change reports true. NotFound if there is
	// none.
	Update(ctx context.Context, id order.ID, change func(*Dispatch) (bool, error)) error
	// UpdateWaiting locks at most limit of the dispatches that wait, those of the oldest orders first, lets change
	// modify them in this order, and saves as many of the first as change returns. It leaves out what somebody else
	// has locked, and does not call change if nothing is left. damaged is not nil if it left out a row that holds what
	// no dispatch can be.
	UpdateWaiting(ctx context.Context, limit int, change func([]Dispatch) (int, error)) (damaged, err error)
	// Backlog returns what waits.
	Backlog(ctx context.Context) (Backlog, error)
}

// MaxBacklog is how far waiting orders are counted.
const MaxBacklog = 100_000

// Backlog is what waits for a courier.
type Backlog struct {
	Waiting int       // orders, counted up to MaxBacklog
	Oldest  time.Time // when the one that was placed first was placed, zero if none waits, UTC
	OnDuty  bool      // whether any courier is on duty
}
