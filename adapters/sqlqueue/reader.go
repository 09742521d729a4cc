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
	"strings"
	"sync"
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

	Bell  *Bell                           // of the table: all its readers in this process share it
	Ready func(ctx context.Context) error // waits until messages can be handled; nil if they always can

	Window        int                      // the most messages in flight, 1000 if zero
	Lease         time.Duration            // 10 s if zero; renewed while a message is in flight
	Poll          time.Duration            // how long a row may stay unnoticed for which nobody rings here, 250 ms if zero
	Drain         time.Duration            // how long messages in flight may take when closing, 20 s if zero
	Backoff       func(attempts int) int64 // how long a nacked row rests, in microseconds; a quickly growing time if nil
	DeliveryLimit int                      // attempts after which a message is undeliverable, no limit if zero

	// Archive keeps what must outlive the acked rows of these ids. It is called in the transaction that deletes them,
	// before it does. Rows that are gone, because another reader had them too, are none of its business. nil if nothing
	// must be kept.
	Archive func(ctx context.Context, tx *sql.Tx, ids []any) error

	OnSettled func(acked, nacked int) // called after rows were deleted or given back; nil if nobody asks
}

func (c Config) withDefaults() Config {
	c.Window = cmp.Or(c.Window, 1000)
	c.Lease = cmp.Or(c.Lease, 10*time.Second)
	c.Poll = cmp.Or(c.Poll, 250*time.Millisecond)
	c.Drain = cmp.Or(c.Drain, 20*time.Second)
	if c.Ready == nil {
		c.Ready = func(ctx context.Context) error { return ctx.Err() }
	}
	if c.Backoff == nil {
		c.Backoff = func(attempts int) int64 {
			return min(100*time.Millisecond<<min(attempts, 10), 10*time.Second).Microseconds()
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
	// settleDelay is how long a settled row may wait for others, so that one statement is for all. Nobody waits for it.
	settleDelay = 5 * time.Millisecond
)

// Reader implements message.Subscriber. The topic of Subscribe names nothing: the Config says which rows are read.
type Reader struct {
	db     *sqldb.DB
	cfg    Config
	logger *slog.Logger

	closing chan struct{}
	once    sync.Once
	running sync.WaitGroup
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
		settled: make(chan outcome, r.cfg.Window),
		leases:  make(map[int64]time.Time),
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
	slots  chan struct{} // one for each message in flight

	settled chan outcome

	mu     sync.Mutex
	leases map[int64]time.Time // when the lease of a row in flight was last taken
}

type outcome struct {
	id       int64
	attempts int
	acked    bool
}

type row struct {
	id       int64
	uuid     string
	payload  []byte
	metadata []byte
	attempts int
	further  []string
}

func (s *subscription) run(taking context.Context) {
	handling, abandon := context.WithCancel(s.values)
	var inFlight, helpers sync.WaitGroup
	stopHelpers := make(chan struct{})
	helpers.Go(func() { s.settle(stopHelpers) })
	helpers.Go(func() { s.renew(stopHelpers) })

	s.take(taking, handling, &inFlight)

	timer := time.AfterFunc(s.cfg.Drain, func() {
		s.logger.Warn("closing did not wait for all messages in flight; they will be delivered again")
		abandon()
	})
	inFlight.Wait()
	timer.Stop()
	abandon()
	close(stopHelpers)
	helpers.Wait()
	close(s.out)
}

// take hands out rows until taking ends.
func (s *subscription) take(taking, handling context.Context, inFlight *sync.WaitGroup) {
	var trouble bool
	for pause := time.Duration(0); ; {
		if s.cfg.Ready(taking) != nil {
			return
		}
		free := s.reserve(taking)
		if free == 0 {
			return
		}
		heard := s.cfg.Bell.Heard(s.cfg.Queue)
		rows, err := s.claim(taking, free)
		if err == nil && trouble {
			trouble, pause = false, 0
			s.logger.Info("the queue can be read again")
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
			if !trouble {
				trouble = true
				s.logger.Warn("the queue cannot be read; trying until it can", "error", err)
			}
			pause = min(max(2*pause, 100*time.Millisecond), 5*time.Second)
			select {
			case <-taking.Done():
				return
			case <-time.After(pause):
			}
		case len(rows) < free:
			s.await(taking, heard)
		}
	}
}

// await waits until somebody rings, and looks by itself the less often the longer nobody does.
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

func (s *subscription) handOut(taking, handling context.Context, r row, inFlight *sync.WaitGroup) bool {
	msg := message.NewMessage(r.uuid, r.payload)
	if len(r.metadata) > 0 {
		if err := json.Unmarshal(r.metadata, &msg.Metadata); err != nil {
			s.logger.Error("a row's metadata cannot be read; the message goes without", "row", r.id, "error", err)
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
	s.leases[r.id] = time.Now()
	s.mu.Unlock()
	select {
	case s.out <- msg:
	case <-taking.Done():
		done()
		return false
	}
	inFlight.Go(func() {
		defer done()
		o := outcome{id: r.id, attempts: r.attempts}
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

// settle deletes acked rows and gives nacked ones back, as many in one statement as have come together.
func (s *subscription) settle(stop <-chan struct{}) {
	for {
		var outcomes []outcome
		select {
		case o := <-s.settled:
			outcomes = append(outcomes, o)
		case <-stop:
			select {
			case o := <-s.settled:
				outcomes = append(outcomes, o)
			default:
				return
			}
		}
		others := time.NewTimer(settleDelay)
	more:
		for len(outcomes) < batch {
			select {
			case o := <-s.settled:
				outcomes = append(outcomes, o)
			case <-others.C:
				break more
			case <-stop: // all that will ever come is there
				select {
				case o := <-s.settled:
					outcomes = append(outcomes, o)
				default:
					break more
				}
			}
		}
		others.Stop()
		s.settleBatch(outcomes, stop)
		s.mu.Lock()
		for _, o := range outcomes {
			delete(s.leases, o.id)
		}
		s.mu.Unlock()
		for range outcomes {
			<-s.slots
		}
	}
}

func (s *subscription) settleBatch(outcomes []outcome, stop <-chan struct{}) {
	var acked []any
	nacked := map[int][]any{} // by attempts
	for _, o := range outcomes {
		if o.acked {
			acked = append(acked, o.id)
		} else {
			nacked[o.attempts] = append(nacked[o.attempts], o.id)
		}
	}
	if len(acked) > 0 {
		s.delete(acked, stop)
	}
	for attempts, ids := range nacked {
		rest := int64(0)
		if attempts > 0 {
			rest = s.cfg.Backoff(attempts)
		}
		s.exec(s.db.UpdateByID(s.cfg.Table, fmt.Sprintf("available_at = %s + %d", s.db.Now, rest), len(ids)), ids, stop)
		s.cfg.Bell.RingIn(time.Duration(rest)*time.Microsecond, s.cfg.Queue)
	}
	s.cfg.OnSettled(len(acked), len(outcomes)-len(acked))
}

// delete deletes acked rows, once what must outlive them is kept.
func (s *subscription) delete(ids []any, stop <-chan struct{}) {
	crashpoint.In(s.cfg.Table, "acked")
	statement := s.db.DeleteByID(s.cfg.Table, len(ids))
	if s.cfg.Archive == nil {
		s.exec(statement, ids, stop)
		crashpoint.In(s.cfg.Table, "deleted")
		return
	}
	s.persist(len(ids), stop, func(ctx context.Context) error {
		return s.db.Unsynced(ctx, func(c sqldb.Conn) error {
			return s.db.InTxOn(ctx, c, func(ctx context.Context, tx *sql.Tx) error {
				if err := s.cfg.Archive(ctx, tx, ids); err != nil {
					return err
				}
				_, err := tx.ExecContext(ctx, statement, ids...)
				crashpoint.In(s.cfg.Table, "deleted")
				return err
			})
		})
	})
}

// exec persists by one statement about the rows whose ids are its arguments.
func (s *subscription) exec(query string, ids []any, stop <-chan struct{}) {
	s.persist(len(ids), stop, func(ctx context.Context) error { return s.write(ctx, query, ids) })
}

// write runs a statement that may be lost in a power cut: then rows are delivered again.
func (s *subscription) write(ctx context.Context, query string, ids []any) error {
	return s.db.Unsynced(ctx, func(c sqldb.Conn) error {
		_, err := c.ExecContext(ctx, query, ids...)
		return err
	})
}

// persist does the work until it succeeds. When the reader stops it tries only a little longer: a row that was not
// deleted is delivered again, which is a duplicate, and one that was not given back comes when its lease is over.
func (s *subscription) persist(rows int, stop <-chan struct{}, work func(ctx context.Context) error) {
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		err := work(ctx)
		cancel()
		if err == nil {
			return
		}
		select {
		case <-stop:
			if pause > 500*time.Millisecond {
				s.logger.Warn("rows could not be settled; they will be delivered again", "rows", rows, "error", s.db.Error(err))
				return
			}
		default:
		}
		time.Sleep(pause)
	}
}

func (s *subscription) giveBack(rows []row) {
	ids := make([]any, len(rows))
	for i, r := range rows {
		ids[i] = r.id
		<-s.slots
		s.mu.Lock()
		delete(s.leases, r.id)
		s.mu.Unlock()
	}
	closed := make(chan struct{})
	close(closed)
	s.exec(s.db.UpdateByID(s.cfg.Table, "available_at = 0", len(ids)), ids, closed)
}

// renew keeps the leases of the messages in flight.
func (s *subscription) renew(stop <-chan struct{}) {
	ticker := time.NewTicker(s.cfg.Lease / 4)
	defer ticker.Stop()
	for {
		select {
		case <-stop:
			return
		case <-ticker.C:
		}
		var ids []any
		s.mu.Lock()
		for id, taken := range s.leases {
			if time.Since(taken) > s.cfg.Lease/4 {
				ids = append(ids, id)
			}
		}
		s.mu.Unlock()
		for part := range slices.Chunk(ids, batch) {
			ctx, cancel := context.WithTimeout(context.Background(), s.cfg.Lease/2)
			longer := fmt.Sprintf("available_at = %s + %d", s.db.Now, s.cfg.Lease.Microseconds())
			err := s.write(ctx, s.db.UpdateByID(s.cfg.Table, longer, len(part)), part)
			cancel()
			if err != nil {
				s.logger.Debug("leases could not be renewed", "error", err)
			}
		}
	}
}

// claim takes up to limit rows that are available, lowest id first.
func (s *subscription) claim(ctx context.Context, limit int) ([]row, error) {
	where, args := "available_at <= "+s.db.Now, []any{}
	if s.cfg.Queue != "" {
		where, args = where+" AND queue = ?", append(args, s.cfg.Queue)
	}
	columns := strings.Join(append([]string{"id, uuid, payload, metadata, attempts"}, s.cfg.Columns...), ", ")
	lease := fmt.Sprintf("attempts = attempts + 1, available_at = %s + %d", s.db.Now, s.cfg.Lease.Microseconds())
	args = append(args, limit)
	var rows []row
	if s.db.Engine == "sqlite" {
		err := s.db.Unsynced(ctx, func(c sqldb.Conn) (err error) {
			rows, err = s.scan(c.QueryContext(ctx, "UPDATE "+s.cfg.Table+" SET "+lease+" "+
				"WHERE id IN (SELECT id FROM "+s.cfg.Table+" WHERE "+where+" ORDER BY id LIMIT ?) RETURNING "+columns, args...))
			return err
		})
		slices.SortFunc(rows, func(a, b row) int { return cmp.Compare(a.id, b.id) })
		return rows, s.db.Error(err)
	}
	// The commit also sees to it that whatever stored the rows is on disk: InnoDB shows it to others before that, and an event
	// must not be sent of what a crash can still undo. So without it nothing was taken.
	err := s.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) (err error) {
		rows, err = s.scan(tx.QueryContext(ctx, "SELECT "+columns+" FROM "+s.cfg.Table+" WHERE "+where+
			" ORDER BY id LIMIT ?"+s.db.ForUpdate+s.db.SkipLocked, args...))
		if err != nil || len(rows) == 0 {
			return err
		}
		ids := make([]any, len(rows))
		for i := range rows {
			rows[i].attempts++
			ids[i] = rows[i].id
		}
		_, err = tx.ExecContext(ctx, s.db.UpdateByID(s.cfg.Table, lease, len(ids)), ids...)
		return err
	})
	if err != nil {
		return nil, err
	}
	return rows, nil
}

func (s *subscription) scan(rows *sql.Rows, err error) ([]row, error) {
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []row
	for rows.Next() {
		var r row
		further := make([]sql.NullString, len(s.cfg.Columns))
		into := []any{&r.id, &r.uuid, &r.payload, &r.metadata, &r.attempts}
		for i := range further {
			into = append(into, &further[i])
		}
		if err := rows.Scan(into...); err != nil {
			return nil, err
		}
		for _, value := range further {
			r.further = append(r.further, value.String)
		}
		all = append(all, r)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	return all, nil
}
