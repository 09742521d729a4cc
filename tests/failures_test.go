package tests

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/event"
	"takeout/ports/httpapi"
	"takeout/ports/messaging"
	"takeout/tests/testenv"
)

// nobody is a queue without a consumer: what is retried there waits where a test can look at it.
const nobody = "dispatch.nobody"

// keep keeps failures in a service's database, as its consumers do.
func keep(t testing.TB, url string, failures ...app.Failure) {
	t.Helper()
	s, err := sqlstore.OpenOrders(url, nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	defer s.Close()
	for _, f := range failures {
		require.NoError(t, s.Keep(context.Background(), f))
	}
}

// givenUpBy is a message that nobody could handle.
func givenUpBy(consumer, messageID, orderID, code, text string) app.Failure {
	return app.Failure{
		Consumer: consumer, MessageID: messageID, OrderID: orderID, Class: "permanent", Code: code, Error: text, Attempts: 1,
		Headers: map[string]string{"x-from": "a test"}, Payload: []byte(`{"id":"` + messageID + `","subject":"` + orderID + `"}`),
	}
}

func (s *system) listFailures(t testing.TB, query string) httpapi.FailureListBody {
	t.Helper()
	return decoded[httpapi.FailureListBody](t, mustGet(t, s.api+"/v1/failures"+query), 200)
}

func (s *system) showFailure(t testing.TB, id string) httpapi.FailureDetailBody {
	t.Helper()
	return decoded[httpapi.FailureDetailBody](t, mustGet(t, s.api+"/v1/failures/"+id), 200)
}

func decoded[T any](t testing.TB, a answer, status int) T {
	t.Helper()
	require.Equal(t, status, a.status, "%s", a)
	var v T
	require.NoError(t, json.Unmarshal(a.body, &v), "%s", a)
	return v
}

func TestFailuresOfAllDatabasesAreListedAndFoundByWhatIsKnownOfThem(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		keep(t, s.dispatch, givenUpBy(nobody, "m1", "o1", "event_malformed", "it is 100% wrong"))
		keep(t, s.order, givenUpBy("order.nobody", "m2", "o2", "order_not_found", "there is no order o2"))
		old := time.Now().UTC()
		keep(t, s.dispatch, givenUpBy(nobody, "m3", "o_3", "order_mismatch", "'; DROP TABLE failure; --"))
		keep(t, s.payment, givenUpBy("payment.nobody", "m4", "", "panic", "没有骑手 Boom"))

		for query, want := range map[string][]string{
			"":                                   {"payment-1", "dispatch-2", "order-1", "dispatch-1"},
			"?handler=" + nobody:                 {"dispatch-2", "dispatch-1"},
			"?class=permanent":                   {"payment-1", "dispatch-2", "order-1", "dispatch-1"},
			"?class=transient":                   {},
			"?code=order_mismatch":               {"dispatch-2"},
			"?order_id=o2":                       {"order-1"},
			"?order_id=o%253":                    {},
			"?order_id=o":                        {},
			"?state=resolved":                    {},
			"?state=any&order_id=o1":             {"dispatch-1"},
			"?text=100%25":                       {"dispatch-1"},
			"?text=%25":                          {"dispatch-1"},
			"?text=_":                            {"dispatch-2"},
			"?text=BOOM":                         {"payment-1"},
			"?text=%E9%AA%91%E6%89%8B":           {"payment-1"},
			"?text=m2":                           {"order-1"},
			"?text=%22subject%22%3A%22o1%22":     {"dispatch-1"},
			"?text=%27%20OR%201%3D1%20--":        {},
			"?text=%27%3B%20DROP%20TABLE":        {"dispatch-2"},
			"?text=%5C":                          {},
			"?since=" + rfc3339(old):             {"payment-1", "dispatch-2"},
			"?until=" + rfc3339(old):             {"order-1", "dispatch-1"},
			"?limit=2":                           {"payment-1", "dispatch-2"},
			"?code=panic&handler=payment.nobody": {"payment-1"},
		} {
			page := s.listFailures(t, query)
			require.Equal(t, want, idsOf(page.Items), query)
			require.Empty(t, page.Unavailable)
		}
		f := s.listFailures(t, "?order_id=o1").Items[0]
		require.Equal(t, "open", f.State)
		require.Equal(t, "it is 100% wrong", f.Error)
		require.Nil(t, f.ClosedAt)
		require.WithinDuration(t, time.Now(), f.FirstFailedAt, time.Minute)
		at := rfc3339(f.LastFailedAt)
		require.Equal(t, []string{"payment-1", "dispatch-2", "order-1", "dispatch-1"}, idsOf(s.listFailures(t, "?since="+at).Items), "at this time or later")
		require.Empty(t, s.listFailures(t, "?until="+at).Items, "before this time")
	})
}

func rfc3339(at time.Time) string { return url.QueryEscape(at.Format(time.RFC3339Nano)) }

func idsOf(failures []httpapi.FailureBody) []string {
	ids := []string{}
	for _, f := range failures {
		ids = append(ids, f.ID)
	}
	return ids
}

func TestPagesOfFailuresShowEachOnceAlthoughOthersCome(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		var want []string
		for i := range 8 {
			place, service := s.order, "order"
			if i%3 == 0 {
				place, service = s.dispatch, "dispatch"
			}
			keep(t, place, givenUpBy("x.nobody", fmt.Sprint("m", i), "o1", "c", "e"))
			number := count(t, place, "SELECT MAX(id) FROM failure")
			want = append([]string{fmt.Sprintf("%s-%d", service, number)}, want...)
		}
		var got []string
		for cursor := ""; ; {
			page := s.listFailures(t, "?limit=3&cursor="+cursor)
			got = append(got, idsOf(page.Items)...)
			keep(t, s.order, givenUpBy("x.nobody", newEventID(), "o1", "c", "e")) // newer than the first page
			if cursor = page.NextCursor; cursor == "" {
				break
			}
		}
		require.Equal(t, want, got)
	})
}

func TestFailuresAreGroupedByTheErrorAndNotByTheOrder(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		for i := range 5 {
			id := fmt.Sprint("o-", i)
			keep(t, s.order, givenUpBy("order.nobody", newEventID(), id, "order_not_found", "there is no order "+id))
		}
		keep(t, s.dispatch, givenUpBy(nobody, "m1", "", "panic", "panic: boom"))
		keep(t, s.order, givenUpBy("order.nobody", "m2", "o-6", "c", "rare"))
		largest := decoded[httpapi.FailureGroupsBody](t, mustGet(t, s.api+"/v1/failures/groups?limit=1"), 200)
		require.Len(t, largest.Items, 1)
		require.Equal(t, 5, largest.Items[0].Count)
		alter(t, s.order, "DELETE FROM failure WHERE message_id = 'm2'")
		groups := decoded[httpapi.FailureGroupsBody](t, mustGet(t, s.api+"/v1/failures/groups"), 200)
		require.Len(t, groups.Items, 2)
		g := groups.Items[0]
		require.Equal(t, "order", g.Service)
		require.Equal(t, "order.nobody", g.Handler)
		require.Equal(t, "there is no order <order>", g.Error)
		require.Equal(t, 5, g.Count)
		require.Equal(t, "order-5", g.Example)
		require.False(t, g.First.After(g.Last))
		require.WithinDuration(t, time.Now(), g.Last, time.Minute)
		require.Equal(t, "panic: boom", groups.Items[1].Error)
		require.Len(t, decoded[httpapi.FailureGroupsBody](t, mustGet(t, s.api+"/v1/failures/groups?code=panic"), 200).Items, 1)
	})
}

func TestFailureIsShownWithItsMessage(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		large := bytes.Repeat([]byte("派"), 1<<20) // three parts, and a character across the place where it is cut
		for i, payload := range [][]byte{[]byte(`{"名":"<b>"}`), {0, 0xff, 0xfe}, large, nil} {
			f := givenUpBy(nobody, fmt.Sprint("m", i), "o1", "c", "e")
			f.Payload = payload
			keep(t, s.dispatch, f)
			id := fmt.Sprint("dispatch-", i+1)
			shown := s.showFailure(t, id)
			require.EqualValues(t, len(payload), shown.PayloadSize)
			require.Equal(t, map[string]string{"x-from": "a test"}, shown.Headers)
			require.Empty(t, shown.Actions)
			switch i {
			case 1:
				require.Equal(t, "base64", shown.PayloadEncoding)
				require.Equal(t, base64.StdEncoding.EncodeToString(payload), shown.Payload)
			case 2:
				require.True(t, shown.PayloadTruncated)
				require.Equal(t, "text", shown.PayloadEncoding)
				require.Equal(t, string(large[:256<<10/3*3]), shown.Payload)
			default:
				require.Equal(t, "text", shown.PayloadEncoding)
				require.Equal(t, string(payload), shown.Payload)
				require.False(t, shown.PayloadTruncated)
			}
			whole := mustGet(t, s.api+"/v1/failures/"+id+"/payload")
			require.Equal(t, 200, whole.status)
			require.True(t, bytes.Equal(payload, whole.body))
			require.Equal(t, "application/octet-stream", whole.header.Get("Content-Type"))
			require.Equal(t, `attachment; filename="`+id+`.bin"`, whole.header.Get("Content-Disposition"))
		}
	})
}

func TestOtherDatabasesAreShownWhileOneIsAway(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		keep(t, s.dispatch, givenUpBy(nobody, "m1", "o1", "c", "e"))
		keep(t, s.payment, givenUpBy("payment.nobody", "m2", "o1", "c", "e"))
		move := func(place, from, to string) {
			store, err := sqlstore.OpenOrders(place, nil, slog.New(slog.DiscardHandler))
			require.NoError(t, err)
			defer store.Close()
			_, err = store.DB().Writer().ExecContext(t.Context(), "ALTER TABLE "+from+" RENAME TO "+to)
			require.NoError(t, err)
		}
		move(s.payment, "failure", "away")
		page := s.listFailures(t, "")
		require.Equal(t, []string{"dispatch-1"}, idsOf(page.Items))
		require.Equal(t, []string{"payment"}, page.Unavailable)
		groups := decoded[httpapi.FailureGroupsBody](t, mustGet(t, s.api+"/v1/failures/groups"), 200)
		require.Equal(t, []string{"payment"}, groups.Unavailable)
		require.Equal(t, 503, mustGet(t, s.api+"/v1/failures/payment-1").status)
		retried := decoded[httpapi.RetriedBody](t, mustSend(t, "POST", s.api+"/v1/failures/retry", `{"all":true}`), 200)
		require.Equal(t, []string{"dispatch-1"}, retried.IDs)
		require.Equal(t, []string{"payment"}, retried.Unavailable)

		for _, place := range []string{s.order, s.dispatch, s.points} {
			move(place, "failure", "away")
		}
		require.Equal(t, "database_unavailable", mustGet(t, s.api+"/v1/failures").problem(t).Code)
		for _, place := range []string{s.order, s.dispatch, s.payment, s.points} {
			move(place, "away", "failure")
		}
	})
}

func TestWhatIsWrongWithARequestAboutFailuresIsSaidAndNothingChanges(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		good := announce(t, "evt_good", "o1", 100)
		readable := givenUpBy("dispatch.assign-courier", "evt_good", "o1", "c", "e")
		readable.Payload = good
		unreadable := givenUpBy("dispatch.assign-courier", "m2", "", "c", "e")
		unreadable.Payload = []byte("hello")
		gone := givenUpBy(nobody, "m3", "", "c", "e")
		gone.Payload = good
		keep(t, s.dispatch, readable, unreadable, gone)

		for _, id := range []string{
			"dispatch-4", "dispatch-0", "dispatch--1", "dispatch-01", "dispatch-+1", "dispatch-1x", "dispatch", "1", "-1", "kitchen-1", "DISPATCH-1",
			"order-1", "dispatch-9223372036854775807", "dispatch-9223372036854775808", "dispatch-1%20", "%27%20OR%201=1", "dispatch-1e0", "%00", strings.Repeat("9", 500),
		} {
			for _, a := range []answer{
				mustGet(t, s.api+"/v1/failures/"+id), mustGet(t, s.api+"/v1/failures/"+id+"/payload"),
				mustSend(t, "POST", s.api+"/v1/failures/"+id+"/retry", `{}`),
				mustSend(t, "POST", s.api+"/v1/failures/"+id+"/discard", `{"reason":"x"}`),
				mustSend(t, "POST", s.api+"/v1/failures/"+id+"/edit", `{"data":{"order_id":"o","version":1}}`),
			} {
				require.Equal(t, 404, a.status, "%s: %s", id, a)
				require.Equal(t, "failure_not_found", a.problem(t).Code, id)
			}
		}
		for query, code := range map[string]string{
			"limit=0": "parameter_invalid", "limit=201": "parameter_invalid", "limit=x": "parameter_invalid", "limit=1e3": "parameter_invalid",
			"state=broken": "parameter_invalid", "since=yesterday": "parameter_invalid", "until=2026": "parameter_invalid",
			"since=2026-01-02T00:00:00Z&until=2026-01-01T00:00:00Z": "filter_invalid", "handler=a%20b": "filter_invalid", "order_id=%C3%A9": "filter_invalid",
			"code=" + strings.Repeat("x", 65): "filter_invalid", "text=" + strings.Repeat("x", 201): "filter_invalid", "text=%FF": "filter_invalid",
			"text=a&text=b": "parameter_invalid", "sort=id": "parameter_invalid", "cursor=x": "cursor_invalid", "cursor=dispatch-1..": "cursor_invalid",
			"cursor=dispatch-0": "cursor_invalid", "cursor=" + strings.Repeat("1", 200): "parameter_invalid", "class=%00": "filter_invalid",
		} {
			a := mustGet(t, s.api+"/v1/failures?"+query)
			require.Equal(t, 400, a.status, "%s: %s", query, a)
			require.Equal(t, code, a.problem(t).Code, query)
			require.Less(t, len(a.body), 1024)
		}
		data := func(member, value string) string {
			var e map[string]json.RawMessage
			require.NoError(t, json.Unmarshal(good, &e))
			var d map[string]json.RawMessage
			require.NoError(t, json.Unmarshal(e["data"], &d))
			d[member] = json.RawMessage(value)
			body, err := json.Marshal(map[string]any{"data": d})
			require.NoError(t, err)
			return string(body)
		}
		for _, wrong := range []struct {
			path, body string
			status     int
			code       string
		}{
			{"dispatch-1/discard", ``, 400, "body_empty"},
			{"dispatch-1/discard", `{}`, 422, "reason_empty"},
			{"dispatch-1/discard", `{"reason":"  "}`, 422, "reason_empty"},
			{"dispatch-1/discard", `{"reason":"` + strings.Repeat("x", 501) + `"}`, 422, "reason_too_long"},
			{"dispatch-1/discard", `{"reason":"a\u0000b"}`, 422, "reason_unreadable"},
			{"dispatch-1/discard", `{"reason":"a\u202eb"}`, 422, "reason_unreadable"},
			{"dispatch-1/discard", `{"reason":1}`, 400, "member_wrong_type"},
			{"dispatch-1/discard", `{"reason":"x","operator":"me"}`, 400, "member_unknown"},
			{"dispatch-1/retry", `[]`, 400, "body_not_an_object"},
			{"dispatch-1/retry", `{"reason":"` + strings.Repeat("x", 501) + `"}`, 422, "reason_too_long"},
			{"dispatch-1/edit", `{}`, 422, "edit_ambiguous"},
			{"dispatch-1/edit", `{"data":{},"payload":"{}"}`, 422, "edit_ambiguous"},
			{"dispatch-1/edit", `{"data":null}`, 422, "event_data_invalid"},
			{"dispatch-1/edit", `{"data":[]}`, 422, "event_data_invalid"},
			{"dispatch-1/edit", `{"data":{"order_id":"o1"}}`, 422, "event_data_invalid"},
			{"dispatch-1/edit", `{"data":{"order_id":"o1","version":1.5}}`, 422, "event_data_invalid"},
			{"dispatch-1/edit", `{"data":{"order_id":"o1","order_id":"o2","version":1}}`, 400, "member_twice"},
			{"dispatch-1/edit", `{"data":` + strings.Repeat("[", 100) + `}`, 400, "body_too_deep"},
			{"dispatch-1/edit", data("amount", `"100"`), 422, "event_malformed"},
			{"dispatch-1/edit", data("version", `0`), 422, "event_version_invalid"},
			{"dispatch-1/edit", data("placed_at", `"yesterday"`), 422, "event_malformed"},
			{"dispatch-1/edit", `{"payload":"hello"}`, 422, "event_malformed"},
			{"dispatch-1/edit", `{"payload":""}`, 422, "event_malformed"},
			{"dispatch-1/edit", `{"payload":"null"}`, 422, "event_malformed"},
			{"dispatch-1/edit", `{"payload":"{}"}`, 422, "event_spec_version"},
			{"dispatch-2/edit", data("amount", `100`), 422, "failure_unreadable"},
			{"dispatch-3/edit", data("amount", `100`), 422, "queue_unknown"},
			{"retry", `{}`, 422, "filter_empty"},
			{"retry", `{"filter":{}}`, 422, "filter_empty"},
			{"retry", `{"filter":{"state":"resolved"}}`, 400, "member_unknown"},
			{"retry", `{"filter":{"handler":"a b"}}`, 422, "filter_invalid"},
			{"retry", `{"filter":{"since":"yesterday"}}`, 400, "member_wrong_type"},
			{"retry", `{"all":true,"limit":0}`, 422, "limit_out_of_range"},
			{"retry", `{"all":true,"limit":10001}`, 422, "limit_out_of_range"},
			{"retry", `{"all":true,"limit":-1}`, 422, "limit_out_of_range"},
			{"retry", `{"all":true,"rate_per_second":0}`, 422, "rate_out_of_range"},
			{"retry", `{"all":true,"rate_per_second":1001}`, 422, "rate_out_of_range"},
			{"retry", `{"all":true,"rate_per_second":0.5}`, 400, "member_wrong_type"},
			{"retry", `{"all":true,"dry_run":"yes"}`, 400, "member_wrong_type"},
			{"retry", `{"all":true,"reason":"\n"}`, 422, "reason_empty"},
		} {
			a := mustSend(t, "POST", s.api+"/v1/failures/"+wrong.path, wrong.body)
			require.Equal(t, wrong.status, a.status, "%s %s: %s", wrong.path, wrong.body, a)
			require.Equal(t, wrong.code, a.problem(t).Code, "%s %s", wrong.path, wrong.body)
			require.Less(t, len(a.body), 1024)
		}
		for _, operator := range []string{strings.Repeat("x", 65), " \u202e", "\u0085"} {
			a := mustSend(t, "POST", s.api+"/v1/failures/dispatch-1/retry", `{}`, "X-Operator", operator)
			require.Equal(t, 400, a.status, "%q: %s", operator, a)
		}
		require.Equal(t, 3, s.dispatchRows(t, "SELECT COUNT(*) FROM failure WHERE state = 'open'"))
		require.Zero(t, s.dispatchRows(t, "SELECT COUNT(*) FROM failure_action"))
		require.Zero(t, s.dispatchRows(t, "SELECT COUNT(*) FROM retry"))
	})
}

func TestWhoDidWhatWithAFailureStaysOnRecord(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		keep(t, s.dispatch, givenUpBy(nobody, "m1", "o1", "c", "e"), givenUpBy(nobody, "m2", "o2", "c", "e"))
		post := func(path, body string, headers ...string) answer {
			return mustSend(t, "POST", s.api+"/v1/failures/"+path, body, headers...)
		}
		require.Equal(t, "retrying", decoded[httpapi.FailureBody](t, post("dispatch-1/retry", "", "X-Operator", "王 Wang"), 200).State)
		again := post("dispatch-1/retry", `{}`)
		require.Equal(t, 409, again.status)
		require.Equal(t, "failure_retrying", again.problem(t).Code)
		discarded := decoded[httpapi.FailureBody](t, post("dispatch-1/discard", `{"reason":"the customer called off"}`), 200)
		require.Equal(t, "discarded", discarded.State)
		require.NotNil(t, discarded.ClosedAt)
		require.Zero(t, s.dispatchRows(t, "SELECT COUNT(*) FROM retry"), "the retry that waited is called off")
		for _, path := range []string{"retry", "discard"} {
			a := post("dispatch-1/"+path, `{"reason":"x"}`)
			require.Equal(t, 409, a.status, "%s", a)
			require.Contains(t, a.problem(t).Detail, "is discarded")
		}
		actions := s.showFailure(t, "dispatch-1").Actions
		require.Len(t, actions, 2)
		require.Equal(t, []string{"retry", "王 Wang", ""}, []string{actions[0].Action, actions[0].Operator, actions[0].Reason})
		require.Equal(t, []string{"discard", "unknown", "the customer called off"}, []string{actions[1].Action, actions[1].Operator, actions[1].Reason})
		require.Equal(t, []string{"dispatch-2"}, idsOf(s.listFailures(t, "").Items))
		require.Equal(t, []string{"dispatch-1"}, idsOf(s.listFailures(t, "?state=discarded").Items))
	})
}

// desk is the failure desk over one database.
func desk(s *orderStore) *app.FailureDesk {
	return app.NewFailureDesk(map[string]app.FailureStore{"order": s}, messaging.Validator(messaging.Topology(app.UseCases{}, true)),
		deskKeys)
}

var deskKeys = event.Keys{[]byte("0123456789abcdef")}

var wang = app.FailureAction{Operator: "wang", Reason: "the cause is gone"}

// waiting is a row of the retry table.
type waiting struct {
	queue, uuid, order, batch string
	failure, tier             int64
	metadata                  map[string]string
	payload                   []byte
	in                        time.Duration // until it is available, when it was asked for
}

func waitingRetries(t testing.TB, s *orderStore) []waiting {
	t.Helper()
	rows, err := s.DB().Reader().QueryContext(t.Context(), "SELECT queue, uuid, order_id, batch, COALESCE(failure_id, 0), tier, metadata, payload, "+
		"available_at - (SELECT MIN(available_at) FROM retry) FROM retry ORDER BY available_at, id")
	require.NoError(t, err)
	defer rows.Close()
	var all []waiting
	for rows.Next() {
		var w waiting
		var metadata []byte
		var micros int64
		require.NoError(t, rows.Scan(&w.queue, &w.uuid, &w.order, &w.batch, &w.failure, &w.tier, &metadata, &w.payload, &micros))
		require.NoError(t, json.Unmarshal(metadata, &w.metadata))
		w.in = time.Duration(micros) * time.Microsecond
		all = append(all, w)
	}
	require.NoError(t, rows.Err())
	return all
}

func TestRetriedMessageGoesToItsConsumerAsItCame(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		f := givenUpBy("order.mark-dispatched", "m1", "o1", "c", "e")
		f.Payload = bytes.Repeat([]byte{0, 0xff, '\'', 'x'}, 600_000) // in many parts
		f.Headers[app.MetadataUndeliverable] = "delivered 5 times"
		require.NoError(t, s.Keep(t.Context(), f))
		retrying, err := desk(s).Retry(t.Context(), app.FailureID{Service: "order", Number: 1}, wang)
		require.NoError(t, err)
		require.Equal(t, app.FailureRetrying, retrying.State)
		rows := waitingRetries(t, s)
		require.Len(t, rows, 1)
		require.True(t, bytes.Equal(f.Payload, rows[0].payload))
		require.Equal(t, map[string]string{"x-from": "a test"}, rows[0].metadata, "and no more that its broker gave it up")
		rows[0].metadata, rows[0].payload = nil, nil
		require.Equal(t, waiting{queue: "order.mark-dispatched", uuid: "m1", order: "o1", failure: 1}, rows[0])
		require.Zero(t, countIn(t, s, "SELECT COUNT(*) FROM retry r JOIN failure f ON f.fingerprint <> r.fingerprint"))
		require.Equal(t, 1, countIn(t, s, "SELECT COUNT(*) FROM retry WHERE available_at <= "+s.DB().Now))
	})
}

// countIn asks a store's tables.
func countIn(t testing.TB, s *orderStore, query string) int {
	t.Helper()
	var n int
	require.NoError(t, s.DB().Reader().QueryRowContext(t.Context(), query).Scan(&n))
	return n
}

func TestOfManyWhoRetryAFailureAtOnceOneDoes(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, open func() *orderStore) {
		const failures, operators = 20, 8
		other := open()
		for i := range failures {
			require.NoError(t, s.Keep(t.Context(), givenUpBy("order.nobody", fmt.Sprint("m", i), "o1", "c", "e")))
		}
		var retried, refused atomic.Int32
		var acting sync.WaitGroup
		for i := range operators {
			d := desk([]*orderStore{s, other}[i%2])
			acting.Go(func() {
				for number := range int64(failures) {
					_, err := d.Retry(context.Background(), app.FailureID{Service: "order", Number: number + 1}, wang)
					switch {
					case err == nil:
						retried.Add(1)
					case domain.KindOf(err) == domain.Conflict:
						refused.Add(1)
					default:
						t.Errorf("unexpected: %v", err)
					}
				}
			})
		}
		acting.Wait()
		require.EqualValues(t, failures, retried.Load())
		require.EqualValues(t, failures*(operators-1), refused.Load())
		require.Len(t, waitingRetries(t, s), failures)
		require.Equal(t, failures, countIn(t, s, "SELECT COUNT(*) FROM failure_action"))
	})
}

func TestManyAreRetriedOldestFirstAndNoFasterThanAsked(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		const n = 250 // more than one statement handles
		for i := range n {
			require.NoError(t, s.Keep(t.Context(), givenUpBy("order.nobody", fmt.Sprintf("m%03d", i), fmt.Sprint("o", i), "c", fmt.Sprint("no order o", i))))
		}
		require.NoError(t, s.Keep(t.Context(), givenUpBy("order.other", "other", "o1", "c", "e")))
		d := desk(s)
		filter := app.FailureFilter{Handler: "order.nobody"}
		preview, err := d.Preview(t.Context(), filter)
		require.NoError(t, err)
		require.Equal(t, n, preview.Matching)
		require.Len(t, preview.Groups, 1)
		require.Equal(t, "order-1", preview.First[0].String())
		require.Zero(t, countIn(t, s, "SELECT COUNT(*) FROM failure WHERE state <> 'open'"), "a preview changes nothing")

		retried, err := d.RetryMany(t.Context(), app.RetryFailures{Filter: filter, Limit: n - 10, PerSecond: 10, Batch: "b1", FailureAction: wang})
		require.NoError(t, err)
		require.Len(t, retried.IDs, n-10)
		rows := waitingRetries(t, s)
		require.Len(t, rows, n-10)
		for i, row := range rows {
			require.Equal(t, fmt.Sprintf("m%03d", i), row.uuid)
			require.Equal(t, "b1", row.batch)
			require.InDelta(t, float64(i)*0.1, row.in.Seconds(), 1, "ten in a second")
		}
		require.Equal(t, n-10, countIn(t, s, "SELECT COUNT(*) FROM failure_action WHERE action = 'retry' AND operator = 'wang'"))
		require.Equal(t, 10, countIn(t, s, "SELECT COUNT(*) FROM failure WHERE state = 'open' AND consumer = 'order.nobody'"))
		require.Equal(t, 1, countIn(t, s, "SELECT COUNT(*) FROM failure WHERE state = 'open' AND consumer = 'order.other'"))
	})
}

func TestLimitOfARetryCountsForAllDatabasesTogether(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		for i := range 2 {
			keep(t, s.order, givenUpBy("order.nobody", fmt.Sprint("m", i), "o1", "c", "e"))
			keep(t, s.dispatch, givenUpBy(nobody, fmt.Sprint("m", i), "o1", "c", "e"))
		}
		a := mustSend(t, "POST", s.api+"/v1/failures/retry", `{"all":true,"limit":3,"rate_per_second":1}`)
		retried := decoded[httpapi.RetriedBody](t, a, 200)
		require.Equal(t, []string{"dispatch-1", "dispatch-2", "order-1"}, retried.IDs)
		require.Empty(t, retried.Batch)
		require.Equal(t, []string{"order-2"}, idsOf(s.listFailures(t, "").Items))
		now := time.Now().UnixMicro()
		require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM retry WHERE available_at > ?", now+500_000), "after those of the other database")
	})
}

func TestMessageTooLargeToBeRetriedStaysOpenAndSaysSo(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		large := givenUpBy("order.nobody", "m1", "", "c", "e")
		large.Payload = bytes.Repeat([]byte("x"), app.MaxRetryPayload+1)
		for at := 1; at < len(large.Payload); at += 1000 {
			large.Payload[at] = byte(at / 1000)
		}
		require.NoError(t, s.Keep(t.Context(), large))
		large.Payload, large.MessageID = large.Payload[1:], "m2"
		require.NoError(t, s.Keep(t.Context(), large))
		_, err := desk(s).Retry(t.Context(), app.FailureID{Service: "order", Number: 1}, wang)
		require.Equal(t, domain.Invalid, domain.KindOf(err))
		require.ErrorContains(t, err, "discard it")
		retried, err := desk(s).RetryMany(t.Context(), app.RetryFailures{Limit: 10, PerSecond: 1, FailureAction: wang})
		require.NoError(t, err)
		require.Equal(t, []app.FailureID{{Service: "order", Number: 2}}, retried.IDs, "the largest that can be")
		require.Equal(t, []app.FailureID{{Service: "order", Number: 1}}, retried.TooLarge)
		require.True(t, bytes.Equal(large.Payload, waitingRetries(t, s)[0].payload), "it comes to its consumer as it was")
		require.Equal(t, 1, countIn(t, s, "SELECT COUNT(*) FROM failure WHERE state = 'open'"))
	})
}

// The worker has kept the failure again, and has not settled the row of the retry yet.
func TestFailureThatFailedAgainCanBeRetriedAtOnce(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		require.NoError(t, s.Keep(t.Context(), givenUpBy("order.nobody", "m1", "o1", "c", "e")))
		id := app.FailureID{Service: "order", Number: 1}
		_, err := desk(s).Retry(t.Context(), id, wang)
		require.NoError(t, err)
		_, err = s.DB().Writer().ExecContext(t.Context(), "UPDATE failure SET state = 'open'")
		require.NoError(t, err)
		before := countIn(t, s, "SELECT id FROM retry")
		_, err = desk(s).Retry(t.Context(), id, wang)
		require.NoError(t, err)
		require.Equal(t, 1, countIn(t, s, "SELECT COUNT(*) FROM retry"))
		require.NotEqual(t, before, countIn(t, s, "SELECT id FROM retry"), "settling the old one must not take the new one away")
	})
}

func TestCorrectedMessageIsANewEventAndTheOriginalStays(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		original := announce(t, "evt_original", "o1", 100)
		f := givenUpBy("order.mark-dispatched", "evt_original", "o1", "c", "e")
		f.Payload = bytes.Replace(original, []byte("order.placed"), []byte("dispatch.assigned"), 1)
		require.NoError(t, s.Keep(t.Context(), f))
		data := `{"order_id":"o2","courier_id":"li","assigned_at":"2026-01-02T03:04:05Z","version":7}`
		replaced, err := desk(s).Edit(t.Context(), app.FailureID{Service: "order", Number: 1},
			app.FailureEdit{EventID: "evt_new", Data: json.RawMessage(data)}, wang)
		require.NoError(t, err)
		require.Equal(t, app.FailureReplaced, replaced.State)
		require.Equal(t, "evt_new", replaced.ReplacedBy)
		require.False(t, replaced.ClosedAt.IsZero())
		require.Equal(t, "edit", replaced.Actions[0].Action)
		require.True(t, bytes.Equal(f.Payload, keptPayload(t, s, 1)), "the original stays")

		row := waitingRetries(t, s)[0]
		env, assigned, err := event.Decode[event.DispatchAssigned]("evt_new", row.payload)
		require.NoError(t, err)
		require.Equal(t, "o2", env.Subject)
		require.EqualValues(t, 7, env.OrderVersion)
		require.WithinDuration(t, time.Now(), env.Time, time.Minute)
		require.Equal(t, "li", assigned.CourierID)
		require.Contains(t, string(row.payload), `"causationid":"evt_original"`)
		require.Equal(t, map[string]string{event.SignatureHeader: deskKeys.Sign(row.payload)}, row.metadata, "signed, and without what the original came with")
		require.NoError(t, s.Keep(t.Context(), app.Failure{Consumer: row.queue, MessageID: "evt_new", Payload: row.payload, Headers: row.metadata}))
		require.Equal(t, 1, countIn(t, s, "SELECT COUNT(*) FROM retry r JOIN failure f ON f.fingerprint = r.fingerprint"), "known as the same message")
		row.payload, row.metadata = nil, nil
		require.Equal(t, waiting{queue: "order.mark-dispatched", uuid: "evt_new", order: "o2"}, row, "a failure of its own if it fails")

		_, err = desk(s).Edit(t.Context(), app.FailureID{Service: "order", Number: 1}, app.FailureEdit{EventID: "evt_newer", Data: json.RawMessage(data)}, wang)
		require.Equal(t, domain.Conflict, domain.KindOf(err))
		require.Len(t, waitingRetries(t, s), 1)
	})
}

func TestUnreadableMessageIsReplacedByAWholeEvent(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		f := givenUpBy("dispatch.assign-courier", "", "", "event_malformed", "e")
		f.Payload = []byte("\xff not JSON")
		require.NoError(t, s.Keep(t.Context(), f))
		_, err := desk(s).Edit(t.Context(), app.FailureID{Service: "order", Number: 1},
			app.FailureEdit{EventID: "evt_new", Payload: announce(t, "evt_of_the_text", "o1", 100)}, wang)
		require.NoError(t, err)
		row := waitingRetries(t, s)[0]
		_, placed, err := event.Decode[event.OrderPlaced]("evt_new", row.payload)
		require.NoError(t, err)
		require.Equal(t, "o1", placed.OrderID)
		require.Contains(t, string(row.payload), `"causationid":"order-1"`, "it has no other name")
	})
}

func TestCommandLineShowsAndRepairsFailures(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		for i := range 3 {
			keep(t, s.dispatch, givenUpBy(nobody, fmt.Sprint("m", i), fmt.Sprint("o", i), "order_mismatch", fmt.Sprint("\x1b[31morder o", i, " differs")))
		}
		broken := givenUpBy("dispatch.assign-courier", "evt_broken", "o9", "event_malformed", "e")
		broken.Payload = announce(t, "evt_broken", "o9", 100)
		keep(t, s.dispatch, broken)
		env := map[string]string{"TAKEOUT_URL": s.api, "TAKEOUT_OPERATOR": "wang"}
		failures := func(args ...string) outcome { return run(t, env, append([]string{"failures"}, args...)...) }
		succeeds := func(args ...string) string {
			t.Helper()
			o := failures(args...)
			require.Zero(t, o.code, "%s", o)
			return o.stdout
		}
		table := succeeds("list", "-o", "table", "--handler", nobody)
		require.Regexp(t, `(?m)^ID +HANDLER +CLASS +ORDER +STATE +SINCE +TRIES +ERROR$`, table)
		require.Regexp(t, `(?m)^dispatch-1 +dispatch.nobody +permanent +o0 +open +\d+s +1 +\S*\[31morder o0 differs$`, table)
		require.NotContains(t, table, "\x1b", "what a message says does nothing to the terminal")
		require.Contains(t, succeeds("groups", "-o", "table"), "order <order> differs")
		require.Contains(t, succeeds("show", "dispatch-1", "-o", "table"), `"subject": "o0"`)
		require.Len(t, decodedText[httpapi.FailureListBody](t, succeeds("list", "--since", "1h", "--limit", "2")).Items, 2)
		require.Empty(t, decodedText[httpapi.FailureListBody](t, succeeds("list", "--until", "1h")).Items)

		preview := decodedText[httpapi.RetriedBody](t, succeeds("retry", "--handler", nobody))
		require.True(t, preview.DryRun, "without --yes nothing is done")
		require.Equal(t, 3, preview.Count)
		require.Equal(t, 4, s.dispatchRows(t, "SELECT COUNT(*) FROM failure WHERE state = 'open'"))
		require.Contains(t, succeeds("retry", "dispatch-1", "-o", "table"), "retrying")
		retried := decodedText[httpapi.RetriedBody](t, succeeds("retry", "--handler", nobody, "--yes", "--stop-on-failure", "--rate", "1", "--limit", "1"))
		require.Equal(t, []string{"dispatch-2"}, retried.IDs)
		require.NotEmpty(t, retried.Batch)
		succeeds("discard", "dispatch-3", "--reason", "the customer called off", "--operator", "li")
		require.Equal(t, "li", s.showFailure(t, "dispatch-3").Actions[0].Operator)
		require.Equal(t, "wang", s.showFailure(t, "dispatch-1").Actions[0].Operator)

		file := filepath.Join(t.TempDir(), "data.json")
		require.NoError(t, os.WriteFile(file, []byte(`{"order_id":"o9","name":"x","amount":1,"currency":"CNY","status":"placed","version":1,"placed_at":"2026-01-02T03:04:05Z"}`), 0o600))
		edited := decodedText[httpapi.FailureBody](t, succeeds("edit", "dispatch-4", "--data-file", file))
		require.Equal(t, "replaced", edited.State)

		failures("show", "dispatch-99").complains(t, 1, "no such failure")
		failures("retry", "dispatch-3").complains(t, 1, "is discarded")
		failures("edit", "dispatch-4", "--data-file", file).complains(t, 1, "is replaced")
		failures("discard", "dispatch-99", "--reason", "x").complains(t, 1, "no such failure")
	})
}

func decodedText[T any](t testing.TB, text string) T {
	t.Helper()
	var v T
	require.NoError(t, json.Unmarshal([]byte(text), &v), text)
	return v
}

func TestCommandLineAboutFailuresSaysWhatIsMissing(t *testing.T) {
	t.Parallel()
	notJSON := filepath.Join(t.TempDir(), "x")
	require.NoError(t, os.WriteFile(notJSON, []byte("hello"), 0o600))
	for about, args := range map[string][]string{
		"list":                                 {},
		"--limit":                              {"list", "--limit", "0"},
		"between 1 and 10000":                  {"retry", "--all", "--limit", "10001"},
		"--rate":                               {"retry", "--all", "--rate", "0"},
		"--all":                                {"retry"},
		"either ids or a filter":               {"retry", "dispatch-1", "--all"},
		"either --dry-run":                     {"retry", "--all", "--yes", "--dry-run"},
		"--reason":                             {"discard", "dispatch-1"},
		"must not be empty":                    {"discard", "dispatch-1", "--reason", " "},
		"at most 500":                          {"discard", "dispatch-1", "--reason", strings.Repeat("x", 501)},
		"--operator":                           {"discard", "dispatch-1", "--reason", "x", "--operator", strings.Repeat("x", 65)},
		"--data-file":                          {"edit", "dispatch-1"},
		"no such file":                         {"edit", "dispatch-1", "--data-file", notJSON + "y"},
		"is not JSON":                          {"edit", "dispatch-1", "--data-file", notJSON},
		"90m":                                  {"list", "--since", "yesterday"},
		"--state":                              {"list", "--state", "broken"},
		"id":                                   {"show"},
		"--stop-on-failure work with a filter": {"retry", "dispatch-1", "--stop-on-failure"},
		"retried at once":                      {"retry", "dispatch-1", "dispatch-2", "--rate", "1"},
	} {
		t.Run(about, func(t *testing.T) {
			t.Parallel()
			run(t, nil, append([]string{"failures"}, args...)...).complains(t, 2, about)
		})
	}
	run(t, map[string]string{"TAKEOUT_URL": "http://127.0.0.1:1"}, "failures", "list").complains(t, 1, "no takeout answers")
}

func TestRepairWhoseCommitIsNotAnsweredIsDoneOnceAndSaysSo(t *testing.T) {
	t.Parallel()
	place, commits := throughCommits(t, testenv.MySQL(t))
	s := openStore(t, place, sqlstore.OpenOrders)
	d := desk(s)
	whole := announce(t, "x", "o1", 1)
	for _, fault := range []commitFault{notExecuted, answerLost} {
		for action, repair := range map[string]func(id app.FailureID) (int, error){
			"retry": func(id app.FailureID) (int, error) {
				_, err := d.Retry(t.Context(), id, wang)
				return 1, err
			},
			"retry many": func(app.FailureID) (int, error) {
				retried, err := d.RetryMany(t.Context(), app.RetryFailures{Limit: 100, PerSecond: 10, FailureAction: wang})
				return len(retried.IDs), err
			},
			"edit": func(id app.FailureID) (int, error) {
				_, err := d.Edit(t.Context(), id, app.FailureEdit{EventID: newEventID(), Payload: whole}, wang)
				return 1, err
			},
			"discard": func(id app.FailureID) (int, error) {
				_, err := d.Discard(t.Context(), id, wang)
				return 1, err
			},
		} {
			for range 3 {
				require.NoError(t, s.Keep(t.Context(), givenUpBy("dispatch.assign-courier", newEventID(), "o1", "c", "e")))
			}
			id := app.FailureID{Service: "order", Number: int64(countIn(t, s, "SELECT MAX(id) FROM failure"))}
			before := countIn(t, s, "SELECT COUNT(*) FROM failure_action")
			trap := commits.arm(commitTrap{fault: fault, statement: "INSERT INTO failure_action"})
			n, err := repair(id)
			trap.wait(t)
			require.NoError(t, err, "%s, %s", action, fault)
			require.Equal(t, before+n, countIn(t, s, "SELECT COUNT(*) FROM failure_action"), "%s, %s", action, fault)
			if action == "retry many" {
				require.Zero(t, countIn(t, s, "SELECT COUNT(*) FROM failure WHERE state = 'open'"))
				require.GreaterOrEqual(t, n, 3)
			}
		}
	}
}
