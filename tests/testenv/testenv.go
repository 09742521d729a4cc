// Package testenv gives tests a real MySQL or MariaDB and a real RabbitMQ, wherever they run.
//
// It looks for them in this order and says on stderr what it took:
//
//  1. TAKEOUT_TEST_MYSQL_URL and TAKEOUT_TEST_AMQP_URL, servers that exist already;
//  2. containers, if a Docker engine answers and has the images or can pull them;
//  3. private processes in temporary directories, from programs installed on this machine;
//  4. on Debian and Ubuntu, as root: the same after installing mariadb-server and rabbitmq-server.
//
// If all fail the test fails and says how to provide them; nothing is ever skipped.
// TAKEOUT_TEST_ENV=urls|docker|native forces one way. The images are mysql:8.4 and rabbitmq:4-management, or
// TAKEOUT_TEST_MYSQL_IMAGE, which may be a MariaDB, and TAKEOUT_TEST_RABBITMQ_IMAGE.
//
// A package that uses [MySQL] or [AMQP] needs
//
//	func TestMain(m *testing.M) { testenv.Main(m) }
//
// Every test process then starts its own servers; those below tests/testenv/run share one of each.
package testenv

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"takeout/verify/servers"
)

// Main runs the tests of a package, stops every server that they started, also after a failure or an
// interrupt, and exits with their code. Call it last in TestMain.
func Main(m interface{ Run() int }) {
	mainRuns.Store(true)
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupted
		closeAll()
		os.Exit(130)
	}()
	code := m.Run()
	closeAll()
	os.Exit(code)
}

// MySQL returns mysql://user:password@host:port/database of an empty database with a unique name on the
// shared server. The database is dropped when the test ends.
func MySQL(t testing.TB) string {
	t.Helper()
	shared := needShared(t, servers.MySQL)
	name := "test_" + unique()
	if err := execute(shared.url, createDatabase+quoted(name)); err != nil {
		t.Fatalf("testenv: create a database on %s: %v; the user needs the right to create databases", shared.url.Redacted(), err)
	}
	t.Cleanup(func() {
		if err := execute(shared.url, "DROP DATABASE IF EXISTS "+quoted(name)); err != nil {
			t.Logf("testenv: database %s is left behind: %v", name, err)
		}
	})
	return withDatabase(shared.url, name)
}

// AMQP returns amqp://user:password@host:port/vhost?namespace=NAME of the shared broker, where NAME is
// unique. The tests' topology is the exchange NAME and the queues NAME.<queue>; what is left of both when
// the test ends is deleted if the broker has a management API that testenv knows, and else stays.
func AMQP(t testing.TB) string {
	t.Helper()
	shared := needShared(t, servers.RabbitMQ)
	name := "t" + unique()
	u := *shared.url
	query := u.Query()
	query.Set("namespace", name)
	u.RawQuery = query.Encode()
	t.Cleanup(func() {
		if err := deleteNamespace(shared, name); err != nil {
			t.Logf("testenv: namespace %s is left behind: %v", name, err)
		}
	})
	return u.String()
}

// MySQLServer is a MySQL or MariaDB of one test, which the test may stop, kill and freeze.
// Its methods fail the test when they cannot do what they say.
type MySQLServer struct{ private }

// StartMySQL starts a server for this test alone, and removes it when the test ends. Its address stays
// the same over Stop, Kill and Start, and its data too. Settings are options of its command line.
func StartMySQL(t testing.TB, settings ...string) *MySQLServer {
	t.Helper()
	return &MySQLServer{startPrivate(t, servers.MySQL, settings...)}
}

// URL returns mysql://user:password@host:port/db, after creating the database db if it is missing.
func (s *MySQLServer) URL(db string) string {
	s.t.Helper()
	if err := execute(s.server.URL(), createDatabase+quoted(db)); err != nil {
		s.t.Fatalf("testenv: create database %s: %v", db, err)
	}
	return withDatabase(s.server.URL(), db)
}

// Replicated is URL of a database that the server has, or will have, from another.
func (s *MySQLServer) Replicated(db string) string { return withDatabase(s.server.URL(), db) }

// Follow makes the server a replica that is sent whatever is written to primary from now on. Both must have been
// started with --log-bin and with a --server-id of their own.
func (s *MySQLServer) Follow(primary *MySQLServer) {
	s.t.Helper()
	if err := follow(s.server, primary.server); err != nil {
		s.t.Fatalf("testenv: replicate: %v", err)
	}
}

// RabbitMQServer is a broker of one test, which the test may stop, kill and freeze.
// Its methods, except Ctl, fail the test when they cannot do what they say.
type RabbitMQServer struct{ private }

// StartRabbitMQ starts a broker for this test alone, and removes it when the test ends. Its address
// stays the same over Stop, Kill and Start, and so do durable queues and persistent messages.
func StartRabbitMQ(t testing.TB) *RabbitMQServer {
	t.Helper()
	return &RabbitMQServer{startPrivate(t, servers.RabbitMQ)}
}

// URL returns amqp://user:password@host:port/.
func (s *RabbitMQServer) URL() string { return s.server.URL().String() }

// Ctl runs rabbitmqctl on the broker and returns what it printed.
func (s *RabbitMQServer) Ctl(args ...string) (string, error) { return s.server.Ctl(args...) }

// private is what both kinds of server of one test have in common.
type private struct {
	t      testing.TB
	server server
}

func startPrivate(t testing.TB, k servers.Kind, settings ...string) private {
	t.Helper()
	s, err := newServer(k, settings...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeServer(s) })
	return private{t, s}
}

// Start starts the server after Stop or Kill, and returns when it accepts connections.
func (p private) Start() { p.t.Helper(); p.must("start", p.server.Start()) }

// Stop ends the server in good order, as an administrator would, and returns when it has ended.
func (p private) Stop() { p.t.Helper(); p.must("stop", p.server.Stop()) }

// Kill ends the server with SIGKILL.
func (p private) Kill() { p.t.Helper(); p.must("kill", p.server.Kill()) }

// Freeze halts the server: it answers nothing, and its connections stay open.
func (p private) Freeze() { p.t.Helper(); p.must("freeze", p.server.Freeze()) }

// Thaw lets a frozen server continue.
func (p private) Thaw() { p.t.Helper(); p.must("thaw", p.server.Thaw()) }

func (p private) must(verb string, err error) {
	if err != nil {
		p.t.Helper()
		p.t.Fatalf("testenv: %s the server: %v", verb, err)
	}
}

func needShared(t testing.TB, k servers.Kind) *endpoint {
	t.Helper()
	if !mainRuns.Load() {
		t.Fatal("testenv: this package needs func TestMain(m *testing.M) { testenv.Main(m) }, " +
			"else nobody stops the servers that its tests share")
	}
	shared, err := sharedServers[k]()
	if err != nil {
		t.Fatal(err)
	}
	return shared
}

const createDatabase = "CREATE DATABASE IF NOT EXISTS "

func quoted(name string) string { return "`" + strings.ReplaceAll(name, "`", "``") + "`" }

func unique() string { return strings.ToLower(rand.Text()[:14]) }

func withDatabase(server *url.URL, name string) string {
	u := *server
	u.Path = "/" + name
	return u.String()
}

func execute(server *url.URL, statement string) error {
	db, err := servers.OpenMySQL(server)
	if err != nil {
		return err
	}
	defer db.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	_, err = db.ExecContext(ctx, statement)
	return err
}

func follow(replica, primary server) error {
	address, err := primary.Among()
	if err != nil {
		return err
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return err
	}
	db, err := servers.OpenMySQL(primary.URL())
	if err != nil {
		return err
	}
	defer db.Close()
	status, change := "SHOW MASTER STATUS", "CHANGE MASTER TO MASTER_HOST='%s', MASTER_PORT=%s, MASTER_USER='root', MASTER_PASSWORD='%s', "+
		"MASTER_LOG_FILE='%s', MASTER_LOG_POS=%s"
	rows, err := db.Query(status)
	if err != nil { // MySQL 8.4 has other words for it
		status, change = "SHOW BINARY LOG STATUS", "CHANGE REPLICATION SOURCE TO SOURCE_HOST='%s', SOURCE_PORT=%s, SOURCE_USER='root', "+
			"SOURCE_PASSWORD='%s', SOURCE_LOG_FILE='%s', SOURCE_LOG_POS=%s, GET_SOURCE_PUBLIC_KEY=1"
		if rows, err = db.Query(status); err != nil {
			return err
		}
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		return err
	}
	values := make([]sql.NullString, max(2, len(columns)))
	targets := make([]any, len(columns))
	for i := range targets {
		targets[i] = &values[i]
	}
	if !rows.Next() {
		return errors.Join(errors.New("the primary writes no binary log"), rows.Err())
	}
	if err := rows.Scan(targets...); err != nil {
		return err
	}
	if err := execute(replica.URL(), fmt.Sprintf(change, host, port, servers.Password, values[0].String, values[1].String)); err != nil {
		return err
	}
	return execute(replica.URL(), "START REPLICA")
}

// deleteNamespace deletes exchanges and queues over the management API, because AMQP cannot list them.
func deleteNamespace(broker *endpoint, name string) error {
	if broker.api == "" {
		return nil
	}
	vhost := strings.TrimPrefix(broker.url.Path, "/")
	if vhost == "" {
		vhost = "/"
	}
	for _, collection := range []string{"queues", "exchanges"} {
		list := broker.api + "/api/" + collection + "/" + url.PathEscape(vhost)
		var found []struct{ Name string }
		if err := manage(http.MethodGet, list+"?columns=name", &found); err != nil {
			return err
		}
		for _, item := range found {
			if item.Name != name && !strings.HasPrefix(item.Name, name+".") {
				continue
			}
			if err := manage(http.MethodDelete, list+"/"+url.PathEscape(item.Name), nil); err != nil {
				return err
			}
		}
	}
	return nil
}

func manage(method, address string, answer any) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, address, nil)
	if err != nil {
		return err
	}
	// Kept-alive connections would look like leaked goroutines to tests that check for those.
	request.Close = true
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode >= 300 && response.StatusCode != http.StatusNotFound {
		return fmt.Errorf("%s %s: %s", method, request.URL.Redacted(), response.Status)
	}
	if answer == nil {
		return nil
	}
	return json.NewDecoder(response.Body).Decode(answer)
}
