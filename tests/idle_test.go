//go:build linux

package tests

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/tests/testenv"
)

const (
	// idleWindow is the time over which an idle program is watched.
	idleWindow = 10 * time.Second
	// idleStatements is the most that a database may get in a second when nothing is to do.
	idleStatements = 10
)

// What an idle program takes of the processor is a row of make bench.
func TestIdleProgramLeavesItsDatabasesAlone(t *testing.T) {
	t.Parallel()
	server := testenv.StartMySQL(t)
	broker := server.URL("idle_broker")
	// The queues are in a database of their own, which all roles read: it is what the embedded broker does too.
	startAll(t, stack{
		name: "mysql", broker: "sql:" + broker, order: server.URL("idle_order"), dispatch: server.URL("idle_dispatch"),
		payment: server.URL("idle_payment"), points: server.URL("idle_points"),
	})
	admin := database(t, broker)
	for _, statement := range []string{"SET GLOBAL log_output = 'TABLE'", "SET GLOBAL general_log = 1"} {
		_, err := admin.Exec(statement)
		require.NoError(t, err)
	}
	within(t, time.Minute, "all databases are idle", func() error {
		_, err := admin.Exec("TRUNCATE mysql.general_log")
		require.NoError(t, err)
		time.Sleep(idleWindow)
		rows, err := admin.Query("SELECT p.db, COUNT(*) FROM mysql.general_log l JOIN " + processlist(t, broker) + " p ON p.id = l.thread_id " +
			"WHERE p.id <> CONNECTION_ID() AND l.command_type IN ('Query', 'Execute') GROUP BY p.db")
		require.NoError(t, err)
		defer rows.Close()
		seen := map[string]float64{}
		for rows.Next() {
			var name string
			var statements float64
			require.NoError(t, rows.Scan(&name, &statements))
			seen[name] = statements / idleWindow.Seconds()
		}
		require.NoError(t, rows.Err())
		t.Log("statements in a second:", seen)
		require.Len(t, seen, 5, "every database is polled")
		for name, rate := range seen {
			if rate > idleStatements {
				return fmt.Errorf("%s gets %.1f statements in a second", name, rate)
			}
		}
		return nil
	})
}

// startAll starts the program with all roles as one process, and lets it dispatch an order, so that everything has begun.
func startAll(t *testing.T, st stack) *process {
	t.Helper()
	env := map[string]string{"TAKEOUT_BROKER_URL": st.broker, "TAKEOUT_ROLES": "all"}
	for service, address := range map[string]string{"order": st.order, "dispatch": st.dispatch, "payment": st.payment, "points": st.points} {
		env["TAKEOUT_"+strings.ToUpper(service)+"_DATABASE_URL"] = address
	}
	p := startProcess(t, "all", env)
	s := &system{stack: st, api: p.url, dispatchAPI: p.url}
	s.addCourier(t, "zhao", 0)
	s.awaitDispatched(t, s.place(t, "Mapo tofu", 2850))
	return p
}
