package tests

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/alecthomas/kong"
	"github.com/stretchr/testify/require"

	"takeout/adapters/sqldb"
	"takeout/ports/httpapi"
	"takeout/service"
	"takeout/tests/testenv"
	"takeout/verify/servers"
)

// stack is where a system keeps its data and sends its messages.
type stack struct {
	name     string
	order    string // database URL
	dispatch string
	payment  string
	points   string
	broker   string
}

// embedded needs nothing installed.
func embedded(t testing.TB) stack {
	dir := t.TempDir()
	return stack{
		name:     "embedded",
		order:    "sqlite:" + filepath.Join(dir, "order.db"),
		dispatch: "sqlite:" + filepath.Join(dir, "dispatch.db"),
		payment:  "sqlite:" + filepath.Join(dir, "payment.db"),
		points:   "sqlite:" + filepath.Join(dir, "points.db"),
		broker:   "embedded:",
	}
}

// production is MySQL or MariaDB and RabbitMQ.
func production(t testing.TB) stack {
	t.Helper()
	return stack{
		name: "mysql+rabbitmq", broker: testenv.AMQP(t),
		order: testenv.MySQL(t), dispatch: testenv.MySQL(t), payment: testenv.MySQL(t), points: testenv.MySQL(t),
	}
}

// onBothStacks runs the test on the embedded stack and on the production stack, each as one process.
func onBothStacks(t *testing.T, test func(t *testing.T, s *system)) {
	t.Helper()
	inBothPlaces(t, func(t *testing.T, st stack) { test(t, startOne(t, st)) })
}

// inBothPlaces runs the test in the place of each stack, and leaves starting the system to it.
func inBothPlaces(t *testing.T, test func(t *testing.T, st stack)) {
	t.Helper()
	t.Parallel()
	for _, open := range []func(testing.TB) stack{embedded, production} {
		st := open(t)
		t.Run(st.name, func(t *testing.T) {
			t.Parallel()
			test(t, st)
		})
	}
}

// inEveryLayout runs the test on both stacks as one process, and on the production stack as a process for each role.
func inEveryLayout(t *testing.T, test func(t *testing.T, s *system)) {
	t.Parallel()
	t.Run("one process, embedded", func(t *testing.T) {
		t.Parallel()
		test(t, startOne(t, embedded(t)))
	})
	t.Run("one process, mysql+rabbitmq", func(t *testing.T) {
		t.Parallel()
		test(t, startOne(t, production(t)))
	})
	t.Run("four processes, mysql+rabbitmq", func(t *testing.T) {
		t.Parallel()
		test(t, startProcesses(t, production(t)))
	})
}

// system is a running takeout.
type system struct {
	stack
	api         string // base URL of the order role
	dispatchAPI string // base URL of the dispatch role

	one       *service.Service    // when it runs in this process
	processes map[string]*process // when it runs as processes, by role
	cfg       service.Config
}

// config returns the settings with their defaults, on free ports and with everything in the stack's places.
func config(t testing.TB, st stack) service.Config {
	t.Helper()
	var cfg service.Config
	parser, err := kong.New(&cfg)
	require.NoError(t, err)
	_, err = parser.Parse(nil)
	require.NoError(t, err)
	cfg.HTTPAddr, cfg.DataDir = "127.0.0.1:0", t.TempDir()
	cfg.OrderDatabaseURL, cfg.DispatchDatabaseURL, cfg.BrokerURL = st.order, st.dispatch, st.broker
	cfg.PaymentDatabaseURL, cfg.PointsDatabaseURL = st.payment, st.points
	return cfg
}

// startOne starts a system in this process, as main does, with a courier on duty.
func startOne(t testing.TB, st stack) *system {
	t.Helper()
	return startWith(t, st, func(*service.Config) {})
}

// startWith is startOne with changed settings.
func startWith(t testing.TB, st stack, change func(*service.Config)) *system {
	t.Helper()
	s := &system{stack: st, cfg: config(t, st)}
	change(&s.cfg)
	s.start(t)
	t.Cleanup(func() { s.stop(t) })
	s.addCourier(t, "zhao", 0)
	return s
}

func (s *system) start(t testing.TB) {
	t.Helper()
	one, err := service.Start(context.Background(), s.cfg, logger(t))
	require.NoError(t, err)
	s.one = one
	s.api = "http://" + one.Addr()
	s.dispatchAPI = s.api
}

func (s *system) stop(t testing.TB) {
	t.Helper()
	if s.one == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	require.NoError(t, s.one.Stop(ctx), "an orderly stop")
	s.one = nil
}

// startProcesses starts a system as a process for each service and one for the relay.
func startProcesses(t testing.TB, st stack) *system {
	t.Helper()
	s := &system{stack: st, processes: map[string]*process{}}
	for name, roles := range map[string]string{
		"order": "order,compensation", "dispatch": "dispatch", "payment": "payment,points", "relay": "relay",
	} {
		env := map[string]string{"TAKEOUT_ROLES": roles, "TAKEOUT_BROKER_URL": st.broker}
		for service, url := range map[string]string{"order": st.order, "dispatch": st.dispatch, "payment": st.payment, "points": st.points} {
			if name == "relay" || strings.Contains(roles, service) {
				env["TAKEOUT_"+strings.ToUpper(service)+"_DATABASE_URL"] = url
			}
		}
		s.processes[name] = startProcess(t, name, env)
	}
	s.api, s.dispatchAPI = s.processes["order"].url, s.processes["dispatch"].url
	s.addCourier(t, "zhao", 0)
	return s
}

// logger writes to the test's log, where it shows when the test fails.
func logger(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// process is the program as an operating system process.
type process struct {
	name string
	env  []string
	url  string
	cmd  *exec.Cmd
	log  *lockedBuffer
	done chan error
}

// startProcess starts the program on a free port, and waits until it serves.
func startProcess(t testing.TB, name string, env map[string]string) *process {
	t.Helper()
	p := &process{name: name, log: &lockedBuffer{}}
	settings := map[string]string{"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_DATA_DIR": t.TempDir()}
	for key, value := range env {
		settings[key] = value
	}
	p.url = "http://" + settings["TAKEOUT_HTTP_ADDR"]
	p.env = slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "TAKEOUT_") })
	for key, value := range settings {
		p.env = append(p.env, key+"="+value)
	}
	p.start(t)
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("the log of process %s:\n%s", name, p.log.tail(8000))
		}
	})
	return p
}

func (p *process) start(t testing.TB) {
	t.Helper()
	p.launch(t)
	eventually(t, p.name+" serves", func() error {
		select {
		case err := <-p.done:
			p.done <- err
			t.Fatalf("%s ended instead of serving: %v\n%s", p.name, err, p.log.tail(4000))
		default:
		}
		_, err := get(p.url + "/livez")
		return err
	})
}

// launch starts the program and does not wait for it.
func (p *process) launch(t testing.TB) {
	t.Helper()
	p.cmd = exec.Command(binary)
	p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr = p.env, p.log, p.log
	p.done = make(chan error, 1)
	require.NoError(t, p.cmd.Start())
	go func(cmd *exec.Cmd, done chan error) { done <- cmd.Wait() }(p.cmd, p.done)
}

// kill ends the process as a crash does.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	err := <-p.done
	p.done <- err
}

// terminate asks the process to stop, and returns how it ended.
func (p *process) terminate(t testing.TB) error {
	t.Helper()
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGTERM))
	select {
	case err := <-p.done:
		p.done <- err
		return err
	case <-time.After(time.Minute):
		t.Fatalf("%s did not stop within a minute of SIGTERM", p.name)
		return nil
	}
}

func freeAddr(t testing.TB) string {
	t.Helper()
	listener := listen(t)
	defer listener.Close()
	return listener.Addr().String()
}

type lockedBuffer struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.String()
}

func (b *lockedBuffer) tail(n int) string {
	s := b.String()
	return s[max(0, len(s)-n):]
}

// eventually waits until check returns nil, and fails the test with check's last error after half a minute.
func eventually(t testing.TB, what string, check func() error) {
	t.Helper()
	within(t, 30*time.Second, what, check)
}

func within(t testing.TB, limit time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s: %v", limit, what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// answer is an HTTP answer, read to its end.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func (a answer) String() string { return fmt.Sprintf("%d %s", a.status, a.body) }

// problem decodes an error's body, and checks that it is one.
func (a answer) problem(t testing.TB) httpapi.Problem {
	t.Helper()
	require.Equal(t, "application/problem+json", a.header.Get("Content-Type"), "%s", a)
	var p httpapi.Problem
	require.NoError(t, json.Unmarshal(a.body, &p), "%s", a)
	require.Equal(t, a.status, p.Status, "%s", a)
	require.NotEmpty(t, p.Code, "%s", a)
	require.NotEmpty(t, p.Detail, "%s", a)
	return p
}

var httpClient = &http.Client{
	Timeout:   30 * time.Second,
	Transport: &http.Transport{MaxIdleConnsPerHost: 64},
}

func do(request *http.Request) (answer, error) {
	response, err := httpClient.Do(request)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return answer{response.StatusCode, response.Header, body}, err
}

func get(url string) (answer, error) {
	request, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return answer{}, err
	}
	return do(request)
}

func mustGet(t testing.TB, url string) answer {
	t.Helper()
	a, err := get(url)
	require.NoError(t, err)
	return a
}

// send sends a JSON body. Headers come in pairs of name and value.
func send(method, url, body string, headers ...string) (answer, error) {
	request, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	request.Header.Set("Content-Type", "application/json")
	for i := 0; i+1 < len(headers); i += 2 {
		request.Header.Set(headers[i], headers[i+1])
	}
	return do(request)
}

func mustSend(t testing.TB, method, url, body string, headers ...string) answer {
	t.Helper()
	a, err := send(method, url, body, headers...)
	require.NoError(t, err)
	return a
}

// place places an order and returns its id.
func (s *system) place(t testing.TB, name string, amount int) string {
	t.Helper()
	a := mustSend(t, http.MethodPost, s.api+"/v1/orders", fmt.Sprintf(`{"name":%q,"amount":%d}`, name, amount))
	require.Equal(t, http.StatusCreated, a.status, "%s", a)
	return a.order(t).OrderID
}

func (a answer) order(t testing.TB) httpapi.OrderBody {
	t.Helper()
	var o httpapi.OrderBody
	require.NoError(t, json.Unmarshal(a.body, &o), "%s", a)
	return o
}

// get returns the order as the API shows it.
func (s *system) get(t testing.TB, id string) httpapi.OrderBody {
	t.Helper()
	a := mustGet(t, s.api+"/v1/orders/"+id)
	require.Equal(t, http.StatusOK, a.status, "%s", a)
	return a.order(t)
}

// awaitDispatched waits until the order has a courier, and returns it.
func (s *system) awaitDispatched(t testing.TB, id string) httpapi.OrderBody {
	t.Helper()
	var o httpapi.OrderBody
	eventually(t, "order "+id+" is dispatched", func() error {
		if o = s.get(t, id); o.Status != "dispatched" || o.Dispatch == nil {
			return fmt.Errorf("it is %s", o.Status)
		}
		return nil
	})
	return o
}

// awaitSent waits until the outboxes of these databases are empty.
func (s *system) awaitSent(t testing.TB, databases ...string) {
	t.Helper()
	eventually(t, "everything is sent", func() error {
		for _, url := range databases {
			if n := count(t, url, "SELECT COUNT(*) FROM outbox"); n > 0 {
				return fmt.Errorf("%d events are in an outbox", n)
			}
		}
		return nil
	})
}

func (s *system) addCourier(t testing.TB, id string, capacity int) {
	t.Helper()
	a := mustSend(t, http.MethodPost, s.dispatchAPI+"/v1/couriers", fmt.Sprintf(`{"courier_id":%q,"name":%q,"capacity":%d}`, id, id, capacity))
	require.Equal(t, http.StatusCreated, a.status, "%s", a)
}

// orderRows and dispatchRows ask the tables themselves, past the program.
func (s *system) orderRows(t testing.TB, query string, args ...any) int {
	t.Helper()
	return count(t, s.order, query, args...)
}

func (s *system) dispatchRows(t testing.TB, query string, args ...any) int {
	t.Helper()
	return count(t, s.dispatch, query, args...)
}

var pools sync.Map // of *sqldb.DB by URL

// database opens a database for a test to look into.
func database(t testing.TB, url string) *sql.DB {
	t.Helper()
	if db, ok := pools.Load(url); ok {
		return db.(*sqldb.DB).Reader()
	}
	db, err := sqldb.Open("test", url, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	db.Reader().SetMaxOpenConns(2)
	pools.Store(url, db)
	t.Cleanup(func() {
		pools.Delete(url)
		_ = db.Close()
	})
	return db.Reader()
}

func count(t testing.TB, url, query string, args ...any) int {
	t.Helper()
	var n int
	require.NoError(t, database(t, url).QueryRow(query, args...).Scan(&n))
	return n
}

// processlist is servers.Processlist of the server that has the database.
func processlist(t testing.TB, url string) string {
	t.Helper()
	table, err := servers.Processlist(t.Context(), database(t, url))
	require.NoError(t, err)
	return table
}

// lockWaits counts the transactions on a database that wait for a lock. InnoDB renews what it tells of them only when nobody
// has asked for a tenth of a second, so that it must not be asked at once again.
func lockWaits(t testing.TB, url string) int {
	t.Helper()
	n := count(t, url, "SELECT COUNT(*) FROM information_schema.innodb_trx JOIN "+processlist(t, url)+" p "+
		"ON p.id = trx_mysql_thread_id WHERE p.db = DATABASE() AND trx_state = 'LOCK WAIT'")
	if n == 0 {
		time.Sleep(150 * time.Millisecond)
	}
	return n
}

// executing counts the connections to a database that are executing a statement LIKE this one.
func executing(t testing.TB, url, statement string) int {
	t.Helper()
	return count(t, url, "SELECT COUNT(*) FROM "+processlist(t, url)+" WHERE db = DATABASE() AND info LIKE ?", statement)
}

// noFailures checks that no message was given up.
func (s *system) noFailures(t testing.TB) {
	t.Helper()
	require.Zero(t, s.orderRows(t, "SELECT COUNT(*) FROM failure"), "failures of the order service")
	require.Zero(t, s.dispatchRows(t, "SELECT COUNT(*) FROM failure"), "failures of the dispatch service")
}

func parse(t testing.TB, rawURL string) *url.URL {
	t.Helper()
	u, err := url.Parse(rawURL)
	require.NoError(t, err)
	return u
}
