package app

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"takeout/domain"
)

// Together combines calls that come at the same time into one call of Many, which costs a database far less. A call that
// finds nobody at work runs at once, by One. Calls that come while a batch runs wait and form the next one, so that batches
// grow with the load and vanish without it.
//
// Its methods are safe for concurrent use. It has no goroutines of its own: one of the callers works for all.
type Together[T any] struct {
	// One does what a single caller wants. It is called in the caller's own goroutine, when the caller is alone and when
	// Many failed. It must recognise by natural keys what Many may have done all the same.
	One func(ctx context.Context, item T) error
	// Many does what all of them want, or returns an error and does nothing. Its context outlives that of each caller, but
	// not manyTime.
	//
	// own holds the outcome of single items, by index: the error that their caller gets, or ErrAlone to have One run them.
	// If err is not nil, the other items are tried again together. If own is empty, each half is tried, and a single item
	// goes to One. If err is Unavailable or Busy, all go to One. No caller sees err.
	Many func(ctx context.Context, items []T) (own map[int]error, err error)

	Most     int // items of one call of Many
	Parallel int // calls that may run at the same time

	// Patience is for how long a call counts as one of Parallel, for ever if zero. One that takes longer, because somebody
	// holds its rows or the database does not answer, does not keep the others waiting.
	Patience time.Duration
	// Rest is the least time from the start of a batch until the next may start, so that calls that come faster than that make
	// fewer and larger batches. A single call is not followed by a rest.
	Rest time.Duration

	mu      sync.Mutex
	running int
	queue   []*ticket[T]
}

// ticket is a caller who waits.
type ticket[T any] struct {
	item  T
	taken bool       // somebody works for it; guarded by Together.mu
	turn  chan error // has room for what a waiting caller is told: nil if it was done with the others
}

// errLead tells a waiting caller to work for the next batch.
var errLead = errors.New("it is your turn to work for the others")

// ErrAlone tells a caller to do it without the others.
var ErrAlone = errors.New("it must be done alone")

// manyTime is how long Many may take. A request has five seconds.
const manyTime = 4 * time.Second

// ErrUnsettled says that the caller's time was up while others were still working for it: it may be done, or not.
var ErrUnsettled = errors.New("the time was up before it was known whether it is done")

// Do does what the item asks for, alone or together with others. The error is that of One, or ErrUnsettled, or ctx's if
// nothing was begun.
func (t *Together[T]) Do(ctx context.Context, item T) error {
	t.mu.Lock()
	if t.running < t.Parallel {
		t.running++
		t.mu.Unlock()
		defer t.serving()(1)
		return t.One(ctx, item)
	}
	own := &ticket[T]{item: item, turn: make(chan error, 1)}
	t.queue = append(t.queue, own)
	t.mu.Unlock()

	select {
	case told := <-own.turn:
		return t.follow(ctx, own, told)
	case <-ctx.Done():
	}
	if t.leave(own) {
		return context.Cause(ctx)
	}
	// Somebody has taken it. If its own turn to lead came in this moment, others wait for it.
	select {
	case told := <-own.turn:
		if !errors.Is(told, ErrAlone) {
			return t.follow(ctx, own, told)
		}
	default:
	}
	return ErrUnsettled
}

func (t *Together[T]) follow(ctx context.Context, own *ticket[T], told error) error {
	if errors.Is(told, errLead) {
		done := t.serving()
		batch := t.take(own)
		defer done(len(batch))
		if len(batch) == 1 {
			return t.One(ctx, own.item)
		}
		t.serve(ctx, batch)
		told = <-own.turn
	}
	if errors.Is(told, ErrAlone) {
		return t.One(ctx, own.item)
	}
	return told
}

// serve tells each of the batch of a leader, whose own time does not count, what became of it.
func (t *Together[T]) serve(ctx context.Context, batch []*ticket[T]) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), manyTime)
	defer cancel()
	// Where most are to blame, halves only cost time. So they do where a lock is held: each that has the row waits for it again.
	failures := 3 + len(batch)/4
	var serve func(some []*ticket[T])
	serve = func(some []*ticket[T]) {
		told := ErrAlone
		if len(some) > 1 && failures > 0 {
			own, err := t.many(ctx, some)
			some = tell(some, own)
			switch {
			case err == nil:
				told = nil
			case domain.KindOf(err) == domain.Unavailable || domain.KindOf(err) == domain.Busy || ctx.Err() != nil:
				failures = 0
			case len(own) > 0:
				failures--
				serve(some)
				return
			default:
				failures--
				serve(some[:len(some)/2])
				serve(some[len(some)/2:])
				return
			}
		}
		for _, one := range some {
			one.turn <- told
		}
	}
	serve(batch)
}

// tell tells those who have an answer of their own, and returns the others.
func tell[T any](some []*ticket[T], own map[int]error) []*ticket[T] {
	others := make([]*ticket[T], 0, len(some))
	for i, one := range some {
		if answer, has := own[i]; has {
			one.turn <- answer
		} else {
			others = append(others, one)
		}
	}
	return others
}

func (t *Together[T]) many(ctx context.Context, batch []*ticket[T]) (own map[int]error, err error) {
	items := make([]T, len(batch))
	for i, b := range batch {
		items[i] = b.item
	}
	defer func() {
		if recover() != nil { // whoever it concerns meets it again alone
			own, err = nil, ErrAlone
		}
	}()
	return t.Many(ctx, items)
}

// take takes the leader's batch out of the queue; the leader is out of it already.
func (t *Together[T]) take(leader *ticket[T]) []*ticket[T] {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := min(len(t.queue), t.Most-1)
	batch := append([]*ticket[T]{leader}, t.queue[:n]...)
	for _, b := range batch {
		b.taken = true
	}
	t.queue = slices.Clone(t.queue[n:])
	return batch
}

// serving begins a call that counts as one of Parallel until done is called, with how many were served, or its patience is
// over.
func (t *Together[T]) serving() (done func(served int)) {
	began, next := time.Now(), sync.OnceFunc(t.next)
	stop := func() bool { return true }
	if t.Patience > 0 {
		stop = time.AfterFunc(t.Patience, next).Stop
	}
	return func(served int) {
		stop()
		if rest := t.Rest - time.Since(began); served > 1 && rest > 0 {
			time.AfterFunc(rest, next)
			return
		}
		next()
	}
}

// next lets the first who waits lead.
func (t *Together[T]) next() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.queue) == 0 {
		t.running--
		return
	}
	first := t.queue[0]
	t.queue = t.queue[1:]
	first.taken = true
	first.turn <- errLead
}

// leave takes a caller who waits no longer out of the queue, and reports whether nobody has begun to work for it.
func (t *Together[T]) leave(own *ticket[T]) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if own.taken {
		return false
	}
	t.queue = slices.DeleteFunc(t.queue, func(other *ticket[T]) bool { return other == own })
	return true
}
