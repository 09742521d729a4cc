package tests

import (
	"bytes"
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"takeout/adapters/sqldb"
	"takeout/adapters/sqlqueue"
	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/tests/testenv"
)

type orderStore = sqlstore.Store[app.OrderTx]

// opener is [sqlstore.OpenOrders] or one of its kind.
type opener[T any] func(url string, keys event.Keys, logger *slog.Logger) (*sqlstore.Store[T], error)

func openPayments(url string, keys event.Keys, logger *slog.Logger) (*sqlstore.Store[app.PaymentTx], error) {
	return sqlstore.OpenPayments(url, keys, logger)
}

// openStore opens and migrates a service's database.
func openStore[T any](t testing.TB, url string, open opener[T]) *sqlstore.Store[T] {
	t.Helper()
	store, err := open(url, nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = store.Close() })
	_, err = store.Migrate(context.Background())
	require.NoError(t, err)
	return store
}

// onBothDatabases runs the test on an order store in SQLite and in MySQL. open gives further stores on the same
// database, as other processes have them.
func onBothDatabases(t *testing.T, test func(t *testing.T, s *orderStore, open func() *orderStore)) {
	t.Parallel()
	for name, place := range map[string]func() string{
		"sqlite": func() string { return "sqlite:" + filepath.Join(t.TempDir(), "order.db") },
		"mysql":  func() string { return testenv.MySQL(t) },
	} {
		url := place()
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			open := func() *orderStore { return openStore(t, url, sqlstore.OpenOrders) }
			test(t, open(), open)
		})
	}
}

func placeIn(ctx context.Context, tx app.OrderTx, id string) error {
	orderID, err := order.ParseID(id)
	if err != nil {
		return err
	}
	money, err := domain.NewMoney(100, "CNY")
	if err != nil {
		return err
	}
	o, err := order.Place(orderID, "x", money, time.Now())
	if err != nil {
		return err
	}
	if err := tx.Orders.Add(ctx, o); err != nil {
		return err
	}
	return tx.Outbox.Publish(ctx, event.OrderPlaced{Order: event.Order{OrderID: id, Name: "x", Amount: 100, Currency: "CNY", Status: "placed", Version: 1, PlacedAt: time.Now()}})
}

func storeOrder(t testing.TB, s *orderStore, id string) {
	t.Helper()
	require.NoError(t, s.InTx(context.Background(), func(ctx context.Context, tx app.OrderTx) error { return placeIn(ctx, tx, id) }))
}

func pendingEvents(t testing.TB, s *orderStore) int {
	t.Helper()
	n, _, err := s.Pending(context.Background(), 1_000_000)
	require.NoError(t, err)
	return n
}

func awaitNoPending(t testing.TB, s *orderStore) {
	t.Helper()
	eventually(t, "the outbox is empty", func() error {
		if n := pendingEvents(t, s); n != 0 {
			return fmt.Errorf("%d events are left", n)
		}
		return nil
	})
}

// readOutbox subscribes a relay to the store's outbox.
func readOutbox(t testing.TB, s *orderStore, cfg sqlqueue.Config) (<-chan *message.Message, *sqlqueue.Reader) {
	t.Helper()
	cfg.Table = "outbox"
	if cfg.Bell == nil {
		cfg.Bell = &sqlqueue.Bell{}
	}
	if cfg.Poll == 0 {
		cfg.Poll = 20 * time.Millisecond
	}
	if cfg.Drain == 0 {
		cfg.Drain = 100 * time.Millisecond
	}
	r := sqlqueue.NewReader(s.DB(), cfg, slog.New(slog.DiscardHandler))
	t.Cleanup(func() { _ = r.Close() })
	messages, err := r.Subscribe(context.Background(), "")
	require.NoError(t, err)
	return messages, r
}

func TestOrderAndEventAreStoredTogetherOrNotAtAll(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		storeOrder(t, s, "kept")
		boom := errors.New("boom")
		err := s.InTx(context.Background(), func(ctx context.Context, tx app.OrderTx) error {
			require.NoError(t, placeIn(ctx, tx, "rolled-back"))
			return boom
		})
		require.ErrorIs(t, err, boom)
		require.Equal(t, 1, pendingEvents(t, s))
		id, err := order.ParseID("rolled-back")
		require.NoError(t, err)
		_, err = app.NewOrders(s).Get(context.Background(), id)
		require.Equal(t, domain.NotFound, domain.KindOf(err))
	})
}

func TestClosingARelayLeavesWhatWasNotConfirmed(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		for i := range 5 {
			storeOrder(t, s, fmt.Sprint("o", i))
		}
		messages, reader := readOutbox(t, s, sqlqueue.Config{})
		receive(t, messages).Ack()
		for range 4 {
			receive(t, messages)
		}
		require.NoError(t, reader.Close())
		require.Equal(t, 4, pendingEvents(t, s))

		again, _ := readOutbox(t, s, sqlqueue.Config{})
		for range 4 {
			receive(t, again).Ack()
		}
		awaitNoPending(t, s)
	})
}

func TestEventCommittedLateIsNotPassedOver(t *testing.T) {
	t.Parallel()
	url := testenv.MySQL(t)
	s := openStore(t, url, sqlstore.OpenOrders)
	messages, _ := readOutbox(t, s, sqlqueue.Config{})

	// The first transaction takes the lower id, and commits after the second is long relayed.
	first, err := s.DB().Writer().Begin()
	require.NoError(t, err)
	defer func() { _ = first.Rollback() }()
	_, err = first.Exec("INSERT INTO outbox (uuid, payload, created_at) VALUES ('low', 'x', NOW(6))")
	require.NoError(t, err)
	_, err = s.DB().Writer().Exec("INSERT INTO outbox (uuid, payload, created_at) VALUES ('high', 'x', NOW(6))")
	require.NoError(t, err)
	high := receive(t, messages)
	require.Equal(t, "high", high.UUID)
	high.Ack()
	require.NoError(t, first.Commit())
	low := receive(t, messages)
	require.Equal(t, "low", low.UUID)
	low.Ack()
}

func TestOrdersAreStoredWhileEventsAreInTheRelaysHands(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, open func() *orderStore) {
		for i := range 3 {
			storeOrder(t, s, fmt.Sprint("before", i))
		}
		messages, _ := readOutbox(t, open(), sqlqueue.Config{})
		for range 3 {
			receive(t, messages) // the broker does not answer, so nothing is settled
		}
		// The server lets a statement wait 2 s for a lock, so a lock that is in the way is an error here.
		for i := range 100 {
			storeOrder(t, s, fmt.Sprint("during", i))
		}
	})
}

func TestSeveralRelaysSendEachEventAndLoseNone(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, open func() *orderStore) {
		const orders, relays = 400, 4
		var mu sync.Mutex
		sent := map[string]int{}
		for range relays {
			messages, _ := readOutbox(t, open(), sqlqueue.Config{Window: 20})
			go func() {
				for msg := range messages {
					mu.Lock()
					sent[msg.UUID]++
					first := sent[msg.UUID] == 1
					n := len(sent)
					mu.Unlock()
					if first && n%7 == 0 {
						msg.Nack() // as when the broker does not confirm
						continue
					}
					msg.Ack()
				}
			}()
		}
		var clients sync.WaitGroup
		for c := range 8 {
			clients.Go(func() {
				for i := range orders / 8 {
					storeOrder(t, s, fmt.Sprintf("o-%d-%d", c, i))
				}
			})
		}
		clients.Wait()
		eventually(t, "every event is sent", func() error {
			mu.Lock()
			defer mu.Unlock()
			if n := pendingEvents(t, s); n != 0 || len(sent) != orders {
				return fmt.Errorf("%d sent, %d pending", len(sent), n)
			}
			return nil
		})
	})
}

// The events of a topic whose queue is full, or refused, may be many, and come again and again.
func TestEventsThatCannotBeSentAndNewOnesDoNotKeepEachOtherWaiting(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		const many, few = 300, 50
		add := func(kind string, n int) {
			t.Helper()
			for i := range n {
				_, err := s.DB().Writer().Exec("INSERT INTO outbox (uuid, payload, created_at) VALUES (?, 'x', ?)", fmt.Sprint(kind, " ", i), time.Now().UTC())
				require.NoError(t, err)
			}
		}
		messages, _ := readOutbox(t, s, sqlqueue.Config{Window: 20, Backoff: func(int) int64 { return 0 }})
		delivered, seen := map[string]int{}, map[string]bool{}
		next := func(settle func(kind string, msg *message.Message)) {
			t.Helper()
			msg := receive(t, messages)
			kind, _, _ := strings.Cut(msg.UUID, " ")
			delivered[kind]++
			seen[msg.UUID] = true
			settle(kind, msg)
		}
		stuckStays := func(kind string, msg *message.Message) {
			if kind == "stuck" {
				msg.Nack()
			} else {
				msg.Ack()
			}
		}

		add("stuck", many)
		for len(seen) < many {
			next(stuckStays)
			require.Less(t, delivered["stuck"], 10*many, "%d of them came", len(seen))
		}
		add("new", few)
		before := delivered["stuck"]
		for delivered["new"] < few {
			next(stuckStays)
			require.Less(t, delivered["stuck"]-before, many, "%d of the new ones came meanwhile", delivered["new"])
		}

		// Nor does a backlog keep those waiting that can be sent again.
		add("backlog", many)
		before = delivered["stuck"]
		for delivered["backlog"] < many {
			next(func(_ string, msg *message.Message) { msg.Ack() })
		}
		require.Greater(t, delivered["stuck"]-before, many/10)
	})
}

func TestRowsThatWereTakenAndNotHandedOutSpendNoAttempt(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		for i := range 3 {
			storeOrder(t, s, fmt.Sprint("o", i))
		}
		for range 5 {
			messages, reader := readOutbox(t, s, sqlqueue.Config{DeliveryLimit: 1})
			require.Empty(t, receive(t, messages).Metadata[app.MetadataUndeliverable])
			require.NoError(t, reader.Close())
			require.Equal(t, 1, countIn(t, s, "SELECT COUNT(*) FROM outbox WHERE available_at > 0"), "the others are anybody's at once")
			// The one that was handed out is still leased, and has had its attempt.
			_, err := s.DB().Writer().Exec("UPDATE outbox SET attempts = 0, available_at = 0 WHERE available_at > 0")
			require.NoError(t, err)
		}
		var most int
		require.NoError(t, s.DB().Reader().QueryRow("SELECT MAX(attempts) FROM outbox").Scan(&most))
		require.Zero(t, most)
	})
}

func TestItIsSaidSinceWhenTheOldestEventWaits(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		_, oldest, err := s.Pending(t.Context(), 10)
		require.NoError(t, err)
		require.Zero(t, oldest)
		storeOrder(t, s, "o1")
		hourAgo := time.Now().Add(-time.Hour).UTC().Truncate(time.Microsecond)
		_, err = s.DB().Writer().Exec("UPDATE outbox SET created_at = ?", hourAgo)
		require.NoError(t, err)
		storeOrder(t, s, "o2")
		n, oldest, err := s.Pending(t.Context(), 10)
		require.NoError(t, err)
		require.Equal(t, 2, n)
		require.Equal(t, hourAgo, oldest)
	})
}

func TestLeaseOfAMessageInFlightIsRenewed(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		storeOrder(t, s, "o1")
		messages, _ := readOutbox(t, s, sqlqueue.Config{Lease: 2 * time.Second})
		held := receive(t, messages)
		defer held.Ack()
		ends := countIn(t, s, "SELECT available_at FROM outbox")
		eventually(t, "the lease ends later, and nobody took the row once more", func() error {
			if countIn(t, s, fmt.Sprint("SELECT COUNT(*) FROM outbox WHERE attempts = 1 AND available_at > ", ends)) != 1 {
				return errors.New("it was not renewed")
			}
			return nil
		})
	})
}

func TestRowThatFailedRestsAndIsCountedAsFailed(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		for i := range 3 {
			storeOrder(t, s, fmt.Sprint("o", i))
		}
		var acked, nacked atomic.Int64
		messages, _ := readOutbox(t, s, sqlqueue.Config{
			Backoff:   func(int) int64 { return time.Hour.Microseconds() },
			OnSettled: func(a, n int) { acked.Add(int64(a)); nacked.Add(int64(n)) },
		})
		receive(t, messages).Nack()
		receive(t, messages).Ack()
		receive(t, messages).Ack()
		eventually(t, "all are settled", func() error {
			if acked.Load() != 2 || nacked.Load() != 1 {
				return fmt.Errorf("%d were acked and %d nacked", acked.Load(), nacked.Load())
			}
			return nil
		})
		require.Equal(t, 1, countIn(t, s, "SELECT COUNT(*) FROM outbox WHERE available_at > "+s.DB().Now+" + 1800000000"), "it rests as long as it should")
	})
}

func TestRelayThatCannotDeleteWhatIsSentSaysWhy(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	s := openStore(t, "sqlite:"+filepath.Join(t.TempDir(), "order.db"), func(rawURL string, keys event.Keys, _ *slog.Logger) (*orderStore, error) {
		return sqlstore.OpenOrders(rawURL, keys, slog.New(slog.NewTextHandler(&log, nil)))
	})
	storeOrder(t, s, "o1")
	_, err := s.DB().Writer().Exec("ALTER TABLE outbox_confirmed RENAME TO gone") // as if it was not granted
	require.NoError(t, err)
	reader := s.Outbox(nil, nil, slog.New(slog.NewTextHandler(&log, nil)))
	t.Cleanup(func() { _ = reader.Close() })
	messages, err := reader.Subscribe(t.Context(), "")
	require.NoError(t, err)
	receive(t, messages).Ack()
	says := func(what string) func() error {
		return func() error {
			if !strings.Contains(log.String(), what) {
				return errors.New(log.String())
			}
			return nil
		}
	}
	eventually(t, "the log says why", says("no such table: outbox_confirmed"))
	_, err = s.DB().Writer().Exec("ALTER TABLE gone RENAME TO outbox_confirmed")
	require.NoError(t, err)
	eventually(t, "the log says that it is over", says("rows can be settled again"))
	awaitNoPending(t, s)
}

func TestRelayThatOutlivesItsLeaseMakesDuplicatesAndNoLoss(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, open func() *orderStore) {
		storeOrder(t, s, "o1")
		// A relay that is frozen does not renew; this one never gets around to it either.
		frozen := sqlqueue.NewReader(open().DB(), sqlqueue.Config{Table: "outbox", Bell: &sqlqueue.Bell{}, Window: 1, Lease: time.Hour, Drain: time.Millisecond}, slog.New(slog.DiscardHandler))
		t.Cleanup(func() { _ = frozen.Close() })
		held, err := frozen.Subscribe(context.Background(), "")
		require.NoError(t, err)
		zombie := receive(t, held)
		require.NoError(t, sqlqueue.TakeBack(context.Background(), s.DB(), "outbox")) // its lease is over

		messages, _ := readOutbox(t, s, sqlqueue.Config{})
		again := receive(t, messages)
		require.Equal(t, zombie.UUID, again.UUID)
		storeOrder(t, s, "o2")
		other := receive(t, messages)
		zombie.Ack() // it was in the broker all the same
		eventually(t, "exactly the acked event is gone", func() error {
			if n := pendingEvents(t, s); n != 1 {
				return fmt.Errorf("%d are pending", n)
			}
			return nil
		})
		again.Ack()
		other.Ack()
		awaitNoPending(t, s)
	})
}

// A transaction of InnoDB can be seen by others shortly before it is on disk, and the commit of the lease puts everything
// on disk that the relay has seen. Without it an event could be sent of an order that is gone when the server has come back.
func TestNoEventIsHandedOutBeforeItsLeaseIsCommitted(t *testing.T) {
	t.Parallel()
	url := testenv.MySQL(t)
	direct := openOrders(t, url)
	_, err := direct.Migrate(context.Background())
	require.NoError(t, err)
	storeOrder(t, direct, "o1")

	behind, server := throughCommits(t, url)
	trap := server.arm(commitTrap{fault: notExecuted, statement: "attempts = attempts + 1", andAway: true})
	looks := make(chan struct{}, 100)
	messages, _ := readOutbox(t, openOrders(t, behind), sqlqueue.Config{Ready: func(ctx context.Context) error {
		looks <- struct{}{}
		return ctx.Err()
	}})
	<-looks
	trap.wait(t)
	select {
	case <-messages:
		t.Fatal("an event was handed out whose lease was not committed")
	case <-looks: // it was not, and the reader tries again
	}
	server.mend()
	receive(t, messages).Ack()
}

// keyThatFinds returns the key by which the server finds the rows of the table that a statement names first, or "" if it reads
// them all.
func keyThatFinds(t testing.TB, db *sql.DB, table, statement string, args ...any) string {
	t.Helper()
	rows, err := db.QueryContext(t.Context(), "EXPLAIN FORMAT=TRADITIONAL "+statement, args...)
	require.NoError(t, err)
	defer rows.Close()
	columns, err := rows.Columns()
	require.NoError(t, err)
	values := make([]sql.NullString, len(columns))
	targets := make([]any, len(columns))
	for i := range values {
		targets[i] = &values[i]
	}
	value := func(column string) string { return values[slices.Index(columns, column)].String }
	for rows.Next() {
		require.NoError(t, rows.Scan(targets...))
		if value("table") == table || value("table") == "t" {
			return value("key")
		}
	}
	require.NoError(t, rows.Err())
	t.Fatalf("the plan does not name %s", table)
	return ""
}

// Whoever reads the whole table waits for rows that others have locked, and they for his.
func TestRowsAreFoundByTheirKeyHoweverSmallTheServerBelievesTheirTableToBe(t *testing.T) {
	t.Parallel()
	s := openOrders(t, testenv.MySQL(t))
	db := s.DB()
	ctx := context.Background()
	for _, statement := range []string{
		"CREATE TABLE queue (id BIGINT AUTO_INCREMENT PRIMARY KEY, payload TEXT, available_at BIGINT DEFAULT 0) STATS_AUTO_RECALC = 0",
		"CREATE TABLE kept (payload TEXT)",
		"INSERT INTO queue (payload) VALUES ('x')" + strings.Repeat(", ('x')", 399),
	} {
		_, err := db.Writer().ExecContext(ctx, statement)
		require.NoError(t, err)
	}
	for _, n := range []int{1, 2, 3, 100, 300} {
		ids := make([]any, n)
		for i := range ids {
			ids[i] = i + 1
		}
		for _, statement := range []string{
			db.UpdateByID("queue", "available_at = 1", n), db.CopyByID("queue", "kept", "payload", "payload", n), db.DeleteByID("queue", n),
		} {
			require.Equal(t, "PRIMARY", keyThatFinds(t, db.Writer(), "queue", statement, ids...), "%d ids: %s", n, statement[:40])
		}
	}
}

func TestUnreadableOutboxRowDoesNotStopTheOthers(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		_, err := s.DB().Writer().Exec("INSERT INTO outbox (uuid, payload, metadata, created_at) VALUES ('bad', 'not an envelope', 'not json', ?)", time.Now().UTC())
		require.NoError(t, err)
		storeOrder(t, s, "o1")
		messages, _ := readOutbox(t, s, sqlqueue.Config{})
		good := 0
		for good == 0 {
			msg := receive(t, messages)
			if msg.UUID == "bad" {
				msg.Nack()
				continue
			}
			good++
			msg.Ack()
		}
		eventually(t, "only the bad row is left", func() error {
			if n := pendingEvents(t, s); n != 1 {
				return fmt.Errorf("%d rows", n)
			}
			return nil
		})
	})
}

func delivery(id, body string) app.Delivery {
	return app.Delivery{Consumer: "order.test", EventID: id, Hash: sha256.Sum256([]byte(body)), OrderID: "o1"}
}

func TestMessageTakesEffectOnceHoweverOftenItIsHandled(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, open func() *orderStore) {
		ctx := app.WithDelivery(context.Background(), delivery("evt_1", "body"))
		var effects, duplicates atomic.Int32
		var handlers sync.WaitGroup
		for i := range 20 {
			s := s
			if i%2 == 1 {
				s = open()
			}
			handlers.Go(func() {
				err := s.InTx(ctx, func(ctx context.Context, tx app.OrderTx) error { return placeIn(ctx, tx, "o1") })
				switch {
				case err == nil:
					effects.Add(1)
				case errors.Is(err, app.ErrDuplicate):
					duplicates.Add(1)
				default:
					t.Errorf("unexpected: %v", err)
				}
			})
		}
		handlers.Wait()
		require.EqualValues(t, 1, effects.Load())
		require.EqualValues(t, 19, duplicates.Load())
		require.Equal(t, 1, pendingEvents(t, s))
	})
}

func TestFailedAttemptLeavesNothingSoTheNextCanSucceed(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		ctx := app.WithDelivery(context.Background(), delivery("evt_1", "body"))
		err := s.InTx(ctx, func(ctx context.Context, tx app.OrderTx) error {
			require.NoError(t, placeIn(ctx, tx, "o1"))
			return errors.New("boom")
		})
		require.Error(t, err)
		require.NotErrorIs(t, err, app.ErrDuplicate)
		require.NoError(t, s.InTx(ctx, func(ctx context.Context, tx app.OrderTx) error { return placeIn(ctx, tx, "o1") }),
			"neither the inbox nor the order of the failed attempt is there")
		require.Equal(t, 1, pendingEvents(t, s))
	})
}

func TestEventIDWithAnotherBodyIsRefused(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		nothing := func(context.Context, app.OrderTx) error { return nil }
		require.NoError(t, s.InTx(app.WithDelivery(context.Background(), delivery("evt_1", "body")), nothing))
		err := s.InTx(app.WithDelivery(context.Background(), delivery("evt_1", "another body")), nothing)
		require.Equal(t, domain.Invalid, domain.KindOf(err))
		err = s.InTx(app.WithDelivery(context.Background(), delivery("EVT_1", "another body")), nothing)
		require.NoError(t, err, "ids differ by case")
	})
}

func TestFailureIsKeptOnceAndWhole(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		for name, payload := range map[string][]byte{
			"empty": nil, "binary": {0, 0xff, 0xfe, '\''}, "larger than a packet": bytes.Repeat([]byte("0123456789abcdef"), 20<<16),
		} {
			f := app.Failure{
				Consumer: "dispatch.assign-courier", MessageID: name + strings.Repeat("é\xff", 200), Class: "permanent", Code: "c",
				Error: strings.Repeat("x", 2000), Attempts: 1, Headers: map[string]string{"x-foreign": "1"}, Payload: payload,
			}
			require.NoError(t, s.Keep(context.Background(), f), name)
			require.NoError(t, s.Keep(context.Background(), f), "the ack was lost, and it came again: "+name)
			var id, attempts, size int64
			require.NoError(t, s.DB().Reader().QueryRow("SELECT id, attempts, payload_size FROM failure WHERE payload_size = ?", len(payload)).
				Scan(&id, &attempts, &size))
			require.EqualValues(t, 2, attempts)
			require.True(t, bytes.Equal(payload, keptPayload(t, s, id)), name)
		}
	})
}

func TestSameBytesUnderAnotherSignatureAreAnotherFailure(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		unsigned := givenUpBy("order.mark-dispatched", "m1", "o1", "c", "e")
		signed, forged := unsigned, unsigned
		signed.Headers = map[string]string{event.SignatureHeader: "genuine"}
		forged.Headers = map[string]string{event.SignatureHeader: "forged"}
		delayed := func(f app.Failure) {
			require.NoError(t, s.Delay(t.Context(), f, 1, time.Hour))
		}
		for range 2 {
			for _, f := range []app.Failure{unsigned, forged, signed} {
				require.NoError(t, s.Keep(t.Context(), f))
				delayed(f)
			}
		}
		for i, f := range []app.Failure{unsigned, forged, signed} {
			kept, err := s.GetFailure(t.Context(), int64(i+1))
			require.NoError(t, err)
			require.Equal(t, f.Headers, kept.Headers)
			require.Equal(t, 2, kept.Occurrences)
		}
		require.Equal(t, 3, countIn(t, s, "SELECT COUNT(*) FROM failure"))
		require.Equal(t, 3, countIn(t, s, "SELECT COUNT(*) FROM retry"))
	})
}

func TestFailureThatAnOlderVersionKeptIsKnownAgain(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		signed := givenUpBy("order.mark-dispatched", "m1", "o1", "c", "e")
		signed.Headers = map[string]string{event.SignatureHeader: "genuine"}
		require.NoError(t, s.Keep(t.Context(), signed))
		old := sha256.Sum256([]byte("m1\x00" + string(signed.Payload)))
		_, err := s.DB().Writer().ExecContext(t.Context(), "UPDATE failure SET fingerprint = ?", old[:])
		require.NoError(t, err)
		require.NoError(t, s.Keep(t.Context(), signed))
		require.Equal(t, 1, countIn(t, s, "SELECT COUNT(*) FROM failure WHERE occurrences = 2"))

		forged := signed
		forged.Headers = map[string]string{event.SignatureHeader: "forged"}
		require.NoError(t, s.Keep(t.Context(), forged))
		require.Equal(t, 2, countIn(t, s, "SELECT COUNT(*) FROM failure"))

		unsigned := givenUpBy("order.mark-dispatched", "m2", "o1", "c", "e")
		require.NoError(t, s.Keep(t.Context(), unsigned))
		same := sha256.Sum256([]byte("m2\x00" + string(unsigned.Payload)))
		var kept []byte
		require.NoError(t, s.DB().Reader().QueryRowContext(t.Context(), "SELECT fingerprint FROM failure WHERE message_id = 'm2'").Scan(&kept))
		require.Equal(t, same[:], kept, "as it always was")
	})
}

func keptPayload(t testing.TB, s *orderStore, failure int64) []byte {
	t.Helper()
	rows, err := s.DB().Reader().Query("SELECT bytes FROM failure_payload WHERE failure_id = ? ORDER BY part", failure)
	require.NoError(t, err)
	defer rows.Close()
	var kept []byte
	for rows.Next() {
		var part []byte
		require.NoError(t, rows.Scan(&part))
		kept = append(kept, part...)
	}
	require.NoError(t, rows.Err())
	return kept
}

// Only SQLite takes such a value.
func TestRowWhoseTimeSomebodyMadeUnreadableIsNamed(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	a := mustSend(t, http.MethodPost, s.api+"/v1/orders", `{"order_id":"g1","name":"x","amount":500}`)
	require.Equal(t, http.StatusCreated, a.status, "%s", a)
	eventually(t, "all services know the order", func() error {
		if o := s.get(t, "g1"); o.Status != "dispatched" || o.Points == 0 {
			return fmt.Errorf("%+v", o)
		}
		return nil
	})
	s.stop(t)
	const unreadable = "placed_at = '29.11.2026 00:43'"
	names := func(table string, err error) {
		t.Helper()
		require.ErrorContains(t, err, "the row g1 of "+table+" is damaged")
		require.Equal(t, domain.Unknown, domain.KindOf(err))
	}
	looks := func(db *sqldb.DB, table string) {
		t.Helper()
		book := sqlstore.NewBook(db)
		_, err := book.Records(t.Context(), []string{"g1"})
		names(table, err)
		_, err = book.Cut(t.Context(), time.Time{}, time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC), 0)
		names(table, err)
	}

	execute(t, s.order, "UPDATE order_info SET "+unreadable)
	orders := openStore(t, s.order, sqlstore.OpenOrders)
	looks(orders.DB(), "order_info")
	_, err := sqlstore.NewBook(orders.DB()).Newest(t.Context(), event.DispatchAssigned{}.Key())
	names("order_info", err)
	require.NoError(t, orders.View(t.Context(), func(ctx context.Context, tx app.OrderTx) error {
		_, err := tx.Orders.List(ctx, order.Query{Limit: 10})
		names("order_info", err)
		_, err = tx.Orders.Get(ctx, orderID(t, "g1"))
		names("order_info", err)
		_, err = tx.Orders.Get(ctx, orderID(t, "g2"))
		require.Equal(t, domain.NotFound, domain.KindOf(err))
		return nil
	}))

	execute(t, s.dispatch, "UPDATE platoon SET state = 'waiting', "+unreadable)
	dispatches := openStore(t, s.dispatch, sqlstore.OpenDispatches)
	looks(dispatches.DB(), "platoon")
	require.NoError(t, dispatches.View(t.Context(), func(ctx context.Context, tx app.DispatchTx) error {
		_, err := tx.Dispatches.Get(ctx, orderID(t, "g1"))
		names("platoon", err)
		_, err = tx.Dispatches.Backlog(ctx)
		names("platoon", err)
		return nil
	}))

	execute(t, s.payment, "UPDATE payment SET "+unreadable)
	payments := openStore(t, s.payment, openPayments)
	looks(payments.DB(), "payment")
	require.NoError(t, payments.View(t.Context(), func(ctx context.Context, tx app.PaymentTx) error {
		_, err := tx.Payments.Get(ctx, orderID(t, "g1"))
		names("payment", err)
		return nil
	}))

	execute(t, s.points, "UPDATE points_entry SET "+unreadable)
	points := openStore(t, s.points, sqlstore.OpenPoints)
	looks(points.DB(), "points_entry")
	require.NoError(t, points.View(t.Context(), func(ctx context.Context, tx app.PointsTx) error {
		_, err := tx.Ledger.Entries(ctx, orderID(t, "g1"))
		names("points_entry", err)
		return nil
	}))
}

func TestDatabaseOfAnotherServiceIsRefused(t *testing.T) {
	t.Parallel()
	for _, url := range []string{"sqlite:" + filepath.Join(t.TempDir(), "x.db"), testenv.MySQL(t)} {
		orders, err := sqlstore.OpenOrders(url, nil, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		_, err = orders.Migrate(context.Background())
		require.NoError(t, err)
		require.NoError(t, orders.Close())
		dispatches, err := sqlstore.OpenDispatches(url, nil, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		require.ErrorIs(t, dispatches.CheckSchema(context.Background()), sqlstore.ErrOtherService)
		_, err = dispatches.Migrate(context.Background())
		require.ErrorIs(t, err, sqlstore.ErrOtherService)
		require.ErrorContains(t, err, "belongs to the order service")
		_, err = dispatches.DB().Writer().Exec("SELECT COUNT(*) FROM platoon")
		require.Error(t, err, "nothing of ours is in it")
		require.NoError(t, dispatches.Close())
	}
}

func TestEightProcessesMigrateAtOnce(t *testing.T) {
	t.Parallel()
	for name, url := range map[string]string{"sqlite": "sqlite:" + filepath.Join(t.TempDir(), "x.db"), "mysql": testenv.MySQL(t)} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var starting sync.WaitGroup
			var mu sync.Mutex
			ran := map[string]int{}
			for range 8 {
				starting.Go(func() {
					s, err := sqlstore.OpenOrders(url, nil, slog.New(slog.DiscardHandler))
					if err != nil {
						t.Errorf("open: %v", err)
						return
					}
					defer s.Close()
					names, err := s.Migrate(context.Background())
					if err != nil {
						t.Errorf("migrate: %v", err)
					}
					mu.Lock()
					for _, name := range names {
						ran[name]++
					}
					mu.Unlock()
					if err := s.CheckSchema(context.Background()); err != nil {
						t.Errorf("check: %v", err)
					}
				})
			}
			starting.Wait()
			require.Contains(t, ran, "order/00001_order.sql")
			for name, times := range ran {
				require.Equal(t, 1, times, name)
			}
		})
	}
}

func TestTakingFromTheOutboxDoesNotLockWhereOrdersAreInserted(t *testing.T) {
	t.Parallel()
	s := openStore(t, testenv.MySQL(t), sqlstore.OpenOrders)
	storeOrder(t, s, "before")

	// As a relay takes rows, but slowly: the transaction stays open while orders come.
	err := s.DB().InTx(context.Background(), func(ctx context.Context, tx *sql.Tx) error {
		rows, err := tx.QueryContext(ctx, "SELECT id FROM outbox WHERE available_at <= "+s.DB().Now+
			" ORDER BY id LIMIT 500"+s.DB().ForUpdate+s.DB().SkipLocked)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() { // to the end of the table
		}
		for i := range 20 {
			storeOrder(t, s, fmt.Sprint("during", i))
		}
		return rows.Err()
	})
	require.NoError(t, err)
	require.Equal(t, 21, pendingEvents(t, s))
}
