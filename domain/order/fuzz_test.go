package order_test

import (
	"regexp"
	"strings"
	"testing"

	"takeout/domain/order"
)

var idForm = regexp.MustCompile(`\A[A-Za-z0-9_-]{1,64}\z`)

func FuzzOrderIDIsKeptAsItIsOrRefused(f *testing.F) {
	for _, s := range []string{"", "o", "-", "_", "ord_01938c1e-7a2b-7c3d-8e4f-5a6b7c8d9e0f", strings.Repeat("o", 64), strings.Repeat("o", 65), "a b", "a\n", "a/b", "..", "订单", "\x00", "\xff", "Ｏ", "a'b"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := order.ParseID(s)
		if idForm.MatchString(s) != (err == nil) {
			t.Fatalf("%q: %v", s, err)
		}
		if err == nil && id.String() != s || err != nil && id != (order.ID{}) {
			t.Fatalf("%q became %q", s, id)
		}
	})
}
