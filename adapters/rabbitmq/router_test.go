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

func TestRouterShutdownCutsNoHandlerAndHandlesNothingTwice(t *testing.T) {
	t.Parallel()
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
	broker := admin(t, url)
	// A quorum queue takes acks in after the connection that sent them has closed.
	eventually(t, "what is left is what was not handled", func() bool {
		return count()+ready(t, broker, onBroker(t, url, "q")) == len(all)
	})
	for id, times := range handled {
		if times > 1 {
			t.Errorf("%s was handled %d times", id, times)
		}
	}
}
