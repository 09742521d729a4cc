//go:build unix

package servers

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// StartGroup starts three MySQL servers with group replication, of which one, the primary, is written to: the others have
// what it has committed, and choose a new one of them when it is lost. The first is the primary. A server that is started
// again joins the others; at least two must be running then. After an error nothing is left.
func StartGroup(ctx context.Context) (members [3]*Server, err error) {
	program, err := Find(MySQL)
	if err != nil {
		return members, err
	}
	if found, _ := filepath.Glob("/usr/lib*/mysql/plugin/group_replication.so"); len(found) == 0 {
		return members, errors.New("group_replication.so is not installed; on Debian unstable it is in the package mysql-server")
	}
	defer func() {
		if err != nil {
			closeAll(members)
		}
	}()
	var ports [len(members)]int
	if err := FreePorts(&ports[0], &ports[1], &ports[2]); err != nil {
		return members, err
	}
	var seeds []string
	for _, port := range ports {
		seeds = append(seeds, "127.0.0.1:"+strconv.Itoa(port))
	}
	for i := range members {
		settings := []string{
			"--server-id=" + strconv.Itoa(i+1),
			"--gtid-mode=ON",
			"--enforce-gtid-consistency=ON",
			"--report-host=127.0.0.1",
			"--plugin-load-add=group_replication.so",
			"--group-replication-group-name=5f6dbe4e-2f60-4d8c-9a1f-3c2f0a7f1d11",
			"--group-replication-local-address=" + seeds[i],
			"--group-replication-group-seeds=" + strings.Join(seeds, ","),
			"--group-replication-recovery-get-public-key=ON",
		}
		again := false
		members[i], err = newMySQL(ctx, program, mysqlNode{user: "mysql", settings: func() []string {
			onBoot := "--group-replication-start-on-boot=OFF"
			if again {
				onBoot = "--group-replication-start-on-boot=ON"
			}
			again = true
			return append(slices.Clone(settings), onBoot)
		}})
		if err == nil {
			err = join(members[i], i == 0)
		}
		if err != nil {
			return members, fmt.Errorf("member %d: %w", i, err)
		}
	}
	return members, nil
}

// join has a server that has just been made join the group, or found it.
func join(s *Server, found bool) error {
	db, err := OpenMySQL(s.URL())
	if err != nil {
		return err
	}
	defer db.Close()
	bootstrap := 0
	if found {
		bootstrap = 1
	}
	for _, statement := range []string{
		"CHANGE REPLICATION SOURCE TO SOURCE_USER = 'root', SOURCE_PASSWORD = '" + Password + "' FOR CHANNEL 'group_replication_recovery'",
		fmt.Sprintf("SET GLOBAL group_replication_bootstrap_group = %d", bootstrap),
		"START GROUP_REPLICATION",
		"SET GLOBAL group_replication_bootstrap_group = 0",
	} {
		if _, err := db.Exec(statement); err != nil {
			return err
		}
	}
	return nil
}
