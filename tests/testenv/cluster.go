package testenv

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// StartRabbitMQCluster starts three nodes of one cluster for this test alone, and removes them when the test ends. It
// needs RabbitMQ installed on this machine. A node in the minority pauses.
func StartRabbitMQCluster(t testing.TB) (nodes [3]*RabbitMQServer) {
	t.Helper()
	found, err := findNative(rabbitKind)
	if err != nil {
		t.Fatalf("testenv: a cluster needs RabbitMQ on this machine; on Debian and Ubuntu install rabbitmq-server: %v", err)
	}
	cluster, err := newRabbitCluster(t)
	if err != nil {
		t.Fatalf("testenv: prepare a cluster: %v", err)
	}
	var errs [3]error
	var starting sync.WaitGroup
	for i, name := range cluster.nodes {
		starting.Go(func() {
			var s server
			s, errs[i] = startOn(clusterNode{found.(native), rabbitNode{name: name, cluster: cluster}}, rabbitKind, false)
			nodes[i] = &RabbitMQServer{private{t, s}}
		})
	}
	starting.Wait()
	t.Cleanup(func() {
		for _, node := range nodes {
			if node.server != nil {
				closeServer(node.server)
			}
		}
	})
	if err := errors.Join(errs[:]...); err != nil {
		t.Fatal(err)
	}
	return nodes
}

// newRabbitCluster makes what the nodes need before the first one starts.
func newRabbitCluster(t testing.TB) (*rabbitCluster, error) {
	c := &rabbitCluster{home: t.TempDir()}
	for i := range 3 {
		c.nodes = append(c.nodes, fmt.Sprintf("takeout-test-%d@localhost", i+1))
	}
	if err := os.WriteFile(filepath.Join(c.home, ".erlang.cookie"), []byte(rand.Text()), 0o400); err != nil {
		return nil, err
	}
	var err error
	if c.epmdPort, err = freePort(); err != nil {
		return nil, err
	}
	epmd, err := startEPMD(c.epmdPort)
	if err != nil {
		return nil, err
	}
	t.Cleanup(epmd.kill)
	return c, nil
}

// clusterNode starts one node.
type clusterNode struct {
	native
	node rabbitNode
}

func (n clusterNode) start(bool, ...string) (server, error) {
	return newRabbitNode(n.program, n.node)
}
