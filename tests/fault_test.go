package tests

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/tests/testenv"
)

// crashLoad places orders one after the other in each of its clients until it is stopped, and remembers which the
// program accepted. What was not answered is placed again under the same id until it is.
type crashLoad struct {
	api      string
	stop     chan struct{}
	clients  sync.WaitGroup
	accepted atomic.Int64
	slowest  atomic.Int64 // nanoseconds, of answers with 201 or 200
}

// placeThrough places n orders through faults: each is sent until it is accepted.
func (l *crashLoad) placeThrough(t testing.TB, n, concurrency int) {
	next := make(chan int)
	l.clients.Go(func() {
		defer close(next)
		for i := range n {
			select {
			case next <- i:
			case <-l.stop:
				return
			}
		}
	})
	for range concurrency {
		l.clients.Go(func() {
			for i := range next {
				if t.Failed() {
					continue // nobody waits a minute for each of the others
				}
				body := fmt.Sprintf(`{"order_id":"load-%d","name":"order %d","amount":%d}`, i, i, i+1)
				for deadline := time.Now().Add(time.Minute); ; {
					began := time.Now()
					a, err := send(http.MethodPost, l.api+"/v1/orders", body)
					if err == nil && (a.status == http.StatusCreated || a.status == http.StatusOK) {
						l.accepted.Add(1)
						if took := int64(time.Since(began)); took > l.slowest.Load() {
							l.slowest.Store(took)
						}
						break
					}
					if time.Now().After(deadline) {
						t.Errorf("order %d was not accepted within a minute: %v %s", i, err, a)
						break
					}
					time.Sleep(20 * time.Millisecond)
				}
			}
		})
	}
}

// The whole promise at once: the broker goes away for ten seconds and every process is killed, while 2,000 orders are
// placed.
func TestNoOrderIsLostOrDoubledWhenBrokerAndProcessesDie(t *testing.T) {
	t.Parallel()
	broker := testenv.StartRabbitMQ(t)
	st := stack{name: "faults", order: testenv.MySQL(t), dispatch: testenv.MySQL(t), broker: broker.URL()}
	s := startProcesses(t, st)
	s.addCourier(t, "qian", 0)

	const orders = 2000
	load := &crashLoad{api: s.api, stop: make(chan struct{})}
	load.placeThrough(t, orders, 32)
	reached := func(n int64) {
		t.Helper()
		eventually(t, fmt.Sprintf("%d orders are accepted", n), func() error {
			if got := load.accepted.Load(); got < n {
				return fmt.Errorf("%d are", got)
			}
			return nil
		})
	}
	reached(200)
	s.processes["dispatch"].kill()
	s.processes["dispatch"].start(t)
	reached(400)
	broker.Stop()
	down := time.Now()
	reached(700) // intake goes on
	s.processes["relay"].kill()
	s.processes["relay"].start(t)
	s.processes["order"].kill()
	s.processes["order"].start(t)
	reached(1000)
	if rest := 10*time.Second - time.Since(down); rest > 0 {
		time.Sleep(rest) // the outage that the promise names
	}
	broker.Start()
	load.clients.Wait()
	require.EqualValues(t, orders, load.accepted.Load())
	s.awaitAllDispatched(t, orders)
	s.noFailures(t)
}

func TestEachProcessMayDieAtAnyMoment(t *testing.T) {
	t.Parallel()
	s := startProcesses(t, production(t))
	const orders = 600
	load := &crashLoad{api: s.api, stop: make(chan struct{})}
	load.placeThrough(t, orders, 8)
	for round := range 6 {
		victim := s.processes[[]string{"dispatch", "relay", "order"}[round%3]]
		before := load.accepted.Load()
		eventually(t, "work is under way", func() error {
			if load.accepted.Load() < min(before+20, orders) {
				return fmt.Errorf("%d accepted", load.accepted.Load())
			}
			return nil
		})
		victim.kill()
		victim.start(t)
	}
	load.clients.Wait()
	require.EqualValues(t, orders, load.accepted.Load())
	s.awaitAllDispatched(t, orders)
	s.noFailures(t)
}

func TestEmbeddedSystemSurvivesKillNine(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "embedded", nil)
	load := &crashLoad{api: p.url, stop: make(chan struct{})}
	const orders = 300
	load.placeThrough(t, orders, 8)
	for range 3 {
		before := load.accepted.Load()
		eventually(t, "work is under way", func() error {
			if load.accepted.Load() < min(before+30, orders) {
				return fmt.Errorf("%d accepted", load.accepted.Load())
			}
			return nil
		})
		p.kill()
		p.start(t)
	}
	load.clients.Wait()
	require.EqualValues(t, orders, load.accepted.Load())
	dir := valueOf(p.env, "TAKEOUT_DATA_DIR")
	s := &system{stack: stack{order: "sqlite:" + dir + "/order.db", dispatch: "sqlite:" + dir + "/dispatch.db"}, api: p.url, dispatchAPI: p.url}
	s.awaitAllDispatched(t, orders)
	s.noFailures(t)
}

func valueOf(env []string, name string) string {
	i := slices.IndexFunc(env, func(e string) bool { return len(e) > len(name) && e[:len(name)+1] == name+"=" })
	return env[i][len(name)+1:]
}

func TestOrdersPlacedJustBeforeACrashAreDispatchedSoonAfterTheRestart(t *testing.T) {
	t.Parallel()
	p := startProcess(t, "embedded", nil)
	s := &system{api: p.url, dispatchAPI: p.url}
	var placed []string
	for i := range 20 {
		placed = append(placed, s.place(t, fmt.Sprint("order ", i), 100))
	}
	p.kill()
	p.start(t)
	// What the dead process had in its hands is not waited for: nobody else can have it.
	within(t, 5*time.Second, "all are dispatched", func() error {
		for _, id := range placed {
			if o := s.get(t, id); o.Status != "dispatched" {
				return fmt.Errorf("order %s is %s", id, o.Status)
			}
		}
		return nil
	})
}

// proxy is a TCP connection between the program and a server that can be cut and kept cut.
type proxy struct {
	listener net.Listener
	target   string

	mu    sync.Mutex
	down  bool
	conns []net.Conn
}

func startProxy(t testing.TB, target string) *proxy {
	t.Helper()
	p := &proxy{listener: listen(t), target: target}
	go p.serve()
	t.Cleanup(func() {
		_ = p.listener.Close()
		p.cut()
	})
	return p
}

func (p *proxy) addr() string { return p.listener.Addr().String() }

func (p *proxy) serve() {
	for {
		in, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		down, target := p.down, p.target
		p.mu.Unlock()
		if down {
			_ = in.Close()
			continue
		}
		out, err := net.Dial("tcp", target)
		if err != nil {
			_ = in.Close()
			continue
		}
		p.mu.Lock()
		p.conns = append(p.conns, in, out)
		p.mu.Unlock()
		for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
			go func() {
				_, _ = io.Copy(pair[0], pair[1])
				_ = pair[0].Close()
				_ = pair[1].Close()
			}()
		}
	}
}

// cut ends all connections, and refuses new ones until mend.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = true
	for _, c := range p.conns {
		_ = c.Close()
	}
	p.conns = nil
}

func (p *proxy) mend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.down = false
}

// lead makes new connections go to that URL's server instead.
func (p *proxy) lead(t testing.TB, rawURL string) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = parse(t, rawURL).Host
}

// through returns the URL with the proxy's address in place of the server's, and the proxy.
func through(t testing.TB, rawURL string) (string, *proxy) {
	t.Helper()
	u := parse(t, rawURL)
	p := startProxy(t, u.Host)
	u.Host = p.addr()
	return u.String(), p
}

func TestOrdersAreTakenWhileTheBrokerIsAwayAndDispatchedWhenItIsBack(t *testing.T) {
	t.Parallel()
	st := production(t)
	var broker *proxy
	st.broker, broker = through(t, st.broker)
	broker.cut()
	s := startOne(t, st) // the broker is away at the start, too

	s.placeMany(t, 100, 8)
	ready := mustGet(t, s.api+"/readyz")
	require.Equal(t, http.StatusOK, ready.status, "%s", ready)
	require.Contains(t, string(ready.body), `"status":"degraded"`)
	require.Equal(t, 100, s.orderRows(t, "SELECT COUNT(*) FROM outbox"))
	broker.mend()
	s.awaitAllDispatched(t, 100)

	broker.cut()
	s.placeMany(t, 100, 8)
	broker.mend()
	s.awaitAllDispatched(t, 200)
	s.noFailures(t)
	eventually(t, "readiness says that all is well", func() error {
		if a := mustGet(t, s.api+"/readyz"); !contains(a.body, `"status":"ready"`) {
			return fmt.Errorf("%s", a)
		}
		return nil
	})
}

func TestDatabaseOutageGivesNoMessageUp(t *testing.T) {
	t.Parallel()
	st := production(t)
	var dispatchDB *proxy
	direct := st.dispatch
	st.dispatch, dispatchDB = through(t, st.dispatch)
	s := startOne(t, st)
	s.placeMany(t, 20, 4)
	dispatchDB.cut()
	s.placeMany(t, 100, 8)
	eventually(t, "the consumer pauses", func() error {
		if a := mustGet(t, s.api+"/readyz"); a.status != http.StatusServiceUnavailable || !contains(a.body, "pauses") {
			return fmt.Errorf("%s", a)
		}
		return nil
	})
	dispatchDB.mend()
	s.dispatch = direct
	s.awaitAllDispatched(t, 120)
	s.noFailures(t)
}

func TestOrdersAreRefusedClearlyWhileTheirDatabaseIsAway(t *testing.T) {
	t.Parallel()
	st := production(t)
	var orderDB *proxy
	st.order, orderDB = through(t, st.order)
	s := startOne(t, st)
	orderDB.cut()
	a := mustSend(t, http.MethodPost, s.api+"/v1/orders", `{"name":"x","amount":1}`)
	require.Equal(t, http.StatusServiceUnavailable, a.status, "%s", a)
	require.NotEmpty(t, a.header.Get("Retry-After"))
	require.Equal(t, "database_unavailable", a.problem(t).Code)
	require.NotEmpty(t, a.problem(t).OrderID, "the order can be placed again under the id it would have had")
	orderDB.mend()
	eventually(t, "orders are taken again", func() error {
		a, err := send(http.MethodPost, s.api+"/v1/orders", `{"name":"x","amount":1}`)
		if err != nil || a.status != http.StatusCreated {
			return fmt.Errorf("%s: %w", a, err)
		}
		return nil
	})
}

func TestStoppingUnderLoadGivesNothingUpAndLosesNothing(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		s := startOne(t, st)
		placed := 0
		for range 5 {
			s.placeMany(t, 60, 8)
			placed += 60
			s.stop(t) // with messages in flight
			s.start(t)
		}
		s.awaitAllDispatched(t, placed)
		s.noFailures(t)
	})
}

func TestEventsReachTheirQueuesBeforeAnyConsumerEverRan(t *testing.T) {
	t.Parallel()
	st := production(t)
	order := startProcess(t, "order,relay", map[string]string{
		"TAKEOUT_ROLES": "order,relay", "TAKEOUT_ORDER_DATABASE_URL": st.order, "TAKEOUT_BROKER_URL": st.broker,
	})
	s := &system{stack: st, api: order.url}
	id := s.place(t, "early", 100)
	eventually(t, "the outbox is empty", func() error {
		if n := s.orderRows(t, "SELECT COUNT(*) FROM outbox"); n != 0 {
			return fmt.Errorf("%d events wait", n)
		}
		return nil
	})
	dispatch := startProcess(t, "dispatch,relay", map[string]string{
		"TAKEOUT_ROLES": "dispatch,relay", "TAKEOUT_DISPATCH_DATABASE_URL": st.dispatch, "TAKEOUT_BROKER_URL": st.broker,
	})
	s.dispatchAPI = dispatch.url
	s.addCourier(t, "zhao", 0)
	s.awaitDispatched(t, id)
	s.noFailures(t)
}
