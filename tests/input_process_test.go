package tests

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/domain/event"
	"takeout/tests/testenv"
)

// What customers write and what secrets are must not be in the log, not even in the one of somebody who looks for an error.
func TestNeitherPayloadsNorSecretsAreInTheLogAtDebugLevel(t *testing.T) {
	t.Parallel()
	st := production(t)
	const canary = "CANARY-7f3a"
	p := startProcess(t, "talkative", map[string]string{
		"TAKEOUT_ORDER_DATABASE_URL": st.order, "TAKEOUT_DISPATCH_DATABASE_URL": st.dispatch, "TAKEOUT_PAYMENT_DATABASE_URL": st.payment,
		"TAKEOUT_POINTS_DATABASE_URL": st.points, "TAKEOUT_BROKER_URL": st.broker, "TAKEOUT_EVENT_KEY": canary + " is a key", "TAKEOUT_LOG_LEVEL": "debug",
	})
	s := &system{stack: st, api: p.url, dispatchAPI: p.url}
	s.addCourier(t, "zhao", 0)
	publish := s.stranger(t)

	a := s.placeUnder(t, canary+"-key", fmt.Sprintf(`{"name":"%s","amount":100}`, canary))
	require.Equal(t, http.StatusCreated, a.status, "%s", a)
	s.awaitDispatched(t, a.order(t).OrderID)
	for _, body := range []string{
		`{"name":"` + canary + `","amount":"` + canary + `"}`, `{"` + canary + `":1}`, canary, `{"name":"x","amount":1,"currency":"` + canary + `"}`,
	} {
		require.Less(t, mustSend(t, http.MethodPost, s.api+"/v1/orders", body, "Authorization", "Bearer "+canary, "Cookie", canary).status, 500)
	}
	s.get(t, a.order(t).OrderID)
	mustGet(t, s.api+"/v1/failures?text="+canary)

	keys, err := event.ParseKeys(canary + " is a key")
	require.NoError(t, err)
	good := announce(t, newEventID(), "o-canary", 100)
	bodies := []string{canary, `{"` + canary + `":`, strings.Replace(string(good), "Mapo tofu", canary, 1)}
	for _, member := range []string{"id", "time", "type", "specversion", "orderversion", "data", "data.amount", "data.name", "data.placed_at", "data.currency", "data.order_id", "data.version"} {
		for _, value := range []any{canary + "\x00", []any{canary}, map[string]any{canary: 1}} {
			bodies = append(bodies, string(changed(t, good, member, value)))
		}
	}
	for _, body := range bodies {
		for _, signature := range []string{keys.Sign([]byte(body)), "sha256=" + canary} {
			publish("order.placed", "", []byte(body), map[string]string{event.SignatureHeader: signature, "x-secret": canary})
		}
	}
	within(t, time.Minute, "all are kept but one", func() error {
		if n := s.dispatchRows(t, "SELECT COALESCE(SUM(occurrences), 0) FROM failure"); n != 2*len(bodies)-1 {
			return fmt.Errorf("%d of %d", n, 2*len(bodies)-1)
		}
		return nil
	})
	require.NoError(t, p.terminate(t))
	require.Contains(t, p.log.String(), "a message was given up and is kept for a person")
	for line := range strings.Lines(p.log.String()) {
		require.NotContains(t, line, canary)
	}
	require.NotContains(t, p.log.String(), parse(t, st.order).User.String()+"@")
}

func TestTimesAreUTCWhereverTheMachineIs(t *testing.T) {
	t.Parallel()
	for name, zone := range map[string]string{"none": "", "nowhere": "garbage", "China": "Asia/Shanghai", "a file": ":/etc/passwd"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, p := embeddedProcess(t, map[string]string{"TZ": zone, "LANG": "C", "LC_ALL": "garbage"})
			o := s.get(t, s.place(t, "麻婆豆腐", 1))
			require.Equal(t, "麻婆豆腐", o.Name)
			require.Equal(t, time.UTC, o.PlacedAt.Location())
			require.WithinDuration(t, time.Now(), o.PlacedAt, time.Minute)
			listed := run(t, map[string]string{"TAKEOUT_URL": p.url, "TZ": zone, "LANG": "C"}, "order", "get", o.OrderID, "-o", "table")
			require.Contains(t, listed.stdout, o.PlacedAt.Format("2006-01-02T15:04:05Z"))
		})
	}
}

// What a server's defaults are does not matter: each session is told.
func TestSessionsAreStrictReadCommittedAndUTC(t *testing.T) {
	t.Parallel()
	url := testenv.MySQL(t)
	mode := rowTexts(t, url, "SELECT @@SESSION.sql_mode, @@SESSION.time_zone, @@SESSION.autocommit")[0]
	require.Contains(t, mode, "STRICT_ALL_TABLES")
	require.Contains(t, mode, "\x1f+00:00\x1f1")
	variables := strings.Join(rowTexts(t, url, "SHOW SESSION VARIABLES WHERE Variable_name IN ('tx_isolation', 'transaction_isolation')"), " ")
	require.Contains(t, variables, "READ-COMMITTED")
}
