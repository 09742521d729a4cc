package rabbitmq

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"
)

// publisher publishes over a link of its own. Each connection has one pipeline, which ends with it.
type publisher struct {
	link      *link
	config    Config
	topology  *topology
	marshaler Marshaler
	redeclare func()
	logger    *slog.Logger

	mu         sync.Mutex
	closed     bool
	underWay   sync.WaitGroup
	unroutable map[string]bool // topics whose last message was returned
	refused    map[string]*refusal
}

// refusal is a topic of which the broker has taken nothing for a while.
type refusal struct {
	wait time.Duration // how long it may last before a new connection is tried
	due  time.Time
}

// maxRefusal is the longest wait before another connection is tried.
const maxRefusal = 10 * time.Minute

func newPublisher(a address, cfg Config, t *topology, redeclare func(), logger *slog.Logger) *publisher {
	p := &publisher{
		config:     cfg,
		topology:   t,
		redeclare:  redeclare,
		logger:     logger,
		unroutable: make(map[string]bool),
		refused:    make(map[string]*refusal),
	}
	p.link = newLink("publish", a, cfg, p.prepare, logger)
	return p
}

// prepare declares everything before anything can be published on a new connection.
func (p *publisher) prepare(s *session) error {
	if err := p.topology.declareAll(s); err != nil {
		return err
	}
	pipe, err := openPipeline(s, p.topology.exchange, p.config)
	s.pipe = pipe
	return err
}

func (p *publisher) publish(topic string, msgs []*message.Message) error {
	if !p.enter() {
		return ErrClosed
	}
	defer p.underWay.Done()

	// All are marshalled first: a message that cannot be sent must not be found when half of them are out.
	publishings := make([]amqp.Publishing, len(msgs))
	if err := checkTopic(topic); err != nil {
		return fmt.Errorf("publish: %w", err)
	}
	for i, msg := range msgs {
		publishing, err := p.marshaler.Marshal(msg)
		if err != nil {
			return fmt.Errorf("publish %s to %s: %w", msg.UUID, topic, err)
		}
		publishings[i] = publishing
	}
	s, err := p.link.current()
	if err == nil {
		err = p.topology.refusal(topic)
	}
	if err != nil {
		return fmt.Errorf("publish to %s: %w", topic, err)
	}
	err = p.send(s.pipe, topic, publishings)
	p.note(s, topic, err)
	return err
}

// send puts all publishings into the pipeline and returns the first error, after the fate of all of them is known:
// one that the broker confirms after the caller was told to try again would be a duplicate.
func (p *publisher) send(pipe *pipeline, topic string, publishings []amqp.Publishing) error {
	timer := time.NewTimer(p.config.ConfirmTimeout)
	defer timer.Stop()

	var first error
	keep := func(id string, err error) {
		if err != nil && first == nil {
			first = fmt.Errorf("publish %s to %s: %w", id, topic, err)
		}
	}
	var waiting []*pending
	for _, publishing := range publishings {
		// More messages than the window has room for: make room by waiting for the oldest of our own, never for
		// somebody else who may be waiting for us.
		for len(waiting) > 0 && !pipe.hasRoom() {
			keep(waiting[0].key.id, pipe.await(waiting[0], timer))
			waiting = waiting[1:]
		}
		sent, err := pipe.send(topic, publishing, timer)
		if err != nil {
			keep(publishing.MessageId, err)
			break
		}
		waiting = append(waiting, sent)
	}
	for _, sent := range waiting {
		keep(sent.key.id, pipe.await(sent, timer))
	}
	return first
}

// note has the topology declared again after a return, and logs when a topic becomes unroutable. It ends a session on
// which a topic has been refused for long: a channel that was opened while a quorum queue elected its leader keeps to
// the dead one (RabbitMQ 3.10), and refuses everything for that queue until it is closed.
func (p *publisher) note(s *session, topic string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch r := p.refused[topic]; {
	case err == nil:
		delete(p.refused, topic)
	case !errors.Is(err, errNacked):
	case r == nil:
		p.refused[topic] = &refusal{p.config.ConfirmTimeout, time.Now().Add(p.config.ConfirmTimeout)}
	case time.Now().After(r.due):
		s.fail(fmt.Errorf("messages to %s have been refused for %s; trying another connection", topic, r.wait))
		r.wait = min(2*r.wait, maxRefusal)
		r.due = time.Now().Add(r.wait)
	}
	switch {
	case errors.Is(err, ErrUnroutable):
		if !p.unroutable[topic] {
			p.logger.Warn("messages come back because no queue is bound to their topic", "topic", topic)
		}
		p.unroutable[topic] = true
		p.redeclare()
	case err == nil && p.unroutable[topic]:
		delete(p.unroutable, topic)
	}
}

func (p *publisher) enter() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.underWay.Add(1)
	return true
}

// close refuses new messages and waits for those under way.
func (p *publisher) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.underWay.Wait()
}
