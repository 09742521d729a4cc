package testenv

import (
	"context"
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
	return started(t, servers.StartGalera)
}

// StartGroup starts three MySQL servers with group replication for this test alone, the first of which is the primary, and
// removes them when the test ends. It needs MySQL installed on this machine. A server that is started again needs two others
// that run.
func StartGroup(t testing.TB) (members [3]*MySQLServer) {
	t.Helper()
	return started(t, servers.StartGroup)
}

func started(t testing.TB, start func(context.Context) ([3]*servers.Server, error)) (nodes [3]*MySQLServer) {
	t.Helper()
	all, err := start(aborted)
	if err != nil {
		t.Fatalf("testenv: start a cluster: %v", err)
	}
	for i, s := range all {
		nodes[i] = &MySQLServer{private{t, s}}
		t.Cleanup(s.Close)
	}
	return nodes
}
