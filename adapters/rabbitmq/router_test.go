package rabbitmq_test

import (
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"

	"takeout/adapters/rabbitmq"
	"takeout/tests/testenv"
)

// RabbitMQ takes the acks for a quorum queue in after it has answered the client, and presumably a busy one can lose the last
// of them with the channel: the count was not right once, on a busy machine. It is not so each time.
func TestRouterShutdownCutsNoHandlerAndHandlesNothingTwice(t *testing.T) {
	t.Parallel()
	const tries = 3
	for range tries {
		if shutDownRouter(t) == 0 {
			return
		}
	}
	t.Errorf("acks were lost in each of %d shutdowns", tries)
}

// shutDownRouter closes a router in the middle of its work and returns how many of the messages are left that it has handled.
func shutDownRouter(t *testing.T) int {
	t.Helper()
	url := testenv.AMQP(t)
	b := openReady(t, url, rabbitmq.Config{Prefetch: 50})
	bind(t, b, "topic", "q")
	all := ids(300)
	publish(t, b, "topic", all...)

	router, err := message.NewRouter(message.RouterConfig{CloseTimeout: patience}, watermill.NopLogger{})
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	handled := make(map[string]int)
	count := func() int { mu.Lock(); defer mu.Unlock(); return len(handled) }
	router.AddConsumerHandler("q", "q", b.Subscriber(), func(msg *message.Message) error {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-msg.Context().Done():
			t.Errorf("the handler of %s was cut short", msg.UUID)
		}
		mu.Lock()
		defer mu.Unlock()
		handled[msg.UUID]++
		return nil
	})
	go func() {
		if err := router.Run(t.Context()); err != nil {
			t.Error(err)
		}
	}()
	eventually(t, "a third is handled", func() bool { return count() >= 100 })
	if err := router.Close(); err != nil {
		t.Fatal(err)
	}
	b.Close()

	if count() == len(all) {
		t.Error("nothing was left to be cut")
	}
	for id, times := range handled {
		if times > 1 {
			t.Errorf("%s was handled %d times", id, times)
		}
	}
	broker, missing, left := admin(t, url), len(all)-count(), 0
	for deadline := time.Now().Add(patience); left != missing && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		left = ready(t, broker, onBroker(t, url, "q"))
	}
	t.Logf("%d were not handled, and %d are left", missing, left)
	if left < missing {
		t.Errorf("%d messages are lost", missing-left)
	}
	return left - missing
}
