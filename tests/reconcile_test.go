package tests

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqldb"
	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/app/reconcile"
	"takeout/ports/httpapi"
	"takeout/service"
	"takeout/tests/testenv"
)

// reconciled starts a system that is compared only when a test says so, with a grace of two seconds.
func reconciled(t testing.TB, st stack, change ...func(*service.Config)) *system {
	t.Helper()
	return startWith(t, st, func(cfg *service.Config) {
		cfg.ReconcileEvery, cfg.ReconcileGrace, cfg.PaymentGateway = 0, 2*time.Second, "none"
		for _, c := range change {
			c(cfg)
		}
	})
}

// reconcile runs the reconciliation with that request, and returns its report.
func (s *system) reconcile(t testing.TB, request string) reconcile.Report {
	t.Helper()
	a := mustSend(t, http.MethodPost, s.api+"/v1/reconciliation", request)
	require.Equal(t, http.StatusOK, a.status, "%s", a)
	var r reconcile.Report
	require.NoError(t, json.Unmarshal(a.body, &r), "%s", a)
	require.Empty(t, r.Errors)
	return r
}

func (s *system) lastReport(t testing.TB) httpapi.ReconciliationBody {
	t.Helper()
	a := mustGet(t, s.api+"/v1/reconciliation")
	var shown httpapi.ReconciliationBody
	require.NoError(t, json.Unmarshal(a.body, &shown), "%s", a)
	return shown
}

// awaitReconciled repairs until nothing is open.
func (s *system) awaitReconciled(t testing.TB) reconcile.Report {
	t.Helper()
	var r reconcile.Report
	eventually(t, "the services agree", func() error {
		if r = s.reconcile(t, `{"repair":true}`); !r.Consistent {
			return fmt.Errorf("%v are open: %+v", r.Totals, r.Findings)
		}
		return nil
	})
	return r
}

var writers sync.Map // of *sqldb.DB by URL

// alter changes a database past the program, as a person does.
func alter(t testing.TB, url, statement string, args ...any) int64 {
	t.Helper()
	db, ok := writers.Load(url)
	if !ok {
		opened, err := sqldb.Open("test", url, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		writers.Store(url, opened)
		t.Cleanup(func() {
			writers.Delete(url)
			_ = opened.Close()
		})
		db = opened
	}
	var n int64
	eventually(t, statement, func() error {
		result, err := db.(*sqldb.DB).Writer().ExecContext(t.Context(), statement, args...)
		if err != nil {
			return err
		}
		n, err = result.RowsAffected()
		return err
	})
	return n
}

// old places an order, waits for its courier, and makes it one of an hour ago.
func (s *system) old(t testing.TB, name string) string {
	t.Helper()
	id := s.place(t, name, 2850)
	s.awaitDispatched(t, id)
	s.awaitSent(t, s.order, s.dispatch)
	s.age(t, id)
	return id
}

// later has one more order dispatched: the services have then come past all that were placed before. What they said of those
// is deleted from their outboxes a little later than it is heard, and counts as on its way until then.
func (s *system) later(t testing.TB) {
	t.Helper()
	s.awaitDispatched(t, s.place(t, "later", 100))
	s.awaitSent(t, s.order, s.dispatch)
}

func (s *system) age(t testing.TB, id string) {
	t.Helper()
	at := time.Now().UTC().Add(-time.Hour).Truncate(time.Microsecond)
	require.EqualValues(t, 1, alter(t, s.order, "UPDATE order_info SET placed_at = ?, assigned_at = ? WHERE orderId = ?", at, at, id))
	require.EqualValues(t, 1, alter(t, s.dispatch, "UPDATE platoon SET placed_at = ?, assigned_at = ? WHERE orderId = ?", at, at, id))
}

// drift is a way in which the two tables can come to differ.
type drift struct {
	name    string
	table   func(*system) string // database URL
	change  string               // takes the order's id
	class   string
	ended   bool   // the order was cancelled before
	person  bool   // nobody else may repair it
	becomes string // the order's status after the repair
}

func orderTable(s *system) string    { return s.order }
func dispatchTable(s *system) string { return s.dispatch }

var drifts = []drift{
	{name: "dispatch deleted", table: dispatchTable, change: "DELETE FROM platoon WHERE orderId = ?", class: reconcile.MissingDispatch, becomes: "dispatched"},
	{name: "order deleted", table: orderTable, change: "DELETE FROM order_info WHERE orderId = ?", class: reconcile.OrphanDispatch, becomes: "dispatched"},
	{name: "name at the order", table: orderTable, change: "UPDATE order_info SET name = 'x' WHERE orderId = ?", class: reconcile.FieldMismatch, becomes: "dispatched"},
	{name: "name at the dispatch", table: dispatchTable, change: "UPDATE platoon SET name = 'x' WHERE orderId = ?", class: reconcile.FieldMismatch, becomes: "dispatched"},
	{name: "time at the dispatch", table: dispatchTable, change: "UPDATE platoon SET placed_at = (SELECT at FROM (SELECT MIN(placed_at) AS at FROM platoon) first) WHERE orderId = ?", class: reconcile.FieldMismatch, becomes: "dispatched"},
	{name: "courier at the order", table: orderTable, change: "UPDATE order_info SET courier_id = 'x' WHERE orderId = ?", class: reconcile.FieldMismatch, becomes: "dispatched"},
	{name: "courier at the dispatch", table: dispatchTable, change: "UPDATE platoon SET takeout_userId = 'x' WHERE orderId = ?", class: reconcile.FieldMismatch, becomes: "dispatched"},
	{name: "courier unheard of", table: orderTable, change: "UPDATE order_info SET status = 'placed' WHERE orderId = ?", class: reconcile.FieldMismatch, becomes: "dispatched"},
	{name: "delivery unheard of", table: dispatchTable, change: "UPDATE platoon SET state = 'delivered', delivered_at = assigned_at WHERE orderId = ?", class: reconcile.FieldMismatch, becomes: "delivered"},
	{name: "cancel unheard of", table: orderTable, change: "UPDATE order_info SET status = 'cancelled', cancelled_at = placed_at WHERE orderId = ?", class: reconcile.CancelledButActive, becomes: "cancelled"},
	{name: "cancel and name unheard of", table: orderTable, change: "UPDATE order_info SET status = 'cancelled', cancelled_at = placed_at, name = 'x' WHERE orderId = ?", class: reconcile.CancelledButActive, becomes: "cancelled"},
	{name: "name at the end", table: dispatchTable, ended: true, change: "UPDATE platoon SET name = 'x' WHERE orderId = ?", class: reconcile.FieldMismatch, becomes: "cancelled"},
	{name: "cancel lost", table: dispatchTable, change: "UPDATE platoon SET state = 'released', released_at = assigned_at WHERE orderId = ?", class: reconcile.FieldMismatch, becomes: "cancelled"},
	{name: "cancel without a time", table: orderTable, change: "UPDATE order_info SET status = 'cancelled' WHERE orderId = ?", class: reconcile.CancelledButActive, becomes: "cancelled"},
	{name: "cancel lost without a time", table: dispatchTable, change: "UPDATE platoon SET state = 'released' WHERE orderId = ?", class: reconcile.FieldMismatch, becomes: "cancelled"},
	{name: "delivery without a time", table: dispatchTable, change: "UPDATE platoon SET state = 'delivered' WHERE orderId = ?", class: reconcile.FieldMismatch, becomes: "delivered"},
	{name: "amount at the order", table: orderTable, change: "UPDATE order_info SET order_money = 1 WHERE orderId = ?", class: reconcile.AmountMismatch, person: true},
	{name: "amount at the dispatch", table: dispatchTable, change: "UPDATE platoon SET order_money = 1 WHERE orderId = ?", class: reconcile.AmountMismatch, person: true},
	{name: "currency at the dispatch", table: dispatchTable, change: "UPDATE platoon SET currency = 'EUR' WHERE orderId = ?", class: reconcile.AmountMismatch, person: true},
	{name: "delivered and not assigned", table: orderTable, change: "UPDATE order_info SET status = 'delivered', delivered_at = assigned_at WHERE orderId = ?", class: reconcile.FieldMismatch, person: true},
}

func TestEveryKindOfDriftIsFoundAndRepairedUnlessAPersonMustDecide(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := reconciled(t, st)
		ids := map[string]string{}
		for _, d := range drifts {
			ids[d.name] = s.old(t, d.name)
			if d.ended {
				alter(t, s.order, "UPDATE order_info SET status = 'cancelled', cancelled_at = placed_at WHERE orderId = ?", ids[d.name])
				alter(t, s.dispatch, "UPDATE platoon SET state = 'released', released_at = assigned_at WHERE orderId = ?", ids[d.name])
			}
		}
		// The dispatch service has come past all of them.
		s.later(t)
		require.Empty(t, s.reconcile(t, `{}`).Findings)
		for _, d := range drifts {
			require.EqualValues(t, 1, alter(t, d.table(s), d.change, ids[d.name]), d.name)
		}
		money := func() (sums [2]int) {
			return [2]int{s.orderRows(t, "SELECT SUM(order_money) FROM order_info"), s.dispatchRows(t, "SELECT SUM(order_money) FROM platoon")}
		}

		found := s.reconcile(t, `{"repair":false}`)
		classes := map[string]string{}
		for _, f := range found.Findings {
			require.NotContains(t, classes, f.OrderID)
			classes[f.OrderID] = f.Class
			require.NotEmpty(t, f.Evidence, "%+v", f)
		}
		for _, d := range drifts {
			require.Equal(t, d.class, classes[ids[d.name]], d.name)
		}
		require.Len(t, found.Findings, len(drifts))
		require.Zero(t, found.Repaired)
		require.False(t, found.Consistent)

		persons := 0
		for _, d := range drifts {
			if d.person {
				persons++
			}
		}
		eventually(t, "everything is repaired that a machine may repair", func() error {
			r := s.reconcile(t, `{"repair":true}`)
			if r.Person != persons || r.Waiting > 0 {
				return fmt.Errorf("%d wait, %d need a person: %+v", r.Waiting, r.Person, r.Findings)
			}
			return nil
		})
		wrong := money()
		for _, d := range drifts {
			id := ids[d.name]
			if d.person {
				continue
			}
			o, dispatch := s.get(t, id), s.dispatchOf(t, id)
			require.Equal(t, d.becomes, o.Status, d.name)
			require.Equal(t, o.Name, dispatch.Name, d.name)
			require.Equal(t, o.Amount, dispatch.Amount, d.name)
			require.True(t, o.PlacedAt.Equal(dispatch.PlacedAt), d.name)
			if o.Status == "dispatched" || o.Status == "delivered" {
				require.Equal(t, o.Dispatch.CourierID, *dispatch.CourierID, d.name)
			}
			require.Positive(t, s.orderRows(t, "SELECT COUNT(*) FROM history WHERE order_id = ?", id)+
				s.dispatchRows(t, "SELECT COUNT(*) FROM history WHERE order_id = ?", id), "%s: the repair is recorded", d.name)
		}
		require.Equal(t, wrong, money(), "amounts are never touched")
		require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE name = 'cancel lost without a time' AND cancelled_at IS NULL"))
		require.Equal(t, 1, s.orderRows(t, "SELECT order_money FROM order_info WHERE orderId = ?", ids["amount at the order"]))
		require.Equal(t, 1, s.dispatchRows(t, "SELECT order_money FROM platoon WHERE orderId = ?", ids["amount at the dispatch"]))
		s.noFailures(t)

		shown := s.lastReport(t)
		require.Len(t, shown.Open, persons)
		require.Equal(t, persons, shown.Report.Person)
		require.Contains(t, string(mustGet(t, s.api+"/readyz").body), "need a person")
	})
}

func TestRowThatBreaksARuleIsAPersonsAndIsAnnouncedWhenItIsCorrected(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := reconciled(t, st)
		unversioned, nameless, orphan, delivered := s.old(t, "unversioned"), s.old(t, "nameless"), s.old(t, "orphan"), s.old(t, "delivered")
		s.later(t)
		alter(t, s.order, "UPDATE order_info SET status = 'cancelled', version = 0 WHERE orderId = ?", unversioned)
		alter(t, s.order, "UPDATE order_info SET status = 'cancelled', name = '' WHERE orderId = ?", nameless)
		alter(t, s.order, "DELETE FROM order_info WHERE orderId = ?", orphan)
		alter(t, s.dispatch, "UPDATE platoon SET name = '' WHERE orderId = ?", orphan)
		alter(t, s.order, "UPDATE order_info SET status = 'delivered', courier_id = NULL WHERE orderId = ?", delivered)
		alter(t, s.dispatch, "DELETE FROM platoon WHERE orderId = ?", delivered)
		for _, request := range []string{`{"repair":true}`, `{"repair":false}`, `{"repair":true}`} {
			r := s.reconcile(t, request)
			says := map[string]string{}
			for _, f := range r.Findings {
				says[f.OrderID] = f.Repair
			}
			require.Contains(t, says[unversioned], "version must be")
			require.Contains(t, says[nameless], "name must not be empty")
			require.Contains(t, says[orphan], "name must not be empty")
			require.Contains(t, says[delivered], "order.placed cannot be announced")
			require.Equal(t, 4, r.Person, "%+v", r.Findings)
			require.Zero(t, r.Repaired)
		}
		s.noFailures(t)
		require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM history WHERE step = 'announced_again'"))

		alter(t, s.order, "UPDATE order_info SET version = 3 WHERE orderId = ?", unversioned)
		alter(t, s.order, "UPDATE order_info SET name = 'nameless' WHERE orderId = ?", nameless)
		alter(t, s.dispatch, "UPDATE platoon SET name = 'orphan' WHERE orderId = ?", orphan)
		alter(t, s.order, "UPDATE order_info SET courier_id = 'zhao' WHERE orderId = ?", delivered) // that it does not say when is no contradiction
		s.awaitReconciled(t)
		s.noFailures(t)
		for id, state := range map[string]string{unversioned: "released", nameless: "released", orphan: "assigned", delivered: "delivered"} {
			require.Equal(t, 1, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND state = ?", id, state), state)
		}
	})
}

func TestNothingIsFoundWhileOrdersFlow(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := reconciled(t, st, func(cfg *service.Config) { cfg.ReconcileGrace = 3 * time.Second })
		var load sync.WaitGroup
		deadline := time.Now().Add(7 * time.Second)
		for worker := range 4 {
			load.Go(func() {
				for i := 0; time.Now().Before(deadline); i++ {
					a, err := send(http.MethodPost, s.api+"/v1/orders", `{"name":"x","amount":100}`)
					if err != nil || a.status != http.StatusCreated {
						t.Errorf("%v %s", err, a)
						return
					}
					if i%5 == worker {
						_, _ = send(http.MethodPost, s.api+"/v1/orders/"+a.order(t).OrderID+"/cancel", `{}`)
					}
				}
			})
		}
		compared := int64(0)
		for time.Now().Before(deadline) {
			r := s.reconcile(t, `{"repair":true}`)
			require.Empty(t, r.Findings)
			require.False(t, r.To.After(r.StartedAt.Add(-3*time.Second)), "what is younger than the grace is not compared")
			compared += r.Compared.Orders
		}
		load.Wait()
		require.Positive(t, compared)
		require.Zero(t, s.awaitReconciled(t).Repaired)
	})
}

func TestWhatWasComparedCostsNothingUntilItIsChanged(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := reconciled(t, st)
		id := s.old(t, "x")
		require.EqualValues(t, 1, s.reconcile(t, `{}`).Compared.Orders)
		again := s.reconcile(t, `{}`)
		require.Zero(t, again.Compared.Buckets, "%+v", again)
		require.Zero(t, again.Compared.Rows)

		alter(t, s.order, "UPDATE order_info SET version = 5 WHERE orderId = ?", id)
		require.Zero(t, s.reconcile(t, `{}`).Compared.Buckets, "versions are not compared")

		alter(t, s.order, "UPDATE order_info SET name = 'y' WHERE orderId = ?", id)
		found := s.reconcile(t, `{}`)
		require.EqualValues(t, 1, found.Compared.Buckets)
		require.Len(t, found.Findings, 1)
		require.Equal(t, reconcile.FieldMismatch, found.Findings[0].Class)
		require.Zero(t, s.reconcile(t, `{}`).Compared.Buckets, "the finding is looked at again, and not its minute")

		require.EqualValues(t, 1, s.reconcile(t, `{"full":true}`).Compared.Buckets)
		alter(t, s.dispatch, "DELETE FROM platoon WHERE orderId = ?", id)
		s.reconcile(t, `{}`)
		s.awaitReconciled(t)
		require.Equal(t, "y", s.dispatchOf(t, id).Name)
	})
}

func TestDatabaseThatDoesNotLetUsMakeTriggersIsComparedWhole(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := reconciled(t, st)
		id := s.old(t, "x")
		s.reconcile(t, `{}`)
		for _, trigger := range triggers(t, database(t, s.order), strings.HasPrefix(s.order, "sqlite:")) {
			alter(t, s.order, "DROP TRIGGER "+trigger)
		}
		alter(t, s.order, "UPDATE order_info SET name = 'y' WHERE orderId = ?", id)
		require.Len(t, s.reconcile(t, `{}`).Findings, 1)
	})
}

// triggers returns the names of the order table's triggers.
func triggers(t testing.TB, db *sql.DB, sqlite bool) []string {
	t.Helper()
	if sqlite {
		return texts(t, db, "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'order_info'")
	}
	return texts(t, db, "SELECT TRIGGER_NAME FROM information_schema.TRIGGERS WHERE EVENT_OBJECT_TABLE = 'order_info' AND TRIGGER_SCHEMA = DATABASE()")
}

func TestTriggersOfAnEarlierVersionAreReplaced(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		db, sqlite := s.DB().Writer(), s.DB().Engine == "sqlite"
		want := triggers(t, db, sqlite)
		require.Len(t, want, 3)
		for _, statement := range []string{
			"DROP TRIGGER " + want[2],
			"CREATE TRIGGER order_info_noted_update AFTER UPDATE ON order_info FOR EACH ROW BEGIN DELETE FROM reconcile_dirty; END",
		} {
			_, err := db.Exec(statement)
			require.NoError(t, err)
		}
		watched, err := sqlstore.NewBook(s.DB()).Watched(t.Context())
		require.NoError(t, err)
		require.False(t, watched)

		_, err = s.Migrate(t.Context())
		require.NoError(t, err)
		require.Equal(t, want, triggers(t, db, sqlite))
		watched, err = sqlstore.NewBook(s.DB()).Watched(t.Context())
		require.NoError(t, err)
		require.True(t, watched)
	})
}

func TestOrdersThatARestoredDatabaseLacksAreMadeAgain(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := reconciled(t, st)
		kept := s.old(t, "kept")
		s.reconcile(t, `{}`)
		marks := s.orderRows(t, "SELECT MAX(pass) FROM reconcile_mark")

		lost := map[string]string{s.old(t, "dispatched"): "dispatched", s.old(t, "delivered"): "delivered", s.old(t, "cancelled"): "cancelled"}
		for id, status := range lost {
			switch status {
			case "delivered":
				alter(t, s.dispatch, "UPDATE platoon SET state = 'delivered', delivered_at = assigned_at WHERE orderId = ?", id)
				alter(t, s.order, "UPDATE order_info SET status = 'delivered', delivered_at = assigned_at WHERE orderId = ?", id)
			case "cancelled":
				alter(t, s.dispatch, "UPDATE platoon SET state = 'released', released_at = assigned_at WHERE orderId = ?", id)
				alter(t, s.order, "UPDATE order_info SET status = 'cancelled', cancelled_at = assigned_at WHERE orderId = ?", id)
			}
		}
		// The kept one is delivered after the copy was made.
		alter(t, s.dispatch, "UPDATE platoon SET state = 'delivered', delivered_at = assigned_at WHERE orderId = ?", kept)
		alter(t, s.order, "UPDATE order_info SET status = 'delivered', delivered_at = assigned_at WHERE orderId = ?", kept)
		require.True(t, s.reconcile(t, `{}`).Consistent)

		alter(t, s.dispatch, "UPDATE platoon SET order_version = 7 WHERE orderId <> ?", kept) // as after several corrections

		// The order database as it was when the copy was made.
		for id := range lost {
			alter(t, s.order, "DELETE FROM order_info WHERE orderId = ?", id)
		}
		alter(t, s.order, "UPDATE order_info SET status = 'dispatched', delivered_at = NULL WHERE orderId = ?", kept)
		alter(t, s.order, "UPDATE reconcile_mark SET pass = ?", marks)
		alter(t, s.order, "DELETE FROM reconcile_dirty")

		s.awaitReconciled(t)
		lost[kept] = "delivered"
		for id, status := range lost {
			require.Equal(t, status, s.get(t, id).Status)
			if id != kept {
				require.GreaterOrEqual(t, s.get(t, id).Version, int64(7), "it does not fall behind what was announced of it")
			}
		}
		require.Equal(t, 3, s.orderRows(t, "SELECT COUNT(*) FROM history WHERE step = 'recreated'"))
	})
}

func TestEventOnItsWayIsNoDifference(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := reconciled(t, st)
		ids := []string{s.old(t, "outbox"), s.old(t, "retry"), s.old(t, "failure")}
		s.later(t)
		now := time.Now().UTC()
		for _, id := range ids {
			alter(t, s.dispatch, "UPDATE platoon SET name = 'x' WHERE orderId = ?", id)
		}
		alter(t, s.order, "INSERT INTO outbox (uuid, payload, created_at, available_at, order_id) VALUES ('x', '', ?, ?, ?)",
			now, now.Add(time.Hour).UnixMicro(), ids[0])
		alter(t, s.dispatch, "INSERT INTO retry (queue, uuid, fingerprint, tier, order_id, payload, error_text, created_at, available_at) "+
			"VALUES ('none', 'x', 'x', 1, ?, '', '', ?, ?)", ids[1], now, now.Add(time.Hour).UnixMicro())
		alter(t, s.dispatch, "INSERT INTO failure (consumer, fingerprint, message_id, order_id, error_class, error_code, error_text, attempts, headers, "+
			"payload_size, state, first_failed_at, last_failed_at) VALUES ('none', 'x', 'x', ?, '', '', '', 1, '', 0, 'open', ?, ?)", ids[2], now, now)
		r := s.reconcile(t, `{"repair":true}`)
		require.Empty(t, r.Findings)
		require.Equal(t, 3, r.InFlight)
		require.Equal(t, 1, r.Failures)

		// What has been on its way for too long is found, and what arrived without effect too.
		alter(t, s.order, "UPDATE outbox SET created_at = ?", now.Add(-2*time.Hour))
		alter(t, s.dispatch, "UPDATE retry SET available_at = ? WHERE queue = 'none'", now.Add(-2*time.Hour).UnixMicro())
		alter(t, s.dispatch, "UPDATE failure SET state = 'discarded'")
		classes := map[string]string{}
		r = s.reconcile(t, `{}`)
		for _, f := range r.Findings {
			classes[f.OrderID] = f.Class
			if f.Class != reconcile.FieldMismatch {
				require.Equal(t, reconcile.StatePerson, f.State)
				require.Contains(t, f.Repair, "not lost: see that")
			}
		}
		require.Equal(t, 2, r.Person)
		require.Equal(t, map[string]string{ids[0]: reconcile.StuckOutbox, ids[1]: reconcile.StuckRetry, ids[2]: reconcile.FieldMismatch}, classes)
		alter(t, s.order, "DELETE FROM outbox")
		alter(t, s.dispatch, "DELETE FROM retry")
		s.awaitReconciled(t)
	})
}

// fails keeps a message about the order, as a consumer that has given it up.
func (s *system) fails(t testing.TB, database, consumer, id string) {
	t.Helper()
	now, fingerprint := time.Now().UTC(), sha256.Sum256([]byte(id))
	alter(t, database, "INSERT INTO failure (consumer, fingerprint, message_id, order_id, error_class, error_code, error_text, attempts, headers, "+
		"payload_size, state, first_failed_at, last_failed_at) VALUES (?, ?, 'x', ?, '', '', '', 1, '', 0, 'open', ?, ?)", consumer, fingerprint[:], id, now, now)
}

func TestMessageThatWaitsForAPersonHidesNoDifferenceThatItCannotBeTheReasonOf(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := reconciled(t, st)
		explained, unexplained := s.old(t, "explained"), s.old(t, "unexplained")
		s.later(t)
		for _, id := range []string{explained, unexplained} {
			alter(t, s.order, "UPDATE order_info SET status = 'cancelled', cancelled_at = placed_at WHERE orderId = ?", id)
		}
		s.fails(t, s.dispatch, "dispatch.release-courier", explained)
		// As when somebody announces it under a version that nobody reads yet.
		s.fails(t, s.dispatch, "dispatch.assign-courier", unexplained)
		s.fails(t, s.order, "compensation.recreate-order", unexplained)
		r := s.reconcile(t, `{"repair":true}`)
		require.Equal(t, map[string]int{reconcile.CancelledButActive: 1}, r.Totals)
		require.Equal(t, unexplained, r.Findings[0].OrderID)
		require.Equal(t, 1, r.Failures)
		s.awaitReconciled(t)
		require.Equal(t, []string{unexplained}, texts(t, database(t, s.dispatch), "SELECT orderId FROM platoon WHERE state = 'released'"))
	})
}

func TestOrderThatIsMissingIsMadeAgainAlthoughAMessageAboutItWaitsForAPerson(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := reconciled(t, st)
		id, now := s.old(t, "missing"), time.Now().UTC()
		alter(t, s.order, "DELETE FROM order_info WHERE orderId = ?", id)
		alter(t, s.order, "INSERT INTO failure (consumer, fingerprint, message_id, order_id, error_class, error_code, error_text, attempts, headers, "+
			"payload_size, state, first_failed_at, last_failed_at) VALUES ('order.mark-dispatched', 'x', 'x', ?, '', '', '', 1, '', 0, 'open', ?, ?)", id, now, now)
		r := s.reconcile(t, `{"repair":true}`)
		require.Len(t, r.Findings, 1)
		require.Equal(t, reconcile.OrphanDispatch, r.Findings[0].Class)
		require.Equal(t, "dispatched", s.get(t, id).Status)
	})
}

func TestDifferenceThatIsYoungIsNone(t *testing.T) {
	t.Parallel()
	s := reconciled(t, embedded(t), func(cfg *service.Config) { cfg.ReconcileGrace = time.Minute })
	id := s.old(t, "x")
	s.later(t)
	alter(t, s.order, "DELETE FROM order_info WHERE orderId = ?", id)
	alter(t, s.dispatch, "UPDATE platoon SET assigned_at = ? WHERE orderId = ?", time.Now().UTC(), id)
	r := s.reconcile(t, `{}`)
	require.Empty(t, r.Findings, "the order was dispatched just now")
	require.Equal(t, 1, r.InFlight)
	alter(t, s.dispatch, "UPDATE platoon SET assigned_at = placed_at WHERE orderId = ?", id)
	require.Len(t, s.reconcile(t, `{}`).Findings, 1)
}

func TestOrderThatATableHasTwiceIsAPersons(t *testing.T) {
	t.Parallel()
	s := reconciled(t, production(t)) // SQLite cannot drop the key of a table
	twiceOrdered, twiceDispatched := s.old(t, "x"), s.old(t, "y")
	alter(t, s.order, "ALTER TABLE order_info DROP KEY order_info_orderId")
	alter(t, s.dispatch, "ALTER TABLE platoon DROP KEY platoon_orderId")
	alter(t, s.order, "INSERT INTO order_info (orderId, name, order_money, currency, status, version, courier_id, assigned_at, placed_at) "+
		"SELECT orderId, name, order_money, currency, status, version, courier_id, assigned_at, placed_at FROM order_info WHERE orderId = ?", twiceOrdered)
	alter(t, s.dispatch, "INSERT INTO platoon (orderId, takeout_userId, state, name, order_money, currency, placed_at, order_version, assigned_at) "+
		"SELECT orderId, 'other', state, name, order_money, currency, placed_at, order_version, assigned_at FROM platoon WHERE orderId = ?", twiceDispatched)
	r := s.reconcile(t, `{"repair":true}`)
	require.Equal(t, map[string]int{reconcile.Duplicate: 2}, r.Totals)
	require.Equal(t, 2, r.Person)
	require.Zero(t, r.Repaired)
}

func TestBacklogOfTheDispatchServiceIsNoDrift(t *testing.T) {
	t.Parallel()
	s := reconciled(t, embedded(t))
	s.old(t, "x")
	ids := make([]string, 5)
	for i := range ids {
		ids[i] = s.old(t, "backlog")
	}
	alter(t, s.dispatch, "DELETE FROM platoon WHERE name = 'backlog'")
	// The dispatch service has dealt with nothing later: one of them is enough to find out whether it is behind.
	r := s.reconcile(t, `{}`)
	require.Len(t, r.Findings, 1)
	require.Equal(t, ids[4], r.Findings[0].OrderID, "the youngest")
	require.Equal(t, 4, r.InFlight)
	require.Len(t, s.reconcile(t, `{}`).Findings, 1)
	s.awaitReconciled(t)
	require.Equal(t, 6, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE state = 'assigned'"))
}

func TestServiceIsBehindWithOneQueueWhateverItDoesForOthers(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := withoutCashier(t, st)
		long := time.Now().UTC().Add(-24 * time.Hour)
		alter(t, s.payment, "UPDATE owner SET created_at = ?", long)
		alter(t, s.points, "UPDATE owner SET created_at = ?", long)
		var ids []string
		for range 3 {
			ids = append(ids, s.old(t, "undelivered"))
		}
		// The orders wait to be charged. A later one was cancelled before, and the refund's queue is not behind.
		later := s.old(t, "later")
		alter(t, s.order, "UPDATE order_info SET status = 'cancelled', placed_at = ?, cancelled_at = placed_at WHERE orderId = ?", time.Now().UTC().Add(-time.Minute), later)
		alter(t, s.dispatch, "UPDATE platoon SET state = 'released', takeout_userId = NULL, placed_at = ? WHERE orderId = ?", s.get(t, later).PlacedAt, later)
		s.pay(t, later, "void", 0, 0)
		found := func() (classes []string) {
			for _, f := range s.reconcile(t, `{"full":true}`).Findings {
				classes = append(classes, f.Class)
			}
			return classes
		}
		require.Equal(t, []string{reconcile.MissingPayment}, found(), "one finds out whether the service is behind")

		for _, id := range ids {
			s.pay(t, id, "succeeded", 28)
		}
		require.Empty(t, s.reconcile(t, `{"full":true}`).Totals)
		// Now they wait to be assigned; a cancelled one was released unassigned.
		alter(t, s.dispatch, "DELETE FROM platoon WHERE state = 'assigned'")
		require.Equal(t, []string{reconcile.MissingDispatch}, found())
		s.awaitReconciled(t)

		// Now the order service has not heard of the couriers, only that one of a later order has brought it.
		alter(t, s.order, "UPDATE order_info SET status = 'placed', version = 1 WHERE name = 'undelivered'")
		brought := s.old(t, "brought")
		s.pay(t, brought, "succeeded", 28)
		at := time.Now().UTC().Add(-time.Minute)
		alter(t, s.order, "UPDATE order_info SET status = 'delivered', version = 2, placed_at = ?, delivered_at = placed_at WHERE orderId = ?", at, brought)
		alter(t, s.dispatch, "UPDATE platoon SET state = 'delivered', placed_at = ?, delivered_at = placed_at WHERE orderId = ?", s.get(t, brought).PlacedAt, brought)
		for _, table := range [][2]string{{s.payment, "payment"}, {s.points, "points_entry"}} {
			alter(t, table[0], "UPDATE "+table[1]+" SET placed_at = ? WHERE orderId = ?", s.get(t, brought).PlacedAt, brought)
		}
		require.Equal(t, []string{reconcile.FieldMismatch}, found())
	})
}

func TestRepairThatShowsTellsThatTheServiceHasComePastWhateverWaited(t *testing.T) {
	t.Parallel()
	s := reconciled(t, embedded(t))
	const lost = 6
	for range lost {
		s.awaitDispatched(t, s.place(t, "cancelled", 2850))
	}
	s.awaitRest(t)
	at := time.Now().UTC().Add(-time.Hour).Truncate(time.Microsecond) // all at once: none is the proof that the service has come past another
	alter(t, s.order, "UPDATE order_info SET placed_at = ?, assigned_at = ? WHERE name = 'cancelled'", at, at)
	alter(t, s.dispatch, "UPDATE platoon SET placed_at = ?, assigned_at = ? WHERE name = 'cancelled'", at, at)
	// Unlike an order that is announced again, a courier that is released makes no order the newest of the service.
	alter(t, s.order, "UPDATE order_info SET status = 'cancelled', cancelled_at = placed_at WHERE name = 'cancelled'")
	r := s.reconcile(t, `{"repair":true}`)
	require.Equal(t, 1, r.Repaired)
	require.Equal(t, lost-1, r.InFlight)
	eventually(t, "the repair shows", func() error {
		if n := s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE state = 'released'"); n != 1 {
			return fmt.Errorf("%d are released", n)
		}
		return nil
	})
	s.awaitRest(t)
	r = s.reconcile(t, `{"repair":true}`)
	require.Equal(t, lost-1, r.Repaired)
	require.Zero(t, r.InFlight)
	s.awaitReconciled(t)
	require.Equal(t, lost, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE state = 'released'"))
}

func TestOneProcessReconcilesAtATime(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		every := func(cfg *service.Config) { cfg.ReconcileEvery = time.Second }
		first := reconciled(t, st, every)
		leader := func() error {
			if r := first.reconcile(t, `{}`); !r.Leader {
				return errors.New("it does not lead")
			}
			return nil
		}
		eventually(t, "it leads", leader)
		if st.name == "embedded" { // a second process cannot serve the same files, but compare them
			r, err := service.Reconcile(t.Context(), first.cfg, reconcile.Request{}, 0, logger(t))
			require.NoError(t, err)
			require.False(t, r.Leader)
			return
		}
		second := &system{stack: st, cfg: first.cfg}
		second.start(t)
		t.Cleanup(func() { second.stop(t) })
		require.False(t, second.reconcile(t, `{}`).Leader)
		require.NoError(t, leader())
		first.stop(t)
		eventually(t, "the other one leads", func() error {
			if r := second.reconcile(t, `{}`); !r.Leader {
				return errors.New("it does not lead")
			}
			return nil
		})
	})
}

func TestRepairsKeepToTheirBudgetAndCanBeSwitchedOff(t *testing.T) {
	t.Parallel()
	s := reconciled(t, embedded(t), func(cfg *service.Config) {
		cfg.ReconcileEvery, cfg.ReconcileRepair, cfg.ReconcileBudget = time.Second, false, 2
	})
	for range 5 {
		s.old(t, "x")
	}
	s.later(t)
	alter(t, s.order, "UPDATE order_info SET name = 'y' WHERE name = 'x'")
	eventually(t, "the background run finds them", func() error {
		if r := s.lastReport(t).Report; r == nil || r.Totals[reconcile.FieldMismatch] != 5 {
			return fmt.Errorf("its report is %+v", r)
		}
		return nil
	})
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM history")+s.orderRows(t, "SELECT SUM(repairs) FROM finding"), "it repairs nothing")
	require.Equal(t, 2, s.reconcile(t, `{"repair":true}`).Repaired)
	s.awaitReconciled(t)
}

func TestRepairThatDoesNotLastIsLeftToAPerson(t *testing.T) {
	t.Parallel()
	s := reconciled(t, embedded(t), func(cfg *service.Config) { cfg.ReconcileGrace = 0 })
	id := s.old(t, "x")
	s.awaitRest(t)
	for range 5 {
		alter(t, s.dispatch, "UPDATE platoon SET name = 'y' WHERE orderId = ?", id)
		require.Equal(t, 1, s.reconcile(t, `{"repair":true}`).Repaired)
		eventually(t, "it is repaired", func() error {
			if name := s.dispatchOf(t, id).Name; name != "x" {
				return errors.New(name)
			}
			return nil
		})
		s.awaitRest(t) // what is still in the outbox may be about to make a difference
	}
	alter(t, s.dispatch, "UPDATE platoon SET name = 'y' WHERE orderId = ?", id)
	r := s.reconcile(t, `{"repair":true}`)
	require.Zero(t, r.Repaired)
	require.Equal(t, 1, r.Person)
}

func TestMessageThatAPersonRetriesStillKeepsItsOrderFromBeingRepaired(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		require.NoError(t, s.Keep(t.Context(), givenUpBy("order.nobody", "m1", "o1", "c", "e")))
		waits := []string{"order.nobody"}
		for state, want := range map[string][]string{app.FailureOpen: waits, app.FailureRetrying: waits, app.FailureResolved: nil, app.FailureDiscarded: nil} {
			_, err := s.DB().Writer().Exec("UPDATE failure SET state = ?", state)
			require.NoError(t, err)
			flights, err := sqlstore.NewBook(s.DB()).Flights(t.Context(), []string{"o1", "o2"})
			require.NoError(t, err)
			require.Equal(t, want, flights["o1"].Failures, state)
			require.Zero(t, flights["o2"])
		}
	})
}

func TestLeaseIsGivenBackOnlyByWhoHasItAndAHundredReportsAreKept(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		findings := sqlstore.NewFindings(s.DB())
		leads := func(owner string) bool {
			leader, err := findings.Lease(t.Context(), owner, time.Minute)
			require.NoError(t, err)
			return leader
		}
		require.True(t, leads("zhao"))
		require.True(t, leads("zhao"), "who has it keeps it")
		require.NoError(t, findings.Release(t.Context(), "qian"))
		require.False(t, leads("qian"))
		require.NoError(t, findings.Release(t.Context(), "zhao"))
		require.True(t, leads("qian"))
		for i := range 103 {
			require.NoError(t, findings.SaveReport(t.Context(), reconcile.Report{StartedAt: time.Now(), InFlight: i}))
		}
		require.Equal(t, 100, countIn(t, s, "SELECT COUNT(*) FROM reconcile_report"))
		last, _, err := findings.LastReport(t.Context())
		require.NoError(t, err)
		require.Equal(t, 102, last.InFlight)
	})
}

func TestExitCodeOfReconcileSaysWhetherTheServicesAgree(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		env := map[string]string{
			"TAKEOUT_ORDER_DATABASE_URL": st.order, "TAKEOUT_DISPATCH_DATABASE_URL": st.dispatch, "TAKEOUT_BROKER_URL": st.broker,
			"TAKEOUT_PAYMENT_GATEWAY": "none", "TAKEOUT_RECONCILE_GRACE": "1s",
		}
		require.Equal(t, 2, run(t, env, "reconcile").code, "nothing is there")
		s := reconciled(t, st)
		id, money := s.old(t, "x"), s.old(t, "y")
		s.later(t)

		agree := run(t, env, "reconcile", "-o", "table")
		require.Equal(t, 0, agree.code, "%s", agree)
		require.Contains(t, agree.stdout, "the services agree")
		alter(t, s.dispatch, "DELETE FROM platoon WHERE orderId = ?", id)
		differ := run(t, env, "reconcile", "-o", "json")
		require.Equal(t, 1, differ.code, "%s", differ)
		var r reconcile.Report
		require.NoError(t, json.Unmarshal([]byte(differ.stdout), &r))
		require.Equal(t, map[string]int{reconcile.MissingDispatch: 1}, r.Totals)
		repaired := run(t, env, "reconcile", "--repair", "-o", "table")
		require.Equal(t, 0, repaired.code, "%s", repaired)
		require.Contains(t, repaired.stdout, id)
		require.Equal(t, 1, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE orderId = ?", id))
		alter(t, s.dispatch, "UPDATE platoon SET order_money = 1 WHERE orderId = ?", money)
		require.Equal(t, 1, run(t, env, "reconcile", "--repair").code, "a person must decide")

		alter(t, s.dispatch, "ALTER TABLE reconcile_dirty RENAME TO gone")
		partly := run(t, env, "reconcile", "-o", "table")
		require.Equal(t, 2, partly.code, "%s", partly)
		require.Contains(t, partly.stdout, "it cannot be told whether the services agree")
		alter(t, s.dispatch, "ALTER TABLE gone RENAME TO reconcile_dirty")

		run(t, env, "reconcile", "--from=2026-01-02T00:00:00Z", "--to=2026-01-01T00:00:00Z").complains(t, 2, "later than from")
		run(t, env, "reconcile", "--to=2999-01-01T00:00:00Z").complains(t, 2, "future")
		run(t, env, "reconcile", "--from=yesterday").complains(t, 2, "--from")
		require.Equal(t, http.StatusUnprocessableEntity, mustSend(t, http.MethodPost, s.api+"/v1/reconciliation", `{"to":"2999-01-01T00:00:00Z"}`).status)
		env["TAKEOUT_DISPATCH_DATABASE_URL"] = "mysql://u@127.0.0.1:1/x"
		run(t, env, "reconcile").complains(t, 2, "dispatch database")
	})
}

func TestReconcileTellsOfEverythingThatDoesNotAgree(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := reconciled(t, st)
		env := map[string]string{
			"TAKEOUT_ORDER_DATABASE_URL": st.order, "TAKEOUT_DISPATCH_DATABASE_URL": st.dispatch, "TAKEOUT_BROKER_URL": st.broker,
			"TAKEOUT_PAYMENT_GATEWAY": "none", "TAKEOUT_RECONCILE_GRACE": "1s",
		}
		id := s.old(t, "x")
		s.later(t)
		alter(t, s.dispatch, "DELETE FROM platoon WHERE orderId = ?", id)
		s.fails(t, s.dispatch, "dispatch.assign-courier", id)
		waits := run(t, env, "reconcile", "-o", "table")
		require.Equal(t, 1, waits.code, "%s", waits)
		require.Contains(t, waits.stdout, "1 wait for failures; takeout failures list shows them")
		require.Contains(t, waits.stdout, "the services differ")

		alter(t, s.dispatch, "UPDATE failure SET state = 'discarded'")
		require.Contains(t, run(t, env, "reconcile", "-o", "table").stdout, id)
		alter(t, s.dispatch, "UPDATE failure SET state = 'open'")
		found := run(t, env, "reconcile", "-o", "table")
		require.Equal(t, 1, found.code, "%s", found)
		require.Contains(t, found.stdout, id, "an earlier run found it")

		alter(t, s.dispatch, "UPDATE failure SET state = 'discarded'")
		require.Equal(t, 0, run(t, env, "reconcile", "--repair", "-o", "table").code)
	})
}

func TestRangeThatIsAskedForIsComparedAgain(t *testing.T) {
	t.Parallel()
	s := reconciled(t, embedded(t))
	id := s.old(t, "x")
	s.reconcile(t, `{}`)
	placed := s.get(t, id).PlacedAt
	ask := func(from, to time.Time) string {
		return fmt.Sprintf(`{"from":%q,"to":%q}`, from.Format(time.RFC3339), to.Format(time.RFC3339))
	}
	require.EqualValues(t, 1, s.reconcile(t, ask(placed.Add(-time.Minute), placed.Add(time.Minute))).Compared.Orders)
	require.Zero(t, s.reconcile(t, ask(placed.Add(-time.Hour), placed.Add(-time.Minute))).Compared.Orders)
}

func TestRepairOfARangeLeavesOtherFindingsAlone(t *testing.T) {
	t.Parallel()
	s := reconciled(t, embedded(t))
	within, outside := s.old(t, "within"), s.old(t, "outside")
	earlier := time.Now().UTC().Add(-5 * time.Hour).Truncate(time.Microsecond)
	alter(t, s.order, "UPDATE order_info SET placed_at = ?, assigned_at = ? WHERE orderId = ?", earlier, earlier, outside)
	alter(t, s.dispatch, "UPDATE platoon SET placed_at = ?, assigned_at = ? WHERE orderId = ?", earlier, earlier, outside)
	s.later(t)
	alter(t, s.dispatch, "UPDATE platoon SET name = 'y' WHERE orderId IN (?, ?)", within, outside)
	require.Len(t, s.reconcile(t, `{}`).Findings, 2)
	placed := s.get(t, within).PlacedAt
	r := s.reconcile(t, fmt.Sprintf(`{"repair":true,"from":%q,"to":%q}`, placed.Add(-time.Minute).Format(time.RFC3339), placed.Add(time.Minute).Format(time.RFC3339)))
	require.Equal(t, 1, r.Repaired)
	require.Len(t, r.Findings, 1)
	require.Equal(t, within, r.Findings[0].OrderID)
	s.awaitRest(t)
	require.Equal(t, 1, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND name = 'y'", outside))
	s.awaitReconciled(t)
}

// Nothing else flows: whether the last announcement was lost, or is only late, shows in no table.
func TestFindingThatWaitsForAPersonKeepsNoOthersFromBeingFound(t *testing.T) {
	t.Parallel()
	s := reconciled(t, embedded(t), func(cfg *service.Config) { cfg.ReconcileGrace = 200 * time.Millisecond })
	contradictory := s.place(t, "x", 2850)
	s.awaitDispatched(t, contradictory)
	s.awaitRest(t)
	alter(t, s.order, "UPDATE order_info SET status = 'placed', courier_id = NULL, assigned_at = NULL WHERE orderId = ?", contradictory)
	alter(t, s.dispatch, "UPDATE platoon SET takeout_userId = NULL WHERE orderId = ?", contradictory)
	eventually(t, "one waits for a person", func() error {
		if r := s.reconcile(t, `{"repair":true}`); r.Person != 1 {
			return fmt.Errorf("%+v", r)
		}
		return nil
	})
	alter(t, s.order, "INSERT INTO order_info (orderId, name, order_money, currency, status, version, placed_at) VALUES ('lost', 'x', 100, 'CNY', 'placed', 1, ?)",
		time.Now().UTC().Truncate(time.Microsecond))
	eventually(t, "the lost one is dispatched", func() error {
		r := s.reconcile(t, `{"repair":true}`)
		if n := s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE orderId = 'lost'"); n != 1 {
			return fmt.Errorf("%v, %d in flight", r.Totals, r.InFlight)
		}
		return nil
	})
}

func TestRunsThatFindTheSameAtOnceBothKeepIt(t *testing.T) {
	t.Parallel()
	store := openStore(t, testenv.MySQL(t), sqlstore.OpenOrders)
	const rounds, each = 30, 20
	var runs sync.WaitGroup
	failed := make(chan error, 2*rounds)
	for range 2 {
		runs.Go(func() {
			findings := sqlstore.NewFindings(store.DB())
			for round := range rounds {
				var found []*reconcile.Finding
				for i := range each {
					found = append(found, &reconcile.Finding{Class: reconcile.MissingDispatch, OrderID: fmt.Sprint("o-", round, "-", i), State: reconcile.StateOpen, FirstSeen: time.Now().UTC(), LastSeen: time.Now().UTC()})
				}
				if err := findings.Put(t.Context(), found); err != nil {
					failed <- err
				}
			}
		})
	}
	runs.Wait()
	close(failed)
	require.NoError(t, <-failed)
	unresolved, err := sqlstore.NewFindings(store.DB()).Unresolved(t.Context(), 10_000)
	require.NoError(t, err)
	require.Len(t, unresolved, rounds*each)
}

// slowBook is a book whose database is five minutes behind.
type slowBook struct{ *sqlstore.Book }

func (b slowBook) Clock(ctx context.Context) (time.Time, error) {
	now, err := b.Book.Clock(ctx)
	return now.Add(-5 * time.Minute), err
}

// Orders that are stored by a clock that is behind are older than they are, and the database that notes what is changed
// among the old ones does not take them for such.
func TestOrderOfADatabaseWhoseClockIsBehindIsCompared(t *testing.T) {
	t.Parallel()
	orders, dispatches := openStore(t, testenv.MySQL(t), sqlstore.OpenOrders), openStore(t, testenv.MySQL(t), sqlstore.OpenDispatches)
	reconciliation := reconcile.New(
		map[string]reconcile.Book{"order": slowBook{sqlstore.NewBook(orders.DB())}, "dispatch": sqlstore.NewBook(dispatches.DB())},
		sqlstore.NewFindings(orders.DB()), app.UseCases{}, reconcile.Policy{Grace: 2 * time.Second}, "the test")
	_, err := reconciliation.Run(t.Context(), reconcile.Request{})
	require.NoError(t, err)

	conn, err := orders.DB().Writer().Conn(t.Context())
	require.NoError(t, err)
	defer conn.Close()
	at := time.Now().UTC().Add(-5 * time.Minute).Truncate(time.Microsecond)
	_, err = conn.ExecContext(t.Context(), "SET timestamp = ?", at.Unix())
	require.NoError(t, err)
	_, err = conn.ExecContext(t.Context(), "INSERT INTO order_info (orderId, name, order_money, currency, status, version, placed_at) VALUES ('lost', 'x', 100, 'CNY', 'placed', 1, ?)", at)
	require.NoError(t, err)
	_, err = conn.ExecContext(t.Context(), "SET timestamp = DEFAULT")
	require.NoError(t, err)

	report, err := reconciliation.Run(t.Context(), reconcile.Request{})
	require.NoError(t, err)
	require.Equal(t, map[string]int{reconcile.MissingDispatch: 1}, report.Totals)
}

// withoutCashier starts a system in which nobody charges and nobody awards points: the test writes those tables.
func withoutCashier(t testing.TB, st stack) *system {
	t.Helper()
	if st.name == "embedded" {
		st.broker = "sql:sqlite:" + filepath.Join(t.TempDir(), "broker.db") // the embedded broker would want all roles
	}
	return reconciled(t, st, func(cfg *service.Config) {
		cfg.PaymentGateway, cfg.Roles = "simulated", []string{"order", "relay", "dispatch", "compensation", "reconcile"}
	})
}

// pay writes the payment of an order of an hour ago, and what it earned, as the services do.
func (s *system) pay(t testing.TB, id, state string, points ...int) {
	t.Helper()
	at := s.get(t, id).PlacedAt
	alter(t, s.payment, "INSERT INTO payment (orderId, name, order_money, currency, placed_at, order_version, state, reference, reason, decided_at) "+
		"VALUES (?, 'x', 2850, 'CNY', ?, 1, ?, 'r', '', ?)", id, at, state, at)
	for i, p := range points {
		alter(t, s.points, "INSERT INTO points_entry (orderId, kind, points, placed_at, at) VALUES (?, ?, ?, ?, ?)", id, []string{"award", "revoke"}[i], p, at, at)
		alter(t, s.order, "UPDATE order_info SET points = points + ? WHERE orderId = ? AND status <> 'cancelled'", p, id)
	}
}

func TestEveryKindOfDriftOfPaymentAndPointsIsFound(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := withoutCashier(t, st)
		orders := map[string]string{}
		for _, name := range []string{"paid", "refunded", "unpaid", "cancelled", "refused", "amount", "no points", "other points", "points left", "unrecorded", "made up", "charging", "nobody's"} {
			orders[name] = s.old(t, name)
		}
		require.True(t, s.reconcile(t, `{}`).Consistent, "what was ordered before there were payments is not charged")
		long := time.Now().UTC().Add(-24 * time.Hour)
		alter(t, s.payment, "UPDATE owner SET created_at = ?", long)
		alter(t, s.points, "UPDATE owner SET created_at = ?", long)

		s.pay(t, orders["paid"], "succeeded", 28)
		for _, name := range []string{"refunded", "cancelled", "points left"} {
			alter(t, s.order, "UPDATE order_info SET status = 'cancelled', cancelled_at = placed_at WHERE orderId = ?", orders[name])
			alter(t, s.dispatch, "UPDATE platoon SET state = 'released', released_at = placed_at WHERE orderId = ?", orders[name])
		}
		s.pay(t, orders["refunded"], "refunded", 28, -28)
		s.pay(t, orders["cancelled"], "succeeded", 28)
		s.pay(t, orders["points left"], "refunded", 28)
		s.pay(t, orders["refused"], "refused")
		s.pay(t, orders["amount"], "succeeded", 28)
		s.pay(t, orders["no points"], "succeeded")
		s.pay(t, orders["other points"], "succeeded", 29)
		s.pay(t, orders["unrecorded"], "succeeded", 28)
		alter(t, s.order, "UPDATE order_info SET points = 0 WHERE orderId = ?", orders["unrecorded"])
		s.pay(t, orders["made up"], "succeeded")
		alter(t, s.payment, "UPDATE payment SET order_money = 99 WHERE orderId = ?", orders["made up"])
		alter(t, s.dispatch, "UPDATE platoon SET order_money = 99 WHERE orderId = ?", orders["made up"])
		alter(t, s.order, "UPDATE order_info SET order_money = 99, points = 5 WHERE orderId = ?", orders["made up"])
		s.pay(t, orders["charging"], "charging")
		s.pay(t, orders["nobody's"], "refused")
		alter(t, s.payment, "UPDATE payment SET order_money = 2851 WHERE orderId = ?", orders["amount"])
		alter(t, s.order, "DELETE FROM order_info WHERE orderId = ?", orders["nobody's"])
		alter(t, s.dispatch, "DELETE FROM platoon WHERE orderId = ?", orders["nobody's"])
		// Payments and points have come past all of these, and the order service too.
		later := s.place(t, "later", 2850)
		s.awaitDispatched(t, later)
		s.pay(t, later, "succeeded", 28)

		want := map[string]string{
			orders["unpaid"]: reconcile.MissingPayment, orders["charging"]: reconcile.MissingPayment, orders["cancelled"]: reconcile.PaymentMismatch,
			orders["refused"]: reconcile.PaymentMismatch, orders["amount"]: reconcile.PaymentMismatch, orders["nobody's"]: reconcile.OrphanPayment,
			orders["no points"]: reconcile.MissingPoints, orders["other points"]: reconcile.PointsMismatch, orders["points left"]: reconcile.PointsMismatch,
			orders["unrecorded"]: reconcile.UnrecordedPoints, orders["made up"]: reconcile.UnrecordedPoints,
		}
		if st.name != "embedded" { // SQLite cannot drop the key of a table
			for _, name := range []string{"paid twice", "earned twice"} {
				orders[name] = s.old(t, name)
				s.pay(t, orders[name], "succeeded", 28)
			}
			alter(t, s.payment, "ALTER TABLE payment DROP KEY payment_orderId")
			alter(t, s.points, "ALTER TABLE points_entry DROP KEY points_entry_order")
			s.pay(t, orders["paid twice"], "succeeded")
			alter(t, s.points, "INSERT INTO points_entry (orderId, kind, points, placed_at, at) SELECT orderId, kind, points, placed_at, at FROM points_entry WHERE orderId = ?",
				orders["earned twice"])
			want[orders["paid twice"]], want[orders["earned twice"]] = reconcile.DoublePayment, reconcile.DoublePoints
		}
		got := map[string]string{}
		r := s.reconcile(t, `{"full":true}`)
		for _, f := range r.Findings {
			got[f.OrderID] = f.Class
		}
		require.Equal(t, want, got, "%+v", r.Findings)

		s.reconcile(t, `{"repair":true}`)
		for _, name := range []string{"unpaid", "charging", "cancelled"} {
			require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM history WHERE order_id = ? AND step = 'announced_again'", orders[name]), name)
		}
		require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM history WHERE order_id = ?", orders["amount"]))
	})
}

func TestPointsThatAnOrderNeverHeardOfAreRecorded(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := reconciled(t, st, func(cfg *service.Config) { cfg.PaymentGateway = "simulated" })
		recorded := func(id string, points int64) {
			t.Helper()
			eventually(t, "the order says what it earned", func() error {
				if got := s.get(t, id).Points; got != points {
					return fmt.Errorf("%d", got)
				}
				return nil
			})
		}
		lost, wrong, free := s.paid(t, "lost"), s.paid(t, "wrong"), s.place(t, "earns nothing", 99)
		recorded(lost, 28)
		recorded(wrong, 28)
		s.awaitDispatched(t, free)
		s.awaitPoints(t, free, 0, 1)
		recorded(s.place(t, "later", 2850), 28) // so the order service has come past all of them
		require.Empty(t, s.reconcile(t, `{}`).Findings)

		alter(t, s.order, "UPDATE order_info SET points = 0 WHERE orderId = ?", lost)
		alter(t, s.order, "UPDATE order_info SET points = 1 WHERE orderId = ?", wrong)
		found := s.reconcile(t, `{"repair":true}`)
		require.Len(t, found.Findings, 2, "%+v", found.Findings)
		for _, f := range found.Findings {
			require.Equal(t, reconcile.UnrecordedPoints, f.Class)
		}
		recorded(lost, 28)
		recorded(wrong, 28)
		s.awaitReconciled(t)
		require.Equal(t, 2, count(t, s.points, "SELECT COUNT(*) FROM history WHERE step = 'announced_again'"))
		s.noFailures(t)
	})
}
