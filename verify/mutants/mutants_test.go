package mutants_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/verify/mutants"
)

func TestEveryMutantStillFitsTheProgramAndCompiles(t *testing.T) {
	t.Parallel()
	for _, m := range mutants.All {
		t.Run(m.Name, func(t *testing.T) {
			require.NoError(t, m.Check(t.Context(), "../.."))
		})
	}
}
