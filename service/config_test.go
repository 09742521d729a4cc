package service_test

import (
	"strings"
	"testing"

	"github.com/alecthomas/kong"
	"github.com/stretchr/testify/require"

	"takeout/service"
)

// password is in every secret here, and must not come out anywhere.
const password = "hunter2"

// limits are values at the limits of a setting and beyond. with are other settings that go with them.
type limits struct {
	right, wrong []string
	with         []string
}

// noURLs are wrong for every setting that is a URL.
var noURLs = []string{
	"x", "://", ":", "//user:" + password + "@h/db", "user:" + password + "@tcp(h:3306)/db", "http://user:" + password + "@h/db", "MYSQL:user:" + password + "@h", "\x00", "mysql",
	"jdbc:mysql://user:" + password + "@h/db", "postgres://user:" + password + "@h/db",
}

func databases() limits {
	return limits{
		right: []string{"", "sqlite:x.db", "sqlite:/a b/x.db", "mysql://h/db", "mysql://user:" + password + "@h/db", "mysql://user:" + password + "@[::1]:3306/db", "mysql://u:p%40%2F%23@h/db?tls=true"},
		wrong: append([]string{
			"sqlite:", "sqlite://", "sqlite:x?mode=memory", "mysql:", "mysql://", "mysql:///db", "mysql://h", "mysql://h/", "mysql://user:" + password + "@/db", "mysql://user:" + password + "@h:70000/db",
			"mysql://user:" + password + "@h:-1/db", "mysql://user:" + password + "@h:x/db", "mysql://user:" + password + "%zz@h/db", "mysql://user:1/" + password + "@h/db", "mysql://user:1#" + password + "@h/db",
			"mysql://user:1?" + password + "@h/db", "mysql://user:1@" + password + "@h/db?x=1", "mysql://user:" + password + "@h/db?allowAllFiles=true", "mysql://user:" + password + "@h/db?tls=x",
			"mysql://user:" + password + "\n@h/db", "mysql://user:" + password + "@h/db#x", "mysql://user:" + password + " @h/db", "mysql://user:" + password + "@a b/db",
		}, noURLs...),
	}
}

var settings = map[string]limits{
	"http-addr": {right: []string{":0", "127.0.0.1:65535", "[::1]:1", "localhost:1"},
		wrong: []string{"", ":", "x", ":65536", ":-1", ":http", "1", "127.0.0.1", "127.0.0.1:", "http://127.0.0.1:1", "::1:1", ":1:1", ":01", ":1 ", ":0x1"}},
	"roles":    {right: []string{"all", "all,order", "order,relay,dispatch,compensation,payment,points,reconcile"}, wrong: []string{"", ",", "ORDER", "order,foo", "order relay"}},
	"data-dir": {right: []string{"x", "/a b/c", "."}, wrong: []string{""}},
	"database-url": {right: []string{"", "mysql://h/", "mysql://h", "mysql://user:" + password + "@h:1/prefix"}, wrong: append([]string{
		"sqlite:x", "mysql://", "mysql:", "mysql:///p", "mysql://user:" + password + "@/", "mysql://user:" + password + "%zz@h/", "mysql://user:" + password + "@h:70000/", "mysql://user:" + password + "@h/?x=1",
		"mysql://user:1#" + password + "@h/", "mysql://user:1?" + password + "@h/",
		"mysql://h/a/b", "mysql://h/prefix/", "mysql://h//",
	}, noURLs...)},
	"order-database-url": databases(), "dispatch-database-url": databases(), "payment-database-url": databases(), "points-database-url": databases(),
	"broker-url": {right: []string{"embedded:", "sql:sqlite:x.db", "amqp://h", "amqps://user:" + password + "@h:1/v", "amqp://h/?namespace=a.b"}, wrong: append([]string{
		"", "embedded", "sql:", "sql:sqlite:data/../data/dispatch.db", "embedded:user:" + password + "@h", "sql", "sql:x", "sql:sqlite:", "sql:mysql://user:" + password + "@h/", "sql:postgres://user:" + password + "@h/db", "AMQP://h", "sql:sql:",
		"amqp:user:" + password + "@h", "amqp://", "amqp://user:" + password + "@", "amqp://user:" + password + "@h:x/", "amqp://user:" + password + "%zz@h/", "amqp://user:1/" + password + "@h/",
		"amqp://user:1#" + password + "@h/", "amqp://user:1?" + password + "@h/", "amqp://user:" + password + "@h/?namespace=", "amqp://user:" + password + "@h/?x=" + password, "amqp://user:" + password + "@h:70000/",
	}, noURLs...)},
	"dispatch-after":    {right: []string{"placed", "paid"}, wrong: []string{"", "Placed", "never"}},
	"dispatch-deadline": {right: []string{"0", "0s", "1ns", "87600h"}, wrong: []string{"", "-1ns", "30", "soon", "9999999h"}},
	"payment-gateway":   {right: []string{"simulated", "none"}, wrong: []string{"", "stripe"}},
	"payment-refusals":  {right: []string{"0", "1", "0.5", "1e-300"}, wrong: []string{"", "-0.1", "1.1", "NaN", "Inf", "-Inf", "half"}},
	"payment-timeouts":  {right: []string{"0", "1"}, wrong: []string{"", "-0.1", "1.1", "NaN", "Inf", "1,0"}},
	"retry-delays": {right: []string{"", "1ns", "24h", "1s" + strings.Repeat(",1s", 19)},
		wrong: []string{"0s", "-1s", "24h1ns", "1", "x", "1s,,1s", "1s" + strings.Repeat(",1s", 20), "1s;2s", "[1s]", "NaN"}},
	"event-key": {right: []string{"", "0123456789abcdef", "0123456789abcdef, 0123456789abcdef"},
		wrong: []string{password, ",", "0123456789abcdef,", "0123456789abcdef," + password, " " + password + "         ", "短短"}},
	"compensation-limit": {right: []string{"1", "1000000000"}, wrong: []string{"", "0", "-1", "1.5", "many", "9223372036854775808"}},
	"publish":            {right: []string{"outbox", "before-commit"}, wrong: []string{"", "never"}},
	"fail-after-publish": {right: []string{"0", "0.3", "1"}, wrong: []string{"", "-0.1", "1.1", "NaN"}, with: []string{"--publish=before-commit"}},
	"dedup-horizon":      {right: []string{"336h35m35s", "720h", "87600h"}, wrong: []string{"", "0", "336h35m34s", "-1h", "720"}},
	"failure-retention":  {right: []string{"1h", "336h"}, wrong: []string{"", "0", "59m59s", "-1h"}},
	"history-retention":  {right: []string{"1h", "87600h"}, wrong: []string{"", "0", "59m", "-1h"}},
	"reconcile-every":    {right: []string{"0", "1s", "24h"}, wrong: []string{"", "999ms", "-1s", "1"}},
	"reconcile-grace":    {right: []string{"0", "24h"}, wrong: []string{"", "-1ns", "24h1s"}},
	"reconcile-repair":   {right: []string{"true", "false"}, wrong: []string{"maybe", "2"}},
	"reconcile-budget":   {right: []string{"0", "1000000"}, wrong: []string{"", "-1", "1e3", "all"}},
	"migrate":            {right: []string{"true", "false"}, wrong: []string{"maybe", "2"}},
	"prefetch":           {right: []string{"1", "5000"}, wrong: []string{"", "0", "-1", "5001", "65536", "1e2", "x"}},
	"drain-timeout":      {right: []string{"1s", "10m"}, wrong: []string{"", "0", "999ms", "10m1s", "-1s", "20"}},
	"start-timeout":      {right: []string{"0", "1h"}, wrong: []string{"", "-1ns", "1h1s", "30"}},
	"log-level":          {right: []string{"debug", "info", "warn", "error"}, wrong: []string{"", "INFO", "trace", "0"}},
	"log-format":         {right: []string{"auto", "text", "json"}, wrong: []string{"", "xml"}},
}

// validate reads the settings as the program does.
func validate(t *testing.T, args ...string) error {
	t.Helper()
	var cfg service.Config
	parser, err := kong.New(&cfg)
	require.NoError(t, err)
	if _, err := parser.Parse(args); err != nil {
		return err
	}
	return cfg.Validate()
}

func TestEverySettingHasLimitsAndNamesItselfBeyondThem(t *testing.T) {
	t.Chdir(t.TempDir())
	parser, err := kong.New(&service.Config{})
	require.NoError(t, err)
	for _, flag := range parser.Model.Flags {
		if flag.Name == "help" {
			continue
		}
		limits, known := settings[flag.Name]
		require.True(t, known, "a new setting, --%s, needs values at its limits and beyond above", flag.Name)
		require.NotEmpty(t, limits.right, flag.Name)
		for _, value := range limits.right {
			require.NoError(t, validate(t, append(limits.with, "--"+flag.Name+"="+value)...), "--%s=%s", flag.Name, value)
		}
		for _, value := range limits.wrong {
			err := validate(t, append(limits.with, "--"+flag.Name+"="+value)...)
			require.Error(t, err, "--%s=%q", flag.Name, value)
			about := err.Error()
			require.Contains(t, about, "--"+flag.Name, "%q", value)
			require.NotContains(t, about, password, "--%s=%q", flag.Name, value)
			require.NotContains(t, about, "\n", "--%s=%q", flag.Name, value)
			require.Less(t, len(about), 400)
		}
	}
}
