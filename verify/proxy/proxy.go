// Package proxy is a network that fails on purpose. A proxy stands between a program and its MySQL server or its RabbitMQ
// broker, knows the few things in their protocols where a fault hurts most, and can lose, delay, double or reorder exactly
// those, or break, freeze or slow down everything.
//
// While no fault is set, bytes are passed on as they come. A connection that uses TLS or compression is passed on unseen:
// Cut, Refuse, Blackhole and Slow work there, and armed faults never happen.
package proxy

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Protocol is what the two sides of a proxy speak.
type Protocol uint8

// The protocols.
const (
	MySQL Protocol = iota + 1
	AMQP
)

// Proxy is a TCP proxy in front of one server. Its methods are safe for concurrent use.
type Proxy struct {
	target   string
	protocol Protocol
	listener *net.TCPListener
	serving  sync.WaitGroup

	armed  atomic.Pointer[[]*Armed]
	refuse atomic.Bool
	slow   atomic.Pointer[slowness]
	hole   atomic.Pointer[chan struct{}] // while bytes go nowhere; closed when they go on

	mu     sync.Mutex
	conns  map[*conn]bool
	closed bool
}

type slowness struct {
	delay time.Duration
	bytes int
}

// Listen returns a proxy of the server at target, host:port, on a free port of 127.0.0.1. The caller must Close it. The server need
// not be there: while it is not, connections end as soon as they are made.
func Listen(target string, protocol Protocol) (*Proxy, error) {
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	p := &Proxy{target: target, protocol: protocol, listener: listener, conns: map[*conn]bool{}}
	p.serving.Go(p.accept)
	return p, nil
}

// Addr returns the host:port that clients connect to.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Close breaks all connections, accepts no more, and returns when nothing of the proxy runs any more.
func (p *Proxy) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	err := p.listener.Close()
	p.Cut()
	p.serving.Wait()
	return err
}

// Cut breaks every open connection at once, at both ends and with RST, and returns how many there were. New ones are accepted.
func (p *Proxy) Cut() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	cut := 0
	for c := range p.conns {
		if c.end(true) {
			cut++
		}
	}
	return cut
}

// Refuse says whether new connections are closed as soon as they are made. The open ones go on.
func (p *Proxy) Refuse(on bool) { p.refuse.Store(on) }

// Blackhole says whether bytes go nowhere, in both directions and also on new connections, while connections stay open:
// neither side hears of the other, not even of its end. As after a real partition, what was sent in the meantime gets
// through when it is over, if nobody gave the connection up.
func (p *Proxy) Blackhole(on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.hole.Load()
	switch {
	case on && now == nil:
		hole := make(chan struct{})
		p.hole.Store(&hole)
	case !on && now != nil:
		p.hole.Store(nil)
		close(*now)
	}
}

// Slow makes everything that is read pass on after d, in slices of at most that many bytes, or whole if it is 0. Nothing
// more is read meanwhile. Slow(0, 0) ends it.
func (p *Proxy) Slow(d time.Duration, bytes int) {
	if d == 0 && bytes == 0 {
		p.slow.Store(nil)
		return
	}
	p.slow.Store(&slowness{d, bytes})
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.AcceptTCP()
		if err != nil {
			return
		}
		c := &conn{proxy: p, client: client}
		c.ctx, c.cancel = context.WithCancel(context.Background())
		p.mu.Lock()
		if p.closed || p.refuse.Load() {
			c.end(true)
		} else {
			p.conns[c] = true
			p.serving.Go(c.serve)
		}
		p.mu.Unlock()
	}
}

// conn is one connection through the proxy.
type conn struct {
	proxy  *Proxy
	client *net.TCPConn
	server atomic.Pointer[net.TCPConn] // nil until it is connected
	ctx    context.Context             // ends with the connection
	cancel context.CancelFunc
	mu     sync.Mutex // held while the connection is made and ended
}

func (c *conn) serve() {
	defer func() {
		c.end(false)
		c.proxy.mu.Lock()
		defer c.proxy.mu.Unlock()
		delete(c.proxy.conns, c)
	}()
	if c.gate() != nil || c.dial() != nil {
		return
	}
	up, down := newStream(c, c.client, c.server.Load()), newStream(c, c.server.Load(), c.client)
	speak := speakMySQL
	if c.proxy.protocol == AMQP {
		speak = speakAMQP
	}
	ask, answer := speak(up, down)
	var both sync.WaitGroup
	for s, pass := range map[*stream]func() error{up: ask, down: answer} {
		both.Go(func() {
			s.last(pass())
			c.end(false)
		})
	}
	both.Wait()
}

func (c *conn) dial() error {
	server, err := new(net.Dialer).DialContext(c.ctx, "tcp", c.proxy.target)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		closeSide(server.(*net.TCPConn), true)
		return c.ctx.Err()
	}
	c.server.Store(server.(*net.TCPConn))
	return nil
}

// end closes both sides, with RST or not, and reports whether they were open.
func (c *conn) end(reset bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return false
	}
	c.cancel()
	closeSide(c.client, reset)
	if server := c.server.Load(); server != nil {
		closeSide(server, reset)
	}
	return true
}

// part closes one side with RST, and the other when it has read all and closed its own end.
func (c *conn) part(with, from *net.TCPConn) {
	c.mu.Lock()
	open := c.ctx.Err() == nil
	c.cancel()
	c.mu.Unlock()
	if open {
		closeSide(with, true)
		_ = from.CloseWrite()
		timer := time.AfterFunc(time.Second, func() { closeSide(from, true) }) // is enough for who reads at all
		defer timer.Stop()
		_, _ = io.Copy(io.Discard, from)
		closeSide(from, false)
	}
}

func closeSide(side *net.TCPConn, reset bool) {
	if reset {
		_ = side.SetLinger(0)
	}
	_ = side.Close()
}

// gate waits while bytes go nowhere. Its error is that of a connection that has ended.
func (c *conn) gate() error {
	for {
		hole := c.proxy.hole.Load()
		if hole == nil {
			return c.ctx.Err()
		}
		select {
		case <-*hole:
		case <-c.ctx.Done():
		}
		if c.ctx.Err() != nil {
			return c.ctx.Err()
		}
	}
}

// sleep waits, for ever if d is 0, until off is closed or the connection ends, which is an error.
func (c *conn) sleep(d time.Duration, off <-chan struct{}) error {
	var over <-chan time.Time
	if d > 0 {
		timer := time.NewTimer(d)
		defer timer.Stop()
		over = timer.C
	}
	select {
	case <-over:
	case <-off:
	case <-c.ctx.Done():
	}
	return c.ctx.Err()
}
