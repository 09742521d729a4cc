package rabbitmq_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"
	"go.uber.org/goleak"

	"takeout/adapters/rabbitmq"
	"takeout/tests/testenv"
)

func TestBrokerMayComeUpLater(t *testing.T) {
	t.Parallel()
	rawURL := testenv.AMQP(t)
	p := reserveProxy(t, rawURL)
	b := open(t, withHost(t, rawURL, p.listener.Addr().String()), rabbitmq.Config{ReconnectMax: 100 * time.Millisecond})

	wantError(t, b.Check(), rabbitmq.ErrNotConnected)
	within(t, promptly, "Bind", func() { bind(t, b, "topic", "q") })
	within(t, promptly, "Publish", func() {
		wantError(t, b.Publish("topic", newMessage("m")), rabbitmq.ErrNotConnected)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	wantError(t, b.WaitReady(ctx), context.DeadlineExceeded)
	msgs, _ := subscribe(t, b, "q")

	p.start(t)
	waitReady(t, b)
	// The binding was made before: the first message is routable.
	publish(t, b, "topic", "m")
	receiveAcked(t, msgs, "m")
}

func TestBrokerThatNeverComesUpDoesNotKeepCloseWaiting(t *testing.T) {
	t.Parallel()
	rawURL := testenv.AMQP(t)
	p, through := newProxy(t, rawURL)
	p.swallow.Store(true) // accepts connections and never answers
	b := open(t, through, rabbitmq.Config{})
	msgs, _ := subscribe(t, b, "q")
	eventually(t, "a handshake under way", func() bool {
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.conns) > 0
	})

	within(t, promptly, "Close", func() { b.Close() })
	if _, ok := <-msgs; ok {
		t.Error("a message from nowhere")
	}
}

func TestTopologyIsDeclaredAgainOnReconnect(t *testing.T) {
	t.Parallel()
	rawURL := testenv.AMQP(t)
	p, through := newProxy(t, rawURL)
	b := openReady(t, through, rabbitmq.Config{ReconnectMax: 100 * time.Millisecond})
	bind(t, b, "topic", "q")
	ch := admin(t, rawURL)
	deleteQueue(t, ch, onBroker(t, rawURL, "q"))

	p.cut()
	eventually(t, "the loss noticed", func() bool { return b.Check() != nil })
	waitReady(t, b)

	publish(t, b, "topic", "m")
}

func TestQueuesAreDeclaredAsDocumented(t *testing.T) {
	t.Parallel()
	rawURL := testenv.AMQP(t)
	b := openReady(t, rawURL, rabbitmq.Config{DeliveryLimit: 7})
	bind(t, b, "topic", "q")
	ch := admin(t, rawURL)

	// RabbitMQ refuses a declaration with other arguments than those that are there.
	_, err := ch.QueueDeclare(onBroker(t, rawURL, "q"), true, false, false, false, amqp.Table{
		"x-queue-type":              "quorum",
		"x-delivery-limit":          7,
		"x-dead-letter-exchange":    "",
		"x-dead-letter-routing-key": onBroker(t, rawURL, "q.dead"),
		"x-dead-letter-strategy":    "at-least-once",
		"x-overflow":                "reject-publish",
	})
	if err != nil {
		t.Error(err)
	}
	ch = admin(t, rawURL)
	err = ch.ExchangeDeclare(onBroker(t, rawURL, ""), "topic", true, false, false, false, nil)
	if err != nil {
		t.Error(err)
	}
	ch = admin(t, rawURL)
	_, err = ch.QueueDeclare(onBroker(t, rawURL, "q.dead"), true, false, false, false, amqp.Table{
		"x-queue-type": "quorum", "x-delivery-limit": 1<<31 - 1,
	})
	if err != nil {
		t.Error(err)
	}
}

func TestPublishFailsAtOnceWhenTheConnectionIsCut(t *testing.T) {
	t.Parallel()
	p, through := newProxy(t, testenv.AMQP(t))
	b := openReady(t, through, rabbitmq.Config{ReconnectMax: 100 * time.Millisecond, ConfirmTimeout: time.Minute})
	bind(t, b, "topic", "q")

	p.swallow.Store(true)
	failed := make(chan error, 10)
	for i := range 10 {
		go func() { failed <- b.Publish("topic", newMessage(fmt.Sprintf("m%d", i))) }()
	}
	select {
	case err := <-failed:
		t.Fatalf("a confirm that nobody sent: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	within(t, promptly, "failing", func() {
		p.cut()
		for range 10 {
			wantError(t, <-failed, rabbitmq.ErrNotConfirmed)
		}
	})

	p.swallow.Store(false)
	eventually(t, "publishing again", func() bool { return b.Publish("topic", newMessage("m")) == nil })
}

func TestPublishFailsInTimeWhenConfirmsDoNotCome(t *testing.T) {
	t.Parallel()
	p, through := newProxy(t, testenv.AMQP(t))
	b := openReady(t, through, rabbitmq.Config{ReconnectMax: 100 * time.Millisecond, ConfirmTimeout: 300 * time.Millisecond})
	bind(t, b, "topic", "q")

	p.swallow.Store(true)
	within(t, promptly, "Publish", func() {
		wantError(t, b.Publish("topic", newMessage("m")), rabbitmq.ErrNotConfirmed)
	})

	// The half-open connection was given up without waiting for its heartbeat.
	wantError(t, b.Check(), rabbitmq.ErrNotConnected)
	p.swallow.Store(false)
	p.cut()
	eventually(t, "publishing again", func() bool { return b.Publish("topic", newMessage("m")) == nil })
}

func TestPublishFailsInTimeWhenTheBrokerStopsReading(t *testing.T) {
	t.Parallel()
	p, through := newProxy(t, testenv.AMQP(t))
	b := openReady(t, through, rabbitmq.Config{ReconnectMax: 100 * time.Millisecond, ConfirmTimeout: 500 * time.Millisecond})
	bind(t, b, "topic", "q")

	p.stall.Store(true)
	var publishers sync.WaitGroup
	within(t, inTime, "Publish", func() {
		for range 4 {
			publishers.Go(func() { // more than the socket's buffers hold
				err := b.Publish("topic", message.NewMessage(newID(), make([]byte, 20_000_000)))
				wantError(t, err, rabbitmq.ErrNotConfirmed)
			})
		}
		publishers.Wait()
	})
	p.stall.Store(false)
	eventually(t, "publishing again", func() bool { return b.Publish("topic", newMessage("m")) == nil })
}

func TestSilentBrokerIsNoticedByItsHeartbeat(t *testing.T) {
	t.Parallel()
	p, through := newProxy(t, testenv.AMQP(t))
	b := openReady(t, through, rabbitmq.Config{Heartbeat: time.Second})

	p.swallow.Store(true)

	within(t, inTime, "noticing", func() {
		eventually(t, "the loss noticed", func() bool { return b.Check() != nil })
	})
}

func TestQueueWithOtherArgumentsIsExplainedAndKeepsBackItsOwnTopicsAlone(t *testing.T) {
	t.Parallel()
	rawURL := testenv.AMQP(t)
	ch := admin(t, rawURL)
	foreign := onBroker(t, rawURL, "taken")
	if _, err := ch.QueueDeclare(foreign, true, false, false, false, nil); err != nil {
		t.Fatal(err)
	}
	b := openReady(t, rawURL, rabbitmq.Config{ReconnectMax: 200 * time.Millisecond})
	bind(t, b, "topic", "fine")
	bind(t, b, "other", "fine")
	publish(t, b, "topic", "m")

	bind(t, b, "topic", "taken")

	// At once, and as long as it lasts: it is tried again several times in half a second.
	for until := time.Now().Add(500 * time.Millisecond); time.Now().Before(until) && !t.Failed(); {
		err := b.Check()
		wantError(t, err, rabbitmq.ErrRefused)
		wantError(t, b.Publish("topic", newMessage("n")), rabbitmq.ErrRefused)
		for _, want := range []string{foreign, "exists with other arguments", "delete or correct it"} {
			if !strings.Contains(fmt.Sprint(err), want) {
				t.Errorf("Check does not say %q: %v", want, err)
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	// The other queue is read all the same, and the other topic published, also by who comes new.
	msgs, _ := subscribe(t, b, "fine")
	receiveAcked(t, msgs, "m")
	publish(t, b, "other", "o")
	receiveAcked(t, msgs, "o")
	late := open(t, rawURL, rabbitmq.Config{})
	bind(t, late, "topic", "taken")
	bind(t, late, "other", "fine")
	waitReady(t, late)
	wantError(t, late.Check(), rabbitmq.ErrRefused)
	wantError(t, late.Publish("topic", newMessage("n")), rabbitmq.ErrRefused)
	publish(t, late, "other", "p")
	receiveAcked(t, msgs, "p")

	deleteQueue(t, ch, foreign)
	eventually(t, "the queue is taken", func() bool { return b.Check() == nil })
	publish(t, b, "topic", "n")
	if n := ready(t, ch, foreign); n != 1 {
		t.Errorf("the queue has %d messages", n)
	}
}

func TestUserWhoMayNotDeclareUsesWhatIsThere(t *testing.T) {
	t.Parallel()
	server := testenv.StartRabbitMQ(t)
	for _, args := range [][]string{{"add_user", "narrow", "secret"}, {"set_permissions", "narrow", "^$", ".*", ".*"}} {
		if out, err := server.Ctl(args...); err != nil {
			t.Fatal(err, out)
		}
	}
	u, err := url.Parse(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword("narrow", "secret")
	b := open(t, u.String(), rabbitmq.Config{ReconnectMax: 100 * time.Millisecond})
	bind(t, b, "topic", "q")
	eventually(t, "what is missing is named", func() bool {
		return strings.Contains(fmt.Sprint(b.Check()), "exchange takeout: ACCESS_REFUSED") && strings.Contains(fmt.Sprint(b.Check()), "it is not there")
	})

	bind(t, openReady(t, server.URL(), rabbitmq.Config{}), "topic", "q")
	eventually(t, "what is there is used", func() bool { return b.Check() == nil })
	msgs, _ := subscribe(t, b, "q")
	publish(t, b, "topic", "m")
	receiveAcked(t, msgs, "m")
}

// narrowed returns the URL of a broker for a user of whom it allows less and less, and what does that.
func narrowed(t *testing.T) (rawURL string, ctl func(args ...string)) {
	t.Helper()
	server := testenv.StartRabbitMQ(t)
	ctl = func(args ...string) {
		t.Helper()
		if out, err := server.Ctl(args...); err != nil {
			t.Fatal(err, out)
		}
	}
	ctl("add_user", "narrow", "secret")
	ctl("set_permissions", "narrow", ".*", ".*", ".*")
	u, err := url.Parse(server.URL())
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword("narrow", "secret")
	return u.String(), ctl
}

func TestQueueThatMayNotBeReadIsNamedUntilItMayBe(t *testing.T) {
	t.Parallel()
	for _, forbidden := range []string{"q", "q.dead"} {
		t.Run(forbidden, func(t *testing.T) {
			t.Parallel()
			rawURL, ctl := narrowed(t)
			b := openReady(t, rawURL, rabbitmq.Config{ReconnectMax: 100 * time.Millisecond})
			bind(t, b, "topic", "q")
			bind(t, b, "topic", "other")
			if reading := b.Reading(); len(reading) != 0 {
				t.Errorf("nobody reads, and it says %v", reading)
			}
			msgs, reader := subscribe(t, b, "q")
			subscribe(t, b, "other")
			read := func() bool {
				reading := b.Reading()
				return len(reading) == 2 && reading["q"] == nil && reading["other"] == nil
			}
			eventually(t, "both are read", read)
			if err := b.MayRead(t.Context(), "q", "other", "not-there"); err != nil {
				t.Error(err)
			}

			ctl("set_permissions", "narrow", ".*", ".*", "^(?!"+forbidden+"$)")
			ctl("close_all_connections", "permissions changed")
			eventually(t, "one is not", func() bool {
				reading := b.Reading()
				return b.Check() == nil && reading["other"] == nil && strings.Contains(fmt.Sprint(reading["q"]), "access to queue '"+forbidden+"'")
			})
			if err := b.MayRead(t.Context(), "other", "q"); !strings.Contains(fmt.Sprint(err), "read queue "+forbidden+": Exception (403)") {
				t.Errorf("may it be read? %v", err)
			}

			ctl("set_permissions", "narrow", ".*", ".*", ".*")
			eventually(t, "both are read again", read)
			publish(t, b, "topic", "m")
			receiveAcked(t, msgs, "m")
			reader.Close()
			if _, told := b.Reading()["q"]; told {
				t.Error("nobody reads it any more, and it is told of")
			}
		})
	}
}

func TestNoQueueIsCalledReadWhileThePublishersConnectionIsTheOnlyOne(t *testing.T) {
	t.Parallel()
	rawURL, ctl := narrowed(t)
	b := openReady(t, rawURL, rabbitmq.Config{ReconnectMax: 100 * time.Millisecond})
	bind(t, b, "topic", "q")
	subscribe(t, b, "q")
	eventually(t, "it is read", func() bool { return b.Reading()["q"] == nil })

	ctl("set_user_limits", "narrow", `{"max-connections": 1}`)
	// Who comes first after all were closed would be chance.
	ctl("eval", `[rabbit_networking:close_connection(C, "limited") || C <- rabbit_networking:connections(),
		[{client_properties, About}] <- [rabbit_networking:connection_info(C, [client_properties])],
		lists:member({<<"connection_name">>, longstr, <<"takeout consume">>}, About)].`)
	eventually(t, "the publishers' connection is the only one", func() bool {
		return b.Check() == nil && errors.Is(b.Reading()["q"], rabbitmq.ErrNotConnected)
	})
	soon, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	wantError(t, b.MayRead(soon, "q"), rabbitmq.ErrNotConnected)

	ctl("clear_user_limits", "narrow", "all")
	eventually(t, "it is read again", func() bool { return b.Check() == nil && b.Reading()["q"] == nil })
}

func TestAskingWhetherAQueueMayBeReadTakesNothingOutOfIt(t *testing.T) {
	t.Parallel()
	rawURL := testenv.AMQP(t)
	b := openReady(t, rawURL, rabbitmq.Config{})
	bind(t, b, "topic", "q")
	publish(t, b, "topic", ids(20)...)
	for range 10 {
		if err := b.MayRead(t.Context(), "q"); err != nil {
			t.Fatal(err)
		}
	}
	if n := ready(t, admin(t, rawURL), onBroker(t, rawURL, "q")); n != 20 {
		t.Errorf("%d messages wait", n)
	}
	msgs, _ := subscribe(t, b, "q")
	for range 20 {
		msg := receive(t, msgs)
		msg.Ack()
		if msg.Metadata.Get("amqp-redelivered") != "" {
			t.Errorf("%s was in somebody's hands", msg.UUID)
		}
	}
}

func TestWrongPasswordIsToldAndNotShown(t *testing.T) {
	t.Parallel()
	u, err := url.Parse(testenv.AMQP(t))
	if err != nil {
		t.Fatal(err)
	}
	const secret = "s3cr3t-w0rd"
	u.User = url.UserPassword("nobody", secret)
	var log strings.Builder
	b, err := rabbitmq.Open(u.String(), rabbitmq.Config{}, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "access refused", func() bool { return strings.Contains(fmt.Sprint(b.Check()), "password not allowed") })
	checked, published := b.Check(), b.Publish("topic", newMessage("m"))
	b.Close()

	if all := fmt.Sprint(checked, published, log.String()); strings.Contains(all, secret) {
		t.Errorf("the password is in: %s", all)
	}
}

func TestBlockedBrokerIsToldInTime(t *testing.T) {
	t.Parallel()
	server := testenv.StartRabbitMQ(t)
	ctl := func(args ...string) {
		t.Helper()
		if out, err := server.Ctl(args...); err != nil {
			t.Fatalf("%v: %v %s", args, err, out)
		}
	}
	// With a window of one, what is given up while blocked would be in the way for ever if it kept its place.
	b := openReady(t, server.URL(), rabbitmq.Config{PublishWindow: 1})
	other := openReady(t, server.URL(), rabbitmq.Config{})
	bind(t, b, "topic", "q")
	publish(t, b, "topic", "m0")

	ctl("set_vm_memory_high_watermark", "0.0000001")
	// The first message is what finds out, so it is under way when the news comes.
	within(t, promptly, "Publish", func() {
		wantError(t, b.Publish("topic", newMessage("m1")), rabbitmq.ErrBlocked)
	})
	within(t, promptly, "Publish", func() {
		wantError(t, b.Publish("topic", newMessage("m2")), rabbitmq.ErrBlocked)
	})
	wantError(t, b.Check(), rabbitmq.ErrBlocked)
	if !strings.Contains(fmt.Sprint(b.Check()), "memory") {
		t.Errorf("Check does not say why: %v", b.Check())
	}
	// The connection that consumes is not blocked: it takes declarations, deliveries and acks.
	within(t, inTime, "Bind", func() { bind(t, b, "topic", "late") })
	msgs, _ := subscribe(t, b, "q")
	receiveAcked(t, msgs, "m0")
	// Closing while blocked is bounded.
	wantError(t, other.Publish("topic", newMessage("m3")), rabbitmq.ErrBlocked)
	within(t, inTime, "Close", func() { other.Close() })

	ctl("set_vm_memory_high_watermark", "0.4")
	waitReady(t, b)
	publish(t, b, "topic", "m2")
	receiveAcked(t, msgs, "m2")
}

func TestConfirmedMessagesSurviveRestartsOfTheBroker(t *testing.T) {
	t.Parallel()
	server := testenv.StartRabbitMQ(t)
	b := openReady(t, server.URL(), rabbitmq.Config{ReconnectMax: 500 * time.Millisecond})
	bind(t, b, "topic", "q")
	msgs, _ := subscribe(t, b, "q")

	came := make(map[string]bool)
	var mu sync.Mutex
	reading := make(chan struct{})
	go func() {
		defer close(reading)
		for msg := range msgs {
			mu.Lock()
			came[msg.UUID] = true
			mu.Unlock()
			msg.Ack()
		}
	}()

	var publishers sync.WaitGroup
	var confirmed sync.Map
	var count, failures atomic.Int64
	stop := make(chan struct{})
	for range 10 {
		publishers.Go(func() {
			for {
				id := newID()
				if err := b.Publish("topic", newMessage(id)); err == nil {
					confirmed.Store(id, true)
					count.Add(1)
				} else {
					failures.Add(1)
				}
				select {
				case <-stop:
					return
				case <-time.After(5 * time.Millisecond):
				}
			}
		})
	}
	traffic := func() {
		t.Helper()
		from := count.Load()
		eventually(t, "messages are confirmed", func() bool { return count.Load() > from+200 })
	}
	traffic()
	server.Stop()
	wantError(t, b.Publish("topic", newMessage(newID())), rabbitmq.ErrNotConnected)
	server.Start()
	traffic()
	server.Kill()
	server.Start()
	traffic()
	close(stop)
	publishers.Wait()

	eventually(t, "every confirmed message came", func() bool {
		mu.Lock()
		defer mu.Unlock()
		missing := 0
		confirmed.Range(func(id, _ any) bool {
			if !came[id.(string)] {
				missing++
			}
			return true
		})
		return missing == 0
	})
	if failures.Load() == 0 {
		t.Error("no publish failed: the restarts were not under traffic")
	}
	b.Close()
	<-reading
}

func TestClosedBrokerLeavesNothingBehind(t *testing.T) {
	// Not parallel: it looks at all goroutines.
	rawURL := testenv.AMQP(t)
	before := goleak.IgnoreCurrent()
	p, through := newProxy(t, rawURL)
	b, err := rabbitmq.Open(through, rabbitmq.Config{ReconnectMax: 50 * time.Millisecond}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	waitReady(t, b)
	bind(t, b, "topic", "q")
	msgs, _ := subscribe(t, b, "q")
	for i := range 5 {
		id := fmt.Sprintf("m%d", i)
		eventually(t, "publishing", func() bool { return b.Publish("topic", newMessage(id)) == nil })
		receiveAcked(t, msgs, id)
		p.cut()
	}
	eventually(t, "publishing", func() bool { return b.Publish("topic", newMessage("last")) == nil })
	within(t, promptly, "Close with an idle subscriber", func() { b.Close() })
	p.listener.Close()
	p.cut()

	goleak.VerifyNone(t, before)
}

func withHost(t *testing.T, rawURL, host string) string {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	u.Host = host
	return u.String()
}
