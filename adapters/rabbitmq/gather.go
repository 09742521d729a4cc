package rabbitmq

import (
	"bufio"
	"crypto/tls"
	"net"
	"runtime"
	"sync"
	"time"
)

const (
	// gatherLimit is how many bytes may wait to be written before Write waits too.
	gatherLimit = 256 << 10
	// readBuffer is how many bytes are read at once; amqp091 asks for 4096.
	readBuffer = 32 << 10
)

// gatheringConn writes in the background, and together what came while it was writing: amqp091 writes each message and
// each ack by itself, which costs both sides a system call and the broker a wake-up each time. What is written first
// waits for nothing.
//
// Write returning nil says little more than the kernel's taking the bytes did: whether the broker has them is known from
// its confirms. Each write has a deadline. amqp091 has none and holds a lock meanwhile, so that a broker which stops
// reading would stop every publisher for ever (rabbitmq/amqp091-go#111, #288).
type gatheringConn struct {
	net.Conn
	in      incoming
	timeout time.Duration
	failed  func(error) // told once of a write that failed, with no lock held

	mu      sync.Mutex
	changed sync.Cond // pending, err
	pending []byte
	err     error // why nothing can be written any more
}

func newGatheringConn(conn net.Conn, timeout time.Duration, failed func(error)) *gatheringConn {
	c := &gatheringConn{Conn: conn, in: incoming{from: bufio.NewReaderSize(conn, readBuffer)}, timeout: timeout, failed: failed}
	c.changed.L = &c.mu
	go c.write()
	return c
}

// Read implements net.Conn. It is for one goroutine.
func (c *gatheringConn) Read(b []byte) (int, error) { return c.in.Read(b) }

// Write implements net.Conn. It fails if an earlier write did.
func (c *gatheringConn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.err == nil && len(c.pending) >= gatherLimit {
		c.changed.Wait()
	}
	if c.err != nil {
		return 0, c.err
	}
	if len(c.pending) == 0 {
		c.changed.Broadcast()
	}
	c.pending = append(c.pending, b...)
	return len(b), nil
}

// Close implements net.Conn. It waits for nothing: what is not written yet is not written, nor the end of TLS.
func (c *gatheringConn) Close() error {
	c.stop(net.ErrClosed)
	if secured, ok := c.Conn.(*tls.Conn); ok {
		return secured.NetConn().Close()
	}
	return c.Conn.Close()
}

func (c *gatheringConn) stop(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = err
		c.changed.Broadcast()
	}
}

// write writes until the connection is closed or a write fails.
func (c *gatheringConn) write() {
	var spare []byte
	for {
		c.mu.Lock()
		for c.err == nil && len(c.pending) == 0 {
			c.changed.Wait()
		}
		c.mu.Unlock()
		// Those who are about to write go first. When nobody is, this takes no time.
		runtime.Gosched()
		c.mu.Lock()
		if c.err != nil {
			c.mu.Unlock()
			return
		}
		full := len(c.pending) >= gatherLimit
		spare, c.pending = c.pending, spare[:0]
		if full {
			c.changed.Broadcast()
		}
		c.mu.Unlock()

		err := c.SetWriteDeadline(time.Now().Add(c.timeout))
		if err == nil {
			_, err = c.Conn.Write(spare)
		}
		if err != nil {
			c.stop(err)
			c.failed(err)
			return
		}
	}
}
