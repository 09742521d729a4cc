package rabbitmq

import (
	"strings"
	"testing"
	"unicode/utf8"

	amqp "github.com/rabbitmq/amqp091-go"
)

func FuzzAnyHeaderBecomesTextThatCanBeKept(f *testing.F) {
	f.Add("k", "v", []byte("b"), int64(1), 1.5, "id", "text/xml", uint8(0))
	f.Add("\xff", "\xff\x00", []byte{0xff}, int64(-1<<63), -1.0, "\xff", "", uint8(255))
	f.Add("takeout-undeliverable", "yes", []byte{}, int64(0), 0.0, "", "\x1b", uint8(3))
	f.Add("x-death", "x", []byte("x"), int64(9), 1e300, strings.Repeat("x", 255), "a", uint8(9))
	f.Fuzz(func(t *testing.T, key, text string, bytes []byte, number int64, float float64, id, property string, scale uint8) {
		inner := amqp.Table{key: text, "bytes": bytes, "number": number, "float": float, "decimal": amqp.Decimal{Scale: scale, Value: int32(number)}, "nil": nil}
		d := amqp.Delivery{
			MessageId: id, ContentType: property, Type: property, ReplyTo: property, UserId: text, Body: bytes,
			Headers: amqp.Table{key: text, key + "b": bytes, key + "n": number, key + "f": float, key + "t": inner, key + "l": []any{inner, []any{text, nil}, number}, "x-death": []any{inner}},
		}
		msg, err := Marshaler{}.Unmarshal(d)
		if err != nil || string(msg.Payload) != string(bytes) || msg.UUID != id {
			t.Fatalf("%v %v", msg, err)
		}
		for name, value := range msg.Metadata {
			if !utf8.ValidString(name) || !utf8.ValidString(value) {
				t.Fatalf("%q: %q is not UTF-8", name, value)
			}
			if name == "takeout-undeliverable" {
				t.Fatal("a message says of itself that it is undeliverable")
			}
		}
		if undeliverable(d, 3) == "" {
			t.Fatal("no reason")
		}
		if again, err := (Marshaler{}).Marshal(msg); err == nil {
			for name := range again.Headers {
				if brokerOwned(name) || len(name) > maxName || name == "CC" || name == "BCC" {
					t.Fatalf("%q is published", name)
				}
			}
			_ = headerSize(again)
		}
	})
}

func FuzzBrokerURLNeverShowsItsPassword(f *testing.F) {
	for _, rest := range []string{"@h/", "@h:1/v?heartbeat=9", "%zz@h/", "/@h/", "#@h/", "?@h/", "?x=1@h", "@h/?x=1", "@", "@h:70000/", "@[::1]/", "@h /", "\x00@h", "@h/?namespace=", "@h?namespace=a&namespace=b", "@h/%2f", "@h/?auth_mechanism=x", "&@h/?"} {
		f.Add("amqp://user:", rest)
		f.Add("amqps://", rest)
	}
	f.Add("amqp:user:", "@h")
	f.Fuzz(func(t *testing.T, before, after string) {
		const password = "Qx7zQhunter2Qx7z"
		rawURL := before + password + after
		a, err := parseAddress(rawURL)
		if err != nil && strings.Contains(strings.ToLower(err.Error()), strings.ToLower(password)) {
			t.Fatalf("%q: %v", rawURL, err)
		}
		if err == nil && a.uri.Password != "" && strings.Contains(a.uri.Password, password) && strings.Contains(a.String(), password) &&
			!strings.Contains(before+after, password) && !strings.Contains(a.uri.Host+a.uri.Vhost, password) {
			t.Fatalf("%q is shown as %s", rawURL, a)
		}
	})
}
