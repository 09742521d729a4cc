package check

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/verify/history"
)

// op is an operation from one millisecond to another; a negative end is an answer that never came.
func op(kind history.Kind, from, to int, saw history.State) history.Op {
	o := history.Op{Kind: kind, Called: time.Duration(from) * time.Millisecond, Answered: time.Duration(to) * time.Millisecond, Saw: saw}
	if to < 0 {
		o.Answered = history.Never
	}
	return o
}

func fresh(from, to int) history.Op {
	o := op(history.Place, from, to, history.Placed)
	o.Fresh = true
	return o
}

func TestAnswersAboutAContestedOrderAreExplainedOrNot(t *testing.T) {
	t.Parallel()
	const absent, isPlaced, dispatched, cancelled = history.Absent, history.Placed, history.Dispatched, history.Cancelled
	get, place, cancel := history.Get, history.Place, history.Cancel
	for name, row := range map[string]struct {
		ops  []history.Op
		fine bool
	}{
		"read after it was placed":                        {[]history.Op{fresh(0, 1), op(get, 2, 3, isPlaced)}, true},
		"not there after it was placed":                   {[]history.Op{fresh(0, 1), op(get, 2, 3, absent)}, false},
		"not there yet while it is placed":                {[]history.Op{fresh(0, 5), op(get, 2, 3, absent)}, true},
		"there before anybody placed it":                  {[]history.Op{op(get, 0, 1, isPlaced), fresh(2, 3)}, false},
		"placed twice at the same time, once new":         {[]history.Op{fresh(0, 9), op(place, 1, 8, isPlaced)}, true},
		"placed twice, both new":                          {[]history.Op{fresh(0, 9), fresh(1, 8)}, false},
		"known before it was new":                         {[]history.Op{op(place, 0, 1, isPlaced), fresh(2, 3)}, false},
		"a courier is found in between":                   {[]history.Op{fresh(0, 1), op(get, 2, 3, isPlaced), op(get, 4, 5, dispatched)}, true},
		"a courier is lost":                               {[]history.Op{fresh(0, 1), op(get, 2, 3, dispatched), op(get, 4, 5, isPlaced)}, false},
		"cancelled by itself, as when payment is refused": {[]history.Op{fresh(0, 1), op(get, 2, 3, cancelled)}, true},
		"active after it was cancelled":                   {[]history.Op{fresh(0, 1), op(cancel, 2, 3, cancelled), op(get, 4, 5, dispatched)}, false},
		"active while it is being cancelled":              {[]history.Op{fresh(0, 1), op(cancel, 2, 9, cancelled), op(get, 4, 5, dispatched)}, true},
		"seen cancelled, then active, while being so":     {[]history.Op{fresh(0, 1), op(cancel, 2, 9, cancelled), op(get, 3, 4, cancelled), op(get, 5, 6, isPlaced)}, false},
		"cancelled again":                                 {[]history.Op{fresh(0, 1), op(cancel, 2, 3, cancelled), op(cancel, 4, 5, cancelled)}, true},
		"cancelled before it was there":                   {[]history.Op{op(cancel, 0, 1, cancelled), fresh(2, 3)}, false},
		"not there to cancel, though placed":              {[]history.Op{fresh(0, 1), op(cancel, 2, 3, absent)}, false},
		"cancelled, and its cancellation says active":     {[]history.Op{fresh(0, 1), op(cancel, 2, 3, isPlaced)}, false},
		"an unknown place took effect":                    {[]history.Op{op(place, 0, -1, absent), op(get, 2, 3, isPlaced)}, true},
		"an unknown place did not":                        {[]history.Op{op(place, 0, -1, absent), op(get, 2, 3, absent)}, true},
		"an unknown place took effect and was undone":     {[]history.Op{op(place, 0, -1, absent), op(get, 2, 3, isPlaced), op(get, 4, 5, absent)}, false},
		"an unknown place, and one that was new later":    {[]history.Op{op(place, 0, -1, absent), fresh(2, 3)}, true},
		"an unknown cancel took effect late":              {[]history.Op{fresh(0, 1), op(cancel, 2, -1, absent), op(get, 3, 4, isPlaced), op(get, 5, 6, cancelled)}, true},
	} {
		require.Equal(t, row.fine, explained(row.ops), name)
		require.NotEmpty(t, describe(row.ops))
	}
}
