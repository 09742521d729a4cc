// Package proxy will break connections; until then it passes everything on.
package proxy

import (
	"io"
	"net"
	"time"
)

type Protocol int

const (
	MySQL Protocol = iota
	AMQP
)

type Point int
type Action int

const (
	Commit Point = iota
	Statement
	Publish
	Confirm
	Return
	Deliver
	Ack
)
const (
	DropBefore Action = iota
	DropAfter
	DelayReply
	Fail
	DropAndCut
	Nack
	Cut
	Reorder
)

type Fault struct {
	At    Point
	Do    Action
	Count int
	Skip  int
	Delay time.Duration
	Match string
	Code  uint16
}
type Armed struct{}

func (*Armed) Sprung() int           { return 0 }
func (*Armed) Disarm()               {}
func (*Armed) Done() <-chan struct{} { c := make(chan struct{}); close(c); return c }

type Proxy struct{ l net.Listener }

func Listen(target string, p Protocol) (*Proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				s, err := net.Dial("tcp", target)
				if err != nil {
					c.Close()
					return
				}
				go func() { io.Copy(s, c); s.Close(); c.Close() }()
				io.Copy(c, s)
				s.Close()
				c.Close()
			}()
		}
	}()
	return &Proxy{l}, nil
}
func (p *Proxy) Addr() string            { return p.l.Addr().String() }
func (p *Proxy) Close() error            { return p.l.Close() }
func (p *Proxy) Cut() int                { return 0 }
func (p *Proxy) Refuse(bool)             {}
func (p *Proxy) Blackhole(bool)          {}
func (p *Proxy) Slow(time.Duration, int) {}
func (p *Proxy) Arm(Fault) *Armed        { return &Armed{} }
