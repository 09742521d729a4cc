package rabbitmq

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
)

// subscriber is a group of subscriptions that are closed together.
type subscriber struct {
	broker  *Broker
	running sync.WaitGroup

	mu            sync.Mutex
	closed        bool
	subscriptions []*subscription
}

// Subscribe returns the messages of a queue, undeliverable ones among them, until ctx ends or the subscriber is
// closed; see message.Subscriber. It does not wait for a connection.
//
// Up to Config.Prefetch messages are handed out before the first is settled. A message's context has the values of
// ctx. It ends when the message is settled or no longer can be: its connection is lost, or Config.DrainTimeout has
// passed since the end of the subscription. It does not end with ctx.
func (s *subscriber) Subscribe(ctx context.Context, queue string) (<-chan *message.Message, error) {
	b := s.broker
	if err := b.topology.checkQueue(queue); err != nil {
		return nil, fmt.Errorf("subscribe to %s: %w", queue, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, fmt.Errorf("subscribe to %s: %w", queue, ErrClosed)
	}
	reading, stop := context.WithCancel(ctx)
	sub := &subscription{
		queue:    queue,
		config:   b.config,
		link:     b.consuming,
		topology: b.topology,
		logger:   b.logger.With("queue", b.topology.name(queue)),
		reading:  reading,
		stop:     stop,
		values:   context.WithoutCancel(ctx),
		out:      make(chan *message.Message),
		unread:   errNotBegun,
	}
	s.subscriptions = append(s.subscriptions, sub)
	s.running.Go(func() {
		defer stop()
		sub.run()
	})
	return sub.out, nil
}

// Close ends all subscriptions. It returns when what is in flight is settled, or Config.DrainTimeout has passed,
// and all channels that Subscribe returned are closed.
func (s *subscriber) Close() error {
	s.beginClose()
	s.running.Wait()
	s.broker.forget(s)
	return nil
}

func (s *subscriber) beginClose() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for _, sub := range s.subscriptions {
		sub.stop()
	}
}

// all returns the subscriptions, ended ones among them.
func (s *subscriber) all() []*subscription {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.subscriptions)
}

// errNotBegun is why nothing is read at first.
var errNotBegun = errors.New("reading has not begun yet")

// subscription is one Subscribe. It consumes over one connection after the other.
type subscription struct {
	queue    string
	config   Config
	link     *link
	topology *topology
	logger   *slog.Logger
	reading  context.Context // ends when no more messages are wanted
	stop     context.CancelFunc
	values   context.Context // what the contexts of messages inherit
	out      chan *message.Message

	mu     sync.Mutex
	unread error // why the broker delivers nothing, nil while it would
}

// trouble returns why nothing can be read, nil if it can.
func (s *subscription) trouble() error {
	if _, err := s.link.current(); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unread
}

func (s *subscription) note(unread error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unread = unread
}

func (s *subscription) run() {
	defer close(s.out)
	var draining sync.WaitGroup
	defer draining.Wait()
	wait := newBackoff(s.config)
	logged, again := "", false
	for {
		session, err := s.link.wait(s.reading)
		if err != nil {
			return
		}
		c, err := s.consume(session)
		if err == nil {
			s.note(nil)
			if !again {
				s.logger.Info("reading the queue")
			}
			logged = ""
			began := time.Now()
			err = c.run()
			draining.Go(c.drain)
			if time.Since(began) > s.config.ReconnectMax {
				wait.reset()
			}
		}
		if s.reading.Err() != nil {
			return
		}
		if again = errors.Is(err, errQuiet); again {
			continue // nothing is known to be wrong
		}
		s.note(err)
		if err.Error() != logged && session.alive() { // a lost connection is told by its link
			logged = err.Error()
			s.logger.Warn("the queue cannot be read, trying again", "error", err)
		}
		wait.sleep(s.reading)
	}
}
