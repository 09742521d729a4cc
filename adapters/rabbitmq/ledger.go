package rabbitmq

import "slices"

// ledger knows which deliveries of one channel are finished, and which acks tell that to the broker.
//
// Delivery tags count up from 1 without a gap. All below next are settled with the broker.
type ledger struct {
	next     uint64
	finished map[uint64]bool // tags from next on: true if an ack is still to be sent
	waiting  int             // how many of these are true
}

func newLedger() *ledger {
	return &ledger{next: 1, finished: make(map[uint64]bool)}
}

// finish notes that a delivery can be acked.
func (l *ledger) finish(tag uint64) {
	l.finished[tag] = true
	l.waiting++
}

// settle notes that the broker has been told about a delivery.
func (l *ledger) settle(tag uint64) { l.finished[tag] = false }

// prefix returns the tag that acks, with multiple set, all finished deliveries before the first unfinished one, zero
// if there are none.
//
// It is always one that still needs an ack: RabbitMQ closes the channel over the tag of a settled delivery.
func (l *ledger) prefix() (last uint64) {
	for {
		unsent, finished := l.finished[l.next]
		if !finished {
			return last
		}
		if unsent {
			last = l.next
			l.waiting--
		}
		delete(l.finished, l.next)
		l.next++
	}
}

// stragglers returns the tags that are finished behind an unfinished delivery, each of which needs an ack of its own.
func (l *ledger) stragglers() []uint64 {
	if l.waiting == 0 {
		return nil
	}
	tags := make([]uint64, 0, l.waiting)
	for tag, unsent := range l.finished {
		if unsent {
			tags = append(tags, tag)
			l.finished[tag] = false
		}
	}
	l.waiting = 0
	slices.Sort(tags)
	return tags
}
