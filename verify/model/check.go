package model

import (
	"fmt"

	"takeout/app/reconcile"
	"takeout/domain/dispatch"
	"takeout/domain/order"
)

// quiescent reports whether nothing is under way, and the reconciler has nothing to repair.
func (x *explorer) quiescent(s *state) bool {
	for i := range s.messages {
		if s.messages[i].event != 0 && s.messages[i].underWay() {
			return false
		}
	}
	for o := range x.Orders {
		if s.clients[o].open || x.dispatch(s, o).State == dispatch.Waiting {
			return false
		}
		if _, repair := reconcile.JudgeDispatch(x.records(s, o)); repair != nil && !x.NoReconciler {
			return false
		}
	}
	return true
}

// check returns the invariant that the state violates and how, empty if it violates none.
func (x *explorer) check(s *state, quiescent bool) string {
	if s.unprovoked {
		return "I10: a message came to a consumer twice, and no fault was the reason"
	}
	for o := range x.Orders {
		violation := x.always(s, o)
		if violation == "" && quiescent {
			violation = x.atRest(s, o)
		}
		if violation != "" {
			return fmt.Sprintf("%s (order %d)", violation, o)
		}
	}
	return ""
}

// maxVersion is more than any order needs. Without a bound, corrections that correct nothing would be new states for ever.
const maxVersion = 12

// always checks what holds at every moment.
func (x *explorer) always(s *state, o int) string {
	c, row, d := &s.clients[o], x.row(s, o), x.dispatch(s, o)
	switch {
	case c.place == refused:
		return "I6: the request was accepted before, and now it is refused"
	case c.sent > 1:
		return "I3: two couriers were sent"
	case c.released && d.Active():
		return "I5: the dispatch was released and is active again"
	case c.cancel == accepted && !s.failedOver && row != none && row.Status != order.Cancelled:
		return "I5: the order was cancelled and is active again"
	case c.cancel == refused && row.Status == order.Cancelled && row.CancelReason != order.ReasonNoCourier:
		return "I7: the cancellation was refused and took effect"
	case row.Version > maxVersion:
		return "I4: the order is corrected again and again"
	case c.requests == 0 && (row != none || d != nobody):
		return "I7: nobody asked for it"
	}
	return ""
}

// none and nobody stand for rows that are not there.
var (
	none   order.Snapshot
	nobody dispatch.Dispatch
)

// atRest checks what holds when nothing is under way and everything that can be repaired is.
func (x *explorer) atRest(s *state, o int) string {
	c, row, d := &s.clients[o], x.row(s, o), x.dispatch(s, o)
	// What the order database lost before anybody had heard of it nobody can bring back.
	failedOver := s.failedOver && !x.DispatchFails
	placeLost, cancelLost := failedOver && !c.placeTold, failedOver && !c.cancelTold
	// Nor can a cancellation that it lost undo what the courier was faster with.
	cancelLost = cancelLost || failedOver && d.State == dispatch.Delivered
	cancelled := row.Status == order.Cancelled
	class, _ := reconcile.JudgeDispatch(x.records(s, o))
	switch {
	case row == none && d != nobody:
		return "I2: there is a dispatch and no order"
	case row == none && c.place == accepted && !placeLost:
		return "I1: the order was accepted and is not there"
	case row != none && d == nobody:
		return "I1: the order was not dispatched"
	case cancelled && c.cancel == unasked && row.CancelReason != order.ReasonNoCourier:
		return "I7: nobody cancelled the order"
	case c.cancel == accepted && row != none && !cancelled && !cancelLost:
		return "I5: the cancellation is lost"
	case cancelled && d.Active():
		return "I5: the order is cancelled and dispatched"
	case row != none && !cancelled && (row.CourierID != d.CourierID.String() || row.Status.String() != progress[d.State]):
		return "I11: the order is " + row.Status.String() + " and its dispatch is " + d.State.String()
	case row != none && (row.Name != d.Job.Name || row.Money != d.Job.Money || !row.PlacedAt.Equal(d.Job.PlacedAt)):
		return "I16: the order and its dispatch are about something else"
	case class != "" && !x.NoReconciler:
		return "I11: a person must decide about a case of " + class
	}
	return ""
}

// progress is what the status of an order is that is not cancelled.
var progress = map[dispatch.State]string{dispatch.Assigned: "dispatched", dispatch.Delivered: "delivered"}

func (x *explorer) row(s *state, o int) order.Snapshot {
	if n := s.rows[o]; n != 0 {
		return x.rows.value(n)
	}
	return none
}

func (x *explorer) dispatch(s *state, o int) dispatch.Dispatch {
	if n := s.dispatches[o]; n != 0 {
		return x.dispatches.value(n)
	}
	return nobody
}
