//go:build linux

package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/app"
	"takeout/ports/httpapi"
	"takeout/ports/messaging"
	"takeout/service"
	"takeout/verify/servers"
)

// stack is the servers that everything is measured on.
type stack struct {
	mysql, rabbitmq *servers.Server // nil if they are somebody else's
	database, queue *url.URL
	admin           *sql.DB
	dir             string
	made            int // sites so far
}

// memory is what a database server with a backlog of a million orders is given anywhere: without it the bench would measure
// how often pages are read and written again. A server that knows an option no longer only says so.
var memory = []string{"--innodb-buffer-pool-size=2G", "--loose-innodb-log-file-size=1G"}

// startStack starts a database server and a broker, or takes those that the environment names.
func startStack(ctx context.Context) (_ *stack, err error) {
	s := &stack{}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if s.dir, err = os.MkdirTemp("", "takeout-bench-"); err != nil {
		return nil, err
	}
	if s.mysql, s.database, err = serverAt(ctx, "TAKEOUT_BENCH_MYSQL_URL", servers.MySQL); err != nil {
		return nil, err
	}
	if s.rabbitmq, s.queue, err = serverAt(ctx, "TAKEOUT_BENCH_AMQP_URL", servers.RabbitMQ); err != nil {
		return nil, err
	}
	s.admin, err = servers.OpenMySQL(s.database)
	return s, err
}

func serverAt(ctx context.Context, variable string, k servers.Kind) (*servers.Server, *url.URL, error) {
	if text := os.Getenv(variable); text != "" {
		u, err := url.Parse(text)
		if err != nil || u.Host == "" {
			return nil, nil, fmt.Errorf("%s: must be %s://user:password@host:port/", variable, k)
		}
		return nil, u, nil
	}
	server, err := servers.Start(ctx, k, false, memory...)
	if err != nil {
		return nil, nil, fmt.Errorf("start %s: %w; or name one in %s", k.Title(), err, variable)
	}
	return server, server.URL(), nil
}

func (s *stack) close() {
	if s.admin != nil {
		_ = s.admin.Close()
	}
	for _, server := range []*servers.Server{s.mysql, s.rabbitmq} {
		if server != nil {
			server.Close()
		}
	}
	_ = os.RemoveAll(s.dir)
}

// processes returns the ids of the servers that are ours.
func (s *stack) processes() map[string]int {
	ids := map[string]int{}
	if s.mysql != nil {
		ids["mysql"] = s.mysql.PID()
	}
	if s.rabbitmq != nil {
		ids["rabbitmq"] = s.rabbitmq.PID()
	}
	return ids
}

// versions returns what the servers are.
func (s *stack) versions() map[string]string {
	database, _ := servers.Greet(servers.MySQL, s.database)
	broker, _ := servers.Greet(servers.RabbitMQ, s.queue)
	return map[string]string{"database": database, "broker": broker}
}

// newSite makes fresh databases and a fresh namespace. drop removes them again.
func (s *stack) newSite(ctx context.Context, kind string, embedded bool, settings ...string) (_ site, drop func(), err error) {
	s.made++
	name := fmt.Sprintf("bench_%d_%d", os.Getpid(), s.made)
	dir := filepath.Join(s.dir, name)
	if err := os.Mkdir(dir, 0o750); err != nil {
		return site{}, nil, err
	}
	made := site{Kind: kind, Dir: dir, Settings: settings, Broker: "embedded:"}
	urls := map[string]*string{"order": &made.Order, "dispatch": &made.Dispatch, "payment": &made.Payment, "points": &made.Points}
	if embedded {
		for service, address := range urls {
			*address = "sqlite:" + filepath.Join(dir, service+".db")
		}
		return made, func() { _ = os.RemoveAll(dir) }, nil
	}
	for service, address := range urls {
		u := *s.database
		u.Path = "/" + name + "_" + service
		*address = u.String()
		if _, err := s.admin.ExecContext(ctx, "CREATE DATABASE `"+u.Path[1:]+"` CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"); err != nil {
			return site{}, nil, err
		}
	}
	broker := *s.queue
	query := broker.Query()
	query.Set("namespace", name)
	broker.RawQuery = query.Encode()
	made.Broker = broker.String()
	return made, func() {
		for service := range urls {
			_, _ = s.admin.ExecContext(context.WithoutCancel(ctx), "DROP DATABASE IF EXISTS `"+name+"_"+service+"`")
		}
		s.deleteQueues(name)
		_ = os.RemoveAll(dir)
	}, nil
}

// deleteQueues removes what the systems declare in a namespace.
func (s *stack) deleteQueues(namespace string) {
	conn, err := amqp.Dial(s.queue.String())
	if err != nil {
		return
	}
	defer conn.Close()
	channel, err := conn.Channel()
	if err != nil {
		return
	}
	for _, route := range messaging.Topology(app.UseCases{}, true) {
		for _, queue := range []string{route.Queue, route.Queue + ".dead"} {
			_, _ = channel.QueueDelete(namespace+"."+queue, false, false, false)
		}
	}
	for i := range 4 {
		_, _ = channel.QueueDelete(fmt.Sprintf("%s.order.placed.%d", namespace, i), false, false, false)
	}
	_, _ = channel.QueueDelete(namespace+".order.placed_dispatch", false, false, false)
	_ = channel.ExchangeDelete(namespace+".order.placed", false, false)
	_ = channel.ExchangeDelete(namespace, false, false)
}

// prepare makes the product's tables and puts couriers on the roster.
func (s site) prepare(ctx context.Context) error {
	cfg, err := s.config()
	if err != nil {
		return err
	}
	if _, err := service.Migrate(ctx, cfg, slog.New(slog.DiscardHandler)); err != nil {
		return err
	}
	db, err := open(s.Dispatch, 1, false)
	if err != nil {
		return err
	}
	defer db.Close()
	_, err = db.ExecContext(ctx, "DELETE FROM courier")
	for _, id := range []string{"courier-1", "courier-2", "courier-3"} {
		if err == nil {
			_, err = db.ExecContext(ctx, "INSERT INTO courier (courier_id, name, on_duty, capacity, active) VALUES (?, ?, 1, 0, 0)", id, id)
		}
	}
	return err
}

// awaitReady returns when the process at the address is ready, broker and all.
func awaitReady(ctx context.Context, addr string) error {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: (&net.Dialer{}).DialContext}}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		status, err := readiness(client, addr)
		switch {
		case err == nil && status == "ready":
			return nil
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case time.Now().After(deadline):
			return errors.Join(fmt.Errorf("takeout at %s is not ready: %s", addr, status), err)
		}
	}
}

// readiness asks the process at the address how it is.
func readiness(client *http.Client, addr string) (string, error) {
	response, err := client.Get("http://" + addr + "/readyz")
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	var health httpapi.Health
	return health.Status, json.NewDecoder(response.Body).Decode(&health)
}
