package proxy

import (
	"errors"
	"net"
	"os"
	"time"
)

const (
	bufferSize = 32 << 10
	tick       = 5 * time.Millisecond // how often a stream sees to what it keeps
)

var errBroken = errors.New("the connection was broken on purpose")

// stream is one direction of a connection. Its bytes are looked at and then passed on or dropped. What is passed is sent
// when nothing more is there to look at, so that many small units are one write.
type stream struct {
	*conn
	from, to         *net.TCPConn
	buf              []byte
	sent, next, have int         // buf[sent:next] is passed but not sent; buf[next:have] is not looked at
	keeps            func() bool // sees to what is kept back, between units; reports whether there is more; may be nil
}

func newStream(c *conn, from, to *net.TCPConn) *stream {
	return &stream{conn: c, from: from, to: to, buf: make([]byte, bufferSize)}
}

// peek returns the next n bytes, which stay next. They are valid until anything else is done with the stream.
func (s *stream) peek(n int) ([]byte, error) {
	for s.have-s.next < n {
		more := s.keeps != nil && s.flush() == nil && s.keeps()
		if more {
			_ = s.from.SetReadDeadline(time.Now().Add(tick))
		}
		err := s.fill(n)
		if more {
			_ = s.from.SetReadDeadline(time.Time{})
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return nil, err
		}
	}
	return s.buf[s.next : s.next+n], nil
}

// fill reads some bytes. There is room for n.
func (s *stream) fill(n int) error {
	if err := s.flush(); err != nil {
		return err
	}
	if s.next == s.have {
		s.sent, s.next, s.have = 0, 0, 0
	}
	if s.next+n > len(s.buf) {
		to := s.buf
		if n > len(to) {
			to = make([]byte, n)
		}
		s.have = copy(to, s.buf[s.next:s.have])
		s.buf, s.sent, s.next = to, 0, 0
	}
	k, err := s.from.Read(s.buf[s.have:])
	s.have += k
	if k > 0 {
		return nil // an error comes again
	}
	return err
}

// pass sends the next n bytes on.
func (s *stream) pass(n int) error { return s.advance(n, func() {}) }

// drop does not.
func (s *stream) drop(n int) error {
	if err := s.flush(); err != nil {
		return err
	}
	return s.advance(n, func() { s.sent = s.next })
}

func (s *stream) advance(n int, each func()) error {
	for {
		k := min(n, s.have-s.next)
		s.next += k
		each()
		if n -= k; n == 0 {
			return nil
		}
		if err := s.fill(1); err != nil {
			return err
		}
	}
}

// rest passes everything on until the end.
func (s *stream) rest() error {
	for {
		if _, err := s.peek(1); err != nil {
			return err
		}
		_ = s.pass(s.have - s.next)
	}
}

func (s *stream) flush() error {
	b := s.buf[s.sent:s.next]
	s.sent = s.next
	if len(b) == 0 {
		return nil
	}
	return s.write(b)
}

// insert sends bytes behind all that was passed.
func (s *stream) insert(b []byte) error {
	if err := s.flush(); err != nil {
		return err
	}
	return s.write(b)
}

// write is how everything leaves the proxy.
func (s *stream) write(b []byte) error {
	if slow := s.proxy.slow.Load(); slow != nil {
		if slow.delay > 0 && s.sleep(slow.delay, nil) != nil {
			return errBroken
		}
		for slow.bytes > 0 && len(b) > slow.bytes {
			if err := s.send(b[:slow.bytes]); err != nil {
				return err
			}
			b = b[slow.bytes:]
		}
	}
	return s.send(b)
}

func (s *stream) send(b []byte) error {
	if err := s.gate(); err != nil {
		return err
	}
	_, err := s.to.Write(b)
	return err
}

// last sends what is left when the stream has ended with err, unless it was broken, and waits until the other side may hear
// of the end.
func (s *stream) last(err error) {
	if !errors.Is(err, errBroken) && s.ctx.Err() == nil && s.flush() == nil {
		_ = s.send(s.buf[s.next:s.have]) // waits also if there is nothing
	}
}

// broken breaks the connection before anything more gets through, and returns errBroken.
func (s *stream) broken(a *Armed) error {
	a.happened()
	s.end(true)
	return errBroken
}

// brokenBehind breaks the connection behind what was passed, and returns errBroken. The side that it was passed to is told
// of the end and may read until there: a RST would overtake.
func (s *stream) brokenBehind(a *Armed) error {
	if err := s.flush(); err != nil {
		return err
	}
	a.happened()
	s.part(s.from, s.to)
	return errBroken
}
