//go:build linux

package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"net/url"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill-amqp/v3/pkg/amqp"
	wsql "github.com/ThreeDotsLabs/watermill-sql/v4/pkg/sql"
	"github.com/ThreeDotsLabs/watermill/components/forwarder"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"
)

// stock is Watermill as its documentation and examples set it up: an outbox of the default schema that a forwarder
// publishes from, a durable exchange and queue, confirms, and a router with one handler. It is known to lose an order now
// and then, for the default offsets adapter passes over rows that are committed late; they are counted.
type stock struct {
	orders, dispatches *sql.DB
	topic              string
	logger             watermill.LoggerAdapter
	forwarder          *forwarder.Forwarder
	router             *message.Router
	publisher          *amqp.Publisher
}

const stockOutbox = "orders_outbox"

func startStock(ctx context.Context, s site) (_ system, err error) {
	broker, err := url.Parse(s.Broker)
	if err != nil {
		return nil, err
	}
	w := &stock{topic: broker.Query().Get("namespace") + ".order.placed", logger: watermill.NewStdLogger(false, false)}
	broker.RawQuery = ""
	if w.orders, err = open(s.Order, 0, true); err != nil {
		return nil, err
	}
	if w.dispatches, err = open(s.Dispatch, 0, true); err != nil {
		return nil, err
	}
	if err := errors.Join(create(ctx, w.orders, orderTable), create(ctx, w.dispatches, inboxTable, platoonTable)); err != nil {
		return nil, err
	}
	config := amqp.NewDurablePubSubConfig(broker.String(), amqp.GenerateQueueNameTopicNameWithSuffix("dispatch"))
	config.Publish.ConfirmDelivery = true
	if err := w.consume(ctx, config); err != nil {
		return nil, err
	}
	return w, w.forward(ctx, config)
}

// consume starts the router first, because an exchange without a queue forgets what it is sent.
func (w *stock) consume(ctx context.Context, config amqp.Config) (err error) {
	if w.router, err = message.NewRouter(message.RouterConfig{}, w.logger); err != nil {
		return err
	}
	w.router.AddMiddleware(middleware.Recoverer)
	subscriber, err := amqp.NewSubscriber(config, w.logger)
	if err != nil {
		return err
	}
	w.router.AddConsumerHandler("dispatch", w.topic, subscriber, w.dispatch)
	go func() { _ = w.router.Run(ctx) }()
	<-w.router.Running()
	return nil
}

func (w *stock) forward(ctx context.Context, config amqp.Config) (err error) {
	outbox, err := wsql.NewSubscriber(wsql.BeginnerFromStdSQL(w.orders), wsql.SubscriberConfig{
		SchemaAdapter: wsql.DefaultMySQLSchema{}, OffsetsAdapter: wsql.DefaultMySQLOffsetsAdapter{}, InitializeSchema: true,
	}, w.logger)
	if err != nil {
		return err
	}
	if w.publisher, err = amqp.NewPublisher(config, w.logger); err != nil {
		return err
	}
	if w.forwarder, err = forwarder.NewForwarder(outbox, w.publisher, w.logger, forwarder.Config{ForwarderTopic: stockOutbox}); err != nil {
		return err
	}
	go func() { _ = w.forwarder.Run(ctx) }()
	<-w.forwarder.Running()
	return nil
}

func (w *stock) place(ctx context.Context, number int) error {
	return inTx(ctx, w.orders, func(tx *sql.Tx) error {
		at := time.Now().UTC()
		if err := insert(ctx, tx, insertOrders, orderRow(number, at)); err != nil {
			return err
		}
		table, err := wsql.NewPublisher(wsql.TxFromStdSQL(tx), wsql.PublisherConfig{SchemaAdapter: wsql.DefaultMySQLSchema{}}, w.logger)
		if err != nil {
			return err
		}
		body, err := json.Marshal(announcementOf(number, at))
		if err != nil {
			return err
		}
		return forwarder.NewPublisher(table, forwarder.PublisherConfig{ForwarderTopic: stockOutbox}).
			Publish(w.topic, message.NewMessage(watermill.NewUUID(), body))
	})
}

// dispatch does what an announcement is for. One that came before breaks the inbox' key, and is done.
func (w *stock) dispatch(msg *message.Message) error {
	var a announcement
	if err := json.Unmarshal(msg.Payload, &a); err != nil {
		return err
	}
	ctx, at := msg.Context(), time.Now().UTC()
	return inTx(ctx, w.dispatches, func(tx *sql.Tx) error {
		if err := insert(ctx, tx, insertInbox, inboxRow(assignCourier, a.ID, msg.Payload, at)); err != nil {
			if isDuplicate(err) {
				return nil
			}
			return err
		}
		return insert(ctx, tx, insertPlatoons, platoonRow(a, at))
	})
}

func (w *stock) addr() string { return "" }

func (w *stock) close() error {
	return errors.Join(w.forwarder.Close(), w.router.Close(), w.publisher.Close(), w.orders.Close(), w.dispatches.Close())
}
