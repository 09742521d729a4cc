package history

import (
	"math"
	"math/rand/v2"
	"time"
)

// Kind is what a client asks about a contested order.
type Kind uint8

// The kinds.
const (
	Place Kind = iota
	Cancel
	Get
)

// State is what an answer says of a contested order. It only grows.
type State uint8

// The states.
const (
	Absent State = iota
	Placed
	Dispatched
	Cancelled
)

// Op is what one client asked about a contested order, and what it was answered.
type Op struct {
	Kind     Kind
	Called   time.Duration // since a moment that all clients share
	Answered time.Duration // Never if the client does not know what became of it; then nothing below counts
	Saw      State         // Absent if there was no such order
	Fresh    bool          // it was this one that placed the order
}

// Never is when what is unknown was answered.
const Never = time.Duration(math.MaxInt64)

// Contest returns what each of the clients of a contested order asks, one thing after the other, all clients at the same
// time. At least one places it.
func (p Plan) Contest(number int) [][]Kind {
	// Not the stream that Order draws from: what makes an order contested would also say what is asked about it.
	r := rand.New(rand.NewPCG(^p.Seed, uint64(number)))
	clients := make([][]Kind, 3)
	for i := range clients {
		for range 4 {
			kind := Get
			switch r.IntN(8) {
			case 0, 1:
				kind = Place
			case 2:
				kind = Cancel
			}
			clients[i] = append(clients[i], kind)
		}
	}
	clients[0][0] = Place
	return clients
}

// Did notes what was asked about a contested order.
func (h *History) Did(number int, op Op) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.contests[number] = append(h.contests[number], op)
}

// Ops returns what was asked about a contested order, in no order.
func (h *History) Ops(number int) []Op {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.contests[number]
}
