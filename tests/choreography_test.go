package tests

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/simgateway"
	"takeout/adapters/sqldb"
	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
)

// choreography is the four services over their databases, without a broker: the test decides which message is handled
// when, how often, and beside which other one.
type choreography struct {
	stack
	orders     *app.Orders
	dispatches *app.Dispatches
	payments   *app.Payments
	points     *app.Points

	databases []*sqldb.DB
	consumers []choreographed
}

// choreographed is a queue of the topology with its use case.
type choreographed struct {
	queue, key string
	handle     func(ctx context.Context, id string, body []byte) error
	together   func(ctx context.Context, all []announcement) error // nil if each is handled alone
}

func handledBy[E event.Event](queue string, useCase func(context.Context, E) error) choreographed {
	var e E
	return choreographed{queue: queue, key: e.Key(), handle: func(ctx context.Context, id string, body []byte) error {
		d, e, err := delivered[E](queue, id, body)
		if err != nil {
			return err
		}
		return useCase(app.WithDelivery(ctx, d), e)
	}}
}

func handledTogether[E event.Event](queue string, one func(context.Context, E) error, many func(context.Context, []E) error) choreographed {
	c := handledBy(queue, one)
	c.together = func(ctx context.Context, all []announcement) error {
		deliveries, events := make([]app.Delivery, len(all)), make([]E, len(all))
		for i, a := range all {
			var err error
			if deliveries[i], events[i], err = delivered[E](queue, a.id, a.body); err != nil {
				return err
			}
		}
		return many(app.WithDeliveries(ctx, deliveries...), events)
	}
	return c
}

func delivered[E event.Event](queue, id string, body []byte) (app.Delivery, E, error) {
	envelope, e, err := event.Decode[E](id, body)
	return app.Delivery{Consumer: queue, EventID: envelope.ID, Hash: sha256.Sum256(body), OrderID: envelope.Subject}, e, err
}

func choreograph(t testing.TB, st stack, policy app.DispatchPolicy, refusals, timeouts float64) *choreography {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	orders, err := sqlstore.OpenOrders(st.order, nil, quiet)
	require.NoError(t, err)
	dispatches, err := sqlstore.OpenDispatches(st.dispatch, nil, quiet)
	require.NoError(t, err)
	payments, err := sqlstore.OpenPayments(st.payment, nil, quiet, simgateway.Schema())
	require.NoError(t, err)
	points, err := sqlstore.OpenPoints(st.points, nil, quiet)
	require.NoError(t, err)
	c := &choreography{
		stack: st, orders: app.NewOrders(orders), dispatches: app.NewDispatches(dispatches, policy),
		payments: app.NewPayments(payments, simgateway.New(payments.DB(), refusals, timeouts)), points: app.NewPoints(points),
	}
	for _, db := range []interface {
		DB() *sqldb.DB
		Migrate(ctx context.Context) ([]string, error)
		Close() error
	}{orders, dispatches, payments, points} {
		_, err := db.Migrate(context.Background())
		require.NoError(t, err)
		t.Cleanup(func() { _ = db.Close() })
		c.databases = append(c.databases, db.DB())
	}
	c.consumers = []choreographed{
		handledTogether("dispatch.assign-courier", c.dispatches.AssignPlaced, c.dispatches.AssignPlacedMany),
		handledTogether("dispatch.assign-courier-when-paid", c.dispatches.AssignPaid, c.dispatches.AssignPaidMany),
		handledBy("dispatch.release-courier", c.dispatches.Release),
		handledTogether("order.mark-dispatched", c.orders.MarkDispatched, c.orders.MarkDispatchedMany),
		handledBy("order.mark-delivered", c.orders.MarkDelivered),
		handledBy("order.cancel-undispatchable", c.orders.CancelUndispatchable),
		handledBy("order.cancel-unpaid", c.orders.CancelUnpaid),
		handledTogether("order.record-points", c.orders.RecordPoints, c.orders.RecordPointsMany),
		handledBy("payment.charge-order", c.payments.Charge),
		handledBy("payment.refund-order", c.payments.Refund),
		handledTogether("points.award-points", c.points.Award, c.points.AwardMany),
		handledBy("points.revoke-points", c.points.Revoke),
	}
	return c
}

func (c *choreography) addCourier(t testing.TB, id string, capacity int) {
	t.Helper()
	courierID, err := dispatch.ParseCourierID(id)
	require.NoError(t, err)
	courier, err := dispatch.NewCourier(courierID, id, true, capacity)
	require.NoError(t, err)
	require.NoError(t, c.dispatches.AddCourier(context.Background(), courier))
}

// announcement is an event on its way.
type announcement struct {
	id, key, orderID string
	body             []byte
}

// announcementOf puts the event into an envelope of its own.
func announcementOf(t testing.TB, e event.Event) announcement {
	t.Helper()
	id := newEventID()
	body, err := event.Encode(id, time.Now(), e)
	require.NoError(t, err)
	return announcement{id, e.Key(), e.Subject(), body}
}

// takeOutboxes takes everything out of the outboxes, as relays do.
func (c *choreography) takeOutboxes(t testing.TB) []announcement {
	t.Helper()
	var taken []announcement
	for _, db := range c.databases {
		err := db.InTx(context.Background(), func(ctx context.Context, tx *sql.Tx) error {
			rows, err := tx.QueryContext(ctx, "SELECT id, payload, event_id, event_key, order_id FROM outbox ORDER BY id"+db.ForUpdate)
			if err != nil {
				return err
			}
			defer rows.Close()
			var last int64
			for rows.Next() {
				var a announcement
				var payload []byte
				if err := rows.Scan(&last, &payload, &a.id, &a.key, &a.orderID); err != nil {
					return err
				}
				var enveloped struct{ Payload []byte }
				if err := json.Unmarshal(payload, &enveloped); err != nil {
					return err
				}
				a.body = enveloped.Payload
				taken = append(taken, a)
			}
			if err := rows.Err(); err != nil {
				return err
			}
			_, err = tx.ExecContext(ctx, "DELETE FROM outbox WHERE id <= ?", last)
			return err
		})
		require.NoError(t, err)
	}
	return taken
}

// handle lets the consumer handle the message until it is settled, as the retries do.
func (c choreographed) settle(a announcement) error {
	var err error
	for range 60 {
		err = c.handle(context.Background(), a.id, a.body)
		if err == nil || errors.Is(err, app.ErrDuplicate) {
			return nil
		}
		if domain.KindOf(err) == domain.Invalid || isDelivered(err) {
			return err
		}
		time.Sleep(time.Duration(1+rand.IntN(20)) * time.Millisecond)
	}
	return fmt.Errorf("%s: %s of order %s: %w", c.queue, a.key, a.orderID, err)
}

// settleAll lets the consumer handle the messages together or, if that fails, each alone, as the program does. It reports
// whether they were handled together.
func (c choreographed) settleAll(all []announcement) (together bool, err error) {
	if c.together != nil && len(all) > 1 && c.together(context.Background(), all) == nil {
		return true, nil
	}
	for _, a := range all {
		if one := c.settle(a); one != nil && !isDelivered(one) {
			err = errors.Join(err, one)
		}
	}
	return false, err
}

// isDelivered reports whether err says that the order is delivered: who ordered has eaten, and a person sees to the rest.
func isDelivered(err error) bool {
	known, ok := errors.AsType[*domain.Error](err)
	return ok && known.Code == "order_delivered"
}

// settle lets each consumer of the service handle the announcements in this order.
func (c *choreography) settle(t testing.TB, queues []string, announcements ...announcement) {
	t.Helper()
	for _, a := range announcements {
		for _, consumer := range c.consumers {
			if consumer.key == a.key && slices.Contains(queues, consumer.queue) {
				require.NoError(t, consumer.settle(a))
			}
		}
	}
}

// settleTogether lets each consumer of the service handle the announcements, which are of one kind, at the same time.
func (c *choreography) settleTogether(t testing.TB, queues []string, all ...announcement) {
	t.Helper()
	for _, consumer := range c.consumers {
		if consumer.key == all[0].key && slices.Contains(queues, consumer.queue) {
			_, err := consumer.settleAll(all)
			require.NoError(t, err)
		}
	}
}

func orderID(t testing.TB, id string) order.ID {
	t.Helper()
	parsed, err := order.ParseID(id)
	require.NoError(t, err)
	return parsed
}

func facts(id string, status order.Status, version int64) event.Order {
	return event.Order{OrderID: id, Name: "Mapo tofu", Amount: 2850, Currency: "CNY", Status: status.String(), Version: version, PlacedAt: time.Now().UTC().Truncate(time.Microsecond)}
}

// permutations returns every order of n things.
func permutations(n int) [][]int {
	if n == 0 {
		return [][]int{nil}
	}
	var all [][]int
	for _, shorter := range permutations(n - 1) {
		for i := range n {
			all = append(all, slices.Insert(slices.Clone(shorter), i, n-1))
		}
	}
	return all
}

func TestMessagesOfACancelledOrderEndTheSameInEveryOrder(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		c.addCourier(t, "small", 10_000)
		paidFirst := choreograph(t, st, app.DispatchPolicy{AfterPayment: true}, 0, 0)
		// Each set is told to one service, in every order, about an order of its own each time.
		released := func(t *testing.T, id string) {
			require.Equal(t, 1, count(t, st.dispatch, "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND state = 'released'", id))
			require.Zero(t, count(t, st.dispatch, "SELECT active FROM courier"), "the room is given back")
		}
		for name, set := range map[string]struct {
			services *choreography
			queues   []string
			events   func(f event.Order) []event.Event
			end      func(t *testing.T, id string)
		}{
			"dispatch": {
				c, []string{"dispatch.assign-courier", "dispatch.release-courier"},
				func(f event.Order) []event.Event {
					return []event.Event{event.OrderPlaced{Order: f}, event.OrderPlaced{Order: f}, cancelled(f), cancelled(f)}
				},
				released,
			},
			"dispatch-when-paid": {
				paidFirst, []string{"dispatch.assign-courier", "dispatch.assign-courier-when-paid", "dispatch.release-courier"},
				func(f event.Order) []event.Event {
					paid := event.PaymentSucceeded{Order: f, Reference: "r"}
					return []event.Event{event.OrderPlaced{Order: f}, paid, paid, cancelled(f)}
				},
				released,
			},
			"payment": {
				c, []string{"payment.charge-order", "payment.refund-order"},
				func(f event.Order) []event.Event {
					return []event.Event{event.OrderPlaced{Order: f}, event.OrderPlaced{Order: f}, cancelled(f), cancelled(f)}
				},
				func(t *testing.T, id string) {
					require.Equal(t, 1, count(t, st.payment, "SELECT COUNT(*) FROM payment WHERE orderId = ? AND state IN ('void', 'refunded')", id))
					require.Zero(t, count(t, st.payment, "SELECT COUNT(*) FROM simulated_charge WHERE orderId = ? AND cancelled_at IS NULL", id), "nothing is kept")
				},
			},
			"points": {
				c, []string{"points.award-points", "points.revoke-points"},
				func(f event.Order) []event.Event {
					paid, refunded := event.PaymentSucceeded{Order: f, Reference: "r"}, event.PaymentRefunded{Order: f, Reference: "r"}
					return []event.Event{paid, paid, refunded, refunded}
				},
				func(t *testing.T, id string) {
					require.Zero(t, count(t, st.points, "SELECT SUM(points) FROM points_entry WHERE orderId = ?", id))
					require.Equal(t, 2, count(t, st.points, "SELECT COUNT(*) FROM points_entry WHERE orderId = ?", id))
				},
			},
			"order": {
				c, []string{"order.mark-dispatched", "order.cancel-undispatchable", "order.cancel-unpaid", "order.record-points"},
				func(f event.Order) []event.Event {
					_, err := c.orders.Place(context.Background(), app.PlaceOrder{ID: orderID(t, f.OrderID), Name: f.Name, Money: money(t, f.Amount)})
					require.NoError(t, err)
					return []event.Event{
						event.DispatchAssigned{OrderID: f.OrderID, CourierID: "small", AssignedAt: time.Now(), Version: 1},
						event.PaymentRefused{Order: f, Reason: "no"}, event.DispatchImpossible{Order: f},
						event.PointsAwarded{OrderID: f.OrderID, Points: 28, Version: 1},
					}
				},
				func(t *testing.T, id string) {
					require.Equal(t, 1, count(t, st.order, "SELECT COUNT(*) FROM order_info WHERE orderId = ? AND status = 'cancelled' AND points = 0", id))
					require.Equal(t, 1, count(t, st.order, "SELECT COUNT(*) FROM outbox WHERE order_id = ? AND event_key = 'order.cancelled'", id), "told once")
				},
			},
		} {
			t.Run(name, func(t *testing.T) {
				for i, permutation := range permutations(4) {
					id := fmt.Sprintf("%s-%d", name, i)
					events := set.events(facts(id, order.Placed, 1))
					company := set.events(facts(id+"-too", order.Placed, 1)) // of another order, whose messages come with these
					for _, at := range permutation {
						set.services.settleTogether(t, set.queues, announcementOf(t, events[at]), announcementOf(t, company[at]))
					}
					set.end(t, id)
					set.end(t, id+"-too")
				}
			})
		}
	})
}

func cancelled(f event.Order) event.OrderCancelled {
	f.Status, f.Version = order.Cancelled.String(), 2
	return event.OrderCancelled{Order: f, Reason: "changed my mind", CancelledAt: time.Now()}
}

func money(t testing.TB, amount int64) domain.Money {
	t.Helper()
	m, err := domain.NewMoney(amount, "CNY")
	require.NoError(t, err)
	return m
}

// A thousand orders are placed, cancelled and delivered at random moments. Their messages come after random delays, up
// to twice each, beside each other and many at once, the payment gateway refuses some and is late at times, and there is not
// room for all.
func TestThousandRandomInterleavingsEndConsistent(t *testing.T) {
	t.Parallel()
	const orders, rounds = 1000, 12
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	c := choreograph(t, production(t), app.DispatchPolicy{}, 0.1, 0.1)
	c.addCourier(t, "small", 50)
	c.addCourier(t, "large", 150)

	schedule := map[int][]func(){} // by round
	at := func(round int, task func()) { schedule[round] = append(schedule[round], task) }
	ctx := context.Background()
	for i := range orders {
		id, price := orderID(t, fmt.Sprint("o-", i)), money(t, int64(100+i))
		at(0, func() {
			if _, err := c.orders.Place(ctx, app.PlaceOrder{ID: id, Name: "x", Money: price}); err != nil {
				t.Errorf("place: %v", err)
			}
		})
		for n := random.IntN(3); n > 0; n-- {
			at(1+random.IntN(rounds), func() {
				if _, err := c.orders.Cancel(ctx, id, ""); err != nil && !isDelivered(err) {
					t.Errorf("cancel: %v", err)
				}
			})
		}
		for n := random.IntN(3); n > 0; n-- {
			at(1+random.IntN(rounds), func() {
				_, err := c.dispatches.MarkDelivered(ctx, id)
				if kind := domain.KindOf(err); err != nil && kind != domain.NotFound && kind != domain.Conflict {
					t.Errorf("deliver: %v", err)
				}
			})
		}
	}
	coming := map[int]map[string][]announcement{} // by round and queue
	var together atomic.Int64
	announced := map[string]int{} // by order and event
	for round := 0; ; round++ {
		tasks := schedule[round]
		delete(schedule, round)
		for range 2 { // processes
			tasks = append(tasks, func() {
				if _, err := c.dispatches.AssignWaiting(ctx); err != nil {
					t.Errorf("assign waiting: %v", err)
				}
			})
		}
		for _, consumer := range c.consumers {
			all := coming[round][consumer.queue]
			random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
			for len(all) > 0 {
				n := min(len(all), 1+random.IntN(40))
				some := all[:n]
				all = all[n:]
				tasks = append(tasks, func() {
					was, err := consumer.settleAll(some)
					if err != nil {
						t.Error(err)
					}
					if was {
						together.Add(int64(len(some)))
					}
				})
			}
		}
		delete(coming, round)
		random.Shuffle(len(tasks), func(i, j int) { tasks[i], tasks[j] = tasks[j], tasks[i] })
		atOnceInTwelve(tasks)
		taken := c.takeOutboxes(t)
		for _, a := range taken {
			announced[a.orderID+" "+a.key]++
			for _, consumer := range c.consumers {
				for n := 1 + random.IntN(2); consumer.key == a.key && n > 0; n-- {
					later := round + 1 + random.IntN(3)
					if coming[later] == nil {
						coming[later] = map[string][]announcement{}
					}
					coming[later][consumer.queue] = append(coming[later][consumer.queue], a)
				}
			}
		}
		if len(taken) == 0 && len(schedule) == 0 && len(coming) == 0 {
			break
		}
	}
	t.Logf("%d messages were handled together", together.Load())
	require.NotZero(t, together.Load())
	for what, n := range announced {
		require.Equal(t, 1, n, "%s is announced once", what)
	}
	c.checkEnds(t, orders)
}

func atOnceInTwelve(tasks []func()) {
	next := make(chan func())
	var workers sync.WaitGroup
	for range 12 {
		workers.Go(func() {
			for task := range next {
				task()
			}
		})
	}
	for _, task := range tasks {
		next <- task
	}
	close(next)
	workers.Wait()
}

// checkEnds checks what must hold when nothing is under way any more.
func (c *choreography) checkEnds(t testing.TB, orders int) {
	t.Helper()
	read := func(url, query string) map[string]string {
		rows, err := database(t, url).Query(query)
		require.NoError(t, err)
		defer rows.Close()
		all := map[string]string{}
		for rows.Next() {
			var id, value string
			require.NoError(t, rows.Scan(&id, &value))
			require.NotContains(t, all, id)
			all[id] = value
		}
		require.NoError(t, rows.Err())
		return all
	}
	statuses := read(c.order, "SELECT orderId, status FROM order_info")
	earned := read(c.order, "SELECT orderId, points FROM order_info")
	dispatches := read(c.dispatch, "SELECT orderId, state FROM platoon")
	payments := read(c.payment, "SELECT orderId, state FROM payment")
	held := read(c.payment, "SELECT orderId, charged_at IS NOT NULL AND cancelled_at IS NULL FROM simulated_charge")
	ledger := read(c.stack.points, "SELECT orderId, SUM(points) FROM points_entry GROUP BY orderId")
	require.Len(t, statuses, orders)
	ends := map[string]int{}
	for id, status := range statuses {
		end := fmt.Sprintf("order %s, dispatch %s, payment %s", status, dispatches[id], payments[id])
		ends[end]++
		if payments[id] == "succeeded" {
			require.Equal(t, "1", held[id], "%s: %s", id, end)
			require.Equal(t, ledger[id], earned[id], "%s: %s", id, end)
			require.NotEqual(t, "0", earned[id], "%s: %s", id, end)
		} else {
			require.Equal(t, "0", held[id], "%s: %s", id, end)
			require.Contains(t, []string{"", "0"}, ledger[id], "%s: %s", id, end)
			require.Equal(t, "0", earned[id], "%s: %s", id, end)
		}
		switch status {
		case "cancelled":
			require.Contains(t, []string{"released", "delivered"}, dispatches[id], "%s: %s", id, end)
			require.Contains(t, []string{"void", "refunded", "refused"}, payments[id], "%s: %s", id, end)
		case "delivered":
			require.Equal(t, "delivered", dispatches[id], "%s: %s", id, end)
			require.Contains(t, []string{"succeeded", "refused"}, payments[id], "%s: %s", id, end)
		case "dispatched":
			require.Equal(t, "assigned", dispatches[id], "%s: %s", id, end)
			require.Equal(t, "succeeded", payments[id], "%s: %s", id, end)
		default:
			require.Equal(t, "waiting", dispatches[id], "%s: %s", id, end)
			require.Equal(t, "succeeded", payments[id], "%s: %s", id, end)
		}
	}
	t.Logf("ends: %v", ends)
	require.Zero(t, count(t, c.dispatch, "SELECT COUNT(*) FROM courier WHERE capacity > 0 AND active > capacity"), "couriers who have too much")
	for courier, active := range read(c.dispatch, "SELECT courier_id, active FROM courier") {
		assigned := count(t, c.dispatch, "SELECT COUNT(*) FROM platoon WHERE takeout_userId = ? AND state = 'assigned'", courier)
		require.Equal(t, fmt.Sprint(assigned), active, "the room of courier %s", courier)
	}
}
