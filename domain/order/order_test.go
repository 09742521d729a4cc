package order_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/domain"
	"takeout/domain/order"
)

func place(t *testing.T) *order.Order {
	t.Helper()
	id, err := order.ParseID("o1")
	require.NoError(t, err)
	money, err := domain.NewMoney(2850, "CNY")
	require.NoError(t, err)
	o, err := order.Place(id, "Mapo tofu", money, time.Date(2026, 1, 2, 3, 4, 5, 6789, time.FixedZone("CST", 8*3600)))
	require.NoError(t, err)
	return o
}

func TestPlacedOrderBeginsAtVersionOneInUTC(t *testing.T) {
	t.Parallel()
	s := place(t).Snapshot()
	require.Equal(t, order.Placed, s.Status)
	require.EqualValues(t, 1, s.Version)
	require.Equal(t, time.Date(2026, 1, 1, 19, 4, 5, 6000, time.UTC), s.PlacedAt, "UTC, to the microsecond")
	require.Empty(t, s.CourierID)
}

func TestOrderWithoutIDNameOrMoneyCannotExist(t *testing.T) {
	t.Parallel()
	s := place(t).Snapshot()
	for what, try := range map[string]func() (*order.Order, error){
		"id":    func() (*order.Order, error) { return order.Place(order.ID{}, s.Name, s.Money, s.PlacedAt) },
		"name":  func() (*order.Order, error) { return order.Place(s.ID, " ", s.Money, s.PlacedAt) },
		"money": func() (*order.Order, error) { return order.Place(s.ID, s.Name, domain.Money{}, s.PlacedAt) },
	} {
		o, err := try()
		require.Nil(t, o, what)
		require.Equal(t, domain.Invalid, domain.KindOf(err), what)
	}
}

func TestAssignmentThatComesLateOrAgainChangesNothing(t *testing.T) {
	t.Parallel()
	o := place(t)
	require.True(t, o.MarkDispatched("zhao", time.Now()))
	first := o.Snapshot()
	require.Equal(t, order.Dispatched, first.Status)
	require.EqualValues(t, 2, first.Version)
	require.Equal(t, "zhao", first.CourierID)
	require.False(t, o.MarkDispatched("qian", time.Now()))
	require.Equal(t, first, o.Snapshot())

	for _, status := range []order.Status{order.Cancelled, order.Delivered} {
		s := place(t).Snapshot()
		s.Status = status
		ended := order.Restore(s)
		require.False(t, ended.MarkDispatched("zhao", time.Now()), "%s", status)
		require.Equal(t, s, ended.Snapshot())
	}
}

func TestOrderIsTheSameRequestHoweverFarItHasCome(t *testing.T) {
	t.Parallel()
	o, other := place(t), place(t)
	require.True(t, other.MarkDispatched("zhao", time.Now()))
	require.True(t, o.SameRequest(other))
	require.Equal(t, o.Snapshot(), other.AsPlaced())
	s := o.Snapshot()
	s.Name = "Kung pao"
	require.False(t, o.SameRequest(order.Restore(s)))
}

func TestStatusesAreThoseAndNoOthers(t *testing.T) {
	t.Parallel()
	for _, s := range []order.Status{order.Placed, order.Dispatched, order.Delivered, order.Cancelled} {
		parsed, err := order.ParseStatus(s.String())
		require.NoError(t, err)
		require.Equal(t, s, parsed)
	}
	for _, text := range []string{"", "PLACED", "lost"} {
		_, err := order.ParseStatus(text)
		require.Equal(t, domain.Invalid, domain.KindOf(err), "%q", text)
	}
}
