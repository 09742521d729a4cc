package app_test

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
)

func TestAnnouncementsThatComeTogetherAreComparedEachAndCounted(t *testing.T) {
	t.Parallel()
	ctx, store := context.Background(), openStore(t, "sqlite:"+filepath.Join(t.TempDir(), "order.db"), sqlstore.OpenOrders)
	money, err := domain.NewMoney(2850, "CNY")
	require.NoError(t, err)
	orders, compensation := app.NewOrders(store), app.NewCompensation(store, 100)
	var announced []event.OrderPlaced
	for _, id := range []string{"o1", "o2", "o3"} {
		orderID, err := order.ParseID(id)
		require.NoError(t, err)
		placed, err := orders.Place(ctx, app.PlaceOrder{ID: orderID, Name: "Mapo tofu", Money: money})
		require.NoError(t, err)
		announced = append(announced, event.OrderPlaced{Order: event.Order{
			OrderID: id, Name: "Mapo tofu", Amount: money.Amount(), Currency: money.Currency(), Status: "placed", Version: 1, PlacedAt: placed.Order.PlacedAt,
		}})
	}
	require.NoError(t, compensation.RecreateMany(ctx, announced))
	require.Equal(t, app.CompensationState{Announced: 3, Limit: 100}, compensation.State(), "what is there says that little is missing")

	for _, contradiction := range []func(e *event.OrderPlaced){
		func(e *event.OrderPlaced) { e.Amount++ }, func(e *event.OrderPlaced) { e.Currency = "EUR" }, func(e *event.OrderPlaced) { e.Name = "Kung pao" },
	} {
		all := append([]event.OrderPlaced{}, announced...)
		contradiction(&all[1])
		require.Equal(t, domain.Invalid, domain.KindOf(compensation.RecreateMany(ctx, all)))
	}
	absent := append([]event.OrderPlaced{}, announced...)
	absent[2].OrderID = "o4"
	require.ErrorIs(t, compensation.RecreateMany(ctx, absent), app.ErrAlone)
}
