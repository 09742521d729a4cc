package dispatch_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/order"
)

func job(t *testing.T, amount, version int64, name string) order.Terms {
	t.Helper()
	money, err := domain.NewMoney(amount, "CNY")
	require.NoError(t, err)
	return order.Terms{Name: name, Money: money, Version: version}
}

func TestOnlyTheSameOrderIsRestoredAndOnlyWhereItWaits(t *testing.T) {
	t.Parallel()
	zhao, err := dispatch.ParseCourierID("zhao")
	require.NoError(t, err)
	known := dispatch.New(job(t, 100, 1, "tofu"), zhao, time.Now())
	for _, stored := range []dispatch.Dispatch{
		dispatch.Wait(job(t, 101, 1, "tofu")), dispatch.Wait(job(t, 100, 1, "rice")),
		dispatch.End(known.Job, dispatch.Released, time.Now()), dispatch.End(known.Job, dispatch.Impossible, time.Now()),
	} {
		before := stored
		require.False(t, stored.Restore(known), "%+v", before)
		require.Equal(t, before, stored)
	}
	waits := dispatch.Wait(known.Job)
	require.True(t, waits.Restore(known))
	require.Equal(t, known, waits)
}
