package app

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/domain"
)

// desk records what Together was asked to do.
type desk struct {
	mu    sync.Mutex
	ones  []int
	manys [][]int

	together *Together[int]
	busy     chan struct{} // One waits until it is closed, for item 0
}

func newDesk(many func([]int) error) *desk {
	return newDeskOf(func(items []int) (map[int]error, error) { return nil, many(items) })
}

func newDeskOf(many func([]int) (map[int]error, error)) *desk {
	d := &desk{busy: make(chan struct{})}
	d.together = &Together[int]{
		Most: 4, Parallel: 1,
		One: func(_ context.Context, item int) error {
			if item == 0 {
				<-d.busy
			}
			d.mu.Lock()
			defer d.mu.Unlock()
			d.ones = append(d.ones, item)
			if item == 13 {
				return errors.New("thirteen")
			}
			return nil
		},
		Many: func(_ context.Context, items []int) (map[int]error, error) {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.manys = append(d.manys, slices.Clone(items))
			return many(items)
		},
	}
	return d
}

// queued waits until that many callers wait.
func (d *desk) queued(t *testing.T, n int) {
	t.Helper()
	require.Eventually(t, func() bool {
		d.together.mu.Lock()
		defer d.together.mu.Unlock()
		return len(d.together.queue) == n
	}, 10*time.Second, time.Millisecond)
}

// occupy has item 0 being served until release, and n further items waiting, in order.
func (d *desk) occupy(t *testing.T, n int) (release func() []error) {
	t.Helper()
	errs := make([]error, n+1)
	var callers sync.WaitGroup
	callers.Go(func() { errs[0] = d.together.Do(context.Background(), 0) })
	require.Eventually(t, func() bool {
		d.together.mu.Lock()
		defer d.together.mu.Unlock()
		return d.together.running == 1
	}, 10*time.Second, time.Millisecond)
	for i := 1; i <= n; i++ {
		callers.Go(func() { errs[i] = d.together.Do(context.Background(), i+9) })
		d.queued(t, i)
	}
	return func() []error {
		close(d.busy)
		callers.Wait()
		return errs
	}
}

func TestWhoIsAloneIsServedAlone(t *testing.T) {
	t.Parallel()
	d := newDesk(func([]int) error { return nil })
	require.NoError(t, d.together.Do(context.Background(), 5))
	require.EqualError(t, d.together.Do(context.Background(), 13), "thirteen")
	require.Equal(t, []int{5, 13}, d.ones)
	require.Empty(t, d.manys)
}

func TestThoseWhoWaitAreServedTogetherInOrderAndNotTooMany(t *testing.T) {
	t.Parallel()
	d := newDesk(func([]int) error { return nil })
	for _, err := range d.occupy(t, 6)() {
		require.NoError(t, err)
	}
	require.Equal(t, [][]int{{10, 11, 12, 13}, {14, 15}}, d.manys)
	require.Equal(t, []int{0}, d.ones)
	require.Zero(t, d.together.running)
}

func TestWhoComesSoonAfterABatchWaitsForOthers(t *testing.T) {
	t.Parallel()
	d := newDesk(func([]int) error { return nil })
	d.together.Rest = 2 * time.Second
	for _, err := range d.occupy(t, 2)() {
		require.NoError(t, err)
	}
	var callers sync.WaitGroup
	for item := 20; item < 23; item++ {
		callers.Go(func() { _ = d.together.Do(context.Background(), item) })
		d.queued(t, item-19)
	}
	callers.Wait()
	require.Equal(t, [][]int{{10, 11}, {20, 21, 22}}, d.manys)
}

func TestWhoComesAfterOneWhoWasAloneWaitsForNobody(t *testing.T) {
	t.Parallel()
	d := newDesk(func([]int) error { return nil })
	d.together.Rest = time.Hour
	require.NoError(t, d.together.Do(context.Background(), 5))
	require.NoError(t, d.together.Do(context.Background(), 6))
}

func TestWhatFailsTogetherIsTriedAloneAndEachGetsItsOwnError(t *testing.T) {
	t.Parallel()
	for name, many := range map[string]func([]int) error{
		"an error": func([]int) error { return errors.New("no") },
		"a panic":  func([]int) error { panic("no") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := newDesk(many)
			errs := d.occupy(t, 4)()
			require.EqualError(t, errs[4], "thirteen")
			require.NoError(t, errors.Join(errs[:4]...))
			slices.Sort(d.ones)
			require.Equal(t, []int{0, 10, 11, 12, 13}, d.ones)
		})
	}
}

func TestOneWhoIsToBlameCostsFewOthersTheirCompany(t *testing.T) {
	t.Parallel()
	d := newDesk(func(items []int) error {
		if slices.Contains(items, 13) {
			return errors.New("no")
		}
		return nil
	})
	d.together.Most = 64
	errs := d.occupy(t, 16)()
	require.EqualError(t, errs[4], "thirteen")
	errs[4] = nil
	require.NoError(t, errors.Join(errs...))
	slices.Sort(d.ones)
	require.Equal(t, []int{0, 12, 13}, d.ones)
	require.Len(t, d.manys, 7)
}

func TestWhereManyAreToBlameHalvesAreNotTriedToTheEnd(t *testing.T) {
	t.Parallel()
	d := newDesk(func([]int) error { return errors.New("no") })
	d.together.Most = 64
	d.occupy(t, 40)()
	require.Len(t, d.ones, 41)
	require.Len(t, d.manys, 13)
}

func TestNoHalvesAreTriedWhereTheDatabaseIsAway(t *testing.T) {
	t.Parallel()
	d := newDesk(func([]int) error { return domain.Errorf(domain.Unavailable, "database_away", "no") })
	d.occupy(t, 4)()
	require.Len(t, d.ones, 5)
	require.Len(t, d.manys, 1)
}

// Each half with the order in it would wait for the lock as long as all of them did.
func TestNoHalvesAreTriedWhereARowIsLocked(t *testing.T) {
	t.Parallel()
	d := newDesk(func([]int) error { return domain.Errorf(domain.Busy, "lock_wait", "no") })
	d.together.Most = 64
	d.occupy(t, 16)()
	require.Len(t, d.manys, 1)
	slices.Sort(d.ones)
	require.Equal(t, []int{0, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25}, d.ones, "each alone, once")
}

func TestThoseWhoHaveAnAnswerOfTheirOwnAreNotTriedAgainAndCostTheOthersOneMoreTry(t *testing.T) {
	t.Parallel()
	before := errors.New("done before")
	d := newDeskOf(func(items []int) (map[int]error, error) {
		own := map[int]error{}
		for i, item := range items {
			switch {
			case item == 15:
				own[i] = ErrAlone
			case item%2 == 1:
				own[i] = before
			}
		}
		if len(own) > 0 {
			return own, errors.New("no")
		}
		return nil, nil
	})
	d.together.Most = 64
	errs := d.occupy(t, 7)()
	for i, err := range errs[1:] {
		if item := i + 10; item%2 == 1 && item != 15 {
			require.ErrorIs(t, err, before, item)
		} else {
			require.NoError(t, err, item)
		}
	}
	require.Equal(t, [][]int{{10, 11, 12, 13, 14, 15, 16}, {10, 12, 14, 16}}, d.manys)
	slices.Sort(d.ones)
	require.Equal(t, []int{0, 15}, d.ones)
}

func TestOwnAnswersOfThoseWhoWereDoneTogetherAreGivenToThemAlone(t *testing.T) {
	t.Parallel()
	copied := errors.New("a copy")
	d := newDeskOf(func([]int) (map[int]error, error) { return map[int]error{1: copied}, nil })
	errs := d.occupy(t, 3)()
	require.ErrorIs(t, errs[2], copied)
	errs[2] = nil
	require.NoError(t, errors.Join(errs...))
	require.Len(t, d.manys, 1)
	require.Equal(t, []int{0}, d.ones)
}

func TestWhoLeavesTheQueueIsNotServed(t *testing.T) {
	t.Parallel()
	d := newDesk(func([]int) error { return nil })
	release := d.occupy(t, 2)
	ctx, cancel := context.WithCancel(context.Background())
	left := make(chan error)
	go func() { left <- d.together.Do(ctx, 99) }()
	d.queued(t, 3)
	cancel()
	require.ErrorIs(t, <-left, context.Canceled)
	require.NoError(t, errors.Join(release()...))
	require.Equal(t, [][]int{{10, 11}}, d.manys)
}

func TestWhoseTimeIsUpWhileOthersWorkIsToldThatNothingIsKnown(t *testing.T) {
	t.Parallel()
	working, finish := make(chan struct{}), make(chan struct{})
	d := newDesk(func([]int) error { close(working); <-finish; return nil })
	release := d.occupy(t, 1)
	ctx, cancel := context.WithCancel(context.Background())
	left := make(chan error)
	go func() { left <- d.together.Do(ctx, 99) }()
	d.queued(t, 2)
	go release()
	<-working
	cancel()
	require.ErrorIs(t, <-left, ErrUnsettled)
	close(finish)
}

func TestWhoTakesLongKeepsOthersWaitingNoLongerThanPatience(t *testing.T) {
	t.Parallel()
	working, finish := make(chan struct{}), make(chan struct{})
	together := &Together[int]{Most: 4, Parallel: 1, Patience: time.Millisecond, One: func(_ context.Context, item int) error {
		if item == 0 {
			close(working)
			<-finish
		}
		return nil
	}}
	slow := make(chan error)
	go func() { slow <- together.Do(context.Background(), 0) }()
	<-working
	require.NoError(t, together.Do(context.Background(), 1))
	close(finish)
	require.NoError(t, <-slow)
	require.Zero(t, together.running)
}

func TestThousandsOfCallersAreEachServedOnce(t *testing.T) {
	t.Parallel()
	var served [5000]atomic.Int32
	batches := atomic.Int32{}
	together := &Together[int]{
		Most: 64, Parallel: 2,
		One: func(_ context.Context, item int) error { served[item].Add(1); return nil },
		Many: func(_ context.Context, items []int) (map[int]error, error) {
			if batches.Add(1)%3 == 0 {
				return nil, errors.New("no")
			}
			for _, item := range items {
				served[item].Add(1)
			}
			return nil, nil
		},
	}
	var callers sync.WaitGroup
	for first := range 100 {
		callers.Go(func() {
			for i := first; i < len(served); i += 100 {
				ctx, cancel := context.WithCancel(context.Background())
				if err := together.Do(ctx, i); err != nil {
					t.Error(err)
				}
				cancel()
			}
		})
	}
	callers.Wait()
	for i := range served {
		require.EqualValues(t, 1, served[i].Load(), i)
	}
	require.Zero(t, together.running)
	require.Empty(t, together.queue)
}
