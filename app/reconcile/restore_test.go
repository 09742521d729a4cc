package reconcile_test

import (
	"context"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/app/reconcile"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/domain/payment"
)

// opened opens and migrates a service's database in a file of its own.
func opened[T any](t *testing.T, open func(url string, keys event.Keys, logger *slog.Logger) (*sqlstore.Store[T], error)) *sqlstore.Store[T] {
	t.Helper()
	store, err := open("sqlite:"+filepath.Join(t.TempDir(), "service.db"), nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = store.Close() })
	_, err = store.Migrate(context.Background())
	require.NoError(t, err)
	return store
}

var at = time.Date(2026, 1, 2, 3, 4, 5, 678_000, time.UTC)

// noGateway is a gateway that nobody asks.
type noGateway struct{ app.Gateway }

// lost is an order that only another service knows, under the version 7.
func lost(t *testing.T, id string) (order.ID, domain.Money, order.Snapshot) {
	t.Helper()
	orderID, err := order.ParseID(id)
	require.NoError(t, err)
	money, err := domain.NewMoney(2850, "CNY")
	require.NoError(t, err)
	return orderID, money, order.Snapshot{ID: orderID, Name: "Mapo tofu", Money: money, PlacedAt: at, Status: order.Placed, Version: 7}
}

func TestOrderIsMadeAgainAsItsDispatchKnowsIt(t *testing.T) {
	t.Parallel()
	ctx, orders := context.Background(), opened(t, sqlstore.OpenOrders)
	dispatches := opened(t, sqlstore.OpenDispatches)
	useCases := app.UseCases{
		Orders: app.NewOrders(orders), Compensation: app.NewCompensation(orders, 100), Dispatches: app.NewDispatches(dispatches, app.DispatchPolicy{}),
	}
	zhao, err := dispatch.ParseCourierID("zhao")
	require.NoError(t, err)
	assigned, ended := at.Add(time.Minute), at.Add(time.Hour)
	for state, known := range map[dispatch.State]struct {
		dispatch func(job order.Terms) dispatch.Dispatch
		want     func(o *order.Snapshot)
	}{
		dispatch.Waiting: {dispatch.Wait, func(*order.Snapshot) {}},
		dispatch.Assigned: {
			func(job order.Terms) dispatch.Dispatch { return dispatch.New(job, zhao, assigned) },
			func(o *order.Snapshot) { o.Status, o.CourierID, o.AssignedAt = order.Dispatched, "zhao", assigned },
		},
		dispatch.Delivered: {
			func(job order.Terms) dispatch.Dispatch {
				d := dispatch.New(job, zhao, assigned)
				_, err := d.MarkDelivered(ended)
				require.NoError(t, err)
				return d
			},
			func(o *order.Snapshot) {
				o.Status, o.CourierID, o.AssignedAt, o.DeliveredAt = order.Delivered, "zhao", assigned, ended
			},
		},
		dispatch.Released: {
			func(job order.Terms) dispatch.Dispatch { return dispatch.End(job, dispatch.Released, ended) },
			func(o *order.Snapshot) {
				o.Status, o.CancelledAt, o.CancelReason = order.Cancelled, ended, order.ReasonCancelWasLost
			},
		},
		dispatch.Impossible: {
			func(job order.Terms) dispatch.Dispatch { return dispatch.End(job, dispatch.Impossible, ended) },
			func(o *order.Snapshot) {
				o.Status, o.CancelledAt, o.CancelReason = order.Cancelled, ended, order.ReasonNoCourier
			},
		},
	} {
		id, money, want := lost(t, "o-"+state.String())
		job := order.Terms{OrderID: id, Name: "Mapo tofu", Money: money, PlacedAt: at, Version: 7}
		require.NoError(t, dispatches.InTx(ctx, func(ctx context.Context, tx app.DispatchTx) error {
			return tx.Dispatches.Add(ctx, known.dispatch(job))
		}))
		require.NoError(t, reconcile.RestoreFromDispatch(ctx, useCases, id))
		known.want(&want)
		got, err := useCases.Orders.Get(ctx, id)
		require.NoError(t, err)
		require.Equal(t, want, got, state.String())
	}
}

func TestOrderIsMadeAgainAsItsPaymentKnowsIt(t *testing.T) {
	t.Parallel()
	ctx, orders := context.Background(), opened(t, sqlstore.OpenOrders)
	payments := opened(t, func(url string, keys event.Keys, logger *slog.Logger) (*sqlstore.Store[app.PaymentTx], error) {
		return sqlstore.OpenPayments(url, keys, logger)
	})
	useCases := app.UseCases{
		Orders: app.NewOrders(orders), Compensation: app.NewCompensation(orders, 100), Payments: app.NewPayments(payments, noGateway{}),
	}
	decided, refunded := at.Add(time.Minute), at.Add(time.Hour)
	for state, want := range map[payment.State]struct {
		status order.Status
		reason string
		at     time.Time
	}{
		payment.Charging:  {order.Placed, "", time.Time{}},
		payment.Succeeded: {order.Placed, "", time.Time{}},
		payment.Refused:   {order.Cancelled, order.ReasonNotPaid, decided},
		payment.Refunded:  {order.Cancelled, order.ReasonCancelWasLost, refunded},
		payment.Void:      {order.Cancelled, order.ReasonCancelWasLost, time.Time{}},
	} {
		id, money, o := lost(t, "o-"+state.String())
		p := payment.Payment{
			Bill:  order.Terms{OrderID: id, Name: "Mapo tofu", Money: money, PlacedAt: at, Version: 7},
			State: state, DecidedAt: decided, RefundedAt: refunded,
		}
		require.NoError(t, payments.InTx(ctx, func(ctx context.Context, tx app.PaymentTx) error { return tx.Payments.Add(ctx, p) }))
		require.NoError(t, reconcile.RestoreFromPayment(ctx, useCases, id))
		got, err := useCases.Orders.Get(ctx, id)
		require.NoError(t, err)
		if state == payment.Void { // nobody knows when it was cancelled
			require.WithinDuration(t, time.Now(), got.CancelledAt, time.Minute)
			got.CancelledAt = time.Time{}
		}
		o.Status, o.CancelReason, o.CancelledAt = want.status, want.reason, want.at
		require.Equal(t, o, got, state.String())
	}
}
