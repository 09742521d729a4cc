package testenv

import (
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

// process is a child that does not outlive this program.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

func startProcess(cmd *exec.Cmd) (*process, error) {
	p := &process{cmd: cmd, ended: make(chan struct{})}
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

func (p *process) running() bool {
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

func (p *process) signal(s syscall.Signal) error {
	if !p.running() {
		return errors.New("it is not running")
	}
	return p.cmd.Process.Signal(s)
}

// end asks the process to end with SIGTERM and kills it if it has not after the given time.
func (p *process) end(patience time.Duration) error {
	if !p.running() {
		return nil
	}
	_ = p.signal(syscall.SIGTERM)
	select {
	case <-p.ended:
		return nil
	case <-time.After(patience):
		p.kill()
		return fmt.Errorf("it ignored SIGTERM for %v and was killed", patience)
	}
}

func (p *process) kill() {
	if p.running() {
		// The group, because Erlang has helper processes.
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.ended
	}
}

const tempPrefix = "takeout-test-"

// newTempDir makes a directory whose name tells the process that owns it.
func newTempDir(name string) (string, error) {
	sweepTempDirs()
	return os.MkdirTemp("", fmt.Sprintf("%s%d-%s-", tempPrefix, os.Getpid(), name))
}

// sweepTempDirs removes the directories of processes that were killed before they could.
func sweepTempDirs() {
	dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), tempPrefix+"*"))
	for _, dir := range dirs {
		if pid, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(dir), tempPrefix), "-"); isGone(pid) {
			_ = os.RemoveAll(dir)
		}
	}
}

func isGone(pid string) bool {
	id, err := strconv.Atoi(pid)
	return err == nil && errors.Is(syscall.Kill(id, 0), syscall.ESRCH)
}

// freePort returns a port that nobody listens on. It lies below the ephemeral ports, because these may be
// taken by any outgoing connection while a server is stopped, and because a client that keeps dialling a
// closed ephemeral port of its own host can end up connected to itself.
func freePort() (int, error) {
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

func freePorts(ports ...*int) (err error) {
	for _, p := range ports {
		if *p, err = freePort(); err != nil {
			return err
		}
	}
	return nil
}

// withFreePorts tries again when another process took a port between our look at it and the server's.
func withFreePorts(start func() (server, error)) (s server, err error) {
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
	return nil, err
}

// awaitReady pings until the server answers, or ended is closed, or patience is over.
func awaitReady(k kind, u *url.URL, ended <-chan struct{}, patience time.Duration) error {
	deadline := time.Now().Add(patience)
	for {
		err := ping(k, u)
		if err == nil {
			return nil
		}
		select {
		case <-ended:
			return errors.New("it ended while starting")
		case <-time.After(50 * time.Millisecond):
		}
		if closing.Load() {
			return errClosing
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("it does not answer after %v: %w", patience, err)
		}
	}
}

func ping(k kind, u *url.URL) error {
	_, err := greet(k, u)
	return err
}

// product returns name and version, as the server tells them.
func product(k kind, u *url.URL) string {
	name, err := greet(k, u)
	if err != nil {
		return k.title()
	}
	return name
}

func greet(k kind, u *url.URL) (string, error) {
	if k == rabbitKind {
		conn, err := amqp.DialConfig(u.String(), amqp.Config{Dial: amqp.DefaultDial(5 * time.Second)})
		if err != nil {
			return "", err
		}
		defer conn.Close()
		return fmt.Sprint(conn.Properties["product"], " ", conn.Properties["version"]), nil
	}
	db, err := openMySQL(u)
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
	if strings.Contains(version, "MariaDB") {
		return "MariaDB " + strings.SplitN(version, "-", 2)[0], nil
	}
	return "MySQL " + version, nil
}

// tail returns the end of a log, for error messages.
func tail(name string, text []byte) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(lines) > 25 {
		lines = lines[len(lines)-25:]
	}
	return "\n--- end of " + name + ":\n" + strings.Join(lines, "\n")
}
