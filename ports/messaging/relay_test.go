package messaging

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"
)

// withoutQueue is a broker on which one topic has no queue.
type withoutQueue struct {
	Broker
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

// lines is a log that tells of each of its lines.
type lines chan string

func (l lines) Write(line []byte) (int, error) {
	l <- string(line)
	return len(line), nil
}

// stubborn delivers messages again as often as they come back.
type stubborn struct {
	messages []*message.Message
	back     chan string // uuids of those that came back
}

func (s *stubborn) Subscribe(ctx context.Context, _ string) (<-chan *message.Message, error) {
	out := make(chan *message.Message)
	go func() {
		defer close(out)
		for ctx.Err() == nil {
			for _, first := range s.messages {
				msg := first.Copy()
				select {
				case out <- msg:
				case <-ctx.Done():
					return
				}
				select {
				case <-msg.Nacked():
				case <-ctx.Done():
					return
				}
				select {
				case s.back <- msg.UUID:
				case <-ctx.Done():
					return
				}
			}
		}
	}()
	return out, nil
}

func (s *stubborn) Close() error { return nil }

func TestEventThatCannotBeReadIsNamedOnceAndComesBack(t *testing.T) {
	enveloped := message.NewMessage("evt_3", []byte(`{"destination_topic":"order.cancelled","uuid":"evt_3","payload":"e30=","metadata":{}}`))
	outbox := &stubborn{back: make(chan string), messages: []*message.Message{
		message.NewMessage("evt_1", []byte("canary-of-a-payload")), message.NewMessage("evt_2", nil), enveloped,
	}}
	log := make(lines, 100)
	logger := slog.New(slog.NewTextHandler(log, nil))
	relay, err := NewOutboxRelay("order", "outbox", outbox, &withoutQueue{topic: "order.cancelled"}, time.Second, logger)
	require.NoError(t, err)
	go func() { _ = relay.Run() }()
	for range 3 {
		for _, uuid := range []string{"evt_1", "evt_2", "evt_3"} {
			require.Equal(t, uuid, <-outbox.back)
		}
	}
	require.NoError(t, relay.Close())
	close(log)
	said := map[string]int{}
	for line := range log {
		require.NotContains(t, line, "canary")
		for _, about := range []string{"level=ERROR", "uuid=evt_1", "uuid=evt_2", "evt_3", "topic=order.cancelled"} {
			said[about] += strings.Count(line, about)
		}
	}
	require.Equal(t, map[string]int{"level=ERROR": 2, "uuid=evt_1": 1, "uuid=evt_2": 1, "evt_3": 0, "topic=order.cancelled": 1}, said)
}
