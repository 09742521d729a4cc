package tests

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/ports/httpapi"
)

// cancel cancels the order and returns it.
func (s *system) cancel(t testing.TB, id string) httpapi.OrderBody {
	t.Helper()
	a := mustSend(t, http.MethodPost, s.api+"/v1/orders/"+id+"/cancel", `{"reason":"changed my mind"}`)
	require.Equal(t, http.StatusOK, a.status, "%s", a)
	return a.order(t)
}

func (s *system) deliver(t testing.TB, id string) answer {
	t.Helper()
	return mustSend(t, http.MethodPost, s.dispatchAPI+"/v1/dispatches/"+id+"/delivered", "")
}

func (s *system) dispatchOf(t testing.TB, id string) httpapi.DispatchBody {
	t.Helper()
	a := mustGet(t, s.dispatchAPI+"/v1/dispatches/"+id)
	require.Equal(t, http.StatusOK, a.status, "%s", a)
	var d httpapi.DispatchBody
	require.NoError(t, json.Unmarshal(a.body, &d))
	return d
}

func (s *system) awaitStatus(t testing.TB, id, status string) httpapi.OrderBody {
	t.Helper()
	var o httpapi.OrderBody
	eventually(t, "order "+id+" is "+status, func() error {
		if o = s.get(t, id); o.Status != status {
			return fmt.Errorf("it is %s", o.Status)
		}
		return nil
	})
	return o
}

func TestCancelledOrderIsReleasedAndItsCourierFree(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		s.nobodyOnDuty(t)
		early := s.place(t, "early", 100)
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND state = 'waiting'", early)
		cancelled := s.cancel(t, early)
		require.Equal(t, "cancelled", cancelled.Status)
		require.Equal(t, "changed my mind", cancelled.CancelReason)
		require.NotNil(t, cancelled.CancelledAt)
		require.EqualValues(t, 2, cancelled.Version)
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND state = 'released'", early)

		s.addCourier(t, "small", 1)
		first := s.place(t, "first", 100)
		require.Equal(t, "small", s.awaitDispatched(t, first).Dispatch.CourierID)
		second := s.place(t, "second", 100)
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND state = 'waiting'", second)
		require.Nil(t, s.dispatchOf(t, second).AssignedAt)
		s.cancel(t, first)
		require.Equal(t, "small", s.awaitDispatched(t, second).Dispatch.CourierID, "the room is free again")
		require.Equal(t, "released", s.dispatchOf(t, first).State)
		require.NotNil(t, s.dispatchOf(t, first).ReleasedAt)
		third := s.place(t, "third", 100)
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND state = 'waiting'", third)
		require.Equal(t, http.StatusOK, s.deliver(t, second).status)
		s.awaitDispatched(t, third)

		require.Equal(t, "released", s.dispatchOf(t, early).State, "what is cancelled never gets a courier")
		require.Equal(t, "cancelled", s.get(t, early).Status)
		s.noFailures(t)
	})
}

func TestCancellingAgainChangesNothingAndDeliveredOrdersCanNotBeCancelled(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		id := s.place(t, "x", 100)
		s.awaitDispatched(t, id)
		var clients sync.WaitGroup
		for range 20 {
			clients.Go(func() {
				if a, err := send(http.MethodPost, s.api+"/v1/orders/"+id+"/cancel", `{"reason":"changed my mind"}`); err != nil || a.status != http.StatusOK {
					t.Errorf("%s: %v", a, err)
				}
			})
		}
		clients.Wait()
		eventually(t, "cancelling answers what reading does, unless its points come in between", func() error {
			if cancelled, read := s.cancel(t, id), s.get(t, id); !reflect.DeepEqual(cancelled, read) {
				return fmt.Errorf("%+v and then %+v", cancelled, read)
			}
			return nil
		})
		require.EqualValues(t, 3, s.get(t, id).Version)
		request, err := http.NewRequest(http.MethodPost, s.api+"/v1/orders/"+id+"/cancel", nil)
		require.NoError(t, err)
		bare, err := do(request)
		require.NoError(t, err)
		require.Equal(t, http.StatusOK, bare.status, "without a body and its type: %s", bare)
		require.Equal(t, "changed my mind", bare.order(t).CancelReason, "the first reason stays")

		delivered := s.place(t, "y", 100)
		s.awaitDispatched(t, delivered)
		first := s.deliver(t, delivered)
		require.Equal(t, http.StatusOK, first.status, "%s", first)
		require.Equal(t, first.body, s.deliver(t, delivered).body)
		eventually(t, "the order knows its points, which may come last", func() error {
			if o := s.get(t, delivered); o.Points != 1 {
				return fmt.Errorf("%d points", o.Points)
			}
			return nil
		})
		o := s.awaitStatus(t, delivered, "delivered")
		require.NotNil(t, o.DeliveredAt)
		for _, body := range []string{``, `{}`, `{"reason":"too late"}`} {
			a := mustSend(t, http.MethodPost, s.api+"/v1/orders/"+delivered+"/cancel", body)
			require.Equal(t, http.StatusConflict, a.status, "%s", a)
			require.Equal(t, "order_delivered", a.problem(t).Code)
		}
		require.Equal(t, o, s.get(t, delivered))
		s.noFailures(t)
	})
}

func TestRequestsToCancelOrDeliverThatAreWrongAreRefused(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	s.nobodyOnDuty(t)
	id := s.place(t, "x", 100)
	s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE state = 'waiting'")
	for _, wrong := range []struct {
		path, body string
		status     int
		code       string
	}{
		{"/v1/orders/unknown/cancel", ``, http.StatusNotFound, "order_not_found"},
		{"/v1/orders/a%20b/cancel", ``, http.StatusNotFound, "order_not_found"},
		{"/v1/orders/" + id + "/cancel", `{"reason":"` + strings.Repeat("x", 201) + `"}`, http.StatusUnprocessableEntity, "reason_too_long"},
		{"/v1/orders/" + id + "/cancel", `{"reason":"a\nb"}`, http.StatusUnprocessableEntity, "reason_unreadable"},
		{"/v1/orders/" + id + "/cancel", `{"reason":7}`, http.StatusBadRequest, "member_wrong_type"},
		{"/v1/orders/" + id + "/cancel", `{"status":"placed"}`, http.StatusBadRequest, "member_unknown"},
		{"/v1/orders/" + id + "/cancel", `[]`, http.StatusBadRequest, "body_not_an_object"},
		{"/v1/dispatches/unknown/delivered", ``, http.StatusNotFound, "dispatch_not_found"},
		{"/v1/dispatches/a%20b/delivered", ``, http.StatusNotFound, "dispatch_not_found"},
		{"/v1/dispatches/" + id + "/delivered", ``, http.StatusConflict, "not_on_the_way"},
		{"/v1/dispatches/" + id + "/delivered", `{"courier_id":"zhao"}`, http.StatusBadRequest, "member_unknown"},
	} {
		a := mustSend(t, http.MethodPost, s.api+wrong.path, wrong.body)
		require.Equal(t, wrong.status, a.status, "%s %s: %s", wrong.path, wrong.body, a)
		require.Equal(t, wrong.code, a.problem(t).Code, "%s %s", wrong.path, wrong.body)
	}
	for _, path := range []string{"/v1/payments/unknown", "/v1/payments/a%20b", "/v1/points/unknown", "/v1/points/a%20b"} {
		require.Equal(t, http.StatusNotFound, mustGet(t, s.api+path).status, path)
	}
	require.Equal(t, "placed", s.get(t, id).Status)
	require.Equal(t, "waiting", s.dispatchOf(t, id).State)
}

func TestOrderWithoutACourierInTimeIsCancelledAndPaidBack(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := &system{stack: st, cfg: config(t, st)}
		s.cfg.DispatchDeadline = time.Second
		s.start(t)
		t.Cleanup(func() { s.stop(t) })
		s.nobodyOnDuty(t)
		id := s.place(t, "hungry", 2850)
		o := s.awaitStatus(t, id, "cancelled")
		require.Equal(t, order.ReasonNoCourier, o.CancelReason)
		require.Nil(t, o.Dispatch)
		require.Equal(t, "impossible", s.dispatchOf(t, id).State)
		s.awaitPayment(t, id, "refunded")
		s.awaitPoints(t, id, 0, 2)
		require.Zero(t, s.get(t, id).Points)
		s.addCourier(t, "late", 0)
		other := s.place(t, "other", 100)
		s.awaitDispatched(t, other)
		require.Equal(t, "impossible", s.dispatchOf(t, id).State, "what was given up stays so")
		s.noFailures(t)
	})
}

func TestCancellationThatComesBeforeTheAnnouncementWins(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		broker := s.publisher(t)
		placed := facts("o-early", order.Placed, 1)
		cancellation := announcementOf(t, cancelled(placed))
		require.NoError(t, broker.Publish(cancellation.key, message.NewMessage(cancellation.id, cancellation.body)))
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = 'o-early' AND state = 'released' AND takeout_userId IS NULL")
		s.awaitPayment(t, "o-early", "void")
		id := newEventID()
		require.NoError(t, broker.Publish("order.placed", message.NewMessage(id, announce(t, id, "o-early", 2850))))
		after := s.place(t, "after", 100)
		s.awaitDispatched(t, after)
		s.awaitPayment(t, after, "succeeded")
		require.Equal(t, "released", s.dispatchOf(t, "o-early").State)
		s.awaitPayment(t, "o-early", "void")
		s.noFailures(t)
	})
}

// An announcement is believed up to a version that leaves room for what the order announces later.
func TestOrderOfTheHighestVersionThatIsBelievedCanBeCancelled(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		publish := s.stranger(t)
		say := func(e event.Event) { publish(e.Key(), "", encode(t, newEventID(), time.Now(), e), nil) }
		highest, beyond := placedAs("o-highest"), placedAs("o-beyond")
		highest.Version, beyond.Version = 1<<30, 1<<30+1
		say(highest)
		s.awaitCount(t, 1, "SELECT COUNT(*) FROM order_info WHERE orderId = 'o-highest'")
		s.awaitDispatched(t, "o-highest")
		s.awaitPayment(t, "o-highest", "succeeded")
		s.cancel(t, "o-highest")
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = 'o-highest' AND state = 'released'")
		s.awaitPayment(t, "o-highest", "refunded")
		eventually(t, "the points are taken back", func() error {
			if n := count(t, s.points, "SELECT COUNT(*) FROM points_entry WHERE orderId = 'o-highest'"); n != 2 {
				return fmt.Errorf("%d entries", n)
			}
			return nil
		})

		// So can one whose cancellation has the highest version of all, and it still has a next.
		last := cancelledAs(placedAs("o-last"))
		last.Version = event.MaxVersion
		say(last)
		s.awaitCount(t, 1, "SELECT COUNT(*) FROM order_info WHERE orderId = 'o-last' AND status = 'cancelled' AND version = ?", event.MaxVersion-1)
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = 'o-last' AND state = 'released'")
		s.awaitPayment(t, "o-last", "void")
		s.noFailures(t)
		require.Zero(t, count(t, s.payment, "SELECT COUNT(*) FROM failure"))
		require.Zero(t, count(t, s.points, "SELECT COUNT(*) FROM failure"))

		say(beyond)
		for consumer, url := range map[string]string{
			"compensation.recreate-order": s.order, "dispatch.assign-courier": s.dispatch, "payment.charge-order": s.payment,
		} {
			eventually(t, consumer+" keeps what leaves no room", func() error {
				if n := count(t, url, "SELECT COUNT(*) FROM failure WHERE consumer = ? AND error_code = 'version_out_of_range'", consumer); n != 1 {
					return fmt.Errorf("%d", n)
				}
				return nil
			})
		}
	})
}

func TestOrderThatWaitsIsNotOvertaken(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		ctx := context.Background()
		assign := func(id string, at time.Duration) {
			f := facts(id, order.Placed, 1)
			f.PlacedAt = f.PlacedAt.Add(at)
			require.NoError(t, c.dispatches.Assign(ctx, f))
		}
		state := func(id string) string {
			d, err := c.dispatches.Get(ctx, orderID(t, id))
			require.NoError(t, err)
			return d.State.String()
		}
		assign("second", 0)
		assign("first", -time.Minute)
		c.addCourier(t, "one", 1)
		assign("third", time.Minute)
		require.Equal(t, "waiting", state("third"), "there is room, but not for the third")
		_, err := c.dispatches.AssignWaiting(ctx)
		require.NoError(t, err)
		require.Equal(t, []string{"assigned", "waiting", "waiting"}, []string{state("first"), state("second"), state("third")})
		c.addCourier(t, "many", 0)
		assign("fourth", 0)
		require.Equal(t, "assigned", state("fourth"), "room without a limit is for all")
		_, err = c.dispatches.AssignWaiting(ctx)
		require.NoError(t, err)
		require.Equal(t, []string{"assigned", "assigned"}, []string{state("second"), state("third")})
		require.Equal(t, 1, count(t, st.dispatch, "SELECT active FROM courier WHERE courier_id = 'one'"))
	})
}

func TestSeveralProcessesAssignWhatWaitsOnceEach(t *testing.T) {
	t.Parallel()
	st := production(t)
	c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
	ctx := context.Background()
	const waiting, room = 500, 350
	for i := range waiting {
		require.NoError(t, c.dispatches.Assign(ctx, facts(fmt.Sprint("o-", i), order.Placed, 1)))
	}
	c.addCourier(t, "small", 50)
	c.addCourier(t, "large", room-50)
	var processes sync.WaitGroup
	for range 4 {
		store, err := sqlstore.OpenDispatches(st.dispatch, nil, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		t.Cleanup(func() { _ = store.Close() })
		processes.Go(func() {
			process := app.NewDispatches(store, app.DispatchPolicy{})
			for more := true; more; {
				var err error
				if more, err = process.AssignWaiting(ctx); err != nil {
					t.Error(err)
				}
			}
		})
	}
	processes.Wait()
	_, err := c.dispatches.AssignWaiting(ctx) // what one of them left to another that had it locked
	require.NoError(t, err)
	require.Equal(t, room, count(t, st.dispatch, "SELECT COUNT(*) FROM platoon WHERE state = 'assigned'"))
	require.Equal(t, room, count(t, st.dispatch, "SELECT SUM(active) FROM courier"))
	require.Equal(t, room, count(t, st.dispatch, "SELECT COUNT(DISTINCT order_id) FROM outbox"))
	require.Equal(t, room, count(t, st.dispatch, "SELECT COUNT(*) FROM outbox"), "each is announced once")
}

func TestDispatchThatWasLostIsRestoredAsTheOrderKnowsIt(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		ctx := context.Background()
		_, err := c.orders.Place(ctx, app.PlaceOrder{ID: orderID(t, "o1"), Name: "x", Money: money(t, 100)})
		require.NoError(t, err)
		placed := c.takeOutboxes(t)
		c.settle(t, []string{"dispatch.assign-courier"}, placed...) // waits, as the copy says that was made then
		c.addCourier(t, "zhao", 5)
		c.settle(t, []string{"order.mark-dispatched"}, announcementOf(t, assignedTo("o1", "zhao")))
		require.NoError(t, c.orders.Announce(ctx, orderID(t, "o1"), app.Reannouncement{}, "the dispatch was lost"))
		again := c.takeOutboxes(t)
		for range 3 {
			c.settle(t, []string{"dispatch.assign-courier"}, again...)
		}
		d, err := c.dispatches.Get(ctx, orderID(t, "o1"))
		require.NoError(t, err)
		require.Equal(t, "assigned", d.State.String())
		require.Equal(t, "zhao", d.CourierID.String())
		require.Equal(t, 1, count(t, st.dispatch, "SELECT active FROM courier WHERE courier_id = 'zhao'"))
		require.Equal(t, 1, count(t, st.dispatch, "SELECT COUNT(*) FROM history WHERE order_id = 'o1' AND step = 'dispatch_restored'"))
	})
}

func TestRepeatedAndCorrectedAnnouncementsTakeNoRoom(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		ctx := context.Background()
		c.addCourier(t, "zhao", 50)
		f := facts("o1", order.Placed, 1)
		require.NoError(t, c.dispatches.Assign(ctx, f))
		var repeating sync.WaitGroup
		for range 20 {
			repeating.Go(func() {
				if err := c.dispatches.Assign(ctx, f); !errors.Is(err, app.ErrDuplicate) {
					t.Errorf("%v", err)
				}
			})
		}
		repeating.Wait()
		f.Name, f.Version = "Kung pao", 3
		require.NoError(t, c.dispatches.Assign(ctx, f), "a newer version corrects the name")
		f.Amount, f.Version = 1, 4
		require.Equal(t, domain.Invalid, domain.KindOf(c.dispatches.Assign(ctx, f)), "and never an amount")
		require.Equal(t, 1, count(t, st.dispatch, "SELECT active FROM courier"))
		require.Equal(t, 1, count(t, st.dispatch, "SELECT COUNT(*) FROM platoon WHERE name = 'Kung pao' AND order_money = 2850 AND state = 'assigned'"))
	})
}

// Whoever assigns what waits looks once a second by itself, which is long for somebody who is hungry.
func TestItIsToldAtOnceWhereverRoomIsMadeAtACourier(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		ctx := context.Background()
		told := func() bool {
			select {
			case <-c.dispatches.Room():
				return true
			default:
				return false
			}
		}
		c.addCourier(t, "zhao", 2)
		require.True(t, told(), "somebody comes")
		zhao, more := dispatchCourier(t, "zhao"), 3
		_, err := c.dispatches.ChangeCourier(ctx, zhao, nil, nil, &more)
		require.NoError(t, err)
		require.True(t, told(), "somebody takes more")
		for _, id := range []string{"o1", "o2"} {
			require.NoError(t, c.dispatches.Assign(ctx, facts(id, order.Placed, 1)))
		}
		require.False(t, told(), "nothing made room")
		_, err = c.dispatches.MarkDelivered(ctx, orderID(t, "o1"))
		require.NoError(t, err)
		require.True(t, told(), "an order is brought")
		require.NoError(t, c.dispatches.Release(ctx, cancelled(facts("o2", order.Placed, 1))))
		require.True(t, told(), "an order is cancelled")
		require.NoError(t, c.dispatches.Release(ctx, cancelled(facts("o3", order.Placed, 1))))
		require.False(t, told(), "nobody had that one")
	})
}

func TestGivingACourierALimitCountsWhatIsUnderWay(t *testing.T) {
	t.Parallel()
	st := production(t)
	c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
	c.addCourier(t, "zhao", 0)
	for _, id := range []string{"o1", "o2"} {
		require.NoError(t, c.dispatches.Assign(context.Background(), facts(id, order.Placed, 1)))
	}
	zhao, err := dispatch.ParseCourierID("zhao")
	require.NoError(t, err)
	store, err := sqlstore.OpenDispatches(st.dispatch, nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = store.Close() })

	changed := make(chan error, 1)
	err = store.InTx(context.Background(), func(ctx context.Context, tx app.DispatchTx) error {
		err := tx.Dispatches.Update(ctx, orderID(t, "o1"), func(d *dispatch.Dispatch) (bool, error) { return d.MarkDelivered(time.Now()) })
		if err != nil {
			return err
		}
		if err := tx.Couriers.Count(ctx, zhao, -1); err != nil {
			return err
		}
		go func() {
			capacity := 5
			_, err := c.dispatches.ChangeCourier(context.Background(), zhao, nil, nil, &capacity)
			for domain.KindOf(err) == domain.Busy { // on a slow machine it is not soon seen that it waits
				_, err = c.dispatches.ChangeCourier(context.Background(), zhao, nil, nil, &capacity)
			}
			changed <- err
		}()
		eventually(t, "whoever counts waits for what is being delivered", func() error {
			if len(changed) == 0 && lockWaits(t, st.dispatch) == 0 {
				return fmt.Errorf("it has not begun")
			}
			return nil
		})
		return nil
	})
	require.NoError(t, err)
	require.NoError(t, <-changed)
	require.Equal(t, 1, count(t, st.dispatch, "SELECT active FROM courier"), "one of two is on the way")
}

func TestItIsSaidSinceWhenTheOldestOrderWaits(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		young, old := facts("young", order.Placed, 1), facts("old", order.Placed, 1)
		old.PlacedAt = old.PlacedAt.Add(-time.Hour)
		for _, f := range []event.Order{young, old} {
			require.NoError(t, c.dispatches.Assign(context.Background(), f))
		}
		b, err := c.dispatches.Backlog(context.Background())
		require.NoError(t, err)
		require.Equal(t, dispatch.Backlog{Waiting: 2, Oldest: old.PlacedAt}, b)
	})
}

func TestWhoeverDecidesAboutWhatWaitsLeavesOutWhatSomebodyElseHas(t *testing.T) {
	t.Parallel()
	st := production(t)
	c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
	ctx := context.Background()
	for _, id := range []string{"o1", "o2"} {
		require.NoError(t, c.dispatches.Assign(ctx, facts(id, order.Placed, 1)))
	}
	store, err := sqlstore.OpenDispatches(st.dispatch, nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = store.Close() })
	var has []string
	decide := func(limit int, then func() error) error {
		return store.InTx(ctx, func(ctx context.Context, tx app.DispatchTx) error {
			_, err := tx.Dispatches.UpdateWaiting(ctx, limit, func(waiting []dispatch.Dispatch) (int, error) {
				for _, d := range waiting {
					has = append(has, d.Job.OrderID.String())
				}
				return 0, then()
			})
			return err
		})
	}
	require.NoError(t, decide(1, func() error { return decide(10, func() error { return nil }) }))
	require.Equal(t, []string{"o1", "o2"}, has, "the oldest for the one, and the rest for the other")
}

func TestNobodyIsSentWhoGoesOffDutyMeanwhile(t *testing.T) {
	t.Parallel()
	st := production(t)
	c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
	store, err := sqlstore.OpenDispatches(st.dispatch, nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = store.Close() })
	ctx := context.Background()
	goes := func(to bool) func(dispatch.Courier) (dispatch.Courier, error) {
		return func(c dispatch.Courier) (dispatch.Courier, error) { return c.Change(nil, &to, nil) }
	}
	for id, capacity := range map[string]int{"limited": 5, "unlimited": 0} {
		c.addCourier(t, id, capacity)
		for how, take := range map[string]func(ctx context.Context, tx app.DispatchTx) error{
			"one":     func(ctx context.Context, tx app.DispatchTx) error { _, err := tx.Couriers.Take(ctx); return err },
			"several": func(ctx context.Context, tx app.DispatchTx) error { _, err := tx.Couriers.TakeAll(ctx, 2); return err },
		} {
			taken := make(chan error, 1)
			require.NoError(t, store.InTx(ctx, func(ctx context.Context, tx app.DispatchTx) error {
				if _, err := tx.Couriers.Update(ctx, dispatchCourier(t, id), goes(false)); err != nil {
					return err
				}
				go func() {
					err := store.InTx(context.Background(), take)
					for domain.KindOf(err) == domain.Busy { // on a slow machine it is not soon seen that it waits
						err = store.InTx(context.Background(), take)
					}
					taken <- err
				}()
				eventually(t, "whoever takes the courier waits for what becomes of them", func() error {
					if len(taken) == 0 && lockWaits(t, st.dispatch) == 0 {
						return fmt.Errorf("it has not begun")
					}
					return nil
				})
				return nil
			}))
			require.Equal(t, domain.Exhausted, domain.KindOf(<-taken), "%s of a courier who is %s", how, id)
			require.NoError(t, store.InTx(ctx, func(ctx context.Context, tx app.DispatchTx) error {
				_, err := tx.Couriers.Update(ctx, dispatchCourier(t, id), goes(true))
				return err
			}))
		}
		off := false
		_, err := c.dispatches.ChangeCourier(ctx, dispatchCourier(t, id), nil, &off, nil)
		require.NoError(t, err)
	}
}

func TestWhatIsKnownOfAnOrderIsCorrectedWhateverBecameOfIt(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{AfterPayment: true}, 0, 0)
		c.addCourier(t, "zhao", 1)
		ctx := context.Background()
		name := func(id string) string {
			d, err := c.dispatches.Get(ctx, orderID(t, id))
			require.NoError(t, err)
			return d.Job.Name
		}
		f := facts("o1", order.Placed, 1)
		require.NoError(t, c.dispatches.AssignPlacedMany(ctx, []event.OrderPlaced{{Order: f}}))
		require.Zero(t, count(t, st.dispatch, "SELECT COUNT(*) FROM platoon"), "it waits to be paid")
		require.NoError(t, c.dispatches.AssignPaid(ctx, event.PaymentSucceeded{Order: f, Reference: "ref", PaidAt: time.Now()}))
		f.Name, f.Version = "Kung pao", 2
		require.ErrorIs(t, c.dispatches.AssignPlacedMany(ctx, []event.OrderPlaced{{Order: f}}), app.ErrAlone)
		require.NoError(t, c.dispatches.AssignPlaced(ctx, event.OrderPlaced{Order: f}))
		require.Equal(t, "Kung pao", name("o1"))
		require.Equal(t, 1, count(t, st.dispatch, "SELECT COUNT(*) FROM history WHERE order_id = 'o1' AND step = 'dispatch_corrected'"))

		// It is brought, cancelled too late, and that is announced again as a correction.
		_, err := c.dispatches.MarkDelivered(ctx, orderID(t, "o1"))
		require.NoError(t, err)
		late := cancelled(f)
		require.NoError(t, c.dispatches.Release(ctx, late))
		late.Name, late.Version = "Boiled fish", 4
		require.NoError(t, c.dispatches.Release(ctx, late))
		require.Equal(t, "Boiled fish", name("o1"))
		require.Equal(t, 1, count(t, st.dispatch, "SELECT COUNT(*) FROM platoon WHERE state = 'delivered' AND order_version = 4"))
		require.Equal(t, 2, count(t, st.dispatch, "SELECT COUNT(*) FROM history WHERE order_id = 'o1' AND step = 'cancelled_after_delivery'"))
		require.Zero(t, count(t, st.dispatch, "SELECT active FROM courier"))
	})
}

func TestDispatchesAndCouriersAreHandledOnTheCommandLine(t *testing.T) {
	t.Parallel()
	s, p := embeddedProcess(t, nil)
	at := map[string]string{"TAKEOUT_URL": p.url}
	ok := func(args ...string) string {
		t.Helper()
		o := run(t, at, args...)
		require.Equal(t, 0, o.code, "%s", o)
		return o.stdout
	}
	s.nobodyOnDuty(t)
	require.Contains(t, ok("courier", "add", "Sun", "--courier-id", "sun", "--capacity", "2", "-o", "table"), "Sun")
	require.Contains(t, ok("courier", "list"), `"courier_id": "sun"`)
	id := s.place(t, "x", 100)
	s.awaitDispatched(t, id)
	require.Contains(t, ok("dispatch", "get", id), `"state": "assigned"`)
	require.Contains(t, ok("dispatch", "delivered", id, "-o", "table"), "delivered")
	changed := ok("courier", "change", "sun", "--no-on-duty", "--capacity", "0")
	require.Contains(t, changed, `"on_duty": false`)
	require.Contains(t, changed, `"capacity": 0`)
	require.Contains(t, changed, `"name": "Sun"`)
	other := s.place(t, "y", 100)
	require.Contains(t, ok("order", "cancel", other, "--reason", "rain"), `"cancel_reason": "rain"`)
	s.awaitStatus(t, id, "delivered")
	late := run(t, at, "order", "cancel", id)
	require.Equal(t, 1, late.code)
	require.Contains(t, late.stderr, "is delivered and cannot be cancelled")
}

func TestDeliveryOfACancelledOrderIsRecordedAndTheOrderStaysCancelled(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		id := s.place(t, "x", 100)
		s.awaitDispatched(t, id)
		s.cancel(t, id)
		s.awaitStatus(t, id, "cancelled")
		eventID := newEventID()
		body, err := event.Encode(eventID, time.Now(), event.DispatchDelivered{OrderID: id, CourierID: "zhao", AssignedAt: time.Now(), DeliveredAt: time.Now(), Version: 1})
		require.NoError(t, err)
		require.NoError(t, s.publisher(t).Publish("dispatch.delivered", message.NewMessage(eventID, body)))
		eventually(t, "the delivery is recorded", func() error {
			if n := s.orderRows(t, "SELECT COUNT(*) FROM history WHERE order_id = ? AND step = 'delivered_after_cancel'", id); n != 1 {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
		require.Equal(t, "cancelled", s.get(t, id).Status)
		s.noFailures(t)
	})
}

// Somebody changed a row by hand into what no order can be.
func TestDamagedRowKeepsNoOtherOrdersFromTheirCouriers(t *testing.T) {
	t.Parallel()
	s := openStore(t, "sqlite:"+filepath.Join(t.TempDir(), "dispatch.db"), sqlstore.OpenDispatches)
	dispatches := app.NewDispatches(s, app.DispatchPolicy{})
	for _, id := range []string{"damaged", "fine", "fine-too"} {
		require.NoError(t, dispatches.Assign(t.Context(), facts(id, order.Placed, 1)))
	}
	_, err := s.DB().Writer().Exec("UPDATE platoon SET currency = 'zz' WHERE orderId = 'damaged'")
	require.NoError(t, err)
	id, err := dispatch.ParseCourierID("zhao")
	require.NoError(t, err)
	zhao, err := dispatch.NewCourier(id, "Zhao", true, 0)
	require.NoError(t, err)
	require.NoError(t, dispatches.AddCourier(t.Context(), zhao))

	_, err = dispatches.AssignWaiting(t.Context())
	require.ErrorContains(t, err, "the row damaged of platoon is damaged")
	var assigned int
	require.NoError(t, s.DB().Reader().QueryRow("SELECT COUNT(*) FROM platoon WHERE state = 'assigned'").Scan(&assigned))
	require.Equal(t, 2, assigned)
}
