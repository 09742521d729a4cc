package service_test

import (
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"

	"takeout/service"
)

func FuzzURLThatIsRefusedNeverShowsItsPassword(f *testing.F) {
	for _, before := range []string{"mysql://user:", "mysql://user:1?", "mysql://user:1#", "mysql://user:1/", "sql:mysql://user:", "amqp://user:", "amqp:", "user:", "sqlite:", "sqlite:x?", "postgres://u:", "mysql://"} {
		for _, after := range []string{"@h/db", "@h:1/db?tls=true", "@h/db?x=1", "%zz@h/db", "@", "", "@h:70000/", "\n@h/db", "&x@h/db", " @h/db", "=1@h/db"} {
			f.Add(before, after)
		}
	}
	f.Chdir(f.TempDir())
	f.Fuzz(func(t *testing.T, before, after string) {
		const secret = "Qx7zQhunter2Qx7z"
		url := before + secret + after
		for _, flag := range []string{"database-url", "order-database-url", "broker-url"} {
			var cfg service.Config
			parser, err := kong.New(&cfg)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := parser.Parse(nil); err != nil {
				t.Fatal(err)
			}
			switch flag {
			case "database-url":
				cfg.DatabaseURL = url
			case "order-database-url":
				cfg.OrderDatabaseURL = url
			default:
				cfg.BrokerURL = url
			}
			if err := cfg.Validate(); err != nil && strings.Contains(strings.ToLower(err.Error()), strings.ToLower(secret)) {
				t.Fatalf("--%s=%q: %v", flag, url, err)
			}
		}
	})
}

func FuzzRetryDelaysAreInRange(f *testing.F) {
	for _, text := range []string{"", "5s,30s,5m,30m", "1ns", "24h", "24h1ns", "-1s", "1s,", ",", "1", "1e3s", "1h1m1s1ms1us1ns", "9223372036854775807ns", "\x00", "µs", "1µs", "+1s", "1s 2s", "1\\,2s"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var cfg service.Config
		parser, err := kong.New(&cfg)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parser.Parse([]string{"--retry-delays=" + text}); err != nil {
			return
		}
		if cfg.Validate() != nil {
			return
		}
		if len(cfg.RetryDelays) > 20 {
			t.Fatalf("%d delays", len(cfg.RetryDelays))
		}
		for _, delay := range cfg.RetryDelays {
			if delay <= 0 || delay > 24*time.Hour {
				t.Fatalf("%s", delay)
			}
		}
	})
}
