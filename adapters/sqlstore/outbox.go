package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"log/slog"
	"time"

	wsql "github.com/ThreeDotsLabs/watermill-sql/v4/pkg/sql"
	"github.com/ThreeDotsLabs/watermill/components/forwarder"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"

	"takeout/adapters/sqldb"
	"takeout/adapters/sqlqueue"
	"takeout/domain/event"
)

// OutboxTopic is the topic that a forwarder subscribes to.
const OutboxTopic = "outbox"

// outbox stores events in the transaction tx, in the envelope that Watermill's forwarder opens again.
type outbox struct {
	tx       *sql.Tx
	db       *sqldb.DB
	keys     event.Keys
	handover *sqlqueue.Handover
	stored   []stored
}

// stored are the rows of one statement.
type stored struct {
	promise *sqlqueue.Promise // nil if the relay must look for them
	rows    []sqlqueue.Row
}

// Publish implements app.Outbox. It needs one statement for all events that have the same key and follow each other.
func (o *outbox) Publish(ctx context.Context, events ...event.Event) error {
	for len(events) > 0 {
		n := 1
		for n < len(events) && events[n].Key() == events[0].Key() {
			n++
		}
		if err := o.publish(ctx, events[0].Key(), events[:n]); err != nil {
			return err
		}
		events = events[n:]
	}
	return nil
}

func (o *outbox) publish(ctx context.Context, key string, events []event.Event) error {
	messages := make([]*message.Message, len(events))
	for i, e := range events {
		var err error
		if messages[i], err = NewMessage(e, o.keys); err != nil {
			return err
		}
		messages[i].SetContext(ctx)
	}
	promise := o.handover.Promise("", len(events))
	o.stored = append(o.stored, stored{promise: promise})
	table, err := wsql.NewPublisher(executor{o}, wsql.PublisherConfig{SchemaAdapter: outboxSchema{messages, events, o}}, nil)
	if err != nil {
		return err
	}
	return forwarder.NewPublisher(table, forwarder.PublisherConfig{ForwarderTopic: OutboxTopic}).Publish(key, messages...)
}

// committed hands the events over to the relay of this process. It reports whether that knows of all of them.
func (o *outbox) committed() (all bool) {
	all = true
	for _, s := range o.stored {
		if s.promise == nil {
			all = false
			continue
		}
		s.promise.Keep(s.rows)
	}
	o.stored = nil
	return all
}

// withdraw says that the events are not stored, or may not be. It does nothing after committed.
func (o *outbox) withdraw() {
	if o == nil {
		return
	}
	for _, s := range o.stored {
		s.promise.Withdraw()
	}
	o.stored = nil
}

// NewMessage returns the event as the message that announces it, under a new id, and signed if there is a key.
func NewMessage(e event.Event, keys event.Keys) (*message.Message, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return nil, err
	}
	body, err := event.Encode("evt_"+id.String(), time.Now(), e)
	if err != nil {
		return nil, err
	}
	msg := message.NewMessage("evt_"+id.String(), body)
	if signature := keys.Sign(body); signature != "" {
		msg.Metadata.Set(event.SignatureHeader, signature)
	}
	return msg, nil
}

// executor lets watermill-sql use our transaction, and nothing else of it.
type executor struct{ *outbox }

func (e executor) ExecContext(ctx context.Context, query string, args ...any) (wsql.Result, error) {
	result, err := e.tx.ExecContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	rows := e.stored[len(e.stored)-1].rows
	first, err := e.db.FirstID(result, len(rows))
	for i := range rows {
		rows[i].ID = first + int64(i)
	}
	return result, err
}

func (e executor) QueryContext(ctx context.Context, query string, args ...any) (wsql.Rows, error) {
	return e.tx.QueryContext(ctx, query, args...)
}

// outboxSchema tells watermill-sql's Publisher how to insert into our outbox table. The payload column is binary:
// a JSON column rewrites the bytes, and signatures would break. It is not for watermill-sql's Subscriber, whose
// locking read stops new orders while the broker is away, and whose adapters lose rows; a sqlqueue.Reader reads.
type outboxSchema struct {
	messages []*message.Message // as they are before they are enveloped
	events   []event.Event
	into     *outbox
}

// InsertQuery implements wsql.SchemaAdapter.
func (s outboxSchema) InsertQuery(p wsql.InsertQueryParams) (wsql.Query, error) {
	created := now()
	args := make([]any, 0, 6*len(p.Msgs))
	last := &s.into.stored[len(s.into.stored)-1]
	for i, msg := range p.Msgs { // envelopes, which have no metadata of their own
		args = append(args, msg.UUID, []byte(msg.Payload), created, s.messages[i].UUID, s.events[i].Key(), s.events[i].Subject())
		last.rows = append(last.rows, sqlqueue.Row{UUID: msg.UUID, Payload: msg.Payload})
	}
	attempts, availableAt := last.promise.Lease()
	return wsql.Query{
		Query: sqldb.Insert("outbox", "uuid, payload, created_at, event_id, event_key, order_id, attempts, available_at", len(p.Msgs), attempts, availableAt),
		Args:  args,
	}, nil
}

var errPublisherOnly = errors.New("the outbox is read by Database.Outbox")

// SelectQuery implements wsql.SchemaAdapter.
func (outboxSchema) SelectQuery(wsql.SelectQueryParams) (wsql.Query, error) {
	return wsql.Query{}, errPublisherOnly
}

// UnmarshalMessage implements wsql.SchemaAdapter.
func (outboxSchema) UnmarshalMessage(wsql.UnmarshalMessageParams) (wsql.Row, error) {
	return wsql.Row{}, errPublisherOnly
}

// SchemaInitializingQueries implements wsql.SchemaAdapter: migrations make the table.
func (outboxSchema) SchemaInitializingQueries(wsql.SchemaInitializingQueriesParams) ([]wsql.Query, error) {
	return nil, nil
}

// SubscribeIsolationLevel implements wsql.SchemaAdapter.
func (outboxSchema) SubscribeIsolationLevel() sql.IsolationLevel { return sql.LevelReadCommitted }

// Outbox returns a reader of the events in the outbox, for a forwarder. ready waits until they can be sent: rows are
// not taken while it waits. What the broker has confirmed goes over into outbox_confirmed.
func (d *Database) Outbox(ready func(ctx context.Context) error, onSettled func(acked, nacked int), logger *slog.Logger) *sqlqueue.Reader {
	return sqlqueue.NewReader(d.db, sqlqueue.Config{
		Table: "outbox", Bell: &d.bell, Handover: &d.handover, Ready: ready, Yield: true,
		Archive: d.confirmed, OnSettled: onSettled, Drain: relayDrain,
	}, logger)
}

// confirmed notes that the broker has the events of these rows. An event that two relays sent, because one outlived its
// lease, may be noted twice, as it was confirmed twice.
func (d *Database) confirmed(ctx context.Context, tx *sql.Tx, n int, names []any) error {
	_, err := tx.ExecContext(ctx, d.db.CopyByID("outbox", "outbox_confirmed", "event_id, event_key, order_id, created_at, confirmed_at",
		"event_id, event_key, order_id, created_at, ?", n, "uuid"), append([]any{now()}, names...)...)
	return err
}

// relayDrain is how long a closing relay waits for confirms. What is not confirmed by then is sent again.
const relayDrain = 5 * time.Second

// Pending returns how many events wait in the outbox, counting no further than limit, and since when the oldest
// does; zero if none does.
func (d *Database) Pending(ctx context.Context, limit int) (count int, oldest time.Time, err error) {
	err = d.db.Reader().QueryRowContext(ctx, "SELECT COUNT(*) FROM (SELECT 1 FROM outbox LIMIT ?) pending", limit).Scan(&count)
	if err != nil || count == 0 {
		return 0, time.Time{}, d.db.Error(err)
	}
	err = d.db.Reader().QueryRowContext(ctx, "SELECT created_at FROM outbox ORDER BY id LIMIT 1").Scan(&oldest)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, time.Time{}, nil
	}
	return count, oldest.UTC(), d.db.Error(err)
}
