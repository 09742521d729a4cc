package messaging

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/message/router/middleware"

	"takeout/app"
	"takeout/crashpoint"
	"takeout/domain"
	"takeout/domain/event"
)

const (
	// immediateTries is how often a message is tried in a row before it waits for longer.
	immediateTries = 4
	// firstRetry is the time before the second try. Each further one comes after twice the time, and each after a
	// random part of it, so that messages which failed together do not fail together again.
	firstRetry = 100 * time.Millisecond
	// longestPause is the most that a consumer waits before it tries whether what was away is back.
	longestPause = 5 * time.Second
	// longestDelayed is the size in bytes of the longest message that is delayed. A longer one is kept at once, in
	// parts: a server may refuse a statement that holds it whole, in which some bytes need twice their room.
	longestDelayed = 256 << 10
)

// Consumers runs the routes of this process.
type Consumers struct {
	router   *message.Router
	accept   Acceptance
	stopping chan struct{}
	closing  sync.Once
	delays   []time.Duration
	metrics  *Metrics
	logger   *slog.Logger
	all      []*consumer
	large    chan struct{} // has room for one long message that is being kept
}

// NewConsumers returns an empty set of consumers of the events that are accepted. delays are the times after which a
// message that failed is tried again. closeTimeout is how long Close waits for messages in flight.
func NewConsumers(accept Acceptance, delays []time.Duration, closeTimeout time.Duration, metrics *Metrics, logger *slog.Logger) (*Consumers, error) {
	router, err := message.NewRouter(message.RouterConfig{CloseTimeout: closeTimeout}, watermillLogger(logger))
	if err != nil {
		return nil, err
	}
	return &Consumers{
		router: router, accept: accept, stopping: make(chan struct{}), delays: delays, metrics: metrics, logger: logger,
		large: make(chan struct{}, 1),
	}, nil
}

// Add makes the route's queue feed its use case. What the use case cannot handle goes to failures and comes again from
// retries, both in the database that the use case writes to: while that is away nothing can be kept, and nothing needs
// to be.
func (c *Consumers) Add(route Route, queue, retries message.Subscriber, failures app.Failures) {
	consumer := &consumer{
		Consumers: c, route: route, failures: failures,
		logger: c.logger.With("handler", route.Queue),
	}
	consumer.pause.logger = consumer.logger
	c.all = append(c.all, consumer)
	consumer.from(route.Queue, queue)
	consumer.from(route.Queue+" (retries)", retries)
}

// from makes the consumer handle what comes from one of its two sources.
func (c *consumer) from(name string, source message.Subscriber) {
	handler := c.router.AddConsumerHandler(name, c.route.Queue, source, func(msg *message.Message) error {
		return c.route.handle(msg, c.route.Queue, c.accept)
	})
	handler.AddMiddleware(c.middlewares()...)
}

// middlewares are what is around the use case, from the outside to the inside.
func (c *consumer) middlewares() []message.HandlerMiddleware {
	return []message.HandlerMiddleware{
		c.conclude,           // gave up: it comes again later, or is kept for a person
		c.retry,              // what may pass: try again, or wait
		middleware.Recoverer, // a panic is an error like any other
		c.deduplicate,        // done before is done; the transaction decides, by its inbox row
	}
}

// Run handles messages until Close.
func (c *Consumers) Run() error {
	// The context of Run would stop everything at once and in no order.
	return c.router.Run(context.Background())
}

// Running is closed when the consumers have begun.
func (c *Consumers) Running() <-chan struct{} { return c.router.Running() }

// Paused returns why consumers hold their messages back, by queue.
func (c *Consumers) Paused() map[string]string {
	paused := map[string]string{}
	for _, consumer := range c.all {
		if cause := consumer.pause.cause(); cause != "" {
			paused[consumer.route.Queue] = cause
		}
	}
	return paused
}

// Close takes no new messages, lets those in flight finish, and gives back those that wait for a better time.
func (c *Consumers) Close() error {
	c.closing.Do(func() { close(c.stopping) })
	select {
	case <-c.router.Running():
		return c.router.Close()
	default: // a router that never ran would wait for its handlers until the time is up
		return nil
	}
}

// consumer is one route at work.
type consumer struct {
	*Consumers
	route    Route
	failures app.Failures
	pause    pause
	copies   copies
	logger   *slog.Logger
}

// handler decodes a message and, if it is accepted, calls the use case with what it says. That a message takes effect
// once is the use case's transaction's doing: the context tells it which delivery it is.
func handler[E event.Event](useCase func(context.Context, E) error) func(*message.Message, string, Acceptance) error {
	return func(msg *message.Message, queue string, accept Acceptance) error {
		if err := accept.signed(msg); err != nil {
			return err
		}
		envelope, e, err := event.Decode[E](msg.UUID, msg.Payload)
		if err != nil {
			return err
		}
		if err := accept.timely(envelope.Time); err != nil {
			return err
		}
		msg.SetContext(app.WithDelivery(msg.Context(), app.Delivery{
			Consumer: queue, EventID: envelope.ID, Hash: sha256.Sum256(msg.Payload), OrderID: envelope.Subject,
		}))
		return useCase(msg.Context(), e)
	}
}

// deduplicate settles a message that was handled before. It remembers nothing itself, because only the transaction
// that does the work can remember it reliably: a mark set before loses the message when the work fails, and one set
// after it can be missing. Only a message that comes while its copy is being handled shares that one's end, unless it
// failed.
func (c *consumer) deduplicate(next message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) ([]*message.Message, error) {
		began := time.Now()
		duplicate, err := c.handleOnce(msg, next)
		if err != nil {
			return nil, err
		}
		c.metrics.handled(c.route.Queue, duplicate, time.Since(began))
		if c.logger.Enabled(msg.Context(), slog.LevelDebug) {
			c.logger.Debug("event handled", c.about(msg, "duplicate", duplicate, "took", time.Since(began).String())...)
		}
		return nil, nil
	}
}

// handleOnce handles the message, or waits until its copy is handled.
func (c *consumer) handleOnce(msg *message.Message, next message.HandlerFunc) (duplicate bool, err error) {
	for {
		of, end := c.copies.begin(msg)
		if of == nil {
			settled := false // a panic is no end
			defer func() { end(settled) }()
			if _, err = next(msg); errors.Is(err, app.ErrDuplicate) {
				duplicate, err = true, nil
			}
			settled = err == nil
			return duplicate, err
		}
		select {
		case <-of.over:
		case <-msg.Context().Done():
			return false, msg.Context().Err()
		}
		if of.settled {
			return true, nil
		}
	}
}

// givenUp is an error after which a message is not tried again.
type givenUp struct {
	error
	class    class
	attempts int
}

func (e givenUp) Unwrap() error { return e.error }

// retry tries a message until it is handled, cannot be, or the consumer stops.
func (c *consumer) retry(next message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) ([]*message.Message, error) {
		for attempt := 1; ; {
			if err := c.pause.wait(c.stopping); err != nil {
				return nil, err
			}
			_, err := next(msg)
			class := classify(err)
			if class != done {
				msg.SetContext(app.Apart(msg.Context()))
			}
			if class != infrastructure {
				c.pause.over()
			}
			switch class {
			case done:
				return nil, nil
			case shutdown:
				return nil, err
			case permanent:
				return nil, givenUp{err, class, attempt}
			case infrastructure:
				c.pause.begin(err)
				continue
			}
			if attempt == immediateTries {
				return nil, givenUp{err, class, attempt}
			}
			c.logger.Warn("an attempt failed and is repeated", c.about(msg, "attempt", attempt, "error", brief(err))...)
			if !sleep(c.stopping, jitter(firstRetry<<(attempt-1))) {
				return nil, errStopping
			}
			attempt++
		}
	}
}

// conclude stores what becomes of a message after its tries, and only then lets it be acked.
func (c *consumer) conclude(next message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) ([]*message.Message, error) {
		err := deliverable(msg)
		if err == nil {
			_, err = next(msg)
		}
		if gaveUp, ok := errors.AsType[givenUp](err); ok {
			return nil, c.putAside(msg, c.failure(msg, gaveUp))
		}
		if id := app.RetryFrom(msg.Context()).FailureID; err == nil && id != 0 {
			err = c.store(msg, func(ctx context.Context) error { return c.failures.Resolve(ctx, id) })
		}
		return nil, err
	}
}

// deliverable returns an error if the message was delivered too often already to be tried once more.
func deliverable(msg *message.Message) error {
	reason := msg.Metadata.Get(app.MetadataUndeliverable)
	if reason == "" {
		return nil
	}
	return givenUp{domain.Errorf(domain.Unknown, "delivery_limit", "%s", reason), undeliverable, 0}
}

// putAside makes a message come again later, or keeps it for a person.
func (c *consumer) putAside(msg *message.Message, f app.Failure) error {
	about := c.about(msg, "class", f.Class, "attempts", f.Attempts, "error", f.Error)
	if tier := f.Retry.Tier + 1; c.delayable(f, tier) {
		after := c.delays[tier-1]
		err := c.store(msg, func(ctx context.Context) error { return c.failures.Delay(ctx, f, tier, after) })
		if err == nil {
			crashpoint.Here("consumer/delayed")
			c.metrics.delayed(c.route.Queue, tier)
			c.logger.Warn("a message failed and is tried again later", append(about, "tier", tier, "after", after.String())...)
		}
		if classify(err) != permanent {
			return err
		}
	}
	err := c.store(msg, func(ctx context.Context) error { return c.keep(ctx, f) })
	if err == nil {
		crashpoint.Here("consumer/kept")
		c.metrics.kept(c.route.Queue, f.Class)
		c.logger.Error("a message was given up and is kept for a person", about...)
	}
	return err
}

// keep keeps a message for a person, and long ones one by one: each is in memory more than once meanwhile.
func (c *consumer) keep(ctx context.Context, f app.Failure) error {
	if len(f.Payload) > longestDelayed {
		c.large <- struct{}{}
		defer func() { <-c.large }()
	}
	return c.failures.Keep(ctx, f)
}

// delayable reports whether the message is tried again later. A person who asked for a retry is told of its end soon.
func (c *consumer) delayable(f app.Failure, tier int) bool {
	return f.Class == string(transient) && f.Retry.FailureID == 0 && tier <= len(c.delays) && len(f.Payload) <= longestDelayed
}

// store tries until something about the message is stored: while the database is away nothing else can be done with the
// message either. The error says that the consumer stops, or that the database will never take it.
func (c *consumer) store(msg *message.Message, put func(ctx context.Context) error) error {
	for {
		err := put(context.WithoutCancel(msg.Context()))
		if err == nil {
			c.pause.over()
			return nil
		}
		if classify(err) == permanent {
			return err
		}
		c.pause.begin(err)
		if err := c.pause.wait(c.stopping); err != nil {
			return err
		}
	}
}

func (c *consumer) failure(msg *message.Message, e givenUp) app.Failure {
	retry := app.RetryFrom(msg.Context())
	f := app.Failure{
		Consumer: c.route.Queue, MessageID: msg.UUID, Class: string(e.class), Code: "unexpected", Error: brief(e.error),
		Attempts: retry.Tier*immediateTries + e.attempts, Headers: maps.Clone(msg.Metadata), Payload: msg.Payload,
		OrderID: orderID(msg), Retry: retry,
	}
	delete(f.Headers, app.MetadataUndeliverable) // it did not come with the message
	if known, ok := errors.AsType[*domain.Error](plain(e.error)); ok {
		f.Code = known.Code
	}
	return f
}

// about says in the log which message it is.
func (c *consumer) about(msg *message.Message, more ...any) []any {
	return append([]any{"message_id", msg.UUID, "order_id", orderID(msg)}, more...)
}

// orderID is the order that the message is about, as far as that can be told.
func orderID(msg *message.Message) string {
	if d, ok := app.DeliveryFrom(msg.Context()); ok {
		return d.OrderID
	}
	return event.SubjectOf(msg.Payload)
}

// brief is an error's text, as long as there is room for.
func brief(err error) string {
	text := plain(err).Error()
	return text[:min(len(text), 512)]
}

// plain is an error without the stack of a panic.
func plain(err error) error {
	if panicked, ok := errors.AsType[middleware.RecoveredPanicError](err); ok {
		return domain.Errorf(domain.Unknown, "panic", "panic: %v", panicked.V)
	}
	return err
}

// pause holds a consumer's messages back while what they need is away.
type pause struct {
	logger *slog.Logger

	mu       sync.Mutex
	why      string
	failures int
	until    time.Time
}

// begin makes everybody wait, longer each time in a row that nothing has become better.
func (p *pause) begin(cause error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Now().Before(p.until) {
		return // others who were under way found the same
	}
	if p.failures == 0 {
		p.logger.Warn("the consumer pauses; no message is lost and no attempt is spent", "error", brief(cause))
	}
	p.why = brief(cause)
	p.failures++
	p.until = time.Now().Add(jitter(min(firstRetry<<min(p.failures, 10), longestPause)))
}

// over ends the pause.
func (p *pause) over() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.failures > 0 {
		p.logger.Info("the consumer goes on")
	}
	p.failures, p.until, p.why = 0, time.Time{}, ""
}

// cause returns why there is a pause, empty if there is none.
func (p *pause) cause() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.why
}

func (p *pause) wait(stopping <-chan struct{}) error {
	p.mu.Lock()
	rest := time.Until(p.until)
	p.mu.Unlock()
	if !sleep(stopping, rest) {
		return errStopping
	}
	return nil
}

// sleep waits, and reports false if the consumer stops.
func sleep(stopping <-chan struct{}, d time.Duration) bool {
	if d <= 0 {
		select {
		case <-stopping:
			return false
		default:
			return true
		}
	}
	select {
	case <-stopping:
		return false
	case <-time.After(d):
		return true
	}
}

// jitter is a random time between half of d and d.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// watermillLogger gives Watermill's own lines to the log. Its errors are mostly about messages that come back, and
// some of its fields are payloads.
func watermillLogger(logger *slog.Logger) watermill.LoggerAdapter { return quietLogger{logger} }

type quietLogger struct{ *slog.Logger }

func (l quietLogger) Error(msg string, err error, fields watermill.LogFields) {
	if errors.Is(err, errStopping) {
		return
	}
	l.Logger.Debug("watermill", append(attrs(fields), "says", msg, "error", err)...)
}

func (l quietLogger) Info(msg string, fields watermill.LogFields) {
	l.Logger.Debug("watermill", append(attrs(fields), "says", msg)...)
}

func (l quietLogger) Debug(string, watermill.LogFields) {}

func (l quietLogger) Trace(string, watermill.LogFields) {}

func (l quietLogger) With(fields watermill.LogFields) watermill.LoggerAdapter {
	return quietLogger{l.Logger.With(attrs(fields)...)}
}

func attrs(fields watermill.LogFields) []any {
	var out []any
	for name, value := range fields {
		if name != "payload" && name != "metadata" {
			out = append(out, name, value)
		}
	}
	return out
}
