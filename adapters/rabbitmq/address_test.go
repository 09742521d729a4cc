package rabbitmq

import (
	"log/slog"
	"strings"
	"testing"
)

func TestWrongURLIsRefusedWithoutShowingThePassword(t *testing.T) {
	t.Parallel()
	for rawURL, want := range map[string]string{
		"http://u:s3cr3t@h/":                      "amqp or amqps",
		"u:s3cr3t@h/":                             "amqp or amqps",
		"amqp://u:s3cr3t@h:port/":                 "percent-encoded",
		"amqp://u:s3cr3t@h:70000/":                "port must be",
		"amqp://u:s3/cr3t@h/":                     "percent-encoded",
		"amqp://u:3/s3cr3t@h/":                    "percent-encoded",
		"amqp://u:3?s3cr3t@h/":                    "percent-encoded",
		"amqp://u:3?s3cr3t=@h/":                   "percent-encoded",
		"amqp://u:3#s3cr3t@h/":                    "percent-encoded",
		"amqp://u:s3cr3t%zz@h/":                   "percent-encoded",
		"amqp://u:s3cr3t@h /":                     "percent-encoded",
		"amqp://u:s3cr3t@":                        "percent-encoded",
		"amqp://u:s3cr3t@h/?namespac=x":           "unknown parameter namespac",
		"amqp://u:s3cr3t@h/?namespace=":           "namespace must be",
		"amqp://u:s3cr3t@h/?namespace=a%2Fb":      "namespace must be",
		"amqp://u:s3cr3t@h/?namespace=amq.x":      "namespace must be",
		"amqp://u:s3cr3t@h/?heartbeat=often":      "heartbeat must be",
		"amqp://u:s3cr3t@h/?connection_timeout=x": "connection_timeout must be",
		"amqp://u:s3cr3t@h/?channel_max=-1":       "channel_max must be",
		"amqp://u:s3cr3t@h/?auth_mechanism=magic": "auth_mechanism must be",
		"amqps://u:s3cr3t@h/?certfile=x.pem":      "belong together",
		"amqps://u:s3cr3t@h/?certfile=x&keyfile=": "belong together",
	} {
		_, err := Open(rawURL, Config{}, nil)
		if err == nil {
			t.Errorf("%s is accepted", rawURL)
			continue
		}
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %q does not say %q", rawURL, err, want)
		}
		if strings.Contains(err.Error(), "s3") || strings.Contains(err.Error(), "cr3t") {
			t.Errorf("%s: the password is in %q", rawURL, err)
		}
	}
}

func TestURLGivesTheNamesOnTheBroker(t *testing.T) {
	t.Parallel()
	for rawURL, want := range map[string]struct{ exchange, queue, shown string }{
		"amqp://u:p@h":                                 {"takeout", "q", "amqp://h:5672/"},
		"amqp://h/%2Fv?namespace=takeout":              {"takeout", "q", "amqp://h:5672/v"},
		"amqps://u:p%40%2F@[::1]/v?namespace=n.1":      {"n.1", "n.1.q", "amqps://::1:5671/v"},
		"amqp://u:p@h:1/v%40w?heartbeat=9&namespace=x": {"x", "x.q", "amqp://h:1/v@w"},
	} {
		a, err := parseAddress(rawURL)
		if err != nil {
			t.Errorf("%s: %v", rawURL, err)
			continue
		}
		topology := newTopology(a.namespace, Config{}, slog.New(slog.DiscardHandler))
		if topology.exchange != want.exchange || topology.name("q") != want.queue || a.String() != want.shown {
			t.Errorf("%s: exchange %s, queue %s, shown as %s", rawURL, topology.exchange, topology.name("q"), a)
		}
		if strings.Contains(a.url, "namespace") {
			t.Errorf("%s: amqp091 gets our parameter: %s", rawURL, a.url)
		}
	}
}
