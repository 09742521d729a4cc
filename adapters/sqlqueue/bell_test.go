package sqlqueue

import (
	"context"
	"log/slog"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqldb"
)

func TestOneReaderLooksForAllWhoWait(t *testing.T) {
	ctx := context.Background()
	db, err := sqldb.Open("test", "sqlite:"+filepath.Join(t.TempDir(), "q.db"), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	defer db.Close()
	_, err = db.Writer().Exec("CREATE TABLE q (queue TEXT, available_at INTEGER)")
	require.NoError(t, err)
	_, err = db.Writer().Exec("INSERT INTO q VALUES ('due', 0), ('late', 9e18), ('unread', 0)")
	require.NoError(t, err)

	var bell Bell
	reader := NewReader(db, Config{Table: "q", Queue: "looks", Bell: &bell}, slog.New(slog.DiscardHandler))
	looks, due, late := bell.Heard("looks"), bell.Heard("due"), bell.Heard("late")
	left, err := bell.look(ctx, reader, time.Hour)
	require.NoError(t, err)
	require.Zero(t, left)
	require.True(t, rung(due))
	require.False(t, rung(looks), "it has no rows")
	require.False(t, rung(late), "its row rests")

	due = bell.Heard("due")
	left, err = bell.look(ctx, reader, time.Hour)
	require.NoError(t, err)
	require.Positive(t, left, "somebody has looked in this hour")
	require.False(t, rung(due))

	// One who could not see anything has not looked for the others.
	broken := NewReader(db, Config{Table: "none", Queue: "looks", Bell: &bell}, slog.New(slog.DiscardHandler))
	_, err = bell.look(ctx, broken, 0)
	require.Error(t, err)
	_, err = bell.look(ctx, reader, time.Hour)
	require.NoError(t, err)
	require.True(t, rung(due))
}

func TestBellIsHeardByThoseItIsFor(t *testing.T) {
	var bell Bell
	bell.Ring() // nobody is there
	one, other := bell.Heard("one"), bell.Heard("other")
	bell.Ring("one")
	require.True(t, rung(one))
	require.False(t, rung(other))
	bell.Ring()
	require.True(t, rung(other))

	one = bell.Heard("one")
	bell.RingIn(time.Millisecond, "one")
	<-one
}

func rung(bell <-chan struct{}) bool {
	select {
	case <-bell:
		return true
	default:
		return false
	}
}
