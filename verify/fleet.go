//go:build unix

package verify

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"takeout/verify/servers"
)

// fleet is the processes of the program under verification.
type fleet struct {
	members []*member

	mu   sync.Mutex
	died []string // those that ended though nobody made them
}

// member is one process, which ends and starts again many times.
type member struct {
	fleet   *fleet
	name    string // relay-2
	role    string
	program string
	env     []string
	addr    string // where it serves HTTP
	log     string // the file that it writes to

	mu       sync.Mutex // held while it is ended or started
	process  *servers.Process
	expected chan struct{} // closed before somebody ends the process
}

// add adds a process of the role, or of all of them, that is not started yet.
func (f *fleet) add(name, role, program, logs string, env []string) error {
	port, err := servers.FreePort()
	if err != nil {
		return err
	}
	addr := fmt.Sprintf("127.0.0.1:%d", port)
	f.members = append(f.members, &member{
		fleet: f, name: name, role: role, program: program, addr: addr, log: filepath.Join(logs, name+".log"),
		env: append(env, "TAKEOUT_ROLES="+role, "TAKEOUT_HTTP_ADDR="+addr),
	})
	return nil
}

// of returns the members that do the work of a role.
func (f *fleet) of(role string) []*member {
	var found []*member
	for _, m := range f.members {
		if m.role == role || m.role == "all" {
			found = append(found, m)
		}
	}
	return found
}

func (f *fleet) any(r *rand.Rand) *member { return f.members[r.IntN(len(f.members))] }

// start starts all members and waits until they serve.
func (f *fleet) start(ctx context.Context) error {
	for _, m := range f.members {
		if err := m.start(); err != nil {
			return err
		}
	}
	return f.awaitReady(ctx)
}

// heal lets the halted go on, starts the dead, and waits until all serve.
func (f *fleet) heal(ctx context.Context) error {
	for _, m := range f.members {
		_ = m.signal(syscall.SIGCONT)
		if !m.running() {
			if err := m.start(); err != nil {
				return err
			}
		}
	}
	return f.awaitReady(ctx)
}

func (f *fleet) awaitReady(ctx context.Context) error {
	for _, m := range f.members {
		if err := m.awaitReady(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (f *fleet) kill() {
	for _, m := range f.members {
		m.kill()
	}
}

// unexpected returns the ends that nobody had asked for.
func (f *fleet) unexpected() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.died...)
}

// logs returns the files that the members wrote.
func (f *fleet) logs() []string {
	var files []string
	for _, m := range f.members {
		files = append(files, m.log)
	}
	return files
}

// start starts the process, with further settings.
func (m *member) start(further ...string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	out, err := os.OpenFile(m.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := exec.Command(m.program, "serve")
	cmd.Env = append(append([]string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "TMPDIR=" + os.TempDir()}, m.env...), further...)
	cmd.Stdout, cmd.Stderr = out, out
	process, err := servers.StartProcess(cmd)
	if err != nil {
		return fmt.Errorf("start %s: %w", m.name, err)
	}
	expected := make(chan struct{})
	m.process, m.expected = process, expected
	go m.watch(process, expected, len(further) > 0)
	return nil
}

// watch notes an end that nobody asked for, and starts the process again as a supervisor would.
func (m *member) watch(process *servers.Process, expected chan struct{}, mayDie bool) {
	<-process.Ended()
	select {
	case <-expected:
		return
	default:
	}
	if mayDie {
		return
	}
	m.fleet.mu.Lock()
	m.fleet.died = append(m.fleet.died, fmt.Sprintf("%s ended by itself with code %d: %s", m.name, process.ExitCode(), m.lastWords()))
	m.fleet.mu.Unlock()
	time.Sleep(time.Second)
	m.mu.Lock()
	again := m.process == process
	m.mu.Unlock()
	if again {
		_ = m.start()
	}
}

// lastWords returns the end of the log.
func (m *member) lastWords() string {
	text, err := os.ReadFile(m.log)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(text[max(0, len(text)-600):]))
}

func (m *member) running() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.process.Running()
}

func (m *member) signal(s syscall.Signal) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.process.Signal(s)
}

// expect says that somebody ends the process now, and returns it.
func (m *member) expect() *servers.Process {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.process.Running() {
		select {
		case <-m.expected:
		default:
			close(m.expected)
		}
	}
	return m.process
}

func (m *member) kill() { m.expect().Kill() }

// terminate asks the process to stop in good order and returns the code with which it ended.
func (m *member) terminate(patience time.Duration) (code int, err error) {
	process := m.expect()
	err = process.End(patience)
	return process.ExitCode(), err
}

// awaitReady returns when the process serves HTTP and is ready.
func (m *member) awaitReady(ctx context.Context) error {
	client := http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: (&net.Dialer{}).DialContext}}
	deadline := time.Now().Add(2 * time.Minute)
	for {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+m.addr+"/readyz", nil)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err == nil {
			_ = response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return nil
			}
			err = fmt.Errorf("it answers %s", response.Status)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s is not ready after two minutes: %w; it says: %s", m.name, err, m.lastWords())
		}
		time.Sleep(50 * time.Millisecond)
	}
}
