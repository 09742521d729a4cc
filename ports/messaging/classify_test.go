package messaging

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/domain"
)

func TestErrorsClassDecidesWhatBecomesOfTheMessage(t *testing.T) {
	t.Parallel()
	of := func(kind domain.Kind) error { return fmt.Errorf("wrapped: %w", domain.Errorf(kind, "code", "text")) }
	for _, row := range []struct {
		err  error
		want class
	}{
		{nil, done},
		{of(domain.Invalid), permanent},
		{of(domain.NotFound), transient},
		{of(domain.Conflict), transient},
		{errors.New("anything"), transient},
		{of(domain.Unavailable), infrastructure},
		{of(domain.Busy), infrastructure},
		{of(domain.Exhausted), infrastructure},
		{context.Canceled, shutdown},
		{fmt.Errorf("query: %w", context.Canceled), shutdown},
		{errStopping, shutdown},
	} {
		require.Equal(t, row.want, classify(row.err), "%v", row.err)
	}
}
