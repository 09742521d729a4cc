// Package service puts the program together: configuration, the order in which the parts start and stop, and what
// they say about their health. Tests start the real program through it.
package service

import (
	"path/filepath"
	"slices"
	"strings"
	"time"

	"takeout/domain/event"
	"takeout/ports/messaging"
)

// Config is everything that can be set. The tags are kong's: a flag, an environment variable, a default and a line of
// help each. A secret may also come from the file that the variable with _FILE appended to its name points to.
type Config struct {
	HTTPAddr string   `name:"http-addr" env:"TAKEOUT_HTTP_ADDR" default:"127.0.0.1:8080" help:"Address to serve HTTP on."`
	Roles    []string `env:"TAKEOUT_ROLES" default:"all" help:"What this process does: all, or some of order,relay,dispatch,compensation,payment,points,reconcile."`
	DataDir  string   `env:"TAKEOUT_DATA_DIR" default:"./data" help:"Directory of the SQLite files."`

	DatabaseURL         string `name:"database-url" env:"TAKEOUT_DATABASE_URL" help:"One server for all services: mysql://user:password@host:port/prefix. Each service has the database <prefix>_<service>; the prefix is takeout if absent."`
	OrderDatabaseURL    string `name:"order-database-url" env:"TAKEOUT_ORDER_DATABASE_URL" help:"Database of the order service: sqlite:PATH or mysql://user:password@host:port/database."`
	DispatchDatabaseURL string `name:"dispatch-database-url" env:"TAKEOUT_DISPATCH_DATABASE_URL" help:"Database of the dispatch service."`
	PaymentDatabaseURL  string `name:"payment-database-url" env:"TAKEOUT_PAYMENT_DATABASE_URL" help:"Database of the payment service."`
	PointsDatabaseURL   string `name:"points-database-url" env:"TAKEOUT_POINTS_DATABASE_URL" help:"Database of the points service."`
	BrokerURL           string `name:"broker-url" env:"TAKEOUT_BROKER_URL" default:"embedded:" help:"embedded: (in this process), amqp://user:password@host:port/vhost, sql:mysql://… or sql: (beside the orders, if they are in MySQL)."`

	DispatchAfter    string        `name:"dispatch-after" env:"TAKEOUT_DISPATCH_AFTER" default:"placed" enum:"placed,paid" help:"When an order is dispatched: when it is placed, or when it is paid."`
	DispatchDeadline time.Duration `name:"dispatch-deadline" env:"TAKEOUT_DISPATCH_DEADLINE" default:"30m" help:"How long after it was placed an order may wait for a courier before it is cancelled; 0 for ever."`
	PaymentGateway   string        `name:"payment-gateway" env:"TAKEOUT_PAYMENT_GATEWAY" default:"simulated" enum:"simulated,none" help:"Who takes the money: simulated, or none for an installation without payment and points."`
	PaymentRefusals  float64       `name:"payment-refusals" env:"TAKEOUT_PAYMENT_REFUSALS" default:"0" help:"The fraction of payments that the simulated gateway refuses (0 to 1)."`
	PaymentTimeouts  float64       `name:"payment-timeouts" env:"TAKEOUT_PAYMENT_TIMEOUTS" default:"0" help:"The fraction of calls that the simulated gateway does not answer in time (0 to 1)."`

	RetryDelays       []time.Duration `name:"retry-delays" env:"TAKEOUT_RETRY_DELAYS" default:"5s,30s,5m,30m" help:"When a message that failed is tried again, after four immediate tries."`
	EventKey          string          `name:"event-key" env:"TAKEOUT_EVENT_KEY" help:"Key that events are signed with (16 bytes or more). Several, separated by commas, are all accepted and the first one signs."`
	CompensationLimit int             `name:"compensation-limit" env:"TAKEOUT_COMPENSATION_LIMIT" default:"100" help:"How many orders may be missing within a minute, and be more than half of all, before the compensation stops."`
	Publish           string          `env:"TAKEOUT_PUBLISH" default:"outbox" enum:"outbox,before-commit" help:"How orders are announced: by the outbox, or before-commit, which loses orders and is for demonstrations."`
	FailAfterPublish  float64         `name:"fail-after-publish" env:"TAKEOUT_FAIL_AFTER_PUBLISH" default:"0" help:"The fraction of orders that before-commit rolls back after announcing them (0 to 1)."`

	DedupHorizon     time.Duration `name:"dedup-horizon" env:"TAKEOUT_DEDUP_HORIZON" default:"720h" help:"How old an event may be to be handled, and how long it is remembered that it was."`
	FailureRetention time.Duration `name:"failure-retention" env:"TAKEOUT_FAILURE_RETENTION" default:"336h" help:"How long failures are kept after they were closed, and at least how long open ones can be retried. Open ones are kept for ever."`
	HistoryRetention time.Duration `name:"history-retention" env:"TAKEOUT_HISTORY_RETENTION" default:"720h" help:"How long the log of confirmed events and of repairs is kept."`

	ReconcileEvery  time.Duration `name:"reconcile-every" env:"TAKEOUT_RECONCILE_EVERY" default:"1m" help:"How often the databases are compared; 0 for never."`
	ReconcileGrace  time.Duration `name:"reconcile-grace" env:"TAKEOUT_RECONCILE_GRACE" default:"1m" help:"Differences that are younger are ignored."`
	ReconcileRepair bool          `name:"reconcile-repair" env:"TAKEOUT_RECONCILE_REPAIR" default:"true" negatable:"" help:"Repair what the comparison finds."`
	ReconcileBudget int           `name:"reconcile-budget" env:"TAKEOUT_RECONCILE_BUDGET" default:"1000" help:"At most this many repairs in one comparison."`

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

// services are the services that this installation has, each with a database of its own.
func (c *Config) services() []string {
	if !c.withPayment() {
		return []string{"order", "dispatch"}
	}
	return []string{"order", "dispatch", "payment", "points"}
}

func (c *Config) withPayment() bool { return c.PaymentGateway != "none" }

// eventKeys returns what events are signed with. Validate has checked them.
func (c *Config) eventKeys() event.Keys {
	keys, _ := event.ParseKeys(c.EventKey)
	return keys
}

// acceptance says which events the consumers act on.
func (c *Config) acceptance() messaging.Acceptance {
	return messaging.Acceptance{Keys: c.eventKeys(), Horizon: c.DedupHorizon}
}

// serves reports whether a role of this process works in the service's database.
func (c *Config) serves(service string) bool {
	return slices.ContainsFunc(c.roles(), func(r messaging.Role) bool { return r.Service() == service })
}

// opens reports whether this process needs the service's database: because a role of it works there, relays its outbox,
// or compares all.
func (c *Config) opens(service string) bool {
	return c.serves(service) || c.relays(service) || c.has(messaging.Reconcile)
}

// relays reports whether this process relays the service's outbox. A relay serves the services that run beside it and
// those whose database is set; alone and with nothing set, all.
func (c *Config) relays(service string) bool {
	if !c.has(messaging.Relay) {
		return false
	}
	set := c.ownDatabaseURL(service) != "" || c.DatabaseURL != ""
	alone := len(c.roles()) == 1 && c.DatabaseURL+c.OrderDatabaseURL+c.DispatchDatabaseURL+c.PaymentDatabaseURL+c.PointsDatabaseURL == ""
	return c.serves(service) || set || alone
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
