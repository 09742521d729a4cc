package tests

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"
	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"takeout/adapters/rabbitmq"
	"takeout/adapters/sqlbroker"
	"takeout/domain/event"
)

// publisher is a producer beside the program, on the same broker.
func (s *system) publisher(t testing.TB) message.Publisher {
	t.Helper()
	eventually(t, "the program has declared its queues", func() error {
		if a := mustGet(t, s.api+"/readyz"); !contains(a.body, `"status":"ready"`) {
			return fmt.Errorf("%s", a)
		}
		return nil
	})
	if strings.HasPrefix(s.broker, "amqp") {
		b, err := rabbitmq.Open(s.broker, rabbitmq.Config{}, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		t.Cleanup(func() { _ = b.Close() })
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		defer cancel()
		require.NoError(t, b.WaitReady(ctx))
		return b
	}
	b, err := sqlbroker.Open("sqlite:"+filepath.Join(s.cfg.DataDir, "broker.db"), sqlbroker.Config{}, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// announce returns an order's announcement as the program itself writes it.
func announce(t testing.TB, eventID, orderID string, amount int64) []byte {
	t.Helper()
	body, err := event.Encode(eventID, time.Now(), event.OrderPlaced{Order: event.Order{
		OrderID: orderID, Name: "Mapo tofu", Amount: amount, Currency: "CNY", Status: "placed", Version: 1, PlacedAt: time.Now(),
	}})
	require.NoError(t, err)
	return body
}

// publishAssignment announces that the courier zhao has the order, and returns the event's id.
func publishAssignment(t testing.TB, broker message.Publisher, orderID string) string {
	t.Helper()
	id := newEventID()
	body, err := event.Encode(id, time.Now(), event.DispatchAssigned{OrderID: orderID, CourierID: "zhao", AssignedAt: time.Now(), Version: 1})
	require.NoError(t, err)
	require.NoError(t, broker.Publish("dispatch.assigned", message.NewMessage(id, body)))
	return id
}

func newEventID() string { return "evt_" + uuid.Must(uuid.NewV7()).String() }

func (s *system) awaitDispatchRows(t testing.TB, want int, query string, args ...any) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d rows: %s", want, query), func() error {
		if n := s.dispatchRows(t, query, args...); n != want {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
}

func TestMessageThatCannotBeReadIsKeptWholeAndTheOthersGoOn(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		broker := s.publisher(t)
		good := func(change func(map[string]any)) []byte {
			var env map[string]any
			require.NoError(t, json.Unmarshal(announce(t, newEventID(), "o-"+uuid.NewString(), 100), &env))
			change(env)
			body, err := json.Marshal(env)
			require.NoError(t, err)
			return body
		}
		data := func(env map[string]any) map[string]any { return env["data"].(map[string]any) }
		hostile := map[string][]byte{
			"empty":                    nil,
			"not JSON":                 []byte("hello"),
			"truncated":                []byte(`{"specversion":"1.0","id":`),
			"byte order mark":          append([]byte("\xef\xbb\xbf"), good(func(map[string]any) {})...),
			"UTF-16":                   []byte("{\x00\"\x00a\x00\"\x00:\x001\x00}\x00"),
			"not UTF-8":                []byte("{\"id\":\"\xff\xfe\"}"),
			"an array":                 []byte(`[]`),
			"null":                     []byte(`null`),
			"a number":                 []byte(`1e400`),
			"deep":                     []byte(strings.Repeat("[", 100_000)),
			"no id":                    good(func(e map[string]any) { delete(e, "id") }),
			"id too long":              good(func(e map[string]any) { e["id"] = strings.Repeat("x", 101) }),
			"id with a line break":     good(func(e map[string]any) { e["id"] = "a\nb" }),
			"another spec":             good(func(e map[string]any) { e["specversion"] = "0.3" }),
			"another type":             good(func(e map[string]any) { e["type"] = "takeout.order.cancelled.v1" }),
			"an unknown version":       good(func(e map[string]any) { e["type"] = "takeout.order.placed.v9" }),
			"no data":                  good(func(e map[string]any) { delete(e, "data") }),
			"no time":                  good(func(e map[string]any) { delete(e, "time") }),
			"order version 0":          good(func(e map[string]any) { e["orderversion"] = 0 }),
			"order version -1":         good(func(e map[string]any) { e["orderversion"] = -1 }),
			"order version 2^31":       good(func(e map[string]any) { e["orderversion"] = 1 << 31 }),
			"amount as text":           good(func(e map[string]any) { data(e)["amount"] = "100" }),
			"amount 0":                 good(func(e map[string]any) { data(e)["amount"] = 0 }),
			"amount with a fraction":   good(func(e map[string]any) { data(e)["amount"] = 1.5 }),
			"amount too large":         good(func(e map[string]any) { data(e)["amount"] = 1 << 31 }),
			"name empty":               good(func(e map[string]any) { data(e)["name"] = " " }),
			"name too long":            good(func(e map[string]any) { data(e)["name"] = strings.Repeat("x", 31) }),
			"currency in small":        good(func(e map[string]any) { data(e)["currency"] = "cny" }),
			"order id with a blank":    good(func(e map[string]any) { e["subject"] = "a b"; data(e)["order_id"] = "a b" }),
			"order id too long":        good(func(e map[string]any) { id := strings.Repeat("x", 65); e["subject"] = id; data(e)["order_id"] = id }),
			"order id in Chinese":      good(func(e map[string]any) { e["subject"] = "订单"; data(e)["order_id"] = "订单" }),
			"another message's id":     good(func(map[string]any) {}),
			"subject of another order": good(func(e map[string]any) { e["subject"] = "another" }),
			"SQL":                      []byte(`'; DROP TABLE platoon; --`),
		}
		sent := map[string][]byte{}
		for name, body := range hostile {
			msg := message.NewMessage("", body) // as from a producer that knows no message ids
			if name == "another message's id" {
				msg.UUID = newEventID()
			}
			msg.Metadata.Set("x-from", name)
			sent[name] = body
			require.NoError(t, broker.Publish("order.placed", msg), name)
		}
		neighbour := s.place(t, "healthy", 100)
		s.awaitDispatched(t, neighbour)

		s.awaitDispatchRows(t, len(hostile), "SELECT COUNT(*) FROM failure WHERE consumer = 'dispatch.assign-courier' AND state = 'open'")
		rows, err := database(t, s.dispatch).Query("SELECT headers, error_class, error_code, attempts, payload_size, bytes FROM failure JOIN failure_payload ON failure_id = id")
		require.NoError(t, err)
		defer rows.Close()
		for rows.Next() {
			var headers, body []byte
			var class, code string
			var attempts, size int
			require.NoError(t, rows.Scan(&headers, &class, &code, &attempts, &size, &body))
			var kept map[string]string
			require.NoError(t, json.Unmarshal(headers, &kept))
			want, known := sent[kept["x-from"]]
			require.True(t, known, "headers are kept: %s", headers)
			require.Equal(t, string(want), string(body), kept["x-from"])
			require.Equal(t, len(want), size)
			require.Equal(t, "permanent", class, kept["x-from"])
			require.Equal(t, kept["x-from"] == "another message's id", code == "event_id_mismatch", "%s: %s", kept["x-from"], code)
			require.Equal(t, 1, attempts, "what can never work is not tried again: %s", kept["x-from"])
			delete(sent, kept["x-from"])
		}
		require.NoError(t, rows.Err())
		require.Empty(t, sent)
		require.Equal(t, 1, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon"), "none of them has an effect")
	})
}

func TestThousandCopiesOfOneEventHaveOneEffect(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		broker := s.publisher(t)
		handled := 0
		storm := func() {
			id := newEventID()
			body := announce(t, id, "o1", 100)
			handled += 1001
			var producers sync.WaitGroup
			for range 10 {
				producers.Go(func() {
					for range 100 {
						if err := broker.Publish("order.placed", message.NewMessage(id, body)); err != nil {
							t.Errorf("publish: %v", err)
						}
					}
				})
			}
			producers.Wait()
			s.awaitDispatched(t, s.place(t, "after the storm", 100))
			s.awaitHandled(t, "dispatch.assign-courier", handled)
			require.Equal(t, 1, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE orderId = 'o1'"))
			require.Zero(t, s.dispatchRows(t, "SELECT COUNT(*) FROM failure"))
		}
		storm()
		require.Equal(t, 2, s.dispatchRows(t, "SELECT COUNT(*) FROM inbox"))
		storm() // of an event that the inbox does not know, about an order that has its courier: nobody leaves a mark for the others
	})
}

// awaitHandled waits until a handler has handled so many messages, copies included.
func (s *system) awaitHandled(t testing.TB, handler string, messages int) {
	t.Helper()
	eventually(t, "what was sent is handled", func() error {
		handled := 0
		for sample := range strings.Lines(s.sampleOf(t, "takeout_handled_total{")) {
			if labels, value, _ := strings.Cut(strings.TrimSpace(sample), " "); strings.Contains(labels, strconv.Quote(handler)) {
				n, err := strconv.Atoi(value)
				require.NoError(t, err)
				handled += n
			}
		}
		if handled < messages {
			return fmt.Errorf("%s has handled %d of %d messages", handler, handled, messages)
		}
		return nil
	})
}

func TestOrderAnnouncedAgainUnderAnotherIDKeepsItsCourier(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		broker := s.publisher(t)
		for range 5 {
			id := newEventID()
			require.NoError(t, broker.Publish("order.placed", message.NewMessage(id, announce(t, id, "o1", 100))))
		}
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon")
		contradiction := newEventID()
		require.NoError(t, broker.Publish("order.placed", message.NewMessage(contradiction, announce(t, contradiction, "o1", 999))))
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM failure WHERE error_code = 'order_mismatch' AND order_id = 'o1'")
		require.Equal(t, 1, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon"))
		require.Equal(t, 1, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE order_money = 100"))
	})
}

func TestMessageThatKeepsFailingIsKeptAfterTheTriesAtOnceIfThereAreNoDelays(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := startWithDelays(t, st)
		id := publishAssignment(t, s.publisher(t), "unknown")
		s.awaitDispatched(t, s.place(t, "healthy", 100))
		s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM failure WHERE message_id = ? AND error_class = 'transient' AND attempts = 4 "+
			"AND error_code = 'order_not_found' AND order_id = 'unknown'", id)
	})
}

func TestEarlyMessageIsHandledWhenItsTimeHasCome(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		broker := s.publisher(t)
		publishAssignment(t, broker, "o-early")
		a := mustSend(t, "POST", s.api+"/v1/orders", `{"order_id":"o-early","name":"x","amount":1}`)
		require.Equal(t, 201, a.status, "%s", a)
		o := s.awaitDispatched(t, "o-early")
		require.NotEmpty(t, o.Dispatch.CourierID)
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = 'o-early'")
		require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM failure"))
	})
}

func TestStoppingNeverGivesUpAMessageThatWasBeingRetried(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := startOne(t, st)
		broker := s.publisher(t)
		const n = 30
		for i := range n {
			publishAssignment(t, broker, fmt.Sprint("later-", i))
		}
		s.stop(t) // between their attempts
		require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM failure"))
		s.start(t)
		for i := range n {
			a := mustSend(t, "POST", s.api+"/v1/orders", fmt.Sprintf(`{"order_id":"later-%d","name":"x","amount":1}`, i))
			require.Equal(t, 201, a.status, "%s", a)
		}
		for i := range n {
			s.awaitDispatched(t, fmt.Sprint("later-", i))
		}
	})
}

// foreign returns a channel of a client that knows nothing of this program, and the name of its exchange on the broker.
func (s stack) foreign(t testing.TB) (channel *amqp.Channel, exchange string) {
	t.Helper()
	u := parse(t, s.broker)
	exchange = u.Query().Get("namespace")
	u.RawQuery = ""
	conn, err := amqp.Dial(u.String())
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() })
	channel, err = conn.Channel()
	require.NoError(t, err)
	return channel, exchange
}

// A tool that knows nothing of this program: plain AMQP, its own headers, no message id.
func TestForeignAMQPClientIsUnderstood(t *testing.T) {
	t.Parallel()
	s := startOne(t, production(t))
	s.publisher(t) // the queues are there
	channel, exchange := s.foreign(t)
	publish := func(p amqp.Publishing) {
		t.Helper()
		require.NoError(t, channel.PublishWithContext(context.Background(), exchange, "order.placed", true, false, p))
	}
	strange := amqp.Table{
		"x-death": []any{amqp.Table{"count": int64(3), "reason": "expired"}}, "x-delivery-count": int64(7), "n": int32(-1), "ok": true,
		"when": time.Now(), "bytes": []byte{0xff, 0}, "nothing": nil, "float": 1.5, strings.Repeat("k", 200): strings.Repeat("v", 1000),
	}
	publish(amqp.Publishing{Body: announce(t, "foreign-1", "o-foreign-1", 100), Headers: strange, ReplyTo: "somewhere", Priority: 255, DeliveryMode: 1})
	publish(amqp.Publishing{Body: announce(t, "foreign-2", "o-foreign-2", 100), MessageId: "foreign-2", AppId: "tool"})
	publish(amqp.Publishing{Body: announce(t, "foreign-3", "o-foreign-3", 100), MessageId: "something else"})
	publish(amqp.Publishing{Body: []byte("\x00\x01 not an event"), Headers: strange, ContentType: "application/octet-stream"})
	for _, id := range []string{"o-foreign-1", "o-foreign-2"} {
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = ?", id)
	}
	s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM failure WHERE error_code = 'event_id_mismatch' AND message_id = 'something else'")
	s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM failure WHERE error_code = 'event_not_utf8' OR error_code = 'event_malformed'")
	require.Zero(t, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE orderId = 'o-foreign-3'"))
}

func TestHandlerCutAtTheEndOfTheDrainTimeLosesNothing(t *testing.T) {
	t.Parallel()
	st := production(t)
	s := &system{stack: st, cfg: config(t, st)}
	s.cfg.DrainTimeout = time.Second
	s.start(t)
	t.Cleanup(func() { s.stop(t) })
	s.addCourier(t, "zhao", 0)

	// Somebody holds the courier, so that the handler waits in the database until its time is over.
	holder, err := database(t, st.dispatch).Begin()
	require.NoError(t, err)
	defer func() { _ = holder.Rollback() }()
	_, err = holder.Exec("UPDATE courier SET on_duty = on_duty")
	require.NoError(t, err)
	id := s.place(t, "x", 1)
	eventually(t, "the handler waits for the courier", func() error {
		if n := executing(t, st.dispatch, "SELECT 1 FROM courier WHERE%"); n == 0 {
			return fmt.Errorf("nobody waits")
		}
		return nil
	})
	s.stop(t)
	require.NoError(t, holder.Rollback())
	require.Zero(t, s.dispatchRows(t, "SELECT COUNT(*) FROM failure"), "an interrupted message is not a failed one")
	s.start(t)
	s.awaitDispatched(t, id)
	s.noFailures(t)
}
