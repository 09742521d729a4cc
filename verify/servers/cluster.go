//go:build unix

package servers

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
)

// cluster is what the nodes of a RabbitMQ cluster have in common.
type cluster struct {
	home     string // with the cookie
	epmdPort int
	nodes    []string
}

func (c *cluster) settings() string {
	if c == nil {
		return ""
	}
	text := "cluster_partition_handling = pause_minority\ncluster_formation.peer_discovery_backend = classic_config\n"
	for i, node := range c.nodes {
		text += fmt.Sprintf("cluster_formation.classic_config.nodes.%d = %s\n", i+1, node)
	}
	return text
}

// StartCluster starts three RabbitMQ nodes of one cluster. A node in the minority pauses. release ends what they have in
// common, after the nodes; after an error nothing is left.
func StartCluster(ctx context.Context) (nodes [3]*Server, release func(), err error) {
	program, err := Find(RabbitMQ)
	if err != nil {
		return nodes, nil, err
	}
	c := &cluster{}
	if c.home, err = newTempDir("cluster"); err != nil {
		return nodes, nil, err
	}
	var epmd *Process
	release = func() {
		epmd.Kill()
		_ = os.RemoveAll(c.home)
	}
	for i := range nodes {
		c.nodes = append(c.nodes, fmt.Sprintf("takeout-test-%d@localhost", i+1))
	}
	err = os.WriteFile(filepath.Join(c.home, ".erlang.cookie"), []byte(rand.Text()), 0o400)
	if err == nil {
		c.epmdPort, err = FreePort()
	}
	if err == nil {
		epmd, err = startEPMD(c.epmdPort)
	}
	if err != nil {
		release()
		return nodes, nil, err
	}
	// They wait for each other.
	var errs [len(nodes)]error
	var starting sync.WaitGroup
	for i, name := range c.nodes {
		starting.Go(func() { nodes[i], errs[i] = newRabbitMQ(ctx, program, rabbitNode{name: name, cluster: c}) })
	}
	starting.Wait()
	if err := errors.Join(errs[:]...); err != nil {
		closeAll(nodes)
		release()
		return nodes, nil, err
	}
	return nodes, release, nil
}

// closeAll closes those nodes that were started.
func closeAll(nodes [3]*Server) {
	for _, node := range nodes {
		if node != nil {
			node.Close()
		}
	}
}
