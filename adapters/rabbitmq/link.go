package rabbitmq

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	dialTimeout = 5 * time.Second
	// writeTimeout is for one write to the socket; Config.ConfirmTimeout if that is shorter.
	writeTimeout = 5 * time.Second
	// callTimeout bounds a call to the broker that waits for an answer. amqp091 itself would wait for the heartbeat
	// to fail, and without heartbeats for ever.
	callTimeout = 10 * time.Second
	byeTimeout  = 800 * time.Millisecond
)

// link keeps one connection to the broker alive until its run ends.
type link struct {
	use     string // "publish" or "consume"
	address address
	config  Config
	// prepare makes a new connection ready for use. Nobody sees the connection before it has returned nil.
	prepare func(*session) error
	logger  *slog.Logger

	mu      sync.Mutex
	session *session // the newest one, nil before the first
	up      bool     // session is prepared and alive
	err     error    // why it is not
	changed chan struct{}
}

func newLink(use string, a address, cfg Config, prepare func(*session) error, logger *slog.Logger) *link {
	return &link{
		use:     use,
		address: a,
		config:  cfg,
		prepare: prepare,
		logger:  logger.With("connection", use, "broker", a.String()),
		err:     fmt.Errorf("%w yet", ErrNotConnected),
		changed: make(chan struct{}),
	}
}

// run connects, and connects again, until ctx ends.
func (l *link) run(ctx context.Context) {
	wait := newBackoff(l.config)
	logged := ""
	for ctx.Err() == nil {
		s, err := l.connect(ctx)
		if err == nil {
			logged = ""
			l.logger.Info("connected to the broker")
			began := time.Now()
			err = l.attend(ctx, s)
			if time.Since(began) > l.config.ReconnectMax {
				wait.reset()
			}
		}
		if ctx.Err() != nil {
			break
		}
		l.set(false, fmt.Errorf("%w: %w", ErrNotConnected, err))
		if err.Error() != logged {
			logged = err.Error()
			l.logger.Warn("no connection to the broker, trying again", "error", err)
		}
		wait.sleep(ctx)
	}
	l.set(false, ErrClosed)
}

// connect returns a connection that is prepared and visible to all.
func (l *link) connect(ctx context.Context) (*session, error) {
	s, err := dial(ctx, l.address, l.config, l.use, l.changedBlocked)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	l.session = s
	l.mu.Unlock()

	if l.prepare != nil {
		if err := l.prepare(s); err != nil {
			err = s.reason(err)
			s.close()
			return nil, err
		}
	}
	l.set(true, nil)
	return s, nil
}

// attend returns when s has ended, and ends it when ctx does.
func (l *link) attend(ctx context.Context, s *session) error {
	select {
	case <-s.dead:
		return s.err
	case <-ctx.Done():
		l.set(false, ErrClosed)
		s.close()
		return ErrClosed
	}
}

// current returns the connection, or why there is none.
func (l *link) current() (*session, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.up {
		return nil, l.err
	}
	select {
	case <-l.session.dead:
		return nil, fmt.Errorf("%w: %w", ErrNotConnected, l.session.err)
	default:
		return l.session, nil
	}
}

// latest returns the newest connection, which may not be prepared yet or dead, nil before the first.
//
// Bind needs it: a binding remembered after prepare took its list would else be missing on this connection.
func (l *link) latest() *session {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.session
}

// wait returns a connection as soon as there is one, or ctx's error.
func (l *link) wait(ctx context.Context) (*session, error) {
	for {
		changed := l.watch()
		s, err := l.current()
		if err == nil || errors.Is(err, ErrClosed) {
			return s, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// watch returns a channel that is closed at the next change of state.
func (l *link) watch() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.changed
}

func (l *link) set(up bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.up, l.err = up, err
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *link) changedBlocked(reason string, blocked bool) {
	if blocked {
		l.logger.Warn("the broker is blocked", "reason", reason)
	} else {
		l.logger.Info("the broker is no longer blocked")
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.changed)
	l.changed = make(chan struct{})
}

// session is one connection, from its handshake to its end.
type session struct {
	conn *amqp.Connection
	raw  *gatheringConn
	pipe *pipeline // on the connection that publishes

	dead chan struct{} // closed when the session has ended, after which err is set
	once sync.Once
	err  error

	mu            sync.Mutex
	isBlocked     bool
	blockedReason string
	blockedSince  chan struct{} // closed while the broker is blocked
}

func dial(ctx context.Context, a address, cfg Config, use string, changed func(string, bool)) (*session, error) {
	s := &session{dead: make(chan struct{}), blockedSince: make(chan struct{})}
	properties := amqp.NewConnectionProperties()
	properties.SetClientConnectionName("takeout " + use)

	timeout := dialTimeout
	if a.uri.ConnectionTimeout > 0 {
		timeout = time.Duration(a.uri.ConnectionTimeout) * time.Millisecond
	}
	stopWatching := func() bool { return true }
	conn, err := amqp.DialConfig(a.url, amqp.Config{
		Heartbeat:  cfg.Heartbeat,
		Properties: properties,
		Dial: func(network, addr string) (net.Conn, error) {
			dialer := net.Dialer{Timeout: timeout}
			raw, err := dialer.DialContext(ctx, network, addr)
			if err != nil {
				return nil, err
			}
			// The handshakes have no context: without this, closing would wait for a silent server.
			stopWatching = context.AfterFunc(ctx, func() { raw.Close() })
			conn, err := a.secure(ctx, raw, time.Now().Add(timeout))
			if err != nil {
				raw.Close()
				return nil, err
			}
			s.raw = newGatheringConn(conn, min(writeTimeout, cfg.ConfirmTimeout), s.fail)
			return s.raw, nil
		},
	})
	if !stopWatching() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		if s.raw != nil {
			_ = s.raw.Close()
		}
		return nil, readable(err)
	}
	s.raw.in.limit.Store(int64(conn.Config.FrameSize))
	s.conn = conn
	closed := conn.NotifyClose(make(chan *amqp.Error, 1))
	blocked := conn.NotifyBlocked(make(chan amqp.Blocking, 16))
	go s.watch(closed, blocked, changed)
	return s, nil
}

// watch must read blocked until amqp091 closes it: the connection is not read while nobody takes it.
func (s *session) watch(closed <-chan *amqp.Error, blocked <-chan amqp.Blocking, changed func(string, bool)) {
	for blocked != nil {
		select {
		case b, ok := <-blocked:
			if !ok {
				blocked = nil
			} else if s.setBlocked(b.Active, b.Reason) {
				changed(b.Reason, b.Active)
			}
		case err, ok := <-closed:
			if ok {
				// At once, because what follows in amqp091 can wait for a stuck write.
				s.fail(err)
			}
			closed = nil
		}
	}
	s.fail(errors.New("the connection was closed"))
}

func (s *session) setBlocked(blocked bool, reason string) (changed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if blocked == s.isBlocked {
		return false
	}
	s.isBlocked, s.blockedReason = blocked, reason
	if blocked {
		close(s.blockedSince)
	} else {
		s.blockedSince = make(chan struct{})
	}
	return true
}

// blocked returns a channel that is closed as soon as the broker is blocked.
func (s *session) blocked() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.blockedSince
}

// blockedError returns why the broker is blocked, nil if it is not.
func (s *session) blockedError() error { return s.blockedOr(nil) }

// blockedOr returns why the broker is blocked, or otherwise if it no longer is.
func (s *session) blockedOr(otherwise error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.isBlocked {
		return otherwise
	}
	return fmt.Errorf("%w: %s", ErrBlocked, s.blockedReason)
}

// fail ends the session for a reason, of which the first counts. It does not wait for anything: closing the socket
// frees whoever is stuck in amqp091.
func (s *session) fail(reason error) {
	s.once.Do(func() {
		s.err = readable(reason)
		close(s.dead)
		_ = s.raw.Close()
	})
}

// readable returns what is inside an error that amqp091 made of one of the network: "EOF" for
// `Exception (501) Reason: "EOF"`.
func readable(err error) error {
	if wrapped, ok := errors.AsType[*amqp.Error](err); ok && !wrapped.Server {
		return errors.New(wrapped.Reason)
	}
	return err
}

// reason returns why the session ended if it has, and otherwise err: what a call returns after the connection
// broke is only that it is closed.
func (s *session) reason(err error) error {
	select {
	case <-s.dead:
		return s.err
	default:
		return err
	}
}

func (s *session) alive() bool { return s.reason(nil) == nil }

// close says goodbye to the broker if it answers soon, and ends the session.
func (s *session) close() {
	// A blocked broker reads nothing, and a half-open connection answers nothing.
	bye := time.AfterFunc(byeTimeout, func() { _ = s.raw.Close() })
	defer bye.Stop()
	_ = s.conn.Close()
	s.fail(ErrClosed)
}

// call runs f, which waits for the broker's answer, and ends the session if that does not come in time.
func (s *session) call(f func() error) error {
	overdue := time.AfterFunc(callTimeout, func() {
		s.fail(fmt.Errorf("the broker did not answer within %s", callTimeout))
	})
	defer overdue.Stop()
	return f()
}

// backoff is how long to wait before trying again.
type backoff struct {
	max, next time.Duration
}

// firstBackoff is the most that is waited before the second try.
const firstBackoff = 100 * time.Millisecond

func newBackoff(cfg Config) *backoff { return &backoff{cfg.ReconnectMax, firstBackoff} }

func (b *backoff) reset() { b.next = firstBackoff }

// delay returns how long to wait this time: anything up to twice as much as the last time.
func (b *backoff) delay() time.Duration {
	limit := min(b.next, b.max)
	b.next = min(2*limit, b.max)
	return rand.N(limit) + 1
}

func (b *backoff) sleep(ctx context.Context) { sleep(ctx.Done(), b.delay()) }

// sleep waits, and reports false if done is closed before the time is over.
func sleep(done <-chan struct{}, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-done:
		return false
	}
}
