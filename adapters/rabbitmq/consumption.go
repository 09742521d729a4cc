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
	// quietChecks is after how many checks a reader to whom nothing comes begins again over a new channel. RabbitMQ may have
	// forgotten it: when a quorum queue is deleted and declared again at once, 3.10 does not say so to those who read it, and
	// neither delivers to them what comes then nor gives it to others.
	quietChecks = 6
)

// Why run ends although the channel is open.
var (
	errEnded = errors.New("the broker ended the consumer")
	errQuiet = errors.New("nothing comes")
)

// Why the context of a message ends before the message is settled.
var (
	errLost  = errors.New("the connection that the message came over is lost, and it will be delivered again")
	errDrain = errors.New("the message was not settled in time after its subscription ended")
)

// consumption reads one queue and its dead letters over one channel, in a single goroutine that runs run and then drain.
// Only that one touches the fields and the channel.
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

	checked chan error // what came of a check
	busy    bool       // something came since the last check
	quiet   int        // checks in a row between which nothing came
}

// source is one of the two queues of a subscription.
type source struct {
	name       string // on the broker
	dead       bool   // it holds dead letters
	prefetch   int    // how many of its messages may be in flight
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
			{name: s.topology.name(s.queue), prefetch: s.config.Prefetch},
			{name: s.topology.deadName(s.queue), prefetch: 1, dead: true}, // what killed processes may be large
		},
		ledger:   newLedger(),
		outcomes: make(chan outcome, s.config.Prefetch),
		late:     stoppedTimer(),
		giveBack: stoppedTimer(),
		checked:  make(chan error, 1),
	}
	c.messages, c.abandon = context.WithCancelCause(s.values)
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
		if err = c.channel.Qos(from.prefetch, 0, false); err != nil { // for consumers that start from now on
			return err
		}
		from.deliveries, err = c.channel.Consume(from.name, from.name, false, false, false, false, nil)
		return err
	})
}

// run hands out deliveries and settles them. It returns nil when the subscription has ended, and an error when the broker
// delivers no more. What is in flight is left to drain.
func (c *consumption) run() error {
	check := time.NewTimer(c.config.CheckEvery)
	defer check.Stop()
	for {
		queue, letters := c.sources[0].deliveries, c.sources[1].deliveries
		var out chan<- *message.Message
		var offer *message.Message
		if c.offered != nil {
			queue, letters, out, offer = nil, nil, c.out, c.offered.msg
		}
		var err error
		select {
		case d, ok := <-queue:
			err = c.receive(c.sources[0], d, ok)
		case d, ok := <-letters:
			err = c.receive(c.sources[1], d, ok)
		case out <- offer:
			c.handOut()
		case o := <-c.outcomes:
			c.note(o)
		case <-c.late.C:
			c.ackAll()
		case <-c.giveBack.C:
			c.returnHeld(time.Now())
		case <-check.C:
			go func() { c.checked <- c.topology.bindAgain(c.session, c.queue) }()
		case err = <-c.checked:
			check.Reset(c.config.CheckEvery)
			if err == nil && c.isQuiet() {
				err = errQuiet
			}
		case <-c.reading.Done():
			return nil
		case closed := <-c.closed:
			return c.reason(closed)
		case <-c.session.dead:
			return c.session.err
		}
		if err != nil {
			return err
		}
	}
}

// reason returns why the channel ended.
func (c *consumption) reason(closed *amqp.Error) error {
	if closed == nil {
		return c.session.reason(errors.New("the channel was closed"))
	}
	return readable(closed)
}

// isQuiet reports whether nothing has come for quietChecks.
func (c *consumption) isQuiet() bool {
	c.quiet++
	if c.busy || c.inFlight > 0 || c.offered != nil {
		c.busy, c.quiet = false, 0
	}
	return c.quiet == quietChecks
}

// receive prepares a delivery for the reader.
func (c *consumption) receive(from *source, d amqp.Delivery, ok bool) error {
	if !ok {
		// The broker ended the consumer, for example because the queue was deleted, or the channel is closed, which
		// run sees next. There is no message here: taking the zero Delivery for one is a classic of AMQP clients.
		from.deliveries = nil
		if c.channel.IsClosed() {
			return nil
		}
		return errEnded
	}
	c.busy = true
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
	return nil
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
	if len(c.ledger.unsent) > c.config.Prefetch/ackPart {
		c.ackPrefix()
	}
	if len(c.ledger.unsent) > 0 && !c.lateSet {
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
		c.returnFailed(c.held[0].tag)
		c.held = c.held[1:]
		c.inFlight--
	}
	if len(c.held) > 0 {
		c.giveBack.Reset(c.held[0].due.Sub(now))
	}
	c.ackSoon()
}

// returnFailed gives back a delivery whose handling failed. From 4.3 on RabbitMQ counts basic.reject against the delivery limit and
// not basic.nack; before, it counted both.
func (c *consumption) returnFailed(tag uint64) {
	_ = c.channel.Reject(tag, true)
	c.ledger.settle(tag)
}

// returnUnseen gives back a delivery that the reader has not seen.
func (c *consumption) returnUnseen(tag uint64) {
	_ = c.channel.Nack(tag, false, true)
	c.ledger.settle(tag)
}

// drain stops the consumers and waits until what is in flight is settled or the channel is lost; once the subscription has
// ended, no longer than Config.DrainTimeout. Meanwhile another consumption may read the queue, over a channel of its own:
// over the same one, the ack of a message whose queue was deleted could settle one of the queue that followed it.
func (c *consumption) drain() {
	for _, from := range c.sources {
		c.stop(from)
	}
	if c.offered != nil {
		c.offered.end()
		c.returnUnseen(c.offered.tag)
		c.offered = nil
	}
	ending := c.reading.Done()
	deadline := stoppedTimer()
	defer deadline.Stop()
	for {
		// Without delay: this consumer gets nothing more, so what it returns cannot come straight back.
		c.returnHeld(time.Now().Add(c.config.NackDelay))
		if c.inFlight == 0 {
			c.close(nil)
			return
		}
		select {
		case o := <-c.outcomes:
			c.note(o)
		case <-c.late.C:
			c.ackAll()
		case closed := <-c.closed:
			c.logger.Debug("messages in flight will be delivered again", "messages", c.inFlight, "error", c.reason(closed))
			c.end(errLost)
			return
		case <-c.session.dead:
			c.end(errLost)
			return
		case <-ending:
			ending = nil
			deadline.Reset(c.config.DrainTimeout)
		case <-deadline.C:
			c.logger.Warn("messages were not settled in time and will be delivered again", "messages", c.inFlight)
			c.close(errDrain)
			return
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
		c.returnUnseen(d.DeliveryTag)
	}
}

// close settles what is finished and closes the channel, which returns the rest to the queue.
func (c *consumption) close(cause error) {
	c.ackAll()
	// The answer tells that the acks, which are sent before it, have arrived.
	_ = c.session.call(c.channel.Close)
	c.end(cause)
}

// end releases everything. The contexts of messages that are not settled end with cause.
func (c *consumption) end(cause error) {
	c.abandon(cause)
	for _, timer := range []*time.Timer{c.late, c.giveBack} {
		timer.Stop()
	}
}

func stoppedTimer() *time.Timer {
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	return timer
}
