package model

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"takeout/app"
	"takeout/app/reconcile"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/ports/messaging"
)

// steps tells the sink what can happen next.
func (x *explorer) steps(from state) {
	for o := range x.Orders {
		x.order = o
		x.client(&from, o)
		x.couriers(&from, o)
		x.reconciler(&from, o)
	}
	for i := range from.messages {
		if from.messages[i].event == 0 {
			break
		}
		x.order = x.announcement(&from.messages[i]).order
		for relay := range x.Relays {
			x.relay(&from, i, relay)
		}
		for r := range x.announcement(&from.messages[i]).routes {
			x.consumer(&from, i, r)
		}
	}
	x.failover(&from)
}

// may makes a step on a copy of the state, and tells the sink of it if do says that it was possible. A step that nobody owes,
// a fault or a wish, is told as a fault.
func (x *explorer) may(from *state, fault bool, do func(s *state) bool, text string, args ...any) {
	x.next = *from
	x.current = current{s: &x.next, order: x.order, now: moment(100)}
	if do(x.s) {
		x.s.tidy()
		x.sink(x.s, fault, text, args...)
	}
}

// spend takes one off what is left of a fault, and reports whether there was one.
func spend(left *uint8) bool {
	if *left == 0 {
		return false
	}
	*left--
	return true
}

var background = context.Background()

// client: places the order, again with the same id while it knows nothing, and may cancel it then.
func (x *explorer) client(from *state, o int) {
	switch c := from.clients[o]; {
	case c.open:
		x.may(from, false, func(s *state) bool { return x.commit(s, o) }, "the transaction of order %d commits, and the client is told", o)
		x.may(from, true, func(s *state) bool { s.clients[o].open = false; return true }, "the transaction of order %d is rolled back, and the client is told nothing certain", o)
	case (c.place <= unknown || x.Again && c.place == accepted) && c.requests < 2:
		if x.Legacy {
			x.may(from, true, func(s *state) bool { return x.announceEarly(s, o) }, "order %d is announced, and its transaction is open", o)
			break
		}
		x.may(from, true, func(s *state) bool {
			s.clients[o].place, s.clients[o].requests = max(c.place, unknown), c.requests+1
			return spend(&s.left.Crashes)
		}, "the process dies before it places order %d", o)
		x.request(from, o, "order %d is placed", x.place, func(c *client) *answer { return &c.place })
	}
	if c := from.clients[o]; !x.NoCancel && c.place == accepted && c.cancel <= unknown {
		x.request(from, o, "order %d is cancelled", x.cancel, func(c *client) *answer { return &c.cancel })
	}
}

// request: takes effect, and the client is told so or not.
func (x *explorer) request(from *state, o int, text string, do func(s *state, o int) bool, told func(*client) *answer) {
	x.may(from, true, func(s *state) bool { return do(s, o) }, text+", or that is refused, and the client is told", o)
	x.may(from, true, func(s *state) bool {
		x.answerLost = true
		return spend(&s.left.LostAnswers) && do(s, o)
	}, text+", the answer to COMMIT is lost, it runs again, and the client is told", o)
	x.may(from, true, func(s *state) bool {
		known := *told(&s.clients[o])
		done := spend(&s.left.Crashes) && do(s, o)
		*told(&s.clients[o]) = max(known, unknown)
		return done
	}, text+", and the process dies before it answers", o)
}

// couriers: have room at last, and bring orders.
func (x *explorer) couriers(from *state, o int) {
	if !from.room && o == 0 {
		x.may(from, false, func(s *state) bool { s.room = true; return true }, "a courier has room")
	}
	decided := func(_ bool, err error) bool { return err == nil }
	switch d := x.dispatch(from, o); {
	case d.State == dispatch.Waiting:
		if from.room {
			x.may(from, false, func(*state) bool { return decided(x.useCases.Dispatches.AssignWaiting(background)) },
				"order %d, which waited, is assigned", o)
		}
		x.may(from, true, func(*state) bool { return decided(x.hurried.AssignWaiting(background)) }, "order %d has waited too long and is given up", o)
	case d.Active() && x.Delivers:
		x.may(from, true, func(*state) bool {
			_, err := x.useCases.Dispatches.MarkDelivered(background, x.ids[o])
			return err == nil
		}, "the courier brings order %d", o)
	}
}

func (x *explorer) place(s *state, o int) bool {
	c := &s.clients[o]
	c.requests++
	x.now = moment(int(c.requests))
	orders := x.useCases.Orders
	if x.Legacy {
		orders = x.legacy
	}
	_, err := orders.Place(background, app.PlaceOrder{ID: x.ids[o], Name: "mapo tofu", Money: x.money})
	switch domain.KindOf(err) {
	case domain.Conflict, domain.Invalid:
		c.place = refused
	case domain.Unavailable:
		c.place = unknown
	default:
		c.place = accepted
	}
	return err == nil || x.Legacy
}

// announceEarly is a legacy service's Place as far as others see it before it ends: the announcement is out, and the
// order's row is locked.
func (x *explorer) announceEarly(s *state, o int) bool {
	x.place(s, o)
	if x.announced == nil { // it was placed before
		return true
	}
	s.clients[o].open = true
	m := message{event: x.number(x.announced)}
	x.publish(s, &m)
	x.add(m)
	return true
}

// commit runs all of Place as the one whose transaction is open.
func (x *explorer) commit(s *state, o int) bool {
	x.opener = true
	s.clients[o].requests--
	x.place(s, o)
	s.clients[o].open = false
	return s.clients[o].place == accepted
}

func (x *explorer) cancel(s *state, o int) bool {
	first := s.clients[o].cancel == unasked
	_, err := x.useCases.Orders.Cancel(background, x.ids[o], "")
	switch {
	case err == nil:
		s.clients[o].cancel = accepted
	case domain.KindOf(err) == domain.Busy:
		return false
	case first:
		s.clients[o].cancel = refused
	}
	return true
}

// relay: takes a row, sends its event, waits for the broker's confirm, deletes the row. Each may be the last that it does.
// One relay alone needs no lease, and takes and sends in one step.
func (x *explorer) relay(from *state, i, r int) {
	m := &from.messages[i]
	what := x.announcement(m).text
	hold, other := m.relays[r], m.relays[1-r]
	if hold == idle && m.outbox && x.Relays == 2 {
		expired := other != idle
		x.may(from, expired, func(s *state) bool {
			s.messages[i].relays[r] = claimed
			return !expired || spend(&s.left.Expiries)
		}, "relay %d takes the row of %s", r, what)
	}
	if hold == idle && m.outbox && x.Defects.DeleteFirst {
		x.may(from, false, func(s *state) bool {
			s.messages[i].outbox, s.messages[i].relays[r] = false, claimed
			return true
		}, "relay %d deletes the row of %s", r, what)
	} else if hold == claimed || hold == idle && m.outbox && x.Relays == 1 {
		x.may(from, false, func(s *state) bool {
			x.publish(s, &s.messages[i])
			s.messages[i].relays[r] = published
			return true
		}, "relay %d sends %s", r, what)
	}
	if hold == published {
		x.may(from, false, func(s *state) bool {
			s.messages[i].outbox, s.messages[i].relays[r] = false, idle
			return true
		}, "relay %d has the confirm and deletes the row of %s", r, what)
	}
	if hold != idle {
		x.may(from, true, func(s *state) bool {
			s.messages[i].relays[r] = idle
			return spend(&s.left.Crashes)
		}, "relay %d, which holds %s, dies", r, what)
	}
}

// publish puts a copy into the queue of each route.
func (x *explorer) publish(s *state, m *message) {
	for r := range x.announcement(m).routes {
		x.enqueue(s, m, r)
	}
	switch c := &s.clients[x.announcement(m).order]; x.announcement(m).Event.(type) {
	case event.OrderPlaced:
		c.placeTold = true
	case event.OrderCancelled:
		c.cancelTold = true
	}
}

// enqueue puts a copy into one queue, and notes if there was one before for which there is no reason.
func (x *explorer) enqueue(s *state, m *message, r int) {
	again := m.queues[r] > 0 || m.acked[r]
	provoked := s.left.Crashes < x.Faults.Crashes || s.left.Expiries < x.Faults.Expiries || s.failedOver
	s.unprovoked = s.unprovoked || again && !provoked
	m.queues[r] = min(m.queues[r]+1, 2)
}

// consumer: handles what its queue or its retry table has, and then acks it. A person takes care of what it gave up.
func (x *explorer) consumer(from *state, i, r int) {
	m := &from.messages[i]
	what := x.announcement(m).routes[r].Queue + " handles " + x.announcement(m).text
	if m.queues[r] > 0 {
		x.handling(from, i, r, what, nowhere, func(m *message) { m.queues[r]--; m.acked[r] = true })
	}
	switch was := m.table.aside[r]; was {
	case delayed, asked:
		if x.Defects.RetryForEverybody {
			x.may(from, false, func(s *state) bool {
				s.messages[i].table.aside[r] = nowhere
				x.publish(s, &s.messages[i])
				return true
			}, "%s is sent again to everybody", x.announcement(m).text)
			return
		}
		x.handling(from, i, r, what+" once more", was, func(m *message) {
			if m.table.aside[r] == was {
				m.table.aside[r] = nowhere
			}
		})
	case kept:
		x.may(from, false, func(s *state) bool { s.messages[i].table.aside[r] = asked; return true }, "a person asks that %s once more", what)
		if !x.NoReconciler && !x.NoDiscard {
			x.may(from, false, func(s *state) bool { s.messages[i].table.aside[r] = nowhere; return true }, "a person gives up that %s", what)
		}
	}
}

// handling is all that can happen between a message's delivery and its ack.
func (x *explorer) handling(from *state, i, r int, what string, was aside, settle func(*message)) {
	step := func(fault bool, spent func(*state) bool, settled bool, text string) {
		x.may(from, fault, func(s *state) bool {
			m := &s.messages[i]
			done := spent(s) && x.handle(m, r, was)
			if settled {
				settle(m)
			}
			return done
		}, text, what)
	}
	step(false, func(*state) bool { return true }, true, "%s and acks it")
	step(true, func(s *state) bool { return spend(&s.left.Crashes) }, false, "%s and dies before the ack")
	step(true, func(s *state) bool { x.answerLost = true; return spend(&s.left.LostAnswers) }, true,
		"%s, COMMIT takes effect and its answer is lost, it runs again, and it is acked")
	x.may(from, true, func(s *state) bool {
		m := &s.messages[i]
		putAside(m, r, was)
		m.table.inbox[r] = m.table.inbox[r] || x.Defects.InboxApart
		settle(m)
		return spend(&s.left.Failures)
	}, "%s, fails, and puts it aside", what)
	if x.Defects.AckFirst {
		x.may(from, true, func(s *state) bool { settle(&s.messages[i]); return spend(&s.left.Crashes) }, "%s, acks it, and dies before COMMIT", what)
	}
	if x.Defects.InboxApart {
		x.may(from, true, func(s *state) bool { s.messages[i].table.inbox[r] = true; return spend(&s.left.Crashes) },
			"%s and dies between the inbox row and the rest", what)
	}
}

// handle lets the route's use case handle the message, and does with its error what a consumer does. It reports whether
// that ended: a consumer that waits for a database takes no step.
func (x *explorer) handle(m *message, r int, was aside) bool {
	x.message, x.route = m, r
	err := x.announcement(m).routes[r].handle(x.announcement(m).Event)
	if errors.Is(err, app.ErrDuplicate) {
		err = nil
	}
	switch messaging.Classify(err) {
	case "done":
	case "transient":
		putAside(m, r, was)
	case "permanent":
		m.table.aside[r] = kept
	default:
		return false
	}
	return true
}

// putAside makes the message come again once, and then keeps it. What a person asked for is not delayed.
func putAside(m *message, r int, was aside) {
	if was != nowhere {
		m.table.aside[r] = kept
		return
	}
	m.table.aside[r] = max(m.table.aside[r], delayed)
}

// reconciler: repairs what differs when nothing about the order is under way, as far as the databases show.
func (x *explorer) reconciler(from *state, o int) {
	if x.NoReconciler || from.clients[o].open {
		return
	}
	class, repair := reconcile.JudgeDispatch(x.records(from, o))
	if repair == nil {
		return
	}
	hasty := false
	for i := range from.messages {
		m := &from.messages[i]
		if m.event == 0 || x.announcement(m).order != o {
			continue
		}
		// What a person has to decide about does not keep a missing order from being made again.
		if m.inDatabase() || m.has(kept) && class != reconcile.OrphanDispatch {
			return
		}
		hasty = hasty || m.relays != [2]hold{} || m.queues != [2]uint8{}
	}
	x.may(from, hasty, func(s *state) bool {
		return (!hasty || spend(&s.left.Hasty)) && repair(background, x.useCases, x.ids[o]) == nil
	}, "reconciliation finds that order %d is a case of %s, and repairs it", o, class)
}

// records are the rows of an order as reconciliation reads them.
func (x *explorer) records(s *state, o int) (orders, dispatches []reconcile.Record) {
	if n := s.rows[o]; n != 0 {
		row := x.rows.value(n)
		orders = []reconcile.Record{{
			State: row.Status.String(), Name: row.Name, Amount: row.Money.Amount(), Currency: row.Money.Currency(),
			CourierID: row.CourierID, Version: row.Version, PlacedAt: row.PlacedAt,
		}}
	}
	if n := s.dispatches[o]; n != 0 {
		d := x.dispatches.value(n)
		dispatches = []reconcile.Record{{
			State: d.State.String(), Name: d.Job.Name, Amount: d.Job.Money.Amount(), Currency: d.Job.Money.Currency(),
			CourierID: d.CourierID.String(), Version: d.Job.Version, PlacedAt: d.Job.PlacedAt,
		}}
	}
	return orders, dispatches
}

// failover: at some moment the replica of one database stops to follow, and later it takes that database's place. What
// happened in between is undone there, and nowhere else.
func (x *explorer) failover(from *state) {
	if from.left.Failovers == 0 {
		return
	}
	if !from.lags {
		x.may(from, true, func(s *state) bool {
			s.lags, s.replica = true, *x.lost(s)
			for i := range s.messages {
				x.exchange(&s.messages[i], func(m *message, r int) {
					m.was.inbox[r], m.was.aside[r] = m.table.inbox[r], m.table.aside[r]
				}, func(m *message) { m.outWas = m.outbox })
			}
			return true
		}, "the replica of the %s database stops to follow", x.failing())
		return
	}
	x.may(from, true, func(s *state) bool {
		*x.lost(s), s.replica, s.lags, s.failedOver = s.replica, [maxOrders]number{}, false, true
		for o := range s.clients {
			c := &s.clients[o]
			if !x.DispatchFails {
				c.open = false
				continue
			}
			d := x.dispatch(s, o)
			c.released = d.State == dispatch.Released
			if d.CourierID == (dispatch.CourierID{}) {
				c.sent = 0 // nobody can know of a courier whose dispatch is lost
			}
		}
		for i := range s.messages {
			x.exchange(&s.messages[i], func(m *message, r int) {
				m.table.inbox[r], m.table.aside[r] = m.was.inbox[r], m.was.aside[r]
			}, func(m *message) { m.outbox = m.outWas })
			s.messages[i].was, s.messages[i].outWas = table{}, false
		}
		return spend(&s.left.Failovers)
	}, "the replica takes the %s database's place", x.failing())
}

func (x *explorer) failing() string {
	if x.DispatchFails {
		return "dispatch"
	}
	return "order"
}

func (x *explorer) lost(s *state) *[maxOrders]number {
	if x.DispatchFails {
		return &s.dispatches
	}
	return &s.rows
}

// exchange does something about each route whose consumer notes what it did in the database that fails, and about the
// row in that database's outbox.
func (x *explorer) exchange(m *message, notes func(m *message, r int), row func(m *message)) {
	if m.event == 0 {
		return
	}
	for r, route := range x.announcement(m).routes {
		if route.Role.Service() == x.failing() {
			notes(m, r)
		}
	}
	if strings.HasPrefix(x.announcement(m).Key(), x.failing()) {
		row(m)
	}
}

func (x *explorer) announcement(m *message) *announcement { return &x.events.all[m.event-1] }

// newExplorer wires the use cases to stores that work on the current state.
func newExplorer(setting Setting) (*explorer, error) {
	x := &explorer{Setting: setting, routes: map[string][]route{}}
	var err error
	if x.money, err = domain.NewMoney(2850, "CNY"); err != nil {
		return nil, err
	}
	for i := range x.ids {
		if x.ids[i], err = order.ParseID(fmt.Sprintf("order-%d", i)); err != nil {
			return nil, err
		}
	}
	u := app.UseCases{
		Orders:       app.NewOrders(orderStore{x}),
		Compensation: app.NewCompensation(orderStore{x}, 1<<62),
		Dispatches:   app.NewDispatches(dispatchStore{x}, app.DispatchPolicy{}),
	}
	x.useCases, x.legacy = u, app.NewOrders(orderStore{x})
	x.hurried = app.NewDispatches(dispatchStore{x}, app.DispatchPolicy{Deadline: 1})
	x.legacy.PublishBeforeCommit(app.LegacyPublishing{
		Publish: func(_ context.Context, e event.Event) error { x.announced = e; return nil },
		Fail:    func() bool { return !x.opener },
	})
	// Each queue feeds the use case that it feeds in the program.
	handlers := map[string]func(event.Event) error{
		"dispatch.assign-courier":               handler(u.Dispatches.AssignPlaced),
		"dispatch.release-courier":              handler(u.Dispatches.Release),
		"compensation.recreate-order":           handler(u.Compensation.Recreate),
		"compensation.recreate-cancelled-order": handler(u.Compensation.RecreateCancelled),
		"order.mark-dispatched":                 handler(u.Orders.MarkDispatched),
		"order.mark-delivered":                  handler(u.Orders.MarkDelivered),
		"order.cancel-undispatchable":           handler(u.Orders.CancelUndispatchable),
	}
	for _, r := range messaging.Topology(u, false) {
		if r.Queue == "compensation.recreate-cancelled-order" && x.Defects.CancelUnheard {
			continue
		}
		if handle := handlers[r.Queue]; handle != nil {
			x.routes[r.Event] = append(x.routes[r.Event], route{r, handle})
		}
	}
	return x, nil
}

// handler is messaging's without the bytes: the delivery is in the context, so that the store deduplicates.
func handler[E event.Event](useCase func(context.Context, E) error) func(event.Event) error {
	return func(e event.Event) error {
		return useCase(app.WithDelivery(background, app.Delivery{OrderID: e.Subject()}), e.(E))
	}
}
