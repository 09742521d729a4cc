package check

import (
	"strconv"
	"time"

	"takeout/verify/history"
)

// record is what all tables say of one order, as short as the rules allow.
type record struct {
	id      uint64 // hash of the order's id, 0 if no table has the order
	row     int64  // its row in order_info, 0 if it has none
	name    uint64 // hash of the name that all tables must have: the plan's, or else the one in order_info
	money   uint64 // likewise, of amount and currency
	amount  int64  // minor units, likewise
	placed  int64  // when, in microseconds, as order_info says
	courier uint64 // hash of who brings it since when, as order_info says
	version int64
	points  int64 // as order_info says
	awarded int64
	revoked int64
	events  [9]uint64 // hash of the first event's id, by key
	flags   flags
	marked  uint16 // routes whose inbox has that first event
	any     uint16 // routes whose inbox has some event about the order
	order   state
	platoon state
	payment state
	reason  reason
}

// flags are what is known of an order beside its states.
type flags uint32

const (
	twin            flags = 1 << iota // another row is the same order
	stranger                          // nobody asked for it
	invited                           // a foreign message was to make it again
	pending                           // something about it is stuck or was given up, which is reported by itself
	twoDispatches                     // a second row in platoon
	twoPayments                       // in payment
	twoCharges                        // in the gateway's books
	twoEntries                        // of one kind in points_entry
	orderDiffers                      // order_info has another name, amount, currency or time than it must
	dispatchDiffers                   // platoon
	paymentDiffers                    // payment
	pointsDiffer                      // points_entry, in its time
	booksDiffer                       // the gateway's books, in their money
	courierDiffers                    // between order_info and platoon
	hasCourier                        // order_info names a courier
	sent                              // platoon names one
	timesWrong                        // a time is there that should not be, or the other way round
	newer                             // another service was told a version that order_info does not have yet
	inBooks                           // the gateway was asked for it
	charged                           // and took the money
	givenBack                         // and gave it back, or never will take it
	award                             // points_entry has one
	revoke                            // points_entry has one
	answered                          // idempotency_answer has it
	repaired                          // a history says so
	found                             // the reconciler found a difference
	unresolved                        // and it is still there
)

func (r *record) has(f flags) bool     { return r.flags&f != 0 }
func (r *record) set(f flags)          { r.flags |= f }
func (r *record) is(s state) bool      { return r.order == s }
func (r *record) stored() bool         { return r.order != none }
func (r *record) held() bool           { return r.has(charged) && !r.has(givenBack) }
func (r *record) earns() int64         { return r.amount / 100 } // a point for each hundred minor units
func (r *record) announced(k int) bool { return r.events[k] != 0 }

// setIf sets the flag if the condition holds.
func (r *record) setIf(condition bool, f flags) {
	if condition {
		r.set(f)
	}
}

// state is a word of one of the tables.
type state uint8

const (
	none state = iota
	placed
	dispatched
	delivered
	cancelled
	waiting
	assigned
	released
	impossible
	charging
	succeeded
	refused
	refunded
	void
	odd // no word that the program knows
)

var stateNames = [...]string{"missing", "placed", "dispatched", "delivered", "cancelled", "waiting", "assigned", "released",
	"impossible", "charging", "succeeded", "refused", "refunded", "void", "in an unknown state"}

func (s state) String() string { return stateNames[s] }

func stateOf(text string) state {
	for s := placed; s < odd; s++ {
		if stateNames[s] == text {
			return s
		}
	}
	return odd
}

// reason is who cancelled an order.
type reason uint8

const (
	byCustomer reason = iota
	noCourier
	notPaid
	cancelWasLost
)

func reasonOf(text string) reason {
	switch text {
	case "no courier was found in time":
		return noCourier
	case "the payment was refused":
		return notPaid
	case "another service knows that it was cancelled":
		return cancelWasLost
	}
	return byCustomer
}

// extra is an event beyond the first of its key about its order.
type extra struct {
	record int32
	key    int
	marked uint16
}

// more is what few orders have.
type more struct {
	extra     []uint64       // hashes of the ids of events beyond the first of their key
	again     map[string]int // announcements that were repeated on purpose, by service
	recreated int
	step      string // of repair, the last
	class     string // of what the reconciler found, the last
}

func (c *checker) moreOf(i int32) *more {
	m := c.more[i]
	if m == nil {
		m = &more{again: map[string]int{}}
		c.more[i] = m
	}
	return m
}

// find returns the record of the order, and whether there is one.
func (c *checker) find(orderID string) (int32, bool) {
	i, ok := c.index[history.Hash(orderID)]
	return i, ok
}

// at returns the record of the order, and makes one if it is heard of for the first time.
func (c *checker) at(orderID string) int32 {
	i, ok := c.find(orderID)
	if !ok {
		i = c.newRecord()
		c.know(i, orderID)
		c.ids[i] = orderID
	}
	return i
}

func (c *checker) newRecord() int32 {
	c.records = append(c.records, record{})
	return int32(len(c.records) - 1)
}

func (c *checker) know(i int32, orderID string) {
	hash := history.Hash(orderID)
	c.records[i].id = hash
	if _, ok := c.index[hash]; !ok {
		c.index[hash] = i
	}
}

// number is the number that the record's order has in the plan, -1 if it has none.
func (c *checker) number(i int32) int {
	if int(i) < c.in.Plan.Orders {
		return int(i)
	}
	if n, ok := c.told(c.records[i].id); ok {
		return n
	}
	return -1
}

// told returns the number of the order of which clients were told that id.
func (c *checker) told(id uint64) (int, bool) {
	if c.numbers == nil {
		c.numbers = map[uint64]int{}
		for n := range c.in.Plan.Orders {
			if id := c.in.History.Of(n).ID; id != 0 {
				c.numbers[id] = n
			}
		}
	}
	n, ok := c.numbers[id]
	return n, ok
}

func moneyOf(amount int64, currency string) uint64 {
	return history.Hash(strconv.FormatInt(amount, 10) + currency)
}

// differs reports whether a table that says this of an order that is stored contradicts what all must say.
func (r *record) differs(name string, amount int64, currency string, at time.Time) bool {
	return r.stored() && (history.Hash(name) != r.name || moneyOf(amount, currency) != r.money || micros(at) != r.placed)
}

// courierOf is the hash of who brings an order since when, and when they brought it.
func courierOf(courier string, assigned, brought time.Time) uint64 {
	return history.Hash(courier + "\x00" + strconv.FormatInt(micros(assigned), 10) + "\x00" + strconv.FormatInt(micros(brought), 10))
}

func micros(at time.Time) int64 {
	if at.IsZero() {
		return 0
	}
	return at.UnixMicro()
}
