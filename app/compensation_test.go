package app

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/domain"
)

func TestCompensationStopsWhenMoreThanTheLimitAndMoreThanHalfAreMissing(t *testing.T) {
	t.Parallel()
	for name, row := range map[string]struct {
		missing, stored int
		stops           bool
	}{
		"as many as the limit":            {10, 0, false},
		"one more":                        {11, 0, true},
		"half":                            {11, 11, false},
		"more than half":                  {12, 11, true},
		"a third of a thousand":           {333, 667, false},
		"none":                            {0, 1000, false},
		"more than half, below the limit": {9, 1, false},
	} {
		b := &breaker{limit: 10}
		for range row.stored {
			b.seen(false)
		}
		for range row.missing {
			b.seen(true)
		}
		require.Equal(t, row.stops, b.state().Why != "", name)
		require.Equal(t, row.stops, domain.KindOf(b.check()) == domain.Unavailable, name)
	}
}

func TestCompensationCountsWithinAMinute(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := &breaker{limit: 10}
		for range 100 {
			b.seen(true)
			time.Sleep(6 * time.Second)
		}
		require.NoError(t, b.check(), "ten a minute")
		time.Sleep(time.Minute)
		require.Zero(t, b.state().Missing)
	})
}

func TestCompensationStaysStoppedUntilItIsResumedAndThenLetsTheStormPass(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := NewCompensation(nil, 10)
		b := &c.breaker
		storm := func(minutes int) {
			for range minutes * 60 {
				b.seen(true)
				time.Sleep(time.Second)
			}
		}
		storm(1)
		stopped := c.State()
		require.Equal(t, CompensationState{Why: stopped.Why, Missing: 11, Announced: 11, Limit: 10}, stopped, "what came after it stopped does not count")
		time.Sleep(time.Hour)
		b.seen(false)
		require.Equal(t, stopped, c.State())

		require.Equal(t, domain.Invalid, domain.KindOf(c.Resume(" ")))
		require.Error(t, b.check())
		require.NoError(t, c.Resume("the primary lost its last second"))
		storm(5)
		require.NoError(t, b.check())
		time.Sleep(30 * time.Second)
		storm(1)
		require.NoError(t, b.check(), "half a minute of calm is none")
		time.Sleep(2 * time.Minute)
		storm(1)
		require.Error(t, b.check(), "another storm")
	})
}

func TestResumingWhatIsNotStoppedChangesNothing(t *testing.T) {
	t.Parallel()
	c := NewCompensation(nil, 1)
	c.breaker.seen(true)
	require.NoError(t, c.Resume("to be sure"))
	c.breaker.seen(true)
	require.NotEmpty(t, c.State().Why)
}
