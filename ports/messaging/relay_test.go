package messaging

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"
)

// withoutQueue is a broker on which one topic has no queue.
type withoutQueue struct {
	message.Publisher
	topic string
}

func (b *withoutQueue) Publish(topic string, _ ...*message.Message) error {
	if topic == b.topic {
		return errors.New("no queue is bound to the topic")
	}
	return nil
}

func TestTopicThatCannotBePublishedIsToldOnceAlthoughOthersCan(t *testing.T) {
	var log bytes.Buffer
	broker := &withoutQueue{topic: "order.cancelled"}
	p := &reportingPublisher{Publisher: broker, logger: slog.New(slog.NewTextHandler(&log, nil)), failing: map[string]bool{}}
	for range 100 {
		require.Error(t, p.Publish("order.cancelled"))
		require.NoError(t, p.Publish("order.placed"))
	}
	broker.topic = ""
	require.NoError(t, p.Publish("order.cancelled"))
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	require.Len(t, lines, 2)
	require.Contains(t, lines[0], "topic=order.cancelled")
	require.Contains(t, lines[0], "no queue is bound")
	require.Contains(t, lines[1], "published again")
}
