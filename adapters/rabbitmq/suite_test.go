package rabbitmq_test

import (
	"context"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/pubsub/tests"

	"takeout/adapters/rabbitmq"
	"takeout/tests/testenv"
)

// groupSubscriber makes of a broker what Watermill's suite tests: each group has its own queue of a topic.
type groupSubscriber struct {
	message.Subscriber
	broker *rabbitmq.Broker
	group  string
}

func (s groupSubscriber) SubscribeInitialize(topic string) error {
	return s.broker.Bind(topic, s.group+"."+topic)
}

func (s groupSubscriber) Subscribe(ctx context.Context, topic string) (<-chan *message.Message, error) {
	if err := s.SubscribeInitialize(topic); err != nil {
		return nil, err
	}
	return s.Subscriber.Subscribe(ctx, s.group+"."+topic)
}

func TestWatermillSuite(t *testing.T) {
	rawURL := testenv.AMQP(t)
	reading := openReady(t, rawURL, rabbitmq.Config{DrainTimeout: time.Second})
	constructor := func(t *testing.T, group string) (message.Publisher, message.Subscriber) {
		// The suite closes publishers early, and a broker with them.
		publishing := openReady(t, rawURL, rabbitmq.Config{})
		return publishing, groupSubscriber{reading.Subscriber(), reading, group}
	}
	tests.TestPubSub(t,
		tests.Features{ConsumerGroups: true, Persistent: true},
		func(t *testing.T) (message.Publisher, message.Subscriber) { return constructor(t, "group") },
		constructor,
	)
}
