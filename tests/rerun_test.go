package tests

import (
	"context"
	"crypto/sha256"
	"fmt"
	"path"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
	sqlproxy "takeout/verify/proxy"
)

// rerun is a use case that is interrupted at one statement after the other.
type rerun struct {
	before []func(id string) error // what has happened to the order, undisturbed
	do     func(id string) error
	rows   []string // each counts, for an order's id, what must be there once
}

// The database may ask at any statement that the whole transaction be run again, also when the transaction runs only because
// nobody knows whether its first run took effect. A use case that brought something along from the run before would store
// what nobody ordered.
func TestTransactionThatIsRunAgainStoresWhatOneRunWould(t *testing.T) {
	t.Parallel()
	at := time.Now().UTC().Truncate(time.Microsecond)
	placed := func(id string) event.Order {
		o := facts(id, order.Placed, 1)
		o.PlacedAt = at // the same when it is told again
		return o
	}
	cancelled := func(id string) event.OrderCancelled {
		o := placed(id)
		o.Status, o.Version = order.Cancelled.String(), 2
		return event.OrderCancelled{Order: o, Reason: "changed my mind", CancelledAt: at}
	}

	handling := func(id string) context.Context { return app.WithDelivery(t.Context(), delivery("evt_"+id, id)) }

	t.Run("order", func(t *testing.T) {
		t.Parallel()
		store, f := openBehindFaults(t, sqlstore.OpenOrders)
		orders, compensation := app.NewOrders(store), app.NewCompensation(store, 1000)
		place := func(key string) func(id string) error {
			return func(id string) error {
				money, err := domain.NewMoney(2850, "CNY")
				if err != nil {
					return err
				}
				cmd := app.PlaceOrder{ID: orderID(t, id), Name: "Mapo tofu", Money: money}
				if key != "" {
					cmd.Request = &app.Request{Key: key + id, Fingerprint: sha256.Sum256([]byte(id)), Answer: func(order.Snapshot) ([]byte, error) { return []byte("{}"), nil }}
				}
				_, err = orders.Place(t.Context(), cmd)
				return err
			}
		}
		const stored = "SELECT COUNT(*) FROM order_info WHERE orderId = ? AND order_money = 2850 AND name = 'Mapo tofu' AND status = "
		for name, r := range map[string]rerun{
			"place": {nil, place(""), []string{stored + "'placed'", announced}},
			"place with a key": {nil, place("key-"), []string{stored + "'placed'", announced,
				"SELECT COUNT(*) FROM idempotency_answer WHERE orderId = ?"}},
			"mark dispatched": {[]func(string) error{place("")}, func(id string) error {
				return orders.MarkDispatched(handling(id), event.DispatchAssigned{OrderID: id, CourierID: "zhao", AssignedAt: at, Version: 1})
			}, []string{stored + "'dispatched'"}},
			"mark several dispatched": {[]func(string) error{place(""), func(id string) error { return place("")(id + "-2") }}, func(id string) error {
				return orders.MarkDispatchedMany(handling(id), []event.DispatchAssigned{
					{OrderID: id, CourierID: "zhao", AssignedAt: at, Version: 1}, {OrderID: id + "-2", CourierID: "zhao", AssignedAt: at, Version: 1},
				})
			}, []string{stored + "'dispatched'"}},
			"cancel": {[]func(string) error{place("")}, func(id string) error {
				_, err := orders.Cancel(t.Context(), orderID(t, id), "changed my mind")
				return err
			}, []string{stored + "'cancelled'"}},
			"recreate": {nil, func(id string) error {
				return compensation.Recreate(handling(id), event.OrderPlaced{Order: placed(id)})
			}, []string{stored + "'placed'"}},
			"recreate cancelled": {nil, func(id string) error {
				return compensation.RecreateCancelled(handling(id), cancelled(id))
			}, []string{stored + "'cancelled'"}},
		} {
			t.Run(name, func(t *testing.T) { r.everyStatement(t, f, "order_info") })
		}
	})

	t.Run("dispatch", func(t *testing.T) {
		t.Parallel()
		store, f := openBehindFaults(t, sqlstore.OpenDispatches)
		dispatches := app.NewDispatches(store, app.DispatchPolicy{})
		id, err := dispatch.ParseCourierID("zhao")
		require.NoError(t, err)
		zhao, err := dispatch.NewCourier(id, "Zhao", true, 1000)
		require.NoError(t, err)
		require.NoError(t, dispatches.AddCourier(t.Context(), zhao))
		assign := func(id string) error { return dispatches.Assign(handling(id), placed(id)) }
		const stored = "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND order_money = 2850 AND state = "
		for name, r := range map[string]rerun{
			"assign": {nil, assign, []string{stored + "'assigned'", announced}},
			"assign several": {nil, func(id string) error {
				return dispatches.AssignPlacedMany(handling(id), []event.OrderPlaced{{Order: placed(id)}, {Order: placed(id + "-2")}})
			}, []string{stored + "'assigned'", announced}},
			"release": {[]func(string) error{assign}, func(id string) error {
				return dispatches.Release(handling("cancel-"+id), cancelled(id))
			}, []string{stored + "'released'"}},
			"add courier": {nil, func(id string) error {
				courier, err := dispatch.ParseCourierID(id)
				if err != nil {
					return err
				}
				off, err := dispatch.NewCourier(courier, "Off duty", false, 3)
				if err != nil {
					return err
				}
				return dispatches.AddCourier(t.Context(), off)
			}, []string{"SELECT COUNT(*) FROM courier WHERE courier_id = ? AND capacity = 3"}},
			"deliver": {[]func(string) error{assign}, func(id string) error {
				_, err := dispatches.MarkDelivered(t.Context(), orderID(t, id))
				return err
			}, []string{stored + "'delivered'"}},
		} {
			t.Run(name, func(t *testing.T) { r.everyStatement(t, f, "platoon") })
		}
		require.Equal(t, 1, count(t, f.url, "SELECT COUNT(*) FROM courier c WHERE courier_id = 'zhao' AND active = "+
			"(SELECT COUNT(*) FROM platoon WHERE state = 'assigned' AND takeout_userId = c.courier_id)"), "the courier has what he has")
	})

	t.Run("payment", func(t *testing.T) {
		t.Parallel()
		store, f := openBehindFaults(t, openPayments)
		fine := func(string) error { return nil }
		payments := app.NewPayments(store, &faltering{before: fine, after: fine, held: map[string]bool{}})
		charge := func(id string) error { return payments.Charge(handling(id), event.OrderPlaced{Order: placed(id)}) }
		const stored = "SELECT COUNT(*) FROM payment WHERE orderId = ? AND order_money = 2850 AND state = "
		for name, r := range map[string]rerun{
			"charge": {nil, charge, []string{stored + "'succeeded'", announced}},
			"refund": {[]func(string) error{charge}, func(id string) error { return payments.Refund(handling("cancel-"+id), cancelled(id)) },
				[]string{stored + "'refunded'"}},
			"refund before": {nil, func(id string) error { return payments.Refund(handling("cancel-"+id), cancelled(id)) }, []string{stored + "'void'"}},
		} {
			t.Run(name, func(t *testing.T) { r.everyStatement(t, f, "payment") })
		}
	})

	t.Run("points", func(t *testing.T) {
		t.Parallel()
		store, f := openBehindFaults(t, sqlstore.OpenPoints)
		service := app.NewPoints(store)
		award := func(id string) error {
			return service.Award(handling(id), event.PaymentSucceeded{Order: placed(id), Reference: "r", PaidAt: at})
		}
		for name, r := range map[string]rerun{
			"award": {nil, award, []string{"SELECT COUNT(*) FROM points_entry WHERE orderId = ? AND points > 0", announced}},
			"award several": {nil, func(id string) error {
				return service.AwardMany(handling(id), []event.PaymentSucceeded{
					{Order: placed(id), Reference: "r", PaidAt: at}, {Order: placed(id + "-2"), Reference: "r", PaidAt: at},
				})
			}, []string{"SELECT COUNT(*) FROM points_entry WHERE orderId = ? AND points > 0", announced}},
			"revoke": {[]func(string) error{award}, func(id string) error {
				return service.Revoke(handling("cancel-"+id), event.PaymentRefunded{Order: cancelled(id).Order, Reference: "r", RefundedAt: at})
			}, []string{"SELECT COUNT(*) FROM points_entry WHERE orderId = ? AND points < 0"}},
		} {
			t.Run(name, func(t *testing.T) { r.everyStatement(t, f, "points_entry") })
		}
	})
}

// announced counts an order's events in the outbox.
const announced = "SELECT COUNT(*) FROM outbox WHERE order_id = ?"

// everyStatement runs the use case with the error of a deadlock at its first statement, at its second, and so on until no
// statement is left, and all of this again after an answer to COMMIT that was lost. What fails with the error is asked for
// again, as a client or the broker would.
func (r rerun) everyStatement(t *testing.T, f faults, table string) {
	for lostAnswer, code := range map[bool]uint16{false: 1213, true: 1020} { // MariaDB from 11.6 on says 1020 too
		for skip := 0; ; skip++ {
			id := fmt.Sprintf("%s-%t-%d", path.Base(t.Name()), lostAnswer, skip)
			for _, do := range r.before {
				require.NoError(t, do(id))
			}
			lost := f.between.Arm(sqlproxy.Fault{At: sqlproxy.Commit, Do: sqlproxy.DropAfter})
			if !lostAnswer {
				lost.Disarm()
			}
			deadlock := f.between.Arm(sqlproxy.Fault{At: sqlproxy.Statement, Do: sqlproxy.Fail, Code: code, Skip: skip})
			err := r.do(id)
			deadlock.Disarm()
			lost.Disarm()
			if kind := domain.KindOf(err); kind == domain.Busy || kind == domain.Unavailable {
				err = r.do(id)
			}
			if err != nil { // it was done before
				require.ErrorIs(t, err, app.ErrDuplicate, "deadlock at statement %d", skip)
			}
			for _, rows := range r.rows {
				require.Equal(t, 1, count(t, f.url, rows, id), "%s, after a deadlock at statement %d, an answer lost: %t", rows, skip, lostAnswer)
			}
			require.Zero(t, count(t, f.url, "SELECT COUNT(*) FROM "+table+" WHERE orderId = ''"), "deadlock at statement %d", skip)
			if deadlock.Sprung() == 0 {
				require.Greater(t, skip, 2, "there were statements")
				break
			}
		}
	}
}

// faults are before a database.
type faults struct {
	url     string
	between *sqlproxy.Proxy
}

// openBehindFaults returns a service's store in a database of its own that faults are before.
func openBehindFaults[T any](t testing.TB, open opener[T]) (*sqlstore.Store[T], faults) {
	t.Helper()
	rawURL, between := behindFaults(t)
	return openStore(t, rawURL, open), faults{rawURL, between}
}
