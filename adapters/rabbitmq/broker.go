// Package rabbitmq carries messages between the services over RabbitMQ: what Publish accepted is in every queue
// that is bound to the topic, and what a queue holds is delivered until it is settled.
//
// One Broker has two connections, because a broker that pushes back on publishing would otherwise also keep the
// acks from arriving. link.go keeps a connection alive, topology.go declares what must exist, publisher.go and
// pipeline.go publish, subscriber.go and consumption.go consume, and ledger.go decides which acks to send. gather.go and
// incoming.go stand between amqp091 and the socket.
package rabbitmq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/domain"
)

// What Publish, Check and Subscribe report; errors.Is finds them. They are all of the kind domain.Unavailable:
// the message is not the problem.
var (
	ErrNotConnected error = domain.Errorf(domain.Unavailable, "broker_unreachable", "no connection to the broker is ready")
	ErrBlocked      error = domain.Errorf(domain.Unavailable, "broker_blocked", "the broker takes no messages")
	ErrUnroutable   error = domain.Errorf(domain.Unavailable, "message_unroutable", "no queue is bound to the topic")
	ErrNotConfirmed error = domain.Errorf(domain.Unavailable, "publish_unconfirmed", "the broker did not confirm")
	ErrRefused      error = domain.Errorf(domain.Unavailable, "topology_refused", "the broker refuses a declaration")
	ErrClosed       error = domain.Errorf(domain.Unavailable, "broker_closed", "the broker is closed")
)

// Config tunes a Broker. The zero value of a field means its default.
type Config struct {
	// Prefetch is how many deliveries of one queue a subscription holds unsettled. Undeliverable ones come one by one.
	// Default 200.
	Prefetch int
	// PublishWindow is how many messages may wait for their confirm at once. Default 1000.
	PublishWindow int
	// ConfirmTimeout is how long Publish waits for one confirm. Default 10 s.
	ConfirmTimeout time.Duration
	// DrainTimeout is how long a closed subscription waits for deliveries in flight. Default 20 s.
	DrainTimeout time.Duration
	// DeliveryLimit is how often a message is delivered again before it is called undeliverable. It is part of
	// each queue's arguments: all processes need the same. Default 50.
	DeliveryLimit int
	// Heartbeat is the interval at which both sides prove to be alive; three missed ones end a connection.
	// The URL's heartbeat parameter takes precedence. Default 5 s.
	Heartbeat time.Duration
	// CheckEvery is how often a reader makes sure that its queue is bound. One to whom nothing comes for six times as long
	// begins again. Default 10 s.
	CheckEvery time.Duration
	// ReconnectMax bounds the wait between two attempts, which doubles each time and is then drawn at random from zero
	// up to that, so that processes do not return all at once. Default 10 s.
	ReconnectMax time.Duration
	// NackDelay is how long a nacked message is held before it is delivered again. Default 200 ms.
	NackDelay time.Duration
}

func (c Config) withDefaults() Config {
	return Config{
		Prefetch:       min(positive(c.Prefetch, 200), math.MaxUint16),
		PublishWindow:  positive(c.PublishWindow, 1000),
		ConfirmTimeout: positive(c.ConfirmTimeout, 10*time.Second),
		CheckEvery:     positive(c.CheckEvery, 10*time.Second),
		DrainTimeout:   positive(c.DrainTimeout, 20*time.Second),
		DeliveryLimit:  positive(c.DeliveryLimit, 50),
		Heartbeat:      positive(c.Heartbeat, 5*time.Second),
		ReconnectMax:   positive(c.ReconnectMax, 10*time.Second),
		NackDelay:      positive(c.NackDelay, 200*time.Millisecond),
	}
}

func positive[T int | time.Duration](value, otherwise T) T {
	if value <= 0 {
		return otherwise
	}
	return value
}

// closeWait is how long Close waits for confirms and for deliveries in flight.
const closeWait = 5 * time.Second

// Broker is a connection to RabbitMQ that comes back by itself. It is safe for concurrent use.
type Broker struct {
	config    Config
	logger    *slog.Logger
	topology  *topology
	publisher *publisher
	consuming *link
	running   sync.WaitGroup
	stop      context.CancelFunc
	stopped   <-chan struct{}
	repair    chan struct{} // asks for the topology to be declared again
	closed    chan struct{} // closed when Close has finished

	mu          sync.Mutex
	closing     bool
	subscribers map[*subscriber]struct{}
}

// Open returns a Broker for amqp://user:password@host:port/vhost and starts to connect. It does not wait for the
// broker, and a broker that is away is no error: WaitReady and Check tell. An error means that the URL is wrong,
// and never contains the password.
//
// The URL's parameter namespace names the exchange (default takeout) and, unless it is the default, prefixes the
// queues, so that several installations can share a virtual host. All other parameters are those of amqp091-go.
func Open(rawURL string, cfg Config, logger *slog.Logger) (*Broker, error) {
	address, err := parseAddress(rawURL)
	if err != nil {
		return nil, err
	}
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	cfg = cfg.withDefaults()

	// A broker outlives every request, and ends by Close: there is no caller's context to inherit.
	ctx, stop := context.WithCancel(context.Background())
	b := &Broker{
		config:      cfg,
		logger:      logger,
		topology:    newTopology(address.namespace, cfg, logger),
		stop:        stop,
		stopped:     ctx.Done(),
		repair:      make(chan struct{}, 1),
		closed:      make(chan struct{}),
		subscribers: make(map[*subscriber]struct{}),
	}
	b.publisher = newPublisher(address, cfg, b.topology, b.redeclare, logger)
	b.consuming = newLink("consume", address, cfg, nil, logger)

	b.running.Go(func() { b.publisher.link.run(ctx) })
	b.running.Go(func() { b.consuming.run(ctx) })
	b.running.Go(b.keepTopology)
	return b, nil
}

// Publish sends messages to every queue that is bound to topic, and returns nil when the broker has confirmed them
// all and returned none. It does not wait for a connection: ErrNotConnected and ErrBlocked come at once.
//
// After any error a message may have been stored all the same. Publish is bounded by Config.ConfirmTimeout and does
// not heed the messages' contexts: what is sent cannot be called back, and giving up early only makes duplicates.
func (b *Broker) Publish(topic string, msgs ...*message.Message) error {
	return b.publisher.publish(topic, msgs)
}

// Bind makes the durable queue, and the place for its undeliverable messages, exist and keep what is published to
// topic from then on. Without a connection the binding is remembered, and made before anything is published or read.
// A broker that refuses it is not an error here but in Check, because it can be refused at any later time too.
func (b *Broker) Bind(topic, queue string) error {
	if err := checkTopic(topic); err != nil {
		return fmt.Errorf("bind %s to %s: %w", queue, topic, err)
	}
	if err := b.topology.checkQueue(queue); err != nil {
		return fmt.Errorf("bind %s to %s: %w", queue, topic, err)
	}
	if b.isClosing() {
		return fmt.Errorf("bind %s to %s: %w", queue, topic, ErrClosed)
	}
	b.topology.remember(binding{topic, queue})
	b.declare(func(s *session) error {
		_, err := b.topology.declare(s, queue) // Check tells of a refusal
		return err
	})
	return nil
}

// Subscriber returns a reader of queues, which the topic of its Subscribe names. A queue that is not bound is
// declared all the same.
func (b *Broker) Subscriber() message.Subscriber {
	s := &subscriber{broker: b}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closing {
		s.beginClose()
		return s
	}
	b.subscribers[s] = struct{}{}
	return s
}

// WaitReady returns nil once messages can be published, ErrClosed once they never can, or ctx's error. It does not wait for
// a queue that the broker refuses: the others' messages can be published.
func (b *Broker) WaitReady(ctx context.Context) error {
	for {
		changed := b.publisher.link.watch()
		err := b.ready()
		if err == nil || errors.Is(err, ErrClosed) {
			return err
		}
		select {
		case <-changed:
		case <-b.stopped:
			return ErrClosed
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Check says why messages, or those to a topic, cannot be published right now, nil if all can. RabbitMQ tells a connection
// that it is blocked only when something is published on it, so after a reconnect the first Publish may be what finds out.
func (b *Broker) Check() error {
	if err := b.ready(); err != nil {
		return err
	}
	return b.topology.refusal("")
}

// Reading says for each queue that is subscribed to why it cannot be read right now, nil if it can.
func (b *Broker) Reading() map[string]error {
	b.mu.Lock()
	defer b.mu.Unlock()
	reading := make(map[string]error)
	for s := range b.subscribers {
		for _, sub := range s.all() {
			if sub.reading.Err() == nil {
				reading[sub.queue] = cmp.Or(reading[sub.queue], sub.trouble())
			}
		}
	}
	return reading
}

// MayRead returns nil if this user may read the queues, and the broker's refusal otherwise. A queue that is not there is no
// error. It takes no message: it asks for a consumer that the broker refuses as soon as it has looked whether the user may.
func (b *Broker) MayRead(ctx context.Context, queues ...string) error {
	session, err := b.consuming.wait(ctx)
	if err != nil {
		_, why := b.consuming.current()
		return cmp.Or(why, err)
	}
	for _, queue := range queues {
		for _, name := range []string{b.topology.name(queue), b.topology.deadName(queue)} {
			ch, err := openChannel(session)
			if err != nil {
				return err
			}
			err = session.call(func() error {
				_, err := ch.Consume(name, "", false, false, false, false, amqp.Table{"x-priority": "none"})
				return err
			})
			switch refusal := refusalOf(err); {
			case err == nil:
				err = session.call(ch.Close) // with a consumer that should not be
			case refusal != nil && refusal.Code != amqp.AccessRefused:
				err = nil
			}
			if err != nil {
				return fmt.Errorf("read queue %s: %w", name, session.reason(err))
			}
		}
	}
	return nil
}

// ready says why no message can be published, nil if messages can.
func (b *Broker) ready() error {
	if b.isClosing() {
		return ErrClosed
	}
	s, err := b.publisher.link.current()
	if err != nil {
		return err
	}
	return s.blockedError()
}

// Close refuses new messages, gives confirms and deliveries in flight 5 seconds, and disconnects. Subscribers that
// are still open are closed, and what their readers have not settled by then is delivered again.
func (b *Broker) Close() error {
	b.mu.Lock()
	if b.closing {
		b.mu.Unlock()
		<-b.closed
		return nil
	}
	b.closing = true
	subscribers := b.subscribers
	b.mu.Unlock()
	defer close(b.closed)

	settled := make(chan struct{})
	go func() {
		defer close(settled)
		for s := range subscribers {
			s.beginClose()
		}
		b.publisher.close()
		for s := range subscribers {
			s.running.Wait()
		}
	}()
	select {
	case <-settled:
	case <-time.After(closeWait):
		b.logger.Warn("broker closed with work under way, which will be done again")
	}

	b.stop()
	b.running.Wait()
	<-settled
	return nil
}

func (b *Broker) isClosing() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.closing
}

func (b *Broker) forget(s *subscriber) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closing {
		delete(b.subscribers, s)
	}
}

// redeclare asks for the topology to be declared again; more requests at once are one.
func (b *Broker) redeclare() {
	select {
	case b.repair <- struct{}{}:
	default:
	}
}

// keepTopology serves redeclare, at most once a second: what declaring does not cure, hurrying does not either. It does so
// a little later, and not when other processes do: RabbitMQ 3.10 tells those who read a quorum queue that it was deleted
// 30 ms after it was, and never if it exists again by then; and it can lose a queue that several declare at once. What the
// broker refuses is declared again and again, because nobody tells that it was put right.
func (b *Broker) keepTopology() {
	for {
		select {
		case <-b.repair:
			b.logger.Info("declaring the broker's topology again")
		case <-time.After(b.config.ReconnectMax):
			if b.topology.refusal("") == nil {
				continue
			}
		case <-b.stopped:
			return
		}
		if !sleep(b.stopped, 300*time.Millisecond+rand.N(700*time.Millisecond)) {
			return
		}
		b.declare(b.topology.declareAll)
		if !sleep(b.stopped, time.Second) {
			return
		}
	}
}

// declare runs f on a connection. The consuming one is tried first, because a blocked broker still answers on it. If
// no connection can do it, publishing stops until it has reconnected, which declares everything.
func (b *Broker) declare(f func(*session) error) {
	consuming, _ := b.consuming.current()
	publishing := b.publisher.link.latest()
	var err error
	for _, s := range []*session{consuming, publishing} {
		if s == nil {
			continue
		}
		if err = f(s); err == nil {
			return
		}
	}
	if publishing != nil {
		publishing.fail(err)
	}
}
