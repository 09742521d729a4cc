package rabbitmq_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/adapters/rabbitmq"
	"takeout/app"
	"takeout/tests/testenv"
)

func TestForeignMessageArrivesWithItsHeadersAsText(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	b := openReady(t, url, rabbitmq.Config{NackDelay: time.Millisecond})
	bind(t, b, "topic", "q")
	err := admin(t, url).PublishWithContext(t.Context(), onBroker(t, url, ""), "topic", true, false, amqp.Publishing{
		ContentType: "text/plain",
		Type:        "greeting",
		AppId:       "elsewhere",
		Timestamp:   time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Headers: amqp.Table{
			"number": int32(7), "yes": true, "nothing": nil, "bytes": []byte{0xff, 0},
			"nested":  amqp.Table{"list": []any{int64(1), "two"}},
			"x-death": "not a list",

			app.MetadataUndeliverable: "a lie",
		},
		Body: []byte("hello"),
	})
	if err != nil {
		t.Fatal(err)
	}
	msgs, _ := subscribe(t, b, "q")

	// Nacked once: RabbitMQ adds the number x-delivery-count to what it delivers again.
	receive(t, msgs).Nack()
	got := receive(t, msgs)
	got.Ack()

	want := message.Metadata{
		"number": "7", "yes": "true", "nothing": "", "bytes": "/wA=", "nested": `{"list":[1,"two"]}`,
		"x-death": "not a list", "x-delivery-count": "1",
		"amqp-content-type": "text/plain", "amqp-type": "greeting", "amqp-app-id": "elsewhere",
		"amqp-timestamp": "2026-01-02T03:04:05Z", "amqp-routing-key": "topic", "amqp-redelivered": "true",
		"amqp-exchange": onBroker(t, url, ""),
	}
	delete(got.Metadata, "x-acquired-count") // from 4.3 on
	for key, value := range want {
		if got.Metadata[key] != value {
			t.Errorf("metadata %s is %q, want %q", key, got.Metadata[key], value)
		}
	}
	if len(got.Metadata) != len(want) || got.UUID != "" || string(got.Payload) != "hello" {
		t.Errorf("got %q %q %v", got.UUID, got.Payload, got.Metadata)
	}
}

// amqp091 ends the connection over each of these, and with it everything that is read: for ever, because the message stays.
func TestMessageWhoseHeadersCannotBeReadComesWithWhatItHasInThem(t *testing.T) {
	t.Parallel()
	var deep any = "bottom"
	for range 100 {
		deep = amqp.Table{"in": deep}
	}
	many := amqp.Table{}
	for i := range 9000 {
		many[fmt.Sprint("n", i)] = nil
	}
	for name, test := range map[string]struct {
		headers amqp.Table
		kept    string // the header that has the bytes of what cannot be read
		holds   string
	}{
		"nested 100 deep":        {amqp.Table{"deep": deep, "list": []any{deep}, "plain": "x"}, "deep", "bottom"},
		"a list of 9,000":        {amqp.Table{"list": make([]any, 9000), "plain": "x"}, "list", strings.Repeat("V", 9000)},
		"9,000 headers":          {many, "amqp-headers", "n8999"},
		"all that a frame holds": {amqp.Table{"large": strings.Repeat("v", 131_072-8-14-len("\x05large")-1-4-4)}, "amqp-headers", strings.Repeat("v", 131_000-1000)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			url := testenv.AMQP(t)
			b := openReady(t, url, rabbitmq.Config{NackDelay: time.Millisecond})
			bind(t, b, "topic", "q")
			err := admin(t, url).PublishWithContext(t.Context(), onBroker(t, url, ""), "topic", true, false, amqp.Publishing{Headers: test.headers, Body: []byte("hello")})
			if err != nil {
				t.Fatal(err)
			}
			msgs, _ := subscribe(t, b, "q")

			receive(t, msgs).Nack() // RabbitMQ adds a header to what it delivers again
			got := receive(t, msgs)
			got.Ack()
			if string(got.Payload) != "hello" || test.headers["plain"] != nil && got.Metadata["plain"] != "x" {
				t.Errorf("%q, and plain is %q", got.Payload, got.Metadata["plain"])
			}
			kept := got.Metadata[test.kept]
			if bytes, err := base64.StdEncoding.DecodeString(kept); err == nil {
				kept += string(bytes)
			}
			if !strings.Contains(kept, test.holds) {
				t.Errorf("%s is without what was sent: %.100q", test.kept, kept)
			}
			publish(t, b, "topic", "next")
			receiveAcked(t, msgs, "next")
		})
	}
}

func TestManyMessagesAreInFlightAtOnce(t *testing.T) {
	t.Parallel()
	b := openReady(t, testenv.AMQP(t), rabbitmq.Config{Prefetch: 50})
	bind(t, b, "topic", "q")
	publish(t, b, "topic", ids(60)...)
	msgs, _ := subscribe(t, b, "q")

	held := make([]*message.Message, 50)
	for i := range held {
		held[i] = receive(t, msgs)
	}
	select {
	case <-msgs:
		t.Error("more messages in flight than the prefetch")
	case <-time.After(100 * time.Millisecond):
	}
	for _, msg := range held {
		msg.Ack()
	}
	receiveAcked(t, msgs, ids(60)[50:]...)
}

// nothing checks that no message comes.
func nothing(t *testing.T, msgs <-chan *message.Message, why string) {
	t.Helper()
	select {
	case msg := <-msgs:
		t.Errorf("%s came, and %s", msg.UUID, why)
	case <-time.After(100 * time.Millisecond):
	}
}

func TestDeadLettersComeOneByOne(t *testing.T) {
	t.Parallel()
	b := openReady(t, testenv.AMQP(t), rabbitmq.Config{DeliveryLimit: 1, NackDelay: time.Millisecond})
	bind(t, b, "topic", "q")
	publish(t, b, "topic", ids(3)...)
	msgs, _ := subscribe(t, b, "q")
	var letter *message.Message
	for nacked := 0; nacked < 6; {
		msg := receive(t, msgs)
		if msg.Metadata.Get(app.MetadataUndeliverable) != "" {
			letter = msg
			continue
		}
		msg.Nack()
		nacked++
	}
	for i := range 3 {
		if letter == nil {
			letter = receive(t, msgs)
		}
		nothing(t, msgs, "a dead letter was in flight")
		if letter.Metadata.Get(app.MetadataUndeliverable) == "" {
			t.Errorf("letter %d is none", i)
		}
		letter.Ack()
		letter = nil
	}
}

func TestNackedMessageComesBackAfterTheDelay(t *testing.T) {
	t.Parallel()
	const delay = 150 * time.Millisecond
	b := openReady(t, testenv.AMQP(t), rabbitmq.Config{NackDelay: delay})
	bind(t, b, "topic", "q")
	publish(t, b, "topic", "m")
	msgs, _ := subscribe(t, b, "q")

	receive(t, msgs).Nack()
	nacked := time.Now()
	receive(t, msgs).Ack()

	if took := time.Since(nacked); took < delay {
		t.Errorf("delivered again after %s", took)
	}
}

func TestMessageDeliveredTooOftenComesOnceMoreAsUndeliverable(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	b := openReady(t, url, rabbitmq.Config{DeliveryLimit: 3, NackDelay: time.Millisecond})
	bind(t, b, "topic", "q")
	sent := newMessage("m")
	sent.Metadata.Set("kept", "yes")
	if err := b.Publish("topic", sent); err != nil {
		t.Fatal(err)
	}
	msgs, _ := subscribe(t, b, "q")

	deliveries := 0
	var last *message.Message
	for {
		last = receive(t, msgs)
		if last.Metadata.Get(app.MetadataUndeliverable) != "" {
			break
		}
		if deliveries++; deliveries > 10 {
			t.Fatal("there is no limit")
		}
		last.Nack()
	}
	if deliveries != 4 {
		t.Errorf("delivered %d times, want once and 3 times again", deliveries)
	}
	if last.UUID != "m" || string(last.Payload) != string(sent.Payload) || last.Metadata.Get("kept") != "yes" {
		t.Errorf("it came as %s %s %v", last.UUID, last.Payload, last.Metadata)
	}
	if reason := last.Metadata.Get(app.MetadataUndeliverable); !strings.Contains(reason, "3 times") {
		t.Errorf("the reason is %q", reason)
	}

	// Whoever keeps it may fail too, and more often than the limit: it stays until it is acked.
	for range 5 {
		last.Nack()
		last = receive(t, msgs)
		if last.Metadata.Get(app.MetadataUndeliverable) == "" {
			t.Fatal("it came back as an ordinary message")
		}
	}
	last.Ack()
	b.Close()
	ch := admin(t, url)
	if q, dead := ready(t, ch, onBroker(t, url, "q")), ready(t, ch, onBroker(t, url, "q.dead")); q+dead != 0 {
		t.Errorf("left are %d messages, and %d undeliverable ones", q, dead)
	}
}

func TestBindingThatSomebodyTookAwayIsMadeAgainAlthoughNothingComesBack(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	b := openReady(t, url, rabbitmq.Config{CheckEvery: 20 * time.Millisecond})
	bind(t, b, "topic", "q")
	bind(t, b, "topic", "another")
	msgs, _ := subscribe(t, b, "q")
	publish(t, b, "topic", "before")
	receive(t, msgs).Ack()
	if err := admin(t, url).QueueUnbind(onBroker(t, url, "q"), "topic", onBroker(t, url, ""), nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the queue gets messages again", func() bool {
		publish(t, b, "topic", "after")
		select {
		case msg := <-msgs:
			msg.Ack()
			return true
		case <-time.After(10 * time.Millisecond):
			return false
		}
	})
}

func TestDeletedQueueGivesNoPhantomMessageAndIsReadAgain(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	b := openReady(t, url, rabbitmq.Config{})
	bind(t, b, "topic", "q")
	publish(t, b, "topic", "before")
	msgs, _ := subscribe(t, b, "q")
	inFlight := receive(t, msgs)

	ch := admin(t, url)
	for range 3 {
		deleteQueue(t, ch, onBroker(t, url, "q"))
		eventually(t, "the queue is back and read", func() bool {
			q, err := ch.QueueDeclarePassive(onBroker(t, url, "q"), true, false, false, false, nil)
			if err != nil {
				ch = admin(t, url)
			}
			return err == nil && q.Consumers == 1
		})
	}

	wantUndisturbed(t, url, inFlight)
	inFlight.Ack()
	publish(t, b, "topic", "after")
	got := receive(t, msgs)
	got.Ack()
	if got.UUID != "after" {
		t.Errorf("got %q with %d bytes", got.UUID, len(got.Payload))
	}
}

// RabbitMQ counts the messages of each quorum queue from nought, and knows a consumer by its channel and tag.
func TestAckOfADeletedQueuesMessageIsNotTakenForOneOfTheQueueThatFollows(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	proxy, through := newProxy(t, url)
	b := openReady(t, through, rabbitmq.Config{ReconnectMax: 100 * time.Millisecond})
	bind(t, b, "topic", "q")
	msgs, _ := subscribe(t, b, "q")
	publish(t, b, "topic", ids(3)...)
	var old []*message.Message
	for range 3 {
		old = append(old, receive(t, msgs))
	}
	deleteQueue(t, admin(t, url), onBroker(t, url, "q"))
	young := []string{"young-0", "young-1", "young-2"}
	eventually(t, "the queue is back", func() bool { return b.Publish("topic", newMessage(young[0])) == nil })
	publish(t, b, "topic", young[1:]...)
	for range young {
		receive(t, msgs)
	}

	for _, msg := range old {
		msg.Ack()
		<-msg.Context().Done()
	}
	// An ack may be some milliseconds late.
	time.Sleep(200 * time.Millisecond)
	proxy.cut()
	receiveAcked(t, msgs, young...)
}

func TestReaderThatTheBrokerEndedWithoutAWordReadsAgain(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	proxy, through := newProxy(t, url)
	b := openReady(t, through, rabbitmq.Config{CheckEvery: 20 * time.Millisecond})
	bind(t, b, "topic", "q")
	msgs, _ := subscribe(t, b, "q")
	publish(t, b, "topic", "before")
	inFlight := receive(t, msgs)

	proxy.mute.Store(true)
	ch := admin(t, url)
	deleteQueue(t, ch, onBroker(t, url, "q"))
	other := openReady(t, url, rabbitmq.Config{})
	bind(t, other, "topic", "q")
	// The reader may declare the queue at the same time, and RabbitMQ refuse what comes meanwhile.
	eventually(t, "publishing", func() bool { return other.Publish("topic", newMessage("after")) == nil })
	wantUndisturbed(t, url, inFlight)
	inFlight.Ack()
	receiveAcked(t, msgs, "after")
}

func TestStuckMessageDoesNotHoldBackAcks(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	proxy, through := newProxy(t, url)
	b := openReady(t, through, rabbitmq.Config{Prefetch: 20, ReconnectMax: 100 * time.Millisecond})
	bind(t, b, "topic", "q")
	all := ids(200)
	publish(t, b, "topic", all...)
	msgs, _ := subscribe(t, b, "q")

	stuck := receive(t, msgs)
	var last *message.Message
	for range all[1:] {
		last = receive(t, msgs)
		last.Ack()
	}
	<-last.Context().Done()
	// An ack may be some milliseconds late. What the broker has not seen acked after that, it delivers again.
	time.Sleep(200 * time.Millisecond)
	proxy.cut()

	again := receive(t, msgs)
	if again.UUID != stuck.UUID {
		t.Errorf("%s was delivered again", again.UUID)
	}
	again.Ack()
	select {
	case msg := <-msgs:
		t.Errorf("%s was delivered again", msg.UUID)
	case <-time.After(300 * time.Millisecond):
	}
	if stuck.Context().Err() == nil {
		t.Error("the lost message's context goes on")
	}
}

func TestShutdownLetsHandlersFinish(t *testing.T) {
	t.Parallel()
	url := testenv.AMQP(t)
	b := openReady(t, url, rabbitmq.Config{Prefetch: 5})
	bind(t, b, "topic", "q")
	publish(t, b, "topic", ids(20)...)
	subscriber := b.Subscriber()
	type key struct{}
	ctx, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "kept"))
	msgs, err := subscriber.Subscribe(ctx, "q")
	if err != nil {
		t.Fatal(err)
	}
	working := []*message.Message{receive(t, msgs), receive(t, msgs)}

	cancel()
	closed := make(chan struct{})
	go func() { defer close(closed); subscriber.Close(); subscriber.Close() }()

	ch := admin(t, url)
	eventually(t, "what nobody has read is back", func() bool { return ready(t, ch, onBroker(t, url, "q")) == 18 })
	for _, msg := range working {
		if msg.Context().Err() != nil || msg.Context().Value(key{}) != "kept" {
			t.Errorf("a handler's context has %v, %v", msg.Context().Err(), msg.Context().Value(key{}))
		}
		select {
		case <-closed:
			t.Fatal("closed with a handler at work")
		default:
		}
		msg.Ack()
	}
	within(t, promptly, "the rest of Close", func() { <-closed })
	if _, ok := <-msgs; ok {
		t.Error("a message after Close")
	}
	b.Close() // its connection is what an unacked message would come back from
	if n := ready(t, ch, onBroker(t, url, "q")); n != 18 {
		t.Errorf("%d messages are left, want 18", n)
	}
}

func TestMessageNotSettledInTimeIsDeliveredAgain(t *testing.T) {
	t.Parallel()
	b := openReady(t, testenv.AMQP(t), rabbitmq.Config{DrainTimeout: 100 * time.Millisecond})
	bind(t, b, "topic", "q")
	publish(t, b, "topic", "m")
	msgs, subscriber := subscribe(t, b, "q")
	slow := receive(t, msgs)

	within(t, promptly, "Close", func() { subscriber.Close() })

	if slow.Context().Err() == nil {
		t.Error("the handler was not told to stop")
	}
	slow.Ack() // too late
	again, _ := subscribe(t, b, "q")
	receiveAcked(t, again, "m")
}

func TestNackWhileClosingDoesNotWait(t *testing.T) {
	t.Parallel()
	b := openReady(t, testenv.AMQP(t), rabbitmq.Config{NackDelay: time.Minute})
	bind(t, b, "topic", "q")
	publish(t, b, "topic", "m1", "m2")
	msgs, subscriber := subscribe(t, b, "q")
	receive(t, msgs).Nack()
	second := receive(t, msgs)
	time.AfterFunc(50*time.Millisecond, func() { second.Nack() })

	within(t, promptly, "Close", func() { subscriber.Close() })

	again, _ := subscribe(t, b, "q")
	receiveAcked(t, again, "m1", "m2")
}

func TestClosedBrokerClosesItsSubscribers(t *testing.T) {
	t.Parallel()
	b := openReady(t, testenv.AMQP(t), rabbitmq.Config{DrainTimeout: time.Minute})
	bind(t, b, "topic", "q")
	publish(t, b, "topic", "m")
	msgs, subscriber := subscribe(t, b, "q")
	stuck := receive(t, msgs)

	closed := make(chan struct{})
	within(t, inTime, "Close", func() {
		go func() { defer close(closed); b.Close() }()
		eventually(t, "publishing is refused", func() bool {
			return errors.Is(b.Publish("topic", newMessage("late")), rabbitmq.ErrClosed)
		})
		select {
		case <-closed:
			t.Error("publishing was refused only after Close")
		case <-time.After(10 * time.Millisecond):
		}
		<-closed
	})

	if _, ok := <-msgs; ok || stuck.Context().Err() == nil {
		t.Errorf("channel open: %v, context: %v", ok, stuck.Context().Err())
	}
	subscriber.Close()
}
