// Takeout takes orders and sends a courier for each of them, once, over two databases and a broker that no transaction
// spans. See README.md.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/lmittmann/tint"
	"golang.org/x/term"

	"takeout/app"
	"takeout/crashpoint"
	"takeout/ports/messaging"
	"takeout/service"
)

// Exit codes.
const (
	exitFailed = 1
	exitUsage  = 2
)

// cli is the command line. Serve is what happens without a command.
type cli struct {
	Serve        serveCmd        `cmd:"" default:"withargs" help:"Run the roles of this process (the default)."`
	Migrate      migrateCmd      `cmd:"" help:"Bring the databases up to date, and stop."`
	Order        orderCmd        `cmd:"" help:"Place, show, list, watch and cancel orders of a running takeout."`
	Dispatch     dispatchCmd     `cmd:"" help:"Show dispatches of a running takeout, and say that they are delivered."`
	Courier      courierCmd      `cmd:"" help:"Show, add and change the couriers of a running takeout."`
	Failures     failuresCmd     `cmd:"" help:"Show and repair the messages that could not be handled."`
	Compensation compensationCmd `cmd:"" help:"Show whether the compensation of a running takeout is stopped, and let it go on."`
	Reconcile    reconcileCmd    `cmd:"" help:"Compare the services' databases once, and repair what differs if asked to."`
	Topology     topologyCmd     `cmd:"" help:"Print which event goes through which queue to whom."`
	Verify       verifyCmd       `cmd:"" help:"Try to lose an order or to dispatch one twice: load, faults and a checker, on servers of its own."`
	Doctor       doctorCmd       `cmd:"" help:"Examine everything that takeout depends on: what is wrong, and what to do."`
	Config       configCmd       `cmd:"" help:"Print the settings in force, passwords masked."`
	Healthcheck  healthcheckCmd  `cmd:"" help:"Ask a running takeout whether it is ready; the exit code says it."`
	Version      versionCmd      `cmd:"" help:"Print what this program was built from."`
}

func main() {
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr))
}

// run is main with an exit code.
func run(args []string, stdout, stderr io.Writer) int {
	var c cli
	parser, err := kong.New(&c, kong.Name("takeout"), kong.Writers(stdout, stderr), kong.UsageOnError(),
		kong.Description("Orders and their dispatch: each order gets one courier, whatever breaks in between."),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}), kong.Bind(output{stdout, stderr}))
	if err != nil {
		fmt.Fprintln(stderr, "takeout:", err)
		return exitUsage
	}
	if err := errors.Join(refuseSecrets(args), readSecretFiles(stderr)); err != nil {
		fmt.Fprintln(stderr, "takeout:", err)
		return exitUsage
	}
	warnUnknown(stderr, parser.Model)
	if len(args) > 0 && args[0] == "help" {
		args = append(args[1:], "--help")
	}
	command, err := parser.Parse(args)
	if err != nil {
		fmt.Fprintln(stderr, "takeout:", err)
		return exitUsage
	}
	if err := command.Run(); err != nil {
		code := exitFailed
		if _, wrong := errors.AsType[*service.SettingError](err); wrong {
			code = exitUsage
		}
		if coded, ok := errors.AsType[exitError](err); ok {
			code = coded.code
		}
		if text := err.Error(); text != "" {
			fmt.Fprintln(stderr, "takeout:", text)
		}
		return code
	}
	return 0
}

// exitError is an error with an exit code.
type exitError struct {
	error
	code int
}

func (e exitError) Unwrap() error { return e.error }

func usage(err error) error {
	if err == nil {
		return nil
	}
	return exitError{err, exitUsage}
}

// refuseSecrets refuses a password or key on the command line, where everybody on the machine can read it.
func refuseSecrets(args []string) error {
	for _, arg := range args {
		if arg == "--event-key" || strings.HasPrefix(arg, "--event-key=") {
			return errors.New("--event-key is a secret, and every user of this machine can read the command line; set TAKEOUT_EVENT_KEY, " +
				"or TAKEOUT_EVENT_KEY_FILE to the name of a file that holds it")
		}
		if service.HasPassword(arg) {
			flag, _, _ := strings.Cut(arg, "=")
			if !strings.HasPrefix(flag, "--") {
				flag = "a flag"
			}
			return fmt.Errorf("%s has a password on the command line, which every user of this machine can read; "+
				"put the URL into its environment variable, or into a file that the variable with _FILE appended to its name points to", flag)
		}
	}
	return nil
}

// readSecretFiles sets TAKEOUT_X from the file that TAKEOUT_X_FILE names, and warns of one that everybody may read.
func readSecretFiles(stderr io.Writer) error {
	for _, entry := range os.Environ() {
		name, path, _ := strings.Cut(entry, "=")
		target, isFile := strings.CutSuffix(name, "_FILE")
		if !isFile || !strings.HasPrefix(name, "TAKEOUT_") {
			continue
		}
		if os.Getenv(target) != "" {
			return fmt.Errorf("both %s and %s are set; set one", target, name)
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if info, err := os.Stat(path); err == nil && info.Mode()&0o004 != 0 && runtime.GOOS != "windows" {
			fmt.Fprintf(stderr, "takeout: %s: every user of this machine can read the file %s; chmod 600 it\n", name, path)
		}
		secret := strings.TrimSpace(string(text))
		if secret == "" {
			return fmt.Errorf("%s: the file %s is empty", name, path)
		}
		if err := os.Setenv(target, secret); err != nil {
			return err
		}
	}
	return nil
}

// warnUnknown points out variables that look like settings and are none, for they are usually spelled wrong.
func warnUnknown(stderr io.Writer, model *kong.Application) {
	known := map[string]bool{crashpoint.Variable: true}
	var visit func(*kong.Node)
	visit = func(node *kong.Node) {
		for _, flag := range node.Flags {
			for _, env := range flag.Envs {
				known[env] = true
			}
		}
		for _, child := range node.Children {
			visit(child)
		}
	}
	visit(model.Node)
	for _, entry := range os.Environ() {
		name, _, _ := strings.Cut(entry, "=")
		if strings.HasPrefix(name, "TAKEOUT_") && !strings.HasPrefix(name, "TAKEOUT_TEST_") && !known[strings.TrimSuffix(name, "_FILE")] {
			fmt.Fprintf(stderr, "takeout: there is no setting %s; takeout serve --help shows all\n", name)
		}
	}
}

type serveCmd struct {
	service.Config
}

// Run serves until it is told to stop. A second signal stops it at once.
func (c *serveCmd) Run(out output) error {
	if err := c.Validate(); err != nil {
		return usage(err)
	}
	crashAt := os.Getenv(crashpoint.Variable)
	if err := crashpoint.Arm(crashAt); err != nil {
		return usage(err)
	}
	logger := newLogger(c.Config, out.err)
	if crashAt != "" {
		logger.Warn("this process is going to die on purpose", "at", crashAt)
	}
	ctx, stopped := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stopped()
	s, err := service.Start(ctx, c.Config, logger)
	if err != nil && ctx.Err() != nil {
		logger.Info("stopped before it served", "error", err)
		return nil
	}
	if err != nil {
		return err
	}
	greet(out, c.Config, s.Addr())
	logger.Info("serving", "addr", s.Addr(), "roles", strings.Join(c.Roles, ","), "version", service.Version())

	var failure error
	select {
	case <-ctx.Done():
		logger.Info("stopping; a second signal stops at once")
	case failure = <-s.Failed():
		logger.Error("a part of the program failed; stopping", "error", failure)
	}
	again, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	err = s.Stop(again)
	if again.Err() != nil {
		return errors.New("stopped at once; what was in flight will be delivered again")
	}
	if err == nil && failure == nil {
		logger.Info("stopped")
	}
	return errors.Join(failure, err)
}

// greet tells a person at a terminal what to do next.
func greet(out output, cfg service.Config, addr string) {
	host, port, _ := net.SplitHostPort(addr)
	if ip := net.ParseIP(host); ip == nil || ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	url := "http://" + net.JoinHostPort(host, port)
	fmt.Fprintf(out.out, "takeout serves %s   API: %s/docs   health: %s/readyz\n", url, url, url)
	for _, setting := range cfg.Effective() {
		if setting.Value != "" && strings.HasSuffix(setting.Flag, "-url") {
			fmt.Fprintf(out.out, "  %-24s %s\n", strings.TrimPrefix(strings.TrimSuffix(setting.Flag, "-url"), "--"), setting.Value)
		}
	}
	if !slices.Contains(cfg.Roles, "all") && !slices.Contains(cfg.Roles, "order") {
		return // orders are placed elsewhere
	}
	fmt.Fprintf(out.out, "\nPlace an order, and see who brings it:\n\n"+
		"  curl -i %s/v1/orders -H 'Content-Type: application/json' -d '{\"name\":\"Mapo tofu\",\"amount\":2850}'\n"+
		"  curl %s/v1/orders\n\n", url, url)
}

func newLogger(cfg service.Config, w io.Writer) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(cfg.LogLevel)) // one of kong's enum
	file, isFile := w.(*os.File)
	onTerminal := isFile && term.IsTerminal(int(file.Fd()))
	if cfg.LogFormat == "json" || cfg.LogFormat == "auto" && !onTerminal {
		return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level}))
	}
	return slog.New(tint.NewHandler(w, &tint.Options{Level: level, TimeFormat: time.TimeOnly, NoColor: !onTerminal || os.Getenv("NO_COLOR") != ""}))
}

type migrateCmd struct {
	service.Config
}

// Run migrates.
func (c *migrateCmd) Run(out output) error {
	if err := c.Validate(); err != nil {
		return usage(err)
	}
	ran, err := service.Migrate(context.Background(), c.Config, newLogger(c.Config, out.err))
	if err != nil {
		return err
	}
	if len(ran) == 0 {
		fmt.Fprintln(out.out, "the databases are up to date")
	}
	for _, migration := range ran {
		fmt.Fprintln(out.out, "ran", migration)
	}
	return nil
}

type topologyCmd struct {
	service.Config
}

// Run prints the topology.
func (c *topologyCmd) Run(out output) error {
	if err := c.Validate(); err != nil {
		return usage(err)
	}
	return messaging.WriteTopology(out.out, messaging.Topology(app.UseCases{}, c.PaymentGateway != "none"), c.RetryDelays)
}

type doctorCmd struct {
	service.Config
	formatFlag
}

// Run examines the dependencies. It fails if one does not work.
func (c *doctorCmd) Run(out output) error {
	diagnoses := service.Doctor(context.Background(), c.Config, slog.New(slog.DiscardHandler))
	sick := 0
	rows := [][]string{{"", "WHAT", "WHERE", "FINDING"}}
	for _, d := range diagnoses {
		verdict := "ok"
		if !d.OK {
			verdict = "BAD"
			sick++
		}
		rows = append(rows, []string{verdict, d.What, d.Where, d.Cause})
		if d.Remedy != "" {
			rows = append(rows, []string{"", "", "", "→ " + d.Remedy})
		}
	}
	if err := out.write(c.formatFlag, diagnoses, rows); err != nil {
		return err
	}
	if sick > 0 {
		return exitError{errors.New(""), exitFailed}
	}
	return nil
}

type configCmd struct {
	service.Config
	formatFlag
}

// Run prints the settings in force.
func (c *configCmd) Run(out output) error {
	if err := c.Validate(); err != nil {
		return usage(err)
	}
	settings := c.Effective()
	rows := [][]string{{"FLAG", "ENVIRONMENT", "VALUE"}}
	for _, s := range settings {
		rows = append(rows, []string{s.Flag, s.Env, s.Value})
	}
	return out.write(c.formatFlag, settings, rows)
}

type healthcheckCmd struct {
	HTTPAddr string `name:"http-addr" env:"TAKEOUT_HTTP_ADDR" default:"127.0.0.1:8080" help:"Address of the takeout to ask."`
}

// Run asks /readyz. A process that is degraded is healthy: restarting it would not help.
func (c *healthcheckCmd) Run(out output) error {
	host, port, err := net.SplitHostPort(c.HTTPAddr)
	if err != nil {
		return usage(fmt.Errorf("--http-addr (TAKEOUT_HTTP_ADDR): must be host:port"))
	}
	if ip := net.ParseIP(host); host == "" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	client := http.Client{Timeout: 5 * time.Second}
	response, err := client.Get("http://" + net.JoinHostPort(host, port) + "/readyz")
	if err != nil {
		return fmt.Errorf("no takeout answers at %s", c.HTTPAddr)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	if err != nil {
		return err
	}
	fmt.Fprintf(out.out, "%s\n", body)
	var ready struct{ Status string }
	switch err := json.Unmarshal(body, &ready); {
	case response.StatusCode != http.StatusOK:
		return fmt.Errorf("not ready: %s", response.Status)
	case err != nil || ready.Status == "":
		return fmt.Errorf("what answers at %s is not takeout", c.HTTPAddr)
	}
	return nil
}

type versionCmd struct{}

// Run prints the version.
func (versionCmd) Run(out output) error {
	_, err := fmt.Fprintln(out.out, "takeout", service.Version())
	return err
}
