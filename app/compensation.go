package app

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
)

// Compensation makes orders again that were announced and are not stored (补单): the order service rolled back after
// it had announced them, or lost them in a failover.
type Compensation struct {
	store   Store[OrderTx]
	breaker breaker
}

// NewCompensation returns the compensation over the order service's database. It stops when within a minute more than
// limit orders were missing and these were more than half of all announced: then it is not orders that are missing but
// the right database. Each process counts for itself and from its start, and what is in flight when it stops may still
// be made again.
func NewCompensation(store Store[OrderTx], limit int) *Compensation {
	return &Compensation{store: store, breaker: breaker{limit: limit}}
}

// Recreate stores the order that was announced, if it is missing, exactly as it was. It announces nothing: everybody
// else has had the announcement. Whether the order is missing is decided by its row's lock: the insert waits for a
// transaction that is just storing the same order, and so no time has to be guessed. It is Invalid if the event breaks
// a rule, or tells of another order than the one that is stored under this id, and Unavailable while the compensation
// is stopped and the order is missing.
func (s *Compensation) Recreate(ctx context.Context, e event.OrderPlaced) error {
	want, err := asAnnounced(e)
	if err != nil {
		return err
	}
	return s.recreate(ctx, want)
}

// RecreateMany is Recreate of several events when nothing is to be done, because all of these orders are stored as they
// were announced. Otherwise it is an error.
func (s *Compensation) RecreateMany(ctx context.Context, events []event.OrderPlaced) error {
	var announced []*order.Order
	for _, e := range events {
		want, err := asAnnounced(e)
		if err != nil {
			return err
		}
		announced = append(announced, want)
	}
	of, ids, err := byOrder(announced, func(o *order.Order) (order.ID, error) { return o.ID(), nil })
	if err != nil {
		return err
	}
	var stored []*order.Order
	err = s.store.View(ctx, func(ctx context.Context, tx OrderTx) (err error) {
		stored, err = tx.Orders.GetMany(ctx, ids)
		return err
	})
	if err != nil {
		return err
	}
	if len(stored) < len(ids) {
		return ErrAlone
	}
	for _, o := range stored {
		if err := sameOrder(o, of[o.ID()]); err != nil {
			return err
		}
	}
	for range stored {
		s.breaker.seen(false)
	}
	return nil
}

// RecreateCancelled is Recreate for an order that was announced as cancelled; without it a late announcement would
// make the order active again. It also cancels an order that is stored and not cancelled, because whoever announced
// that has seen it committed.
func (s *Compensation) RecreateCancelled(ctx context.Context, e event.OrderCancelled) error {
	want, err := asCancelled(e)
	if err != nil {
		return err
	}
	return s.recreate(ctx, want)
}

func (s *Compensation) recreate(ctx context.Context, want *order.Order) error {
	stored, err := s.find(ctx, want)
	switch {
	case err == nil && !ends(want, stored):
		s.breaker.seen(false)
		return nil
	case domain.KindOf(err) == domain.NotFound:
		if err := s.breaker.check(); err != nil {
			return err
		}
	case err != nil:
		return err
	}
	missing, err := s.Restore(ctx, want, "announced, and not so in this database")
	if err == nil || errors.Is(err, ErrDuplicate) {
		s.breaker.seen(missing)
	}
	return err
}

// ends reports whether the order that is stored would have to be cancelled to be as it is wanted.
func ends(want, stored *order.Order) bool {
	status := stored.Snapshot().Status
	return want.Snapshot().Status == order.Cancelled && status != order.Cancelled && status != order.Delivered
}

// find returns what is stored, which is enough to know that nothing is missing: rows are never deleted. It takes no
// transaction and leaves no trace in the inbox, because that is how nearly every announcement ends. That nothing is
// found says nothing: the row may be there and not yet committed.
func (s *Compensation) find(ctx context.Context, want *order.Order) (*order.Order, error) {
	var stored *order.Order
	err := s.store.View(ctx, func(ctx context.Context, tx OrderTx) (err error) {
		stored, err = tx.Orders.Get(ctx, want.Snapshot().ID)
		return err
	})
	if err != nil {
		return nil, err
	}
	return stored, sameOrder(stored, want)
}

func sameOrder(stored, want *order.Order) error {
	if !stored.SameRequest(want) {
		return domain.Errorf(domain.Invalid, "order_mismatch",
			"order %s is stored with another name or amount than this event says", want.Snapshot().ID)
	}
	return nil
}

// Restore stores the order if it is missing, with the reason in its history, and reports whether it was. If it is
// stored, it is cancelled if want is, unless it is delivered. It is Invalid if another order is stored under the id.
func (s *Compensation) Restore(ctx context.Context, want *order.Order, why string) (missing bool, err error) {
	w := want.Snapshot()
	err = s.store.InTx(ctx, func(ctx context.Context, tx OrderTx) error {
		missing = false
		err := tx.Orders.Add(ctx, want)
		if domain.KindOf(err) == domain.Conflict {
			return adapt(ctx, tx, want, why)
		}
		if err != nil {
			return err
		}
		missing = true
		return tx.History.Add(ctx, w.ID.String(), "recreated", because(ctx, why))
	})
	return missing, err
}

// adapt makes the order that is stored agree with what is wanted as far as it may.
func adapt(ctx context.Context, tx OrderTx, want *order.Order, why string) error {
	w := want.Snapshot()
	var cancelled bool
	err := tx.Orders.Update(ctx, w.ID, func(stored *order.Order) (bool, error) {
		if err := sameOrder(stored, want); err != nil || !ends(want, stored) {
			return false, err
		}
		cancelled = true
		changed, err := stored.Cancel(w.CancelReason, w.CancelledAt)
		stored.CatchUp(w.Version)
		return changed, err
	})
	if err != nil || !cancelled {
		return err
	}
	return tx.History.Add(ctx, w.ID.String(), "cancelled_again", because(ctx, why))
}

func because(ctx context.Context, why string) string {
	if d, ok := DeliveryFrom(ctx); ok {
		return fmt.Sprintf("%s; from event %s", why, d.EventID)
	}
	return why
}

// CompensationState is what the compensation of this process counted within the last minute, or when it stopped.
type CompensationState struct {
	Why       string // it stopped, empty if it did not
	Missing   int    // orders that were made again
	Announced int    // orders of which an event came
	Limit     int    // of missing ones
}

// Stopped returns an Unavailable error while the compensation is stopped: what must not be made again from announcements
// must not from tables either.
func (s *Compensation) Stopped() error { return s.breaker.check() }

// State returns whether the compensation stopped, and why.
func (s *Compensation) State() CompensationState { return s.breaker.state() }

// Resume lets the compensation go on for a person who has made sure that the orders are really missing, until the storm
// is over: it can stop again when a minute has passed in which it would not have. It does nothing if the compensation is
// not stopped. The reason is one that people can read, of 1 to order.MaxReason code points; otherwise the error is
// Invalid.
func (s *Compensation) Resume(reason string) error {
	if err := domain.CheckName("reason", reason, order.MaxReason); err != nil {
		return err
	}
	s.breaker.resume()
	return nil
}

// breaker stops when too many orders are missing. Once stopped it stays so until somebody resumes it.
type breaker struct {
	limit int

	mu                 sync.Mutex
	why                string
	resumed            bool      // by a person: does not stop until a minute was as it should be
	began              time.Time // of the minute that is counted
	announced, missing int
}

// seen counts an order. What comes while it is stopped is not counted, so that the numbers tell why it is.
func (b *breaker) seen(missing bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.why != "" {
		return
	}
	b.turn()
	b.announced++
	if missing {
		b.missing++
	}
	if b.suspicious() && !b.resumed {
		b.why = fmt.Sprintf("%d of %d announced orders were missing within a minute: this may be the wrong database, or one that lost data; "+
			"make sure, then POST /v1/compensation/resume or takeout compensation resume", b.missing, b.announced)
	}
}

func (b *breaker) suspicious() bool { return b.missing > b.limit && 2*b.missing > b.announced }

// turn begins a new minute if the last one is over.
func (b *breaker) turn() {
	age := time.Since(b.began)
	if age < time.Minute {
		return
	}
	b.resumed = b.resumed && b.suspicious() && age < 2*time.Minute
	b.began, b.announced, b.missing = time.Now(), 0, 0
}

func (b *breaker) check() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.why != "" {
		return domain.Errorf(domain.Unavailable, "compensation_stopped", "the compensation is stopped: %s", b.why)
	}
	return nil
}

func (b *breaker) state() CompensationState {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.why == "" {
		b.turn()
	}
	return CompensationState{Why: b.why, Missing: b.missing, Announced: b.announced, Limit: b.limit}
}

func (b *breaker) resume() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.why != "" {
		b.why, b.resumed, b.began, b.announced, b.missing = "", true, time.Now(), 0, 0
	}
}
