package history_test

import (
	"sync"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"takeout/domain"
	"takeout/domain/order"
	"takeout/verify/history"
)

func TestSameSeedAsksTheSameAndAnotherSeedSomethingElse(t *testing.T) {
	t.Parallel()
	a, b, c := history.Plan{Seed: 7, Orders: 100}, history.Plan{Seed: 7, Orders: 100}, history.Plan{Seed: 8, Orders: 100}
	different := 0
	for i := range 100 {
		require.Equal(t, a.Order(i), b.Order(i))
		if a.Order(i).Amount != c.Order(i).Amount {
			different++
		}
		require.NotEqual(t, a.Order(i).Name, c.Order(i).Name)
	}
	require.Greater(t, different, 90)
}

func TestWhateverIsPlannedCanBeOrdered(t *testing.T) {
	t.Parallel()
	p := history.Plan{Seed: ^uint64(0), Orders: 2_000_000}
	names := map[string]bool{}
	for i := p.Orders - 5000; i < p.Orders; i++ {
		o := p.Order(i)
		require.NoError(t, domain.CheckName("name", o.Name, order.MaxName), o.Name)
		require.True(t, utf8.ValidString(o.Name))
		_, err := domain.NewMoney(max(1, o.Amount), o.Currency)
		require.NoError(t, err)
		if o.ID != "" {
			_, err = order.ParseID(o.ID)
			require.NoError(t, err)
		}
		number, ok := p.Number(o.Name)
		require.True(t, ok, o.Name)
		require.Equal(t, i, number)
		names[o.Name] = true
	}
	require.Len(t, names, 5000)
	_, ok := p.Number("Mapo tofu")
	require.False(t, ok)
}

func TestAnswerThatSaysMoreStays(t *testing.T) {
	t.Parallel()
	h := history.New(1)
	require.Equal(t, history.NotAsked, h.Of(0).Place)
	h.Placed(0, history.Unknown, "")
	h.Placed(0, history.OK, "ord_1")
	h.Placed(0, history.Unknown, "ord_1")
	h.Placed(0, history.Refused, "")
	require.Equal(t, history.OK, h.Of(0).Place)
	require.Equal(t, history.Hash("ord_1"), h.Of(0).ID)
	require.False(t, h.Of(0).Wrong)
	h.Placed(0, history.OK, "ord_2")
	require.True(t, h.Of(0).Wrong, "one request, two orders")
	require.Equal(t, history.NotAsked, h.Of(0).Cancel)
}

func TestAnswersOfManyClientsAreAllKept(t *testing.T) {
	t.Parallel()
	h := history.New(1000)
	var clients sync.WaitGroup
	for range 4 {
		clients.Go(func() {
			for i := range h.Len() {
				h.Placed(i, history.OK, "x")
				h.Cancelled(i, history.Refused)
				h.Delivered(i, history.Unknown)
			}
		})
	}
	clients.Wait()
	for i := range h.Len() {
		require.Equal(t, history.Seen{Place: history.OK, Cancel: history.Refused, Deliver: history.Unknown, ID: history.Hash("x")}, h.Of(i))
	}
}
