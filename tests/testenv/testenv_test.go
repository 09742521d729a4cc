package testenv_test

import (
	"database/sql"
	"net/url"
	"strings"
	"testing"
	"time"

	_ "github.com/go-sql-driver/mysql"
	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"takeout/tests/testenv"
)

func TestMain(m *testing.M) { testenv.Main(m) }

func TestDatabaseIsFreshAndEmpty(t *testing.T) {
	t.Parallel()
	first, second := testenv.MySQL(t), testenv.MySQL(t)
	require.NotEqual(t, first, second)
	require.Zero(t, tables(t, first))
	execute(t, first, "CREATE TABLE x (id INT)")
	require.Equal(t, 1, tables(t, first))
	require.Zero(t, tables(t, second))
}

func TestDatabaseIsDroppedWithItsTest(t *testing.T) {
	t.Parallel()
	var gone string
	t.Run("test", func(t *testing.T) { gone = testenv.MySQL(t) })
	require.ErrorContains(t, open(t, gone).Ping(), "Unknown database")
}

func TestNamespacesDiffer(t *testing.T) {
	t.Parallel()
	one, other := testenv.AMQP(t), testenv.AMQP(t)
	require.NotEqual(t, namespace(t, one), namespace(t, other))
}

func TestNamespaceIsDeletedWithItsTest(t *testing.T) {
	t.Parallel()
	neighbour := testenv.AMQP(t)
	declare(t, neighbour)
	var gone string
	t.Run("test", func(t *testing.T) {
		gone = testenv.AMQP(t)
		declare(t, gone)
	})
	require.Error(t, inspect(t, gone))
	require.NoError(t, inspect(t, neighbour))
}

func TestMySQLKeepsAddressAndDataOverRestarts(t *testing.T) {
	t.Parallel()
	server := testenv.StartMySQL(t)
	address := server.URL("keep")
	execute(t, address, "CREATE TABLE kept (id INT)")
	server.Stop()
	require.Error(t, open(t, address).Ping(), "stopped")
	server.Start()
	execute(t, address, "INSERT INTO kept VALUES (1)")
	server.Kill()
	require.Error(t, open(t, address).Ping(), "killed")
	server.Start()
	require.Equal(t, address, server.URL("keep"))
	var rows int
	require.NoError(t, open(t, address).QueryRow("SELECT COUNT(*) FROM kept").Scan(&rows))
	require.Equal(t, 1, rows)
}

func TestFrozenMySQLIsSilent(t *testing.T) {
	t.Parallel()
	server := testenv.StartMySQL(t)
	address := server.URL("ice") + "?readTimeout=300ms"
	server.Freeze()
	require.Error(t, open(t, address).Ping())
	server.Thaw()
	require.NoError(t, open(t, address).Ping())
}

func TestRabbitMQKeepsAddressAndQueuesOverRestarts(t *testing.T) {
	t.Parallel()
	server := testenv.StartRabbitMQ(t)
	address := server.URL()
	named := address + "?namespace=keep"
	declare(t, named)
	server.Stop()
	_, err := amqp.Dial(address)
	require.Error(t, err, "stopped")
	server.Start()
	require.Equal(t, address, server.URL())
	require.NoError(t, inspect(t, named))
	server.Kill()
	_, err = amqp.Dial(address)
	require.Error(t, err, "killed")
	server.Start()
	require.NoError(t, inspect(t, named))
	out, err := server.Ctl("list_queues", "name")
	require.NoError(t, err)
	require.Contains(t, out, "keep.queue")
}

func TestFrozenRabbitMQIsSilent(t *testing.T) {
	t.Parallel()
	server := testenv.StartRabbitMQ(t)
	impatient := amqp.Config{Dial: amqp.DefaultDial(300 * time.Millisecond)}
	server.Freeze()
	_, err := amqp.DialConfig(server.URL(), impatient)
	require.Error(t, err)
	server.Thaw()
	conn, err := amqp.Dial(server.URL())
	require.NoError(t, err)
	require.NoError(t, conn.Close())
}

func open(t *testing.T, address string) *sql.DB {
	t.Helper()
	u, err := url.Parse(address)
	require.NoError(t, err)
	db, err := sql.Open("mysql", u.User.String()+"@tcp("+u.Host+")"+u.Path+"?"+u.RawQuery)
	require.NoError(t, err)
	t.Cleanup(func() { db.Close() })
	return db
}

func execute(t *testing.T, address, statement string) {
	t.Helper()
	_, err := open(t, address).Exec(statement)
	require.NoError(t, err)
}

func tables(t *testing.T, address string) (n int) {
	t.Helper()
	require.NoError(t, open(t, address).
		QueryRow("SELECT COUNT(*) FROM information_schema.tables WHERE table_schema = DATABASE()").Scan(&n))
	return n
}

func namespace(t *testing.T, address string) string {
	t.Helper()
	u, err := url.Parse(address)
	require.NoError(t, err)
	return u.Query().Get("namespace")
}

// withChannel runs f on a channel of the broker at this address.
func withChannel(t *testing.T, address string, f func(*amqp.Channel) error) error {
	t.Helper()
	plain, _, _ := strings.Cut(address, "?")
	conn, err := amqp.Dial(plain)
	require.NoError(t, err)
	defer conn.Close()
	ch, err := conn.Channel()
	require.NoError(t, err)
	return f(ch)
}

func declare(t *testing.T, address string) {
	t.Helper()
	name := namespace(t, address)
	require.NoError(t, withChannel(t, address, func(ch *amqp.Channel) error {
		if err := ch.ExchangeDeclare(name, "topic", true, false, false, false, nil); err != nil {
			return err
		}
		_, err := ch.QueueDeclare(name+".queue", true, false, false, false, amqp.Table{"x-queue-type": "quorum"})
		return err
	}))
}

func inspect(t *testing.T, address string) error {
	t.Helper()
	name := namespace(t, address)
	return withChannel(t, address, func(ch *amqp.Channel) error {
		if err := ch.ExchangeDeclarePassive(name, "topic", true, false, false, false, nil); err != nil {
			return err
		}
		_, err := ch.QueueDeclarePassive(name+".queue", true, false, false, false, nil)
		return err
	})
}
