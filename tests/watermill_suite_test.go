package tests

import (
	"context"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/pubsub/tests"
	"github.com/stretchr/testify/require"

	"takeout/adapters/sqlbroker"
	"takeout/tests/testenv"
)

// The RabbitMQ adapter's run of the suite is beside it, in adapters/rabbitmq.
func TestSQLBrokerPassesWatermillsSuite(t *testing.T) {
	t.Parallel()
	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		watermillSuite(t, "sqlite:"+filepath.Join(t.TempDir(), "broker.db"))
	})
	t.Run("sql on mysql", func(t *testing.T) {
		t.Parallel()
		watermillSuite(t, testenv.MySQL(t))
	})
}

func watermillSuite(t *testing.T, place string) {
	open := func(t *testing.T) *sqlbroker.Broker {
		b, err := sqlbroker.Open(place, sqlbroker.Config{NackDelay: time.Millisecond, DrainTimeout: 200 * time.Millisecond}, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		_, err = b.Migrate(context.Background())
		require.NoError(t, err)
		t.Cleanup(func() { _ = b.Close() })
		return b
	}
	// The suite closes publishers and goes on with their subscribers, so each has a broker of its own.
	pair := func(t *testing.T, group string) (message.Publisher, message.Subscriber) {
		b := open(t)
		return open(t), groupSubscriber{b.Subscriber(), b, group}
	}
	tests.TestPubSub(t, tests.Features{
		ConsumerGroups:                      true,
		ExactlyOnceDelivery:                 false,
		GuaranteedOrder:                     false,
		GuaranteedOrderWithSingleSubscriber: false,
		Persistent:                          true,
		ForceShort:                          true,
	}, func(t *testing.T) (message.Publisher, message.Subscriber) {
		return pair(t, "group")
	}, pair)
}

// groupSubscriber gives each consumer group its queue, which is what a group is here.
type groupSubscriber struct {
	message.Subscriber
	broker *sqlbroker.Broker
	group  string
}

func (s groupSubscriber) Subscribe(ctx context.Context, topic string) (<-chan *message.Message, error) {
	if err := s.SubscribeInitialize(topic); err != nil {
		return nil, err
	}
	return s.Subscriber.Subscribe(ctx, s.group+"."+topic)
}

func (s groupSubscriber) SubscribeInitialize(topic string) error {
	return s.broker.Bind(topic, s.group+"."+topic)
}
