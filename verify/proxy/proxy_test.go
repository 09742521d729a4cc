package proxy_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"takeout/verify/proxy"
)

// server is one that a test writes itself: it says what it did on each connection.
type server struct {
	net.Listener
	conns chan *net.TCPConn
}

func startServer(t testing.TB) *server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := &server{Listener: l, conns: make(chan *net.TCPConn, 1000)}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.conns <- c.(*net.TCPConn)
		}
	}()
	return s
}

// pair is one connection through a proxy.
func (s *server) pair(t testing.TB, p *proxy.Proxy) (client, far *net.TCPConn) {
	t.Helper()
	c, err := net.Dial("tcp", p.Addr())
	require.NoError(t, err)
	far = await(t, "the proxy connects", s.conns)
	t.Cleanup(func() { c.Close(); far.Close() })
	for _, side := range []net.Conn{c, far} {
		require.NoError(t, side.SetDeadline(time.Now().Add(patience)))
	}
	return c.(*net.TCPConn), far
}

func protocols(t *testing.T, test func(t *testing.T, s *server, p *proxy.Proxy)) {
	t.Helper()
	for name, protocol := range map[string]proxy.Protocol{"MySQL": proxy.MySQL, "AMQP": proxy.AMQP} {
		t.Run(name, func(t *testing.T) {
			s := startServer(t)
			test(t, s, listen(t, s.Addr().String(), protocol))
		})
	}
}

// nothingComes reports whether the side is open and silent for a moment.
func nothingComes(t testing.TB, side net.Conn) {
	t.Helper()
	require.NoError(t, side.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
	n, err := side.Read(make([]byte, 100))
	require.Zero(t, n)
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.NoError(t, side.SetReadDeadline(time.Now().Add(patience)))
}

func say(t testing.TB, side net.Conn, text string) {
	t.Helper()
	_, err := side.Write([]byte(text))
	require.NoError(t, err)
}

func hear(t testing.TB, side net.Conn, text string) {
	t.Helper()
	b := make([]byte, len(text))
	_, err := io.ReadFull(side, b)
	require.NoError(t, err)
	require.Equal(t, text, string(b))
}

// hello is what both protocols pass on whole.
const hello = "A\x00\x00\x01\x00\x00\x00\x00"

func TestCutBreaksAllConnectionsAtBothEnds(t *testing.T) {
	protocols(t, func(t *testing.T, s *server, p *proxy.Proxy) {
		var sides []net.Conn
		for range 5 {
			client, far := s.pair(t, p)
			say(t, far, hello)
			hear(t, client, hello)
			sides = append(sides, client, far)
		}
		require.Equal(t, 5, p.Cut())
		for _, side := range sides {
			_, err := side.Read(make([]byte, 1))
			require.ErrorIs(t, err, syscall.ECONNRESET)
		}
		require.Zero(t, p.Cut())
		client, far := s.pair(t, p)
		say(t, far, hello)
		hear(t, client, hello)
	})
}

func TestRefuseClosesNewConnectionsOnly(t *testing.T) {
	protocols(t, func(t *testing.T, s *server, p *proxy.Proxy) {
		client, far := s.pair(t, p)
		p.Refuse(true)
		c, err := net.Dial("tcp", p.Addr())
		if err == nil {
			defer c.Close()
			_, err = c.Read(make([]byte, 1))
		}
		require.Error(t, err)
		require.Empty(t, s.conns)
		say(t, far, hello)
		hear(t, client, hello)
		p.Refuse(false)
		s.pair(t, p)
	})
}

func TestBytesInABlackHoleGoNowhereAndNobodyHearsOfTheEnd(t *testing.T) {
	protocols(t, func(t *testing.T, s *server, p *proxy.Proxy) {
		client, far := s.pair(t, p)
		ending, left := s.pair(t, p)
		p.Blackhole(true)
		p.Blackhole(true)
		say(t, client, hello)
		say(t, far, hello)
		say(t, left, hello)
		left.Close()
		nothingComes(t, client)
		nothingComes(t, far)
		nothingComes(t, ending)
		late, err := net.Dial("tcp", p.Addr())
		require.NoError(t, err)
		defer late.Close()
		nothingComes(t, late)
		require.Empty(t, s.conns)
		p.Blackhole(false)
		hear(t, far, hello)
		hear(t, client, hello)
		hear(t, ending, hello)
		_, err = ending.Read(make([]byte, 1))
		require.Error(t, err)
		await(t, "the late one is connected", s.conns).Close()

		p.Blackhole(true)
		require.NotZero(t, p.Cut(), "what is in the hole can be broken")
		_, err = client.Read(make([]byte, 1))
		require.ErrorIs(t, err, syscall.ECONNRESET)
		p.Blackhole(false)
	})
}

func TestSlowComesLaterAndInSlices(t *testing.T) {
	protocols(t, func(t *testing.T, s *server, p *proxy.Proxy) {
		client, far := s.pair(t, p)
		p.Slow(100*time.Millisecond, 1)
		began := time.Now()
		say(t, far, hello)
		hear(t, client, hello)
		require.GreaterOrEqual(t, time.Since(began), 100*time.Millisecond)
		p.Slow(time.Hour, 0)
		p.Slow(0, 0)
		say(t, far, hello)
		hear(t, client, hello)
		p.Slow(time.Hour, 0)
		say(t, far, hello)
		require.Equal(t, 1, p.Cut(), "what is slow can be broken")
	})
}

func TestEndOfOneSideIsTheEndOfTheOtherBehindAllThatWasSent(t *testing.T) {
	protocols(t, func(t *testing.T, s *server, p *proxy.Proxy) {
		for _, last := range []string{"A", "A\x00\x00\x03ab", hello + "\x01\x00\x01\x00\x00"} { // in the middle of anything
			client, far := s.pair(t, p)
			say(t, client, last)
			client.Close()
			got, err := io.ReadAll(far)
			require.NoError(t, err)
			require.Equal(t, last, string(got))

			client, far = s.pair(t, p)
			say(t, far, last)
			far.Close()
			got, err = io.ReadAll(client)
			require.NoError(t, err)
			require.Equal(t, last, string(got))
		}
	})
}

// Whatever comes, also what no client and no server would send, gets through unchanged when no fault is set.
func TestAllBytesGetThroughUnchanged(t *testing.T) {
	protocols(t, func(t *testing.T, s *server, p *proxy.Proxy) {
		for seed := range uint64(30) {
			random := rand.New(rand.NewPCG(seed, 0))
			if seed%3 == 0 {
				p.Slow(0, 1+random.IntN(3))
			}
			client, far := s.pair(t, p)
			var both sync.WaitGroup
			for _, way := range [][2]*net.TCPConn{{client, far}, {far, client}} {
				sent := garbage(random)
				both.Go(func() {
					for b := sent; len(b) > 0; {
						k := min(len(b), 1+len(b)/3)
						if _, err := way[0].Write(b[:k]); err != nil {
							t.Error(err)
							return
						}
						b = b[k:]
					}
				})
				both.Go(func() {
					got := make([]byte, len(sent))
					if _, err := io.ReadFull(way[1], got); err != nil {
						t.Error(err)
					}
					if !bytes.Equal(sent, got) {
						t.Error("something else came")
					}
				})
			}
			both.Wait()
			client.Close()
			p.Slow(0, 0)
		}
	})
}

// garbage is noise, and things that look like packets and frames with sizes that are wrong.
func garbage(random *rand.Rand) []byte {
	var b []byte
	for range random.IntN(40) {
		noise := make([]byte, random.IntN(3000))
		for i := range noise {
			noise[i] = byte(random.Uint32())
		}
		heads := []string{
			"AMQP\x00\x00\x09\x01", "\x03\x00\x00\x00\x03\x00\x01", "\x07\x00\x00\x00\x03COMMIT", "\x05\x00\x00\x00\x17\x01\x02\x00\x00", "\xff\xff\xff\x00\x03x",
			"\x01\x00\x01\x00\x00\x00\x0d\x00\x3c\x00\x50\x00\x00\x00\x00\x00\x00\x00\x01\x01\xce", "\x01\x00\x01\x00\x00\x00\x05\x00\x3c\x00\x3c\xff\xce",
			"\x02\x00\x01\x00\x00\x00\x02\x00\x00\xce", "\x01\x00\x01\xff\xff\xff\xff", "\x01\x00\x01\x00\x00\x00\x00\xce", "\x08\x00\x00\x00\x00\x00\x00\xce",
		}
		if random.IntN(2) == 0 {
			b = append(b, heads[random.IntN(len(heads))]...)
		} else {
			b = append(b, noise...)
		}
	}
	return b
}

// With faults set, garbage may be changed; the proxy must live on.
func TestGarbageDoesNotBreakTheProxy(t *testing.T) {
	protocols(t, func(t *testing.T, s *server, p *proxy.Proxy) {
		for _, fault := range append(proxy.Faults(proxy.AMQP), proxy.Faults(proxy.MySQL)...) {
			fault.Count, fault.Delay = -1, time.Millisecond
			armed := p.Arm(fault)
			for seed := range uint64(10) {
				random := rand.New(rand.NewPCG(seed, 1))
				client, far := s.pair(t, p)
				_, _ = client.Write(append([]byte("AMQP\x00\x00\x09\x01"), garbage(random)...))
				_, _ = far.Write(garbage(random))
				client.Close()
				_, _ = io.Copy(io.Discard, far)
				far.Close()
			}
			armed.Disarm()
		}
		client, far := s.pair(t, p)
		say(t, client, hello)
		hear(t, far, hello)
	})
}

func TestConnectionWithTLSIsPassedOnUnseen(t *testing.T) {
	s := startServer(t)
	p := listen(t, s.Addr().String(), proxy.MySQL)
	armed := p.Arm(proxy.Fault{At: proxy.Commit, Do: proxy.DropBefore})
	client, far := s.pair(t, p)
	request := "\x20\x00\x00\x01\x00\x08\x00\x00" + string(make([]byte, 28)) // asks for TLS
	secret := "\x07\x00\x00\x00\x03COMMIT"                                   // may be by chance
	say(t, client, request+secret)
	hear(t, far, request+secret)
	require.Zero(t, armed.Sprung())

	a := listen(t, s.Addr().String(), proxy.AMQP)
	armed = a.Arm(proxy.Fault{At: proxy.Ack, Do: proxy.Drop})
	client, far = s.pair(t, a)
	ack := "\x01\x00\x01\x00\x00\x00\x0d\x00\x3c\x00\x50\x00\x00\x00\x00\x00\x00\x00\x01\x01\xce"
	say(t, client, "\x16\x03\x01\x00\x00\x00\x00"+ack)
	hear(t, far, "\x16\x03\x01\x00\x00\x00\x00"+ack)
	require.Zero(t, armed.Sprung())
}

func TestClosedProxyLeavesNothingBehind(t *testing.T) {
	before := goleak.IgnoreCurrent()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	for _, protocol := range []proxy.Protocol{proxy.MySQL, proxy.AMQP} {
		p, err := proxy.Listen(l.Addr().String(), protocol)
		require.NoError(t, err)
		for i := range 10 {
			if i == 5 {
				p.Blackhole(true)
			}
			client, err := net.Dial("tcp", p.Addr())
			require.NoError(t, err)
			defer client.Close()
			if i < 5 {
				far, err := l.Accept()
				require.NoError(t, err)
				defer far.Close()
			}
			say(t, client, "AMQP\x00\x00\x09\x01")
		}
		require.NoError(t, p.Close())
		_, err = net.Dial("tcp", p.Addr())
		require.Error(t, err)
	}
	l.Close()
	goleak.VerifyNone(t, before)
}

func TestServerThatIsNotThereEndsTheConnection(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	l.Close()
	p := listen(t, l.Addr().String(), proxy.MySQL)
	c, err := net.Dial("tcp", p.Addr())
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(patience)))
	_, err = c.Read(make([]byte, 1))
	require.Error(t, err)
	require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
}

func TestStatementsAndMessagesGetThroughByteByByte(t *testing.T) {
	tb := openTable(t)
	tb.Slow(0, 1)
	require.NoError(t, tb.insert(1, "COMMIT"))
	require.True(t, tb.has(t, 1))
	armed := tb.Arm(proxy.Fault{At: proxy.Commit, Do: proxy.DropAfter})
	require.Error(t, tb.insert(2, "COMMIT"))
	require.Equal(t, 1, armed.Sprung())
	require.True(t, tb.has(t, 2))

	b := openBus(t)
	b.Slow(0, 7)
	c := b.publisher(t)
	require.True(t, acked(t, c.publish(t, b.queue, "x")))
	d := await(t, "a delivery", c.consume(t, 1))
	require.Equal(t, body("x"), d.Body)
}

// A statement and its reply, and what a proxy adds to that.
func BenchmarkRoundTrip(b *testing.B) {
	for _, protocol := range []proxy.Protocol{proxy.MySQL, proxy.AMQP} {
		b.Run(fmt.Sprint("protocol ", protocol), func(b *testing.B) {
			s := startServer(b)
			p := listen(b, s.Addr().String(), protocol)
			client, far := s.pair(b, p)
			for _, side := range []net.Conn{client, far} {
				require.NoError(b, side.SetDeadline(time.Time{}))
			}
			message := append([]byte("\xc8\x00\x00\x00\x03"), make([]byte, 199)...)
			if protocol == proxy.AMQP {
				message = append([]byte("\x03\x00\x01\x00\x00\x00\xc8"), make([]byte, 201)...)
				say(b, client, "AMQP\x00\x00\x09\x01")
				hear(b, far, "AMQP\x00\x00\x09\x01")
			}
			go func() { _, _ = io.Copy(far, far) }()
			b.ReportAllocs()
			b.ResetTimer()
			buf := make([]byte, len(message))
			for b.Loop() {
				if _, err := client.Write(message); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(client, buf); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
