package sqldb

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/gofrs/flock"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"takeout/domain"
)

func openSQLite(name, path string, logger *slog.Logger) (*DB, error) {
	path = strings.TrimPrefix(path, "//")
	if path == "" || strings.ContainsAny(path, "?#") {
		return nil, fmt.Errorf("the %s database URL must be sqlite: and the path of a file, without ? and #", name)
	}
	// FULL makes a commit survive a power cut. IMMEDIATE takes the write lock at BEGIN, where waiting for it works.
	dsn := func(params string) string {
		return "file:" + (&url.URL{Path: path}).EscapedPath() + "?_pragma=busy_timeout(5000)&_pragma=journal_mode(WAL)" +
			"&_pragma=synchronous(FULL)&_pragma=foreign_keys(1)&_time_format=sqlite" + params
	}
	write, err := sql.Open("sqlite", dsn("&_txlock=immediate"))
	if err != nil {
		return nil, fmt.Errorf("the %s database: %w", name, err)
	}
	write.SetMaxOpenConns(1)
	write.SetMaxIdleConns(1)
	read, err := sql.Open("sqlite", dsn("&_pragma=query_only(1)"))
	if err != nil {
		return nil, fmt.Errorf("the %s database: %w", name, err)
	}
	read.SetMaxOpenConns(4)
	read.SetMaxIdleConns(4)
	return &DB{
		Dialect: Dialect{
			Engine:   "sqlite",
			Now:      "CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER)",
			classify: classifySQLite,
		},
		name: name, target: "sqlite:" + path, path: path,
		write: write, read: read, logger: logger,
	}, nil
}

// Numbers of https://www.sqlite.org/rescode.html; the low byte is the primary code.
func classifySQLite(err error) class {
	e, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		if errors.Is(err, sql.ErrConnDone) {
			return unavailable
		}
		return other
	}
	switch e.Code() {
	case sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
		return duplicate
	case sqlite3.SQLITE_CONSTRAINT_CHECK:
		return refused
	}
	switch e.Code() & 0xff {
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
		return deadlock
	case sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY,
		sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_PERM, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_NOMEM:
		return unavailable
	case sqlite3.SQLITE_ERROR:
		if strings.Contains(e.Error(), "no such table") { // not set up, as 1146 on MySQL
			return unavailable
		}
	}
	return other
}

// Prepare makes the directory of a SQLite file. On MySQL it does nothing.
func (db *DB) Prepare() error {
	if db.path == "" {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(db.path), 0o750); err != nil {
		return fmt.Errorf("the %s database: %w", db.name, err)
	}
	return nil
}

// IsDamaged reports whether err says that a file is no SQLite database, or not any more. It does not get better by waiting.
func IsDamaged(err error) bool {
	e, ok := errors.AsType[*sqlite.Error](err)
	return ok && (e.Code()&0xff == sqlite3.SQLITE_CORRUPT || e.Code()&0xff == sqlite3.SQLITE_NOTADB)
}

// checkFile returns nil if this user may write to the file of a SQLite database, or there is none.
func (db *DB) checkFile() error {
	if db.path == "" {
		return nil
	}
	file, err := os.OpenFile(db.path, os.O_RDWR, 0)
	if err != nil {
		return db.kind(domain.Unavailable, "database_unavailable", "the %s database is not available", err)
	}
	return file.Close()
}

// Own claims a SQLite file for this process until Close, and says who has it if somebody else has. The embedded
// default leans on it: what a dead process had claimed can be taken back at once, because nobody else can be at
// work. On MySQL, where several processes share a database, it does nothing. It reports whether the database is
// this process's alone.
func (db *DB) Own() (bool, error) {
	if db.path == "" {
		return false, nil
	}
	if err := db.Prepare(); err != nil {
		return false, err
	}
	holder := db.path + ".lock"
	lock := flock.New(holder)
	ok, err := lock.TryLock()
	if err != nil {
		return false, fmt.Errorf("the %s database: cannot lock %s: %w", db.name, holder, err)
	}
	if !ok {
		pid, _ := os.ReadFile(holder)
		return false, fmt.Errorf("the %s database %s is in use by another takeout (process %s); stop it, or choose another "+
			"place with --data-dir", db.name, db.path, strings.TrimSpace(string(pid)))
	}
	db.lock = fileLock{lock}
	return true, os.WriteFile(holder, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o600)
}

type fileLock struct{ *flock.Flock }

func (l fileLock) release() error {
	if l.Flock == nil {
		return nil
	}
	return l.Unlock()
}

// Conn is a connection, or a pool of them.
type Conn interface {
	BeginTx(ctx context.Context, opts *sql.TxOptions) (*sql.Tx, error)
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// Unsynced runs work, whose commits do not wait until the disk has them. They survive the end of the process, and not a power
// cut: then they are undone from the last on, up to one that did wait. So it is only for what does no harm when it has to
// be done again, such as that a message was taken or acked. On MySQL, which syncs the commits of many connections at once,
// it makes no difference.
func (db *DB) Unsynced(ctx context.Context, work func(c Conn) error) error {
	if db.path == "" {
		return work(db.write)
	}
	conn, err := db.write.Conn(ctx)
	if err != nil {
		return err
	}
	defer func() {
		// Whatever became of the work, the next commit on this connection may be of an order.
		_, err := conn.ExecContext(context.WithoutCancel(ctx), "PRAGMA synchronous=FULL")
		if err != nil {
			_ = conn.Raw(func(any) error { return driver.ErrBadConn }) // a new one begins with FULL
		}
		_ = conn.Close()
	}()
	if _, err := conn.ExecContext(ctx, "PRAGMA synchronous=NORMAL"); err != nil {
		return err
	}
	return work(conn)
}

// Checkpoint folds the write-ahead log back into the file, so that a stopped program leaves one file behind. On
// MySQL it does nothing.
func (db *DB) Checkpoint(ctx context.Context) {
	if db.path == "" || db.Missing() { // it would be made
		return
	}
	if _, err := db.write.ExecContext(ctx, "PRAGMA wal_checkpoint(TRUNCATE)"); err != nil {
		db.logger.Debug("the write-ahead log stays", "database", db.name, "error", err)
	}
}

// isUnsynced reports whether SQLite could not bring something to the disk.
func isUnsynced(err error) bool {
	e, ok := errors.AsType[*sqlite.Error](err)
	return ok && e.Code() == sqlite3.SQLITE_IOERR_FSYNC
}
