package rabbitmq

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/app"
	"takeout/crashpoint"
)

const (
	// ackDelay is how long the ack of a delivery may wait for others, so that one ack settles them all. A delivery that
	// waits for its ack takes room of the prefetch, and is repeated if this process dies.
	ackDelay = 5 * time.Millisecond
	// ackPart is the part of the prefetch that is acked at once when it is finished.
	ackPart = 8
)

// Why the context of a message ends before the message is settled.
var (
	errLost  = errors.New("the connection that the message came over is lost, and it will be delivered again")
	errDrain = errors.New("the message was not settled in time after its subscription ended")
)

// consumption reads one queue and its dead letters over one channel, in a single goroutine that runs run. Only that
// one touches the fields and the channel.
type consumption struct {
	*subscription
	session *session
	channel *amqp.Channel
	closed  <-chan *amqp.Error
	sources []*source

	messages context.Context // parent of the messages' contexts
	abandon  context.CancelCauseFunc

	ledger   *ledger
	offered  *delivered // what the reader may take next
	inFlight int        // deliveries that the reader has and that are not settled with the broker
	outcomes chan outcome
	held     []hold // nacked deliveries, the oldest first

	late     *time.Timer // for acks that wait
	lateSet  bool
	giveBack *time.Timer // for the first of held
	retry    *time.Timer // for sources without a consumer
	waiting  *backoff
}

// source is one of the two queues of a subscription.
type source struct {
	name       string // on the broker
	dead       bool   // it holds dead letters
	deliveries <-chan amqp.Delivery
}

// delivered is a delivery on its way to the reader.
type delivered struct {
	tag uint64
	msg *message.Message
	end context.CancelFunc
}

// outcome is what the reader did with a delivery.
type outcome struct {
	tag   uint64
	acked bool
}

// hold is a nacked delivery that goes back to its queue later.
type hold struct {
	tag uint64
	due time.Time
}

// consume starts to read the queue.
func (s *subscription) consume(session *session) (*consumption, error) {
	if err := s.topology.declareForReading(session, s.queue); err != nil {
		return nil, err
	}
	ch, err := openChannel(session)
	if err != nil {
		return nil, err
	}
	c := &consumption{
		subscription: s,
		session:      session,
		channel:      ch,
		closed:       ch.NotifyClose(make(chan *amqp.Error, 1)),
		sources: []*source{
			{name: s.topology.name(s.queue)},
			{name: s.topology.deadName(s.queue), dead: true},
		},
		ledger:   newLedger(),
		outcomes: make(chan outcome, s.config.Prefetch),
		late:     stoppedTimer(),
		giveBack: stoppedTimer(),
		retry:    stoppedTimer(),
		waiting:  newBackoff(s.config),
	}
	c.messages, c.abandon = context.WithCancelCause(s.values)
	err = session.call(func() error { return ch.Qos(s.config.Prefetch, 0, false) })
	for _, from := range c.sources {
		if err == nil {
			err = c.start(from)
		}
	}
	if err != nil {
		c.close(errLost)
		return nil, fmt.Errorf("read queue %s: %w", s.topology.name(s.queue), session.reason(err))
	}
	return c, nil
}

func (c *consumption) start(from *source) error {
	return c.session.call(func() (err error) {
		from.deliveries, err = c.channel.Consume(from.name, from.name, false, false, false, false, nil)
		return err
	})
}

// run hands out deliveries and settles them. It returns nil when the subscription has ended and what was in flight
// is settled, and an error when the channel is lost.
func (c *consumption) run() error {
	rebind := time.NewTicker(c.config.RebindEvery)
	defer rebind.Stop()
	for {
		queue, letters := c.sources[0].deliveries, c.sources[1].deliveries
		var out chan<- *message.Message
		var offer *message.Message
		if c.offered != nil {
			queue, letters, out, offer = nil, nil, c.out, c.offered.msg
		}
		select {
		case d, ok := <-queue:
			c.receive(c.sources[0], d, ok)
		case d, ok := <-letters:
			c.receive(c.sources[1], d, ok)
		case out <- offer:
			c.handOut()
		case o := <-c.outcomes:
			c.note(o)
		case <-c.late.C:
			c.ackAll()
		case <-c.giveBack.C:
			c.returnHeld(time.Now())
		case <-c.retry.C:
			c.restart()
		case <-rebind.C:
			c.bindAgain()
		case <-c.reading.Done():
			return c.drain()
		case err := <-c.closed:
			return c.lost(err)
		case <-c.session.dead:
			return c.lost(nil)
		}
	}
}

// bindAgain makes sure that the queue gets its messages. A binding that somebody took away shows nowhere else: as long as
// other queues are bound to the key, nothing comes back to the publishers. If the exchange is gone the channel ends with
// an error, and the next one declares everything.
func (c *consumption) bindAgain() {
	for _, b := range c.topology.bindingsOf(c.queue) {
		if err := c.topology.declareBinding(c.session, c.channel, b); err != nil {
			c.logger.Warn("the queue cannot be bound again", "topic", b.topic, "error", err)
			return
		}
	}
}

// receive prepares a delivery for the reader.
func (c *consumption) receive(from *source, d amqp.Delivery, ok bool) {
	if !ok {
		// The broker ended the consumer, for example because the queue was deleted, or the channel is closed, which
		// run sees next. There is no message here: taking the zero Delivery for one is a classic of AMQP clients.
		from.deliveries = nil
		if !c.channel.IsClosed() {
			c.logger.Warn("the broker ended the consumer, starting another", "source", from.name)
			c.retry.Reset(c.waiting.delay())
		}
		return
	}
	msg, err := Marshaler{}.Unmarshal(d)
	if err != nil { // it never is; the signature is watermill-amqp's
		msg = message.NewMessage(d.MessageId, d.Body)
	}
	if from.dead {
		msg.Metadata[app.MetadataUndeliverable] = undeliverable(d, c.config.DeliveryLimit)
	}
	ctx, end := context.WithCancel(c.messages)
	if d.Redelivered {
		ctx = app.Apart(ctx)
	}
	msg.SetContext(ctx)
	c.offered = &delivered{d.DeliveryTag, msg, end}
}

// handOut watches over the delivery that the reader has just taken.
func (c *consumption) handOut() {
	d, ended, outcomes := c.offered, c.messages.Done(), c.outcomes
	c.offered = nil
	c.inFlight++
	crashpoint.Here("rabbitmq/delivered")
	go func() {
		defer d.end()
		o := outcome{tag: d.tag}
		select {
		case <-d.msg.Acked():
			o.acked = true
		case <-d.msg.Nacked():
		case <-ended:
			return
		}
		select {
		case outcomes <- o:
		case <-ended:
		}
	}()
}

// note records an outcome, with all others that are there, and settles what can be settled.
func (c *consumption) note(o outcome) {
	for more := true; more; {
		if o.acked {
			c.ledger.finish(o.tag)
			c.inFlight--
		} else {
			c.held = append(c.held, hold{o.tag, time.Now().Add(c.config.NackDelay)})
			if len(c.held) == 1 {
				c.giveBack.Reset(c.config.NackDelay)
			}
		}
		select {
		case o = <-c.outcomes:
		default:
			more = false
		}
	}
	c.ackSoon()
}

// Errors of acks and nacks need no handling: they only come from a channel that is closed, and run sees that.

// ackSoon acks many deliveries at once, and few a little later.
func (c *consumption) ackSoon() {
	if c.ledger.waiting > c.config.Prefetch/ackPart {
		c.ackPrefix()
	}
	if c.ledger.waiting > 0 && !c.lateSet {
		c.late.Reset(ackDelay)
		c.lateSet = true
	}
}

func (c *consumption) ackPrefix() {
	if last := c.ledger.prefix(); last != 0 {
		c.ack(last, true)
	}
}

// ackAll acks whatever is finished.
func (c *consumption) ackAll() {
	c.lateSet = false
	c.ackPrefix()
	for _, tag := range c.ledger.stragglers() {
		c.ack(tag, false)
	}
}

func (c *consumption) ack(tag uint64, andThoseBefore bool) {
	crashpoint.Here("rabbitmq/before-ack")
	_ = c.channel.Ack(tag, andThoseBefore)
	crashpoint.Here("rabbitmq/acked")
}

// returnHeld gives the deliveries whose delay is over by now back to the queue.
func (c *consumption) returnHeld(now time.Time) {
	for len(c.held) > 0 && !c.held[0].due.After(now) {
		c.requeue(c.held[0].tag)
		c.held = c.held[1:]
		c.inFlight--
	}
	if len(c.held) > 0 {
		c.giveBack.Reset(c.held[0].due.Sub(now))
	}
	c.ackSoon()
}

func (c *consumption) requeue(tag uint64) {
	_ = c.channel.Nack(tag, false, true)
	c.ledger.settle(tag)
}

// restart starts new consumers where the broker ended them. What is in flight stays so: the channel is the same.
func (c *consumption) restart() {
	err := c.topology.declareForReading(c.session, c.queue)
	for _, from := range c.sources {
		if err == nil && from.deliveries == nil {
			err = c.start(from)
		}
	}
	if err != nil {
		c.logger.Warn("the queue cannot be read, trying again", "error", c.session.reason(err))
		c.retry.Reset(c.waiting.delay())
		return
	}
	c.waiting.reset()
	c.logger.Info("reading the queue again")
}

// drain stops the consumers and waits until what is in flight is settled, or the time is up.
func (c *consumption) drain() error {
	deadline := time.NewTimer(c.config.DrainTimeout)
	defer deadline.Stop()
	for _, from := range c.sources {
		c.stop(from)
	}
	if c.offered != nil {
		c.offered.end()
		c.requeue(c.offered.tag)
		c.offered = nil
	}
	for {
		// There is no hot loop to be afraid of any more.
		c.returnHeld(time.Now().Add(c.config.NackDelay))
		if c.inFlight == 0 {
			c.close(nil)
			return nil
		}
		select {
		case o := <-c.outcomes:
			c.note(o)
		case <-c.late.C:
			c.ackAll()
		case err := <-c.closed:
			return c.lost(err)
		case <-c.session.dead:
			return c.lost(nil)
		case <-deadline.C:
			c.logger.Warn("messages were not settled in time and will be delivered again", "messages", c.inFlight)
			c.close(errDrain)
			return nil
		}
	}
}

// stop ends one consumer and gives back what the reader has not seen of it.
func (c *consumption) stop(from *source) {
	if from.deliveries == nil {
		return
	}
	if err := c.session.call(func() error { return c.channel.Cancel(from.name, false) }); err != nil {
		return // the channel is closed, and so everything has gone back
	}
	for d := range from.deliveries {
		c.requeue(d.DeliveryTag)
	}
}

// close settles what is finished and closes the channel, which returns the rest to the queue.
func (c *consumption) close(cause error) {
	c.ackAll()
	// The answer tells that the acks, which are sent before it, have arrived.
	_ = c.session.call(c.channel.Close)
	c.end(cause)
}

func (c *consumption) lost(err *amqp.Error) error {
	c.end(errLost)
	if err != nil {
		return readable(err)
	}
	return c.session.reason(errors.New("the channel was closed"))
}

// end releases everything. The contexts of messages that are not settled end with cause.
func (c *consumption) end(cause error) {
	if c.offered != nil {
		c.offered.end()
	}
	c.abandon(cause)
	for _, timer := range []*time.Timer{c.late, c.giveBack, c.retry} {
		timer.Stop()
	}
}

func stoppedTimer() *time.Timer {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	return timer
}
