package tests

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"takeout/domain/event"
	"takeout/ports/httpapi"
	"takeout/service"
)

// noDelays makes failures come to a person at once.
func noDelays(t testing.TB, st stack) *system {
	t.Helper()
	return startWith(t, st, func(cfg *service.Config) { cfg.RetryDelays = nil })
}

// awaitFailures waits until the query finds so many failures, and returns them.
func (s *system) awaitFailures(t testing.TB, n int, query string) []httpapi.FailureBody {
	t.Helper()
	var items []httpapi.FailureBody
	eventually(t, fmt.Sprintf("%d failures %s", n, query), func() error {
		if items = s.listFailures(t, query).Items; len(items) != n {
			return fmt.Errorf("%v", items)
		}
		return nil
	})
	return items
}

func (s *system) awaitState(t testing.TB, id, state string) httpapi.FailureDetailBody {
	t.Helper()
	var f httpapi.FailureDetailBody
	eventually(t, id+" is "+state, func() error {
		if f = s.showFailure(t, id); f.State != state {
			return fmt.Errorf("it is %s: %s", f.State, f.Error)
		}
		return nil
	})
	return f
}

func TestBrokenAnnouncementIsCorrectedByAPersonAndDispatched(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := noDelays(t, st)
		broker := s.publisher(t)
		id := newEventID()
		broken := strings.Replace(string(announce(t, id, "o-broken", 100)), `"amount":100`, `"amount":"100"`, 1)
		require.NoError(t, broker.Publish("order.placed", message.NewMessage(id, []byte(broken))))
		f := s.awaitFailures(t, 1, "?handler=dispatch.assign-courier")[0]
		require.Equal(t, "o-broken", f.OrderID)
		shown := s.showFailure(t, f.ID)
		require.Equal(t, broken, shown.Payload)

		var env struct {
			Data map[string]any `json:"data"`
		}
		require.NoError(t, json.Unmarshal([]byte(shown.Payload), &env))
		env.Data["amount"] = 100
		data, err := json.Marshal(map[string]any{"data": env.Data, "reason": "the amount was a text"})
		require.NoError(t, err)
		a := mustSend(t, "POST", s.api+"/v1/failures/"+f.ID+"/edit", string(data), "X-Operator", "wang")
		edited := decoded[httpapi.FailureBody](t, a, 200)
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM platoon WHERE orderId = 'o-broken' AND order_money = 100")
		s.awaitDispatchRows(t, 1, "SELECT COUNT(*) FROM inbox WHERE event_id = ?", edited.ReplacedBy)
		s.awaitDispatchRows(t, 0, "SELECT COUNT(*) FROM retry")
		kept := s.showFailure(t, f.ID)
		require.Equal(t, "replaced", kept.State)
		require.Equal(t, broken, kept.Payload, "the original stays")
	})
}

func TestTransientFailureIsRetriedWhenItsCauseIsGone(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := noDelays(t, st)
		publishAssignment(t, s.publisher(t), "o-late")
		f := s.awaitFailures(t, 1, "?handler=order.mark-dispatched")[0]
		require.Equal(t, "transient", f.Class)

		retry := func() {
			t.Helper()
			a := mustSend(t, "POST", s.api+"/v1/failures/"+f.ID+"/retry", `{"reason":"try"}`, "X-Operator", "wang")
			require.Equal(t, 200, a.status, "%s", a)
		}
		retry()
		eventually(t, "it fails again and is open", func() error {
			if again := s.showFailure(t, f.ID); again.State != "open" || again.Occurrences < 2 {
				return fmt.Errorf("%+v", again)
			}
			return nil
		})
		a := mustSend(t, "POST", s.api+"/v1/orders", `{"order_id":"o-late","name":"x","amount":1}`)
		require.Equal(t, 201, a.status, "%s", a)
		retry()
		resolved := s.awaitState(t, f.ID, "resolved")
		require.NotNil(t, resolved.ClosedAt)
		require.GreaterOrEqual(t, len(resolved.Actions), 2)
		require.Equal(t, 409, mustSend(t, "POST", s.api+"/v1/failures/"+f.ID+"/retry", `{}`).status)
		s.awaitDispatched(t, "o-late")
	})
}

func TestUnsignedCopyThatComesFirstLeavesTheSignedOriginalRepairable(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		const key = "the only key there is"
		s := startWith(t, st, func(cfg *service.Config) { cfg.RetryDelays, cfg.EventKey = nil, key })
		keys, err := event.ParseKeys(key)
		require.NoError(t, err)
		publish, id := s.stranger(t), newEventID()
		body := encode(t, id, time.Now(), event.DispatchAssigned{OrderID: "o-late", CourierID: "zhao", AssignedAt: time.Now(), Version: 1})
		publish("dispatch.assigned", id, body, nil)
		copied := s.awaitFailures(t, 1, "?code=event_forged")[0]
		publish("dispatch.assigned", id, body, map[string]string{event.SignatureHeader: keys.Sign(body)})
		original := s.awaitFailures(t, 1, "?code=order_not_found")[0]

		require.Equal(t, 201, mustSend(t, "POST", s.api+"/v1/orders", `{"order_id":"o-late","name":"x","amount":1}`).status)
		require.Equal(t, 200, mustSend(t, "POST", s.api+"/v1/failures/"+original.ID+"/retry", `{}`).status)
		s.awaitState(t, original.ID, "resolved")
		require.Equal(t, "open", s.showFailure(t, copied.ID).State)
	})
}

func TestRetryOfManyStopsAtTheFirstThatFailsAgain(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := noDelays(t, st)
		broker := s.publisher(t)
		const n = 20
		for i := range n {
			publishAssignment(t, broker, fmt.Sprint("o-", i))
		}
		query := "?handler=order.mark-dispatched&state="
		s.awaitFailures(t, n, query+"open")
		a := mustSend(t, "POST", s.api+"/v1/failures/retry",
			`{"filter":{"handler":"order.mark-dispatched"},"rate_per_second":1,"stop_on_failure":true}`)
		require.Equal(t, n, decoded[httpapi.RetriedBody](t, a, 200).Count)
		s.awaitFailures(t, n, query+"open")
		require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM retry"))
		require.Less(t, s.orderRows(t, "SELECT COUNT(*) FROM failure WHERE occurrences > 1"), n, "most were not tried")
	})
}

func TestManyAreRetriedWhenTheirCauseIsGone(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := noDelays(t, st)
		broker := s.publisher(t)
		const n = 20
		for i := range n {
			publishAssignment(t, broker, fmt.Sprint("o-", i))
		}
		s.awaitFailures(t, n, "?handler=order.mark-dispatched")
		for i := range n {
			a := mustSend(t, "POST", s.api+"/v1/orders", fmt.Sprintf(`{"order_id":"o-%d","name":"x","amount":1}`, i))
			require.Equal(t, 201, a.status, "%s", a)
		}
		a := mustSend(t, "POST", s.api+"/v1/failures/retry", `{"filter":{"handler":"order.mark-dispatched"},"rate_per_second":1000,"stop_on_failure":true}`)
		require.Equal(t, n, decoded[httpapi.RetriedBody](t, a, 200).Count)
		s.awaitFailures(t, n, "?handler=order.mark-dispatched&state=resolved")
		s.awaitFailures(t, 0, "?handler=order.mark-dispatched")
	})
}

func TestDiscardedFailureIsNotHandledAnyMore(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := noDelays(t, st)
		publishAssignment(t, s.publisher(t), "o-late")
		f := s.awaitFailures(t, 1, "?handler=order.mark-dispatched")[0]
		a := mustSend(t, "POST", s.api+"/v1/failures/"+f.ID+"/discard", `{"reason":"a test of ours"}`, "X-Operator", "wang")
		require.Equal(t, 200, a.status, "%s", a)
		s.awaitFailures(t, 0, "?handler=order.mark-dispatched")
		retried := decoded[httpapi.RetriedBody](t, mustSend(t, "POST", s.api+"/v1/failures/retry", `{"filter":{"handler":"order.mark-dispatched"}}`), 200)
		require.Zero(t, retried.Count)
		require.Equal(t, "discarded", s.showFailure(t, f.ID).State)
	})
}

func TestCorrectedMessageThatFailsIsAFailureOfItsOwn(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := noDelays(t, st)
		broker := s.publisher(t)
		require.NoError(t, broker.Publish("dispatch.assigned", message.NewMessage(newEventID(), []byte("hello"))))
		f := s.awaitFailures(t, 1, "?handler=order.mark-dispatched")[0]
		whole, err := event.Encode("x", time.Now(), event.DispatchAssigned{OrderID: "o-nowhere", CourierID: "zhao", AssignedAt: time.Now(), Version: 1})
		require.NoError(t, err)
		body, err := json.Marshal(map[string]string{"payload": string(whole)})
		require.NoError(t, err)
		edited := decoded[httpapi.FailureBody](t, mustSend(t, "POST", s.api+"/v1/failures/"+f.ID+"/edit", string(body)), 200)
		next := s.awaitFailures(t, 1, "?handler=order.mark-dispatched")[0]
		require.NotEqual(t, f.ID, next.ID)
		require.Equal(t, edited.ReplacedBy, next.MessageID)
		require.Equal(t, "order_not_found", next.Code)
	})
}
