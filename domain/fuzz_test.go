package domain_test

import (
	"strings"
	"testing"
	"unicode/utf8"

	"takeout/domain"
)

func FuzzNameThatIsAcceptedStaysOnItsLine(f *testing.F) {
	for _, s := range []string{"", " ", "Mapo tofu", "麻婆豆腐", strings.Repeat("🍜", 30), "a\x00b", "a\r\nb", "\u202e", "\ufeff", "\u2028", "\xff", "\ufffd", "e\u0301", "\u3000", "\u0085", "\u061c", "\u200e", "\u200b", "\u3164"} {
		f.Add(s, 30)
	}
	f.Fuzz(func(t *testing.T, s string, limit int) {
		err := domain.CheckName("name", s, limit)
		if err != nil && domain.KindOf(err) != domain.Invalid {
			t.Fatalf("%v is not Invalid", err)
		}
		if err == nil && (!utf8.ValidString(s) || strings.ContainsAny(s, "\x00\r\n\u2028\u2029\u202e\u2066\u0085\x1b\ufeff") ||
			utf8.RuneCountInString(s) > limit || strings.TrimSpace(s) == "") {
			t.Fatalf("%q is accepted", s)
		}
		if err != nil && strings.ContainsAny(err.Error(), "\x00\r\n\x1b") {
			t.Fatalf("the error repeats %q", s)
		}
	})
}

func FuzzMoneyIsWhatItWasMadeOf(f *testing.F) {
	for _, amount := range []int64{0, 1, -1, domain.MaxAmount, domain.MaxAmount + 1, -1 << 63, 1<<63 - 1} {
		f.Add(amount, "CNY")
	}
	for _, currency := range []string{"", "cny", "CNYY", "C\x00Y", "ÄÖÜ", "\xff\xff\xff", "CN "} {
		f.Add(int64(1), currency)
	}
	f.Fuzz(func(t *testing.T, amount int64, currency string) {
		m, err := domain.NewMoney(amount, currency)
		right := amount >= 1 && amount <= domain.MaxAmount && len(currency) == 3 && strings.Trim(currency, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") == ""
		if right != (err == nil) || right != (m.Amount() == amount && m.Currency() == currency && !m.IsZero()) || !right && !m.IsZero() {
			t.Fatalf("%d %q: %v, %v", amount, currency, m, err)
		}
	})
}
