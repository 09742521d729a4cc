package tests

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlqueue"
	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/tests/testenv"
)

var keepAMonth = sqlstore.Retention{Dedup: 720 * time.Hour, Failures: 336 * time.Hour, History: 720 * time.Hour}

// hoursAgo is a time as the program stores it.
func hoursAgo(hours int) time.Time {
	return time.Now().UTC().Add(-time.Duration(hours) * time.Hour).Truncate(time.Microsecond)
}

// texts returns a column of text.
func texts(t testing.TB, db *sql.DB, query string) []string {
	t.Helper()
	rows, err := db.Query(query)
	require.NoError(t, err)
	defer rows.Close()
	var all []string
	for rows.Next() {
		var text string
		require.NoError(t, rows.Scan(&text))
		all = append(all, text)
	}
	require.NoError(t, rows.Err())
	slices.Sort(all)
	return all
}

// An answer that is forgotten while its key may still be used would be an order placed twice.
func TestEachRowIsKeptForAsLongAsTheSettingOfItsKindSays(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		hash := make([]byte, 32)
		insert(t, s.DB(), "inbox", "consumer", "c", "event_id", "e", "body_hash", hash, "handled_at", hoursAgo(100))
		insert(t, s.DB(), "idempotency_answer", "request_key", []byte("k"), "fingerprint", hash, "orderId", "x", "body", "x", "created_at", hoursAgo(100))
		insert(t, s.DB(), "history", "order_id", "o1", "at", hoursAgo(100), "step", "x", "detail", "x")
		for _, row := range []struct {
			keep sqlstore.Retention
			want map[string]int
		}{
			{sqlstore.Retention{Dedup: 200 * time.Hour, Failures: time.Hour, History: 200 * time.Hour}, map[string]int{}},
			{sqlstore.Retention{Dedup: 200 * time.Hour, Failures: time.Hour, History: time.Hour}, map[string]int{"history": 1}},
			{sqlstore.Retention{Dedup: 90 * time.Hour, Failures: time.Hour, History: time.Hour}, map[string]int{"idempotency_answer": 1}},
			{sqlstore.Retention{Dedup: 70 * time.Hour, Failures: time.Hour, History: time.Hour}, map[string]int{"inbox": 1}},
		} {
			pruned, err := s.Prune(t.Context(), row.keep)
			require.NoError(t, err)
			maps.DeleteFunc(pruned, func(_ string, n int) bool { return n == 0 })
			require.Equal(t, row.want, pruned, "%+v", row.keep)
		}
	})
}

func TestWhatIsOldIsDeletedAndNothingElse(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		db, hash := s.DB(), make([]byte, 32)
		storeOrder(t, s, "of-old")
		for _, old := range []string{"UPDATE order_info SET placed_at = ?", "UPDATE outbox SET created_at = ?"} {
			_, err := db.Writer().Exec(old, hoursAgo(9000))
			require.NoError(t, err)
		}
		for name, hours := range map[string]int{"old": 800, "young": 700} {
			insert(t, db, "inbox", "consumer", "c", "event_id", name, "body_hash", hash, "handled_at", hoursAgo(hours))
			insert(t, db, "idempotency_answer", "request_key", []byte(name), "fingerprint", hash, "orderId", "x", "body", "x", "created_at", hoursAgo(hours))
			insert(t, db, "outbox_confirmed", "event_id", name, "event_key", "k", "order_id", "x", "created_at", hoursAgo(900), "confirmed_at", hoursAgo(hours))
			insert(t, db, "history", "order_id", name, "at", hoursAgo(hours), "step", "x", "detail", "x")
			insert(t, db, "reconcile_report", "started_at", hoursAgo(hours), "report", name)
			insert(t, db, "finding", "orderId", name, "class", "x", "minute", 1, "state", "resolved", "evidence", "x", "repair", "",
				"first_seen", hoursAgo(900), "last_seen", hoursAgo(900), "resolved_at", hoursAgo(hours))
		}
		insert(t, db, "reconcile_dirty", "minute", 1, "at", hoursAgo(800))
		insert(t, db, "reconcile_dirty", "minute", 2, "at", hoursAgo(700))
		insert(t, db, "reconcile_mark", "pair", "compared before", "minute", 9, "pass", 9)
		insert(t, db, "inbox", "consumer", "c", "event_id", "barely older than the horizon", "body_hash", hash, "handled_at", hoursAgo(730))
		insert(t, db, "finding", "orderId", "open", "class", "x", "minute", 1, "state", "open", "evidence", "x", "repair", "",
			"first_seen", hoursAgo(900), "last_seen", hoursAgo(900))
		insert(t, db, "finding", "orderId", "open again", "class", "x", "minute", 1, "state", "person", "evidence", "x", "repair", "",
			"first_seen", hoursAgo(900), "last_seen", hoursAgo(900), "resolved_at", hoursAgo(900))
		insert(t, db, "retry", "queue", "c", "uuid", "waits", "fingerprint", hash, "tier", 1, "order_id", "x", "payload", "x", "error_text", "x",
			"created_at", hoursAgo(9000), "available_at", 0)
		for name, f := range map[string]struct {
			state  string
			closed any
		}{
			"closed long ago": {"discarded", hoursAgo(400)}, "handled long ago": {"resolved", hoursAgo(400)}, "closed lately": {"discarded", hoursAgo(300)},
			"open": {"open", nil}, "opened again": {"open", hoursAgo(400)}, "retrying": {"retrying", hoursAgo(400)},
		} {
			require.NoError(t, s.Keep(context.Background(), app.Failure{Consumer: "c", MessageID: name, Payload: []byte(name)}))
			var id int64
			require.NoError(t, db.Reader().QueryRow("SELECT id FROM failure WHERE message_id = ?", name).Scan(&id))
			insert(t, db, "failure_action", "failure_id", id, "at", hoursAgo(400), "operator", "mei", "action", name, "reason", "")
			_, err := db.Writer().Exec("UPDATE failure SET state = ?, closed_at = ?, first_failed_at = ?, last_failed_at = ? WHERE id = ?",
				f.state, f.closed, hoursAgo(9000), hoursAgo(9000), id)
			require.NoError(t, err)
		}

		pruned, err := s.Prune(context.Background(), keepAMonth)
		require.NoError(t, err)
		require.Equal(t, map[string]int{
			"inbox": 1, "idempotency_answer": 1, "outbox_confirmed": 1, "history": 1, "reconcile_report": 1, "finding": 1, "failure": 2, "reconcile_dirty": 1,
		}, pruned)
		left := []string{"closed lately", "open", "opened again", "retrying"}
		for query, want := range map[string][]string{
			"SELECT event_id FROM inbox":                          {"barely older than the horizon", "young"},
			"SELECT request_key FROM idempotency_answer":          {"young"},
			"SELECT event_id FROM outbox_confirmed":               {"young"},
			"SELECT order_id FROM history":                        {"young"},
			"SELECT report FROM reconcile_report":                 {"young"},
			"SELECT pair FROM reconcile_mark":                     nil,
			"SELECT minute FROM reconcile_dirty WHERE minute < 9": {"2"},
			"SELECT orderId FROM finding":                         {"open", "open again", "young"},
			"SELECT message_id FROM failure":                      left,
			"SELECT bytes FROM failure_payload":                   left,
			"SELECT action FROM failure_action":                   left,
			"SELECT orderId FROM order_info":                      {"of-old"},
			"SELECT order_id FROM outbox":                         {"of-old"},
			"SELECT uuid FROM retry":                              {"waits"},
		} {
			require.Equal(t, want, texts(t, db.Reader(), query), query)
		}

		insert(t, db, "reconcile_mark", "pair", "compared", "minute", 9, "pass", 9)
		pruned, err = s.Prune(context.Background(), keepAMonth)
		require.NoError(t, err)
		require.Equal(t, []string{"compared"}, texts(t, db.Reader(), "SELECT pair FROM reconcile_mark"))
		for table, n := range pruned {
			require.Zero(t, n, table)
		}
	})
}

// It is this process's clock that is ahead of its database's, by forty days.
func TestProcessWhoseClockIsAheadMakesNobodyForget(t *testing.T) {
	t.Parallel()
	server := testenv.StartMySQL(t)
	rawURL := server.URL("orders")
	openStore(t, rawURL, sqlstore.OpenOrders)
	execute(t, rawURL, fmt.Sprintf("SET GLOBAL init_connect = 'SET timestamp = %d'", time.Now().Add(-40*24*time.Hour).Unix()))
	s := openOrders(t, ordinary(t, rawURL, "behind"))
	insert(t, s.DB(), "inbox", "consumer", "c", "event_id", "handled a moment ago", "body_hash", make([]byte, 32), "handled_at", hoursAgo(800))
	_, err := s.Prune(t.Context(), keepAMonth)
	require.NoError(t, err)
	require.Equal(t, []string{"handled a moment ago"}, texts(t, s.DB().Reader(), "SELECT event_id FROM inbox"))
}

// fillInbox remembers n messages that were handled then.
func fillInbox(t testing.TB, s *orderStore, n, handledHoursAgo int) {
	t.Helper()
	const some = 500
	for first := 0; first < n; first += some {
		rows := min(some, n-first)
		var args []any
		for i := range rows {
			args = append(args, "c", fmt.Sprintf("evt_%d_%d", handledHoursAgo, first+i), make([]byte, 32), hoursAgo(handledHoursAgo), "o")
		}
		_, err := s.DB().Writer().Exec("INSERT INTO inbox (consumer, event_id, body_hash, handled_at, order_id) VALUES (?, ?, ?, ?, ?)"+
			strings.Repeat(", (?, ?, ?, ?, ?)", rows-1), args...)
		require.NoError(t, err)
	}
}

func inboxRows(t testing.TB, s *orderStore) int {
	t.Helper()
	var n int
	require.NoError(t, s.DB().Reader().QueryRow("SELECT COUNT(*) FROM inbox").Scan(&n))
	return n
}

func TestOldRowsAreDeletedAThousandAtATime(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		const old = 20_500
		fillInbox(t, s, old, 800)
		ctx, stop := context.WithCancel(context.Background())
		defer stop()
		ended := make(chan error, 1)
		go func() {
			_, err := s.Prune(ctx, keepAMonth)
			ended <- err
		}()
		eventually(t, "some rows are gone", func() error {
			if inboxRows(t, s) == old {
				return fmt.Errorf("all are there")
			}
			return nil
		})
		stop()
		require.Error(t, <-ended, "it was stopped")
		left := inboxRows(t, s)
		require.Positive(t, left)
		require.Zero(t, (old-left)%1000, "%d are left", left)
	})
}

func TestMessagesAreHandledWhileTwoProcessesDeleteWhatIsOld(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, open func() *orderStore) {
		const old, handlers, each = 5_500, 4, 50
		fillInbox(t, s, old, 800)
		fillInbox(t, s, 100, 700)
		var deleted atomic.Int64
		var working sync.WaitGroup
		for _, process := range []*orderStore{s, open()} {
			working.Go(func() {
				pruned, err := process.Prune(context.Background(), keepAMonth)
				if err != nil {
					t.Errorf("prune: %v", err)
				}
				deleted.Add(int64(pruned["inbox"]))
			})
		}
		for h := range handlers {
			working.Go(func() {
				for i := range each {
					id := fmt.Sprintf("new-%d-%d", h, i)
					err := s.InTx(app.WithDelivery(context.Background(), delivery(id, id)), func(ctx context.Context, tx app.OrderTx) error {
						return placeIn(ctx, tx, id)
					})
					if err != nil {
						t.Errorf("handle %s: %v", id, err)
					}
				}
			})
		}
		working.Wait()
		require.EqualValues(t, old, deleted.Load(), "each row is counted once")
		require.Equal(t, 100+handlers*each, inboxRows(t, s))
	})
}

func TestLookingForWhatIsOldWaitsForNobody(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		err := s.InTx(app.WithDelivery(context.Background(), delivery("evt_1", "x")), func(context.Context, app.OrderTx) error {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			_, err := s.Prune(ctx, keepAMonth)
			return err
		})
		require.NoError(t, err, "there is nothing old beside the message that is being handled")
	})
}

func TestRunningProgramDeletesWhatIsOld(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		s.stop(t) // it deletes when it starts, and may not have begun with that yet
		orders := openOrders(t, s.order)
		fillInbox(t, orders, 3, 800)
		fillInbox(t, orders, 2, 700)
		s.start(t)
		eventually(t, "the old rows are gone", func() error {
			if n := s.orderRows(t, "SELECT COUNT(*) FROM inbox WHERE consumer = 'c'"); n != 2 {
				return fmt.Errorf("%d", n)
			}
			if a := mustGet(t, s.api+"/metrics"); !contains(a.body, `takeout_pruned_total{database="order",table="inbox"} 3`) {
				return fmt.Errorf("%s", a)
			}
			return nil
		})
	})
}

func TestRelayDeletesNothingOfTheDatabasesThatItReads(t *testing.T) {
	t.Parallel()
	st := production(t)
	orders := openOrders(t, st.order)
	_, err := orders.Migrate(context.Background())
	require.NoError(t, err)
	fillInbox(t, orders, 3, 800)
	storeOrder(t, orders, "o1")
	relay := startProcess(t, "relay", map[string]string{
		"TAKEOUT_ROLES": "relay", "TAKEOUT_BROKER_URL": st.broker, "TAKEOUT_ORDER_DATABASE_URL": st.order,
	})
	eventually(t, "the relay has begun", func() error {
		if n := pendingEvents(t, orders); n > 0 {
			return fmt.Errorf("%d events wait", n)
		}
		return nil
	})
	require.NoError(t, relay.terminate(t))
	require.Equal(t, 3, inboxRows(t, orders))
}

func TestHorizonShorterThanAMessageMayBeRetriedIsRefused(t *testing.T) {
	t.Parallel()
	run(t, nil, "serve", "--dedup-horizon=336h35m34s").complains(t, 2, "--dedup-horizon (TAKEOUT_DEDUP_HORIZON)", "must be 336h35m35s or more")
	run(t, map[string]string{"TAKEOUT_RETRY_DELAYS": "1h,2h", "TAKEOUT_FAILURE_RETENTION": "800h"}, "migrate").
		complains(t, 2, "--dedup-horizon (TAKEOUT_DEDUP_HORIZON)", "must be 803h0m0s or more")
	fits := run(t, nil, "config", "--dedup-horizon=336h35m35s")
	require.Zero(t, fits.code, "%s", fits)
}

// confirmedEvents returns the order ids in the log of confirmed events.
func confirmedEvents(t testing.TB, s *orderStore) []string {
	t.Helper()
	return texts(t, s.DB().Reader(), "SELECT order_id FROM outbox_confirmed")
}

// relayOf reads the outbox as a relay does.
func relayOf(t testing.TB, s *orderStore) (<-chan *message.Message, *sqlqueue.Reader) {
	t.Helper()
	reader := s.Outbox(func(context.Context) error { return nil }, nil, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { _ = reader.Close() })
	messages, err := reader.Subscribe(context.Background(), "")
	require.NoError(t, err)
	return messages, reader
}

func TestConfirmedEventsMoveFromTheOutboxToTheLog(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		for _, id := range []string{"a", "b", "c"} {
			storeOrder(t, s, id)
		}
		messages, reader := relayOf(t, s)
		receive(t, messages).Ack()
		receive(t, messages).Ack()
		receive(t, messages).Nack()
		require.NoError(t, reader.Close())
		require.Equal(t, []string{"a", "b"}, confirmedEvents(t, s))
		require.Equal(t, []string{"c"}, texts(t, s.DB().Reader(), "SELECT order_id FROM outbox"))

		var id, key string
		var created, confirmed time.Time
		require.NoError(t, s.DB().Reader().QueryRow("SELECT event_id, event_key, created_at, confirmed_at FROM outbox_confirmed WHERE order_id = 'a'").
			Scan(&id, &key, &created, &confirmed))
		require.True(t, strings.HasPrefix(id, "evt_"), id)
		require.Equal(t, "order.placed", key)
		require.False(t, confirmed.Before(created))
		require.WithinDuration(t, time.Now(), confirmed, time.Minute)
	})
}

func TestEventIsInTheOutboxOrInTheLogWhenTheRelayDiesInBetween(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, open func() *orderStore) {
		storeOrder(t, s, "a")
		// This relay notes the event and is gone before it can delete it.
		died := make(chan struct{}, 100)
		messages, reader := readOutbox(t, open(), sqlqueue.Config{Archive: func(ctx context.Context, tx *sql.Tx, _ int, _ []any) error {
			_, err := tx.ExecContext(ctx, "INSERT INTO outbox_confirmed (event_id, event_key, order_id, created_at, confirmed_at) "+
				"SELECT event_id, event_key, order_id, created_at, created_at FROM outbox")
			died <- struct{}{}
			return errors.Join(err, errors.New("killed"))
		}})
		receive(t, messages).Ack()
		<-died
		require.NoError(t, reader.Close())
		require.Empty(t, confirmedEvents(t, s))
		require.Equal(t, 1, pendingEvents(t, s))

		require.NoError(t, sqlqueue.TakeBack(context.Background(), s.DB(), "outbox")) // its lease is over
		messages, reader = relayOf(t, s)
		receive(t, messages).Ack()
		require.NoError(t, reader.Close())
		require.Equal(t, []string{"a"}, confirmedEvents(t, s))
		require.Zero(t, pendingEvents(t, s))
	})
}

func TestRelayThatOutlivesItsLeaseDoesNotNoteWhatIsNoted(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, open func() *orderStore) {
		storeOrder(t, s, "a")
		held, late := relayOf(t, open())
		zombie := receive(t, held)
		require.NoError(t, sqlqueue.TakeBack(context.Background(), s.DB(), "outbox"))
		messages, reader := relayOf(t, s)
		receive(t, messages).Ack()
		require.NoError(t, reader.Close())
		zombie.Ack()
		require.NoError(t, late.Close())
		require.Equal(t, []string{"a"}, confirmedEvents(t, s))
	})
}

func TestEveryEventIsNotedAlthoughTheRelayIsKilled(t *testing.T) {
	t.Parallel()
	s := startProcesses(t, production(t))
	const orders = 400
	load := &crashLoad{api: s.api, stop: make(chan struct{})}
	load.placeThrough(t, orders, 8)
	for range 3 {
		before := s.orderRows(t, "SELECT COUNT(*) FROM outbox_confirmed")
		eventually(t, "the relay is at work", func() error {
			if s.orderRows(t, "SELECT COUNT(*) FROM outbox_confirmed") == before {
				return errors.New("nothing is confirmed")
			}
			return nil
		})
		s.processes["relay"].kill()
		s.processes["relay"].start(t)
	}
	load.clients.Wait()
	eventually(t, "the outbox is empty", func() error {
		if n := s.orderRows(t, "SELECT COUNT(*) FROM outbox"); n > 0 {
			return fmt.Errorf("%d events wait", n)
		}
		return nil
	})
	require.Equal(t, orders, s.orderRows(t, "SELECT COUNT(*) FROM outbox_confirmed WHERE event_key = 'order.placed'"), "each once")
	require.Equal(t, orders, s.orderRows(t, "SELECT COUNT(DISTINCT order_id) FROM outbox_confirmed WHERE event_key = 'order.placed'"))
}
