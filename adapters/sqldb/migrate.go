package sqldb

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"regexp"
	"strings"
	"time"

	"github.com/go-sql-driver/mysql"
	"github.com/gofrs/flock"
	"github.com/pressly/goose/v3"
)

// Schema is a set of migrations: a folder for each dialect, and in it files as goose reads them.
type Schema struct {
	Name  string // of the set; its versions are kept in the table schema_<name>
	Files fs.FS  // holds mysql/ and sqlite/
}

// ErrSchemaNewer says that the database was migrated by a newer program.
var ErrSchemaNewer = errors.New("the schema is newer than this program")

// ErrSchemaOlder says that migrations are missing.
var ErrSchemaOlder = errors.New("the schema is older than this program; run: takeout migrate")

// Migrate brings the database to the schemas' newest versions, and returns the names of the migrations that it ran.
// It is safe in any number of processes at once. It fails with ErrSchemaNewer, and changes nothing, if a newer
// program was here.
func (db *DB) Migrate(ctx context.Context, schemas ...Schema) ([]string, error) {
	if err := db.Prepare(); err != nil {
		return nil, err
	}
	unlock, err := db.lockMigrations(ctx)
	if err != nil {
		return nil, fmt.Errorf("migrate the %s database: %w", db.name, db.Error(err))
	}
	defer unlock()
	pool, closePool, err := db.migrationPool()
	if err != nil {
		return nil, err
	}
	defer closePool()
	var ran []string
	for _, s := range schemas {
		provider, err := db.provider(s, pool)
		if err != nil {
			return ran, err
		}
		if _, _, err := db.versions(ctx, s, provider); err != nil {
			return ran, fmt.Errorf("the %s database: %w", db.name, err)
		}
		results, err := provider.Up(ctx)
		if err != nil {
			return ran, fmt.Errorf("migrate the %s database: %w", db.name, db.Error(err))
		}
		for _, r := range results {
			ran = append(ran, s.Name+"/"+r.Source.Path)
		}
	}
	return ran, db.rememberFile()
}

// CheckSchema returns nil if the database is exactly at the schemas' newest versions, ErrSchemaOlder, ErrSchemaNewer
// or an Unavailable error. It changes nothing.
func (db *DB) CheckSchema(ctx context.Context, schemas ...Schema) error {
	for _, s := range schemas {
		provider, err := db.provider(s, db.write)
		if err != nil {
			return err
		}
		current, newest, err := db.versions(ctx, s, provider)
		if err == nil && current < newest {
			err = ErrSchemaOlder
		}
		if err != nil {
			return fmt.Errorf("the %s database: %w", db.name, err)
		}
	}
	return db.rememberFile()
}

// versions returns the version that the database is at and the newest one that this program knows, and ErrSchemaNewer
// if the first is higher. It asks the table itself: goose would make it.
func (db *DB) versions(ctx context.Context, s Schema, provider *goose.Provider) (current, newest int64, err error) {
	sources := provider.ListSources()
	newest = sources[len(sources)-1].Version
	err = db.write.QueryRowContext(ctx, "SELECT COALESCE(MAX(version_id), 0) FROM "+s.table()).Scan(&current)
	if err != nil && !IsMissingTable(err) {
		return 0, newest, db.Error(err)
	}
	if current > newest {
		return current, newest, fmt.Errorf("it is at version %d and this program knows %d: %w; start the newer program",
			current, newest, ErrSchemaNewer)
	}
	return current, newest, nil
}

// IsMissingTable reports whether the database says that there is no such table.
func IsMissingTable(err error) bool {
	if e, ok := errors.AsType[*mysql.MySQLError](err); ok {
		return e.Number == 1146
	}
	return strings.Contains(err.Error(), "no such table")
}

// table is where the versions of the schema are kept.
func (s Schema) table() string { return "schema_" + s.Name }

func (db *DB) provider(s Schema, pool *sql.DB) (*goose.Provider, error) {
	dialect := goose.DialectMySQL
	if db.Engine == "sqlite" {
		dialect = goose.DialectSQLite3
	}
	files, err := fs.Sub(s.Files, db.Engine)
	if err != nil {
		return nil, err
	}
	return goose.NewProvider(dialect, pool, files,
		goose.WithTableName(s.table()), goose.WithDisableGlobalRegistry(true))
}

// migrationPool returns connections for migrations. SQLite undoes a migration that fails. MySQL commits each statement that
// changes a table, so that a migration which was interrupted must be able to go on.
func (db *DB) migrationPool() (pool *sql.DB, closePool func(), err error) {
	if db.server == nil {
		return db.write, func() {}, nil
	}
	cfg := db.server.Clone()
	cfg.ReadTimeout = 0 // a large table takes as long as it takes; a server that is gone is noticed by keepalive
	connector, err := mysql.NewConnector(cfg)
	if err != nil {
		return nil, nil, err
	}
	pool = sql.OpenDB(migrating{sessions{connector}})
	return pool, func() { _ = pool.Close() }, nil
}

type migrating struct{ sessions }

func (m migrating) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := m.sessions.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return migration{conn.(session)}, nil
}

// migration is a connection that takes a statement for done whose effect is there from a run that was interrupted.
type migration struct{ session }

func (m migration) ExecContext(ctx context.Context, statement string, args []driver.NamedValue) (driver.Result, error) {
	result, err := m.session.ExecContext(ctx, statement, args)
	if err != nil && m.isDone(ctx, statement, err) {
		return driver.ResultNoRows, nil
	}
	return result, err
}

var creates = regexp.MustCompile(`CREATE TABLE (\w+)`)

// isDone reports whether err says that the statement had its effect before. One ALTER has all of it or none.
func (m migration) isDone(ctx context.Context, statement string, err error) bool {
	e, ok := errors.AsType[*mysql.MySQLError](err)
	if !ok {
		return false
	}
	switch e.Number {
	case 1060, 1061, 1091: // the column is there, the key is there, what is dropped is not
		return true
	case 1050: // The table is there, and ours if nobody has used it.
		name := creates.FindStringSubmatch(statement)
		return name != nil && m.isEmpty(ctx, name[1])
	}
	return false
}

func (m migration) isEmpty(ctx context.Context, table string) bool {
	rows, err := m.QueryContext(ctx, "SELECT 1 FROM "+table+" LIMIT 1", nil)
	if err != nil {
		return false
	}
	defer func() { _ = rows.Close() }()
	return errors.Is(rows.Next(make([]driver.Value, 1)), io.EOF)
}

// lockMigrations waits until this process is the only one that migrates. goose by itself lets several collide.
func (db *DB) lockMigrations(ctx context.Context) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if db.path != "" {
		lock := flock.New(db.path + ".migrate.lock")
		if _, err := lock.TryLockContext(ctx, 20*time.Millisecond); err != nil {
			return nil, err
		}
		return func() { _ = lock.Unlock() }, nil
	}
	conn, err := db.write.Conn(ctx)
	if err != nil {
		return nil, err
	}
	release := func() {
		// Its server is more patient than that of others, so it does not go back to them.
		_ = conn.Raw(func(any) error { return driver.ErrBadConn })
		_ = conn.Close()
	}
	// It is silent while migrations run on another connection. If the process hangs, the others wait for this long.
	if _, err := conn.ExecContext(ctx, "SET SESSION wait_timeout = 600"); err != nil {
		release()
		return nil, err
	}
	const name = "CONCAT('takeout.migrate.', LEFT(SHA2(DATABASE(), 256), 32))" // a lock's name is the server's, not the database's
	for {
		// The driver gives up reading after 10 s, so waiting is asked for in shorter turns.
		var got sql.NullInt64
		if err := conn.QueryRowContext(ctx, "SELECT GET_LOCK("+name+", 2)").Scan(&got); err != nil {
			release()
			return nil, err
		}
		if got.Int64 == 1 {
			break
		}
	}
	return func() {
		_, _ = conn.ExecContext(context.WithoutCancel(ctx), "DO RELEASE_LOCK("+name+")")
		release()
	}, nil
}
