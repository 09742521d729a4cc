package tests

import (
	"context"
	"database/sql"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqldb"
	"takeout/app"
	"takeout/verify/check"
	"takeout/verify/history"
)

// TestManyOrdersAreCheckedInTimeThatGrowsWithTheirNumber checks as many orders as TAKEOUT_TEST_CHECK_ORDERS says, such as
// a million, which takes minutes to fill in.
func TestManyOrdersAreCheckedInTimeThatGrowsWithTheirNumber(t *testing.T) {
	orders := 3000
	if text := os.Getenv("TAKEOUT_TEST_CHECK_ORDERS"); text != "" {
		var err error
		orders, err = strconv.Atoi(text)
		require.NoError(t, err, "TAKEOUT_TEST_CHECK_ORDERS")
	}
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{}, 0, 0)
		c.addCourier(t, "zhao", 0)
		in := c.fillIn(t, history.Plan{Seed: 9, Orders: orders})
		began := time.Now()
		r, err := check.Run(t.Context(), in, func(stage string) { t.Logf("%6.1f s, %s MB: %s", time.Since(began).Seconds(), peak(), stage) })
		require.NoError(t, err)
		require.True(t, r.OK(), "%v %v", r.ViolationCount, r.Violations)
		require.EqualValues(t, 5*r.Acknowledged, r.Handled)
		t.Logf("%d orders with %d events and %d inbox rows were checked in %s; the most memory that this process ever had, tables being filled included, was %s MB",
			orders, r.Events, r.Handled, time.Since(began).Round(100*time.Millisecond), peak())

		n := alter(t, st.dispatch, "DELETE FROM platoon WHERE id % 50 = 7")
		r, err = check.Run(t.Context(), in, nil)
		require.NoError(t, err)
		require.Equal(t, map[string]int{"I1 lost": int(n)}, r.ViolationCount)
		require.Equal(t, int(n), r.Count("lost"))
		require.Len(t, r.Violations, check.MaxDetails)
	})
}

// peak returns the most memory that this process had, in MB.
func peak() string {
	status, _ := os.ReadFile("/proc/self/status")
	if m := regexp.MustCompile(`VmHWM:\s+(\d+) kB`).FindSubmatch(status); m != nil {
		kB, _ := strconv.Atoi(string(m[1]))
		return strconv.Itoa(kB / 1024)
	}
	return "?"
}

// fillIn fills the tables with what a healthy system would hold after everything that is planned was placed and nothing
// was cancelled or delivered, and returns the checker's input.
func (c *choreography) fillIn(t testing.TB, plan history.Plan) check.Input {
	t.Helper()
	dbs := map[string]*sqldb.DB{}
	for i, service := range []string{"order", "dispatch", "payment", "points"} {
		dbs[service] = c.databases[i]
	}
	seen := history.New(plan.Orders)
	at := time.Now().UTC().Truncate(time.Microsecond)
	id := func(i int) string {
		if o := plan.Order(i); o.ID != "" {
			return o.ID
		}
		return fmt.Sprintf("ord_01938c1e-7a2b-7c3d-8e4f-%012d", i)
	}
	for i := range plan.Orders {
		if plan.Order(i).Amount == 0 {
			seen.Placed(i, history.Refused, "")
			continue
		}
		seen.Placed(i, history.OK, id(i))
	}
	event := func(key string, i int) string { return fmt.Sprintf("evt_%s-7a2b-7c3d-8e4f-%012d", key, i) }
	fill := func(service, into string, row func(i int, o history.Order) []any) {
		fillTable(t, dbs[service], into, plan.Orders, func(i int) []any {
			if o := plan.Order(i); o.Amount > 0 {
				return row(i, o)
			}
			return nil
		})
	}
	fill("order", "order_info (orderId, name, order_money, currency, status, version, courier_id, assigned_at, placed_at, points)", func(i int, o history.Order) []any {
		return []any{id(i), o.Name, o.Amount, o.Currency, "dispatched", 2, "zhao", at, at, o.Amount / 100}
	})
	fill("order", "idempotency_answer (request_key, fingerprint, orderId, body, created_at)", func(i int, o history.Order) []any {
		if o.Key == "" {
			return nil
		}
		body := fmt.Sprintf(`{"order_id":%q,"name":%q,"amount":%d,"currency":%q,"status":"placed","version":1,"placed_at":%q}`,
			id(i), o.Name, o.Amount, o.Currency, at.Format(time.RFC3339Nano))
		return []any{[]byte(o.Key), make([]byte, 32), id(i), []byte(body), at}
	})
	fill("dispatch", "platoon (orderId, name, order_money, currency, state, order_version, takeout_userId, assigned_at, placed_at)", func(i int, o history.Order) []any {
		return []any{id(i), o.Name, o.Amount, o.Currency, "assigned", 1, "zhao", at, at}
	})
	fill("payment", "payment (orderId, name, order_money, currency, state, order_version, reference, reason, placed_at)", func(i int, o history.Order) []any {
		return []any{id(i), o.Name, o.Amount, o.Currency, "succeeded", 1, "sim_" + id(i), "", at}
	})
	fill("payment", "simulated_charge (orderId, amount, currency, reference, charged_at, calls)", func(i int, o history.Order) []any {
		return []any{id(i), o.Amount, o.Currency, "sim_" + id(i), at, 1}
	})
	fill("points", "points_entry (orderId, kind, points, placed_at, at)", func(i int, o history.Order) []any {
		return []any{id(i), "award", o.Amount / 100, at, at}
	})
	for _, key := range []string{"order.placed", "dispatch.assigned", "payment.succeeded", "points.awarded"} {
		service, _, _ := strings.Cut(key, ".")
		fill(service, "outbox_confirmed (event_id, event_key, order_id, created_at, confirmed_at)", func(i int, _ history.Order) []any {
			return []any{event(key, i), key, id(i), at, at}
		})
	}
	for consumer, key := range map[string]string{
		"dispatch.assign-courier": "order.placed", "payment.charge-order": "order.placed", "order.mark-dispatched": "dispatch.assigned",
		"points.award-points": "payment.succeeded", "order.record-points": "points.awarded",
	} {
		service, _, _ := strings.Cut(consumer, ".")
		fill(service, "inbox (consumer, event_id, body_hash, handled_at, order_id)", func(i int, _ history.Order) []any {
			return []any{consumer, event(key, i), make([]byte, 32), at, id(i)}
		})
	}
	return check.Input{
		Plan: plan, History: seen,
		Databases: map[string]string{"order": c.order, "dispatch": c.dispatch, "payment": c.payment, "points": c.stack.points},
	}
}

// fillTable inserts the rows that row returns for 0 to n-1, leaving out nil.
func fillTable(t testing.TB, db *sqldb.DB, into string, n int, row func(i int) []any) {
	t.Helper()
	columns := strings.Count(into, ",") + 1
	one := "(?" + strings.Repeat(", ?", columns-1) + ")"
	for done := 0; done < n; {
		require.NoError(t, db.InTx(context.Background(), func(ctx context.Context, tx *sql.Tx) error {
			for range 10 {
				var args []any
				for ; done < n && len(args) < 1000*columns; done++ {
					args = append(args, row(done)...)
				}
				if len(args) == 0 {
					return nil
				}
				rows := one + strings.Repeat(", "+one, len(args)/columns-1)
				if _, err := tx.ExecContext(ctx, "INSERT INTO "+into+" VALUES "+rows, args...); err != nil {
					return err
				}
			}
			return nil
		}))
	}
}
