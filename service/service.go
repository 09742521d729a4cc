package service

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"takeout/adapters/rabbitmq"
	"takeout/adapters/simgateway"
	"takeout/adapters/sqlbroker"
	"takeout/adapters/sqldb"
	"takeout/adapters/sqlstore"
	"takeout/app"
	"takeout/crashpoint"
	"takeout/domain"
	"takeout/domain/dispatch"
	"takeout/ports/httpapi"
	"takeout/ports/messaging"
)

// Service is the running program.
type Service struct {
	cfg    Config
	logger *slog.Logger

	databases []*sqlstore.Database
	useCases  app.UseCases

	broker    messaging.Broker
	consumers *messaging.Consumers
	relays    []*messaging.OutboxRelay

	reconciler *reconciler // nil without the role

	http     *http.Server
	listener net.Listener
	registry *prometheus.Registry

	stopping   atomic.Bool
	background []context.CancelFunc // ends what runs beside the messages, until Stop
	failed     chan error
	running    sync.WaitGroup
}

// ballast raises the heap size at which the garbage collector runs: without it a heap of a few megabytes is collected many
// times a second. It is never written to, so that it takes address space and no memory.
var ballast = make([]byte, 32<<20)

// Start starts the roles that cfg names and returns when HTTP is served. It waits for databases, as cfg says how long,
// and never for the broker: orders are taken while it is away. The error says which part could not start and why.
func Start(ctx context.Context, cfg Config, logger *slog.Logger) (_ *Service, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	runtime.KeepAlive(ballast) // or the linker leaves it out
	s := &Service{cfg: cfg, logger: logger, failed: make(chan error, 16), registry: prometheus.NewRegistry()}
	defer func() {
		if err != nil {
			_ = s.Stop(context.WithoutCancel(ctx))
		}
	}()
	if err := errors.Join(s.openDatabases(), s.openBroker()); err != nil {
		return nil, err
	}
	for _, t := range s.tables() {
		if err := s.prepare(ctx, t); err != nil {
			return nil, err
		}
	}
	for _, start := range []func() error{
		s.announceEarly, s.addConsumers, s.addReconciler, s.bind, s.serveHTTP, s.consume, s.relay, s.assignWaiting, s.reconcile, s.prune,
	} {
		if err := start(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// openDatabases opens the databases that this process needs, and makes the use cases over them. It does not connect.
func (s *Service) openDatabases() error {
	for _, service := range s.cfg.services() {
		if !s.cfg.opens(service) {
			continue
		}
		if err := s.openDatabase(service); err != nil {
			return setting(service+"-database-url", "%w", err)
		}
	}
	return nil
}

func (s *Service) openDatabase(service string) error {
	url := s.cfg.databaseURL(service)
	switch service {
	case "order":
		store, err := sqlstore.OpenOrders(url, s.cfg.eventKeys(), s.logger)
		if err != nil {
			return err
		}
		s.databases = append(s.databases, store.Database)
		s.useCases.Orders = app.NewOrders(store)
		s.useCases.Compensation = app.NewCompensation(store, s.cfg.CompensationLimit)
	case "dispatch":
		store, err := sqlstore.OpenDispatches(url, s.cfg.eventKeys(), s.logger)
		if err != nil {
			return err
		}
		s.databases = append(s.databases, store.Database)
		s.useCases.Dispatches = app.NewDispatches(store, app.DispatchPolicy{
			AfterPayment: s.cfg.DispatchAfter == "paid", Deadline: s.cfg.DispatchDeadline,
		})
	case "payment":
		store, err := sqlstore.OpenPayments(url, s.cfg.eventKeys(), s.logger, simgateway.Schema())
		if err != nil {
			return err
		}
		s.databases = append(s.databases, store.Database)
		s.useCases.Payments = app.NewPayments(store, simgateway.New(store.DB(), s.cfg.PaymentRefusals, s.cfg.PaymentTimeouts))
	case "points":
		store, err := sqlstore.OpenPoints(url, s.cfg.eventKeys(), s.logger)
		if err != nil {
			return err
		}
		s.databases = append(s.databases, store.Database)
		s.useCases.Points = app.NewPoints(store)
	}
	return nil
}

// of returns the open database of the service.
func (s *Service) of(service string) *sqlstore.Database {
	return s.databases[slices.IndexFunc(s.databases, func(db *sqlstore.Database) bool { return db.DB().Name() == service })]
}

// openBroker opens the broker. It does not connect, or not in the foreground.
func (s *Service) openBroker() error {
	if strings.HasPrefix(s.cfg.BrokerURL, "amqp") {
		broker, err := rabbitmq.Open(s.cfg.BrokerURL, rabbitmq.Config{Prefetch: s.cfg.Prefetch, DrainTimeout: s.cfg.DrainTimeout}, s.logger)
		if err != nil {
			return setting("broker-url", "%w", err)
		}
		s.broker = broker
		return nil
	}
	broker, err := sqlbroker.Open(s.cfg.brokerDatabaseURL(), sqlbroker.Config{Prefetch: s.cfg.Prefetch, DrainTimeout: s.cfg.DrainTimeout}, s.logger)
	if err != nil {
		return setting("broker-url", "%w", err)
	}
	s.broker = broker
	return nil
}

// tables returns what keeps tables of its own: the services' databases, and a broker that is one.
func (s *Service) tables() []tables {
	var all []tables
	for _, db := range s.databases {
		all = append(all, db)
	}
	if broker, ok := s.broker.(tables); ok {
		all = append(all, broker)
	}
	return all
}

// tables is a database that keeps its own tables up to date.
type tables interface {
	DB() *sqldb.DB
	Migrate(ctx context.Context) ([]string, error)
	CheckSchema(ctx context.Context) error
	TakeBack(ctx context.Context) error
}

// prepare makes a database ready for use.
func (s *Service) prepare(ctx context.Context, t tables) error {
	db := t.DB()
	alone, err := db.Own()
	if err != nil {
		return err
	}
	if err := s.await(ctx, db); err != nil {
		return err
	}
	if !s.cfg.Migrate {
		err = t.CheckSchema(ctx)
	} else {
		_, err = s.migrate(ctx, t)
	}
	if err != nil {
		return err
	}
	if alone {
		return t.TakeBack(ctx)
	}
	return nil
}

// migrate brings the tables up to date, and returns the names of the migrations that ran.
func (s *Service) migrate(ctx context.Context, t tables) ([]string, error) {
	ran, err := t.Migrate(ctx)
	for _, migration := range ran {
		s.logger.Info("migrated", "database", t.DB().Name(), "migration", migration)
	}
	if err == nil && t.DB().Engine == "sqlite" && slices.Contains(ran, "dispatch/00001_dispatch.sql") {
		err = s.seedCouriers(ctx)
	}
	return ran, err
}

// await waits until the database answers. One that does not exist is made, if that is allowed.
func (s *Service) await(ctx context.Context, db *sqldb.DB) error {
	deadline := time.Now().Add(s.cfg.StartTimeout)
	for said := false; ; said = true {
		ping, cancel := context.WithTimeout(ctx, 5*time.Second)
		err := db.Ping(ping)
		cancel()
		if err == nil {
			return nil
		}
		if s.cfg.Migrate && db.CreateIfMissing(ctx, err) {
			s.logger.Info("made a database", "database", db.Name(), "at", db.Target())
			continue
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if time.Now().After(deadline) || sqldb.IsDamaged(err) {
			return fmt.Errorf("the %s database at %s does not answer: %w; takeout doctor says more", db.Name(), db.Target(), err)
		}
		if !said {
			s.logger.Warn("waiting for a database", "database", db.Name(), "at", db.Target(), "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(250 * time.Millisecond):
		}
	}
}

// seedCouriers gives a new embedded installation somebody to send.
func (s *Service) seedCouriers(ctx context.Context) error {
	for _, name := range []string{"Chen", "Li", "Wang"} {
		id, err := dispatch.ParseCourierID("courier-" + strings.ToLower(name))
		if err != nil {
			return err
		}
		courier, err := dispatch.NewCourier(id, name, true, 0)
		if err != nil {
			return err
		}
		if err := s.useCases.Dispatches.AddCourier(ctx, courier); err != nil && domain.KindOf(err) != domain.Conflict {
			return err
		}
	}
	return nil
}

// routes are all that this installation has, whether their consumers run here or not.
func (s *Service) routes() []messaging.Route {
	return messaging.Topology(s.useCases, s.cfg.withPayment())
}

// bind makes the queues of all routes: what a relay publishes must have somewhere to go.
func (s *Service) bind() error {
	for _, route := range s.routes() {
		if err := s.broker.Bind(route.Event, route.Queue); err != nil {
			return fmt.Errorf("bind %s to %s: %w", route.Queue, route.Event, err)
		}
	}
	return nil
}

func (s *Service) serveHTTP() error {
	s.registry.MustRegister(&gauges{s}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	api := httpapi.Config{
		Health: s.health, Metrics: promhttp.HandlerFor(s.registry, promhttp.HandlerOpts{}), Version: Version(),
	}
	if s.cfg.has(messaging.Order) {
		api.Orders = s.useCases.Orders
	}
	if s.cfg.has(messaging.Dispatch) {
		api.Dispatches = s.useCases.Dispatches
	}
	if s.cfg.has(messaging.Payment) {
		api.Payments = s.useCases.Payments
	}
	if s.cfg.has(messaging.Points) {
		api.Points = s.useCases.Points
	}
	if s.cfg.has(messaging.Compensation) {
		api.Compensation = s.useCases.Compensation
	}
	if len(s.databases) > 0 {
		api.Failures = s.failureDesk()
	}
	if s.cfg.has(messaging.Order) || s.cfg.has(messaging.Reconcile) {
		api.Timeline = s.timeline()
	}
	if s.reconciler != nil {
		api.Reconciliation, api.Reconcile = s.reconciler.Reconciliation, s.reconcileNow
	}
	handler := httpapi.New(api, s.logger)
	listener, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", s.cfg.HTTPAddr)
	if err != nil {
		return setting("http-addr", "cannot listen on %s: %w; another program may use the port, or the address is not of this machine", s.cfg.HTTPAddr, err)
	}
	s.listener, s.http = listener, httpapi.NewServer(handler, s.logger)
	s.run("HTTP", func() error {
		if err := s.http.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	return nil
}

// failureDesk is where people repair what the consumers of the databases here gave up, whether these run here or not.
func (s *Service) failureDesk() *app.FailureDesk {
	stores := map[string]app.FailureStore{}
	for _, db := range s.databases {
		stores[db.DB().Name()] = db
	}
	return app.NewFailureDesk(stores, messaging.Validator(s.routes()), s.cfg.eventKeys())
}

// timeline tells the way of an order from the databases that this process opened.
func (s *Service) timeline() *app.Timeline {
	opened := map[string]app.StepSource{}
	for _, db := range s.databases {
		opened[db.DB().Name()] = db
	}
	elsewhere := slices.DeleteFunc(s.cfg.services(), func(service string) bool { return opened[service] != nil })
	return app.NewTimeline(opened, elsewhere)
}

// addConsumers makes a consumer for each route whose role runs here.
func (s *Service) addConsumers() error {
	consumers, err := messaging.NewConsumers(s.cfg.acceptance(), s.cfg.RetryDelays, s.cfg.DrainTimeout+5*time.Second, messaging.NewMetrics(s.registry), s.logger)
	if err != nil {
		return err
	}
	for _, route := range s.routes() {
		if s.cfg.has(route.Role) {
			db := s.of(route.Role.Service())
			retries := db.Retries(route.Queue, s.cfg.DrainTimeout, s.logger)
			consumers.Add(route, s.broker.Subscriber(), retries, db)
			s.consumers = consumers // a router without handlers would end at once
		}
	}
	return nil
}

func (s *Service) consume() error {
	if s.consumers == nil {
		return nil
	}
	s.run("the consumers", s.consumers.Run)
	return s.begun(s.consumers.Running())
}

func (s *Service) relay() error {
	published := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "takeout_outbox_published_total", Help: "Events from the outbox, by whether the broker has confirmed them.",
	}, []string{"outbox", "result"})
	s.registry.MustRegister(published)
	for _, db := range s.databases {
		name := db.DB().Name()
		if !s.cfg.relays(name) {
			continue
		}
		outbox := db.Outbox(s.broker.WaitReady, func(acked, nacked int) {
			published.WithLabelValues(name, "confirmed").Add(float64(acked))
			published.WithLabelValues(name, "failed").Add(float64(nacked))
		}, s.logger)
		relay, err := messaging.NewOutboxRelay(name, sqlstore.OutboxTopic, outbox, s.broker, 10*time.Second, s.logger)
		if err != nil {
			return err
		}
		s.relays = append(s.relays, relay)
		s.run("the relay of the "+name+" outbox", relay.Run)
		if err := s.begun(relay.Running()); err != nil {
			return err
		}
		s.logger.Info("relaying", "outbox", name)
	}
	return nil
}

// run does work in the background until it ends. Work that fails ends the program.
func (s *Service) run(what string, work func() error) {
	s.running.Go(func() {
		if err := work(); err != nil {
			s.failed <- fmt.Errorf("%s: %w", what, err)
		}
	})
}

// alongside does work beside the messages until Stop ends its context.
func (s *Service) alongside(work func(ctx context.Context)) {
	ctx, end := context.WithCancel(context.Background())
	s.background = append(s.background, end)
	s.running.Go(func() { work(ctx) })
}

func (s *Service) begun(running <-chan struct{}) error {
	select {
	case <-running:
		return nil
	case err := <-s.failed:
		return err
	}
}

// Addr returns the address that HTTP is served on.
func (s *Service) Addr() string { return s.listener.Addr().String() }

// Orders returns the use cases of orders, nil if this process does not open their database.
func (s *Service) Orders() *app.Orders { return s.useCases.Orders }

// Failed returns a channel with the error of a part that cannot go on.
func (s *Service) Failed() <-chan error { return s.failed }

// Stop stops the program so that nothing is cut: HTTP requests are answered, the relays wait for confirms, messages
// in flight are handled and acked, and then the broker and the databases are closed. It returns ctx's error if that
// takes longer than ctx lasts; whatever was not finished then is delivered again.
func (s *Service) Stop(ctx context.Context) error {
	s.stopping.Store(true)
	stopped := make(chan error, 1)
	go func() { stopped <- s.stop() }()
	select {
	case err := <-stopped:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Service) stop() error {
	var errs []error
	crashpoint.Here("shutdown/before-drain")
	if s.reconciler != nil {
		s.reconciler.stop()
	}
	if s.http != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		errs = append(errs, s.http.Shutdown(ctx))
		cancel()
	}
	for _, end := range s.background {
		end()
	}
	for _, relay := range s.relays {
		errs = append(errs, relay.Close())
	}
	crashpoint.Here("shutdown/half-drained")
	if s.consumers != nil {
		errs = append(errs, s.consumers.Close())
	}
	if s.broker != nil {
		errs = append(errs, s.broker.Close())
	}
	s.running.Wait()
	for _, db := range s.databases {
		db.DB().Checkpoint(context.Background())
		errs = append(errs, db.Close())
	}
	return errors.Join(errs...)
}

// Migrate brings the databases that cfg names up to date and returns the names of the migrations that it ran, each with its
// database.
func Migrate(ctx context.Context, cfg Config, logger *slog.Logger) ([]string, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg.Migrate = true
	s := &Service{cfg: cfg, logger: logger}
	defer func() { _ = s.stop() }()
	if err := errors.Join(s.openDatabases(), s.openBroker()); err != nil {
		return nil, err
	}
	var ran []string
	for _, t := range s.tables() {
		if err := t.DB().Prepare(); err != nil {
			return ran, err
		}
		if err := s.await(ctx, t.DB()); err != nil {
			return ran, err
		}
		names, err := s.migrate(ctx, t)
		for _, name := range names {
			ran = append(ran, name+" in the "+t.DB().Name()+" database")
		}
		if err != nil {
			return ran, err
		}
	}
	return ran, nil
}

// Version returns what this program was built from.
func Version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	version := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && (version == "" || version == "(devel)") {
			version = s.Value
		}
	}
	if version == "" {
		return "(devel)"
	}
	return version
}
