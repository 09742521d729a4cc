package service

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"time"

	"takeout/adapters/sqldb"
	"takeout/adapters/sqlstore"
)

// Finding is what Doctor says about one dependency.
type Finding struct {
	What   string `json:"what"`
	Where  string `json:"where"`
	OK     bool   `json:"ok"`
	Cause  string `json:"cause,omitempty"` // what is wrong
	Remedy string `json:"remedy,omitempty"`
}

// Doctor examines each thing that a process with this configuration depends on. It changes nothing.
func Doctor(ctx context.Context, cfg Config, logger *slog.Logger) []Finding {
	if err := cfg.Validate(); err != nil {
		return []Finding{{What: "configuration", Cause: err.Error(), Remedy: "correct the setting; takeout serve --help shows all"}}
	}
	findings := []Finding{{What: "configuration", OK: true}}
	s := &Service{cfg: cfg, logger: logger}
	defer func() { _ = s.stop() }()
	if err := errors.Join(s.openDatabases(), s.openBroker()); err != nil {
		return append(findings, Finding{What: "URLs", Cause: err.Error(), Remedy: "correct the URL"})
	}
	for _, t := range s.tables() {
		findings = append(findings, s.examineDatabase(ctx, t))
	}
	if _, ok := s.broker.(tables); !ok {
		findings = append(findings, s.examineBroker(ctx))
	}
	return append(findings, examineAddress(ctx, cfg.HTTPAddr))
}

func (s *Service) examineDatabase(ctx context.Context, t tables) Finding {
	db := t.DB()
	f := Finding{What: db.Name() + " database", Where: db.Target()}
	if db.Missing() {
		f.OK, f.Cause = true, "the file does not exist yet; takeout serve makes it"
		return f
	}
	ping, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err := db.Ping(ping)
	if db.IsAbsent(err) && s.cfg.Migrate {
		f.OK, f.Cause = true, "the database does not exist yet; takeout serve makes it, if the user may"
		return f
	}
	if err == nil {
		err = t.CheckSchema(ping)
	}
	if err == nil {
		err = db.CheckWritable(ping)
	}
	switch {
	case err == nil:
		f.OK = true
		return f
	case errors.Is(err, sqldb.ErrSchemaOlder):
		f.Remedy = "run: takeout migrate"
	case errors.Is(err, sqlstore.ErrOtherService):
		f.Remedy = "correct the URL"
	case errors.Is(err, sqldb.ErrSchemaNewer):
		f.Remedy = "start the newer program, or restore the database from before it ran"
	default:
		f.Remedy = db.Remedy(err)
	}
	f.Cause = err.Error()
	return f
}

func (s *Service) examineBroker(ctx context.Context) Finding {
	f := Finding{What: "broker", Where: maskPassword(s.cfg.BrokerURL)}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	late := s.broker.WaitReady(ctx)
	switch err := s.broker.Check(); {
	case err == nil:
		f.OK = true
	case late == nil:
		f.Cause = err.Error()
		f.Remedy = "put right what the broker refuses; orders are taken meanwhile, and events that it concerns wait in the outbox"
	default:
		f.Cause = err.Error()
		f.Remedy = "start RabbitMQ, and check host, port, vhost, user and password of --broker-url; orders are taken meanwhile and wait in the outbox"
	}
	return f
}

func examineAddress(ctx context.Context, addr string) Finding {
	f := Finding{What: "HTTP address", Where: addr}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", addr)
	switch {
	case err == nil:
		_ = listener.Close()
		f.OK = true
	case takeoutServes(ctx, addr):
		f.OK, f.Cause = true, "a takeout is serving here"
	default:
		f.Cause = err.Error()
		f.Remedy = "stop the program that uses the port, or choose another --http-addr"
	}
	return f
}

func takeoutServes(ctx context.Context, addr string) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/livez", nil)
	if err != nil {
		return false
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return false
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<10))
	return err == nil && response.StatusCode == http.StatusOK && strings.Contains(string(body), "alive")
}
