//go:build unix

package verify

import (
	"context"
	"database/sql"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/adapters/sqldb"
	"takeout/ports/messaging"
	"takeout/verify/servers"
)

// brokerFaults break RabbitMQ. Orders must be taken meanwhile as if nothing were wrong.
var brokerFaults = []kind{
	{name: "broker-kill", group: "broker", on: Servers, broker: true, inflict: withOurs(rabbitOf, killServer)},
	{name: "broker-restart", group: "broker", on: Servers, broker: true, inflict: withOurs(rabbitOf, restartServer)},
	{name: "broker-freeze", group: "broker", on: Servers, broker: true, inflict: withOurs(rabbitOf, freezeServer)},
	{name: "memory-alarm", group: "broker", on: Servers, broker: true, inflict: alarm(
		[]string{"set_vm_memory_high_watermark", "0.0000001"}, []string{"set_vm_memory_high_watermark", "0.4"})},
	{name: "disk-alarm", group: "broker", on: Servers, broker: true, inflict: alarm(
		[]string{"set_disk_free_limit", "100000GB"}, []string{"set_disk_free_limit", "50MB"})},
	{name: "reject-publish", group: "broker", on: Servers, broker: true, inflict: alarm(
		[]string{"set_policy", "verify", ".*", `{"max-length":1,"overflow":"reject-publish"}`, "--apply-to", "queues"}, []string{"clear_policy", "verify"})},
	{name: "close-connections", group: "broker", on: Servers, broker: true, inflict: alarm(
		[]string{"close_all_connections", "because of the run"}, nil)},
	{name: "unbind", group: "broker", on: Servers, broker: true, inflict: unbind(true)},
	{name: "unbind-one-of-many", group: "broker", on: Servers, broker: true, hurts: true, inflict: unbind(false)},
	{name: "delete-exchange", group: "broker", on: Servers, broker: true, hurts: true, inflict: deleteExchange},
	{name: "delete-queue", group: "broker", on: Servers, broker: true, hurts: true, inflict: deleteQueue},
}

// databaseFaults break MySQL, or get in the way of SQLite.
var databaseFaults = []kind{
	{name: "db-kill", group: "db", on: Servers, inflict: withOurs(mysqlOf, killServer)},
	{name: "db-restart", group: "db", on: Servers, inflict: withOurs(mysqlOf, restartServer)},
	{name: "db-freeze", group: "db", on: Servers, inflict: withOurs(mysqlOf, freezeServer)},
	{name: "db-read-only", group: "db", on: Servers, inflict: withOurs(mysqlOf, readOnly)},
	{name: "db-kill-connections", group: "db", on: Servers, inflict: withOurs(mysqlOf, killConnections)},
	{name: "db-few-connections", group: "db", on: Servers, inflict: withOurs(mysqlOf, fewConnections)},
	{name: "db-time-zone", group: "db", on: Servers, inflict: withOurs(mysqlOf, timeZone)},
	{name: "db-lock", group: "db", inflict: lockOrders},
}

func rabbitOf(s *stack) *servers.Server { return s.rabbitmq }
func mysqlOf(s *stack) *servers.Server  { return s.mysql }

type serverFault func(ctx context.Context, r *run, server *servers.Server, rnd *rand.Rand) (string, error)

// withOurs does something to a server that was started for the run. Other people's servers are left alone.
func withOurs(which func(*stack) *servers.Server, do serverFault) func(context.Context, *run, *rand.Rand) (string, error) {
	return func(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
		server := which(r.stack)
		if server == nil {
			return "", fmt.Errorf("%w: the server is not ours", errMissed)
		}
		return do(ctx, r, server, rnd)
	}
}

func killServer(ctx context.Context, _ *run, server *servers.Server, rnd *rand.Rand) (string, error) {
	if err := server.Kill(); err != nil {
		return "", err
	}
	d := hold(ctx, rnd, 0, 3*time.Second)
	return fmt.Sprintf("killed, away for %s and its start", d), server.Start()
}

func restartServer(ctx context.Context, _ *run, server *servers.Server, rnd *rand.Rand) (string, error) {
	if err := server.Stop(); err != nil {
		return "", err
	}
	d := hold(ctx, rnd, 0, time.Second)
	return fmt.Sprintf("stopped, away for %s and its start", d), server.Start()
}

func freezeServer(ctx context.Context, _ *run, server *servers.Server, rnd *rand.Rand) (string, error) {
	if err := server.Freeze(); err != nil {
		return "", err
	}
	d := hold(ctx, rnd, time.Second, 7*time.Second)
	return fmt.Sprintf("frozen for %s", d), server.Thaw()
}

// alarm runs a command of rabbitmqctl, waits, and runs another that takes it back.
func alarm(set, back []string) func(context.Context, *run, *rand.Rand) (string, error) {
	return withOurs(rabbitOf, func(ctx context.Context, _ *run, server *servers.Server, rnd *rand.Rand) (string, error) {
		if _, err := server.Ctl(set...); err != nil {
			return "", err
		}
		d := hold(ctx, rnd, time.Second, 4*time.Second)
		if back == nil {
			return strings.Join(set, " "), nil
		}
		_, err := server.Ctl(back...)
		return fmt.Sprintf("%s for %s", set[0], d), err
	})
}

// unbind takes a queue's binding away. If it was the only one of its key, what is published comes back to its relay, which
// must bind it again. If others are bound to the key, the broker sees nothing wrong, and what is published meanwhile is
// missing in that queue: only reconciliation can make that good.
func unbind(only bool) func(context.Context, *run, *rand.Rand) (string, error) {
	return func(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
		bound := map[string]int{}
		for _, route := range routes() {
			bound[route.Event]++
		}
		candidates := slices.DeleteFunc(routes(), func(route messaging.Route) bool { return (bound[route.Event] == 1) != only })
		route := candidates[rnd.IntN(len(candidates))]
		err := r.stack.onChannel(func(ch *amqp.Channel) error {
			return ch.QueueUnbind(r.stack.namespace+"."+route.Queue, route.Event, r.stack.namespace, nil)
		})
		hold(ctx, rnd, time.Second, 2*time.Second)
		return fmt.Sprintf("%s is not bound to %s any more", route.Queue, route.Event), err
	}
}

// deleteExchange takes all bindings away. While they are made again one by one, what is published reaches some queues and
// not others.
func deleteExchange(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	err := r.stack.onChannel(func(ch *amqp.Channel) error { return ch.ExchangeDelete(r.stack.namespace, false, false) })
	hold(ctx, rnd, time.Second, 2*time.Second)
	return "the exchange is deleted", err
}

// deleteQueue destroys messages, which only reconciliation can make good.
func deleteQueue(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	names := queues()
	queue := names[rnd.IntN(len(names))]
	var lost int
	err := r.stack.onChannel(func(ch *amqp.Channel) (err error) {
		lost, err = ch.QueueDelete(r.stack.namespace+"."+queue, false, false, false)
		return err
	})
	hold(ctx, rnd, time.Second, 2*time.Second)
	return fmt.Sprintf("queue %s is deleted, with %d messages", queue, lost), err
}

func readOnly(ctx context.Context, r *run, _ *servers.Server, rnd *rand.Rand) (string, error) {
	return r.stack.set(ctx, rnd, "SET GLOBAL read_only=1", "SET GLOBAL read_only=0")
}

func timeZone(ctx context.Context, r *run, server *servers.Server, rnd *rand.Rand) (string, error) {
	detail, err := r.stack.set(ctx, rnd, "SET GLOBAL time_zone='+13:00'", "SET GLOBAL time_zone='SYSTEM'")
	if err == nil { // those that began meanwhile
		_, err = killConnections(ctx, r, server, rnd)
	}
	return detail, err
}

func fewConnections(ctx context.Context, r *run, server *servers.Server, rnd *rand.Rand) (string, error) {
	if _, err := r.stack.admin.ExecContext(ctx, "SET GLOBAL max_connections=10"); err != nil {
		return "", err
	}
	_, err := killConnections(ctx, r, server, rnd)
	hold(ctx, rnd, time.Second, 3*time.Second)
	for range 20 { // all connections may be taken
		_, backErr := r.stack.admin.ExecContext(context.WithoutCancel(ctx), "SET GLOBAL max_connections=500")
		if backErr == nil {
			return "no more than 10 connections", err
		}
		err = backErr
		pause(ctx, 100*time.Millisecond)
	}
	return "", err
}

// set changes a setting of MySQL for a while.
func (s *stack) set(ctx context.Context, rnd *rand.Rand, change, back string) (string, error) {
	if _, err := s.admin.ExecContext(ctx, change); err != nil {
		return "", err
	}
	d := hold(ctx, rnd, time.Second, 4*time.Second)
	_, err := s.admin.ExecContext(context.WithoutCancel(ctx), back)
	return fmt.Sprintf("%s for %s", strings.TrimPrefix(change, "SET GLOBAL "), d), err
}

func killConnections(ctx context.Context, r *run, _ *servers.Server, _ *rand.Rand) (string, error) {
	processlist, err := servers.Processlist(ctx, r.stack.admin)
	if err != nil {
		return "", err
	}
	rows, err := r.stack.admin.QueryContext(ctx, "SELECT id FROM "+processlist+" WHERE user = 'takeout'")
	if err != nil {
		return "", err
	}
	defer rows.Close()
	var ids []int64
	for rows.Next() {
		var id int64
		if err := rows.Scan(&id); err != nil {
			return "", err
		}
		ids = append(ids, id)
	}
	if err := rows.Err(); err != nil {
		return "", err
	}
	for _, id := range ids {
		_, _ = r.stack.admin.ExecContext(ctx, fmt.Sprintf("KILL %d", id)) // it may have ended
	}
	return fmt.Sprintf("%d connections killed", len(ids)), nil
}

// lockOrders holds the newest orders, or all of SQLite's file, for a while.
func lockOrders(ctx context.Context, r *run, rnd *rand.Rand) (string, error) {
	service := services[rnd.IntN(2)]
	db, err := sqldb.Open(service, r.stack.databases[service], r.stack.logger)
	if err != nil {
		return "", err
	}
	defer db.Close()
	tx, err := db.Writer().BeginTx(ctx, nil)
	if err != nil {
		return "", err
	}
	defer func() { _ = tx.Rollback() }()
	table := map[string]string{"order": "order_info", "dispatch": "platoon"}[service]
	rows, err := tx.QueryContext(ctx, "SELECT id FROM "+table+" ORDER BY id DESC LIMIT 100"+db.ForUpdate)
	if err != nil {
		return "", err
	}
	if err := drain(rows); err != nil {
		return "", err
	}
	d := hold(ctx, rnd, time.Second, 4*time.Second)
	return fmt.Sprintf("the newest rows of %s are locked for %s", table, d), nil
}

func drain(rows *sql.Rows) error {
	defer rows.Close()
	for rows.Next() {
	}
	return rows.Err()
}

// chosen returns one of them.
func chosen[T any](rnd *rand.Rand, from ...T) T { return from[rnd.IntN(len(from))] }
