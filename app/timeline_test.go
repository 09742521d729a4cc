package app_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/app"
	"takeout/domain"
	"takeout/domain/order"
)

// told is a database that tells these steps, or why it cannot.
type told struct {
	steps []app.Step
	err   error
}

func (s told) Steps(context.Context, order.ID) ([]app.Step, error) { return s.steps, s.err }

func TestTimelineGoesWithoutADatabaseThatIsAwayAndNotWithoutOneThatIsBroken(t *testing.T) {
	t.Parallel()
	id, err := order.ParseID("o1")
	require.NoError(t, err)
	placed := told{steps: []app.Step{{At: time.Now(), Name: "placed"}}}
	way, err := app.NewTimeline(map[string]app.StepSource{
		"order": placed, "dispatch": told{err: domain.Errorf(domain.Unavailable, "database_unavailable", "away")},
	}, nil).Of(t.Context(), id)
	require.NoError(t, err)
	require.Equal(t, []string{"dispatch"}, way.Unavailable)
	require.Len(t, way.Steps, 1)

	broken := errors.New("a row is damaged")
	_, err = app.NewTimeline(map[string]app.StepSource{"order": placed, "dispatch": told{err: broken}}, nil).Of(t.Context(), id)
	require.ErrorIs(t, err, broken)
}
