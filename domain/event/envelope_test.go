package event_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"takeout/domain"
	"takeout/domain/event"
)

var at = time.Date(2026, 1, 2, 3, 4, 5, 678901000, time.UTC)

// The files are the contract with every producer and consumer of version 1: they do not change.
func TestVersionOneStaysAsItWasAnnounced(t *testing.T) {
	t.Parallel()
	placed := event.OrderPlaced{Order: event.Order{OrderID: "o1", Name: "麻婆豆腐", Amount: 2850, Currency: "CNY", Status: "placed", Version: 1, PlacedAt: at}}
	assigned := event.DispatchAssigned{OrderID: "o1", CourierID: "zhao", AssignedAt: at, Version: 1}
	for file, e := range map[string]event.Event{"order.placed.v1.json": placed, "dispatch.assigned.v1.json": assigned} {
		golden, err := os.ReadFile("testdata/" + file)
		require.NoError(t, err)
		written, err := event.Encode("evt_1", at, e)
		require.NoError(t, err)
		require.JSONEq(t, string(golden), string(written), file)
	}
	golden, err := os.ReadFile("testdata/order.placed.v1.json")
	require.NoError(t, err)
	env, read, err := event.Decode[event.OrderPlaced]("evt_1", golden)
	require.NoError(t, err)
	require.Equal(t, placed, read)
	require.Equal(t, "/takeout/order", env.Source)
}

func TestWhatIsEncodedIsDecodedAgain(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		sent := event.OrderPlaced{Order: event.Order{
			OrderID:  rapid.StringMatching(`[A-Za-z0-9_-]{1,64}`).Draw(t, "id"),
			Name:     rapid.StringN(1, 30, -1).Draw(t, "name"),
			Amount:   rapid.Int64Range(1, domain.MaxAmount).Draw(t, "amount"),
			Currency: "CNY", Status: "placed",
			Version:  rapid.Int64Range(1, 1<<31-1).Draw(t, "version"),
			PlacedAt: time.UnixMicro(rapid.Int64Range(0, 4e15).Draw(t, "at")).UTC(),
		}}
		body, err := event.Encode("evt_1", sent.PlacedAt, sent)
		if err != nil {
			t.Fatal(err)
		}
		_, received, err := event.Decode[event.OrderPlaced]("", body)
		if err != nil {
			t.Fatal(err)
		}
		if received != sent {
			t.Fatalf("%+v became %+v", sent, received)
		}
		if event.SubjectOf(body) != sent.OrderID {
			t.Fatalf("the subject is %q", event.SubjectOf(body))
		}
	})
}

func TestNewerProducerMayAddWhatWeDoNotKnow(t *testing.T) {
	t.Parallel()
	body, err := event.Encode("evt_1", at, event.DispatchAssigned{OrderID: "o1", CourierID: "zhao", AssignedAt: at, Version: 1})
	require.NoError(t, err)
	richer := strings.Replace(string(body), `"courier_id"`, `"vehicle":"bicycle","courier_id"`, 1)
	richer = strings.Replace(richer, `"specversion"`, `"region":"south","specversion"`, 1)
	_, e, err := event.Decode[event.DispatchAssigned]("evt_1", []byte(richer))
	require.NoError(t, err)
	require.Equal(t, "zhao", e.CourierID)
}

func TestMessageThatCouldBeReadInTwoWaysIsRefused(t *testing.T) {
	t.Parallel()
	body, err := event.Encode("evt_1", at, event.DispatchAssigned{OrderID: "o1", CourierID: "zhao", AssignedAt: at, Version: 1})
	require.NoError(t, err)
	for twice, says := range map[string]string{
		`"subject":"o1","subject":`:       "a member comes twice",
		`"courier_id":"li","courier_id":`: "a member comes twice",
		`"Courier_ID":`:                   "", // another name, and so nobody's
	} {
		name := twice[strings.LastIndex(twice, `,`)+1:]
		ambiguous := strings.Replace(string(body), strings.ToLower(name), twice, 1)
		require.NotEqual(t, string(body), ambiguous)
		_, e, err := event.Decode[event.DispatchAssigned]("evt_1", []byte(ambiguous))
		if says == "" {
			require.NoError(t, err)
			require.Empty(t, e.CourierID)
			continue
		}
		require.ErrorContains(t, err, says)
		require.Equal(t, domain.Invalid, domain.KindOf(err))
		require.NotContains(t, err.Error(), "li")
		require.Equal(t, "o1", event.SubjectOf([]byte(ambiguous)), "it is found under its order all the same")
	}
}

func TestErrorNamesTheMemberAndRepeatsNothingOfTheMessage(t *testing.T) {
	t.Parallel()
	body, err := event.Encode("evt_1", at, event.OrderPlaced{
		Order:    event.Order{OrderID: "o1", Name: "soup", Amount: 1, Currency: "CNY", Status: "placed", Version: 1, PlacedAt: at},
		Dispatch: &event.Courier{CourierID: "zhao", AssignedAt: at},
	})
	require.NoError(t, err)
	for _, c := range []struct{ right, wrong, says string }{
		{`"amount":1`, `"amount":"secret"`, "amount has the wrong type or is out of range"},
		{`"amount":1`, `"amount":1.5`, "amount has the wrong type or is out of range"},
		{`"amount":1`, `"amount":99999999999999999999`, "amount has the wrong type or is out of range"},
		{`"courier_id":"zhao"`, `"courier_id":["secret"]`, "dispatch.courier_id has the wrong type"},
		{`"orderversion":1`, `"orderversion":{"secret":1}`, "orderversion has the wrong type"},
		{`"placed_at":"2026`, `"placed_at":"secret`, "placed_at must be a time such as"},
		{`"amount":1`, `"amount":secret`, "it is not JSON from byte"},
		{`"amount":1`, `"amount":1,"secret":1,"secret":1`, "a member comes twice"},
	} {
		wrong := strings.Replace(string(body), c.right, c.wrong, 1)
		require.NotEqual(t, string(body), wrong)
		_, _, err := event.Decode[event.OrderPlaced]("evt_1", []byte(wrong))
		require.ErrorContains(t, err, c.says, c.wrong)
		require.NotContains(t, err.Error(), "secret")
	}
}

func FuzzDecodeNeverPanicsAndOnlySaysInvalid(f *testing.F) {
	for _, file := range []string{"order.placed.v1.json", "dispatch.assigned.v1.json"} {
		golden, err := os.ReadFile("testdata/" + file)
		require.NoError(f, err)
		f.Add("evt_1", golden)
	}
	f.Add("", []byte(`{"specversion":"1.0","id":"x","type":"takeout.order.placed.v1","data":null}`))
	f.Add("", []byte("[[[["))
	f.Fuzz(func(t *testing.T, id string, body []byte) {
		_, e, err := event.Decode[event.OrderPlaced](id, body)
		if err != nil && domain.KindOf(err) != domain.Invalid {
			t.Fatalf("%v is not Invalid", err)
		}
		if err == nil && e.OrderID != event.SubjectOf(body) && domain.CheckID("id", e.OrderID) == nil && len(body) < 1<<20 {
			t.Fatalf("the subject of an event about %q is %q", e.OrderID, event.SubjectOf(body))
		}
	})
}
