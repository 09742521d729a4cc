package tests

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"takeout/adapters/rabbitmq"
	"takeout/adapters/sqlbroker"
	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain/event"
	"takeout/ports/messaging"
	"takeout/tests/testenv"
)

var silent = slog.New(slog.DiscardHandler)

// carriers are the two ways from an outbox to a consumer.
func carriers(b *testing.B, run func(b *testing.B, outbox string, broker messaging.Broker)) {
	b.Run("embedded", func(b *testing.B) {
		dir := b.TempDir()
		broker, err := sqlbroker.Open("sqlite:"+filepath.Join(dir, "broker.db"), sqlbroker.Config{}, silent)
		require.NoError(b, err)
		b.Cleanup(func() { _ = broker.Close() })
		_, err = broker.Migrate(context.Background())
		require.NoError(b, err)
		run(b, "sqlite:"+filepath.Join(dir, "order.db"), broker)
	})
	b.Run("mysql+amqp", func(b *testing.B) {
		broker, err := rabbitmq.Open(testenv.AMQP(b), rabbitmq.Config{}, silent)
		require.NoError(b, err)
		b.Cleanup(func() { _ = broker.Close() })
		require.NoError(b, broker.WaitReady(context.Background()))
		run(b, testenv.MySQL(b), broker)
	})
}

// perThousand reports the time that this process computed for each thousand events since it is called.
func perThousand(b *testing.B) (report func()) {
	began := computed()
	return func() { b.ReportMetric(float64((computed()-began).Milliseconds())*1000/float64(b.N), "cpu-ms/1000") }
}

func computed() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

func placed(i int) event.OrderPlaced {
	return event.OrderPlaced{Order: event.Order{
		OrderID: fmt.Sprintf("order-%d", i), Name: "Mapo tofu", Amount: 2850, Currency: "CNY", Status: "placed", Version: 1, PlacedAt: time.Now().UTC(),
	}}
}

func BenchmarkRelay(b *testing.B) {
	carriers(b, func(b *testing.B, outbox string, broker messaging.Broker) {
		require.NoError(b, broker.Bind("order.placed", "q"))
		store, err := sqlstore.OpenOrders(outbox, nil, silent)
		require.NoError(b, err)
		b.Cleanup(func() { _ = store.Close() })
		_, err = store.Migrate(context.Background())
		require.NoError(b, err)
		for from := 0; from < b.N; from += 500 {
			require.NoError(b, store.InTx(context.Background(), func(ctx context.Context, tx app.OrderTx) error {
				for i := from; i < min(from+500, b.N); i++ {
					if err := tx.Outbox.Publish(ctx, placed(i)); err != nil {
						return err
					}
				}
				return nil
			}))
		}
		var carried atomic.Int64
		all := make(chan struct{})
		reader := store.Outbox(broker.WaitReady, func(acked, _ int) {
			if carried.Add(int64(acked)) == int64(b.N) {
				close(all)
			}
		}, silent)
		relay, err := messaging.NewOutboxRelay("order", sqlstore.OutboxTopic, reader, broker, 10*time.Second, silent)
		require.NoError(b, err)
		b.ReportAllocs()
		b.ResetTimer()
		report := perThousand(b)
		go func() { _ = relay.Run() }()
		<-all
		report()
		b.StopTimer()
		require.NoError(b, relay.Close())
	})
}

func BenchmarkDeliver(b *testing.B) {
	carriers(b, func(b *testing.B, _ string, broker messaging.Broker) {
		require.NoError(b, broker.Bind("order.placed", "q"))
		messages := make([]*message.Message, 0, b.N)
		for i := range b.N {
			msg, err := sqlstore.NewMessage(placed(i), nil)
			require.NoError(b, err)
			messages = append(messages, msg)
		}
		for from := 0; from < b.N; from += 500 {
			require.NoError(b, broker.Publish("order.placed", messages[from:min(from+500, b.N)]...))
		}
		router, err := message.NewRouter(message.RouterConfig{}, nil)
		require.NoError(b, err)
		var handled atomic.Int64
		all := make(chan struct{})
		router.AddConsumerHandler("q", "q", broker.Subscriber(), func(*message.Message) error {
			if handled.Add(1) == int64(b.N) {
				close(all)
			}
			return nil
		})
		b.ReportAllocs()
		b.ResetTimer()
		report := perThousand(b)
		go func() { _ = router.Run(context.Background()) }()
		<-all
		report()
		b.StopTimer()
		require.NoError(b, router.Close())
	})
}
