package testenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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

// native starts processes of a program that is installed on this machine.
type native struct {
	kind    kind
	program string
}

func (n native) String() string { return "native " + n.program }
func (n native) way() string    { return "native" }

// findNative finds the program of this kind.
func findNative(k kind) (backend, error) {
	names := []string{"mariadbd", "mysqld"}
	if k == rabbitKind {
		// Debian's program on the PATH is a wrapper that changes the user and the log directory.
		names = []string{"/usr/lib/rabbitmq/bin/rabbitmq-server", "rabbitmq-server"}
	}
	for _, name := range names {
		if program := look(name); program != "" {
			return native{k, program}, nil
		}
	}
	return nil, fmt.Errorf("no %s is installed", filepath.Base(names[0]))
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

func (n native) start(shared bool, settings ...string) (server, error) {
	return withFreePorts(func() (server, error) {
		if n.kind == mysqlKind {
			return newNativeMySQL(n.program, settings)
		}
		return newNativeRabbitMQ(n.program, shared)
	})
}

// nativeServer is what the two native servers have in common.
type nativeServer struct {
	kind    kind
	dir     string
	address *url.URL
	command func() *exec.Cmd
	logs    []string
	process *process
}

func (s *nativeServer) url() *url.URL          { return s.address }
func (s *nativeServer) among() (string, error) { return s.address.Host, nil }
func (s *nativeServer) management() string     { return "" }

func (s *nativeServer) ctl(...string) (string, error) {
	return "", errors.New("only RabbitMQ has rabbitmqctl")
}

func (s *nativeServer) start() error {
	if s.process.running() {
		return errors.New("it is running already")
	}
	cmd := s.command()
	out, err := os.OpenFile(filepath.Join(s.dir, "output.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, out, out
	if s.process, err = startProcess(cmd); err != nil {
		return err
	}
	if err := awaitReady(s.kind, s.address, s.process.ended, 2*time.Minute); err != nil {
		s.process.kill()
		for _, log := range append(s.logs, out.Name()) {
			text, _ := os.ReadFile(log)
			err = fmt.Errorf("%w%s", err, tail(filepath.Base(log), text))
		}
		return err
	}
	return nil
}

func (s *nativeServer) stop() error {
	if !s.process.running() {
		return errors.New("it is not running")
	}
	_ = s.process.signal(syscall.SIGCONT)
	return s.process.end(time.Minute)
}

func (s *nativeServer) kill() error {
	if !s.process.running() {
		return errors.New("it is not running")
	}
	s.process.kill()
	return nil
}

func (s *nativeServer) freeze() error { return s.process.signal(syscall.SIGSTOP) }
func (s *nativeServer) thaw() error   { return s.process.signal(syscall.SIGCONT) }

// close kills, because nothing of the server is needed any more.
func (s *nativeServer) close() {
	s.process.kill()
	if err := os.RemoveAll(s.dir); err != nil {
		say("%s is left behind: %v", s.dir, err)
	}
}

func newNativeMySQL(program string, settings []string) (_ server, err error) {
	dir, err := newTempDir("mysql")
	if err != nil {
		return nil, err
	}
	s := &nativeServer{kind: mysqlKind, dir: dir}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	// An own directory for temporary tables as well: in a shared one two servers that start at the same
	// time have crashed.
	data, initFile, own := filepath.Join(dir, "data"), filepath.Join(dir, "init.sql"), []string{"--tmpdir=" + dir}
	if err := os.WriteFile(initFile, []byte(
		"CREATE USER IF NOT EXISTS 'root'@'127.0.0.1';\n"+
			"ALTER USER 'root'@'127.0.0.1' IDENTIFIED BY '"+mysqlPassword+"';\n"+
			"GRANT ALL PRIVILEGES ON *.* TO 'root'@'127.0.0.1' WITH GRANT OPTION;\n"), 0o600); err != nil {
		return nil, err
	}
	if os.Geteuid() == 0 {
		own = append(own, "--user=root")
	}
	if err := createDataDirectory(program, data, own); err != nil {
		return nil, err
	}
	s.address = address(mysqlKind, "127.0.0.1", port)
	s.command = func() *exec.Cmd {
		return exec.Command(program, slices.Concat([]string{
			"--no-defaults", // must be the first: the machine's own configuration is for another server
			"--datadir=" + data,
			"--socket=" + filepath.Join(dir, "socket"),
			"--pid-file=" + filepath.Join(dir, "pid"),
			"--port=" + strconv.Itoa(port),
			"--bind-address=127.0.0.1",
			"--init-file=" + initFile,
		}, own, mysqlSettings, settings)...)
	}
	if err := s.start(); err != nil {
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
	if bytes.Contains(version, []byte("MariaDB")) {
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

// nativeRabbitMQ is a broker with its own Erlang name server (epmd), so that it neither meets other
// nodes of this machine nor leaves a daemon behind.
type nativeRabbitMQ struct {
	nativeServer
	epmd    *process
	api     string
	program string
	env     []string
}

func newNativeRabbitMQ(program string, withManagement bool) (server, error) {
	return newRabbitNode(program, rabbitNode{name: "takeout-test@localhost", management: withManagement})
}

// rabbitNode is what nodes differ in.
type rabbitNode struct {
	name       string
	management bool
	cluster    *rabbitCluster // nil for one that is alone
}

// rabbitCluster is what the nodes of a cluster have in common.
type rabbitCluster struct {
	home     string // with the cookie
	epmdPort int
	nodes    []string
}

func (c *rabbitCluster) settings() string {
	if c == nil {
		return ""
	}
	text := "cluster_partition_handling = pause_minority\ncluster_formation.peer_discovery_backend = classic_config\n"
	for i, node := range c.nodes {
		text += fmt.Sprintf("cluster_formation.classic_config.nodes.%d = %s\n", i+1, node)
	}
	return text
}

// newRabbitNode starts a broker. The nodes of a cluster must be started at the same time: they wait for each other.
func newRabbitNode(program string, n rabbitNode) (_ server, err error) {
	dir, err := newTempDir("rabbitmq")
	if err != nil {
		return nil, err
	}
	s := &nativeRabbitMQ{nativeServer: nativeServer{kind: rabbitKind, dir: dir}, program: program}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	var port, distPort, epmdPort, apiPort int
	if err := freePorts(&port, &distPort, &epmdPort, &apiPort); err != nil {
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
		"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS="+erlangSettings+" "+loopback,
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
	s.address = address(rabbitKind, "127.0.0.1", port)
	s.command = func() *exec.Cmd {
		cmd := exec.Command(program)
		cmd.Env = s.env
		return cmd
	}
	if err := s.start(); err != nil {
		return nil, err
	}
	return s, nil
}

// startEPMD starts the name server ourselves, as the broker would start it as a daemon that stays.
func startEPMD(port int) (*process, error) {
	program := look("epmd")
	if program == "" {
		found, _ := filepath.Glob("/usr/lib/erlang/erts-*/bin/epmd")
		if len(found) == 0 {
			return nil, errors.New("epmd is not installed; it belongs to Erlang")
		}
		program = found[0]
	}
	return startProcess(exec.Command(program, "-port", strconv.Itoa(port), "-address", "127.0.0.1"))
}

func (s *nativeRabbitMQ) management() string { return s.api }

func (s *nativeRabbitMQ) ctl(args ...string) (string, error) {
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

func (s *nativeRabbitMQ) close() {
	s.nativeServer.close()
	if s.epmd != nil {
		s.epmd.kill()
	}
}
