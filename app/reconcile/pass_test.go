package reconcile_test

import (
	"context"
	"encoding/json"
	"errors"
	"iter"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/app/reconcile"
	"takeout/domain"
	"takeout/domain/event"
)

// scripted is a service's database as reconciliation sees it, that says what the test says. Functions take how often they
// were asked before.
type scripted struct {
	records func(before int) []reconcile.Record // of the order o1
	flights func(before int) reconcile.Flight
	dirty   []reconcile.Dirty
	mark    reconcile.Mark
	fails   map[string]error

	asked   map[string]int
	cleaned []reconcile.Dirty
	marked  int
}

func (s *scripted) times(what string) int {
	if s.asked == nil {
		s.asked = map[string]int{}
	}
	s.asked[what]++
	return s.asked[what] - 1
}

func (s *scripted) Digests(_ context.Context, _ reconcile.Pair, from, to time.Time) (map[int64]reconcile.Digest, error) {
	if orderedAt.Before(from) || !orderedAt.Before(to) {
		return nil, nil
	}
	rows := int64(len(s.records(0)))
	return map[int64]reconcile.Digest{orderedAt.Unix() / 60: {Rows: rows, Sum: rows}}, nil
}

func (s *scripted) Lines(context.Context, reconcile.Pair, time.Time, time.Time) iter.Seq2[reconcile.Line, error] {
	return func(yield func(reconcile.Line, error) bool) {
		if len(s.records(0)) > 0 {
			yield(reconcile.Line{OrderID: "o1", Minute: orderedAt.Unix() / 60, Digest: 1}, nil)
		}
	}
}

func (s *scripted) Cut(_ context.Context, _, to time.Time, _ int) (time.Time, error) { return to, nil }

func (s *scripted) Records(context.Context, []string) (map[string][]reconcile.Record, error) {
	return map[string][]reconcile.Record{"o1": s.records(s.times("records"))}, nil
}

func (s *scripted) Flights(context.Context, []string) (map[string]reconcile.Flight, error) {
	if s.flights == nil {
		return nil, nil
	}
	return map[string]reconcile.Flight{"o1": s.flights(s.times("flights"))}, nil
}

func (s *scripted) Stuck(context.Context, time.Time, int) ([]reconcile.Stuck, error) {
	return nil, s.fails["stuck"]
}
func (s *scripted) Newest(context.Context, string) (time.Time, error) { return time.Now(), nil }
func (s *scripted) Created(context.Context) (time.Time, error) {
	return time.Time{}, s.fails["created"]
}
func (s *scripted) Clock(context.Context) (time.Time, error) { return time.Now(), nil }
func (s *scripted) Watched(context.Context) (bool, error)    { return true, nil }
func (s *scripted) Dirty(context.Context, int) ([]reconcile.Dirty, error) {
	return s.dirty, s.fails["dirty"]
}
func (s *scripted) MarkDirty(context.Context, []int64) error                     { return nil }
func (s *scripted) Mark(context.Context, reconcile.Pair) (reconcile.Mark, error) { return s.mark, nil }

func (s *scripted) Clean(_ context.Context, notes []reconcile.Dirty) error {
	s.cleaned = append(s.cleaned, notes...)
	return nil
}

func (s *scripted) SetMark(context.Context, reconcile.Pair, reconcile.Mark) error {
	s.marked++
	return nil
}

// desk keeps findings. It gives the lease as often as leases says.
type desk struct {
	unresolved []reconcile.Finding
	put        map[string]reconcile.Finding // by class
	leases     int
}

func (d *desk) Unresolved(context.Context, int) ([]reconcile.Finding, error) {
	return d.unresolved, nil
}
func (d *desk) Counts(context.Context) ([]reconcile.FindingCount, error) { return nil, nil }
func (d *desk) SaveReport(context.Context, reconcile.Report) error       { return nil }
func (d *desk) LastReport(context.Context) (reconcile.Report, bool, error) {
	return reconcile.Report{}, false, nil
}
func (d *desk) Release(context.Context, string) error { return nil }
func (d *desk) Lease(context.Context, string, time.Duration) (bool, error) {
	d.leases--
	return d.leases >= 0, nil
}

func (d *desk) Put(_ context.Context, findings []*reconcile.Finding) error {
	for _, f := range findings {
		d.put[f.Class] = *f
	}
	return nil
}

// failing is an order database that does nothing.
type failing struct{ error }

func (f failing) InTx(context.Context, func(context.Context, app.OrderTx) error) error {
	return f.error
}
func (f failing) View(context.Context, func(context.Context, app.OrderTx) error) error {
	return f.error
}

var orderedAt = time.Now().Add(-time.Hour).Truncate(time.Microsecond)

func always(records ...reconcile.Record) func(int) []reconcile.Record {
	return func(int) []reconcile.Record { return records }
}

func ordered(state, courier string) reconcile.Record {
	return reconcile.Record{State: state, Name: "x", Amount: 100, Currency: "CNY", CourierID: courier, PlacedAt: orderedAt, ChangedAt: orderedAt}
}

// reconciled runs once on an order that has no dispatch, but for what the test changes. Whatever is repaired fails with the
// error.
func reconciled(t *testing.T, repair error, change func(orders, dispatches *scripted, d *desk)) (reconcile.Report, *desk) {
	t.Helper()
	orders, dispatches := &scripted{records: always(ordered("placed", ""))}, &scripted{records: always()}
	d := &desk{put: map[string]reconcile.Finding{}, leases: 100}
	change(orders, dispatches, d)
	store := failing{repair}
	r := reconcile.New(map[string]reconcile.Book{"order": orders, "dispatch": dispatches}, d,
		app.UseCases{Orders: app.NewOrders(store), Compensation: app.NewCompensation(store, 100)},
		reconcile.Policy{Grace: time.Minute, Budget: 10}, "a test")
	report, err := r.Run(t.Context(), reconcile.Request{Repair: repair != nil})
	require.NoError(t, err)
	return report, d
}

func TestDifferenceIsNoneWhileAnythingAboutTheOrderMoves(t *testing.T) {
	t.Parallel()
	_, d := reconciled(t, nil, func(*scripted, *scripted, *desk) {})
	require.Contains(t, d.put, reconcile.MissingDispatch, "where nothing moves")
	for name, moves := range map[string]func(orders, dispatches *scripted, d *desk){
		"an event was there before": func(orders, _ *scripted, _ *desk) {
			orders.flights = func(before int) reconcile.Flight { return reconcile.Flight{Events: before == 0} }
		},
		"an event is there after": func(orders, _ *scripted, _ *desk) {
			orders.flights = func(before int) reconcile.Flight { return reconcile.Flight{Events: before == 1} }
		},
		"an event is at the other": func(_, dispatches *scripted, _ *desk) {
			dispatches.flights = func(int) reconcile.Flight { return reconcile.Flight{Events: true} }
		},
		"the dispatch comes while it is looked at": func(_, dispatches *scripted, _ *desk) {
			dispatches.records = func(before int) []reconcile.Record {
				if before < 3 { // the first three, and the first of the second look
					return nil
				}
				return []reconcile.Record{ordered("assigned", "zhao")}
			}
		},
	} {
		report, d := reconciled(t, nil, moves)
		require.Empty(t, d.put, name)
		require.Equal(t, 1, report.InFlight, name)
	}
}

func TestRepairThatCouldNotBeTriedIsNotCounted(t *testing.T) {
	t.Parallel()
	away := domain.Errorf(domain.Unavailable, "database_unavailable", "the order database is not available")
	report, d := reconciled(t, away, func(*scripted, *scripted, *desk) {})
	require.Zero(t, report.Repaired)
	require.NotEmpty(t, report.Errors)
	require.Zero(t, d.put[reconcile.MissingDispatch].Repairs)
	require.Equal(t, reconcile.StateOpen, d.put[reconcile.MissingDispatch].State)
	require.Len(t, report.Findings, 1)
	require.Equal(t, d.put[reconcile.MissingDispatch].State, report.Findings[0].State, "the report says what is stored")
	require.Zero(t, report.Findings[0].Repairs)

	report, d = reconciled(t, errors.New("it cannot be repaired so"), func(*scripted, *scripted, *desk) {})
	require.Equal(t, 1, report.Repaired)
	require.Equal(t, 1, d.put[reconcile.MissingDispatch].Repairs)
}

func TestRepairHasAGraceToShowBeforeItIsTriedAgain(t *testing.T) {
	t.Parallel()
	for ago, want := range map[time.Duration]int{30 * time.Second: 0, 2 * time.Minute: 1} {
		report, _ := reconciled(t, errors.New("it cannot be repaired so"), func(_, _ *scripted, d *desk) {
			at := time.Now().Add(-ago)
			d.unresolved = []reconcile.Finding{{Class: reconcile.MissingDispatch, OrderID: "o1", State: reconcile.StateRepairing, Repairs: 1, RepairedAt: &at}}
		})
		require.Equal(t, want, report.Repaired, "repaired %s ago", ago)
	}
}

func TestWhatCouldNotBeReadIsNotTakenForDone(t *testing.T) {
	t.Parallel()
	notes, broken := []reconcile.Dirty{{ID: 1, Minute: 1}}, map[string]error{"dirty": errors.New("away"), "stuck": errors.New("away")}
	var seen *scripted
	report, d := reconciled(t, nil, func(orders, dispatches *scripted, d *desk) {
		orders.dirty, dispatches.fails, seen = notes, broken, orders
		d.unresolved = []reconcile.Finding{{Class: reconcile.StuckOutbox, OrderID: "o2", State: reconcile.StateOpen}}
	})
	require.NotEmpty(t, report.Errors)
	require.Empty(t, seen.cleaned, "the changes of which these tell may not have been compared")
	require.NotContains(t, d.put, reconcile.StuckOutbox, "it may still be stuck")

	_, d = reconciled(t, nil, func(orders, _ *scripted, d *desk) {
		orders.dirty, seen = notes, orders
		d.unresolved = []reconcile.Finding{{Class: reconcile.StuckOutbox, OrderID: "o2", State: reconcile.StateOpen}}
	})
	require.Equal(t, notes, seen.cleaned)
	require.Equal(t, reconcile.StateResolved, d.put[reconcile.StuckOutbox].State)
}

func TestRunThatLostItsLeaseMarksNothingAsCompared(t *testing.T) {
	t.Parallel()
	for leases, want := range map[int]int{1: 0, 100: 1} {
		var seen *scripted
		reconciled(t, nil, func(orders, _ *scripted, d *desk) { d.leases, seen = leases, orders })
		require.Equal(t, want, seen.marked)
	}
}

// One side was restored from an earlier copy, and lacks what the other had when they were compared.
func TestEverythingIsComparedAgainWhereTheSidesDisagreeAboutHowFarTheyWere(t *testing.T) {
	t.Parallel()
	behind := reconcile.Mark{Minute: time.Now().Unix()/60 - 5, Pass: 7}
	for pass, want := range map[int64]int{7: 0, 6: 1} {
		_, d := reconciled(t, nil, func(orders, dispatches *scripted, _ *desk) {
			orders.mark, dispatches.mark = behind, reconcile.Mark{Minute: behind.Minute, Pass: pass}
		})
		require.Len(t, d.put, want)
	}
}

// What was ordered before payments were taken must not be charged because the order is announced again.
func TestNothingIsChargedByARepairWhileItIsNotKnownSinceWhenPaymentsAreTaken(t *testing.T) {
	t.Parallel()
	ctx, store := t.Context(), opened(t, sqlstore.OpenOrders)
	id, money, o := lost(t, "o1")
	_, err := app.NewOrders(store).Place(ctx, app.PlaceOrder{ID: id, Name: o.Name, Money: money})
	require.NoError(t, err)
	_, err = store.DB().Writer().Exec("UPDATE order_info SET placed_at = ?", orderedAt.UTC())
	require.NoError(t, err)
	d := &desk{put: map[string]reconcile.Finding{}, leases: 100}
	r := reconcile.New(map[string]reconcile.Book{
		"order": &scripted{records: always(ordered("placed", ""))}, "dispatch": &scripted{records: always()},
		"payment": &scripted{records: always(), fails: map[string]error{"created": errors.New("away")}},
	}, d, app.UseCases{Orders: app.NewOrders(store), Compensation: app.NewCompensation(store, 100)},
		reconcile.Policy{Grace: time.Minute, Budget: 10}, "a test")
	report, err := r.Run(ctx, reconcile.Request{Repair: true})
	require.NoError(t, err)
	require.Equal(t, 1, report.Repaired)
	var envelope struct{ Payload []byte }
	var row []byte
	require.NoError(t, store.DB().Reader().QueryRow("SELECT payload FROM outbox ORDER BY id DESC LIMIT 1").Scan(&row))
	require.NoError(t, json.Unmarshal(row, &envelope))
	_, e, err := event.Decode[event.OrderPlaced]("", envelope.Payload)
	require.NoError(t, err)
	require.True(t, e.BeforePayments)
}
