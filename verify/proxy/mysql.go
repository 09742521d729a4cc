package proxy

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
)

// A MySQL packet has three bytes of length, low byte first, a sequence number, and the payload. A payload of maxPayload
// bytes goes on in the next packet. Commands begin with number 0; the client sends none before the last was answered.
const (
	packetHead = 4
	maxPayload = 1<<24 - 1
	textLimit  = 32 << 10 // how much of a statement is looked at
)

// First bytes of commands.
const (
	comQuery       = 0x03
	comStmtPrepare = 0x16
	comStmtExecute = 0x17
	comStmtClose   = 0x19
)

// Capabilities of a client that make what follows unreadable.
const hidden = 1<<5 /* compress */ | 1<<11 /* TLS */ | 1<<26 /* zstd */

// mysql is the state of one connection.
type mysql struct {
	up, down *stream
	seen     []*Armed              // faults at COMMIT whose Match was in this transaction
	expected atomic.Pointer[reply] // what to do with the next reply

	mu       sync.Mutex
	prepared map[uint32][]byte // statements by id
}

// reply is what becomes of the reply to a command.
type reply struct {
	fault   *Armed // nil if the command was a prepare
	text    []byte // that was prepared
	replace []byte // comes instead of the reply
}

func speakMySQL(up, down *stream) (ask, answer func() error) {
	m := &mysql{up: up, down: down, prepared: map[uint32][]byte{}}
	return m.ask, m.answer
}

func payload(head []byte) int { return int(head[0]) | int(head[1])<<8 | int(head[2])<<16 }

func (m *mysql) ask() error {
	head, err := m.up.peek(packetHead)
	if err != nil {
		return err
	}
	// The first packet says what the client can do.
	first, err := m.up.peek(packetHead + min(payload(head), 4))
	if err != nil {
		return err
	}
	if len(first) == packetHead+4 && binary.LittleEndian.Uint32(first[packetHead:])&hidden != 0 {
		return m.up.rest()
	}
	number := byte(0)
	for {
		head, err := m.up.peek(packetHead)
		if err != nil {
			return err
		}
		size, before := payload(head), number
		number = head[3]
		if number == 0 && before != 255 && size > 0 { // after 255 comes 0, in the middle of something long
			err = m.command(size)
		} else {
			err = m.up.pass(packetHead + size)
		}
		if err != nil {
			return err
		}
	}
}

// command passes on the packet that begins a command, or does what is to be done instead.
func (m *mysql) command(size int) error {
	packet, err := m.up.peek(packetHead + min(size, 5))
	if err != nil {
		return err
	}
	var text []byte
	switch id := packet[packetHead+1:]; packet[packetHead] {
	case comQuery, comStmtPrepare:
		packet, err = m.up.peek(packetHead + min(size, textLimit-packetHead))
		if err != nil {
			return err
		}
		text = packet[packetHead+1:]
		if packet[packetHead] == comStmtPrepare {
			m.expected.Store(&reply{text: bytes.Clone(text)})
			return m.up.pass(packetHead + size)
		}
		text = bytes.TrimPrefix(text, []byte{0, 1}) // no query attributes, in one set
	case comStmtExecute:
		if len(id) == 4 {
			m.mu.Lock()
			text = m.prepared[binary.LittleEndian.Uint32(id)]
			m.mu.Unlock()
		}
	case comStmtClose:
		if len(id) == 4 {
			m.mu.Lock()
			delete(m.prepared, binary.LittleEndian.Uint32(id))
			m.mu.Unlock()
		}
	}
	if fault := m.meets(text); fault != nil {
		return m.act(fault, size, isCommit(text))
	}
	return m.up.pass(packetHead + size)
}

// meets returns the fault that a statement meets, or nil, and remembers what the transaction is known by.
func (m *mysql) meets(text []byte) *Armed {
	waiting := m.up.proxy.waiting()
	if len(waiting) == 0 || len(text) == 0 {
		m.seen = m.seen[:0]
		return nil
	}
	commit := isCommit(text)
	if commit || word(text, "ROLLBACK") || word(text, "BEGIN") || word(text, "START TRANSACTION") {
		defer func() { m.seen = m.seen[:0] }()
	}
	for _, a := range waiting {
		here := a.Match == "" || bytes.Contains(text, []byte(a.Match))
		switch {
		case a.At == Statement && here, a.At == Commit && commit && (a.Match == "" || slices.Contains(m.seen, a)):
			if a.take() {
				return a
			}
		case a.At == Commit && here && !commit && a.Match != "" && !slices.Contains(m.seen, a):
			m.seen = append(m.seen, a)
		}
	}
	return nil
}

func isCommit(text []byte) bool { return word(text, "COMMIT") || word(text, "COMMIT WORK") }

func word(text []byte, w string) bool {
	return len(text) < len(w)+16 && bytes.EqualFold(bytes.Trim(text, "; \t\r\n"), []byte(w))
}

// act does what the fault says to the command whose first packet is next.
func (m *mysql) act(fault *Armed, size int, commit bool) error {
	switch fault.Do {
	case DropBefore:
		return m.up.broken(fault)
	case Delay:
		if err := m.up.flush(); err != nil {
			return err
		}
		fault.happened()
		if err := m.up.sleep(fault.Delay, fault.off); err != nil {
			return errBroken
		}
	case Fail:
		number := byte(0)
		for {
			if err := m.up.drop(packetHead + size); err != nil {
				return err
			}
			if size < maxPayload {
				break
			}
			head, err := m.up.peek(packetHead)
			if err != nil {
				return err
			}
			size, number = payload(head), head[3]
		}
		failure := errorPacket(number+1, fault.Code)
		if commit || fault.Code == 1213 { // the server has rolled back when it says so
			m.expected.Store(&reply{fault: fault, replace: failure})
			return m.up.insert(append([]byte{9, 0, 0, 0, comQuery}, "ROLLBACK"...))
		}
		fault.happened()
		return m.down.write(failure) // nothing else comes: no command is under way
	default:
		m.expected.Store(&reply{fault: fault})
	}
	return m.up.pass(packetHead + size)
}

func errorPacket(number byte, code uint16) []byte {
	state := map[uint16]string{1213: "40001", 1040: "08004", 1792: "25006"}[code]
	if state == "" {
		state = "HY000"
	}
	b := append([]byte{0, 0, 0, number, 0xff, byte(code), byte(code >> 8), '#'}, state...)
	b = fmt.Appendf(b, "fault on purpose, error %d", code)
	b[0] = byte(len(b) - packetHead)
	return b
}

func (m *mysql) answer() error {
	for {
		if _, err := m.down.peek(1); err != nil {
			return err
		}
		if r := m.expected.Swap(nil); r != nil {
			if err := m.reply(r); err != nil {
				return err
			}
		}
		if err := m.down.pass(m.down.have - m.down.next); err != nil {
			return err
		}
	}
}

// reply does what is to be done when the first packet of a reply is there.
func (m *mysql) reply(r *reply) error {
	head, err := m.down.peek(packetHead)
	if err != nil {
		return err
	}
	size := payload(head)
	packet, err := m.down.peek(packetHead + min(size, textLimit))
	if err != nil {
		return err
	}
	switch {
	case r.replace != nil:
		if err := m.down.drop(packetHead + size); err != nil {
			return err
		}
		r.fault.happened()
		return m.down.write(r.replace)
	case r.fault == nil:
		if len(packet) >= packetHead+5 && packet[packetHead] == 0 {
			m.mu.Lock()
			m.prepared[binary.LittleEndian.Uint32(packet[packetHead+1:])] = r.text
			m.mu.Unlock()
		}
	case r.fault.Do == DropAfter:
		return m.down.broken(r.fault)
	case r.fault.Do == HalfPacket:
		if err := m.down.pass(len(packet) / 2); err != nil {
			return err
		}
		return m.down.brokenBehind(r.fault)
	case r.fault.Do == DelayReply:
		r.fault.happened()
		if m.down.sleep(r.fault.Delay, r.fault.off) != nil {
			return errBroken
		}
	}
	return nil
}
