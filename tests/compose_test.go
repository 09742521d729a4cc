//go:build compose

package tests

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// compose runs docker compose, or docker-compose where that is what there is, on docker/compose.yaml.
func compose(t testing.TB, args ...string) {
	t.Helper()
	command := []string{"docker-compose"}
	if exec.Command("docker", "compose", "version").Run() == nil {
		command = []string{"docker", "compose"}
	}
	command = append(command, "-p", fmt.Sprint("takeout-test-", os.Getpid()), "-f", "../docker/compose.yaml")
	out, err := exec.Command(command[0], append(command[1:], args...)...).CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// The containers of docker/compose.yaml, with the images that the environment names: MYSQL_IMAGE, RABBITMQ_IMAGE, and
// TAKEOUT_IMAGE, which must be built. The ports 8080 to 8083 must be free.
func TestComposeSystemDispatchesThroughARestartOfItsBroker(t *testing.T) {
	t.Cleanup(func() { compose(t, "down", "--volumes", "--timeout", "20") })
	compose(t, "up", "--no-build", "--detach")
	s := &system{api: "http://127.0.0.1:8080", dispatchAPI: "http://127.0.0.1:8081"}
	operators := "http://127.0.0.1:8082"
	for _, url := range []string{s.api, s.dispatchAPI, operators} {
		within(t, 2*time.Minute, url+" is ready", func() error {
			a, err := get(url + "/readyz")
			if err != nil || a.status != http.StatusOK {
				return fmt.Errorf("%s: %w", a, err)
			}
			return nil
		})
	}
	s.addCourier(t, "zhao", 0)
	before := s.place(t, "before", 100)
	s.awaitDispatched(t, before)

	compose(t, "stop", "rabbitmq")
	during := s.place(t, "during", 100)
	require.Equal(t, "placed", s.get(t, during).Status)
	compose(t, "start", "rabbitmq")
	within(t, 2*time.Minute, "the order placed during the outage is dispatched", func() error {
		if o := s.get(t, during); o.Status != "dispatched" {
			return fmt.Errorf("it is %s", o.Status)
		}
		return nil
	})
	compose(t, "kill", "dispatch")
	after := s.place(t, "after", 100)
	compose(t, "start", "dispatch")
	s.awaitDispatched(t, after)
	// The whole installation agrees, seen through the operators' API.
	cancelled := mustSend(t, http.MethodPost, s.api+"/v1/orders/"+after+"/cancel", "")
	require.Equal(t, http.StatusOK, cancelled.status, "%s", cancelled)
	// A reader that the restarted broker has forgotten begins again after a minute.
	within(t, 2*time.Minute, "the timeline tells the order's way through every service", func() error {
		a := mustGet(t, operators+"/v1/orders/"+after+"/timeline")
		for _, handler := range []string{"dispatch.assign-courier", "payment.charge-order", "points.award-points", "payment.refund-order", "points.revoke-points", "dispatch.release-courier"} {
			if !contains(a.body, handler) {
				return fmt.Errorf("%s is not in %s", handler, a)
			}
		}
		return nil
	})
	within(t, time.Minute, "the databases agree", func() error {
		a := mustSend(t, http.MethodPost, operators+"/v1/reconciliation", `{"repair":false}`)
		if a.status != http.StatusOK || !contains(a.body, `"consistent":true`) {
			return fmt.Errorf("%s", a)
		}
		return nil
	})
	failures := mustGet(t, operators+"/v1/failures")
	require.True(t, contains(failures.body, `"items":[]`), "%s", failures)
}
