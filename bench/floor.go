//go:build linux

package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	floorBatch  = 100  // rows of a statement, when so many wait
	floorWindow = 1000 // messages that wait for their confirm
	floorRelays = 2    // one reads rows while the other one's are confirmed
)

// floor does the same work with the same promises and no framework: what this machine can do. Orders that wait are
// stored together, rows of the outbox are published together, messages that have come are dispatched together.
type floor struct {
	orders, dispatches *sql.DB
	broker             *amqp.Connection
	consumer           *amqp.Connection
	queues             []string
	batches            batcher
	bell               chan struct{} // rung when rows were committed
}

func startFloor(ctx context.Context, s site) (_ system, err error) {
	address, err := url.Parse(s.Broker)
	if err != nil {
		return nil, err
	}
	f := &floor{bell: make(chan struct{}, floorRelays)}
	for i := range s.Queues {
		f.queues = append(f.queues, fmt.Sprintf("%s.order.placed.%d", address.Query().Get("namespace"), i))
	}
	address.RawQuery = ""
	if f.orders, err = open(s.Order, 32, false); err != nil {
		return nil, err
	}
	if f.dispatches, err = open(s.Dispatch, 32, false); err != nil {
		return nil, err
	}
	if err := errors.Join(create(ctx, f.orders, orderTable, outboxTable), create(ctx, f.dispatches, inboxTable, platoonTable)); err != nil {
		return nil, err
	}
	if f.broker, err = amqp.Dial(address.String()); err != nil {
		return nil, err
	}
	if f.consumer, err = amqp.Dial(address.String()); err != nil {
		return nil, err
	}
	for _, queue := range f.queues {
		if err := f.consume(ctx, queue); err != nil {
			return nil, err
		}
	}
	f.batches = newBatcher(2, func(numbers []int) error { return f.store(ctx, numbers) })
	for range floorRelays {
		if err := f.relay(ctx); err != nil {
			return nil, err
		}
	}
	return f, nil
}

func (f *floor) place(_ context.Context, number int) error { return f.batches.do(number) }

// store stores orders and their announcements.
func (f *floor) store(ctx context.Context, numbers []int) error {
	at := time.Now().UTC()
	orders, announcements, err := rowsOf(numbers, at)
	if err != nil {
		return err
	}
	err = inTx(ctx, f.orders, func(tx *sql.Tx) error {
		return errors.Join(insert(ctx, tx, insertOrders, orders...), insert(ctx, tx, insertOutbox, announcements...))
	})
	ring(f.bell)
	return err
}

// rowsOf returns the rows of orders and of their announcements.
func rowsOf(numbers []int, at time.Time) (orders, announcements [][]any, err error) {
	for _, number := range numbers {
		a := announcementOf(number, at)
		body, err := json.Marshal(a)
		if err != nil {
			return nil, nil, err
		}
		orders = append(orders, orderRow(number, at))
		announcements = append(announcements, []any{a.ID, body, at})
	}
	return orders, announcements, nil
}

// relay publishes what is in the outbox, in the background.
func (f *floor) relay(ctx context.Context) error {
	channel, err := f.broker.Channel()
	if err != nil {
		return err
	}
	if err := channel.Confirm(false); err != nil {
		return err
	}
	returns := channel.NotifyReturn(make(chan amqp.Return, floorWindow))
	go forever("relay", f.bell, func() (int, error) { return f.carry(ctx, channel, returns) })
	return nil
}

// carry publishes some rows and deletes them when all are confirmed. Their locks keep the other relay away.
func (f *floor) carry(ctx context.Context, channel *amqp.Channel, returns <-chan amqp.Return) (carried int, err error) {
	err = inTx(ctx, f.orders, func(tx *sql.Tx) error {
		rows, err := tx.QueryContext(ctx, fmt.Sprintf("SELECT id, uuid, payload FROM outbox ORDER BY id LIMIT %d FOR UPDATE SKIP LOCKED", floorWindow/floorRelays))
		if err != nil {
			return err
		}
		defer rows.Close()
		var ids []any
		var confirms []*amqp.DeferredConfirmation
		for rows.Next() {
			var id int64
			var uuid string
			var payload []byte
			if err := rows.Scan(&id, &uuid, &payload); err != nil {
				return err
			}
			confirm, err := channel.PublishWithDeferredConfirm("", f.queues[id%int64(len(f.queues))], true, false, amqp.Publishing{
				ContentType: "application/json", DeliveryMode: amqp.Persistent, MessageId: uuid, Body: payload,
			})
			if err != nil {
				return err
			}
			ids, confirms = append(ids, id), append(confirms, confirm)
		}
		if err := rows.Err(); err != nil || len(ids) == 0 {
			return err
		}
		rows.Close()
		for _, confirm := range confirms {
			if !confirm.Wait() {
				return errors.New("the broker did not take a message")
			}
		}
		if len(returns) > 0 {
			return errors.New("a message was returned")
		}
		// By the primary key, one row after the other: IN may scan the table, and wait for the other relay's rows.
		_, err = tx.ExecContext(ctx, "DELETE o FROM (SELECT ? AS id"+strings.Repeat(" UNION ALL SELECT ?", len(ids)-1)+
			") d STRAIGHT_JOIN outbox o ON o.id = d.id", ids...)
		carried = len(ids)
		return err
	}, sql.LevelReadCommitted)
	return carried, err
}

// consume dispatches what comes from the queue, in the background.
func (f *floor) consume(ctx context.Context, queue string) error {
	channel, err := f.consumer.Channel()
	if err != nil {
		return err
	}
	if _, err := channel.QueueDeclare(queue, true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
		return err
	}
	if err := channel.Qos(floorWindow, 0, false); err != nil {
		return err
	}
	deliveries, err := channel.Consume(queue, "", false, false, false, false, nil)
	if err != nil {
		return err
	}
	// What comes while a batch is stored waits here. The library hands over one delivery at a time.
	come := make(chan amqp.Delivery, floorWindow)
	go func() {
		defer close(come)
		for delivery := range deliveries {
			come <- delivery
		}
	}()
	go func() {
		for first := range come {
			batch := together(first, come)
			var rows pair
			for _, delivery := range batch {
				if err := rows.add(delivery.Body); err != nil {
					fail("consumer", err)
				}
			}
			err := inTx(ctx, f.dispatches, func(tx *sql.Tx) error { return rows.insert(ctx, tx) })
			if err == nil {
				err = batch[len(batch)-1].Ack(true)
			}
			if err != nil {
				fail("consumer", err)
			}
		}
	}()
	return nil
}

// pair is the rows of the inbox and of platoon that belong together.
type pair struct{ inbox, platoon [][]any }

func (p *pair) add(body []byte) error {
	var a announcement
	if err := json.Unmarshal(body, &a); err != nil {
		return err
	}
	at := time.Now().UTC()
	p.inbox, p.platoon = append(p.inbox, inboxRow(a.ID, body, at)), append(p.platoon, platoonRow(a, at))
	return nil
}

func (p *pair) insert(ctx context.Context, tx *sql.Tx) error {
	return errors.Join(insert(ctx, tx, insertInbox, p.inbox...), insert(ctx, tx, insertPlatoons, p.platoon...))
}

// together returns what has come with the first one, up to a batch.
func together[T any](first T, more <-chan T) []T {
	batch := []T{first}
	for len(batch) < floorBatch {
		select {
		case next, ok := <-more:
			if !ok {
				return batch
			}
			batch = append(batch, next)
		default:
			return batch
		}
	}
	return batch
}

// batcher does together what is asked for at the same time.
type batcher chan request

type request struct {
	number int
	done   chan error
}

// newBatcher returns a batcher that does at most so many batches at once.
func newBatcher(atOnce int, work func(numbers []int) error) batcher {
	b := make(batcher, 4*floorBatch)
	for range atOnce {
		go func() {
			for first := range b {
				batch := together(first, b)
				numbers := make([]int, len(batch))
				for i, r := range batch {
					numbers[i] = r.number
				}
				err := work(numbers)
				for _, r := range batch {
					r.done <- err
				}
			}
		}()
	}
	return b
}

func (b batcher) do(number int) error {
	r := request{number, make(chan error, 1)}
	b <- r
	return <-r.done
}

// forever works, and waits for the bell when there is nothing to do.
func forever(part string, bell <-chan struct{}, work func() (int, error)) {
	for {
		done, err := work()
		if err != nil {
			fail(part, err)
		}
		if done == 0 {
			select {
			case <-bell:
			case <-time.After(50 * time.Millisecond):
			}
		}
	}
}

func ring(bell chan<- struct{}) {
	select {
	case bell <- struct{}{}:
	default:
	}
}

// fail ends a system that has no way to go on.
func fail(part string, err error) {
	slog.Error("a part of the floor failed", "part", part, "error", err)
	os.Exit(1)
}

func (f *floor) addr() string { return "" }

// close leaves everything to the end of the process.
func (f *floor) close() error { return nil }
