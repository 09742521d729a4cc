package tests

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"takeout/domain/event"
)

// fileLimit sets the size beyond which the process may not write to a file, as a disk that is full does not let it.
// That needs no disk and no right to mount one.
func (p *process) fileLimit(t testing.TB, bytes uint64) {
	t.Helper()
	require.NoError(t, unix.Prlimit(p.cmd.Process.Pid, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: bytes, Max: unix.RLIM_INFINITY}, nil))
}

func TestFullDiskAcceptsNoOrderAndLosesNone(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := startProcess(t, "embedded", map[string]string{"TAKEOUT_DATA_DIR": dir, "TAKEOUT_PAYMENT_GATEWAY": "none"})
	s := &system{stack: stack{order: "sqlite:" + dir + "/order.db", dispatch: "sqlite:" + dir + "/dispatch.db"}, api: p.url, dispatchAPI: p.url}
	s.placeMany(t, 20, 4)
	s.awaitAllDispatched(t, 20)
	s.awaitRest(t) // or what is still to be done takes the room
	log, err := os.Stat(filepath.Join(dir, "order.db-wal"))
	require.NoError(t, err)
	p.fileLimit(t, uint64(log.Size())+100_000) // there is room for a few more

	var accepted, refused []string
	for i := 0; len(refused) < 20; i++ {
		require.Less(t, i, 2000, "the disk does not become full")
		id := fmt.Sprint("o-", i)
		began := time.Now()
		a := mustSend(t, http.MethodPost, s.api+"/v1/orders", fmt.Sprintf(`{"order_id":%q,"name":"x","amount":1}`, id))
		require.Less(t, time.Since(began), 3*time.Second, "%s", a)
		if a.status == http.StatusCreated {
			accepted = append(accepted, id)
			continue
		}
		require.Equal(t, http.StatusServiceUnavailable, a.status, "%s", a)
		require.NotEmpty(t, a.header.Get("Retry-After"))
		refused = append(refused, id)
	}
	require.NotEmpty(t, accepted)
	eventually(t, "readiness says so", func() error {
		_, _ = send(http.MethodPost, s.api+"/v1/orders", goodOrder)
		if a := mustGet(t, s.api+"/readyz"); !contains(a.body, "database order") || !contains(a.body, "cannot do its work") {
			return fmt.Errorf("%s", a)
		}
		return nil
	})

	p.fileLimit(t, unix.RLIM_INFINITY) // somebody has made room
	eventually(t, "orders are taken again", func() error {
		a, err := send(http.MethodPost, s.api+"/v1/orders", `{"order_id":"o-after","name":"x","amount":1}`)
		if err != nil || a.status != http.StatusCreated {
			return fmt.Errorf("%s: %w", a, err)
		}
		return nil
	})
	for _, id := range accepted {
		require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE orderId = ?", id))
	}
	s.awaitAllDispatched(t, 20+len(accepted)+1) // and none of the refused
	s.noFailures(t)

	p.fileLimit(t, 4096) // full again, and the process dies of it
	_ = mustSend(t, http.MethodPost, s.api+"/v1/orders", goodOrder)
	p.kill()
	p.start(t)
	s.placeMany(t, 5, 1)
	s.awaitAllDispatched(t, 20+len(accepted)+1+5)
	require.Equal(t, "ok", integrity(t, s.order))
	require.Equal(t, "ok", integrity(t, s.dispatch))
}

func integrity(t testing.TB, url string) (verdict string) {
	t.Helper()
	require.NoError(t, database(t, url).QueryRow("PRAGMA integrity_check").Scan(&verdict))
	return verdict
}

// status returns a number from what the kernel says about the process.
func (p *process) status(t testing.TB, field string) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	require.NoError(t, err)
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			require.NoError(t, err)
			return n
		}
	}
	t.Fatalf("the kernel does not say %s", field)
	return 0
}

func (p *process) openFiles(t testing.TB) int {
	t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	require.NoError(t, err)
	return len(files)
}

func TestMessagesOfAMegabyteFitIntoLittleMemory(t *testing.T) {
	t.Parallel()
	st := production(t)
	settings := roleSettings(st, "all")
	settings["TAKEOUT_PREFETCH"], settings["GOMEMLIMIT"] = "5", "64MiB"
	settings["TAKEOUT_ORDER_DATABASE_URL"], settings["TAKEOUT_DISPATCH_DATABASE_URL"] = st.order, st.dispatch
	p := startProcess(t, "all", settings)
	s := &system{stack: st, api: p.url, dispatchAPI: p.url}
	s.addCourier(t, "zhao", 0)
	s.awaitDispatched(t, s.place(t, "before", 100)) // the queues are there
	publish := s.stranger(t)
	const messages = 40
	for range messages {
		id := newEventID()
		publish("dispatch.assigned", id, encode(t, id, time.Now(), event.DispatchAssigned{OrderID: "o-" + strings.Repeat("x", 1<<20)}), nil)
	}
	s.awaitDispatched(t, s.place(t, "neighbour", 100))
	within(t, time.Minute, "all are kept", func() error {
		if n := s.orderRows(t, "SELECT COUNT(*) FROM failure"); n != messages {
			return fmt.Errorf("%d are", n)
		}
		return nil
	})
	require.Less(t, p.status(t, "VmHWM"), 128<<10, "kB, at the most")
	require.NoError(t, p.terminate(t))
}

func TestHundredLossesOfTheBrokerAndTheDatabaseLeaveNothingOpen(t *testing.T) {
	t.Parallel()
	st := production(t)
	direct := st
	var broker, orders *proxy
	st.broker, broker = through(t, st.broker)
	st.order, orders = through(t, st.order)
	settings := roleSettings(st, "all")
	settings["TAKEOUT_ORDER_DATABASE_URL"], settings["TAKEOUT_DISPATCH_DATABASE_URL"] = st.order, st.dispatch
	p := startProcess(t, "all", settings)
	s := &system{stack: direct, api: p.url, dispatchAPI: p.url}
	s.addCourier(t, "zhao", 0)
	placed := 0
	round := func() {
		s.placeMany(t, 160, 64) // as many at once as there may be connections
		placed += 160
		s.awaitAllDispatched(t, placed)
	}
	goroutines := func() int {
		var n int
		_, err := fmt.Sscanf(s.sampleOf(t, "go_goroutines"), "go_goroutines %d", &n)
		require.NoError(t, err)
		return n
	}
	for range 3 {
		round()
	}
	open, running := p.openFiles(t), goroutines()
	for range 50 {
		broker.cut()
		broker.mend()
		orders.cut()
		orders.mend()
		eventually(t, "an order is taken", func() error {
			a, err := send(http.MethodPost, s.api+"/v1/orders", goodOrder)
			if err != nil || a.status != http.StatusCreated {
				return fmt.Errorf("%s: %w", a, err)
			}
			placed++
			return nil
		})
	}
	placed = s.orderRows(t, "SELECT COUNT(*) FROM order_info")
	round()
	httpClient.CloseIdleConnections()
	eventually(t, "what is open is what was open before", func() error {
		if now, at := p.openFiles(t), goroutines(); now > open+open/20+1 || at > running+running/20+1 {
			return fmt.Errorf("%d files instead of %d, %d goroutines instead of %d", now, open, at, running)
		}
		return nil
	})
	s.awaitRest(t)
	s.noFailures(t)
	require.NoError(t, p.terminate(t))
}
