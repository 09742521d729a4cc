package event_test

import (
	"strings"
	"testing"

	"takeout/domain"
	"takeout/domain/event"
)

func FuzzOnlyTheSignatureItselfIsAccepted(f *testing.F) {
	keys, err := event.ParseKeys("0123456789abcdef,fedcba9876543210")
	if err != nil {
		f.Fatal(err)
	}
	body := []byte(`{"id":"evt_1"}`)
	for _, header := range []string{"", "sha256=", keys.Sign(body), strings.ToUpper(keys.Sign(body)), " " + keys.Sign(body), keys.Sign(body) + "\x00", keys.Sign(nil), "sha256=\xff", "sha1=00"} {
		f.Add(header, body)
		f.Add(header, []byte{})
	}
	f.Fuzz(func(t *testing.T, header string, body []byte) {
		err := keys.Verify(header, body)
		genuine := header == keys.Sign(body) || header == keys[1:].Sign(body)
		if genuine != (err == nil) || err != nil && domain.KindOf(err) != domain.Invalid {
			t.Fatalf("%q: %v", header, err)
		}
		if err != nil && len(header) > 20 && strings.Contains(err.Error(), header) {
			t.Fatalf("the error repeats %q", header)
		}
	})
}

func FuzzKeysAreNotRepeated(f *testing.F) {
	for _, text := range []string{"", ",", "0123456789abcdef", "0123456789abcdef,", "short secret", "0123456789abcdef,短", "\x00", "\xff"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		keys, err := event.ParseKeys(text)
		for _, key := range keys {
			if len(key) < event.MinKey {
				t.Fatalf("a key of %d bytes", len(key))
			}
		}
		// The rest of the text is ours, and may happen to hold a short key.
		if shown := keys.String(); err != nil && len(text) > 5 && strings.Contains(err.Error(), text) || len(text) > 8 && strings.Contains(shown, text) {
			t.Fatalf("%q is repeated", text)
		}
	})
}
