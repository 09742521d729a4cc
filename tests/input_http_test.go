package tests

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

// contents returns a digest of each table of the databases, by database and table.
func contents(t testing.TB, urls ...string) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, u := range urls {
		query := "SELECT name FROM sqlite_master WHERE type = 'table'"
		if strings.HasPrefix(u, "mysql:") {
			query = "SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE()"
		}
		for _, table := range rowTexts(t, u, query) {
			rows := slices.Sorted(slices.Values(rowTexts(t, u, "SELECT * FROM "+table)))
			all[filepath.Base(u)+" "+table] = fmt.Sprintf("%d rows, %x", len(rows), sha256.Sum256([]byte(strings.Join(rows, "\n"))))
		}
	}
	return all
}

// rowTexts returns the rows of a query, each as one text.
func rowTexts(t testing.TB, url, query string) []string {
	t.Helper()
	rows, err := database(t, url).Query(query)
	require.NoError(t, err)
	defer rows.Close()
	columns, err := rows.Columns()
	require.NoError(t, err)
	var found []string
	for rows.Next() {
		values := make([]any, len(columns))
		for i := range values {
			values[i] = new(any)
		}
		require.NoError(t, rows.Scan(values...))
		var parts []string
		for _, value := range values {
			switch v := (*value.(*any)).(type) {
			case []byte:
				parts = append(parts, string(v))
			default:
				parts = append(parts, fmt.Sprint(v))
			}
		}
		found = append(found, strings.Join(parts, "\x1f"))
	}
	require.NoError(t, rows.Err())
	return found
}

// goodBodies are bodies that would change something. A new operation with a body needs one here.
var goodBodies = map[string]string{
	"place-order":         `{"order_id":"o-new","name":"x","amount":1,"currency":"CNY"}`,
	"cancel-order":        `{"reason":"rain"}`,
	"mark-delivered":      `{}`,
	"add-courier":         `{"courier_id":"new","name":"New","on_duty":true,"capacity":1}`,
	"change-courier":      `{"name":"Changed","on_duty":false,"capacity":1}`,
	"retry-failure":       `{"reason":"fixed"}`,
	"retry-failures":      `{"filter":{"handler":"dispatch.assign-courier"},"all":true,"dry_run":false,"rate_per_second":10,"stop_on_failure":true,"limit":10,"reason":"fixed"}`,
	"edit-failure":        `{"data":{"order_id":"o1","name":"x","amount":1,"currency":"CNY","status":"placed","version":1,"placed_at":"2026-01-01T00:00:00Z"},"reason":"wrong"}`,
	"discard-failure":     `{"reason":"not needed"}`,
	"reconcile":           `{"repair":true,"from":"2026-01-01T00:00:00Z","to":"2026-01-02T00:00:00Z","full":false}`,
	"resume-compensation": `{"reason":"made sure"}`,
}

// wrongBodies are wrong for every operation, whatever its body is. good is one that is right.
func wrongBodies(good string) map[string]string {
	members := strings.TrimSuffix(strings.TrimPrefix(good, "{"), "}")
	with := func(member string) string { return "{" + strings.TrimPrefix(members+","+member, ",") + "}" }
	bodies := map[string]string{
		"spaces":                          " \r\n\t",
		"a brace":                         "{",
		"an array of it":                  "[" + good + "]",
		"null":                            "null",
		"a text":                          `"x"`,
		"a number":                        "-0",
		"a byte order mark":               "\xef\xbb\xbf" + good,
		"UTF-16":                          utf16(good),
		"it twice":                        good + good,
		"something behind it":             good + "\x00",
		"a form":                          "reason=x&name=x",
		"a member in a form":              `{"reason"="x"}`,
		"an unknown member":               with(`"isAdmin":true`),
		"an unknown member without name":  with(`"":1`),
		"the members of objects":          with(`"__proto__":{"x":1}`),
		"a member of 10,000 characters":   with(`"` + strings.Repeat("m", 10_000) + `":1`),
		"a member of control characters":  with(`"` + strings.Repeat(`\u0001`, 100) + `":1`),
		"a member of markup":              with(`"` + strings.Repeat("<script>", 20) + `":1`),
		"a member that turns the reading": with(`"` + strings.Repeat("\u202e\u2066", 20) + `":1`),
		"a member of emoji":               with(`"` + strings.Repeat("🍜", 100) + `":1`),
		"a member of line separators":     with(`"` + strings.Repeat("\u2028", 100) + `":1`),
		"a member that is not UTF-8":      with("\"\xff\xfe\":1"),
		"nested 17 deep":                  with(`"x":` + strings.Repeat("[", 16) + strings.Repeat("]", 16)),
		"nested 20,000 deep":              with(`"x":` + strings.Repeat(`{"x":`, 10_000)),
		"64 KiB and a byte":               good + strings.Repeat(" ", 64<<10+1-len(good)),
		"a thousand unknown members":      with(`"x":1` + strings.Repeat(`,"y":1`, 1000)),
	}
	var object map[string]json.RawMessage
	if json.Unmarshal([]byte(good), &object) != nil {
		return bodies
	}
	for name, value := range object {
		bodies[name+" twice"] = with(fmt.Sprintf("%q:%s", name, value))
		bodies[name+" in capitals"] = with(fmt.Sprintf("%q:%s", strings.ToUpper(name), value))
		for _, wrong := range []string{
			`1.5`, `1e400`, `-1e-400`, `9223372036854775808`, strings.Repeat("9", 1000), `[]`, `[[]]`, `{"$gt":""}`, `"NaN"`, `"1"`, `""`,
			`"a\u0000b"`, `"\u202e"`, `"\ud800"`, `"` + strings.Repeat("x", 2000) + `"`, "\"\xff\"", `true`, `"true"`, `-1`, `"0000-00-00"`, `"2026-02-30T00:00:00Z"`,
		} {
			if !fits(name, wrong) {
				changed := maps.Clone(object)
				changed[name] = json.RawMessage("0")
				encoded, _ := json.Marshal(changed)
				bodies[fmt.Sprintf("%s is %.40s", name, wrong)] = strings.Replace(string(encoded), `"`+name+`":0`, `"`+name+`":`+wrong, 1)
			}
		}
	}
	return bodies
}

// fits reports whether a value may be the member's.
func fits(member, value string) bool {
	switch member {
	case "on_duty", "all", "dry_run", "stop_on_failure", "repair", "full":
		return value == "true"
	case "name":
		return slices.Contains([]string{`"NaN"`, `"1"`, `"true"`, `"0000-00-00"`, `"2026-02-30T00:00:00Z"`}, value)
	case "reason": // one may be empty, others not
		return slices.Contains([]string{`"NaN"`, `"1"`, `"true"`, `"0000-00-00"`, `"2026-02-30T00:00:00Z"`, `""`}, value)
	case "courier_id", "order_id":
		return slices.Contains([]string{`"NaN"`, `"1"`, `"true"`, `"0000-00-00"`}, value)
	}
	return false
}

func utf16(s string) string {
	var b strings.Builder
	for _, r := range s {
		b.WriteRune(r)
		b.WriteByte(0)
	}
	return b.String()
}

// wrongIDs are no ids of anything, as they stand in a path.
var wrongIDs = []string{
	"nobody", "%00", "%ff%fe", "a%20b", "a%0d%0aINJECTED", "%e2%80%ae", "'%20OR%20'1'='1", "..%2f..%2fetc%2fpasswd", "%25zz", "*", "null", "-1", "0",
	"dispatch-0", "dispatch-99999999999999999999", strings.Repeat("x", 65), strings.Repeat("%01", 250), strings.Repeat("%3c", 250), strings.Repeat("%f0%9f%8d%9c", 100), strings.Repeat("x", 7000),
}

// wrongQueries are wrong for every GET.
var wrongQueries = []string{
	"sort=(select%20sleep(5))", "x", "=", "=1", "%", "%zz=1", "a;b", "%00=1", "%0d%0aINJECTED=1", "%e2%80%ae=1", strings.Repeat("x", 3000) + "=1",
	strings.Repeat("%01", 500) + "=1", strings.Repeat("%3c", 500) + "=1", many("u%d=1", 500), many("limit=%d", 500), "limit=1&limit=1", "LIMIT=1",
}

func many(form string, n int) string {
	var parts []string
	for i := range n {
		parts = append(parts, fmt.Sprintf(form, i))
	}
	return strings.Join(parts, "&")
}

// wrongValues are wrong for a parameter of that name.
func wrongValues(parameter string) []string {
	switch parameter {
	case "limit":
		return []string{"0", "-1", "201", "1e1", "0x1", "1.0", "%2B1x", "18446744073709551616", "%00", "NaN", strings.Repeat("9", 5000)}
	case "state", "status":
		return []string{"lost", "OPEN", "%00", "'%20OR%201=1--", strings.Repeat("x", 5000), "open,any"}
	case "cursor":
		return []string{"!", "%00", "-1", "zzzzzzzzzzzzzzzz", strings.Repeat("1", 5000), "%e2%80%ae", "1.1.1"}
	case "since", "until":
		return []string{"yesterday", "2026-02-30T00:00:00Z", "%00", "0", "2026-01-01", strings.Repeat("2", 5000), "2026-01-01T00:00:00%2B99:99"}
	case "text":
		return []string{"%ff", strings.Repeat("x", 201)}
	case "verbose":
		return nil // accepted and ignored
	}
	return []string{"%00", "%ff", "a%20b", "%0aINJECTED", "%e2%80%ae", strings.Repeat("x", 65), strings.Repeat("%3c", 1000)}
}

// operation is one of the API, as its document describes it.
type operation struct {
	id, method, path string
	query            []string
	body, bodyNeeded bool
}

func (s *system) operations(t testing.TB) []operation {
	t.Helper()
	var all []operation
	for path, methods := range s.openAPI(t).Paths {
		for method, described := range methods {
			op := operation{id: described["operationId"].(string), method: strings.ToUpper(method), path: path}
			if body, ok := described["requestBody"].(map[string]any); ok {
				op.body = true
				op.bodyNeeded, _ = body["required"].(bool)
			}
			parameters, _ := described["parameters"].([]any)
			for _, p := range parameters {
				if parameter := p.(map[string]any); parameter["in"] == "query" {
					op.query = append(op.query, parameter["name"].(string))
				}
			}
			all = append(all, op)
		}
	}
	return all
}

// refused checks that a request was refused by name, shortly, and with nothing in the answer that does harm where it is
// shown.
func (a answer) refused(t testing.TB, request string) {
	t.Helper()
	require.True(t, a.status >= 400 && a.status < 500, "%s\n%.500s", request, a)
	p := a.problem(t)
	require.LessOrEqual(t, len(a.body), 1024, "%s\n%s", request, a)
	require.False(t, insides.Match(a.body), "%s\n%s", request, a)
	require.NotContains(t, string(a.body), "<", request)
	shown := p.Title + p.Detail + p.Instance
	for _, e := range p.Errors {
		require.NotEmpty(t, e.Field, request)
		require.NotEmpty(t, e.Code, request)
		shown += e.Field + e.Detail
	}
	require.Falsef(t, strings.ContainsFunc(shown, harmful), "%s\n%q", request, shown)
}

// harmful is what must not be repeated from a request: what moves the cursor or turns the reading direction.
func harmful(r rune) bool {
	return r == utf8.RuneError || unicode.Is(unicode.C, r) || unicode.In(r, unicode.Zl, unicode.Zp)
}

// at returns the operation's path with ids in it.
func (op operation) at(ids map[string]string) string {
	path := op.path
	for name, id := range ids {
		path = strings.ReplaceAll(path, "{"+name+"}", id)
	}
	return path
}

// wrongRequests are requests of the operation that must be refused.
func (op operation) wrongRequests(base string, ids map[string]string) []*http.Request {
	var all []*http.Request
	path := op.at(ids)
	good := goodBodies[op.id]
	add := func(method, path, body string, headers ...string) {
		request, err := http.NewRequest(method, "http://x/", strings.NewReader(body))
		if err != nil {
			panic(err)
		}
		request.URL, err = url.Parse(base)
		if err != nil {
			panic(err)
		}
		raw, query, _ := strings.Cut(path, "?")
		request.URL.Opaque, request.URL.RawQuery, request.URL.ForceQuery = "//"+request.URL.Host+raw, query, query == "" && strings.HasSuffix(path, "?")
		if body != "" {
			request.Header.Set("Content-Type", "application/json")
		}
		for i := 0; i+1 < len(headers); i += 2 {
			request.Header[headers[i]] = []string{headers[i+1]}
		}
		all = append(all, request)
	}
	for _, method := range []string{"PUT", "DELETE", "TRACE", "OPTIONS", "PROPFIND", strings.ToLower(op.method), "X" + op.method} {
		add(method, path, good)
	}
	add(op.method, "/"+path, good)
	add(op.method, path+"/", good)
	add(op.method, path+"/../"+filepath.Base(path), good)
	add(op.method, path+"%2f", good)
	add(op.method, path+"%00", good)
	add(op.method, path+";v=1", good)
	add(op.method, path+"?"+strings.Repeat("x", 8<<10), good)
	for _, query := range wrongQueries {
		if !strings.HasPrefix(path, "/v1/") {
			break // a probe may carry what it likes
		}
		add(op.method, path+"?"+query, good)
	}
	for _, parameter := range op.query {
		for _, value := range wrongValues(parameter) {
			add(op.method, path+"?"+parameter+"="+value, good)
		}
	}
	if before, after, found := strings.Cut(op.path, "{"); found {
		_, after, _ = strings.Cut(after, "}")
		for _, id := range wrongIDs {
			add(op.method, before+id+after, good)
		}
	}
	if !op.body {
		return all
	}
	for _, body := range wrongBodies(good) {
		add(op.method, path, body)
	}
	if op.bodyNeeded {
		add(op.method, path, "", "Content-Type", "application/json")
	}
	for _, kind := range []string{"", "text/plain", "application/json, text/xml", "application/xml", "application/x-www-form-urlencoded",
		"multipart/form-data; boundary=x", "application/json; charset=utf-16", "application/merge-patch+json", "json", "\xff", strings.Repeat("a", 5000) + "/json"} {
		add(op.method, path, good, "Content-Type", kind)
	}
	for _, encoding := range []string{"gzip", "br", "deflate, gzip", "x", "\xff"} {
		add(op.method, path, good, "Content-Encoding", encoding)
	}
	return all
}

// Every operation that the document describes is asked for everything wrong that fits it, so that a new one is, too.
func TestNoOperationTakesWhatIsWrong(t *testing.T) {
	t.Parallel()
	s, p := embeddedProcess(t, map[string]string{"TAKEOUT_LOG_LEVEL": "debug", "TAKEOUT_LOG_FORMAT": "text", "TAKEOUT_RECONCILE_EVERY": "0"})
	dir := filepath.Dir(strings.TrimPrefix(s.order, "sqlite:"))
	for _, place := range []*string{&s.payment, &s.points, &s.broker} {
		*place = "sqlite:" + filepath.Join(dir, map[*string]string{&s.payment: "payment", &s.points: "points", &s.broker: "broker"}[place]+".db")
	}
	id := s.place(t, "x", 500)
	s.awaitDispatched(t, id)
	readable := givenUpBy("dispatch.assign-courier", "evt_good", "o1", "c", "e")
	readable.Payload = announce(t, "evt_good", "o1", 100)
	keep(t, s.dispatch, readable)
	all := []string{s.order, s.dispatch, s.payment, s.points, s.broker}
	eventually(t, "the order's events are all handled", func() error {
		if n := count(t, s.points, "SELECT COUNT(*) FROM outbox_confirmed") + s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE points > 0"); n != 2 {
			return fmt.Errorf("%d", n)
		}
		if n := count(t, s.broker, "SELECT COUNT(*) FROM broker_message"); n != 0 {
			return fmt.Errorf("%d messages wait", n)
		}
		return nil
	})
	s.awaitSent(t, s.order, s.dispatch, s.payment, s.points)
	before := contents(t, all...)
	require.Greater(t, len(before), 30)

	ids := map[string]string{"order_id": id, "courier_id": "courier-li", "id": "dispatch-1"}
	n := 0
	for _, op := range s.operations(t) {
		require.Equal(t, op.body, goodBodies[op.id] != "", "%s needs a body here if it takes one", op.id)
		for _, request := range op.wrongRequests(p.url, ids) {
			body, err := request.GetBody()
			require.NoError(t, err)
			sent, err := io.ReadAll(body)
			require.NoError(t, err)
			a, err := do(request)
			about := fmt.Sprintf("%s %.300s %v\n%.300q", request.Method, request.URL, request.Header, sent)
			require.NoError(t, err, about)
			a.refused(t, about)
			n++
		}
	}
	require.Greater(t, n, 1500, "requests")
	require.Equal(t, before, contents(t, all...), "no row is added, changed or removed")
	for _, op := range s.operations(t) {
		if op.body {
			a := mustSend(t, op.method, p.url+op.at(ids), goodBodies[op.id])
			require.True(t, a.status < 300 || a.status == http.StatusConflict, "%s is right but for what was made wrong of it: %s", op.id, a)
		}
	}
	for _, word := range []string{"panic", "level=ERROR", "a request failed"} {
		require.NotContains(t, p.log.String(), word)
	}
	for line := range strings.Lines(p.log.String()) {
		require.False(t, strings.HasPrefix(line, "INJECTED"), "a request must not write a line of the log")
	}
}

func TestHundredCancellationsAtOnceCancelOnceWhileTheOrderIsSentAgain(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		const order = `{"order_id":"o-1","name":"x","amount":100}`
		require.Equal(t, http.StatusCreated, mustSend(t, http.MethodPost, s.api+"/v1/orders", order).status)
		s.awaitDispatched(t, "o-1")
		var clients sync.WaitGroup
		for i := range 100 {
			clients.Go(func() {
				path, body := "/v1/orders/o-1/cancel", `{"reason":"rain"}`
				if i%5 == 0 {
					path, body = "/v1/orders", order
				}
				for {
					a, err := send(http.MethodPost, s.api+path, body)
					if err != nil || a.status != http.StatusOK && a.status != http.StatusConflict && a.status != http.StatusServiceUnavailable {
						t.Errorf("%s: %v, %s", path, err, a)
					}
					if err != nil || a.status == http.StatusOK {
						return
					}
				}
			})
		}
		clients.Wait()
		require.Equal(t, "cancelled", s.get(t, "o-1").Status)
		require.EqualValues(t, 3, s.get(t, "o-1").Version, "placed, dispatched, cancelled")
		eventually(t, "the courier is free", func() error {
			if n := s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE state = 'released'") - s.dispatchRows(t, "SELECT SUM(active) FROM courier"); n != 1 {
				return fmt.Errorf("%d", n)
			}
			return nil
		})
		s.awaitCount(t, 1, "SELECT COUNT(*) FROM outbox_confirmed WHERE event_key = 'order.cancelled'")
		require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM order_info"))
		s.noFailures(t)
	})
}

func TestConnectionsThatSayNothingKeepNobodyFromOrdering(t *testing.T) {
	t.Parallel()
	s, _ := embeddedProcess(t, nil)
	for range 2000 {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.api, "http://"))
		require.NoError(t, err)
		defer conn.Close()
	}
	s.awaitDispatched(t, s.place(t, "x", 1))
}
