package rabbitmq

import (
	"cmp"
	"slices"
)

// ledger knows which deliveries of one channel are finished, and which acks tell that to the broker.
//
// Delivery tags count up from 1 without a gap. What is finished is kept as spans, of which there are no more than
// deliveries in flight: one that is stuck for hours may have millions behind it.
type ledger struct {
	next   uint64   // all tags before it are finished, and told
	done   []span   // finished tags from next on, in their order and apart from each other
	unsent []uint64 // finished tags whose acks are still to be sent
}

// span is the tags from one to another, both included.
type span struct{ from, to uint64 }

func newLedger() *ledger { return &ledger{next: 1} }

// finish notes that a delivery can be acked.
func (l *ledger) finish(tag uint64) {
	l.settle(tag)
	l.unsent = append(l.unsent, tag)
}

// settle notes that the broker has been told about a delivery.
func (l *ledger) settle(tag uint64) {
	i, _ := slices.BinarySearchFunc(l.done, tag, func(s span, tag uint64) int { return cmp.Compare(s.to, tag) })
	follows := i > 0 && l.done[i-1].to+1 == tag
	precedes := i < len(l.done) && tag+1 == l.done[i].from
	switch {
	case follows && precedes:
		l.done[i-1].to = l.done[i].to
		l.done = slices.Delete(l.done, i, i+1)
	case follows:
		l.done[i-1].to = tag
	case precedes:
		l.done[i].from = tag
	default:
		l.done = slices.Insert(l.done, i, span{tag, tag})
	}
}

// prefix returns the tag that acks, with multiple set, all finished deliveries before the first unfinished one, zero
// if there are none.
//
// It is always one that still needs an ack: RabbitMQ closes the channel over the tag of a settled delivery.
func (l *ledger) prefix() (last uint64) {
	if len(l.done) == 0 || l.done[0].from != l.next {
		return 0
	}
	end := l.done[0].to
	l.done = slices.Delete(l.done, 0, 1)
	l.next = end + 1
	l.unsent = slices.DeleteFunc(l.unsent, func(tag uint64) bool {
		if tag > end {
			return false
		}
		last = max(last, tag)
		return true
	})
	return last
}

// stragglers returns the tags that are finished behind an unfinished delivery, each of which needs an ack of its own.
func (l *ledger) stragglers() []uint64 {
	tags := l.unsent
	l.unsent = nil
	slices.Sort(tags)
	return tags
}
