package rabbitmq

import (
	"slices"
	"testing"

	"pgregory.net/rapid"
)

func TestFinishedDeliveriesAreAckedTogether(t *testing.T) {
	t.Parallel()
	l := newLedger()
	for _, tag := range []uint64{2, 3, 5} {
		l.finish(tag)
	}
	if last := l.prefix(); last != 0 {
		t.Errorf("acked up to %d with 1 unfinished", last)
	}
	l.finish(1)
	if last := l.prefix(); last != 3 {
		t.Errorf("acked up to %d, want 3", last)
	}
	if tags := l.stragglers(); !slices.Equal(tags, []uint64{5}) {
		t.Errorf("stragglers are %v, want 5", tags)
	}
	l.settle(4)
	if last := l.prefix(); last != 0 {
		t.Errorf("%d is acked a second time", last)
	}
}

func TestDeliveryThatIsStuckCostsTheLedgerNothing(t *testing.T) {
	t.Parallel()
	l := newLedger()
	for tag := uint64(2); tag <= 100_000; tag++ {
		l.finish(tag)
		if tags := l.stragglers(); !slices.Equal(tags, []uint64{tag}) {
			t.Fatalf("stragglers are %v, want %d", tags, tag)
		}
	}
	if len(l.done) != 1 {
		t.Errorf("%d spans are kept", len(l.done))
	}
	l.settle(1)
	if last := l.prefix(); last != 0 || len(l.done) != 0 || l.next != 100_001 {
		t.Errorf("acked up to %d, kept %d, next is %d", last, len(l.done), l.next)
	}
}

// RabbitMQ closes the channel over an ack whose own tag is settled, and an ack that covers an unfinished delivery
// would lose it. The model is the broker: it knows what is unacked.
func TestEveryDeliveryIsSettledOnceAndNoneTooEarly(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		l := newLedger()
		unacked := make(map[uint64]bool)
		finished := make(map[uint64]bool)
		var next uint64
		ack := func(tag uint64) {
			if !unacked[tag] || !finished[tag] {
				t.Fatalf("ack of %d: unacked %v, finished %v", tag, unacked[tag], finished[tag])
			}
			delete(unacked, tag)
		}
		ackAll := func(last uint64) {
			if last == 0 {
				return
			}
			for tag := range unacked {
				if tag < last {
					ack(tag)
				}
			}
			ack(last)
		}
		for range rapid.IntRange(0, 60).Draw(t, "steps") {
			switch step := rapid.SampledFrom([]string{"deliver", "finish", "nack", "prefix", "rest"}).Draw(t, "step"); step {
			case "deliver":
				next++
				unacked[next] = true
			case "finish", "nack":
				var open []uint64
				for tag := range unacked {
					if !finished[tag] {
						open = append(open, tag)
					}
				}
				if len(open) == 0 {
					continue
				}
				slices.Sort(open)
				tag := rapid.SampledFrom(open).Draw(t, "tag")
				if step == "finish" {
					finished[tag] = true
					l.finish(tag)
				} else {
					delete(unacked, tag)
					l.settle(tag)
				}
			case "prefix":
				ackAll(l.prefix())
			case "rest":
				for _, tag := range l.stragglers() {
					ack(tag)
				}
			}
		}
		ackAll(l.prefix())
		for _, tag := range l.stragglers() {
			ack(tag)
		}
		for tag := range unacked {
			if finished[tag] {
				t.Fatalf("%d is finished and was never acked", tag)
			}
		}
	})
}
