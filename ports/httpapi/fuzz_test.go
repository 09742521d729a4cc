package httpapi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/ports/httpapi"
	"takeout/ports/messaging"
)

// api is the real handler over real databases, and what it logs as an error.
type api struct {
	http.Handler
	mu     sync.Mutex
	errors bytes.Buffer
}

func (a *api) Write(p []byte) (int, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.errors.Write(p)
}

func open(f *testing.F) *api {
	f.Helper()
	dir, quiet := f.TempDir(), slog.New(slog.DiscardHandler)
	orders, err := sqlstore.OpenOrders("sqlite:"+filepath.Join(dir, "order.db"), nil, quiet)
	require.NoError(f, err)
	f.Cleanup(func() { _ = orders.Close() })
	dispatches, err := sqlstore.OpenDispatches("sqlite:"+filepath.Join(dir, "dispatch.db"), nil, quiet)
	require.NoError(f, err)
	f.Cleanup(func() { _ = dispatches.Close() })
	_, err = orders.Migrate(context.Background())
	require.NoError(f, err)
	_, err = dispatches.Migrate(context.Background())
	require.NoError(f, err)

	a := &api{}
	use := app.NewDispatches(dispatches, app.DispatchPolicy{})
	li, err := dispatch.ParseCourierID("li")
	require.NoError(f, err)
	courier, err := dispatch.NewCourier(li, "Li", true, 0)
	require.NoError(f, err)
	require.NoError(f, use.AddCourier(context.Background(), courier))
	body, err := event.Encode("evt_1", time.Now(), event.OrderPlaced{Order: event.Order{OrderID: "o1", Name: "x", Amount: 1, Currency: "CNY", Status: "placed", Version: 1, PlacedAt: time.Now()}})
	require.NoError(f, err)
	require.NoError(f, dispatches.Keep(context.Background(), app.Failure{Consumer: "dispatch.assign-courier", MessageID: "evt_1", OrderID: "o1", Class: "permanent", Code: "c", Error: "e", Payload: body}))
	desk := app.NewFailureDesk(map[string]app.FailureStore{"order": orders, "dispatch": dispatches},
		messaging.Validator(messaging.Topology(app.UseCases{}, true)), nil)
	a.Handler = httpapi.New(httpapi.Config{
		Orders: app.NewOrders(orders), Dispatches: use, Compensation: app.NewCompensation(orders, 100), Failures: desk,
		Health: func(context.Context) httpapi.Health { return httpapi.Health{} }, Metrics: http.NotFoundHandler(), Version: "test",
	}, slog.New(slog.NewTextHandler(a, &slog.HandlerOptions{Level: slog.LevelError})))
	return a
}

// ask sends a request past net/http, which would refuse some of it by itself. Whatever it is, the answer is no 5xx, the
// log has no error, and a problem is short and JSON.
func (a *api) ask(t *testing.T, method, path string, body []byte, headers http.Header) *httptest.ResponseRecorder {
	t.Helper()
	u, err := url.ParseRequestURI(path)
	if err != nil {
		return nil // net/http answers 400, and nothing of ours is asked
	}
	request := httptest.NewRequest(method, "/", bytes.NewReader(body))
	request.URL, request.RequestURI, request.Header = u, path, headers
	recorder := httptest.NewRecorder()
	a.ServeHTTP(recorder, request)
	a.mu.Lock()
	defer a.mu.Unlock()
	require.Empty(t, a.errors.String())
	require.Less(t, recorder.Code, 500, "%s", recorder.Body)
	if recorder.Code >= 400 {
		require.LessOrEqual(t, recorder.Body.Len(), 1024, "%s", recorder.Body)
		require.Equal(t, "application/problem+json", recorder.Header().Get("Content-Type"))
		var p httpapi.Problem
		require.NoError(t, json.Unmarshal(recorder.Body.Bytes(), &p))
		require.False(t, strings.ContainsAny(p.Detail+p.Instance, "\x00\r\n\x1b\u202e<"), "%q", p.Detail+p.Instance)
	}
	return recorder
}

func FuzzOrderThatIsPlacedIsTheOneThatWasSent(f *testing.F) {
	a := open(f)
	for _, body := range []string{
		`{"name":"Mapo tofu","amount":2850}`, `{"order_id":"o-1","name":"麻婆豆腐","amount":1,"currency":"EUR"}`, `{"name":"\ud83c\udf5c","amount":2147483647}`, `{}`, `[]`, ``, `null`,
		`{"name":"x","amount":1.5}`, `{"name":"x","amount":1e3}`, `{"name":"x","amount":1,"amount":2}`, `{"n\u0061me":"x","amount":1}`, `{"name":"\ud800","amount":1}`, "{\"name\":\"\xff\",\"amount\":1}",
		`{"name":"x","amount":-0}`, `{"name":"x","amount":1}{}`, "\xef\xbb\xbf{}", `{"name":"\u0000","amount":1}`, strings.Repeat("[", 17), `{"name":null,"amount":null,"order_id":null}`,
	} {
		f.Add([]byte(body), "application/json", "", "")
	}
	good := []byte(`{"name":"x","amount":1}`)
	for _, kind := range []string{"", "text/xml", "application/json; charset=utf-16", "application/json;charset=\"UTF-8\"", "application/json; charset", "\xff", "application/json, application/json"} {
		f.Add(good, kind, "key", "id")
	}
	for _, key := range []string{`"quoted"`, `"`, `""`, "a b", "\x00", strings.Repeat("k", 256), "é"} {
		f.Add(good, "application/json", key, key)
	}
	f.Fuzz(func(t *testing.T, body []byte, kind, key, requestID string) {
		headers := http.Header{"Content-Type": {kind}, "X-Request-Id": {requestID}}
		if key != "" {
			headers["Idempotency-Key"] = []string{key}
		}
		answer := a.ask(t, http.MethodPost, "/v1/orders", body, headers)
		if answer.Code >= 400 {
			return
		}
		var sent struct {
			OrderID  *string `json:"order_id"`
			Name     string
			Amount   int64
			Currency *string
		}
		var placed, shown httpapi.OrderBody
		require.NoError(t, json.Unmarshal(body, &sent))
		require.NoError(t, json.Unmarshal(answer.Body.Bytes(), &placed))
		require.Equal(t, sent.Name, placed.Name)
		require.Equal(t, sent.Amount, placed.Amount)
		if sent.OrderID != nil {
			require.Equal(t, *sent.OrderID, placed.OrderID)
		}
		if sent.Currency != nil {
			require.Equal(t, *sent.Currency, placed.Currency)
		}
		get := a.ask(t, http.MethodGet, "/v1/orders/"+placed.OrderID, nil, http.Header{})
		require.Equal(t, 200, get.Code)
		require.NoError(t, json.Unmarshal(get.Body.Bytes(), &shown))
		require.Equal(t, placed, shown)
	})
}

func FuzzNoBodyMakesAnErrorOfOurs(f *testing.F) {
	a := open(f)
	paths := []string{
		"POST /v1/orders/%/cancel", "POST /v1/couriers", "PATCH /v1/couriers/%", "POST /v1/dispatches/%/delivered", "POST /v1/failures/%/retry",
		"POST /v1/failures/%/edit", "POST /v1/failures/%/discard", "POST /v1/failures/retry", "POST /v1/compensation/resume",
	}

	for i := range paths {
		for _, id := range []string{"o1", "li", "dispatch-1", "", "..", "%", "\x00", "\xff", "é", strings.Repeat("x", 65)} {
			f.Add(uint8(i), id, []byte(`{"reason":"x"}`), "me")
		}
		for _, body := range []string{
			``, `{}`, `[]`, `{"reason":1}`, `{"name":"x","capacity":1,"on_duty":false}`, `{"capacity":-9223372036854775808}`, `{"data":{"order_id":"o1","version":1}}`, `{"payload":"{}"}`,
			`{"all":true,"limit":1,"rate_per_second":1}`, `{"all":true,"dry_run":true}`, `{"filter":{"since":"9999-12-31T23:59:59-14:00"}}`, `{"filter":{"text":"%_\\"},"dry_run":true}`, `{"data":null}`, `{"reason":"\u0000"}`,
		} {
			f.Add(uint8(i), "dispatch-1", []byte(body), "")
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, id string, body []byte, operator string) {
		method, path, _ := strings.Cut(paths[int(which)%len(paths)], " ")
		headers := http.Header{"Content-Type": {"application/json"}}
		if operator != "" {
			headers["X-Operator"] = []string{operator}
		}
		a.ask(t, method, strings.Replace(path, "%", url.PathEscape(id), 1), body, headers)
		a.ask(t, http.MethodGet, "/v1/failures/dispatch-1", nil, http.Header{})
		a.ask(t, http.MethodGet, "/v1/couriers", nil, http.Header{})
	})
}

func FuzzNoCursorOrFilterMakesAnErrorOfOurs(f *testing.F) {
	a := open(f)
	for _, cursor := range []string{"", "1", "0", "-1", "zz", "1y2p0ij32e8e7", "dispatch-1", "dispatch-1.order-1", "dispatch-1.dispatch-2", "dispatch-9223372036854775807", "order-", ".", "\x00", "\xff", "+1", "_1"} {
		f.Add(cursor, "x", "2026-01-01T00:00:00Z", "open")
	}
	for _, text := range []string{"%", "_", "\\", "'", "\x00", "\xff", "\u202e", strings.Repeat("é", 200)} {
		f.Add("", text, "0000-01-01T00:00:00Z", "any")
		f.Add("", text, "9999-12-31T23:59:59-23:59", text)
	}
	f.Fuzz(func(t *testing.T, cursor, text, since, state string) {
		a.ask(t, http.MethodGet, "/v1/orders?"+url.Values{"cursor": {cursor}}.Encode(), nil, http.Header{})
		a.ask(t, http.MethodGet, "/v1/orders?"+text, nil, http.Header{})
		filter := url.Values{"text": {text}, "since": {since}, "state": {state}}
		a.ask(t, http.MethodGet, "/v1/failures/groups?"+filter.Encode(), nil, http.Header{})
		filter.Set("cursor", cursor)
		a.ask(t, http.MethodGet, "/v1/failures?"+filter.Encode(), nil, http.Header{})
	})
}
