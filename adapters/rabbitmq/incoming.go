package rabbitmq

import (
	"bufio"
	"encoding/binary"
	"io"
	"sync/atomic"
)

// How much amqp091 v1.16 reads in headers. Over more it ends the connection.
const (
	mostNested  = 32   // tables and lists in each other
	mostEntries = 8192 // of one table or list
)

// A frame is, by AMQP 0-9-1, 2.3.5: a byte of type, two of channel, four of size, so many of payload, and one that ends it.
const (
	frameHead   = 1 + 2 + 4
	frameAround = frameHead + 1
)

// The payload of a frame with a message's properties is, by AMQP 0-9-1, 4.2.6.1 and 1.8.3: two bytes of class, two of
// weight, eight with the size of the body, two that tell which properties follow, and these, of which the headers are the
// third.
const (
	propertiesFrame = 2
	propertiesAt    = frameHead + 2 + 2 + 8 + 2

	hasContentType     = 1 << 15
	hasContentEncoding = 1 << 14
	hasHeaders         = 1 << 13
)

// unreadableHeaders is the header that has the bytes of all that could not be read.
const unreadableHeaders = propertyPrefix + "headers"

// incoming passes on what the broker sends, but for headers that amqp091 would end the connection over: these become
// bytes. Anybody can send a message with such headers, and it stays on its queue. It would end each connection on which
// that queue is read, for ever, and with it the reading of all other queues.
type incoming struct {
	from  *bufio.Reader
	limit atomic.Int64 // bytes of the largest frame that amqp091 takes; 0 until that is agreed on, before which there are no messages

	pass int    // how many of the next bytes go through as they are
	anew []byte // the rest of a frame that was written anew, which goes before them
}

// Read implements io.Reader. It is for one goroutine.
func (r *incoming) Read(b []byte) (int, error) {
	if len(r.anew) == 0 && r.pass == 0 {
		if err := r.next(); err != nil {
			return 0, err
		}
	}
	if len(r.anew) > 0 {
		n := copy(b, r.anew)
		r.anew = r.anew[n:]
		return n, nil
	}
	n, err := r.from.Read(b[:min(len(b), r.pass)])
	r.pass -= n
	return n, err
}

// next waits for a frame, and lets through what has come, up to headers that must be written anew.
func (r *incoming) next() error {
	if _, err := r.from.Peek(frameHead); err != nil {
		if r.pass = r.from.Buffered(); r.pass > 0 { // amqp091 says what is wrong with it
			return nil
		}
		return err
	}
	limit := int(r.limit.Load())
	come, _ := r.from.Peek(r.from.Buffered())
	for len(come) >= frameHead {
		size := frameSize(come)
		if limit > 0 && come[0] == propertiesFrame && size < 2*limit && (size > len(come) || !readableFrame(come[:size], limit)) {
			break
		}
		r.pass += size
		come = come[min(size, len(come)):]
	}
	if r.pass > 0 {
		return nil
	}
	frame := make([]byte, frameSize(come))
	if _, err := io.ReadFull(r.from, frame); err != nil {
		return err
	}
	r.anew = madeReadable(frame, limit)
	return nil
}

// frameSize returns how many bytes the frame has that b begins with.
func frameSize(b []byte) int { return frameAround + int(binary.BigEndian.Uint32(b[3:])) }

// readableFrame reports whether amqp091 reads the headers in a frame with properties.
func readableFrame(frame []byte, limit int) bool {
	begin, end := headersIn(frame)
	return begin == 0 || len(frame) <= limit && readableFields(frame[begin:end], true, 0)
}

// madeReadable returns a frame with properties so that amqp091 reads the headers. A table or a list that is too much
// becomes bytes, which look the same in AMQP but for their type. If that is not enough, all headers become the bytes of
// one, as many as there is room for.
func madeReadable(frame []byte, limit int) []byte {
	begin, end := headersIn(frame)
	for rest, ok := frame[begin:end], true; ok && len(rest) > 0; {
		var value []byte
		if value, ok = afterName(rest); !ok {
			break
		}
		if rest, ok = afterValue(value, 0); !ok && len(value) > 0 && (value[0] == 'F' || value[0] == 'A') {
			value[0] = 'x'
			rest, ok = afterValue(value, 0)
		}
	}
	if readableFrame(frame, limit) {
		return frame
	}
	const around = 1 + len(unreadableHeaders) + 1 + 4 // its name, with a byte of length, its type, and its length
	kept := frame[begin:end]
	kept = kept[:min(len(kept), max(0, limit-(len(frame)-len(kept))-around))]
	anew := make([]byte, 0, len(frame)+around)
	anew = append(anew, frame[:begin-4]...)
	anew = binary.BigEndian.AppendUint32(anew, uint32(around+len(kept)))
	anew = append(anew, byte(len(unreadableHeaders)))
	anew = append(anew, unreadableHeaders...)
	anew = append(anew, 'x')
	anew = binary.BigEndian.AppendUint32(anew, uint32(len(kept)))
	anew = append(anew, kept...)
	anew = append(anew, frame[end:]...)
	binary.BigEndian.PutUint32(anew[3:], uint32(len(anew)-frameAround))
	return anew
}

// headersIn returns where the headers are in a frame with properties, behind their length, or zeros if it has none that
// can be found.
func headersIn(frame []byte) (begin, end int) {
	if len(frame) < propertiesAt {
		return 0, 0
	}
	has := binary.BigEndian.Uint16(frame[propertiesAt-2:])
	rest, ok := frame[propertiesAt:], has&hasHeaders != 0
	for _, before := range []uint16{hasContentType, hasContentEncoding} {
		if ok && has&before != 0 {
			rest, ok = afterName(rest)
		}
	}
	if !ok {
		return 0, 0
	}
	after, ok := afterLong(rest)
	if !ok {
		return 0, 0
	}
	return len(frame) - len(rest) + 4, len(frame) - len(after)
}

// readableFields reports whether amqp091 reads the fields of a table, which have names, or of a list.
func readableFields(b []byte, named bool, depth int) bool {
	if depth > mostNested {
		return false
	}
	ok := true
	for n := 0; len(b) > 0; n++ {
		if named {
			b, ok = afterName(b)
		}
		if ok {
			b, ok = afterValue(b, depth)
		}
		if !ok || n == mostEntries {
			return false
		}
	}
	return true
}

// afterValue returns what follows the value that b begins with, after its type. It reports false if amqp091 does not read
// it.
func afterValue(b []byte, depth int) (rest []byte, ok bool) {
	if len(b) == 0 {
		return nil, false
	}
	value, size := b[1:], 0
	switch b[0] {
	case 'V':
	case 't', 'b', 'B':
		size = 1
	case 's', 'u':
		size = 2
	case 'I', 'i', 'f':
		size = 4
	case 'D':
		size = 5
	case 'l', 'd', 'T':
		size = 8
	case 'S', 'x':
		return afterLong(value)
	case 'F', 'A':
		rest, ok = afterLong(value)
		return rest, ok && readableFields(value[4:len(value)-len(rest)], b[0] == 'F', depth+1)
	default:
		return nil, false
	}
	if len(value) < size {
		return nil, false
	}
	return value[size:], true
}

// afterName returns what follows the text that b begins with, whose length is one byte.
func afterName(b []byte) (rest []byte, ok bool) {
	if len(b) == 0 || len(b) < 1+int(b[0]) {
		return nil, false
	}
	return b[1+int(b[0]):], true
}

// afterLong returns what follows the bytes that b begins with, whose length is four bytes.
func afterLong(b []byte) (rest []byte, ok bool) {
	if len(b) < 4 || uint64(len(b)-4) < uint64(binary.BigEndian.Uint32(b)) {
		return nil, false
	}
	return b[4+binary.BigEndian.Uint32(b):], true
}
