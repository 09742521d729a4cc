package model

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"takeout/app"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
)

// current is the step that is being made.
type current struct {
	s     *state
	now   time.Time // what the state has for a time that the use case took from the clock
	order int       // which one it is about

	message    *message // that is handled, nil if none is
	route      int
	opener     bool // the client whose transaction is open commits it
	answerLost bool // of the next COMMIT
	announced  event.Event
}

// inTx is what app.Store says of InTx: all or nothing, and a delivery once.
func (x *explorer) inTx(ctx context.Context, fn func() error) error {
	before := *x.s
	if _, ok := app.DeliveryFrom(ctx); ok && !x.Defects.NoInbox {
		if x.message.table.inbox[x.route] {
			return app.ErrDuplicate
		}
		x.message.table.inbox[x.route] = true
		if x.Defects.InboxApart {
			before = *x.s
		}
	}
	if err := fn(); err != nil {
		*x.s = before
		return err
	}
	if x.answerLost {
		x.answerLost = false
		return x.inTx(ctx, fn)
	}
	return nil
}

// locked is the error of whoever wants to write an order that an open transaction is storing. In a database they wait.
func (x *explorer) locked(o int) error {
	if x.s.clients[o].open && !x.opener && !x.Defects.PlainRead {
		return domain.Errorf(domain.Busy, "locked", "order %d is being stored", o)
	}
	return nil
}

// orderStore is the order database.
type orderStore struct{ x *explorer }

func (st orderStore) tx() app.OrderTx {
	return app.OrderTx{Orders: orders{x: st.x}, Outbox: outbox(st), History: history{}}
}

// InTx implements app.Store.
func (st orderStore) InTx(ctx context.Context, fn func(context.Context, app.OrderTx) error) error {
	return st.x.inTx(ctx, func() error { return fn(ctx, st.tx()) })
}

// View implements app.Store.
func (st orderStore) View(ctx context.Context, fn func(context.Context, app.OrderTx) error) error {
	return fn(ctx, st.tx())
}

// dispatchStore is the dispatch database.
type dispatchStore struct{ x *explorer }

func (st dispatchStore) tx() app.DispatchTx {
	return app.DispatchTx{Dispatches: dispatches{x: st.x}, Couriers: roster{x: st.x}, Outbox: outbox(st), History: history{}}
}

// InTx implements app.Store.
func (st dispatchStore) InTx(ctx context.Context, fn func(context.Context, app.DispatchTx) error) error {
	return st.x.inTx(ctx, func() error { return fn(ctx, st.tx()) })
}

// View implements app.Store.
func (st dispatchStore) View(ctx context.Context, fn func(context.Context, app.DispatchTx) error) error {
	return fn(ctx, st.tx())
}

// orders implements order.Repository, but for what no use case of the model calls.
type orders struct {
	order.Repository
	x *explorer
}

func (r orders) Add(_ context.Context, o *order.Order) error {
	i := r.x.index(o.Snapshot().ID)
	if err := r.x.locked(i); err != nil {
		return err
	}
	if r.x.s.rows[i] != 0 {
		return domain.Errorf(domain.Conflict, "taken", "there is an order %d", i)
	}
	r.x.saveOrder(i, o.Snapshot())
	return nil
}

func (r orders) AddMany(ctx context.Context, many []*order.Order) error {
	for _, o := range many {
		if err := r.Add(ctx, o); err != nil {
			return err
		}
	}
	return nil
}

func (r orders) Get(_ context.Context, id order.ID) (*order.Order, error) {
	if n := r.x.s.rows[r.x.index(id)]; n != 0 {
		return order.Restore(r.x.rows.value(n)), nil
	}
	return nil, domain.Errorf(domain.NotFound, "missing", "there is no order %s", id)
}

func (r orders) Update(ctx context.Context, id order.ID, change func(*order.Order) (bool, error)) error {
	if err := r.x.locked(r.x.index(id)); err != nil {
		return err
	}
	o, err := r.Get(ctx, id)
	if err != nil {
		return err
	}
	if changed, err := change(o); err != nil || !changed {
		return err
	}
	r.x.saveOrder(r.x.index(id), o.Snapshot())
	return nil
}

func (x *explorer) saveOrder(i int, o order.Snapshot) {
	if x.Defects.DeleteCancelled && o.Status == order.Cancelled {
		x.s.rows[i] = 0
		return
	}
	x.instants(&o.PlacedAt, &o.AssignedAt, &o.DeliveredAt, &o.CancelledAt)
	x.s.rows[i] = x.rows.number(o, o)
}

// dispatches implements dispatch.Repository, but for what no use case of the model calls.
type dispatches struct {
	dispatch.Repository
	x *explorer
}

func (r dispatches) Add(_ context.Context, d dispatch.Dispatch) error {
	i := r.x.index(d.Job.OrderID)
	if r.x.s.dispatches[i] != 0 && !r.x.Defects.NoKey {
		return domain.Errorf(domain.Conflict, "dispatched_before", "order %d has a dispatch", i)
	}
	r.x.saveDispatch(i, d, true)
	return nil
}

func (r dispatches) Get(_ context.Context, id order.ID) (dispatch.Dispatch, error) {
	if n := r.x.s.dispatches[r.x.index(id)]; n != 0 {
		return r.x.dispatches.value(n), nil
	}
	return dispatch.Dispatch{}, domain.Errorf(domain.NotFound, "missing", "order %s has no dispatch", id)
}

func (r dispatches) Update(ctx context.Context, id order.ID, change func(*dispatch.Dispatch) (bool, error)) error {
	d, err := r.Get(ctx, id)
	if err != nil {
		return err
	}
	wasActive := d.Active()
	if changed, err := change(&d); err != nil || !changed {
		return err
	}
	r.x.saveDispatch(r.x.index(id), d, !wasActive)
	return nil
}

// UpdateWaiting looks at the order that the step is about.
func (r dispatches) UpdateWaiting(ctx context.Context, _ int, change func([]dispatch.Dispatch) (int, error)) (damaged, err error) {
	return nil, r.Update(ctx, r.x.ids[r.x.order], func(d *dispatch.Dispatch) (bool, error) {
		waiting := []dispatch.Dispatch{*d}
		changed, err := change(waiting)
		*d = waiting[0]
		return changed == 1, err
	})
}

// saveDispatch counts a courier who is sent, which no table does.
func (x *explorer) saveDispatch(i int, d dispatch.Dispatch, inactive bool) {
	x.instants(&d.Job.PlacedAt, &d.AssignedAt, &d.DeliveredAt, &d.ReleasedAt)
	x.s.dispatches[i] = x.dispatches.number(d, d)
	c := &x.s.clients[i]
	if d.Active() && inactive {
		c.sent = min(c.sent+1, 2)
	}
	c.released = c.released || d.State == dispatch.Released
}

// roster implements dispatch.Roster, but for what no use case of the model calls. A second courier for the same order
// would be another one, and so is the first after a failover.
type roster struct {
	dispatch.Roster
	x *explorer
}

func (r roster) Take(context.Context) (dispatch.CourierID, error) {
	if !r.x.s.room {
		return dispatch.CourierID{}, domain.Errorf(domain.Exhausted, "no_room", "no courier has room")
	}
	again := r.x.s.failedOver && r.x.DispatchFails
	return dispatch.ParseCourierID(fmt.Sprintf("courier-%d-%v", r.x.s.clients[r.x.order].sent+1, again))
}

func (r roster) TakeMany(ctx context.Context, orders int) ([]dispatch.CourierID, error) {
	if orders == 0 {
		return nil, nil
	}
	id, err := r.Take(ctx)
	return slices.Repeat([]dispatch.CourierID{id}, orders), err
}

func (roster) Count(context.Context, dispatch.CourierID, int) error { return nil }

// history forgets: nothing is decided by it.
type history struct{}

func (history) Add(context.Context, string, string, string) error { return nil }

// outbox implements app.Outbox.
type outbox struct{ x *explorer }

func (b outbox) Publish(_ context.Context, events ...event.Event) error {
	for _, e := range events {
		m := message{event: b.x.number(e), outbox: true}
		if b.x.Defects.NoOutbox {
			m.outbox, m.relays[0] = false, claimed
		}
		b.x.add(m)
	}
	return nil
}

func (x *explorer) add(m message) {
	free := slices.IndexFunc(x.s.messages[:], func(m message) bool { return m.event == 0 })
	if free < 0 {
		x.broken = errors.New("more messages are under way than the model has room for")
		return
	}
	x.s.messages[free] = m
}

// number returns the event's number.
func (x *explorer) number(e event.Event) number {
	switch known := e.(type) {
	case event.OrderPlaced:
		x.instants(&known.PlacedAt)
		if d := known.Dispatch; d != nil {
			courier := *d
			x.instants(&courier.AssignedAt)
			known.Dispatch = &courier
		}
		e = known
	case event.OrderCancelled:
		x.instants(&known.PlacedAt, &known.CancelledAt)
		e = known
	case event.DispatchAssigned:
		x.instants(&known.AssignedAt)
		e = known
	case event.DispatchImpossible:
		x.instants(&known.PlacedAt, &known.GivenUpAt)
		e = known
	case event.DispatchDelivered:
		x.instants(&known.AssignedAt, &known.DeliveredAt)
		e = known
	}
	body, err := json.Marshal(e)
	if err != nil {
		x.broken = err
	}
	o := slices.IndexFunc(x.ids[:], func(id order.ID) bool { return id.String() == e.Subject() })
	text := fmt.Sprintf("%s of order %d, version %d", e.Key(), o, e.OrderVersion())
	return x.events.number(e.Key()+string(body), announcement{e, o, text, x.routes[e.Key()]})
}

// instants replaces times that were just taken from the clock by the moment that the model has for them: otherwise no
// two states would be equal. The model's own times are long ago.
func (x *explorer) instants(times ...*time.Time) {
	for _, t := range times {
		if t.Year() > 2000 {
			*t = x.now
		}
	}
}

// moment is the model's time of that number.
func moment(n int) time.Time { return time.Unix(int64(n), 0).UTC() }

func (x *explorer) index(id order.ID) int { return slices.Index(x.ids[:], id) }
