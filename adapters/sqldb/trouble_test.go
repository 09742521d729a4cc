package sqldb

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/domain"
)

// left is a server to which every connection is left at once.
type left struct {
	why   error
	asked int
}

func (l *left) Connect(context.Context) (driver.Conn, error) { l.asked++; return nil, l.why }
func (l *left) Driver() driver.Driver                        { return nil }

func TestWhoCouldNotWriteAsksOnceWhetherTheServerIsReadOnly(t *testing.T) {
	t.Parallel()
	db, err := Open("order", "mysql://user@127.0.0.1:1/order", slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	question := &left{why: errors.New("away")}
	db.write, db.read = sql.OpenDB(&left{why: driver.ErrBadConn}), sql.OpenDB(question)
	t.Cleanup(func() { _ = db.Close() })
	err = db.Unsynced(t.Context(), func(c Conn) error {
		return db.InTxOn(t.Context(), c, func(context.Context, *sql.Tx) error { return nil })
	})
	require.Equal(t, domain.Unavailable, domain.KindOf(err))
	require.Equal(t, 1, question.asked)
}
