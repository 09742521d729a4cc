// Package service puts the program together: configuration, the order in which the parts start and stop, and what
// they say about their health. Tests start the real program through it.
package service

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"takeout/adapters/sqldb"
	"takeout/ports/messaging"
)

// Config is everything that can be set. The tags are kong's: a flag, an environment variable, a default and a line of
// help each. A secret may also come from the file that the variable with _FILE behind its name points to.
type Config struct {
	HTTPAddr string   `name:"http-addr" env:"TAKEOUT_HTTP_ADDR" default:"127.0.0.1:8080" help:"Address to serve HTTP on."`
	Roles    []string `env:"TAKEOUT_ROLES" default:"all" help:"What this process does: all, or some of order,relay,dispatch."`
	DataDir  string   `env:"TAKEOUT_DATA_DIR" default:"./data" help:"Directory of the SQLite files."`

	DatabaseURL         string `name:"database-url" env:"TAKEOUT_DATABASE_URL" help:"One server for all services: mysql://user:password@host:port/prefix. Each service has the database <prefix>_<service>; the prefix is takeout if absent."`
	OrderDatabaseURL    string `name:"order-database-url" env:"TAKEOUT_ORDER_DATABASE_URL" help:"Database of the order service: sqlite:PATH or mysql://user:password@host:port/database."`
	DispatchDatabaseURL string `name:"dispatch-database-url" env:"TAKEOUT_DISPATCH_DATABASE_URL" help:"Database of the dispatch service."`
	PaymentDatabaseURL  string `name:"payment-database-url" env:"TAKEOUT_PAYMENT_DATABASE_URL" help:"Database of the payment service. No role of this version uses it."`
	PointsDatabaseURL   string `name:"points-database-url" env:"TAKEOUT_POINTS_DATABASE_URL" help:"Database of the points service. No role of this version uses it."`
	BrokerURL           string `name:"broker-url" env:"TAKEOUT_BROKER_URL" default:"embedded:" help:"embedded: (in this process), amqp://user:password@host:port/vhost, sql:mysql://… or sql: (beside the orders)."`

	Migrate      bool          `env:"TAKEOUT_MIGRATE" default:"true" negatable:"" help:"Bring the databases up to date at start; otherwise only check them."`
	Prefetch     int           `env:"TAKEOUT_PREFETCH" default:"200" help:"The most messages in flight for each queue (1 to 5000)."`
	DrainTimeout time.Duration `env:"TAKEOUT_DRAIN_TIMEOUT" default:"20s" help:"How long messages in flight may take when stopping (1s to 10m)."`
	StartTimeout time.Duration `env:"TAKEOUT_START_TIMEOUT" default:"30s" help:"How long to wait for the databases at start."`

	LogLevel  string `env:"TAKEOUT_LOG_LEVEL" default:"info" enum:"debug,info,warn,error" help:"The least that is logged: debug, info, warn or error."`
	LogFormat string `env:"TAKEOUT_LOG_FORMAT" default:"auto" enum:"auto,text,json" help:"text, json, or auto: text on a terminal and json elsewhere."`
}

// roles returns the roles of the process.
func (c *Config) roles() []messaging.Role {
	if slices.Contains(c.Roles, "all") {
		return messaging.Roles
	}
	var roles []messaging.Role
	for _, r := range c.Roles {
		roles = append(roles, messaging.Role(r))
	}
	return roles
}

func (c *Config) has(role messaging.Role) bool { return slices.Contains(c.roles(), role) }

// SettingError says which setting is wrong and why.
type SettingError struct{ error }

// Unwrap returns what was wrong with it.
func (e *SettingError) Unwrap() error { return e.error }

// setting is a complaint about one setting: a SettingError, unless the setting is right and the network is not.
func setting(flag, format string, args ...any) error {
	env := "TAKEOUT_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
	err := fmt.Errorf("--"+flag+" ("+env+"): "+format, args...)
	if _, ok := errors.AsType[*net.OpError](err); ok {
		return err
	}
	return &SettingError{err}
}

// Validate returns what is wrong with the settings, naming the first that is, without any password.
func (c *Config) Validate() error {
	for _, r := range c.Roles {
		if r != "all" && !slices.Contains(messaging.Roles, messaging.Role(r)) {
			return setting("roles", "there is no role %q; the roles are all, order, relay and dispatch", r)
		}
	}
	if len(c.Roles) == 0 {
		return setting("roles", "at least one role is needed")
	}
	if _, port, err := net.SplitHostPort(c.HTTPAddr); err != nil || !validPort(port) {
		return setting("http-addr", "must be host:port with a port from 0 to 65535, such as 127.0.0.1:8080")
	}
	if c.Prefetch < 1 || c.Prefetch > 5000 {
		return setting("prefetch", "must be between 1 and 5000")
	}
	if c.DrainTimeout < time.Second || c.DrainTimeout > 10*time.Minute {
		return setting("drain-timeout", "must be between 1s and 10m")
	}
	if c.StartTimeout < 0 || c.StartTimeout > time.Hour {
		return setting("start-timeout", "must be between 0s and 1h")
	}
	if c.DatabaseURL != "" && !strings.HasPrefix(c.DatabaseURL, "mysql://") {
		return setting("database-url", "must start with mysql://; SQLite files go to --data-dir")
	}
	scheme, _, _ := strings.Cut(c.BrokerURL, ":")
	if !slices.Contains([]string{"embedded", "sql", "amqp", "amqps"}, scheme) || !strings.Contains(c.BrokerURL, ":") {
		return setting("broker-url", "must be embedded:, sql:, sql:mysql://… or amqp://…")
	}
	if c.embeddedBroker() && len(c.roles()) != len(messaging.Roles) {
		return setting("broker-url", "the embedded broker serves one process that runs all roles; "+
			"for several processes set amqp://… or sql:mysql://…")
	}
	owner := map[string]string{}
	for _, service := range []string{"order", "dispatch", "payment", "points"} {
		url := c.databaseURL(service)
		if other := owner[url]; other != "" {
			return setting(service+"-database-url", "is the %s service's database; each service needs one of its own", other)
		}
		owner[url] = service
		flag := service + "-database-url"
		if c.ownDatabaseURL(service) == "" && c.DatabaseURL != "" {
			flag = "database-url"
		}
		if err := checkDatabaseURL(service, url); err != nil {
			return setting(flag, "%w", err)
		}
	}
	if scheme == "sql" {
		if err := checkDatabaseURL("broker", c.brokerDatabaseURL()); err != nil {
			return setting("broker-url", "%w", err)
		}
	}
	return nil
}

// checkDatabaseURL tells whether the URL can be used, without connecting.
func checkDatabaseURL(name, rawURL string) error {
	db, err := sqldb.Open(name, rawURL, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	if u, err := url.Parse(rawURL); err == nil && u.Port() != "" && !validPort(u.Port()) {
		return fmt.Errorf("the %s database URL has a port that is not from 0 to 65535", name)
	}
	return db.Close()
}

func validPort(s string) bool {
	var port int
	if _, err := fmt.Sscanf(s, "%d", &port); err != nil || fmt.Sprint(port) != s {
		return false
	}
	return port >= 0 && port <= 65535
}

func (c *Config) embeddedBroker() bool { return strings.HasPrefix(c.BrokerURL, "embedded:") }

// databaseURL returns the URL of a service's database.
func (c *Config) databaseURL(service string) string {
	if own := c.ownDatabaseURL(service); own != "" {
		return own
	}
	if c.DatabaseURL != "" {
		base, query, hasQuery := strings.Cut(c.DatabaseURL, "?")
		server, prefix := strings.TrimSuffix(base, "/"), "takeout"
		if authority := strings.TrimPrefix(server, "mysql://"); strings.Contains(authority, "/") {
			cut := strings.LastIndex(server, "/")
			server, prefix = server[:cut], server[cut+1:]
		}
		url := server + "/" + prefix + "_" + service
		if hasQuery {
			url += "?" + query
		}
		return url
	}
	return "sqlite:" + filepath.Join(c.DataDir, service+".db")
}

func (c *Config) ownDatabaseURL(service string) string {
	return map[string]string{
		"order": c.OrderDatabaseURL, "dispatch": c.DispatchDatabaseURL,
		"payment": c.PaymentDatabaseURL, "points": c.PointsDatabaseURL,
	}[service]
}

// opens reports whether this process needs the service's database: because it runs the service's role, or relays its
// outbox. A relay serves the services that run beside it and those whose database is set; alone and with nothing set,
// all.
func (c *Config) opens(service string) bool {
	return c.has(messaging.Role(service)) || c.relays(service)
}

func (c *Config) relays(service string) bool {
	if !c.has(messaging.Relay) {
		return false
	}
	set := c.ownDatabaseURL(service) != "" || c.DatabaseURL != ""
	return c.has(messaging.Role(service)) || set || len(c.roles()) == 1 && c.DatabaseURL+c.OrderDatabaseURL+c.DispatchDatabaseURL == ""
}

// brokerDatabaseURL returns where the queues of a sql: or embedded: broker are.
func (c *Config) brokerDatabaseURL() string {
	if c.embeddedBroker() {
		return "sqlite:" + filepath.Join(c.DataDir, "broker.db")
	}
	if url := strings.TrimPrefix(c.BrokerURL, "sql:"); url != "" {
		return url
	}
	return c.databaseURL("order")
}
