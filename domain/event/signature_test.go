package event_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/domain"
	"takeout/domain/event"
)

func keys(t *testing.T, text string) event.Keys {
	t.Helper()
	k, err := event.ParseKeys(text)
	require.NoError(t, err)
	return k
}

// The signature is the one that other programs make: printf body | openssl dgst -sha256 -hmac 0123456789abcdef
func TestSignatureIsHMACOfTheBody(t *testing.T) {
	t.Parallel()
	require.Equal(t, "sha256=c34c3195f4d0282ae2dee7ddba19f07877594896ece7578eed7044843650c708", keys(t, "0123456789abcdef").Sign([]byte("body")))
}

func TestOnlyWhatOneOfTheKeysSignedIsAccepted(t *testing.T) {
	t.Parallel()
	body := []byte(`{"id":"evt_1"}`)
	older, newer := "the older key of 2025", "the newer key of 2026"
	both := keys(t, newer+", "+older)
	require.Equal(t, keys(t, newer).Sign(body), both.Sign(body), "the first one signs")
	for name, row := range map[string]struct {
		keys   event.Keys
		header string
		body   []byte
		ok     bool
	}{
		"by the key":             {keys(t, newer), keys(t, newer).Sign(body), body, true},
		"by an older key":        {both, keys(t, older).Sign(body), body, true},
		"nobody asks":            {nil, "", body, true},
		"nobody asks, and there": {nil, "nonsense", body, true},
		"unsigned":               {both, "", body, false},
		"by another key":         {keys(t, newer), keys(t, older).Sign(body), body, false},
		"of another body":        {both, both.Sign(body), append([]byte(" "), body...), false},
		"in capitals":            {both, strings.ToUpper(both.Sign(body)), body, false},
		"cut":                    {both, both.Sign(body)[:20], body, false},
		"nonsense":               {both, "\xff", body, false},
	} {
		err := row.keys.Verify(row.header, row.body)
		require.Equal(t, row.ok, err == nil, name)
		if err != nil {
			require.Equal(t, domain.Invalid, domain.KindOf(err), name)
			require.NotContains(t, err.Error(), "key of 20")
		}
	}
	require.Empty(t, event.Keys(nil).Sign(body))
	require.NotContains(t, both.String(), "key of 20")
}

func TestKeysThatAreTooShortAreRefusedAndNotRepeated(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"short", "short,0123456789abcdef", "0123456789abcdef,", ",", " ", "0123456789abcdef,   15 bytes only  "} {
		_, err := event.ParseKeys(text)
		require.Error(t, err, "%q", text)
		require.NotContains(t, err.Error(), "short")
		require.NotContains(t, err.Error(), "0123456789abcdef")
	}
	require.Empty(t, keys(t, ""))
	require.Len(t, keys(t, "0123456789abcdef, fedcba9876543210"), 2)
}
