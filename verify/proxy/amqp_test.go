package proxy_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"takeout/tests/testenv"
	"takeout/verify/proxy"
)

// bus is one queue, seen directly and through a proxy.
type bus struct {
	*proxy.Proxy
	through string
	direct  *amqp.Channel
	queue   string
}

func openBus(t testing.TB) *bus {
	t.Helper()
	rawURL := testenv.AMQP(t)
	u, err := url.Parse(rawURL)
	require.NoError(t, err)
	b := &bus{queue: u.Query().Get("namespace") + ".queue"}
	u.RawQuery = ""
	b.Proxy, b.through = between(t, u.String(), proxy.AMQP)
	_, b.direct, _ = open(t, u.String())
	_, err = b.direct.QueueDeclare(b.queue, true, false, false, false, nil)
	require.NoError(t, err)
	return b
}

func open(t testing.TB, rawURL string) (*amqp.Connection, *amqp.Channel, *tap) {
	t.Helper()
	tap := &tap{}
	conn, err := amqp.DialConfig(rawURL, amqp.Config{Heartbeat: 10 * time.Second, Dial: func(network, addr string) (_ net.Conn, err error) {
		tap.Conn, err = amqp.DefaultDial(patience)(network, addr)
		return tap, err
	}})
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	ch, err := conn.Channel()
	require.NoError(t, err)
	return conn, ch, tap
}

// client is a connection through the proxy.
type client struct {
	*bus
	conn   *amqp.Connection
	ch     *amqp.Channel
	closed chan *amqp.Error
	tap    *tap
}

// tap remembers what came from the broker, because the library forgets what it did not hand out before the connection broke.
type tap struct {
	net.Conn
	mu   sync.Mutex
	read []byte
}

func (t *tap) Read(b []byte) (int, error) {
	n, err := t.Conn.Read(b)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.read = append(t.read, b[:n]...)
	return n, err
}

func (t *tap) has(s string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return bytes.Contains(t.read, []byte(s))
}

func (b *bus) connect(t testing.TB) *client {
	t.Helper()
	c := &client{bus: b}
	c.conn, c.ch, c.tap = open(t, b.through)
	c.closed = c.conn.NotifyClose(make(chan *amqp.Error, 1))
	return c
}

// body is longer than a frame, so that it comes in two.
func body(name string) []byte { return append([]byte(name+" "), make([]byte, 140_000)...) }

func name(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte(" "))
	return string(s)
}

func (c *client) publish(t testing.TB, key, message string) *amqp.DeferredConfirmation {
	t.Helper()
	d, err := c.ch.PublishWithDeferredConfirm("", key, true, false, amqp.Publishing{Body: body(message)})
	require.NoError(t, err)
	return d
}

// publisher is a client whose channel is in confirm mode.
func (b *bus) publisher(t testing.TB) *client {
	t.Helper()
	c := b.connect(t)
	require.NoError(t, c.ch.Confirm(false))
	return c
}

// acked waits for a confirm, and reports whether it is one that the broker has the message.
func acked(t testing.TB, d *amqp.DeferredConfirmation) bool {
	t.Helper()
	await(t, "a confirm", d.Done())
	return d.Acked()
}

func unconfirmed(d *amqp.DeferredConfirmation) bool {
	select {
	case <-d.Done():
		return false
	default:
		return true
	}
}

// holds waits until exactly these messages are ready in the queue, and takes them out.
func (b *bus) holds(t testing.TB, names ...string) {
	t.Helper()
	eventually(t, fmt.Sprint("the queue holds ", names), func() bool {
		q, err := b.direct.QueueDeclarePassive(b.queue, true, false, false, false, nil)
		require.NoError(t, err)
		return q.Consumers == 0 && q.Messages == len(names) // what a consumer had comes back when it goes
	})
	got := []string{}
	for range names {
		d, ok, err := b.direct.Get(b.queue, true)
		require.NoError(t, err)
		require.True(t, ok)
		got = append(got, name(d.Body))
	}
	require.Equal(t, append([]string{}, names...), got)
}

func (b *bus) ready(t testing.TB) int {
	t.Helper()
	q, err := b.direct.QueueDeclarePassive(b.queue, true, false, false, false, nil)
	require.NoError(t, err)
	return q.Messages
}

// put stores messages behind the proxy's back.
func (b *bus) put(t testing.TB, names ...string) {
	t.Helper()
	for _, n := range names {
		require.NoError(t, b.direct.Publish("", b.queue, true, false, amqp.Publishing{Body: body(n)}))
	}
}

func (c *client) consume(t testing.TB, prefetch int) <-chan amqp.Delivery {
	t.Helper()
	require.NoError(t, c.ch.Qos(prefetch, 0, false))
	deliveries, err := c.ch.Consume(c.queue, "consumer", false, false, false, false, nil)
	require.NoError(t, err)
	return deliveries
}

// broke waits until the client knows that its connection is broken.
func (c *client) broke(t testing.TB) {
	t.Helper()
	await(t, "the connection breaks", c.closed)
}

// goesOn fails if the client's connection, or another channel of it, is out of order.
func (c *client) goesOn(t testing.TB) {
	t.Helper()
	ch, err := c.conn.Channel()
	require.NoError(t, err)
	_, err = ch.QueueDeclarePassive(c.queue, true, false, false, false, nil)
	require.NoError(t, err)
	require.NoError(t, ch.Close())
}

func TestEachFaultOfAMQPHasATest(t *testing.T) {
	for _, fault := range proxy.Faults(proxy.AMQP) {
		test := map[proxy.Point]func(*testing.T, *bus, proxy.Fault){
			proxy.Publish: faultAtPublish, proxy.Confirm: faultAtConfirm, proxy.Return: faultAtReturn,
			proxy.Deliver: faultAtDeliver, proxy.Ack: faultAtAck,
		}[fault.At]
		t.Run(fmt.Sprint("point ", fault.At, ", action ", fault.Do), func(t *testing.T) { test(t, openBus(t), fault) })
	}
}

func faultAtPublish(t *testing.T, b *bus, fault proxy.Fault) {
	fault.Match, fault.Skip = b.queue, 1
	armed, c := b.Arm(fault), b.publisher(t)
	require.True(t, acked(t, c.publish(t, b.queue, "first")))
	if fault.Do == proxy.Cut { // the broker may confirm it before the connection breaks
		t.Cleanup(b.Arm(proxy.Fault{At: proxy.Confirm, Do: proxy.Drop}).Disarm)
	}
	second, err := c.ch.PublishWithDeferredConfirm("", b.queue, true, false, amqp.Publishing{Body: body("second")})
	await(t, "the fault happens", armed.Done())
	if fault.Do == proxy.DropAndCut { // while the client is still writing, or not
		c.broke(t)
		require.True(t, err != nil || !acked(t, second))
		b.holds(t, "first")
		return
	}
	require.NoError(t, err)
	switch fault.Do {
	case proxy.Drop:
		require.True(t, acked(t, c.publish(t, b.queue, "third")))
		require.True(t, unconfirmed(second))
		b.holds(t, "first", "third")
		c.goesOn(t)
	case proxy.Cut:
		c.broke(t)
		require.False(t, acked(t, second))
		b.holds(t, "first", "second")
	case proxy.Delay:
		third := c.publish(t, b.queue, "third")
		c.goesOn(t)
		require.Equal(t, 1, b.ready(t))
		require.True(t, unconfirmed(second))
		require.True(t, unconfirmed(third))
		armed.Disarm()
		require.True(t, acked(t, second))
		require.True(t, acked(t, third))
		b.holds(t, "first", "second", "third")
	case proxy.Duplicate:
		require.True(t, acked(t, second))
		require.True(t, acked(t, c.publish(t, b.queue, "third")))
		b.holds(t, "first", "second", "second", "third")
		c.goesOn(t)
	}
	require.Equal(t, 1, armed.Sprung())
}

func faultAtConfirm(t *testing.T, b *bus, fault proxy.Fault) {
	fault.Skip = 1
	armed, c := b.Arm(fault), b.publisher(t)
	require.True(t, acked(t, c.publish(t, b.queue, "first")))
	second := c.publish(t, b.queue, "second")
	await(t, "the fault happens", armed.Done())
	switch fault.Do {
	case proxy.Drop:
		c.goesOn(t)
		require.True(t, acked(t, c.publish(t, b.queue, "third")))
		require.True(t, unconfirmed(second))
		b.holds(t, "first", "second", "third")
	case proxy.DropAndCut:
		c.broke(t)
		require.False(t, acked(t, second))
		b.holds(t, "first", "second")
	case proxy.Cut:
		require.True(t, acked(t, second))
		c.broke(t)
		b.holds(t, "first", "second")
	case proxy.Delay:
		c.goesOn(t)
		require.True(t, unconfirmed(second))
		require.Equal(t, 2, b.ready(t))
		armed.Disarm()
		require.True(t, acked(t, second))
	case proxy.Nack:
		require.False(t, acked(t, second))
		require.True(t, acked(t, c.publish(t, b.queue, "third")))
		b.holds(t, "first", "second", "third")
		c.goesOn(t)
	}
	require.Equal(t, 1, armed.Sprung())
}

func faultAtReturn(t *testing.T, b *bus, fault proxy.Fault) {
	armed, c := b.Arm(fault), b.publisher(t)
	returns := c.ch.NotifyReturn(make(chan amqp.Return, 10))
	lost := c.publish(t, b.queue+".nowhere", "lost")
	await(t, "the fault happens", armed.Done())
	switch fault.Do {
	case proxy.Drop:
		require.True(t, acked(t, lost), "the lie that this fault is")
		require.Empty(t, returns)
		c.publish(t, b.queue+".nowhere", "next")
		require.Equal(t, "next", name(await(t, "the next return", returns).Body))
		c.goesOn(t)
	case proxy.DropAndCut:
		c.broke(t)
		require.False(t, acked(t, lost))
		require.Empty(t, returns)
	case proxy.Cut:
		require.Equal(t, "lost", name(await(t, "the return", returns).Body))
		c.broke(t)
		require.False(t, acked(t, lost))
	case proxy.Delay:
		c.goesOn(t)
		require.Empty(t, returns)
		require.True(t, unconfirmed(lost), "the confirm is behind the return")
		armed.Disarm()
		require.True(t, acked(t, lost))
		require.Equal(t, "lost", name(await(t, "the return", returns).Body))
	}
	require.Equal(t, 1, armed.Sprung())
}

func faultAtDeliver(t *testing.T, b *bus, fault proxy.Fault) {
	fault.Match, fault.Skip = "consumer", 1
	armed, c := b.Arm(fault), b.connect(t)
	deliveries := c.consume(t, 0)
	next := func() string {
		d := await(t, "a delivery", deliveries)
		require.NoError(t, d.Ack(false))
		return name(d.Body)
	}
	b.put(t, "first")
	require.Equal(t, "first", next())
	require.NoError(t, c.ch.Qos(9, 0, false), "the broker has the ack")
	b.put(t, "second", "third")
	await(t, "the fault happens", armed.Done())
	switch fault.Do {
	case proxy.Drop:
		require.Equal(t, "third", next())
		c.goesOn(t)
		b.Cut()
		b.holds(t, "second")
	case proxy.DropAndCut:
		c.broke(t)
		require.False(t, c.tap.has("second "))
		b.holds(t, "second", "third")
	case proxy.Cut:
		c.broke(t)
		require.True(t, c.tap.has("second "))
		require.False(t, c.tap.has("third "))
		b.holds(t, "second", "third")
	case proxy.Delay:
		c.goesOn(t)
		require.Empty(t, deliveries)
		armed.Disarm()
		require.Equal(t, "second", next())
		require.Equal(t, "third", next())
	case proxy.Reorder:
		third, second := await(t, "a delivery", deliveries), await(t, "a delivery", deliveries)
		require.Equal(t, []string{"third", "second"}, []string{name(third.Body), name(second.Body)})
		require.Equal(t, []uint64{2, 3}, []uint64{third.DeliveryTag, second.DeliveryTag})
		require.NoError(t, third.Ack(false))
		c.goesOn(t)
		b.Cut()
		b.holds(t, "second")
	}
	require.Equal(t, 1, armed.Sprung())
}

func faultAtAck(t *testing.T, b *bus, fault proxy.Fault) {
	b.put(t, "first", "second")
	armed, c := b.Arm(fault), b.connect(t)
	deliveries := c.consume(t, 0)
	first, second := await(t, "a delivery", deliveries), await(t, "a delivery", deliveries)
	require.NoError(t, first.Ack(false))
	await(t, "the fault happens", armed.Done())
	switch fault.Do {
	case proxy.Drop:
		require.NoError(t, second.Ack(false))
		c.goesOn(t)
		b.Cut()
		b.holds(t, "first")
	case proxy.DropAndCut:
		c.broke(t)
		b.holds(t, "first", "second")
	case proxy.Cut:
		c.broke(t)
		b.holds(t, "second")
	case proxy.Delay:
		require.NoError(t, second.Ack(false))
		c.goesOn(t)
		armed.Disarm()
		require.NoError(t, c.ch.Qos(7, 0, false), "what is answered behind the ack")
		b.Cut()
		b.holds(t)
	}
	require.Equal(t, 1, armed.Sprung())
}

func TestDeliveryThatNobodyFollowsIsNotHeldForEver(t *testing.T) {
	b := openBus(t)
	armed := b.Arm(proxy.Fault{At: proxy.Deliver, Do: proxy.Reorder, Delay: 50 * time.Millisecond})
	deliveries := b.connect(t).consume(t, 0)
	b.put(t, "lonely")
	require.Equal(t, "lonely", name(await(t, "a delivery", deliveries).Body))
	require.Zero(t, armed.Sprung())
	eventually(t, "the fault still waits for two", func() bool {
		b.put(t, "one", "other") // in time, if the machine has time
		first, second := name(await(t, "a delivery", deliveries).Body), name(await(t, "a delivery", deliveries).Body)
		require.ElementsMatch(t, []string{"one", "other"}, []string{first, second})
		if first == "one" {
			require.Zero(t, armed.Sprung())
			return false
		}
		await(t, "the fault happens", armed.Done())
		require.Equal(t, 1, armed.Sprung())
		return true
	})
}

func TestReorderHoldsADeliveryForASecondIfNothingElseIsSaid(t *testing.T) {
	b := openBus(t)
	b.Arm(proxy.Fault{At: proxy.Deliver, Do: proxy.Reorder})
	deliveries := b.connect(t).consume(t, 0)
	b.put(t, "lonely")
	require.Equal(t, "lonely", name(await(t, "a delivery", deliveries).Body))
}

// An ack of the third and all below is not about the message that the broker sent third.
func TestAckOfSeveralWaitsForTheOneThatChangedPlaces(t *testing.T) {
	for _, both := range []bool{false, true} {
		b := openBus(t)
		b.put(t, "1", "2", "3", "4")
		armed, c := b.Arm(proxy.Fault{At: proxy.Deliver, Do: proxy.Reorder, Count: 2, Delay: patience}), b.connect(t)
		deliveries := c.consume(t, 0)
		var order []string
		for range 4 {
			order = append(order, name(await(t, "a delivery", deliveries).Body))
		}
		require.Equal(t, []string{"2", "1", "4", "3"}, order)
		eventually(t, "both changes of places are counted", func() bool { return armed.Sprung() == 2 })
		require.NoError(t, c.ch.Ack(3, true))
		if both {
			require.NoError(t, c.ch.Ack(4, false))
		}
		require.NoError(t, c.ch.Qos(9, 0, false), "the broker accepted the acks")
		b.Cut()
		if both {
			b.holds(t)
		} else {
			b.holds(t, "1", "2", "3") // 1 and 2 again, 3 for the first time, and never 4
		}
	}
}

func TestDelayOfOneChannelEndsByItself(t *testing.T) {
	b := openBus(t)
	b.Arm(proxy.Fault{At: proxy.Publish, Do: proxy.Delay, Delay: 100 * time.Millisecond})
	began := time.Now()
	require.True(t, acked(t, b.publisher(t).publish(t, b.queue, "x")))
	require.GreaterOrEqual(t, time.Since(began), 100*time.Millisecond)
}

func TestEmptyMessagesMeetFaultsToo(t *testing.T) {
	b := openBus(t)
	c := b.publisher(t)
	b.Arm(proxy.Fault{At: proxy.Publish, Do: proxy.Drop, Match: b.queue})
	b.Arm(proxy.Fault{At: proxy.Publish, Do: proxy.Duplicate, Match: b.queue})
	for range 3 {
		_, err := c.ch.PublishWithDeferredConfirm("", b.queue, true, false, amqp.Publishing{})
		require.NoError(t, err)
	}
	eventually(t, "one is dropped, one doubled", func() bool { return b.ready(t) == 3 })
}

// Whatever is dropped or doubled: a confirmed message is in the queue, and all that arrived are confirmed.
func TestConfirmsAreOfTheMessagesThatTheyAreAbout(t *testing.T) {
	b := openBus(t)
	c := b.publisher(t)
	random := rand.New(rand.NewPCG(1, 2))
	var all []*amqp.DeferredConfirmation
	var arrived []string
	var dropped []int
	for i := range 600 {
		key, copies := b.queue, 1
		switch random.IntN(8) {
		case 0:
			b.Arm(proxy.Fault{At: proxy.Publish, Do: proxy.Drop, Match: fmt.Sprint("exact-", i, ".")})
			copies = 0
		case 1:
			b.Arm(proxy.Fault{At: proxy.Publish, Do: proxy.Duplicate, Match: fmt.Sprint("exact-", i, ".")})
			copies = 2
		}
		if copies != 1 {
			key = fmt.Sprint("exact-", i, ".", b.queue)
			require.NoError(t, b.direct.QueueBind(b.queue, key, "amq.direct", false, nil))
		}
		exchange := map[bool]string{true: "", false: "amq.direct"}[key == b.queue]
		d, err := c.ch.PublishWithDeferredConfirm(exchange, key, true, false, amqp.Publishing{Body: fmt.Append(nil, i, " ")})
		require.NoError(t, err)
		all = append(all, d)
		for range copies {
			arrived = append(arrived, fmt.Sprint(i))
		}
		if copies == 0 {
			dropped = append(dropped, i)
		}
	}
	for i, d := range all {
		if !slices.Contains(dropped, i) {
			require.True(t, acked(t, d), i)
		}
	}
	for _, i := range dropped {
		require.True(t, unconfirmed(all[i]), i)
	}
	b.holds(t, arrived...)
}

// The client settles deliveries in any order, one or several at once, while neighbours change places. When its connection
// breaks, what it did not ack must come again.
func TestNoMessageIsLostBecauseAnotherChangedPlacesWithIt(t *testing.T) {
	for seed := range uint64(12) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			b := openBus(t)
			random := rand.New(rand.NewPCG(seed, 0))
			b.Arm(proxy.Fault{At: proxy.Deliver, Do: proxy.Reorder, Count: -1})
			const n = 60
			for i := range n {
				require.NoError(t, b.direct.Publish("", b.queue, true, false, amqp.Publishing{Body: fmt.Append(nil, i, " ")}))
			}
			eventually(t, "all are there", func() bool { return b.ready(t) == n })
			c := b.connect(t)
			deliveries := c.consume(t, 0)
			open := map[uint64]string{}
			unsettled := func() (tags []uint64) {
				for tag := range open {
					tags = append(tags, tag)
				}
				slices.Sort(tags)
				return tags
			}
			for range n {
				d := await(t, "a delivery", deliveries)
				open[d.DeliveryTag] = name(d.Body)
				if tags := unsettled(); random.IntN(2) == 0 {
					tag, multiple := tags[random.IntN(len(tags))], random.IntN(3) == 0
					require.NoError(t, c.ch.Ack(tag, multiple))
					for _, other := range tags {
						if other == tag || multiple && other < tag {
							delete(open, other)
						}
					}
				}
			}
			stays := unsettled()
			finish := seed%2 == 0
			if finish { // all are acked in the end, and then the broker holds nothing back
				for _, tag := range stays {
					require.NoError(t, c.ch.Ack(tag, false))
				}
				open = nil
			}
			c.goesOn(t)
			require.NoError(t, c.ch.Qos(9, 0, false), "the broker accepted the acks")
			b.Cut()
			again := map[string]bool{}
			if finish {
				b.holds(t)
				return
			}
			eventually(t, "what was not acked comes again", func() bool {
				d, ok, err := b.direct.Get(b.queue, true)
				require.NoError(t, err)
				if ok {
					again[name(d.Body)] = true
				}
				for _, message := range open {
					if !again[message] {
						return false
					}
				}
				return true
			})
		})
	}
}

func TestManyChannelsMeetTheFaultsOfTheirOwn(t *testing.T) {
	b := openBus(t)
	c := b.connect(t)
	armed := b.Arm(proxy.Fault{At: proxy.Publish, Do: proxy.Delay, Match: b.queue, Skip: 3})
	var pending []*amqp.DeferredConfirmation
	for i := range 20 {
		ch, err := c.conn.Channel()
		require.NoError(t, err)
		require.NoError(t, ch.Confirm(false))
		d, err := ch.PublishWithDeferredConfirm("", b.queue, true, false, amqp.Publishing{Body: body(fmt.Sprint(i))})
		require.NoError(t, err)
		pending = append(pending, d)
	}
	for i, d := range pending {
		if i != 3 {
			require.True(t, acked(t, d))
		}
	}
	require.True(t, unconfirmed(pending[3]))
	armed.Disarm()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	ok, err := pending[3].WaitContext(ctx)
	require.NoError(t, err)
	require.True(t, ok)
}
