//go:build unix

package verify

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"takeout/verify/history"
)

const (
	clients   = 64 // who place orders, one after another each
	followers = 16 // who cancel orders and say that they were delivered
	tries     = 8  // of one request, until it is answered
)

// load is the clients of one run.
type load struct {
	plan       history.Plan
	history    *history.History
	orders     []*member
	dispatches []*member
	http       *http.Client

	began   time.Time
	next    atomic.Int64
	placed  atomic.Int64
	allowed func(ctx context.Context, number int) bool // waits until the order's time has come; false at the end

	calm, brokerAway latencies // of orders that were placed while nothing was broken, and while only the broker was
	condition        atomic.Int32
}

// What is broken, for the latencies.
const (
	nothing = iota
	onlyTheBroker
	something
)

func newLoad(plan history.Plan, f *fleet, allowed func(context.Context, int) bool) *load {
	return &load{
		began: time.Now(), plan: plan, history: history.New(plan.Orders), orders: f.of("order"), dispatches: f.of("dispatch"), allowed: allowed,
		http: &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: clients + followers}},
	}
}

// run places all orders of the plan, and does with them what the plan says. It returns when everything was answered, or
// tried often enough.
func (l *load) run(ctx context.Context) {
	later := make(chan followUp, 10*followers)
	var placing, following sync.WaitGroup
	for range clients {
		placing.Go(func() {
			for {
				number := int(l.next.Add(1)) - 1
				if number >= l.plan.Orders || !l.allowed(ctx, number) {
					return
				}
				l.place(ctx, number, later)
			}
		})
	}
	for range followers {
		following.Go(func() {
			for f := range later {
				l.follow(ctx, f)
			}
		})
	}
	placing.Wait()
	close(later)
	following.Wait()
	l.http.CloseIdleConnections()
}

// asked returns how many orders were asked for.
func (l *load) asked() int { return min(int(l.next.Load()), l.plan.Orders) }

// answer is how a request was answered.
type answer struct {
	status int
	busy   bool // come again
}

// said is what answers say of an order or a dispatch.
type said struct {
	OrderID  string `json:"order_id"`
	Name     string `json:"name"`
	Amount   int64  `json:"amount"`
	Currency string `json:"currency"`
	Status   string `json:"status"`
	State    string `json:"state"`
}

// fits reports whether the answer is about what was asked for.
func (s said) fits(o history.Order) bool {
	return s.Name == o.Name && s.Amount == o.Amount && s.Currency == o.Currency
}

// ask sends a request to one of the members and reads the answer's body into out.
func (l *load) ask(ctx context.Context, method string, members []*member, path, key string, body, out any) (answer, error) {
	text, err := json.Marshal(body)
	if err != nil {
		return answer{}, err
	}
	if method == http.MethodGet {
		text = nil
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://"+members[rand.IntN(len(members))].addr+path, bytes.NewReader(text))
	if err != nil {
		return answer{}, err
	}
	request.Header.Set("Content-Type", "application/json")
	if key != "" {
		request.Header.Set("Idempotency-Key", key)
	}
	response, err := l.http.Do(request)
	if err != nil {
		return answer{}, err
	}
	defer response.Body.Close()
	text, err = io.ReadAll(io.LimitReader(response.Body, 16<<20))
	if err != nil {
		return answer{}, err
	}
	err = json.Unmarshal(text, out)
	if response.StatusCode >= 300 {
		err = nil // a problem has other members, and its status is a number
	}
	return answer{response.StatusCode, response.Header.Get("Retry-After") != ""}, err
}

// fate says what an answer means for the one who asked.
func fate(a answer, err error) history.Answer {
	switch {
	case err != nil, a.status >= 500, a.status == http.StatusConflict && a.busy, a.status == http.StatusRequestTimeout:
		return history.Unknown
	case a.status < 300:
		return history.OK
	}
	return history.Refused
}

// followUp is an order with which something is to be done later.
type followUp struct {
	number int
	id     string
}

// place places an order, and cancels it or leaves that to the followers.
func (l *load) place(ctx context.Context, number int, later chan<- followUp) {
	defer l.placed.Add(1)
	o := l.plan.Order(number)
	if o.Contest {
		l.contest(ctx, number, o)
		return
	}
	id := l.insist(ctx, number, o)
	if id == "" {
		return
	}
	var again sync.WaitGroup
	for range o.Again {
		again.Go(func() { l.insist(ctx, number, o) })
	}
	again.Wait()
	if o.Cancel && number%2 == 0 {
		l.cancel(ctx, number, id)
	} else if o.Cancel || o.Deliver {
		later <- followUp{number, id}
	}
}

func requestOf(o history.Order) map[string]any {
	body := map[string]any{"name": o.Name, "amount": o.Amount, "currency": o.Currency}
	if o.ID != "" {
		body["order_id"] = o.ID
	}
	return body
}

// insist places an order, as often as it takes and as it is safe. It returns the order's id if it knows that it is placed.
func (l *load) insist(ctx context.Context, number int, o history.Order) string {
	body := requestOf(o)
	for try := range tries {
		before := l.condition.Load()
		began := time.Now()
		var placed said
		a, err := l.ask(ctx, http.MethodPost, l.orders, "/v1/orders", o.Key, body, &placed)
		took := time.Since(began)
		f := fate(a, err)
		id := placed.OrderID
		if f == history.OK {
			l.history.Placed(number, f, id)
			l.note(before, took)
			if !placed.fits(o) {
				l.history.Wrong(number)
			}
			return id
		}
		l.history.Placed(number, f, "")
		if f == history.Refused {
			if o.Amount > 0 {
				l.history.Wrong(number) // nothing was wrong with it
			}
			return ""
		}
		switch {
		case o.ID+o.Key != "" || unsent(err):
		case id != "":
			body["order_id"] = id // the service says under which id it may be stored
		default:
			return "" // asking again could make a second order
		}
		if !pause(ctx, backoff(try)) {
			return ""
		}
	}
	return ""
}

// unsent reports whether a request never left because nobody listened.
func unsent(err error) bool {
	failed, ok := errors.AsType[*net.OpError](err)
	return ok && failed.Op == "dial"
}

// note keeps how long placing an order took, if what was broken did not change meanwhile.
func (l *load) note(before int32, took time.Duration) {
	if l.condition.Load() != before {
		return
	}
	switch before {
	case nothing:
		l.calm.add(took)
	case onlyTheBroker:
		l.brokerAway.add(took)
	}
}

func backoff(try int) time.Duration {
	return time.Duration(50+rand.IntN(100)) * time.Millisecond << min(try, 4)
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

func (l *load) follow(ctx context.Context, f followUp) {
	o := l.plan.Order(f.number)
	if o.Cancel {
		pause(ctx, time.Duration(rand.IntN(300))*time.Millisecond)
		l.cancel(ctx, f.number, f.id)
		return
	}
	l.deliver(ctx, f.number, f.id)
}

func (l *load) cancel(ctx context.Context, number int, id string) {
	for try := range tries {
		var now said
		a, err := l.ask(ctx, http.MethodPost, l.orders, "/v1/orders/"+id+"/cancel", "", map[string]string{"reason": "changed my mind"}, &now)
		f := fate(a, err)
		l.history.Cancelled(number, f)
		if f == history.OK && now.Status != "cancelled" {
			l.history.Wrong(number)
		}
		if f != history.Unknown || !pause(ctx, backoff(try)) {
			return
		}
	}
}

// deliver waits until a courier has the order, and says that it was brought.
func (l *load) deliver(ctx context.Context, number int, id string) {
	for try := 0; ; try++ {
		var now said
		a, err := l.ask(ctx, http.MethodGet, l.dispatches, "/v1/dispatches/"+id, "", nil, &now)
		if err == nil && a.status == http.StatusOK && now.State == "assigned" {
			break
		}
		ended := err == nil && a.status == http.StatusOK && now.State != "waiting"
		if ended || try == 2*tries || !pause(ctx, backoff(min(try, 2))) {
			return // it was cancelled, or nobody has it for long
		}
	}
	for try := range tries {
		var now said
		a, err := l.ask(ctx, http.MethodPost, l.dispatches, "/v1/dispatches/"+id+"/delivered", "", struct{}{}, &now)
		f := fate(a, err)
		l.history.Delivered(number, f)
		if f == history.OK && now.State != "delivered" {
			l.history.Wrong(number)
		}
		if f != history.Unknown || !pause(ctx, backoff(try)) {
			return
		}
	}
}

// latencies counts durations in buckets that grow by a fifth.
type latencies struct {
	buckets [100]atomic.Int64
}

const shortest = 100 * time.Microsecond

func (h *latencies) add(d time.Duration) {
	i := 0
	for limit := shortest; d > limit && i < len(h.buckets)-1; i++ {
		limit += limit / 5
	}
	h.buckets[i].Add(1)
}

func (h *latencies) count() (n int64) {
	for i := range h.buckets {
		n += h.buckets[i].Load()
	}
	return n
}

// quantile returns a duration that this part of all did not exceed, 0 if there are none.
func (h *latencies) quantile(part float64) time.Duration {
	left := int64(part * float64(h.count()))
	limit := shortest
	for i := range h.buckets {
		n := h.buckets[i].Load()
		if n > 0 && n > left {
			return limit
		}
		left -= n
		limit += limit / 5
	}
	return 0
}

// addCouriers makes a roster: some have no limit, so that no order waits for ever, and some have one, which must be kept.
func (l *load) addCouriers(ctx context.Context) error {
	for i, capacity := range []int{0, 0, 5, 20} {
		name := fmt.Sprintf("courier-%d", i+1)
		body := map[string]any{"courier_id": name, "name": name, "capacity": capacity}
		a, err := l.ask(ctx, http.MethodPost, l.dispatches[:1], "/v1/couriers", "", body, &struct{}{})
		if err != nil {
			return fmt.Errorf("add a courier: %w", err)
		}
		if a.status != http.StatusCreated {
			return fmt.Errorf("add a courier: status %d", a.status)
		}
	}
	return nil
}

// reconciled is what a run of the reconciliation says.
type reconciled struct {
	StartedAt  time.Time `json:"started_at"`
	To         time.Time `json:"to"` // orders that were placed later were not compared
	Consistent bool      `json:"consistent"`
	InFlight   int       `json:"in_flight"`
	Failures   int       `json:"waits_for_failures"` // of those in flight
	Repaired   int       `json:"repaired"`
	Errors     []string  `json:"errors"`
}

// reconcile has the services compared and repaired, and waits for the end.
func (l *load) reconcile(ctx context.Context, by []*member) (reconciled, error) {
	began := time.Now().Add(-time.Second)
	for {
		var started struct {
			reconciled
			Running bool `json:"running"`
		}
		a, err := l.ask(ctx, http.MethodPost, by, "/v1/reconciliation", "", map[string]bool{"repair": true}, &started)
		switch {
		case err == nil && a.status == http.StatusOK:
			return started.reconciled, nil
		case err == nil && a.status == http.StatusAccepted:
			return l.reconciledSince(ctx, by, began)
		case err == nil && !a.busy:
			return reconciled{}, fmt.Errorf("reconcile: status %d", a.status)
		}
		if !pause(ctx, 200*time.Millisecond) {
			return reconciled{}, context.Cause(ctx)
		}
	}
}

func (l *load) reconciledSince(ctx context.Context, by []*member, began time.Time) (reconciled, error) {
	for pause(ctx, 500*time.Millisecond) {
		var last struct{ Report reconciled }
		a, err := l.ask(ctx, http.MethodGet, by, "/v1/reconciliation", "", nil, &last)
		if err == nil && a.status == http.StatusOK && last.Report.StartedAt.After(began) {
			return last.Report, nil
		}
	}
	return reconciled{}, context.Cause(ctx)
}
