package tests

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/ports/httpapi"
)

func listen(t testing.TB) net.Listener {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	return listener
}

func TestPlacedOrderIsDispatchedOnce(t *testing.T) {
	inEveryLayout(t, func(t *testing.T, s *system) {
		id := s.place(t, "Mapo tofu", 2850)
		o := s.awaitDispatched(t, id)
		courier := o.Dispatch.CourierID
		require.Equal(t, "Mapo tofu", o.Name)
		require.EqualValues(t, 2850, o.Amount)
		require.Equal(t, "CNY", o.Currency)
		require.EqualValues(t, 2, o.Version)

		a := mustGet(t, s.dispatchAPI+"/v1/dispatches/"+id)
		require.Equal(t, http.StatusOK, a.status)
		require.Contains(t, string(a.body), `"courier_id":"`+courier+`"`)
		require.Equal(t, 1, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND takeout_userId = ?", id, courier))
		require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE orderId = ? AND name = 'Mapo tofu' AND order_money = 2850", id))
		s.noFailures(t)
	})
}

func TestManyOrdersAtOnceAreEachDispatchedOnce(t *testing.T) {
	inEveryLayout(t, func(t *testing.T, s *system) {
		s.addCourier(t, "qian", 0)
		const orders = 200
		s.placeMany(t, orders, 16)
		s.awaitAllDispatched(t, orders)
		require.Positive(t, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE takeout_userId = 'qian'"), "both couriers carry orders")
		s.noFailures(t)
	})
}

// placeMany places n orders, as many at a time as concurrency says.
func (s *system) placeMany(t testing.TB, n, concurrency int) {
	t.Helper()
	var clients sync.WaitGroup
	next := make(chan int)
	failures := make(chan error, n)
	for range concurrency {
		clients.Go(func() {
			for i := range next {
				a, err := send(http.MethodPost, s.api+"/v1/orders", fmt.Sprintf(`{"name":"order %d","amount":%d}`, i, i+1))
				if err == nil && a.status != http.StatusCreated {
					err = fmt.Errorf("%s", a)
				}
				if err != nil {
					failures <- err
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	clients.Wait()
	close(failures)
	for err := range failures {
		require.NoError(t, err)
	}
}

// awaitAllDispatched waits until n orders are dispatched, and checks that both sides agree on each.
func (s *system) awaitAllDispatched(t testing.TB, n int) {
	t.Helper()
	within(t, 90*time.Second, fmt.Sprintf("%d orders are dispatched", n), func() error {
		if got := s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE status = 'dispatched'"); got != n {
			return fmt.Errorf("%d are", got)
		}
		return nil
	})
	s.checkAgreement(t, n)
}

// checkAgreement checks that the tables of the two services hold the same n orders.
func (s *system) checkAgreement(t testing.TB, n int) {
	t.Helper()
	require.Equal(t, n, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon"))
	require.Equal(t, n, s.dispatchRows(t, "SELECT COUNT(DISTINCT orderId) FROM platoon"))
	type row struct {
		name, currency, courier string
		money                   int64
	}
	read := func(url, query string) map[string]row {
		rows, err := database(t, url).Query(query)
		require.NoError(t, err)
		defer rows.Close()
		all := map[string]row{}
		for rows.Next() {
			var id string
			var r row
			require.NoError(t, rows.Scan(&id, &r.name, &r.money, &r.currency, &r.courier))
			all[id] = r
		}
		require.NoError(t, rows.Err())
		return all
	}
	orders := read(s.order, "SELECT orderId, name, order_money, currency, COALESCE(courier_id, '') FROM order_info")
	dispatches := read(s.dispatch, "SELECT orderId, name, order_money, currency, takeout_userId FROM platoon")
	require.Equal(t, orders, dispatches, "the order table and the dispatch table agree")
}

type orderPage struct {
	Items      []httpapi.OrderBody `json:"items"`
	NextCursor string              `json:"next_cursor"`
}

func (s *system) list(t testing.TB, query string) orderPage {
	t.Helper()
	a := mustGet(t, s.api+"/v1/orders?"+query)
	require.Equal(t, http.StatusOK, a.status, "%s", a)
	var page orderPage
	require.NoError(t, json.Unmarshal(a.body, &page))
	return page
}

func contains(body []byte, text string) bool { return strings.Contains(string(body), text) }

func TestOrderKeepsItsPlaceInTheList(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		var placed []string
		for i := range 5 {
			placed = append(placed, s.place(t, fmt.Sprintf("order %d", i), 100))
		}
		for _, id := range placed {
			s.awaitDispatched(t, id)
		}
		var listed []string
		for cursor := ""; ; {
			page := s.list(t, "limit=2&status=dispatched&cursor="+cursor)
			for _, o := range page.Items {
				listed = append(listed, o.OrderID)
			}
			if cursor = page.NextCursor; cursor == "" {
				break
			}
		}
		for i, id := range placed {
			require.Equal(t, id, listed[len(placed)-1-i], "newest first, each once")
		}
		require.Len(t, listed, len(placed))
		require.Empty(t, s.list(t, "status=cancelled").Items)
	})
}

// nobodyOnDuty sends all couriers home, also those that a new embedded installation comes with.
func (s *system) nobodyOnDuty(t testing.TB) {
	t.Helper()
	for _, id := range []string{"zhao", "courier-chen", "courier-li", "courier-wang"} {
		a := mustSend(t, http.MethodPatch, s.dispatchAPI+"/v1/couriers/"+id, `{"on_duty":false}`)
		require.Contains(t, []int{http.StatusOK, http.StatusNotFound}, a.status, "%s", a)
	}
}

func TestNobodyOnDutyKeepsOrdersWaitingAndLosesNone(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		s.nobodyOnDuty(t)
		id := s.place(t, "late dinner", 100)
		eventually(t, "readiness says why", func() error {
			a := mustGet(t, s.api+"/readyz")
			if a.status != http.StatusOK || !contains(a.body, "1 orders wait for a courier") || !contains(a.body, "no courier is on duty") {
				return fmt.Errorf("%s", a)
			}
			return nil
		})
		require.NotContains(t, string(mustGet(t, s.api+"/readyz").body), "pauses", "what waits is a row, and holds no message back")
		require.Equal(t, "placed", s.get(t, id).Status)
		a := mustGet(t, s.dispatchAPI+"/v1/dispatches/"+id)
		require.Contains(t, string(a.body), `"state":"waiting"`)
		require.Contains(t, string(a.body), `"courier_id":null`)
		on := mustSend(t, http.MethodPatch, s.dispatchAPI+"/v1/couriers/zhao", `{"on_duty":true}`)
		require.Equal(t, http.StatusOK, on.status, "%s", on)
		s.awaitDispatched(t, id)
		s.noFailures(t)
	})
}

func TestCapacityIsNeverExceeded(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		s.nobodyOnDuty(t)
		s.addCourier(t, "small", 3)
		s.addCourier(t, "large", 7)
		s.placeMany(t, 15, 8)
		s.awaitDispatchRows(t, 10, "SELECT COUNT(*) FROM platoon WHERE state = 'assigned'")
		s.awaitDispatchRows(t, 5, "SELECT COUNT(*) FROM platoon WHERE state = 'waiting'")
		require.Equal(t, 3, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE takeout_userId = 'small'"))
		require.Equal(t, 7, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE takeout_userId = 'large'"))
		raised := mustSend(t, http.MethodPatch, s.dispatchAPI+"/v1/couriers/small", `{"capacity":8}`)
		require.Equal(t, http.StatusOK, raised.status, "%s", raised)
		s.awaitAllDispatched(t, 15)
		require.Equal(t, 8, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE takeout_userId = 'small'"))
		s.noFailures(t)
	})
}
