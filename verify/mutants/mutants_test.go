package mutants_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/verify/mutants"
)

func TestMutantsAreTheDefectsThatACheckerMustFind(t *testing.T) {
	t.Parallel()
	var names []string
	for _, m := range mutants.All {
		names = append(names, m.Name)
		require.NotEmpty(t, m.Expect, m.Name)
	}
	require.Equal(t, []string{
		"ack_before_commit", "delete_before_confirm", "no_inbox", "no_unique", "no_mandatory_returns", "offset_pointer", "no_version",
		"physical_delete_cancel", "comp_unsigned", "poison_on_ctx_cancel", "commit_error_means_failed", "retry_to_shared_exchange",
		"inbox_outside_tx", "reconcile_no_verify",
	}, names)
}

func TestEveryMutantStillFitsTheProgramAndCompiles(t *testing.T) {
	t.Parallel()
	for _, m := range mutants.All {
		t.Run(m.Name, func(t *testing.T) {
			require.NoError(t, m.Check(t.Context(), "../.."))
		})
	}
}

func TestMutantThatDoesNotFitOrCompileIsReported(t *testing.T) {
	t.Parallel()
	change := func(old, replacement string) mutants.Mutant {
		return mutants.Mutant{Name: "m", Changes: []mutants.Change{{File: "app/delivery.go", Old: old, New: replacement}}}
	}
	require.ErrorContains(t, change("nothing like that", "").Check(t.Context(), "../.."), "0 times instead of once")
	require.ErrorContains(t, change("Delivery", "").Check(t.Context(), "../.."), "times instead of once")
	require.ErrorContains(t, change("package app", "package app; var x int = true").Check(t.Context(), "../.."), "does not compile")
}
