package check

import (
	"testing"

	"github.com/stretchr/testify/require"

	domain "takeout/domain/order"
)

// The checker states the program's words itself. A word that the program no longer uses would make a rule that never fires.
func TestReasonsOfCancellationsAreTheProgramsOwn(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]reason{
		domain.ReasonNoCourier: noCourier, domain.ReasonNotPaid: notPaid, domain.ReasonCancelWasLost: cancelWasLost, "changed my mind": byCustomer,
	} {
		require.Equal(t, want, reasonOf(text), "%s", text)
	}
}
