package app_test

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/domain/payment"
)

// silent is a gateway whose answer to a charge is lost.
type silent struct{}

var errSilent = errors.New("no answer")

func (silent) Charge(context.Context, order.Terms) (string, error) { return "", errSilent }
func (silent) Cancel(context.Context, order.Terms) error           { return nil }

// An order that was cancelled while the gateway was asked is not announced as paid because others are.
func TestOfPaymentsThatAreSettledTogetherOnlyThoseThatChangeAreAnnounced(t *testing.T) {
	t.Parallel()
	store, err := sqlstore.OpenPayments("sqlite:"+filepath.Join(t.TempDir(), "payment.db"), nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = store.Close() })
	ctx := context.Background()
	_, err = store.Migrate(ctx)
	require.NoError(t, err)
	payments := app.NewPayments(store, silent{})
	placed := func(id string) event.Order {
		return event.Order{OrderID: id, Name: "Mapo tofu", Amount: 2850, Currency: "CNY", Status: order.Placed.String(), Version: 1, PlacedAt: time.Now()}
	}
	paid, beside := placed("paid"), placed("cancelled-meanwhile")
	for _, o := range []event.Order{paid, beside} {
		require.ErrorIs(t, payments.Charge(ctx, event.OrderPlaced{Order: o}), errSilent)
	}
	require.NoError(t, payments.Refund(ctx, event.OrderCancelled{Order: beside, CancelledAt: time.Now()}))

	for range 2 { // the second time, both are settled
		require.NoError(t, payments.SettleTogether(ctx, paid, beside))
	}
	for id, want := range map[string]payment.State{"paid": payment.Succeeded, "cancelled-meanwhile": payment.Void} {
		parsed, err := order.ParseID(id)
		require.NoError(t, err)
		p, err := payments.Get(ctx, parsed)
		require.NoError(t, err)
		require.Equal(t, want, p.State)
	}
	var announced string
	require.NoError(t, store.DB().Reader().QueryRow("SELECT GROUP_CONCAT(order_id) FROM outbox").Scan(&announced))
	require.Equal(t, "paid", announced)
}
