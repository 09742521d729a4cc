package testenv

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/testcontainers/testcontainers-go"
	tcexec "github.com/testcontainers/testcontainers-go/exec"
	tclog "github.com/testcontainers/testcontainers-go/log"

	"takeout/verify/servers"
)

// ownerLabel is on every container and holds host:pid of the process that must remove it.
const ownerLabel = "takeout.test.owner"

// docker starts containers of one image.
type docker struct {
	kind  servers.Kind
	image string
	*engine
}

// engine is a Docker engine that answers.
type engine struct {
	client client.APIClient
	// host is where published ports are reached.
	host string
}

func (d docker) String() string { return "docker image " + d.image }
func (d docker) way() string    { return "docker" }

func image(k servers.Kind) string {
	variable, name := envMySQLImage, "mysql:8.4"
	if k == servers.RabbitMQ {
		variable, name = envRabbitImage, "rabbitmq:4-management"
	}
	if own := os.Getenv(variable); own != "" {
		return own
	}
	return name
}

// findDocker finds a Docker engine that has the image of this kind or can pull it.
func findDocker(k servers.Kind) (backend, error) {
	e, err := findEngine()
	if err != nil {
		return nil, err
	}
	d := docker{kind: k, image: image(k), engine: e}
	if _, err := e.client.ImageInspect(context.Background(), d.image); err == nil {
		return d, nil
	}
	if err := e.pull(d.image); err != nil {
		return nil, fmt.Errorf("the Docker engine does not have it, and pulling fails: %w", err)
	}
	return d, nil
}

var findEngine = sync.OnceValues(func() (*engine, error) {
	type result struct {
		engine *engine
		err    error
	}
	found := make(chan result, 1)
	go func() {
		e, err := connectEngine()
		found <- result{e, err}
	}()
	select {
	case r := <-found:
		if r.err != nil {
			return nil, fmt.Errorf("no Docker engine answers: %w", r.err)
		}
		r.engine.sweep()
		foundEngine.Store(r.engine)
		return r.engine, nil
	case <-time.After(10 * time.Second):
		return nil, errors.New("no Docker engine answers within 10 s")
	}
})

// foundEngine is set once an engine is in use.
var foundEngine atomic.Pointer[engine]

func connectEngine() (*engine, error) {
	// Its image may be out of reach, and sweep does its work.
	setDefault("TESTCONTAINERS_RYUK_DISABLED", "true")
	tclog.SetDefault(tclog.NewNoopLogger())
	// Without the name of Docker's own network it makes one of its own, which stays.
	provider, err := testcontainers.NewDockerProvider(testcontainers.WithDefaultBridgeNetwork("bridge"))
	if err != nil {
		return nil, err
	}
	ctx := context.Background()
	if err := provider.Health(ctx); err != nil {
		return nil, err
	}
	e := &engine{client: provider.Client()}
	// Inside a container testcontainers takes the gateway of the engine's bridge for the engine's address, if
	// the engine tells it. That is right for an engine outside, whose socket was mounted, and hangs with one
	// that runs in the same container.
	if _, err := os.Stat("/.dockerenv"); err == nil && strings.HasPrefix(e.client.DaemonHost(), "unix:") {
		if gateway, ok := e.gateway(); ok {
			setDefault("TESTCONTAINERS_HOST_OVERRIDE", gateway)
		}
	}
	if e.host, err = provider.DaemonHost(ctx); err != nil {
		return nil, err
	}
	if e.host == "localhost" {
		e.host = "127.0.0.1" // ports are published on IPv4 only
	}
	return e, nil
}

func setDefault(name, value string) {
	if _, ok := os.LookupEnv(name); !ok {
		_ = os.Setenv(name, value)
	}
}

// gateway is the address of the engine's bridge, or the loopback address if that bridge is our own.
func (e *engine) gateway() (string, bool) {
	bridge, err := e.client.NetworkInspect(context.Background(), "bridge", client.NetworkInspectOptions{})
	if err != nil || len(bridge.Network.IPAM.Config) == 0 {
		return "", false
	}
	config := bridge.Network.IPAM.Config[0]
	gateway := config.Gateway
	if !gateway.IsValid() {
		gateway = config.Subnet.Masked().Addr().Next() // which is what Docker takes if it says nothing
	}
	addresses, _ := net.InterfaceAddrs()
	for _, address := range addresses {
		if own, err := netip.ParsePrefix(address.String()); err == nil && own.Addr() == gateway {
			return "127.0.0.1", true
		}
	}
	return gateway.String(), gateway.IsValid()
}

// pull gives up soon if no registry answers, and waits longer once it does.
func (e *engine) pull(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 15*time.Minute)
	defer cancel()
	silence := time.AfterFunc(8*time.Second, cancel)
	progress, err := e.client.ImagePull(ctx, name, client.ImagePullOptions{})
	if err != nil {
		return brief(err)
	}
	defer progress.Close()
	for message, err := range progress.JSONMessages(ctx) {
		if err == nil && message.Error != nil {
			err = message.Error
		}
		if err != nil {
			return brief(err)
		}
		if silence.Stop() {
			say("pulling %s", name)
		}
	}
	return nil
}

func brief(err error) error {
	if errors.Is(err, context.Canceled) {
		return errors.New("no registry answers within 8 s")
	}
	return errors.New(strings.TrimSpace(err.Error()))
}

// sweep removes the containers of processes of this host that were killed before they could.
func (e *engine) sweep() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	list, err := e.client.ContainerList(ctx, client.ContainerListOptions{
		All: true, Filters: make(client.Filters).Add("label", ownerLabel),
	})
	if err != nil {
		return
	}
	host, _ := os.Hostname()
	for _, c := range list.Items {
		pid, ok := strings.CutPrefix(c.Labels[ownerLabel], host+":")
		if ok && servers.IsGone(pid) {
			e.remove(ctx, c.ID)
		}
	}
}

func (e *engine) remove(ctx context.Context, id string) {
	// A paused container cannot be killed.
	_, _ = e.client.ContainerUnpause(ctx, id, client.ContainerUnpauseOptions{})
	if _, err := e.client.ContainerRemove(ctx, id, client.ContainerRemoveOptions{Force: true, RemoveVolumes: true}); err != nil {
		say("container %.12s is left behind: %v", id, err)
	}
}

func (d docker) start(_ bool, settings ...string) (server, error) {
	return servers.WithFreePorts(func() (server, error) { return d.run(settings) })
}

// dockerServer is a container whose ports on the host are chosen by us, because Docker chooses new ones
// whenever a container starts again.
type dockerServer struct {
	docker
	container testcontainers.Container
	address   *url.URL
	api       string
}

func (d docker) run(settings []string) (_ server, err error) {
	s := &dockerServer{docker: d}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	var port, apiPort int
	if err := servers.FreePorts(&port, &apiPort); err != nil {
		return nil, err
	}
	published := map[string]int{"3306/tcp": port}
	env := map[string]string{"MYSQL_ROOT_PASSWORD": servers.Password, "MARIADB_ROOT_PASSWORD": servers.Password}
	command := slices.Concat(servers.MySQLSettings, settings)
	s.address = servers.Address(servers.MySQL, d.host, port)
	if d.kind == servers.RabbitMQ {
		published = map[string]int{"5672/tcp": port, "15672/tcp": apiPort}
		env = map[string]string{
			"RABBITMQ_DEFAULT_USER": "guest", "RABBITMQ_DEFAULT_PASS": "guest",
			"RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": servers.ErlangSettings,
		}
		command = nil
		s.address = servers.Address(servers.RabbitMQ, d.host, port)
		s.api = fmt.Sprintf("http://guest:guest@%s:%d", d.host, apiPort)
	}
	hostname, _ := os.Hostname()
	request := testcontainers.ContainerRequest{
		Image:  d.image,
		Env:    env,
		Cmd:    command,
		Labels: map[string]string{ownerLabel: fmt.Sprintf("%s:%d", hostname, os.Getpid())},
		HostConfigModifier: func(h *container.HostConfig) {
			h.PortBindings = d.bindings(published)
		},
	}
	for inside := range published {
		request.ExposedPorts = append(request.ExposedPorts, inside)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	s.container, err = testcontainers.GenericContainer(ctx, testcontainers.GenericContainerRequest{ContainerRequest: request})
	if err != nil {
		return nil, err
	}
	if err := s.Start(); err != nil {
		return nil, err
	}
	return s, nil
}

func (d docker) bindings(published map[string]int) network.PortMap {
	// Only an engine on this machine is reached over the loopback interface.
	on, err := netip.ParseAddr(d.host)
	if err != nil || !on.IsLoopback() {
		on = netip.IPv4Unspecified()
	}
	ports := network.PortMap{}
	for inside, outside := range published {
		ports[network.MustParsePort(inside)] = []network.PortBinding{{HostIP: on, HostPort: strconv.Itoa(outside)}}
	}
	return ports
}

func (s *dockerServer) URL() *url.URL      { return s.address }
func (s *dockerServer) Management() string { return s.api }

func (s *dockerServer) Among() (string, error) {
	ip, err := s.container.ContainerIP(context.Background())
	return net.JoinHostPort(ip, "3306"), err
}

func (s *dockerServer) id() string { return s.container.GetContainerID() }

func (s *dockerServer) Start() error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if _, err := s.client.ContainerStart(ctx, s.id(), client.ContainerStartOptions{}); err != nil {
		return err
	}
	// An image that has to be initialised first takes its time on a busy machine.
	if err := servers.AwaitReady(aborted, s.kind, s.address, s.ended(ctx), 3*time.Minute); err != nil {
		return fmt.Errorf("%w%s", err, s.logTail())
	}
	return nil
}

// ended is closed when the container is no longer running.
func (s *dockerServer) ended(ctx context.Context) <-chan struct{} {
	ended := make(chan struct{})
	wait := s.client.ContainerWait(ctx, s.id(), client.ContainerWaitOptions{Condition: container.WaitConditionNotRunning})
	go func() {
		select {
		case <-wait.Result:
			close(ended)
		case <-wait.Error:
		}
	}()
	return ended
}

func (s *dockerServer) logTail() string {
	logs, err := s.container.Logs(context.Background())
	if err != nil {
		return ""
	}
	defer logs.Close()
	text, _ := io.ReadAll(logs)
	return servers.Tail("the container's log", text)
}

func (s *dockerServer) Stop() error {
	ctx := context.Background()
	_, _ = s.client.ContainerUnpause(ctx, s.id(), client.ContainerUnpauseOptions{})
	patience := 60
	_, err := s.client.ContainerStop(ctx, s.id(), client.ContainerStopOptions{Timeout: &patience})
	return err
}

func (s *dockerServer) Kill() error {
	ctx := context.Background()
	_, _ = s.client.ContainerUnpause(ctx, s.id(), client.ContainerUnpauseOptions{})
	_, err := s.client.ContainerKill(ctx, s.id(), client.ContainerKillOptions{Signal: "KILL"})
	return err
}

func (s *dockerServer) Freeze() (err error) {
	// A container cannot always be paused while processes begin in it, as they do in a broker that has just started.
	for range 20 {
		if _, err = s.client.ContainerPause(context.Background(), s.id(), client.ContainerPauseOptions{}); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

func (s *dockerServer) Thaw() error {
	_, err := s.client.ContainerUnpause(context.Background(), s.id(), client.ContainerUnpauseOptions{})
	return err
}

func (s *dockerServer) Ctl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	code, output, err := s.container.Exec(ctx, append([]string{"rabbitmqctl"}, args...), tcexec.Multiplexed())
	if err != nil {
		return "", fmt.Errorf("rabbitmqctl %s: %w", strings.Join(args, " "), err)
	}
	text, err := io.ReadAll(output)
	if err == nil && code != 0 {
		err = fmt.Errorf("rabbitmqctl %s: exit code %d\n%s", strings.Join(args, " "), code, text)
	}
	return string(text), err
}

func (s *dockerServer) Close() {
	if s.container == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s.remove(ctx, s.id())
	_ = s.client.Close() // else its idle connections look like leaked goroutines
}
