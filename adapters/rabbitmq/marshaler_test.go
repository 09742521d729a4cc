package rabbitmq

import (
	"math"
	"testing"

	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/app"
)

func TestRecordsOfAnEarlierDeliveryAreNotPublishedAgain(t *testing.T) {
	t.Parallel()
	msg := message.NewMessage("m", nil)
	for _, key := range []string{"x-death", "x-first-death-reason", "x-last-death-queue", "x-delivery-count",
		"x-acquired-count", "amqp-redelivered", "amqp-type", app.MetadataUndeliverable} {
		msg.Metadata[key] = "v"
	}
	msg.Metadata["traceparent"] = "kept"

	publishing, err := Marshaler{}.Marshal(msg)

	if err != nil || len(publishing.Headers) != 1 || publishing.Headers["traceparent"] != "kept" {
		t.Errorf("headers %v, %v", publishing.Headers, err)
	}
}

func TestEveryHeaderHasAText(t *testing.T) {
	t.Parallel()
	for want, value := range map[string]any{
		"-8": int8(-8), "200": byte(200), "-16": int16(-16), "65535": uint16(65535), "-32": int32(-32),
		"4294967295": uint32(math.MaxUint32), "-64": int64(-64), "0.5": float32(0.5), "1.25": 1.25, "false": false,
		"12e-2":              amqp.Decimal{Scale: 2, Value: 12},
		"a\uFFFDb":           "a\xffb",
		`["x",["a","eQ=="]]`: []any{"x", []any{[]byte("a"), "eQ=="}},
		"map[nan:NaN]":       amqp.Table{"nan": math.NaN()},
	} {
		if got := text(value); got != want {
			t.Errorf("%#v has text %q, want %q", value, got, want)
		}
	}
}

func TestUndeliverableAlwaysHasAReason(t *testing.T) {
	t.Parallel()
	for name, headers := range map[string]amqp.Table{
		"none":  nil,
		"text":  {"x-death": "text"},
		"empty": {"x-death": []any{}},
		"odd":   {"x-death": []any{"text"}},
		"limit": {"x-death": []any{amqp.Table{"reason": "delivery_limit"}}},
	} {
		if undeliverable(amqp.Delivery{Headers: headers}, 3) == "" {
			t.Errorf("%s: no reason", name)
		}
	}
}
