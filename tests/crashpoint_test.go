package tests

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"takeout/app"
	"takeout/crashpoint"
	"takeout/domain/event"
	"takeout/ports/messaging"
)

// scene is how a process is brought to a crash point, and what is to be seen when all is over.
type scene struct {
	always map[string]string // settings of the process that dies and of the one after it
	once   map[string]string // settings of the process that dies

	prepare  func(t *testing.T, s *system)                    // before the load
	further  func(t *testing.T, s *system, load *crashGuests) // beside the orders
	settled  bool                                             // further begins after the orders are settled
	orders   int
	extra    int // orders that nobody placed
	failures int // messages that are kept
}

// sceneOf returns the scene in which a process comes to the point.
func sceneOf(point string) scene {
	place, _, _ := strings.Cut(point, "/")
	sc := scene{orders: 8, always: map[string]string{
		"TAKEOUT_PAYMENT_REFUSALS": "0.4", "TAKEOUT_RECONCILE_EVERY": "0", "TAKEOUT_RECONCILE_GRACE": "0s",
		"TAKEOUT_RETRY_DELAYS": strings.TrimSuffix(strings.Repeat("200ms,", 20), ","),
	}}
	switch {
	case place == "dispatch.assign-courier-when-paid":
		sc.always["TAKEOUT_DISPATCH_AFTER"] = "paid"
	case place == "compensation.recreate-order":
		sc.once = map[string]string{"TAKEOUT_PUBLISH": "before-commit", "TAKEOUT_FAIL_AFTER_PUBLISH": "1"}
	case place == "compensation.recreate-cancelled-order":
		sc.extra = 1
		sc.further = func(t *testing.T, s *system, _ *crashGuests) {
			s.tell(t, cancelledAs(placedAs("nobody-placed-it")))
		}
	case place == "order.cancel-undispatchable", place == "dispatch.assign-waiting":
		sc.always["TAKEOUT_DISPATCH_DEADLINE"] = "1ms"
		sc.prepare = func(t *testing.T, s *system) { s.nobodyOnDuty(t) }
	case place == "retry", point == "consumer/delayed": // of an order that is placed later
		sc.orders = 0
		sc.further = func(t *testing.T, s *system, load *crashGuests) {
			s.tell(t, event.PointsAwarded{OrderID: "early", Points: 28, AwardedAt: time.Now().UTC(), Version: 1})
			load.afterDeath = func() { load.order("early", "stays") }
		}
	case point == "consumer/kept":
		sc.failures = 1
		sc.further = func(t *testing.T, s *system, _ *crashGuests) {
			require.NoError(t, s.publisher(t).Publish("payment.refused", message.NewMessage(newEventID(), []byte("{}"))))
		}
	case place == "reconcile":
		sc.always["TAKEOUT_PAYMENT_REFUSALS"] = "0"
		sc.settled = true
		sc.further = func(t *testing.T, s *system, load *crashGuests) {
			alter(t, s.dispatch, "UPDATE platoon SET state = 'released', released_at = assigned_at WHERE state = 'assigned'")
			alter(t, s.dispatch, "UPDATE courier SET active = 0")
			load.eating.Go(func() {
				load.insist("reconcile", func() (answer, error) {
					return send(http.MethodPost, s.api+"/v1/reconciliation", `{"repair":true}`)
				}, func(a answer) bool { return a.status == http.StatusOK && contains(a.body, `"consistent":true`) })
			})
		}
	}
	return sc
}

// tell publishes an event to the program's queues past its outboxes.
func (s *system) tell(t testing.TB, e event.Event) {
	t.Helper()
	id := newEventID()
	require.NoError(t, s.publisher(t).Publish(e.Key(), message.NewMessage(id, encode(t, id, time.Now(), e))))
}

// crashGuests are clients who do not give up: each step is sent until it is answered, whatever dies meanwhile.
type crashGuests struct {
	*system
	t          testing.TB
	afterDeath func()
	eating     sync.WaitGroup
	closed     chan struct{} // the test is over

	mu  sync.Mutex
	ids []string // of orders that were accepted
}

// insist asks until the answer is enough, and returns it. When the test is over, the answer is none.
func (g *crashGuests) insist(what string, ask func() (answer, error), enough func(answer) bool) answer {
	for deadline := time.Now().Add(40 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		a, err := ask()
		if err == nil && enough(a) {
			return a
		}
		select {
		case <-g.closed:
			return answer{}
		default:
		}
		if time.Now().After(deadline) {
			g.t.Errorf("%s was not answered: %v %s", what, err, a)
			return answer{}
		}
	}
}

// order places an order and does with it what its end says.
func (g *crashGuests) order(id, end string) {
	g.eating.Go(func() {
		body := fmt.Sprintf(`{"order_id":%q,"name":"Mapo tofu","amount":2850}`, id)
		accepted := g.insist("order "+id, func() (answer, error) {
			return send(http.MethodPost, g.api+"/v1/orders", body, "Idempotency-Key", id)
		}, func(a answer) bool { return a.status == http.StatusCreated || a.status == http.StatusOK })
		if accepted.status == 0 {
			return
		}
		g.mu.Lock()
		g.ids = append(g.ids, id)
		g.mu.Unlock()
		// awaited is whether the order comes to all of these before it is cancelled.
		awaited := func(words ...string) bool {
			a := g.insist("order "+id, func() (answer, error) { return get(g.api + "/v1/orders/" + id) }, func(a answer) bool {
				return contains(a.body, `"status":"cancelled"`) ||
					!slices.ContainsFunc(words, func(word string) bool { return !contains(a.body, word) })
			})
			return a.status != 0 && !contains(a.body, `"status":"cancelled"`)
		}
		post := func(url, body string) {
			g.insist(end+" "+id, func() (answer, error) { return send(http.MethodPost, url, body) },
				func(a answer) bool { return a.status == http.StatusOK })
		}
		switch end {
		case "cancelled":
			post(g.api+"/v1/orders/"+id+"/cancel", `{"reason":"changed my mind"}`)
		case "paid back":
			if awaited(`"points":28`) {
				post(g.api+"/v1/orders/"+id+"/cancel", `{"reason":"changed my mind"}`)
			}
		case "delivered": // that somebody ate and did not pay would be for a person
			if awaited(`"points":28`, `"status":"dispatched"`) {
				post(g.dispatchAPI+"/v1/dispatches/"+id+"/delivered", "")
			}
		}
	})
}

// orders places n orders with different ends.
func (g *crashGuests) orders(prefix string, n int) {
	for i := range n {
		g.order(fmt.Sprint(prefix, i), []string{"stays", "cancelled", "paid back", "delivered"}[i%4])
	}
}

// settled returns nil when nothing is under way any more, every accepted order is there once, and the four services
// agree on its end. extra orders are there beside them, and failures messages are kept.
func (s *system) settled(t testing.TB, accepted []string, extra, failures int) error {
	t.Helper()
	var errs []error
	none := func(what, url, query string) {
		if n := count(t, url, query); n != 0 {
			errs = append(errs, fmt.Errorf("%d %s", n, what))
		}
	}
	kept := 0
	for name, url := range s.databases() {
		none("events in the outbox of "+name, url, "SELECT COUNT(*) FROM outbox")
		none("retries of "+name, url, "SELECT COUNT(*) FROM retry")
		kept += count(t, url, "SELECT COUNT(*) FROM failure")
	}
	if s.broker == "embedded:" {
		none("messages in the broker", "sqlite:"+filepath.Join(s.cfg.DataDir, "broker.db"), "SELECT COUNT(*) FROM broker_message")
	}
	if kept != failures {
		errs = append(errs, fmt.Errorf("%d messages are kept", kept))
	}
	orders := states(t, s.order, "SELECT orderId, status FROM order_info")
	dispatches := states(t, s.dispatch, "SELECT orderId, state FROM platoon")
	payments := states(t, s.payment, "SELECT orderId, state FROM payment")
	points := states(t, s.points, "SELECT orderId, CAST(SUM(points) AS CHAR) FROM points_entry GROUP BY orderId")
	for _, id := range accepted {
		if orders[id] == nil {
			errs = append(errs, fmt.Errorf("order %s was accepted and is lost", id))
		}
	}
	if len(orders) != len(accepted)+extra {
		errs = append(errs, fmt.Errorf("%d orders instead of %d and %d", len(orders), len(accepted), extra))
	}
	for id, order := range orders {
		end := fmt.Sprint(order, dispatches[id], payments[id], points[id])
		if !slices.Contains(goodEnds, end) {
			errs = append(errs, fmt.Errorf("order %s is %s", id, end))
		}
	}
	if len(dispatches) > len(orders) || len(payments) > len(orders) || len(points) > len(orders) {
		errs = append(errs, fmt.Errorf("%d dispatches, %d payments and %d entries of points for %d orders", len(dispatches), len(payments), len(points), len(orders)))
	}
	none("couriers who do not have as many orders as are counted", s.dispatch, "SELECT COUNT(*) FROM courier WHERE capacity > 0 AND active <> "+
		"(SELECT COUNT(*) FROM platoon WHERE state = 'assigned' AND takeout_userId = courier_id)")
	return errors.Join(errs...)
}

// goodEnds are what an order, its dispatch, its payment and its points may be together at the end.
var goodEnds = []string{
	"[dispatched] [assigned] [succeeded] [28]",
	"[delivered] [delivered] [succeeded] [28]",
	"[cancelled] [released] [refunded] [0]",
	"[cancelled] [released] [refused] []",
	"[cancelled] [released] [void] []",
	"[cancelled] [impossible] [refunded] [0]",
	"[cancelled] [impossible] [refused] []",
	"[cancelled] [impossible] [void] []",
}

// states reads states by order id.
func states(t testing.TB, url, query string) map[string][]string {
	t.Helper()
	rows, err := database(t, url).Query(query)
	require.NoError(t, err)
	defer rows.Close()
	all := map[string][]string{}
	for rows.Next() {
		var id, state string
		require.NoError(t, rows.Scan(&id, &state))
		all[id] = append(all[id], state)
	}
	require.NoError(t, rows.Err())
	return all
}

func (s *system) databases() map[string]string {
	return map[string]string{"order": s.order, "dispatch": s.dispatch, "payment": s.payment, "points": s.points}
}

// diesAt waits until the process was killed at the point.
func (p *process) diesAt(t testing.TB, point string) {
	t.Helper()
	select {
	case err := <-p.done:
		p.done <- err
		var exit *exec.ExitError
		require.ErrorAs(t, err, &exit)
		require.Equal(t, syscall.SIGKILL, exit.Sys().(syscall.WaitStatus).Signal(), "%s", p.log.tail(4000))
	case <-time.After(20 * time.Second):
		t.Fatalf("%s is not reached", point)
	}
	require.Contains(t, p.log.String(), "dying at crash point "+point+"\n")
}

// restart starts the process that died, without the settings that it only had once.
func (p *process) restart(t testing.TB, once map[string]string) {
	t.Helper()
	p.env = slices.DeleteFunc(p.env, func(e string) bool {
		name, _, _ := strings.Cut(e, "=")
		_, has := once[name]
		return has || name == crashpoint.Variable
	})
	p.start(t)
}

var migrated = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(filepath.Dir(binary), "migrated")
	command := exec.Command(binary, "migrate", "--data-dir", dir)
	out, err := command.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return dir, err
})

// migratedData returns a data directory of an embedded installation that has never served, whose couriers are counted.
func migratedData(t testing.TB) string {
	t.Helper()
	template, err := migrated()
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, os.CopyFS(dir, os.DirFS(template)))
	require.NotZero(t, alter(t, "sqlite:"+filepath.Join(dir, "dispatch.db"), "UPDATE courier SET capacity = 100"))
	return dir
}

// Every point is tried; one that is never reached fails.
func TestProcessThatDiesAtACrashPointLosesNothingAndDoublesNothing(t *testing.T) {
	t.Parallel()
	for _, point := range crashpoint.Points() {
		if point.Broker == "amqp" {
			continue // below
		}
		t.Run(point.Name, func(t *testing.T) {
			t.Parallel()
			sc := sceneOf(point.Name)
			s, p := embeddedAt(t, point.Name, sc)
			s.survives(t, p, point.Name, "meal-", sc)
		})
	}
}

// embeddedAt starts an embedded process that comes to the crash points of spec.
func embeddedAt(t testing.TB, spec string, sc scene) (*system, *process) {
	t.Helper()
	dir := migratedData(t)
	env := map[string]string{"TAKEOUT_DATA_DIR": dir, crashpoint.Variable: spec}
	maps.Copy(env, sc.always)
	maps.Copy(env, sc.once)
	p := startProcess(t, "embedded", env)
	s := onData(p)
	s.broker, s.cfg.DataDir = "embedded:", dir
	s.payment, s.points = "sqlite:"+filepath.Join(dir, "payment.db"), "sqlite:"+filepath.Join(dir, "points.db")
	return s, p
}

// The first order keeps the database busy. The transaction after it has those in it that come meanwhile.
func TestProcessThatDiesWhileItStoresManyOrdersTogetherLosesNothingAndDoublesNothing(t *testing.T) {
	t.Parallel()
	for point, spec := range map[string]string{
		"order.place/after-answer":  "order.place/before-commit:1:stop=1s,order.place/after-answer:2",
		"order.place/before-commit": "order.place/after-answer:1:stop=1s,order.place/before-commit:2",
		"order.place/after-commit":  "order.place/after-answer:1:stop=1s,order.place/after-commit:8",
	} {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			sc := sceneOf(point)
			sc.orders = 40
			s, p := embeddedAt(t, spec, sc)
			s.survives(t, p, point, "meal-", sc)
		})
	}
}

// seatGuests returns guests who have not ordered yet, when the process has everything ready for them: it serves HTTP a little
// earlier.
func (s *system) seatGuests(t *testing.T, p *process) *crashGuests {
	t.Helper()
	guests := &crashGuests{system: s, t: t, closed: make(chan struct{})}
	t.Cleanup(func() {
		close(guests.closed)
		guests.eating.Wait()
	})
	eventually(t, "it works", func() error {
		if !strings.Contains(p.log.String(), `"msg":"serving"`) {
			return errors.New("not yet")
		}
		return nil
	})
	return guests
}

// survives brings the process to its point, starts it again, and sees that everything comes to a good end.
func (s *system) survives(t *testing.T, p *process, point, prefix string, sc scene) {
	t.Helper()
	guests := s.seatGuests(t, p)
	if sc.prepare != nil {
		sc.prepare(t, s)
	}
	guests.orders(prefix, sc.orders)
	if sc.settled {
		guests.eating.Wait()
		eventually(t, "the orders are settled", func() error { return s.settled(t, guests.ids, 0, 0) })
	}
	if sc.further != nil {
		sc.further(t, s, guests)
	}
	if strings.HasPrefix(point, "shutdown/") {
		require.NoError(t, p.cmd.Process.Signal(syscall.SIGTERM))
	}
	p.diesAt(t, point)
	p.restart(t, sc.once)
	if guests.afterDeath != nil {
		guests.afterDeath()
	}
	guests.eating.Wait()
	within(t, 30*time.Second, "everything comes to a good end", func() error {
		time.Sleep(50 * time.Millisecond)
		return s.settled(t, guests.ids, sc.extra, sc.failures)
	})
	require.NotEmpty(t, guests.ids)
	s.booksAgree(t)
}

// The process that dies has the one role, and another process all others.
func TestRoleThatDiesAtACrashPointLosesNothingAndDoublesNothing(t *testing.T) {
	t.Parallel()
	st := production(t)
	s := &system{stack: st}
	guests := 0
	for _, point := range crashpoint.Points() {
		if point.Broker != "amqp" && !slices.Contains(alsoInProduction, point.Name) {
			continue
		}
		role, sc := point.Roles[0], sceneOf(point.Name)
		if len(point.Roles) > 1 {
			role = "dispatch" // each of them comes there
		}
		var others []string
		for _, r := range messaging.Roles {
			if string(r) != role {
				others = append(others, string(r))
			}
		}
		env := map[string]string{"TAKEOUT_BROKER_URL": st.broker, "TAKEOUT_ROLES": strings.Join(others, ",")}
		for service, url := range s.databases() {
			env["TAKEOUT_"+strings.ToUpper(service)+"_DATABASE_URL"] = url
		}
		maps.Copy(env, sc.always)
		rest := startProcess(t, "the others", env)
		env["TAKEOUT_ROLES"], env[crashpoint.Variable] = role, point.Name
		p := startProcess(t, role, env)
		s.api, s.dispatchAPI = rest.url, rest.url
		switch role {
		case "order":
			s.api = p.url
		case "dispatch":
			s.dispatchAPI = p.url
		}
		if guests == 0 {
			s.addCourier(t, "zhao", 100)
		}
		sc.extra += guests
		guests += sc.orders
		s.survives(t, p, point.Name, fmt.Sprint(guests, "-"), sc)
		rest.kill()
		p.kill()
	}
}

// alsoInProduction are points that are tried with MySQL and RabbitMQ, too.
var alsoInProduction = []string{
	"order.place/before-commit", "order.place/after-commit", "outbox/claimed", "outbox/acked", "outbox/deleted", "payment/charged",
	"dispatch.assign-courier/before-commit", "dispatch.assign-courier/after-commit", "points.award-points/after-commit",
}

func TestEveryConsumerHasCrashPoints(t *testing.T) {
	t.Parallel()
	roles := map[string][]string{}
	for _, p := range crashpoint.Points() {
		if queue, phase, _ := strings.Cut(p.Name, "/"); phase == "before-inbox" {
			roles[queue] = p.Roles
		}
	}
	want := map[string][]string{}
	for _, r := range messaging.Topology(app.UseCases{}, true) {
		want[r.Queue] = []string{string(r.Role)}
	}
	require.Equal(t, want, roles)
}

func TestCrashPointThatDoesNotExistIsAWrongSetting(t *testing.T) {
	t.Parallel()
	o := run(t, map[string]string{crashpoint.Variable: "outbox/claimd"}, "serve")
	o.complains(t, 2, crashpoint.Variable, "outbox/claimd", "outbox/claimed")
	require.NotContains(t, o.stderr, "there is no setting", "it is known, though no help shows it")
}
