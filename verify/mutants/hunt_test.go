//go:build unix

package mutants_test

import (
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/verify/mutants"
)

func TestRunCatchesThoseMutantsThatShowWithinSeconds(t *testing.T) {
	t.Parallel()
	caught := 0
	for _, m := range mutants.All {
		if !m.Quick {
			continue
		}
		program := filepath.Join(t.TempDir(), m.Name)
		require.NoError(t, m.Build(t.Context(), "../..", program))
		o := m.Options(program)
		o.Dir = t.TempDir()
		v, err := mutants.Verify(t.Context(), o)
		require.NoError(t, err)
		require.NotEmpty(t, m.CaughtBy(v), "%s: expected one of %q, found %q", m.Name, m.Expect, v.Found)
		t.Logf("%s was caught by %q in %.1f s", m.Name, m.CaughtBy(v), v.Took.Seconds())
		caught++
	}
	require.Equal(t, 3, caught)
}
