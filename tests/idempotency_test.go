package tests

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// placeUnder places an order under an idempotency key.
func (s *system) placeUnder(t testing.TB, key, body string) answer {
	t.Helper()
	return mustSend(t, http.MethodPost, s.api+"/v1/orders", body, "Idempotency-Key", key)
}

// replays checks that the answer is what the first one was, and says that it is sent again.
func (a answer) replays(t testing.TB, first answer) {
	t.Helper()
	require.Equal(t, first.status, a.status, "%s", a)
	require.Equal(t, string(first.body), string(a.body))
	require.Equal(t, first.header.Get("Location"), a.header.Get("Location"))
	require.Equal(t, first.header.Get("Content-Type"), a.header.Get("Content-Type"))
	require.Equal(t, "true", a.header.Get("Idempotent-Replayed"))
}

// holdsOnce checks that the order is in both tables once, and was announced once.
func (s *system) holdsOnce(t testing.TB, id string) {
	t.Helper()
	s.awaitDispatched(t, id)
	require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM order_info WHERE orderId = ?", id))
	require.Equal(t, 1, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon WHERE orderId = ?", id))
}

// holdsNothingElse checks that no more than n orders were stored, announced and dispatched.
func (s *system) holdsNothingElse(t testing.TB, n int) {
	t.Helper()
	require.Equal(t, n, s.orderRows(t, "SELECT COUNT(*) FROM order_info"))
	eventually(t, "nothing waits to be announced", func() error {
		if n := s.orderRows(t, "SELECT COUNT(*) FROM outbox"); n > 0 {
			return fmt.Errorf("%d events wait", n)
		}
		return nil
	})
	require.Equal(t, n, s.dispatchRows(t, "SELECT COUNT(*) FROM inbox"), "announcements that were handled")
	require.Equal(t, n, s.dispatchRows(t, "SELECT COUNT(*) FROM platoon"))
	s.noFailures(t)
}

func TestTheSameKeyGivesTheSameAnswer(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		first := s.placeUnder(t, "key-1", `{"name":"Mapo tofu","amount":2850}`)
		require.Equal(t, http.StatusCreated, first.status, "%s", first)
		require.Empty(t, first.header.Get("Idempotent-Replayed"))
		s.placeUnder(t, "key-1", `{"name":"Mapo tofu","amount":2850}`).replays(t, first)

		id := first.order(t).OrderID
		s.holdsOnce(t, id) // from now on the order is another than it was, and the answer is not
		again := s.placeUnder(t, "key-1", `{"name":"Mapo tofu","amount":2850}`)
		again.replays(t, first)
		require.Equal(t, "placed", again.order(t).Status)
		s.holdsNothingElse(t, 1)
	})
}

func TestFiftyRequestsAtOnceUnderOneKeyPlaceOneOrder(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		for _, body := range []string{`{"name":"Mapo tofu","amount":2850}`, `{"order_id":"chosen","name":"Mapo tofu","amount":2850}`} {
			key := fmt.Sprintf("key-%d", len(body))
			answers, errs := make([]answer, 50), make([]error, 50)
			var clients sync.WaitGroup
			begin := make(chan struct{})
			for i := range answers {
				clients.Go(func() {
					<-begin
					answers[i], errs[i] = send(http.MethodPost, s.api+"/v1/orders", body, "Idempotency-Key", key)
				})
			}
			close(begin)
			clients.Wait()
			bodies := map[string]int{}
			fresh := 0
			for i, a := range answers {
				require.NoError(t, errs[i])
				if a.status == http.StatusConflict {
					require.NotEmpty(t, a.header.Get("Retry-After"), "%s", a)
					continue
				}
				require.Equal(t, http.StatusCreated, a.status, "%s", a)
				bodies[string(a.body)]++
				if a.header.Get("Idempotent-Replayed") == "" {
					fresh++
				}
			}
			require.Len(t, bodies, 1, "one answer for all")
			require.Equal(t, 1, fresh, "one of them placed the order")
			first := s.placeUnder(t, key, body)
			require.Contains(t, bodies, string(first.body))
			s.holdsOnce(t, first.order(t).OrderID)
		}
		s.holdsNothingElse(t, 2)
	})
}

func TestFiftyRequestsAtOnceWithOneOrderIDPlaceOneOrder(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		var clients sync.WaitGroup
		statuses := make(chan int, 50)
		for range 50 {
			clients.Go(func() {
				a, err := send(http.MethodPost, s.api+"/v1/orders", `{"order_id":"chosen","name":"x","amount":1}`)
				if err != nil {
					t.Error(err)
				}
				statuses <- a.status
			})
		}
		clients.Wait()
		close(statuses)
		seen := map[int]int{}
		for status := range statuses {
			seen[status]++
		}
		require.Equal(t, 1, seen[http.StatusCreated], "%v", seen)
		require.Equal(t, 50, seen[http.StatusCreated]+seen[http.StatusOK]+seen[http.StatusConflict], "%v", seen)
		s.holdsOnce(t, "chosen")
		s.holdsNothingElse(t, 1)
	})
}

func TestKeyOfAnotherRequestIsRefused(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		first := s.placeUnder(t, "key", `{"name":"x","amount":1}`)
		require.Equal(t, http.StatusCreated, first.status, "%s", first)
		for name, body := range map[string]string{
			"another name":     `{"name":"y","amount":1}`,
			"another amount":   `{"name":"x","amount":2}`,
			"another currency": `{"name":"x","amount":1,"currency":"EUR"}`,
			"an order_id":      `{"order_id":"o","name":"x","amount":1}`,
			"another case":     `{"name":"X","amount":1}`,
		} {
			a := s.placeUnder(t, "key", body)
			require.Equal(t, http.StatusUnprocessableEntity, a.status, "%s: %s", name, a)
			require.Equal(t, "idempotency_key_reused", a.problem(t).Code, name)
			require.NotContains(t, string(a.body), first.order(t).OrderID, "the other order is not told")
		}
		s.placeUnder(t, "key", `{"name":"x","amount":1}`).replays(t, first)
		s.holdsOnce(t, first.order(t).OrderID)
		s.holdsNothingElse(t, 1)
	})
}

func TestHowTheJSONIsWrittenDoesNotMatterForTheKey(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		first := s.placeUnder(t, "key", `{"name":"麻婆","amount":1,"currency":"CNY"}`)
		require.Equal(t, http.StatusCreated, first.status, "%s", first)
		for _, body := range []string{
			"\n { \"name\" : \"麻婆\",\r\n\t\"amount\" : 1 , \"currency\":\"CNY\" }\n",
			`{"currency":"CNY","amount":1,"name":"麻婆"}`,
			`{"n\u0061me":"\u9ebb\u5a46","amount":1,"currency":"CNY"}`,
		} {
			s.placeUnder(t, "key", body).replays(t, first)
		}
		s.holdsOnce(t, first.order(t).OrderID)
		s.holdsNothingElse(t, 1)
	})
}

func TestQuotedAndBareKeyAreTheSame(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		first := s.placeUnder(t, `"8e03978e-40d5-43dd-bc93-6894a57f9324"`, goodOrder)
		require.Equal(t, http.StatusCreated, first.status, "%s", first)
		s.placeUnder(t, `8e03978e-40d5-43dd-bc93-6894a57f9324`, goodOrder).replays(t, first)
		s.holdsOnce(t, first.order(t).OrderID)
		s.holdsNothingElse(t, 1)
	})
}

// Databases like to compare text as people do. A key is compared byte by byte.
func TestKeysThatLookAlikeAreDifferent(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		keys := []string{"key", "KEY", "Key", "key-", "key_", "0", "00", "0e0", "1e1", "10", "'key'", `\key`, "%", "_", "*",
			strings.Repeat("k", 254), strings.Repeat("k", 255), strings.Repeat("K", 255)}
		orders := map[string]string{}
		for _, key := range keys {
			a := s.placeUnder(t, key, goodOrder)
			require.Equal(t, http.StatusCreated, a.status, "%s: %s", key, a)
			require.Empty(t, a.header.Get("Idempotent-Replayed"), key)
			orders[a.order(t).OrderID] = key
		}
		require.Len(t, orders, len(keys))
		for id, key := range orders {
			require.Equal(t, id, s.placeUnder(t, key, goodOrder).order(t).OrderID, key)
		}
		s.awaitAllDispatched(t, len(keys))
		s.holdsNothingElse(t, len(keys))
	})
}

func TestKeyThatIsNoneIsRefused(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	for name, key := range map[string]string{
		"empty": "", "empty in quotes": `""`, "256 characters": strings.Repeat("k", 256), "256 characters in quotes": `"` + strings.Repeat("k", 256) + `"`,
		"a blank": "a b", "a tab": "a\tb", "two in one header": "a, b", "not ASCII": "schlüssel", "an emoji": "🔑", "not UTF-8": "\xff\xfe",
		"10,000 characters": strings.Repeat("k", 10_000),
	} {
		t.Run(name, func(t *testing.T) {
			a := s.placeUnder(t, key, goodOrder)
			require.Equal(t, http.StatusBadRequest, a.status, "%s", a)
			require.Equal(t, "idempotency_key_invalid", a.problem(t).Code)
			require.LessOrEqual(t, len(a.body), 1024)
		})
	}
	t.Run("two headers", func(t *testing.T) {
		for _, second := range []string{"b", "a"} {
			request, err := http.NewRequest(http.MethodPost, s.api+"/v1/orders", strings.NewReader(goodOrder))
			require.NoError(t, err)
			request.Header = http.Header{"Content-Type": {"application/json"}, "Idempotency-Key": {"a", second}}
			a, err := do(request)
			require.NoError(t, err)
			require.Equal(t, http.StatusBadRequest, a.status, "%s", a)
			require.Equal(t, "idempotency_key_invalid", a.problem(t).Code)
		}
	})
	for name, key := range map[string]string{"NUL": "a\x00b", "escape": "a\x1bb", "delete": "a\x7fb"} {
		t.Run(name, func(t *testing.T) { // which net/http refuses by itself, on both sides
			a := s.say(t, fmt.Sprintf("POST /v1/orders HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nIdempotency-Key: %s\r\nContent-Length: %d\r\n\r\n%s",
				key, len(goodOrder), goodOrder))
			require.Equal(t, http.StatusBadRequest, a.status, "%s", a)
		})
	}
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM order_info"))
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM idempotency_answer"))
}

func TestKeyOfARefusedRequestCanBeUsed(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		require.Equal(t, http.StatusUnprocessableEntity, s.placeUnder(t, "key", `{"name":"","amount":1}`).status)
		require.Equal(t, http.StatusBadRequest, s.placeUnder(t, "key", `{"name":"x","amount":"1"}`).status)
		first := s.placeUnder(t, "taken", `{"order_id":"o","name":"x","amount":1}`)
		require.Equal(t, http.StatusCreated, first.status)
		a := s.placeUnder(t, "key", `{"order_id":"o","name":"other","amount":1}`)
		require.Equal(t, http.StatusConflict, a.status)
		require.Equal(t, "order_id_taken", a.problem(t).Code)
		require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM idempotency_answer"))

		a = s.placeUnder(t, "key", goodOrder)
		require.Equal(t, http.StatusCreated, a.status, "%s", a)
		s.holdsOnce(t, a.order(t).OrderID)
		s.holdsOnce(t, "o")
		s.holdsNothingElse(t, 2)
	})
}

func TestTheSameOrderIDIsPlacedOnceWithoutAKey(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		const order = `{"order_id":"o-1","name":"Mapo tofu","amount":2850,"currency":"CNY"}`
		first := mustSend(t, http.MethodPost, s.api+"/v1/orders", order)
		require.Equal(t, http.StatusCreated, first.status, "%s", first)
		require.Empty(t, first.header.Get("Idempotent-Replayed"))
		s.holdsOnce(t, "o-1")

		again := mustSend(t, http.MethodPost, s.api+"/v1/orders", `{"order_id":"o-1","name":"Mapo tofu","amount":2850}`)
		require.Equal(t, http.StatusOK, again.status, "%s", again)
		require.Equal(t, "/v1/orders/o-1", again.header.Get("Location"))
		require.Equal(t, "dispatched", again.order(t).Status, "the order as it is now")

		for name, other := range map[string]string{
			"name":     `{"order_id":"o-1","name":"Mapo  tofu","amount":2850}`,
			"case":     `{"order_id":"o-1","name":"mapo tofu","amount":2850}`,
			"a blank":  `{"order_id":"o-1","name":"Mapo tofu ","amount":2850}`,
			"amount":   `{"order_id":"o-1","name":"Mapo tofu","amount":2851}`,
			"currency": `{"order_id":"o-1","name":"Mapo tofu","amount":2850,"currency":"EUR"}`,
		} {
			a := mustSend(t, http.MethodPost, s.api+"/v1/orders", other)
			require.Equal(t, http.StatusConflict, a.status, "%s: %s", name, a)
			require.Equal(t, "order_id_taken", a.problem(t).Code)
			require.Empty(t, a.header.Get("Retry-After"), "it will not help")
		}
		s.holdsNothingElse(t, 1)
	})
}

func TestKeyForAnOrderThatWasPlacedBeforeWithoutOne(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		const order = `{"order_id":"o-1","name":"Mapo tofu","amount":2850}`
		plain := mustSend(t, http.MethodPost, s.api+"/v1/orders", order)
		require.Equal(t, http.StatusCreated, plain.status, "%s", plain)
		s.holdsOnce(t, "o-1")
		keyed := s.placeUnder(t, "key", order)
		require.Equal(t, http.StatusCreated, keyed.status, "%s", keyed)
		require.Equal(t, string(plain.body), string(keyed.body), "the answer is that of placing it")
		s.placeUnder(t, "key", order).replays(t, keyed)
		s.placeUnder(t, "another-key", order).replays(t, keyed)
		s.holdsNothingElse(t, 1)
	})
}

func TestKeyIsRememberedOverARestart(t *testing.T) {
	onBothStacks(t, func(t *testing.T, s *system) {
		first := s.placeUnder(t, "key", `{"name":"x","amount":1}`)
		require.Equal(t, http.StatusCreated, first.status, "%s", first)
		s.stop(t)
		s.start(t)
		s.placeUnder(t, "key", `{"name":"x","amount":1}`).replays(t, first)
		require.Equal(t, "idempotency_key_reused", s.placeUnder(t, "key", `{"name":"y","amount":1}`).problem(t).Code)
		s.holdsOnce(t, first.order(t).OrderID)
		s.holdsNothingElse(t, 1)
	})
}
