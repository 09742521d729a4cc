package tests

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"takeout/adapters/sqldb"
	"takeout/ports/httpapi"
)

// outcome is how a run of the program ended.
type outcome struct {
	stdout, stderr string
	code           int
}

func (o outcome) String() string { return fmt.Sprintf("exit %d\n%s%s", o.code, o.stdout, o.stderr) }

// run runs the program to its end, in an empty directory and with no settings but these.
func run(t testing.TB, env map[string]string, args ...string) outcome {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	command := exec.CommandContext(ctx, binary, args...)
	command.Dir = t.TempDir()
	command.Env = slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, "TAKEOUT_") })
	for name, value := range env {
		command.Env = append(command.Env, name+"="+value)
	}
	var stdout, stderr bytes.Buffer
	command.Stdout, command.Stderr = &stdout, &stderr
	err := command.Run()
	require.NoError(t, ctx.Err(), "takeout %s does not end: %s", strings.Join(args, " "), stderr.String())
	if exit, ok := errors.AsType[*exec.ExitError](err); ok || err == nil {
		code := 0
		if ok {
			code = exit.ExitCode()
		}
		return outcome{stdout.String(), stderr.String(), code}
	}
	t.Fatal(err)
	return outcome{}
}

// password is part of every URL with one here, and must not come out anywhere.
const password = "hunter2"

func (o outcome) keepsThePassword(t testing.TB) {
	t.Helper()
	require.NotContains(t, o.stdout+o.stderr, password)
}

// complains checks that the program ended with one line that names what is wrong.
func (o outcome) complains(t testing.TB, code int, about ...string) {
	t.Helper()
	require.Equal(t, code, o.code, "%s", o)
	require.Empty(t, o.stdout)
	require.True(t, strings.HasPrefix(o.stderr, "takeout: "), "%s", o)
	require.Equal(t, 1, strings.Count(o.stderr, "\n"), "one line: %s", o.stderr)
	for _, text := range about {
		require.Contains(t, o.stderr, text)
	}
	o.keepsThePassword(t)
}

func TestWrongSettingsEndTheProgramWithOneLineThatNamesThem(t *testing.T) {
	t.Parallel()
	secretFile := filepath.Join(t.TempDir(), "secret")
	require.NoError(t, os.WriteFile(secretFile, []byte("amqp://user:"+password+"@127.0.0.1:1/\n"), 0o600))
	emptyFile := filepath.Join(t.TempDir(), "empty")
	require.NoError(t, os.WriteFile(emptyFile, nil, 0o600))
	for name, wrong := range map[string]struct {
		env   map[string]string
		args  []string
		about string
	}{
		"unknown flag":                {nil, []string{"serve", "--nothing"}, "--nothing"},
		"unknown flag of the default": {nil, []string{"--nothing"}, "--nothing"},
		"unknown command":             {nil, []string{"frobnicate"}, "frobnicate"},
		"unknown command of orders":   {nil, []string{"order", "eat"}, "eat"},
		"no command of orders":        {nil, []string{"order"}, "place"},
		"flag without its value":      {nil, []string{"serve", "--http-addr"}, "--http-addr"},
		"argument too many":           {nil, []string{"version", "x"}, "x"},
		"argument missing":            {nil, []string{"order", "get"}, "order-id"},
		"amount of letters":           {nil, []string{"order", "place", "x", "ten"}, "amount"},

		"role unknown":              {map[string]string{"TAKEOUT_ROLES": "foo"}, nil, "--roles (TAKEOUT_ROLES)"},
		"role unknown among others": {nil, []string{"--roles", "order,foo", "--broker-url", "sql:"}, "--roles (TAKEOUT_ROLES)"},
		"role in capitals":          {nil, []string{"--roles=ORDER"}, "--roles (TAKEOUT_ROLES)"},
		"roles empty":               {nil, []string{"--roles="}, "--roles (TAKEOUT_ROLES)"},
		"prefetch 0":                {map[string]string{"TAKEOUT_PREFETCH": "0"}, nil, "--prefetch (TAKEOUT_PREFETCH)"},
		"prefetch -1":               {nil, []string{"--prefetch=-1"}, "--prefetch (TAKEOUT_PREFETCH)"},
		"prefetch 70000":            {nil, []string{"--prefetch", "70000"}, "--prefetch (TAKEOUT_PREFETCH)"},
		"prefetch of letters":       {map[string]string{"TAKEOUT_PREFETCH": "many"}, nil, "--prefetch"},
		"drain-timeout 0":           {nil, []string{"--drain-timeout=0s"}, "--drain-timeout (TAKEOUT_DRAIN_TIMEOUT)"},
		"drain-timeout 1 hour":      {nil, []string{"--drain-timeout=1h"}, "--drain-timeout (TAKEOUT_DRAIN_TIMEOUT)"},
		"drain-timeout no unit":     {nil, []string{"--drain-timeout=20"}, "--drain-timeout"},
		"start-timeout negative":    {nil, []string{"--start-timeout=-1s"}, "--start-timeout (TAKEOUT_START_TIMEOUT)"},
		"log-level unknown":         {map[string]string{"TAKEOUT_LOG_LEVEL": "loud"}, nil, "--log-level"},
		"log-format unknown":        {nil, []string{"--log-format=xml"}, "--log-format"},
		"http-addr 70000":           {nil, []string{"--http-addr=127.0.0.1:70000"}, "--http-addr (TAKEOUT_HTTP_ADDR)"},
		"http-addr without port":    {map[string]string{"TAKEOUT_HTTP_ADDR": "localhost"}, nil, "--http-addr (TAKEOUT_HTTP_ADDR)"},
		"http-addr with a name":     {nil, []string{"--http-addr=127.0.0.1:http"}, "--http-addr (TAKEOUT_HTTP_ADDR)"},
		"http-addr is a URL":        {nil, []string{"--http-addr=http://127.0.0.1:8080"}, "--http-addr (TAKEOUT_HTTP_ADDR)"},

		"broker of an unknown scheme":        {map[string]string{"TAKEOUT_BROKER_URL": "kafkaesque://user:" + password + "@h"}, nil, "--broker-url (TAKEOUT_BROKER_URL)"},
		"broker without a scheme":            {map[string]string{"TAKEOUT_BROKER_URL": "user:" + password + "@h"}, nil, "--broker-url (TAKEOUT_BROKER_URL)"},
		"broker empty":                       {map[string]string{"TAKEOUT_BROKER_URL": ""}, []string{"--broker-url="}, "--broker-url (TAKEOUT_BROKER_URL)"},
		"broker without //":                  {map[string]string{"TAKEOUT_BROKER_URL": "amqp:user:" + password + "@h"}, nil, "--broker-url (TAKEOUT_BROKER_URL)"},
		"broker with %zz":                    {map[string]string{"TAKEOUT_BROKER_URL": "amqp://user:" + password + "%zz@h/"}, nil, "--broker-url (TAKEOUT_BROKER_URL)"},
		"broker with / in the password":      {map[string]string{"TAKEOUT_BROKER_URL": "amqp://user:x/" + password + "@h/"}, nil, "--broker-url (TAKEOUT_BROKER_URL)"},
		"broker with # in the password":      {map[string]string{"TAKEOUT_BROKER_URL": "amqp://user:x#" + password + "@h/"}, nil, "--broker-url (TAKEOUT_BROKER_URL)"},
		"broker with an unknown parameter":   {map[string]string{"TAKEOUT_BROKER_URL": "amqp://user:" + password + "@h/?nothing=1"}, nil, "--broker-url (TAKEOUT_BROKER_URL)"},
		"broker beside the orders in a file": {map[string]string{"TAKEOUT_BROKER_URL": "sql:"}, nil, "--broker-url (TAKEOUT_BROKER_URL)"},
		"a file under two names": {map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "sqlite:a.db", "TAKEOUT_DISPATCH_DATABASE_URL": "sqlite:./a.db"}, nil,
			"is the order service's database"},
		"broker in SQL elsewhere":       {map[string]string{"TAKEOUT_BROKER_URL": "sql:postgres://user:" + password + "@h/db"}, nil, "--broker-url (TAKEOUT_BROKER_URL)"},
		"embedded broker for one role":  {nil, []string{"--roles", "order"}, "--broker-url (TAKEOUT_BROKER_URL)"},
		"embedded broker for two roles": {map[string]string{"TAKEOUT_ROLES": "order,relay"}, nil, "--broker-url (TAKEOUT_BROKER_URL)"},

		"database of an unknown scheme":   {map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "postgres://user:" + password + "@h/db"}, nil, "--order-database-url (TAKEOUT_ORDER_DATABASE_URL)"},
		"database without a scheme":       {map[string]string{"TAKEOUT_DISPATCH_DATABASE_URL": "user:" + password + "@tcp(h)/db"}, nil, "--dispatch-database-url (TAKEOUT_DISPATCH_DATABASE_URL)"},
		"database without a name":         {map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "mysql://user:" + password + "@h/"}, nil, "--order-database-url (TAKEOUT_ORDER_DATABASE_URL)"},
		"database without a host":         {map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "mysql://user:" + password + "@/db"}, nil, "--order-database-url (TAKEOUT_ORDER_DATABASE_URL)"},
		"database with %zz":               {map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "mysql://user:" + password + "%zz@h/db"}, nil, "--order-database-url (TAKEOUT_ORDER_DATABASE_URL)"},
		"database with # in the password": {map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "mysql://user:x#" + password + "@h/db"}, nil, "--order-database-url (TAKEOUT_ORDER_DATABASE_URL)"},
		"database with / in the password": {map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "mysql://user:x/" + password + "@h/db"}, nil, "--order-database-url (TAKEOUT_ORDER_DATABASE_URL)"},
		"database with port 70000":        {map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "mysql://user:" + password + "@h:70000/db"}, nil, "--order-database-url (TAKEOUT_ORDER_DATABASE_URL)"},
		"database with another parameter": {map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "mysql://user:" + password + "@h/db?multiStatements=true"}, nil, "--order-database-url (TAKEOUT_ORDER_DATABASE_URL)"},
		"database with no such TLS":       {map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "mysql://user:" + password + "@h/db?tls=perhaps"}, nil, "--order-database-url (TAKEOUT_ORDER_DATABASE_URL)"},
		"server of another kind":          {map[string]string{"TAKEOUT_DATABASE_URL": "postgres://user:" + password + "@h/"}, nil, "--database-url (TAKEOUT_DATABASE_URL)"},
		"server without a host":           {map[string]string{"TAKEOUT_DATABASE_URL": "mysql://user:" + password + "@/"}, nil, "--database-url (TAKEOUT_DATABASE_URL)"},
		"SQLite without a path":           {map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "sqlite:"}, nil, "--order-database-url (TAKEOUT_ORDER_DATABASE_URL)"},
		"SQLite with parameters":          {map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "sqlite:x.db?_pragma=synchronous(0)"}, nil, "--order-database-url (TAKEOUT_ORDER_DATABASE_URL)"},
		"two services in one database": {map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "sqlite:one.db", "TAKEOUT_DISPATCH_DATABASE_URL": "sqlite:one.db"}, nil,
			"--dispatch-database-url (TAKEOUT_DISPATCH_DATABASE_URL)"},

		"password on the command line":                 {nil, []string{"serve", "--broker-url=amqp://user:" + password + "@h/"}, "--broker-url"},
		"password on the command line, in two words":   {nil, []string{"--order-database-url", "mysql://user:" + password + "@h/db"}, "command line"},
		"password with a slash on the command line":    {nil, []string{"--broker-url=amqp://user:x/" + password + "@h/"}, "--broker-url"},
		"password on the command line of the doctor":   {nil, []string{"doctor", "--broker-url=amqp://user:" + password + "@h/"}, "--broker-url"},
		"password on the command line, of a SQL queue": {nil, []string{"--broker-url=sql:mysql://user:" + password + "@h/db"}, "--broker-url"},
		"a setting and its file": {map[string]string{"TAKEOUT_BROKER_URL": "amqp://user:" + password + "@h/", "TAKEOUT_BROKER_URL_FILE": secretFile}, nil,
			"both TAKEOUT_BROKER_URL and TAKEOUT_BROKER_URL_FILE"},
		"a file that is missing":    {map[string]string{"TAKEOUT_BROKER_URL_FILE": filepath.Join(t.TempDir(), "nowhere")}, nil, "TAKEOUT_BROKER_URL_FILE"},
		"a file that is a folder":   {map[string]string{"TAKEOUT_ORDER_DATABASE_URL_FILE": t.TempDir()}, nil, "TAKEOUT_ORDER_DATABASE_URL_FILE"},
		"a file that is empty":      {map[string]string{"TAKEOUT_BROKER_URL_FILE": emptyFile}, nil, "TAKEOUT_BROKER_URL_FILE"},
		"healthcheck of no address": {map[string]string{"TAKEOUT_HTTP_ADDR": "nothing"}, []string{"healthcheck"}, "--http-addr (TAKEOUT_HTTP_ADDR)"},
		"order at no URL":           {nil, []string{"order", "get", "o", "--url", "127.0.0.1:8080"}, "--url (TAKEOUT_URL)"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			run(t, wrong.env, wrong.args...).complains(t, 2, wrong.about)
		})
	}
}

func TestEveryCommandRefusesWrongSettingsAsServeDoes(t *testing.T) {
	t.Parallel()
	for _, command := range []string{"serve", "migrate", "config"} {
		wrong := run(t, map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "mysql://user:" + password + "@h/"}, command)
		wrong.complains(t, 2, "--order-database-url (TAKEOUT_ORDER_DATABASE_URL)")
	}
}

func TestSettingThatIsSpelledWrongIsPointedOut(t *testing.T) {
	t.Parallel()
	o := run(t, map[string]string{"TAKEOUT_BROKERURL": "amqp://user:" + password + "@h/", "TAKEOUT_TEST_MYSQL_URL": "x", "TAKEOUT_URL": "x"}, "config")
	require.Equal(t, 0, o.code)
	require.Equal(t, "takeout: there is no setting TAKEOUT_BROKERURL; takeout serve --help shows all\n", o.stderr)
	o.keepsThePassword(t)
}

func TestConfigShowsWhatIsInForceAndMasksPasswords(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "broker")
	require.NoError(t, os.WriteFile(file, []byte("amqp://user:"+password+"@broker:5672/vhost\n"), 0o600))
	env := map[string]string{
		"TAKEOUT_BROKER_URL_FILE":       file,
		"TAKEOUT_DATABASE_URL":          "mysql://user:" + password + "@server:3306/kitchen",
		"TAKEOUT_DISPATCH_DATABASE_URL": "mysql://other:" + password + "@elsewhere:3307/couriers",
		"TAKEOUT_ROLES":                 "order,relay",
	}
	o := run(t, env, "config", "-o", "json", "--prefetch=7")
	require.Equal(t, 0, o.code, "%s", o)
	require.Empty(t, o.stderr)
	o.keepsThePassword(t)
	var settings []struct{ Flag, Env, Value string }
	require.NoError(t, json.Unmarshal([]byte(o.stdout), &settings))
	values := map[string]string{}
	for _, s := range settings {
		require.Equal(t, "TAKEOUT_"+strings.ToUpper(strings.ReplaceAll(strings.TrimPrefix(s.Flag, "--"), "-", "_")), s.Env)
		values[s.Flag] = s.Value
	}
	require.Equal(t, "amqp://user:***@broker:5672/vhost", values["--broker-url"], "from its file")
	require.Equal(t, "mysql://user:***@server:3306/kitchen_order", values["--order-database-url"])
	require.Equal(t, "mysql://other:***@elsewhere:3307/couriers", values["--dispatch-database-url"])
	require.Equal(t, "order,relay", values["--roles"])
	require.Equal(t, "7", values["--prefetch"])
	require.Equal(t, "20s", values["--drain-timeout"])
	require.Equal(t, "127.0.0.1:8080", values["--http-addr"])

	table := run(t, env, "config", "-o", "table")
	require.Equal(t, 0, table.code)
	table.keepsThePassword(t)
	require.Regexp(t, `(?m)^--broker-url +TAKEOUT_BROKER_URL +amqp://user:\*\*\*@broker:5672/vhost$`, table.stdout)
}

func TestFlagsComeBeforeTheEnvironment(t *testing.T) {
	t.Parallel()
	o := run(t, map[string]string{"TAKEOUT_HTTP_ADDR": "127.0.0.1:1", "TAKEOUT_PREFETCH": "9"}, "config", "-o", "json", "--http-addr", "127.0.0.1:2")
	require.Contains(t, o.stdout, `"127.0.0.1:2"`)
	require.NotContains(t, o.stdout, `"127.0.0.1:1"`)
	require.Contains(t, o.stdout, `"9"`)
}

func TestVersionAndHelpAnswer(t *testing.T) {
	t.Parallel()
	version := run(t, nil, "version")
	require.Equal(t, 0, version.code)
	require.Regexp(t, `^takeout \S+\n$`, version.stdout)
	for _, args := range [][]string{{"--help"}, {"help"}, {"help", "order"}, {"serve", "--help"}, {"order", "--help"}, {"order", "place", "--help"}} {
		help := run(t, nil, args...)
		require.Equal(t, 0, help.code, "%s", help)
		require.Contains(t, help.stdout, "Usage: takeout")
		require.Empty(t, help.stderr)
	}
}

func TestTopologyIsPrinted(t *testing.T) {
	t.Parallel()
	o := run(t, nil, "topology")
	require.Equal(t, 0, o.code)
	lines := strings.Split(strings.TrimSpace(o.stdout), "\n")
	require.Regexp(t, `^EVENT +QUEUE +ROLE +TRIES +THEN AFTER +THEN$`, lines[0])
	require.Regexp(t, `(?m)^order\.placed +dispatch\.assign-courier +dispatch +`, o.stdout)
	require.Regexp(t, `(?m)^order\.placed +compensation\.recreate-order +compensation +4 at once +5s, 30s, 5m, 30m +kept in the order database$`, o.stdout)
	require.Regexp(t, `(?m)^dispatch\.assigned +order\.mark-dispatched +order +`, o.stdout)
}

func TestOrdersAreHandledOnTheCommandLine(t *testing.T) {
	t.Parallel()
	_, p := embeddedProcess(t, nil)
	at := map[string]string{"TAKEOUT_URL": p.url}
	fields := func(line string) []string { return regexp.MustCompile(` {2,}`).Split(line, -1) }

	placed := run(t, at, "order", "place", "Mapo tofu", "2850", "-o", "json", "--order-id", "o-1", "--idempotency-key", "key")
	require.Equal(t, 0, placed.code, "%s", placed)
	var o httpapi.OrderBody
	require.NoError(t, json.Unmarshal([]byte(placed.stdout), &o))
	require.Equal(t, "o-1", o.OrderID)
	require.Equal(t, "Mapo tofu", o.Name)
	require.EqualValues(t, 2850, o.Amount)
	require.Equal(t, "placed", o.Status)
	again := run(t, at, "order", "place", "Mapo tofu", "2850", "-o", "json", "--order-id", "o-1", "--idempotency-key", "key")
	require.Equal(t, placed.stdout, again.stdout, "under the same key")

	watched := run(t, at, "order", "watch", "o-1", "-o", "table")
	require.Equal(t, 0, watched.code, "%s", watched)
	lines := strings.Split(strings.TrimSpace(watched.stdout), "\n")
	require.Equal(t, []string{"ORDER", "STATUS", "COURIER", "AMOUNT", "NAME", "PLACED"}, fields(lines[0]))
	last := fields(lines[len(lines)-1])
	require.Equal(t, "o-1", last[0])
	require.Equal(t, "dispatched", last[1])
	require.Regexp(t, "^courier-", last[2])
	require.Equal(t, []string{"2850 CNY", "Mapo tofu"}, last[3:5])

	got := run(t, at, "order", "get", "o-1")
	require.Equal(t, 0, got.code, "%s", got)
	require.NoError(t, json.Unmarshal([]byte(got.stdout), &o), "JSON where nobody watches")
	require.Equal(t, "dispatched", o.Status)

	second := run(t, nil, "order", "place", "麻婆豆腐 <&>", "1", "--currency", "EUR", "-o", "table", "--url", p.url)
	require.Equal(t, 0, second.code, "%s", second)
	require.Contains(t, second.stdout, "1 EUR")
	require.Contains(t, second.stdout, "麻婆豆腐 <&>")

	page := run(t, at, "order", "list", "--limit", "1", "-o", "table")
	require.Equal(t, 0, page.code, "%s", page)
	require.Equal(t, 2, strings.Count(page.stdout, "\n"), "a head and an order: %s", page.stdout)
	require.Contains(t, page.stdout, "麻婆豆腐", "the newest")
	more := regexp.MustCompile(`^more: takeout order list --cursor (\S+) \(with the same flags\)\n$`).FindStringSubmatch(page.stderr)
	require.NotNil(t, more, page.stderr)
	rest := run(t, at, "order", "list", "--cursor", more[1], "-o", "json", "--status", "dispatched")
	require.Equal(t, 0, rest.code, "%s", rest)
	var list orderPage
	require.NoError(t, json.Unmarshal([]byte(rest.stdout), &list))
	require.Len(t, list.Items, 1)
	require.Equal(t, "o-1", list.Items[0].OrderID)
}

func TestOrderCommandsSayWhatIsWrong(t *testing.T) {
	t.Parallel()
	_, p := embeddedProcess(t, nil)
	at := map[string]string{"TAKEOUT_URL": p.url}
	nobody := map[string]string{"TAKEOUT_URL": "http://" + freeAddr(t)}
	for name, wrong := range map[string]struct {
		env   map[string]string
		args  []string
		about string
	}{
		"order unknown":          {at, []string{"order", "get", "nobody"}, "there is no order nobody"},
		"order that cannot be":   {at, []string{"order", "get", "a b"}, "there is no such order"},
		"watch of an unknown":    {at, []string{"order", "watch", "nobody"}, "there is no order nobody"},
		"name empty":             {at, []string{"order", "place", "", "1"}, "name must not be empty"},
		"amount 0":               {at, []string{"order", "place", "x", "0"}, "amount must be between 1 and 2147483647"},
		"amount negative":        {at, []string{"order", "place", "--", "x", "-5"}, "amount must be between 1 and 2147483647"},
		"currency in small":      {at, []string{"order", "place", "x", "1", "--currency", "eur"}, "currency must be an ISO 4217 code"},
		"two things":             {at, []string{"order", "place", "", "0"}, "; amount: amount must be between"},
		"limit 0":                {at, []string{"order", "list", "--limit", "0"}, "limit"},
		"status unknown":         {at, []string{"order", "list", "--status", "lost"}, "status"},
		"cursor of another list": {at, []string{"order", "list", "--cursor", "!"}, "cursor must be the next_cursor"},
		"get, nobody serves":     {nobody, []string{"order", "get", "o"}, "no takeout answers at " + nobody["TAKEOUT_URL"]},
		"list, nobody serves":    {nobody, []string{"order", "list"}, "no takeout answers at " + nobody["TAKEOUT_URL"]},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			run(t, wrong.env, wrong.args...).complains(t, 1, wrong.about)
		})
	}
	t.Run("place, nobody serves", func(t *testing.T) {
		t.Parallel()
		o := run(t, nobody, "order", "place", "x", "1")
		require.Equal(t, 1, o.code)
		require.Contains(t, o.stderr, "trying again under the same key")
		require.Contains(t, o.stderr, "no takeout answers at")
		require.Regexp(t, `to try again without placing it twice, add --idempotency-key [0-9a-f-]{36}\n$`, o.stderr)
		require.Empty(t, o.stdout)
	})
	t.Run("watch of an order that waits", func(t *testing.T) {
		t.Parallel()
		for _, courier := range []string{"chen", "li", "wang"} {
			mustSend(t, http.MethodPatch, p.url+"/v1/couriers/courier-"+courier, `{"on_duty":false}`)
		}
		require.Equal(t, 0, run(t, at, "order", "place", "x", "1", "--order-id", "waits").code)
		o := run(t, at, "order", "watch", "waits", "--timeout", "1s", "-o", "table")
		require.Equal(t, 1, o.code)
		require.Contains(t, o.stdout, "placed")
		require.Equal(t, "takeout: order waits was not dispatched within 1s\n", o.stderr)
	})
	t.Run("watch, and nobody serves", func(t *testing.T) {
		t.Parallel()
		run(t, nobody, "order", "watch", "o", "--timeout", "1s").complains(t, 1, "order o cannot be seen: no takeout answers at")
	})
}

func TestCommandsSayThatItIsNotTakeoutThatAnswers(t *testing.T) {
	t.Parallel()
	for _, page := range []string{"<html>Welcome</html>", ""} {
		other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.Method == http.MethodPost {
				w.WriteHeader(http.StatusForbidden)
			}
			_, _ = io.WriteString(w, page)
		}))
		defer other.Close()
		env := map[string]string{"TAKEOUT_URL": other.URL, "TAKEOUT_HTTP_ADDR": strings.TrimPrefix(other.URL, "http://")}
		run(t, env, "failures", "list").complains(t, 1, "what answers at "+other.URL+" does not speak takeout's JSON")
		run(t, env, "order", "place", "x", "1").complains(t, 1, other.URL+" answers 403 Forbidden; is takeout serve running there?")
		o := run(t, env, "healthcheck")
		require.Equal(t, 1, o.code)
		require.Contains(t, o.stderr, "is not takeout")
	}
}

func TestOrderIsPlacedOnceThoughTheAnswerWasLost(t *testing.T) {
	t.Parallel()
	s, _ := embeddedProcess(t, nil)
	var asked atomic.Int64
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		request, err := http.NewRequestWithContext(r.Context(), r.Method, s.api+r.URL.String(), r.Body)
		if err != nil {
			t.Error(err)
			return
		}
		request.Header = r.Header.Clone()
		a, err := do(request)
		if err != nil {
			t.Error(err)
		}
		if asked.Add(1) == 1 {
			panic(http.ErrAbortHandler) // done, and not told
		}
		w.WriteHeader(a.status)
		_, _ = w.Write(a.body)
	}))
	defer front.Close()
	o := run(t, nil, "order", "place", "x", "1", "--url", front.URL, "-o", "json")
	require.Equal(t, 0, o.code, "%s", o)
	require.GreaterOrEqual(t, asked.Load(), int64(2))
	require.Equal(t, 1, s.orderRows(t, "SELECT COUNT(*) FROM order_info"))
}

func TestHealthcheckSaysItWithItsExitCode(t *testing.T) {
	t.Parallel()
	_, p := embeddedProcess(t, nil)
	addr := strings.TrimPrefix(p.url, "http://")
	well := run(t, map[string]string{"TAKEOUT_HTTP_ADDR": addr}, "healthcheck")
	require.Equal(t, 0, well.code, "%s", well)
	require.Contains(t, well.stdout, `"status":"ready"`)
	_, port, _ := strings.Cut(addr, ":")
	require.Equal(t, 0, run(t, map[string]string{"TAKEOUT_HTTP_ADDR": "0.0.0.0:" + port}, "healthcheck").code, "an address that is served on")
	require.Equal(t, 0, run(t, nil, "healthcheck", "--http-addr", ":"+port).code)

	gone := freeAddr(t)
	run(t, map[string]string{"TAKEOUT_HTTP_ADDR": gone}, "healthcheck").complains(t, 1, "no takeout answers at "+gone)

	sick := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }))
	defer sick.Close()
	unready := run(t, map[string]string{"TAKEOUT_HTTP_ADDR": strings.TrimPrefix(sick.URL, "http://")}, "healthcheck")
	require.Equal(t, 1, unready.code)
	require.Contains(t, unready.stderr, "not ready")
}

type finding struct {
	What, Where, Cause, Remedy string
	OK                         bool
}

func findings(t testing.TB, o outcome) map[string]finding {
	t.Helper()
	var all []finding
	require.NoError(t, json.Unmarshal([]byte(o.stdout), &all), "%s", o)
	byWhat := map[string]finding{}
	for _, f := range all {
		byWhat[f.What] = f
	}
	return byWhat
}

func TestDoctorFindsNothingWrongWithAHealthyInstallation(t *testing.T) {
	t.Parallel()
	env := map[string]string{"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_DATA_DIR": filepath.Join(t.TempDir(), "new")}
	o := run(t, env, "doctor", "-o", "table")
	require.Equal(t, 0, o.code, "before the first start: %s", o)
	require.Regexp(t, `(?m)^ok +configuration`, o.stdout)
	require.NotContains(t, o.stdout, "BAD")
	require.NoDirExists(t, env["TAKEOUT_DATA_DIR"], "it changes nothing")
	require.NoError(t, os.Mkdir(env["TAKEOUT_DATA_DIR"], 0o700))
	require.Equal(t, 0, run(t, env, "doctor").code, "an empty directory is new, too")
	made, err := os.ReadDir(env["TAKEOUT_DATA_DIR"])
	require.NoError(t, err)
	require.Empty(t, made, "it makes no files")

	p := startProcess(t, "embedded", env)
	o = run(t, env, "doctor")
	require.Equal(t, 0, o.code, "beside the running program: %s", o)
	for what, f := range findings(t, o) {
		require.True(t, f.OK, what)
	}
	require.NoError(t, p.terminate(t))
	require.Equal(t, 0, run(t, env, "doctor").code, "after it")
}

func TestDoctorNamesCauseAndNextStep(t *testing.T) {
	t.Parallel()
	atOnce(t, map[string]func(t *testing.T){
		"nothing answers": func(t *testing.T) {
			env := map[string]string{
				"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_DATABASE_URL": "mysql://user:" + password + "@" + freeAddr(t) + "/",
				"TAKEOUT_BROKER_URL": "amqp://user:" + password + "@" + freeAddr(t) + "/",
			}
			o := run(t, env, "doctor")
			require.Equal(t, 1, o.code, "%s", o)
			o.keepsThePassword(t)
			found := findings(t, o)
			for _, what := range []string{"order database", "dispatch database", "broker"} {
				f := found[what]
				require.False(t, f.OK, what)
				require.Contains(t, f.Where, "127.0.0.1:", what)
				require.Contains(t, f.Cause, "refused", what)
				require.Contains(t, f.Remedy, "start", what)
			}
			require.True(t, found["HTTP address"].OK)

			delete(env, "TAKEOUT_BROKER_URL") // which is waited for
			table := run(t, env, "doctor", "-o", "table")
			require.Equal(t, 1, table.code)
			table.keepsThePassword(t)
			require.Regexp(t, `(?m)^BAD +order database +mysql://127\.0\.0\.1:\d+/takeout_order +`, table.stdout)
			require.Regexp(t, `(?m)^ +→ start `, table.stdout)
		},
		"wrong password, and no schema": func(t *testing.T) {
			st := production(t)
			order, broker := parse(t, st.order), parse(t, st.broker)
			order.User, broker.User = url.UserPassword(order.User.Username(), password), url.UserPassword("nobody", password)
			o := run(t, map[string]string{
				"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_ORDER_DATABASE_URL": order.String(), "TAKEOUT_DISPATCH_DATABASE_URL": st.dispatch,
				"TAKEOUT_BROKER_URL": broker.String(),
			}, "doctor")
			require.Equal(t, 1, o.code, "%s", o)
			o.keepsThePassword(t)
			found := findings(t, o)
			require.Contains(t, found["order database"].Cause, "denied")
			require.Contains(t, found["order database"].Remedy, "user and password")
			require.Contains(t, found["dispatch database"].Cause, "older")
			require.Contains(t, found["dispatch database"].Remedy, "takeout migrate")
			require.Zero(t, count(t, st.dispatch, "SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = DATABASE()"), "it changes nothing")
			require.False(t, found["broker"].OK)
			require.NotEmpty(t, found["broker"].Cause)
			require.Contains(t, found["broker"].Remedy, "user and password")
		},
		"all is well": func(t *testing.T) {
			st := production(t)
			env := map[string]string{
				"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_ORDER_DATABASE_URL": st.order, "TAKEOUT_DISPATCH_DATABASE_URL": st.dispatch,
				"TAKEOUT_BROKER_URL": st.broker,
			}
			require.Equal(t, 0, run(t, env, "migrate").code)
			o := run(t, env, "doctor")
			require.Equal(t, 0, o.code, "%s", o)
		},
		"the port is taken": func(t *testing.T) {
			other := listen(t)
			defer other.Close()
			o := run(t, map[string]string{"TAKEOUT_HTTP_ADDR": other.Addr().String(), "TAKEOUT_DATA_DIR": t.TempDir()}, "doctor")
			require.Equal(t, 1, o.code, "%s", o)
			require.Contains(t, findings(t, o)["HTTP address"].Cause, "in use")
			require.Contains(t, findings(t, o)["HTTP address"].Remedy, "--http-addr")
		},
		"what serves is in trouble": func(t *testing.T) {
			st := production(t)
			env := map[string]string{
				"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_ORDER_DATABASE_URL": st.order, "TAKEOUT_DISPATCH_DATABASE_URL": st.dispatch,
				"TAKEOUT_BROKER_URL": st.broker, "TAKEOUT_PAYMENT_GATEWAY": "none", "TAKEOUT_PUBLISH": "before-commit",
			}
			p := startProcess(t, "serving", env)
			o := run(t, env, "doctor")
			require.Equal(t, 1, o.code, "%s", o)
			found := findings(t, o)
			require.True(t, found["HTTP address"].OK)
			require.Contains(t, found["serving: announcing"].Cause, "before")
			require.Contains(t, found["serving: announcing"].Remedy, "/readyz")
			require.NoError(t, p.terminate(t))
			require.Equal(t, 0, run(t, env, "doctor").code, "nothing serves")
		},
		"a setting is wrong": func(t *testing.T) {
			run(t, map[string]string{"TAKEOUT_ORDER_DATABASE_URL": "mysql://user:" + password + "%zz@h/db"}, "doctor").complains(t, 2, "TAKEOUT_ORDER_DATABASE_URL")
			run(t, map[string]string{"TAKEOUT_BROKER_URL": "amqp://user:" + password + "%zz@h/"}, "doctor").complains(t, 2, "TAKEOUT_BROKER_URL")
		},
	})
}

func TestPortThatIsTakenIsNamedInOneLine(t *testing.T) {
	t.Parallel()
	other := listen(t)
	defer other.Close()
	began := time.Now()
	o := run(t, map[string]string{"TAKEOUT_HTTP_ADDR": other.Addr().String(), "TAKEOUT_DATA_DIR": t.TempDir(), "TAKEOUT_LOG_LEVEL": "error"})
	require.Less(t, time.Since(began), 10*time.Second, "nothing is under way that it could wait for")
	o.complains(t, 1, "--http-addr (TAKEOUT_HTTP_ADDR)", other.Addr().String(), "in use")
}

func TestTwoProcessesDoNotShareSQLiteFiles(t *testing.T) {
	t.Parallel()
	s, p := embeddedProcess(t, nil)
	dir := valueOf(p.env, "TAKEOUT_DATA_DIR")
	second := map[string]string{"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_DATA_DIR": dir, "TAKEOUT_LOG_LEVEL": "error"}
	run(t, second).complains(t, 1, dir, fmt.Sprintf("process %d", p.cmd.Process.Pid), "--data-dir")
	s.awaitDispatched(t, s.place(t, "x", 1)) // and the first is not disturbed
	require.NoError(t, p.terminate(t))
	next := startProcess(t, "next", map[string]string{"TAKEOUT_DATA_DIR": dir})
	require.Len(t, (&system{api: next.url}).list(t, "").Items, 1, "its files are free when it has ended")
}

func TestMigratingIsOneStepAndServingAnother(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		env := map[string]string{
			"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_DATA_DIR": t.TempDir(), "TAKEOUT_LOG_LEVEL": "error",
			"TAKEOUT_ORDER_DATABASE_URL": st.order, "TAKEOUT_DISPATCH_DATABASE_URL": st.dispatch, "TAKEOUT_BROKER_URL": st.broker,
		}
		run(t, env, "serve", "--no-migrate").complains(t, 1, "takeout migrate")
		first := run(t, env, "migrate")
		require.Equal(t, 0, first.code, "%s", first)
		require.Contains(t, first.stdout, "ran order/00001_order.sql in the order database\n")
		require.Contains(t, first.stdout, "ran dispatch/00001_dispatch.sql in the dispatch database\n")
		second := run(t, env, "migrate")
		require.Equal(t, outcome{stdout: "the databases are up to date\n"}, second)

		env["TAKEOUT_MIGRATE"] = "false"
		p := startProcess(t, "serving", env)
		s := &system{stack: st, api: p.url, dispatchAPI: p.url}
		s.addCourier(t, "zhao", 0)
		s.awaitDispatched(t, s.place(t, "x", 1))
		require.NoError(t, p.terminate(t), "SIGTERM is an orderly end")
	})
}

func TestSchemaOfANewerProgramIsRefused(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		env := map[string]string{
			"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_DATA_DIR": t.TempDir(), "TAKEOUT_LOG_LEVEL": "error",
			"TAKEOUT_ORDER_DATABASE_URL": st.order, "TAKEOUT_DISPATCH_DATABASE_URL": st.dispatch, "TAKEOUT_BROKER_URL": st.broker,
		}
		require.Equal(t, 0, run(t, env, "migrate").code)
		execute(t, st.order, "INSERT INTO schema_order (version_id, is_applied) VALUES (99, 1)")
		for _, args := range [][]string{{"serve"}, {"serve", "--no-migrate"}, {"migrate"}} {
			run(t, env, args...).complains(t, 1, "version 99", "newer")
		}
		found := findings(t, run(t, env, "doctor"))["order database"]
		require.Contains(t, found.Cause, "newer")
		require.Contains(t, found.Remedy, "newer program")
		require.Equal(t, 1, count(t, st.order, "SELECT COUNT(*) FROM schema_order WHERE version_id = 99"))
	})
}

// Somebody tidies up, or restores a copy, under the running program.
func TestFileThatIsReplacedUnderTheProgramMakesItUnavailable(t *testing.T) {
	t.Parallel()
	s := startOne(t, embedded(t))
	s.awaitDispatched(t, s.place(t, "x", 1))
	file := strings.TrimPrefix(s.order, "sqlite:")
	require.Equal(t, http.StatusOK, mustGet(t, s.api+"/readyz").status)
	require.NoError(t, os.Rename(file, file+".away"))
	gone := mustGet(t, s.api+"/readyz")
	require.Equal(t, http.StatusServiceUnavailable, gone.status, "%s", gone)
	require.Contains(t, string(gone.body), "deleted or replaced while it is in use")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	require.Equal(t, http.StatusServiceUnavailable, mustGet(t, s.api+"/readyz").status)
	require.NoError(t, os.Rename(file+".away", file))
	require.Equal(t, http.StatusOK, mustGet(t, s.api+"/readyz").status)
}

func TestDamagedFileIsNamedAtOnceAndWhatToDoAboutIt(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "dispatch.db"), bytes.Repeat([]byte("no database "), 1000), 0o600))
	env := map[string]string{"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_DATA_DIR": dir, "TAKEOUT_LOG_LEVEL": "error", "TAKEOUT_START_TIMEOUT": "1h"}
	run(t, env).complains(t, 1, "dispatch.db", "not a database")
	doctor := run(t, env, "doctor", "-o", "table")
	require.Equal(t, 1, doctor.code)
	require.Contains(t, doctor.stdout, "the file is damaged, or no database: stop takeout, move it away")
}

func TestProgramRefusesTheDatabaseOfAnotherService(t *testing.T) {
	inBothPlaces(t, func(t *testing.T, st stack) {
		env := map[string]string{
			"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_DATA_DIR": t.TempDir(), "TAKEOUT_LOG_LEVEL": "error",
			"TAKEOUT_ORDER_DATABASE_URL": st.order, "TAKEOUT_DISPATCH_DATABASE_URL": st.dispatch, "TAKEOUT_BROKER_URL": st.broker,
		}
		require.Equal(t, 0, run(t, env, "migrate").code)
		env["TAKEOUT_ORDER_DATABASE_URL"], env["TAKEOUT_DISPATCH_DATABASE_URL"] = st.dispatch, st.order
		run(t, env).complains(t, 1, "belongs to the dispatch service")
	})
}

func TestDatabaseThatDoesNotAnswerIsNamedAfterTheStartTimeout(t *testing.T) {
	t.Parallel()
	addr := freeAddr(t)
	o := run(t, map[string]string{
		"TAKEOUT_HTTP_ADDR": freeAddr(t), "TAKEOUT_DATABASE_URL": "mysql://user:" + password + "@" + addr + "/", "TAKEOUT_DATA_DIR": t.TempDir(),
		"TAKEOUT_START_TIMEOUT": "500ms", "TAKEOUT_LOG_LEVEL": "error", "TAKEOUT_BROKER_URL": "sql:",
	})
	o.complains(t, 1, "order database", addr, "doctor")
}

func TestNoPasswordIsInTheLogOfARunningProgram(t *testing.T) {
	t.Parallel()
	st := production(t)
	p := startProcess(t, "talkative", map[string]string{
		"TAKEOUT_ORDER_DATABASE_URL": st.order, "TAKEOUT_DISPATCH_DATABASE_URL": st.dispatch,
		"TAKEOUT_BROKER_URL": "amqp://user:" + password + "@" + freeAddr(t) + "/", "TAKEOUT_LOG_LEVEL": "debug",
	})
	s := &system{api: p.url, dispatchAPI: p.url}
	s.place(t, "x", 1)
	for _, path := range []string{"/readyz", "/metrics", "/openapi.json", "/livez"} {
		require.NotContains(t, mustGet(t, p.url+path).String(), password, path)
	}
	require.NoError(t, p.terminate(t))
	require.Contains(t, p.log.String(), "amqp://", "the log tells where things are")
	require.NotContains(t, p.log.String(), password)
	require.NotContains(t, p.log.String(), parse(t, st.order).User.String()+"@")
}

// execute changes a database past the program.
func execute(t testing.TB, rawURL, statement string) {
	t.Helper()
	db, err := sqldb.Open("test", rawURL, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	defer db.Close()
	_, err = db.Writer().Exec(statement)
	require.NoError(t, err)
}
