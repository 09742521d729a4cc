//go:build unix

// Package servers starts private MySQL or MariaDB and RabbitMQ servers from the programs that are installed on this
// machine: as durable as in production, on free ports of 127.0.0.1, with their data in a temporary directory. They are
// there to be stopped, killed and frozen, and end with the process that started them.
package servers

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Kind is what a server is.
type Kind string

// The kinds.
const (
	MySQL    Kind = "mysql" // or MariaDB
	RabbitMQ Kind = "amqp"
)

// Title is what people call it.
func (k Kind) Title() string {
	if k == MySQL {
		return "MySQL or MariaDB"
	}
	return "RabbitMQ"
}

// Password is the one of every MySQL server's user root. RabbitMQ's guest has its own well-known one.
const Password = "takeout-test"

// MySQLSettings make a server as durable as in production, and otherwise small.
var MySQLSettings = []string{
	"--skip-name-resolve",
	"--character-set-server=utf8mb4",
	"--max-connections=500",
	"--innodb-buffer-pool-size=256M",
	"--innodb-flush-log-at-trx-commit=1",
}

// ErlangSettings are two schedulers, which do not spin while they wait, and a port table of fixed size: Erlang otherwise
// reserves one for all files that may be open, and some Docker engines allow a billion.
const ErlangSettings = "+S 2:2 +Q 65536 +sbwt none +sbwtdcpu none +sbwtdio none"

// Address is the URL of a server of that kind with those credentials.
func Address(k Kind, host string, port int) *url.URL {
	u := &url.URL{Scheme: "mysql", User: url.UserPassword("root", Password), Path: "/"}
	if k == RabbitMQ {
		u.Scheme, u.User = "amqp", url.UserPassword("guest", "guest")
	}
	u.Host = net.JoinHostPort(host, strconv.Itoa(port))
	return u
}

// Find returns the program of that kind that is installed. The error says what to install.
func Find(k Kind) (program string, err error) {
	names, pkg := []string{"mariadbd", "mysqld"}, "mariadb-server"
	if k == RabbitMQ {
		// Debian's program on the PATH is a wrapper that changes the user and the log directory.
		names, pkg = []string{"/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server"}, "rabbitmq-server"
	}
	for _, name := range names {
		if program := look(name); program != "" {
			return program, nil
		}
	}
	return "", fmt.Errorf("no %s is installed; on Debian and Ubuntu it is in the package %s", filepath.Base(names[0]), pkg)
}

// look finds a program on the PATH or where daemons are, which is not on the PATH of ordinary users.
func look(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/opt/homebrew/opt/mysql/bin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	return ""
}

// Start starts a server of that kind and returns when it accepts connections, or when ctx ends. A RabbitMQ starts
// faster without the management API. Settings are options of MySQL's command line.
func Start(ctx context.Context, k Kind, withManagement bool, settings ...string) (*Server, error) {
	program, err := Find(k)
	if err != nil {
		return nil, err
	}
	return WithFreePorts(func() (*Server, error) {
		if k == MySQL {
			return newMySQL(ctx, program, mysqlNode{user: "root", settings: func() []string { return settings }})
		}
		return newRabbitMQ(ctx, program, rabbitNode{name: "takeout-test@localhost", management: withManagement})
	})
}

// Server is one server. Its address and its data stay the same over Stop, Kill and Start.
type Server struct {
	kind    Kind
	dir     string
	address *url.URL
	command func() *exec.Cmd
	logs    []string
	process *Process

	// RabbitMQ only. It has its own Erlang name server (epmd), so that it neither meets other nodes of this machine nor
	// leaves a daemon behind.
	epmd    *Process
	api     string
	program string
	env     []string
}

// URL returns mysql://root:password@host:port/ or amqp://guest:guest@host:port.
func (s *Server) URL() *url.URL { return s.address }

// Among returns host and port at which other servers reach this one.
func (s *Server) Among() (string, error) { return s.address.Host, nil }

// Management returns the URL of RabbitMQ's management API, empty without.
func (s *Server) Management() string { return s.api }

// PID returns the id of the server's process, another one after each Start.
func (s *Server) PID() int { return s.process.PID() }

// Start starts the server after Stop or Kill, and returns when it accepts connections.
func (s *Server) Start() error { return s.start(context.Background()) }

func (s *Server) start(ctx context.Context) error {
	if s.process.Running() {
		return errors.New("it is running already")
	}
	cmd := s.command()
	out, err := os.OpenFile(filepath.Join(s.dir, "output.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, out, out
	if s.process, err = StartProcess(cmd); err != nil {
		return err
	}
	if err := AwaitReady(ctx, s.kind, s.address, s.process.ended, 2*time.Minute); err != nil {
		s.process.Kill()
		for _, log := range append(s.logs, out.Name()) {
			text, _ := os.ReadFile(log)
			err = fmt.Errorf("%w%s", err, Tail(filepath.Base(log), text))
		}
		return err
	}
	return nil
}

// Stop ends the server in good order, as an administrator would, and returns when it has ended.
func (s *Server) Stop() error {
	if !s.process.Running() {
		return errors.New("it is not running")
	}
	_ = s.process.Signal(syscall.SIGCONT)
	return s.process.End(time.Minute)
}

// Kill ends the server with SIGKILL.
func (s *Server) Kill() error {
	if !s.process.Running() {
		return errors.New("it is not running")
	}
	s.process.Kill()
	return nil
}

// Freeze halts the server: it answers nothing, and its connections stay open.
func (s *Server) Freeze() error {
	if err := s.process.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	s.process.awaitHalt()
	return nil
}

// Thaw lets a frozen server go on.
func (s *Server) Thaw() error { return s.process.Signal(syscall.SIGCONT) }

// Running reports whether the server's process is there, frozen or not.
func (s *Server) Running() bool { return s.process.Running() }

// Close ends the server in any state, and removes everything that belongs to it.
func (s *Server) Close() {
	s.process.Kill()
	s.epmd.Kill()
	if err := os.RemoveAll(s.dir); err != nil {
		fmt.Fprintf(os.Stderr, "%s is left behind: %v\n", s.dir, err)
	}
}

// mysqlNode is what servers differ in.
type mysqlNode struct {
	user     string          // that root runs it as
	settings func() []string // of its next start
}

func newMySQL(ctx context.Context, program string, n mysqlNode) (_ *Server, err error) {
	dir, err := newTempDir("mysql")
	if err != nil {
		return nil, err
	}
	s := &Server{kind: MySQL, dir: dir}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	port, err := FreePort()
	if err != nil {
		return nil, err
	}
	// An own directory for temporary tables as well: in a shared one two servers that start at the same
	// time have crashed.
	data, initFile, own := filepath.Join(dir, "data"), filepath.Join(dir, "init.sql"), []string{"--tmpdir=" + dir}
	if err := os.WriteFile(initFile, []byte(
		"SET sql_log_bin = 0;\n"+ // a member of a group has its own users
			"CREATE USER IF NOT EXISTS 'root'@'127.0.0.1';\n"+
			"ALTER USER 'root'@'127.0.0.1' IDENTIFIED BY '"+Password+"';\n"+
			"GRANT ALL PRIVILEGES ON *.* TO 'root'@'127.0.0.1' WITH GRANT OPTION;\n"), 0o600); err != nil {
		return nil, err
	}
	if os.Geteuid() == 0 {
		own = append(own, "--user="+n.user)
		if err := giveTo(n.user, dir, initFile); err != nil {
			return nil, err
		}
	}
	if err := createDataDirectory(program, data, own); err != nil {
		return nil, err
	}
	s.address = Address(MySQL, "127.0.0.1", port)
	s.command = func() *exec.Cmd {
		return exec.Command(program, slices.Concat([]string{
			"--no-defaults", // must be the first: the machine's own configuration is for another server
			"--datadir=" + data,
			"--socket=" + filepath.Join(dir, "socket"),
			"--pid-file=" + filepath.Join(dir, "pid"),
			"--port=" + strconv.Itoa(port),
			"--bind-address=127.0.0.1",
			"--init-file=" + initFile,
		}, own, MySQLSettings, n.settings())...)
	}
	if err := s.start(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

func createDataDirectory(program, data string, own []string) error {
	cmd := exec.Command(program, append([]string{"--no-defaults", "--initialize-insecure", "--datadir=" + data}, own...)...)
	version, err := exec.Command(program, "--no-defaults", "--version").Output()
	if err != nil {
		return fmt.Errorf("%s --version: %w", program, err)
	}
	if isMariaDB(string(version)) {
		install := look("mariadb-install-db")
		if install == "" {
			install = look("mysql_install_db")
		}
		if install == "" {
			return errors.New("mariadb-install-db is not installed; it belongs to MariaDB's server package")
		}
		cmd = exec.Command(install, append([]string{
			"--no-defaults", "--datadir=" + data, "--auth-root-authentication-method=normal", "--skip-test-db",
		}, own...)...)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, out)
	}
	return nil
}

// rabbitNode is what nodes differ in.
type rabbitNode struct {
	name       string
	management bool
	cluster    *cluster // nil for one that is alone
}

func newRabbitMQ(ctx context.Context, program string, n rabbitNode) (_ *Server, err error) {
	dir, err := newTempDir("rabbitmq")
	if err != nil {
		return nil, err
	}
	s := &Server{kind: RabbitMQ, dir: dir, program: program}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	var port, distPort, epmdPort, apiPort int
	if err := FreePorts(&port, &distPort, &epmdPort, &apiPort); err != nil {
		return nil, err
	}
	home := dir
	if n.cluster != nil {
		home, epmdPort = n.cluster.home, n.cluster.epmdPort
	}
	config, plugins := filepath.Join(dir, "rabbitmq.conf"), filepath.Join(dir, "enabled_plugins")
	settings := fmt.Sprintf("listeners.tcp.1 = 127.0.0.1:%d\ndisk_free_limit.absolute = 50MB\nlog.file.level = info\n", port) +
		n.cluster.settings()
	enabled := "[].\n"
	if n.management {
		settings += fmt.Sprintf("management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = %d\n", apiPort)
		enabled = "[rabbitmq_management].\n"
		s.api = fmt.Sprintf("http://guest:guest@127.0.0.1:%d", apiPort)
	}
	for file, text := range map[string]string{config: settings, plugins: enabled} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	loopback := "-kernel inet_dist_use_interface {127,0,0,1}"
	s.env = append(os.Environ(),
		"HOME="+home, // the Erlang cookie is made here
		"RABBITMQ_NODENAME="+n.name,
		"RABBITMQ_BASE="+dir,
		"RABBITMQ_MNESIA_BASE="+filepath.Join(dir, "data"),
		"RABBITMQ_LOG_BASE="+filepath.Join(dir, "log"),
		"RABBITMQ_CONFIG_FILE="+config,
		"RABBITMQ_ADVANCED_CONFIG_FILE="+filepath.Join(dir, "no-advanced.config"),
		"RABBITMQ_CONF_ENV_FILE="+filepath.Join(dir, "no-rabbitmq-env.conf"),
		"RABBITMQ_ENABLED_PLUGINS_FILE="+plugins,
		"RABBITMQ_DIST_PORT="+strconv.Itoa(distPort),
		"ERL_EPMD_PORT="+strconv.Itoa(epmdPort),
		"ERL_EPMD_ADDRESS=127.0.0.1",
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="+ErlangSettings+" "+loopback,
		"RABBITMQ_CTL_ERL_ARGS=+S 1:1 "+loopback,
		// The start script then becomes the broker instead of watching over it, so that the process we
		// signal is the broker.
		"RUNNING_UNDER_SYSTEMD=1",
	)
	if n.cluster == nil {
		if s.epmd, err = startEPMD(epmdPort); err != nil {
			return nil, err
		}
	}
	s.logs = []string{filepath.Join(dir, "log", n.name+".log")}
	s.address = Address(RabbitMQ, "127.0.0.1", port)
	s.command = func() *exec.Cmd {
		cmd := exec.Command(program)
		cmd.Env = s.env
		return cmd
	}
	if err := s.start(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// startEPMD starts the name server ourselves, as the broker would start it as a daemon that stays.
func startEPMD(port int) (*Process, error) {
	program := look("epmd")
	if program == "" {
		found, _ := filepath.Glob("/usr/lib/erlang/erts-*/bin/epmd")
		if len(found) == 0 {
			return nil, errors.New("epmd is not installed; it belongs to Erlang")
		}
		program = found[0]
	}
	return StartProcess(exec.Command(program, "-port", strconv.Itoa(port), "-address", "127.0.0.1"))
}

// Ctl runs rabbitmqctl on the broker and returns what it printed.
func (s *Server) Ctl(args ...string) (string, error) {
	if s.kind != RabbitMQ {
		return "", errors.New("only RabbitMQ has rabbitmqctl")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	program := filepath.Join(filepath.Dir(s.program), "rabbitmqctl")
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env, cmd.Dir = s.env, s.dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("rabbitmqctl %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}
