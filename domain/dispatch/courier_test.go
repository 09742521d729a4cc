package dispatch_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/domain"
	"takeout/domain/dispatch"
)

func TestCourierOutOfTheirLimitsCannotExist(t *testing.T) {
	t.Parallel()
	id, err := dispatch.ParseCourierID("zhao")
	require.NoError(t, err)
	for _, row := range []struct {
		id       dispatch.CourierID
		name     string
		capacity int
	}{
		{dispatch.CourierID{}, "Zhao", 0},
		{id, "", 0},
		{id, strings.Repeat("x", dispatch.MaxCourierName+1), 0},
		{id, "Zhao", -1},
		{id, "Zhao", dispatch.MaxCapacity + 1},
	} {
		_, err := dispatch.NewCourier(row.id, row.name, true, row.capacity)
		require.Equal(t, domain.Invalid, domain.KindOf(err), "%+v", row)
	}
}

func TestChangeTouchesOnlyWhatIsGiven(t *testing.T) {
	t.Parallel()
	c := dispatch.RestoreCourier("zhao", "Zhao", true, 3, 2)
	off, capacity := false, 5
	changed, err := c.Change(nil, &off, nil)
	require.NoError(t, err)
	require.Equal(t, dispatch.RestoreCourier("zhao", "Zhao", false, 3, 2), changed)
	changed, err = changed.Change(nil, nil, &capacity)
	require.NoError(t, err)
	require.Equal(t, dispatch.RestoreCourier("zhao", "Zhao", false, 5, 2), changed)
}
