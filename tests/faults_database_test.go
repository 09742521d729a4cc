package tests

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqldb"
	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/order"
	"takeout/service"
	"takeout/tests/testenv"
	sqlproxy "takeout/verify/proxy"
)

// ordinary returns the URL with a user who may use the databases and is no administrator of the server.
func ordinary(t testing.TB, rawURL, name string) string {
	t.Helper()
	execute(t, rawURL, "CREATE USER IF NOT EXISTS "+name+" IDENTIFIED BY 'secret'")
	u := parse(t, rawURL)
	execute(t, rawURL, "GRANT ALL ON `"+strings.TrimPrefix(u.Path, "/")+"`.* TO "+name)
	u.User = url.UserPassword(name, "secret")
	return u.String()
}

// admin is a connection to a server that stays when nobody else may connect.
func admin(t testing.TB, rawURL string) func(statement string, args ...any) {
	t.Helper()
	conn, err := database(t, rawURL).Conn(context.Background())
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	return func(statement string, args ...any) {
		t.Helper()
		_, err := conn.ExecContext(context.Background(), statement, args...)
		require.NoError(t, err)
	}
}

// disconnect ends all connections of the ordinary user.
func disconnect(t testing.TB, rawURL string) {
	t.Helper()
	var ids sql.NullString
	require.NoError(t, database(t, rawURL).QueryRow("SELECT GROUP_CONCAT(id) FROM "+processlist(t, rawURL)+" WHERE user = 'ordinary'").Scan(&ids))
	for id := range strings.SplitSeq(ids.String, ",") {
		_, _ = database(t, rawURL).Exec("KILL " + id) // it may have gone by itself
	}
}

// awaitTaken waits until an order is accepted.
func (s *system) awaitTaken(t testing.TB) {
	t.Helper()
	eventually(t, "orders are taken", func() error {
		a, err := send(http.MethodPost, s.api+"/v1/orders", goodOrder)
		if err != nil || a.status != http.StatusCreated {
			return fmt.Errorf("%s: %w", a, err)
		}
		return nil
	})
}

// refusesOrders checks that an order is refused clearly and soon.
func (s *system) refusesOrders(t testing.TB) {
	t.Helper()
	began := time.Now()
	a := mustSend(t, http.MethodPost, s.api+"/v1/orders", goodOrder)
	require.Equal(t, http.StatusServiceUnavailable, a.status, "%s", a)
	require.NotEmpty(t, a.header.Get("Retry-After"))
	require.NotEmpty(t, a.problem(t).OrderID)
	require.Less(t, time.Since(began), 8*time.Second, "a request has 5 s")
}

// One server of its own has one trouble after the other.
func TestServerInTroubleRefusesOrdersClearlyAndSpendsNoAttempt(t *testing.T) {
	t.Parallel()
	server := testenv.StartMySQL(t)
	st := stack{order: server.URL("orders"), dispatch: server.URL("dispatch"), broker: testenv.AMQP(t)}
	do := admin(t, st.order)
	do("SET GLOBAL time_zone = '+08:00'")
	direct := st
	st.order, st.dispatch = ordinary(t, st.order, "ordinary"), ordinary(t, st.dispatch, "ordinary")
	s := startWith(t, st, func(cfg *service.Config) { cfg.PaymentGateway = "none" })
	s.stack = direct
	all := func() int { return s.orderRows(t, "SELECT COUNT(*) FROM order_info") }
	healthy := func() {
		t.Helper()
		s.awaitTaken(t)
		s.placeMany(t, 20, 8)
		s.awaitAllDispatched(t, all())
		s.awaitRest(t)
		s.noFailures(t)
	}

	// Its clock shows another zone, which it changes under us.
	before := time.Now().Add(-time.Second)
	early := s.awaitDispatched(t, s.place(t, "x", 1))
	do("SET GLOBAL time_zone = '-11:00'")
	disconnect(t, direct.order)
	healthy()
	late := s.awaitDispatched(t, s.place(t, "x", 1))
	for _, at := range []time.Time{early.PlacedAt, early.Dispatch.AssignedAt, late.PlacedAt, late.Dispatch.AssignedAt} {
		require.WithinRange(t, at, before, time.Now().Add(time.Second))
	}

	// It has become a replica.
	orders := openStore(t, st.order, sqlstore.OpenOrders)
	do("SET GLOBAL read_only = 1")
	s.refusesOrders(t)
	inTx := orders.InTx(t.Context(), func(ctx context.Context, tx app.OrderTx) error { return placeIn(ctx, tx, "read-only") })
	_, leasing := sqlstore.NewFindings(orders.DB()).Lease(t.Context(), "one", time.Hour)
	for _, err := range []error{inTx, leasing} {
		require.Equal(t, domain.Unavailable, domain.KindOf(err))
		require.ErrorContains(t, err, "the server is read-only: the order database is not available")
	}
	eventually(t, "readiness says so", func() error {
		_, _ = send(http.MethodPost, s.api+"/v1/orders", goodOrder)
		if a := mustGet(t, s.api+"/readyz"); !contains(a.body, "cannot do its work: the server is read-only") {
			return fmt.Errorf("%s", a)
		}
		return nil
	})
	doctor := run(t, map[string]string{"TAKEOUT_ORDER_DATABASE_URL": st.order, "TAKEOUT_DISPATCH_DATABASE_URL": st.dispatch, "TAKEOUT_BROKER_URL": st.broker,
		"TAKEOUT_PAYMENT_GATEWAY": "none", "TAKEOUT_HTTP_ADDR": freeAddr(t)}, "doctor", "-o", "table")
	require.Equal(t, 1, doctor.code, "%s", doctor)
	require.Contains(t, doctor.stdout, "server is read-only")
	require.Contains(t, doctor.stdout, "SET GLOBAL read_only = 0 if this is it")
	stored := all()
	do("SET GLOBAL read_only = 0")
	require.Equal(t, stored, all())
	healthy()

	// Nobody can connect any more.
	crowd := ordinary(t, direct.order, "crowd")
	do("SET GLOBAL max_connections = 10")
	taken := occupy(t, direct.order, crowd)
	s.refusesOrders(t)
	taken()
	do("SET GLOBAL max_connections = 500")
	healthy()

	// It dies while it works, and comes back.
	load := &crashLoad{api: s.api, stop: make(chan struct{})}
	load.placeThrough(t, 300, 8)
	eventually(t, "work is under way", func() error {
		if n := load.accepted.Load(); n < 100 {
			return fmt.Errorf("%d accepted", n)
		}
		return nil
	})
	server.Kill()
	s.refusesOrders(t)
	server.Start()
	load.clients.Wait()
	require.EqualValues(t, 300, load.accepted.Load())
	healthy()
}

// occupy takes every connection of the server, also those of the ordinary user, until it is told to let them go.
func occupy(t testing.TB, rawURL, crowd string) (release func()) {
	t.Helper()
	other, err := sqldb.Open("other", crowd, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = other.Close() })
	var taken []*sql.Conn
	eventually(t, "all connections are ours", func() error {
		for {
			conn, err := other.Writer().Conn(context.Background())
			if err != nil {
				break
			}
			taken = append(taken, conn)
		}
		if n := count(t, rawURL, "SELECT COUNT(*) FROM "+processlist(t, rawURL)+" WHERE user = 'ordinary'"); n > 0 {
			disconnect(t, rawURL)
			return fmt.Errorf("the program has %d", n)
		}
		return nil
	})
	return func() {
		for _, conn := range taken {
			_ = conn.Close()
		}
		_ = other.Close()
	}
}

// Somebody restores a copy under the running program.
func TestOrderIsRefusedThatWouldGoIntoAFileThatIsGone(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	s := &system{stack: embedded(t)}
	s.cfg = config(t, s.stack)
	one, err := service.Start(t.Context(), s.cfg, slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelError})))
	require.NoError(t, err)
	s.one, s.api, s.dispatchAPI = one, "http://"+one.Addr(), "http://"+one.Addr()
	t.Cleanup(func() { s.stop(t) })
	s.addCourier(t, "zhao", 0)
	id := s.place(t, "x", 1)
	s.awaitDispatched(t, id)
	file := strings.TrimPrefix(s.order, "sqlite:")
	restored := filepath.Join(t.TempDir(), "copy.db")
	execute(t, s.order, "VACUUM INTO '"+restored+"'")

	for _, suffix := range []string{"", "-wal", "-shm"} {
		require.NoError(t, os.Remove(file+suffix))
	}
	s.refusesOrders(t)
	require.NoError(t, os.Rename(restored, file))
	for range 3 {
		s.refusesOrders(t)
	}
	require.Equal(t, http.StatusServiceUnavailable, mustSend(t, http.MethodPost, s.api+"/v1/orders/"+id+"/cancel", `{}`).status)
	require.Equal(t, 1, strings.Count(log.String(), "deleted or replaced while it is in use"), "once, not for each: %s", log.String())

	s.stop(t)
	s.start(t)
	require.Equal(t, "dispatched", s.get(t, id).Status, "the restored file is left alone")
	s.awaitTaken(t)
}

func TestWhatAServerIsSetToForOthersDoesNotApplyToUs(t *testing.T) {
	t.Parallel()
	server := testenv.StartMySQL(t)
	url := server.URL("orders")
	do := admin(t, url)
	for setting, value := range map[string]string{"autocommit": "0", "unique_checks": "0", "sql_safe_updates": "1", "sql_select_limit": "1", "sql_mode": "''", "completion_type": "CHAIN"} {
		do("SET GLOBAL " + setting + " = " + value)
	}
	s, err := sqlstore.OpenOrders(url, nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	defer s.Close()
	_, err = s.Migrate(t.Context())
	require.NoError(t, err)
	storeOrder(t, s, "o1")
	storeOrder(t, s, "o2")
	require.NoError(t, s.View(t.Context(), func(ctx context.Context, tx app.OrderTx) error {
		both, err := tx.Orders.GetMany(ctx, []order.ID{orderID(t, "o1"), orderID(t, "o2")})
		require.Len(t, both, 2, "no row is left out")
		return err
	}))
	leased, err := sqlstore.NewFindings(s.DB()).Lease(t.Context(), "one", time.Hour)
	require.NoError(t, err)
	require.True(t, leased)
	other, err := sqlstore.OpenOrders(url, nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	defer other.Close()
	leased, err = sqlstore.NewFindings(other.DB()).Lease(t.Context(), "another", time.Hour)
	require.NoError(t, err, "what is done without a transaction is committed")
	require.False(t, leased)
}

func TestChangeThatWaitedForALockTooLongIsMadeAsAWholeOrNotAtAll(t *testing.T) {
	t.Parallel()
	s := startOne(t, production(t))
	off := mustSend(t, http.MethodPatch, s.api+"/v1/couriers/zhao", `{"on_duty":false}`)
	require.Equal(t, http.StatusOK, off.status, "%s", off)
	id := s.place(t, "x", 1)
	s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = ?", id)

	release := hold(t, s.order, "UPDATE order_info SET name = 'held' WHERE orderId = '"+id+"'")
	busy := mustSend(t, http.MethodPost, s.api+"/v1/orders/"+id+"/cancel", `{}`)
	require.Equal(t, http.StatusConflict, busy.status, "%s", busy)
	require.Equal(t, "lock_wait", busy.problem(t).Code)
	require.NotEmpty(t, busy.header.Get("Retry-After"))
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM outbox"), "nothing of the change is stored")

	on := mustSend(t, http.MethodPatch, s.api+"/v1/couriers/zhao", `{"on_duty":true}`)
	require.Equal(t, http.StatusOK, on.status, "%s", on)
	eventually(t, "the consumer waits", func() error {
		if a := mustGet(t, s.api+"/readyz"); !contains(a.body, "pauses: ") {
			return fmt.Errorf("%s", a)
		}
		return nil
	})
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM inbox WHERE consumer = 'order.mark-dispatched'"), "it is not handled by half")
	release()
	s.awaitAllDispatched(t, 1)
	require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM inbox WHERE consumer = 'order.mark-dispatched'"))
	s.awaitRest(t)
	s.noFailures(t)
	require.Empty(t, s.sampleOf(t, "takeout_retries_delayed_total"), "no retry is spent")
}

func TestMigrationThatALongTransactionBlocksGivesUpAndHoldsNobodyUp(t *testing.T) {
	t.Parallel()
	st := production(t)
	env := map[string]string{
		"TAKEOUT_ORDER_DATABASE_URL": st.order, "TAKEOUT_DISPATCH_DATABASE_URL": st.dispatch, "TAKEOUT_BROKER_URL": st.broker,
		"TAKEOUT_DATA_DIR": t.TempDir(), "TAKEOUT_PAYMENT_GATEWAY": "none", "TAKEOUT_LOG_LEVEL": "error",
	}
	require.Equal(t, 0, run(t, env, "migrate").code)
	for _, statement := range []string{ // back to the version before
		"ALTER TABLE order_info DROP COLUMN delivered_at, DROP COLUMN cancelled_at, DROP COLUMN cancel_reason, DROP COLUMN points, DROP KEY order_info_placed_at",
		"DROP TABLE finding, reconcile_report, reconcile_lease",
		"DELETE FROM schema_order WHERE version_id = 2",
	} {
		execute(t, st.order, statement)
	}
	long, err := database(t, st.order).Begin()
	require.NoError(t, err)
	t.Cleanup(func() { _ = long.Rollback() })
	var n int
	require.NoError(t, long.QueryRow("SELECT COUNT(*) FROM order_info").Scan(&n))

	run(t, env, "migrate").complains(t, 1, "order database", "somebody else")
	// Everybody who comes after a migration that waits has to wait too. It must not be waiting any more.
	soon, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	require.NoError(t, database(t, st.order).QueryRowContext(soon, "SELECT COUNT(*) FROM order_info").Scan(&n))
	require.NoError(t, long.Rollback())
	again := run(t, env, "migrate")
	require.Equal(t, 0, again.code, "%s", again)
	require.Contains(t, again.stdout, "ran order/00002_repair.sql")
}

// MySQL commits each statement that changes a table: what a migration did before it was interrupted is there.
func TestMigrationThatWasInterruptedGoesOn(t *testing.T) {
	t.Parallel()
	statements := regexp.MustCompile(`(?m)^(CREATE|ALTER) TABLE \w+\s`)
	files, err := filepath.Glob("../adapters/sqlstore/migrations/*/mysql/*.sql")
	require.NoError(t, err)
	var all []string
	for _, file := range files {
		if service := filepath.Base(filepath.Dir(filepath.Dir(file))); service == "messaging" || service == "order" {
			text, err := os.ReadFile(file)
			require.NoError(t, err)
			all = append(all, statements.FindAllString(string(text), -1)...)
		}
	}
	require.Greater(t, len(all), 10)
	slices.Sort(all)
	for _, statement := range slices.Compact(all) {
		t.Run(strings.TrimSpace(statement), func(t *testing.T) {
			t.Parallel()
			rawURL, between := behindFaults(t)
			store, err := sqlstore.OpenOrders(rawURL, nil, logger(t))
			require.NoError(t, err)
			defer store.Close()
			cut := between.Arm(sqlproxy.Fault{At: sqlproxy.Statement, Match: statement, Do: sqlproxy.DropAfter})
			_, err = store.Migrate(t.Context())
			require.Error(t, err)
			require.Equal(t, 1, cut.Sprung())
			cut.Disarm()
			_, err = store.Migrate(t.Context())
			require.NoError(t, err)
			require.NoError(t, store.CheckSchema(t.Context()))
			storeOrder(t, store, "o1")
		})
	}
}

// A table of millions of rows takes longer than any statement of ours may otherwise.
func TestMigrationMayTakeLongerThanAnyOtherStatement(t *testing.T) {
	t.Parallel()
	db, err := sqldb.Open("order", testenv.MySQL(t), logger(t))
	require.NoError(t, err)
	defer db.Close()
	long := sqldb.Schema{Name: "long", Files: fstest.MapFS{"mysql/00001_long.sql": {Data: []byte("-- +goose Up\nDO SLEEP(11);\n")}}}
	_, err = db.Migrate(t.Context(), long)
	require.NoError(t, err)
	require.NoError(t, db.CheckSchema(t.Context(), long))
}

func TestMigrationTakesNoTableForItsOwnThatSomebodyUses(t *testing.T) {
	t.Parallel()
	rawURL := testenv.MySQL(t)
	execute(t, rawURL, "CREATE TABLE inbox (letter TEXT)")
	execute(t, rawURL, "INSERT INTO inbox VALUES ('dear all')")
	store, err := sqlstore.OpenOrders(rawURL, nil, logger(t))
	require.NoError(t, err)
	defer store.Close()
	for range 2 {
		_, err = store.Migrate(t.Context())
		require.ErrorContains(t, err, "inbox")
		require.ErrorContains(t, err, "already exists")
	}
	require.Equal(t, 1, count(t, rawURL, "SELECT COUNT(*) FROM inbox WHERE letter = 'dear all'"))
}

func TestOrdersThatAFailoverLostAreMadeAgainIfAnybodyKnowsThem(t *testing.T) {
	t.Parallel()
	primary, replica := testenv.StartMySQL(t, "--server-id=1", "--log-bin=log"), testenv.StartMySQL(t, "--server-id=2", "--log-bin=log")
	replica.Follow(primary)
	st := stack{order: primary.URL("orders"), dispatch: testenv.MySQL(t), broker: testenv.AMQP(t)}
	oldHome, direct := st.order, st.broker
	var home, broker *proxy
	st.order, home = through(t, st.order)
	st.broker, broker = through(t, st.broker)
	s := reconciled(t, st)
	s.order, s.broker = oldHome, direct
	newHome := replica.URL("orders")
	dispatched := func(want int) func() error {
		return func() error {
			if n := s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE status = 'dispatched'"); n != want {
				return fmt.Errorf("%d of %d orders are dispatched", n, want)
			}
			return nil
		}
	}
	repaired := func(want int) {
		t.Helper()
		within(t, time.Minute, "the services agree", func() error {
			if r := s.reconcile(t, `{"repair":true}`); !r.Consistent {
				return fmt.Errorf("%+v", r.Findings)
			}
			return dispatched(want)()
		})
	}

	// These reach the replica.
	s.placeMany(t, 20, 4)
	cancelled := s.place(t, "to be cancelled", 1)
	eventually(t, "all are dispatched", dispatched(21))
	eventually(t, "the replica has them", func() error {
		if n := count(t, newHome, "SELECT COUNT(*) FROM order_info WHERE status = 'dispatched'"); n != 21 {
			return fmt.Errorf("it has %d", n)
		}
		return nil
	})
	execute(t, newHome, "STOP REPLICA IO_THREAD")
	// These do not. The dispatch service hears of the first, and nobody of the last.
	s.placeMany(t, 10, 4)
	eventually(t, "all are dispatched", dispatched(31))
	a := mustSend(t, http.MethodPost, s.api+"/v1/orders/"+cancelled+"/cancel", `{}`)
	require.Equal(t, http.StatusOK, a.status, "%s", a)
	s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND state = 'released'", cancelled)
	broker.cut()
	unheard := make([]string, 5)
	for i := range unheard {
		unheard[i] = s.place(t, "unheard", 1)
	}

	primary.Kill()
	execute(t, newHome, "STOP REPLICA")
	execute(t, newHome, "RESET REPLICA ALL")
	home.cut()
	home.lead(t, newHome)
	home.mend()
	broker.mend()
	s.order = newHome
	s.awaitTaken(t)
	taken := s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE name = 'x'")
	repaired(20 + 10 + taken)
	require.Equal(t, "cancelled", s.get(t, cancelled).Status)
	for _, id := range unheard {
		require.Equal(t, http.StatusNotFound, mustGet(t, s.api+"/v1/orders/"+id).status, "nobody knows it")
	}
	require.Equal(t, 20+1+10+taken, s.orderRows(t, "SELECT COUNT(*) FROM order_info"), "nothing else is lost, and nothing invented")

	// The old primary is back, and is taken for the new one.
	primary.Start()
	home.cut()
	home.lead(t, oldHome)
	home.mend()
	s.order = oldHome
	s.awaitTaken(t)
	more := s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE name = 'x'")
	repaired(20 + 10 + len(unheard) + taken + more)
	require.Equal(t, "cancelled", s.get(t, cancelled).Status)
	require.Equal(t, 20+1+10+len(unheard)+taken+more, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon"))
	s.noFailures(t)
}

// behindFaults returns the URL of a database behind a proxy, and the proxy, in which faults can be armed.
func behindFaults(t testing.TB) (rawURL string, between *sqlproxy.Proxy) {
	t.Helper()
	u := parse(t, testenv.MySQL(t))
	between, err := sqlproxy.Listen(u.Host, sqlproxy.MySQL)
	require.NoError(t, err)
	t.Cleanup(func() { _ = between.Close() })
	u.Host = between.Addr()
	return u.String(), between
}

// A node of a Galera cluster that has lost its majority takes no ROLLBACK either. The next BEGIN on such a connection would
// commit the half that was done.
func TestWhatCouldNotBeRolledBackIsNotCommittedByTheNextTransaction(t *testing.T) {
	t.Parallel()
	rawURL, between := behindFaults(t)
	s := openStore(t, rawURL, sqlstore.OpenOrders)

	refused := between.Arm(sqlproxy.Fault{At: sqlproxy.Statement, Match: "ROLLBACK", Do: sqlproxy.Fail, Code: 1047, Count: -1})
	enough := errors.New("enough")
	require.ErrorIs(t, s.InTx(t.Context(), func(ctx context.Context, tx app.OrderTx) error {
		return errors.Join(placeIn(ctx, tx, "half"), enough)
	}), enough)
	require.Positive(t, refused.Sprung())
	storeOrder(t, s, "whole")
	require.Equal(t, 1, count(t, rawURL, "SELECT COUNT(*) FROM order_info"))
	require.Equal(t, 1, count(t, rawURL, "SELECT COUNT(*) FROM outbox"))
}

func TestDatabaseThatMayDoNothingRefusesOrdersAndSpendsNoAttempt(t *testing.T) {
	t.Parallel()
	rawURL, between := behindFaults(t)
	s := startWith(t, stack{order: rawURL, dispatch: testenv.MySQL(t), broker: testenv.AMQP(t)}, func(cfg *service.Config) { cfg.PaymentGateway = "none" })
	id := s.place(t, "x", 1)
	s.awaitDispatched(t, id)
	broker := s.publisher(t)

	for i, code := range []uint16{
		1047, // a node of a Galera cluster without a majority
		3032, // a member that its group has expelled
		3797, // a new primary that has not caught up
		2003, // MySQL Router, which reaches nobody
		9001, // ProxySQL likewise
	} {
		alone := between.Arm(sqlproxy.Fault{At: sqlproxy.Statement, Do: sqlproxy.Fail, Code: code, Count: -1})
		publishAssignment(t, broker, id)
		s.refusesOrders(t)
		eventually(t, "the consumer waits", func() error {
			if a := mustGet(t, s.api+"/readyz"); !contains(a.body, `"consumer order.mark-dispatched":{"ok":false,"detail":"pauses: `) {
				return fmt.Errorf("%d: %s", code, a)
			}
			return nil
		})
		alone.Disarm()
		s.awaitTaken(t)
		s.awaitHandled(t, "order.mark-dispatched", i+2)
	}
	s.noFailures(t)
	require.Empty(t, s.sampleOf(t, "takeout_retries_delayed_total"), "no retry is spent")
}

// The server's own words for a full table and a full disk: a MariaDB that is really full sometimes ends itself.
func TestDatabaseWithoutRoomRefusesOrdersAndGoesOnWhenThereIsRoom(t *testing.T) {
	t.Parallel()
	rawURL, between := behindFaults(t)
	s := startWith(t, stack{order: rawURL, dispatch: testenv.MySQL(t), broker: testenv.AMQP(t)}, func(cfg *service.Config) { cfg.PaymentGateway = "none" })
	s.placeMany(t, 20, 4)
	s.awaitAllDispatched(t, 20)
	for _, code := range []uint16{1114, 1021} {
		full := between.Arm(sqlproxy.Fault{At: sqlproxy.Statement, Match: "INSERT INTO", Do: sqlproxy.Fail, Code: code, Count: -1})
		s.refusesOrders(t)
		require.Positive(t, full.Sprung())
		full.Disarm()
		s.awaitTaken(t)
	}
	stored := s.orderRows(t, "SELECT COUNT(*) FROM order_info")
	require.GreaterOrEqual(t, stored, 22)
	s.awaitAllDispatched(t, stored)
	s.awaitRest(t)
	s.noFailures(t)
}
