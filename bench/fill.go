//go:build linux

package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/components/forwarder"
	"github.com/ThreeDotsLabs/watermill/message"

	"takeout/adapters/sqlstore"
	"takeout/domain/event"
	"takeout/ports/messaging"
)

// fillBatch is how many rows of the product's tables one statement inserts.
const fillBatch = 500

// kept is a broker that keeps what it is given.
type kept struct {
	messaging.Broker // does nothing else

	mu       sync.Mutex
	messages []*message.Message
}

// Publish implements message.Publisher.
func (k *kept) Publish(_ string, messages ...*message.Message) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.messages = append(k.messages, messages...)
	return nil
}

// Close implements message.Publisher.
func (k *kept) Close() error { return nil }

func (k *kept) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.messages)
}

// fillOutbox stores orders in the product's tables as if they had been placed and not been announced yet.
func fillOutbox(ctx context.Context, s site, n int) error {
	const half = 2 // two at once, for there are two kinds of rows
	parts := make([]func() error, 0, half)
	for part := range half {
		parts = append(parts, func() error {
			db, err := open(s.Order, 1, false)
			if err != nil {
				return err
			}
			defer db.Close()
			for from := part * fillBatch; from < n; from += half * fillBatch {
				if err := storePlaced(ctx, db, from, min(from+fillBatch, n)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return atOnce(parts...)
}

func storePlaced(ctx context.Context, db *sql.DB, from, to int) error {
	var orders, outbox [][]any
	for number := from; number < to; number++ {
		at := time.Now().UTC().Truncate(time.Microsecond)
		placed := event.OrderPlaced{Order: event.Order{
			OrderID: orderID(number), Name: dish, Amount: amount, Currency: currency, Status: "placed", Version: 1, PlacedAt: at,
		}}
		msg, err := sqlstore.NewMessage(placed, nil)
		if err != nil {
			return err
		}
		var k kept
		if err := forwarder.NewPublisher(&k, forwarder.PublisherConfig{ForwarderTopic: sqlstore.OutboxTopic}).Publish(placed.Key(), msg); err != nil {
			return err
		}
		metadata, err := json.Marshal(k.messages[0].Metadata)
		if err != nil {
			return err
		}
		orders = append(orders, orderRow(number, at))
		outbox = append(outbox, []any{k.messages[0].UUID, []byte(k.messages[0].Payload), metadata, at, msg.UUID, placed.Key(), placed.Subject()})
	}
	return inTx(ctx, db, func(tx *sql.Tx) error {
		return errors.Join(insert(ctx, tx, insertOrders, orders...),
			insert(ctx, tx, "INSERT INTO outbox (uuid, payload, metadata, created_at, event_id, event_key, order_id) VALUES ", outbox...))
	})
}

// fillHistory stores orders that were dispatched long ago, five hundred in a minute, as they are after they were compared
// once: with no notes that they changed.
func fillHistory(ctx context.Context, s site, n int) error {
	begin := time.Now().UTC().Truncate(time.Minute).Add(-time.Duration(n/500+60) * time.Minute)
	fill := func(address, statement string, state string) error {
		db, err := open(address, 1, false)
		if err != nil {
			return err
		}
		defer db.Close()
		for from := 0; from < n; from += fillBatch {
			var some [][]any
			for number := from; number < min(from+fillBatch, n); number++ {
				at := begin.Add(time.Duration(number) * time.Minute / 500).Truncate(time.Microsecond)
				some = append(some, []any{fmt.Sprintf("old-%08d", number), dish, amount, currency, 1, at, at.Add(time.Second), state, "courier-1"})
			}
			if err := insert(ctx, db, statement, some...); err != nil {
				return err
			}
		}
		_, err = db.ExecContext(ctx, "DELETE FROM reconcile_dirty")
		return err
	}
	return atOnce(
		func() error {
			return fill(s.Order, "INSERT INTO order_info (orderId, name, order_money, currency, version, placed_at, assigned_at, status, courier_id) VALUES ", "dispatched")
		},
		func() error {
			return fill(s.Dispatch, "INSERT INTO platoon (orderId, name, order_money, currency, order_version, placed_at, assigned_at, state, takeout_userId) VALUES ", "assigned")
		},
	)
}
