//go:build machine

// Scenarios that need more of the machine than make test asks for; make verify-cluster runs them.

package tests

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/service"
	"takeout/tests/testenv"
)

// One cluster has one trouble after the other. The proxy in front of it is led to another node each time, as a load
// balancer would be.
func TestClusterLosesNoMessageWhateverBecomesOfAMinority(t *testing.T) {
	nodes := testenv.StartRabbitMQCluster(t)
	ctl := func(node int, args ...string) {
		t.Helper()
		out, err := nodes[node].Ctl(args...)
		require.NoError(t, err, out)
	}
	ctl(0, "await_online_nodes", "3")
	st := stack{order: testenv.MySQL(t), dispatch: testenv.MySQL(t)}
	var balancer *proxy
	st.broker, balancer = through(t, nodes[0].URL())
	lead := func(node int) {
		balancer.cut()
		balancer.lead(t, nodes[node].URL())
		balancer.mend()
	}
	s := startWith(t, st, func(cfg *service.Config) { cfg.PaymentGateway = "none" })
	placed := 0
	// while places orders, and does something when a third is accepted.
	while := func(what string, do func()) {
		t.Helper()
		const orders = 300
		first := s.orderRows(t, "SELECT COUNT(*) FROM order_info")
		var clients sync.WaitGroup
		clients.Go(func() { s.placeMany(t, orders, 4) })
		eventually(t, "work is under way", func() error {
			if n := s.orderRows(t, "SELECT COUNT(*) FROM order_info"); n < first+orders/3 {
				return fmt.Errorf("%d orders", n)
			}
			return nil
		})
		do()
		began := time.Now()
		clients.Wait()
		placed += orders
		s.awaitAllDispatched(t, placed)
		s.awaitRest(t)
		s.noFailures(t)
		t.Logf("%s: all %d orders are dispatched %.1f s later", what, placed, time.Since(began).Seconds())
	}

	while("the leader of all queues is killed", func() {
		nodes[0].Kill()
		lead(1)
	})
	nodes[0].Start()
	ctl(1, "await_online_nodes", "3")

	while("a majority is killed and started", func() {
		nodes[1].Kill()
		nodes[2].Kill()
		lead(0)
		s.placeMany(t, 50, 4)
		placed += 50
		require.GreaterOrEqual(t, s.orderRows(t, "SELECT COUNT(*) FROM outbox"), 50, "without a majority nothing is confirmed")
		var starting sync.WaitGroup
		starting.Go(nodes[1].Start)
		starting.Go(nodes[2].Start)
		starting.Wait()
	})
	ctl(1, "await_online_nodes", "3")

	lead(2)
	s.awaitAllDispatched(t, placed)
	while("a node is cut off from the others", func() {
		// With another cookie it does not let them in.
		ctl(2, "eval", "[erlang:set_cookie(N, wrong) || N <- ['takeout-test-1@localhost', 'takeout-test-2@localhost']], "+
			"[erlang:disconnect_node(N) || N <- ['takeout-test-1@localhost', 'takeout-test-2@localhost']].")
		balancer.lead(t, nodes[0].URL()) // and nobody breaks the connections to the node that has lost the others
		s.placeMany(t, 50, 4)
		placed += 50
	})
	ctl(2, "eval", "[erlang:set_cookie(N, erlang:get_cookie()) || N <- ['takeout-test-1@localhost', 'takeout-test-2@localhost']].")
	ctl(0, "await_online_nodes", "3")
	lead(2)
	while("it is back", func() {})
}

// databaseCluster is three servers that have the same, one of which is written to through proxies.
type databaseCluster struct {
	urls               [3]string // of the order database
	orders, dispatches *proxy
}

// startOn starts the system on a cluster, with clients that go on placing orders.
func startOn(t testing.TB, nodes [3]*testenv.MySQLServer) (*system, *databaseCluster, *crashLoad) {
	t.Helper()
	c := &databaseCluster{}
	st := stack{broker: testenv.AMQP(t)}
	st.order, c.orders = through(t, nodes[0].URL("orders"))
	st.dispatch, c.dispatches = through(t, nodes[0].URL("dispatch"))
	for i, node := range nodes {
		c.urls[i] = node.Replicated("orders")
	}
	s := startWith(t, st, func(cfg *service.Config) { cfg.PaymentGateway = "none" })
	load := &crashLoad{api: s.api, stop: make(chan struct{})}
	load.placeThrough(t, 1_000_000, 4)
	return s, c, load
}

// lead has new connections go to a node.
func (c *databaseCluster) lead(t testing.TB, node int) {
	c.orders.lead(t, c.urls[node])
	c.dispatches.lead(t, c.urls[node])
}

// move has all connections go to a node.
func (c *databaseCluster) move(t testing.TB, node int) {
	c.lead(t, node)
	for _, balancer := range []*proxy{c.orders, c.dispatches} {
		balancer.cut()
		balancer.mend()
	}
}

// goesOn waits until 300 more orders are accepted.
func (l *crashLoad) goesOn(t testing.TB) {
	t.Helper()
	want := l.accepted.Load() + 300
	within(t, time.Minute, "orders are accepted", func() error {
		if n := l.accepted.Load(); n < want {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
}

// settles ends the load and checks that nothing was lost.
func (l *crashLoad) settles(t testing.TB, s *system) {
	t.Helper()
	close(l.stop)
	l.clients.Wait()
	s.awaitAllDispatched(t, s.orderRows(t, "SELECT COUNT(*) FROM order_info"))
	s.awaitRest(t)
	s.noFailures(t)
	require.EqualValues(t, l.accepted.Load(), s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE orderId LIKE 'load-%'"))
	require.Empty(t, s.sampleOf(t, "takeout_retries_delayed_total"), "no retry is spent")
}

// As with the cluster of brokers. Everything is written to one node, as Galera's conflicts would otherwise cost more than its
// second node brings.
func TestGaleraClusterLosesNothingWhateverBecomesOfItsNodes(t *testing.T) {
	nodes := testenv.StartGalera(t)
	s, c, load := startOn(t, nodes)
	awaitWhole := func() { // in the eyes of all
		t.Helper()
		within(t, 2*time.Minute, "the cluster is whole", func() error {
			views := map[string]bool{}
			for _, url := range c.urls {
				view := ""
				for _, status := range []string{"wsrep_local_state_comment", "wsrep_cluster_size", "wsrep_cluster_conf_id"} {
					var name, value string
					if err := database(t, url).QueryRow("SHOW STATUS LIKE '"+status+"'").Scan(&name, &value); err != nil {
						return err
					}
					view += value + " "
				}
				views[view] = true
			}
			for view := range views {
				if len(views) > 1 || !strings.HasPrefix(view, "Synced 3 ") {
					return fmt.Errorf("%v", views)
				}
			}
			return nil
		})
	}
	awaitWhole()

	load.goesOn(t)
	nodes[0].Kill()
	c.lead(t, 1)
	load.goesOn(t)
	nodes[0].Start()
	awaitWhole()
	load.goesOn(t)

	nodes[1].Freeze() // and the others wait for it, until they go on without
	c.move(t, 2)
	load.goesOn(t)
	nodes[1].Thaw()
	awaitWhole()
	load.goesOn(t)

	isolate := func(on int) {
		execute(t, c.urls[2], fmt.Sprintf("SET GLOBAL wsrep_provider_options = 'gmcast.isolate=%d'", on))
	}
	isolate(1)
	c.lead(t, 0) // and nobody breaks the connections to the node that has lost the others
	load.goesOn(t)
	isolate(0)
	awaitWhole()
	c.move(t, 2)
	load.goesOn(t)

	nodes[0].Kill()
	nodes[1].Kill()
	eventually(t, "a minority takes nothing", func() error {
		if a, err := send(http.MethodPost, s.api+"/v1/orders", goodOrder); err != nil || a.status != http.StatusServiceUnavailable {
			return fmt.Errorf("%s: %w", a, err)
		}
		return nil
	})
	var starting sync.WaitGroup
	starting.Go(nodes[0].Start)
	starting.Go(nodes[1].Start)
	starting.Wait()
	awaitWhole()
	load.goesOn(t)
	load.settles(t, s)
}

func TestReplicationGroupLosesNothingWhateverBecomesOfItsPrimary(t *testing.T) {
	members := testenv.StartGroup(t)
	s, c, load := startOn(t, members)
	// awaitGroup waits until as many members are online in the eyes of each that is asked, and returns the primary.
	awaitGroup := func(online int, asked ...int) (primary int) {
		t.Helper()
		within(t, 2*time.Minute, "the group is one", func() error {
			for _, member := range asked {
				var n, port int
				err := database(t, c.urls[member]).QueryRow("SELECT COUNT(*), COALESCE(MAX(IF(member_role = 'PRIMARY', member_port, 0)), 0) "+
					"FROM performance_schema.replication_group_members WHERE member_state = 'ONLINE'").Scan(&n, &port)
				if err != nil || n != online {
					return fmt.Errorf("%d sees %d online: %w", member, n, err)
				}
				primary = slices.IndexFunc(c.urls[:], func(url string) bool { return parse(t, url).Port() == fmt.Sprint(port) })
			}
			if primary < 0 {
				return errors.New("there is no primary")
			}
			return nil
		})
		return primary
	}
	require.Equal(t, 0, awaitGroup(3, 0, 1, 2))

	load.goesOn(t)
	members[0].Kill()
	second := awaitGroup(2, 1, 2)
	c.lead(t, second)
	load.goesOn(t)
	members[0].Start()
	awaitGroup(3, 0, 1, 2)
	load.goesOn(t)

	// The group expels a primary that stands still. When it goes on, it still takes what it is sent, and must not keep it.
	members[second].Freeze()
	third := awaitGroup(2, slices.DeleteFunc([]int{0, 1, 2}, func(member int) bool { return member == second })...)
	c.lead(t, third) // and nobody breaks the connections to the one that was expelled
	members[second].Thaw()
	load.goesOn(t)
	load.settles(t, s)
}

// failSyncs starts the embedded stack, lets its disk fail once ten orders are dispatched, and returns what the next order is
// answered then. Nobody may have the databases open at that time: it would keep SQLite from recovering them at the next start.
func failSyncs(t *testing.T) (p *process, s *system, refused answer, mend func()) {
	t.Helper()
	strace, err := exec.LookPath("strace")
	require.NoError(t, err, "this test needs strace and the right to trace; on Debian and Ubuntu install strace")
	dir := t.TempDir()
	p = startProcess(t, "embedded", map[string]string{"TAKEOUT_DATA_DIR": dir, "TAKEOUT_PAYMENT_GATEWAY": "none"})
	s = &system{stack: stack{order: "sqlite:" + dir + "/order.db", dispatch: "sqlite:" + dir + "/dispatch.db"}, api: p.url, dispatchAPI: p.url}
	for range 10 {
		s.awaitDispatched(t, s.place(t, "x", 1))
	}
	fail := exec.Command(strace, "-f", "-qq", "-o", os.DevNull, "-e", "inject=fsync,fdatasync:error=EIO", "-p", fmt.Sprint(p.cmd.Process.Pid))
	require.NoError(t, fail.Start())
	eventually(t, "the disk fails", func() error {
		if refused = mustSend(t, http.MethodPost, s.api+"/v1/orders", goodOrder); refused.status == http.StatusCreated {
			return fmt.Errorf("%s", refused)
		}
		return nil
	})
	require.Equal(t, http.StatusServiceUnavailable, refused.status, "%s", refused)
	require.Equal(t, "outcome_unknown", refused.problem(t).Code, "it is in the log, although not on the disk")
	require.NotEmpty(t, refused.header.Get("Retry-After"))
	return p, s, refused, func() {
		require.NoError(t, fail.Process.Signal(syscall.SIGTERM))
		_ = fail.Wait()
	}
}

func TestOrderThatCouldNotBeSyncedIsThereAfterACrashAndWasNotRefused(t *testing.T) {
	p, s, refused, mend := failSyncs(t)
	p.kill()
	mend()
	p.start(t)
	s.api, s.dispatchAPI = p.url, p.url
	s.awaitDispatched(t, refused.problem(t).OrderID)
	require.Equal(t, "ok", integrity(t, s.order))
}

func TestOrderThatCouldNotBeSyncedIsNotAccepted(t *testing.T) {
	_, s, refused, mend := failSyncs(t)
	mend()

	s.awaitTaken(t)
	require.Equal(t, http.StatusNotFound, mustGet(t, s.api+"/v1/orders/"+refused.problem(t).OrderID).status)
	s.awaitAllDispatched(t, s.orderRows(t, "SELECT COUNT(*) FROM order_info"))
	s.noFailures(t)
	require.Equal(t, "ok", integrity(t, s.order))
}

func TestLeasesHoldWhenTheDatabasesClockIsAnHourOff(t *testing.T) {
	found, _ := filepath.Glob("/usr/lib/*/faketime/libfaketime.so.1")
	require.NotEmpty(t, found, "this test needs libfaketime; on Debian and Ubuntu install faketime")
	for _, shift := range []string{"+1h", "-1h"} {
		t.Run(shift, func(t *testing.T) {
			t.Setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
			t.Setenv("FAKETIME", shift)
			t.Setenv("LD_PRELOAD", found[0])
			server := testenv.StartMySQL(t)
			require.NoError(t, os.Unsetenv("LD_PRELOAD"))
			st := stack{order: server.URL("orders"), dispatch: server.URL("dispatch"), broker: testenv.AMQP(t)}
			off := count(t, st.order, "SELECT CAST(UNIX_TIMESTAMP() AS SIGNED)") - int(time.Now().Unix())
			require.InDelta(t, 3600, max(off, -off), 60, "this test needs a MySQL or MariaDB that is installed on this machine")

			s := startWithDelays(t, st, 2*time.Second)
			early := publishAssignment(t, s.publisher(t), "o-early")
			s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM retry WHERE uuid = ?", early)
			placeAs(t, s, "o-early")
			s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM inbox WHERE event_id = ?", early)
			s.placeMany(t, 100, 8)
			s.awaitAllDispatched(t, 101)
			s.awaitRest(t)
			s.noFailures(t)
		})
	}
}
