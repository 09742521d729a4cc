package crashpoint_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/crashpoint"
)

// TestMain makes this test a program that is armed as its environment says, when it is started as one.
func TestMain(m *testing.M) {
	if os.Getenv("TAKEOUT_TEST_CRASHPOINT_CHILD") == "" {
		os.Exit(m.Run())
	}
	defer fmt.Println("deferred")
	if err := crashpoint.Arm(os.Getenv(crashpoint.Variable)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	for i := range 3 {
		began := time.Now()
		crashpoint.Here("outbox/claimed")
		fmt.Printf("outbox %d\n", i+1)
		crashpoint.In("order.mark-dispatched", "before-commit")
		fmt.Printf("consumer %d\n", i+1)
		if time.Since(began) > 20*time.Millisecond {
			fmt.Println("halted")
		}
	}
}

// armed runs the program above, armed with the spec.
func armed(t *testing.T, spec string) (state *os.ProcessState, stdout, stderr string) {
	t.Helper()
	var out, err strings.Builder
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), "TAKEOUT_TEST_CRASHPOINT_CHILD=1", crashpoint.Variable+"="+spec)
	command.Stdout, command.Stderr = &out, &err
	_ = command.Run()
	return command.ProcessState, out.String(), err.String()
}

func TestProcessThatIsNotArmedPassesEveryPoint(t *testing.T) {
	t.Parallel()
	state, stdout, stderr := armed(t, "")
	require.Zero(t, state.ExitCode(), stderr)
	require.Equal(t, "outbox 1\nconsumer 1\noutbox 2\nconsumer 2\noutbox 3\nconsumer 3\ndeferred\n", stdout)
	require.Empty(t, stderr)
}

func TestProcessDiesAtTheFirstPointThatItWasToldOfAndSaysWhich(t *testing.T) {
	t.Parallel()
	for spec, want := range map[string]struct{ point, before string }{
		"outbox/claimed":                      {"outbox/claimed", ""},
		"outbox/claimed:1":                    {"outbox/claimed", ""},
		"order.mark-dispatched/before-commit": {"order.mark-dispatched/before-commit", "outbox 1\n"},
		"outbox/claimed:3":                    {"outbox/claimed", "outbox 1\nconsumer 1\noutbox 2\nconsumer 2\n"},
		"outbox/claimed:3, order.mark-dispatched/before-commit:2": {"order.mark-dispatched/before-commit", "outbox 1\nconsumer 1\noutbox 2\n"},
	} {
		state, stdout, stderr := armed(t, spec)
		require.Equal(t, want.before, stdout, "%s: nothing deferred is done, either", spec)
		require.Equal(t, "takeout: dying at crash point "+want.point+"\n", stderr, spec)
		require.False(t, state.Exited(), "%s: it was killed, and has not exited: %s", spec, state)
	}
}

func TestProcessGoesOnAfterItHalted(t *testing.T) {
	t.Parallel()
	for _, spec := range []string{"outbox/claimed:stop=30ms", "outbox/claimed:1:stop=30ms"} {
		_, stdout, stderr := armed(t, spec)
		require.Equal(t, "outbox 1\nconsumer 1\nhalted\noutbox 2\nconsumer 2\noutbox 3\nconsumer 3\ndeferred\n", stdout, spec)
		require.Equal(t, "takeout: halting for 30ms at crash point outbox/claimed\n", stderr, spec)
	}
}

func TestPointThatIsReachedLessOftenKillsNobody(t *testing.T) {
	t.Parallel()
	state, _, stderr := armed(t, "outbox/claimed:4")
	require.Zero(t, state.ExitCode(), stderr)
	require.Empty(t, stderr)
}

func TestArmingRefusesWhatItCannotDo(t *testing.T) {
	t.Parallel()
	for spec, about := range map[string]string{
		"outbox/claimd":                 "outbox/claimed", // it names those that there are
		",":                             `""`,
		"outbox/claimed:":               `""`,
		"outbox/claimed:0":              `"0"`,
		"outbox/claimed:-1":             `"-1"`,
		"outbox/claimed:two":            `"two"`,
		"outbox/claimed:1:":             "stop=",
		"outbox/claimed:1:halt=1s":      "stop=",
		"outbox/claimed:1:stop=0s":      "stop=",
		"outbox/claimed:stop=soon":      "stop=",
		"outbox/claimed,outbox/claimed": "twice",
	} {
		state, stdout, stderr := armed(t, spec)
		require.Equal(t, 2, state.ExitCode(), "%s: %s", spec, stderr)
		require.Contains(t, stderr, about, spec)
		require.Contains(t, stderr, crashpoint.Variable, spec)
		require.Empty(t, stdout, spec)
	}
}

func TestEveryPointHasANameOfItsOwnAndIsSomebodys(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	for _, p := range crashpoint.Points() {
		require.False(t, seen[p.Name], p.Name)
		seen[p.Name] = true
		require.Regexp(t, `^[a-z._-]+/[a-z-]+$`, p.Name)
		require.NotEmpty(t, p.Where, p.Name)
		require.NotEmpty(t, p.Roles, p.Name)
		require.Contains(t, []string{"", "amqp", "sql"}, p.Broker, p.Name)
	}
}

func TestPointThatIsOffAllocatesNothing(t *testing.T) {
	queue := "order.mark-dispatched"
	require.Zero(t, testing.AllocsPerRun(1000, func() {
		crashpoint.Here("outbox/claimed")
		crashpoint.In(queue, "before-commit")
	}))
}

func BenchmarkHereOff(b *testing.B) {
	for b.Loop() {
		crashpoint.Here("outbox/claimed")
	}
}

func BenchmarkInOff(b *testing.B) {
	queue := "order.mark-dispatched"
	for b.Loop() {
		crashpoint.In(queue, "before-commit")
	}
}
