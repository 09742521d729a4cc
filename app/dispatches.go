package app

import (
	"cmp"
	"context"
	"time"

	"takeout/crashpoint"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
)

// Dispatches is what the dispatch service does: it sends one courier for each order.
type Dispatches struct {
	store  Store[DispatchTx]
	policy DispatchPolicy
	room   chan struct{} // holds a token when somebody may have room who had none
}

// DispatchPolicy says when an order is dispatched.
type DispatchPolicy struct {
	AfterPayment bool          // when it is paid, and not already when it is placed
	Deadline     time.Duration // how long after it was placed a courier must be found, without limit if zero
}

// NewDispatches returns the use cases over the dispatch service's database.
func NewDispatches(store Store[DispatchTx], policy DispatchPolicy) *Dispatches {
	return &Dispatches{store, policy, make(chan struct{}, 1)}
}

// AssignPlaced assigns a courier to an order that was placed, unless orders wait to be paid: then it only corrects what is
// known of the order. An order that had a courier before and is announced again gets the same one.
func (s *Dispatches) AssignPlaced(ctx context.Context, e event.OrderPlaced) error {
	job, err := placedTerms(e)
	switch {
	case err != nil:
		return err
	case e.Dispatch != nil:
		return s.restore(ctx, job, *e.Dispatch)
	case !s.policy.AfterPayment:
		return s.assign(ctx, job)
	case isFirst(e.Order):
		return nil
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		err := dispatchedBefore(ctx, tx, job)
		if domain.KindOf(err) == domain.NotFound {
			return nil
		}
		return err
	})
}

// isFirst reports whether the order was never changed before it was announced so.
func isFirst(e event.Order) bool { return e.Version == 1 }

// AssignPlacedMany is AssignPlaced of several events, all or none, if there is a courier for each.
func (s *Dispatches) AssignPlacedMany(ctx context.Context, events []event.OrderPlaced) error {
	jobs := make([]order.Terms, len(events))
	for i, e := range events {
		if e.Dispatch != nil || s.policy.AfterPayment && !isFirst(e.Order) {
			return ErrAlone
		}
		job, err := placedTerms(e)
		if err != nil {
			return err
		}
		jobs[i] = job
	}
	if s.policy.AfterPayment {
		return nil
	}
	return s.assignMany(ctx, jobs)
}

// AssignPaid assigns a courier to an order that is paid, if orders wait for that.
func (s *Dispatches) AssignPaid(ctx context.Context, e event.PaymentSucceeded) error {
	if !s.policy.AfterPayment {
		return nil
	}
	return s.Assign(ctx, e.Order)
}

// AssignPaidMany is AssignPaid of several events, all or none, if there is a courier for each.
func (s *Dispatches) AssignPaidMany(ctx context.Context, events []event.PaymentSucceeded) error {
	if !s.policy.AfterPayment {
		return nil
	}
	jobs := make([]order.Terms, len(events))
	for i, e := range events {
		job, err := termsOf(e.Order)
		if err != nil {
			return err
		}
		jobs[i] = job
	}
	return s.assignMany(ctx, jobs)
}

// assignMany is assign of several orders, if nobody has heard of them and there is a courier for each.
func (s *Dispatches) assignMany(ctx context.Context, jobs []order.Terms) error {
	return s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		couriers, err := tx.Couriers.TakeAll(ctx, len(jobs))
		if err != nil {
			return err
		}
		now := time.Now()
		dispatches, announcements := make([]dispatch.Dispatch, len(jobs)), make([]event.Event, len(jobs))
		for i, job := range jobs {
			dispatches[i] = dispatch.New(job, couriers[i], now)
			announcements[i] = assignedEvent(dispatches[i])
		}
		if err := tx.Dispatches.AddMany(ctx, dispatches); err != nil {
			return err
		}
		return tx.Outbox.Publish(ctx, announcements...)
	})
}

// Assign gives the order to a courier and, in the same transaction, announces it. If no courier on duty has room, or
// others wait for one already, the order waits for AssignWaiting. An order that is known keeps what it has:
// ErrDuplicate. It is Invalid if the event breaks a rule or tells of another order than the one that is known under
// this id.
func (s *Dispatches) Assign(ctx context.Context, e event.Order) error {
	job, err := termsOf(e)
	if err != nil {
		return err
	}
	return s.assign(ctx, job)
}

func (s *Dispatches) assign(ctx context.Context, job order.Terms) error {
	return s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		courier, err := tx.Couriers.Take(ctx)
		d := dispatch.New(job, courier, time.Now())
		if domain.KindOf(err) == domain.Exhausted {
			d, err = dispatch.Wait(job), nil
		}
		if err != nil {
			return err
		}
		err = tx.Dispatches.Add(ctx, d)
		if domain.KindOf(err) == domain.Conflict {
			if err := free(ctx, tx, d); err != nil {
				return err
			}
			return dispatchedBefore(ctx, tx, job)
		}
		if err != nil || !d.Active() {
			return err
		}
		return tx.Outbox.Publish(ctx, assignedEvent(d))
	})
}

// free gives back the room that the dispatch takes at its courier, if it has one.
func free(ctx context.Context, tx DispatchTx, d dispatch.Dispatch) error {
	if !d.Active() {
		return nil
	}
	return tx.Couriers.Count(ctx, d.CourierID, -1)
}

func assignedEvent(d dispatch.Dispatch) event.DispatchAssigned {
	return event.DispatchAssigned{
		OrderID: d.Job.OrderID.String(), CourierID: d.CourierID.String(), AssignedAt: d.AssignedAt, Version: d.Job.Version,
	}
}

func deliveredEvent(d dispatch.Dispatch) event.DispatchDelivered {
	return event.DispatchDelivered{
		OrderID: d.Job.OrderID.String(), CourierID: d.CourierID.String(), AssignedAt: d.AssignedAt,
		DeliveredAt: d.DeliveredAt, Version: d.Job.Version,
	}
}

// waitingBatch is how many waiting orders one transaction decides about: their rows and the couriers are locked until its
// end.
const waitingBatch = 50

// AssignWaiting decides about orders that wait, the oldest first: those that have waited past the deadline are given up,
// and others get a courier while there is room. Each decision is announced in the transaction that makes it. It decides
// about a bounded number and reports whether there may be more to do at once. Any number of processes may do so. A row
// that holds what no dispatch can be is an error that keeps no others waiting.
func (s *Dispatches) AssignWaiting(ctx context.Context) (more bool, err error) {
	var decided int
	var damaged error
	err = s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) (err error) {
		decided = 0
		damaged, err = tx.Dispatches.UpdateWaiting(ctx, waitingBatch, func(waiting []dispatch.Dispatch) (int, error) {
			announcements, err := s.decide(ctx, tx, waiting)
			if err != nil {
				return 0, err
			}
			decided = len(announcements)
			err = tx.Outbox.Publish(ctx, announcements...)
			if decided > 0 {
				crashpoint.Here("dispatch.assign-waiting/before-commit")
			}
			return decided, err
		})
		return err
	})
	if decided > 0 {
		crashpoint.Here("dispatch.assign-waiting/after-commit")
	}
	return err == nil && decided == waitingBatch, cmp.Or(err, damaged)
}

// decide gives up those of the orders that are late, which come first, and then gives as many to couriers as there is
// room for. It returns an announcement of each decision.
func (s *Dispatches) decide(ctx context.Context, tx DispatchTx, waiting []dispatch.Dispatch) ([]event.Event, error) {
	var announcements []event.Event
	now, late := time.Now(), 0
	for ; late < len(waiting) && s.policy.Deadline > 0 && now.Sub(waiting[late].Job.PlacedAt) > s.policy.Deadline; late++ {
		d := &waiting[late]
		d.GiveUp(now)
		announcements = append(announcements, event.DispatchImpossible{Order: orderEvent(d.Job), GivenUpAt: d.ReleasedAt})
	}
	couriers, err := tx.Couriers.TakeMany(ctx, len(waiting)-late)
	if err != nil {
		return nil, err
	}
	for i, courier := range couriers {
		d := &waiting[late+i]
		d.Assign(courier, now)
		announcements = append(announcements, assignedEvent(*d))
	}
	return announcements, nil
}

// restore stores the dispatch that the order service knows of, if it is missing here, or waits because it was lost.
func (s *Dispatches) restore(ctx context.Context, job order.Terms, known event.Courier) error {
	courier, err := courierOf(known.CourierID, known.AssignedAt)
	if err != nil {
		return err
	}
	d := dispatch.New(job, courier, known.AssignedAt)
	if at := known.DeliveredAt; at != nil {
		if _, err := d.MarkDelivered(*at); err != nil {
			return err
		}
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		err := tx.Dispatches.Add(ctx, d)
		if domain.KindOf(err) == domain.Conflict {
			var waited bool
			err = tx.Dispatches.Update(ctx, job.OrderID, func(stored *dispatch.Dispatch) (bool, error) {
				waited = stored.Restore(d)
				return waited, nil
			})
			if err == nil && !waited {
				return dispatchedBefore(ctx, tx, job)
			}
		}
		if err == nil && d.Active() {
			err = tx.Couriers.Count(ctx, courier, 1)
		}
		if err != nil {
			return err
		}
		return tx.History.Add(ctx, job.OrderID.String(), "dispatch_restored", "the dispatch was missing and is as the order service knows it: courier "+courier.String())
	})
}

// dispatchedBefore tells an announcement that is repeated under a new event id, ErrDuplicate, from one that contradicts
// the first, and from a newer one that corrects it.
func dispatchedBefore(ctx context.Context, tx DispatchTx, job order.Terms) error {
	stored, err := tx.Dispatches.Get(ctx, job.OrderID) // a shared lock: several who repeat it do not wait for each other
	if err != nil {
		return err
	}
	newer := job.Newer(stored.Job)
	if _, err := stored.Job.Correct(job); err != nil {
		return err
	}
	if !newer {
		return ErrDuplicate
	}
	var corrected bool
	err = tx.Dispatches.Update(ctx, job.OrderID, func(d *dispatch.Dispatch) (newer bool, err error) {
		newer = job.Newer(d.Job)
		corrected, err = d.Job.Correct(job)
		return newer, err
	})
	if err != nil || !corrected {
		return err
	}
	return tx.History.Add(ctx, job.OrderID.String(), "dispatch_corrected", "name and time are as the order service knows them now")
}

// Room returns a channel that gives a value after this process has made room at a courier: it is time to AssignWaiting.
func (s *Dispatches) Room() <-chan struct{} { return s.room }

func (s *Dispatches) roomMade(err error) {
	if err != nil {
		return
	}
	select {
	case s.room <- struct{}{}:
	default: // it will be looked at
	}
}

// Release takes back the courier of an order that is cancelled. If the order is not known yet, that is recorded, and
// no courier will be sent for it. What is delivered stays delivered.
func (s *Dispatches) Release(ctx context.Context, e event.OrderCancelled) error {
	job, err := cancelledTerms(e)
	if err != nil {
		return err
	}
	var before dispatch.Dispatch
	err = s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		err := tx.Dispatches.Update(ctx, job.OrderID, func(d *dispatch.Dispatch) (bool, error) {
			before = *d
			released := d.Release(e.CancelledAt)
			// What contradicts the order that was dispatched cancels it all the same.
			newer := job.Newer(d.Job)
			_, err := d.Job.Correct(job)
			return released || err == nil && newer, nil
		})
		switch {
		case domain.KindOf(err) == domain.NotFound:
			return tx.Dispatches.Add(ctx, dispatch.End(job, dispatch.Released, e.CancelledAt))
		case err != nil:
			return err
		case before.State == dispatch.Delivered:
			return tx.History.Add(ctx, e.OrderID, "cancelled_after_delivery", "the order was cancelled after the courier had brought it")
		}
		return free(ctx, tx, before)
	})
	if before.Active() {
		s.roomMade(err)
	}
	return err
}

// MarkDelivered records that the courier brought the order, and announces it. Doing so again changes nothing. NotFound
// if the order has no dispatch, Conflict if no courier is on the way.
func (s *Dispatches) MarkDelivered(ctx context.Context, id order.ID) (dispatch.Dispatch, error) {
	var delivered dispatch.Dispatch
	err := s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		var changed bool
		err := tx.Dispatches.Update(ctx, id, func(d *dispatch.Dispatch) (_ bool, err error) {
			changed, err = d.MarkDelivered(time.Now())
			delivered = *d
			return changed, err
		})
		if err != nil || !changed {
			return err
		}
		if err := tx.Couriers.Count(ctx, delivered.CourierID, -1); err != nil {
			return err
		}
		return tx.Outbox.Publish(ctx, deliveredEvent(delivered))
	})
	s.roomMade(err)
	return delivered, err
}

// Get returns the dispatch of an order. NotFound if there is none.
func (s *Dispatches) Get(ctx context.Context, id order.ID) (dispatch.Dispatch, error) {
	var d dispatch.Dispatch
	err := s.store.View(ctx, func(ctx context.Context, tx DispatchTx) (err error) {
		d, err = tx.Dispatches.Get(ctx, id)
		return err
	})
	return d, err
}

// AddCourier puts a courier on the roster. Conflict if the id is taken.
func (s *Dispatches) AddCourier(ctx context.Context, c dispatch.Courier) error {
	ran := false
	err := s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		again := ran
		ran = true
		taken := tx.Couriers.Add(ctx, c)
		if domain.KindOf(taken) != domain.Conflict || !again {
			return taken
		}
		// It may be our own, from a COMMIT without an answer.
		_, err := tx.Couriers.Update(ctx, c.ID(), func(stored dispatch.Courier) (dispatch.Courier, error) {
			if stored.SameAs(c) {
				return stored, nil
			}
			return stored, taken
		})
		return err
	})
	s.roomMade(err)
	return err
}

// ChangeCourier changes those of the courier's values that are not nil and returns the courier. NotFound if there
// is none, Invalid if a value breaks a rule.
func (s *Dispatches) ChangeCourier(ctx context.Context, id dispatch.CourierID, name *string, onDuty *bool, capacity *int) (dispatch.Courier, error) {
	var changed dispatch.Courier
	err := s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) (err error) {
		changed, err = tx.Couriers.Update(ctx, id, func(c dispatch.Courier) (dispatch.Courier, error) {
			return c.Change(name, onDuty, capacity)
		})
		return err
	})
	s.roomMade(err)
	return changed, err
}

// Couriers returns the roster.
func (s *Dispatches) Couriers(ctx context.Context) ([]dispatch.Courier, error) {
	var couriers []dispatch.Courier
	err := s.store.View(ctx, func(ctx context.Context, tx DispatchTx) (err error) {
		couriers, err = tx.Couriers.List(ctx)
		return err
	})
	return couriers, err
}

// Backlog returns what waits for a courier.
func (s *Dispatches) Backlog(ctx context.Context) (dispatch.Backlog, error) {
	var b dispatch.Backlog
	err := s.store.View(ctx, func(ctx context.Context, tx DispatchTx) (err error) {
		b, err = tx.Dispatches.Backlog(ctx)
		return err
	})
	return b, err
}
