//go:build unix

package verify

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"

	"takeout/adapters/sqlbroker"
	"takeout/adapters/sqldb"
	"takeout/app"
	"takeout/ports/messaging"
	"takeout/verify/proxy"
	"takeout/verify/servers"
)

// services are those whose databases are compared.
var services = []string{"order", "dispatch", "payment", "points"}

// stack is the databases and the broker of one run.
type stack struct {
	databases map[string]string // by service: how the checker reaches them
	settings  []string          // how the program does

	mysql, rabbitmq   *servers.Server // nil if they are not ours to break
	sqlProxy, mqProxy *proxy.Proxy    // nil without servers
	amqpURL           string          // of the broker itself, empty for embedded queues
	namespace         string          // exchange, and prefix of the queues
	brokerDatabase    string          // of embedded queues

	admin   *sql.DB // of MySQL
	schemas []string
	logger  *slog.Logger
}

func newEmbedded(dir string, logger *slog.Logger) *stack {
	s := &stack{databases: map[string]string{}, brokerDatabase: "sqlite:" + filepath.Join(dir, "broker.db"), logger: logger}
	for _, service := range services {
		s.databases[service] = "sqlite:" + filepath.Join(dir, service+".db")
	}
	s.settings = []string{"TAKEOUT_DATA_DIR=" + dir}
	return s
}

// newServers starts a MySQL and a RabbitMQ, or takes those whose URLs are given, and puts a proxy before each.
func newServers(ctx context.Context, mysqlURL, amqpURL, run string, logger *slog.Logger) (_ *stack, err error) {
	s := &stack{databases: map[string]string{}, namespace: "verify-" + run, logger: logger}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if mysqlURL == "" {
		if s.mysql, err = servers.Start(ctx, servers.MySQL, false); err != nil {
			return nil, fmt.Errorf("start a database server of our own: %w; or name one in TAKEOUT_VERIFY_MYSQL_URL", err)
		}
		mysqlURL = s.mysql.URL().String()
	}
	if amqpURL == "" {
		if s.rabbitmq, err = servers.Start(ctx, servers.RabbitMQ, false); err != nil {
			return nil, fmt.Errorf("start a broker of our own: %w; or name one in TAKEOUT_VERIFY_AMQP_URL", err)
		}
		amqpURL = s.rabbitmq.URL().String()
	}
	db, err := url.Parse(mysqlURL)
	if err != nil || db.Scheme != "mysql" || db.Host == "" {
		return nil, errors.New("TAKEOUT_VERIFY_MYSQL_URL: must be mysql://user:password@host:port/")
	}
	mq, err := url.Parse(amqpURL)
	if err != nil || mq.Scheme != "amqp" || mq.Host == "" {
		return nil, errors.New("TAKEOUT_VERIFY_AMQP_URL: must be amqp://user:password@host:port/vhost")
	}
	s.amqpURL = mq.String()
	for kind, server := range map[servers.Kind]*url.URL{servers.MySQL: db, servers.RabbitMQ: mq} {
		if _, err := servers.Greet(kind, server); err != nil {
			return nil, fmt.Errorf("%s at %s: %w", kind.Title(), server.Host, err)
		}
	}
	if s.sqlProxy, err = proxy.Listen(withPort(db, "3306"), proxy.MySQL); err != nil {
		return nil, err
	}
	if s.mqProxy, err = proxy.Listen(withPort(mq, "5672"), proxy.AMQP); err != nil {
		return nil, err
	}
	if s.admin, err = servers.OpenMySQL(db); err != nil {
		return nil, err
	}
	for _, service := range services {
		direct := *db
		direct.Path = "/verify_" + run + "_" + service
		s.databases[service] = direct.String()
		s.schemas = append(s.schemas, direct.Path[1:])
	}
	user := db.User
	if s.mysql != nil {
		// Not an administrator, for whom a read-only server is not read-only.
		user = url.UserPassword("takeout", servers.Password)
		for _, statement := range []string{
			"CREATE USER 'takeout'@'127.0.0.1' IDENTIFIED BY '" + servers.Password + "'",
			"GRANT ALL ON `verify\\_%`.* TO 'takeout'@'127.0.0.1'",
		} {
			if _, err := s.admin.ExecContext(ctx, statement); err != nil {
				return nil, err
			}
		}
	}
	base := url.URL{Scheme: "mysql", User: user, Host: s.sqlProxy.Addr(), Path: "/verify_" + run}
	through := *mq
	through.Host = s.mqProxy.Addr()
	query := through.Query()
	query.Set("namespace", s.namespace)
	through.RawQuery = query.Encode()
	s.settings = []string{"TAKEOUT_DATABASE_URL=" + base.String(), "TAKEOUT_BROKER_URL=" + through.String()}
	return s, nil
}

func withPort(u *url.URL, port string) string {
	if u.Port() != "" {
		return u.Host
	}
	return u.Host + ":" + port
}

// close removes what the run made. It ends our own servers, and leaves others as they were.
func (s *stack) close() {
	if s.admin != nil {
		if s.mysql == nil {
			for _, schema := range s.schemas {
				_, _ = s.admin.Exec("DROP DATABASE IF EXISTS `" + schema + "`")
			}
		}
		_ = s.admin.Close()
	}
	if s.amqpURL != "" && s.rabbitmq == nil {
		_ = s.onChannel(func(ch *amqp.Channel) error {
			for _, queue := range queues() {
				_, _ = ch.QueueDelete(s.namespace+"."+queue, false, false, false)
				_, _ = ch.QueueDelete(s.namespace+"."+queue+".dead", false, false, false)
			}
			return ch.ExchangeDelete(s.namespace, false, false)
		})
	}
	for _, p := range []*proxy.Proxy{s.sqlProxy, s.mqProxy} {
		if p != nil {
			_ = p.Close()
		}
	}
	for _, server := range []*servers.Server{s.mysql, s.rabbitmq} {
		if server != nil {
			server.Close()
		}
	}
}

// heal undoes whatever the faults did to the stack.
func (s *stack) heal() error {
	for _, server := range []*servers.Server{s.mysql, s.rabbitmq} {
		if server == nil {
			continue
		}
		if !server.Running() {
			if err := server.Start(); err != nil {
				return err
			}
		}
		_ = server.Thaw()
	}
	for _, p := range []*proxy.Proxy{s.sqlProxy, s.mqProxy} {
		if p != nil {
			p.Refuse(false)
			p.Blackhole(false)
			p.Slow(0, 0)
		}
	}
	return nil
}

// queues are the names of all queues.
func queues() []string {
	var names []string
	for _, route := range routes() {
		names = append(names, route.Queue)
	}
	return names
}

func routes() []messaging.Route { return messaging.Topology(app.UseCases{}, true) }

// onChannel does something with the broker itself, past the proxy.
func (s *stack) onChannel(do func(*amqp.Channel) error) error {
	conn, err := amqp.DialConfig(s.amqpURL, amqp.Config{Dial: amqp.DefaultDial(5 * time.Second)})
	if err != nil {
		return err
	}
	defer conn.Close()
	ch, err := conn.Channel()
	if err != nil {
		return err
	}
	return do(ch)
}

// held returns what the broker holds, by queue.
func (s *stack) held(ctx context.Context) (map[string]int, error) {
	held := map[string]int{}
	switch {
	case s.rabbitmq != nil:
		// Passive declaration does not count what consumers hold.
		out, err := s.rabbitmq.Ctl("list_queues", "--quiet", "--no-table-headers", "name", "messages")
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(out) {
			var name string
			var n int
			if _, err := fmt.Sscan(line, &name, &n); err == nil && n > 0 && strings.HasPrefix(name, s.namespace+".") {
				held[strings.TrimPrefix(name, s.namespace+".")] = n
			}
		}
		return held, nil
	case s.amqpURL != "":
		return held, s.onChannel(func(ch *amqp.Channel) error {
			for _, queue := range queues() {
				q, err := ch.QueueDeclarePassive(s.namespace+"."+queue, true, false, false, false, nil)
				if err != nil {
					return err
				}
				if q.Messages > 0 {
					held[queue] = q.Messages
				}
			}
			return nil
		})
	}
	db, err := sqldb.Open("broker", s.brokerDatabase, s.logger)
	if err != nil {
		return nil, err
	}
	defer db.Close()
	rows, err := db.Reader().QueryContext(ctx, "SELECT queue, COUNT(*) FROM broker_message GROUP BY queue")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var queue string
		var n int
		if err := rows.Scan(&queue, &n); err != nil {
			return nil, err
		}
		held[queue] = n
	}
	return held, rows.Err()
}

// publish sends a message to the exchange as a stranger would, past the proxy.
func (s *stack) publish(ctx context.Context, key string, copies int, p amqp.Publishing) error {
	if s.amqpURL == "" {
		return s.publishEmbedded(key, copies, p)
	}
	return s.onChannel(func(ch *amqp.Channel) error {
		if err := ch.Confirm(false); err != nil {
			return err
		}
		var last *amqp.DeferredConfirmation
		for range copies {
			var err error
			if last, err = ch.PublishWithDeferredConfirm(s.namespace, key, true, false, p); err != nil {
				return err
			}
		}
		confirmed, err := last.WaitContext(ctx)
		if err == nil && !confirmed {
			err = errors.New("the broker refused the message")
		}
		return err
	})
}

func (s *stack) publishEmbedded(key string, copies int, p amqp.Publishing) error {
	broker, err := sqlbroker.Open(s.brokerDatabase, sqlbroker.Config{}, s.logger)
	if err != nil {
		return err
	}
	msg := newMessage(p)
	for range copies {
		if err = broker.Publish(key, msg); err != nil {
			break
		}
	}
	return errors.Join(err, broker.Close())
}

// unsettled returns what is on its way in the databases, by what it is: events in outboxes, and messages that wait to be
// tried again.
func (s *stack) unsettled(ctx context.Context) (map[string]int, error) {
	left := map[string]int{}
	for service, address := range s.databases {
		db, err := sqldb.Open(service, address, s.logger)
		if err != nil {
			return nil, err
		}
		for _, table := range []string{"outbox", "retry"} {
			var n int
			if err := db.Reader().QueryRowContext(ctx, "SELECT COUNT(*) FROM "+table).Scan(&n); err != nil {
				_ = db.Close()
				return nil, err
			}
			if n > 0 {
				left[service+"."+table] = n
			}
		}
		_ = db.Close()
	}
	return left, nil
}
