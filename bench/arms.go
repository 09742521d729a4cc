//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"
)

// arm is a system and how it is used.
type arm struct {
	name     string
	kind     string // of the system
	embedded bool   // on SQLite, or else on the servers
	http     bool   // orders come through HTTP
	whole    bool   // with payment and points
	queues   int
	workers  int
	lossy    bool // may lose orders, which are then counted and no reason to fail
}

// arms are in the order in which they take their turns.
var arms = []arm{
	{name: "http", kind: "product", http: true, workers: 64},
	{name: "direct", kind: "product", workers: 64},
	{name: "stock", kind: "stock", workers: 64, lossy: true},
	{name: "xa", kind: "xa", workers: 64},
	// So many that batches are full: two are stored while two more wait.
	{name: "floor_1_queue", kind: "floor", queues: 1, workers: 4 * floorBatch},
	{name: "floor_2_queues", kind: "floor", queues: 2, workers: 4 * floorBatch},
	{name: "floor_4_queues", kind: "floor", queues: 4, workers: 4 * floorBatch},
	{name: "bare", kind: "bare", workers: 4 * floorBatch},
	{name: "embedded_http", kind: "product", embedded: true, http: true, workers: 64},
	{name: "embedded_direct", kind: "product", embedded: true, workers: 64},
	{name: "embedded_floor", kind: "embedded_floor", embedded: true, workers: 4 * floorBatch},
	{name: "whole", kind: "product", http: true, whole: true, workers: 64},
}

// repetition is what one turn of an arm gave. Latencies are in milliseconds.
type repetition struct {
	Orders    int     `json:"orders"`
	PerSecond float64 `json:"orders_per_second"` // from the first one's placing to the last one's dispatch
	Rate      float64 `json:"latency_rate"`      // orders per second while the latencies were measured

	DispatchP50 float64 `json:"commit_to_dispatch_p50"`
	DispatchP99 float64 `json:"commit_to_dispatch_p99"`
	PlaceP50    float64 `json:"place_p50"`
	PlaceP99    float64 `json:"place_p99"`

	CPU        map[string]float64 `json:"cpu_seconds_per_1000_orders"` // until everything rests
	Statements float64            `json:"statements_per_order"`        // to MySQL, until everything rests
	Memory     float64            `json:"peak_rss_mb"`                 // of the system's process
	Lost       int                `json:"lost"`
	Others     float64            `json:"cores_used_by_others"`
}

// running is a system at work, and what watches it.
type running struct {
	*bench
	site    site
	child   *child
	client  *client // nil if orders do not come through HTTP
	watcher *watcher
	next    int // number of the next order
	lost    int
	lossy   bool
	drop    func()
}

// start starts an arm's system on a site of its own.
func (b *bench) start(ctx context.Context, a arm) (_ *running, err error) {
	var settings []string
	if a.kind == "product" && !a.whole {
		settings = []string{"--payment-gateway=none"}
	}
	s, drop, err := b.newSite(ctx, a.kind, a.embedded, settings...)
	if err != nil {
		return nil, err
	}
	s.Queues = a.queues
	if a.kind == "product" || a.kind == "bare" {
		if err := s.prepare(ctx); err != nil {
			drop()
			return nil, err
		}
	}
	r := &running{bench: b, site: s, lossy: a.lossy, drop: drop}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	return r, r.begin(ctx, a.http)
}

// begin starts the child and watches what it dispatches.
func (r *running) begin(ctx context.Context, overHTTP bool) (err error) {
	if r.child, err = startChild(r.site); err != nil {
		return err
	}
	if r.child.addr != "" {
		if err := awaitReady(ctx, r.child.addr); err != nil {
			return err
		}
	}
	if overHTTP {
		r.client = &client{addr: r.child.addr}
	}
	return r.watch()
}

func (r *running) watch() error {
	db, err := open(r.site.Dispatch, 1, false)
	if err != nil {
		return err
	}
	r.watcher = watch(db, 10*time.Millisecond)
	return nil
}

func (r *running) close() {
	r.child.kill()
	if r.client != nil {
		r.client.close()
	}
	if r.watcher != nil {
		r.watcher.close()
		_ = r.watcher.db.Close()
	}
	r.drop()
}

// processes returns the ids of all that work, by name.
func (r *running) processes() map[string]int {
	ids := r.stack.processes()
	ids["system"] = r.child.process.PID()
	ids["bench"] = r.pid
	return ids
}

// place places orders and waits until they are dispatched. It returns what became of each, and when each was seen
// dispatched.
func (r *running) place(ctx context.Context, l load) (answers []placed, dispatched []int64, err error) {
	if answers, err = r.placeOnly(ctx, &l); err != nil {
		return nil, nil, err
	}
	patience := 30 * time.Second
	if r.lossy {
		patience = 10 * time.Second
	}
	err = r.watcher.await(ctx, r.next-r.lost, patience)
	if lost, some := errors.AsType[lostError](err); some && r.lossy {
		r.lost += int(lost)
		err = nil
	}
	return answers, r.watcher.times(l), err
}

// placeOnly places orders and does not wait for their dispatch.
func (r *running) placeOnly(ctx context.Context, l *load) (answers []placed, err error) {
	l.First = r.next
	r.next += l.Orders
	if r.client != nil {
		finish, err := profile(l.Profile)
		if err != nil {
			return nil, err
		}
		answers = l.run(ctx, r.client.place)
		finish()
	} else if answers, err = r.child.place(*l); err != nil {
		return nil, err
	}
	failed, first := 0, ""
	for _, a := range answers {
		if a.Err != "" {
			failed++
			first = a.Err
		}
	}
	if failed > 0 {
		return nil, fmt.Errorf("%d of %d orders failed, one of them with: %s", failed, len(answers), first)
	}
	return answers, nil
}

// perSecond places orders as fast as the workers can, and returns how many were dispatched in a second.
func (r *running) perSecond(ctx context.Context, l load) (float64, error) {
	answers, dispatched, err := r.place(ctx, l)
	if err != nil {
		return 0, err
	}
	first, last, count := answers[0].Due, int64(0), 0
	for i, at := range dispatched {
		first, last = min(first, answers[i].Due), max(last, at)
		if at > 0 {
			count++
		}
	}
	return float64(count) / time.Duration(last-first).Seconds(), nil
}

// latencies places orders at a rate. They are in milliseconds, and those of dispatching count from the commit.
func (r *running) latencies(ctx context.Context, rate float64) (place, dispatch []float64, err error) {
	r.watcher.setPause(time.Millisecond)
	defer r.watcher.setPause(10 * time.Millisecond)
	answers, dispatched, err := r.place(ctx, load{Orders: max(20, int(rate*r.span.Seconds())), Rate: rate})
	for i, a := range answers {
		place = append(place, millis(a.Done-a.Due))
		if dispatched[i] > 0 {
			dispatch = append(dispatch, max(0, millis(dispatched[i]-a.Done)))
		}
	}
	return place, dispatch, err
}

// repeat gives an arm one turn.
func (b *bench) repeat(ctx context.Context, a arm) (result repetition, err error) {
	r, err := b.start(ctx, a)
	if err != nil {
		return result, err
	}
	defer r.close()
	// Warm up, and learn how many orders it does in the time that a turn has.
	perSecond := 0.0
	for _, n := range []int{b.warmup, 4 * b.warmup} {
		if perSecond, err = r.perSecond(ctx, load{Orders: n, Workers: a.workers}); err != nil {
			return result, fmt.Errorf("warming up: %w", err)
		}
	}
	result.Orders = b.orders
	if b.orders == 0 {
		result.Orders = max(4*b.warmup, min(int(perSecond*b.span.Seconds()), 100_000))
	}
	r.settle()
	l := load{Orders: result.Orders, Workers: a.workers}
	if b.profile != "" && !a.http { // the process that places is then not the system
		l.Profile = filepath.Join(b.profile, a.name+".pprof")
	}
	before, questions := measureUsage(r.processes()), b.questions(ctx)
	if result.PerSecond, err = r.perSecond(ctx, l); err != nil {
		return result, err
	}
	_, result.Others = measureUsage(r.processes()).since(before)
	r.settle()
	used, _ := measureUsage(r.processes()).since(before)
	result.Statements = (b.questions(ctx) - questions) / float64(result.Orders)
	result.CPU = map[string]float64{}
	for name, seconds := range used {
		result.CPU[name] = seconds * 1000 / float64(result.Orders)
	}
	result.Rate = 0.3 * result.PerSecond
	place, dispatch, err := r.latencies(ctx, result.Rate)
	if err != nil {
		return result, fmt.Errorf("at %.0f orders/s: %w", result.Rate, err)
	}
	result.PlaceP50, result.PlaceP99 = quantile(place, 0.5), quantile(place, 0.99)
	result.DispatchP50, result.DispatchP99 = quantile(dispatch, 0.5), quantile(dispatch, 0.99)
	r.settle()
	result.Memory = peakMemory(r.child.process.PID())
	if err := errors.Join(r.child.stop(), r.check(ctx)); err != nil {
		return result, err
	}
	result.Lost = r.lost
	return result, nil
}

// check counts the rows: each order is stored once and dispatched once, but for those that are known to be lost.
func (r *running) check(ctx context.Context) error {
	var found [3]int
	for i, query := range []struct{ address, text string }{
		{r.site.Order, "SELECT COUNT(DISTINCT orderId) FROM order_info"},
		{r.site.Dispatch, "SELECT COUNT(DISTINCT orderId) FROM platoon"},
		{r.site.Dispatch, "SELECT COUNT(*) FROM platoon"},
	} {
		if err := read(ctx, query.address, query.text, &found[i]); err != nil {
			return err
		}
	}
	if r.lossy {
		r.lost = r.next - found[1] // some may have come late
	}
	if found != [3]int{r.next, r.next - r.lost, r.next - r.lost} {
		return fmt.Errorf("%d orders were placed; %d are stored, %d dispatched in %d rows", r.next, found[0], found[1], found[2])
	}
	if r.site.Kind != "product" {
		return nil
	}
	for _, address := range []string{r.site.Order, r.site.Dispatch} {
		var failures int
		if err := read(ctx, address, "SELECT COUNT(*) FROM failure", &failures); err != nil {
			return err
		}
		if failures > 0 {
			return fmt.Errorf("%d messages were given up", failures)
		}
	}
	return nil
}

// read reads one value.
func read(ctx context.Context, address, query string, into any) error {
	db, err := open(address, 1, false)
	if err != nil {
		return err
	}
	defer db.Close()
	return db.QueryRowContext(ctx, query).Scan(into)
}
