// Package sqlstore keeps each service's state in its own database, together with its inbox, its outbox and the
// messages that its consumers gave up on.
package sqlstore

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"github.com/google/uuid"

	"takeout/adapters/sqldb"
	"takeout/adapters/sqlqueue"
	"takeout/app"
	"takeout/crashpoint"
	"takeout/domain"
	"takeout/domain/event"
)

//go:embed migrations
var migrations embed.FS

// Store is one service's database, with its tables as the use cases see them.
type Store[T any] struct {
	*Database
	bind func(q querier, outbox app.Outbox) T
}

// Database is what the databases of all services have in common: schema, inbox, outbox, retries, failures, history.
type Database struct {
	db        *sqldb.DB
	logger    *slog.Logger
	schema    []sqldb.Schema
	keys      event.Keys
	handover  sqlqueue.Handover // of events that were committed to the outbox
	bell      sqlqueue.Bell     // rung for those that could not be handed over
	retryBell sqlqueue.Bell     // rung when the time of retries has come
}

// querier is a transaction, or the pool when there is none.
type querier interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, query string, args ...any) *sql.Row
}

// OpenOrders returns the order service's database. Its events are signed with the keys. It does not connect.
func OpenOrders(rawURL string, keys event.Keys, logger *slog.Logger) (*Store[app.OrderTx], error) {
	return open("order", rawURL, keys, logger, func(db *sqldb.DB) func(querier, app.Outbox) app.OrderTx {
		return func(q querier, outbox app.Outbox) app.OrderTx {
			return app.OrderTx{Orders: orders{q, db}, Answers: answers{q, db}, Outbox: outbox, History: history{q}}
		}
	})
}

// OpenDispatches returns the dispatch service's database, as OpenOrders does.
func OpenDispatches(rawURL string, keys event.Keys, logger *slog.Logger) (*Store[app.DispatchTx], error) {
	return open("dispatch", rawURL, keys, logger, func(db *sqldb.DB) func(querier, app.Outbox) app.DispatchTx {
		return func(q querier, outbox app.Outbox) app.DispatchTx {
			return app.DispatchTx{Dispatches: dispatches{q, db}, Couriers: couriers{q, db}, Outbox: outbox, History: history{q}}
		}
	})
}

// OpenPayments returns the payment service's database, as OpenOrders does. The gateway may have tables in it too: their
// schema is migrated and checked with the service's own.
func OpenPayments(rawURL string, keys event.Keys, logger *slog.Logger, gateway ...sqldb.Schema) (*Store[app.PaymentTx], error) {
	s, err := open("payment", rawURL, keys, logger, func(db *sqldb.DB) func(querier, app.Outbox) app.PaymentTx {
		return func(q querier, outbox app.Outbox) app.PaymentTx {
			return app.PaymentTx{Payments: payments{q, db}, Outbox: outbox, History: history{q}}
		}
	})
	if err == nil {
		s.schema = append(s.schema, gateway...)
	}
	return s, err
}

// OpenPoints returns the points service's database, as OpenOrders does.
func OpenPoints(rawURL string, keys event.Keys, logger *slog.Logger) (*Store[app.PointsTx], error) {
	return open("points", rawURL, keys, logger, func(db *sqldb.DB) func(querier, app.Outbox) app.PointsTx {
		return func(q querier, outbox app.Outbox) app.PointsTx {
			return app.PointsTx{Ledger: ledger{q, db}, Outbox: outbox, History: history{q}}
		}
	})
}

func open[T any](service, rawURL string, keys event.Keys, logger *slog.Logger, bind func(*sqldb.DB) func(querier, app.Outbox) T) (*Store[T], error) {
	db, err := sqldb.Open(service, rawURL, logger)
	if err != nil {
		return nil, err
	}
	schema := make([]sqldb.Schema, 0, 2)
	for _, name := range []string{"messaging", service} {
		files, err := fs.Sub(migrations, "migrations/"+name)
		if err != nil {
			return nil, err
		}
		schema = append(schema, sqldb.Schema{Name: name, Files: files})
	}
	return &Store[T]{&Database{db: db, logger: logger, schema: schema, keys: keys}, bind(db)}, nil
}

// DB returns the database itself.
func (d *Database) DB() *sqldb.DB { return d.db }

// Migrate brings the tables to what this program knows, and marks the database as this service's. It returns the
// names of the migrations that it ran. It refuses a database that belongs to another service.
func (d *Database) Migrate(ctx context.Context) ([]string, error) {
	if err := d.db.Prepare(); err != nil {
		return nil, err
	}
	if err := d.checkOwner(ctx); err != nil {
		return nil, err
	}
	ran, err := d.db.Migrate(ctx, d.schema...)
	if err != nil {
		return ran, err
	}
	if err := d.claim(ctx); err != nil {
		return ran, fmt.Errorf("mark the database as the %s service's: %w", d.db.Name(), err)
	}
	return ran, watch(ctx, d.db, d.logger)
}

// ErrOtherService says that a database is another service's.
var ErrOtherService = errors.New("each service needs a database of its own")

// checkOwner returns ErrOtherService if the database belongs to another service.
func (d *Database) checkOwner(ctx context.Context) error {
	var owner string
	err := d.db.Writer().QueryRowContext(ctx, "SELECT service FROM owner").Scan(&owner)
	switch {
	case errors.Is(err, sql.ErrNoRows), err != nil && sqldb.IsMissingTable(err): // nobody's yet
		return nil
	case err != nil:
		return d.db.Error(err)
	case owner != d.db.Name():
		return d.belongsTo(owner)
	}
	return nil
}

func (d *Database) belongsTo(owner string) error {
	return fmt.Errorf("the %s database %s belongs to the %s service: %w", d.db.Name(), d.db.Target(), owner, ErrOtherService)
}

// claim writes the service's name into the database, or compares it with the one that is there.
func (d *Database) claim(ctx context.Context) error {
	return d.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		var owner string
		err := tx.QueryRowContext(ctx, "SELECT service FROM owner"+d.db.ForUpdate).Scan(&owner)
		if errors.Is(err, sql.ErrNoRows) {
			_, err = tx.ExecContext(ctx, "INSERT INTO owner (service, database_id, created_at) VALUES (?, ?, ?)",
				d.db.Name(), uuid.NewString(), now())
			if d.db.IsDuplicate(err) { // another process of this service was faster
				return nil
			}
			return err
		}
		if err == nil && owner != d.db.Name() {
			return d.belongsTo(owner)
		}
		return err
	})
}

// TakeBack makes every event that a dead relay had taken, and every retry that a dead consumer had, available at once.
// It is right only where no other process can be working on this database.
func (d *Database) TakeBack(ctx context.Context) error {
	return errors.Join(sqlqueue.TakeBack(ctx, d.db, "outbox"), sqlqueue.TakeBack(ctx, d.db, "retry"))
}

// CheckSchema returns nil if the tables are what this program knows, and this service's: otherwise an error of
// sqldb.DB.CheckSchema or ErrOtherService.
func (d *Database) CheckSchema(ctx context.Context) error {
	if err := d.checkOwner(ctx); err != nil {
		return err
	}
	return d.db.CheckSchema(ctx, d.schema...)
}

// InTx implements app.Store.
func (s *Store[T]) InTx(ctx context.Context, fn func(ctx context.Context, tx T) error) error {
	var out *outbox
	delivered := app.DeliveriesFrom(ctx)
	defer func() { out.withdraw() }()
	err := s.db.InTx(ctx, func(ctx context.Context, tx *sql.Tx) error {
		out.withdraw() // of the attempt before
		out = &outbox{tx: tx, db: s.db, keys: s.keys, handover: &s.handover}
		reached(delivered, "before-inbox")
		if err := record(ctx, s.db, tx, delivered); err != nil {
			return err
		}
		reached(delivered, "after-inbox")
		err := fn(ctx, s.bind(tx, out))
		if err == nil {
			reached(delivered, "before-commit")
		}
		return err
	})
	if errors.Is(err, errRecorded) {
		return s.db.Error(recorded(ctx, s.db, delivered))
	}
	if err != nil {
		return err
	}
	reached(delivered, "after-commit")
	if !out.committed() {
		s.bell.Ring()
	}
	return nil
}

// View implements app.Store.
func (s *Store[T]) View(ctx context.Context, fn func(ctx context.Context, tx T) error) error {
	return s.db.Error(fn(ctx, s.bind(s.db.Reader(), nil)))
}

// lockingRead follows a SELECT in a transaction and makes it see every committed row, which then stays as it is; outside of
// transactions it is empty. After InnoDB has refused a key as taken, a plain SELECT may still miss the row: a transaction
// that is being committed frees its locks a moment before new views see its rows (MariaDB 10.11, trx_t::commit_in_memory).
func lockingRead(q querier, db *sqldb.DB) string {
	if _, inTx := q.(*sql.Tx); inTx {
		return db.ForShare
	}
	return ""
}

// reached says that each of the deliveries has come to this point of its handling.
func reached(delivered []app.Delivery, phase string) {
	for _, d := range delivered {
		crashpoint.In(d.Consumer, phase)
	}
}

// Close closes the database.
func (d *Database) Close() error { return d.db.Close() }

// now is the time that goes into business columns: UTC, to the microsecond.
func now() time.Time { return domain.Micro(time.Now()) }
