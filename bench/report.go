//go:build linux

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"takeout/service"
)

// report is what a run found.
type report struct {
	Ratios   map[string]float64                       `json:"ratios"`
	Arms     map[string]summary                       `json:"arms"`
	ByCPU    map[string]float64                       `json:"ratios_by_cpu"` // the same of arms by what the CPU allows, which others disturb less
	Rows     map[string]map[string]map[string]float64 `json:"rows"`
	Memory   map[string]float64                       `json:"peak_rss_mb"` // of the process with all roles, by what it did
	Failures []string                                 `json:"failures"`
	Revision string                                   `json:"revision"`
	Machine  map[string]string                        `json:"machine"`
	Versions map[string]string                        `json:"versions"`
	Started  time.Time                                `json:"started"`
	Seconds  float64                                  `json:"seconds"`
	Quick    bool                                     `json:"quick"` // the figures mean nothing
	Others   float64                                  `json:"cores_used_by_others"`

	order []string // of the arms
}

// summary is what an arm gave: the medians of its turns, and each turn.
type summary struct {
	repetition
	Allowed float64      `json:"orders_per_second_by_cpu"` // what all cores could do if each order cost what it did
	Slowest float64      `json:"orders_per_second_min"`
	Fastest float64      `json:"orders_per_second_max"`
	Turns   []repetition `json:"turns"`
}

func newReport() report {
	return report{
		Ratios: map[string]float64{}, ByCPU: map[string]float64{}, Arms: map[string]summary{}, Rows: map[string]map[string]map[string]float64{}, Memory: map[string]float64{},
		Failures: []string{}, Started: time.Now(),
	}
}

// describe notes and prints what is measured, and on what.
func (r *report) describe(b *bench) {
	r.Machine, r.Versions, r.Revision, r.Quick = machine(), b.versions(), revision(), b.quick
	fmt.Fprintf(b.out, "takeout %s on %s cores of %s, %s; %s, %s, %s\n", r.Revision, r.Machine["cores"], r.Machine["cpu"], r.Machine["memory"],
		r.Versions["database"], r.Versions["broker"], r.Machine["go"])
	fmt.Fprintf(b.out, "%d turns; at most %s of load for each of two measurements in a turn\n\n", b.reps, b.span)
}

// revision returns what was built.
func revision() string {
	out, err := exec.Command("git", "describe", "--always", "--dirty", "--abbrev=12").Output()
	if err != nil {
		return service.Version()
	}
	return strings.TrimSpace(string(out))
}

// add takes the result of an arm's turn.
func (r *report) add(out io.Writer, turn int, a arm, result repetition, took time.Duration, err error) {
	if err != nil {
		r.fail(out, a.name, err)
		return
	}
	fmt.Fprintf(out, "turn %d  %-16s %7.0f orders/s   commit→dispatch %6.1f / %6.1f ms   place %6.1f / %6.1f ms at %.0f/s   others %.2f cores   (%.0f s)\n",
		turn+1, a.name, result.PerSecond, result.DispatchP50, result.DispatchP99, result.PlaceP50, result.PlaceP99, result.Rate, result.Others, took.Seconds())
	if result.Lost > 0 {
		fmt.Fprintf(out, "        %-16s lost %d orders\n", a.name, result.Lost)
	}
	if a.kind == "product" {
		r.memory(a.name, result.Memory)
	}
	s := r.Arms[a.name]
	if len(s.Turns) == 0 {
		r.order = append(r.order, a.name)
	}
	r.Arms[a.name] = summarize(append(s.Turns, result))
}

// summarize returns the medians.
func summarize(turns []repetition) summary {
	median := func(value func(repetition) float64) float64 { return quantile(each(turns, value), 0.5) }
	speed := func(t repetition) float64 { return t.PerSecond }
	s := summary{Turns: turns, Slowest: slices.Min(each(turns, speed)), Fastest: slices.Max(each(turns, speed)), repetition: repetition{
		Orders: turns[0].Orders, PerSecond: median(speed), CPU: map[string]float64{},
		Rate:        median(func(t repetition) float64 { return t.Rate }),
		DispatchP50: median(func(t repetition) float64 { return t.DispatchP50 }),
		DispatchP99: median(func(t repetition) float64 { return t.DispatchP99 }),
		PlaceP50:    median(func(t repetition) float64 { return t.PlaceP50 }),
		PlaceP99:    median(func(t repetition) float64 { return t.PlaceP99 }),
		Statements:  median(func(t repetition) float64 { return t.Statements }),
		Memory:      slices.Max(each(turns, func(t repetition) float64 { return t.Memory })),
		Others:      median(func(t repetition) float64 { return t.Others }),
	}}
	used := 0.0
	for name := range turns[0].CPU {
		s.CPU[name] = median(func(t repetition) float64 { return t.CPU[name] })
		used += s.CPU[name]
	}
	if _, known := s.CPU["mysql"]; known && used > 0 { // not if the servers are somebody else's
		s.Allowed = float64(runtime.NumCPU()) * 1000 / used
	}
	for _, t := range turns {
		s.Lost += t.Lost
	}
	return s
}

func each(turns []repetition, value func(repetition) float64) []float64 {
	var values []float64
	for _, t := range turns {
		values = append(values, value(t))
	}
	return values
}

// addRow takes the result of a further measurement.
func (r *report) addRow(out io.Writer, w row, lines []line, took time.Duration, err error) {
	fmt.Fprintf(out, "\n%s (%.0f s)\n", w.title, took.Seconds())
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	figures := map[string]map[string]float64{}
	for _, l := range lines {
		figures[l.about] = map[string]float64{}
		fmt.Fprintf(table, "  %s", l.about)
		for _, f := range l.figures {
			if isNumber(f.value) {
				figures[l.about][f.name] = f.value
			}
			fmt.Fprintf(table, "\t%s %s", strings.ReplaceAll(f.name, "_", " "), short(f.value))
		}
		fmt.Fprintln(table)
	}
	_ = table.Flush()
	r.Rows[w.name] = figures
	if err != nil {
		r.fail(out, w.name, err)
	}
}

// short is a number with three digits that count.
func short(v float64) string {
	if v == math.Trunc(v) || math.Abs(v) >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

func (r *report) fail(out io.Writer, what string, err error) {
	fmt.Fprintf(out, "FAILED  %s: %v\n", what, err)
	r.Failures = append(r.Failures, what+": "+err.Error())
}

// ratio notes a ratio that is a number.
func (r *report) ratio(name string, value float64) {
	if isNumber(value) {
		r.Ratios[name] = value
	}
}

// isNumber reports whether JSON can say the value.
func isNumber(value float64) bool { return !math.IsNaN(value) && !math.IsInf(value, 0) }

// memory notes the most memory that the process with all roles had while it did something.
func (r *report) memory(what string, mb float64) { r.Memory[what] = max(r.Memory[what], mb) }

// finish prints the table, writes the file, and returns an error if anything failed.
func (r *report) finish(out io.Writer) error {
	r.Seconds = time.Since(r.Started).Seconds()
	floor := r.bestFloor()
	for _, pair := range [][2]string{
		{"direct", "stock"}, {"http", "stock"}, {"direct", "xa"}, {"http", "xa"}, {"stock", "xa"}, {"direct", floor}, {"http", floor}, {"xa", floor},
		{"direct", "bare"}, {"bare", "stock"}, {"bare", "xa"}, {"bare", floor},
		{"stock", floor}, {"embedded_direct", "embedded_floor"}, {"embedded_http", "embedded_floor"},
	} {
		a, measured := r.Arms[pair[0]]
		b, both := r.Arms[pair[1]]
		if measured && both {
			name := pair[0] + "/" + pair[1]
			if pair[1] == floor {
				name = pair[0] + "/floor"
			}
			r.ratio(name, a.PerSecond/b.PerSecond)
			if b.Allowed > 0 {
				r.ByCPU[name] = a.Allowed / b.Allowed
			}
		}
	}
	r.print(out, floor)
	if path := os.Getenv("BENCH_JSON"); path != "" {
		text, err := json.MarshalIndent(r, "", "  ")
		if err == nil {
			err = os.WriteFile(path, append(text, '\n'), 0o600)
		}
		if err != nil {
			return err
		}
	}
	if len(r.Failures) > 0 {
		return errors.New("failed: " + strings.Join(r.Failures, "; "))
	}
	return nil
}

// bestFloor returns the fastest of the floors.
func (r *report) bestFloor() string {
	floors := slices.DeleteFunc(slices.Clone(r.order), func(name string) bool { return !strings.HasPrefix(name, "floor_") })
	if len(floors) == 0 {
		return ""
	}
	return slices.MaxFunc(floors, func(a, b string) int { return cmp.Compare(r.Arms[a].PerSecond, r.Arms[b].PerSecond) })
}

func (r *report) print(out io.Writer, floor string) {
	if len(r.order) > 0 {
		fmt.Fprintln(out)
	}
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	if len(r.order) > 0 {
		fmt.Fprintln(table, "\torders/s\tmin\tmax\t÷stock\t÷xa\t÷floor\tcommit→dispatch p50\tp99 ms\tplace p50\tp99 ms\tsystem\tmysql\trabbitmq\tbench\tstatements\tallowed/s\tRSS MB\tothers\t")
	}
	for _, name := range r.order {
		a := r.Arms[name]
		fmt.Fprintf(table, "%s\t%.0f\t%.0f\t%.0f\t", name, a.PerSecond, a.Slowest, a.Fastest)
		others := []string{"stock", "xa", floor}
		if strings.HasPrefix(name, "embedded_") {
			others = []string{"", "", "embedded_floor"}
		}
		for _, other := range others {
			if base := r.Arms[other].PerSecond; base > 0 {
				fmt.Fprintf(table, "%.2f\t", a.PerSecond/base)
			} else {
				fmt.Fprint(table, "\t")
			}
		}
		fmt.Fprintf(table, "%.1f\t%.1f\t%.1f\t%.1f\t", a.DispatchP50, a.DispatchP99, a.PlaceP50, a.PlaceP99)
		for _, process := range []string{"system", "mysql", "rabbitmq", "bench"} {
			fmt.Fprintf(table, "%.2f\t", a.CPU[process])
		}
		fmt.Fprintf(table, "%.1f\t%.0f\t%.0f\t%.2f\t\n", a.Statements, a.Allowed, a.Memory, a.Others)
	}
	_ = table.Flush()
	if floor != "" {
		fmt.Fprintf(out, "\nThe floor is that with the fastest number of queues: %s.\n", floor)
	}
	if len(r.order) > 0 {
		var others []float64
		for _, a := range r.Arms {
			others = append(others, a.Others)
		}
		r.Others = quantile(others, 0.5)
		fmt.Fprintf(out, "Latencies are at 30 %% of an arm's own orders/s. system, mysql, rabbitmq and bench are CPU seconds for 1,000 orders,\nstatements are those of MySQL for one order, and allowed/s is what all cores could do at that cost; others is how many cores were used by what is not part of this run, %.2f in the\nmiddle: where it is not near 0, allowed/s says more than orders/s.\n", r.Others)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Arms)) {
		if lost := r.Arms[name].Lost; lost > 0 {
			fmt.Fprintf(out, "%s lost %d orders; its rate is of those that it dispatched.\n", name, lost)
		}
	}
	fmt.Fprintln(out)
	if len(r.Memory) > 0 {
		most := slices.MaxFunc(slices.Sorted(maps.Keys(r.Memory)), func(a, b string) int { return cmp.Compare(r.Memory[a], r.Memory[b]) })
		fmt.Fprintf(out, "The process with all roles had %.0f MB resident at most (%s).\n\n", r.Memory[most], most)
	}
	for _, name := range slices.Sorted(maps.Keys(r.Ratios)) {
		fmt.Fprintf(out, "%-34s %6.2f", name, r.Ratios[name])
		if byCPU := r.ByCPU[name]; byCPU > 0 {
			fmt.Fprintf(out, "   by CPU %6.2f", byCPU)
		}
		fmt.Fprintln(out)
	}
	if r.Quick {
		fmt.Fprintln(out, "A quick run says whether it works, and not how fast.")
	}
	fmt.Fprintf(out, "%.0f s in all\n", r.Seconds)
}
