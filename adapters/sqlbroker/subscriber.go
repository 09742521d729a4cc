package sqlbroker

import (
	"context"
	"sync"

	"github.com/ThreeDotsLabs/watermill/message"

	"takeout/adapters/sqlqueue"
)

// Subscriber implements messaging.Broker.
func (b *Broker) Subscriber() message.Subscriber { return &subscriber{broker: b} }

type subscriber struct {
	broker *Broker

	mu      sync.Mutex
	readers []*sqlqueue.Reader
	closed  bool
}

func (s *subscriber) Subscribe(ctx context.Context, queue string) (<-chan *message.Message, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	s.broker.mu.Lock()
	defer s.broker.mu.Unlock()
	if s.broker.isClosed {
		return nil, ErrClosed
	}
	cfg := s.broker.cfg
	var handover *sqlqueue.Handover
	if s.broker.db.Engine == "sqlite" {
		handover = &s.broker.handover
	}
	reader := sqlqueue.NewReader(s.broker.db, sqlqueue.Config{
		Table: "broker_message", Handover: handover, Queue: queue, Bell: &s.broker.bell, Poll: sqlqueue.SlowPoll,
		Ready:  s.broker.WaitReady, // a queue that is not bound gets nothing
		Window: cfg.Prefetch, DeliveryLimit: cfg.DeliveryLimit, Drain: cfg.DrainTimeout,
		Backoff: func(int) int64 { return cfg.NackDelay.Microseconds() },
	}, s.broker.logger.With("queue", queue))
	messages, err := reader.Subscribe(ctx, queue)
	if err != nil {
		return nil, err
	}
	s.readers = append(s.readers, reader)
	s.broker.readers = append(s.broker.readers, reader)
	return messages, nil
}

func (s *subscriber) Close() error {
	s.mu.Lock()
	s.closed = true
	readers := s.readers
	s.mu.Unlock()
	closeAll(readers)
	return nil
}
