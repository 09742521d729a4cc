package tests

import (
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqldb"
	"takeout/service"
)

// startRoles starts a process for each of the roles, without payment, and with a courier on duty.
func startRoles(t testing.TB, st stack, roles ...string) *system {
	t.Helper()
	s := &system{stack: st, processes: map[string]*process{}}
	for _, role := range roles {
		s.processes[role] = startRole(t, st, role)
	}
	s.api, s.dispatchAPI = s.processes["order"].url, s.processes["dispatch"].url
	s.addCourier(t, "zhao", 0)
	return s
}

// startRole starts a process with that role, without payment.
func startRole(t testing.TB, st stack, role string) *process {
	t.Helper()
	return startProcess(t, role, roleSettings(st, role))
}

func roleSettings(st stack, role string) map[string]string {
	env := map[string]string{"TAKEOUT_ROLES": role, "TAKEOUT_PAYMENT_GATEWAY": "none", "TAKEOUT_BROKER_URL": st.broker}
	if role == "order" {
		env["TAKEOUT_ROLES"] = "order,compensation"
	}
	if role != "dispatch" {
		env["TAKEOUT_ORDER_DATABASE_URL"] = st.order
	}
	if role != "order" {
		env["TAKEOUT_DISPATCH_DATABASE_URL"] = st.dispatch
	}
	return env
}

// halt stops the process in the middle of what it does, as a hypervisor that moves it, until resume.
func (p *process) halt(t testing.TB) {
	t.Helper()
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGSTOP))
}

func (p *process) resume(t testing.TB) {
	t.Helper()
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGCONT))
}

// awaitRest waits until the outboxes and retry tables of both services are empty.
func (s *system) awaitRest(t testing.TB) {
	t.Helper()
	eventually(t, "nothing is under way", func() error {
		for _, table := range []string{"outbox", "retry"} {
			if n := s.orderRows(t, "SELECT COUNT(*) FROM "+table) + s.dispatchRows(t, "SELECT COUNT(*) FROM "+table); n > 0 {
				return fmt.Errorf("%d rows in %s", n, table)
			}
		}
		return nil
	})
}

func TestProcessesHaltedForLongerThanTheirLeasesAreReplacedAndDoNoHarmWhenTheyGoOn(t *testing.T) {
	t.Parallel()
	s := startRoles(t, production(t), "order", "dispatch", "relay")
	s.placeMany(t, 20, 4)
	s.awaitAllDispatched(t, 20)

	dispatch, relay := s.processes["dispatch"], s.processes["relay"]
	dispatch.halt(t)
	s.placeMany(t, 50, 8)
	eventually(t, "the broker has given the halted process what it consumes", func() error {
		if n := s.orderRows(t, "SELECT COUNT(*) FROM outbox"); n > 0 {
			return fmt.Errorf("%d events wait", n)
		}
		return nil
	})
	placed, inHand := 70, 0
	for inHand == 0 { // until it is halted with events in its hands
		var clients sync.WaitGroup
		clients.Go(func() { s.placeMany(t, 30, 8) })
		eventually(t, "the relay is at work", func() error {
			if s.orderRows(t, "SELECT COUNT(*) FROM outbox WHERE attempts > 0") == 0 {
				return fmt.Errorf("nothing is in its hands")
			}
			return nil
		})
		relay.halt(t)
		clients.Wait()
		placed += 30
		if inHand = s.orderRows(t, "SELECT COUNT(*) FROM outbox WHERE attempts > 0"); inHand == 0 {
			relay.resume(t)
		}
	}

	startRole(t, s.stack, "dispatch")
	startRole(t, s.stack, "relay")
	s.awaitAllDispatched(t, placed)

	relay.resume(t)
	dispatch.resume(t)
	s.placeMany(t, 30, 4)
	s.awaitAllDispatched(t, placed+30)
	s.awaitRest(t)
	s.noFailures(t)
	require.NoError(t, relay.terminate(t))
	require.NoError(t, dispatch.terminate(t))
}

// A machine that hangs or vanishes says no goodbye, and its connections stay. Nobody may wait for the locks of what it
// had begun for longer than the server is told to (eight hours, if it is not told).
func TestOrdersOfAProcessHaltedInATransactionAreDispatchedByAnother(t *testing.T) {
	t.Parallel()
	s := startRoles(t, production(t), "order", "dispatch", "relay")
	dispatch := s.processes["dispatch"]
	release := s.placeThatWaits(t, "o-halted")
	for waits := false; !waits; { // until it is halted inside its transaction
		s.awaitDispatchThatWaits(t)
		dispatch.halt(t)
		if waits = s.waitingDispatches(t) > 0; !waits {
			dispatch.resume(t)
		}
	}
	release()
	startRole(t, s.stack, "dispatch")
	s.awaitAllDispatched(t, 1)

	dispatch.resume(t)
	s.placeMany(t, 30, 4)
	s.awaitAllDispatched(t, 31)
	s.awaitRest(t)
	s.noFailures(t)
	require.NoError(t, dispatch.terminate(t))
}

// placeThatWaits places an order, and keeps a row for it in a transaction that does not end until release. It returns when
// whoever dispatches the order waits for that inside his own.
func (s *system) placeThatWaits(t testing.TB, orderID string) (release func()) {
	t.Helper()
	release = hold(t, s.dispatch, "INSERT INTO platoon (orderId, takeout_userId, state, name, order_money, currency, placed_at, order_version, assigned_at) "+
		"VALUES ('"+orderID+"', 'zhao', 'assigned', 'x', 1, 'CNY', NOW(6), 1, NOW(6))")
	placeAs(t, s, orderID)
	s.awaitDispatchThatWaits(t)
	return release
}

func (s *system) waitingDispatches(t testing.TB) int {
	t.Helper()
	return executing(t, s.dispatch, "INSERT INTO platoon%")
}

func (s *system) awaitDispatchThatWaits(t testing.TB) {
	t.Helper()
	eventually(t, "the order waits for the other transaction", func() error {
		if s.waitingDispatches(t) == 0 {
			return fmt.Errorf("nobody waits")
		}
		return nil
	})
}

func TestProcessesAreStoppedInOrderAgainAndAgainUnderLoad(t *testing.T) {
	t.Parallel()
	s := startRoles(t, production(t), "order", "dispatch", "relay")
	const orders = 400
	load := &crashLoad{api: s.api, stop: make(chan struct{})}
	load.placeThrough(t, orders, 8)
	rounds := 0
	for load.accepted.Load() < orders || rounds < 12 {
		p := s.processes[[]string{"dispatch", "relay", "order"}[rounds%3]]
		require.NoError(t, p.terminate(t), p.name)
		p.start(t)
		rounds++
	}
	load.clients.Wait()
	require.EqualValues(t, orders, load.accepted.Load())
	s.awaitAllDispatched(t, orders)
	s.awaitRest(t)
	s.noFailures(t)
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM history"), "nothing had to be repaired")
}

func TestSecondSignalStopsAtOnceAndLosesNothing(t *testing.T) {
	t.Parallel()
	s := startRoles(t, production(t), "order", "dispatch", "relay")
	dispatch := s.processes["dispatch"]
	release := s.placeThatWaits(t, "o-locked")
	began := time.Now()
	require.NoError(t, dispatch.cmd.Process.Signal(syscall.SIGTERM))
	eventually(t, "it drains", func() error {
		if !strings.Contains(dispatch.log.String(), "a second signal stops at once") {
			return fmt.Errorf("it has not heard the signal")
		}
		return nil
	})
	err := dispatch.terminate(t)
	require.ErrorContains(t, err, "exit status 1", "its caller knows that it was not in order")
	require.Contains(t, dispatch.log.String(), "stopped at once; what was in flight will be delivered again")
	require.Less(t, time.Since(began), 5*time.Second)
	release()
	dispatch.start(t)
	s.awaitAllDispatched(t, 1)
	s.awaitRest(t)
	s.noFailures(t)
}

func TestSignalDuringTheStartEndsTheProgram(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	env := map[string]string{"TAKEOUT_DATA_DIR": dir, "TAKEOUT_PAYMENT_GATEWAY": "none"}
	p := startProcess(t, "embedded", env)
	require.NoError(t, p.terminate(t))
	for i := range 12 {
		p.launch(t)
		time.Sleep(time.Duration(i*10) * time.Millisecond) // each time a little further into the start
		began := time.Now()
		err := p.terminate(t)
		if err != nil { // before it could listen to signals
			require.ErrorContains(t, err, "signal: terminated")
		}
		require.Less(t, time.Since(began), 5*time.Second)
	}
	p.start(t)
	s := &system{api: p.url}
	s.awaitDispatched(t, s.place(t, "x", 1))

	waiting := startless(t, "waiting", map[string]string{
		"TAKEOUT_DATABASE_URL": "mysql://nobody:x@" + freeAddr(t) + "/", "TAKEOUT_BROKER_URL": "sql:", "TAKEOUT_START_TIMEOUT": "1m",
	})
	eventually(t, "it waits for its database", func() error {
		if !strings.Contains(waiting.log.String(), "waiting for a database") {
			return fmt.Errorf("it says %q", waiting.log.String())
		}
		return nil
	})
	began := time.Now()
	require.NoError(t, waiting.terminate(t), "it was asked to stop, and has nothing to finish: %s", waiting.log.tail(500))
	require.Less(t, time.Since(began), 5*time.Second)
}

// startless launches the program as startProcess does, and does not wait for it.
func startless(t testing.TB, name string, env map[string]string) *process {
	t.Helper()
	p := &process{name: name, log: &lockedBuffer{}}
	p.env = slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "TAKEOUT_") })
	settings := map[string]string{"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_DATA_DIR": t.TempDir()}
	maps.Copy(settings, env)
	p.url = "http://" + settings["TAKEOUT_HTTP_ADDR"]
	for key, value := range settings {
		p.env = append(p.env, key+"="+value)
	}
	p.launch(t)
	t.Cleanup(p.kill)
	return p
}

// hold begins a transaction with the statement and keeps it open until release.
func hold(t testing.TB, url, statement string) (release func()) {
	t.Helper()
	tx, err := database(t, url).Begin()
	require.NoError(t, err)
	t.Cleanup(func() { _ = tx.Rollback() })
	_, err = tx.Exec(statement)
	require.NoError(t, err)
	return func() { _ = tx.Rollback() }
}

// What is on the disk at one moment is what a power cut leaves, but for what the disk itself had not written yet.
func TestCopyOfTheFilesAtAnyMomentHoldsEveryOrderThatWasAccepted(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := startProcess(t, "original", map[string]string{"TAKEOUT_DATA_DIR": dir})
	load := &crashLoad{api: p.url, stop: make(chan struct{})}
	load.placeThrough(t, 300, 8)
	eventually(t, "work is under way", func() error {
		if n := load.accepted.Load(); n < 100 {
			return fmt.Errorf("%d accepted", n)
		}
		return nil
	})
	p.halt(t)
	accepted := int(load.accepted.Load()) // the answers that came before the copy
	image := t.TempDir()
	files, err := filepath.Glob(filepath.Join(dir, "*.db*"))
	require.NoError(t, err)
	for _, file := range files {
		if !strings.HasSuffix(file, ".lock") {
			copyFile(t, file, filepath.Join(image, filepath.Base(file)))
		}
	}
	p.resume(t)
	close(load.stop)
	load.clients.Wait()
	p.kill()

	again := startProcess(t, "image", map[string]string{"TAKEOUT_DATA_DIR": image})
	s := &system{stack: stack{order: "sqlite:" + image + "/order.db", dispatch: "sqlite:" + image + "/dispatch.db"}, api: again.url, dispatchAPI: again.url}
	stored := s.orderRows(t, "SELECT COUNT(*) FROM order_info")
	require.GreaterOrEqual(t, stored, accepted)
	require.Less(t, stored, 300, "it was copied in the middle")
	s.awaitAllDispatched(t, stored)
	s.noFailures(t)
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	in, err := os.Open(from)
	require.NoError(t, err)
	defer in.Close()
	out, err := os.Create(to)
	require.NoError(t, err)
	_, err = io.Copy(out, in)
	require.NoError(t, err)
	require.NoError(t, out.Close())
}

func TestOrdersWaitForAnotherProgramThatWritesToTheirFile(t *testing.T) {
	t.Parallel()
	st := embedded(t)
	s := startWith(t, st, func(*service.Config) {})
	other, err := sqldb.Open("other", st.order, logger(t))
	require.NoError(t, err)
	t.Cleanup(func() { _ = other.Close() })
	lock := func() (release func()) {
		tx, err := other.Writer().Begin() // takes SQLite's write lock
		require.NoError(t, err)
		return func() { _ = tx.Rollback() }
	}

	release := lock()
	time.AfterFunc(time.Second, release)
	a := mustSend(t, http.MethodPost, s.api+"/v1/orders", goodOrder)
	require.Equal(t, http.StatusCreated, a.status, "%s", a)

	release = lock()
	began := time.Now()
	refused := mustSend(t, http.MethodPost, s.api+"/v1/orders", goodOrder)
	// Either SQLite's patience or the request's is over first.
	require.Contains(t, []int{http.StatusConflict, http.StatusServiceUnavailable}, refused.status, "%s", refused)
	require.Contains(t, []string{"lock_wait", "database_slow"}, refused.problem(t).Code)
	require.NotEmpty(t, refused.header.Get("Retry-After"))
	require.Less(t, time.Since(began), 8*time.Second, "a request has 5 s")
	release()
	a = mustSend(t, http.MethodPost, s.api+"/v1/orders", goodOrder)
	require.Equal(t, http.StatusCreated, a.status, "%s", a)
	s.awaitAllDispatched(t, 2)
	s.noFailures(t)
}
