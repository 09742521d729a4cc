// Package history is what a verification run asks of the system and what it was answered. What is asked follows from a
// seed, so that nobody needs to write it down: the load asks it, and the checker knows what must have become of it.
package history

import (
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
)

// Plan is what the clients of one run ask. The same seed gives the same plan.
type Plan struct {
	Seed   uint64
	Orders int // numbered from 0
}

// Order is what one client asks about one order.
type Order struct {
	Name     string // has the order's number in it; see Plan.Number
	Amount   int64  // minor units; 0 if it asks for what must be refused
	Currency string
	ID       string // chosen by the client; empty if the service chooses
	Key      string // the Idempotency-Key; empty if the client sends none
	Cancel   bool   // the customer cancels it after it was placed
	Deliver  bool   // the courier is said to have brought it, some time after it was placed
	Again    int    // how often the same request is sent once more, at the same time, although the first was answered
	Contest  bool   // several clients place, cancel and read it at the same time, as Plan.Contest says, and nothing else is done
}

// What the orders are made of. Texts are in several scripts, because bytes and characters are easily mixed up.
var (
	dishes     = []string{"Mapo tofu", "麻婆豆腐", "Pelmeni Пельмени", "🍜🍜🍜", "O'Brien's \"stew\"", "ﷺ ߷ 𝔻öner"}
	currencies = []string{"CNY", "CNY", "CNY", "CNY", "EUR", "JPY"}
)

// Order returns what is asked about the order of that number.
//
// Of a hundred orders about ten are cancelled and ten delivered; a third have an id of the client's choice, half of the
// others an Idempotency-Key; one in twenty is sent more than once, and two cost nothing and must be refused. One is contested.
func (p Plan) Order(number int) Order {
	r := rand.New(rand.NewPCG(p.Seed, uint64(number)))
	o := Order{
		Name:     fmt.Sprintf("%s %s", p.tag(number), dishes[r.IntN(len(dishes))]),
		Amount:   1 + r.Int64N(20_000),
		Currency: currencies[r.IntN(len(currencies))],
	}
	switch r.IntN(100) {
	case 0:
		o.Amount = 2_147_483_647 // the most that an order may cost
	case 1, 2:
		o.Amount = 0
	}
	switch r.IntN(3) {
	case 0:
		o.ID = "v-" + p.tag(number)
	case 1:
		o.Key = "key-" + p.tag(number)
	}
	switch r.IntN(10) {
	case 0:
		o.Cancel = true
	case 1:
		o.Deliver = true
	}
	if r.IntN(20) == 0 && o.ID+o.Key != "" {
		o.Again = 1 + r.IntN(3)
	}
	if o.ID != "" && o.Amount > 0 && r.IntN(33) == 0 {
		o.Contest, o.Cancel, o.Deliver, o.Again = true, false, false, 0
	}
	return o
}

// tag names an order of this run: seven digits of the seed and the number, in base 36.
func (p Plan) tag(number int) string {
	seed := strconv.FormatUint(p.Seed, 36)
	return seed[max(0, len(seed)-7):] + "-" + strconv.FormatInt(int64(number), 36)
}

// Number returns which order of this run has the name, and whether one has.
func (p Plan) Number(name string) (int, bool) {
	tag, _, _ := strings.Cut(name, " ")
	_, digits, ok := strings.Cut(tag, "-")
	if !ok {
		return 0, false
	}
	number, err := strconv.ParseInt(digits, 36, 64)
	if err != nil || number < 0 || number >= int64(p.Orders) || p.Order(int(number)).Name != name {
		return 0, false
	}
	return int(number), true
}
