package messaging

import (
	"bytes"
	"sync"

	"github.com/ThreeDotsLabs/watermill/message"

	"takeout/domain/event"
)

// copies makes a copy of a message that is being handled wait for what becomes of it. Otherwise they all want the same
// rows: a thousand copies are then a thousand transactions which end each other by deadlocks. The zero value is ready.
type copies struct {
	mu     sync.Mutex
	firsts map[string]*first // by message id
}

// first is a message that is being handled.
type first struct {
	msg     *message.Message
	over    chan struct{} // closed when it is not being handled any more
	settled bool          // and was done, or had been done before; to be read after over is closed
}

// begin returns the message of which msg is a copy, or nil if msg is to be handled itself. Then end must be called.
func (c *copies) begin(msg *message.Message) (of *first, end func(settled bool)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.firsts[msg.UUID]; f != nil {
		if f.sameAs(msg) {
			return f, nil
		}
		return nil, func(bool) {} // another message that pretends to be this one: it has its own fate
	}
	f := &first{msg: msg, over: make(chan struct{})}
	if c.firsts == nil {
		c.firsts = make(map[string]*first)
	}
	c.firsts[msg.UUID] = f
	return nil, func(settled bool) {
		c.mu.Lock()
		delete(c.firsts, msg.UUID)
		c.mu.Unlock()
		f.settled = settled
		close(f.over)
	}
}

func (f *first) sameAs(msg *message.Message) bool {
	return bytes.Equal(f.msg.Payload, msg.Payload) &&
		f.msg.Metadata.Get(event.SignatureHeader) == msg.Metadata.Get(event.SignatureHeader)
}
