package rabbitmq

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
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

// propertiesWith returns a frame of properties that have these bytes as headers.
func propertiesWith(headers []byte) []byte {
	frame := make([]byte, propertiesAt)
	frame[0] = propertiesFrame
	binary.BigEndian.PutUint16(frame[propertiesAt-2:], hasHeaders)
	frame = binary.BigEndian.AppendUint32(frame, uint32(len(headers)))
	frame = append(append(frame, headers...), 0xce)
	binary.BigEndian.PutUint32(frame[3:], uint32(len(frame)-frameAround))
	return frame
}

func FuzzWhatTheBrokerSendsGoesThroughWithHeadersThatCanBeRead(f *testing.F) {
	f.Add([]byte("\x01aV\x01bt\x01\x02ccS\x00\x00\x00\x01x"), uint8(0), uint16(0))
	f.Add([]byte("\x01aF\x00\x00\x00\x05\x01bt\x01"), uint8(33), uint16(0))
	f.Add([]byte("\x01aA\x00\x00\x00\x02VV\x01bS\x00\x00\x00\x01x"), uint8(1), uint16(9000))
	f.Add([]byte("\x01aF\xff\xff\xff\xff"), uint8(0), uint16(1))
	f.Add([]byte("\xffa"), uint8(2), uint16(8193))
	f.Fuzz(func(t *testing.T, headers []byte, deep uint8, more uint16) {
		headers = append(headers, bytes.Repeat([]byte("\x00V"), int(more)%10_000)...)
		for range deep % 40 {
			headers = slices.Concat([]byte("\x01kF"), binary.BigEndian.AppendUint32(nil, uint32(len(headers))), headers)
		}
		frame := propertiesWith(headers)
		method, body := []byte{1, 0, 1, 0, 0, 0, 2, 'o', 'k', 0xce}, []byte{3, 0, 1, 0, 0, 0, 5, 'h', 'e', 'l', 'l', 'o', 0xce}
		sent := slices.Concat(method, frame, body, frame[:len(frame)/2])
		limit := max(200, len(frame)-int(more)%2) // it fits, or is one byte too long
		for name, in := range map[string]io.Reader{"at once": bytes.NewReader(sent), "byte by byte": iotest.OneByteReader(bytes.NewReader(sent))} {
			r := &incoming{from: bufio.NewReaderSize(in, 64)}
			r.limit.Store(int64(limit))
			came, err := io.ReadAll(r)
			if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
				t.Fatal(name, err)
			}
			if !bytes.HasPrefix(came, method) {
				t.Fatalf("%s: %q", name, came)
			}
			got := came[len(method):]
			got, rest := got[:frameSize(got)], got[frameSize(got):]
			if !bytes.HasPrefix(rest, body) {
				t.Fatalf("%s: behind the properties comes %.50q", name, rest)
			}
			if len(got) > limit || !readableFrame(got, limit) {
				t.Fatalf("%s: %d bytes of %d at most, and not readable: %.200q", name, len(got), limit, got)
			}
			if readableFrame(frame, limit) && !bytes.Equal(got, frame) {
				t.Fatalf("%s: %.100q became %.100q", name, frame, got)
			}
		}
	})
}
