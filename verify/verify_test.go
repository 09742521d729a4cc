//go:build unix

package verify_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/tests/testenv"
	"takeout/verify"
	"takeout/verify/check"
	"takeout/verify/servers"
)

func TestMain(m *testing.M) { testenv.Main(built{m}) }

// built is the tests, after which what they built is removed.
type built struct{ *testing.M }

func (b built) Run() int {
	defer func() {
		if path, err := program(); err == nil {
			_ = os.RemoveAll(filepath.Dir(path))
		}
	}()
	return b.M.Run()
}

// seed is the one of the runs here, so that what fails fails again. TAKEOUT_TEST_VERIFY_SEED tries another one.
func seed() string {
	if s := os.Getenv("TAKEOUT_TEST_VERIFY_SEED"); s != "" {
		return s
	}
	return "20251124"
}

// program is the program, built once.
var program = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "takeout-verify-test-")
	if err != nil {
		return "", err
	}
	program := filepath.Join(dir, "takeout")
	if out, err := exec.Command("go", "build", "-o", program, "takeout").CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return program, nil
})

// run runs the command and returns its exit code, what it said, and its report.
func run(t *testing.T, env []string, args ...string) (code int, said string, report *verify.Report) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "report.json")
	path, err := program()
	require.NoError(t, err)
	cmd := exec.Command(path, append([]string{"verify", "--json", file}, args...)...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if _, ended := errors.AsType[*exec.ExitError](err); !ended {
		require.NoError(t, err)
	}
	if text, err := os.ReadFile(file); err == nil {
		report = &verify.Report{}
		require.NoError(t, json.Unmarshal(text, report))
	}
	return cmd.ProcessState.ExitCode(), string(out), report
}

// holds requires that a run was done and that every invariant held.
func holds(t *testing.T, env []string, args ...string) {
	t.Helper()
	code, said, report := run(t, env, args...)
	t.Log(said)
	require.Zero(t, code, said)
	require.True(t, report.OK)
	require.Empty(t, report.All())
	require.Contains(t, said, "lost=0 duplicate_effects=0 orphans=0 resurrected=0 other=0")
	require.NotEmpty(t, report.Inflicted)
	require.Greater(t, report.Checked.Acknowledged, 500)
}

func TestEmbeddedStackKeepsItsPromisesThroughTwentyFaults(t *testing.T) {
	t.Parallel()
	holds(t, nil, "--stack", verify.Embedded, "--orders", "6000", "--faults", "20", "--duration", "2m", "--seed", seed())
}

func TestServersKeepTheirPromisesThroughTwentyFaults(t *testing.T) {
	t.Parallel()
	env := serversOf(t)
	holds(t, env, "--stack", verify.Servers, "--orders", "6000", "--faults", "20", "--duration", "2m", "--seed", seed())
}

// serversOf returns the settings of a run on servers where none can be started.
func serversOf(t *testing.T) (env []string) {
	t.Helper()
	for _, kind := range []servers.Kind{servers.MySQL, servers.RabbitMQ} {
		if _, err := servers.Find(kind); err == nil {
			continue
		}
		t.Logf("no %s is installed: the run takes one of the tests', and leaves out what breaks servers", kind.Title())
		if kind == servers.MySQL {
			env = append(env, "TAKEOUT_VERIFY_MYSQL_URL="+testenv.StartMySQL(t).URL("verify"))
		} else {
			env = append(env, "TAKEOUT_VERIFY_AMQP_URL="+testenv.StartRabbitMQ(t).URL())
		}
	}
	return env
}

func TestReconciliationMakesGoodWhatQueuesLost(t *testing.T) {
	t.Parallel()
	holds(t, serversOf(t), "--stack", verify.Servers, "--orders", "1500", "--faults", "5", "--fault", "delete-queue,unbind-one-of-many,delete-exchange", "--seed", seed())
}

func TestSameSeedBreaksTheSame(t *testing.T) {
	t.Parallel()
	var broke [2][]string
	for i := range broke {
		code, said, report := run(t, nil, "--orders", "300", "--faults", "6", "--seed", "5", "--fault", "kill,another-id,poison,forged,old-event,recreate")
		require.Zero(t, code, said)
		for _, f := range report.Inflicted {
			broke[i] = append(broke[i], f.Kind+": "+f.Detail)
		}
	}
	require.Equal(t, broke[0], broke[1])
}

func TestSeriesOfRunsIsSummedUp(t *testing.T) {
	t.Parallel()
	code, said, report := run(t, nil, "--orders", "100", "--faults", "2", "--runs", "2", "--seed", "8", "--fault", "kill,poison")
	require.Zero(t, code, said)
	require.True(t, report.OK)
	require.Equal(t, []uint64{8, 9}, report.Seeds)
	require.Equal(t, 200, report.Orders)
	require.Equal(t, 4, report.Faults)
	require.InDelta(t, 3.0/200, report.BoundOrders, 1e-9)
	require.Len(t, report.Runs, 2)
	require.Equal(t, report.Runs[0].Checked.Stored+report.Runs[1].Checked.Stored, report.Checked.Stored)
	require.Contains(t, said, "2 runs, seeds 8 to 9: orders=200 ")
}

func TestFaultThatMetNothingShowsNothing(t *testing.T) {
	t.Parallel()
	ours := []string{"TAKEOUT_VERIFY_MYSQL_URL=" + testenv.StartMySQL(t).URL("verify"), "TAKEOUT_VERIFY_AMQP_URL=" + testenv.StartRabbitMQ(t).URL()}
	code, said, report := run(t, ours, "--stack", verify.Servers, "--orders", "50", "--faults", "2", "--fault", "broker-kill,poison", "--seed", "1")
	require.Zero(t, code, said)
	require.Equal(t, 2, report.Faults)
	require.Equal(t, 1, report.Missed, "a server that is not ours is left alone")
	require.InDelta(t, 3.0/1, report.BoundFaults, 1e-9)
	require.Contains(t, said, "faults=2 (broker 1, message 1) missed=1 ")

	sum := verify.Sum([]*verify.Report{report, report})
	require.Equal(t, 2, sum.Missed)
	require.InDelta(t, 3.0/2, sum.BoundFaults, 1e-9)
}

func TestSeriesIsRedIfOneRunIs(t *testing.T) {
	t.Parallel()
	green, red := &verify.Report{OK: true, Replay: "green", Checked: check.NewReport()}, &verify.Report{Replay: "red", Checked: check.NewReport()}
	red.Checked.ViolationCount["I1 lost"] = 2
	sum := verify.Sum([]*verify.Report{green, red})
	require.False(t, sum.OK)
	require.Equal(t, "red", sum.Replay)
	require.Contains(t, sum.Line(), "lost=2 ")
}

func TestWhatCannotBeVerifiedIsRefusedInOneLine(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"--stack", "postgres"}, "--stack must be one of"},
		{[]string{"--orders", "0"}, "--orders must be between"},
		{[]string{"--orders", "many"}, "--orders"},
		{[]string{"--faults", "-1"}, "--faults"},
		{[]string{"--roles", "0"}, "--roles must be between"},
		{[]string{"--fault", "earthquake"}, `has no fault "earthquake"`},
		{[]string{"--fault", "broker-kill"}, `the embedded stack has no fault "broker-kill"`},
		{[]string{"--duration", "-1s"}, "--duration"},
		{[]string{"--runs", "0"}, "--runs must be between"},
		{[]string{"--runs", "2", "--keep", "somewhere"}, "--keep is for one run"},
		{[]string{"--mysql-url", "mysql://root:secret@127.0.0.1:1/"}, "password on the command line"},
	} {
		code, said, report := run(t, nil, c.args...)
		require.Equal(t, 2, code, "%v: %s", c.args, said)
		require.Contains(t, said, c.says)
		require.NotContains(t, said, "secret")
		require.Nil(t, report)
	}
}

func TestDocumentationListsEveryFault(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../docs/verification.md")
	require.NoError(t, err)
	for _, kind := range verify.Kinds(verify.Servers) {
		if name, _, crash := strings.Cut(kind, ":"); !crash {
			require.Contains(t, string(text), "`"+name+"`")
		}
	}
}

func TestServersThatAreAwayCannotBeVerified(t *testing.T) {
	t.Parallel()
	code, said, _ := run(t, []string{
		"TAKEOUT_VERIFY_MYSQL_URL=mysql://root:canary-password@127.0.0.1:1/", "TAKEOUT_VERIFY_AMQP_URL=amqp://guest:guest@127.0.0.1:1/",
	}, "--stack", verify.Servers)
	require.Equal(t, 3, code, said)
	require.Contains(t, said, "not verified")
	require.Contains(t, said, "127.0.0.1:1")
	require.NotContains(t, said, "canary-password")
}
