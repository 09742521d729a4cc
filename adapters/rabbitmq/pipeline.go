package rabbitmq

import (
	"errors"
	"fmt"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/crashpoint"
)

// pipeline is one confirm channel with many messages under way.
//
// The broker confirms what it returns too, and sends the return first. So what has been confirmed is only known to
// be stored after a look at the returns, which their channel has room to hold until then: amqp091 drops a return,
// and with it the message, when nobody takes it in time.
type pipeline struct {
	session  *session
	channel  *amqp.Channel
	exchange string
	timeout  time.Duration
	frameMax int

	window chan struct{} // holds one for each message that is under way
	turn   chan struct{} // holds one while somebody sends

	mu      sync.Mutex
	returns <-chan amqp.Return
	came    map[messageKey]int // returns that nobody has asked for yet
}

// errNacked says that the broker has answered, and does not want the message.
var errNacked = errors.New("it refused the message")

// messageKey is what a return can be recognized by. The same one can be under way more than once.
type messageKey struct{ topic, id string }

// pending is a message that was sent.
type pending struct {
	key     messageKey
	confirm *amqp.DeferredConfirmation
	due     time.Time
}

func openPipeline(s *session, exchange string, cfg Config) (*pipeline, error) {
	ch, err := openChannel(s)
	if err != nil {
		return nil, err
	}
	p := &pipeline{
		session:  s,
		channel:  ch,
		exchange: exchange,
		timeout:  cfg.ConfirmTimeout,
		frameMax: s.conn.Config.FrameSize,
		window:   make(chan struct{}, cfg.PublishWindow),
		turn:     make(chan struct{}, 1),
		returns:  ch.NotifyReturn(make(chan amqp.Return, cfg.PublishWindow)),
		came:     make(map[messageKey]int),
	}
	closed := ch.NotifyClose(make(chan *amqp.Error, 1))
	if err := s.call(func() error { return ch.Confirm(false) }); err != nil {
		return nil, fmt.Errorf("ask for confirms: %w", s.reason(err))
	}
	// A channel that the broker closes, for example because the exchange is gone, takes the whole session along:
	// the next one declares everything again.
	go func() {
		if err, ok := <-closed; ok {
			s.fail(err)
		}
	}()
	return p, nil
}

// hasRoom says whether send would find room in the window.
func (p *pipeline) hasRoom() bool { return len(p.window) < cap(p.window) }

// send sends one message, for which await must be called.
func (p *pipeline) send(topic string, publishing amqp.Publishing, timer *time.Timer) (*pending, error) {
	if p.frameMax > 0 && headerSize(publishing) > p.frameMax {
		return nil, errTooMuchMetadata
	}
	blocked := p.session.blocked()
	timer.Reset(p.timeout)
	if err := p.take(p.window, blocked, timer); err != nil {
		return nil, err
	}
	if err := p.take(p.turn, blocked, timer); err != nil {
		<-p.window
		return nil, err
	}
	confirm, err := p.channel.PublishWithDeferredConfirm(p.exchange, topic, true, false, publishing)
	<-p.turn
	crashpoint.Here("rabbitmq/published")
	if err != nil {
		if !errors.Is(err, amqp.ErrClosed) {
			p.session.fail(err)
		}
		return nil, p.lost()
	}
	return &pending{messageKey{topic, publishing.MessageId}, confirm, time.Now().Add(p.timeout)}, nil
}

// take puts one into room, unless the session ends, the broker is blocked or the time is up first.
func (p *pipeline) take(room chan<- struct{}, blocked <-chan struct{}, timer *time.Timer) error {
	select {
	case <-p.session.dead:
		return p.lost()
	case <-blocked:
		return p.session.blockedOr(ErrBlocked)
	default:
	}
	select {
	case room <- struct{}{}:
		return nil
	case <-p.session.dead:
		return p.lost()
	case <-blocked:
		return p.session.blockedOr(ErrBlocked)
	case <-timer.C:
		return fmt.Errorf("%w anything for %s", ErrNotConfirmed, p.timeout)
	}
}

// await returns nil when the broker has confirmed the message and not returned it.
func (p *pipeline) await(sent *pending, timer *time.Timer) error {
	timer.Reset(time.Until(sent.due))
	select {
	case <-sent.confirm.Done():
		return p.settle(sent)
	default:
	}
	select {
	case <-sent.confirm.Done():
		return p.settle(sent)
	case <-p.session.dead:
		return p.lost()
	case <-p.session.blocked():
		go p.abandon(sent)
		return p.session.blockedOr(ErrBlocked)
	case <-timer.C:
		// Whether the channel hangs or the connection is half open: a new one is the way out.
		p.session.fail(fmt.Errorf("a confirm is overdue by %s", p.timeout))
		return fmt.Errorf("%w within %s", ErrNotConfirmed, p.timeout)
	}
}

// settle reads the fate of a message whose confirm is there.
func (p *pipeline) settle(sent *pending) error {
	returned := p.returned(sent.key)
	<-p.window
	switch {
	case returned:
		return ErrUnroutable
	case sent.confirm.Acked():
		crashpoint.Here("rabbitmq/confirmed")
		return nil
	case p.channel.IsClosed():
		return p.lost() // amqp091 calls everything nacked that was not confirmed before the end
	default:
		return fmt.Errorf("%w: %w", ErrNotConfirmed, errNacked)
	}
}

// abandon waits for the fate of a message that nobody waits for any more. Until then it keeps its place in the
// window, and so its return has room and is not taken for that of a later message.
func (p *pipeline) abandon(sent *pending) {
	select {
	case <-sent.confirm.Done():
		p.returned(sent.key)
		<-p.window
	case <-p.session.dead:
	}
}

// returned says whether the message came back, and forgets one such return.
func (p *pipeline) returned(key messageKey) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.collect()
	if p.came[key] == 0 {
		return false
	}
	if p.came[key]--; p.came[key] == 0 {
		delete(p.came, key)
	}
	return true
}

// collect takes all returns that are there.
func (p *pipeline) collect() {
	for {
		select {
		case r, ok := <-p.returns:
			if !ok {
				p.returns = nil
				return
			}
			p.came[messageKey{r.RoutingKey, r.MessageId}]++
		default:
			return
		}
	}
}

// lost says why the session has ended.
func (p *pipeline) lost() error {
	select {
	case <-p.session.dead:
	case <-time.After(time.Second): // whoever closed the channel knows why, and is about to tell
		p.session.fail(errors.New("the channel was closed"))
	}
	return fmt.Errorf("%w: connection lost: %w", ErrNotConfirmed, p.session.err)
}
