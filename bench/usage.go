//go:build linux

package main

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// ticksPerSecond is the unit of /proc, the same on every Linux that Go runs on.
const ticksPerSecond = 100

// usage is the CPU time that was used up to a moment.
type usage struct {
	at   time.Time
	by   map[string]float64 // seconds, by process
	busy float64            // seconds of everybody on this machine
}

// measureUsage reads what the processes used. One that is gone used nothing.
func measureUsage(processes map[string]int) usage {
	u := usage{at: time.Now(), by: map[string]float64{}}
	for name, pid := range processes {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		// The name of the program, in parentheses, may hold spaces.
		fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
		u.by[name] = seconds(fields[11:13])
	}
	text, err := os.ReadFile("/proc/stat")
	if err == nil {
		line, _, _ := strings.Cut(string(text), "\n")
		fields := strings.Fields(line) // cpu user nice system idle iowait irq softirq steal
		u.busy = seconds(slices.Concat(fields[1:4], fields[6:9]))
	}
	return u
}

func seconds(ticks []string) float64 {
	sum := 0.0
	for _, text := range ticks {
		n, _ := strconv.ParseFloat(text, 64)
		sum += n
	}
	return sum / ticksPerSecond
}

// since returns the seconds that each process used since before, and how many cores others used meanwhile.
func (u usage) since(before usage) (by map[string]float64, others float64) {
	by, ours := map[string]float64{}, 0.0
	for name, now := range u.by {
		by[name] = now - before.by[name]
		ours += by[name]
	}
	return by, max(0, (u.busy-before.busy-ours)/u.at.Sub(before.at).Seconds())
}

// settle waits until the processes rest: what was left to do after the last order is done.
func (r *running) settle() {
	if r.quick {
		return
	}
	processes := r.processes()
	const rest = 0.15 // cores
	deadline := time.Now().Add(time.Minute)
	for quiet := 0; quiet < 2 && time.Now().Before(deadline); {
		before := measureUsage(processes)
		time.Sleep(200 * time.Millisecond)
		by, _ := measureUsage(processes).since(before)
		sum := 0.0
		for used := range maps.Values(by) {
			sum += used
		}
		if quiet++; sum > rest*0.2 {
			quiet = 0
		}
	}
}

// peakMemory returns the most memory that the process had resident so far, in MB, 0 if it is gone.
func peakMemory(pid int) float64 {
	return procField(fmt.Sprintf("/proc/%d/status", pid), "VmHWM:") / 1024
}

// procField returns the number behind a name in a file of /proc.
func procField(file, name string) float64 {
	text, _ := os.ReadFile(file)
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			n, _ := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return n
		}
	}
	return 0
}

// machine describes what is measured on.
func machine() map[string]string {
	model := "unknown"
	text, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(text)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			model = strings.TrimSpace(value)
		}
	}
	kernel, _ := os.ReadFile("/proc/sys/kernel/osrelease")
	return map[string]string{
		"cpu": model, "cores": strconv.Itoa(runtime.NumCPU()), "kernel": strings.TrimSpace(string(kernel)),
		"memory": fmt.Sprintf("%.0f GB", procField("/proc/meminfo", "MemTotal:")/(1<<20)), "go": runtime.Version(),
	}
}
