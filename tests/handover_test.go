package tests

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"takeout/adapters/sqldb"
	"takeout/adapters/sqlqueue"
	"takeout/app"
)

// store stores n rows in the outbox under the promise, and returns them as they are handed over.
func store(t testing.TB, db *sqldb.DB, p *sqlqueue.Promise, n int) []sqlqueue.Row {
	t.Helper()
	rows, args := make([]sqlqueue.Row, n), []any{}
	for i := range rows {
		rows[i] = sqlqueue.Row{UUID: uuid.NewString(), Payload: []byte("x")}
		args = append(args, rows[i].UUID, rows[i].Payload, time.Now().UTC())
	}
	attempts, availableAt := p.Lease()
	result, err := db.Writer().Exec(sqldb.Insert("outbox", "uuid, payload, created_at, attempts, available_at", n, attempts, availableAt), args...)
	require.NoError(t, err)
	first, err := db.FirstID(result, n)
	require.NoError(t, err)
	for i := range rows {
		rows[i].ID = first + int64(i)
	}
	return rows
}

// promised returns a promise for n rows, as soon as there is a relay to give it.
func promised(t testing.TB, h *sqlqueue.Handover, n int) (promise *sqlqueue.Promise) {
	t.Helper()
	eventually(t, "the relay reads", func() error {
		if promise = h.Promise("", n); promise == nil {
			return errors.New("nobody takes rows")
		}
		return nil
	})
	return promise
}

func TestEventsReachTheRelayOfTheirProcessAtOnceAndNoOther(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, open func() *orderStore) {
		var handover sqlqueue.Handover
		messages, _ := readOutbox(t, s, sqlqueue.Config{Handover: &handover, Poll: time.Hour}) // which looks at nothing by itself
		others, _ := readOutbox(t, open(), sqlqueue.Config{})
		promise := promised(t, &handover, 3)
		rows := store(t, s.DB(), promise, 3)
		receiveNothing(t, messages) // the transaction may still fail
		receiveNothing(t, others)
		promise.Keep(rows)
		for _, row := range rows {
			msg := receive(t, messages)
			require.Equal(t, row.UUID, msg.UUID)
			msg.Ack()
		}
		awaitNoPending(t, s)
		promised(t, &handover, 500).Withdraw() // all of half the window is free again
	})
}

func TestEventsDoNotOvertakeABacklog(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		const backlog, window = 20, 4
		var handover sqlqueue.Handover
		rows := store(t, s.DB(), nil, backlog)
		messages, _ := readOutbox(t, s, sqlqueue.Config{Handover: &handover, Window: window})
		for i, row := range rows {
			msg := receive(t, messages)
			require.Equal(t, row.UUID, msg.UUID)
			if i < backlog-window {
				require.Nil(t, handover.Promise("", 1), "others wait that are not in flight yet")
			}
			msg.Ack()
		}
		promised(t, &handover, 1).Withdraw()
	})
}

func TestEventsAreHandedOverOnlyWhenTheyAreCommitted(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		messages, _ := relayOf(t, s)
		ctx, cancel := context.WithCancel(context.Background())
		err := s.InTx(ctx, func(ctx context.Context, tx app.OrderTx) error {
			defer cancel() // so that all is done, and the COMMIT fails
			return placeIn(ctx, tx, "never")
		})
		require.Error(t, err)
		receiveNothing(t, messages)
		storeOrder(t, s, "o1")
		receive(t, messages).Ack()
	})
}

func TestEventsWhoseFateIsUnknownComeWhenTheirLeaseIsOver(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		var handover sqlqueue.Handover
		messages, _ := readOutbox(t, s, sqlqueue.Config{Handover: &handover, Lease: time.Second})
		promise := promised(t, &handover, 1)
		rows := store(t, s.DB(), promise, 1)
		promise.Withdraw()
		msg := receive(t, messages)
		require.Equal(t, rows[0].UUID, msg.UUID)
		msg.Ack()
		awaitNoPending(t, s)
	})
}

// A cluster may number rows with gaps, so that an id which is reckoned from another one is somebody else's.
func TestEventIsNotDeletedUnderTheNumberOfAnother(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		var handover sqlqueue.Handover
		messages, _ := readOutbox(t, s, sqlqueue.Config{Handover: &handover, Lease: time.Second})
		promise := promised(t, &handover, 2)
		rows := store(t, s.DB(), promise, 3)
		other := rows[1]
		rows = []sqlqueue.Row{rows[0], rows[2]}
		rows[1].ID = other.ID
		promise.Keep(rows)
		receive(t, messages).Ack()
		receive(t, messages).Ack()
		eventually(t, "several at once are not handed over for a while", func() error {
			if p := handover.Promise("", 2); p != nil {
				p.Withdraw()
				return errors.New("they are")
			}
			return nil
		})
		single := handover.Promise("", 1)
		require.NotNil(t, single, "a single one has the number that the database tells")
		single.Withdraw()
		left := map[string]bool{}
		for range 2 {
			msg := receive(t, messages)
			left[msg.UUID] = true
			msg.Ack()
		}
		require.Equal(t, map[string]bool{other.UUID: true, rows[1].UUID: true}, left, "the other comes, and the one that was not found comes again")
		awaitNoPending(t, s)
	})
}

func TestClosingRelayLeavesToOthersWhatItHadPromisedToTake(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, open func() *orderStore) {
		var handover sqlqueue.Handover
		_, reader := readOutbox(t, s, sqlqueue.Config{Handover: &handover, Lease: time.Hour})
		promise := promised(t, &handover, 2)
		rows := store(t, s.DB(), promise, 2)
		require.NoError(t, reader.Close())
		require.Nil(t, handover.Promise("", 1), "a relay that has stopped takes nothing")
		promise.Keep(rows)
		messages, _ := readOutbox(t, open(), sqlqueue.Config{})
		receive(t, messages).Ack()
		receive(t, messages).Ack()
		awaitNoPending(t, s)
	})
}

func TestRelayPromisesNoMoreThanHalfItsWindowAndNothingWhileTheBrokerIsAway(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, _ func() *orderStore) {
		var handover sqlqueue.Handover
		var away atomic.Bool
		readOutbox(t, s, sqlqueue.Config{Handover: &handover, Window: 8, Ready: func(ctx context.Context) error {
			for away.Load() {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				time.Sleep(time.Millisecond)
			}
			return nil
		}})
		three := promised(t, &handover, 3)
		require.Nil(t, handover.Promise("", 2), "that would be five of eight")
		one := promised(t, &handover, 1)
		three.Withdraw()
		one.Withdraw()
		promised(t, &handover, 4).Withdraw()
		away.Store(true)
		require.Nil(t, handover.Promise("", 1))
		away.Store(false)
		promised(t, &handover, 1).Withdraw()
	})
}

func TestEachEventIsSentOnceByTheRelayOfItsProcessAlthoughOthersLook(t *testing.T) {
	onBothDatabases(t, func(t *testing.T, s *orderStore, open func() *orderStore) {
		const orders = 400
		own, _ := relayOf(t, s)
		others, _ := readOutbox(t, open(), sqlqueue.Config{})
		var mu sync.Mutex
		sent := map[string]int{}
		for _, messages := range []<-chan *message.Message{own, others} {
			go func() {
				for msg := range messages {
					mu.Lock()
					sent[msg.UUID]++
					mu.Unlock()
					msg.Ack()
				}
			}()
		}
		failed := errors.New("it is not to be")
		var clients sync.WaitGroup
		for c := range 8 {
			clients.Go(func() {
				for i := range orders / 8 {
					storeOrder(t, s, fmt.Sprintf("o-%d-%d", c, i))
					if i%10 == 0 {
						_ = s.InTx(context.Background(), func(ctx context.Context, tx app.OrderTx) error {
							return errors.Join(placeIn(ctx, tx, fmt.Sprintf("never-%d-%d", c, i)), failed)
						})
					}
				}
			})
		}
		clients.Wait()
		awaitNoPending(t, s)
		mu.Lock()
		defer mu.Unlock()
		require.Len(t, sent, orders)
		for id, times := range sent {
			require.Equal(t, 1, times, id)
		}
	})
}
