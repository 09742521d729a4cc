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

	"takeout/adapters/rabbitmq"
	"takeout/adapters/sqldb"
	"takeout/domain/event"
	"takeout/ports/messaging"
)

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
	for _, validate := range []func() error{c.validateProcess, c.validatePolicies, c.validateURLs, c.validateDatabases} {
		if err := validate(); err != nil {
			return err
		}
	}
	return nil
}

// validateProcess checks what this process does, where it serves, and how it starts and stops.
func (c *Config) validateProcess() error {
	for _, r := range c.Roles {
		if r != "all" && !slices.Contains(messaging.Roles, messaging.Role(r)) {
			return setting("roles", "there is no role %q; the roles are all, order, relay, dispatch, compensation, payment, points and reconcile", r)
		}
	}
	if len(c.Roles) == 0 {
		return setting("roles", "at least one role is needed")
	}
	if _, port, err := net.SplitHostPort(c.HTTPAddr); err != nil || !validPort(port) {
		return setting("http-addr", "must be host:port with a port from 0 to 65535, such as 127.0.0.1:8080")
	}
	if c.DataDir == "" {
		return setting("data-dir", "must name a directory")
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
	return nil
}

// validatePolicies checks the settings of what the program does, as opposed to where.
func (c *Config) validatePolicies() error {
	if !c.withPayment() {
		if c.DispatchAfter == "paid" {
			return setting("dispatch-after", "orders cannot wait to be paid without a --payment-gateway")
		}
		for _, role := range []string{"payment", "points"} {
			if slices.Contains(c.Roles, role) {
				return setting("roles", "the role %s needs a --payment-gateway", role)
			}
		}
	}
	for flag, rate := range map[string]float64{"payment-refusals": c.PaymentRefusals, "payment-timeouts": c.PaymentTimeouts, "fail-after-publish": c.FailAfterPublish} {
		if !(rate >= 0 && rate <= 1) {
			return setting(flag, "must be between 0 and 1")
		}
	}
	if c.FailAfterPublish > 0 && c.Publish != "before-commit" {
		return setting("fail-after-publish", "goes with --publish=before-commit only")
	}
	if c.DispatchDeadline < 0 {
		return setting("dispatch-deadline", "must not be negative; 0 is for ever")
	}
	if _, err := event.ParseKeys(c.EventKey); err != nil {
		return setting("event-key", "%w", err)
	}
	if c.CompensationLimit < 1 {
		return setting("compensation-limit", "must be 1 or more")
	}
	if c.ReconcileEvery != 0 && c.ReconcileEvery < time.Second {
		return setting("reconcile-every", "must be 1s or more, or 0 for never")
	}
	if c.ReconcileGrace < 0 || c.ReconcileGrace > 24*time.Hour {
		return setting("reconcile-grace", "must be between 0s and 24h")
	}
	if c.ReconcileBudget < 0 {
		return setting("reconcile-budget", "must be 0 or more")
	}
	if len(c.RetryDelays) > 20 {
		return setting("retry-delays", "must be 20 delays at most")
	}
	var retries time.Duration
	for _, delay := range c.RetryDelays {
		if delay <= 0 || delay > 24*time.Hour {
			return setting("retry-delays", "each delay must be above 0s and at most 24h")
		}
		retries += delay
	}
	if c.FailureRetention < time.Hour {
		return setting("failure-retention", "must be 1h or more")
	}
	if c.HistoryRetention < time.Hour {
		return setting("history-retention", "must be 1h or more")
	}
	// An event that is older than the horizon is refused, for it is forgotten whether it was handled. A message must not
	// grow that old while it is retried by itself, nor before a person had the time to retry it.
	if longest := retries + c.FailureRetention; c.DedupHorizon < longest {
		return setting("dedup-horizon", "must be %s or more, which is how late a message may be retried: all --retry-delays and the "+
			"--failure-retention together; an older one is refused, because nobody remembers whether it was handled", longest)
	}
	return nil
}

// validateURLs checks the URLs that all services share. What is said of each database is for validateDatabases.
func (c *Config) validateURLs() error {
	if c.DatabaseURL != "" && !strings.HasPrefix(c.DatabaseURL, "mysql://") {
		return setting("database-url", "must start with mysql://; SQLite files go to --data-dir")
	}
	if u, err := url.Parse(c.DatabaseURL); err == nil && !strings.Contains(u.Path, "@") && strings.Contains(strings.TrimPrefix(u.Path, "/"), "/") {
		return setting("database-url", "what follows the port is the prefix of the databases' names, and cannot have a / in it")
	}
	scheme, _, _ := strings.Cut(c.BrokerURL, ":")
	if !slices.Contains([]string{"embedded", "sql", "amqp", "amqps"}, scheme) || !strings.Contains(c.BrokerURL, ":") ||
		scheme == "embedded" && c.BrokerURL != "embedded:" {
		return setting("broker-url", "must be embedded:, sql:, sql:mysql://… or amqp://…")
	}
	if strings.HasPrefix(scheme, "amqp") {
		if err := rabbitmq.CheckURL(c.BrokerURL); err != nil {
			return setting("broker-url", "%w", err)
		}
	}
	if c.embeddedBroker() && len(c.roles()) != len(messaging.Roles) {
		return setting("broker-url", "the embedded broker serves one process that runs all roles; "+
			"for several processes set amqp://… or sql:mysql://…")
	}
	return nil
}

// validateDatabases checks that each database can be one, and is of one service only.
func (c *Config) validateDatabases() error {
	owner := map[string]string{}
	for _, service := range []string{"order", "dispatch", "payment", "points"} {
		url := c.databaseURL(service)
		place := placeOf(url)
		if other := owner[place]; other != "" {
			return setting(service+"-database-url", "is the %s service's database; each service needs one of its own", other)
		}
		owner[place] = service
		flag := service + "-database-url"
		if c.ownDatabaseURL(service) == "" && c.DatabaseURL != "" {
			flag = "database-url"
		}
		if err := checkDatabaseURL(service, url); err != nil {
			return setting(flag, "%w", err)
		}
	}
	if strings.HasPrefix(c.BrokerURL, "sql:") {
		// One process opens a SQLite file once.
		if other := owner[placeOf(c.brokerDatabaseURL())]; other != "" && strings.HasPrefix(c.brokerDatabaseURL(), "sqlite:") {
			return setting("broker-url", "must not be in the %s service's SQLite file; leave it at embedded:, or set sql:sqlite:PATH or sql:mysql://…", other)
		}
		if err := checkDatabaseURL("broker", c.brokerDatabaseURL()); err != nil {
			return setting("broker-url", "%w", err)
		}
	}
	return nil
}

// placeOf returns the URL of a database such that the same file has the same one.
func placeOf(url string) string {
	if path, isFile := strings.CutPrefix(url, "sqlite:"); isFile {
		if absolute, err := filepath.Abs(path); err == nil {
			return "sqlite:" + absolute
		}
	}
	return url
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
