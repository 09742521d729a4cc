//go:build linux

package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// bare writes the rows and sends the messages that takeout does, in takeout's own tables, in the way of the floor: what is
// left of takeout's cost when nothing is taken apart, checked, retried or told.
type bare struct {
	*floor
	assigned *carrier
}

const (
	insertBareOutbox = "INSERT INTO outbox (uuid, payload, created_at, event_id, event_key, order_id) VALUES "
	insertBareInbox  = "INSERT INTO inbox (consumer, event_id, body_hash, handled_at, order_id) VALUES "
	keepConfirmed    = "INSERT INTO outbox_confirmed (event_id, event_key, order_id, created_at, confirmed_at) " +
		"SELECT event_id, event_key, order_id, created_at, NOW(6) FROM"
)

func startBare(ctx context.Context, s site) (system, error) {
	f, namespace, err := openFloor(s)
	if err != nil {
		return nil, err
	}
	channel, err := f.broker.Channel()
	if err != nil {
		return nil, err
	}
	exchange := namespace + ".events"
	if err := channel.ExchangeDeclare(exchange, "topic", true, false, false, false, nil); err != nil {
		return nil, err
	}
	b := &bare{floor: f}
	for _, queue := range []struct {
		name, key string
		handle    func(ctx context.Context, consumer string, batch []amqp.Delivery) error
	}{
		{assignCourier, "order.placed", b.assign},
		{"compensation.recreate-order", "order.placed", b.lookFor},
		{"order.mark-dispatched", "dispatch.assigned", b.mark},
	} {
		err := consume(f.consumer, namespace+"."+queue.name, exchange, queue.key,
			func(batch []amqp.Delivery) error { return queue.handle(ctx, queue.name, batch) })
		if err != nil {
			return nil, err
		}
	}
	b.placed = newCarrier(f.orders, f.broker, exchange, func(int64) string { return "order.placed" }, keepConfirmed)
	b.assigned = newCarrier(f.dispatches, f.broker, exchange, func(int64) string { return "dispatch.assigned" }, keepConfirmed)
	b.batches = newBatcher(2, func(numbers []int) error { return b.store(ctx, numbers) })
	if err := b.placed.start(ctx); err != nil {
		return nil, err
	}
	return b, b.assigned.start(ctx)
}

// store stores orders and their announcements.
func (b *bare) store(ctx context.Context, numbers []int) error {
	orders, announcements, err := rowsOf(numbers, time.Now().UTC())
	if err != nil {
		return err
	}
	for i, number := range numbers {
		announcements[i] = append(announcements[i], announcements[i][0], "order.placed", orderID(number))
	}
	err = inTx(ctx, b.orders, func(tx *sql.Tx) error {
		if err := insert(ctx, tx, insertOrders, orders...); err != nil {
			return err
		}
		return insert(ctx, tx, insertBareOutbox, announcements...)
	})
	ring(b.placed.bell)
	return err
}

// assign stores the dispatches of the orders that were announced, and announces them.
func (b *bare) assign(ctx context.Context, consumer string, batch []amqp.Delivery) error {
	at := time.Now().UTC()
	var inbox, platoons, outbox [][]any
	for _, delivery := range batch {
		var a announcement
		if err := json.Unmarshal(delivery.Body, &a); err != nil {
			return err
		}
		platoons = append(platoons, platoonRow(a, at))
		inbox = append(inbox, bareInboxRow(consumer, a, delivery.Body, at))
		a.ID, a.Source, a.Type = "evt_as-"+a.Subject, "/takeout/dispatch", "takeout.dispatch.assigned.v1"
		body, err := json.Marshal(a)
		if err != nil {
			return err
		}
		outbox = append(outbox, []any{a.ID, body, at, a.ID, "dispatch.assigned", a.Subject})
	}
	err := inTx(ctx, b.dispatches, func(tx *sql.Tx) error {
		for _, rows := range []struct {
			into string
			all  [][]any
		}{{insertBareInbox, inbox}, {insertPlatoons, platoons}, {insertBareOutbox, outbox}} {
			if err := insert(ctx, tx, rows.into, rows.all...); err != nil {
				return err
			}
		}
		return nil
	})
	ring(b.assigned.bell)
	return err
}

// mark tells the orders who brings them.
func (b *bare) mark(ctx context.Context, consumer string, batch []amqp.Delivery) error {
	at := time.Now().UTC()
	var inbox [][]any
	args := []any{at}
	for _, delivery := range batch {
		var a announcement
		if err := json.Unmarshal(delivery.Body, &a); err != nil {
			return err
		}
		inbox, args = append(inbox, bareInboxRow(consumer, a, delivery.Body, at)), append(args, a.Subject)
	}
	return inTx(ctx, b.orders, func(tx *sql.Tx) error {
		if err := insert(ctx, tx, insertBareInbox, inbox...); err != nil {
			return err
		}
		result, err := tx.ExecContext(ctx, "UPDATE order_info FORCE INDEX (order_info_orderId) SET status = 'dispatched', "+
			"version = version + 1, courier_id = 'courier-1', assigned_at = ? WHERE orderId IN "+places(len(batch)), args...)
		if err != nil {
			return err
		}
		found, err := result.RowsAffected()
		if err == nil && found != int64(len(batch)) {
			err = fmt.Errorf("%d of %d orders could be marked", found, len(batch))
		}
		return err
	})
}

// lookFor requires that the orders that were announced are stored.
func (b *bare) lookFor(ctx context.Context, _ string, batch []amqp.Delivery) error {
	var ids []any
	for _, delivery := range batch {
		var a announcement
		if err := json.Unmarshal(delivery.Body, &a); err != nil {
			return err
		}
		ids = append(ids, a.Subject)
	}
	var found int
	err := b.orders.QueryRowContext(ctx, "SELECT COUNT(*) FROM order_info FORCE INDEX (order_info_orderId) WHERE orderId IN "+
		places(len(ids)), ids...).Scan(&found)
	if err == nil && found != len(ids) {
		err = fmt.Errorf("%d of %d orders are stored", found, len(ids))
	}
	return err
}

func bareInboxRow(consumer string, a announcement, body []byte, at time.Time) []any {
	return append(inboxRow(consumer, a.ID, body, at), a.Subject)
}

func places(n int) string { return "(?" + strings.Repeat(", ?", n-1) + ")" }
