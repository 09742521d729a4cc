// Package sqlqueue reads a table as a queue of messages. The outbox is such a table, and so is each queue of the SQL
// broker.
//
// A row is pending because it exists. A reader takes rows by a lease, hands many of them out at once, and deletes
// exactly those that were acked. Nothing goes by "id greater than the last": rows become visible in the order of
// their commits and not of their ids, so that a pointer would pass over some for ever. No transaction is open while
// a message is being handled. A lease only keeps several readers from doing the same work twice: a reader that
// outlives its lease makes a duplicate and never a loss.
package sqlqueue

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	"takeout/adapters/sqldb"
	"takeout/app"
	"takeout/crashpoint"
)

// Config says which rows a Reader reads, and how.
type Config struct {
	Table string // has the columns id, uuid, payload, metadata, available_at, attempts
	Queue string // what the column queue must hold; empty if the table is one queue

	Columns []string                                                   // further columns to read
	Context func(ctx context.Context, values []string) context.Context // puts their values, empty for NULL, into a message's context

	Bell     *Bell     // of the table: all its readers in this process share it
	Handover *Handover // of the table, nil if nobody hands rows over

	// Ready waits until messages can be handled. If they can it returns nil, even if ctx has ended. nil if they always can.
	Ready func(ctx context.Context) error

	// Yield makes the reader rest after each full batch for as long as that took, so that a backlog is not published much
	// faster than its consumers handle it.
	Yield bool

	Window        int                      // the most messages in flight that were read, 1000 if zero; half as many may be handed over
	Lease         time.Duration            // 10 s if zero; renewed while a message is in flight
	Poll          time.Duration            // how long a row may stay unnoticed for which nobody rings here, 250 ms if zero
	Drain         time.Duration            // how long messages in flight may take when closing, 20 s if zero
	Backoff       func(attempts int) int64 // how long a nacked row rests, in microseconds; a quickly growing time if nil
	DeliveryLimit int                      // attempts after which a message is undeliverable, no limit if zero

	// Archive keeps what must outlive n acked rows. names are the arguments that sqldb.CopyByID takes with the further
	// column uuid. It is called in the transaction that deletes them, before it does, and passes over rows that another
	// reader has deleted. nil if nothing must be kept.
	Archive func(ctx context.Context, tx *sql.Tx, n int, names []any) error

	OnSettled func(acked, nacked int) // called after rows were deleted or given back; nil if nobody asks
}

func (c Config) withDefaults() Config {
	c.Window = cmp.Or(c.Window, 1000)
	c.Lease = cmp.Or(c.Lease, 10*time.Second)
	c.Poll = cmp.Or(c.Poll, 250*time.Millisecond)
	c.Drain = cmp.Or(c.Drain, 20*time.Second)
	if c.Ready == nil {
		c.Ready = func(context.Context) error { return nil }
	}
	if c.Backoff == nil {
		c.Backoff = func(attempts int) int64 {
			return min(100*time.Millisecond<<min(attempts, 10), time.Minute).Microseconds()
		}
	}
	if c.OnSettled == nil {
		c.OnSettled = func(int, int) {}
	}
	return c
}

// SlowPoll is the Poll of tables whose rows are rung for where they are committed, as long as one process does everything.
const SlowPoll = 2 * time.Second

const (
	// batch is the most rows that one statement takes or settles.
	batch = 500
	// firstLook is how soon a reader that found nothing looks again. Each further time it waits twice as long.
	firstLook = 10 * time.Millisecond
	// settleDelay is how long a settled row may wait for others, so that one statement is for all. Nobody waits for it, unless
	// no more rows may be in flight.
	settleDelay = 15 * time.Millisecond
	// longestYield is for how long a reader yields at most: one that took longer waited for the database.
	longestYield = 100 * time.Millisecond
)

// Reader implements message.Subscriber. The topic of Subscribe names nothing: the Config says which rows are read.
type Reader struct {
	db     *sqldb.DB
	cfg    Config
	logger *slog.Logger

	closing chan struct{}
	once    sync.Once
	running sync.WaitGroup
	trouble atomic.Pointer[error] // why rows could not be taken last, nil if they could
}

// NewReader returns a reader of the rows that cfg describes.
func NewReader(db *sqldb.DB, cfg Config, logger *slog.Logger) *Reader {
	return &Reader{db: db, cfg: cfg.withDefaults(), logger: logger.With("table", cfg.Table, "database", db.Name()), closing: make(chan struct{})}
}

// Subscribe hands out messages until ctx is cancelled or the reader is closed, and then closes the channel after the
// messages in flight are settled or the drain time is over. A message's context ends when it is settled, and not
// with ctx.
func (r *Reader) Subscribe(ctx context.Context, _ string) (<-chan *message.Message, error) {
	select {
	case <-r.closing:
		return nil, errors.New("the reader is closed")
	default:
	}
	s := &subscription{
		Reader:  r,
		values:  context.WithoutCancel(ctx),
		out:     make(chan *message.Message),
		slots:   make(chan struct{}, r.cfg.Window),
		handed:  make(chan []Row, r.cfg.Window/2),
		settled: make(chan outcome, r.cfg.Window),
		leases:  make(map[int64]lease),
		behind:  true,
	}
	taking, stop := context.WithCancel(ctx)
	r.running.Go(func() {
		defer stop()
		select {
		case <-r.closing:
		case <-taking.Done():
		}
	})
	r.running.Go(func() { s.run(taking) })
	return s.out, nil
}

// Close stops handing out messages, waits for those in flight as Config.Drain allows, and gives the others back.
func (r *Reader) Close() error {
	r.once.Do(func() { close(r.closing) })
	r.running.Wait()
	return nil
}

// Trouble returns which queue is read, and why it could not be when that was tried last, nil if it could.
func (r *Reader) Trouble() (queue string, err error) {
	if why := r.trouble.Load(); why != nil {
		err = *why
	}
	return r.cfg.Queue, err
}

// TakeBack makes every leased row of the table available at once, and leaves those alone whose time has never come. It
// is right only where nobody else can be reading the table, as after the crash of the one process that may.
func TakeBack(ctx context.Context, db *sqldb.DB, table string) error {
	_, err := db.Writer().ExecContext(ctx, "UPDATE "+table+" SET available_at = 0 WHERE available_at > 0 AND attempts > 0")
	return db.Error(err)
}

// subscription is one Subscribe.
type subscription struct {
	*Reader
	values context.Context // what the subscriber's context carries, never cancelled
	out    chan *message.Message
	slots  chan struct{} // one for each message in flight that was read
	handed chan []Row    // what came by handover

	settled chan outcome
	stopped bool // nothing more may be handed over; of Config.Handover's mu
	stale   bool // what was taken last was full of rows that came again; of take

	mu       sync.Mutex
	leases   map[int64]lease // of the rows in flight, by id
	promised int             // rows in flight, or expected, that come by handover
	behind   bool            // rows may wait that could not be read yet
}

// lease is a row's.
type lease struct {
	uuid  string
	taken time.Time
}

// outcome is what became of a row.
type outcome struct {
	Row
	acked bool
}

// Row is a message as its table holds it. A row is named by its id and, because an id that is reckoned from another one
// may be somebody else's, by its uuid.
type Row struct {
	ID       int64
	UUID     string
	Payload  []byte
	Metadata []byte // JSON, empty if there is none

	attempts int
	further  []string
	taken    time.Time
	promised bool // it came by handover
}

// names returns the arguments that name the rows in a statement, of those ByID with the further column uuid.
func names(rows []Row) []any {
	names := make([]any, 2*len(rows))
	for i, r := range rows {
		names[i], names[len(rows)+i] = r.ID, r.UUID
	}
	return names
}

func (s *subscription) run(taking context.Context) {
	handling, abandon := context.WithCancel(s.values)
	var inFlight, helpers sync.WaitGroup
	stopHelpers := make(chan struct{})
	helpers.Go(func() { s.settle(stopHelpers) })
	helpers.Go(func() { s.renew(stopHelpers) })

	var handing sync.WaitGroup
	handing.Go(func() { s.receive(taking, handling, &inFlight) })
	s.cfg.Handover.begin(s)
	s.take(taking, handling, &inFlight)
	s.cfg.Handover.end(s)
	close(s.handed)
	handing.Wait()

	timer := time.AfterFunc(s.cfg.Drain, func() {
		s.logger.Warn("closing did not wait for all messages in flight; they will be delivered again")
		abandon()
	})
	inFlight.Wait()
	timer.Stop()
	abandon()
	close(stopHelpers)
	close(s.settled) // all that will ever come is there
	helpers.Wait()
	close(s.out)
}

// take hands out rows until taking ends.
func (s *subscription) take(taking, handling context.Context, inFlight *sync.WaitGroup) {
	for pause := time.Duration(0); ; {
		if s.cfg.Ready(taking) != nil {
			return
		}
		free := s.reserve(taking)
		if free == 0 {
			return
		}
		heard := s.cfg.Bell.Heard(s.cfg.Queue)
		began := time.Now()
		rows, err := s.claim(taking, free)
		if err == nil && s.trouble.Swap(nil) != nil {
			pause = 0
			s.logger.Info("the queue can be read again")
		}
		onlyNew := s.stale
		if err == nil {
			full := len(rows) == free
			s.stale = full && !slices.ContainsFunc(rows, func(r Row) bool { return r.attempts == 1 })
			s.found(full && !s.stale)
		}
		if len(rows) > 0 {
			crashpoint.In(s.cfg.Table, "claimed")
		}
		for i, row := range rows {
			if !s.handOut(taking, handling, row, inFlight) {
				s.giveBack(rows[i:])
				return
			}
		}
		for range free - len(rows) {
			<-s.slots
		}
		switch {
		case err != nil && taking.Err() != nil:
			return
		case err != nil:
			if s.trouble.Swap(&err) == nil {
				s.logger.Warn("the queue cannot be read; trying until it can", "error", err)
			}
			pause = min(max(2*pause, 100*time.Millisecond), 5*time.Second)
			select {
			case <-taking.Done():
				return
			case <-time.After(pause):
			}
		case len(rows) < free && !onlyNew:
			s.await(taking, heard)
		case s.cfg.Yield:
			rest(taking, min(time.Since(began), longestYield))
		}
	}
}

// rest waits until the time is over or taking ends.
func rest(taking context.Context, d time.Duration) {
	select {
	case <-taking.Done():
	case <-time.After(d):
	}
}

// receive hands out rows that come by handover.
func (s *subscription) receive(taking, handling context.Context, inFlight *sync.WaitGroup) {
	for rows := range s.handed {
		crashpoint.In(s.cfg.Table, "claimed")
		for i, row := range rows {
			if !s.handOut(taking, handling, row, inFlight) {
				s.giveBack(rows[i:])
				break
			}
		}
	}
}

// await waits until somebody rings, and polls meanwhile, less and less often.
func (s *subscription) await(taking context.Context, heard <-chan struct{}) {
	for pause := min(firstLook, s.cfg.Poll); ; {
		wait := pause
		for wait > 0 {
			timer := time.NewTimer(wait)
			select {
			case <-taking.Done():
				timer.Stop()
				return
			case <-heard:
				timer.Stop()
				return
			case <-timer.C:
			}
			var err error
			if wait, err = s.cfg.Bell.look(taking, s.Reader, pause); err != nil {
				return // taking rows meets the same, and says it
			}
		}
		pause = min(2*pause, s.cfg.Poll)
	}
}

// reserve waits until a message may be in flight, and takes as many places as are free, up to a batch. It returns 0
// when ctx ends.
func (s *subscription) reserve(ctx context.Context) int {
	select {
	case s.slots <- struct{}{}:
	case <-ctx.Done():
		return 0
	}
	for n := 1; n < batch; n++ {
		select {
		case s.slots <- struct{}{}:
		default:
			return n
		}
	}
	return batch
}

func (s *subscription) handOut(taking, handling context.Context, r Row, inFlight *sync.WaitGroup) bool {
	msg := message.NewMessage(r.UUID, r.Payload)
	if len(r.Metadata) > 0 {
		if err := json.Unmarshal(r.Metadata, &msg.Metadata); err != nil {
			s.logger.Error("a row's metadata cannot be read; the message goes without", "row", r.ID, "error", err)
			msg.Metadata = nil
		}
	}
	if msg.Metadata == nil {
		msg.Metadata = message.Metadata{}
	}
	delete(msg.Metadata, app.MetadataUndeliverable) // only the attempts can say so
	if s.cfg.DeliveryLimit > 0 && r.attempts > s.cfg.DeliveryLimit {
		msg.Metadata.Set(app.MetadataUndeliverable,
			fmt.Sprintf("delivered %d times without an end; the delivery limit is reached", r.attempts-1))
	}
	if s.cfg.Context != nil {
		handling = s.cfg.Context(handling, r.further)
	}
	if r.attempts > 1 {
		handling = app.Apart(handling)
	}
	ctx, done := context.WithCancel(handling)
	msg.SetContext(ctx)
	s.mu.Lock()
	s.leases[r.ID] = lease{r.UUID, r.taken}
	s.mu.Unlock()
	select {
	case s.out <- msg:
	case <-taking.Done():
		done()
		return false
	}
	inFlight.Go(func() {
		defer done()
		o := outcome{Row: r}
		select {
		case <-msg.Acked():
			o.acked = true
		case <-msg.Nacked():
		case <-handling.Done():
			o.attempts = 0
		}
		s.settled <- o
	})
	return true
}
