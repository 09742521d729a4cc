//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"

	"takeout/adapters/rabbitmq"
	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/ports/httpapi"
	"takeout/ports/messaging"
	"takeout/tests/testenv"
)

// The benchmarks of the hot paths. Their names stay, so that benchstat can compare two revisions.

const callers = 32 // for each core, as there are when it is busy

var quiet = slog.New(slog.DiscardHandler)

func placedEvent(number int) event.OrderPlaced {
	return event.OrderPlaced{Order: event.Order{
		OrderID: orderID(number), Name: dish, Amount: amount, Currency: currency, Status: "placed", Version: 1,
		PlacedAt: time.Now().UTC().Truncate(time.Microsecond),
	}}
}

func BenchmarkEventEncode(b *testing.B) {
	e := placedEvent(1)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := sqlstore.NewMessage(e, nil); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEventDecode(b *testing.B) {
	msg, err := sqlstore.NewMessage(placedEvent(1), nil)
	require.NoError(b, err)
	b.SetBytes(int64(len(msg.Payload)))
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := event.Decode[event.OrderPlaced](msg.UUID, msg.Payload); err != nil {
			b.Fatal(err)
		}
	}
}

// onBothEngines runs the benchmark on SQLite and on MySQL or MariaDB.
func onBothEngines(b *testing.B, run func(b *testing.B, address func(service string) string)) {
	b.Run("sqlite", func(b *testing.B) {
		dir := b.TempDir()
		run(b, func(service string) string { return "sqlite:" + filepath.Join(dir, service+".db") })
	})
	b.Run("mysql", func(b *testing.B) {
		run(b, func(string) string { return testenv.MySQL(b) })
	})
}

func orderStore(b *testing.B, address string) *sqlstore.Store[app.OrderTx] {
	store, err := sqlstore.OpenOrders(address, nil, quiet)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, store.Close()) })
	_, err = store.Migrate(b.Context())
	require.NoError(b, err)
	return store
}

func dispatchStore(b *testing.B, address string) *sqlstore.Store[app.DispatchTx] {
	store, err := sqlstore.OpenDispatches(address, nil, quiet)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, store.Close()) })
	_, err = store.Migrate(b.Context())
	require.NoError(b, err)
	return store
}

// parallel calls do for each number once, from many goroutines.
func parallel(b *testing.B, do func(ctx context.Context, number int) error) {
	var next atomic.Int64
	b.SetParallelism(callers)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := do(context.Background(), int(next.Add(1))); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.StopTimer()
}

func BenchmarkOutboxInsert(b *testing.B) {
	onBothEngines(b, func(b *testing.B, address func(string) string) {
		store := orderStore(b, address("order"))
		parallel(b, func(ctx context.Context, number int) error {
			return store.InTx(ctx, func(ctx context.Context, tx app.OrderTx) error { return tx.Outbox.Publish(ctx, placedEvent(number)) })
		})
	})
}

func BenchmarkPlaceUseCase(b *testing.B) {
	onBothEngines(b, func(b *testing.B, address func(string) string) {
		orders := app.NewOrders(orderStore(b, address("order")))
		parallel(b, func(ctx context.Context, number int) error { return placeOrder(ctx, orders, number) })
	})
}

func BenchmarkPlaceHTTP(b *testing.B) {
	onBothEngines(b, func(b *testing.B, address func(string) string) {
		handler := httpapi.New(httpapi.Config{
			Orders:  app.NewOrders(orderStore(b, address("order"))),
			Health:  func(context.Context) httpapi.Health { return httpapi.Health{Status: "ready"} },
			Metrics: http.NotFoundHandler(),
		}, quiet)
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(b, err)
		server := httpapi.NewServer(handler, quiet)
		go func() { _ = server.Serve(listener) }()
		defer func() { require.NoError(b, server.Close()) }()
		c := &client{addr: listener.Addr().String()}
		defer c.close()
		parallel(b, c.place)
	})
}

func BenchmarkOutboxClaimAndDelete(b *testing.B) {
	onBothEngines(b, func(b *testing.B, address func(string) string) {
		at := address("order")
		store := orderStore(b, at)
		require.NoError(b, fillOutbox(b.Context(), site{Order: at}, b.N))
		settled := make(chan int, b.N)
		reader := store.Outbox(func(context.Context) error { return nil }, func(acked, _ int) { settled <- acked }, quiet)
		defer func() { require.NoError(b, reader.Close()) }()
		b.ReportAllocs()
		b.ResetTimer()
		messages, err := reader.Subscribe(b.Context(), sqlstore.OutboxTopic)
		require.NoError(b, err)
		go func() {
			for msg := range messages {
				msg.Ack()
			}
		}()
		for n := 0; n < b.N; n += <-settled {
		}
		b.StopTimer()
	})
}

func BenchmarkPublishConfirmed(b *testing.B) {
	broker, err := rabbitmq.Open(testenv.AMQP(b), rabbitmq.Config{}, quiet)
	require.NoError(b, err)
	defer broker.Close()
	require.NoError(b, broker.Bind("order.placed", "dispatch.assign-courier"))
	require.NoError(b, broker.WaitReady(b.Context()))
	parallel(b, func(_ context.Context, number int) error {
		msg, err := sqlstore.NewMessage(placedEvent(number), nil)
		if err != nil {
			return err
		}
		return broker.Publish("order.placed", msg)
	})
}

// nothing is a store whose transactions do nothing.
type nothing[T any] struct{}

func (nothing[T]) InTx(context.Context, func(context.Context, T) error) error { return nil }

func (nothing[T]) View(context.Context, func(context.Context, T) error) error { return nil }

// source is a subscriber of messages that are made for it.
type source struct{ messages chan *message.Message }

func (s source) Subscribe(context.Context, string) (<-chan *message.Message, error) {
	return s.messages, nil
}

func (s source) Close() error { return nil }

// BenchmarkConsumerChain is everything between a delivery and its ack but the transaction.
func BenchmarkConsumerChain(b *testing.B) {
	consumers, err := messaging.NewConsumers(messaging.Acceptance{Horizon: time.Hour}, nil, time.Minute, messaging.NewMetrics(prometheus.NewRegistry()), quiet)
	require.NoError(b, err)
	route := messaging.Topology(app.UseCases{Dispatches: app.NewDispatches(nothing[app.DispatchTx]{}, app.DispatchPolicy{})}, false)[0]
	queue, retries := source{make(chan *message.Message)}, source{make(chan *message.Message)}
	consumers.Add(route, queue, retries, nil)
	ended := make(chan error, 1)
	go func() { ended <- consumers.Run() }()
	<-consumers.Running()
	first, err := sqlstore.NewMessage(placedEvent(1), nil)
	require.NoError(b, err)
	parallel(b, func(_ context.Context, _ int) error {
		msg := message.NewMessage(first.UUID, first.Payload)
		queue.messages <- msg
		select {
		case <-msg.Acked():
			return nil
		case <-msg.Nacked():
			return errors.New("the message was not handled")
		}
	})
	close(queue.messages)
	close(retries.messages)
	require.NoError(b, consumers.Close())
	require.NoError(b, <-ended)
}

func BenchmarkDispatchTransaction(b *testing.B) {
	onBothEngines(b, func(b *testing.B, address func(string) string) {
		dispatches := app.NewDispatches(dispatchStore(b, address("dispatch")), app.DispatchPolicy{})
		id, err := dispatch.ParseCourierID("courier-1")
		require.NoError(b, err)
		courier, err := dispatch.NewCourier(id, "courier", true, 0)
		require.NoError(b, err)
		require.NoError(b, dispatches.AddCourier(b.Context(), courier))
		parallel(b, func(ctx context.Context, number int) error {
			e := placedEvent(number)
			return dispatches.AssignPlaced(app.WithDelivery(ctx, app.Delivery{
				Consumer: "dispatch.assign-courier", EventID: "evt_" + e.OrderID, Hash: sha256.Sum256([]byte(e.OrderID)), OrderID: e.OrderID,
			}), e)
		})
	})
}
