package httpapi

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/app"
	"takeout/domain"
)

// broken is a database that answers everything with an error.
type broken struct{ error }

func (b broken) InTx(context.Context, func(context.Context, app.OrderTx) error) error { return b.error }
func (b broken) View(context.Context, func(context.Context, app.OrderTx) error) error { return b.error }

func TestWhatWentWrongUnderneathIsInTheLogAndNotInTheAnswer(t *testing.T) {
	t.Parallel()
	secret := errors.New("dial tcp 10.0.0.7:3306: user takeout, password hunter2")
	for _, row := range []struct {
		err        error
		status     int
		code       string
		retryAfter string
	}{
		{secret, 500, "internal_error", ""},
		{&domain.Error{Kind: domain.Unknown, Code: "row_damaged", Message: "it is damaged", Cause: secret}, 500, "internal_error", ""},
		{&domain.Error{Kind: domain.Unavailable, Code: "database_unavailable", Message: "the order database is not available", Cause: secret}, 503, "database_unavailable", "1"},
		{&domain.Error{Kind: domain.Busy, Code: "lock_wait", Message: "somebody else has it", Cause: secret}, 409, "lock_wait", "1"},
	} {
		var log strings.Builder
		handler := New(Config{Orders: app.NewOrders(broken{row.err}), Metrics: http.NotFoundHandler()}, slog.New(slog.NewTextHandler(&log, nil)))
		for _, r := range []*http.Request{
			httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v1/orders/o1", nil),
			httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v1/orders", nil),
			httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/orders", strings.NewReader(`{"name":"x","amount":1}`)),
			httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/v1/orders/o1/cancel", nil),
		} {
			r.Header.Set("Content-Type", "application/json")
			r.Header.Set("X-Request-Id", "req_of_a_test")
			answer := httptest.NewRecorder()
			handler.ServeHTTP(answer, r)
			require.Equal(t, row.status, answer.Code, "%s %s: %s", r.Method, r.URL, answer.Body)
			require.Contains(t, answer.Body.String(), `"code":"`+row.code+`"`)
			require.NotContains(t, answer.Body.String(), "hunter2")
			require.NotContains(t, answer.Body.String(), "10.0.0.7")
			require.Equal(t, row.retryAfter, answer.Header().Get("Retry-After"))
		}
		require.Equal(t, 4, strings.Count(log.String(), "hunter2"), "whoever may read the log sees it: %s", log.String())
		require.Equal(t, 4, strings.Count(log.String(), "request_id=req_of_a_test"), "under the request's id")
	}
}

// panicking is a database that does what nobody expects.
type panicking struct{ broken }

func (panicking) View(context.Context, func(context.Context, app.OrderTx) error) error {
	panic("hunter2")
}

func TestPanicIsAnsweredAndLogged(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	handler := New(Config{Orders: app.NewOrders(panicking{}), Metrics: http.NotFoundHandler()}, slog.New(slog.NewTextHandler(&log, nil)))
	answer := httptest.NewRecorder()
	handler.ServeHTTP(answer, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/v1/orders/o1", nil))
	require.Equal(t, http.StatusInternalServerError, answer.Code)
	require.Contains(t, answer.Body.String(), `"code":"internal_error"`)
	require.NotContains(t, answer.Body.String(), "hunter2")
	require.Contains(t, log.String(), "panic=hunter2")
}

func TestRefusalsOfOneKindDoNotFloodTheLogAndAreCounted(t *testing.T) {
	t.Parallel()
	r := refusals{byCode: map[string]refused{}}
	now := time.Now()
	told := func(code string, times int) (lines, leftOut int) {
		for range times {
			if tell, untold := r.tell(code, now); tell {
				lines, leftOut = lines+1, leftOut+untold
			}
		}
		return lines, leftOut
	}
	lines, leftOut := told("database_unavailable", 500)
	require.Equal(t, []int{10, 0}, []int{lines, leftOut})
	lines, leftOut = told("lock_wait", 1)
	require.Equal(t, []int{1, 0}, []int{lines, leftOut}, "another trouble is told")
	now = now.Add(time.Second)
	lines, leftOut = told("database_unavailable", 20)
	require.Equal(t, []int{10, 490}, []int{lines, leftOut})
}
