//go:build linux

package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"net/url"
	"strings"
	"time"

	"github.com/go-sql-driver/mysql"
	_ "modernc.org/sqlite" // the driver
)

// What the systems store that takeout is compared with: the same values in tables of the same names, with no more keys
// than it takes to be right. Takeout's own tables have more, for lists, timelines and comparisons.
const (
	orderTable = `CREATE TABLE order_info (
		id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
		orderId VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL UNIQUE,
		name VARCHAR(30) NOT NULL, order_money BIGINT NOT NULL, currency CHAR(3) NOT NULL, status VARCHAR(16) NOT NULL,
		version BIGINT NOT NULL, placed_at DATETIME(6) NOT NULL
	) ENGINE=InnoDB`
	outboxTable = `CREATE TABLE outbox (
		id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
		uuid CHAR(36) CHARACTER SET ascii COLLATE ascii_bin NOT NULL, payload MEDIUMBLOB NOT NULL, created_at DATETIME(6) NOT NULL
	) ENGINE=InnoDB`
	inboxTable = `CREATE TABLE inbox (
		consumer VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
		event_id VARCHAR(100) CHARACTER SET ascii COLLATE ascii_bin NOT NULL,
		body_hash BINARY(32) NOT NULL, handled_at DATETIME(6) NOT NULL,
		PRIMARY KEY (consumer, event_id)
	) ENGINE=InnoDB`
	platoonTable = `CREATE TABLE platoon (
		id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
		orderId VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL UNIQUE,
		takeout_userId VARCHAR(64) NOT NULL, state VARCHAR(16) NOT NULL, name VARCHAR(30) NOT NULL, order_money BIGINT NOT NULL,
		currency CHAR(3) NOT NULL, placed_at DATETIME(6) NOT NULL, order_version BIGINT NOT NULL, assigned_at DATETIME(6) NOT NULL
	) ENGINE=InnoDB`
)

const (
	insertOrders   = "INSERT INTO order_info (orderId, name, order_money, currency, status, version, placed_at) VALUES "
	insertOutbox   = "INSERT INTO outbox (uuid, payload, created_at) VALUES "
	insertInbox    = "INSERT INTO inbox (consumer, event_id, body_hash, handled_at) VALUES "
	insertPlatoons = "INSERT INTO platoon (orderId, takeout_userId, state, name, order_money, currency, placed_at, order_version, assigned_at) VALUES "
)

// announcement is what is sent of an order, about as long as takeout's.
type announcement struct {
	SpecVersion string    `json:"specversion"`
	ID          string    `json:"id"`
	Source      string    `json:"source"`
	Type        string    `json:"type"`
	Subject     string    `json:"subject"`
	Time        time.Time `json:"time"`
	Data        struct {
		OrderID  string    `json:"order_id"`
		Name     string    `json:"name"`
		Amount   int64     `json:"amount"`
		Currency string    `json:"currency"`
		Status   string    `json:"status"`
		Version  int64     `json:"version"`
		PlacedAt time.Time `json:"placed_at"`
	} `json:"data"`
}

// announcementOf returns what is sent of the order with that number.
func announcementOf(number int, at time.Time) announcement {
	a := announcement{SpecVersion: "1.0", ID: "evt_" + orderID(number), Source: "/takeout/order", Type: "takeout.order.placed.v1", Subject: orderID(number), Time: at}
	a.Data.OrderID, a.Data.Name, a.Data.Amount, a.Data.Currency = orderID(number), dish, amount, currency
	a.Data.Status, a.Data.Version, a.Data.PlacedAt = "placed", 1, at
	return a
}

// orderRow and the others are the values of one row.
func orderRow(number int, at time.Time) []any {
	return []any{orderID(number), dish, amount, currency, "placed", 1, at}
}

// assignCourier is the consumer of every system.
const assignCourier = "dispatch.assign-courier"

func inboxRow(consumer, id string, body []byte, at time.Time) []any {
	hash := sha256.Sum256(body)
	return []any{consumer, id, hash[:], at}
}

func platoonRow(a announcement, at time.Time) []any {
	d := a.Data
	return []any{d.OrderID, "courier-1", "assigned", d.Name, d.Amount, d.Currency, d.PlacedAt, d.Version, at}
}

// execer is a transaction, a connection or a pool.
type execer interface {
	ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error)
}

// insert inserts rows by one statement.
func insert(ctx context.Context, into execer, statement string, rows ...[]any) error {
	one := "(" + strings.TrimSuffix(strings.Repeat("?, ", len(rows[0])), ", ") + ")"
	args := make([]any, 0, len(rows)*len(rows[0]))
	for _, row := range rows {
		args = append(args, row...)
	}
	_, err := into.ExecContext(ctx, statement+one+strings.Repeat(", "+one, len(rows)-1), args...)
	return err
}

// inTx runs fn in a transaction, of the database's own level if none is given.
func inTx(ctx context.Context, db *sql.DB, fn func(tx *sql.Tx) error, level ...sql.IsolationLevel) error {
	var options sql.TxOptions
	if len(level) > 0 {
		options.Isolation = level[0]
	}
	tx, err := db.BeginTx(ctx, &options)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }()
	if err := fn(tx); err != nil {
		return err
	}
	return tx.Commit()
}

// open returns a pool of connections to the database at the URL, of as many as there may be at once. plain leaves
// everything as the driver's documentation has it.
func open(address string, most int, plain bool) (*sql.DB, error) {
	if path, ok := strings.CutPrefix(address, "sqlite:"); ok {
		return openSQLite(path, most)
	}
	u, err := url.Parse(address)
	if err != nil {
		return nil, err
	}
	cfg := mysql.NewConfig()
	cfg.User = u.User.Username()
	cfg.Passwd, _ = u.User.Password()
	cfg.Net, cfg.Addr, cfg.DBName = "tcp", u.Host, strings.TrimPrefix(u.Path, "/")
	cfg.ParseTime = true
	if !plain {
		cfg.InterpolateParams = true
	}
	connector, err := mysql.NewConnector(cfg)
	if err != nil {
		return nil, err
	}
	db := sql.OpenDB(connector)
	if !plain {
		db.SetMaxOpenConns(most)
		db.SetMaxIdleConns(most)
	}
	return db, nil
}

// openSQLite opens a file that is synchronized at every commit, as takeout does.
func openSQLite(path string, most int) (*sql.DB, error) {
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: path}).EscapedPath()+
		"?_pragma=busy_timeout(10000)&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)&_time_format=sqlite&_txlock=immediate")
	if err == nil {
		db.SetMaxOpenConns(most)
		db.SetMaxIdleConns(most)
	}
	return db, err
}

// create makes tables.
func create(ctx context.Context, db *sql.DB, tables ...string) error {
	for _, table := range tables {
		if _, err := db.ExecContext(ctx, table); err != nil {
			return err
		}
	}
	return nil
}
