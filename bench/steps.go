//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/prometheus/client_golang/prometheus"

	"takeout/adapters/sqlqueue"
	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/ports/messaging"
)

// steps does each step of many orders for itself, in this process and with no broker: so the CPU time of the database
// server and of the program can be told apart by step.
func (b *bench) steps(ctx context.Context) ([]line, error) {
	n := b.sizes(20_000)[0]
	s, drop, err := b.newSite(ctx, "product", false, "--payment-gateway=none")
	if err != nil {
		return nil, err
	}
	defer drop()
	if err := s.prepare(ctx); err != nil {
		return nil, err
	}
	quiet := slog.New(slog.DiscardHandler)
	orders, err := sqlstore.OpenOrders(s.Order, nil, quiet)
	if err != nil {
		return nil, err
	}
	defer orders.Close()
	dispatches, err := sqlstore.OpenDispatches(s.Dispatch, nil, quiet)
	if err != nil {
		return nil, err
	}
	defer dispatches.Close()
	useCases := app.UseCases{
		Orders: app.NewOrders(orders), Dispatches: app.NewDispatches(dispatches, app.DispatchPolicy{}),
		Compensation: app.NewCompensation(orders, n),
	}
	ready, settled := func(context.Context) error { return nil }, func(int, int) {}
	var placed, assigned kept

	var lines []line
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"order.place", func() error { return placeAll(ctx, useCases.Orders, n) }},
		{"relay of the orders", func() error { return relayAll(ctx, orders.Outbox(ready, settled, quiet), &placed, n) }},
		{"dispatch.assign-courier", func() error { return handleAll(ctx, useCases, "dispatch.assign-courier", dispatches, placed.messages) }},
		{"relay of the dispatches", func() error { return relayAll(ctx, dispatches.Outbox(ready, settled, quiet), &assigned, n) }},
		{"order.mark-dispatched", func() error { return handleAll(ctx, useCases, "order.mark-dispatched", orders, assigned.messages) }},
		{"compensation.recreate-order", func() error { return handleAll(ctx, useCases, "compensation.recreate-order", orders, placed.messages) }},
	} {
		processes := b.stack.processes()
		processes["system"] = os.Getpid()
		before, questions := measureUsage(processes), b.questions(ctx)
		if err := step.do(); err != nil {
			return lines, fmt.Errorf("%s: %w", step.name, err)
		}
		used, others := measureUsage(processes).since(before)
		figures := []figure{{"statements", (b.questions(ctx) - questions) / float64(n)}, {"system_µs", used["system"] * 1e6 / float64(n)}}
		if b.mysql != nil {
			figures = append(figures, figure{"mysql_µs", used["mysql"] * 1e6 / float64(n)})
		}
		lines = append(lines, line{step.name, append(figures, figure{"cores_used_by_others", others})})
	}
	return lines, nil
}

func placeAll(ctx context.Context, orders *app.Orders, n int) error {
	for _, answer := range (load{Orders: n, Workers: 64}).run(ctx, func(ctx context.Context, number int) error { return placeOrder(ctx, orders, number) }) {
		if answer.Err != "" {
			return errors.New(answer.Err)
		}
	}
	return nil
}

// relayAll takes n events out of an outbox, and keeps them.
func relayAll(ctx context.Context, outbox *sqlqueue.Reader, into *kept, n int) error {
	relay, err := messaging.NewOutboxRelay("bench", sqlstore.OutboxTopic, outbox, into, time.Second, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- relay.Run() }()
	for into.count() < n && ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	return errors.Join(relay.Close(), <-ended, context.Cause(ctx))
}

// handleAll gives the messages to a queue's consumer.
func handleAll(ctx context.Context, useCases app.UseCases, queue string, failures app.Failures, messages []*message.Message) error {
	consumers, err := messaging.NewConsumers(messaging.Acceptance{Horizon: time.Hour}, nil, time.Second,
		messaging.NewMetrics(prometheus.NewRegistry()), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	routes := messaging.Topology(useCases, false)
	route := routes[slices.IndexFunc(routes, func(r messaging.Route) bool { return r.Queue == queue })]
	from := &canned{messages: messages, nacked: make(chan struct{}, 1)}
	consumers.Add(route, from, &canned{}, failures)
	if err := consumers.Run(); err != nil { // ends when its sources do
		return err
	}
	if len(from.nacked) > 0 {
		return errors.New("a message was not handled")
	}
	return context.Cause(ctx)
}

// canned is a subscriber that delivers messages it has, as many at once as the product takes, and then ends.
type canned struct {
	messages []*message.Message
	nacked   chan struct{}
}

// Subscribe implements message.Subscriber.
func (c *canned) Subscribe(context.Context, string) (<-chan *message.Message, error) {
	out := make(chan *message.Message)
	go func() {
		defer close(out)
		var inFlight sync.WaitGroup
		slots := make(chan struct{}, 200)
		for _, msg := range c.messages {
			slots <- struct{}{}
			msg = msg.Copy()
			out <- msg
			inFlight.Go(func() {
				select {
				case <-msg.Acked():
				case <-msg.Nacked():
					select {
					case c.nacked <- struct{}{}:
					default:
					}
				}
				<-slots
			})
		}
		inFlight.Wait()
	}()
	return out, nil
}

// Close implements message.Subscriber.
func (c *canned) Close() error { return nil }
