package tests

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"takeout/app"
	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/ports/httpapi"
	"takeout/ports/messaging"
	"takeout/service"
	"takeout/tests/testenv"
)

// routes are the queues of the whole program.
func routes() []messaging.Route { return messaging.Topology(app.UseCases{}, true) }

// rightEvents has one event of each type about an order that exists as it says. A new event needs one here.
func rightEvents(o event.Order) map[string]event.Event {
	cancelled := o
	cancelled.Status, cancelled.Version = "cancelled", o.Version+1
	at := o.PlacedAt.Add(time.Second)
	all := map[string]event.Event{}
	for _, e := range []event.Event{
		event.OrderPlaced{Order: o}, event.OrderCancelled{Order: cancelled, Reason: "rain", CancelledAt: at},
		event.DispatchAssigned{OrderID: o.OrderID, CourierID: "zhao", AssignedAt: at, Version: o.Version},
		event.DispatchDelivered{OrderID: o.OrderID, CourierID: "zhao", AssignedAt: at, DeliveredAt: at, Version: o.Version},
		event.DispatchImpossible{Order: o, GivenUpAt: at}, event.PaymentSucceeded{Order: o, Reference: "r", PaidAt: at},
		event.PaymentRefused{Order: o, Reason: "no", RefusedAt: at}, event.PaymentRefunded{Order: cancelled, Reference: "r", RefundedAt: at},
		event.PointsAwarded{OrderID: o.OrderID, Points: 1, AwardedAt: at, Version: o.Version},
	} {
		all[e.Key()] = e
	}
	return all
}

// wrongMessage is one that must be kept, by every consumer or by those that look at what is wrong with it.
type wrongMessage struct {
	name string
	body []byte
	code string // empty for any that begins with event_
	by   func(queue string) bool
}

func everybody(string) bool { return true }

// lookingAtTheOrder are the consumers of an event that use what it says of the order. Unless orders wait to be paid, one
// only waits for its turn.
func lookingAtTheOrder(queue string) bool { return queue != "dispatch.assign-courier-when-paid" }

// unreadable are wrong whatever the event is.
func unreadable(good []byte) []wrongMessage {
	all := []wrongMessage{}
	for name, body := range map[string]string{
		"empty": "", "a blank": " ", "text": "hello", "truncated": string(good[:len(good)/2]), "cut by a byte": string(good[:len(good)-1]),
		"a byte order mark": "\xef\xbb\xbf" + string(good), "UTF-16": utf16(string(good)), "UTF-16 with its mark": "\xff\xfe" + utf16(string(good)),
		"not UTF-8": strings.Replace(string(good), `"takeout`, "\"\xffakeout", 1), "half a surrogate": "\xed\xa0\x80", "NUL": "\x00",
		"an array of it": "[" + string(good) + "]", "null": "null", "a number": "1e400", "true": "true", "it twice": string(good) + string(good),
		"nested 100,000 deep": strings.Repeat("[", 100_000), "data nested deep": `{"data":` + strings.Repeat(`{"a":`, 50_000), "XML": "<order/>", "a form": "id=1&data=2",
		"SQL": "'; DROP TABLE platoon; --", "CloudEvents in batch": "[]", "gzip": "\x1f\x8b\x08\x00\x00", "2 MiB of blanks": strings.Repeat(" ", 2<<20),
	} {
		all = append(all, wrongMessage{name: name, body: []byte(body), by: everybody})
	}
	return all
}

// changed returns the event with one member of its envelope or, below data, of its data changed; nil takes it away.
func changed(t testing.TB, good []byte, path string, value any) []byte {
	t.Helper()
	var envelope map[string]any
	require.NoError(t, json.Unmarshal(good, &envelope))
	object, name := envelope, path
	if member, below := strings.CutPrefix(path, "data."); below {
		object, name = envelope["data"].(map[string]any), member
	}
	object[name] = value
	if value == nil {
		delete(object, name)
	}
	body, err := json.Marshal(envelope)
	require.NoError(t, err)
	return body
}

// wrongMembers have a member that is missing or of the wrong type, or one that no event of that type can have.
func wrongMembers(t testing.TB, key string, good []byte) []wrongMessage {
	t.Helper()
	var all []wrongMessage
	add := func(path string, value any, code string, by func(string) bool) {
		all = append(all, wrongMessage{name: fmt.Sprintf("%s is %.30v", path, value), body: changed(t, good, path, value), code: code, by: by})
	}
	long := strings.Repeat("x", 300)
	for path, values := range map[string][]any{
		"specversion": {nil, "", "0.3", "1.0 ", 1.0, []any{}}, "id": {nil, "", "a b", "a\nb", "é", long, 1, []any{}, map[string]any{}},
		"type": {nil, "", "takeout.order.eaten.v1", "takeout.order.placed.v2", 1}, "subject": {nil, "", "another", 1, []any{}},
		"time": {nil, "", "yesterday", "2026-02-30T00:00:00Z", 0, "0001-01-01T00:00:00Z"}, "data": {nil, "", 1, []any{}, true},
		"orderversion": {nil, 0, -1, 1 << 31, 1 << 40, 1.5, "1", -1 << 62, true, []any{}},
	} {
		for _, value := range values {
			add(path, value, "", everybody)
		}
	}
	add("time", "2001-01-01T00:00:00Z", "too_old", everybody)
	add("time", "9999-12-31T23:59:59Z", "bad_time", everybody)
	add("time", "9999-12-31T23:59:59-14:00", "bad_time", everybody)
	var envelope struct{ Data map[string]any }
	require.NoError(t, json.Unmarshal(good, &envelope))
	switch key {
	case "order.placed":
		for _, status := range []any{nil, "", "eaten", "Placed", "dispatched", "delivered", "cancelled"} {
			add("data.status", status, "event_contradictory", everybody)
		}
		at := envelope.Data["placed_at"]
		for code, wrong := range map[string][]any{
			"event_malformed":     {"zhao", 7, true, []any{}, map[string]any{"courier_id": 7}, map[string]any{"courier_id": "zhao", "assigned_at": "now"}},
			"courier_id_":         {map[string]any{}, map[string]any{"courier_id": "bad id!", "assigned_at": at}},
			"assigned_at_":        {map[string]any{"courier_id": "zhao", "assigned_at": "1066-10-14T09:00:00Z"}},
			"delivered_at_":       {map[string]any{"courier_id": "zhao", "assigned_at": at, "delivered_at": "0001-01-01T00:00:00Z"}},
			"event_contradictory": {map[string]any{"courier_id": "zhao", "assigned_at": at}, map[string]any{"courier_id": "zhao", "assigned_at": at, "delivered_at": at}},
		} {
			for _, dispatch := range wrong {
				add("data.dispatch", dispatch, code, everybody)
			}
		}
	case "order.cancelled":
		for _, reason := range []any{strings.Repeat("x", order.MaxReason+1), "  ", "a\x00b", "a\u202eb", "a\nb"} {
			add("data.reason", reason, "reason_", everybody)
		}
	}
	for name, value := range envelope.Data {
		_, text := value.(string)
		for _, wrong := range []any{"1", 7, 1.5, true, []any{}, map[string]any{"a": 1}, []any{value}} {
			_, alsoText := wrong.(string)
			_, number := value.(float64)
			if text && alsoText && !strings.HasSuffix(name, "_at") || number && wrong == any(7) {
				continue
			}
			add("data."+name, wrong, "event_malformed", everybody)
		}
		for _, wrong := range map[string][]any{
			"order_id": {nil, "", "another"}, "version": {nil, 0, -1, 1 << 31},
		}[name] {
			add("data."+name, wrong, "event_contradictory", everybody)
		}
		for _, wrong := range map[string][]any{
			"amount": {nil, 0, -1, 1 << 31, int64(1) << 62}, "currency": {nil, "", "cny", "CNYY", "С№Y", "A\x00B"},
			"name":       {nil, "", "  ", strings.Repeat("x", 31), "a\x00b", "a\u202eb", "a\nb"},
			"courier_id": {nil, "", "a b", "a\nb", strings.Repeat("c", 65), "骑手"},
			"placed_at":  {nil, "0001-01-01T00:00:01Z", "1969-12-31T23:59:59Z", "9999-12-31T23:59:59-14:00"},
			"points":     {-1, 1 << 31, int64(1) << 62},
		}[name] {
			add("data."+name, wrong, name+"_", lookingAtTheOrder)
		}
		if slices.Contains([]string{"assigned_at", "delivered_at", "cancelled_at"}, name) {
			add("data."+name, "9999-12-31T23:59:59-14:00", name+"_", everybody)
			add("data."+name, "1066-10-14T09:00:00Z", name+"_", everybody)
		}
	}
	return all
}

// contradictory are readable and right by themselves, and not what is known of the order.
func contradictory(t testing.TB, key string, good []byte) []wrongMessage {
	t.Helper()
	var all []wrongMessage
	add := func(path string, value any, queues ...string) {
		all = append(all, wrongMessage{name: fmt.Sprintf("another order's %s", path), body: changed(t, good, path, value), code: "order_mismatch",
			by: func(queue string) bool { return slices.Contains(queues, queue) }})
	}
	for path, value := range map[string]any{"data.amount": 999, "data.currency": "EUR"} {
		switch key {
		case "order.placed":
			add(path, value, "dispatch.assign-courier", "compensation.recreate-order", "payment.charge-order")
		case "dispatch.impossible":
			add(path, value, "order.cancel-undispatchable")
		case "payment.refused":
			add(path, value, "order.cancel-unpaid")
		}
	}
	return all
}

// withoutFailures is the contents of the databases but for what is kept of failures.
func (s *system) withoutFailures(t testing.TB) map[string]string {
	t.Helper()
	all := contents(t, s.order, s.dispatch, s.payment, s.points)
	maps.DeleteFunc(all, func(table, _ string) bool {
		return strings.Contains(table, " failure") || strings.HasSuffix(table, " sqlite_sequence") ||
			strings.HasSuffix(table, " inbox") // who does not look at what is wrong has handled it
	})
	require.Greater(t, len(all), 20)
	return all
}

// keptMessage is what is kept of a message.
type keptMessage struct {
	class, code string
	attempts    int
	body        string
}

// kept returns the failures of all databases by consumer and the header x-case.

func (s *system) kept(t testing.TB) map[string]keptMessage {
	t.Helper()
	all := map[string]keptMessage{}
	for _, url := range []string{s.order, s.dispatch, s.payment, s.points} {
		rows, err := database(t, url).Query("SELECT consumer, headers, error_class, error_code, attempts, part, bytes FROM failure JOIN failure_payload ON failure_id = id ORDER BY id, part")
		require.NoError(t, err)
		defer rows.Close()
		for rows.Next() {
			var consumer string
			var headers, part []byte
			var k keptMessage
			var n int
			require.NoError(t, rows.Scan(&consumer, &headers, &k.class, &k.code, &k.attempts, &n, &part))
			var texts map[string]string
			require.NoError(t, json.Unmarshal(headers, &texts))
			name := consumer + ": " + texts["x-case"]
			k.body = all[name].body + string(part)
			all[name] = k
		}
		require.NoError(t, rows.Err())
	}
	return all
}

// Every event is sent with everything wrong that fits it, to every consumer that there is.
func TestWrongEventOfAnyTypeIsKeptByEachOfItsConsumersAndChangesNothing(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := startWith(t, st, func(cfg *service.Config) { cfg.ReconcileEvery = 0 })
		publish := s.stranger(t)
		s.nobodyOnDuty(t)
		id := s.place(t, "x", 500)
		eventually(t, "the order waits for a courier, and is paid", func() error {
			if n := s.orderRows(t, "SELECT points FROM order_info"); n != 5 {
				return fmt.Errorf("%d points", n)
			}
			return nil
		})
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE state = 'waiting'")
		for _, url := range []string{s.order, s.dispatch, s.payment, s.points} {
			eventually(t, "the outboxes are empty", func() error {
				if n := count(t, url, "SELECT COUNT(*) FROM outbox"); n != 0 {
					return fmt.Errorf("%d", n)
				}
				return nil
			})
		}
		before := s.withoutFailures(t)
		stored := s.get(t, id)
		events := rightEvents(event.Order{OrderID: id, Name: "x", Amount: 500, Currency: "CNY", Status: "placed", Version: 1, PlacedAt: stored.PlacedAt})

		want := map[string]wrongMessage{}
		for key, e := range events {
			good := encode(t, newEventID(), time.Now(), e)
			for i, wrong := range slices.Concat(unreadable(good), wrongMembers(t, key, good), contradictory(t, key, good)) {
				name := fmt.Sprintf("%s %d: %s", key, i, wrong.name)
				for _, route := range routes() {
					if route.Event == key && wrong.by(route.Queue) {
						want[route.Queue+": "+name] = wrong
					}
				}
				publish(key, "", wrong.body, map[string]string{"x-case": name})
			}
		}
		for _, route := range routes() {
			require.Contains(t, events, route.Event, "a new event needs one above")
		}
		var kept map[string]keptMessage
		eventually(t, "all are kept", func() error {
			kept = s.kept(t)
			var missing []string
			for name := range want {
				if _, ok := kept[name]; !ok {
					missing = append(missing, name)
				}
			}
			if len(missing) > 0 {
				slices.Sort(missing)
				return fmt.Errorf("%d of %d are missing: %s", len(missing), len(want), strings.Join(missing[:min(len(missing), 10)], "\n"))
			}
			return nil
		})
		for name, wrong := range want {
			k, ok := kept[name]
			require.True(t, ok, "not kept: %s %.300q", name, wrong.body)
			require.Equal(t, "permanent", k.class, "%s: %s", name, k.code)
			require.Equal(t, 1, k.attempts, "%s is not tried again, and so kept at once", name)
			require.Equal(t, sha256.Sum256(wrong.body), sha256.Sum256([]byte(k.body)), "%s is kept whole", name)
			require.True(t, strings.HasPrefix(k.code, wrong.code) && (wrong.code != "" || strings.HasPrefix(k.code, "event_")), "%s has the code %s", name, k.code)
		}
		for name := range kept {
			require.Contains(t, want, name)
		}
		require.Equal(t, before, s.withoutFailures(t))
		s.addCourier(t, "qian", 0)
		s.awaitDispatched(t, id)
		s.awaitDispatched(t, s.place(t, "a neighbour", 1))
	})
}

// What one consumer of an event refuses, none acts on: otherwise an order is on its way that is not placed.
func TestEventThatOneConsumerRefusesIsActedOnByNone(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		publish := s.stranger(t)
		id := s.place(t, "x", 500)
		s.awaitDispatched(t, id)
		s.awaitPayment(t, id, "succeeded")
		kept := func(code string, orderID string, consumers ...string) {
			eventually(t, code+" is kept by each consumer", func() error {
				for _, consumer := range consumers {
					n := 0
					for _, url := range []string{s.order, s.dispatch, s.payment} {
						n += count(t, url, "SELECT COUNT(*) FROM failure WHERE consumer = ? AND order_id = ? AND error_code = ? AND attempts = 1", consumer, orderID, code)
					}
					if n != 1 {
						return fmt.Errorf("%s has %d", consumer, n)
					}
				}
				return nil
			})
		}
		for orderID, wrong := range map[string]struct {
			change func(*event.OrderPlaced)
			code   string
		}{
			"o-cancelled": {func(e *event.OrderPlaced) { e.Status = "cancelled" }, "event_contradictory"},
			"o-eaten":     {func(e *event.OrderPlaced) { e.Status = "eaten" }, "event_contradictory"},
			"o-nothing":   {func(e *event.OrderPlaced) { e.Status = "" }, "event_contradictory"},
			"o-alone":     {func(e *event.OrderPlaced) { e.Status = "dispatched" }, "event_contradictory"},
			"o-courier": {func(e *event.OrderPlaced) {
				e.Status, e.Dispatch = "dispatched", &event.Courier{CourierID: "bad id!", AssignedAt: e.PlacedAt}
			}, "courier_id_invalid"},
		} {
			e := placedAs(orderID)
			wrong.change(&e)
			publish(e.Key(), "", encode(t, newEventID(), time.Now(), e), nil)
			kept(wrong.code, orderID, "compensation.recreate-order", "dispatch.assign-courier", "payment.charge-order")
		}
		stored := s.get(t, id)
		cancelled := event.OrderCancelled{Order: event.Order{
			OrderID: id, Name: "x", Amount: 500, Currency: "CNY", Status: "cancelled", Version: 3, PlacedAt: stored.PlacedAt,
		}, Reason: strings.Repeat("x", order.MaxReason+1), CancelledAt: time.Now()}
		publish(cancelled.Key(), "", encode(t, newEventID(), time.Now(), cancelled), nil)
		kept("reason_too_long", id, "compensation.recreate-cancelled-order", "dispatch.release-courier", "payment.refund-order")

		require.Equal(t, "dispatched", s.get(t, id).Status)
		require.Equal(t, "assigned", s.dispatchOf(t, id).State)
		s.awaitPayment(t, id, "succeeded")
		for table, url := range map[string]string{"order_info": s.order, "platoon": s.dispatch, "payment": s.payment, "simulated_charge": s.payment} {
			require.Equal(t, 1, count(t, url, "SELECT COUNT(*) FROM "+table), table)
		}
	})
}

func TestWrongAnnouncementIsRefusedAlsoWhereOrdersWaitToBePaid(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		c := choreograph(t, st, app.DispatchPolicy{AfterPayment: true}, 0, 0)
		right, wrong := placedAs("o-right"), placedAs("o-wrong")
		wrong.Status = "cancelled"
		require.NoError(t, c.dispatches.AssignPlaced(t.Context(), right))
		require.NoError(t, c.dispatches.AssignPlacedMany(t.Context(), []event.OrderPlaced{right}))
		require.Equal(t, domain.Invalid, domain.KindOf(c.dispatches.AssignPlaced(t.Context(), wrong)))
		require.Equal(t, domain.Invalid, domain.KindOf(c.dispatches.AssignPlacedMany(t.Context(), []event.OrderPlaced{right, wrong})))
	})
}

func TestMessageIDThatIsNoneOfOursIsKeptAsFarAsItCanBe(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		publish := s.stranger(t)
		longest := 300
		if strings.HasPrefix(s.broker, "amqp") {
			longest = 255 // which is all that AMQP carries
		}
		ids := []string{
			strings.Repeat("x", longest), strings.Repeat("é", longest/2), "a b", "a\r\nINJECTED", "a\x00b", "\x1b[2J", "\xff\xfe", "🍜", "'; DROP TABLE failure; --", "\u202e", "-1",
		}
		for i, id := range ids {
			publish("order.placed", id, announce(t, newEventID(), fmt.Sprint("o-", i), 100), map[string]string{"x-case": fmt.Sprint(i)})
		}
		s.awaitDispatchRows(t, len(ids), "SELECT COUNT(*) FROM failure WHERE error_code = 'event_id_mismatch' AND attempts = 1 AND state = 'open'")
		s.awaitCount(t, len(ids), "SELECT COUNT(*) FROM failure WHERE error_code = 'event_id_mismatch'")
		for _, f := range s.listFailures(t, "?limit=200").Items { // and can be shown and closed
			require.Equal(t, "event_id_mismatch", f.Code)
			decoded[httpapi.FailureBody](t, mustSend(t, "POST", s.api+"/v1/failures/"+f.ID+"/discard", `{"reason":"not ours"}`), 200)
		}
		require.Zero(t, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon"))
		s.awaitDispatched(t, s.place(t, "a neighbour", 1))
	})
}

// What another AMQP client sets beside the body has no effect: an order is dispatched once, and by what its body says.
func TestWhatAForeignClientSetsBesideTheBodyHasNoEffect(t *testing.T) {
	t.Parallel()
	s := startOne(t, production(t))
	s.publisher(t) // the queues are there
	channel, exchange := s.foreign(t)
	require.NoError(t, channel.Confirm(false))
	elsewhere, err := channel.QueueDeclare("", false, true, true, false, nil)
	require.NoError(t, err)

	every := amqp.Table{
		"bool": true, "int8": int8(-128), "uint8": uint8(255), "int16": int16(-1), "uint16": uint16(65535), "int32": int32(math.MinInt32), "uint32": uint32(math.MaxUint32),
		"int64": int64(math.MinInt64), "float": float32(-math.MaxFloat32), "double": math.SmallestNonzeroFloat64, "decimal": amqp.Decimal{Scale: 255, Value: math.MinInt32},
		"text": "a\x00b\xff\u202e", "empty": "", "bytes": []byte{0, 255}, "list": []any{int32(1), []any{amqp.Table{"x": nil}}, "y"}, "table": amqp.Table{"a": amqp.Table{"b": []any{}}},
		"time": time.Unix(-1<<40, 0), "void": nil, "": "no name", "\xff\xfe": "not UTF-8", strings.Repeat("k", 255): "long", "large": strings.Repeat("v", 60_000),
	}
	var deep any
	for range 100 {
		deep = amqp.Table{"in": []any{deep}}
	}
	many := amqp.Table{}
	for i := range 9000 {
		many[fmt.Sprint(i)] = nil
	}
	cases := map[string]amqp.Publishing{
		"headers of every type":      {Headers: every},
		"headers 200 deep":           {Headers: amqp.Table{"deep": deep}},
		"9,000 headers":              {Headers: many},
		"a list of 9,000":            {Headers: amqp.Table{"list": make([]any, 9000)}},
		"the broker's own records":   {Headers: amqp.Table{"x-death": []any{amqp.Table{"reason": "delivery_limit", "count": int64(99)}}, "x-delivery-count": int64(1000), "x-acquired-count": int64(-1)}},
		"our own mark":               {Headers: amqp.Table{"takeout-undeliverable": "the broker gave it up", "amqp-redelivered": "true"}},
		"a count of attempts":        {Headers: amqp.Table{"x-attempt": int64(-1), "attempts": int64(1e9), "x-retry": "NaN", "tier": int32(99), "failure_id": int64(1)}},
		"a signature that is none":   {Headers: amqp.Table{event.SignatureHeader: int64(7)}},
		"an order in the headers":    {Headers: amqp.Table{"order_id": "o-other", "ce-subject": "o-other", "ce-type": "takeout.order.cancelled.v1"}},
		"reply to a queue":           {ReplyTo: elsewhere.Name, CorrelationId: strings.Repeat("c", 255)},
		"reply to nowhere":           {ReplyTo: "\x00"},
		"priority 255":               {Priority: 255},
		"not persistent":             {DeliveryMode: 1},
		"an hour to live":            {Expiration: "3600000"},
		"made in 1970":               {Timestamp: time.Unix(1, 0)},
		"made in 10000":              {Timestamp: time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC)},
		"text/xml":                   {ContentType: "text/xml; charset=utf-16"},
		"a type of 255 bytes":        {ContentType: strings.Repeat("x", 255), Type: strings.Repeat("\xff", 255), AppId: "\x1b[2J"},
		"gzip that is none":          {ContentType: "application/json", ContentEncoding: "gzip"},
		"a batch that is none":       {ContentType: "application/cloudevents-batch+json"},
		"a copy to another consumer": {Headers: amqp.Table{"CC": []any{"order.cancelled"}}},
		"a blind copy":               {Headers: amqp.Table{"BCC": []any{"dispatch.assigned", "nobody"}}},
	}
	names := slices.Sorted(maps.Keys(cases))
	for i, name := range names {
		p := cases[name]
		p.Body = announce(t, newEventID(), fmt.Sprint("o-", i), int64(100+i))
		confirm, err := channel.PublishWithDeferredConfirmWithContext(t.Context(), exchange, "order.placed", true, false, p)
		require.NoError(t, err, name)
		acked, err := confirm.WaitContext(t.Context())
		require.NoError(t, err, name)
		require.True(t, acked, "%s: the broker has it", name)
	}
	for i, name := range names {
		eventually(t, name+" is dispatched", func() error {
			if n := s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE orderId = ? AND order_money = ? AND state = 'assigned'", fmt.Sprint("o-", i), 100+i); n != 1 {
				return fmt.Errorf("%d rows; failures: %q", n, rowTexts(t, s.dispatch, "SELECT message_id, error_code, error_text FROM failure"))
			}
			return nil
		})
		s.awaitDispatchedOnceMade(t, fmt.Sprint("o-", i))
	}
	require.Equal(t, len(cases), s.dispatchRows(t, "SELECT COUNT(*) FROM platoon"))
	// RabbitMQ itself sends copies, which other consumers keep: they are of no type that these handle.
	s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM failure WHERE consumer = 'dispatch.release-courier' AND error_code = 'event_type_unexpected'")
	s.awaitCount(t, 1, "SELECT COUNT(*) FROM failure WHERE consumer = 'order.mark-dispatched' AND error_code = 'event_type_unexpected'")
	s.awaitCount(t, 1, "SELECT COUNT(*) FROM failure WHERE consumer = 'compensation.recreate-cancelled-order' AND error_code = 'event_type_unexpected'")
	require.Equal(t, 1, s.dispatchRows(t, "SELECT COUNT(*) FROM failure"))
	require.Equal(t, 2, s.orderRows(t, "SELECT COUNT(*) FROM failure"))
	_, answered, err := channel.Get(elsewhere.Name, true)
	require.NoError(t, err)
	require.False(t, answered, "nobody replies")
	require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE status = 'dispatched' AND orderId = 'o-0'"))
}

// A message that has no time to live either has its effect or is kept as what the broker gave up.
func TestMessageThatExpiresAtOnceIsHandledOrKept(t *testing.T) {
	t.Parallel()
	s := startOne(t, production(t))
	s.publisher(t)
	channel, exchange := s.foreign(t)
	const n = 20
	for i := range n {
		require.NoError(t, channel.PublishWithContext(t.Context(), exchange, "order.placed", true, false,
			amqp.Publishing{Body: announce(t, newEventID(), fmt.Sprint("o-", i), 100), Expiration: "0", DeliveryMode: 1}))
	}
	eventually(t, "each is handled or kept", func() error {
		dispatched := s.dispatchRows(t, "SELECT COUNT(*) FROM platoon")
		if kept := s.dispatchRows(t, "SELECT COUNT(*) FROM failure WHERE error_class = 'undeliverable' AND error_text LIKE '%expired%'"); dispatched+kept != n {
			return fmt.Errorf("%d dispatched, %d kept", dispatched, kept)
		}
		return nil
	})
}

func TestMessageLargerThanAnyServerTakesAtOnceIsKeptWhole(t *testing.T) {
	t.Parallel()
	s := startOne(t, production(t))
	const size = 16 << 20 // the largest that RabbitMQ 4 takes
	body := bytes.Repeat([]byte("takeout "), size/8)
	s.stranger(t)("order.placed", "", body, map[string]string{"x-case": "large"})
	s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM failure WHERE payload_size = ?", size)
	s.awaitCount(t, 1, "SELECT COUNT(*) FROM failure WHERE payload_size = ?", size)
	require.Equal(t, sha256.Sum256(body), sha256.Sum256([]byte(s.kept(t)["dispatch.assign-courier: large"].body)))
	s.awaitDispatched(t, s.place(t, "a neighbour", 1))
}

// Quotes take twice their room in a statement.
func TestMessageLargerThanItsServersPacketsIsKeptWholeAndItsNeighboursGoOn(t *testing.T) {
	t.Parallel()
	server := testenv.StartMySQL(t, "--max-allowed-packet=1M")
	s := startOne(t, stack{order: server.URL("orders"), dispatch: server.URL("dispatch"), payment: server.URL("payment"), points: server.URL("points"),
		broker: testenv.AMQP(t)})
	publish := s.stranger(t)
	unreadable := bytes.Repeat([]byte(`"`), 1<<20)
	publish("dispatch.assigned", "evt_unreadable", unreadable, map[string]string{"x-case": "unreadable"})
	id := newEventID()
	early := encode(t, id, time.Now(), event.DispatchAssigned{OrderID: "o-early", CourierID: "zhao", AssignedAt: time.Now(), Version: 1})
	early = append(bytes.Repeat([]byte(" "), 1<<20), early...)
	publish("dispatch.assigned", id, early, map[string]string{"x-case": "early"})
	s.awaitDispatched(t, s.place(t, "a neighbour", 1))
	s.awaitCount(t, 2, "SELECT COUNT(*) FROM failure")
	kept := s.kept(t)
	require.Equal(t, sha256.Sum256(unreadable), sha256.Sum256([]byte(kept["order.mark-dispatched: unreadable"].body)))
	require.Equal(t, sha256.Sum256(early), sha256.Sum256([]byte(kept["order.mark-dispatched: early"].body)))

	orders, large := openOrders(t, s.order), givenUpBy("order.nobody", "m1", "o1", "c", "e")
	large.Payload = unreadable
	refused := domain.KindOf(orders.Delay(t.Context(), large, 1, time.Hour))
	// A server that has seen how long it is may hang up before its answer is read.
	require.Contains(t, []domain.Kind{domain.Invalid, domain.Unavailable}, refused, "it is no use to wait")
	large.Payload = unreadable[:256<<10]
	require.NoError(t, orders.Delay(t.Context(), large, 1, time.Hour), "the largest that consumers delay")
}
