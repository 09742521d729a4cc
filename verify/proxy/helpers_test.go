package proxy_test

import (
	"net/url"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/tests/testenv"
	"takeout/verify/proxy"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// patience is how long a test waits for what must happen. Only a test that fails waits that long.
const patience = 20 * time.Second

func eventually(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", patience, what)
		}
	}
}

func await[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("not within %s: %s", patience, what)
		panic("unreachable")
	}
}

// between returns a proxy in front of the URL's server, and the URL through it.
func between(t testing.TB, rawURL string, protocol proxy.Protocol) (*proxy.Proxy, string) {
	t.Helper()
	u, err := url.Parse(rawURL)
	require.NoError(t, err)
	p := listen(t, u.Host, protocol)
	u.Host = p.Addr()
	return p, u.String()
}

func listen(t testing.TB, target string, protocol proxy.Protocol) *proxy.Proxy {
	t.Helper()
	p, err := proxy.Listen(target, protocol)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	return p
}
