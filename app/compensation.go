package app

import (
	"context"
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
// the right database.
func NewCompensation(store Store[OrderTx], limit int) *Compensation {
	return &Compensation{store: store, breaker: breaker{limit: limit}}
}

// Recreate stores the order that was announced, if it is missing, exactly as it was. It announces nothing: everybody
// else has had the announcement. Whether the order is missing is decided by its row's lock: the insert waits for a
// transaction that is just storing the same order, and so no time has to be guessed. It is Invalid if the event breaks
// a rule, or tells of another order than the one that is stored under this id, and Unavailable while the breaker is
// open.
func (s *Compensation) Recreate(ctx context.Context, e event.OrderPlaced) error {
	want, err := rebuild(e.Order)
	if err != nil {
		return err
	}
	if d := e.Dispatch; d != nil {
		want.MarkDispatched(d.CourierID, d.AssignedAt)
		if d.DeliveredAt != nil {
			want.MarkDelivered(d.CourierID, d.AssignedAt, *d.DeliveredAt)
		}
	}
	return s.recreate(ctx, want)
}

// RecreateCancelled is Recreate for an order that was announced as cancelled; without it a late announcement would
// make the order active again. It also cancels an order that is stored and not cancelled, because whoever announced
// that has seen it committed.
func (s *Compensation) RecreateCancelled(ctx context.Context, e event.OrderCancelled) error {
	want, err := rebuild(e.Order)
	if err != nil {
		return err
	}
	if _, err := want.Cancel(e.Reason, e.CancelledAt); err != nil {
		return err
	}
	return s.recreate(ctx, want)
}

// rebuild returns the order of the event as it was placed. The rules of an order hold for one that is announced, too.
func rebuild(e event.Order) (*order.Order, error) {
	id, err := order.ParseID(e.OrderID)
	if err != nil {
		return nil, err
	}
	money, err := domain.NewMoney(e.Amount, e.Currency)
	if err != nil {
		return nil, err
	}
	return order.Place(id, e.Name, money, e.PlacedAt)
}

func (s *Compensation) recreate(ctx context.Context, want *order.Order) error {
	stored, err := s.find(ctx, want)
	if err == nil && (want.Snapshot().Status != order.Cancelled || final(stored)) {
		s.breaker.seen(false)
		return nil
	}
	if err != nil && domain.KindOf(err) != domain.NotFound {
		return err
	}
	if domain.KindOf(err) == domain.NotFound {
		if err := s.breaker.check(); err != nil {
			return err
		}
	}
	var missing bool
	err = s.Restore(ctx, want, "announced and not stored", &missing)
	if err == nil {
		s.breaker.seen(missing)
	}
	return err
}

func final(o *order.Order) bool {
	status := o.Snapshot().Status
	return status == order.Cancelled || status == order.Delivered
}

// find returns what is stored, which is enough to know that nothing is missing: rows are never deleted. That nothing
// is found says nothing: the row may be there and not yet committed.
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

// Restore stores the order if it is missing, with the reason in its history, and sets missing to whether it was. If it
// is stored, it is cancelled if want is, unless it is delivered. It is Invalid if another order is stored under the id.
func (s *Compensation) Restore(ctx context.Context, want *order.Order, why string, missing *bool) error {
	w := want.Snapshot()
	return s.store.InTx(ctx, func(ctx context.Context, tx OrderTx) error {
		*missing = false
		err := tx.Orders.Add(ctx, want)
		if err == nil {
			*missing = true
			return tx.History.Add(ctx, w.ID.String(), "recreated", restoredBecause(ctx, why))
		}
		if domain.KindOf(err) != domain.Conflict {
			return err
		}
		var cancelled bool
		err = tx.Orders.Update(ctx, w.ID, func(o *order.Order) (bool, error) {
			if err := sameOrder(o, want); err != nil {
				return false, err
			}
			if w.Status != order.Cancelled || final(o) {
				return false, nil
			}
			cancelled = true
			return o.Cancel(w.CancelReason, w.CancelledAt)
		})
		if err != nil || !cancelled {
			return err
		}
		return tx.History.Add(ctx, w.ID.String(), "cancelled_again", restoredBecause(ctx, why))
	})
}

func restoredBecause(ctx context.Context, why string) string {
	if d, ok := DeliveryFrom(ctx); ok {
		return fmt.Sprintf("%s; from event %s", why, d.EventID)
	}
	return why
}

// Stopped says why the compensation stopped, empty if it did not.
func (s *Compensation) Stopped() string {
	s.breaker.mu.Lock()
	defer s.breaker.mu.Unlock()
	return s.breaker.why
}

// Resume lets the compensation go on after a person has made sure that the orders are really missing.
func (s *Compensation) Resume() {
	s.breaker.mu.Lock()
	defer s.breaker.mu.Unlock()
	s.breaker.why, s.breaker.began, s.breaker.total, s.breaker.missing = "", time.Time{}, 0, 0
}

// breaker stops when too many orders are missing. Once stopped it stays so until somebody resumes it.
type breaker struct {
	limit int

	mu             sync.Mutex
	why            string
	began          time.Time // of the minute that is counted
	total, missing int
}

func (b *breaker) seen(missing bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if time.Since(b.began) > time.Minute {
		b.began, b.total, b.missing = time.Now(), 0, 0
	}
	b.total++
	if missing {
		b.missing++
	}
	if b.missing > b.limit && 2*b.missing > b.total {
		b.why = fmt.Sprintf("%d of %d announced orders were missing within a minute: this may be the wrong database or one that lost "+
			"data; make sure, then POST /v1/compensation/resume", b.missing, b.total)
	}
}

func (b *breaker) check() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.why != "" {
		return domain.Errorf(domain.Unavailable, "compensation_stopped", "%s", b.why)
	}
	return nil
}
