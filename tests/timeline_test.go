package tests

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"takeout/adapters/sqldb"
	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/ports/httpapi"
	"takeout/tests/testenv"
)

// timeline returns the order's way as the API at url shows it.
func timeline(t testing.TB, url, id string) httpapi.TimelineBody {
	t.Helper()
	way, err := askTimeline(t, url, id)
	require.NoError(t, err)
	return way
}

// askTimeline is timeline for an order that may not be there yet.
func askTimeline(t testing.TB, url, id string) (httpapi.TimelineBody, error) {
	t.Helper()
	var way httpapi.TimelineBody
	a := mustGet(t, url+"/v1/orders/"+id+"/timeline")
	if a.status != http.StatusOK {
		return way, fmt.Errorf("%s", a)
	}
	require.NoError(t, json.Unmarshal(a.body, &way), "%s", a)
	require.Equal(t, id, way.OrderID)
	require.True(t, slices.IsSortedFunc(way.Steps, func(a, b httpapi.StepBody) int { return a.At.Compare(b.At) }), "%s", a)
	return way, nil
}

// named is a step as "database step" with its event and handler.
func named(s httpapi.StepBody) string {
	return strings.Join(strings.Fields(s.Database+" "+s.Step+" "+s.Event+" "+s.Handler), " ")
}

// find returns the place of the step in the order's way, -1 if it is not there.
func find(way httpapi.TimelineBody, name string) int {
	return slices.IndexFunc(way.Steps, func(s httpapi.StepBody) bool { return named(s) == name })
}

// awaitSteps waits until the way has these steps, one after the other and others in between.
func awaitSteps(t testing.TB, url, id string, names ...string) httpapi.TimelineBody {
	t.Helper()
	var way httpapi.TimelineBody
	eventually(t, "the timeline is complete", func() (err error) {
		if way, err = askTimeline(t, url, id); err != nil {
			return err
		}
		var had []string
		for _, s := range way.Steps {
			had = append(had, named(s))
		}
		last := -1
		for _, name := range names {
			at := find(way, name)
			if at <= last {
				return fmt.Errorf("%q is not where it should be in\n%s", name, strings.Join(had, "\n"))
			}
			last = at
		}
		return nil
	})
	return way
}

// openOrders opens the order service's database beside the program.
func openOrders(t testing.TB, url string) *orderStore {
	t.Helper()
	s, err := sqlstore.OpenOrders(url, nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// allSeeing is where the whole timeline is told: where all databases are opened.
func (s *system) allSeeing(t testing.TB) string {
	t.Helper()
	if s.one != nil {
		return s.api
	}
	return startProcess(t, "reconcile", map[string]string{
		"TAKEOUT_ROLES": "reconcile", "TAKEOUT_BROKER_URL": s.broker, "TAKEOUT_ORDER_DATABASE_URL": s.order,
		"TAKEOUT_DISPATCH_DATABASE_URL": s.dispatch, "TAKEOUT_PAYMENT_DATABASE_URL": s.payment, "TAKEOUT_POINTS_DATABASE_URL": s.points,
	}).url
}

func TestTimelineTellsTheWholeLifeOfAnOrder(t *testing.T) {
	inEveryLayout(t, func(t *testing.T, s *system) {
		id := s.place(t, "Mapo tofu", 2850)
		courier := s.awaitDispatched(t, id).Dispatch.CourierID
		_, err := app.NewOrders(openOrders(t, s.order)).Cancel(context.Background(), orderID(t, id), "changed my mind")
		require.NoError(t, err)

		url := s.allSeeing(t)
		way := awaitSteps(t, url, id,
			"order placed", "order in_outbox order.placed", "dispatch handled dispatch.assign-courier", "dispatch dispatched",
			"dispatch in_outbox dispatch.assigned", "order handled order.mark-dispatched",
			"order cancelled", "dispatch released", "order in_outbox order.cancelled", "dispatch handled dispatch.release-courier")
		awaitSteps(t, url, id, "order in_outbox order.placed", "order confirmed order.placed")
		awaitSteps(t, url, id, "dispatch in_outbox dispatch.assigned", "dispatch confirmed dispatch.assigned")
		require.Empty(t, way.NotAsked)
		require.Empty(t, way.Unavailable)

		placed, announced := way.Steps[find(way, "order placed")], way.Steps[find(way, "order in_outbox order.placed")]
		require.Equal(t, "2850 CNY", placed.Detail)
		require.NotEmpty(t, announced.EventID)
		require.Equal(t, announced.EventID, way.Steps[find(way, "dispatch handled dispatch.assign-courier")].EventID)
		require.Equal(t, "courier "+courier, way.Steps[find(way, "dispatch dispatched")].Detail)
		require.Equal(t, "changed my mind", way.Steps[find(way, "order cancelled")].Detail)

		if s.one == nil {
			way := timeline(t, s.api, id)
			require.Equal(t, []string{"dispatch: runs elsewhere", "payment: runs elsewhere", "points: runs elsewhere"}, way.NotAsked)
			require.GreaterOrEqual(t, find(way, "order placed"), 0)
			require.Negative(t, find(way, "dispatch dispatched"))
		}
	})
}

func TestTimelineTellsThatAnOrderWasMadeAgain(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		broker := s.publisher(t)
		event := newEventID()
		require.NoError(t, broker.Publish("order.placed", message.NewMessage(event, announce(t, event, "lost", 2850))))
		way := awaitSteps(t, s.api, "lost", "order placed", "order handled compensation.recreate-order", "order recreated")
		require.Contains(t, way.Steps[find(way, "order recreated")].Detail, event)
		awaitSteps(t, s.api, "lost", "order placed", "dispatch dispatched")
	})
}

// services opens the databases of all four services, empty.
func services(t testing.TB, place func() string) map[string]app.StepSource {
	t.Helper()
	quiet := slog.New(slog.DiscardHandler)
	all := map[string]app.StepSource{}
	for name, open := range map[string]func(string) (serviceStore, error){
		"order":    func(url string) (serviceStore, error) { return sqlstore.OpenOrders(url, nil, quiet) },
		"dispatch": func(url string) (serviceStore, error) { return sqlstore.OpenDispatches(url, nil, quiet) },
		"payment":  func(url string) (serviceStore, error) { return sqlstore.OpenPayments(url, nil, quiet) },
		"points":   func(url string) (serviceStore, error) { return sqlstore.OpenPoints(url, nil, quiet) },
	} {
		s, err := open(place())
		require.NoError(t, err)
		t.Cleanup(func() { _ = s.Close() })
		_, err = s.Migrate(context.Background())
		require.NoError(t, err)
		all[name] = s
	}
	return all
}

type serviceStore interface {
	app.StepSource
	DB() *sqldb.DB
	Migrate(ctx context.Context) ([]string, error)
	Close() error
}

// withAllServices runs the test over databases in SQLite and in MySQL.
func withAllServices(t *testing.T, test func(t *testing.T, databases map[string]app.StepSource)) {
	t.Parallel()
	t.Run("sqlite", func(t *testing.T) {
		t.Parallel()
		test(t, services(t, func() string { return "sqlite:" + filepath.Join(t.TempDir(), "x.db") }))
	})
	t.Run("mysql", func(t *testing.T) {
		t.Parallel()
		test(t, services(t, func() string { return testenv.MySQL(t) }))
	})
}

// wayOf is the way of the order as all databases tell it: one that takes too long is left out, and asked again.
func wayOf(t testing.TB, databases map[string]app.StepSource, id string) (way app.Way) {
	t.Helper()
	eventually(t, "all databases answer", func() (err error) {
		way, err = app.NewTimeline(databases, nil).Of(context.Background(), orderID(t, id))
		if err == nil && len(way.Unavailable) > 0 {
			err = fmt.Errorf("without %s", way.Unavailable)
		}
		return err
	})
	return way
}

// insert puts a row into a table. Values come in pairs of column and value.
func insert(t testing.TB, db *sqldb.DB, table string, pairs ...any) {
	t.Helper()
	var columns []string
	var values []any
	for i := 0; i < len(pairs); i += 2 {
		columns, values = append(columns, pairs[i].(string)), append(values, pairs[i+1])
	}
	_, err := db.Writer().Exec("INSERT INTO "+table+" ("+strings.Join(columns, ", ")+") VALUES (?"+strings.Repeat(", ?", len(values)-1)+")", values...)
	require.NoError(t, err)
}

func TestTimelineTellsEveryKindOfStepOldestFirst(t *testing.T) {
	withAllServices(t, func(t *testing.T, databases map[string]app.StepSource) {
		db := func(name string) *sqldb.DB { return databases[name].(serviceStore).DB() }
		start := time.Date(2026, 3, 1, 12, 0, 0, 123456000, time.UTC)
		at := func(second int) time.Time { return start.Add(time.Duration(second) * time.Second) }
		hash := make([]byte, 32)

		// In no order: it is the timeline that makes one.
		insert(t, db("points"), "points_entry", "orderId", "o1", "kind", "revoke", "points", -28, "placed_at", at(0), "at", at(22))
		insert(t, db("points"), "points_entry", "orderId", "o1", "kind", "award", "points", 28, "placed_at", at(0), "at", at(6))
		insert(t, db("payment"), "payment", "orderId", "o1", "name", "x", "order_money", 2850, "currency", "CNY", "placed_at", at(0), "order_version", 1,
			"state", "refunded", "reference", "pay_1", "reason", "", "decided_at", at(5), "refunded_at", at(21))
		insert(t, db("dispatch"), "platoon", "orderId", "o1", "takeout_userId", "zhao", "state", "released", "name", "x", "order_money", 2850, "currency", "CNY",
			"placed_at", at(0), "order_version", 1, "assigned_at", at(4), "released_at", at(20))
		insert(t, db("dispatch"), "inbox", "consumer", "dispatch.assign-courier", "event_id", "evt_1", "body_hash", hash, "handled_at", at(4), "order_id", "o1")
		insert(t, db("dispatch"), "history", "order_id", "o1", "at", at(3), "step", "attempt_failed", "detail", "dispatch.assign-courier: no")
		insert(t, db("dispatch"), "outbox", "uuid", "u", "payload", "x", "created_at", at(4), "event_id", "evt_2", "event_key", "dispatch.assigned", "order_id", "o1")
		insert(t, db("order"), "order_info", "orderId", "o1", "name", "x", "order_money", 2850, "currency", "CNY", "status", "cancelled", "version", 3,
			"courier_id", "zhao", "assigned_at", at(4), "placed_at", at(0), "cancelled_at", at(20), "cancel_reason", "too late")
		insert(t, db("order"), "outbox_confirmed", "event_id", "evt_1", "event_key", "order.placed", "order_id", "o1", "created_at", at(0), "confirmed_at", at(1))
		insert(t, db("order"), "outbox_confirmed", "event_id", "evt_1", "event_key", "order.placed", "order_id", "o1", "created_at", at(0), "confirmed_at", at(2))
		insert(t, db("order"), "retry", "queue", "order.record-points", "uuid", "evt_4", "fingerprint", hash, "tier", 2, "order_id", "o1", "payload", "x",
			"error_text", "busy", "created_at", at(7), "available_at", at(37).UnixMicro())
		insert(t, db("order"), "failure", "id", 7, "consumer", "order.mark-dispatched", "fingerprint", hash, "message_id", "evt_2", "order_id", "o1", "error_class", "transient",
			"error_code", "unexpected", "error_text", "boom", "attempts", 4, "headers", "{}", "payload_size", 0, "state", "discarded",
			"first_failed_at", at(8), "last_failed_at", at(10), "occurrences", 2, "closed_at", at(12))
		insert(t, db("order"), "failure_action", "failure_id", 7, "at", at(9), "operator", "mei", "action", "retry", "reason", "")
		insert(t, db("order"), "failure_action", "failure_id", 7, "at", at(12), "operator", "mei", "action", "discard", "reason", "no longer needed")
		insert(t, db("order"), "history", "order_id", "o1", "at", at(13), "step", "recreated", "detail", "announced and not stored")
		insert(t, db("order"), "finding", "orderId", "o1", "class", "missing_dispatch", "minute", 1, "state", "resolved", "evidence", "{}", "repair", "announced again",
			"repairs", 1, "first_seen", at(14), "last_seen", at(15), "resolved_at", at(16))
		// Nothing of another order.
		insert(t, db("order"), "history", "order_id", "o2", "at", at(13), "step", "recreated", "detail", "x")

		way := wayOf(t, databases, "o1")
		var told []string
		for _, s := range way.Steps {
			require.Equal(t, time.UTC, s.At.Location())
			told = append(told, fmt.Sprintf("%g %s %s | %s | %s%s", s.At.Sub(start).Seconds(), s.Database, s.Name,
				strings.Join(strings.Fields(s.Event+" "+s.EventID+" "+s.Handler), " "), s.Detail, map[bool]string{true: " | 7"}[s.FailureID == 7]))
		}
		require.Equal(t, []string{
			"0 order placed |  | 2850 CNY",
			"0 order in_outbox | order.placed evt_1 | ",
			"1 order confirmed | order.placed evt_1 | ",
			"2 order confirmed | order.placed evt_1 | ",
			"3 dispatch attempt_failed |  | dispatch.assign-courier: no",
			"4 dispatch handled | evt_1 dispatch.assign-courier | ",
			"4 dispatch dispatched |  | courier zhao",
			"4 order dispatched |  | courier zhao, as the order service knows",
			"4 dispatch in_outbox | dispatch.assigned evt_2 | not yet confirmed by the broker",
			"5 payment paid |  | pay_1",
			"6 points points_awarded |  | 28",
			"7 order retry_waits | evt_4 order.record-points | due at 2026-03-01T12:00:37Z, after delay 2: busy",
			"8 order kept | evt_2 order.mark-dispatched | transient, 4 attempts, now discarded: boom | 7",
			"9 order failure_action | evt_2 order.mark-dispatched | retry by mei | 7",
			"10 order kept_again | evt_2 order.mark-dispatched | 2 times in all | 7",
			"12 order failure_action | evt_2 order.mark-dispatched | discard by mei: no longer needed | 7",
			"12 order failure_closed | evt_2 order.mark-dispatched | discarded | 7",
			"13 order recreated |  | announced and not stored",
			"14 order drift_found |  | missing_dispatch, now resolved; repaired 1 times: announced again",
			"16 order drift_resolved |  | missing_dispatch",
			"20 order cancelled |  | too late",
			"20 dispatch released |  | ",
			"21 payment refunded |  | pay_1",
			"22 points points_revoked |  | -28",
		}, told)
	})
}

func TestTimelineOfAnOrderOfWhichThereIsVeryMuchTellsTheNewestAndSaysSo(t *testing.T) {
	withAllServices(t, func(t *testing.T, databases map[string]app.StepSource) {
		orders := databases["order"].(*orderStore)
		storeOrder(t, orders, "o1")
		const rows = 1003
		var values []any
		later := time.Now().UTC().Add(time.Hour).Truncate(time.Second)
		for i := range rows {
			values = append(values, "o1", later.Add(time.Duration(i)*time.Second), "attempt_failed", fmt.Sprint(i))
		}
		_, err := orders.DB().Writer().Exec(sqldb.Insert("history", "order_id, at, step, detail", rows), values...)
		require.NoError(t, err)

		steps := wayOf(t, databases, "o1").Steps
		require.Equal(t, "placed", steps[0].Name)
		left := slices.IndexFunc(steps, func(s app.Step) bool { return s.Name == app.LeftOut })
		require.Positive(t, left)
		require.Equal(t, app.Step{
			At: later.Add(2 * time.Second), Name: app.LeftOut, Database: "order", Detail: "attempt_failed and all before it: the newest 1000 are told",
		}, steps[left])
		told := steps[left+1:]
		require.Len(t, told, 1000)
		require.Equal(t, "3", told[0].Detail)
		require.Equal(t, "1002", told[999].Detail)
	})
}

func TestTimelineTellsWhatMovesOnce(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, open func() *orderStore) {
		storeOrder(t, s, "o1")
		const columns = "event_id, event_key, order_id, created_at"
		move := func(ctx context.Context, statements ...string) error {
			return s.DB().InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
				for _, statement := range statements {
					if _, err := tx.ExecContext(ctx, statement); err != nil {
						return err
					}
				}
				return nil
			})
		}
		ctx, stop := context.WithCancel(context.Background())
		var moving sync.WaitGroup
		moving.Go(func() { // from the outbox to the log, as a relay does, and back
			for ctx.Err() == nil {
				err := errors.Join(
					move(context.Background(), "INSERT INTO outbox_confirmed ("+columns+", confirmed_at) SELECT "+columns+", created_at FROM outbox", "DELETE FROM outbox"),
					move(context.Background(), "INSERT INTO outbox ("+columns+", uuid, payload) SELECT "+columns+", 'x', 'x' FROM outbox_confirmed", "DELETE FROM outbox_confirmed"))
				if err != nil {
					t.Errorf("move: %v", err)
					return
				}
			}
		})
		defer moving.Wait()
		defer stop()
		source := open()
		for range 300 {
			steps, err := source.Steps(ctx, orderID(t, "o1"))
			require.NoError(t, err)
			stored := 0
			for _, step := range steps {
				if step.Name == "in_outbox" {
					stored++
				}
			}
			require.Equal(t, 1, stored, "%v", steps)
		}
	})
}

func TestTimelineTellsStatesThatHaveNoTimeYet(t *testing.T) {
	withAllServices(t, func(t *testing.T, databases map[string]app.StepSource) {
		at := time.Now().UTC().Truncate(time.Microsecond)
		insert(t, databases["dispatch"].(serviceStore).DB(), "platoon", "orderId", "o1", "state", "waiting", "name", "x", "order_money", 1, "currency", "CNY",
			"placed_at", at, "order_version", 1)
		insert(t, databases["payment"].(serviceStore).DB(), "payment", "orderId", "o1", "name", "x", "order_money", 1, "currency", "CNY", "placed_at", at,
			"order_version", 1, "state", "charging", "reference", "", "reason", "")
		way := wayOf(t, databases, "o1")
		require.Len(t, way.Steps, 2)
		require.Equal(t, "waiting", way.Steps[0].Name)
		require.Equal(t, "charging", way.Steps[1].Name)
		require.Equal(t, at, way.Steps[1].At)
	})
}

func TestTimelineGoesWithoutADatabaseThatHangs(t *testing.T) {
	t.Parallel()
	silent := listen(t)
	t.Cleanup(func() { _ = silent.Close() })
	databases := services(t, func() string { return "sqlite:" + filepath.Join(t.TempDir(), "x.db") })
	hanging, err := sqlstore.OpenDispatches("mysql://root@"+silent.Addr().String()+"/x", nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = hanging.Close() })
	asked := maps.Clone(databases)
	asked["dispatch"] = hanging
	storeOrder(t, databases["order"].(*orderStore), "o1")

	began := time.Now()
	way, err := app.NewTimeline(asked, []string{"points"}).Of(context.Background(), orderID(t, "o1"))
	require.NoError(t, err)
	require.Less(t, time.Since(began), 4*time.Second, "a request has 5 s")
	require.Equal(t, []string{"dispatch"}, way.Unavailable)
	require.Equal(t, []string{"points"}, way.NotAsked)
	require.Equal(t, "placed", way.Steps[0].Name)
}

func TestTimelineGoesWithoutADatabaseThatIsAway(t *testing.T) {
	t.Parallel()
	st := production(t)
	var dispatchDB *proxy
	st.dispatch, dispatchDB = through(t, st.dispatch)
	s := startOne(t, st)
	id := s.place(t, "Mapo tofu", 2850)
	s.awaitDispatched(t, id)
	require.Equal(t, http.StatusNotFound, mustGet(t, s.api+"/v1/orders/nobody/timeline").status)

	dispatchDB.cut()
	way := timeline(t, s.api, id)
	require.Equal(t, []string{"dispatch: does not answer"}, way.Unavailable)
	require.GreaterOrEqual(t, find(way, "order placed"), 0)
	a := mustGet(t, s.api+"/v1/orders/nobody/timeline")
	require.Equal(t, http.StatusServiceUnavailable, a.status, "it may be known where nobody could ask")
	require.Equal(t, "databases_unavailable", a.problem(t).Code)

	dispatchDB.mend()
	eventually(t, "the database is asked again", func() error {
		if way := timeline(t, s.api, id); len(way.Unavailable) > 0 || find(way, "dispatch dispatched") < 0 {
			return fmt.Errorf("%v", way)
		}
		return nil
	})
}

func TestTimelineOfAnOrderThatNobodyKnowsIsNotFound(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		for _, id := range []string{"nobody", "no%20id", strings.Repeat("x", 65)} {
			a := mustGet(t, s.api+"/v1/orders/"+id+"/timeline")
			require.Equal(t, http.StatusNotFound, a.status, "%s", a)
			require.Equal(t, "order_not_found", a.problem(t).Code)
		}
	})
}

func TestTimelineIsShownOnTheCommandLine(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	id := s.place(t, "Mapo tofu", 2850)
	s.awaitDispatched(t, id)
	env := map[string]string{"TAKEOUT_URL": s.api}

	shown := run(t, env, "order", "timeline", id, "-o", "table")
	require.Zero(t, shown.code, "%s", shown)
	require.Regexp(t, `(?m)^TIME +DATABASE +STEP +HANDLER +EVENT +DETAIL$`, shown.stdout)
	require.Regexp(t, `(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z +order +placed +2850 CNY$`, shown.stdout)
	require.Regexp(t, `(?m) dispatch +handled +dispatch\.assign-courier +evt_`, shown.stdout)

	shown = run(t, env, "order", "timeline", id, "-o", "json")
	var way httpapi.TimelineBody
	require.NoError(t, json.Unmarshal([]byte(shown.stdout), &way), "%s", shown)
	require.Equal(t, "placed", way.Steps[0].Step)

	shown = run(t, env, "order", "timeline", "nobody")
	require.Equal(t, 1, shown.code)
	require.Contains(t, shown.stderr, "there is no order nobody")
}
