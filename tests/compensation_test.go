package tests

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"takeout/app"
	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/ports/httpapi"
	"takeout/service"
)

// stranger returns a producer that shares no code with the program where it can be: plain AMQP.
func (s *system) stranger(t testing.TB) func(key, id string, body []byte, headers map[string]string) {
	t.Helper()
	own := s.publisher(t)
	if !strings.HasPrefix(s.broker, "amqp") {
		return func(key, id string, body []byte, headers map[string]string) {
			msg := message.NewMessage(id, body)
			msg.Metadata = headers
			require.NoError(t, own.Publish(key, msg))
		}
	}
	channel, exchange := s.foreign(t)
	return func(key, id string, body []byte, headers map[string]string) {
		table := amqp.Table{}
		for name, value := range headers {
			table[name] = value
		}
		require.NoError(t, channel.PublishWithContext(context.Background(), exchange, key, true, false,
			amqp.Publishing{MessageId: id, Body: body, Headers: table}))
	}
}

// placedAs returns the announcement of an order of that id.
func placedAs(id string) event.OrderPlaced {
	return event.OrderPlaced{Order: event.Order{
		OrderID: id, Name: "麻婆豆腐", Amount: 2850, Currency: "CNY", Status: "placed", Version: 1, PlacedAt: time.Now().UTC().Truncate(time.Microsecond),
	}}
}

func cancelledAs(e event.OrderPlaced) event.OrderCancelled {
	o := e.Order
	o.Status, o.Version = "cancelled", o.Version+1
	return event.OrderCancelled{Order: o, Reason: "changed my mind", CancelledAt: o.PlacedAt.Add(time.Second)}
}

func encode(t testing.TB, id string, at time.Time, e event.Event) []byte {
	t.Helper()
	body, err := event.Encode(id, at, e)
	require.NoError(t, err)
	return body
}

// awaitCount waits until a query of the order database counts as many as wanted.
func (s *system) awaitCount(t testing.TB, want int, query string, args ...any) {
	t.Helper()
	within(t, time.Minute, fmt.Sprintf("%d rows: %s %v", want, query, args), func() error {
		if n := s.orderRows(t, query, args...); n != want {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
}

const (
	recreatedRows = "SELECT COUNT(*) FROM history WHERE step = 'recreated'"
	keptForComp   = "SELECT COUNT(*) FROM failure WHERE consumer = 'compensation.recreate-order' AND error_code = ? AND order_id = ?"
)

// What the demonstration shows: every third order or so is announced and then rolled back.
func TestOrdersThatWereAnnouncedAndRolledBackAreMadeAgain(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := startWith(t, st, func(cfg *service.Config) {
			cfg.Publish, cfg.FailAfterPublish, cfg.EventKey = "before-commit", 0.3, "a key of sixteen bytes or more"
			cfg.RetryDelays = []time.Duration{time.Second, 5 * time.Second, time.Minute}
			cfg.ReconcileEvery, cfg.ReconcileGrace = 0, time.Second
		})
		s.awaitBroker(t)
		const orders = 1000
		var lost atomic.Int64
		var next atomic.Int64
		var clients sync.WaitGroup
		for range 8 {
			clients.Go(func() {
				for i := next.Add(1); i <= orders; i = next.Add(1) {
					body := fmt.Sprintf(`{"order_id":"o-%d","name":"order %d","amount":%d}`, i, i, i)
					a, err := send(http.MethodPost, s.api+"/v1/orders", body)
					for tries := 1; err == nil && a.status == http.StatusServiceUnavailable && !contains(a.body, `"rolled_back_on_purpose"`) && tries < 10; tries++ {
						a, err = send(http.MethodPost, s.api+"/v1/orders", body) // a machine that is too slow, as a client takes it
					}
					switch {
					case err != nil:
						t.Errorf("order %d: %v", i, err)
					case contains(a.body, `"rolled_back_on_purpose"`) && contains(a.body, fmt.Sprintf(`"order_id":"o-%d"`, i)):
						lost.Add(1)
					case a.status != http.StatusCreated && a.status != http.StatusOK:
						t.Errorf("order %d: %s", i, a)
					}
				}
			})
		}
		clients.Wait()
		require.InDelta(t, orders*0.3, lost.Load(), 100)
		s.awaitCount(t, orders, "SELECT COUNT(*) FROM order_info")
		s.awaitDispatchRows(t, orders, "SELECT COUNT(*) FROM platoon WHERE state = 'assigned'")
		require.Equal(t, s.dispatchedOrders(t, st.dispatch, "platoon"), s.dispatchedOrders(t, st.order, "order_info"), "name, money and time agree")
		require.Equal(t, int(lost.Load()), s.orderRows(t, recreatedRows), "as many as were rolled back")
		require.Equal(t, int(lost.Load()), s.orderRows(t, "SELECT COUNT(DISTINCT order_id) FROM history WHERE step = 'recreated'"))
		s.awaitAllDispatched(t, orders)
		s.noFailures(t)
		require.Contains(t, string(mustGet(t, s.api+"/readyz").body), "--publish=before-commit")
		var state httpapi.CompensationBody
		require.NoError(t, json.Unmarshal(mustGet(t, s.api+"/v1/compensation").body, &state))
		require.False(t, state.Stopped, "%+v", state)
		eventually(t, "all services agree", func() error {
			report := s.reconcile(t, `{"repair":false,"full":true}`)
			if !report.Consistent || report.InFlight > 0 || report.Compared.Orders < orders {
				return fmt.Errorf("%+v", report)
			}
			return nil
		})
	})
}

// dispatchedOrders returns what a table says of each order.
func (s *system) dispatchedOrders(t testing.TB, url, table string) map[string]string {
	t.Helper()
	rows, err := database(t, url).Query("SELECT orderId, name, order_money, currency, placed_at FROM " + table)
	require.NoError(t, err)
	defer rows.Close()
	all := map[string]string{}
	for rows.Next() {
		var id, name, currency string
		var money int64
		var placed sql.NullTime
		require.NoError(t, rows.Scan(&id, &name, &money, &currency, &placed))
		all[id] = fmt.Sprint(name, money, currency, placed.Time.UTC())
	}
	require.NoError(t, rows.Err())
	return all
}

func TestAnnouncedOrderThatIsMissingIsMadeAgainOnce(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		publish := s.stranger(t)
		e, id := placedAs("o-lost"), newEventID()
		body := encode(t, id, time.Now(), e)
		publish("order.placed", id, body, nil)
		o := s.awaitDispatchedOnceMade(t, "o-lost")
		require.Equal(t, e.Name, o.Name)
		require.Equal(t, e.Amount, o.Amount)
		require.True(t, e.PlacedAt.Equal(o.PlacedAt), "%s and %s", e.PlacedAt, o.PlacedAt)
		require.Equal(t, 1, s.orderRows(t, recreatedRows+" AND order_id = 'o-lost' AND detail LIKE ?", "%"+id+"%"))

		for range 1000 {
			publish("order.placed", id, body, nil)
		}
		for range 10 {
			other := newEventID()
			publish("order.placed", other, encode(t, other, time.Now(), e), nil)
		}
		wrong, wrongID := e, newEventID()
		wrong.Amount++
		publish("order.placed", wrongID, encode(t, wrongID, time.Now(), wrong), nil)
		publish("order.placed", "", []byte("\x00 not an event"), nil)
		s.awaitCount(t, 1, keptForComp, "order_mismatch", "o-lost")
		s.awaitCount(t, 1, "SELECT COUNT(*) FROM failure WHERE consumer = 'compensation.recreate-order' AND order_id = '' AND error_code IN ('event_not_utf8', 'event_malformed')")
		s.awaitDispatched(t, s.place(t, "after the storm", 100))
		require.Equal(t, 1, s.orderRows(t, recreatedRows))
		require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE orderId = 'o-lost' AND order_money = ?", e.Amount))
		require.Equal(t, 1, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE orderId = 'o-lost' AND order_money = ?", e.Amount))
		require.Equal(t, 2, s.orderRows(t, "SELECT COUNT(*) FROM failure WHERE consumer LIKE 'compensation.%'"))
	})
}

// awaitDispatchedOnceMade is awaitDispatched for an order that need not be there yet.
func (s *system) awaitDispatchedOnceMade(t testing.TB, id string) httpapi.OrderBody {
	t.Helper()
	s.awaitCount(t, 1, "SELECT COUNT(*) FROM order_info WHERE orderId = ?", id)
	return s.awaitDispatched(t, id)
}

func TestEventsOfAnotherTimeAreKeptAndNotActedOn(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		publish := s.stranger(t)
		now := time.Now()
		for order, row := range map[string]struct {
			made time.Time
			code string
		}{
			"o-old":    {now.Add(-s.cfg.DedupHorizon - time.Minute), "too_old"},
			"o-future": {now.Add(6 * time.Minute), "bad_time"},
			"o-oldest": {time.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC), "too_old"},
		} {
			for _, e := range []event.Event{placedAs(order), cancelledAs(placedAs(order))} {
				id := newEventID()
				publish(e.Key(), id, encode(t, id, row.made, e), nil)
			}
			s.awaitCount(t, 2, "SELECT COUNT(*) FROM failure WHERE order_id = ? AND error_code = ? AND consumer LIKE 'compensation.%'", order, row.code)
			s.awaitDispatchRows(t, 2, "SELECT COUNT(*) FROM failure WHERE order_id = ? AND error_code = ?", order, row.code)
		}
		for order, made := range map[string]time.Time{"o-aged": now.Add(-s.cfg.DedupHorizon + time.Hour), "o-soon": now.Add(4 * time.Minute)} {
			id := newEventID()
			publish("order.placed", id, encode(t, id, made, placedAs(order)), nil)
			s.awaitDispatchedOnceMade(t, order)
		}
		require.Equal(t, 2, s.orderRows(t, "SELECT COUNT(*) FROM order_info"))
		require.Equal(t, 2, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon"))
	})
}

func TestWithAKeyOnlySignedEventsAreActedOn(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		const older, newer = "the older key of 2025", "the newer key of 2026"
		s := startWith(t, st, func(cfg *service.Config) { cfg.EventKey = newer + "," + older })
		own := s.place(t, "signed by the program", 100)
		s.awaitDispatched(t, own)

		publish := s.stranger(t)
		sign := func(key string, body []byte) map[string]string {
			keys, err := event.ParseKeys(key)
			require.NoError(t, err)
			return map[string]string{event.SignatureHeader: keys.Sign(body)}
		}
		other := encode(t, "evt_other", time.Now(), placedAs("o-other"))
		forged := map[string]func(body []byte) map[string]string{
			"o-unsigned":  func([]byte) map[string]string { return nil },
			"o-wrong-key": func(body []byte) map[string]string { return sign("the key of a stranger", body) },
			"o-copied":    func([]byte) map[string]string { return sign(newer, other) },
			"o-nonsense":  func([]byte) map[string]string { return map[string]string{event.SignatureHeader: "sha256=\u00e9"} },
		}
		for order, headers := range forged {
			id := newEventID()
			body := encode(t, id, time.Now(), placedAs(order))
			publish("order.placed", id, body, headers(body))
		}
		replayed := newEventID()
		cancelled := encode(t, replayed, time.Now(), cancelledAs(placedAs("o-replayed")))
		publish("order.placed", replayed, cancelled, sign(newer, cancelled)) // genuine, under another routing key
		for order, key := range map[string]string{"o-genuine": newer, "o-rotated": older} {
			id := newEventID()
			body := encode(t, id, time.Now(), placedAs(order))
			publish("order.placed", id, body, sign(key, body))
			s.awaitDispatchedOnceMade(t, order)
		}
		for order := range forged {
			s.awaitCount(t, 1, keptForComp, "event_forged", order)
			s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM failure WHERE error_code = 'event_forged' AND order_id = ?", order)
		}
		s.awaitCount(t, 1, keptForComp, "event_type_unexpected", "o-replayed")
		require.Equal(t, 3, s.orderRows(t, "SELECT COUNT(*) FROM order_info"))
		require.Equal(t, 3, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon"))
		require.Equal(t, 2, s.orderRows(t, recreatedRows))

		// What a person edits is signed.
		f := s.awaitFailures(t, 1, "?handler=dispatch.assign-courier&order_id=o-unsigned")[0]
		event := s.showFailure(t, f.ID).Payload
		body, err := json.Marshal(map[string]string{"payload": event, "reason": "from the old program; the order is right"})
		require.NoError(t, err)
		decoded[httpapi.FailureBody](t, mustSend(t, http.MethodPost, s.api+"/v1/failures/"+f.ID+"/edit", string(body)), http.StatusOK)
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = 'o-unsigned'")
	})
}

func TestCancelledOrderIsNeverMadeActiveAgain(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		publish := s.stranger(t)
		e := placedAs("o-cancelled")
		c, cID, pID := cancelledAs(e), newEventID(), newEventID()
		publish("order.cancelled", cID, encode(t, cID, time.Now(), c), nil)
		s.awaitCount(t, 1, "SELECT COUNT(*) FROM order_info WHERE orderId = 'o-cancelled' AND status = 'cancelled' AND version = 2 AND cancel_reason = 'changed my mind'")
		publish("order.placed", pID, encode(t, pID, time.Now(), e), nil)
		s.awaitDispatched(t, s.place(t, "later", 1))
		require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE orderId = 'o-cancelled' AND status = 'cancelled' AND version = 2"))
		require.Equal(t, 1, s.orderRows(t, recreatedRows))
		require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM failure"))
	})
}

func TestOrderIsMadeAgainAsFarAsItHadCome(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		ctx, c := context.Background(), app.NewCompensation(s, 100)
		at := time.Date(2026, 1, 2, 3, 4, 5, 678901000, time.UTC)
		delivered := at.Add(time.Hour)
		made := func(id string, change func(*event.OrderPlaced)) (order.Snapshot, error) {
			e := placedAs(id)
			change(&e)
			if err := c.Recreate(ctx, e); err != nil {
				return order.Snapshot{}, err
			}
			orderID, err := order.ParseID(id)
			require.NoError(t, err)
			return app.NewOrders(s).Get(ctx, orderID)
		}
		o, err := made("placed", func(e *event.OrderPlaced) { e.Version = 7 })
		require.NoError(t, err)
		require.Equal(t, order.Placed, o.Status)
		require.EqualValues(t, 7, o.Version, "what is announced next must be newer than what was announced")

		o, err = made("dispatched", func(e *event.OrderPlaced) {
			e.Status, e.Version, e.Dispatch = "dispatched", 2, &event.Courier{CourierID: "zhao", AssignedAt: at}
		})
		require.NoError(t, err)
		require.Equal(t, order.Dispatched, o.Status)
		require.Equal(t, "zhao", o.CourierID)
		require.Equal(t, at, o.AssignedAt)
		require.EqualValues(t, 2, o.Version)

		o, err = made("delivered", func(e *event.OrderPlaced) {
			e.Status, e.Version, e.Dispatch = "delivered", 2, &event.Courier{CourierID: "zhao", AssignedAt: at, DeliveredAt: &delivered}
		})
		require.NoError(t, err)
		require.Equal(t, order.Delivered, o.Status)
		require.Equal(t, delivered, o.DeliveredAt)
		require.EqualValues(t, 3, o.Version)

		for name, contradiction := range map[string]func(*event.OrderPlaced){
			"on its way without a courier": func(e *event.OrderPlaced) { e.Status = "dispatched" },
			"placed and cancelled":         func(e *event.OrderPlaced) { e.Status = "cancelled" },
			"an unknown status":            func(e *event.OrderPlaced) { e.Status = "eaten" },
			"a courier that cannot be": func(e *event.OrderPlaced) {
				e.Status, e.Dispatch = "dispatched", &event.Courier{CourierID: "a b", AssignedAt: at}
			},
			"no time": func(e *event.OrderPlaced) { e.PlacedAt = time.Time{} },
		} {
			_, err := made("contradictory", contradiction)
			require.Equal(t, domain.Invalid, domain.KindOf(err), name)
		}
		require.Equal(t, 3, countIn(t, s, "SELECT COUNT(*) FROM order_info"))
		require.Equal(t, 3, countIn(t, s, "SELECT COUNT(*) FROM history"))
		require.Zero(t, pendingEvents(t, s), "nothing is announced again")
		require.Zero(t, countIn(t, s, "SELECT COUNT(*) FROM inbox"), "without a delivery")
	})
}

func TestLateAnnouncementDoesNotTouchWhatIsStored(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		ctx, c, orders := context.Background(), app.NewCompensation(s, 100), app.NewOrders(s)
		heard := func(id string) context.Context {
			return app.WithDelivery(ctx, app.Delivery{Consumer: "compensation.recreate-order", EventID: newEventID(), OrderID: id})
		}
		storeOrder(t, s, "o1") // placed, and cancelled
		id, err := order.ParseID("o1")
		require.NoError(t, err)
		cancelled, err := orders.Cancel(ctx, id, "changed my mind")
		require.NoError(t, err)
		late := placedAs("o1")
		late.Name, late.Amount = "x", 100
		require.NoError(t, c.Recreate(heard("o1"), late))
		require.NoError(t, c.RecreateCancelled(heard("o1"), cancelledAs(late)))
		now, err := orders.Get(ctx, id)
		require.NoError(t, err)
		require.Equal(t, cancelled, now)
		require.Zero(t, countIn(t, s, "SELECT COUNT(*) FROM history"))
		require.Zero(t, countIn(t, s, "SELECT COUNT(*) FROM inbox"), "an order that is there costs a read and nothing else")

		// The order service lost the cancel, and the event that it had committed brings it back.
		storeOrder(t, s, "o2")
		late.OrderID = "o2"
		late.Version = 4
		require.NoError(t, c.RecreateCancelled(heard("o2"), cancelledAs(late)))
		id, err = order.ParseID("o2")
		require.NoError(t, err)
		now, err = orders.Get(ctx, id)
		require.NoError(t, err)
		require.Equal(t, order.Cancelled, now.Status)
		require.EqualValues(t, 5, now.Version)
		require.Equal(t, 1, countIn(t, s, "SELECT COUNT(*) FROM history"))

		late.Amount = 99
		require.Equal(t, domain.Invalid, domain.KindOf(c.Recreate(heard("o2"), late)))
		require.Equal(t, domain.Invalid, domain.KindOf(c.RecreateCancelled(heard("o2"), cancelledAs(late))))
	})
}

// announceAndLose places orders whose announcements wait in the broker, and deletes the orders.
func announceAndLose(t *testing.T, st stack, orders int) {
	t.Helper()
	before := &system{stack: st, cfg: config(t, st)}
	before.cfg.Roles = []string{"order", "relay"}
	before.start(t)
	before.placeMany(t, orders, 8)
	before.awaitCount(t, 0, "SELECT COUNT(*) FROM outbox")
	before.stop(t)
	alter(t, st.order, "DELETE FROM order_info")
}

// The order service is pointed at an empty database, or at one that lost all.
func TestCompensationStopsWhenMostOrdersAreMissingAndGoesOnWhenResumed(t *testing.T) {
	t.Parallel()
	st := production(t)
	const orders, limit = 300, 20
	announceAndLose(t, st, orders)
	s := startWith(t, st, func(cfg *service.Config) { cfg.CompensationLimit, cfg.Prefetch = limit, 10 })
	at := map[string]string{"TAKEOUT_URL": s.api}
	var state httpapi.CompensationBody
	eventually(t, "the compensation stops", func() error {
		require.NoError(t, json.Unmarshal(mustGet(t, s.api+"/v1/compensation").body, &state))
		if !state.Stopped {
			return fmt.Errorf("%+v", state)
		}
		return nil
	})
	require.Equal(t, limit, state.Limit)
	require.Equal(t, limit+1, state.Missing)
	require.Equal(t, limit+1, state.Announced)
	ready := mustGet(t, s.api+"/readyz")
	require.Equal(t, http.StatusOK, ready.status, "orders are taken")
	require.Contains(t, string(ready.body), `"status":"degraded"`)
	require.Contains(t, string(ready.body), "POST /v1/compensation/resume")
	require.Contains(t, string(mustGet(t, s.api+"/metrics").body), "takeout_compensation_stopped 1")
	made := s.orderRows(t, recreatedRows)
	require.LessOrEqual(t, made, limit+1+10, "no more than were in flight")
	require.Equal(t, http.StatusCreated, mustSend(t, http.MethodPost, s.api+"/v1/orders", `{"order_id":"meanwhile","name":"x","amount":1}`).status)

	shown := run(t, at, "compensation", "status", "-o", "table")
	require.Equal(t, 0, shown.code, "%s", shown)
	require.Contains(t, shown.stdout, "stopped: 21 of 21 announced orders were missing")
	for _, wrong := range []string{`{}`, `{"reason":" "}`, `{"reason":"` + strings.Repeat("x", 201) + `"}`, `{"reason":"x","force":true}`} {
		a := mustSend(t, http.MethodPost, s.api+"/v1/compensation/resume", wrong)
		require.Contains(t, []int{http.StatusBadRequest, http.StatusUnprocessableEntity}, a.status, "%s", a)
		a.problem(t)
	}
	require.Less(t, s.orderRows(t, recreatedRows), orders, "still stopped")

	resumed := run(t, at, "compensation", "resume", "the backup was from before noon", "-o", "table")
	require.Equal(t, 0, resumed.code, "%s", resumed)
	require.Contains(t, resumed.stdout, "running")
	s.awaitCount(t, orders+1, "SELECT COUNT(*) FROM order_info")
	s.awaitCount(t, orders, recreatedRows)
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM failure WHERE consumer LIKE 'compensation.%'"), "no attempt was spent")
}

// What keeps the compensation from filling what may be the wrong database holds for the reconciliation, too.
func TestReconciliationMakesNoOrderAgainWhileTheCompensationHasStopped(t *testing.T) {
	t.Parallel()
	st := production(t)
	const orders, limit = 200, 20
	announceAndLose(t, st, orders)
	s := reconciled(t, st, func(cfg *service.Config) {
		cfg.CompensationLimit, cfg.Prefetch, cfg.ReconcileGrace = limit, 10, 200*time.Millisecond
	})
	s.awaitDispatchRows(t, orders, "SELECT COUNT(*) FROM platoon WHERE state = 'assigned'")
	refused := func() error {
		a := mustSend(t, http.MethodPost, s.api+"/v1/reconciliation", `{"repair":true}`)
		if a.status != http.StatusOK || !strings.Contains(string(a.body), "the compensation is stopped") {
			return fmt.Errorf("%s", a)
		}
		return nil
	}
	eventually(t, "the reconciliation says why it makes no order again", refused)
	made := s.orderRows(t, recreatedRows)
	require.LessOrEqual(t, made, limit+1+10, "no more than were in flight")
	require.NoError(t, refused())
	require.Equal(t, made, s.orderRows(t, recreatedRows))

	a := mustSend(t, http.MethodPost, s.api+"/v1/compensation/resume", `{"reason":"the backup was from before noon"}`)
	require.Equal(t, http.StatusOK, a.status, "%s", a)
	s.awaitReconciled(t)
	s.awaitCount(t, orders, recreatedRows)
}

// The producer's COMMIT is lost, and before it can try again the compensation has heard the announcement.
func TestProducerWhoseOrderTheCompensationStoredIsAnswered201(t *testing.T) {
	t.Parallel()
	st := production(t)
	behind := st
	var orders *commitProxy
	behind.order, orders = throughCommits(t, st.order)
	intake := &system{stack: behind, cfg: config(t, behind)}
	intake.cfg.Roles, intake.cfg.Publish = []string{"order"}, "before-commit"
	intake.start(t)
	t.Cleanup(func() { intake.stop(t) })
	rest := &system{stack: st, cfg: config(t, st)}
	rest.cfg.Roles = []string{"dispatch", "compensation", "relay"}
	rest.start(t)
	t.Cleanup(func() { rest.stop(t) })
	intake.awaitBroker(t)
	for i, key := range []string{"", "key-1"} {
		id := fmt.Sprint("o-", i)
		trap := orders.arm(commitTrap{fault: notExecuted, statement: storesOrder, andAway: true})
		answered := make(chan answer, 1)
		go func() {
			var headers []string
			if key != "" {
				headers = []string{"Idempotency-Key", key}
			}
			a, _ := send(http.MethodPost, intake.api+"/v1/orders", fmt.Sprintf(`{"order_id":%q,"name":"x","amount":1}`, id), headers...)
			answered <- a
		}()
		trap.wait(t)
		rest.awaitCount(t, 1, recreatedRows+" AND order_id = ?", id)
		orders.mend()
		a := <-answered
		require.Equal(t, http.StatusCreated, a.status, "%s", a)
		require.Equal(t, id, a.order(t).OrderID)
		require.Equal(t, 1, rest.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE orderId = ?", id))
		rest.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = ?", id)
	}
}

// awaitBroker waits until the program is connected to the broker: who announces before the commit takes no orders before.
func (s *system) awaitBroker(t testing.TB) {
	t.Helper()
	eventually(t, "the broker is there", func() error {
		if a := mustGet(t, s.api+"/readyz"); !contains(a.body, `"broker":{"ok":true`) {
			return fmt.Errorf("%s", a)
		}
		return nil
	})
}

func TestEventKeyIsASecretOfSixteenBytesOrMore(t *testing.T) {
	t.Parallel()
	run(t, map[string]string{"TAKEOUT_EVENT_KEY": password}, "serve").complains(t, 2, "--event-key (TAKEOUT_EVENT_KEY)", "16")
	run(t, map[string]string{"TAKEOUT_EVENT_KEY": "0123456789abcdef," + password}, "config").complains(t, 2, "--event-key (TAKEOUT_EVENT_KEY)", "key 2")
	run(t, nil, "serve", "--event-key="+password+password+password).complains(t, 2, "--event-key", "TAKEOUT_EVENT_KEY_FILE")
	run(t, nil, "serve", "--event-key", password+password+password).complains(t, 2, "--event-key", "TAKEOUT_EVENT_KEY_FILE")
	shown := run(t, map[string]string{"TAKEOUT_EVENT_KEY": password + password + password}, "config", "-o", "table")
	require.Equal(t, 0, shown.code, "%s", shown)
	require.Regexp(t, `(?m)^--event-key +TAKEOUT_EVENT_KEY +\*\*\*$`, shown.stdout)
	shown.keepsThePassword(t)
}

func TestHorizonShorterThanAMessageMayComeAgainIsRefused(t *testing.T) {
	t.Parallel()
	run(t, map[string]string{"TAKEOUT_DEDUP_HORIZON": "336h"}, "serve").complains(t, 2, "--dedup-horizon (TAKEOUT_DEDUP_HORIZON)", "336h35m35s")
	run(t, map[string]string{"TAKEOUT_RETRY_DELAYS": "24h,24h", "TAKEOUT_DEDUP_HORIZON": "383h"}, "serve").complains(t, 2, "--dedup-horizon (TAKEOUT_DEDUP_HORIZON)", "384h")
	run(t, map[string]string{"TAKEOUT_FAIL_AFTER_PUBLISH": "0.3"}, "serve").complains(t, 2, "--fail-after-publish (TAKEOUT_FAIL_AFTER_PUBLISH)")
	run(t, map[string]string{"TAKEOUT_FAIL_AFTER_PUBLISH": "1.1", "TAKEOUT_PUBLISH": "before-commit"}, "serve").complains(t, 2, "--fail-after-publish (TAKEOUT_FAIL_AFTER_PUBLISH)")
	run(t, map[string]string{"TAKEOUT_COMPENSATION_LIMIT": "0"}, "serve").complains(t, 2, "--compensation-limit (TAKEOUT_COMPENSATION_LIMIT)")
}

func TestAnnouncingBeforeStoringIsLoudAndOffByDefault(t *testing.T) {
	t.Parallel()
	s, p := embeddedProcess(t, map[string]string{"TAKEOUT_PUBLISH": "before-commit", "TAKEOUT_FAIL_AFTER_PUBLISH": "1"})
	require.Contains(t, p.log.String(), "orders are announced before they are stored")
	require.Contains(t, string(mustGet(t, s.api+"/readyz").body), `"announcing":{"ok":false`)
	a := mustSend(t, http.MethodPost, s.api+"/v1/orders", `{"order_id":"o1","name":"x","amount":1}`)
	require.Equal(t, http.StatusServiceUnavailable, a.status, "%s", a)
	require.Equal(t, "o1", a.problem(t).OrderID)
	s.awaitDispatchedOnceMade(t, "o1")
	again := mustSend(t, http.MethodPost, s.api+"/v1/orders", `{"order_id":"o1","name":"x","amount":1}`)
	require.Equal(t, http.StatusOK, again.status, "the client's next try finds it: %s", again)

	const keyed = `{"order_id":"o2","name":"x","amount":1}`
	require.Equal(t, http.StatusServiceUnavailable, s.placeUnder(t, "key-1", keyed).status)
	s.awaitDispatchedOnceMade(t, "o2")
	first := s.placeUnder(t, "key-1", keyed)
	require.Equal(t, http.StatusCreated, first.status, "%s", first)
	s.placeUnder(t, "key-1", keyed).replays(t, first)

	quiet, q := embeddedProcess(t, nil)
	require.NotContains(t, q.log.String(), "before they are stored")
	require.Contains(t, string(mustGet(t, quiet.api+"/readyz").body), `"status":"ready"`)
}
