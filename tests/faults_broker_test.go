package tests

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"takeout/adapters/rabbitmq"
	"takeout/app"
	"takeout/tests/testenv"
)

// One broker and one database server of their own have one trouble after the other.
func TestServersThatFreezeOrDieTogetherWithEverythingElseLoseNothing(t *testing.T) {
	t.Parallel()
	broker, server := testenv.StartRabbitMQ(t), testenv.StartMySQL(t)
	s := startRoles(t, stack{order: server.URL("orders"), dispatch: server.URL("dispatch"), broker: broker.URL()}, "order", "dispatch", "relay")
	placed := 0
	place := func(n int) {
		t.Helper()
		s.placeMany(t, n, 16)
		placed += n
	}
	healthy := func() {
		t.Helper()
		place(20)
		placed = s.orderRows(t, "SELECT COUNT(*) FROM order_info")
		s.awaitAllDispatched(t, placed)
		s.awaitRest(t)
		s.noFailures(t)
	}
	goroutines := func() (all map[string]int) {
		all = map[string]int{}
		for role, p := range s.processes {
			metrics := string(mustGet(t, p.url+"/metrics").body)
			_, after, _ := strings.Cut(metrics, "\ngo_goroutines ")
			var n int
			_, err := fmt.Sscan(after, &n)
			require.NoError(t, err)
			all[role] = n
		}
		return all
	}
	place(200) // as many connections as there may be
	healthy()
	before := goroutines()

	// The broker stands still: orders are taken as fast as ever.
	broker.Freeze()
	began := time.Now()
	place(100)
	slowest := time.Since(began)
	require.Less(t, slowest, 10*time.Second, "100 orders, 16 at a time; a confirm is waited for that long")
	eventually(t, "readiness tells of the broker", func() error {
		if a := mustGet(t, s.processes["relay"].url+"/readyz"); !contains(a.body, "no connection to the broker") {
			return fmt.Errorf("%s", a)
		}
		return nil
	})
	broker.Thaw()
	healthy()

	// The database stands still: nobody waits for ever.
	server.Freeze()
	s.refusesOrders(t)
	server.Thaw()
	s.awaitTaken(t)
	healthy()
	eventually(t, "what was begun has ended", func() error {
		for role, n := range goroutines() {
			if n > before[role]+before[role]/10+40 { // each of the 32 connections that a pool keeps for a minute has one
				return fmt.Errorf("%s has %d goroutines and had %d", role, n, before[role])
			}
		}
		return nil
	})

	// Everything dies with work under way, and everything starts at once.
	load := &crashLoad{api: s.api, stop: make(chan struct{})}
	load.placeThrough(t, 200, 8)
	eventually(t, "work is under way", func() error {
		if n := load.accepted.Load(); n < 50 {
			return fmt.Errorf("%d accepted", n)
		}
		return nil
	})
	for _, p := range s.processes {
		p.kill()
	}
	broker.Kill()
	server.Kill()
	for _, p := range s.processes {
		p.launch(t)
	}
	server.Start() // within the half minute for which a process that starts waits for it
	broker.Start()
	load.clients.Wait()
	require.EqualValues(t, 200, load.accepted.Load())
	healthy()
	require.LessOrEqual(t, s.orderRows(t, "SELECT COUNT(*) FROM "+processlist(t, s.order)+" WHERE db = 'orders'"), 2*32+2, "connections of two processes, and ours")

	// A message takes longer than the broker allows.
	for _, setting := range []string{"channel_tick_interval, 500", "consumer_timeout, 3000"} {
		out, err := broker.Ctl("eval", "application:set_env(rabbit, "+setting+").")
		require.NoError(t, err, out)
	}
	// From 4.3 on it is the queue that gives messages back, and what it allows is read from a policy; earlier ones refuse this.
	_, _ = broker.Ctl("set_policy", "impatient", ".*", `{"consumer-timeout": 3000}`)
	dispatch := s.processes["dispatch"]
	dispatch.kill()
	earlier := len(dispatch.log.String())
	dispatch.start(t) // a channel reads the setting when it is opened
	release := hold(t, s.dispatch, "INSERT INTO platoon (orderId, takeout_userId, state, name, order_money, currency, placed_at, order_version, assigned_at) "+
		"VALUES ('o-long', 'zhao', 'assigned', 'x', 1, 'CNY', NOW(6), 1, NOW(6))")
	placeAs(t, s, "o-long")
	eventually(t, "the broker takes the message back", func() error {
		if log := dispatch.log.String()[earlier:]; !strings.Contains(log, "PRECONDITION_FAILED") && !strings.Contains(log, "the broker ended the consumer") {
			return fmt.Errorf("it did not")
		}
		return nil
	})
	release()
	healthy()
}

// Somebody else was there first, with a queue that is not what takeout needs.
func TestRefusedQueueKeepsOnlyItsOwnEventsWaiting(t *testing.T) {
	t.Parallel()
	st := production(t)
	channel, namespace := st.foreign(t)
	queue := namespace + ".payment.refund-order"
	_, err := channel.QueueDeclare(queue, true, false, false, false, amqp.Table{"x-message-ttl": 1})
	require.NoError(t, err)
	s := startOne(t, st)

	cancelled := s.place(t, "cancelled", 100)
	s.awaitDispatched(t, cancelled)
	s.cancel(t, cancelled)
	for i := range 5 {
		s.awaitDispatched(t, s.place(t, fmt.Sprint("order ", i), 100))
	}
	ready := mustGet(t, s.api+"/readyz")
	require.Equal(t, http.StatusOK, ready.status, "%s", ready)
	for _, part := range []string{"degraded", queue, "exists with other arguments", "delete or correct it"} {
		require.Contains(t, string(ready.body), part)
	}
	require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM outbox WHERE event_key = 'order.cancelled'"), "what cannot reach all its queues waits")
	require.Equal(t, "succeeded", s.awaitPayment(t, cancelled, "succeeded").State)

	_, err = channel.QueueDelete(queue, false, false, false)
	require.NoError(t, err)
	s.awaitPayment(t, cancelled, "refunded")
	s.awaitBroker(t)
	s.noFailures(t)
}

// The events of orders go out, and nobody may take them in.
func TestQueueThatCannotBeReadIsNamedByReadinessMetricsAndDoctor(t *testing.T) {
	t.Parallel()
	broker := testenv.StartRabbitMQ(t)
	ctl := func(args ...string) {
		t.Helper()
		out, err := broker.Ctl(args...)
		require.NoError(t, err, out)
	}
	ctl("add_user", "narrow", password)
	ctl("set_permissions", "narrow", ".*", ".*", ".*")
	u := parse(t, broker.URL())
	u.User = url.UserPassword("narrow", password)
	st := embedded(t)
	st.broker = u.String()
	s := startOne(t, st)
	s.awaitDispatched(t, s.place(t, "before", 1))
	env := map[string]string{"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_DATA_DIR": filepath.Join(t.TempDir(), "new"), "TAKEOUT_BROKER_URL": st.broker}
	well := func() {
		t.Helper()
		eventually(t, "all is well", func() error {
			if a := mustGet(t, s.api+"/readyz"); !contains(a.body, `"status":"ready"`) || contains(a.body, `"queue `) {
				return fmt.Errorf("%s", a)
			}
			return nil
		})
		require.NotContains(t, s.sampleOf(t, "takeout_queue_read"), "} 0")
		o := run(t, env, "doctor")
		require.Equal(t, 0, o.code, "%s", o)
	}
	well()

	ctl("set_permissions", "narrow", ".*", ".*", `^(?!dispatch\.assign-courier$)`)
	ctl("close_all_connections", "permissions changed")
	waiting := s.place(t, "waits", 1)
	eventually(t, "readiness and metrics name this queue alone", func() error {
		a := mustGet(t, s.api+"/readyz")
		for _, part := range []string{`"status":"degraded"`, `"queue dispatch.assign-courier":`, "cannot be read: ", `"broker":{"ok":true`} {
			if a.status != http.StatusOK || !contains(a.body, part) {
				return fmt.Errorf("%s", a)
			}
		}
		read := s.sampleOf(t, "takeout_queue_read")
		if !strings.Contains(read, `{queue="dispatch.assign-courier"} 0`) || strings.Count(read, "} 0") != 1 || bytes.Count(a.body, []byte(`"queue `)) != 1 {
			return fmt.Errorf("%s\n%s", a, read)
		}
		return nil
	})
	o := run(t, env, "doctor")
	require.Equal(t, 1, o.code, "%s", o)
	o.keepsThePassword(t)
	f := findings(t, o)["broker"]
	require.False(t, f.OK)
	require.Contains(t, f.Cause, "read queue dispatch.assign-courier: Exception (403)")
	require.Contains(t, f.Remedy, "let this user read the queues")
	ctl("set_permissions", "narrow", ".*", ".*", ".*")
	s.awaitDispatched(t, waiting)
	well()
	s.noFailures(t)
}

func TestMessagesSurviveTwentyFiveRestartsOfTheirConsumer(t *testing.T) {
	t.Parallel()
	url, link := through(t, testenv.AMQP(t))
	b, err := rabbitmq.Open(url, rabbitmq.Config{ReconnectMax: 100 * time.Millisecond}, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = b.Close() })
	require.NoError(t, b.Bind("e", "q"))
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	require.NoError(t, b.WaitReady(ctx))
	const kept = 10
	for i := range kept {
		require.NoError(t, b.Publish("e", newMessage(fmt.Sprint("m", i))))
	}
	messages, _ := subscribe(t, b, "q")
	for range 25 {
		for range kept {
			require.Empty(t, receive(t, messages).Metadata.Get(app.MetadataUndeliverable))
		}
		link.cut() // with all of them in its hands
		link.mend()
	}
	came := map[string]bool{}
	for len(came) < kept {
		msg := receive(t, messages)
		require.Empty(t, msg.Metadata.Get(app.MetadataUndeliverable))
		came[msg.UUID] = true
		msg.Ack()
	}
}

func TestStrangerWhoGivesMessagesBackForEverCanOnlyDelayThem(t *testing.T) {
	t.Parallel()
	s := startOne(t, production(t))
	s.awaitDispatched(t, s.place(t, "first", 1))
	channel, exchange := s.foreign(t)
	stolen, err := channel.Consume(exchange+".dispatch.assign-courier", "stranger", false, false, false, false, nil)
	require.NoError(t, err)
	go func() {
		for d := range stolen {
			_ = d.Nack(false, true)
		}
	}()
	s.placeMany(t, 40, 8)
	ends := func() error {
		dispatched := s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE status = 'dispatched'")
		kept := s.dispatchRows(t, "SELECT COUNT(*) FROM failure WHERE state = 'open' AND error_class = 'undeliverable'")
		if dispatched+kept != 41 {
			return fmt.Errorf("%d are dispatched and %d kept", dispatched, kept)
		}
		return nil
	}
	eventually(t, "each is dispatched or kept", ends)
	require.NoError(t, channel.Close())
	a := mustSend(t, http.MethodPost, s.api+"/v1/failures/retry", `{"filter":{"handler":"dispatch.assign-courier"},"rate_per_second":1000}`)
	require.Less(t, a.status, 300, "%s", a)
	s.awaitAllDispatched(t, 41)
}
