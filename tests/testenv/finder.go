package testenv

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Variables that users may set.
const (
	envForce       = "TAKEOUT_TEST_ENV"
	envMySQLURL    = "TAKEOUT_TEST_MYSQL_URL"
	envAMQPURL     = "TAKEOUT_TEST_AMQP_URL"
	envMySQLImage  = "TAKEOUT_TEST_MYSQL_IMAGE"
	envRabbitImage = "TAKEOUT_TEST_RABBITMQ_IMAGE"
)

// Variables that the runner sets for the test processes below it.
const (
	// envRunner says where the runner's servers came from, such as "mysql=native amqp=docker", so that
	// a private server comes from there too and nobody probes a second time.
	envRunner     = "TAKEOUT_TEST_RUNNER"
	envManagement = "TAKEOUT_TEST_AMQP_MANAGEMENT_URL"
)

type kind string

const (
	mysqlKind  kind = "mysql"
	rabbitKind kind = "amqp"
)

func (k kind) title() string {
	if k == mysqlKind {
		return "MySQL or MariaDB"
	}
	return "RabbitMQ"
}

func (k kind) urlVariable() string {
	if k == mysqlKind {
		return envMySQLURL
	}
	return envAMQPURL
}

// server is one MySQL, MariaDB or RabbitMQ that this process started and must end.
type server interface {
	url() *url.URL
	// among is host and port at which other servers of the tests reach it.
	among() (string, error)
	// management is the URL of RabbitMQ's management API, or "".
	management() string
	// start returns when the server accepts connections.
	start() error
	stop() error
	kill() error
	freeze() error
	thaw() error
	ctl(args ...string) (string, error)
	// close ends the server in any state and removes everything that belongs to it.
	close()
}

const mysqlPassword = "takeout-test"

// Servers are as durable as in production, and otherwise small: tests share the machine with them.
var mysqlSettings = []string{
	"--skip-name-resolve",
	"--character-set-server=utf8mb4",
	"--max-connections=500",
	"--innodb-buffer-pool-size=256M",
	"--innodb-flush-log-at-trx-commit=1",
}

// Two schedulers, which do not spin while they wait, and a port table of fixed size: Erlang otherwise
// reserves one for all files that may be open, and some Docker engines allow a billion.
const erlangSettings = "+S 2:2 +Q 65536 +sbwt none +sbwtdcpu none +sbwtdio none"

// address is the URL of a server that we started.
func address(k kind, host string, port int) *url.URL {
	u := &url.URL{Scheme: "mysql", User: url.UserPassword("root", mysqlPassword), Path: "/"}
	if k == rabbitKind {
		u.Scheme, u.User = "amqp", url.UserPassword("guest", "guest")
	}
	u.Host = net.JoinHostPort(host, strconv.Itoa(port))
	return u
}

// backend is one way to start servers of one kind.
type backend interface {
	// start starts a server. A shared RabbitMQ has the management API, a private one starts faster.
	// Settings are options of MySQL.
	start(shared bool, settings ...string) (server, error)
	// way is what TAKEOUT_TEST_ENV calls it.
	way() string
	String() string
}

// endpoint is a shared server, whoever started it.
type endpoint struct {
	url  *url.URL
	api  string
	from string
}

var (
	mainRuns atomic.Bool

	liveMu sync.Mutex
	live   = map[server]bool{}
	// starting counts the servers that are not live yet.
	starting atomic.Int32
	// closing is set when the process is about to end: servers that are starting give up.
	closing atomic.Bool

	sharedServers = map[kind]func() (*endpoint, error){
		mysqlKind:  sync.OnceValues(func() (*endpoint, error) { return findShared(mysqlKind) }),
		rabbitKind: sync.OnceValues(func() (*endpoint, error) { return findShared(rabbitKind) }),
	}
	backends = map[kind]func() (backend, error){
		mysqlKind:  sync.OnceValues(func() (backend, error) { return findBackend(mysqlKind) }),
		rabbitKind: sync.OnceValues(func() (backend, error) { return findBackend(rabbitKind) }),
	}
)

func findShared(k kind) (*endpoint, error) {
	given := os.Getenv(k.urlVariable())
	runner := os.Getenv(envRunner)
	force, err := forced()
	if err != nil {
		return nil, err
	}
	if given != "" && (runner != "" || force == "" || force == "urls") {
		u, err := readURL(k, given)
		if err != nil {
			return nil, err
		}
		e := &endpoint{url: u, from: "urls"}
		if k == rabbitKind {
			e.api = os.Getenv(envManagement)
		}
		if err := ping(k, u); err != nil {
			return nil, fmt.Errorf("testenv: %s is set, but %s does not answer; start it or unset the variable: %w", k.urlVariable(), u.Redacted(), err)
		}
		if runner == "" {
			say("%s at %s, from %s", product(k, u), u.Host, k.urlVariable())
		}
		return e, nil
	}
	if force == "urls" {
		return nil, fmt.Errorf("testenv: %s=urls, but %s is not set", envForce, k.urlVariable())
	}
	b, err := backends[k]()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	s, err := startOn(b, k, true)
	if err != nil {
		return nil, err
	}
	say("%s at %s, %s, ready in %.1f s", product(k, s.url()), s.url().Host, b, time.Since(began).Seconds())
	return &endpoint{url: s.url(), api: s.management(), from: b.way()}, nil
}

func forced() (string, error) {
	switch force := os.Getenv(envForce); force {
	case "", "urls", "docker", "native":
		return force, nil
	default:
		return "", fmt.Errorf("testenv: %s=%s is unknown; leave it unset, or use urls, docker or native", envForce, force)
	}
}

func readURL(k kind, given string) (*url.URL, error) {
	u, err := url.Parse(given)
	schemes := map[kind]string{mysqlKind: "mysql", rabbitKind: "amqp amqps"}[k]
	if err != nil || u.Host == "" || !strings.Contains(" "+schemes+" ", " "+u.Scheme+" ") {
		return nil, fmt.Errorf("testenv: %s is not of the form %s", k.urlVariable(), urlForm(k))
	}
	return u, nil
}

func urlForm(k kind) string {
	if k == mysqlKind {
		return "mysql://user:password@host:port/"
	}
	return "amqp://user:password@host:port/vhost"
}

// findBackend decides how servers of this kind are started.
func findBackend(k kind) (backend, error) {
	force, err := forced()
	if err != nil {
		return nil, err
	}
	for _, decided := range strings.Fields(os.Getenv(envRunner)) {
		if way, ok := strings.CutPrefix(decided, string(k)+"="); ok && way != "urls" {
			force = way
		}
	}
	var docker, native, install error
	if force != "native" {
		var d backend
		if d, docker = findDocker(k); docker == nil {
			return d, nil
		}
	}
	if force != "docker" {
		var n backend
		if n, native = findNative(k); native == nil {
			return n, nil
		}
		// Whoever names the servers to use does not expect software to be installed.
		if os.Getenv(k.urlVariable()) != "" && force != "native" {
			install = errors.New("not tried, because " + k.urlVariable() + " is set")
		} else if install = installPackage(k); install == nil {
			return findNative(k)
		}
	}
	return nil, missing(k, force, docker, native, install)
}

func missing(k kind, force string, docker, native, install error) error {
	var b strings.Builder
	fmt.Fprintf(&b, "testenv: there is no %s to test with", k.title())
	if force != "" {
		fmt.Fprintf(&b, " (%s=%s)", envForce, force)
	}
	program, pkg := "mariadbd or mysqld", "mariadb-server"
	if k == rabbitKind {
		program, pkg = "rabbitmq-server", "rabbitmq-server"
	}
	fmt.Fprintf(&b, ". Provide one in one of three ways:\n  1. set %s=%s", k.urlVariable(), urlForm(k))
	fmt.Fprintf(&b, "\n     (not for tests that stop their own server: these need 2 or 3)")
	fmt.Fprintf(&b, "\n  2. run a Docker engine that has the image %s or can pull it", image(k))
	if docker != nil {
		fmt.Fprintf(&b, "\n     (now: %v)", docker)
	}
	fmt.Fprintf(&b, "\n  3. install %s; on Debian and Ubuntu the package %s", program, pkg)
	for _, err := range []error{native, install} {
		if err != nil {
			fmt.Fprintf(&b, "\n     (now: %v)", err)
		}
	}
	return errors.New(b.String())
}

// newServer starts a server for one test.
func newServer(k kind, settings ...string) (server, error) {
	b, err := backends[k]()
	if err != nil {
		return nil, err
	}
	return startOn(b, k, false, settings...)
}

var errClosing = errors.New("the tests are ending")

func startOn(b backend, k kind, shared bool, settings ...string) (server, error) {
	starting.Add(1)
	defer starting.Add(-1)
	s, err := b.start(shared, settings...)
	if err != nil {
		return nil, fmt.Errorf("testenv: start %s (%s): %w", k.title(), b, err)
	}
	liveMu.Lock()
	defer liveMu.Unlock()
	if closing.Load() {
		s.close()
		return nil, errClosing
	}
	live[s] = true
	return s, nil
}

func closeServer(s server) {
	liveMu.Lock()
	mine := live[s]
	delete(live, s)
	liveMu.Unlock()
	if mine {
		s.close()
	}
}

// closeAll ends every server of this process, also those that are starting just now.
func closeAll() {
	closing.Store(true)
	for deadline := time.Now().Add(20 * time.Second); starting.Load() > 0 && time.Now().Before(deadline); {
		time.Sleep(10 * time.Millisecond)
	}
	liveMu.Lock()
	left := slices.Collect(maps.Keys(live))
	liveMu.Unlock()
	var wg sync.WaitGroup
	for _, s := range left {
		wg.Go(func() { closeServer(s) })
	}
	wg.Wait()
	// What is still there belonged to a test process that was killed.
	if e := foundEngine.Load(); e != nil {
		e.sweep()
	}
	sweepTempDirs()
}

// Shared are the servers that all test processes below one runner use.
type Shared struct{ mysql, amqp *endpoint }

// StartShared finds or starts one MySQL or MariaDB and one RabbitMQ, and says on stderr which.
// Close it also after an error.
func StartShared() (*Shared, error) {
	var s Shared
	if _, err := forced(); err != nil {
		return &s, err
	}
	var errs [2]error
	var wg sync.WaitGroup
	wg.Go(func() { s.mysql, errs[0] = sharedServers[mysqlKind]() })
	wg.Go(func() { s.amqp, errs[1] = sharedServers[rabbitKind]() })
	wg.Wait()
	return &s, errors.Join(errs[:]...)
}

// Environ returns the variables with which test processes find these servers.
func (s *Shared) Environ() []string {
	return []string{
		envMySQLURL + "=" + s.mysql.url.String(),
		envAMQPURL + "=" + s.amqp.url.String(),
		envManagement + "=" + s.amqp.api,
		fmt.Sprintf("%s=%s=%s %s=%s", envRunner, mysqlKind, s.mysql.from, rabbitKind, s.amqp.from),
	}
}

// Close ends everything that this process started.
func (s *Shared) Close() { closeAll() }

func say(format string, args ...any) { fmt.Fprintf(os.Stderr, "testenv: "+format+"\n", args...) }
