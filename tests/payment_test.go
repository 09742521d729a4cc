package tests

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/domain/payment"
	"takeout/ports/httpapi"
	"takeout/service"
)

func assignedTo(orderID, courier string) event.DispatchAssigned {
	return event.DispatchAssigned{OrderID: orderID, CourierID: courier, AssignedAt: time.Now(), Version: 1}
}

func (s *system) awaitPayment(t testing.TB, id, state string) httpapi.PaymentBody {
	t.Helper()
	var p httpapi.PaymentBody
	eventually(t, "the payment of "+id+" is "+state, func() error {
		a := mustGet(t, s.api+"/v1/payments/"+id)
		if a.status != http.StatusOK {
			return fmt.Errorf("%s", a)
		}
		if err := json.Unmarshal(a.body, &p); err != nil || p.State != state {
			return fmt.Errorf("%s: %w", a, err)
		}
		return nil
	})
	return p
}

func (s *system) awaitPoints(t testing.TB, id string, points int64, entries int) {
	t.Helper()
	eventually(t, fmt.Sprintf("order %s has %d points", id, points), func() error {
		a := mustGet(t, s.api+"/v1/points/"+id)
		var p httpapi.PointsBody
		if a.status != http.StatusOK {
			return fmt.Errorf("%s", a)
		}
		if err := json.Unmarshal(a.body, &p); err != nil || p.Points != points || len(p.Entries) != entries {
			return fmt.Errorf("%s: %w", a, err)
		}
		return nil
	})
}

// booksAgree checks that the gateway holds exactly the money of the payments that succeeded.
func (st stack) booksAgree(t testing.TB) {
	t.Helper()
	require.Zero(t, count(t, st.payment, "SELECT COUNT(*) FROM payment p LEFT JOIN simulated_charge c ON c.orderId = p.orderId "+
		"AND c.charged_at IS NOT NULL AND c.cancelled_at IS NULL WHERE (p.state = 'succeeded') <> (c.orderId IS NOT NULL)"))
	require.Zero(t, count(t, st.payment, "SELECT COUNT(*) FROM simulated_charge c LEFT JOIN payment p ON c.orderId = p.orderId "+
		"WHERE p.orderId IS NULL OR p.order_money <> c.amount OR p.currency <> c.currency OR p.state = 'succeeded' AND p.reference <> c.reference"))
}

func TestPaidOrderEarnsPointsAndACancelledOneGivesThemBack(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		id := s.place(t, "Mapo tofu", 2850)
		p := s.awaitPayment(t, id, "succeeded")
		require.EqualValues(t, 2850, p.Amount)
		require.NotEmpty(t, p.Reference)
		require.NotNil(t, p.DecidedAt)
		s.awaitPoints(t, id, 28, 1)
		eventually(t, "the order shows them", func() error {
			if o := s.get(t, id); o.Points != 28 {
				return fmt.Errorf("%d", o.Points)
			}
			return nil
		})
		s.booksAgree(t)
		s.cancel(t, id)
		require.NotNil(t, s.awaitPayment(t, id, "refunded").RefundedAt)
		s.awaitPoints(t, id, 0, 2)
		require.Zero(t, s.get(t, id).Points)
		s.booksAgree(t)
		s.noFailures(t)
		require.Zero(t, count(t, s.payment, "SELECT COUNT(*) FROM failure"))
		require.Zero(t, count(t, s.points, "SELECT COUNT(*) FROM failure"))
	})
}

func TestOrderWhosePaymentIsRefusedIsCancelled(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := startWith(t, st, func(cfg *service.Config) { cfg.PaymentRefusals = 1 })
		id := s.place(t, "x", 2850)
		o := s.awaitStatus(t, id, "cancelled")
		require.Equal(t, order.ReasonNotPaid, o.CancelReason)
		require.NotEmpty(t, s.awaitPayment(t, id, "refused").Reason)
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND state = 'released'", id)
		require.Equal(t, http.StatusNotFound, mustGet(t, s.api+"/v1/points/"+id).status)
		s.booksAgree(t)
		s.noFailures(t)
	})
}

func TestRefusedPaymentOfADeliveredOrderIsAPersonsAtOnce(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := startWith(t, st, func(*service.Config) {})
		id := s.place(t, "x", 2850)
		s.awaitDispatched(t, id)
		mustSend(t, http.MethodPost, s.dispatchAPI+"/v1/dispatches/"+id+"/delivered", "")
		o := s.awaitStatus(t, id, "delivered")
		refused, err := sqlstore.NewMessage(event.PaymentRefused{Order: event.Order{
			OrderID: id, Name: o.Name, Amount: o.Amount, Currency: o.Currency, Status: "placed", Version: 1, PlacedAt: o.PlacedAt,
		}, Reason: "no money", RefusedAt: time.Now()}, nil)
		require.NoError(t, err)
		require.NoError(t, s.publisher(t).Publish("payment.refused", refused))
		eventually(t, "the message is kept", func() error {
			if n := count(t, s.order, "SELECT COUNT(*) FROM failure WHERE consumer = 'order.cancel-unpaid' AND error_code = 'order_delivered' AND attempts = 1"); n != 1 {
				return fmt.Errorf("%d failures", n)
			}
			return nil
		})
		require.Equal(t, "delivered", s.get(t, id).Status)
	})
}

// Each announcement comes a hundred times, and the gateway leaves three calls of ten without an answer.
func TestOrderIsChargedOnceHoweverOftenItIsAnnouncedAndTheGatewayIsLate(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := startWith(t, st, func(cfg *service.Config) {
			cfg.PaymentRefusals, cfg.PaymentTimeouts = 0.3, 0.3
			cfg.RetryDelays = []time.Duration{50 * time.Millisecond, 100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond, time.Second}
		})
		broker := s.publisher(t)
		const orders = 10
		announced := map[string]announcement{}
		for i := range orders {
			id := fmt.Sprint("o-", i)
			announced[id] = announcementOf(t, event.OrderPlaced{Order: facts(id, order.Placed, 1)})
		}
		publish := func(a announcement) {
			if err := broker.Publish(a.key, message.NewMessage(a.id, a.body)); err != nil {
				t.Errorf("publish: %v", err)
			}
		}
		var producers sync.WaitGroup
		for _, a := range announced {
			producers.Go(func() {
				for range 100 {
					publish(a)
				}
			})
		}
		producers.Wait()
		eventually(t, "each payment is decided", func() error {
			if n := count(t, s.payment, "SELECT COUNT(*) FROM payment WHERE state IN ('succeeded', 'refused', 'void', 'refunded')"); n == orders {
				return nil
			}
			for id, a := range announced { // an unlucky one is kept after its tries
				if count(t, s.payment, "SELECT COUNT(*) FROM failure WHERE order_id = ?", id) > 0 {
					publish(a)
				}
			}
			time.Sleep(200 * time.Millisecond)
			return fmt.Errorf("%d are", count(t, s.payment, "SELECT COUNT(*) FROM payment WHERE state <> 'charging'"))
		})
		require.Equal(t, orders, count(t, s.payment, "SELECT COUNT(*) FROM payment"))
		require.Positive(t, count(t, s.payment, "SELECT COUNT(*) FROM payment WHERE state = 'succeeded'"))
		s.booksAgree(t)
		for i := range orders {
			if id := fmt.Sprint("o-", i); count(t, s.payment, "SELECT COUNT(*) FROM payment WHERE orderId = ? AND state = 'succeeded'", id) == 1 {
				s.awaitPoints(t, id, 28, 1)
			}
		}
	})
}

func TestPaymentForAnotherAmountIsKeptForAPersonAndNotCharged(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		broker := s.publisher(t)
		for _, amount := range []int64{2850, 2850, 999} {
			id := newEventID()
			require.NoError(t, broker.Publish("order.placed", message.NewMessage(id, announce(t, id, "o1", amount))))
			s.awaitPayment(t, "o1", "succeeded")
		}
		eventually(t, "the other amount is kept", func() error {
			if n := count(t, s.payment, "SELECT COUNT(*) FROM failure WHERE error_code = 'order_mismatch' AND order_id = 'o1'"); n != 1 {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
		require.Equal(t, 1, count(t, s.payment, "SELECT COUNT(*) FROM payment WHERE order_money = 2850"))
		s.booksAgree(t)
	})
}

func TestDispatchCanWaitForPayment(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := startWith(t, st, func(cfg *service.Config) {
			cfg.DispatchAfter, cfg.PaymentRefusals = "paid", 0.5
		})
		for i := range 12 {
			a := mustSend(t, http.MethodPost, s.api+"/v1/orders", fmt.Sprintf(`{"order_id":"o-%d","name":"x","amount":100}`, i))
			require.Equal(t, http.StatusCreated, a.status, "%s", a)
		}
		eventually(t, "each order is paid and dispatched, or refused and cancelled", func() error {
			if n := s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE status IN ('dispatched', 'cancelled')"); n != 12 {
				return fmt.Errorf("%d are", n)
			}
			return nil
		})
		paid := count(t, s.payment, "SELECT COUNT(*) FROM payment WHERE state = 'succeeded'")
		require.Positive(t, paid)
		require.Less(t, paid, 12)
		require.Equal(t, paid, s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE status = 'dispatched'"))
		s.awaitDispatchRows(t, 12-paid, "SELECT COUNT(*) FROM platoon WHERE state = 'released'")
		require.Zero(t, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE state = 'released' AND takeout_userId IS NOT NULL"), "nobody was sent for them")
		s.noFailures(t)
	})
}

// faltering is a gateway that does what it is asked, and is interrupted as the test says.
type faltering struct {
	before, after func(call string) error
	held          map[string]bool // orders whose money it has
}

func (g *faltering) Charge(_ context.Context, bill order.Terms) (string, error) {
	if err := g.before("charge"); err != nil {
		return "", err
	}
	g.held[bill.OrderID.String()] = true
	return "ref", g.after("charge")
}

func (g *faltering) Cancel(_ context.Context, bill order.Terms) error {
	if err := g.before("cancel"); err != nil {
		return err
	}
	g.held[bill.OrderID.String()] = false
	return g.after("cancel")
}

func TestPaymentIsTakenUpWhereItWasInterrupted(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0) // makes the tables
		store, err := sqlstore.OpenPayments(st.payment, nil, logger(t))
		require.NoError(t, err)
		t.Cleanup(func() { _ = store.Close() })
		fine := func(string) error { return nil }
		gateway := &faltering{before: fine, after: fine, held: map[string]bool{}}
		payments := app.NewPayments(store, gateway)
		charge := handledBy("payment.charge-order", payments.Charge)
		refund := handledBy("payment.refund-order", payments.Refund)
		handle := func(c choreographed, a announcement) error { return c.handle(context.Background(), a.id, a.body) }
		state := func(id string) payment.State {
			p, err := c.payments.Get(context.Background(), orderID(t, id))
			require.NoError(t, err)
			return p.State
		}
		cut := errors.New("cut")
		once := func(call string) func(string) error {
			done := false
			return func(c string) error {
				if c == call && !done {
					done = true
					return cut
				}
				return nil
			}
		}

		// The charge takes effect and its answer is lost.
		placed := announcementOf(t, event.OrderPlaced{Order: facts("lost-answer", order.Placed, 1)})
		gateway.after = once("charge")
		require.ErrorIs(t, handle(charge, placed), cut)
		require.Equal(t, payment.Charging, state("lost-answer"))
		require.NoError(t, handle(charge, placed))
		require.Equal(t, payment.Succeeded, state("lost-answer"))
		require.ErrorIs(t, handle(charge, placed), app.ErrDuplicate)
		again := announcementOf(t, event.OrderPlaced{Order: facts("lost-answer", order.Placed, 1)})
		require.ErrorIs(t, handle(charge, again), app.ErrDuplicate, "under another event id")

		// It is cancelled while nobody knows whether it was charged.
		placed = announcementOf(t, event.OrderPlaced{Order: facts("in-doubt", order.Placed, 1)})
		gateway.after = once("charge")
		require.ErrorIs(t, handle(charge, placed), cut)
		gateway.after = once("cancel")
		cancellation := announcementOf(t, cancelled(facts("in-doubt", order.Placed, 1)))
		require.ErrorIs(t, handle(refund, cancellation), cut, "a cancellation that fails is not settled")
		require.NoError(t, handle(refund, cancellation))
		require.Equal(t, payment.Void, state("in-doubt"))
		require.False(t, gateway.held["in-doubt"])
		require.ErrorIs(t, handle(charge, placed), app.ErrDuplicate, "and never charged again")
		require.False(t, gateway.held["in-doubt"])

		// It is cancelled while the gateway is being asked.
		placed = announcementOf(t, event.OrderPlaced{Order: facts("beside", order.Placed, 1)})
		gateway.after = func(call string) error {
			if call == "charge" {
				gateway.after = fine
				return handle(refund, announcementOf(t, cancelled(facts("beside", order.Placed, 1))))
			}
			return nil
		}
		require.NoError(t, handle(charge, placed))
		require.Equal(t, payment.Void, state("beside"))
		require.False(t, gateway.held["beside"])
		require.Zero(t, count(t, st.payment, "SELECT COUNT(*) FROM outbox WHERE order_id = 'beside'"), "nothing happened, so nothing is told")

		// Another amount than was charged is never given back.
		other := cancelled(facts("lost-answer", order.Placed, 1))
		other.Amount++
		err = handle(refund, announcementOf(t, other))
		require.Equal(t, domain.Invalid, domain.KindOf(err))
		require.True(t, gateway.held["lost-answer"])
	})
}

func TestPaymentFollowsTheOrderAsItIsCorrected(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		ctx, f := context.Background(), facts("o1", order.Placed, 1)
		require.NoError(t, c.payments.Charge(ctx, event.OrderPlaced{Order: f}))
		f.Name, f.Version = "Kung pao", 3
		require.ErrorIs(t, c.payments.Charge(ctx, event.OrderPlaced{Order: f}), app.ErrDuplicate, "it is paid")
		f.Name, f.Version = "Boiled fish", 2
		require.Equal(t, domain.Invalid, domain.KindOf(c.payments.Charge(ctx, event.OrderPlaced{Order: f})), "what is older corrects nothing")
		p, err := c.payments.Get(ctx, orderID(t, "o1"))
		require.NoError(t, err)
		require.Equal(t, "Kung pao", p.Bill.Name)
		require.EqualValues(t, 3, p.Bill.Version)
		require.Equal(t, payment.Succeeded, p.State)
		require.Equal(t, 1, count(t, st.payment, "SELECT COUNT(*) FROM history WHERE order_id = 'o1' AND step = 'payment_corrected'"))
		require.Equal(t, 1, count(t, st.payment, "SELECT COUNT(*) FROM outbox WHERE order_id = 'o1'"), "its payment is announced once")
	})
}

func TestLateOlderNameDoesNotOverwriteANewerOneThatWasTheSameAsBefore(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		c.addCourier(t, "zhao", 5)
		ctx := context.Background()
		f := facts("", order.Placed, 1)
		name := f.Name
		placed := func(id, name string, version int64) event.OrderPlaced {
			f.OrderID, f.Name, f.Version = id, name, version
			return event.OrderPlaced{Order: f}
		}
		late := func(id string) {
			t.Helper()
			e := placed(id, "Kung pao", 2)
			require.Equal(t, domain.Invalid, domain.KindOf(c.payments.Charge(ctx, e)))
			require.Equal(t, domain.Invalid, domain.KindOf(c.dispatches.AssignPlaced(ctx, e)))
			p, err := c.payments.Get(ctx, orderID(t, id))
			require.NoError(t, err)
			d, err := c.dispatches.Get(ctx, orderID(t, id))
			require.NoError(t, err)
			for _, terms := range []order.Terms{p.Bill, d.Job} {
				require.Equal(t, name, terms.Name)
				require.EqualValues(t, 3, terms.Version)
			}
		}
		for _, id := range []string{"o1", "o2"} {
			require.NoError(t, c.payments.Charge(ctx, placed(id, name, 1)))
			require.NoError(t, c.dispatches.AssignPlaced(ctx, placed(id, name, 1)))
		}

		// Version 2 had another name for a while, and 3 has the first one again.
		require.ErrorIs(t, c.payments.Charge(ctx, placed("o1", name, 3)), app.ErrDuplicate, "it is paid")
		require.NoError(t, c.dispatches.AssignPlaced(ctx, placed("o1", name, 3)))
		require.ErrorIs(t, c.dispatches.AssignPlaced(ctx, placed("o1", name, 3)), app.ErrDuplicate, "nothing is left to remember")
		late("o1")

		gone := cancelled(placed("o2", name, 2).Order)
		gone.Version = 3
		require.NoError(t, c.payments.Refund(ctx, gone))
		require.NoError(t, c.dispatches.Release(ctx, gone))
		late("o2")
		for _, db := range []string{st.payment, st.dispatch} {
			require.Zero(t, count(t, db, "SELECT COUNT(*) FROM history WHERE step LIKE '%_corrected'"), "no name was changed")
		}
	})
}

// gatewayOf is a gateway that answers what the test says.
type gatewayOf struct {
	charge func(ctx context.Context) (string, error)
	cancel func(ctx context.Context) error
}

func (g gatewayOf) Charge(ctx context.Context, _ order.Terms) (string, error) { return g.charge(ctx) }
func (g gatewayOf) Cancel(ctx context.Context, _ order.Terms) error           { return g.cancel(ctx) }

func TestNoCallOfTheGatewayMayLastForEver(t *testing.T) {
	t.Parallel()
	limited := func(ctx context.Context) error {
		if _, is := ctx.Deadline(); !is {
			return errors.New("a gateway that does not answer would be waited for for ever")
		}
		return nil
	}
	store := openStore(t, "sqlite:"+filepath.Join(t.TempDir(), "payment.db"), openPayments)
	payments := app.NewPayments(store, gatewayOf{
		charge: func(ctx context.Context) (string, error) { return "ref", limited(ctx) },
		cancel: limited,
	})
	f := facts("o1", order.Placed, 1)
	require.NoError(t, payments.Charge(context.Background(), event.OrderPlaced{Order: f}))
	require.NoError(t, payments.Refund(context.Background(), cancelled(f)))
}

func TestRefusalIsKeptHoweverMuchTheGatewaySaysAboutIt(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		store := openStore(t, st.payment, openPayments)
		refusal := strings.Repeat("饱", 300)
		payments := app.NewPayments(store, gatewayOf{charge: func(context.Context) (string, error) {
			return "", domain.Errorf(domain.Conflict, "payment_refused", "%s", refusal)
		}})
		require.NoError(t, payments.Charge(context.Background(), event.OrderPlaced{Order: facts("o1", order.Placed, 1)}))
		p, err := payments.Get(context.Background(), orderID(t, "o1"))
		require.NoError(t, err)
		require.Equal(t, payment.Refused, p.State)
		require.Equal(t, refusal[:200*len("饱")], p.Reason)
	})
}

func TestPointsOfAnOrderAreEnteredAndAnnouncedOnceUnderWhateverEvents(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		ctx, f := context.Background(), facts("o1", order.Placed, 1)
		paid := event.PaymentSucceeded{Order: f, Reference: "ref", PaidAt: time.Now()}
		refunded := event.PaymentRefunded{Order: f, Reference: "ref", RefundedAt: time.Now()}
		require.NoError(t, c.points.Award(ctx, paid))
		require.ErrorIs(t, c.points.Award(ctx, paid), app.ErrDuplicate)
		require.Equal(t, 1, count(t, st.points, "SELECT COUNT(*) FROM outbox"))
		require.NoError(t, c.points.Revoke(ctx, refunded))
		require.ErrorIs(t, c.points.Revoke(ctx, refunded), app.ErrDuplicate)
		require.ErrorIs(t, c.points.Award(ctx, paid), app.ErrDuplicate)
		entries, err := c.points.Entries(ctx, orderID(t, "o1"))
		require.NoError(t, err)
		require.Len(t, entries, 2)
		require.EqualValues(t, 28, entries[0].Points, "the oldest first")
		require.EqualValues(t, -28, entries[1].Points)
	})
}
