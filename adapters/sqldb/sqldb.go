// Package sqldb opens a database by URL and runs transactions on it: MySQL or MariaDB for production, SQLite for a
// machine with nothing installed. What differs between the two is in mysql.go, in sqlite.go, in the migrations, and
// where Engine is asked.
package sqldb

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/go-sql-driver/mysql"

	"takeout/domain"
)

// DB is one database of one service. Its methods are safe for concurrent use.
type DB struct {
	Dialect

	name   string        // what it is in messages: "order"
	target string        // where it is, without the password
	path   string        // the file of SQLite, empty for MySQL
	server *mysql.Config // how to reach MySQL, nil for SQLite
	write  *sql.DB
	read   *sql.DB // the same as write on MySQL
	lock   fileLock
	file   os.FileInfo // of SQLite, as it was when the schema was found right
	logger *slog.Logger

	trouble trouble
	gone    atomic.Bool // the file is not the one of SQLite any more, and it was said
}

// Dialect is what MySQL and SQLite say differently. Its strings are parts of statements.
type Dialect struct {
	Engine     string // "mysql" or "sqlite"
	Now        string // the server's clock in microseconds since 1970 UTC: leases must not depend on ours
	ForUpdate  string // locks the rows that a SELECT reads
	ForShare   string // keeps the rows that a SELECT reads as they are
	SkipLocked string // leaves out the rows that somebody else has locked; follows ForUpdate

	classify func(error) class
}

// class is what can be done about an error of the database.
type class int

const (
	other       class = iota
	duplicate         // a unique key is taken
	deadlock          // the transaction was rolled back to let another go on; run it again
	lockWait          // somebody else holds a lock for too long
	unavailable       // the server is away, full, read-only or not ours to use; the statement is not the problem
	refused           // the server will never take this value
)

// Open returns the database at rawURL: mysql://user:password@host:port/database or sqlite:path. The name says in
// messages which database it is. It does not connect. An error never contains the password.
func Open(name, rawURL string, logger *slog.Logger) (*DB, error) {
	scheme, rest, _ := strings.Cut(rawURL, ":")
	switch scheme {
	case "mysql":
		return openMySQL(name, rawURL, logger)
	case "sqlite":
		return openSQLite(name, rest, logger)
	}
	return nil, fmt.Errorf("the scheme of the %s database URL must be mysql or sqlite", name)
}

// Target says where the database is, without a password, for logs and messages.
func (db *DB) Target() string { return db.target }

// Name returns the name that Open was given.
func (db *DB) Name() string { return db.name }

// Reader returns the pool for reading what is committed.
func (db *DB) Reader() *sql.DB { return db.read }

// Writer returns the pool for single statements that write.
func (db *DB) Writer() *sql.DB { return db.write }

// Ping returns nil if the database answers, an Unavailable error if not.
func (db *DB) Ping(ctx context.Context) error {
	var one int
	return db.Error(db.write.QueryRowContext(ctx, "SELECT 1").Scan(&one))
}

// Clock returns what time the database has.
func (db *DB) Clock(ctx context.Context) (time.Time, error) {
	var micros int64
	err := db.read.QueryRowContext(ctx, "SELECT "+db.Now).Scan(&micros)
	return time.UnixMicro(micros).UTC(), db.Error(err)
}

// Close closes the connections and releases the file.
func (db *DB) Close() error {
	err := db.write.Close()
	if db.read != db.write {
		err = errors.Join(err, db.read.Close())
	}
	return errors.Join(err, db.lock.release())
}

const (
	deadlockRetries = 4
	// resolveTime is how long InTx goes on asking what became of a COMMIT whose answer was lost.
	resolveTime = 8 * time.Second
)

// InTx runs fn in a READ COMMITTED transaction on MySQL and in an immediate one on SQLite, and commits unless fn
// fails. It runs fn again after a deadlock, and when the connection broke at COMMIT: then nobody knows whether the
// transaction took effect, and it is fn's own unique keys that tell, because they wait for a transaction that is
// still being committed, as often as it takes. Errors come as Error makes them; one that could not be resolved has the code
// outcome_unknown.
func (db *DB) InTx(ctx context.Context, fn func(ctx context.Context, tx *sql.Tx) error) error {
	return db.InTxOn(ctx, db.write, fn)
}

// InTxOn is InTx on a connection that Unsynced gave.
func (db *DB) InTxOn(ctx context.Context, c Conn, fn func(ctx context.Context, tx *sql.Tx) error) (err error) {
	defer func() {
		db.trouble.note(err)
		err = db.WriteError(ctx, err)
	}()
	var unknown error
	var resolveUntil time.Time
	for attempt := 1; ; attempt++ {
		err, committing := db.runTx(ctx, c, fn)
		if err == nil {
			return nil
		}
		if committing && db.outcomeUnknown(err) {
			if unknown == nil {
				resolveUntil = time.Now().Add(resolveTime)
			}
			unknown = err
			db.logger.Warn("the answer to COMMIT was lost; asking the database what it did", "database", db.name, "error", err)
		}
		err = db.Error(err)
		// Busy: the first one may hold the locks.
		unresolved := unknown != nil && (domain.KindOf(err) == domain.Unavailable || domain.KindOf(err) == domain.Busy || ctx.Err() != nil)
		retry := db.classify(err) == deadlock && attempt <= deadlockRetries || unresolved && time.Now().Before(resolveUntil)
		if retry && sleep(ctx, backoff(attempt)) {
			continue
		}
		if unresolved {
			return db.kind(domain.Unavailable, "outcome_unknown",
				"the %s database did not say whether it stored this; ask again with the same id or key", unknown)
		}
		return err
	}
}

// runTx runs fn in a transaction once. committing reports whether an error came from COMMIT.
func (db *DB) runTx(ctx context.Context, c Conn, fn func(ctx context.Context, tx *sql.Tx) error) (err error, committing bool) {
	tx, err := c.BeginTx(ctx, nil)
	if err != nil {
		return err, false
	}
	// After an error a transaction on MySQL may still be open with half of its work done, so it is always ended.
	defer func() { _ = tx.Rollback() }()
	if err := fn(ctx, tx); err != nil {
		return err, false
	}
	if err := db.checkSameFile(); err != nil { // last of all: nothing is promised that goes into a file that is gone
		return err, false
	}
	return commit(ctx, tx), true
}

var errNoAnswer = errors.New("COMMIT was not answered in time")

// commit commits, and stops waiting for the answer when ctx's time is over: database/sql itself would wait for the
// driver to give up.
func commit(ctx context.Context, tx *sql.Tx) error {
	if _, limited := ctx.Deadline(); !limited {
		return tx.Commit()
	}
	answer := make(chan error, 1)
	go func() { answer <- tx.Commit() }()
	select {
	case err := <-answer:
		return err
	case <-ctx.Done():
		return errNoAnswer
	}
}

// outcomeUnknown reports whether err, from COMMIT, leaves open whether the transaction took effect: every error but
// the server's own refusal, and those with which database/sql did not send the COMMIT. SQLite has no connection that
// could break: its COMMIT fails, as on a full disk, or does not. But one whose sync failed is in the log already, and takes
// effect if the process ends before another is written over it.
func (db *DB) outcomeUnknown(err error) bool {
	return errors.Is(err, errNoAnswer) || isUnsynced(err) || db.path == "" && db.classify(err) == unavailable &&
		!errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, sql.ErrTxDone)
}

func backoff(attempt int) time.Duration {
	limit := 20 * time.Millisecond << min(attempt, 5)
	return time.Duration(rand.Int64N(int64(limit))) + time.Millisecond
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// IsDuplicate reports whether err says that a unique key is taken.
func (db *DB) IsDuplicate(err error) bool { return db.classify(err) == duplicate }

// Error gives an error of the database its kind: Unavailable if the database is away or does not work, Busy if
// somebody holds a lock for too long, Invalid if it will never take a value. Errors that have a kind, and nil, stay
// as they are.
func (db *DB) Error(err error) error {
	if err == nil || domain.KindOf(err) != domain.Unknown || errors.Is(err, context.Canceled) {
		return err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return db.kind(domain.Unavailable, "database_slow", "the %s database did not answer in time", err)
	}
	switch db.classify(err) {
	case unavailable:
		return db.kind(domain.Unavailable, "database_unavailable", "the %s database is not available", err)
	case lockWait, deadlock: // a deadlock comes here after InTx's attempts; SQLite says so when another program has the file
		return db.kind(domain.Busy, "lock_wait", "somebody else is changing the same rows of the %s database", err)
	case refused:
		return db.kind(domain.Invalid, "value_refused", "the %s database refuses a value", err)
	}
	return err
}

func (db *DB) kind(kind domain.Kind, code, format string, cause error) error {
	return &domain.Error{Kind: kind, Code: code, Message: fmt.Sprintf(format, db.name), Cause: cause}
}

// parseURL is url.Parse with an error that does not repeat the URL, which holds a password.
func parseURL(name, rawURL string) (*url.URL, error) {
	u, err := url.Parse(rawURL)
	// An @ behind the host is the end of a password that had an unescaped character before it.
	if err != nil || u.Opaque != "" || u.Fragment != "" || strings.ContainsAny(u.EscapedPath()+u.RawQuery, "@ ") {
		return nil, fmt.Errorf("the %s database URL cannot be read; it must be mysql://user:password@host:port/database, "+
			"with special characters in the password written as %%XX", name)
	}
	return u, nil
}

// Remedy says what to do about an error of Ping, for the person who can.
func (db *DB) Remedy(err error) string {
	if db.Engine == "sqlite" {
		if IsDamaged(err) {
			return "the file is damaged, or no database: stop takeout, move it away with its -wal and -shm, and restore a copy; " +
				"what the other services know is made again from them"
		}
		return "check that the disk has room, and that this user may write to the file and its directory"
	}
	if e, ok := errors.AsType[*domain.Error](err); ok && e.Code == "database_read_only" {
		return "name the primary in the URL, or SET GLOBAL read_only = 0 if this is it"
	}
	if e, ok := errors.AsType[*mysql.MySQLError](err); ok {
		switch e.Number {
		case 1044, 1045, 1142:
			return "check user and password in the URL, and what the user may do: GRANT ALL ON <database>.* TO <user>"
		case 1049:
			return "make the database, or let takeout migrate make it: CREATE DATABASE … CHARACTER SET utf8mb4"
		case 1040, 1203, 1226:
			return "raise max_connections; each process uses up to 32 for each database"
		case 1047:
			return "bring the other nodes of its Galera cluster back: it has no majority, or is not up to date; SHOW STATUS LIKE 'wsrep%' tells more"
		}
	}
	return "start the server, and check host and port in the URL"
}

// Missing reports whether a SQLite file does not exist.
func (db *DB) Missing() bool {
	if db.path == "" {
		return false
	}
	_, err := os.Stat(db.path)
	return errors.Is(err, os.ErrNotExist)
}
