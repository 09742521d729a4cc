//go:build unix

package servers

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/go-sql-driver/mysql"
	amqp "github.com/rabbitmq/amqp091-go"
)

// Process is a child that does not outlive this program.
type Process struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

// StartProcess starts the command. Its SysProcAttr is ours.
func StartProcess(cmd *exec.Cmd) (*Process, error) {
	p := &Process{cmd: cmd, ended: make(chan struct{})}
	cmd.SysProcAttr = ownGroup()
	started := make(chan error)
	go func() {
		// The kernel's death signal is tied to the thread that forked, so this thread stays until the
		// child has ended.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
		close(p.ended)
	}()
	return p, <-started
}

// PID returns the id of the process.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Running reports whether the process has not ended. A nil one has.
func (p *Process) Running() bool {
	if p == nil {
		return false
	}
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// Signal sends the signal to the process, and not to its children.
func (p *Process) Signal(s syscall.Signal) error {
	if !p.Running() {
		return errors.New("it is not running")
	}
	return p.cmd.Process.Signal(s)
}

// awaitHalt returns when a process that was sent SIGSTOP has halted, as far as the system tells: a busy one goes on a little.
func (p *Process) awaitHalt() {
	for range 1000 {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
		if err != nil || strings.Contains(string(stat), ") T ") {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// End asks the process to end with SIGTERM and kills it if it has not after the given time.
func (p *Process) End(patience time.Duration) error {
	if !p.Running() {
		return nil
	}
	_ = p.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
		return nil
	case <-time.After(patience):
		p.Kill()
		return fmt.Errorf("it ignored SIGTERM for %v and was killed", patience)
	}
}

// Ended is closed when the process has ended.
func (p *Process) Ended() <-chan struct{} { return p.ended }

// ExitCode returns the code with which the process ended, -1 if a signal ended it or it has not.
func (p *Process) ExitCode() int {
	if p.Running() {
		return -1
	}
	return p.cmd.ProcessState.ExitCode()
}

// Kill ends the process and its children with SIGKILL, and returns when it has ended.
func (p *Process) Kill() {
	if p.Running() {
		// The group, because Erlang has helper processes.
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.ended
	}
}

const tempPrefix = "takeout-servers-"

// newTempDir makes a directory whose name tells the process that owns it.
func newTempDir(name string) (string, error) {
	Sweep()
	return os.MkdirTemp("", fmt.Sprintf("%s%d-%s-", tempPrefix, os.Getpid(), name))
}

// Sweep removes the directories of processes that were killed before they could.
func Sweep() {
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), tempPrefix+"*"))
	for _, dir := range dirs {
		if pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), tempPrefix), "-"); IsGone(pid) {
			_ = os.RemoveAll(dir)
		}
	}
}

// IsGone reports whether no process has that id.
func IsGone(pid string) bool {
	id, err := strconv.Atoi(pid)
	return err == nil && errors.Is(syscall.Kill(id, 0), syscall.ESRCH)
}

// FreePort returns a port that nobody listens on. It lies below the ephemeral ports, because these may be
// taken by any outgoing connection while a server is stopped, and because a client that keeps dialling a
// closed ephemeral port of its own host can end up connected to itself.
func FreePort() (int, error) {
	for range 200 {
		port := 15000 + rand.IntN(17000)
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			continue
		}
		return port, l.Close()
	}
	return 0, errors.New("no free port between 15000 and 32000")
}

// FreePorts sets each port as FreePort does.
func FreePorts(ports ...*int) (err error) {
	for _, p := range ports {
		if *p, err = FreePort(); err != nil {
			return err
		}
	}
	return nil
}

// WithFreePorts tries again when another process took a port between our look at it and the server's.
func WithFreePorts[S any](start func() (S, error)) (s S, err error) {
	for range 3 {
		s, err = start()
		if err == nil {
			return s, nil
		}
		text := strings.ToLower(err.Error())
		if !strings.Contains(text, "in use") && !strings.Contains(text, "already allocated") {
			break
		}
	}
	return s, err
}

// AwaitReady pings until the server answers. It gives up when ctx ends, ended is closed, or patience is over.
func AwaitReady(ctx context.Context, k Kind, u *url.URL, ended <-chan struct{}, patience time.Duration) error {
	deadline := time.Now().Add(patience)
	for {
		_, err := Greet(k, u)
		if err == nil {
			return nil
		}
		select {
		case <-ended:
			return errors.New("it ended while starting")
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("it does not answer after %v: %w", patience, err)
		}
	}
}

// Greet asks the server for its name and version.
func Greet(k Kind, u *url.URL) (product string, err error) {
	if k == RabbitMQ {
		conn, err := amqp.DialConfig(u.String(), amqp.Config{Dial: amqp.DefaultDial(5 * time.Second)})
		if err != nil {
			return "", err
		}
		defer conn.Close()
		return fmt.Sprint(conn.Properties["product"], " ", conn.Properties["version"]), nil
	}
	db, err := OpenMySQL(u)
	if err != nil {
		return "", err
	}
	defer db.Close()
	var version string
	if err := db.QueryRow("SELECT VERSION()").Scan(&version); err != nil {
		var refused *mysql.MySQLError
		if errors.As(err, &refused) {
			return "", fmt.Errorf("it refuses the user %q: %w", u.User.Username(), err)
		}
		return "", err
	}
	if isMariaDB(version) {
		return "MariaDB " + strings.SplitN(version, "-", 2)[0], nil
	}
	return "MySQL " + version, nil
}

// Processlist returns the table of the server's connections. MySQL has two, and from version 9 on cannot read the older one while
// any connection executes a statement with bytes in it that are no text.
func Processlist(ctx context.Context, db *sql.DB) (table string, err error) {
	var version string
	if err := db.QueryRowContext(ctx, "SELECT VERSION()").Scan(&version); err != nil {
		return "", err
	}
	if isMariaDB(version) {
		return "information_schema.processlist", nil
	}
	return "performance_schema.processlist", nil
}

func isMariaDB(version string) bool { return strings.Contains(version, "MariaDB") }

// OpenMySQL returns a pool of connections to the server. It does not connect.
func OpenMySQL(server *url.URL) (*sql.DB, error) {
	password, _ := server.User.Password()
	config, err := mysql.ParseDSN("tcp(" + server.Host + ")/?" + server.RawQuery)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", server.Redacted(), err)
	}
	config.User, config.Passwd = server.User.Username(), password
	config.Timeout = 5 * time.Second
	config.Logger = &mysql.NopLogger{}
	connector, err := mysql.NewConnector(config)
	if err != nil {
		return nil, err
	}
	return sql.OpenDB(connector), nil
}

// Tail returns the end of a log, for error messages.
func Tail(name string, text []byte) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(lines) > 25 {
		lines = lines[len(lines)-25:]
	}
	return "\n--- end of " + name + ":\n" + strings.Join(lines, "\n")
}
