package domain_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/domain"
)

func TestMoneyIsPositiveAndHasACurrency(t *testing.T) {
	t.Parallel()
	for _, row := range []struct {
		amount   int64
		currency string
		ok       bool
	}{
		{1, "CNY", true},
		{domain.MaxAmount, "CNY", true},
		{0, "CNY", false},
		{-1, "CNY", false},
		{domain.MaxAmount + 1, "CNY", false},
		{1, "", false},
		{1, "cny", false},
		{1, "CN", false},
		{1, "CNYY", false},
		{1, "C1Y", false},
		{1, "元元元", false},
	} {
		m, err := domain.NewMoney(row.amount, row.currency)
		if !row.ok {
			require.Equal(t, domain.Invalid, domain.KindOf(err), "%d %q", row.amount, row.currency)
			require.True(t, m.IsZero())
			continue
		}
		require.NoError(t, err)
		require.Equal(t, fmt.Sprintf("%d %s", row.amount, row.currency), m.String())
	}
}

func TestNameIsWhatPeopleCanRead(t *testing.T) {
	t.Parallel()
	for name, ok := range map[string]bool{
		"Mapo tofu":                 true,
		"麻婆豆腐":                      true,
		"عشاء":                      true,
		strings.Repeat("🍜", 30):     true,
		"👨‍👩‍👧 menu":                true,
		" leading":                  true,
		"'; DROP TABLE platoon; --": true,
		"<script>alert(1)</script>": true,
		"":                          false,
		"   ":                       false,
		"\u3000":                    false,
		strings.Repeat("🍜", 31):     false,
		"a\x00b":                    false,
		"a\nb":                      false,
		"a\r\nb":                    false,
		"a\tb":                      false,
		"a\u0085b":                  false,
		"a\u2028b":                  false,
		"a\u202eb":                  false,
		"a\u2066b":                  false,
		"\ufeffa":                   false,
		"a\xffb":                    false,
		"a\ufffdb":                  false,
		"a\u200b":                   true,
		"e\u0301":                   true,
		"\u200b\u2060":              false,
		"\u0301":                    false,
		"\u3164":                    false,
		"\u2800":                    false,
	} {
		err := domain.CheckName("name", name, 30)
		if ok {
			require.NoError(t, err, "%q", name)
		} else {
			require.Equal(t, domain.Invalid, domain.KindOf(err), "%q", name)
		}
	}
}

func TestIDIsPlain(t *testing.T) {
	t.Parallel()
	for id, ok := range map[string]bool{
		"a": true, "ord_01938c1e-7a2b": true, strings.Repeat("Z", 64): true,
		"": false, strings.Repeat("Z", 65): false, "a b": false, "a/b": false, "a.b": false, "ä": false, "a\n": false,
	} {
		require.Equal(t, ok, domain.CheckID("id", id) == nil, "%q", id)
	}
}

func TestKindSurvivesWrapping(t *testing.T) {
	t.Parallel()
	cause := errors.New("cause")
	err := fmt.Errorf("placing: %w", &domain.Error{Kind: domain.Unavailable, Message: "away", Cause: cause})
	require.Equal(t, domain.Unavailable, domain.KindOf(err))
	require.ErrorIs(t, err, cause)
	require.Equal(t, "placing: away: cause", err.Error())
	require.Equal(t, domain.Unknown, domain.KindOf(cause))
	require.Equal(t, domain.Unknown, domain.KindOf(nil))
}
