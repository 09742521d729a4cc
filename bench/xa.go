//go:build linux

package main

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/go-sql-driver/mysql"
)

// xa is the traditional way: one transaction over both databases in two phases, and no broker. The decision to commit is
// on disk before the first branch is told, because otherwise a crash leaves branches of which nobody knows what they wait
// for.
type xa struct{ orders, dispatches, decisions *sql.DB }

const decisionTable = `CREATE TABLE decision (xid VARCHAR(64) CHARACTER SET ascii COLLATE ascii_bin NOT NULL PRIMARY KEY, at DATETIME(6) NOT NULL) ENGINE=InnoDB`

func startXA(ctx context.Context, s site) (_ system, err error) {
	x := &xa{}
	if x.orders, err = open(s.Order, 64, false); err != nil {
		return nil, err
	}
	if x.dispatches, err = open(s.Dispatch, 64, false); err != nil {
		return nil, err
	}
	if x.decisions, err = open(s.Order, 64, false); err != nil {
		return nil, err
	}
	return x, errors.Join(create(ctx, x.orders, orderTable, decisionTable), create(ctx, x.dispatches, platoonTable))
}

func (x *xa) place(ctx context.Context, number int) error {
	at := time.Now().UTC()
	xid := orderID(number)
	first, err := x.prepare(ctx, x.orders, xid, "o", insertOrders, orderRow(number, at))
	if err != nil {
		return err
	}
	defer first.Close()
	second, err := x.prepare(ctx, x.dispatches, xid, "d", insertPlatoons, platoonRow(announcementOf(number, at), at))
	if err != nil {
		_, undo := first.ExecContext(ctx, "XA ROLLBACK '"+xid+"','o'")
		return errors.Join(err, undo)
	}
	defer second.Close()
	if _, err := x.decisions.ExecContext(ctx, "INSERT INTO decision (xid, at) VALUES (?, ?)", xid, at); err != nil {
		return err
	}
	_, err = first.ExecContext(ctx, "XA COMMIT '"+xid+"','o'")
	_, also := second.ExecContext(ctx, "XA COMMIT '"+xid+"','d'")
	return errors.Join(err, also)
}

// prepare does the first phase of one branch, and returns the connection that it is on.
func (x *xa) prepare(ctx context.Context, db *sql.DB, xid, branch, statement string, row []any) (*sql.Conn, error) {
	conn, err := db.Conn(ctx)
	if err != nil {
		return nil, err
	}
	name := " '" + xid + "','" + branch + "'"
	_, err = conn.ExecContext(ctx, "XA START"+name)
	if err == nil {
		err = insert(ctx, conn, statement, row)
	}
	for _, step := range []string{"XA END", "XA PREPARE"} {
		if err == nil {
			_, err = conn.ExecContext(ctx, step+name)
		}
	}
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return conn, nil
}

func (x *xa) addr() string { return "" }

func (x *xa) close() error {
	return errors.Join(x.orders.Close(), x.dispatches.Close(), x.decisions.Close())
}

// isDuplicate reports whether a unique key was broken.
func isDuplicate(err error) bool {
	broken, ok := errors.AsType[*mysql.MySQLError](err)
	return ok && broken.Number == 1062
}
