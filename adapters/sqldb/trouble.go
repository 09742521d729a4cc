package sqldb

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"takeout/domain"
)

// trouble remembers that transactions fail because the database cannot do its work: it may still answer what only reads,
// with its disk full or in the hands of another primary.
type trouble struct {
	mu          sync.Mutex
	err         error
	since, last time.Time
}

const (
	// troubleLasts is how long a failure counts, so that somebody who asks now and then sees it although reading succeeds.
	troubleLasts = 15 * time.Second
	// blip is for how long failures come at least, or it was one moment.
	blip = time.Second
)

func (t *trouble) note(err error) {
	if domain.KindOf(err) != domain.Unavailable {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if now.Sub(t.last) > troubleLasts {
		t.since = now
	}
	t.err, t.last = err, now
}

func (t *trouble) now() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil || time.Since(t.last) > troubleLasts || t.last.Sub(t.since) < blip {
		return nil
	}
	return t.err
}

// ErrFileGone says that the file of a SQLite database was deleted or replaced while it was in use. What would be stored would go
// into the old one, and be lost with the process: transactions fail.
var ErrFileGone = errors.New("the file was deleted or replaced while it is in use: nothing more is stored; " +
	"stop the program, and put the right file there before it is started again")

// rememberFile keeps which file this process uses.
func (db *DB) rememberFile() (err error) {
	if db.path != "" {
		db.file, err = os.Stat(db.path)
	}
	return err
}

// findFile returns ErrFileGone if the file of SQLite is not the one that this process uses.
func (db *DB) findFile() error {
	if db.file == nil {
		return nil
	}
	if now, err := os.Stat(db.path); err != nil || !os.SameFile(db.file, now) {
		return fmt.Errorf("%s: %w", db.path, ErrFileGone)
	}
	return nil
}

// checkSameFile is findFile for a transaction. Only the first of those that fail says so in the log.
func (db *DB) checkSameFile() error {
	err := db.findFile()
	if was := db.gone.Swap(err != nil); err != nil && !was {
		db.logger.Error("the database takes no changes any more", "database", db.name, "error", err)
	}
	if err != nil {
		return db.kind(domain.Unavailable, "database_unavailable", "the %s database is not available", err)
	}
	return nil
}

// Trouble returns why transactions of this process failed within the last moments although the database may answer, nil if
// they did not, or ErrFileGone. The error is Unavailable otherwise.
func (db *DB) Trouble(ctx context.Context) error {
	if err := db.findFile(); err != nil {
		return err
	}
	err := db.trouble.now()
	if err != nil && db.isReadOnly(ctx) {
		return fmt.Errorf("%w: %w", errReadOnly, err)
	}
	return err
}

var errReadOnly = errors.New("the server is read-only")

// WriteError is Error for a statement that writes and is not in InTx, which says the same: if the driver left a server that is
// read-only, it says so. It may ask the server.
func (db *DB) WriteError(ctx context.Context, err error) error {
	err = db.Error(err)
	if !errors.Is(err, driver.ErrBadConn) || errors.Is(err, errReadOnly) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second) // it may be away altogether
	defer cancel()
	if db.isReadOnly(ctx) {
		return fmt.Errorf("%w: %w", errReadOnly, err)
	}
	return err
}

// isReadOnly reports whether the server says that it takes no changes of ordinary users. The driver leaves a server that
// refuses one for this reason, without a word of why.
func (db *DB) isReadOnly(ctx context.Context) bool {
	var readOnly bool
	return db.server != nil && db.read.QueryRowContext(ctx, "SELECT @@read_only").Scan(&readOnly) == nil && readOnly
}

// CheckWritable returns nil if nothing is known that would keep this process from changing the database. It changes nothing.
func (db *DB) CheckWritable(ctx context.Context) error {
	if db.isReadOnly(ctx) {
		return db.kind(domain.Unavailable, "database_read_only", "the %s database's server is read-only", nil)
	}
	return db.checkFile()
}
