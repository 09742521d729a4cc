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

// settle deletes acked rows and gives nacked ones back, as many in one statement as have come together.
func (s *subscription) settle(stop <-chan struct{}) {
	for first := range s.settled {
		outcomes := []outcome{first}
		others := time.NewTimer(settleDelay)
	more:
		for len(outcomes) < min(batch, s.cfg.Window) {
			select {
			case o, open := <-s.settled:
				if !open {
					break more
				}
				outcomes = append(outcomes, o)
			case <-others.C:
				break more
			}
		}
		others.Stop()
		s.settleBatch(outcomes, stop)
		for _, o := range outcomes {
			s.free(o.Row)
		}
	}
}

// free makes room for another row in the place of r.
func (s *subscription) free(r Row) {
	s.mu.Lock()
	delete(s.leases, r.ID)
	s.mu.Unlock()
	if r.promised {
		s.fulfil(1)
	} else {
		<-s.slots
	}
}

func (s *subscription) settleBatch(outcomes []outcome, stop <-chan struct{}) {
	var acked []Row
	nacked := map[int][]Row{} // by attempts
	for _, o := range outcomes {
		if o.acked {
			acked = append(acked, o.Row)
		} else {
			nacked[o.attempts] = append(nacked[o.attempts], o.Row)
		}
	}
	if len(acked) > 0 {
		s.delete(acked, stop)
	}
	for attempts, rows := range nacked {
		rest := int64(0)
		if attempts > 0 {
			rest = s.cfg.Backoff(attempts)
		}
		s.exec(fmt.Sprintf("available_at = %s + %d", s.db.Now, rest), rows, stop)
		s.cfg.Bell.RingIn(time.Duration(rest)*time.Microsecond, s.cfg.Queue)
	}
	s.cfg.OnSettled(len(acked), len(outcomes)-len(acked))
}

// delete deletes acked rows, once what must outlive them is kept.
func (s *subscription) delete(rows []Row, stop <-chan struct{}) {
	crashpoint.In(s.cfg.Table, "acked")
	statement, names := s.db.DeleteByID(s.cfg.Table, len(rows), "uuid"), names(rows)
	var deleted int64
	s.persist(len(rows), stop, func(ctx context.Context) error {
		return s.db.Unsynced(ctx, func(c sqldb.Conn) (err error) {
			if s.cfg.Archive == nil {
				deleted, err = affected(c.ExecContext(ctx, statement, names...))
				return s.db.WriteError(ctx, err)
			}
			return s.db.InTxOn(ctx, c, func(ctx context.Context, tx *sql.Tx) error {
				if err := s.cfg.Archive(ctx, tx, len(rows), names); err != nil {
					return err
				}
				deleted, err = affected(tx.ExecContext(ctx, statement, names...))
				crashpoint.In(s.cfg.Table, "deleted")
				return err
			})
		})
	})
	if s.cfg.Archive == nil {
		crashpoint.In(s.cfg.Table, "deleted")
	}
	if deleted < int64(len(rows)) && slices.ContainsFunc(rows, func(r Row) bool { return r.promised }) {
		s.cfg.Handover.missed()
	}
}

func affected(result sql.Result, err error) (int64, error) {
	if err != nil {
		return 0, err
	}
	return result.RowsAffected()
}

// exec persists the assignment in the rows.
func (s *subscription) exec(set string, rows []Row, stop <-chan struct{}) {
	s.persist(len(rows), stop, func(ctx context.Context) error { return s.write(ctx, set, rows) })
}

// write makes an assignment in the rows that may be lost in a power cut: then they are delivered again.
func (s *subscription) write(ctx context.Context, set string, rows []Row) error {
	return s.db.Unsynced(ctx, func(c sqldb.Conn) error {
		_, err := c.ExecContext(ctx, s.db.UpdateByID(s.cfg.Table, set, len(rows), "uuid"), names(rows)...)
		return s.db.WriteError(ctx, err)
	})
}

// persist does the work until it succeeds. When the reader stops it tries only a little longer: a row that was not
// deleted is delivered again, which is a duplicate, and one that was not given back comes when its lease is over.
func (s *subscription) persist(rows int, stop <-chan struct{}, work func(ctx context.Context) error) {
	trouble, began := false, time.Now()
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 2*time.Second) {
		patience := 10 * time.Second
		select {
		case <-stop:
			patience = 2 * time.Second
		default:
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := work(ctx)
		cancel()
		if err == nil {
			if trouble {
				s.logger.Info("rows can be settled again", "rows", rows)
			}
			return
		}
		if !trouble && pause > 500*time.Millisecond {
			trouble = true
			s.logger.Warn("rows cannot be settled; trying until they can, and taking no more than the window has room for",
				"rows", rows, "error", s.db.Error(err))
		}
		select {
		case <-stop:
			if pause > 500*time.Millisecond || time.Since(began) > 2*time.Second {
				s.logger.Warn("rows could not be settled; they will be delivered again", "rows", rows, "error", s.db.Error(err))
				return
			}
		default:
		}
		time.Sleep(pause)
	}
}

// giveBack makes rows available that were taken and not handed out, which was no attempt.
func (s *subscription) giveBack(rows []Row) {
	for _, r := range rows {
		s.free(r)
	}
	s.exec("available_at = 0, attempts = attempts - 1", rows, past.Done())
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
		var old []Row
		s.mu.Lock()
		for id, lease := range s.leases {
			if time.Since(lease.taken) > s.cfg.Lease/4 {
				old = append(old, Row{ID: id, UUID: lease.uuid})
			}
		}
		s.mu.Unlock()
		for part := range slices.Chunk(old, batch) {
			ctx, cancel := context.WithTimeout(context.Background(), s.cfg.Lease/2)
			err := s.write(ctx, "available_at = "+s.lease(), part)
			cancel()
			if err != nil {
				s.logger.Debug("leases could not be renewed", "error", err)
			}
		}
	}
}

// claim takes up to limit rows that are available, lowest id first. After a batch that was full of rows that came again it
// takes new ones only: what cannot be sent, however much it is, does not keep the others waiting.
func (s *subscription) claim(ctx context.Context, limit int) ([]Row, error) {
	where, args := "available_at <= "+s.db.Now, []any{}
	if s.stale {
		where = "available_at = 0"
	}
	if s.cfg.Queue != "" {
		where, args = where+" AND queue = ?", append(args, s.cfg.Queue)
	}
	columns := strings.Join(append([]string{"id, uuid, payload, metadata, attempts"}, s.cfg.Columns...), ", ")
	lease := "attempts = attempts + 1, available_at = " + s.lease()
	args = append(args, limit)
	var rows []Row
	if s.db.Engine == "sqlite" {
		err := s.db.Unsynced(ctx, func(c sqldb.Conn) (err error) {
			rows, err = s.scan(c.QueryContext(ctx, "UPDATE "+s.cfg.Table+" SET "+lease+" "+
				"WHERE id IN (SELECT id FROM "+s.cfg.Table+" WHERE "+where+" ORDER BY id LIMIT ?) RETURNING "+columns, args...))
			return err
		})
		slices.SortFunc(rows, func(a, b Row) int { return cmp.Compare(a.ID, b.ID) })
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
			ids[i] = rows[i].ID
		}
		_, err = tx.ExecContext(ctx, s.db.UpdateByID(s.cfg.Table, lease, len(ids)), ids...)
		return err
	})
	if err != nil {
		return nil, err
	}
	return rows, nil
}

func (s *subscription) scan(rows *sql.Rows, err error) ([]Row, error) {
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var all []Row
	for rows.Next() {
		r := Row{taken: time.Now()}
		further := make([]sql.NullString, len(s.cfg.Columns))
		into := []any{&r.ID, &r.UUID, &r.Payload, &r.Metadata, &r.attempts}
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
