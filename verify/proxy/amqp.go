package proxy

import (
	"bytes"
	"encoding/binary"
	"sync"
	"time"
)

// An AMQP frame has a type, a channel (2 bytes), the size of what follows (4), that, and an end octet. A method begins with
// its class and number (2 each). Deliveries, publishings and returns are followed by a header, which says how long the body
// is, and by the body in frames. Frames of other channels may come between.
const (
	frameHead   = 7
	frameMethod = 1
	frameHeader = 2
	frameBody   = 3
	frameBeat   = 8
	maxFrame    = 16 << 20 // more is no frame
)

// Methods, class and number.
const (
	channelOpen   = 20<<16 | 10
	confirmSelect = 85<<16 | 10
	basicPublish  = 60<<16 | 40
	basicReturn   = 60<<16 | 50
	basicDeliver  = 60<<16 | 60
	basicAck      = 60<<16 | 80
	basicReject   = 60<<16 | 90
	basicNack     = 60<<16 | 120
)

// amqp is the state of one connection that both directions need.
type amqp struct {
	mu       sync.Mutex
	confirms map[uint16]*numbering // of channels in confirm mode
	swaps    map[uint16][]*swap    // deliveries that changed places and are not settled
}

func speakAMQP(up, down *stream) (ask, answer func() error) {
	a := &amqp{confirms: map[uint16]*numbering{}, swaps: map[uint16][]*swap{}}
	ask = (&frames{stream: up, amqp: a, publisher: true}).run
	answer = (&frames{stream: down, amqp: a}).run
	return ask, answer
}

// frames is one direction of a connection.
type frames struct {
	*stream
	*amqp
	publisher bool             // from the client
	lanes     map[uint16]*lane // channels on which a fault is under way
}

// lane is what happens to the frames of one channel.
type lane struct {
	fault   *Armed
	began   time.Time
	content content
	kept    []byte
	first   int // Reorder: how much of kept is the first delivery; 0 while it is not complete
}

// content counts the frames behind a method.
type content struct {
	headed bool
	left   uint64
}

// add counts a frame, and reports whether it is the last.
func (c *content) add(frame []byte) bool {
	body := frame[frameHead : len(frame)-1]
	switch {
	case frame[0] == frameHeader && len(body) >= 12:
		c.headed, c.left = true, binary.BigEndian.Uint64(body[4:])
	case frame[0] == frameBody:
		c.left -= min(c.left, uint64(len(body)))
	}
	return c.headed && c.left == 0
}

func (f *frames) run() error {
	f.lanes, f.keeps = map[uint16]*lane{}, f.letGo
	if f.publisher {
		head, err := f.peek(1)
		if err != nil {
			return err
		}
		if head[0] != 'A' {
			return f.rest()
		}
		if err := f.pass(len("AMQP") + 4); err != nil {
			return err
		}
	}
	for {
		head, err := f.peek(frameHead)
		if err != nil {
			return err
		}
		kind, channel := head[0], binary.BigEndian.Uint16(head[1:])
		size := frameHead + int(binary.BigEndian.Uint32(head[3:])) + 1
		l := f.lanes[channel]
		switch {
		case size > maxFrame, kind != frameMethod && kind != frameHeader && kind != frameBody && kind != frameBeat:
			return f.rest() // another protocol, or the answer to one
		case l != nil:
			err = f.along(l, channel, size)
		case kind == frameMethod:
			err = f.method(channel, size)
		default:
			err = f.pass(size)
		}
		if err != nil {
			return err
		}
	}
}

// method passes on a method, or does what is to be done instead.
func (f *frames) method(channel uint16, size int) error {
	head, err := f.peek(min(size, frameHead+4))
	if err != nil {
		return err
	}
	if size < frameHead+4+1 {
		return f.pass(size)
	}
	id := binary.BigEndian.Uint32(head[frameHead:])
	var at Point
	switch {
	case f.publisher && (id == channelOpen || id == confirmSelect):
		f.opened(channel, id == confirmSelect)
	case f.publisher && id == basicPublish:
		at = Publish
	case f.publisher && size == single && (id == basicAck || id == basicNack || id == basicReject):
		return f.settlement(channel, size, id)
	case !f.publisher && size == single && (id == basicAck || id == basicNack):
		return f.confirmation(channel, size)
	case !f.publisher && id == basicReturn:
		at = Return
	case !f.publisher && id == basicDeliver:
		at = Deliver
	}
	if at == 0 {
		return f.pass(size)
	}
	fault, copies := (*Armed)(nil), 1
	if len(f.proxy.waiting()) > 0 {
		frame, err := f.peek(size)
		if err != nil {
			return err
		}
		fault = f.proxy.meets(at, frame[frameHead+4:])
	}
	if at == Publish {
		if fault != nil && fault.Do == Drop {
			copies = 0
		} else if fault != nil && fault.Do == Duplicate {
			copies = 2
		}
		f.published(channel, copies)
	}
	switch {
	case fault == nil:
		return f.pass(size)
	case fault.Do == DropAndCut:
		return f.brokenBehind(fault)
	}
	return f.detour(fault, channel, size)
}

// detour begins a lane with the method that is next.
func (f *frames) detour(fault *Armed, channel uint16, size int) error {
	l := &lane{fault: fault, began: time.Now()}
	f.lanes[channel] = l
	switch fault.Do {
	case Drop:
		return f.drop(size)
	case Cut:
		return f.pass(size)
	case Delay:
		fault.happened()
	}
	return f.keep(l, size, fault.Do == Duplicate)
}

// keep adds the next frame to what a lane keeps, and passes it on or not.
func (f *frames) keep(l *lane, size int, pass bool) error {
	frame, err := f.peek(size)
	if err != nil {
		return err
	}
	l.kept = append(l.kept, frame...)
	if pass {
		return f.pass(size)
	}
	return f.drop(size)
}

// along takes the next frame along a lane.
func (f *frames) along(l *lane, channel uint16, size int) error {
	frame, err := f.peek(size)
	if err != nil {
		return err
	}
	if l.fault.Do == Delay {
		return f.keep(l, size, false)
	}
	if frame[0] == frameMethod { // whoever sends a method has no more content of the last
		if l.fault.Do == Reorder && l.first > 0 && sameConsumer(l.kept, frame) {
			l.content = content{}
			return f.keep(l, size, false)
		}
		if err := f.leave(l, channel); err != nil {
			return err
		}
		return f.method(channel, size)
	}
	last := l.content.add(frame)
	switch l.fault.Do {
	case Drop:
		err = f.drop(size)
	case Cut:
		err = f.pass(size)
	default:
		err = f.keep(l, size, l.fault.Do == Duplicate)
	}
	if err != nil || !last {
		return err
	}
	switch {
	case l.fault.Do == Cut:
		return f.brokenBehind(l.fault)
	case l.fault.Do == Reorder && l.first == 0:
		l.first = len(l.kept)
		return nil
	case l.fault.Do == Reorder:
		f.swapped(l, channel)
		err = f.insert(l.kept)
	case l.fault.Do == Duplicate:
		err = f.insert(l.kept)
	}
	delete(f.lanes, channel)
	l.fault.happened()
	return err
}

// leave ends a lane on which the fault can no more happen.
func (f *frames) leave(l *lane, channel uint16) error {
	delete(f.lanes, channel)
	l.fault.giveBack()
	if l.fault.Do == Reorder {
		return f.insert(l.kept)
	}
	return nil
}

// letGo sends what was kept long enough, and reports whether there is more.
func (f *frames) letGo() bool {
	more := false
	for channel, l := range f.lanes {
		switch {
		case l.fault.Do == Delay && l.fault.over(l.began):
			delete(f.lanes, channel)
			_ = f.insert(l.kept) // what fails now fails again
		case l.fault.Do == Reorder && (l.fault.over(l.began) || l.fault.Delay == 0 && time.Since(l.began) > time.Second):
			_ = f.leave(l, channel)
		case l.fault.Do == Delay, l.fault.Do == Reorder:
			more = true
		}
	}
	return more
}

// Settlements and confirms have a tag and one octet of flags; bit 0 is multiple, except that of a reject.
const (
	tagAt   = frameHead + 4
	flagsAt = tagAt + 8
	single  = flagsAt + 2 // size of the whole frame
)

// confirmation passes on what the broker says of publishings.
func (f *frames) confirmation(channel uint16, size int) error {
	frame, err := f.peek(size)
	if err != nil {
		return err
	}
	now, changed := f.renumbered(channel, frame)
	if changed && len(now) == 0 {
		return f.drop(size)
	}
	fault := f.proxy.meets(Confirm, nil)
	if fault == nil && !changed {
		return f.pass(size)
	}
	now = bytes.Clone(now)
	if err := f.drop(size); err != nil {
		return err
	}
	return f.alone(fault, channel, now)
}

// settlement passes on what the client says of deliveries.
func (f *frames) settlement(channel uint16, size int, id uint32) error {
	frame, err := f.peek(size)
	if err != nil {
		return err
	}
	f.resettle(channel, frame, id)
	var fault *Armed
	if id == basicAck {
		fault = f.proxy.meets(Ack, nil)
	}
	if fault == nil {
		return f.pass(size)
	}
	now := bytes.Clone(frame)
	if err := f.drop(size); err != nil {
		return err
	}
	return f.alone(fault, channel, now)
}

// alone sends methods that have no content and were taken off the stream, or does what is to be done instead.
func (f *frames) alone(fault *Armed, channel uint16, methods []byte) error {
	if fault == nil {
		return f.insert(methods)
	}
	switch fault.Do {
	case DropAndCut:
		return f.brokenBehind(fault)
	case Cut:
		if err := f.insert(methods); err != nil {
			return err
		}
		return f.brokenBehind(fault)
	case Delay:
		f.lanes[channel] = &lane{fault: fault, began: time.Now(), kept: methods}
	case Nack:
		for b := methods; len(b) > 0; b = b[single:] {
			binary.BigEndian.PutUint32(b[frameHead:], basicNack)
		}
		if err := f.insert(methods); err != nil {
			return err
		}
	}
	fault.happened()
	return nil
}

// opened notes that a channel is new, or from now on in confirm mode.
func (a *amqp) opened(channel uint16, confirm bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.confirms, channel)
	if confirm {
		a.confirms[channel] = &numbering{}
	} else {
		delete(a.swaps, channel)
	}
}

// numbering knows which publishing a confirm is about. Client and broker both count from 1; from the first publishing that
// was dropped or doubled on, they count differently.
type numbering struct {
	published, arrived uint64
	from               uint64 // the client's and the broker's number of the first; 0 as long as there is none
	swept              bool   // all before were confirmed
	open               []publishing
}

// publishing has the broker's number and the client's, 0 if it is none of the client's.
type publishing struct{ broker, client uint64 }

// published notes that the client has published, and how often that arrives.
func (a *amqp) published(channel uint16, copies int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	n := a.confirms[channel]
	if n == nil {
		return
	}
	n.published++
	if copies != 1 && n.from == 0 {
		n.from = n.published
	}
	for i := range copies {
		n.arrived++
		if n.from == 0 {
			continue
		}
		p := publishing{broker: n.arrived}
		if i == 0 {
			p.client = n.published
		}
		n.open = append(n.open, p)
	}
}

// renumbered returns what the client is to be told for a confirm of the broker, and whether that is something else. One
// confirm of several then becomes one of each, because there may be one between that was dropped.
func (a *amqp) renumbered(channel uint16, frame []byte) (now []byte, changed bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	n, tag, multiple := a.confirms[channel], binary.BigEndian.Uint64(frame[tagAt:]), frame[flagsAt]&1 != 0
	if n == nil || n.from == 0 || tag < n.from {
		return frame, false
	}
	tell := func(tag uint64, multiple byte) {
		now = append(now, frame...)
		one := now[len(now)-single:]
		binary.BigEndian.PutUint64(one[tagAt:], tag)
		one[flagsAt] = one[flagsAt]&^1 | multiple
	}
	if multiple && n.from > 1 && !n.swept {
		n.swept = true
		tell(n.from-1, 1)
	}
	still := n.open[:0]
	for _, p := range n.open {
		switch {
		case p.broker != tag && (!multiple || p.broker > tag):
			still = append(still, p)
		case p.client != 0:
			tell(p.client, 0)
		}
	}
	n.open = still
	return now, true
}

// swap is two deliveries, low and low+1, whose messages changed places. What the client says of one is about the other.
type swap struct {
	low               uint64
	lowDone, highDone bool // settled by the client
	held              bool // the client acked all below low as well, and the broker does not know yet
}

// deliveryTag returns the place of the tag in a basic.deliver, behind the consumer's.
func deliveryTag(frame []byte) []byte {
	at := tagAt + 1 + int(frame[tagAt])
	return frame[at : at+8]
}

// sameConsumer reports whether the method is a delivery to the same consumer as that at the start of kept.
func sameConsumer(kept, method []byte) bool {
	end := tagAt + 1 + int(kept[tagAt])
	return len(method) > end+8 && bytes.Equal(kept[frameHead:end], method[frameHead:end])
}

// swapped makes two deliveries that are kept change places. The tags stay where they were: a broker's go up.
func (f *frames) swapped(l *lane, channel uint16) {
	first, second := l.kept[:l.first], l.kept[l.first:]
	a, b := deliveryTag(first), deliveryTag(second)
	low, high := binary.BigEndian.Uint64(a), binary.BigEndian.Uint64(b)
	binary.BigEndian.PutUint64(a, high)
	binary.BigEndian.PutUint64(b, low)
	l.kept = append(bytes.Clone(second), first...)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.swaps[channel] = append(f.swaps[channel], &swap{low: low})
}

// resettle makes of what the client settles what the broker knows by that tag, so that a message is never settled in
// place of another. An ack of the first of two and all below cannot be said with one tag while the second is open: those
// below wait for the second, or for the connection's end, which delivers them again.
func (a *amqp) resettle(channel uint16, frame []byte, id uint32) {
	a.mu.Lock()
	defer a.mu.Unlock()
	open := a.swaps[channel]
	if len(open) == 0 {
		return
	}
	tag, multiple := binary.BigEndian.Uint64(frame[tagAt:]), frame[flagsAt]&1 != 0 && id != basicReject
	said, flags := tag, frame[flagsAt]
	still := open[:0]
	for _, s := range open {
		switch {
		case multiple && (said == 0 || said > s.low+1):
			s.lowDone, s.highDone = true, true
		case said == s.low:
			tag = s.low + 1
			if multiple && !s.highDone {
				flags &^= 1
				s.held = id == basicAck
			}
			s.lowDone = true
		case said == s.low+1 && !multiple:
			tag = s.low
			if s.held && id == basicAck {
				flags |= 1
			}
			s.highDone = true
		case said == s.low+1:
			if s.lowDone {
				tag = s.low
			}
			s.lowDone, s.highDone = true, true
		}
		if !s.lowDone || !s.highDone {
			still = append(still, s)
		}
	}
	a.swaps[channel] = still
	binary.BigEndian.PutUint64(frame[tagAt:], tag)
	frame[flagsAt] = flags
}
