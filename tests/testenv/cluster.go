package testenv

import (
	"testing"

	"takeout/verify/servers"
)

// StartRabbitMQCluster starts three nodes of one cluster for this test alone, and removes them when the test ends. It
// needs RabbitMQ installed on this machine. A node in the minority pauses.
func StartRabbitMQCluster(t testing.TB) (nodes [3]*RabbitMQServer) {
	t.Helper()
	started, release, err := servers.StartCluster(aborted)
	if err != nil {
		t.Fatalf("testenv: start a cluster: %v", err)
	}
	for i, s := range started {
		nodes[i] = &RabbitMQServer{private{t, s}}
	}
	t.Cleanup(func() {
		for _, s := range started {
			s.Close()
		}
		release()
	})
	return nodes
}

// StartGalera starts three MariaDB nodes of one Galera cluster for this test alone, and removes them when the test ends. It
// needs MariaDB with Galera installed on this machine. A node that is started again needs another one that runs.
func StartGalera(t testing.TB) (nodes [3]*MySQLServer) {
	t.Helper()
	started, err := servers.StartGalera(aborted)
	if err != nil {
		t.Fatalf("testenv: start a cluster: %v", err)
	}
	for i, s := range started {
		nodes[i] = &MySQLServer{private{t, s}}
		t.Cleanup(s.Close)
	}
	return nodes
}
