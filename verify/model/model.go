// Package model explores the protocol between the order and the dispatch service: every order in which a client, two
// databases, the relays, the queues and the reconciler can act, and every place where a fault can strike.
//
// It is not a drawing of the program. The use cases of package app run in it, on stores that are a few numbers, with the
// routes of package messaging and its decisions about errors, and with the reconciler's judgement. What is modelled is
// what is around them: clients, relays, queues, retries, failovers. Read steps.go first.
//
// Left out are time, which stands still but for the moment an order was placed at, the contents of orders, which never
// differ, and payments and points.
package model

import (
	"cmp"
	"fmt"
	"slices"

	"takeout/app"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/domain/event"
	"takeout/domain/order"
	"takeout/ports/messaging"
)

// Setting is what is explored: who takes part, which faults strike how often, and what is built wrongly.
type Setting struct {
	Orders int // one or two
	Relays int // one or two

	Legacy       bool // orders are announced before COMMIT and not through the outbox
	Delivers     bool // couriers bring orders
	NoRoom       bool // no courier has room at first, and orders may be given up
	NoCancel     bool // clients do not cancel
	Again        bool // clients send requests again that were answered
	NoReconciler bool
	NoDiscard    bool // no person gives up a message for good

	DispatchFails bool // failovers are the dispatch database's, and not the order database's

	Faults  Faults
	Defects Defects
}

// Faults says how often each strikes at most.
type Faults struct {
	Crashes     uint8 // a process dies between two steps, or a confirm is lost, which looks the same
	LostAnswers uint8 // COMMIT took effect, its answer was lost, and the store runs the transaction again
	Failures    uint8 // an attempt to handle a message fails and may succeed later
	Failovers   uint8 // a database goes back to what its replica has
	Expiries    uint8 // the lease of a living relay ends, and the other relay takes the row too
	Hasty       uint8 // the reconciler acts although a queue still holds an event about the order
}

// Defects are ways to build it wrongly.
type Defects struct {
	NoInbox           bool // messages are not deduplicated
	NoKey             bool // the dispatch table takes an order twice
	InboxApart        bool // the inbox row is committed before the rest
	AckFirst          bool // messages are acked before the transaction
	DeleteFirst       bool // the relay deletes rows before the broker has the events
	NoOutbox          bool // events are kept in memory after COMMIT, and sent from there
	DeleteCancelled   bool // to cancel is to delete the row
	CancelUnheard     bool // the compensation does not hear of cancellations
	PlainRead         bool // the compensation does not wait for a transaction that is storing the order
	RetryForEverybody bool // a message that is tried again goes to all its queues
}

const (
	maxOrders   = 2
	maxMessages = 8
)

// state is everything at one moment. It is comparable: rows and events are the numbers of distinct values.
type state struct {
	clients    [maxOrders]client
	rows       [maxOrders]number // of the order table; 0 is no row
	dispatches [maxOrders]number // of the dispatch table; 0 is no row
	messages   [maxMessages]message

	replica    [maxOrders]number // the rows that the replica has, once it lags
	lags       bool              // the replica applies nothing any more, until there is a failover to it
	failedOver bool

	room       bool // couriers have room
	left       Faults
	unprovoked bool // a message came to a consumer twice, and no fault was the reason
}

type number uint16

// client is one order's client and what became of their order, as far as no table tells it.
type client struct {
	place, cancel answer
	requests      uint8 // to place the order
	open          bool  // the transaction of a legacy service has announced the order and not ended

	placeTold, cancelTold bool  // the broker had the announcement
	sent                  uint8 // couriers so far
	released              bool  // the dispatch was released once
}

// answer is what a client knows of a request.
type answer uint8

const (
	unasked answer = iota
	unknown        // an error that says nothing, or none: it may have taken effect
	accepted
	refused // it did not take effect
)

// message is one event under way: where its copies are, and which consumer is done with it. A message without a copy
// is forgotten, with its inbox rows.
type message struct {
	event  number
	outbox bool
	relays [2]hold
	queues [2]uint8 // copies in the queue of each of the event's routes; more than two are two
	table  table
	was    table // what the replica has, of the tables in the database that fails
	outWas bool  // the outbox row that the replica has
	acked  [2]bool
}

// table is what a database notes about a message for each of its routes.
type table struct {
	inbox [2]bool
	aside [2]aside
}

// hold is how far a relay has come with a row.
type hold uint8

const (
	idle hold = iota
	claimed
	published
)

// aside is how a message is kept that could not be handled.
type aside uint8

const (
	nowhere aside = iota
	delayed       // it comes again
	asked         // it comes again because a person asked
	kept          // for a person
)

// underWay reports whether the message, or a row about it, is anywhere but in the replica.
func (m *message) underWay() bool {
	return m.outbox || m.relays != [2]hold{} || m.queues != [2]uint8{} || m.table.aside != [2]aside{}
}

// inDatabase reports whether a database shows that the message will come yet.
func (m *message) inDatabase() bool { return m.outbox || m.has(delayed) || m.has(asked) }

// has reports whether one of its consumers has put the message aside in that way.
func (m *message) has(how aside) bool { return m.table.aside[0] == how || m.table.aside[1] == how }

// rank is another number for each other message.
func (m *message) rank() uint64 {
	rank := uint64(m.event)
	add := func(width int, part uint8) { rank = rank<<width | uint64(part) }
	bit := map[bool]uint8{true: 1}
	add(1, bit[m.outbox])
	add(1, bit[m.outWas])
	for i := range 2 {
		add(2, uint8(m.relays[i]))
		add(2, m.queues[i])
		add(1, bit[m.acked[i]])
		add(1, bit[m.table.inbox[i]])
		add(2, uint8(m.table.aside[i]))
		add(1, bit[m.was.inbox[i]])
		add(2, uint8(m.was.aside[i]))
	}
	return rank
}

// tidy forgets what cannot matter any more and brings messages into an order, so that states that do not differ are
// equal.
func (s *state) tidy() {
	var room [maxMessages]message
	live := room[:0]
	for _, m := range s.messages {
		if m.event != 0 && (m.underWay() || m.outWas || m.was.aside != [2]aside{}) {
			live = append(live, m)
		}
	}
	slices.SortFunc(live, func(a, b message) int { return cmp.Compare(a.rank(), b.rank()) })
	s.messages = [maxMessages]message{}
	copy(s.messages[:], live)
}

// values numbers distinct values from 1.
type values[K comparable, V any] struct {
	numbers map[K]number
	all     []V
}

func (v *values[K, V]) number(key K, value V) number {
	n, known := v.numbers[key]
	if !known {
		if v.numbers == nil {
			v.numbers = map[K]number{}
		}
		v.all = append(v.all, value)
		n = number(len(v.all))
		v.numbers[key] = n
	}
	return n
}

func (v *values[K, V]) value(n number) V { return v.all[n-1] }

// explorer runs the use cases on states.
type explorer struct {
	Setting
	ids      [maxOrders]order.ID
	useCases app.UseCases
	legacy   *app.Orders
	hurried  *app.Dispatches // for whom every order has waited too long
	money    domain.Money
	routes   map[string][]route // by event

	rows       values[order.Snapshot, order.Snapshot]
	dispatches values[dispatch.Dispatch, dispatch.Dispatch]
	events     values[string, announcement]

	broken  error // why the model itself is wrong, nil if it is not
	next    state // has one place, so that a step allocates nothing
	current       // what the step that is being made is about
	sink    func(next *state, fault bool, text string, args ...any)
}

// announcement is an event, and what is known of every such event.
type announcement struct {
	event.Event
	order  int
	text   string
	routes []route
}

// route is one of messaging's, with the use case that its queue feeds.
type route struct {
	messaging.Route
	handle func(e event.Event) error
}

// Result is what an exploration found.
type Result struct {
	States, Quiescent int
	Violation         string   // the invariant and what is wrong, empty if nothing is
	Path              []string // the fewest steps to the violation
}

// String tells the result in a line, and the path to a violation in a line for each step.
func (r Result) String() string {
	text := fmt.Sprintf("%d states, %d of them quiescent", r.States, r.Quiescent)
	if r.Violation == "" {
		return text
	}
	text += ": " + r.Violation
	for i, step := range r.Path {
		text += fmt.Sprintf("\n%4d. %s", i+1, step)
	}
	return text
}

// Explore visits every state that the setting can reach, the nearest first, and stops at the first that violates an
// invariant. If none does, it looks for states from which no quiescent state can be reached without another fault or
// request. An error is about the model and says nothing about the protocol.
func Explore(setting Setting) (Result, error) {
	x, err := newExplorer(setting)
	if err != nil {
		return Result{}, err
	}
	var (
		states = []state{{left: setting.Faults, room: !setting.NoRoom}}
		seen   = map[state]int32{states[0]: 0}
		parent = []int32{-1}
		edges  [][2]int32 // from, to; of steps that somebody owes
		calm   []int32
	)
	result := func(violation string, at int32) (Result, error) {
		return Result{len(states), len(calm), violation, x.path(states, parent, at)}, nil
	}
	for at := int32(0); int(at) < len(states); at++ {
		quiescent := x.quiescent(&states[at])
		if quiescent {
			calm = append(calm, at)
		}
		if violation := x.check(&states[at], quiescent); violation != "" {
			return result(violation, at)
		}
		x.sink = func(next *state, fault bool, _ string, _ ...any) {
			to, known := seen[*next]
			if !known {
				to = int32(len(states))
				seen[*next] = to
				states, parent = append(states, *next), append(parent, at)
			}
			if !fault {
				edges = append(edges, [2]int32{at, to})
			}
		}
		if x.steps(states[at]); x.broken != nil {
			return Result{}, x.broken
		}
	}
	if stuck := unreachable(len(states), edges, calm); stuck >= 0 {
		return result("I4: from here it never comes to rest", stuck)
	}
	return Result{States: len(states), Quiescent: len(calm)}, nil
}

// unreachable returns the first state from which no edges lead to a goal, -1 if there is none.
func unreachable(states int, edges [][2]int32, goals []int32) int32 {
	slices.SortFunc(edges, func(a, b [2]int32) int { return int(a[1]) - int(b[1]) })
	begins := make([]int32, states+1)
	for _, e := range edges {
		begins[e[1]+1]++
	}
	for i := range states {
		begins[i+1] += begins[i]
	}
	reaches := make([]bool, states)
	for _, g := range goals {
		reaches[g] = true
	}
	for todo := slices.Clone(goals); len(todo) > 0; {
		to := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, e := range edges[begins[to]:begins[to+1]] {
			if !reaches[e[0]] {
				reaches[e[0]] = true
				todo = append(todo, e[0])
			}
		}
	}
	return int32(slices.Index(reaches, false))
}

// path tells how the state is reached.
func (x *explorer) path(states []state, parent []int32, at int32) []string {
	var path []string
	for ; parent[at] >= 0; at = parent[at] {
		step := ""
		x.sink = func(next *state, _ bool, text string, args ...any) {
			if step == "" && *next == states[at] {
				step = fmt.Sprintf(text, args...)
			}
		}
		x.steps(states[parent[at]])
		path = append(path, step)
	}
	slices.Reverse(path)
	return path
}
