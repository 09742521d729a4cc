//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"takeout/tests/testenv"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "child" { // a test that measures starts this program again
		if err := serveChild(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	testenv.Main(m)
}

func TestQuickRunMeasuresEveryKindOfSystemAndWritesItsFigures(t *testing.T) {
	for variable, address := range map[string]string{"TAKEOUT_BENCH_MYSQL_URL": testenv.MySQL(t), "TAKEOUT_BENCH_AMQP_URL": testenv.AMQP(t)} {
		u, err := url.Parse(address)
		require.NoError(t, err)
		u.Path, u.RawQuery = "/", ""
		t.Setenv(variable, u.String())
	}
	file := filepath.Join(t.TempDir(), "bench.json")
	t.Setenv("BENCH_JSON", file)
	var out bytes.Buffer
	require.NoError(t, run(t.Context(), []string{
		"-quick", "-arms=http,direct,stock,xa,floor_2_queues,bare,embedded_direct,embedded_floor", "-rows=drain,reconcile",
	}, &out), "%s", &out)
	text, err := os.ReadFile(file)
	require.NoError(t, err)
	var found report
	require.NoError(t, json.Unmarshal(text, &found))
	for _, ratio := range []string{"direct/stock", "http/stock", "direct/floor", "direct/bare", "direct/xa", "drain_1m/drain_10k", "embedded_direct/embedded_floor"} {
		require.Positive(t, found.Ratios[ratio], "%s in %s", ratio, text)
	}
	require.Positive(t, found.Arms["direct"].CPU["system"])
	require.Positive(t, found.Memory["direct"])
	t.Log(out.String())
}

// embedded starts the product, places orders and returns it at rest.
func embedded(t *testing.T, orders int) *running {
	t.Helper()
	b := &bench{stack: &stack{dir: t.TempDir()}, out: t.Output(), pid: os.Getpid(), report: newReport()}
	r, err := b.start(t.Context(), arm{kind: "product", embedded: true})
	require.NoError(t, err)
	t.Cleanup(r.close)
	_, dispatched, err := r.place(t.Context(), load{Orders: orders, Workers: 4})
	require.NoError(t, err)
	require.NotContains(t, dispatched, int64(0))
	require.NoError(t, r.child.stop())
	require.NoError(t, r.check(t.Context()))
	return r
}

func TestOrderThatIsNotStoredOrNotDispatchedFails(t *testing.T) {
	for _, lose := range []struct{ what, statement string }{
		{"order", "DELETE FROM order_info WHERE orderId = 'bench-00000007'"},
		{"dispatch", "DELETE FROM platoon WHERE orderId = 'bench-00000007'"},
	} {
		t.Run(lose.what, func(t *testing.T) {
			r := embedded(t, 10)
			address := map[string]string{"order": r.site.Order, "dispatch": r.site.Dispatch}[lose.what]
			db, err := open(address, 1, false)
			require.NoError(t, err)
			defer db.Close()
			_, err = db.Exec(lose.statement)
			require.NoError(t, err)
			require.ErrorContains(t, r.check(t.Context()), "10 orders were placed")
		})
	}
}

func TestOrderThatIsNeverDispatchedIsMissed(t *testing.T) {
	r := embedded(t, 3)
	require.ErrorIs(t, r.watcher.await(t.Context(), 4, 50*time.Millisecond), lostError(1))
}

func TestRowsAreSeenInWhateverOrderTheyAppear(t *testing.T) {
	db, err := openSQLite(filepath.Join(t.TempDir(), "dispatch.db"), 1)
	require.NoError(t, err)
	defer db.Close()
	require.NoError(t, create(t.Context(), db, "CREATE TABLE platoon (id INTEGER PRIMARY KEY, orderId TEXT)"))
	w := watch(db, time.Millisecond)
	defer w.close()
	for seen, id := range []int{2, 5, 1, 4, 3} {
		_, err := db.Exec("INSERT INTO platoon (id, orderId) VALUES (?, ?)", id, orderID(id))
		require.NoError(t, err)
		require.NoError(t, w.await(t.Context(), seen+1, 900*time.Millisecond), "without reading everything, as it does after a second")
	}
}

func TestOrdersThatAreSeenAtOnceHaveASpeed(t *testing.T) {
	db, err := openSQLite(filepath.Join(t.TempDir(), "dispatch.db"), 1)
	require.NoError(t, err)
	defer db.Close()
	require.NoError(t, create(t.Context(), db, "CREATE TABLE platoon (id INTEGER PRIMARY KEY, orderId TEXT)"))
	begin := time.Now().UnixNano()
	w := watch(db, time.Millisecond)
	defer w.close()
	require.Eventually(t, func() bool { return w.since() > begin }, 10*time.Second, time.Millisecond, "it looks and sees none")
	_, err = db.Exec("INSERT INTO platoon (id, orderId) VALUES (1, ?), (2, ?), (3, ?)", orderID(0), orderID(1), orderID(2))
	require.NoError(t, err)
	require.NoError(t, w.await(t.Context(), 3, 10*time.Second))
	times := w.times(load{Orders: 3})
	require.Equal(t, times[0], times[2], "all three are seen at once")
	seconds := time.Duration(times[2] - w.since()).Seconds()
	require.Positive(t, seconds)
	require.InDelta(t, 3/seconds, rate(append([]int64{w.since()}, times...)), 1e-6)
}

func TestLatencyCountsFromTheTimeThatWasPlanned(t *testing.T) {
	var once sync.Once
	var arrived atomic.Int32
	halted := make(chan struct{})
	answers := load{Orders: 50, Rate: 1000}.run(t.Context(), func(context.Context, int) error {
		arrived.Add(1)
		once.Do(func() {
			time.AfterFunc(300*time.Millisecond, func() {
				assert.EqualValues(t, 50, arrived.Load(), "none waits for the answer of another one")
				close(halted)
			})
		})
		<-halted // the first order halts the system, and the others arrive all the same
		return nil
	})
	for _, a := range answers {
		require.Greater(t, millis(a.Done-a.Due), 100.0, "the halt is counted by everybody who came in it")
	}
}
