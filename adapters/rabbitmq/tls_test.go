package rabbitmq_test

import (
	"encoding/pem"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/adapters/rabbitmq"
	"takeout/tests/testenv"
)

// throughTLS returns the broker's URL with TLS and the file of the certificate to trust.
func throughTLS(t *testing.T, rawURL string) (secured *url.URL, certificate string) {
	t.Helper()
	known := httptest.NewTLSServer(nil) // for its certificate
	defer known.Close()
	certificate = filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: known.Certificate().Raw})
	if err := os.WriteFile(certificate, block, 0o600); err != nil {
		t.Fatal(err)
	}
	p := reserveProxy(t, rawURL)
	p.secure = known.TLS.Clone()
	p.secure.NextProtos = nil
	p.start(t)
	secured, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	secured.Scheme, secured.Host = "amqps", p.listener.Addr().String()
	return secured, certificate
}

func with(u *url.URL, parameter, value string) string {
	changed := *u
	query := changed.Query()
	query.Set(parameter, value)
	changed.RawQuery = query.Encode()
	return changed.String()
}

func TestMessagesOfAnySizeGoThroughTLS(t *testing.T) {
	t.Parallel()
	plain := testenv.AMQP(t)
	secured, certificate := throughTLS(t, plain)
	b := openReady(t, with(secured, "cacertfile", certificate), rabbitmq.Config{})
	bind(t, b, "topic", "q")
	msgs, _ := subscribe(t, b, "q")
	for _, size := range []int{0, 1, 1000, 20_000, 300_000} {
		sent := newMessage(newID())
		sent.Payload = []byte(strings.Repeat("x", size))
		if err := b.Publish("topic", sent); err != nil {
			t.Fatal(err)
		}
		got := receive(t, msgs)
		got.Ack()
		if got.UUID != sent.UUID || len(got.Payload) != size {
			t.Fatalf("%d bytes of %q instead of %d of %q", len(got.Payload), got.UUID, size, sent.UUID)
		}
	}
	err := admin(t, plain).PublishWithContext(t.Context(), onBroker(t, plain, ""), "topic", true, false,
		amqp.Publishing{Headers: amqp.Table{"list": make([]any, 9000)}, MessageId: "unreadable"})
	if err != nil {
		t.Fatal(err)
	}
	receiveAcked(t, msgs, "unreadable")
	publish(t, b, "topic", ids(500)...)
	receiveAcked(t, msgs, ids(500)...)
}

func TestWhatIsWrongWithTLSIsSaid(t *testing.T) {
	t.Parallel()
	plain := testenv.AMQP(t)
	secured, _ := throughTLS(t, plain)
	empty := filepath.Join(t.TempDir(), "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	unsecured, _ := url.Parse(plain)
	unsecured.Scheme = "amqps"
	for rawURL, want := range map[string]string{
		secured.String():                              "certificate",
		with(secured, "cacertfile", empty):            "has no certificate",
		with(secured, "cacertfile", empty+".missing"): "no such file",
		unsecured.String():                            "TLS",
	} {
		b := open(t, rawURL, rabbitmq.Config{})
		eventually(t, want, func() bool { return b.Check() != nil && strings.Contains(b.Check().Error(), want) })
	}
}
