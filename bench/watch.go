//go:build linux

package main

import (
	"context"
	"database/sql"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"
)

// orderID is the id of the order with that number.
func orderID(number int) string { return fmt.Sprintf("bench-%08d", number) }

// watcher sees orders become dispatched, by reading the rows of platoon that it has not seen. What it sees is committed,
// and it sees it late by its pause at most, for every system in the same way.
type watcher struct {
	db    *sql.DB
	pause time.Duration
	stop  context.CancelFunc
	ended chan struct{}

	mu     sync.Mutex
	seen   []int64 // when, by the order's number; 0 for not yet
	count  int
	wanted int       // by await
	before time.Time // when there was no order yet, for the last time
	newest time.Time // when the last one was seen
	err    error

	last int64               // the highest id
	gaps map[int64]time.Time // lower ids that are not there, perhaps not yet: rows appear in the order of their commits
}

func watch(db *sql.DB, pause time.Duration) *watcher {
	ctx, stop := context.WithCancel(context.Background())
	w := &watcher{db: db, pause: pause, stop: stop, ended: make(chan struct{}), gaps: map[int64]time.Time{}, before: time.Now(), newest: time.Now()}
	go func() {
		defer close(w.ended)
		for ctx.Err() == nil {
			if err := w.look(ctx); err != nil && ctx.Err() == nil {
				w.mu.Lock()
				w.err = err
				w.mu.Unlock()
				return
			}
			w.mu.Lock()
			pause := w.pause
			w.mu.Unlock()
			time.Sleep(pause)
		}
	}()
	return w
}

func (w *watcher) close() {
	w.stop()
	<-w.ended
}

// look reads the rows behind the last one, and those from the first young gap on. When nothing has come for a second it
// reads them all.
func (w *watcher) look(ctx context.Context) error {
	from := w.last
	for id, since := range w.gaps {
		if time.Since(since) > time.Second {
			delete(w.gaps, id)
		} else {
			from = min(from, id-1)
		}
	}
	w.mu.Lock()
	if time.Since(w.newest) > time.Second && w.count < w.wanted {
		from = 0
	}
	w.mu.Unlock()
	asked := time.Now()
	rows, err := w.db.QueryContext(ctx, "SELECT id, orderId FROM platoon WHERE id > ? ORDER BY id", from)
	if err != nil {
		return err
	}
	defer rows.Close()
	now := time.Now()
	w.mu.Lock()
	defer w.mu.Unlock()
	for rows.Next() {
		var id int64
		var order string
		if err := rows.Scan(&id, &order); err != nil {
			return err
		}
		delete(w.gaps, id)
		for gap := w.last + 1; gap < id; gap++ {
			w.gaps[gap] = now
		}
		w.last = max(w.last, id)
		number, err := strconv.Atoi(strings.TrimPrefix(order, "bench-"))
		if err != nil {
			return fmt.Errorf("platoon holds the order %s, which nobody placed", order)
		}
		for number >= len(w.seen) {
			w.seen = append(w.seen, 0)
		}
		if w.seen[number] == 0 {
			w.seen[number], w.newest = now.UnixNano(), now
			w.count++
		}
	}
	if w.count == 0 {
		w.before = asked
	}
	return rows.Err()
}

// await returns when so many orders are dispatched, or an error when none was for as long as patience.
func (w *watcher) await(ctx context.Context, count int, patience time.Duration) error {
	w.mu.Lock()
	w.newest, w.wanted = time.Now(), count
	w.mu.Unlock()
	for {
		w.mu.Lock()
		err, missing, idle := w.err, count-w.count, time.Since(w.newest)
		w.mu.Unlock()
		switch {
		case err != nil:
			return err
		case missing <= 0:
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case idle > patience:
			return lostError(missing)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// lostError is a number of orders that were not dispatched.
type lostError int

func (e lostError) Error() string { return fmt.Sprintf("%d orders were not dispatched", int(e)) }

// times returns when the orders of a load were dispatched, 0 for those that were not.
func (w *watcher) times(l load) []int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.seen) < l.First+l.Orders {
		w.seen = append(w.seen, 0)
	}
	return append([]int64(nil), w.seen[l.First:l.First+l.Orders]...)
}

// since returns when there was no order yet, for the last time that the watcher looked.
func (w *watcher) since() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.before.UnixNano()
}

// setPause changes how often the watcher looks.
func (w *watcher) setPause(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pause = d
}
