package app

import (
	"context"
	"time"

	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
)

// Dispatches is what the dispatch service does: it sends one courier for each order.
type Dispatches struct {
	store  Store[DispatchTx]
	policy DispatchPolicy
}

// DispatchPolicy says when an order is dispatched.
type DispatchPolicy struct {
	AfterPayment bool          // when it is paid, and not already when it is placed
	Deadline     time.Duration // how long after it was placed a courier must be found, without limit if zero
}

// NewDispatches returns the use cases over the dispatch service's database.
func NewDispatches(store Store[DispatchTx], policy DispatchPolicy) *Dispatches {
	return &Dispatches{store, policy}
}

// AssignPlaced assigns a courier to an order that was placed, unless orders wait to be paid. An order that had a
// courier before and is announced again gets the same one.
func (s *Dispatches) AssignPlaced(ctx context.Context, e event.OrderPlaced) error {
	if e.Dispatch != nil {
		return s.restore(ctx, e)
	}
	if s.policy.AfterPayment {
		return nil
	}
	return s.Assign(ctx, e.Order)
}

// AssignPaid assigns a courier to an order that is paid, if orders wait for that.
func (s *Dispatches) AssignPaid(ctx context.Context, e event.PaymentSucceeded) error {
	if !s.policy.AfterPayment {
		return nil
	}
	return s.Assign(ctx, e.Order)
}

// Assign gives the order to a courier and, in the same transaction, announces it. An order that has a dispatch keeps
// it: ErrDuplicate. It is Invalid if the event breaks a rule or tells of another order than the one that was dispatched
// under this id. If no courier on duty has room, the order waits and the error is Exhausted, until the deadline has
// passed: then it is announced that there will be none.
func (s *Dispatches) Assign(ctx context.Context, e event.Order) error {
	job, err := jobOf(e)
	if err != nil {
		return err
	}
	err = s.assign(ctx, job)
	if domain.KindOf(err) != domain.Exhausted {
		return err
	}
	if s.policy.Deadline > 0 && time.Since(job.PlacedAt) > s.policy.Deadline {
		return s.giveUp(ctx, e, job)
	}
	if waitErr := s.wait(WithoutDelivery(ctx), job); waitErr != nil {
		return waitErr
	}
	return err
}

func (s *Dispatches) assign(ctx context.Context, job dispatch.Job) error {
	return s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		courier, err := tx.Couriers.Take(ctx)
		if err != nil {
			// Nobody is needed for an order that has a courier, or is not wanted any more.
			if stored, getErr := tx.Dispatches.Get(ctx, job.OrderID); getErr == nil && stored.State != dispatch.Waiting {
				return dispatchedBefore(ctx, tx, job)
			}
			return err
		}
		d := dispatch.New(job, courier, time.Now())
		err = tx.Dispatches.Add(ctx, d)
		if domain.KindOf(err) == domain.Conflict {
			waited, err := s.assignWaiting(ctx, tx, job, courier, d.AssignedAt)
			if err != nil || !waited {
				return err
			}
		} else if err != nil {
			return err
		}
		return tx.Outbox.Publish(ctx, event.DispatchAssigned{
			OrderID: job.OrderID.String(), CourierID: courier.String(), AssignedAt: d.AssignedAt, Version: job.OrderVersion,
		})
	})
}

// assignWaiting gives the courier to an order that is known: to one that waited, and to no other.
func (s *Dispatches) assignWaiting(ctx context.Context, tx DispatchTx, job dispatch.Job, courier dispatch.CourierID, at time.Time) (waited bool, err error) {
	err = tx.Dispatches.Update(ctx, job.OrderID, func(d *dispatch.Dispatch) (bool, error) {
		if !sameJob(d.Job, job) {
			return false, nil
		}
		waited = d.Assign(courier, at)
		return waited, nil
	})
	if err != nil || waited {
		return waited, err
	}
	if err := tx.Couriers.Count(ctx, courier, -1); err != nil {
		return false, err
	}
	return false, dispatchedBefore(ctx, tx, job)
}

// wait records that the order is known and waits for a courier.
func (s *Dispatches) wait(ctx context.Context, job dispatch.Job) error {
	return s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		_, err := tx.Dispatches.Get(ctx, job.OrderID)
		if domain.KindOf(err) == domain.NotFound {
			err = tx.Dispatches.Add(ctx, dispatch.Wait(job))
		}
		if domain.KindOf(err) == domain.Conflict {
			return nil
		}
		return err
	})
}

// giveUp records and announces that no courier was found in time.
func (s *Dispatches) giveUp(ctx context.Context, e event.Order, job dispatch.Job) error {
	at := time.Now()
	return s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		changed := true
		err := tx.Dispatches.Update(ctx, job.OrderID, func(d *dispatch.Dispatch) (bool, error) {
			changed = d.GiveUp(at)
			return changed, nil
		})
		if domain.KindOf(err) == domain.NotFound {
			err = tx.Dispatches.Add(ctx, dispatch.End(job, dispatch.Impossible, at))
		}
		if err != nil || !changed {
			return err
		}
		return tx.Outbox.Publish(ctx, event.DispatchImpossible{Order: e, GivenUpAt: at.UTC().Truncate(time.Microsecond)})
	})
}

// restore stores the dispatch that the order service knows of, if it is missing here.
func (s *Dispatches) restore(ctx context.Context, e event.OrderPlaced) error {
	job, err := jobOf(e.Order)
	if err != nil {
		return err
	}
	courier, err := dispatch.ParseCourierID(e.Dispatch.CourierID)
	if err != nil {
		return err
	}
	d := dispatch.New(job, courier, e.Dispatch.AssignedAt)
	if at := e.Dispatch.DeliveredAt; at != nil {
		if _, err := d.MarkDelivered(*at); err != nil {
			return err
		}
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		err := tx.Dispatches.Add(ctx, d)
		if domain.KindOf(err) == domain.Conflict {
			return dispatchedBefore(ctx, tx, job)
		}
		if err == nil && d.Active() {
			err = tx.Couriers.Count(ctx, courier, 1)
		}
		if err != nil {
			return err
		}
		return tx.History.Add(ctx, e.OrderID, "dispatch_restored", "the dispatch was missing and is as the order service knows it: courier "+courier.String())
	})
}

func jobOf(e event.Order) (dispatch.Job, error) {
	// The rules of an order hold for one that is announced, too: whatever is dispatched could have been placed.
	o, err := rebuild(e)
	if err != nil {
		return dispatch.Job{}, err
	}
	s := o.Snapshot()
	return dispatch.Job{OrderID: s.ID, Name: s.Name, Money: s.Money, PlacedAt: s.PlacedAt, OrderVersion: e.Version}, nil
}

func sameJob(a, b dispatch.Job) bool { return a.Name == b.Name && a.Money == b.Money }

// dispatchedBefore tells an announcement that is repeated under a new event id from one that contradicts the first.
// A newer version of the order corrects what is kept of it, but never an amount. Unless it does, the transaction is
// rolled back, and a courier who was taken has the room again.
func dispatchedBefore(ctx context.Context, tx DispatchTx, job dispatch.Job) error {
	var corrected bool
	err := tx.Dispatches.Update(ctx, job.OrderID, func(d *dispatch.Dispatch) (bool, error) {
		if d.Job.Money != job.Money || d.Job.Name != job.Name && job.OrderVersion <= d.Job.OrderVersion {
			return false, domain.Errorf(domain.Invalid, "order_mismatch",
				"order %s was dispatched with another name or amount than this event says", job.OrderID)
		}
		corrected = correct(d, job)
		return corrected, nil
	})
	if err != nil {
		return err
	}
	if corrected {
		return tx.History.Add(ctx, job.OrderID.String(), "dispatch_corrected", "name and time are as the order service knows them now")
	}
	return ErrDuplicate
}

// correct takes over what a newer version of the order says, and reports whether that was something else. An amount it
// never takes over.
func correct(d *dispatch.Dispatch, job dispatch.Job) bool {
	same := d.Job.Name == job.Name && d.Job.PlacedAt.Equal(job.PlacedAt)
	if same || job.OrderVersion <= d.Job.OrderVersion || d.Job.Money != job.Money {
		return false
	}
	d.Job = job
	return true
}

// Release takes back the courier of an order that is cancelled. If the order is not known yet, that is recorded, and
// no courier will be sent for it. What is delivered stays delivered.
func (s *Dispatches) Release(ctx context.Context, e event.OrderCancelled) error {
	job, err := jobOf(e.Order)
	if err != nil {
		return err
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		var before, after dispatch.Dispatch
		err := tx.Dispatches.Update(ctx, job.OrderID, func(d *dispatch.Dispatch) (bool, error) {
			before = *d
			released, corrected := d.Release(e.CancelledAt), correct(d, job)
			after = *d
			return released || corrected, nil
		})
		switch {
		case domain.KindOf(err) == domain.NotFound:
			return tx.Dispatches.Add(ctx, dispatch.End(job, dispatch.Released, e.CancelledAt))
		case err != nil:
			return err
		case before.Active() && !after.Active():
			return tx.Couriers.Count(ctx, before.CourierID, -1)
		case before.State == dispatch.Delivered:
			return tx.History.Add(ctx, e.OrderID, "cancelled_after_delivery", "the order was cancelled after the courier had brought it")
		}
		return nil
	})
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
		return tx.Outbox.Publish(ctx, event.DispatchDelivered{
			OrderID: id.String(), CourierID: delivered.CourierID.String(), AssignedAt: delivered.AssignedAt,
			DeliveredAt: delivered.DeliveredAt, Version: delivered.Job.OrderVersion,
		})
	})
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
	return s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error { return tx.Couriers.Add(ctx, c) })
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
