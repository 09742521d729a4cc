package tests

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"takeout/adapters/rabbitmq"
	"takeout/adapters/sqldb"
	"takeout/adapters/sqlqueue"
	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain/event"
	"takeout/ports/messaging"
	"takeout/service"
	"takeout/tests/testenv"
)

// startWithDelays starts a system in this process that tries again after these times.
func startWithDelays(t testing.TB, st stack, delays ...time.Duration) *system {
	t.Helper()
	return startWith(t, st, func(cfg *service.Config) { cfg.RetryDelays = delays })
}

func repeated(d time.Duration, n int) []time.Duration {
	delays := make([]time.Duration, n)
	for i := range delays {
		delays[i] = d
	}
	return delays
}

// change changes the tables of a running program, past it.
func change(t testing.TB, url, query string, args ...any) {
	t.Helper()
	database(t, url)
	db, _ := pools.Load(url)
	_, err := db.(*sqldb.DB).Writer().Exec(query, args...)
	require.NoError(t, err)
}

func (s *system) awaitOrderRows(t testing.TB, want int, query string, args ...any) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d rows: %s", want, query), func() error {
		if n := s.orderRows(t, query, args...); n != want {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
}

func placeAs(t testing.TB, s *system, id string) {
	t.Helper()
	a := mustSend(t, http.MethodPost, s.api+"/v1/orders", fmt.Sprintf(`{"order_id":%q,"name":"x","amount":1}`, id))
	require.Equal(t, http.StatusCreated, a.status, "%s", a)
}

func TestMessageThatComesTooEarlyWaitsAndIsHandledOnce(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := startWithDelays(t, st, repeated(200*time.Millisecond, 20)...)
		broker := s.publisher(t)
		id := newEventID()
		body, err := event.Encode(id, time.Now(), event.DispatchAssigned{OrderID: "o-early", CourierID: "zhao", AssignedAt: time.Now(), Version: 1})
		require.NoError(t, err)
		publish := func() { require.NoError(t, broker.Publish("dispatch.assigned", message.NewMessage(id, body))) }
		publish()
		s.awaitOrderRows(t, 1, "SELECT COUNT(DISTINCT uuid) FROM retry WHERE queue = 'order.mark-dispatched' AND order_id = 'o-early' "+
			"AND uuid = ? AND error_text <> '' AND failure_id IS NULL", id)
		publish() // it waits, and is delivered again
		placeAs(t, s, "o-early")
		publish()
		s.awaitDispatched(t, "o-early")
		s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM inbox WHERE consumer = 'order.mark-dispatched' AND event_id = ?", id)
		s.awaitOrderRows(t, 0, "SELECT COUNT(*) FROM retry")
		s.noFailures(t)
		timeline := mustGet(t, s.api+"/v1/orders/o-early/timeline")
		require.Contains(t, string(timeline.body), `"step":"attempt_failed"`)
		require.Contains(t, string(timeline.body), "order.mark-dispatched: message "+id+" failed, and is tried again in 200ms")
	})
}

func TestFailureThatAPersonRetriesIsTriedAtOnceAndClosedWhenItIsHandled(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := startWithDelays(t, st, 50*time.Millisecond)
		store, err := sqlstore.OpenOrders(s.order, nil, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		t.Cleanup(func() { _ = store.Close() })
		publishAssignment(t, s.publisher(t), "o-late")
		s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM failure WHERE state = 'open' AND attempts = 8 AND occurrences = 1")
		id := int64(s.orderRows(t, "SELECT id FROM failure"))
		retried(t, store, id, "", 0)
		s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM failure WHERE state = 'open' AND attempts = 12 AND occurrences = 2")
		placeAs(t, s, "o-late")
		retried(t, store, id, "", 0) // at once: nothing is left of the first retry
		s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM failure WHERE state = 'resolved' AND closed_at IS NOT NULL")
		s.awaitOrderRows(t, 0, "SELECT COUNT(*) FROM retry")
		require.Equal(t, []string{"takeout handled"}, actions(t, store, id))
		require.Contains(t, s.sampleOf(t, "takeout_failures_open"), `takeout_failures_open{database="order"} 0`)
	})
}

func TestHopelessMessageIsTriedABoundedNumberOfTimesAndThenKeptAsItCame(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		delays := []time.Duration{100 * time.Millisecond, 200 * time.Millisecond}
		s := startWithDelays(t, st, delays...)
		broker := s.publisher(t)
		hopeless := newEventID()
		body, err := event.Encode(hopeless, time.Now(), event.DispatchAssigned{OrderID: "o-never", CourierID: "zhao", AssignedAt: time.Now(), Version: 1})
		require.NoError(t, err)
		foreign := map[string]string{
			"takeout-retry-tier": "99", "takeout-retry-failure-id": "1", "takeout-retry-batch": "b", "takeout-undeliverable": "a lie",
			"x-attempt": "-1", "x-from": "abroad",
		}
		msg := message.NewMessage(hopeless, body)
		for name, value := range foreign {
			msg.Metadata.Set(name, value)
		}
		require.NoError(t, broker.Publish("dispatch.assigned", msg))
		s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM retry WHERE uuid = ?", hopeless)
		s.awaitDispatched(t, s.place(t, "neighbour", 100))
		s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM failure WHERE state = 'open'")
		s.awaitOrderRows(t, 0, "SELECT COUNT(*) FROM retry")

		var class, code string
		var attempts, occurrences int
		var headers, kept []byte
		require.NoError(t, database(t, s.order).QueryRow("SELECT error_class, error_code, attempts, occurrences, headers, bytes "+
			"FROM failure JOIN failure_payload ON failure_id = id WHERE message_id = ?", hopeless).
			Scan(&class, &code, &attempts, &occurrences, &headers, &kept))
		require.Equal(t, "transient order_not_found", class+" "+code)
		require.Equal(t, 4*(1+len(delays)), attempts)
		require.Equal(t, 1, occurrences)
		require.Equal(t, string(body), string(kept))
		var got map[string]string
		require.NoError(t, json.Unmarshal(headers, &got))
		delete(foreign, "takeout-undeliverable") // no broker lets a message say that of itself
		for name := range got {
			if strings.HasPrefix(name, "amqp-") {
				delete(got, name)
			}
		}
		require.Equal(t, foreign, got)
	})
}

func TestRetryComesBackToItsOwnConsumerOnly(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := startWithDelays(t, st, repeated(50*time.Millisecond, 3)...)
		broker := s.publisher(t).(messaging.Broker)
		require.NoError(t, broker.Bind("dispatch.assigned", "another.consumer"))
		messages, _ := subscribe(t, broker, "another.consumer")
		id := publishAssignment(t, broker, "o-never")
		once := receive(t, messages)
		require.Equal(t, id, once.UUID)
		once.Ack()
		s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM failure WHERE message_id = ? AND attempts = 16", id)
		receiveNothing(t, messages)
	})
}

// longerThanAllTiers is how long an outage of these tests lasts: every try and every delay together take less.
func longerThanAllTiers(delays []time.Duration) time.Duration {
	total := time.Second
	for _, delay := range append([]time.Duration{0}, delays...) {
		total += delay + 700*time.Millisecond
	}
	return total
}

func (s *system) sampleOf(t testing.TB, metric string) string {
	t.Helper()
	var found []string
	for line := range strings.Lines(string(mustGet(t, s.api+"/metrics").body)) {
		if strings.HasPrefix(line, metric) {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return strings.Join(found, "\n")
}

func TestDatabaseThatIsAwayForLongerThanAllTiersSpendsNoRetry(t *testing.T) {
	t.Parallel()
	st := production(t)
	server := testenv.StartMySQL(t)
	st.dispatch = server.URL("dispatch")
	delays := repeated(50*time.Millisecond, 2)
	s := startWithDelays(t, st, delays...)
	s.placeMany(t, 20, 4)
	server.Kill()
	down := time.Now()
	s.placeMany(t, 50, 8)
	eventually(t, "the consumer pauses", func() error {
		if a := mustGet(t, s.api+"/readyz"); !contains(a.body, "pauses") {
			return fmt.Errorf("%s", a)
		}
		return nil
	})
	time.Sleep(time.Until(down.Add(longerThanAllTiers(delays)))) // the outage that the promise names
	server.Start()
	s.awaitAllDispatched(t, 70)
	s.noFailures(t)
	require.Empty(t, s.sampleOf(t, "takeout_retries_delayed_total"), "no retry is spent")
	require.Zero(t, s.dispatchRows(t, "SELECT COUNT(*) FROM retry"))
}

func TestBrokerThatIsAwayForLongerThanAllTiersGivesNoMessageUp(t *testing.T) {
	t.Parallel()
	st := production(t)
	var link *proxy
	direct := st.broker
	st.broker, link = through(t, st.broker)
	delays := repeated(300*time.Millisecond, 5)
	s := startWithDelays(t, st, delays...)
	s.broker = direct
	broker := s.publisher(t)
	s.placeMany(t, 50, 8)
	early := publishAssignment(t, broker, "o-early")
	s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM retry WHERE uuid = ?", early)
	link.cut()
	down := time.Now()
	placeAs(t, s, "o-early")
	s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM inbox WHERE event_id = ?", early) // a retry needs no broker
	s.placeMany(t, 50, 8)
	time.Sleep(time.Until(down.Add(longerThanAllTiers(delays)))) // the outage that the promise names
	link.mend()
	s.awaitAllDispatched(t, 101)
	s.noFailures(t)
}

func TestRetriesSurviveKillNineAndDoNotComeEarly(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	p := startProcess(t, "embedded", map[string]string{"TAKEOUT_DATA_DIR": dir, "TAKEOUT_RETRY_DELAYS": "4s" + strings.Repeat(",1s", 10)})
	s := &system{stack: stack{order: "sqlite:" + filepath.Join(dir, "order.db"), broker: "embedded:"}, api: p.url}
	s.cfg.DataDir = dir
	id := publishAssignment(t, s.publisher(t), "o-early")
	s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM retry WHERE uuid = ? AND attempts = 0", id)
	var due int64
	require.NoError(t, database(t, s.order).QueryRow("SELECT available_at FROM retry WHERE uuid = ?", id).Scan(&due))
	eventually(t, "the broker has let the message go", func() error {
		if n := count(t, "sqlite:"+filepath.Join(dir, "broker.db"), "SELECT COUNT(*) FROM broker_message WHERE uuid = ?", id); n != 0 {
			return fmt.Errorf("it is still there")
		}
		return nil
	})
	p.kill()
	p.start(t)
	placeAs(t, s, "o-early")
	s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM inbox WHERE event_id = ?", id)
	var handled time.Time
	require.NoError(t, database(t, s.order).QueryRow("SELECT handled_at FROM inbox WHERE event_id = ?", id).Scan(&handled))
	require.GreaterOrEqual(t, handled.UnixMicro(), due)
	s.awaitOrderRows(t, 0, "SELECT COUNT(*) FROM retry")
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM failure"))
}

func TestRetryThatKeepsKillingTheProcessIsKept(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := startWithDelays(t, st, 3*time.Second)
		id := publishAssignment(t, s.publisher(t), "o-never")
		s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM retry WHERE uuid = ?", id)
		change(t, s.order, "UPDATE retry SET attempts = 50 WHERE uuid = ?", id) // as if it had been in 50 crashes
		s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM failure WHERE message_id = ? AND state = 'open' AND error_class = 'undeliverable' "+
			"AND error_code = 'delivery_limit' AND attempts = 4", id)
		s.awaitOrderRows(t, 0, "SELECT COUNT(*) FROM retry")
		s.awaitDispatched(t, s.place(t, "neighbour", 100))
	})
}

func TestMessageThatKeepsKillingTheProcessIsKeptAndItsNeighbourIsHandled(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	broker := s.publisher(t)
	s.stop(t)
	killer, neighbour := newEventID(), newEventID()
	require.NoError(t, broker.Publish("order.placed",
		message.NewMessage(killer, announce(t, killer, "o-killer", 100)), message.NewMessage(neighbour, announce(t, neighbour, "o-neighbour", 100))))
	change(t, "sqlite:"+filepath.Join(s.cfg.DataDir, "broker.db"),
		"UPDATE broker_message SET attempts = 50 WHERE queue = 'dispatch.assign-courier' AND uuid = ?", killer) // as if it had been in 50 crashes
	s.start(t)
	s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM failure WHERE error_class = 'undeliverable' AND order_id = 'o-killer' AND attempts = 0 AND CAST(headers AS CHAR) = '{}'")
	s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = 'o-neighbour'")
	require.Zero(t, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE orderId = 'o-killer'"))
}

// A process that is killed is a connection that ends, for RabbitMQ.
func TestMessageThatKeepsKillingItsProcessIsGivenUpByRabbitMQ(t *testing.T) {
	t.Parallel()
	url, link := through(t, testenv.AMQP(t))
	b, err := rabbitmq.Open(url, rabbitmq.Config{DeliveryLimit: 3, ReconnectMax: 200 * time.Millisecond}, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = b.Close() })
	require.NoError(t, b.Bind("e", "q"))
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	require.NoError(t, b.WaitReady(ctx))
	require.NoError(t, b.Publish("e", newMessage("kills the process")))
	messages, _ := subscribe(t, b, "q")
	for deaths := 0; ; deaths++ {
		msg := receive(t, messages)
		if msg.Metadata.Get(app.MetadataUndeliverable) != "" {
			require.Equal(t, 4, deaths)
			msg.Ack()
			return
		}
		require.Less(t, deaths, 4)
		link.cut()
		link.mend()
	}
}

// failed is a message that a consumer could not handle.
func failed(id string) app.Failure {
	return app.Failure{
		Consumer: "order.test", MessageID: id, OrderID: "o1", Class: "transient", Code: "order_not_found", Error: "no such order",
		Attempts: 4, Headers: map[string]string{"x-from": "abroad"}, Payload: []byte("body of " + id),
	}
}

func readRetries(t testing.TB, s *orderStore) (<-chan *message.Message, *sqlqueue.Reader) {
	t.Helper()
	return drainRetries(t, s, 100*time.Millisecond)
}

// drainRetries reads the retries with a reader that waits so long for the messages in flight when it is closed.
func drainRetries(t testing.TB, s *orderStore, drain time.Duration) (<-chan *message.Message, *sqlqueue.Reader) {
	t.Helper()
	r := s.Retries("order.test", drain, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { _ = r.Close() })
	messages, err := r.Subscribe(context.Background(), "")
	require.NoError(t, err)
	return messages, r
}

func failureIs(t testing.TB, s *orderStore, id int64) string {
	t.Helper()
	var state string
	var attempts, occurrences int
	var closed sql.NullTime
	require.NoError(t, s.DB().Reader().QueryRow("SELECT state, attempts, occurrences, closed_at FROM failure WHERE id = ?", id).
		Scan(&state, &attempts, &occurrences, &closed))
	if closed.Valid {
		state += ", closed"
	}
	return fmt.Sprintf("%s after %d attempts, %d times", state, attempts, occurrences)
}

func keptAs(t testing.TB, s *orderStore, f app.Failure) int64 {
	t.Helper()
	require.NoError(t, s.Keep(context.Background(), f))
	var id int64
	require.NoError(t, s.DB().Reader().QueryRow("SELECT id FROM failure WHERE message_id = ?", f.MessageID).Scan(&id))
	return id
}

// retried does what a person's wish to retry a failure does.
func retried(t testing.TB, s *orderStore, id int64, batch string, inMicroseconds int64) {
	t.Helper()
	_, err := s.DB().Writer().Exec("UPDATE failure SET state = 'retrying' WHERE id = ?", id)
	require.NoError(t, err)
	_, err = s.DB().Writer().Exec("INSERT INTO retry (queue, uuid, fingerprint, tier, order_id, failure_id, batch, payload, metadata, error_text, created_at, available_at) "+
		"SELECT consumer, message_id, fingerprint, 0, order_id, id, ?, (SELECT bytes FROM failure_payload WHERE failure_id = id), headers, error_text, last_failed_at, "+
		s.DB().Now+" + ? FROM failure WHERE id = ?", batch, inMicroseconds, id)
	require.NoError(t, err)
}

func rowsIn(t testing.TB, s *orderStore, query string) int {
	t.Helper()
	var n int
	require.NoError(t, s.DB().Reader().QueryRow(query).Scan(&n))
	return n
}

func actions(t testing.TB, s *orderStore, id int64) (all []string) {
	t.Helper()
	rows, err := s.DB().Reader().Query("SELECT operator, action FROM failure_action WHERE failure_id = ? ORDER BY id", id)
	require.NoError(t, err)
	defer rows.Close()
	for rows.Next() {
		var operator, action string
		require.NoError(t, rows.Scan(&operator, &action))
		all = append(all, operator+" "+action)
	}
	require.NoError(t, rows.Err())
	return all
}

func TestDelayedMessageComesOnceAsItWasWhenItsTimeHasCome(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		ctx := context.Background()
		f := failed("evt_1")
		f.Payload = []byte{0, 0xff, '\'', '\\'}
		f.Headers = map[string]string{"takeout-retry-tier": "99", "x-from": "é"}
		began := time.Now()
		require.NoError(t, s.Delay(ctx, f, 2, 300*time.Millisecond))
		require.NoError(t, s.Delay(ctx, f, 2, time.Hour), "delayed again, because the answer was lost")
		elsewhere := failed("evt_2")
		elsewhere.Consumer = "another.consumer"
		require.NoError(t, s.Delay(ctx, elsewhere, 1, 0))

		messages, _ := readRetries(t, s)
		msg := receive(t, messages)
		require.GreaterOrEqual(t, time.Since(began), 295*time.Millisecond) // SQLite's clock has milliseconds
		require.Equal(t, "evt_1", msg.UUID)
		require.Equal(t, f.Payload, []byte(msg.Payload))
		require.Equal(t, f.Headers, map[string]string(msg.Metadata))
		require.Equal(t, app.Retry{Tier: 2}, app.RetryFrom(msg.Context()))
		msg.Ack()
		receiveNothing(t, messages)
		waiting, open, err := s.Unhandled(ctx, 100)
		require.NoError(t, err)
		require.Equal(t, []int{1, 0}, []int{waiting, open})
	})
}

func TestRetriesInADeadProcessesHandsComeAtOnceAndTheOthersInTheirTime(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, open func() *orderStore) {
		ctx := context.Background()
		require.NoError(t, s.Delay(ctx, failed("held"), 1, 0))
		frozen := sqlqueue.NewReader(open().DB(), sqlqueue.Config{Table: "retry", Bell: &sqlqueue.Bell{}, Window: 1, Lease: time.Hour, Drain: time.Millisecond}, slog.New(slog.DiscardHandler))
		t.Cleanup(func() { _ = frozen.Close() })
		held, err := frozen.Subscribe(ctx, "")
		require.NoError(t, err)
		require.Equal(t, "held", receive(t, held).UUID)
		require.NoError(t, s.Delay(ctx, failed("later"), 1, time.Hour))

		require.NoError(t, s.TakeBack(ctx))
		messages, _ := readRetries(t, s)
		msg := receive(t, messages)
		require.Equal(t, "held", msg.UUID)
		msg.Ack()
		receiveNothing(t, messages)
	})
}

func TestFailureIsClosedWhenItsRetryIsHandledAndOpenedWhenItFailsAgain(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		ctx := context.Background()
		id := keptAs(t, s, failed("evt_1"))
		require.Equal(t, "open after 4 attempts, 1 times", failureIs(t, s, id))

		// Somebody asks for a retry, and it fails.
		retried(t, s, id, "", 0)
		messages, _ := readRetries(t, s)
		msg := receive(t, messages)
		retry := app.RetryFrom(msg.Context())
		require.Equal(t, app.Retry{FailureID: id}, retry)
		again := failed(msg.UUID)
		again.Retry = retry
		require.Equal(t, id, keptAs(t, s, again))
		msg.Ack()
		require.Equal(t, "open after 8 attempts, 2 times", failureIs(t, s, id))

		// Somebody asks again, and it is handled. The process dies before the ack, so that it is told twice.
		retried(t, s, id, "", 0)
		msg = receive(t, messages)
		require.NoError(t, s.Resolve(ctx, id))
		require.Zero(t, rowsIn(t, s, "SELECT COUNT(*) FROM retry"), "what is closed is not retried, whether the ack has come or not")
		require.NoError(t, s.Resolve(ctx, id))
		msg.Ack()
		require.Equal(t, "resolved, closed after 8 attempts, 2 times", failureIs(t, s, id))
		require.Equal(t, []string{"takeout handled"}, actions(t, s, id))

		// The producer sends it again, and it fails again.
		keptAs(t, s, failed("evt_1"))
		require.Equal(t, "open after 12 attempts, 3 times", failureIs(t, s, id))
		require.Equal(t, 1, rowsIn(t, s, "SELECT COUNT(*) FROM failure"))
		require.Equal(t, 1, rowsIn(t, s, "SELECT COUNT(*) FROM failure_payload"))
	})
}

func TestWhatAPersonClosedStaysClosedUnlessTheMessageComesFromTheBrokerAgain(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		for _, state := range []string{"discarded", "replaced"} {
			id := keptAs(t, s, failed(state))
			_, err := s.DB().Writer().Exec("UPDATE failure SET state = ?, closed_at = ? WHERE id = ?", state, time.Now().UTC(), id)
			require.NoError(t, err)
			require.NoError(t, s.Resolve(context.Background(), id))
			again := failed(state)
			again.Retry.FailureID = id
			keptAs(t, s, again)
			require.Equal(t, state+", closed after 8 attempts, 2 times", failureIs(t, s, id))
			require.Empty(t, actions(t, s, id))
			keptAs(t, s, failed(state))
			require.Equal(t, "open after 12 attempts, 3 times", failureIs(t, s, id))
		}
	})
}

func TestBatchStopsWhenOneOfItsRetriesIsGivenUp(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		ids := map[string]int64{}
		for _, name := range []string{"first", "begun", "waiting", "spaced", "other batch"} {
			ids[name] = keptAs(t, s, failed(name))
		}
		retried(t, s, ids["first"], "b", 0)
		retried(t, s, ids["begun"], "b", 0)
		messages, reader := drainRetries(t, s, time.Minute)
		first, begun := receive(t, messages), receive(t, messages)
		defer begun.Ack()
		defer first.Ack()
		go func() { _ = reader.Close() }() // takes no more
		require.Equal(t, []string{"first", "begun"}, []string{first.UUID, begun.UUID})
		retried(t, s, ids["waiting"], "b", 3_600_000_000)
		retried(t, s, ids["spaced"], "b", 7_200_000_000)
		retried(t, s, ids["other batch"], "c", 3_600_000_000)

		again := failed("first")
		again.Retry = app.RetryFrom(first.Context())
		require.Equal(t, "b", again.Retry.Batch)
		keptAs(t, s, again)
		require.Equal(t, "open after 8 attempts, 2 times", failureIs(t, s, ids["first"]))
		require.Empty(t, actions(t, s, ids["first"]))
		for _, name := range []string{"waiting", "spaced"} {
			require.Equal(t, "open after 4 attempts, 1 times", failureIs(t, s, ids[name]), name)
			require.Equal(t, []string{"takeout stopped"}, actions(t, s, ids[name]), name)
		}
		for _, name := range []string{"begun", "other batch"} {
			require.Equal(t, "retrying after 4 attempts, 1 times", failureIs(t, s, ids[name]), name)
			require.Empty(t, actions(t, s, ids[name]), name)
		}
		require.Equal(t, 2, rowsIn(t, s, "SELECT COUNT(*) FROM retry"), "the one that has begun, and the other batch's")
	})
}
