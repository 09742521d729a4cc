package tests

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/crashpoint"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/domain/points"
	"takeout/ports/messaging"
)

// more is more than one statement holds.
const more = 450

func manyOrders(t testing.TB, n int) []*order.Order {
	t.Helper()
	all := make([]*order.Order, n)
	for i := range all {
		o, err := order.Place(orderID(t, fmt.Sprint("o", i)), "麻婆豆腐", money(t, int64(100+i)), time.Now())
		require.NoError(t, err)
		all[i] = o
	}
	return all
}

func idsOfOrders(all []*order.Order) []order.ID {
	var ids []order.ID
	for _, o := range all {
		ids = append(ids, o.Snapshot().ID)
	}
	return ids
}

// changedSomehow changes an order in one of the ways that there are, or not at all.
func changedSomehow(o *order.Order) (bool, error) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 678_000, time.UTC)
	switch o.Snapshot().Money.Amount() % 5 {
	case 0:
		return o.MarkDispatched("zhao", at), nil
	case 1:
		return o.MarkDelivered("zhao", at, at.Add(time.Minute)), nil
	case 2:
		return o.Cancel("I'm \"full\" \\ 饱了", at)
	case 3:
		return o.RecordPoints(7), nil
	}
	return false, nil
}

func TestManyOrdersAreChangedAsOneAfterTheOtherWouldBe(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		ctx, all := context.Background(), manyOrders(t, more)
		ids := idsOfOrders(all)
		require.NoError(t, s.InTx(ctx, func(ctx context.Context, tx app.OrderTx) error {
			for _, o := range all {
				if err := tx.Orders.Add(ctx, o); err != nil {
					return err
				}
			}
			return nil
		}))
		stored := func() map[order.ID]order.Snapshot {
			found := map[order.ID]order.Snapshot{}
			require.NoError(t, s.View(ctx, func(ctx context.Context, tx app.OrderTx) error {
				many, err := tx.Orders.GetMany(ctx, append(ids[:len(ids):len(ids)], orderID(t, "nobody-s")))
				for _, o := range many {
					found[o.Snapshot().ID] = o.Snapshot()
				}
				return err
			}))
			return found
		}
		want := map[order.ID]order.Snapshot{}
		for _, o := range all {
			want[o.Snapshot().ID] = o.Snapshot()
		}
		require.Equal(t, want, stored())

		update := func(ids []order.ID, change func(*order.Order) (bool, error)) error {
			return s.InTx(ctx, func(ctx context.Context, tx app.OrderTx) error { return tx.Orders.UpdateMany(ctx, ids, change) })
		}
		err := update(append(ids[:len(ids):len(ids)], orderID(t, "nobody-s")), changedSomehow)
		require.Equal(t, domain.NotFound, domain.KindOf(err), "%v", err)
		boom, last := errors.New("boom"), ids[len(ids)-1]
		require.ErrorIs(t, update(ids, func(o *order.Order) (bool, error) {
			if o.Snapshot().ID == last {
				return false, boom
			}
			return changedSomehow(o)
		}), boom)
		require.Equal(t, want, stored(), "nothing is changed, or all")

		require.NoError(t, update(ids, changedSomehow))
		for _, o := range all {
			_, err := changedSomehow(o)
			require.NoError(t, err)
			want[o.Snapshot().ID] = o.Snapshot()
		}
		require.Equal(t, want, stored())
		require.NoError(t, update(ids, func(*order.Order) (bool, error) { return false, nil }))
		require.NoError(t, update(nil, changedSomehow))
	})
}

// placedAs places an order as the customer's request does.
func (c *choreography) placedAs(t testing.TB, id string) {
	t.Helper()
	_, err := c.orders.Place(context.Background(), app.PlaceOrder{ID: orderID(t, id), Name: "Mapo tofu", Money: money(t, 2850)})
	require.NoError(t, err)
}

func TestAssignmentThatIsWrongIsNotRecordedAmongOthers(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		for _, id := range []string{"o1", "o2"} {
			c.placedAs(t, id)
		}
		for _, wrong := range []event.DispatchAssigned{
			{OrderID: "o2", CourierID: "nobody's id", AssignedAt: time.Now(), Version: 1},
			{OrderID: "o2", CourierID: "zhao", AssignedAt: time.Date(20000, 1, 1, 0, 0, 0, 0, time.UTC), Version: 1},
		} {
			err := c.orders.MarkDispatchedMany(context.Background(), []event.DispatchAssigned{assignedTo("o1", "zhao"), wrong})
			require.Equal(t, domain.Invalid, domain.KindOf(err))
		}
		require.Equal(t, 2, count(t, st.order, "SELECT COUNT(*) FROM order_info WHERE status = 'placed'"))
	})
}

func TestCourierIsCorrectedOnlyByACorrection(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		ctx := context.Background()
		c.placedAs(t, "o1")
		brought := func(by string, correction bool) error {
			return c.orders.MarkDelivered(ctx, event.DispatchDelivered{
				OrderID: "o1", CourierID: by, AssignedAt: time.Now(), DeliveredAt: time.Now(), Version: 1, Correction: correction,
			})
		}
		courier := func() string {
			o, err := c.orders.Get(ctx, orderID(t, "o1"))
			require.NoError(t, err)
			return o.CourierID
		}
		require.NoError(t, brought("zhao", false))
		require.NoError(t, brought("qian", false))
		require.Equal(t, "zhao", courier())
		require.NoError(t, brought("qian", true))
		require.Equal(t, "qian", courier())
		sun := assignedTo("o1", "sun")
		require.NoError(t, c.orders.MarkDispatched(ctx, sun))
		require.Equal(t, "qian", courier())
		sun.Correction = true
		require.NoError(t, c.orders.MarkDispatched(ctx, sun))
		require.Equal(t, "sun", courier())
	})
}

func TestOrderThatIsAnnouncedAgainComesWithAllThatBecameOfIt(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		ctx := context.Background()
		c.placedAs(t, "o1")
		assigned, brought := time.Now().Add(-time.Hour).UTC().Truncate(time.Microsecond), time.Now().UTC().Truncate(time.Microsecond)
		require.NoError(t, c.orders.MarkDelivered(ctx, event.DispatchDelivered{
			OrderID: "o1", CourierID: "zhao", AssignedAt: assigned, DeliveredAt: brought, Version: 1,
		}))
		c.takeOutboxes(t)
		require.NoError(t, c.orders.Announce(ctx, orderID(t, "o1"), app.Reannouncement{}, "a test"))
		again := c.takeOutboxes(t)
		require.Len(t, again, 1)
		_, e, err := event.Decode[event.OrderPlaced](again[0].id, again[0].body)
		require.NoError(t, err)
		require.NoError(t, c.dispatches.AssignPlaced(ctx, e))
		d, err := c.dispatches.Get(ctx, orderID(t, "o1"))
		require.NoError(t, err)
		require.Equal(t, dispatch.Delivered, d.State)
		require.Equal(t, "zhao", d.CourierID.String())
		require.Equal(t, []time.Time{assigned, brought}, []time.Time{d.AssignedAt, d.DeliveredAt})
		compensation := app.NewCompensation(openStore(t, st.order, sqlstore.OpenOrders), 100)
		require.NoError(t, compensation.Recreate(ctx, e), "nor does it contradict itself")
	})
}

func TestWhatIsAnnouncedAgainSaysThatItCorrectsAndHowFarTheOrderHadCome(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		c.addCourier(t, "zhao", 0)
		ctx, f := context.Background(), facts("o1", order.Placed, 1)
		announced := func(announce func(context.Context, order.ID, string) error) announcement {
			c.takeOutboxes(t)
			require.NoError(t, announce(ctx, orderID(t, "o1"), "a test"))
			again := c.takeOutboxes(t)
			require.Len(t, again, 1)
			return again[0]
		}
		require.NoError(t, c.dispatches.Assign(ctx, f))
		a := announced(c.dispatches.Announce)
		_, assigned, err := event.Decode[event.DispatchAssigned](a.id, a.body)
		require.NoError(t, err)
		require.True(t, assigned.Correction)
		_, err = c.dispatches.MarkDelivered(ctx, orderID(t, "o1"))
		require.NoError(t, err)
		a = announced(c.dispatches.Announce)
		_, brought, err := event.Decode[event.DispatchDelivered](a.id, a.body)
		require.NoError(t, err)
		require.True(t, brought.Correction)

		require.NoError(t, c.payments.Charge(ctx, event.OrderPlaced{Order: f}))
		require.NoError(t, c.payments.Refund(ctx, cancelled(f)))
		a = announced(c.payments.Announce)
		_, refunded, err := event.Decode[event.PaymentRefunded](a.id, a.body)
		require.NoError(t, err)
		require.Equal(t, order.Cancelled.String(), refunded.Status)
	})
}

// inBothDispatches runs the test on the dispatch service's store in each place.
func inBothDispatches(t *testing.T, test func(t *testing.T, c *choreography, s *sqlstore.Store[app.DispatchTx])) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		s, err := sqlstore.OpenDispatches(st.dispatch, nil, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		t.Cleanup(func() { _ = s.Close() })
		test(t, c, s)
	})
}

func TestManyDispatchesAreStoredAsOneAfterTheOtherWouldBe(t *testing.T) {
	inBothDispatches(t, func(t *testing.T, _ *choreography, s *sqlstore.Store[app.DispatchTx]) {
		ctx, zhao := context.Background(), dispatchCourier(t, "zhao")
		var all []dispatch.Dispatch
		for _, o := range manyOrders(t, more) {
			p := o.Snapshot()
			job := order.Terms{OrderID: p.ID, Name: p.Name, Money: p.Money, PlacedAt: p.PlacedAt, Version: 1}
			all = append(all, []dispatch.Dispatch{
				dispatch.New(job, zhao, time.Now()), dispatch.Wait(job), dispatch.End(job, dispatch.Released, time.Now()),
			}[p.Money.Amount()%3])
		}
		slices.Reverse(all)
		add := func(all []dispatch.Dispatch) error {
			return s.InTx(ctx, func(ctx context.Context, tx app.DispatchTx) error { return tx.Dispatches.AddMany(ctx, all) })
		}
		require.NoError(t, add(all[:1]))
		require.Equal(t, domain.Conflict, domain.KindOf(add(all)))
		require.Equal(t, domain.Conflict, domain.KindOf(add([]dispatch.Dispatch{all[1], all[1]})))
		require.NoError(t, add(all[1:]))
		require.NoError(t, s.View(ctx, func(ctx context.Context, tx app.DispatchTx) error {
			for _, want := range all {
				got, err := tx.Dispatches.Get(ctx, want.Job.OrderID)
				require.NoError(t, err)
				require.Equal(t, want, got)
			}
			return nil
		}))
	})
}

func dispatchCourier(t testing.TB, id string) dispatch.CourierID {
	t.Helper()
	parsed, err := dispatch.ParseCourierID(id)
	require.NoError(t, err)
	return parsed
}

func TestManyPointsAreEnteredOnceOrNotAtAll(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		s, err := sqlstore.OpenPoints(st.points, nil, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		t.Cleanup(func() { _ = s.Close() })
		ctx := context.Background()
		var all []points.Entry
		for _, o := range manyOrders(t, more) {
			all = append(all, points.Entry{OrderID: o.Snapshot().ID, Kind: points.Award, Points: 1, PlacedAt: o.Snapshot().PlacedAt, At: o.Snapshot().PlacedAt})
		}
		add := func(all []points.Entry) error {
			return s.InTx(ctx, func(ctx context.Context, tx app.PointsTx) error { return tx.Ledger.AddMany(ctx, all) })
		}
		require.NoError(t, add(all[7:8]))
		require.Equal(t, domain.Conflict, domain.KindOf(add(all)))
		require.Equal(t, 1, count(t, st.points, "SELECT COUNT(*) FROM points_entry"))
		require.NoError(t, add(append(all[:7:7], all[8:]...)))
		require.NoError(t, s.View(ctx, func(ctx context.Context, tx app.PointsTx) error {
			for _, want := range all {
				got, err := tx.Ledger.Entries(ctx, want.OrderID)
				require.NoError(t, err)
				require.Equal(t, []points.Entry{want}, got)
			}
			return nil
		}))
	})
}

func TestCouriersForManyOrdersAreTakenUpToTheirRoomAndNoFurther(t *testing.T) {
	inBothDispatches(t, func(t *testing.T, c *choreography, s *sqlstore.Store[app.DispatchTx]) {
		ctx := context.Background()
		take := func(n int) (taken map[string]int, err error) {
			err = s.InTx(ctx, func(ctx context.Context, tx app.DispatchTx) error {
				taken = map[string]int{}
				ids, err := tx.Couriers.TakeAll(ctx, n)
				for _, id := range ids {
					taken[id.String()]++
				}
				return err
			})
			return taken, err
		}
		_, err := take(2)
		require.Equal(t, domain.Exhausted, domain.KindOf(err), "nobody is there")
		c.addCourier(t, "small", 3)
		c.addCourier(t, "large", 60)
		taken, err := take(10)
		require.NoError(t, err)
		require.Equal(t, map[string]int{"small": 3, "large": 7}, taken)

		// Many at once want more than there is room for.
		var mu sync.Mutex
		var callers sync.WaitGroup
		given := 0
		for range 20 {
			callers.Go(func() {
				taken, err := take(4)
				mu.Lock()
				defer mu.Unlock()
				switch domain.KindOf(err) {
				case domain.Exhausted:
				default:
					if err != nil {
						t.Error(err)
					}
					given += taken["small"] + taken["large"]
				}
			})
		}
		callers.Wait()
		require.LessOrEqual(t, given, 53)
		require.Equal(t, 10+given, count(t, c.dispatch, "SELECT SUM(active) FROM courier"))
		require.Zero(t, count(t, c.dispatch, "SELECT COUNT(*) FROM courier WHERE active > capacity"))

		// Whoever waits goes first, at those who have a limit.
		alter(t, c.dispatch, "UPDATE courier SET active = 0")
		waits := dispatch.Wait(order.Terms{OrderID: orderID(t, "waits"), Name: "x", Money: money(t, 1), PlacedAt: time.Now(), Version: 1})
		require.NoError(t, s.InTx(ctx, func(ctx context.Context, tx app.DispatchTx) error { return tx.Dispatches.Add(ctx, waits) }))
		_, err = take(2)
		require.Equal(t, domain.Exhausted, domain.KindOf(err))
		c.addCourier(t, "unlimited", 0)
		taken, err = take(500)
		require.NoError(t, err)
		require.Equal(t, map[string]int{"unlimited": 500}, taken)
	})
}

// batch is deliveries of orders that were just placed.
func batch(t testing.TB, prefix string, n int) []announcement {
	t.Helper()
	var all []announcement
	for i := range n {
		all = append(all, announcementOf(t, event.OrderPlaced{Order: facts(fmt.Sprint(prefix, i), order.Placed, 1)}))
	}
	return all
}

func (c *choreography) consumer(queue string) choreographed {
	return c.consumers[slices.IndexFunc(c.consumers, func(one choreographed) bool { return one.queue == queue })]
}

func TestDeliveriesAreRecordedTogetherOrNotAtAll(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		c.addCourier(t, "small", 10_000)
		ctx, assign := context.Background(), c.consumer("dispatch.assign-courier")
		rows := func() [3]int {
			return [3]int{
				count(t, st.dispatch, "SELECT COUNT(*) FROM inbox"), count(t, st.dispatch, "SELECT COUNT(*) FROM platoon"),
				count(t, st.dispatch, "SELECT active FROM courier"),
			}
		}
		all := batch(t, "o", more)
		require.NoError(t, assign.together(ctx, all[:2]))
		delivery := func(a announcement) app.Delivery {
			d, _, err := delivered[event.OrderPlaced](assign.queue, a.id, a.body)
			require.NoError(t, err)
			return d
		}
		answers, ok := errors.AsType[app.Recorded](assign.together(ctx, all))
		require.True(t, ok, "two were handled before")
		require.Equal(t, app.Recorded{delivery(all[0]): app.ErrDuplicate, delivery(all[1]): app.ErrDuplicate}, answers)
		other := all[0]
		var err error
		other.body, err = event.Encode(other.id, time.Now(), event.OrderPlaced{Order: facts("o0", order.Placed, 1)})
		require.NoError(t, err)
		require.NotEqual(t, string(all[0].body), string(other.body))
		answers, ok = errors.AsType[app.Recorded](assign.together(ctx, []announcement{all[2], other, all[1]}))
		require.True(t, ok, "an id under another body")
		require.Len(t, answers, 2)
		require.Equal(t, domain.Invalid, domain.KindOf(answers[delivery(other)]))
		require.ErrorIs(t, answers[delivery(all[1])], app.ErrDuplicate)
		require.ErrorIs(t, assign.together(ctx, []announcement{all[2], all[3], all[2]}), app.ErrDuplicate, "one comes twice")
		same := announcementOf(t, event.OrderPlaced{Order: facts("o2", order.Placed, 1)})
		require.Error(t, assign.together(ctx, []announcement{all[2], same}), "an order comes twice")
		require.Equal(t, [3]int{2, 2, 2}, rows())
		require.NoError(t, assign.together(ctx, all[2:]))
		require.Equal(t, [3]int{more, more, more}, rows())
		require.Len(t, c.takeOutboxes(t), more)
	})
}

// Among those that come together are one that was handled before, one that contradicts what is stored, one that breaks
// a rule, and one for an order that is dispatched again because it was lost.
func TestWhatIsUnusualAmongManyIsHandledAsIfItHadComeAlone(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		c.addCourier(t, "small", 10_000)
		assign := c.consumer("dispatch.assign-courier")
		before := batch(t, "before", 1)[0]
		require.NoError(t, assign.settle(before))
		contradiction := facts("before0", order.Placed, 1)
		contradiction.Amount++
		nameless := facts("nameless", order.Placed, 1)
		nameless.Name = ""
		onItsWay := event.OrderPlaced{
			Order:    facts("on-its-way", order.Dispatched, 2),
			Dispatch: &event.Courier{CourierID: "small", AssignedAt: time.Now().UTC().Truncate(time.Microsecond)},
		}
		for name, unusual := range map[string]struct {
			a    announcement
			code string // of the error, empty if it is settled
		}{
			"handled before": {before, ""},
			"contradictory":  {announcementOf(t, event.OrderPlaced{Order: contradiction}), "order_mismatch"},
			"against a rule": {announcementOf(t, event.OrderPlaced{Order: nameless}), "name_invalid"},
			"on its way":     {announcementOf(t, onItsWay), ""},
		} {
			ordinary := batch(t, strings.ReplaceAll(name, " ", "-"), 5)
			together, err := assign.settleAll(append(ordinary, unusual.a))
			require.False(t, together, name)
			if unusual.code == "" {
				require.NoError(t, err, name)
			} else {
				known, ok := errors.AsType[*domain.Error](err)
				require.True(t, ok, name)
				require.Equal(t, domain.Invalid, known.Kind, name)
			}
			for _, a := range ordinary {
				require.Equal(t, 1, count(t, st.dispatch, "SELECT COUNT(*) FROM platoon WHERE orderId = ?", a.orderID), name)
			}
		}
		require.Equal(t, 22, count(t, st.dispatch, "SELECT COUNT(*) FROM platoon"))
		require.Equal(t, 22, count(t, st.dispatch, "SELECT active FROM courier"))
		require.Equal(t, 21, count(t, st.dispatch, "SELECT COUNT(*) FROM outbox"), "who brings the one on its way is known")
	})
}

func TestMessageThatComesAgainIsHandledApartFromOthers(t *testing.T) {
	onEveryBroker(t, brokerOptions{}, func(t *testing.T, b messaging.Broker, _ func() messaging.Broker) {
		require.NoError(t, b.Bind("order.placed", "dispatch.assign-courier"))
		require.NoError(t, b.Publish("order.placed", newMessage("1")))
		messages, _ := subscribe(t, b, "dispatch.assign-courier")
		first := receive(t, messages)
		require.False(t, app.IsApart(first.Context()))
		first.Nack()
		again := receive(t, messages)
		require.True(t, app.IsApart(again.Context()))
		again.Ack()
	})
}

func TestManyWhoseCommitWasLostHaveOneEffectEach(t *testing.T) {
	t.Parallel()
	for _, fault := range []commitFault{notExecuted, answerLost} {
		t.Run(fault.String(), func(t *testing.T) {
			t.Parallel()
			st := production(t)
			direct := st.dispatch
			var dispatches *commitProxy
			st.dispatch, dispatches = throughCommits(t, st.dispatch)
			c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
			c.addCourier(t, "small", 100)
			trap := dispatches.arm(commitTrap{fault: fault, statement: storesDispatch})
			_, err := c.consumer("dispatch.assign-courier").settleAll(batch(t, "o", 100))
			trap.wait(t)
			require.NoError(t, err)
			require.Equal(t, 100, count(t, direct, "SELECT COUNT(*) FROM platoon WHERE state = 'assigned'"))
			require.Equal(t, 100, count(t, direct, "SELECT active FROM courier"))
			require.Len(t, c.takeOutboxes(t), 100)
		})
	}
}

// The process dies when a message is handled that is neither the first nor the last of those that come together.
func TestProcessThatDiesWhileItHandlesManyLosesNothingAndDoublesNothing(t *testing.T) {
	t.Parallel()
	for _, phase := range []string{"before-inbox", "after-inbox", "before-commit", "after-commit"} {
		t.Run(phase, func(t *testing.T) {
			t.Parallel()
			// The first halts, and has the database for itself, until the others have come.
			const orders, dying = 60, 10
			point, halt := "dispatch.assign-courier/"+phase, "dispatch.assign-courier/before-inbox:1:stop=4s"
			if phase == "before-inbox" {
				halt = "dispatch.assign-courier/after-inbox:1:stop=4s"
			}
			dir := migratedData(t)
			p := startProcess(t, "embedded", map[string]string{
				"TAKEOUT_DATA_DIR": dir, crashpoint.Variable: fmt.Sprintf("%s,%s:%d", halt, point, dying),
			})
			s := onData(p)
			s.broker, s.cfg.DataDir = "embedded:", dir
			s.payment, s.points = "sqlite:"+filepath.Join(dir, "payment.db"), "sqlite:"+filepath.Join(dir, "points.db")
			guests := s.seatGuests(t, p)
			for i := range orders {
				guests.order(fmt.Sprint("o", i), "stays")
			}
			p.diesAt(t, point)
			stored := count(t, s.dispatch, "SELECT COUNT(*) FROM platoon")
			if phase == "after-commit" {
				require.Greater(t, stored, dying, "it was handled with others")
			} else {
				require.Less(t, stored, dying-1, "it was handled with others")
			}
			p.restart(t, nil)
			guests.eating.Wait()
			within(t, 30*time.Second, "everything comes to a good end", func() error {
				time.Sleep(50 * time.Millisecond)
				return s.settled(t, guests.ids, 0, 0)
			})
			s.booksAgree(t)
		})
	}
}
