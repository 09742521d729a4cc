package rabbitmq_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/adapters/rabbitmq"
	"takeout/domain"
	"takeout/tests/testenv"
)

func TestPublishedMessageIsPersistentAndKeepsEverything(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	b := openReady(t, url, rabbitmq.Config{})
	bind(t, b, "order.placed", "q")

	sent := newMessage(newID())
	sent.Metadata.Set("traceparent", "00-1-2-03")
	if err := b.Publish("order.placed", sent); err != nil {
		t.Fatal(err)
	}

	got, ok, err := admin(t, url).Get(onBroker(t, url, "q"), false)
	if err != nil || !ok {
		t.Fatalf("got %v, %v", ok, err)
	}
	if got.MessageId != sent.UUID || got.ContentType != "application/cloudevents+json" ||
		got.DeliveryMode != amqp.Persistent || got.Headers["traceparent"] != "00-1-2-03" ||
		string(got.Body) != string(sent.Payload) {
		t.Errorf("the broker has %+v", got)
	}
}

func TestUnroutableMessageIsAnError(t *testing.T) {
	t.Parallel()
	b := openReady(t, testenv.AMQP(t), rabbitmq.Config{})

	err := b.Publish("nobody.listens", newMessage("m1"))

	wantError(t, err, rabbitmq.ErrUnroutable)
	if !strings.Contains(fmt.Sprint(err), "nobody.listens") || !strings.Contains(fmt.Sprint(err), "m1") {
		t.Errorf("the error does not name the topic and the message: %v", err)
	}
	if domain.KindOf(err) != domain.Unavailable {
		t.Errorf("the error's kind is %v", domain.KindOf(err))
	}
	bind(t, b, "nobody.listens", "q")
	publish(t, b, "nobody.listens", "m1")
}

func TestUnroutableMessagesAreToldFromRoutableOnes(t *testing.T) {
	t.Parallel()
	b := openReady(t, testenv.AMQP(t), rabbitmq.Config{PublishWindow: 64})
	bind(t, b, "bound", "q")

	var all sync.WaitGroup
	var mu sync.Mutex
	wrong := 0
	for range 10 {
		for i := range 250 {
			topic, want := "bound", error(nil)
			if i%5 == 0 {
				topic, want = "unbound", rabbitmq.ErrUnroutable
			}
			// The same id on both topics at once: only the topic tells them apart.
			id := fmt.Sprintf("m%d", i/5)
			all.Go(func() {
				if err := b.Publish(topic, newMessage(id)); !errors.Is(err, want) {
					mu.Lock()
					defer mu.Unlock()
					if wrong++; wrong < 5 {
						t.Errorf("publish %s to %s: %v, want %v", id, topic, err, want)
					}
				}
			})
		}
		all.Wait()
	}
}

func TestSameMessageManyTimesInFlightIsReturnedAsOften(t *testing.T) {
	t.Parallel()
	b := openReady(t, testenv.AMQP(t), rabbitmq.Config{})

	var all sync.WaitGroup
	for range 300 {
		all.Go(func() { wantError(t, b.Publish("unbound", newMessage("m")), rabbitmq.ErrUnroutable) })
	}
	all.Wait()

	// And no return is left over for the next one.
	bind(t, b, "unbound", "q")
	publish(t, b, "unbound", "m")
}

func TestOneCallMayPublishMoreThanTheWindow(t *testing.T) {
	t.Parallel()
	b := openReady(t, testenv.AMQP(t), rabbitmq.Config{PublishWindow: 10})
	bind(t, b, "topic", "q")

	var callers sync.WaitGroup
	for caller := range 4 {
		msgs := make([]*message.Message, 100)
		for i := range msgs {
			msgs[i] = newMessage(fmt.Sprintf("c%dm%d", caller, i))
		}
		callers.Go(func() {
			if err := b.Publish("topic", msgs...); err != nil {
				t.Error(err)
			}
		})
	}
	within(t, patience, "publishing", callers.Wait)
}

func TestWhatAMQPCannotCarryIsRefusedAndHarmsNobody(t *testing.T) {
	t.Parallel()
	b := openReady(t, testenv.AMQP(t), rabbitmq.Config{})
	bind(t, b, "topic", "q")
	with := func(key, value string) *message.Message {
		msg := newMessage(newID())
		msg.Metadata.Set(key, value)
		return msg
	}

	for name, try := range map[string]func() error{
		"long key":       func() error { return b.Publish("topic", with(strings.Repeat("k", 256), "v")) },
		"long value":     func() error { return b.Publish("topic", with("k", strings.Repeat("v", 200_000))) },
		"routing header": func() error { return b.Publish("topic", with("CC", "other")) },
		"long id":        func() error { return b.Publish("topic", newMessage(strings.Repeat("i", 256))) },
		"long topic":     func() error { return b.Publish(strings.Repeat("t", 256), newMessage("m")) },
		"empty topic":    func() error { return b.Publish("", newMessage("m")) },
		"second is bad":  func() error { return b.Publish("topic", newMessage("first"), with("BCC", "x")) },
		"bind long":      func() error { return b.Bind("topic", strings.Repeat("q", 250)) },
		"bind dead":      func() error { return b.Bind("topic", "q.dead") },
		"bind reserved":  func() error { return b.Bind("topic", "amq.q") },
		"subscribe dead": func() error { _, err := b.Subscriber().Subscribe(t.Context(), "q.dead"); return err },
	} {
		if err := try(); domain.KindOf(err) != domain.Invalid {
			t.Errorf("%s: error is %v, want an Invalid one", name, err)
		}
	}

	// Nothing of that was sent, and the connection is still the same.
	edge := with(strings.Repeat("k", 255), strings.Repeat("v", 100_000))
	if err := b.Publish("topic", edge); err != nil {
		t.Fatal(err)
	}
	msgs, _ := subscribe(t, b, "q")
	got := receive(t, msgs)
	got.Ack()
	if got.UUID != edge.UUID || !hasAll(got.Metadata, edge.Metadata) {
		t.Errorf("got %s with %d metadata", got.UUID, len(got.Metadata))
	}
}

func hasAll(got, want message.Metadata) bool {
	for key, value := range want {
		if got[key] != value {
			return false
		}
	}
	return true
}

func TestMessageBiggerThanAFrameArrives(t *testing.T) {
	t.Parallel()
	b := openReady(t, testenv.AMQP(t), rabbitmq.Config{})
	bind(t, b, "topic", "q")
	sent := message.NewMessage("big", make([]byte, 1_000_000))

	if err := b.Publish("topic", sent); err != nil {
		t.Fatal(err)
	}

	msgs, _ := subscribe(t, b, "q")
	got := receive(t, msgs)
	got.Ack()
	if len(got.Payload) != len(sent.Payload) {
		t.Errorf("got %d bytes", len(got.Payload))
	}
}

func TestDeletedExchangeIsDeclaredAgain(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	b := openReady(t, url, rabbitmq.Config{ReconnectMax: 200 * time.Millisecond})
	bind(t, b, "topic", "q")
	if err := admin(t, url).ExchangeDelete(onBroker(t, url, ""), false, false); err != nil {
		t.Fatal(err)
	}

	err := b.Publish("topic", newMessage("m"))

	wantError(t, err, rabbitmq.ErrNotConfirmed)
	if !strings.Contains(fmt.Sprint(err), "NOT_FOUND") {
		t.Errorf("the error does not say why: %v", err)
	}
	eventually(t, "publishing again", func() bool { return b.Publish("topic", newMessage("m")) == nil })
}

func TestDeletedQueueIsDeclaredAgainAfterAReturn(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	b := openReady(t, url, rabbitmq.Config{})
	bind(t, b, "topic", "q")
	deleteQueue(t, admin(t, url), onBroker(t, url, "q"))

	wantError(t, b.Publish("topic", newMessage("m")), rabbitmq.ErrUnroutable)

	eventually(t, "publishing again", func() bool { return b.Publish("topic", newMessage("m")) == nil })
}

func TestRefusedMessageIsAnError(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	b := openReady(t, url, rabbitmq.Config{})
	// A queue that is full from the start, bound by somebody else.
	ch := admin(t, url)
	full := onBroker(t, url, "full")
	_, err := ch.QueueDeclare(full, true, false, false, false, amqp.Table{
		amqp.QueueMaxLenArg: int64(0), amqp.QueueOverflowArg: amqp.QueueOverflowRejectPublish})
	if err == nil {
		err = ch.QueueBind(full, "topic", onBroker(t, url, ""), false, nil)
	}
	if err != nil {
		t.Fatal(err)
	}

	err = b.Publish("topic", newMessage("m"))

	wantError(t, err, rabbitmq.ErrNotConfirmed)
	if err := b.Check(); err != nil {
		t.Errorf("the connection is gone: %v", err)
	}
}

func TestTopicThatIsRefusedForLongIsTriedOnAnotherConnection(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	b := openReady(t, url, rabbitmq.Config{ConfirmTimeout: 300 * time.Millisecond, ReconnectMax: 100 * time.Millisecond})
	ch := admin(t, url)
	full := onBroker(t, url, "full")
	_, err := ch.QueueDeclare(full, true, false, false, false, amqp.Table{
		amqp.QueueMaxLenArg: int64(0), amqp.QueueOverflowArg: amqp.QueueOverflowRejectPublish})
	if err == nil {
		err = ch.QueueBind(full, "topic", onBroker(t, url, ""), false, nil)
	}
	if err != nil {
		t.Fatal(err)
	}

	eventually(t, "a new connection", func() bool {
		_ = b.Publish("topic", newMessage(newID()))
		return strings.Contains(fmt.Sprint(b.Check()), "trying another connection")
	})

	deleteQueue(t, ch, full)
	bind(t, b, "topic", "q")
	eventually(t, "publishing", func() bool { return b.Publish("topic", newMessage(newID())) == nil })
}

func TestPublishAfterCloseFails(t *testing.T) {
	t.Parallel()
	b := openReady(t, testenv.AMQP(t), rabbitmq.Config{})
	bind(t, b, "topic", "q")

	for range 2 {
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}

	wantError(t, b.Publish("topic", newMessage("m")), rabbitmq.ErrClosed)
	wantError(t, b.Bind("topic", "other"), rabbitmq.ErrClosed)
	wantError(t, b.Check(), rabbitmq.ErrClosed)
	wantError(t, b.WaitReady(t.Context()), rabbitmq.ErrClosed)
	_, err := b.Subscriber().Subscribe(t.Context(), "q")
	wantError(t, err, rabbitmq.ErrClosed)
}

func TestCloseWaitsForConfirms(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	b := openReady(t, url, rabbitmq.Config{})
	bind(t, b, "topic", "q")

	// Messages that were accepted before Close are confirmed, later ones refused, and nothing in between.
	var publishers sync.WaitGroup
	var confirmed, refused sync.Map
	started := make(chan struct{}, 200)
	for i := range 200 {
		publishers.Go(func() {
			id := fmt.Sprintf("m%d", i)
			started <- struct{}{}
			switch err := b.Publish("topic", newMessage(id)); {
			case err == nil:
				confirmed.Store(id, true)
			case errors.Is(err, rabbitmq.ErrClosed):
				refused.Store(id, true)
			default:
				t.Errorf("publish %s: %v", id, err)
			}
		})
	}
	for range 100 {
		<-started
	}
	b.Close()
	publishers.Wait()

	count := 0
	confirmed.Range(func(_, _ any) bool { count++; return true })
	if n := ready(t, admin(t, url), onBroker(t, url, "q")); n != count {
		t.Errorf("the queue has %d messages, confirmed were %d", n, count)
	}
}

func BenchmarkPublish(b *testing.B) {
	broker, err := rabbitmq.Open(testenv.AMQP(b), rabbitmq.Config{}, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer broker.Close()
	if err := broker.WaitReady(b.Context()); err != nil {
		b.Fatal(err)
	}
	if err := broker.Bind("topic", "q"); err != nil {
		b.Fatal(err)
	}
	payload := make([]byte, 500)
	b.SetParallelism(32)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := broker.Publish("topic", message.NewMessage(newID(), payload)); err != nil {
				b.Error(err)
				return
			}
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
}

func BenchmarkConsume(b *testing.B) {
	broker, err := rabbitmq.Open(testenv.AMQP(b), rabbitmq.Config{}, nil)
	if err != nil {
		b.Fatal(err)
	}
	defer broker.Close()
	if err := broker.WaitReady(b.Context()); err != nil {
		b.Fatal(err)
	}
	if err := broker.Bind("topic", "q"); err != nil {
		b.Fatal(err)
	}
	for i := 0; i < b.N; i += 500 {
		msgs := make([]*message.Message, min(500, b.N-i))
		for j := range msgs {
			msgs[j] = message.NewMessage(newID(), make([]byte, 500))
		}
		if err := broker.Publish("topic", msgs...); err != nil {
			b.Fatal(err)
		}
	}
	b.ResetTimer()
	sub := broker.Subscriber()
	out, err := sub.Subscribe(b.Context(), "q")
	if err != nil {
		b.Fatal(err)
	}
	for range b.N {
		(<-out).Ack()
	}
	if err := sub.Close(); err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
}
