//go:build unix

package verify

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"
)

// kind is a kind of fault.
type kind struct {
	name   string
	group  string // for the summary: kill, stop, broker, db, net, message
	broker bool   // only the broker is broken: orders must be taken as before
	on     string // the stack that has it, both if empty
	hurts  bool   // messages are destroyed, which only reconciliation makes good; only made when it is asked for by name
	weight int    // how often it is made when others are made once; once if zero

	// inflict breaks something, waits, and mends it. It returns what it did, and errMissed if it met nothing that it could break.
	inflict func(ctx context.Context, r *run, rnd *rand.Rand) (string, error)
}

// errMissed says that a fault met nothing: it shows nothing either, and the bound per fault does without it.
var errMissed = errors.New("nothing was met")

// kinds are all of them.
var kinds = slices.Concat(processFaults, brokerFaults, databaseFaults, networkFaults, messageFaults)

// Kinds returns the names of the faults that a stack can have. Those that crash:<point> are for one point of crash.
func Kinds(stack string) []string {
	var names []string
	for _, k := range kinds {
		if k.on == "" || k.on == stack {
			names = append(names, k.name)
		}
	}
	for _, p := range pointsOf(stack) {
		names = append(names, crashAt(p).name)
	}
	return names
}

// kindsOf returns the kinds of those names, or all common ones of the stack.
func kindsOf(stack string, names []string) []kind {
	all := slices.Clone(kinds)
	for _, p := range pointsOf(stack) {
		if slices.Contains(names, crashAt(p).name) {
			all = append(all, crashAt(p))
		}
	}
	return slices.DeleteFunc(all, func(k kind) bool {
		if len(names) > 0 {
			return !slices.Contains(names, k.name)
		}
		return k.on != "" && k.on != stack || k.hurts
	})
}

// Inflicted is a fault that was made.
type Inflicted struct {
	Kind   string  `json:"kind"`
	Group  string  `json:"group"`
	At     float64 `json:"at"`   // seconds since the run began
	Took   float64 `json:"took"` // seconds, until it was mended
	Detail string  `json:"detail"`
	Missed bool    `json:"missed,omitempty"` // it met nothing
}

// pacer keeps load and faults in step, so that there is load during each fault.
type pacer struct {
	mu     sync.Mutex
	turned *sync.Cond
	faults int // made
	over   bool
}

// due waits until it is time for the order of that number: each fault has its share of the orders.
func (r *run) due(ctx context.Context, number int) bool {
	p := &r.pacer
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.over && number*(r.Faults+1) > r.Orders*(p.faults+1) && ctx.Err() == nil {
		p.turned.Wait()
	}
	return !p.over && ctx.Err() == nil
}

// inflict places the orders and makes the faults.
func (r *run) inflict(ctx context.Context) {
	r.show.Stage("running")
	r.pacer.turned = sync.NewCond(&r.pacer.mu)
	limited, cancel := context.WithCancel(ctx)
	defer cancel()
	if r.Duration > 0 {
		limited, cancel = context.WithTimeout(ctx, r.Duration)
		defer cancel()
	}
	stop := context.AfterFunc(limited, r.turn(func(p *pacer) { p.over = true }))
	defer stop()
	loading := make(chan struct{})
	go func() {
		r.load.run(ctx)
		close(loading)
	}()
	go r.display(loading)
	r.makeFaults(limited)
	r.turn(func(p *pacer) { p.faults = r.Faults })()
	<-loading
}

func (r *run) turn(change func(*pacer)) func() {
	return func() {
		r.pacer.mu.Lock()
		change(&r.pacer)
		r.pacer.mu.Unlock()
		r.pacer.turned.Broadcast()
	}
}

// makeFaults makes one fault after another, each kind as often as the others.
func (r *run) makeFaults(ctx context.Context) {
	rnd := rand.New(rand.NewPCG(r.Seed, 1))
	var deck []kind
	for made := 0; made < r.Faults && ctx.Err() == nil; made++ {
		if len(deck) == 0 {
			for _, k := range r.kinds {
				deck = append(deck, slices.Repeat([]kind{k}, max(1, k.weight))...)
			}
			rnd.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
		}
		k := deck[0]
		deck = deck[1:]
		// The same choices for the same seed, however long a fault takes.
		r.make(ctx, k, rand.New(rand.NewPCG(r.Seed, uint64(made)+2)))
		r.turn(func(p *pacer) { p.faults++ })()
		for r.load.asked()*(r.Faults+1) < r.Orders*(made+1) && pause(ctx, 20*time.Millisecond) {
		}
	}
}

func (r *run) make(ctx context.Context, k kind, rnd *rand.Rand) {
	r.show.Fault(k.name)
	condition := int32(something)
	if k.broker {
		condition = onlyTheBroker
	}
	began := time.Now()
	r.load.condition.Store(condition)
	detail, err := k.inflict(ctx, r, rnd)
	r.load.condition.Store(something)
	if err != nil && ctx.Err() == nil {
		detail = strings.TrimPrefix(detail+"; "+err.Error(), "; ")
	}
	// Processes are mended whatever happened: the next fault finds a whole system, or nearly.
	if healErr := r.heal(context.WithoutCancel(ctx)); healErr != nil {
		r.violated("I4", "stuck", "after %s: %v", k.name, healErr)
	}
	r.load.condition.Store(nothing)
	r.report.Inflicted = append(r.report.Inflicted, Inflicted{
		Kind: k.name, Group: k.group, At: seconds(began.Sub(r.began)), Took: seconds(time.Since(began)), Detail: detail,
		Missed: errors.Is(err, errMissed),
	})
	r.show.Mended(k.name, detail, time.Since(began))
}

// display shows how far the run is.
func (r *run) display(loading <-chan struct{}) {
	ticker := time.NewTicker(500 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-loading:
			return
		case <-ticker.C:
			r.pacer.mu.Lock()
			faults := r.pacer.faults
			r.pacer.mu.Unlock()
			r.show.Counts(int(r.load.placed.Load()), r.Orders, faults, r.Faults)
		}
	}
}

// some returns a random time between two, to the millisecond.
func some(rnd *rand.Rand, from, to time.Duration) time.Duration {
	return from + time.Duration(rnd.Int64N(int64((to-from)/time.Millisecond)+1))*time.Millisecond
}

// hold waits a random time between two while something is broken, and returns how long that is.
func hold(ctx context.Context, rnd *rand.Rand, from, to time.Duration) time.Duration {
	d := some(rnd, from, to)
	pause(ctx, d)
	return d
}
