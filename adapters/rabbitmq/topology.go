package rabbitmq

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
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
	logger        *slog.Logger

	declaring sync.Mutex // two declarations of one new quorum queue at once can fail each other
	mu        sync.Mutex
	bindings  []binding
	refusals  map[string]error // of queues, when they were declared last
}

func newTopology(namespace string, cfg Config, logger *slog.Logger) *topology {
	t := &topology{
		exchange:      namespace,
		deliveryLimit: cfg.DeliveryLimit,
		logger:        logger,
		refusals:      make(map[string]error),
		hint:          fmt.Sprintf("delete or correct it; it is tried again about every %s", cfg.ReconnectMax),
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

// declareAll declares the exchange and all queues. A queue that the broker refuses is no error: it keeps back what is
// published to its topics, and nothing else.
func (t *topology) declareAll(s *session) error {
	var queues []string
	for _, b := range t.remembered() {
		if !slices.Contains(queues, b.queue) {
			queues = append(queues, b.queue)
		}
	}
	_, err := t.declare(s, queues...)
	return err
}

// declareForReading declares what a reader of queue needs, and leaves out the other queues.
func (t *topology) declareForReading(s *session, queue string) error {
	refusal, err := t.declare(s, queue)
	return cmp.Or(err, refusal)
}

// declare declares the exchange, and queues with their bindings. It goes on behind a queue that the broker refuses, and
// returns the last refusal.
func (t *topology) declare(s *session, queues ...string) (refusal, err error) {
	t.declaring.Lock()
	defer t.declaring.Unlock()
	ch, err := openChannel(s)
	if err != nil {
		return nil, err
	}
	if ch, err = t.declareExchange(s, ch); err != nil {
		return nil, err
	}
	for _, queue := range queues {
		ch, err = t.declareQueue(s, ch, queue)
		if err == nil {
			err = t.bind(s, ch, queue)
		}
		var refused error
		if errors.Is(err, ErrRefused) {
			refused, refusal = err, err
			ch, err = openChannel(s) // the refusal closed it, and was none if it closed the connection
		}
		if err != nil {
			return nil, err
		}
		t.note(queue, refused)
	}
	return refusal, s.call(ch.Close)
}

// bindAgain makes sure that queue gets its messages. A binding that somebody took away shows nowhere else: as long as other
// queues are bound to the key, nothing comes back to the publishers. It does so over a channel of its own, which the broker
// closes if the queue or the exchange is gone.
func (t *topology) bindAgain(s *session, queue string) error {
	ch, err := openChannel(s)
	if err != nil {
		return err
	}
	if err := t.bind(s, ch, queue); err != nil {
		return err
	}
	return s.call(ch.Close)
}

// note keeps why queue was refused, nil if it was not.
func (t *topology) note(queue string, refusal error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	before := t.refusals[queue]
	switch {
	case refusal == nil && before != nil:
		delete(t.refusals, queue)
		t.logger.Info("the broker takes the queue's declaration again", "queue", t.name(queue))
	case refusal != nil:
		t.refusals[queue] = refusal
		if before == nil || before.Error() != refusal.Error() {
			t.logger.Warn("the broker refuses a queue; nothing is published to its topics until it takes it", "queue", t.name(queue), "error", refusal)
		}
	}
}

// refusal returns why a message to topic would not get into all its queues, nil if it would. The empty topic stands for
// all.
func (t *topology) refusal(topic string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.refusals) == 0 {
		return nil
	}
	for _, b := range t.bindings {
		if err := t.refusals[b.queue]; err != nil && (topic == "" || topic == b.topic) {
			return err
		}
	}
	return nil
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

// bind binds queue to its topics.
func (t *topology) bind(s *session, ch *amqp.Channel, queue string) error {
	for _, b := range t.bindingsOf(queue) {
		err := s.call(func() error { return ch.QueueBind(t.name(queue), b.topic, t.exchange, false, nil) })
		if err != nil {
			return t.explain(s, fmt.Sprintf("binding of queue %s to %s", t.name(queue), b.topic), err)
		}
	}
	return nil
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
