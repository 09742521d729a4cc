package rabbitmq

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"

	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/domain"
)

// deadSuffix marks the queue that keeps what another queue has given up.
const deadSuffix = ".dead"

// binding is one Bind.
type binding struct{ topic, queue string }

// topology is what must exist on the broker before anything is published or read. It only grows.
type topology struct {
	exchange      string
	prefix        string
	deliveryLimit int
	hint          string // what to do when the broker has something else under one of our names

	declaring sync.Mutex // two declarations of one new quorum queue at once can fail each other
	mu        sync.Mutex
	bindings  []binding
}

func newTopology(namespace string, cfg Config) *topology {
	t := &topology{
		exchange:      namespace,
		deliveryLimit: cfg.DeliveryLimit,
		hint:          fmt.Sprintf("delete or correct it; it is tried again at least every %s", cfg.ReconnectMax),
	}
	if namespace != defaultNamespace {
		t.prefix = namespace + "."
	}
	return t
}

// name returns what a queue is called on the broker.
func (t *topology) name(queue string) string { return t.prefix + queue }

// deadName returns what the queue for queue's undeliverable messages is called on the broker.
func (t *topology) deadName(queue string) string { return t.prefix + queue + deadSuffix }

// maxName is the longest name in AMQP, a shortstr. amqp091 breaks the connection over a longer one.
const maxName = 255

func checkTopic(topic string) error {
	if topic == "" || len(topic) > maxName {
		return domain.Errorf(domain.Invalid, "topic_invalid", "a topic has 1 to %d bytes", maxName)
	}
	return nil
}

func (t *topology) checkQueue(queue string) error {
	switch {
	case queue == "" || len(t.deadName(queue)) > maxName:
		return domain.Errorf(domain.Invalid, "queue_invalid", "a queue's name, with %s, has 1 to %d bytes",
			t.deadName(""), maxName)
	case strings.HasPrefix(queue, "amq."):
		return domain.Errorf(domain.Invalid, "queue_invalid", "queue names that begin with amq. are RabbitMQ's own")
	case strings.HasSuffix(queue, deadSuffix):
		return domain.Errorf(domain.Invalid, "queue_invalid", "queue names that end with %s are for "+
			"undeliverable messages, which come from the queue without it", deadSuffix)
	}
	return nil
}

// remember adds a binding to those that are declared on each connection.
func (t *topology) remember(b binding) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !slices.Contains(t.bindings, b) {
		t.bindings = append(t.bindings, b)
	}
}

func (t *topology) remembered() []binding {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.bindings)
}

// declareAll declares the exchange and all bindings.
func (t *topology) declareAll(s *session) error {
	bindings := t.remembered()
	var queues []string
	for _, b := range bindings {
		if !slices.Contains(queues, b.queue) {
			queues = append(queues, b.queue)
		}
	}
	return t.declare(s, queues, bindings)
}

// declare declares the exchange, queues and bindings of them.
func (t *topology) declare(s *session, queues []string, bindings []binding) error {
	t.declaring.Lock()
	defer t.declaring.Unlock()
	ch, err := openChannel(s)
	if err != nil {
		return err
	}
	if ch, err = t.declareExchange(s, ch); err != nil {
		return err
	}
	for _, queue := range queues {
		if ch, err = t.declareQueue(s, ch, queue); err != nil {
			return err
		}
	}
	for _, b := range bindings {
		if err := t.declareBinding(s, ch, b); err != nil {
			return err
		}
	}
	return s.call(ch.Close)
}

// declareForReading declares what a reader of queue needs. It leaves out the other queues: one that is refused must
// not keep the others from being read.
func (t *topology) declareForReading(s *session, queue string) error {
	return t.declare(s, []string{queue}, t.bindingsOf(queue))
}

// bindAgain makes sure that queue gets its messages. A binding that somebody took away shows nowhere else: as long as other
// queues are bound to the key, nothing comes back to the publishers. It does so over a channel of its own, which the broker
// closes if the queue or the exchange is gone.
func (t *topology) bindAgain(s *session, queue string) error {
	ch, err := openChannel(s)
	if err != nil {
		return err
	}
	for _, b := range t.bindingsOf(queue) {
		if err := t.declareBinding(s, ch, b); err != nil {
			return err
		}
	}
	return s.call(ch.Close)
}

func (t *topology) bindingsOf(queue string) []binding {
	return slices.DeleteFunc(t.remembered(), func(b binding) bool { return b.queue != queue })
}

func (t *topology) declareExchange(s *session, ch *amqp.Channel) (*amqp.Channel, error) {
	return t.ensure(s, ch, "exchange "+t.exchange, func(ch *amqp.Channel) error {
		return ch.ExchangeDeclare(t.exchange, amqp.ExchangeTopic, true, false, false, false, nil)
	}, func(ch *amqp.Channel) error {
		return ch.ExchangeDeclarePassive(t.exchange, amqp.ExchangeTopic, true, false, false, false, nil)
	})
}

func (t *topology) declareQueue(s *session, ch *amqp.Channel, queue string) (*amqp.Channel, error) {
	// The dead letter queue comes first, or a message that is given up right now would have nowhere to go.
	name, dead := t.name(queue), t.deadName(queue)
	for _, q := range []struct {
		name      string
		arguments amqp.Table
	}{
		{dead, amqp.Table{
			amqp.QueueTypeArg: amqp.QueueTypeQuorum,
			// As good as none. Without it RabbitMQ 4 would drop a message after 20 deliveries
			// (rabbitmq/rabbitmq-server#11937), and -1, which means none there, is refused by RabbitMQ 3.
			"x-delivery-limit": int64(math.MaxInt32),
		}},
		{name, amqp.Table{
			amqp.QueueTypeArg:           amqp.QueueTypeQuorum,
			"x-delivery-limit":          int64(t.deliveryLimit),
			"x-dead-letter-exchange":    "",
			"x-dead-letter-routing-key": dead,
			"x-dead-letter-strategy":    "at-least-once",
			// At-least-once falls back to at-most-once without it. It has no effect of its own: the queue has
			// no maximum length.
			amqp.QueueOverflowArg: amqp.QueueOverflowRejectPublish,
		}},
	} {
		var err error
		ch, err = t.ensure(s, ch, "queue "+q.name, func(ch *amqp.Channel) error {
			_, err := ch.QueueDeclare(q.name, true, false, false, false, q.arguments)
			return err
		}, func(ch *amqp.Channel) error {
			_, err := ch.QueueDeclarePassive(q.name, true, false, false, false, nil)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return ch, nil
}

// ensure declares something, or, if this user may not, makes sure that it is there: whoever keeps programs from declaring
// has done so himself. It returns the channel to go on with, because a refusal closes the one it came over.
func (t *topology) ensure(s *session, ch *amqp.Channel, what string, declare, find func(*amqp.Channel) error) (*amqp.Channel, error) {
	err := s.call(func() error { return declare(ch) })
	if refusal := refusalOf(err); refusal != nil && refusal.Code == amqp.AccessRefused {
		if ch, err = openChannel(s); err != nil {
			return nil, err
		}
		err = s.call(func() error { return find(ch) })
		if missing := refusalOf(err); missing != nil && missing.Code == amqp.NotFound {
			return nil, fmt.Errorf("%w, and it is not there: declare it, or let this user do so", t.explain(s, what, refusal))
		}
	}
	return ch, t.explain(s, what, err)
}

func (t *topology) declareBinding(s *session, ch *amqp.Channel, b binding) error {
	err := s.call(func() error { return ch.QueueBind(t.name(b.queue), b.topic, t.exchange, false, nil) })
	return t.explain(s, fmt.Sprintf("binding of queue %s to %s", t.name(b.queue), b.topic), err)
}

// explain says what a person has to do about a declaration that failed.
func (t *topology) explain(s *session, what string, err error) error {
	if err == nil {
		return nil
	}
	refusal := refusalOf(err)
	if refusal == nil {
		return fmt.Errorf("declare %s: %w", what, s.reason(err))
	}
	if refusal.Code == amqp.PreconditionFailed {
		return fmt.Errorf("%w: %s exists with other arguments: %s (%s)", ErrRefused, what, t.hint, refusal.Reason)
	}
	return fmt.Errorf("%w: %s: %s", ErrRefused, what, refusal.Reason)
}

// refusalOf returns what the broker itself said, or nil.
func refusalOf(err error) *amqp.Error {
	if refusal, ok := errors.AsType[*amqp.Error](err); ok && refusal.Server {
		return refusal
	}
	return nil
}

func openChannel(s *session) (*amqp.Channel, error) {
	var ch *amqp.Channel
	err := s.call(func() (err error) {
		ch, err = s.conn.Channel()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("open a channel: %w", s.reason(err))
	}
	return ch, nil
}
