package tests

import (
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/app/reconcile"
	"takeout/ports/httpapi"
	"takeout/service"
)

// scale is how many orders there are, of which a thousand are deleted or changed. TAKEOUT_TEST_RECONCILE_ORDERS sets
// another number, such as a million, which takes minutes.
func scale(t testing.TB) int {
	text := os.Getenv("TAKEOUT_TEST_RECONCILE_ORDERS")
	switch {
	case text == "" && raceEnabled:
		return 5_000
	case text == "":
		return 50_000
	}
	n, err := strconv.Atoi(text)
	require.NoError(t, err, "TAKEOUT_TEST_RECONCILE_ORDERS")
	return n
}

const (
	perMinute  = 500
	driftsEach = 100 // of nine kinds that are repaired, and as many amounts
)

// kindOf returns the kind of the i-th change among many.
func kindOf(i int) drift {
	var repaired, amounts []drift
	for _, d := range drifts {
		switch {
		case d.class == reconcile.AmountMismatch:
			amounts = append(amounts, d)
		case !d.person && !d.ended:
			repaired = append(repaired, d)
		}
	}
	if kind := i / driftsEach; kind < 9 {
		return repaired[kind]
	}
	return amounts[i%len(amounts)]
}

// fill inserts orders with their dispatches, those of a minute after those of the other.
func (s *system) fill(t testing.TB, n int) {
	t.Helper()
	begin := time.Now().UTC().Truncate(time.Minute).Add(-time.Duration(n/perMinute+60) * time.Minute)
	tables := map[string]string{
		s.order:    "INSERT INTO order_info (orderId, name, order_money, currency, version, placed_at, assigned_at, status, courier_id) VALUES ",
		s.dispatch: "INSERT INTO platoon (orderId, name, order_money, currency, order_version, placed_at, assigned_at, state, takeout_userId) VALUES ",
	}
	states := map[string]string{s.order: "dispatched", s.dispatch: "assigned"}
	for url, insert := range tables {
		for done := 0; done < n; {
			some := min(1000, n-done)
			args := make([]any, 0, 9*some)
			for i := done; i < done+some; i++ {
				at := begin.Add(time.Duration(i) * time.Minute / perMinute)
				args = append(args, fmt.Sprintf("old-%07d", i), "麻婆豆腐", 2850, "CNY", 1, at, at.Add(time.Second).Truncate(time.Microsecond), states[url], "zhao")
			}
			alter(t, url, insert+strings.TrimSuffix(strings.Repeat("(?, ?, ?, ?, ?, ?, ?, ?, ?), ", some), ", "), args...)
			done += some
		}
		// As they are after years in which they were compared: the notes of this import would be worked off in several runs.
		for alter(t, url, "DELETE FROM reconcile_dirty WHERE id IN (SELECT id FROM (SELECT id FROM reconcile_dirty LIMIT 50000) some)") > 0 {
		}
	}
}

// reconcileLong is reconcile for runs that outlast their request.
func (s *system) reconcileLong(t testing.TB, request string) reconcile.Report {
	t.Helper()
	began := time.Now()
	a := mustSend(t, http.MethodPost, s.api+"/v1/reconciliation", request)
	if a.status == http.StatusOK {
		var r reconcile.Report
		require.NoError(t, json.Unmarshal(a.body, &r), "%s", a)
		require.Empty(t, r.Errors)
		return r
	}
	require.Equal(t, http.StatusAccepted, a.status, "%s", a)
	var shown httpapi.ReconciliationBody
	within(t, 10*time.Minute, "the run ends", func() error {
		shown = s.lastReport(t)
		if shown.Report == nil || shown.Report.StartedAt.Before(began.Add(-time.Second)) {
			return fmt.Errorf("there is no newer report")
		}
		return nil
	})
	require.Empty(t, shown.Report.Errors)
	return *shown.Report
}

// flow places orders until the test is over.
func (s *system) flow(t testing.TB) {
	stop := make(chan struct{})
	var flowing sync.WaitGroup
	flowing.Go(func() {
		for {
			select {
			case <-stop:
				return
			case <-time.After(20 * time.Millisecond):
				if a, err := send(http.MethodPost, s.api+"/v1/orders", `{"name":"x","amount":100}`); err != nil || a.status != http.StatusCreated {
					t.Errorf("an order is refused: %v %s", err, a)
				}
			}
		}
	})
	t.Cleanup(func() { close(stop); flowing.Wait() })
}

func TestDriftAmongManyOrdersIsFoundAndNothingElseWhileOrdersFlow(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		n := scale(t)
		s := reconciled(t, st, func(cfg *service.Config) { cfg.ReconcileBudget = 10_000 })
		s.fill(t, n)
		s.flow(t)
		took := func(r reconcile.Report) time.Duration { return r.FinishedAt.Sub(r.StartedAt) }

		first := s.reconcileLong(t, `{}`)
		require.Empty(t, first.Findings)
		require.GreaterOrEqual(t, first.Compared.Orders, int64(n))
		second := s.reconcileLong(t, `{}`)
		require.Empty(t, second.Findings)
		flowed := s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE name = 'x'")
		require.LessOrEqual(t, second.Compared.Orders, int64(flowed), "none of the old ones is compared again")

		want, persons := map[string]string{}, 0
		for i, at := range rand.Perm(n)[:10*driftsEach] {
			d := kindOf(i)
			if d.person {
				persons++
			}
			id := fmt.Sprintf("old-%07d", at)
			want[id] = d.class
			require.EqualValues(t, 1, alter(t, d.table(s), d.change, id))
		}
		found := s.reconcileLong(t, `{}`)
		got := map[string]string{}
		for _, f := range found.Findings {
			got[f.OrderID] = f.Class
		}
		right, wrong := map[string]int{}, 0
		for id, class := range got {
			if want[id] == class {
				right[class]++
			} else {
				wrong++
			}
		}
		t.Logf("%d orders: first run %s (%d rows), second run %s (%d rows, %.2f %% of the time)", n, took(first), first.Compared.Rows,
			took(second), second.Compared.Rows, 100*took(second).Seconds()/took(first).Seconds())
		expected := map[string]int{}
		for class := range maps.Values(want) {
			expected[class]++
		}
		for _, class := range slices.Sorted(maps.Keys(expected)) {
			t.Logf("%-22s %4d of %4d found", class, right[class], expected[class])
		}
		t.Logf("false findings: %d; finding them took %s", wrong, took(found))
		require.Equal(t, want, got)
		if n >= 1_000_000 {
			require.Less(t, took(second).Seconds(), took(first).Seconds()/100)
		}

		began := time.Now()
		within(t, 3*time.Minute, "everything is repaired but amounts", func() error {
			if r := s.reconcileLong(t, `{"repair":true}`); r.Person != persons || r.Waiting > 0 {
				return fmt.Errorf("%d wait, %d need a person", r.Waiting, r.Person)
			}
			return nil
		})
		t.Logf("repaired within %s", time.Since(began))
		full := s.reconcileLong(t, `{"full":true}`)
		require.Equal(t, map[string]int{reconcile.AmountMismatch: persons}, full.Totals)
		s.noFailures(t)
	})
}
