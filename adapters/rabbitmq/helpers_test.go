package rabbitmq_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/adapters/rabbitmq"
	"takeout/tests/testenv"
	"takeout/verify/servers"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// patience is how long a test waits for what must happen. Only a test that fails waits that long.
const patience = 20 * time.Second

func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !condition() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", patience, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// open returns a broker that is closed with the test. It need not be connected yet.
func open(t *testing.T, rawURL string, cfg rabbitmq.Config) *rabbitmq.Broker {
	t.Helper()
	logger := slog.New(slog.NewTextHandler(t.Output(), nil))
	b, err := rabbitmq.Open(rawURL, cfg, logger)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

// openReady returns a broker that is connected.
func openReady(t *testing.T, rawURL string, cfg rabbitmq.Config) *rabbitmq.Broker {
	t.Helper()
	b := open(t, rawURL, cfg)
	waitReady(t, b)
	return b
}

func waitReady(t *testing.T, b *rabbitmq.Broker) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := b.WaitReady(ctx); err != nil {
		t.Fatalf("broker not ready: %v; it says %v", err, b.Check())
	}
}

func bind(t *testing.T, b *rabbitmq.Broker, topic, queue string) {
	t.Helper()
	if err := b.Bind(topic, queue); err != nil {
		t.Fatal(err)
	}
}

// subscribe returns the messages of a queue and the subscriber, which is closed with the test.
func subscribe(t *testing.T, b *rabbitmq.Broker, queue string) (<-chan *message.Message, message.Subscriber) {
	t.Helper()
	s := b.Subscriber()
	msgs, err := s.Subscribe(t.Context(), queue)
	if err != nil {
		t.Fatal(err)
	}
	return msgs, s
}

func publish(t *testing.T, b *rabbitmq.Broker, topic string, ids ...string) {
	t.Helper()
	for _, id := range ids {
		if err := b.Publish(topic, newMessage(id)); err != nil {
			t.Fatal(err)
		}
	}
}

func newMessage(id string) *message.Message { return message.NewMessage(id, []byte(`{"id":"`+id+`"}`)) }

func newID() string { return watermill.NewUUID() }

func ids(n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("m%d", i)
	}
	return all
}

func receive(t *testing.T, msgs <-chan *message.Message) *message.Message {
	t.Helper()
	select {
	case msg, ok := <-msgs:
		if !ok {
			t.Fatal("the channel is closed")
		}
		return msg
	case <-time.After(patience):
		t.Fatalf("no message within %s", patience)
		return nil
	}
}

// receiveAcked acks messages until each of the ids has come, whatever else does, and returns how often each came.
func receiveAcked(t *testing.T, msgs <-chan *message.Message, ids ...string) map[string]int {
	t.Helper()
	came := make(map[string]int)
	missing := make(map[string]bool)
	for _, id := range ids {
		missing[id] = true
	}
	for len(missing) > 0 {
		msg := receive(t, msgs)
		msg.Ack()
		came[msg.UUID]++
		delete(missing, msg.UUID)
	}
	return came
}

// What is allowed where something else would be waited for: promptly is less than a write, a dial or a closing broker may
// take, and inTime is less than a confirm or an answer of the broker may.
const (
	promptly = 4 * time.Second
	inTime   = 9 * time.Second
)

func within(t *testing.T, limit time.Duration, what string, f func()) {
	t.Helper()
	began := time.Now()
	f()
	if took := time.Since(began); took > limit {
		t.Errorf("%s took %s, allowed are %s", what, took, limit)
	}
}

func wantError(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("error is %v, want %v", err, want)
	}
}

// onBroker returns what a queue or exchange is called on the broker.
func onBroker(t *testing.T, rawURL, name string) string {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSuffix(u.Query().Get("namespace")+"."+name, ".")
}

// admin returns a channel of a connection that is not the adapter's.
func admin(t *testing.T, rawURL string) *amqp.Channel {
	t.Helper()
	conn, err := amqp.Dial(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	ch, err := conn.Channel()
	if err != nil {
		t.Fatal(err)
	}
	return ch
}

// wantUndisturbed checks that the connection of a message is still the one that it came over. RabbitMQ 4.3 at times answers
// INTERNAL_ERROR when a queue that is just being deleted is bound, and closes the connection.
func wantUndisturbed(t *testing.T, rawURL string, inFlight *message.Message) {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	broker, err := servers.Greet(servers.RabbitMQ, u)
	if err != nil {
		t.Fatal(err)
	}
	if inFlight.Context().Err() != nil && !strings.HasPrefix(broker, "RabbitMQ 4.3.") {
		t.Error("the message in flight was disturbed")
	}
}

// deleteQueue deletes a queue of that name, with what is in it.
func deleteQueue(t *testing.T, ch *amqp.Channel, name string) {
	t.Helper()
	if _, err := ch.QueueDelete(name, false, false, false); err != nil {
		t.Fatal(err)
	}
}

// ready returns how many messages of a queue wait for a consumer.
func ready(t *testing.T, ch *amqp.Channel, queue string) int {
	t.Helper()
	q, err := ch.QueueDeclarePassive(queue, true, false, false, false, nil)
	if err != nil {
		t.Fatal(err)
	}
	return q.Messages
}

// proxy is a TCP proxy in front of the broker.
type proxy struct {
	target   string
	listener net.Listener
	secure   *tls.Config // if clients must speak TLS
	swallow  atomic.Bool // lose what the broker sends
	mute     atomic.Bool // lose what the broker says when it ends a consumer
	stall    atomic.Bool // do not read what the client sends

	mu    sync.Mutex
	conns []net.Conn
}

// newProxy returns a proxy and the URL of the broker behind it.
func newProxy(t *testing.T, rawURL string) (*proxy, string) {
	t.Helper()
	p := reserveProxy(t, rawURL)
	p.start(t)
	u, _ := url.Parse(rawURL)
	u.Host = p.listener.Addr().String()
	return p, u.String()
}

// reserveProxy returns a proxy on whose address nobody listens until start.
func reserveProxy(t *testing.T, rawURL string) *proxy {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	return &proxy{target: u.Host, listener: listener}
}

func (p *proxy) start(t *testing.T) {
	t.Helper()
	listener, err := net.Listen("tcp", p.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	p.listener = listener
	t.Cleanup(func() { listener.Close(); p.cut() })
	if p.secure != nil {
		listener = tls.NewListener(listener, p.secure)
	}
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", p.target)
			if err != nil {
				client.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, client, server)
			p.mu.Unlock()
			go p.pipe(client, server, false)
			go p.pipe(server, client, true)
		}
	}()
}

func (p *proxy) pipe(from, to net.Conn, fromBroker bool) {
	defer from.Close()
	defer to.Close()
	next := frames(from)
	if !fromBroker {
		next = chunks(from)
	}
	for {
		for !fromBroker && p.stall.Load() {
			time.Sleep(time.Millisecond)
		}
		sent, err := next()
		if err != nil {
			return
		}
		if fromBroker && (p.swallow.Load() || p.mute.Load() && isCancel(sent)) {
			continue
		}
		if _, err := to.Write(sent); err != nil {
			return
		}
	}
}

// chunks returns a function that reads whatever is there.
func chunks(from io.Reader) func() ([]byte, error) {
	buf := make([]byte, 64<<10)
	return func() ([]byte, error) {
		n, err := from.Read(buf)
		return buf[:n], err
	}
}

// frames returns a function that reads one AMQP frame: its type, channel and size, as many bytes, and an end.
func frames(from io.Reader) func() ([]byte, error) {
	in := bufio.NewReaderSize(from, 64<<10)
	return func() ([]byte, error) {
		header, err := in.Peek(7)
		if err != nil {
			return nil, err
		}
		frame := make([]byte, 7+int(binary.BigEndian.Uint32(header[3:]))+1)
		_, err = io.ReadFull(in, frame)
		return frame, err
	}
}

// isCancel reports whether the frame is the method basic.cancel: class 60, method 30.
func isCancel(frame []byte) bool {
	return frame[0] == 1 && bytes.HasPrefix(frame[7:], []byte{0, 60, 0, 30})
}

// cut closes all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}
