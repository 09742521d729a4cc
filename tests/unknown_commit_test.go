package tests

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// commitFault is what becomes of one COMMIT on its way to MySQL.
type commitFault int

const (
	notExecuted commitFault = iota // the connection breaks before COMMIT arrives
	answerLost                     // COMMIT is executed, and the connection breaks before its answer arrives
	answerLate                     // COMMIT is executed, and its answer comes when the test says
	sentLate                       // COMMIT arrives when the test says
	cutAndLate                     // the program's side breaks, and COMMIT arrives when the test says
)

func (f commitFault) String() string {
	return [...]string{"COMMIT not executed", "answer lost", "answer late", "COMMIT late", "connection broken, COMMIT late"}[f]
}

// commitTrap waits for the COMMIT of a transaction with a certain statement in it.
type commitTrap struct {
	fault     commitFault
	statement string        // part of the statement
	andAway   bool          // afterwards nothing gets through until mend
	sprung    chan struct{} // closed when the COMMIT was there
	release   chan struct{} // closed to let go what is late
	again     chan struct{} // gets one for each time that the statement comes after that
}

// commitProxy stands between the program and MySQL, and knows a COMMIT when it sees one.
type commitProxy struct {
	mu    sync.Mutex
	trap  *commitTrap
	last  *commitTrap // that sprang
	away  bool
	conns map[net.Conn]bool
}

// throughCommits returns the database URL with a commitProxy's address in place of the server's, and the proxy.
func throughCommits(t testing.TB, rawURL string) (string, *commitProxy) {
	t.Helper()
	p := &commitProxy{conns: map[net.Conn]bool{}}
	return inBetween(t, rawURL, p.serve, p.goAway), p
}

// inBetween returns the URL with another address, where serve gets each client and the address of the server. At the end of
// the test, stop ends those who are still being served.
func inBetween(t testing.TB, rawURL string, serve func(client net.Conn, target string), stop func()) string {
	t.Helper()
	u, listener := parse(t, rawURL), listen(t)
	target := u.Host
	u.Host = listener.Addr().String()
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { serve(client, target) })
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		stop()
		serving.Wait()
	})
	return u.String()
}

// arm sets the trap for one COMMIT.
func (p *commitProxy) arm(trap commitTrap) *commitTrap {
	trap.sprung, trap.release, trap.again = make(chan struct{}), make(chan struct{}), make(chan struct{}, 100)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.trap = &trap
	return &trap
}

// take returns the trap, if it is set for a transaction with these statements, and removes it.
func (p *commitProxy) take(statements string) *commitTrap {
	p.mu.Lock()
	defer p.mu.Unlock()
	trap := p.trap
	if trap == nil || !strings.Contains(statements, trap.statement) {
		return nil
	}
	p.trap, p.last = nil, trap
	return trap
}

// note tells the trap that sprang of its statement.
func (p *commitProxy) note(statement string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.last != nil && strings.Contains(statement, p.last.statement) {
		select {
		case p.last.again <- struct{}{}:
		default:
		}
	}
}

func (p *commitProxy) goAway() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.away = true
	for conn := range p.conns {
		_ = conn.Close()
	}
}

func (p *commitProxy) mend() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.away = false
}

func (p *commitProxy) track(conns ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.away {
		return false
	}
	for _, conn := range conns {
		p.conns[conn] = true
	}
	return true
}

func (p *commitProxy) serve(client net.Conn, target string) {
	defer client.Close()
	server, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	defer server.Close()
	if !p.track(client, server) {
		return
	}
	var caught atomic.Pointer[commitTrap] // the trap whose answer comes next
	var answering sync.WaitGroup
	answered := make(chan struct{}) // there is nothing more to read
	answering.Go(func() {
		defer close(answered)
		defer client.Close()
		buffer := make([]byte, 64<<10)
		for {
			n, err := server.Read(buffer)
			if trap := caught.Swap(nil); trap != nil {
				close(trap.sprung)
				if trap.fault == answerLost {
					if trap.andAway {
						p.goAway()
					}
					return
				}
				<-trap.release
			}
			if err != nil {
				return
			}
			if _, err := client.Write(buffer[:n]); err != nil {
				return
			}
		}
	})
	if p.ask(client, server, &caught) {
		<-answered
	}
	_ = server.Close()
	answering.Wait()
}

// packetOf reads what a client of MySQL sends: three bytes of length, low byte first, one of sequence, and so many bytes.
func packetOf(packets *bufio.Reader) ([]byte, error) {
	head, err := packets.Peek(4)
	if err != nil {
		return nil, err
	}
	packet := make([]byte, 4+int(head[0])+int(head[1])<<8+int(head[2])<<16)
	_, err = io.ReadFull(packets, packet)
	return packet, err
}

// statementOf returns the statement that a COM_QUERY asks for: its packet has the sequence 0 and the byte 3 before it.
func statementOf(packet []byte) (statement string, is bool) {
	if len(packet) < 5 || packet[3] != 0 || packet[4] != 3 {
		return "", false
	}
	return string(packet[5:]), true
}

// ask passes packets on. It reports whether the server has still to answer when it ends.
func (p *commitProxy) ask(client, server net.Conn, caught *atomic.Pointer[commitTrap]) (unanswered bool) {
	packets := bufio.NewReader(client)
	statements := ""
	for {
		packet, err := packetOf(packets)
		if err != nil {
			return false
		}
		if statement, is := statementOf(packet); is {
			p.note(statement)
			if statement == "START TRANSACTION" {
				statements = ""
			}
			statements += statement + "\n"
			if statement == "COMMIT" {
				trap := p.take(statements)
				if trap != nil && trap.fault == cutAndLate {
					_ = client.Close()
					close(trap.sprung)
					<-trap.release
					_, err := server.Write(packet)
					return err == nil
				}
				if trap != nil && !p.spring(trap, caught) {
					return false
				}
			}
		}
		if _, err := server.Write(packet); err != nil {
			return false
		}
	}
}

// spring does what is to be done before the COMMIT is sent on, and reports whether it is.
func (p *commitProxy) spring(trap *commitTrap, caught *atomic.Pointer[commitTrap]) bool {
	switch trap.fault {
	case notExecuted:
		close(trap.sprung)
		if trap.andAway {
			p.goAway()
		}
		return false
	case sentLate:
		close(trap.sprung)
		<-trap.release
	default:
		caught.Store(trap)
	}
	return true
}

func (trap *commitTrap) wait(t testing.TB) {
	t.Helper()
	select {
	case <-trap.sprung:
	case <-time.After(20 * time.Second):
		t.Fatal("no COMMIT came through the proxy")
	}
}

// awaitAgain waits until the statement comes once more.
func (trap *commitTrap) awaitAgain(t testing.TB) {
	t.Helper()
	select {
	case <-trap.again:
	case <-time.After(20 * time.Second):
		close(trap.release)
		t.Fatal("nobody asked again what became of the COMMIT")
	}
}

// statements by which a transaction is known.
const (
	storesOrder    = "INSERT INTO order_info"
	storesOrders   = "0), ('" // between two rows of order_info, which end with the points
	storesDispatch = "INSERT INTO platoon"
	marksOrder     = "UPDATE order_info SET status"
)

// behindCommits starts a system on the production stack whose order database is behind a commitProxy.
func behindCommits(t testing.TB) (*system, *commitProxy) {
	t.Helper()
	st := production(t)
	direct := st.order
	var orders *commitProxy
	st.order, orders = throughCommits(t, st.order)
	s := startOne(t, st)
	s.order = direct // for the test's own eyes
	return s, orders
}

func TestOrderWhoseCommitWasLostIsPlacedOnceAndAnswered201(t *testing.T) {
	t.Parallel()
	s, orders := behindCommits(t)
	placed := 0
	for _, fault := range []commitFault{notExecuted, answerLost} {
		for name, request := range map[string]struct{ key, body string }{
			"with a key":                 {"key-%d", `{"name":"x","amount":1}`},
			"without a key":              {"", `{"name":"x","amount":1}`},
			"with an order_id":           {"", `{"order_id":"o-%d","name":"x","amount":1}`},
			"with a key and an order_id": {"key-%d", `{"order_id":"o-%d","name":"x","amount":1}`},
		} {
			t.Run(fault.String()+", "+name, func(t *testing.T) {
				placed++
				body, headers := strings.ReplaceAll(request.body, "%d", fmt.Sprint(placed)), []string(nil)
				if request.key != "" {
					headers = []string{"Idempotency-Key", strings.ReplaceAll(request.key, "%d", fmt.Sprint(placed))}
				}
				trap := orders.arm(commitTrap{fault: fault, statement: storesOrder})
				first := mustSend(t, http.MethodPost, s.api+"/v1/orders", body, headers...)
				trap.wait(t)
				require.Equal(t, http.StatusCreated, first.status, "%s", first)
				require.Empty(t, first.header.Get("Idempotent-Replayed"), "the client sent it once")
				id := first.order(t).OrderID
				s.holdsOnce(t, id)
				if request.key != "" {
					mustSend(t, http.MethodPost, s.api+"/v1/orders", body, headers...).replays(t, first)
				}
				s.holdsNothingElse(t, placed)
			})
		}
	}
}

// A transaction of many orders is one COMMIT, and each client has its own answer.
func TestOrdersWhoseOneCommitWasLostAreEachPlacedOnceAndAnswered201(t *testing.T) {
	t.Parallel()
	for _, fault := range []commitFault{notExecuted, answerLost} {
		t.Run(fault.String(), func(t *testing.T) {
			t.Parallel()
			s, orders := behindCommits(t)
			trap := orders.arm(commitTrap{fault: fault, statement: storesOrders})
			var clients sync.WaitGroup
			var mu sync.Mutex
			bodies := map[string]string{} // of the answers, by key
			for c := range 20 {
				clients.Go(func() {
					for i := 0; ; i++ {
						key := fmt.Sprintf("key-%d-%d", c, i)
						a, err := send(http.MethodPost, s.api+"/v1/orders", goodOrder, "Idempotency-Key", key)
						if err != nil || a.status != http.StatusCreated || a.header.Get("Idempotent-Replayed") != "" {
							t.Errorf("%v %s: the client sent it once", err, a)
							return
						}
						mu.Lock()
						bodies[key] = string(a.body)
						mu.Unlock()
						select {
						case <-trap.sprung:
							return
						default:
						}
					}
				})
			}
			trap.wait(t)
			clients.Wait()
			for key, body := range bodies {
				require.Equal(t, body, string(s.placeUnder(t, key, goodOrder).body))
			}
			s.awaitAllDispatched(t, len(bodies))
			s.holdsNothingElse(t, len(bodies))
		})
	}
}

// atOnce runs the tests at the same time, because it is waiting that takes theirs. Parallel tests would each take a
// place from those that work.
func atOnce(t *testing.T, tests map[string]func(t *testing.T)) {
	t.Helper()
	var running sync.WaitGroup
	for name, test := range tests {
		running.Go(func() { t.Run(name, test) })
	}
	running.Wait()
}

func TestOrderWhoseCommitCannotBeResolvedKeepsItsIDForTheNextTry(t *testing.T) {
	t.Parallel()
	unknown := func(t *testing.T, orders *commitProxy, trap commitTrap, place func() answer) (orderID string) {
		trap.statement = storesOrder
		set := orders.arm(trap)
		began := time.Now()
		a := place()
		took := time.Since(began)
		set.wait(t)
		orders.mend()
		if trap.fault == answerLate {
			close(set.release)
		}
		require.Equal(t, http.StatusServiceUnavailable, a.status, "%s", a)
		require.Less(t, took, 8*time.Second, "a request has 5 s, whatever the database does")
		require.Equal(t, "outcome_unknown", a.problem(t).Code)
		require.NotEmpty(t, a.header.Get("Retry-After"))
		require.NotEmpty(t, a.problem(t).OrderID)
		return a.problem(t).OrderID
	}
	tests := map[string]func(t *testing.T){}
	for _, trap := range []commitTrap{{fault: notExecuted, andAway: true}, {fault: answerLost, andAway: true}, {fault: answerLate}} {
		executed := trap.fault != notExecuted
		tests[trap.fault.String()+", with a key"] = func(t *testing.T) {
			s, orders := behindCommits(t)
			id := unknown(t, orders, trap, func() answer { return s.placeUnder(t, "key", goodOrder) })
			again := s.placeUnder(t, "key", goodOrder)
			require.Equal(t, http.StatusCreated, again.status, "%s", again)
			if executed {
				require.Equal(t, id, again.order(t).OrderID)
			}
			s.placeUnder(t, "key", goodOrder).replays(t, again)
			s.holdsOnce(t, again.order(t).OrderID)
			s.holdsNothingElse(t, 1)
		}
		tests[trap.fault.String()+", without a key"] = func(t *testing.T) {
			s, orders := behindCommits(t)
			id := unknown(t, orders, trap, func() answer { return mustSend(t, http.MethodPost, s.api+"/v1/orders", goodOrder) })
			// The problem says: ask for it, or place it again under this id.
			asked := mustGet(t, s.api+"/v1/orders/"+id)
			again := mustSend(t, http.MethodPost, s.api+"/v1/orders", fmt.Sprintf(`{"order_id":%q,"name":"x","amount":1}`, id))
			if executed {
				require.Equal(t, http.StatusOK, asked.status, "%s", asked)
				require.Equal(t, http.StatusOK, again.status, "%s", again)
			} else {
				require.Equal(t, http.StatusNotFound, asked.status, "%s", asked)
				require.Equal(t, http.StatusCreated, again.status, "%s", again)
			}
			s.holdsOnce(t, id)
			s.holdsNothingElse(t, 1)
		}
	}
	atOnce(t, tests)
}

// While the server is still committing, whoever asks what became of it waits for its locks, in vain if that takes longer
// than anybody waits for a lock.
func TestOrderWhoseCommitIsStillUnderWayWhenTheConnectionBreaksIsNotRefused(t *testing.T) {
	t.Parallel()
	place := func(t *testing.T) (s *system, trap *commitTrap, answered chan answer) {
		s, orders := behindCommits(t)
		trap, answered = orders.arm(commitTrap{fault: cutAndLate, statement: storesOrder}), make(chan answer, 1)
		go func() {
			a, err := send(http.MethodPost, s.api+"/v1/orders", goodOrder)
			if err != nil {
				t.Error(err)
			}
			answered <- a
		}()
		trap.wait(t)
		return s, trap, answered
	}
	atOnce(t, map[string]func(t *testing.T){
		"it ends in time": func(t *testing.T) {
			s, trap, answered := place(t)
			trap.awaitAgain(t) // waits for a lock
			trap.awaitAgain(t) // did so in vain
			close(trap.release)
			a := <-answered
			require.Equal(t, http.StatusCreated, a.status, "%s", a)
			s.holdsOnce(t, a.order(t).OrderID)
			s.holdsNothingElse(t, 1)
		},
		"it takes longer than the request may": func(t *testing.T) {
			s, trap, answered := place(t)
			a := <-answered
			close(trap.release)
			require.Equal(t, http.StatusServiceUnavailable, a.status, "%s", a)
			require.Equal(t, "outcome_unknown", a.problem(t).Code)
			s.awaitOrderRows(t, 1, "SELECT COUNT(*) FROM order_info") // the COMMIT is on its way
			s.holdsOnce(t, a.problem(t).OrderID)
			s.holdsNothingElse(t, 1)
		},
	})
}

func TestNothingIsPromisedBeforeTheCommitIsAnswered(t *testing.T) {
	t.Parallel()
	s, orders := behindCommits(t)
	post := func() chan answer {
		answered := make(chan answer, 1)
		go func() {
			a, err := send(http.MethodPost, s.api+"/v1/orders", goodOrder, "Idempotency-Key", "key")
			if err != nil {
				t.Error(err)
			}
			answered <- a
		}()
		return answered
	}
	trap := orders.arm(commitTrap{fault: answerLate, statement: storesOrder})
	first := post()
	trap.wait(t)
	second := <-post() // finds the order, which is committed
	require.Equal(t, http.StatusCreated, second.status, "%s", second)
	require.Equal(t, "true", second.header.Get("Idempotent-Replayed"))
	select {
	case a := <-first:
		t.Fatalf("answered before MySQL did: %s", a)
	default:
	}
	close(trap.release)
	a := <-first
	require.Equal(t, http.StatusCreated, a.status, "%s", a)
	second.replays(t, a)
	s.holdsOnce(t, a.order(t).OrderID)
	s.holdsNothingElse(t, 1)
}

func TestSameRequestWhileTheFirstIsStillBeingCommittedIsToldToWait(t *testing.T) {
	t.Parallel()
	s, orders := behindCommits(t)
	trap := orders.arm(commitTrap{fault: sentLate, statement: storesOrder})
	first := make(chan answer, 1)
	go func() {
		a, err := send(http.MethodPost, s.api+"/v1/orders", goodOrder, "Idempotency-Key", "key")
		if err != nil {
			t.Error(err)
		}
		first <- a
	}()
	trap.wait(t)
	began := time.Now()
	busy := s.placeUnder(t, "key", goodOrder)
	require.Equal(t, http.StatusConflict, busy.status, "%s", busy)
	require.NotEmpty(t, busy.header.Get("Retry-After"))
	require.Less(t, time.Since(began), 5*time.Second)
	other := s.placeUnder(t, "another-key", goodOrder)
	require.Equal(t, http.StatusCreated, other.status, "others do not wait: %s", other)
	close(trap.release)
	a := <-first
	require.Equal(t, http.StatusCreated, a.status, "%s", a)
	s.placeUnder(t, "key", goodOrder).replays(t, a)
	s.holdsOnce(t, a.order(t).OrderID)
	s.holdsOnce(t, other.order(t).OrderID)
	s.holdsNothingElse(t, 2)
}

func TestDispatchWhoseCommitWasLostHasOneEffect(t *testing.T) {
	t.Parallel()
	for _, fault := range []commitFault{notExecuted, answerLost} {
		t.Run(fault.String(), func(t *testing.T) {
			t.Parallel()
			st := production(t)
			direct := st.dispatch
			var dispatches *commitProxy
			st.dispatch, dispatches = throughCommits(t, st.dispatch)
			s := startOne(t, st)
			s.dispatch = direct
			off := mustSend(t, http.MethodPatch, s.api+"/v1/couriers/zhao", `{"on_duty":false}`)
			require.Equal(t, http.StatusOK, off.status, "%s", off)
			s.addCourier(t, "small", 5) // is counted

			trap := dispatches.arm(commitTrap{fault: fault, statement: storesDispatch})
			id := s.place(t, "x", 1)
			trap.wait(t)
			s.holdsOnce(t, id)
			s.holdsNothingElse(t, 1)
			require.Equal(t, 1, s.dispatchRows(t, "SELECT active FROM courier WHERE courier_id = 'small'"), "the courier's load")
			require.EqualValues(t, 2, s.get(t, id).Version)
		})
	}
}

func TestOrderMarkedDispatchedByALostCommitIsMarkedOnce(t *testing.T) {
	t.Parallel()
	for _, fault := range []commitFault{notExecuted, answerLost} {
		t.Run(fault.String(), func(t *testing.T) {
			t.Parallel()
			s, orders := behindCommits(t)
			trap := orders.arm(commitTrap{fault: fault, statement: marksOrder})
			id := s.place(t, "x", 1)
			trap.wait(t)
			o := s.awaitDispatched(t, id)
			require.EqualValues(t, 2, o.Version)
			eventually(t, "the event is settled", func() error {
				if n := s.orderRows(t, "SELECT COUNT(*) FROM inbox WHERE consumer = 'order.mark-dispatched'"); n != 1 {
					return fmt.Errorf("%d events were handled", n)
				}
				return nil
			})
			s.holdsOnce(t, id)
			s.holdsNothingElse(t, 1)
		})
	}
}
