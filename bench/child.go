//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"syscall"
	"time"

	"takeout/verify/servers"
)

// site is where a system keeps its rows and messages. It is the first line that a child reads.
type site struct {
	Kind     string // of the system, a key of systems
	Order    string // database URLs, mysql: or sqlite:
	Dispatch string
	Payment  string
	Points   string
	Broker   string // embedded: or amqp://…?namespace=…
	Dir      string

	Settings []string // of the product: further flags
	Queues   int      // of the floor
}

// system is one way to take orders and dispatch them, running in a child.
type system interface {
	// place stores an order and its announcement, and returns when they are committed.
	place(ctx context.Context, number int) error
	// addr returns where HTTP is served, empty if it is not.
	addr() string
	close() error
}

// systems are all of them, by kind.
var systems = map[string]func(ctx context.Context, s site) (system, error){
	"product":        startProduct,
	"stock":          startStock,
	"xa":             startXA,
	"floor":          startFloor,
	"bare":           startBare,
	"embedded_floor": startEmbeddedFloor,
}

// answer is a line that a child writes.
type answer struct {
	Addr   string   `json:",omitempty"`
	Placed []placed `json:",omitempty"`
	Err    string   `json:",omitempty"`
}

// serveChild is the child: it starts the system of the site and places orders as it is told, until the input ends.
func serveChild(in io.Reader, out io.Writer) error {
	lines, answers := json.NewDecoder(in), json.NewEncoder(out)
	var s site
	if err := lines.Decode(&s); err != nil {
		return err
	}
	ctx := context.Background()
	running, err := systems[s.Kind](ctx, s)
	if err != nil {
		return errors.Join(err, answers.Encode(answer{Err: err.Error()}))
	}
	if err := answers.Encode(answer{Addr: running.addr()}); err != nil {
		return err
	}
	for {
		var l load
		if err := lines.Decode(&l); errors.Is(err, io.EOF) {
			return running.close()
		} else if err != nil {
			return err
		}
		finish, err := profile(l.Profile)
		if err != nil {
			return err
		}
		results := l.run(ctx, running.place)
		finish()
		if err := answers.Encode(answer{Placed: results}); err != nil {
			return err
		}
	}
}

// profile writes a CPU profile until finish is called.
func profile(path string) (finish func(), err error) {
	if path == "" {
		return func() {}, nil
	}
	file, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(file); err != nil {
		return nil, err
	}
	return func() {
		pprof.StopCPUProfile()
		_ = file.Close()
	}, nil
}

// child is a child, as its parent sees it.
type child struct {
	process *servers.Process
	in      io.WriteCloser
	out     *json.Decoder
	log     string
	addr    string // where it serves HTTP
}

// startChild starts this program again to run the system of the site. Memory and CPU time of a system are those of its
// process, and none begins with what another one left.
func startChild(s site) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	log, err := os.CreateTemp(s.Dir, s.Kind+"-*.log")
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(self, "child")
	// Settings come with the site, and none from the environment.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "TMPDIR=" + os.TempDir()}
	cmd.Stderr = log
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	cmd.Stdout = theirs
	c := &child{in: in, out: json.NewDecoder(bufio.NewReaderSize(out, 1<<16)), log: log.Name()}
	c.process, err = servers.StartProcess(cmd)
	_ = theirs.Close()
	if err != nil {
		return nil, err
	}
	if err := json.NewEncoder(in).Encode(s); err != nil {
		return nil, c.failed(err)
	}
	ready, err := c.answer()
	if err != nil {
		c.process.Kill()
		return nil, err
	}
	c.addr = ready.Addr
	return c, nil
}

// place makes the child place orders, and returns what became of them.
func (c *child) place(l load) ([]placed, error) {
	if err := json.NewEncoder(c.in).Encode(l); err != nil {
		return nil, c.failed(err)
	}
	a, err := c.answer()
	return a.Placed, err
}

func (c *child) answer() (answer, error) {
	var a answer
	if err := c.out.Decode(&a); err != nil {
		return a, c.failed(err)
	}
	if a.Err != "" {
		return a, c.failed(errors.New(a.Err))
	}
	return a, nil
}

// failed adds what the child wrote last.
func (c *child) failed(err error) error {
	text, _ := os.ReadFile(c.log)
	return fmt.Errorf("%w%s", err, servers.Tail(filepath.Base(c.log), text))
}

// stop ends the child in good order.
func (c *child) stop() error {
	_ = c.in.Close()
	select {
	case <-c.process.Ended():
		if c.process.ExitCode() != 0 {
			return c.failed(errors.New("the child failed"))
		}
		return nil
	case <-time.After(time.Minute):
		_ = c.process.Signal(syscall.SIGQUIT) // says where it hangs
		time.Sleep(time.Second)
		c.process.Kill()
		return c.failed(errors.New("the child did not end"))
	}
}

func (c *child) kill() {
	if c != nil {
		c.process.Kill()
	}
}
