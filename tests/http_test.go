package tests

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/ports/httpapi"
	"takeout/service"
)

// embeddedProcess is the program as its users start it first: one process, nothing installed.
func embeddedProcess(t testing.TB, env map[string]string) (*system, *process) {
	t.Helper()
	p := startProcess(t, "embedded", env)
	return onData(p), p
}

// onData returns a system that asks the process's own SQLite files.
func onData(p *process) *system {
	dir := valueOf(p.env, "TAKEOUT_DATA_DIR")
	return &system{
		stack: stack{name: "embedded", order: "sqlite:" + filepath.Join(dir, "order.db"), dispatch: "sqlite:" + filepath.Join(dir, "dispatch.db")},
		api:   p.url, dispatchAPI: p.url,
	}
}

// badRequest is a request that must be refused. It is a POST of an order as JSON where nothing else is said.
type badRequest struct {
	name    string
	method  string
	path    string
	headers []string // pairs of name and value
	body    string
	status  int
	code    string
}

// split is text that would show in the log as a line of its own if it were written there as it is.
const split = "\nINJECTED"

var badBodies = []badRequest{
	{name: "empty", body: "", status: 400, code: "body_empty"},
	{name: "spaces", body: " \r\n\t ", status: 400, code: "body_empty"},
	{name: "a brace", body: `{`, status: 400, code: "body_malformed"},
	{name: "truncated in a member", body: `{"name":"x","amount":1`, status: 400, code: "body_malformed"},
	{name: "truncated in a text", body: `{"name":"x`, status: 400, code: "body_malformed"},
	{name: "not JSON", body: `name=x&amount=1`, status: 400, code: "body_not_an_object"},
	{name: "single quotes", body: `{'name':'x','amount':1}`, status: 400, code: "body_malformed"},
	{name: "a comment", body: `{"name":"x",/**/"amount":1}`, status: 400, code: "body_malformed"},
	{name: "a comma at the end", body: `{"name":"x","amount":1,}`, status: 400, code: "body_malformed"},
	{name: "another object behind it", body: `{"name":"x","amount":1}{}`, status: 400, code: "body_malformed"},
	{name: "text behind it", body: `{"name":"x","amount":1} x`, status: 400, code: "body_malformed"},
	{name: "an array", body: `[]`, status: 400, code: "body_not_an_object"},
	{name: "an array of orders", body: `[{"name":"x","amount":1}]`, status: 400, code: "body_not_an_object"},
	{name: "null", body: `null`, status: 400, code: "body_not_an_object"},
	{name: "a text", body: `"x"`, status: 400, code: "body_not_an_object"},
	{name: "a number", body: `1`, status: 400, code: "body_not_an_object"},
	{name: "true", body: `true`, status: 400, code: "body_not_an_object"},
	{name: "a byte order mark", body: "\xef\xbb\xbf" + `{"name":"x","amount":1}`, status: 400, code: "body_not_an_object"},
	{name: "UTF-16", body: "{\x00\"\x00n\x00a\x00m\x00e\x00\"\x00:\x001\x00}\x00", status: 400, code: "body_malformed"},
	{name: "nested 17 deep", body: `{"name":` + strings.Repeat("[", 16) + strings.Repeat("]", 16) + `}`, status: 400, code: "body_too_deep"},
	{name: "nested 30,000 deep", body: `{"name":` + strings.Repeat("[", 30_000), status: 400, code: "body_too_deep"},
	{name: "nested 16 deep", body: `{"name":` + strings.Repeat("[", 15) + strings.Repeat("]", 15) + `}`, status: 400, code: "member_wrong_type"},

	{name: "an empty object", body: `{}`, status: 422, code: "name_empty"},
	{name: "no name", body: `{"amount":1}`, status: 422, code: "name_empty"},
	{name: "no amount", body: `{"name":"x"}`, status: 422, code: "amount_out_of_range"},
	{name: "an unknown member", body: `{"name":"x","amount":1,"tip":1}`, status: 400, code: "member_unknown"},
	{name: "a member in capitals", body: `{"Name":"x","amount":1}`, status: 400, code: "member_unknown"},
	{name: "status set by the client", body: `{"name":"x","amount":1,"status":"dispatched"}`, status: 400, code: "member_unknown"},
	{name: "version set by the client", body: `{"name":"x","amount":1,"version":7}`, status: 400, code: "member_unknown"},
	{name: "placed_at set by the client", body: `{"name":"x","amount":1,"placed_at":"1970-01-01T00:00:00Z"}`, status: 400, code: "member_unknown"},
	{name: "dispatch set by the client", body: `{"name":"x","amount":1,"dispatch":{"courier_id":"me"}}`, status: 400, code: "member_unknown"},
	{name: "tenant set by the client", body: `{"name":"x","amount":1,"tenant":"other"}`, status: 400, code: "member_unknown"},
	{name: "an unknown member of 10,000 characters", body: `{"` + strings.Repeat("a", 10_000) + `":1}`, status: 400, code: "member_unknown"},
	{name: "an unknown member with a line break", body: `{"\nINJECTED":1}`, status: 400, code: "member_unknown"},
	{name: "a member twice", body: `{"name":"x","amount":1,"amount":2}`, status: 400, code: "member_twice"},
	{name: "a member twice, once escaped", body: `{"name":"x","amount":1,"n\u0061me":"y"}`, status: 400, code: "member_twice"},
	{name: "name is a number", body: `{"name":1,"amount":1}`, status: 400, code: "member_wrong_type"},
	{name: "name is an object", body: `{"name":{"$ne":""},"amount":1}`, status: 400, code: "member_wrong_type"},
	{name: "name is null", body: `{"name":null,"amount":1}`, status: 422, code: "name_empty"},
	{name: "amount is null", body: `{"name":"x","amount":null}`, status: 422, code: "amount_out_of_range"},
	{name: "amount is text", body: `{"name":"x","amount":"100"}`, status: 400, code: "member_wrong_type"},
	{name: "amount is true", body: `{"name":"x","amount":true}`, status: 400, code: "member_wrong_type"},
	{name: "amount is an array", body: `{"name":"x","amount":[1]}`, status: 400, code: "member_wrong_type"},
	{name: "amount 1.5", body: `{"name":"x","amount":1.5}`, status: 400, code: "member_wrong_type"},
	{name: "amount 1.0", body: `{"name":"x","amount":1.0}`, status: 400, code: "member_wrong_type"},
	{name: "amount 1e3", body: `{"name":"x","amount":1e3}`, status: 400, code: "member_wrong_type"},
	{name: "amount 1e400", body: `{"name":"x","amount":1e400}`, status: 400, code: "member_wrong_type"},
	{name: "amount NaN", body: `{"name":"x","amount":NaN}`, status: 400, code: "body_malformed"},
	{name: "amount +1", body: `{"name":"x","amount":+1}`, status: 400, code: "body_malformed"},
	{name: "amount 01", body: `{"name":"x","amount":01}`, status: 400, code: "body_malformed"},
	{name: "amount 0x10", body: `{"name":"x","amount":0x10}`, status: 400, code: "body_malformed"},
	{name: "amount 2^63", body: `{"name":"x","amount":9223372036854775808}`, status: 400, code: "member_wrong_type"},
	{name: "amount of 1,000 digits", body: `{"name":"x","amount":` + strings.Repeat("9", 1000) + `}`, status: 400, code: "member_wrong_type"},
	{name: "amount 0", body: `{"name":"x","amount":0}`, status: 422, code: "amount_out_of_range"},
	{name: "amount -1", body: `{"name":"x","amount":-1}`, status: 422, code: "amount_out_of_range"},
	{name: "amount 2^31", body: `{"name":"x","amount":2147483648}`, status: 422, code: "amount_out_of_range"},
	{name: "amount 2^63-1", body: `{"name":"x","amount":9223372036854775807}`, status: 422, code: "amount_out_of_range"},
	{name: "name empty", body: `{"name":"","amount":1}`, status: 422, code: "name_empty"},
	{name: "name of spaces", body: `{"name":"   ","amount":1}`, status: 422, code: "name_empty"},
	{name: "name of wide spaces", body: `{"name":"\u3000\u00a0","amount":1}`, status: 422, code: "name_empty"},
	{name: "name of a zero-width space", body: `{"name":"\u200b","amount":1}`, status: 422, code: "name_empty"},
	{name: "name of 31 characters", body: `{"name":"` + strings.Repeat("x", 31) + `","amount":1}`, status: 422, code: "name_too_long"},
	{name: "name of 31 emoji", body: `{"name":"` + strings.Repeat("🍜", 31) + `","amount":1}`, status: 422, code: "name_too_long"},
	{name: "name of 60,000 characters", body: `{"name":"` + strings.Repeat("x", 60_000) + `","amount":1}`, status: 422, code: "name_too_long"},
	{name: "name with NUL", body: `{"name":"a\u0000b","amount":1}`, status: 422, code: "name_unreadable"},
	{name: "name with a raw NUL", body: "{\"name\":\"a\x00b\",\"amount\":1}", status: 400, code: "body_malformed"},
	{name: "name with CR LF", body: `{"name":"a\r\nINJECTED","amount":1}`, status: 422, code: "name_unreadable"},
	{name: "name with a raw line break", body: `{"name":"a` + split + `","amount":1}`, status: 400, code: "body_malformed"},
	{name: "name with an escape sequence", body: `{"name":"\u001b[2J","amount":1}`, status: 422, code: "name_unreadable"},
	{name: "name with a line separator", body: `{"name":"a\u2028b","amount":1}`, status: 422, code: "name_unreadable"},
	{name: "name with U+202E", body: `{"name":"a\u202eb","amount":1}`, status: 422, code: "name_unreadable"},
	{name: "name with U+2066", body: `{"name":"a\u2066b","amount":1}`, status: 422, code: "name_unreadable"},
	{name: "name with a replacement character", body: `{"name":"a\ufffdb","amount":1}`, status: 422, code: "name_unreadable"},
	{name: "name with half a surrogate", body: `{"name":"\ud83d","amount":1}`, status: 400, code: "body_malformed"},
	{name: "name with surrogates in the wrong order", body: `{"name":"\udf5c\ud83c","amount":1}`, status: 400, code: "body_malformed"},
	{name: "name that is not UTF-8", body: "{\"name\":\"\xff\xfe\",\"amount\":1}", status: 400, code: "body_malformed"},
	{name: "name in overlong UTF-8", body: "{\"name\":\"\xc0\xaf\",\"amount\":1}", status: 400, code: "body_malformed"},
	{name: "currency in small letters", body: `{"name":"x","amount":1,"currency":"cny"}`, status: 422, code: "currency_invalid"},
	{name: "currency empty", body: `{"name":"x","amount":1,"currency":""}`, status: 422, code: "currency_invalid"},
	{name: "currency of 4 letters", body: `{"name":"x","amount":1,"currency":"CNYY"}`, status: 422, code: "currency_invalid"},
	{name: "currency in Cyrillic", body: `{"name":"x","amount":1,"currency":"СNY"}`, status: 422, code: "currency_invalid"},
	{name: "currency is a number", body: `{"name":"x","amount":1,"currency":156}`, status: 400, code: "member_wrong_type"},
	{name: "order_id empty", body: `{"order_id":"","name":"x","amount":1}`, status: 422, code: "order_id_invalid"},
	{name: "order_id of 65 characters", body: `{"order_id":"` + strings.Repeat("o", 65) + `","name":"x","amount":1}`, status: 422, code: "order_id_invalid"},
	{name: "order_id with a space", body: `{"order_id":"a b","name":"x","amount":1}`, status: 422, code: "order_id_invalid"},
	{name: "order_id with a slash", body: `{"order_id":"../x","name":"x","amount":1}`, status: 422, code: "order_id_invalid"},
	{name: "order_id with a line break", body: `{"order_id":"a\nINJECTED","name":"x","amount":1}`, status: 422, code: "order_id_invalid"},
	{name: "order_id in Chinese", body: `{"order_id":"订单","name":"x","amount":1}`, status: 422, code: "order_id_invalid"},
	{name: "order_id with SQL", body: `{"order_id":"'; DROP TABLE order_info; --","name":"x","amount":1}`, status: 422, code: "order_id_invalid"},
	{name: "order_id is a number", body: `{"order_id":1,"name":"x","amount":1}`, status: 400, code: "member_wrong_type"},
}

const goodOrder = `{"name":"x","amount":1}`

var badHeaders = []badRequest{
	{name: "Content-Type empty", headers: []string{"Content-Type", ""}, body: goodOrder, status: 415, code: "content_type_unsupported"},
	{name: "Content-Type text/xml", headers: []string{"Content-Type", "text/xml"}, body: goodOrder, status: 415, code: "content_type_unsupported"},
	{name: "Content-Type text/plain, as a form of another site can send", headers: []string{"Content-Type", "text/plain"}, body: goodOrder, status: 415, code: "content_type_unsupported"},
	{name: "Content-Type of a form", headers: []string{"Content-Type", "application/x-www-form-urlencoded"}, body: goodOrder, status: 415, code: "content_type_unsupported"},
	{name: "Content-Type multipart", headers: []string{"Content-Type", "multipart/form-data; boundary=x"}, body: goodOrder, status: 415, code: "content_type_unsupported"},
	{name: "Content-Type that begins like JSON", headers: []string{"Content-Type", "application/jsonp"}, body: goodOrder, status: 415, code: "content_type_unsupported"},
	{name: "Content-Type of two types", headers: []string{"Content-Type", "application/json, text/xml"}, body: goodOrder, status: 415, code: "content_type_unsupported"},
	{name: "charset UTF-16", headers: []string{"Content-Type", "application/json; charset=utf-16"}, body: goodOrder, status: 415, code: "charset_unsupported"},
	{name: "charset Latin 1", headers: []string{"Content-Type", `application/json;charset="iso-8859-1"`}, body: goodOrder, status: 415, code: "charset_unsupported"},
	{name: "charset UTF-16 behind another parameter", headers: []string{"Content-Type", "application/json; q=1; charset=utf-16"}, body: goodOrder, status: 415, code: "charset_unsupported"},
	{name: "gzip", headers: []string{"Content-Encoding", "gzip"}, body: "\x1f\x8b\x08\x00", status: 415, code: "content_encoding_unsupported"},
	{name: "an encoding nobody knows", headers: []string{"Content-Encoding", "identity, x"}, body: goodOrder, status: 415, code: "content_encoding_unsupported"},
}

var badPaths = []badRequest{
	{name: "unknown path", method: "GET", path: "/v1/nothing", status: 404, code: "path_not_found"},
	{name: "root", method: "GET", path: "/", status: 404, code: "path_not_found"},
	{name: "another version", method: "GET", path: "/v2/orders", status: 404, code: "path_not_found"},
	{name: "POST to an unknown path", path: "/v1/orderz", body: goodOrder, status: 404, code: "path_not_found"},
	{name: "a slash too many at the end", path: "/v1/orders/", body: goodOrder, status: 404, code: "path_not_found"},
	{name: "a slash too many in front", path: "//v1/orders", body: goodOrder, status: 404, code: "path_not_found"},
	{name: "a slash too many between", method: "GET", path: "/v1//orders", status: 404, code: "path_not_found"},
	{name: "dots", method: "GET", path: "/v1/orders/../couriers", status: 404, code: "path_not_found"},
	{name: "dots escaped", method: "GET", path: "/v1/orders/..%2f", status: 404, code: "path_not_found"},
	{name: "dots escaped on the way to a file", method: "GET", path: "/docs/..%2f..%2fetc%2fpasswd", status: 404, code: "path_not_found"},
	{name: "a line break", method: "GET", path: "/v1/x%0aINJECTED", status: 404, code: "path_not_found"},
	{name: "an order that does not exist", method: "GET", path: "/v1/orders/nobody", status: 404, code: "order_not_found"},
	{name: "an order whose id has a blank", method: "GET", path: "/v1/orders/a%20b", status: 404, code: "order_not_found"},
	{name: "an order whose id has a line break", method: "GET", path: "/v1/orders/a%0d%0aINJECTED:%201", status: 404, code: "order_not_found"},
	{name: "an order whose id has a NUL", method: "GET", path: "/v1/orders/%00", status: 404, code: "order_not_found"},
	{name: "an order whose id is not UTF-8", method: "GET", path: "/v1/orders/%ff%fe", status: 404, code: "order_not_found"},
	{name: "an order whose id is SQL", method: "GET", path: "/v1/orders/'%20OR%20'1'='1", status: 404, code: "order_not_found"},
	{name: "an order whose id has 65 characters", method: "GET", path: "/v1/orders/" + strings.Repeat("o", 65), status: 404, code: "order_not_found"},
	{name: "an order whose id has 8,000 characters", method: "GET", path: "/v1/orders/" + strings.Repeat("o", 8000), status: 404, code: "order_not_found"},
	{name: "a dispatch that does not exist", method: "GET", path: "/v1/dispatches/nobody", status: 404, code: "dispatch_not_found"},
	{name: "a dispatch whose id has 65 characters", method: "GET", path: "/v1/dispatches/" + strings.Repeat("o", 65), status: 404, code: "dispatch_not_found"},
	{name: "a courier that does not exist", method: "PATCH", path: "/v1/couriers/nobody", body: `{"on_duty":false}`, status: 404, code: "courier_not_found"},
	{name: "a courier whose id has 65 characters", method: "PATCH", path: "/v1/couriers/" + strings.Repeat("c", 65), body: `{"on_duty":false}`, status: 404, code: "courier_not_found"},
	{name: "a URL of more than 8 KiB", method: "GET", path: "/v1/orders?cursor=" + strings.Repeat("a", 8192), status: 414, code: "url_too_long"},
	{name: "a path of more than 8 KiB", method: "GET", path: "/v1/orders/" + strings.Repeat("a", 8192), status: 414, code: "url_too_long"},
}

var badMethods = []badRequest{
	{name: "PUT", method: "PUT", body: goodOrder, status: 405, code: "method_not_allowed"},
	{name: "PATCH", method: "PATCH", body: goodOrder, status: 405, code: "method_not_allowed"},
	{name: "DELETE", method: "DELETE", status: 405, code: "method_not_allowed"},
	{name: "TRACE", method: "TRACE", status: 405, code: "method_not_allowed"},
	{name: "OPTIONS", method: "OPTIONS", status: 405, code: "method_not_allowed"},
	{name: "a method that nobody knows", method: "INJECTED", status: 405, code: "method_not_allowed"},
	{name: "a method of 5,000 letters", method: strings.Repeat("A", 5000), status: 405, code: "method_not_allowed"},
	{name: "get in small letters", method: "get", status: 405, code: "method_not_allowed"},
	{name: "DELETE of an order", method: "DELETE", path: "/v1/orders/nobody", status: 405, code: "method_not_allowed"},
	{name: "POST to an order", path: "/v1/orders/nobody", body: goodOrder, status: 405, code: "method_not_allowed"},
	{name: "POST to readiness", path: "/readyz", body: goodOrder, status: 405, code: "method_not_allowed"},
}

var badQueries = []badRequest{
	{name: "an unknown parameter", method: "GET", path: "/v1/orders?sort=(select%20sleep(5))", status: 400, code: "parameter_invalid"},
	{name: "an unknown parameter of a POST", path: "/v1/orders?dry_run=1", body: goodOrder, status: 400, code: "parameter_invalid"},
	{name: "a parameter in capitals", method: "GET", path: "/v1/orders?LIMIT=1", status: 400, code: "parameter_invalid"},
	{name: "limit 0", method: "GET", path: "/v1/orders?limit=0", status: 400, code: "parameter_invalid"},
	{name: "limit -1", method: "GET", path: "/v1/orders?limit=-1", status: 400, code: "parameter_invalid"},
	{name: "limit 201", method: "GET", path: "/v1/orders?limit=201", status: 400, code: "parameter_invalid"},
	{name: "limit 2^64", method: "GET", path: "/v1/orders?limit=18446744073709551616", status: 400, code: "parameter_invalid"},
	{name: "limit of letters", method: "GET", path: "/v1/orders?limit=ten", status: 400, code: "parameter_invalid"},
	{name: "limit twice", method: "GET", path: "/v1/orders?limit=1&limit=2", status: 400, code: "parameter_invalid"},
	{name: "status unknown", method: "GET", path: "/v1/orders?status=lost", status: 400, code: "parameter_invalid"},
	{name: "status with SQL", method: "GET", path: "/v1/orders?status='%20OR%201=1--", status: 400, code: "parameter_invalid"},
	{name: "cursor of signs", method: "GET", path: "/v1/orders?cursor=!", status: 400, code: "cursor_invalid"},
	{name: "cursor 0", method: "GET", path: "/v1/orders?cursor=0", status: 400, code: "cursor_invalid"},
	{name: "cursor negative", method: "GET", path: "/v1/orders?cursor=-1", status: 400, code: "cursor_invalid"},
	{name: "cursor beyond 2^63", method: "GET", path: "/v1/orders?cursor=zzzzzzzzzzzzzzzz", status: 400, code: "cursor_invalid"},
	{name: "cursor of 33 characters", method: "GET", path: "/v1/orders?cursor=" + strings.Repeat("1", 33), status: 400, code: "parameter_invalid"},
	{name: "a line break", method: "GET", path: "/v1/orders?status=%0aINJECTED", status: 400, code: "parameter_invalid"},
	{name: "an escape that is none", method: "GET", path: "/v1/orders?status=%zz", status: 400, code: "parameter_invalid"},
}

var badCouriers = []badRequest{
	{name: "no name", path: "/v1/couriers", body: `{}`, status: 422, code: "name_empty"},
	{name: "name of 61 characters", path: "/v1/couriers", body: `{"name":"` + strings.Repeat("x", 61) + `"}`, status: 422, code: "name_too_long"},
	{name: "capacity -1", path: "/v1/couriers", body: `{"name":"x","capacity":-1}`, status: 422, code: "capacity_out_of_range"},
	{name: "capacity 10001", path: "/v1/couriers", body: `{"name":"x","capacity":10001}`, status: 422, code: "capacity_out_of_range"},
	{name: "on_duty is text", path: "/v1/couriers", body: `{"name":"x","on_duty":"yes"}`, status: 400, code: "member_wrong_type"},
	{name: "active set by the client", path: "/v1/couriers", body: `{"name":"x","active":0}`, status: 400, code: "member_unknown"},
	{name: "id with a slash", path: "/v1/couriers", body: `{"courier_id":"a/b","name":"x"}`, status: 422, code: "courier_id_invalid"},
	{name: "id that is taken", path: "/v1/couriers", body: `{"courier_id":"courier-li","name":"x"}`, status: 409, code: "courier_id_taken"},
	{name: "change to an empty name", method: "PATCH", path: "/v1/couriers/courier-li", body: `{"name":""}`, status: 422, code: "name_empty"},
	{name: "change of the id", method: "PATCH", path: "/v1/couriers/courier-li", body: `{"courier_id":"x"}`, status: 400, code: "member_unknown"},
	{name: "change with a body that is empty", method: "PATCH", path: "/v1/couriers/courier-li", status: 400, code: "body_empty"},
}

func TestBadRequestsAreRefusedAndChangeNothing(t *testing.T) {
	t.Parallel()
	s, p := embeddedProcess(t, map[string]string{"TAKEOUT_LOG_LEVEL": "debug", "TAKEOUT_LOG_FORMAT": "text"})
	roster := mustGet(t, s.api+"/v1/couriers").String()
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM order_info"))
	for group, requests := range map[string][]badRequest{
		"body": badBodies, "header": badHeaders, "path": badPaths, "method": badMethods, "query": badQueries, "courier": badCouriers,
	} {
		t.Run(group, func(t *testing.T) {
			for _, r := range requests {
				t.Run(r.name, func(t *testing.T) { s.refuses(t, r) })
			}
		})
	}
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM order_info"))
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM outbox"))
	require.Equal(t, roster, mustGet(t, s.api+"/v1/couriers").String())
	require.Contains(t, p.log.String(), "INJECTED", "the log shows what was asked for")
	for line := range strings.Lines(p.log.String()) {
		require.False(t, strings.HasPrefix(line, "INJECTED"), "a request must not write a line of the log")
	}
}

var insides = regexp.MustCompile(`(?i)goroutine|\.go:\d|select .* from|insert into|sqlite|syntax error`)

// refuses sends the request and checks that the answer is the wanted problem and tells nothing of the insides.
func (s *system) refuses(t *testing.T, r badRequest) {
	t.Helper()
	method, path := r.method, r.path
	if method == "" {
		method = http.MethodPost
	}
	if path == "" {
		path = "/v1/orders"
	}
	a := mustSend(t, method, s.api+path, r.body, r.headers...)
	require.Equal(t, r.status, a.status, "%s", a)
	p := a.problem(t)
	require.Equal(t, r.code, p.Code, "%s", a)
	require.NotEmpty(t, p.RequestID)
	require.Equal(t, a.header.Get("X-Request-Id"), p.RequestID)
	require.True(t, strings.HasSuffix(p.Type, "#"+p.Code), p.Type)
	require.LessOrEqual(t, len(a.body), 1024, "%s", a)
	require.False(t, insides.Match(a.body), "%s", a)
	require.Equal(t, "no-store", a.header.Get("Cache-Control"))
	require.Equal(t, "nosniff", a.header.Get("X-Content-Type-Options"))
	if r.status == http.StatusMethodNotAllowed {
		require.NotEmpty(t, a.header.Get("Allow"))
		require.NotContains(t, strings.Split(a.header.Get("Allow"), ", "), method)
	}
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM order_info"), "nothing is stored")
}

func TestAProblemNamesEachInputThatIsWrong(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	a := mustSend(t, http.MethodPost, s.api+"/v1/orders", `{"order_id":"a b","name":"","amount":0}`)
	require.Equal(t, http.StatusUnprocessableEntity, a.status)
	var fields []string
	for _, e := range a.problem(t).Errors {
		fields = append(fields, e.Field)
	}
	require.Equal(t, []string{"order_id", "name", "amount"}, fields)
	require.Equal(t, "/v1/orders", a.problem(t).Instance)
}

// What looks dangerous and is not refused must come out as it went in, through both databases and the broker.
func TestUnusualOrdersAreStoredAsTheyAre(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		names := []string{
			strings.Repeat("🍜", 30), "麻婆豆腐", "e\u0301", "👨\u200d👩\u200d👧", "é", "Ångström",
			`' OR 1=1 --`, `"; DROP TABLE platoon;--`, `\' OR 1=1 #`, `\`, `'`, `"`, "`", "?", "??", `%s%d%n`, `%00`, `$1`, `:name`,
			`<script>alert(1)</script>`, `{{7*7}}`, `=cmd()`, `${jndi:ldap://x}`, `null`, `0`, " x", "x ", "x  y", "x\u00a0y",
		}
		placed := map[string]string{}
		for i, name := range names {
			body, err := json.Marshal(map[string]any{"name": name, "amount": 1 + i})
			require.NoError(t, err)
			a := mustSend(t, http.MethodPost, s.api+"/v1/orders", string(body))
			require.Equal(t, http.StatusCreated, a.status, "%q: %s", name, a)
			require.Equal(t, name, a.order(t).Name)
			placed[a.order(t).OrderID] = name
		}
		for _, amount := range []int{1, 1<<31 - 1} {
			placed[s.place(t, "amount", amount)] = "amount"
		}
		s.awaitAllDispatched(t, len(placed)) // and both tables agree
		for id, name := range placed {
			require.Equal(t, name, s.get(t, id).Name)
			var stored string
			require.NoError(t, database(t, s.order).QueryRow("SELECT name FROM order_info WHERE orderId = ?", id).Scan(&stored))
			require.Equal(t, name, stored)
		}
		s.noFailures(t)
	})
}

func TestOrderIDsAreTakenAsTheyAre(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		ids := []string{"a", "A", "0", "-", "_", "-_-", strings.Repeat("o", 64), strings.Repeat("O", 64), "NULL", "null"}
		for _, id := range ids {
			a := mustSend(t, http.MethodPost, s.api+"/v1/orders", fmt.Sprintf(`{"order_id":%q,"name":"x","amount":1}`, id))
			require.Equal(t, http.StatusCreated, a.status, "%s: %s", id, a)
			require.Equal(t, "/v1/orders/"+id, a.header.Get("Location"))
			require.Equal(t, id, a.order(t).OrderID)
		}
		for _, id := range ids {
			require.Equal(t, id, s.awaitDispatched(t, id).OrderID)
		}
		require.Equal(t, len(ids), s.dispatchRows(t, "SELECT COUNT(*) FROM platoon"))
	})
}

func TestRequestsThatLookOddAndAreRightAreServed(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	for name, headers := range map[string][]string{
		"charset UTF-8":                {"Content-Type", "application/json; charset=utf-8"},
		"charset in quotes, capitals":  {"Content-Type", `Application/JSON;Charset="UTF-8"`},
		"encoding identity":            {"Content-Encoding", "identity"},
		"Accept of another type":       {"Accept", "text/html"},
		"Accept of nobody's type":      {"Accept", "application/x-nothing"},
		"Accept of nothing":            {"Accept", "*/*;q=0"},
		"Accept-Encoding":              {"Accept-Encoding", "br;q=1.0, gzip;q=0.8, *;q=0.1"},
		"an address claimed by itself": {"X-Forwarded-For", "'; DROP TABLE order_info; --"},
	} {
		t.Run(name, func(t *testing.T) {
			a := mustSend(t, http.MethodPost, s.api+"/v1/orders", goodOrder, headers...)
			require.Equal(t, http.StatusCreated, a.status, "%s", a)
			require.Equal(t, "application/json", a.header.Get("Content-Type"))
			require.Equal(t, "x", a.order(t).Name)
		})
	}
	t.Run("null for what may be left out", func(t *testing.T) {
		a := mustSend(t, http.MethodPost, s.api+"/v1/orders", `{"order_id":null,"name":"x","amount":1,"currency":null}`)
		require.Equal(t, http.StatusCreated, a.status, "%s", a)
		require.Equal(t, "CNY", a.order(t).Currency)
	})
	t.Run("escapes and white space", func(t *testing.T) {
		a := mustSend(t, http.MethodPost, s.api+"/v1/orders", " \n{ \"n\\u0061me\" :\t\"\\ud83c\\udf5c\" , \"amount\": 1 }\r\n ")
		require.Equal(t, http.StatusCreated, a.status, "%s", a)
		require.Equal(t, "🍜", a.order(t).Name)
	})
}

func TestHeadAnswersAsGetDoes(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	id := s.place(t, "x", 1)
	s.awaitDispatched(t, id)
	for _, path := range []string{"/v1/orders/" + id, "/v1/orders", "/v1/dispatches/" + id, "/v1/couriers", "/livez", "/openapi.json", "/docs/", "/v1/orders/nobody"} {
		head, get := mustSend(t, http.MethodHead, s.api+path, ""), mustGet(t, s.api+path)
		require.Equal(t, get.status, head.status, path)
		require.Equal(t, get.header.Get("Content-Type"), head.header.Get("Content-Type"), path)
		require.Empty(t, head.body, path)
	}
}

func TestRequestIDIsKeptWhenItCanBeAndReplacedWhenNot(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	for name, id := range map[string]string{
		"well-formed": "my-request_7", "64 characters": strings.Repeat("r", 64),
	} {
		t.Run(name, func(t *testing.T) {
			a := mustSend(t, http.MethodGet, s.api+"/v1/orders/nobody", "", "X-Request-Id", id)
			require.Equal(t, id, a.header.Get("X-Request-Id"))
			require.Equal(t, id, a.problem(t).RequestID)
			require.Equal(t, id, mustSend(t, http.MethodGet, s.api+"/livez", "", "X-Request-Id", id).header.Get("X-Request-Id"))
		})
	}
	for name, id := range map[string]string{
		"empty": "", "65 characters": strings.Repeat("r", 65), "blanks": "a b", "a tab": "a\tb", "quotes": `a"b`, "markup": "<script>",
		"not ASCII": "é", "not UTF-8": "\xff", "SQL": "';--", "a path": "../x",
	} {
		t.Run(name, func(t *testing.T) {
			a := mustSend(t, http.MethodGet, s.api+"/v1/orders/nobody", "", "X-Request-Id", id)
			require.Regexp(t, `^req_[0-9a-f-]{36}$`, a.header.Get("X-Request-Id"))
			require.Equal(t, a.header.Get("X-Request-Id"), a.problem(t).RequestID)
		})
	}
}

// connect opens a connection on which a test writes what no HTTP client would.
func (s *system) connect(t testing.TB) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.api, "http://"))
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	require.NoError(t, conn.SetDeadline(time.Now().Add(30*time.Second)))
	return conn
}

// read reads one HTTP answer.
func read(conn net.Conn) (answer, error) {
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return answer{response.StatusCode, response.Header, body}, err
}

// say writes the bytes on a connection of its own and returns the answer.
func (s *system) say(t testing.TB, request string) answer {
	t.Helper()
	conn := s.connect(t)
	_, err := io.WriteString(conn, request)
	require.NoError(t, err)
	a, err := read(conn)
	require.NoError(t, err)
	return a
}

func TestRequestsThatNoClientWritesAreRefused(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	post := func(headers, body string) string {
		return "POST /v1/orders HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + headers + "\r\n" + body
	}
	for _, r := range []struct {
		name, request string
		status        int
	}{
		{"no Content-Type", post("Content-Length: 23\r\n", goodOrder), 415},
		{"no Content-Length", post("Content-Type: application/json\r\n", goodOrder), 400},
		{"two Content-Lengths", post("Content-Type: application/json\r\nContent-Length: 23\r\nContent-Length: 22\r\n", goodOrder), 400},
		{"Content-Length and chunks", post("Content-Type: application/json\r\nContent-Length: 5\r\nTransfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"), 501},
		{"negative Content-Length", post("Content-Type: application/json\r\nContent-Length: -1\r\n", goodOrder), 400},
		{"Content-Length of 2^62", post("Content-Type: application/json\r\nContent-Length: 4611686018427387904\r\n", goodOrder), 413},
		{"chunk size that is none", post("Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n", "zz\r\n{}\r\n"), 400},
		{"a NUL in a header", post("Content-Type: application/json\r\nX-Request-Id: a\x00b\r\nContent-Length: 23\r\n", goodOrder), 400},
		{"a folded header", post("Content-Type:\r\n application/json\r\nContent-Length: 23\r\nX Y: z\r\n", goodOrder), 400},
		{"no Host", "GET /v1/orders HTTP/1.1\r\n\r\n", 400},
		{"a path without a slash", "GET v1/orders HTTP/1.1\r\nHost: x\r\n\r\n", 400},
		{"a raw line break in the path", "GET /v1/\norders HTTP/1.1\r\nHost: x\r\n\r\n", 400},
		{"HTTP/9.9", "GET /v1/orders HTTP/9.9\r\nHost: x\r\n\r\n", 505},
		{"asterisk", "OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404},
		{"CONNECT", "CONNECT example.com:443 HTTP/1.1\r\nHost: example.com:443\r\nConnection: close\r\n\r\n", 404},
		{"a URL of another host", "GET http://example.com/v1/nothing HTTP/1.1\r\nHost: example.com\r\nConnection: close\r\n\r\n", 404},
		{"not HTTP", "\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03\r\n\r\n", 400},
		{"one header of 1 MiB", "GET /v1/orders HTTP/1.1\r\nHost: x\r\nX-Large: " + strings.Repeat("a", 1<<20) + "\r\n\r\n", 431},
		{"one header of 24 KiB", "GET /v1/orders HTTP/1.1\r\nHost: x\r\nX-Large: " + strings.Repeat("a", 24<<10) + "\r\n\r\n", 431},
		{"2,000 headers", "GET /v1/orders HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X-Many: abcdef\r\n", 2000) + "\r\n", 431},
	} {
		t.Run(r.name, func(t *testing.T) {
			conn := s.connect(t)
			go func() { _, _ = io.WriteString(conn, r.request) }() // the answer may come before all is written
			a, err := read(conn)
			require.NoError(t, err)
			require.Equal(t, r.status, a.status, "%s", a)
			require.LessOrEqual(t, len(a.body), 1024)
		})
	}
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM order_info"))
}

func TestBodyMayHave64KiBAndNoByteMore(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	body := func(size int) string { return goodOrder + strings.Repeat(" ", size-len(goodOrder)) }
	chunked := func(size int) answer {
		request, err := http.NewRequest(http.MethodPost, s.api+"/v1/orders", struct{ io.Reader }{strings.NewReader(body(size))})
		require.NoError(t, err)
		request.Header.Set("Content-Type", "application/json")
		a, err := do(request)
		require.NoError(t, err)
		return a
	}
	require.Equal(t, http.StatusCreated, mustSend(t, http.MethodPost, s.api+"/v1/orders", body(64<<10)).status)
	require.Equal(t, http.StatusCreated, chunked(64<<10).status)
	for _, a := range []answer{mustSend(t, http.MethodPost, s.api+"/v1/orders", body(64<<10+1)), chunked(64<<10 + 1)} {
		require.Equal(t, http.StatusRequestEntityTooLarge, a.status, "%s", a)
		require.Equal(t, "body_too_large", a.problem(t).Code)
		require.NotEmpty(t, a.problem(t).RequestID)
	}
	require.Equal(t, 2, s.orderRows(t, "SELECT COUNT(*) FROM order_info"))
}

func TestEndlessBodyIsCut(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	conn := s.connect(t)
	answered := make(chan answer, 1)
	go func() {
		a, err := read(conn)
		if err == nil {
			answered <- a
		}
	}()
	_, err := io.WriteString(conn, "POST /v1/orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n")
	require.NoError(t, err)
	chunk := fmt.Appendf(nil, "%x\r\n%s\r\n", 64<<10, bytes.Repeat([]byte(" "), 64<<10))
	sent := 0
	for ; err == nil && sent < 256<<20; sent += len(chunk) {
		_, err = conn.Write(chunk)
	}
	require.Error(t, err, "the connection is closed")
	require.Less(t, sent, 64<<20, "most of what was sent stayed in the buffers of two kernels")
	select {
	case a := <-answered:
		require.Equal(t, http.StatusRequestEntityTooLarge, a.status, "%s", a)
		require.Equal(t, "body_too_large", a.problem(t).Code)
	case <-time.After(5 * time.Second):
		t.Fatal("no answer")
	}
}

// A client that sends a byte now and then holds a connection, and no longer than a few seconds.
func TestSlowRequestsEndByThemselves(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	slow := func(begin string, limit time.Duration, status int) func(t *testing.T) {
		return func(t *testing.T) {
			conn := s.connect(t)
			began := time.Now()
			_, err := io.WriteString(conn, begin)
			require.NoError(t, err)
			ended := make(chan answer, 1)
			go func() {
				a, _ := read(conn)
				_, _ = io.Copy(io.Discard, conn)
				ended <- a
			}()
			for tick := time.Tick(100 * time.Millisecond); ; {
				select {
				case a := <-ended:
					require.Less(t, time.Since(began), limit+3*time.Second)
					require.Equal(t, status, a.status, "%s", a)
					if status != 0 {
						require.Equal(t, "body_too_slow", a.problem(t).Code)
					}
					return
				case <-tick:
					_, _ = io.WriteString(conn, " ")
				}
			}
		}
	}
	const post = "POST /v1/orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
	atOnce(t, map[string]func(t *testing.T){
		"headers":      slow(post+"X-Slow: ", 5*time.Second, 0), // headers that never come are not answered
		"body":         slow(post+"Content-Length: 5000\r\n\r\n", 10*time.Second, http.StatusRequestTimeout),
		"chunked body": slow(post+"Transfer-Encoding: chunked\r\n\r\n1000\r\n", 10*time.Second, http.StatusRequestTimeout),
		"a body that takes longer than an order may": func(t *testing.T) {
			body, client := io.Pipe()
			go func() {
				_, _ = io.WriteString(client, `{"name":"unhurried",`)
				time.Sleep(6 * time.Second) // on a train, in a tunnel
				_, _ = io.WriteString(client, `"amount":1}`)
				_ = client.Close()
			}()
			request, err := http.NewRequest(http.MethodPost, s.api+"/v1/orders", body)
			require.NoError(t, err)
			request.Header.Set("Content-Type", "application/json")
			a, err := do(request)
			require.NoError(t, err)
			require.Equal(t, http.StatusCreated, a.status, "%s", a)
		},
	})
	require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM order_info"))
}

func TestClientThatHangsUpLeavesOneOrderOrNone(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		const each = 15
		order := func(kind string, i int) string {
			return fmt.Sprintf(`{"order_id":"%s-%d","name":"x","amount":1}`, kind, i)
		}
		for i := range each {
			for _, kind := range []string{"half", "whole"} {
				body := order(kind, i)
				sent := body
				if kind == "half" {
					sent = body[:len(body)/2]
				}
				conn := s.connect(t)
				_, err := fmt.Fprintf(conn, "POST /v1/orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), sent)
				require.NoError(t, err)
				require.NoError(t, conn.Close())
			}
			ctx, hangUp := context.WithTimeout(context.Background(), time.Duration(i)*500*time.Microsecond)
			request, err := http.NewRequestWithContext(ctx, http.MethodPost, s.api+"/v1/orders", strings.NewReader(order("late", i)))
			require.NoError(t, err)
			request.Header.Set("Content-Type", "application/json")
			_, _ = do(request)
			hangUp()
		}
		for i := range each {
			for _, kind := range []string{"half", "whole", "late"} {
				a := mustSend(t, http.MethodPost, s.api+"/v1/orders", order(kind, i))
				require.Contains(t, []int{http.StatusOK, http.StatusCreated}, a.status, "%s", a)
				if kind == "half" {
					require.Equal(t, http.StatusCreated, a.status, "half a body has no effect")
				}
			}
		}
		s.awaitAllDispatched(t, 3*each)
		s.noFailures(t)
	})
}

// openAPI is the part of the document that these tests read.
type openAPI struct {
	OpenAPI string                               `json:"openapi"`
	Paths   map[string]map[string]map[string]any `json:"paths"`
}

func (s *system) openAPI(t testing.TB) openAPI {
	t.Helper()
	a := mustGet(t, s.api+"/openapi.json")
	require.Equal(t, http.StatusOK, a.status)
	var doc openAPI
	require.NoError(t, json.Unmarshal(a.body, &doc))
	require.True(t, strings.HasPrefix(doc.OpenAPI, "3.1"), doc.OpenAPI)
	return doc
}

// served tells whether a path takes a method, without changing anything: a body that is no JSON changes nothing.
func (s *system) served(t testing.TB, method, path string) bool {
	t.Helper()
	path = strings.NewReplacer("{order_id}", "nobody", "{courier_id}", "nobody", "{id}", "1").Replace(path)
	a := mustSend(t, method, s.api+path, map[bool]string{true: "-"}[method != http.MethodGet])
	var p struct{ Code string }
	_ = json.Unmarshal(a.body, &p)
	return !slices.Contains([]string{"path_not_found", "method_not_allowed", "served_elsewhere"}, p.Code)
}

// The routes that the design knows. Each version serves some.
var allRoutes = []string{
	"POST /v1/orders", "GET /v1/orders", "GET /v1/orders/{order_id}", "POST /v1/orders/{order_id}/cancel",
	"GET /v1/orders/{order_id}/timeline", "GET /v1/dispatches/{order_id}", "POST /v1/dispatches/{order_id}/delivered",
	"GET /v1/payments/{order_id}", "GET /v1/points/{order_id}",
	"GET /v1/couriers", "POST /v1/couriers", "PATCH /v1/couriers/{courier_id}", "GET /v1/failures", "GET /v1/failures/{id}",
	"GET /v1/failures/groups", "GET /v1/failures/{id}/payload", "POST /v1/failures/retry", "POST /v1/failures/{id}/edit",
	"POST /v1/failures/{id}/retry", "POST /v1/failures/{id}/discard", "GET /v1/reconciliation", "POST /v1/reconciliation",
	"GET /v1/compensation", "POST /v1/compensation/resume",
	"GET /livez", "GET /readyz",
}

func checkOpenAPI(t *testing.T, s *system) []string {
	t.Helper()
	var documented []string
	for path, operations := range s.openAPI(t).Paths {
		for method, operation := range operations {
			route := strings.ToUpper(method) + " " + path
			documented = append(documented, route)
			require.Contains(t, allRoutes, route, "the routes of the design")
			require.True(t, s.served(t, strings.ToUpper(method), path), "%s is documented and not served", route)
			require.NotEmpty(t, operation["summary"], route)
			require.NotEmpty(t, operation["operationId"], route)
		}
	}
	for _, route := range allRoutes {
		method, path, _ := strings.Cut(route, " ")
		if s.served(t, method, path) {
			require.Contains(t, documented, route, "it is served and not documented")
		}
	}
	return documented
}

func TestOpenAPIDocumentsWhatIsServedAndNothingElse(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	documented := checkOpenAPI(t, s)
	require.Subset(t, documented, []string{"POST /v1/orders", "GET /v1/orders", "GET /v1/orders/{order_id}", "GET /v1/dispatches/{order_id}", "GET /v1/couriers"})

	place := s.openAPI(t).Paths["/v1/orders"]["post"]
	text, err := json.Marshal(place)
	require.NoError(t, err)
	require.Contains(t, string(text), "Idempotency-Key")
	require.Contains(t, string(text), `"amount":{`, "the body's members")
	require.NotContains(t, string(text), "binary")
	responses, _ := place["responses"].(map[string]any)
	for _, status := range []string{"200", "201", "400", "409", "413", "408", "415", "422", "503"} {
		require.Contains(t, responses, status, "POST /v1/orders may answer it")
	}
}

func TestProcessSaysWhichRoleServesAPath(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	shared := map[string]string{
		"TAKEOUT_BROKER_URL":            "sql:sqlite:" + filepath.Join(dir, "broker.db"),
		"TAKEOUT_DISPATCH_DATABASE_URL": "sqlite:" + filepath.Join(dir, "dispatch.db"),
		"TAKEOUT_ROLES":                 "dispatch",
	}
	p := startProcess(t, "dispatch", shared)
	s := &system{api: p.url, dispatchAPI: p.url}
	for _, path := range []string{"/v1/orders", "/v1/orders/o1"} {
		a := mustGet(t, s.api+path)
		require.Equal(t, http.StatusNotFound, a.status)
		require.Equal(t, "served_elsewhere", a.problem(t).Code)
		require.Contains(t, a.problem(t).Detail, "role order")
	}
	a := mustSend(t, http.MethodPost, s.api+"/v1/orders", goodOrder)
	require.Equal(t, "served_elsewhere", a.problem(t).Code)
	require.Equal(t, "path_not_found", mustGet(t, s.api+"/v1/ordersandmore").problem(t).Code)
	require.Equal(t, http.StatusOK, mustGet(t, s.api+"/v1/couriers").status)
	for _, route := range checkOpenAPI(t, s) {
		require.NotContains(t, route, "/v1/orders")
	}
}

var reference = regexp.MustCompile(`(?i)(?:src|href|action)\s*=\s*["']([^"']+)["']|(?:url|Url)\s*[:=]\s*["']([^"']+)["']|url\(["']?([^"')]+)`)

func TestDocumentationLoadsNothingFromOtherHosts(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	a := mustGet(t, s.api+"/docs") // is sent on to /docs/
	require.Equal(t, http.StatusOK, a.status)
	require.Contains(t, a.header.Get("Content-Type"), "text/html")
	require.Contains(t, string(a.body), "/openapi.json")
	loaded := 0
	for _, match := range reference.FindAllStringSubmatch(string(a.body), -1) {
		target := match[1] + match[2] + match[3]
		if strings.HasPrefix(target, "data:") {
			continue
		}
		u, err := url.Parse(target)
		require.NoError(t, err)
		require.Empty(t, u.Host, "/docs/ must not load %s", target)
		if strings.HasSuffix(u.Path, ".js") || strings.HasSuffix(u.Path, ".css") {
			asset := mustGet(t, s.api+parse(t, "/docs/").ResolveReference(u).String())
			require.Equal(t, http.StatusOK, asset.status, target)
			loaded++
		}
	}
	require.GreaterOrEqual(t, loaded, 2, "scripts and styles come from here")
	// Swagger UI asks a service of its makers to validate the document, unless told not to.
	require.Regexp(t, `validatorUrl:\s*(null|"none"|'none'|"")`, string(a.body))
}

func TestEventsThatWaitForLongMakeAProcessDegradedAndNotUnready(t *testing.T) {
	t.Parallel()
	s := startWith(t, production(t), func(cfg *service.Config) { cfg.Roles = []string{"order", "dispatch"} }) // and nobody relays
	s.place(t, "x", 1)
	ready := func() (int, string) {
		a := mustGet(t, s.api+"/readyz")
		var h httpapi.Health
		require.NoError(t, json.Unmarshal(a.body, &h), "%s", a)
		check := h.Checks["outbox order"]
		return a.status, fmt.Sprint(h.Status, " ", check.OK)
	}
	eventually(t, "one that came just now is nothing to worry about", func() error {
		if _, is := ready(); is != "ready true" {
			return errors.New(is)
		}
		return nil
	})
	alter(t, s.order, "UPDATE outbox SET created_at = created_at - INTERVAL 2 MINUTE")
	status, is := ready()
	require.Equal(t, "degraded false", is)
	require.Equal(t, http.StatusOK, status, "it can take orders")
}

func TestHealthAndMetricsAnswer(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		a := mustGet(t, s.api+"/livez")
		require.Equal(t, http.StatusOK, a.status)
		require.JSONEq(t, `{"status":"alive"}`, string(a.body))
		eventually(t, "it is ready", func() error {
			if a := mustGet(t, s.api+"/readyz"); a.status != http.StatusOK || !contains(a.body, `"status":"ready"`) {
				return errors.New(a.String())
			}
			return nil
		})
		require.Equal(t, http.StatusOK, mustGet(t, s.api+"/readyz?verbose").status, "as of Kubernetes' own endpoints")
		s.awaitDispatched(t, s.place(t, "x", 1))
		eventually(t, "the metrics count the order's events", func() error {
			metrics := mustGet(t, s.api+"/metrics")
			require.Equal(t, http.StatusOK, metrics.status)
			for _, line := range []string{
				`takeout_outbox_published_total{outbox="order",result="confirmed"} 1`, `takeout_outbox_pending{outbox="order"} 0`,
				"takeout_broker_up 1", "takeout_build_info{version=",
			} {
				if !contains(metrics.body, line) {
					return fmt.Errorf("%s is not in\n%s", line, metrics.body)
				}
			}
			return nil
		})
	})
}
