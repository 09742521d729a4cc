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

// floor dispatches orders with the same promises and no framework, and does nothing else: what this machine can do. Orders that
// wait are stored together, rows of the outbox are published together, messages that have come are dispatched together.
type floor struct {
	orders, dispatches *sql.DB
	broker, consumer   *amqp.Connection
	batches            batcher
	placed             *carrier
}

// openFloor opens the databases and the broker of the site.
func openFloor(s site) (_ *floor, namespace string, err error) {
	address, err := url.Parse(s.Broker)
	if err != nil {
		return nil, "", err
	}
	namespace = address.Query().Get("namespace")
	address.RawQuery = ""
	f := &floor{}
	if f.orders, err = open(s.Order, 32, false); err != nil {
		return nil, "", err
	}
	if f.dispatches, err = open(s.Dispatch, 32, false); err != nil {
		return nil, "", err
	}
	if f.broker, err = amqp.Dial(address.String()); err != nil {
		return nil, "", err
	}
	f.consumer, err = amqp.Dial(address.String())
	return f, namespace, err
}

func startFloor(ctx context.Context, s site) (system, error) {
	f, namespace, err := openFloor(s)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(create(ctx, f.orders, orderTable, outboxTable), create(ctx, f.dispatches, inboxTable, platoonTable)); err != nil {
		return nil, err
	}
	var queues []string
	for i := range s.Queues {
		queues = append(queues, fmt.Sprintf("%s.order.placed.%d", namespace, i))
		if err := consume(f.consumer, queues[i], "", "", func(batch []amqp.Delivery) error { return f.dispatch(ctx, batch) }); err != nil {
			return nil, err
		}
	}
	f.placed = newCarrier(f.orders, f.broker, "", func(id int64) string { return queues[id%int64(len(queues))] }, "")
	f.batches = newBatcher(2, func(numbers []int) error { return f.store(ctx, numbers) })
	return f, f.placed.start(ctx)
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
	ring(f.placed.bell)
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

// dispatch stores the dispatches of the orders that were announced.
func (f *floor) dispatch(ctx context.Context, batch []amqp.Delivery) error {
	var rows pair
	for _, delivery := range batch {
		if err := rows.add(delivery.Body); err != nil {
			return err
		}
	}
	return inTx(ctx, f.dispatches, func(tx *sql.Tx) error { return rows.insert(ctx, tx) })
}

// carrier takes events out of an outbox to the broker.
type carrier struct {
	outbox   *sql.DB
	broker   *amqp.Connection
	exchange string
	key      func(id int64) string // the routing key of the row with that id
	keep     string                // INSERT … SELECT … FROM, of the rows that are deleted then; empty if nothing is kept
	bell     chan struct{}         // rung when rows were committed
}

func newCarrier(outbox *sql.DB, broker *amqp.Connection, exchange string, key func(id int64) string, keep string) *carrier {
	return &carrier{outbox, broker, exchange, key, keep, make(chan struct{}, floorRelays)}
}

// start publishes what is in the outbox, in the background.
func (c *carrier) start(ctx context.Context) error {
	for range floorRelays {
		channel, err := c.broker.Channel()
		if err != nil {
			return err
		}
		if err := channel.Confirm(false); err != nil {
			return err
		}
		returns := channel.NotifyReturn(make(chan amqp.Return, floorWindow))
		go forever("relay", c.bell, func() (int, error) { return c.carry(ctx, channel, returns) })
	}
	return nil
}

// carry publishes some rows and deletes them when all are confirmed. Their locks keep the other relay away.
func (c *carrier) carry(ctx context.Context, channel *amqp.Channel, returns <-chan amqp.Return) (carried int, err error) {
	err = inTx(ctx, c.outbox, func(tx *sql.Tx) error {
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
			confirm, err := channel.PublishWithDeferredConfirm(c.exchange, c.key(id), true, false, amqp.Publishing{
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
		confirmed := "(SELECT ? AS id" + strings.Repeat(" UNION ALL SELECT ?", len(ids)-1) + ") d STRAIGHT_JOIN outbox o ON o.id = d.id"
		if c.keep != "" {
			if _, err := tx.ExecContext(ctx, c.keep+" "+confirmed, ids...); err != nil {
				return err
			}
		}
		_, err = tx.ExecContext(ctx, "DELETE o FROM "+confirmed, ids...)
		carried = len(ids)
		return err
	}, sql.LevelReadCommitted)
	return carried, err
}

// consume has what comes from the queue handled in batches, in the background. If an exchange is given, the queue gets its
// messages with that key.
func consume(broker *amqp.Connection, queue, exchange, key string, handle func(batch []amqp.Delivery) error) error {
	channel, err := broker.Channel()
	if err != nil {
		return err
	}
	if _, err := channel.QueueDeclare(queue, true, false, false, false, amqp.Table{"x-queue-type": "quorum"}); err != nil {
		return err
	}
	if exchange != "" {
		if err := channel.QueueBind(queue, key, exchange, false, nil); err != nil {
			return err
		}
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
			err := handle(batch)
			if err == nil {
				err = batch[len(batch)-1].Ack(true)
			}
			if err != nil {
				fail("consumer of "+queue, err)
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
	p.inbox, p.platoon = append(p.inbox, inboxRow(assignCourier, a.ID, body, at)), append(p.platoon, platoonRow(a, at))
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
