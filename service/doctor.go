package service

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"time"

	"takeout/adapters/rabbitmq"
	"takeout/adapters/sqldb"
	"takeout/adapters/sqlstore"
	"takeout/ports/httpapi"
)

// Diagnosis is what Doctor says about one dependency.
type Diagnosis struct {
	What   string `json:"what"`
	Where  string `json:"where"`
	OK     bool   `json:"ok"`
	Cause  string `json:"cause,omitempty"` // what is wrong
	Remedy string `json:"remedy,omitempty"`
}

// Doctor examines each thing that a process with this configuration depends on. It changes nothing.
func Doctor(ctx context.Context, cfg Config, logger *slog.Logger) []Diagnosis {
	if err := cfg.Validate(); err != nil {
		return []Diagnosis{{What: "configuration", Cause: err.Error(), Remedy: "correct the setting; takeout serve --help shows all"}}
	}
	diagnoses := []Diagnosis{{What: "configuration", OK: true}}
	s := &Service{cfg: cfg, logger: logger}
	defer func() { _ = s.stop() }()
	if err := errors.Join(s.openDatabases(), s.openBroker()); err != nil {
		return append(diagnoses, Diagnosis{What: "URLs", Cause: err.Error(), Remedy: "correct the URL"})
	}
	for _, t := range s.tables() {
		diagnoses = append(diagnoses, s.examineDatabase(ctx, t))
	}
	if _, ok := s.broker.(tables); !ok {
		diagnoses = append(diagnoses, s.examineBroker(ctx))
	}
	return append(diagnoses, examineAddress(ctx, cfg.HTTPAddr)...)
}

func (s *Service) examineDatabase(ctx context.Context, t tables) Diagnosis {
	db := t.DB()
	d := Diagnosis{What: db.Name() + " database", Where: db.Target()}
	if db.Missing() {
		d.OK, d.Cause = true, "the file does not exist yet; takeout serve makes it"
		return d
	}
	ping, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err := db.Ping(ping)
	if db.IsAbsent(err) && s.cfg.Migrate {
		d.OK, d.Cause = true, "the database does not exist yet; takeout serve makes it, if the user may"
		return d
	}
	if err == nil {
		err = t.CheckSchema(ping)
	}
	if err == nil {
		err = db.CheckWritable(ping)
	}
	switch {
	case err == nil:
		d.OK = true
		return d
	case errors.Is(err, sqldb.ErrSchemaOlder):
		d.Remedy = "run: takeout migrate"
	case errors.Is(err, sqlstore.ErrOtherService):
		d.Remedy = "correct the URL"
	case errors.Is(err, sqldb.ErrSchemaNewer):
		d.Remedy = "start the newer program, or restore the database from before it ran"
	default:
		d.Remedy = db.Remedy(err)
	}
	d.Cause = err.Error()
	return d
}

func (s *Service) examineBroker(ctx context.Context) Diagnosis {
	d := Diagnosis{What: "broker", Where: maskPassword(s.cfg.BrokerURL)}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	late := s.broker.WaitReady(ctx)
	switch err := s.broker.Check(); {
	case err == nil:
		unread := s.examineReading(ctx)
		if d.OK = unread == nil; !d.OK {
			d.Cause = unread.Error()
			d.Remedy = "let this user read the queues, over a connection beside the one that publishes; what is in them waits meanwhile"
		}
	case late == nil:
		d.Cause = err.Error()
		d.Remedy = "put right what the broker refuses; orders are taken meanwhile, and events that it concerns wait in the outbox"
	default:
		d.Cause = err.Error()
		d.Remedy = "start RabbitMQ, and check host, port, vhost, user and password of --broker-url; orders are taken meanwhile and wait in the outbox"
	}
	return d
}

// examineReading looks whether this user may read the queues of the roles.
func (s *Service) examineReading(ctx context.Context) error {
	broker, ok := s.broker.(*rabbitmq.Broker)
	if !ok {
		return nil // what is in tables of its own is examined as they are
	}
	var queues []string
	for _, route := range s.routes() {
		if s.cfg.has(route.Role) {
			queues = append(queues, route.Queue)
		}
	}
	return broker.MayRead(ctx, queues...)
}

// examineAddress examines whether the process can listen, and what a takeout that serves there already says of itself.
func examineAddress(ctx context.Context, addr string) []Diagnosis {
	d := Diagnosis{What: "HTTP address", Where: addr}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	if err == nil {
		_ = listener.Close()
		d.OK = true
		return []Diagnosis{d}
	}
	health, serves := readiness(ctx, addr)
	if !serves {
		d.Cause = err.Error()
		d.Remedy = "stop the program that uses the port, or choose another --http-addr"
		return []Diagnosis{d}
	}
	d.OK, d.Cause = true, "a takeout is serving here"
	all := []Diagnosis{d}
	for _, check := range slices.Sorted(maps.Keys(health.Checks)) {
		if c := health.Checks[check]; !c.OK {
			all = append(all, Diagnosis{
				What: "serving: " + check, Where: addr, Cause: c.Detail, Remedy: `see "Something is stuck" in README.md; /readyz shows when it is over`,
			})
		}
	}
	return all
}

// readiness asks the takeout at the address whether it can do its work. serves is false if no takeout answers there.
func readiness(ctx context.Context, addr string) (health httpapi.Health, serves bool) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/readyz", nil)
	if err != nil {
		return health, false
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return health, false
	}
	defer response.Body.Close()
	err = json.NewDecoder(io.LimitReader(response.Body, 1<<20)).Decode(&health)
	return health, err == nil && health.Status != "" && health.Checks != nil
}
