package proxy_test

import (
	"context"
	"database/sql"
	"fmt"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-sql-driver/mysql"
	"github.com/stretchr/testify/require"

	"takeout/tests/testenv"
	"takeout/verify/proxy"
)

// table is one table of numbers, seen directly and through a proxy by a client with one connection.
type table struct {
	*proxy.Proxy
	client *sql.DB
	direct *sql.DB
}

func openTable(t testing.TB) *table {
	t.Helper()
	rawURL := testenv.MySQL(t)
	p, through := between(t, rawURL, proxy.MySQL)
	tb := &table{Proxy: p, client: openMySQL(t, through, false), direct: openMySQL(t, rawURL, true)}
	_, err := tb.direct.Exec("CREATE TABLE t (n INT PRIMARY KEY)")
	require.NoError(t, err)
	return tb
}

func openMySQL(t testing.TB, rawURL string, interpolate bool) *sql.DB {
	t.Helper()
	u, err := url.Parse(rawURL)
	require.NoError(t, err)
	cfg := mysql.NewConfig()
	cfg.Net, cfg.Addr, cfg.DBName, cfg.User = "tcp", u.Host, u.Path[1:], u.User.Username()
	cfg.Passwd, _ = u.User.Password()
	cfg.InterpolateParams = interpolate
	cfg.Logger = &mysql.NopLogger{}
	c, err := mysql.NewConnector(cfg)
	require.NoError(t, err)
	db := sql.OpenDB(c)
	db.SetMaxOpenConns(1)
	t.Cleanup(func() { db.Close() })
	return db
}

func (tb *table) has(t testing.TB, n int) bool {
	t.Helper()
	var rows int
	require.NoError(t, tb.direct.QueryRow(fmt.Sprint("SELECT COUNT(*) FROM t WHERE n = ", n)).Scan(&rows))
	return rows == 1
}

// insert stores a number in a transaction, and commits it with that statement.
func (tb *table) insert(n int, commit string) error {
	conn, err := tb.client.Conn(context.Background())
	if err != nil {
		return err
	}
	defer conn.Close()
	for _, statement := range []string{"START TRANSACTION", fmt.Sprintf("INSERT INTO t VALUES (%d) /* number %d. */", n, n), commit} {
		if _, err := conn.ExecContext(context.Background(), statement); err != nil {
			return err
		}
	}
	return nil
}

func (tb *table) goInsert(n int) <-chan error {
	done := make(chan error, 1)
	go func() { done <- tb.insert(n, "COMMIT") }()
	return done
}

func TestEachFaultOfMySQLDoesWhatItSays(t *testing.T) {
	tb := openTable(t)
	n := 0
	for _, fault := range proxy.Faults(proxy.MySQL) {
		codes := []uint16{0}
		if fault.Do == proxy.Fail {
			codes = []uint16{1205, 1213, 1290, 1040}
		}
		for _, code := range codes {
			t.Run(fmt.Sprint("point ", fault.At, ", action ", fault.Do, ", code ", code), func(t *testing.T) {
				n++
				fault, n := fault, n
				fault.Code, fault.Match = code, fmt.Sprintf("number %d.", n)
				armed := tb.Arm(fault)
				require.NoError(t, tb.insert(-n, "COMMIT"), "another transaction")
				require.Zero(t, armed.Sprung())
				done := tb.goInsert(n)
				await(t, "the fault happens", armed.Done())
				switch fault.Do {
				case proxy.Delay, proxy.DelayReply:
					require.Equal(t, fault.Do == proxy.DelayReply && fault.At == proxy.Commit, tb.has(t, n))
					require.Empty(t, done)
					armed.Disarm()
					require.NoError(t, await(t, "the client goes on", done))
					require.True(t, tb.has(t, n))
				case proxy.Fail:
					var refused *mysql.MySQLError
					require.ErrorAs(t, await(t, "the client goes on", done), &refused)
					require.Equal(t, code, refused.Number)
					if fault.At == proxy.Statement && code != 1213 { // the transaction goes on
						_, err := tb.client.Exec("COMMIT")
						require.NoError(t, err)
					}
				default:
					err := await(t, "the client goes on", done)
					require.Error(t, err)
					var refused *mysql.MySQLError
					require.NotErrorAs(t, err, &refused)
				}
				require.NoError(t, tb.insert(1000+n, "COMMIT"), "what comes next")
				stored := fault.At == proxy.Commit && (fault.Do == proxy.DropAfter || fault.Do == proxy.HalfPacket) || fault.Do == proxy.Delay || fault.Do == proxy.DelayReply
				require.Equal(t, stored, tb.has(t, n))
				require.True(t, tb.has(t, 1000+n))
				require.Equal(t, 1, armed.Sprung())
			})
		}
	}
}

func TestStatementThatWasExecutedBeforeTheConnectionBrokeIsStored(t *testing.T) {
	tb := openTable(t)
	for n, do := range []proxy.Action{proxy.DropAfter, proxy.HalfPacket} {
		armed := tb.Arm(proxy.Fault{At: proxy.Statement, Do: do, Match: "INSERT"})
		_, err := tb.client.Exec(fmt.Sprintf("INSERT INTO t VALUES (%d)", n))
		require.Error(t, err)
		await(t, "the fault happens", armed.Done())
		require.True(t, tb.has(t, n))
	}
}

func TestTransactionAfterAFailedCommitHasNothingOfItWithinIt(t *testing.T) {
	tb := openTable(t)
	tx, err := tb.client.Begin()
	require.NoError(t, err)
	_, err = tx.Exec("INSERT INTO t VALUES (1)")
	require.NoError(t, err)
	tb.Arm(proxy.Fault{At: proxy.Commit, Do: proxy.Fail, Code: 1213})
	require.ErrorContains(t, tx.Commit(), "1213")
	require.NoError(t, tb.insert(2, "COMMIT"), "in the same session: START TRANSACTION commits what is open")
	require.False(t, tb.has(t, 1))
	require.True(t, tb.has(t, 2))
}

func TestCommitIsKnownHoweverItIsWritten(t *testing.T) {
	tb := openTable(t)
	fault := proxy.Fault{At: proxy.Commit, Do: proxy.DropBefore}
	for n, commit := range []string{"COMMIT", "commit", " Commit ; ", "COMMIT WORK"} {
		armed := tb.Arm(fault)
		require.Error(t, tb.insert(n, commit))
		require.Equal(t, 1, armed.Sprung(), commit)
		require.False(t, tb.has(t, n))
	}
	for n, other := range []string{"/* COMMIT */ DO 1", "SELECT 'COMMIT'", "ROLLBACK"} {
		armed := tb.Arm(fault)
		require.NoError(t, tb.insert(100+n, other))
		require.Zero(t, armed.Sprung(), other)
		armed.Disarm()
		tb.Cut()
	}
}

func TestPreparedStatementMeetsTheFaultWhenItIsExecuted(t *testing.T) {
	tb := openTable(t)
	conn, err := tb.client.Conn(t.Context())
	require.NoError(t, err)
	defer conn.Close()
	insert, err := conn.PrepareContext(t.Context(), "INSERT INTO t VALUES (?)")
	require.NoError(t, err)
	defer insert.Close()
	commit, err := conn.PrepareContext(t.Context(), "COMMIT")
	require.NoError(t, err)
	defer commit.Close()
	_, err = conn.ExecContext(t.Context(), "START TRANSACTION")
	require.NoError(t, err)
	refused := tb.Arm(proxy.Fault{At: proxy.Statement, Do: proxy.Fail, Code: 1205, Match: "INSERT INTO t"})
	lost := tb.Arm(proxy.Fault{At: proxy.Commit, Do: proxy.DropAfter, Match: "INSERT INTO t"})
	_, err = insert.Exec(1)
	require.ErrorContains(t, err, "1205")
	require.Equal(t, 1, refused.Sprung())
	_, err = insert.Exec(2)
	require.NoError(t, err)
	_, err = commit.Exec()
	require.Error(t, err)
	require.Equal(t, 1, lost.Sprung())
	require.False(t, tb.has(t, 1))
	require.True(t, tb.has(t, 2))
}

func TestFaultMeetsAsManyEventsAsItSays(t *testing.T) {
	tb := openTable(t)
	armed := tb.Arm(proxy.Fault{At: proxy.Statement, Do: proxy.Fail, Code: 1205, Match: "DO 1", Skip: 2, Count: 3})
	var failed []int
	for i := range 8 {
		if _, err := tb.client.Exec("DO 1"); err != nil {
			failed = append(failed, i)
		}
	}
	require.Equal(t, []int{2, 3, 4}, failed)
	require.Equal(t, 3, armed.Sprung())
	await(t, "all happened", armed.Done())

	always := tb.Arm(proxy.Fault{At: proxy.Statement, Do: proxy.Fail, Code: 1205, Match: "DO 1", Count: -1})
	for range 10 {
		_, err := tb.client.Exec("DO 1")
		require.Error(t, err)
	}
	always.Disarm()
	_, err := tb.client.Exec("DO 1")
	require.NoError(t, err)
	require.Equal(t, 10, always.Sprung())
}

func TestFaultOfAnotherProtocolNeverHappens(t *testing.T) {
	tb := openTable(t)
	for _, fault := range append(proxy.Faults(proxy.AMQP), proxy.Fault{At: proxy.Commit, Do: proxy.Nack}, proxy.Fault{}) {
		armed := tb.Arm(fault)
		require.NoError(t, tb.insert(int(fault.At)*100+int(fault.Do), "COMMIT"))
		require.Zero(t, armed.Sprung())
		armed.Disarm()
	}
}

func TestDelayIsAsLongAsItSays(t *testing.T) {
	tb := openTable(t)
	for n, do := range []proxy.Action{proxy.Delay, proxy.DelayReply} {
		tb.Arm(proxy.Fault{At: proxy.Commit, Do: do, Delay: 100 * time.Millisecond})
		began := time.Now()
		require.NoError(t, tb.insert(n, "COMMIT"))
		require.GreaterOrEqual(t, time.Since(began), 100*time.Millisecond)
		require.True(t, tb.has(t, n))
	}
}

func TestStatementInSeveralPacketsIsPassedOnAndRefusedAsAWhole(t *testing.T) {
	tb := openTable(t)
	const maxPayload = 1<<24 - 1
	head, tail := "SELECT /* long */ LENGTH('", "')"
	long := head + strings.Repeat("x", maxPayload-1-len(head)-len(tail)) + tail // with the command's byte a full packet, and an empty one
	conn, err := tb.client.Conn(t.Context())
	require.NoError(t, err)
	defer conn.Close()
	length := func() (n int, err error) {
		err = conn.QueryRowContext(t.Context(), long).Scan(&n)
		return n, err
	}
	n, err := length()
	require.NoError(t, err)
	require.Equal(t, maxPayload-1-len(head)-len(tail), n)

	tb.Arm(proxy.Fault{At: proxy.Statement, Do: proxy.Fail, Code: 1205, Match: "long"})
	_, err = length()
	require.ErrorContains(t, err, "1205")
	n, err = length()
	require.NoError(t, err, "the session goes on")
	require.Equal(t, maxPayload-1-len(head)-len(tail), n)

	var back string
	require.NoError(t, conn.QueryRowContext(t.Context(), "SELECT REPEAT('y', 5000000)").Scan(&back))
	require.Len(t, back, 5_000_000)
}

func TestManyConnectionsMeetOneFaultOnce(t *testing.T) {
	tb := openTable(t)
	tb.client.SetMaxOpenConns(32)
	tb.client.SetMaxIdleConns(32)
	armed := tb.Arm(proxy.Fault{At: proxy.Commit, Do: proxy.DropAfter, Count: 10, Skip: 5})
	var clients sync.WaitGroup
	var mu sync.Mutex
	broken := 0
	for c := range 32 {
		clients.Go(func() {
			for i := range 20 {
				if tb.insert(c*100+i, "COMMIT") != nil {
					mu.Lock()
					broken++
					mu.Unlock()
				}
			}
		})
	}
	clients.Wait()
	require.Equal(t, 10, broken)
	require.Equal(t, 10, armed.Sprung())
	var rows int
	require.NoError(t, tb.direct.QueryRow("SELECT COUNT(*) FROM t").Scan(&rows))
	require.Equal(t, 640, rows, "each was executed")
}
