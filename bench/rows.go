//go:build linux

package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"takeout/app/reconcile"
	"takeout/ports/httpapi"
)

// row is a further measurement. Its result is a few lines of figures.
type row struct {
	name    string
	title   string
	measure func(b *bench, ctx context.Context) ([]line, error)
}

// line is a few figures about one thing.
type line struct {
	about   string
	figures []figure
}

// figure is a named number.
type figure struct {
	name  string
	value float64
}

var rows = []row{
	{"place", "placing through HTTP while the broker is …", (*bench).placeWithout},
	{"drain", "draining a backlog", (*bench).drain},
	{"processes", "one process of orders, several that relay and dispatch", (*bench).processes},
	{"idle", "no traffic", (*bench).idle},
	{"steps", "what the steps of an order cost, each for itself and without a broker", (*bench).steps},
	{"reconcile", "comparing the services' databases", (*bench).reconcile},
}

// placeWithout places orders while the broker is up, stopped, and blocked by an alarm.
func (b *bench) placeWithout(ctx context.Context) ([]line, error) {
	if b.rabbitmq == nil {
		return nil, errors.New("needs a broker of its own, which may be stopped")
	}
	r, err := b.start(ctx, arms[0])
	if err != nil {
		return nil, err
	}
	defer r.close()
	fastest, err := r.perSecond(ctx, load{Orders: 4 * b.warmup, Workers: 64})
	if err != nil {
		return nil, err
	}
	modes := []struct {
		name         string
		enter, leave func() error
	}{
		{"up", func() error { return nil }, func() error { return nil }},
		{"stopped", b.rabbitmq.Stop, b.rabbitmq.Start},
		{"blocked", func() error { return b.memoryLimit("0.0000001") }, func() error { return b.memoryLimit("0.4") }},
	}
	p50, p99 := map[string][]float64{}, map[string][]float64{}
	for range b.reps {
		for _, mode := range modes {
			r.settle()
			if err := mode.enter(); err != nil {
				return nil, err
			}
			time.Sleep(time.Second) // until the product knows
			l := load{Orders: max(20, int(0.3*fastest*b.span.Seconds())), Rate: 0.3 * fastest}
			answers, err := r.placeOnly(ctx, &l)
			if err := errors.Join(err, mode.leave()); err != nil {
				return nil, fmt.Errorf("the broker is %s: %w", mode.name, err)
			}
			var took []float64
			for _, a := range answers {
				took = append(took, millis(a.Done-a.Due))
			}
			p50[mode.name] = append(p50[mode.name], quantile(took, 0.5))
			p99[mode.name] = append(p99[mode.name], quantile(took, 0.99))
			if err := r.watcher.await(ctx, r.next, time.Minute); err != nil {
				return nil, fmt.Errorf("after the broker was %s: %w", mode.name, err)
			}
		}
	}
	b.report.memory("row place", peakMemory(r.child.process.PID()))
	var lines []line
	for _, mode := range modes {
		lines = append(lines, line{mode.name, []figure{
			{"place_p50_ms", quantile(p50[mode.name], 0.5)}, {"place_p99_ms", quantile(p99[mode.name], 0.5)}, {"rate", 0.3 * fastest},
		}})
	}
	for i, ratio := range []string{"place_p99_down/up", "place_p99_blocked/up"} {
		b.report.ratio(ratio, lines[i+1].figures[1].value/lines[0].figures[1].value)
	}
	return lines, errors.Join(r.child.stop(), r.check(ctx))
}

// memoryLimit sets the part of the memory above which the broker takes no messages.
func (b *bench) memoryLimit(part string) error {
	_, err := b.rabbitmq.Ctl("set_vm_memory_high_watermark", part)
	return err
}

// drain dispatches what waits in the outbox when the program starts. The least is over soon, and so is drained in several
// turns, of which the one in the middle counts.
func (b *bench) drain(ctx context.Context) ([]line, error) {
	var lines []line
	speed := func(l line) float64 { return l.figures[0].value }
	for i, n := range b.sizes(10_000, 100_000, 1_000_000) {
		turns := 1
		if i == 0 {
			turns = b.reps
		}
		var drained []line
		for range turns {
			one, err := b.drainOne(ctx, n)
			if err != nil {
				return lines, err
			}
			drained = append(drained, one)
		}
		slices.SortFunc(drained, func(a, b line) int { return cmp.Compare(speed(a), speed(b)) })
		lines = append(lines, drained[turns/2])
	}
	b.report.ratio("drain_1m/drain_10k", speed(lines[2])/speed(lines[0]))
	return lines, nil
}

// longestDrain is when a drain has been measured for long enough. One that is cut off says nothing of its
// end, where the consumers may have the processor for themselves.
const longestDrain = 15 * time.Minute

func (b *bench) drainOne(ctx context.Context, n int) (line, error) {
	// Comparing them meanwhile would find that they are late.
	s, drop, err := b.newSite(ctx, "product", false, "--payment-gateway=none", "--reconcile-every=0s")
	if err != nil {
		return line{}, err
	}
	r := &running{bench: b, site: s, drop: drop, next: n}
	defer r.close()
	if err := errors.Join(s.prepare(ctx), fillOutbox(ctx, s, n), r.watch()); err != nil {
		return line{}, err
	}
	if r.child, err = startChild(s); err != nil {
		return line{}, err
	}
	before := measureUsage(r.processes())
	limited, cancel := context.WithTimeoutCause(ctx, longestDrain, errLongEnough)
	defer cancel()
	err = r.watcher.await(limited, n, time.Minute)
	used, others := measureUsage(r.processes()).since(before)
	if err != nil && !errors.Is(err, errLongEnough) {
		return line{}, err
	}
	dispatched := slices.DeleteFunc(r.watcher.times(load{Orders: n}), func(at int64) bool { return at == 0 })
	slices.Sort(dispatched)
	few := min(len(dispatched), n/10)
	times := slices.Concat([]int64{r.watcher.since()}, dispatched)
	memory := peakMemory(r.child.process.PID())
	b.report.memory(fmt.Sprintf("drain %d", n), memory)
	found := line{fmt.Sprintf("%d orders", n), []figure{
		{"orders_per_second", rate(times)}, {"first_tenth", rate(times[:few+1])}, {"last_tenth", rate(times[len(dispatched)-few:])},
		{"dispatched", float64(len(dispatched))}, {"peak_rss_mb", memory}, {"cores_used_by_others", others},
	}}
	for _, name := range slices.Sorted(maps.Keys(r.stack.processes())) {
		found.figures = append(found.figures, figure{name + "_µs", used[name] * 1e6 / float64(len(dispatched))})
	}
	found.figures = append(found.figures, figure{"system_µs", used["system"] * 1e6 / float64(len(dispatched))})
	if err != nil {
		return found, nil
	}
	return found, errors.Join(r.child.stop(), r.check(ctx))
}

// rate is how many orders were dispatched in a second from the first of the times on, which are the earliest first. That
// one is before the first order: those that are seen together came at any time since the watcher looked before.
func rate(times []int64) float64 {
	if len(times) < 2 {
		return math.NaN()
	}
	return float64(len(times)-1) / time.Duration(times[len(times)-1]-times[0]).Seconds()
}

var errLongEnough = errors.New("it took longer than is measured")

// processes places orders through HTTP while one, two and four processes relay and as many dispatch.
func (b *bench) processes(ctx context.Context) ([]line, error) {
	var lines []line
	for _, n := range []int{1, 2, 4} {
		perSecond, err := b.withProcesses(ctx, n)
		if err != nil {
			return lines, err
		}
		lines = append(lines, line{fmt.Sprintf("%d and %d", n, n), []figure{{"orders_per_second", quantile(perSecond, 0.5)}}})
	}
	return lines, nil
}

func (b *bench) withProcesses(ctx context.Context, n int) (perSecond []float64, err error) {
	s, drop, err := b.newSite(ctx, "product", false)
	if err != nil {
		return nil, err
	}
	r := &running{bench: b, site: s, drop: drop}
	defer r.close()
	settings := []string{"--payment-gateway=none"}
	r.site.Settings = settings
	if err := r.site.prepare(ctx); err != nil {
		return nil, err
	}
	for _, role := range []string{"relay", "dispatch"} {
		for range n {
			other := r.site
			other.Settings = append([]string{"--roles=" + role}, settings...)
			c, err := startChild(other)
			if err != nil {
				return nil, err
			}
			defer c.kill()
			if err := awaitReady(ctx, c.addr); err != nil {
				return nil, err
			}
		}
	}
	r.site.Settings = append([]string{"--roles=order,compensation"}, settings...)
	if err := r.begin(ctx, true); err != nil {
		return nil, err
	}
	for range b.reps {
		rate, err := r.perSecond(ctx, load{Orders: 8 * b.warmup, Workers: 64})
		if err != nil {
			return nil, err
		}
		perSecond = append(perSecond, rate)
	}
	return perSecond, r.check(ctx)
}

// idle counts statements and CPU time while nothing happens.
func (b *bench) idle(ctx context.Context) ([]line, error) {
	var lines []line
	for _, a := range []struct {
		arm
		databases float64
		name      string
	}{
		{arm{kind: "product"}, 2, "orders and dispatch"},
		{arm{kind: "product", whole: true}, 4, "with payment and points"},
		{arm{kind: "product", embedded: true}, 0, "embedded"},
	} {
		r, err := b.start(ctx, a.arm)
		if err != nil {
			return lines, err
		}
		r.watcher.close() // it asks, too
		r.settle()
		span := 2 * b.span
		time.Sleep(span / 2)
		before, questions := measureUsage(r.processes()), b.questions(ctx)
		time.Sleep(span)
		asked := b.questions(ctx) - questions - 1 // by us, just now
		used, _ := measureUsage(r.processes()).since(before)
		found := line{a.name, []figure{{"system_cpu_percent", 100 * used["system"] / span.Seconds()}, {"mysql_cpu_percent", 100 * used["mysql"] / span.Seconds()},
			{"rabbitmq_cpu_percent", 100 * used["rabbitmq"] / span.Seconds()}}}
		if a.databases > 0 {
			found.figures = append(found.figures, figure{"statements_per_second_per_database", asked / span.Seconds() / a.databases})
		}
		lines = append(lines, found)
		r.close()
	}
	return lines, nil
}

// questions returns how many statements the database server was sent.
func (b *bench) questions(ctx context.Context) (n float64) {
	var name string
	if err := b.admin.QueryRowContext(ctx, "SHOW GLOBAL STATUS LIKE 'Questions'").Scan(&name, &n); err != nil {
		return math.NaN()
	}
	return n
}

// reconcile compares many orders, and then what little has changed.
func (b *bench) reconcile(ctx context.Context) ([]line, error) {
	n := b.sizes(1_000_000)[0]
	s, drop, err := b.newSite(ctx, "product", false, "--payment-gateway=none", "--reconcile-every=0s")
	if err != nil {
		return nil, err
	}
	r := &running{bench: b, site: s, drop: drop}
	defer r.close()
	if err := errors.Join(s.prepare(ctx), fillHistory(ctx, s, n)); err != nil {
		return nil, err
	}
	if err := r.begin(ctx, false); err != nil {
		return nil, err
	}
	var lines []line
	for _, name := range []string{"everything", "again"} {
		report, err := reconcileNow(ctx, r.child.addr)
		if err != nil {
			return lines, err
		}
		if len(report.Errors) > 0 || report.Person > 0 || len(report.Findings) > 0 {
			return lines, fmt.Errorf("%d equal orders were found to differ: %v %v", n, report.Totals, report.Errors)
		}
		took := report.FinishedAt.Sub(report.StartedAt).Seconds()
		lines = append(lines, line{name, []figure{
			{"seconds", took}, {"orders", float64(report.Compared.Orders)}, {"peak_rss_mb", peakMemory(r.child.process.PID())},
		}})
	}
	b.report.memory(fmt.Sprintf("reconcile %d", n), peakMemory(r.child.process.PID()))
	return lines, r.child.stop()
}

// reconcileNow makes a comparison and waits for its report.
func reconcileNow(ctx context.Context, addr string) (report reconcile.Report, err error) {
	began, url := time.Now(), "http://"+addr+"/v1/reconciliation"
	status, err := ask(ctx, http.MethodPost, url, "{}", &report)
	if err != nil || status == http.StatusOK {
		return report, err
	}
	for ; ctx.Err() == nil; time.Sleep(100 * time.Millisecond) { // it takes longer than an answer may
		var shown httpapi.ReconciliationBody
		if _, err := ask(ctx, http.MethodGet, url, "", &shown); err != nil {
			return report, err
		}
		if shown.Report != nil && shown.Report.StartedAt.After(began.Add(-time.Second)) {
			return *shown.Report, nil
		}
	}
	return report, context.Cause(ctx)
}

func ask(ctx context.Context, method, url, body string, into any) (status int, err error) {
	request, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return 0, err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	if response.StatusCode >= 300 {
		return 0, fmt.Errorf("%s answers %s", url, response.Status)
	}
	return response.StatusCode, json.NewDecoder(response.Body).Decode(into)
}

// sizes returns the sizes, or much smaller ones in a quick run.
func (b *bench) sizes(sizes ...int) []int {
	for i := range sizes {
		if b.quick {
			sizes[i] = max(100, sizes[i]/5000)
		}
	}
	return sizes
}

// atOnce does the parts at the same time.
func atOnce(parts ...func() error) error {
	errs := make([]error, len(parts))
	var all sync.WaitGroup
	for i, part := range parts {
		all.Go(func() { errs[i] = part() })
	}
	all.Wait()
	return errors.Join(errs...)
}
