package sqldb

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/go-sql-driver/mysql"
)

// maxConns is the number of connections of one process to one MySQL database. More are slower: on two cores the
// order transaction peaked at about 32 and lost a third at 128.
const maxConns = 32

// silence is how long the server waits for the next statement before it gives up a connection, with its transaction
// and its locks. A process that hangs, or whose machine is gone, ends nothing by itself, and the server's own patience
// is eight hours. Two leases, because what is leased is done again no sooner than after one.
const silence = 20 * time.Second

// mysqlConfig returns how to reach the database at the URL, and what its sessions are like.
func mysqlConfig(name, rawURL string, logger *slog.Logger) (*mysql.Config, error) {
	u, err := parseURL(name, rawURL)
	if err != nil {
		return nil, err
	}
	cfg := mysql.NewConfig()
	cfg.User = u.User.Username()
	cfg.Passwd, _ = u.User.Password()
	cfg.Net = "tcp"
	cfg.Addr = u.Host
	if u.Port() == "" {
		cfg.Addr = net.JoinHostPort(u.Hostname(), "3306")
	}
	if len(u.Path) > 1 {
		cfg.DBName = u.Path[1:]
	}
	if u.Hostname() == "" || cfg.DBName == "" {
		return nil, fmt.Errorf("the %s database URL must name a host and a database: mysql://user:password@host:port/database", name)
	}
	for key, values := range u.Query() {
		if key != "tls" {
			return nil, fmt.Errorf("the %s database URL has another parameter than tls, which is the only one", name)
		}
		cfg.TLSConfig = values[len(values)-1]
	}
	cfg.Timeout = 3 * time.Second
	cfg.ReadTimeout = 10 * time.Second
	cfg.WriteTimeout = 10 * time.Second
	cfg.ParseTime = true
	cfg.Loc = time.UTC
	cfg.InterpolateParams = true // one round trip a statement; safe with utf8mb4
	cfg.ClientFoundRows = true   // an UPDATE that changes nothing still found its row
	cfg.RejectReadOnly = true    // after a failover, dial again instead of staying with the old primary
	cfg.Collation = "utf8mb4_bin"
	cfg.Logger = slogLogger{logger.With("database", name)}
	cfg.Params = map[string]string{
		"time_zone":                "'+00:00'",
		"sql_mode":                 "'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION,ERROR_FOR_DIVISION_BY_ZERO'",
		"autocommit":               "1",
		"completion_type":          "0", // COMMIT begins no other transaction
		"unique_checks":            "1",
		"sql_safe_updates":         "0",
		"sql_select_limit":         "18446744073709551615", // none
		"innodb_lock_wait_timeout": "2",                    // seconds; a request has 5
		"lock_wait_timeout":        "5",                    // seconds; everybody has to wait behind a migration that waits for a table
		"wait_timeout":             strconv.Itoa(int(silence.Seconds())),
	}
	return cfg, nil
}

func openMySQL(name, rawURL string, logger *slog.Logger) (*DB, error) {
	cfg, err := mysqlConfig(name, rawURL, logger)
	if err != nil {
		return nil, err
	}
	connector, err := mysql.NewConnector(cfg)
	if err != nil {
		return nil, fmt.Errorf("the %s database URL cannot be used: %w", name, err)
	}
	pool := sql.OpenDB(sessions{connector})
	pool.SetMaxOpenConns(maxConns)
	pool.SetMaxIdleConns(maxConns)
	pool.SetConnMaxLifetime(3 * time.Minute)
	pool.SetConnMaxIdleTime(silence / 2)
	return &DB{
		Dialect: Dialect{
			Engine:     "mysql",
			Now:        "CAST(UNIX_TIMESTAMP(NOW(6)) * 1000000 AS SIGNED)",
			ForUpdate:  " FOR UPDATE",
			ForShare:   " LOCK IN SHARE MODE",
			SkipLocked: " SKIP LOCKED",
			classify:   classifyMySQL,
		},
		name: name, target: "mysql://" + cfg.Addr + "/" + cfg.DBName,
		write: pool, read: pool, logger: logger, server: cfg,
	}, nil
}

// IsAbsent reports whether err says that a MySQL server has no database of that name.
func (db *DB) IsAbsent(err error) bool {
	e, ok := errors.AsType[*mysql.MySQLError](err)
	return ok && e.Number == 1049
}

// CreateIfMissing makes the database if err, from a statement on it, says that the server has none of that name, and
// reports whether it did. SQLite makes its file by itself.
func (db *DB) CreateIfMissing(ctx context.Context, err error) bool {
	if !db.IsAbsent(err) {
		return false
	}
	cfg := db.server.Clone()
	cfg.DBName = ""
	connector, err := mysql.NewConnector(cfg)
	if err != nil {
		return false
	}
	server := sql.OpenDB(connector)
	defer server.Close()
	_, err = server.ExecContext(ctx, "CREATE DATABASE IF NOT EXISTS `"+strings.ReplaceAll(db.server.DBName, "`", "``")+
		"` CHARACTER SET utf8mb4 COLLATE utf8mb4_bin")
	return err == nil
}

// sessions sets the isolation level once for each connection. MySQL 8 and MariaDB 10 do not know each other's
// name of the variable, and BeginTx would send the level before each transaction.
//
// The level is what keeps the relay's locking reads from locking the gap that new orders are inserted into.
type sessions struct{ driver.Connector }

func (s sessions) Connect(ctx context.Context) (driver.Conn, error) {
	conn, err := s.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	opened := session{conn.(mysqlConn)}
	if _, err := opened.ExecContext(ctx, "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED", nil); err != nil {
		_ = opened.Close()
		return nil, err
	}
	return opened, nil
}

// mysqlConn is what database/sql knows of the driver's connections.
type mysqlConn interface {
	driver.Conn
	driver.ConnBeginTx
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.QueryerContext
	driver.NamedValueChecker
	driver.Pinger
	driver.SessionResetter
	driver.Validator
}

// session is a connection that closes when a transaction on it does not end. Otherwise the next BEGIN would commit what is
// left of it.
type session struct{ mysqlConn }

func (s session) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	tx, err := s.mysqlConn.BeginTx(ctx, opts)
	return transaction{tx, s}, err
}

type transaction struct {
	driver.Tx
	session session
}

func (t transaction) Commit() error   { return t.ended(t.Tx.Commit()) }
func (t transaction) Rollback() error { return t.ended(t.Tx.Rollback()) }

func (t transaction) ended(err error) error {
	if err != nil {
		_ = t.session.Close()
	}
	return err
}

// Numbers of https://dev.mysql.com/doc/mysql-errors/8.4/en/server-error-reference.html, alike on MariaDB. A Galera node calls
// every statement an unknown command while it has no majority or is not up to date.
func classifyMySQL(err error) class {
	if e, ok := errors.AsType[*mysql.MySQLError](err); ok {
		switch e.Number {
		case 1062: // duplicate entry
			return duplicate
		case 1213, 3101, // deadlock found, or a conflict with another member of a cluster
			1020, 1412: // a row or a table's definition has changed since the transaction saw it
			return deadlock
		case 1205: // lock wait timeout
			return lockWait
		case 1264, 1366, 1406, 3140, 3819, 4025, // out of range, incorrect, too long, bad JSON, check constraint
			1153: // larger than a packet
			return refused
		case 1021, 1114, 1041, 1037, 1038, 1878, 3015, 3019, 3170, // disk full, table full, out of memory
			1040, 1135, 1203, 1226, 1129, // too many connections, no thread for another, host blocked
			1044, 1045, 1049, 1142, 1146, 1054, // not allowed, no such database, table or column: not set up (yet)
			1053, 1077, 1079, 1180, 1927, 1158, 1159, 1160, 1161, // shutting down, error during commit, connection killed
			1036, 1290, 1792, 1836, 1874, 3032, // read only, offline
			1047, 3100, 3796, 3797, 3798, 3799, // a member of a cluster that may do nothing, or not yet
			1026, 1030, 1206, 1534, 1598, 1637, // errors of files, the storage engine, the lock table, the binary log, too much at once
			1130, 1143, 1524, 1698, 1820, 1862, 3118, 3159, 4150, 4151, // not allowed in, in other ways
			3168, 3169, // shutting down, session killed
			1317, 3024, 1969, 4031, // interrupted, took too long, was silent for too long
			2002, 2003, 2006, 2013, 9001: // not the server but a proxy before it, which cannot reach it
			return unavailable
		}
		return other
	}
	var netErr net.Error
	if errors.Is(err, driver.ErrBadConn) || errors.Is(err, mysql.ErrInvalidConn) || errors.Is(err, io.EOF) ||
		errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, sql.ErrConnDone) || errors.As(err, &netErr) ||
		errors.Is(err, mysql.ErrMalformPkt) || errors.Is(err, mysql.ErrPktSync) {
		return unavailable
	}
	return other
}

// slogLogger takes what the driver says about broken connections.
type slogLogger struct{ *slog.Logger }

func (l slogLogger) Print(v ...any) { l.Debug("mysql driver", "says", fmt.Sprint(v...)) }
