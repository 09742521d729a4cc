package event

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"

	"takeout/domain"
)

// SignatureHeader is the message header that carries an event's signature, beside the body and over all of its bytes.
const SignatureHeader = "takeout-signature"

// MinKey is the shortest key in bytes.
const MinKey = 16

// Keys are what events are signed with: the first one signs, and all of them are accepted, so that a new key can be given
// to every process before it signs. Without any, events are not signed, and are accepted as they come.
type Keys [][]byte

// ParseKeys reads keys that are separated by commas. Spaces around a key do not belong to it. The error says which one is
// wrong and repeats none.
func ParseKeys(text string) (Keys, error) {
	if text == "" {
		return nil, nil
	}
	var keys Keys
	for i, key := range strings.Split(text, ",") {
		key = strings.TrimSpace(key)
		if len(key) < MinKey {
			return nil, fmt.Errorf("key %d has %d bytes; each key needs %d or more, and a comma stands between two", i+1, len(key), MinKey)
		}
		keys = append(keys, []byte(key))
	}
	return keys, nil
}

// String hides the keys from logs.
func (k Keys) String() string { return fmt.Sprintf("%d keys", len(k)) }

// Sign returns the signature of a message's body, empty without a key: "sha256=" and the HMAC-SHA256 in hexadecimal.
func (k Keys) Sign(body []byte) string {
	if len(k) == 0 {
		return ""
	}
	return signature(k[0], body)
}

// Verify returns nil if the header is the body's signature by one of the keys, or if there are none. Otherwise the error
// is Invalid.
func (k Keys) Verify(header string, body []byte) error {
	if len(k) == 0 {
		return nil
	}
	for _, key := range k {
		if hmac.Equal([]byte(header), []byte(signature(key, body))) {
			return nil
		}
	}
	if header == "" {
		return domain.Errorf(domain.Invalid, "event_forged", "the message is not signed, and only signed ones are acted on; "+
			"if it was sent before --event-key was set, edit it, which signs it")
	}
	return domain.Errorf(domain.Invalid, "event_forged", "the message's signature is by none of the keys of --event-key")
}

func signature(key, body []byte) string {
	mac := hmac.New(sha256.New, key)
	mac.Write(body)
	return "sha256=" + hex.EncodeToString(mac.Sum(nil))
}
