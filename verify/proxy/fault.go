package proxy

import (
	"bytes"
	"slices"
	"sync"
	"time"
)

// Point is what comes through a proxy and can meet a fault.
type Point uint8

// Points of MySQL. A prepared statement comes through when it is executed.
const (
	Commit    Point = iota + 1 // COMMIT. With a Match: the one that ends a transaction in which a statement contained it
	Statement                  // any statement that contains Match in its first 32 KiB
)

// Points of AMQP. The content of a message belongs to its method. Match is looked for in the method's arguments.
const (
	Publish Point = iota + 16 // basic.publish of the client; Match: exchange or routing key
	Confirm                   // basic.ack and basic.nack of the broker; has no text to match
	Return                    // basic.return
	Deliver                   // basic.deliver; Match: consumer tag, exchange or routing key
	Ack                       // basic.ack of the client; has no text to match
)

// Action is what happens to it.
type Action uint8

// Actions. What is done to connections that break is done at both ends, with RST where nothing may get through any more.
const (
	DropBefore Action = iota + 1 // MySQL: the connection breaks and the server never sees the statement
	DropAfter                    // MySQL: it is executed, and the connection breaks when the reply is there
	DelayReply                   // MySQL: it is executed, and the reply comes Fault.Delay later
	HalfPacket                   // MySQL: it is executed, and the connection breaks after half of the reply's first packet
	Fail                         // MySQL: error Fault.Code is the reply. A COMMIT then was a ROLLBACK, as after error 1213; else nothing is executed

	Delay // it comes Fault.Delay later. AMQP: so does all behind it on its channel, and other channels go on

	Drop       // AMQP: it is gone, and the connection stays
	DropAndCut // AMQP: it is gone, and the connection breaks
	Cut        // AMQP: it gets through, and then the connection breaks
	Duplicate  // AMQP: it is published twice; the first of the two confirms is the client's
	Reorder    // AMQP: it changes places with the next delivery to the same consumer, which must come within Fault.Delay (0: a second)
	Nack       // AMQP: what the broker confirmed is said to be refused
)

// actions says what may happen where.
var actions = map[Protocol]map[Point][]Action{
	MySQL: {
		Commit:    {DropBefore, DropAfter, Delay, DelayReply, HalfPacket, Fail},
		Statement: {DropBefore, DropAfter, Delay, DelayReply, HalfPacket, Fail},
	},
	AMQP: {
		Publish: {Drop, DropAndCut, Cut, Delay, Duplicate},
		Confirm: {Drop, DropAndCut, Cut, Delay, Nack},
		Return:  {Drop, DropAndCut, Cut, Delay},
		Deliver: {Drop, DropAndCut, Cut, Delay, Reorder},
		Ack:     {Drop, DropAndCut, Cut, Delay},
	},
}

// Fault is what is to happen to the next events of a kind.
//
// A network loses nothing in the middle of a connection that goes on, but brokers and their nodes do: [Drop] is for that.
// A publishing that is dropped is never confirmed, and the confirms of others keep their numbers. What else is dropped
// is out until the connection breaks: follow it by [Proxy.Cut] where the system must come to rest. A dropped [Return] makes
// the broker lie about an unroutable message, and no publisher can know.
type Fault struct {
	At    Point
	Do    Action
	Match string        // part of the event's text; empty for any
	Skip  int           // this many events are let through first
	Count int           // this many meet the fault; 0 is one, negative is all until Disarm
	Delay time.Duration // of Delay and DelayReply; 0 is until Disarm
	Code  uint16        // MySQL error number of Fail
}

// Faults returns every point and action of a protocol, in order, with nothing else set.
func Faults(protocol Protocol) []Fault {
	var all []Fault
	for at, todo := range actions[protocol] {
		for _, do := range todo {
			all = append(all, Fault{At: at, Do: do})
		}
	}
	slices.SortFunc(all, func(a, b Fault) int { return int(a.At)<<8 + int(a.Do) - int(b.At)<<8 - int(b.Do) })
	return all
}

// Armed is a fault that waits for its events. Its methods are safe for concurrent use.
type Armed struct {
	Fault
	proxy *Proxy
	done  chan struct{}
	off   chan struct{}

	mu     sync.Mutex
	skip   int
	left   int
	sprung int
}

// Sprung returns how often the fault has happened. A delay has happened when it began.
func (a *Armed) Sprung() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.sprung
}

// Done is closed when the fault has happened Count times.
func (a *Armed) Done() <-chan struct{} { return a.done }

// Disarm lets all events through from now on, and lets go what the fault delays.
func (a *Armed) Disarm() {
	a.proxy.forget(a)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.left = 0
	select {
	case <-a.off:
	default:
		close(a.off)
	}
}

// take reports whether the event that is there meets the fault. What is taken either happened or is given back.
func (a *Armed) take() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.left == 0:
		return false
	case a.skip > 0:
		a.skip--
		return false
	}
	a.left--
	return true
}

func (a *Armed) giveBack() {
	a.mu.Lock()
	defer a.mu.Unlock()
	select {
	case <-a.off:
	default:
		a.left++
	}
}

func (a *Armed) happened() {
	a.mu.Lock()
	a.sprung++
	last := a.sprung == a.Count
	a.mu.Unlock()
	if last {
		a.proxy.forget(a)
		close(a.done)
	}
}

// over reports whether what has been delayed since then is to go on.
func (a *Armed) over(since time.Time) bool {
	select {
	case <-a.off:
		return true
	default:
		return a.Delay > 0 && time.Since(since) >= a.Delay
	}
}

// Arm sets a fault. Of several for the same event, the first that was armed happens. A fault whose action does not belong
// to its point, or whose point is of another protocol (see [Faults]), never happens.
func (p *Proxy) Arm(f Fault) *Armed {
	if f.Count == 0 {
		f.Count = 1
	}
	a := &Armed{Fault: f, proxy: p, skip: f.Skip, left: f.Count, done: make(chan struct{}), off: make(chan struct{})}
	if !slices.Contains(actions[p.protocol][f.At], f.Do) {
		return a
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.setArmed(append(slices.Clone(p.waiting()), a))
	return a
}

func (p *Proxy) forget(a *Armed) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.setArmed(slices.DeleteFunc(slices.Clone(p.waiting()), func(b *Armed) bool { return a == b }))
}

// setArmed replaces the list as a whole: connections read it without a lock.
func (p *Proxy) setArmed(list []*Armed) {
	if len(list) == 0 {
		p.armed.Store(nil)
		return
	}
	p.armed.Store(&list)
}

// waiting returns the faults that are armed. Most of the time there is none, and that costs nothing.
func (p *Proxy) waiting() []*Armed {
	if list := p.armed.Load(); list != nil {
		return *list
	}
	return nil
}

// meets returns the fault that this event meets, or nil.
func (p *Proxy) meets(at Point, text []byte) *Armed {
	for _, a := range p.waiting() {
		if a.At == at && (a.Match == "" || bytes.Contains(text, []byte(a.Match))) && a.take() {
			return a
		}
	}
	return nil
}
