package history

import (
	"hash/fnv"
	"sync"
	"sync/atomic"
)

// Answer is what the client knows about one thing that it asked.
type Answer uint8

// The answers. Unknown is the one that a client is left with when the connection broke, the time was up, or the service
// said that it does not know: the thing may have been done, once, or not. It stays Unknown unless a later try of the same
// request is answered.
const (
	NotAsked Answer = iota
	Unknown
	OK
	Refused // for good: nothing was done
)

// Seen is what the clients saw of one order.
type Seen struct {
	Place   Answer
	Cancel  Answer // Refused if the order was delivered before
	Deliver Answer // Refused if no courier was on the way
	Wrong   bool   // an answer contradicts an earlier one, or is not what was asked for
	ID      uint64 // Hash of the order's id, 0 if no answer told one
}

// History is what the clients saw of all orders. Its methods are safe for concurrent use; it takes 16 bytes an order, and
// half a kilobyte for one in a hundred.
type History struct {
	seen []seen

	mu       sync.Mutex
	contests map[int][]Op
}

type seen struct {
	id      atomic.Uint64
	answers atomic.Uint64 // two bits each, and one for Wrong
}

const (
	placeShift, cancelShift, deliverShift = 0, 2, 4
	wrongBit                              = 1 << 6
)

// New returns the history of that many orders, of which nothing was asked.
func New(orders int) *History {
	return &History{seen: make([]seen, orders), contests: map[int][]Op{}}
}

// Len returns the number of orders.
func (h *History) Len() int { return len(h.seen) }

// Of returns what was seen of the order of that number.
func (h *History) Of(number int) Seen {
	s := &h.seen[number]
	a := s.answers.Load()
	return Seen{
		Place: Answer(a >> placeShift & 3), Cancel: Answer(a >> cancelShift & 3), Deliver: Answer(a >> deliverShift & 3),
		Wrong: a&wrongBit != 0, ID: s.id.Load(),
	}
}

// Placed notes what placing the order was answered, and its id if the answer told it. A second answer with another id
// is Wrong.
func (h *History) Placed(number int, a Answer, id string) {
	if id != "" {
		if s := &h.seen[number]; !s.id.CompareAndSwap(0, Hash(id)) && s.id.Load() != Hash(id) {
			h.Wrong(number)
		}
	}
	h.note(number, placeShift, a)
}

// Cancelled notes what cancelling the order was answered.
func (h *History) Cancelled(number int, a Answer) { h.note(number, cancelShift, a) }

// Delivered notes what saying that it was delivered was answered.
func (h *History) Delivered(number int, a Answer) { h.note(number, deliverShift, a) }

// Wrong notes that an answer was not as it must be.
func (h *History) Wrong(number int) { h.seen[number].answers.Or(wrongBit) }

// note keeps the answer, unless one that says more was there: OK says the most, because it cannot be taken back, and then
// Refused.
func (h *History) note(number, shift int, a Answer) {
	s := &h.seen[number]
	for {
		before := s.answers.Load()
		known := Answer(before >> shift & 3)
		if known == OK || known == Refused && a != OK || known == a {
			return
		}
		if s.answers.CompareAndSwap(before, before&^(3<<shift)|uint64(a)<<shift) {
			return
		}
	}
}

// Hash is how a History remembers an order's id.
func Hash(id string) uint64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(id))
	return h.Sum64() | 1 // 0 is none
}
