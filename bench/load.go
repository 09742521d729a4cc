//go:build linux

package main

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// load is a number of orders to place.
type load struct {
	First  int // the number of the first order
	Orders int

	// Workers place one order after the other each, if there is no Rate.
	Workers int
	// Rate is how many orders arrive in a second, at times that are fixed before the first one does.
	Rate float64

	Profile string // file for a CPU profile of the process that places; none if empty
}

// placed is what became of one order. Times are in nanoseconds since 1970.
type placed struct {
	Due  int64 // when it was to be placed
	Done int64 // when it was: its transaction is committed
	Err  string
}

// run places the orders and returns what became of each, in the order of their numbers.
func (l load) run(ctx context.Context, place func(ctx context.Context, number int) error) []placed {
	all := make([]placed, l.Orders)
	one := func(i int, due time.Time) {
		err := place(ctx, l.First+i)
		all[i] = placed{Due: due.UnixNano(), Done: time.Now().UnixNano()}
		if err != nil {
			all[i].Err = err.Error()
		}
	}
	var placing sync.WaitGroup
	if l.Rate == 0 {
		var next atomic.Int64
		for range l.Workers {
			placing.Go(func() {
				for i := int(next.Add(1)) - 1; i < l.Orders; i = int(next.Add(1)) - 1 {
					one(i, time.Now())
				}
			})
		}
		placing.Wait()
		return all
	}
	// Arrivals at random, as customers come. An order whose time has come is placed whether or not those before it are
	// answered, and its latency counts from that time: a system that halts cannot keep the load from counting it.
	random, begin, after := rand.New(rand.NewPCG(1, uint64(l.First))), time.Now(), 0.0
	for i := range all {
		after += random.ExpFloat64() / l.Rate
		due := begin.Add(time.Duration(after * float64(time.Second)))
		time.Sleep(time.Until(due))
		placing.Go(func() { one(i, due) })
	}
	placing.Wait()
	return all
}

// quantile returns the q-th part of the values; 0 if there are none.
func quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(int(q*float64(len(sorted))), len(sorted)-1)]
}

// millis is a time in milliseconds.
func millis(nanoseconds int64) float64 { return float64(nanoseconds) / 1e6 }
