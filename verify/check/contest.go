package check

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/anishathalye/porcupine"

	"takeout/verify/history"
)

// register is an order as its clients see it: what was asked at the same time must have been answered as if it had been
// asked one after the other, each thing between its call and its answer (Herlihy and Wing, "Linearizability", 1990). The
// state is the least that is known of the order: it also grows by itself, when a courier is found and when a payment is
// refused.
var register = porcupine.Model{
	Init: func() any { return history.Absent },
	Step: func(state, _, output any) (bool, any) {
		now, op := state.(history.State), output.(history.Op)
		if op.Answered == history.Never { // if it was done, then somewhere from here on
			switch {
			case op.Kind == history.Place && now == history.Absent:
				return true, history.Placed
			case op.Kind == history.Cancel && now != history.Absent:
				return true, history.Cancelled
			}
			return true, now
		}
		switch {
		case op.Kind == history.Place && op.Fresh:
			return now == history.Absent && op.Saw == history.Placed, op.Saw
		case op.Kind == history.Cancel && op.Saw != history.Absent:
			return now != history.Absent && op.Saw == history.Cancelled, op.Saw
		case op.Saw == history.Absent:
			return now == history.Absent, now
		}
		return now != history.Absent && op.Saw >= now, op.Saw
	},
}

// contest: what the clients of a contested order were answered can be explained.
func contest(o order) *verdict {
	ops := o.in.History.Ops(int(o.i))
	if len(ops) == 0 {
		return nil
	}
	o.report.Contested++
	if explained(ops) {
		return nil
	}
	return &verdict{"I11", "mismatch", func() string {
		return "no order in which these could have been done explains the answers: " + describe(ops)
	}}
}

// explained reports whether there is an order in which the operations could have been done with these answers.
func explained(ops []history.Op) bool {
	operations := make([]porcupine.Operation, len(ops))
	for i, op := range ops {
		operations[i] = porcupine.Operation{Call: int64(op.Called), Return: int64(op.Answered), Output: op}
	}
	return porcupine.CheckOperations(register, operations)
}

// describe tells the operations as they began.
func describe(ops []history.Op) string {
	slices.SortFunc(ops, func(a, b history.Op) int { return int(a.Called - b.Called) })
	var lines []string
	for _, op := range ops {
		what := [...]string{"place", "cancel", "get"}[op.Kind]
		saw := [...]string{"absent", "placed", "dispatched", "cancelled"}[op.Saw]
		switch {
		case op.Answered == history.Never:
			lines = append(lines, fmt.Sprintf("%s from %s, unknown", what, op.Called.Round(time.Microsecond)))
			continue
		case op.Fresh:
			saw = "new, " + saw
		}
		lines = append(lines, fmt.Sprintf("%s from %s to %s: %s", what, op.Called.Round(time.Microsecond), op.Answered.Round(time.Microsecond), saw))
	}
	return strings.Join(lines, "; ")
}
