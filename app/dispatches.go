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
type Dispatches struct{ store Store[DispatchTx] }

// NewDispatches returns the use cases over the dispatch service's database.
func NewDispatches(store Store[DispatchTx]) *Dispatches { return &Dispatches{store} }

// Assign gives the placed order to a courier and, in the same transaction, announces it. An order that has a courier
// keeps them: ErrDuplicate. It is Invalid if the event breaks a rule or tells of another order than the one that
// was dispatched under this id, and Exhausted if no courier on duty has room.
func (s *Dispatches) Assign(ctx context.Context, e event.OrderPlaced) error {
	job, err := jobOf(e)
	if err != nil {
		return err
	}
	return s.store.InTx(ctx, func(ctx context.Context, tx DispatchTx) error {
		courier, err := tx.Couriers.Take(ctx)
		if err != nil {
			return err
		}
		d := dispatch.New(job, courier, time.Now())
		err = tx.Dispatches.Add(ctx, d)
		if domain.KindOf(err) == domain.Conflict {
			return dispatchedBefore(ctx, tx, job)
		}
		if err != nil {
			return err
		}
		return tx.Outbox.Publish(ctx, event.DispatchAssigned{
			OrderID: e.OrderID, CourierID: courier.String(), AssignedAt: d.AssignedAt, Version: e.Version,
		})
	})
}

func jobOf(e event.OrderPlaced) (dispatch.Job, error) {
	id, err := order.ParseID(e.OrderID)
	if err != nil {
		return dispatch.Job{}, err
	}
	money, err := domain.NewMoney(e.Amount, e.Currency)
	if err != nil {
		return dispatch.Job{}, err
	}
	// The rules of an order hold for one that is announced, too: whatever is dispatched could have been placed.
	o, err := order.Place(id, e.Name, money, e.PlacedAt)
	if err != nil {
		return dispatch.Job{}, err
	}
	s := o.Snapshot()
	return dispatch.Job{OrderID: s.ID, Name: s.Name, Money: s.Money, PlacedAt: s.PlacedAt, OrderVersion: e.Version}, nil
}

// dispatchedBefore tells an announcement that is repeated under a new event id from one that contradicts the first.
// Either way the transaction is rolled back, and the courier who was taken has the room again.
func dispatchedBefore(ctx context.Context, tx DispatchTx, job dispatch.Job) error {
	stored, err := tx.Dispatches.Get(ctx, job.OrderID)
	if err != nil {
		return err
	}
	if stored.Job.Name != job.Name || stored.Job.Money != job.Money {
		return domain.Errorf(domain.Invalid, "order_mismatch",
			"order %s was dispatched with another name or amount than this event says", job.OrderID)
	}
	return ErrDuplicate
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
