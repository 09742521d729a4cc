package sqlqueue

import (
	"context"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"
)

// Bell tells the readers of one table in this process that rows are available. Whoever commits rows rings it. Rows that
// nobody rings for, because another process committed them or because their time has come, are found by polling: one of
// the waiting readers does so for all of them. The zero Bell is ready.
type Bell struct {
	mu     sync.Mutex
	heard  map[string]chan struct{} // by queue
	looked time.Time
}

// Ring wakes everybody who waits for one of the queues, and everybody at all if none is named.
func (b *Bell) Ring(queues ...string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(queues) == 0 {
		queues = slices.Collect(maps.Keys(b.heard))
	}
	for _, queue := range queues {
		if heard, waiting := b.heard[queue]; waiting {
			close(heard)
			delete(b.heard, queue)
		}
	}
}

// RingIn rings for the queue after that time, for rows that will be available then. It does nothing if the readers
// look earlier by themselves: a thousand rows that rest for half an hour need no thousand timers.
func (b *Bell) RingIn(after time.Duration, queue string) {
	if after < SlowPoll {
		time.AfterFunc(after, func() { b.Ring(queue) })
	}
}

// Heard returns a channel that is closed at the next Ring for the queue.
func (b *Bell) Heard(queue string) <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.heard == nil {
		b.heard = make(map[string]chan struct{})
	}
	if b.heard[queue] == nil {
		b.heard[queue] = make(chan struct{})
	}
	return b.heard[queue]
}

// look rings for those queues, of all that somebody waits for, which have rows to take. If somebody looked in the last
// while, it only says how much of that is left.
func (b *Bell) look(ctx context.Context, r *Reader, while time.Duration) (left time.Duration, err error) {
	b.mu.Lock()
	if left := while - time.Since(b.looked); left > 0 {
		b.mu.Unlock()
		return left, nil
	}
	b.looked = time.Now()
	queues := slices.Collect(maps.Keys(b.heard))
	b.mu.Unlock()

	due, err := r.due(ctx, queues)
	if err != nil {
		b.mu.Lock()
		b.looked = time.Time{} // the others did not see anything either
		b.mu.Unlock()
		return 0, err
	}
	if len(due) > 0 {
		b.Ring(due...)
	}
	return 0, nil
}

// due returns which of the queues have rows to take, and locks nothing.
func (r *Reader) due(ctx context.Context, queues []string) ([]string, error) {
	if len(queues) == 0 {
		return nil, nil
	}
	exists := "EXISTS (SELECT 1 FROM " + r.cfg.Table + " WHERE available_at <= " + r.db.Now
	var args []any
	if r.cfg.Queue != "" {
		exists += " AND queue = ?"
		for _, queue := range queues {
			args = append(args, queue)
		}
	}
	found, into := make([]bool, len(queues)), make([]any, len(queues))
	for i := range found {
		into[i] = &found[i]
	}
	err := r.db.Reader().QueryRowContext(ctx, "SELECT "+exists+")"+strings.Repeat(", "+exists+")", len(queues)-1), args...).Scan(into...)
	if err != nil {
		return nil, r.db.Error(err)
	}
	var due []string
	for i, queue := range queues {
		if found[i] {
			due = append(due, queue)
		}
	}
	return due, nil
}
