//go:build unix

package servers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
)

// StartGalera starts three MariaDB nodes of one Galera cluster: what was committed on one is on all of them. A node that is
// started again gets from the others what it has missed; at least one must be running then. After an error nothing is left.
func StartGalera(ctx context.Context) (nodes [3]*Server, err error) {
	program, err := Find(MySQL)
	if err != nil {
		return nodes, err
	}
	found, _ := filepath.Glob("/usr/lib*/galera*/libgalera_smm.so")
	if len(found) == 0 {
		return nodes, errors.New("libgalera_smm.so is not installed; on Debian and Ubuntu it is in the package galera-4")
	}
	defer func() {
		if err != nil {
			closeAll(nodes)
		}
	}()
	var group, changes, copies [len(nodes)]int
	members := "gcomm://"
	for i := range nodes {
		if err := FreePorts(&group[i], &changes[i], &copies[i]); err != nil {
			return nodes, err
		}
		members += fmt.Sprintf("127.0.0.1:%d,", group[i])
	}
	for i := range nodes {
		settings := []string{
			"--wsrep-on=ON",
			"--loose-plugin-wsrep-provider=OFF", // else MariaDB 11 refuses to change the provider's options later
			"--wsrep-provider=" + found[0],
			"--wsrep-cluster-address=" + members,
			"--wsrep-node-address=127.0.0.1:" + strconv.Itoa(group[i]),
			"--wsrep-sst-method=rsync",
			"--wsrep-sst-receive-address=127.0.0.1:" + strconv.Itoa(copies[i]),
			fmt.Sprintf("--wsrep-provider-options=gmcast.listen_addr=tcp://127.0.0.1:%d;ist.recv_addr=127.0.0.1:%d", group[i], changes[i]),
			"--binlog-format=ROW",
			"--innodb-autoinc-lock-mode=2",
		}
		first := i == 0
		// As root, rsync would take a copy of the data as nobody, who may not write it.
		nodes[i], err = newMySQL(ctx, program, mysqlNode{user: "mysql", settings: func() []string {
			if !first {
				return settings
			}
			first = false
			return slices.Concat(settings, []string{"--wsrep-new-cluster"})
		}})
		if err != nil {
			return nodes, fmt.Errorf("node %d: %w", i, err)
		}
	}
	return nodes, nil
}

// giveTo makes the files a user's own.
func giveTo(name string, files ...string) error {
	owner, err := user.Lookup(name)
	if err != nil {
		return err
	}
	uid, err := strconv.Atoi(owner.Uid)
	if err != nil {
		return err
	}
	gid, err := strconv.Atoi(owner.Gid)
	if err != nil {
		return err
	}
	for _, file := range files {
		if err := os.Chown(file, uid, gid); err != nil {
			return err
		}
	}
	return nil
}
