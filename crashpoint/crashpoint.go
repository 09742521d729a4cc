// Package crashpoint makes a process die at a named place in the code, as if it were killed there, so that it can be
// shown what survives. A process that was not told to passes these places as if they were not there.
package crashpoint

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Variable is the environment variable that a process is told by. It is no setting of an installation, and in no
// help: it is for those who verify the program.
const Variable = "TAKEOUT_CRASH_AT"

// armed has the points at which something happens, nil if there are none. It does not change after Arm.
var armed map[string]*trap

// trap is what happens at a point.
type trap struct {
	reached atomic.Int64
	at      int64         // which time that the point is reached
	stop    time.Duration // how long it halts then; it dies if zero
}

// Arm makes things happen at the points that spec names: nothing if it is empty, or point[:n][:stop=duration],
// several separated by commas. When a point is reached for the n-th time, the first if there is no n, the process
// dies; with stop, the goroutine that reached it sleeps that long instead, and then goes on. The error says what is
// wrong with the spec. Arm must be called before another goroutine may reach a point, and once.
func Arm(spec string) error {
	if spec == "" {
		return nil
	}
	traps := map[string]*trap{}
	for one := range strings.SplitSeq(spec, ",") {
		name, rest, more := strings.Cut(strings.TrimSpace(one), ":")
		t, err := parse(rest, more)
		switch {
		case !known(name):
			return fmt.Errorf("%s: there is no point %q; there are %s", Variable, name, strings.Join(names(), ", "))
		case err != nil:
			return fmt.Errorf("%s: %s: %w", Variable, name, err)
		case traps[name] != nil:
			return fmt.Errorf("%s: %s is named twice", Variable, name)
		}
		traps[name] = t
	}
	armed = traps
	return nil
}

// parse reads what follows the name of a point.
func parse(rest string, more bool) (*trap, error) {
	t := &trap{at: 1}
	if !more {
		return t, nil
	}
	count, stop, both := strings.Cut(rest, ":")
	if !both && strings.HasPrefix(rest, "stop=") {
		count, stop, both = "1", rest, true
	}
	var err error
	if t.at, err = strconv.ParseInt(count, 10, 64); err != nil || t.at < 1 {
		return nil, fmt.Errorf("%q must be a number from 1 on: which time that the point is reached", count)
	}
	if !both {
		return t, nil
	}
	duration, isStop := strings.CutPrefix(stop, "stop=")
	if t.stop, err = time.ParseDuration(duration); !isStop || err != nil || t.stop <= 0 {
		return nil, fmt.Errorf("%q must be stop=DURATION, with a duration above 0s", stop)
	}
	return t, nil
}

// Here says that the program has come to the point of that name, which must be one of Points. If the process was told
// to die there, it does not return. Otherwise it costs next to nothing.
func Here(name string) {
	if armed != nil {
		reach(name)
	}
}

// In is Here of the point place/phase, for code that several places share.
func In(place, phase string) {
	if armed != nil {
		reach(place + "/" + phase)
	}
}

func reach(name string) {
	t := armed[name]
	if t == nil || t.reached.Add(1) != t.at {
		return
	}
	if t.stop > 0 {
		fmt.Fprintf(os.Stderr, "takeout: halting for %s at crash point %s\n", t.stop, name)
		time.Sleep(t.stop)
		return
	}
	fmt.Fprintf(os.Stderr, "takeout: dying at crash point %s\n", name)
	if self, err := os.FindProcess(os.Getpid()); err == nil {
		_ = self.Kill() // not os.Exit, which a debugger or a coverage tool would still do work in
	}
	select {} // the others may go on until the signal arrives; this one must not
}
