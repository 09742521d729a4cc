package messaging

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/components/forwarder"
	"github.com/ThreeDotsLabs/watermill/message"
)

// OutboxRelay carries one outbox's events to the broker: Watermill's forwarder between a reader that takes rows and
// deletes those that were acked, and a broker whose Publish returns when it has confirmed them.
type OutboxRelay struct{ forwarder *forwarder.Forwarder }

// NewOutboxRelay returns a relay of the outbox of that name. topic is what the reader is subscribed to. closeTimeout is
// how long Close waits for messages in flight.
func NewOutboxRelay(name, topic string, outbox message.Subscriber, broker Broker, closeTimeout time.Duration, logger *slog.Logger) (*OutboxRelay, error) {
	logger = logger.With("relay", name)
	report := &reportingPublisher{Publisher: broker, logger: logger, failing: map[string]bool{}, unreadable: map[string]bool{}}
	f, err := forwarder.NewForwarder(outbox, report, watermillLogger(logger),
		forwarder.Config{ForwarderTopic: topic, CloseTimeout: closeTimeout, Middlewares: []message.HandlerMiddleware{report.nameUnreadable}})
	if err != nil {
		return nil, err
	}
	return &OutboxRelay{f}, nil
}

// Run carries events until Close.
func (r *OutboxRelay) Run() error { return r.forwarder.Run(context.Background()) }

// Running is closed when the relay has begun.
func (r *OutboxRelay) Running() <-chan struct{} { return r.forwarder.Running() }

// Close takes no more events and waits for the answers to those that are under way.
func (r *OutboxRelay) Close() error { return r.forwarder.Close() }

// reportingPublisher says once that events of a topic cannot be published, and once that they can again: a broker that
// goes away does so for a thousand events at a time, and a topic without a queue stands beside others that flow.
type reportingPublisher struct {
	message.Publisher
	logger *slog.Logger

	mu         sync.Mutex
	failing    map[string]bool // topics
	unreadable map[string]bool // messages that were named
}

// unpublishedError is of an event that could be read and not be published.
type unpublishedError struct{ error }

func (e unpublishedError) Unwrap() error { return e.error }

// mostNamed is how many unreadable events are named: more of them are one trouble.
const mostNamed = 1000

// nameUnreadable names, once, an event that never comes to Publish because its row holds no envelope.
func (p *reportingPublisher) nameUnreadable(forward message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) ([]*message.Message, error) {
		made, err := forward(msg)
		if _, read := errors.AsType[unpublishedError](err); err == nil || read {
			return made, err
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		if !p.unreadable[msg.UUID] && len(p.unreadable) < mostNamed {
			p.unreadable[msg.UUID] = true
			p.logger.Error("an event in the outbox cannot be read, and stays there until its row is mended or deleted", "uuid", msg.UUID, "error", err)
		}
		return made, err
	}
}

func (p *reportingPublisher) Publish(topic string, messages ...*message.Message) error {
	err := p.Publisher.Publish(topic, messages...)
	p.mu.Lock()
	defer p.mu.Unlock()
	switch failing := err != nil; {
	case failing == p.failing[topic]:
	case failing:
		p.failing[topic] = true
		p.logger.Warn("events cannot be published; they stay in the outbox and are sent again", "topic", topic, "error", err)
	default:
		delete(p.failing, topic)
		p.logger.Info("events are published again", "topic", topic)
	}
	if err != nil {
		return unpublishedError{err}
	}
	return nil
}

// Close does nothing: the broker serves others too.
func (p *reportingPublisher) Close() error { return nil }
