package sqldb

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestOnlyWhatIsCommittedUnsyncedDoesNotWaitForTheDisk(t *testing.T) {
	t.Parallel()
	db, err := Open("order", "sqlite:"+filepath.Join(t.TempDir(), "order.db"), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { _ = db.Close() })
	const normal, full = 1, 2 // https://www.sqlite.org/pragma.html#pragma_synchronous
	level := func(c Conn) (level int) {
		rows, err := c.QueryContext(context.Background(), "PRAGMA synchronous")
		require.NoError(t, err)
		defer rows.Close()
		require.True(t, rows.Next())
		require.NoError(t, rows.Scan(&level))
		require.NoError(t, rows.Err())
		return level
	}
	require.Equal(t, full, level(db.Writer()))
	boom := errors.New("boom")
	for name, work := range map[string]func(ctx context.Context, giveUp context.CancelFunc, c Conn) error{
		"that succeeds": func(ctx context.Context, _ context.CancelFunc, c Conn) error {
			_, err := c.ExecContext(ctx, "CREATE TABLE t (a)")
			return err
		},
		"that fails": func(context.Context, context.CancelFunc, Conn) error { return boom },
		"whose time is up": func(ctx context.Context, giveUp context.CancelFunc, c Conn) error {
			giveUp()
			_, err := c.ExecContext(ctx, "DELETE FROM t")
			return err
		},
		"that leaves a transaction open": func(ctx context.Context, _ context.CancelFunc, c Conn) error {
			_, err := c.ExecContext(ctx, "BEGIN IMMEDIATE")
			return err
		},
		"that panics": func(context.Context, context.CancelFunc, Conn) error { panic(boom) },
	} {
		func() {
			defer func() { _ = recover() }()
			ctx, giveUp := context.WithCancel(context.Background())
			defer giveUp()
			_ = db.Unsynced(ctx, func(c Conn) error {
				require.Equal(t, normal, level(c), name)
				return work(ctx, giveUp, c)
			})
		}()
		require.Equal(t, full, level(db.Writer()), "after work %s", name)
	}
}
