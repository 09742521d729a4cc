package tests

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"takeout/adapters/rabbitmq"
	"takeout/adapters/sqlbroker"
	"takeout/app"
	"takeout/ports/messaging"
	"takeout/tests/testenv"
)

// brokerKind is an implementation of messaging.Broker. Every one must pass every test of this file.
type brokerKind struct {
	name  string
	place func(t testing.TB) string // a new, empty place
	open  func(t testing.TB, place string, o brokerOptions) messaging.Broker
}

type brokerOptions struct {
	drain         time.Duration
	deliveryLimit int
}

func brokerKinds() []brokerKind {
	sql := func(t testing.TB, place string, o brokerOptions) messaging.Broker {
		b, err := sqlbroker.Open(place, sqlbroker.Config{
			DrainTimeout: o.drain, DeliveryLimit: o.deliveryLimit, NackDelay: 10 * time.Millisecond,
		}, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		_, err = b.Migrate(context.Background())
		require.NoError(t, err)
		return b
	}
	return []brokerKind{
		{"embedded", func(t testing.TB) string { return "sqlite:" + filepath.Join(t.TempDir(), "broker.db") }, sql},
		{"sql on mysql", testenv.MySQL, sql},
		{"rabbitmq", testenv.AMQP, func(t testing.TB, place string, o brokerOptions) messaging.Broker {
			b, err := rabbitmq.Open(place, rabbitmq.Config{
				DrainTimeout: o.drain, DeliveryLimit: o.deliveryLimit, NackDelay: 10 * time.Millisecond,
			}, slog.New(slog.DiscardHandler))
			require.NoError(t, err)
			return b
		}},
	}
}

// onEveryBroker runs the test on every implementation, with a broker that is ready.
func onEveryBroker(t *testing.T, o brokerOptions, test func(t *testing.T, b messaging.Broker, reopen func() messaging.Broker)) {
	t.Parallel()
	if o.drain == 0 {
		o.drain = 5 * time.Second
	}
	for _, kind := range brokerKinds() {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			place := kind.place(t)
			open := func() messaging.Broker {
				b := kind.open(t, place, o)
				t.Cleanup(func() { _ = b.Close() })
				ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
				defer cancel()
				require.NoError(t, b.WaitReady(ctx))
				require.NoError(t, b.Check())
				return b
			}
			test(t, open(), open)
		})
	}
}

func newMessage(body string) *message.Message {
	return message.NewMessage("evt_"+uuid.NewString(), []byte(body))
}

func subscribe(t testing.TB, b messaging.Broker, queue string) (<-chan *message.Message, message.Subscriber) {
	t.Helper()
	s := b.Subscriber()
	t.Cleanup(func() { _ = s.Close() })
	messages, err := s.Subscribe(context.Background(), queue)
	require.NoError(t, err)
	return messages, s
}

func receive(t testing.TB, messages <-chan *message.Message) *message.Message {
	t.Helper()
	select {
	case msg, ok := <-messages:
		require.True(t, ok, "the subscription is open")
		return msg
	case <-time.After(20 * time.Second):
		t.Fatal("no message came within 20 s")
		return nil
	}
}

// receiveNothing checks that no message comes. It is the one place where a test waits for time: that nothing happens
// cannot be waited for.
func receiveNothing(t testing.TB, messages <-chan *message.Message) {
	t.Helper()
	select {
	case msg, ok := <-messages:
		if ok {
			t.Fatalf("message %s came again", msg.UUID)
		}
	case <-time.After(300 * time.Millisecond):
	}
}

func TestQueuesThatAreReadAreTold(t *testing.T) {
	onEveryBroker(t, brokerOptions{}, func(t *testing.T, b messaging.Broker, _ func() messaging.Broker) {
		require.NoError(t, b.Bind("order.placed", "dispatch.assign"))
		require.NoError(t, b.Bind("order.placed", "order.recreate"))
		require.Empty(t, b.Reading(), "nobody reads yet")
		_, _ = subscribe(t, b, "dispatch.assign")
		eventually(t, "the queue is read, and no other", func() error {
			reading := b.Reading()
			if trouble, told := reading["dispatch.assign"]; len(reading) != 1 || !told || trouble != nil {
				return fmt.Errorf("%v", reading)
			}
			return nil
		})
	})
}

func TestQueueWhoseTableCannotBeReadIsTold(t *testing.T) {
	t.Parallel()
	for _, kind := range brokerKinds()[:2] {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			place := kind.place(t)
			b := kind.open(t, place, brokerOptions{drain: 5 * time.Second})
			t.Cleanup(func() { _ = b.Close() })
			require.NoError(t, b.Bind("order.placed", "dispatch.assign"))
			messages, _ := subscribe(t, b, "dispatch.assign")
			execute(t, place, "ALTER TABLE broker_message RENAME TO elsewhere")
			eventually(t, "the queue cannot be read", func() error {
				if b.Reading()["dispatch.assign"] == nil {
					return errors.New("it can")
				}
				return nil
			})
			execute(t, place, "ALTER TABLE elsewhere RENAME TO broker_message")
			require.NoError(t, b.Publish("order.placed", newMessage("x")))
			receive(t, messages).Ack()
			eventually(t, "the queue can be read", func() error { return b.Reading()["dispatch.assign"] })
		})
	}
}

func TestTwoQueuesOnOneKeyBothGetTheMessage(t *testing.T) {
	onEveryBroker(t, brokerOptions{}, func(t *testing.T, b messaging.Broker, _ func() messaging.Broker) {
		require.NoError(t, b.Bind("order.placed", "dispatch.assign"))
		require.NoError(t, b.Bind("order.placed", "order.recreate"))
		require.NoError(t, b.Bind("order.cancelled", "dispatch.release"))
		sent := newMessage(`{"n":1}`)
		sent.Metadata.Set("traceparent", "00-1-2-01")
		require.NoError(t, b.Publish("order.placed", sent))
		for _, queue := range []string{"dispatch.assign", "order.recreate"} {
			messages, _ := subscribe(t, b, queue)
			got := receive(t, messages)
			require.Equal(t, sent.UUID, got.UUID)
			require.Equal(t, sent.Payload, got.Payload)
			require.Equal(t, "00-1-2-01", got.Metadata.Get("traceparent"))
			got.Ack()
		}
		other, _ := subscribe(t, b, "dispatch.release")
		receiveNothing(t, other)
	})
}

func TestMessageWithoutQueueIsAnError(t *testing.T) {
	onEveryBroker(t, brokerOptions{}, func(t *testing.T, b messaging.Broker, _ func() messaging.Broker) {
		require.Error(t, b.Publish("nobody.listens", newMessage("x")), "before anything is bound")
		require.NoError(t, b.Bind("somebody.listens", "q"))
		require.Error(t, b.Publish("nobody.listens", newMessage("x")))

		// Among many that have a queue, exactly those without are refused.
		var publishers sync.WaitGroup
		var wrong atomic.Int32
		for i := range 200 {
			publishers.Go(func() {
				topic := []string{"somebody.listens", "nobody.listens"}[i%2]
				if err := b.Publish(topic, newMessage("x")); (err != nil) != (i%2 == 1) {
					wrong.Add(1)
				}
			})
		}
		publishers.Wait()
		require.Zero(t, wrong.Load())
	})
}

func TestNackedMessageComesAgain(t *testing.T) {
	onEveryBroker(t, brokerOptions{}, func(t *testing.T, b messaging.Broker, _ func() messaging.Broker) {
		require.NoError(t, b.Bind("e", "q"))
		messages, _ := subscribe(t, b, "q")
		sent := newMessage("x")
		require.NoError(t, b.Publish("e", sent))
		for range 3 {
			msg := receive(t, messages)
			require.Equal(t, sent.UUID, msg.UUID)
			msg.Nack()
		}
		receive(t, messages).Ack()
		receiveNothing(t, messages)
	})
}

func TestNoMessageCanSayOfItselfThatItIsUndeliverable(t *testing.T) {
	onEveryBroker(t, brokerOptions{}, func(t *testing.T, b messaging.Broker, _ func() messaging.Broker) {
		require.NoError(t, b.Bind("e", "q"))
		messages, _ := subscribe(t, b, "q")
		sent := newMessage("x")
		sent.Metadata.Set(app.MetadataUndeliverable, "a lie")
		require.NoError(t, b.Publish("e", sent))
		msg := receive(t, messages)
		require.Empty(t, msg.Metadata.Get(app.MetadataUndeliverable))
		msg.Ack()
	})
}

func TestBoundQueueKeepsMessagesForALaterConsumer(t *testing.T) {
	onEveryBroker(t, brokerOptions{}, func(t *testing.T, b messaging.Broker, reopen func() messaging.Broker) {
		require.NoError(t, b.Bind("e", "q"))
		sent := newMessage("x")
		require.NoError(t, b.Publish("e", sent))
		require.NoError(t, b.Close())
		messages, _ := subscribe(t, reopen(), "q")
		msg := receive(t, messages)
		require.Equal(t, sent.UUID, msg.UUID)
		msg.Ack()
	})
}

func TestMessageOfAnotherProcessIsNoticed(t *testing.T) {
	onEveryBroker(t, brokerOptions{}, func(t *testing.T, b messaging.Broker, reopen func() messaging.Broker) {
		require.NoError(t, b.Bind("e", "q"))
		require.NoError(t, b.Bind("e2", "q2"))
		other := reopen() // it rings no bell of the first one
		messages, _ := subscribe(t, b, "q")
		second, _ := subscribe(t, b, "q2")
		for range 3 { // the readers wait already when the second and the third come
			require.NoError(t, other.Publish("e", newMessage("x")))
			receive(t, messages).Ack()
			require.NoError(t, other.Publish("e2", newMessage("x")))
			receive(t, second).Ack()
		}
	})
}

func TestPublishWhileClosingTellsTheTruth(t *testing.T) {
	onEveryBroker(t, brokerOptions{}, func(t *testing.T, b messaging.Broker, reopen func() messaging.Broker) {
		require.NoError(t, b.Bind("e", "q"))
		var publishers sync.WaitGroup
		var stored sync.Map
		var accepted atomic.Int32
		for range 8 {
			publishers.Go(func() {
				for {
					msg := newMessage("x")
					if err := b.Publish("e", msg); err != nil {
						return
					}
					accepted.Add(1)
					stored.Store(msg.UUID, true)
				}
			})
		}
		eventually(t, "messages flow", func() error {
			if accepted.Load() < 50 {
				return errors.New("not yet")
			}
			return nil
		})
		require.NoError(t, b.Close())
		publishers.Wait() // everybody was refused in the end
		require.Error(t, b.Publish("e", newMessage("x")))

		messages, _ := subscribe(t, reopen(), "q")
		missing := map[any]bool{}
		stored.Range(func(id, _ any) bool { missing[id] = true; return true })
		for len(missing) > 0 {
			msg := receive(t, messages)
			delete(missing, msg.UUID)
			msg.Ack()
		}
	})
}

func TestMessageHandledButNotAckedComesAgain(t *testing.T) {
	onEveryBroker(t, brokerOptions{drain: 100 * time.Millisecond}, func(t *testing.T, b messaging.Broker, reopen func() messaging.Broker) {
		require.NoError(t, b.Bind("e", "q"))
		messages, subscriber := subscribe(t, b, "q")
		require.NoError(t, b.Publish("e", newMessage("x")))
		msg := receive(t, messages)
		require.NoError(t, subscriber.Close()) // the handler never settles it
		require.Error(t, msg.Context().Err(), "the handler of an abandoned message is told")
		again, _ := subscribe(t, reopen(), "q")
		second := receive(t, again)
		require.Equal(t, msg.UUID, second.UUID)
		second.Ack()
	})
}

func TestClosingLetsMessagesInFlightFinish(t *testing.T) {
	onEveryBroker(t, brokerOptions{drain: 20 * time.Second}, func(t *testing.T, b messaging.Broker, reopen func() messaging.Broker) {
		require.NoError(t, b.Bind("e", "q"))
		messages, subscriber := subscribe(t, b, "q")
		require.NoError(t, b.Publish("e", newMessage("1"), newMessage("2"), newMessage("3")))
		first := receive(t, messages)
		closed := make(chan error, 1)
		go func() { closed <- subscriber.Close() }()

		// What is handed out after the close has begun is still a message; what is not handed out is not lost.
		var rest []string
		taken := make(chan struct{})
		go func() {
			defer close(taken)
			for msg := range messages {
				rest = append(rest, msg.UUID)
				msg.Ack()
			}
		}()
		select {
		case <-closed:
			t.Fatal("Close did not wait for the message in flight")
		case <-time.After(200 * time.Millisecond):
		}
		require.NoError(t, first.Context().Err(), "the handler is not cut")
		first.Ack()
		require.NoError(t, <-closed)
		<-taken

		again, _ := subscribe(t, reopen(), "q")
		for len(rest) < 2 {
			msg := receive(t, again)
			require.NotEqual(t, first.UUID, msg.UUID, "what was acked while closing is settled")
			rest = append(rest, msg.UUID)
			msg.Ack()
		}
		receiveNothing(t, again)
	})
}

func TestStuckMessageDoesNotHoldBackTheOthers(t *testing.T) {
	onEveryBroker(t, brokerOptions{drain: 100 * time.Millisecond}, func(t *testing.T, b messaging.Broker, reopen func() messaging.Broker) {
		require.NoError(t, b.Bind("e", "q"))
		messages, subscriber := subscribe(t, b, "q")
		const n = 1000 // several times what is in flight at once
		go func() {
			for i := range n {
				_ = b.Publish("e", newMessage(fmt.Sprint(i)))
			}
		}()
		stuck := receive(t, messages)
		for range n - 1 {
			receive(t, messages).Ack()
		}
		require.NoError(t, subscriber.Close())
		again, _ := subscribe(t, reopen(), "q")
		msg := receive(t, again)
		require.Equal(t, stuck.UUID, msg.UUID, "only the stuck message is left")
		msg.Ack()
		receiveNothing(t, again)
	})
}

func TestMessageDeliveredTooOftenComesOnceMoreAsUndeliverable(t *testing.T) {
	onEveryBroker(t, brokerOptions{deliveryLimit: 3}, func(t *testing.T, b messaging.Broker, _ func() messaging.Broker) {
		require.NoError(t, b.Bind("e", "q"))
		messages, _ := subscribe(t, b, "q")
		sent := newMessage("kills the process")
		require.NoError(t, b.Publish("e", sent))
		for deliveries := 1; ; deliveries++ {
			msg := receive(t, messages)
			require.Equal(t, sent.UUID, msg.UUID)
			require.Equal(t, sent.Payload, msg.Payload)
			if msg.Metadata.Get(app.MetadataUndeliverable) != "" {
				require.Greater(t, deliveries, 3)
				msg.Ack()
				break
			}
			require.LessOrEqual(t, deliveries, 5)
			msg.Nack()
		}
		receiveNothing(t, messages)
	})
}

func TestTenThousandMessagesReachConcurrentConsumers(t *testing.T) {
	onEveryBroker(t, brokerOptions{}, func(t *testing.T, b messaging.Broker, reopen func() messaging.Broker) {
		require.NoError(t, b.Bind("e", "q"))
		total := 10_000
		if raceEnabled {
			total = 2_000
		}
		var mu sync.Mutex
		seen := map[string]int{}
		done := make(chan struct{})
		for _, broker := range []messaging.Broker{b, reopen(), b} {
			messages, _ := subscribe(t, broker, "q")
			go func() {
				for msg := range messages {
					mu.Lock()
					seen[msg.UUID]++
					if len(seen) == total {
						select {
						case <-done:
						default:
							close(done)
						}
					}
					mu.Unlock()
					msg.Ack()
				}
			}()
		}
		var publishers sync.WaitGroup
		for range 20 {
			publishers.Go(func() {
				for range total / 20 {
					if err := b.Publish("e", newMessage("x")); err != nil {
						t.Errorf("publish: %v", err)
						return
					}
				}
			})
		}
		publishers.Wait()
		select {
		case <-done:
		case <-time.After(60 * time.Second):
			mu.Lock()
			defer mu.Unlock()
			t.Fatalf("%d of %d messages came", len(seen), total)
		}
		for id, times := range seen {
			require.Equal(t, 1, times, "without any fault message %s comes once", id)
		}
	})
}

func TestClosedBrokerIsNotReadFrom(t *testing.T) {
	onEveryBroker(t, brokerOptions{}, func(t *testing.T, b messaging.Broker, _ func() messaging.Broker) {
		subscriber := b.Subscriber()
		require.NoError(t, b.Close())
		_, err := subscriber.Subscribe(context.Background(), "q")
		require.Error(t, err)
	})
}

// The process publishes nothing itself, and its database was away when it bound its queue.
func TestQueueThatCouldNotBeBoundIsBoundByWhoReadsIt(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "later", "broker.db")
	b, err := sqlbroker.Open("sqlite:"+file, sqlbroker.Config{}, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = b.Close() })
	require.NoError(t, b.Bind("e", "q"))
	require.Error(t, b.Check())
	_, err = b.Migrate(context.Background()) // makes the directory
	require.NoError(t, err)
	_, err = b.Subscriber().Subscribe(context.Background(), "q")
	require.NoError(t, err)
	eventually(t, "the queue is bound, and the broker in order", func() error {
		if n := count(t, "sqlite:"+file, "SELECT COUNT(*) FROM broker_binding"); n != 1 {
			return fmt.Errorf("%d bindings; %w", n, b.Check())
		}
		return b.Check()
	})
}
