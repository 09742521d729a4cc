package app_test

import (
	"context"
	"errors"
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/app"
	"takeout/domain"
)

// shelf is a database with failures, of which it tells the sizes, that remembers which are retried.
type shelf struct {
	app.FailureStore
	sizes  []int64
	fails  error // when something is to be retried
	broken error // when it is asked what there is

	retried []int64
}

func (s *shelf) OldestFailures(context.Context, app.FailureFilter, int) ([]app.KeptFailure, error) {
	if s.broken != nil {
		return nil, s.broken
	}
	var all []app.KeptFailure
	for i, size := range s.sizes {
		all = append(all, app.KeptFailure{ID: app.FailureID{Number: int64(i + 1)}, PayloadSize: size})
	}
	return all, nil
}

func (s *shelf) RetryFailures(_ context.Context, numbers []int64, _ app.FailureRetry) ([]int64, error) {
	if s.fails != nil {
		return nil, s.fails
	}
	s.retried = numbers
	return numbers, nil
}

func retryAll(t *testing.T, dispatch, order *shelf) (app.RetriedFailures, error) {
	desk := app.NewFailureDesk(map[string]app.FailureStore{"dispatch": dispatch, "order": order}, nil, nil)
	return desk.RetryMany(t.Context(), app.RetryFailures{Limit: 100, PerSecond: 10, FailureAction: app.FailureAction{Operator: "wang"}})
}

// What one call retries goes through one transaction of each database.
func TestMessagesOfOneRetryTogetherAreNotTooLarge(t *testing.T) {
	t.Parallel()
	const large = app.MaxRetryPayload
	dispatch, order := &shelf{sizes: []int64{large, large, large, large, large}}, &shelf{sizes: []int64{large, large, large, large, 1}}
	retried, err := retryAll(t, dispatch, order)
	require.NoError(t, err)
	require.Len(t, retried.IDs, 8)
	require.Equal(t, []int64{1, 2, 3, 4, 5}, dispatch.retried)
	require.Equal(t, []int64{1, 2, 3}, order.retried, "what is left open is for the next call")
	require.Empty(t, retried.TooLarge)
}

func TestDatabaseThatFailsKeepsNoOtherFromRetrying(t *testing.T) {
	t.Parallel()
	away := domain.Errorf(domain.Unavailable, "database_unavailable", "the dispatch database is not available")
	dispatch, order := &shelf{sizes: []int64{1}, fails: away}, &shelf{sizes: []int64{1}}
	retried, err := retryAll(t, dispatch, order)
	require.NoError(t, err)
	require.Equal(t, []app.FailureID{{Service: "order", Number: 1}}, retried.IDs)
	require.Equal(t, []string{"dispatch"}, retried.Unavailable)

	_, err = retryAll(t, dispatch, &shelf{sizes: []int64{1}, fails: away})
	require.ErrorIs(t, err, away, "nothing is retried at all")
}

// A database that is away is named in the answer. What is wrong otherwise must not look like a database without failures.
func TestDatabaseThatCannotBeReadIsNotPassedOver(t *testing.T) {
	t.Parallel()
	broken := errors.New("the table is damaged")
	_, err := retryAll(t, &shelf{broken: broken}, &shelf{sizes: []int64{1}})
	require.ErrorIs(t, err, broken)
	retried, err := retryAll(t, &shelf{broken: domain.Errorf(domain.Unavailable, "database_unavailable", "away")}, &shelf{sizes: []int64{1}})
	require.NoError(t, err)
	require.Equal(t, []string{"dispatch"}, retried.Unavailable)
}
