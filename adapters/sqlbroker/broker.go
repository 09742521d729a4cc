// Package sqlbroker is a broker whose queues are rows of a SQL database: of SQLite in the embedded default, where
// nothing is installed, and of MySQL where there is no RabbitMQ. What was published survives what the database
// survives.
package sqlbroker

import (
	"cmp"
	"context"
	"database/sql"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	"takeout/adapters/sqldb"
	"takeout/adapters/sqlqueue"
	"takeout/crashpoint"
	"takeout/domain"
)

//go:embed migrations
var migrations embed.FS

// ErrUnroutable says that no queue is bound to the topic of a message.
var ErrUnroutable = errors.New("no queue is bound to the topic")

// ErrClosed says that Close has begun.
var ErrClosed = errors.New("the broker is closed")

// Config changes how a Broker behaves; zero values are the defaults.
type Config struct {
	Prefetch      int           // the most messages in flight for each subscription, 200 if zero
	DeliveryLimit int           // attempts after which a message is undeliverable, 50 if zero
	NackDelay     time.Duration // how long a nacked message rests, 200 ms if zero
	DrainTimeout  time.Duration // how long messages in flight may take when a subscriber closes, 20 s if zero
}

// Broker carries messages between the services as messaging.Broker says.
type Broker struct {
	db     *sqldb.DB
	cfg    Config
	logger *slog.Logger
	bell   sqlqueue.Bell

	// handover is used on SQLite only. On MySQL, where rows may be numbered with gaps, an id that is reckoned from another
	// one may be that of the same message in another queue.
	handover sqlqueue.Handover

	publishing chan publishing
	closing    chan struct{}
	once       sync.Once
	worker     sync.WaitGroup

	binding sync.Mutex // of who stores bindings

	mu       sync.Mutex
	unbound  [][2]string // topic and queue of bindings that are not stored yet
	trouble  error       // why the last statement failed
	callers  sync.WaitGroup
	isClosed bool
	readers  []*sqlqueue.Reader
}

// Open returns a broker over the database at rawURL. It does not connect.
func Open(rawURL string, cfg Config, logger *slog.Logger) (*Broker, error) {
	db, err := sqldb.Open("broker", rawURL, logger)
	if err != nil {
		return nil, err
	}
	if cfg.Prefetch == 0 {
		cfg.Prefetch = 200
	}
	if cfg.DeliveryLimit == 0 {
		cfg.DeliveryLimit = 50
	}
	if cfg.NackDelay == 0 {
		cfg.NackDelay = 200 * time.Millisecond
	}
	b := &Broker{db: db, cfg: cfg, logger: logger, publishing: make(chan publishing), closing: make(chan struct{})}
	b.worker.Go(b.publishLoop)
	return b, nil
}

// DB returns the database itself.
func (b *Broker) DB() *sqldb.DB { return b.db }

// Migrate brings the tables to what this program knows and returns the names of the migrations that it ran.
func (b *Broker) Migrate(ctx context.Context) ([]string, error) {
	schema, err := b.schema()
	if err != nil {
		return nil, err
	}
	return b.db.Migrate(ctx, schema)
}

// TakeBack makes every message that a dead process had taken available at once. It is right only where no other
// process can be reading the queues.
func (b *Broker) TakeBack(ctx context.Context) error {
	return sqlqueue.TakeBack(ctx, b.db, "broker_message")
}

// CheckSchema returns nil if the tables are what this program knows.
func (b *Broker) CheckSchema(ctx context.Context) error {
	schema, err := b.schema()
	if err != nil {
		return err
	}
	return b.db.CheckSchema(ctx, schema)
}

func (b *Broker) schema() (sqldb.Schema, error) {
	files, err := fs.Sub(migrations, "migrations")
	return sqldb.Schema{Name: "broker", Files: files}, err
}

// Bind implements messaging.Broker.
func (b *Broker) Bind(topic, queue string) error {
	b.mu.Lock()
	b.unbound = append(b.unbound, [2]string{topic, queue})
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := b.bind(ctx); err != nil {
		b.setTrouble(err)
		b.logger.Warn("a queue cannot be bound yet", "topic", topic, "queue", queue, "error", err)
	}
	return nil
}

// bind stores the bindings that are not stored yet.
func (b *Broker) bind(ctx context.Context) error {
	b.binding.Lock()
	defer b.binding.Unlock()
	for {
		b.mu.Lock()
		if len(b.unbound) == 0 {
			b.mu.Unlock()
			return nil
		}
		next := b.unbound[0]
		b.mu.Unlock()
		_, err := b.db.Writer().ExecContext(ctx, "INSERT INTO broker_binding (topic, queue) VALUES (?, ?)", next[0], next[1])
		if err != nil && !b.db.IsDuplicate(err) {
			return b.db.Error(err)
		}
		b.mu.Lock()
		b.unbound = b.unbound[1:]
		b.mu.Unlock()
	}
}

// WaitReady implements messaging.Broker.
func (b *Broker) WaitReady(ctx context.Context) error {
	for pause := 50 * time.Millisecond; b.Check() != nil; pause = min(2*pause, 5*time.Second) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(pause):
		}
		err := b.bind(ctx)
		if err == nil {
			err = b.db.Ping(ctx)
		}
		b.setTrouble(err)
	}
	return nil
}

// Check implements messaging.Broker.
func (b *Broker) Check() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.trouble
}

// Reading implements messaging.Broker.
func (b *Broker) Reading() map[string]error {
	b.mu.Lock()
	defer b.mu.Unlock()
	reading := make(map[string]error)
	for _, r := range b.readers {
		queue, err := r.Trouble()
		reading[queue] = cmp.Or(reading[queue], b.trouble, err)
	}
	return reading
}

func (b *Broker) setTrouble(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if domain.KindOf(err) == domain.Unavailable || err == nil {
		b.trouble = err
	}
}

// publishing is one Publish that waits for its place in a transaction.
type publishing struct {
	topic    string
	messages message.Messages
	done     chan error
}

// Publish implements message.Publisher. Publishes that come at the same time share a transaction.
func (b *Broker) Publish(topic string, messages ...*message.Message) error {
	if len(messages) == 0 {
		return nil
	}
	b.mu.Lock()
	if b.isClosed {
		b.mu.Unlock()
		return ErrClosed
	}
	b.callers.Add(1)
	b.mu.Unlock()
	defer b.callers.Done()
	p := publishing{topic, messages, make(chan error, 1)}
	b.publishing <- p
	return <-p.done
}

func (b *Broker) publishLoop() {
	for {
		var group []publishing
		select {
		case p := <-b.publishing:
			group = append(group, p)
		case <-b.closing:
			return
		}
	more:
		for len(group) < 500 {
			select {
			case p := <-b.publishing:
				group = append(group, p)
			default:
				break more
			}
		}
		b.publish(group)
	}
}

// publish stores the group in one transaction. If that fails for another reason than a database that is away, one of
// the group may be to blame, and each gets a transaction of its own.
func (b *Broker) publish(group []publishing) {
	errs := make([]error, len(group))
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var all []stored
	err := b.bind(ctx)
	if err == nil {
		err = b.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) (err error) {
			withdraw(all) // of the attempt before
			all, err = b.insert(ctx, tx, group, errs)
			crashpoint.Here("sqlbroker/before-commit")
			return err
		})
		crashpoint.Here("sqlbroker/after-commit")
	}
	b.setTrouble(err)
	if err == nil {
		b.handOver(all)
	} else {
		withdraw(all)
	}
	if err != nil && len(group) > 1 && domain.KindOf(err) != domain.Unavailable {
		for _, p := range group {
			b.publish([]publishing{p})
		}
		return
	}
	for i, p := range group {
		p.done <- errors.Join(err, errs[i])
	}
}

// stored is a message in a queue.
type stored struct {
	queue   string
	row     sqlqueue.Row
	promise *sqlqueue.Promise // that of all messages of the statement in this queue, nil if its reader must look for them
}

// handOver gives committed messages to the readers in this process, and rings for the others.
func (b *Broker) handOver(all []stored) {
	var filled []string
	for promise, rows := range byPromise(all) {
		if promise != nil {
			promise.Keep(rows)
		}
	}
	for _, m := range all {
		if m.promise == nil && !slices.Contains(filled, m.queue) {
			filled = append(filled, m.queue)
		}
	}
	if len(filled) > 0 {
		b.bell.Ring(filled...)
	}
}

// withdraw says that the messages are not stored.
func withdraw(all []stored) {
	for promise := range byPromise(all) {
		promise.Withdraw()
	}
}

func byPromise(all []stored) map[*sqlqueue.Promise][]sqlqueue.Row {
	rows := map[*sqlqueue.Promise][]sqlqueue.Row{}
	for _, m := range all {
		rows[m.promise] = append(rows[m.promise], m.row)
	}
	return rows
}

// insertAtOnce is the most messages that one statement stores.
const insertAtOnce = 200

// insert stores the messages in each queue that is bound to their topic. It returns what it did also when it fails.
func (b *Broker) insert(ctx context.Context, tx *sql.Tx, group []publishing, errs []error) (all []stored, err error) {
	queues := map[string][]string{}
	for i, p := range group {
		errs[i] = nil
		bound, known := queues[p.topic]
		if !known {
			if bound, err = b.queuesOf(ctx, tx, p.topic); err != nil {
				return nil, err
			}
			queues[p.topic] = bound
		}
		if len(bound) == 0 {
			errs[i] = fmt.Errorf("%w %s", ErrUnroutable, p.topic)
			continue
		}
		for _, msg := range p.messages {
			metadata, err := json.Marshal(msg.Metadata)
			if err != nil {
				return nil, err
			}
			for _, queue := range bound {
				all = append(all, stored{queue: queue, row: sqlqueue.Row{UUID: msg.UUID, Payload: sqldb.NotNull(msg.Payload), Metadata: metadata}})
			}
		}
	}
	for some := range slices.Chunk(all, insertAtOnce) {
		if err := b.store(ctx, tx, some); err != nil {
			return all, err
		}
	}
	return all, nil
}

// store stores the messages by one statement, under the promises of those who read their queues here.
func (b *Broker) store(ctx context.Context, tx *sql.Tx, some []stored) error {
	var query strings.Builder
	args := make([]any, 0, 4*len(some))
	separator := "INSERT INTO broker_message (queue, uuid, payload, metadata, attempts, available_at) VALUES "
	count, promises := map[string]int{}, map[string]*sqlqueue.Promise{}
	for _, m := range some {
		count[m.queue]++
	}
	for queue, n := range count {
		promises[queue] = b.handover.Promise(queue, n)
	}
	for i := range some {
		m := &some[i]
		m.promise = promises[m.queue]
		attempts, availableAt := m.promise.Lease()
		query.WriteString(separator + "(?, ?, ?, ?, " + attempts + ", " + availableAt + ")")
		separator = ", "
		args = append(args, m.queue, m.row.UUID, m.row.Payload, m.row.Metadata)
	}
	result, err := tx.ExecContext(ctx, query.String(), args...)
	if err != nil {
		return err
	}
	first, err := b.db.FirstID(result, len(some))
	for i := range some {
		some[i].row.ID = first + int64(i)
	}
	return err
}

func (b *Broker) queuesOf(ctx context.Context, tx *sql.Tx, topic string) ([]string, error) {
	rows, err := tx.QueryContext(ctx, "SELECT queue FROM broker_binding WHERE topic = ?", topic)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var queues []string
	for rows.Next() {
		var queue string
		if err := rows.Scan(&queue); err != nil {
			return nil, err
		}
		queues = append(queues, queue)
	}
	return queues, rows.Err()
}

// Close implements messaging.Broker.
func (b *Broker) Close() error {
	b.once.Do(func() {
		b.mu.Lock()
		b.isClosed = true
		readers := b.readers
		b.mu.Unlock()
		closeAll(readers)
		b.callers.Wait()
		close(b.closing)
	})
	b.worker.Wait()
	return b.db.Close()
}

func closeAll(readers []*sqlqueue.Reader) {
	var closing sync.WaitGroup
	for _, r := range readers {
		closing.Go(func() { _ = r.Close() })
	}
	closing.Wait()
}
