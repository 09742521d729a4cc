//go:build unix

package verify

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"takeout/verify/history"
)

func TestRefusalIsHeardAsOne(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(http.StatusUnprocessableEntity)
		_, _ = w.Write([]byte(`{"title":"Unprocessable Entity","status":422,"code":"amount_out_of_range"}`))
	}))
	defer server.Close()
	l := &load{orders: []*member{{addr: strings.TrimPrefix(server.URL, "http://")}}, http: server.Client(), history: history.New(1)}
	require.Empty(t, l.insist(t.Context(), 0, history.Order{Name: "Nothing", Amount: 0, Currency: "CNY", Key: "k"}))
	require.Equal(t, history.Refused, l.history.Of(0).Place)
	require.False(t, l.history.Of(0).Wrong)
}
